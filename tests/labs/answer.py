"""Wrong answers: the mistakes people really make, each with the diagnosis that its check must give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Wrong:
    """One wrong answer. `mistake` says in a few words what is wrong; `source` where it was met, if it was."""

    exercise: str
    diagnosis: str
    mistake: str
    answer: Callable
    source: str = ""
