"""01.1: from queries and keys to weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.course.checks import attention
from labkit.course.checks.attention import ORDER, SCALE, SOFTMAX
from labkit.course.checks.suspects import Suspect
from labkit.course.checks.tensors import agree, draw
from labkit.course.checks.trials import Case, compare
from labkit.course.exercise import Exercise
from labkit.labs.lab01.references import attention_weights

WRITTEN = (2, 4, 8, 16, 32, 64, 128, 256, 576)  # head_dims and roots of head_dims that a number in the code may mean


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
        "axis-from-the-front": "With a batch and heads the shape has four dimensions. Which one is dim=1 then?",
        "no-scale": "The formula has three steps: multiply, divide, softmax. Count yours.",
        "fixed-scale": "Which argument knows head_dim, and at which place of its shape?",
        "overflow": "exp(1000) is infinity here. Softmax may subtract the row's largest score first. Why?",
    }
    why = (
        "Every dot product at once is one matrix product with k's last two dimensions swapped. Counted from the end, "
        "dimensions are right with a batch and heads in front, or without."
    )
    reference = staticmethod(attention_weights)

    def examine(self, answer: Callable) -> None:
        """Three ranks, four head_dims, and scores of thousands."""
        queries = ((2, 4, 20), (5, 2, 3, 14), (9, 24), (3, 1, 6), (1, 270, 10), (1, 40, 10))
        keys = ((2, 6, 20), (5, 2, 7, 14), (8, 24), (3, 1, 6), (1, 100, 10), (1, 270, 10))
        cases = [Case((draw(*q), draw(*k, seed=1))) for q, k in zip(queries, keys, strict=True)]
        large = Case((300 * draw(1, 4, 18), 300 * draw(1, 6, 18, seed=1)), "scores of thousands")
        compare(type(self), answer, attention_weights, [*cases, large], suspects=suspects, what="the weights")

    @classmethod
    def explain_values(cls, got: Tensor, want: Tensor, *, what: str, tolerance: float = 0.0) -> None:
        """Name the scale where nothing but the scale is wrong: then log-weights are a multiple of the right ones."""
        logs = [x - x.mean(-1, keepdim=True) for x in (got.double().log(), want.double().log())]
        length = logs[1].pow(2).sum()
        if all(torch.isfinite(x).all() for x in logs) and length > 0:
            factor = ((logs[0] * logs[1]).sum() / length).item()
            rows = got.double().sum(-1)
            if agree(logs[0], factor * logs[1], 1e-4) and agree(rows, torch.ones_like(rows), 1e-4):
                cls.fail(
                    "scale",
                    seen=f"{what}: rows sum to 1, and every score is {factor:.4g} times what it should be",
                    cause="the scores were divided by another number than sqrt(head_dim)",
                    look=SCALE,
                )
        super().explain_values(got, want, what=what, tolerance=tolerance)


def suspects(q: Tensor, k: Tensor) -> list[Suspect]:
    """What is written in place of the formula, besides what is in every attention."""
    raw = q @ k.transpose(-2, -1)
    scores = raw / math.sqrt(q.shape[-1])
    exp, soft, norm = scores.exp(), torch.softmax, F.normalize
    places = (*range(q.dim()), *(-d for d in range(2, q.dim() + 1)))
    roots = {place: q.shape[place] ** 0.5 for place in places}
    dim = 0 if q.dim() in (1, 3) else 1  # what F.softmax takes where none is given
    return [
        Suspect("axis-from-the-front", [lambda: soft(scores, dim)], "softmax got no dim, and took one from the front",
                SOFTMAX, "rows do not sum to 1"),
        Suspect("axis-from-the-front", [lambda d=d: soft(scores, d) for d in range(scores.dim())],
                "softmax's dim was counted from the front, which fits one number of dimensions only", SOFTMAX,
                "rows sum to 1 for one number of dimensions and not for others"),
        *attention.suspects(q, k, causal=False),
        Suspect("fixed-scale", [lambda c=c: soft(raw / c, -1) for c in WRITTEN],
                "a number was written down, or head_dim is that of an earlier cell",
                "take head_dim from the tensors: q.shape[-1]",
                "the scores are divided by the same number whatever head_dim is"),
        Suspect("scale-by-another-size",
                [roots.get(place) and (lambda n=roots[place]: soft(raw / n, -1)) for place in (0, 1, 2, -2, -3, -4)],
                "the root was taken of another size than head_dim, such as the batch or the number of queries",
                "the dimension that a dot product sums over: q.shape[-1]",
                "the scale changes with the number of queries or sequences"),
        Suspect("one-sum", [lambda: exp / exp.sum()], "all rows were divided by one sum",
                "sum(-1, keepdim=True): each row by its own", "all weights together sum to 1; each row should"),
        Suspect("overflow", [lambda: exp / exp.sum(-1, keepdim=True)],
                "exp() of a large score is infinity, and infinity divided by infinity is NaN",
                "torch.softmax, or subtract each row's largest score before exp()",
                "NaN weights where scores are in the thousands"),
        Suspect("overflow", [lambda: (e := (scores - scores.max()).exp()) / e.sum(-1, keepdim=True)],
                "the largest score of all rows was subtracted; in a row far below it every exp() is 0, and 0/0 is NaN",
                "torch.softmax, or subtract each row's own largest score before exp()",
                "NaN weights where scores are in the thousands"),
        Suspect("no-sum", [lambda: exp, lambda: raw.exp(), lambda: (scores - scores.amax(-1, keepdim=True)).exp()],
                "exp() is there, the division by the row's sum is not", "softmax: exp(score) / sum of exp(score)",
                "rows do not sum to 1"),
        Suspect("proportional", [lambda: raw / raw.sum(-1, keepdim=True),
                                 lambda: raw.abs() / raw.abs().sum(-1, keepdim=True)],
                "scores were divided by their sum; a score may be negative, so that is no share",
                "softmax divides exp(score) by the sum of exp(score)", "the weights are shares of the scores' sum"),
        Suspect("no-softmax", [lambda: raw], "softmax and the division are missing", ORDER,
                "the plain product came back"),
        Suspect("sigmoid", [lambda: scores.sigmoid(), lambda: raw.sigmoid()], "a sigmoid looks at one score alone",
                "softmax along the keys: every weight depends on its whole row", "rows do not sum to 1"),
        Suspect("log-softmax", [lambda: scores.log_softmax(-1)], "log_softmax gives the logarithms of the weights",
                "torch.softmax", "every number is the logarithm of a weight"),
        Suspect("softmax-twice", [lambda: soft(soft(scores, -1), -1)], "softmax ran twice", ORDER,
                "rows sum to 1, but are nearly even"),
        Suspect("sign", [lambda: soft(-scores, -1)], "the scores were negated", SCALE,
                "the keys that fit best get least"),
        Suspect("cosines", [lambda: soft(norm(q, dim=-1) @ norm(k, dim=-1).transpose(-2, -1), -1)],
                "queries and keys were brought to length 1: these are cosines, not dot products",
                "the docstring: q k^T, divided by sqrt(head_dim)", "a long key scores no more than a short one"),
        Suspect("causal", [lambda: attention.attend(q, k, None), lambda: soft(
            scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), float("-inf")), -1)],
                "a causal mask is there that nobody asked for yet", "01.1 has no mask: every query sees every key",
                "some keys get no weight"),
        Suspect("swapped", [lambda: soft(scores, -1).transpose(-2, -1), lambda: soft(scores.transpose(-2, -1), -1)],
                "the two dimensions of the result are swapped", "queries are rows, keys are columns",
                "one row per key instead of one per query"),
    ]  # fmt: skip
