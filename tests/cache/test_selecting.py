"""A cache that reads the pages that may matter: against attention over exactly those, chosen in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import models
from labkit.attention import Constants, Visibility, attention
from labkit.cache import Cache, EvictingCache, SelectingCache
from labkit.cache.evicting import Window
from labkit.generation import generate
from tests.bounds import attention_bound
from tests.cache.test_evicting import DIM, GROUP, KV_HEADS, drawn, feed
from tests.shapes import TINY

PAGE = 4


def plainly(q, k, v, row, head, padding, seen, budget, window):
    """The answer for one KV head: bounds spelled out, channel by channel, over the pages that are read."""
    keys, values = k[row, head], v[row, head]
    newest = (seen - 1) // PAGE
    mine = q[row, head * GROUP : (head + 1) * GROUP, 0]
    here = seen - 1 - padding[row]
    bounds = {}
    for page in range(newest):
        last = page * PAGE + PAGE - 1 - padding[row]
        if last < 0 or (window is not None and last <= here - window):
            continue
        some = keys[page * PAGE : (page + 1) * PAGE]
        bounds[page] = max(
            sum(max(one[d] * some[:, d].min(), one[d] * some[:, d].max()) for d in range(DIM)) for one in mine
        )
    count = budget // PAGE - 1
    pages = sorted(sorted(bounds, key=lambda page: -bounds[page])[:count])
    places = [p * PAGE + i for p in pages for i in range(PAGE)] + list(range(newest * PAGE, seen))
    positions = torch.tensor([[place - padding[row] for place in places]])
    visible = Visibility(1, len(places), (here,), key_position=positions)
    return attention(
        mine[None, :, None], keys[places][None, None], values[places][None, None], Constants(window=window), visible
    )[0]


@given(
    counts=st.lists(st.one_of(st.just(1), st.integers(1, 11)), min_size=1, max_size=8),
    pad=st.integers(0, 9),
    budget=st.integers(8, 17),
    window=st.sampled_from([None, None, 6, 19]),
)
@settings(max_examples=40, deadline=None)
def test_a_decode_step_is_attention_over_the_pages_of_the_highest_bounds(counts, pad, budget, window):
    counts, seen = [12, *counts], 0
    padding = [0, pad]
    cache = Cache.selecting(1, budget, page_size=PAGE, window=window)
    dense = Cache.growing(1, window=window)
    for turn, count in enumerate(counts):
        q, k, v = drawn(2, count, turn)
        outs = []
        for one in (cache, dense):
            with one.step([count, count], padding=None if turn else padding) as step:
                one[0].append(k, v, step)
                outs.append(one[0].attend(q, step))
        seen += count
        if count > 1 or seen <= budget:
            assert torch.equal(*outs)  # exact
            continue
        for row in range(2):
            for head in range(KV_HEADS):
                expected = plainly(q, dense[0].k, dense[0].v, row, head, padding, seen, budget, window)
                got = outs[0][row, head * GROUP : (head + 1) * GROUP]
                torch.testing.assert_close(got, expected, rtol=0, atol=attention_bound(q, k, v) * 20)  # bounded


def test_bounds_are_above_every_product_and_below_none_that_is_read():
    cache = Cache.selecting(1, 8, page_size=PAGE)
    feed(cache, [22])
    q = drawn(2, 1, 9)[0]
    bounds = cache[0].bounds_of(q)
    products = torch.einsum("bhgd,bhtd->bhgt", q[:, :, 0].unflatten(1, (KV_HEADS, -1)), cache[0].k).flatten(1, 2)
    for page in range(6):
        assert (products[:, :, page * PAGE : (page + 1) * PAGE].amax(-1) <= bounds[:, :, page] + 1e-12).all()


def test_what_is_read_are_the_bounds_and_the_budget():
    cache = Cache.selecting(1, 12, page_size=PAGE)
    feed(cache, [40])
    before = cache[0].bytes_read
    feed(cache, [1], seed=3)
    tokens, pages = 2 * PAGE + 1, 11
    assert cache[0].bytes_read - before == 2 * KV_HEADS * DIM * 8 * 2 * (tokens + pages)
    assert cache.nbytes == 2 * KV_HEADS * DIM * 8 * 2 * (41 + pages)


def test_a_token_that_was_not_read_once_is_read_when_it_matters():
    cache = Cache.selecting(1, 8, page_size=PAGE)
    k, v = torch.zeros(2, 1, 1, 41, DIM, dtype=torch.float64)
    k[0, 0, 2, 0], k[0, 0, 21, 1], v[0, 0, 2, 0], v[0, 0, 21, 1] = 90.0, 90.0, 1.0, 1.0
    with cache.step([40]) as step:
        cache[0].append(k[:, :, :40], v[:, :, :40], step)
    with cache.step([1]) as step:
        cache[0].append(k[:, :, 40:], v[:, :, 40:], step)
        for channel in (0, 1, 0):
            q = torch.zeros(1, 1, 1, DIM, dtype=torch.float64)
            q[..., channel] = 9.0
            assert cache[0].attend(q, step)[0, 0, 0, channel] > 0.99


@pytest.mark.parametrize("before", [[], [6], [13, 1, 1]])
@pytest.mark.parametrize("count", [1, 7])
def test_an_error_in_a_step_takes_back_all_of_it(before, count):
    cache, other = (Cache.selecting(2, 8, page_size=PAGE) for _ in range(2))
    for one in (cache, other):
        feed(one, before)
    with pytest.raises(KeyboardInterrupt), cache.step([count, count]) as step:  # noqa: PT012
        cache[0].append(*drawn(2, count, 5)[1:], step)
        raise KeyboardInterrupt
    assert cache.nbytes == other.nbytes
    assert all(map(torch.equal, feed(cache, [3, 1, 1], seed=2), feed(other, [3, 1, 1], seed=2)))  # exact


def test_going_back_and_choosing_rows_keep_the_bounds_right():
    cache, other = (Cache.selecting(1, 8, page_size=PAGE) for _ in range(2))
    feed(cache, [18, 5, 1])
    cache.truncate(18)
    feed(other, [18])
    assert torch.equal(cache[0].low, other[0].low)
    assert torch.equal(cache[0].high, other[0].high)
    cache.select_rows(torch.tensor([1, 0, 1]))
    assert torch.equal(cache[0].high, other[0].high[[1, 0, 1]])
    feed(cache, [1, 1], batch=3)


def test_a_cut_that_fails_leaves_what_was(monkeypatch):
    cache = Cache([SelectingCache(8, page_size=PAGE)])
    feed(cache, [10])
    before = cache[0].k.clone(), cache[0].low.clone()
    monkeypatch.setattr(SelectingCache, "bound", lambda self, first: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        cache.truncate(6)
    monkeypatch.undo()
    assert cache.seq_len == 10
    assert torch.equal(cache[0].k, before[0])
    assert torch.equal(cache[0].low, before[1])
    feed(cache, [1])


def test_through_the_decoder_a_budget_above_all_changes_nothing_and_first_layers_may_read_all():
    model = models.random(TINY)
    tokens = torch.randint(0, 100, (1, 30), generator=torch.Generator().manual_seed(0))
    full = generate(model, tokens, 8)
    wide = Cache.selecting(TINY.num_layers, 99, page_size=PAGE)
    assert torch.equal(generate(model, tokens, 8, cache=wide).tokens, full.tokens)
    cache = Cache.selecting(TINY.num_layers, lambda layer: 99 if layer < 1 else 8, page_size=PAGE)
    generate(model, tokens, 8, cache=cache)
    assert cache[0].bytes_read > cache[1].bytes_read


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelectingCache(7, page_size=4), "at least two pages of 4: one is the newest; got 7"),
        (lambda: SelectingCache(16, page_size=0), "page_size is a number of tokens, at least 1; got 0"),
        (lambda: Cache.selecting(3, [16, 16]), "budget is given for 2 layers, and there are 3"),
    ],
)
def test_bad_input_is_one_clear_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_format_says_the_dtype_that_is_kept(dtype):
    for layer in (SelectingCache(32), EvictingCache(Window(), 32)):
        assert layer.format.dtype == "float16"
        k, v = torch.zeros(2, 1, 2, 8, 16, dtype=dtype)
        layer.append(k, v)
        assert layer.format.dtype == str(dtype).removeprefix("torch.")
