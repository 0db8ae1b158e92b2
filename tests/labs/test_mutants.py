"""No check accepts a small mistake made in its own reference."""

from __future__ import annotations

import ast
from collections.abc import Callable

import pytest
from torch import Tensor

from labkit.course.catalogue import contents, numbers
from labkit.course.checks.tensors import draw
from labkit.course.exercise import Exercise
from labkit.labs.lab01.references import merge_heads
from tests.labs.mutants import difference, kept, meaning, mutants, outcomes, sampled

EXERCISES = {exercise.id: exercise for number in numbers() for exercise in contents(number).exercises}
SAMPLE = 12  # of each exercise; `python -m tests.labs.mutants` tries all


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)
def test_no_mutant_of_a_reference_is_accepted(exercise: Exercise) -> None:
    right = kept().get(exercise.id, {})
    tried = [mutant for mutant in mutants(exercise) if mutant.change not in right]
    accepted = [one.mutant.change for one in outcomes(exercise, sampled(tried, SAMPLE)) if one.status == "survived"]
    assert accepted == []


def test_every_mutant_that_is_kept_is_still_made_and_has_a_reason() -> None:
    for id, reasons in kept().items():
        made = {mutant.change for mutant in mutants(EXERCISES[id])}
        assert [change for change in reasons if change not in made] == [], id
        assert all(reasons.values()), id


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)
def test_mutants_are_many_and_differ(exercise: Exercise) -> None:
    made = mutants(exercise)
    assert len(made) > SAMPLE
    assert len({mutant.source for mutant in made}) == len({mutant.change for mutant in made}) == len(made)


def test_mutants_and_the_sample_of_them_are_the_same_each_time() -> None:
    made = mutants(EXERCISES["01.4"])
    assert mutants.__wrapped__(EXERCISES["01.4"]) == made
    assert sampled(made, SAMPLE) == sampled(made, SAMPLE) != list(made[:SAMPLE])


class Merging(Exercise):
    """An exercise of these tests, whose check looks at shapes alone."""

    id = "01.3b"
    reference = staticmethod(merge_heads)

    def examine(self, answer: Callable[[Tensor], Tensor]) -> None:
        x = draw(2, 3, 4, 5)
        self.like(self.call(answer, x), merge_heads(x), what="the result")


def test_a_check_that_looks_at_shapes_alone_accepts_mutants_with_other_values() -> None:
    by_status: dict[str, list[str]] = {"survived": [], "killed": [], "invalid": []}
    for one in outcomes(Merging(), mutants(Merging())):
        by_status[one.status].append(one.mutant.change)
    line = "return x.transpose(1, 2).reshape(batch, tokens, num_heads * head_dim)"
    assert f"{line} -> return x.reshape(batch, tokens, num_heads * head_dim)" in by_status["survived"]
    assert f"{line} -> return x.transpose(1, 2)" in by_status["killed"]
    assert by_status["invalid"] == []


MADE = {
    "01.1": ["dim=-1) -> return torch.softmax(scores, dim=-2)", "-> return scores", "math.sqrt(16)", "dim=-1).float()"],
    "01.2": ["<= position -> return torch.arange(past + new_tokens)[None, :] < position", "[:, None] - past"],
    "01.4": ["a * cos + b * sin", "angles.sin()", "-> a, b = x.chunk(2, dim=3)", "x.to(torch.bfloat16).to(x.dtype)"],
    "02.3": ["new.append(fed) -> new.insert(0, fed)", "range(max_new_tokens - 1)", "argmin", "last_only=False"],
    "02.4": ["> self.capacity: -> if end >= self.capacity:", "if True:", "= k -> nothing", "RuntimeError(", "= self.k"],
    "02.5": ["break -> nothing", "same += 1 -> same = 1", "min(same, len(wanted) - 1) -> return same", "max(same"],
    "05.4": ["full_bits: int) -> float:", "(tokens + packed)", "max(0, residual_length - tokens)"],
    "05.7": ["torch.cat((new, waiting), dim=2)", "tokens[:, :, start:start + group_size + 1]", "-> return groups"],
}


@pytest.mark.parametrize("id", MADE)
def test_mistakes_that_people_make_are_among_them(id: str) -> None:
    changes = [mutant.change for mutant in mutants(EXERCISES[id])]
    assert [wanted for wanted in MADE[id] if not any(wanted in change for change in changes)] == []


def test_a_product_in_another_order_is_no_mutant() -> None:
    one, same, other = (meaning(ast.parse(text)) for text in ("2 * a / b * c", "c * (a * 2) / b", "2 * b / a * c"))
    assert one == same != other


def test_a_change_is_its_line_before_and_after() -> None:
    assert difference("def f():\n    a\n    b", "def f():\n    a\n    c") == "b -> c"
    assert difference("a\nb", "a") == "b -> nothing"


class Broken(Merging):
    """A check that does not accept its own reference."""

    def examine(self, answer: Callable[[Tensor], Tensor]) -> None:
        self.fail("broken", seen="a check that rejects all", cause="-", look="-")


def test_a_check_that_rejects_everything_is_no_proof() -> None:
    with pytest.raises(RuntimeError, match="rejects its reference before any mutant"):
        list(outcomes(Broken(), mutants(Broken())))
