"""Waiting: a bar for whoever looks on, and nothing in what a notebook stores."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def bar(items: Iterable[Item] | None, what: str, *, total: int | None = None) -> Any:
    """tqdm's bar over `items`, when somebody looks on; it leaves nothing behind. what: said beside it.

    It goes where a cell prints, so that the next line takes its place; of stderr, JupyterLab would keep a red strip.
    """
    return tqdm(items, desc=what, total=total, leave=False, file=sys.stdout, delay=1.0, disable=not watched())


def watched() -> bool:
    """Whether somebody looks on. A kernel that may not ask for input is run by a program, which would store the bar."""
    from IPython import get_ipython

    kernel = getattr(get_ipython(), "kernel", None)
    return bool(getattr(kernel, "_allow_stdin", False))
