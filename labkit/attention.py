"""Scaled dot-product attention in plain PyTorch, three ways.

`attention` writes every step out and is the oracle that everything below is tested against. `online_attention`
gives the same answer without ever holding a whole row of scores. `fused_attention` hands the work to PyTorch's kernel.

All three share one signature and one set of shapes:

    q     [batch, num_heads, new_tokens, head_dim]       the newest tokens' queries
    k, v  [batch, num_kv_heads, kv_len, head_dim]        everything held, the newest tokens included
    out   [batch, num_heads, new_tokens, head_dim]

Query head `h` reads KV head `h // num_queries_per_kv`. K and V are never expanded to the number of query heads: the
query heads that share a KV head are stacked as if they were more query rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_mask(
    new_tokens: int, kv_len: int, *, window: int | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Which keys each new token may see: bool `[new_tokens, kv_len]`, True = may see.

    The new tokens are the last `new_tokens` of the `kv_len` held, so row `i` stands at position
    `kv_len - new_tokens + i`. With a `window`, a token sees itself and the `window - 1` tokens before it.
    """
    query_position = torch.arange(kv_len - new_tokens, kv_len, device=device)[:, None]
    key_position = torch.arange(kv_len, device=device)[None, :]
    allowed = key_position <= query_position
    if window is not None:
        allowed &= key_position > query_position - window
    return allowed


def allowed_keys(q: Tensor, k: Tensor, *, causal: bool, padding: Tensor | None, window: int | None) -> Tensor | None:
    """The mask of a call, bool, broadcastable to `[batch, 1, new_tokens, kv_len]`; None when every key may be seen.

    padding: int `[batch]`, how many tokens at the left of each row are padding.
    """
    batch, new_tokens, kv_len = q.shape[0], q.shape[-2], k.shape[-2]
    if window is not None and not causal:
        raise ValueError("a window looks back from each token: it needs causal=True")
    check_mask(batch, padding, window)
    mask = None
    if causal and (new_tokens > 1 or window is not None):
        mask = causal_mask(new_tokens, kv_len, window=window, device=q.device)
    if padding is not None:
        real = torch.arange(kv_len, device=q.device)[None, :] >= padding[:, None]
        real = real[:, None, None, :]
        mask = real if mask is None else mask & real
    return mask


def check_mask(batch: int, padding: Tensor | None, window: int | None) -> None:
    """ValueError unless `window` and `padding` can be."""
    if window is not None and window < 1:
        raise ValueError(f"window counts the keys a token sees, itself included: at least 1; got {window}")
    if padding is not None and (padding.shape != (batch,) or padding.is_floating_point()):
        raise ValueError(f"padding is int [{batch}], one number per row; got {padding.dtype} {list(padding.shape)}")


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype that sums over many tokens are kept in: float32, or float64 when `x` is float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> int:
    """`num_queries_per_kv` of a call, or a ValueError that names the sizes that do not fit."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            f"attention takes q [batch, num_heads, new_tokens, head_dim] and k, v [batch, num_kv_heads, kv_len, "
            f"head_dim]; got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {list(q.shape)} does not fit k {list(k.shape)}: batch and head_dim must agree, and num_heads must be "
            f"a multiple of num_kv_heads"
        )
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"{q.shape[2]} queries but only {k.shape[2]} keys: append the new tokens' keys first")
    return q.shape[1] // k.shape[1]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    padding: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T * scale) v, every step explicit. Shapes above.

    padding: int `[batch]`, left padding of each row; a query that may see no key at all gives zeros.
    causal: each token sees itself and what stands before it; False lets every query see every key.
    scale: default `head_dim ** -0.5`. window: keys a token sees, itself included.
    soft_cap: scores become `soft_cap * tanh(scores / soft_cap)` (Gemma 2).
    return_weights: also return the weights, `[batch, num_heads, new_tokens, kv_len]`.
    """
    queries_per_kv = check_shapes(q, k, v)
    batch, num_heads, new_tokens, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale

    grouped = q.reshape(batch, num_kv_heads, queries_per_kv * new_tokens, head_dim)
    scores = (grouped @ k.transpose(-2, -1)) * scale
    scores = scores.view(batch, num_heads, new_tokens, kv_len)
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    mask = allowed_keys(q, k, causal=causal, padding=padding, window=window)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=wide_dtype(q))
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)  # a row with no key to see is 0/0
    weights = weights.to(q.dtype)

    rows = weights.view(batch, num_kv_heads, queries_per_kv * new_tokens, kv_len)
    out = (rows @ v).view(batch, num_heads, new_tokens, head_dim)
    return (out, weights) if return_weights else out


