"""The exercises, one module a lab. `contents("02")` finds a lab's."""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from labkit.course.exercise import LabContents, Mistyped


def numbers() -> list[str]:
    """The labs there are, as "01", "02", ..."""
    return sorted(module.name.removeprefix("lab") for module in pkgutil.iter_modules(__path__))


def contents(number: str) -> LabContents:
    """What lab `number` holds; Mistyped names the labs when there is no such lab."""
    known = numbers()
    wanted = f"{number:02d}" if isinstance(number, int) else str(number).strip()
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, n=2, cutoff=0.3) or known
        raise Mistyped(f"there is no lab {wanted!r}; nearest: {', '.join(near)}")
    return importlib.import_module(f"{__name__}.lab{wanted}").CONTENTS
