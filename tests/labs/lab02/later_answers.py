"""Answers to lab 02 that a check once let pass, refused though right, or explained wrongly, and their neighbours."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from labkit.attention import fused_attention as attention
from labkit.labs.lab02.references import GrowingCache, PreallocatedCache, cache_bytes, decode_step, reusable_prefix
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


class DoublesItsRoom(GrowingCache):
    """Right: memory of zeros that doubles when it is full; read() gives what is filled."""

    def __init__(self):
        super().__init__()
        self.room = None

    def append(self, k, v):
        end = self.seq_len + k.shape[2]
        if self.room is None or end > self.room[0].shape[2]:
            old = self.room
            self.room = [x.new_zeros(*x.shape[:2], 2 ** (end - 1).bit_length(), x.shape[3]) for x in (k, v)]
            for new, before in zip(self.room, old or (), strict=False):
                new[:, :, : self.seq_len] = before[:, :, : self.seq_len]
        for room, x in zip(self.room, (k, v), strict=True):
            room[:, :, self.seq_len : end] = x
        self.seq_len = end
        self.k, self.v = (room[:, :, :end] for room in self.room)


class OneRow(GrowingCache):
    def append(self, k, v):
        super().append(k[-1:], v[-1:])


class ReadsItsRoom(DoublesItsRoom):
    def read(self):
        return tuple(self.room)


class RoundedOnTheWay(GrowingCache):
    def append(self, k, v):
        super().append(*(x.half().to(x.dtype) for x in (k, v)))


def joined_by_hand(x, layer, cache):
    q, k, v = layer.project(x)
    place = cache.seq_len
    cache.append(layer.rotate(k, place), v)
    return attention(layer.rotate(q, place), *cache.read()).permute(0, 2, 1, 3).reshape(len(x), 1, -1)


def with_residual(x, layer, cache):
    return x.add(decode_step(x, layer, cache))


def in_one_buffer(model, tokens, max_new_tokens, cache):
    newest, kept = tokens.new_empty(len(tokens), 1), []
    logits = model(tokens, cache, last_only=True)
    while True:
        newest.copy_(logits[:, -1:].argmax(-1))
        kept.append(newest)
        if len(kept) == max_new_tokens:
            return torch.cat(kept, 1)
        logits = model(newest.clone(), cache, last_only=True)


def best_of_all_rows(model, tokens, max_new_tokens, cache):
    kept = []
    for _ in range(max_new_tokens):
        logits = model(kept[-1] if kept else tokens, cache, last_only=True)[:, -1]
        best = logits.flatten().argmax() % logits.shape[1]
        kept.append(best.expand(len(tokens), 1))
    return torch.cat(kept, 1)


class FirstIsFree(PreallocatedCache):
    """Makes its memory as large as a first append needs."""

    def append(self, k, v):
        asked = self.capacity
        if not self.seq_len:
            self.capacity = max(asked, k.shape[2])
        try:
            super().append(k, v)
        finally:
            self.capacity = asked


def common_run(held, wanted):
    best = 0
    for i in range(len(held)):
        for j in range(len(wanted)):
            run = 0
            while i + run < len(held) and j + run < len(wanted) and held[i + run] == wanted[j + run]:
                run += 1
            best = max(best, run)
    return min(best, len(wanted) - 1)


def last_place(held, wanted):
    place = 0
    for place, (a, b) in enumerate(zip(held, wanted[:-1], strict=False)):  # noqa: B007
        if a != b:
            break
    return place


def wrapped(count):
    return torch.tensor(count).to(torch.int32).item()


def seeing(mask):
    """02.7 by a mask of (new, held, heads)."""

    def answer(q, k, v):
        new, held = q.shape[2], k.shape[2] - q.shape[2]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask(new, held, q.shape[1]), enable_gqa=True)

    return answer


def grid(new, held):
    return torch.arange(new)[:, None] + held, torch.arange(new + held)


def loners(new, held, heads):
    row, column = grid(new, held)
    return (column < held) | (column == row)


def short_sighted(new, held, heads):
    row, column = grid(new, held)
    return (column <= row) & (column > row - new)


def by_heads(new, held, heads):
    row, column = grid(new, held)
    return column <= row + new - heads


def upside_down(new, held, heads):
    row, column = grid(new, held)
    return (column > row) | (row == row.max())


def blind_at_first(new, held, heads):
    row, column = grid(new, held)
    return column <= (row if held else row + new)


class JoinedToItself(GrowingCache):
    """No else: what was stored first is joined to itself."""

    def append(self, k, v):
        if not self.seq_len:
            self.k, self.v = k, v
        self.k, self.v = torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)
        self.seq_len = self.k.shape[2]


class EveryTokenTwice(GrowingCache):
    def append(self, k, v):
        for _ in range(2):
            super().append(k, v)


WRONG = [
    Wrong("02.1", "moved-again", "one cat for each token that comes", OneCatPerToken),
    Wrong("02.1", "moved-again", "clones what was joined", CopiedTwice),
    Wrong("02.1", "moved-again", "joins twice", CatOfCat),
    Wrong("02.1", "appended-twice", "stores the first tokens, and joins them to themselves", JoinedToItself),
    Wrong("02.1", "appended-twice", "appends everything twice", EveryTokenTwice),
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
    Wrong("02.1", "one-of-all", "keeps the last row of the batch", OneRow),
    Wrong("02.1", "reads-slack", "reads all of its memory", ReadsItsRoom),
    Wrong("02.1", "precision", "rounds to float16", RoundedOnTheWay),
    Wrong("02.2", "not-merged", "joins the heads by hand", joined_by_hand),
    Wrong("02.2", "residual-added", "adds x", with_residual),
    Wrong("02.3", "one-buffer", "keeps one tensor each time", in_one_buffer),
    Wrong("02.3", "one-row", "the best of all rows together", best_of_all_rows),
    Wrong("02.4", "overflow", "takes a first append of any size", FirstIsFree),
    Wrong("02.5", "matches-anywhere", "the longest run anywhere", common_run),
    Wrong("02.5", "index-for-count", "the place of the last equal token", last_place),
    Wrong(
        "02.6",
        "argument",
        "all tokens but the newest",
        lambda spec, tokens, batch, size: cache_bytes(spec, tokens - 1, batch, size),
    ),
    Wrong("02.6", "rounded", "in float32", lambda *case: int(torch.tensor(cache_bytes(*case)).float().item())),
    Wrong("02.6", "overflow", "in 32 bits", lambda *case: wrapped(cache_bytes(*case))),
    Wrong("02.6", "bits", "an eighth, in whole numbers", lambda *case: cache_bytes(*case) >> 3),
    Wrong("02.6", "units", "whole GiB", lambda *case: cache_bytes(*case) // 2**30),
    Wrong(
        "02.6",
        "factor",
        "tokens and rows added",
        lambda spec, tokens, batch, size: cache_bytes(spec, tokens + batch, 1, size),
    ),
    Wrong("02.7", "new-tokens-unseen", "new tokens see what is held, and themselves", seeing(loners)),
    Wrong("02.7", "window", "a window of as many as are new", seeing(short_sighted)),
    Wrong("02.7", "offset-is-heads", "an offset of kv_len - heads", seeing(by_heads)),
    Wrong("02.7", "mask-inverted", "True for hidden, but for the last row", seeing(upside_down)),
    Wrong("02.7", "no-mask", "no mask where nothing is cached", seeing(blind_at_first)),
]

RIGHT: list[tuple[str, Callable]] = [
    ("02.1", ZeroedMemory),
    ("02.2", step_through(lambda *heads: (x.double() for x in heads))),
    ("02.7", lower_right),
    ("02.1", DoublesItsRoom),
]
