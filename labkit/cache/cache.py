"""A model's cache: one `LayerCache` per layer, and the position of the next token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from labkit.cache.dense import GrowingCache, PreallocatedCache
from labkit.cache.layer import LayerCache
from labkit.cache.quantized import QuantizedCache


class Cache:
    """One `LayerCache` per layer, and the position of the next token."""

    def __init__(self, layers: Sequence[LayerCache]) -> None:
        if not layers:
            raise ValueError("a cache needs at least one layer")
        self.layers = list(layers)
        self.padding: Tensor | None = None

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

    @property
    def seq_len(self) -> int:
        """Tokens seen so far, padding included; also the position of the next token.

        Raises RuntimeError when the layers disagree: whoever appended to them was interrupted half-way.
        """
        lengths = {layer.seq_len for layer in self.layers}
        if len(lengths) > 1:
            raise RuntimeError(
                f"the layers hold between {min(lengths)} and {max(lengths)} tokens: a pass over them was interrupted. "
                f"truncate({min(lengths)}) goes back to what all of them hold; reset() starts anew"
            )
        return lengths.pop()

    @property
    def nbytes(self) -> int:
        """Bytes allocated by all layers."""
        return sum(layer.nbytes for layer in self.layers)

    def check_fits(self, num_layers: int, window: int | None) -> None:
        """Raise ValueError unless this is a cache for `num_layers` layers of attention with this `window`."""
        if len(self.layers) != num_layers:
            raise ValueError(f"the cache has {len(self.layers)} layers, the model {num_layers}")
        for index, layer in enumerate(self.layers):
            if layer.window != window:
                raise ValueError(
                    f"layer {index} of the cache was made with window={layer.window}, the model attends with "
                    f"window={window}: make the cache with model.cache()"
                )

    def set_padding(self, padding: Tensor | None) -> None:
        """Say, before the first append, how many tokens at the left of each row are padding: int `[batch]`."""
        if self.seq_len:
            raise ValueError("padding is said once per batch, before the first append: reset() the cache first")
        self._set_padding(padding)

    def _set_padding(self, padding: Tensor | None) -> None:
        self.padding = padding
        for layer in self.layers:
            layer.padding = padding

    def truncate(self, seq_len: int) -> None:
        """Forget every token from position `seq_len` on: for a conversation whose last part changes."""
        min(self.layers, key=lambda layer: layer.seq_len).check_length(seq_len)
        for layer in self.layers:
            layer.truncate(seq_len)

    @contextmanager
    def undo_on_error(self) -> Iterator[None]:
        """Take back what was appended inside the `with` if it ends in an error or an interrupt: all layers or none.

        The counters stay: the work was done.
        """
        start, padding = self.seq_len, self.padding
        try:
            yield
        except BaseException:
            for layer in self.layers:
                if layer.seq_len > start:
                    layer.truncate(start)
            self._set_padding(padding)
            raise

    def select_rows(self, rows: Tensor) -> None:
        """Row `i` of the batch becomes what row `rows[i]` was."""
        for layer in self.layers:
            layer.select_rows(rows)
        if self.padding is not None:
            self._set_padding(self.padding[rows.to(self.padding.device, torch.long)])

    def reset(self) -> None:
        """Forget everything, padding and counters included."""
        for layer in self.layers:
            layer.reset()
        self._set_padding(None)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> LayerCache:
        return self.layers[layer]
