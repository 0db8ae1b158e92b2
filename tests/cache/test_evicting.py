"""Evicting caches against lists of (position, K, V), and what they promise: bytes, undo, and that evicted is gone."""

import contextlib
import copy
import math
import pickle
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from labkit import models
from labkit.attention import Constants, Visibility, attention, fused_attention
from labkit.cache import Cache, EvictingCache, GrowingCache, Step
from labkit.cache.evicting import (
    H2O,
    TOVA,
    ExpectedAttention,
    Held,
    KeyDiff,
    KeyNorm,
    Notes,
    Policy,
    Random,
    SnapKV,
    Window,
    pyramid,
)
from labkit.cache.evicting.merging import Merging, MergingCache
from labkit.cache.evicting.packed import EvictingQuantizedCache
from labkit.cache.evicting.places import turned
from labkit.cache.evicting.policy import Seen
from labkit.cache.step import rectangle
from labkit.generation import generate
from tests.bounds import attention_bound
from tests.cache.test_cache import RunsOut as RunsOutAnywhere
from tests.cache.test_cache import interrupted_at
from tests.shapes import TINY

KV_HEADS, GROUP, DIM = 2, 2, 8
FREQUENCIES = 1.0 / 100.0 ** (torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
POLICIES: dict[str, Policy] = {
    "window": Window(),
    "sinks and window": Window(sinks=2),
    "H2O": H2O(),
    "H2O, mean, two sinks": H2O(mean=True, recent=1, sinks=2),
    "TOVA": TOVA(),
    "TOVA by head": TOVA(by_head=True),
    "SnapKV": SnapKV(window=3, pool=3),
    "key norm": KeyNorm(),
    "KeyDiff": KeyDiff(recent=2),
    "expected attention": ExpectedAttention(frequencies=FREQUENCIES, sinks=2, future=5),
    "random": Random(seed=3),
}


def drawn(batch, count, seed, dtype=torch.float64):
    """q, k and v of new tokens."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
    return [
        torch.randn(batch, heads, count, DIM, generator=generator, dtype=torch.float64).to(dtype) for heads in sizes
    ]


def feed(cache, counts, seed=0, batch=2, padding=None, dtype=torch.float64, frequencies=None):
    """Steps of so many tokens through every layer; what the first layer answered."""
    outs = []
    for turn, count in enumerate(counts):
        first = padding if padding is not None and not cache.lengths else None
        with cache.step([count] * batch, padding=first) as step:
            answers = []
            for index, layer in enumerate(cache.layers):
                q, k, v = drawn(batch, count, 1000 * index + turn + seed, dtype)
                layer.append(k, v, step)
                answers.append(layer.attend(q, step))
        outs.append(answers[0])
    return outs


@dataclass(eq=False)
class Token:
    """What a list remembers of a token."""

    position: int
    k: torch.Tensor
    v: torch.Tensor
    tally: float = 0.0


class Lists:
    """The same cache as plain lists: one of tokens for each row and KV head."""

    def __init__(self, policy, budget, batch, padding, window=None):
        self.policy, self.budget, self.padding, self.seen = policy, budget, padding, 0
        self.constants = Constants(window=window)
        self.heads = {(row, head): [] for row in range(batch) for head in range(KV_HEADS)}
        self.victims: dict[Any, Token | None] = dict.fromkeys(self.heads)

    def step(self, q, k, v):
        count, out, weights = q.shape[2], torch.zeros_like(q), {}
        for (row, head), tokens in self.heads.items():
            if count == 1 and self.victims[row, head] is not None:
                tokens.remove(self.victims[row, head])
            first = self.seen - self.padding[row]
            tokens += [Token(max(-1, first + i), k[row, head, i], v[row, head, i]) for i in range(count)]
            keys, values = (torch.stack([getattr(token, side) for token in tokens])[None, None] for side in "kv")
            positions = torch.tensor([[token.position for token in tokens]])
            visible = Visibility(count, len(tokens), (first,), key_position=positions)
            mine = slice(head * GROUP, (head + 1) * GROUP)
            out[row : row + 1, mine], weights[row, head] = attention(
                q[row : row + 1, mine], keys, values, self.constants, visible, return_weights=True
            )
        self.seen += count
        for place in self.heads:
            self.note(place, weights)
        for (row, head), tokens in self.heads.items():
            newest = self.seen - self.padding[row] - 1
            recent = self.policy.recent_of(self.budget)
            scores = self.scores(tokens, newest)  # once, for both
            if len(tokens) > self.budget:
                order = self.order(tokens, scores, newest, recent)
                self.heads[row, head] = tokens = [token for token in tokens if token in order[-self.budget :]]
            full = len(tokens) == self.budget
            self.victims[row, head] = self.order(tokens, scores, newest, max(0, recent - 1))[0] if full else None
        return out

    def note(self, place, weights):
        tokens, own = self.heads[place], weights[place][0]  # [heads of this KV head, queries, tokens]
        for index, token in enumerate(tokens):
            got = own[:, :, index].mean(0)
            if isinstance(self.policy, H2O):
                token.tally += got.sum().item()
            elif isinstance(self.policy, TOVA):
                every = [weights[place[0], head][0, :, -1, index].mean() for head in range(KV_HEADS)]
                token.tally = (got[-1] if self.policy.by_head else sum(every) / KV_HEADS).item()
            elif isinstance(self.policy, SnapKV):
                window = self.policy.window
                left = max(0.0, 1 - len(got) / window)
                token.tally = left * token.tally + got[-window:].sum().item() / window

    def order(self, tokens, scores, newest, recent):
        """Who goes first."""
        window, policy = self.constants.window, self.policy

        def place(token):
            if token.position < 0:
                return 0, 0.0
            if window is not None and token.position <= newest + 1 - window:
                return 1, 0.0
            if token.position < policy.sinks or token.position > newest - recent:
                return 3, 0.0
            return 2, scores[id(token)]

        return sorted(tokens, key=place)

    def scores(self, tokens, newest):
        policy = self.policy
        if isinstance(policy, SnapKV):
            line = sorted(tokens, key=lambda token: token.position)
            last = newest + 1 - (self.constants.window or math.inf)  # what the next query does not see
            before = [token.tally if last < token.position <= newest - policy.window else 0.0 for token in line]
            half = policy.pool // 2
            return {
                id(token): sum(before[max(0, i - half) : i + half + 1]) / policy.pool for i, token in enumerate(line)
            }
        if isinstance(policy, KeyDiff):
            last = max(-1, newest + 1 - (self.constants.window or math.inf))  # what the next query does not see
            real = [token.k / token.k.norm() for token in tokens if token.position > last]
            mean = torch.stack(real).mean(0)
            return {id(t): -torch.cosine_similarity(t.k, mean, dim=0).item() for t in tokens}
        if isinstance(policy, H2O) and policy.mean:
            window = self.constants.window or math.inf
            return {id(t): t.tally / min(newest + 1 - t.position, window) for t in tokens}
        if isinstance(policy, KeyNorm):
            return {id(t): -t.k.norm().item() for t in tokens}
        if isinstance(policy, Window):
            return {id(t): t.position for t in tokens}
        return {id(t): t.tally for t in tokens}


def by_position(layer, row, head):
    """Position, K and V of what a KV head holds, in order."""
    kept = layer.kept
    order = kept.positions[row, head].argsort(stable=True)
    return kept.positions[row, head][order].tolist(), kept.k[row, head][order], kept.v[row, head][order]


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in ("expected attention", "random")])
@given(
    counts=st.lists(st.one_of(st.just(1), st.integers(1, 9)), min_size=2, max_size=9),
    batch=st.integers(1, 2),
    budget=st.integers(5, 9),
    pad=st.integers(0, 5),
    window=st.sampled_from([None, None, 4, 11]),
    seed=st.integers(0, 99),
)
@example(counts=[1, 1, 1, 7, 1, 2, 2], batch=2, budget=8, pad=0, window=11, seed=1)  # unseen tokens: any of them stay
@settings(max_examples=12, deadline=None)
def test_each_policy_keeps_and_answers_what_a_list_does(name, counts, batch, budget, pad, window, seed):
    policy, padding = POLICIES[name], [0, min(pad, counts[0] - 1)][:batch]
    cache = Cache.evicting(1, policy, budget, window=window)
    lists = Lists(policy, budget, batch, padding, window)
    for turn, count in enumerate(counts):
        q, k, v = drawn(batch, count, 50 * seed + turn)
        with cache.step([count] * batch, padding=None if turn else padding) as step:
            cache[0].append(k, v, step)
            out = cache[0].attend(q, step)
        expected = lists.step(q, k, v)
        torch.testing.assert_close(out, expected, rtol=0, atol=attention_bound(q, k, v) * 20)  # bounded
        for (row, head), tokens in lists.heads.items():
            positions, keys, values = by_position(cache[0], row, head)
            tokens = sorted(tokens, key=lambda token: token.position)
            last = lists.seen - padding[row] - (window or math.inf)  # of padding and what left the window, any may stay
            real = sum(position < 0 or position <= last for position in positions)
            assert positions[real:] == [token.position for token in tokens if 0 <= token.position > last]
            assert torch.equal(keys[real:], torch.stack([token.k for token in tokens])[real:])  # exact
            assert torch.equal(values[real:], torch.stack([token.v for token in tokens])[real:])
        assert (cache[0].seq_len, cache[0].physical_len) == (lists.seen, min(lists.seen, budget))


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in ("expected attention", "random")])
@pytest.mark.parametrize("padding", [[0, 0], [0, 2]])
def test_layers_that_choose_victims_together_keep_what_each_one_s_list_does(name, padding, monkeypatch):
    together = []
    choose = EvictingCache.plan.__globals__["victims_together"]

    def watched(layers, step):
        together.append((found := choose(layers, step)) is not None)
        return found

    monkeypatch.setitem(EvictingCache.plan.__globals__, "victims_together", watched)
    policy, budget = POLICIES[name], 7
    cache = Cache.evicting(3, policy, budget)
    lists = [Lists(policy, budget, 2, padding) for _ in cache.layers]
    for turn, count in enumerate([9, 1, 1, 1, 3, 1, 1, 1, 1]):
        given_to = [drawn(2, count, 100 * index + turn) for index in range(3)]
        with cache.step([count] * 2, padding=None if turn else padding) as step:
            outs = []
            for layer, (q, k, v) in zip(cache.layers, given_to, strict=True):
                layer.append(k, v, step)
                outs.append(layer.attend(q, step))
        for layer, one, (q, k, v), out in zip(cache.layers, lists, given_to, outs, strict=True):
            torch.testing.assert_close(out, one.step(q, k, v), rtol=0, atol=attention_bound(q, k, v) * 20)  # bounded
            for (row, head), tokens in one.heads.items():
                right = sorted(token.position for token in tokens)
                assert by_position(layer, row, head)[0] == right
    assert sum(together) == 7  # every step of one token, but none that cuts


AT_ONCE = [name for name, policy in POLICIES.items() if not policy.reads_held]


@pytest.mark.parametrize("name", AT_ONCE)
@pytest.mark.parametrize("every", [1, 3])
def test_layers_asked_at_the_end_of_a_step_note_what_each_notes_when_it_attends(name, every):
    layers, budget = 3, 12 if name == "SnapKV" else 9
    alone, together = (Cache.evicting(layers, POLICIES[name], budget, every=every) for _ in range(2))
    for turn, count in enumerate([14, 1, 1, 1, 1, 4, 1, 1]):
        given_to = [drawn(2, count, 100 * index + turn) for index in range(layers)]
        outs = []
        with together.step([count] * 2) as step:
            for layer, (q, k, v) in zip(together.layers, given_to, strict=True):
                layer.append(k, v, step)
                outs.append(layer.attend(q, step))
        for layer, (q, k, v), out in zip(alone.layers, given_to, outs, strict=True):
            own = rectangle(2, count, layer.lengths)  # nobody is asked at the end of it
            layer.append(k, v, own)
            assert torch.equal(layer.attend(q, own), out)  # exact
            layer.settle(layer.plan(own))
        assert all(map(same, map(everything, together.layers), map(everything, alone.layers)))  # exact


OTHERS = {
    "merging between": lambda policy: [
        EvictingCache(policy, 9), MergingCache(Merging(frequencies=torch.ones(DIM // 2)), 9), EvictingCache(policy, 9),
    ],
    "a full layer between": lambda policy: [EvictingCache(policy, 9), GrowingCache(), EvictingCache(policy, 9)],
    "another budget": lambda policy: [EvictingCache(policy, 9), EvictingCache(policy, 10), EvictingCache(policy, 9)],
    "policies of their own": lambda policy: [EvictingCache(replace(policy), 9), EvictingCache(replace(policy), 9)],
    "packed between": lambda policy: [
        EvictingCache(policy, 9), EvictingQuantizedCache(policy, 32, 4, group_size=4, residual_length=4),
        EvictingCache(policy, 9),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", AT_ONCE)
@pytest.mark.parametrize("mix", OTHERS)
def test_whatever_layers_stand_between_each_notes_what_it_would_alone(name, mix):
    policy = POLICIES[name] if name != "SnapKV" else SnapKV(window=3)
    layers, alone = OTHERS[mix](policy), OTHERS[mix](policy)
    cache = Cache(layers)
    for turn, count in enumerate([12, *[1] * 10]):
        given_to = [drawn(2, count, 100 * index + turn) for index in range(len(layers))]
        with cache.step([count] * 2) as step:
            for layer, (q, k, v) in zip(layers, given_to, strict=True):
                layer.append(k, v, step)
                layer.attend(q, step)
        for layer, (q, k, v) in zip(alone, given_to, strict=True):
            own = rectangle(2, count, layer.lengths)
            layer.append(k, v, own)
            layer.attend(q, own)
            if (plan := layer.plan(own)) is not None:
                layer.settle(plan)
    for layer, own in zip(layers, alone, strict=True):
        if isinstance(layer, EvictingCache):
            assert torch.equal(layer.positions, own.positions)  # exact
            notes, others = layer.kept.notes, own.kept.notes
            assert (notes.tokens is None) == (others.tokens is None)
            assert notes.tokens is None or torch.equal(notes.tokens, others.tokens)
            assert all(map(torch.equal, notes.rows, others.rows))


@pytest.mark.parametrize("name", AT_ONCE)
@pytest.mark.parametrize("asked", ["not at all", "without the step", "twice"])
def test_however_often_and_by_which_step_a_layer_is_asked_it_notes_as_if_alone(name, asked):
    policy = POLICIES[name] if name != "SnapKV" else SnapKV(window=3)
    cache, alone = Cache.evicting(2, policy, 9), Cache.evicting(2, policy, 9)
    for turn, count in enumerate([12, 1, 1, 1]):
        given_to = [drawn(2, count, 100 * index + turn) for index in range(2)]
        with cache.step([count] * 2) as step:
            for layer, (q, k, v) in zip(cache.layers, given_to, strict=True):
                layer.append(k, v, step)
                if count > 1 or asked == "twice":
                    layer.attend(q, step)
                if asked == "twice" and count == 1:
                    layer.attend(-q, step)
                if asked == "without the step" and count == 1:
                    layer.attend(q)
        for layer, (q, k, v) in zip(alone.layers, given_to, strict=True):
            own = rectangle(2, count, layer.lengths)
            layer.append(k, v, own)
            if count > 1 or asked != "not at all":
                layer.attend(q, own)
            if asked == "twice" and count == 1:
                layer.attend(-q, own)
            layer.settle(layer.plan(own))
    assert all(map(same, map(everything, cache.layers), map(everything, alone.layers)))  # exact


@pytest.mark.parametrize("name", AT_ONCE)
def test_a_copy_of_one_layer_holds_no_other_layer_s_notes(name):
    cache = Cache.evicting(8, POLICIES[name], 12)
    feed(cache, [14, 1, 1])
    for copied in (copy.deepcopy(cache[3]), pickle.loads(pickle.dumps(cache[3]))):
        for x in (copied.kept.notes.tokens, *copied.kept.notes.rows):
            assert x is None or x.untyped_storage().nbytes() == x.nbytes


class ReadsValues(TOVA):
    """A policy of a learner's own: another `watch` than that of the class that it extends."""

    lasting: ClassVar[bool] = True

    def watch(self, seen):
        return Notes(seen.received(1) * seen.v.norm(dim=-1).float())


def test_a_subclass_with_its_own_watch_sees_what_is_held():
    assert not ReadsValues().is_shown_at_once
    feed(Cache.evicting(2, ReadsValues(), 9), [14, 1, 1, 1])


class Claims(Policy):
    """Says that it reads nothing of what is held."""

    lasting: ClassVar[bool] = True
    reads_held: ClassVar[bool] = False

    def __init__(self, watch):
        super().__init__()
        object.__setattr__(self, "watch_", watch)

    def watch(self, seen):
        return self.watch_(seen)

    def score(self, held):
        return held.positions


@pytest.mark.parametrize(
    ("watch", "error"),
    [
        (lambda seen: Notes(seen.tally + seen.k.norm(dim=-1)), (ValueError, "reads K, V or positions")),
        (lambda seen: Notes(seen.tally, (seen.q[:1],)), (ValueError, "notes of rows are")),
        (lambda seen: Notes(seen.tally[:1]), (ValueError, "notes a number for each token held")),
    ],
)
def test_a_policy_that_reads_more_than_it_says_or_notes_other_rows_is_refused_and_changes_nothing(watch, error):
    cache = Cache.evicting(2, Claims(lambda seen: Notes(seen.tally + seen.received())), 9)
    feed(cache, [14, 1])
    for layer in cache.layers:
        layer.policy = Claims(watch)
    was = [everything(layer) for layer in cache.layers]
    with pytest.raises(error[0], match=error[1]):
        feed(cache, [1], seed=7)
    assert all(map(same, was, map(everything, cache.layers)))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("during", ["always", "prompt"])
def test_what_keeps_everything_is_the_dense_cache(name, during):
    counts, padding = [7, 1, 1, 4, 1], [0, 3]
    evicting = Cache.evicting(1, POLICIES[name], 99, during=during, window=6)
    dense = Cache.growing(1, window=6)
    outs, expected = feed(evicting, counts, padding=padding), feed(dense, counts, padding=padding)
    assert all(torch.equal(a, b) for a, b in zip(evicting[0].held(), dense[0].held(), strict=True))  # exact
    for out, right in zip(outs, expected, strict=True):
        if POLICIES[name].lasting and during == "always":  # bounded: one query's weights are spelled out
            torch.testing.assert_close(out, right, rtol=0, atol=1e-13)
        else:
            assert torch.equal(out, right)  # exact


def test_a_budget_of_the_window_is_a_window():
    evicting, dense = Cache.evicting(1, KeyNorm(), 5, window=5), Cache.growing(1, window=5)
    counts = [9, 1, 1, 3, 1, 1]
    for out, right in zip(feed(evicting, counts), feed(dense, counts), strict=True):
        torch.testing.assert_close(out, right, rtol=0, atol=1e-13)  # bounded


class TestScores:
    """Against weights that are spelled out, on a prompt in one pass."""

    def scores(self, policy, k, v, q, budget=8):
        layer = EvictingCache(policy, budget)
        step = rectangle(len(k), k.shape[2])
        layer.append(k, v, step)
        layer.attend(q, step)
        kept = layer.kept
        return policy.score(Held(kept.k, kept.v, kept.positions, k.shape[2] - 1, Constants(), kept.notes))

    def test_of_heavy_hitters_are_columns_of_all_weights_however_long_the_prompt(self):
        q, k, v = drawn(2, 150, 1)
        _, weights = attention(q, k, v, return_weights=True)
        columns = weights.sum(2).unflatten(1, (KV_HEADS, GROUP)).mean(2)
        torch.testing.assert_close(self.scores(H2O(), k, v, q).double(), columns, rtol=1e-6, atol=0)  # float32's
        seen_by = torch.arange(150, 0, -1)
        got = self.scores(H2O(mean=True), k, v, q).double()
        torch.testing.assert_close(got, columns / seen_by, rtol=1e-6, atol=0)

    def test_of_snapkv_are_the_window_s_pooled(self):
        q, k, v = drawn(2, 40, 2)
        _, weights = attention(q, k, v, return_weights=True)
        before = weights[:, :, -6:, :-6].mean(2)
        pooled = torch.nn.functional.avg_pool1d(before, 5, stride=1, padding=2)
        expected = pooled.unflatten(1, (KV_HEADS, GROUP)).mean(2)
        got = self.scores(SnapKV(window=6), k, v, q)[:, :, :-6].double()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
        by_head = before.unflatten(1, (KV_HEADS, GROUP)).mean(2)
        expected = torch.stack([by_head[:, :, max(0, i - 2) : i + 3].amax(-1) for i in range(34)], dim=-1)
        got = self.scores(SnapKV(window=6, pool_by="max"), k, v, q)[:, :, :-6].double()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)

    def test_of_expected_attention_are_the_papers_formula(self):
        q, k, v = drawn(1, 12, 3)
        sinks, future = 2, 5
        policy = ExpectedAttention(frequencies=FREQUENCIES, sinks=sinks, future=future)

        def turn(position):
            angle = position * FREQUENCIES
            cos, sin = torch.diag(angle.cos()), torch.diag(angle.sin())
            return torch.cat((torch.cat((cos, -sin), 1), torch.cat((sin, cos), 1)), 0)

        ahead = torch.stack([turn(position) for position in range(12, 12 + future)]).mean(0)
        expected = torch.zeros(1, KV_HEADS, 12 - sinks, dtype=torch.float64)
        for head in range(KV_HEADS * GROUP):
            plain = torch.stack([turn(-i) @ q[0, head, i] for i in range(sinks, 12)])
            mean, spread = ahead @ plain.mean(0), ahead @ torch.cov(plain.T, correction=0) @ ahead.T
            keys = k[0, head // GROUP, sinks:]
            logits = keys @ mean / DIM**0.5 + (keys @ spread * keys).sum(1) / DIM / 2
            expected[0, head // GROUP] += torch.softmax(logits, 0) / GROUP
        expected *= v[:, :, sinks:].norm(dim=-1)
        got = self.scores(policy, k, v, q)[:, :, sinks:].double()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)

    @given(
        counts=st.lists(st.one_of(st.just(1), st.integers(1, 9)), min_size=1, max_size=30),
        sinks=st.integers(0, 4),
    )
    @settings(max_examples=40, deadline=None)
    def test_of_expected_attention_come_from_sums_over_all_queries_so_far(self, counts, sinks):
        """Bounded: float32 sums of at most 270 numbers of order 1, and their products, beside float64's."""
        cache = Cache.evicting(1, ExpectedAttention(frequencies=FREQUENCIES, sinks=sinks), 8)
        feed(cache, counts)
        q = torch.cat([drawn(2, count, turn)[0] for turn, count in enumerate(counts)], dim=2)
        angle = torch.arange(q.shape[2])[:, None] * FREQUENCIES
        (one, two), cos, sin = q.chunk(2, dim=-1), angle.cos(), angle.sin()
        plain = torch.cat((one * cos + two * sin, two * cos - one * sin), dim=-1)[:, :, sinks:]
        count, sums = (row.double() for row in cache[0].kept.notes.rows)
        assert count.shape == (2, KV_HEADS * GROUP, 1)
        assert (count == plain.shape[2]).all()
        torch.testing.assert_close(sums[..., :-1], plain.mT @ plain, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(sums[..., -1], plain.sum(2), rtol=1e-5, atol=1e-3)

    def test_of_key_differences_are_the_same_whatever_stands_in_padding(self):
        _, k, v = drawn(1, 8, 4)
        positions = torch.tensor([-1, -1, 0, 1, 2, 3, 4, 5], dtype=torch.int32).expand(1, KV_HEADS, -1)
        found = []
        for padding in (0.0, math.inf, math.nan):
            k[:, :, 0] = padding
            found.append(KeyDiff().score(Held(k, v, positions, 5, Constants(), Notes()))[:, :, 2:])
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])

    def test_of_expected_attention_follow_positions_that_are_written_in_place(self):
        """As a buffer does that somebody's own loop keeps."""
        policy, positions, found = ExpectedAttention(frequencies=FREQUENCIES, sinks=0), torch.tensor([[7]]), []
        q, k, v = drawn(1, 1, 6)
        for position in (7, 700):
            positions.fill_(position)
            held = torch.full((1, KV_HEADS, 1), position, dtype=torch.int32)
            seen = Seen(k, v, held, position, Constants(), Notes(), q, positions, Visibility.newest(1, 1))
            found.append(policy.watch(seen).rows[1][..., -1].double())
            plain = turned(q, -positions[:, None], FREQUENCIES)[:, :, 0]
            torch.testing.assert_close(found[-1], plain, rtol=0, atol=1e-5 * plain.abs().max().item())
        assert not torch.equal(*found)

    def test_by_chance_every_token_seen_is_as_likely_to_be_held(self):
        held = torch.zeros(40)
        for seed in range(60):
            cache = Cache.evicting(2, Random(seed=seed), 10)
            feed(cache, [8] + [1] * 32, batch=1)
            for layer in cache.layers:
                held.index_add_(0, layer.positions[0].flatten().long(), torch.ones(20))
        # 240 draws of a quarter: four standard errors are 27. The newest is always held when it attends.
        assert (held[:-1] - 60).abs().max() < 30
        assert not torch.equal(cache[0].positions, cache[1].positions)

    def test_of_nan_are_the_lowest_and_infinite_ones_do_not_pass_what_is_protected(self):
        class Strange(Policy):
            def score(self, held):
                scores = torch.full(held.positions.shape, math.inf)
                return scores.masked_fill(held.positions == 5, math.nan)

        cache = Cache.evicting(1, Strange(sinks=2, recent=3), 8)
        feed(cache, [9])
        assert cache[0].positions[0, 0].tolist() == [0, 1, 2, 3, 4, 6, 7, 8]

    @pytest.mark.parametrize("wrong", [lambda held: held.k, lambda held: 3.0, lambda held: held.tally[:, :1]])
    def test_of_another_shape_are_an_error_that_undoes_the_step(self, wrong):
        class Wrong(Policy):
            def score(self, held):
                return wrong(held)

        cache = Cache.evicting(1, Wrong(), 4)
        with pytest.raises(ValueError, match=r"Wrong\.score gives \[batch, num_kv_heads, tokens\], here \[2, 2, 5\]"):
            feed(cache, [5])
        assert cache.lengths == ()

    def test_a_policy_of_ones_own_takes_ten_lines(self):
        class MuchRead(Policy):
            lasting = True

            def watch(self, seen):
                return Notes(seen.tally + seen.received())

            def score(self, held):
                return held.tally

        own, h2o = Cache.evicting(1, MuchRead(recent=4), 8), Cache.evicting(1, H2O(), 8)
        assert all(map(torch.equal, feed(own, [9, 1, 1, 4, 1]), feed(h2o, [9, 1, 1, 4, 1])))


