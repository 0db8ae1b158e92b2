"""01.6: a mask that leaks, to mend."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from labkit.course.checks.attention import MASK
from labkit.course.checks.attention import suspects as shared
from labkit.course.checks.suspects import Suspect
from labkit.course.checks.tensors import draw
from labkit.course.checks.trials import Case, compare
from labkit.course.exercise import Exercise
from labkit.labs.lab01.references import attend, causal_mask, leaky_attend

ROW = "the mask: row i sees the keys 0 to i, its own among them"
DIAGONALS = {  # nothing is held here, so what is wrong with a triangle is its diagonal
    "blind-to-itself": "the diagonal is one too far to the left, or `<` stands for `<=`",
    "mask-offset-too-large": "the diagonal is one too far to the right",
}


class Leak(Exercise):
    """A mask that comes too late."""

    id = "01.6"
    title = "Debug: a leak that no picture shows"
    minutes = 3
    difficulty = 3
    needs = ("01.1", "01.2")
    starting_point = inspect.getsource(leaky_attend).replace("leaky_attend", "attend")
    hints = (
        "No weight on a later token is left. So what else in the output depends on the later tokens?",
        "Softmax divides by a sum over all keys. Which keys are in that sum when the mask comes afterwards?",
        "Hide scores before softmax: scores.masked_fill(~mask, float('-inf')). exp(-inf) is 0, in the sum as well.",
    )
    hints_for: ClassVar = {
        "renormalised": "What is left to divide by when the hidden score was 200 larger than every visible one?",
        "mask-multiplied": "exp(0) is 1. Which score gives exp(score) = 0?",
        "mask-weak": "Which number is below every score that there can be?",
        "no-mask": "masked_fill changes nothing in place. Where does its result go?",
    }
    why = (
        "Hidden scores are -inf before softmax: exp(-inf) is 0 in the sum that it divides by as well, so that nothing "
        "of a hidden key is left."
    )
    reference = staticmethod(attend)

    def examine(self, answer: Callable) -> None:
        """Ordinary numbers of every size, then scores that put the hiding to the test."""
        shapes = ((2, 5, 20), (3, 2, 7, 12), (6, 24), (1, 1, 8), (1, 300, 10))
        cases = [Case(tuple(draw(*shape, seed=seed) for seed in range(3))) for shape in shapes]
        # Whole numbers and a head_dim of 16: these scores are exact in float32, and in any order of the sum.
        q, v = 1 + torch.arange(6 * 16).view(1, 6, 16).remainder(3).double(), draw(1, 6, 16)
        last = torch.cat((draw(1, 5, 16), torch.full((1, 1, 16), 2.0**14, dtype=q.dtype)), dim=1)
        far = torch.full_like(q, -(2.0**14))
        cases += [
            Case((q, last, v), "a last key whose scores are near 130,000"),
            Case((q, far, v), "visible scores near -130,000"),
        ]
        # not in bfloat16: a mask of numbers, which a learner may add, is float32
        compare(type(self), answer, attend, cases, suspects=suspects, what="the output", dtypes=(torch.float32,))


def suspects(q: Tensor, k: Tensor, v: Tensor) -> list[Suspect]:
    """The bug as it stands, and repairs that do not mend it; then what is wrong in any attention."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    hidden = ~causal_mask(q.shape[-2], 0)
    weights, left = torch.softmax(scores, -1), torch.softmax(scores, -1).masked_fill(hidden, 0)
    total = left.sum(-1, keepdim=True)
    infinite = float("-inf")

    def filled(value: float) -> Tensor:
        return torch.softmax(scores.masked_fill(hidden, value), -1) @ v

    hide = "the score that no other can be below, and that exp() turns into 0: -inf"
    return [
        Suspect("mask-after", [lambda: leaky_attend(q, k, v)],
                "a visible weight is a share of more than the visible ones",
                "what each row's weights are shares of: which keys are in that sum?",
                f"the first token's weights sum to {total.flatten()[0]:.2f}, not to 1"),
        Suspect("infinite-weights", [lambda: weights.masked_fill(hidden, infinite) @ v,
                                     lambda: (weights * ~hidden).masked_fill(hidden, infinite) @ v],
                "-inf was put into the weights, after softmax", "hide the scores: -inf belongs before softmax",
                "weights of -inf met the values"),
        Suspect("zero-times-infinity", [lambda: torch.softmax(scores + hidden * infinite, -1) @ v,
                                        lambda: torch.softmax(scores * ~hidden + hidden * infinite, -1) @ v],
                "0 times -inf is NaN: a mask of numbers was multiplied by -inf",
                "scores.masked_fill(~mask, -inf), or torch.where: they choose and do not multiply",
                "every score is NaN"),
        Suspect("times-infinity", [lambda: torch.softmax(torch.where(hidden, scores * infinite, scores), -1) @ v],
                "hidden scores were multiplied by -inf: a negative one becomes +inf, and softmax of that is NaN",
                "scores.masked_fill(~mask, -inf), or torch.where: they choose and do not multiply",
                "rows with a negative hidden score are NaN"),
        Suspect("renormalised", [lambda: left / total @ v, lambda: (left / total).nan_to_num(0.0) @ v],
                "softmax ran over all keys, and what the mask left was scaled up afterwards: by then it is 0",
                "mask the scores, before softmax",
                "right for ordinary numbers; wrong where a hidden score is hundreds larger than the visible ones"),
        Suspect("softmax-twice", [lambda: torch.softmax(left.masked_fill(hidden, infinite), -1) @ v,
                                  lambda: torch.softmax(left, -1) @ v],
                "softmax ran again over weights", "one softmax, over masked scores",
                "rows sum to 1, but are nearly even"),
        Suspect("mask-weak", [lambda value=value: filled(value) for value in (
            -1.0, -10.0, -50.0, -100.0, -500.0, -1e3, -1e4, -65504.0, -1e5)],
                "hidden scores were set to a number that a visible score can be below", hide,
                "hidden tokens get weight where visible scores are low"),
        Suspect("mask-weak", [lambda value=value: torch.softmax(scores + hidden * value, -1) @ v for value in (
            -10.0, -50.0, -100.0, -500.0, -1e3, -1e4, -65504.0, -1e5)],
                "a number was added to hidden scores; a score that is larger by that much is seen again", hide,
                "hidden tokens get weight where their scores are large"),
        Suspect("no-mask", [lambda: weights @ v],
                "no score is hidden. masked_fill returns a new tensor and changes nothing in place", "hide the scores "
                "that the mask forbids before softmax, and use the tensor that comes back",
                "rows sum to 1, but every token sees every other"),
        Suspect("axis-from-the-front", [lambda d=d: torch.softmax(scores.masked_fill(hidden, infinite), d) @ v
                                        for d in range(q.dim())],
                "softmax's dim was counted from the front, which fits one number of dimensions only",
                "dim=-1: a query spends 1 on its keys",
                "rows sum to 1 for one number of dimensions and not for others"),
        Suspect("mask-inverted", [lambda: torch.softmax(scores.masked_fill(hidden.mT, infinite), -1) @ v],
                "the mask was transposed, or triu stands for tril", "row i sees the columns up to i: tril",
                "tokens see what is behind them and not what is before"),
        Suspect("mask-multiplied", [lambda: torch.softmax(scores * ~hidden, -1) * ~hidden @ v],
                "hidden scores are 0, or a number near it, by a product with the mask or as what is filled in: exp(0) "
                "is 1, a share that the mask then takes from the weights", hide, "the weights do not sum to 1"),
        Suspect("no-softmax", [lambda: scores.masked_fill(hidden, 0) @ v], "softmax is missing",
                "scores, mask, softmax, product with V", "masked scores are used as weights"),
        Suspect("naive", [lambda: naive_softmax(scores.masked_fill(hidden, infinite)) @ v],
                "exp() of a large score is infinity, and a row of very low ones is 0 throughout", "torch.softmax",
                "right for ordinary numbers; NaN where scores are large"),
        *(replace(suspect, cause=DIAGONALS.get(suspect.diagnosis, suspect.cause),
                  look=ROW if suspect.look == MASK else suspect.look) for suspect in shared(q, k, v)),
    ]  # fmt: skip


def naive_softmax(scores: Tensor) -> Tensor:
    """Softmax without subtracting the largest score."""
    exp = scores.exp()
    return exp / exp.sum(-1, keepdim=True)
