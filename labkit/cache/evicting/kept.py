"""What an evicting layer holds, as one value: going back is taking up an older one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.cache.evicting.policy import Notes
from labkit.cache.layer import size_of


@dataclass(frozen=True, eq=False)
class Kept:
    """K and V `[batch, num_kv_heads, tokens, head_dim]`, positions int32 `[batch, num_kv_heads, tokens]`, and notes.

    victims: slots that the next tokens will take, in this order, int64 `[batch, num_kv_heads, any]`; None where the
    next tokens are put behind. used: how many of them are taken.
    """

    k: Tensor
    v: Tensor
    positions: Tensor
    notes: Notes = field(default_factory=Notes)
    victims: Tensor | None = None
    used: int = 0

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
    def victims_left(self) -> int:
        """Tokens that can still be put in the place of a victim."""
        return 0 if self.victims is None else self.victims.shape[2] - self.used

    def extended(self, k: Tensor, v: Tensor, positions: Tensor) -> Kept:
        """With new tokens behind those held."""
        tokens = self.notes.tokens
        return Kept(
            torch.cat((self.k, k), dim=2),
            torch.cat((self.v, v), dim=2),
            torch.cat((self.positions, positions), dim=2),
            replace(self.notes, tokens=None if tokens is None else F.pad(tokens, (0, k.shape[2]))),
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

    def changed(self, change: Callable[[Tensor], Tensor]) -> Kept:
        """Each tensor changed: for what is done to all rows alike."""
        notes = Notes(
            None if self.notes.tokens is None else change(self.notes.tokens), tuple(map(change, self.notes.rows))
        )
        victims = None if self.victims is None else change(self.victims)
        return Kept(change(self.k), change(self.v), change(self.positions), notes, victims, self.used)

    def first(self, tokens: int) -> Kept:
        """The first `tokens` slots, in memory of their own, without notes."""
        k, v, positions = (x[:, :, :tokens].clone() for x in (self.k, self.v, self.positions))
        return Kept(k, v, positions)


@dataclass(frozen=True, eq=False)
class Overwritten:
    """A token of each KV head whose slot the newest has taken: what it takes to put it back.

    slot: int64 `[batch, num_kv_heads, 1]`.
    """

    slot: Tensor
    k: Tensor
    v: Tensor
    positions: Tensor

    @classmethod
    def of(cls, kept: Kept, slot: Tensor) -> Overwritten:
        """What `kept` has in these slots."""
        whole = cls.whole(kept, slot)
        return cls(slot, kept.k.gather(2, whole), kept.v.gather(2, whole), kept.positions.gather(2, slot))

    @staticmethod
    def whole(kept: Kept, slot: Tensor) -> Tensor:
        """The slot as an index into K and V."""
        return slot[..., None].expand(-1, -1, -1, kept.k.shape[3])

    @property
    def nbytes(self) -> int:
        """Bytes of all of it but the slot, which is the victims'."""
        return sum(map(size_of, (self.k, self.v, self.positions)))

    def put(self, kept: Kept, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Write one token of each KV head into the slot, in place."""
        whole = self.whole(kept, self.slot)
        kept.k.scatter_(2, whole, k)
        kept.v.scatter_(2, whole, v)
        kept.positions.scatter_(2, self.slot, positions)

    def put_back(self, kept: Kept) -> None:
        """As it was. It takes no memory."""
        self.put(kept, self.k, self.v, self.positions)
