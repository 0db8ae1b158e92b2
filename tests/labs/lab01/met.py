"""Answers that lab 01's checks had not seen when they first met: their author knew the notebook, not the checks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.attention import attention
from labkit.labs.lab01 import references
from labkit.labs.lab01.references import causal_mask, split_heads
from tests.labs.noting import noting

WRONG, RIGHT, wrong, right = noting(references)


# ---------------------------------------------------------------- 01.1 attention_weights


@wrong("01.1", "divides by 8, the root of the notebook's head_dim of 64", "the divisor must follow q's head_dim")
def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / 8, dim=-1)


@wrong("01.1", "divides by head_dim, not by its root", "divide by the square root of head_dim")
def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1], dim=-1)


@wrong("01.1", "softmax over the queries (dim=-2)", "each row (over the keys) must sum to 1: softmax over the last dim")
def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return scores.softmax(dim=-2)


@wrong("01.1", "operator precedence: d ** 1 / 2 divides by d and again by 2", "scores are too small: sqrt(head_dim)")
def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 1 / 2, dim=-1)


@wrong("01.1", "bmm: three dimensions only", "any number of leading dimensions: fails for rank 2 or 4")
def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(torch.bmm(q, k.transpose(1, 2)) / math.sqrt(q.shape[-1]), dim=-1)


@wrong("01.1", "divides the weights, after softmax", "rows sum to 1/sqrt(head_dim): scale before softmax")
def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1), dim=-1) / math.sqrt(q.shape[-1])


@wrong("01.1", "root rounded down (isqrt): right for head_dim 16, 64, 256 only", "wrong scale for head_dim 32 or 80")
def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / math.isqrt(q.shape[-1]), dim=-1)


@wrong("01.1", "softmax by hand without taking off the maximum", "large scores overflow: nan in place of weights")
def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    raised = torch.exp(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]))
    return raised / raised.sum(-1, keepdim=True)


@wrong("01.1", "scales q in place", "the caller's q has changed")
def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    q /= math.sqrt(q.shape[-1])
    return torch.softmax(q @ k.transpose(-2, -1), dim=-1)


@wrong("01.1", "adds a causal mask nobody asked for", "every query over ALL keys: some keys get no weight")
def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    past = max(k.shape[-2] - q.shape[-2], 0)
    hidden = ~torch.ones_like(scores, dtype=torch.bool).tril(past)
    return torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)


@wrong("01.1", "k q^T: queries and keys swapped", "rows belong to queries: [queries, keys], not the transpose")
def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(k @ q.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)


@wrong("01.1", "divides by the root of the number of keys", "divide by sqrt(head_dim), not sqrt(keys)")
def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    return torch.softmax(scores / math.sqrt(scores.shape[-1]), dim=-1)


@right("01.1", "einsum, with the scale shared between q and k")
def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    share = q.size(-1) ** -0.25
    return torch.einsum("...qd,...kd->...qk", q * share, k * share).softmax(-1)


@right("01.1", "float64 inside, logsumexp, cast back")
def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    scores = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    return (scores - scores.logsumexp(dim=-1, keepdim=True)).exp().to(q.dtype)


@right("01.1", "PyTorch's own attention with the identity as values")
def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    keys = k.shape[-2]
    cards = torch.eye(keys, dtype=k.dtype, device=k.device).expand(*k.shape[:-2], keys, keys)
    return F.scaled_dot_product_attention(query=q, key=k, value=cards)


@right("01.1", "a loop over the queries, elementwise products, softmax by hand with the maximum off, in place")
def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    rows = []
    for query in q.unbind(-2):
        row = (query.unsqueeze(-2) * k).sum(dim=-1).div_(math.sqrt(q.shape[-1]))
        row.sub_(row.amax(-1, keepdim=True)).exp_()
        rows.append(row.div_(row.sum(-1, keepdim=True)))
    return torch.stack(rows, dim=-2)


class _Weights:
    """A callable object that also holds the softmax it uses."""

    __slots__ = ("softmax",)

    def __init__(self) -> None:
        self.softmax = functools.partial(F.softmax, dim=-1)

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        return self.softmax(torch.matmul(q, k.swapaxes(-1, -2)).mul(1 / math.sqrt(k.shape[-1])))


RIGHT.append(("01.1", "a callable object with __slots__", _Weights()))


# ---------------------------------------------------------------- 01.2 causal_mask


@wrong("01.2", "tril without the offset: what is held is forgotten", "row 0 stands at position past, not 0")
def causal_mask(new_tokens: int, past: int) -> Tensor:
    return torch.ones(new_tokens, past + new_tokens, dtype=torch.bool).tril()


@wrong("01.2", "a token may not see itself (diagonal past - 1)", "each token sees itself too")
def causal_mask(new_tokens: int, past: int) -> Tensor:
    return torch.ones(new_tokens, past + new_tokens, dtype=torch.bool).tril(past - 1)


@wrong("01.2", "a token sees one later token (diagonal past + 1)", "one token of the future is visible")
def causal_mask(new_tokens: int, past: int) -> Tensor:
    return torch.ones(new_tokens, past + new_tokens, dtype=torch.bool).tril(diagonal=past + 1)


@wrong("01.2", "inverted: True = hidden", "True must mean may see")
def causal_mask(new_tokens: int, past: int) -> Tensor:
    return torch.triu(torch.ones(new_tokens, past + new_tokens), diagonal=past + 1).bool()


@wrong("01.2", "columns for the new tokens only", "a column for every token, the held ones included")
def causal_mask(new_tokens: int, past: int) -> Tensor:
    return torch.tril(torch.ones(new_tokens, new_tokens, dtype=torch.bool))


@wrong("01.2", "held tokens are hidden", "held tokens come before: every new token may see them")
def causal_mask(new_tokens: int, past: int) -> Tensor:
    own = torch.ones(new_tokens, new_tokens).tril().bool()
    return torch.cat((torch.zeros(new_tokens, past, dtype=torch.bool), own), dim=1)


@wrong("01.2", "a float mask of 0 and -inf", "bool is asked, not an additive mask")
def causal_mask(new_tokens: int, past: int) -> Tensor:
    return torch.full((new_tokens, past + new_tokens), float("-inf")).triu(past + 1)


@wrong("01.2", "with anything held, everything is visible", "the new tokens must not see one another's future")
def causal_mask(new_tokens: int, past: int) -> Tensor:
    mask = torch.ones(new_tokens, past + new_tokens, dtype=torch.bool)
    return mask if past else mask.tril()


@wrong("01.2", "a row for every token, held ones too", "a row for each NEW token: [new_tokens, past + new_tokens]")
def causal_mask(new_tokens: int, past: int) -> Tensor:
    total = past + new_tokens
    return torch.arange(total)[None, :] <= torch.arange(total)[:, None]


@wrong("01.2", "the new tokens' columns stand before the held ones'", "column j is position j: held tokens come first")
def causal_mask(new_tokens: int, past: int) -> Tensor:
    own = torch.ones(new_tokens, new_tokens, dtype=torch.bool).tril()
    return torch.hstack((own, own.new_ones(new_tokens, past)))


@wrong("01.2", "offset of the notebook's example, 3, written down", "right for past = 3 only")
def causal_mask(new_tokens: int, past: int) -> Tensor:
    return torch.ones(new_tokens, past + new_tokens, dtype=torch.bool).tril(3)


def _remembering_mask() -> Callable:
    made: dict[int, Tensor] = {}

    def causal_mask(new_tokens: int, past: int) -> Tensor:
        total = past + new_tokens
        if total not in made:
            made[total] = torch.arange(total)[None, :] <= torch.arange(new_tokens)[:, None] + past
        return made[total]

    return causal_mask


WRONG.append((
    "01.2",
    "masks are remembered by the number of columns alone: 2 after 3 comes back for 5 after 0",
    "the answer depends on earlier calls: the same total, another split",
    _remembering_mask(),
))  # fmt: skip


@right("01.2", "nested comprehension over Python's integers")
def causal_mask(new_tokens: int, past: int) -> Tensor:
    cells = [j <= past + i for i in range(new_tokens) for j in range(past + new_tokens)]
    return torch.tensor(cells, dtype=torch.bool).reshape(new_tokens, past + new_tokens)


@right("01.2", "np.tri, handed over")
def causal_mask(new_tokens: int, past: int) -> Tensor:
    return torch.from_numpy(np.tri(new_tokens, past + new_tokens, past, dtype=bool))


@right("01.2", "held columns and a triangle, side by side")
def causal_mask(new_tokens: int, past: int) -> Tensor:
    triangle = ~torch.ones(new_tokens, new_tokens, dtype=torch.bool).triu(1)
    return torch.cat([triangle.new_ones((new_tokens, past)), triangle], dim=-1)


@right("01.2", "the last rows of the square")
def causal_mask(new_tokens: int, past: int) -> Tensor:
    square = torch.ones((past + new_tokens,) * 2).tril() == 1
    return square[past:]


@right("01.2", "one True per row at its own position, then filled in from the right")
def causal_mask(new_tokens: int, past: int) -> Tensor:
    mask = torch.zeros(new_tokens, past + new_tokens, dtype=torch.int64)
    for row in range(new_tokens):
        mask[row, past + row] = 1
    return mask.flip(-1).cumsum(-1).flip(-1).bool()


RIGHT.append((
    "01.2",
    "a lambda: torch.ge on broadcast aranges",
    lambda new_tokens, past: torch.ge(torch.arange(past, past + new_tokens)[:, None], torch.arange(past + new_tokens)),
))  # fmt: skip


# ---------------------------------------------------------------- 01.3 split_heads


@wrong("01.3", "view straight to [batch, heads, tokens, head_dim]", "heads hold a jumble of tokens")
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    batch, tokens, width = x.shape
    return x.reshape(batch, num_heads, tokens, width // num_heads)


@wrong("01.3", "no transpose: [batch, tokens, heads, head_dim]", "heads stand before tokens: swap dimensions 1 and 2")
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1))


@wrong("01.3", "each head takes every num_heads-th dimension", "head h has a run of dimensions, h * head_dim on")
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    batch, tokens, width = x.shape
    return x.reshape(batch, tokens, width // num_heads, num_heads).permute(0, 3, 1, 2)


@wrong("01.3", "head_dim 64 written down", "head_dim is the width over num_heads, here not 64")
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    batch, tokens, _ = x.shape
    return x.reshape(batch, tokens, num_heads, 64).transpose(1, 2)


@wrong("01.3", "9 heads written down, the argument ignored", "num_heads is ignored")
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    batch, tokens, _ = x.shape
    return x.reshape(batch, tokens, 9, -1).transpose(1, 2)


@wrong("01.3", "split takes a size, not a number of parts", "num_heads parts, not parts of num_heads")
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    return torch.stack(x.split(num_heads, dim=-1), dim=1)


@wrong("01.3", "stack in front: [heads, batch, tokens, head_dim]", "batch comes first")
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    return torch.stack(x.chunk(num_heads, dim=-1))


@wrong("01.3", "batch of 1 assumed", "two sequences are laid into one")
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    return x.reshape(x.shape[1], num_heads, -1).transpose(0, 1).unsqueeze(0)


@wrong("01.3", "view over batch and tokens together: needs contiguous x", "a slice of a longer x raises RuntimeError")
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    batch, tokens, width = x.shape
    flat = x.view(batch * tokens, num_heads, width // num_heads)
    return flat.view(batch, tokens, num_heads, -1).transpose(1, 2)


@wrong("01.3", "one swap too many: [batch, heads, head_dim, tokens]", "tokens, then head_dim")
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(2, (num_heads, -1)).permute(0, 2, 3, 1)


@right("01.3", "chunk and stack")
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    return torch.stack(tensors=x.chunk(chunks=num_heads, dim=-1), dim=1)


@right("01.3", "a loop that fills a new tensor head by head")
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    batch, tokens, width = x.size()
    size, rest = divmod(width, num_heads)
    assert rest == 0
    heads = x.new_empty((batch, num_heads, tokens, size))
    for head in range(num_heads):
        heads[:, head].copy_(x[..., slice(head * size, (head + 1) * size)])
    return heads


@right("01.3", "as_strided: the same memory under other strides")
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    (batch, tokens, width), (per_row, per_token, per_number) = x.shape, x.stride()
    size = width // num_heads
    shape, strides = (batch, num_heads, tokens, size), (per_row, size * per_number, per_token, per_number)
    return x.as_strided(shape, strides, x.storage_offset())


@right("01.3", "movedim after unflatten, contiguous")
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, x.shape[-1] // num_heads)).movedim(-2, -3).contiguous()


@right("01.3", "fancy indexing with a table of dimensions per head")
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    table = torch.arange(x.shape[-1], device=x.device).view(num_heads, -1)
    return x[:, :, table].transpose(1, 2)


# ---------------------------------------------------------------- 01.3b merge_heads


@wrong("01.3b", "reshape without transposing back", "each token's vector must hold its own heads: tokens are mixed")
def merge_heads(x: Tensor) -> Tensor:
    batch, heads, tokens, head_dim = x.shape
    return x.reshape(batch, tokens, heads * head_dim)


@wrong("01.3b", "view after transpose: only for what split_heads returned as a view", "contiguous x raises: reshape")
def merge_heads(x: Tensor) -> Tensor:
    batch, heads, tokens, head_dim = x.shape
    return x.transpose(1, 2).view(batch, tokens, heads * head_dim)


@wrong("01.3b", "heads interleaved: head_dim before heads", "the numbers of a head stand together")
def merge_heads(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(-2)


@wrong("01.3b", "heads joined along the tokens", "side by side in the last dimension, not one after another")
def merge_heads(x: Tensor) -> Tensor:
    return torch.cat(x.unbind(1), dim=1)


@wrong("01.3b", "576 written down", "the width is num_heads * head_dim, here not 576")
def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], 576)


@wrong("01.3b", "everything behind the batch flattened", "tokens keep their own dimension")
def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(1)


@wrong("01.3b", "squeezed: one token or a batch of 1 loses a dimension", "a dimension of size 1 must stay")
def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2).squeeze()


@wrong("01.3b", "heads summed", "laid side by side, not added: the width is num_heads * head_dim")
def merge_heads(x: Tensor) -> Tensor:
    return x.sum(dim=1)


@wrong("01.3b", "transposes the caller's tensor in place", "x itself has changed its shape")
def merge_heads(x: Tensor) -> Tensor:
    return x.transpose_(1, 2).reshape(x.shape[0], x.shape[1], -1)


@wrong("01.3b", "only the first row of the batch, repeated by broadcasting", "row 1 of the batch is row 0's")
def merge_heads(x: Tensor) -> Tensor:
    merged = torch.cat(list(x[0]), dim=-1)
    return merged.expand(x.shape[0], -1, -1)


@right("01.3b", "cat of the unbound heads")
def merge_heads(x: Tensor) -> Tensor:
    return torch.cat(x.unbind(dim=1), dim=-1)


@right("01.3b", "einsum as a transpose, then flatten")
def merge_heads(x: Tensor) -> Tensor:
    return torch.einsum("bhtd->bthd", x).flatten(start_dim=-2, end_dim=-1)


@right("01.3b", "a loop that writes slices")
def merge_heads(x: Tensor) -> Tensor:
    batch, heads, tokens, size = x.shape
    wide = torch.zeros((batch, tokens, heads * size), dtype=x.dtype, device=x.device)
    for h, one in enumerate(x.transpose(0, 1)):
        wide[:, :, h * size : h * size + size] = one
    return wide


def _joined(join: Callable, x: Tensor) -> Tensor:
    return join([x[:, head] for head in range(x.shape[1])])


RIGHT.append(
    ("01.3b", "functools.partial of a helper", functools.partial(_joined, functools.partial(torch.cat, dim=2)))
)
RIGHT.append(("01.3b", "a lambda: permute, contiguous, view", lambda x: x.permute(0, 2, 1, 3).contiguous().view(x.size(0), x.size(2), x.size(1) * x.size(3))))  # fmt: skip


# ---------------------------------------------------------------- 01.4 apply_rope


@wrong("01.4", "pairs neighbours (Meta's layout)", "dimension i is paired with i + head_dim / 2")
def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


@wrong("01.4", "turns the other way round: signs of sin swapped", "a cos - b sin first, then a sin + b cos")
def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


@wrong("01.4", "angles in x's dtype: bfloat16 has no position 8,001", "angles must be float32 whatever x is")
def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    angles = torch.outer(positions.to(x.dtype), frequencies.to(x.dtype))
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), dim=-1)


@wrong("01.4", "comes back as float32 for bfloat16 x", "the result must have x's dtype")
def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    angles = positions[:, None] * frequencies
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), dim=-1)


@wrong("01.4", "positions ignored: counts from 0", "positions is not used: a token at 100 is not turned to 100")
def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    angles = torch.arange(x.shape[-2])[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


@wrong(
    "01.4", "counts on from the first position: only for successive positions", "each token has a position of its own"
)
def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    stands = positions[0] + torch.arange(x.shape[-2])
    angles = stands.float()[:, None] * frequencies[None, :]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


@wrong("01.4", "angles laid along [tokens, heads, head_dim]", "tokens are the last dimension but one")
def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    angles = torch.outer(positions.float(), frequencies)[:, None, :]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


@wrong("01.4", "the second half is made from the first half's new values", "a is overwritten before b is turned")
def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    out = x.clone()
    a, b = out.chunk(2, dim=-1)
    a.copy_(a * cos - b * sin)
    b.copy_(a * sin + b * cos)
    return out


@wrong("01.4", "turns x in place", "the caller's x has changed")
def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    half = x.shape[-1] // 2
    a, b = x[..., :half].clone(), x[..., half:].clone()
    x[..., :half] = a * cos - b * sin
    x[..., half:] = a * sin + b * cos
    return x


@wrong("01.4", "frequencies made anew with base 10,000, the argument ignored", "frequencies is not used")
def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    size = x.shape[-1]
    own = 10_000.0 ** -(torch.arange(0, size, 2) / size)
    angles = positions[:, None] * own
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


@wrong(
    "01.4", "rotate_half with cos and sin repeated for neighbours", "both halves take the angles 0, 1, 2, ... in order"
)
def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    angles = (positions[:, None] * frequencies).repeat_interleave(2, dim=-1)
    a, b = x.chunk(2, dim=-1)
    turned = torch.cat((-b, a), dim=-1)
    return x * angles.cos().to(x.dtype) + turned * angles.sin().to(x.dtype)


@wrong("01.4", "halves cut at 32", "half of head_dim is not 32 here")
def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :32], x[..., 32:]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def _remembering_rope() -> Callable:
    tables: dict[tuple[int, ...], Tensor] = {}

    def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
        if x.shape[-2:] not in tables:
            tables[x.shape[-2:]] = positions[:, None] * frequencies
        angles = tables[x.shape[-2:]]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)

    return apply_rope


WRONG.append((
    "01.4",
    "the table of angles is kept by shape: the first call's positions serve every later call",
    "the answer depends on an earlier call: other positions, the same angles",
    _remembering_rope(),
))  # fmt: skip


@right("01.4", "complex numbers, polar")
def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    angles = torch.outer(positions.to(torch.float32), frequencies)
    turn = torch.polar(torch.ones_like(angles), angles)
    real, imaginary = x.to(wide).tensor_split(2, dim=-1)
    turned = torch.complex(real.contiguous(), imaginary.contiguous()) * turn
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


@right("01.4", "rotate_half as in Hugging Face")
def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    angles = (positions.float()[:, None] * frequencies[None, :]).repeat(1, 2)
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * angles.cos() + rotated * angles.sin()).to(x.dtype)


@right("01.4", "a loop over the pairs, written into a new tensor")
def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    out, half = torch.empty_like(x), frequencies.numel()
    for i in range(half):
        angle = positions * frequencies[i]
        a, b = x[..., i], x[..., i + half]
        out[..., i] = a * angle.cos() - b * angle.sin()
        out[..., i + half] = a * angle.sin() + b * angle.cos()
    return out


@right("01.4", "rotation matrices and einsum")
def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    angles = torch.einsum("t,f->tf", positions.to(frequencies.dtype), frequencies)
    cos, sin = angles.cos(), angles.sin()
    matrices = torch.stack((torch.stack((cos, -sin)), torch.stack((sin, cos)))).to(x.dtype)  # [2, 2, tokens, pairs]
    return torch.einsum("iotf,...tof->...tif", matrices, x.unflatten(-1, (2, -1))).flatten(-2)


@right("01.4", "roll by half a head, and a sine with its sign built in")
def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    angles = positions.unsqueeze(-1).mul(frequencies)
    sin = angles.sin()
    signed = torch.cat((sin.neg(), sin), dim=-1).to(x.dtype)
    cos = angles.cos().tile(2).to(x.dtype)
    return torch.addcmul(x * cos, x.roll(frequencies.shape[0], dims=-1), signed)


# ---------------------------------------------------------------- 01.5 attend_last


@wrong("01.5", "all rows, then the last is taken", "the work of one row: all rows' scores were computed")
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, -1:]


@wrong("01.5", "is_causal with one row: it sees the first key alone", "the newest token sees all keys")
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, :, -1:], k, v, is_causal=True)


@wrong("01.5", "the tokens' dimension is lost", "[batch, num_heads, 1, head_dim]: keep the dimension of 1")
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhd,bhkd->bhk", q[:, :, -1], k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhk,bhkd->bhd", scores.softmax(-1), v)


@wrong("01.5", "not scaled", "divide by sqrt(head_dim)")
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q[:, :, -1:] @ k.transpose(-2, -1), dim=-1) @ v


@wrong("01.5", "last head in place of last token: q[:, -1:]", "tokens are dimension 2")
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q[:, -1:] @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return torch.softmax(scores, dim=-1) @ v


@wrong("01.5", "the first token's query", "the newest token stands last")
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q[:, :, :1] @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return torch.softmax(scores, dim=-1) @ v


@wrong("01.5", "the newest token does not see itself", "its own key and value belong to it")
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q[:, :, -1:] @ k[:, :, :-1].transpose(-2, -1) / math.sqrt(q.shape[-1])
    return torch.softmax(scores, dim=-1) @ v[:, :, :-1]


@wrong("01.5", "softmax over the single query", "every weight is 1: softmax over the keys")
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q[:, :, -1:] @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return torch.softmax(scores, dim=2) @ v


@wrong("01.5", "softmax forced to float32 and not cast back", "bfloat16 or float64 q, k, v: the product with v raises")
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q[:, :, -1:] @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return torch.softmax(scores, dim=-1, dtype=torch.float32) @ v


@wrong("01.5", "bfloat16 inside, cast back", "two digits only: precision is lost")
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    newest, keys, values = (t.to(torch.bfloat16) for t in (q[:, :, -1:], k, v))
    return F.scaled_dot_product_attention(newest, keys, values).to(q.dtype)


@wrong("01.5", "batch of 1 assumed: the first row only", "the other rows of the batch are missing")
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q[0, :, -1:] @ k[0].mT / math.sqrt(q.shape[-1])
    return (scores.softmax(-1) @ v[0]).unsqueeze(0)


@wrong("01.5", "root of the number of tokens", "the divisor is sqrt(head_dim), not sqrt(tokens)")
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q[:, :, -1:] @ k.transpose(-2, -1) / math.sqrt(q.shape[-2])
    return torch.softmax(scores, dim=-1) @ v


@right("01.5", "PyTorch's own on one row, keywords only")
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query=q[..., -1:, :], key=k, value=v)


@right("01.5", "elementwise products and sums, no matmul")
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.sum(q[:, :, -1:] * k, dim=-1, keepdim=True) / math.sqrt(k.shape[-1])
    return torch.sum(torch.softmax(scores, dim=2) * v, dim=2, keepdim=True)


@right("01.5", "online softmax: one key after another, no score kept")
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    newest = q[:, :, -1].double() / math.sqrt(q.shape[-1])
    top = newest.new_full(newest.shape[:2], float("-inf"))
    total, out = torch.zeros_like(top), torch.zeros_like(newest)
    for key, value in zip(k.double().unbind(2), v.double().unbind(2), strict=True):
        score = (newest * key).sum(-1)
        higher = torch.maximum(top, score)
        shrink, share = (top - higher).exp(), (score - higher).exp()
        total = total * shrink + share
        out = out * shrink[..., None] + share[..., None] * value
        top = higher
    return (out / total[..., None]).unsqueeze(2).to(q.dtype)


@right("01.5", "einsum, float32 softmax cast back")
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q.narrow(2, q.shape[2] - 1, 1), k) * q.shape[-1] ** -0.5
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


@right("01.5", "loops over rows of the batch and heads")
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def one_head(question: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return torch.softmax(keys @ question / math.sqrt(len(question)), 0) @ values

    rows = [[one_head(q[b, h, -1], k[b, h], v[b, h]) for h in range(q.shape[1])] for b in range(q.shape[0])]
    return torch.stack([torch.stack(heads) for heads in rows]).unsqueeze(-2)


@right("01.5", "labkit's attention on the last query")
def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q[:, :, -1:], k, v)


# ---------------------------------------------------------------- 01.6 attend


@wrong("01.6", "left as it stands: mask after softmax", "hidden keys still take part in the sum: mask the scores")
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = causal_mask(q.shape[-2], 0).to(q.device)
    weights = torch.softmax(scores, dim=-1) * mask
    return weights @ v


@wrong(
    "01.6", "softmax of all, then divided by what is left: 0/0 where a later key scores high", "a later key gives nan"
)
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = causal_mask(q.shape[-2], 0).to(q.device)
    weights = torch.softmax(scores, dim=-1) * mask
    return (weights / weights.sum(-1, keepdim=True)) @ v


@wrong("01.6", "scores times mask: hidden keys score 0, not -inf", "exp(0) is 1: later values still come in")
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = causal_mask(q.shape[-2], 0).to(q.device)
    return torch.softmax(scores * mask, dim=-1) @ v


@wrong("01.6", "fills where the mask is True", "the mask says what may be SEEN: fill the rest")
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = causal_mask(q.shape[-2], 0).to(q.device)
    return torch.softmax(scores.masked_fill(mask, float("-inf")), dim=-1) @ v


@wrong("01.6", "1e-9 for -1e9", "a hidden score must be -inf, not nearly 0")
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = causal_mask(q.shape[-2], 0).to(q.device)
    return torch.softmax(scores.masked_fill(mask == 0, 1e-9), dim=-1) @ v


@wrong("01.6", "adds ~mask * -inf: 0 * inf is nan", "nan everywhere: fill, do not multiply by -inf")
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = causal_mask(q.shape[-2], 0).to(q.device)
    return torch.softmax(scores + ~mask * float("-inf"), dim=-1) @ v


@wrong(
    "01.6", "hidden scores of -100: not low enough when the visible ones are lower", "large scores: the future leaks"
)
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = causal_mask(q.shape[-2], 0).to(q.device)
    return torch.softmax(torch.where(mask, scores, -100.0), dim=-1) @ v


@wrong("01.6", "a token does not see itself: the first row is nan", "token i sees 0 to i, itself included")
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).tril(-1)
    return torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1) @ v


@wrong("01.6", "a second softmax over the masked weights", "softmax once, over the masked scores")
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = causal_mask(q.shape[-2], 0).to(q.device)
    weights = torch.softmax(scores, dim=-1)
    return torch.softmax(weights.masked_fill(~mask, float("-inf")), dim=-1) @ v


@wrong("01.6", "the mask's size from dimension 0: rank 2 only", "any leading dimensions: tokens are dimension -2")
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = causal_mask(q.shape[0], 0).to(q.device)
    return torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1) @ v


@wrong("01.6", "PyTorch's own without is_causal", "no mask at all: every token sees the future")
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@wrong("01.6", "scale lost while mending", "scores are no longer divided by sqrt(head_dim)")
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = causal_mask(q.shape[-2], 0).to(q.device)
    scores = (q @ k.transpose(-2, -1)).masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ v


@right("01.6", "PyTorch's own, is_causal")
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True)


@right("01.6", "an additive mask of 0 and -inf")
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    hide = torch.full(scores.shape[-2:], float("-inf"), dtype=scores.dtype, device=scores.device).triu_(1)
    return scores.add_(hide).softmax(-1).matmul(v)


@right("01.6", "row by row over the prefix, no mask")
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = []
    for i in range(q.shape[-2]):
        seen = slice(0, i + 1)
        scores = q[..., i : i + 1, :] @ k[..., seen, :].transpose(-1, -2) / math.sqrt(q.shape[-1])
        rows.append(torch.softmax(scores, dim=-1) @ v[..., seen, :])
    return torch.cat(rows, dim=-2)


@right("01.6", "the lowest finite number, float32 softmax cast back")
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(-2, -1)).to(wide) * q.shape[-1] ** -0.5
    scores = torch.where(causal_mask(q.shape[-2], 0).to(q.device), scores, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1).to(v.dtype) @ v


@right("01.6", "masked exponentials by hand, float64 inside, bool index assignment")
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("...id,...jd->...ij", q.double(), k.double()) / math.sqrt(q.shape[-1])
    scores[..., ~causal_mask(q.shape[-2], past=0).to(q.device)] = -math.inf
    raised = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (raised @ v.double() / raised.sum(-1, keepdim=True)).to(q.dtype)
