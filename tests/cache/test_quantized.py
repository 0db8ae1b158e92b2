"""The quantized cache: any length in any pieces, attention equal to attention over what it reads back, its counters."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import models
from labkit.attention import attention
from labkit.cache import Cache, QuantizedCache
from labkit.cache.step import rectangle
from labkit.generation import generate
from labkit.hf import wrap
from labkit.ledger import ledger
from labkit.llama import Llama
from labkit.quantization import FLOAT8
from tests.attending import how
from tests.bounds import attention_bound
from tests.tiny import hf_model

KV_HEADS, HEAD_DIM = 2, 32
CODES_AND_FLOATS = [8, 4, 2, *FLOAT8]
CODES = st.sampled_from(CODES_AND_FLOATS)


def kv(batch, tokens, seed=0, dtype=torch.float32, heads=KV_HEADS, head_dim=HEAD_DIM):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, heads, tokens, head_dim, generator=generator).to(dtype).unbind()


def filled(cache: QuantizedCache, k, v, cuts, padding=None) -> QuantizedCache:
    """The cache with k and v appended in pieces whose lengths are `cuts`, over and over."""
    begin, turn = 0, 0
    while begin < k.shape[2]:
        end = min(begin + cuts[turn % len(cuts)], k.shape[2])
        step = rectangle(len(k), end - begin, cache.lengths, padding or ())
        cache.append(k[:, :, begin:end], v[:, :, begin:end], step)
        begin, turn = end, turn + 1
    return cache


def stored(cache: QuantizedCache) -> list[torch.Tensor]:
    """Every tensor the cache keeps."""
    packed = [x.rows for x in (cache.k, cache.v) if x is not None]
    return [*(cache.sinks or ()), *packed, *(cache.recent or ())]


def options(draw):
    return {
        "group_size": draw(st.sampled_from([8, 16, 32])),
        "residual_length": draw(st.integers(0, 40)),
        "key_axis": draw(st.sampled_from(["channel", "token"])),
        "symmetric": draw(st.booleans()),
        "metadata": draw(st.sampled_from([torch.float16, torch.bfloat16])),
        "rotate_keys": draw(st.booleans()),
        "sink_length": draw(st.integers(0, 5)),
    }


class TestAnyLengthInAnyPieces:
    @settings(max_examples=40, deadline=None)
    @given(data=st.data(), nbits=CODES, tokens=st.integers(1, 1000), cuts=st.lists(st.integers(1, 300), min_size=1))
    def test_the_stored_bits_are_those_of_one_append(self, data, nbits, tokens, cuts):
        k, v = kv(2, tokens)
        chosen = options(data.draw)
        pieces = filled(QuantizedCache(nbits, **chosen), k, v, cuts)
        whole = filled(QuantizedCache(nbits, **chosen), k, v, [tokens])
        assert pieces.seq_len == tokens
        assert pieces.nbytes == whole.nbytes == sum(x.nbytes for x in stored(whole))
        for mine, other in zip(stored(pieces), stored(whole), strict=True):
            assert torch.equal(mine, other)  # exact

    @pytest.mark.parametrize("cuts", [[1], [7], [32], [33, 1], [200]])
    def test_no_token_is_quantized_twice(self, cuts):
        cache, seen = QuantizedCache(4, group_size=16, residual_length=5), []
        quantize = type(cache.quantize_keys).quantize
        k, v = kv(1, 200)
        k[..., 0] = torch.arange(200.0)  # each token's name

        def noted(x):
            if cache.noting:
                seen.extend(x[0, 0, :, 0].tolist())
            cache.noting = not cache.noting  # keys, then values
            return quantize(cache.quantize_keys, x)

        cache.noting = True
        cache.quantized = lambda k, v: (noted(k), noted(v))
        filled(cache, k, v, cuts)
        assert seen == list(range(192))

    @given(tokens=st.integers(1, 120), residual=st.integers(0, 40), sinks=st.integers(0, 9))
    def test_the_newest_and_the_first_tokens_are_kept_exactly(self, tokens, residual, sinks):
        k, v = kv(1, tokens)
        cache = filled(QuantizedCache(2, group_size=16, residual_length=residual, sink_length=sinks), k, v, [13])
        held = cache.read()
        for mine, given_ in zip(held, (k, v), strict=True):
            assert torch.equal(mine[:, :, :sinks], given_[:, :, :sinks])  # exact
            assert torch.equal(
                mine[:, :, tokens - min(residual, tokens) :], given_[:, :, tokens - min(residual, tokens) :]
            )
        assert tokens - cache.packed_len < residual + sinks + 16

    def test_what_is_given_may_change_afterwards(self):
        k, v = kv(1, 20)
        cache = QuantizedCache(4, group_size=16, residual_length=4, sink_length=1)
        cache.append(k, v)
        before = [x.clone() for x in stored(cache)]
        k.zero_(), v.zero_()
        assert all(torch.equal(x, y) for x, y in zip(stored(cache), before, strict=True))

    def test_memory_of_a_long_prompt_is_let_go(self):
        k, v = kv(1, 640)
        cache = QuantizedCache(2, group_size=32, residual_length=32)
        cache.append(k, v)
        assert sum(x.untyped_storage().nbytes() for x in stored(cache)) == cache.nbytes


class TestAttention:
    @settings(max_examples=60, deadline=None)
    @given(data=st.data(), nbits=CODES)
    def test_it_is_attention_over_what_is_read_back(self, data, nbits):
        draw = data.draw
        tokens, batch, per_kv = draw(st.integers(1, 150)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
        padding = draw(st.none() | st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
        chosen = options(draw) | ({} if padding is None else {"sink_length": 0})
        constants = {
            "scale": draw(st.none() | st.floats(0.05, 1.0)),
            "window": draw(st.none() | st.integers(1, tokens + 3)),
            "soft_cap": draw(st.none() | st.just(20.0)),
        }
        cache = QuantizedCache(nbits, **chosen, **constants)
        filled(cache, *kv(batch, tokens, dtype=dtype), [draw(st.integers(1, 80))], padding)
        new = draw(st.integers(1, min(tokens, 9)))
        q = torch.randn(batch, KV_HEADS * per_kv, new, HEAD_DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
        k, v = (x.double() for x in exactly(cache))
        expected = attention(q.double(), k, v, *how(q, k, padding=padding, **constants))
        got = cache.attend(q, rectangle(batch, new, [tokens - new] * batch, padding or ()))
        assert got.dtype == dtype
        # Bounded: float32 sums (float64 for it) of numbers that are codes times scale plus zero, up to three times as
        # large as what they add up to; then one rounding to the queries' dtype.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        bound = 4 * attention_bound(q, k, v, scale=constants["scale"], sums=wide, result=dtype)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=bound)

    @pytest.mark.parametrize("nbits", [8, 4, 2])
    def test_a_long_cache_is_answered_in_blocks_and_spans(self, nbits, monkeypatch):
        from labkit.kernels import packed_attention as module

        monkeypatch.setattr(module, "BLOCKS_AT_ONCE", 3)
        monkeypatch.setattr(module, "QUERIES_AT_ONCE", 4)
        cache = filled(QuantizedCache(nbits, group_size=16, residual_length=7, sink_length=2), *kv(2, 300), [100])
        q = torch.randn(2, 6, 11, HEAD_DIM)
        got = module.packed_attention(q, cache.k, cache.v, before=cache.sinks, after=cache.recent, block_size=32)
        bound = 4 * attention_bound(q, *cache.read(), sums=torch.float32)
        torch.testing.assert_close(got, attention(q, *cache.read()), rtol=0, atol=bound)

    def test_a_row_that_is_all_padding_gives_zeros(self):
        cache = QuantizedCache(4, group_size=16, residual_length=0)
        cache.append(*kv(2, 64), rectangle(2, 64, padding=[64, 3]))
        out = cache.attend(torch.randn(2, 4, 1, HEAD_DIM), rectangle(2, 1, [63, 63], [64, 3]))
        assert torch.equal(out[0], torch.zeros_like(out[0]))  # exact
        assert out[1].abs().min() > 0

    def test_a_nan_shows(self):
        k, v = kv(1, 40)
        k[0, 0, 3, 5] = float("nan")
        cache = filled(QuantizedCache(4, group_size=16, residual_length=0), k, v, [40])
        out = cache.attend(torch.randn(1, 4, 1, HEAD_DIM))
        assert out[:, :2].isnan().all()
        assert not out[:, 2:].isnan().any()

    @pytest.mark.parametrize("nbits", [8, 4, 2])
    def test_gradients_of_queries_are_those_of_attention_over_what_is_read_back(self, nbits):
        cache = filled(QuantizedCache(nbits, group_size=16, residual_length=4), *kv(1, 100), [100])
        q = torch.randn(1, 4, 1, HEAD_DIM, requires_grad=True)
        weight = torch.randn(1, 4, 1, HEAD_DIM)
        (mine,) = torch.autograd.grad((cache.attend(q) * weight).sum(), q)
        (other,) = torch.autograd.grad((attention(q, *cache.read()) * weight).sum(), q)
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)  # bounded: float32 sums of 100 terms, twice

    @pytest.mark.parametrize("symmetric", [False, True])
    @pytest.mark.parametrize("nbits", CODES_AND_FLOATS, ids=str)
    def test_numbers_too_large_for_float16_metadata_are_kept_in_bfloat16(self, nbits, symmetric):
        k, v = kv(1, 96)
        for x in (k, v):
            x[:, :, 40:] *= 1e12  # the second of three pieces overflows what the first was packed with
        cache = QuantizedCache(nbits, symmetric=symmetric, group_size=16, residual_length=0)
        filled(cache, k, v, [32])
        for x, back in zip((k, v), cache.read(), strict=True):
            assert back.isfinite().all()
            # Bounded: a step of 2 bits over a group's range, twice for what was packed anew.
            groups = x.unflatten(2, (-1, 16))
            spread = (groups.amax(2) - groups.amin(2)).amax() if x is k else x.abs().amax() * 2
            assert (back - x).abs().max() <= 1.1 * spread
            assert (back - x)[:, :, :32].abs().max() <= 2.2 * (x[:, :, :32].amax() - x[:, :, :32].amin())
        assert cache.format.metadata == "bfloat16"
        assert cache.attend(torch.randn(1, 4, 1, HEAD_DIM)).isfinite().all()

    def test_metadata_that_became_wider_in_a_step_is_taken_back_with_it(self):
        k, v = kv(1, 64)
        cache = filled(QuantizedCache(4, group_size=16, residual_length=0), k, v, [64])
        before, mark = [x.clone() for x in stored(cache)], cache.mark()
        cache.append(*(1e7 * x for x in kv(1, 32, seed=1)))
        assert cache.format.metadata == "bfloat16"
        cache.restore(mark)
        assert cache.format.metadata == "float16"
        assert all(torch.equal(x, y) for x, y in zip(stored(cache), before, strict=True))  # exact

    def test_a_window_reads_nothing_that_has_left_it(self):
        k, v = kv(1, 200)
        k[:, :, :64] = float("nan")
        cache = filled(QuantizedCache(4, group_size=16, residual_length=0, window=20), k, v, [200])
        q = torch.randn(1, 4, 1, HEAD_DIM)
        from labkit.kernels.packed_attention import packed_attention

        out = packed_attention(q, cache.k, cache.v, *how(q, 200, window=20), after=cache.recent, block_size=16)
        assert out.isfinite().all()

    @pytest.mark.parametrize("window", [1, 3, 9, 20, 60])
    @pytest.mark.parametrize("new", [1, 5])
    def test_what_left_the_window_is_neither_read_nor_counted(self, window, new):
        k, v = kv(1, 100)
        cache = filled(QuantizedCache(4, group_size=8, residual_length=9, sink_length=2, window=window), k, v, [100])
        q = torch.randn(1, 4, new, HEAD_DIM)
        expected = attention(q, *cache.read(), *how(q, 100, window=window))
        before, whole = cache.bytes_read, cache.nbytes
        got = cache.attend(q)
        torch.testing.assert_close(got, expected, rtol=0, atol=4 * attention_bound(q, k, v))  # bounded
        seen = window + new - 1
        assert cache.bytes_read - before < whole * (seen + 9 + 8) / 100 + 17 * 2 * KV_HEADS * HEAD_DIM * 4

    def test_the_ledger_sees_packed_bytes_and_every_score(self):
        cache = filled(QuantizedCache(4, group_size=16, residual_length=4), *kv(1, 100), [100])
        q = torch.randn(1, 6, 1, HEAD_DIM)
        with ledger() as work:
            cache.attend(q)
        assert work.bytes_read == cache.nbytes == cache.bytes_read
        assert work.scores == 6 * 100

    def test_a_decode_step_makes_no_dense_copy(self):
        from labkit.course.checks.tensors import bytes_made

        cache = filled(QuantizedCache(4, residual_length=16), *kv(1, 4000, heads=3, head_dim=64), [4000])
        q = torch.randn(1, 9, 1, 64)
        cache.attend(q)  # what is kept from step to step is there
        dense = 2 * 3 * 4000 * 64 * 4
        assert bytes_made(lambda: cache.attend(q)) < 0.3 * dense


def exactly(cache: QuantizedCache):
    """K and V as they come back, in float64: not rounded to the cache's dtype, as attention does not either."""
    parts = [cache.sinks, None if cache.k is None else wide_packed(cache), cache.recent]
    return [torch.cat([x.double() for x in side], 2) for side in zip(*(pair for pair in parts if pair), strict=True)]


