"""A class with more than one assignment: its limits, and why somebody has no points."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

pytest.importorskip("nbgrader")

from labkit.course.cli import main
from labkit.course.grading import classroom
from labkit.course.grading.classroom import collect, grade, limits_of, set_up

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@pytest.fixture(scope="module")
def two_labs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "class"
    set_up(folder, NOTEBOOKS / "01_attention_basics.ipynb", ids=["01.2"], limits={"memory": 2 * 10**9})
    set_up(folder, NOTEBOOKS / "02_cache_from_scratch.ipynb", ids=["02.1"])
    return folder


def test_other_limits_for_a_class_that_has_some_are_refused(two_labs: Path, capsys) -> None:
    before = (two_labs / "nbgrader_config.py").read_text()
    assert limits_of(two_labs).memory == 2 * 10**9
    command = ["grade", "setup", str(two_labs), "--lab", "01", "--exercises", "01.1"]
    assert main([*command, "--memory", "3", "--wall-seconds", "3600"]) == 1
    said = capsys.readouterr().err
    assert "this class has other limits: memory is 2e+09, not 3e+09. Nothing was changed." in said
    assert "nbgrader_config.py" in said
    assert "wall_seconds" not in said  # that one is as it was
    assert (two_labs / "nbgrader_config.py").read_text() == before
    assert "01.1" not in next((two_labs / "source/lab01").glob("*.ipynb")).read_text()
    assert main(["grade", "setup", str(two_labs), "--lab", "01", "--exercises", "01.2", "--memory", "2"]) == 0


def test_each_assignment_keeps_why_somebody_has_no_points(two_labs: Path, tmp_path: Path, monkeypatch) -> None:
    """Neither another assignment nor a run for one student takes the reasons of the others away."""
    handed_in = {lab: next((two_labs / "release" / lab).glob("*.ipynb")).read_bytes() for lab in ("lab01", "lab02")}
    for lab, notebook in handed_in.items():
        (tmp_path / lab).mkdir()
        for name in ("ada", "ben"):
            (tmp_path / lab / f"{name}.ipynb").write_bytes(notebook)
    (tmp_path / "lab01/eve.ipynb").write_text("{")
    (tmp_path / "lab02/dan.ipynb").write_text("{")
    for lab in handed_in:
        collect(two_labs, tmp_path / lab, lab)

    class Pool:  # what a worker would answer, without one
        def __init__(self, *args, **options) -> None: ...
        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *error) -> None: ...
        def submit(self, step, folder, assignment, student):
            from concurrent.futures import Future

            answer: Future = Future()
            answer.set_result(f"of {assignment}" if student == "ben" and assignment == "lab01" else "")
            return answer

    monkeypatch.setattr(classroom, "ProcessPoolExecutor", Pool)
    list(grade(two_labs, "lab01"))
    list(grade(two_labs, "lab02"))
    list(grade(two_labs, "lab01", names=["ada"]))
    with (two_labs / "reasons.csv").open() as file:
        found = {(row["student"], row["assignment"]): row["seen"] for row in csv.DictReader(file)}
    assert set(found) == {("ben", "lab01"), ("eve", "lab01"), ("dan", "lab02")}
    assert found["ben", "lab01"] == "of lab01"
