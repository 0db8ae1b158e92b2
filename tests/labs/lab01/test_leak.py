"""The debug exercise: it starts from the bug that its check knows."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import torch

from labkit.course import editions
from labkit.course.examine import examine
from labkit.labs.lab01.leak import Leak
from labkit.labs.lab01.references import causal_mask

NOTEBOOK = Path(__file__).resolve().parents[3] / "notebooks" / "01_attention_basics.ipynb"


def test_the_debug_blank_in_the_notebook_is_the_bug_that_the_check_knows() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    blank = next(blank for blank in editions.blanks(notebook) if blank.exercise == "01.6")
    stub = editions.definition(notebook.cells[blank.cell].source, "attend")
    assert ast.dump(stub) == ast.dump(ast.parse(Leak.starting_point).body[0])


def test_the_untouched_bug_is_told_what_it_is_and_the_reference_goes_on() -> None:
    names = {"causal_mask": causal_mask, "torch": torch, "math": __import__("math"), "Tensor": torch.Tensor}
    exec(Leak.starting_point, names)
    verdict = examine(Leak(), names["attend"])
    assert verdict.status == "not yet"
    assert verdict.finding.diagnosis == "mask-after"
