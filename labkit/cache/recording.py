"""A cache that can be looked into: it keeps the attention weights, and can switch the causal mask off."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from labkit.cache.dense import GrowingCache
from labkit.cache.layer import Observer
from labkit.cache.step import Step


class RecordingCache(GrowingCache):
    """A growing cache whose `attend` goes through the explicit attention and keeps what it weighed.

    weights: of the last `attend`, `[batch, num_heads, new_tokens, kv_len]`; None before the first.
    causal: False lets every query see every key held. For experiments: no decoder is trained that way.
    """

    takes_ragged = False

    def __init__(
        self,
        *,
        causal: bool = True,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__(scale=scale, window=window, soft_cap=soft_cap)
        self.constants = replace(self.constants, causal=causal)
        self.weights: Tensor | None = None

    def attend(self, q: Tensor, step: Step | None = None, *, observe: Observer | None = None) -> Tensor:
        """Attention of the newest tokens' queries over all held, causal or not; `weights` holds what it weighed."""

        def keep(weights: Tensor) -> None:
            self.weights = weights
            if observe is not None:
                observe(weights)

        return super().attend(q, step, observe=keep)

    def reset(self) -> None:
        """Forget everything, the weights included."""
        super().reset()
        self.weights = None
