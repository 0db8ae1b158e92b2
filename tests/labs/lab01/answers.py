"""Wrong and right answers to lab 01's blanks."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.labs.lab01.references import apply_rope, attention_weights, causal_mask, leaky_attend, split_heads
from tests.labs.answer import Wrong
from tests.labs.lab01 import later_answers


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])


# 01.1


def naive_softmax(q: Tensor, k: Tensor) -> Tensor:
    weights = scores(q, k).exp()
    return weights / weights.sum(-1, keepdim=True)


def always_float32(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(scores(q, k), dim=-1, dtype=torch.float32)


def scales_in_place(q: Tensor, k: Tensor) -> Tensor:
    q *= q.shape[-1] ** -0.5
    return torch.softmax(q @ k.transpose(-2, -1), dim=-1)


def forgets_to_return(q: Tensor, k: Tensor) -> None:
    torch.softmax(scores(q, k), dim=-1)


def einsum_weights(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("...qd,...kd->...qk", q * q.shape[-1] ** -0.5, k).softmax(-1)


def stable_softmax(q: Tensor, k: Tensor) -> Tensor:
    s = scores(q, k)
    s = torch.exp(s - s.amax(-1, keepdim=True))
    return s / s.sum(-1, keepdim=True)


def loop_weights(q: Tensor, k: Tensor) -> Tensor:
    rows = [torch.softmax((k * q[..., i : i + 1, :]).sum(-1) / q.shape[-1] ** 0.5, -1) for i in range(q.shape[-2])]
    return torch.stack(rows, dim=-2)


def fused_weights(q: Tensor, k: Tensor) -> Tensor:
    identity = torch.eye(k.shape[-2], dtype=q.dtype).expand(*k.shape[:-2], -1, -1)
    return F.scaled_dot_product_attention(q, k, identity)


WEIGHTS = [
    Wrong("01.1", "no-scale", "no division by sqrt(head_dim)", lambda q, k: torch.softmax(q @ k.mT, -1)),
    Wrong("01.1", "scale-twice", "divided by head_dim", lambda q, k: torch.softmax(q @ k.mT / q.shape[-1], -1)),
    Wrong(
        "01.1",
        "scale-up",
        "multiplied by sqrt(head_dim)",
        lambda q, k: torch.softmax(q @ k.mT * q.shape[-1] ** 0.5, -1),
    ),
    Wrong(
        "01.1",
        "scale-by-keys",
        "divided by the root of the number of keys",
        lambda q, k: torch.softmax(q @ k.mT / math.sqrt(k.shape[-2]), -1),
    ),
    Wrong(
        "01.1",
        "scale-after",
        "softmax first, division afterwards",
        lambda q, k: torch.softmax(q @ k.mT, -1) / math.sqrt(q.shape[-1]),
    ),
    Wrong("01.1", "axis", "softmax along the queries", lambda q, k: torch.softmax(scores(q, k), -2)),
    Wrong("01.1", "axis-from-the-front", "softmax(dim=1) on a batch", lambda q, k: torch.softmax(scores(q, k), 1)),
    Wrong("01.1", "axis-from-the-front", "softmax(dim=0)", lambda q, k: torch.softmax(scores(q, k), 0)),
    Wrong("01.1", "fixed-scale", "divided by 8, whatever head_dim is", lambda q, k: torch.softmax(q @ k.mT / 8, -1)),
    Wrong("01.1", "no-softmax", "the scores themselves", scores),
    Wrong("01.1", "no-softmax", "the plain product", lambda q, k: q @ k.mT),
    Wrong("01.1", "swapped", "keys as rows", lambda q, k: torch.softmax(scores(q, k), -1).mT),
    Wrong(
        "01.1",
        "proportional",
        "shares of the sum, as popular texts draw them",
        lambda q, k: (q @ k.mT) / (q @ k.mT).sum(-1, keepdim=True),
    ),
    Wrong("01.1", "sigmoid", "a sigmoid per score", lambda q, k: torch.sigmoid(scores(q, k))),
    Wrong("01.1", "overflow", "exp without subtracting the largest score", naive_softmax),
    Wrong("01.1", "dtype", "softmax in float32, never brought back", always_float32),
    Wrong("01.1", "arguments-changed", "q is scaled in place", scales_in_place),
    Wrong("01.1", "returned-none", "no return", forgets_to_return),
]

# 01.2


def pasted_size(new_tokens: int, past: int) -> Tensor:
    return torch.arange(5)[None, :] <= torch.arange(3)[:, None] + 2


MASK = [
    Wrong(
        "01.2",
        "mask-offset",
        "row i taken for position i",
        lambda new_tokens, past: torch.ones(new_tokens, past + new_tokens).tril().bool(),
        source="hyprstream/hyprstream#1521",
    ),
    Wrong(
        "01.2",
        "no-past-columns",
        "a square mask of the new tokens",
        lambda new_tokens, past: torch.ones(new_tokens, new_tokens).tril().bool(),
        source="rasbt/LLMs-from-scratch#697",
    ),
    Wrong(
        "01.2",
        "old-rows",
        "a square mask of all tokens",
        lambda new_tokens, past: torch.ones(past + new_tokens, past + new_tokens).tril().bool(),
    ),
    Wrong(
        "01.2",
        "blind-to-itself",
        "a strict comparison",
        lambda new_tokens, past: torch.arange(past + new_tokens) < torch.arange(new_tokens)[:, None] + past,
    ),
    Wrong(
        "01.2",
        "mask-offset-too-large",
        "the diagonal one too far",
        lambda new_tokens, past: torch.ones(new_tokens, past + new_tokens).tril(past + 1).bool(),
    ),
    Wrong("01.2", "mask-inverted", "True for hidden", lambda new_tokens, past: ~causal_mask(new_tokens, past)),
    Wrong(
        "01.2",
        "mask-inverted",
        "triu, as in PyTorch's older attention modules",
        lambda new_tokens, past: torch.ones(new_tokens, past + new_tokens).triu(past + 1).bool(),
    ),
    Wrong(
        "01.2",
        "not-bool",
        "0 and -inf to add to the scores",
        lambda new_tokens, past: torch.zeros(new_tokens, past + new_tokens).masked_fill(
            ~causal_mask(new_tokens, past), float("-inf")
        ),
    ),
    Wrong("01.2", "not-bool", "0 and 1", lambda new_tokens, past: causal_mask(new_tokens, past).int()),
    Wrong(
        "01.2",
        "past-at-the-end",
        "the past's columns on the right",
        lambda new_tokens, past: torch.cat(
            (causal_mask(new_tokens, 0), torch.ones(new_tokens, past, dtype=torch.bool)), dim=1
        ),
    ),
    Wrong(
        "01.2",
        "cache-hidden",
        "the past's columns False",
        lambda new_tokens, past: torch.cat(
            (torch.zeros(new_tokens, past, dtype=torch.bool), causal_mask(new_tokens, 0)), dim=1
        ),
    ),
    Wrong(
        "01.2",
        "no-mask",
        "ones everywhere",
        lambda new_tokens, past: torch.ones(new_tokens, past + new_tokens, dtype=torch.bool),
    ),
    Wrong("01.2", "remembered", "sizes copied from an example", pasted_size),
]


def loop_mask(new_tokens: int, past: int) -> Tensor:
    mask = torch.zeros(new_tokens, past + new_tokens, dtype=torch.bool)
    for i in range(new_tokens):
        mask[i, : past + i + 1] = True
    return mask


# 01.3

HEADS = [
    Wrong(
        "01.3",
        "mixed-tokens",
        "view straight to the final shape",
        lambda x, num_heads: x.view(x.shape[0], num_heads, x.shape[1], -1),
    ),
    Wrong(
        "01.3",
        "tokens-first",
        "no transpose",
        lambda x, num_heads: x.view(*x.shape[:2], num_heads, -1),
    ),
    Wrong(
        "01.3",
        "interleaved",
        "head_dim and num_heads cut in the wrong order",
        lambda x, num_heads: x.view(*x.shape[:2], -1, num_heads).permute(0, 3, 1, 2),
    ),
    Wrong(
        "01.3",
        "sizes-swapped",
        "num_heads taken for head_dim",
        lambda x, num_heads: x.view(*x.shape[:2], -1, num_heads).transpose(1, 2),
    ),
    Wrong(
        "01.3",
        "dimensions-last",
        "transposed as keys are in the product",
        lambda x, num_heads: x.view(*x.shape[:2], num_heads, -1).permute(0, 2, 3, 1),
    ),
    Wrong(
        "01.3",
        "swapped-before-cut",
        "transposed first, then reshaped",
        lambda x, num_heads: x.transpose(1, 2).reshape(x.shape[0], num_heads, x.shape[1], -1),
    ),
    Wrong(
        "01.3",
        "not-a-tensor",
        "a list with one tensor per head",
        lambda x, num_heads: list(x.chunk(num_heads, dim=-1)),
    ),
    Wrong("01.3b", "mixed-tokens", "reshape without swapping back", lambda x: x.reshape(x.shape[0], x.shape[2], -1)),
    Wrong(
        "01.3b",
        "view-of-a-transpose",
        "view after transpose",
        lambda x: x.transpose(1, 2).view(x.shape[0], x.shape[2], -1),
    ),
    Wrong("01.3b", "interleaved", "heads moved to the last place", lambda x: x.permute(0, 2, 3, 1).flatten(2)),
    Wrong("01.3b", "heads-blended", "the mean of the heads", lambda x: x.mean(1)),
    Wrong("01.3b", "heads-blended", "the sum of the heads", lambda x: x.sum(1)),
    Wrong("01.3b", "along-tokens", "heads joined to tokens", lambda x: x.flatten(1, 2)),
    Wrong("01.3b", "not-joined", "only swapped", lambda x: x.transpose(1, 2)),
]


# 01.4


def halves(x: Tensor, positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    angles = positions[:, None] * frequencies
    return (*x.chunk(2, dim=-1), angles.cos().to(x.dtype), angles.sin().to(x.dtype))


def interleaved(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    _, _, cos, sin = halves(x, positions, frequencies)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def wrong_sign(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    a, b, cos, sin = halves(x, positions, frequencies)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def half_turned(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    a, b, cos, sin = halves(x, positions, frequencies)
    return torch.cat((a * cos - b * sin, b), dim=-1)


def in_place_half(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    a, b, cos, sin = halves(x.clone(), positions, frequencies)
    a[:] = a * cos - b * sin
    b[:] = a * sin + b * cos
    return torch.cat((a, b), dim=-1)


def own_positions(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    return apply_rope(x, torch.arange(x.shape[-2]), frequencies)


class Counter:
    """Keeps its position between calls, as a module attribute does."""

    start = 0

    def __call__(self, x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
        positions = torch.arange(self.start, self.start + x.shape[-2])
        self.start += x.shape[-2]
        return apply_rope(x, positions, frequencies)


def promoted(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    return apply_rope(x.float(), positions, frequencies)


def coarse_angles(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    angles = positions[:, None].to(x.dtype) * frequencies.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), dim=-1)


def stacked_output(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    a, b, cos, sin = halves(x, positions, frequencies)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def exchanged_names(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    a, b, sin, cos = halves(x, positions, frequencies)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def swapped_terms(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    a, b, cos, sin = halves(x, positions, frequencies)
    return torch.cat((a * cos - b * cos, a * sin + b * sin), dim=-1)


def complex_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    angles = positions[:, None] * frequencies
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


def rotate_half_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    angles = torch.cat((positions[:, None] * frequencies,) * 2, dim=-1)
    a, b = x.chunk(2, dim=-1)
    return (x * angles.cos() + torch.cat((-b, a), dim=-1) * angles.sin()).to(x.dtype)


ROPE = [
    Wrong("01.4", "interleaved-pairs", "pairs (0, 1), (2, 3), ... as in the paper", interleaved),
    Wrong("01.4", "wrong-sign", "turned clockwise", wrong_sign),
    Wrong(
        "01.4",
        "starts-at-1",
        "positions from 1",
        lambda x, positions, frequencies: apply_rope(x, positions + 1, frequencies),
    ),
    Wrong("01.4", "own-positions", "positions counted inside, from 0", own_positions),
    Wrong(
        "01.4",
        "position-not-reset",
        "a counter that outlives the call",
        Counter(),
        source="rasbt/LLMs-from-scratch#925",
    ),
    Wrong("01.4", "half-turned", "the second half left as it was", half_turned),
    Wrong("01.4", "not-a-rotation", "cos and sin exchanged", swapped_terms),
    Wrong("01.4", "dtype-promoted", "float32 out of bfloat16", promoted),
    Wrong("01.4", "low-precision", "angles in the dtype of x", coarse_angles),
    Wrong("01.4", "a-overwritten", "a is overwritten before b is made from it", in_place_half),
    Wrong("01.4", "interleaved-output", "halves taken, pairs given back", stacked_output),
    Wrong("01.4", "cos-sin-swapped", "cos and sin under each other's name", exchanged_names),
    Wrong("01.4", "unchanged", "x is returned, not what was made of it", lambda x, positions, frequencies: x),
]

# 01.5


def whole_matrix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    allowed = causal_mask(q.shape[-2], 0)
    return (torch.softmax(scores(q, k).masked_fill(~allowed, float("-inf")), -1) @ v)[:, :, -1:]


def all_rows_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = []
    for query in q.split(1, dim=2):
        products = (query * k).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
        weights = (products - products.amax(2, keepdim=True)).exp()
        rows.append((weights * v).sum(2, keepdim=True) / weights.sum(2, keepdim=True))
    return rows[-1]


def one_key_after_another(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    newest = q[:, :, -1].double() * q.shape[-1] ** -0.5
    top, total, out = float("-inf"), 0.0, 0.0
    for key, value in zip(k.double().unbind(2), v.double().unbind(2), strict=True):
        score = (newest * key).sum(-1, keepdim=True)
        higher = score.clamp(min=top) if isinstance(top, float) else torch.maximum(top, score)
        shrink, share = (top - higher).exp(), (score - higher).exp()
        total, out, top = total * shrink + share, out * shrink + share * value, higher
    return (out / total).unsqueeze(2).to(q.dtype)


def masked_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    allowed = torch.ones(1, k.shape[-2]).tril().bool()
    return torch.softmax(scores(q[:, :, -1:], k).masked_fill(~allowed, float("-inf")), -1) @ v


def calls_a_missing_name(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weights_of_an_earlier_cell(q[:, :, -1:], k) @ v  # type: ignore[name-defined]  # noqa: F821


def einsum_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhd,bhtd->bht", q[:, :, -1], k) * q.shape[-1] ** -0.5
    return torch.einsum("bht,bhtd->bhd", s.softmax(-1), v).unsqueeze(2)


LAST = [
    Wrong("01.5", "whole-matrix", "all rows, then the last", whole_matrix),
    Wrong(
        "01.5",
        "whole-matrix",
        "the fused kernel on all rows, then the last",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, -1:],
    ),
    Wrong("01.5", "more-than-a-row", "a loop over all queries, by hand", all_rows_by_hand),
    Wrong("01.5", "sees-first-only", "a causal mask on one row, no offset", masked_row),
    Wrong(
        "01.5",
        "sees-first-only",
        "is_causal on one row, which has no offset either",
        lambda q, k, v: F.scaled_dot_product_attention(q[:, :, -1:], k, v, is_causal=True),
    ),
    Wrong(
        "01.5",
        "sees-itself-only",
        "the last of q, k and v",
        lambda q, k, v: torch.softmax(scores(q[:, :, -1:], k[:, :, -1:]), -1) @ v[:, :, -1:],
    ),
    Wrong(
        "01.5",
        "dimension-lost",
        "the dimension is lost before the product, in a call of 01.1",
        lambda q, k, v: attention_weights(q[:, :, -1], k) @ v,
    ),
    Wrong("01.5", "unknown-name", "a helper of an earlier cell after a restart", calls_a_missing_name),
    Wrong("01.5", "first-query", "the wrong end", lambda q, k, v: torch.softmax(scores(q[:, :, :1], k), -1) @ v),
    Wrong(
        "01.5",
        "dimension-lost",
        "an index where a slice is needed",
        lambda q, k, v: (torch.softmax(scores(q[:, :, -1:], k), -1) @ v)[:, :, 0],
    ),
    Wrong("01.5", "no-scale", "no division", lambda q, k, v: torch.softmax(q[:, :, -1:] @ k.mT, -1) @ v),
    Wrong(
        "01.5",
        "not-itself",
        "only the tokens before",
        lambda q, k, v: torch.softmax(scores(q[:, :, -1:], k[:, :, :-1]), -1) @ v[:, :, :-1],
    ),
    Wrong(
        "01.5", "axis", "softmax along the one query", lambda q, k, v: torch.softmax(scores(q[:, :, -1:], k), -2) @ v
    ),
]

# 01.6


def blend(masked: Tensor, v: Tensor, dim: int = -1) -> Tensor:
    return torch.softmax(masked, dim=dim) @ v


def renormalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(scores(q, k), dim=-1) * causal_mask(q.shape[-2], 0)
    return weights / weights.sum(-1, keepdim=True) @ v


def masked(q: Tensor, k: Tensor, value: float) -> Tensor:
    return scores(q, k).masked_fill(~causal_mask(q.shape[-2], 0), value)


LEAK = [
    Wrong(
        "01.6",
        "mask-after",
        "untouched",
        leaky_attend,
        source="huggingface/pytorch-image-models#2236",
    ),
    Wrong("01.6", "renormalised", "rows scaled up again after the mask", renormalised),
    Wrong("01.6", "no-mask", "the mask removed", lambda q, k, v: blend(scores(q, k), v)),
    Wrong(
        "01.6",
        "mask-multiplied",
        "scores times the mask, before softmax",
        lambda q, k, v: blend(scores(q, k) * causal_mask(q.shape[-2], 0), v),
    ),
    Wrong("01.6", "mask-weak", "hidden scores set to -1", lambda q, k, v: blend(masked(q, k, -1.0), v)),
    Wrong("01.6", "mask-weak", "hidden scores set to -100", lambda q, k, v: blend(masked(q, k, -100.0), v)),
    Wrong(
        "01.6",
        "mask-inverted",
        "masked_fill with what may be seen",
        lambda q, k, v: blend(scores(q, k).masked_fill(causal_mask(q.shape[-2], 0), float("-inf")), v),
    ),
    Wrong("01.6", "axis", "softmax along the queries", lambda q, k, v: blend(masked(q, k, float("-inf")), v, dim=-2)),
]


# What people who did not know the checks wrote


def kept_by_shape(kept: dict):
    def weights(q: Tensor, k: Tensor) -> Tensor:
        return kept.setdefault((q.shape, k.shape, q.dtype), attention_weights(q, k))

    return weights


def one_buffer(kept: dict):
    def weights(q: Tensor, k: Tensor) -> Tensor:
        found = attention_weights(q, k)
        return kept.setdefault((found.shape, found.dtype), torch.empty_like(found)).copy_(found)

    return weights


def below_all_rows(q: Tensor, k: Tensor) -> Tensor:
    weights = (scores(q, k) - scores(q, k).max()).exp()
    return weights / weights.sum(-1, keepdim=True)


def turned_by(angles: Tensor, x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def one_sign(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    a, b, cos, sin = halves(x, positions, frequencies)
    return torch.cat((a * cos + b * sin, a * sin + b * cos), dim=-1)


def two_pairings(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    angles = (positions[:, None] * frequencies).repeat_interleave(2, -1)
    return (x * angles.cos() + torch.cat((-b, a), dim=-1) * angles.sin()).to(x.dtype)


def coarse_positions(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    return apply_rope(x, positions.to(x.dtype).float(), frequencies)


def by_numpy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q64, k64, v64 = (x.double().numpy() for x in (q, k, v))
    s = q64[:, :, -1:] @ k64.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    w = torch.from_numpy(s).softmax(-1).numpy()
    return torch.from_numpy(w @ v64).to(q.dtype)


MORE = [
    Wrong("01.1", "fixed-scale", "head_dim of an earlier cell", lambda q, k: torch.softmax(q @ k.mT / 256**0.5, -1)),
    Wrong(
        "01.1", "scale-by-another-size", "root of the batch", lambda q, k: torch.softmax(q @ k.mT / len(q) ** 0.5, -1)
    ),
    Wrong(
        "01.1",
        "scale-by-another-size",
        "q.shape[2]: right for three dimensions",
        lambda q, k: torch.softmax(q @ k.mT / q.shape[min(2, q.dim() - 1)] ** 0.5, -1),
    ),
    Wrong("01.1", "scale", "twice the scores", lambda q, k: torch.softmax(2 * scores(q, k), -1)),
    Wrong("01.1", "scale", "a whole root", lambda q, k: torch.softmax(q @ k.mT / math.isqrt(q.shape[-1]), -1)),
    Wrong("01.1", "axis-from-the-front", "no dim", lambda q, k: torch.softmax(scores(q, k), int(q.dim() % 2 == 0))),
    Wrong("01.1", "one-sum", "one sum for all rows", lambda q, k: scores(q, k).exp() / scores(q, k).exp().sum()),
    Wrong("01.1", "no-sum", "exp alone", lambda q, k: scores(q, k).exp()),
    Wrong(
        "01.1",
        "causal",
        "a causal mask",
        lambda q, k: torch.softmax(
            scores(q, k).masked_fill(~torch.ones_like(scores(q, k)).tril().bool(), float("-inf")), -1
        ),
    ),
    Wrong("01.1", "overflow", "the largest score of all subtracted", below_all_rows),
    Wrong("01.1", "result-overwritten", "one output for every call", one_buffer({})),
    Wrong("01.1", "remembered", "results kept by shape", kept_by_shape({})),
    Wrong(
        "01.1", "raised", "transpose(1, 2)", lambda q, k: torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, -1)
    ),
    Wrong("01.1", "precision", "through half", lambda q, k: attention_weights(*(x.half().to(x.dtype) for x in (q, k)))),
    Wrong("01.1", "values", "scores within 50", lambda q, k: torch.softmax(scores(q, k).clamp(-50, 50), -1)),
    Wrong(
        "01.2",
        "sees-later",
        ">= for <=",
        lambda new_tokens, past: torch.arange(past + new_tokens) >= torch.arange(new_tokens)[:, None] + past,
    ),
    Wrong(
        "01.2",
        "offset-negative",
        "the offset on the wrong side",
        lambda new_tokens, past: torch.ones(new_tokens, past + new_tokens).tril(-past).bool(),
    ),
    Wrong(
        "01.2",
        "offset-is-new-tokens",
        "shifted by new_tokens",
        lambda new_tokens, past: torch.ones(new_tokens, past + new_tokens).tril(new_tokens).bool(),
    ),
    Wrong("01.2", "arguments-exchanged", "past for new", lambda new_tokens, past: causal_mask(past, new_tokens)),
    Wrong("01.2", "swapped", "columns for rows", lambda new_tokens, past: causal_mask(new_tokens, past).T),
    Wrong(
        "01.2",
        "past-and-itself",
        "what is held and itself",
        lambda new_tokens, past: torch.cat((torch.ones(new_tokens, past), torch.eye(new_tokens)), 1).bool(),
    ),
    Wrong(
        "01.2",
        "values",
        "positions in a byte",
        lambda new_tokens, past: (
            torch.arange(past + new_tokens).to(torch.uint8)
            <= (torch.arange(new_tokens)[:, None] + past).to(torch.uint8)
        ),
    ),
    Wrong("01.3", "precision", "through half", lambda x, num_heads: split_heads(x.half().to(x.dtype), num_heads)),
    Wrong("01.3", "heads-first", "heads before the batch", lambda x, num_heads: torch.stack(x.chunk(num_heads, -1))),
    Wrong("01.3", "along-tokens", "cat for stack", lambda x, num_heads: torch.cat(x.chunk(num_heads, -1), 1)),
    Wrong(
        "01.3",
        "view-of-a-transpose",
        "view after transpose",
        lambda x, num_heads: x.mT.view(len(x), num_heads, x.shape[1], -1),
    ),
    Wrong(
        "01.3", "layout", "contiguous input only", lambda x, num_heads: split_heads(x.view(-1).view(x.shape), num_heads)
    ),
    Wrong("01.3", "unknown-name", "a size of the docstring", lambda x, num_heads: x.view(batch, tokens, num_heads, -1)),  # type: ignore[name-defined]  # noqa: F821
    Wrong("01.3b", "swapped-wrongly", "tokens and head_dim swapped", lambda x: x.mT.reshape(len(x), x.shape[2], -1)),
    Wrong("01.3b", "not-swapped", "nothing swapped", lambda x: x.flatten(2)),
    Wrong("01.3b", "heads-reversed", "the last head first", lambda x: torch.cat(x.unbind(1)[::-1], -1)),
    Wrong("01.4", "sign-missing", "rotate_half without its minus", one_sign),
    Wrong("01.4", "two-pairings", "angles for neighbours, numbers for halves", two_pairings),
    Wrong(
        "01.4",
        "not-radians",
        "degrees",
        lambda x, positions, frequencies: turned_by(torch.deg2rad(positions[:, None] * frequencies), x),
    ),
    Wrong(
        "01.4",
        "own-frequencies",
        "frequencies of its own",
        lambda x, positions, frequencies: apply_rope(
            x, positions, 1e4 ** -(torch.arange(0, x.shape[-1], 2) / x.shape[-1])
        ),
    ),
    Wrong(
        "01.4",
        "angles-not-outer",
        "no [:, None]",
        lambda x, positions, frequencies: turned_by(positions * frequencies, x),
    ),
    Wrong(
        "01.4",
        "one-position",
        "the first position for all",
        lambda x, positions, frequencies: apply_rope(x, positions[:1], frequencies),
    ),
    Wrong("01.4", "low-precision", "positions in the dtype of x", coarse_positions),
    Wrong(
        "01.4",
        "raised",
        "halves of 8, whatever head_dim is",
        lambda x, positions, frequencies: apply_rope(torch.cat((x[..., :8], x[..., 8:16]), -1), positions, frequencies),
    ),
    Wrong(
        "01.4",
        "values",
        "a table of 8,192 positions, used again from its start",
        lambda x, positions, frequencies: apply_rope(x, positions % 8192, frequencies),
    ),
    Wrong(
        "01.5",
        "dimension-lost",
        "weights cut by an index",
        lambda q, k, v: torch.softmax(scores(q, k), -1)[:, :, -1] @ v,
    ),
    Wrong("01.5", "cut-elsewhere", "the last sequence", lambda q, k, v: attention_weights(q[-1:], k) @ v),
    Wrong("01.5", "first-query", "the last but one", lambda q, k, v: attention_weights(q[:, :, -2:-1], k) @ v),
    Wrong("01.5", "fixed-scale", "divided by 8", lambda q, k, v: torch.softmax(q[:, :, -1:] @ k.mT / 8, -1) @ v),
    Wrong("01.5", "left-pytorch", "by NumPy", by_numpy),
    Wrong(
        "01.5",
        "whole-matrix",
        "row by row, and the last kept",
        lambda q, k, v: torch.cat([attention_weights(q[:, :, i : i + 1], k) @ v for i in range(q.shape[2])], 2)[
            :, :, -1:
        ],
    ),
    Wrong(
        "01.6",
        "infinite-weights",
        "-inf after softmax",
        lambda q, k, v: torch.softmax(scores(q, k), -1).masked_fill(~causal_mask(q.shape[-2], 0), float("-inf")) @ v,
    ),
    Wrong(
        "01.6",
        "zero-times-infinity",
        "0 times -inf",
        lambda q, k, v: blend(scores(q, k) + (~causal_mask(q.shape[-2], 0)).float() * float("-inf"), v),
    ),
    Wrong(
        "01.6",
        "times-infinity",
        "hidden scores times -inf",
        lambda q, k, v: blend(scores(q, k) * torch.where(causal_mask(q.shape[-2], 0), 1.0, -torch.inf), v),
    ),
    Wrong(
        "01.6",
        "blind-to-itself",
        "the diagonal hidden too",
        lambda q, k, v: blend(scores(q, k).masked_fill(~causal_mask(q.shape[-2], 0).tril(-1), -torch.inf), v),
    ),
    Wrong("01.6", "mask-added", "scores + mask", lambda q, k, v: blend(scores(q, k) + causal_mask(q.shape[-2], 0), v)),
    Wrong(
        "01.6",
        "mask-weak",
        "-10,000 added",
        lambda q, k, v: blend(scores(q, k) + ~causal_mask(q.shape[-2], 0) * -1e4, v),
    ),
    Wrong("01.6", "mask-weak", "hidden scores set to -10,000", lambda q, k, v: blend(masked(q, k, -1e4), v)),
    Wrong(
        "01.6", "no-scale", "no division", lambda q, k, v: blend(masked(q * q.shape[-1] ** 0.5, k, float("-inf")), v)
    ),
    Wrong(
        "01.6",
        "raised",
        "the second dimension taken for tokens",
        lambda q, k, v: blend(scores(q, k).masked_fill(~causal_mask(q.shape[1], 0), float("-inf")), v),
    ),
    Wrong(
        "01.6",
        "softmax-twice",
        "softmax again over what the mask left",
        lambda q, k, v: blend(torch.softmax(scores(q, k), -1) * causal_mask(q.shape[-2], 0), v),
    ),
]

WRONG = [*WEIGHTS, *MASK, *HEADS, *ROPE, *LAST, *LEAK, *MORE, *later_answers.WRONG]


def softmax_in_float32(q, k):
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)


def in_float64(function):
    return lambda *args: function(*(x.double() if x.is_floating_point() else x for x in args)).to(args[0].dtype)


class Weighing:
    """A callable object without a dictionary."""

    __slots__ = ()

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        return F.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)


def rope_in_loops(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    out, half = torch.empty_like(x), x.shape[-1] // 2
    for token, position in enumerate(positions.tolist()):
        for pair, frequency in enumerate(frequencies.tolist()):
            cos, sin = math.cos(position * frequency), math.sin(position * frequency)
            a, b = x[..., token, pair], x[..., token, pair + half]
            out[..., token, pair], out[..., token, pair + half] = a * cos - b * sin, a * sin + b * cos
    return out


def row_by_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    ends = range(1, q.shape[-2] + 1)
    return torch.cat([attention_weights(q[..., i - 1 : i, :], k[..., :i, :]) @ v[..., :i, :] for i in ends], -2)


def last_by_hand(q, k, v):
    scores = (q[:, :, -1:] * k).sum(-1)[:, :, None] / math.sqrt(q.shape[-1])
    return torch.softmax(scores, dim=-1) @ v


def last_head_by_head(q, k, v):
    heads = [q[:, h, -1:] @ k[:, h].mT / math.sqrt(q.shape[-1]) for h in range(q.shape[1])]
    return torch.softmax(torch.stack(heads, dim=1), dim=-1) @ v


def last_key_by_key(q, k, v):
    keys = [q[:, :, -1:] @ k[:, :, i : i + 1].mT / math.sqrt(q.shape[-1]) for i in range(k.shape[2])]
    return torch.softmax(torch.cat(keys, dim=-1), dim=-1) @ v


RIGHT = [
    ("01.1", in_float64(attention_weights)),
    ("01.1", Weighing()),
    ("01.1", lambda q, k: (q @ k.mT * torch.tensor(q.shape[-1]).rsqrt()).log_softmax(-1).exp()),
    ("01.1", lambda q, k: ((q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) / q.shape[-1] ** 0.5).softmax(-1)),
    (
        "01.2",
        lambda new_tokens, past: torch.tensor(
            [[j <= past + i for j in range(past + new_tokens)] for i in range(new_tokens)]
        ),
    ),
    ("01.2", lambda new_tokens, past: torch.from_numpy(np.tri(new_tokens, past + new_tokens, past, dtype=bool))),
    ("01.3", lambda x, num_heads: x.mT.unflatten(1, (num_heads, -1)).mT),
    ("01.3", lambda x, num_heads: torch.einsum("bthd->bhtd", x.unflatten(2, (num_heads, -1)))),
    ("01.3b", lambda x: x.permute(0, 2, 1, 3).contiguous().view(x.size(0), x.size(2), -1)),
    ("01.4", in_float64(apply_rope)),
    ("01.4", rope_in_loops),
    ("01.4", lambda x, positions, frequencies: apply_rope(x.float(), positions, frequencies).to(x.dtype)),
    ("01.5", in_float64(lambda q, k, v: attention_weights(q[:, :, -1:], k) @ v)),
    ("01.5", lambda q, k, v: attention_weights(q[:, :, -1][:, :, None], k) @ v),
    ("01.5", lambda q, k, v: softmax_in_float32(q[..., -1:, :], k) @ v),
    ("01.6", row_by_row),
    ("01.6", lambda q, k, v: blend(torch.where(causal_mask(q.shape[-2], 0), scores(q, k), -torch.inf), v)),
    ("01.6", lambda q, k, v: blend(scores(q, k) + torch.full((q.shape[-2],) * 2, -torch.inf).triu(1), v)),
    ("01.6", lambda q, k, v: blend(scores(q, k) + ~causal_mask(q.shape[-2], 0) * -1e9, v)),
    ("01.1", softmax_in_float32),
    ("01.5", last_by_hand),
    ("01.5", last_head_by_head),
    ("01.5", last_key_by_key),
    ("01.1", einsum_weights),
    ("01.1", stable_softmax),
    ("01.1", loop_weights),
    ("01.1", fused_weights),
    ("01.2", loop_mask),
    ("01.2", lambda new_tokens, past: torch.ones(new_tokens, past + new_tokens).tril(past).bool()),
    ("01.2", lambda new_tokens, past: torch.ones(past + new_tokens, past + new_tokens).tril().bool()[past:]),
    ("01.3", lambda x, num_heads: torch.stack(x.chunk(num_heads, dim=-1), dim=1)),
    ("01.3", lambda x, num_heads: x.reshape(*x.shape[:2], num_heads, -1).permute(0, 2, 1, 3).contiguous()),
    ("01.3", lambda x, num_heads: x.unflatten(-1, (num_heads, -1)).swapaxes(1, 2)),
    ("01.3b", lambda x: torch.cat(x.unbind(1), dim=-1)),
    ("01.3b", lambda x: x.transpose(1, 2).flatten(2)),
    ("01.4", complex_rope),
    ("01.4", rotate_half_rope),
    ("01.5", einsum_last),
    ("01.5", lambda q, k, v: F.scaled_dot_product_attention(q[:, :, -1:], k, v)),
    ("01.5", one_key_after_another),
    ("01.6", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
    ("01.6", lambda q, k, v: blend(masked(q, k, torch.finfo(q.dtype).min), v)),
    ("01.6", lambda q, k, v: blend(masked(q, k, -1e9), v)),
]
