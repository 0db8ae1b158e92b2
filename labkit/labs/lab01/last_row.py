"""01.5: the last row alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from labkit.course.checks.suspects import Suspect, recognise
from labkit.course.checks.tensors import TIGHT, draw
from labkit.course.exercise import Exercise, NotYet
from labkit.labs.lab01.references import attend_last
from labkit.ledger import ledger


class LastRow(Exercise):
    """The newest token's row, and no other."""

    id = "01.5"
    title = "Only the last row"
    minutes = 3
    needs = ("01.1",)
    hints = (
        "Which query asks, and which keys may it see? Is there anything left to hide?",
        "Cut q before the product, not the result after it; keep the dimension of length 1.",
        "q[:, :, -1:] is [batch, num_heads, 1, head_dim]: from there it is 01.1, times v. No mask.",
    )
    hints_for: ClassVar = {
        "whole-matrix": "Where in your code does the -1 stand: before the product or after it?",
        "sees-first-only": "The newest token stands after all others. Which keys would a causal mask hide from it?",
    }
    reference = staticmethod(attend_last)

    def examine(self, answer: Callable) -> None:
        """Value slips first, then the work."""
        q, k, v = (draw(2, 3, 7, 8, seed=seed) for seed in range(3))
        want = attend_last(q, k, v)
        try:
            with ledger() as work:
                got = self.call(answer, q, k, v)
        except NotYet as not_yet:
            # 2 batches against 3 heads: what PyTorch says when the query's dimension of length 1 is gone.
            if "tensor a (2) must match the size of tensor b (3)" in not_yet.finding.seen:
                self.fail(
                    "dimension-lost",
                    seen="PyTorch could not match q and k: batches were lined up with heads",
                    cause="an index such as -1 drops a dimension, so that q has three; a slice such as -1: keeps it",
                    look="the line in attend_last that cuts q: q[:, :, -1:]",
                )
            raise
        recognise(type(self), got, suspects(q, k, v))
        self.same(got, want, what="the newest token's output", tolerance=TIGHT)
        if work.scores > 2 * 3 * 7:
            self.fail(
                "whole-matrix",
                seen=f"{work.scores} score entries were computed; {2 * 3 * 7} are needed",
                cause="every row of the matrix is computed and all but the last are thrown away",
                look="take the last query before the product, not the last row after it",
            )
        q, k, v = (draw(1, 2, 1, 8, seed=seed, dtype=torch.float32) for seed in range(3))
        self.same(self.call(answer, q, k, v), attend_last(q, k, v), what="a single token", tolerance=1e-5)


def suspects(q: Tensor, k: Tensor, v: Tensor) -> list[Suspect]:
    """What other rows, other scales and masks that hide too much come to."""
    last, keys = q[:, :, -1:], k.transpose(-2, -1)
    root = math.sqrt(q.shape[-1])
    return [
        Suspect("first-query", attend_last(q[:, :, :1], k, v), "the wrong end of q was taken",
                "the newest token stands last: index -1", "this is what the first token's query finds"),
        Suspect("dimension-lost", attend_last(q, k, v)[:, :, 0],
                "an index such as -1 drops a dimension, a slice such as -1: keeps it", "q[:, :, -1:]",
                "three dimensions came back; the one of length 1 is missing"),
        Suspect("sees-first-only", v[:, :, :1],
                "a causal mask for one query and no offset hides every key but the first",
                "no mask is needed: the newest token may see all",
                "the output is the first token's value: nothing else was seen"),
        Suspect("sees-itself-only", v[:, :, -1:], "the last of k and v was taken, as well as the last of q",
                "one query asks, but all keys and values answer: only q is cut",
                "the output is the newest token's own value: nothing else was seen"),
        Suspect("no-scale", torch.softmax(last @ keys, dim=-1) @ v, "the division by sqrt(head_dim) is missing", "01.1",
                "the weights are too sharp"),
        Suspect("not-itself", attend_last(q, k[:, :, :-1], v[:, :, :-1]), "its own key and value were cut off",
                "k and v are used whole; only q is cut", "the newest token does not see itself"),
        Suspect("axis", torch.softmax(last @ keys / root, dim=-2) @ v,
                "softmax ran along the queries, of which there is one", "dim=-1: the keys",
                "the output is the plain sum of all values: every weight is 1"),
    ]  # fmt: skip
