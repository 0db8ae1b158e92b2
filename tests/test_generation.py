"""Generation: the same tokens with a cache and without, and records that add up."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.cache import Cache
from labkit.generation import generate, pad_left, stream
from labkit.llama import Llama
from labkit.models import random
from labkit.specs import ModelSpec

SPEC = ModelSpec("tiny", 2, 6, 2, 8, 48, 96, 100, 64)


@pytest.fixture(scope="module")
def model() -> Llama:
    return random(SPEC, dtype=torch.float64)  # wide enough that no two likeliest tokens come near a tie by rounding


@given(length=st.integers(1, 12), new=st.integers(1, 8), seed=st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_tokens_are_the_same_without_a_cache_and_with_either(length, new, seed) -> None:
    model = random(SPEC, dtype=torch.float64)
    tokens = torch.randint(0, 100, (2, length), generator=torch.Generator().manual_seed(seed))
    plain = generate(model, tokens, new).tokens
    for cache in (Cache.growing(2), Cache.preallocated(2, length + new)):
        assert torch.equal(generate(model, tokens, new, cache=cache).tokens, plain)


def test_sampling_gives_the_same_tokens_with_a_cache_for_one_seed_and_others_for_another(model: Llama) -> None:
    tokens = torch.arange(6)[None, :]
    options = {"temperature": 1.5, "seed": 3}
    plain = generate(model, tokens, 12, **options).tokens
    assert torch.equal(generate(model, tokens, 12, cache=Cache.growing(2), **options).tokens, plain)
    assert not torch.equal(generate(model, tokens, 12, temperature=1.5, seed=4).tokens, plain)


def test_a_ragged_batch_gives_each_row_the_tokens_it_gets_alone(model: Llama) -> None:
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15]]
    tokens, padding = pad_left(prompts)
    for cache in (None, Cache.growing(2), Cache.preallocated(2, 20)):
        together = generate(model, tokens, 6, cache=cache, padding=padding).tokens
        for row, prompt in enumerate(prompts):
            assert torch.equal(together[row], generate(model, torch.tensor([prompt]), 6).tokens[0])


def test_a_kept_cache_goes_on_where_it_stopped(model: Llama) -> None:
    first, second = torch.arange(5)[None, :], torch.arange(40, 44)[None, :]
    cache = Cache.growing(2)
    answer = generate(model, first, 3, cache=cache).tokens
    # The last token chosen was never run: it opens the next turn.
    kept = generate(model, torch.cat((answer[:, -1:], second), 1), 4, cache=cache).tokens
    rebuilt = generate(model, torch.cat((first, answer, second), 1), 4).tokens
    assert torch.equal(kept, rebuilt)


def test_each_step_records_phase_position_bytes_and_work(model: Llama) -> None:
    cache = Cache.preallocated(2, 16)
    steps = list(stream(model, torch.arange(4)[None, :], 5, cache=cache, count_work=True))
    assert [step.phase for step in steps] == ["prefill"] + ["decode"] * 4
    assert [step.position for step in steps] == [4, 5, 6, 7, 8]
    assert [step.work.kv_projections for step in steps] == [2 * 4] + [2] * 4
    assert {step.cache_bytes for step in steps} == {2 * 2 * 2 * 16 * 8 * 8}
    assert all(step.seconds > 0 for step in steps)


def test_without_a_cache_every_step_projects_all_tokens_again(model: Llama) -> None:
    steps = list(stream(model, torch.arange(4)[None, :], 5, count_work=True))
    assert [step.work.kv_projections for step in steps] == [2 * n for n in (4, 5, 6, 7, 8)]
    assert {step.cache_bytes for step in steps} == {0}


def test_it_stops_when_every_row_has_stopped(model: Llama) -> None:
    tokens = torch.arange(4)[None, :]
    free = generate(model, tokens, 8).tokens[0].tolist()
    stopped = generate(model, tokens, 8, stop_token=free[2]).tokens[0].tolist()
    assert stopped == free[: free.index(free[2]) + 1]


def test_new_tokens_may_be_changed_in_place_and_a_cache_filled_here_may_be_written_elsewhere(model: Llama) -> None:
    for cache in (Cache.growing(2), Cache.preallocated(2, 16)):
        made = generate(model, torch.arange(4)[None, :], 3, cache=cache)
        made.tokens[0, 0] = 1
        model(made.tokens[:, -1:], cache)
        cache.layers[0].append(
            torch.zeros(1, 2, 1, 8, dtype=torch.float64), torch.zeros(1, 2, 1, 8, dtype=torch.float64)
        )
        assert cache.layers[0].seq_len == 8


def test_ttft_is_the_first_step_and_tpot_the_mean_of_the_others(model: Llama) -> None:
    made = generate(model, torch.arange(4)[None, :], 3, cache=Cache.growing(2))
    assert made.ttft == made.steps[0].seconds
    assert made.tpot == pytest.approx((made.steps[1].seconds + made.steps[2].seconds) / 2)
    assert math.isnan(generate(model, torch.arange(4)[None, :], 1).tpot)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_new_tokens": 0}, "at least 1"), ({"max_new_tokens": 2, "temperature": -1}, "0 or more")],
)
def test_impossible_requests_are_refused(model: Llama, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, torch.arange(4)[None, :], **options)


def test_a_batch_with_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        pad_left([[1], []])
