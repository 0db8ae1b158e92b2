"""Answers that lab 05's checks had not seen when they met: their author knew the notebook, not the checks."""

# ruff: noqa: F811, RUF012 - written as learners write

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.labs.lab05 import references
from labkit.labs.lab05.references import *  # noqa: F403
from tests.labs.noting import noting

WRONG, RIGHT, wrong, right = noting(references)


# 05.1
@wrong(
    "05.1",
    "scale clamped to a smallest value: a group of small spread uses only the first codes",
    "the greatest number of a group of small spread does not get the last code",
)
def quantize(x: Tensor, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    low = x.amin(dim=-1, keepdim=True)
    high = x.amax(dim=-1, keepdim=True)
    scale = ((high - low) / (2**nbits - 1)).clamp(min=1e-3)  # never divide by 0
    codes = ((x - low) / scale).round().clamp(0, 2**nbits - 1)
    return codes.to(torch.uint8), scale, low


@wrong(
    "05.1",
    "whole-number zero point, as in torch.quantize_per_tensor: equal groups do not come back exactly",
    "a group of equal numbers does not come back exactly",
)
def quantize(x: Tensor, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    levels = 2**nbits - 1
    low, high = x.aminmax(dim=-1, keepdim=True)
    scale = (high - low) / levels
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero_point = torch.round(-low / scale)
    codes = (torch.round(x / scale) + zero_point).clamp(0, levels).to(torch.uint8)
    return codes, scale, -zero_point * scale


@wrong(
    "05.1",
    "goes up to float32 for accuracy and forgets to come back to x's dtype",
    "scale and zero are float32 where x is float16",
)
def quantize(x: Tensor, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.float()
    zero = wide.min(dim=-1, keepdim=True).values
    span = wide.max(dim=-1, keepdim=True).values - zero
    scale = span / (2**nbits - 1)
    safe = scale.masked_fill(scale == 0, 1.0)
    codes = ((wide - zero) / safe).round_().to(torch.uint8)
    return codes, scale, zero


@right("05.1", "searchsorted between the midpoints of neighbouring levels")
def quantize(x: Tensor, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    zero = wide.amin(dim=-1, keepdim=True)
    scale = (wide.amax(dim=-1, keepdim=True) - zero) / (2**nbits - 1)
    halfway = torch.arange(2**nbits - 1, dtype=wide.dtype, device=x.device) + 0.5
    codes = torch.searchsorted((scale * halfway).contiguous(), (wide - zero).contiguous())
    return codes.to(torch.uint8), scale.to(x.dtype), zero.to(x.dtype)


# 05.2
@wrong("05.2", "packs pieces far apart instead of neighbours", "code 0 shares its byte with code n/2, not with code 1")
def pack(codes: Tensor, nbits: int) -> Tensor:
    per_byte = 8 // nbits
    out = torch.zeros_like(codes[..., : codes.shape[-1] // per_byte])
    for i, part in enumerate(codes.chunk(per_byte, dim=-1)):
        out |= part << (i * nbits)
    return out


@wrong("05.2", "two codes a byte whatever nbits: 2 bits take 4", "2 bits: n / 2 bytes, where n / 4 are wanted")
def pack(codes: Tensor, nbits: int) -> Tensor:
    if nbits == 8:
        return codes
    first, second = codes[..., ::2], codes[..., 1::2]
    return first | second << nbits


@wrong("05.2", "sums in int64 and returns int64: eight bytes for each byte", "the bytes are int64, not uint8")
def pack(codes: Tensor, nbits: int) -> Tensor:
    per_byte = 8 // nbits
    weights = 2 ** (nbits * torch.arange(per_byte, device=codes.device))
    return (codes.unflatten(-1, (-1, per_byte)).long() * weights).sum(dim=-1)


@right("05.2", "recursion: twos become fours become eights")
def pack(codes: Tensor, nbits: int) -> Tensor:
    def twice_as_wide(codes: Tensor, nbits: int) -> Tensor:
        if nbits == 8:
            return codes
        return twice_as_wide(torch.add(codes[..., 0::2], codes[..., 1::2], alpha=2**nbits), 2 * nbits)

    return twice_as_wide(codes, nbits)


# 05.3
@wrong(
    "05.3",
    "keys are swapped before quantizing and reshaped, not swapped, back: numbers in other places",
    "the shape is right, but channels and tokens of the keys are scrambled",
)
def quantize_cache(k: Tensor, v: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    def back(groups: Tensor) -> Tensor:
        codes, scale, zero = quantize(groups, nbits)
        return codes * scale + zero

    keys = back(k.transpose(2, 3).reshape(-1, group_size)).reshape(k.shape)
    values = back(v.reshape(-1, group_size)).reshape(v.shape)
    return keys, values


@wrong(
    "05.3",
    "ignores group_size: a whole channel, a whole token is one group",
    "a group is the whole channel, not group_size tokens of it",
)
def quantize_cache(k: Tensor, v: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    k_codes, k_scale, k_zero = quantize(k.mT, nbits)  # per channel
    v_codes, v_scale, v_zero = quantize(v, nbits)  # per token
    return (k_codes * k_scale + k_zero).mT, v_codes * v_scale + v_zero


@wrong(
    "05.3",
    "unflattened the wrong way round: a group is every n-th token, not successive ones",
    "groups are strided: their tokens do not follow each other",
)
def quantize_cache(k: Tensor, v: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    def round_trip(x: Tensor) -> Tensor:
        pieces = x.unflatten(-1, (group_size, -1)).mT
        codes, scale, zero = quantize(pieces, nbits)
        return (codes * scale + zero).mT.flatten(-2)

    return round_trip(k.mT).mT, round_trip(v)


@right("05.3", "loops over slices and joins them")
def quantize_cache(k: Tensor, v: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    key_parts, value_parts = [], []
    for start in range(0, k.shape[-2], group_size):
        codes, scale, zero = quantize(k[..., start : start + group_size, :].mT, nbits)
        key_parts.append((codes * scale + zero).mT)
    for start in range(0, v.shape[-1], group_size):
        codes, scale, zero = quantize(v[..., start : start + group_size], nbits)
        value_parts.append(codes * scale + zero)
    return torch.cat(key_parts, dim=-2), torch.cat(value_parts, dim=-1)


@right("05.3", "no call of quantize: in place of axes swapped, amin and amax along the axis")
def quantize_cache(k: Tensor, v: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    def along(x: Tensor, axis: int) -> Tensor:
        groups = x.unflatten(axis, (-1, group_size))
        low = groups.amin(dim=axis + 1, keepdim=True)
        step = (groups.amax(dim=axis + 1, keepdim=True) - low) / (2**nbits - 1)
        level = torch.where(step > 0, (groups - low) / step, torch.zeros_like(groups)).round()
        return (level * step + low).flatten(axis, axis + 1)

    return along(k, 2), along(v, 3)


# 05.4
@wrong(
    "05.4",
    "everything but the residual counts as packed, whole group or not",
    "tokens whose group is not complete are counted as packed",
)
def bits_per_element(tokens: int, nbits: int, group_size: int, residual_length: int, full_bits: int = 16) -> float:
    waiting = min(tokens, residual_length)
    packed = tokens - waiting
    metadata = 2 * 16 / group_size
    return (packed * (nbits + metadata) + waiting * full_bits) / tokens


@wrong(
    "05.4",
    "cuts groups first and takes the residual off afterwards",
    "the residual is taken off whole groups: what is packed is no multiple of group_size",
)
def bits_per_element(tokens: int, nbits: int, group_size: int, residual_length: int, full_bits: int = 16) -> float:
    in_groups = tokens // group_size * group_size
    packed = max(0, in_groups - residual_length)
    full = tokens - packed
    return (packed * (nbits + 32 / group_size) + full * full_bits) / tokens


@wrong(
    "05.4",
    "tokens in full precision are billed scales and zero points too",
    "metadata is counted for tokens that are not quantized",
)
def bits_per_element(tokens: int, nbits: int, group_size: int, residual_length: int, full_bits: int = 16) -> float:
    if tokens < group_size + residual_length:
        return float(full_bits)
    packed = (tokens - residual_length) // group_size * group_size
    share = packed / tokens
    return share * nbits + (1 - share) * full_bits + 32 / group_size


@right("05.4", "lets the tokens come one by one and counts")
def bits_per_element(tokens: int, nbits: int, group_size: int, residual_length: int, full_bits: int = 16) -> float:
    groups = waiting = 0
    for _ in range(tokens):
        waiting += 1
        if waiting - group_size >= residual_length:
            groups, waiting = groups + 1, waiting - group_size
    return (groups * (group_size * nbits + 16 + 16) + waiting * full_bits) / tokens


# 05.5
@wrong(
    "05.5",
    "the lists belong to the class: all layers share their groups",
    "a second layer reads what was appended to the first",
)
class QuantizedLayer:
    groups: list = []
    k = None
    v = None

    def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
        self.group_size, self.residual_length = group_size, residual_length
        self.quantize_group, self.restore = quantize_group, restore

    def append(self, k: Tensor, v: Tensor) -> None:
        self.k = k.clone() if self.k is None else torch.cat((self.k, k), dim=2)
        self.v = v.clone() if self.v is None else torch.cat((self.v, v), dim=2)
        n = self.group_size
        while self.k.shape[2] >= n + self.residual_length:
            self.groups.append(self.quantize_group(self.k[:, :, :n], self.v[:, :, :n]))
            self.k, self.v = self.k[:, :, n:].clone(), self.v[:, :, n:].clone()

    def read(self) -> tuple[Tensor, Tensor]:
        restored = [self.restore(group) for group in self.groups]
        k = torch.cat([k for k, _ in restored] + [self.k], dim=2)
        v = torch.cat([v for _, v in restored] + [self.v], dim=2)
        return k, v


@wrong(
    "05.5",
    "when enough wait, every whole group among them is quantized, the residual too",
    "fewer than residual_length newest tokens stay in full precision",
)
class QuantizedLayer:
    def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
        self.group_size, self.residual_length = group_size, residual_length
        self.quantize_group, self.restore = quantize_group, restore
        self.groups, self.pieces = [], []

    def append(self, k: Tensor, v: Tensor) -> None:
        self.pieces.append((k.clone(), v.clone()))
        waiting = sum(piece[0].shape[2] for piece in self.pieces)
        if waiting < self.group_size + self.residual_length:
            return
        k, v = (torch.cat([piece[side] for piece in self.pieces], dim=2) for side in (0, 1))
        whole = waiting // self.group_size * self.group_size
        for start in range(0, whole, self.group_size):
            stop = start + self.group_size
            self.groups.append(self.quantize_group(k[:, :, start:stop], v[:, :, start:stop]))
        self.pieces = [(k[:, :, whole:].clone(), v[:, :, whole:].clone())]

    def read(self) -> tuple[Tensor, Tensor]:
        parts = [self.restore(group) for group in self.groups] + self.pieces
        return torch.cat([k for k, _ in parts], dim=2), torch.cat([v for _, v in parts], dim=2)


@wrong(
    "05.5",
    "the first piece is kept as it was given, no copy: the caller's later writes show",
    "what waits changes when the caller reuses its tensor",
)
class QuantizedLayer:
    def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
        self.size, self.residual = group_size, residual_length
        self.quantize_group, self.restore = quantize_group, restore
        self.packed: list = []
        self.waiting: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> None:
        if self.waiting is not None and self.waiting[0].shape[2] > 0:
            k = torch.cat((self.waiting[0], k), dim=2)
            v = torch.cat((self.waiting[1], v), dim=2)
        ready = max(0, k.shape[2] - self.residual) // self.size
        for _ in range(ready):
            self.packed.append(self.quantize_group(k[:, :, : self.size].clone(), v[:, :, : self.size].clone()))
            k, v = k[:, :, self.size :], v[:, :, self.size :]
        self.waiting = k, v

    def read(self) -> tuple[Tensor, Tensor]:
        parts = [*map(self.restore, self.packed), self.waiting]
        k, v = zip(*parts, strict=True)
        return torch.cat(k, dim=2), torch.cat(v, dim=2)


@right("05.5", "a deque of single tokens, and a generator of parts")
class QuantizedLayer:
    def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
        self.group_size = group_size
        self.most_waiting = group_size + residual_length - 1
        self.quantize_group = quantize_group
        self.restore = restore
        self.done: list[Any] = []
        self.queue: deque[tuple[Tensor, Tensor]] = deque()
        self.nothing: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> None:
        if self.nothing is None:
            self.nothing = k[:, :, :0].clone(), v[:, :, :0].clone()
        for token in range(k.shape[2]):
            self.queue.append((k[:, :, token : token + 1].clone(), v[:, :, token : token + 1].clone()))
            if len(self.queue) > self.most_waiting:
                oldest = [self.queue.popleft() for _ in range(self.group_size)]
                keys, values = (torch.cat(side, dim=2) for side in zip(*oldest, strict=True))
                self.done.append(self.quantize_group(keys, values))

    def _parts(self):
        yield from map(self.restore, self.done)
        yield from self.queue
        yield self.nothing

    def read(self) -> tuple[Tensor, Tensor]:
        keys, values = zip(*self._parts(), strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)


# 05.6
@wrong(
    "05.6",
    "adds the sum of the zero points, not their product with the query",
    "the zero points are not multiplied with the query",
)
def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    scores = (q * scale) @ codes.to(q.dtype).mT
    return scores + zero.sum(dim=-1, keepdim=True)


@wrong("05.6", "one token at a time, but each key is made dense", "keys are computed, if one at a time")
def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    columns = []
    for token in range(codes.shape[-2]):
        key = codes[..., token : token + 1, :] * scale + zero
        columns.append((q * key).sum(dim=-1))
    return torch.stack(columns, dim=-1)


@wrong(
    "05.6",
    "the scale is put on the scores, as if it were one per token: fits when tokens equal head_dim",
    "the scale of channel c multiplies the score of token c",
)
def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    raw = q @ codes.to(q.dtype).mT
    offset = q @ zero.mT
    return raw * scale + offset


@right("05.6", "einsum for both sums")
def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    by_code = torch.einsum("...qd,...td->...qt", torch.mul(q, scale), codes.to(dtype=q.dtype))
    return by_code + torch.einsum("...qd,...xd->...qx", q, zero)


@right("05.6", "a loop over channels, each adds an outer product")
def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    scores = (q @ zero.mT).repeat_interleave(codes.shape[-2], dim=-1)
    for c in range(codes.shape[-1]):
        scores += q[..., c, None] * scale[..., c, None] * codes[..., None, :, c].to(q.dtype)
    return scores


# 05.7
@wrong("05.7", "split: the incomplete rest is a group too, nothing waits", "the last group holds fewer than group_size")
def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    tokens = torch.cat((waiting, new), dim=2)
    if tokens.shape[2] < group_size:
        return [], tokens
    return list(tokens.split(group_size, dim=2)), tokens[:, :, :0]


@wrong(
    "05.7",
    "groups are counted from the newest end: the oldest go on waiting",
    "the oldest tokens wait, newer ones are quantized before them",
)
def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    tokens = torch.cat((waiting, new), dim=2)
    rest = tokens.shape[2] % group_size
    ready = tokens[:, :, rest:]
    groups = [ready[:, :, i : i + group_size] for i in range(0, ready.shape[2], group_size)]
    return groups, tokens[:, :, :rest]


@wrong(
    "05.7",
    "slices the rest from -rest: when nothing is left, -0 keeps all tokens waiting",
    "when groups come out even, their tokens go on waiting as well: they will be quantized twice",
)
def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    tokens = torch.cat((waiting, new), dim=2)
    whole, rest = divmod(tokens.shape[2], group_size)
    groups = [tokens[:, :, i * group_size : (i + 1) * group_size] for i in range(whole)]
    return groups, tokens[:, :, -rest:]


@right("05.7", "tensor_split at the multiples of group_size")
def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    tokens = torch.cat((waiting, new), dim=2)
    cuts = list(range(group_size, tokens.shape[2] + 1, group_size))
    *groups, still_waiting = tokens.tensor_split(cuts, dim=2)
    return groups, still_waiting


# 05.8
@wrong(
    "05.8",
    "the mean of the parts' means: a short last part weighs as much as a whole one",
    "parts are weighed alike, whatever they hold",
)
def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    means, carried = [], None
    for start in range(0, tokens.shape[1], 32):
        part = tokens[:, start : start + 32]
        logits = model(part, cache)[0]
        if start >= 64:
            predicted = torch.cat((carried, logits[:-1]))
            means.append(F.cross_entropy(predicted, part[0]))
        carried = logits[-1:]
    return torch.stack(means).mean().item()


@wrong(
    "05.8",
    "each part is scored by itself: the first token of each part is never predicted",
    "the first token of each part is left out",
)
def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    total, count = 0.0, 0
    for start in range(0, tokens.shape[1], 32):
        part = tokens[:, start : start + 32]
        logits = model(part, cache)[0]
        if start < 64 or part.shape[1] < 2:
            continue
        total += F.cross_entropy(logits[:-1], part[0, 1:], reduction="sum").item()
        count += part.shape[1] - 1
    return total / count


@wrong(
    "05.8", "the first 64 tokens go through in one pass, as a prompt", "a part of 64 tokens, where 32 were asked for"
)
def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    logits = [model(tokens[:, :64], cache)[0, -1:]]
    for part in tokens[:, 64:].split(32, dim=1):
        logits.append(model(part, cache)[0])
    return F.cross_entropy(torch.cat(logits)[:-1], tokens[0, 64:]).item()


@right("05.8", "log-probabilities one token at a time, the prediction carried over")
def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    surprises, prediction = [], None
    for at in range(0, tokens.shape[1], 32):
        piece = tokens[:, at : at + 32]
        for offset, row in enumerate(model(piece, cache)[0].float().log_softmax(dim=-1)):
            if prediction is not None and at + offset >= 64:
                surprises.append(-prediction[tokens[0, at + offset]].item())
            prediction = row
    return math.fsum(surprises) / len(surprises)