class TestMemory:
    @pytest.mark.parametrize("name", POLICIES)
    def test_bytes_inside_a_step_are_those_allocated(self, name):
        cache, inside = Cache.evicting(1, POLICIES[name], 9), []
        feed(cache, [20])
        layer = cache[0]
        for turn in range(3):
            with cache.step([1] * 2) as step:
                q, k, v = drawn(2, 1, turn)
                layer.append(k, v, step)
                layer.attend(q, step)
                kept, spare = layer.kept, layer.spare
                tensors = [kept.k, kept.v, kept.positions, kept.victims, kept.notes.tokens, *kept.notes.rows]
                tensors += [spare.slots, spare.k, spare.v, spare.positions]
                storages = [x.untyped_storage() for x in tensors if x is not None]
                inside.append(layer.nbytes - sum({x.data_ptr(): x.nbytes() for x in storages}.values()))
        assert inside == [0, 0, 0]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", POLICIES)
    def test_bytes_are_the_budgets_to_the_byte_at_every_step(self, name, dtype):
        policy, budget, batch = POLICIES[name], 9, 2
        cache, seen = Cache.evicting(2, policy, budget), 0
        for count in [4, 3, 1, 1, 1, 1, 6, 1]:
            feed(cache, [count], seed=seen, dtype=dtype)
            seen += count
            held = min(seen, budget)
            token = 2 * DIM * dtype.itemsize + 4 + (4 if policy.lasting and not policy_notes_rows(policy) else 0)
            rows = 4 * KV_HEADS * GROUP * (DIM**2 + DIM + 1) if policy_notes_rows(policy) else 0
            victims = 8 if held == budget else 0
            assert cache.nbytes == 2 * batch * (KV_HEADS * (held * token + victims) + rows)

    def test_a_full_cache_moves_and_allocates_nothing_in_decode(self):
        cache = Cache.evicting(1, H2O(), 8)
        feed(cache, [12, 1])
        layer = cache[0]
        before = layer.kept.k.data_ptr(), layer.kept.v.data_ptr(), layer.kept.positions.data_ptr(), layer.bytes_copied
        feed(cache, [1] * 5, seed=9)
        kept = layer.kept
        assert before == (kept.k.data_ptr(), kept.v.data_ptr(), kept.positions.data_ptr(), layer.bytes_copied)

    def test_a_decode_step_reads_exactly_the_budget(self):
        cache = Cache.evicting(1, KeyNorm(), 8)
        feed(cache, [12])
        before = cache[0].bytes_read
        feed(cache, [1], seed=5)
        assert cache[0].bytes_read - before == 2 * 2 * KV_HEADS * 8 * DIM * 8

    @pytest.mark.parametrize("during", ["always", "prompt"])
    def test_what_is_evicted_is_gone_whatever_it_was(self, during):
        cache = Cache.evicting(1, Window(sinks=1), 6, during=during)
        q, k, v = drawn(2, 12, 0)
        k[:, :, 1:7], v[:, :, 1:7] = math.nan, math.nan
        with cache.step([12, 12]) as step:
            cache[0].append(k, v, step)
            cache[0].attend(q, step)
        assert all(out.isfinite().all() for out in feed(cache, [1, 1, 3, 1], seed=4))

    def test_a_token_overwritten_in_decode_is_gone_too(self):
        cache = Cache.evicting(1, Window(), 4)
        feed(cache, [4])
        cache[0].kept.k[:, :, 0] = cache[0].kept.v[:, :, 0] = math.nan  # the oldest
        assert feed(cache, [1], seed=3)[0].isfinite().all()

    def test_several_victims_at_once_are_those_of_the_lowest_scores_in_turn(self):
        cache = Cache.evicting(1, KeyNorm(), 8, every=3)
        feed(cache, [12])
        layer = cache[0]
        norms = layer.kept.k.norm(dim=-1)
        expected = layer.positions.gather(2, norms.argsort(dim=-1, descending=True)[:, :, :3]).clone()
        for turn in range(3):
            victim = layer.positions.view(-1)[layer.kept.victims[turn]][:, :, None]
            assert torch.equal(victim[:, :, 0], expected[:, :, turn])
            feed(cache, [1], seed=20 + turn)
            assert not (layer.positions == victim).any()
        assert layer.kept.used == 0  # new ones are chosen

    def test_a_window_that_chooses_several_victims_at_once_loses_the_same_tokens_at_the_same_steps(self):
        at_once = [Cache.evicting(2, Window(sinks=2), 12, every=every) for every in (1, 5)]
        for cache in at_once:
            feed(cache, [20])
        for turn in range(13):
            for cache in at_once:
                feed(cache, [1], seed=40 + turn)
            for one, other in zip(at_once[0].layers, at_once[1].layers, strict=True):
                assert torch.equal(one.positions.sort(dim=-1).values, other.positions.sort(dim=-1).values)


