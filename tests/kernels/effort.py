"""How much the kernels' tests try: on a GPU all; where Triton's interpreter runs every operation in Python, a quarter.

Examples are drawn anew in each run, so that what one run leaves out others try.
"""

from __future__ import annotations

import os

from hypothesis import settings

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHARE = 4
MOST = 80 if INTERPRETED else 150  # tokens
FEW = 2 if INTERPRETED else 3  # rows, heads


def examples(count: int) -> settings:
    """Settings of a test whose every example runs a Triton kernel."""
    return settings(max_examples=-(-count // SHARE) if INTERPRETED else count, deadline=None)
