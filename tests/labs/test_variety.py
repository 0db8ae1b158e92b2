"""What checks try answers with: none knows only one size, rank, layout or dtype, and none overlooks an argument.

The calls that a check makes are recorded while it examines the reference.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from labkit.course.examine import examine
from labkit.course.exercise import Exercise
from tests.labs.kill_table import gather

_, EXERCISES = gather()
FUNCTIONS = {id: exercise for id, exercise in EXERCISES.items() if not inspect.isclass(exercise.reference)}

# What an exercise asks for has only one: (exercise, parameter): what it lacks, and why.
ONE_ONLY: dict[tuple[str, str], dict[str, str]] = {
    ("01.4", "frequencies"): {"dtypes": "they are float32 whatever dtype the vectors have, as the docstring says"},
    ("02.2", "x"): {"lengths": "a decode step brings one token"},
    ("05.6", "scale"): {"lengths": "one for each channel"},
    ("05.6", "zero"): {"lengths": "one for each channel"},
    ("05.8", "tokens"): {"lengths": "one text"},
    ("06.5", "keys"): {"layouts": "the memory of all rows is one piece, and may be viewed as slots"},
    ("06.5", "values"): {"layouts": "the memory of all rows is one piece, and may be viewed as slots"},
}


@dataclass(frozen=True)
class Seen:
    """What one tensor argument was like. sliced: it does not start where its memory does. whole: without fractions."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    contiguous: bool
    sliced: bool
    whole: bool


@cache
def calls_of(exercise: Exercise) -> list[dict[str, Any]]:
    """The arguments of every call that the check makes, by parameter."""
    signature = inspect.signature(exercise.reference)
    made: list[dict[str, Any]] = []

    def recording(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        with _disable_current_modes(), torch._C.DisableTorchFunction():  # looking is not part of the answer's work
            made.append({name: described(value) for name, value in bound.arguments.items()})
        return exercise.reference(*args, **kwargs)

    recording.__signature__ = signature  # type: ignore[attr-defined]
    verdict = examine(exercise, recording)
    assert verdict.status == "pass", verdict.finding
    return made


def described(value: Any) -> Any:
    """What of an argument this file asks for."""
    if isinstance(value, Tensor):
        whole = not value.is_floating_point() or (not value.is_meta and bool((value == value.round()).all()))
        return Seen(tuple(value.shape), value.dtype, value.is_contiguous(), value.storage_offset() != 0, whole)
    return type(value)  # what is kept here would be memory that outlives the call


def lacks(doc: str, name: str, seen: list[Seen]) -> set[str]:
    """What the tensors that one parameter was given lack in variety."""
    floats, flat = any(x.dtype.is_floating_point for x in seen), all(len(x.shape) < 2 for x in seen)
    found = {
        "sizes": len({x.shape[-1:] for x in seen}) > 1,
        "lengths": flat or len({x.shape[-2:-1] for x in seen}) > 1,
        "ranks": f"{name}: `[..." not in doc or len({len(x.shape) for x in seen}) > 1,
        "layouts": flat or any(not x.contiguous for x in seen),
        "slices": any(x.sliced for x in seen),
        "dtypes": not floats or len({x.dtype for x in seen}) > 1,
        "fractions": not floats or any(not x.whole for x in seen),
    }
    return {what for what, holds in found.items() if not holds}


@pytest.mark.parametrize("id", FUNCTIONS)
def test_a_check_tries_several_sizes_ranks_layouts_and_dtypes(id: str) -> None:
    doc, calls = inspect.getdoc(FUNCTIONS[id].reference) or "", calls_of(FUNCTIONS[id])
    for name in calls[0]:
        seen = [call[name] for call in calls if isinstance(call[name], Seen)]
        if seen:
            assert lacks(doc, name, seen) == set(ONE_ONLY.get((id, name), {})), name


def frozen(exercise: Exercise, name: str) -> Callable:
    """An answer that keeps one argument from its first call, wherever its shape fits."""
    signature = inspect.signature(exercise.reference)
    first: list[Any] = []

    def answer(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        now = bound.arguments[name]
        if not first:
            first.append(now.clone() if isinstance(now, Tensor) else now)
        then = first[0]
        if not isinstance(now, Tensor):
            bound.arguments[name] = then
        elif then.shape == now.shape and then.device == now.device:
            bound.arguments[name] = then.to(now.dtype)
        return exercise.reference(*bound.args, **bound.kwargs)

    answer.__signature__ = signature  # type: ignore[attr-defined]
    return answer


ARGUMENTS = [
    (id, name) for id, exercise in FUNCTIONS.items() for name in inspect.signature(exercise.reference).parameters
]


@pytest.mark.parametrize(("id", "name"), ARGUMENTS, ids=[f"{id}-{name}" for id, name in ARGUMENTS])
def test_an_answer_that_overlooks_one_argument_is_refused(id: str, name: str) -> None:
    assert examine(FUNCTIONS[id], frozen(FUNCTIONS[id], name)).status == "not yet"


@pytest.mark.parametrize("id", FUNCTIONS)
def test_an_answer_that_is_called_by_name_and_wrapped_is_accepted(id: str) -> None:
    """A callable object with the blank's parameters is as good as a function."""

    class Wrapped:
        __signature__ = inspect.signature(FUNCTIONS[id].reference)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return FUNCTIONS[id].reference(*args, **kwargs)

    verdict = examine(FUNCTIONS[id], Wrapped())
    assert verdict.status == "pass", verdict.finding


def test_what_is_said_to_have_one_form_only_is_an_exercises_argument() -> None:
    assert {key for key in ONE_ONLY if key not in ARGUMENTS} == set()
