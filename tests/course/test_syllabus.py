"""The syllabus is the notebooks' own: their headings, their time cards; and a plan cut from it breaks nothing."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.course import editions
from labkit.course.catalogue import contents, numbers
from labkit.course.cli import main
from labkit.course.syllabus import FILE, Section, SyllabusError, check, closure, plan, sections_of, syllabus

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
KNOWN = {section.id: section for section in syllabus()}
CARD = re.compile(r"^\| (.+) \| \**(\d+)(?: more)?\** \|$", re.MULTILINE)
PART = re.compile(r"^\*Further, (\d+) min", re.MULTILINE)
by_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def of(lab: str) -> list[Section]:
    return [section for section in syllabus() if section.lab == lab]


@cache
def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def prose(path: Path, cells: range | None = None) -> str:
    cells_of = read(path).cells
    wanted = cells_of if cells is None else [cells_of[index] for index in cells]
    return "\n".join(cell.source for cell in wanted if cell.cell_type == "markdown")


def missing_and_unknown(path: Path, entries: list[Section]) -> tuple[list, list]:
    """Sections of a notebook without an entry, and entries without a section, with their headings."""
    found = sections_of(read(path), path.name[:2])
    wanted = [(section.id, section.title) for section in found]
    wanted += [(f"{section.id}+", section.title) for section in found if section.has_further_part]
    have = [(section.id, section.title) for section in entries]
    return [pair for pair in wanted if pair not in have], [pair for pair in have if pair not in wanted]


def test_every_lab_is_in_it_and_no_other() -> None:
    assert sorted({section.lab for section in syllabus()}) == numbers()


@by_notebook
class TestNotebook:
    def test_has_an_entry_for_each_section_and_each_further_part_and_no_other(self, path: Path) -> None:
        assert missing_and_unknown(path, of(path.name[:2])) == ([], [])

    def test_entries_stand_in_the_notebooks_order(self, path: Path) -> None:
        ids = [section.id for section in sections_of(read(path), path.name[:2])]
        assert [section.id for section in of(path.name[:2]) if not section.id.endswith("+")] == ids

    def test_minutes_add_up_to_the_time_card(self, path: Path) -> None:
        """Each row: its sections' core minutes; behind the core's sum: what is not core in the sections it names."""
        lab, core = path.name[:2], True
        rows = CARD.findall(read(path).cells[0].source)
        assert len(rows) > 3
        for label, minutes in rows:
            if "**" in label:
                own = [section for section in of(lab) if not section.further]
                core = False
            else:
                named = label.partition(" · ")[0] if "marked" not in label else label.partition(": ")[2]
                ids = {f"{lab}.{number}" for number in numbers_in(named)}
                own = [
                    section
                    for section in of(lab)
                    if section.id.removesuffix("+") in ids and section.further is not core
                ]
                if not core and "marked" not in label:  # a row of whole sections
                    own = [section for section in own if not section.id.endswith("+")]
            assert sum(section.minutes for section in own) == int(minutes), label

    def test_minutes_of_further_parts_are_those_that_the_text_gives(self, path: Path) -> None:
        for section in sections_of(read(path), path.name[:2]):
            if given_minutes := PART.findall(prose(path, section.cells)):
                assert KNOWN[f"{section.id}+"].minutes == sum(map(int, given_minutes)), section.id

    def test_a_section_has_time_for_its_blanks(self, path: Path) -> None:
        notebook = read(path)
        minutes = {exercise.id: exercise.minutes for exercise in contents(path.name[:2]).exercises}
        for section in sections_of(notebook, path.name[:2]):
            inside = [blank.exercise for blank in editions.blanks(notebook) if blank.cell in section.cells]
            room = sum(KNOWN[id].minutes for id in (section.id, f"{section.id}+") if id in KNOWN)
            assert sum(minutes[id] for id in inside) <= room, section.id

    def test_who_calls_a_blanks_function_needs_its_section(self, path: Path) -> None:
        notebook = read(path)
        found = sections_of(notebook, path.name[:2])
        built = {
            blank.name: section.id
            for section in found
            for blank in editions.blanks(notebook)
            if blank.cell in section.cells
        }
        for section in found:
            source = "\n".join(
                notebook.cells[index].source for index in section.cells if notebook.cells[index].cell_type == "code"
            )
            needed = {built[name] for name in built if re.search(rf"\b{name}\(", source)} - {section.id}
            reach = closure(section.id, KNOWN) | (
                closure(f"{section.id}+", KNOWN) if section.has_further_part else set()
            )
            assert needed <= {id.removesuffix("+") for id in reach}, section.id


def numbers_in(label: str) -> set[int]:
    """The section numbers that a row of a time card names: "1–2", "6, 8–10 and parts of 1, 2, 5 and 7"."""
    found: set[int] = set()
    for first, last in re.findall(r"(\d+)(?:–(\d+))?", label):
        found |= set(range(int(first), int(last or first) + 1))
    return found


def test_a_section_without_an_entry_and_an_entry_without_a_section_are_found() -> None:
    entries = of("01")
    renamed = [Section("01.1", "Another heading", 5), *entries[1:]]
    assert missing_and_unknown(NOTEBOOKS[0], entries[1:])[0] == [("01.1", entries[0].title)]
    assert missing_and_unknown(NOTEBOOKS[0], [*entries, Section("01.99", "Nowhere", 5)])[1] == [("01.99", "Nowhere")]
    assert missing_and_unknown(NOTEBOOKS[0], renamed) == ([("01.1", entries[0].title)], [("01.1", "Another heading")])


def holds(hours: float, sections: tuple[Section, ...], break_minutes: int) -> None:
    """A plan breaks no prerequisite, takes no more than there is, and leaves nothing unsaid; or nothing fits at all."""
    known = {section.id: section for section in sections}
    try:
        made = plan(hours, sections, break_minutes)
    except SyllabusError:
        room = int(hours * 60) - break_minutes * int(hours)
        assert all(section.minutes > room for section in sections if not section.needs and section.minutes)
        return
    inside = {section.id for section in made.inside}
    assert all(set(section.needs) <= inside for section in made.inside)
    assert made.minutes + made.breaks <= hours * 60
    assert made.spare == made.total - made.minutes - made.breaks >= 0
    assert sorted([*made.inside, *made.outside], key=lambda section: section.id) == sorted(
        sections, key=lambda section: section.id
    )
    assert [id for id in known if id in inside] == [section.id for section in made.inside]


@given(hours=st.floats(0.001, 1000), break_minutes=st.integers(0, 59))
def test_a_plan_of_any_length_breaks_no_prerequisite_and_never_exceeds_the_time(
    hours: float, break_minutes: int
) -> None:
    holds(hours, syllabus(), break_minutes)


@st.composite
def courses(draw: st.DrawFn) -> tuple[Section, ...]:
    """Courses that nobody has written: any minutes, weights and prerequisites, those of a later lab among them."""
    ids = [f"{lab:02d}.{number}" for lab in (1, 2) for number in range(1, draw(st.integers(2, 6)))]
    made = []
    for place, id in enumerate(ids):
        needs = draw(st.lists(st.sampled_from(ids[:place]), unique=True)) if place else []
        made.append(Section(id, id, draw(st.integers(0, 90)), tuple(needs), draw(st.integers(1, 5))))
    order = draw(st.permutations(made))
    return tuple(order)


@given(hours=st.floats(0.02, 20), sections=courses())
def test_a_plan_of_any_course_breaks_no_prerequisite_and_never_exceeds_the_time(hours: float, sections) -> None:
    holds(hours, sections, 10)


def test_a_plan_that_took_the_heaviest_without_their_needs_would_be_found() -> None:
    sections = (
        Section("01.1", "a", 30, (), 1),
        Section("01.2", "b", 30, ("01.1",), 5),
        Section("01.3", "c", 20, (), 3),
    )
    assert [section.id for section in plan(1, sections, 0).inside] == ["01.1", "01.2"]
    assert [section.id for section in plan(0.9, sections, 0).inside] == ["01.3", "01.1"][::-1]


@pytest.mark.parametrize(
    ("hours", "labs"), [("1.5", ["01", "02"]), ("4", ["01", "02", "03", "04", "05", "06"]), ("14", numbers())]
)
def test_workshops_of_the_guide(hours: str, labs: list[str], capsys) -> None:
    assert main(["plan", "--hours", hours, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert sorted({section["id"][:2] for section in told["sections"]}) == labs
    assert told["work"] + told["breaks"] + told["spare"] == told["minutes"] == float(hours) * 60
    assert (told["left_out"] == []) is (hours == "14")


def test_the_text_says_what_is_left_out_and_the_minutes(capsys) -> None:
    assert main(["plan", "--hours", "1.5"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("1 h 30 min: 80 min of work, 10 min of breaks, 0 min to spare")
    assert "Left out, 595 min:" in said
    assert "Lab 07 · Eviction, 100 min, all of it" in said


@pytest.mark.parametrize("hours", ["0", "-1", "nan", "inf", "1e9", "two", "1,5", "", "0.01", "9" * 400])
def test_hours_that_are_none_get_one_line(hours: str, capsys) -> None:
    assert main(["plan", f"--hours={hours}"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("labkit: ")
    assert len(said.err) < 200


@pytest.mark.parametrize("minutes", ["-1", "60", "x", "1.5"])
def test_breaks_that_are_none_get_one_line(minutes: str, capsys) -> None:
    assert main(["plan", "--hours=2", f"--break-minutes={minutes}"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ((Section("01.1", "a", 1), Section("01.1", "b", 1)), "twice"),
        ((Section("01.1", "a", 1, ("01.9",)),), "01.1 needs 01.9"),
        ((Section("01.1", "a", 1, ("01.2",)), Section("01.2", "b", 1, ("01.1",))), "01.1 needs itself"),
    ],
)
def test_a_syllabus_that_does_not_hold_together_is_refused(sections, said: str) -> None:
    with pytest.raises(SyllabusError, match=said):
        check(sections)


@pytest.mark.parametrize(
    "text",
    ["", "sections: 3", "sections: [{id: '01.1'}]", "[", "sections: [{id: '01.1', title: a, minutes: -1}]",
     "sections: [{id: '01.1', title: a, minutes: 1, weight: 6}]",
     "sections: [{id: '01.1', title: a, minutes: 1, need: []}]"],
)  # fmt: skip
def test_a_file_that_is_no_syllabus_is_refused_in_a_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "syllabus.yaml").write_text(text)
    with pytest.raises(SyllabusError, match=r"syllabus\.yaml cannot be read: .+") as error:
        syllabus(tmp_path / "syllabus.yaml")
    assert "\n" not in str(error.value)
    assert FILE.name == "syllabus.yaml"
