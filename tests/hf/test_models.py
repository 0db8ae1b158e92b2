"""Models that a labkit cache cannot serve are refused with the reason, by `wrap` or by the first pass without it."""

import inspect

import pytest
import torch
from transformers import GPTJConfig, GPTJForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.gemma4 import modeling_gemma4

from labkit.cache import Cache
from labkit.hf import CannotHold, wrap
from tests.every_type import generate, num_layers, prompts, tiny_model
from tests.hf.test_generate import LAYERS
from tests.tiny import SHAPE, hf_model

REASONS = {
    "bloom": "cannot be set",
    "gptj": "cannot be set",
    "deepseek_v3": "K .* and V .*: a labkit cache holds K and V of one size",
    "mimo_v2_flash": "K .* and V .*: a labkit cache holds K and V of one size",
    "qwen3_next": "LinearAttentionLayer in transformers' own cache",
    "jamba": "LinearAttentionLayer in transformers' own cache",
    "falcon_h1": "LinearAttentionAndFullAttentionLayer in transformers' own cache",
    "deepseek_v32": "DynamicIndexedLayer in transformers' own cache",
    "gpt_oss": "s_aux",
    "jetmoe": "computes with K or V",
    "diffllama": "computes with K or V",
    "gemma4_text": r"set_attn_implementation\('eager'\) first",
    "rwkv": "does not generate with transformers' caches",
    "openai-gpt": "cannot be set",
}
if '_attn_implementation == "sdpa"' not in inspect.getsource(modeling_gemma4):  # 5.17 does not ask: it is served
    del REASONS["gemma4_text"]


@pytest.mark.parametrize("kind", REASONS)
def test_wrap_refuses_with_the_reason_and_leaves_the_model_as_it_was(kind):
    model = tiny_model(kind)
    text = model.config.get_text_config(decoder=True)
    before = text._attn_implementation
    with pytest.raises(ValueError, match=REASONS[kind]):
        wrap(Cache.growing(num_layers(model)), model)
    assert text._attn_implementation == before


FIRST_PASS = {
    "deepseek_v3": "a labkit cache holds K and V of one size",
    "qwen3_next": "keeps more than K and V of its layers",
    "jamba": "keeps more than K and V of its layers",
    "recurrent_gemma": "keeps K and V from layer 1 on, other things before",
    "reformer": "asks for 'get_start_idx' of its cache",
    "xlnet": "takes its cache for a list of tensors",
}


@pytest.mark.parametrize("kind", FIRST_PASS)
def test_without_the_model_the_first_pass_refuses(kind):
    model = tiny_model(kind)
    with pytest.raises(CannotHold, match=FIRST_PASS[kind]):
        generate(model, *prompts(model)["padded"], wrap(Cache.growing(num_layers(model))))


def test_no_refused_model_makes_a_token():
    torch.manual_seed(0)
    config = GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=8, vocab_size=64, pad_token_id=0, eos_token_id=None)
    with pytest.raises(ValueError, match=r"cannot be set: use wrap\(cache\) without the model"):
        wrap(Cache.growing(2), GPTJForCausalLM(config).eval())


def test_a_cache_of_too_few_or_too_many_layers_is_refused_at_once():
    model = hf_model("llama")
    with pytest.raises(ValueError, match="the cache has 2 layers, the model has more"):
        wrap(Cache.growing(2), model)
    with pytest.raises(ValueError, match="the cache has 5 layers, of which LlamaForCausalLM fills 3"):
        wrap(Cache.growing(5), model)


def test_layers_that_share_k_and_v_take_no_layer_of_the_cache():
    model = tiny_model("gemma3n_text")
    with pytest.raises(ValueError, match="the cache has 6 layers, of which Gemma3nForCausalLM fills 4"):
        wrap(Cache.growing(6), model)
    wrap(Cache.growing(4), model)


def test_dropout_in_train_is_refused_in_the_first_pass():
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_dropout=0.5)).train()
    cache = wrap(Cache.growing(LAYERS), model)
    with pytest.raises(CannotHold, match=r"call model\.eval\(\)"):
        model(torch.tensor([[3, 4, 5]]), past_key_values=cache)


def test_what_is_no_transformers_model_is_refused():
    with pytest.raises(ValueError, match="takes a transformers model; got a Linear"):
        wrap(Cache.growing(1), torch.nn.Linear(2, 2))


def test_an_attention_that_labkit_does_not_know_is_refused():
    model = hf_model("llama")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"attends with 'flex_attention': call model\.set_attn"):
        wrap(Cache.growing(LAYERS), model)


def test_an_attention_that_adds_something_of_its_module_is_found_out(monkeypatch):
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.eager_attention_forward

    def biased(module, query, *args, **kwargs):
        out, weights = plain(module, query, *args, **kwargs)
        return out * module.layer_idx, weights

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", biased)
    model = hf_model("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="computes something else than softmax"):
        wrap(Cache.growing(LAYERS), model)
    assert model.config._attn_implementation == "eager"
