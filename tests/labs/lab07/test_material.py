"""What lab 07 measures with: policies made of functions keep what labkit's own keep, and tasks are what they say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from labkit import models
from labkit.cache import Cache
from labkit.cache.evicting import H2O, KeyNorm, SnapKV, Window
from labkit.labs.lab07.material import begins_to_pay, by_queries, filled, kept_share, losses
from labkit.labs.lab07.references import attention_received, snapkv_scores
from labkit.labs.lab07.tasks import PLACES, QUESTION, tasks
from labkit.labs.lab07.timeline import Timeline, timeline
from labkit.llama import Llama
from labkit.measure import Timing
from labkit.quality.reading import read
from tests.reading import SPEC, kept, small_model, small_text  # noqa: F401


def test_what_a_prompt_receives_is_the_sum_of_its_readings_weights(model: Llama, tokens: Tensor) -> None:
    reading = read(model, tokens)
    want = reading.weights(1, 0, 30).sum(dim=1).unflatten(0, (2, 2)).mean(dim=1)
    mine = attention_received(reading.q[1][:, :, :30], reading.k[1][:, :, :30], 7)[0]
    torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-5)


def test_a_policy_made_of_a_function_keeps_what_labkits_own_keeps(model: Llama, tokens: Tensor) -> None:
    reading = read(model, tokens)
    pairs = [
        (by_queries(lambda q, k: snapkv_scores(q, k, 4, 5)), SnapKV(window=4, pool=5)),
        (by_queries(lambda q, k: attention_received(q, k, 16), recent=0.5), H2O()),
    ]
    for own, theirs in pairs:
        caches = [Cache.evicting(SPEC.num_layers, policy, 20, during="prompt") for policy in (own, theirs)]
        assert all(map(torch.equal, *(kept(reading.given(cache)) for cache in caches)))


@pytest.mark.parametrize("chunk", [1, 7, 16, 200])
def test_losses_do_not_depend_on_the_pieces_a_text_is_read_in(model: Llama, tokens: Tensor, chunk: int) -> None:
    logs = model(tokens[:, :-1])[0].double().log_softmax(dim=-1)
    want = -logs.gather(1, tokens[0, 1:, None])[:, 0]
    # Bounded: logits of one pass and of pieces differ by the order in which float32 products are summed.
    torch.testing.assert_close(losses(model, tokens, model.cache(), chunk), want, rtol=1e-4, atol=1e-4)


def test_the_kept_share_counts_the_heads_that_hold_a_position(model: Llama, tokens: Tensor) -> None:
    cache = Cache.evicting(SPEC.num_layers, Window(sinks=2), 10)
    model(tokens, cache, last_only=True)
    assert kept_share(cache, 60) == [1.0] * 2 + [0.0] * 50 + [1.0] * 8
    cache = Cache.evicting(SPEC.num_layers, KeyNorm(), 10)
    model(tokens, cache, last_only=True)
    assert sum(kept_share(cache, 60)) == pytest.approx(10)


class TestTasks:
    @pytest.fixture(scope="class")
    def tokenizer(self):
        return models.tokenizer()

    def test_each_asks_for_something_that_its_text_says(self, tokenizer) -> None:
        made = tasks(tokenizer, seed=3)
        assert len({task.name for task in made}) == len(made) == 8
        for task in made[1:]:
            text, answer = tokenizer.decode(task.text), tokenizer.decode(task.answer)
            assert answer.strip() in text, task.name
            asked = tokenizer.decode([*task.text, *task.asked])
            assert asked.rstrip().endswith(("is", ":")), task.name
            assert tokenizer.decode(task.answer[:1]).strip(), "a space before the answer is asked, not answered"
        later = made[-1]
        assert QUESTION not in tokenizer.decode(later.text)
        assert tokenizer.decode(later.asked).rstrip() == QUESTION
        for task in made[1:-1]:
            assert len(task.asked) == 1, "all but the question's last token is read before anything is evicted"

    def test_a_number_stands_where_its_task_says(self, tokenizer) -> None:
        question = tokenizer(QUESTION, add_special_tokens=False).input_ids
        for task, share in zip(tasks(tokenizer, seed=4)[1:4], PLACES.values(), strict=True):
            number, asked = task.places(question)
            assert task.text[number[0] : number[-1] + 1] == task.answer
            assert number[0] / asked == pytest.approx(share, abs=0.08)
            assert task.text[asked:] == tuple(question)
            before = tokenizer.decode(task.text[: number[0]])
            assert before.removesuffix("The number of the harbour master's locker is ").rstrip().endswith(".")

    def test_each_is_about_a_passage_of_its_own(self, tokenizer) -> None:
        for seed in range(6):
            made = [task.text for task in tasks(tokenizer, seed)]
            starts = {text[:12] for text in made}
            assert len(starts) == len(made)

    def test_another_seed_takes_other_prose_and_numbers(self, tokenizer) -> None:
        one, same, other = (tasks(tokenizer, seed) for seed in (1, 1, 2))
        assert one == same
        assert all(a.text != b.text and a.answer != b.answer for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ([1.1, 1.2, 1.3], "pays from 64 tokens on"),
        ([0.8, 0.9, 1.3], "pays from between 256 and 1,024 tokens on"),
        ([0.8, 1.1, 0.9], "does not pay up to 1,024 tokens"),  # what pays once and not later was luck
        ([1.1, 1.0, 1.2], "pays from between 256 and 1,024 tokens on"),
        ([0.8, 1.01, 1.2], "pays from between 256 and 1,024 tokens on"),  # less than the spread, 0.011
    ],
)
def test_evicting_pays_from_where_it_is_faster_for_good(ratios: list[float], said: str) -> None:
    full = [Timing((0.98, 1.0, 1.02))] * 3
    own = [Timing((0.99 / ratio, 1 / ratio, 1.01 / ratio)) for ratio in ratios]
    assert begins_to_pay([64, 256, 1024], full, own) == said


def test_a_filled_cache_has_seen_the_tokens_and_holds_its_budget(model: Llama) -> None:
    assert filled(model.cache(50), model, 40).seq_len == 40
    cache = filled(Cache.evicting(SPEC.num_layers, H2O(), 10), model, 40)
    assert cache.seq_len == 40
    assert all(layer.physical_len == 10 for layer in cache.layers)


def test_a_timeline_holds_the_budget_and_says_what_was_dropped() -> None:
    model, tokenizer = models.load(device="cpu"), models.tokenizer()
    line = timeline(
        model, tokenizer, "One two three four five six seven", Window(sinks=1), "window", 4, answer_tokens=2
    )
    tokens = len(line.words)
    assert tokens == 7
    assert [sum(held) for held in line.held] == pytest.approx([1, 2, 3, 4, 4, 4, 4])
    assert [line.dropped(moment) for moment in range(tokens)] == [[], [], [], [], [1], [2], [3]]
    assert "".join(line.words) == "One two three four five six seven"
    assert line.answer


def test_what_lost_most_holders_comes_first_among_the_dropped() -> None:
    line = Timeline(
        "p", 2, ("a", "b", "c", "d"), ((1, 0, 0, 0), (1, 1, 0, 0), (0.9, 0.5, 1, 0), (0.9, 0.1, 0.6, 1)), "x"
    )
    assert line.dropped(2) == [1, 0]
    assert line.dropped(3) == [1, 2]
