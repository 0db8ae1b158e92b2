"""Predicted bytes against tensors that exist: equal, to the byte, for every way to keep K and V."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import labkit.cache
from labkit import sizing, specs
from labkit.cache import (
    Cache,
    EvictingCache,
    EvictingQuantizedCache,
    GrowingCache,
    LayerCache,
    PagedCache,
    PagedQuantizedCache,
    Pages,
    PreallocatedCache,
    QuantizedCache,
    SelectingCache,
)
from labkit.cache.evicting import H2O, Merging, MergingCache, Notes, Policy, Window
from labkit.cache.recording import RecordingCache
from labkit.quantization import FLOAT8
from labkit.sizing import (
    Dense,
    Evicting,
    Paged,
    PagedQuantized,
    Quantized,
    Selecting,
    SizeError,
    bytes_per_token,
    cache_bytes,
    mha_bytes_per_token,
)
from labkit.specs import LayerGroup
from tests.shapes import dense_shapes, mixed_shapes, shape

CAPACITY = 64
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
BLOCK = 5


def just_enough(tokens, batch, block=BLOCK, kind=PagedCache, **options):
    """Makes layers of one paged cache whose blocks are those that `batch` rows of so many tokens take."""
    pages = Pages(max(1, batch * -(-tokens // block)), block)
    return lambda: kind(pages, **options)


# What makes a layer, given tokens and batch, and the format that predicts its bytes, given the dtype.
MAKE = {
    GrowingCache: (lambda *_: GrowingCache, lambda dtype: Dense(dtype, drops=False)),
    PreallocatedCache: (lambda *_: lambda: PreallocatedCache(CAPACITY),
                        lambda dtype: Dense(dtype, CAPACITY, drops=False)),
    RecordingCache: (lambda *_: RecordingCache, lambda dtype: Dense(dtype, drops=False)),
    QuantizedCache: (lambda *_: lambda: QuantizedCache(4, group_size=8, residual_length=5, sink_length=2),
                     lambda dtype: Quantized(4, 8, 5, dtype, sink_length=2, drops=False)),
    PagedCache: (just_enough, lambda dtype: Paged(BLOCK, dtype, drops=False)),
    PagedQuantizedCache: (lambda *sizes: just_enough(*sizes, 8, PagedQuantizedCache),
                          lambda dtype: PagedQuantized(4, 8, dtype, drops=False)),
    SelectingCache: (lambda *_: lambda: SelectingCache(12, page_size=5), lambda dtype: Selecting(12, 5, dtype)),
    EvictingQuantizedCache: (
        lambda *_: lambda: EvictingQuantizedCache(Window(), 43, 4, group_size=8, residual_length=5),
        lambda dtype: Evicting(43, victims=0, packing=Quantized(4, 8, 5, dtype, drops=False)),
    ),
    EvictingCache: (lambda *_: lambda: EvictingCache(Window(), 23), lambda dtype: Evicting(23, dtype)),
    MergingCache: (lambda *_: lambda: MergingCache(Merging(frequencies=torch.ones(4), sinks=1, recent=2), 23),
                   lambda dtype: Evicting(23, dtype, tally=True, victims=2)),
}  # fmt: skip


def subclasses(cls: type) -> set[type]:
    return {cls, *(deeper for sub in cls.__subclasses__() for deeper in subclasses(sub))}


def test_every_cache_class_of_the_project_has_a_prediction():
    ours = {cls for cls in subclasses(LayerCache) if cls.__module__.startswith(labkit.cache.__name__)}
    concrete = {cls for cls in ours if not cls.__abstractmethods__}
    assert concrete == set(MAKE)


@pytest.mark.parametrize("kind", MAKE, ids=lambda cls: cls.__name__)
@given(
    model=dense_shapes(), tokens=st.integers(0, CAPACITY), batch=st.integers(1, 4), dtype=DTYPES, cuts=st.integers(1, 9)
)
def test_what_is_predicted_is_what_nbytes_says(kind, model, tokens, batch, dtype, cuts):
    make, kept = MAKE[kind]
    if kind in (QuantizedCache, PagedQuantizedCache, EvictingQuantizedCache):
        model = replace(model, head_dim=8 * model.head_dim)
    if kind is MergingCache:  # its frequencies are those of one head_dim
        model = replace(model, head_dim=8)
    cache = Cache.of(model.num_layers, make(tokens, batch))
    for begin in range(0, tokens, cuts):
        new = min(cuts, tokens - begin)
        with cache.step([new] * batch) as step:
            for layer in cache.layers:
                layer.append(*torch.zeros(2, batch, model.num_kv_heads, new, model.head_dim, dtype=dtype), step)
    assert cache.nbytes == cache_bytes(model, tokens, batch, kept(dtype))


@given(
    tokens=st.integers(1, 150),
    nbits=st.sampled_from([2, 4, 8, *FLOAT8]),
    group=st.sampled_from([8, 16, 32]),
    residual=st.integers(0, 40),
    sinks=st.integers(0, 5),
    symmetric=st.booleans(),
    key_axis=st.sampled_from(["channel", "token"]),
    metadata=st.sampled_from([torch.float16, torch.bfloat16]),
    dtype=DTYPES,
    cuts=st.integers(1, 70),
)
def test_every_way_to_quantize_takes_what_is_predicted(
    tokens, nbits, group, residual, sinks, symmetric, key_axis, metadata, dtype, cuts
):
    options = {"group_size": group, "residual_length": residual, "sink_length": sinks, "key_axis": key_axis}
    layer = QuantizedCache(nbits, symmetric=symmetric, metadata=metadata, **options)
    whole = isinstance(nbits, int)
    kept = Quantized(nbits if whole else 8, dtype=dtype, metadata=metadata, symmetric=symmetric or not whole, **options)
    for begin in range(0, tokens, cuts):
        layer.append(*torch.zeros(2, 2, 3, min(cuts, tokens - begin), 32, dtype=dtype))
    assert layer.nbytes == cache_bytes(shape(num_layers=1, head_dim=32), tokens, 2, kept)


@given(
    tokens=st.integers(1, 150),
    batch=st.integers(1, 3),
    nbits=st.sampled_from([2, 4, 8, *FLOAT8]),
    block=st.sampled_from([8, 16, 32]),
    symmetric=st.booleans(),
    key_axis=st.sampled_from(["channel", "token"]),
    metadata=st.sampled_from([torch.float16, torch.bfloat16]),
    dtype=DTYPES,
    cuts=st.integers(1, 70),
)
def test_every_way_to_pack_blocks_takes_what_is_predicted(
    tokens, batch, nbits, block, symmetric, key_axis, metadata, dtype, cuts
):
    options = {"symmetric": symmetric, "key_axis": key_axis, "metadata": metadata}
    cache = Cache.of(2, just_enough(tokens, batch, block, PagedQuantizedCache, nbits=nbits, **options))
    whole = isinstance(nbits, int)
    kept = PagedQuantized(
        nbits if whole else 8, block, dtype, drops=False, **options | {"symmetric": symmetric or not whole}
    )
    for begin in range(0, tokens, cuts):
        for layer in cache.layers:
            layer.append(*torch.zeros(2, batch, 3, min(cuts, tokens - begin), 32, dtype=dtype))
    assert cache.nbytes == cache_bytes(shape(num_layers=2, head_dim=32), tokens, batch, kept)
    assert [layer.format for layer in cache.layers] == [replace(kept, dtype="float16")] * 2


class Summing(Policy):
    """Notes a number for each token and three for each row, so that every part of the bytes is there."""

    lasting = True

    def watch(self, seen):
        return Notes(seen.received(), (torch.zeros(len(seen.k), 3),))

    def score(self, held):
        return held.tally


@given(
    tokens=st.integers(1, 60),
    prompt=st.integers(1, 60),
    batch=st.integers(1, 3),
    budget=st.integers(6, 40),
    during=st.sampled_from(["always", "prompt"]),
    every=st.integers(1, 5),
    policy=st.sampled_from([Window(sinks=2), H2O(sinks=1), Summing(recent=2)]),
    dtype=DTYPES,
)
def test_every_way_to_evict_takes_what_is_predicted_at_every_step(
    tokens, prompt, batch, budget, during, every, policy, dtype
):
    prompt = min(tokens, prompt)
    cache = Cache.evicting(2, policy, budget, during=during, every=every if during == "always" else 1)
    for new in [prompt, *[1] * (tokens - prompt)]:
        with cache.step([new] * batch) as step:
            for layer in cache.layers:
                layer.append(*torch.zeros(2, batch, 3, new, 8, dtype=dtype), step)
                layer.attend(torch.zeros(batch, 6, new, 8, dtype=dtype), step)
        noted = 12 if isinstance(policy, Summing) and during == "always" else 0
        kept = replace(cache[0].format, dtype=dtype, state_bytes=noted)
        assert cache.nbytes == cache_bytes(shape(num_layers=2, head_dim=8), step.after[0], batch, kept)


@given(model=mixed_shapes(), tokens=st.integers(0, 90), batch=st.integers(1, 3), dtype=DTYPES)
def test_layers_of_all_kinds_take_what_their_tensors_take(model, tokens, batch, dtype):
    def tensors(layer):
        if layer.kind == "state":
            return [torch.empty(batch, layer.state_bytes, dtype=torch.uint8)]
        if layer.kind == "shared":
            return []
        if layer.kind == "latent":
            return [torch.empty(batch, tokens, layer.latent_dim, dtype=dtype)]
        held = tokens if layer.window is None else min(tokens, layer.window)
        return [torch.empty(batch, layer.num_kv_heads, held, dim, dtype=dtype) for dim in (layer.k_dim, layer.v_dim)]

    held = sum(tensor.nbytes for layer in model.each_layer for tensor in tensors(layer))
    assert cache_bytes(model, tokens, batch, Dense(dtype)) == held


@given(
    tokens=st.integers(0, 300),
    batch=st.integers(1, 3),
    nbits=st.sampled_from([2, 4, 8]),
    group=st.sampled_from([8, 16, 32]),
    residual=st.integers(0, 70),
    symmetric=st.booleans(),
)
def test_packed_numbers_scales_and_the_tokens_that_wait_are_all_counted(
    tokens, batch, nbits, group, residual, symmetric
):
    model = shape(head_dim=32)
    packed = max(0, tokens - residual) // group * group
    heads, dim, metadata = model.num_kv_heads, 32, 1 if symmetric else 2
    tensors = [
        *(torch.empty(batch, heads, packed, dim * nbits // 8, dtype=torch.uint8) for _ in "kv"),
        *(torch.empty(batch, heads, packed // group, dim, dtype=torch.bfloat16) for _ in range(metadata)),  # of keys
        *(torch.empty(batch, heads, packed, dim // group, dtype=torch.bfloat16) for _ in range(metadata)),  # of values
        *(torch.empty(batch, heads, tokens - packed, dim, dtype=torch.float16) for _ in "kv"),
    ]
    kept = Quantized(nbits, group, residual, symmetric=symmetric)
    assert cache_bytes(model, tokens, batch, kept) == model.num_layers * sum(tensor.nbytes for tensor in tensors)
    assert tokens - packed < residual + group


@given(tokens=st.integers(0, 200), batch=st.integers(1, 3), block=st.integers(1, 33))
def test_pages_are_whole_blocks_and_one_table(tokens, batch, block):
    model = shape()
    blocks = -(-tokens // block)
    pool = torch.empty(2, batch * blocks, model.num_kv_heads, block, model.head_dim, dtype=torch.float16)
    table = torch.empty(batch, blocks, dtype=torch.int32)
    assert cache_bytes(model, tokens, batch, Paged(block)) == model.num_layers * pool.nbytes + table.nbytes


@given(model=mixed_shapes(), tokens=st.integers(0, 90), batch=st.integers(1, 5))
def test_a_cache_is_linear_in_the_batch_and_never_shrinks_with_length(model, tokens, batch):
    assert cache_bytes(model, tokens, batch) == batch * cache_bytes(model, tokens)
    step = cache_bytes(model, tokens + 1) - cache_bytes(model, tokens)
    assert step == bytes_per_token(model, position=tokens)
    assert step >= 0


class TestBytesPerToken:
    @pytest.mark.parametrize(
        ("name", "nbytes"),
        [("qwen2.5-7b", 57_344), ("mistral-7b", 131_072), ("llama-3-70b", 327_680), ("qwen2.5-72b", 327_680)],
    )
    def test_the_figures_that_the_texts_agree_on(self, name, nbytes):
        assert bytes_per_token(specs.model(name), dtype="float16") == nbytes

    def test_a_full_window_adds_nothing(self):
        model = shape(num_layers=2, layers=[LayerGroup("window", window=10), LayerGroup("full")])
        one = 3 * (14 + 14) * 2
        assert [bytes_per_token(model, position=p) for p in (0, 9, 10, 400)] == [2 * one, 2 * one, one, one]

    def test_metadata_counts(self):
        assert bytes_per_token(shape(), "int4") == Fraction(5 * 3 * 28) * Fraction(9, 2) / 8

    def test_mha_has_a_key_and_a_value_per_query_head(self):
        assert mha_bytes_per_token(shape()) == 2 * bytes_per_token(shape())

    def test_a_layer_that_shares_would_have_its_own_and_a_state_would_not(self):
        shared = [LayerGroup("full"), LayerGroup("shared"), LayerGroup("state", state_bytes=8)]
        assert mha_bytes_per_token(shape(num_layers=3, layers=shared)) == 2 * 6 * (14 + 14) * 2

    def test_a_latent_stands_for_every_head(self):
        model = shape(layers=[LayerGroup("latent", latent_dim=20)], head_dim=24, v_head_dim=16)
        assert bytes_per_token(model) == 5 * 20 * 2
        assert mha_bytes_per_token(model) == 5 * 6 * (24 + 16) * 2


@pytest.mark.parametrize("kind", ["full", "window"])
def test_a_layer_that_chooses_its_tokens_by_numbers_of_their_own_is_kept_whole_in_16_bits(kind):
    window = 64 if kind == "window" else None
    group = LayerGroup(kind, num_kv_heads=2, head_dim=64, window=window, index_dim=32)
    model = shape(num_layers=1, layers=[group])
    (layer,) = model.each_layer
    packed = Quantized(4, group_size=8)
    assert not packed.packs(layer)
    assert cache_bytes(model, 500, 1, packed) == cache_bytes(model, 500, 1, Dense("float16"))  # exact
    assert bytes_per_token(model, packed) == bytes_per_token(model) == 2 * (2 * (64 + 64) + 32)


class TestTablesOfTheTexts:
    def test_source_001(self):
        model, gib = specs.model("llama-3-70b"), sizing.GIB
        table = [cache_bytes(model, tokens) / gib for tokens in (2_048, 8_192, 32_768, 131_072)]
        assert table == [0.625, 2.5, 10, 40]
        assert mha_bytes_per_token(model) * 131_072 / gib == 320

    def test_source_004_by_length_and_by_users(self):
        model, mib = specs.model("qwen2.5-7b"), 2**20
        assert [cache_bytes(model, tokens) / mib for tokens in (128, 1_024, 4_096, 16_384)] == [7, 56, 224, 896]
        by_users = [cache_bytes(model, 2_048, users) / sizing.GIB for users in (1, 8, 32, 64)]
        assert [round(size, 2) for size in by_users] == [0.11, 0.88, 3.5, 7.0]

    @pytest.mark.parametrize(
        ("name", "kib", "gib", "saved"),
        [("qwen2.5-7b", 56, 7, 86), ("mistral-7b", 128, 16, 75), ("qwen2.5-72b", 320, 40, 88)],
    )
    def test_source_004_on_gqa(self, name, kib, gib, saved):
        model = specs.model(name)
        kept = Dense(drops=False)  # the text takes no account of Mistral's window
        assert bytes_per_token(model) / 2**10 == kib
        assert cache_bytes(model, 131_072, 1, kept) / sizing.GIB == gib
        assert round(100 * (1 - bytes_per_token(model) / mha_bytes_per_token(model))) == saved

    def test_source_004_capacity(self):
        model, gpu = specs.model("qwen2.5-7b"), specs.gpu("h100-80gb")
        table = [sizing.capacity(model, gpu, tokens * 1024) for tokens in (2, 8, 32, 128)]
        assert table == [504, 126, 31, 7]

    def test_source_000_corrected(self):
        model = specs.model("llama-3-70b")
        assert cache_bytes(model, 50_000) == 16_384_000_000  # the text: 12.8 GB
        assert cache_bytes(model, 1_000_000) == 327_680_000_000  # the text: 256 GB

    def test_source_002_corrected(self):
        model = specs.model("llama-3-70b")
        assert bytes_per_token(model) == 327_680  # the text: 2.5 MB, which is what MHA would take
        assert mha_bytes_per_token(model) == 2_621_440
        assert cache_bytes(model, 4_096) / sizing.GIB == 1.25  # the text: 10.5 GB
        assert mha_bytes_per_token(model) * 4_000 / sizing.GB == pytest.approx(10.5, abs=0.05)


class TestFormats:
    @pytest.mark.parametrize("name", ["float16", "bf16", "fp8", "int8", "int4", "int2", "float32"])
    def test_a_dtype_is_given_by_name_or_alias(self, name):
        assert bytes_per_token(shape(head_dim=64), name) > 0

    def test_torchs_own_dtype_is_understood(self):
        assert bytes_per_token(shape(), torch.bfloat16) == bytes_per_token(shape(), "bfloat16")

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: cache_bytes(shape(), 10, 1, "int3"), "'int3' is no dtype known here: take one of float32"),
            (lambda: cache_bytes(shape(), -1), "tokens must be a whole number, at least 0; got -1"),
            (lambda: cache_bytes(shape(), 10.0), "tokens must be a whole number"),
            (lambda: cache_bytes(shape(), True), "tokens must be a whole number"),
            (lambda: cache_bytes(shape(), 10, 0), "batch must be a whole number, at least 1; got 0"),
            (lambda: cache_bytes(shape(), 10**12), "is it in another unit"),
            (lambda: cache_bytes(shape(), 65, 1, Dense(capacity=64)), "65 tokens do not fit a capacity of 64"),
            (lambda: Quantized(3), "nbits is 2, 4 or 8; got 3"),
            (lambda: Quantized(4, group_size=0), "group_size must be a whole number"),
            (lambda: Quantized(4, residual_length=-1), "residual_length must be a whole number, at least 0; got -1"),
            (lambda: Quantized(4, sink_length=-1), "sink_length must be a whole number"),
            (lambda: Quantized(4, key_axis="head"), 'key_axis is "channel" or "token"; got'),
            (lambda: Quantized(4, group_size=6), "do not fill whole 16-bit words.* multiple of 4"),
            (lambda: Quantized(8, group_size=2), "take 24 bits per element with their metadata"),
            (lambda: cache_bytes(shape(head_dim=14), 100, 1, "int4"), "a head_dim of 14 is no multiple of 8"),
            (lambda: cache_bytes(shape(head_dim=96), 9, 1, "int4"), r"do not divide a head_dim of 96: .*group_size=32"),
            (lambda: cache_bytes("llama-3-8b", 9), r"take labkit\.specs\.model\('llama-3-8b'\)"),
            (lambda: Paged(0), "block_size must be a whole number"),
            (lambda: PagedQuantized(3), "nbits is 2, 4 or 8; got 3"),
            (lambda: Evicting(0), "budget must be a whole number, at least 1; got 0"),
            (lambda: Evicting(8, prompt_tokens=0), "prompt_tokens must be a whole number"),
            (lambda: Evicting(8, victims=-1), "victims must be a whole number, at least 0; got -1"),
            (lambda: PagedQuantized(4, 2), "do not fill whole 16-bit words"),
        ],
    )
    def test_what_cannot_be_is_one_clear_line(self, make, message):
        with pytest.raises(SizeError, match=message) as error:
            make()
        assert "\n" not in str(error.value)
