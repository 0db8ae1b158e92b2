"""What the cache of every layer has in common: append, attend, and an honest count of bytes.

A `LayerCache` keeps the K and V of one layer; `labkit.cache.cache` makes a model's cache of them.
Tensors are `[batch, num_kv_heads, tokens, head_dim]`; dtype and device come from the first tensors appended.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

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
