"""What fits, against a device's memory counted by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit import sizing
from labkit.sizing import SizeError, capacity, longest_context, split_heads, weight_bytes
from labkit.sizing.memory import on_one_rank, room_for_cache
from labkit.specs import LayerGroup
from tests.shapes import GPU, TINY_GPU, dense_shapes, mixed_shapes, shape


class TestWeights:
    def test_each_weight_takes_its_dtype(self):
        model = shape()
        assert weight_bytes(model, "float32") == 4 * model.num_parameters
        assert weight_bytes(model, "int4") == -(-model.num_parameters // 2)

    def test_shared_scales_of_mxfp4_count(self):
        assert weight_bytes(shape(parameters=32_000), "mxfp4") == 17_000


class TestCapacity:
    @given(model=mixed_shapes(), context=st.integers(1, 400), reserve=st.floats(0, 0.9))
    def test_so_many_fit_and_one_more_does_not(self, model, context, reserve):
        room = room_for_cache(model, TINY_GPU, reserve=reserve)
        fit = capacity(model, TINY_GPU, context, reserve=reserve)
        if room < 0:
            assert fit == 0
            return
        assert fit == 0 or sizing.cache_bytes(model, context, fit) <= room
        assert sizing.cache_bytes(model, context, fit + 1) > room

    @given(model=mixed_shapes(), batch=st.integers(1, 9))
    def test_so_long_fits_and_one_token_more_does_not(self, model, batch):
        room = room_for_cache(model, TINY_GPU)
        longest = longest_context(model, TINY_GPU, batch)
        if longest is None:
            assert sizing.cache_bytes(model, 10**9, batch) <= room
            return
        assert longest == 0 or sizing.cache_bytes(model, longest, batch) <= room
        assert sizing.cache_bytes(model, longest + 1, batch) > room

    def test_weights_that_do_not_fit_leave_no_room(self):
        large = shape(parameters=100 * 10**9)
        assert room_for_cache(large, GPU) == GPU.memory_bytes - 200 * 10**9
        assert capacity(large, GPU, 10) == 0
        assert longest_context(large, GPU) == 0

    def test_the_reserve_is_a_share_of_what_the_weights_leave(self):
        model = shape()
        left = GPU.memory_bytes - weight_bytes(model)
        assert room_for_cache(model, GPU, reserve=0.25) == int(left * 0.75)

    def test_the_frontier_is_the_capacity_at_each_context(self):
        model = shape()
        pairs = sizing.max_batch_context_frontier(model, GPU, [10, 20], dtype="float32")
        assert pairs == [(n, capacity(model, GPU, n, dtype="float32")) for n in (10, 20)]
        assert pairs[0][1] in (2 * pairs[1][1], 2 * pairs[1][1] + 1)

    @pytest.mark.parametrize("reserve", [-0.1, 1, 15, "much"])
    def test_a_reserve_in_percent_is_an_error(self, reserve):
        with pytest.raises(SizeError, match=r"reserve is a share between 0 and 1; got .*: 15% is 0\.15"):
            capacity(shape(), GPU, 10, reserve=reserve)


def test_with_the_fewest_weights_that_a_spec_takes_no_time_is_negative():
    for tied, fewest in ((True, 101 * 77), (False, 2 * 101 * 77)):
        model = shape(parameters=fewest, tied_head=tied)
        for floor in (sizing.decode_floor(model, GPU, 1), sizing.prefill_floor(model, GPU, 500)):
            assert floor.weight_bytes == 2 * 101 * 77
            assert floor.flops > 0


class Nothing(sizing.Dense):
    """A way to keep K and V that forgets to count."""

    def layer_bytes(self, layer, tokens):
        return 0


class TestACacheThatTakesNothing:
    @pytest.mark.parametrize(
        "ask", [capacity, lambda *of, dtype: sizing.plan(of[0], of[1], context=of[2], dtype=dtype)]
    )
    def test_of_a_format_of_ones_own_has_no_capacity_and_that_is_said(self, ask):
        with pytest.raises(SizeError, match="10 tokens take 0 bytes in float16: nothing limits how many"):
            ask(shape(), GPU, 10, dtype=Nothing())

    def test_of_a_model_of_states_each_user_takes_its_state_at_any_length(self):
        model = shape(layers=[LayerGroup("state", state_bytes=300)], num_layers=2)
        plan = sizing.plan(model, GPU, context=500)
        assert plan.users_that_fit == (plan.free + plan.cache) // 600
        assert (plan.bytes_per_token, plan.context_that_fits) == (0, None)
        assert "It fits" in plan.verdict
        assert " 0 bytes per token" in sizing.table(plan)


class TestTensorParallel:
    @given(model=dense_shapes(), ranks=st.integers(1, 16), tokens=st.integers(1, 50))
    def test_ranks_hold_the_whole_cache_or_copies_of_it(self, model, ranks, tokens):
        try:
            split = split_heads(model.num_heads, model.num_kv_heads, ranks)
        except SizeError:
            assert model.num_heads % ranks or (model.num_kv_heads % ranks and ranks % model.num_kv_heads)
            return
        assert split.kv_heads_per_rank * ranks == split.copies * model.num_kv_heads
        part = sizing.cache_bytes(on_one_rank(model, ranks), tokens)
        assert part * ranks == split.copies * sizing.cache_bytes(model, tokens)
        assert split.total == split.copies

    @pytest.mark.parametrize(
        ("ranks", "per_rank", "copies"), [(1, 8, 1), (2, 4, 1), (8, 1, 1), (16, 1, 2), (32, 1, 4), (64, 1, 8)]
    )
    def test_eight_kv_heads_stop_dividing_at_eight_ranks(self, ranks, per_rank, copies):
        split = split_heads(64, 8, ranks)
        assert (split.kv_heads_per_rank, split.copies) == (per_rank, copies)

    def test_a_latent_is_whole_on_every_rank_and_a_state_is_divided(self):
        model = shape(layers=[LayerGroup("latent", latent_dim=20), LayerGroup("state", state_bytes=300)], num_layers=2)
        assert sizing.cache_bytes(on_one_rank(model, 3), 10) == 10 * 20 * 2 + 100

    def test_heads_over_a_latent_must_divide_as_well(self):
        with pytest.raises(SizeError, match="6 query heads do not divide over 4 ranks"):
            on_one_rank(shape(layers=[LayerGroup("latent", latent_dim=20)]), 4)

    @pytest.mark.parametrize(
        ("heads", "kv", "ranks", "message"),
        [
            (28, 4, 8, r"28 query heads do not divide over 8 ranks: take one of \[1, 2, 4, 7, 14, 28\]"),
            (24, 6, 4, "6 KV heads and 4 ranks: one must divide the other"),
            (24, 0, 2, "num_kv_heads must be a whole number, at least 1; got 0"),
            (24, 6, 0, "ranks must be a whole number, at least 1; got 0"),
        ],
    )
    def test_heads_that_do_not_divide_are_an_error(self, heads, kv, ranks, message):
        with pytest.raises(SizeError, match=message):
            split_heads(heads, kv, ranks)
