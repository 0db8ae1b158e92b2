"""Hidden cases: the same answer, examined with another seed, is called with other numbers.

What every call was given is digested while a check examines the reference.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from labkit.course.catalogue import numbers
from labkit.course.checks.held import walk
from labkit.course.checks.hidden import hidden
from labkit.course.checks.tensors import SHIFT, cases_of
from labkit.course.examine import examine
from labkit.course.exercise import Exercise
from labkit.labs.lab06 import kernel
from labkit.labs.lab06.allocating import Allocate
from labkit.specs import GpuSpec, ModelSpec
from tests.labs.kill_table import gather

_, EXERCISES = gather()
RIGHT: list[tuple[str, Callable]] = [
    pair for number in numbers() for pair in importlib.import_module(f"tests.labs.lab{number}.answers").RIGHT
]
PLAIN = (bool, int, float, str, type(None), ModelSpec, GpuSpec)  # what repr says all of

# Exercises whose check calls every answer with the same numbers, and why.
SAME_NUMBERS: dict[str, str] = {}


def numbers_of(value: Any) -> Any:
    """What repr says all of: a plain value, a tensor's numbers, and those of every tensor that an object leads to."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Tensor):
        return list(value.shape), value.dtype, [] if value.is_meta else value.flatten().tolist()
    if isinstance(value, (list, tuple)):
        return [numbers_of(part) for part in value]
    if isinstance(value, dict):
        return [numbers_of(part) for pair in value.items() for part in pair]
    return type(value).__name__, [numbers_of(part) for part in walk([value]) if isinstance(part, Tensor)]


def watched(function: Callable, noted: Any, own: int = 0) -> Callable:
    """`function`, which first adds what it is given to a digest, but for `own` arguments at the beginning."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes(), torch._C.DisableTorchFunction():  # looking is not part of the answer's work
            noted.update(repr(numbers_of([args[own:], kwargs])).encode())
        return function(*args, **kwargs)

    return call


def noting(reference: Callable, noted: Any) -> Callable:
    """A reference, or a class like it, whose calls are digested."""
    if inspect.isclass(reference):
        parts = {name: part for name, part in vars(reference).items() if inspect.isfunction(part)}
        methods = {name: watched(part, noted, own=1) for name, part in parts.items()}
        return type(reference.__name__, (reference,), methods)
    answer = watched(reference, noted)
    answer.__signature__ = inspect.signature(reference)  # type: ignore[attr-defined]
    return answer


def numbers_seen(exercise: Exercise, seed: int) -> str:
    """A digest of all that the answer to an exercise is called with."""
    noted = hashlib.blake2b()  # takes no more memory the more it is given: some checks look for that
    answer = noting(exercise.reference, noted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Allocate, "time", lambda *_: None)  # of 06.3: its clock would see the digesting
        if exercise.id == "06.8":  # a kernel is given addresses; the tensors that lie there are the launch's
            answer = exercise.reference
            patch.setattr(kernel, "launch", watched(kernel.launch, noted))
        verdict = examine(exercise, answer, seed=seed)
    assert verdict.status == "pass", verdict.finding
    return noted.hexdigest()


@pytest.mark.parametrize("id", EXERCISES)
def test_another_seed_calls_an_answer_with_other_numbers(id: str) -> None:
    usual, again, other = (numbers_seen(EXERCISES[id], seed) for seed in (7, 7, 4321))
    assert usual == again
    assert (usual == other) == (id in SAME_NUMBERS)


@pytest.mark.parametrize(("id", "answer"), RIGHT, ids=[f"{id}-{place}" for place, (id, _) in enumerate(RIGHT)])
def test_a_right_answer_passes_hidden_cases_however_it_is_written(id: str, answer: Callable) -> None:
    verdict = examine(EXERCISES[id], answer, seed=99)
    assert verdict.status == "pass", verdict.finding


IMPORTS = """
import random
import torch

def refused(*args, **kwargs):
    raise AssertionError("drawn at import, before a seed is set")

for name in ("rand", "randn", "randint", "randperm"):
    setattr(torch, name, refused)
from labkit.course.catalogue import contents, numbers
random.Random = refused
print(sum(len(contents(number).exercises) for number in numbers()))
"""


def test_no_lab_draws_a_number_when_it_is_imported() -> None:
    run = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=False)
    assert run.stdout == f"{len(EXERCISES)}\n", run.stderr[-2000:]


def test_more_cases_come_with_the_seeds_of_hidden_ones_alone() -> None:
    made = []
    for seed in (0, 5, 5, 6):
        with cases_of(seed):
            made.append(hidden(lambda chance: chance.randrange(10**9), count=3))
    assert made[0] == []
    assert made[1] == made[2] != made[3]
    assert [len(one) for one in made] == [0, 3, 3, 3]
    assert SHIFT == [0]
