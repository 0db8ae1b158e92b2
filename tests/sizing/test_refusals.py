"""Every public function of sizing refuses what cannot be, whichever argument has it, with one line that names it."""

import dataclasses
import inspect
import math

import pytest

from labkit import sizing, specs
from labkit.sizing import Dense, Evicting, Paged, PagedQuantized, Price, Quantized, Selecting, SizeError
from labkit.specs import SpecError
from tests.shapes import GPU, LINK, shape

MODEL = shape(head_dim=16)
FLOOR = sizing.decode_floor(MODEL, GPU, 9)
NO_NUMBER = [None, "8", [8], math.nan, math.inf, True, 1j, 10**5000, -(10**5000)]
NO_COUNT = [*NO_NUMBER, -1, 2.5, 8.0, 10**10]
NO_SPEC = [None, "qwen2.5-7b", 3, {}, math.nan]
NO_SHARE = [*NO_NUMBER, -0.1, 1.5, 15]
NO_DTYPE = [None, "int3", 16, math.nan, [], 10**5000, Quantized]
NO_FLAG = [None, "yes", 1, math.nan]
GIVEN = [value for value in NO_NUMBER if value is not None]  # where None means that nothing is given
COUNTS = [
    "context",
    "users",
    "batch",
    "ranks",
    "prompt",
    "calls",
    "num_heads",
    "num_kv_heads",
    "group_size",
    "block_size",
    "page_size",
    "budget",
]
FROM_ZERO = [
    "tokens",
    "position",
    "past",
    "prefix",
    "added",
    "answer",
    "residual_length",
    "sink_length",
    "victims",
    "state_bytes",
]
BAD = {  # by the argument's name: what it can never be
    **{name: NO_SPEC for name in ("model", "gpu")},
    "link": [value for value in NO_SPEC if value is not None],
    **{name: [*NO_COUNT, 0] for name in COUNTS},
    **{name: NO_COUNT for name in FROM_ZERO},
    **{name: [*GIVEN, -1, 0, 2.5] for name in ("capacity", "prompt_tokens")},
    "contexts": [None, 8, "8192", [0], [math.nan], [2048, -1]],
    **{name: NO_DTYPE for name in ("dtype", "weight_dtype", "metadata")},
    **{name: NO_SHARE for name in ("reserve", "mfu", "mbu")},
    **{name: NO_FLAG for name in ("caching", "drops", "symmetric", "tally")},
    **{name: [*NO_NUMBER, -1.0] for name in ("flops", "intensity")},
    **{name: [*NO_NUMBER, -1.0, 10**6] for name in ("input", "output")},
    **{name: [*GIVEN, -1.0] for name in ("cached", "written")},
    "nbytes": NO_NUMBER,
    "nbits": [*NO_NUMBER, 3, 0, 4.0],
    "key_axis": [None, "head", 3, []],
    "packing": [3, "int4", {}],
    **{name: [None, 3, "3", {}] for name in ("price", "floor", "plan")},
}
PLAN = {
    "model": MODEL,
    "gpu": GPU,
    "context": 9,
    "dtype": "float8",
    "weight_dtype": "float8",
    "reserve": 0.1,
    "ranks": 3,
}
PASS = {"model": MODEL, "gpu": GPU, "batch": 2, "dtype": "float8", "weight_dtype": "float8", "ranks": 3, "link": LINK}
RIGHT = {  # each public function with arguments that it takes
    "Dense": (Dense, {"dtype": "float16", "capacity": 9, "drops": True}),
    "Evicting": (
        Evicting,
        {"budget": 200, "dtype": "float16", "prompt_tokens": 8, "tally": True, "victims": 2, "state_bytes": 4,
         "packing": Quantized(4, 8)},
    ),
    "Paged": (Paged, {"block_size": 16, "dtype": "float16", "drops": True}),
    "PagedQuantized": (
        PagedQuantized,
        {
            "nbits": 4, "block_size": 16, "dtype": "float16", "metadata": "float16", "symmetric": False,
            "key_axis": "token", "drops": True,
        },
    ),
    "Price": (Price, {"input": 3, "output": 15, "cached": 0.3, "written": 3.75}),
    "Quantized": (
        Quantized,
        {
            "nbits": 4, "group_size": 16, "residual_length": 8, "dtype": "float16", "metadata": "float16",
            "symmetric": False, "key_axis": "token", "sink_length": 0, "drops": True,
        },
    ),
    "Selecting": (Selecting, {"budget": 40, "page_size": 8, "dtype": "float16"}),
    "all_reduce_seconds": (sizing.all_reduce_seconds, {"model": MODEL, "ranks": 2, "tokens": 9, "link": LINK}),
    "arithmetic_intensity": (sizing.arithmetic_intensity, {"flops": 1.0, "nbytes": 2.0}),
    "attainable": (sizing.attainable, {"gpu": GPU, "intensity": 3.0, "dtype": "bfloat16"}),
    "bits": (sizing.bits, {"dtype": "int4"}),
    "bytes_per_token": (sizing.bytes_per_token, {"model": MODEL, "dtype": "float8", "position": 3}),
    "cache_bytes": (sizing.cache_bytes, {"model": MODEL, "tokens": 9, "batch": 2, "dtype": "float8"}),
    "capacity": (sizing.capacity, PLAN),
    "conversation_cost": (
        sizing.conversation_cost,
        {"price": Price(3, 15, 1), "calls": 3, "prefix": 9, "added": 2, "answer": 2, "caching": True},
    ),
    "decode_floor": (sizing.decode_floor, {**PASS, "context": 9}),
    "gigabytes": (sizing.gigabytes, {"nbytes": 9}),
    "kv_format": (sizing.kv_format, {"dtype": "int4"}),
    "longest_context": (
        sizing.longest_context, {name: value for name, value in PLAN.items() if name != "context"} | {"batch": 3},
    ),
    "max_batch_context_frontier": (sizing.max_batch_context_frontier, {"model": MODEL, "gpu": GPU, "contexts": [8, 9]}),
    "mha_bytes_per_token": (sizing.mha_bytes_per_token, {"model": MODEL, "dtype": "float8"}),
    "peak_bytes": (sizing.peak_bytes, {"model": MODEL, "tokens": 9, "batch": 2, "dtype": "float8"}),
    "plan": (sizing.plan, {**PLAN, "users": 4, "link": LINK}),
    "prefill_floor": (sizing.prefill_floor, {**PASS, "prompt": 9}),
    "ridge": (sizing.ridge, {"gpu": GPU, "dtype": "bfloat16"}),
    "room_for_cache": (
        sizing.room_for_cache, {name: value for name, value in PLAN.items() if name not in ("context", "dtype")},
    ),
    "split_heads": (sizing.split_heads, {"num_heads": 8, "num_kv_heads": 4, "ranks": 2}),
    "step_bytes": (sizing.step_bytes, {"model": MODEL, "tokens": 9, "batch": 2, "dtype": "float8"}),
    "step_flops": (sizing.step_flops, {"model": MODEL, "tokens": 9, "past": 3, "batch": 2}),
    "table": (sizing.table, {"plan": sizing.plan(MODEL, GPU)}),
    "tpot": (sizing.tpot, {"floor": FLOOR, "mfu": 0.5, "mbu": 0.6}),
    "ttft": (sizing.ttft, {"floor": FLOOR, "mfu": 0.5, "mbu": 0.6}),
    "weight_bytes": (sizing.weight_bytes, {"model": MODEL, "dtype": "float8"}),
    "weights_met": (sizing.weights_met, {"model": MODEL, "tokens": 9}),
}  # fmt: skip
ANSWERS = {"Bill", "Floor", "Format", "Plan", "SizeError", "Split"}  # that functions give, and no one makes
PASSES = {"all_reduce_seconds", "step_flops", "weights_met"}  # whose tokens are those of many requests, one at least


