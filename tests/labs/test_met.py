"""Answers that the checks met once as strangers: what is wrong is refused, what is right is accepted, ever since.

Those of the second meeting are in `met.py`, of the fourth and fifth in `met_fourth.py` and `met_fifth.py`; how they
fared when they first met stands in `first_meetings.json`.
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from importlib.util import find_spec

import pytest

from labkit.course.catalogue import numbers
from labkit.course.examine import examine
from tests.labs.kill_table import COUNTED, MEETINGS, gather

_, EXERCISES = gather()
NAMES = {2: "met", 4: "met_fourth", 5: "met_fifth"}  # by what `first_meetings.json` calls "checks"
MET = {
    checks: [
        importlib.import_module(f"tests.labs.lab{number}.{name}")
        for number in numbers()
        if find_spec(f"tests.labs.lab{number}.{name}")
    ]
    for checks, name in NAMES.items()
}
ALL = [met for meeting in MET.values() for met in meeting]
WRONG = [(id, mistake, answer) for met in ALL for id, mistake, _, answer in met.WRONG]
RIGHT = [(id, style, answer) for met in ALL for id, style, answer in met.RIGHT]


@pytest.mark.parametrize(("id", "mistake", "answer"), WRONG, ids=[f"{id}-{i}" for i, (id, *_) in enumerate(WRONG)])
def test_a_wrong_answer_is_refused(id: str, mistake: str, answer) -> None:
    assert examine(EXERCISES[id], answer).status == "not yet", mistake


@pytest.mark.parametrize(("id", "style", "answer"), RIGHT, ids=[f"{id}-{i}" for i, (id, *_) in enumerate(RIGHT)])
def test_a_right_answer_is_accepted(id: str, style: str, answer) -> None:
    verdict = examine(EXERCISES[id], answer)
    assert verdict.status == "pass", (style, verdict.finding)


@pytest.mark.parametrize("checks", MET)
def test_the_published_counts_are_of_these_answers(checks: int) -> None:
    counts = [count for count in json.loads(MEETINGS.read_text(encoding="utf-8")) if count["checks"] == checks]
    alone = {count["lab"] for count in counts}  # a check that was made later met its strangers alone: "03.8"
    for kind, listed in (("wrong", "WRONG"), ("right", "RIGHT")):
        there = Counter(id if id in alone else id[:2] for met in MET[checks] for id, *_ in getattr(met, listed))
        assert {count["lab"]: count[kind] for count in counts} == dict(there)


def newest() -> Counter[str]:
    """The sums of the newest meeting."""
    counts = json.loads(MEETINGS.read_text(encoding="utf-8"))
    total: Counter[str] = Counter()
    for count in counts:
        if count["checks"] == max(count["checks"] for count in counts):
            total.update({key: count[key] for key in COUNTED})
    return total


def test_the_published_counts_meet_the_courses_bars() -> None:
    """Of the newest meeting: 95% of wrong answers refused, half with a fitting message, under 3% with a misleading one;
    98% of right ones accepted."""
    total = newest()
    assert total["refused"] >= 0.95 * total["wrong"]
    assert total["fitting"] >= 0.5 * total["wrong"]
    assert total["misleading"] < 0.03 * total["wrong"]
    assert total["accepted"] >= 0.98 * total["right"]


def test_the_readme_says_what_the_newest_meeting_gave() -> None:
    total = newest()
    said = " ".join((MEETINGS.parents[2] / "README.md").read_text(encoding="utf-8").split())
    assert f"of {total['wrong']} wrong ones they refused {total['refused']}" in said
    assert f"of {total['right']} right ones they accepted {total['accepted']}" in said
