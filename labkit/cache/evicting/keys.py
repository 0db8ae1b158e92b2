"""Policies that look at the keys alone, and so cost no look at attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from labkit.attention import wide_dtype
from labkit.cache.evicting.policy import Held, Policy


@dataclass(frozen=True, eq=False, kw_only=True)
class KeyNorm(Policy):
    """Keys with the smallest L2 norm (arXiv:2406.11430, which finds that they get most attention).

    Settled here: every layer evicts. The paper leaves out the first two, which a list of budgets can say.
    """

    def score(self, held: Held) -> Tensor:
        """Minus the norm of its key."""
        return -held.k.norm(dim=-1, dtype=wide_dtype(held.k))


@dataclass(frozen=True, eq=False, kw_only=True)
class KeyDiff(Policy):
    """Keys that point another way than the others do (KeyDiff, arXiv:2504.15364).

    Settled here: the others' direction is the mean of the keys held, each of length 1 first, as in the paper's
    algorithm and kvpress; padding, and what left the model's window, is none of them. Keys are taken as they are held,
    turned by RoPE.
    """

    def score(self, held: Held) -> Tensor:
        """Minus the cosine between its key and the mean direction."""
        keys = held.k.to(wide_dtype(held.k)).masked_fill(~held.visible_later[..., None], 0.0)
        # Lengths beside the keys: keys of length 1 would be one more copy of all.
        shorter = keys.norm(dim=-1).clamp(min=1e-12).reciprocal()
        mean = F.normalize(shorter[:, :, None] @ keys, dim=-1)
        return -(keys @ mean.mT)[..., 0] * shorter
