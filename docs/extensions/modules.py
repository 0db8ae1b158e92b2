"""Modules that no page of the API names: whoever adds one to a room of labkit finds it on that room's page.

A line `(modules of labkit.engine)` on a page of docs/api becomes a section for each; several rooms may be named.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

from sphinx.application import Sphinx

API = Path(__file__).resolve().parents[1] / "api"
ROOT = API.parents[1]
LINE = re.compile(r"^\(modules of ([\w. ]+)\)$", re.MULTILINE)
INSIDE = ("labkit.labs.", "labkit.course.commands.", "labkit.course.jupyter.")  # content of labs; what the shell calls
SECTION = "## {module}\n\n```{{eval-rst}}\n.. automodule:: {module}\n```\n"


def modules(room: str) -> Iterator[str]:
    """The modules of a package, and of packages in it that have no page of their own."""
    folder = ROOT / room.replace(".", "/")
    for path in sorted(folder.glob("*.py") if room in ("labkit", "labkit.cache") else folder.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if not path.name.startswith("__") and not module.startswith(INSIDE):
            yield module


def named() -> set[str]:
    """Modules that a page names itself."""
    return {
        module
        for page in API.glob("*.md")
        for module in re.findall(r"automodule:: ([\w.]+)", page.read_text(encoding="utf-8"))
    }


def expand(app: Sphinx, docname: str, content: list[str]) -> None:
    """Write out the line of a page of the API."""
    if docname.startswith("docs/api/"):
        content[0] = LINE.sub(
            lambda found: "\n".join(
                SECTION.format(module=module)
                for room in found.group(1).split()
                for module in modules(room)
                if module not in named()
            ),
            content[0],
        )


def load(app: Sphinx) -> None:
    """Import what takes seconds once, before Sphinx forks: each process that reads pages would do it again."""
    importlib.import_module("labkit.hf")
    importlib.import_module("labkit.kernels.paged_attention_cpu")


def setup(app: Sphinx) -> dict:
    """Expand pages as they are read."""
    app.connect("builder-inited", load)
    app.connect("source-read", expand)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
