"""The runtime around a check: an answer is put to the test in limited time; whatever it does becomes a verdict.

What is limited is the time that a check computes, so that a busy machine makes no right answer a slow one; a larger
limit of time on the wall is behind it, for an answer that waits.

A check runs in a thread of its own. When its time is up, the thread that waits for it raises `TimeIsUp` in it, again
and again until it ends: no signal is involved, so it works in any thread, and what arrives too late hits nothing. What
PyTorch and Python keep per thread (modes, grad mode, default device, ...) ends with the thread; what they keep per
process is in `settings.py`, and put back.
"""

from __future__ import annotations

import contextlib
import ctypes
import dis
import functools
import inspect
import io
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import CodeType
from typing import Any

import numpy as np
import torch

from labkit.course import settings
from labkit.course.checks.tensors import SHIFT, cases_of
from labkit.course.exercise import Exercise, Finding, NotYet, aside, line_of, short

TIME_LIMIT = 20.0  # seconds of computing for one check; the slowest reference needs under 2
WAITING = 3  # times the limit: how long it may take on the wall, where it waits or the machine is busy
PATIENCE = 30.0  # seconds more for a call that cannot be interrupted, before it is left to itself
DEEPEST = 10_000  # calls within calls, at most, while a check runs: what the stack below has room for
STACK = 256 * 2**20  # bytes for the check's thread: 26 KB a call, where one through PyTorch and back takes under 10
TEXT = 2_000  # characters of each part of a finding, at most
ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check: "pass", "pending" or "not yet" (then with its finding), and what the answer printed."""

    status: str
    finding: Finding | None = None
    printed: str = ""


class TimeIsUp(BaseException):
    """Not an Exception: a learner's `except Exception` must not swallow it."""


def examine(
    exercise: Exercise, answer: Any, *, limit: float = TIME_LIMIT, patience: float = PATIENCE, seed: int = 0
) -> Verdict:
    """Put `answer` to the test. Holds back what it prints, puts back what it sets, and never raises for a wrong answer.

    The check sees float32 as the default dtype, the CPU as the default device, one thread for each of PyTorch's
    functions, and random numbers from `seed` on: another seed makes other tensors of the same sizes. One process has
    one random state: what another thread draws meanwhile is drawn from the check's. limit: seconds that it may compute;
    it is stopped after `WAITING` times as many on the wall, too.
    A call that is still not back `patience` seconds later is left behind in its thread. A check inside a check has the
    outer one's time and seed.

    Raises ValueError for a seed that is no whole number from 0 to 2**32 - 1.
    """
    trial = Trial(exercise, answer)
    if isinstance(threading.current_thread(), Trial):
        with settings.restored(), aside():
            prepare(SHIFT[0])
            return Verdict(*trial.judge())
    with ONE_AT_A_TIME, cases_of(seed), settings.restored():
        start = time.monotonic()
        prepare(SHIFT[0])
        trial.shield()
        try:
            trial.start()
            try:
                trial.finish(limit, patience)
            except BaseException:  # the learner's Ctrl-C; a second one does not wait for the answer to end
                trial.finish(0.0, patience)
                raise
        finally:
            computed = trial.computed()
            trial.released = True
            if trial.over:
                trial.join(1.0)
        taken = time.monotonic() - start
    if sys.stderr and (errors := trial.stderr.text()):
        sys.stderr.write(errors)
    if trial.stopped or computed > limit:  # a call that keeps the interpreter to itself ends before it can be stopped
        return Verdict("not yet", too_slow(limit, taken, computed, trial.over), trial.stdout.text())
    return Verdict(*trial.result, trial.stdout.text())


def prepare(seed: int = 0) -> None:
    """What every check starts from, whatever the learner set before."""
    if torch._C._get_default_device() != "cpu":
        settings.set_tensor_type("cpu")
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)  # tensors are small: on a busy machine a second thread is mostly waited for
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed: before CUDA is used, it keeps the seed for then
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


