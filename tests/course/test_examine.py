"""The runtime around a check: time, prints, random state, blanks, and what is no function at all."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from labkit.course import cards
from labkit.course.checks.tensors import SHIFT
from labkit.course.examine import TimeIsUp, Trial, Verdict, examine, too_slow
from labkit.course.exercise import Exercise, Finding, NotYet
from tests.course.exercises import Count, Counter, Double, Scaled, double
from tests.course.timeouts import timeouts

ROOT = Path(__file__).resolve().parents[2]


def prints(x):
    print("debugging")
    print(x)
    return x * 2


def hangs(x):
    while True:
        pass


def hangs_and_catches_everything(x):
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            continue


def half_done(x):
    raise NotImplementedError("the second half")


def blank(x):
    raise NotImplementedError("00.1")


def hangs_and_catches_even_more(x):
    while True:
        try:
            time.sleep(0.01)
        except:  # noqa: E722
            time.sleep(0.01)


def hangs_and_prints(x):
    while True:
        print("still here, in a line of some length, again and again")


def exits(x):
    raise SystemExit(1)


@pytest.mark.parametrize("answer", [hangs, hangs_and_catches_everything, hangs_and_catches_even_more, hangs_and_prints])
def test_code_that_hangs_is_stopped_at_the_time_limit(answer) -> None:
    start = time.monotonic()
    verdict = examine(Double(), answer, limit=0.3)
    assert verdict.finding.diagnosis == "too-slow"
    assert time.monotonic() - start < 5


def test_what_an_endless_loop_prints_is_kept_only_up_to_a_limit() -> None:
    assert len(examine(Double(), hangs_and_prints, limit=0.5).printed) == 100_000


def test_an_answer_that_exits_does_not_end_the_session() -> None:
    assert examine(Double(), exits).finding.diagnosis == "raised"


def test_a_stopped_check_leaves_no_alarm_behind() -> None:
    examine(Double(), hangs, limit=0.2)
    time.sleep(0.4)
    assert examine(Double(), double, limit=0.2).status == "pass"
    time.sleep(0.4)


def test_what_code_prints_is_held_back_and_counted(capsys) -> None:
    verdict = examine(Double(), prints)
    assert verdict.status == "pass"
    assert verdict.printed.startswith("debugging\n")
    assert capsys.readouterr().out == ""


def test_an_untouched_blank_is_pending_and_a_half_done_one_is_not() -> None:
    assert examine(Double(), blank).status == "pending"
    assert examine(Double(), half_done).finding.diagnosis == "raised"


@pytest.mark.parametrize("thing", [None, 3, torch.zeros(2), "double"])
def test_something_that_is_no_function_is_said(thing) -> None:
    assert examine(Double(), thing).finding.diagnosis == "not-callable"


def test_an_instance_in_place_of_a_class_is_said() -> None:
    assert examine(Count(), Counter()).finding.diagnosis == "not-callable"
    assert examine(Count(), Counter).status == "pass"
    assert examine(Count(), lambda: Counter()).finding.diagnosis == "not-a-class"


def test_a_check_leaves_the_random_state_as_it_was() -> None:
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    examine(Double(), lambda x: torch.rand(2, 2))
    assert torch.equal(torch.rand(3), want)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True, None, "7"])
def test_a_seed_that_is_none_is_one_error_and_no_later_check_sees_it(seed) -> None:
    with pytest.raises(ValueError, match="the seed of a check is a whole number from 0 to 4,294,967,295, not"):
        examine(Double(), double, seed=seed)
    assert SHIFT == [0]
    assert examine(Double(), double).status == "pass"


def test_the_largest_seed_is_one() -> None:
    assert examine(Double(), double, seed=2**32 - 1).status == "pass"
    assert SHIFT == [0]


@pytest.mark.parametrize("part", ["prepare", "Trial.shield", "Trial.start", "Trial.finish"])
def test_the_seed_of_hidden_cases_is_gone_whatever_is_raised_around_a_check(part: str, monkeypatch) -> None:
    def fails(*args, **kwargs):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(f"labkit.course.examine.{part}", fails)
        with pytest.raises(MemoryError):
            examine(Double(), double, seed=5)
    assert SHIFT == [0]
    assert examine(Double(), double).status == "pass"


def test_a_real_interrupt_reaches_the_learner_and_ends_the_answer() -> None:
    threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        examine(Double(), hangs)
    assert not any(isinstance(thread, Trial) for thread in threading.enumerate())


class Own(BaseException):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration, Own, RecursionError])
def test_whatever_an_answer_raises_is_a_finding(error) -> None:
    def raises(x):
        raise error

    verdict = examine(Double(), raises)
    assert verdict.finding.diagnosis == "raised"
    assert error.__name__ in verdict.finding.seen


# Time


def sleeps(x):
    try:
        time.sleep(1.5)
    except ValueError:
        pass
    return x * 2


def computes(x):
    pow(3, 4_000_000)  # one call in C, with the interpreter's lock held
    return x * 2


def test_a_call_that_cannot_be_interrupted_is_too_slow_and_its_time_is_said() -> None:
    verdict = examine(Double(), sleeps, limit=0.1)
    assert verdict.finding.diagnosis == "too-slow"
    assert "it took 1.5" in verdict.finding.seen


def test_a_call_that_is_deaf_for_seconds_is_waited_for_as_long() -> None:
    def sleeps_long(x):
        end = time.monotonic() + 4
        while time.monotonic() < end:
            try:
                time.sleep(4)
            except ValueError:
                pass
        return x * 2

    start = time.monotonic()
    verdict = examine(Double(), sleeps_long, limit=0.1)
    assert verdict.finding.diagnosis == "too-slow"
    assert time.monotonic() - start < 8


def test_a_call_that_keeps_the_interpreter_to_itself_is_too_slow_too() -> None:
    assert examine(Double(), computes, limit=0.01).finding.diagnosis == "too-slow"


def waits_longer_than_it_computes(x):
    time.sleep(0.6)
    return x * 2


def test_the_limit_counts_what_is_computed_not_what_is_waited() -> None:
    assert examine(Double(), waits_longer_than_it_computes, limit=0.4).status == "pass"


def test_a_loop_is_blamed_where_the_time_was_computed_and_nowhere_else() -> None:
    computed, waited = too_slow(20.0, 24.0, 20.1, True), too_slow(20.0, 60.1, 3.2, True)
    assert computed.seen == "no answer after 20 seconds"
    assert "a loop that never ends" in computed.cause
    assert waited.seen == "no answer after 60 seconds, 3.2 of them at work"
    assert "loop" not in waited.cause
    assert "it took 66.0, in a call that cannot be interrupted" in too_slow(20.0, 66.0, 3.2, True).seen


def test_an_answer_that_waits_is_not_told_of_a_loop() -> None:
    finding = examine(Double(), hangs_and_catches_even_more, limit=0.3).finding
    assert finding.seen.startswith("no answer after 0.9 seconds, 0.")
    assert "loop" not in finding.cause
    assert "the machine had no time for it" in finding.cause


def test_a_check_runs_in_one_thread_of_pytorch_and_puts_the_number_back() -> None:
    seen: list[int] = []
    torch.set_num_threads(2)
    try:
        assert examine(Double(), lambda x: seen.append(torch.get_num_threads()) or x * 2).status == "pass"
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)  # as tests/conftest.py has it


def test_a_number_of_threads_that_an_answer_sets_reaches_no_later_thread() -> None:
    def greedy(x):
        torch.set_num_threads(3)
        return x * 2

    seen: list[int] = []
    assert torch.get_num_threads() == 1  # as tests/conftest.py has it
    assert examine(Double(), greedy).status == "pass"
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [1]


def test_a_call_that_does_not_come_back_is_left_behind() -> None:
    held = threading.Lock()
    held.acquire()
    verdict = examine(Double(), lambda x: held.acquire(), limit=0.1, patience=0.2)
    assert verdict.finding.diagnosis == "too-slow"
    assert "was left there" in verdict.finding.seen
    assert examine(Double(), double).status == "pass"
    held.release()


def test_a_check_inside_a_check_has_the_outer_ones_time() -> None:
    inner = []

    def checks(x):
        inner.append(examine(Double(), double))
        return examine(Double(), hangs, limit=100)

    start = time.monotonic()
    assert examine(Double(), checks, limit=0.3).finding.diagnosis == "too-slow"
    assert time.monotonic() - start < 5
    assert inner == [Verdict("pass")]


@pytest.mark.parametrize("where", ["main", "another"])
def test_a_process_survives_checks_that_are_stopped(where) -> None:
    assert timeouts(150, where) == (150, 0, "")


def test_an_alarm_of_the_learners_comes_when_it_would_have_come() -> None:
    rung = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(time.monotonic()))
    try:
        start = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        examine(Double(), hangs, limit=0.03)
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 0.3
        time.sleep(0.3)
        assert len(rung) == 1
        assert 0.29 < rung[0] - start < 1
    finally:
        signal.signal(signal.SIGALRM, before)


def in_a_thread(run):
    result = []
    thread = threading.Thread(target=lambda: result.append(run()))
    thread.start()
    while thread.is_alive():
        print("main")
        print("main", file=sys.stderr)
        time.sleep(0.01)
    return result[0]


def test_a_check_in_another_thread_has_a_limit_and_leaves_other_threads_prints_alone(capsys) -> None:
    verdict = in_a_thread(lambda: examine(Double(), hangs_and_prints, limit=0.3))
    assert verdict.finding.diagnosis == "too-slow"
    assert "main" not in verdict.printed
    out, err = capsys.readouterr()
    assert set(out.split()) == set(err.split()) == {"main"}
    assert len(out.split()) == len(err.split()) > 3


def test_two_checks_at_once_do_not_mix() -> None:
    def first(x):
        print("first")
        time.sleep(0.2)
        print("first")
        return x * torch.get_default_dtype().itemsize / 2

    def second(x):
        print("second")
        torch.set_default_dtype(torch.float64)
        time.sleep(0.2)
        return x * 2

    with ThreadPoolExecutor() as pool:
        one, two = pool.map(lambda answer: examine(Double(), answer), [first, second])
    assert one.status == two.status == "pass" or one.finding.diagnosis == "values"
    assert one.printed == "first\nfirst\n"
    assert two.printed == "second\n"


# Streams


def test_what_stands_for_the_streams_has_what_streams_have() -> None:
    def looks(x):
        for stream in (sys.stdout, sys.stderr):
            stream.buffer.write(b"bytes\n")
            stream.writelines(["\ud800\n"])
            assert stream.encoding == "utf-8"
            assert not stream.isatty()
            with pytest.raises(io.UnsupportedOperation):
                stream.fileno()
            stream.close()
            print("after", file=stream, flush=True)
        with pytest.raises(EOFError):
            input()
        return x * 2

    verdict = examine(Double(), looks)
    assert verdict.status == "pass", verdict.finding
    assert verdict.printed == "bytes\n\\ud800\nafter\n"


def test_stderr_is_passed_on_up_to_a_limit(capsys) -> None:
    def complains(x):
        while True:
            print("not good", file=sys.stderr)

    examine(Double(), complains, limit=0.5)
    assert len(capsys.readouterr().err) == 100_000


# Blanks


class Blanks(Double):
    reference = Counter

    def examine(self, answer) -> None:
        self.run(answer().add)


class Untouched:
    def add(self):
        raise NotImplementedError("00.1")


class Wrapped:
    @staticmethod
    def helper(x):
        return x

    @property
    def add(self):
        raise NotImplementedError("00.1")


def test_a_blank_in_a_class_is_pending() -> None:
    assert examine(Blanks(), Untouched).status == "pending"
    assert examine(Blanks(), Wrapped).status == "pending"
    assert examine(Blanks(), type("Sub", (Untouched,), {})).status == "pending"


def from_torch(x):
    return torch.nonzero(x.to_mkldnn())


def from_a_helper(x):
    return blank(x)


def from_a_module(x):
    return torch.nn.Module()(x)


def bare(x):
    raise NotImplementedError


@pytest.mark.parametrize("answer", [from_torch, from_a_helper, from_a_module, bare])
def test_only_the_blank_itself_is_an_open_blank(answer) -> None:
    assert examine(Double(), answer).finding.diagnosis == "raised"


def test_what_torch_does_not_implement_is_not_called_a_blank() -> None:
    finding = examine(Double(), from_torch).finding
    assert finding.seen.startswith("NotImplementedError: Could not run")
    assert "blank" not in finding.cause


# Answers that lie, break and blow up


class Hostile:
    """Whatever one asks of it raises."""

    def __getattribute__(self, name):
        raise ValueError("no")

    def fails(self, *args):
        raise ValueError("no")

    __repr__ = __str__ = __eq__ = __len__ = __bool__ = __hash__ = __format__ = __iter__ = __del__ = __call__ = fails


class Endless(Exception):
    def __str__(self):
        while True:
            pass


class Huge(Exception):
    def __str__(self):
        return "huge \ud800 " * 1_000_000


class Unsaid(Exception):
    def __str__(self):
        raise KeyboardInterrupt


class Meta(type):
    @property
    def __name__(cls):
        raise ValueError("no name")


class Liar(torch.Tensor):
    __class__ = int


def raising(error):
    def answer(x):
        raise error

    return answer


class Subtle(str):
    def __getitem__(self, index):
        while True:
            pass

    encode = __format__ = __getitem__


class Deaf:
    def __del__(self):
        while True:
            pass


def named(name):
    def answer(x):
        return None

    answer.__name__ = name
    return answer


class Signed:
    __name__ = property(Hostile.fails)
    __signature__ = property(Hostile.fails)

    def __call__(self, x):
        return x


HOSTILE = {
    "is hostile": Hostile(),
    "gives something hostile": lambda x: Hostile(),
    "is a hostile class": Hostile,
    "an error with an endless text": raising(Endless()),
    "an error with a huge text": raising(Huge()),
    "an error whose text raises": raising(Unsaid()),
    "an error whose type has no name": raising(Meta("Odd", (Exception,), {})()),
    "an error whose arguments are hostile": raising(NotImplementedError(Hostile())),
    "a class that lies": lambda x: Liar(),
    "a finding that is none": raising(NotYet(Finding(Subtle("x"), Subtle("y"), Subtle("z"), "w"))),
    "a finding of the wrong types": raising(NotYet(Finding(1, None, Hostile(), []))),
    "an object that never goes": lambda x: Deaf(),
    "an error that holds an object that never goes": raising(ValueError(Deaf())),
    "a name of its own": named("x" * 1_000_000),
    "a signature that raises": Signed(),
    "time is up": raising(TimeIsUp()),
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("exercise", [Double(), Count()], ids=["function", "class"])
def test_no_answer_makes_a_check_raise_or_hang(exercise, what) -> None:
    start = time.monotonic()
    verdict = examine(exercise, HOSTILE[what], limit=0.5, patience=1)
    assert verdict.status == "not yet"
    assert all(type(text) is str and len(text) <= 2000 for text in vars(verdict.finding).values())
    cards.verdict(exercise, verdict).encode()
    assert time.monotonic() - start < 10


def test_an_error_in_del_is_no_finding(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)  # pytest has its own

    class Broken:
        def __del__(self):
            raise ValueError("gone")

    def answer(x):
        Broken()
        return x * 2

    assert examine(Double(), answer).status == "pass"
    assert "gone" in capsys.readouterr().err


@pytest.mark.parametrize("call", ["os._exit(1)", "os.abort()", "sys.exit(3)", "exit()", "signal.alarm(1)"])
def test_an_answer_cannot_end_the_process(call) -> None:
    def ends(x):
        eval(call, {"os": os, "sys": sys, "signal": signal})

    assert examine(Double(), ends).finding.diagnosis == "raised"


NOTEBOOK = """
import os
from IPython.core.interactiveshell import InteractiveShell

