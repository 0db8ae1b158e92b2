"""What a finding of lab 02 says besides its diagnosis."""

from __future__ import annotations

from labkit.course.examine import examine
from labkit.labs.lab02.preallocated import Preallocated
from labkit.labs.lab02.references import PreallocatedCache, reusable_prefix
from labkit.labs.lab02.reuse import ReusablePrefix
from tests.labs.lab02.later_answers import FirstIsFree


def test_a_count_of_equal_tokens_has_no_unit_and_no_factor() -> None:
    finding = examine(ReusablePrefix(), lambda held, wanted: 2 * reusable_prefix(held, wanted)).finding
    assert "times" not in finding.seen
    assert finding.cause.startswith("the rule is another one")
    assert finding.look == "this case by hand, one step at a time"


def test_a_first_append_of_any_size_is_not_taken_for_a_test_of_what_is_held() -> None:
    cause = examine(Preallocated(), FirstIsFree).finding.cause
    assert cause == "the first append is taken whatever its size: only later ones are compared with the capacity"


class OnlyFirstIsTested(PreallocatedCache):
    def append(self, k, v):
        if self.seq_len and self.seq_len + k.shape[2] > self.capacity:
            self.seq_len = self.capacity
        else:
            super().append(k, v)


def test_a_test_of_the_first_append_alone_is_told_from_one_of_what_comes() -> None:
    cause = examine(Preallocated(), OnlyFirstIsTested).finding.cause
    assert cause == "only the first append is compared with the capacity; later ones are not"
