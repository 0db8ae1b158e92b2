"""The editions: each is what it says, and nothing that a student gets holds a solution."""

from __future__ import annotations

import ast
import base64
import html
import io
import json
import os
import posixpath
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path

import matplotlib.image
import nbformat
import pytest
from nbformat import NotebookNode

from labkit.course import editions
from labkit.course.catalogue import contents, numbers
from labkit.course.cli import main
from labkit.course.editions import build as building
from labkit.course.editions import guide, reveal
from labkit.course.editions.boards import picture
from labkit.course.editions.build import BuildError, build, notebooks, read
from labkit.course.editions.instructor import TAG, instructor, teaching_cells
from labkit.course.editions.leaks import bodies, leaks
from labkit.course.editions.mistakes import known
from labkit.course.editions.slides import HIGH, ROOM, WIDGET, arranged, formulas, height, slides
from labkit.course.editions.teaching import TeachingError, teaching
from labkit.course.record import MEASURED
from labkit.course.release.make import pack_pages
from labkit.course.syllabus import sections_of
from tests.links import dead_links, local_links

ROOT = Path(__file__).resolve().parents[2]
LABS = {path.name[:2]: path for path in notebooks(ROOT)}
REFERENCES = {exercise.id: exercise.reference for number in numbers() for exercise in contents(number).exercises}
RENDERED = ("01", "05")  # slides as pages take seconds: these have formulas, folded text, all kinds of output
rendered = pytest.mark.parametrize("number", RENDERED)
by_lab = pytest.mark.parametrize("number", sorted(LABS))


@cache
def made(number: str) -> NotebookNode:
    return instructor(read(LABS[number]), contents(number))


@cache
def as_slides(number: str) -> str:
    return slides(read(LABS[number]), contents(number))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """What `labkit build` writes of all labs, slides apart: they would need reveal.js."""
    out = tmp_path_factory.mktemp("editions")
    build(ROOT, out, ["self-paced", "instructor"], say=lambda line: None)
    return out


# No solution in a student's hands.


def test_every_reference_has_something_that_could_be_found() -> None:
    assert all(bodies(reference) for reference in REFERENCES.values())
    assert len(REFERENCES) >= 45


@by_lab
def test_no_self_paced_notebook_holds_a_solution(number: str, built: Path) -> None:
    assert leaks(read(built / "self-paced" / LABS[number].name), REFERENCES) == []


@by_lab
def test_no_slides_hold_a_solution(number: str) -> None:
    cut = arranged(read(LABS[number]), contents(number))
    assert leaks(cut, REFERENCES) == []
    whole = nbformat.v4.new_notebook()
    whole.cells = [
        nbformat.v4.new_code_cell("\n\n".join(cell.source for cell in cut.cells if cell.cell_type == "code"))
    ]
    assert leaks(whole, REFERENCES) == []  # nor in pieces that follow each other


@by_lab
def test_the_instructor_edition_holds_every_solution(number: str) -> None:
    own = {id: reference for id, reference in REFERENCES.items() if id[:2] == number}
    assert leaks(made(number), own) == list(own)


def hidden_in(where: str, reference: Callable) -> NotebookNode:
    """A notebook with a solution where it could slip in unseen."""
    source = textwrap.dedent(editions.source_of(reference))
    node = ast.parse(source).body[0]
    node.name = "another_name"
    cell = {
        "another name": lambda: nbformat.v4.new_code_cell(ast.unparse(node)),
        "no docstring, comments": lambda: nbformat.v4.new_code_cell(commented(node)),
        "inside a branch": lambda: nbformat.v4.new_code_cell("if True:\n" + textwrap.indent(source, "    ")),
        "text": lambda: nbformat.v4.new_markdown_cell(f"Do it so:\n\n```python\n{source}\n```"),
        "output": lambda: nbformat.v4.new_code_cell(
            "lab.solution()", outputs=[nbformat.v4.new_output("stream", name="stdout", text="# why\n" + source)]
        ),
    }[where]()
    return nbformat.v4.new_notebook(cells=[cell])


