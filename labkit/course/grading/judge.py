"""What a hidden test calls, in the process that runs a submission: an answer's points, and the reason in words.

    judge("01.2", globals(), points=3, seed=81726)

The check is the notebook's own, on cases with another seed. An answer that passes has all points; another has a share
of them, by how many of the check's results were right before the first that was not. What an answer could do to be
taken for right (replace a part of the course, call the reference) is looked for; it is the same process, so that no
such look is complete.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import json
import math
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from labkit.course import cards
from labkit.course.catalogue import contents
from labkit.course.examine import TIME_LIMIT, Verdict, examine
from labkit.course.exercise import ACCEPTED, Accepted, Exercise, Finding
from labkit.course.grading.marks import KIND

CHANGING = ("input", "display", "get_ipython", "exit", "quit", "_", "open")  # of `builtins`: IPython sets them itself
SEALED: dict[str, tuple[Any, Any]] = {}  # what each part of the course was before the submission ran


@dataclass(frozen=True)
class Points:
    """The points for one exercise, and why so many. The last value of a cell is what nbgrader reads as its points."""

    exercise: str
    title: str
    points: float
    most: float
    status: str
    right: int = 0
    tried: int = 0
    finding: Finding | None = None

    def __repr__(self) -> str:
        return f"{self.points:g}"

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        return {"text/plain": repr(self), KIND: json.loads(json.dumps(asdict(self))) | {"text": self.text()}}

    def text(self) -> str:
        """The card that a learner finds in the feedback."""
        lines = [f"{self.exercise} · {self.points:g} of {self.most:g} points · {self.title}"]
        if self.status == "pending":
            lines.append("     The blank is as it was handed out.")
        if self.finding:
            lines += cards.finding(self.finding)
        if self.status == "not yet" and self.right:
            before = "before one was not" if self.right < self.tried else "and something else is amiss"
            lines.append(f"     {self.right} of {self.tried} results were right, {before}: hence the points.")
        return "\n".join(lines)


def seal(number: str) -> None:
    """Remember every function of the course, of lab `number`, and what checks compare with, as they are now."""
    contents(number)
    SEALED.update(parts())


def judge(
    id: str, names: dict[str, Any], *, points: float, seed: int, limit: float = TIME_LIMIT, sealed: bool = True
) -> Points:
    """Points for what `names` holds under the name of exercise `id`; the reference takes its place unless it passes.

    names: the notebook's globals. points: for a right answer. seed: of the hidden cases. limit: seconds of computing.
    sealed: whether to look for parts of the course that were replaced since `seal`.
    """
    exercise = next(each for each in contents(id[:2]).exercises if each.id == id)
    name = exercise.reference.__name__
    answer = names.get(name)
    right = 0
    finding: Finding | None
    if sealed and (finding := replaced()):
        verdict = Verdict("not yet", finding)
    elif name not in names:
        verdict = Verdict("not yet", missing(name))
    elif is_reference(exercise, answer):
        verdict = Verdict("not yet", THE_COURSES_OWN)
    else:
        verdict, right = counted(exercise, answer, seed, limit)
        if verdict.status == "pass":
            finding = replaced() if sealed else None
            finding = finding or canary(exercise, seed, limit)
            if finding is None and calls_the_reference(exercise, answer, seed, limit):
                finding = THE_COURSES_OWN
            if finding:
                verdict, right = Verdict("not yet", finding), 0
    if verdict.status != "pass":
        names[name] = exercise.reference
    tried = counted(exercise, exercise.reference, seed, limit)[1] if right and verdict.status != "pass" else right
    earned = points if verdict.status == "pass" else share(points, right, tried)
    return Points(id, exercise.title, earned, points, verdict.status, right, tried, verdict.finding)


def fall_back(id: str, names: dict[str, Any]) -> None:
    """Let the reference stand in for an answer that ended the process."""
    exercise = next(each for each in contents(id[:2]).exercises if each.id == id)
    names[exercise.reference.__name__] = exercise.reference


def share(points: float, right: int, tried: int) -> float:
    """Partial credit, in tenths of a point, rounded down; never all."""
    return math.floor(10 * points * min(right / tried, 0.9)) / 10 if right and tried else 0.0


def counted(exercise: Exercise, answer: Any, seed: int, limit: float) -> tuple[Verdict, int]:
    """The verdict, and how many results the check found right on the way."""
    accepted = Accepted()

    def trial(self: Any, answer: Any) -> None:
        token = ACCEPTED.set(accepted)
        try:
            exercise.trial(answer)
        finally:
            ACCEPTED.reset(token)

    return examine(with_trial(exercise, trial), answer, seed=seed, limit=limit), accepted.count


def with_trial(exercise: Exercise, trial: Callable[[Any, Any], None]) -> Exercise:
    """The exercise, with another way to put an answer to the test."""
    return type(type(exercise).__name__, (type(exercise),), {"trial": trial})()


def missing(name: str) -> Finding:
    """The finding where nothing has the name of the blank."""
    return Finding(
        "missing",
        f"`{name}` is not there when it is graded",
        "the cell that defines it was removed, or stopped before the definition; its error stands in the feedback",
        f"the cell with `{name}`: restart the kernel and run all cells from the top",
    )


THE_COURSES_OWN = Finding(
    "the-courses-own",
    "the course's reference was handed in, or is called by the answer",
    "the answer does not do the work itself",
    "write it yourself; what you have of your own earns its share",
)


def is_reference(exercise: Exercise, answer: Any) -> bool:
    """Whether the answer is the reference, under whatever name."""
    own = own_code(exercise.reference)
    while isinstance(answer, functools.partial):
        answer = answer.func
    return answer is exercise.reference or bool(own & own_code(answer))


def own_code(function: Any) -> set[types.CodeType]:
    """The code of a function, or of the methods that a class defines."""
    if isinstance(function, type):
        return {code for part in vars(function).values() for code in own_code(part) if not isinstance(part, type)}
    code = getattr(getattr(function, "fget", getattr(function, "__func__", function)), "__code__", None)
    return {code} if isinstance(code, types.CodeType) else set()


def calls_the_reference(exercise: Exercise, answer: Any, seed: int, limit: float) -> bool:
    """Whether code of the answer's leads to the reference's: found by following the calls of one more trial."""
    own, found = own_code(exercise.reference), [False]

    def follow(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code in own:
            caller = frame.f_back
            while caller is not None and caller.f_globals.get("__name__", "").startswith(("torch", "functools")):
                caller = caller.f_back
            module = caller.f_globals.get("__name__", "") if caller is not None else ""
            found[0] = found[0] or not str(module).startswith("labkit.")

    def trial(self: Any, answer: Any) -> None:
        sys.setprofile(follow)
        try:
            exercise.trial(answer)
        finally:
            sys.setprofile(None)

    examine(with_trial(exercise, trial), answer, seed=seed, limit=4 * limit)
    return found[0]


def canary(exercise: Exercise, seed: int, limit: float) -> Finding | None:
    """A finding where the check passes what is surely wrong: somebody has tampered with what it compares with."""
    for wrong in (lambda *args, **kwargs: None, spoilt(exercise.reference)):
        if wrong is not None and examine(exercise, wrong, seed=seed, limit=limit).status == "pass":
            return tampered("the check takes a wrong answer for right")
    return None


def spoilt(reference: Callable) -> Callable | None:
    """A function that is wrong everywhere: the reference's results, changed."""
    if isinstance(reference, type):
        return None

    def wrong(*args: Any, **kwargs: Any) -> Any:
        return changed(reference(*args, **kwargs))

    wrong.__signature__ = inspect.signature(reference)  # type: ignore[attr-defined]
    return wrong


