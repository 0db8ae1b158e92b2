"""Common wrong answers, from `data/wrong_answers.json`, which `make docs` writes with the kill table."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache

from labkit.specs import DATA

FILE = DATA / "wrong_answers.json"


@dataclass(frozen=True)
class Mistake:
    """A mistake that the tests make on purpose. tried: answers that make it; caught: those that the check refuses by
    its name. examples: the first of them in words; reads: what a learner reads."""

    exercise: str
    diagnosis: str
    tried: int
    caught: int
    examples: tuple[str, ...]
    reads: str


@dataclass(frozen=True)
class Meeting:
    """The newest meeting of a lab's checks with answers that they had not seen, counted once."""

    date: str
    wrong: int
    refused: int
    fitting: int
    right: int
    accepted: int


@cache
def known() -> dict[str, tuple[Mistake, ...]]:
    """Every exercise's mistakes by its id, those with most answers first."""
    found: dict[str, tuple[Mistake, ...]] = {}
    for exercise, mistakes in json.loads(FILE.read_text(encoding="utf-8"))["mistakes"].items():
        found[exercise] = tuple(
            Mistake(exercise, **{**mistake, "examples": tuple(mistake["examples"])}) for mistake in mistakes
        )
    return found


@cache
def meetings() -> dict[str, Meeting]:
    """The newest meeting of each lab that has had one."""
    found = json.loads(FILE.read_text(encoding="utf-8"))["meetings"]
    return {lab: Meeting(**counts) for lab, counts in found.items()}
