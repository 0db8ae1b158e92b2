"""What a finding of lab 05 says besides its diagnosis."""

from __future__ import annotations

import pytest

from labkit.course.examine import examine
from labkit.labs.lab05.one_pass import MeanSurprise
from labkit.labs.lab05.quantizing import Quantize
from tests.labs.lab05.later_answers import infinite_scale, one_skipped, second_part_short, surprise_by


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        (second_part_short, "part 1 of 6, from 0, has 16 tokens; 32 it should be"),
        (one_skipped, "the first token that is not the next one is number 0 of part 2"),
    ],
)
def test_a_wrong_part_or_token_is_named_by_its_place(cut, said) -> None:
    assert said in examine(MeanSurprise(), surprise_by(cut)).finding.seen


def test_an_infinite_scale_is_not_taken_for_a_division_of_0() -> None:
    assert examine(Quantize(), infinite_scale).finding.cause.startswith("its scale is infinite")
