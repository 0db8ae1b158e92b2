"""A fixed decode step gives what the model gives, and leaves the cache as it would; what cannot be is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from labkit import kernels
from labkit.cache import Cache
from labkit.generation import generate, likeliest, pad_left
from labkit.graphs import KERNELS, PLAIN, DecodeGraph
from labkit.llama import Llama
from labkit.models import random
from tests.pairs import every_pair
from tests.shapes import TINY

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SPECS = {
    "plain": TINY,
    "window": replace(TINY, window=5),
    "qkv bias, tied head": replace(TINY, qkv_bias=True, tied_head=True),
}


def model_of(name: str = "plain", dtype: torch.dtype = torch.float64, device: str = DEVICE) -> Llama:
    return random(SPECS[name], dtype=dtype, device=device, prepack=False)


def prompt_of(batch: int, length: int = 7) -> torch.Tensor:
    return torch.randint(0, 100, (batch, length), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def filled(model: Llama, tokens, capacity: int = 40, **options) -> tuple[Cache, torch.Tensor]:
    """A cache that holds `tokens`, and the token that comes next in each row."""
    cache = model.cache(capacity)
    return cache, likeliest(model(tokens, cache, last_only=True, **options)[:, -1])


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.skipif(not CUDA, reason="needs a GPU"))])
def capture(request) -> bool:
    return request.param


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_tokens_are_those_of_generate_and_the_cache_goes_on(name, batch, capture):
    model, tokens = model_of(name), prompt_of(batch)
    # Wide enough in float64 that no two likeliest tokens come near a tie by rounding.
    expected = generate(model, tokens, 12, cache=model.cache(40)).tokens
    cache, first = filled(model, tokens)
    graph = DecodeGraph(model, cache, capture=capture)
    one = graph.run(first, 4)
    two = graph.run(one[:, -1], 3)  # a second run goes on
    assert torch.equal(torch.cat((first[:, None], one, two), 1), expected[:, :8])
    assert cache.lengths == (7 + 7,) * batch
    # Then the model itself goes on with the same cache, and the graph with what the model left.
    three = generate(model, two[:, -1:], 2, cache=cache).tokens
    four = graph.run(three[:, -1], 2)
    assert torch.equal(torch.cat((three, four), 1), expected[:, 8:])


def test_rows_of_their_own_lengths(capture):
    model = model_of("window")
    rows = [prompt_of(1, length)[0] for length in (3, 9, 1)]
    cache, first = filled(model, rows)
    got = DecodeGraph(model, cache, capture=capture).run(first, 6)
    assert cache.lengths == (9, 15, 7)
    for row, mine in enumerate(rows):
        alone = generate(model, mine[None], 7, cache=model.cache(40)).tokens[0]
        assert torch.equal(torch.cat((first[row : row + 1], got[row])), alone)


@pytest.mark.parametrize("name", ["plain", "window"])
def test_padding_at_the_left_is_seen_by_nobody(name, capture):
    model = model_of(name)
    tokens, padding = pad_left([[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15]])
    expected = generate(model, tokens.to(DEVICE), 8, cache=model.cache(40), padding=padding).tokens
    cache, first = filled(model, tokens.to(DEVICE), padding=padding)
    got = DecodeGraph(model, cache, capture=capture).run(first, 7)
    assert torch.equal(torch.cat((first[:, None], got), 1), expected)


@pytest.mark.skipif(not kernels.available(DEVICE), reason="Triton is not installed here")
@pytest.mark.parametrize(
    ("name", "way", "dtype"),
    every_pair([*SPECS], [(1, False), (1, True), (2, False)], [torch.float32, torch.bfloat16]),
    ids=str,
)
def test_logits_through_the_kernels(name, way, dtype, capture):
    batch, fused = way
    model, exact, tokens = model_of(name, dtype), model_of(name), prompt_of(batch)
    for ours, theirs in zip(exact.parameters(), model.parameters(), strict=True):
        ours.data.copy_(theirs)
    cache, _ = filled(model, tokens)
    graph = DecodeGraph(model, cache, capture=capture, fused=fused)
    assert graph.parts is KERNELS
    next_tokens = prompt_of(batch, 1)[:, 0] + 0
    graph.run(next_tokens, 1)
    whole = torch.cat((tokens, next_tokens[:, None]), 1)
    wanted = exact(whole, last_only=True)[:, -1]
    eager = model(whole, last_only=True)[:, -1].double()
    apart = (graph.logits.double() - wanted).norm() / wanted.norm()
    # Bounded. float32: 2 layers of sums of up to 96 terms. bfloat16: at most twice as far as the model itself, which
    # rounds as often, or a few roundings where that is lucky (Triton's interpreter cuts off instead of rounding).
    floor = 16 * torch.finfo(dtype).eps
    assert apart <= max(floor, 2 * (eager - wanted).norm() / wanted.norm())


def test_without_triton_the_step_is_plain_pytorch(monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda device="cpu": False)
    model = model_of(dtype=torch.float32)
    cache, first = filled(model, prompt_of(2))
    graph = DecodeGraph(model, cache, capture=False)
    assert graph.parts is PLAIN
    cache_too, _ = filled(model, prompt_of(2))
    graph.run(first, 1)
    wanted = model(first[:, None], cache_too, last_only=True)[:, -1]
    # Bounded: the same float32 arithmetic, sums in another order.
    torch.testing.assert_close(graph.logits, wanted, rtol=1e-4, atol=1e-5)


def test_what_is_in_the_cache_is_what_the_model_writes_and_the_bytes_are_counted(capture):
    model, tokens = model_of("window"), prompt_of(2)
    cache, first = filled(model, tokens)
    other, _ = filled(model, tokens)
    written, read = cache.layers[0].bytes_written, cache.layers[0].bytes_read
    said = DecodeGraph(model, cache, capture=capture).run(first, 3)
    for token in (first, said[:, 0], said[:, 1]):
        model(token[:, None], other)
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        for ours, wanted in zip(mine.read(), theirs.read(), strict=True):
            # Bounded: float64, sums of up to 96 terms in another order.
            torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)
    of_one = 2 * TINY.num_kv_heads * TINY.head_dim * 8
    assert cache.layers[0].bytes_written - written == 2 * 3 * of_one
    layer = cache.layers[1]
    assert layer.bytes_read - read - 2 * 10 * of_one == 2 * 3 * 5 * of_one  # `read` above read all 10; a window is 5


def test_stale_numbers_behind_shorter_rows_are_cleared_before_the_model_reads_there(capture):
    model = model_of()
    cache, first = filled(model, [prompt_of(1, 3)[0], prompt_of(1, 6)[0]])
    DecodeGraph(model, cache, capture=capture).run(first, 5)
    assert all(layer.used for layer in cache.layers) or not capture
    cache.truncate(6)
    fresh = generate(model, first[:, None], 3, cache=cache).tokens
    again, _ = filled(model, [prompt_of(1, 3)[0], prompt_of(1, 6)[0]])
    DecodeGraph(model, again, capture=capture).run(first, 3)
    again.truncate(6)
    assert torch.equal(fresh, generate(model, first[:, None], 3, cache=again).tokens)


def test_an_interrupt_leaves_the_lengths_that_were(monkeypatch):
    model = model_of()
    cache, first = filled(model, prompt_of(1))
    graph = DecodeGraph(model, cache, capture=False)
    expected = graph.run(first, 3)
    cache.truncate(7)
    step, calls = graph.step, []

    def interrupted() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        step()

    monkeypatch.setattr(graph, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        graph.run(first, 3)
    assert cache.lengths == (7,)
    monkeypatch.undo()
    assert torch.equal(graph.run(first, 3), expected)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda m: Cache.growing(2), "GrowingCache: take model.cache"),
        (lambda m: Cache.quantized(2, 4, group_size=8), "QuantizedCache: take model.cache"),
        (lambda m: Cache.paged(2, 8), "PagedCache: take model.cache"),
        (lambda m: m.cache(7), "room for 7 tokens and holds 7: none more fits"),
    ],
)
def test_caches_that_a_fixed_step_cannot_serve_are_refused(make, said):
    model = model_of(dtype=torch.float32)
    cache = make(model)
    model(prompt_of(1), cache)
    with pytest.raises(ValueError, match=said):
        DecodeGraph(model, cache, capture=False)


def test_an_empty_cache_another_model_s_and_a_cpu_are_refused():
    model = model_of(device="cpu")
    with pytest.raises(ValueError, match="run the prompt through the model first"):
        DecodeGraph(model, model.cache(8), capture=False)
    with pytest.raises(ValueError, match="3 layers, the model 2"):
        DecodeGraph(model, Cache.preallocated(3, 8), capture=False)
    cache, first = model.cache(8), torch.tensor([1])
    model(first[None], cache)
    with pytest.raises(ValueError, match=r"needs a CUDA GPU.*capture=False"):
        DecodeGraph(model, cache)
    with pytest.raises(ValueError, match="leave fused out"):
        DecodeGraph(model, cache, capture=False, fused=True)  # float64
    other = model_of(dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match=r"holds torch.float64.*model is torch.float32"):
        DecodeGraph(other, cache, capture=False)


def test_what_a_run_cannot_do_is_refused_and_changes_nothing(capture):
    model = model_of()
    cache, first = filled(model, prompt_of(2), capacity=10)
    graph = DecodeGraph(model, cache, capture=capture)
    for tokens, count, said in (
        (first, 4, "room for 10 tokens and holds 7: 4 more do not fit"),
        (first, 0, "at least 1; got 0"),
        (first, 1.5, "at least 1; got 1.5"),
        (first[:1], 1, r"int \[2\]"),
        (first.float(), 1, "float32"),
        (torch.tensor([0, 100]), 1, "ids from 0 to 99"),
    ):
        with pytest.raises(ValueError, match=said):
            graph.run(tokens, count)
    assert cache.lengths == (7, 7)
    graph.run(first, 3)
    assert cache.lengths == (10, 10)


def test_memory_that_moved_since_the_capture_is_found_out(capture):
    model = model_of()
    cache, first = filled(model, prompt_of(2))
    graph = DecodeGraph(model, cache, capture=capture)
    cache.select_rows(torch.tensor([1, 0], device=DEVICE))
    with pytest.raises(ValueError, match=r"select_rows.*make a new DecodeGraph"):
        graph.run(first, 1)
    graph = DecodeGraph(model, cache, capture=capture)
    model.norm.weight.data = model.norm.weight.data.clone()
    with pytest.raises(ValueError, match="weights lie elsewhere"):
        graph.run(first, 1)
