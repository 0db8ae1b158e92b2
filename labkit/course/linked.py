"""What notebooks link to beside their folder, put among them: where they are opened, nothing lies above.

In the tree a notebook links to `../docs/glossary.md`; its copy for a learner links to `reading/docs/glossary.md`, and
that page lies there. `reading/` keeps the tree's layout, so that links from page to page stay as they are. What is not
beside the notebooks is the course's own, where it has it. A notebook's link to what is nowhere, and any link to a lab
that does not lie there, becomes plain words.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Collection, Iterable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

from labkit.places import beside, course_folder

FOLDER = "reading"
ABOVE = re.compile(r"\]\(\.\./([^)#\s]+)")  # a notebook's link to a file beside `notebooks/`
BESIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)#\s]+)(?:#[^)\s]*)?\)")  # the same, whole
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)")  # a page's link to any file
LAB = re.compile(r"\[([^\]]*)\]\((?:[^)#\s]*/)?(\d\d_\w+\.ipynb)(?:#[^)\s]*)?\)")  # a link to a notebook, whole

Notebook = MutableMapping[str, Any]  # as json or nbformat reads it


def texts(notebook: Notebook) -> Iterator[MutableMapping[str, Any]]:
    """The text cells."""
    return (cell for cell in notebook.get("cells", []) if cell["cell_type"] == "markdown")


def wanted(notebook: Notebook) -> set[str]:
    """The files that its text links to beside its folder, as paths from the top of the tree."""
    return {path for cell in texts(notebook) for path in ABOVE.findall("".join(cell["source"]))}


def origin(notebooks: Path, path: str) -> Path | None:
    """The file that a notebook links to, by its path from the top of the tree; None where it is nowhere.

    notebooks: the folder that the notebook lies in; beside a teacher's own lies no page: the course's are meant.
    """
    places = (beside(folder, path) for folder in (notebooks, course_folder("notebooks")))
    return next((file for file in places if file.is_file()), None)


def lead(notebook: Notebook, notebooks: Path, there: Collection[str]) -> None:
    """Turn these links to `reading/`, in place; those to files that are nowhere become plain words.

    notebooks: the folder that it lies in. there: the names of the notebooks that will lie beside this one.
    """
    for cell in texts(notebook):
        source = cell["source"]  # nbformat's is one text, a file's a list of lines
        text = BESIDE.sub(lambda link: link[0] if origin(notebooks, link[2]) else link[1], "".join(source))
        text = unlinked(ABOVE.sub(rf"]({FOLDER}/\1", text), there)
        cell["source"] = text if isinstance(source, str) else text.splitlines(keepends=True)


def unlinked(text: str, there: Collection[str]) -> str:
    """Text whose links to notebooks that are not `there` are plain words."""
    return LAB.sub(lambda link: link[0] if link[2] in there else link[1], text)


def pages(paths: Iterable[str], notebooks: Path, there: Collection[str]) -> dict[str, bytes]:
    """These files and those that they link to in turn, by their place beside the notebooks that link to them.

    paths: from the top of the tree. notebooks: the folder that the notebooks lie in. there: the names of the notebooks
    that `reading/` will lie among; links to them lead there. A file that is nowhere is left out.
    """
    found: dict[str, bytes] = {}
    left = sorted(set(paths), reverse=True)
    while left:
        path = left.pop()
        place, file = f"{FOLDER}/{path}", origin(notebooks, path)
        if place in found or not file:
            continue
        found[place] = file.read_bytes()
        if file.suffix == ".md":
            text = file.read_text(encoding="utf-8")
            folder = posixpath.dirname(path)
            inner = {link: posixpath.normpath(posixpath.join(folder, link)) for link in LINK.findall(text)}
            left += sorted(to for to in inner.values() if not to.startswith(("/", "../", "notebooks/")))
            for link, to in inner.items():
                if to.startswith("notebooks/"):
                    up = posixpath.relpath(to.removeprefix("notebooks/"), posixpath.dirname(place))
                    text = text.replace(f"]({link}", f"]({up}")
            found[place] = unlinked(text, there).encode()
    return dict(sorted(found.items()))


def opened(notebooks: Path) -> dict[str, bytes]:
    """All that a learner's folder gets, by its place there: the notebooks of a folder, and what they link to.

    A file that is no notebook is copied as it is: Jupyter says what is wrong with it.
    """
    made, linked = {}, set()
    there = {path.name: path for path in sorted(notebooks.glob("*.ipynb"))}
    for path in there.values():
        made[path.name] = path.read_bytes()
        try:
            notebook = json.loads(made[path.name])
            here = wanted(notebook)
        except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
            continue
        if here:
            lead(notebook, notebooks, there)
            made[path.name] = to_bytes(notebook)
            linked |= here
    return made | pages(linked, notebooks, there)


def to_bytes(notebook: Notebook) -> bytes:
    """A notebook as a file's content, as nbformat writes it."""
    return (json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode()
