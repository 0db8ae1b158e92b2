"""Caches that evict and pack: which tokens, which groups, which bytes, and what can be undone."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from labkit import models
from labkit.attention import Constants, Visibility, attention
from labkit.cache import Cache, EvictingQuantizedCache
from labkit.cache.evicting import H2O, KeyNorm, Notes, Policy, SnapKV, Window
from labkit.cache.evicting.packed import group_ranks
from labkit.generation import generate
from labkit.kernels.quantize import quantized
from labkit.quantization import Quantizer
from labkit.sizing import cache_bytes
from tests.bounds import attention_bound
from tests.cache.test_evicting import DIM, KV_HEADS, drawn, feed
from tests.shapes import TINY, shape

OPTIONS = {"nbits": 8, "group_size": 8, "residual_length": 3}
POLICIES: dict[str, Policy] = {
    "sinks and window": Window(sinks=2),
    "key norm": KeyNorm(),
    "H2O": H2O(recent=2),
    "SnapKV": SnapKV(window=2, pool=3),
}


def made(name, budget=40, **options):
    return Cache.evicting(2, POLICIES[name], budget, **OPTIONS, **options)


def everything(layer):
    """All of a layer's state, copied."""
    kept = layer.kept
    if kept is None:
        return layer.lengths, layer.nbytes, layer.lost_at, ()
    packed = [x.rows for x in kept.packed or ()]
    tensors = [*packed, kept.k, kept.v, kept.positions, kept.notes.tokens]
    return layer.lengths, layer.nbytes, layer.lost_at, tuple(None if x is None else x.clone() for x in tensors)


def same(one, other):
    return one[:3] == other[:3] and all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in zip(one[3], other[3], strict=True)
    )


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("during", ["always", "prompt"])
def test_the_first_cut_keeps_what_the_dense_cache_keeps_and_packs_it(name, during):
    packed, dense = made(name, during=during), Cache.evicting(2, POLICIES[name], 40, during=during)
    counts, padding = [64], [0, 9]
    outs, expected = feed(packed, counts, padding=padding), feed(dense, counts, padding=padding)
    assert torch.equal(outs[0], expected[0])  # exact: what a step attends to is packed at its end
    kept, right = packed[0].kept, dense[0].kept
    order = right.positions.argsort(dim=-1)
    assert torch.equal(kept.positions, right.positions.gather(2, order))
    k, v = (x.gather(2, order[..., None].expand(-1, -1, -1, DIM)) for x in (right.k, right.v))
    assert (kept.packed_tokens, kept.k.shape[2]) == (32, 8)
    for x, own, waits, axis in ((k, kept.packed[0], kept.k, "channel"), (v, kept.packed[1], kept.v, "token")):
        assert torch.equal(own.rows, quantized(x[:, :, :32], Quantizer(8, 8, axis)).rows)  # exact
        assert torch.equal(waits, x[:, :, 32:])


