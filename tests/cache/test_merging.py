"""Caches that merge: against lists of entries, bytes, undo, and what an entry of several tokens counts for."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from labkit import models
from labkit.attention import attention
from labkit.cache import Cache
from labkit.cache.evicting import EvictingCache, KeyNorm, Merging, MergingCache
from labkit.cache.evicting.places import turned
from labkit.generation import generate
from labkit.sizing import Evicting, cache_bytes
from tests.bounds import attention_bound
from tests.cache.test_evicting import (
    DIM,
    FREQUENCIES,
    GROUP,
    KV_HEADS,
    assert_a_plan_that_fails_changes_nothing,
    assert_an_error_takes_back_the_step,
    drawn,
    feed,
)
from tests.shapes import TINY, shape


def policy(**options):
    return Merging(**{"frequencies": FREQUENCIES, "sinks": 1, "recent": 2} | options)


def turn(k, by):
    return turned(k[None], torch.tensor([by]), FREQUENCIES)[0]


class Entry:
    """One token, or several. key: as it is held; k: turned back."""

    def __init__(self, position, k, v):
        self.at, self.key, self.k, self.v, self.count = position, k, turn(k, -position), v, 1

    def joined_by(self, others):
        """The tokens of `others` become this entry's, too; the position is rounded once."""
        all_of = [self, *others]
        total = sum(e.count for e in all_of)
        self.at = round(sum(e.at * e.count for e in all_of) / total)
        self.k = sum(e.k * e.count for e in all_of) / total
        self.v = sum(e.v * e.count for e in all_of) / total
        self.key, self.count = turn(self.k, self.at), total


class Lists:
    """The same cache as lists: entries of each row and KV head in the order of positions, and the pairs to come."""

    def __init__(self, sinks, recent, budget, every, batch):
        self.sinks, self.recent, self.budget, self.every, self.seen = sinks, recent, budget, every, 0
        self.heads = {(row, head): [] for row in range(batch) for head in range(KV_HEADS)}
        self.ahead = {place: [] for place in self.heads}

    def pairs(self, entries, recent, most):
        """Every other entry with the neighbour that is more like it, the likeliest first."""
        found = []
        free = [e.at >= self.sinks and e.at <= self.seen - 1 - recent for e in entries]
        for i in range(0, len(entries), 2):
            near = [j for j in (i - 1, i + 1) if free[i] and 0 <= j < len(entries) and free[j]]
            if near:
                like = [torch.cosine_similarity(entries[i].k, entries[j].k, 0).item() for j in near]
                best = like.index(max(like))
                found.append((-like[best], entries[i], entries[near[best]]))
        return [pair[1:] for pair in sorted(found, key=lambda pair: pair[0])[:most]]

    def step(self, q, k, v):
        count, out = q.shape[2], torch.zeros_like(q)
        for (row, head), entries in self.heads.items():
            if count == 1 and self.ahead[row, head]:
                first, partner = self.ahead[row, head].pop(0)
                partner.joined_by([first])
                entries.remove(first)
            else:
                self.ahead[row, head] = []
            entries += [Entry(self.seen + i, k[row, head, i], v[row, head, i]) for i in range(count)]
            # An entry of n tokens is n equal ones.
            keys, values = (
                torch.stack([getattr(e, side) for e in entries for _ in range(e.count)])[None, None]
                for side in ("key", "v")
            )
            mine = slice(head * GROUP, (head + 1) * GROUP)
            out[row : row + 1, mine] = attention(q[row : row + 1, mine], keys, values)
        self.seen += count
        for place, entries in self.heads.items():
            while len(entries) > self.budget:
                pairs = self.pairs(entries, self.recent, len(entries) - self.budget)
                for partner in {id(partner): partner for _, partner in pairs}.values():
                    partner.joined_by([first for first, other in pairs if other is partner])
                for first, _ in pairs:
                    entries.remove(first)
            if len(entries) == self.budget and not self.ahead[place]:
                self.ahead[place] = self.pairs(entries, max(0, self.recent - 1), self.every)
        return out


def by_position(layer, row, head):
    kept = layer.kept
    order = kept.positions[row, head].argsort()
    return (x[row, head][order] for x in (kept.positions, kept.k, kept.v, 1 + kept.notes.tokens))