def commented(node: ast.stmt) -> str:
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef) and ast.get_docstring(part) is not None and len(part.body) > 1:
            part.body = part.body[1:]
    return ast.unparse(node).replace("\n", "  # so\n\n")


@pytest.mark.parametrize("where", ["another name", "no docstring, comments", "inside a branch", "text", "output"])
@pytest.mark.parametrize("id", ["01.1", "01.3", "02.1", "02.3", "03.1", "04.2", "05.5", "06.3", "06.d1", "07.2"])
def test_a_solution_is_found_wherever_it_hides(where: str, id: str) -> None:
    assert leaks(hidden_in(where, REFERENCES[id]), {id: REFERENCES[id]}) == [id]


# Each edition is what it says.


@by_lab
def test_self_paced_is_the_notebook_as_it_stands_but_for_the_place_of_its_links(number: str, built: Path) -> None:
    here = (built / "self-paced" / LABS[number].name).read_text(encoding="utf-8")
    assert here.replace("](reading/", "](../") == LABS[number].read_text(encoding="utf-8")


@by_lab
def test_built_twice_the_bytes_are_the_same(number: str, built: Path) -> None:
    again = building.to_bytes(building.led(instructor(read(LABS[number]), contents(number)), LABS.values()))
    assert (built / "instructor" / LABS[number].name).read_bytes() == again
    if number in RENDERED:
        assert slides(read(LABS[number]), contents(number)) == as_slides(number)


def test_by_another_user_in_another_place_and_order_the_bytes_are_the_same(built: Path, tmp_path: Path) -> None:
    """Another process, hash seed, time zone and umask; slides apart, which would need reveal.js."""
    out = tmp_path / "é 1"
    words = ["build", "--edition", "instructor", "self-paced", "--out", str(out)]
    code = f"import os, sys; os.umask(0o077); from labkit.course.cli import main; sys.exit(main({words!r}))"
    own = {"PYTHONHASHSEED": "77", "TZ": "Pacific/Auckland", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | own, stdout=subprocess.DEVNULL)
    for edition in ("self-paced", "instructor"):
        first, second = contents_of(built / edition), contents_of(out / edition)
        assert first.keys() == second.keys()
        assert [name for name in first if first[name] != second[name]] == []


@by_lab
def test_an_edition_s_folder_alone_has_all_that_its_notebooks_and_their_pages_link_to(number: str, built: Path) -> None:
    for edition in ("self-paced", "instructor"):
        assert local_links(built / edition / LABS[number].name)
        assert dead_links(built / edition) == []


def test_what_one_lab_alone_says_of_the_others_is_plain_words(tmp_path: Path) -> None:
    build(ROOT, tmp_path, ["self-paced", "instructor"], ["05"], say=lambda line: None)
    for edition in ("self-paced", "instructor"):
        assert dead_links(tmp_path / edition) == []
        text = " ".join(cell.source for cell in read(tmp_path / edition / LABS["05"].name).cells)
        assert "and lab 04's perplexity" in " ".join(text.split())


def test_what_slides_and_executed_pages_link_to_is_html_with_the_anchors_that_are_named(built: Path) -> None:
    pages = [(name.partition("/")[2], content) for name, content in pack_pages({"self-paced": built / "self-paced"})]
    made = dict(pages)
    ids = {name: set(re.findall(r'id="([^"]+)"', page.decode())) for name, page in pages if name.endswith(".html")}
    assert {"self-paced/reading/docs/glossary.html", "self-paced/01_attention_basics.html"} <= ids.keys()
    for name in ids:
        for link in re.findall(r'href="(?![a-z]+:|#)([^"]+)"', made[name].decode()):
            place, _, anchor = link.partition("#")
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), place))
            assert target in made, (name, link)
            assert target not in ids or not anchor or anchor in ids[target], (name, link)
    assert re.findall(r'href="[^"]*?([^"/]*)"', as_slides("01")).count("02_cache_from_scratch.html") == 1
    assert 'docs/claims.html"' in as_slides("01")


