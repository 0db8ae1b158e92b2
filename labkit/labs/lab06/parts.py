"""Answers that are several numbers: each of them is judged like one, and named where a finding is about it alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from labkit.course.checks.numbers import judge
from labkit.course.checks.suspects import Suspect
from labkit.course.exercise import Exercise, NotYet


def part(exercise: type[Exercise], function: Callable, place: int, names: Sequence[str]) -> Callable:
    """`function` with one of the numbers that it returns; a finding when it returns another number of them."""

    def one(*args: Any) -> Any:
        result = function(*args)
        if result is not None and (not isinstance(result, (tuple, list)) or len(result) != len(names)):
            came = f"{len(result)} of them" if isinstance(result, (tuple, list)) else type(result).__name__
            exercise.fail(
                "not-a-tuple",
                seen=f"{came} came back; {len(names)} numbers are asked for: {', '.join(names)}",
                cause="a result is missing or was joined with another",
                look="the return: one value for each name, with commas between",
            )
        return None if result is None else result[place]

    one.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return one


def judge_parts(
    exercise: type[Exercise],
    answer: Callable,
    reference: Callable,
    cases: Sequence[tuple],
    suspects: Sequence[Sequence[Suspect]],
    names: Sequence[str],
    what: Callable[[str], str],
) -> None:
    """Pass when every number that `answer` returns is the reference's, a count. suspects: of each number. what: a
    number in words, made of its name."""
    for place, name in enumerate(names):
        own, right = (part(exercise, function, place, names) for function in (answer, reference))
        told = what(name)
        try:
            judge(exercise, own, right, cases, suspects[place], what=told, whole=True, show=shown(reference))
        except NotYet as not_yet:
            found = not_yet.finding
            if found.diagnosis != "ignored":
                raise
            exercise.fail(
                "ignored",
                seen=found.seen.replace("the result is", f"{told} is", 1),
                cause=found.cause.replace("the formula", "the formula of this one number", 1),
                look=found.look,
            )


def shown(function: Callable) -> Callable[..., str]:
    """How to put a call into words: each parameter and what it was, long lists by their ends."""
    names = list(inspect.signature(function).parameters)

    def words(*case: Any) -> str:
        return "with " + ", ".join(f"{name} {some(value)}" for name, value in zip(names, case, strict=True))

    return words


def some(value: Any) -> str:
    """A value, or the ends of a long list."""
    if isinstance(value, list) and len(value) > 8:
        return f"[{value[0]}, {value[1]}, ... {value[-1]}] ({len(value)} of them)"
    return f"{value:,}" if isinstance(value, int) else repr(value)
