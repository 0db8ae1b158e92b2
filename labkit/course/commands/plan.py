"""`labkit plan --hours 4`: a workshop cut from the syllabus."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from labkit.course.syllabus import Plan, Section

ABOUT = """Choose sections for a workshop of so many hours: no section without those it needs, ten minutes of each
full hour a break, and a list of what is left out. The minutes are those of the labs' time cards, for people
who know PyTorch."""


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("plan", help="cut a workshop of so many hours from the course", description=ABOUT)
    parser.add_argument("--hours", required=True, metavar="N", help="its length with breaks: 1.5, 4, 14, ...")
    parser.add_argument("--break-minutes", default="10", metavar="N", help="break in each full hour (default: 10)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, times in minutes")
    parser.set_defaults(run=run)


AS_IT_STANDS = """In a lab with sections left out, run all cells first (Run > Run All Cells): where nobody fills a
blank, the course's own code stands in, so that what comes later works."""


def run(options: argparse.Namespace) -> int:
    """Print the plan."""
    from labkit.course.syllabus import plan

    breaks = _number(options.break_minutes, int, "--break-minutes")
    made = plan(_number(options.hours, float, "--hours"), break_minutes=breaks)
    print(json.dumps(as_json(made), indent=1) if options.json else as_text(made))
    return 0


def _number(text: str, kind: type, name: str) -> Any:
    from labkit.course.syllabus import SyllabusError

    try:
        return kind(text)
    except ValueError:
        example = "1.5" if kind is float else "10"
        raise SyllabusError(f"{name} takes a number, as in {name} {example}; got {text[:40]!r}") from None


def as_json(made: Plan) -> dict:
    """The plan as JSON: minutes, ids and titles."""
    told = {
        name: [{"id": section.id, "title": section.title, "minutes": section.minutes} for section in sections]
        for name, sections in (("sections", made.inside), ("left_out", made.outside))
    }
    return {"minutes": made.total, "breaks": made.breaks, "work": made.minutes, "spare": made.spare, **told}


def as_text(made: Plan) -> str:
    """The plan as a person reads it."""
    told = f"{made.minutes} min of work, {made.breaks} min of breaks, {made.spare} min to spare"
    lines = [f"{_hours(made.total)}: {told}", "", *_by_lab(made.inside)]
    outside = [section for section in made.outside if section.minutes]
    if outside:
        begun = {section.lab for section in made.inside}
        lines += ["", f"Left out, {sum(section.minutes for section in outside)} min:", ""]
        lines += _by_lab([section for section in outside if section.lab in begun])
        lines += [f"{line}, all of it" for line in _by_lab(outside, titles_only=True) if line[4:6] not in begun]
        lines += ["", AS_IT_STANDS]
    return "\n".join(lines)


def _hours(minutes: int) -> str:
    whole, rest = divmod(minutes, 60)
    return f"{whole} h {rest:02d} min"


def _by_lab(sections: Sequence[Section], *, titles_only: bool = False) -> list[str]:
    from labkit.course.catalogue import contents, numbers

    titles = {number: contents(number).title for number in numbers()}
    lines = []
    for lab in sorted({section.lab for section in sections}):
        own = [section for section in sections if section.lab == lab]
        lines.append(f"Lab {lab} · {titles.get(lab, '?')}, {sum(section.minutes for section in own)} min")
        lines += [] if titles_only else [_line(section) for section in own]
    return lines


def _line(section: Section) -> str:
    number = section.id[3:].removesuffix("+")
    name = section.title + " (what is marked further)" * section.id.endswith("+")
    return f"  {number:>5}  {name:<64} {section.minutes:>3} min" if section.minutes else f"         {name}"
