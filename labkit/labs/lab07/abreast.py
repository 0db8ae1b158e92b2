"""Caches that have read one text, each in its own way, as the rows of one batch: the model runs once for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from labkit.cache import Cache, LayerCache
from labkit.cache.layer import Observer
from labkit.cache.step import Step


class AbreastLayer(LayerCache):
    """One layer of several caches; each is a row and holds tokens, and as many of them, of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: tuple[LayerCache, ...] = ()

    def take(self, rows: Sequence[LayerCache]) -> None:
        """Let these be the rows; each is a cache of one row."""
        self.rows, self.constants = tuple(rows), rows[0].constants
        self.lengths = tuple(length for row in rows for length in row.lengths)

    @property
    def nbytes(self) -> int:
        """Of all rows."""
        return sum(row.nbytes for row in self.rows)

    def template(self) -> None:
        """Each row asks for itself."""

    def held(self) -> tuple[Tensor, Tensor] | None:
        """Not as one tensor: rows hold different numbers of tokens."""
        raise NotImplementedError("rows hold different numbers of tokens: read each by itself, `layer.rows[i].read()`")

    def write(self, k: Tensor, v: Tensor, step: Step) -> None:
        """To each row its own."""
        for row, own_k, own_v in zip(self.rows, k.split(1), v.split(1), strict=True):
            row.append(own_k, own_v)

    def attend(self, q: Tensor, step: Step | None = None, *, observe: Observer | None = None) -> Tensor:
        """Each row's queries over what it holds. `observe` is asked once for every row."""
        self.check_queries(q)
        return torch.cat([row.attend(own, observe=observe) for row, own in zip(self.rows, q.split(1), strict=True)])

    def mark(self) -> Any:
        """Of every row."""
        return self.lengths, [row.mark() for row in self.rows]

    def restore(self, mark: Any) -> None:
        """Of every row."""
        self.lengths, marks = mark
        for row, one in zip(self.rows, marks, strict=True):
            row.restore(one)

    def forget(self) -> None:
        """No rows."""
        self.rows = ()

    def forget_from(self, seq_len: int) -> None:
        """In every row."""
        raise NotImplementedError("what was evicted does not come back: read the text again")

    def choose_rows(self, rows: Tensor) -> None:
        """Not by copying: rows are caches."""
        raise NotImplementedError("rows are caches of their own: choose among them before they are put abreast")


def abreast(caches: Sequence[Cache]) -> Cache:
    """The caches, each of one row and all at one length, as one. They go on in place; none evicts any more, so it is
    for caches that evict at a prompt's end. Raises ValueError for others."""
    if {cache.lengths for cache in caches} != {caches[0].lengths} or len(caches[0].lengths) != 1:
        raise ValueError(f"caches abreast have one row each and have seen as many tokens as each other; "
                         f"got {[list(cache.lengths) for cache in caches]}")  # fmt: skip
    if any(getattr(layer, "during", "prompt") != "prompt" for cache in caches for layer in cache.layers):
        raise ValueError('abreast no row evicts: take caches that evict once, during="prompt"')
    layers = [AbreastLayer() for _ in range(len(caches[0]))]
    whole = Cache(layers)  # of empty layers, as every cache is made
    for index, layer in enumerate(layers):
        layer.take([cache[index] for cache in caches])
    return whole
