"""What a process and all below it use: computing time, memory, disk. Looked at from outside, several times a second."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import psutil

from labkit.limits import usable_cores

LINUX = sys.platform.startswith("linux")
MOST_FILES = 20_000
GONE = " (deleted)"
SEGMENT = "/SYSV"  # so begin the names of System V's shared memory, as those of what has no name at all:
ANONYMOUS = ("/memfd:", f"/dev/zero{GONE}", "[anon_shmem:")
SYSTEM_V = {"shm": "shmid", "sem": "semid", "msg": "msqid"}  # its memory, semaphores and queues, and their ids' names
STEP = 1.0  # seconds that one look counts at most: a machine that was asleep has not computed
TRIES = 10  # looks, a tenth of a second apart, at a process that forbids them


class OutOfSight(Exception):
    """A process forbids to look at what it holds, as only bad will does."""


def family(pid: int) -> list[psutil.Process]:
    """All processes below one, whoever their parents were: what loses its parent becomes the launcher's own."""
    found, pending = [], [pid]
    while pending:
        parent = pending.pop()
        below: list[str] = []
        try:
            if not LINUX:
                return psutil.Process(parent).children(recursive=True)
            for thread in os.listdir(f"/proc/{parent}/task"):
                with contextlib.suppress(OSError):  # a thread that has ended leaves its children to another
                    below += Path(f"/proc/{parent}/task/{thread}/children").read_text().split()
        except (OSError, psutil.Error):
            continue
        for child in map(int, below):
            pending.append(child)
            with contextlib.suppress(psutil.Error):
                found.append(psutil.Process(child))
    return found


def computed(pid: int) -> tuple[float, bool]:
    """Seconds that all processes below one have computed, and whether one of them computes or wants to."""
    total, busy = 0.0, False
    for process in family(pid):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
            busy = busy or process.status() in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)
    return total, busy


class Clock:
    """Seconds that all processes below one have computed together, looked at now and then; it never goes back.

    A parent that ignores its children's ends does not get their time, so what was seen of a process stays counted when
    it ends, but for what its parent got. Of one that is new and computes, much may have been missed, and it may end
    unseen: it counts as having computed since it began, or since the last look. That is too much for one that waited
    for a processor, so `computed`, which estimates nothing, is what limits a single cell.
    """

    def __init__(self, pid: int) -> None:
        self.pid, self.seconds, self.last, self.cores = pid, 0.0, time.monotonic(), usable_cores()
        self.seen: dict[psutil.Process, tuple[float, float]] = {}  # what counts, and its ended children's part

    def look(self) -> float:
        """The seconds by now."""
        now = time.monotonic()
        step, self.last = min(now - self.last, STEP), now
        seen: dict[psutil.Process, tuple[float, float]] = {}
        unknown, got = self.cores, 0.0  # no more can compute at a time
        for process in family(self.pid):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                children = times.children_user + times.children_system
                counted = times.user + times.system + children
                before, children_before = self.seen.get(process, (0.0, 0.0))
                if (
                    process not in self.seen
                    and unknown
                    and (counted > step / 4 or process.status() == psutil.STATUS_RUNNING)
                ):
                    counted, unknown = max(counted, min(step, time.time() - process.create_time())), unknown - 1
                seen[process] = max(counted, before), children
                self.seconds += seen[process][0] - before
                got += children - children_before
        missed = [process for process in self.seen if process not in seen and process.is_running()]
        seen |= {process: self.seen[process] for process in missed}  # they did not end, and are not new the next time
        gone = sum(counted for process, (counted, _) in self.seen.items() if process not in seen)
        self.seconds -= max(0.0, min(got, gone))
        self.seen = seen
        return self.seconds


def memory(processes: Iterable[psutil.Process], small: int) -> int:
    """Bytes that processes hold together; on Linux without shared memory, which `nameless` and others count.

    small: of a process that is not worth a closer look.
    """
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            total += resident(process.pid, small) if LINUX else process.memory_info().rss
    return total


def resident(pid: int, small: int) -> int:
    """Bytes of its own and of files that a process holds in memory; if they are many, what is shared is shared out."""
    held = fields(f"/proc/{pid}/status", "RssAnon:", "RssFile:")
    if held > small:
        with contextlib.suppress(OSError):
            return fields(f"/proc/{pid}/smaps_rollup", "Pss_Anon:", "Pss_File:") or held
    return held


def fields(file: str, *names: str) -> int:
    """The sum of some lines of a file of /proc, in bytes; it has kilobytes."""
    lines = [line.split() for line in Path(file).read_text(errors="replace").splitlines()]
    return 1024 * sum(int(line[1]) for line in lines if line and line[0] in names)