@given(
    counts=st.lists(st.one_of(st.just(1), st.integers(1, 9)), min_size=2, max_size=9),
    batch=st.integers(1, 2),
    budget=st.integers(4, 9),
    every=st.integers(1, 4),
    sinks=st.integers(0, 1),
    recent=st.integers(0, 2),
    seed=st.integers(0, 99),
)
@example(counts=[9, 9, 1, 1, 1], batch=2, budget=4, every=1, sinks=1, recent=2, seed=0)
@settings(max_examples=60, deadline=None)
def test_it_holds_and_answers_what_lists_do(counts, batch, budget, every, sinks, recent, seed):
    cache = Cache.evicting(1, policy(sinks=sinks, recent=recent), budget, every=every)
    lists = Lists(sinks, recent, budget, every, batch)
    for turn_, count in enumerate(counts):
        q, k, v = drawn(batch, count, 50 * seed + turn_)
        with cache.step([count] * batch) as step:
            cache[0].append(k, v, step)
            out = cache[0].attend(q, step)
        expected = lists.step(q, k, v)
        torch.testing.assert_close(out, expected, rtol=0, atol=attention_bound(q, k, v) * 1e3)  # bounded: turns
        for (row, head), entries in lists.heads.items():
            at, keys, values, counted = by_position(cache[0], row, head)
            assert at.tolist() == [e.at for e in entries]
            assert counted.tolist() == [e.count for e in entries]
            torch.testing.assert_close(keys, torch.stack([e.key for e in entries]), rtol=0, atol=1e-11)
            torch.testing.assert_close(values, torch.stack([e.v for e in entries]), rtol=0, atol=1e-11)
        assert (cache[0].seq_len, cache[0].physical_len) == (lists.seen, min(lists.seen, budget))


