"""What fills the blanks of lab 01: ordinary code with the signatures of the stubs."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """Weights of each query over all keys: softmax(q k^T / sqrt(head_dim)), one row per query.

    q: [..., queries, head_dim]. k: [..., keys, head_dim].
    Returns [..., queries, keys]: nothing negative, each row sums to 1.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return torch.softmax(scores, dim=-1)


def causal_mask(new_tokens: int, past: int) -> Tensor:
    """Which keys each new token may see: bool [new_tokens, past + new_tokens], True = may see.

    past: how many tokens are held already. Row i is the i-th new token, column j the token at position j.
    """
    position = torch.arange(new_tokens)[:, None] + past
    return torch.arange(past + new_tokens)[None, :] <= position


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Give each head its own slice of every token's vector.

    x: [batch, tokens, num_heads * head_dim].
    Returns [batch, num_heads, tokens, head_dim]: head h has dimensions h * head_dim to (h + 1) * head_dim.
    """
    batch, tokens, _ = x.shape
    return x.view(batch, tokens, num_heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Lay the heads' results of each token side by side again: the inverse of split_heads.

    x: [batch, num_heads, tokens, head_dim].
    Returns [batch, tokens, num_heads * head_dim].
    """
    batch, num_heads, tokens, head_dim = x.shape
    return x.transpose(1, 2).reshape(batch, tokens, num_heads * head_dim)


def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Turn each pair of dimensions (i, i + head_dim / 2) by the angle position * frequencies[i], in radians.

    A pair (a, b) becomes (a cos - b sin, a sin + b cos).
    x: [..., tokens, head_dim]. positions: int [tokens]. frequencies: float32 [head_dim / 2].
    Returns a tensor of x's shape and dtype. The angles are computed in float32, whatever dtype x has.
    """
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention output of the newest token alone, with the work of one row.

    q, k, v: [batch, num_heads, tokens, head_dim], of all tokens; the newest stands last.
    Returns [batch, num_heads, 1, head_dim].
    """
    scores = q[:, :, -1:] @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return torch.softmax(scores, dim=-1) @ v


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of a whole prompt: what comes after a token must not change its output.

    q, k, v: [..., tokens, head_dim]. Returns [..., tokens, head_dim].
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = causal_mask(q.shape[-2], 0).to(q.device)
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
    return weights @ v


def leaky_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of a whole prompt: what comes after a token must not change its output.

    q, k, v: [..., tokens, head_dim]. Returns [..., tokens, head_dim].
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = causal_mask(q.shape[-2], 0).to(q.device)
    weights = torch.softmax(scores, dim=-1) * mask
    return weights @ v
