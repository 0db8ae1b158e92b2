"""The runtime around a check: time, prints, random state, blanks, and what is no function at all."""

from __future__ import annotations

import time

import pytest
import torch

from labkit.course.examine import examine
from tests.course.exercises import Count, Counter, Double, double


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


def test_keyboard_interrupt_reaches_the_learner() -> None:
    def interrupted(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        examine(Double(), interrupted)
