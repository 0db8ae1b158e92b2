"""What lab 01's checks call wrong is wrong in some call of theirs, and no two mistakes of different names coincide."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

from labkit.course.checks.trials import Case, fits
from labkit.labs.lab01 import CONTENTS

EXERCISES = {exercise.id: exercise for exercise in CONTENTS.exercises}

# The same numbers by two names; the first is named. A triangle shifted by the new tokens hides none where none are held
# before; softmax without dim takes the third from the end where there are three or four.
SAME = {frozenset(("no-mask", "offset-is-new-tokens")), frozenset(("axis-from-the-front", "axis-heads"))}


def calls_and_suspects(exercise, monkeypatch):
    """The first `compare` of an exercise's check: its plain calls, its suspects, its reference."""
    caught = []
    module = importlib.import_module(type(exercise).__module__)

    def catch(kind, answer, reference, cases, *, suspects=None, **options):
        if suspects:
            caught.append(([case if isinstance(case, Case) else Case(case) for case in cases], suspects, reference))

    monkeypatch.setattr(module, "compare", catch)
    exercise.examine(exercise.reference)
    return caught[0]


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)
@torch.no_grad()
def test_suspects_differ_from_what_is_right_and_from_each_other(exercise, monkeypatch) -> None:
    cases, suspects, reference = calls_and_suspects(exercise, monkeypatch)
    right = [reference(*case.args) for case in cases]
    wrong: dict[tuple[str, int, int], dict] = {}
    for number, case in enumerate(cases):
        for place, suspect in enumerate(suspects(*case.args)):
            for variant, gives in enumerate(suspect.variants):
                value = gives() if callable(gives) else gives
                if value is not None:
                    wrong.setdefault((suspect.diagnosis, place, variant), {})[number] = value
    # some turns of any attention are right ones here; they are never named
    wrong = {key: a for key, a in wrong.items() if not all(fits(right[number], value) for number, value in a.items())}
    coincide = set()
    for (one, a), (other, b) in itertools.combinations(wrong.items(), 2):
        if one[0] != other[0] and (both := a.keys() & b.keys()) and all(fits(a[n], b[n]) for n in both):
            coincide.add(frozenset((one[0], other[0])))
    assert coincide <= SAME, coincide - SAME