class TestWhatAnEntryCountsFor:
    def test_equal_neighbours_merged_are_answered_as_if_each_were_held(self):
        """Tokens without RoPE, in equal pairs: merging loses nothing, and one without counts would."""
        still = torch.zeros(DIM // 2)
        cache, full = Cache.evicting(1, policy(frequencies=still, sinks=0, recent=2), 6), Cache.growing(1)
        q, k, v = drawn(1, 10, 0)
        k[:, :, 1:8:2], v[:, :, 1:8:2] = k[:, :, 0:8:2], v[:, :, 0:8:2]
        for one in (cache, full):
            with one.step([10]) as step:
                one[0].append(k, v, step)
                one[0].attend(q, step)
        assert cache[0].physical_len == 6
        assert sorted((1 + cache[0].kept.notes.tokens[0, 0]).tolist()) == [1, 1, 2, 2, 2, 2]
        q, k, v = drawn(1, 70, 1)  # more queries than are weighed at once
        outs, seen = [], []
        for one in (cache, full):
            with one.step([70]) as step:
                one[0].append(k, v, step)
                outs.append(one[0].attend(q, step, observe=seen.append))
        torch.testing.assert_close(*outs, rtol=0, atol=1e-12)  # bounded
        assert [x.shape[3] for x in seen] == [76, 80]
        torch.testing.assert_close(seen[0].sum(-1), torch.ones(1, KV_HEADS * GROUP, 70, dtype=torch.float64))

    def test_what_was_turned_to_two_places_is_averaged_at_one(self):
        """One key at positions 4 and 5: turned back it is the same, and so it is as long as before."""
        cache = Cache.evicting(1, policy(sinks=0, recent=1), 7)
        q, k, v = drawn(1, 8, 0)
        k[:, :, 5] = k[:, :, 4]
        k = turned(k, torch.arange(8), FREQUENCIES)
        with cache.step([8]) as step:
            cache[0].append(k, v, step)
            cache[0].attend(q, step)
        two = cache[0].kept.notes.tokens == 1
        assert cache[0].positions[two].tolist() == [4, 4]  # 4.5, rounded to even
        torch.testing.assert_close(cache[0].kept.k[two], k[0, :, 4], rtol=0, atol=1e-12)  # bounded

    def test_what_joins_nothing_stays_exact(self):
        cache = Cache.evicting(1, policy(), 9)
        q, k, v = drawn(2, 12, 0, torch.bfloat16)
        with cache.step([12, 12]) as step:
            cache[0].append(k, v, step)
            cache[0].attend(q, step)
        kept = cache[0].kept
        single = kept.notes.tokens == 0
        assert 0 < single.sum() < single.numel()
        for held, came in ((kept.k, k), (kept.v, v)):
            right = came.gather(2, kept.positions.long()[..., None].expand_as(held))
            assert torch.equal(held[single], right[single])


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("before", [[], [5], [9], [14], [14, 1, 1], [14, 1, 4]])
class TestUndo:
    @pytest.mark.parametrize("count", [1, 6])
    def test_an_error_anywhere_in_a_step_takes_back_all_of_it(self, every, before, count):
        def made():
            cache = Cache.evicting(2, policy(), 9, every=every)
            feed(cache, before)
            return cache

        assert_an_error_takes_back_the_step(made, count)

    def test_a_plan_that_fails_in_one_layer_merges_in_none(self, every, before, monkeypatch):
        cache = Cache.evicting(2, policy(), 9, every=every)
        feed(cache, before)
        assert_a_plan_that_fails_changes_nothing(cache, 9, monkeypatch)

    def test_rows_chosen_are_the_rows_and_go_on_alike(self, every, before):
        cache, whole = (Cache.evicting(1, policy(), 9, every=every) for _ in range(2))
        for one in (cache, whole):
            feed(one, before)
        if not before:
            return
        cache.select_rows(torch.tensor([1, 0]))
        for turn_, count in enumerate((1, 1, 3)):
            q, k, v = drawn(2, count, turn_)
            outs = []
            for one, rows in ((cache, [1, 0]), (whole, [0, 1])):
                with one.step([count] * 2) as step:
                    one[0].append(k[rows], v[rows], step)
                    outs.append(one[0].attend(q[rows], step))
            torch.testing.assert_close(outs[0], outs[1][[1, 0]], rtol=0, atol=1e-13)  # bounded


class TestMemory:
    @given(
        counts=st.lists(st.one_of(st.just(1), st.integers(1, 9)), min_size=1, max_size=9),
        budget=st.integers(4, 12),
        every=st.integers(1, 5),
        during=st.sampled_from(["always", "prompt"]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    )
    @settings(max_examples=60, deadline=None)
    def test_bytes_are_what_sizing_says_at_every_step(self, counts, budget, every, during, dtype):
        every = every if during == "always" else 1
        cache, seen = Cache.evicting(2, policy(), budget, every=every, during=during), 0
        model = shape(num_layers=2, num_heads=KV_HEADS * GROUP, num_kv_heads=KV_HEADS, head_dim=DIM)
        for count in counts:
            feed(cache, [count], seed=seen, batch=1, dtype=dtype)
            seen += count
            said = cache[0].format
            kept = Evicting(said.budget, str(dtype), said.prompt_tokens, said.tally, said.victims)
            assert cache.nbytes == cache_bytes(model, seen, 1, kept)
            held = min(seen, budget) if during == "always" else min(counts[0], budget) + seen - counts[0]
            assert cache[0].physical_len == held
            counted = 1 + cache[0].kept.notes.tokens
            assert (counted.sum(-1) == seen).all()  # every token counts, once

    def test_a_full_cache_moves_and_allocates_nothing_in_decode(self):
        cache = Cache.evicting(1, policy(), 9, every=2)
        feed(cache, [12, 1])
        layer = cache[0]
        before = layer.kept.k.data_ptr(), layer.kept.v.data_ptr(), layer.kept.positions.data_ptr(), layer.bytes_copied
        feed(cache, [1] * 5, seed=9)
        kept = layer.kept
        assert before == (kept.k.data_ptr(), kept.v.data_ptr(), kept.positions.data_ptr(), layer.bytes_copied)

    def test_one_goes_back_to_where_nothing_was_merged_yet_counts_and_all(self):
        cache = Cache.evicting(1, policy(), 9, during="prompt")
        feed(cache, [14])
        counted = cache[0].kept.notes.tokens.clone()
        feed(cache, [3, 1], seed=3)
        cache.truncate(14)
        assert torch.equal(cache[0].kept.notes.tokens, counted)
        with pytest.raises(ValueError, match="what Merging evicted after 14 is lost"):
            cache.truncate(13)
        feed(cache, [1], seed=4)


class TestThroughTheDecoder:
    def test_memory_stays_flat_and_each_row_is_answered_as_alone(self):
        model = models.random(TINY)
        merging = Merging(frequencies=model.frequencies, sinks=1, recent=2)
        tokens = torch.randint(0, 100, (2, 14), generator=torch.Generator().manual_seed(0))
        alone, batch = (Cache.evicting(TINY.num_layers, merging, 8) for _ in range(2))
        one, two = generate(model, tokens[1:], 10, cache=alone), generate(model, tokens, 10, cache=batch)
        assert {step.cache_bytes for step in one.steps} == {alone.nbytes}
        assert torch.equal(one.tokens[0], two.tokens[1])

    def test_filled_in_inference_mode_it_goes_on_outside(self):
        cache = Cache.evicting(1, policy(), 6)
        with torch.inference_mode():
            feed(cache, [4, 1, 1])
        feed(cache, [1, 4], seed=5)
        with torch.inference_mode():
            feed(cache, [1, 1], seed=9)


class TestBadInput:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (
                lambda: EvictingCache(policy(), 8),
                r"as only a MergingCache does \(Cache.evicting makes one without nbits",
            ),
            (lambda: Cache.evicting(1, policy(), 40, nbits=4), "packed numbers would be rounded anew"),
            (lambda: MergingCache(KeyNorm(), 8), r"merges as Merging says; got KeyNorm"),
            (lambda: Cache.evicting(1, policy(), 3), "beside 1 sinks and the newest 2: take a budget of at least 4"),
            (lambda: feed(Cache.evicting(1, policy(), 0.5), [6]), "a budget of 3 entries leaves none to merge into"),
            (lambda: feed(Cache.evicting(1, policy(), 8), [6], padding=[0, 2]), "padding would be averaged"),
            (lambda: Cache.evicting(1, policy(), 8, window=5), "leave window out"),
            (lambda: Cache.evicting(1, policy(), 8, during="prompt", safeguard=0.2), "leave safeguard out"),
            (lambda: Cache.evicting(1, policy(), 8, frequencies=FREQUENCIES), "leave frequencies out"),
            (
                lambda: feed(Cache.evicting(1, policy(frequencies=FREQUENCIES[:3]), 8), [6]),
                "turn 6 channels; keys have",
            ),
        ],
    )
    def test_is_one_clear_line(self, make, message):
        with pytest.raises(ValueError, match=message) as error:
            make()
        assert "\n" not in str(error.value)
