"""An answer beside the reference, on calls that nobody has to think of."""

from __future__ import annotations

import pytest
import torch

from labkit.course.checks import attention
from labkit.course.checks.suspects import Suspect
from labkit.course.checks.tensors import heads
from labkit.course.checks.trials import Case, compare
from labkit.course.examine import examine
from labkit.course.exercise import Exercise


def attend(q, k, v):
    """Causal attention of grouped heads."""
    return attention.attend(q, k, v)


class Attend(Exercise):
    """Attention, with nothing said about what can go wrong."""

    id, title, minutes = "00.1", "Attention", 1
    reference = staticmethod(attend)
    hints = ("a", "b", "c")

    def examine(self, answer) -> None:
        """Three calls and what comes with them."""
        cases = [heads(6, 2, 3, 4), heads(4, 4, 2, 5, head_dim=12), heads(5, 1, 1, 6, head_dim=20)]
        compare(type(self), answer, attend, map(tuple, cases), suspects=attention.suspects, what="the output")


def verdict(answer):
    """The status, or the diagnosis."""
    found = examine(Attend(), answer)
    return found.finding.diagnosis if found.finding else found.status


def right(q, k, v):
    times = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


BUFFER = torch.zeros(2, 6, 3, 8, dtype=torch.float64)


def one_buffer(q, k, v):
    out = right(q, k, v)
    if out.shape == BUFFER.shape and out.dtype == BUFFER.dtype:
        return BUFFER.copy_(out)
    return out


FIRST: dict = {}


def the_first_again(q, k, v):
    """The numbers change between two calls of the same shapes, the result does not."""
    return FIRST.setdefault((q.shape, q.dtype), right(q, k, v)).clone()


def by_memory(q, k, v):
    return right(torch.as_strided(q, q.shape, q.new_empty(q.shape).stride()), k, v)


def in_float32(q, k, v):
    return right(q.float(), k.float(), v.float())


FIRST = {}


def by_shape(q, k, v):
    return FIRST.setdefault((q.shape, k.shape, q.dtype), right(q, k, v))


def through_half(q, k, v):
    return right(q.half().to(q.dtype), k.half().to(q.dtype), v.half().to(q.dtype))


def coarse(q, k, v):
    return right(*(x.half().to(x.dtype) if x.dtype == torch.float32 else x for x in (q, k, v)))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (attend, "pass"),
        (right, "pass"),
        (one_buffer, "result-overwritten"),
        (the_first_again, "remembered"),
        (lambda q, k, v: torch.ones_like(q), "values"),
        (by_memory, "layout"),
        (lambda q, k, v: right(q, k, v).view(-1, *q.shape[1:]) if q.is_contiguous() else q.view(-1), "layout"),
        (in_float32, "dtype"),
        (coarse, "precision"),
        (by_shape, "remembered"),
        (through_half, "precision"),
        (lambda q, k, v: right(q, k, v).bfloat16().to(q.dtype), "precision"),
        (lambda q, k, v: 1.5 * right(q, k, v), "factor"),
        (lambda q, k, v: right(q, k, v).flip(0), "order"),
        (lambda q, k, v: right(q, k, v) + 0.25, "offset"),
        (lambda q, k, v: right(q, k, v) + 0.01 * q, "values"),
        (lambda q, k, v: right(q, k, v)[0], "shape"),
        (lambda q, k, v: right(q, k, v).tolist(), "not-a-tensor"),
        (lambda q, k, v: (right(q, k, v), k), "not-a-tensor"),
    ],
)
def test_what_an_answer_does_is_what_is_said(answer, said: str) -> None:
    assert verdict(answer) == said


def test_a_finding_shows_sizes_and_the_first_place_that_differs_with_digits_enough() -> None:
    finding = examine(Attend(), lambda q, k, v: right(q, k, v) + 1e-5 * q).finding
    assert finding is not None
    assert "q [2, 6, 3, 8], k [2, 2, 7, 8], v [2, 2, 7, 8]" in finding.seen
    held, meant = finding.seen.split("it holds ")[1].split(" (")[0].split("; it should be ")
    assert held != meant
    assert "of 288 entries differ" in finding.seen


def test_a_suspect_without_words_of_its_own_shows_the_first_place_that_differs() -> None:
    class Silent(Attend):
        def examine(self, answer) -> None:
            doubled = lambda q, k, v: [Suspect("doubled", [lambda: 2 * attend(q, k, v)], "twice", "once")]  # noqa: E731
            compare(type(self), answer, attend, [tuple(heads(6, 2, 3, 4))], suspects=doubled, what="the output")

    finding = examine(Silent(), lambda q, k, v: 2 * right(q, k, v)).finding
    assert finding is not None
    assert finding.diagnosis == "doubled"
    assert "q [2, 6, 3, 8]" in finding.seen
    assert "the output: at [0, 0, 0, 0] it holds " in finding.seen


