"""Hidden cases: what a check tries besides when a submission is graded, other numbers for each seed.

Most checks draw their tensors (`tensors.draw`) or their operations from the seed. A check whose cases are written down,
because each of them stands for a mistake, adds some of these. A learner never meets them: the findings stay those of
the cases that were chosen.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeVar

from labkit.course.checks.tensors import SHIFT, shifted

Made = TypeVar("Made")


def hidden(make: Callable[[random.Random], Made], count: int = 12) -> list[Made]:
    """So many more cases when the seed is that of hidden cases; none where a learner checks.

    make: a case that the blank's docstring allows, from random numbers that are the same for one seed.
    """
    chance = random.Random(shifted(0))
    return [make(chance) for _ in range(count)] if SHIFT[0] else []
