"""An environment is whole or not there, and what went wrong is said in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from labkit.course import environments
from labkit.course.environments import LOCK, NotMade, make_whole


def making(folder: Path, make=lambda folder: None, needed: float = 1.0) -> int:
    return make_whole(folder, make, bytes_needed=needed, says="Making it.", who="make it")


def fails(error: BaseException):
    def make(folder: Path) -> None:
        (folder / "lib/half").mkdir(parents=True)
        raise error

    return make


def test_what_was_half_made_goes_first_and_what_is_made_stays(tmp_path: Path, capsys) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / LOCK).touch()
    assert making(tmp_path, lambda folder: (folder / "new").write_bytes(bytes(2 * 10**8))) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, "new"]
    said = capsys.readouterr()
    assert said.out.startswith("Making it.\n")
    assert f"{tmp_path.name} is ready: 0.2 GB" in said.out


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NotMade("there is no index"), "make it: there is no index\n"),
        (OSError(28, "No space left on device", "lib/x"), "make it: lib/x: No space left on device\n"),
    ],
)
def test_what_fails_is_said_and_leaves_only_the_lock(tmp_path: Path, capsys, error: Exception, said: str) -> None:
    (tmp_path / LOCK).touch()
    assert making(tmp_path, fails(error)) == 1
    assert capsys.readouterr().err == said
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_an_interrupt_goes_on_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        making(tmp_path, fails(KeyboardInterrupt()))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_before_anything_is_taken_away(tmp_path: Path, capsys) -> None:
    (tmp_path / "old").mkdir()
    assert making(tmp_path / "old", needed=1e30) == 1
    assert "GB are needed" in capsys.readouterr().err
    with pytest.raises(NotMade):
        environments.require_space(tmp_path / "not there yet", 1e30)
