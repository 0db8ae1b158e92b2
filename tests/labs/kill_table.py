"""The kill table: each wrong answer and the diagnosis its check gives. `python -m tests.labs.kill_table` writes it, and
what teachers are told of common mistakes, `data/wrong_answers.json`."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from labkit.course.catalogue import contents, numbers
from labkit.course.examine import examine
from labkit.course.exercise import Exercise, Finding
from tests.labs.answer import Wrong

COUNTED = ("wrong", "refused", "fitting", "misleading", "right", "accepted")
TABLE = Path(__file__).resolve().parents[2] / "docs" / "kill_table.md"
PAGES = TABLE.parent / "kill_table"  # one for each lab
MISTAKES = TABLE.parents[1] / "data" / "wrong_answers.json"
ROW = re.compile(r"\| (\d\d\.\w+) \| (.+) \| (`[^`]+`|\*\*accepted\*\*) \| (.*) \|")
MEETINGS = Path(__file__).with_name("first_meetings.json")
HEAD = """# The kill table

A check should refuse what is wrong, say why, and accept what is right however it is written. Two figures tell how far
that holds.

## Answers that the checks had not seen

Written by somebody who knew the notebook's blanks and not the checks, and counted once, when they first met. *Fitting*:
the message names the mistake. *Misleading*: it names another one. What is neither got a neutral message, which shows
what was seen. *Checks* counts the meetings: between two, the checks were mended at what the one before had shown.
The answers of meetings 2, 4 and 5 are part of the tests as they were written; of meeting 3, those that passed or got
a misleading message are, in other words.

"""
KNOWN = """
## Answers that the checks know

Each of these is wrong in a way people really are wrong. A test proves that every one of them is rejected, and with the
diagnosis meant for it. `make docs` writes this from what the checks say.

"""
COLUMNS = """| exercise | the mistake | the check says | what the learner reads |
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


def kill_table(answers: Sequence[Wrong], exercises: Mapping[str, Exercise]) -> list[str]:
    """The table's lines as markdown, from the verdicts of the checks."""
    return [row(wrong, examine(exercises[wrong.exercise], wrong.answer).finding) for wrong in in_order(answers)]


def pages(rows: Sequence[str], exercises: Mapping[str, Exercise]) -> dict[str, str]:
    """The table as the pages of docs/, by their place in it: one that leads to a page for each lab."""
    labs, made = [], {}
    for number, mine in ((number, list(some)) for number, some in groupby(rows, key=lambda row: row[2:4])):
        title = f"{number} {contents(number).title}"
        labs.append(f"| [{title}](kill_table/lab{number}.md) | {len(mine)} |\n")
        lead = f"# Kill table · {title}\n\nWhat the checks say to wrong answers. [All labs](../kill_table.md)\n\n"
        made[f"kill_table/lab{number}.md"] = lead + COLUMNS + "\n".join(mine) + "\n"
    listed = f"| lab | wrong answers |\n|---|---|\n{''.join(labs)}"
    total = f"{len(rows)} wrong answers, {len(exercises)} checks."
    return {"kill_table.md": f"{HEAD}{first_meetings()}{KNOWN}{listed}\n{total}\n", **made}


def published() -> list[str]:
    """The lines of the published table, one for each wrong answer."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(PAGES.iterdir())]
    return [line for text in texts for line in text.partition(COLUMNS)[2].splitlines()]


def placed(answers: Sequence[Wrong]) -> dict[int, str]:
    """The published line of each of these, by its place in `answers`: the one that stands where the answer's belongs,
    on the page of its lab; none where the page is too short."""
    found: dict[int, str] = {}
    order = sorted(range(len(answers)), key=lambda place: answers[place].exercise)
    for number, mine in groupby(order, key=lambda place: answers[place].exercise[:2]):
        page = PAGES / f"lab{number}.md"
        lines = page.read_text(encoding="utf-8").partition(COLUMNS)[2].splitlines() if page.exists() else []
        found |= dict(zip(mine, lines, strict=False))
    return found


def mistakes(rows: Sequence[str], answers: Sequence[Wrong]) -> dict[str, list[dict]]:
    """Each exercise's mistakes, by the diagnosis meant for them: how many answers make it, how many are told so.

    rows: the kill table's lines of these answers. Mistakes with most answers come first.
    """
    found: dict[tuple[str, str], dict] = {}
    for line, wrong in zip(rows, in_order(answers), strict=True):
        exercise, mistake, said, seen = ROW.fullmatch(line).groups()
        if exercise != wrong.exercise:
            raise ValueError(f"a row of {exercise} stands where one of {wrong.exercise} should: run `make docs`")
        fresh = {"diagnosis": wrong.diagnosis, "tried": 0, "caught": 0, "examples": [], "reads": ""}
        entry = found.setdefault((exercise, wrong.diagnosis), fresh)
        entry["tried"] += 1
        entry["examples"] = [*entry["examples"], mistake.replace("\\|", "|")][:3]
        if said == f"`{wrong.diagnosis}`":
            entry["caught"] += 1
            entry["reads"] = entry["reads"] or seen.replace("\\|", "|")
    by_exercise: dict[str, list[dict]] = {}
    for (exercise, _), entry in sorted(found.items(), key=lambda item: -item[1]["tried"]):
        by_exercise.setdefault(exercise, []).append(entry)
    return dict(sorted(by_exercise.items()))


def newest_meetings() -> dict[str, dict]:
    """Of each whole lab, the counts of its newest first meeting with answers that the checks had not seen."""
    counts = json.loads(MEETINGS.read_text(encoding="utf-8"))
    kept = ("date", "wrong", "refused", "fitting", "right", "accepted")
    return {count["lab"]: {key: count[key] for key in kept} for count in counts if len(count["lab"]) == 2}


def told_to_teachers(rows: Sequence[str], answers: Sequence[Wrong]) -> str:
    """What `labkit build` tells teachers, as JSON."""
    told = {"mistakes": mistakes(rows, answers), "meetings": newest_meetings()}
    return json.dumps(told, indent=1, ensure_ascii=False) + "\n"


def gather() -> tuple[list[Wrong], dict[str, Exercise]]:
    """Every lab's wrong answers, and every exercise by its id."""
    answers, exercises = [], {}
    for number in numbers():
        answers += importlib.import_module(f"tests.labs.lab{number}.answers").WRONG
        exercises |= {exercise.id: exercise for exercise in contents(number).exercises}
    return answers, exercises


def main() -> None:
    """Write the table, and the mistakes that it tells of."""
    answers, exercises = gather()
    rows = kill_table(answers, exercises)
    PAGES.mkdir(parents=True, exist_ok=True)
    for place, text in pages(rows, exercises).items():
        (TABLE.parent / place).write_text(text, encoding="utf-8")
    MISTAKES.write_text(told_to_teachers(rows, answers), encoding="utf-8")


if __name__ == "__main__":
    main()
