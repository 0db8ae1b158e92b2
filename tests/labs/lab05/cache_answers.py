"""Wrong answers to 05.5 to 05.8, and other right ones."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from labkit.labs.lab05.references import (
    QuantizedLayer,
    groups_to_quantize,
    packed_scores,
)
from tests.labs.answer import Wrong

# 05.5


def joined(old, k, v):
    return (k, v) if old is None else tuple(torch.cat(pair, dim=2) for pair in zip(old, (k, v), strict=True))


class RequantizesAll(QuantizedLayer):
    """All that is old enough is restored, joined with what has become old, and quantized anew."""

    def append(self, k, v):
        k, v = joined(self.waiting, k, v)
        if k.shape[2] > self.residual_length + (0 if self.groups else self.group_size - 1):
            if self.groups:
                k, v = joined(self.restore(self.groups.pop()), k, v)
            old = k.shape[2] - self.residual_length
            self.groups = [self.quantize_group(k[:, :, :old], v[:, :, :old])]
            k, v = k[:, :, old:], v[:, :, old:]
        self.waiting = k.clone(), v.clone()


class QuantizesAllAgain(QuantizedLayer):
    """Keeps everything and quantizes the whole groups of it at every append."""

    def append(self, k, v):
        self.all = joined(getattr(self, "all", None), k, v)
        self.groups, self.waiting = [], None
        super().append(*self.all)


class ForgetsToCut(QuantizedLayer):
    def append(self, k, v):
        k, v = joined(self.waiting, k, v)
        size = self.group_size
        if k.shape[2] >= size + self.residual_length:
            self.groups.append(self.quantize_group(k[:, :, :size], v[:, :, :size]))
        self.waiting = k, v


class WhateverComes(QuantizedLayer):
    """The last append waits; the one before it is a group."""

    def append(self, k, v):
        if self.waiting is not None:
            self.groups.append(self.quantize_group(*self.waiting))
        self.waiting = k.clone(), v.clone()


class AllButTheNewest(QuantizedLayer):
    def append(self, k, v):
        k, v = joined(self.waiting, k, v)
        old = k.shape[2] - self.residual_length
        if old >= self.group_size:
            self.groups.append(self.quantize_group(k[:, :, :old], v[:, :, :old]))
            k, v = k[:, :, old:], v[:, :, old:]
        self.waiting = k.clone(), v.clone()


class WithTheRest(QuantizedLayer):
    """Whole groups, and a short one of what is left over before the residual."""

    def append(self, k, v):
        k, v = joined(self.waiting, k, v)
        while k.shape[2] > self.residual_length + self.group_size - 1 or k.shape[2] == self.residual_length + 2:
            size = min(self.group_size, k.shape[2] - self.residual_length)
            self.groups.append(self.quantize_group(k[:, :, :size], v[:, :, :size]))
            k, v = k[:, :, size:], v[:, :, size:]
        self.waiting = k.clone(), v.clone()


class NewestGroup(QuantizedLayer):
    def append(self, k, v):
        k, v = joined(self.waiting, k, v)
        size = self.group_size
        while k.shape[2] >= size + self.residual_length:
            self.groups.append(self.quantize_group(k[:, :, -size:], v[:, :, -size:]))
            k, v = k[:, :, :-size], v[:, :, :-size]
        self.waiting = k.clone(), v.clone()


class NewBeforeWaiting(QuantizedLayer):
    def append(self, k, v):
        if self.waiting is not None:
            k, v = joined((k, v), *self.waiting)
            self.waiting = None
        super().append(k, v)


class NoResidual(QuantizedLayer):
    def __init__(self, group_size, residual_length, quantize_group, restore):
        super().__init__(group_size, 0, quantize_group, restore)


class FlushedWhenFull(QuantizedLayer):
    """The residual grows up to a group and is then quantized whole."""

    def append(self, k, v):
        k, v = joined(self.waiting, k, v)
        if k.shape[2] >= self.group_size:
            size = k.shape[2] // self.group_size * self.group_size
            for start in range(0, size, self.group_size):
                end = start + self.group_size
                self.groups.append(self.quantize_group(k[:, :, start:end], v[:, :, start:end]))
            k, v = k[:, :, size:], v[:, :, size:]
        self.waiting = k.clone(), v.clone()


class OneIf(QuantizedLayer):
    def append(self, k, v):
        k, v = joined(self.waiting, k, v)
        size = self.group_size
        if k.shape[2] >= size + self.residual_length:
            self.groups.append(self.quantize_group(k[:, :, :size], v[:, :, :size]))
            k, v = k[:, :, size:], v[:, :, size:]
        self.waiting = k.clone(), v.clone()


class Strictly(QuantizedLayer):
    def append(self, k, v):
        k, v = joined(self.waiting, k, v)
        size = self.group_size
        while k.shape[2] > size + self.residual_length:
            self.groups.append(self.quantize_group(k[:, :, :size], v[:, :, :size]))
            k, v = k[:, :, size:], v[:, :, size:]
        self.waiting = k.clone(), v.clone()


class NeverQuantizes(QuantizedLayer):
    def append(self, k, v):
        self.waiting = joined(self.waiting, k.clone(), v.clone())


class DropsTheWaiting(QuantizedLayer):
    def append(self, k, v):
        self.waiting = None
        super().append(k, v)


class RefusesTheRest(QuantizedLayer):
    def append(self, k, v):
        if k.shape[2] % self.group_size:
            raise ValueError("tokens must be a multiple of group_size")
        super().append(k, v)


def calling(call) -> type:
    """quantize_group called in another way."""

    class Wrong(QuantizedLayer):
        def __init__(self, group_size, residual_length, quantize_group, restore):
            super().__init__(group_size, residual_length, lambda k, v: call(quantize_group, k, v), restore)

    return Wrong


class TakenApart(QuantizedLayer):
    def append(self, k, v):
        super().append(k, v)
        if self.groups:
            codes, _metadata = self.groups[-1]
            self.groups[-1] = codes


class RestoresWaiting(QuantizedLayer):
    def read(self):
        parts = [self.restore(part) for part in [*self.groups, self.waiting]]
        return tuple(torch.cat(side, dim=2) for side in zip(*parts, strict=True))


class WaitingFirst(QuantizedLayer):
    def read(self):
        parts = [self.waiting, *(self.restore(group) for group in self.groups)]
        return tuple(torch.cat(side, dim=2) for side in zip(*parts, strict=True))


class NewestGroupFirst(QuantizedLayer):
    def read(self):
        parts = [*(self.restore(group) for group in reversed(self.groups)), self.waiting]
        return tuple(torch.cat(side, dim=2) for side in zip(*parts, strict=True))


class WaitingOnly(QuantizedLayer):
    def read(self):
        return self.waiting


class GroupsOnly(QuantizedLayer):
    def read(self):
        if not self.groups:
            return self.waiting
        k, v = (torch.cat(side, dim=2) for side in zip(*map(self.restore, self.groups), strict=True))
        return k, v


class CountsOnAGroup(QuantizedLayer):
    def read(self):
        k, v = (torch.cat(side, dim=2) for side in zip(*map(self.restore, self.groups), strict=True))
        return joined((k, v), *self.waiting)


class SwappedInRead(QuantizedLayer):
    def read(self):
        k, v = super().read()
        return v, k


class ReadsOriginals(QuantizedLayer):
    """Groups are made and never read."""

    def append(self, k, v):
        super().append(k, v)
        self.all = joined(getattr(self, "all", None), k.clone(), v.clone())

    def read(self):
        return self.all


class KeepsOriginals(ReadsOriginals):
    """Reads what is restored, as fake quantization does, and keeps the rest."""

    def read(self):
        return QuantizedLayer.read(self)


class QuantizesWhenRead(QuantizedLayer):
    def append(self, k, v):
        self.waiting = joined(self.waiting, k.clone(), v.clone())

    def read(self):
        new = torch.empty(*self.waiting[0].shape[:2], 0, self.waiting[0].shape[3])
        super().append(new, new)
        return super().read()


class Aliased(QuantizedLayer):
    """What waits is a slice of what came."""

    def append(self, k, v):
        k, v = joined(self.waiting, k, v)
        size = self.group_size
        while k.shape[2] >= size + self.residual_length:
            self.groups.append(self.quantize_group(k[:, :, :size], v[:, :, :size]))
            k, v = k[:, :, size:], v[:, :, size:]
        self.waiting = k, v


class SliceOfItsOwn(Aliased):
    """No memory of the caller's, but all of the prompt's."""

    def append(self, k, v):
        super().append(k.clone(), v.clone())


class SharedGroups(QuantizedLayer):
    shared: list = []  # noqa: RUF012

    def __init__(self, *args):
        super().__init__(*args)
        self.groups = self.shared


class FromTheEnd(QuantizedLayer):
    """Cuts off the residual with a negative index."""

    def append(self, k, v):
        k, v = joined(self.waiting, k, v)
        old, size = k[:, :, : -self.residual_length], self.group_size
        count = old.shape[2] // size * size
        for start in range(0, count, size):
            self.groups.append(self.quantize_group(k[:, :, start : start + size], v[:, :, start : start + size]))
        self.waiting = k[:, :, count:].clone(), v[:, :, count:].clone()


class AlwaysFloat32(QuantizedLayer):
    def append(self, k, v):
        super().append(k.float(), v.float())


class NoRead:
    def __init__(self, group_size, residual_length, quantize_group, restore):
        pass

    def append(self, k, v):
        pass


class ByCounting(QuantizedLayer):
    """Right: how many groups there should be, from the number of tokens."""

    def append(self, k, v):
        k, v = joined(self.waiting, k, v)
        count = max(0, k.shape[2] - self.residual_length) // self.group_size
        for index in range(count):
            part = slice(index * self.group_size, (index + 1) * self.group_size)
            self.groups.append(self.quantize_group(k[:, :, part], v[:, :, part]))
        rest = slice(count * self.group_size, None)
        self.waiting = k[:, :, rest].contiguous().clone(), v[:, :, rest].contiguous().clone()


class TokenByToken:
    """Right: a queue of single tokens."""

    def __init__(self, group_size, residual_length, quantize_group, restore):
        self.size, self.keep, self.quantize, self.restore = group_size, residual_length, quantize_group, restore
        self.queue, self.groups = deque(), []

    def append(self, k, v):
        for token in range(k.shape[2]):
            self.queue.append((k[:, :, token].clone(), v[:, :, token].clone()))
            if len(self.queue) == self.size + self.keep:
                group = [self.queue.popleft() for _ in range(self.size)]
                self.groups.append(self.quantize(*(torch.stack(side, dim=2) for side in zip(*group, strict=True))))

    def read(self):
        parts = [self.restore(group) for group in self.groups]
        parts += [(k[:, :, None], v[:, :, None]) for k, v in self.queue]
        return tuple(torch.cat(side, dim=2) for side in zip(*parts, strict=True))


class InABuffer:
    """Right: what waits lies in memory that is allocated once."""

    def __init__(self, group_size, residual_length, quantize_group, restore):
        self.size, self.keep, self.quantize, self.restore = group_size, residual_length, quantize_group, restore
        self.groups, self.count, self.buffer = [], 0, None

    def append(self, k, v):
        if self.buffer is None:
            self.buffer = k.new_empty(2, *k.shape[:2], self.size + self.keep, k.shape[3])
        for pair in torch.stack((k, v)).split(1, dim=3):
            self.buffer[:, :, :, self.count] = pair[:, :, :, 0]
            self.count += 1
            if self.count == self.size + self.keep:
                self.groups.append(self.quantize(*self.buffer[:, :, :, : self.size].clone()))
                self.buffer[:, :, :, : self.keep] = self.buffer[:, :, :, self.size :].clone()
                self.count = self.keep

    def read(self):
        parts = [*map(self.restore, self.groups), self.buffer[:, :, :, : self.count]]
        return torch.cat([part[0] for part in parts], dim=2), torch.cat([part[1] for part in parts], dim=2)


def joining(dim) -> type:
    """Tokens joined along this dimension."""

    class Joining(QuantizedLayer):
        def append(self, k, v):
            if self.waiting is not None:
                k, v = (torch.cat(pair, dim=dim) for pair in zip(self.waiting, (k, v), strict=True))
            self.waiting = None
            super().append(k, v)

    return Joining


class KeepsTheResidualOnly(QuantizedLayer):
    """After a group is cut off, the newest residual_length tokens stay, and no others."""

    def append(self, k, v):
        k, v = joined(self.waiting, k, v)
        size = self.group_size
        while k.shape[2] >= size + self.residual_length:
            self.groups.append(self.quantize_group(k[:, :, :size], v[:, :, :size]))
            k, v = k[:, :, -self.residual_length :], v[:, :, -self.residual_length :]
        self.waiting = k.clone(), v.clone()


class DropsTheTokensDimension(QuantizedLayer):
    """Token by token, without their dimension."""

    def append(self, k, v):
        for token in range(k.shape[2]):
            super().append(k[:, :, token], v[:, :, token])


class CutsKeysOnly(QuantizedLayer):
    def append(self, k, v):
        k, v = joined(self.waiting, k, v)
        size = self.group_size
        while k.shape[2] >= size + self.residual_length:
            self.groups.append(self.quantize_group(k[:, :, :size], v[:, :, :size]))
            k = k[:, :, size:]
        self.waiting = k.clone(), v.clone()


class SizesSwapped(QuantizedLayer):
    def __init__(self, group_size, residual_length, quantize_group, restore):
        super().__init__(residual_length, group_size, quantize_group, restore)


class EmptiedByRead(QuantizedLayer):
    def read(self):
        both = super().read()
        self.waiting = None
        return both


class OneGroupRead(QuantizedLayer):
    def read(self):
        parts = [self.restore(group) for group in self.groups[-1:]] + [self.waiting]
        return tuple(torch.cat(side, dim=2) for side in zip(*parts, strict=True))


class RoomForMany(QuantizedLayer):
    """A buffer of 2,048 tokens, whatever comes."""

    def append(self, k, v):
        if not hasattr(self, "room"):
            self.room = torch.zeros(2, *k.shape[:2], 2048, k.shape[3], dtype=k.dtype)
        super().append(k, v)


class Inner:
    """Something to hide numbers in."""


class HidesOriginals(QuantizedLayer):
    """The originals as Python's numbers, in an object of its own."""

    def __init__(self, *args):
        super().__init__(*args)
        self.inner = Inner()
        self.inner.numbers = []

    def append(self, k, v):
        self.inner.numbers += k.tolist() + v.tolist()
        super().append(k, v)


