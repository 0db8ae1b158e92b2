"""What can be wrong with a notebook of the course and is seen without running it: `labkit lint`.

Each finding names file, cell and remedy. What a cell's output belongs to is known from what `make notebooks`
writes into the cell's metadata (`labkit.course.record`): a digest of the source that was run and, of a measured
cell, what else the machine did. So an output is called stale when its cell's source has changed since; that an
unchanged cell would print something else today, only running it can say, and nbval does.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from labkit.course import editions
from labkit.course.catalogue import contents, numbers
from labkit.course.contents import LabContents
from labkit.course.editions.leaks import leaks
from labkit.course.exercise import Exercise
from labkit.course.record import MEASURED, digest, kept

RECORD = "run it and keep what it shows: python -m labkit.course.record --only CELL FILE, or make notebooks for all"
LAB = re.compile(r"""\bLab\(\s*["'](\d\d)["']""")
ASKED = re.compile(r"""\blab\.(check|hint|solution|predict|reveal|quiz)\(\s*["']([^"']*)["']""")
KINDS = {"predict": "predictions", "reveal": "predictions", "quiz": "quizzes"}  # the others ask for exercises
PICTURES = ("image/png", "image/jpeg", "image/svg+xml")


@dataclass(frozen=True)
class Finding:
    """What is wrong, where, and what to do."""

    rule: str
    file: str
    cell: str
    what: str
    remedy: str

    def __str__(self) -> str:
        where = f"{self.file}, cell {self.cell}" if self.cell else self.file
        remedy = self.remedy.replace("CELL", self.cell).replace("FILE", self.file)
        return f"{where}: {self.what} [{self.rule}]\n    {remedy}"


Found = Iterator[tuple[str, str, str]]
"""A cell's id, what is wrong with it, and the remedy."""


def lint(path: Path) -> list[Finding]:
    """All that is found in one notebook; a file that is no notebook is a finding, too."""
    try:
        notebook = nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat's own, json's, the system's: whatever keeps it from being read
        said = str(error).strip().partition("\n")[0][:120]
        remedy = "name a notebook, a file that ends in .ipynb; a damaged one comes back with git checkout FILE"
        return [Finding("unreadable", str(path), "", f"cannot be read as a notebook ({said})", remedy)]
    return lint_notebook(notebook, str(path))


def lint_notebook(notebook: NotebookNode, file: str) -> list[Finding]:
    """All that is found in a notebook that was read from `file`, in the order of `RULES` and of its cells."""
    lab, findings = lab_of(notebook, file), []
    for name, rule in RULES.items():
        findings += [Finding(name, file, *found) for found in rule(notebook)]
    if lab is None:
        remedy = 'make its first code cell say which it is, as in lab = Lab("02")'
        return [*findings, Finding("no lab", file, "", "belongs to no lab that there is", remedy)]
    try:
        for name, rule_of_lab in RULES_OF_LABS.items():
            findings += [Finding(name, file, *found) for found in rule_of_lab(notebook, lab)]
    except ValueError as error:  # of a check whose result goes to another name
        findings.append(Finding("missing stub", file, "", str(error), "give the result the name that is checked"))
    return findings


def lab_of(notebook: NotebookNode, file: str) -> LabContents | None:
    """The lab that a notebook says it is, or that its name begins with."""
    said = [match[1] for _, cell in editions.code_cells(notebook) if (match := LAB.search(cell.source))]
    number = said[0] if said else Path(file).name[:2]
    return contents(number) if number in numbers() else None


# Of every notebook.


def not_run(notebook: NotebookNode) -> Found:
    """Code cells that were never run."""
    for _, cell in editions.code_cells(notebook):
        if cell.execution_count is None:
            yield cell.id, "was never run", RECORD


def out_of_order(notebook: NotebookNode) -> Found:
    """The first cell that was not run where it stands: what follows it is out of order with it."""
    for place, (_, cell) in enumerate(editions.code_cells(notebook), start=1):
        if cell.execution_count not in (place, None):
            what = f"was run as number {cell.execution_count} and stands as number {place} of the code cells"
            yield cell.id, what, "put it back where it was, or run all cells from the top: make notebooks"
            return


def stale(notebook: NotebookNode) -> Found:
    """Cells that changed after they were run, and those of which nothing says what was run."""
    for _, cell in editions.code_cells(notebook):
        if cell.execution_count is None:
            continue
        known = kept(cell).get("source")
        if known is None:
            yield cell.id, "nothing says which source its output is of", RECORD
        elif known != digest(cell.source):
            yield cell.id, "its output is stale: the source has changed since it was run", RECORD


def busy(notebook: NotebookNode) -> Found:
    """Measured outputs of a machine that did something else as well."""
    for _, cell in editions.code_cells(notebook):
        machine = str(kept(cell).get("machine", ""))
        if MEASURED in cell.metadata.get("tags", []) and machine.startswith("busy"):
            yield cell.id, f"was measured on a busy machine ({machine})", "wait until it is quiet, then " + RECORD


def of_no_machine(notebook: NotebookNode) -> Found:
    """Measured outputs of which nothing says what the machine did beside them."""
    for _, cell in editions.code_cells(notebook):
        known = kept(cell)  # empty: the output's source is not known either, which is a finding of its own
        if MEASURED in cell.metadata.get("tags", []) and cell.outputs and known and not known.get("machine"):
            yield cell.id, "was measured, and nothing says whether the machine was quiet", RECORD


def failed(notebook: NotebookNode) -> Found:
    """Cells that ended in an error or warned, where they are not meant to."""
    for _, cell in editions.code_cells(notebook):
        meant = "raises-exception" in cell.metadata.get("tags", [])
        if any(out.output_type == "error" for out in cell.outputs) and not meant:
            yield cell.id, "ended in an error", "mend it, then " + RECORD
        elif any(out.get("name") == "stderr" for out in cell.outputs):
            yield cell.id, "wrote to stderr: a warning, or a bar that stayed", "mend its cause, then " + RECORD


def without_words(notebook: NotebookNode) -> Found:
    """Pictures without alternative text, in outputs and in prose."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            for kind in PICTURES:
                if kind in output.get("data", {}) and not output.metadata.get(kind, {}).get("alt", "").strip():
                    remedy = "end the function that draws it with  return described(fig, ...)  (labkit.plots), then "
                    yield cell.id, "shows a figure without alternative text", remedy + RECORD
        if cell.cell_type == "markdown" and re.search(r"!\[\s*\]\(|<img(?![^>]*\balt=[\"'][^\"'])[^>]*>", cell.source):
            remedy = "say between the brackets, or in alt=, what is to be seen"
            yield cell.id, "has a picture without alternative text", remedy


# Of notebooks of a lab.


def no_stub(notebook: NotebookNode, lab: LabContents) -> Found:
    """Exercises without a blank."""
    there = {blank.exercise for blank in editions.blanks(notebook)}
    for exercise in lab.exercises:
        if exercise.id not in there:
            name = exercise.reference.__name__
            what = f"has no blank for exercise {exercise.id}, {exercise.title}"
            remedy = f'add a cell with its signature, its docstring and  {name} = lab.check("{exercise.id}", {name})'
            yield "", what, remedy


def unknown(notebook: NotebookNode, lab: LabContents) -> Found:
    """Ids that the lab does not have, in code and in prose."""
    known = {kind: {each.id for each in getattr(lab, kind)} for kind in ("exercises", "predictions", "quizzes")}
    for cell in notebook.cells:
        for verb, id in ASKED.findall(cell.source):
            kind = KINDS.get(verb, "exercises")
            if id not in known[kind]:
                one = {"exercises": "exercise", "predictions": "guess", "quizzes": "question"}[kind]
                there = ", ".join(sorted(known[kind])) or "none"
                yield (
                    cell.id,
                    f"lab.{verb} asks for {one} {id}, which lab {lab.number} does not have",
                    f"it has {there}",
                )


def drifted(notebook: NotebookNode, lab: LabContents) -> Found:
    """Stubs whose signature or docstring is not the reference's."""
    for cell, exercise, stub in stubs(notebook, lab):
        if stub is None:
            name = exercise.reference.__name__
            yield cell, f"checks {exercise.id} and defines no {name}", f"define {name} in the cell that checks it"
            continue
        for said, wanted in differences(signatures(stub), signatures(reference_of(exercise))):
            what = f"the blank of {exercise.id} has drifted from its reference: {said} here, {wanted} there"
            yield cell, what, "make both say the same, then " + RECORD


def solved(notebook: NotebookNode, lab: LabContents) -> Found:
    """Solutions: in code under whatever name, in a comment, in prose, or printed."""
    remedy = "put  raise NotImplementedError  in its place: the notebook is what learners start from"
    references = {exercise.id: exercise.reference for exercise in lab.exercises}
    for cell in notebook.cells:
        for id in leaks(NotebookNode(cells=[cell]), references):
            yield cell.id, f"holds the solution of {id}", remedy


RULES = {
    "not run": not_run,
    "out of order": out_of_order,
    "stale output": stale,
    "busy machine": busy,
    "unknown machine": of_no_machine,
    "error": failed,
    "no alternative text": without_words,
}
RULES_OF_LABS = {"missing stub": no_stub, "unknown id": unknown, "drifted": drifted, "solution": solved}


def stubs(
    notebook: NotebookNode, lab: LabContents
) -> Iterator[tuple[str, Exercise, ast.FunctionDef | ast.ClassDef | None]]:
    """Each blank of an exercise that there is: its cell's id, its exercise, and what the learner is to fill."""
    exercises = {exercise.id: exercise for exercise in lab.exercises}
    for blank in editions.blanks(notebook):
        if exercise := exercises.get(blank.exercise):
            cell = notebook.cells[blank.cell]
            try:
                yield cell.id, exercise, editions.definition(cell.source, blank.name)
            except (ValueError, SyntaxError):
                yield cell.id, exercise, None


def reference_of(exercise: Exercise) -> ast.FunctionDef | ast.ClassDef:
    """A reference, parsed."""
    (node,) = ast.parse(editions.source_of(exercise.reference)).body
    assert isinstance(node, (ast.FunctionDef, ast.ClassDef))
    return node


def signatures(node: ast.AST) -> list[tuple]:
    """Name, parameters, return and docstring of a function, or of a class and each of its methods."""
    if isinstance(node, ast.ClassDef):
        methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
        return [(node.name, "", "", ast.get_docstring(node)), *(each for part in methods for each in signatures(part))]
    assert isinstance(node, ast.FunctionDef)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return [(node.name, f"({ast.unparse(node.args)})", returns, ast.get_docstring(node))]


def differences(here: list[tuple], there: list[tuple]) -> Iterator[tuple[str, str]]:
    """The first thing that differs, said of both; nothing when nothing does."""
    for mine, its in zip(here, there, strict=False):
        if mine[:3] != its[:3]:
            yield "".join(mine[:3]), "".join(its[:3])
            return
        if mine[3] != its[3]:
            yield f"{mine[0]}'s docstring is {short(mine[3])}", short(its[3])
            return
    if len(here) != len(there):
        yield listed(here), listed(there)


def short(docstring: str | None) -> str:
    """A docstring in one line."""
    return repr(" ".join(docstring.split())[:60]) if docstring else "none"


def listed(parts: Iterable[tuple]) -> str:
    """What a class has, by name."""
    return ", ".join(name for name, *_ in parts)
