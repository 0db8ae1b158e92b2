"""The kill table: each wrong answer and the diagnosis its check gives. `python -m tests.labs.kill_table` writes it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from labkit.course.catalogue import contents, numbers
from labkit.course.examine import examine
from labkit.course.exercise import Exercise, Finding
from tests.labs.answer import Wrong

COUNTED = ("wrong", "refused", "fitting", "misleading", "right", "accepted")
TABLE = Path(__file__).resolve().parents[2] / "docs" / "kill_table.md"
MEETINGS = Path(__file__).with_name("first_meetings.json")
HEAD = """# The kill table

A check should refuse what is wrong, say why, and accept what is right however it is written. Two figures tell how far
that holds.

## Answers that the checks had not seen

Written by somebody who knew the notebook's blanks and not the checks, and counted once, when they first met. *Fitting*:
the message names the mistake. *Misleading*: it names another one. What is neither got a neutral message, which shows
what was seen. *Checks* counts the meetings: between two, the checks were mended at what the one before had shown.
The answers of meetings 2 and 4 are part of the tests as they were written; of meeting 3, those that had passed or had
got a misleading message are, in other words.

"""
KNOWN = """
## Answers that the checks know

Each of these is wrong in a way people really are wrong. A test proves that every one of them is rejected, and with the
diagnosis meant for it. This page is written by `make docs` from what the checks say.

| exercise | the mistake | the check says | what the learner reads |
|---|---|---|---|
"""


def first_meetings() -> str:
    """The counts of the first meetings as a table, newest last, with the sum of each meeting."""
    named = ("date", "checks", "lab", *COUNTED)
    rows = ["| " + " | ".join(named) + " |", "|---" * len(named) + "|"]
    counts = json.loads(MEETINGS.read_text(encoding="utf-8"))
    for meeting in dict.fromkeys((count["date"], count["checks"]) for count in counts):
        listed = [count for count in counts if (count["date"], count["checks"]) == meeting]
        total = {key: sum(count[key] for count in listed) for key in COUNTED}
        for count in [*listed, {"date": meeting[0], "checks": meeting[1], "lab": "all", **total}]:
            rows.append("| " + " | ".join(str(count[key]) for key in named) + " |")
    return "\n".join(rows) + "\n"


def row(wrong: Wrong, finding: Finding | None) -> str:
    """A wrong answer's line of the table, from what its check found."""
    said = (f"`{finding.diagnosis}`", finding.seen) if finding else ("**accepted**", "")
    cells = [wrong.exercise, wrong.mistake + (f" ({wrong.source})" if wrong.source else ""), *said]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def in_order(answers: Sequence[Wrong]) -> list[Wrong]:
    """Wrong answers as the table lists them."""
    return sorted(answers, key=lambda wrong: wrong.exercise)


def page(rows: Sequence[str], exercises: Mapping[str, Exercise]) -> str:
    """The table as markdown, from its lines."""
    return (
        HEAD + first_meetings() + KNOWN + "\n".join(rows) + f"\n\n{len(rows)} wrong answers, {len(exercises)} checks.\n"
    )


def kill_table(answers: Sequence[Wrong], exercises: Mapping[str, Exercise]) -> str:
    """The table as markdown, from the verdicts of the checks."""
    found = (examine(exercises[wrong.exercise], wrong.answer).finding for wrong in in_order(answers))
    return page([row(wrong, finding) for wrong, finding in zip(in_order(answers), found, strict=True)], exercises)


def published() -> list[str]:
    """The lines of the published table, one for each wrong answer."""
    text = TABLE.read_text(encoding="utf-8")
    return [line for line in text[text.index(KNOWN) + len(KNOWN) :].splitlines() if line.startswith("| ")]


def gather() -> tuple[list[Wrong], dict[str, Exercise]]:
    """Every lab's wrong answers, and every exercise by its id."""
    answers, exercises = [], {}
    for number in numbers():
        answers += importlib.import_module(f"tests.labs.lab{number}.answers").WRONG
        exercises |= {exercise.id: exercise for exercise in contents(number).exercises}
    return answers, exercises


def main() -> None:
    """Write the table."""
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(kill_table(*gather()), encoding="utf-8")


if __name__ == "__main__":
    main()
