"""`labkit status`: one learner's file, in words and as a page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from labkit.course.cli import main
from labkit.course.pages import learner_page
from labkit.course.progress import PAUSE, Progress, well_formed
from labkit.course.standing import UnusableFile, read_progress, some, standing, told

DATA = {
    "format": 1,
    "exercises": {
        "01.1": {"passed": True, "attempts": 2, "attempts no-scale": 1, "last_diagnosis": "", "last_look": ""},
        "01.2": {"attempts": 3, "hints": 1, "attempts mask-offset": 3, "last_diagnosis": "mask-offset",
                 "last_look": "row i stands at position past + i"},
        "99.1": {"passed": True},
    },
    "predictions": {"01.p1": {"guess": 5.0, "first_guess": 2.0, "value": 4.61}},
    "quizzes": {"01.q1": {"first_answer": "a", "right_at_first": True}, "01.q2": {"first_answer": "b"}},
    "seconds": {"01": 1500},
}  # fmt: skip


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        found = dict(attributes)
        if tag == "img":
            self.images.append(found)
        self.links += [found[name] for name in ("href", "src") if name in found]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "progress.json").write_text(json.dumps(DATA))
    return tmp_path / "progress.json"


def test_done_open_guesses_questions_minutes_and_latest_diagnoses_are_told(file: Path, capsys) -> None:
    assert main(["status", str(file)]) == 0
    said = capsys.readouterr().out
    assert "lab 01 · Attention basics: 1 of 7 done, 6 open; 3 of 20 min of exercises; 25 min at work" in said
    assert "guesses 1 of 5; questions 1 of 6 right at the first answer, 4 open" in said
    assert "01.2  mask-offset  (A causal mask, with what came before; 3 attempts, 1 hint)" in said
    assert "look at  row i stands at position past + i" in said
    assert "not tried: 01.3, 01.3b, 01.4, 01.5, 01.6" in said
    assert "lab 02 · The cache from scratch: not begun" in said
    assert "left out: 1 entry of no exercise of this version" in said


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "it is no JSON"),
        ("[]", "no progress file of the course"),
        ('{"format": 2, "exercises": {}}', "its format is 2; this version reads 1"),
        ('{"format": 1, "exercises": {}, "predictions": {}, "quizzes": 3}', "damaged"),
        ('{"format": 1, "exercises": {"01.1": {"hints": -1}}, "predictions": {}, "quizzes": {}}', "damaged"),
        ("[" * 100_000, "nested too deeply"),
        ("\udcff", "it is no text"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path: Path, capsys, content: str, why: str) -> None:
    (tmp_path / "p.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert main(["status", str(tmp_path / "p.json")]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert why in said.err
    assert len(said.err.splitlines()) == 1


def test_a_file_that_is_not_there_and_a_folder_are_said(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "none.json", "no such file"), (tmp_path, "a folder")):
        with pytest.raises(UnusableFile, match=why):
            read_progress(path)


def test_odd_values_in_an_entry_harm_nothing() -> None:
    data = {
        "format": 1, "seconds": {"01": "x", "02": -3}, "quizzes": {"01.q1": {"right_at_first": "yes"}},
        "exercises": {"01.1": {"passed": "yes", "last_diagnosis": 7}},
        "predictions": {"01.p1": {"first_guess": 1e999, "value": True}, "01.p2": {"first_guess": 10**400}},
    }  # fmt: skip
    assert well_formed(data)
    learner = standing(data)
    assert [len(one.done) for one in learner.labs[:1]] == [0]
    assert learner.labs[0].guessed == []
    assert told(learner)
    assert "<script" not in learner_page(learner)


def test_the_page_stands_alone_and_says_its_figures_in_words(file: Path, tmp_path: Path) -> None:
    assert main(["status", str(file), "--html", str(tmp_path / "page.html")]) == 0
    page = Page((tmp_path / "page.html").read_text())
    assert len(page.images) == 2
    assert "lab 01: 3 done, 17 open" in page.images[0]["alt"]
    assert "01.p1: 0.43" in page.images[1]["alt"]
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "mask-offset" in page.text


def test_what_a_file_says_is_text_on_the_page() -> None:
    data = json.loads(json.dumps(DATA))
    data["exercises"]["01.2"]["last_look"] = "<script>alert(1)</script>"
    assert "<script" not in learner_page(standing(data))


def test_the_time_at_work_is_kept_without_breaks_and_passed_on(tmp_path: Path, monkeypatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("labkit.course.progress.time.monotonic", lambda: now[0])
    progress = Progress(tmp_path / "progress.json")
    for gap in (90.5, 30.75, PAUSE + 1, 0.75):
        now[0] += gap
        progress.count("exercises", "01.2", "attempts")
    now[0] += 10
    progress.record("quizzes", "02.q1", first_answer="a")
    kept = json.loads((tmp_path / "progress.json").read_text())
    assert kept["seconds"] == {"01": 122, "02": 10}
    assert well_formed(kept)
    assert Progress(tmp_path / "progress.json").data["seconds"] == kept["seconds"]


def test_a_damaged_time_starts_anew(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "progress.json"
    path.write_text(json.dumps({**DATA, "seconds": {"01": "long", "02": 5}}))
    now = [0.0]
    monkeypatch.setattr("labkit.course.progress.time.monotonic", lambda: now[0])
    progress = Progress(path)
    now[0] += 7
    progress.count("exercises", "01.3", "attempts")
    assert json.loads(path.read_text())["seconds"] == {"01": 7, "02": 5}


def test_counts_have_their_nouns() -> None:
    assert [some(1, "hint"), some(2, "hint"), some(2, "look at the solution"), some(3, "diagnosis")] == [
        "1 hint", "2 hints", "2 looks at the solution", "3 diagnoses"
    ]  # fmt: skip
