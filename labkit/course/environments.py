"""Virtual environments made on demand, for what does not go together with the labs' own packages.

    make_whole(Path(".venv-x"), make, bytes_needed=3e9, says="Making .venv-x: ...", who="make x")

`make(folder)` is the work; whatever fails, what it made is taken away again. The stamp that says "whole" is set by
`once.py`, under whose lock this runs, when the process ends well: one that was killed is seen as half made. Both run
before anything is installed and need Python alone.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

LOCK = ".lock"  # once.py's, in the folder


class NotMade(RuntimeError):
    """The environment could not be made; the message says why and what to do."""


def make_whole(folder: Path, make: Callable[[Path], None], *, bytes_needed: float, says: str, who: str) -> int:
    """Make the environment in `folder`, which may hold anything half made. Returns an exit status.

    make: does it, or raises NotMade. bytes_needed: on disk while it is made. says: what is made, and what it takes.
    who: the command that a complaint begins with.
    """
    try:
        require_space(folder, bytes_needed)
        print(says, flush=True)
        clear(folder)
        try:
            make(folder)
        except BaseException:
            clear(folder)
            raise
    except NotMade as error:
        print(f"{who}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{who}: {error.filename or folder}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{folder.name} is ready: {size(folder) / 1e9:.1f} GB. `make clean` removes it.", flush=True)
    return 0


def require_space(folder: Path, bytes_needed: float) -> None:
    """NotMade where the disk is too full."""
    free = shutil.disk_usage(folder if folder.exists() else folder.absolute().parent).free
    if free < bytes_needed:
        raise NotMade(f"{free / 1e9:.1f} GB are free on this disk and {bytes_needed / 1e9:.0f} GB are needed")


def clear(folder: Path) -> None:
    """Take away all that the folder holds, save the lock that another process may be waiting for."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != LOCK:
            entry.unlink(missing_ok=True)


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*"))
