"""Two exercises for the tests: a function and a class."""

from __future__ import annotations

import torch
from torch import Tensor

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


def scaled(x: Tensor, factor: float = 3.0) -> Tensor:
    """`x` times `factor`."""
    return x * factor


class Scaled(Exercise):
    id, title, minutes = "00.3", "Times a factor", 1
    hints = ("one", "two", "three")
    reference = staticmethod(scaled)

    def examine(self, answer) -> None:
        x = torch.tensor([1.0, 2.0])
        self.same(self.call(answer, x, 2.0), x * 2, what="the result", tolerance=1e-6)
