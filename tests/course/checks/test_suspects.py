"""A suspect is named because what it gives came back, and in the order of the list."""

from __future__ import annotations

import pytest
import torch

from labkit.course.checks.suspects import Suspect, accuse, recognise
from labkit.course.exercise import NotYet
from tests.course.exercises import Double

SUSPECTS = [
    Suspect("halved", [2, 3], "a half was taken", "the factor"),
    Suspect("thirded", 3, "a third was taken", "the factor", seen="a third"),
    Suspect("nothing", [], "cannot be", "nowhere"),
]


def accused(value) -> tuple[str, str]:
    with pytest.raises(NotYet) as caught:
        accuse(Double, SUSPECTS, "another number", fits=lambda given: given == value)
    return caught.value.finding.diagnosis, caught.value.finding.seen


def test_the_first_whose_variant_fits_is_named_and_says_what_only_it_shows() -> None:
    assert accused(2) == accused(3) == ("halved", "another number")
    accuse(Double, SUSPECTS[1:], "another number", fits=lambda given: given == 7)
    with pytest.raises(NotYet) as caught:
        accuse(Double, SUSPECTS[1:], "another number", fits=lambda given: given == 3)
    assert caught.value.finding.seen == "a third"


def test_a_suspect_comes_to_what_it_gives_one_way_or_several() -> None:
    assert [suspect.variants for suspect in SUSPECTS] == [[2, 3], [3], []]
    assert Suspect("a", (1, 2), "c", "l").variants == [1, 2]


def test_none_is_named_where_none_fits() -> None:
    accuse(Double, SUSPECTS, "another number", fits=lambda given: False)


def test_a_suspect_may_say_itself_whether_it_is_this_one() -> None:
    with pytest.raises(NotYet):
        accuse(Double, [Suspect("it", True, "c", "l")], "seen")
    accuse(Double, [Suspect("it", False, "c", "l")], "seen")


def test_a_tensor_is_recognised_by_its_values_nan_included_and_not_by_another_shape() -> None:
    slip = Suspect("slip", torch.tensor([1.0, float("nan")]), "c", "l")
    with pytest.raises(NotYet):
        recognise(Double, torch.tensor([1.0, float("nan")]), [slip], "seen")
    for other in (torch.tensor([1.0, 2.0]), torch.tensor([[1.0, float("nan")]]), None, 1.0):
        recognise(Double, other, [slip], "seen")