def test_slides_leave_out_what_is_for_whoever_opens_a_notebook_alone() -> None:
    assert "first line" in read(LABS["01"]).cells[0].source
    assert "find_spec" not in str(arranged(read(LABS["01"]), contents("01")))


@pytest.fixture(scope="module")
def for_nbgrader(tmp_path_factory) -> Path:
    """The edition for a class, of two labs."""
    out = tmp_path_factory.mktemp("class")
    build(ROOT, out, ["nbgrader"], ["01", "06"], say=lambda line: None)
    return out / "nbgrader"


def test_the_nbgrader_edition_is_what_grade_setup_makes_but_for_the_seeds(for_nbgrader: Path, tmp_path: Path) -> None:
    pytest.importorskip("nbgrader")
    from labkit.course.grading.classroom import set_up

    set_up(tmp_path / "class", LABS["01"])
    here, there = (contents_of(folder / "source/lab01") for folder in (for_nbgrader, tmp_path / "class"))
    assert here.keys() == there.keys() >= {LABS["01"].name, "reading/docs/glossary.md"}
    own, other = here.pop(LABS["01"].name).decode(), there.pop(LABS["01"].name).decode()
    assert here == there
    seeds = [re.findall(r"seed=(\d+)", text) for text in (own, other)]
    assert len(seeds[0]) == len(contents("01").exercises)
    assert not set(seeds[0]) & set(seeds[1])
    assert re.sub(r"seed=\d+", "", own) == re.sub(r"seed=\d+", "", other)
    config = "nbgrader_config.py"
    assert (for_nbgrader / config).read_bytes() == (tmp_path / "class" / config).read_bytes()


def test_the_nbgrader_edition_is_a_class_s_folder_that_nbgrader_hands_out_from(for_nbgrader: Path) -> None:
    pytest.importorskip("nbgrader")
    from labkit.course.grading.classroom import api, configuration

    assert for_nbgrader.stat().st_mode & 0o077 == 0  # it holds solutions and seeds
    assert str(for_nbgrader.resolve()) in configuration(for_nbgrader).ConfinedExecute.hide
    for number in ("01", "06"):
        result = api(for_nbgrader).generate_assignment(f"lab{number}", force=True, create=True)
        assert result["success"], result
        folder = for_nbgrader / "release" / f"lab{number}"
        assert leaks(read(folder / LABS[number].name), REFERENCES) == []
        assert dead_links(folder) == []


@pytest.mark.parametrize("name", ["gradebook.db", "nbgrader_config.py"])
def test_a_class_that_runs_is_not_built_over(name: str, tmp_path: Path, capsys) -> None:
    """Its limits and hidden cases are its own; nothing else that was asked for is written either."""
    folder = tmp_path / "nbgrader"
    source = folder / "source/lab01" / LABS["01"].name
    source.parent.mkdir(parents=True)
    source.write_text("cases of this class")
    (folder / name).write_text("of this class")
    before, mode = contents_of(tmp_path), folder.stat().st_mode
    assert main(["build", "--out", str(tmp_path), "--edition", "self-paced", "nbgrader", "--lab", "01"]) == 1
    said = capsys.readouterr().err
    assert f"{folder} holds a class ({name})" in said
    assert "labkit grade setup" in said
    assert "--out" in said
    assert contents_of(tmp_path) == before
    assert folder.stat().st_mode == mode


