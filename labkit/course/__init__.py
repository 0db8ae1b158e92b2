"""What makes notebooks a course: `Lab`, exercises, progress, and the commands that set a learner up."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from labkit.course.lab import Lab

__all__ = ["Lab"]


def __getattr__(name: str):
    # Lazy: `labkit doctor` and `labkit open` must work, and fast, where torch does not even import.
    if name == "Lab":
        from labkit.course.lab import Lab

        return Lab
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
