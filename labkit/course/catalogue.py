"""Which labs there are: each is a folder in `labkit/labs`. `contents("02")` finds what a lab holds."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re

from labkit.course.contents import LabContents, Mistyped

LABS = "labkit.labs"  # by name: what a course is made of imports the course, not the other way round
LAB = re.compile(r"lab\d\d")


def numbers() -> list[str]:
    """The labs there are, as "01", "02", ..."""
    folders = pkgutil.iter_modules(importlib.import_module(LABS).__path__)
    return sorted(module.name.removeprefix("lab") for module in folders if LAB.fullmatch(module.name))


def contents(number: str) -> LabContents:
    """What lab `number` holds; Mistyped names the labs when there is no such lab."""
    known = numbers()
    whole = isinstance(number, int) and not isinstance(number, bool)
    wanted = f"{number:02d}" if whole else str(number).strip()
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, n=2, cutoff=0.3) or known
        raise Mistyped(f"there is no lab {wanted!r}; nearest: {', '.join(near)}")
    return importlib.import_module(f"{LABS}.lab{wanted}").CONTENTS
