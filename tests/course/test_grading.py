"""Assignments made from notebooks, points and reasons, and what a confined process cannot do."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch

from labkit.course.catalogue import contents, numbers
from labkit.course.cli import main
from labkit.course.editions.leaks import leaks
from labkit.course.examine import examine
from labkit.course.exercise import ACCEPTED, Exercise, NotYet
from labkit.course.grading import judge as judging
from labkit.course.grading.export import safe
from labkit.course.grading.judge import Points, judge, seal, share
from labkit.course.grading.marks import BLANK, KIND
from labkit.course.grading.source import assignment, cut, source_edition
from labkit.labs.lab01.mask import Mask
from labkit.labs.lab01.references import attention_weights, causal_mask

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def exercises(number: str) -> dict[str, Exercise]:
    return {each.id: each for each in contents(number).exercises}


# The assignment.


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.name[:2] for path in NOTEBOOKS])
def test_every_lab_becomes_an_assignment_that_keeps_its_blanks_and_hides_its_tests(path: Path) -> None:
    known = exercises(path.name[:2])
    notebook = nbformat.read(path, as_version=4)
    edition = source_edition(notebook, known)
    nbformat.validate(edition)
    marked = [cell for cell in edition.cells if "nbgrader" in cell.metadata]
    assert len({cell.metadata.nbgrader.grade_id for cell in marked}) == len(marked) == 3 * len(known)
    graded = [cell for cell in marked if cell.metadata.nbgrader.grade]
    assert sum(cell.metadata.nbgrader.points for cell in graded) == sum(each.minutes for each in known.values())
    assert all("### BEGIN HIDDEN TESTS" in cell.source and "judge(" in cell.source for cell in graded)
    answers = [cell for cell in marked if cell.metadata.nbgrader.solution]
    for cell in answers:
        assert cell.metadata[BLANK] in "\n".join(each.source for each in notebook.cells)
        compile(cell.source, "answer", "exec")
    handed_out = nbformat.v4.new_notebook(cells=[cell for cell in edition.cells if not cell.metadata.get(BLANK)])
    for cell in answers:
        handed_out.cells.append(nbformat.v4.new_code_cell(cell.metadata[BLANK]))
    references = {id: each.reference for id, each in known.items()}
    assert leaks(handed_out, references) == []
    assert leaks(edition, references) == list(known)


def test_seeds_are_new_every_time_and_points_can_be_given() -> None:
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    first, second = (source_edition(notebook, exercises("01"), points={"01.1": 7}) for _ in range(2))
    tests = [[cell.source for cell in each.cells if "HIDDEN" in cell.source] for each in (first, second)]
    assert all(a != b for a, b in zip(*tests, strict=True))
    assert "# 7 points" in tests[0][0]


def test_a_teacher_s_own_copy_of_a_notebook_is_handed_out_with_the_pages_that_it_links_to(tmp_path: Path) -> None:
    """As `labkit grade setup --notebooks` names it: no page lies beside it, and the course has them."""
    copy = tmp_path / "mine" / NOTEBOOKS[0].name
    copy.parent.mkdir()
    copy.write_bytes(NOTEBOOKS[0].read_bytes())
    notebook, files = assignment(copy)
    assert files.keys() == assignment(NOTEBOOKS[0])[1].keys() >= {"reading/docs/glossary.md"}
    text = " ".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert set(re.findall(r"\]\((reading/[^)#]+)", text)) <= files.keys()


def test_a_cut_keeps_what_its_exercises_need_and_refuses_one_that_is_not_there() -> None:
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    shorter = cut(notebook, ["01.2"])
    code = [cell.source for cell in shorter.cells if cell.cell_type == "code"]
    assert len(code) == 2
    assert 'lab = Lab("01")' in code[0]
    assert "def causal_mask" in code[1]
    with pytest.raises(ValueError, match=r"no blank for 01\.77"):
        cut(notebook, ["01.77"])


# Hidden cases.


def draws(exercise: Exercise, seed: int) -> list[torch.Tensor]:
    """The tensors that a check calls its reference with."""
    seen: list[torch.Tensor] = []

    def recording(*args):
        seen.extend(x.clone() for x in args if isinstance(x, torch.Tensor))
        return exercise.reference(*args)

    recording.__signature__ = inspect.signature(exercise.reference)
    assert examine(exercise, recording, seed=seed).status == "pass"
    return seen


@pytest.mark.parametrize("id", ["01.1", "01.5", "02.7"])
def test_another_seed_makes_other_cases_of_the_same_sizes(id: str) -> None:
    exercise = exercises(id[:2])[id]
    usual, again, hidden = draws(exercise, 0), draws(exercise, 0), draws(exercise, 4321)
    assert all(torch.equal(a, b) for a, b in zip(usual, again, strict=True))
    assert [x.shape for x in usual] == [x.shape for x in hidden]
    assert any(not torch.equal(a, b) for a, b in zip(usual, hidden, strict=True))


@pytest.mark.parametrize("number", numbers())
def test_every_reference_passes_hidden_cases(number: str) -> None:
    for id, exercise in exercises(number).items():
        verdict = examine(exercise, exercise.reference, seed=987_654_321)
        assert verdict.status == "pass", (id, verdict.finding)


# Points and reasons.


def part_of_the_sizes(new_tokens, past):
    return torch.ones(new_tokens, past + new_tokens, dtype=torch.bool).tril(past or 1)


def graded(answer, **options) -> tuple[Points, dict]:
    names = {"causal_mask": answer}
    return judge("01.2", names, points=3, seed=5, sealed=False, **options), names


def test_a_right_answer_has_all_points_and_stays() -> None:
    def answer(new_tokens, past):
        return torch.ones(new_tokens, past + new_tokens, dtype=torch.bool).tril(past)

    points, names = graded(answer)
    assert (points.points, points.status, repr(points)) == (3, "pass", "3")
    assert names["causal_mask"] is answer


def test_a_partly_right_answer_has_its_share_with_the_reason_and_the_reference_goes_on() -> None:
    points, names = graded(part_of_the_sizes)
    assert 0 < points.points < 3
    assert points.points == share(3, points.right, points.tried)
    assert names["causal_mask"] is causal_mask
    text = points.text()
    assert f"{points.right} of {points.tried} results were right" in text
    assert "mask: new" in text
    assert "the rule for a row is another one" in text
    card = points._repr_mimebundle_()
    assert card["text/plain"] == repr(points)
    assert card[KIND]["finding"]["diagnosis"] == "values"


def test_a_blank_is_pending_and_what_is_not_there_is_missing() -> None:
    def blank(new_tokens, past):
        raise NotImplementedError("01.2")

    assert graded(blank)[0].status == "pending"
    points = judge("01.2", {}, points=3, seed=5, sealed=False)
    assert points.finding.diagnosis == "missing"
    assert points.points == 0


def calls_it(new_tokens, past):
    return causal_mask(new_tokens, past)


def test_the_reference_under_any_name_earns_nothing() -> None:
    from functools import partial

    for answer in (causal_mask, partial(causal_mask), calls_it):
        assert graded(answer)[0].finding.diagnosis == "the-courses-own", answer


def test_what_judges_in_the_process_of_a_submission_imports_no_nbformat() -> None:
    """nbformat reads a grammar when it is imported: seconds, for each submission."""
    code = "import sys, labkit.course.grading.judge; print('nbformat' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_points_are_rounded_down_and_all_of_them_are_for_what_passes() -> None:
    assert share(3, 0, 22) == 0
    assert share(3, 21, 22) == 2.7
    assert share(3, 22, 22) == 2.7
    assert share(1, 1, 22) == 0
    assert share(3, 5, 0) == 0


def test_what_replaces_a_part_of_the_course_is_found(monkeypatch) -> None:
    monkeypatch.setattr(judging, "SEALED", {})
    assert judging.replaced() is not None  # no seal
    seal("01")
    assert judging.replaced() is None
    with monkeypatch.context() as patch:
        patch.setattr("labkit.course.examine.too_slow", print)
        assert "labkit.course.examine.too_slow" in judging.replaced().seen
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "sum", lambda *args: 0)
        assert "Tensor.sum" in judging.replaced().seen
    assert judging.replaced() is None


def test_a_check_that_takes_a_wrong_answer_for_right_is_found(monkeypatch) -> None:
    assert judging.canary(Mask(), 1, 20) is None
    monkeypatch.setattr(Mask, "examine", lambda self, answer: None)
    assert judging.canary(Mask(), 1, 20).diagnosis == "tampered"


def test_nobody_counts_where_nobody_asked() -> None:
    assert ACCEPTED.get() is None
    assert examine(exercises("01")["01.1"], attention_weights).status == "pass"
    assert ACCEPTED.get() is None


class Explains(Exercise):
    """Compares 2, then what is wrong, then what would explain it."""

    id, title, minutes = "00.9", "Twice", 1
    reference = staticmethod(lambda x: x * 2)

    def examine(self, answer) -> None:
        for x in (torch.ones(2), torch.ones(3)):
            self.same(answer(x), x * 2, what="the result")
        try:
            self.same(answer(torch.zeros(4)), torch.zeros(4), what="the result")
        except NotYet as not_yet:
            for _ in range(5):
                self.same(torch.ones(2), torch.ones(2), what="a hypothesis")
            raise not_yet from None


def test_only_what_was_right_before_the_first_finding_counts() -> None:
    assert judging.counted(Explains(), lambda x: x * 2, 3, 20)[1] == 3
    assert judging.counted(Explains(), lambda x: x * 2 + (len(x) == 4), 3, 20)[1] == 2


def test_a_hypothesis_that_fits_earns_nothing() -> None:
    """04.4 tries the lab model's head_dim when another one is refused; 64 written down is right for it alone."""

    def merge_kv_heads(weight, num_kv_heads, group):
        return weight.reshape(num_kv_heads // group, group, 64, *weight.shape[1:]).mean(1).flatten(0, 1)

    verdict, right = judging.counted(exercises("04")["04.4"], merge_kv_heads, 3, 20)
    assert verdict.finding.diagnosis == "fixed-head-dim"
    assert right == 0


def test_an_answer_that_runs_other_checks_earns_nothing_for_them() -> None:
    other = exercises("01")["01.1"]

    def causal_mask(new_tokens, past):
        examine(other, other.reference)
        return None

    assert judging.counted(exercises("01")["01.2"], causal_mask, 3, 20)[1] == 0


def test_a_finding_that_is_set_aside_does_not_end_the_counting() -> None:
    """A call that stops only while it is watched has no other fault."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    exercise = exercises("01")["01.1"]

    def attention_weights(q, k):
        if _get_current_dispatch_mode() is not None:
            raise RuntimeError("watched")
        return exercise.reference(q, k)

    verdict, right = judging.counted(exercise, attention_weights, 3, 20)
    assert verdict.status == "pass"
    assert right == judging.counted(exercise, exercise.reference, 3, 20)[1]


def test_a_spreadsheet_computes_nothing_that_a_submission_says() -> None:
    assert safe("=HYPERLINK(1)") == "'=HYPERLINK(1)"
    assert safe("a\nb") == "a b"


# The command.


def test_what_a_teacher_mistypes_is_said_in_a_line(tmp_path: Path, capsys) -> None:
    for arguments, said in (
        (("setup", str(tmp_path / "a"), "--lab", "99"), "which lab? --lab with one of 01, 02"),
        (("run", str(tmp_path)), "is not a class's folder"),
        (("collect", str(tmp_path), str(tmp_path)), "is not a class's folder"),
    ):
        assert main(["grade", *arguments]) == 1, arguments
        error = capsys.readouterr().err
        assert said in error
        assert len(error.splitlines()) == 1
