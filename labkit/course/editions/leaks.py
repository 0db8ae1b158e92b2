"""Does a notebook, or any text, hold a solution? By structure where it is code, by letters where it is not."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from nbformat import NotebookNode

from labkit.course.editions.blanks import source_of


def bodies(reference: Callable) -> list[list[ast.stmt]]:
    """What would give a solution away: a function's statements without its docstring, or each method's that says more
    than one plain line."""
    node = ast.parse(source_of(reference)).body[0]
    if isinstance(node, ast.ClassDef):
        methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
        return [body for method in methods if len(body := without_docstring(method)) > 1]
    assert isinstance(node, ast.FunctionDef)
    return [without_docstring(node)]


def without_docstring(node: ast.FunctionDef) -> list[ast.stmt]:
    """Its statements."""
    return node.body[1:] if ast.get_docstring(node) is not None else node.body


def dumped(statements: list[ast.stmt]) -> tuple[str, ...]:
    """Statements without places, comments and layout; a string is no statement."""
    return tuple(ast.dump(part) for part in statements if not is_text(part))


def is_text(statement: ast.stmt) -> bool:
    """Whether it is a string that stands alone, as a docstring does."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


Run = tuple[str, tuple[str, ...]]  # the function or class whose body it is, or ""; its statements


def runs(source: str) -> list[Run] | None:
    """Every run of statements in code: of the module, of each function, loop, branch. None where it is no Python."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    found = []
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            statements = getattr(node, name, None)
            if isinstance(statements, list):
                found.append((getattr(node, "name", ""), dumped(statements)))
    return found


def squeezed(text: str) -> str:
    """Letters alone: no white space, one kind of quotes."""
    return re.sub(r"\s+", "", text).replace('"', "'")


@dataclass(frozen=True)
class Solution:
    """A reference in the forms in which it could be met: as runs of statements, as letters."""

    name: str
    statements: list[tuple[str, ...]]
    letters: list[str]

    @classmethod
    @cache
    def of(cls, reference: Callable) -> Solution:
        """As written, without comments and docstring, and as Python itself would write it."""
        source = source_of(reference)
        node = ast.parse(source).body[0]
        assert isinstance(node, (ast.FunctionDef, ast.ClassDef))
        first = node.body[0]
        start = (first.end_lineno or 0) + 1 if is_text(first) and len(node.body) > 1 else first.lineno
        lines = [re.sub(r"\s+#.*$", "", line) for line in source.splitlines()]
        own = bodies(reference)
        letters = [
            squeezed("\n".join(lines[start - 1 :])),
            *(squeezed("\n".join(map(ast.unparse, body))) for body in own),
        ]
        return cls(reference.__name__, [dumped(body) for body in own], [told for told in letters if len(told) > 20])

    def in_runs(self, here: list[Run]) -> bool:
        """Whether these statements stand one after the other somewhere. In a blank of the same name they may stand
        among others: what is to be mended there is one too many."""
        for body in self.statements:
            for owner, run in here:
                if owner == self.name:
                    if run == body:
                        return True
                elif any(run[start : start + len(body)] == body for start in range(len(run) - len(body) + 1)):
                    return True
        return False

    def in_letters(self, text: str) -> bool:
        """Whether squeezed text has it."""
        return any(told in text for told in self.letters)


def comments(source: str) -> str:
    """What the comment lines of code say."""
    lines = [line.strip() for line in source.splitlines()]
    return "\n".join(line.removeprefix("#") for line in lines if line.startswith("#"))


def leaks(notebook: NotebookNode, references: Mapping[str, Callable]) -> list[str]:
    """The exercises whose solution stands in a notebook: in code, in a comment, in text, or in what it printed.

    references: the functions and classes that fill the blanks, by the exercise's id.
    """
    code, letters = [], []
    for cell in notebook.cells:
        here = runs(cell.source) if cell.cell_type == "code" else None
        if here is None:
            letters.append(squeezed(cell.source))
        else:
            code += here
            letters.append(squeezed(comments(cell.source)))
        for output in cell.get("outputs", []):
            told = {"text": output.get("text", ""), **output.get("data", {})}
            letters += [squeezed(str(text)) for kind, text in told.items() if not kind.startswith("image/")]
    found = []
    for id, reference in references.items():
        solution = Solution.of(reference)
        if solution.in_runs(code) or any(map(solution.in_letters, letters)):
            found.append(id)
    return found
