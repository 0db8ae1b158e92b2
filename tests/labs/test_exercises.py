"""Every check accepts what is right and rejects what people get wrong, with the diagnosis meant."""

from __future__ import annotations

import importlib
import inspect
import re
from collections import Counter

import pytest

from labkit.course.catalogue import contents, numbers
from labkit.course.examine import examine
from labkit.course.exercise import Exercise
from tests.labs import kill_table
from tests.labs.answer import Wrong
from tests.labs.kill_table import (
    MISTAKES,
    PAGES,
    TABLE,
    gather,
    in_order,
    pages,
    placed,
    published,
    row,
    told_to_teachers,
)

LABS = {number: contents(number) for number in numbers()}
WRONG, EXERCISES = gather()
PUBLISHED, PLACED = published(), placed(WRONG)
BY_THE_CLOCK = {"not-constant"}  # which of several operations a clock finds slow first is not the same each time
# PyTorch takes a float32 mask beside float64 queries and reads past its end: which call shows it is chance.
BY_WHAT_LIES_BEHIND = {("02.7", "a float32 mask of -inf, whatever q is")}
# How many entries one rounding too many reaches is not the same with every processor's order of sums.
HOW_MANY = re.compile(r"\(\d+ of (?=\d+ entries differ)")
RIGHT: list[tuple[str, object]] = [
    pair for number in LABS for pair in importlib.import_module(f"tests.labs.lab{number}.answers").RIGHT
]


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)
def test_check_accepts_its_reference(exercise: Exercise) -> None:
    verdict = examine(exercise, exercise.reference)
    assert verdict.status == "pass", verdict.finding


@pytest.mark.parametrize(("exercise", "answer"), RIGHT, ids=[f"{id}-{i}" for i, (id, _) in enumerate(RIGHT)])
def test_check_accepts_another_right_way_of_writing_it(exercise: str, answer) -> None:
    verdict = examine(EXERCISES[exercise], answer)
    assert verdict.status == "pass", verdict.finding


@pytest.mark.parametrize(
    ("place", "wrong"), list(enumerate(WRONG)), ids=[f"{m.exercise}-{m.diagnosis}-{i}" for i, m in enumerate(WRONG)]
)
def test_check_rejects_a_wrong_answer_with_its_diagnosis_each_time_its_cell_is_run(place: int, wrong: Wrong) -> None:
    """And in the words that the kill table publishes, at the answer's own place in it."""
    verdict = examine(EXERCISES[wrong.exercise], wrong.answer)
    assert verdict.status == "not yet", f"{wrong.mistake} was accepted"
    assert verdict.finding is not None
    assert verdict.finding.diagnosis == wrong.diagnosis, verdict.finding
    assert all((verdict.finding.seen, verdict.finding.cause, verdict.finding.look)), verdict.finding
    again = examine(EXERCISES[wrong.exercise], wrong.answer)
    if wrong.diagnosis in BY_THE_CLOCK or (wrong.exercise, wrong.mistake) in BY_WHAT_LIES_BEHIND:
        begins = row(wrong, verdict.finding).partition(f"`{wrong.diagnosis}`")[0] + f"`{wrong.diagnosis}`"
        assert PLACED.get(place, "").startswith(begins), "run `make docs` to write the kill table anew"
        assert again.finding is not None
        assert again.finding.diagnosis == wrong.diagnosis
    else:
        now, before = (HOW_MANY.sub("(", line) for line in (row(wrong, verdict.finding), PLACED.get(place, "")))
        assert now == before, "run `make docs` to write the kill table anew"
        assert again == verdict


def test_every_exercise_has_at_least_five_wrong_answers_and_most_are_told_apart() -> None:
    count = Counter(wrong.exercise for wrong in WRONG)
    assert {id: count[id] for id in EXERCISES if count[id] < 5} == {}
    for id in EXERCISES:
        assert len({wrong.diagnosis for wrong in WRONG if wrong.exercise == id}) >= 4, id


def test_every_card_is_complete() -> None:
    for exercise in EXERCISES.values():
        assert exercise.title, exercise.id
        assert exercise.minutes >= 1, exercise.id
        assert 1 <= exercise.difficulty <= 5, exercise.id
        assert [bool(hint) for hint in exercise.hints] == [True] * 3, exercise.id
        assert all(need in EXERCISES for need in exercise.needs), exercise.id


def test_every_reference_is_in_its_labs_references() -> None:
    for exercise in EXERCISES.values():
        assert inspect.getmodule(exercise.reference).__name__ == f"labkit.labs.lab{exercise.id[:2]}.references"


def test_hints_for_a_failure_speak_of_diagnoses_that_some_wrong_answer_gets() -> None:
    known = {(wrong.exercise, wrong.diagnosis) for wrong in WRONG}
    for exercise in EXERCISES.values():
        for diagnosis in exercise.hints_for:
            assert (exercise.id, diagnosis) in known, f"{exercise.id}: no wrong answer shows {diagnosis!r}"


def test_every_option_of_every_question_has_its_own_answer() -> None:
    for lab in LABS.values():
        for quiz in lab.quizzes:
            assert quiz.right in quiz.options, quiz.id
            assert quiz.options.keys() == quiz.answers.keys(), quiz.id
            assert len(set(quiz.answers.values())) == len(quiz.options) >= 3, quiz.id


def test_the_published_kill_table_has_a_line_for_each_wrong_answer_and_nothing_besides() -> None:
    """That each line is what the check says now, the test of each wrong answer tells."""
    files = [TABLE, *sorted(PAGES.iterdir())]
    written = {path.relative_to(TABLE.parent).as_posix(): path.read_text(encoding="utf-8") for path in files}
    assert written == pages(PUBLISHED, EXERCISES), "run `make docs` to write it anew"
    begins = [row(wrong, None).partition("**accepted**")[0] for wrong in in_order(WRONG)]
    assert len(PUBLISHED) == len(begins)
    assert all(line.startswith(begin) for line, begin in zip(PUBLISHED, begins, strict=True))


def test_a_line_counts_at_its_own_place_only(tmp_path, monkeypatch) -> None:
    """Two answers of one exercise may make one mistake in other ways, and each has its own words."""
    answers = [
        Wrong("02.1", "other", "a mistake", len),
        Wrong("01.2", "values", "one mistake", len),
        Wrong("01.2", "shape", "one mistake", max),
    ]
    lines = [f"| {wrong.exercise} | {wrong.mistake} | `{wrong.diagnosis}` | seen |" for wrong in answers]
    monkeypatch.setattr(kill_table, "PAGES", tmp_path)

    def write(**labs: list[str]) -> dict[int, str]:
        for lab, text in labs.items():
            (tmp_path / f"{lab}.md").write_text(f"# A page\n\n{kill_table.COLUMNS}" + "\n".join(text))
        return placed(answers)

    assert write(lab01=lines[1:], lab02=lines[:1]) == dict(enumerate(lines))
    exchanged = write(lab01=lines[:0:-1])
    assert (exchanged[1], exchanged[2]) == (lines[2], lines[1])
    assert 0 not in write(lab01=[*lines[1:], lines[0]], lab02=[])  # on another lab's page it is not there


def test_what_teachers_are_told_of_mistakes_is_the_kill_tables() -> None:
    assert MISTAKES.read_text(encoding="utf-8") == told_to_teachers(PUBLISHED, WRONG), "run `make docs`"