def policy_notes_rows(policy):
    return isinstance(policy, ExpectedAttention)


def everything(layer):
    """All of a layer's state, copied."""
    kept = layer.kept
    if kept is None:
        return layer.lengths, layer.nbytes, layer.room, layer.lost_at, None
    tensors = [kept.k, kept.v, kept.positions, kept.victims, kept.notes.tokens, *kept.notes.rows]
    state = layer.lengths, layer.nbytes, layer.room, layer.lost_at, layer.first_ended, kept.used
    return (*state, [None if x is None else x.clone() for x in tensors])


def same(one, other):
    (*numbers, tensors), (*others, rest) = one, other
    if numbers != others or (tensors is None) != (rest is None):
        return False
    return tensors is None or all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in zip(tensors, rest, strict=True)
    )


BEFORE = {"empty": [], "growing": [5], "just full": [9], "cut": [14], "decoding": [14, 1, 1]}


def assert_an_error_takes_back_the_step(made, count):
    """A step of `count` tokens, ended after each number of appends and attends, leaves what `made` makes as it was."""
    for place in range(5):
        cache, left = made(), place
        was = [everything(layer) for layer in cache.layers]
        with pytest.raises(KeyboardInterrupt), cache.step([count, count]) as step:  # noqa: PT012
            for layer in cache.layers:
                q, k, v = drawn(2, count, 77)
                for act in (lambda: layer.append(k, v, step), lambda: layer.attend(q, step)):  # noqa: B023
                    if not left:
                        raise KeyboardInterrupt
                    act()
                    left -= 1
            raise KeyboardInterrupt
        assert all(map(same, was, [everything(layer) for layer in cache.layers]))
        after, untouched = feed(cache, [count, 1], seed=8), feed(made(), [count, 1], seed=8)
        assert all(map(torch.equal, after, untouched))  # exact


