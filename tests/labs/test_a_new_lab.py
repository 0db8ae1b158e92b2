"""Whoever adds a lab adds a folder in labkit/labs, one in tests/labs and a notebook, and no line in a list."""

from __future__ import annotations

from pathlib import Path

import pytest

import labkit.labs
import tests.labs
from labkit import claims
from labkit.course import catalogue
from labkit.course.lab import Lab
from labkit.course.progress import Progress
from tests.labs.kill_table import gather, kill_table

LAB = '''
from labkit.course.contents import LabContents
from labkit.course.exercise import Exercise


def triple(x: int) -> int:
    """Three times x."""
    return 3 * x


class Triple(Exercise):
    """Three times."""

    id, title, minutes = "90.1", "Three times", 1
    hints = ("one", "two", "three")
    reference = staticmethod(triple)

    def examine(self, answer):
        if self.call(answer, 5) != 15:
            self.fail("not-three-times", seen="another number", cause="another factor", look="the factor")


CONTENTS = LabContents("90", "A lab made up", exercises=(Triple(),))
'''
ANSWERS = """
from tests.labs.answer import Wrong

WRONG = [Wrong("90.1", "not-three-times", "doubles", lambda x: 2 * x)]
RIGHT = [("90.1", lambda x: x + x + x)]
"""
CLAIM = """
sources:
  "900": {title: A text, short: A text, url: "https://example.org/text"}
claims:
  - {id: "900-01", claim: c, claimed: 4, recomputed: 4, compute: 4, verdict: holds, lab: "90"}
"""


@pytest.fixture
def lab90(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for room, package, file, text in (
        ("labs", labkit.labs, "__init__.py", LAB),
        ("tests", tests.labs, "answers.py", ANSWERS),
    ):
        folder = tmp_path / room / "lab90"
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder / file).write_text(text, encoding="utf-8")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / room)])
    return tmp_path


def test_the_catalogue_finds_it_by_its_folder(lab90: Path) -> None:
    assert catalogue.numbers()[-1] == "90"
    assert catalogue.contents("90").title == catalogue.contents(90).title == "A lab made up"


def test_nothing_else_beside_the_labs_is_taken_for_one(lab90: Path) -> None:
    before = catalogue.numbers()
    for name in ("shared", "lab9", "lab901", "lab9x", "notalab91"):
        (lab90 / "labs" / name).mkdir()
        (lab90 / "labs" / name / "__init__.py").touch()
    assert catalogue.numbers() == before


def test_the_kill_table_tries_its_wrong_answers(lab90: Path) -> None:
    answers, exercises = gather()
    mine = [wrong for wrong in answers if wrong.exercise == "90.1"]
    assert "| 90.1 | doubles | `not-three-times` | another number |" in kill_table(mine, exercises)


def test_a_session_of_it_checks_answers(lab90: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab = Lab("90", progress=Progress(lab90 / "progress.json"))
    lab.check("90.1", lambda x: 3 * x)
    assert "90.1 · pass · Three times" in capsys.readouterr().out


def test_a_claim_may_name_it(tmp_path: Path) -> None:
    (tmp_path / "claims.yaml").write_text(CLAIM, encoding="utf-8")
    (claim,) = claims.read(tmp_path / "claims.yaml").claims
    assert claim.lab == "90"
