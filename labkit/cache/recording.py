"""A cache that can be looked into: it keeps the attention weights, and can switch the causal mask off."""

from __future__ import annotations

from torch import Tensor

from labkit.attention import attention
from labkit.cache.dense import GrowingCache


class RecordingCache(GrowingCache):
    """A growing cache whose `attend` goes through the explicit attention and keeps what it weighed.

    weights: of the last `attend`, `[batch, num_heads, new_tokens, kv_len]`; None before the first.
    causal: False lets every query see every key held. For experiments: no decoder is trained that way.
    """

    def __init__(
        self,
        *,
        causal: bool = True,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> None:
        if not causal and window is not None:
            raise ValueError("a window looks back from each token: it needs causal=True")
        super().__init__(scale=scale, window=window, soft_cap=soft_cap)
        self.causal = causal
        self.weights: Tensor | None = None

    def attend(self, q: Tensor) -> Tensor:
        """Attention of the newest tokens' queries over all held, causal or not; `weights` holds what it weighed."""
        k, v = self.read()
        out, self.weights = attention(
            q,
            k,
            v,
            causal=self.causal,
            padding=self.padding,
            scale=self.scale,
            window=self.window,
            soft_cap=self.soft_cap,
            return_weights=True,
        )
        return out

    def reset(self) -> None:
        """Forget everything, the weights included."""
        super().reset()
        self.weights = None
