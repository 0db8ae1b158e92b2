"""A model that attends through labkit layers: its own logits, or a ValueError; with other caches nothing changes."""

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from labkit.attention import Constants
from labkit.cache import Cache
from labkit.hf import CannotHold, wrap
from labkit.hf.attention import labkit_attention
from labkit.hf.layer import StandIn
from tests.every_type import tiny_model
from tests.hf.test_generate import LAYERS, MODES, generate, prompt
from tests.tiny import SHAPE, hf_model


class TestAttentionThroughTheCache:
    def logits(self, model, cache, ids, mask, chunk):
        parts = []
        for start in range(0, ids.shape[1], chunk):
            stop = start + chunk
            parts.append(model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache).logits)
        return torch.cat(parts, dim=1)

    @pytest.mark.parametrize("name", ["llama", "qwen2", "mistral, window 6"])
    @pytest.mark.parametrize("chunk", [1, 4, 30])
    @pytest.mark.parametrize("padded", [False, True])
    @torch.no_grad()
    def test_logits_are_those_of_transformers_own_attention(self, name, chunk, padded):
        model, ids = hf_model(name), prompt(2, 30)
        mask = torch.ones_like(ids)
        mask[1, : 7 if padded else 0] = 0
        expected = self.logits(model, DynamicCache(config=model.config), ids, mask, chunk)
        got = self.logits(model, wrap(Cache.growing(LAYERS), model), ids, mask, chunk)
        real = mask.bool()
        # Bounded: float32, three layers of wide weights, sums of at most 80 terms in another order.
        torch.testing.assert_close(got[real], expected[real], rtol=0, atol=1e-4)

    @pytest.mark.parametrize("mode", ["greedy", "sampling", "beams"])
    def test_a_quantized_cache_read_packed_makes_the_tokens_that_its_numbers_make(self, mode):
        def cache():
            return Cache.quantized(LAYERS, 4, group_size=8, residual_length=3)

        ids = prompt(2, 40)
        expected = generate(hf_model("llama"), ids, wrap(cache()), **MODES[mode])
        packed, model = cache(), hf_model("llama")
        assert torch.equal(generate(model, ids, wrap(packed, model), **MODES[mode]), expected)
        assert packed[0].packed_len == 48  # of the 51 tokens held, whole groups of 8 that leave 3

    @torch.no_grad()
    def test_a_model_that_attends_otherwise_shows_it_cannot_read_the_cache(self):
        model, other = hf_model("llama"), hf_model("llama")
        with pytest.raises(CannotHold, match=r"wrap\(cache, model\) with this model"):
            other(prompt(), past_key_values=wrap(Cache.growing(LAYERS), model))

    @torch.no_grad()
    def test_sinks_of_a_padded_batch_are_refused_and_the_next_batch_is_taken(self):
        model, ids = hf_model("llama"), prompt(2, 30)
        mask = torch.ones_like(ids)
        mask[1, :7] = 0
        cache = wrap(Cache.quantized(LAYERS, 4, group_size=8, residual_length=3, sink_length=4), model)
        with pytest.raises(ValueError, match="take sink_length=0"):
            model(ids, attention_mask=mask, past_key_values=cache)
        cache.reset()
        model(ids, attention_mask=torch.ones_like(ids), past_key_values=cache)
        assert cache.get_seq_length() == 30

    @torch.no_grad()
    def test_sinks_with_a_window_need_no_padding(self):
        model, ids = hf_model("mistral, window 6"), prompt(1, 30)
        cache = wrap(Cache.quantized(LAYERS, 8, group_size=8, residual_length=3, sink_length=4), model)
        model(ids, past_key_values=cache)
        logits = model(prompt(1, 1), past_key_values=cache).logits
        expected = model(prompt(1, 1), past_key_values=self.after(model, ids)).logits
        assert (logits - expected).abs().max() < 0.1 * expected.abs().max()  # lossy: 8 bits

    def after(self, model, ids):
        """transformers' own cache after `ids`."""
        own = DynamicCache(config=model.config)
        model(ids, past_key_values=own)
        return own

    @torch.no_grad()
    def test_what_was_said_to_the_layers_stays(self):
        model, ids = hf_model("mistral, window 6"), prompt(2, 30)
        mask = torch.ones_like(ids)
        mask[1, :7] = 0
        source = Cache.growing(LAYERS, window=3)
        model(ids, attention_mask=mask, past_key_values=wrap(source, model))
        assert [layer.constants for layer in source] == [Constants(window=3)] * LAYERS
        assert source.padding == (0, 7)

    @torch.no_grad()
    def test_a_copy_goes_its_own_way(self):
        model = hf_model("llama")
        cache = wrap(Cache.growing(LAYERS), model)
        model(prompt(), past_key_values=cache)
        other = copy.deepcopy(cache)
        logits = [model(prompt(1, 2), past_key_values=past).logits for past in (cache, other)]
        assert torch.equal(*logits)  # exact
        cache.crop(-5)
        assert (cache.get_seq_length(), other.get_seq_length(), other.source.seq_len) == (6, 11, 11)

    def test_assisted_decoding_makes_the_tokens_of_greedy_decoding(self):
        model, assistant = hf_model("mistral, window 6"), hf_model("mistral, window 6")
        expected = generate(model, prompt(), DynamicCache(config=model.config))
        got = generate(model, prompt(), wrap(Cache.growing(LAYERS), model), assistant_model=assistant)
        assert torch.equal(got, expected)