def test_labkit_build_alone_makes_what_all_may_have(tmp_path: Path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(building, "build", lambda root, out, editions, labs: asked.append(list(editions)))
    assert main(["build", "--out", str(tmp_path)]) == 0
    assert asked == [["self-paced", "instructor", "slides"]]


def test_no_release_holds_a_class_s_hidden_cases() -> None:
    assert set(building.EDITIONS) - set(building.PUBLISHED) == {"nbgrader"}


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@by_lab
class TestInstructor:
    def test_its_code_is_the_students_but_for_the_blanks(self, number: str) -> None:
        before = [cell for cell in read(LABS[number]).cells if cell.cell_type == "code"]
        after = [cell for cell in made(number).cells if cell.cell_type == "code"]
        filled = {blank.name for blank in editions.blanks(read(LABS[number]))}
        changed = [b.source for a, b in zip(before, after, strict=True) if a.source != b.source]
        assert len(changed) == len(contents(number).exercises)
        assert all(any(f"def {name}(" in source or f"class {name}" in source for name in filled) for source in changed)
        assert [cell.execution_count for cell in after] == [cell.execution_count for cell in before]

    def test_it_is_a_notebook_with_clean_ids(self, number: str) -> None:
        nbformat.validate(made(number))
        ids = [cell.id for cell in made(number).cells]
        assert len(set(ids)) == len(ids)

    def test_every_check_passes_in_what_it_shows(self, number: str) -> None:
        printed = "\n".join(
            output.text
            for cell in made(number).cells
            for output in cell.get("outputs", [])
            if output.output_type == "stream"
        )
        assert re.findall(r"^(\d\d\.\w+) · pass · ", printed, flags=re.MULTILINE) == [
            exercise.id for exercise in contents(number).exercises
        ]
        assert not re.search(r"· (pending|not yet) ·", printed)
        count = len(contents(number).exercises)
        assert f"{count} of {count} passed in this session." in printed

    def test_notes_tell_of_time_questions_mistakes_and_show_boards(self, number: str) -> None:
        cells = list(teaching_cells(made(number)))
        told = "\n".join(cell.source for cell in cells)
        assert told.count("(attachment:strip.png)") == 1
        assert "Before the class" in told
        own = teaching(number)
        assert all(ask.question in told and ask.answer in told for ask in own.asks)
        for exercise in contents(number).exercises:
            assert f"common wrong answers to {exercise.id}.**" in told
        for quiz in contents(number).quizzes:
            assert f"{quiz.id}: **{quiz.right}** is right" in told
        for prediction in contents(number).predictions:
            assert f'lab.predict("{prediction.id}"' in "\n".join(cell.source for cell in made(number).cells)
        assert told.count("**Teaching · pause.**") == len(contents(number).predictions) == told.count("It is **")

    def test_notes_are_attached_to_what_they_speak_of(self, number: str) -> None:
        """Sections that notes name are there, and each question stands behind its section's heading."""
        titles = {section.id[3:] for section in sections_of(read(LABS[number]), number)}
        own = teaching(number)
        assert {ask.section for ask in own.asks} | {drawing.section for drawing in own.pictures} <= titles
        heading = ""
        for cell in made(number).cells:
            if TAG not in cell.metadata.get("tags", []) and cell.cell_type == "markdown":
                found = re.findall(r"^## (\d+) · ", cell.source, flags=re.MULTILINE)
                heading = found[-1] if found else heading
            elif said := re.match(r"> \*\*Teaching · section (\d+),", cell.source):
                assert said[1] == heading

    def test_every_picture_is_there_with_words_and_is_legible(self, number: str) -> None:
        for cell in teaching_cells(made(number)):
            named = re.findall(r"!\[([^\]]*)\]\(attachment:([^)]+)\)", cell.source)
            assert sorted(name for _, name in named) == sorted(cell.get("attachments", {}))
            for words, name in named:
                assert len(words) > 40
                image = matplotlib.image.imread(io.BytesIO(base64.b64decode(cell.attachments[name]["image/png"])))
                assert image.shape[1] >= 1000
                assert image[..., :3].std() > 0.05  # not an empty board


@pytest.mark.parametrize("number", sorted(LABS))
def test_words_on_a_board_stay_on_it_and_off_each_other(number: str) -> None:
    for drawing in teaching(number).pictures:
        boxes = []

        def measured(board, drawing=drawing, boxes=boxes) -> None:
            drawing.draw(board)
            board.axes.figure.draw_without_rendering()
            view = board.axes.get_window_extent()
            for text in board.axes.texts:
                if text.get_text():
                    box = text.get_window_extent()
                    boxes.append((text.get_text(), box))
                    assert view.x0 - 2 <= box.x0 < box.x1 <= view.x1 + 2, (drawing.title, text.get_text())

        picture(measured)
        for place, (told, box) in enumerate(boxes):
            for other, another in boxes[place + 1 :]:
                assert not box.overlaps(another), (drawing.title, told, other)


@by_lab
def test_teaching_notes_have_what_a_teacher_needs(number: str) -> None:
    own = teaching(number)
    assert len(own.asks) >= 6
    assert len(own.pictures) >= 2
    assert len(own.aims) == 3
    exercises = {exercise.id for exercise in contents(number).exercises}
    named = [trouble.partition(":")[0] for trouble in own.trouble]
    assert len(named) >= 4
    assert set(named) <= exercises


def test_a_lab_without_notes_is_told_where_to_write_them() -> None:
    with pytest.raises(TeachingError, match=r"lab 90 has no teaching notes: write labkit/labs/lab90/teaching\.py"):
        teaching("90")


def test_mistakes_are_those_of_the_kill_table() -> None:
    """`make docs` writes both; how often a mistake is caught is counted from the table's rows."""
    pages = sorted((ROOT / "docs" / "kill_table").glob("lab*.md"))
    table = "".join(page.read_text(encoding="utf-8") for page in pages)
    rows = re.findall(r"^\| (\d\d\.\w+) \| .+ \| (?:`([^`]+)`|\*\*accepted\*\*) \| .* \|$", table, flags=re.MULTILINE)
    assert len(rows) > 1000
    for exercise, mistakes in known().items():
        said = [diagnosis for id, diagnosis in rows if id == exercise]
        assert sum(mistake.tried for mistake in mistakes) == len(said)
        for mistake in mistakes:
            assert 0 < mistake.caught <= mistake.tried
            assert said.count(mistake.diagnosis) >= mistake.caught
    assert known().keys() == REFERENCES.keys()


def test_the_teaching_guide_is_what_the_course_says_now() -> None:
    assert guide.FILE.read_text(encoding="utf-8") == guide.guide(), "run `make docs` to write it anew"
    pictures = re.findall(r"\]\((images/[^)]+)\)", guide.guide())
    assert len(pictures) == len(LABS)
    assert all((guide.FILE.parent / name).is_file() for name in pictures)


# Slides.


@by_lab
class TestSlides:
    def test_every_section_begins_a_slide_and_nothing_is_too_high(self, number: str) -> None:
        cut = arranged(read(LABS[number]), contents(number))
        starts = [cell for cell in cut.cells if cell.metadata.slideshow.slide_type == "slide"]
        headings = [cell.source.split("\n")[0].lstrip("# ") for cell in starts]
        for section in sections_of(read(LABS[number]), number):
            assert any(heading.endswith(section.title) for heading in headings), section.title
        shown = [cell for cell in cut.cells if cell.metadata.slideshow.slide_type != "notes"]
        assert [cell.source for cell in shown if height(cell) > ROOM] == []
        assert HIGH > ROOM

    def test_they_ask_nothing_of_a_kernel_and_show_what_the_notebook_shows(self, number: str) -> None:
        cut = arranged(read(LABS[number]), contents(number))
        source = "\n".join(cell.source for cell in cut.cells if cell.cell_type == "code")
        assert not re.search(r"lab\.(quiz|predict|check|summary)\(", source)
        assert WIDGET not in str(cut)
        pictures = [str(cell).count("'image/png'") for cell in (read(LABS[number]), cut)]
        assert pictures[0] - pictures[1] <= sum(MEASURED in str(cell.metadata) for cell in read(LABS[number]).cells)
        assert pictures[1] > 3


@rendered
def test_slides_load_nothing_from_elsewhere(number: str) -> None:
    page = as_slides(number)
    loaded = re.findall(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)=["']([^"']+)""", page)
    assert {address for address in loaded if not address.startswith("data:")} == {
        "reveal.js/dist/reveal.js", "reveal.js/plugin/notes/notes.js", "reveal.js/dist/reveal.css",
    }  # fmt: skip
    assert not re.search(r"url\(['\"]?https?:", page)
    assert "@import" not in page


@rendered
def test_questions_are_the_speakers(number: str) -> None:
    page = html.unescape(re.sub(r"<[^>]+>", "", as_slides(number)))
    notes = re.findall(r'<aside class="notes">.*?</aside>', as_slides(number), flags=re.DOTALL)
    assert len(notes) == len({ask.section for ask in teaching(number).asks})
    assert " ".join(teaching(number).asks[0].question.split()) in " ".join(page.split())


def test_formulas_are_pictures_and_prices_are_not() -> None:
    made = formulas(r"so $e^{4.6} = 100$, for $9 to $10, and `$x$`")
    assert made.count("<img") == 1
    assert 'alt="e^{4.6} = 100"' in made
    assert "$9 to $10, and `$x$`" in made


def test_reveal_from_a_folder_and_without_a_network(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LABKIT_REVEAL", str(tmp_path))
    with pytest.raises(reveal.RevealError, match=r"has no reveal\.js"):
        reveal.reveal_files()
    for name in reveal.NEEDED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert reveal.reveal_files() == {name: name.encode() for name in reveal.NEEDED}
    monkeypatch.delenv("LABKIT_REVEAL")
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reveal, "ADDRESS", "http://127.0.0.1:9/reveal.tgz")
    with pytest.raises(reveal.RevealError, match="LABKIT_REVEAL") as error:
        reveal.reveal_files()
    assert "\n" not in str(error.value)


def test_a_damaged_reveal_is_not_taken(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    (tmp_path / f"reveal.js-{reveal.VERSION}.tgz").write_bytes(b"not it")
    (tmp_path / "served.tgz").write_bytes(b"nor this")
    monkeypatch.setattr(reveal, "ADDRESS", (tmp_path / "served.tgz").as_uri())
    with pytest.raises(reveal.RevealError, match="wrong checksum"):
        reveal.reveal_files()


# The command.


def test_labkit_build_writes_what_is_named(tmp_path: Path, capsys) -> None:
    assert main(["build", "--out", str(tmp_path), "--lab", "3", "--edition", "self-paced", "instructor"]) == 0
    assert capsys.readouterr().out.count("\n") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["instructor", "self-paced"]
    for edition in ("self-paced", "instructor"):
        assert {path.name for path in (tmp_path / edition).iterdir()} == {LABS["03"].name, "reading"}
    assert (tmp_path / "instructor/reading/docs/kill_table/lab03.md").is_file()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lab", "9"], "there is no lab '09'"),
        (["--lab", "x"], "there is no lab 'x'"),
        (["--edition", "poster"], "there is no edition 'poster'"),
        (["--out", str(ROOT)], "where the notebooks come from"),
        (["--out", str(ROOT / "README.md")], "README.md"),
    ],
)
def test_what_cannot_be_built_is_said_in_a_line(options: list[str], said: str, tmp_path: Path, capsys) -> None:
    out = [] if "--out" in options else ["--out", str(tmp_path)]
    edition = [] if "--edition" in options else ["--edition", "self-paced"]
    assert main(["build", *options, *out, *edition]) == 1
    told = capsys.readouterr()
    assert said in told.err
    assert told.err.count("\n") == 1
    assert json.dumps(told.out) == '""'


def test_a_file_that_is_no_notebook_is_named(tmp_path: Path) -> None:
    (tmp_path / "notebooks").mkdir()
    for number, path in LABS.items():
        (tmp_path / "notebooks" / path.name).write_text("{" if number == "02" else path.read_text(encoding="utf-8"))
    with pytest.raises(BuildError, match=r"02_cache_from_scratch\.ipynb is no notebook"):
        build(tmp_path, tmp_path / "out", ["instructor"], say=lambda line: None)
    (tmp_path / "notebooks" / LABS["07"].name).unlink()
    with pytest.raises(BuildError, match="no notebook of lab 07"):
        build(tmp_path, tmp_path / "out", ["self-paced"], say=lambda line: None)