def assert_a_plan_that_fails_changes_nothing(cache, count, monkeypatch):
    """The second layer's plan raises after a step of `count` tokens: no layer has changed."""
    was = [everything(layer) for layer in cache.layers]
    monkeypatch.setattr(cache[1], "plan", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        feed(cache, [count], seed=5)
    assert all(map(same, was, [everything(layer) for layer in cache.layers]))


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("name", POLICIES)
class TestUndo:
    """Exact, to the bit: K, V, positions, notes, victims, bytes."""

    def made(self, name, before, **options):
        cache = Cache.evicting(2, POLICIES[name], 9, **options)
        feed(cache, BEFORE[before])
        return cache

    @pytest.mark.parametrize("count", [1, 6])
    def test_an_error_anywhere_in_a_step_takes_back_all_of_it(self, name, before, count):
        assert_an_error_takes_back_the_step(lambda: self.made(name, before), count)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
    def test_a_copy_made_after_an_undone_step_goes_on_as_the_original_does(self, name, before, copied):
        cache = self.made(name, before)
        undone(cache)
        other = copied(cache)
        for turn in range(3):
            assert torch.equal(*(feed(one, [1], seed=50 + turn)[0] for one in (cache, other)))
        assert same(everything(cache[0]), everything(other[0]))

    def test_a_step_undone_in_inference_mode_can_be_taken_outside(self, name, before):
        cache = self.made(name, before)
        with torch.inference_mode():
            undone(cache)
        plain = self.made(name, before)
        assert torch.equal(*(feed(one, [1], seed=50)[0] for one in (cache, plain)))

    @pytest.mark.parametrize("count", [1, 9])
    def test_a_plan_that_fails_in_one_layer_evicts_in_none(self, name, before, count, monkeypatch):
        assert_a_plan_that_fails_changes_nothing(self.made(name, before), count, monkeypatch)

    def test_rows_chosen_are_the_rows_and_go_on_alike(self, name, before):
        cache, whole = self.made(name, before), self.made(name, before)
        cache.select_rows(torch.tensor([1, 1, 0]))
        if not whole.lengths:
            return
        (a,), (b,) = (feed_rows(one, rows) for one, rows in ((cache, [1, 1, 0]), (whole, [0, 1])))
        torch.testing.assert_close(a, b[[1, 1, 0]], rtol=0, atol=1e-13)  # bounded
        assert torch.equal(cache[0].positions, whole[0].positions[[1, 1, 0]])


def undone(cache):
    """A step that fails when it has written."""
    with contextlib.suppress(ZeroDivisionError), cache.step([1] * 2) as step:
        cache[0].append(*drawn(2, 1, 8)[1:], step)
        raise ZeroDivisionError


def feed_rows(cache, rows):
    """One step in which each row gets the token of row `rows[i]` of two."""
    q, k, v = (x[rows] for x in drawn(2, 1, 31))
    with cache.step([1] * len(rows)) as step:
        outs = []
        for layer in cache.layers:
            layer.append(k, v, step)
            outs.append(layer.attend(q, step))
    return outs[:1]


class RunsOut(RunsOutAnywhere):
    """Writing in place takes no memory."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scatter_" in str(func):
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


class TestWhereStepsEnd:
    def test_memory_that_runs_out_anywhere_leaves_the_cache_as_it_was(self):
        for count, place in [(count, place) for count in (1, 6) for place in range(0, 60, 3)]:
            cache = Cache.evicting(2, H2O(), 9)
            feed(cache, [14])
            was = [everything(layer) for layer in cache.layers]
            try:
                with RunsOut(place):
                    feed(cache, [count], seed=3)
            except MemoryError:
                assert all(map(same, was, [everything(layer) for layer in cache.layers]))

    @pytest.mark.parametrize("count", [1, 6])
    def test_an_interrupt_at_any_line_leaves_the_old_the_new_or_a_refusal(self, count):
        def made():
            cache = Cache.evicting(2, KeyNorm(), 9)
            feed(cache, [14])
            return cache

        done = made()
        feed(done, [count], seed=3)
        right = [[everything(layer) for layer in cache.layers] for cache in (made(), done)]
        line = 0
        while True:
            line += 1
            cache = made()
            if not interrupted_at(line, lambda cache=cache: feed(cache, [count], seed=3), in_the_caches):
                break
            try:
                cache.check_whole()
            except RuntimeError:
                cache.reset()
                continue
            now = [everything(layer) for layer in cache.layers]
            assert any(all(map(same, now, states)) for states in right), line
        assert line > 50

    def test_without_one_a_layer_grows_and_a_settled_one_is_cut(self):
        layer = EvictingCache(KeyNorm(), 4)
        for turn, count in enumerate([3, 3, 1]):
            q, k, v = drawn(1, count, turn)
            step = layer.step_of(k, None)
            layer.append(k, v)
            layer.attend(q)
        assert (layer.seq_len, layer.physical_len) == (7, 7)
        layer.settle(layer.plan(step))
        assert (layer.seq_len, layer.physical_len) == (7, 4)
        for turn in range(3):
            layer.append(*drawn(1, 1, 9 + turn)[1:])
        assert (layer.seq_len, layer.physical_len) == (10, 6)  # one took a victim's slot, the others wait for an end

    def test_there_is_no_way_back_behind_one_at_which_a_token_was_lost(self):
        cache = Cache.evicting(1, KeyNorm(), 4)
        feed(cache, [3])
        mark = cache[0].mark()
        feed(cache, [4])
        with pytest.raises(RuntimeError, match="a token was evicted since, after 7 tokens"):
            cache[0].restore(mark)

    def test_a_copy_is_a_cache_of_its_own(self):
        cache = Cache.evicting(1, H2O(), 6)
        feed(cache, [9])
        fork = copy.deepcopy(cache)
        was = everything(cache[0])
        feed(fork, [1, 1], seed=4)
        assert same(was, everything(cache[0]))


def in_the_caches(file):
    """Whether an interrupt is tried at this file's lines."""
    return "labkit/cache/" in file and not file.endswith(("policy.py", "step.py"))


class TestGoingBack:
    def test_to_where_nothing_was_lost_yet(self):
        cache = Cache.evicting(2, KeyNorm(), 9)
        feed(cache, [5, 4])
        cache.truncate(5)
        assert (cache.seq_len, cache[0].physical_len) == (5, 5)
        other = Cache.evicting(2, KeyNorm(), 9)
        feed(other, [5])
        assert all(map(torch.equal, feed(cache, [6, 1], seed=2), feed(other, [6, 1], seed=2)))  # exact

    def test_behind_the_prompt_that_was_cut_and_no_further(self):
        cache = Cache.evicting(2, SnapKV(window=2), 0.5, during="prompt")
        feed(cache, [12, 3, 1])
        cache.truncate(12)
        assert (cache.seq_len, cache[0].physical_len) == (12, 6)
        with pytest.raises(
            ValueError, match=r"cannot go back to 11 tokens: what SnapKV evicted after 12 is lost.*copy"
        ):
            cache.truncate(11)
        assert (cache.seq_len, cache[0].physical_len) == (12, 6)
        cache.truncate(0)
        assert (cache.seq_len, cache.nbytes) == (0, 0)

    def test_not_where_one_layer_could_and_another_could_not(self):
        cache = Cache.evicting(2, KeyNorm(), [20, 5])
        feed(cache, [8, 1])
        with pytest.raises(ValueError, match="evicted after 9 is lost"):
            cache.truncate(8)
        assert cache.lengths == (9, 9)

    def test_not_behind_what_a_policy_has_noted(self):
        cache = Cache.evicting(1, H2O(), 20)
        feed(cache, [5, 3])
        with pytest.raises(ValueError, match="H2O has noted the attention of those that came after"):
            cache.truncate(5)
        assert cache.seq_len == 8


class TestPlacesInTheCache:
    """Keys and queries turned to 0, 1, 2, ... among what is held."""

    @given(
        counts=st.lists(st.integers(1, 5), min_size=1, max_size=6),
        pad=st.integers(0, 4),
        name=st.sampled_from(["sinks and window", "key norm", "random"]),
    )
    @example(counts=[1, 1], pad=2, name="sinks and window")  # a token takes the slot of padding
    @settings(max_examples=25, deadline=None)
    def test_attention_is_that_of_keys_that_came_there(self, counts, pad, name):
        counts, padding = [7, *counts], [0, pad]
        cache = Cache.evicting(1, POLICIES[name], 6, frequencies=FREQUENCIES)
        layer, seen, plain = cache[0], 0, {}
        for turn, count in enumerate(counts):
            q, k, v = drawn(2, count, turn)
            at = torch.arange(seen, seen + count) - torch.tensor(padding)[:, None]
            for row in range(2):
                for i, position in enumerate(at[row].tolist()):
                    plain[row, position] = k[row, :, i]
            with cache.step([count, count], padding=None if turn else padding) as step:
                layer.append(*(turned(k, at[:, None], FREQUENCIES), v), step)
                held = layer.positions.clone()
                values = layer.kept.v.clone()
                out = layer.attend(turned(q, at[:, None], FREQUENCIES), step)
            seen += count
            for row in range(2):
                for head in range(KV_HEADS):
                    order = held[row, head].argsort()
                    order = order[held[row, head][order] >= 0]
                    keys = torch.stack([plain[row, p][head] for p in held[row, head][order].tolist()])
                    keys = turned(keys, torch.arange(len(order)), FREQUENCIES)
                    real = min(count, len(order))
                    own = torch.arange(len(order) - real, len(order))
                    mine = q[row : row + 1, head * GROUP : (head + 1) * GROUP, count - real :]
                    got = out[row : row + 1, head * GROUP : (head + 1) * GROUP, count - real :]
                    expected = attention(
                        turned(mine, own, FREQUENCIES), keys[None, None], values[row, head][order][None, None]
                    )
                    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)  # bounded: float64's angles

    def test_a_window_that_scores_otherwise_is_no_window(self):
        """The short way is for tokens without a gap."""

        class Every(Window):
            def score(self, held):
                return (held.positions % 3 == 0).float()

        q, k, v = drawn(1, 12, 0)
        outs = []
        for observe in (None, lambda weights: None):  # whoever observes goes the long way
            layer = (cache := Cache.evicting(1, Every(sinks=1), 6, frequencies=FREQUENCIES))[0]
            for start, count in ((0, 8), (8, 1), (9, 1), (10, 1)):
                with cache.step([count]) as step:
                    layer.append(k[:, :, start : start + count], v[:, :, start : start + count], step)
                    out = layer.attend(q[:, :, start : start + count], step, observe=observe)
            outs.append(out)
        torch.testing.assert_close(*outs, rtol=0, atol=1e-9)  # bounded: float64's angles

    def test_frequencies_of_another_head_dim_are_an_error(self):
        cache = Cache.evicting(1, Window(), 6, frequencies=FREQUENCIES[:3])
        with pytest.raises(ValueError, match="3 frequencies turn 6 channels; keys have 8"):
            feed(cache, [2])


