"""What a run of grading leaves for the teacher: totals as nbgrader exports them, and each exercise with its reason."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat

from labkit.course.grading.marks import KIND
from labkit.files import write_whole

COLUMNS = (
    "student",
    "assignment",
    "exercise",
    "title",
    "points",
    "most",
    "status",
    "diagnosis",
    "seen",
    "likely",
    "look",
)
EARLIER = "the points are of what was handed in before"
LONGEST = 2000  # characters of a card that are taken
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would compute


def write(folder: Path, problems: Mapping[str, Mapping[str, str]]) -> None:
    """Write `grades.csv` with nbgrader's exporter, and `reasons.csv`.

    problems: for each assignment of the class, why what students handed in last has no points.
    """
    from nbgrader.plugins import CsvExportPlugin

    with gradebook(folder) as book:
        exporter = CsvExportPlugin()
        exporter.to = str(folder / "grades.csv")
        exporter.export(book)
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    for row in (row for assignment, amiss in problems.items() for row in rows(folder, assignment, amiss)):
        table.writerow({name: safe(row.get(name, "")) for name in COLUMNS})
    write_whole(folder / "reasons.csv", text.getvalue().encode())


def rows(folder: Path, assignment: str, problems: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """A row for each problem, and one for each student and exercise that has points.

    A student can have both: what was handed in last is not graded, and the points are of what came before.
    """
    with gradebook(folder) as book:
        for student in sorted({each.id for each in book.students} | set(problems)):
            own = {"student": student, "assignment": assignment}
            graded = list(graded_rows(book, folder, assignment, student))
            if student in problems and graded:
                yield own | {"status": "latest not graded", "seen": problems[student], "look": EARLIER}
            elif student in problems:
                yield own | {"status": "not graded", "seen": problems[student]}
            yield from (own | row for row in graded)


def graded_rows(book: Any, folder: Path, assignment: str, student: str) -> Iterator[dict[str, Any]]:
    """A row for each exercise of a student that has points in the gradebook, as its totals have them."""
    from nbgrader.api import MissingEntry

    try:
        submitted = book.find_submission(assignment, student).notebooks
    except MissingEntry:  # of another lab's class
        return
    for notebook in submitted:
        file = folder / "autograded" / student / assignment / f"{notebook.name}.ipynb"
        cards = reasons(file) if file.exists() else {}
        for grade in notebook.grades:
            if grade.auto_score is None and grade.manual_score is None:  # the first grading failed
                continue
            exercise = grade.name.removeprefix("points-").replace("-", ".")
            yield {
                "exercise": exercise, "points": f"{grade.score:g}", "most": f"{grade.max_score:g}"
            } | cards.get(grade.name, {})  # fmt: skip


def reasons(file: Path) -> dict[str, dict[str, str]]:
    """What the graded cells of an executed notebook say, by their ids."""
    found: dict[str, dict[str, str]] = {}
    for cell in nbformat.read(file, as_version=4).cells:
        marks = cell.metadata.get("nbgrader", {})
        if cell.cell_type != "code" or not marks.get("grade"):
            continue
        said: dict[str, str] = {"status": "not graded"}
        for output in cell.outputs:
            card = output.get("data", {}).get(KIND) if output.output_type == "execute_result" else None
            if card:
                said = said_by(card)
            elif output.output_type == "error":
                said = {"status": "not yet", "diagnosis": output.ename, "seen": output.evalue}
        found[marks["grade_id"]] = said
    return found


def said_by(card: Any) -> dict[str, str]:
    """A card's words. Who is graded can forge one: only texts are taken, and of each its beginning."""
    card = card if isinstance(card, Mapping) else {}
    finding = card.get("finding")
    finding = finding if isinstance(finding, Mapping) else {}
    found = {
        "title": card.get("title"), "status": card.get("status"), "diagnosis": finding.get("diagnosis"),
        "seen": finding.get("seen"), "likely": finding.get("cause"), "look": finding.get("look"),
    }  # fmt: skip
    return {name: text[:LONGEST] if isinstance(text, str) else "" for name, text in found.items()}


def total(folder: Path, assignment: str, student: str) -> tuple[float, float]:
    """A student's points, and how many there are."""
    from nbgrader.api import MissingEntry

    with gradebook(folder) as book:
        most = book.find_assignment(assignment).max_score
        try:
            return book.find_submission(assignment, student).score, most
        except MissingEntry:
            return 0.0, most


def students(folder: Path, assignment: str) -> list[str]:
    """Who has a submission of this assignment in the gradebook, if there is one."""
    if not (folder / "gradebook.db").exists():
        return []
    with gradebook(folder) as book:
        known = [each.name for each in book.assignments]
        return [each.student.id for each in book.assignment_submissions(assignment)] if assignment in known else []


def gradebook(folder: Path) -> Any:
    """nbgrader's gradebook."""
    from nbgrader.api import Gradebook

    return Gradebook(f"sqlite:///{folder.resolve() / 'gradebook.db'}", "kv-cache-labs")


def safe(value: Any) -> str:
    """Text that a spreadsheet shows and does not compute: findings quote what submissions say."""
    text = " ".join(str(value).split())
    return f"'{text}" if text.startswith(FORMULA) else text
