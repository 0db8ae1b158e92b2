"""Numbers: whether an answer is one, whether it is whole, and which formula it is."""

from __future__ import annotations

import inspect
import numbers
import struct
from collections.abc import Callable, Sequence
from functools import partial
from math import isclose
from typing import Any

from labkit.course.checks.quantities import explain_product, explain_term
from labkit.course.checks.suspects import Suspect, accuse
from labkit.course.checks.tensors import told_apart
from labkit.course.exercise import Exercise, accept
from labkit.specs import ModelSpec

CLOSE = 1e-9  # relative; a sum of a few float64 products differs by less than 1e-15 between orders
SCALES = tuple(
    factor for unit in (1e3, 1e6, 1e9, 2.0**10, 2.0**20, 2.0**30, 100.0) for factor in (unit, 1 / unit)
)  # fmt: skip
TWICE = "a factor of 2 is missing, or one too many"
KEPT = "a part of it is set aside, which nobody asked for"
THOUSAND = "it is in another unit"
SHARES = (
    (1 / 8, "an eighth of", "bits were taken for bytes, or bytes for bits"),
    (8, "8 times", "bits were taken for bytes, or bytes for bits"),
    (0.5, "half of", TWICE),
    (2, "twice", TWICE),
    *((share, f"{share:.0%} of", KEPT) for share in (0.8, 0.85, 0.9, 0.95)),
    (1e-3, "a thousandth of", THOUSAND),
    (1e3, "1,000 times", THOUSAND),
)
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
    accept(len(cases) - len(wrong))
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
        explain_rounding(exercise, [(got[index], wanted[index]) for index in wrong], seen)
        explain_ratio(exercise, got, wanted, seen)
    explain_ignored(exercise, answer, want, cases, got, wanted, seen)
    if not counted:
        explain_quantities(exercise, want, cases, got, wanted, seen)
        explain_overflow(exercise, got, wanted, seen)
        explain_arguments(exercise, want, cases, got, seen)
    exercise.fail(
        otherwise,
        seen=seen,
        cause=f"the {'rule' if counted else 'formula'} is another one: "
        f"{len(cases) - len(wrong)} of {len(cases)} cases came out right",
        look="this case by hand, one step at a time" if counted else "this case by hand, one factor at a time",
    )


def explain_rounding(exercise: type[Exercise], pairs: Sequence[tuple[float, float]], seen: str) -> None:
    """Every result that is wrong is near the right one, which float32 does not hold, and is a number that it does."""
    if all(single(a) == a and single(b) != b and isclose(a, b, rel_tol=1e-6) for a, b in pairs):
        exercise.fail(
            "rounded",
            seen=seen,
            cause="the formula is right, and the result was rounded: float32 holds 24 bits of a number, 7 digits or so",
            look="where numbers become float32 tensors, or NumPy's: Python's own whole numbers lose no digit",
        )


