"""An exercise: its card, its reference, and checks that tell one wrong answer from another.

An `Exercise` is one small class per blank. `examine(answer)` puts the learner's function to the test with these tools
(`call`, `same`, ...), which notice what goes wrong in any function: it raises, returns nothing, returns NaN, a wrong
shape or dtype, changes its arguments, or never ends. What only this exercise can know it says with `fail`.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import itertools
import signal
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor

from labkit.device import first_line

TIME_LIMIT = 20.0  # seconds for one check; the slowest reference needs under 3 on two cores


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


class Mistyped(ValueError):
    """An id, a guess or a letter that a lab cannot use. A notebook shows the one line that says what to do."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class TimeIsUp(BaseException):
    """Not an Exception: a learner's `except Exception` must not swallow it."""


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check: "pass", "pending" or "not yet" (then with its finding), and what the answer printed."""

    status: str
    finding: Finding | None = None
    printed: str = ""


class Exercise:
    """One blank. Subclasses fill in the card, `reference` and `examine`.

    id: "02.3". title, minutes, difficulty (1 to 5), needs (ids to do first).
    reference: the function or class that fills the blank, ordinary tested code with the stub's name and signature.
    hints: three steps. hints_for: a first step for a diagnosis, said after a check that found it.
    """

    id: ClassVar[str]
    title: ClassVar[str]
    minutes: ClassVar[int]
    difficulty: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ()
    hints: ClassVar[tuple[str, str, str]]
    hints_for: ClassVar[Mapping[str, str]] = {}
    reference: ClassVar[Callable]

    def examine(self, answer: Callable) -> None:
        """Return when `answer` is right; raise `NotYet`, cheapest and most telling finding first, when it is not."""
        raise NotImplementedError

    # Tools for `examine`.

    @staticmethod
    def fail(diagnosis: str, *, seen: str, cause: str, look: str) -> None:
        """Say what only this exercise can know."""
        raise NotYet(Finding(diagnosis, seen, cause, look))

    @classmethod
    def call(cls, answer: Callable, *args: Any, **kwargs: Any) -> Any:
        """`answer(*args, **kwargs)`, whose arguments must come back unchanged and whose result must not be None."""
        kept = copy.deepcopy((args, kwargs))
        result = cls.run(lambda: answer(*args, **kwargs))
        cls.check_unchanged(kept, (args, kwargs))
        if result is None:
            cls.fail(
                "returned-none",
                seen="your function returned None",
                cause="no `return` on the path that was taken",
                look="the last line: return the result",
            )
        return result

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
    def run(cls, step: Callable[[], Any]) -> Any:
        """`step()`, where whatever it raises becomes a finding. For methods of a class the learner wrote."""
        try:
            return step()
        except (NotYet, NotImplementedError):
            raise
        except (Exception, SystemExit) as error:
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
                seen=f"{type(error).__name__}: {short(error)}",
                cause="your code stopped before it returned",
                look=f"the line it stopped at: {where}" if where else "the line that the error names",
            )

    @classmethod
    def same(cls, got: Any, want: Tensor, *, what: str, tolerance: float = 0.0) -> None:
        """Pass when `got` is `want`: type, shape, dtype, no NaN, then values within `tolerance` (0: exact)."""
        cls.like(got, want, what=what)
        if not close(got, want, tolerance):
            difference = (got.double() - want.double()).abs().max().item()
            cls.fail(
                "values",
                seen=f"{what}: the largest difference from the reference is {difference:.3g}",
                cause="the shapes fit but the arithmetic does not",
                look="the blank's docstring and the text above it, one term at a time, with small numbers by hand",
            )

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
            cls.fail(
                "shape",
                seen=f"{what} has shape {list(got.shape)}; it should be {list(want.shape)}",
                cause="a dimension is missing, swapped, or has another length",
                look="the shapes in the docstring, line by line",
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
                cause="a row of scores that is -inf throughout, 0/0, or an overflow",
                look="what softmax gets: at least one score of each row must be finite",
            )


def close(got: Tensor, want: Tensor, tolerance: float) -> bool:
    """Equal to the bit when `tolerance` is 0, else within it everywhere (infinities must agree)."""
    if tolerance == 0:
        return torch.equal(got, want)
    return torch.allclose(got.double(), want.double(), rtol=0.0, atol=tolerance)


def unchanged(before: Any, after: Any) -> bool:
    """Whether nested tensors still hold what they held."""
    if isinstance(before, Tensor):
        return before.shape == after.shape and torch.equal(before, after)
    if isinstance(before, (list, tuple)):
        return len(before) == len(after) and all(map(unchanged, before, after))
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(unchanged(value, after[key]) for key, value in before.items())
    return type(before).__eq__ is object.__eq__ or bool(before == after)  # what has no == of its own is not compared


def short(error: BaseException) -> str:
    """What an error says, in one line of at most 160 characters."""
    return textwrap.shorten(first_line(error), 160, placeholder=" ...") or "no message"


def line_of(error: BaseException) -> str:
    """The source line of the learner's that an error came from, if the traceback has one."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.line and ("ipykernel" in frame.filename or "<ipython" in frame.filename):
            return f"`{frame.line.strip()}`"
    return ""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeIsUp` inside the block after `seconds`. Needs the main thread of a Unix process."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    delays = itertools.cycle((1e-5, 1e-4, 1e-3, 1e-2))
    own = (__file__, contextlib.__file__)

    def stop(number: int, frame: FrameType | None) -> None:
        # A bare `except:` swallows one alarm: the next comes while its block runs, where it is not caught.
        signal.setitimer(signal.ITIMER_REAL, next(delays))
        if frame is None or frame.f_code.co_filename not in own:  # never in the middle of our own clearing up
            raise TimeIsUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Printed(io.StringIO):
    """What an answer prints, up to a limit: an endless loop that prints must not fill the memory."""

    LIMIT = 100_000  # characters

    def write(self, text: str) -> int:
        """Keep `text` while there is room; say it was all written."""
        super().write(text[: max(0, self.LIMIT - self.tell())])
        return len(text)


def examine(exercise: Exercise, answer: Any, *, limit: float = TIME_LIMIT) -> Verdict:
    """Put `answer` to the test. Seeds torch, holds back what the answer prints, and never raises for a wrong answer."""
    printed = Printed()
    state = torch.get_rng_state()
    try:
        with contextlib.redirect_stdout(printed), torch.no_grad(), time_limit(limit):
            torch.manual_seed(0)
            check_callable(exercise, answer)
            exercise.examine(answer)
        return Verdict("pass", printed=printed.getvalue())
    except NotYet as not_yet:
        return Verdict("not yet", not_yet.finding, printed.getvalue())
    except NotImplementedError as error:
        if error.args == (exercise.id,) or not error.args:
            return Verdict("pending", printed=printed.getvalue())
        finding = Finding("raised", f"NotImplementedError: {short(error)}", "a part is still a blank", "that part")
        return Verdict("not yet", finding, printed.getvalue())
    except TimeIsUp:
        finding = Finding(
            "too-slow",
            f"no answer after {limit:g} seconds",
            "a loop that never ends, or work that grows with every step",
            "the condition that should end your loop",
        )
        return Verdict("not yet", finding, printed.getvalue())
    except (Exception, SystemExit) as error:
        finding = Finding(
            "raised",
            f"{type(error).__name__}: {short(error)}",
            "what your code returned could not be used",
            line_of(error) or "the shapes and types in the docstring",
        )
        return Verdict("not yet", finding, printed.getvalue())
    finally:
        torch.set_rng_state(state)


def check_callable(exercise: Exercise, answer: Any) -> None:
    """A finding when `answer` is not a function or class that takes what the blank's signature takes."""
    reference = exercise.reference
    if not callable(answer):
        exercise.fail(
            "not-callable",
            seen=f"lab.check got a {type(answer).__name__}",
            cause="the function was called, or its name was used for something else",
            look=f'pass the function itself: lab.check("{exercise.id}", {reference.__name__})',
        )
    if inspect.isclass(reference) and not inspect.isclass(answer):
        exercise.fail(
            "not-a-class",
            seen="lab.check got something that is not a class",
            cause="an instance was passed",
            look=f'pass the class itself: lab.check("{exercise.id}", {reference.__name__})',
        )
    with contextlib.suppress(TypeError, ValueError):
        wanted, got = inspect.signature(reference), inspect.signature(answer)
        try:
            got.bind(*wanted.parameters)
        except TypeError as error:
            exercise.fail(
                "signature",
                seen=f"your function cannot be called as {reference.__name__}{parameters(wanted)}: {error}",
                cause="the parameters of the blank were changed",
                look="restore the first line of the blank",
            )


def parameters(signature: inspect.Signature) -> str:
    """The names in a signature, as `(q, k, v)`."""
    return f"({', '.join(signature.parameters)})"


@dataclass(frozen=True)
class Prediction:
    """A number asked for before it is shown. `within` is the ratio that counts as close."""

    id: str
    question: str
    unit: str = ""
    within: float = 1.25


@dataclass(frozen=True)
class Quiz:
    """A question, its options, and what to say to each. `right` is the letter of the right one."""

    id: str
    question: str
    options: Mapping[str, str]
    answers: Mapping[str, str]
    right: str


@dataclass(frozen=True)
class LabContents:
    """Everything a lab session can be asked for, by id."""

    number: str
    title: str
    exercises: tuple[Exercise, ...]
    predictions: tuple[Prediction, ...] = ()
    quizzes: tuple[Quiz, ...] = ()
