"""From a notebook of the course to nbgrader's source of an assignment: markers, metadata, points, hidden tests.

The cell of a blank becomes three: the answer (with the reference between nbgrader's markers, and the blank itself in
its metadata, for `Blanks` to put back), the hidden test, and the check that learners see. Whoever is stuck goes on with
the reference, as in the notebook; the hidden test comes before that.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from labkit.course.catalogue import contents
from labkit.course.editions import CHECK, blanks, code_cells, definition, source_of
from labkit.course.exercise import Exercise
from labkit.course.grading.marks import BLANK, marks
from labkit.course.linked import lead, pages, wanted

NOTE = "# {points:g} points: graded by cases that are not shown. Nothing to do here."
HIDDEN = """### BEGIN HIDDEN TESTS
from labkit.course.grading.judge import judge

judge("{id}", globals(), points={points:g}, seed={seed}, limit={limit:g})
### END HIDDEN TESTS"""


def assignment(
    notebook: Path, *, ids: Sequence[str] = (), limit: float = 20.0
) -> tuple[NotebookNode, dict[str, bytes]]:
    """nbgrader's source of a lab: the notebook, and all files of the assignment by their place in its folder, the
    pages that the notebook links to among them.

    ids: of the exercises, where not all of the lab's. limit: seconds that a check may compute. Raises OSError,
    ValueError.
    """
    exercises = {each.id: each for each in contents(notebook.name[:2]).exercises}
    original = nbformat.read(notebook, as_version=4)
    edition = source_edition(cut(original, ids) if ids else original, exercises, limit=limit)
    linked = pages(wanted(edition), notebook.parent, [notebook.name])  # each lab is handed out by itself
    lead(edition, notebook.parent, [notebook.name])
    return edition, {notebook.name: nbformat.writes(edition).encode(), **linked}


def source_edition(
    notebook: NotebookNode, exercises: Mapping[str, Exercise], *, points: Mapping[str, float] | None = None,
    seeds: Mapping[str, int] | None = None, limit: float = 20.0,
) -> NotebookNode:  # fmt: skip
    """A copy of `notebook` as nbgrader's source: no outputs, an answer, a hidden test and a check for every blank.

    points: of each exercise; by default its minutes. seeds: of its hidden cases; by default drawn anew. limit: seconds
    that a check may compute. Raises ValueError where a blank's cell cannot be taken apart.
    """
    edition = copy.deepcopy(notebook)
    for _, cell in code_cells(edition):
        cell.outputs, cell.execution_count = [], None
    by_cell: dict[int, list[str]] = {}
    for blank in blanks(edition):
        by_cell.setdefault(blank.cell, []).append(blank.exercise)
    cells: list[NotebookNode] = []
    for index, cell in enumerate(edition.cells):
        if index not in by_cell:
            cells.append(cell)
            continue
        for id in by_cell[index]:
            if id not in exercises:
                raise ValueError(f"cell {cell.id} checks {id}, which this lab has not")
        cells += taken_apart(cell, [exercises[id] for id in by_cell[index]], points or {}, seeds or {}, limit)
    edition.cells = cells
    return edition


def taken_apart(
    cell: NotebookNode, exercises: Sequence[Exercise], points: Mapping[str, float], seeds: Mapping[str, int],
    limit: float,
) -> list[NotebookNode]:  # fmt: skip
    """The cells that the cell of some blanks becomes."""
    cells, start = [], 0
    matches = list(CHECK.finditer(cell.source))
    for number, (match, exercise) in enumerate(zip(matches, exercises, strict=True)):
        end = cell.source.find("\n", match.end())
        end = len(cell.source) if end < 0 or number == len(matches) - 1 else end
        blank, check = cell.source[start : match.start()].strip("\n"), cell.source[match.start() : end].strip("\n")
        start = end
        tail = exercise.id.replace(".", "-")
        filled = "\n".join(["### BEGIN SOLUTION", filled_in(blank, exercise), "### END SOLUTION"])
        answer = new_code_cell(filled, id=cell.id if number == 0 else f"{cell.id}-{tail}")
        answer.metadata = NotebookNode({BLANK: blank, "nbgrader": marks(f"answer-{tail}", solution=True)})
        worth = float(points.get(exercise.id, exercise.minutes))
        seed = seeds.get(exercise.id, 1 + secrets.randbelow(10**9))
        hidden = HIDDEN.format(id=exercise.id, points=worth, seed=seed, limit=limit)
        test = new_code_cell(f"{NOTE.format(points=worth)}\n{hidden}", id=f"{cell.id}-points-{tail}")
        test.metadata = NotebookNode(nbgrader=marks(f"points-{tail}", points=worth))
        shown = new_code_cell(check, id=f"{cell.id}-check-{tail}")
        shown.metadata = NotebookNode(nbgrader=marks(f"check-{tail}"))
        cells += [answer, test, shown]
    return cells


def filled_in(blank: str, exercise: Exercise) -> str:
    """A blank with the reference in the place of its definition."""
    node = definition(blank, exercise.reference.__name__)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    lines = blank.split("\n")
    lines[first - 1 : node.end_lineno] = source_of(exercise.reference).split("\n")
    return "\n".join(lines)


def cut(notebook: NotebookNode, ids: Sequence[str]) -> NotebookNode:
    """A shorter notebook: the first code cell and all before it, then the blanks of `ids`, each with the text above it.

    Raises ValueError for an id that the notebook has no blank for.
    """
    wanted = {blank.cell for blank in blanks(notebook) if blank.exercise in ids}
    if unknown := set(ids) - {blank.exercise for blank in blanks(notebook)}:
        raise ValueError(f"no blank for {', '.join(sorted(unknown))}")
    first = next(index for index, _ in code_cells(notebook))
    kept = set(range(first + 1)) | wanted | {index - 1 for index in wanted if index > first + 1}
    shorter = copy.deepcopy(notebook)
    shorter.cells = [cell for index, cell in enumerate(shorter.cells) if index in kept]
    return shorter
