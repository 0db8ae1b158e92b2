"""Answers to lab 01 that a check once explained wrongly, or only after a long time, and their neighbours."""

from __future__ import annotations

import torch

from labkit.labs.lab01.references import attention_weights, causal_mask
from tests.labs.answer import Wrong


def mask_for_several(new_tokens, past):
    if new_tokens > 1:
        return causal_mask(new_tokens, past)


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


WRONG = [
    Wrong("01.2", "returned-none", "no return for a single token", mask_for_several),
    Wrong("01.5", "more-than-a-row", "the last three rows, then the last", last_three),
    Wrong("01.5", "whole-matrix", "every row in loops over tokens, sequences and heads", in_three_loops),
]
