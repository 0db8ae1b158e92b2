"""A result that is off by a product, or by a term, of what went in is explained by it, and by nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.course.checks.quantities import explain_product, explain_term


def size(layers: int, heads: int, width: int, tokens: int) -> int:
    return 2 * layers * heads * width * tokens


CASES = [(11, 7, 22, 31), (11, 7, 22, 41), (5, 3, 34, 31), (13, 9, 10, 101)]
WANT = [size(*case) for case in CASES]


def explained(function) -> str:
    found = explain_product(size, CASES, [function(*case) for case in CASES], WANT)
    return found.cause if found else ""


SLIPS = {
    "layers is missing from the product": lambda layers, heads, width, tokens: 2 * heads * width * tokens,
    "heads stands where width belongs": lambda layers, heads, width, tokens: 2 * layers * heads * heads * tokens,
    "layers is in the product once too often": lambda layers, heads, width, tokens: (
        2 * layers**2 * heads * width * tokens
    ),
    "it was divided by tokens instead of multiplied": lambda layers, heads, width, tokens: (
        2 * layers * heads * width / tokens
    ),
    "a constant factor too many, or one missing": lambda layers, heads, width, tokens: layers * heads * width * tokens,
}


@pytest.mark.parametrize("cause", SLIPS)
def test_slips_of_one_factor_are_named(cause: str) -> None:
    assert explained(SLIPS[cause]) == cause


def test_a_slip_of_a_factor_and_a_constant_shows_both() -> None:
    found = explain_product(size, CASES, [layers * width * tokens for layers, heads, width, tokens in CASES], WANT)
    assert found is not None
    assert found.words == "every result is 1 / heads times 1/2 times what it should be"


def test_a_term_that_is_missing_is_named() -> None:
    got = [size(*case) - 2 * case[0] * case[1] for case in CASES]
    found = explain_term(size, CASES, got, WANT)
    assert found is not None
    assert found.cause == "a term is missing: 2 x heads x layers"


@given(st.lists(st.floats(0.1, 1e6), min_size=4, max_size=4))
def test_any_other_numbers_are_not_explained(got: list[float]) -> None:
    found = explain_product(size, CASES, got, WANT)
    assert found is None or all(abs(a / b - got[0] / WANT[0]) < 1e-9 for a, b in zip(got, WANT, strict=True))


def test_a_right_result_rounded_is_not_explained() -> None:
    assert explain_product(size, CASES, [value // 7 for value in WANT], [value / 7 for value in WANT]) is None
