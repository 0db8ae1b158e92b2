"""Memory filled until it refuses, on a CPU under a limit; and what a GPU said, as it is recorded."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit import sizing, specs
from labkit.labs.lab03 import filling
from tests.shapes import TINY

CPU = torch.device("cpu")
SMALL = replace(TINY, name="small", parameters=None)


@given(st.integers(1, 64), st.integers(0, 4_000_000))
def test_as_many_requests_fit_as_whole_ones_go_into_what_the_weights_leave(context, room):
    limit = sizing.weight_bytes(SMALL) + room
    request = filling.request_bytes(SMALL, context)
    (found,) = filling.fill(CPU, SMALL, [context], limit=min(limit, sizing.weight_bytes(SMALL) + 40 * request))
    assert found.fitted == min(room, 40 * request) // request  # exact
    assert (found.weights, found.request) == (sizing.weight_bytes(SMALL), request)
    assert f"{request:,} B more were asked for" in found.why


def test_each_context_begins_with_the_weights_alone():
    request = filling.request_bytes(SMALL, 8)
    limit = sizing.weight_bytes(SMALL) + 10 * request
    found = filling.fill(CPU, SMALL, [8, 16, 8], limit=limit)
    assert [(one.context, one.fitted) for one in found] == [(8, 10), (16, 5), (8, 10)]


def test_weights_that_find_no_room_are_said_in_bytes_and_end_it():
    limit = sizing.weight_bytes(SMALL) - 1
    (found,) = filling.fill(CPU, SMALL, [8, 16], limit=limit)
    assert (found.context, found.fitted) == (0, 0)
    assert found.why == f"{limit + 1:,} B more were asked for; tensors hold 0 B of a limit of {limit:,}"


def test_a_computer_s_own_memory_is_not_filled_without_a_limit():
    with pytest.raises(ValueError, match="say a limit"):
        next(filling.fill(CPU, SMALL, [8]))


def test_requests_of_no_tokens_would_never_fill_anything():
    with pytest.raises(ValueError, match="at least one token"):
        next(filling.fill(CPU, SMALL, [8, 0], limit=10**6))


def test_a_limit_of_nothing_is_a_limit():
    (found,) = filling.fill(CPU, SMALL, [8], limit=0)
    assert found.context == 0
    assert str(found).endswith("tensors hold 0 B of a limit of 0")


def test_what_a_gpu_held_is_what_arithmetic_says_but_for_a_request_at_most():
    """Exact arithmetic of what was free before the weights came; libraries take some of it when products run."""
    models = [specs.model("qwen2.5-7b"), specs.model("llama-3-8b")]
    found = filling.recorded("H100", models, (8192, 32_768, 131_072))
    assert [(one.model, one.fitted) for one in found] == [
        ("qwen2.5-7b", 146), ("qwen2.5-7b", 36), ("qwen2.5-7b", 9), ("llama-3-8b", 63), ("llama-3-8b", 15),
        ("llama-3-8b", 3),
    ]  # fmt: skip
    for one in found:
        assert (one.free - one.weights) // one.request - one.fitted in (0, 1)


def test_a_record_without_a_model_or_a_context_says_nothing_of_it(tmp_path):
    assert filling.recorded("H100", [specs.model("qwen2.5-7b")], (8192,), tmp_path) == []
    assert filling.recorded("H100", [SMALL], (8192,)) == []
