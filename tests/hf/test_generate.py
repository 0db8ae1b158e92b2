"""labkit caches inside transformers: the same tokens as with transformers' own cache, exactly."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, EncoderDecoderCache

from labkit.cache import Cache
from labkit.hf import wrap
from labkit.llama import Llama
from labkit.specs import decoder_spec
from tests.tiny import VOCAB, hf_model

LAYERS, NEW = 3, 12
KINDS = {
    "growing": Cache.growing,
    "preallocated": lambda layers: Cache.preallocated(layers, 64),
    "paged": lambda layers: Cache.paged(layers, 200, 4),
}
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

    def test_padding_said_to_the_labkit_cache_afterwards(self, llama):
        cache = wrap(Cache.growing(LAYERS))
        cache.source.padding = (1,)
        with pytest.raises(ValueError, match="this cache holds padding"):
            llama(prompt(), past_key_values=cache)

    def test_padding_said_to_the_labkit_cache(self):
        cache = Cache.growing(LAYERS)
        cache.padding = (1,)
        with pytest.raises(ValueError, match="this cache holds padding"):
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


@pytest.mark.parametrize("through", [False, True], ids=["read back", "attended through"])
class TestAnInterruptedPass:
    @torch.no_grad()
    def interrupted(self, model, through):
        """A cache whose last pass, of two tokens, ended in the middle of the second layer."""
        cache = wrap(Cache.growing(LAYERS), *([model] if through else []))
        model(prompt(2), past_key_values=cache)

        def interrupt(*args):
            raise KeyboardInterrupt

        hook = model.model.layers[1].mlp.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(prompt(2, 2), past_key_values=cache)
        hook.remove()
        return cache

    @torch.no_grad()
    def test_does_not_go_on(self, through):
        model = hf_model("llama")
        cache = self.interrupted(model, through)
        with pytest.raises(ValueError, match=r"between 9 and 11 tokens.*truncate\(9\)"):
            model(prompt(2, 1), past_key_values=cache)
        assert [layer.seq_len for layer in cache.source] == [11, 11, 9]  # the refusal changed nothing

    @torch.no_grad()
    def test_goes_on_after_it_was_cut_back(self, through):
        model = hf_model("llama")
        cache, whole = self.interrupted(model, through), wrap(Cache.growing(LAYERS), *([model] if through else []))
        cache.source.truncate(9)
        model(prompt(2), past_key_values=whole)
        logits = [model(prompt(2, 2), past_key_values=past).logits for past in (cache, whole)]
        assert torch.equal(*logits)  # exact

    @torch.no_grad()
    def test_of_the_first_layer_alone_leaves_nothing_behind(self, through):
        model = hf_model("llama")
        cache = wrap(Cache.preallocated(LAYERS, 10), *([model] if through else []))
        model(prompt(2), past_key_values=cache)
        with pytest.raises(ValueError, match="room for 10 tokens"):
            model(prompt(2, 2), past_key_values=cache)
        assert cache.source.seq_len == 9
        model(prompt(2, 1), past_key_values=cache)


@torch.no_grad()
def test_layers_that_the_model_never_updates_may_be_there_at_the_end():
    model = hf_model("llama")
    cache, spare = wrap(Cache.growing(LAYERS)), wrap(Cache.growing(LAYERS + 2))
    for tokens in (9, 1, 3):
        assert torch.equal(*(model(prompt(2, tokens), past_key_values=past).logits for past in (cache, spare)))  # exact


ENCODER_DECODER = {
    "vocab_size": VOCAB, "d_model": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "decoder_start_token_id": 1, "forced_eos_token_id": None, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
}  # fmt: skip


class TestAnEncoderDecoder:
    def model(self, name):
        torch.manual_seed(0)
        config = {
            "bart": lambda: transformers.BartConfig(**ENCODER_DECODER),
            "t5": lambda: transformers.T5Config(**ENCODER_DECODER, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
        }[name]()
        model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.2)
        return model

    @pytest.mark.parametrize("name", ["bart", "t5"])
    @pytest.mark.parametrize("mode", ["greedy", "beams"])
    def test_makes_the_same_tokens_with_two_labkit_caches(self, name, mode):
        model = self.model(name)
        ours = EncoderDecoderCache(wrap(Cache.growing(2)), wrap(Cache.growing(2)))
        theirs = EncoderDecoderCache(DynamicCache(), DynamicCache())
        got, expected = (generate(model, prompt(2), past, **MODES[mode]) for past in (ours, theirs))
        assert torch.equal(got, expected)  # exact

    def test_cannot_attend_through_one(self):
        with pytest.raises(ValueError, match=r"EncoderDecoderCache\(wrap\(one\), wrap\(another\)\)"):
            wrap(Cache.growing(2), self.model("bart"))


@pytest.mark.parametrize("through", [False, True], ids=["read back", "attended through"])
class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @torch.no_grad()
    def test_logits_are_those_of_the_dynamic_cache(self, through, dtype):
        model, theirs = hf_model("llama"), DynamicCache()
        ours = wrap(Cache.growing(LAYERS), *([model] if through else []))
        with torch.autocast("cpu", dtype=dtype):
            for tokens in (9, 1):
                got, expected = (model(prompt(2, tokens), past_key_values=past).logits for past in (ours, theirs))
                # Bounded: an entry or two of attention rounded to the other side, then three layers of wide weights.
                apart = 16 * torch.finfo(dtype).eps * expected.abs().max().item()
                torch.testing.assert_close(got, expected, rtol=0, atol=apart)
        assert ours.source[0].held()[0].dtype == dtype  # RoPE makes float32 keys, which attention would round

    @torch.no_grad()
    def test_a_quantized_cache_takes_it(self, through):
        model = hf_model("llama")
        cache = wrap(Cache.quantized(LAYERS, 8, group_size=8), *([model] if through else []))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(prompt(2), past_key_values=cache)
            assert model(prompt(2, 1), past_key_values=cache).logits.isfinite().all()


class TestFromOneSideToTheOther:
    """A padded batch that one side read, and the other goes on with."""

    IDS = torch.cat((prompt(2), prompt(2)), dim=1)
    LEFT = 3

    def mask(self, length: int) -> torch.Tensor:
        mask = torch.ones(2, length, dtype=torch.long)
        mask[1, : self.LEFT] = 0
        return mask

    def told(self, start: int, stop: int) -> dict:
        """The mask of tokens up to `stop`, and positions from `start` on that count from 0 behind the padding."""
        mask = self.mask(stop)
        return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, start:]}

    @torch.no_grad()
    def test_labkits_decoder_goes_on_with_the_padding_that_a_mask_said(self, llama):
        ours, half = Llama(decoder_spec(llama.config.to_dict())).load(llama.state_dict()), self.IDS.shape[1] // 2
        cache = Cache.growing(LAYERS)
        llama(self.IDS[:, :half], **self.told(0, half), past_key_values=wrap(cache, llama))
        assert cache.padding == (0, self.LEFT)
        got = ours(self.IDS[:, half:], cache)
        expected = ours(self.IDS, padding=[0, self.LEFT])[:, half:]
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)  # bounded: float32, three layers of wide weights

    @torch.no_grad()
    def test_transformers_goes_on_with_the_padding_that_labkit_was_told(self, llama):
        ours, half = Llama(decoder_spec(llama.config.to_dict())).load(llama.state_dict()), self.IDS.shape[1] // 2
        cache, whole = Cache.growing(LAYERS), self.told(half, self.IDS.shape[1])
        ours(self.IDS[:, :half], cache, padding=[0, self.LEFT])
        got = llama(self.IDS[:, half:], **whole, past_key_values=wrap(cache, llama)).logits
        expected = ours(self.IDS, padding=[0, self.LEFT])[:, half:]
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)  # bounded: as above
        with pytest.raises(ValueError, match="shows tokens that it hid as padding"):
            llama(prompt(2), past_key_values=wrap(cache, llama), attention_mask=None)

    @torch.no_grad()
    def test_a_batch_whose_masks_nobody_saw_is_refused_until_its_padding_is_said(self, llama):
        ours, half = Llama(decoder_spec(llama.config.to_dict())).load(llama.state_dict()), self.IDS.shape[1] // 2
        cache = Cache.growing(LAYERS)
        llama(self.IDS[:, :half], **self.told(0, half), past_key_values=wrap(cache))
        with pytest.raises(ValueError, match="did not say which tokens are padding"):
            ours(self.IDS[:, half:], cache)
        cache.padding, cache.knows_padding = (0, self.LEFT), True
        expected = ours(self.IDS, padding=[0, self.LEFT])[:, half:]
        torch.testing.assert_close(ours(self.IDS[:, half:], cache), expected, rtol=0, atol=2e-4)  # bounded: as above

    @torch.no_grad()
    @pytest.mark.parametrize("options", [{}, {"position_ids": torch.arange(5, 14)[None]}], ids=["none", "others"])
    def test_positions_that_labkit_would_not_give_are_found_out(self, llama, options):
        ours, half = Llama(decoder_spec(llama.config.to_dict())).load(llama.state_dict()), self.IDS.shape[1] // 2
        cache = Cache.growing(LAYERS)
        llama(self.IDS[:, :half], attention_mask=self.mask(half), past_key_values=wrap(cache, llama), **options)
        with pytest.raises(ValueError, match="rotated keys to positions"):
            ours(self.IDS[:, half:], cache)

    @torch.no_grad()
    def test_padding_that_is_unknown_stays_so_until_nothing_is_held(self, llama):
        ours = Llama(decoder_spec(llama.config.to_dict())).load(llama.state_dict())
        cache = Cache.growing(LAYERS)
        wrapped = wrap(cache)
        llama(prompt(2), past_key_values=wrapped)
        wrapped.batch_select_indices(torch.tensor([0]))
        llama(prompt(1, 1), past_key_values=wrapped)
        with pytest.raises(ValueError, match="did not say which tokens are padding"):
            ours(prompt(1, 1), cache)
        wrapped.crop(-10)
        assert cache.seq_len == 0
        torch.testing.assert_close(ours(prompt(1), cache), ours(prompt(1)), rtol=0, atol=2e-4)  # bounded: as above

    @torch.no_grad()
    @pytest.mark.parametrize("attends", [False, True])
    def test_rows_of_different_lengths_and_layers_changed_in_part_are_refused(self, llama, attends, monkeypatch):
        ours = Llama(decoder_spec(llama.config.to_dict())).load(llama.state_dict())
        ragged, torn = ours.cache(), ours.cache()
        ours([prompt(1)[0], prompt(1, 4)[0]], ragged)
        model = llama if attends else None
        with pytest.raises(ValueError, match=r"rows of \[9, 4\] tokens"):
            llama(prompt(2, 1), past_key_values=wrap(ragged, model))
        ours(prompt(2), torn)

        def interrupt(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(torn[1], "choose_rows", interrupt)
        with pytest.raises(KeyboardInterrupt):
            torn.select_rows(torch.tensor([1, 0]))
        with pytest.raises(RuntimeError, match=r"reset\(\) starts anew"):
            llama(prompt(2, 1), past_key_values=wrap(torn, model))
