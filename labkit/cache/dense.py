"""K and V kept as they are: one cache grows by concatenation, the other is allocated once and written in place.

Rows may differ in length: each begins at index 0, and what lies behind the end of a shorter row is room, no token.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from labkit.attention import is_count
from labkit.cache.layer import LayerCache, size_of
from labkit.cache.step import Step


class DenseCache(LayerCache):
    """What the two share: one tensor of keys and one of values, `[batch, num_kv_heads, tokens, head_dim]`."""

    takes_ragged: ClassVar[bool] = True

    def __init__(self, *, scale: float | None = None, window: int | None = None, soft_cap: float | None = None) -> None:
        super().__init__(scale=scale, window=window, soft_cap=soft_cap)
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return 0 if self.k is None or self.v is None else size_of(self.k) + size_of(self.v)

    def template(self) -> Tensor | None:
        """The keys themselves."""
        return self.k

    def held(self) -> tuple[Tensor, Tensor] | None:
        """Both tensors up to the end of the longest row: views, or the tensors themselves; None when empty."""
        if self.k is None or self.v is None:
            return None
        if self.seq_len == self.k.shape[2]:
            return self.k, self.v
        return self.k[:, :, : self.seq_len], self.v[:, :, : self.seq_len]

    def forget(self) -> None:
        """Hold nothing."""
        self.k = self.v = None

    def mark(self) -> Any:
        """The lengths and both tensors."""
        return self.lengths, self.k, self.v

    def restore(self, mark: Any) -> None:
        """The lengths and tensors that were."""
        self.lengths, self.k, self.v = mark


class GrowingCache(DenseCache):
    """Concatenates the new tokens to what is held. No slack but behind shorter rows, and every append moves all."""

    def write(self, k: Tensor, v: Tensor, step: Step) -> None:
        """Concatenate: both tensors are made anew, never written once attention may have seen them."""
        if not step.is_even:
            longer = [self.lengthened(held, x, step) for held, x in ((self.k, k), (self.v, v))]
        elif self.k is None or self.v is None:
            # A clone: a view would keep the projection's whole output alive, and change when its owner changes.
            longer = [x.clone(memory_format=torch.contiguous_format) for x in (k, v)]
        else:
            longer = [torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)]
        self.bytes_copied += self.nbytes
        self.k, self.v = longer

    def lengthened(self, held: Tensor | None, new: Tensor, step: Step) -> Tensor:
        """What is held and the new tokens, each behind the end of its row; zeros behind the ends."""
        longer = new.new_zeros(step.batch, new.shape[1], max(step.after), new.shape[3])
        if held is not None:
            longer[:, :, : held.shape[2]] = held
        put(longer, new, step)
        return longer

    def forget_from(self, seq_len: int) -> None:
        """Keep a copy of the first `seq_len` tokens, so that the memory of the others is freed."""
        assert self.k is not None
        assert self.v is not None
        self.k, self.v = self.k[:, :, :seq_len].clone(), self.v[:, :, :seq_len].clone()
        self.bytes_copied += self.nbytes

    def choose_rows(self, rows: Tensor) -> None:
        """Copy the chosen rows."""
        assert self.k is not None
        assert self.v is not None
        rows = rows.to(self.k.device)
        longest = max(self.lengths[row] for row in rows.tolist())
        self.k, self.v = (x[:, :, :longest].index_select(0, rows) for x in (self.k, self.v))
        self.bytes_copied += self.nbytes


class PreallocatedCache(DenseCache):
    """Allocates room for `capacity` tokens at the first append and writes in place from then on. Nothing moves.

    Written in place, K and V have no gradient over several passes: PyTorch's backward then raises its own error.
    """

    def __init__(
        self,
        capacity: int,
        *,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> None:
        if not is_count(capacity) or capacity < 1:
            raise ValueError(f"capacity is a number of tokens, at least 1; got {capacity}")
        super().__init__(scale=scale, window=window, soft_cap=soft_cap)
        self.capacity: int = int(capacity)
        self.used = False  # whether room behind the ends may hold numbers of tokens that were there

    def validate(self, k: Tensor, v: Tensor, step: Step) -> None:
        """As for every cache, and ValueError when the new tokens do not fit."""
        super().validate(k, v, step)
        for held, new in zip(step.before, step.counts, strict=True):
            if held + new > self.capacity:
                raise ValueError(
                    f"the cache has room for {self.capacity} tokens and holds {held}: {new} more do not fit. Make it "
                    f"with a larger capacity"
                )

    def write(self, k: Tensor, v: Tensor, step: Step) -> None:
        """Copy the new tokens into their place."""
        if self.k is None or self.v is None:
            self.k, self.v = self.allocate(step.batch, k), self.allocate(step.batch, v)
        if step.is_even:
            here = slice(step.before[0], step.after[0])
            self.k[:, :, here], self.v[:, :, here] = k, v
        else:
            if self.used:
                self.clear_room(step.before)
            put(self.k, k, step)
            put(self.v, v, step)

    def restore(self, mark: Any) -> None:
        """The lengths and tensors that were."""
        super().restore(mark)
        self.used = True

    def clear_room(self, ends: tuple[int, ...]) -> None:
        """Zeros behind each row's end: what is there is multiplied by weights of 0, and may be NaN."""
        for x in (self.k, self.v):
            assert x is not None
            for row, end in enumerate(ends):
                x[row, :, end:] = 0
        self.used = False

    def forget(self) -> None:
        """Hold nothing."""
        super().forget()
        self.used = False

    def forget_from(self, seq_len: int) -> None:
        """Move the ends back; no memory is freed."""
        self.used = True

    def choose_rows(self, rows: Tensor) -> None:
        """Copy the chosen rows' tokens in use into new memory."""
        assert self.k is not None
        assert self.v is not None
        rows = rows.to(self.k.device)
        longest = max(self.lengths[row] for row in rows.tolist())
        k, v = self.allocate(len(rows), self.k), self.allocate(len(rows), self.v)
        for new, old in ((k, self.k), (v, self.v)):
            new[:, :, :longest] = old[:, :, :longest].index_select(0, rows)
        self.k, self.v, self.used = k, v, True
        self.bytes_copied += size_of(k[:, :, :longest]) * 2

    def allocate(self, batch: int, like: Tensor) -> Tensor:
        """Room for `capacity` tokens, with the KV heads, head_dim, dtype and device of `like`.

        Zeros, which cost nothing until they are written: room behind a shorter row is multiplied by weights of 0.
        """
        with torch.inference_mode(False):  # a buffer made in inference mode could not be written outside it
            return like.new_zeros(batch, like.shape[1], self.capacity, like.shape[3])


def put(to: Tensor, new: Tensor, step: Step) -> None:
    """Write each row's new tokens behind its end, in place."""
    rows, places = step.places(to.device)
    to[rows, :, places] = new.transpose(1, 2).flatten(0, 1)  # [all new tokens, num_kv_heads, head_dim]
