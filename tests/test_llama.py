"""The decoder against Hugging Face's, whole, in chunks, token by token, with padding; and what a failed pass leaves."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from labkit.cache import Cache
from labkit.llama import Llama, rope_frequencies
from labkit.specs import decoder_spec
from tests.tiny import VOCAB, hf_model

BAR = 1e-4  # bounded: what the project promises for float32 logits
PADDING = [0, 3, 7, 1]
TOKENS = 19
NAMES = [
    "llama",
    "llama, tied head",
    "llama, wide heads",
    "llama, llama3 rope",
    "llama, linear rope",
    "mistral, window 6",
    "mistral, no window",
    "qwen2",
    "qwen2, window 6",
]
CUTS = {"one pass": [], "odd chunks": [1, 6, 7, 16], "token by token": list(range(1, TOKENS))}


def ours(model) -> Llama:
    spec = decoder_spec(model.config.to_dict())
    return Llama(spec).load(model.state_dict())


@pytest.fixture(scope="module")
def pairs():
    made = {}

    def pair(name):
        if name not in made:
            theirs = hf_model(name)
            made[name] = theirs, ours(theirs)
        return made[name]

    return pair


def prompt(batch, tokens=TOKENS, vocab=VOCAB, seed=3):
    return torch.randint(2, vocab, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def padding_of(batch):
    return torch.tensor(PADDING[:batch]) if batch > 1 else None


def hf_logits(model, tokens, padding):
    """Logits of one pass of transformers' model; rows are padded on the left."""
    padding = torch.zeros(len(tokens), dtype=torch.long) if padding is None else padding
    real = torch.arange(tokens.shape[1])[None, :] >= padding[:, None]
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(tokens, attention_mask=real.long(), position_ids=positions).logits


def run(model, tokens, padding, cuts, cache):
    """Logits of all tokens, run in pieces."""
    edges = [0, *cuts, tokens.shape[1]]
    parts = [
        model(tokens[:, start:end], cache, padding=padding if start == 0 else None) for start, end in pairwise(edges)
    ]
    return torch.cat(parts, dim=1)


def distance(got, expected, padding):
    """The largest difference over real tokens; a padding token's logits mean nothing."""
    if padding is None:
        return (got - expected).abs().max().item()
    return max((got[i, left:] - expected[i, left:]).abs().max().item() for i, left in enumerate(padding.tolist()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 4])
def test_logits_are_those_of_transformers(pairs, name, batch):
    theirs, model = pairs(name)
    tokens, padding = prompt(batch), padding_of(batch)
    expected = hf_logits(theirs, tokens, padding)
    assert expected.std() > 0.5  # the bar is measured against logits of some size
    assert distance(model(tokens, padding=padding), expected, padding) < BAR
    for how, cuts in CUTS.items():
        for cache in (model.cache(), model.cache(capacity=TOKENS)):
            got = run(model, tokens, padding, cuts, cache)
            assert distance(got, expected, padding) < BAR, how
            assert cache.seq_len == TOKENS


@pytest.mark.parametrize("name", ["mistral, window 6", "qwen2, window 6"])
def test_the_window_changes_the_logits_so_the_test_above_can_fail(pairs, name):
    theirs, model = pairs(name)
    tokens, without = prompt(1), Llama(replace(model.spec, window=None)).load(theirs.state_dict())
    assert distance(without(tokens)[:, :6], model(tokens)[:, :6], None) < BAR  # within the window: the same
    assert distance(without(tokens)[:, 6:], model(tokens)[:, 6:], None) > 100 * BAR


@pytest.mark.parametrize("name", ["llama", "mistral, window 6", "qwen2"])
def test_last_only_is_the_last_row(pairs, name):
    _, model = pairs(name)
    tokens, padding = prompt(4), padding_of(4)
    last = model(tokens, padding=padding, last_only=True)
    assert last.shape == (4, 1, VOCAB)
    assert distance(last, model(tokens, padding=padding)[:, -1:], None) < BAR  # bounded: a product of fewer rows


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("how", ["one pass", "odd chunks"])
def test_logits_of_the_lab_model_are_those_of_transformers(lab_pair, batch, how):
    theirs, model, exact = lab_pair
    tokens, padding = prompt(batch, vocab=model.spec.vocab_size), padding_of(batch)
    got = run(model, tokens, padding, CUTS[how], model.cache(TOKENS))
    assert_as_near(got, hf_logits(theirs, tokens, padding), hf_logits(exact, tokens, padding), padding)


