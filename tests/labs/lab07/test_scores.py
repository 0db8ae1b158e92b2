"""The table of lab 07: policies by budgets by tasks, each text read once and each policy asked once."""

from __future__ import annotations

import pytest
import torch

from labkit import models
from labkit.cache import Cache
from labkit.cache.evicting import Random, Window
from labkit.labs.lab07.scores import FULL, Score, answered, drawn_anew, pooled, scores, table
from labkit.labs.lab07.tasks import Task, tasks
from labkit.llama import Llama
from labkit.quality.recall import wilson
from labkit.specs import ModelSpec
from tests.reading import SPEC, kept, small_model, small_text  # noqa: F401


def having_read(model: Llama, text: tuple[int, ...]) -> list[Cache]:
    cache = model.cache()
    model(torch.tensor([text]), cache, last_only=True)
    return [cache]


def test_an_answer_is_judged_by_the_models_own_next_tokens(model: Llama) -> None:
    text = (3, 14, 15, 92, 65, 35)
    greedy: list[int] = []
    for _ in range(4):
        greedy.append(int(model(torch.tensor([[*text, 7, *greedy]]))[0, -1].argmax()))
    ((hits, logs),) = answered(model, having_read(model, text), Task("", text, (7,), tuple(greedy)))
    assert hits == [True] * 4
    whole = model(torch.tensor([[*text, 7, *greedy[:-1]]]))[0, -4:].double().log_softmax(dim=-1)
    assert logs == pytest.approx(whole.gather(1, torch.tensor(greedy)[:, None]).sum().item(), abs=1e-3)
    wrong = (greedy[0], greedy[1], (greedy[2] + 1) % 100, greedy[3])
    assert answered(model, having_read(model, text), Task("", text, (7,), wrong))[0][0][:3] == [True, True, False]


def test_a_text_that_goes_on_is_judged_from_its_second_token(model: Llama) -> None:
    text, follows = (3, 14, 15, 92), (65, 35, 89)
    ((hits, logs),) = answered(model, having_read(model, text), Task("", text, (), follows))
    whole = model(torch.tensor([[*text, *follows[:-1]]]))[0, -2:].double().log_softmax(dim=-1)
    assert len(hits) == 2
    assert logs == pytest.approx(whole.gather(1, torch.tensor(follows[1:])[:, None]).sum().item(), abs=1e-3)


def test_scores_count_tokens_and_compare_with_the_full_cache() -> None:
    x = ("x", 0.5)
    got = scores(
        {FULL: [([True, True], -1.0), ([True, False], -3.0)], x: [([True, False], -2.0), ([False, False], -6.0)]}
    )
    assert got[FULL] == Score(1, 2, 0.75, 1.0)
    assert (got[x].hits, got[x].trials, got[x].share) == (0, 2, 0.25)
    assert got[x].perplexity == pytest.approx(torch.tensor(1.0).exp().item())  # 4 nats more over 4 tokens
    assert got[FULL].interval == wilson(1, 2)


def test_tasks_are_pooled_by_policy_and_budget() -> None:
    one, other = Score(1, 4, 0.5, 1.0), Score(3, 4, 0.9, 1.0)
    found = {"a": {FULL: one, ("x", 0.5): other}, "b": {FULL: other, ("x", 0.5): other}, "c": {FULL: one}}
    assert pooled(found, ["a", "b"]) == {FULL: (4, 8), ("x", 0.5): (6, 8)}


def test_a_policy_by_chance_keeps_other_positions_of_every_text() -> None:
    assert (drawn_anew(Random(sinks=2), 5).seed, drawn_anew(Random(sinks=2), 5).sinks) == (5, 2)
    window = Window()
    assert drawn_anew(window, 5) is window


def test_the_table_has_every_task_policy_and_budget_and_the_full_cache_as_its_ceiling(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer, spec = models.tokenizer(), models.load(device="cpu").spec
    small = models.random(ModelSpec("tiny", 2, 4, 2, 16, 48, 96, spec.vocab_size, 512), prepack=False)
    drawn: list[int] = []
    monkeypatch.setattr(Random, "score", lambda self, held: drawn.append(self.seed) or held.k.norm(dim=-1))
    found = table(small, tokenizer, {"window": Window(), "random": Random()}, (0.5, 0.2), trials=2, text_tokens=120)
    assert list(found) == [task.name for task in tasks(tokenizer, 0, 120)]
    columns = [FULL, ("window", 0.5), ("window", 0.2), ("random", 0.5), ("random", 0.2)]
    assert all(list(by) == columns and by[FULL].perplexity == 1.0 for by in found.values())
    assert all(score.trials == 2 for by in found.values() for score in by.values())
    assert sorted(set(drawn)) == list(range(16)), "of two trials' eight tasks each has a draw of its own"
