"""Answers that lab 01's checks had not seen when they met: their author knew the notebook, not the checks."""

# ruff: noqa: F811
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.labs.lab01 import references
from labkit.labs.lab01.references import causal_mask
from tests.labs.noting import noting

WRONG, RIGHT, wrong, right = noting(references)


# 01.1 · Scores and weights


@wrong("01.1", "softmax over dimension 1, counted from the front", "with heads, a row over the keys does not sum to 1")
def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return torch.softmax(scores, dim=1)


@wrong(
    "01.1",
    "softmax by hand, less the largest score of all rows together",
    "large scores: a row far below another's becomes NaN; each row has a largest score of its own",
)
def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    scores = torch.einsum("...qd,...kd->...qk", q, k) / q.shape[-1] ** 0.5
    powers = (scores - scores.max()).exp()
    return powers / powers.sum(-1, keepdim=True)


@wrong("01.1", "the caller's q is divided in place", "q has changed after the call")
def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    q /= q.shape[-1] ** 0.5
    return torch.softmax(q @ k.transpose(-1, -2), dim=-1)


@wrong("01.1", "divided by 8, the lab model's root", "the scale does not follow head_dim: right for 64 only")
def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT / 8).softmax(-1)


@wrong(
    "01.1",
    "q alone divided by the fourth root, k forgotten",
    "the scores are divided by too little: by head_dim ** 0.25, not by its square root",
)
def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    root = q.shape[-1] ** 0.25
    q = q / root
    return F.softmax(q @ k.transpose(-2, -1), dim=-1)


@right("01.1", "einsum in float64, and softmax through logsumexp")
def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    root = q.shape[-1] ** 0.25
    scores = torch.einsum("...qd,...kd->...qk", q.double() / root, k.double() / root)
    return (scores - scores.logsumexp(-1, keepdim=True)).exp().to(q.dtype)


@right("01.1", "PyTorch's own attention with the identity for values")
def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    keys = k.shape[-2]
    identity = torch.eye(keys, dtype=k.dtype, device=k.device).expand(*k.shape[:-1], keys)
    return F.scaled_dot_product_attention(q, k, identity)


# 01.2 · A causal mask, with what came before


@wrong("01.2", "cut from a table of 64 positions", "beyond 64 tokens rows or columns are missing")
def causal_mask(new_tokens: int, past: int) -> Tensor:
    table = torch.ones(64, 64, dtype=torch.bool).tril()
    return table[past : past + new_tokens, : past + new_tokens]


@wrong(
    "01.2", "the held tokens' columns put to the right of the new ones'", "columns are positions: the held come first"
)
def causal_mask(new_tokens: int, past: int) -> Tensor:
    own = torch.tril(torch.ones(new_tokens, new_tokens, dtype=torch.bool))
    held = torch.ones(new_tokens, past, dtype=torch.bool)
    return torch.cat((own, held), dim=1)


@wrong("01.2", "with something held, every new token sees all", "a new token sees new ones that come after it")
def causal_mask(new_tokens: int, past: int) -> Tensor:
    if past:
        return torch.ones(new_tokens, past + new_tokens, dtype=torch.bool)
    i = torch.arange(new_tokens)
    return i[:, None] >= i[None, :]


@wrong("01.2", "the upper triangle negated without the + 1", "no new token sees itself")
def causal_mask(new_tokens: int, past: int) -> Tensor:
    hidden = torch.ones(new_tokens, past + new_tokens).triu(past).bool()
    return ~hidden


@wrong(
    "01.2",
    "what row 0 sees multiplied by the row's number, not one more for each row: right for two new tokens",
    "with three new tokens the second sees the third",
)
def causal_mask(new_tokens: int, past: int) -> Tensor:
    rows = torch.arange(1, new_tokens + 1)[:, None]
    columns = torch.arange(past + new_tokens)[None]
    return columns < rows * (past + 1)


