"""How much the kernels' tests try: on a GPU all; where Triton's interpreter runs every operation in Python, a quarter.

Examples are drawn anew in each run, so that what one run leaves out others try.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import settings
from hypothesis import strategies as st

INTERPRETED = not torch.cuda.is_available()
SHARE = 4


def examples(count: int) -> settings:
    """Settings of a test whose every example runs a Triton kernel."""
    return settings(max_examples=-(-count // SHARE) if INTERPRETED else count, deadline=None)


def runs_triton(draw: Callable) -> bool:
    """Whether an example runs the Triton kernel beside the twin and the CPU's loops, which are fast."""
    return not INTERPRETED or draw(st.integers(1, SHARE)) == SHARE