class TestBadInput:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: EvictingCache(Window(), 0), "a budget of 0 tokens leaves nothing to attend to: take at least 1"),
            (lambda: EvictingCache(Window(), 1.5), "a fraction of the prompt, above 0 and at most 1; got 1.5"),
            (lambda: EvictingCache(Window(), True), "a budget is a whole number"),
            (lambda: EvictingCache(Window(sinks=4), 4), "4 sinks and the newest 1: take a budget of at least 5"),
            (lambda: EvictingCache(SnapKV(window=9), 8), "SnapKV always keeps, 0 sinks and the newest 9"),
            (lambda: EvictingCache(Window, 8), "policy is one of labkit.cache.evicting's"),
            (lambda: EvictingCache(Window(), 8, during="decode"), 'during is "always" or "prompt"; got'),
            (lambda: EvictingCache(Window(), 8, every=0), "every is a number of steps, at least 1; got 0"),
            (lambda: EvictingCache(Window(), 8, every=2, during="prompt"), "leave every out"),
            (lambda: EvictingCache(Window(), 8, safeguard=0.2), 'take during="prompt" with safeguard'),
            (lambda: EvictingCache(Window(), 8, during="prompt", safeguard=2.0), "a fraction of the budget, 0 to 1"),
            (
                lambda: EvictingCache(Window(), 8, during="prompt", safeguard=0.2, frequencies=FREQUENCIES),
                "leave frequencies or safeguard out",
            ),
            (lambda: Window(sinks=-1), "sinks are a number of tokens, 0 or more; got -1"),
            (lambda: H2O(recent=1.5), "recent is a number of tokens, or as a float a fraction"),
            (lambda: SnapKV(window=0), "window is a number of tokens, at least 1"),
            (lambda: SnapKV(pool=4), "pool is an odd number"),
            (lambda: SnapKV(pool_by="sum"), 'pool_by is "mean" or "max"; got'),
            (lambda: ExpectedAttention(frequencies=FREQUENCIES, future=0), "future is a number of positions"),
            (lambda: Cache.evicting(3, Window(), [4, 5]), "budget is given for 2 layers, and there are 3"),
            (lambda: EvictingCache(Window(), 0.5).format, "known with the first tokens"),
            (lambda: pyramid(0, 3), "a budget of 0 tokens"),
            (lambda: pyramid(8, 3, steepness=0.5), "a steepness of at least 1"),
        ],
    )
    def test_is_one_clear_line(self, make, message):
        with pytest.raises(ValueError, match=message) as error:
            make()
        assert "\n" not in str(error.value)

    def test_an_observation_window_longer_than_the_prompt_cuts_nothing_or_says_so(self):
        cache = Cache.evicting(1, SnapKV(window=9), 12)
        feed(cache, [5])
        assert cache[0].physical_len == 5
        part = Cache.evicting(1, SnapKV(window=9), 0.5)
        with pytest.raises(ValueError, match="a budget of 2 tokens cannot hold what SnapKV always keeps"):
            feed(part, [5])
        assert part.lengths == ()

    def test_rows_of_two_lengths_are_refused_as_by_other_caches_of_one_length(self):
        layer = EvictingCache(Window(), 8)
        with pytest.raises(ValueError, match=r"EvictingCache keeps rows of one length.*pad the rows at the left"):
            layer.append(*drawn(1, 5, 0)[1:], Step((2, 3), (0, 0)))

    def test_an_empty_layer_has_nothing_to_attend_to(self):
        with pytest.raises(ValueError, match="append before you attend"):
            EvictingCache(Window(), 8).attend(drawn(1, 1, 0)[0], rectangle(1, 1))

    def test_notes_that_do_not_fit_are_an_error(self):
        class Wrong(Policy):
            def __init__(self, notes):
                super().__init__()
                object.__setattr__(self, "notes", notes)

            def watch(self, seen):
                return self.notes

            def score(self, held):
                return held.tally

        for notes, message in [
            (None, "returns Notes; got a NoneType"),
            (Notes(torch.zeros(2, 2, 3)), r"each token held, \[2, 2, 5\]; got \[2, 2, 3\]"),
            (Notes(rows=(torch.zeros(3),)), r"notes of rows are \[2, \.\.\.\] each"),
        ]:
            with pytest.raises(ValueError, match=message):
                feed(Cache.evicting(1, Wrong(notes), 4), [5])