def changed(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, torch.Tensor):
        return ~value if value.dtype == torch.bool else value + 1
    if isinstance(value, (tuple, list)):
        return type(value)(map(changed, value)) if type(value) in (tuple, list) else None
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, (int, float)) else None


def tampered(seen: str) -> Finding:
    """The finding where the course's own code is not what it was."""
    return Finding(
        "tampered",
        seen,
        "a cell of the submission replaced a part of the course, of PyTorch or of Python while it ran",
        "the cells that assign to something of `labkit`, `torch` or `builtins`; an answer needs none of that",
    )


def replaced() -> Finding | None:
    """A finding that names the first part that is another than when it was sealed."""
    if not SEALED:
        return tampered("the seal that was put on the course's code is gone")
    now = dict(parts())
    for name, kept in SEALED.items():
        if name not in now or any(a is not b for a, b in zip(now[name], kept, strict=True)):
            return tampered(f"`{name}` is not what it was when the notebook started")
    return None


def parts() -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Every function that a verdict rests on, by its name: of the course, of Python, of tensors."""
    for name, module in sorted(sys.modules.items()):
        if name.startswith(("labkit.course.", "labkit.labs.")) and isinstance(module, types.ModuleType):
            for part, value in list(vars(module).items()):
                yield from functions(f"{name}.{part}", value)
    for owner in (builtins, torch.Tensor, json, math):
        for part in dir(owner):
            value = inspect.getattr_static(owner, part)
            if callable(value) and not (owner is builtins and part in CHANGING):
                yield f"{owner.__name__}.{part}", (value, None)
    for part in ("isfinite", "isnan", "equal", "allclose", "as_tensor", "isclose"):
        yield f"torch.{part}", (getattr(torch, part), None)


def functions(name: str, value: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """A function and its code; of a class, its methods."""
    if isinstance(value, type) and value.__module__.startswith("labkit."):
        yield name, (value, None)
        for part, method in list(vars(value).items()):
            inner = getattr(method, "__func__", getattr(method, "fget", method))
            if isinstance(inner, types.FunctionType):
                yield f"{name}.{part}", (inner, inner.__code__)
    elif isinstance(value, types.FunctionType):
        yield name, (value, value.__code__)
