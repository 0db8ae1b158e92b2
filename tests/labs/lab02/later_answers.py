"""Answers to lab 02 that a check once let pass, refused though right, or explained wrongly, and their neighbours."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from labkit.attention import fused_attention as attention
from labkit.labs.lab02.references import GrowingCache, PreallocatedCache, reusable_prefix
from tests.labs.answer import Wrong

# 02.1


class OneCatPerToken(GrowingCache):
    def append(self, k, v):
        for place in range(k.shape[2]):
            super().append(k[:, :, place : place + 1], v[:, :, place : place + 1])


class CopiedTwice(GrowingCache):
    def append(self, k, v):
        super().append(k, v)
        self.k, self.v = self.k.clone(), self.v.clone()


class CatOfCat(GrowingCache):
    """Joined once to be looked at, and once more to be kept."""

    def append(self, k, v):
        if self.seq_len:
            self.seq_len = torch.cat((self.k, k), dim=2).shape[2] - k.shape[2]
            torch.cat((self.v, v), dim=2)
        super().append(k, v)


class KeepsLastToken(GrowingCache):
    def append(self, k, v):
        seen = self.seq_len + k.shape[2]
        self.k, self.v, self.seq_len = k[:, :, -1:].clone(), v[:, :, -1:].clone(), seen


class HalfJoined(GrowingCache):
    def append(self, k, v):
        half = -(-k.shape[2] // 2)
        super().append(k[:, :, :half], v[:, :, :half])


class ZeroedMemory(GrowingCache):
    """Right: zeros first, then both parts."""

    def append(self, k, v):
        if not self.seq_len:
            self.k, self.v = k, v
        else:
            end = self.seq_len + k.shape[2]
            made = []
            for old, new in ((self.k, k), (self.v, v)):
                room = old.new_zeros(*old.shape[:2], end, old.shape[3])
                room[:, :, : self.seq_len], room[:, :, self.seq_len :] = old, new
                made.append(room)
            self.k, self.v = made
        self.seq_len = self.k.shape[2]


class JoinsOnce(GrowingCache):
    """Keeps what comes, and joins it when it is read next."""

    def __init__(self):
        super().__init__()
        self.parts = []

    def append(self, k, v):
        self.parts.append((k, v))
        self.seq_len += k.shape[2]

    def read(self):
        if len(self.parts) > 1:
            self.parts[:] = [tuple(torch.cat(kind, dim=2) for kind in zip(*self.parts, strict=True))]
        return self.parts[0]


# 02.2


def step_through(cast):
    """A step whose attention gets what `cast` makes of q, K and V."""

    def answer(x, layer, cache):
        q, k, v = layer.project(x)
        position = cache.seq_len
        cache.append(layer.rotate(k, position), v)
        out = attention(*cast(layer.rotate(q, position), *cache.read()))
        return layer.merge(out.to(x.dtype))

    return answer


def held_in_bfloat16(q, k, v):
    return q, k.bfloat16().to(k.dtype), v.bfloat16().to(v.dtype)


def bfloat16_in_float32(q, k, v):
    return q.float(), k.bfloat16().float(), v.bfloat16().float()


def long_ones_in_bfloat16(q, k, v):
    return held_in_bfloat16(q, k, v) if k.shape[2] > 32 and k.dtype == torch.float32 else (q, k, v)


def keys_in_float16(q, k, v):
    return q, k.half().to(k.dtype), v


# 02.3


def all_logits(model, tokens, max_new_tokens, cache):
    new, fed = [], tokens
    for _ in range(max_new_tokens):
        fed = model(fed, cache)[:, -1:].argmax(-1)
        new.append(fed)
    return torch.cat(new, dim=1)


# 02.4


class SharedMemory(PreallocatedCache):
    k = v = None

    def append(self, k, v):
        end = self.seq_len + k.shape[2]
        if end > self.capacity:
            raise ValueError
        if SharedMemory.k is None or SharedMemory.k.shape[:2] + SharedMemory.k.shape[3:] != k.shape[:2] + k.shape[3:]:
            SharedMemory.k, SharedMemory.v = (x.new_empty(*x.shape[:2], 400, x.shape[3]) for x in (k, v))
        self.k[:, :, self.seq_len : end], self.v[:, :, self.seq_len : end] = k, v
        self.seq_len = end

    def read(self):
        return self.k[:, :, : self.seq_len], self.v[:, :, : self.seq_len]


class ReadsOneOff(PreallocatedCache):
    def read(self):
        return self.k[:, :, 1 : self.seq_len + 1], self.v[:, :, 1 : self.seq_len + 1]


class Checked(PreallocatedCache):
    """A cache whose room is tested by `fits`."""

    def append(self, k, v):
        new, end = k.shape[2], self.seq_len + k.shape[2]
        if not self.fits(new):
            raise ValueError
        if self.seq_len == 0:
            self.k, self.v = (x.new_empty(*x.shape[:2], self.capacity, x.shape[3]) for x in (k, v))
        room = self.k[:, :, self.seq_len : end].shape[2]
        self.k[:, :, self.seq_len : end], self.v[:, :, self.seq_len : end] = k[:, :, :room], v[:, :, :room]
        self.seq_len = end


class NewTokensOnly(Checked):
    def fits(self, new):
        return new <= self.capacity


class HeldTokensOnly(Checked):
    def fits(self, new):
        return self.seq_len <= self.capacity


class LengthFromNumbers(PreallocatedCache):
    """The length is the number of places that hold anything."""

    @property
    def seq_len(self):
        return self.counted if not hasattr(self, "k") else int(self.k.isfinite()[0, 0, :, 0].sum())

    @seq_len.setter
    def seq_len(self, value):
        self.counted = value

    def append(self, k, v):
        held = self.seq_len
        end = held + k.shape[2]
        if end > self.capacity:
            raise ValueError
        if not hasattr(self, "k"):
            self.k, self.v = (
                torch.full((*x.shape[:2], self.capacity, x.shape[3]), torch.nan, dtype=x.dtype, device=x.device)
                for x in (k, v)
            )
        self.k[:, :, held:end], self.v[:, :, held:end] = k, v


# 02.7


def lower_right(q, k, v):
    """Right: PyTorch's own mask for it."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=causal_lower_right(q.shape[2], k.shape[2]), enable_gqa=True
    )


