"""A model's cache: one `LayerCache` per layer, and what all layers share: where a step begins, and how it is undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from labkit.attention import Constants
from labkit.cache.dense import GrowingCache, PreallocatedCache
from labkit.cache.evicting import (
    Budget,
    EvictingCache,
    EvictingQuantizedCache,
    Merging,
    MergingCache,
    Policy,
    each_layer,
)
from labkit.cache.layer import LayerCache, checked_rows
from labkit.cache.paged import PagedCache, Pages
from labkit.cache.paged_quantized import PagedQuantizedCache
from labkit.cache.quantized import QuantizedCache
from labkit.cache.selecting import SelectingCache
from labkit.cache.step import Step
from labkit.interrupts import uninterrupted


@dataclass(frozen=True, eq=False)
class Begun:
    """A step of a cache, and what undoing it takes: a mark of each layer, and what was known of padding."""

    step: Step
    marks: tuple[Any, ...]
    padding: tuple[tuple[int, ...], bool]


class Cache:
    """One `LayerCache` per layer, and which tokens are padding.

    padding: how many tokens at the left of each row are none; empty where no row has any. Set by `step`.
    """

    def __init__(self, layers: Sequence[LayerCache]) -> None:
        if not layers:
            raise ValueError("a cache needs at least one layer")
        if len({id(layer) for layer in layers}) < len(layers):
            raise ValueError("every layer needs a cache of its own: the same one was given twice")
        if held := next((layer for layer in layers if layer.lengths), None):
            raise ValueError(
                f"a cache is made of empty layers, since the layers do not know which tokens are padding; a "
                f"{type(held).__name__} holds {held.seq_len} tokens"
            )
        self.layers = list(layers)
        self.padding: tuple[int, ...] = ()
        self.knows_padding = True
        self.torn = False

    @classmethod
    def of(cls, num_layers: int, make_layer: Callable[[], LayerCache]) -> Cache:
        """A cache of `num_layers` layers, each made by `make_layer()`."""
        return cls([make_layer() for _ in range(num_layers)])

    @classmethod
    def growing(cls, num_layers: int, *, window: int | None = None) -> Cache:
        """A cache that concatenates at every step. `window`: as the model's attention has it (`Llama.cache` knows)."""
        return cls.of(num_layers, lambda: GrowingCache(window=window))

    @classmethod
    def preallocated(cls, num_layers: int, capacity: int, *, window: int | None = None) -> Cache:
        """A cache with room for `capacity` tokens per row, written in place. `window`: as in `growing`."""
        return cls.of(num_layers, lambda: PreallocatedCache(capacity, window=window))

    @classmethod
    def quantized(cls, num_layers: int, nbits: int | torch.dtype = 4, **options: Any) -> Cache:
        """A cache of packed K and V; the options are those of `QuantizedCache`. `window`: as in `growing`."""
        return cls.of(num_layers, lambda: QuantizedCache(nbits, **options))

    @classmethod
    def paged(
        cls,
        num_layers: int,
        num_blocks: int,
        block_size: int = 16,
        *,
        window: int | None = None,
        nbits: int | torch.dtype | None = None,
        **options: Any,
    ) -> Cache:
        """A cache of `num_blocks` blocks of `block_size` tokens in every layer. `window`: as in `growing`.

        nbits: packs full blocks; the other options are then those of `PagedQuantizedCache`.
        """
        pages = Pages(num_blocks, block_size)
        if nbits is None:
            return cls.of(num_layers, lambda: PagedCache(pages, window=window, **options))
        return cls.of(num_layers, lambda: PagedQuantizedCache(pages, nbits, window=window, **options))

    @classmethod
    def evicting(
        cls,
        num_layers: int,
        policy: Policy | Callable[[int], Policy],
        budget: Budget | Sequence[Budget] | Callable[[int], Budget],
        *,
        nbits: int | torch.dtype | None = None,
        **options: Any,
    ) -> Cache:
        """A cache that keeps the tokens `policy` chooses, or merges them; the options are those of `EvictingCache`.

        nbits: packs what is kept; the options are then those of `EvictingQuantizedCache`.
        policy: for every layer, or a function of its index. budget: tokens or a fraction of the prompt for every layer,
        a list with one for each (`pyramid` makes one), or a function of its index. `window`: as in `growing`.
        """
        policies = each_layer("policy", policy, num_layers)
        budgets = each_layer("budget", budget, num_layers)
        named = [one.for_layer(layer) if isinstance(one, Policy) else one for layer, one in enumerate(policies)]
        pairs = list(zip(named, budgets, strict=True))
        if nbits is None:
            return cls(
                [
                    MergingCache(one, own, **options)
                    if isinstance(one, Merging)
                    else EvictingCache(one, own, **options)
                    for one, own in pairs
                ]
            )
        return cls([EvictingQuantizedCache(one, own, nbits, **options) for one, own in pairs])

    @classmethod
    def selecting(cls, num_layers: int, budget: int | Sequence[int] | Callable[[int], int], **options: Any) -> Cache:
        """A cache that keeps all and reads `budget` tokens; the options are those of `SelectingCache`.

        budget: for every layer, a list with one for each, or a function of the layer's index: Quest reads all of the
        first two, as `lambda layer: 10**9 if layer < 2 else 512` does. `window`: as in `growing`.
        """
        budgets = each_layer("budget", budget, num_layers)
        return cls([SelectingCache(one, **options) for one in budgets])

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that each row has seen so far, padding included; empty before there are any.

        Raises RuntimeError when the layers disagree: whoever appended to them was interrupted half-way.
        """
        self.check_whole()
        known = {layer.lengths for layer in self.layers}
        if len(known) > 1:
            least, most = (f(layer.seq_len for layer in self.layers) for f in (min, max))
            raise RuntimeError(
                f"the layers hold between {least} and {most} tokens: a pass over them was interrupted. "
                f"truncate({least}) goes back to what all of them hold; reset() starts anew"
            )
        return known.pop()

    def check_whole(self) -> None:
        """Raise RuntimeError when an interrupt left the layers changed in part."""
        if self.torn or any(layer.torn for layer in self.layers):
            raise RuntimeError("only some layers have done what was interrupted: reset() starts anew")

    @property
    def seq_len(self) -> int:
        """Tokens seen so far in the longest row, padding included. Raises RuntimeError when the layers disagree."""
        return max(self.lengths, default=0)

    @property
    def nbytes(self) -> int:
        """Bytes allocated by all layers, and once by what they share."""
        shared = {id(layer.shared): layer.shared.nbytes for layer in self.layers if layer.shared is not None}
        return sum(layer.nbytes for layer in self.layers) + sum(shared.values())

    def check_fits(self, num_layers: int, constants: Constants) -> None:
        """Raise ValueError unless this is a cache for `num_layers` layers of attention with these `constants`."""
        if len(self.layers) != num_layers:
            raise ValueError(f"the cache has {len(self.layers)} layers, the model {num_layers}")
        for index, layer in enumerate(self.layers):
            if replace(layer.constants, causal=True) != constants:  # a recording cache may switch it off
                raise ValueError(
                    f"layer {index} of the cache was made with {told(layer.constants)}, the model attends with "
                    f"{told(constants)}: make the cache with model.cache()"
                )

    @contextmanager
    def step(self, counts: Sequence[int], *, padding: Sequence[int] | None = None) -> Iterator[Step]:
        """One pass over the layers, all or nothing: its `Step`, for every layer's `append` and `attend`.

        counts: new tokens of each row. padding: how many tokens at the left of each row are none, said with the first
        tokens. Whatever is raised inside the `with`, an interrupt included, the layers are afterwards exactly what they
        were. The counters stay: the work was done. When its body has ended well, layers that evict do so: each plans,
        and where one raises all go back; then all settle. Raises ValueError for what cannot be.
        """
        with steps([self], counts, padding=padding) as (step,):
            yield step

    def begin(self, counts: Sequence[int], padding: Sequence[int] | None = None) -> Begun:
        """What a step of so many tokens is, and what undoing it takes; no layer changes. ValueError as `step` says."""
        held = self.lengths
        lengths = held or (0,) * len(counts)
        self.knows_padding |= not held
        if len(lengths) != len(counts):
            raise ValueError(f"the cache holds batch {len(lengths)}; the new tokens have batch {len(counts)}")
        if padding is not None:
            if held:
                raise ValueError("padding is said once per batch, with its first tokens: reset() the cache first")
            padding = tuple(padding) if any(padding) else ()
        elif not self.knows_padding:
            raise ValueError(
                "transformers filled this cache, and did not say which tokens are padding, or rotated keys to "
                "positions that labkit would not give them. If each row counts from 0 behind its padding, set "
                "cache.padding, one number per row, and cache.knows_padding = True; else reset() the cache"
            )
        step = Step(tuple(counts), lengths, self.padding if padding is None else padding, ends=True)
        return Begun(step, tuple(layer.mark() for layer in self.layers), (self.padding, self.knows_padding))

    def undo(self, begun: Begun) -> None:
        """Everything as it was when the step began, which has not been settled."""
        self.torn = True
        for layer, mark in zip(self.layers, begun.marks, strict=True):
            layer.restore(mark)
        self.padding, self.knows_padding = begun.padding
        self.torn = False

    def plan(self, step: Step) -> list[Any]:
        """What each layer will do at the end of this step; neighbours of one kind may decide together."""
        kinds = [list(layers) for _, layers in groupby(self.layers, key=type)]
        return [plan for layers in kinds for plan in layers[0].plan_all(layers, step)]

    def settle(self, plans: Sequence[Any]) -> None:
        """Let each layer do what it planned, all of them: an interrupt that comes in between waits."""
        settle([self], [plans])

    def truncate(self, seq_len: int) -> None:
        """Forget every token from place `seq_len` on, in every row: for a conversation whose last part changes."""
        for layer in sorted(self.layers, key=lambda layer: layer.seq_len):
            layer.check_length(seq_len)
        for layer in self.layers:
            layer.truncate(seq_len)
        self.padding = tuple(min(p, seq_len) for p in self.padding) if seq_len else ()
        self.knows_padding |= seq_len == 0

    def select_rows(self, rows: Tensor) -> None:
        """Row `i` of the batch becomes what row `rows[i]` was.

        Bad rows change nothing. Where it is interrupted (memory runs out, say), some layers have the new rows and some
        the old: the cache then raises RuntimeError until `reset`.
        """
        if not self.lengths:
            return
        chosen = checked_rows(rows, len(self.lengths))
        self.on_every_layer([partial(layer.select_rows, rows) for layer in self.layers])
        self.padding = tuple(self.padding[row] for row in chosen) if self.padding else ()

    def on_every_layer(self, acts: Sequence[Callable[[], object]]) -> None:
        """One act for each layer. Where only some are done when it ends, the cache refuses to go on until `reset`."""
        self.torn = True
        for index, act in enumerate(acts):
            try:
                act()
            except Exception:  # of a layer's own acts, which then have changed nothing
                self.torn = index > 0
                raise
        self.torn = False

    def reset(self) -> None:
        """Forget everything, padding and counters included."""
        for layer in self.layers:
            layer.reset()
        self.padding, self.knows_padding, self.torn = (), True, False

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> LayerCache:
        return self.layers[layer]


@contextmanager
def steps(
    caches: Sequence[Cache], counts: Sequence[int], *, padding: Sequence[int] | None = None
) -> Iterator[list[Step]]:
    """A step of each of several caches, as `Cache.step` says: all of them, or none."""
    begun = [cache.begin(counts, padding) for cache in caches]
    own = [one.step for one in begun]
    try:
        for cache, step in zip(caches, own, strict=True):
            cache.padding = step.padding
        yield own
        # No comprehension: since Python 3.12 what a tracer raises inside one is not caught by its function's `except`.
        plans = list(map(Cache.plan, caches, own))
        settles = any(plan is not None for some in plans for plan in some)
        for cache in caches:
            cache.torn = settles  # from here on: all of it, or a refusal
    except BaseException:
        for cache, one in zip(caches, begun, strict=True):
            cache.undo(one)
        raise
    settle(caches, plans)


def settle(caches: Sequence[Cache], plans: Sequence[Sequence[Any]]) -> None:
    """`Cache.settle` of several, all of them."""
    planned = [
        (layer, plan)
        for cache, some in zip(caches, plans, strict=True)
        for layer, plan in zip(cache.layers, some, strict=True)
        if plan is not None
    ]
    if not planned:
        return
    for cache in caches:
        cache.torn = True
    with uninterrupted():
        for layer, plan in planned:
            layer.settle(plan)
        for cache in caches:
            cache.torn = False


def told(constants: Constants) -> str:
    """Those that are not the default, in words."""
    said = [f"{name}={value}" for name, value in vars(constants).items() if value != getattr(Constants(), name)]
    return ", ".join(said) or "window=None"