def test_the_lab_model_decodes_token_by_token_as_in_one_pass(lab_pair):
    theirs, model, exact = lab_pair
    tokens = prompt(1, tokens=8, vocab=model.spec.vocab_size)
    expected, true = hf_logits(theirs, tokens, None), hf_logits(exact, tokens, None)
    assert_as_near(run(model, tokens, None, range(1, 8), model.cache()), expected, true, None)
    assert_as_near(model(tokens), expected, true, None)


def assert_as_near(got, expected, exact, padding):
    """Bounded by what float32 costs transformers itself, twice: 30 layers in another order of sums end elsewhere.

    The rounding alone is 1.1e-4 of logits that spread by 6, on both sides, and differs with the number of threads.
    """
    rounding = distance(expected, exact, padding)
    assert rounding < 1e-3 * exact.std()  # so that the bound below is one
    assert distance(got, exact, padding) < max(BAR, 2 * rounding)


@pytest.fixture(scope="module")
def lab_pair(lab_model):
    load = AutoModelForCausalLM.from_pretrained
    theirs, exact = (load(lab_model, dtype=dtype).eval() for dtype in (torch.float32, torch.float64))
    return theirs, ours(theirs), exact


class TestWithACache:
    @pytest.fixture
    def model(self, pairs):
        return pairs("mistral, window 6")[1]

    def test_a_cache_with_another_window_is_an_error(self, model):
        with pytest.raises(
            ValueError, match=r"made with window=None, the model attends with window=6: .*model.cache\(\)"
        ):
            model(prompt(1), Cache.growing(3))

    def test_a_cache_of_another_depth_is_an_error(self, model):
        with pytest.raises(ValueError, match="the cache has 2 layers, the model 3"):
            model(prompt(1), Cache.growing(2, window=6))

    def test_padding_after_the_first_tokens_is_an_error(self, model):
        cache = model.cache()
        model(prompt(2), cache)
        with pytest.raises(ValueError, match="padding is said once per batch"):
            model(prompt(2), cache, padding=torch.tensor([0, 1]))
        assert cache.seq_len == TOKENS

    def test_a_pass_that_does_not_fit_leaves_the_cache_as_it_was(self, model):
        cache = model.cache(capacity=TOKENS)
        with pytest.raises(ValueError, match="more do not fit"):
            model(prompt(2, tokens=TOKENS + 1), cache, padding=torch.tensor([0, 9]))
        assert (cache.seq_len, cache.padding, cache.nbytes) == (0, (), 0)
        again = model(prompt(2), cache)
        assert torch.equal(again, model(prompt(2), model.cache(capacity=TOKENS)))  # exact

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_an_interrupt_in_the_middle_of_a_pass_leaves_the_cache_as_it_was(self, model, error, monkeypatch):
        cache, tokens = model.cache(), prompt(2)
        model(tokens[:, :10], cache)
        held = [layer.held()[0].clone() for layer in cache.layers]

        def interrupt(*_):
            raise error

        monkeypatch.setattr(model.blocks[1].mlp, "forward", interrupt)
        with pytest.raises(error):
            model(tokens[:, 10:], cache)
        monkeypatch.undo()
        assert cache.seq_len == 10
        assert all(torch.equal(layer.held()[0], keys) for layer, keys in zip(cache.layers, held, strict=True))  # exact
        whole = model(tokens)
        assert distance(model(tokens[:, 10:], cache), whole[:, 10:], None) < BAR

    def test_a_truncated_conversation_goes_on_as_if_the_rest_was_never_said(self, model):
        cache, tokens = model.cache(capacity=64), prompt(2)
        model(torch.cat((tokens[:, :10], prompt(2, seed=8)), dim=1), cache)
        cache.truncate(10)
        assert distance(model(tokens[:, 10:], cache), model(tokens)[:, 10:], None) < BAR

    def test_a_cache_filled_in_inference_mode_goes_on_outside(self, model):
        tokens = prompt(2)
        for cache in (model.cache(), model.cache(capacity=TOKENS)):
            with torch.inference_mode():
                model(tokens[:, :10], cache)
            assert distance(model(tokens[:, 10:], cache), model(tokens)[:, 10:], None) < BAR

    def test_bytes_are_what_the_shape_says(self, model):
        cache = model.cache(capacity=32)
        model(prompt(4), cache)
        assert cache.nbytes == 2 * 3 * 4 * 2 * 32 * 8 * 4  # K and V, layers, batch, KV heads, tokens, head_dim, bytes


