"""The most that a request takes on its way to a length: what fits must fit at every one of them."""

import dataclasses
from fractions import Fraction

from hypothesis import assume, given
from hypothesis import strategies as st

from labkit import sizing, specs
from labkit.sizing import (
    Dense,
    Paged,
    PagedQuantized,
    Quantized,
    cache_bytes,
    capacity,
    longest_context,
    peak_bytes,
    plan,
)
from labkit.sizing.memory import on_one_rank
from labkit.specs import LayerGroup
from tests.shapes import FORMATS, GPU, mixed_shapes, shape

LONGEST = 150
MODELS = mixed_shapes(head_dim=16, v_head_dim=16)
LENGTHS = st.integers(1, LONGEST)


def bytes_up_to(model, context, kept):
    """Bytes of one request at each length from 1 to `context`."""
    return [cache_bytes(model, length, 1, kept) for length in range(1, context + 1)]


def device(model, room, ranks=1):
    """A device that has so many bytes for the cache, nothing reserved."""
    return dataclasses.replace(GPU, memory_gib=(-(-sizing.weight_bytes(model) // ranks) + room) / sizing.GIB)


@given(model=MODELS, kept=FORMATS, context=LENGTHS, batch=st.integers(1, 5))
def test_the_peak_is_the_largest_of_all_lengths_on_the_way(model, kept, context, batch):
    assume(context <= (kept.limit or context))
    assert peak_bytes(model, context, batch, kept) == batch * max(bytes_up_to(model, context, kept))


@given(
    model=MODELS, kept=FORMATS, context=LENGTHS, room=st.integers(0, 500_000), ranks=st.sampled_from([1, 1, 2, 3, 6])
)
def test_so_many_users_fit_at_every_length_and_one_more_does_not_at_some(model, kept, context, room, ranks):
    assume(context <= (kept.limit or context))
    model = dataclasses.replace(model, num_kv_heads=6)
    gpu = device(model, room, ranks)
    users = capacity(model, gpu, context, dtype=kept, reserve=0, ranks=ranks)
    most = max(bytes_up_to(on_one_rank(model, ranks), context, kept))
    assert users * most <= room < (users + 1) * most


@given(model=MODELS, kept=FORMATS, context=LENGTHS, users=st.integers(1, 9), room=st.integers(0, 500_000))
def test_users_and_context_that_fit_agree(model, kept, context, users, room):
    assume(context <= (kept.limit or context))
    gpu = device(model, room)
    longest = longest_context(model, gpu, users, dtype=kept, reserve=0)
    assert (longest is None or longest >= context) == (capacity(model, gpu, context, dtype=kept, reserve=0) >= users)


@given(model=MODELS, kept=FORMATS, context=LENGTHS, users=st.integers(1, 9), room=st.integers(1, 500_000))
def test_a_plan_never_contradicts_itself(model, kept, context, users, room):
    assume(context <= (kept.limit or context))
    answer = plan(model, device(model, room), context=context, users=users, dtype=kept, reserve=0)
    fits = answer.users_that_fit >= users
    assert answer.fits == fits
    assert (answer.context_that_fits is None or answer.context_that_fits >= context) == fits
    assert answer.verdict.startswith("It fits") == fits


@given(model=MODELS, kept=FORMATS, context=LENGTHS)
def test_a_step_reads_no_more_than_is_held_and_as_much_whatever_room_was_taken(model, kept, context):
    assume(context <= (kept.limit or context))
    read = sizing.step_bytes(model, context, 1, kept)
    assert read <= cache_bytes(model, context, 1, kept)
    if isinstance(kept, Dense):
        assert read == cache_bytes(model, context, 1, Dense(kept.dtype))
    if isinstance(kept, Paged):
        assert read == cache_bytes(model, context, 1, Dense(kept.dtype)) + kept.model_bytes(context)


@given(
    model=MODELS,
    kept=st.builds(Dense, st.sampled_from(["float32", "float16", "float8"]), drops=st.booleans()),
    position=st.integers(0, LONGEST - 1),
)
def test_what_a_token_adds_is_what_a_dense_cache_grows_by(model, kept, position):
    grown = cache_bytes(model, position + 1, 1, kept) - cache_bytes(model, position, 1, kept)
    assert sizing.bytes_per_token(model, kept, position=position) == grown


class TestInFewBits:
    """Qwen2.5-7B on an H100, int4: figures of a search over every length."""

    model, gpu = specs.model("qwen2.5-7b"), specs.gpu("h100-80gb")

    def test_at_2048_tokens_1548_users_can_get_there_and_not_1661(self):
        assert capacity(self.model, self.gpu, 2048, dtype="int4") == 1548
        assert longest_context(self.model, self.gpu, 1548, dtype="int4") >= 2048
        assert longest_context(self.model, self.gpu, 1549, dtype="int4") < 2048
        assert longest_context(self.model, self.gpu, 1661, dtype="int4") == 1910

    def test_at_128_tokens_the_verdict_agrees_with_its_own_limit(self):
        said = plan(self.model, self.gpu, context=128, users=12_599, dtype="int4").verdict
        assert said.startswith("The cache breaks first: 8,135 of 12,599 users fit at 128 tokens; all 12,599 would with")
        assert said.endswith("up to 82 tokens each.")
        assert plan(self.model, self.gpu, context=128, users=8135, dtype="int4").fits
        assert plan(self.model, self.gpu, context=82, users=12_599, dtype="int4").fits

    def test_it_is_fullest_just_before_a_group_is_packed(self):
        kept = Quantized(4, 16, residual_length=8, sink_length=3)
        assert [kept.fullest(shape(head_dim=16), tokens) for tokens in (5, 26, 27, 30, 43)] == [5, 26, 26, 26, 42]

    def test_a_window_that_fills_before_a_group_is_packed_counts_as_it_was(self):
        model = shape(head_dim=16, layers=[LayerGroup("window", window=20), LayerGroup("full")], num_layers=2)
        kept = Quantized(4, 16, residual_length=0)
        assert peak_bytes(model, 17, 1, kept) == cache_bytes(model, 15, 1, kept) > cache_bytes(model, 17, 1, kept)


class TestInBlocks:
    def test_it_is_fullest_where_the_newest_block_begins(self):
        assert [Paged(16).fullest(shape(), tokens) for tokens in (0, 1, 16, 17, 40)] == [0, 1, 1, 17, 33]

    def test_a_window_of_20_tokens_lies_on_three_blocks_of_16_for_a_while(self):
        model = shape(num_layers=1, window=20)
        block = 16 * 3 * 28 * 2
        held = {tokens: cache_bytes(model, tokens, 1, Paged()) - Paged().model_bytes(tokens) for tokens in (33, 36, 48)}
        assert held == {33: 3 * block, 36: 2 * block, 48: 2 * block}
        assert cache_bytes(model, 48, 1, Paged(drops=False)) == 3 * block + Paged().model_bytes(48)

    def test_packed_the_newest_block_waits_beside_its_place_until_it_is_full(self):
        model, kept = shape(num_layers=1, head_dim=16), PagedQuantized(4, 16)
        packed, waits = 16 * 3 * 32 * 6 // 8, 16 * 3 * 32 * 2  # 6 bits per number with the metadata, 16 before
        held = [cache_bytes(model, tokens, 1, kept) - kept.model_bytes(tokens) for tokens in (1, 15, 16, 17, 32)]
        assert held == [packed + waits, packed + waits, packed, 2 * packed + waits, 2 * packed]
        assert [kept.fullest(model, tokens) for tokens in (0, 1, 16, 17, 40)] == [0, 1, 1, 17, 33]
        assert sizing.step_bytes(model, 20, 1, kept) == packed + 4 * 3 * 32 * 2 + kept.model_bytes(20)


class TestRoomTakenAtOnce:
    def test_a_capacity_is_the_longest_context(self):
        assert longest_context(shape(), GPU, 3, dtype=Dense(capacity=64)) == 64
        assert plan(shape(), GPU, context=64, dtype=Dense(capacity=64)).context_that_fits == 64

    def test_nothing_is_taken_before_the_first_token(self):
        assert cache_bytes(shape(), 0, 1, Dense(capacity=64)) == 0
        assert cache_bytes(shape(), 1, 1, Dense(capacity=64)) == cache_bytes(shape(), 64)


def test_a_latent_stays_in_full_precision_in_every_figure():
    model = shape(layers=[LayerGroup("latent", latent_dim=20)])
    assert sizing.bytes_per_token(model, "int4") == sizing.bytes_per_token(model) == cache_bytes(model, 1, 1, "int4")


class Compacting:
    """A way of one's own: K and V as they are, and of every 10 tokens that have come 5 are merged away at once."""

    name, bits_per_element, limit = "compacting", Fraction(16), None
    model_bytes = Dense.model_bytes

    def held(self, tokens):
        return tokens - 5 * (tokens // 10)

    def token_bytes(self, layer, position):
        return Fraction(layer.elements_per_token * 2)

    def layer_bytes(self, layer, tokens):
        return Dense(drops=False).layer_bytes(layer, self.held(tokens))

    read_bytes = layer_bytes

    def fullest(self, model, tokens):
        return max(range(tokens // 10 * 10 - 1, tokens + 1), key=self.held) if tokens >= 10 else tokens


@given(context=LENGTHS, room=st.integers(0, 500_000), users=st.integers(1, 9))
def test_a_way_to_keep_k_and_v_of_ones_own_is_asked_and_not_known(context, room, users):
    model, kept = shape(), Compacting()
    gpu = device(model, room)
    answer = plan(model, gpu, context=context, users=users, dtype=kept, reserve=0)
    most = max(bytes_up_to(model, context, kept))
    assert answer.users_that_fit == room // most
    assert answer.cache == users * most
    assert answer.verdict.startswith("It fits") == (users * most <= room)
