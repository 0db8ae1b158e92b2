"""An exercise: its card, its reference, and the tools that tell one wrong answer from another.

An `Exercise` is one small class per blank. `examine(answer)` puts the learner's function to the test with these tools
(`call`, `same`, ...), which notice what goes wrong in any function: it raises, returns nothing, returns NaN, a wrong
shape or dtype, or changes its arguments. What only this exercise can know it says with `fail`. What several labs'
checks look for is in `labkit/course/checks`; the time limit and the verdict are in `examine.py`.
"""

from __future__ import annotations

import copy
import inspect
import re
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import labkit
from labkit.course.checks.tensors import agree, first_place, relation, shape_difference, short_value
from labkit.device import first_line
from labkit.ledger import memory_of, tensors_in


@dataclass(frozen=True)
class Finding:
    """What a check saw, what most likely caused it, and where to look."""

    diagnosis: str
    seen: str
    cause: str
    look: str


class NotYet(Exception):
    """An answer that does not pass, with its finding."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.seen)
        self.finding = finding


class Exercise:
    """One blank. Subclasses fill in the card, `reference` and `examine`.

    id: "02.3". title, minutes, difficulty (1 to 5), needs (ids to do first).
    reference: the function or class that fills the blank, ordinary tested code with the stub's name and signature.
    why: what makes the reference right, in about two lines; `lab.solution` says it with the code.
    hints: three steps. hints_for: a first step for a diagnosis, said after a check that found it.
    """

    id: ClassVar[str]
    title: ClassVar[str]
    minutes: ClassVar[int]
    difficulty: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ()
    why: ClassVar[str] = ""
    hints: ClassVar[tuple[str, str, str]]
    hints_for: ClassVar[Mapping[str, str]] = {}
    reference: ClassVar[Callable]

    def examine(self, answer: Callable) -> None:
        """Return when `answer` is right; raise `NotYet`, cheapest and most telling finding first, when it is not."""
        raise NotImplementedError

    def trial(self, answer: Callable) -> None:
        """`examine`, with every result of `call` kept: a later call must not change what an earlier one returned."""
        results = Results()
        token = RESULTS.set(results)
        try:
            self.examine(answer)
            results.check(type(self))
        finally:
            RESULTS.reset(token)

    # Tools for `examine`.

    @staticmethod
    def fail(diagnosis: str, *, seen: str, cause: str, look: str) -> None:
        """Say what only this exercise can know. What is compared from here on explains it, and no longer counts."""
        if (accepted := ACCEPTED.get()) is not None:
            accepted.closed = True
        raise NotYet(Finding(diagnosis, seen, cause, look))

    @classmethod
    def call(cls, answer: Callable, *args: Any, **kwargs: Any) -> Any:
        """`answer(*args, **kwargs)`, whose arguments must come back unchanged and whose result must not be None."""
        kept = copy.deepcopy((args, kwargs))
        result = cls.run(lambda: answer(*args, **kwargs), told=told(answer, kept))
        cls.check_unchanged(kept, (args, kwargs))
        cls.check_returned(result, told=told(answer, kept))
        if (results := RESULTS.get()) is not None:
            results.check(cls)
            results.keep(result, (args, kwargs))
        return result

    @classmethod
    def check_returned(cls, result: Any, *, told: str = "") -> None:
        """Fail when nothing was returned. told: what the call was, in words."""
        if result is None:
            results = RESULTS.get()
            before = results is not None and results.returned
            cls.fail(
                "returned-none",
                seen=f"your function returned None{f', {told}' * bool(told)}"
                + ("; calls before this one returned something" if before else ""),
                cause="one way through the function ends without `return`, or returns None"
                if before
                else "no `return` on the path that was taken",
                look="the conditions: which of them holds here, and what stands behind it?"
                if before
                else "the last line: return the result",
            )
        if (results := RESULTS.get()) is not None:
            results.returned = True

    @classmethod
    def check_unchanged(cls, before: Any, after: Any) -> None:
        """Fail when arguments, `before` a copy of them, are not what they were."""
        if not unchanged(before, after):
            cls.fail(
                "arguments-changed",
                seen="your function changed the arguments it was given",
                cause="an in-place operation on one of them: `+=`, `x[...] = `, x.pop(), a method that ends in `_`",
                look="build a new value instead, or work on a copy",
            )

    @classmethod
    def is_size(cls, name: str) -> bool:
        """Whether the blank's docstring has `name` in a shape, such as [batch, tokens, head_dim]."""
        shapes = re.findall(r"\[[^\]]*\]", inspect.getdoc(getattr(cls, "reference", None)) or "")
        return any(name in re.findall(r"\w+", shape) for shape in shapes)

    @classmethod
    def run(cls, step: Callable[[], Any], *, told: str = "") -> Any:
        """`step()`, where whatever it raises becomes a finding. For methods of a class the learner wrote.

        told: what the call was, in words.
        """
        try:
            return step()
        except (NotYet, NotImplementedError):
            raise
        except (Exception, SystemExit) as error:
            if type(error) is NameError and error.name and cls.is_size(error.name):
                cls.fail(
                    "unknown-name",
                    seen=f"`{error.name}` is not defined",
                    cause="in the docstring it names a size; your code has not taken that size from an argument yet",
                    look=f"the shape that it stands in, such as `batch, tokens, _ = x.shape`: which entry is "
                    f"`{error.name}`?",
                )
            if type(error) is NameError and error.name:
                cls.fail(
                    "unknown-name",
                    seen=f"`{error.name}` is not defined",
                    cause="the cell that makes it was not run since the notebook started, or the name is misspelt",
                    look=f"run the cell that makes `{error.name}` first, then this one",
                )
            where = line_of(error)
            cls.fail(
                "raised",
                seen=f"{type(error).__name__}: {short(error)}{f' (called {told})' if told else ''}",
                cause="your code stopped before it returned",
                look=f"the line it stopped at: {where}" if where else "the line that the error names",
            )

    @classmethod
    def same(cls, got: Any, want: Tensor, *, what: str, tolerance: float = 0.0) -> None:
        """Pass when `got` is `want`: type, shape, dtype, no NaN, then values within `tolerance` (0: exact)."""
        cls.like(got, want, what=what)
        if not agree(got, want, tolerance):
            cls.explain_values(got, want, what=what, tolerance=tolerance)
        accept()

    @classmethod
    def explain_values(cls, got: Tensor, want: Tensor, *, what: str, tolerance: float = 0.0) -> None:
        """Fail with what turns `want` into `got`, if one thing does, and with the first place that differs."""
        first = first_place(got, want, tolerance)
        look = "the blank's docstring and the text above it, one term at a time, with small numbers by hand"
        if found := relation(got, want, tolerance):
            diagnosis, seen, cause = found
            cls.fail(diagnosis, seen=f"{what}: {seen}; {first}", cause=cause, look=look)
        cls.fail("values", seen=f"{what}: {first}", cause="the shapes fit but the arithmetic does not", look=look)

    @classmethod
    def like(cls, got: Any, want: Tensor, *, what: str) -> None:
        """Pass when `got` could be `want`: a tensor of its shape and dtype, finite wherever it is."""
        if not isinstance(got, Tensor):
            cls.fail(
                "not-a-tensor",
                seen=f"{what} is a {type(got).__name__}, not a tensor",
                cause="a tuple, a list or a number was returned",
                look="what the docstring promises to return",
            )
        if got.shape != want.shape:
            cause, look = shape_difference(got.shape, want.shape)
            cls.fail(
                "shape",
                seen=f"{what} has shape {list(got.shape)}; it should be {list(want.shape)}",
                cause=cause,
                look=look,
            )
        if got.dtype != want.dtype:
            cls.fail(
                "dtype",
                seen=f"{what} is {got.dtype}; it should be {want.dtype}",
                cause="a dtype was written down instead of taken from the tensors that came in",
                look="every place that makes a new tensor: pass dtype=x.dtype",
            )
        if got.is_floating_point() and not torch.isfinite(got[torch.isfinite(want)]).all():
            cls.fail(
                "not-finite",
                seen=f"{what} holds NaN or infinity",
                cause="a row of scores that is -inf throughout, a score of +inf, 0/0, or an overflow",
                look="what softmax gets: in each row at least one finite score, and none that is +inf",
            )


