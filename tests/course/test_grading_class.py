"""A class from the command line: handed out, collected, graded, told; and what each of 30 submissions comes to."""

from __future__ import annotations

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import nbformat
import pytest

import labkit
from labkit.course.grading.room import WORDS, enforced
from tests.course.submissions import made, submissions

pytest.importorskip("nbgrader")

EXERCISES = ("01.1", "01.2", "01.6")


@pytest.fixture
def labkit_grade():
    """The command, with a folder of its own for rooms: a short path, since sockets have no long names."""
    place = Path(tempfile.mkdtemp(prefix="lk"))
    place.chmod(0o711)

    def command(*arguments: str) -> subprocess.CompletedProcess:
        line = [sys.executable, "-m", "labkit.course.cli", "grade", *arguments]
        return subprocess.run(
            line, capture_output=True, text=True, check=False, env={**os.environ, "TMPDIR": str(place)}
        )

    yield command
    left = list(place.iterdir())
    shutil.rmtree(place)
    assert left == []


@pytest.fixture
def listener():
    """A server on this machine, and what it heard."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            try:
                while True:
                    connection, _ = server.accept()
                    heard.append(connection.recv(100))
            except OSError:
                return

        threading.Thread(target=listen, daemon=True).start()
        yield server.getsockname()[1], heard


def outputs(file: Path) -> str:
    cells = nbformat.read(file, as_version=4).cells
    return json.dumps([cell.outputs for cell in cells if cell.cell_type == "code"])


@pytest.mark.timeout(1800)
def test_a_class_of_30_is_graded_with_reasons_and_nothing_else_is_touched(
    tmp_path: Path, listener, labkit_grade
) -> None:
    port, heard = listener
    folder, handed_in, outside = tmp_path / "class", tmp_path / "in", tmp_path / "outside"
    handed_in.mkdir()
    outside.mkdir(mode=0o777)
    outside.chmod(0o777)
    (outside / "precious.txt").write_text("mine")
    (outside / "precious.txt").chmod(0o666)
    done = labkit_grade(
        "setup", str(folder), "--lab", "01", "--exercises", ",".join(EXERCISES), "--check-seconds", "2",
        "--cell-seconds", "6", "--memory", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = enforced((str(folder),))
    assert "3 exercises, 9 points" in done.stdout
    release = folder / "release" / "lab01" / "01_attention_basics.ipynb"
    handed_out = nbformat.read(release, as_version=4)
    package = str(Path(labkit.__file__).parent)
    everyone = submissions(handed_out, folder=str(folder), outside=str(outside), package=package, port=port)
    if report["signals"]:  # it would end whatever else its user runs
        del everyone["kills_and_leaves_one"]
    for name, submission in everyone.items():
        nbformat.write(made(submission, handed_out), handed_in / f"{name}.ipynb")
    (handed_in / "not_json.ipynb").write_text("{")
    (handed_in / "no_notebook").mkdir()
    (handed_in / "a_link.ipynb").symlink_to("/etc/passwd")
    (handed_in / "bad name!.ipynb").write_text("{}")

    done = labkit_grade("collect", str(folder), str(handed_in))
    assert done.returncode == 1
    assert f"lab01: {len(everyone)} submissions collected, 4 not" in done.stdout
    assert done.stdout.count("not collected") == 4

    done = labkit_grade("run", str(folder), "--workers", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(everyone)} graded" in done.stdout
    for name, reason in report.items():  # what this system cannot enforce is said to the teacher, and all else holds
        assert (f"NOT enforced here: {WORDS[name]} ({reason})." in done.stdout) == bool(reason)

    with (folder / "reasons.csv").open() as file:
        rows = list(csv.DictReader(file))
    got, want = {}, {}
    for name, submission in everyone.items():
        own = [row for row in rows if row["student"] == name]
        points = tuple(float(row["points"]) for row in own)
        amiss = tuple(row["diagnosis"] or row["status"] for row in own if row["points"] != row["most"])
        got[name] = [row["exercise"] for row in own], points, amiss
        want[name] = list(EXERCISES), submission.points, submission.diagnoses
        said = outputs(folder / "autograded" / name / "lab01" / release.name)
        assert submission.said in said or (report["tcp"] and name == "calls_out"), (name, said[-2000:])
        assert "FILE SEEN" not in said or report["files"], name
        assert "PROCESS SEEN" not in said or report["processes"], name
        assert "REACHED" not in said or report["tcp"], name
        assert len(said) < 1_000_000, name
    assert {name: (got[name], want[name]) for name in want if got[name] != want[name]} == {}
    assert {row["student"] for row in rows if row["status"] == "not graded"} == {
        "a_link", "bad name!", "no_notebook", "not_json"
    }  # fmt: skip

    with (folder / "grades.csv").open() as file:
        totals = {row["student_id"]: float(row["score"]) for row in csv.DictReader(file)}
    assert totals == {name: pytest.approx(sum(submission.points)) for name, submission in everyone.items()}

    feedback = (folder / "feedback" / "no_scale" / "lab01" / "01_attention_basics.html").read_text()
    assert "the scores were not divided by sqrt(head_dim)" in feedback
    assert "0 of 3 points" in feedback

    if not report["files"]:
        nothing_was_written(tmp_path, outside, package)
    assert heard == [] or report["tcp"]
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "time.sleep(54321)" not in running


def nothing_was_written(tmp_path: Path, outside: Path, package: str) -> None:
    """What a submission tried to write is nowhere."""
    assert (outside / "precious.txt").read_text() == "mine"
    sprayed = [str(path) for path in (*tmp_path.rglob("labkit-sprayed*"), *Path(package).glob("labkit-sprayed*"))]
    sprayed += [path for path in ("/tmp", "/var/tmp", "/dev/shm") if os.path.exists(f"{path}/labkit-sprayed.txt")]
    assert sprayed == []