class Trial(threading.Thread):
    """One check in its thread. `over` once it has ended, then `result`; `stopped` when its time was up before."""

    def __init__(self, exercise: Exercise, answer: Any) -> None:
        super().__init__(daemon=True, name=f"check {exercise.id}")
        self.exercise, self.answer = exercise, answer
        self.stdout, self.stderr = Printed(), Printed()
        self.begun = self.over = self.stopped = self.released = False
        self.clock: Callable[[], float] = float
        self.latest = 0.0
        self.result: tuple[str, Finding | None] = ("not yet", UNSAYABLE)
        self.storm: Any = None
        self.wake = threading.Lock()
        self.wake.acquire()

    def run(self) -> None:
        """Judge, then wait to be released.

        `TimeIsUp` comes where Python looks for it: at a call, and where a loop jumps back. So there is neither between
        an error that ends `judge` and `over`, after which no more is sent; one still on its way then ends the wait.
        """
        self.clock = own_clock()
        try:
            self.begun = True
            self.result = self.judge()
        except BaseException:  # TimeIsUp, or an error whose own text raises another
            # Here too: Python 3.12 looks on the way out of a handler, and what comes there is caught by it once more.
            self.over = True
            if self.storm:
                self.storm.__init__ = BaseException.__init__
        self.over = True
        if self.storm:
            self.storm.__init__ = BaseException.__init__
        try:
            self.wake.release()
            while not self.released:
                time.sleep(0.0005)
        except TimeIsUp:
            pass

    def computed(self) -> float:
        """Seconds that it has computed so far."""
        with contextlib.suppress(OSError):  # the thread has ended
            self.latest = self.clock()
        return self.latest

    def finish(self, limit: float, patience: float) -> None:
        """Wait until it is over; once it has computed for `limit` seconds, or `WAITING` times as many are gone, stop
        it, for at most `patience` seconds more."""
        end, up, ident, sent = time.monotonic() + WAITING * limit, 0.0, self.ident or 0, 0
        while self.is_alive() and not self.over:
            now = time.monotonic()
            if not up and (left := min(limit - self.computed(), end - now)) > 0:
                self.wake.acquire(timeout=min(left, 0.1))  # briefly: a lock may be deaf to Ctrl-C
                continue
            up = up or now
            if now - up >= patience:
                break
            error = self.storm or TimeIsUp
            if self.begun and not self.over:  # no other thread runs between these lines
                self.stopped, sys.unraisablehook = True, bool  # one that ends in a `__del__` is no news
                raise_in(ident, error)
            sent += 1
            self.wake.acquire(timeout=0.001 if sent == 1 else 0.01)
            if sent == 3:
                # A bare `except:` swallows them. From now on each one that is caught sends the next, before the handler
                # runs: it comes where nothing catches it. Made of C calls, since a call of Python's would be hit.
                storm: Any = type("TimeIsUp", (TimeIsUp,), {})
                storm.__init__ = staticmethod(functools.partial(raise_in, ident, storm))
                self.storm = storm

    def judge(self) -> tuple[str, Finding | None]:
        """The status and the finding. Whatever is raised while an error is put into words is raised."""
        torch.set_flush_denormal(False)  # a thread starts with that of the thread that starts it
        try:
            with torch.no_grad():
                check_callable(self.exercise, self.answer)
                self.exercise.trial(self.answer)
        except NotYet as not_yet:
            return "not yet", plain(not_yet.finding)
        except TimeIsUp:
            raise
        except BaseException as error:  # SystemExit and KeyboardInterrupt too: a real Ctrl-C goes to the main thread
            if is_blank(error, self.exercise, self.answer):
                return "pending", None
            return "not yet", plain(raised(error, self.answer))
        return "pass", None

    def shield(self) -> None:
        """Give this thread streams of its own and a deep stack, and keep it from what would end the process."""
        for name, own in (("stdin", io.StringIO()), ("stdout", self.stdout), ("stderr", self.stderr)):
            setattr(sys, name, ByThread(self, own, getattr(sys, name)))
        for owner, name in settings.FORBIDDEN:
            if hasattr(owner, name):
                setattr(owner, name, self.forbidden(name, getattr(owner, name)))
        allow, least = sys.setrecursionlimit, min(sys.getrecursionlimit(), DEEPEST)
        allow(least)
        threading.stack_size(STACK)
        # Both ways: the thread that waits has a stack that is deeper than some limits, and must go on.
        sys.setrecursionlimit = lambda limit: allow(max(least, min(limit, DEEPEST)) if self.is_here() else limit)

    def forbidden(self, name: str, function: Callable) -> Callable:
        """`function`, except in this thread."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.is_here():
                raise RuntimeError(f"{name} is not for a function that is being checked")
            return function(*args, **kwargs)

        return call

    def is_here(self) -> bool:
        """Whether this thread asks: not another one, nor its twin in a process that was forked off."""
        return threading.get_ident() == self.ident and os.getpid() == HOME


def own_clock() -> Callable[[], float]:
    """The seconds that this thread has computed, to be asked from any thread; where no system tells, the process."""
    if hasattr(time, "pthread_getcpuclockid"):
        return functools.partial(time.clock_gettime, time.pthread_getcpuclockid(threading.get_ident()))
    start = time.process_time()
    return lambda: time.process_time() - start


HOME = os.getpid()
# raise_in(thread's ident, type): raise it there
raise_in = ctypes.PYFUNCTYPE(None, ctypes.c_ulong, ctypes.py_object)(("PyThreadState_SetAsyncExc", ctypes.pythonapi))


class ByThread:
    """A stream that is one thing in a trial's thread, and what it was before in every other."""

    def __init__(self, trial: Trial, own: Any, others: Any) -> None:
        self._trial, self._own, self._others = trial, own, others

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own if threading.get_ident() == self._trial.ident else self._others, name)