def upper_left(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_upper_left(q.shape[2], k.shape[2]), enable_gqa=True)


WRONG = [
    Wrong("02.1", "moved-again", "one cat for each token that comes", OneCatPerToken),
    Wrong("02.1", "moved-again", "clones what was joined", CopiedTwice),
    Wrong("02.1", "moved-again", "joins twice", CatOfCat),
    Wrong("02.1", "last-token", "append keeps the last token", KeepsLastToken),
    Wrong("02.1", "tokens-lost", "joins half of what comes", HalfJoined),
    Wrong("02.1", "joined-in-read", "joins at the first read after an append", JoinsOnce),
    Wrong("02.2", "precision", "casts the cache to bfloat16 and back", step_through(held_in_bfloat16)),
    Wrong("02.2", "precision", "casts the cache to bfloat16, then all to float32", step_through(bfloat16_in_float32)),
    Wrong("02.2", "precision", "casts a long cache to bfloat16", step_through(long_ones_in_bfloat16)),
    Wrong("02.2", "precision", "casts the keys to float16", step_through(keys_in_float16)),
    Wrong("02.2", "precision", "attends in bfloat16", step_through(lambda *heads: (x.bfloat16() for x in heads))),
    Wrong("02.3", "all-logits", "leaves last_only out", all_logits),
    Wrong("02.4", "shared-between-caches", "one memory on the class", SharedMemory),
    Wrong("02.4", "read-misplaced", "reads one place off", ReadsOneOff),
    Wrong("02.4", "overflow", "tests what comes alone", NewTokensOnly),
    Wrong("02.4", "overflow", "tests what is held alone", HeldTokensOnly),
    Wrong("02.4", "seq-len-works", "counts what is not NaN whenever it is asked", LengthFromNumbers),
    Wrong("02.5", "count", "counts tokens once for K and once for V", lambda *lists: 2 * reusable_prefix(*lists)),
    Wrong("02.7", "mask-offset", "PyTorch's mask for the other corner", upper_left),
]

RIGHT: list[tuple[str, Callable]] = [
    ("02.1", ZeroedMemory),
    ("02.2", step_through(lambda *heads: (x.double() for x in heads))),
    ("02.7", lower_right),
]
