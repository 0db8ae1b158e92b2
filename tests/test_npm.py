"""What comes from npm is pinned and names no place that it comes from; without it tests say so, and fail in CI."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import npm

ROOT = Path(__file__).resolve().parents[1]
WANTED = json.loads((npm.ROOT / "package.json").read_text())["dependencies"]
LOCK = json.loads((npm.ROOT / "package-lock.json").read_text())["packages"]


def test_every_package_is_of_one_version_with_its_checksum_and_no_address() -> None:
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in WANTED.values())
    assert LOCK[""]["dependencies"] == WANTED
    for place, package in LOCK.items():
        assert "resolved" not in package, f"{place}: npm install --omit-lockfile-registry-resolved leaves it out"
        assert place == "" or package["integrity"].startswith("sha512-")
        assert "hasInstallScript" not in package  # they are not run


@pytest.mark.parametrize("name", WANTED)
def test_what_is_installed_is_what_the_lock_names(name: str) -> None:
    installed = json.loads((npm.package(name) / "package.json").read_text())
    assert installed["version"] == WANTED[name]


def test_nothing_of_it_is_kept_in_git() -> None:
    for made in ("node_modules/axe-core/package.json", ".npm-1-2", ".lock"):
        assert (
            subprocess.run(["git", "check-ignore", "-q", f"tests/node/{made}"], cwd=ROOT, check=False).returncode == 0
        )


@pytest.mark.parametrize(("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
def test_what_is_missing_skips_a_test_and_fails_it_in_ci(monkeypatch, tmp_path, ci: str, outcome) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(npm, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(outcome, match=r"npm ci --prefix tests/node"):
        npm.package("axe-core")
    with pytest.raises(outcome, match=r"install Node"):
        npm.node()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What make needs to install from npm, in a folder of a name as people have them."""
    folder = tmp_path / "kv labs é"
    for name in ("Makefile", "pyproject.toml", "requirements.lock", "labkit/course/once.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(npm.ROOT, folder / "tests/node", ignore=shutil.ignore_patterns("node_modules", ".*"))
    return folder


def make(folder: Path, *arguments: str, npm_does: str | None, ci: str = "") -> subprocess.CompletedProcess:
    """make, with an npm that runs these commands of the shell, or with none."""
    tools = folder.parent / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("make", "sh", "cat", "cksum", "tr"):
        if not (tools / name).exists():
            (tools / name).symlink_to(shutil.which(name) or name)
    (tools / "npm").unlink(missing_ok=True)
    if npm_does is not None:
        (tools / "npm").write_text(f"#!/bin/sh\n{npm_does}\n")
        (tools / "npm").chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    environment = kept | {"PATH": str(tools), "CI": ci, "PYTHONIOENCODING": "utf-8"}
    command = ["make", *arguments, f"PY={sys.executable}"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def stamp(folder: Path) -> str:
    """The file that stands for an installation of this package.json and this lock."""
    planned = make(folder, "-n", "unit", npm_does="true").stdout
    return re.search(r"once\.py (tests/node/\.npm-\S+)", planned)[1]


def test_it_is_installed_once_for_a_lock_and_anew_for_another(checkout: Path) -> None:
    command = "ci --prefix tests/node --ignore-scripts --engine-strict --no-audit --no-fund"
    count = 'echo "$@" >> asked'
    first = stamp(checkout)
    for _ in range(2):
        assert make(checkout, first, npm_does=count).returncode == 0
    assert (checkout / "asked").read_text().splitlines() == [command]
    assert "npm" not in make(checkout, "-n", "unit", npm_does=count).stdout
    with (checkout / "tests/node/package-lock.json").open("a") as lock:
        lock.write("\n")
    second = stamp(checkout)
    assert second != first
    assert make(checkout, second, npm_does=count).returncode == 0
    assert (checkout / "asked").read_text().splitlines() == [command] * 2
    assert not (checkout / first).exists()


@pytest.mark.parametrize("ci", ["", "true"])
def test_an_npm_that_fails_stops_only_ci(checkout: Path, ci: str) -> None:
    wanted = stamp(checkout)
    made = make(checkout, wanted, npm_does="echo no such registry >&2; exit 1", ci=ci)
    assert "no such registry" in made.stderr
    assert "the tests that need it are skipped" in made.stderr
    assert (made.returncode != 0) == (ci == "true")
    assert not (checkout / wanted).exists()


def test_without_npm_the_tests_run_without_it(checkout: Path) -> None:
    planned = make(checkout, "-n", "unit", npm_does=None)
    assert planned.returncode == 0, planned.stderr
    assert "npm" not in planned.stdout
    assert "pytest" in shlex.split(planned.stdout.splitlines()[-1])
