"""What every KV cache has in common: append, attend, and an honest count of bytes.

A `LayerCache` keeps the K and V of one layer. A `Cache` is one of these per layer plus the position of the next token.
Tensors are `[batch, num_kv_heads, tokens, head_dim]`; dtype and device come from the first tensors appended.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from labkit.attention import fused_attention


class LayerCache(ABC):
    """K and V of one layer.

    `append` takes the new tokens' K and V; `attend` answers the newest tokens' queries over everything held. What
    attention needs besides is said here, once: `scale` (default `head_dim ** -0.5`), `window` (tokens seen, itself
    included) and `soft_cap`. `padding`, int `[batch]`, is set by the `Cache` that owns the layer.

    Counters of the work done, in bytes: `bytes_written` (new K and V stored), `bytes_copied` (K and V that were held
    already and had to move), `bytes_read` (K and V that `attend` or `read` handed to attention).
    """

    capacity: int | None = None
    """Tokens per row that fit; None when there is no limit."""

    def __init__(self, *, scale: float | None = None, window: int | None = None, soft_cap: float | None = None) -> None:
        self.scale, self.window, self.soft_cap = scale, window, soft_cap
        self.padding: Tensor | None = None
        self.bytes_written = self.bytes_copied = self.bytes_read = 0

    # What a new kind of cache has to say about itself.

    @property
    @abstractmethod
    def seq_len(self) -> int:
        """Logical length: tokens seen so far, whether or not they are still held."""

    @property
    def physical_len(self) -> int:
        """Tokens actually held. It differs from `seq_len` where tokens are evicted."""
        return self.seq_len

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes allocated, slack and metadata included."""

    @abstractmethod
    def held(self) -> tuple[Tensor, Tensor] | None:
        """K and V as they are held, dense, `[batch, num_kv_heads, physical_len, head_dim]`; None when empty."""

    def template(self) -> Tensor | None:
        """A tensor with the batch, KV heads, head_dim, dtype and device that new K and V must have; None when any do.

        A cache that knows one without making a tensor says so here: every append asks.
        """
        held = self.held()
        return None if held is None else held[0]

    @abstractmethod
    def write(self, k: Tensor, v: Tensor) -> None:
        """Store validated K and V of the new tokens."""

    @abstractmethod
    def truncate(self, seq_len: int) -> None:
        """Forget every token from position `seq_len` on; ValueError unless `0 <= seq_len <= self.seq_len`."""

    @abstractmethod
    def select_rows(self, rows: Tensor) -> None:
        """Make row `i` of the batch what row `rows[i]` was: beam search, or a batch that changes size."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything, counters included."""

    # What all kinds share.

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add the K and V of new tokens, both `[batch, num_kv_heads, new_tokens, head_dim]`.

        Raises ValueError, and changes nothing, when they do not fit each other or what is held.
        """
        self.validate(k, v)
        self.write(k, v)
        self.bytes_written += k.nbytes + v.nbytes

    def validate(self, k: Tensor, v: Tensor) -> None:
        """Raise ValueError unless `k` and `v` can be appended."""
        if k.dim() != 4 or k.shape != v.shape:
            raise ValueError(
                f"append takes K and V of one shape, [batch, num_kv_heads, new_tokens, head_dim]; got {list(k.shape)} "
                f"and {list(v.shape)}"
            )
        if k.shape[2] == 0:
            raise ValueError("append got zero new tokens")
        if k.dtype != v.dtype or k.device != v.device:
            raise ValueError(f"K is {k.dtype} on {k.device}, V is {v.dtype} on {v.device}: they must agree")
        if (keys := self.template()) is None:
            return
        batch, num_kv_heads, _, head_dim = keys.shape
        if (batch, num_kv_heads, head_dim) != (k.shape[0], k.shape[1], k.shape[3]):
            raise ValueError(
                f"the cache holds batch {batch}, {num_kv_heads} KV heads, head_dim {head_dim}; the new tokens have "
                f"batch {k.shape[0]}, {k.shape[1]} KV heads, head_dim {k.shape[3]}"
            )
        if keys.dtype != k.dtype or keys.device != k.device:
            raise ValueError(
                f"the cache holds {keys.dtype} on {keys.device}; the new tokens are {k.dtype} on {k.device}"
            )

    def check_length(self, seq_len: int) -> None:
        """Raise ValueError unless this many tokens can be kept."""
        if not 0 <= seq_len <= self.seq_len:
            raise ValueError(f"cannot keep {seq_len} tokens of {self.seq_len}")

    def read(self) -> tuple[Tensor, Tensor]:
        """K and V of all that is held, dense."""
        if (held := self.held()) is None:
            raise ValueError("the cache is empty: append before you read")
        self.bytes_read += held[0].nbytes + held[1].nbytes
        return held

    def attend(self, q: Tensor) -> Tensor:
        """Causal attention of the newest tokens' queries `[batch, num_heads, new_tokens, head_dim]` over all held."""
        k, v = self.read()
        return fused_attention(
            q, k, v, padding=self.padding, scale=self.scale, window=self.window, soft_cap=self.soft_cap
        )


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
        from labkit.cache.dense import GrowingCache

        return cls.of(num_layers, lambda: GrowingCache(window=window))

    @classmethod
    def preallocated(cls, num_layers: int, capacity: int, *, window: int | None = None) -> Cache:
        """A cache with room for `capacity` tokens per row, written in place. `window`: as in `growing`."""
        from labkit.cache.dense import PreallocatedCache

        return cls.of(num_layers, lambda: PreallocatedCache(capacity, window=window))

    @classmethod
    def quantized(cls, num_layers: int, nbits: int | torch.dtype = 4, **options: Any) -> Cache:
        """A cache of packed K and V; the options are those of `QuantizedCache`. `window`: as in `growing`."""
        from labkit.cache.quantized import QuantizedCache

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