@right("01.2", "nested lists of Python's bools")
def causal_mask(new_tokens: int, past: int) -> Tensor:
    total = past + new_tokens
    seen = [[column - row <= past for column in range(total)] for row in range(new_tokens)]
    return torch.tensor(seen, dtype=torch.bool).reshape(new_tokens, total)


@right("01.2", "one flat range, its quotient and remainder")
def causal_mask(new_tokens: int, past: int) -> Tensor:
    total = past + new_tokens
    flat = torch.arange(new_tokens * total)
    row, column = flat // max(total, 1), flat % max(total, 1)
    return torch.logical_not(column.sub(row).gt(past)).view(new_tokens, total)


# 01.3 · Split into heads


@wrong("01.3", "every num_heads-th dimension for a head", "head h has dimensions h, h + num_heads, ...: not a slice")
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    batch, tokens, _ = x.shape
    return x.reshape(batch, tokens, -1, num_heads).permute(0, 3, 1, 2)


@wrong("01.3", "cut into slices of 64, whatever num_heads says", "the number of heads is not num_heads")
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    return torch.stack(x.split(64, dim=-1), dim=1)


@wrong(
    "01.3",
    "strides written out as if x were contiguous",
    "a part of a wider tensor, or a transposed one, gives other numbers: it reads memory beside x",
)
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    batch, tokens, width = x.shape
    head_dim = width // num_heads
    return x.as_strided((batch, num_heads, tokens, head_dim), (tokens * width, head_dim, width, 1))


@wrong("01.3", "the first row of the batch for all", "row 1 of the batch holds row 0's numbers")
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    heads = torch.stack(x[0].chunk(num_heads, dim=-1))
    return heads.expand(x.shape[0], *heads.shape)


