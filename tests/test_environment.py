"""The files that set a learner up agree: pyproject.toml, requirements.lock, environment.yml, the Makefile."""

import os
import re
import shlex
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

from labkit.course.release.runs import NBVAL

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
EXTRAS = PROJECT["optional-dependencies"]


def spelled_out(texts: list[str]) -> list[str]:
    """Requirements, with those of the project's own extras in the place of `kv-cache-labs[extra]`."""
    found: list[str] = []
    for text in texts:
        own = Requirement(text).name == PROJECT["name"]
        found += [one for extra in Requirement(text).extras for one in EXTRAS[extra]] if own else [text]
    return found


DIRECT = [*PROJECT["dependencies"], *spelled_out(EXTRAS["test"])]
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
    assert [line for line in LOCK if re.fullmatch(r"torch==[\d.]+", line)]


UV = """#!/bin/sh
while [ $# -gt 1 ]; do
    case "$1" in --constraint) cat "$2" >> constraints ;; --output-file) echo 'new==1' > "$2" ;; esac
    shift
done
"""


@pytest.mark.parametrize(("target", "kept"), [("lock", "torch==2.13.0"), ("drift", "")])
def test_the_lock_is_renewed_with_torch_kept_and_drift_tries_the_newest_of_all(clone, target, kept):
    """Nothing else holds a version back: uv reads pyproject.toml's ranges."""
    (clone / ".venv/bin").mkdir(parents=True)
    for name, text in (("uv", UV), ("python", "#!/bin/sh\n")):
        (clone / ".venv/bin" / name).write_text(text)
        (clone / ".venv/bin" / name).chmod(0o755)
    search = os.pathsep.join([str(clone / ".venv/bin"), os.environ["PATH"]])
    command = ["make", target, "PY=.venv/bin/./python", "CHROMIUM=none"]
    done = subprocess.run(
        command, cwd=clone, env=outside() | {"PATH": search}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (clone / "constraints").read_text().strip() == kept
    assert "new==1" in (clone / "requirements.lock").read_text()
    assert not list(clone.glob(".*.tmp"))
    assert "uv" not in tomllib.loads((clone / "pyproject.toml").read_text())["tool"]


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
    """A folder with what make needs to decide what to do, of a name as people have them."""
    folder = tmp_path / "kv labs é 'x' $HOME"
    (folder / "labkit/course").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "requirements.lock", "labkit/course/once.py"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def make(folder, *arguments):
    return subprocess.run(["make", *arguments], cwd=folder, env=outside(), capture_output=True, text=True, check=False)


def outside():
    """The environment without what a make around these tests has set, and with one encoding."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return {**kept, "PYTHONIOENCODING": "utf-8"}


def stamp(folder):
    """The name that make gives to a finished installation of these two files."""
    planned = make(folder, "-n", "lab").stdout
    return folder / re.search(r"once\.py (\.venv/\.lab-\S+)", planned)[1]


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
    assert shlex.split(second) == [".venv/bin/python", "-m", "labkit.course.cli", "open"]


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
    assert shlex.split(planned) == ["python3", "-m", "labkit.course.cli", "open"]


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


@pytest.fixture
def command(clone):
    """In the command's place, a file that prints the arguments that it is called with."""
    for name in ("labkit/__init__.py", "labkit/course/__init__.py"):  # a whole package, or an installed one would win
        (clone / name).touch()
    (clone / "labkit/course/cli.py").write_text("import sys; print(sys.argv[1:])")
    return clone


def test_port_and_host_reach_the_command(command):
    result = make(command, "-s", "lab", f"PY={sys.executable}", "PORT=8901", "HOST=localhost")
    assert result.stdout == "['open', '--host', 'localhost', '--port', '8901']\n"


@pytest.mark.parametrize("odd", ["a b", "a'b", 'a"b', "a$b", "a;b", "a&b", "(a)", "*", "é", "a\\b", "a#b", "%", "a  b"])
def test_every_variable_reaches_its_place_whole(command, odd):
    result = make(command, "-s", "lab", f"PY={sys.executable}", f"HOST={odd}", f"PORT={odd}")
    assert result.stdout == f"{['open', '--host', odd, '--port', odd]}\n"


def linked_python(folder):
    """A Python whose path has spaces, a quote, a dollar sign and an accent."""
    bin = folder / "my 'own' $py é"
    bin.mkdir()
    (bin / "python").symlink_to(sys.executable)
    return bin / "python"


def test_a_python_whose_path_has_spaces_runs_the_command_and_makes_the_venv(command):
    python = linked_python(command)
    assert make(command, "-s", "lab", f"PY={python}").stdout == "['open']\n"
    planned = make(command, "-n", "lab", f"PYTHON={python}").stdout
    assert [str(python), "-m", "venv", ".venv"] == shlex.split(planned.splitlines()[-3])[-4:]


def test_a_tilde_is_the_home_folder(command, monkeypatch):
    monkeypatch.setenv("HOME", str(command))
    linked_python(command).parent.rename(command / "py env")
    assert make(command, "-s", "lab", "PY=~/py env/python").stdout == "['open']\n"


def test_tests_get_their_workers_and_their_browser_whole(clone):
    planned = make(clone, "-n", "browser", "PY=python3", "WORKERS=3", "CHROMIUM=/Apps/Google Chrome/c")
    words = shlex.split(planned.stdout.replace("\\\n", " "))
    assert "CHROMIUM=/Apps/Google Chrome/c" in words
    assert words[words.index("-n") + 1] == "3"


SLOW = """#!/bin/sh
[ "$1" = -c ] && exec {python} "$@"
[ "${{1##*/}}" = once.py ] && exec {python} "$@"
echo run >> runs
sleep 0.3
[ "$2" = venv ] && mkdir -p .venv/bin && cp "$0" .venv/bin/python
exit 0
"""


def test_two_set_ups_at_once_do_each_step_once_and_both_end_well(command):
    python = command / "slow python"
    python.write_text(SLOW.format(python=shlex.quote(sys.executable)))
    python.chmod(0o755)
    (command / "runs").touch()
    both = [
        subprocess.Popen(["make", "lab", f"PYTHON={python}"], cwd=command, env=outside(), stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=60)[0].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert any("waiting for it" in one for one in said)
    assert (command / "runs").read_text() == "run\n" * 4  # venv and pip once, the command itself twice
    assert stamp_names(command) == 1


def stamp_names(folder):
    return len(list((folder / ".venv").glob(".lab-*")))


def test_a_set_up_that_fails_leaves_no_stamp_and_fails(clone):
    once = [sys.executable, "labkit/course/once.py", ".venv/.lab-2"]
    (clone / ".venv").mkdir()
    (clone / ".venv/.lab-1").touch()
    assert subprocess.run([*once, "false"], cwd=clone, check=False).returncode == 1
    assert stamp_names(clone) == 0  # what was installed before may be half replaced
    assert subprocess.run([*once, "sh", "-c", "kill -9 $$"], cwd=clone, check=False).returncode == 137
    assert stamp_names(clone) == 0
    assert subprocess.run([*once, "true"], cwd=clone, check=False).returncode == 0
    assert stamp_names(clone) == 1
    assert subprocess.run([*once, "false"], cwd=clone, check=False).returncode == 0  # nothing left to do


def test_make_runs_the_notebooks_within_the_limits_of_a_release():
    line = re.search(r"^NBVAL := ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert line is not None
    said = line[1].replace("\\\n", " ").split()
    assert tuple(said[: len(NBVAL)]) == NBVAL
    cell, whole = (int(re.search(f"--{name}=([0-9]+)", line[1])[1]) for name in ("nbval-cell-timeout", "timeout"))
    assert whole > cell  # else pytest ends the run before nbval ends the cell
