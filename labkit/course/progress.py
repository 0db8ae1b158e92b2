"""What a learner has done, in one JSON file beside the notebooks. Losing it loses nothing else.

Every change is a read, a merge and an atomic replace under a lock, so two kernels may write at once. While the file
cannot be used, changes wait in memory, after one line that says so, and each later change tries to write them all.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from labkit.files import locked, make_folder, read_text, real_file, remove_leftovers, user_path, write_whole

FORMAT = 1
KINDS = ("exercises", "predictions", "quizzes")
COUNTERS = ("attempts", "hints", "solutions")  # alone, or with more words behind: "hints scale"
LOCK_SECONDS = 10
PAUSE = 600.0  # seconds: a longer gap between two entries was no work

Data = dict[str, Any]
Change = Callable[[Data], None]


def default_path() -> Path:
    """`LABKIT_PROGRESS`, or `progress.json` in the kernel's folder, which is the notebook's. Raises OSError."""
    return user_path(os.environ.get("LABKIT_PROGRESS", "").strip() or "progress.json")


def well_formed(data: Any) -> bool:
    """Whether a file's content can be used: the kinds, entries that are dicts, counters that are whole numbers."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        return False
    if not all(isinstance(data.get(kind), dict) for kind in KINDS):
        return False
    entries = [entry for kind in KINDS for entry in data[kind].values()]
    if not all(isinstance(entry, dict) for entry in entries):
        return False
    counts = [value for entry in entries for name, value in entry.items() if name.partition(" ")[0] in COUNTERS]
    return all(type(count) is int and count >= 0 for count in counts)


def add_seconds(data: Data, key: str, seconds: int) -> None:
    """Add to the time that a lab has taken. Besides the kinds, so that older versions pass it on as it is."""
    if seconds:
        taken = data.get("seconds")
        taken = taken if isinstance(taken, dict) else {}
        before = taken.get(key[:2], 0)
        data["seconds"] = taken | {key[:2]: seconds + (before if type(before) is int and before > 0 else 0)}


class Progress:
    """The file, and this session's copy of it."""

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.is_default = path, path is None
        self.saved = self.empty()  # what the file held when this session last read or wrote it
        self.unsaved: list[Change] = []
        self.data = self.empty()  # the one with the others applied
        self.lost = False
        self.latest, self.worked = time.monotonic(), 0.0
        self.update(None)

    @staticmethod
    def empty() -> Data:
        """A file with nothing in it."""
        return {"format": FORMAT, **{kind: {} for kind in KINDS}}

    def get(self, kind: str, key: str) -> dict[str, Any]:
        """What is known of one exercise, prediction or quiz."""
        return dict(self.data[kind].get(key, {}))

    def record(self, kind: str, key: str, **entry: Any) -> None:
        """Merge `entry` into what is known, here and in the file."""
        whole = self.seconds_worked()

        def merge(data: Data) -> None:
            data[kind].setdefault(key, {}).update(entry)
            add_seconds(data, key, whole)

        self.update(merge)

    def count(self, kind: str, key: str, *counters: str) -> None:
        """Add one to each counter, in the file as it stands now, so that two kernels lose no count."""

        whole = self.seconds_worked()

        def add(data: Data) -> None:
            entry = data[kind].setdefault(key, {})
            entry.update({counter: entry.get(counter, 0) + 1 for counter in counters})
            add_seconds(data, key, whole)

        self.update(add)

    def seconds_worked(self) -> int:
        """Whole seconds since the last entry of this session that were work, as far as anybody can tell."""
        now = time.monotonic()
        gap, self.latest = now - self.latest, now
        self.worked += gap if gap <= PAUSE else 0.0
        whole = int(self.worked)
        self.worked -= whole
        return whole

    def update(self, change: Change | None) -> None:
        """Apply a change, and all that wait, to the file's newest content; keep them waiting if it cannot be written.

        None only reads.
        """
        if change:
            self.unsaved.append(change)
            change(self.data)
        try:
            self.save()
        except OSError as error:
            if not self.lost:
                self.lost = True
                print(
                    f"progress is kept in memory only: {self.name} cannot be used "
                    f"({error.strerror or 'another process holds its lock'}). Nothing else is affected. Make it a file "
                    f"in a writable folder with free space; your next check then saves all, if this kernel still runs."
                )
            return
        if self.lost:
            self.lost = False
            print(f"progress is saved again, in {self.name}; nothing of this session is missing.")

    @property
    def name(self) -> str:
        """The file's name, as messages give it."""
        named = os.environ.get("LABKIT_PROGRESS", "").strip() if self.is_default else ""
        return f"{(self.path or Path(named)).name[:80]}{' (LABKIT_PROGRESS)' if named else ''}"

    def save(self) -> None:
        """Read the file, apply what waits, and write it. Raises OSError."""
        # Found once: a notebook may change its folder later.
        self.path = default_path() if self.path is None else user_path(self.path)
        data = None
        if not self.unsaved:  # reading needs no lock, which a folder that is read-only does not have
            try:
                data = self.content(self.path)
            except FileNotFoundError:
                return
        if data is None:
            make_folder(self.path.parent)
            with locked(self.path, 0.5 if self.lost else LOCK_SECONDS):
                remove_leftovers(self.path)
                data = self.newest(self.path)
                for change in self.unsaved:
                    change(data)
                if self.unsaved:
                    self.write(self.path, data)
        self.unsaved.clear()
        self.saved, self.data = data, copy.deepcopy(data)

    @staticmethod
    def content(path: Path) -> Data | None:
        """What the file holds; None when it is damaged. Raises OSError."""
        try:
            data = json.loads(read_text(path))
        except (ValueError, RecursionError):
            return None
        return data if well_formed(data) else None

    def newest(self, path: Path) -> Data:
        """What the file holds, or what was saved last. A damaged file is set aside, never overwritten."""
        try:
            if (data := self.content(path)) is not None:
                return data
            aside = self.set_aside(real_file(path))
            known = any(self.saved[kind] for kind in KINDS)
            then = "what this session knew of it is saved anew" if known else "progress starts anew"
            print(
                f"{path.name} could not be read and is kept as {aside.name}; {then}, and there is nothing you must do. "
                f"If you have a good copy, put it in the place of {path.name} and restart the kernel."
            )
        except FileNotFoundError:
            pass
        return copy.deepcopy(self.saved)

    @staticmethod
    def set_aside(path: Path) -> Path:
        """Move the file to a name that is free."""
        number = 1
        while os.path.lexists(aside := path.with_name(f"{path.stem}.damaged-{number}.json")):
            number += 1
        path.rename(aside)
        return aside

    @staticmethod
    def write(path: Path, data: Data) -> None:
        """Replace the file in one step. A file that was made read-only stays as it is."""
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "the file is read-only")
        write_whole(path, json.dumps(data, indent=1, sort_keys=True).encode())
