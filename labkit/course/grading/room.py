"""A room for one submission: folders of its own, an environment of its own, limits, and the plan that confines it."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
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
from labkit.course.grading.confined import SYSTEM
from labkit.places import PACKAGE, course_folder

PASSED_ON = ("LANG", "PYTHONPATH", "LABKIT_DEVICE", "LABKIT_PROFILE", "LABKIT_MODEL", "GOMP_SPINCOUNT")
USERS = range(30_000, 60_000)  # numbers for users that nobody is; a container may know no larger ones
PROBE = "import importlib.util, psutil, labkit; assert importlib.util.find_spec('torch').origin"
LAUNCHER = "labkit.course.grading.confined"
WORDS = {
    "user": "a user of its own",
    "tcp": "no connection to anywhere (TCP)",
    "network": "no network of any kind",
    "signals": "no signal to other processes",
    "processes": "no sight of other processes",
    "files": "nothing read of your home, of the class or of other submissions, nothing written outside its folder",
    "names": "no sight of which other files there are",
    "shared memory": "no System V shared memory with others, and what it holds of it counted",
}


class RoomError(RuntimeError):
    """A submission cannot be run here; the message says why and what to do."""


@dataclass(frozen=True)
class Limits:
    """What a submission may use. seconds: of computing, of all its processes. cell_seconds: of it, or of doing nothing,
    for one cell. wall_seconds: on the wall, for the notebook, whatever it does.

    memory, disk: bytes, of all its processes and files together. file: bytes of one file. processes: threads count.
    """

    seconds: int = 600
    cell_seconds: float = 120.0
    wall_seconds: float = 3600.0
    memory: int = 4 * 10**9
    disk: int = 500 * 10**6
    file: int = 200 * 10**6
    processes: int = 128
    open_files: int = 512


class Room:
    """The folders and the plan; `command(...)` is what to run. `close` removes it all."""

    def __init__(self, limits: Limits, hide: Sequence[Path] = ()) -> None:
        hidden = {Path(path).resolve() for path in hide}
        if inside := sorted(str(path) for path in hidden & set(needed())):
            raise RoomError(
                f"{inside[0]} cannot be hidden from a submission: the course lies in it; use another folder"
            )
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
            "wall": limits.wall_seconds,
            "memory": limits.memory,
            "disk": limits.disk,
            "keep": [str(path) for path in needed()],
            "read": self.models(),
            "write": [str(self.run), str(self.home)],
            "hide": sorted({str(path) for path in hidden | homes()} | (closed_above() if self.user else set())),
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
        """The command, confined. The launcher imports little of the course."""
        return [sys.executable, "-P", "-m", LAUNCHER, str(self.plan), *command]

    @property
    def why(self) -> str:
        """What ended the command, in words; empty while it runs."""
        try:
            return (self.base / "why").read_text()
        except OSError:
            return ""

    def close(self) -> None:
        """Remove the folders, and put an end to what still runs in them."""
        if not self.user:  # root needs no permission
            for above, names, _ in os.walk(self.base):
                for path in (Path(above, name) for name in names):
                    with contextlib.suppress(OSError):
                        if not path.is_symlink():
                            path.chmod(0o700)
        shutil.rmtree(self.base, ignore_errors=True)


def needed() -> list[Path]:
    """What a confined Python reads that may lie in a folder that is hidden: itself, its packages, the course."""
    own = [home for home in homes() if home not in (Path(sys.prefix), Path(sys.base_prefix))]
    path = [Path(place).resolve() for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    places = {place for place in path if not any(home.is_relative_to(place) for home in own)}
    places |= {Path(place).resolve() for place in (sys.prefix, sys.base_prefix)}
    places |= {PACKAGE, course_folder("data"), course_folder("notebooks")}
    return sorted(place for place in places if place.is_dir())


def homes() -> set[Path]:
    """The home of whoever grades, as the system and as the environment know it."""
    named = {os.path.expanduser("~")}
    with contextlib.suppress(KeyError):  # in a container a user may have no entry
        named.add(pwd.getpwuid(os.getuid()).pw_dir)
    found = {Path(name).resolve() for name in named if os.path.isdir(name)}
    return {home for home in found if len(home.parts) > 2 or home.name not in (*SYSTEM, "")}


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
        f"{limits.wall_seconds:.0f} s on the wall, "
        f"{limits.memory / 1e9:g} GB of memory, {limits.disk / 1e6:g} MB of files, {limits.processes} threads; "
        f"and with {'; '.join(holds) or 'nothing more'}."
    ]
    lines += [f"NOT enforced here: {words} ({report[name]})." for name, words in WORDS.items() if report.get(name, "")]
    if sys.platform == "darwin":
        lines.append(
            "NOT limited by this system: memory and files; each is looked at every 0.6 seconds or a little more."
        )
    return lines


def as_dict(limits: Limits) -> dict[str, float]:
    """The limits, for a configuration file."""
    return asdict(limits)
