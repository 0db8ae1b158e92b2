"""Answers that lab 01's checks had not seen when they met: their author knew the notebook, not the checks."""

# ruff: noqa: F811 - written as learners write

from __future__ import annotations

import math

import torch
from torch import Tensor

from labkit.labs.lab01 import references
from labkit.labs.lab01.references import *  # noqa: F403
from tests.labs.noting import noting

WRONG, RIGHT, wrong, right = noting(references)


# 01.1
@wrong(
    "01.1",
    "softmax by hand with plain exp: overflows for large scores",
    "rows hold nan where scores are large: subtract the row's largest score before exp",
)
def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    d = q.shape[-1]
    scores = q @ k.transpose(-2, -1) / math.sqrt(d)
    e = torch.exp(scores)
    return e / e.sum(dim=-1, keepdim=True)


@wrong(
    "01.1",
    "q and k are each divided by sqrt(head_dim): scaled twice",
    "scores are divided by head_dim, not by its root: scaled twice",
)
def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    scale = math.sqrt(q.shape[-1])
    q_scaled = q / scale
    k_scaled = k / scale
    scores = torch.matmul(q_scaled, k_scaled.transpose(-1, -2))
    return torch.softmax(scores, dim=-1)


@wrong(
    "01.1",
    "softmax over dimension 1: the keys only when nothing leads",
    "with batch and heads in front, dim 1 is the heads: count from the end",
)
def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    head_dim = q.size(-1)
    scores = q.matmul(k.transpose(-2, -1)).div(head_dim**0.5)
    return scores.softmax(dim=1)


@right("01.1", "einsum, and exp(score - logsumexp)")
def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    scores = torch.einsum("...qd,...kd->...qk", q, k) * q.shape[-1] ** -0.5
    return (scores - scores.logsumexp(dim=-1, keepdim=True)).exp()


# 01.2
@wrong(
    "01.2",
    "the held columns stand behind the new ones",
    "columns are in the order of positions: what is held comes first",
)
def causal_mask(new_tokens: int, past: int) -> Tensor:
    among_new = torch.ones(new_tokens, new_tokens, dtype=torch.bool).tril()
    held = torch.ones(new_tokens, past, dtype=torch.bool)
    return torch.cat((among_new, held), dim=1)


@wrong(
    "01.2",
    "offset past - 1 where something is held: a token does not see itself",
    "row i must see column past + i, itself: one too few",
)
def causal_mask(new_tokens: int, past: int) -> Tensor:
    offset = max(past - 1, 0)
    columns = torch.arange(past + new_tokens)
    rows = torch.arange(new_tokens) + offset
    return columns[None, :] <= rows[:, None]


@wrong(
    "01.2",
    "all is allowed as soon as something is held",
    "with tokens held, a new token sees new ones that come after it",
)
def causal_mask(new_tokens: int, past: int) -> Tensor:
    if past > 0:
        # decoding: everything in the cache is past, nothing to hide
        return torch.ones(new_tokens, past + new_tokens, dtype=torch.bool)
    return torch.tril(torch.ones(new_tokens, new_tokens, dtype=torch.bool))


@right("01.2", "nested comprehension over positions")
def causal_mask(new_tokens: int, past: int) -> Tensor:
    total = past + new_tokens
    return torch.tensor([[j <= past + i for j in range(total)] for i in range(new_tokens)], dtype=torch.bool)


# 01.3
@wrong(
    "01.3",
    "head_dim before num_heads in the view: each head gets every num_heads-th number",
    "head h must have h*head_dim to (h+1)*head_dim; here it has numbers h, h+num_heads, ...",
)
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    batch, tokens, width = x.shape
    head_dim = width // num_heads
    return x.view(batch, tokens, head_dim, num_heads).permute(0, 3, 1, 2)


@wrong(
    "01.3",
    "chunks are stacked in a new first dimension: heads before batch",
    "shape is [num_heads, batch, tokens, head_dim]: heads stand before the batch",
)
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    slices = x.chunk(num_heads, dim=-1)
    return torch.stack(slices)


@wrong(
    "01.3",
    "torch.split takes a size, and was given the number of heads",
    "head_dim heads of num_heads numbers: split takes the size of a piece",
)
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    parts = torch.split(x, num_heads, dim=2)
    return torch.stack(parts, dim=1)


@right("01.3", "slices that are stacked")
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    size = x.shape[-1] // num_heads
    return torch.stack([x[..., begin : begin + size] for begin in range(0, num_heads * size, size)], dim=1)


@right("01.3", "gather by an index table of numbers")
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    places = torch.arange(x.shape[-1], device=x.device).reshape(num_heads, -1)
    return x[:, :, places].movedim(2, 1)


# 01.3b
@wrong(
    "01.3b",
    "view on a transposed tensor: RuntimeError",
    "view cannot join dimensions of a transposed tensor: reshape, or contiguous first",
)
def merge_heads(x: Tensor) -> Tensor:
    batch, num_heads, tokens, head_dim = x.shape
    return x.transpose(1, 2).view(batch, tokens, num_heads * head_dim)


