"""01.1: from queries and keys to weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from labkit.course.checks.suspects import Suspect, recognise
from labkit.course.checks.tensors import agree, draw
from labkit.course.exercise import Exercise
from labkit.labs.lab01.references import attention_weights

SINGLE = 1e-6  # bounded: a softmax in float32, as many libraries take it, is off by a few eps (1.2e-7)


class Weights(Exercise):
    """Scores, scaled, through softmax."""

    id = "01.1"
    title = "Scores and weights"
    minutes = 3
    difficulty = 1
    hints = (
        "A score is the dot product of one query and one key. Which matrix product gives all of them at once?",
        "q times k with its last two dimensions swapped, divided by sqrt(head_dim); then softmax along the keys.",
        "scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), then torch.softmax(scores, dim=...): which dim?",
    )
    hints_for: ClassVar = {
        "axis": "Shape [..., queries, keys]: which of the two dimensions should sum to 1 when you add along it?",
        "no-scale": "The formula has three steps: multiply, divide, softmax. Count yours.",
        "overflow": "exp(1000) is infinity here. Softmax may subtract the row's largest score first. Why?",
    }
    reference = staticmethod(attention_weights)

    def examine(self, answer: Callable) -> None:
        """Formula slips first, then other shapes and large scores."""
        q, k = draw(2, 4, 16), draw(2, 6, 16, seed=1)
        want = attention_weights(q, k)
        got = self.call(answer, q, k)
        recognise(type(self), got, suspects(q, k))
        self.like(got, want, what="the weights of 4 queries over 6 keys")
        if not agree(got.sum(-1), torch.ones_like(got.sum(-1)), SINGLE):
            self.fail(
                "rows",
                seen=f"the first row sums to {got[0, 0].sum():.3g}",
                cause="something is done to the weights after softmax, or softmax is not the last step",
                look="the order of the steps: multiply, divide, softmax",
            )
        self.same(got, want, what="the weights", tolerance=SINGLE)
        self.large_scores(answer)
        for dtype in (torch.float32, torch.bfloat16):
            q, k = draw(3, 1, 16, dtype=dtype), draw(3, 7, 16, seed=1, dtype=dtype)
            # A weight is at most 1, and a few roundings of the dtype separate two right answers.
            tolerance = 8 * torch.finfo(dtype).eps
            self.same(self.call(answer, q, k), attention_weights(q, k), what=f"{dtype} weights", tolerance=tolerance)

    def large_scores(self, answer: Callable) -> None:
        """Scores of thousands must give weights, not NaN."""
        q, k = 300 * draw(1, 4, 16), 300 * draw(1, 6, 16, seed=1)
        got = self.call(answer, q, k)
        if not torch.isfinite(got).all():
            self.fail(
                "overflow",
                seen="NaN weights where scores are in the thousands",
                cause="exp() of a large score is infinity, and infinity divided by infinity is NaN",
                look="torch.softmax, or subtract each row's largest score before exp()",
            )
        self.same(got, attention_weights(q, k), what="weights of large scores", tolerance=1e-6)


def suspects(q: Tensor, k: Tensor) -> list[Suspect]:
    """Wrong values and what each betrays."""
    raw, root = q @ k.transpose(-2, -1), math.sqrt(q.shape[-1])
    soft = torch.softmax
    return [
        Suspect("batch-axis", [soft(raw / root, 0), soft(raw, 0)], "softmax ran along dim=0, which is the batch here",
                "dim= of softmax, counted from the end: the keys are the last dimension, dim=-1",
                "neither rows nor columns sum to 1, but equal places of the two batches do"),
        Suspect("axis", [soft(raw / root, -2), soft(raw, -2)],
                "softmax ran along the queries: every key hands out 1, instead of every query spending 1",
                "dim= of softmax: the keys are the last dimension", "each column sums to 1; each row should"),
        Suspect("no-softmax", [raw / root, raw], "the last step is missing",
                "softmax along the keys turns a row of scores into a row of weights",
                "scores came back, some of them negative"),
        Suspect("no-scale", soft(raw, -1), "the scores were not divided by sqrt(head_dim)",
                "the step between the product and softmax", "rows sum to 1, but they are sharper than they should be"),
        Suspect("scale-twice", soft(raw / root**2, -1), "the scores were divided by head_dim, not by its square root",
                "the deviation of a sum of head_dim products grows with sqrt(head_dim)",
                "rows sum to 1, but they are flatter than they should be"),
        Suspect("fixed-scale", soft(raw / 8, -1), "a number was written down that fits a head_dim of 64 alone",
                "take head_dim from the tensors: q.shape[-1]",
                f"the scores were divided by 8; head_dim is {q.shape[-1]} here, so its root is {root:g}"),
        Suspect("scale-up", soft(raw * root, -1), "the scores were multiplied by sqrt(head_dim) instead of divided",
                "the sign of the exponent: head_dim ** -0.5 divides",
                "rows sum to 1, but nearly all weight sits on one key"),
        Suspect("scale-by-keys", soft(raw / math.sqrt(k.shape[-2]), -1),
                "the root was taken of the number of keys, not of head_dim",
                "which dimension the dot product sums over: the last one of q",
                "rows sum to 1, but the scale depends on how many keys there are"),
        Suspect("scale-after", soft(raw, -1) / root, "the division came after softmax",
                "divide the scores, then take softmax: the order matters because softmax is not linear",
                f"rows sum to {1 / root:.2f}, which is 1 / sqrt(head_dim)"),
        Suspect("proportional", raw / raw.sum(-1, keepdim=True),
                "scores were divided by their sum; a score may be negative, so that is no share",
                "softmax divides exp(score) by the sum of exp(score)", "rows sum to 1, but some weights are negative"),
        Suspect("swapped", soft(raw / root, -1).transpose(-2, -1), "the two dimensions of the result are swapped",
                "queries are rows, keys are columns", "one row per key instead of one per query"),
    ]  # fmt: skip
