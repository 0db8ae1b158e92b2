"""Evicting caches inside transformers: what labkit's own decoder says with the same weights, or a refusal."""

import copy
import re
import sys
import warnings

import pytest
import torch
from transformers import DynamicCache

from labkit.cache import Cache
from labkit.cache.evicting import H2O, TOVA, ExpectedAttention, KeyDiff, KeyNorm, Merging, SnapKV, Window
from labkit.generation import generate
from labkit.hf import CannotHold, wrap
from labkit.llama import Llama
from labkit.specs import decoder_spec
from tests.every_type import TEXT, UNTRIED, num_layers, tiny_model
from tests.tiny import VOCAB, hf_model

LAYERS, NEW = 3, 12
PLAIN = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "gemma", "gemma2", "granite", "mixtral", "phi3", "starcoder2")
"""Types that turn all channels in pairs (i, i + head_dim / 2), in every layer alike."""
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


def frequencies_of(theirs):
    """RoPE's, as transformers' own module has them."""
    return next(part.inv_freq for part in theirs.modules() if hasattr(part, "inv_freq"))


def turning(frequencies, layers=LAYERS):
    """A cache of each kind that turns keys or queries by these frequencies."""
    return {
        "places in the cache": Cache.evicting(layers, Window(sinks=2), 8, frequencies=frequencies),
        "expected attention": Cache.evicting(layers, ExpectedAttention(frequencies=frequencies), 8),
        "merging": Cache.evicting(layers, Merging(frequencies=frequencies, sinks=1), 8),
    }


@pytest.mark.parametrize("name", ["places in the cache", "expected attention", "merging"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_cache_that_turns_keys_answers_as_in_labkits_decoder(kind, name):
    theirs = hf_model(kind)
    ours = Llama(decoder_spec(theirs.config.to_dict())).load(theirs.state_dict())
    one, other = (turning(ours.frequencies)[name] for _ in range(2))
    # No token twice: pairs that come twice are equally alike in the first layer, and rounding would choose.
    ids = torch.randperm(VOCAB - 2, generator=torch.Generator().manual_seed(4))[None, :11] + 2
    assert torch.equal(answer(theirs, ids, one), generate(ours, ids, NEW, cache=other).tokens)
    for layer, twin in zip(one.layers, other.layers, strict=True):
        assert torch.equal(layer.positions.sort().values, twin.positions.sort().values)


@pytest.mark.parametrize("name", ["places in the cache", "expected attention", "merging"])
@pytest.mark.parametrize("kind", ["cohere", "glm", "glm4", "ernie4_5", "phi", "gpt2"])
def test_keys_that_a_model_turns_otherwise_are_refused(kind, name):
    theirs = tiny_model(kind)
    head_dim = theirs(torch.tensor([[1]]), use_cache=True).past_key_values.layers[0].keys.shape[3]
    frequencies = 10_000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    cache = turning(frequencies, num_layers(theirs))[name]
    with pytest.raises(CannotHold, match=r"does not turn its keys in pairs \(i, i \+ head_dim / 2\)"):
        wrap(cache, theirs)
    assert not theirs.config.get_text_config(decoder=True)._attn_implementation.startswith("labkit")


def test_frequencies_of_another_model_are_refused():
    theirs = hf_model("llama")
    with pytest.raises(CannotHold, match="by the frequencies that this cache was given"):
        wrap(turning(1.01 * frequencies_of(theirs))["merging"], theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frequencies_that_differ_in_slow_channels_alone_are_refused_in_every_dtype(dtype):
    """Llama 3.1's, as they were before they were scaled for long texts."""
    rope = {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    theirs, scaled = (tiny_model("llama", rope_parameters=each) for each in (rope | {"rope_type": "default"}, rope))
    before, after = frequencies_of(theirs), frequencies_of(scaled)
    assert not torch.equal(before, after)
    layers = num_layers(scaled)
    for weights in scaled.parameters():  # as a model is loaded: its frequencies stay float32
        weights.data = weights.data.to(dtype)
    wrap(turning(after, layers)["merging"], scaled)
    with pytest.raises(CannotHold, match="by the frequencies that this cache was given"):
        wrap(turning(before, layers)["merging"], scaled)


def test_rope_that_changes_with_the_length_is_refused():
    theirs = tiny_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0})
    with pytest.raises(CannotHold, match=r"dynamic.* changes with the text's length"):
        wrap(turning(frequencies_of(theirs), num_layers(theirs))["places in the cache"], theirs)


def test_merging_in_a_model_with_windows_is_refused_when_it_is_wrapped():
    theirs = hf_model("mistral, window 6")
    cache = turning(frequencies_of(theirs))["merging"]
    with pytest.raises(CannotHold, match=r"layer 0 .*window of 6 tokens.*another policy than Merging"):
        wrap(cache, theirs)
    assert cache.seq_len == 0


@pytest.mark.parametrize("kind", [kind for kind in TEXT if kind not in UNTRIED])
def test_whatever_the_type_keys_are_turned_as_the_model_does_or_the_cache_is_refused(kind):
    """The model's own `rotate_half` says how it pairs channels, the cache which of its keys it would turn alike."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = tiny_model(kind)
    layers = num_layers(theirs)
    try:
        wrap(Cache.growing(layers), theirs)
    except ValueError:
        return  # whatever the cache
    parts = [part for part in theirs.modules() if getattr(part, "inv_freq", None) is not None]
    frequencies = parts[0].inv_freq if parts else 10_000.0 ** -(torch.arange(4) / 4)
    halves = {getattr(sys.modules[type(part).__module__], "rotate_half", None) for part in theirs.modules()} - {None}
    neighbours = [f(torch.arange(1.0, 5.0)).tolist() != [-3, -4, 1, 2] for f in halves]
    try:
        wrap(Cache.evicting(layers, Window(sinks=2), 8, frequencies=frequencies), theirs)
    except CannotHold as error:
        refused = str(error)
    else:
        assert not any(neighbours)
        with pytest.raises(CannotHold, match="by the frequencies"):  # so it is by these that keys are turned
            wrap(Cache.evicting(layers, Window(sinks=2), 8, frequencies=2 * frequencies), theirs)
        return
    known = "does not turn its keys in pairs|changes with the text's length|cannot be seen|attention_mask hides more"
    assert re.search(known, refused)
    assert neighbours != [False] or kind not in PLAIN
