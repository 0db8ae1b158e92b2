"""The files that set a learner up agree: pyproject.toml, requirements.lock, environment.yml, the Makefile."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from rattler import MatchSpec

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
DIRECT = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
MACHINES = [
    {
        "sys_platform": system,
        "platform_machine": machine,
        "python_version": python,
        "python_full_version": f"{python}.9",
    }
    for system, machine in [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")]
    for python in ("3.11", "3.12", "3.13")
]


def pins(machine) -> dict[str, Version]:
    """What the lock pins on one kind of machine, by canonical name."""
    found: dict[str, Version] = {}
    for requirement in map(Requirement, LOCK):
        if requirement.marker is None or requirement.marker.evaluate(machine):
            assert requirement.name not in found, f"{requirement.name} is pinned twice"
            (specifier,) = requirement.specifier
            assert specifier.operator == "=="
            found[canonicalize_name(requirement.name)] = Version(specifier.version)
    return found


@pytest.mark.parametrize(
    "machine", MACHINES, ids=lambda m: f"{m['sys_platform']}-{m['platform_machine']}-{m['python_version']}"
)
def test_every_dependency_is_pinned_once_to_a_version_in_its_range(machine):
    pinned = pins(machine)
    for requirement in map(Requirement, DIRECT):
        if requirement.marker is None or requirement.marker.evaluate(machine):
            version = pinned[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement} does not allow {version}"


def test_the_lock_sends_no_cpu_machine_cuda_and_names_no_place():
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"nvidia|cuda", text)
    assert not re.search(r"://|--(extra-)?index-url|--find-links|--hash| @ ", text)
    assert "torch==2.13.0" in LOCK


def test_the_declared_pythons_are_those_that_the_tools_check():
    from labkit.course.doctor import NEWEST, OLDEST

    assert PROJECT["requires-python"] == f">={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}"
    assert f"{OLDEST} <= sys.version_info[:2] <= {NEWEST}" in (ROOT / "Makefile").read_text()


def test_conda_gets_python_and_pip_and_pip_gets_the_lock_as_constraints():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["-c requirements.lock", "-e ."]}
    specs = [MatchSpec(text, strict=True) for text in conda]
    assert [spec.name.normalized for spec in specs] == ["python", "pip"]
    version = re.fullmatch(r"python=(3\.\d+)", conda[0])[1]
    assert Marker(f"python_version >= '{version}'").evaluate({"python_version": version})
    assert Requirement(f"x {PROJECT['requires-python']}").specifier.contains(f"{version}.0")


def test_each_licence_is_there_in_full():
    for name, opening, length in (
        ("LICENSE", "Apache License", 11_000),
        ("LICENSE-text", "Creative Commons Attribution 4.0 International", 16_000),
    ):
        assert name in PROJECT["license-files"]
        text = (ROOT / name).read_text()
        assert opening in text
        assert len(text) > length


@pytest.fixture
def clone(tmp_path):
    """A folder with what make needs to decide what to do."""
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(folder, *arguments):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def stamp(folder):
    """The name that make gives to a finished installation of these two files."""
    planned = make(folder, "-n", "lab").stdout
    return folder / re.search(r"touch (\.venv/\.lab-\S+)", planned)[1]


def installed(folder):
    """Pretend that `make lab` has installed everything."""
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/.made").touch()
    stamp(folder).touch()


def test_the_first_make_lab_installs_the_lock_and_the_second_installs_nothing(clone):
    first = make(clone, "-n", "lab").stdout
    assert "-m venv .venv" in first
    assert "pip install -c requirements.lock" in first
    installed(clone)
    second = make(clone, "-n", "lab").stdout
    assert "pip" not in second
    assert second.split() == [".venv/bin/python", "-m", "labkit.course.cli", "open"]


def test_files_merely_touched_install_nothing_and_a_changed_lock_installs_again(clone):
    installed(clone)
    os.utime(clone / "requirements.lock")
    os.utime(clone / "pyproject.toml")
    assert "pip" not in make(clone, "-n", "lab").stdout
    with (clone / "requirements.lock").open("a") as lock:
        lock.write("new-package==1\n")
    again = make(clone, "-n", "lab").stdout
    assert "pip install" in again
    assert "-m venv" not in again


def test_a_python_that_has_everything_is_used_without_a_venv(clone):
    planned = make(clone, "-n", "lab", "PY=python3").stdout
    assert planned.split() == ["python3", "-m", "labkit.course.cli", "open"]


def test_a_python_of_another_version_is_refused_with_what_to_type(clone):
    old = clone / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for python in (str(old), "no-such-python"):
        result = make(clone, "lab", f"PYTHON={python}")
        assert result.returncode != 0
        assert "make lab PYTHON=python3.12" in result.stderr
        assert not (clone / ".venv").exists()


def test_pip_arguments_reach_pip(clone):
    assert "--index-url here -e ." in make(clone, "-n", "lab", "PIP_ARGS=--index-url here").stdout


def test_port_and_host_reach_the_command(clone):
    (clone / "labkit/course").mkdir(parents=True)
    (clone / "labkit/course/cli.py").write_text("import os; print(os.environ['PORT'], os.environ['HOST'])")
    result = make(clone, "-s", "lab", f"PY={sys.executable}", "PORT=8901", "HOST=localhost")
    assert result.stdout == "8901 localhost\n"
