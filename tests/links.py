"""Links to files in notebooks and pages, and those of a folder that lead nowhere."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat

LINK = re.compile(r"\]\(([^)\s]+)\)")


def text_of(page: Path) -> str:
    """What it says, code left out."""
    if page.suffix == ".md":
        return page.read_text(encoding="utf-8")
    cells = nbformat.read(page, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def local_links(page: Path) -> list[str]:
    """Links to files, without the place in them."""
    targets = [link.split("#")[0] for link in LINK.findall(text_of(page)) if not re.match(r"[a-z]+:", link)]
    return [target for target in targets if target]


def dead_links(folder: Path) -> list[str]:
    """Links of all notebooks and pages in a folder that lead to no file in it."""
    found, root = [], folder.resolve()
    for page in sorted(path for path in folder.rglob("*") if path.suffix in (".md", ".ipynb")):
        for link in local_links(page):
            target = (page.parent / link).resolve()
            if not (target.is_file() and target.is_relative_to(root)):
                found.append(f"{page.relative_to(folder)} leads to {link}")
    return found
