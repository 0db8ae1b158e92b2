"""The runtime around a check: an answer is put to the test in limited time; whatever it does becomes a verdict."""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from labkit.course.exercise import Exercise, Finding, NotYet, line_of, short

TIME_LIMIT = 20.0  # seconds for one check; the slowest reference needs under 3 on two cores


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check: "pass", "pending" or "not yet" (then with its finding), and what the answer printed."""

    status: str
    finding: Finding | None = None
    printed: str = ""


class TimeIsUp(BaseException):
    """Not an Exception: a learner's `except Exception` must not swallow it."""


def examine(exercise: Exercise, answer: Any, *, limit: float = TIME_LIMIT) -> Verdict:
    """Put `answer` to the test. Seeds torch, holds back what the answer prints, and never raises for a wrong answer."""
    printed = Printed()
    state = torch.get_rng_state()
    try:
        with contextlib.redirect_stdout(printed), torch.no_grad(), time_limit(limit):
            torch.manual_seed(0)
            check_callable(exercise, answer)
            exercise.trial(answer)
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