@wrong("01.3", "transposed first, then reshaped", "the right shape, but a head's rows mix tokens")
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    batch, tokens, width = x.shape
    return x.transpose(1, 2).reshape(batch, num_heads, tokens, width // num_heads)


@right("01.3", "a sliding window as wide as its step")
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    head_dim = x.size(-1) // num_heads
    return x.unfold(-1, head_dim, head_dim).movedim(2, 1)


@right("01.3", "each number fetched by its flat index")
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    batch, tokens, width = x.shape
    head_dim = width // num_heads
    row, head, token, i = torch.meshgrid(
        *(torch.arange(n, device=x.device) for n in (batch, num_heads, tokens, head_dim)), indexing="ij"
    )
    return x.reshape(-1)[(row * tokens + token) * width + head * head_dim + i]


# 01.3b · Merge the heads


@wrong(
    "01.3b",
    "view after transpose: fits what split_heads gives, no tensor of its own memory",
    "a contiguous x raises: view cannot join dimensions that do not lie side by side",
)
def merge_heads(x: Tensor) -> Tensor:
    batch, num_heads, tokens, head_dim = x.shape
    return x.transpose(1, 2).view(batch, tokens, num_heads * head_dim)


@wrong("01.3b", "the heads' numbers taken in turn", "head 0's dimensions do not lie side by side")
def merge_heads(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(2)


@wrong("01.3b", "a batch of one row loses its dimension", "batch 1 comes out with two dimensions")
def merge_heads(x: Tensor) -> Tensor:
    batch, _, tokens, _ = x.shape
    return x.swapaxes(1, 2).reshape(batch, tokens, -1).squeeze(0)


@wrong("01.3b", "heads read one behind the other over the whole batch", "one row with all rows' heads side by side")
def merge_heads(x: Tensor) -> Tensor:
    return torch.cat(list(x.flatten(0, 1)), dim=-1)[None]


@wrong("01.3b", "straight to the shape", "the right shape, but a row mixes tokens")
def merge_heads(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])


@right("01.3b", "the heads unbound and concatenated")
def merge_heads(x: Tensor) -> Tensor:
    return torch.cat(x.unbind(dim=1), dim=-1)


@right("01.3b", "copied into a view of the result")
def merge_heads(x: Tensor) -> Tensor:
    batch, num_heads, tokens, head_dim = x.shape
    merged = x.new_empty(batch, tokens, num_heads * head_dim)
    merged.view(batch, tokens, num_heads, head_dim).transpose(1, 2).copy_(x)
    return merged


# 01.4 · Rotary positions


@wrong("01.4", "positions counted on from the first one", "positions that do not follow one another get others' angles")
def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    steps = positions[0] + torch.arange(x.shape[-2], device=x.device)
    angles = steps[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


kept_angles: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}


@wrong(
    "01.4",
    "cos and sin kept from the first call with as many tokens and pairs",
    "a second call at other positions, or with other frequencies, turns by the first one's angles",
)
def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    key = len(positions), len(frequencies)
    if key not in kept_angles:
        angles = positions[:, None].float() * frequencies
        kept_angles[key] = torch.cos(angles), torch.sin(angles)
    cos, sin = kept_angles[key]
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


@wrong("01.4", "the second half made of the turned first half", "the turned vectors are not as long as before")
def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angles = positions.unsqueeze(-1) * frequencies
    out = x.clone()
    a, b = out[..., :half], out[..., half:]
    a.copy_(a * angles.cos() - b * angles.sin())
    b.copy_(a * angles.sin() + b * angles.cos())
    return out


@wrong(
    "01.4", "frequencies made anew with base 10,000", "other frequencies than those given: another base's are ignored"
)
def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    head_dim = x.shape[-1]
    powers = 10_000.0 ** -(torch.arange(0, head_dim, 2, device=x.device) / head_dim)
    angles = torch.outer(positions.float(), powers)
    a, b = x.split(head_dim // 2, dim=-1)
    turned = torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)
    return turned.type_as(x)


@wrong(
    "01.4",
    "angles made in float32, then rounded to x's dtype before cos and sin",
    "bfloat16, late positions: the angles are off, since they were rounded to bfloat16",
)
def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    angles = (positions.float()[:, None] * frequencies[None, :]).to(x.dtype)
    cos, sin = angles.cos(), angles.sin()
    a, b = x.tensor_split(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


@wrong("01.4", "the turned numbers written into the caller's x", "x has changed after the call")
def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    half = frequencies.numel()
    angles = positions[:, None] * frequencies
    first = x[..., :half] * angles.cos() - x[..., half:] * angles.sin()
    second = x[..., :half] * angles.sin() + x[..., half:] * angles.cos()
    x[..., :half], x[..., half:] = first, second
    return x


@right("01.4", "a product of complex numbers")
def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    angles = positions[:, None] * frequencies
    a, b = x.double().chunk(2, dim=-1)
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


@right("01.4", "a 2 x 2 matrix for each position and pair, and einsum")
def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    angles = positions.to(torch.float32).view(-1, 1) * frequencies.view(1, -1)
    cos, sin = angles.cos(), angles.sin()
    wide = torch.promote_types(x.dtype, torch.float32)
    matrices = torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2)).to(wide)
    pairs = x.to(wide).unflatten(-1, (2, len(frequencies)))
    return torch.einsum("tfab,...tbf->...taf", matrices, pairs).flatten(-2).to(x.dtype)


# 01.5 · Only the last row


@wrong("01.5", "is_causal=True for one query", "only the first token is seen: the output is its value")
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, :, -1:], k, v, is_causal=True)


@wrong("01.5", "the newest token's own key and value left out", "the newest token does not see itself")
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    last = q.shape[2] - 1
    if last == 0:
        return v.clone()
    scores = q[:, :, last:] @ k[:, :, :last].transpose(2, 3) / math.sqrt(q.shape[3])
    return scores.softmax(-1) @ v[:, :, :last]


@wrong("01.5", "softmax over the queries, of which there is one", "every weight is 1: the values are added up")
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q[..., -1:, :] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return torch.softmax(scores, dim=-2) @ v


