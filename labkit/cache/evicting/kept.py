"""What an evicting layer holds, as one value: going back is taking up an older one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.cache.evicting.policy import Notes
from labkit.cache.layer import size_of


@dataclass(frozen=True, eq=False)
class Kept:
    """K and V `[batch, num_kv_heads, tokens, head_dim]`, positions int32 `[batch, num_kv_heads, tokens]`, and notes.

    victims: slots that the next tokens will take, in this order, int64 `[any, batch, num_kv_heads]`, counted over those
    of all rows and KV heads (`lines_of`), as `lines` has them; None where the next tokens are put behind. used: how
    many of them are taken. hides: whether slots may be empty, as of heads that keep fewer tokens than another: their
    positions are -1, K and V 0.
    """

    k: Tensor
    v: Tensor
    positions: Tensor
    notes: Notes = field(default_factory=Notes)
    victims: Tensor | None = None
    used: int = 0
    hides: bool = False

    @property
    def tokens(self) -> int:
        """Tokens held in each row, by each KV head."""
        return self.k.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        tensors = [self.k, self.v, self.positions, self.notes.tokens, *self.notes.rows, self.victims]
        return sum(size_of(x) for x in tensors if x is not None)

    @property
    def numbers(self) -> int:
        """Bytes of K and V."""
        return size_of(self.k) + size_of(self.v)

    @property
    def victims_left(self) -> int:
        """Tokens that can still be put in the place of a victim."""
        return 0 if self.victims is None else len(self.victims) - self.used

    def __getstate__(self) -> dict[str, Any]:
        """All but the lines: a copy's are views of its own tensors, and its notes no part of other layers'."""
        tokens = None if self.notes.tokens is None else self.notes.tokens.clone()
        notes = Notes(tokens, tuple(row.clone() for row in self.notes.rows))
        return {name: value for name, value in vars(self).items() if name != "lines"} | {"notes": notes}

    @cached_property
    def lines(self) -> tuple[Tensor, Tensor, Tensor]:
        """K, V and positions, a line for each slot of all rows and KV heads: views that may be written in any mode."""
        head_dim = self.k.shape[3]
        with torch.inference_mode(False), torch.enable_grad():
            return self.k.view(-1, head_dim), self.v.view(-1, head_dim), self.positions.view(-1)

    def dense(self) -> tuple[Tensor, Tensor]:
        """K and V of all that is held."""
        return self.k, self.v

    def extended(self, k: Tensor, v: Tensor, positions: Tensor) -> Kept:
        """With new tokens behind those held."""
        tokens = self.notes.tokens
        return Kept(
            torch.cat((self.k, k), dim=2),
            torch.cat((self.v, v), dim=2),
            torch.cat((self.positions, positions), dim=2),
            replace(self.notes, tokens=None if tokens is None else F.pad(tokens, (0, k.shape[2]))),
            hides=self.hides,
        )

    def chosen(self, index: Tensor) -> Kept:
        """Only the tokens at `index`, int64 `[batch, num_kv_heads, any]`, in memory of their own."""
        whole = index[..., None].expand(-1, -1, -1, self.k.shape[3])
        tokens = self.notes.tokens
        return Kept(
            self.k.gather(2, whole),
            self.v.gather(2, whole),
            self.positions.gather(2, index),
            replace(self.notes, tokens=None if tokens is None else tokens.gather(2, index)),
        )

    def emptied(self, slots: Tensor) -> Kept:
        """The same with nothing in these slots, bool `[batch, num_kv_heads, tokens]`."""
        k, v = (x.masked_fill(slots[..., None], 0.0) for x in (self.k, self.v))
        return Kept(k, v, self.positions.masked_fill(slots, -1), self.notes, hides=bool(slots.any()))

    def noted(self, notes: Notes) -> Kept:
        """The same with other notes."""
        return self.beside(notes, self.victims, self.used, self.hides)

    def doomed(self, victims: Tensor) -> Kept:
        """The same with these victims, as `victims` has them, none of them taken."""
        return self.beside(self.notes, victims, 0)

    def taken(self, notes: Notes, count: int) -> Kept:
        """The same when `count` more victims' slots are taken, with other notes."""
        return self.beside(notes, self.victims, self.used + count)

    def beside(self, notes: Notes, victims: Tensor | None, used: int, hides: bool = False) -> Kept:
        """The same tensors, and so the same lines, with other things beside them."""
        kept = Kept(self.k, self.v, self.positions, notes, victims, used, hides)
        if "lines" in self.__dict__:  # three views less to make in every step of every layer
            kept.__dict__["lines"] = self.lines
        return kept

    def of_rows(self, rows: Tensor) -> Kept:
        """The chosen rows of the batch, int64 `[any]`."""
        k, v, positions = (x.index_select(0, rows) for x in (self.k, self.v, self.positions))
        tokens = None if self.notes.tokens is None else self.notes.tokens.index_select(0, rows)
        notes = Notes(tokens, tuple(x.index_select(0, rows) for x in self.notes.rows))
        victims = self.victims
        if victims is not None:
            slots = (victims % self.tokens).index_select(1, rows)
            victims = lines_of(slots.permute(1, 2, 0), self.tokens)
        return Kept(k, v, positions, notes, victims, self.used, self.hides)

    def first(self, tokens: int) -> Kept:
        """The first `tokens` slots, in memory of their own, without notes."""
        k, v, positions = (x[:, :, :tokens].clone() for x in (self.k, self.v, self.positions))
        return Kept(k, v, positions, hides=self.hides)


def lines_of(slots: Tensor, tokens: int) -> Tensor:
    """Slots of each row and KV head, int64 `[..., batch, num_kv_heads, any]`, counted over those of all, so many each.

    `[..., any, batch, num_kv_heads]`, contiguous.
    """
    batch, heads = slots.shape[-3:-1]
    first = tokens * torch.arange(batch * heads, device=slots.device).view(batch, heads, 1)
    return (slots + first).movedim(-1, -3).contiguous()


@dataclass(frozen=True, eq=False)
class Overwritten:
    """Tokens whose slots others have taken: what it takes to put them back.

    slots: int64 `[any]`, counted over those of all rows and KV heads; they lie in the memory of `Kept.victims`. k, v:
    as many lines, `[any, head_dim]`. positions: int32 `[any]`.
    """

    slots: Tensor
    k: Tensor
    v: Tensor
    positions: Tensor

    @classmethod
    def of(cls, kept: Kept, slots: Tensor) -> Overwritten:
        """What `kept` has in these slots, of any shape, as `lines_of` counts them."""
        slots = slots.reshape(-1)
        return cls(slots, *(x.index_select(0, slots) for x in kept.lines))

    @property
    def nbytes(self) -> int:
        """Bytes of all of it but the slots, which count as victims."""
        return sum(map(size_of, (self.k, self.v, self.positions)))

    def put(self, kept: Kept, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Write K and V, `[..., head_dim]`, and positions, `[...]`, into the slots, in their order, in place."""
        for held, new, old in zip(kept.lines, (k, v, positions), (self.k, self.v, self.positions), strict=True):
            held.index_copy_(0, self.slots, new.reshape(old.shape))

    def put_back(self, kept: Kept) -> None:
        """As it was. It takes no memory."""
        self.put(kept, self.k, self.v, self.positions)