def wide_packed(cache: QuantizedCache):
    k, v = cache.k.dequantize(torch.float64), cache.v.dequantize(torch.float64)
    return (k if cache.rotation is None else k @ cache.rotation.double().mT), v


class TestRows:
    def test_truncating_within_the_newest_tokens_takes_nothing_else(self):
        k, v = kv(1, 50)
        cache = filled(QuantizedCache(4, group_size=16, residual_length=10), k, v, [50])
        rows = cache.k.rows.clone()
        cache.truncate(45)
        assert cache.seq_len == 45
        assert torch.equal(cache.k.rows, rows)
        assert torch.equal(cache.read()[0][:, :, 40:], k[:, :, 40:45])

    @pytest.mark.parametrize("keep", [0, 1, 2, 3, 17, 20, 34, 49])
    @pytest.mark.parametrize("rotate", [False, True])
    def test_truncating_anywhere_keeps_what_was_read_before(self, keep, rotate):
        cache = QuantizedCache(4, group_size=16, residual_length=10, sink_length=2, rotate_keys=rotate)
        filled(cache, *kv(2, 50), [50])
        before = [x[:, :, :keep].clone() for x in cache.read()]
        cache.truncate(keep)
        assert cache.seq_len == keep
        if keep:
            assert all(torch.equal(x, y) for x, y in zip(cache.read(), before, strict=True))  # exact
            assert sum(x.untyped_storage().nbytes() for x in stored(cache)) == cache.nbytes
        cache.append(*kv(2, 60, seed=1))
        assert cache.seq_len == keep + 60

    def test_a_length_that_is_not_held_is_refused(self):
        with pytest.raises(ValueError, match="cannot keep 3 tokens of 0"):
            QuantizedCache(4).truncate(3)

    @pytest.mark.parametrize("rows", [[1, 0], [0], [1, 1, 0]])
    def test_rows_are_chosen(self, rows):
        cache = filled(QuantizedCache(4, group_size=16, residual_length=3, sink_length=2), *kv(2, 50), [50])
        before = [x[rows] for x in cache.read()]
        cache.select_rows(torch.tensor(rows))
        assert all(torch.equal(x, y) for x, y in zip(cache.read(), before, strict=True))  # exact

    def test_a_copy_and_its_original_go_their_own_ways(self):
        cache = filled(QuantizedCache(4, group_size=16, residual_length=3), *kv(1, 50), [50])
        before = [x.clone() for x in cache.read()]
        copy.deepcopy(cache).append(*kv(1, 40, seed=1))
        assert all(torch.equal(x, y) for x, y in zip(cache.read(), before, strict=True))

    def test_reset_forgets_that_metadata_became_wider(self):
        k, v = kv(1, 64)
        cache = filled(QuantizedCache(4, group_size=16, residual_length=0), 1e9 * k, v, [64])
        assert cache.format.metadata == "bfloat16"
        cache.reset()
        filled(cache, k, v, [64])
        fresh = filled(QuantizedCache(4, group_size=16, residual_length=0), k, v, [64])
        assert all(torch.equal(x, y) for x, y in zip(stored(cache), stored(fresh), strict=True))  # exact

    def test_what_is_kept_while_metadata_becomes_wider_is_counted(self):
        k, v = kv(1, 64)
        cache = filled(QuantizedCache(4, group_size=16, residual_length=0), k, v, [64])
        before = cache.nbytes
        cache.append(*(1e9 * x for x in kv(1, 16, seed=1)))
        assert cache.nbytes == before + before * 80 // 64
        cache.append(*kv(1, 1, seed=2))
        assert cache.nbytes < before * 2

    def test_reset_forgets_everything(self):
        cache = filled(QuantizedCache(4, group_size=16, rotate_keys=True), *kv(1, 100), [100])
        cache.attend(torch.randn(1, 2, 1, HEAD_DIM))
        cache.reset()
        assert (cache.seq_len, cache.nbytes, cache.bytes_written, cache.bytes_read) == (0, 0, 0, 0)
        cache.append(*kv(3, 100, heads=1, head_dim=64))
        assert cache.packed_len > 0


