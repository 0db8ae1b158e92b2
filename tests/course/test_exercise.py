"""What an exercise's tools say to code of every bad kind: it raises, returns nothing, changes its arguments ..."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit.course.examine import examine
from labkit.course.exercise import unchanged
from tests.course.exercises import Count, Counter, Double


def raises(x):
    return x @ torch.zeros(7, 7)


def returns_none(x):
    x * 2


def changes_argument(x):
    return x.mul_(2)


def changes_shape_of_argument(x):
    x.resize_(1)
    return torch.zeros(2, 2)


WRONG = {
    "raised": raises,
    "returned-none": returns_none,
    "arguments-changed": changes_argument,
    "not-a-tensor": lambda x: [2.0, 4.0],
    "shape": lambda x: (x * 2).sum(0),
    "dtype": lambda x: (x * 2).double(),
    "not-finite": lambda x: x * 2 + torch.tensor([[float("nan"), 0], [0, 0]]),
    "factor": lambda x: x * 3,
    "offset": lambda x: x * 2 + 1,
    "values": lambda x: x * x,
    "signature": lambda: None,
}


@pytest.mark.parametrize("diagnosis", WRONG)
def test_general_mistakes_are_told_apart(diagnosis: str) -> None:
    verdict = examine(Double(), WRONG[diagnosis])
    assert verdict.status == "not yet"
    assert verdict.finding is not None
    assert verdict.finding.diagnosis == diagnosis
    assert all((verdict.finding.seen, verdict.finding.cause, verdict.finding.look))


def test_an_argument_that_lost_its_shape_is_a_finding_too() -> None:
    assert examine(Double(), changes_shape_of_argument).finding.diagnosis == "arguments-changed"


def test_a_changed_list_is_seen_as_a_changed_tensor_is() -> None:
    class Last(Double):
        reference = staticmethod(lambda items: items[-1])

        def examine(self, answer) -> None:
            self.call(answer, [1, 2, 3])

    assert examine(Last(), lambda items: items.pop()).finding.diagnosis == "arguments-changed"
    assert examine(Last(), lambda items: items[-1]).status == "pass"


def nested(numbers) -> st.SearchStrategy:
    """Tensors and numbers in lists, tuples and dicts, NaN and infinity among them."""
    tensors = st.lists(numbers, max_size=4).map(torch.tensor)
    return st.recursive(
        tensors | numbers | st.integers() | st.text(max_size=2) | st.none(),
        lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
        max_leaves=6,
    )


@given(nested(st.floats(width=32)))
def test_a_copy_of_anything_is_unchanged_and_nan_is_no_change(value) -> None:
    assert unchanged(copy.deepcopy(value), value)


@given(st.lists(st.floats(width=32), min_size=1, max_size=4), st.data())
def test_one_changed_number_is_a_change_and_so_is_nan_that_was_none(numbers: list[float], data) -> None:
    place = data.draw(st.integers(0, len(numbers) - 1))
    before = torch.tensor(numbers)
    after = before.clone()
    after[place] = 1.0 if numbers[place] != numbers[place] else float("nan")
    assert not unchanged({"x": [before]}, {"x": [after]})
    assert not unchanged((numbers[place],), (after[place].item(),))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(2), [0.0, 0.0]),
        (float("nan"), 1.0),
        ([1], [1, 2]),
        ({"a": 1}, {"b": 1}),
    ],
)
def test_another_shape_dtype_kind_or_length_is_a_change(before, after) -> None:
    assert not unchanged(before, after)


def test_an_answer_given_nan_that_leaves_it_alone_changes_nothing() -> None:
    class Kept(Double):
        reference = staticmethod(lambda x: x * 2)

        def examine(self, answer) -> None:
            self.call(answer, torch.tensor([float("nan"), 1.0]))

    assert examine(Kept(), lambda x: x * 2).status == "pass"
    assert examine(Kept(), lambda x: x.mul_(2)).finding.diagnosis == "arguments-changed"


def test_an_error_inside_a_method_is_a_finding() -> None:
    class Broken(Counter):
        def add(self):
            return 1 / 0

    assert "division by zero" in examine(Count(), Broken).finding.seen


def test_a_name_that_is_a_size_in_the_docstring_is_told_apart_from_one_of_an_earlier_cell() -> None:
    def flat(x):
        """x: [batch, tokens]. Returns [batch * tokens]. Nothing of an earlier cell."""
        return x.flatten()

    class Flat(Double):
        reference = staticmethod(flat)

    size = examine(Flat(), lambda x: x.view(batch * tokens)).finding  # noqa: F821
    other = examine(Flat(), lambda x: earlier(x)).finding  # noqa: F821
    assert size is not None
    assert other is not None
    assert "names a size" in size.cause
    assert "`batch`" in size.look
    assert other.look == "run the cell that makes `earlier` first, then this one"
