"""Caches that learners wrote: what they hold is found wherever it is kept."""

from __future__ import annotations

from collections import deque

import pytest
import torch

from labkit.course.checks.caches import bytes_behind, check_isolation, check_methods, read_pair, tensors
from labkit.course.exercise import NotYet
from tests.course.exercises import Double


class Slots:
    __slots__ = ("kept",)


class OnTheClass:
    kept = torch.ones(3)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], lambda x: {"a": (x,)}, lambda x: deque([x])])
def test_tensors_are_found_in_attributes_lists_dicts_and_deques_with_slots_too(wrap) -> None:
    x = torch.ones(3)
    for holder in (Slots(), type("Plain", (), {})()):
        holder.kept = wrap(x)
        assert [held is x for held in tensors(holder)] == [True]
    assert tensors(OnTheClass()) == [OnTheClass.kept]


def test_a_slice_keeps_the_memory_it_was_cut_from_and_two_slices_keep_it_once() -> None:
    x = torch.zeros(100)
    assert bytes_behind([x[:1], x[5:]]) == 400
    assert bytes_behind([x[:1].clone()]) == 4


def test_memory_shared_by_two_caches_is_said() -> None:
    one, other = OnTheClass(), OnTheClass()
    with pytest.raises(NotYet) as caught:
        check_isolation(Double, one, other)
    assert caught.value.finding.diagnosis == "shared-between-caches"


def test_a_cache_without_its_methods_and_a_read_that_gives_no_pair_are_said() -> None:
    with pytest.raises(NotYet, match="no method append and no method read"):
        check_methods(Double, Slots())
    for both in (None, torch.ones(2), (torch.ones(2), 1)):
        cache = type("Read", (), {"read": lambda self, both=both: both})()
        with pytest.raises(NotYet) as caught:
            read_pair(Double, cache)
        assert caught.value.finding.diagnosis == "not-a-pair"
