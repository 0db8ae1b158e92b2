"""Answers that are several numbers: each of them is judged like one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from labkit.course.exercise import Exercise


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
