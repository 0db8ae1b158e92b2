"""labkit caches inside transformers: the same tokens as with transformers' own cache, exactly."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from labkit.cache import Cache
from labkit.hf import wrap
from labkit.llama import Llama
from labkit.specs import decoder_spec
from tests.tiny import VOCAB, hf_model

LAYERS, NEW = 3, 12
KINDS = {"growing": Cache.growing, "preallocated": lambda layers: Cache.preallocated(layers, 64)}
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "n-gram speculation, which crops": {"prompt_lookup_num_tokens": 3},
}


@pytest.fixture(scope="module", params=["llama", "qwen2", "mistral, window 6", "gpt2"])
def model(request):
    return hf_model(request.param)


@pytest.fixture(scope="module")
def llama():
    return hf_model("llama")


def prompt(batch=1, tokens=9):
    return torch.randint(2, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(1))


def generate(model, ids, cache, **options):
    torch.manual_seed(5)
    return model.generate(
        ids, past_key_values=cache, max_new_tokens=NEW, pad_token_id=0, **{"do_sample": False} | options
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_of_the_dynamic_cache(model, kind, mode):
    expected = generate(model, prompt(), DynamicCache(config=model.config), **MODES[mode])
    cache = KINDS[kind](LAYERS)
    assert torch.equal(generate(model, prompt(), wrap(cache), **MODES[mode]), expected)  # exact
    assert cache.seq_len >= 9 + NEW - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["greedy", "sampling", "beams"])
def test_tokens_of_a_left_padded_batch_are_those_of_the_dynamic_cache(model, kind, mode):
    ids, mask = prompt(3), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = mask[2, :7] = 0
    ids[mask == 0] = 0
    options = {"attention_mask": mask, **MODES[mode]}
    expected = generate(model, ids, DynamicCache(config=model.config), **options)
    assert torch.equal(generate(model, ids, wrap(KINDS[kind](LAYERS)), **options), expected)  # exact


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_turn_goes_on_from_the_first(model, kind):
    cache = wrap(KINDS[kind](LAYERS))
    first = generate(model, prompt(), cache)
    question = torch.cat((first, prompt(tokens=5)), dim=1)
    expected = generate(model, question, DynamicCache(config=model.config))
    written = cache.source[0].bytes_written
    assert torch.equal(generate(model, question, cache), expected)  # exact
    per_token = written // (9 + NEW - 1)
    assert cache.source[0].bytes_written == per_token * (9 + NEW + 5 + NEW - 1)  # nothing was appended twice


@pytest.mark.parametrize("kind", KINDS)
def test_after_reset_it_serves_another_batch(llama, kind):
    cache = wrap(KINDS[kind](LAYERS))
    generate(llama, prompt(2), cache)
    cache.reset()
    assert (cache.get_seq_length(), cache.source.nbytes, cache.source[0].bytes_written) == (0, 0, 0)
    assert torch.equal(generate(llama, prompt(3), cache), generate(llama, prompt(3), DynamicCache()))  # exact


def filled(llama, kind, batch=2):
    """A labkit cache and transformers' own, after the same prompt."""
    ours, theirs = wrap(KINDS[kind](LAYERS)), DynamicCache()
    with torch.no_grad():
        for cache in (ours, theirs):
            llama(prompt(batch), past_key_values=cache)
    return ours, theirs


def assert_same(ours, theirs):
    assert ours.get_seq_length() == theirs.get_seq_length()
    for layer, other in zip(ours.layers, theirs.layers, strict=True):
        keys, values = layer.layer.held()
        assert torch.equal(keys, other.keys)  # exact
        assert torch.equal(values, other.values)


