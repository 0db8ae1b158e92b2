"""Quantities: which of the numbers that went in would explain how far a result is off.

A size is a product, and most slips change one factor of it: left out, taken twice, taken for its neighbour. So the
ratio of what came back to what is right is searched for among the products of the quantities that the case is made of,
and the difference likewise for a term that is missing or too many. What is named agrees in every case, to the last
digit that a float has.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from math import isclose, isfinite, prod
from typing import Any

from labkit.specs import ModelSpec

EXACT = 1e-12  # relative: quotients of whole numbers below 2**53 are off by 2 eps
SPEC = (
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "window",
)
PLAIN = (1.0, 2.0, 0.5, 3.0, 1 / 3, 4.0, 0.25, 8.0, 0.125, -1.0, 1.5, 2 / 3)


@dataclass(frozen=True)
class Explained:
    """What a ratio or difference comes to: in words, and what to say of its cause."""

    words: str
    cause: str


def quantities(function: Callable, case: Sequence[Any]) -> dict[str, float]:
    """The named numbers of a case: its numeric arguments, and the sizes of a spec among them."""
    found: dict[str, float] = {}
    for name, value in zip(inspect.signature(function).parameters, case, strict=False):
        if isinstance(value, ModelSpec):
            found |= {f"{name}.{size}": getattr(value, size) for size in SPEC if getattr(value, size, None)}
        elif isinstance(value, numbers.Real) and not isinstance(value, bool) and value:
            found[name] = float(value)
    return found


def explain_product(
    function: Callable, cases: Sequence[Sequence[Any]], got: Sequence[float], want: Sequence[float]
) -> Explained | None:
    """The product of quantities by which every result is off; None when no short one is."""
    named = [quantities(function, case) for case in cases]
    if len(cases) < 2 or not all(a and b and isfinite(a) for a, b in zip(got, want, strict=True)):
        return None
    pairs = [(n, a / b) for n, a, b in zip(named, got, want, strict=True)]
    first = pairs[0][1]
    if all(isclose(ratio, first, rel_tol=EXACT) for _, ratio in pairs):
        times = plain(first)
        return Explained(
            f"every result is {times} times what it should be", "a constant factor too many, or one missing"
        )
    for words, cause, value in products(common(named)):
        constant = first / value(pairs[0][0])
        if any(isclose(constant, c, rel_tol=EXACT) for c in PLAIN) and all(
            isclose(ratio, constant * value(n), rel_tol=EXACT) for n, ratio in pairs
        ):
            extra = "" if isclose(constant, 1.0, rel_tol=EXACT) else f" times {plain(constant)}"
            return Explained(f"every result is {words}{extra} times what it should be", cause)
    return None


def explain_term(
    function: Callable, cases: Sequence[Sequence[Any]], got: Sequence[float], want: Sequence[float]
) -> Explained | None:
    """The term by which every result is off: a product of at most three quantities; None when there is none."""
    named = [quantities(function, case) for case in cases]
    off = [a - b for a, b in zip(got, want, strict=True)]
    if not all(isinstance(x, numbers.Integral) for x in (*got, *want)) or len(off) < 3 or not all(off):
        return None
    if len(set(off)) == 1:
        side = "large" if off[0] > 0 else "small"
        return Explained(f"every result is {abs(off[0]):,} too {side}", "one too many or too few, or a constant term")
    names = sorted(common(named))
    for count in (1, 2, 3):
        for chosen in combinations(names, count):
            values = [prod(n[name] for name in chosen) for n in named]
            constant = off[0] / values[0]
            if any(isclose(abs(constant), c, rel_tol=EXACT) for c in PLAIN if c > 0) and all(
                isclose(x, constant * value, rel_tol=EXACT) for x, value in zip(off, values, strict=True)
            ) and len(set(values)) > 1:  # fmt: skip
                term = " x ".join(chosen)
                term = term if isclose(abs(constant), 1.0) else f"{plain(abs(constant))} x {term}"
                word, cause = ("more", "a term too many") if constant > 0 else ("less", "a term is missing")
                return Explained(f"every result is {term} {word} than it should be", f"{cause}: {term}")
    return None


def common(named: Sequence[dict[str, float]]) -> set[str]:
    """Quantities that every case has and that are not the same in all; what never changes explains nothing."""
    shared = set.intersection(*(set(n) for n in named))
    return {name for name in shared if len({n[name] for n in named}) > 1}


def products(names: set[str]) -> Iterator[tuple[str, str, Callable[[dict[str, float]], float]]]:
    """Short products, likeliest first: words, cause, and the value in a case."""
    ordered = sorted(names)
    for a in ordered:
        yield f"1 / {a}", f"{a} is missing from the product", powers({a: -1})
    for a, b in permutations(ordered, 2):
        yield f"{a} / {b}", f"{a} stands where {b} belongs", powers({a: 1, b: -1})
    for a in ordered:
        yield a, f"{a} is in the product once too often", powers({a: 1})
        yield f"1 / {a}**2", f"it was divided by {a} instead of multiplied", powers({a: -2})
        yield f"{a}**2", f"it was multiplied by {a} instead of divided", powers({a: 2})
    for a, b in combinations(ordered, 2):
        yield f"1 / ({a} x {b})", f"{a} and {b} are missing from the product", powers({a: -1, b: -1})
        yield f"{a} x {b}", f"{a} and {b} are in the product once too often", powers({a: 1, b: 1})
    for a, b in combinations(ordered, 2):
        yield (f"({a} + {b}) / ({a} x {b})", f"{a} and {b} were added where they should be multiplied",
               added(a, b))  # fmt: skip
    for a, b, c in permutations(ordered, 3):
        if b < c:
            yield f"{a} / ({b} x {c})", f"{a} stands where {b} x {c} belongs", powers({a: 1, b: -1, c: -1})
            yield f"{b} x {c} / {a}", f"{b} x {c} stands where {a} belongs", powers({a: -1, b: 1, c: 1})


def added(a: str, b: str) -> Callable[[dict[str, float]], float]:
    """The sum of two quantities in place of their product, as a function of a case's quantities."""
    return lambda named: (named[a] + named[b]) / (named[a] * named[b])


def powers(exponents: dict[str, int]) -> Callable[[dict[str, float]], float]:
    """The product of quantities, each to its power, as a function of a case's quantities."""
    return lambda named: prod(named[name] ** power for name, power in exponents.items())


def plain(value: float) -> str:
    """A factor as a person writes it: 2, 1/2, 1.5."""
    for below in range(1, 65):
        if isclose(value * below, round(value * below), rel_tol=EXACT) and round(value * below):
            above = round(value * below)
            return f"{above:,}" if below == 1 else f"{above:,}/{below}"
    return f"{value:.4g}"