class TestBudgets:
    @given(budget=st.integers(1, 400), layers=st.integers(1, 40), steepness=st.floats(1, 30))
    def test_a_pyramid_spends_exactly_what_all_layers_have(self, budget, layers, steepness):
        parts = pyramid(budget, layers, steepness=steepness)
        assert sum(parts) == budget * layers
        assert min(parts) >= 1
        assert all(a + 1 >= b for a, b in pairwise(parts))  # but for rounding, never more above

    def test_a_pyramid_of_fractions_stays_below_one(self):
        parts = pyramid(0.8, 5)
        assert max(parts) <= 1
        assert sum(parts) / 5 == pytest.approx(0.8)

    def test_each_layer_has_its_own(self):
        cache = Cache.evicting(3, lambda layer: Window(sinks=layer), [9, 7, 5])
        feed(cache, [12, 1])
        assert [layer.physical_len for layer in cache.layers] == [9, 7, 5]
        assert [layer.policy.sinks for layer in cache.layers] == [0, 1, 2]

    def test_a_fraction_is_one_of_the_longest_row_without_its_padding(self):
        cache = Cache.evicting(1, Window(), 0.5)
        feed(cache, [12], padding=[2, 5])
        assert cache[0].physical_len == 5
        assert (cache[0].positions >= 0).all()


