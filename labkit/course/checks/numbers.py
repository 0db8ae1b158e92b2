"""Numbers: whether an answer is one, whether it is whole, and which formula it is."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Sequence
from math import isclose
from typing import Any

from labkit.course.checks.quantities import explain_product, explain_term
from labkit.course.checks.suspects import Suspect, accuse
from labkit.course.checks.tensors import told_apart
from labkit.course.exercise import Exercise
from labkit.specs import ModelSpec

CLOSE = 1e-9  # relative; a sum of a few float64 products differs by less than 1e-15 between orders
SCALES = tuple(
    factor for unit in (1e3, 1e6, 1e9, 2.0**10, 2.0**20, 2.0**30, 100.0) for factor in (unit, 1 / unit)
)  # fmt: skip
Case = tuple[Any, ...]


def check_number(exercise: type[Exercise], got: Any, what: str) -> float:
    """`got`, when it is one real number; a finding otherwise. what: the result in words."""
    if isinstance(got, bool) or not isinstance(got, numbers.Real):
        exercise.fail(
            "not-a-number",
            seen=f"{'nothing' if got is None else f'a {type(got).__name__}'} came back",
            cause=f"something other than {what} was returned",
            look="the return: one number, no tensor, no tuple, no text",
        )
    return got


def check_whole(exercise: type[Exercise], got: Any, what: str) -> int:
    """`got`, when it is a whole number, not a float; a finding otherwise. what: the result in words."""
    value = check_number(exercise, got, what)
    if not isinstance(value, numbers.Integral):
        exercise.fail(
            "not-whole",
            seen=f"{value!r} came back: {'whole, but a float' if value == value // 1 else 'not a whole number'}",
            cause="a division with `/`, a factor written as a float, or `//` between floats, which gives a float",
            look="the operators: // divides whole numbers and gives one; a count is an int",
        )
    return int(value)


def equal(a: float, b: float) -> bool:
    """Equal, but for rounding; nothing is close to infinity but itself, and NaN equals nothing."""
    try:
        return a == b or isclose(a, b, rel_tol=CLOSE, abs_tol=0.0)
    except OverflowError:  # a whole number that no float can hold
        return False


def judge(
    exercise: type[Exercise],
    answer: Callable,
    want: Callable[..., float],
    cases: Sequence[Case],
    suspects: Sequence[Suspect],
    *,
    what: str,
    whole: bool = False,
    otherwise: str = "values",
    show: Callable[..., str] | None = None,
) -> None:
    """Pass when `answer` gives what `want` gives in every case; else name the suspect that it agrees with throughout.

    suspects: each `gives` a formula of the case, or several. what: the result in words, with its unit. whole: the
    result is a count, so an int must come back. otherwise: the diagnosis where no suspect agrees. show: a case in
    words, where its parameters one by one would tell less.
    """
    got = [check_number(exercise, exercise.call(answer, *case), what) for case in cases]
    wanted = [want(*case) for case in cases]
    wrong = [index for index, pair in enumerate(zip(got, wanted, strict=True)) if not equal(*pair)]
    if not wrong:
        if whole:
            for value in got:
                check_whole(exercise, value, what)
        return
    first = wrong[0]
    case = show(*cases[first]) if show else shown(want, cases[first])
    seen = f"{case}: {figure(got[first], wanted[first])} came back; {what} is {figure(wanted[first], got[first])}"
    accuse(exercise, suspects, seen, fits=lambda formula: agrees(formula, cases, got))
    counted = all(isinstance(value, list) for case in cases for value in case)  # lists alone have no unit, no factor
    if not counted:
        explain_ratio(exercise, got, wanted, seen)
    explain_ignored(exercise, answer, want, cases, got, wanted, seen)
    if not counted:
        explain_quantities(exercise, want, cases, got, wanted, seen)
    exercise.fail(
        otherwise,
        seen=seen,
        cause=f"the {'rule' if counted else 'formula'} is another one: "
        f"{len(cases) - len(wrong)} of {len(cases)} cases came out right",
        look="this case by hand, one step at a time" if counted else "this case by hand, one factor at a time",
    )


def explain_ratio(exercise: type[Exercise], got: Sequence[float], want: Sequence[float], seen: str) -> None:
    """Every result is off by one and the same power of ten, of 1,024, or by 8."""
    pairs = [(a, b) for a, b in zip(got, want, strict=True) if b]
    if not pairs or any(equal(b, 0) for _, b in pairs):
        return
    if all(equal(a, 8 * b) for a, b in pairs):
        exercise.fail(
            "bits", seen=seen, cause="bits were counted", look="the size of one number: bytes, eight bits each"
        )
    for scale in SCALES:
        if all(equal(a, scale * b) for a, b in pairs):
            exercise.fail(
                "units",
                seen=seen,
                cause=f"every result is {round(max(scale, 1 / scale)):,} times too "
                f"{'large' if scale > 1 else 'small'}: it is in another unit",
                look="the unit in the first line of the blank",
            )


def explain_ignored(
    exercise: type[Exercise],
    answer: Callable,
    want: Callable,
    cases: Sequence[Case],
    got: Sequence[float],
    wanted: Sequence[float],
    seen: str,
) -> None:
    """The result does not depend on a parameter that it should depend on.

    Not where rounding could hide it: a right result must change by more than a tenth, and by more than 1, between the
    cases that differ in this parameter alone. And not where it only decides now and then: the answer is called again,
    in every case, with this parameter three times and ten times as large and a tenth as large.
    """
    for place, name in enumerate(inspect.signature(want).parameters):
        pairs = [
            (i, j)
            for i in range(len(cases))
            for j in range(i)
            if [k for k in range(len(cases[i])) if cases[i][k] is not cases[j][k] and cases[i][k] != cases[j][k]]
            == [place]
            and differ_clearly(wanted[i], wanted[j])
        ]
        same = pairs and all(equal(got[i], got[j]) for i, j in pairs) and any(got)
        if same and not any(matters(answer, case, place, result) for case, result in zip(cases, got, strict=True)):
            exercise.fail(
                "ignored",
                seen=f"the result is the same whatever `{name}` is; {seen}",
                cause=f"`{name}` does not occur in the formula, it cancels, or a number stands where it belongs",
                look=f"`{name}`: what does it stand for, and what does it multiply?",
            )


def matters(answer: Callable, case: Case, place: int, result: float) -> bool:
    """Whether the answer gives anything but `result` when one number of the case is larger or smaller, or
    a list is shorter or in another order."""
    value = case[place]
    if isinstance(value, list):
        return any(gives_another(answer, case, place, other, result) for other in (value[:0], value[1:], value[::-1]))
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    whole = isinstance(value, numbers.Integral)
    others = (3 * value, 10 * value, value // 10 or 1 if whole else value / 10)
    return any(gives_another(answer, case, place, other, result) for other in others)


def gives_another(answer: Callable, case: Case, place: int, other: Any, result: float) -> bool:
    """Whether the answer gives anything but `result` with another argument at one place."""
    try:
        return not equal(answer(*case[:place], other, *case[place + 1 :]), result)
    except Exception:  # it does something with it
        return True


def differ_clearly(a: float, b: float) -> bool:
    """Whether two results are apart by more than any rounding to whole numbers would hide."""
    return not equal(a, b) and abs(a - b) > 0.1 * max(abs(a), abs(b)) and (abs(a - b) > 1 or max(abs(a), abs(b)) < 1)


def explain_quantities(
    exercise: type[Exercise],
    want: Callable,
    cases: Sequence[Case],
    got: Sequence[float],
    wanted: Sequence[float],
    seen: str,
) -> None:
    """Every result is off by the same factor, or by a product of the quantities that went in."""
    for diagnosis, explain in (("factor", explain_product), ("term", explain_term)):
        if found := explain(want, cases, got, wanted):
            exercise.fail(
                diagnosis,
                seen=f"{found.words}; {seen}",
                cause=found.cause,
                look="the units: what does each factor count, and per what?",
            )


def agrees(formula: Callable[..., float], cases: Sequence[Case], got: Sequence[float]) -> bool:
    """Whether `formula` gives what came back, in every case."""
    try:
        return all(equal(formula(*case), value) for case, value in zip(cases, got, strict=True))
    except (ArithmeticError, ValueError):
        return False


def figure(value: float, other: float | None = None) -> str:
    """A number as a person reads it, in digits enough to tell it from `other`."""
    if isinstance(value, numbers.Integral) or (abs(value) < 1e15 and float(value).is_integer()):
        return f"{int(value):,}"
    short = f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    return told_apart(value, float(other))[0] if other is not None and short == figure(other) else short


def shown(function: Callable, case: Case) -> str:
    """A call in words: what each parameter was, a spec by its name."""
    names = inspect.signature(function).parameters
    said = [
        f"{name} {value.name!r} ({sizes(value)})" if isinstance(value, ModelSpec) else f"{name} {value:,}"
        for name, value in zip(names, case, strict=True)
    ]
    return "with " + ", ".join(said)


def sizes(spec: ModelSpec) -> str:
    """The sizes of a model that a formula for bytes or operations may ask for."""
    return (
        f"{spec.num_layers} layers, {spec.num_heads} heads, {spec.num_kv_heads} KV heads of {spec.head_dim}, "
        f"hidden size {spec.hidden_size}"
    )
