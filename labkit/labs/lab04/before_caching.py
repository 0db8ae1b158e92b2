"""04.6: K and V repeated before they are cached, to mend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from labkit.attention import fused_attention
from labkit.cache import GrowingCache, LayerCache, PreallocatedCache
from labkit.course.checks import attention
from labkit.course.checks.attention import attend
from labkit.course.checks.copies import check_new_tokens, check_step, counted, steps
from labkit.course.checks.held import bytes_behind
from labkit.course.checks.suspects import Suspect, accuse
from labkit.course.checks.tensors import LOOSE, agree, heads
from labkit.course.exercise import Exercise
from labkit.labs.lab04.grouped import far_down
from labkit.labs.lab04.references import cached_attention

AS_READ = "what is done to what was read: nothing need be. grouped_attention takes fewer KV heads than query heads"


@dataclass
class Layer:
    """One layer's cache, and the tokens that are to go through it."""

    cache: LayerCache
    q: Tensor
    k: Tensor
    v: Tensor
    options: dict = field(default_factory=dict)  # with which the cache was made
    tokens: int = 0
    outputs: list[tuple[Tensor, int]] = field(default_factory=list)  # what came back, and how many tokens were held

    def call(self, held: int, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The queries of one output, and K and V of all tokens up to them."""
        end = held + output.shape[2]
        return self.q[:, :, held:end], self.k[:, :, :end], self.v[:, :, :end]


class CachedAttention(Exercise):
    """Right answers, three times the memory."""

    id, title, minutes, difficulty = "04.6", "Debug: out of memory at a third of the context", 4, 2
    needs = ("04.1",)
    reference = staticmethod(cached_attention)
    why = (
        "What is appended is what stays in memory, so it must be the few heads as they came; the group is resolved "
        "where q meets them, and grouped_attention does that without a copy."
    )
    hints = (
        "Write down the shape of what is appended. How many heads does the model have for K?",
        "Append k and v as they came. grouped_attention takes fewer KV heads than query heads: nothing need be "
        "repeated anywhere.",
        "cache.append(k, v)\nkeys, values = cache.read()\nreturn grouped_attention(q, keys, values)",
    )
    hints_for: ClassVar = {
        "expanded": "Memory is mended; now the whole cache is copied at each step: section 2.",
        "heads-dropped": "Each KV head holds something else. Which query heads read the second one?",
        "cache-unread": "Which of the names holds the tokens of earlier steps?",
    }

    def examine(self, answer: Callable) -> None:
        """Prompts and steps in several layers at once: what each cache was given, the outputs, the work of a step."""
        for script in ((4, 1, 2), (1, 3, 1, 1), (5, 5)):
            self.check_script(answer, script)
        self.check_long(answer)
        self.check_work(answer)
        for dtype in (torch.bfloat16, torch.float64):
            self.check_dtype(answer, dtype)

    def check_script(self, answer: Callable, script: tuple[int, ...]) -> None:
        """The same new tokens in several layers, one after the other, as a model runs them."""
        layers, before = layers_of(sum(script)), bytes_behind(answer)
        for new in script:
            for layer in layers:
                part = slice(layer.tokens, layer.tokens + new)
                layer.tokens += new
                step = [x[:, :, part] for x in (layer.q, layer.k, layer.v)]
                got = self.call(partial(with_cache, answer, layer.cache), *step)
                self.check_kept(layer.cache, layer.k[:, :, : layer.tokens], layer.v[:, :, : layer.tokens],
                                layer.q.shape[1], new)  # fmt: skip
                self.check_output(got, layer, new, layers)
                self.check_held(layer)
        more = bytes_behind(answer) - before
        if more > sum(layer.k.nbytes for layer in layers) // 2:  # a mask may be kept, K may not
            self.fail(
                "kept-besides",
                seen=f"the function itself holds {more:,} bytes more than before",
                cause="tensors are kept outside the cache, in a list, an attribute or a default argument",
                look="what outlives a call: the cache alone should",
            )

    def check_long(self, answer: Callable) -> None:
        """One token after many: all of them are seen."""
        q, k, v = (x.float() for x in heads(4, 2, 1, 2_050, batch=1, head_dim=8))
        got = self.call(partial(with_cache, answer, WrittenInPlace(k, v, 1)), q, k[:, :, -1:], v[:, :, -1:])
        self.same(got, attend(q, k, v), what="1 new token after 2,050: the output", tolerance=LOOSE)

    def check_dtype(self, answer: Callable, dtype: torch.dtype) -> None:
        """Other dtypes: what is kept and what comes back has the dtype of what went in."""
        q, k, v = (x.to(dtype) for x in heads(6, 2, 7, 0))
        cache = GrowingCache()
        got = self.call(partial(with_cache, answer, cache), q, k, v)
        self.check_kept(cache, k, v, 6, k.shape[2])
        wide = attend(q.double(), k.double(), v.double()).to(dtype)
        tolerance = LOOSE if dtype == torch.float64 else 0.05
        self.same(got, wide, what=f"the output of {str(dtype).removeprefix('torch.')} tensors", tolerance=tolerance)

    def check_kept(self, cache: LayerCache, k: Tensor, v: Tensor, num_heads: int, new: int) -> None:
        """The cache holds K and V of every token, the last `new` of them new, with as many heads as there are."""
        held = cache.held()
        if held is None or held[0].shape[2] != k.shape[2]:
            tokens = 0 if held is None else held[0].shape[2]
            came = tokens - (k.shape[2] - new)
            self.fail(
                "not-appended",
                seen=f"after {k.shape[2]} tokens, {new} of them new, the cache holds {tokens}",
                cause="append was not called"
                if came == 0
                else "append got only some of the new tokens"
                if 0 < came < new
                else "append was called twice, or got more than the new tokens"
                if came > new
                else "the cache holds fewer tokens than before: they were dropped",
                look="cache.append(k, v): once, with the new tokens",
            )
        assert held is not None
        if held[0].shape[1] == num_heads and num_heads != k.shape[1]:
            self.fail(
                "repeated-before-caching",
                seen=f"the cache holds {held[0].shape[1]} heads of K and V; {k.shape[1]} came in: "
                f"{num_heads // k.shape[1]} times the memory",
                cause="K and V no longer have the shape in which they came when they are appended",
                look="k.shape in the first line of your function, and in the line that appends",
            )
        if held[0].shape[1] != k.shape[1]:
            self.fail(
                "heads-dropped",
                seen=f"the cache holds {held[0].shape[1]} of the {k.shape[1]} heads of K and V",
                cause="heads were cut off or averaged: small, and another model",
                look="what is appended: k and v as they came",
            )
        if torch.equal(held[0], v) and torch.equal(held[1], k):
            self.fail("k-and-v-swapped", seen="the cache's K is V", cause="k and v changed places",
                      look="cache.append(k, v)")  # fmt: skip
        if held[0].dtype != k.dtype:
            self.fail(
                "kept-in-another-dtype",
                seen=f"k and v came in as {k.dtype}; the cache holds {held[0].dtype}",
                cause="K and V were cast before the append: other numbers, and another size",
                look="what is appended: k and v as they came",
            )
        if not (torch.equal(held[0], k) and torch.equal(held[1], v)):
            self.fail(
                "kept-otherwise",
                seen="the cache has the right shape and holds other numbers than K and V",
                cause="something was done to k or v before the append, or after it",
                look="what is appended: k and v as they came",
            )

    def check_held(self, layer: Layer) -> None:
        """The cache keeps alive what it would keep if nobody but append wrote to it."""
        twin = type(layer.cache)(**layer.options)
        twin.append(layer.k[:, :, : layer.tokens], layer.v[:, :, : layer.tokens])
        held, enough = bytes_behind(layer.cache), bytes_behind(twin)
        if held > enough:
            self.fail(
                "kept-besides",
                seen=f"the cache keeps {held:,} bytes alive after {layer.tokens} tokens; K and V take {enough:,}",
                cause="something else was hung onto the cache",
                look="append is all that writes to it",
            )

    def check_output(self, got: Tensor, layer: Layer, new: int, layers: Sequence[Layer]) -> None:
        """The output, told apart by which keys it saw: by what explains it and every output of every layer before."""
        q, k, v, tokens = layer.q, layer.k, layer.v, layer.tokens
        want = attend(q[:, :, tokens - new : tokens], k[:, :, :tokens], v[:, :, :tokens])
        if agree(got, want, LOOSE):
            self.like(got, want, what="the output")
            layer.outputs.append((want, tokens - new))
            return
        earlier = [(out, suspects(*each.call(first, out))) for each in layers for out, first in each.outputs]
        for place, suspect in enumerate(suspects(*layer.call(tokens - new, want))):
            for variant, gives in enumerate(suspect.gives):
                if agree(got, gives(), LOOSE, nan=True) and all(
                    agree(out, listed[place].gives[variant](), LOOSE, nan=True)
                    for out, listed in earlier if variant < len(listed[place].gives)
                ):  # fmt: skip
                    accuse(type(self), [suspect], fits=lambda _: True)
        what = f"{counted(new)} after {tokens - new}: what is cached is right; the output"
        self.same(got, want, what=what, tolerance=LOOSE)

    def check_work(self, answer: Callable) -> None:
        """A step over many tokens makes nothing as large as what one head holds, but for the append, and reads K and
        V once. A cast is let pass, as in 04.1."""
        for when, q, k, v in steps():
            new = q.shape[2]
            run = partial(answer, q, k[:, :, -new:], v[:, :, -new:], WrittenInPlace(k, v, new))
            # One after the other, new tokens read K and V again; in one call for all they need not.
            check_step(type(self), run, k, v, when, once=new == 1, enable_gqa=True, look=AS_READ)
            step = k[:, :, -new:].clone(), v[:, :, -new:].clone()
            run = partial(answer, q, *step, WrittenInPlace(k, v, new))
            check_new_tokens(type(self), run, *step, when)


def with_cache(answer: Callable, cache: LayerCache | WrittenInPlace, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One call, whose cache is meant to change."""
    return answer(q, k, v, cache)


def layers_of(tokens: int) -> list[Layer]:
    """Layers whose sizes differ, two of one size, caches of both kinds, and one with scores near -1e5."""
    kinds = (GrowingCache, GrowingCache, PreallocatedCache, GrowingCache, GrowingCache)
    sizes = ((6, 2, 3, 8), (6, 2, 3, 8), (9, 3, 1, 20), (4, 1, 2, 12), (5, 5, 4, 16))
    layers = []
    for make, (num_heads, num_kv_heads, batch, head_dim) in zip(kinds, sizes, strict=True):
        q, k, v = (x.float() for x in heads(num_heads, num_kv_heads, tokens, 0, batch=batch, head_dim=head_dim))
        # As a projection gives them: heads behind tokens in memory.
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        options = {"capacity": tokens + 3} if make is PreallocatedCache else {}
        layers.append(Layer(make(**options), q, k, v, options))
    return [*layers, Layer(GrowingCache(), *far_down(tokens, 0))]


def suspects(q: Tensor, k: Tensor, v: Tensor) -> list[Suspect]:
    """What goes wrong around a cache, then in any attention."""
    new = q.shape[2]
    held = k.shape[2] - new

    def over(keys: Tensor, values: Tensor) -> Callable[[], Tensor]:
        return lambda: attend(q, keys, values)

    before = [lambda: attend(q, k[:, :, :held], v[:, :, :held], causal=False)] if held else [over(k, v)]
    return [
        Suspect("cache-unread", [over(k[:, :, held:], v[:, :, held:])],
                "attention got the new k and v, not what the cache holds", "keys, values = cache.read()",
                "the output depends on the new tokens alone"),
        Suspect("read-before-append", before, "the cache was read before the new tokens were appended",
                "the order of the lines: append, read, attend", "new tokens do not see themselves"),
        *attention.now_and_then(q, k, v, attention.suspects(q, k, v)),
    ]  # fmt: skip


class WrittenInPlace:
    """A cache that holds all tokens already, and whose append copies nothing; else what a learner may call on one."""

    def __init__(self, k: Tensor, v: Tensor, new: int) -> None:
        self.k, self.v, self.seq_len = k, v, k.shape[2] - new

    def append(self, k: Tensor, v: Tensor) -> None:
        """The new tokens stand in their places already."""
        self.seq_len = self.k.shape[2]

    def read(self) -> tuple[Tensor, Tensor]:
        """K and V of all tokens so far."""
        return self.k[:, :, : self.seq_len], self.v[:, :, : self.seq_len]

    def attend(self, q: Tensor) -> Tensor:
        """Attention over all tokens so far, as labkit's caches have it."""
        return fused_attention(q, *self.read())
