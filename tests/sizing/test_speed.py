"""Floors against what the ledger counts of a model that runs, and against arithmetic by hand."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from labkit import models, sizing, specs
from labkit.generation import generate
from labkit.ledger import ledger
from labkit.sizing import SizeError, decode_floor, prefill_floor, step_flops, weights_met
from labkit.sizing.speed import pairs
from labkit.specs import LayerGroup
from tests.shapes import GPU, LINK, shape


class TestOperations:
    @given(tokens=st.integers(1, 40), past=st.integers(0, 40), window=st.one_of(st.none(), st.integers(1, 60)))
    def test_pairs_are_those_that_the_mask_allows(self, tokens, past, window):
        allowed = sum(
            1
            for query in range(past, past + tokens)
            for key in range(query + 1)
            if window is None or query - key < window
        )
        assert pairs(tokens, past, window) == allowed

    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize(("tokens", "past"), [(1, 0), (1, 9), (7, 0), (7, 9)])
    def test_they_are_those_of_the_products_that_our_decoder_runs(self, tied, tokens, past):
        spec = shape(tied_head=tied)
        model = models.random(spec)
        cache = model.cache()
        if past:
            model(torch.zeros(1, past, dtype=torch.long), cache)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, tokens, dtype=torch.long), cache, last_only=True)
        attention = 2 * spec.num_layers * spec.num_heads * 2 * spec.head_dim * pairs(tokens, past, None)
        norms = 2 * (2 * spec.num_layers + 1) * spec.hidden_size * tokens  # weights that no product has
        # PyTorch does not count the products inside its fused attention on a CPU: the next test does.
        assert counter.get_total_flops() == step_flops(spec, tokens, past=past) - norms - attention

    def test_the_ledger_counts_the_same_scores_and_those_that_the_mask_hides(self):
        spec = shape()
        model = models.random(spec)
        with ledger(model) as work:
            generate(model, torch.zeros(1, 9, dtype=torch.long), 6, cache=model.cache())
        seen = pairs(9, 0, None) + sum(pairs(1, past, None) for past in range(9, 14))
        hidden = 9 * 9 - pairs(9, 0, None)
        assert work.scores == spec.num_layers * spec.num_heads * (seen + hidden)

    def test_a_shared_layer_and_a_window_read_what_they_see(self):
        spec = shape(num_layers=3, layers=[LayerGroup("full"), LayerGroup("window", window=4), LayerGroup("shared")])
        without = step_flops(spec, 1)
        per_key = 2 * spec.num_heads * 2 * spec.head_dim
        assert step_flops(spec, 1, past=9) - without == per_key * (9 + 3 + 9)

    def test_a_latent_is_met_as_it_is_in_a_step_and_expanded_to_heads_in_a_prompt(self):
        spec = shape(num_layers=2, layers=[LayerGroup("latent", latent_dim=20)], v_head_dim=10)
        weights = 2 * (spec.num_parameters - 2 * 101 * 77)
        head = 2 * 101 * 77
        assert step_flops(spec, 1, past=8) == weights + head + 2 * 2 * 6 * (20 + 20) * 9
        assert step_flops(spec, 3) == 3 * weights + head + 2 * 2 * 6 * (14 + 10) * 6


class TestWeightsMet:
    def test_an_embedding_table_is_not_read_unless_it_is_the_head(self):
        table = 101 * 77
        assert weights_met(shape(tied_head=True), 1) == shape(tied_head=True).num_parameters
        assert weights_met(shape(), 1) == shape().num_parameters - table

    def test_of_tables_of_embeddings_per_layer_a_row_each_is_read(self):
        gemma = specs.model("gemma-3n-e4b")
        assert weights_met(gemma, 1) == gemma.num_parameters - 35 * 262_144 * 256

    def test_one_token_meets_its_experts_and_many_meet_all(self):
        moe = shape(parameters=900_000, active_parameters=300_000, num_experts=8, experts_per_token=2, tied_head=True)
        assert weights_met(moe, 1) == 300_000
        assert weights_met(moe, 2) == 300_000 + round(100_000 * 8 * (1 - 0.75**2) - 200_000)
        assert weights_met(moe, 10_000) == 900_000


class TestFloors:
    def test_decode_reads_weights_once_and_every_requests_cache(self):
        model = shape(tied_head=True)
        floor = decode_floor(model, GPU, context=50, batch=3, dtype="float32", weight_dtype="bfloat16")
        assert floor.weight_bytes == 2 * model.num_parameters
        assert floor.kv_bytes == sizing.cache_bytes(model, 50, 3, "float32")
        assert floor.flops == step_flops(model, 1, past=49, batch=3)  # the new token is one of the 50
        assert floor.reading == (floor.weight_bytes + floor.kv_bytes) / 2000e9
        assert (floor.bound, floor.seconds) == ("memory", floor.reading)

    def test_a_long_prompt_is_bound_by_arithmetic_and_a_step_by_memory(self):
        model, gpu = specs.model("qwen2.5-7b"), specs.gpu("h100-80gb")
        assert prefill_floor(model, gpu, 4096).bound == "compute"
        assert decode_floor(model, gpu, 4096).bound == "memory"

    def test_reading_200_gb_at_3350_gb_per_second_takes_60_ms(self):
        assert 200 * sizing.GB / specs.gpu("h100-80gb").bytes_per_s == pytest.approx(0.0597, abs=5e-5)

    def test_ranks_share_the_work_and_pay_for_the_link(self):
        model = shape(tied_head=True)
        one = decode_floor(model, GPU, 40, batch=6)
        three = decode_floor(model, GPU, 40, batch=6, ranks=3, link=LINK)
        assert three.weight_bytes == -(-one.weight_bytes // 3)
        assert three.kv_bytes * 3 == one.kv_bytes
        hidden_states = 6 * model.hidden_size * 2
        assert three.communicating == pytest.approx(2 * model.num_layers * hidden_states * 2 * (2 / 3) / 100e9)
        assert one.communicating == 0

    def test_ranks_share_a_prompt_and_send_all_of_its_hidden_states(self):
        model = shape(tied_head=True)
        one = prefill_floor(model, GPU, 40, batch=2)
        three = prefill_floor(model, GPU, 40, batch=2, ranks=3, link=LINK)
        assert three.flops == -(-one.flops // 3)
        hidden_states = 2 * 40 * model.hidden_size * 2
        assert three.communicating == pytest.approx(2 * model.num_layers * hidden_states * 2 * (2 / 3) / 100e9)

    def test_a_prompts_tokens_meet_more_experts_than_one_token(self):
        moe = shape(parameters=900_000, active_parameters=300_000, num_experts=8, experts_per_token=2)
        assert prefill_floor(moe, GPU, 5, batch=2).weight_bytes == 2 * weights_met(moe, 10)

    def test_integer_weights_are_widened_to_the_faster_dtype_of_16_bits(self):
        old = dataclasses.replace(GPU, tflops={"float32": 8.0, "float16": 65.0})  # no bfloat16, as before 2020
        flops = decode_floor(shape(), old, 40).flops
        assert decode_floor(shape(), old, 40, weight_dtype="int8").computing == flops / 65e12
        assert decode_floor(shape(), old, 40, weight_dtype="bfloat16").computing == flops / 8e12

    @given(intensity=st.floats(0, 1e6))
    def test_the_roofline_is_the_lower_roof_and_they_meet_at_the_ridge(self, intensity):
        rate = sizing.attainable(GPU, intensity)
        assert rate == min(300e12, intensity * 2000e9)
        assert (rate < 300e12) == (intensity < sizing.ridge(GPU)) or intensity == sizing.ridge(GPU)

    def test_estimates_are_the_floor_over_the_share_that_is_reached(self):
        floor = dataclasses.replace(decode_floor(shape(), GPU, 40), reading=2.0, computing=1.0, communicating=0.5)
        assert sizing.tpot(floor, mbu=0.5, mfu=0.5) == 4.5
        assert sizing.ttft(floor, mbu=1.0, mfu=0.25) == 4.5

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: decode_floor(shape(), GPU, 0), "context must be a whole number, at least 1; got 0"),
            (lambda: prefill_floor(shape(), GPU, -3), "prompt must be a whole number"),
            (lambda: decode_floor(shape(), GPU, 9, ranks=0), "ranks must be a whole number, at least 1; got 0"),
            (lambda: decode_floor("llama-3-8b", GPU, 9), r"take labkit\.specs\.model\('llama-3-8b'\)"),
            (lambda: prefill_floor(shape(), "h100-80gb", 9), r"take labkit\.specs\.gpu\('h100-80gb'\)"),
            (lambda: sizing.attainable(GPU, -1.0), "intensity must not be negative"),
            (lambda: sizing.attainable(GPU, float("nan")), "intensity must not be negative"),
            (lambda: sizing.arithmetic_intensity(1.0, 0), "bytes must be more than 0"),
            (lambda: sizing.tpot(decode_floor(shape(), GPU, 9), mbu=60), "mbu is a share between 0 and 1; got 60"),
        ],
    )
    def test_what_cannot_be_is_one_clear_line(self, make, message):
        with pytest.raises(SizeError, match=message):
            make()


def test_a_query_meets_what_a_budget_has_left() -> None:
    model, gpu = specs.model("qwen2.5-7b"), specs.gpu("h100-80gb")
    kept = sizing.Evicting(1024)
    short, long = (decode_floor(model, gpu, tokens, dtype=kept) for tokens in (4096, 131_072))
    assert short == long
    assert decode_floor(model, gpu, 1000, dtype=kept).flops == decode_floor(model, gpu, 1000).flops
    assert long.flops == step_flops(model, 1, past=1023)
    assert decode_floor(model, gpu, 131_072, dtype=sizing.Selecting(1024)).flops == long.flops
    latent = specs.model("deepseek-v3")  # keeps all
    assert decode_floor(latent, gpu, 4096, dtype=kept).flops == decode_floor(latent, gpu, 4096).flops
