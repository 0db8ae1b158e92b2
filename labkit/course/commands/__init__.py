"""What `labkit` can be told beyond what a learner needs every day: one module a command.

Each has `add(commands)`, which adds its parser, with `run` set to a function that takes the options and returns the
exit status. Modules import what is slow inside `run`.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any


def add_all(commands: Any) -> None:
    """Add the commands of this folder, in the order of their names."""
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        importlib.import_module(f"{__name__}.{module.name}").add(commands)
