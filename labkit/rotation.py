"""RoPE's turn of keys and queries: each pair of channels (i, i + head_dim / 2) by an angle (arXiv:2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + head_dim / 2) of the last dimension by its angle; `sin` is signed, see `signed`."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def signed(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the pairs, `[..., head_dim / 2]`, as `rotate` takes them, `[..., head_dim]`.

    A pair (a, b) turns to (a cos - b sin, b cos + a sin), so the first half of `sin` is negative.
    """
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