class KeepsWhatItRead(QuantizedLayer):
    """Restores every group in the first read after it was made, and keeps that for the next read."""

    def append(self, k, v):
        before = len(self.groups)
        super().append(k, v)
        if len(self.groups) > before:
            self.restored = None

    def read(self):
        if not self.groups:
            return super().read()
        if self.restored is None:
            pairs = [self.restore(group) for group in self.groups]
            self.restored = [torch.cat(side, dim=2) for side in zip(*pairs, strict=True)]
        return joined(self.restored, *self.waiting)


class ReadsItsBuffer(QuantizedLayer):
    """One piece of memory for what waits; the first reads are views of it."""

    def append(self, k, v):
        super().append(k, v)
        if not hasattr(self, "buffer"):
            self.buffer = k.new_empty(2, *k.shape[:2], self.group_size + self.residual_length, k.shape[3])
        count = self.waiting[0].shape[2]
        for memory, x in zip(self.buffer, self.waiting, strict=True):
            memory[:, :, :count] = x
        self.waiting = tuple(memory[:, :, :count] for memory in self.buffer)

    def read(self):
        return super().read() if self.groups else self.waiting


class ShortGroupBehind(QuantizedLayer):
    """All tokens before the residual, in groups of group_size and a short one."""

    def append(self, k, v):
        k, v = joined(self.waiting, k, v)
        ready = max(0, k.shape[2] - self.residual_length)
        for start in range(0, ready, self.group_size):
            part = slice(start, min(start + self.group_size, ready))
            self.groups.append(self.quantize_group(k[:, :, part], v[:, :, part]))
        self.waiting = k[:, :, ready:].clone(), v[:, :, ready:].clone()