NOT_THE_LEARNERS = tuple(
    str(Path(module.__file__ or "").parent) for module in (labkit, torch, traceback)
)  # where a frame is of the course, of PyTorch or of Python itself


class Results:
    """What the calls of one examination returned, each beside a copy."""

    LIMIT = 2**20  # bytes of one result; larger ones are not copied

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.returned = False  # whether some call returned anything

    def keep(self, result: Any, arguments: Any) -> None:
        """Remember the tensors of a result, but for those that are memory of the caller's."""
        given = {memory_of(tensor) for tensor in tensors_in(list(arguments))}
        for tensor in tensors_in(result):
            if tensor.device.type != "meta" and tensor.nbytes <= self.LIMIT and memory_of(tensor) not in given:
                self.kept.append((tensor, tensor.clone()))

    def check(self, exercise: type[Exercise]) -> None:
        """Fail when a result is no longer what it was when it was returned."""
        if all(agree(now, then, 0.0, nan=True) for now, then in self.kept):
            return
        self.kept.clear()
        exercise.fail(
            "result-overwritten",
            seen="what an earlier call returned has changed: a later call wrote over it",
            cause="the result lives in memory that the function keeps and uses again: a buffer in a global, a default "
            "argument or an attribute",
            look="make a new tensor for every result; a caller may keep what it got",
        )


