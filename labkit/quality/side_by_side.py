"""Several caches of one row each through one batch of the model: its weights are read once for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from labkit.attention import Constants
from labkit.cache import Cache, GrowingCache, LayerCache, PreallocatedCache
from labkit.cache.cache import steps
from labkit.cache.evicting import EvictingCache
from labkit.cache.step import Step, rectangle
from labkit.llama import Llama


class Beside:
    """Caches of one row each as one of so many rows, in `model(tokens, cache)`: row i goes through cache i.

    Each has a step of its own; all end together, and those that evict do so. Where anything is raised all stay as they
    were.
    Raises ValueError for caches that are not labkit's, have other numbers of layers, more rows than one or padding, or
    have not seen equally many tokens.
    """

    def __init__(self, caches: Sequence[Any]) -> None:
        for cache in caches:
            if not isinstance(cache, Cache):
                raise ValueError(f"caches of labkit stand side by side in one batch; got a {type(cache).__name__}")
        if not caches or len({id(cache) for cache in caches}) < len(caches):
            raise ValueError("every row of a batch has a cache of its own: one was given twice, or there is none")
        if len(numbers := {len(cache.layers) for cache in caches}) != 1:
            raise ValueError(f"caches side by side have equally many layers; got {sorted(numbers)}")
        self.caches = tuple(caches)
        self.layers = [OneByOne(layers) for layers in zip(*(cache.layers for cache in caches), strict=True)]
        check_alike(self.caches)

    def __len__(self) -> int:
        return len(self.caches)

    @property
    def seq_len(self) -> int:
        """Tokens that each has seen."""
        return self.caches[0].seq_len

    def check_fits(self, num_layers: int, constants: Constants) -> None:
        """As `Cache.check_fits`, of each."""
        for cache in self.caches:
            cache.check_fits(num_layers, constants)

    @contextmanager
    def step(self, counts: Sequence[int], *, padding: Sequence[int] | None = None) -> Iterator[Step]:
        """One pass over the layers: a step of each cache, and that of all rows. ValueError for rows that differ."""
        if len(counts) != len(self) or len(set(counts)) != 1 or padding is not None:
            raise ValueError(f"side by side {len(self)} rows get equally many tokens and no padding; got {counts}")
        check_alike(self.caches)  # somebody may have given one of them tokens of its own
        with steps(self.caches, counts[:1]) as own:
            for layer in self.layers:
                layer.steps = own
            yield rectangle(len(self), counts[0], [step.before[0] for step in own])


class OneByOne:
    """One layer of several caches of one row each, as the layer of a batch. steps: of each cache, set for each pass."""

    def __init__(self, layers: Sequence[LayerCache]) -> None:
        self.layers = layers
        self.steps: Sequence[Step] = ()

    def append(self, k: Tensor, v: Tensor, step: Step) -> None:
        """Each row to its own layer."""
        for row, (layer, own) in enumerate(zip(self.layers, self.steps, strict=True)):
            layer.append(k[row : row + 1], v[row : row + 1], own)

    def attend(self, q: Tensor, step: Step) -> Tensor:
        """Of each row through its own layer."""
        rows = zip(q.split(1), self.layers, self.steps, strict=True)
        return torch.cat([layer.attend(row, own) for row, layer, own in rows])


@torch.inference_mode()
def logits_beside(model: Llama, caches: Sequence[Cache], tokens: Tensor, last: int | None = None) -> Tensor:
    """Of the last tokens (all) of each row, `[rows, last, vocab_size]`: row i of int `[rows, tokens]` through cache i.

    The caches evict no more: no step of theirs is ended, and they are of no use afterwards. One that reads less in a
    step of one token alone gets them one by one. Raises ValueError for caches of several rows, with padding or that
    have not seen equally many tokens, and for those that would evict again.
    """
    check_alike(caches)
    if not caches[0].lengths:
        raise ValueError("caches side by side that evict no more have read a text: these are empty")
    if any(getattr(layer, "during", "prompt") != "prompt" for cache in caches for layer in cache.layers):
        raise ValueError('side by side no cache evicts: take those that evict once, during="prompt"')
    step = rectangle(len(caches), tokens.shape[1], [caches[0].seq_len] * len(caches))
    layers = [SideBySide(layers) for layers in zip(*(cache.layers for cache in caches), strict=True)]
    stream = model.run(tokens, layers, step)  # type: ignore[arg-type]
    return model.predict(stream if last is None else stream[:, -last:])


def check_alike(caches: Sequence[Cache]) -> None:
    """Raise ValueError unless each has one row without padding, or is empty, and all have seen equally many tokens."""
    lengths = {cache.lengths for cache in caches}
    if len(lengths) != 1 or len(min(lengths)) > 1:
        raise ValueError(f"caches side by side have one row each and have seen equally many tokens; got {lengths}")
    if any(cache.padding for cache in caches):
        raise ValueError("caches side by side have no padding: their tokens stand at the same places")


class SideBySide:
    """One layer of several caches of one row each, as the layer of a batch: row i goes through cache i.

    Those that later queries see all of, and that hold equally many tokens, become one with as many rows.
    """

    def __init__(self, layers: Sequence[LayerCache]) -> None:
        rows: dict[Any, list[int]] = {}
        for row, layer in enumerate(layers):
            rows.setdefault(seen_whole(layer) or row, []).append(row)
        self.groups = [(own, joined([layers[row] for row in own])) for own in rows.values()]
        self.order = torch.tensor([row for own, _ in self.groups for row in own]).argsort()
        self.new: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor, step: Step) -> None:
        """Keep K and V for `attend`."""
        self.new = k, v

    def attend(self, q: Tensor, step: Step) -> Tensor:
        """Of each row through its own layer; token by token where that reads less in a step of one token alone."""
        assert self.new is not None
        found = [attended(layer, *(x[rows] for x in (q, *self.new))) for rows, layer in self.groups]
        return torch.cat(found)[self.order]


def seen_whole(layer: LayerCache) -> tuple[int, Constants] | None:
    """What layers must have in common to become the rows of one; None for one that a row of its own is left to.

    Later queries see all that such a layer holds, in its numbers and as it was turned.
    """
    if type(layer) not in (GrowingCache, PreallocatedCache, EvictingCache) or layer.constants.window is not None:
        return None
    if isinstance(layer, EvictingCache):
        if layer.frequencies is not None or layer.kept is None or layer.kept.hides:
            return None
    return layer.physical_len, layer.constants


def joined(layers: Sequence[LayerCache]) -> LayerCache:
    """Layers that are `seen_whole` alike as the rows of one that keeps all; a single layer as it is."""
    if len(layers) == 1:
        return layers[0]
    held, constants = [layer.read() for layer in layers], layers[0].constants
    one = GrowingCache(scale=constants.scale, soft_cap=constants.soft_cap)
    keys, values = (torch.cat(side) for side in zip(*held, strict=True))
    one.append(keys, values)
    return one


def attended(layer: LayerCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Append K and V and answer the queries, `[rows, num_heads, new_tokens, head_dim]`."""
    outs = []
    for some in zip(*(x.split(1 if layer.selects else x.shape[2], dim=2) for x in (q, k, v)), strict=True):
        layer.append(*some[1:])
        outs.append(layer.attend(some[0]))
    return torch.cat(outs, dim=2)
