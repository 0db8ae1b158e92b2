"""Progress survives two kernels, damage and read-only folders; losing it loses nothing else."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from labkit import files
from labkit.course import progress as progress_module
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
    assert "kept as progress.damaged-1.json; progress starts anew" in said
    assert "a good copy" in said  # what can be done
    assert (tmp_path / "progress.damaged-1.json").read_text(encoding="latin-1") == content
    assert json.loads(path.read_text())["quizzes"] == {"01.q1": {"answer": "b"}}


def test_a_second_damaged_file_does_not_overwrite_the_first(tmp_path: Path) -> None:
    for content in ("first", "second"):
        (tmp_path / "progress.json").write_text(content)
        Progress(tmp_path / "progress.json")
    assert (tmp_path / "progress.damaged-1.json").read_text() == "first"
    assert (tmp_path / "progress.damaged-2.json").read_text() == "second"


def test_damage_in_the_middle_of_a_session_keeps_what_the_session_knows(tmp_path: Path, capsys) -> None:
    progress = Progress(tmp_path / "progress.json")
    progress.record("exercises", "01.1", passed=True)
    (tmp_path / "progress.json").write_text("{")
    progress.record("exercises", "01.2", passed=True)
    assert "what this session knew of it is saved anew" in capsys.readouterr().out
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


@pytest.fixture
def failing(monkeypatch):
    """Makes writing fail with an error's code, until it is told None."""
    write = files.write_whole

    def fail(code: int | None) -> None:
        def refuse(*_):
            raise OSError(code, os.strerror(code or 0))

        monkeypatch.setattr(progress_module, "write_whole", write if code is None else refuse)

    return fail


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE])
def test_what_could_not_be_saved_is_saved_when_it_can_be_and_each_is_said_once(tmp_path, capsys, failing, code):
    path = tmp_path / "progress.json"
    progress = Progress(path)
    progress.count("exercises", "01.1", "attempts")
    failing(code)
    for number in range(3):
        progress.count("exercises", "01.1", "attempts")
        progress.record("quizzes", f"01.q{number}", first_answer="a")
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "in memory only" in said
    assert os.strerror(code) in said
    assert progress.get("exercises", "01.1") == {"attempts": 4}
    failing(None)
    Progress(path).count("exercises", "01.1", "attempts")  # another kernel's
    progress.record("exercises", "01.1", passed=True)
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "saved again" in said
    content = json.loads(path.read_text())
    assert content["exercises"]["01.1"] == {"attempts": 5, "passed": True}
    assert len(content["quizzes"]) == 3
    progress.record("exercises", "01.1", passed=True)
    assert capsys.readouterr().out == ""
    failing(code)
    progress.record("exercises", "01.2", passed=True)
    assert "in memory only" in capsys.readouterr().out  # lost again, said again


def test_what_waits_is_counted_once_when_the_file_was_removed_meanwhile(tmp_path, failing) -> None:
    progress = Progress(tmp_path / "progress.json")
    progress.count("exercises", "01.1", "attempts")
    failing(errno.ENOSPC)
    progress.count("exercises", "01.1", "attempts")
    (tmp_path / "progress.json").unlink()
    failing(None)
    progress.count("exercises", "01.1", "attempts")
    assert json.loads((tmp_path / "progress.json").read_text())["exercises"]["01.1"] == {"attempts": 3}


ODD = {
    "pipe": lambda path: os.mkfifo(path),
    "folder": lambda path: path.mkdir(),
    "loop": lambda path: path.symlink_to(path.name),
    "link into a folder that is not there": lambda path: path.symlink_to("no/progress.json"),
    "lock is a pipe": lambda path: os.mkfifo(f"{path}.lock"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ODD)
def test_a_path_that_is_no_file_is_left_alone_in_one_line_and_used_once_it_is_one(kind, tmp_path, capsys) -> None:
    path = tmp_path / "progress.json"
    ODD[kind](path)
    before = {entry.name: entry.lstat().st_mode for entry in tmp_path.iterdir()}
    progress = Progress(path)
    progress.record("exercises", "01.1", passed=True)
    progress.record("exercises", "01.2", passed=True)
    assert capsys.readouterr().out.count("\n") == 1
    assert progress.get("exercises", "01.2") == {"passed": True}
    assert {entry.name: entry.lstat().st_mode for entry in tmp_path.iterdir()} == before
    for entry in tmp_path.iterdir():
        entry.rmdir() if entry.is_dir() else entry.unlink()
    progress.record("exercises", "01.3", passed=True)
    assert json.loads(path.read_text())["exercises"].keys() == {"01.1", "01.2", "01.3"}


@pytest.mark.parametrize("named", ["~nobody-of-this-name/p.json", "n" * 300, "link/deeper/p.json"])
def test_a_name_that_can_be_no_file_is_one_line_and_a_session_in_memory(named, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.setenv("LABKIT_PROGRESS", named)
    progress = Progress()
    progress.record("exercises", "01.1", passed=True)
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "(LABKIT_PROGRESS) cannot be used" in said  # the setting that is to be corrected
    assert progress.get("exercises", "01.1") == {"passed": True}
    assert [entry.name for entry in tmp_path.iterdir()] == ["link"]


def test_a_deleted_folder_is_one_line_and_a_session_in_memory(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.delenv("LABKIT_PROGRESS", raising=False)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    progress = Progress()
    progress.record("exercises", "01.1", passed=True)
    assert capsys.readouterr().out.count("\n") == 1
    assert progress.get("exercises", "01.1") == {"passed": True}


def test_a_tilde_is_the_home_folder_and_no_folder_of_that_name(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LABKIT_PROGRESS", "~/p.json")
    monkeypatch.chdir(tmp_path)
    Progress().record("exercises", "01.1", passed=True)
    assert (tmp_path / "home/p.json").is_file()
    assert not (tmp_path / "~").exists()


def test_a_link_stays_a_link_and_both_names_share_one_lock(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to("real/progress.json")
    Progress(tmp_path / "link.json").record("exercises", "01.1", passed=True)
    assert (tmp_path / "link.json").is_symlink()
    assert Progress(tmp_path / "real/progress.json").get("exercises", "01.1") == {"passed": True}
    assert sorted(os.listdir(tmp_path)) == ["link.json", "real"]


def test_a_file_in_a_folder_that_is_read_only_is_still_read(tmp_path: Path, monkeypatch, capsys) -> None:
    path = tmp_path / "progress.json"
    Progress(path).record("exercises", "01.1", passed=True)

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(progress_module, "locked", refuse)
    assert Progress(path).get("exercises", "01.1") == {"passed": True}
    assert capsys.readouterr().out == ""


def test_what_a_killed_writer_left_is_removed_after_an_hour(tmp_path: Path) -> None:
    for name in (".progress.json.old.tmp", ".progress.json.new.tmp"):
        (tmp_path / name).touch()
    os.utime(tmp_path / ".progress.json.old.tmp", (time.time() - 4000,) * 2)
    Progress(tmp_path / "progress.json").record("exercises", "01.1", passed=True)
    assert sorted(os.listdir(tmp_path)) == [".progress.json.new.tmp", "progress.json", "progress.json.lock"]
