"""`labkit cohort`: what a class stumbles over, without names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from labkit.course.cli import main
from labkit.course.standing import Cohort, standing, told_of
from tests.course.test_status import Page


def learner(**exercises: dict) -> dict:
    return {"format": 1, "exercises": {name.replace("_", "."): entry for name, entry in exercises.items()},
            "predictions": {}, "quizzes": {}}  # fmt: skip


OFFSET = {"attempts": 2, "attempts mask-offset": 2, "last_diagnosis": "mask-offset", "last_look": "past"}
MENDED = {"attempts": 3, "attempts mask-offset": 1, "attempts not-bool": 1, "passed": True, "last_diagnosis": ""}
OLDER = {"attempts": 1, "last_diagnosis": "not-bool"}  # from before attempts were counted by diagnosis


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    everyone = [learner(_01_2=OFFSET), learner(_01_2=MENDED), learner(_01_2=OLDER), learner(_01_1={"passed": True})]
    paths = []
    for name, data in zip(("ann", "bob", "cem", "dee"), everyone, strict=True):
        data["exercises"] = {id.lstrip("."): entry for id, entry in data["exercises"].items()}
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(data))
    return list(map(str, paths))


def test_what_most_met_comes_first_whether_they_have_passed_since_or_not(files: list[str], capsys) -> None:
    assert main(["cohort", *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 learners"
    assert lines[2].split()[:5] == ["2", "of", "4", "01.2", "mask-offset"]
    assert "now 1" in lines[2]
    assert lines[3].split()[:5] == ["2", "of", "4", "01.2", "not-bool"]
    assert "     01.2  1 passed, 2 not yet, 1 not tried; 6 attempts, 0 hints, 0 looks at the solution" in lines


def test_nobodys_name_is_in_it(files: list[str], tmp_path: Path, capsys) -> None:
    assert main(["cohort", *files, "--html", str(tmp_path / "class.html")]) == 0
    everything = capsys.readouterr().out.replace(str(tmp_path), "") + (tmp_path / "class.html").read_text()
    page = Page((tmp_path / "class.html").read_text())
    assert not [name for name in ("ann", "bob", "cem", "dee") if f"{name}.json" in everything]
    assert len(page.images) == 2
    assert "01.2: 1 passed, 2 not yet" in page.images[0]["alt"]
    assert "01.2 mask-offset: 2" in page.images[1]["alt"]
    assert all(link.startswith("data:") for link in page.links)


def test_a_bad_file_is_a_line_and_the_others_go_on(files: list[str], tmp_path: Path, capsys) -> None:
    (tmp_path / "bad.json").write_text("{")
    assert main(["cohort", str(tmp_path / "bad.json"), *files, str(tmp_path / "none.json"), files[0]]) == 1
    said = capsys.readouterr()
    assert said.out.startswith("4 learners")
    assert [line.split(": ", 2)[2].split(" (")[0] for line in said.err.splitlines()] == [
        "it is no JSON", "no such file or directory", "it was named before, and is counted once"
    ]  # fmt: skip


def test_no_usable_file_is_said(tmp_path: Path, capsys) -> None:
    assert main(["cohort", str(tmp_path / "none.json"), "--html", str(tmp_path / "class.html")]) == 1
    assert capsys.readouterr().out.startswith("no progress file could be used")
    assert "No progress file" in (tmp_path / "class.html").read_text()


def test_a_class_without_a_failure_has_nothing_to_rank() -> None:
    cohort = Cohort()
    cohort.add(standing(learner()))
    assert told_of(cohort)[:2] == ["1 learner", "nothing failed yet"]