class Shell(InteractiveShell):
    def ask_exit(self):
        os._exit(9)

shell = Shell.instance()
from labkit.course.examine import examine
from tests.course.exercises import Double

assert examine(Double(), lambda x: shell.ask_exit()).finding.diagnosis == "raised"
shell.ask_exit()
"""


def test_exit_in_a_notebook_does_not_end_it() -> None:
    child = subprocess.run([sys.executable, "-c", NOTEBOOK], capture_output=True, text=True, cwd=ROOT)
    assert child.returncode == 9, child.stderr


DEEP = """
import sys, torch, torch.utils.checkpoint
from labkit.course.examine import examine
from tests.course.exercises import Double

class Deep:
    def __getattr__(self, name):
        return getattr(self, name + "x")

class Summed:
    def __eq__(self, other):
        return [self] == [other]

class Sub(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return torch.add(args[0], 1)

def forward(x):
    return torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=True)

class Module(torch.nn.Module):
    def forward(self, x):
        return self(x)

def keyed(x):
    return sorted([1], key=keyed)

answers = [
    lambda x: Deep().x, lambda x: Summed() == Summed(), lambda x: torch.zeros(1).as_subclass(Sub) + 1,
    forward, Module(), keyed,
]
for answer in answers:
    def deep(x, answer=answer):
        sys.setrecursionlimit(10**9)
        return answer(x)
    verdict = examine(Double(), deep, limit=30)
    print(verdict.finding.seen[:60])
