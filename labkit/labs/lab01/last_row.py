"""01.5: the last row alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from labkit.course.checks.attention import attend
from labkit.course.checks.attention import suspects as shared
from labkit.course.checks.effort import check_stays, effort_of
from labkit.course.checks.suspects import Suspect
from labkit.course.checks.tensors import draw
from labkit.course.checks.trials import Case, compare
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
        "dimension-lost": "How many dimensions has q[:, :, -1], and how many has q[:, :, -1:]?",
        "sees-first-only": "The newest token stands after all others. Which keys would a causal mask hide from it?",
    }
    why = (
        "q is cut before the product, so that one row of scores is made; the slice -1: keeps its dimension. Nothing "
        "comes after the newest token, so nothing is hidden."
    )
    reference = staticmethod(attend_last)

    def examine(self, answer: Callable) -> None:
        """Values first, then the work; many tokens last, for which an answer that computes every row takes long."""
        shapes = ((2, 3, 7, 20), (4, 5, 9, 12), (1, 2, 1, 8), (3, 1, 2, 24), (1, 2, 40, 16))
        cases = [Case(tuple(draw(*shape, seed=seed) for seed in range(3))) for shape in shapes]
        q, k, v = cases[0].args
        large = Case((300 * q, 300 * k, 1e4 * v), "scores of thousands")
        try:
            compare(type(self), answer, attend_last, [*cases, large], suspects=suspects, what="the newest row")
        except NotYet as not_yet:
            # 2 batches against 3 heads: what PyTorch says when a dimension of length 1 is gone.
            if "tensor a (2) must match the size of tensor b (3)" in not_yet.finding.seen:
                self.fail(
                    "dimension-lost",
                    seen="PyTorch lined batches up with heads: three dimensions met four",
                    cause="an index such as -1 drops its dimension; a slice such as -1: keeps it",
                    look="every -1 in attend_last; q[:, :, -1:] leaves the newest query, and all four dimensions",
                )
            raise
        for dtype, cut in ((torch.float32, False), (torch.bfloat16, True)):
            self.work_of(answer, *(draw(2, 3, MANY + 9, 4, seed=seed, dtype=dtype) for seed in range(3)), cut=cut)
        long = tuple(draw(1, 2, 1100, 16, seed=seed) for seed in range(3))
        compare(type(self), answer, attend_last, [long], suspects=suspects, what="the newest row", dtypes=(),
                layouts=False)  # fmt: skip

    def work_of(self, answer: Callable, *heads: Tensor, cut: bool) -> None:
        """One row's scores, and nothing of the size of the matrix. cut: from larger tensors."""
        q, k, v = (x[:, :, :MANY] if cut else x[:, :, :MANY].contiguous() for x in heads)
        with ledger() as work:
            effort = effort_of(lambda: self.call(answer, q, k, v))
        check_stays(type(self), effort)
        needed, matrix = 2 * 3 * MANY, 2 * 3 * MANY**2 * q.element_size()
        case = f"with {MANY} tokens, 2 sequences and 3 heads"
        # Scores, weights, and copies of K and V, even in float64, are under a tenth of the matrix each.
        if work.scores > needed or effort.largest > matrix // 2:
            told = f"{work.scores:,} scores were computed, and {needed:,} are needed" if work.scores > needed else (
                f"a tensor of {effort.largest:,} bytes was made; the whole matrix has {matrix:,}"
            )  # fmt: skip
            rows = work.scores / needed
            if 1 < rows < MANY // 2 and effort.largest <= matrix // 2:
                self.fail(
                    "more-than-a-row",
                    seen=f"{case}: {told}, as many as {rows:.3g} rows have",
                    cause="more than the newest query asks, or the newest one asks again: its row is computed "
                    "more than once",
                    look="how many queries go into the product, and how often the product is made",
                )
            self.fail(
                "whole-matrix",
                seen=f"{case}: {told}",
                cause="every row of the matrix is computed and all but the last are thrown away",
                look="take the last query before the product, not the last row after it",
            )
        # One key after another, in small float64 tensors, makes about half as much as the matrix in all.
        if effort.made > 4 * matrix:
            self.fail(
                "more-than-a-row",
                seen=f"{case}: {effort.made:,} bytes of new tensors were made in all; the whole matrix of scores has "
                f"{matrix:,}, one row {needed * q.element_size():,}",
                cause="more is computed than the newest token's row: a loop over queries, say",
                look="every step between q and the result: the newest query is enough",
            )


