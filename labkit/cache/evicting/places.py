"""Keys and queries turned from the positions of the text to their places in the cache, as StreamingLLM has them.

RoPE turns each pair of channels (i, i + head_dim / 2) by position times frequency (RoFormer, arXiv:2104.09864). Two
turns add up, so that a key that was turned to position p is turned to place c by one more turn of c - p. The
frequencies are the model's own, whatever scaling made them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from labkit.attention import wide_dtype


def turned(x: Tensor, by: Tensor, frequencies: Tensor) -> Tensor:
    """`x`, `[..., tokens, head_dim]`, each token turned on by so many positions, `by`, `[..., tokens]`."""
    angle = by[..., None] * frequencies
    return spun(x, angle.cos(), angle.sin())


def spun(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (a, b) of the last dimension as (a cos - b sin, b cos + a sin), computed in float32 or wider."""
    a, b = x.to(wide_dtype(x)).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def places_of(positions: Tensor) -> Tensor:
    """The place of each token among those held, int64, from 0 in the order of positions; padding stays at -1."""
    order = positions.argsort(dim=-1).argsort(dim=-1) - (positions < 0).sum(dim=-1, keepdim=True)
    return order.clamp(min=-1)