assert sys.getrecursionlimit() == 1000
"""


def test_deep_recursion_is_a_finding_and_no_crash() -> None:
    child = subprocess.run([sys.executable, "-c", DEEP], capture_output=True, text=True, cwd=ROOT)
    assert child.returncode == 0, child.stderr
    assert child.stdout.count("RecursionError") == 6, child.stdout


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (lambda x, factor=3.0: x * factor, "pass"),
        (lambda values, factor=3.0: values * factor, "pass"),
        (lambda *args, **kwargs: args[0] * args[1], "pass"),
        (lambda x, factor: x * factor, "not yet"),
        (lambda x, factor=2.0: x * factor, "not yet"),
        (lambda x, times=3.0: x * times, "not yet"),
    ],
)
def test_a_default_belongs_to_the_blank_and_so_does_its_name(answer, status: str) -> None:
    verdict = examine(Scaled(), answer)
    assert verdict.status == status
    if verdict.finding:
        assert verdict.finding.diagnosis == "signature"
        assert "`factor` has a default in the blank, 3.0" in verdict.finding.seen


class Bounded(Exercise):
    """A check of these tests: a blank whose parameters are given by name, as those of a dataclass may be."""

    id = "90.3"
    reference = staticmethod(lambda x, *, most=9, least=0: min(max(x, least), most))

    def examine(self, answer) -> None:
        if self.call(answer, 12, most=10) != 10:
            self.fail("beyond", seen="more than most", cause="-", look="-")


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (lambda x, *, most=9, least=0: min(max(x, least), most), "pass"),
        (lambda x, least=0, most=9: min(max(x, least), most), "pass"),
        (lambda x, *, most=9: min(x, most), "not yet"),
        (lambda x: min(x, 10), "not yet"),
        (lambda x, *, most=8, least=0: min(x, most), "not yet"),
    ],
)
def test_parameters_that_a_blank_takes_by_name_are_asked_for_by_name(answer, status: str) -> None:
    verdict = examine(Bounded(), answer)
    assert verdict.status == status
    if verdict.finding:
        assert verdict.finding.diagnosis == "signature"
