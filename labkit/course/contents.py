"""What a lab holds: its exercises, the guesses it asks for, its questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from labkit.course.exercise import Exercise


class Mistyped(ValueError):
    """An id, a guess or a letter that a lab cannot use. A notebook shows the one line that says what to do."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


@dataclass(frozen=True)
class Prediction:
    """A number asked for before it is shown. `within` is the ratio that counts as close."""

    id: str
    question: str
    unit: str = ""
    within: float = 1.25


@dataclass(frozen=True)
class Quiz:
    """A question, its options, and what to say to each. `right` is the letter of the right one."""

    id: str
    question: str
    options: Mapping[str, str]
    answers: Mapping[str, str]
    right: str


@dataclass(frozen=True)
class LabContents:
    """Everything a lab session can be asked for, by id."""

    number: str
    title: str
    exercises: tuple[Exercise, ...]
    predictions: tuple[Prediction, ...] = ()
    quizzes: tuple[Quiz, ...] = ()
