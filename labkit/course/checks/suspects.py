"""Suspects: what people write in place of the right thing, what each comes to, and what to say when that came back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from labkit.course.checks.tensors import TIGHT, agree
from labkit.course.exercise import Exercise


@dataclass(frozen=True, eq=False)
class Suspect:
    """One mistake. `gives` is what it comes to, or a list or tuple of what its variants come to: values, formulas, or
    whether it is this one. seen: what only this mistake shows, where the check has no sentence for all of them.
    """

    diagnosis: str
    gives: Any
    cause: str
    look: str
    seen: str = ""

    @property
    def variants(self) -> list[Any]:
        """What it comes to, one way or several."""
        return list(self.gives) if isinstance(self.gives, (list, tuple)) else [self.gives]


def accuse(
    exercise: type[Exercise], suspects: Iterable[Suspect], seen: str = "", *, fits: Callable[[Any], bool] = bool
) -> None:
    """Fail with the first suspect one of whose variants `fits`; return when none does.

    A suspect is named because what it gives was computed and is what came back, never because it is the last one left.
    """
    for suspect in suspects:
        if any(map(fits, suspect.variants)):
            exercise.fail(suspect.diagnosis, seen=suspect.seen or seen, cause=suspect.cause, look=suspect.look)


def recognise(
    exercise: type[Exercise], got: Any, suspects: Iterable[Suspect], seen: str = "", *, tolerance: float = TIGHT
) -> None:
    """Fail with the first suspect that gives the tensor `got`, NaN where it has NaN; return when none does."""
    accuse(exercise, suspects, seen, fits=lambda value: agree(got, value, tolerance, nan=True))
