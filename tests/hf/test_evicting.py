"""Evicting caches inside transformers: what labkit's own decoder says with the same weights, or a refusal."""

import copy

import pytest
import torch
from transformers import DynamicCache

from labkit.cache import Cache
from labkit.cache.evicting import H2O, TOVA, KeyDiff, KeyNorm, SnapKV, Window
from labkit.generation import generate
from labkit.hf import CannotHold, wrap
from labkit.llama import Llama
from labkit.specs import decoder_spec
from tests.tiny import VOCAB, hf_model

LAYERS, NEW = 3, 12
POLICIES = {
    "sinks and window": Window(sinks=2),
    "H2O": H2O(),
    "TOVA": TOVA(),
    "SnapKV": SnapKV(window=3),
    "KeyDiff": KeyDiff(),  # not the norm of keys: it is the same for every time that a token comes in the first layer
}


@pytest.fixture(scope="module", params=["llama", "qwen2", "mistral, window 6"])
def pair(request):
    """transformers' model and labkit's decoder with its weights."""
    theirs = hf_model(request.param)
    ours = Llama(decoder_spec(theirs.config.to_dict())).load(theirs.state_dict())
    return theirs, ours


def prompt(batch=1, tokens=11):
    return torch.randint(2, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(1))


def made(policy, ours, budget=8, **options):
    return Cache.evicting(LAYERS, policy, budget, window=ours.spec.window, **options)


def answer(theirs, ids, cache, **options):
    options = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0} | options
    return theirs.generate(ids, past_key_values=wrap(cache, theirs), **options)[:, ids.shape[1] :]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("options", [{}, {"during": "prompt"}], ids=["always", "prompt"])
def test_tokens_and_what_is_held_are_those_of_labkits_decoder(pair, name, options):
    theirs, ours = pair
    one, other = (made(POLICIES[name], ours, **options) for _ in range(2))
    assert torch.equal(answer(theirs, prompt(), one), generate(ours, prompt(), NEW, cache=other).tokens)
    assert one.nbytes == other.nbytes
    for layer, twin in zip(one.layers, other.layers, strict=True):
        assert torch.equal(layer.positions.sort().values, twin.positions.sort().values)


@pytest.mark.parametrize("name", POLICIES)
def test_a_padded_batch_is_answered_as_by_labkits_decoder(pair, name):
    theirs, ours = pair
    ids, mask = prompt(3), torch.ones(3, 11, dtype=torch.long)
    mask[1, :4] = mask[2, :6] = 0
    ids[mask == 0] = 0
    one, other = (made(POLICIES[name], ours, budget=7) for _ in range(2))
    got = answer(theirs, ids, one, attention_mask=mask)
    assert torch.equal(got, generate(ours, ids, NEW, cache=other, padding=[0, 4, 6]).tokens)
    assert one.padding == (0, 4, 6)


def test_a_budget_of_everything_answers_as_transformers_own_cache(pair):
    theirs, ours = pair
    expected = theirs.generate(
        prompt(2), past_key_values=DynamicCache(config=theirs.config), do_sample=False, max_new_tokens=NEW,
        num_beams=3, pad_token_id=0,
    )[:, 11:]  # fmt: skip
    assert torch.equal(answer(theirs, prompt(2), made(H2O(), ours, 99), num_beams=3), expected)


def test_beams_keep_the_budget_and_their_rows():
    theirs = hf_model("llama")
    cache = Cache.evicting(LAYERS, KeyNorm(), 8)
    answer(theirs, prompt(2), cache, num_beams=3)
    assert {layer.physical_len for layer in cache.layers} == {8}
    assert cache[0].positions.shape == (6, 2, 8)


def test_without_the_model_it_is_refused_with_what_to_do():
    with pytest.raises(CannotHold, match=r"a cache that evicts .* use wrap\(cache, model\)"):
        wrap(Cache.evicting(LAYERS, Window(), 8))


def test_speculation_which_crops_is_refused_when_tokens_are_lost():
    with pytest.raises(ValueError, match=r"what KeyNorm evicted after .* is lost"):
        answer(hf_model("llama"), prompt(), Cache.evicting(LAYERS, KeyNorm(), 8), prompt_lookup_num_tokens=3)


def test_a_plan_that_fails_evicts_in_no_layer(monkeypatch):
    theirs = hf_model("llama")
    cache = Cache.evicting(LAYERS, KeyNorm(), 8)
    monkeypatch.setattr(cache[2], "plan", lambda step: 1 / 0)
    with pytest.raises(ZeroDivisionError), torch.no_grad():
        theirs(prompt(), past_key_values=wrap(cache, theirs))
    assert {layer.physical_len for layer in cache.layers} == {11}
    monkeypatch.undo()
    fork = copy.deepcopy(cache)
    with torch.no_grad():
        theirs(prompt(tokens=1), past_key_values=wrap(fork, theirs))
    assert {layer.physical_len for layer in fork.layers} == {8}


def test_a_cache_that_reads_a_part_needs_the_model() -> None:
    cache = Cache.selecting(2, 32)
    with pytest.raises(CannotHold, match=r"chooses it by the query.*use wrap\(cache, model\)"):
        wrap(cache)
