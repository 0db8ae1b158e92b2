"""Progress survives two kernels, damage and read-only folders; losing it loses nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from labkit.course.progress import Progress, default_path


def test_what_is_recorded_is_there_in_the_next_session(tmp_path: Path) -> None:
    first = Progress(tmp_path / "progress.json")
    first.record("exercises", "01.1", passed=True)
    first.count("exercises", "01.1", "attempts")
    assert Progress(tmp_path / "progress.json").get("exercises", "01.1") == {"passed": True, "attempts": 1}


def test_the_file_is_beside_the_notebook_unless_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("LABKIT_PROGRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    assert default_path() == tmp_path / "progress.json"
    monkeypatch.setenv("LABKIT_PROGRESS", str(tmp_path / "elsewhere.json"))
    assert default_path() == tmp_path / "elsewhere.json"


def test_nothing_is_written_before_there_is_something_to_say(tmp_path: Path) -> None:
    Progress(tmp_path / "progress.json")
    assert list(tmp_path.iterdir()) == []


def test_two_kernels_writing_at_once_lose_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from labkit.course.progress import Progress\n"
        "progress = Progress(Path(sys.argv[1]))\n"
        "for i in range(40):\n"
        "    progress.count('exercises', '01.1', 'attempts')\n"
        "    progress.record('exercises', f'{sys.argv[2]}.{i}', passed=True)\n"
    )
    path = tmp_path / "progress.json"
    kernels = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in ("a", "b")]
    assert [kernel.wait(120) for kernel in kernels] == [0, 0]
    exercises = json.loads(path.read_text())["exercises"]
    assert exercises["01.1"]["attempts"] == 80
    assert len(exercises) == 81


WHOLE = '{"format": 1, "exercises": %s, "predictions": {}, "quizzes": {}}'
MALFORMED = [
    WHOLE % '{"01.1": 5}',
    WHOLE % '{"01.1": null}',
    WHOLE % '{"01.1": {"attempts": "x"}}',
    WHOLE % "[]",
    "[" * 100_000,
]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": 1}', '{"format": 99, "exercises": {}}', "\x00\xff", *MALFORMED]
)
def test_a_damaged_file_is_set_aside_and_said_once(content: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "progress.json"
    path.write_text(content, encoding="latin-1")
    progress = Progress(path)
    progress.record("quizzes", "01.q1", answer="b")
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "kept as progress.damaged-1.json" in said
    assert (tmp_path / "progress.damaged-1.json").read_text(encoding="latin-1") == content
    assert json.loads(path.read_text())["quizzes"] == {"01.q1": {"answer": "b"}}


def test_a_second_damaged_file_does_not_overwrite_the_first(tmp_path: Path) -> None:
    for content in ("first", "second"):
        (tmp_path / "progress.json").write_text(content)
        Progress(tmp_path / "progress.json")
    assert (tmp_path / "progress.damaged-1.json").read_text() == "first"
    assert (tmp_path / "progress.damaged-2.json").read_text() == "second"


def test_damage_in_the_middle_of_a_session_keeps_what_the_session_knows(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "progress.json")
    progress.record("exercises", "01.1", passed=True)
    (tmp_path / "progress.json").write_text("{")
    progress.record("exercises", "01.2", passed=True)
    assert json.loads((tmp_path / "progress.json").read_text())["exercises"].keys() == {"01.1", "01.2"}


def test_a_read_only_file_is_left_alone_and_the_session_goes_on(tmp_path: Path, capsys, monkeypatch) -> None:
    path = tmp_path / "progress.json"
    Progress(path).record("exercises", "01.1", passed=True)
    before = path.read_bytes()
    path.chmod(0o444)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anything: the answer a learner would get
    progress = Progress(path)
    progress.record("exercises", "01.2", passed=True)
    progress.record("exercises", "01.3", passed=True)
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "in memory only" in said
    assert "writable" in said
    assert path.read_bytes() == before
    assert progress.get("exercises", "01.3") == {"passed": True}
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")) == ["progress.json"]


def test_a_folder_that_cannot_be_had_is_said_in_one_line(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("not a folder")
    progress = Progress(tmp_path / "file" / "progress.json")
    progress.record("exercises", "01.1", passed=True)
    progress.record("exercises", "01.1", passed=True)
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "in memory only" in said
    assert progress.get("exercises", "01.1") == {"passed": True}


def test_a_writer_killed_in_the_middle_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    Progress(path).record("exercises", "01.1", passed=True)
    code = (
        "import json, os, signal, sys; from pathlib import Path; from labkit.course import progress\n"
        "from labkit.course import files\n"
        "files.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "progress.Progress(Path(sys.argv[1])).record('exercises', '01.2', passed=True)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], timeout=60).returncode != 0
    after = Progress(path)
    assert after.get("exercises", "01.1") == {"passed": True}
    after.record("exercises", "01.3", passed=True)
    assert json.loads(path.read_text())["exercises"].keys() == {"01.1", "01.3"}