def test_what_raises_is_told_with_its_sizes() -> None:
    finding = examine(Attend(), lambda q, k, v: right(q, k, v).view(7, 7)).finding
    assert finding is not None
    assert "(called with q [2, 6, 3, 8], k [2, 2, 7, 8], v [2, 2, 7, 8])" in finding.seen


def test_a_suspect_is_recognised_in_float32_too() -> None:
    def no_scale(q, k, v):
        return right(q * q.shape[-1] ** 0.5, k, v)

    finding = examine(Attend(), no_scale).finding
    assert finding is not None
    assert finding.diagnosis == "no-scale"


def test_a_suspect_that_fits_the_first_call_alone_is_not_named() -> None:
    """Scores divided by 8 where head_dim is 64 look right; divided by 64 they fit "scale-twice" in that call only."""

    class Twice(Attend):
        def examine(self, answer) -> None:
            cases = [tuple(heads(6, 2, 3, 4, head_dim=16)), tuple(heads(4, 2, 3, 4, head_dim=32))]
            compare(type(self), answer, attend, cases, suspects=attention.suspects)

    fixed = lambda q, k, v: attention.attend(q, k, v, attention.Turn(scale=lambda *_: 1 / 16))  # noqa: E731
    finding = examine(Twice(), fixed).finding
    assert finding is not None
    assert finding.diagnosis == "values"


def test_a_variant_that_does_not_apply_to_a_case_is_passed_over() -> None:
    class Wide(Attend):
        def examine(self, answer) -> None:
            def suspects(q, k, v):
                return [Suspect("wide", [None, right(q, k, v) + 1 if q.shape[-1] > 8 else None], "cause", "look")]

            compare(type(self), answer, attend, map(tuple, (heads(6, 2, 3, 4), heads(4, 2, 3, 4, head_dim=32))),
                    suspects=suspects)  # fmt: skip

    finding = examine(Wide(), lambda q, k, v: right(q, k, v) + (q.shape[-1] > 8)).finding
    assert finding is not None
    assert finding.diagnosis == "wide"


def test_a_call_by_name_is_made_by_name() -> None:
    class Keyword(Attend):
        def examine(self, answer) -> None:
            q, k, v = heads(6, 2, 3, 4)
            compare(type(self), answer, attend, [Case((q, k), by_name={"v": v})])

    assert examine(Keyword(), right).status == "pass"
    assert examine(Keyword(), lambda q, k, values: right(q, k, values)).status == "not yet"


@pytest.mark.parametrize(
    ("answer", "diagnosis"),
    [
        (lambda q, k, v: attend(q, k[:1].expand_as(k), v[:1].expand_as(v)), "one-for-all"),
        (lambda q, k, v: attend(q[:, :1].expand_as(q), k, v), "one-for-all"),
        (lambda q, k, v: attend(q, k.bfloat16().to(k.dtype), v), "precision"),
        (lambda q, k, v: torch.from_numpy(attend(q, k, v).numpy().copy()), "left-pytorch"),
        (lambda q, k, v: torch.tensor(attend(q, k, v).tolist(), dtype=q.dtype), "left-pytorch"),
    ],
)
def test_what_no_suspect_of_the_exercise_is_has_a_name_all_the_same(answer, diagnosis) -> None:
    assert verdict(answer) == diagnosis


def spoilt(q, k, v):
    """Softmax over the queries where there are many keys, and NaN where there is one query."""
    return attention.attend(q, k, v, attention.Turn(axis=-2)) if q.shape[2] > 1 else q * float("nan")


def test_a_mistake_is_named_by_the_calls_that_it_did_not_spoil_with_nan() -> None:
    assert verdict(spoilt) == "axis"


def test_nan_in_some_calls_of_a_right_answer_names_no_mistake() -> None:
    assert verdict(lambda q, k, v: attend(q, k, v) if q.shape[2] > 1 else q * float("nan")) == "not-finite"


def test_sizes_and_small_tables_may_be_read_out() -> None:
    assert verdict(lambda q, k, v: attend(q, k, v) if torch.arange(50).tolist() else None) == "pass"


def test_a_result_is_remembered_only_when_its_size_was_right_in_some_call() -> None:
    kept: list = []

    def the_first_for_all(q, k, v):
        kept.append(right(q, k, v))
        return kept[0].clone()

    assert verdict(the_first_for_all) == "remembered"
    assert verdict(lambda q, k, v: q.new_zeros(0, 64)) == "shape"
