"""What a container allows, read from a tree of files that looks as the kernel's does, in both versions of cgroups."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit import limits

MB = 10**6
NAMES = {  # of the files that say a group's limit, its use and its file cache
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def machine(root: Path, version: int, own: str, *, top: str = "/", place: str = "") -> Path:
    """A machine whose process is in the group `own`, of a hierarchy mounted from `top` on; the mount's folder."""
    place = place or ("/sys/fs/cgroup/memory" if version == 1 else "/sys/fs/cgroup")
    kind, name = ("cgroup cgroup rw,memory,cpu", "memory,cpu") if version == 1 else ("cgroup2 cgroup2 rw", "")
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"9:name=systemd:/x\n4:{name}:{own}\n" if name else f"0::{own}\n")
    escaped = place.replace(" ", "\\040")
    lines = ["22 1 8:1 / / rw - ext4 /dev/sda rw", f"31 22 0:28 {top} {escaped} rw,relatime shared:9 - {kind}"]
    (root / "proc/self/mountinfo").write_text("\n".join(lines) + "\n")
    (root / place.lstrip("/")).mkdir(parents=True)
    return root / place.lstrip("/")


def limit(group: Path, version: int, limited: int | str, used: int, cached: int = 0) -> None:
    """Give a group a limit of memory."""
    group.mkdir(parents=True, exist_ok=True)
    names = NAMES[version]
    (group / names[0]).write_text(f"{limited}\n")
    (group / names[1]).write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\nother 7\n")


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_what_the_tightest_group_on_the_way_up_leaves(tmp_path: Path, version: int) -> None:
    mount = machine(tmp_path, version, "/pod/box")
    unlimited = {1: 9223372036854771712, 2: "max"}[version]
    limit(mount / "pod/box", version, unlimited, 50 * MB)
    limit(mount / "pod", version, 700 * MB, 600 * MB)
    limit(mount / "neighbour", version, 100, 99)  # not above this process
    assert limits.memory(tmp_path) == (100 * MB, 700 * MB)
    limit(mount / "pod/box", version, 60 * MB, 50 * MB)
    assert limits.memory(tmp_path) == (10 * MB, 60 * MB)


@pytest.mark.parametrize("version", [1, 2])
def test_file_cache_that_the_kernel_can_take_back_counts_as_free(tmp_path: Path, version: int) -> None:
    mount = machine(tmp_path, version, "/box")
    limit(mount / "box", version, 700 * MB, 690 * MB, cached=400 * MB)
    assert limits.memory(tmp_path) == (410 * MB, 700 * MB)


@pytest.mark.parametrize("version", [1, 2])
def test_use_beyond_the_limit_leaves_nothing_and_never_less(tmp_path: Path, version: int) -> None:
    mount = machine(tmp_path, version, "/box")
    limit(mount / "box", version, 700 * MB, 800 * MB)
    assert limits.memory(tmp_path)[0] == 0


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_sees_its_own_group_at_the_mounts_top(tmp_path: Path, version: int) -> None:
    # Without a namespace of its own, /proc names the group as the host does, and the mount begins at that group.
    mount = machine(tmp_path, version, "/docker/abc/inner", top="/docker/abc", place="/sys/fs/c group")
    limit(mount, version, 500 * MB, 100 * MB)
    limit(mount / "inner", version, 300 * MB, 100 * MB)
    assert limits.memory(tmp_path) == (200 * MB, 300 * MB)


def test_a_group_outside_the_mount_still_has_the_mounts_limit(tmp_path: Path) -> None:
    mount = machine(tmp_path, 2, "/../elsewhere")
    limit(mount, 2, 500 * MB, 100 * MB)
    assert limits.memory(tmp_path) == (400 * MB, 500 * MB)


def test_a_soft_limit_of_version_2_counts(tmp_path: Path) -> None:
    mount = machine(tmp_path, 2, "/box")
    limit(mount / "box", 2, "max", 100 * MB)
    (mount / "box/memory.high").write_text("150000000\n")
    assert limits.memory(tmp_path) == (50 * MB, 150 * MB)


@pytest.mark.parametrize("damage", ["no proc", "no groups", "no use", "no number"])
def test_where_no_limit_can_be_read_the_machines_memory_stands(tmp_path: Path, damage: str) -> None:
    if damage != "no proc":
        mount = machine(tmp_path, 2, "/box")
        if damage != "no groups":
            limit(mount / "box", 2, "much" if damage == "no number" else 100, 50)
        if damage == "no use":
            (mount / "box/memory.current").unlink()
    free, total = limits.memory(tmp_path)
    assert total == psutil.virtual_memory().total
    assert 0 < free <= total


def test_a_limit_on_addresses_counts_as_one_on_memory() -> None:
    gigabytes = 3
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({gigabytes * 10**9},) * 2)\n"
        "from labkit import limits; print(*limits.memory())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    free, total = map(int, run.stdout.split())
    assert total == min(gigabytes * 10**9, psutil.virtual_memory().total)
    assert 0 < free < total


@given(quota=st.integers(1, 10**7), period=st.integers(1, 10**6), version=st.sampled_from([1, 2]))
def test_a_quota_lowers_the_core_count_and_never_to_zero(tmp_path_factory, quota, period, version):
    root = tmp_path_factory.mktemp("machine")
    mount = machine(root, version, "/box")
    unlimited = limits.usable_cores(root)
    (mount / "box").mkdir()
    if version == 2:
        (mount / "box/cpu.max").write_text(f"{quota} {period}\n")
    else:
        (mount / "box/cpu.cfs_quota_us").write_text(f"{quota}\n")
        (mount / "box/cpu.cfs_period_us").write_text(f"{period}\n")
    assert limits.usable_cores(root) == max(min(unlimited, math.ceil(quota / period)), 1)


@pytest.mark.parametrize("version", [1, 2])
def test_no_quota_leaves_the_core_count(tmp_path, version):
    mount = machine(tmp_path, version, "/")
    unlimited = limits.usable_cores(Path("/nowhere"))
    (mount / "cpu.max").write_text("max 100000\n")
    (mount / "cpu.cfs_quota_us").write_text("-1\n")
    (mount / "cpu.cfs_period_us").write_text("100000\n")
    assert limits.usable_cores(tmp_path) == unlimited
