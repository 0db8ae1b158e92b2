"""Many checks that are stopped at their time limit, in a process of their own: how many does it survive?

    python -m tests.course.timeouts 20000

prints the count, the seconds they took, how often the process died, and whatever else it said.
"""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from labkit.course.examine import examine
from labkit.ledger import ledger
from tests.course.exercises import Double


def loops(x):
    while True:
        pass


def swallows(x):
    while True:
        try:
            while True:
                pass
        except:  # noqa: E722
            sum(range(100))


def allocates(x):
    kept = []
    while True:
        kept = [*kept[-10:], torch.zeros(100, 10)]


def counts(x):
    while True:
        with ledger():
            x + x


def waits(x):
    while True:
        with threading.Lock():
            time.sleep(1e-5)


def tidies(x):
    def numbers():
        try:
            while True:
                yield 1
        finally:
            sum(range(1000))

    while True:
        for _ in zip(numbers(), range(10)):  # noqa: B905
            pass


class Sluggish:
    def __del__(self):
        sum(range(1000))


def drops(x):
    while True:
        Sluggish()
        [Sluggish() for _ in range(10)].sort(key=id)


def prints(x):
    while True:
        print("again")


ANSWERS = (loops, swallows, allocates, counts, waits, tidies, drops, prints)


def stop(count: int) -> None:
    """Stop `count` checks; print a dot for each that ends as it should."""
    draw = random.Random(count)
    for i in range(count):
        verdict = examine(Double(), ANSWERS[i % len(ANSWERS)], limit=draw.uniform(0.0002, 0.001))
        right = verdict.finding and verdict.finding.diagnosis == "too-slow" and not threading.stack_size()
        sys.stdout.write("." if right and threading.active_count() < 10 else "x")
        sys.stdout.flush()


def timeouts(count: int, where: str) -> tuple[int, int, str]:
    """How many were stopped and how often the process died before `count` were, and what it wrote besides.

    where: "main" or "another" thread.
    """
    done, deaths, besides = 0, 0, ""
    while done < count and deaths < 100:
        child = subprocess.run(
            [sys.executable, "-m", "tests.course.timeouts", "--here", where, str(count - done)],
            cwd=Path(__file__).resolve().parents[2],
            capture_output=True,
            text=True,
        )
        done += child.stdout.count(".")
        deaths += child.returncode != 0
        besides += child.stdout.replace(".", "") + child.stderr
    return done, deaths, besides


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "--here":
        sys.unraisablehook = lambda what: None if what.object is Sluggish.__del__ else sys.__unraisablehook__(what)
        if sys.argv[2] == "main":
            stop(int(sys.argv[3]))
        else:
            (thread := threading.Thread(target=stop, args=[int(sys.argv[3])])).start()
            thread.join()
    else:
        for where in ("main", "another"):
            start = time.monotonic()
            done, deaths, besides = timeouts(int(sys.argv[1]) // 2, where)
            seconds = time.monotonic() - start
            print(f"{where} thread: {done:,} timeouts in {seconds:.0f} s, {deaths} deaths")
            print(besides[:2000], end="", flush=True)
