"""The kill table: each wrong answer and the diagnosis its check gives. `python -m tests.mutants.table` writes it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from labkit.course.exercise import Exercise, examine
from labkit.course.exercises import contents, numbers
from tests.mutants import Mutant

TABLE = Path(__file__).resolve().parents[2] / "docs" / "kill_table.md"
HEAD = """# The kill table

Each check is tried on answers that are wrong in a way people really are wrong. A test proves that every one of them is
rejected, and with the diagnosis meant for it. This page is written by `make docs` from what the checks say.

| exercise | the mistake | the check says | what the learner reads |
|---|---|---|---|
"""


def kill_table(mutants: Sequence[Mutant], exercises: Mapping[str, Exercise]) -> str:
    """The table as markdown, from the verdicts of the checks."""
    rows = []
    for mutant in sorted(mutants, key=lambda mutant: mutant.exercise):
        finding = examine(exercises[mutant.exercise], mutant.answer).finding
        said = (f"`{finding.diagnosis}`", finding.seen) if finding else ("**accepted**", "")
        cells = [mutant.exercise, mutant.mistake + (f" ({mutant.source})" if mutant.source else ""), *said]
        rows.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return HEAD + "\n".join(rows) + f"\n\n{len(rows)} wrong answers, {len(exercises)} checks.\n"


def main() -> None:
    """Write the table."""
    mutants, exercises = [], {}
    for number in numbers():
        mutants += importlib.import_module(f"tests.mutants.lab{number}").MUTANTS
        exercises |= {exercise.id: exercise for exercise in contents(number).exercises}
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(kill_table(mutants, exercises), encoding="utf-8")


if __name__ == "__main__":
    main()
