"""What this process may use of the machine: CPU cores and memory, as a container's control groups (cgroups) allow.

Groups are nested, and each level may set a limit: all from the process's own up to the root count, in both versions
of cgroups. https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

ROOT = Path("/")


def usable_cores(root: Path = ROOT) -> int:
    """CPU cores this process may use: its affinity, lowered by a container's CPU quota where one is set."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in groups("cpu", root):
        words = _words(group / "cpu.max") or _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us")
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):  # else "max", or -1
            cores = min(cores, math.ceil(int(words[0]) / int(words[1])))
    return max(cores, 1)


def memory(root: Path = ROOT) -> tuple[int, int]:
    """Bytes of main memory: free for this process, and in all.

    Free is the least of what the machine has and what each limit leaves. A group's file cache that was not used lately
    counts as free, for the kernel takes it back when memory runs out.
    """
    machine = psutil.virtual_memory()
    free, total = machine.available, machine.total
    for limit, used in [*_group_memory(root), *_address_space()]:
        free, total = min(free, max(limit - used, 0)), min(total, limit)
    return free, total


def groups(controller: str, root: Path = ROOT) -> Iterator[Path]:
    """The folders of the control groups that hold this process for one controller, from its own group upwards."""
    own: dict[str, str] = {}  # for version 2 the controller is ""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        own |= {name: path for name in controllers.split(",")}
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        top, mounted = (_unescaped(word) for word in before.split()[3:5])
        kind, *_, options = after.split()
        named = {"cgroup": controller, "cgroup2": ""}.get(kind)
        if named is None or named not in own or (named and named not in options.split(",")):
            continue
        inside = PurePosixPath(own[named])
        below = inside.relative_to(top) if inside.is_relative_to(top) else PurePosixPath()
        for part in (below, *below.parents):
            if (folder := root / mounted.lstrip("/") / part).is_dir() and ".." not in part.parts:
                yield folder


def _group_memory(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of each group that has a limit."""
    for group in groups("memory", root):
        stat = dict(zip(*[iter(_words(group / "memory.stat"))] * 2, strict=False))
        for limit_name, use_name, cache_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.high", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _words(group / limit_name), _words(group / use_name)
            if limit and used and limit[0].isdigit():  # else "max"
                yield int(limit[0]), max(int(used[0]) - int(stat.get(cache_name, 0)), 0)


def _address_space() -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of this process's addresses, as `ulimit -v` sets it."""
    try:
        import resource
    except ImportError:
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        yield limit, psutil.Process().memory_info().vms


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except (OSError, ValueError):
        return []


def _words(file: Path) -> list[str]:
    return " ".join(_lines(file)).split()


def _unescaped(word: str) -> str:
    """A path as mountinfo writes it: a space is `\\040`."""
    return re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), word)
