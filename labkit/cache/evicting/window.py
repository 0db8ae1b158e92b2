"""The newest tokens, with or without the first few."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from labkit.cache.evicting.policy import Held, Policy


@dataclass(frozen=True, eq=False, kw_only=True)
class Window(Policy):
    """The newest tokens. With `sinks`, the first as well: StreamingLLM (arXiv:2309.17453), which keeps 4.

    Settled here: the budget counts sinks and window together, as StreamingLLM's cache size does. The paper gives the
    tokens the positions that they have in the cache; that is `EvictingCache(frequencies=...)`, and goes with every
    policy. Without it they keep the positions of the text, as most other code does.
    """

    def score(self, held: Held) -> Tensor:
        """Its position."""
        return held.positions