@wrong("01.5", "the last 16 rows, of which one is used", "more scores than one row's")
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q[:, :, -16:] @ k.mT / math.sqrt(q.shape[-1])
    return (scores.softmax(dim=-1) @ v)[:, :, -1:]


@wrong(
    "01.5",
    "the whole matrix by broadcasting, cut to its last row before softmax",
    "the work of the whole matrix: all queries met all keys",
)
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q[:, :, :, None] * k[:, :, None]).sum(-1) / math.sqrt(q.shape[-1])
    last = scores[:, :, -1:]
    return torch.softmax(last, dim=-1) @ v


@right("01.5", "one key at a time, with a running maximum")
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    newest = q[:, :, -1] / math.sqrt(q.shape[-1])
    top = torch.full_like(newest[..., :1], -math.inf)
    total, out = torch.zeros_like(top), torch.zeros_like(v[:, :, 0])
    for key, value in zip(k.unbind(2), v.unbind(2), strict=True):
        score = (newest * key).sum(-1, keepdim=True)
        higher = torch.maximum(top, score)
        shrink, weight = (top - higher).exp(), (score - higher).exp()
        total, out, top = total * shrink + weight, out * shrink + weight * value, higher
    return (out / total).unsqueeze(2)


@right("01.5", "einsum without the dimension of one, softmax by hand")
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    *_, head_dim = q.shape
    scores = torch.einsum("bhd,bhtd->bht", q.select(2, -1), k).div(head_dim**0.5)
    powers = torch.exp(scores - scores.amax(-1, keepdim=True))
    return torch.einsum("bht,bhtd->bhd", powers / powers.sum(-1, keepdim=True), v)[:, :, None, :]


# 01.6 · Debug: a leak that no picture shows


@wrong(
    "01.6", "masked_fill's result is dropped", "the first token's weights do not sum to 1: the scores were not masked"
)
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = causal_mask(q.shape[-2], 0).to(q.device)
    scores.masked_fill(~mask, float("-inf"))
    weights = torch.softmax(scores, dim=-1) * mask
    return weights @ v


@wrong("01.6", "-1e-9 in place of minus infinity", "hidden keys have a score of about 0 and take their share")
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = causal_mask(q.shape[-2], 0).to(q.device)
    scores = scores.masked_fill(~mask, -1e-9)
    weights = torch.softmax(scores, dim=-1) * mask
    return weights @ v


@wrong("01.6", "made to sum to 1 again, over the queries", "a token's weights do not sum to 1: the columns do")
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = causal_mask(q.shape[-2], 0).to(q.device)
    weights = torch.softmax(scores, dim=-1) * mask
    weights = weights / weights.sum(dim=-2, keepdim=True)
    return weights @ v


@wrong("01.6", "masked before softmax, but one column too far", "each token sees the next one")
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    tokens = q.shape[-2]
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = causal_mask(tokens, 1)[:, :tokens].to(q.device)
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
    return weights @ v


@wrong(
    "01.6",
    "softmax over all keys, then each row made to sum to 1 again",
    "a later key with a far larger score: the earlier tokens' weights vanish, and their outputs are NaN",
)
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = causal_mask(q.shape[-2], 0).to(q.device)
    weights = torch.softmax(scores, dim=-1) * mask
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights @ v


@right("01.6", "the mask's logarithm is added")
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = causal_mask(q.shape[-2], 0).to(q.device)
    weights = torch.softmax(scores + mask.to(scores.dtype).log(), dim=-1)
    return weights @ v


@right("01.6", "row by row, with nothing later at hand and no mask")
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = []
    for end in range(1, q.shape[-2] + 1):
        scores = q[..., end - 1 : end, :] @ k[..., :end, :].mT / q.shape[-1] ** 0.5
        rows.append(scores.softmax(-1) @ v[..., :end, :])
    return torch.cat(rows, dim=-2)