# Tokens: far more than head_dim, so that the matrix is far larger than K and V; no more than a loop over every query,
# whose kernels are all counted, goes through in a fraction of a check's time.
MANY = 192


def suspects(q: Tensor, k: Tensor, v: Tensor) -> list[Suspect]:
    """Other rows and masks that hide too much, besides what is wrong in any attention."""
    last = q[:, :, -1:]
    look = "no mask is needed: the newest token may see all"
    return [
        Suspect("dimension-lost", [lambda: attend_last(q, k, v)[:, :, 0]],
                "an index such as -1 drops a dimension, a slice such as -1: keeps it", "q[:, :, -1:]",
                "three dimensions came back; the one of length 1 is missing"),
        Suspect("all-rows", [lambda: attend(q, k, v), lambda: attend(q, k, v, causal=False)],
                "the output of every token came back", "cut q before the product: q[:, :, -1:]",
                "a row for every token; one is asked for"),
        Suspect("first-query", [lambda: attend_last(q[:, :, :1], k, v)], "the wrong end of q was taken",
                "the newest token stands last: index -1", "this is what the first token's query finds"),
        Suspect("first-query", [lambda: attend(q[:, :, -2:-1], k, v, causal=False)],
                "the token before the newest was taken", "the newest token stands last: q[:, :, -1:]",
                "this is what the last query but one finds"),
        Suspect("cut-elsewhere", [lambda: attend(q[-1:], k, v, causal=False)],
                "the last sequence was taken, not the last token", "tokens are the third dimension: q[:, :, -1:]",
                "a row for every token; one is asked for"),
        Suspect("cut-elsewhere", [lambda: attend(q[:, -1:].expand_as(q), k, v, causal=False)],
                "the last head was taken, not the last token", "tokens are the third dimension: q[:, :, -1:]",
                "a row for every token; one is asked for"),
        Suspect("no-values", [lambda: attend_last(q, k, k)], "the weights met K again, not V",
                "weights blend values: the last factor is v", "the output is a blend of keys"),
        Suspect("sees-first-only", [lambda: v[:, :, :1]],
                "a causal mask for one query and no offset hides every key but the first", look,
                "the output is the first token's value: nothing else was seen"),
        Suspect("sees-itself-only", [lambda: v[:, :, -1:]], "the last of k and v was taken, as well as the last of q",
                "one query asks, but all keys and values answer: only q is cut",
                "the output is the newest token's own value: nothing else was seen"),
        Suspect("not-itself", [lambda: attend_last(q, k[:, :, :-1], v[:, :, :-1])],
                "its own key and value were cut off", "k and v are used whole; only q is cut",
                "the newest token does not see itself"),
        Suspect("mean-query", [lambda: attend_last(q.mean(2, keepdim=True), k, v)], "the queries were averaged",
                "the newest token's query alone: q[:, :, -1:]", "no single token's query finds this"),
        Suspect("overflow", [lambda: naive(last, k, v)], "exp() of a large score is infinity, and infinity divided by "
                "infinity is NaN", "torch.softmax, or subtract the largest score before exp()",
                "NaN where scores are in the thousands"),
        *shared(last, k, v, causal=False),
    ]  # fmt: skip


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax without subtracting the largest score."""
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).exp()
    return weights / weights.sum(-1, keepdim=True) @ v
