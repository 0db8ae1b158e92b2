"""What a finding of lab 02 says besides its diagnosis."""

from __future__ import annotations

from labkit.course.examine import examine
from labkit.labs.lab02.references import reusable_prefix
from labkit.labs.lab02.reuse import ReusablePrefix


def test_a_count_of_equal_tokens_has_no_unit_and_no_factor() -> None:
    finding = examine(ReusablePrefix(), lambda held, wanted: 2 * reusable_prefix(held, wanted)).finding
    assert "times" not in finding.seen
    assert finding.cause.startswith("the rule is another one")
    assert finding.look == "this case by hand, one step at a time"