class TestRowsOfAnyLength:
    """Rows without padding, chunks and single tokens in one step, against each row alone."""

    @pytest.mark.parametrize("name", ["llama", "mistral, window 6", "qwen2"])
    @pytest.mark.parametrize("cached", ["growing", "preallocated", "paged", "none"])
    def test_each_row_has_the_logits_it_has_alone(self, pairs, name, cached):
        _, model = pairs(name)
        lengths = [[3, 11, 1, 7], [1, 1, 1, 1], [4, 0, 1, 1], [0, 1, 0, 5], [1, 1, 1, 1]]
        paged = Cache.paged(3, 30, 5, window=model.spec.window)
        cache = {"growing": model.cache(), "preallocated": model.cache(64), "paged": paged, "none": None}[cached]
        rows = [prompt(1, tokens=20, seed=row)[0] for row in range(4)]
        alone = [model(row[None])[0] for row in rows]
        at = [0] * 4
        for counts in lengths:
            start = at if cache is not None else [0] * 4
            at = [a + n for a, n in zip(at, counts, strict=True)]
            got = model([row[a:b] for row, a, b in zip(rows, start, at, strict=True)], cache)
            assert [len(logits) for logits in got] == [b - a for a, b in zip(start, at, strict=True)]
            for mine, other, a, b in zip(got, alone, start, at, strict=True):
                assert b == a or distance(mine, other[a:b], None) < BAR
        if cache is not None:
            assert cache.lengths == tuple(at)

    def test_last_only_gives_the_rows_that_got_tokens(self, pairs):
        _, model = pairs("llama")
        rows = [prompt(1, tokens=n, seed=n)[0] for n in (4, 9)]
        last = model([rows[0], rows[0][:0], rows[1]], last_only=True)
        assert last.shape == (2, 1, VOCAB)
        for mine, row in zip(last, rows, strict=True):
            assert distance(mine, model(row[None])[0, -1:], None) < BAR

    def test_no_product_runs_over_anything_but_tokens(self, pairs):
        _, model = pairs("llama")
        seen = []
        model.blocks[0].mlp.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[:2].numel()))
        model([prompt(1, tokens=n)[0] for n in (3, 12, 1)], model.cache())
        model.blocks[0].mlp._forward_hooks.clear()
        assert seen == [16]

    def test_a_padded_rectangle_goes_on_in_rows(self, pairs):
        _, model = pairs("llama")
        tokens, cache = prompt(2, tokens=9), model.cache()
        model(tokens, cache, padding=[0, 4])
        new = [prompt(1, tokens=n, seed=5 + n)[0] for n in (3, 1)]
        got = model(new, cache)
        for row, left in enumerate((0, 4)):
            alone = model(torch.cat((tokens[row, left:], new[row]))[None])[0]
            assert distance(got[row], alone[-len(new[row]) :], None) < BAR

    @pytest.mark.parametrize(
        ("rows", "padding", "message"),
        [
            ([], None, "rows of tokens are int"),
            ([torch.zeros(1, 2, dtype=torch.long)], None, "rows of tokens are int"),
            ([torch.zeros(0, dtype=torch.long)], None, "every row is empty"),
            ([torch.tensor([0.5])], None, "rows of tokens are int"),
            ([torch.tensor([1]), torch.tensor([1, 2])], [0, 1], "need no padding"),
        ],
    )
    def test_rows_that_cannot_be(self, pairs, rows, padding, message):
        with pytest.raises(ValueError, match=message):
            pairs("llama")[1](rows, padding=padding)

    def test_a_cache_of_another_batch_is_refused_and_untouched(self, pairs):
        _, model = pairs("llama")
        cache = model.cache()
        model(prompt(2), cache)
        with pytest.raises(ValueError, match="holds batch 2; the new tokens have batch 3"):
            model(prompt(3), cache)
        assert cache.lengths == (TOKENS, TOKENS)


def test_an_error_in_the_head_takes_the_tokens_back(pairs, monkeypatch):
    _, model = pairs("llama")
    cache, tokens = model.cache(), prompt(2)

    def out_of_memory(x):
        raise MemoryError

    monkeypatch.setattr(model.norm, "forward", out_of_memory)
    with pytest.raises(MemoryError):
        model(tokens, cache)
    monkeypatch.undo()
    assert (cache.seq_len, cache.nbytes) == (0, 0)
    assert torch.equal(model(tokens, cache), model(tokens, model.cache()))  # exact


@pytest.mark.parametrize("keep", [0, 2, 5])
def test_what_a_truncated_padded_cache_goes_on_with_is_no_padding(pairs, keep):
    _, model = pairs("llama")
    tokens, cache = prompt(2, tokens=9), model.cache()
    model(tokens, cache, padding=[0, 3])
    cache.truncate(keep)
    got = model(tokens, cache)
    for row, left in enumerate((0, min(3, keep))):
        alone = model(torch.cat((tokens[row, left:keep], tokens[row]))[None])[0]
        assert distance(got[row], alone[-9:], None) < BAR


