"""K and V kept as they are: one cache grows by concatenation, the other is allocated once and written in place."""

from __future__ import annotations

import torch
from torch import Tensor

from labkit.cache.layer import LayerCache


class DenseCache(LayerCache):
    """What the two share: one tensor of keys and one of values, `[batch, num_kv_heads, tokens, head_dim]`."""

    def __init__(self, *, scale: float | None = None, window: int | None = None, soft_cap: float | None = None) -> None:
        super().__init__(scale=scale, window=window, soft_cap=soft_cap)
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return 0 if self.k is None or self.v is None else self.k.nbytes + self.v.nbytes

    def template(self) -> Tensor | None:
        """The keys themselves."""
        return self.k

    def reset(self) -> None:
        """Forget everything, counters included, and free the memory."""
        self.k = self.v = None
        self.bytes_written = self.bytes_copied = self.bytes_read = 0


class GrowingCache(DenseCache):
    """Concatenates the new tokens to what is held. No slack, but every append moves all that was there."""

    @property
    def seq_len(self) -> int:
        """Tokens held."""
        return 0 if self.k is None else self.k.shape[2]

    def held(self) -> tuple[Tensor, Tensor] | None:
        """Both tensors as they are; None when empty."""
        return None if self.k is None or self.v is None else (self.k, self.v)

    def write(self, k: Tensor, v: Tensor) -> None:
        """Concatenate: both tensors are made anew."""
        if self.k is None or self.v is None:
            # A clone: a view would keep the projection's whole output alive, and change when its owner changes.
            self.k, self.v = (x.clone(memory_format=torch.contiguous_format) for x in (k, v))
            return
        moved = self.nbytes
        self.k, self.v = torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)
        self.bytes_copied += moved

    def truncate(self, seq_len: int) -> None:
        """Keep a copy of the first `seq_len` tokens, so that the memory of the others is freed."""
        self.check_length(seq_len)
        if self.k is None or self.v is None or seq_len == self.seq_len:
            return
        if seq_len == 0:
            self.k = self.v = None
            return
        self.k, self.v = self.k[:, :, :seq_len].clone(), self.v[:, :, :seq_len].clone()
        self.bytes_copied += self.nbytes

    def select_rows(self, rows: Tensor) -> None:
        """Copy the chosen rows."""
        if self.k is None or self.v is None:
            return
        rows = rows.to(self.k.device)
        self.k, self.v = self.k.index_select(0, rows), self.v.index_select(0, rows)
        self.bytes_copied += self.nbytes


class PreallocatedCache(DenseCache):
    """Allocates room for `capacity` tokens at the first append and writes in place from then on. Nothing moves."""

    def __init__(
        self,
        capacity: int,
        *,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is a number of tokens, at least 1; got {capacity}")
        super().__init__(scale=scale, window=window, soft_cap=soft_cap)
        self.capacity: int = capacity
        self._seq_len = 0

    @property
    def seq_len(self) -> int:
        """Tokens held; the rest of `capacity` is slack."""
        return self._seq_len

    def held(self) -> tuple[Tensor, Tensor] | None:
        """Views of the part in use; None when empty."""
        if self.k is None or self.v is None or self._seq_len == 0:
            return None
        return self.k[:, :, : self._seq_len], self.v[:, :, : self._seq_len]

    def validate(self, k: Tensor, v: Tensor) -> None:
        """As for every cache, and ValueError when the new tokens do not fit."""
        super().validate(k, v)
        if self._seq_len + k.shape[2] > self.capacity:
            raise ValueError(
                f"the cache has room for {self.capacity} tokens and holds {self._seq_len}: {k.shape[2]} more do not "
                f"fit. Make it with a larger capacity"
            )

    def write(self, k: Tensor, v: Tensor) -> None:
        """Copy the new tokens into their place."""
        if self.k is None or self.v is None:
            self.k, self.v = self._allocate(k.shape[0], k)
        end = self._seq_len + k.shape[2]
        self.k[:, :, self._seq_len : end] = k
        self.v[:, :, self._seq_len : end] = v
        self._seq_len = end

    def truncate(self, seq_len: int) -> None:
        """Move the end back; no memory is freed."""
        self.check_length(seq_len)
        self._seq_len = seq_len

    def select_rows(self, rows: Tensor) -> None:
        """Copy the chosen rows' tokens in use; a new batch size takes new memory."""
        if self.k is None or self.v is None:
            return
        rows = rows.to(self.k.device)
        held = [x[:, :, : self._seq_len].index_select(0, rows) for x in (self.k, self.v)]
        if len(rows) != self.k.shape[0]:
            self.k, self.v = self._allocate(len(rows), self.k)
        self.k[:, :, : self._seq_len], self.v[:, :, : self._seq_len] = held
        self.bytes_copied += sum(x.nbytes for x in held)

    def reset(self) -> None:
        """Forget everything, counters included, and free the memory."""
        super().reset()
        self._seq_len = 0

    def _allocate(self, batch: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Empty K and V for `capacity` tokens, with the KV heads, head_dim, dtype and device of `like`."""
        shape = (batch, like.shape[1], self.capacity, like.shape[3])
        with torch.inference_mode(False):  # a buffer made in inference mode could not be written outside it
            return like.new_empty(shape), like.new_empty(shape)