def online_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    padding: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    block_size: int = 64,
) -> Tensor:
    """The same attention, reading K and V in blocks of `block_size` tokens and holding one block of scores at a time.

    Keeps a running maximum, a running sum and a running output per query and rescales them when the maximum moves
    (Milakov and Gimelshein, arXiv:1805.02867; the inner loop of FlashAttention, arXiv:2205.14135).
    """
    if block_size < 1:
        raise ValueError(f"block_size is a number of tokens, at least 1; got {block_size}")
    queries_per_kv = check_shapes(q, k, v)
    batch, num_heads, new_tokens, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    wide = wide_dtype(q)

    grouped = q.reshape(batch, num_kv_heads, queries_per_kv * new_tokens, head_dim)
    mask = allowed_keys(q, k, causal=causal, padding=padding, window=window)
    top = torch.full((batch, num_heads, new_tokens, 1), float("-inf"), dtype=wide, device=q.device)
    total = torch.zeros_like(top)
    out = torch.zeros(batch, num_heads, new_tokens, head_dim, dtype=wide, device=q.device)
    for start in range(0, kv_len, block_size):
        keys, values = k[:, :, start : start + block_size], v[:, :, start : start + block_size]
        scores = ((grouped @ keys.transpose(-2, -1)) * scale).to(wide)
        scores = scores.view(batch, num_heads, new_tokens, keys.shape[2])
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        if mask is not None:
            scores = scores.masked_fill(~mask[..., start : start + block_size], float("-inf"))
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        safe_top = new_top.masked_fill(new_top == float("-inf"), 0.0)  # nothing seen yet: keep exp(-inf) = 0
        shrink, weights = torch.exp(top - safe_top), torch.exp(scores - safe_top)
        total = total * shrink + weights.sum(-1, keepdim=True)
        rows = weights.view(batch, num_kv_heads, queries_per_kv * new_tokens, keys.shape[2])
        out = out * shrink + (rows @ values.to(wide)).view_as(out)
        top = new_top
    return (out / total.masked_fill(total == 0, 1.0)).to(q.dtype)


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    padding: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """The same attention through `torch.nn.functional.scaled_dot_product_attention`, still without expanding K and V.

    A soft cap has no fused form in PyTorch: such a call goes to `online_attention`.
    """
    if soft_cap is not None:
        return online_attention(q, k, v, causal=causal, padding=padding, scale=scale, window=window, soft_cap=soft_cap)
    queries_per_kv = check_shapes(q, k, v)
    batch, num_heads, new_tokens, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    if causal and new_tokens == kv_len and padding is None and window is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=queries_per_kv > 1)
    mask = allowed_keys(q, k, causal=causal, padding=padding, window=window)
    grouped = q.reshape(batch, num_kv_heads, queries_per_kv * new_tokens, head_dim)
    rows = None
    if mask is not None:
        rows = mask.expand(*mask.shape[:-2], new_tokens, kv_len)
        rows = rows.repeat(*(1,) * (rows.dim() - 2), queries_per_kv, 1)
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=rows, scale=scale)
    out = out.reshape(batch, num_heads, new_tokens, head_dim)
    if mask is None or padding is None:
        return out
    sees_a_key = mask.any(-1, keepdim=True)  # not every kernel promises zeros for a row that sees none
    return out.masked_fill(~sees_a_key, 0.0)
