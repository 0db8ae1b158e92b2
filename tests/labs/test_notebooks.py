"""The notebooks as a contract: what they ask for; a filled edition that runs, passes every check and prints the same.

That they were run in order and that blanks agree with their references, the linter finds: tests/course/test_lint.py.
"""

from __future__ import annotations

import ast
import copy
import inspect
import os
import re
import tempfile
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from labkit import claims
from labkit.course import editions
from labkit.course.catalogue import contents, numbers
from labkit.course.record import MEASURED
from tests.little import TIME_ONCE, TRY_TWICE

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (Path.home(), Path("~root").expanduser(), ROOT, tempfile.gettempdir())
HERE = {f"{folder}/" for folder in FOLDERS} - {"//"}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LONG = 3  # seconds. A cell that takes longer passes texts through the model or measures; it is not run a second time


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def exercises_of(path: Path) -> dict:
    return {exercise.id: exercise for exercise in contents(path.name[:2]).exercises}


def text_of(cell: nbformat.NotebookNode) -> str:
    """What a cell printed or showed as text."""
    parts = []
    for output in cell.outputs:
        if output.output_type == "stream":
            parts.append(output.text)
        elif output.output_type in ("execute_result", "display_data"):
            parts.append(output.data.get("text/markdown") or output.data.get("text/plain", ""))
    return "".join(parts)


def test_there_is_one_notebook_per_lab() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == numbers()


