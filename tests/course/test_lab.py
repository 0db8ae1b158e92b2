"""A lab session: what it prints, what it returns, and what it does with ids that are not there."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

from labkit import course
from labkit.course import cards
from labkit.course.catalogue import contents
from labkit.course.contents import LabContents, Prediction, Quiz
from labkit.course.hints import GENERAL, for_failure
from labkit.course.lab import Lab
from labkit.course.progress import Progress
from labkit.models import random
from tests.course.exercises import Double, double
from tests.shapes import TINY

CONTENTS = LabContents(
    "00",
    "A lab for the tests",
    exercises=(Double(),),
    predictions=(Prediction("00.p1", "how many?", unit="tokens"),),
    quizzes=(
        Quiz(
            "00.q1",
            "which?",
            {"a": "this", "b": "that", "c": "both"},
            {"a": "Because of this.", "b": "That is another thing.", "c": "Only one."},
            right="a",
        ),
    ),
)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch, capsys) -> Lab:
    monkeypatch.setattr("labkit.course.lab.contents", lambda number: CONTENTS)
    monkeypatch.setattr("labkit.course.doctor.card", lambda: "card")
    made = Lab("00", progress=Progress(tmp_path / "progress.json"))
    assert "Lab 00 · A lab for the tests" in capsys.readouterr().out
    return made


def test_a_right_answer_comes_back_itself_and_is_remembered(lab: Lab, capsys) -> None:
    def mine(x):
        return x + x

    assert lab.check("00.1", mine) is mine
    assert capsys.readouterr().out == "00.1 · pass · Twice as much. Yours is used from here on.\n"
    assert lab.progress.get("exercises", "00.1") == {"attempts": 1, "passed": True}


def test_an_untouched_blank_gives_the_reference_and_counts_no_attempt(lab: Lab, capsys) -> None:
    def double(x):
        raise NotImplementedError("00.1")

    assert lab.check("00.1", double) is Double.reference
    assert "00.1 · pending" in capsys.readouterr().out
    assert lab.progress.get("exercises", "00.1") == {}


def test_a_wrong_answer_gives_the_reference_and_says_what_was_seen_why_and_where(lab: Lab, capsys) -> None:
    assert lab.check("00.1", lambda x: x * 3) is Double.reference
    said = capsys.readouterr().out
    labels = [line[5:13].strip() for line in said.splitlines()[1:-1]]
    assert [label for label in labels if label] == ["seen", "likely", "look at"]
    assert lab.progress.get("exercises", "00.1") == {
        "attempts": 1,
        "attempts factor": 1,
        "last_diagnosis": "factor",
        "last_look": "the blank's docstring and the text above it, one term at a time, with small numbers by hand",
    }


def test_running_only_the_check_again_does_not_pass_the_reference_off_as_the_learners(lab: Lab, capsys) -> None:
    again = lab.check("00.1", lambda x: x * 3)
    capsys.readouterr()
    assert lab.check("00.1", again) is Double.reference
    assert "pending" in capsys.readouterr().out
    assert "passed" not in lab.progress.get("exercises", "00.1")


def test_a_cell_run_twice_says_the_same_twice(lab: Lab, capsys) -> None:
    lab.check("00.1", double if False else (lambda x: 2 * x))
    first = capsys.readouterr().out
    lab.check("00.1", lambda x: 2 * x)
    assert capsys.readouterr().out == first


def test_a_pass_once_earned_stays_when_the_blank_is_broken_later(lab: Lab) -> None:
    lab.check("00.1", lambda x: 2 * x)
    lab.check("00.1", lambda x: 3 * x)
    assert lab.progress.get("exercises", "00.1")["passed"] is True


def test_hints_come_one_at_a_time_and_end_with_the_solution(lab: Lab, capsys) -> None:
    said = []
    for _ in range(5):
        lab.hint("00.1")
        said.append(capsys.readouterr().out.strip())
    assert said[:3] == ["00.1 · hint 1 of 3 · one", "00.1 · hint 2 of 3 · two", "00.1 · hint 3 of 3 · three"]
    assert said[3] == said[4]
    assert 'lab.solution("00.1")' in said[3]


def test_after_a_failed_check_the_hint_speaks_to_that_failure(lab: Lab, capsys, monkeypatch) -> None:
    monkeypatch.setattr(Double, "hints_for", {"factor": "Twice, not three times."})
    lab.check("00.1", lambda x: x * 3)
    capsys.readouterr()
    lab.hint("00.1")
    assert capsys.readouterr().out.strip() == "00.1 · hint 1 of 4 · Twice, not three times."
    lab.hint("00.1")
    assert capsys.readouterr().out.strip() == "00.1 · hint 2 of 4 · one"


def test_the_solution_is_the_references_source(lab: Lab, capsys) -> None:
    lab.solution("00.1")
    said = capsys.readouterr().out
    assert said.startswith("def double(x: Tensor) -> Tensor:")
    assert "return x * 2" in said


@pytest.mark.parametrize(
    ("guess", "said"),
    [
        (8, "You said 8 tokens: exactly."),
        (9, "You said 9 tokens: close."),
        (8.001, "You said 8 tokens: exactly."),
        (80, "You said 80 tokens: 10 times too high."),
        (12, "You said 12 tokens: 50% too high."),
        (5, "You said 5 tokens: 38% too low."),
        (2, "You said 2 tokens: 4 times too low."),
        (-1, "You said -1 tokens: 9 tokens too low."),
        (..., "You had not guessed."),
    ],
)
def test_a_guess_is_set_beside_the_figure(lab: Lab, capsys, guess, said) -> None:
    lab.predict("00.p1", guess=guess)
    capsys.readouterr()
    lab.reveal("00.p1", 8)
    assert capsys.readouterr().out.strip() == f"00.p1 · it is 8 tokens. {said}"


@pytest.mark.parametrize(
    ("guess", "said"),
    [(30, "17 points too low."), (48.4, "close."), (80, "33 points too high."), (10, "4.7 times too low.")],
)
def test_a_guessed_percentage_is_off_by_points(guess: float, said: str) -> None:
    prediction = Prediction("00.p1", "How much?", "%", within=1.1)
    assert cards.reveal(prediction, guess, 47) == f"00.p1 · it is 47 %. You said {guess} %: {said}"


@pytest.mark.parametrize(
    ("guess", "said"), [(300, "130 points too high."), (100, "70 points too low."), (3000, "18 times too high.")]
)
def test_points_from_a_hundred_on_are_written_as_people_write_them(guess: float, said: str) -> None:
    prediction = Prediction("00.p1", "How much?", "%", within=1.1)
    assert cards.reveal(prediction, guess, 170).endswith(said)


@pytest.mark.parametrize(
    ("unit", "guess", "value", "said"),
    [
        ("%", 30, 0, "it is 0 %. You said 30 %: 30 points too high."),
        ("%", 0, 25, "it is 25 %. You said 0 %: 25 points too low."),
        ("", 0, 4, "it is 4. You said 0: 4 too low."),
        ("MB", 3, 0, "it is 0 MB. You said 3 MB: 3 MB too high."),
    ],
)
def test_a_guess_beside_nothing_is_off_by_what_lies_between(unit: str, guess: float, value: float, said: str) -> None:
    assert cards.reveal(Prediction("00.p1", "How much?", unit), guess, value) == f"00.p1 · {said}"


@pytest.mark.parametrize("guess", ["ten", True, float("nan"), [3, 4], 10**400, None.__class__])
def test_a_guess_that_is_no_number_is_refused_with_an_example(lab: Lab, guess) -> None:
    with pytest.raises(ValueError, match=r"one number, such as guess=10"):
        lab.predict("00.p1", guess=guess)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), "eight", None, True])
def test_a_figure_that_is_no_number_is_refused_and_not_written_down(lab: Lab, value) -> None:
    with pytest.raises(ValueError, match="one finite number"):
        lab.reveal("00.p1", value)
    assert lab.progress.get("predictions", "00.p1") == {}


def test_every_option_gets_its_own_reply_and_letters_may_be_capital(lab: Lab, capsys) -> None:
    replies = []
    for letter in ("a", "B", " c "):
        lab.quiz("00.q1", answer=letter)
        replies.append(capsys.readouterr().out.strip())
    assert replies == [
        "00.q1 · a · right. Because of this.",
        "00.q1 · b · no. That is another thing.",
        "00.q1 · c · no. Only one.",
    ]
    with pytest.raises(ValueError, match="the options are a, b, c"):
        lab.quiz("00.q1", answer="d")


@pytest.mark.parametrize("guess", [3, 3.0, numpy.int64(3), torch.tensor(3.0)])
def test_a_number_of_any_library_is_a_guess(lab: Lab, capsys, guess) -> None:
    lab.predict("00.p1", guess=guess)
    assert capsys.readouterr().out.strip() == "00.p1 · kept: 3 tokens. You will see how close it is."


def test_hints_and_solutions_are_counted_in_the_progress_file(lab: Lab) -> None:
    lab.hint("00.1")
    lab.hint("00.1")
    lab.solution("00.1")
    assert lab.progress.get("exercises", "00.1") == {"hints": 2, "solutions": 1}


def test_a_failure_that_the_exercise_has_no_words_for_gets_those_for_its_kind(lab: Lab, capsys) -> None:
    lab.check("00.1", lambda x: x * 3)
    capsys.readouterr()
    lab.hint("00.1")
    assert "hint 1 of 4 · Every number is off by the same factor" in capsys.readouterr().out


def test_a_failure_of_no_known_kind_sends_back_to_where_the_check_pointed(capsys) -> None:
    assert for_failure(Double(), "of-its-own", "the last line").startswith("The check pointed at: the last line.")
    assert for_failure(Double(), "") == ""


def test_the_solution_says_why_before_the_code(lab: Lab, capsys, monkeypatch) -> None:
    monkeypatch.setattr(Double, "why", "Doubling is adding a number to itself.")
    lab.solution("00.1")
    assert capsys.readouterr().out.startswith("# Doubling is adding a number to itself.\ndef double(")


def test_a_failure_after_a_pass_is_still_known_after_a_restart(lab: Lab, capsys) -> None:
    lab.check("00.1", lambda x: x * 2)
    lab.check("00.1", lambda x: x * 3)
    again = restarted(lab)
    capsys.readouterr()
    again.hint("00.1")
    assert "off by the same factor" in capsys.readouterr().out


def restarted(lab: Lab) -> Lab:
    """The same lab after its kernel was started anew: it knows what the progress file knows."""
    return Lab("00", progress=Progress(lab.progress.path))


def test_after_a_restart_hints_go_on_where_they_were(lab: Lab, capsys, monkeypatch) -> None:
    monkeypatch.setattr(Double, "hints_for", {"factor": "Twice, not three times."})
    lab.hint("00.1")
    lab.check("00.1", lambda x: x * 3)
    lab.hint("00.1")
    again = restarted(lab)
    capsys.readouterr()
    again.hint("00.1")
    assert capsys.readouterr().out.strip() == "00.1 · hint 2 of 4 · one"
    again.check("00.1", lambda x: x * 2)
    again = restarted(lab)
    capsys.readouterr()
    again.hint("00.1")
    assert capsys.readouterr().out.strip() == "00.1 · hint 2 of 3 · two"
    assert again.progress.get("exercises", "00.1")["hints"] == 4


def test_after_a_restart_a_guess_is_still_there(lab: Lab, capsys) -> None:
    lab.predict("00.p1", guess=9)
    again = restarted(lab)
    capsys.readouterr()
    again.reveal("00.p1", 8)
    assert "You said 9 tokens" in capsys.readouterr().out
    again.predict("00.p1", guess=...)
    assert "kept: 9 tokens" in capsys.readouterr().out
    again.predict("00.p1", guess=7)
    again.reveal("00.p1", 8)
    assert "You said 7 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("written", ["9", None, True, [9], float("nan")])
def test_a_guess_in_the_file_that_is_no_number_is_none(lab: Lab, capsys, written) -> None:
    lab.progress.record("predictions", "00.p1", guess=written)
    lab.reveal("00.p1", 8)
    assert "You had not guessed" in capsys.readouterr().out


def test_the_ledger_watches_the_labs_model_unless_told_otherwise(lab: Lab) -> None:
    lab.__dict__["model"] = random(TINY)
    with lab.ledger() as work:
        lab.model(torch.arange(5)[None, :])
    assert work.kv_projections == 2 * 5


def test_timing_waits_for_the_labs_device(lab: Lab, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr("labkit.measure.synchronize", lambda device: asked.append(str(device)))
    lab.__dict__["device"] = torch.device("meta")
    lab.time({"nothing": lambda: None}, repeats=1)
    assert set(asked) == {"meta"}


def test_the_first_answer_and_the_first_guess_are_what_is_remembered(lab: Lab) -> None:
    lab.quiz("00.q1", answer="b")
    lab.quiz("00.q1", answer="a")
    assert lab.progress.get("quizzes", "00.q1") == {"first_answer": "b", "right_at_first": False}
    lab.predict("00.p1", guess=5)
    lab.predict("00.p1", guess=8)
    assert lab.progress.get("predictions", "00.p1") == {"first_guess": 5.0, "guess": 8.0}


@pytest.mark.parametrize(
    ("call", "nearest"),
    [
        (lambda lab: lab.check("00.11", double), "00.1"),
        (lambda lab: lab.hint("0.1"), "00.1"),
        (lambda lab: lab.solution("solution"), "00.1"),
        (lambda lab: lab.predict("00.p2", 3), "00.p1"),
        (lambda lab: lab.reveal("00.p", 3), "00.p1"),
        (lambda lab: lab.quiz("00.q9"), "00.q1"),
    ],
)
def test_an_unknown_id_is_answered_with_the_nearest(lab: Lab, call, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"nearest: {nearest}"):
        call(lab)


def test_a_mistyped_id_shows_one_line_in_a_notebook_and_no_traceback(lab: Lab) -> None:
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    shell = InteractiveShell()
    shell.user_ns["lab"] = lab
    with capture_output() as shown:
        shell.run_cell('lab.hint("00.2")')
    assert shown.stdout.strip() == "lab 00 has no exercise '00.2'; nearest: 00.1"


@pytest.mark.parametrize("number", ["3O", "lab01", 99, ""])
def test_an_unknown_lab_is_answered_with_the_labs_there_are(number) -> None:
    with pytest.raises(ValueError, match=r"there is no lab .*nearest: .*0"):
        contents(number)


def test_a_lab_may_be_named_by_its_number() -> None:
    assert contents(1) is contents("01")
    with pytest.raises(ValueError, match="there is no lab 'True'"):
        contents(True)


def test_the_summary_puts_states_in_one_column_whatever_the_ids(lab: Lab) -> None:
    longer = type("Longer", (Double,), {"id": "00.10b"})()
    both = replace(CONTENTS, exercises=(Double(), longer), predictions=(), quizzes=())
    lines = cards.summary(both, {}, lab.progress).splitlines()[:2]
    assert [line.index("not run") for line in lines] == [8, 8]


def test_the_summary_counts_blanks_guesses_and_questions(lab: Lab, capsys) -> None:
    lab.summary()
    said = capsys.readouterr().out.splitlines()
    assert said[1:] == [
        "0 of 1 passed in this session.",
        "Guesses: 0 of 1 made.",
        "Questions: 0 of 1 right at the first answer; none answered.",
    ]
    lab.check("00.1", lambda x: torch.add(x, x))
    lab.predict("00.p1", guess=4)
    lab.predict("00.p1", guess=8)
    lab.reveal("00.p1", 8)
    lab.quiz("00.q1", answer="b")
    capsys.readouterr()
    lab.summary()
    assert capsys.readouterr().out.splitlines()[1:] == [
        "1 of 1 passed in this session.",
        "Guesses: 1 of 1 made (the first of each counts):",
        "00.p1  you said 4 tokens, it is 8 tokens",
        "Questions: 0 of 1 right at the first answer; not at the first: 00.q1.",
    ]


def test_compiling_says_that_it_compiles_and_leaves_nothing_to_wait_for(lab: Lab, capsys) -> None:
    from labkit.kernels import packed_attention_cpu

    lab.device = torch.device("cpu")
    lab.compile_loops()
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("compiling the loops")
    assert said[1].startswith("compiled in")
    assert packed_attention_cpu._attend.signatures
    lab.device = torch.device("cuda")
    lab.compile_loops()
    assert "nothing to compile" in capsys.readouterr().out


def test_every_diagnosis_that_the_shared_tools_give_has_a_hint() -> None:
    folder = Path(course.__file__).parent
    files = [
        folder / name
        for name in ("exercise.py", "examine.py", "checks/numbers.py", "checks/trials.py", "checks/effort.py")
    ]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    given = set(re.findall(r"fail\(\s*\"([a-z-]+)\"", text))
    assert len(given) > 15
    assert given - GENERAL.keys() == set()
    assert {"factor", "offset", "order"} <= GENERAL.keys()