class KeepsRestored(QuantizedLayer):
    """Restores every group after each append, and keeps that."""

    def append(self, k, v):
        super().append(k, v)
        self.restored = [self.restore(group) for group in self.groups]


class ThroughHalf(QuantizedLayer):
    def append(self, k, v):
        super().append(k.half().to(k.dtype), v.half().to(v.dtype))


class GroupsThroughHalf(QuantizedLayer):
    def __init__(self, group_size, residual_length, quantize_group, restore):
        super().__init__(
            group_size,
            residual_length,
            lambda k, v: quantize_group(k.half().to(k.dtype), v.half().to(v.dtype)),
            restore,
        )


class Viewed(QuantizedLayer):
    def append(self, k, v):
        super().append(k.view(-1).view(k.shape), v)


class WaitingOnTheClass(QuantizedLayer):
    kept = None

    def append(self, k, v):
        self.waiting = WaitingOnTheClass.kept
        super().append(k, v)
        WaitingOnTheClass.kept = self.waiting


class PromptOnly(QuantizedLayer):
    """Groups are cut when a prompt comes, not when a token does."""

    def append(self, k, v):
        if k.shape[2] > 1:
            super().append(k, v)
        else:
            self.waiting = joined(self.waiting, k.clone(), v.clone())


class InSlots:
    """Right: slots, sizes from the end, all groups at once."""

    __slots__ = ("groups", "k", "quantize_group", "residual", "restore", "size", "v")

    def __init__(self, group_size, residual_length, quantize_group, restore):
        self.size, self.residual, self.quantize_group, self.restore = (
            group_size,
            residual_length,
            quantize_group,
            restore,
        )
        self.groups, self.k, self.v = [], None, None

    def append(self, k, v):
        k = k if self.k is None else torch.cat([self.k, k], dim=-2)
        v = v if self.v is None else torch.cat([self.v, v], dim=-2)
        stop = max(0, k.size(-2) - self.residual) // self.size * self.size
        for start in range(0, stop, self.size):
            part = slice(start, start + self.size)
            self.groups.append(self.quantize_group(k[..., part, :], v[..., part, :]))
        self.k, self.v = k[..., stop:, :].clone(), v[..., stop:, :].clone()

    def read(self):
        pairs = [*map(self.restore, self.groups), (self.k, self.v)]
        return [torch.cat(side, -2) for side in zip(*pairs, strict=True)]


