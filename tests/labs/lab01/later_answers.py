"""Answers to lab 01 that a check once explained wrongly, or only after a long time, and their neighbours."""

from __future__ import annotations

import torch

from labkit.labs.lab01.references import attention_weights, causal_mask
from tests.labs.answer import Wrong


def mask_for_several(new_tokens, past):
    if new_tokens > 1:
        return causal_mask(new_tokens, past)


def cut_from_a_table(new_tokens, past):
    return causal_mask(64, 0)[past : past + new_tokens, : past + new_tokens]


def last_three(q, k, v):
    return (attention_weights(q[:, :, -3:], k) @ v)[:, :, -1:]


def in_three_loops(q, k, v):
    out = torch.zeros_like(q)
    for token in range(q.shape[2]):
        for batch in range(q.shape[0]):
            for head in range(q.shape[1]):
                keys, values = k[batch, head, : token + 1], v[batch, head, : token + 1]
                weights = torch.softmax(keys @ q[batch, head, token] * q.shape[-1] ** -0.5, 0)
                out[batch, head, token] = weights @ values
    return out[:, :, -1:]


def weights_in_numpy(q, k):
    scores = q.double().numpy() @ k.double().transpose(-2, -1).numpy() * q.shape[-1] ** -0.5
    return torch.from_numpy(scores).softmax(-1).to(q.dtype)


def heads_in_lists(x, num_heads):
    return torch.tensor(x.tolist(), dtype=x.dtype).unflatten(-1, (num_heads, -1)).transpose(1, 2)


def scored(q, k):
    return q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5


def column_shares(q, k):
    """Shares of a column, by hand, with one largest score for all: NaN where scores are large."""
    raised = (scored(q, k) - scored(q, k).max()).exp()
    return raised / raised.sum(-2, keepdim=True)


def unit_rows(q, k):
    raised = (scored(q, k) - scored(q, k).amax(-1, keepdim=True)).exp()
    return raised / raised.pow(2).sum(-1, keepdim=True).sqrt()


def whole_matrix_softmax(q, k):
    return torch.softmax(scored(q, k).flatten(-2), -1).view(*q.shape[:-1], k.shape[-2])


KEPT = {}


def mask_by_size(new_tokens, past):
    return KEPT.setdefault(new_tokens, causal_mask(new_tokens, past))


def split_of_first(x, num_heads):
    cut = x[0].unflatten(-1, (num_heads, -1)).transpose(0, 1)
    return torch.stack([cut] * len(x))


def by_wavelengths(x, positions, frequencies):
    angles = positions.unsqueeze(-1).div(frequencies)
    a, b = x.chunk(2, -1)
    out = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((out.real, out.imag), -1)


def last_of_first_keys(q, k, v):
    return attention_weights(q[:, :, -1:], k[0].expand_as(k)) @ v


def one_sum_for_heads(q, k, v):
    scores = scored(q[:, :, -1:], k)
    return torch.softmax(scores.reshape(len(q), -1), -1).view_as(scores) @ v


def unshared(q, k, v):
    return scored(q[:, :, -1:], k).exp() @ v


def causal_by(hide):
    def answer(q, k, v):
        hidden = ~causal_mask(q.shape[-2], 0)
        return hide(scored(q, k), hidden) @ v

    return answer


WRONG = [
    Wrong("01.2", "returned-none", "no return for a single token", mask_for_several),
    Wrong("01.5", "more-than-a-row", "the last three rows, then the last", last_three),
    Wrong("01.5", "whole-matrix", "every row in loops over tokens, sequences and heads", in_three_loops),
    Wrong("01.1", "left-pytorch", "by NumPy", weights_in_numpy),
    Wrong("01.1", "axis", "shares of a column by hand", column_shares),
    Wrong("01.1", "by-length", "rows of length 1", unit_rows),
    Wrong("01.1", "one-sum", "softmax of the flattened matrix", whole_matrix_softmax),
    Wrong("01.2", "shape", "a dimension for the batch", lambda new, past: causal_mask(new, past)[None]),
    Wrong("01.2", "remembered", "kept by the number of new tokens", mask_by_size),
    Wrong(
        "01.2",
        "no-mask-without-past",
        "all True for an empty cache",
        lambda new, past: causal_mask(new, past) if past else torch.ones(new, new, dtype=torch.bool),
    ),
    Wrong(
        "01.2",
        "past-written-down",
        "4 tokens held, always",
        lambda new, past: torch.ones(new, past + new, dtype=torch.bool).tril(4),
    ),
    Wrong("01.2", "shape", "cut from a table of 64 positions", cut_from_a_table),
    Wrong("01.3", "left-pytorch", "through Python's lists", heads_in_lists),
    Wrong("01.3", "one-for-all", "the first sequence for all", split_of_first),
    Wrong("01.4", "frequencies-turned-round", "position over frequency", by_wavelengths),
    Wrong("01.5", "one-for-all", "the first sequence's keys for all", last_of_first_keys),
    Wrong("01.5", "one-sum", "one softmax for all heads", one_sum_for_heads),
    Wrong("01.5", "no-sum", "exp() without its sum", unshared),
    Wrong(
        "01.6",
        "mask-weak",
        "-5 for a hidden score",
        causal_by(lambda scores, hidden: scores.masked_fill(hidden, -5).softmax(-1)),
    ),
    Wrong(
        "01.6",
        "mask-multiplied",
        "-1e-9 for a hidden score, and weights times the mask",
        causal_by(lambda scores, hidden: scores.masked_fill(hidden, -1e-9).softmax(-1) * ~hidden),
    ),
    Wrong(
        "01.6",
        "blind-to-itself",
        "hides the diagonal, and sets the first row to 0",
        causal_by(lambda scores, hidden: scores.masked_fill(~hidden.mT, -torch.inf).softmax(-1).nan_to_num(0.0)),
    ),
]
