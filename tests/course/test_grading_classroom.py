"""A class with more than one assignment: its limits, and why somebody has no points."""

from __future__ import annotations

import csv
import os
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest

pytest.importorskip("nbgrader")

from labkit.course.cli import main
from labkit.course.grading import classroom, export
from labkit.course.grading.classroom import collect, grade, limits_of, set_up

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@pytest.fixture(scope="module")
def two_labs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "class"
    set_up(folder, NOTEBOOKS / "01_attention_basics.ipynb", ids=["01.2"], limits={"memory": 2 * 10**9})
    set_up(folder, NOTEBOOKS / "02_cache_from_scratch.ipynb", ids=["02.1"])
    return folder


def pool(answer: Callable[[str, str], str]) -> type:
    """In the place of a pool of workers: what one would answer for an assignment and a student, without one."""

    class Pool:
        def __init__(self, *args, **options) -> None: ...
        def shutdown(self) -> None: ...
        def submit(self, step, folder, assignment, student):
            done: Future = Future()
            done.set_result(answer(assignment, student))
            return done

    return Pool


def told(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    """The rows of the table of reasons, by student and exercise; of a problem the exercise is empty."""
    with (folder / "reasons.csv").open() as file:
        return {(row["student"], row["exercise"]): row for row in csv.DictReader(file)}


def handed_in(folder: Path, **files: str) -> Path:
    """A folder with a file for each student."""
    folder.mkdir()
    for name, content in files.items():
        (folder / f"{name}.ipynb").write_text(content, encoding="utf-8")
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
    notebooks = {lab: next((two_labs / "release" / lab).glob("*.ipynb")).read_bytes() for lab in ("lab01", "lab02")}
    for lab, notebook in notebooks.items():
        (tmp_path / lab).mkdir()
        for name in ("ada", "ben"):
            (tmp_path / lab / f"{name}.ipynb").write_bytes(notebook)
    (tmp_path / "lab01/eve.ipynb").write_text("{")
    (tmp_path / "lab02/dan.ipynb").write_text("{")
    for lab in notebooks:
        collect(two_labs, tmp_path / lab, lab)

    def answer(assignment: str, student: str) -> str:
        return f"of {assignment}" if student == "ben" and assignment == "lab01" else ""

    monkeypatch.setattr(classroom, "ProcessPoolExecutor", pool(answer))
    list(grade(two_labs, "lab01"))
    list(grade(two_labs, "lab02"))
    list(grade(two_labs, "lab01", names=["ada"]))
    with (two_labs / "reasons.csv").open() as file:
        found = {(row["student"], row["assignment"]): row["seen"] for row in csv.DictReader(file)}
    assert set(found) == {("ben", "lab01"), ("eve", "lab01"), ("dan", "lab02")}
    assert found["ben", "lab01"] == "of lab01"


@pytest.fixture
def one_lab(tmp_path: Path) -> tuple[Path, str]:
    """A class with one exercise, and the notebook that it hands out."""
    folder = tmp_path / "class"
    set_up(folder, NOTEBOOKS / "01_attention_basics.ipynb", ids=["01.2"])
    return folder, next((folder / "release/lab01").glob("*.ipynb")).read_text(encoding="utf-8")


def test_what_comes_late_takes_no_reason_of_the_others_away(one_lab, tmp_path: Path, monkeypatch) -> None:
    folder, notebook = one_lab
    monkeypatch.setattr(classroom, "ProcessPoolExecutor", pool(lambda lab, student: f"of {student}"))
    collect(folder, handed_in(tmp_path / "first", ada=notebook, ben=notebook, eve="{", fay="{"))
    list(grade(folder))
    collect(folder, handed_in(tmp_path / "late", ben=notebook, eve=notebook, gus="{"))
    assert set(classroom.noted(folder, "lab01")["collect"]) == {"fay", "gus"}
    assert classroom.noted(folder, "lab01")["run"] == {"ada": "of ada"}  # ben's new one was not run yet
    list(grade(folder, names=["eve"]))
    assert {student: row["seen"] for (student, _), row in told(folder).items() if student in ("ada", "eve")} == {
        "ada": "of ada", "eve": "of eve"
    }  # fmt: skip
    assert {student for student, _ in told(folder)} == {"ada", "eve", "fay", "gus"}


def ended(folder: Path, assignment: str, student: str) -> str:
    """What a grader does that one submission brings to an end."""
    if student == "ben":
        os.kill(os.getpid(), signal.SIGKILL)
    return f"graded by {os.getpid()}"


def test_a_grader_that_is_ended_costs_no_other_submission(one_lab, tmp_path: Path, monkeypatch) -> None:
    folder, notebook = one_lab
    monkeypatch.setattr(classroom, "grade_one", ended)
    collect(folder, handed_in(tmp_path / "in", ada=notebook, ben=notebook, eve=notebook))
    said = {each.student: each.problem for each in grade(folder, workers=2)}
    assert "its grader was ended by the system" in said["ben"]
    assert all(said[name].startswith("graded by") for name in ("ada", "eve"))


def test_an_assignment_is_made_anew_until_something_was_collected_for_it(one_lab, tmp_path: Path, capsys) -> None:
    """Graded and ungraded submissions must have met the same hidden cases."""
    folder, notebook = one_lab
    source = next((folder / "source/lab01").glob("*.ipynb"))
    command = ["grade", "setup", str(folder), "--lab", "01", "--exercises", "01.2"]
    before = source.read_bytes()
    assert main(command) == 0
    assert source.read_bytes() != before  # other seeds
    collect(folder, handed_in(tmp_path / "in", ada=notebook))
    before = source.read_bytes()
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "lab01 was handed out, and 1 submission is in: made anew it would have other hidden cases" in said
    with export.gradebook(folder) as book:  # as a run leaves it
        book.add_student("ada")
        book.add_submission("lab01", "ada")
    shutil.rmtree(folder / "submitted")
    assert main(command) == 1
    assert "lab01 was handed out, and 1 submission is in" in capsys.readouterr().err
    assert source.read_bytes() == before
    assert main(["grade", "setup", str(folder), "--lab", "02", "--exercises", "02.1"]) == 0  # another one


def test_who_has_points_and_hands_in_a_broken_file_keeps_both_in_the_table(one_lab, tmp_path, monkeypatch) -> None:
    """The table of reasons says no other thing than the totals."""
    folder, notebook = one_lab
    with export.gradebook(folder) as book:
        for name, score in (("eve", 2.0), ("dan", None)):  # what a grading leaves, and one that failed
            book.add_student(name)
            book.add_submission("lab01", name)
            book.find_submission("lab01", name).notebooks[0].grades[0].auto_score = score
        book.db.commit()
    collect(folder, handed_in(tmp_path / "first", eve=notebook, dan=notebook))
    collect(folder, handed_in(tmp_path / "late", eve="{"))
    failed = pool(lambda lab, student: "the grader ended" if student == "dan" else "")
    monkeypatch.setattr(classroom, "ProcessPoolExecutor", failed)
    assert {each.student: each.points for each in grade(folder)} == {"eve": 2.0, "dan": 0.0}
    rows = told(folder)
    assert set(rows) == {("eve", ""), ("eve", "01.2"), ("dan", "")}
    assert rows["eve", "01.2"]["points"] == "2"
    assert rows["eve", ""]["status"] == "latest not graded"
    assert "no notebook that Jupyter can read" in rows["eve", ""]["seen"]
    assert rows["eve", ""]["look"] == export.EARLIER
    assert (rows["dan", ""]["status"], rows["dan", ""]["seen"]) == ("not graded", "the grader ended")
