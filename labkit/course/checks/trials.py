"""Trials: an answer beside the reference, on calls of many sizes, layouts, dtypes and values.

    compare(type(self), answer, attend, [(q, k, v), ...], suspects=suspects, what="the output")

Whoever writes a check gives a few calls, in float64, whose sizes are pairwise distinct; what every answer has to stand
comes by itself: the same call with other numbers of the same shapes, memory in another order, tensors cut from a larger
one, the other dtypes. What was returned before must stay as it was, which `Exercise.call` sees to.

A suspect is named when it gives what came back wherever the answer was called so far, and differs from what is right
somewhere. Otherwise the finding is neutral: the sizes, a constant factor if there is one, the first place that differs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from labkit.course.checks.effort import Effort, check_stays, effort_of
from labkit.course.checks.suspects import Suspect
from labkit.course.checks.tensors import TIGHT, agree, budget, first_place, short_value
from labkit.course.exercise import Exercise, NotYet, accept, aside
from labkit.ledger import tensors_in

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One call. args, by_name: its arguments. name: what is special about it, in words; sizes need not be said."""

    args: tuple
    name: str = ""
    by_name: Mapping[str, Any] = field(default_factory=dict)


def compare(
    exercise: type[Exercise],
    answer: Callable,
    reference: Callable,
    cases: Iterable[Case | tuple],
    *,
    suspects: Callable[..., Sequence[Suspect]] = lambda *args: (),
    what: str = "the result",
    exact: bool = False,
    dtypes: Sequence[torch.dtype] = DTYPES,
    layouts: bool = True,
) -> None:
    """Pass when `answer` gives what `reference` gives, in every case and every variation of it.

    reference: returns a tensor, a number, or a tuple of them. suspects: what people write instead, for the arguments of
    a case; the list has the same order in every case, and `gives` may be functions without arguments; a variant that is
    None does not apply to that case. exact: results
    must be equal, as for masks, codes and copies; otherwise they may lose what another order of the same operations
    loses in their dtype (`budget`). dtypes: what float arguments are tried in besides their own. layouts: whether
    memory in other orders is tried.
    """
    plain = [case if isinstance(case, Case) else Case(case) for case in cases]
    judged = Judge(exercise, answer, reference, suspects, what, exact, plain)
    for case in plain:
        judged.call(case)
    judged.check_stays()
    for case in plain[:2]:
        judged.call(other_numbers(case), "numbers")
        for change, words in LAYOUTS if layouts else ():
            judged.call(varied(case, change, words), "layout")
        for dtype in dtypes:
            judged.call(varied(case, partial(converted, dtype), str(dtype).removeprefix("torch.")), "precision")


