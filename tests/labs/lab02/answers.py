"""Wrong answers to lab 02, and other right ones."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from labkit.attention import causal_mask, online_attention
from labkit.attention import fused_attention as attention
from labkit.cache import Cache
from labkit.generation import generate
from labkit.labs.lab02.references import GrowingCache, PreallocatedCache
from tests.labs.answer import Wrong
from tests.labs.lab02 import later_answers

# 02.1


def growing_along(dim: int) -> type:
    """A growing cache that joins along another dimension."""

    class Wrong(GrowingCache):
        def append(self, k, v):
            if self.seq_len == 0:
                self.k, self.v = k, v
            else:
                self.k, self.v = torch.cat((self.k, k), dim=dim), torch.cat((self.v, v), dim=dim)
            self.seq_len += k.shape[2]

    return Wrong


class NewestOnly(GrowingCache):
    def append(self, k, v):
        self.k, self.v = k, v
        self.seq_len += k.shape[2]


class NewBeforeOld(GrowingCache):
    def append(self, k, v):
        if self.seq_len:
            k, v = torch.cat((k, self.k), dim=2), torch.cat((v, self.v), dim=2)
        self.k, self.v, self.seq_len = k, v, k.shape[2]


class SharedLists:
    ks: list = []  # noqa: RUF012
    vs: list = []  # noqa: RUF012

    def __init__(self):
        self.seq_len = 0

    def append(self, k, v):
        self.ks.append(k)
        self.vs.append(v)
        self.seq_len += k.shape[2]

    def read(self):
        return torch.cat(self.ks, dim=2), torch.cat(self.vs, dim=2)


class SwappedOnTheWayOut(GrowingCache):
    def read(self):
        return self.v, self.k


class CountsAppends(GrowingCache):
    def append(self, k, v):
        before = self.seq_len
        super().append(k, v)
        self.seq_len = before + 1


class ReadReturnsNothing(GrowingCache):
    def read(self):
        _ = self.k, self.v


class KeysOnly(GrowingCache):
    def read(self):
        return self.k


class AlwaysFloat32(GrowingCache):
    def append(self, k, v):
        super().append(k.float(), v.float())


class ListOfParts:
    """Appends to lists and joins at every read."""

    def __init__(self):
        self.seq_len = 0
        self.ks, self.vs = [], []

    def append(self, k, v):
        self.ks.append(k)
        self.vs.append(v)
        self.seq_len += k.shape[2]

    def read(self):
        return torch.cat(self.ks, dim=2), torch.cat(self.vs, dim=2)


class ValuesFromKeys(GrowingCache):
    def append(self, k, v):
        self.k, self.v = (k, v) if self.seq_len == 0 else (torch.cat((self.k, k), dim=2), torch.cat((self.v, k), dim=2))
        self.seq_len += k.shape[2]


class NoReadMethod:
    seq_len = 0

    def append(self, k, v):
        self.k, self.v = k, v


class LengthAsMethod(GrowingCache):
    def __init__(self):
        self.parts = []

    def seq_len(self):
        return sum(k.shape[2] for k, _ in self.parts)

    def append(self, k, v):
        self.parts.append((k, v))


class LengthForgotten(GrowingCache):
    def append(self, k, v):
        self.k, self.v = (k, v) if self.seq_len == 0 else (torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2))


class OneTensor:
    """Right: K and V stacked in one tensor, and seq_len a property."""

    def __init__(self):
        self.kv = None

    @property
    def seq_len(self):
        return 0 if self.kv is None else self.kv.shape[3]

    def append(self, k, v):
        new = torch.stack((k, v))
        self.kv = new if self.kv is None else torch.cat((self.kv, new), dim=3)

    def read(self):
        return self.kv[0], self.kv[1]


# 02.2


def recompute_everything(x, layer, cache):
    cache.inputs = torch.cat((cache.inputs, x), dim=1) if cache.seq_len else x
    q, k, v = layer.project(cache.inputs)
    k, position = layer.rotate(k, 0), cache.seq_len
    cache.append(k[:, :, -1:], v[:, :, -1:])
    return layer.merge(attention(layer.rotate(q[:, :, -1:], position), k, v))


def position_after_append(x, layer, cache):
    q, k, v = layer.project(x)
    position = cache.seq_len + 1
    cache.append(layer.rotate(k, position), v)
    return layer.merge(attention(layer.rotate(q, position), *cache.read()))


def position_zero(x, layer, cache):
    q, k, v = layer.project(x)
    cache.append(layer.rotate(k, 0), v)
    return layer.merge(attention(layer.rotate(q, 0), *cache.read()))


def keys_not_rotated(x, layer, cache):
    q, k, v = layer.project(x)
    position = cache.seq_len
    cache.append(k, v)
    return layer.merge(attention(layer.rotate(q, position), *cache.read()))


def query_not_rotated(x, layer, cache):
    q, k, v = layer.project(x)
    cache.append(layer.rotate(k, cache.seq_len), v)
    return layer.merge(attention(q, *cache.read()))


def query_after_append(x, layer, cache):
    q, k, v = layer.project(x)
    cache.append(layer.rotate(k, cache.seq_len), v)
    return layer.merge(attention(layer.rotate(q, cache.seq_len), *cache.read()))


def values_rotated(x, layer, cache):
    q, k, v = layer.project(x)
    position = cache.seq_len
    cache.append(layer.rotate(k, position), layer.rotate(v, position))
    return layer.merge(attention(layer.rotate(q, position), *cache.read()))


def position_on_the_model(x, layer, cache):
    q, k, v = layer.project(x)
    position = getattr(layer.model, "position", 0)
    layer.model.position = position + 1
    cache.append(layer.rotate(k, position), v)
    return layer.merge(attention(layer.rotate(q, position), *cache.read()))


def repeated_heads(x, layer, cache):
    q, k, v = layer.project(x)
    position, times = cache.seq_len, layer.num_heads // layer.num_kv_heads
    k, v = layer.rotate(k, position).repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)
    cache.append(k, v)
    return layer.merge(attention(layer.rotate(q, position), *cache.read()))


def never_appended(x, layer, cache):
    q, k, v = layer.project(x)
    return layer.merge(attention(layer.rotate(q, 0), layer.rotate(k, 0), v))


def appended_twice(x, layer, cache):
    q, k, v = layer.project(x)
    position = cache.seq_len
    cache.append(layer.rotate(k, position), v)
    cache.append(layer.rotate(k, position), v)
    return layer.merge(attention(layer.rotate(q, position), *cache.read()))


def read_before_append(x, layer, cache):
    q, k, v = layer.project(x)
    position = cache.seq_len
    k = layer.rotate(k, position)
    keys, values = cache.read() if position else (k, v)
    cache.append(k, v)
    return layer.merge(attention(layer.rotate(q, position), keys, values))


def cache_unread(x, layer, cache):
    q, k, v = layer.project(x)
    position = cache.seq_len
    k = layer.rotate(k, position)
    cache.append(k, v)
    return layer.merge(attention(layer.rotate(q, position), k, v))


def forgot_merge(x, layer, cache):
    q, k, v = layer.project(x)
    position = cache.seq_len
    cache.append(layer.rotate(k, position), v)
    return attention(layer.rotate(q, position), *cache.read())


def by_is_causal_in_a_step(x, layer, cache):
    q, k, v = layer.project(x)
    position = cache.seq_len
    cache.append(layer.rotate(k, position), v)
    q = layer.rotate(q, position)
    return layer.merge(F.scaled_dot_product_attention(q, *cache.read(), is_causal=True, enable_gqa=True))


def values_as_keys(x, layer, cache):
    q, k, v = layer.project(x)
    position = cache.seq_len
    cache.append(layer.rotate(k, position), v)
    values, keys = cache.read()
    return layer.merge(attention(layer.rotate(q, position), keys, values))


def projected_in_another_order(x, layer, cache):
    q, v, k = layer.project(x)
    position = cache.seq_len
    cache.append(layer.rotate(k, position), v)
    return layer.merge(attention(layer.rotate(q, position), *cache.read()))


def step_by_einsum(x, layer, cache):
    """Right: attention written out, with a group dimension."""
    q, k, v = layer.project(x)
    position = cache.seq_len
    q, k = layer.rotate(q, position), layer.rotate(k, position)
    cache.append(k, v)
    keys, values = cache.read()
    grouped = q.unflatten(1, (layer.num_kv_heads, -1))
    weights = torch.softmax(torch.einsum("bgrqd,bgkd->bgrqk", grouped, keys) / layer.head_dim**0.5, dim=-1)
    return layer.merge(torch.einsum("bgrqk,bgkd->bgrqd", weights, values).flatten(1, 2))


def step_repeating_after_read(x, layer, cache):
    """Heads are repeated for the product only: the whole cache, at every step."""
    q, k, v = layer.project(x)
    position = cache.seq_len
    cache.append(layer.rotate(k, position), v)
    times = layer.num_heads // layer.num_kv_heads
    keys, values = (t.repeat_interleave(times, dim=1) for t in cache.read())
    return layer.merge(F.scaled_dot_product_attention(layer.rotate(q, position), keys, values))


def joins_and_appends(x, layer, cache):
    q, k, v = layer.project(x)
    q, k = (layer.rotate(t, cache.seq_len) for t in (q, k))
    keys, values = k, v
    if cache.seq_len:
        keys, values = (torch.cat(pair, dim=2) for pair in zip(cache.read(), (k, v), strict=True))
    cache.append(k, v)
    return layer.merge(attention(q, keys, values))


def by_kv_head_and_float32(x, layer, cache):
    """Right: one KV head after the other, softmax in float32 or wider."""
    q, k, v = layer.project(x)
    position = cache.seq_len
    cache.append(layer.rotate(k, position), v)
    out = []
    for rows, keys, values in zip(
        layer.rotate(q, position).chunk(layer.num_kv_heads, 1), *(t.unbind(1) for t in cache.read()), strict=True
    ):
        scores = rows[:, :, 0] @ keys.mT * layer.head_dim**-0.5
        wide = torch.promote_types(x.dtype, torch.float32)
        out.append(scores.softmax(-1, dtype=wide).to(x.dtype) @ values)
    return layer.merge(torch.cat(out, 1)[:, :, None])


# 02.3


def prefills_empty_caches_only(model, tokens, max_new_tokens, cache):
    sequence = tokens
    for _ in range(max_new_tokens):
        fed = sequence if cache.seq_len == 0 else sequence[:, -1:]
        sequence = torch.cat((sequence, model(fed, cache, last_only=True)[:, -1:].argmax(dim=-1)), dim=1)
    return sequence[:, tokens.shape[1] :]


def without_the_cache(model, tokens, max_new_tokens, cache):
    sequence = tokens
    for _ in range(max_new_tokens):
        sequence = torch.cat((sequence, model(sequence, last_only=True)[:, -1:].argmax(dim=-1)), dim=1)
    return sequence[:, tokens.shape[1] :]


def whole_sequence_re_fed(model, tokens, max_new_tokens, cache):
    sequence = tokens
    for _ in range(max_new_tokens):
        sequence = torch.cat((sequence, model(sequence, cache, last_only=True)[:, -1:].argmax(dim=-1)), dim=1)
    return sequence[:, tokens.shape[1] :]


def last_prompt_token_again(model, tokens, max_new_tokens, cache):
    model(tokens, cache)
    fed, new = tokens[:, -1:], []
    for _ in range(max_new_tokens):
        fed = model(fed, cache, last_only=True)[:, -1:].argmax(dim=-1)
        new.append(fed)
    return torch.cat(new, dim=1)


def one_step_too_many(model, tokens, max_new_tokens, cache):
    logits, new = model(tokens, cache, last_only=True), []
    for _ in range(max_new_tokens):
        new.append(logits[:, -1:].argmax(dim=-1))
        logits = model(new[-1], cache, last_only=True)
    return torch.cat(new, dim=1)


def last_not_kept(model, tokens, max_new_tokens, cache):
    fed, new = model(tokens, cache, last_only=True)[:, -1:].argmax(dim=-1), []
    for _ in range(max_new_tokens - 1):
        new.append(fed)
        fed = model(fed, cache, last_only=True)[:, -1:].argmax(dim=-1)
    return torch.cat(new, dim=1) if new else tokens[:, :0]


def prompt_returned(model, tokens, max_new_tokens, cache):
    sequence = fed = tokens
    for _ in range(max_new_tokens):
        fed = model(fed, cache, last_only=True)[:, -1:].argmax(dim=-1)
        sequence = torch.cat((sequence, fed), dim=1)
    return sequence


def prompt_in_steps(model, tokens, max_new_tokens, cache):
    for index in range(tokens.shape[1]):
        logits = model(tokens[:, index : index + 1], cache, last_only=True)
    new = [logits[:, -1:].argmax(dim=-1)]
    for _ in range(max_new_tokens - 1):
        new.append(model(new[-1], cache, last_only=True)[:, -1:].argmax(dim=-1))
    return torch.cat(new, dim=1)


def own_cache(model, tokens, max_new_tokens, cache):
    return plain_loop(model, tokens, max_new_tokens, Cache.growing(len(cache)))


def cache_emptied(model, tokens, max_new_tokens, cache):
    cache.reset()
    return plain_loop(model, tokens, max_new_tokens, cache)


def sliced_by_the_cache(model, tokens, max_new_tokens, cache):
    prompt = tokens.shape[1]
    for _ in range(max_new_tokens):
        logits = model(tokens[:, cache.seq_len :], cache, last_only=True)
        tokens = torch.cat((tokens, logits[:, -1:].argmax(dim=-1)), dim=1)
    return tokens[:, prompt:]


def first_not_kept(model, tokens, max_new_tokens, cache):
    fed, new = model(tokens, cache, last_only=True)[:, -1:].argmax(dim=-1), []
    for _ in range(max_new_tokens):
        fed = model(fed, cache, last_only=True)[:, -1:].argmax(dim=-1)
        new.append(fed)
    return torch.cat(new, dim=1)


def two_at_a_time(model, tokens, max_new_tokens, cache):
    fed, sequence = tokens, tokens
    for _ in range(max_new_tokens):
        sequence = torch.cat((sequence, model(fed, cache, last_only=True)[:, -1:].argmax(dim=-1)), dim=1)
        fed = sequence[:, -2:]
    return sequence[:, tokens.shape[1] :]


def first_row(model, tokens, max_new_tokens, cache):
    fed, new = tokens, []
    for _ in range(max_new_tokens):
        fed = model(fed, cache)[:, :1].argmax(dim=-1)
        new.append(fed)
    return torch.cat(new, dim=1)


def all_rows(model, tokens, max_new_tokens, cache):
    fed, new = tokens, []
    for _ in range(max_new_tokens):
        fed = model(fed, cache).argmax(dim=-1)
        new.append(fed[:, -1:])
    return torch.cat(new, dim=1)


def plain_loop(model, tokens, max_new_tokens, cache):
    """Right: prefill before the loop, a preallocated result."""
    new = torch.empty(tokens.shape[0], max_new_tokens, dtype=torch.long)
    new[:, 0] = model(tokens, cache, last_only=True)[:, -1].argmax(dim=-1)
    for index in range(1, max_new_tokens):
        new[:, index] = model(new[:, index - 1 : index], cache)[:, -1].argmax(dim=-1)
    return new


# 02.4


class AllocatesWith(PreallocatedCache):
    """A preallocated cache whose memory comes from `allocate(k, capacity)`."""

    def append(self, k, v):
        end = self.seq_len + k.shape[2]
        if end > self.capacity:
            raise ValueError("full")
        if self.seq_len == 0:
            self.k, self.v = self.allocate(k), self.allocate(v)
        self.place(k, v, end)
        self.seq_len = end

    def place(self, k, v, end):
        self.k[:, :, self.seq_len : end] = k
        self.v[:, :, self.seq_len : end] = v

    def allocate(self, k):
        return torch.zeros(k.shape[0], k.shape[1], self.capacity, k.shape[3], dtype=k.dtype, device=k.device)


class Float32Memory(AllocatesWith):
    def allocate(self, k):
        return torch.zeros(k.shape[0], k.shape[1], self.capacity, k.shape[3], device=k.device)


class CpuMemory(AllocatesWith):
    def allocate(self, k):
        return torch.zeros(k.shape[0], k.shape[1], self.capacity, k.shape[3], dtype=k.dtype, device="cpu")


class LastPlaceRefused(AllocatesWith):
    def append(self, k, v):
        if self.seq_len + k.shape[2] >= self.capacity:
            raise ValueError("full")
        super().append(k, v)


class DropsWhatDoesNotFit(AllocatesWith):
    def append(self, k, v):
        room = self.capacity - self.seq_len
        if room:
            super().append(k[:, :, :room], v[:, :, :room])


class NoTestForRoom(AllocatesWith):
    def append(self, k, v):
        if self.seq_len == 0:
            self.k, self.v = self.allocate(k), self.allocate(v)
        end = self.seq_len + k.shape[2]
        self.k[:, :, self.seq_len : end] = k
        self.v[:, :, self.seq_len : end] = v
        self.seq_len = end


class CountsBeforeItTests(AllocatesWith):
    def append(self, k, v):
        start, self.seq_len = self.seq_len, self.seq_len + k.shape[2]
        if self.seq_len > self.capacity:
            raise ValueError("full")
        if start == 0:
            self.k, self.v = self.allocate(k), self.allocate(v)
        self.k[:, :, start : self.seq_len] = k
        self.v[:, :, start : self.seq_len] = v


class ReadsSlack(AllocatesWith):
    def read(self):
        return self.k, self.v


class AlwaysAtTheStart(AllocatesWith):
    def append(self, k, v):
        if self.seq_len == 0:
            self.k, self.v = self.allocate(k), self.allocate(v)
        self.k[:, :, : k.shape[2]] = k
        self.v[:, :, : k.shape[2]] = v
        self.seq_len += k.shape[2]


class ConcatenatesWithALimit(GrowingCache):
    def __init__(self, capacity):
        super().__init__()
        self.capacity = capacity

    def append(self, k, v):
        if self.seq_len + k.shape[2] > self.capacity:
            raise ValueError("full")
        super().append(k, v)


class ReadClones(AllocatesWith):
    def read(self):
        return self.k[:, :, : self.seq_len].clone(), self.v[:, :, : self.seq_len].clone()


class MemoryOnTheClass(AllocatesWith):
    memory: list = []  # noqa: RUF012

    def append(self, k, v):
        if not self.memory:
            self.memory.extend((self.allocate(k), self.allocate(v)))
        end = self.seq_len + k.shape[2]
        if end > self.capacity:
            raise ValueError("full")
        if self.memory[0].dtype != k.dtype or self.memory[0].device != k.device:
            self.memory[:] = self.allocate(k), self.allocate(v)
        self.k, self.v = self.memory
        self.k[:, :, self.seq_len : end] = k
        self.v[:, :, self.seq_len : end] = v
        self.seq_len = end


class TestsWhetherFull(AllocatesWith):
    def append(self, k, v):
        if self.seq_len >= self.capacity:
            raise ValueError("full")
        NoTestForRoom.append(self, k, v)


class TestsFromTheSecondAppend(AllocatesWith):
    def append(self, k, v):
        if self.seq_len and self.seq_len + k.shape[2] > self.capacity:
            raise ValueError("full")
        NoTestForRoom.append(self, k, v)


class Asserts(AllocatesWith):
    def append(self, k, v):
        assert self.seq_len + k.shape[2] <= self.capacity, "full"
        super().append(k, v)


class RaisesIndexError(AllocatesWith):
    def append(self, k, v):
        if self.seq_len + k.shape[2] > self.capacity:
            raise IndexError("full")
        super().append(k, v)


class AllocatesEachTime(AllocatesWith):
    def append(self, k, v):
        end = self.seq_len + k.shape[2]
        if end > self.capacity:
            raise ValueError("full")
        self.k, self.v = self.allocate(k), self.allocate(v)
        self.k[:, :, self.seq_len : end] = k
        self.v[:, :, self.seq_len : end] = v
        self.seq_len = end


class LengthStaysZero(AllocatesWith):
    def append(self, k, v):
        super().append(k, v)
        self.seq_len = 0


class OneMemoryForBoth(AllocatesWith):
    def append(self, k, v):
        end = self.seq_len + k.shape[2]
        if end > self.capacity:
            raise ValueError("full")
        if self.seq_len == 0:
            self.k = self.v = self.allocate(k)
        self.k[:, :, self.seq_len : end] = k
        self.v[:, :, self.seq_len : end] = v
        self.seq_len = end


class WritesOneToken(AllocatesWith):
    def append(self, k, v):
        if self.seq_len + k.shape[2] > self.capacity:
            raise ValueError("full")
        if self.seq_len == 0:
            self.k, self.v = self.allocate(k), self.allocate(v)
        self.k[:, :, self.seq_len] = k[:, :, 0]
        self.v[:, :, self.seq_len] = v[:, :, 0]
        self.seq_len += k.shape[2]


class KeysInBoth(AllocatesWith):
    def append(self, k, v):
        super().append(k, k)


class WritesAtTheEnd(AllocatesWith):
    def append(self, k, v):
        new, end = k.shape[2], self.seq_len + k.shape[2]
        if end > self.capacity:
            raise ValueError("full")
        if self.seq_len == 0:
            self.k, self.v = self.allocate(k), self.allocate(v)
        self.k[:, :, self.capacity - new :] = k
        self.v[:, :, self.capacity - new :] = v
        self.seq_len = end


class NoAppend:
    def __init__(self, capacity):
        self.capacity, self.seq_len = capacity, 0

    def read(self):
        return None


class WritesWithCopy:
    """Right: narrow and copy_, one tensor for both."""

    def __init__(self, capacity):
        self.capacity, self.seq_len, self.kv = capacity, 0, None

    def append(self, k, v):
        if self.seq_len + k.size(2) > self.capacity:
            raise ValueError("full")
        if self.kv is None:
            self.kv = torch.zeros(2, k.size(0), k.size(1), self.capacity, k.size(3), dtype=k.dtype, device=k.device)
        self.kv[0].narrow(2, self.seq_len, k.size(2)).copy_(k)
        self.kv[1].narrow(2, self.seq_len, v.size(2)).copy_(v)
        self.seq_len += k.size(2)

    def read(self):
        return self.kv[0].narrow(2, 0, self.seq_len), self.kv[1].narrow(2, 0, self.seq_len)


# 02.5


def longest_common(held, wanted):
    same = 0
    while same < len(held) and same < len(wanted) and held[same] == wanted[same]:
        same += 1
    return same


def equal_anywhere(held, wanted):
    return min(sum(a == b for a, b in zip(held, wanted, strict=False)), len(wanted) - 1)


def all_that_is_held(held, wanted):
    return min(len(held), len(wanted) - 1)


def shared_tokens(held, wanted):
    return min(len(set(held) & set(wanted)), len(wanted) - 1)


def always_one_less(held, wanted):
    return max(longest_common(held, wanted) - 1, 0)


def tokens_to_run(held, wanted):
    return len(wanted) - min(longest_common(held, wanted), len(wanted) - 1)


def pops_what_it_was_given(held, wanted):
    wanted.pop()
    return longest_common(held, wanted)


def walks_off_the_end(held, wanted):
    same = 0
    while same < len(wanted) - 1 and held[same] == wanted[same]:
        same += 1
    return same


def the_tokens_themselves(held, wanted):
    return wanted[: min(longest_common(held, wanted), len(wanted) - 1)]


def prefix_by_recursion(held, wanted):
    """Right: by recursion."""
    if not held or len(wanted) == 1 or held[0] != wanted[0]:
        return 0
    return 1 + prefix_by_recursion(held[1:], wanted[1:])


def prefix_by_slices(held, wanted):
    """Right: the longest slice that agrees."""
    return max(n for n in range(len(wanted)) if held[:n] == wanted[:n])


# 02.6


def bytes_with(**changes) -> Callable:
    """The formula with some factor replaced."""

    def formula(spec, tokens, batch, bytes_per_element):
        factors = {"kinds": 2, "layers": spec.num_layers, "heads": spec.num_kv_heads, "head_dim": spec.head_dim,
                   "tokens": tokens, "batch": batch, "bytes": bytes_per_element}  # fmt: skip
        factors |= {name: change(spec) if callable(change) else change for name, change in changes.items()}
        total = 1
        for factor in factors.values():
            total *= factor
        return total

    return formula


def bytes_through_gigabytes(spec, tokens, batch, bytes_per_element):
    return bytes_with()(spec, tokens, batch, bytes_per_element) / 1


def bytes_in_float16(spec, tokens, batch, bytes_per_element):
    return bytes_with()(spec, tokens, batch, 2)


def elements(spec, tokens, batch, bytes_per_element):
    return bytes_with()(spec, tokens, batch, 1)


def bytes_by_tensors(spec, tokens, batch, bytes_per_element):
    """Right: from the shape of a tensor that holds no data."""
    shape = (2, spec.num_layers, batch, spec.num_kv_heads, tokens, spec.head_dim)
    return torch.empty(shape, device="meta", dtype=torch.int8).numel() * bytes_per_element


# 02.7


def chunk_with(mask_of: Callable) -> Callable:
    """Attention with the mask that `mask_of(new_tokens, kv_len)` gives."""

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_of(q.shape[2], k.shape[2]), enable_gqa=True)

    return attend


def ones(new: int, kv: int) -> torch.Tensor:
    """A mask that hides nothing."""
    return torch.ones(new, kv, dtype=torch.bool)


def as_it_stands(q, k, v):
    new_tokens, kv_len = q.shape[2], k.shape[2]
    mask = torch.ones(new_tokens, kv_len, dtype=torch.bool, device=q.device).tril() if new_tokens > 1 else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def by_is_causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)


def new_columns_left_false(new: int, kv: int) -> torch.Tensor:
    """What is held may be seen, and nothing else."""
    return torch.arange(kv) < torch.full((new, 1), kv - new)


def triangle_of_the_new(new: int, kv: int) -> torch.Tensor:
    """The cached columns are left False."""
    mask = torch.zeros(new, kv, dtype=torch.bool)
    mask[:, kv - new :] = torch.ones(new, new, dtype=torch.bool).tril()
    return mask


def recompute_by_addmm(x, layer, cache):
    """As above, with a product that is seldom used."""
    weight = layer.attention.qkv.weight
    flat = x.reshape(-1, x.shape[-1])
    for _ in range(2):
        torch.addmm(torch.zeros(weight.shape[0], dtype=x.dtype), flat, weight.T)
    return step_by_einsum(x, layer, cache)


class FloatValues(GrowingCache):
    def append(self, k, v):
        super().append(k, v.float())


def changes_x(x, layer, cache):
    out = step_by_einsum(x, layer, cache)
    x.zero_()
    return out


def changes_tokens(model, tokens, max_new_tokens, cache):
    out = plain_loop(model, tokens, max_new_tokens, cache)
    tokens.zero_()
    return out


class WritesByIndex(AllocatesWith):
    def place(self, k, v, end):
        places = torch.arange(self.seq_len, end, device=k.device)
        self.k.index_copy_(2, places, k)
        self.v.index_copy_(dim=2, index=places, source=v)


# Met later: what readers tried, and what a fresh set of answers showed.


class KeepsTheFirst(GrowingCache):
    def append(self, k, v):
        if self.seq_len == 0:
            self.k, self.v = k, v
        torch.cat((self.k, k), dim=2)
        self.seq_len += k.shape[2]


class StoresNothingAtFirst(GrowingCache):
    k = v = None

    def append(self, k, v):
        if self.k is not None:
            self.k, self.v = torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)
        self.seq_len += k.shape[2]


class StartsWithFloat32(GrowingCache):
    def __init__(self):
        super().__init__()
        self.k, self.v = torch.empty(0), torch.empty(0)

    def append(self, k, v):
        self.k, self.v = torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)
        self.seq_len += k.shape[2]


class PrefillReplaces(GrowingCache):
    def append(self, k, v):
        if k.shape[2] > 1:
            self.seq_len = 0
        super().append(k, v)


class KeepsEveryPiece(GrowingCache):
    def __init__(self):
        super().__init__()
        self.pieces = []

    def append(self, k, v):
        self.pieces.append((k.clone(), v.clone()))
        super().append(k, v)


class RoomForSome(GrowingCache):
    """Room for 4,096 tokens, whatever comes."""

    def append(self, k, v):
        if self.seq_len == 0:
            self.k, self.v = (x.new_zeros(*x.shape[:2], 4096, x.shape[3]) for x in (k, v))
        self.k[:, :, self.seq_len : self.seq_len + k.shape[2]] = k
        self.v[:, :, self.seq_len : self.seq_len + k.shape[2]] = v
        self.seq_len += k.shape[2]

    def read(self):
        return self.k[:, :, : self.seq_len], self.v[:, :, : self.seq_len]


class LastTokenRead(GrowingCache):
    def read(self):
        return self.k[:, :, -1:], self.v[:, :, -1:]


class LengthIsAFloat(GrowingCache):
    def append(self, k, v):
        super().append(k, v)
        self.seq_len = float(self.seq_len)


class ByView(GrowingCache):
    def append(self, k, v):
        super().append(k.view(-1).view(k.shape), v)


class KeysThroughHalf(GrowingCache):
    def append(self, k, v):
        super().append(k.half().to(k.dtype), v)


class Slots:
    """Right: no attributes but those named."""

    __slots__ = ("k", "seq_len", "v")

    def __init__(self):
        self.seq_len = 0

    def append(self, k, v):
        if self.seq_len:
            k, v = torch.concat([self.k, k], -2), torch.concat([self.v, v], -2)
        self.k, self.v, self.seq_len = k, v, k.size(2)

    def read(self):
        return self.k, self.v


class Doubling:
    """Right: memory that doubles when it is full."""

    def __init__(self):
        self.seq_len = self.room = 0

    def append(self, k, v):
        end = self.seq_len + k.shape[2]
        if end > self.room:
            self.room = max(end, 2 * self.room)
            new = [x.new_empty(*x.shape[:2], self.room, x.shape[3]) for x in (k, v)]
            if self.seq_len:
                for memory, old in zip(new, self.read(), strict=True):
                    memory[:, :, : self.seq_len] = old
            self.k, self.v = new
        self.k[:, :, self.seq_len : end], self.v[:, :, self.seq_len : end] = k, v
        self.seq_len = end

    def read(self):
        return self.k[:, :, : self.seq_len], self.v[:, :, : self.seq_len]


class LengthIsATensor(GrowingCache):
    """Right: seq_len is a whole number in a tensor."""

    def append(self, k, v):
        super().append(k, v)
        self.seq_len = torch.tensor(self.seq_len)


def step_with(position=lambda cache: cache.seq_len, query=None, attend=attention):
    """A decode step with some part replaced."""

    def step(x, layer, cache):
        q, k, v = layer.project(x)
        at = position(cache)
        turned = layer.rotate(q, at if query is None else query(cache))
        cache.append(layer.rotate(k, at), v)
        return layer.merge(attend(turned, *cache.read()))

    return step


def by_hand(q, k, v, *, scale=None, dim=-1, dtype=None, repeat=True):
    """Attention of the newest token, written out."""
    times = q.shape[1] // k.shape[1]
    k, v = ((x.repeat_interleave(times, 1) if repeat else x.repeat(1, times, 1, 1)) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale(q.shape[-1]))
    return scores.softmax(dim, dtype=dtype or q.dtype).to(q.dtype) @ v


def recompute_through_a_copy(x, layer, cache):
    cache.inputs = torch.cat((getattr(cache, "inputs", x[:, :0]), x), dim=1)
    start = cache.seq_len + 1 - cache.inputs.shape[1]
    q, k, v = copy.deepcopy(layer).project(cache.inputs)
    k, q = layer.rotate(k, start), layer.rotate(q[:, :, -1:], cache.seq_len)
    cache.append(k[:, :, -1:], v[:, :, -1:])
    return layer.merge(attention(q, *cache.read()))


def position_on_the_function(x, layer, cache):
    position_on_the_function.at = 0 if cache.seq_len == 0 else position_on_the_function.at + 1
    return step_with(lambda cache: position_on_the_function.at)(x, layer, cache)


def one_buffer(x, layer, cache, kept={}):  # noqa: B006
    out = step_with()(x, layer, cache)
    return kept.setdefault((out.shape, out.dtype), out).copy_(out)


def through_numpy(x, layer, cache):
    def attend(q, k, v):
        k, v = (torch.from_numpy(t.double().numpy()).to(q.dtype) for t in (k, v))
        return attention(q, k, v)

    return step_with(attend=attend)(x, layer, cache)


def loop_with(pick=lambda logits: logits[:, -1:].argmax(dim=-1), ends=lambda fed: False, first=lambda tokens: tokens):
    """The loop with some part replaced."""

    def generate(model, tokens, max_new_tokens, cache):
        fed, new = first(tokens), []
        for _ in range(max_new_tokens):
            fed = pick(model(fed, cache, last_only=True))
            new.append(fed)
            if ends(fed):
                break
        return torch.cat(new, dim=1)

    return generate


def all_but_the_last(tokens):
    """A prompt whose last token is kept for a decode step that never comes."""
    return tokens[:, :-1] if tokens.shape[1] > 1 else tokens


def one_too_many(model, tokens, max_new_tokens, cache):
    return loop_with()(model, tokens, max_new_tokens + 1, cache)


def newest_without_cache(model, tokens, max_new_tokens, cache):
    return loop_with()(lambda fed, cache, last_only: model(fed, last_only=last_only), tokens, max_new_tokens, cache)


def cache_in_prefill_only(model, tokens, max_new_tokens, cache):
    new = [model(tokens, cache, last_only=True)[:, -1:].argmax(dim=-1)]
    for _ in range(max_new_tokens - 1):
        new.append(model(new[-1], last_only=True)[:, -1:].argmax(dim=-1))
    return torch.cat(new, dim=1)


def prompt_in_two(model, tokens, max_new_tokens, cache):
    if tokens.shape[1] > 1:
        model(tokens[:, :-1], cache, last_only=True)
    return loop_with()(model, tokens[:, -1:], max_new_tokens, cache)


def by_the_library(model, tokens, max_new_tokens, cache):
    return generate(model, tokens, max_new_tokens, cache=cache).tokens


def reset_at_the_end(model, tokens, max_new_tokens, cache):
    new = loop_with()(model, tokens, max_new_tokens, cache)
    cache.reset()
    return new


def remembered(model, tokens, max_new_tokens, cache, kept={}):  # noqa: B006
    key = tuple(tokens.flatten().tolist())
    if key not in kept or kept[key].shape[1] < max_new_tokens:
        kept[key] = loop_with()(model, tokens, max_new_tokens, cache)
    return kept[key][:, :max_new_tokens]


def prompt_each_time(model, tokens, max_new_tokens, cache):
    new = [model(tokens, cache, last_only=True)[:, -1:].argmax(dim=-1) for _ in range(max_new_tokens)]
    return torch.cat(new, dim=1)


def last_left_zero(model, tokens, max_new_tokens, cache):
    new, fed = torch.zeros(tokens.shape[0], max_new_tokens, dtype=torch.long), tokens
    for index in range(max_new_tokens - 1 or 1):
        fed = model(fed, cache, last_only=True)[:, -1:].argmax(dim=-1)
        new[:, index] = fed[:, 0]
    return new


def by_forward(model, tokens, max_new_tokens, cache):
    """Right: by recursion, through forward, with names."""
    fed = model.forward(tokens=tokens, cache=cache, last_only=True)[:, -1].argmax(-1).unsqueeze(1)
    if max_new_tokens == 1:
        return fed
    return torch.hstack((fed, by_forward(model, fed, max_new_tokens - 1, cache)))


class ValuesForgotten(AllocatesWith):
    def place(self, k, v, end):
        self.k[:, :, self.seq_len : end] = k


class LengthBeforeTheWrite(AllocatesWith):
    def place(self, k, v, end):
        self.seq_len += k.shape[2]
        self.k[:, :, self.seq_len : self.seq_len + k.shape[2]] = k
        self.v[:, :, self.seq_len : self.seq_len + k.shape[2]] = v


class RoomFor2048(AllocatesWith):
    def allocate(self, k):
        return k.new_zeros(*k.shape[:2], max(2048, self.capacity), k.shape[3])


class OnePlaceMore(AllocatesWith):
    def allocate(self, k):
        return k.new_zeros(*k.shape[:2], self.capacity + 1, k.shape[3])


class SpareInside(AllocatesWith):
    def allocate(self, k):
        memory = super().allocate(k)
        self.inner = type("Inner", (), {})()
        self.inner.spare = memory.clone()
        return memory


class AllocatesBeforeItTests(AllocatesWith):
    def append(self, k, v):
        if self.seq_len == 0:
            self.spare = self.allocate(k)
        super().append(k, v)


class CapacityOnTheClass(AllocatesWith):
    def __init__(self, capacity):
        self.seq_len = 0
        type(self).capacity = capacity


class ThreeHeads(AllocatesWith):
    def allocate(self, k):
        return k.new_zeros(k.shape[0], 3, self.capacity, k.shape[3])


class ReadsContiguous(AllocatesWith):
    def read(self):
        return tuple(x.contiguous() for x in super().read())


class RebindsInPlaceOfWriting(AllocatesWith):
    def place(self, k, v, end):
        self.k, self.v = k, v


class AnotherLayout(AllocatesWith):
    """Right: tokens first in memory."""

    def allocate(self, k):
        return k.new_empty(self.capacity, *k.shape[:2], k.shape[3]).permute(1, 2, 0, 3)


class LooksForNaN(AllocatesWith):
    """Right: looks at the numbers, which nobody can on the meta device."""

    def append(self, k, v):
        assert not k.isnan().any()
        super().append(k, v)


class StacksFirst(WritesWithCopy):
    """Right: one write for K and V."""

    def append(self, k, v):
        new = torch.stack((k, v))
        if self.seq_len + k.size(2) > self.capacity:
            raise ValueError("full")
        if self.kv is None:
            self.kv = new.new_empty(*new.shape[:3], self.capacity, new.shape[4])
        self.kv[:, :, :, self.seq_len : self.seq_len + k.size(2)] = new
        self.seq_len += k.size(2)


def by_identity(held, wanted):
    pairs = enumerate(zip(held, wanted, strict=False))
    return min(next((i for i, (a, b) in pairs if a is not b), min(len(held), len(wanted))), len(wanted) - 1)


def else_all_held(held, wanted):
    return next((i for i, (a, b) in enumerate(zip(held, wanted, strict=False)) if a != b), len(held))


def layers_attribute(spec, tokens, batch, bytes_per_element):
    return 2 * spec.layers * spec.num_kv_heads * spec.head_dim * tokens * batch * bytes_per_element


def masks_by_new_tokens(q, k, v, kept={}):  # noqa: B006
    new, kv = q.shape[2], k.shape[2]
    return chunk_with(lambda n, m: kept.setdefault(new, ones(n, m).tril(kv - new)))(q, k, v)


def chunk_by_hand(q, k, v, *, hidden=float("-inf"), dtype=None, scale=lambda head_dim: head_dim**-0.5):
    """Attention of a chunk, written out."""
    times, new, kv = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    scores = q @ k.repeat_interleave(times, 1).mT * scale(q.shape[-1])
    scores = scores.masked_fill(~ones(new, kv).tril(kv - new), hidden)
    return scores.softmax(-1, dtype=dtype or q.dtype).to(q.dtype) @ v.repeat_interleave(times, 1)


def first_difference_or_length(held, wanted):
    places = (place for place, (old, new) in enumerate(zip(held, wanted, strict=False)) if old != new)
    return min(next(places, None) or len(held), len(wanted) - 1)


def stops_at_token_0(held, wanted):
    same = 0
    while same < min(len(held), len(wanted) - 1) and held[same] and held[same] == wanted[same]:
        same += 1
    return same


def masked_when_nothing_is_held(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] == k.shape[2], enable_gqa=True)


def additive_mask(q, k, v):
    """Right: 0 and -inf, in q's dtype."""
    new, kv = q.shape[2], k.shape[2]
    return chunk_with(lambda *_: torch.full((new, kv), -torch.inf, dtype=q.dtype).triu(kv - new + 1))(q, k, v)