class Kept(io.BufferedIOBase):
    """The first bytes of what is written; the rest is dropped, and nothing closes it."""

    name = "<check>"

    def __init__(self) -> None:
        self.data = b""

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, data: Any) -> int:
        """Keep `data` while there is room; say it was all written."""
        self.data += bytes(data[: Printed.LIMIT - len(self.data)])
        return len(data)

    def close(self) -> None:
        """Stay open."""


class Printed(io.TextIOWrapper):
    """What an answer prints, up to a limit: an endless loop that prints must not fill the memory."""

    LIMIT = 100_000  # bytes

    def __init__(self) -> None:
        self.kept = Kept()
        super().__init__(self.kept, "utf-8", errors="backslashreplace", newline="\n", write_through=True)

    def text(self) -> str:
        """What was printed."""
        return self.kept.data.decode("utf-8", errors="ignore")


UNSAYABLE = Finding(
    "raised",
    "an error that cannot be shown: its text, or its type's name, raises another",
    "a class of yours that is in the middle of it",
    "the methods `__str__` and `__repr__` of your classes",
)


def plain(finding: Finding) -> Finding:
    """A finding of ordinary strings that can be printed: not too long, and no half of a character."""
    texts = (getattr(finding, field.name) for field in fields(Finding))
    return Finding(*(str.__getitem__(text, slice(TEXT)).encode("utf-8", "replace").decode() for text in texts))


def raised(error: BaseException, answer: Any) -> Finding:
    """The finding for an error that the check does not explain."""
    cause, look = "what your code returned could not be used", line_of(error) or "the shapes and types in the docstring"
    if isinstance(error, NotImplementedError) and says(answer, error):
        cause, look = "a part is still a blank", "that part"
    return Finding("raised", f"{type(error).__name__}: {short(error)}", cause, look)


def too_slow(limit: float, taken: float, computed: float, over: bool) -> Finding:
    """The finding for a check that was stopped, or could not be: after `taken` seconds, `computed` of them at work."""
    waited = computed < limit
    allowed = WAITING * limit if waited else limit
    seen = f"no answer after {allowed:g} seconds" + (f", {computed:.1f} of them at work" if waited else "")
    if not over:
        seen += f"; after {taken:.0f} it is still in a call that cannot be interrupted, and was left there"
    elif taken > allowed + 1 and (waited or computed > limit + 1):
        seen += f"; it took {taken:.1f}, in a call that cannot be interrupted"
    if waited:
        return Finding(
            "too-slow",
            seen,
            "your code waits for something, such as a sleep, a lock or another thread; or the machine had no time for "
            "it",
            "run the check again when less runs beside it; where it ends like this again, look for what waits",
        )
    return Finding(
        "too-slow",
        seen,
        "a loop that never ends, or work that grows with every step",
        "the condition that should end your loop",
    )


def is_blank(error: BaseException, exercise: Exercise, answer: Any) -> bool:
    """Whether this is what the blank raises as it stands in the notebook: its id, in a statement of its own."""
    return type(error) is NotImplementedError and error.args == (exercise.id,) and says(answer, error)


def says(answer: Any, error: BaseException) -> bool:
    """Whether a `raise` of the answer's own raised this error, and not what it called."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    if not trace or trace.tb_frame.f_code not in own_code(answer):
        return False
    return trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def own_code(answer: Any) -> set[CodeType]:
    """The code of a function, or of a class's methods."""
    found = [member for _, member in inspect.getmembers_static(answer)] if inspect.isclass(answer) else [answer]
    functions = (inspect.unwrap(getattr(thing, "__func__", None) or getattr(thing, "fget", thing)) for thing in found)
    return {function.__code__ for function in functions if inspect.isfunction(function)}


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
        by_name = [name for name, parameter in wanted.parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
        try:
            got.bind(*(name for name in wanted.parameters if name not in by_name), **dict.fromkeys(by_name))
        except TypeError as error:
            exercise.fail(
                "signature",
                seen=f"your function cannot be called as {reference.__name__}{parameters(wanted)}: {error}",
                cause="the parameters of the blank were changed",
                look="restore the first line of the blank",
            )
        for name, parameter in wanted.parameters.items():
            if parameter.default is not inspect.Parameter.empty and not same_default(got, parameter):
                exercise.fail(
                    "signature",
                    seen=f"`{name}` has a default in the blank, {parameter.default!r}, and yours has another or none",
                    cause="the blank's parameters were changed; later cells leave this one out, or give it by name",
                    look="restore the first line of the blank",
                )


def same_default(got: inspect.Signature, wanted: inspect.Parameter) -> bool:
    """Whether a signature has this parameter with its default; one that takes any keyword may have it inside."""
    own = got.parameters.get(wanted.name)
    if own is None:
        return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in got.parameters.values())
    return bool(own.default == wanted.default)


def parameters(signature: inspect.Signature) -> str:
    """The names in a signature, as `(q, k, v)`."""
    return f"({', '.join(signature.parameters)})"
