"""What the checks of 07.3 and 07.5 share: scores made of attention's weights, and how many rows of weights exist."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from labkit.course.checks.attention import attend
from labkit.course.checks.effort import EMPTY, Effort, Kernels, check_stays, effort_of
from labkit.course.checks.tensors import agree, heads
from labkit.course.checks.trials import Case, Judge
from labkit.course.exercise import Exercise, NotYet
from labkit.ledger import tensors_in


class Scores(Exercise):
    """An exercise whose result is float32 whatever comes in. infinite: some of it is meant to be infinity."""

    infinite: ClassVar[bool] = False

    @classmethod
    def like(cls, got: Any, want: Tensor, *, what: str) -> None:
        """As for any exercise, with words of its own for another dtype; where infinity is meant it is left to the
        values."""
        if isinstance(got, Tensor) and got.shape == want.shape:
            if got.dtype != want.dtype:
                cls.fail("dtype", seen=f"{what} is {got.dtype}; it should be {want.dtype}, whatever q and k are",
                         cause="sums of weights were kept in q's dtype, or made in another",
                         look="the tensor that the sums go into, and the dtype of the weights")  # fmt: skip
            if cls.infinite:
                got = got.masked_fill(got.isinf(), 0.0)
        super().like(got, want, what=what)


def of_kv_heads(by_query_head: Tensor, num_kv_heads: int) -> Tensor:
    """The mean of the query heads that share a KV head."""
    return by_query_head.unflatten(1, (num_kv_heads, -1)).mean(dim=2)


def large(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The same, with scores in the hundreds."""
    return 150 * q, k


def far_down(num_heads: int, num_kv_heads: int, new: int, held: int) -> tuple[Tensor, Tensor]:
    """float32 q and k whose scores lie near -1e5, numbers that float32 holds exactly: only -inf hides a key then."""
    q, k, _ = heads(num_heads, num_kv_heads, new, held, batch=1, head_dim=16)
    q, k = ((4 * x).round() / 4 for x in (q, k))
    q[..., 0], k[..., 0] = 1.0, -4e5
    return q.float(), k.float()


def pair(num_heads: int, num_kv_heads: int, new: int, held: int, batch: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Random float32 q and k: these numbers come out in float32, and are judged by what float32 loses."""
    q, k, _ = heads(num_heads, num_kv_heads, new, held, batch=batch, head_dim=head_dim)
    return q.float(), k.float()


def exact_weights(q: Tensor, k: Tensor) -> Tensor:
    """Attention's weights in float64, [batch, num_heads, new_tokens, kv_len]."""
    return attend(q.double(), k.double(), None)


class Rows(Kernels):
    """Notes the largest tensor of weights that is made, in rows, and the largest of any floats but masks.

    What has rows (or columns) of fractions that sum to 1 are weights.
    """

    def __init__(self, keys: int) -> None:
        super().__init__(Effort())
        self.keys, self.rows, self.numel = keys, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        before = self.effort.made
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func.overloadpacket not in EMPTY and (self.effort.made > before or func._schema.is_mutable):
            for x in tensors_in(result):
                if x.is_floating_point() and x.dim() > 1 and x.numel() >= self.keys:
                    self.look(x)
        return result

    def look(self, x: Tensor) -> None:
        """Whether these are weights, and how many rows of them; or how many numbers that are no mask."""
        numbers = (x != 0) & (x != 1) & (x.abs() < 1e3)
        if numbers.any():
            self.numel = max(self.numel, x.numel())
        for dim in (-1, -2):
            if numbers.any() and x.shape[dim] >= self.keys // 2 and bool((x >= 0).all()):
                sums = x.double().sum(dim)
                if ((sums - 1).abs() < 0.02).double().mean() > 0.9:
                    self.rows = max(self.rows, sums.numel())


def check_rows(exercise: type[Exercise], run: Callable[[], Any], keys: int, allowed: int, whole: int) -> int:
    """Run it, and give how many rows of weights existed at a time; a finding when numbers leave PyTorch. keys: of each
    row. allowed: rows that may exist. whole: rows of all weights."""
    check_stays(exercise, effort_of(lambda: exercise.run(run)))
    with Rows(keys) as made:
        exercise.run(run)
    if made.rows <= allowed and made.numel >= whole * keys // 2:  # scores of all, whatever became of them
        return whole
    return made.rows


def check_far_down(
    exercise: type[Exercise], answer: Callable, right: Callable, suspects: Callable, cases: Sequence[Case], far: Case
) -> None:
    """A case in which a finite number hides no key. Far off only counts: near -1e5, float32 keeps two decimals."""
    got, want = exercise.call(answer, *far.args), right(*far.args)
    if not agree(got, want, 0.05):
        Judge(exercise, answer, right, suspects, "the scores", False, [*cases, far]).call(far)


def check_large(exercise: type[Exercise], answer: Callable, right: Callable, args: tuple[Any, ...]) -> None:
    """Scores in the hundreds, whose exp is infinite, where others were right."""
    case = Case(args, "scores in the hundreds")
    try:
        Judge(exercise, answer, right, lambda *_: (), "the scores", False, [case]).call(case)
    except NotYet as not_yet:
        if not_yet.finding.diagnosis == "not-finite":
            exercise.fail("scores-overflow", seen=not_yet.finding.seen, cause="exp of a score above 88 is infinite in "
                          "float32: a softmax takes the greatest score off first",
                          look="where weights are made of scores: softmax does that by itself")  # fmt: skip
        raise


def wide(dtype: torch.dtype) -> bool:
    """Whether this is float64, in which the checks compute what is exact."""
    return dtype == torch.float64
