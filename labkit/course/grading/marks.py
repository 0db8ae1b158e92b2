"""What the cells of an assignment are marked with, for nbgrader and for the course.

Every process that runs a submission imports this: neither torch nor nbformat, which takes longer than torch to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbformat import NotebookNode

SCHEMA = 3  # of nbgrader's metadata
BLANK = "labkit_blank"  # the metadata of an answer's cell that holds what a learner finds there
KIND = "application/vnd.labkit.points+json"  # the output of a graded cell that holds its points and the reason


def marks(grade_id: str, *, solution: bool = False, points: float | None = None) -> NotebookNode:
    """nbgrader's metadata for an answer, for a test with points, or for a cell that is locked."""
    from nbformat import NotebookNode

    graded = points is not None
    found = {
        "schema_version": SCHEMA, "grade_id": grade_id, "grade": graded, "solution": solution, "locked": not solution,
        "task": False,
    }  # fmt: skip
    return NotebookNode(found | ({"points": points} if graded else {}))
