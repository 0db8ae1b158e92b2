"""Numbers that an answer gives: whether they are whole, and which known mistake gives the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from labkit.course.exercise import Exercise


def check_whole(exercise: type[Exercise], got: Any, what: str) -> int:
    """`got`, when it is a whole number of Python's; a finding otherwise."""
    if isinstance(got, float) and got.is_integer():
        exercise.fail(
            "not-whole",
            seen=f"{got!r} came back: a float",
            cause="a division with `/`, or a factor written as a float, such as 2.0",
            look="the operators: // divides whole numbers and gives one",
        )
    if isinstance(got, bool) or not isinstance(got, int):
        exercise.fail(
            "not-a-number",
            seen=f"{what}: {type(got).__name__} {str(got)[:40]} came back",
            cause="something other than a count was returned",
            look="the return: one int",
        )
    return got


def explain_number(
    exercise: type[Exercise], got: Sequence[int], known: Mapping[str, tuple[Sequence[int], str, str]], seen: str
) -> None:
    """Fail with the first of `known` (diagnosis: what it gives in every case, cause, where to look) that fits `got`."""
    for diagnosis, (values, cause, look) in known.items():
        if list(values) == list(got):
            exercise.fail(diagnosis, seen=seen, cause=cause, look=look)
