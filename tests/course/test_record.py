"""Recording: what was run stands beside what it gave, and a busy machine is said."""

from __future__ import annotations

import copy
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from labkit import measure
from labkit.course import record
from labkit.course.lint import busy, not_run, out_of_order, stale
from labkit.course.record import MEASURED, digest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    cells = [nbformat.v4.new_code_cell(source) for source in ("x = 2", "print(x)", "print(x + 1)")]
    cells[2].metadata["tags"] = [MEASURED]
    for name, cell in zip("abc", cells, strict=True):
        cell.id = name
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Two"), *cells])
    made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(made, tmp_path / "small.ipynb")
    return tmp_path / "small.ipynb"


def looks(monkeypatch, *said: dict[str, str] | Exception) -> None:
    """What the machine's looks give, one after another."""
    left = list(said)

    def quiet() -> dict[str, str]:
        now = left.pop(0)
        if isinstance(now, Exception):
            raise now
        return now

    monkeypatch.setattr(measure, "quiet", quiet)


def as_if_run(path: Path) -> NotebookNode:
    """What running would give: counts, and the source in place of what it prints."""
    made = copy.deepcopy(nbformat.read(path, as_version=4))
    for number, cell in enumerate(made.cells[1:], start=1):
        cell.execution_count = number
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=f"{cell.source}\n")]
    return made


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def test_a_notebook_is_run_and_says_of_which_source_each_output_is(path: Path, monkeypatch) -> None:
    looks(monkeypatch, {"quiet": "a read at 20 GB/s"}, {"quiet": "a read at 20 GB/s"})
    assert record.main([str(path)]) == 0
    made = read(path)
    _, first, second, third = made.cells
    assert [cell.execution_count for cell in made.cells[1:]] == [1, 2, 3]
    assert [out.text for cell in (second, third) for out in cell.outputs] == ["2\n", "3\n"]
    assert first.metadata["labkit"] == {"source": digest("x = 2")}
    assert third.metadata["labkit"] == {"source": digest("print(x + 1)"), "machine": "quiet"}
    assert "execution" not in first.metadata
    assert [entry.name for entry in path.parent.iterdir()] == ["small.ipynb"]
    assert [list(rule(made)) for rule in (not_run, out_of_order, stale, busy)] == [[], [], [], []]


def test_only_what_is_named_is_kept(path: Path, monkeypatch) -> None:
    looks(monkeypatch, *[{"quiet": ""}] * 2)
    monkeypatch.setattr(record, "execute", as_if_run)
    record.record(path, only=["c"])
    _, first, second, third = read(path).cells
    assert (first.execution_count, second.outputs, third.execution_count) == (None, [], 3)
    assert "labkit" not in second.metadata
    assert third.metadata["labkit"]["source"] == digest(third.source)


def test_a_cell_that_is_not_there_is_said_before_anything_runs(path: Path, capsys) -> None:
    assert record.main([str(path), "--only", "z"]) == 1
    assert "has no cell z" in capsys.readouterr().err


def test_nothing_runs_on_a_busy_machine(path: Path, monkeypatch, capsys) -> None:
    looks(monkeypatch, measure.BusyError("other processes use 1.3 cores: wait until this machine is quiet"))
    before = path.read_bytes()
    assert record.main([str(path)]) == 1
    assert "other processes use 1.3 cores" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "said",
    [
        [{"busy": "other processes use 1.3 cores"}],  # LABKIT_BUSY=allow
        [{"quiet": ""}, measure.BusyError("other processes use 1.3 cores: wait until this machine is quiet, or ...")],
    ],
    ids=["allowed", "meanwhile"],
)
def test_a_machine_that_was_or_became_busy_is_found_by_the_linter(path: Path, monkeypatch, said) -> None:
    looks(monkeypatch, *said)
    monkeypatch.setattr(record, "execute", as_if_run)
    record.record(path)
    ((cell, what, _),) = busy(read(path))
    assert cell == "c"
    assert "busy: other processes use 1.3 cores" in what


def test_blanks_at_the_ends_of_lines_are_no_change() -> None:
    assert digest("x = 2  \ny = 3\n") == digest("x = 2\ny = 3") != digest("x = 2\n\ny = 3")
