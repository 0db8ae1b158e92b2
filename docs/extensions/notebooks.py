"""Notebooks as a page without a kernel shows them: figures with alternative text, and what a widget would have been."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import nbformat
from nbformat import NotebookNode

LABS = Path(__file__).resolve().parents[2] / "labkit" / "labs"
DRAWING = re.compile(r"\b(?:figures|plots|\w+_figure)\.(\w+)\(")
WIDGET = "application/vnd.jupyter.widget-view+json"
INSTEAD = "*Controls stand here while the notebook runs. The picture above shows one of their settings.*"


def read(text: str) -> NotebookNode:
    """A notebook from its file's text."""
    notebook = nbformat.reads(text, as_version=4)
    lab = ""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        if found := re.search(r"\bLab\(\"(\d\d)\"", cell.source):
            lab = found.group(1)
        for output in cell.outputs:
            if WIDGET in output.get("data", {}):
                output.data, output.metadata = NotebookNode({"text/markdown": INSTEAD}), NotebookNode()
        if alt := alternative(cell, lab):
            cell.metadata["mystnb"] = {"image": {"alt": alt}}
    return notebook


def alternative(cell: NotebookNode, lab: str) -> str:
    """What the figures of a cell show: as the outputs themselves say, or else the functions that drew them."""
    pictures = [output for output in cell.outputs if "image/png" in output.get("data", {})]
    said = [output.metadata.get("image/png", output.metadata).get("alt", "") for output in pictures]
    if any(said):
        return " ".join(said)
    known = drawn(lab) if pictures and lab else {}
    return " ".join(known[name] for name in DRAWING.findall(cell.source) if name in known)


@cache
def drawn(lab: str) -> dict[str, str]:
    """What each function of a lab's figures, or of all labs', draws: the first sentence of its docstring."""
    return {
        node.name: first_sentence(ast.get_docstring(node) or "")
        for path in [*(LABS.parent / "plots").glob("*.py"), *(LABS / f"lab{lab}").glob("*figure*.py")]
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }


def first_sentence(docstring: str) -> str:
    """Up to the first full stop that ends a sentence, on one line and without marks of code."""
    paragraph = " ".join(docstring.split("\n\n")[0].split()).replace("`", "")
    return re.split(r"(?<=\.)\s+(?=[A-Z])", paragraph)[0]
