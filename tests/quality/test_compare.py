"""Quality under a cache: figures equal to those made by hand, in passes that a compressed cache cannot dodge."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from labkit import models
from labkit.cache import Cache
from labkit.cache.evicting import H2O
from labkit.generation import generate
from labkit.hf import wrap
from labkit.llama import Llama
from labkit.quality import Quality, compare, passes, perplexity
from tests.quality.subjects import SPEC, CoarseCache, LateCache, make, surprise, text
from tests.tiny import VOCAB, hf_model


def quality(seed: int, tokens: int, **bytes_held) -> Quality:
    draw = torch.rand(3, tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return Quality(draw[0], draw[1], draw[2], draw[2] > 0.5, **bytes_held)


def test_the_full_cache_beside_itself_has_ratio_one_no_divergence_and_always_agrees(model: Llama) -> None:
    same = compare(model, text(200), {"full": model.cache}, chunk=16, context=40)["full"]
    assert same.ratio == 1
    assert same.difference == 0
    assert abs(same.kl) <= 1e-12
    assert same.agreement == 1
    assert same.ratio_spread == same.difference_spread == same.kl_spread == same.agreement_spread == 0


def test_the_full_caches_perplexity_is_that_of_one_pass_without_a_cache(model: Llama) -> None:
    tokens = text(150)
    by_hand = surprise(model(tokens), tokens)[39:]
    measured = perplexity(model, tokens, chunk=16, context=40)
    torch.testing.assert_close(measured.surprise, by_hand, rtol=0, atol=1e-10)  # bounded: float64, sums below 100 terms
    assert measured.perplexity == pytest.approx(by_hand.mean().exp().item(), rel=1e-10)


def test_chunks_of_any_size_give_the_full_cache_the_same_perplexity() -> None:
    model = models.random(SPEC, prepack=False)
    assert model(text(120)).abs().max() < 1
    by_size = [perplexity(model, text(120), chunk=chunk, context=60).perplexity for chunk in (1, 7, 32, 60)]
    # Bounded: float32, logits below 1 at the end of sums of at most 96 terms, in each of 2 layers and the head. A
    # surprise is off by at most twice a logit's error, and a perplexity by that share of itself.
    assert max(by_size) / min(by_size) - 1 <= 2 * 3 * 96 * torch.finfo(torch.float32).eps


def test_damaged_keys_cost_what_a_loop_by_hand_says(model: Llama) -> None:
    tokens, context = text(140), 30
    measured = compare(model, tokens, {"coarse": lambda: make(CoarseCache)}, chunk=1, context=context)["coarse"]
    coarse = make(CoarseCache)
    damaged = torch.cat([model(tokens[:, [at]], coarse) for at in range(140)], dim=1)
    exact = model(tokens)
    by_hand = surprise(damaged, tokens)[context - 1 :]
    assert measured.perplexity == pytest.approx(by_hand.mean().exp().item(), rel=1e-10)
    p, q = (logits[0, context - 1 : -1].softmax(dim=-1) for logits in (exact, damaged))
    assert measured.kl == pytest.approx((p * (p / q).log()).sum(dim=-1).mean().item(), rel=1e-8)
    assert measured.agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert measured.kl > 0.01
    assert measured.agreement < 1


def test_several_caches_in_lockstep_measure_what_each_does_alone(model: Llama) -> None:
    tokens, ways = text(100), {"coarse": lambda: make(CoarseCache), "late": lambda: make(LateCache)}
    together = compare(model, tokens, ways, chunk=10, context=20)
    assert list(together) == ["coarse", "late"]
    for name, way in ways.items():
        alone = compare(model, tokens, {name: way}, chunk=10, context=20)[name]
        assert torch.equal(alone.surprise, together[name].surprise)
        assert torch.equal(alone.divergence, together[name].divergence)


@pytest.mark.parametrize("chunk", [1, 10])
def test_in_one_batch_each_cache_has_the_figures_that_it_has_alone(model: Llama, chunk: int) -> None:
    ways = {
        "coarse": lambda: make(CoarseCache),
        "late": lambda: make(LateCache),
        "packed": lambda: Cache.quantized(SPEC.num_layers, 4, group_size=8, residual_length=8),
        "evicting": lambda: Cache.evicting(SPEC.num_layers, H2O(), 24),
        "paged": lambda: Cache.paged(SPEC.num_layers, 16, 8),
        "reading little": lambda: Cache.selecting(SPEC.num_layers, 32),
    }
    options = {"chunk": chunk, "context": 20}
    together = compare(model, text(100), ways, **options, one_batch=True)
    apart = compare(model, text(100), ways, **options)
    assert list(together) == list(apart)
    if chunk == 1:  # only then it reads a part, and evicting takes slots in place
        assert apart["reading little"].kl > 0
    for name, alone in apart.items():
        # Bounded: float64; products of one row and of seven sum at most 96 terms in another order, in 2 layers. Codes
        # and victims are chosen alike unless a number lies that near to a step between two: none does here.
        torch.testing.assert_close(together[name].surprise, alone.surprise, rtol=0, atol=1e-9)
        torch.testing.assert_close(together[name].full_surprise, alone.full_surprise, rtol=0, atol=1e-9)
        torch.testing.assert_close(together[name].divergence, alone.divergence, rtol=0, atol=1e-9)
        assert torch.equal(together[name].agrees, alone.agrees)
        assert together[name].cache_bytes == alone.cache_bytes
        assert together[name].full_cache_bytes == alone.full_cache_bytes


def test_bytes_are_those_after_the_last_token_and_none_where_a_cache_does_not_tell(model: Llama) -> None:
    half = {"own": model.cache, "silent": list}
    measured = compare(
        lambda tokens, cache: model(tokens, None if isinstance(cache, list) else cache),
        text(50),
        half,
        full=model.cache,
        chunk=5,
        context=10,
    )
    assert measured["own"].cache_bytes == measured["own"].full_cache_bytes == 2 * 2 * 2 * 50 * 8 * 8
    assert measured["silent"].cache_bytes is None


def test_a_cache_that_spares_its_first_pass_looks_perfect_in_one_pass_and_not_in_chunks(model: Llama) -> None:
    # A text that the model wrote itself: no other distribution predicts it better on average.
    tokens = torch.cat((text(4), generate(model, text(4), 396, cache=model.cache(), temperature=1.0).tokens), dim=1)
    late = make(LateCache)
    assert torch.equal(model(tokens, late), model(tokens, model.cache()))  # one pass: a ratio of exactly 1
    measured = compare(model, tokens, {"late": lambda: make(LateCache)}, chunk=8, context=40)["late"]
    assert measured.ratio - 2 * measured.ratio_spread > 1
    assert measured.kl > 0.01


def test_no_token_is_scored_from_the_first_pass_even_when_the_context_is_one_chunk(model: Llama) -> None:
    one = compare(model, text(33), {"late": lambda: make(LateCache)}, chunk=32, context=32)["late"]
    assert one.tokens == 1
    assert one.kl > 0


def test_a_transformers_model_is_measured_through_a_lambda() -> None:
    theirs = hf_model("llama").double()
    ours, tokens, options = models.from_hf(theirs), text(90) % VOCAB, {"chunk": 8, "context": 20}
    measured = compare(
        lambda tokens, cache: theirs(tokens, past_key_values=cache).logits,
        tokens,
        {"coarse": lambda: wrap(Cache.of(3, CoarseCache))},
        full=lambda: wrap(Cache.growing(3)),
        **options,
    )["coarse"]
    expected = compare(ours, tokens, {"coarse": lambda: Cache.of(3, CoarseCache)}, **options)["coarse"]
    # Bounded: transformers keeps RoPE and norms in float32 whatever the model's dtype.
    torch.testing.assert_close(measured.full_surprise, expected.full_surprise, rtol=0, atol=1e-4)
    torch.testing.assert_close(measured.surprise, expected.surprise, rtol=0, atol=1e-4)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_passes_cover_the_text_in_order_and_every_token_after_the_context_is_scored_once(data) -> None:
    seq_len = data.draw(st.integers(3, 60))
    context = data.draw(st.integers(2, seq_len - 1))
    chunk = data.draw(st.integers(1, context))
    spans = list(passes(seq_len, chunk, context))
    assert [at for start, end in spans for at in range(start, end)] == list(range(seq_len))
    assert all(0 < end - start <= chunk for start, end in spans)
    assert spans[0][1] < context
    fed = []

    def uniform(tokens: Tensor, cache: list) -> Tensor:
        fed.append(tokens.shape[1])
        return torch.zeros(1, tokens.shape[1], 100)

    measured = perplexity(uniform, text(seq_len), list, chunk=chunk, context=context)
    assert fed == [end - start for start, end in spans]
    assert measured.tokens == seq_len - context
    assert measured.perplexity == pytest.approx(100)


def test_spreads_come_from_the_means_of_whole_blocks_of_32_tokens() -> None:
    blocks = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    values = torch.cat((blocks.repeat_interleave(32), torch.full((5,), 100.0, dtype=torch.float64)))
    measured = Quality(values, torch.zeros_like(values), values, values > 1.5)
    assert (measured.tokens, measured.blocks) == (101, 3)
    error = math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 2 / 3)  # the mean of the blocks is 3
    assert measured.kl_spread == pytest.approx(error)
    assert measured.perplexity_spread == pytest.approx(measured.perplexity * error)
    assert measured.agreement_spread == pytest.approx(math.sqrt((4 / 9 + 1 / 9 + 1 / 9) / 2 / 3))


def test_the_spread_of_ratio_and_difference_is_paired() -> None:
    full = torch.rand(320, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 8
    measured = Quality(full + 0.01, full, torch.zeros_like(full), full > 0)
    assert measured.ratio == pytest.approx(math.exp(0.01))
    assert measured.ratio_spread < 1e-12
    assert measured.difference == pytest.approx(measured.full_perplexity * (math.exp(0.01) - 1))
    assert 0 < measured.difference_spread < 0.02 * measured.perplexity_spread


def test_a_sample_of_one_block_has_an_unknown_spread() -> None:
    measured = quality(0, 63)
    assert math.isnan(measured.kl_spread)
    assert "± unknown" in str(measured)


def test_pooled_texts_are_one_sample_and_bytes_add_up() -> None:
    first, second = quality(1, 64, cache_bytes=10, full_cache_bytes=40), quality(2, 96, cache_bytes=12)
    pooled = Quality.pooled([first, second])
    assert pooled.tokens == 160
    assert pooled.kl == pytest.approx((64 * first.kl + 96 * second.kl) / 160)
    assert pooled.perplexity == pytest.approx(math.exp(torch.cat((first.surprise, second.surprise)).mean()))
    assert (pooled.cache_bytes, pooled.full_cache_bytes) == (22, None)
    with pytest.raises(ValueError, match="nothing to pool"):
        Quality.pooled([])


def test_a_quality_says_everything_in_one_line_with_its_spreads() -> None:
    said = str(quality(3, 320))
    assert "\n" not in said
    assert "320 tokens" in said
    assert said.count("±") == 5


def test_a_token_that_the_full_cache_rules_out_adds_nothing_to_the_divergence() -> None:
    def masked(tokens: Tensor, cache: list) -> Tensor:
        logits = torch.zeros(1, tokens.shape[1], 100)
        logits[..., 99] = -math.inf
        return logits

    tokens = text(20).clamp(max=98)
    assert perplexity(masked, tokens, list, chunk=2, context=4).kl == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 60}, "all 60 tokens in one pass.*uncompressed.*chunk=1"),
        ({"chunk": 500, "context": 0}, "in one pass"),
        ({"context": 60}, "none of the 60 tokens to score"),
        ({"context": 0, "chunk": 1}, "first pass.*at least 2"),
        ({"context": 8, "chunk": 16}, "as if the text came in one.*at least 16"),
        ({"chunk": 0}, "at least 1; got 0"),
    ],
)
def test_a_call_that_would_tell_no_more_than_one_pass_is_refused_and_says_why(model: Llama, options, message) -> None:
    options = {"chunk": 8, "context": 16, **options}
    with pytest.raises(ValueError, match=message):
        compare(model, text(60), {"full": model.cache}, **options)
    with pytest.raises(ValueError, match=message):
        perplexity(model, text(60), **options)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.long), "the text is empty"),
        (torch.zeros(2, 60, dtype=torch.long), r"one text; got torch.int64 \[2, 60\].*pooled"),
        (torch.zeros(60, dtype=torch.long), r"got torch.int64 \[60\]"),
        (torch.zeros(1, 60), "torch.float32"),
        ([1, 2, 3], "got list"),
    ],
)
def test_tokens_that_are_not_one_text_are_refused(model: Llama, tokens, message) -> None:
    with pytest.raises(ValueError, match=message):
        compare(model, tokens, {"full": model.cache}, chunk=8, context=16)


def test_caches_that_cannot_be_compared_are_refused(model: Llama) -> None:
    used, one = model.cache(), model.cache()
    model(text(3), used)
    for caches, message in (
        ({}, "no caches"),
        ({"one": one}, "'one' is a Cache: give a function"),
        ({"one": lambda: used}, "holds 3 tokens already"),
        ({"one": lambda: one, "two": lambda: one}, "same cache object"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(model, text(60), caches, chunk=8, context=16)
    with pytest.raises(ValueError, match="give a function that makes one"):
        compare(lambda tokens, cache: model(tokens, cache), text(60), {"one": model.cache}, chunk=8, context=16)


def test_a_model_that_does_not_give_logits_is_told_how(model: Llama) -> None:
    with pytest.raises(ValueError, match=r"got \[1, 1, 100\].*past_key_values"):
        perplexity(
            lambda tokens, cache: model(tokens, cache, last_only=True), text(60), model.cache, chunk=8, context=16
        )
