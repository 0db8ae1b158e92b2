"""What each section of each notebook needs and how long it takes; a workshop cut from that.

`data/syllabus.yaml` has an entry per section: its id ("02.4": lab 02, section 4), its heading, its minutes, which add
up to the lab's time card, `needs` (sections that it builds on), `weight` (5: the course's thread; 1: left out first).
Parts of a core section that are marked *further* are an entry of their own, "02.4+". What closes a lab ("What to carry
on") takes no time of its own and goes with the lab.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml
from nbformat import NotebookNode

from labkit.course.workspace import WorkspaceError
from labkit.specs import DATA

FILE = DATA / "syllabus.yaml"
HEADING = re.compile(r"^## (?:(\d+) · )?(.+)$", re.MULTILINE)
FURTHER_PART = re.compile(r"^### .+ · further$|^\*Further, \d+ min", re.MULTILINE)
CLOSING = "close"
KEYS = {"id", "title", "minutes", "needs", "weight", "further"}
BREAK = 10  # minutes of a break in each hour


class SyllabusError(WorkspaceError):
    """A plan that cannot be made, or a syllabus that does not hold together; the message says why in a line."""


@dataclass(frozen=True)
class Section:
    """An entry of the syllabus. `further`: not a part of the lab's core."""

    id: str
    title: str
    minutes: int
    needs: tuple[str, ...] = ()
    weight: int = 3
    further: bool = False

    @property
    def lab(self) -> str:
        """The lab's number, as "02"."""
        return self.id[:2]

    @property
    def closes(self) -> bool:
        """Whether this is what a lab ends with, read in the minutes of what stands before it."""
        return self.minutes == 0


@dataclass(frozen=True)
class Found:
    """A section as a notebook has it: its id, its heading, the indices of its cells, its further parts or not."""

    id: str
    title: str
    cells: range
    has_further_part: bool


def sections_of(notebook: NotebookNode, lab: str) -> list[Found]:
    """The sections of a notebook, in its order: every heading of the second level begins one."""
    starts = []
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            starts += [(index, match) for match in HEADING.finditer(cell.source)]
    found = []
    for (start, match), after in zip(starts, [*(index for index, _ in starts[1:]), len(notebook.cells)], strict=True):
        cells = range(start, after)
        prose = "\n".join(
            notebook.cells[index].source for index in cells if notebook.cells[index].cell_type == "markdown"
        )
        found.append(Found(f"{lab}.{match[1] or CLOSING}", match[2], cells, bool(FURTHER_PART.search(prose))))
    return found


@cache
def syllabus(path: Path = FILE) -> tuple[Section, ...]:
    """Every entry, in the order of the file. Raises SyllabusError."""
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))["sections"]
        sections = tuple(_section(entry) for entry in entries)
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise SyllabusError(f"{path.name} cannot be read: {' '.join(str(error).split())}") from None
    check(sections)
    return sections


def _section(entry: Mapping) -> Section:
    if unknown := entry.keys() - KEYS:
        raise ValueError(f"{entry.get('id')}: unknown {', '.join(sorted(unknown))}")
    minutes, weight = entry["minutes"], entry.get("weight", 3)
    if not (type(minutes) is int and minutes >= 0 and type(weight) is int and 1 <= weight <= 5):
        raise ValueError(f"{entry['id']}: minutes are a whole number from 0 on, a weight is one from 1 to 5")
    needs = entry.get("needs", [])
    return Section(str(entry["id"]), entry["title"], minutes, tuple(needs), weight, bool(entry.get("further", False)))


def check(sections: Sequence[Section]) -> None:
    """Ids are there once; what a section needs stands before it, or in a further section that does. SyllabusError."""
    known = {section.id: section for section in sections}
    if len(known) < len(sections):
        raise SyllabusError("the syllabus has an id twice")
    for section in sections:
        for need in section.needs:
            if need not in known:
                raise SyllabusError(f"{section.id} needs {need}, which the syllabus does not have")
        if section.id in closure(section.id, known, above=True):
            raise SyllabusError(f"{section.id} needs itself, through what it needs")


def closure(id: str, known: Mapping[str, Section], *, above: bool = False) -> set[str]:
    """A section and all that it needs, directly or not; `above`: without the section, unless it needs itself."""
    found: set[str] = set()
    waiting = list(known[id].needs)
    while waiting:
        need = waiting.pop()
        if need not in found:
            found.add(need)
            waiting += known[need].needs
    return found if above else found | {id}


@dataclass(frozen=True)
class Plan:
    """A workshop: what is in and what is left out, in the course's order. Times are minutes."""

    total: int
    breaks: int
    inside: tuple[Section, ...]
    outside: tuple[Section, ...]

    @property
    def minutes(self) -> int:
        """What the sections take."""
        return sum(section.minutes for section in self.inside)

    @property
    def spare(self) -> int:
        """What is left for questions."""
        return self.total - self.breaks - self.minutes


def plan(hours: float, sections: Sequence[Section] | None = None, break_minutes: int = BREAK) -> Plan:
    """The sections that fit into `hours`, `break_minutes` of each full hour off, and break no prerequisite.

    The heaviest come first, in the course's order among equals, each with everything it needs; one that no longer fits
    with its needs is left out. Raises SyllabusError.
    """
    sections = syllabus() if sections is None else sections
    if not (isinstance(hours, int | float) and math.isfinite(hours) and 0 < hours <= 1000):
        raise SyllabusError(f"a workshop has more than 0 and at most 1000 hours, as in --hours 1.5; got {hours}")
    if not 0 <= break_minutes < 60:
        raise SyllabusError(f"a break takes 0 to 59 minutes of an hour; got {break_minutes}")
    total = math.floor(hours * 60)
    breaks = break_minutes * int(hours)
    room = total - breaks
    known = {section.id: section for section in sections}
    chosen: set[str] = set()
    for section in sorted((section for section in sections if not section.closes), key=lambda section: -section.weight):
        added = closure(section.id, known) - chosen
        minutes = sum(known[id].minutes for id in added)
        if minutes <= room:
            chosen |= added
            room -= minutes
    labs = {known[id].lab for id in chosen}
    chosen |= {
        section.id for section in sections if section.closes and section.lab in labs and set(section.needs) <= chosen
    }
    inside = tuple(section for section in sections if section.id in chosen)
    if not inside:
        least = min((section.minutes for section in sections if not section.needs and not section.closes), default=0)
        raise SyllabusError(f"nothing fits into {total} minutes: the shortest beginning takes {least}")
    return Plan(total, breaks, inside, tuple(section for section in sections if section.id not in chosen))
