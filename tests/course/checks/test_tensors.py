"""Closeness of tensors, said once: exact, within a tolerance, and what NaN and infinity are close to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit.course.checks.tensors import agree, bytes_made, draw, near, relation, shape_difference

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


@pytest.mark.parametrize(
    ("got", "want", "said"),
    [
        ((1, 1, 3, 5), (3, 5), "2 dimensions of length 1 too many"),
        ((15, 1), (15,), "1 dimension of length 1 too many"),
        ((3, 2, 5), (3, 5), "1 dimension too many: dimension 1, of length 2"),
        ((3, 5, 7), (15, 7), "1 dimension too many"),
        ((2, 4), (2, 1, 4), "1 dimension of length 1 missing"),
        ((2, 4), (2, 3, 4), "1 dimension missing: dimension 1, of length 3"),
        ((6, 4), (2, 3, 4), "dimensions 0 and 1 have become one"),
        ((5,), (2, 3, 4), "2 dimensions missing"),
        ((4, 3, 2), (2, 3, 4), "dimensions 0 and 2 have changed places"),
        ((3, 4, 2), (2, 3, 4), "the dimensions stand in another order"),
        ((2, 16, 4), (2, 7, 4), "dimension 1 is 16 long instead of 7"),
        ((1, 16, 4), (2, 7, 4), "dimension 0 is 1 long instead of 2, dimension 1 is 16 long instead of 7"),
    ],
)
def test_a_wrong_shape_is_told_by_what_makes_it_wrong(got, want, said) -> None:
    assert shape_difference(got, want)[0] == said


WANT = draw(3, 4, 5, 6, dtype=torch.float32)


@pytest.mark.parametrize(
    ("got", "diagnosis"),
    [
        (WANT.bfloat16().float(), "precision"),
        (WANT.half().float(), "precision"),
        (WANT[:1].expand_as(WANT), "one-for-all"),
        (WANT[:, -1:].expand_as(WANT), "one-for-all"),
        (WANT * 3, "factor"),
        (torch.cat((WANT[:1], WANT[1:].sin())), "right-in-the-first"),
        (torch.cat((WANT[:, :1], WANT[:, 1:].exp()), 1), "right-in-the-first"),
        (torch.cat((WANT[:, :, :1], WANT[:, :, 1:].exp()), 2), None),  # a first token is right under many a mask
        (torch.cat((WANT[:2], WANT[2:].sin())), None),
    ],
)
def test_what_turns_one_tensor_into_another_is_computed(got, diagnosis) -> None:
    found = relation(got, WANT, 1e-6)
    assert (found and found[0]) == diagnosis