def nameless(
    processes: Iterable[psutil.Process], folders: Sequence[str], shared: Sequence[str], largest: int
) -> tuple[int, int]:
    """Bytes in files that processes hold and no folder lists: in memory, and on the disk below `folders`.

    In memory: those whose names begin as one in `shared` does. On the disk: those that were removed while they were
    open or mapped. largest: bytes that a file may have, which is what one counts of which a mapping alone is in sight.
    Raises OutOfSight.
    """
    known: dict[tuple[str, int], int] = {}
    unknown: dict[tuple[str, int], int] = {}
    own = tuple(f"{folder}/" for folder in folders)
    for name, file, size, mapped in all_held(processes, tuple(shared)) if LINUX else ():
        if name.startswith(tuple(shared)):
            kind = SEGMENT if name.startswith(SEGMENT) else "memory"
        elif name.startswith(own):
            kind = "disk"
        else:
            continue
        if mapped and (kind == "disk" or name.startswith("/memfd:")):
            mapped = largest
        sizes = unknown if mapped else known
        sizes[kind, file] = max(mapped or size, sizes.get((kind, file), 0))
    total = {"memory": 0, "disk": 0, SEGMENT: 0}
    for (kind, _), size in (unknown | known).items():
        total[kind] += size
    return total["memory"] + total[SEGMENT], total["disk"]


def all_held(processes: Iterable[psutil.Process], shared: tuple[str, ...]) -> list[tuple[str, int, int, int]]:
    """`held`, of processes that may end meanwhile. Raises OutOfSight."""
    found: list[tuple[str, int, int, int]] = []
    pending = list(processes)
    for _ in range(TRIES):
        denied = []
        for process in pending:
            try:
                if ended(process):  # its files and its memory would read as none
                    raise PermissionError
                found += held(process.pid, shared)
            except PermissionError:  # what has ended, or is about to, gives that answer, too
                denied.append(process)
            except OSError:
                continue
        pending = [process for process in denied if running(process)]
        if not pending:
            return found
        time.sleep(0.1)  # once for all of them: meanwhile nothing is looked at
    raise OutOfSight


def held(pid: int, shared: tuple[str, ...]) -> Iterator[tuple[str, int, int, int]]:
    """Name, number and bytes of each nameless file that one process has open or mapped; of one that is mapped, where
    only root may know the bytes, how far the mapping reaches instead."""
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            name = os.readlink(entry.path)
            if name.endswith(GONE) or name.startswith(shared):
                status = os.stat(entry.path)
                yield name, status.st_ino, status.st_blocks * 512, 0
    for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
        span, _, offset, _, file, *named = line.split(maxsplit=5)
        if named and (named[0].endswith(GONE) or named[0].startswith(shared)):
            first, last = (int(end, 16) for end in span.split("-"))
            try:
                size, mapped = os.stat(f"/proc/{pid}/map_files/{first:x}-{last:x}").st_blocks * 512, 0
            except OSError:
                size, mapped = 0, int(offset, 16) + last - first
            yield named[0], int(file), size, mapped


def ended(process: psutil.Process) -> bool:
    """Whether its first thread has ended, or is about to; others may go on."""
    try:
        return process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.Error:
        return True


def running(process: psutil.Process) -> bool:
    """Whether anything of it goes on."""
    try:
        return not ended(process) or len(os.listdir(f"/proc/{process.pid}/task")) > 1
    except OSError:
        return False


def spaces(pid: int) -> tuple[str, ...]:
    """Which namespaces a process is in, of those in which memory can lie out of sight. Raises OSError."""
    return tuple(os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("user", "mnt", "ipc"))


def elsewhere(processes: Iterable[psutil.Process], first: int) -> bool:
    """Whether one of the processes, those that ended aside, has other namespaces than the first has."""
    try:
        here = spaces(first)
    except OSError:  # it has ended, and with it all others; or this system has no namespaces
        return False
    for process in processes:
        with contextlib.suppress(OSError):  # one that forbids to look is found by `nameless`
            if spaces(process.pid) != here:
                return True
    return False


def segments() -> int:
    """Bytes in the System V shared memory that this process's namespace holds, attached or not."""
    return sum(row["rss"] for row in system_v("shm"))


def system_v(kind: str) -> list[dict[str, int]]:
    """What this process's namespace holds of one kind of SYSTEM_V, numbers by their names in `/proc/sysvipc`.

    Nothing where there is no such file.
    """
    try:
        names, *rows = [line.split() for line in Path(f"/proc/sysvipc/{kind}").read_text().splitlines()]
    except (OSError, ValueError):
        return []
    return [dict(zip(names, map(int, row), strict=True)) for row in rows]


def mounted(folders: Sequence[str]) -> int:
    """Bytes in file systems in memory that were mounted for the command alone."""
    used = 0
    for folder in folders:
        with contextlib.suppress(OSError):
            status = os.statvfs(folder)
            used += (status.f_blocks - status.f_bfree) * status.f_frsize
    return used


def written(folders: Iterable[str], given: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Bytes and number of the files in folders; it stops counting at MOST_FILES. Raises OutOfSight.

    given: device and number of folders that do not count, wherever they are: names can be given to others.
    """
    total = files = 0
    pending = list(folders)
    while pending and files < MOST_FILES:
        try:
            entries = list(os.scandir(pending.pop()))
            for entry in entries:
                files += 1
                with contextlib.suppress(FileNotFoundError):  # it was removed meanwhile
                    status = entry.stat(follow_symlinks=False)
                    if not stat.S_ISDIR(status.st_mode):
                        total += status.st_blocks * 512
                    elif (status.st_dev, status.st_ino) not in given:
                        pending.append(entry.path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:  # it forbids to be read, or lies deeper than a path can say
            raise OutOfSight from error
    return total, files