class TestErrors:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: QuantizedCache(3), "nbits is 2, 4 or 8; got 3"),
            (lambda: QuantizedCache(torch.float16), "nbits is 8, 4 or 2, or a float8 dtype .*got torch.float16"),
            (lambda: QuantizedCache(4, group_size=0), "group_size must be a whole number, at least 1; got 0"),
            (lambda: QuantizedCache(4, group_size=1), "whole 16-bit words"),
            (lambda: QuantizedCache(8, group_size=2), "24 bits per element .* take a larger group_size"),
            (lambda: QuantizedCache(4, residual_length=-1), "residual_length must be a whole number, at least 0"),
            (lambda: QuantizedCache(4, sink_length=1.5), "sink_length must be a whole number"),
            (lambda: QuantizedCache(4, key_axis=0), 'key_axis is "channel" or "token"; got 0'),
            (lambda: QuantizedCache(4, metadata=torch.float32), "metadata is torch.bfloat16 or torch.float16"),
        ],
    )
    def test_what_cannot_be_is_one_clear_line(self, make, message):
        with pytest.raises(ValueError, match=message) as error:
            make()
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("head_dim", "message"),
        [(24, "groups of 64 do not divide a head_dim of 24: .*group_size=8"), (20, "20 is no multiple of 8")],
    )
    def test_a_head_dim_that_groups_do_not_divide_is_refused_and_nothing_is_appended(self, head_dim, message):
        cache = QuantizedCache(4)
        with pytest.raises(ValueError, match=message):
            cache.append(*kv(1, 5, head_dim=head_dim))
        assert (cache.seq_len, cache.nbytes, cache.bytes_written) == (0, 0, 0)
        cache.append(*kv(1, 5, head_dim=64))

    def test_an_append_that_runs_out_of_memory_changes_nothing(self, monkeypatch):
        cache = filled(QuantizedCache(4, group_size=16, residual_length=3), *kv(2, 50), [50])
        before = [x.clone() for x in stored(cache)]
        joined = type(cache.k).joined

        def full(held, new):
            if held.quantizer is cache.quantize_values:
                raise MemoryError
            return joined(held, new)

        monkeypatch.setattr(type(cache.k), "joined", full)
        with pytest.raises(MemoryError):
            cache.append(*kv(2, 40))
        assert cache.seq_len == 50
        assert all(torch.equal(x, y) for x, y in zip(stored(cache), before, strict=True))

    def test_tokens_that_do_not_fit_change_nothing(self):
        cache = filled(QuantizedCache(4, group_size=16, residual_length=3), *kv(2, 50), [50])
        before = [x.clone() for x in stored(cache)]
        for bad in (kv(1, 3), kv(2, 3, heads=3), kv(2, 3, dtype=torch.float16), kv(2, 0), (kv(2, 3)[0], kv(2, 4)[0])):
            with pytest.raises(ValueError, match=r"holds|zero new tokens|one shape"):
                cache.append(*bad)
        assert all(torch.equal(x, y) for x, y in zip(stored(cache), before, strict=True))

    def test_sinks_of_a_padded_batch_are_refused_with_what_to_do(self):
        cache = QuantizedCache(4, sink_length=4)
        with pytest.raises(ValueError, match="take sink_length=0"):
            cache.append(*kv(2, 9, head_dim=64), rectangle(2, 9, padding=[0, 2]))
        assert cache.seq_len == 0

    @pytest.mark.parametrize("nbits", FLOAT8, ids=str)
    def test_a_device_without_float8_is_named_and_nothing_is_appended(self, nbits, monkeypatch):
        from labkit.cache import quantized

        def lacking(*_, **__):
            raise TypeError("no such dtype on this device")

        cache = QuantizedCache(nbits)
        monkeypatch.setattr(quantized.torch, "ones", lacking)
        with pytest.raises(ValueError, match=f"PyTorch has no {nbits} on cpu: take nbits=8"):
            cache.append(*kv(1, 3, head_dim=64))
        assert cache.seq_len == 0

    def test_attending_before_appending_says_so(self):
        with pytest.raises(ValueError, match="empty: append before you attend"):
            QuantizedCache(4).attend(torch.zeros(1, 1, 1, 64))