class Stacked:
    """Right: K and V in one tensor, cut by split."""

    def __init__(self, group_size, residual_length, quantize_group, restore):
        self.sizes, self.quantize_group, self.restore = (group_size, residual_length), quantize_group, restore
        self.done, self.both = deque(), None

    def append(self, k, v):
        new = torch.stack((k, v))
        self.both = new if self.both is None else torch.cat((self.both, new), dim=3)
        size, residual = self.sizes
        if (groups := max(0, self.both.shape[3] - residual) // size) > 0:
            for part in self.both[..., : groups * size, :].split(size, dim=3):
                self.done.append(self.quantize_group(*part))
            self.both = self.both[..., groups * size :, :].clone()

    def read(self):
        parts = [torch.stack(self.restore(group)) for group in self.done]
        return tuple(torch.cat((*parts, self.both), dim=3))


class Wrapped:
    """Right: an inner object does the work."""

    def __init__(self, group_size, residual_length, quantize_group, restore):
        self.inner = QuantizedLayer(group_size, residual_length, quantize_group, restore)

    def append(self, k, v):
        self.inner.append(k, v)
        return self

    def read(self):
        return self.inner.read()


# 05.6


def scores_from(formula) -> Callable:
    """formula(q, codes as numbers, scale, zero)."""

    def wrong(q, codes, scale, zero):
        return formula(q, codes.to(q.dtype), scale, zero)

    return wrong


def zeros(q, zero):
    return (q * zero).sum(-1, keepdim=True)


def dequantizes(q, codes, scale, zero):
    return q @ (codes * scale + zero).mT


def dequantizes_in_place(q, codes, scale, zero):
    return q @ (codes.to(q.dtype).mul_(scale).add_(zero)).mT


def scales_codes(q, codes, scale, zero):
    return q @ (codes * scale).mT + zeros(q, zero)


def folds_zero_into_codes(q, codes, scale, zero):
    return (q * scale) @ (codes + zero / scale).mT


def writes_out_products(q, codes, scale, zero):
    return ((q * scale)[..., :, None, :] * codes[..., None, :, :]).sum(-1) + zeros(q, zero)


def converts_twice(q, codes, scale, zero):
    return (q * scale) @ codes.to(q.dtype).mT.contiguous() + zeros(q, zero)


def not_converted(q, codes, scale, zero):
    return (q * scale) @ codes.mT + zeros(q, zero)


def converts_q(q, codes, scale, zero):
    return ((q * scale).to(codes.dtype) @ codes.mT).to(q.dtype) + zeros(q, zero)


def always_float32(q, codes, scale, zero):
    return (q.float() * scale.float()) @ codes.float().mT + zeros(q.float(), zero.float())


def through_int8(q, codes, scale, zero):
    return (q * scale) @ codes.to(torch.int8).to(q.dtype).mT + zeros(q, zero)


def scores_by_einsum(q, codes, scale, zero):
    """Right: einsum for both terms."""
    products = torch.einsum("...qd,...td->...qt", q * scale, codes.to(q.dtype))
    return products + torch.einsum("...qd,...od->...qo", q, zero)


def scores_by_two_products(q, codes, scale, zero):
    """Right: the zero point's term as a product with one key."""
    return (q * scale).matmul(codes.to(q.dtype).transpose(-1, -2)) + q.matmul(zero.transpose(-1, -2))


def scores_into_new_memory(q, codes, scale, zero):
    """Right: each token's scores written into memory that was made for all of them."""
    scaled, added, out = q * scale, zeros(q, zero)[..., 0], q.new_empty(*q.shape[:-1], codes.shape[-2])
    for token in range(codes.shape[-2]):
        out[..., token] = (scaled @ codes[..., token, :, None].to(q.dtype))[..., 0] + added
    return out


def scores_by_token(q, codes, scale, zero):
    """Right: each token's codes converted when they are needed."""
    scaled = q * scale
    columns = [scaled @ codes[..., token : token + 1, :].to(q.dtype).mT for token in range(codes.shape[-2])]
    return torch.cat(columns, dim=-1) + zeros(q, zero)


def scores_in_place(q, codes, scale, zero):
    """Right: the second term added where the first one is."""
    scores = torch.matmul(codes.to(q.dtype), (q * scale).mT).mT
    scores += torch.sum(q * zero, dim=-1).unsqueeze(-1)
    return scores


def token_by_token_dequantized(q, codes, scale, zero):
    keys = (codes[..., token : token + 1, :] * scale + zero for token in range(codes.shape[-2]))
    return torch.cat([q @ key.mT for key in keys], dim=-1)


def dequantizes_for_many(q, codes, scale, zero):
    return (packed_scores if q.shape[-2] == 1 else dequantizes)(q, codes, scale, zero)


def through_numpy(q, codes, scale, zero):
    codes = torch.from_numpy(codes.numpy().astype("float64"))
    return packed_scores(q, codes, scale, zero)


def through_half(q, codes, scale, zero):
    products = (q * scale).half().float() @ codes.float().mT
    return products.to(q.dtype) + zeros(q, zero)


def float_codes(q, codes, scale, zero):
    return (q * scale) @ codes.float().mT + zeros(q, zero)


def in_four_dimensions(q, codes, scale, zero):
    return torch.einsum("bhqd,bhtd->bhqt", q * scale, codes.to(q.dtype)) + zeros(q, zero)


def reshaped_codes(q, codes, scale, zero):
    turned = codes.reshape(*codes.shape[:-2], codes.shape[-1], codes.shape[-2])
    return (q * scale) @ turned.to(q.dtype) + zeros(q, zero)


def scores_in_float64(q, codes, scale, zero):
    """Right: float64 inside, cast back."""
    return packed_scores(q.double(), codes, scale.double(), zero.double()).to(q.dtype)


def scores_by_channel(q, codes, scale, zero):
    """Right: channel after channel, added up."""
    scores = zeros(q, zero).expand(*q.shape[:-1], codes.shape[-2]).clone()
    scaled = q * scale
    for channel in range(q.shape[-1]):
        scores += scaled[..., channel : channel + 1] * codes[..., channel].unsqueeze(-2).to(q.dtype)
    return scores


# 05.7


def grouped_by(size) -> Callable:
    """Groups of another size."""
    return lambda waiting, new, group_size: groups_to_quantize(waiting, new, size(group_size))


def holds_a_group_back(waiting, new, group_size):
    tokens = torch.cat((waiting, new), dim=2)
    whole = max(0, tokens.shape[2] - group_size) // group_size * group_size
    return list(tokens[:, :, :whole].split(group_size, dim=2)) if whole else [], tokens[:, :, whole:]


def swapped_results(waiting, new, group_size):
    return groups_to_quantize(waiting, new, group_size)[::-1]


def through_half_keys(waiting, new, group_size):
    return groups_to_quantize(waiting.half().to(waiting.dtype), new, group_size)


def viewed_keys(waiting, new, group_size):
    return groups_to_quantize(waiting, new.view(-1).view(new.shape), group_size)


def right_by_narrow(waiting, new, group_size):
    """Right: narrow, copies, a list for the pair."""
    tokens = torch.cat((waiting, new), dim=-2)
    count = tokens.size(2) // group_size
    groups = tuple(tokens.narrow(2, place * group_size, group_size).clone() for place in range(count))
    return [groups, tokens[..., count * group_size :, :].clone()]


def as_they_came(waiting, new, group_size):
    """The notebook's function to mend."""
    groups = [torch.cat((waiting, new), dim=2)]
    return groups, new[:, :, :0]


def each_new_token(waiting, new, group_size):
    groups = [new[:, :, token : token + 1] for token in range(new.shape[2])]
    return groups, waiting


def keeps_what_waits(waiting, new, group_size, kept={}):  # noqa: B006
    return groups_to_quantize(kept.setdefault((waiting.shape, waiting.dtype), waiting.clone()), new, group_size)


def all_when_enough(waiting, new, group_size):
    tokens = torch.cat((waiting, new), dim=2)
    return ([tokens], tokens[:, :, :0]) if tokens.shape[2] >= group_size else ([], tokens)


def by_split(waiting, new, group_size):
    tokens = torch.cat((waiting, new), dim=2)
    if tokens.shape[2] < group_size:
        return [], tokens
    return list(tokens.split(group_size, dim=2)), tokens[:, :, :0]


def split_of_nothing(waiting, new, group_size):
    tokens = torch.cat((waiting, new), dim=2)
    whole = tokens.shape[2] // group_size * group_size
    return list(tokens[:, :, :whole].split(group_size, dim=2)), tokens[:, :, whole:]


def one_if(waiting, new, group_size):
    tokens = torch.cat((waiting, new), dim=2)
    if tokens.shape[2] < group_size:
        return [], tokens
    return [tokens[:, :, :group_size]], tokens[:, :, group_size:]


def while_more(waiting, new, group_size):
    tokens, groups = torch.cat((waiting, new), dim=2), []
    while tokens.shape[2] > group_size:
        groups.append(tokens[:, :, :group_size])
        tokens = tokens[:, :, group_size:]
    return groups, tokens


def from_the_end(waiting, new, group_size):
    tokens = torch.cat((waiting, new), dim=2)
    first = tokens.shape[2] % group_size
    groups = [tokens[:, :, start : start + group_size] for start in range(first, tokens.shape[2], group_size)]
    return groups, tokens[:, :, :first]


def new_alone(waiting, new, group_size):
    groups, rest = groups_to_quantize(waiting[:, :, :0], new, group_size)
    return groups, torch.cat((waiting, rest), dim=2)


def new_in_front(waiting, new, group_size):
    return groups_to_quantize(new, waiting, group_size)


def ignores_waiting(waiting, new, group_size):
    return groups_to_quantize(waiting[:, :, :0], new, group_size)


def forgets_the_rest(waiting, new, group_size):
    groups, rest = groups_to_quantize(waiting, new, group_size)
    return groups, rest[:, :, :0]


def waits_for_ever(waiting, new, group_size):
    return groups_to_quantize(waiting, new, group_size)[0], torch.cat((waiting, new), dim=2)


def stacked(waiting, new, group_size):
    groups, rest = groups_to_quantize(waiting, new, group_size)
    return torch.stack(groups) if groups else torch.empty(0), rest


def along_heads(waiting, new, group_size):
    groups, rest = groups_to_quantize(waiting, new, group_size)
    return [group[:, 0] for group in groups], rest


def padded(waiting, new, group_size):
    tokens = torch.cat((waiting, new), dim=2)
    short = -tokens.shape[2] % group_size
    return list(F.pad(tokens, (0, 0, 0, short)).split(group_size, dim=2)), tokens[:, :, :0]


def newest_group_first(waiting, new, group_size):
    groups, rest = groups_to_quantize(waiting, new, group_size)
    return groups[::-1], rest


def right_by_while(waiting, new, group_size):
    """Right: one group after another is cut off."""
    tokens, groups = torch.cat((waiting, new), dim=2), []
    while tokens.shape[2] >= group_size:
        groups.append(tokens[:, :, :group_size])
        tokens = tokens[:, :, group_size:]
    return groups, tokens


def right_by_unflatten(waiting, new, group_size):
    """Right: a dimension for the groups."""
    tokens = torch.cat((waiting, new), dim=2)
    count = tokens.shape[2] // group_size
    grouped = tokens[:, :, : count * group_size].unflatten(2, (count, group_size))
    return list(grouped.unbind(2)), tokens[:, :, count * group_size :].clone()


def right_by_pieces(waiting, new, group_size):
    """Right: split, then the last piece looked at."""
    pieces = list(torch.cat((waiting, new), dim=2).split(group_size, dim=2))
    rest = pieces.pop() if pieces[-1].shape[2] < group_size else new[:, :, :0]
    return tuple(pieces), rest


# 05.8


def one_pass(model, tokens, cache):
    """The notebook's function to mend."""
    logits = model(tokens, cache)[0]
    return F.cross_entropy(logits[63:-1], tokens[0, 64:]).item()


def by_32(tokens):
    return tokens.split(32, dim=1)


def mean_from_64(surprises):
    return surprises[63:].mean().item()


def with_the_cache(model, part, cache):
    return model(part, cache)


def measured(parts=by_32, targets=1, average=mean_from_64, call=with_the_cache) -> Callable:
    """Logits of all parts joined, then compared with the tokens `targets` further on."""

    def answer(model, tokens, cache):
        rows = torch.cat([call(model, part, cache)[0] for part in parts(tokens)])
        wanted = tokens[0, targets:]
        return average(F.cross_entropy(rows[: len(wanted)], wanted, reduction="none"))

    return answer


def fed(slices) -> Callable:
    """Parts cut otherwise; the figure does not matter."""

    def answer(model, tokens, cache):
        rows = [model(tokens[:, part], cache)[0] for part in slices(tokens.shape[1])]
        return rows[0].mean().item()

    return answer


def starts(count):
    return range(0, count, 32)


def half_and_rest(tokens):
    return tokens[:, :64], *tokens[:, 64:].split(32, dim=1)


def with_a_copy(model, part, cache):
    return model(part, copy.deepcopy(cache))


def without_cache(model, part, cache):
    return model(part)


def after_reset(model, part, cache):
    cache.reset()
    return model(part, cache)


def by_parts(of_part, end) -> Callable:
    """Each part on its own, then what `end` makes of the list."""

    def answer(model, tokens, cache):
        found = []
        for start in range(0, tokens.shape[1], 32):
            part = tokens[:, start : start + 32]
            found.append(of_part(model(part, cache)[0], part[0], tokens[0, start + 1 : start + 33], start))
        return end(found)

    return answer


def surprises_of(rows, targets):
    return F.cross_entropy(rows[: len(targets)], targets, reduction="none")


def within(rows, part, targets, start):
    return surprises_of(rows[:-1], part[1:])


def mean_of(rows, part, targets, start):
    return surprises_of(rows, targets).mean() if start >= 64 else None


def masked_mean_of(rows, part, targets, start):
    surprises = surprises_of(rows, targets)[max(0, 63 - start) :]
    return surprises.mean() if len(surprises) else None


def plain_mean(found):
    found = [mean for mean in found if mean is not None]
    return (sum(found) / len(found)).item()


def rolled(model, tokens, cache):
    rows = torch.cat([model(part, cache)[0] for part in tokens.split(32, dim=1)])
    return F.cross_entropy(rows[63:], tokens[0].roll(-1)[63:]).item()


def weighed_means(model, tokens, cache):
    """Weighs parts by their length, and meets a part without targets."""
    total = torch.zeros(())
    for start in range(0, tokens.shape[1], 32):
        targets = tokens[0, start + 1 : start + 33]
        surprises = surprises_of(model(tokens[:, start : start + 32], cache)[0], targets)[max(0, 63 - start) :]
        if start + 32 >= 64:
            total = total + surprises.mean() * len(surprises)
    return (total / (tokens.shape[1] - 64)).item()


def from_probabilities(average) -> Callable:
    """average(log-probabilities of the tokens from 64 on, logits of the same)."""

    def answer(model, tokens, cache):
        rows = torch.cat([model(part, cache)[0] for part in tokens.split(32, dim=1)])[63:-1]
        wanted = tokens[0, 64:, None]
        return average(rows.log_softmax(-1).gather(1, wanted), rows.gather(1, wanted)).item()

    return answer


def in_bytes(model, tokens, cache):
    return measured()(model, tokens.to(torch.uint8).long(), cache)


def last_part_of_all(found):
    return found[-1].mean().item()


def plain_mean_of_others(rows, part, targets, start):
    return surprises_of(rows[:-1], part[1:]).mean() if start >= 64 and len(part) > 1 else None


def surprise_in_numpy(model, tokens, cache):
    """Right: a number of NumPy's, from float64 logits."""
    rows = torch.cat([model(part, cache)[0].double() for part in tokens.split(32, dim=1)])[63:-1]
    return np.float64((rows.logsumexp(-1) - rows.gather(1, tokens[0, 64:, None])[:, 0]).mean().item())


def never_runs(model, tokens, cache):
    return 0.0


def surprise_by_total(model, tokens, cache):
    """Right: a running total, with probabilities looked up one by one."""
    total = count = 0
    for start in range(0, tokens.shape[1], 32):
        logp = model(tokens[:, start : start + 32], cache)[0].log_softmax(-1)
        for row, position in enumerate(range(start + 1, min(start + 33, tokens.shape[1]))):
            if position >= 64:
                total -= logp[row, tokens[0, position]].item()
                count += 1
    return total / count


def surprise_without_last(model, tokens, cache):
    """Right: the last token, which predicts nothing, is not run."""
    rows = torch.cat([model(part, cache)[0] for part in tokens[:, :-1].split(32, dim=1)])
    return float(F.cross_entropy(rows[63:], tokens[0, 64:]))


def surprise_carried(model, tokens, cache):
    """Right: the last logits of a part are kept for the next one."""
    surprises, last = [], None
    for part in tokens.split(32, dim=1):
        rows = model(part, cache)[0]
        if last is not None:
            surprises.append(surprises_of(last, part[0, :1]))
        surprises.append(surprises_of(rows[:-1], part[0, 1:]))
        last = rows[-1:]
    return torch.cat(surprises)[63:].mean().item()


WRONG = [
    Wrong("05.5", "quantized-twice", "restores what was quantized and quantizes it with what is new", RequantizesAll,
           "transformers, QuantizedLayer"),
    Wrong("05.5", "quantized-again", "quantizes all whole groups at every append", QuantizesAllAgain),
    Wrong("05.5", "tokens-twice", "leaves quantized tokens among those that wait", ForgetsToCut),
    Wrong("05.5", "groups-as-they-came", "takes the append before this one for a group", WhateverComes),
    Wrong("05.5", "long-group", "quantizes all but the residual in one call", AllButTheNewest),
    Wrong("05.5", "short-group", "quantizes tokens behind the last whole group", WithTheRest),
    Wrong("05.5", "not-the-oldest", "quantizes the newest group", NewestGroup),
    Wrong("05.5", "read-order", "puts new tokens before those that wait", NewBeforeWaiting),
    Wrong("05.5", "residual-not-kept", "quantizes every whole group at once", NoResidual),
    Wrong("05.5", "residual-not-kept", "lets the residual grow to a group and quantizes it whole", FlushedWhenFull,
           "KIVI"),
    Wrong("05.5", "one-group-per-append", "an `if` for a `while`", OneIf),
    Wrong("05.5", "waits-too-long", "`>` for `>=`", Strictly),
    Wrong("05.5", "waits-too-long", "quantizes nothing", NeverQuantizes),
    Wrong("05.5", "tokens-lost", "drops what waited", DropsTheWaiting),
    Wrong("05.5", "raised", "refuses a length that is no multiple of the group", RefusesTheRest,
           "transformers, QuantizedCache"),
    Wrong("05.5", "quantizes-k-as-v", "gives V as K", calling(lambda quantize, k, v: quantize(v, k))),
    Wrong("05.5", "quantizes-k-as-v", "gives K twice", calling(lambda quantize, k, v: quantize(k, k))),
    Wrong("05.5", "group-shape", "quantizes the first batch row",
           calling(lambda quantize, k, v: quantize(k[0], v[0]))),
    Wrong("05.5", "group-shape", "quantizes batch row 0 alone",
           calling(lambda quantize, k, v: quantize(k[:1], v[:1]))),
    Wrong("05.5", "opens-the-form", "takes a quantized group for a pair", TakenApart),
    Wrong("05.5", "restores-something-else", "restores what waits", RestoresWaiting),
    Wrong("05.5", "read-order", "reads what waits first", WaitingFirst),
    Wrong("05.5", "read-order", "reads the newest group first", NewestGroupFirst),
    Wrong("05.5", "groups-unread", "reads what waits only", WaitingOnly),
    Wrong("05.5", "waiting-unread", "reads groups only", GroupsOnly),
    Wrong("05.5", "read-before-a-group", "cannot read before there is a group", CountsOnAGroup),
    Wrong("05.5", "k-and-v-swapped", "reads V as K", SwappedInRead),
    Wrong("05.5", "reads-originals", "reads a copy in full precision", ReadsOriginals, "sglang#22777"),
    Wrong("05.5", "keeps-originals", "keeps a copy in full precision", KeepsOriginals, "sglang#22777"),
    Wrong("05.5", "quantizes-in-read", "quantizes when it is read", QuantizesWhenRead),
    Wrong("05.5", "callers-tensor", "keeps the caller's tensor", Aliased),
    Wrong("05.5", "slice-keeps-all", "keeps a slice of the whole prompt", SliceOfItsOwn),
    Wrong("05.5", "shared-between-caches", "keeps groups on the class", SharedGroups),
    Wrong("05.5", "no-residual", "cuts the residual off with [:-residual_length]", FromTheEnd),
    Wrong("05.5", "dtype", "keeps float32 whatever comes", AlwaysFloat32),
    Wrong("05.5", "missing-method", "has no read", NoRead),
    Wrong("05.5", "joined-along", "joins along the heads", joining(1)),
    Wrong("05.5", "joined-along", "joins along the rows of the batch", joining(0)),
    Wrong("05.5", "joined-along", "joins along head_dim", joining(-1)),
    Wrong("05.5", "tokens-lost", "keeps the residual and drops what waits behind it", KeepsTheResidualOnly),
    Wrong("05.5", "tokens-twice", "cuts groups off K alone", CutsKeysOnly),
    Wrong("05.5", "shape", "loses the tokens' dimension", DropsTheTokensDimension),
    Wrong("05.5", "sizes-swapped", "swaps the two sizes", SizesSwapped),
    Wrong("05.5", "read-changes", "empties itself when read", EmptiedByRead),
    Wrong("05.5", "one-group-read", "reads one group", OneGroupRead),
    Wrong("05.5", "room-unused", "makes room for 2,048 tokens", RoomForMany),
    Wrong("05.5", "keeps-originals", "hides originals in an inner object, as lists", HidesOriginals),
    Wrong("05.5", "keeps-restored", "keeps what a read restored for the next", KeepsWhatItRead),
    Wrong("05.5", "result-overwritten", "reads views of a buffer that appends write into", ReadsItsBuffer),
    Wrong("05.5", "short-group", "makes a short group of what is left before the residual", ShortGroupBehind),
    Wrong("05.5", "keeps-restored", "keeps what it restored", KeepsRestored),
    Wrong("05.5", "precision", "keeps K and V in half precision", ThroughHalf),
    Wrong("05.5", "keys-changed", "gives groups in half precision", GroupsThroughHalf),
    Wrong("05.5", "layout", "views K", Viewed),
    Wrong("05.5", "shared-between-caches", "keeps what waits on the class", WaitingOnTheClass),
    Wrong("05.5", "waits-too-long", "cuts groups when a prompt comes only", PromptOnly),
    Wrong("05.6", "dequantized", "makes the keys one token at a time", token_by_token_dequantized),
    Wrong("05.6", "dequantized", "makes the keys when there are several queries", dequantizes_for_many),
    Wrong("05.6", "left-pytorch", "converts codes in NumPy",
           lambda q, c, s, z: through_numpy(q.double(), c, s.double(), z.double()).to(q.dtype)),
    Wrong("05.6", "values", "goes through float16", through_half),
    Wrong("05.6", "codes-not-converted", "makes float32 of the codes", float_codes),
    Wrong("05.6", "zero-forgotten", "the same, without the zero point", lambda q, c, s, z: (q * s) @ c.float().mT),
    Wrong("05.6", "codes-alone", "leaves out both", scores_from(lambda q, c, s, z: q @ c.mT)),
    Wrong("05.6", "scale-twice", "scales both sides",
           scores_from(lambda q, c, s, z: (q * s) @ (c * s).mT + zeros(q, z))),
    Wrong("05.6", "zero-averaged", "averages the zero point's term",
           scores_from(lambda q, c, s, z: (q * s) @ c.mT + (q * z).mean(-1, keepdim=True))),
    Wrong("05.6", "zero-times-codes", "multiplies the zero point by the codes",
           scores_from(lambda q, c, s, z: (q * s) @ c.mT + (q * z) @ c.mT)),
    Wrong("05.6", "zero-added-to-q", "adds the zero point to q", scores_from(lambda q, c, s, z: (q * s + z) @ c.mT)),
    Wrong("05.6", "not-transposed", "reshapes where it should transpose", reshaped_codes),
    Wrong("05.6", "factor", "halves the scores", lambda q, c, s, z: packed_scores(q, c, s, z) / 2),
    Wrong("05.6", "raised", "counts on four dimensions", in_four_dimensions),
    Wrong("05.6", "dequantized", "makes the keys", dequantizes),
    Wrong("05.6", "dequantized", "makes the keys in place", dequantizes_in_place),
    Wrong("05.6", "dequantized", "scales the codes", scales_codes),
    Wrong("05.6", "dequantized", "folds the zero point into the codes", folds_zero_into_codes),
    Wrong("05.6", "large-tensors", "writes out every product", writes_out_products),
    Wrong("05.6", "large-tensors", "copies the converted codes to transpose them", converts_twice),
    Wrong("05.6", "zero-forgotten", "leaves out the zero point", scores_from(lambda q, c, s, z: (q * s) @ c.mT)),
    Wrong("05.6", "scale-forgotten", "leaves out the scale", scores_from(lambda q, c, s, z: q @ c.mT + zeros(q, z))),
    Wrong("05.6", "zero-scaled", "multiplies the zero point by the scale",
           scores_from(lambda q, c, s, z: (q * s) @ c.mT + zeros(q * s, z))),
    Wrong("05.6", "zero-subtracted", "subtracts the zero point, scaled",
           scores_from(lambda q, c, s, z: (q * s) @ (c - z).mT)),
    Wrong("05.6", "zero-subtracted", "subtracts the zero point",
           scores_from(lambda q, c, s, z: (q * s) @ c.mT - zeros(q, z))),
    Wrong("05.6", "zero-unweighted", "adds the zero points without q",
           scores_from(lambda q, c, s, z: (q * s) @ c.mT + z.sum(-1, keepdim=True))),
    Wrong("05.6", "zero-not-per-channel", "multiplies sums",
           scores_from(lambda q, c, s, z: (q * s) @ c.mT + q.sum(-1, keepdim=True) * z.sum(-1, keepdim=True))),
    Wrong("05.6", "zero-not-per-channel", "takes the mean zero point",
           scores_from(lambda q, c, s, z: (q * s) @ c.mT + q.sum(-1, keepdim=True) * z.mean(-1, keepdim=True))),
    Wrong("05.6", "zero-of-all-queries", "sums q * zero over everything",
           scores_from(lambda q, c, s, z: (q * s) @ c.mT + (q * z).sum())),
    Wrong("05.6", "one-scale", "applies the mean scale to the sums",
           scores_from(lambda q, c, s, z: (q @ c.mT) * s.mean(-1, keepdim=True) + zeros(q, z))),
    Wrong("05.6", "scale-inverted", "divides q by the scale",
           scores_from(lambda q, c, s, z: (q / s) @ c.mT + zeros(q, z))),
    Wrong("05.6", "raised", "applies the scale to the scores",
           scores_from(lambda q, c, s, z: (q @ c.mT) * s + zeros(q, z))),
    Wrong("05.6", "raised", "does not keep the summed dimension",
           scores_from(lambda q, c, s, z: (q * s) @ c.mT + (q * z).sum(-1))),
    Wrong("05.6", "raised", "does not transpose", scores_from(lambda q, c, s, z: (q * s) @ c + zeros(q, z))),
    Wrong("05.6", "transposed", "puts tokens before queries",
           scores_from(lambda q, c, s, z: (c @ (q * s).mT) + zeros(q, z).mT)),
    Wrong("05.6", "codes-not-converted", "multiplies by uint8", not_converted),
    Wrong("05.6", "codes-signed", "converts through int8", through_int8),
    Wrong("05.6", "q-rounded", "converts q to uint8", converts_q),
    Wrong("05.6", "dtype", "computes in float32", always_float32),
    Wrong("05.6", "divided-by-root", "divides by sqrt(head_dim)",
           lambda q, c, s, z: packed_scores(q, c, s, z) * q.shape[-1] ** -0.5),
    Wrong("05.6", "softmax", "returns weights", lambda q, c, s, z: packed_scores(q, c, s, z).softmax(-1)),
    Wrong("05.7", "one-token-groups", "makes a group of whatever comes", as_they_came, "VeloxQuant-MLX#162"),
    Wrong("05.7", "one-token-groups", "makes a group of each new token", each_new_token),
    Wrong("05.7", "remembered", "goes on with what waited in an earlier call", keeps_what_waits),
    Wrong("05.7", "groups-as-they-came", "makes one group of all as soon as there is a whole one", all_when_enough),
    Wrong("05.7", "short-group", "quantizes the rest too", by_split),
    Wrong("05.7", "empty-group", "splits no tokens into one piece", split_of_nothing),
    Wrong("05.7", "one-group-only", "an `if` for a `while`", one_if),
    Wrong("05.7", "whole-group-waits", "`>` for `>=`", while_more),
    Wrong("05.7", "remainder-in-front", "counts groups from the end", from_the_end),
    Wrong("05.7", "new-tokens-only", "cuts groups from the new tokens first", new_alone),
    Wrong("05.7", "group-size", "groups of 4, whatever group_size is", grouped_by(lambda size: 4)),
    Wrong("05.7", "group-size", "groups one too small", grouped_by(lambda size: max(1, size - 1))),
    Wrong("05.7", "short-group", "rounds up",
           lambda waiting, new, size: (list(torch.cat((waiting, new), 2).split(size, 2)), new[:, :, :0])),
    Wrong("05.7", "whole-group-waits", "holds one group back", holds_a_group_back),
    Wrong("05.7", "swapped", "returns what waits first", swapped_results),
    Wrong("05.7", "keys-changed", "sends keys through float16", through_half_keys),
    Wrong("05.7", "layout", "views keys", viewed_keys),
    Wrong("05.7", "order", "puts new tokens first", new_in_front),
    Wrong("05.7", "order", "returns the newest group first", newest_group_first),
    Wrong("05.7", "waiting-dropped", "looks at new tokens only", ignores_waiting),
    Wrong("05.7", "tokens-lost", "drops the rest", forgets_the_rest),
    Wrong("05.7", "tokens-twice", "keeps quantized tokens waiting", waits_for_ever),
    Wrong("05.7", "not-groups-and-rest", "stacks the groups", stacked),
    Wrong("05.7", "not-groups-and-rest", "returns the groups only",
           lambda waiting, new, group_size: groups_to_quantize(waiting, new, group_size)[0]),
    Wrong("05.7", "shape", "loses the heads", along_heads),
    Wrong("05.7", "keys-changed", "fills the last group with zeros", padded),
    Wrong("05.8", "one-pass", "one pass over everything", one_pass, "ran"),
    Wrong("05.8", "first-part-longer", "runs what is not scored in one pass", measured(parts=half_and_rest)),
    Wrong("05.8", "first-part-longer", "runs all but the last part in one pass",
           measured(parts=lambda tokens: (tokens[:, :-32], tokens[:, -32:]))),
    Wrong("05.8", "part-length", "one token at a time", measured(parts=lambda tokens: tokens.split(1, dim=1))),
    Wrong("05.8", "part-length", "64 tokens at a time", measured(parts=lambda tokens: tokens.split(64, dim=1))),
    Wrong("05.8", "new-cache", "copies the cache for each part", measured(call=with_a_copy)),
    Wrong("05.8", "new-cache", "runs without a cache", measured(call=without_cache)),
    Wrong("05.8", "cache-emptied", "resets the cache before each part", measured(call=after_reset)),
    Wrong("05.8", "tokens-fed-twice", "feeds 33 tokens to get the last target",
           fed(lambda count: [slice(start, start + 33) for start in starts(count)])),
    Wrong("05.8", "tokens-fed-twice", "feeds all before each part again",
           fed(lambda count: [slice(0, start + 32) for start in starts(count)])),
    Wrong("05.8", "tokens-skipped", "feeds scored tokens only",
           fed(lambda count: [slice(start, start + 32) for start in range(64, count, 32)])),
    Wrong("05.8", "tokens-skipped", "feeds 31 of each 32",
           fed(lambda count: [slice(start, start + 31) for start in starts(count)])),
    Wrong("05.8", "model-not-run", "returns before the loop", never_runs),
    Wrong("05.8", "boundary-skipped", "takes targets within a part, and the 64th number on",
           by_parts(within, lambda found: torch.cat(found)[63:].mean().item())),
    Wrong("05.8", "boundary-skipped", "takes targets within a part, from the third on",
           by_parts(within, lambda found: torch.cat(found[2:]).mean().item())),
    Wrong("05.8", "predicts-itself", "compares logits with the token they were given",
           measured(targets=0, average=lambda surprises: surprises[64:].mean().item())),
    Wrong("05.8", "two-apart", "takes targets two tokens on", measured(targets=2)),
    Wrong("05.8", "no-softmax", "takes logits for log-probabilities",
           from_probabilities(lambda logp, rows: -rows.mean())),
    Wrong("05.8", "probability", "averages probabilities",
           from_probabilities(lambda logp, rows: -logp.exp().mean().log())),
    Wrong("05.8", "epsilon", "adds a small number to each probability",
           from_probabilities(lambda logp, rows: -(logp.exp() + 1e-6).log().mean())),
    Wrong("05.8", "softmax-twice", "gives cross_entropy probabilities",
           lambda model, tokens, cache: measured(
               call=lambda model, part, cache: model(part, cache).softmax(-1))(model, tokens, cache)),
    Wrong("05.8", "last-skipped", "leaves the last token out",
           measured(average=lambda surprises: surprises[63:-1].mean().item() if len(surprises) > 64 else 0.0)),
    Wrong("05.8", "median", "takes the median", measured(average=lambda surprises: surprises[63:].median().item())),
    Wrong("05.8", "divided-by-others", "divides by all tokens",
           measured(average=lambda surprises: surprises[63:].sum().item() / (len(surprises) + 1))),
    Wrong("05.8", "rounded", "rounds to four digits",
           measured(average=lambda surprises: round(surprises[63:].mean().item(), 4))),
    Wrong("05.8", "last-part-only", "scores the last part",
           by_parts(lambda rows, part, targets, start: surprises_of(rows, targets), last_part_of_all)),
    Wrong("05.8", "mean-of-means", "averages the parts' means without their boundaries",
           by_parts(plain_mean_of_others, plain_mean)),
    Wrong("05.8", "starts-beside-64", "begins with the second part",
           measured(average=lambda surprises: surprises[32:].mean().item())),
    Wrong("05.8", "other-tokens", "keeps ids in bytes", in_bytes),
    Wrong("05.8", "values", "counts hits",
           from_probabilities(lambda logp, rows: (logp > -1.0).double().mean())),
    Wrong("05.8", "scored-from-the-start", "scores everything",
           measured(average=lambda surprises: surprises.mean().item())),
    Wrong("05.8", "starts-beside-64", "begins at position 65",
           measured(average=lambda surprises: surprises[64:].mean().item())),
    Wrong("05.8", "sum-not-mean", "adds up", measured(average=lambda surprises: surprises[63:].sum().item())),
    Wrong("05.8", "perplexity", "returns perplexity",
           measured(average=lambda surprises: math.exp(surprises[63:].mean().item()))),
    Wrong("05.8", "bits", "takes logarithms to base 2",
           measured(average=lambda surprises: surprises[63:].mean().item() / math.log(2))),
    Wrong("05.8", "negative", "forgets the minus", measured(average=lambda surprises: -surprises[63:].mean().item())),
    Wrong("05.8", "not-a-number", "returns a tensor", measured(average=lambda surprises: surprises[63:].mean())),
    Wrong("05.8", "mean-of-means", "averages the parts' means", by_parts(mean_of, plain_mean)),
    Wrong("05.8", "mean-of-means", "averages the parts' means of what is scored",
           by_parts(masked_mean_of, plain_mean)),
    Wrong("05.8", "not-finite", "weighs the means of the parts, one of which has no target",
           weighed_means),
    Wrong("05.8", "wraps-round", "scores the last logits against the first token", rolled),
]  # fmt: skip

RIGHT: list[tuple[str, Callable]] = [
    ("05.5", ByCounting),
    ("05.5", TokenByToken),
    ("05.5", InABuffer),
    ("05.5", InSlots),
    ("05.5", Stacked),
    ("05.5", Wrapped),
    ("05.6", scores_in_float64),
    ("05.6", scores_by_channel),
    ("05.6", scores_by_einsum),
    ("05.6", scores_by_two_products),
    ("05.6", scores_into_new_memory),
    ("05.6", scores_by_token),
    ("05.6", scores_in_place),
    ("05.7", right_by_narrow),
    ("05.7", right_by_while),
    ("05.7", right_by_unflatten),
    ("05.7", right_by_pieces),
    ("05.8", surprise_in_numpy),
    ("05.8", surprise_by_total),
    ("05.8", surprise_without_last),
    ("05.8", surprise_carried),
]