class TestHeadsThatShareABudget:
    """Ada-KV: of all heads of a layer together the highest scores, and of each at least a few."""

    @given(
        tokens=st.integers(9, 30),
        room=st.integers(5, 9),
        safeguard=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
        pad=st.integers(0, 4),
        name=st.sampled_from(["key norm", "H2O", "SnapKV"]),
        dtype=st.sampled_from([torch.float64, torch.float32]),
    )
    @settings(max_examples=40, deadline=None)
    def test_they_keep_the_highest_of_all_and_attend_to_just_those(self, tokens, room, safeguard, pad, name, dtype):
        policy, padding = POLICIES[name], [0, min(pad, tokens - room)]
        options = {"during": "prompt", "safeguard": safeguard}
        cache, whole = Cache.evicting(1, policy, room, **options), EvictingCache(policy, 999)
        q, k, v = drawn(2, tokens, 1, dtype)
        with cache.step([tokens] * 2, padding=padding) as step:
            for layer in (cache[0], whole):
                layer.append(k, v, step)
                layer.attend(q, step)
        held = whole.kept
        newest = torch.tensor([[[tokens - 1]], [[tokens - 1 - padding[1]]]])
        scores = policy.score(Held(k, v, held.positions, newest, Constants(), held.notes))
        sure = max(1, int(safeguard * room))
        for row in range(2):
            ranks = {}
            for head in range(KV_HEADS):
                for at, position in enumerate(held.positions[row, head].tolist()):
                    last = position > newest[row].item() - policy.recent_of(room)
                    useful = (3, 0.0) if last else (2, scores[row, head, at].item())
                    ranks[head, at] = useful if position >= 0 else (0, 0.0)
            chosen = set()
            for head in range(KV_HEADS):
                own = sorted((key for key in ranks if key[0] == head), key=lambda key: ranks[key])
                chosen |= set(own[-sure:])
            rest = sorted((key for key in ranks if key not in chosen), key=lambda key: ranks[key])
            missing = KV_HEADS * room - len(chosen)
            chosen |= set(rest[len(rest) - missing :])
            for head in range(KV_HEADS):
                right = sorted(at - padding[row] for one, at in chosen if one == head and at >= padding[row])
                got = cache[0].positions[row, head]
                assert sorted(got[got >= 0].tolist()) == right
        kept = cache[0].kept
        slots = max((kept.positions[row, head] >= 0).sum().item() for row in range(2) for head in range(KV_HEADS))
        assert kept.tokens == slots
        assert cache.nbytes == 2 * KV_HEADS * kept.tokens * (2 * DIM * dtype.itemsize + 4)  # empty slots are counted
        assert cache[0].format.budget == kept.tokens or not kept.hides
        q, k, v = drawn(2, 3, 2, dtype)
        with cache.step([3, 3]) as step:
            cache[0].append(k, v, step)
            out = cache[0].attend(q, step)
        for row in range(2):
            for head in range(KV_HEADS):
                real = cache[0].positions[row, head] >= 0
                first, mine = tokens - padding[row], slice(head * GROUP, (head + 1) * GROUP)
                visible = Visibility(
                    3, int(real.sum()), (first,), key_position=cache[0].positions[row, head][None, real]
                )
                sides = (x[row, head][real][None, None] for x in cache[0].held())
                expected = attention(q[row : row + 1, mine], *sides, visible=visible)
                bound = attention_bound(q, *cache[0].held()) * 20
                torch.testing.assert_close(out[row : row + 1, mine], expected, rtol=0, atol=bound)

    def test_what_is_evicted_is_gone_and_a_step_can_be_undone(self):
        cache = Cache.evicting(2, KeyNorm(), 6, during="prompt", safeguard=0.2)
        q, k, v = drawn(2, 14, 0)
        k[:, 0, :9] *= 9  # the first head keeps few
        v[:, 0, :9] = math.nan
        with cache.step([14, 14]) as step:
            for layer in cache.layers:
                layer.append(k, v, step)
                layer.attend(q, step)
        assert cache[0].kept.hides
        with pytest.raises(ValueError, match="what KeyNorm evicted after 14 is lost"):
            cache.truncate(13)
        was = [everything(layer) for layer in cache.layers]
        with pytest.raises(KeyboardInterrupt), cache.step([1, 1]) as step:  # noqa: PT012
            cache[0].append(*drawn(2, 1, 5)[1:], step)
            raise KeyboardInterrupt
        assert all(map(same, was, [everything(layer) for layer in cache.layers]))
        assert all(out.isfinite().all() for out in feed(cache, [1, 3, 1], seed=4))
        cache.truncate(15)
        assert cache[0].physical_len == was[0][-1][0].shape[2] + 1
        cache.select_rows(torch.tensor([1, 0]))
        assert feed(cache, [1], seed=6)[0].isfinite().all()