OPERATIONS = {
    "crop": (-3,),
    "reorder_cache": (torch.tensor([1, 1]),),
    "batch_repeat_interleave": (2,),
    "batch_select_indices": (torch.tensor([1]),),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_does_what_the_dynamic_cache_does(llama, kind, name):
    ours, theirs = filled(llama, kind)
    for cache in (ours, theirs):
        getattr(cache, name)(*OPERATIONS[name])
    assert_same(ours, theirs)
    rows = theirs.layers[0].keys.shape[0]
    with torch.no_grad():
        outs = [llama(prompt(rows, 2), past_key_values=cache).logits for cache in (ours, theirs)]
    assert torch.equal(*outs)  # exact: it goes on from there


@pytest.mark.parametrize("kind", KINDS)
def test_rows_may_be_selected_by_a_mask(llama, kind):
    ours, theirs = filled(llama, kind)
    for cache in (ours, theirs):
        cache.batch_select_indices(torch.tensor([False, True]))
    assert_same(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_operations_on_an_empty_cache_do_nothing(kind):
    cache = wrap(KINDS[kind](LAYERS))
    cache.crop(-2)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([0, 0]))
    assert cache.get_seq_length() == 0
    assert cache.get_mask_sizes(4, 0) == (4, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_to_crop_may_be_a_tensor(llama, kind):
    ours, _ = filled(llama, kind)
    ours.crop(torch.tensor(-3))
    assert (ours.get_seq_length(), type(ours.get_seq_length())) == (6, int)


def test_cropping_more_than_is_held_leaves_nothing(llama):
    ours, _ = filled(llama, "growing")
    ours.crop(-100)
    assert ours.get_seq_length() == 0


def test_lengths_are_told_in_transformers_words(llama):
    growing, preallocated = filled(llama, "growing")[0], filled(llama, "preallocated")[0]
    assert (growing.get_max_length(), preallocated.get_max_length()) == (-1, 64)
    assert growing.get_seq_length() == preallocated.get_seq_length() == 9
    assert growing.get_mask_sizes(2, 0) == (11, 0)


def test_a_prompt_read_by_our_decoder_is_continued_by_theirs(llama):
    cache, tokens = Cache.growing(LAYERS), prompt(2, tokens=14)
    decoder = Llama(decoder_spec(llama.config.to_dict())).load(llama.state_dict())
    decoder(tokens[:, :9], cache)
    with torch.no_grad():
        expected = llama(tokens).logits[:, 9:]
        got = llama(tokens[:, 9:], past_key_values=wrap(cache)).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)  # bounded: two decoders' float32 logits


def test_the_lab_model_writes_the_same_text(lab_model):
    model = AutoModelForCausalLM.from_pretrained(lab_model, dtype=torch.float32).eval()
    ids = torch.tensor([[504, 3575, 282, 4649, 314]])
    expected = generate(model, ids, DynamicCache())
    for make in KINDS.values():
        assert torch.equal(generate(model, ids, wrap(make(model.config.num_hidden_layers))), expected)  # exact


class TestErrors:
    def test_more_tokens_than_the_capacity(self, llama):
        with pytest.raises(ValueError, match="the cache has room for 12 tokens and holds 12: 1 more do not fit"):
            generate(llama, prompt(), wrap(Cache.preallocated(LAYERS, 12)))

    def test_fewer_layers_than_the_model(self, llama):
        with pytest.raises(ValueError, match="the cache has 2 layers, the model has more"):
            generate(llama, prompt(), wrap(Cache.growing(2)))

    def test_padding_said_to_the_labkit_cache(self):
        cache = Cache.growing(LAYERS)
        cache.padding = (1,)
        with pytest.raises(ValueError, match="attention_mask instead of padding"):
            wrap(cache)

    def test_a_crop_to_an_absolute_length(self, llama):
        with pytest.raises(ValueError, match="minus the number of tokens"):
            filled(llama, "growing")[0].crop(3)

    def test_offloading(self, llama):
        with pytest.raises(NotImplementedError, match="cannot be offloaded"):
            filled(llama, "growing")[0].offload(0)


def test_the_installed_transformers_is_one_that_labkit_supports():
    major, minor = map(int, transformers.__version__.split(".")[:2])
    assert (5, 15) <= (major, minor) < (6, 0)


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
        assert other(prompt(), past_key_values=wrap(Cache.growing(LAYERS), model)).logits.isnan().all()

    @torch.no_grad()
    def test_the_model_still_takes_other_caches(self):
        model, plain = hf_model("llama"), hf_model("llama")
        wrap(Cache.growing(LAYERS), model)
        assert torch.equal(generate(model, prompt(), DynamicCache()), generate(plain, prompt(), DynamicCache()))

    @torch.no_grad()
    @pytest.mark.parametrize("hole", [slice(10, 14), slice(26, 30)])
    def test_a_mask_that_hides_more_than_left_padding_is_refused(self, hole):
        model, ids = hf_model("llama"), prompt(2, 30)
        mask = torch.ones_like(ids)
        mask[1, hole] = 0
        with pytest.raises(ValueError, match=r"use wrap\(cache\) without the model"):
            model(ids, attention_mask=mask, past_key_values=wrap(Cache.growing(LAYERS), model))

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
