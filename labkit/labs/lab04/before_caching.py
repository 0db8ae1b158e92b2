"""04.6: K and V repeated before they are cached, to mend."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from labkit.attention import online_attention as attention
from labkit.cache.dense import GrowingCache
from labkit.course.checks.suspects import Suspect, accuse
from labkit.course.checks.tensors import agree, bytes_made, heads
from labkit.course.exercise import Exercise
from labkit.labs.lab04.references import cached_attention
from labkit.ledger import ledger


class CachedAttention(Exercise):
    """Right answers, three times the memory."""

    id, title, minutes, difficulty = "04.6", "Debug: a cache as large as without GQA", 4, 2
    needs = ("04.1",)
    reference = staticmethod(cached_attention)
    hints = (
        "Write down the shape of what is appended. How many heads does the model have for K?",
        "Append k and v as they came. grouped_attention takes fewer KV heads than query heads: nothing need be "
        "repeated anywhere.",
        "cache.append(k, v)\nkeys, values = cache.read()\nreturn grouped_attention(q, keys, values)",
    )
    hints_for: ClassVar = {
        "repeats-at-every-step": "Memory is mended; now the whole cache is copied at each step: section 2.",
        "heads-dropped": "Each KV head holds something else. Which query heads read the second one?",
    }

    def examine(self, answer: Callable) -> None:
        """A prompt and two steps: what the cache was given, then the outputs, then the work of a step."""
        for num_heads, num_kv_heads in ((6, 2), (6, 3), (4, 1)):
            cache, tokens = GrowingCache(), 0
            q, k, v = heads(num_heads, num_kv_heads, 7, 0)
            for new in (4, 1, 2):
                part = slice(tokens, tokens + new)
                tokens += new
                got = self.call_with(answer, q[:, :, part], k[:, :, part], v[:, :, part], cache)
                self.check_kept(cache, k[:, :, :tokens], v[:, :, :tokens], num_heads)
                self.check_output(got, q[:, :, part], k[:, :, :tokens], v[:, :, :tokens], new)
        self.check_work(answer)

    def call_with(self, answer: Callable, q: Tensor, k: Tensor, v: Tensor, cache: GrowingCache) -> Tensor:
        """One call; the cache is meant to change, the tensors are not."""
        kept = [x.clone() for x in (q, k, v)]
        got = self.run(lambda: answer(q, k, v, cache))
        self.check_unchanged(kept, [q, k, v])
        self.check_returned(got)
        return got

    def check_kept(self, cache: GrowingCache, k: Tensor, v: Tensor, num_heads: int) -> None:
        """The cache holds K and V of every token, with as many heads as there are."""
        held = cache.held()
        if held is None or held[0].shape[2] != k.shape[2]:
            tokens = 0 if held is None else held[0].shape[2]
            self.fail(
                "not-appended",
                seen=f"after {k.shape[2]} tokens the cache holds {tokens}",
                cause="append was not called once for each batch of new tokens",
                look="cache.append(k, v): once, with the new tokens",
            )
        assert held is not None
        if held[0].shape[1] == num_heads and num_heads != k.shape[1]:
            self.fail(
                "repeated-before-caching",
                seen=f"the cache holds {num_heads} heads of K and V; the model has {k.shape[1]}: "
                f"{num_heads // k.shape[1]} times the memory",
                cause="K and V are repeated to all query heads before they are appended",
                look="the order of the lines, and whether the repetition is needed at all",
            )
        if held[0].shape[1] != k.shape[1]:
            self.fail(
                "heads-dropped",
                seen=f"the cache holds {held[0].shape[1]} heads of K and V; the model has {k.shape[1]}",
                cause="heads were cut off or averaged: small, and another model",
                look="what is appended: k and v as they came",
            )
        if torch.equal(held[0], v) and torch.equal(held[1], k):
            self.fail("k-and-v-swapped", seen="the cache's K is V", cause="k and v changed places",
                      look="cache.append(k, v)")  # fmt: skip
        if not (torch.equal(held[0], k) and torch.equal(held[1], v)):
            self.fail(
                "kept-otherwise",
                seen="the cache has the right shape and holds other numbers than K and V",
                cause="heads were reordered, scaled or averaged before the append",
                look="what is appended: k and v as they came",
            )

    def check_output(self, got: Tensor, q: Tensor, k: Tensor, v: Tensor, new: int) -> None:
        """The output, told apart by which keys it saw."""
        want = attention(q, k, v)
        self.like(got, want, what="the output")
        if agree(got, want):
            return
        times = q.shape[1] // k.shape[1]
        accuse(type(self), [
            Suspect("cache-unread", [(k[:, :, -new:], v[:, :, -new:])],
                    "attention got the new k and v, not what the cache holds", "keys, values = cache.read()",
                    "the output depends on the new tokens alone"),
            Suspect("head-mapping", [(k.repeat(1, times, 1, 1), v.repeat(1, times, 1, 1))],
                    "repeat lays whole sets of heads side by side, repeat_interleave keeps neighbours together",
                    "the rule h // num_queries_per_kv; grouped_attention follows it without any repetition",
                    "what is cached is right; query head 1 reads another KV head than before"),
        ], fits=lambda pair: agree(got, attention(q, *pair)))  # fmt: skip
        self.fail(
            "values",
            seen=f"what is cached is right, the output for {new} new tokens is not",
            cause="attention over other keys, in another order, or with another mask",
            look="grouped_attention(q, keys, values), with what cache.read() gives",
        )

    def check_work(self, answer: Callable) -> None:
        """A decode step over 150 tokens makes nothing as large as what is held, but for the append."""
        q, k, v = heads(6, 2, 150, 0, head_dim=64)
        cache = WrittenInPlace(k, v)
        step = q[:, :, -1:], k[:, :, -1:], v[:, :, -1:], cache
        with ledger():
            self.run(lambda: answer(*step))
        made = bytes_made(lambda: answer(*step))
        if made >= k.nbytes:
            self.fail(
                "repeats-at-every-step",
                seen=f"the cache is small now, but a step makes tensors of {made / k.nbytes:.1f} times the bytes of K",
                cause="the repetition moved behind the cache: at every step all that is held is copied",
                look="grouped_attention: it takes num_kv_heads heads as they are",
            )


class WrittenInPlace:
    """A cache that holds all tokens already, and whose append copies nothing."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v, self.seq_len = k, v, k.shape[2] - 1

    def append(self, k: Tensor, v: Tensor) -> None:
        """The new token stands in its place already."""

    def read(self) -> tuple[Tensor, Tensor]:
        """K and V of all tokens, the newest included."""
        return self.k, self.v
