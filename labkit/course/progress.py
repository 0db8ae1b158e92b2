"""What a learner has done, in one JSON file beside the notebooks. Losing it loses nothing else.

Every change is a read, a merge and an atomic replace under a lock, so two kernels may write at once. When the file
cannot be used the session goes on in memory, after one line that says so.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from labkit.course.files import write_whole

FORMAT = 1
KINDS = ("exercises", "predictions", "quizzes")
COUNTERS = ("attempts", "hints", "solutions")


def default_path() -> Path:
    """`LABKIT_PROGRESS`, or `progress.json` in the kernel's folder, which is the notebook's."""
    return Path(os.environ.get("LABKIT_PROGRESS") or "progress.json").absolute()


def well_formed(data: Any) -> bool:
    """Whether a file's content can be used: the kinds, entries that are dicts, counters that are whole numbers."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        return False
    if not all(isinstance(data.get(kind), dict) for kind in KINDS):
        return False
    entries = [entry for kind in KINDS for entry in data[kind].values()]
    if not all(isinstance(entry, dict) for entry in entries):
        return False
    return all(type(entry.get(counter, 0)) is int for entry in entries for counter in COUNTERS)


class Progress:
    """The file, and this session's copy of it."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or default_path()
        self.data: dict[str, Any] = self.empty()
        self.saving = True
        self.update(lambda data: None, write=False)

    @staticmethod
    def empty() -> dict[str, Any]:
        """A file with nothing in it."""
        return {"format": FORMAT, **{kind: {} for kind in KINDS}}

    def get(self, kind: str, key: str) -> dict[str, Any]:
        """What is known of one exercise, prediction or quiz."""
        return dict(self.data[kind].get(key, {}))

    def record(self, kind: str, key: str, **entry: Any) -> None:
        """Merge `entry` into what is known, here and in the file."""

        def merge(data: dict[str, Any]) -> None:
            data[kind].setdefault(key, {}).update(entry)

        self.update(merge)

    def count(self, kind: str, key: str, what: str) -> None:
        """Add one to a counter, in the file as it stands now, so that two kernels lose no count."""

        def add(data: dict[str, Any]) -> None:
            entry = data[kind].setdefault(key, {})
            entry[what] = entry.get(what, 0) + 1

        self.update(add)

    def update(self, change: Any, *, write: bool = True) -> None:
        """Apply `change` to the file's newest content, or to the copy in memory when there is no usable file."""
        if not self.saving:
            change(self.data)
            return
        try:
            if not write and not self.path.exists():
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock", timeout=10):
                self.data = self.read()
                change(self.data)
                if write:
                    self.write()
        except (OSError, Timeout) as error:
            self.saving = False
            change(self.data)
            reason = getattr(error, "strerror", None) or type(error).__name__
            print(
                f"progress is kept in memory only: {self.path.name} cannot be written ({reason}). Nothing else is "
                f"affected. To keep it, make the folder writable and restart the kernel."
            )

    def read(self) -> dict[str, Any]:
        """The file's content. A damaged file is set aside, never overwritten."""
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if not well_formed(data):
                raise ValueError("unknown format")
            return data
        except FileNotFoundError:
            return self.data
        except (ValueError, RecursionError):
            aside = self.set_aside()
            print(f"{self.path.name} could not be read and is kept as {aside.name}; progress starts anew.")
            return self.data

    def set_aside(self) -> Path:
        """Move the file to a name that is free."""
        number = 1
        while (aside := self.path.with_name(f"{self.path.stem}.damaged-{number}.json")).exists():
            number += 1
        self.path.rename(aside)
        return aside

    def write(self) -> None:
        """Replace the file in one step. A file that was made read-only stays as it is."""
        if self.path.exists() and not os.access(self.path, os.W_OK):
            raise PermissionError(errno.EACCES, "the file is read-only")
        write_whole(self.path, json.dumps(self.data, indent=1, sort_keys=True).encode())