def only_the_new_keys(q, k, v):
    new = q.shape[2]
    return by_is_causal(q, k[:, :, -new:], v[:, :, -new:])


def token_by_token(q, k, v):
    """Right: one row at a time, each over its own past."""
    past = k.shape[2] - q.shape[2]
    rows = [
        F.scaled_dot_product_attention(
            q[:, :, i : i + 1], k[:, :, : past + i + 1], v[:, :, : past + i + 1], enable_gqa=True
        )
        for i in range(q.shape[2])
    ]
    return torch.cat(rows, dim=2)


WRONG = [
    Wrong("02.1", "dtype", "values in float32 under a bfloat16 model", FloatValues),
    Wrong("02.2", "projected-twice", "projects the new token again, by addmm", recompute_by_addmm),
    Wrong("02.2", "arguments-changed", "zeroes the hidden state it was given", changes_x),
    Wrong("02.3", "arguments-changed", "zeroes the prompt it was given", changes_tokens),
    Wrong("02.1", "wrong-dimension", "joins along the heads", growing_along(1)),
    Wrong("02.1", "wrong-dimension", "joins along head_dim", growing_along(-1)),
    Wrong("02.1", "wrong-dimension", "joins along the batch", growing_along(0)),
    Wrong("02.1", "newest-only", "each append replaces what was held", NewestOnly),
    Wrong("02.1", "new-before-old", "puts the new token in front", NewBeforeOld),
    Wrong("02.1", "shared-between-caches", "keeps its lists on the class", SharedLists),
    Wrong("02.1", "k-and-v-swapped", "reads V first", SwappedOnTheWayOut),
    Wrong("02.1", "seq-len", "counts appends instead of tokens", CountsAppends),
    Wrong("02.1", "not-a-pair", "read without return", ReadReturnsNothing),
    Wrong("02.1", "not-a-pair", "reads the keys only", KeysOnly),
    Wrong("02.1", "dtype", "casts to float32", AlwaysFloat32),
    Wrong("02.1", "read-copies", "keeps a list and joins it at every read", ListOfParts),
    Wrong("02.1", "v-holds-k", "joins V with the new K", ValuesFromKeys),
    Wrong("02.1", "missing-method", "has no read", NoReadMethod),
    Wrong("02.1", "seq-len-method", "seq_len is a method", LengthAsMethod),
    Wrong("02.1", "seq-len", "never counts", LengthForgotten),
    Wrong("02.2", "recomputed", "keeps inputs and computes every K and V again", recompute_everything,
           "a popular judge passes it"),
    Wrong("02.2", "position-off-by-one", "counts positions from 1", position_after_append),
    Wrong("02.2", "position-missing", "every token stands at position 0", position_zero),
    Wrong("02.2", "position-missing", "caches keys before rotation", keys_not_rotated),
    Wrong("02.2", "query-position", "does not rotate the query", query_not_rotated),
    Wrong("02.2", "query-position", "rotates the query after the append", query_after_append),
    Wrong("02.2", "v-changed", "rotates the values too", values_rotated),
    Wrong("02.2", "state-kept", "the position kept on the model, not reset between prompts", position_on_the_model,
           "rasbt/LLMs-from-scratch#925"),
    Wrong("02.2", "repeated-heads", "repeats K and V to all query heads before caching", repeated_heads, "SnapKV#16"),
    Wrong("02.2", "not-appended", "never appends", never_appended),
    Wrong("02.2", "appended-too-much", "appends the token twice", appended_twice),
    Wrong("02.2", "newest-left-out", "reads before it appends", read_before_append),
    Wrong("02.2", "cache-unread", "attends to the new token alone", cache_unread),
    Wrong("02.2", "causal-square", "is_causal=True, which lets one row see key 0 only", by_is_causal_in_a_step),
    Wrong("02.2", "k-and-v-swapped", "unpacks read() as values, keys", values_as_keys),
    Wrong("02.2", "k-and-v-swapped", "unpacks project() as q, v, k", projected_in_another_order),
    Wrong("02.2", "shape", "returns heads, not the hidden state", forgot_merge),
    Wrong("02.3", "no-cache", "runs the whole sequence each time, cache unused", without_the_cache,
           "a popular judge passes it"),
    Wrong("02.3", "re-fed", "feeds the whole sequence through the cache", whole_sequence_re_fed),
    Wrong("02.3", "last-token-fed-twice", "runs the prompt's last token again", last_prompt_token_again),
    Wrong("02.3", "one-step-too-many", "runs the last token too", one_step_too_many),
    Wrong("02.3", "one-short", "the last token is not appended to the result", last_not_kept),
    Wrong("02.3", "prompt-returned", "returns prompt and answer", prompt_returned),
    Wrong("02.3", "prefill-in-steps", "feeds the prompt token by token", prompt_in_steps),
    Wrong("02.3", "other-cache", "makes a cache of its own", own_cache),
    Wrong("02.3", "cache-emptied", "resets the cache it was given", cache_emptied),
    Wrong("02.3", "prompt-cut", "feeds the prompt's last token only", loop_with(first=lambda tokens: tokens[:, -1:])),
    Wrong("02.3", "prompt-cut", "feeds all but the prompt's last token", loop_with(first=all_but_the_last)),
    Wrong("02.3", "too-many", "keeps one token more", one_too_many),
    Wrong("02.3", "several-fed", "feeds the likeliest token of every row", all_rows),
    Wrong("02.3", "tokens", "takes the first row's logits", first_row),
    Wrong("02.3", "cache-not-empty", "slices the prompt by the cache's length", sliced_by_the_cache),
    Wrong("02.3", "prefill-unused", "does not keep the token that prefill gives", first_not_kept),
    Wrong("02.3", "held-fed-again", "feeds the last two tokens", two_at_a_time),
    Wrong("02.4", "wrong-dtype", "float32 memory under a bfloat16 model", Float32Memory,
           "rasbt/LLMs-from-scratch, optimized variant"),
    Wrong("02.4", "wrong-device", "memory on the CPU under a model that is elsewhere", CpuMemory),
    Wrong("02.4", "capacity-off-by-one", "refuses the last place", LastPlaceRefused),
    Wrong("02.4", "overflow", "drops what does not fit", DropsWhatDoesNotFit),
    Wrong("02.4", "overflow", "trusts the write to fail; a slice past the end takes nothing, silently", NoTestForRoom),
    Wrong("02.4", "half-done", "counts before it tests for room", CountsBeforeItTests),
    Wrong("02.4", "reads-slack", "returns the unwritten memory too", ReadsSlack),
    Wrong("02.4", "overwritten", "writes always at the start", AlwaysAtTheStart),
    Wrong("02.4", "grew-again", "concatenates up to a limit", ConcatenatesWithALimit),
    Wrong("02.4", "read-copies", "clones when it is read", ReadClones),
    Wrong("02.4", "shared-between-caches", "keeps its memory on the class", MemoryOnTheClass),
    Wrong("02.4", "room-for-some", "tests whether it is full, not whether all that comes fits", TestsWhetherFull),
    Wrong("02.4", "room-for-some", "tests for room from the second append on", TestsFromTheSecondAppend),
    Wrong("02.4", "other-error", "asserts that there is room", Asserts),
    Wrong("02.4", "other-error", "raises IndexError when it is full", RaisesIndexError),
    Wrong("02.4", "allocated-again", "allocates at every append", AllocatesEachTime),
    Wrong("02.4", "seq-len", "never counts", LengthStaysZero),
    Wrong("02.4", "k-holds-v", "one memory under two names", OneMemoryForBoth),
    Wrong("02.4", "v-holds-k", "writes K into both", KeysInBoth),
    Wrong("02.4", "one-written", "writes the first of several new tokens", WritesOneToken),
    Wrong("02.4", "misplaced", "writes from the end of the memory", WritesAtTheEnd),
    Wrong("02.4", "missing-method", "has no append", NoAppend),
    Wrong("02.5", "nothing-left-to-run", "reuses the whole prompt", longest_common, "nano-vllm#144"),
    Wrong("02.5", "matches-anywhere", "counts equal tokens behind a difference", equal_anywhere),
    Wrong("02.5", "matches-anywhere", "counts tokens that both hold", shared_tokens),
    Wrong("02.5", "assumes-same-beginning", "reuses all that is held", all_that_is_held),
    Wrong("02.5", "one-too-few", "always holds one token back", always_one_less),
    Wrong("02.5", "raised", "walks off the end of what is held", walks_off_the_end),
    Wrong("02.5", "counts-what-runs", "returns how many must be run", tokens_to_run),
    Wrong("02.5", "arguments-changed", "pops the prompt's last token", pops_what_it_was_given),
    Wrong("02.5", "not-a-number", "returns the tokens", the_tokens_themselves),
    Wrong("02.6", "k-only", "forgets the values", bytes_with(kinds=1)),
    Wrong("02.6", "query-heads", "counts query heads", bytes_with(heads=lambda spec: spec.num_heads)),
    Wrong("02.6", "group-size", "takes the group size for the number of KV heads",
           bytes_with(heads=lambda spec: spec.num_heads // spec.num_kv_heads), "rasbt/LLMs-from-scratch#922"),
    Wrong("02.6", "hidden-size", "takes hidden_size for the KV heads' dimensions",
           bytes_with(heads=1, head_dim=lambda spec: spec.hidden_size)),
    Wrong("02.6", "one-layer", "counts one layer", bytes_with(layers=1)),
    Wrong("02.6", "one-row", "forgets the batch", bytes_with(batch=1)),
    Wrong("02.6", "bits", "counts bits", bytes_with(kinds=16)),
    Wrong("02.6", "units", "scales to KiB", bytes_with(kinds=2 / 1024)),
    Wrong("02.6", "elements", "leaves out the bytes per element", elements),
    Wrong("02.6", "fixed-dtype", "writes 2 bytes down", bytes_in_float16),
    Wrong("02.6", "one-token", "forgets the tokens", bytes_with(tokens=1)),
    Wrong("02.6", "hard-coded", "writes the lab model's sizes down", bytes_with(layers=30, heads=3, head_dim=64)),
    Wrong("02.6", "hard-coded", "writes 30 layers down", bytes_with(layers=30)),
    Wrong("02.6", "not-whole", "divides with /", bytes_through_gigabytes),
    Wrong("02.6", "factor", "counts the layers twice", bytes_with(kinds=lambda spec: 2 * spec.num_layers)),
    Wrong("02.7", "mask-offset", "the mask without offset, as it stands in the blank", as_it_stands,
           "hyprstream/hyprstream#1521"),
    Wrong("02.7", "mask-offset", "is_causal, whose triangle starts top left", by_is_causal, "executorch#21749"),
    Wrong("02.7", "mask-offset-too-large", "an offset that is one too large",
           chunk_with(lambda new, kv: ones(new, kv).tril(kv - new + 1))),
    Wrong("02.7", "blind-to-itself", "an offset that is one too small",
           chunk_with(lambda new, kv: ones(new, kv).tril(kv - new - 1))),
    Wrong("02.7", "no-mask", "no mask", chunk_with(ones)),
    Wrong("02.7", "offset-is-new-tokens", "shifts by the new tokens",
           chunk_with(lambda new, kv: ones(new, kv).tril(new))),
    Wrong("02.7", "offset-negative", "subtracts the wrong way round",
           chunk_with(lambda new, kv: ones(new, kv).tril(new - kv))),
    Wrong("02.7", "mask-added", "a float mask", chunk_with(lambda new, kv: torch.ones(new, kv).tril(kv - new))),
    Wrong("02.7", "mask-added", "a float mask without offset", chunk_with(lambda new, kv: torch.ones(new, kv).tril())),
    Wrong("02.7", "mask-inverted", "triu for tril", chunk_with(lambda new, kv: ones(new, kv).triu(kv - new))),
    Wrong("02.7", "mask-inverted", "True taken for hidden", chunk_with(lambda new, kv: ~causal_mask(new, kv))),
    Wrong("02.7", "new-hidden", "the new columns left False", chunk_with(new_columns_left_false)),
    Wrong("02.7", "cache-hidden", "the cached columns left False", chunk_with(triangle_of_the_new)),
    Wrong("02.1", "first-only", "does not keep what torch.cat returns", KeepsTheFirst),
    Wrong("02.1", "nothing-stored", "joins from the first append on, where nothing is held", StoresNothingAtFirst),
    Wrong("02.1", "promoted", "starts with an empty float32 tensor", StartsWithFloat32),
    Wrong("02.1", "newest-only", "takes several tokens for a new prompt", PrefillReplaces),
    Wrong("02.1", "held-twice", "keeps every piece besides", KeepsEveryPiece),
    Wrong("02.1", "raised", "a buffer of 4,096 tokens", RoomForSome),
    Wrong("02.1", "last-token", "reads the last token", LastTokenRead),
    Wrong("02.1", "seq-len", "a length that is a float", LengthIsAFloat),
    Wrong("02.1", "layout", "counts on contiguous tensors", ByView),
    Wrong("02.1", "precision", "keys through half precision", KeysThroughHalf),
    Wrong("02.2", "position-off-by-one", "the position of the last token held",
           step_with(lambda cache: cache.seq_len - 1)),
    Wrong("02.2", "position", "the same, but never below 0", step_with(lambda cache: max(cache.seq_len - 1, 0))),
    Wrong("02.2", "values", "positions in 8 bits", step_with(lambda cache: cache.seq_len % 256)),
    Wrong("02.2", "query-position", "the query one position behind",
           step_with(query=lambda cache: max(cache.seq_len - 1, 0))),
    Wrong("02.2", "no-scale", "scores not scaled", step_with(attend=lambda *t: by_hand(*t, scale=lambda d: 1))),
    Wrong("02.2", "values", "scores divided by the root of 8, whatever head_dim is",
           step_with(attend=lambda *t: by_hand(*t, scale=lambda d: 8**-0.5))),
    Wrong("02.2", "head-mapping", "repeats KV heads in the wrong order",
           step_with(attend=lambda *t: by_hand(*t, repeat=False))),
    Wrong("02.2", "axis", "softmax over the queries", step_with(attend=lambda *t: by_hand(*t, dim=-2))),
    Wrong("02.2", "values", "sees the newest 256 keys only",
           step_with(attend=lambda q, k, v: attention(q, k[:, :, -256:], v[:, :, -256:]))),
    Wrong("02.2", "recomputed", "projects old tokens again, through a copy of the layer", recompute_through_a_copy),
    Wrong("02.2", "state-kept", "the position kept on the function, right for one prompt at a time",
           position_on_the_function),
    Wrong("02.2", "result-overwritten", "one output tensor for every call", one_buffer),
    Wrong("02.2", "left-pytorch", "attends with NumPy's arrays", through_numpy),
    Wrong("02.2", "expanded", "repeats K and V after the read", step_repeating_after_read),
    Wrong("02.2", "expanded", "repeats K and V, written out", step_with(attend=lambda *t: by_hand(*t))),
    Wrong("02.2", "copied-whole", "joins what it read with the new token, and appends besides", joins_and_appends),
    Wrong("02.3", "cache-not-empty", "takes a cache that holds something for decoding", prefills_empty_caches_only),
    Wrong("02.5", "zero-taken-for-none", "takes a difference at place 0 for none", first_difference_or_length),
    Wrong("02.5", "token-0-ends", "takes token 0 for the end", stops_at_token_0),
    Wrong("02.7", "no-mask", "no mask where something is held", masked_when_nothing_is_held),
    Wrong("02.7", "fixed-offset", "the offset written down", chunk_with(lambda new, kv: ones(new, kv).tril(8))),
    Wrong("02.7", "offset-in-whole-chunks", "takes all chunks for as long as this one",
           chunk_with(lambda new, kv: ones(new, kv).tril((kv // new - 1) * new))),
    Wrong("02.7", "precision", "a float32 mask of -inf, whatever q is",
           chunk_with(lambda new, kv: torch.full((new, kv), -torch.inf).triu(kv - new + 1))),
    Wrong("02.3", "no-cache", "feeds the newest token, without the cache", newest_without_cache),
    Wrong("02.3", "cache-in-some-calls", "uses the cache in prefill only", cache_in_prefill_only),
    Wrong("02.3", "prefill-in-steps", "feeds the prompt's last token separately", prompt_in_two),
    Wrong("02.3", "from-labkit", "lets labkit generate", by_the_library),
    Wrong("02.3", "cache-changed", "resets the cache at the end", reset_at_the_end),
    Wrong("02.3", "model-not-called", "remembers answers by prompt", remembered),
    Wrong("02.3", "re-fed", "feeds the prompt each time", prompt_each_time),
    Wrong("02.3", "one-short", "leaves the last token zero", last_left_zero),
    Wrong("02.3", "stopped-early", "stops at token 2", loop_with(ends=lambda fed: bool((fed == 2).all()))),
    Wrong("02.3", "stopped-early", "stops at token 0", loop_with(ends=lambda fed: bool((fed == 0).any()))),
    Wrong("02.3", "tokens", "draws the next token", loop_with(lambda logits: logits[:, -1].softmax(-1).multinomial(1))),
    Wrong("02.3", "one-row", "the first row's token for all rows",
           loop_with(lambda logits: logits[:1, -1:].argmax(-1).expand(logits.shape[0], 1))),
    Wrong("02.3", "tokens-changed", "token ids through half precision",
           loop_with(first=lambda tokens: tokens.half().long())),
    Wrong("02.3", "dtype", "tokens in 32 bits", loop_with(lambda logits: logits[:, -1:].argmax(-1).int())),
    Wrong("02.4", "never-written", "forgets to write V", ValuesForgotten),
    Wrong("02.4", "misplaced", "counts before it writes", LengthBeforeTheWrite),
    Wrong("02.4", "other-capacity", "allocates 2,048 places at least", RoomFor2048),
    Wrong("02.4", "other-capacity", "allocates one place more", OnePlaceMore),
    Wrong("02.4", "other-capacity", "keeps as much memory again in an inner object", SpareInside),
    Wrong("02.4", "half-done", "allocates before it tests for room", AllocatesBeforeItTests),
    Wrong("02.4", "shared-between-caches", "keeps its capacity on the class", CapacityOnTheClass),
    Wrong("02.4", "raised", "writes three heads down", ThreeHeads),
    Wrong("02.4", "read-copies", "reads a contiguous copy", ReadsContiguous),
    Wrong("02.4", "newest-only", "assigns in place of writing", RebindsInPlaceOfWriting),
    Wrong("02.5", "all-or-nothing", "reuses all that is held, or nothing",
           lambda held, wanted: len(held) if wanted[: len(held)] == held else 0),
    Wrong("02.5", "last-match", "counts up to the last place that agrees",
           lambda held, wanted: min(max((i + 1 for i, pair in enumerate(zip(held, wanted, strict=False))
                                         if pair[0] == pair[1]), default=0), len(wanted) - 1)),
    Wrong("02.5", "identity", "compares with `is`", by_identity),
    Wrong("02.5", "no-difference", "returns len(held) when nothing differs", else_all_held),
    Wrong("02.5", "from-the-end", "compares from the end",
           lambda held, wanted: min(longest_common(held[::-1], wanted[::-1]), len(wanted) - 1)),
    Wrong("02.5", "one-too-many", "counts the first that differs", lambda h, w: longest_common(h, w) + 1),
    Wrong("02.5", "counts-what-goes", "returns how many the cache drops",
           lambda held, wanted: len(held) - min(longest_common(held, wanted), len(wanted) - 1)),
    Wrong("02.6", "head-dim", "hidden_size // num_heads for head_dim",
           bytes_with(head_dim=lambda spec: spec.hidden_size // spec.num_heads)),
    Wrong("02.6", "k-only", "forgets the values and counts query heads",
           bytes_with(kinds=1, heads=lambda spec: spec.num_heads)),
    Wrong("02.6", "factor", "head_dim squared for two layers' worth of it",
           bytes_with(kinds=1, layers=1, heads=lambda spec: spec.num_kv_heads * spec.head_dim)),
    Wrong("02.6", "none-multiplied", "takes spec.layers for the number of layers", layers_attribute),
    Wrong("02.7", "no-mask", "a diagonal so far to the right that nothing is hidden",
           chunk_with(lambda new, kv: ones(new, kv).tril(kv))),
    Wrong("02.7", "cache-hidden", "cuts k and v to the new tokens", only_the_new_keys),
    Wrong("02.7", "mask-weak", "-100 for hidden scores", lambda q, k, v: chunk_by_hand(q, k, v, hidden=-100.0)),
    Wrong("02.7", "mask-flipped", "a mirrored triangle", chunk_with(lambda new, kv: ones(new, kv).tril().flip(1))),
    Wrong("02.7", "values", "an offset of half of kv_len", chunk_with(lambda new, kv: ones(new, kv).tril(kv // 2))),
    Wrong("02.7", "raised", "keeps masks by the number of new tokens", masks_by_new_tokens),
    Wrong("02.7", "no-scale", "scores not scaled", lambda q, k, v: chunk_by_hand(q, k, v, scale=lambda d: 1)),
    Wrong("02.7", "layout", "counts on contiguous queries",
           lambda q, k, v: chunk_by_hand(q.view(-1).view(q.shape), k, v)),
]  # fmt: skip

RIGHT: list[tuple[str, Callable]] = [
    ("02.1", OneTensor),
    ("02.2", step_by_einsum),
    ("02.3", plain_loop),
    ("02.4", AllocatesWith),
    ("02.4", WritesByIndex),
    ("02.4", WritesWithCopy),
    ("02.5", prefix_by_recursion),
    ("02.5", prefix_by_slices),
    ("02.6", bytes_by_tensors),
    ("02.6", lambda spec, tokens, batch, bytes_per_element: bytes_with()(spec, tokens, batch, bytes_per_element)),
    ("02.7", chunk_with(causal_mask)),
    ("02.7", lambda q, k, v: online_attention(q, k, v)),
    ("02.1", Slots),
    ("02.1", Doubling),
    ("02.1", LengthIsATensor),
    ("02.2", step_with(attend=lambda *t: attention(*(x.double() for x in t)).to(t[0].dtype))),
    ("02.3", by_forward),
    ("02.3", loop_with(lambda logits: logits[:, -1].topk(1).indices)),
    ("02.4", AnotherLayout),
    ("02.4", LooksForNaN),
    ("02.4", StacksFirst),
    ("02.5", lambda held, wanted: np.int64(longest_common(held, wanted[:-1]))),
    (
        "02.6",
        lambda spec, tokens, batch, bytes_per_element: np.int64(bytes_with()(spec, tokens, batch, bytes_per_element)),
    ),
    ("02.7", token_by_token),
    ("02.7", chunk_by_hand),
    ("02.7", lambda q, k, v: chunk_by_hand(q, k, v, dtype=torch.float32)),
    ("02.7", lambda q, k, v: chunk_by_hand(q, k, v, hidden=torch.finfo(q.dtype).min)),
    ("02.2", by_kv_head_and_float32),
    ("02.7", additive_mask),
]

WRONG += later_answers.WRONG
RIGHT += later_answers.RIGHT
