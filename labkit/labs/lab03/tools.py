"""How the checks of lab 03 find out which formula an answer is."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from labkit.course.exercise import Exercise
from labkit.specs import ModelSpec

CLOSE = 1e-9  # relative; a sum of a few float64 products differs by less than 1e-15 between orders
Case = tuple[Any, ...]

SCALES = tuple(
    factor for unit in (1e3, 1e6, 1e9, 2.0**10, 2.0**20, 2.0**30, 100.0) for factor in (unit, 1 / unit)
)  # fmt: skip


@dataclass(frozen=True)
class Suspect:
    """A formula that people write instead of the right one, and what to say about it."""

    diagnosis: str
    formula: Callable[..., float]
    cause: str
    look: str


def judge(
    exercise: type[Exercise],
    answer: Callable,
    want: Callable[..., float],
    cases: Sequence[Case],
    suspects: Sequence[Suspect],
    *,
    what: str,
    whole: bool = False,
) -> None:
    """Pass when `answer` gives what `want` gives in every case; else name the suspect that it agrees with throughout.

    whole: the result is a count, so an int must come back. what: the result in words, with its unit.
    """
    got = [number(exercise, exercise.call(answer, *case), what) for case in cases]
    wanted = [want(*case) for case in cases]
    wrong = [index for index, pair in enumerate(zip(got, wanted, strict=True)) if not close(*pair)]
    if not wrong:
        check_whole(exercise, got, whole)
        return
    first = wrong[0]
    seen = f"{shown(want, cases[first])}: {figure(got[first])} came back; {what} is {figure(wanted[first])}"
    for suspect in suspects:
        if agrees(suspect.formula, cases, got):
            exercise.fail(suspect.diagnosis, seen=seen, cause=suspect.cause, look=suspect.look)
    explain_ratio(exercise, got, wanted, seen)
    explain_ignored(exercise, want, cases, got, wanted, seen)
    exercise.fail(
        "values",
        seen=seen,
        cause=f"the formula is another one: {len(cases) - len(wrong)} of {len(cases)} cases came out right",
        look="this case by hand, one factor at a time",
    )


def number(exercise: type[Exercise], got: Any, what: str) -> float:
    """`got`, when it is one number."""
    if isinstance(got, bool) or not isinstance(got, numbers.Real):
        exercise.fail(
            "not-a-number",
            seen=f"a {type(got).__name__} came back",
            cause=f"something other than {what} was returned",
            look="the return: one number, no tensor, no tuple, no text",
        )
    return got


def check_whole(exercise: type[Exercise], got: Sequence[float], whole: bool) -> None:
    """Fail when counts came back as floats."""
    if whole and not all(isinstance(value, numbers.Integral) for value in got):
        exercise.fail(
            "not-whole",
            seen=f"{got[0]!r} came back: the right number, as a float",
            cause="a division with `/`, a factor written as a float, or `//` between floats, which gives a float",
            look="the operators, and the type in the first line of the blank: a count is an int",
        )


def explain_ratio(exercise: type[Exercise], got: Sequence[float], want: Sequence[float], seen: str) -> None:
    """Every result is off by one and the same power of ten, of 1,024, or by 8."""
    pairs = [(a, b) for a, b in zip(got, want, strict=True) if b]
    if any(close(b, 0) for _, b in pairs):
        return
    if all(close(a, 8 * b) for a, b in pairs):
        exercise.fail(
            "bits", seen=seen, cause="bits were counted", look="the size of one number: bytes, eight bits each"
        )
    for scale in SCALES:
        if all(close(a, scale * b) for a, b in pairs):
            exercise.fail(
                "units",
                seen=seen,
                cause=f"every result is {figure(max(scale, 1 / scale))} times too {'large' if scale > 1 else 'small'}: "
                f"it is in another unit",
                look="the unit in the first line of the blank",
            )


def explain_ignored(
    exercise: type[Exercise],
    want: Callable,
    cases: Sequence[Case],
    got: Sequence[float],
    wanted: Sequence[float],
    seen: str,
) -> None:
    """The result does not depend on a parameter that it should depend on."""
    for place, name in enumerate(inspect.signature(want).parameters):
        pairs = [
            (i, j)
            for i in range(len(cases))
            for j in range(i)
            if [k for k in range(len(cases[i])) if cases[i][k] is not cases[j][k] and cases[i][k] != cases[j][k]]
            == [place]
            and not close(wanted[i], wanted[j])
        ]
        if pairs and all(close(got[i], got[j]) for i, j in pairs):
            exercise.fail(
                "ignored",
                seen=f"the result is the same whatever `{name}` is. {seen}",
                cause=f"`{name}` does not occur in the formula, or a number stands where it belongs",
                look=f"`{name}`: what does it stand for, and what does it multiply?",
            )


def agrees(formula: Callable[..., float], cases: Sequence[Case], got: Sequence[float]) -> bool:
    """Whether `formula` gives what came back, in every case."""
    try:
        return all(close(formula(*case), value) for case, value in zip(cases, got, strict=True))
    except (ArithmeticError, ValueError):
        return False


def close(a: float, b: float) -> bool:
    """Equal, but for rounding."""
    return abs(a - b) <= CLOSE * max(abs(a), abs(b))


def figure(value: float) -> str:
    """A number as a person reads it."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def shown(function: Callable, case: Case) -> str:
    """A call in words: what each parameter was, a spec by its name."""
    names = inspect.signature(function).parameters
    said = [
        f"{name} {value.name!r}" if isinstance(value, ModelSpec) else f"{name} {value:,}"
        for name, value in zip(names, case, strict=True)
    ]
    return "with " + ", ".join(said)