def test_the_readmes_course_is_the_catalogues() -> None:
    """Each lab that there is has its row: title, notebook, and the minutes that the notebook gives for its core."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\d\d) (.+)\]\(notebooks/(.+)\) \| .+ \| (\d+) \|$", readme, flags=re.MULTILINE)
    labs = [(path.name[:2], contents(path.name[:2]).title, path.name, str(core_minutes(path))) for path in NOTEBOOKS]
    assert rows == labs


def core_minutes(path: Path) -> int:
    """What a notebook's time card says of its core."""
    prose = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    minutes = re.search(r"^\| \*\*.*core.*\*\* \| \*\*(\d+)\*\* \|$", prose, flags=re.MULTILINE)
    assert minutes, f"{path.name} does not say how long its core takes"
    return int(minutes[1])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_gives_a_blank_by_name_only_what_a_check_makes_sure_of(self, path: Path) -> None:
        """Arguments with defaults: an answer whose other parameters are named differently is as good."""
        references = {exercise.reference.__name__: exercise.reference for exercise in exercises_of(path).values()}
        for _, cell in editions.code_cells(read(path)):
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in references:
                    parameters = inspect.signature(references[node.func.id]).parameters
                    named = [keyword.arg for keyword in node.keywords if keyword.arg]
                    assert all(parameters[name].default is not inspect.Parameter.empty for name in named), cell.source

    def test_shows_nothing_of_a_machine(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        assert [place for place in HERE if place in text] == []
        assert not re.search(r"/home/|/Users/|/tmp/|C:\\\\Users", text)

    def test_is_clean(self, path: Path) -> None:
        notebook = read(path)
        assert notebook.metadata.kernelspec.name == "python3"
        assert "widgets" not in notebook.metadata
        assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)

    def test_its_verdicts_on_claims_come_from_the_ledger(self, path: Path) -> None:
        notebook, number = read(path), path.name[:2]
        tables = [
            cell.source for cell in notebook.cells if cell.cell_type == "markdown" and "| verdict |" in cell.source
        ]
        assert tables == [], "typed by hand: let claims.table() make it"
        if claims.claims(number):
            shown = [cell for _, cell in editions.code_cells(notebook) if f'claims.table("{number}"' in cell.source]
            assert len(shown) == 1
            rows = text_of(shown[0]).splitlines()[2:]
            assert rows
            assert set(rows) <= set(claims.table(number).splitlines())

    def test_the_minutes_of_its_blanks_fit_into_its_core(self, path: Path) -> None:
        assert sum(exercise.minutes for exercise in exercises_of(path).values()) <= core_minutes(path)

    def test_is_mostly_compared(self, path: Path) -> None:
        cells = [cell for _, cell in editions.code_cells(read(path))]
        ignored = [cell for cell in cells if MEASURED in cell.metadata.get("tags", [])]
        assert len(ignored) < len(cells) / 2

    def test_has_a_blank_for_every_exercise_and_asks_for_all_the_lab_holds(self, path: Path) -> None:
        notebook, lab = read(path), contents(path.name[:2])
        assert [blank.exercise for blank in editions.blanks(notebook)] == [exercise.id for exercise in lab.exercises]
        source = "\n".join(cell.source for _, cell in editions.code_cells(notebook))
        for prediction in lab.predictions:
            assert f'lab.predict("{prediction.id}", guess=...)' in source
            assert f'lab.reveal("{prediction.id}"' in source
            assert source.index(f'lab.predict("{prediction.id}"') < source.index(f'lab.reveal("{prediction.id}"')
        for quiz in lab.quizzes:
            assert f'lab.quiz("{quiz.id}", answer=...)' in source
        prose = " ".join("\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown").split())
        for quiz in lab.quizzes:
            for option in quiz.options.values():
                assert " ".join(option.split()) in prose, f"{quiz.id}: {option!r} is not in the text"

    @pytest.mark.timeout(1500)
    def test_filled_with_references_it_runs_passes_and_prints_the_same_in_order_and_backwards(
        self, path: Path, tmp_path, monkeypatch
    ) -> None:
        """One kernel for both ways: a lab runs long, and a learner's kernel has run cells before, too.

        On the way back what a cell times is run once: that it runs again is what the way back is for. Measured cells
        that took long are left out there. Lab 07's table of policies by tasks rests on two texts a cell, not four.
        """
        monkeypatch.setenv("LABKIT_PROGRESS", str(tmp_path / "progress.json"))
        if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
            monkeypatch.setenv("LABKIT_THREADS", "1")  # as the Makefile has it for labs that run side by side
        # Other tests run beside this one: two threads that wait for each other on a core that is taken gain nothing.
        monkeypatch.setenv("LABKIT_THREADS", "1")
        stored = [cell for _, cell in editions.code_cells(read(path))]
        filled = editions.fill(read(path), exercises_of(path))
        cells = [cell for _, cell in editions.code_cells(filled)]
        again = copy.deepcopy(cells[1:])
        for cell in again:
            cell.id = f"again-{cell.id}"
        # On the way back no time is looked at: the cells that compare times stand behind and have run.
        try_twice, time_once = (nbformat.v4.new_code_cell(code) for code in (TRY_TWICE, TIME_ONCE))
        filled.cells = [try_twice, *cells, time_once, *reversed(again)]
        where = {"metadata": {"path": str(tmp_path)}}
        client = NotebookClient(filled, timeout=400, kernel_name="python3", resources=where)
        long = set()
        with client.setup_kernel():
            for place, cell in enumerate(filled.cells):
                if cell.id.removeprefix("again-") in long:
                    continue
                start = time.monotonic()
                client.execute_cell(cell, place)
                if time.monotonic() - start > LONG and MEASURED in cell.metadata.get("tags", []):
                    long.add(cell.id)
        again = [cell for cell in again if cell.id.removeprefix("again-") not in long]
        checked = 0
        for before, cell in zip(stored, cells, strict=True):
            for card in re.findall(r"^\d\d\.\w+ · (pass|pending|not yet)", text_of(cell), flags=re.MULTILINE):
                if "lab.check(" in cell.source:
                    assert card == "pass", text_of(cell)
                    checked += 1
            if not editions.shows_card(before):
                assert_printed(cell, before)
        assert checked == len(exercises_of(path))
        first = {f"again-{cell.id}": cell for cell in cells}
        for cell in again:
            assert_printed(cell, first[cell.id])
        assert len(again) > len(cells) / 2


def assert_printed(cell: nbformat.NotebookNode, before: nbformat.NotebookNode) -> None:
    """A cell that is compared printed what it printed before."""
    if MEASURED not in before.metadata.get("tags", []):
        assert text_of(cell) == text_of(before), cell.source
