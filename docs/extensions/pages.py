"""Pages that no list names: whoever adds one to this folder finds it on the site."""

from __future__ import annotations

import re

from sphinx.application import Sphinx

TEACHING = re.compile(r"teach|class|hub|workshop")
MARKS = {"(teaching pages)": True, "(other pages)": False}
BELOW = "\n```{{toctree}}\n:glob:\n:hidden:\n\n{folder}/*\n```\n"


def complete(app: Sphinx, docname: str, content: list[str]) -> None:
    """Put the pages that the index does not name where its marks are, and those in a page's folder below the page."""
    if any(doc.startswith(f"{docname}/") for doc in app.env.found_docs):
        content[0] += BELOW.format(folder=docname.rpartition("/")[2])
    if docname != app.config.root_doc:
        return
    folder = docname.rpartition("/")[0] + "/"
    named = {"index", *re.findall(r"^([\w/]+)$", content[0], re.MULTILINE)}
    found = [doc.removeprefix(folder) for doc in sorted(app.env.found_docs) if doc.startswith(folder)]
    others = [name for name in found if "/" not in name and name not in named]
    for mark, teaches in MARKS.items():
        fitting = [name for name in others if bool(TEACHING.search(name)) is teaches]
        content[0] = content[0].replace(f"{mark}\n", "".join(f"{name}\n" for name in fitting))


def setup(app: Sphinx) -> dict:
    """Complete the index as it is read."""
    app.connect("source-read", complete)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
