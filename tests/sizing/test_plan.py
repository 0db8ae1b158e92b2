"""The answer to "will it run?": its figures are those of the functions behind it, its verdict what breaks first."""

import dataclasses

import pytest

from labkit import sizing, specs
from labkit.sizing import plan
from tests.shapes import GPU, shape


def test_its_parts_fill_the_memory_and_are_those_of_the_functions():
    model = shape()
    answer = plan(model, GPU, context=40, users=3, dtype="float8", reserve=0.25)
    assert answer.weights + answer.reserve + answer.cache + answer.free == answer.memory == GPU.memory_bytes
    assert answer.reserve == answer.memory - answer.weights - sizing.room_for_cache(model, GPU, reserve=0.25)
    assert answer.bytes_per_token == float(sizing.bytes_per_token(model, "float8"))
    assert answer.step == sizing.decode_floor(model, GPU, 40, 3, dtype="float8").seconds
    assert answer.prefill == sizing.prefill_floor(model, GPU, 40, dtype="float8").seconds


@pytest.mark.parametrize(("context", "said"), [(500, "It fits: up to "), (501, "the model was trained for 500 tokens")])
def test_a_context_is_too_long_only_beyond_what_the_model_was_trained_for(context, said):
    assert said in plan(shape(), GPU, context=context).verdict


@pytest.mark.parametrize(("ranks", "needed"), [(1, 4), (2, 4)])
def test_weights_that_break_first_say_how_many_devices_in_all_would_hold_them(ranks, needed):
    large = shape(parameters=120 * 10**9, num_kv_heads=6)  # 240 GB in 16 bits; a device has 85.9 GB
    assert plan(large, GPU, ranks=ranks, context=40).verdict.endswith(f"; {needed} of these would hold them.")


def test_a_cache_that_breaks_first_says_how_many_users_fit():
    small = dataclasses.replace(GPU, memory_gib=0.001)
    answer = plan(shape(), small, context=400, users=50)
    assert answer.verdict.startswith(f"The cache breaks first: {answer.users_that_fit} of 50 users fit at 400 tokens")
    assert not answer.fits


def test_weights_break_first_where_they_leave_less_than_one_user_takes():
    answer = sizing.plan(specs.model("qwen2.5-7b"), specs.gpu("t4"), context=8192, users=4)
    assert answer.weights < answer.memory
    assert answer.users_that_fit == 0
    assert answer.verdict.startswith(
        "The weights break first: of 15.6 GB they leave 342.1 MB for K and V, less than 1 user"
    )
    longest = sizing.plan(specs.model("qwen2.5-7b"), specs.gpu("h100-80gb"), context=2**20, users=1)
    assert longest.verdict.startswith("The cache breaks first"), "a length that fits nowhere is not the weights' fault"


def test_a_plan_says_what_its_weights_are_in():
    assert sizing.plan(specs.model("qwen2.5-7b"), specs.gpu("t4"), weight_dtype="int4").weight_dtype == "int4"
