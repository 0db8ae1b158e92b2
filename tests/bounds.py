"""Tolerances of the bounded contract, derived from the dtype and the lengths of the sums."""

import torch
from torch import Tensor


def attention_bound(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    sums: torch.dtype | None = None,
    result: torch.dtype | None = None,
) -> float:
    """How far two computations of softmax(q k^T * scale) v may be apart, per entry, when each is right.

    A score is a sum of `head_dim` products, scaled and shifted: its error is at most (head_dim + 4) eps S, where S is
    the largest sum of |q||k| * scale. An error d in the scores moves a weight by a factor of at most exp(2d), about
    1 + 2d. The normaliser and the blend are sums over `kv_len`. All of it is relative to the largest |v|. Two
    computations: twice that. sums: the dtype that sums are kept in; result: the one the output is rounded to.
    """
    eps = torch.finfo(sums or q.dtype).eps
    head_dim, kv_len = k.shape[-1], k.shape[-2]
    scale = head_dim**-0.5 if scale is None else scale
    rows = q.double().abs().reshape(k.shape[0], k.shape[1], -1, head_dim)
    largest = (rows @ k.double().abs().mT).max().item() * abs(scale)
    relative = 2 * eps * (2 * (head_dim + 4) * largest + 2 * kv_len + 8) + torch.finfo(result or q.dtype).eps
    return relative * v.double().abs().max().item()


def linear_bound(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """How far `F.linear` may be from the exact product, per entry: float32 sums, then one rounding to x's dtype."""
    sizes = x.double().abs() @ weight.double().abs().mT + (0 if bias is None else bias.double().abs())
    terms = weight.shape[1] + 1
    return sizes * terms * torch.finfo(torch.float32).eps + sizes * torch.finfo(x.dtype).eps