@pytest.fixture(scope="module")
def theirs():
    return hf_model("llama, wide heads")  # head_dim 24


@pytest.fixture(scope="module")
def ours(theirs) -> Llama:
    return models.from_hf(theirs)


class TestModels:
    def cache(self, nbits=4, **changes):
        return Cache.quantized(3, nbits, **{"group_size": 8, "residual_length": 6, **changes})

    @pytest.mark.parametrize("chunk", [1, 5, 40])
    def test_a_model_takes_it_in_any_chunks(self, ours, chunk):
        tokens = torch.randint(0, 89, (2, 40), generator=torch.Generator().manual_seed(0))
        cache = self.cache(8)
        logits = torch.cat([ours(tokens[:, i : i + chunk], cache) for i in range(0, 40, chunk)], dim=1)
        assert cache.seq_len == 40
        # Lossy: 8 bits move no logit of this wide random model by more than a tenth of the logits' spread.
        assert (logits - ours(tokens)).abs().max() < 0.1 * ours(tokens).std()

    @pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"do_sample": True}])
    @pytest.mark.parametrize("nbits", [8, 2])
    def test_transformers_generates_with_it(self, theirs, nbits, mode):
        ids = torch.randint(1, 89, (2, 30), generator=torch.Generator().manual_seed(0))
        cache = self.cache(nbits)
        torch.manual_seed(0)
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=wrap(cache), max_new_tokens=20, **mode
        )
        assert out.shape == (2, 50)
        assert cache.seq_len == 49
        assert 0 < cache[0].packed_len <= 49 - 6

    def test_both_decoders_make_the_same_tokens_with_it(self, ours, theirs):
        ids = torch.randint(1, 89, (1, 30), generator=torch.Generator().manual_seed(0))
        mine = generate(ours, ids, 12, cache=self.cache(4)).tokens
        other = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=wrap(self.cache(4)),
            max_new_tokens=12,
            do_sample=False,
        )
        assert torch.equal(mine, other[:, 30:])

    def test_a_pass_that_fails_takes_back_what_it_appended(self, ours):
        cache = self.cache(4, residual_length=8)
        tokens = torch.randint(0, 89, (1, 30), generator=torch.Generator().manual_seed(0))
        ours(tokens, cache)
        before = [x.clone() for layer in cache.layers for x in layer.read()]

        def interrupted():
            with cache.step([3]) as step:
                for layer in cache.layers[:2]:
                    layer.append(*kv(1, 3, head_dim=24), step)
                raise RuntimeError

        with pytest.raises(RuntimeError):
            interrupted()
        assert cache.seq_len == 30
        after = [x for layer in cache.layers for x in layer.read()]
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))  # exact: no group stays packed

    def test_left_padding_is_as_in_a_batch_of_its_own(self, ours):
        tokens = torch.randint(1, 89, (1, 40), generator=torch.Generator().manual_seed(0))
        padded = torch.cat((torch.zeros(1, 8, dtype=torch.long), tokens), dim=1)  # a whole tile of padding
        alone, beside = self.cache(4), self.cache(4)
        expected = ours(tokens, alone, last_only=True)
        got = ours(padded, beside, padding=torch.tensor([8]), last_only=True)
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-3)  # bounded: float32, three layers of wide weights


def test_one_new_token_keeps_the_gradient_of_recent_keys_and_values():
    cache = QuantizedCache(4, group_size=16, residual_length=16)
    k, v = torch.randn(2, 1, 2, 60, 16)
    cache.append(k, v)
    new = torch.randn(1, 2, 1, 16, requires_grad=True)
    cache.append(new, new)
    cache.attend(torch.randn(1, 6, 1, 16)).sum().backward()
    assert new.grad is not None
    assert new.grad.abs().sum() > 0
