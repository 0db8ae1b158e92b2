"""The control: tokens by chance."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from labkit.cache.evicting.policy import Held, Policy


@dataclass(frozen=True, eq=False, kw_only=True)
class Random(Policy):
    """Tokens by chance: what every other policy has to beat.

    Each token draws a number once, from its position, KV head, layer and `seed`, and keeps it: what is held is at every
    moment an even sample of all that was seen, whatever pieces it came in. (New draws at every step would make the
    control a window: a token that has to survive every draw does not get old.) Rows of a batch draw alike.
    """

    seed: int = 0
    layer: int = 0

    def for_layer(self, layer: int) -> Random:
        """Other draws for every layer."""
        return replace(self, layer=layer)

    def score(self, held: Held) -> Tensor:
        """Its number, 0 to 1."""
        head = torch.arange(held.k.shape[1], device=held.k.device)[:, None]
        x = held.positions.long() + 2**21 * (head + 2**10 * (self.layer + 2**10 * self.seed))
        # splitmix64 (Steele, Lea and Flood, 2014): neighbours get numbers that have nothing to do with each other.
        x = x * -0x61C8864680B583EB
        x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
        x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
        return ((x >> 40) & 0xFFFFFF).float() / 2**24
