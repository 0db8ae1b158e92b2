"""Decorators for answers that the checks meet as strangers."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

Wrong = list[tuple[str, str, str, Any]]  # exercise id, the mistake, what a fitting message would say, answer
Right = list[tuple[str, str, Any]]  # exercise id, the style, answer


def noting(references: ModuleType) -> tuple[Wrong, Right, Callable, Callable]:
    """Two empty lists, and the decorators `wrong(id, mistake, message)` and `right(id, style)` that fill them.

    The name that was decorated then stands for the reference again, for answers further down that call it.
    """
    wrongs: Wrong = []
    rights: Right = []

    def noted_in(listed: list) -> Callable:
        def decorator(*about: str) -> Callable:
            def note(answer: Any) -> Any:
                listed.append((*about, answer))
                return getattr(references, answer.__name__)

            return note

        return decorator

    return wrongs, rights, noted_in(wrongs), noted_in(rights)