@given(
    counts=st.lists(st.one_of(st.just(1), st.integers(1, 60)), min_size=1, max_size=10),
    pad=st.integers(0, 9),
    name=st.sampled_from(list(POLICIES)),
    during=st.sampled_from(["always", "prompt"]),
    window=st.sampled_from([None, None, 7, 30]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@example(counts=[30, 11, 1], pad=3, name="key norm", during="always", window=None, dtype=torch.float64)
@example(counts=[19, 8, 22, 14, 36, 1, 6, 1, 21], pad=3, name="H2O", during="always", window=None, dtype=torch.float64)
@settings(max_examples=60, deadline=None)
def test_attention_is_that_over_what_is_held_and_bytes_are_the_formats(counts, pad, name, during, window, dtype):
    padding = [0, min(pad, counts[0] - 1)]
    cache, seen = made(name, during=during, window=window), 0
    for turn, count in enumerate(counts):
        q, k, v = drawn(2, count, turn, dtype)
        with cache.step([count, count], padding=None if turn else padding) as step:
            for layer in cache.layers:
                layer.append(k, v, step)
            keys, values = cache[0].held()
            first = tuple(seen - skip for skip in padding)
            visible = Visibility(count, keys.shape[2], first, key_position=cache[0].positions.clone())
            out = cache[0].attend(q, step)
            cache[1].attend(q, step)
        expected = attention(q, keys, values, Constants(window=window), visible)
        bound = attention_bound(q, keys, values, sums=torch.float32)
        torch.testing.assert_close(out, expected, rtol=0, atol=bound)  # bounded: loops sum in float32
        seen += count
        held = cache[0].physical_len
        if during == "always":
            assert held == (seen if seen <= 40 else 40 - (40 - seen) % 8)
        packed = max(0, held - 3) // 8 * 8
        token = 2 * DIM * (1 + 4 / 8)  # of each number a code, and its part of a group's scale and zero point
        tally = 4 * held if POLICIES[name].lasting and during == "always" else 0
        numbers = packed * token + (held - packed) * 2 * DIM * dtype.itemsize
        assert cache.nbytes == 2 * 2 * KV_HEADS * (numbers + 4 * held) + 2 * 2 * KV_HEADS * tally
        positions = cache[0].positions
        assert (positions.diff(dim=-1)[positions[:, :, 1:] > 0] > 0).all()  # in their order


def test_the_group_that_goes_is_that_of_the_lowest_mean_score_for_each_head():
    cache = made("key norm")
    feed(cache, [40])
    kept = cache[0].kept
    k, _ = kept.dense()
    groups = k[:, :, :32].norm(dim=-1).unflatten(2, (4, 8)).mean(-1).argmax(-1)  # KeyNorm keeps the smallest
    gone = kept.positions[:, :, :32].unflatten(2, (4, 8)).gather(2, groups[..., None, None].expand(-1, -1, 1, 8))
    feed(cache, [1], seed=3)
    assert cache[0].physical_len == 33
    assert not (cache[0].positions[..., None] == gone[:, :, 0, None]).any()


def test_what_a_cut_or_a_packing_moves_is_counted():
    cache = made("key norm")
    for turn, (count, held) in enumerate([(39, 39), (1, 40), (1, 33), (1, 34)]):
        layer = cache[0]
        before, waiting = layer.bytes_copied, 0 if layer.kept is None else layer.kept.k.nbytes + layer.kept.v.nbytes
        packed = 0 if layer.kept is None else layer.kept.packed_tokens
        feed(cache, [count], seed=turn, dtype=torch.float32)
        assert layer.physical_len == held
        kept = layer.kept
        numbers = kept.k.nbytes + kept.v.nbytes + sum(x.nbytes for x in kept.packed)
        anew = (held < 40 and turn == 2) or kept.packed_tokens != packed  # cut, or packed
        assert layer.bytes_copied - before == waiting + (numbers if anew else 0)


def test_a_group_with_a_protected_token_stays_and_hidden_ones_count_for_nothing():
    inf, least = math.inf, torch.finfo(torch.float32).min
    ranks = torch.tensor([[5.0, inf], [-inf, -inf], [-inf, 3.0], [least, -inf], [1.0, 2.0]])
    assert group_ranks(ranks[:, None]).flatten().tolist() == [inf, -inf, 3.0, -inf, 1.5]


def test_what_is_evicted_is_gone_whatever_it_was():
    cache = made("sinks and window")
    q, k, v = drawn(2, 70, 0, torch.float32)
    k[:, :, 2:32], v[:, :, 2:32] = math.nan, math.nan
    with cache.step([70, 70]) as step:
        for layer in cache.layers:
            layer.append(k, v, step)
            layer.attend(q, step)
    assert all(out.isfinite().all() for out in feed(cache, [1] * 6 + [9, 1], seed=4, dtype=torch.float32))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("before", [[], [5], [40], [60], [60, 1, 1]])
@pytest.mark.parametrize("count", [1, 9])
def test_an_error_in_a_step_takes_back_all_of_it(name, before, count, monkeypatch):
    cache = made(name)
    feed(cache, before)
    was = [everything(layer) for layer in cache.layers]
    monkeypatch.setattr(cache[1], "plan", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        feed(cache, [count], seed=7)
    assert all(map(same, was, [everything(layer) for layer in cache.layers]))
    monkeypatch.undo()
    other = made(name)
    feed(other, before)
    after, untouched = feed(cache, [count, 1, 1], seed=8), feed(other, [count, 1, 1], seed=8)
    assert all(map(torch.equal, after, untouched))  # exact


def test_rows_chosen_are_the_rows():
    cache, whole = made("key norm"), made("key norm")
    for one in (cache, whole):
        feed(one, [60])
    cache.select_rows(torch.tensor([1, 1, 0]))
    assert torch.equal(cache[0].held()[0], whole[0].held()[0][[1, 1, 0]])
    assert torch.equal(cache[0].positions, whole[0].positions[[1, 1, 0]])
    assert 2 * cache.nbytes == 3 * whole.nbytes
    feed(cache, [1, 9], batch=3)


def test_going_back_cuts_groups_that_came_since_the_last_was_lost_and_no_further():
    cache = made("key norm", during="prompt")
    feed(cache, [60, 21])
    held = cache[0].held()
    cache.truncate(63)
    assert (cache.seq_len, cache[0].physical_len) == (63, 43)
    for now, before in zip(cache[0].held(), held, strict=True):
        assert torch.equal(now, before[:, :, :43])
    with pytest.raises(ValueError, match="cannot go back to 59 tokens: what KeyNorm evicted after 60 is lost"):
        cache.truncate(59)
    feed(cache, [1, 7], seed=2)
    assert cache[0].physical_len == 51


def test_a_range_that_float16_cannot_hold_makes_all_metadata_bfloat16():
    cache = Cache.evicting(1, Window(), 40, **OPTIONS)
    q, k, v = drawn(1, 40, 0, torch.float32)
    with cache.step([40]) as step:
        cache[0].append(k, v, step)
    with cache.step([16]) as step:
        cache[0].append(k[:, :, :16] * 1e6, v[:, :, :16], step)
    assert [x.quantizer.metadata for x in cache[0].kept.packed] == [torch.bfloat16] * 2  # kernels take one format
    assert all(x.isfinite().all() for x in cache[0].held())
    with cache.step([1]) as step:
        cache[0].append(k[:, :, :1], v[:, :, :1], step)
        assert cache[0].attend(q[:, :, :1], step).isfinite().all()


def test_through_the_decoder_bytes_stay_below_those_of_a_full_one_and_padding_changes_nothing():
    model = models.random(TINY)
    tokens = torch.randint(0, 100, (1, 40), generator=torch.Generator().manual_seed(0))
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.int64), tokens), dim=1)
    both = torch.cat((torch.randint(0, 100, (1, 45)), padded))
    options = {"nbits": 4, "group_size": 8, "residual_length": 4}
    alone, batch = (Cache.evicting(TINY.num_layers, Window(sinks=1), 37, **options) for _ in range(2))
    one = generate(model, tokens, 9, cache=alone)
    generate(model, both, 9, cache=batch, padding=[0, 5])
    most = 37 * (2 * TINY.head_dim * 4 + 4) * TINY.num_kv_heads * TINY.num_layers
    assert max(step.cache_bytes for step in one.steps) < most
    # A padded row has seen five fewer tokens of its own: it is at another place of the round in which groups go.
    window = alone[0].positions[0, 0].tolist()
    assert window[-20:] == list(range(28, 48))
    assert batch[0].positions[1, 0].tolist()[-20:] == list(range(28, 48))


