"""What a check says to code of every bad kind: it raises, returns nothing, hangs, prints, changes its arguments ..."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from labkit.course.examine import examine
from labkit.course.exercise import Exercise


def double(x: Tensor) -> Tensor:
    """Twice `x`."""
    return x * 2


class Double(Exercise):
    id, title, minutes = "00.1", "Twice as much", 1
    hints = ("one", "two", "three")
    reference = staticmethod(double)

    def examine(self, answer) -> None:
        x = torch.tensor([[1.0, 2.0], [3.0, float("inf")]])
        self.same(self.call(answer, x), x * 2, what="the result", tolerance=1e-6)


class Counter:
    """Counts."""

    def __init__(self) -> None:
        self.count = 0

    def add(self) -> int:
        """One more."""
        self.count += 1
        return self.count


class Count(Exercise):
    id, title, minutes = "00.2", "A counter", 1
    hints = ("one", "two", "three")
    reference = Counter

    def examine(self, answer) -> None:
        counter = self.run(answer)
        if self.run(counter.add) != 1:
            self.fail("count", seen="add() gave something else", cause="it starts elsewhere", look="__init__")


def raises(x):
    return x @ torch.zeros(7, 7)


def returns_none(x):
    x * 2


def changes_argument(x):
    return x.mul_(2)


def changes_shape_of_argument(x):
    x.resize_(1)
    return torch.zeros(2, 2)


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


WRONG = {
    "raised": raises,
    "returned-none": returns_none,
    "arguments-changed": changes_argument,
    "not-a-tensor": lambda x: [2.0, 4.0],
    "shape": lambda x: (x * 2).sum(0),
    "dtype": lambda x: (x * 2).double(),
    "not-finite": lambda x: x * 2 + torch.tensor([[float("nan"), 0], [0, 0]]),
    "values": lambda x: x * 3,
    "signature": lambda: None,
}


@pytest.mark.parametrize("diagnosis", WRONG)
def test_general_mistakes_are_told_apart(diagnosis: str) -> None:
    verdict = examine(Double(), WRONG[diagnosis])
    assert verdict.status == "not yet"
    assert verdict.finding is not None
    assert verdict.finding.diagnosis == diagnosis
    assert all((verdict.finding.seen, verdict.finding.cause, verdict.finding.look))


def test_an_argument_that_lost_its_shape_is_a_finding_too() -> None:
    assert examine(Double(), changes_shape_of_argument).finding.diagnosis == "arguments-changed"


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


def test_a_changed_list_is_seen_as_a_changed_tensor_is() -> None:
    class Last(Double):
        reference = staticmethod(lambda items: items[-1])

        def examine(self, answer) -> None:
            self.call(answer, [1, 2, 3])

    assert examine(Last(), lambda items: items.pop()).finding.diagnosis == "arguments-changed"
    assert examine(Last(), lambda items: items[-1]).status == "pass"


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


def test_an_error_inside_a_method_is_a_finding() -> None:
    class Broken(Counter):
        def add(self):
            return 1 / 0

    assert "division by zero" in examine(Count(), Broken).finding.seen


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
