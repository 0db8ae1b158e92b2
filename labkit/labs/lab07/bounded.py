"""A cache that an exercise's function keeps within a window."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Bounded:
    """One layer's cache of one request. k, v: `[num_kv_heads, held, head_dim]`. positions: int64 `[held]`, each token's
    in the text. seq_len: tokens seen so far. budget: tokens held at most; sinks: the first of the text, never dropped.
    """

    budget: int
    sinks: int
    k: Tensor
    v: Tensor
    positions: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    seq_len: int = 0

    @classmethod
    def empty(cls, budget: int, sinks: int, num_kv_heads: int, head_dim: int) -> Bounded:
        """Without a token."""
        return cls(budget, sinks, *torch.zeros(2, num_kv_heads, 0, head_dim))
