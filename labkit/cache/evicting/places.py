"""Keys and queries turned from the positions of the text to their places in the cache, as StreamingLLM has them.

RoPE turns each pair of channels (i, i + head_dim / 2) by position times frequency (RoFormer, arXiv:2104.09864). Two
turns add up, so that a key that was turned to position p is turned to place c by one more turn of c - p. The
frequencies are the model's own, whatever scaling made them.
"""

from __future__ import annotations

from torch import Tensor

from labkit.attention import wide_dtype
from labkit.rotation import rotate, signed


def turned(x: Tensor, by: Tensor, frequencies: Tensor) -> Tensor:
    """`x`, `[..., tokens, head_dim]`, each token turned on by so many positions, `by`, `[..., tokens]`."""
    angle = by[..., None] * frequencies
    return spun(x, angle.cos(), angle.sin())


def spun(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair of the last dimension turned by its angle (`labkit.rotation`), computed in float32 or wider.

    cos, sin: of the pairs, `[..., head_dim / 2]`; those of a mean over angles shrink what they turn, too.
    """
    return rotate(x.to(wide_dtype(x)), *signed(cos, sin)).to(x.dtype)


def places_of(positions: Tensor) -> Tensor:
    """The place of each token among those held, int64, from 0 in the order of positions; padding stays at -1."""
    order = positions.argsort(dim=-1).argsort(dim=-1) - (positions < 0).sum(dim=-1, keepdim=True)
    return order.clamp(min=-1)
