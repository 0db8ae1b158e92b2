"""K and V kept as they are: a cache that grows by concatenation, and one that is allocated once and written in place."""

from __future__ import annotations

import torch
from torch import Tensor

from labkit.cache.base import LayerCache


class GrowingCache(LayerCache):
    """Concatenates the new tokens to what is held. No slack, but every append moves all that was there."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    @property
    def seq_len(self) -> int:
        return 0 if self.k is None else self.k.shape[2]

    @property
    def nbytes(self) -> int:
        return 0 if self.k is None else self.k.nbytes + self.v.nbytes

    def held(self) -> tuple[Tensor, Tensor] | None:
        return None if self.k is None else (self.k, self.v)

    def write(self, k: Tensor, v: Tensor) -> None:
        if self.k is None:
            self.k, self.v = k.contiguous(), v.contiguous()  # a view would keep the projection's whole output alive
            return
        self.bytes_copied += self.nbytes
        self.k, self.v = torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)

    def truncate(self, seq_len: int) -> None:
        if seq_len < self.seq_len:
            keep = seq_len > 0
            self.k = self.k[:, :, :seq_len].clone() if keep else None
            self.v = self.v[:, :, :seq_len].clone() if keep else None

    def select_rows(self, rows: Tensor) -> None:
        if self.k is not None:
            rows = rows.to(self.k.device)
            self.bytes_copied += self.nbytes
            self.k, self.v = self.k.index_select(0, rows), self.v.index_select(0, rows)

    def reset(self) -> None:
        self.k = self.v = None
        self.bytes_written = self.bytes_copied = self.bytes_read = 0


class PreallocatedCache(LayerCache):
    """Allocates room for `capacity` tokens at the first append and writes in place from then on. Nothing moves."""

    def __init__(self, capacity: int, **settings) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is a number of tokens, at least 1; got {capacity}")
        super().__init__(**settings)
        self.capacity = capacity
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self._seq_len = 0

    @property
    def seq_len(self) -> int:
        return self._seq_len

    @property
    def nbytes(self) -> int:
        return 0 if self.k is None else self.k.nbytes + self.v.nbytes

    def held(self) -> tuple[Tensor, Tensor] | None:
        if self.k is None:
            return None
        return self.k[:, :, : self._seq_len], self.v[:, :, : self._seq_len]

    def validate(self, k: Tensor, v: Tensor) -> None:
        super().validate(k, v)
        if self._seq_len + k.shape[2] > self.capacity:
            raise ValueError(
                f"the cache has room for {self.capacity} tokens and holds {self._seq_len}: {k.shape[2]} more do not "
                f"fit. Make it with a larger capacity"
            )

    def write(self, k: Tensor, v: Tensor) -> None:
        if self.k is None:
            batch, num_kv_heads, _, head_dim = k.shape
            self.k = k.new_empty(batch, num_kv_heads, self.capacity, head_dim)
            self.v = torch.empty_like(self.k)
        end = self._seq_len + k.shape[2]
        self.k[:, :, self._seq_len : end] = k
        self.v[:, :, self._seq_len : end] = v
        self._seq_len = end

    def truncate(self, seq_len: int) -> None:
        self._seq_len = min(self._seq_len, seq_len)

    def select_rows(self, rows: Tensor) -> None:
        if self.k is not None:
            rows = rows.to(self.k.device)
            self.bytes_copied += self.nbytes
            self.k, self.v = self.k.index_select(0, rows), self.v.index_select(0, rows)

    def reset(self) -> None:
        self.k = self.v = None
        self._seq_len = 0
        self.bytes_written = self.bytes_copied = self.bytes_read = 0