class TestErrors:
    @pytest.fixture
    def model(self, pairs):
        return pairs("llama")[1]

    @pytest.mark.parametrize("ids", [[[1, VOCAB]], [[-1, 2]]])
    def test_ids_that_the_vocabulary_has_not(self, model, ids):
        cache = model.cache()
        with pytest.raises(ValueError, match=f"ids from 0 to {VOCAB - 1}"):
            model(torch.tensor(ids), cache)
        assert cache.seq_len == 0

    @pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.complex64])
    def test_tokens_that_are_no_ids(self, model, dtype):
        with pytest.raises(ValueError, match="tokens are int"):
            model(torch.ones(1, 3, dtype=dtype))

    @pytest.mark.parametrize("padding", [torch.tensor(1), torch.zeros(2, 2, dtype=torch.long)])
    def test_padding_of_another_shape(self, model, padding):
        with pytest.raises(ValueError, match="one number per row"):
            model(prompt(2), padding=padding)

    def test_more_padding_than_tokens(self, model):
        with pytest.raises(ValueError, match="is more than the 17 there are"):
            model(prompt(2, tokens=17), padding=[0, 18])

    @pytest.mark.parametrize("tokens", [torch.tensor([1, 2]), torch.zeros(1, 0, dtype=torch.long)])
    def test_tokens_without_a_batch_or_without_any(self, model, tokens):
        with pytest.raises(ValueError, match="at least one token"):
            model(tokens)

    @pytest.mark.parametrize("cached", [False, True])
    def test_padding_for_another_batch(self, model, cached):
        with pytest.raises(ValueError, match="one number per row"):
            model(prompt(2), model.cache() if cached else None, padding=torch.tensor([1]))

    def test_negative_padding(self, model):
        with pytest.raises(ValueError, match="0 or more"):
            model(prompt(2), padding=torch.tensor([0, -1]))

    def test_weights_that_miss_one(self, pairs):
        theirs, model = pairs("llama")
        weights = {name: w for name, w in theirs.state_dict().items() if "1.self_attn.k_proj" not in name}
        with pytest.raises(ValueError, match=r"no model.layers.1.self_attn.k_proj.weight"):
            Llama(model.spec).load(weights)

    def test_weights_of_another_shape(self, pairs):
        theirs, model = pairs("llama")
        weights = {**theirs.state_dict(), "model.norm.weight": torch.ones(3)}
        with pytest.raises(ValueError, match=r"norm.weight is \[48\] here, \[3\]"):
            Llama(model.spec).load(weights)

    def test_weights_that_this_model_has_no_place_for(self, pairs):
        biased, (_, model) = pairs("qwen2")[0].state_dict(), pairs("llama")
        with pytest.raises(ValueError, match=r"no place for model.layers.0.self_attn.k_proj.bias"):
            Llama(model.spec).load(biased)


def test_positions_of_a_padded_row_start_at_its_first_real_token(pairs):
    # Logits cannot tell: rotary scores depend on distances only. The keys can.
    _, model = pairs("llama")
    tokens, padding = prompt(4), padding_of(4)
    together = model.cache()
    model(tokens, together, padding=padding)
    for row, left in enumerate(PADDING):
        alone = model.cache()
        model(tokens[row : row + 1, left:], alone)
        keys = [cache[0].held()[0] for cache in (together, alone)]
        assert distance(keys[0][row, :, left:], keys[1][0], None) < BAR


def test_a_row_that_is_all_padding_gives_numbers_and_disturbs_no_other(pairs):
    _, model = pairs("llama")
    tokens = prompt(2)
    logits = model(tokens, padding=torch.tensor([TOKENS, 0]))
    assert logits.isfinite().all()
    assert distance(logits[1:], model(tokens[1:]), None) < BAR


def test_rotary_angles_stay_float32_in_a_bfloat16_model(pairs):
    _, model = pairs("llama")
    narrow = Llama(model.spec).to(torch.bfloat16)
    assert narrow.frequencies.dtype == torch.float32
    cos, _ = narrow.angles(torch.tensor([[200]]))
    exact, _ = model.angles(torch.tensor([[200]]))
    assert cos.dtype == torch.bfloat16
    # Bounded: one rounding to bfloat16, of a number that is at most 1.
    torch.testing.assert_close(cos.float(), exact, rtol=0, atol=torch.finfo(torch.bfloat16).eps / 2)


def test_a_model_built_without_memory_has_its_rotary_frequencies(pairs):
    spec = pairs("llama, llama3 rope")[1].spec
    with torch.device("meta"):
        model = Llama(spec)
    assert torch.equal(model.frequencies, rope_frequencies(spec))  # exact
    assert model.frequencies.device.type == "cpu"