class TestThroughTheDecoder:
    def model(self):
        return models.random(replace(TINY, num_layers=3))

    @pytest.mark.parametrize("name", POLICIES)
    def test_memory_stays_flat_and_a_padded_row_is_answered_as_alone(self, name):
        model = self.model()
        policy = POLICIES[name]
        if isinstance(policy, ExpectedAttention):
            policy = replace(policy, frequencies=model.frequencies)
        tokens = torch.randint(0, 100, (1, 14), generator=torch.Generator().manual_seed(0))
        padded = torch.cat((torch.zeros(1, 5, dtype=torch.int64), tokens), dim=1)
        both = torch.cat((torch.randint(0, 100, (1, 19)), padded))
        alone, batch = (Cache.evicting(3, policy, 8) for _ in range(2))
        one = generate(model, tokens, 10, cache=alone)
        two = generate(model, both, 10, cache=batch, padding=[0, 5])
        assert {step.cache_bytes for step in one.steps} == {alone.nbytes}
        assert torch.equal(one.tokens[0], two.tokens[1])
        assert torch.equal(alone[0].positions[0].sort().values, batch[0].positions[1].sort().values)

    def test_places_in_the_cache_go_beyond_the_length_a_model_was_trained_for(self):
        model = self.model()
        cache = Cache.evicting(3, Window(sinks=1), 8, frequencies=model.frequencies)
        tokens = torch.randint(0, 100, (1, 6))
        dense = Cache.growing(3)
        assert torch.equal(model(tokens, cache), model(tokens, dense))  # exact: nothing has left
        generate(model, tokens, 100, cache=cache)
        assert (cache[0].physical_len, cache.seq_len) == (8, 6 + 6 + 99)

    def test_a_cache_for_another_window_is_refused(self):
        model = models.random(replace(TINY, window=5))
        with pytest.raises(ValueError, match="the model attends with window=5"):
            model(torch.zeros(1, 3, dtype=torch.int64), Cache.evicting(2, Window(), 8))

    def test_filled_in_inference_mode_it_goes_on_outside(self):
        cache = Cache.evicting(1, H2O(), 6)
        with torch.inference_mode():
            feed(cache, [4, 1, 1])
        feed(cache, [1, 4], seed=5)
        with torch.inference_mode():
            feed(cache, [1, 1], seed=9)
            cache.select_rows(torch.tensor([1, 0]))
        feed(cache, [1], seed=11)
        assert cache[0].physical_len == 6
        assert fused_attention(*drawn(1, 2, 0)).isfinite().all()
