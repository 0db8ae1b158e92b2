"""The linter: nothing is found in the course's notebooks, and one change to a real one gives exactly that finding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from labkit.course import cli, editions
from labkit.course.catalogue import contents
from labkit.course.lint import lint, lint_notebook
from labkit.course.record import MEASURED, stamp

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
REAL = NOTEBOOKS[1]
LAB = contents("02")


@pytest.fixture(scope="module")
def real() -> NotebookNode:
    return nbformat.read(REAL, as_version=4)


@pytest.fixture
def notebook(real: NotebookNode) -> NotebookNode:
    return copy.deepcopy(real)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_nothing_is_found_in_the_notebooks_of_the_course(path: Path) -> None:
    assert "\n".join(map(str, lint(path))) == ""


def codes(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for _, cell in editions.code_cells(notebook)]


def blank_of(notebook: NotebookNode, exercise: str) -> NotebookNode:
    (place,) = (blank.cell for blank in editions.blanks(notebook) if blank.exercise == exercise)
    return notebook.cells[place]


def edit(cell: NotebookNode, old: str, new: str) -> NotebookNode:
    """Another source, and an output that is said to be of it."""
    assert old in cell.source
    cell.source = cell.source.replace(old, new, 1)
    stamp([cell])
    return cell


def never_run(notebook: NotebookNode) -> NotebookNode:
    cell = codes(notebook)[7]
    cell.execution_count, cell.outputs = None, []
    return cell


def exchanged(notebook: NotebookNode) -> NotebookNode:
    places = [place for place, _ in editions.code_cells(notebook)]
    first, second = places[7], places[8]
    notebook.cells[first], notebook.cells[second] = notebook.cells[second], notebook.cells[first]
    return notebook.cells[first]


def changed_since(notebook: NotebookNode) -> NotebookNode:
    cell = codes(notebook)[7]
    cell.source += "\nprint(1 + 1)"
    return cell


def of_unknown_source(notebook: NotebookNode) -> NotebookNode:
    cell = codes(notebook)[7]
    del cell.metadata["labkit"]
    return cell


def measured_beside_others(notebook: NotebookNode) -> NotebookNode:
    cell = next(cell for cell in codes(notebook) if MEASURED in cell.metadata.get("tags", []))
    stamp([cell], "busy: other processes use 1.3 cores")
    return cell


def measured_nobody_knows_where(notebook: NotebookNode) -> NotebookNode:
    cell = next(cell for cell in codes(notebook) if MEASURED in cell.metadata.get("tags", []) and cell.outputs)
    del cell.metadata["labkit"]["machine"]
    return cell


def in_error(notebook: NotebookNode) -> NotebookNode:
    cell = codes(notebook)[7]
    cell.outputs = [nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[])]
    return cell


def warned(notebook: NotebookNode) -> NotebookNode:
    cell = codes(notebook)[7]
    cell.outputs.append(nbformat.v4.new_output("stream", name="stderr", text="a warning\n"))
    return cell


def wordless(notebook: NotebookNode) -> NotebookNode:
    cell = next(cell for cell in codes(notebook) if any("image/png" in out.get("data", {}) for out in cell.outputs))
    for output in cell.outputs:
        output.get("metadata", {}).clear()
    return cell


def wordless_in_prose(notebook: NotebookNode) -> NotebookNode:
    cell = next(cell for cell in notebook.cells if cell.cell_type == "markdown")
    cell.source += "\n\n![](picture.png)"
    return cell


def wordless_in_html(notebook: NotebookNode) -> NotebookNode:
    cell = next(cell for cell in notebook.cells if cell.cell_type == "markdown")
    cell.source += '\n\n<img src="picture.png" alt="">'
    return cell


def without_a_blank(notebook: NotebookNode) -> None:
    edit(blank_of(notebook, "02.1"), "lab.check(", "str(")


def of_another_signature(notebook: NotebookNode) -> NotebookNode:
    return edit(blank_of(notebook, "02.1"), "(self, k: ", "(self, one_more, k: ")


def of_another_docstring(notebook: NotebookNode) -> NotebookNode:
    return edit(blank_of(notebook, "02.1"), '"""', '"""Not this. ')


def solution_of(exercise: int) -> str:
    return editions.source_of(LAB.exercises[exercise].reference)


def filled(notebook: NotebookNode) -> NotebookNode:
    cell = blank_of(notebook, "02.1")
    exercises = {exercise.id: exercise for exercise in LAB.exercises}
    place = notebook.cells.index(cell)
    cell.source = editions.fill(notebook, exercises).cells[place].source
    stamp([cell])
    return cell


def told_elsewhere(notebook: NotebookNode) -> NotebookNode:
    """Under another name, with another docstring, in a cell of its own kind."""
    cell, name = codes(notebook)[7], LAB.exercises[0].reference.__name__
    return edit(cell, cell.source, cell.source + "\n\n\n" + solution_of(0).replace(f"class {name}", "class Mine"))


def told_in_prose(notebook: NotebookNode) -> NotebookNode:
    cell = next(cell for cell in notebook.cells if cell.cell_type == "markdown")
    cell.source += "\n\n```python\n" + code_alone(0) + "\n```"
    return cell


def told_in_a_comment(notebook: NotebookNode) -> NotebookNode:
    cell = codes(notebook)[7]
    commented = "\n".join("# " + line for line in code_alone(0).split("\n"))
    return edit(cell, cell.source, cell.source + "\n" + commented)


def code_alone(exercise: int) -> str:
    """A reference without its docstring, as Python writes it."""
    import ast

    node = ast.parse(solution_of(exercise)).body[0]
    return "\n".join(ast.unparse(part) for part in node.body[1:])


def unknown_question(notebook: NotebookNode) -> NotebookNode:
    cell = next(cell for cell in codes(notebook) if "lab.quiz(" in cell.source)
    return edit(cell, 'lab.quiz("02.', 'lab.quiz("02.no')


def unknown_exercise_in_prose(notebook: NotebookNode) -> NotebookNode:
    cell = next(cell for cell in notebook.cells if cell.cell_type == "markdown")
    cell.source += '\n\nAsk `lab.hint("02.99")`.'
    return cell


def result_to_another_name(notebook: NotebookNode) -> None:
    name = LAB.exercises[0].reference.__name__
    edit(blank_of(notebook, "02.1"), f"{name} = lab.check(", "other = lab.check(")


ONE_CHANGE: list[tuple[Callable, str, str, str]] = [
    (never_run, "not run", "never run", "make notebooks"),
    (exchanged, "out of order", "run as number 9 and stands as number 8", "make notebooks"),
    (changed_since, "stale output", "has changed since", "--only {cell}"),
    (of_unknown_source, "stale output", "nothing says which source", "--only {cell}"),
    (measured_beside_others, "busy machine", "other processes use 1.3 cores", "wait until it is quiet"),
    (measured_nobody_knows_where, "unknown machine", "whether the machine was quiet", "--only {cell}"),
    (in_error, "error", "ended in an error", "mend it"),
    (warned, "error", "wrote to stderr", "mend its cause"),
    (wordless, "no alternative text", "a figure without", "described(fig"),
    (wordless_in_prose, "no alternative text", "a picture without", "between the brackets"),
    (wordless_in_html, "no alternative text", "a picture without", "alt="),
    (without_a_blank, "missing stub", "no blank for exercise 02.1", 'lab.check("02.1"'),
    (result_to_another_name, "missing stub", "must go back to", "the name that is checked"),
    (of_another_signature, "drifted", "append(self, one_more, k", "make both say the same"),
    (of_another_docstring, "drifted", "'Not this. ", "make both say the same"),
    (filled, "solution", "holds the solution of 02.1", "raise NotImplementedError"),
    (told_elsewhere, "solution", "holds the solution of 02.1", "raise NotImplementedError"),
    (told_in_prose, "solution", "holds the solution of 02.1", "raise NotImplementedError"),
    (told_in_a_comment, "solution", "holds the solution of 02.1", "raise NotImplementedError"),
    (unknown_question, "unknown id", "asks for question 02.no", "it has 02."),
    (unknown_exercise_in_prose, "unknown id", "asks for exercise 02.99", "it has 02.1"),
]


@pytest.mark.parametrize(
    ("change", "rule", "what", "remedy"), ONE_CHANGE, ids=[change.__name__ for change, *_ in ONE_CHANGE]
)
def test_one_change_gives_exactly_one_finding_with_file_cell_and_remedy(
    notebook: NotebookNode, change: Callable, rule: str, what: str, remedy: str
) -> None:
    cell = change(notebook)
    (found,) = lint_notebook(notebook, "notebooks/02_bad.ipynb")
    assert found.rule == rule
    assert what in found.what
    assert found.cell == (cell.id if cell else "")
    where = f"notebooks/02_bad.ipynb, cell {cell.id}: " if cell else "notebooks/02_bad.ipynb: "
    assert str(found).startswith(where)
    assert remedy.format(cell=found.cell) in str(found).partition("\n")[2]


def test_several_faults_are_several_findings(notebook: NotebookNode) -> None:
    for change in (wordless, of_unknown_source, unknown_question):
        change(notebook)
    found = lint_notebook(notebook, "02_bad.ipynb")
    assert [finding.rule for finding in found] == ["stale output", "no alternative text", "unknown id"]


@pytest.mark.parametrize(
    "content", [None, b"", b"text", b"\x80\xff", b"[]", b"{}", b'{"cells": 1, "nbformat": 4, "nbformat_minor": 5}']
)
def test_a_file_that_is_no_notebook_is_one_finding(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "02_bad.ipynb"
    if content is not None:
        path.write_bytes(content)
    (found,) = lint(path)
    assert found.rule == "unreadable"
    assert str(path) in str(found)
    assert len(str(found).splitlines()) == 2


def test_a_cell_that_is_no_python_is_linted_like_others(notebook: NotebookNode) -> None:
    edit(blank_of(notebook, "02.1"), "def ", "define ")
    (found,) = lint_notebook(notebook, "02_bad.ipynb")
    assert (found.rule, "defines no" in found.what) == ("drifted", True)


def test_a_notebook_of_no_lab_is_said_to_be_one() -> None:
    cell = nbformat.v4.new_code_cell("1 + 1", execution_count=1)
    stamp([cell])
    (found,) = lint_notebook(nbformat.v4.new_notebook(cells=[cell]), "notes.ipynb")
    assert found.rule == "no lab"


def test_the_command_names_what_it_found_and_counts(notebook: NotebookNode, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    nbformat.write(notebook, "02_good.ipynb")
    assert cli.main(["lint", "02_good.ipynb"]) == 0
    assert capsys.readouterr().out == "notebooks: 1, findings: 0\n"
    cell = wordless(notebook)
    nbformat.write(notebook, "02_bad.ipynb")
    assert cli.main(["lint", "02_good.ipynb", "02_bad.ipynb"]) == 1
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"02_bad.ipynb, cell {cell.id}: ")
    assert last == "notebooks: 2, findings: 1"
