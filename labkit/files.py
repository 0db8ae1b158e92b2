"""Files that a user names: found, read within bounds, replaced whole. What is no regular file is never touched.

Every function raises OSError with one clause in `strerror` that says what is wrong, whatever the cause: an unknown
user, a deleted folder, a name that is too long, a link that leads nowhere, a pipe, a device.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

LARGEST = 64 * 10**6  # bytes that `read_file` reads at most: far more than any config, index or progress file
LEFTOVER_SECONDS = 3600
LOOKS = 10  # how often `real_file` looks at a file that changes meanwhile
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)  # how file systems without locks answer
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def user_path(named: str | Path) -> Path:
    """The absolute path that a person means by `named`; `~` and `~user` are home folders. It need not exist."""
    try:
        path = Path(named).expanduser()
    except RuntimeError:
        raise OSError(errno.EINVAL, f"there is no home folder {Path(named).parts[0]}") from None
    try:
        path = path.absolute()
    except FileNotFoundError:
        raise OSError(errno.EINVAL, "the current folder was deleted: change to another") from None
    _status(path)
    return path


def real_file(path: Path) -> Path:
    """The regular file at `path` behind any links, or the place where one can be made; OSError when it is neither."""
    for _ in range(LOOKS):
        found = _status(path)
        if found is not None and not stat.S_ISREG(found.st_mode):
            kind = KINDS.get(stat.S_IFMT(found.st_mode), "no file")
            raise OSError(errno.EINVAL, f"it is {kind}, not a file", str(path))
        real = Path(os.path.realpath(path))
        behind = _status(real)
        if found is behind is None or (found and behind and os.path.samestat(found, behind)):
            return real
        time.sleep(0.001)  # another process may have made, replaced or removed it between the two looks
    raise OSError(errno.EINVAL, "it is a link to a file that has no name")  # as in /proc/self/fd


def make_folder(path: Path) -> None:
    """Make a folder and those above it; one that is there is left as it is."""
    if (problem := folder_problem(path)) is not None:
        raise OSError(errno.ENOTDIR, problem)
    path.mkdir(parents=True, exist_ok=True)


def folder_problem(path: Path) -> str | None:
    """Why there is and can be no folder at `path`, in one clause; None when nothing stands in its way."""
    there = nearest(path)
    if there.is_dir():
        return None
    return f"{there} is a link that leads nowhere" if there.is_symlink() else f"{there} is no folder"


def nearest(path: Path) -> Path:
    """`path`, or the first part above it that exists; a link that leads nowhere exists as a link."""
    return next(part for part in (path, *path.parents) if os.path.lexists(part))


def read_file(path: Path, largest: int = LARGEST) -> bytes:
    """The content of a regular file. A pipe is refused, not waited for; so is a file of more than `largest` bytes."""
    real = real_file(path)
    descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # it was another a moment ago
            raise OSError(errno.EINVAL, "it is not a file any more")
        content = file.read(largest + 1) or b""  # None where a read would have to wait
    if len(content) > largest:
        raise OSError(errno.EFBIG, f"it is larger than {largest / 1e6:g} MB")
    return content


def read_text(path: Path, largest: int = LARGEST) -> str:
    """A UTF-8 file as text, with or without a byte order mark. Raises UnicodeDecodeError besides."""
    return read_file(path, largest).decode("utf-8-sig")


def write_whole(path: Path, content: bytes, mode: int | None = None) -> None:
    """Replace a regular file in one step: a reader sees the old content or the new, never half. Links stay links.

    mode: the file's permissions; by default those that it has, or else for the owner alone.
    """
    target = real_file(path)
    found = _status(target)
    if mode is None and found is not None:
        mode = stat.S_IMODE(found.st_mode)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=_prefix(target), suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            os.chmod(temporary, mode)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_leftovers(path: Path) -> None:
    """Remove what writers of `path` that were killed have left: more than an hour old. For who holds its lock."""
    with contextlib.suppress(OSError):
        target = real_file(path)
        for entry in os.scandir(target.parent):
            own = entry.name.startswith(_prefix(target)) and entry.name.endswith(".tmp")
            if own and entry.is_file(follow_symlinks=False):
                if time.time() - entry.stat().st_mtime > LEFTOVER_SECONDS:
                    os.unlink(entry.path)


@contextlib.contextmanager
def locked(path: Path, timeout: float) -> Iterator[None]:
    """Hold the lock beside the file that `path` leads to. Raises filelock.Timeout, which is an OSError, as well.

    Where the file system has no locks, a file that is there for as long as the lock is held takes its place.
    """
    beside = f"{real_file(path)}.lock"
    real_file(Path(beside))
    if not os.path.isdir(os.path.dirname(beside)):  # filelock would make it
        raise OSError(errno.ENOTDIR, f"there is no folder {os.path.dirname(beside)}")
    lock: filelock.BaseFileLock = filelock.FileLock(beside, timeout=timeout)
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        lock = filelock.SoftFileLock(f"{beside}ed", timeout=timeout)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _prefix(target: Path) -> str:
    return f".{target.name}."


def _status(path: Path) -> os.stat_result | None:
    """What lies at `path` behind any links; None when nothing does. Looks and opens nothing."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:  # a NUL byte, or a character that no file name here can have
        raise OSError(errno.EINVAL, "it has a character that no file name can have") from None
