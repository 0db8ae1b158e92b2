"""Blanks of a notebook, found by their checks.

`fill` puts the references into them: what an instructor reads, and what proves that every check accepts its reference.
"""

from __future__ import annotations

import ast
import copy
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from nbformat import NotebookNode

from labkit.course.exercise import Exercise

CHECK = re.compile(r"""^(\w+) = lab\.check\(\s*["'](\d\d\.\w+)["'],\s*(\w+)\s*\)""", re.MULTILINE)
CARDS = ("check", "summary")  # what these print depends on what the learner has written


@dataclass(frozen=True)
class Blank:
    """A blank in a notebook: the cell's index, the exercise it belongs to, and the name that the learner defines."""

    cell: int
    exercise: str
    name: str


def code_cells(notebook: NotebookNode) -> Iterator[tuple[int, NotebookNode]]:
    """The code cells with something in them, with their index."""
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "code" and cell.source.strip():
            yield index, cell


def blanks(notebook: NotebookNode) -> list[Blank]:
    """Every blank, in order."""
    found = []
    for index, cell in code_cells(notebook):
        for match in CHECK.finditer(cell.source):
            target, exercise, name = match.groups()
            if target != name:
                raise ValueError(f"{exercise}: the check's result must go back to {name!r}, not to {target!r}")
            found.append(Blank(index, exercise, name))
    return found


def definition(source: str, name: str) -> ast.FunctionDef | ast.ClassDef:
    """The function or class called `name` at the top level of `source`."""
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return node
    raise ValueError(f"no function or class {name!r} in the cell that checks it")


def source_of(reference: Callable) -> str:
    """The source of a reference, as a learner would have written it in a cell."""
    return textwrap.dedent(inspect.getsource(reference)).rstrip()


def fill(notebook: NotebookNode, exercises: Mapping[str, Exercise]) -> NotebookNode:
    """A copy of `notebook` with every blank filled by its reference, and without outputs."""
    filled = copy.deepcopy(notebook)
    for blank in blanks(notebook):
        cell = filled.cells[blank.cell]
        node = definition(cell.source, blank.name)
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        lines = cell.source.split("\n")
        lines[first - 1 : node.end_lineno] = source_of(exercises[blank.exercise].reference).split("\n")
        cell.source = "\n".join(lines)
    for _, cell in code_cells(filled):
        cell.outputs, cell.execution_count = [], None
    return filled


def shows_card(cell: NotebookNode) -> bool:
    """Whether a cell's output holds the card of a check."""
    return any(f"lab.{name}(" in cell.source for name in CARDS)
