"""Answers that lab 05's checks had not seen when they met: their author knew the notebook, not the checks."""

# ruff: noqa: F811

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from itertools import accumulate, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.labs.lab05 import references
from tests.labs.noting import noting

WRONG, RIGHT, wrong, right = noting(references)


# 05.1


@wrong("05.1", "x and the zero point rounded apart", "off by more than half a scale: round once, after the subtraction")
def quantize(x: Tensor, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    last = 2**nbits - 1
    scale = (high - low) / last
    steps = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = (torch.round(x / steps) - torch.round(low / steps)).clamp(0, last).to(torch.uint8)
    return codes, scale, low


@wrong("05.1", "a range of at least 1e-5", "a group of small numbers: its greatest does not get the last code")
def quantize(x: Tensor, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    inside = x.float()
    low, high = torch.aminmax(inside, dim=-1, keepdim=True)
    last = 2**nbits - 1
    scale = (high - low).clamp_min(1e-5) / last
    codes = ((inside - low) / scale).round().clamp(0, last).to(torch.uint8)
    return codes, scale.to(x.dtype), low.to(x.dtype)


@wrong(
    "05.1",
    "scale and zero point rounded to 16 bits",
    "equal numbers do not come back exactly: nothing is rounded to float16",
)
def quantize(x: Tensor, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    zero = low.half().to(x.dtype)
    scale = ((high - zero) / (2**nbits - 1)).half().to(x.dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return ((x - zero) / scale).round().clamp(0, 2**nbits - 1).to(torch.uint8), scale, zero


@wrong("05.1", "all in x's dtype, not clamped", "bfloat16, 8 bits: the greatest is code 256, which wraps to 0")
def quantize(x: Tensor, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    scale = (high - low) / (2**nbits - 1)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = torch.round((x - low) / scale)
    return codes.to(torch.int64).to(torch.uint8), scale, low


@wrong("05.1", "x is shifted in place", "the caller's numbers have changed")
def quantize(x: Tensor, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    low = x.amin(-1, keepdim=True)
    x -= low
    scale = x.amax(-1, keepdim=True) / (2**nbits - 1)
    codes = (x / scale.masked_fill(scale == 0, 1)).round().clamp(max=2**nbits - 1)
    return codes.to(torch.uint8), scale, low


@right("05.1", "levels' midpoints in float64, and a search among them")
def quantize(x: Tensor, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.double().contiguous()
    low = wide.min(dim=-1, keepdim=True).values
    span = wide.max(dim=-1, keepdim=True).values - low
    last = 2**nbits - 1
    halves = (torch.arange(last, dtype=torch.float64, device=x.device) + 0.5) / last
    codes = torch.searchsorted((low + span * halves).contiguous(), wide)
    return codes.to(torch.uint8), (span / last).to(x.dtype), low.to(x.dtype)


@right("05.1", "shares of the range, in place on a copy of its own")
def quantize(x: Tensor, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    levels = (1 << nbits) - 1
    own = x.to(torch.float64, copy=True)
    ordered = own.sort(dim=-1).values
    least, greatest = ordered[..., :1], ordered[..., -1:]
    span = greatest - least
    flat = span == 0
    own.sub_(least).div_(span.masked_fill(flat, 1.0)).mul_(levels).round_().clamp_(0, levels)
    scale = (span / levels).masked_fill(flat, 1.0)  # any scale will do where every code is 0
    return own.byte(), scale.to(x.dtype), least.to(x.dtype)


# 05.2


@wrong("05.2", "2 bits in two rounds that both shift by 2", "2 bits: codes overlap, as pairs of them take 4 bits")
def pack(codes: Tensor, nbits: int) -> Tensor:
    rounds = {8: 0, 4: 1, 2: 2}[nbits]
    for _ in range(rounds):
        codes = codes[..., ::2] | codes[..., 1::2] << nbits
    return codes


@wrong("05.2", "shifted where they lie", "the codes given have changed")
def pack(codes: Tensor, nbits: int) -> Tensor:
    per_byte = 8 // nbits
    packed = codes[..., ::per_byte].clone()
    for i in range(1, per_byte):
        part = codes[..., i::per_byte]
        part <<= nbits * i
        packed |= part
    return packed


@wrong("05.2", "every second code of the first dimension", "right for one row only: the last dimension holds the codes")
def pack(codes: Tensor, nbits: int) -> Tensor:
    per_byte = 8 // nbits
    packed = codes[::per_byte].clone()
    for i in range(1, per_byte):
        packed |= codes[i::per_byte] << (nbits * i)
    return packed


@wrong("05.2", "sums, which are int64", "int64 takes eight bytes for each: uint8 is asked for")
def pack(codes: Tensor, nbits: int) -> Tensor:
    weights = torch.tensor([2 ** (nbits * i) for i in range(8 // nbits)], dtype=torch.uint8, device=codes.device)
    return (codes.unflatten(-1, (-1, 8 // nbits)) * weights).sum(-1)


@wrong("05.2", "4 bits always", "2 bits: four codes go into a byte, not two; 8 bits: one")
def pack(codes: Tensor, nbits: int) -> Tensor:
    if nbits == 8:
        return codes
    even, odd = codes[..., ::2], codes[..., 1::2]
    return even | (odd << 4)


@right("05.2", "recursion: pairs become codes of twice the bits")
def pack(codes: Tensor, nbits: int) -> Tensor:
    def pairs(narrow: Tensor, bits: int) -> Tensor:
        if bits >= 8:
            return narrow
        first, second = narrow.unflatten(-1, (narrow.shape[-1] // 2, 2)).unbind(-1)
        return pairs(torch.bitwise_or(first, torch.bitwise_left_shift(second, bits)), bits * 2)

    return pairs(codes.clone(), nbits)


@right("05.2", "Horner's rule in int32")
def pack(codes: Tensor, nbits: int) -> Tensor:
    base = 2**nbits
    out = torch.zeros(*codes.shape[:-1], codes.shape[-1] * nbits // 8, dtype=torch.int32, device=codes.device)
    for i in reversed(range(8 // nbits)):  # Horner
        out.mul_(base).add_(codes[..., i :: 8 // nbits])
    return out.to(torch.uint8)


# 05.3


@wrong("05.3", "tokens that lie apart share a group", "a group of keys is successive tokens; these are every n-th")
def quantize_cache(k: Tensor, v: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    groups = k.unflatten(2, (group_size, -1)).movedim(2, -1)  # [batch, heads, tokens / group_size, head_dim, group]
    codes, scale, zero = quantize(groups, nbits)
    k_back = (codes * scale + zero).movedim(-1, 2).flatten(2, 3)
    codes, scale, zero = quantize(v.unflatten(-1, (-1, group_size)), nbits)
    return k_back, (codes * scale + zero).flatten(-2)


@wrong("05.3", "one scale for all channels of a group of tokens", "keys: each channel has a scale of its own")
def quantize_cache(k: Tensor, v: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    tiles = k.unflatten(2, (-1, group_size))
    codes, scale, zero = quantize(tiles.flatten(-2), nbits)
    k_back = (codes * scale + zero).reshape(k.shape)
    codes, scale, zero = quantize(v.unflatten(-1, (-1, group_size)), nbits)
    return k_back, (codes * scale + zero).flatten(-2)


@wrong("05.3", "a token's values are one group", "values: group_size channels to a group, here all of head_dim")
def quantize_cache(k: Tensor, v: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    codes, scale, zero = quantize(k.mT.unflatten(-1, (-1, group_size)), nbits)
    k_back = (codes * scale + zero).flatten(-2).mT
    codes, scale, zero = quantize(v, nbits)
    return k_back, codes * scale + zero


@wrong("05.3", "written back into K and V", "the K and V given have changed")
def quantize_cache(k: Tensor, v: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    for start in range(0, k.shape[2], group_size):
        part = k[:, :, start : start + group_size]
        codes, scale, zero = quantize(part.mT, nbits)
        part.copy_((codes * scale + zero).mT)
    for start in range(0, v.shape[3], group_size):
        part = v[..., start : start + group_size]
        codes, scale, zero = quantize(part, nbits)
        part.copy_(codes * scale + zero)
    return k, v


@wrong("05.3", "keys reshaped back without swapping", "keys come back with tokens and channels mixed up")
def quantize_cache(k: Tensor, v: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    back = []
    for x in (k.transpose(2, 3), v):
        codes, scale, zero = quantize(x.reshape(-1, group_size), nbits)
        back.append((codes * scale + zero).reshape(k.shape))
    return back[0], back[1]


@right("05.3", "pieces of split, put together by cat")
def quantize_cache(k: Tensor, v: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    def there_and_back(group: Tensor) -> Tensor:
        codes, scale, zero = quantize(group, nbits)
        return torch.addcmul(zero, codes.to(scale.dtype), scale)

    keys = [there_and_back(piece.transpose(-1, -2)).transpose(-1, -2) for piece in k.split(group_size, dim=-2)]
    values = map(there_and_back, v.split(group_size, dim=-1))
    return torch.cat(keys, dim=-2), torch.cat(tuple(values), dim=-1)


@right("05.3", "flat tables of all heads, one column or row after the other")
def quantize_cache(k: Tensor, v: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    def restored(rows: Tensor) -> Tensor:
        codes, scale, zero = quantize(rows.reshape(-1, group_size), nbits)
        return (codes * scale).add_(zero).reshape(rows.shape)

    head_dim = k.shape[-1]
    columns = k.reshape(-1, head_dim).T  # the tokens of all heads of all rows, one after the other
    return restored(columns).T.reshape(k.shape), restored(v.reshape(-1, v.shape[-1])).reshape(v.shape)


# 05.4


@wrong("05.4", "the residual taken from whole groups", "packed tokens are no multiple of group_size")
def bits_per_element(tokens: int, nbits: int, group_size: int, residual_length: int, full_bits: int = 16) -> float:
    packed = max(0, tokens // group_size * group_size - residual_length)
    return (packed * (nbits + 32 / group_size) + (tokens - packed) * full_bits) / tokens


@wrong("05.4", "scale and zero point of full_bits", "scale and zero point take 16 bits each, also beside float32")
def bits_per_element(tokens: int, nbits: int, group_size: int, residual_length: int, full_bits: int = 16) -> float:
    packed = max(0, tokens - residual_length) // group_size * group_size
    return (packed * (nbits + 2 * full_bits / group_size) + (tokens - packed) * full_bits) / tokens


@wrong("05.4", "exactly residual_length wait", "tokens whose group is not complete wait as well")
def bits_per_element(tokens: int, nbits: int, group_size: int, residual_length: int, full_bits: int = 16) -> float:
    waiting = min(tokens, residual_length)
    groups = math.ceil((tokens - waiting) / group_size)
    return ((tokens - waiting) * nbits + groups * 32 + waiting * full_bits) / tokens


@wrong("05.4", "packs a group one token late", "a group is complete, with residual_length newer ones: it is packed")
def bits_per_element(tokens: int, nbits: int, group_size: int, residual_length: int, full_bits: int = 16) -> float:
    packed = 0
    if tokens > residual_length:
        packed = (tokens - residual_length - 1) // group_size * group_size
    return (packed * nbits + packed // group_size * 32 + (tokens - packed) * full_bits) / tokens


@wrong("05.4", "metadata for tokens that wait too", "what waits has no scale and no zero point")
def bits_per_element(tokens: int, nbits: int, group_size: int, residual_length: int, full_bits: int = 16) -> float:
    packed = max(tokens - residual_length, 0) // group_size * group_size
    share = packed / tokens
    return share * nbits + (1 - share) * full_bits + 2 * 16 / group_size


@right("05.4", "groups counted as a range's length")
def bits_per_element(tokens: int, nbits: int, group_size: int, residual_length: int, full_bits: int = 16) -> float:
    groups = len(range(residual_length + group_size, tokens + 1, group_size))  # one at each length that completes one
    each = group_size * nbits + 16 + 16
    return float(groups * each + (tokens - groups * group_size) * full_bits) / tokens


@right("05.4", "those that wait, by a remainder")
def bits_per_element(tokens: int, nbits: int, group_size: int, residual_length: int, full_bits: int = 16) -> float:
    waits = min(tokens, residual_length + (tokens - residual_length) % group_size)
    share = waits / tokens
    return math.fsum(((1 - share) * nbits, (1 - share) * 32 / group_size, share * full_bits))


# 05.5


@wrong("05.5", "one list of groups for all layers", "a second layer reads the first one's groups")
class QuantizedLayer:
    groups: list = []  # noqa: RUF012
    k = v = None

    def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
        self.group_size, self.residual_length = group_size, residual_length
        self.quantize_group, self.restore = quantize_group, restore

    def append(self, k: Tensor, v: Tensor) -> None:
        self.k = k.clone() if self.k is None else torch.cat((self.k, k), dim=2)
        self.v = v.clone() if self.v is None else torch.cat((self.v, v), dim=2)
        while self.k.shape[2] >= self.group_size + self.residual_length:
            size = self.group_size
            self.groups.append(self.quantize_group(self.k[:, :, :size].clone(), self.v[:, :, :size].clone()))
            self.k, self.v = self.k[:, :, size:].clone(), self.v[:, :, size:].clone()

    def read(self) -> tuple[Tensor, Tensor]:
        pairs = [*map(self.restore, self.groups), (self.k, self.v)]
        return torch.cat([k for k, _ in pairs], dim=2), torch.cat([v for _, v in pairs], dim=2)


@wrong("05.5", "all whole groups in one call", "quantize_group is given 2 * group_size tokens and more")
class QuantizedLayer:
    def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
        self.size, self.residual = group_size, residual_length
        self.quantize_group, self.restore = quantize_group, restore
        self.packed, self.waiting = [], None

    def append(self, k: Tensor, v: Tensor) -> None:
        old = self.waiting or (k[:, :, :0], v[:, :, :0])
        k, v = torch.cat((old[0], k), dim=2), torch.cat((old[1], v), dim=2)
        ready = max(0, k.shape[2] - self.residual) // self.size * self.size
        if ready:
            self.packed.append(self.quantize_group(k[:, :, :ready].clone(), v[:, :, :ready].clone()))
        self.waiting = k[:, :, ready:].clone(), v[:, :, ready:].clone()

    def read(self) -> tuple[Tensor, Tensor]:
        parts = [self.restore(group) for group in self.packed] + [self.waiting]
        k, v = zip(*parts, strict=True)
        return torch.cat(k, dim=2), torch.cat(v, dim=2)


@wrong("05.5", "the rest is [-rest:], also when rest is 0", "residual 0: quantized tokens go on waiting, held twice")
class QuantizedLayer:
    def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
        self.group_size, self.residual_length = group_size, residual_length
        self.quantize_group, self.restore = quantize_group, restore
        self.groups, self.k, self.v = [], None, None

    def append(self, k: Tensor, v: Tensor) -> None:
        self.k = torch.cat([k] if self.k is None else [self.k, k], dim=2)
        self.v = torch.cat([v] if self.v is None else [self.v, v], dim=2)
        whole = max(self.k.shape[2] - self.residual_length, 0) // self.group_size
        for i in range(whole):
            at = slice(i * self.group_size, (i + 1) * self.group_size)
            self.groups.append(self.quantize_group(self.k[:, :, at].clone(), self.v[:, :, at].clone()))
        rest = self.k.shape[2] - whole * self.group_size
        self.k, self.v = self.k[:, :, -rest:].clone(), self.v[:, :, -rest:].clone()

    def read(self) -> tuple[Tensor, Tensor]:
        restored = [self.restore(group) for group in self.groups]
        k = torch.cat([*(pair[0] for pair in restored), self.k], dim=2)
        return k, torch.cat([*(pair[1] for pair in restored), self.v], dim=2)


@wrong("05.5", "takes what is packed for a pair", "only restore knows the form: it need not be a pair")
class QuantizedLayer:
    def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
        self.group_size, self.residual_length = group_size, residual_length
        self.quantize_group, self.restore = quantize_group, restore
        self.k_packed, self.v_packed = [], []
        self.k = self.v = None

    def append(self, k: Tensor, v: Tensor) -> None:
        self.k = k.clone() if self.k is None else torch.cat((self.k, k), dim=2)
        self.v = v.clone() if self.v is None else torch.cat((self.v, v), dim=2)
        size = self.group_size
        while self.k.shape[2] - size >= self.residual_length:
            k_packed, v_packed = self.quantize_group(self.k[:, :, :size].clone(), self.v[:, :, :size].clone())
            self.k_packed.append(k_packed)
            self.v_packed.append(v_packed)
            self.k, self.v = self.k[:, :, size:].clone(), self.v[:, :, size:].clone()

    def read(self) -> tuple[Tensor, Tensor]:
        back = [self.restore(pair) for pair in zip(self.k_packed, self.v_packed, strict=True)]
        k = torch.cat([k for k, _ in back] + [self.k], dim=2)
        return k, torch.cat([v for _, v in back] + [self.v], dim=2)


@wrong("05.5", "groups restored at once and kept so", "floats are held, nothing is saved: fake quantization")
class QuantizedLayer:
    def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
        self.group_size, self.residual_length = group_size, residual_length
        self.round_trip = lambda k, v: restore(quantize_group(k, v))
        self.k = self.v = None
        self.done = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        self.k = k.clone() if self.k is None else torch.cat((self.k, k), dim=2)
        self.v = v.clone() if self.v is None else torch.cat((self.v, v), dim=2)
        while self.k.shape[2] - self.done >= self.group_size + self.residual_length:
            at = slice(self.done, self.done + self.group_size)
            self.k[:, :, at], self.v[:, :, at] = self.round_trip(self.k[:, :, at].clone(), self.v[:, :, at].clone())
            self.done += self.group_size

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k.clone(), self.v.clone()


@wrong("05.5", "a buffer used again, its views given away", "what was given to quantize_group is overwritten later")
class QuantizedLayer:
    def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
        self.group_size, self.residual_length = group_size, residual_length
        self.quantize_group, self.restore = quantize_group, restore
        self.groups, self.room, self.held = [], None, 0

    def append(self, k: Tensor, v: Tensor) -> None:
        if self.room is None:
            shape = (*k.shape[:2], self.group_size + self.residual_length, k.shape[3])
            self.room = k.new_zeros(shape), v.new_zeros(shape)
        for i in range(k.shape[2]):
            for buffer, new in zip(self.room, (k, v), strict=True):
                buffer[:, :, self.held] = new[:, :, i]
            self.held += 1
            if self.held == self.group_size + self.residual_length:
                self.groups.append(self.quantize_group(*(buffer[:, :, : self.group_size] for buffer in self.room)))
                for buffer in self.room:
                    buffer[:, :, : self.residual_length] = buffer[:, :, self.group_size :].clone()
                self.held = self.residual_length

    def read(self) -> tuple[Tensor, Tensor]:
        pairs = [self.restore(group) for group in self.groups]
        pairs.append(tuple(buffer[:, :, : self.held] for buffer in self.room))
        return torch.cat([k for k, _ in pairs], dim=2), torch.cat([v for _, v in pairs], dim=2)


@wrong(
    "05.5", "each append looks at one group only", "a long piece leaves whole groups waiting; in short ones it differs"
)
class QuantizedLayer:
    def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
        self.sizes = group_size, residual_length
        self.quantize_group, self.restore = quantize_group, restore
        self.groups, self.pair = [], None

    def append(self, k: Tensor, v: Tensor) -> None:
        new = torch.stack((k, v))
        self.pair = new if self.pair is None else torch.cat((self.pair, new), dim=3)
        group, residual = self.sizes
        if self.pair.shape[3] >= group + residual:
            self.groups.append(self.quantize_group(*self.pair[:, :, :, :group].clone()))
            self.pair = self.pair[:, :, :, group:].clone()

    def read(self) -> tuple[Tensor, Tensor]:
        pairs = [self.restore(group) for group in self.groups] + [tuple(self.pair)]
        return torch.cat([k for k, _ in pairs], dim=2), torch.cat([v for _, v in pairs], dim=2)


@right("05.5", "a queue of single tokens")
class QuantizedLayer:
    def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
        self._group_size, self._residual_length = group_size, residual_length
        self._pack, self._unpack = quantize_group, restore
        self._groups: list[Any] = []
        self._waiting: deque[tuple[Tensor, Tensor]] = deque()
        self._none: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> None:
        if self._none is None:
            self._none = k[:, :, :0].clone(), v[:, :, :0].clone()
        for index in range(k.shape[2]):
            self._waiting.append((k[:, :, index : index + 1].clone(), v[:, :, index : index + 1].clone()))
            if len(self._waiting) == self._group_size + self._residual_length:
                oldest = [self._waiting.popleft() for _ in range(self._group_size)]
                self._groups.append(self._pack(*(torch.cat(side, dim=2) for side in zip(*oldest, strict=True))))

    def read(self) -> tuple[Tensor, Tensor]:
        assert self._none is not None, "nothing was appended"
        parts = [self._none, *map(self._unpack, self._groups), *self._waiting]
        k, v = (torch.cat(side, dim=2) for side in zip(*parts, strict=True))
        return k, v


@right("05.5", "K and V in two lists of pieces, tokens counted by a property")
class QuantizedLayer:
    def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
        self.options = dict(size=group_size, residual=residual_length)
        self.functions = quantize_group, restore
        self.finished: tuple = ()
        self.pieces: list[list[Tensor]] = [[], []]

    @property
    def waiting(self) -> int:
        return sum(piece.size(2) for piece in self.pieces[0])

    def append(self, k: Tensor, v: Tensor) -> None:
        for pieces, new in zip(self.pieces, (k, v), strict=True):
            pieces.append(new.detach().clone(memory_format=torch.contiguous_format))
        size = self.options["size"]
        groups = max(0, self.waiting - self.options["residual"]) // size
        if not groups:
            return
        cut = list(accumulate([size] * groups))  # where each group ends
        sides = [torch.cat(pieces, dim=2).tensor_split(cut, dim=2) for pieces in self.pieces]
        packed = (self.functions[0](a.clone(), b.clone()) for a, b in islice(zip(*sides, strict=True), groups))
        self.finished += tuple(packed)
        self.pieces = [[side[-1].clone()] for side in sides]

    def read(self) -> tuple[Tensor, Tensor]:
        k, v = list(self.pieces[0]), list(self.pieces[1])
        for group in reversed(self.finished):
            a, b = self.functions[1](group)
            k.insert(0, a)
            v.insert(0, b)
        return torch.cat(k, 2), torch.cat(v, 2)


# 05.6


@wrong("05.6", "dense keys, made in NumPy", "the keys are computed, and outside PyTorch: fold the scale into q")
def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    keys = codes.cpu().numpy() * scale.cpu().numpy() + zero.cpu().numpy()
    return q @ torch.from_numpy(keys).to(q).mT


@wrong("05.6", "dense keys, one token at a time", "the keys are computed after all: codes * scale + zero")
def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    columns = []
    for t in range(codes.shape[-2]):
        key = codes[..., t : t + 1, :] * scale + zero
        columns.append(q @ key.mT)
    return torch.cat(columns, dim=-1)


@wrong("05.6", "the zero point meets the scaled query", "the zero point is not multiplied by the scale")
def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    folded = q * scale
    return folded @ codes.to(q.dtype).mT + folded @ zero.mT


@wrong("05.6", "no zero point, since softmax does not see it", "the sum with the zero points is missing")
def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (q * scale) @ codes.to(q.dtype).mT  # what is the same for all tokens, softmax ignores


@wrong("05.6", "a product of sums for a sum of products", "each channel's zero point meets its own channel of q")
def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    scores = (q * scale) @ codes.to(q.dtype).mT
    return scores + q.sum(-1, keepdim=True) * zero.sum(-1, keepdim=True)


@wrong("05.6", "the query takes the scales in place", "the q given has changed")
def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    constant = q @ zero.mT
    q *= scale
    return q @ codes.type_as(q).mT + constant


@wrong("05.6", "divided by the root of head_dim", "q @ k.mT as it is, nothing divided")
def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    q = q / math.sqrt(q.shape[-1])
    return (q * scale) @ codes.to(q.dtype).mT + q @ zero.mT


@right("05.6", "einsum")
def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    constant = torch.einsum("...qd,...od->...qo", q, zero)
    scores = torch.einsum("...qd,...td->...qt", q * scale, codes.to(q.dtype))
    return scores.add_(constant)


@right("05.6", "some tokens at a time, into a result of its own")
def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    folded, constant = q.mul(scale), torch.linalg.vecdot(q, zero, dim=-1)[..., None]
    pieces = (folded @ part.to(folded.dtype).transpose(-2, -1) for part in codes.split(16, dim=-2))
    out = torch.cat(list(pieces), dim=-1)
    out += constant
    return out


# 05.7


@wrong("05.7", "split of nothing, which is one empty piece", "too few tokens: a group of no tokens comes back")
def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    tokens = torch.cat((waiting, new), dim=2)
    whole = tokens.shape[2] // group_size * group_size
    return list(tokens[:, :, :whole].split(group_size, dim=2)), tokens[:, :, whole:]


@wrong("05.7", "as many chunks as there are whole groups", "groups of more than group_size where a rest is left")
def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    tokens = torch.cat((waiting, new), dim=2)
    groups = tokens.shape[2] // group_size
    if groups == 0:
        return [], tokens
    return list(tokens.chunk(groups, dim=2)), tokens[:, :, :0]


@wrong("05.7", "groups counted in what is new", "tokens that come one at a time never make a group")
def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    tokens = torch.cat((waiting, new), dim=2)
    groups = new.shape[2] // group_size
    ready = [tokens[:, :, i * group_size : (i + 1) * group_size] for i in range(groups)]
    return ready, tokens[:, :, groups * group_size :]


@wrong("05.7", "the rest is [-rest:], also when rest is 0", "no rest: all tokens are quantized and wait as well")
def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    tokens = torch.cat((waiting, new), dim=2)
    groups, rest = divmod(tokens.shape[2], group_size)
    if groups == 0:
        return [], tokens
    return [tokens[:, :, i * group_size : (i + 1) * group_size] for i in range(groups)], tokens[:, :, -rest:]


@wrong("05.7", "the newest are quantized, the oldest wait", "the oldest tokens come first")
def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    tokens = torch.cat((waiting, new), dim=2)
    rest = tokens.shape[2] % group_size
    starts = range(rest, tokens.shape[2], group_size)
    return [tokens[:, :, start : start + group_size] for start in starts], tokens[:, :, :rest]


@wrong("05.7", "the last group filled up with zeros", "a group holds tokens that nobody gave")
def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    tokens = torch.cat((waiting, new), dim=2)
    if tokens.shape[2] == 0:
        return [], tokens
    tokens = F.pad(tokens, (0, 0, 0, -tokens.shape[2] % group_size))
    return list(tokens.split(group_size, dim=2)), tokens[:, :, :0]


@right("05.7", "pops piece after piece")
def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    groups, tokens = [], torch.cat([waiting, new], -2)
    while tokens.size(-2) >= group_size:
        group, tokens = tokens.tensor_split([group_size], dim=-2)
        groups += [group.clone()]
    return groups, tokens.clone()


@right("05.7", "unfolded in windows that do not overlap")
def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    tokens = torch.cat((waiting, new), dim=2)
    if (count := tokens.shape[2]) < group_size:
        return [], tokens
    windows = tokens.unfold(2, group_size, group_size)  # [batch, heads, groups, head_dim, group_size]
    return [window.mT for window in windows.unbind(2)], tokens.narrow(2, count - count % group_size, count % group_size)


# 05.8


@wrong("05.8", "the mean of the parts' means", "a short last part weighs as much as a whole one")
def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    means, before = [], None
    for start in range(0, tokens.shape[1], 32):
        part = tokens[:, start : start + 32]
        logits = model(part, cache)[0]
        if start >= 64:
            means.append(F.cross_entropy(torch.cat((before, logits[:-1])), part[0]).item())
        before = logits[-1:]
    return sum(means) / len(means)


@wrong("05.8", "each part's first token is not counted", "the first of each part is predicted by the part before it")
def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    total, count = 0.0, 0
    for start in range(0, tokens.shape[1], 32):
        part = tokens[:, start : start + 32]
        logits = model(part, cache)[0]
        if start >= 64 and part.shape[1] > 1:
            total += F.cross_entropy(logits[:-1], part[0, 1:], reduction="sum").item()
            count += part.shape[1] - 1
    return total / max(count, 1)


@wrong("05.8", "the first 64 in one pass", "the first part has 64 tokens, which meet nothing quantized")
def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    logits = [model(tokens[:, :64], cache)[0]]
    for part in tokens[:, 64:].split(32, dim=1):
        logits.append(model(part, cache)[0])
    return F.cross_entropy(torch.cat(logits)[63:-1], tokens[0, 64:]).item()


@wrong("05.8", "a last part of fewer than 32 left out", "the last tokens are missing from the mean")
def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    tokens = tokens[:, : tokens.shape[1] // 32 * 32]
    logits = torch.cat([model(part, cache)[0] for part in tokens.split(32, dim=1)])
    return F.cross_entropy(logits[63:-1], tokens[0, 64:]).item()


@wrong("05.8", "filled in parts, then measured in one more pass", "the text goes in twice, and one pass is measured")
def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    for part in tokens.split(32, dim=1):
        model(part, cache)
    logits = model(tokens, cache)[0]
    return F.cross_entropy(logits[63:-1], tokens[0, 64:]).item()


@wrong("05.8", "begins one token late", "the mean begins with position 65")
def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    surprises = []
    for start in range(0, tokens.shape[1], 32):
        logits = model(tokens[:, start : start + 32], cache)[0].log_softmax(-1)
        for i, row in enumerate(logits):
            if 64 <= start + i < tokens.shape[1] - 1:
                surprises.append(-row[tokens[0, start + i + 1]].item())
    return sum(surprises) / len(surprises)


@right("05.8", "a token's probability by hand; only a part's last logits are kept")
def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    def surprises():
        last = None
        for number, part in enumerate(tokens.split(32, dim=1)):
            logits = model(part, cache)[0].double()
            for place, token in enumerate(part[0].tolist()):
                if 32 * number + place >= 64:
                    at = last if place == 0 else logits[place - 1]
                    yield (at.logsumexp(0) - at[token]).item()
            last = logits[-1]

    found = list(surprises())
    return math.fsum(found) / len(found)


@right("05.8", "all log-probabilities gathered, then the mean")
def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    parts = []
    start = 0
    while start < tokens.shape[1]:
        parts += [model(tokens[:, start : start + 32], cache)[0].float().log_softmax(dim=-1)]
        start += 32
    log_p = torch.cat(parts)[:-1].gather(1, tokens[0, 1:, None].long())[:, 0]  # of tokens 1, 2, ...
    return float(-log_p[63:].mean())