class TestOtherCaches:
    """A model that was wrapped computes with any other cache, and with none, what it computed before."""

    @pytest.mark.parametrize("kind", ["gemma2", "gpt_oss", "llama", "mistral", "gpt2", "bloom", "diffllama"])
    @pytest.mark.parametrize("before", ["sdpa", "eager"])
    @torch.no_grad()
    def test_nothing_changes(self, kind, before):
        plain, wrapped = tiny_model(kind), tiny_model(kind)
        if kind not in ("bloom", "gpt_oss", "gemma2"):  # these have but one attention
            plain.set_attn_implementation(before)
            wrapped.set_attn_implementation(before)
        layers = wrapped.config.num_hidden_layers
        for _ in range(2):
            try:
                wrap(Cache.growing(layers), wrapped)
            except ValueError:
                assert wrapped.config._attn_implementation == plain.config._attn_implementation
        ids = prompt(2).clamp(max=59)
        mask = torch.ones_like(ids)
        mask[1, :3] = 0
        for options in ({}, {"attention_mask": mask}, {"use_cache": False}):
            assert torch.equal(plain(ids, **options).logits, wrapped(ids, **options).logits)  # exact

    def test_the_name_says_what_was_there_before_and_is_taken_once(self):
        model = hf_model("llama")
        model.set_attn_implementation("eager")
        for _ in range(2):
            wrap(Cache.growing(LAYERS), model)
            assert model.config._attn_implementation == "labkit+eager"
        model.set_attn_implementation("sdpa")
        wrap(Cache.growing(LAYERS), model)
        assert model.config._attn_implementation == "labkit+sdpa"

    def test_the_vision_tower_of_a_model_keeps_its_own(self):
        model = tiny_model("llava")
        before = model.config.vision_config._attn_implementation
        wrap(Cache.growing(model.config.text_config.num_hidden_layers), model)
        assert model.config.text_config._attn_implementation == "labkit+sdpa"
        assert (model.config._attn_implementation, model.config.vision_config._attn_implementation) == (before, before)

    @torch.no_grad()
    def test_numbers_drawn_afterwards_are_those_that_would_have_been(self):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_dropout=0.5)).train()
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        wrap(Cache.growing(LAYERS), model)
        assert torch.equal(torch.rand(4), expected)  # exact


