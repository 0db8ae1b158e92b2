"""A room for one submission: folders of its own, an environment of its own, limits, and the plan that confines it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import psutil

import labkit
from labkit.course.grading import confined

PASSED_ON = ("LANG", "PYTHONPATH", "LABKIT_DEVICE", "LABKIT_PROFILE", "LABKIT_MODEL", "GOMP_SPINCOUNT")
USERS = range(30_000, 60_000)  # numbers for users that nobody is; a container may know no larger ones
PROBE = "import importlib.util, psutil, labkit; assert importlib.util.find_spec('torch').origin"
WORDS = {
    "user": "a user of its own",
    "network": "no network",
    "processes": "no sight of other processes",
    "files": "nothing written outside its folder, and other submissions out of sight",
    "shared memory": "no shared memory with others",
}


class RoomError(RuntimeError):
    """A submission cannot be run here; the message says why and what to do."""


@dataclass(frozen=True)
class Limits:
    """What a submission may use. seconds: of computing, for the notebook. cell_seconds: on the wall, for one cell.

    memory, disk: bytes, of all its processes and files together. file: bytes of one file. processes: threads count.
    """

    seconds: int = 600
    cell_seconds: float = 120.0
    memory: int = 4 * 10**9
    disk: int = 500 * 10**6
    file: int = 200 * 10**6
    processes: int = 128
    open_files: int = 512


class Room:
    """The folders and the plan; `command(...)` is what to run. `close` removes it all."""

    def __init__(self, limits: Limits, hide: Sequence[Path] = ()) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="labkit-room-")).resolve()
        self.base.chmod(0o711)
        self.limits = limits
        self.user = unused_user() if os.geteuid() == 0 else 0
        self.run, self.home = self.base / "run", self.base / "home"
        self.work, self.plan = self.home / "work", self.base / "plan.json"
        for folder in (self.run, self.home, *(self.home / name for name in ("work", "tmp", "cache", "matplotlib"))):
            folder.mkdir(mode=0o700)
        plan = {
            "uid": self.user,
            "folder": str(self.work),
            "output": str(self.home / "output.txt"),
            "why": str(self.base / "why"),
            "report": str(self.base / "report"),
            "environment": self.environment(),
            "limits": {
                "CPU": limits.seconds,
                "AS": limits.memory + 4 * 10**9,  # of one process, the code it reads included
                "DATA": limits.memory,
                "FSIZE": limits.file,
                "NPROC": limits.processes,
                "NOFILE": limits.open_files,
                "CORE": 0,
            },
            "memory": limits.memory,
            "disk": limits.disk,
            "keep": [str(path) for path in needed()],
            "read": self.models(),
            "write": [str(self.run), str(self.home)],
            "hide": sorted({str(Path(path).resolve()) for path in hide} | (closed_above() if self.user else set())),
        }
        self.plan.write_text(json.dumps(plan))
        self.give()

    def environment(self) -> dict[str, str]:
        """What the command sees: nothing of the grader's but what the course needs."""
        names = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        home = str(self.home)
        return names | {
            "PATH": f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin", "HOME": home, "USER": "learner",
            "LOGNAME": "learner", "TMPDIR": f"{home}/tmp", "IPYTHONDIR": f"{home}/ipython",
            "MPLCONFIGDIR": f"{home}/matplotlib", "XDG_CACHE_HOME": f"{home}/cache",
            "LABKIT_CACHE": f"{home}/cache",
            "NUMBA_CACHE_DIR": f"{home}/cache/numba", "LABKIT_PROGRESS": f"{home}/progress.json",
            "JUPYTER_RUNTIME_DIR": str(self.run), "JUPYTER_PLATFORM_DIRS": "1", "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LANG": os.environ.get("LANG", "C.UTF-8"),
        }  # fmt: skip

    def models(self) -> list[tuple[str, str]]:
        """The lab model, where it is on this machine, and where the command will find it."""
        from labkit.lab_model import lab_model_folder

        folder = lab_model_folder()
        return [(str(folder.resolve()), str(self.home / "cache" / folder.name))] if folder.is_dir() else []

    def give(self) -> None:
        """Make the command's folders its user's own. The list of fonts comes along: making it takes seconds."""
        import matplotlib

        for fonts in Path(matplotlib.get_cachedir()).glob("fontlist*.json"):
            shutil.copyfile(fonts, self.home / "matplotlib" / fonts.name)
        if self.user:
            for path in (self.run, self.home, *self.home.rglob("*")):
                os.chown(path, self.user, self.user)

    def give_file(self, path: Path) -> None:
        """Let the room's user read a file of the grader's."""
        if self.user:
            os.chown(path, self.user, self.user)

    def command(self, command: Sequence[str]) -> list[str]:
        """The command, confined. The launcher imports nothing of the course."""
        return [sys.executable, "-P", confined.__file__, str(self.plan), *command]

    @property
    def why(self) -> str:
        """What ended the command, in words; empty while it runs."""
        try:
            return (self.base / "why").read_text()
        except OSError:
            return ""

    def close(self) -> None:
        """Remove the folders, and put an end to what still runs in them."""
        shutil.rmtree(self.base, ignore_errors=True)