def arguments():
    """Each argument of each public function."""
    return [(name, argument) for name, (_, given) in RIGHT.items() for argument in given]


def test_every_public_function_and_every_argument_of_it_is_tried():
    public = {name for name in sizing.__all__ if callable(getattr(sizing, name))}
    assert public - ANSWERS == set(RIGHT)
    for function, given in RIGHT.values():
        function(**given)
        named = {name for name, one in inspect.signature(function).parameters.items() if one.kind != one.VAR_KEYWORD}
        assert named == set(given)


@pytest.mark.parametrize(("name", "argument"), arguments())
def test_what_cannot_be_is_one_line(name, argument):
    function, given = RIGHT[name]
    values = [*NO_NUMBER, -1, 0, 2.5] if argument == "tokens" and name in PASSES else BAD[argument]
    for value in values:
        with pytest.raises((SizeError, SpecError)) as caught:
            function(**{**given, argument: value})
        said = str(caught.value)
        assert "\n" not in said
        assert len(said) < 300


@pytest.mark.parametrize("value", [0, -1, math.nan, True, "8"])
@pytest.mark.parametrize("argument", ["context", "users", "ranks"])
def test_what_is_wrong_with_a_plan_is_said_of_the_argument_that_was_given(argument, value):
    with pytest.raises(SizeError, match=f"^{argument} must be a whole number, at least 1; got "):
        sizing.plan(MODEL, GPU, **{argument: value})


def test_sizes_within_bounds_are_answered_at_once_however_large():
    assert sizing.conversation_cost(Price(3, 15), 10**9, prefix=10**9).input_tokens == 10**18
    assert sizing.prefill_floor(MODEL, GPU, 10**9, 10**9).seconds > 0
    with pytest.raises(SizeError, match="1000000000 query heads do not divide over 7 ranks"):
        sizing.split_heads(10**9, 1, 7)


def test_sizes_that_differ_look_different():
    large = shape(parameters=42_949_673_000)  # 16 bits each: 1 kB more than the device has
    assert "85.899346 GB do not go into 85.899346 GB" not in sizing.plan(large, GPU, context=9).verdict
    said = sizing.plan(large, GPU, context=9).verdict
    left, right = said.removeprefix("The weights break first: ").split(";")[0].split(" do not go into ")
    assert left != right
    assert "too much by            0.00 GB" not in sizing.table(sizing.plan(large, GPU, context=9))


def test_a_device_that_cannot_compute_in_a_dtype_says_so():
    only = dataclasses.replace(GPU, tflops={"float8": 600.0})
    with pytest.raises(SpecError, match="has no rate for bfloat16"):
        sizing.decode_floor(MODEL, only, 9)
    assert specs.gpu("h100-80gb").flop_per_s("bfloat16") > 0
