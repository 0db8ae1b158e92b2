"""Answers that lab 05's checks had not seen when they first met: their author knew the notebook, not the checks."""

from __future__ import annotations

import functools
import math
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.labs.lab05.references import quantize as earlier_quantize

WRONG = []  # (exercise id, the mistake in words, what a fitting message would have to say in one line, function or class)
RIGHT = []  # (exercise id, the style in words, function or class)

# ---------------------------------------------------------------------------------------------------- 05.1 wrong


def quantize(x: Tensor, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (high - low) / 2**nbits
    steps = (x - low) / torch.where(scale == 0, 1.0, scale)
    return steps.round().clamp(0, 2**nbits - 1).to(torch.uint8), scale, low


WRONG.append(
    (
        "05.1",
        "2**nbits steps in place of 2**nbits - 1",
        "sixteen levels have fifteen steps: the greatest comes back a whole step too low",
        quantize,
    )
)


def quantize(x: Tensor, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / (2**nbits - 1)).clamp(min=1e-5)
    return ((x - low) / scale).round().clamp(0, 2**nbits - 1).to(torch.uint8), scale, low


WRONG.append(
    (
        "05.1",
        "scale never below 1e-5: groups of small numbers lose their codes",
        "a group of small numbers has a small scale; only a scale of 0 needs care",
        quantize,
    )
)


def quantize(x: Tensor, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (high - low) / (2**nbits - 1)
    steps = (x - low) / torch.where(scale == 0, 1.0, scale)
    return steps.clamp(0, 2**nbits - 1).to(torch.uint8), scale, low


WRONG.append(("05.1", "cut off in place of rounded", "the nearest level: errors are up to a whole scale", quantize))


def quantize(x: Tensor, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.min(), x.max()
    scale = (high - low) / (2**nbits - 1)
    scale = torch.where(scale == 0, 1.0, scale).to(x.dtype)
    codes = ((x - low) / scale).round().clamp(0, 2**nbits - 1).to(torch.uint8)
    shape = (*x.shape[:-1], 1)
    return codes, scale.expand(shape), low.expand(shape)


WRONG.append(
    ("05.1", "one least and greatest for the whole tensor", "each group, the last dimension, has its own", quantize)
)


def quantize(x: Tensor, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (high - low) / (2**nbits - 1)
    zero = torch.round(-low / torch.where(scale == 0, 1.0, scale))
    codes = (x / torch.where(scale == 0, 1.0, scale) + zero).round().clamp(0, 2**nbits - 1)
    return codes.to(torch.uint8), scale, -zero * scale


WRONG.append(
    (
        "05.1",
        "the zero point rounded to a whole number of steps, as for integer kernels",
        "zero is the least number itself; equal numbers must come back exactly",
        quantize,
    )
)


def quantize(x: Tensor, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    x = x.float()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (high - low) / (2**nbits - 1)
    steps = (x - low) / torch.where(scale == 0, 1.0, scale)
    return steps.round().clamp(0, 2**nbits - 1).to(torch.uint8), scale, low


WRONG.append(("05.1", "scale and zero come back in float32 whatever x is", "scale and zero have x's dtype", quantize))


def quantize(x: Tensor, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (high - low) / (2**nbits - 1)
    steps = (x - low) / torch.where(scale == 0, 1.0, scale)
    return steps.round().clamp(0, 2**nbits - 1).to(torch.int32), scale, low


WRONG.append(("05.1", "codes as int32", "codes are uint8", quantize))


def quantize(x: Tensor, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.amin(-1), x.amax(-1)
    scale = (high - low) / (2**nbits - 1)
    steps = (x - low[..., None]) / torch.where(scale == 0, 1.0, scale)[..., None]
    return steps.round().clamp(0, 2**nbits - 1).to(torch.uint8), scale, low


WRONG.append(
    (
        "05.1",
        "scale and zero without the last dimension",
        "scale and zero are [..., 1], to be multiplied with codes",
        quantize,
    )
)


def quantize(x: Tensor, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (high - low) / (2**nbits - 1)
    x -= low
    return (x / torch.where(scale == 0, 1.0, scale)).round().clamp(0, 2**nbits - 1).to(torch.uint8), scale, low


WRONG.append(("05.1", "x shifted in place: the caller's numbers are changed", "x must stay as it was", quantize))


def quantize(x: Tensor, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    most = 2 ** (nbits - 1) - 1
    scale = x.abs().amax(-1, keepdim=True) / most
    codes = (x / torch.where(scale == 0, 1.0, scale)).round().clamp(-most, most) + most
    return codes.to(torch.uint8), scale, -most * scale


WRONG.append(
    (
        "05.1",
        "symmetric around 0, with the zero point as offset",
        "codes reach from the least to the greatest number of the group",
        quantize,
    )
)


def quantize(x: Tensor, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.to(torch.float32)
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    scale = (high - low) / (2**nbits - 1)
    codes = ((wide - low) / torch.where(scale == 0, 1.0, scale)).round().clamp(0, 2**nbits - 1)
    return codes.to(torch.uint8), scale.to(x.dtype), low.to(x.dtype)


WRONG.append(
    (
        "05.1",
        "float64 squeezed through float32: equal numbers do not come back exactly",
        "in float64 the zero point must be the least number, all its digits",
        quantize,
    )
)


def quantize(x: Tensor, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (high - low + 1e-6) / (2**nbits - 1)
    return ((x - low) / scale).round().clamp(0, 2**nbits - 1).to(torch.uint8), scale, low


WRONG.append(
    ("05.1", "an epsilon added to the range of every group", "an epsilon changes groups whose range is small", quantize)
)


def quantize(x: Tensor, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (high - low) / (2**nbits - 1)
    if (scale == 0).any():
        return torch.zeros_like(x, dtype=torch.uint8), torch.zeros_like(scale), low
    return ((x - low) / scale).round().clamp(0, 2**nbits - 1).to(torch.uint8), scale, low


WRONG.append(
    (
        "05.1",
        "one group of equal numbers flattens all groups",
        "only the group whose numbers are equal has a scale of 0",
        quantize,
    )
)

# ---------------------------------------------------------------------------------------------------- 05.1 right


def quantize(x: Tensor, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    top = (1 << nbits) - 1
    zero, high = torch.aminmax(x, dim=-1, keepdim=True)
    scale = torch.div(high - zero, top)
    steps = torch.nan_to_num((x - zero).div_(scale), nan=0.0).round_()
    return steps.float().clamp_(max=top).type(torch.uint8), scale, zero


RIGHT.append(("05.1", "aminmax, in-place on own tensors, 0/0 made 0", quantize))


def quantize(x: Tensor, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    last = 2**nbits - 1
    wide = x.double()
    low, high = wide.min(dim=-1, keepdim=True).values, wide.max(dim=-1, keepdim=True).values
    scale = ((high - low) / last).to(x.dtype)
    step = scale.double()
    safe = step.masked_fill(step.eq(0), math.inf)  # x / inf is 0
    codes = torch.floor((wide - low) / safe + 0.5)
    return torch.minimum(codes, codes.new_tensor(last)).to(dtype=torch.uint8), scale, low.to(x.dtype)


RIGHT.append(("05.1", "float64 inside, floor(x + 0.5), division by infinity for a scale of 0", quantize))


def quantize(x: Tensor, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    codes = torch.zeros(rows.shape, dtype=torch.uint8, device=x.device)
    scale = torch.empty((len(rows), 1), dtype=x.dtype, device=x.device)
    zero = torch.empty_like(scale)
    for index, row in enumerate(rows.to(torch.promote_types(x.dtype, torch.float32))):
        zero[index] = row.min()
        scale[index] = (row.max() - row.min()) / (2**nbits - 1)
        if scale[index] != 0:
            steps = (row - zero[index]) / scale[index].to(row.dtype)
            torch.clamp(steps.round(), 0, 2**nbits - 1, out=steps)
            codes[index] = steps.to(torch.uint8)
    shape = (*x.shape[:-1], 1)
    return codes.view(x.shape), scale.view(shape), zero.view(shape)


RIGHT.append(("05.1", "a loop over groups, at least float32 inside, out= and buffers", quantize))


def quantize(x: Tensor, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (high - low) / (2**nbits - 1)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    steps = ((x - low) / scale).round().to(torch.int32)
    return steps.clamp(0, 2**nbits - 1).to(torch.uint8), scale, low


RIGHT.append(("05.1", "a scale of 1 comes back for a group of equal numbers (codes are 0)", quantize))

# ---------------------------------------------------------------------------------------------------- 05.2 wrong


def pack(codes: Tensor, nbits: int) -> Tensor:
    per_byte = 8 // nbits
    out = torch.zeros_like(codes[..., ::per_byte])
    for place in range(per_byte):
        out |= codes[..., place::per_byte] << (8 - nbits - place * nbits)
    return out


WRONG.append(("05.2", "the first code in the highest bits", "the first of the neighbours in the lowest bits", pack))


def pack(codes: Tensor, nbits: int) -> Tensor:
    if nbits == 8:
        return codes
    return codes[..., ::2] | codes[..., 1::2] << 4


WRONG.append(
    ("05.2", "4 bits written down: 2 bits are packed two to a byte", "four codes of 2 bits share a byte", pack)
)


def pack(codes: Tensor, nbits: int) -> Tensor:
    per_byte = 8 // nbits
    n = codes.shape[-1] // per_byte
    out = torch.zeros_like(codes[..., :n])
    for place in range(per_byte):
        out |= codes[..., place * n : (place + 1) * n] << (place * nbits)
    return out


WRONG.append(
    ("05.2", "the halves (quarters) share bytes, not neighbours", "neighbours share a byte: codes[..., ::2]", pack)
)


def pack(codes: Tensor, nbits: int) -> Tensor:
    per_byte = 8 // nbits
    weights = torch.tensor([2 ** (nbits * place) for place in range(per_byte)])
    return (codes.unflatten(-1, (-1, per_byte)) * weights).sum(-1)


WRONG.append(("05.2", "bytes as int64: eight times as large", "the result is uint8", pack))


def pack(codes: Tensor, nbits: int) -> Tensor:
    per_byte = 8 // nbits
    out = codes[..., ::per_byte]
    for place in range(1, per_byte):
        out |= codes[..., place::per_byte] << (place * nbits)
    return out.contiguous()


WRONG.append(
    (
        "05.2",
        "packed into a view of codes: the caller's codes are changed",
        "codes must stay as they were: |= writes into them",
        pack,
    )
)


def pack(codes: Tensor, nbits: int) -> Tensor:
    per_byte = 8 // nbits
    flat = codes.reshape(-1)
    out = torch.zeros_like(flat[::per_byte])
    for place in range(per_byte):
        out |= flat[place::per_byte] << (place * nbits)
    return out


WRONG.append(
    (
        "05.2",
        "flattened: the leading dimensions are lost",
        "[..., n * nbits / 8]: only the last dimension shrinks",
        pack,
    )
)


def pack(codes: Tensor, nbits: int) -> Tensor:
    per_byte = 8 // nbits
    out = torch.zeros_like(codes[::per_byte])
    for place in range(per_byte):
        out |= codes[place::per_byte] << (place * nbits)
    return out


WRONG.append(
    (
        "05.2",
        "the first dimension packed: right for one dimension only",
        "the last dimension: codes[..., place::per_byte]",
        pack,
    )
)


def pack(codes: Tensor, nbits: int) -> Tensor:
    per_byte = 8 // nbits
    out = torch.zeros_like(codes[..., ::per_byte])
    for place in range(per_byte):
        out |= codes[..., place::per_byte] << (place * 4)
    return out


WRONG.append(("05.2", "shifted by 4 for 2 bits too", "shift by place * nbits", pack))


def pack(codes: Tensor, nbits: int) -> Tensor:
    if nbits == 8:
        return codes.clone()
    packed = codes[..., ::2] + codes[..., 1::2] * 2**nbits
    return packed if nbits == 4 else packed[..., ::2] + packed[..., 1::2] * 2**nbits


WRONG.append(
    (
        "05.2",
        "2 bits: the second pair shifted by 2 bits, not by 4, so that codes overlap",
        "what is joined must not overlap: places 0, 2, 4, 6",
        pack,
    )
)


def pack(codes: Tensor, nbits: int) -> Tensor:
    if nbits == 8:
        return codes
    pairs = codes.view(torch.int16)  # little-endian: the first code is the low byte
    packed = ((pairs & 255) | (pairs >> (8 - nbits))).to(torch.uint8)
    return packed if nbits == 4 else pack_pairs(packed)


def pack_pairs(packed: Tensor) -> Tensor:
    pairs = packed.view(torch.int16)
    return ((pairs & 255) | (pairs >> 4)).to(torch.uint8)


WRONG.append(
    (
        "05.2",
        "pairs read with view(int16): fails where codes lie in pieces (a transposed layout)",
        "codes may be transposed or sliced",
        pack,
    )
)


def pack(codes: Tensor, nbits: int) -> Tensor:
    per_byte = 8 // nbits
    if per_byte == 1:
        raise ValueError("nothing to pack")
    out = torch.zeros_like(codes[..., ::per_byte])
    for place in range(per_byte):
        out |= codes[..., place::per_byte] << (place * nbits)
    return out


WRONG.append(("05.2", "8 bits refused", "with 8 bits every code is a byte", pack))

# ---------------------------------------------------------------------------------------------------- 05.2 right


def pack(codes: Tensor, nbits: int) -> Tensor:
    per_byte = 8 // nbits
    weights = torch.tensor([1 << (nbits * place) for place in range(per_byte)], device=codes.device)
    return (codes.unflatten(-1, (-1, per_byte)).long() * weights).sum(dim=-1).to(torch.uint8)


RIGHT.append(("05.2", "a weighted sum in int64, cast back", pack))


def pack(codes: Tensor, nbits: int) -> Tensor:
    parts = codes.unflatten(-1, (-1, 8 // nbits)).unbind(dim=-1)
    shifted = (part * 2 ** (nbits * place) for place, part in enumerate(parts))
    return functools.reduce(torch.bitwise_or, shifted).contiguous()


RIGHT.append(("05.2", "unbind, reduce with bitwise_or", pack))


def pack(codes: Tensor, nbits: int) -> Tensor:
    shape = codes.shape
    bits = np.unpackbits(np.ascontiguousarray(codes.cpu().numpy())[..., None], axis=-1, bitorder="little")[..., :nbits]
    bytes_ = np.packbits(bits.reshape(*shape[:-1], shape[-1] * nbits), axis=-1, bitorder="little")
    return torch.from_numpy(bytes_).to(codes.device)


RIGHT.append(("05.2", "numpy's packbits, bit by bit", pack))


def pack(codes: Tensor, nbits: int) -> Tensor:
    while nbits < 8:
        codes = torch.add(codes[..., ::2], codes[..., 1::2], alpha=2**nbits)
        nbits *= 2
    return codes.clone()


RIGHT.append(("05.2", "pairs joined again and again", pack))

# ---------------------------------------------------------------------------------------------------- 05.3 wrong

quantize = earlier_quantize


def quantize_cache(k: Tensor, v: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    def back(x: Tensor) -> Tensor:
        codes, scale, zero = quantize(x.unflatten(-1, (-1, group_size)), nbits)
        return (codes * scale + zero).flatten(-2)

    return back(k), back(v.mT).mT


WRONG.append(
    (
        "05.3",
        "keys per token and values per channel",
        "the other way round: keys per channel, values per token",
        quantize_cache,
    )
)


def quantize_cache(k: Tensor, v: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    def back(x: Tensor) -> Tensor:
        codes, scale, zero = quantize(x.unflatten(-1, (-1, group_size)), nbits)
        return (codes * scale + zero).flatten(-2)

    return back(k), back(v)


WRONG.append(("05.3", "keys per token too", "a group of keys runs along the tokens of one channel", quantize_cache))


def quantize_cache(k: Tensor, v: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    def back(x: Tensor) -> Tensor:
        codes, scale, zero = quantize(x.mT.unflatten(-1, (-1, group_size)), nbits)
        return (codes * scale + zero).flatten(-2).mT

    return back(k), back(v)


WRONG.append(
    ("05.3", "values per channel too", "a group of values is successive channels of one token", quantize_cache)
)


def quantize_cache(k: Tensor, v: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    def back(x: Tensor) -> Tensor:
        codes, scale, zero = quantize(x.unflatten(-1, (-1, group_size)), nbits)
        return (codes * scale + zero).flatten(-2)

    return back(k.mT), back(v)


WRONG.append(("05.3", "keys come back transposed", "shapes stay as they are: .mT once more", quantize_cache))


def quantize_cache(k: Tensor, v: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    def back(x: Tensor) -> Tensor:
        codes, scale, zero = quantize(x.unflatten(-1, (-1, group_size)), nbits)
        return codes * scale + zero

    return back(k.mT).reshape(k.shape), back(v).reshape(v.shape)


WRONG.append(
    (
        "05.3",
        "reshape in place of transposing back: the numbers stand in other places",
        "reshape does not undo .mT",
        quantize_cache,
    )
)


def quantize_cache(k: Tensor, v: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    def back(x: Tensor) -> Tensor:
        codes, scale, zero = quantize(x, nbits)
        return codes * scale + zero

    return back(k.mT).mT, back(v)


WRONG.append(("05.3", "group_size ignored: one group per row", "group_size numbers share a scale", quantize_cache))


def quantize_cache(k: Tensor, v: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    def back(x: Tensor) -> Tensor:
        codes, scale, zero = quantize(x.unflatten(-1, (group_size, -1)), nbits)
        return (codes * scale + zero).flatten(-2)

    return back(k.mT).mT, back(v)


WRONG.append(
    ("05.3", "group_size groups in place of groups of group_size", "unflatten(-1, (-1, group_size))", quantize_cache)
)


def quantize_cache(k: Tensor, v: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    def back(x: Tensor) -> Tensor:
        codes, scale, zero = quantize(x.unflatten(-1, (-1, 32)), nbits)
        return (codes * scale + zero).flatten(-2)

    return back(k.mT).mT, back(v)


WRONG.append(("05.3", "groups of 32 written down", "group_size is not used", quantize_cache))


def quantize_cache(k: Tensor, v: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    def back(x: Tensor) -> Tensor:
        codes, scale, zero = quantize(x.unflatten(-1, (-1, group_size)), nbits)
        return (codes.float() * scale.float() + zero.float()).flatten(-2)

    return back(k.mT).mT, back(v)


WRONG.append(("05.3", "float32 comes back whatever went in", "K and V keep their dtype", quantize_cache))


def quantize_cache(k: Tensor, v: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    for start in range(0, k.shape[2], group_size):
        group = k[:, :, start : start + group_size]
        codes, scale, zero = (x.mT for x in quantize(group.mT, nbits))
        group.copy_(codes * scale + zero)
    codes, scale, zero = quantize(v.unflatten(-1, (-1, group_size)), nbits)
    return k, (codes * scale + zero).flatten(-2)


WRONG.append(
    ("05.3", "keys overwritten in place: the cache itself is changed", "k must stay as it was", quantize_cache)
)


def quantize_cache(k: Tensor, v: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    def back(x: Tensor) -> Tensor:
        codes, scale, zero = quantize(x.reshape(-1, group_size), nbits)
        return (codes * scale + zero).reshape(x.shape)

    return back(k.transpose(1, 3)).transpose(1, 3), back(v)


WRONG.append(
    (
        "05.3",
        "transpose(1, 3) for keys: groups run along heads (and on into tokens)",
        "only tokens and channels change places, dimensions 2 and 3",
        quantize_cache,
    )
)


def quantize_cache(k: Tensor, v: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    def back(x: Tensor) -> Tensor:
        codes, scale, zero = quantize(x.unflatten(-1, (-1, group_size)), 4)
        return (codes * scale + zero).flatten(-2)

    return back(k.mT).mT, back(v)


WRONG.append(("05.3", "4 bits written down", "nbits is not used", quantize_cache))


def quantize_cache(k: Tensor, v: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    def back(x: Tensor) -> Tensor:
        batch, heads, _, last = x.shape
        groups = x.unflatten(-1, (-1, group_size)).transpose(0, 3).flatten(3)  # the batch joins each group
        codes, scale, zero = quantize(groups, nbits)
        return (codes * scale + zero).unflatten(3, (batch, group_size)).transpose(0, 3).flatten(3)

    return back(k.mT).mT, back(v)


WRONG.append(
    (
        "05.3",
        "the batch's rows share a scale: right for a batch of 1 only",
        "a group lies within one row of the batch",
        quantize_cache,
    )
)

# ---------------------------------------------------------------------------------------------------- 05.3 right


def quantize_cache(k: Tensor, v: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    def back(x: Tensor) -> Tensor:
        codes, scale, zero = quantize(x, nbits)
        return codes * scale + zero

    keys = torch.cat([back(part.mT).mT for part in k.split(group_size, dim=2)], dim=2)
    values = torch.cat([back(part) for part in v.split(group_size, dim=3)], dim=3)
    return keys, values


RIGHT.append(("05.3", "split and cat", quantize_cache))


def quantize_cache(k: Tensor, v: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    out = []
    for x, axis in ((k, 2), (v, 3)):
        grouped = x.unflatten(axis, (-1, group_size)).movedim(axis + 1, -1)
        codes, scale, zero = quantize(x=grouped, nbits=nbits)
        back = torch.addcmul(zero, codes.to(scale.dtype), scale)
        out.append(back.movedim(-1, axis + 1).flatten(axis, axis + 1))
    return out[0], out[1]


RIGHT.append(("05.3", "movedim and addcmul, one loop for both", quantize_cache))


def quantize_cache(k: Tensor, v: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    def levels(x: Tensor, dim: int) -> Tensor:
        low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
        scale = (high - low) / (2**nbits - 1)
        steps = ((x - low) / scale.masked_fill(scale == 0, 1)).round().clamp(0, 2**nbits - 1)
        return steps * scale + low

    keys, values = torch.empty_like(k), torch.empty_like(v)
    for start in range(0, k.shape[2], group_size):
        keys[:, :, start : start + group_size] = levels(k[:, :, start : start + group_size], 2)
    for start in range(0, v.shape[3], group_size):
        values[..., start : start + group_size] = levels(v[..., start : start + group_size], 3)
    return keys, values


RIGHT.append(("05.3", "its own rounding along any dimension, written group by group", quantize_cache))

# ---------------------------------------------------------------------------------------------------- 05.4 wrong


def bits_per_element(tokens: int, nbits: int, group_size: int, residual_length: int, full_bits: int = 16) -> float:
    packed = max(0, tokens - residual_length) // group_size * group_size
    return (packed * (nbits + 16 / group_size) + (tokens - packed) * full_bits) / tokens


WRONG.append(("05.4", "one number of 16 bits per group", "a group has a scale and a zero point", bits_per_element))


def bits_per_element(tokens: int, nbits: int, group_size: int, residual_length: int, full_bits: int = 16) -> float:
    packed = max(0, tokens - residual_length) // group_size * group_size
    return (packed * (nbits + 32 // group_size) + (tokens - packed) * full_bits) / tokens


WRONG.append(
    (
        "05.4",
        "metadata per number cut to whole bits (32 // group_size): 0 for groups of 64",
        "a fraction of a bit per number counts",
        bits_per_element,
    )
)


def bits_per_element(tokens: int, nbits: int, group_size: int, residual_length: int, full_bits: int = 16) -> float:
    packed = max(0, tokens - residual_length)
    return (packed * (nbits + 32 / group_size) + (tokens - packed) * full_bits) / tokens


WRONG.append(
    (
        "05.4",
        "all tokens behind the residual packed, groups not complete included",
        "only whole groups are packed",
        bits_per_element,
    )
)


def bits_per_element(tokens: int, nbits: int, group_size: int, residual_length: int, full_bits: int = 16) -> float:
    packed = (tokens - residual_length) // group_size * group_size
    return (packed * (nbits + 32 / group_size) + (tokens - packed) * full_bits) / tokens


WRONG.append(
    (
        "05.4",
        "negative count of packed tokens when there are fewer than the residual",
        "with fewer tokens than the residual nothing is packed: full_bits",
        bits_per_element,
    )
)


def bits_per_element(tokens: int, nbits: int, group_size: int, residual_length: int, full_bits: int = 16) -> float:
    packed = max(0, tokens - residual_length) // group_size * group_size
    return (packed * (nbits + 2 * full_bits / group_size) + (tokens - packed) * full_bits) / tokens


WRONG.append(
    (
        "05.4",
        "scale and zero point in full_bits",
        "scale and zero point take 16 bits each, whatever waits",
        bits_per_element,
    )
)


def bits_per_element(tokens: int, nbits: int, group_size: int, residual_length: int, full_bits: int = 16) -> float:
    packed = max(0, tokens - residual_length) // group_size * group_size
    return (packed * (nbits + 32 / group_size) + (tokens - packed) * 16) / tokens


WRONG.append(("05.4", "16 bits written down for what waits", "full_bits is not used", bits_per_element))


def bits_per_element(tokens: int, nbits: int, group_size: int, residual_length: int, full_bits: int = 16) -> float:
    packed = tokens // group_size * group_size - residual_length
    packed = max(0, packed)
    return (packed * (nbits + 32 / group_size) + (tokens - packed) * full_bits) / tokens


WRONG.append(
    (
        "05.4",
        "groups cut before the residual is taken off",
        "first leave the residual, then count whole groups of the rest",
        bits_per_element,
    )
)


def bits_per_element(tokens: int, nbits: int, group_size: int, residual_length: int, full_bits: int = 16) -> float:
    packed = max(0, tokens - residual_length - 1) // group_size * group_size
    return (packed * (nbits + 32 / group_size) + (tokens - packed) * full_bits) / tokens


WRONG.append(
    (
        "05.4",
        "a group that is just complete still waits",
        "at group_size + residual_length tokens the first group is packed",
        bits_per_element,
    )
)


def bits_per_element(tokens: int, nbits: int, group_size: int, residual_length: int, full_bits: int = 16) -> float:
    packed = max(0, tokens - residual_length) // group_size * group_size
    return (packed * nbits + 32 / group_size * tokens + (tokens - packed) * full_bits) / tokens


WRONG.append(
    ("05.4", "metadata for tokens that wait, too", "only packed groups have a scale and a zero point", bits_per_element)
)


def bits_per_element(tokens: int, nbits: int, group_size: int, residual_length: int, full_bits: int = 16) -> float:
    packed = tokens // group_size * group_size
    return (packed * (nbits + 32 / group_size) + (tokens - packed) * full_bits) / tokens


WRONG.append(("05.4", "no residual", "at least the newest residual_length stay in full_bits", bits_per_element))


def bits_per_element(tokens: int, nbits: int, group_size: int, residual_length: int, full_bits: int = 32) -> float:
    packed = max(0, tokens - residual_length) // group_size * group_size
    return (packed * (nbits + 32 / group_size) + (tokens - packed) * full_bits) / tokens


WRONG.append(("05.4", "32 as the default", "full_bits is 16 where it is not given", bits_per_element))


def bits_per_element(tokens: int, nbits: int, group_size: int, residual_length: int, full_bits: int = 16) -> float:
    packed = max(0, tokens - residual_length) // group_size * group_size
    groups = packed // group_size
    return (packed * nbits + groups * 32 + (tokens - packed) * full_bits) // tokens


WRONG.append(("05.4", "the average cut to whole bits", "an average: 4.5 bits are 4.5", bits_per_element))


def bits_per_element(tokens: int, nbits: int, group_size: int, residual_length: int, full_bits: int = 16) -> float:
    packed = max(0, tokens - residual_length) // group_size * group_size
    if not packed:
        return float(full_bits)
    return nbits + 32 / group_size


WRONG.append(
    (
        "05.4",
        "what waits is forgotten once anything is packed",
        "tokens that wait take full_bits, and they count",
        bits_per_element,
    )
)

# ---------------------------------------------------------------------------------------------------- 05.4 right


def bits_per_element(tokens: int, nbits: int, group_size: int, residual_length: int, full_bits: int = 16) -> float:
    groups, waiting = 0, tokens
    while waiting - group_size >= residual_length:
        groups, waiting = groups + 1, waiting - group_size
    return (groups * (group_size * nbits + 16 + 16) + waiting * full_bits) / tokens


RIGHT.append(("05.4", "group by group, as the cache would", bits_per_element))


def bits_per_element(tokens: int, nbits: int, group_size: int, residual_length: int, full_bits: int = 16) -> float:
    share = math.floor(max(tokens - residual_length, 0) / group_size) * group_size / tokens
    return math.fsum((share * nbits, share * 32 / group_size, (1 - share) * full_bits))


RIGHT.append(("05.4", "shares, fsum", bits_per_element))


def bits_per_element(tokens: int, nbits: int, group_size: int, residual_length: int, full_bits: int = 16) -> float:
    index = np.arange(tokens)
    group_end = (index // group_size + 1) * group_size
    packed = group_end <= tokens - residual_length
    return np.where(packed, nbits + np.float64(32) / group_size, full_bits).mean()


RIGHT.append(("05.4", "numpy, each token's bits, mean; returns a numpy float64", bits_per_element))

# ---------------------------------------------------------------------------------------------------- 05.5 wrong


def _w1():
    class QuantizedLayer:
        def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
            self.group_size, self.residual_length = group_size, residual_length
            self.quantize_group, self.restore = quantize_group, restore
            self.groups = []
            self.k = self.v = None

        def append(self, k: Tensor, v: Tensor) -> None:
            self.k = k.clone() if self.k is None else torch.cat((self.k, k), dim=2)
            self.v = v.clone() if self.v is None else torch.cat((self.v, v), dim=2)
            g = self.group_size
            if self.k.shape[2] >= g + self.residual_length:
                self.groups.append(self.quantize_group(self.k[:, :, :g], self.v[:, :, :g]))
                self.k, self.v = self.k[:, :, g:].clone(), self.v[:, :, g:].clone()

        def read(self) -> tuple[Tensor, Tensor]:
            pairs = [self.restore(group) for group in self.groups] + [(self.k, self.v)]
            return torch.cat([p[0] for p in pairs], dim=2), torch.cat([p[1] for p in pairs], dim=2)

    return QuantizedLayer


WRONG.append(
    (
        "05.5",
        "one group per append at most (if in place of while)",
        "a long prompt completes many groups at once: the same as token by token",
        _w1(),
    )
)


def _w2():
    class QuantizedLayer:
        def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
            self.group_size, self.residual_length = group_size, residual_length
            self.quantize_group, self.restore = quantize_group, restore
            self.groups = []
            self.k = self.v = None

        def append(self, k: Tensor, v: Tensor) -> None:
            self.k = k.clone() if self.k is None else torch.cat((self.k, k), dim=2)
            self.v = v.clone() if self.v is None else torch.cat((self.v, v), dim=2)
            g = self.group_size
            while self.k.shape[2] > self.residual_length and self.k.shape[2] >= g:
                self.groups.append(self.quantize_group(self.k[:, :, :g], self.v[:, :, :g]))
                self.k, self.v = self.k[:, :, g:].clone(), self.v[:, :, g:].clone()

        def read(self) -> tuple[Tensor, Tensor]:
            pairs = [self.restore(group) for group in self.groups] + [(self.k, self.v)]
            return torch.cat([p[0] for p in pairs], dim=2), torch.cat([p[1] for p in pairs], dim=2)

    return QuantizedLayer


WRONG.append(
    (
        "05.5",
        "quantizes as soon as more than the residual waits: fewer than residual_length stay",
        "residual_length newer tokens must stay after a group is taken",
        _w2(),
    )
)


def _w3():
    class QuantizedLayer:
        def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
            self.group_size, self.residual_length = group_size, residual_length
            self.quantize_group, self.restore = quantize_group, restore
            self.groups = []
            self.k = self.v = None

        def append(self, k: Tensor, v: Tensor) -> None:
            self.k = k.clone() if self.k is None else torch.cat((self.k, k), dim=2)
            self.v = v.clone() if self.v is None else torch.cat((self.v, v), dim=2)
            ready = (self.k.shape[2] - self.residual_length) // self.group_size * self.group_size
            if ready > 0:
                self.groups.append(self.quantize_group(self.k[:, :, :ready], self.v[:, :, :ready]))
                self.k, self.v = self.k[:, :, ready:].clone(), self.v[:, :, ready:].clone()

        def read(self) -> tuple[Tensor, Tensor]:
            pairs = [self.restore(group) for group in self.groups] + [(self.k, self.v)]
            return torch.cat([p[0] for p in pairs], dim=2), torch.cat([p[1] for p in pairs], dim=2)

    return QuantizedLayer


WRONG.append(
    (
        "05.5",
        "several groups handed to quantize_group in one piece",
        "quantize_group is given exactly group_size tokens",
        _w3(),
    )
)


def _w4():
    class QuantizedLayer:
        def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
            self.group_size, self.residual_length = group_size, residual_length
            self.quantize_group, self.restore = quantize_group, restore
            self.groups = []
            self.k = self.v = None

        def append(self, k: Tensor, v: Tensor) -> None:
            self.k = k if self.k is None else torch.cat((self.k, k), dim=2)
            self.v = v if self.v is None else torch.cat((self.v, v), dim=2)
            g = self.group_size
            while self.k.shape[2] >= g + self.residual_length:
                self.groups.append(self.quantize_group(self.k[:, :, :g], self.v[:, :, :g]))
                self.k, self.v = self.k[:, :, g:], self.v[:, :, g:]

        def read(self) -> tuple[Tensor, Tensor]:
            pairs = [self.restore(group) for group in self.groups] + [(self.k, self.v)]
            return torch.cat([p[0] for p in pairs], dim=2), torch.cat([p[1] for p in pairs], dim=2)

    return QuantizedLayer


WRONG.append(
    (
        "05.5",
        "what waits is a view: of the caller's prompt, or of all that was joined",
        "tokens wait as copies: a view changes with its owner and keeps the whole prompt in memory",
        _w4(),
    )
)


def _w5():
    class QuantizedLayer:
        groups = []
        waiting = None

        def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
            self.group_size, self.residual_length = group_size, residual_length
            self.quantize_group, self.restore = quantize_group, restore

        def append(self, k: Tensor, v: Tensor) -> None:
            if self.waiting is not None:
                k, v = torch.cat((self.waiting[0], k), dim=2), torch.cat((self.waiting[1], v), dim=2)
            g = self.group_size
            while k.shape[2] >= g + self.residual_length:
                self.groups.append(self.quantize_group(k[:, :, :g], v[:, :, :g]))
                k, v = k[:, :, g:], v[:, :, g:]
            self.waiting = k.clone(), v.clone()

        def read(self) -> tuple[Tensor, Tensor]:
            pairs = [self.restore(group) for group in self.groups] + [self.waiting]
            return torch.cat([p[0] for p in pairs], dim=2), torch.cat([p[1] for p in pairs], dim=2)

    return QuantizedLayer


WRONG.append(
    ("05.5", "the list of groups stands on the class: all layers share it", "each layer has groups of its own", _w5())
)


def _w6():
    class QuantizedLayer:
        def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
            self.group_size, self.residual_length = group_size, residual_length
            self.quantize_group, self.restore = quantize_group, restore
            self.packed = None
            self.k = self.v = None

        def append(self, k: Tensor, v: Tensor) -> None:
            if self.k is not None:
                old_k, old_v = self.read()
                k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
            size = self.group_size
            ready = max(0, k.shape[2] - self.residual_length) // size * size
            self.packed = [
                self.quantize_group(k[:, :, i : i + size], v[:, :, i : i + size]) for i in range(0, ready, size)
            ]
            self.k, self.v = k[:, :, ready:].clone(), v[:, :, ready:].clone()

        def read(self) -> tuple[Tensor, Tensor]:
            pairs = [self.restore(group) for group in self.packed] + [(self.k, self.v)]
            return torch.cat([p[0] for p in pairs], dim=2), torch.cat([p[1] for p in pairs], dim=2)

    return QuantizedLayer


WRONG.append(
    (
        "05.5",
        "restores everything at each append and quantizes it again",
        "each token is quantized once: errors pile up",
        _w6(),
    )
)


def _w7():
    class QuantizedLayer:
        def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
            self.group_size, self.residual_length = group_size, residual_length
            self.quantize_group, self.restore = quantize_group, restore
            self.groups = []
            self.k = self.v = None

        def append(self, k: Tensor, v: Tensor) -> None:
            self.k = k.clone() if self.k is None else torch.cat((self.k, k), dim=2)
            self.v = v.clone() if self.v is None else torch.cat((self.v, v), dim=2)
            g = self.group_size
            while self.k.shape[2] > g + self.residual_length:
                self.groups.append(self.quantize_group(self.k[:, :, :g], self.v[:, :, :g]))
                self.k, self.v = self.k[:, :, g:].clone(), self.v[:, :, g:].clone()

        def read(self) -> tuple[Tensor, Tensor]:
            pairs = [self.restore(group) for group in self.groups] + [(self.k, self.v)]
            return torch.cat([p[0] for p in pairs], dim=2), torch.cat([p[1] for p in pairs], dim=2)

    return QuantizedLayer


WRONG.append(
    (
        "05.5",
        "waits one token too long (> in place of >=)",
        "at group_size + residual_length tokens a group can be quantized",
        _w7(),
    )
)


def _w8():
    class QuantizedLayer:
        def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
            self.group_size, self.residual_length = group_size, residual_length
            self.quantize_group, self.restore = quantize_group, restore
            self.k_groups, self.v_groups = [], []
            self.k = self.v = None

        def append(self, k: Tensor, v: Tensor) -> None:
            self.k = k.clone() if self.k is None else torch.cat((self.k, k), dim=2)
            self.v = v.clone() if self.v is None else torch.cat((self.v, v), dim=2)
            g = self.group_size
            while self.k.shape[2] >= g + self.residual_length:
                k_packed, v_packed = self.quantize_group(self.k[:, :, :g], self.v[:, :, :g])
                self.k_groups.append(k_packed)
                self.v_groups.append(v_packed)
                self.k, self.v = self.k[:, :, g:].clone(), self.v[:, :, g:].clone()

        def read(self) -> tuple[Tensor, Tensor]:
            pairs = [self.restore(group) for group in zip(self.k_groups, self.v_groups)] + [(self.k, self.v)]
            return torch.cat([p[0] for p in pairs], dim=2), torch.cat([p[1] for p in pairs], dim=2)

    return QuantizedLayer


WRONG.append(
    (
        "05.5",
        "takes the packed form for a pair of K and V",
        "only restore knows the form: keep what quantize_group returned as it is",
        _w8(),
    )
)


def _w9():
    class QuantizedLayer:
        def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
            self.group_size, self.residual_length = group_size, residual_length
            self.quantize_group, self.restore = quantize_group, restore
            self.k = self.v = None
            self.done = 0
            self.groups = []

        def append(self, k: Tensor, v: Tensor) -> None:
            self.k = k.clone() if self.k is None else torch.cat((self.k, k), dim=2)
            self.v = v.clone() if self.v is None else torch.cat((self.v, v), dim=2)
            g = self.group_size
            while self.k.shape[2] - self.done >= g + self.residual_length:
                here = slice(self.done, self.done + g)
                self.groups.append(self.quantize_group(self.k[:, :, here], self.v[:, :, here]))
                self.done += g

        def read(self) -> tuple[Tensor, Tensor]:
            pairs = [self.restore(group) for group in self.groups]
            pairs.append((self.k[:, :, self.done :], self.v[:, :, self.done :]))
            return torch.cat([p[0] for p in pairs], dim=2), torch.cat([p[1] for p in pairs], dim=2)

    return QuantizedLayer


WRONG.append(
    (
        "05.5",
        "the full K and V are kept beside the groups",
        "a quantized token must not stay in full precision as well: nothing is saved",
        _w9(),
    )
)


def _w10():
    class QuantizedLayer:
        def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
            self.group_size, self.residual_length = group_size, residual_length
            self.quantize_group, self.restore = quantize_group, restore
            self.groups = []
            self.k = self.v = None

        def append(self, k: Tensor, v: Tensor) -> None:
            self.k = k.clone() if self.k is None else torch.cat((self.k, k), dim=2)
            self.v = v.clone() if self.v is None else torch.cat((self.v, v), dim=2)
            g, r = self.group_size, self.residual_length
            old_k, old_v = self.k[:, :, :-r], self.v[:, :, :-r]
            while old_k.shape[2] >= g:
                self.groups.append(self.quantize_group(old_k[:, :, :g], old_v[:, :, :g]))
                old_k, old_v = old_k[:, :, g:], old_v[:, :, g:]
            self.k = torch.cat((old_k, self.k[:, :, -r:]), dim=2)
            self.v = torch.cat((old_v, self.v[:, :, -r:]), dim=2)

        def read(self) -> tuple[Tensor, Tensor]:
            pairs = [self.restore(group) for group in self.groups] + [(self.k, self.v)]
            return torch.cat([p[0] for p in pairs], dim=2), torch.cat([p[1] for p in pairs], dim=2)

    return QuantizedLayer


WRONG.append(
    (
        "05.5",
        "slices with -residual_length: with a residual of 0, [:-0] is empty and nothing is ever quantized",
        "residual_length may be 0: whole groups are quantized at once",
        _w10(),
    )
)


def _w11():
    class QuantizedLayer:
        def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
            self.group_size, self.residual_length = group_size, residual_length
            self.quantize_group, self.restore = quantize_group, restore
            self.groups = []
            self.k = self.v = None

        def append(self, k: Tensor, v: Tensor) -> None:
            self.k = k.clone() if self.k is None else torch.cat((self.k, k), dim=2)
            self.v = v.clone() if self.v is None else torch.cat((self.v, v), dim=2)

        def read(self) -> tuple[Tensor, Tensor]:
            g = self.group_size
            while self.k.shape[2] >= g + self.residual_length:
                self.groups.append(self.quantize_group(self.k[:, :, :g], self.v[:, :, :g]))
                self.k, self.v = self.k[:, :, g:].clone(), self.v[:, :, g:].clone()
            pairs = [self.restore(group) for group in self.groups] + [(self.k, self.v)]
            return torch.cat([p[0] for p in pairs], dim=2), torch.cat([p[1] for p in pairs], dim=2)

    return QuantizedLayer


WRONG.append(
    (
        "05.5",
        "quantizes at read: until then all tokens wait in full precision",
        "a group is quantized as soon as it can be, by append",
        _w11(),
    )
)


def _w12():
    class QuantizedLayer:
        def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
            self.group_size, self.residual_length = group_size, residual_length
            self.quantize_group, self.restore = quantize_group, restore
            self.done_k, self.done_v = None, None
            self.k = self.v = None

        def append(self, k: Tensor, v: Tensor) -> None:
            self.k = k.clone() if self.k is None else torch.cat((self.k, k), dim=2)
            self.v = v.clone() if self.v is None else torch.cat((self.v, v), dim=2)
            g = self.group_size
            while self.k.shape[2] >= g + self.residual_length:
                back_k, back_v = self.restore(self.quantize_group(self.k[:, :, :g], self.v[:, :, :g]))
                self.done_k = back_k if self.done_k is None else torch.cat((self.done_k, back_k), dim=2)
                self.done_v = back_v if self.done_v is None else torch.cat((self.done_v, back_v), dim=2)
                self.k, self.v = self.k[:, :, g:].clone(), self.v[:, :, g:].clone()

        def read(self) -> tuple[Tensor, Tensor]:
            if self.done_k is None:
                return self.k.clone(), self.v.clone()
            return torch.cat((self.done_k, self.k), dim=2), torch.cat((self.done_v, self.v), dim=2)

    return QuantizedLayer


WRONG.append(
    (
        "05.5",
        "keeps what restore gave back (fake quantization)",
        "what is held is the packed form; restored numbers are as large as before",
        _w12(),
    )
)


def _w13():
    class QuantizedLayer:
        def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
            self.group_size, self.residual_length = group_size, residual_length
            self.quantize_group, self.restore = quantize_group, restore
            self.groups = []
            self.buffer, self.count = None, 0

        def append(self, k: Tensor, v: Tensor) -> None:
            size, room = self.group_size, self.group_size + self.residual_length
            if self.buffer is None:
                batch, heads, _, dim = k.shape
                self.buffer = k.new_empty(2, batch, heads, room, dim)
            for token in range(k.shape[2]):
                self.buffer[0, :, :, self.count], self.buffer[1, :, :, self.count] = k[:, :, token], v[:, :, token]
                self.count += 1
                if self.count == room:
                    self.groups.append(self.quantize_group(self.buffer[0, :, :, :size], self.buffer[1, :, :, :size]))
                    self.buffer[:, :, :, : self.residual_length] = self.buffer[:, :, :, size:].clone()
                    self.count = self.residual_length

        def read(self) -> tuple[Tensor, Tensor]:
            k, v = self.buffer[0, :, :, : self.count], self.buffer[1, :, :, : self.count]
            if not self.groups:
                return k, v
            pairs = [self.restore(group) for group in self.groups] + [(k, v)]
            return torch.cat([p[0] for p in pairs], dim=2), torch.cat([p[1] for p in pairs], dim=2)

    return QuantizedLayer


WRONG.append(
    (
        "05.5",
        "one buffer reused: quantize_group and the first reads get views of it, which later appends overwrite",
        "what was handed out must not change with the next append",
        _w13(),
    )
)


def _w14():
    class QuantizedLayer:
        def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
            self.group_size, self.residual_length = group_size, residual_length
            self.quantize_group, self.restore = quantize_group, restore
            self.groups = []
            self.k = self.v = None

        def append(self, k: Tensor, v: Tensor) -> None:
            if self.k is not None:
                k, v = torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)
            ready = max(0, k.shape[2] - self.residual_length)
            for start in range(0, ready, self.group_size):
                stop = min(start + self.group_size, ready)
                self.groups.append(self.quantize_group(k[:, :, start:stop], v[:, :, start:stop]))
            self.k, self.v = k[:, :, ready:].clone(), v[:, :, ready:].clone()

        def read(self) -> tuple[Tensor, Tensor]:
            pairs = [self.restore(group) for group in self.groups] + [(self.k, self.v)]
            return torch.cat([p[0] for p in pairs], dim=2), torch.cat([p[1] for p in pairs], dim=2)

    return QuantizedLayer


WRONG.append(
    ("05.5", "the remainder becomes a short group", "every group has group_size tokens; the others wait", _w14())
)


def _w15():
    class QuantizedLayer:
        def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
            self.group_size, self.residual_length = group_size, residual_length
            self.quantize_group, self.restore = quantize_group, restore
            self.groups = []
            self.k = self.v = None

        def append(self, k: Tensor, v: Tensor) -> None:
            self.k = k.clone() if self.k is None else torch.cat((self.k, k), dim=2)
            self.v = v.clone() if self.v is None else torch.cat((self.v, v), dim=2)
            g = self.group_size
            while self.k.shape[2] >= g + self.residual_length:
                self.groups.insert(0, self.quantize_group(self.k[:, :, :g], self.v[:, :, :g]))
                self.k, self.v = self.k[:, :, g:].clone(), self.v[:, :, g:].clone()

        def read(self) -> tuple[Tensor, Tensor]:
            pairs = [self.restore(group) for group in self.groups] + [(self.k, self.v)]
            return torch.cat([p[0] for p in pairs], dim=2), torch.cat([p[1] for p in pairs], dim=2)

    return QuantizedLayer


WRONG.append(("05.5", "the newest group stands first", "tokens come back in order, oldest first", _w15()))


def _w16():
    class QuantizedLayer:
        def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
            self.group_size, self.residual_length = group_size, residual_length
            self.quantize_group, self.restore = quantize_group, restore
            self.groups = []
            self.k = self.v = None
            self.dense = None

        def append(self, k: Tensor, v: Tensor) -> None:
            self.k = k.clone() if self.k is None else torch.cat((self.k, k), dim=2)
            self.v = v.clone() if self.v is None else torch.cat((self.v, v), dim=2)
            g = self.group_size
            while self.k.shape[2] >= g + self.residual_length:
                self.groups.append(self.quantize_group(self.k[:, :, :g], self.v[:, :, :g]))
                self.k, self.v = self.k[:, :, g:].clone(), self.v[:, :, g:].clone()
                self.dense = None

        def read(self) -> tuple[Tensor, Tensor]:
            if self.groups and self.dense is None:
                pairs = [self.restore(group) for group in self.groups]
                self.dense = torch.cat([p[0] for p in pairs], dim=2), torch.cat([p[1] for p in pairs], dim=2)
            if not self.groups:
                return self.k.clone(), self.v.clone()
            return torch.cat((self.dense[0], self.k), dim=2), torch.cat((self.dense[1], self.v), dim=2)

    return QuantizedLayer


WRONG.append(
    (
        "05.5",
        "read keeps the restored groups for the next read",
        "between steps only the packed form is held, or nothing is saved",
        _w16(),
    )
)

# ---------------------------------------------------------------------------------------------------- 05.5 right


def _r1():
    class QuantizedLayer:
        __slots__ = ("_pairs", "_parts", "_waiting", "group_size", "quantize_group", "residual_length", "restore")

        def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
            self.group_size, self.residual_length = group_size, residual_length
            self.quantize_group, self.restore = quantize_group, restore
            self._parts, self._waiting = (), []

        def append(self, k: Tensor, v: Tensor) -> None:
            joined = [
                torch.cat([*old, new], dim=2)
                for old, new in zip(zip(*self._waiting) if self._waiting else ((), ()), (k, v))
            ]
            count = max(0, joined[0].shape[2] - self.residual_length) // self.group_size
            sizes = [self.group_size] * count + [joined[0].shape[2] - self.group_size * count]
            *groups, rest = zip(*(x.split(sizes, dim=2) for x in joined), strict=True)
            self._parts += tuple(self.quantize_group(*group) for group in groups)
            self._waiting = [tuple(x.clone() for x in rest)]

        def read(self) -> tuple[Tensor, Tensor]:
            k, v = zip(*map(self.restore, self._parts), *self._waiting)
            return torch.cat(k, dim=2), torch.cat(v, dim=2)

    return QuantizedLayer


RIGHT.append(("05.5", "__slots__, a tuple of groups, split", _r1()))


def _r2():
    @dataclass(eq=False)
    class QuantizedLayer:
        group_size: int
        residual_length: int
        quantize_group: Callable
        restore: Callable
        packed: list[Any] = field(default_factory=list, init=False)
        newest: Tensor | None = field(default=None, init=False)  # K and V that wait, [2, ...]

        def append(self, k: Tensor, v: Tensor) -> None:
            new = torch.stack((k, v))
            newest = new if self.newest is None else torch.cat((self.newest, new), dim=3)
            start = 0
            while newest.shape[3] - start - self.group_size >= self.residual_length:
                self.packed.append(self.quantize_group(*newest[:, :, :, start : start + self.group_size].clone()))
                start += self.group_size
            self.newest = newest[:, :, :, start:].clone()

        def read(self) -> tuple[Tensor, Tensor]:
            keys, values = [], []
            for group in self.packed:
                k, v = self.restore(group)
                keys.append(k)
                values.append(v)
            return torch.cat((*keys, self.newest[0]), 2), torch.cat((*values, self.newest[1]), 2)

    return QuantizedLayer


RIGHT.append(("05.5", "a dataclass, K and V stacked in one tensor", _r2()))


def _r3():
    class QuantizedLayer:
        """Token by token, whatever comes: waiting tokens are a list."""

        def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
            self.sizes = group_size, residual_length
            self.pack, self.unpack = quantize_group, restore
            self.groups: list = []
            self.tokens: list[tuple[Tensor, Tensor]] = []

        def append(self, k: Tensor, v: Tensor) -> None:
            size, residual = self.sizes
            for index in range(k.shape[2]):
                self.tokens.append(tuple(x[:, :, index : index + 1].clone() for x in (k, v)))
                if len(self.tokens) == size + residual:
                    oldest, self.tokens = self.tokens[:size], self.tokens[size:]
                    self.groups.append(self.pack(*(torch.cat(side, dim=2) for side in zip(*oldest))))

        def read(self) -> tuple[Tensor, Tensor]:
            parts = [self.unpack(group) for group in self.groups] + self.tokens
            return tuple(torch.cat(side, dim=2) for side in zip(*parts))

    return QuantizedLayer


RIGHT.append(("05.5", "token by token, waiting tokens in a list", _r3()))


def _r4():
    class Side:
        """One of K and V: pieces that wait, in the order in which they came."""

        __slots__ = ("pieces",)

        def __init__(self) -> None:
            self.pieces: list[Tensor] = []

        def __len__(self) -> int:
            return sum(piece.shape[2] for piece in self.pieces)

        def take(self, count: int) -> Tensor:
            joined = torch.cat(self.pieces, dim=2)
            self.pieces = [joined[:, :, count:].clone()]
            return joined[:, :, :count].clone()

    class QuantizedLayer:
        def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
            self.config = {"group_size": group_size, "residual_length": residual_length}
            self.quantize_group, self.restore = quantize_group, restore
            self.groups: dict[int, Any] = {}
            self.sides = Side(), Side()

        @property
        def complete(self) -> bool:
            return len(self.sides[0]) >= sum(self.config.values())

        def append(self, k: Tensor, v: Tensor) -> None:
            for side, new in zip(self.sides, (k, v)):
                side.pieces.append(new.detach().clone())
            while self.complete:
                pair = (side.take(self.config["group_size"]) for side in self.sides)
                self.groups[len(self.groups)] = self.quantize_group(*pair)

        def read(self) -> tuple[Tensor, Tensor]:
            restored = [self.restore(self.groups[index]) for index in sorted(self.groups)]
            k, v = (
                torch.cat([*(pair[which] for pair in restored), *side.pieces], dim=2)
                for which, side in enumerate(self.sides)
            )
            return k, v

    return QuantizedLayer


RIGHT.append(("05.5", "a helper class for each side, pieces in lists, groups in a dict, a property", _r4()))

# ---------------------------------------------------------------------------------------------------- 05.6 wrong


def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return q @ (codes * scale + zero).mT


WRONG.append(("05.6", "the keys made dense first", "keys are never computed: fold the scales into q", packed_scores))


def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (q * scale) @ codes.to(q.dtype).mT


WRONG.append(("05.6", "the zero points forgotten", "plus the sum of q * zero, the same for all tokens", packed_scores))


def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    scaled = q * scale
    return scaled @ codes.to(q.dtype).mT + (scaled * zero).sum(-1, keepdim=True)


WRONG.append(
    ("05.6", "zero points multiplied by the scales as well", "zero is a number, not a code: q * zero", packed_scores)
)


def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (q * scale) @ codes.to(q.dtype).mT + (q * zero).sum()


WRONG.append(
    ("05.6", "one sum for all queries", "each query has a sum of its own: over the last dimension", packed_scores)
)


def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    scores = (q * scale) @ codes.to(q.dtype).mT + (q * zero).sum(-1, keepdim=True)
    return scores * q.shape[-1] ** -0.5


WRONG.append(("05.6", "scaled by head_dim ** -0.5", "q @ k.mT alone: no scale of attention is asked", packed_scores))


def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    q = q.float()
    return (q * scale.float()) @ codes.float().mT + (q * zero.float()).sum(-1, keepdim=True)


WRONG.append(("05.6", "float32 whatever q is", "the scores have q's dtype, float64 its precision", packed_scores))


def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (q * scale) @ codes.view(torch.int8).to(q.dtype).mT + (q * zero).sum(-1, keepdim=True)


WRONG.append(("05.6", "codes read as int8: above 127 they become negative", "8-bit codes reach 255", packed_scores))


def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    offset = (q * zero).sum(-1, keepdim=True)
    return q.mul_(scale) @ codes.to(q.dtype).mT + offset


WRONG.append(("05.6", "q scaled in place: the next group finds another q", "q must stay as it was", packed_scores))


def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhtd->bhqt", q * scale, codes.to(q.dtype))
    return scores + (q * zero).sum(-1, keepdim=True)


WRONG.append(("05.6", "four dimensions only", "[...]: any number of leading dimensions", packed_scores))


def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    scores = q @ codes.to(q.dtype).mT * scale.mean(-1, keepdim=True)
    return scores + (q * zero).sum(-1, keepdim=True)


WRONG.append(
    (
        "05.6",
        "one mean scale after the product",
        "a scale per channel must be in before channels are summed",
        packed_scores,
    )
)


def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (q * scale) @ codes.to(q.dtype).mT + (q * zero).sum(-1, keepdim=True) * codes.shape[-2]


WRONG.append(
    (
        "05.6",
        "the zero points added once per token of the group, all to each score",
        "each key has the zero points once",
        packed_scores,
    )
)


def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    levels = codes.to(q.dtype) * scale
    return q @ levels.mT + q @ zero.mT


WRONG.append(
    (
        "05.6",
        "only the zero points taken out; codes * scale is still made for every token",
        "the query takes the scales, once; codes stay codes",
        packed_scores,
    )
)


def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    folded = (q * scale).to(torch.bfloat16)
    scores = folded @ codes.to(torch.bfloat16).mT
    return scores.to(q.dtype) + (q * zero).sum(-1, keepdim=True)


WRONG.append(
    (
        "05.6",
        "the product in bfloat16 (codes fit in it exactly, the query does not)",
        "precision is lost: compute in q's dtype",
        packed_scores,
    )
)

# ---------------------------------------------------------------------------------------------------- 05.6 right


def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.einsum("...qd,...td->...qt", q * scale, codes.to(q)) + q @ zero.mT


RIGHT.append(("05.6", "einsum with an ellipsis, q @ zero.mT", packed_scores))


def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    scores = torch.matmul(input=torch.mul(q, scale), other=codes.type_as(q).transpose(-1, -2))
    return scores.add_(torch.linalg.vecdot(q, zero.expand_as(q)).unsqueeze(-1))


RIGHT.append(("05.6", "keyword-only matmul, vecdot, added in place to its own scores", packed_scores))


def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    folded, offset = q * scale, (q * zero).sum(dim=-1)
    out = torch.empty(*q.shape[:-1], codes.shape[-2], dtype=q.dtype, device=q.device)
    for token in range(codes.shape[-2]):
        out[..., token] = (folded @ codes[..., token, :, None].to(q.dtype))[..., 0] + offset
    return out


RIGHT.append(("05.6", "a loop over tokens", packed_scores))


def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    wide = q.double()
    folded, offset = (wide * scale).to(q.dtype), torch.einsum("...qd,...od->...qo", wide, zero.double())
    return torch.matmul(folded, codes.to(q.dtype).mT) + offset.to(q.dtype)


RIGHT.append(("05.6", "query folded in float64 and cast back", packed_scores))

# ---------------------------------------------------------------------------------------------------- 05.7 wrong


def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    tokens = torch.cat((waiting, new), dim=2)
    return list(tokens.split(group_size, dim=2)), tokens[:, :, :0]


WRONG.append(
    (
        "05.7",
        "the remainder as a short group",
        "every group holds exactly group_size tokens; the rest waits",
        groups_to_quantize,
    )
)


def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    tokens = torch.cat((waiting, new), dim=2)
    if tokens.shape[2] < group_size:
        return [], tokens
    return [tokens[:, :, :group_size]], tokens[:, :, group_size:]


WRONG.append(("05.7", "one group at most", "many tokens complete several groups at once", groups_to_quantize))


def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    tokens = torch.cat((waiting, new), dim=2)
    groups = []
    while tokens.shape[2] > group_size:
        groups.append(tokens[:, :, :group_size])
        tokens = tokens[:, :, group_size:]
    return groups, tokens


WRONG.append(
    (
        "05.7",
        "a group that is just complete goes on waiting (>)",
        "group_size tokens are a whole group: quantize it",
        groups_to_quantize,
    )
)


def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    tokens = torch.cat((waiting, new), dim=2)
    rest = tokens.shape[2] % group_size
    return list(tokens[:, :, rest:].split(group_size, dim=2)), tokens[:, :, :rest]


WRONG.append(
    ("05.7", "cut from the newest end: the oldest wait", "oldest first: what waits are the newest", groups_to_quantize)
)


def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    tokens = torch.cat((new, waiting), dim=2)
    whole = tokens.shape[2] // group_size * group_size
    return list(tokens[:, :, :whole].split(group_size, dim=2)) if whole else [], tokens[:, :, whole:]


WRONG.append(
    ("05.7", "new tokens set before those that wait", "what waits is older: it comes first", groups_to_quantize)
)


def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    whole = new.shape[2] // group_size * group_size
    groups = [new[:, :, start : start + group_size] for start in range(0, whole, group_size)]
    return groups, torch.cat((waiting, new[:, :, whole:]), dim=2)


WRONG.append(
    (
        "05.7",
        "groups from the new tokens alone: what waits never completes one",
        "those that wait and the new ones together fill groups",
        groups_to_quantize,
    )
)


def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    tokens = torch.cat((waiting, new), dim=2)
    whole = tokens.shape[2] // 32 * 32
    return [tokens[:, :, start : start + 32] for start in range(0, whole, 32)], tokens[:, :, whole:]


WRONG.append(("05.7", "32 written down", "group_size is not used", groups_to_quantize))


def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    tokens = torch.cat((waiting, new), dim=2)
    whole = tokens.shape[2] // group_size * group_size
    groups = [tokens[:, :, start : start + group_size] for start in range(0, whole, group_size)]
    return groups, tokens[:, :, :0]


WRONG.append(("05.7", "the remainder is lost", "tokens whose group is not complete go on waiting", groups_to_quantize))


def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    tokens = torch.cat((waiting, new), dim=2)
    count = tokens.shape[2] // group_size
    if count == 0:
        return [], tokens
    return list(tokens.chunk(count, dim=2)), tokens[:, :, :0]


WRONG.append(
    (
        "05.7",
        "chunk into as many pieces as groups: the pieces are longer than group_size",
        "exactly group_size each",
        groups_to_quantize,
    )
)


def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    tokens = torch.cat((waiting, new), dim=2)
    whole = tokens.shape[2] // group_size * group_size
    groups = [tokens[:, :, stop - group_size : stop] for stop in range(whole, 0, -group_size)]
    return groups, tokens[:, :, whole:]


WRONG.append(("05.7", "the newest group first in the list", "oldest first", groups_to_quantize))


def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    if waiting.shape[2] + new.shape[2] < group_size:
        return [], torch.cat((waiting, new), dim=2)
    missing = group_size - waiting.shape[2]
    groups = [torch.cat((waiting, new[:, :, :missing]), dim=2)]
    rest = new[:, :, missing:]
    while rest.shape[2] >= group_size:
        groups.append(rest[:, :, :group_size])
        rest = rest[:, :, group_size:]
    return groups, rest if rest.shape[2] else None


WRONG.append(
    (
        "05.7",
        "None in place of an empty tensor when nothing waits",
        "what goes on waiting is a tensor, of no tokens where all were taken",
        groups_to_quantize,
    )
)


def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    tokens = torch.cat((waiting, new), dim=2)
    whole = max(0, tokens.shape[2] - group_size) // group_size * group_size
    groups = [tokens[:, :, start : start + group_size] for start in range(0, whole, group_size)]
    return groups, tokens[:, :, whole:]


WRONG.append(
    (
        "05.7",
        "a residual of one group kept back",
        "no residual here: every whole group is quantized now",
        groups_to_quantize,
    )
)

_waiting: dict = {}


def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    kept = _waiting.get("waiting")
    if kept is None or kept.shape[:2] != new.shape[:2] or kept.shape[3] != new.shape[3]:
        kept = waiting
    tokens = torch.cat((kept, new), dim=2)
    whole = tokens.shape[2] // group_size * group_size
    groups = [tokens[:, :, start : start + group_size] for start in range(0, whole, group_size)]
    _waiting["waiting"] = tokens[:, :, whole:]
    return groups, tokens[:, :, whole:]


WRONG.append(
    (
        "05.7",
        "remembers what waited from the call before, in place of the argument",
        "what waits is given; another layer's tokens must not come in",
        groups_to_quantize,
    )
)

# ---------------------------------------------------------------------------------------------------- 05.7 right


def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    *groups, rest = torch.cat((waiting, new), dim=2).tensor_split(
        list(range(group_size, waiting.shape[2] + new.shape[2] + 1, group_size)), dim=2
    )
    return groups, rest


RIGHT.append(("05.7", "tensor_split at every multiple", groups_to_quantize))


def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    ready, tokens = [], torch.concat([waiting, new], dim=-2)
    while tokens.size(-2) >= group_size:
        ready.append(tokens.narrow(-2, 0, group_size).clone())
        tokens = tokens.narrow(-2, group_size, tokens.size(-2) - group_size)
    return ready, tokens.clone()


RIGHT.append(("05.7", "narrow and clone in a while loop", groups_to_quantize))


def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    tokens = torch.cat((waiting, new), dim=2)
    groups, rest = divmod(tokens.shape[2], group_size)
    parts = tokens.split([group_size] * groups + [rest], dim=2)
    return list(parts[:-1]), parts[-1]


RIGHT.append(("05.7", "divmod and split with sizes", groups_to_quantize))


def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    columns = [*waiting.unbind(2), *new.unbind(2)]
    last = len(columns) - len(columns) % group_size
    stacked = [torch.stack(columns[i : i + group_size], dim=2) for i in range(0, last, group_size)]
    rest = torch.stack(columns[last:], dim=2) if columns[last:] else new[:, :, :0]
    return stacked, rest


RIGHT.append(("05.7", "token by token with unbind and stack", groups_to_quantize))

# ---------------------------------------------------------------------------------------------------- 05.8 wrong


def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    total, count = 0.0, 0
    for start in range(0, tokens.shape[1], 32):
        part = tokens[:, start : start + 32]
        logits = model(part, cache)[0]
        for i in range(part.shape[1] - 1):
            if start + i + 1 >= 64:
                total += F.cross_entropy(logits[i], part[0, i + 1]).item()
                count += 1
    return total / count


WRONG.append(
    (
        "05.8",
        "the first token of every part is not scored",
        "a part's last logits predict the next part's first token",
        mean_surprise,
    )
)


def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    logits = torch.cat([model(part, cache)[0] for part in tokens.split(32, dim=1)])
    return F.cross_entropy(logits[64:-1], tokens[0, 65:]).item()


WRONG.append(
    ("05.8", "begins at position 65", "the token at position 64 counts: it is predicted by logits 63", mean_surprise)
)


def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    means = []
    for start in range(0, tokens.shape[1], 32):
        logits = model(tokens[:, start : start + 32], cache)[0]
        targets = tokens[0, start + 1 : start + 33]
        first = max(0, 63 - start)
        if first < len(targets):
            means.append(F.cross_entropy(logits[first : len(targets)], targets[first:]))
    return torch.stack(means).mean().item()


WRONG.append(
    (
        "05.8",
        "a mean of the parts' means: short parts weigh too much",
        "the mean over tokens, each counted once",
        mean_surprise,
    )
)


def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    first = model(tokens[:, :64], cache)[0]
    logits = torch.cat([first, *(model(part, cache)[0] for part in tokens[:, 64:].split(32, dim=1))])
    return F.cross_entropy(logits[63:-1], tokens[0, 64:]).item()


WRONG.append(
    ("05.8", "the first 64 tokens in one part, then 32 at a time", "32 at a time from the beginning", mean_surprise)
)


def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    parts = tokens.shape[1] // 32
    logits = torch.cat([model(tokens[:, 32 * i : 32 * i + 32], cache)[0] for i in range(parts)])
    end = min(len(logits), tokens.shape[1] - 1)
    return F.cross_entropy(logits[63:end], tokens[0, 64 : end + 1]).item()


WRONG.append(
    ("05.8", "a last part shorter than 32 is left out", "all tokens count, a short last part too", mean_surprise)
)


def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    logits = torch.cat([model(part, cache)[0] for part in tokens.split(32, dim=1)])
    return F.cross_entropy(logits[63:-1], tokens[0, 64:], reduction="sum").item()


WRONG.append(("05.8", "the sum", "the mean per token", mean_surprise))


def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    logits = torch.cat([model(part, cache)[0] for part in tokens.split(32, dim=1)])
    return F.cross_entropy(logits[63:-1], tokens[0, 64:]).item() / math.log(2)


WRONG.append(("05.8", "bits in place of nats", "nats: the natural logarithm", mean_surprise))


def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    logits = torch.cat([model(part, cache)[0] for part in tokens.split(32, dim=1)])
    return F.cross_entropy(logits[63:-1], tokens[0, 64:]).exp().item()


WRONG.append(("05.8", "perplexity in place of the mean surprise", "the mean of -log p, not its exp", mean_surprise))


def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    surprises = []
    for start in range(0, tokens.shape[1] - 1, 32):
        part = tokens[:, start : start + 33]  # one more, for the last target
        logits = model(part, cache)[0]
        surprises.append(F.cross_entropy(logits[: part.shape[1] - 1], part[0, 1:], reduction="none"))
    return torch.cat(surprises)[63:].mean().item()


WRONG.append(
    (
        "05.8",
        "parts of 33 that overlap by one: a token is appended twice at every edge",
        "each token goes through the model once, 32 at a time",
        mean_surprise,
    )
)


def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    logits = torch.cat([model(tokens[:, i : i + 1], cache)[0] for i in range(tokens.shape[1])])
    return F.cross_entropy(logits[63:-1], tokens[0, 64:]).item()


WRONG.append(
    ("05.8", "one token at a time", "32 at a time is asked (and takes a thirtieth of the passes)", mean_surprise)
)


def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    logits = torch.cat([model(part, cache)[0] for part in tokens.split(32, dim=1)])
    return F.cross_entropy(logits[:-1], tokens[0, 1:]).item()


WRONG.append(("05.8", "all tokens from position 1 on", "only tokens from position 64 on", mean_surprise))


def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    logits = torch.cat([model(part, cache)[0] for part in tokens.split(64, dim=1)])
    return F.cross_entropy(logits[63:-1], tokens[0, 64:]).item()


WRONG.append(("05.8", "64 at a time", "32 at a time: a part meets what the cache holds of those before", mean_surprise))


def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    logits = torch.cat([model(part, cache)[0] for part in tokens.split(32, dim=1)])
    p = logits[63:-1].softmax(dim=-1).gather(1, tokens[0, 64:, None])
    return -(p + 1e-6).log().mean().item()


WRONG.append(
    (
        "05.8",
        "log of p + 1e-6: unlikely tokens look likelier",
        "use log_softmax or cross_entropy: no epsilon",
        mean_surprise,
    )
)


def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    logits = torch.cat([model(part, cache)[0] for part in tokens.split(32, dim=1)])
    return F.cross_entropy(logits[63:-1], tokens[0, 64:])


WRONG.append(("05.8", "a tensor comes back", "a float: .item()", mean_surprise))


def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    logits = torch.cat([model(part, cache)[0] for part in tokens[:, 64:].split(32, dim=1)])
    return F.cross_entropy(logits[:-1], tokens[0, 65:]).item()


WRONG.append(
    ("05.8", "the first 64 tokens are not fed at all", "they are the context of those that are scored", mean_surprise)
)


def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    logits = torch.cat([model(tokens[:, : start + 32], cache)[0][start:] for start in range(0, tokens.shape[1], 32)])
    return F.cross_entropy(logits[63:-1], tokens[0, 64:]).item()


WRONG.append(
    (
        "05.8",
        "each pass is given the whole text so far, though the cache holds it",
        "a part is only its 32 new tokens",
        mean_surprise,
    )
)

# ---------------------------------------------------------------------------------------------------- 05.8 right


def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    total, count, last = 0.0, 0, None
    for start in range(0, tokens.shape[1], 32):
        part = tokens[:, start : start + 32]
        logits = model(part, cache)[0]
        predicting = logits[:-1] if last is None else torch.cat((last, logits[:-1]))
        targets = part[0, 1:] if last is None else part[0]
        first = start + (last is None)
        log_p = predicting.double().log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
        chosen = log_p[max(0, 64 - first) :]
        total, count, last = total - chosen.sum().item(), count + len(chosen), logits[-1:]
    return total / count


RIGHT.append(("05.8", "the last row carried over, float64, gather", mean_surprise))


def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    logits = torch.cat([model(part, cache) for part in tokens.split(32, dim=-1)], dim=1)
    return F.nll_loss(logits[0, 63:-1].log_softmax(-1), target=tokens[0, 64:].long()).item()


RIGHT.append(("05.8", "all logits joined, nll_loss", mean_surprise))


def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    n = tokens.shape[-1]
    rows = (row for start in range(0, n, 32) for row in model(tokens[:, start : min(n, start + 32)], cache)[0].double())
    surprises = [
        (row.logsumexp(0) - row[tokens[0, position]]).item()
        for position, row in enumerate(rows, start=1)
        if 64 <= position < n
    ]
    return math.fsum(surprises) / len(surprises)


RIGHT.append(("05.8", "a generator of rows, logsumexp, fsum", mean_surprise))
