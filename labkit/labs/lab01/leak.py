"""01.6: a mask that leaks, to mend."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from labkit.course.checks.suspects import Suspect, recognise
from labkit.course.checks.tensors import TIGHT, agree, draw
from labkit.course.exercise import Exercise
from labkit.labs.lab01.references import attend, causal_mask, leaky_attend


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
        "zeroed-scores": "exp(0) is 1. Which score gives exp(score) = 0?",
    }
    reference = staticmethod(attend)

    def examine(self, answer: Callable) -> None:
        """Known values, then a later token that dominates, then the promise itself."""
        q, k, v = (draw(2, 5, 8, seed=seed) for seed in range(3))
        got = self.call(answer, q, k, v)
        recognise(type(self), got, suspects(q, k, v))
        self.same(got, attend(q, k, v), what="the output", tolerance=TIGHT)
        # Only the key of the last token is large: hidden from the others, its score dominates theirs by hundreds.
        q = q.abs().float()
        k = torch.cat((k[:, :-1].float(), torch.full((2, 1, 8), 300.0)), dim=1)
        got, want = self.call(answer, q, k, v.float()), attend(q, k, v.float())
        if not agree(got, want, 1e-3):
            self.fail(
                "renormalised",
                seen="right for ordinary numbers; wrong where a hidden score is hundreds larger than the visible ones",
                cause="softmax ran over all keys, and what the mask left was scaled up afterwards: by then it is 0",
                look="mask the scores, before softmax",
            )
        # All visible scores are some hundreds below 0: a hidden score must be far below any score there can be.
        k = torch.full_like(k, -300.0)
        if not agree(self.call(answer, q, k, v.float()), attend(q, k, v.float()), 1e-3):
            self.fail(
                "weak-mask",
                seen="right for ordinary numbers; where visible scores are near -500, hidden tokens get the weight",
                cause="hidden scores were set to a number that a visible score can be below",
                look="the score that no other can be below: -inf",
            )


def suspects(q: Tensor, k: Tensor, v: Tensor) -> list[Suspect]:
    """The bug as it stands, and repairs that do not mend it."""
    mask = causal_mask(q.shape[-2], 0)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])

    def blend(masked: Tensor, dim: int = -1) -> Tensor:
        return torch.softmax(masked, dim=dim) @ v

    return [
        Suspect("mask-after-softmax", leaky_attend(q, k, v),
                "softmax divides by a sum that includes the later tokens; the mask comes when that is done",
                "the order of the two: hide scores first, then softmax",
                f"the first token's weights sum to {torch.softmax(scores, -1)[0, 0, 0]:.2f}, not to 1"),
        Suspect("no-mask", blend(scores), "the mask is gone", "hide the scores that the mask forbids before softmax",
                "rows sum to 1, but every token sees every other"),
        Suspect("zeroed-scores", blend(scores * mask), "a score of 0 is not hidden: exp(0) is 1",
                "the score that exp() turns into 0 is -inf", "later tokens still get weight"),
        Suspect("weak-mask", blend(scores.masked_fill(~mask, -1.0)), "a small negative score is not hidden",
                "the score that exp() turns into 0 is -inf", "later tokens still get weight"),
        Suspect("inverted", blend(scores.masked_fill(mask, float("-inf"))), "the mask is turned round: True = may see",
                "masked_fill hides where its mask is True: give it ~mask",
                "each token sees only later ones, and the last sees none: NaN"),
        Suspect("axis", blend(scores.masked_fill(~mask, float("-inf")), dim=-2), "softmax runs along the queries",
                "dim=-1: a query spends 1 on its keys", "columns sum to 1, rows do not"),
    ]  # fmt: skip