def single(value: float) -> float:
    """The float32 number nearest to `value`; infinity beyond the largest."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except (OverflowError, struct.error):
        return float("inf")


def explain_ratio(exercise: type[Exercise], got: Sequence[float], want: Sequence[float], seen: str) -> None:
    """Every result is off by one and the same power of ten, of 1,024, or by 8."""
    pairs = [(a, b) for a, b in zip(got, want, strict=True) if b]
    if not pairs or any(equal(b, 0) for _, b in pairs):
        return

    def all_off_by(scale: float) -> bool:
        """Every result, or what is left of it when fractions are cut off."""
        if all(equal(a, scale * b) for a, b in pairs):
            return True
        by = round(1 / scale) if scale < 1 else 0
        if not by or not all(isinstance(x, numbers.Integral) for pair in pairs for x in pair):
            return False
        large = max(abs(a) for a, _ in pairs) >= 100  # so that rounding to whole numbers leaves something to compare
        return large and all(a in (b // by, -(-b // by), (b + by // 2) // by) for a, b in pairs)  # type: ignore[operator]

    for scale, cause in ((8, "bits were counted"), (1 / 8, "the result was divided by 8, as if bits had gone in")):
        if all_off_by(scale):
            exercise.fail("bits", seen=seen, cause=cause, look="the size of one number: bytes, eight bits each")
    for scale in SCALES:
        if all_off_by(scale):
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


def explain_overflow(exercise: type[Exercise], got: Sequence[float], wanted: Sequence[float], seen: str) -> None:
    """Every result is what is left of the right one in so many bits, and some right one needs more."""
    if not all(isinstance(x, numbers.Integral) for x in (*got, *wanted)):
        return
    for bits, signed in ((32, True), (32, False), (64, True), (16, True), (8, False)):
        least = -(2 ** (bits - 1)) if signed else 0
        if all((want - least) % 2**bits + least == value for value, want in zip(got, wanted, strict=True)):
            exercise.fail(
                "overflow",
                seen=seen,
                cause=f"the result does not fit into {bits} bits, and wrapped round",
                look="where numbers become int32 tensors or NumPy's; Python's own have no largest",
            )


def explain_arguments(
    exercise: type[Exercise], want: Callable, cases: Sequence[Case], got: Sequence[float], seen: str
) -> None:
    """Every result is what is right for another value of one argument: one more or less, a share or a multiple of it,
    its share of another one, the other one's value, or one number throughout."""
    if len(set(got)) < 3:  # what is the same in nearly every case fits many an argument
        return
    names = list(inspect.signature(want).parameters)

    def name(words: str, cause: str, look: str, change: Callable[[Case], Case]) -> None:
        """Fail when this change of the arguments gives what came back in every case."""
        if agrees(lambda *case: want(*change(case)), cases, got):
            exercise.fail("argument", seen=f"{words}; {seen}", cause=cause, look=look)

    plain = [place for place in range(len(names)) if all(is_plain(case[place]) for case in cases)]
    for factor, words, cause in SHARES:
        changes = [(names[place], partial(multiplied, place, factor)) for place in plain]
        if fitting := [one for one, change in changes if agrees(lambda *case: want(*change(case)), cases, got)]:  # noqa: B023
            exercise.fail("argument", seen=f"right for {words} `{'` or `'.join(fitting)}`; {seen}", cause=cause,
                          look="the units, and every number that is written down")  # fmt: skip
    for place in plain:
        one = names[place]
        for more, words in ((-1, "less"), (1, "more")):
            name(f"right for a `{one}` that is one {words}", f"`{one}` is counted one {words}: by a `- 1` or `+ 1`, a "
                 "range, or `<` for `<=`", f"where `{one}` is used, and what it counts",
                 partial(written, place, lambda own, case, more=more: own + more))  # fmt: skip
        for other in plain:
            if other == place:
                continue
            two = names[other]
            name(f"right for a `{one}` of `{one} // {two}`", f"`{one}` was divided by `{two}`, as if it were shared",
                 f"what `{one}` counts, and per what",
                 partial(written, place, lambda own, case, other=other: own // case[other]))  # fmt: skip
            name(f"right if `{one}` had the value of `{two}`", f"`{two}` stands where `{one}` belongs",
                 f"every place where `{two}` is used",
                 partial(written, place, lambda own, case, other=other: case[other]))  # fmt: skip
            if other > place:
                name(f"right if `{one}` and `{two}` changed places", f"`{one}` and `{two}` were mixed up",
                     f"every place where `{one}` and `{two}` are used", partial(exchanged, place, other))  # fmt: skip
        for value in sorted({case[place] for case in cases} | {1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096}):
            name(f"right if `{one}` were {value:,} throughout", f"{value:,} stands where `{one}` belongs",
                 f"numbers that are written down: `{one}` is an argument",
                 partial(written, place, lambda own, case, value=value: value))  # fmt: skip


def multiplied(place: int, factor: float, case: Case) -> Case:
    """A case with so many times one argument."""
    return (*case[:place], case[place] * factor, *case[place + 1 :])


def written(place: int, value: Callable[..., Any], case: Case) -> Case:
    """A case with another value in one place; value: of the one that stands there, and the case."""
    return (*case[:place], value(case[place], case), *case[place + 1 :])


def exchanged(place: int, other: int, case: Case) -> Case:
    """Two arguments in each other's place."""
    swapped = {place: other, other: place}
    return tuple(case[swapped.get(i, i)] for i in range(len(case)))


def is_plain(value: Any) -> bool:
    """Whether an argument is one number."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def agrees(formula: Callable[..., float], cases: Sequence[Case], got: Sequence[float]) -> bool:
    """Whether `formula` gives what came back, in every case."""
    try:
        return all(equal(formula(*case), value) for case, value in zip(cases, got, strict=True))
    except (ArithmeticError, ValueError, TypeError):
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