class TestStandIn:
    def stand_in(self):
        layer = wrap(Cache.growing(1), hf_model_of_one_layer()).wrapped[0]
        return layer.update(torch.ones(2, 3, 4, 8), torch.ones(2, 3, 4, 8))[0]

    def test_answers_for_shape_dtype_and_device(self):
        it = self.stand_in()
        assert (it.shape, it.size(), it.size(2), it.dim(), it.ndim) == ((2, 3, 4, 8), (2, 3, 4, 8), 4, 4, 4)
        assert (it.dtype, it.device) == (torch.float32, torch.device("cpu"))

    @pytest.mark.parametrize(
        "use",
        [
            lambda it: it + 1,
            lambda it: 1 - it,
            lambda it: torch.ones(2, 3, 4, 8) * it,
            lambda it: it @ it,
            lambda it: it[:, :1],
            lambda it: it == 0,
            lambda it: it < 0,
            lambda it: bool(it),
            lambda it: list(it),
            lambda it: len(it),
            lambda it: it.T,
            lambda it: it.transpose(1, 2),
            lambda it: it.to(torch.float64),
            lambda it: it.data,
            lambda it: torch.cat((torch.ones(2, 3, 4, 8), it)),
            lambda it: torch.repeat_interleave(it, 2, dim=1),
            lambda it: nn.functional.scaled_dot_product_attention(torch.ones(2, 3, 4, 8), it, it),
            lambda it: nn.functional.softmax(it, dim=-1),
        ],
    )
    def test_raises_whatever_else_is_asked(self, use):
        with pytest.raises(CannotHold, match="between the cache and its attention"):
            use(self.stand_in())


def hf_model_of_one_layer():
    return LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": 1})).eval()


class TestRefusedCalls:
    """What the attention function is told that no labkit layer knows."""

    def call(self, module=None, tokens=1, value=None, original="sdpa", **told):
        layer = wrap(Cache.growing(1), hf_model_of_one_layer()).wrapped[0]
        k, v = layer.update(torch.ones(2, 3, tokens, 8), torch.ones(2, 3, tokens, 8))
        q = torch.ones(2, 6, tokens, 8)
        return labkit_attention(
            module or nn.Module(), q, k, v if value is None else value, None, original=original, scaling=1.0, **told
        )[0]

    def test_nothing_special_is_answered(self):
        assert self.call(position_ids=torch.zeros(1), use_cache=True, s_aux=None).shape == (2, 1, 6, 8)

    @pytest.mark.parametrize("name", ["s_aux", "sinks", "position_bias", "indices", "head_mask", "cu_seq_lens_q"])
    def test_a_keyword_that_may_decide_something(self, name):
        with pytest.raises(CannotHold, match=name):
            self.call(**{name: torch.ones(1)})

    def test_attention_weights_wanted(self):
        with pytest.raises(CannotHold, match="no attention weights"):
            self.call(output_attentions=True)

    def test_dropout(self):
        with pytest.raises(CannotHold, match=r"model\.eval\(\)"):
            self.call(dropout=0.1)

    @pytest.mark.parametrize("where", ["keyword", "module", "config"])
    def test_attention_that_is_not_causal(self, where):
        module = nn.Module()
        owner = module
        if where == "config":
            owner = module.config = LlamaConfig(**SHAPE)
        if where != "keyword":
            owner.is_causal = False
        with pytest.raises(CannotHold, match="does not attend causally"):
            self.call(module, **({"is_causal": False} if where == "keyword" else {}))

    def test_no_mask_where_eager_attention_would_see_the_future(self):
        with pytest.raises(CannotHold, match="does not hide the future"):
            self.call(tokens=2, original="eager")

    def test_one_of_k_and_v_that_is_not_the_caches(self):
        with pytest.raises(CannotHold, match="only one of"):
            self.call(value=torch.ones(2, 3, 1, 8))

    def test_k_and_v_of_two_layers(self):
        other = StandIn("V", torch.ones(2, 3, 1, 8), 1, wrap(Cache.growing(1)).wrapped[0])
        with pytest.raises(CannotHold, match="not one layer's"):
            self.call(value=other)


@torch.no_grad()
def test_a_compiled_model_attends_through_the_cache():
    model, plain = hf_model("llama"), hf_model("llama")
    cache, own = wrap(Cache.growing(LAYERS), model), DynamicCache()
    compiled = torch.compile(model, backend="eager")
    for tokens in (5, 1):
        got = compiled(prompt(2, tokens), past_key_values=cache).logits
        # Bounded: float32, three layers of wide weights, sums of at most 80 terms in another order.
        torch.testing.assert_close(got, plain(prompt(2, tokens), past_key_values=own).logits, rtol=0, atol=1e-4)