@wrong(
    "01.3b",
    "head_dim before heads: numbers of the heads are interleaved",
    "a head's numbers no longer lie side by side: heads must come before head_dim",
)
def merge_heads(x: Tensor) -> Tensor:
    b, h, t, d = x.size()
    return x.permute(0, 2, 3, 1).reshape(b, t, d * h)


@wrong(
    "01.3b",
    "heads are laid behind each other along the tokens",
    "shape [batch, heads*tokens, head_dim]: side by side is the last dimension",
)
def merge_heads(x: Tensor) -> Tensor:
    heads = [x[:, h] for h in range(x.shape[1])]
    return torch.cat(heads, dim=1)


@right("01.3b", "written into an empty tensor, head by head")
def merge_heads(x: Tensor) -> Tensor:
    batch, heads, tokens, size = x.shape
    merged = x.new_empty(batch, tokens, heads * size)
    for number, one in enumerate(x.unbind(dim=1)):
        merged[..., number * size : (number + 1) * size] = one
    return merged


# 01.4
@wrong(
    "01.4",
    "first half overwritten before the second is computed from it",
    "b' was computed from the a that was turned already",
)
def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angles = positions.float()[:, None] * frequencies.float()
    cos, sin = angles.cos(), angles.sin()
    out = x.float().clone()
    a, b = out[..., :half], out[..., half:]
    out[..., :half] = a * cos - b * sin
    out[..., half:] = a * sin + b * cos
    return out.to(x.dtype)


@wrong(
    "01.4",
    "rotate_half with angles laid out for neighbours",
    "pairs are (i, i + half), but their angles are repeated for neighbours",
)
def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angles = positions.to(torch.float32)[:, None] * frequencies[None, :]
    cos = angles.cos().repeat_interleave(2, dim=-1)
    sin = angles.sin().repeat_interleave(2, dim=-1)
    x32 = x.float()
    rotated = torch.cat((-x32[..., half:], x32[..., :half]), dim=-1)
    return (x32 * cos + rotated * sin).to(x.dtype)


@wrong(
    "01.4",
    "positions counted from the first of the call",
    "positions are absolute: the first token was not turned though it stands at 5, say",
)
def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    relative = (positions - positions[0]).float()  # only distances count
    angles = torch.outer(relative, frequencies.float())
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = torch.cos(angles), torch.sin(angles)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


@right("01.4", "complex numbers")
def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    angles = torch.outer(positions.float(), frequencies)
    turned = torch.complex(a.contiguous(), b.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


# 01.5
@wrong("01.5", "index -1 drops the token dimension", "shape [batch, heads, head_dim]: keep the dimension of one token")
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    newest = q[:, :, -1]
    scores = torch.einsum("bhd,bhtd->bht", newest, k) / math.sqrt(q.shape[-1])
    weights = scores.softmax(dim=-1)
    return torch.einsum("bht,bhtd->bhd", weights, v)


@wrong(
    "01.5",
    "is_causal with one query: sees the first key only",
    "is_causal starts at the top left: the one row sees only the first key",
)
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q[:, :, -1:], k, v, is_causal=True)


@wrong(
    "01.5",
    "the newest token's own key and value are left out",
    "the newest token sees itself, too: its own key is missing",
)
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    last = q[:, :, -1:]
    old_k, old_v = k[:, :, :-1], v[:, :, :-1]
    scores = last @ old_k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return torch.softmax(scores, dim=-1) @ old_v


@right("01.5", "products elementwise, then sums")
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q[:, :, -1:] * k).sum(dim=-1) / math.sqrt(q.shape[-1])
    weights = scores.softmax(dim=-1)
    return (weights[..., None] * v).sum(dim=-2, keepdim=True)


@right("01.5", "PyTorch's own attention with one query")
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q.narrow(2, q.shape[2] - 1, 1), k, v)


# 01.6
@wrong(
    "01.6",
    "hidden scores are 0 before softmax, not -inf",
    "a score of 0 is not hidden: exp(0) is 1, later keys keep weight",
)
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = causal_mask(q.shape[-2], 0).to(q.device)
    weights = torch.softmax(scores * mask, dim=-1)
    return weights @ v


@wrong(
    "01.6",
    "softmax over all, masked and divided by the rest: nan where a later score is large",
    "a large later score underflows the earlier weights: 0 / 0; hide before softmax",
)
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = causal_mask(q.shape[-2], 0).to(q.device)
    weights = torch.softmax(scores, dim=-1) * mask
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights @ v


@wrong(
    "01.6", "a token does not see itself; nan of the first row becomes 0", "token i sees 0 to i: its own key is hidden"
)
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    tokens = q.shape[-2]
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu()
    scores = scores.masked_fill(hidden, float("-inf"))
    weights = torch.nan_to_num(torch.softmax(scores, dim=-1))
    return weights @ v


@right("01.6", "row by row, each over the keys before it")
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = []
    for end in range(1, q.shape[-2] + 1):
        scores = q[..., end - 1 : end, :] @ k[..., :end, :].transpose(-2, -1) / math.sqrt(q.shape[-1])
        rows.append(scores.softmax(dim=-1) @ v[..., :end, :])
    return torch.cat(rows, dim=-2)