def needed() -> list[Path]:
    """What a confined Python reads that may lie in a folder that is hidden: itself, its packages, the course."""
    places = {Path(place).resolve() for place in (sys.prefix, sys.base_prefix, Path(labkit.__file__).parents[1])}
    places |= {Path(place).resolve() for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place}
    return sorted(place for place in places if place.is_dir())


def closed_above() -> set[str]:
    """Folders that lead to what a confined Python reads and that are not open to every user, as root's home is not:
    they are hidden, and what is needed in them is put back."""
    closed = set()
    for place in needed():
        for above in reversed(place.parents):
            if not above.stat().st_mode & 0o001:
                closed.add(str(above))
                break
    return closed


def unused_user() -> int:
    """The number of a user that nobody is and that runs nothing."""
    import pwd

    known = {entry.pw_uid for entry in pwd.getpwall()}
    busy = {process.info["uids"].real for process in psutil.process_iter(["uids"]) if process.info["uids"]}
    return secrets.choice([user for user in USERS if user not in known | busy])


@cache
def enforced(hide: tuple[str, ...] = ()) -> dict[str, str]:
    """What this system enforces: for each of `WORDS`, "" or why not. Raises RoomError where nothing can be run."""
    room = Room(Limits(), [Path(path) for path in hide])
    try:
        command = room.command([sys.executable, "-P", "-c", PROBE])
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            output = room.home / "output.txt"
            said = (output.read_text(errors="replace") if output.exists() else "") + done.stderr
            raise RoomError(
                f"a submission cannot be run here: confined, Python did not start ({said.strip()[-300:] or room.why}). "
                f"It must be able to read {sys.prefix} and {Path(labkit.__file__).parent}: install the course where "
                "every user may read, or grade as an ordinary user"
            )
        return dict(json.loads((room.base / "report").read_text()))
    finally:
        room.close()


def told(report: dict[str, str], limits: Limits) -> list[str]:
    """Lines for the teacher: what holds a submission here, and what does not."""
    holds = [words for name, words in WORDS.items() if not report.get(name, "")]
    lines = [
        f"Each submission runs with at most {limits.seconds} s of computing, {limits.cell_seconds:g} s a cell, "
        f"{limits.memory / 1e9:g} GB of memory, {limits.disk / 1e6:g} MB of files, {limits.processes} threads; "
        f"and with {'; '.join(holds) or 'nothing more'}."
    ]
    lines += [f"NOT enforced here: {words} ({report[name]})." for name, words in WORDS.items() if report.get(name, "")]
    if sys.platform == "darwin":
        lines.append("NOT limited by this system: memory and files; they are looked at five times a second.")
    return lines


def as_dict(limits: Limits) -> dict[str, float]:
    """The limits, for a configuration file."""
    return asdict(limits)
