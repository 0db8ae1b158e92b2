"""Numbers that answers give: what is one, what is whole, and which formula it is."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit.course.checks.numbers import check_number, check_whole, equal, judge
from labkit.course.checks.suspects import Suspect
from labkit.course.exercise import NotYet
from tests.course.exercises import Double


def area(width: int, height: int) -> int:
    """The right formula."""
    return width * height


CASES = [(3, 5), (7, 5), (3, 11)]
SUSPECTS = [Suspect("sum", [lambda w, h: w + h, lambda w, h: w + h + 1], "added", "the operator")]


def diagnosis(answer, **options) -> str:
    """What `judge` says of an answer; "" when it passes."""
    try:
        judge(Double, answer, area, CASES, SUSPECTS, what="the area", whole=True, **options)
    except NotYet as not_yet:
        return not_yet.finding.diagnosis
    return ""


@pytest.mark.parametrize("got", [None, True, "12", [12], (12, 1), torch.tensor(12), 1j, numpy.bool_(True)])
def test_what_is_no_number_is_said(got) -> None:
    with pytest.raises(NotYet) as caught:
        check_number(Double, got, "a count")
    assert caught.value.finding.diagnosis == "not-a-number"


@pytest.mark.parametrize("got", [12, numpy.int64(12), numpy.uint8(12)])
def test_whole_numbers_of_numpy_are_whole(got) -> None:
    assert check_whole(Double, got, "a count") == 12


@pytest.mark.parametrize("got", [12.0, 12.5, numpy.float32(12), Fraction(25, 2), math.inf, math.nan])
def test_what_is_not_whole_or_a_float_is_said(got) -> None:
    with pytest.raises(NotYet) as caught:
        check_whole(Double, got, "a count")
    assert caught.value.finding.diagnosis == "not-whole"


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=1e-300, max_value=1e300))
def test_a_number_equals_itself_but_for_rounding_and_nothing_twice_as_large(x: float) -> None:
    assert equal(x, x * (1 + 1e-12))
    assert not equal(x, 2 * x)
    assert not equal(x, math.inf)
    assert not equal(math.nan, x)
    assert not equal(x, 10**400)


def test_infinity_equals_only_itself() -> None:
    assert equal(math.inf, math.inf)
    assert not equal(math.inf, -math.inf)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (area, ""),
        (lambda w, h: numpy.int64(w * h), ""),
        (lambda w, h: float(w * h), "not-whole"),
        (lambda w, h: w + h, "sum"),
        (lambda w, h: w + h + 1, "sum"),
        (lambda w, h: 8 * w * h, "bits"),
        (lambda w, h: w * h / 1000, "units"),
        (lambda w, h: 5 * w, "ignored"),
        (lambda w, h: w**h, "values"),
        (lambda w, h: math.inf, "ignored"),
        (lambda w, h: 10**400, "ignored"),
        (lambda w, h: -(10**400), "ignored"),
        (lambda w, h: None, "returned-none"),
    ],
)
def test_an_answer_is_told_apart_by_the_formula_it_agrees_with_in_every_case(answer, said: str) -> None:
    assert diagnosis(answer) == said


def test_another_unit_is_named_by_a_whole_number() -> None:
    with pytest.raises(NotYet) as raised:
        judge(Double, lambda w, h: w * h / 1e9, area, CASES, [], what="the area")
    assert raised.value.finding.cause == "every result is 1,000,000,000 times too small: it is in another unit"


def test_a_number_that_decides_now_and_then_is_not_said_to_be_ignored() -> None:
    assert diagnosis(lambda w, h: 5 * w if h < 40 else w * h) == "values"
    assert diagnosis(lambda w, h: 5 * w) == "ignored"


def test_a_list_is_said_to_be_ignored_only_where_no_other_list_gives_another_result() -> None:
    def first_and_count(held, count):
        return held[0] * count

    cases = [([3, 1], 5), ([30, 1], 5), ([3, 1], 7)]
    for answer, said in ((lambda held, count: 9 * count, "ignored"), (lambda held, count: count * len(held), "values")):
        with pytest.raises(NotYet) as caught:
            judge(Double, answer, first_and_count, cases, [], what="the product", show=lambda *case: str(case))
        assert caught.value.finding.diagnosis == said


def test_a_formula_that_fits_one_case_only_is_not_named() -> None:
    assert diagnosis(lambda w, h: w + h if w == 3 and h == 5 else 0) == "values"
    assert diagnosis(lambda w, h: 1, otherwise="count") in ("count", "ignored")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda width, height: 2 * width * height, "every result is 2 times what it should be; with width 3, height 5"),
        (lambda width, height: 100 * height, "the result is the same whatever `width` is; with width 3, height 5"),
    ],
    ids=["factor", "ignored"],
)
def test_what_all_cases_show_and_one_case_are_one_sentence(answer, said: str) -> None:
    with pytest.raises(NotYet) as caught:
        judge(Double, answer, area, CASES, SUSPECTS, what="the area")
    assert caught.value.finding.seen.startswith(said)


def room(tokens: int, batch: int, size: int) -> int:
    """A formula in which no change of one argument is a factor of the whole, or a term."""
    return (tokens * batch * size) ** 2 + 1000


ROOMS = [(31, 37, 2), (310, 7, 4), (17, 5, 9), (1003, 51, 8)]


@pytest.mark.parametrize(
    ("answer", "diagnosis", "said"),
    [
        (lambda t, b, s: room(t - 1, b, s), "argument", "right for a `tokens` that is one less"),
        (lambda t, b, s: room(t, b + 1, s), "argument", "right for a `batch` that is one more"),
        (lambda t, b, s: room(t // b, b, s), "argument", "right for a `tokens` of `tokens // batch`"),
        (lambda t, b, s: room(t, b, 2), "argument", "right if `size` were 2 throughout"),
        (lambda t, b, s: room(t, t, s), "argument", "right if `batch` had the value of `tokens`"),
        (lambda t, b, s: room(t, b, 8 * s), "argument", "right for 8 times `tokens` or `batch` or `size`"),
        (lambda t, b, s: torch.tensor(room(t, b, s)).int().item(), "overflow", ""),
        (lambda t, b, s: room(t, b, s) // 1024, "units", ""),
        (lambda t, b, s: room(t, b, s) // 8, "bits", ""),
    ],
)
def test_a_change_of_one_argument_is_named_where_it_gives_every_result(answer, diagnosis, said) -> None:
    with pytest.raises(NotYet) as caught:
        judge(Double, answer, room, ROOMS, (), what="the bytes")
    assert caught.value.finding.diagnosis == diagnosis
    assert said in caught.value.finding.seen


def test_a_sum_in_place_of_a_product_is_named() -> None:
    with pytest.raises(NotYet) as caught:
        judge(Double, lambda w, h: w + h, area, [*CASES, (2, 9)], (), what="the area")
    assert caught.value.finding.cause == "height and width were added where they should be multiplied"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda w, h: int(numpy.float32(w * h)), "rounded"),
        (lambda w, h: w * h + 1, "term"),
        (lambda w, h: w * h + (w > 100), "values"),
    ],
    ids=["in float32", "one more", "one more where it is large"],
)
def test_a_product_in_float32_is_rounded_and_one_that_is_off_by_one_is_not(answer, said: str) -> None:
    cases = [(3, 5), (7, 5), (40_001, 5_003), (1_000_003, 257)]  # float32 holds all whole numbers up to 16,777,216
    with pytest.raises(NotYet) as caught:
        judge(Double, answer, area, cases, (), what="the area", whole=True)
    assert caught.value.finding.diagnosis == said


def test_the_same_number_in_every_case_names_no_argument() -> None:
    with pytest.raises(NotYet) as caught:
        judge(Double, lambda t, b, s: room(31, 37, 2), room, ROOMS, (), what="the bytes")
    assert caught.value.finding.diagnosis != "argument"
