"""What a finding of lab 01 says besides its diagnosis."""

from __future__ import annotations

import pytest

from labkit.course.examine import examine
from labkit.labs.lab01 import CONTENTS
from tests.labs.lab01.later_answers import in_three_loops, last_three, mask_for_several

EXERCISES = {exercise.id: exercise for exercise in CONTENTS.exercises}


@pytest.mark.parametrize(
    ("exercise", "answer", "said"),
    [
        ("01.2", mask_for_several, "new_tokens 1, past 0; calls before this one returned something"),
        ("01.2", lambda new_tokens, past: None, "your function returned None, with new_tokens 3, past 2"),
        ("01.5", last_three, "as many as 3 rows have"),
        ("01.5", in_three_loops, "111,168 scores were computed, and 1,152 are needed"),
    ],
)
def test_a_finding_says_where_and_how_many(exercise, answer, said) -> None:
    finding = examine(EXERCISES[exercise], answer).finding
    assert finding.seen.endswith(said)
