"""Closeness of tensors, said once: exact, within a tolerance, and what NaN and infinity are close to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit.course.checks.tensors import agree, bytes_made, draw, near

INF, NAN = float("inf"), float("nan")
numbers = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=5).map(torch.tensor)


@given(numbers)
def test_a_tensor_agrees_with_itself_and_with_its_neighbours_within_the_tolerance(x) -> None:
    assert agree(x, x.clone(), 0)
    assert agree(x, x + 0.5, 0.6)
    assert not agree(x, x + 0.5, 0.4)
    assert near(x, x)


@pytest.mark.parametrize("tolerance", [0, 1e-9, 1.0])
def test_nan_agrees_with_nothing_unless_nan_is_meant_and_infinities_have_to_be_the_same(tolerance: float) -> None:
    x = torch.tensor([1.0, NAN])
    assert not agree(x, x, tolerance)
    assert agree(x, x, tolerance, nan=True)
    assert not agree(x, torch.tensor([NAN, 1.0]), tolerance, nan=True)
    assert agree(torch.tensor([INF, -INF]), torch.tensor([INF, -INF]), tolerance)
    assert not agree(torch.tensor([INF]), torch.tensor([-INF]), tolerance)
    assert not agree(torch.tensor([INF]), torch.tensor([1.0]), tolerance)


def test_another_shape_and_what_is_no_tensor_do_not_agree() -> None:
    assert not agree(torch.ones(2, 1), torch.ones(2))
    assert not agree([1.0], torch.ones(1))
    assert agree(torch.ones(0, 3), torch.ones(0, 3))


def test_near_is_relative_to_the_largest_number() -> None:
    want = torch.tensor([1000.0, 0.0])
    assert near(want + 0.9, want)
    assert not near(want + 1.1, want)


def test_drawn_numbers_are_the_same_every_time_in_every_dtype() -> None:
    assert torch.equal(draw(2, 3), draw(2, 3))
    assert torch.equal(draw(2, 3, dtype=torch.bfloat16), draw(2, 3).bfloat16())
    assert not torch.equal(draw(2, 3), draw(2, 3, seed=1))


def test_bytes_made_counts_what_functions_make_inside_and_views_not_at_all() -> None:
    x = torch.zeros(10, 10)
    assert bytes_made(lambda: x[2:].T) == 0
    assert bytes_made(lambda: x + 1) == x.nbytes
    assert bytes_made(lambda: torch.nn.functional.softmax(x.T @ x, dim=-1)) >= 2 * x.nbytes
