"""01.6: a mask that leaks, to mend."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from torch import Tensor

from labkit.course.exercise import Exercise, Finding, close
from labkit.labs.lab01.mask import causal_mask
from labkit.labs.lab01.tools import TOLERANCE, draw, recognise


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of a whole prompt: what comes after a token must not change its output.

    q, k, v: [..., tokens, head_dim]. Returns [..., tokens, head_dim].
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = causal_mask(q.shape[-2], 0).to(q.device)
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
    return weights @ v


def leaky_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of a whole prompt: what comes after a token must not change its output.

    q, k, v: [..., tokens, head_dim]. Returns [..., tokens, head_dim].
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = causal_mask(q.shape[-2], 0).to(q.device)
    weights = torch.softmax(scores, dim=-1) * mask
    return weights @ v


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
        recognise(got, self.slips(q, k, v))
        self.same(got, attend(q, k, v), what="the output", tolerance=TOLERANCE)
        # Only the key of the last token is large: hidden from the others, its score dominates theirs by hundreds.
        q = q.abs().float()
        k = torch.cat((k[:, :-1].float(), torch.full((2, 1, 8), 300.0)), dim=1)
        got, want = self.call(answer, q, k, v.float()), attend(q, k, v.float())
        if not close(got, want, 1e-3):
            self.fail(
                "renormalised",
                seen="right for ordinary numbers; wrong where a hidden score is hundreds larger than the visible ones",
                cause="softmax ran over all keys, and what the mask left was scaled up afterwards: by then it is 0",
                look="mask the scores, before softmax",
            )
        # All visible scores are some hundreds below 0: a hidden score must be far below any score there can be.
        k = torch.full_like(k, -300.0)
        if not close(self.call(answer, q, k, v.float()), attend(q, k, v.float()), 1e-3):
            self.fail(
                "weak-mask",
                seen="right for ordinary numbers; where visible scores are near -500, hidden tokens get the weight",
                cause="hidden scores were set to a number that a visible score can be below",
                look="the score that no other can be below: -inf",
            )

    @staticmethod
    def slips(q: Tensor, k: Tensor, v: Tensor) -> Iterable[tuple[Tensor, Finding]]:
        """The bug as it stands, and repairs that do not mend it."""
        mask = causal_mask(q.shape[-2], 0)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])

        def blend(masked: Tensor, dim: int = -1) -> Tensor:
            return torch.softmax(masked, dim=dim) @ v

        yield (
            leaky_attend(q, k, v),
            Finding(
                "mask-after-softmax",
                f"the first token's weights sum to {torch.softmax(scores, -1)[0, 0, 0]:.2f}, not to 1",
                "softmax divides by a sum that includes the later tokens; the mask comes when that is done",
                "the order of the two: hide scores first, then softmax",
            ),
        )
        yield (
            blend(scores),
            Finding(
                "no-mask",
                "rows sum to 1, but every token sees every other",
                "the mask is gone",
                "hide the scores that the mask forbids before softmax",
            ),
        )
        yield (
            blend(scores * mask),
            Finding(
                "zeroed-scores",
                "later tokens still get weight",
                "a score of 0 is not hidden: exp(0) is 1",
                "the score that exp() turns into 0 is -inf",
            ),
        )
        yield (
            blend(scores.masked_fill(~mask, -1.0)),
            Finding(
                "weak-mask",
                "later tokens still get weight",
                "a small negative score is not hidden",
                "the score that exp() turns into 0 is -inf",
            ),
        )
        inverted = Finding(
            "inverted",
            "each token sees only later ones, and the last sees none: NaN",
            "the mask is turned round: True = may see",
            "masked_fill hides where its mask is True: give it ~mask",
        )
        yield blend(scores.masked_fill(mask, float("-inf"))), inverted
        yield (
            blend(scores.masked_fill(~mask, float("-inf")), dim=-2),
            Finding(
                "axis",
                "columns sum to 1, rows do not",
                "softmax runs along the queries",
                "dim=-1: a query spends 1 on its keys",
            ),
        )
