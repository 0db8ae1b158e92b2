"""What a user may name as a file, and what comes of it: every kind of thing, met by every function. Nothing hangs."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import tempfile
import threading
import time
from pathlib import Path

import filelock
import pytest

from labkit import files

CONTENT = b"what was there"


def pretend_device(monkeypatch, path: Path) -> Path:
    """A file that says it is a device, to whoever asks before opening it."""
    path.write_bytes(CONTENT)
    real = os.stat

    def status(asked, *args, **kwargs):
        found = real(asked, *args, **kwargs)
        if os.path.realpath(asked) == str(path):
            return os.stat_result((stat.S_IFCHR | 0o666, *found[1:]))
        return found

    monkeypatch.setattr(os, "stat", status)
    return path


@pytest.fixture
def odd(tmp_path, monkeypatch, request):
    """A path of the kind that the test asks for, and the words by which it is refused."""
    with contextlib.ExitStack() as stack:
        yield make_odd(request.param, tmp_path, monkeypatch, stack)


def make_odd(kind, tmp_path, monkeypatch, stack):
    path = tmp_path / "odd"
    if kind == "pipe":
        os.mkfifo(path)
        return path, "a pipe"
    if kind == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("pipe")
        return path, "a pipe"
    if kind == "socket":
        with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as server:  # names are limited
            server.bind(f"{short}/s")
            os.link(f"{short}/s", path)
        return path, "a socket"
    if kind == "device":
        return pretend_device(monkeypatch, path), "a device"
    if kind == "folder":
        path.mkdir()
        return path, "a folder"
    if kind == "loop":
        path.symlink_to("odd")
        return path, os.strerror(errno.ELOOP)
    if kind == "name too long":
        return tmp_path / ("n" * 300), os.strerror(errno.ENAMETOOLONG)
    if kind == "NUL in its name":
        return tmp_path / "a\0b", "no file name can have"
    assert kind == "open file without a name"
    reader, writer = os.pipe()
    stack.callback(os.close, reader)
    stack.callback(os.close, writer)
    return Path(f"/proc/self/fd/{reader}"), "a pipe"


KINDS = ["pipe", "link to a pipe", "socket", "device", "folder", "loop", "name too long", "NUL in its name"]
KINDS += ["open file without a name"] * os.path.isdir("/proc/self/fd")


def lock(path: Path) -> None:
    with files.locked(path, timeout=0):
        raise AssertionError("it was locked")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("odd", KINDS, indirect=True)
def test_what_is_no_file_is_refused_by_every_function_and_stays_as_it_was(odd, tmp_path) -> None:
    path, said = odd
    before = [(entry.name, entry.lstat().st_ino, entry.lstat().st_mode) for entry in sorted(tmp_path.iterdir())]
    for use in (files.real_file, files.read_file, files.read_text, lambda path: files.write_whole(path, b"x"), lock):
        with pytest.raises(OSError, match=r".") as caught:
            use(path)
        assert said in caught.value.strerror
    assert [(e.name, e.lstat().st_ino, e.lstat().st_mode) for e in sorted(tmp_path.iterdir())] == before


def test_a_file_is_read_and_written_through_links_which_stay(tmp_path) -> None:
    (tmp_path / "far").mkdir()
    target = tmp_path / "far/file"
    target.write_bytes(CONTENT)
    target.chmod(0o640)
    (tmp_path / "near").symlink_to("far/file")
    (tmp_path / "link").symlink_to(tmp_path / "near")
    assert files.read_file(tmp_path / "link") == CONTENT
    files.write_whole(tmp_path / "link", b"new")
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o640
    assert os.readlink(tmp_path / "near") == "far/file"
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path / "far")) == ["file"]


def test_a_link_to_a_file_that_is_not_there_yet_makes_that_file(tmp_path) -> None:
    (tmp_path / "link").symlink_to("later")
    files.write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "later").read_bytes() == b"new"


def test_a_file_larger_than_asked_for_is_refused_before_it_is_held(tmp_path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(10**12)  # it takes no space
    with pytest.raises(OSError, match="larger than 64 MB"):
        files.read_file(tmp_path / "huge")


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path) -> None:
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbf{}")
    assert files.read_text(tmp_path / "text") == "{}"


@pytest.mark.parametrize(
    ("named", "said"), [("~nobody-of-this-name/x.json", "no home folder ~nobody-of-this-name"), ("n" * 300, "too long")]
)
def test_a_path_that_cannot_be_is_one_clause(named, said) -> None:
    with pytest.raises(OSError, match=r".") as caught:
        files.user_path(named)
    assert said in caught.value.strerror


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.user_path("~/p.json") == tmp_path / "p.json"


def test_a_current_folder_that_was_deleted_is_said(monkeypatch, tmp_path) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(OSError, match="current folder was deleted"):
        files.user_path("p.json")
    assert files.user_path(tmp_path / "p.json") == tmp_path / "p.json"


@pytest.mark.parametrize("part", ["link", "loop", "file", "pipe"])
@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_folder_is_not_made_where_something_else_stands(tmp_path, part, below) -> None:
    place = tmp_path / part
    {
        "link": lambda: place.symlink_to("nowhere"),
        "loop": lambda: place.symlink_to("loop"),
        "file": place.touch,
        "pipe": lambda: os.mkfifo(place),
    }[part]()
    said = "leads nowhere" if part in ("link", "loop") else "is no folder"
    with pytest.raises(OSError, match=f"{part} .*{said}"):
        files.make_folder(place / below)
    assert [entry.name for entry in tmp_path.iterdir()] == [part]


def test_leftovers_of_killed_writers_go_after_an_hour_and_nothing_else_does(tmp_path) -> None:
    names = [".p.json.abc.tmp", ".p.json.new.tmp", ".other.json.abc.tmp", "p.json.abc.tmp", ".p.json.txt", "p.json"]
    for name in names:
        (tmp_path / name).touch()
        if "new" not in name:
            os.utime(tmp_path / name, (time.time() - 4000,) * 2)
    (tmp_path / ".p.json.folder.tmp").mkdir()
    (tmp_path / ".p.json.link.tmp").symlink_to("p.json")
    files.remove_leftovers(tmp_path / "p.json")
    assert sorted(os.listdir(tmp_path)) == sorted([*names[1:], ".p.json.folder.tmp", ".p.json.link.tmp"])


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_where_there_are_no_locks_a_file_takes_their_place(tmp_path, monkeypatch, code) -> None:
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    path, second = tmp_path / "p.json", []

    def try_too():
        try:
            with files.locked(path, timeout=0.2):
                second.append("locked")
        except filelock.Timeout:
            second.append("waited")

    with files.locked(path, timeout=1):
        other = threading.Thread(target=try_too)
        other.start()
        other.join()
    try_too()
    assert second == ["waited", "locked"]


def test_another_reason_why_a_lock_cannot_be_had_is_raised(tmp_path) -> None:
    with pytest.raises(OSError, match="there is no folder"):
        lock(tmp_path / "no folder" / "p.json")


@pytest.mark.parametrize("behind_a_link", [False, True])
@pytest.mark.parametrize("meanwhile", ["made", "replaced", "removed"])
def test_a_file_that_another_process_changes_between_two_looks_is_no_fault(
    tmp_path, monkeypatch, meanwhile, behind_a_link
):
    """What a lock file goes through when several wait for it: seen once by one look, and otherwise by the next."""
    (tmp_path / "real").mkdir()
    folder = tmp_path / "link" if behind_a_link else tmp_path / "real"
    (tmp_path / "link").symlink_to("real")
    path, real, moments = folder / "file", os.path.realpath, iter(range(3))
    if meanwhile != "made":
        path.write_bytes(CONTENT)

    def interfere(asked):
        found = real(asked)
        if next(moments, None) is not None:
            if meanwhile != "made":
                path.rename(folder / "before") if meanwhile == "replaced" else path.unlink(missing_ok=True)
            if meanwhile != "removed":
                path.write_bytes(CONTENT)
        return found

    monkeypatch.setattr(os.path, "realpath", interfere)
    assert files.real_file(path) == tmp_path / "real" / "file"


def test_a_lock_file_that_others_make_and_remove_is_taken_by_each_in_turn(tmp_path):
    path, held, most = tmp_path / "file", [], []

    def take(number: int) -> None:
        for _ in range(50):
            with files.locked(path, timeout=60):
                held.append(number)
                most.append(len(held))
                held.pop()

    threads = [threading.Thread(target=take, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 200