RESULTS: ContextVar[Results | None] = ContextVar("results of the running examination", default=None)


@dataclass
class Accepted:
    """How many results were right, up to the first finding."""

    count: int = 0
    closed: bool = False


ACCEPTED: ContextVar[Accepted | None] = ContextVar("what was accepted so far, for who counts", default=None)


def accept(count: int = 1) -> None:
    """Note that so many results were compared and are right: what partial credit counts."""
    if (accepted := ACCEPTED.get()) is not None and not accepted.closed:
        accepted.count += count


@contextmanager
def aside() -> Iterator[None]:
    """What is found inside neither counts nor ends the counting: no case of the check itself."""
    token = ACCEPTED.set(None)
    try:
        yield
    finally:
        ACCEPTED.reset(token)


def unchanged(before: Any, after: Any) -> bool:
    """Whether nested tensors and numbers still hold what they held; what was NaN and still is did not change."""
    if isinstance(before, Tensor):
        return isinstance(after, Tensor) and before.dtype == after.dtype and agree(after, before, 0.0, nan=True)
    if isinstance(before, float) and before != before:
        return after != after
    if isinstance(before, (list, tuple)):
        return len(before) == len(after) and all(map(unchanged, before, after))
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(unchanged(value, after[key]) for key, value in before.items())
    return type(before).__eq__ is object.__eq__ or bool(before == after)  # what has no == of its own is not compared


def told(answer: Callable, arguments: tuple[tuple, dict]) -> str:
    """A call in words: "with q [2, 4, 8], k [2, 6, 8]". The names are the answer's own."""
    args, by_name = arguments
    try:
        names = list(inspect.signature(answer).parameters)[: len(args)]
    except (TypeError, ValueError):
        names = []
    names += [""] * (len(args) - len(names))
    pairs = [*zip(names, args, strict=True), *by_name.items()]
    return "with " + ", ".join(f"{name} {short_value(value)}".strip() for name, value in pairs) if pairs else ""


def short(error: BaseException) -> str:
    """What an error says, in one line of at most 160 characters."""
    return textwrap.shorten(first_line(error)[:2000], 160, placeholder=" ...") or "no message"


def line_of(error: BaseException) -> str:
    """The line of the learner's that an error came from: its source, or its number where the source is not known."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(NOT_THE_LEARNERS) and "site-packages" not in frame.filename:
            return f"`{frame.line.strip()}`" if frame.line else f"line {frame.lineno} of {frame.name}"
    return ""