def test_where_no_victim_is_chosen_ahead_a_policy_that_has_not_looked_on_is_not_asked():
    class Noted(Policy):
        def watch(self, seen):
            return Notes(rows=(seen.k.norm(dim=-1),))

        def score(self, held):
            return held.notes.rows[0]

    cache = Cache.evicting(2, Noted(), 40, **OPTIONS)
    for turn, count in enumerate((40, 1, 1)):
        q, k, v = drawn(1, count, turn, torch.float32)
        with cache.step([count]) as step:
            for layer in cache.layers:
                layer.append(k, v, step)
                layer.attend(q, step)
    assert cache[0].physical_len == 34


def test_gradients_reach_what_waits():
    cache = Cache.evicting(1, Window(), 40, **OPTIONS)
    q, k, v = drawn(1, 20, 0, torch.float32)
    with cache.step([20]) as step:
        cache[0].append(k, v, step)
    new = k[:, :, :1].clone().requires_grad_()
    with cache.step([1]) as step:
        cache[0].append(new, v[:, :, :1], step)
        cache[0].attend(q[:, :, :1], step).sum().backward()
    assert new.grad.abs().sum() > 0


@pytest.mark.parametrize("prompt", [30, 60])
def test_its_format_is_what_it_takes_also_once_a_prompt_was_cut(prompt):
    cache = Cache.evicting(2, KeyNorm(), 40, during="prompt", **OPTIONS)
    for turn, count in enumerate((prompt, *[1] * 12)):
        q, k, v = drawn(1, count, turn, torch.float32)
        with cache.step([count]) as step:
            for layer in cache.layers:
                layer.append(k, v, step)
                layer.attend(q, step)
        kept = replace(cache[0].format, packing=replace(cache[0].format.packing, dtype="float32"))
        model = shape(num_layers=2, num_heads=q.shape[1], num_kv_heads=KV_HEADS, head_dim=DIM)
        assert cache.nbytes == cache_bytes(model, step.after[0], 1, kept)


class TestBadInput:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Cache.evicting(1, Window(), 20, nbits=3), "nbits"),
            (lambda: EvictingQuantizedCache(Window(), 20, every=2), "here whole groups go: leave it out"),
            (lambda: EvictingQuantizedCache(Window(), 0), "a budget of 0 tokens"),
            (
                lambda: feed(Cache.evicting(1, Window(sinks=1), 32, **OPTIONS), [3]),
                "a budget of 32 tokens leaves no group of 8 to evict beside the sinks and the newest: take a budget of "
                "at least 35",
            ),
            (lambda: feed(Cache.evicting(1, Window(), 99, nbits=4, group_size=16), [3]), "groups of 16 do not divide"),
        ],
    )
    def test_is_one_clear_line(self, make, message):
        with pytest.raises(ValueError, match=message) as error:
            make()
        assert "\n" not in str(error.value)