class Judge:
    """One answer beside the reference, call after call."""

    def __init__(self, exercise: type[Exercise], answer: Callable, reference: Callable, suspects: Callable, what: str,
                 exact: bool, plain: Sequence[Case]) -> None:  # fmt: skip
        self.exercise, self.answer, self.reference = exercise, answer, reference
        self.suspects, self.what, self.exact, self.plain = suspects, what, exact, plain
        self.listed: dict[int, Sequence[Suspect]] = {}
        self.given: dict[tuple[int, int, int], Any] = {}
        self.in_float64: dict[int, Case] = {}  # the calls in which a suspect was computed to the end of float64
        self.seen: list[tuple[Case, Any, Any]] = []  # plain calls so far, what came back, and what is right

    def call(self, case: Case, kind: str = "") -> None:
        """Fail unless the answer gives in this case what the reference gives. kind: "numbers", "layout" or "precision"
        where the same call was right before with other numbers, another layout, another dtype."""
        plain = kind in ("", "numbers")
        try:
            got = self.exercise.call(self.answer, *case.args, **case.by_name)
        except NotYet as not_yet:
            if kind == "layout" and not_yet.finding.diagnosis == "raised":
                self.fail_layout(case, not_yet.finding.seen)
            raise
        own = self.reference(*case.args, **case.by_name)
        if plain:
            self.seen.append((case, got, own))
        try:
            same_kind(self.exercise, got, own, self.what, self.told(case))
        except NotYet as not_yet:
            if plain:
                self.call_the_others()
                self.accuse(case, not_yet.finding.seen)
                self.recall(case, got, own)
            raise
        exact, single = (
            (own, own) if self.exact else (self.reference(*cast(case.args), **cast(case.by_name)) for cast in CASTS)
        )
        for name, a, b, c, d in paired(self.what, got, own, exact, single):
            tolerance = 0.0 if self.exact else budget(b, c)
            if b.dtype == torch.float64 and not self.exact:  # a softmax in float32 in the middle is right as well
                tolerance = max(tolerance, TIGHT, budget(d, c))
            if agree(a, c, tolerance, nan=True):
                continue
            if kind == "layout":
                self.fail_layout(case, f"{name}: other numbers")
            if kind == "precision":
                self.fail_precision(case, name, a, c, tolerance)
            self.call_the_others()
            self.accuse(case, f"{self.told(case)}: {name}: {first_place(a, c, tolerance)}")
            self.recall(case, got, own)
            self.accuse_rounding(case, got, own)
            self.accuse_one_for_all(f"{self.told(case)}: {name}: {first_place(a, c, tolerance)}")
            self.exercise.explain_values(a, c, what=f"{self.told(case)}: {name}", tolerance=tolerance)
        accept()

    def call_the_others(self) -> None:
        """Call the answer in the plain cases that are still to come, so that a suspect has to fit there too."""
        done = {id(case) for case, _, _ in self.seen}
        for case in self.plain:
            if id(case) not in done:
                with suppress(NotYet):
                    got = self.exercise.call(self.answer, *case.args, **case.by_name)
                    self.seen.append((case, got, self.reference(*case.args, **case.by_name)))

    def accuse(self, case: Case, seen: str) -> None:
        """Name the suspect that gives what came back in this case and in every other. seen: where it differs from what
        is right, for a suspect that has no words of its own."""
        listed = list(enumerate(self.suspects_of(case)))
        for loosely in (False, True):
            for place, suspect in listed:
                if any(self.always(place, variant, loosely=loosely) for variant in range(len(suspect.variants))):
                    self.exercise.fail(
                        suspect.diagnosis, seen=suspect.seen or seen, cause=suspect.cause, look=suspect.look
                    )

    def recall(self, case: Case, got: Any, own: Any) -> None:
        """Name a result that is an earlier call's, where the right one is another."""
        if type(got) is not type(own):
            return

        def misshapen(one: Any, right: Any) -> bool:
            return isinstance(one, Tensor) and isinstance(right, Tensor) and one.shape != right.shape

        for other, then, right in self.seen:
            if misshapen(got, own) and misshapen(then, right):  # a result of a size that no call of these asks for
                continue
            if other is not case and fits(got, then) and not fits(own, right):
                self.exercise.fail(
                    "remembered",
                    seen=f"{self.told(case)}: what came back is what came back {self.told(other)}",
                    cause="a result is kept from call to call, or the numbers that came in are not used",
                    look="what outlives a call: a global, a default argument, an attribute, a cache decorator",
                )

    def always(self, place: int, variant: int, *, loosely: bool) -> bool:
        """Whether one variant of one suspect gives what came back in every plain call, where it applies, and whether
        it can be told from what is right in one of them. loosely: one that came back with NaN or infinity, or with 0
        for NaN, need only fit where it is finite."""
        told_apart = False
        for case, got, own in self.seen:
            value = self.value(case, place, variant)
            if value is None:
                continue
            if (
                loosely
                and isinstance(value, Tensor)
                and isinstance(got, Tensor)
                and got.shape == value.shape == own.shape
            ):
                got, value, own = finite_alike(got, value, own)
            if not fits(got, value) and not self.fits_as_rounded(got, value, case, place, variant):
                return False
            told_apart = told_apart or not fits(own, value)
        return told_apart

    def fits_as_rounded(self, got: Any, value: Any, case: Case, place: int, variant: int) -> bool:
        """Whether a result is a suspect's within what another order of its operations loses in its dtype: where scores
        are huge, that is more than the roundings of the result."""
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == torch.float64:
            return False
        if not isinstance(got, Tensor) or got.shape != value.shape:
            return False
        if id(case) not in self.in_float64:
            self.in_float64[id(case)] = replace(case, args=CASTS[0](case.args))
        exact = self.value(self.in_float64[id(case)], place, variant)
        if not isinstance(exact, Tensor) or exact.shape != value.shape:
            return False
        lost = budget(value, exact)  # a suspect that mostly is rounding is not recognised by what it gives
        return lost < 0.25 * value.nan_to_num(0.0).abs().max().item() and agree(got, value, lost, nan=True)

    def suspects_of(self, case: Case) -> Sequence[Suspect]:
        """The suspects of one call, listed once."""
        if id(case) not in self.listed:
            self.listed[id(case)] = self.suspects(*case.args)
        return self.listed[id(case)]

    def value(self, case: Case, place: int, variant: int) -> Any:
        """What one variant of one suspect gives in one call, computed once; None where it does not apply."""
        key = id(case), place, variant
        if key not in self.given:
            variants = self.suspects_of(case)[place].variants
            given = variants[variant] if variant < len(variants) else None
            self.given[key] = given() if callable(given) else given
        return self.given[key]

    def accuse_one_for_all(self, seen: str) -> None:
        """Name the arguments of which the first along a dimension, used for all, gives what came back in every call:
        the first row of the batch, say, or the first head."""
        names = list(inspect.signature(self.reference).parameters)
        places = [place for place, x in enumerate(self.seen[0][0].args) if isinstance(x, Tensor) and x.dim() > 1]
        for chosen in ([place] for place in places), combinations(places, 2), [places]:
            for some in chosen:
                most = max((self.seen[0][0].args[place].dim() - 1 for place in places), default=0)
                for dim in [*range(most), (0, 1)] if most > 2 else range(most):
                    if some and self.always_first(some, dim if isinstance(dim, tuple) else (dim,)):
                        what = " and ".join(f"`{names[place]}`" for place in some)
                        along = "dimensions 0 and 1" if isinstance(dim, tuple) else f"dimension {dim}"
                        self.exercise.fail(
                            "one-for-all",
                            seen=f"{seen}. It is what comes out where of {what} the first along {along} stands "
                            "in for all",
                            cause=f"along {along} of {what}, the first was taken for all: an index 0, a part "
                            "made for one and used for all, or a loop that ends after one",
                            look=f"every index of {what}, and every place where {along} may be left out",
                        )

    def always_first(self, places: Sequence[int], dims: Sequence[int]) -> bool:
        """Whether every call gave what is right for these arguments with the first along `dims` in place of all."""
        told_apart = False
        for case, got, own in self.seen:
            args = list(case.args)
            for place in places:
                whole = args[place]
                for dim in dims:
                    if whole.dim() > dim + 1 and whole.shape[dim]:
                        args[place] = args[place].narrow(dim, 0, 1)
                args[place] = args[place].expand_as(whole).contiguous()
            try:
                value = self.reference(*args, **case.by_name)
            except Exception:  # the reference need not take such arguments
                return False
            if not fits(got, value):
                return False
            told_apart = told_apart or not fits(own, value)
        return told_apart

    def check_stays(self) -> None:
        """Fail when floats left PyTorch in a call: whole numbers, such as positions or a table, may be read out."""
        args, by_name = self.plain[0].args, self.plain[0].by_name
        effort = Effort()
        with suppress(NotYet), aside():  # what stops only while it is watched has no other fault
            effort = effort_of(lambda: self.exercise.call(self.answer, *args, **by_name))
        check_stays(self.exercise, replace(effort, left=effort.floats_left))

    def accuse_rounding(self, case: Case, got: Any, own: Any) -> None:
        """Name the dtype whose rounding, of what went in or of what came out, gives what came back."""
        for dtype in (torch.bfloat16, torch.float16, torch.float32) if isinstance(got, Tensor) else ():
            through = partial(rounded, dtype)
            one_by_one = [
                [*case.args[:place], mapped(x, through), *case.args[place + 1 :]] for place, x in enumerate(case.args)
            ]
            given = [mapped(case.args, through), *one_by_one]
            for value in (mapped(own, through), *(self.reference(*args, **case.by_name) for args in given)):
                same = agree(got, value, 0.0, nan=True) if self.exact else fits(got, value)
                if same and not (agree(own, value, 0.0, nan=True) if self.exact else fits(own, value)):
                    name = str(dtype).removeprefix("torch.")
                    self.exercise.fail(
                        "precision",
                        seen=f"{self.told(case)}: {self.what} went through {name}; {first_place(got, own)}",
                        cause=f"on the way, numbers were turned into {name} and back",
                        look="every dtype that is written down: take it from the tensors that come in",
                    )

    def fail_layout(self, case: Case, seen: str) -> None:
        """Right for tensors that lie in memory in the order of their dimensions, not for others."""
        self.exercise.fail(
            "layout",
            seen=f"{self.told(case)}: {seen}. The same numbers, contiguous in memory, were right",
            cause="the code counts on the order in memory: view, data_ptr, as_strided, or a reshape that assumes it",
            look="reshape instead of view, and dimensions by their place, not by the order in memory",
        )

    def fail_precision(self, case: Case, name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
        """Right in the dtype of the plain cases, and in this one off by more than its rounding explains."""
        before = next((x.dtype for x in tensors_in(self.plain[0].args) if x.is_floating_point()), torch.float64)
        off = (got.double() - want.double()).abs().nan_to_num(float("inf")).max().item()
        self.exercise.fail(
            "precision",
            seen=f"{self.told(case)}: {name} is off by up to {off:.2g}; rounding explains {tolerance:.2g}. In "
            f"{str(before).removeprefix('torch.')} it was right",
            cause="a step is computed in too few bits, a tensor was made in torch's default dtype, or a constant fits "
            "one dtype only",
            look="every dtype that is written down, and every place where a large and a small number meet",
        )

    def told(self, case: Case) -> str:
        """A case in words: its name, and the sizes of what went in."""
        return "with " + "; ".join(filter(None, [case.name, described(self.reference, case)]))


def described(function: Callable, case: Case) -> str:
    """The arguments of a call: shapes of tensors, other values as they are."""
    names = list(inspect.signature(function).parameters)
    pairs = [*zip(names, case.args, strict=False), *case.by_name.items()]
    return ", ".join(f"{name} {short_value(value)}" for name, value in pairs)


def fits(got: Any, value: Any) -> bool:
    """Whether two results are one within the rounding of their dtypes, or of float32; NaN where the other has it."""
    if isinstance(value, Tensor) and isinstance(got, Tensor):
        if got.shape != value.shape:
            return False
        scale = value.double().nan_to_num(0.0, 0.0, 0.0).abs().max().item() if value.numel() else 0.0
        floats = [x.dtype for x in (got, value) if x.is_floating_point()]
        eps = max(torch.finfo(dtype).eps for dtype in (*floats, torch.float32)) if floats else 0.0
        return agree(got, value, max(TIGHT, 64 * eps * scale), nan=True)
    return not isinstance(value, Tensor) and not isinstance(got, Tensor) and got == value


def finite_alike(got: Tensor, value: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three results with 0 where `got` is NaN or infinite and none should be, and with 0 where `value` is NaN: one
    mistake may spoil some calls with NaN and show in the others."""
    if not got.is_floating_point() or not value.is_floating_point():
        return got, value, own
    spoilt = ~got.isfinite() & own.isfinite()
    got, value, own = (x.masked_fill(spoilt, 0.0) for x in (got, value, own))
    return got, value.nan_to_num(0.0, float("inf"), -float("inf")), own


def paired(what: str, *results: Any) -> Iterator[tuple[Any, ...]]:
    """The tensors of a result beside those of others of its kind, each with its name."""
    groups = [list(tensors_in(as_tensors(value))) for value in results]
    for place, tensors in enumerate(zip(*groups, strict=True)):
        yield (what if len(groups[0]) == 1 else f"part {place + 1} of {what}"), *tensors


def same_kind(exercise: type[Exercise], got: Any, want: Any, what: str, told: str) -> None:
    """Fail unless `got` has the structure, the shapes and the dtypes of `want`."""
    if isinstance(want, tuple):
        several = isinstance(got, (tuple, list))
        if not several or len(got) != len(want):
            parts = f"has {len(got)}" if several else f"is one {type(got).__name__}"
            exercise.fail(
                "not-a-tuple",
                seen=f"{told}: {what} has {parts}; it should have {len(want)}",
                cause="the return has too few or too many parts",
                look="the last line, and what the docstring promises to return",
            )
        for place, (a, b) in enumerate(zip(got, want, strict=True)):
            same_kind(exercise, a, b, f"part {place + 1} of {what}", told)
    elif isinstance(want, Tensor):
        exercise.like(got, want, what=f"{told}: {what}")


def as_tensors(value: Any) -> Any:
    """Numbers as tensors, so that all results are compared in one way."""
    if isinstance(value, (tuple, list)):
        return [as_tensors(part) for part in value]
    return value if isinstance(value, Tensor) else torch.as_tensor(value)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested arguments with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(part, change) for part in value)
    if isinstance(value, Mapping):
        return {name: mapped(part, change) for name, part in value.items()}
    return value


def varied(case: Case, change: Callable[[Tensor], Tensor], words: str) -> Case:
    """The call with its tensors changed, and with words for that."""
    name = f"{case.name}, {words}" if case.name else words
    return Case(mapped(case.args, change), name, mapped(case.by_name, change))


def other_numbers(case: Case) -> Case:
    """The same shapes, with the float numbers in reverse order."""
    return varied(
        case, lambda x: x.flip(tuple(range(x.dim()))) if x.is_floating_point() and x.dim() else x, "other numbers"
    )


def rounded(dtype: torch.dtype, x: Tensor) -> Tensor:
    """Floats with the precision of another dtype."""
    return x.to(dtype).to(x.dtype) if x.is_floating_point() else x


def converted(dtype: torch.dtype, x: Tensor) -> Tensor:
    """Floats in another dtype; whole numbers as they are."""
    return x.to(dtype) if x.is_floating_point() else x


def transposed(x: Tensor) -> Tensor:
    """The same numbers, the two dimensions before the last (or the last two) the other way round in memory."""
    if x.dim() < 2:
        return x
    a, b = (-3, -2) if x.dim() > 2 else (-2, -1)
    return x.transpose(a, b).contiguous().transpose(a, b)


def sliced(x: Tensor) -> Tensor:
    """The same numbers, cut from a larger tensor whose other entries are large (or, of whole numbers, 1)."""
    if x.dim() == 0:
        return x
    room = [size + 3 for size in x.shape]
    large = torch.full(room, 1e4 if x.is_floating_point() else 1, dtype=x.dtype, device=x.device)
    part = large[tuple(slice(1, 1 + size) for size in x.shape)]
    part.copy_(x)
    return part


# Floats in float64, what an answer is measured by, and in float32.
CASTS = tuple(partial(mapped, change=partial(converted, dtype)) for dtype in (torch.float64, torch.float32))
LAYOUTS = ((transposed, "dimensions in another order in memory"), (sliced, "tensors cut from larger ones"))
