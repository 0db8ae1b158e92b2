"""The dense caches against a model made of plain lists, and the contracts every cache keeps."""

import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch.utils._python_dispatch import TorchDispatchMode

from labkit.attention import Constants, attention
from labkit.cache import Cache, GrowingCache, LayerCache, PagedCache, Pages, PreallocatedCache, QuantizedCache, Step
from labkit.cache.recording import RecordingCache
from labkit.cache.step import rectangle
from labkit.course.plug import PluggedLayer
from labkit.labs.lab02 import references as labs
from tests.attending import how
from tests.bounds import attention_bound

CAPACITY = 24
KV_HEADS, HEAD_DIM = 2, 4
COUNTERS = ("bytes_written", "bytes_copied", "bytes_read")


def new_tokens(batch, count, seed, dtype=torch.float32, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, num_kv_heads, count, head_dim, generator=generator).to(dtype).unbind()


def kinds() -> list[LayerCache]:
    return [GrowingCache(), PreallocatedCache(CAPACITY)]


def snapshot(cache: LayerCache):
    """Everything one can see of a layer: bytes of K and V, sizes, counters."""
    held = cache.held()
    tensors = None if held is None else [x.clone() for x in held]
    return tensors, cache.seq_len, cache.nbytes, {name: getattr(cache, name) for name in COUNTERS}


def same(before, after) -> bool:
    (tensors, *rest), (other, *others) = before, after
    if rest != others or (tensors is None) != (other is None):
        return False
    return tensors is None or all(torch.equal(x, y) for x, y in zip(tensors, other, strict=True))


class DenseCachesAgainstLists(RuleBasedStateMachine):
    """Both caches do what a list of rows, each a list of tokens, does; all comparisons are exact."""

    @initialize(batch=st.integers(1, 3))
    def start(self, batch):
        self.growing, self.preallocated = kinds()
        self.rows: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(batch)]
        self.allocated_rows = 0
        self.written = self.read = self.moved_growing = self.moved_preallocated = 0

    @property
    def both(self):
        return self.growing, self.preallocated

    @property
    def seq_len(self):
        return len(self.rows[0])

    def bytes_of(self, tokens, rows=None):
        return 2 * (len(self.rows) if rows is None else rows) * KV_HEADS * tokens * HEAD_DIM * 4

    @rule(count=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
    def append(self, count, seed):
        k, v = new_tokens(len(self.rows), count, seed)
        if self.seq_len + count > CAPACITY:
            before = snapshot(self.preallocated)
            with pytest.raises(ValueError, match=f"room for {CAPACITY} tokens and holds {self.seq_len}"):
                self.preallocated.append(k, v)
            assert same(before, snapshot(self.preallocated))
            return
        for cache in self.both:
            cache.append(k, v)
        self.moved_growing += self.bytes_of(self.seq_len)
        self.written += self.bytes_of(count)
        self.allocated_rows = self.allocated_rows or len(self.rows)
        for row, tokens in enumerate(self.rows):
            tokens.extend((k[row, :, i], v[row, :, i]) for i in range(count))

    @precondition(lambda self: self.seq_len)
    @rule(seed=st.integers(0, 2**32 - 1), queries=st.integers(1, 3))
    def attend(self, seed, queries):
        q, _ = new_tokens(len(self.rows), min(queries, self.seq_len), seed, num_kv_heads=3 * KV_HEADS)
        growing, preallocated = (cache.attend(q) for cache in self.both)
        # Bounded: the same numbers at other strides, which PyTorch's kernel may sum in another order.
        torch.testing.assert_close(growing, preallocated, rtol=0, atol=attention_bound(q, *self.growing.held()))
        self.read += self.bytes_of(self.seq_len)

    @rule(data=st.data())
    def truncate(self, data):
        keep = data.draw(st.integers(0, self.seq_len), label="keep")
        for cache in self.both:
            cache.truncate(keep)
        if keep == 0:
            self.allocated_rows = 0
        if 0 < keep < self.seq_len:
            self.moved_growing += self.bytes_of(keep)
        self.rows = [row[:keep] for row in self.rows]

    @precondition(lambda self: self.seq_len)
    @rule(data=st.data())
    def select_rows(self, data):
        rows = data.draw(st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=4), label="rows")
        for cache in self.both:
            cache.select_rows(torch.tensor(rows))
        self.rows = [list(self.rows[row]) for row in rows]
        self.allocated_rows = len(rows)
        self.moved_growing += self.bytes_of(self.seq_len)
        self.moved_preallocated += self.bytes_of(self.seq_len)

    @rule(batch=st.integers(1, 3))
    def reset(self, batch):
        for cache in self.both:
            cache.reset()
        self.rows = [[] for _ in range(batch)]
        self.allocated_rows = 0
        self.written = self.read = self.moved_growing = self.moved_preallocated = 0

    @invariant()
    def they_hold_what_the_lists_hold(self):
        for cache in self.both:
            assert cache.seq_len == cache.physical_len == self.seq_len
            if not self.seq_len:
                assert cache.held() is None
                continue
            for held, which in zip(cache.held(), (0, 1), strict=True):
                expected = torch.stack([torch.stack([token[which] for token in row], dim=1) for row in self.rows])
                assert torch.equal(held, expected)

    @invariant()
    def sizes_and_counters_are_what_arithmetic_says(self):
        assert self.growing.nbytes == self.bytes_of(self.seq_len)
        assert self.preallocated.nbytes == self.bytes_of(CAPACITY, self.allocated_rows)
        for cache, moved in zip(self.both, (self.moved_growing, self.moved_preallocated), strict=True):
            assert (cache.bytes_written, cache.bytes_copied, cache.bytes_read) == (self.written, moved, self.read)


DenseCachesAgainstLists.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestDenseCachesAgainstLists = DenseCachesAgainstLists.TestCase


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(1, CAPACITY - 1)))
def test_any_chunking_holds_the_same_keys_and_values(cuts):
    k, v = new_tokens(2, CAPACITY, seed=0)
    for cache in kinds():
        for start, end in pairwise([0, *sorted(cuts), CAPACITY]):
            cache.append(k[:, :, start:end], v[:, :, start:end])
        assert all(torch.equal(held, whole) for held, whole in zip(cache.held(), (k, v), strict=True))  # exact


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_growing_moves_the_sum_over_steps_and_preallocated_moves_nothing(steps):
    token_bytes = 2 * KV_HEADS * HEAD_DIM * 4
    growing, preallocated = GrowingCache(), PreallocatedCache(steps)
    for step in range(steps):
        for cache in (growing, preallocated):
            cache.append(*new_tokens(1, 1, seed=step))
    assert growing.bytes_copied == token_bytes * steps * (steps - 1) // 2
    assert preallocated.bytes_copied == 0
    assert growing.bytes_written == preallocated.bytes_written == token_bytes * steps


BAD = {
    "three dimensions": (lambda k, v: (k[0], v[0]), r"K and V are \[batch, num_kv_heads, new_tokens, head_dim\]"),
    "K and V of two head sizes": (lambda k, v: (k, v[..., :2]), "K has a head_dim of 4 and V of 2"),
    "K and V of different lengths": (lambda k, v: (k, v[:, :, :1]), "append takes K and V of one shape"),
    "no tokens": (lambda k, v: (k[:, :, :0], v[:, :, :0]), "zero new tokens"),
    "V of another dtype": (lambda k, v: (k, v.double()), "they must agree"),
    "V on another device": (lambda k, v: (k, v.to("meta")), "they must agree"),
    "another dtype than held": (lambda k, v: (k.bfloat16(), v.bfloat16()), "holds torch.float32 on cpu"),
    "another device than held": (lambda k, v: (k.to("meta"), v.to("meta")), "holds torch.float32 on cpu"),
    "another batch": (lambda k, v: (k[:1], v[:1]), "holds batch 2"),
    "another number of heads": (lambda k, v: (k[:, :1], v[:, :1]), "2 KV heads"),
    "another head_dim": (lambda k, v: (k[..., :2], v[..., :2]), "head_dim 4"),
}


class TestAFailedAppendChangesNothing:
    """Exact: every byte, size and counter is as before."""

    @pytest.mark.parametrize("what", BAD)
    @pytest.mark.parametrize("kind", [0, 1])
    def test_whatever_is_wrong(self, what, kind):
        spoil, message = BAD[what]
        cache = kinds()[kind]
        cache.append(*new_tokens(2, 3, seed=1))
        before = snapshot(cache)
        with pytest.raises(ValueError, match=message):
            cache.append(*spoil(*new_tokens(2, 2, seed=2)))
        assert same(before, snapshot(cache))

    def test_a_prompt_longer_than_the_capacity_allocates_nothing(self):
        cache = PreallocatedCache(4)
        with pytest.raises(ValueError, match="room for 4 tokens and holds 0: 5 more do not fit"):
            cache.append(*new_tokens(1, 5, seed=0))
        assert (cache.nbytes, cache.bytes_written, cache.held()) == (0, 0, None)


@pytest.mark.parametrize("kind", [0, 1])
class TestLayer:
    def test_reading_an_empty_cache_is_an_error(self, kind):
        with pytest.raises(ValueError, match="append before you read"):
            kinds()[kind].read()

    @pytest.mark.parametrize("keep", [-1, 4])
    def test_keeping_more_than_is_held_or_less_than_nothing_is_an_error(self, kind, keep):
        cache = kinds()[kind]
        cache.append(*new_tokens(2, 3, seed=0))
        before = snapshot(cache)
        with pytest.raises(ValueError, match=f"cannot keep {keep} tokens of 3"):
            cache.truncate(keep)
        assert same(before, snapshot(cache))

    def test_a_row_that_does_not_exist_is_an_error_that_changes_nothing(self, kind):
        cache = kinds()[kind]
        cache.append(*new_tokens(2, 3, seed=0))
        before = snapshot(cache)
        with pytest.raises((IndexError, RuntimeError)):
            cache.select_rows(torch.tensor([0, 2]))
        assert same(before, snapshot(cache))

    def test_what_was_appended_may_change_afterwards(self, kind):
        cache, (k, v) = kinds()[kind], new_tokens(1, 1, seed=0)
        kept = k.clone()
        cache.append(k, v)
        k.zero_()
        assert torch.equal(cache.held()[0], kept)  # exact

    def test_it_does_not_keep_the_projection_alive_that_it_got_a_view_of(self, kind):
        cache, projection = kinds()[kind], torch.randn(1, 10 * KV_HEADS, 1, HEAD_DIM)
        cache.append(projection[:, :KV_HEADS], projection[:, -KV_HEADS:])
        assert sum(x.untyped_storage().nbytes() for x in (cache.k, cache.v)) == cache.nbytes

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtype_comes_from_what_is_appended(self, kind, dtype):
        cache = kinds()[kind]
        cache.append(*new_tokens(1, 2, seed=0, dtype=dtype))
        assert cache.held()[0].dtype == dtype
        tokens = 2 if kind == 0 else CAPACITY
        assert cache.nbytes == 2 * KV_HEADS * tokens * HEAD_DIM * torch.finfo(dtype).bits // 8

    def test_filled_in_inference_mode_it_goes_on_outside(self, kind):
        cache, (k, v) = kinds()[kind], new_tokens(2, 6, seed=0)
        with torch.inference_mode():
            cache.append(k[:, :, :3], v[:, :, :3])
            cache.select_rows(torch.tensor([1, 0]))
            cache.select_rows(torch.tensor([1, 0, 1, 0]))
            cache.select_rows(torch.tensor([0, 1]))
        with torch.no_grad():
            cache.append(k[:, :, 3:], v[:, :, 3:])
        cache.truncate(5)
        cache.select_rows(torch.tensor([0, 1]))
        assert torch.equal(cache.held()[0], k[:, :, :5])  # exact

    def test_window_and_padding_reach_attention(self, kind):
        settings_ = {"window": 3, "scale": 0.7, "soft_cap": 2.0}
        cache = GrowingCache(**settings_) if kind == 0 else PreallocatedCache(CAPACITY, **settings_)
        step = rectangle(2, 6, padding=[0, 4])
        k, v = new_tokens(2, 6, seed=0)
        q, _ = new_tokens(2, 6, seed=1)
        cache.append(k, v, step)
        expected = attention(q, k, v, *how(q, k, padding=[0, 4], **settings_))
        torch.testing.assert_close(
            cache.attend(q, step), expected, rtol=0, atol=attention_bound(q, k, v, scale=0.7)
        )  # bounded

    def test_what_left_the_window_is_not_read(self, kind):
        cache = GrowingCache(window=4) if kind == 0 else PreallocatedCache(CAPACITY, window=4)
        k, v = new_tokens(2, 9, seed=0)
        k[:, :, :5], v[:, :, :5] = float("nan"), float("nan")
        cache.append(k, v)
        q, _ = new_tokens(2, 1, seed=1)
        assert cache.attend(q).isfinite().all()
        assert cache.bytes_read == 2 * 2 * KV_HEADS * 4 * HEAD_DIM * 4  # K and V, rows, heads, window, head_dim, bytes

    def test_an_observer_gets_the_weights(self, kind):
        cache, seen = kinds()[kind], []
        k, v = new_tokens(2, 5, seed=0)
        q, _ = new_tokens(2, 2, seed=1)
        cache.append(k, v)
        out = cache.attend(q, observe=seen.append)
        expected, weights = attention(q, k, v, return_weights=True)
        assert torch.equal(seen[0], weights)  # exact: the same computation
        assert torch.equal(out, expected)

    def test_emptied_it_takes_another_batch_and_holds_no_memory(self, kind):
        cache = kinds()[kind]
        cache.append(*new_tokens(2, 3, seed=0))
        cache.truncate(0)
        assert (cache.nbytes, cache.lengths) == (0, ())
        cache.append(*new_tokens(3, 3, seed=0))
        assert cache.lengths == (3, 3, 3)

    @pytest.mark.parametrize("rows", [[], [0.0, 1.0], [[0, 1]], [True, False]])
    def test_rows_that_are_no_list_of_rows_are_an_error(self, kind, rows):
        cache = kinds()[kind]
        cache.append(*new_tokens(2, 3, seed=0))
        before = snapshot(cache)
        with pytest.raises(ValueError, match="rows are int"):
            cache.select_rows(torch.tensor(rows))
        assert same(before, snapshot(cache))


def test_a_capacity_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="capacity is a number of tokens"):
        PreallocatedCache(0)


def filled(num_layers=3, tokens=4) -> Cache:
    cache = Cache.growing(num_layers)
    for index, layer in enumerate(cache.layers):
        layer.append(*new_tokens(2, tokens, seed=index))
    return cache


class TestCacheOfManyLayers:
    def test_it_needs_a_layer(self):
        with pytest.raises(ValueError, match="at least one layer"):
            Cache([])

    def test_it_makes_layers_of_its_kind_with_the_window_said(self):
        growing, preallocated = Cache.growing(2, window=5), Cache.preallocated(3, 7, window=5)
        assert [type(layer) for layer in growing.layers] == [GrowingCache] * 2
        assert [(type(layer), layer.capacity) for layer in preallocated.layers] == [(PreallocatedCache, 7)] * 3
        assert {layer.window for layer in [*growing.layers, *preallocated.layers]} == {5}
        assert (len(preallocated), preallocated[1]) == (3, preallocated.layers[1])

    def test_bytes_are_the_sum_over_layers(self):
        assert filled(3, 4).nbytes == 3 * 2 * 2 * KV_HEADS * 4 * HEAD_DIM * 4

    def test_layers_of_different_lengths_are_found_out_and_the_remedy_works(self):
        cache = filled(3, 4)
        cache[0].append(*new_tokens(2, 2, seed=9))
        with pytest.raises(RuntimeError, match=r"between 4 and 6 tokens.*truncate\(4\).*reset\(\)"):
            _ = cache.seq_len
        cache.truncate(4)
        assert cache.seq_len == 4
        assert torch.equal(cache[0].held()[0], filled(3, 4)[0].held()[0])  # exact

    def test_reset_mends_layers_of_different_lengths_too(self):
        cache = filled(3, 4)
        cache[2].truncate(1)
        cache.reset()
        assert (cache.seq_len, cache.nbytes) == (0, 0)

    @pytest.mark.parametrize("keep", [-1, 5])
    def test_keeping_what_is_not_there_is_an_error(self, keep):
        with pytest.raises(ValueError, match=f"cannot keep {keep} tokens of 4"):
            filled(3, 4).truncate(keep)

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_what_was_appended_before_an_error_is_taken_back(self, error):
        cache, untouched = filled(3, 4), filled(3, 4)

        def interrupted():
            with cache.step([1, 1]) as step:
                for layer in cache.layers[:2]:
                    layer.append(*new_tokens(2, 1, seed=7), step)
                raise error

        with pytest.raises(error):
            interrupted()
        assert cache.seq_len == 4
        for layer, other in zip(cache.layers, untouched.layers, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(layer.held(), other.held(), strict=True))  # exact

    def test_padding_said_before_an_error_is_taken_back(self):
        cache = Cache.growing(2)

        def refused():
            with cache.step([2, 2], padding=[0, 1]):
                raise KeyError

        with pytest.raises(KeyError):
            refused()
        assert cache.padding == ()

    def test_padding_is_said_once_with_the_first_tokens(self):
        with pytest.raises(ValueError, match="padding is said once per batch"), filled().step([1, 1], padding=[0, 1]):
            pass

    def padded(self) -> Cache:
        cache = Cache.growing(2)
        with cache.step([4, 4], padding=[0, 3]) as step:
            for layer in cache.layers:
                layer.append(*new_tokens(2, 4, seed=0), step)
        return cache

    def test_padding_follows_the_rows_and_goes_with_reset(self):
        cache = self.padded()
        cache.select_rows(torch.tensor([1, 1, 0]))
        assert cache.padding == (3, 3, 0)
        cache.reset()
        assert cache.padding == ()

    @pytest.mark.parametrize(("keep", "padding"), [(4, (0, 3)), (3, (0, 3)), (2, (0, 2)), (0, ())])
    def test_truncating_below_the_padding_leaves_what_there_is_of_it(self, keep, padding):
        cache = self.padded()
        cache.truncate(keep)
        assert cache.padding == padding

    def test_padding_is_copied_from_the_callers_list(self):
        cache, padding = Cache.growing(1), [0, 3]
        with cache.step([4, 4], padding=padding) as step:
            cache[0].append(*new_tokens(2, 4, seed=0), step)
        padding[1] = 0
        assert cache.padding == (0, 3)

    def test_one_layer_may_not_stand_for_several(self):
        with pytest.raises(ValueError, match="a cache of its own"):
            Cache([GrowingCache()] * 3)

    def test_layers_that_hold_tokens_are_not_put_into_another_cache(self):
        with pytest.raises(ValueError, match="a GrowingCache holds 4 tokens"):
            Cache(filled().layers)

    def test_rows_chosen_by_some_layers_only_are_found_out(self, monkeypatch):
        cache = filled(3, 4)
        monkeypatch.setattr(cache[1], "choose_rows", out_of_memory)
        with pytest.raises(MemoryError):
            cache.select_rows(torch.tensor([1, 0]))
        with pytest.raises(RuntimeError, match=r"only some layers .*reset\(\)"):
            _ = cache.seq_len
        cache.reset()
        assert cache.seq_len == 0

    def test_it_knows_whether_it_fits_a_model(self):
        cache = Cache.growing(2, window=5)
        cache.check_fits(2, Constants(window=5))
        with pytest.raises(ValueError, match="the cache has 2 layers, the model 3"):
            cache.check_fits(3, Constants(window=5))
        with pytest.raises(ValueError, match=r"window=5, the model attends with window=None: .*model.cache\(\)"):
            cache.check_fits(2, Constants())
        with pytest.raises(ValueError, match=r"the model attends with soft_cap=30\.0"):
            Cache.growing(2).check_fits(2, Constants(soft_cap=30.0))


def out_of_memory(*args):
    raise MemoryError


def every_kind() -> dict[str, LayerCache]:
    return {
        "growing": GrowingCache(),
        "preallocated": PreallocatedCache(200),
        "int4": QuantizedCache(4, group_size=4, residual_length=3, sink_length=2),
        "int2, turned": QuantizedCache(2, group_size=8, residual_length=0, rotate_keys=True, metadata=torch.bfloat16),
        "paged": PagedCache(Pages(60, 5)),
        "recording": RecordingCache(),
        "a learner's": PluggedLayer(labs.GrowingCache),
        "a learner's, preallocated": PluggedLayer(lambda: labs.PreallocatedCache(200)),
    }


def everything(layer: LayerCache):
    """All that attention could read, and the lengths, copied."""
    held = layer.held()
    return layer.lengths, layer.nbytes, None if held is None else [x.clone() for x in held]


def wide_tokens(batch, count, seed):
    """K and V with heads that groups of 8 divide."""
    return new_tokens(batch, count, seed, head_dim=8)


class TestUndo:
    """Exact, to the bit, for every kind of cache, whatever was appended in the meantime."""

    @pytest.mark.parametrize("kind", every_kind())
    @pytest.mark.parametrize("before", [0, 3, 17, 64])
    @pytest.mark.parametrize("pieces", [[1], [40], [1] * 9, [5, 64, 1]])
    def test_an_error_takes_back_all_that_came_in_the_step(self, kind, before, pieces):
        layer = every_kind()[kind]
        if before:
            layer.append(*wide_tokens(2, before, seed=1))
        was = everything(layer)
        mark = layer.mark()
        for piece in pieces:
            layer.append(*wide_tokens(2, piece, seed=piece))
        layer.restore(mark)
        assert layer.lengths == was[0]
        assert before == 0 or layer.nbytes == was[1]
        now = everything(layer)[2]
        assert (now is None) == (was[2] is None)
        assert now is None or all(torch.equal(x, y) for x, y in zip(now, was[2], strict=True))

    @pytest.mark.parametrize("kind", ["growing", "preallocated", "int4", "int2, turned", "paged"])
    def test_memory_that_runs_out_anywhere_leaves_the_cache_as_it_was(self, kind):
        for act in (
            lambda layer: layer.append(*wide_tokens(2, 6, seed=2)),
            lambda layer: layer.truncate(9),
            lambda layer: layer.select_rows(torch.tensor([1, 1, 0])),
        ):
            for place in range(12):
                layer = every_kind()[kind]
                layer.append(*wide_tokens(2, 17, seed=1))
                was = everything(layer)
                try:
                    with RunsOut(place):
                        act(layer)
                except MemoryError:
                    lengths, nbytes, held = everything(layer)
                    assert (lengths, nbytes) == was[:2]
                    assert all(torch.equal(x, y) for x, y in zip(held, was[2], strict=True))
                else:
                    break

    @pytest.mark.parametrize("kind", every_kind())
    @pytest.mark.parametrize("what", ["truncate", "truncate to nothing", "select_rows", "reset", "append"])
    def test_an_interrupt_at_any_line_leaves_the_old_the_new_or_a_refusal(self, kind, what):
        acts = {
            "truncate": lambda layer: layer.truncate(9),
            "truncate to nothing": lambda layer: layer.truncate(0),
            "select_rows": lambda layer: layer.select_rows(torch.tensor([1, 1, 0])),
            "reset": lambda layer: layer.reset(),
            "append": lambda layer: layer.append(*wide_tokens(2, 7, seed=2)),
        }

        def made():
            layer = every_kind()[kind]
            layer.append(*wide_tokens(2, 17, seed=1))
            return layer

        done = made()
        acts[what](done)
        right = [everything(made())[::2], everything(done)[::2]]
        for line in range(1, 400):
            layer = made()
            if not interrupted_at(line, lambda layer=layer: acts[what](layer)):
                return
            try:
                layer.check_whole()
            except RuntimeError:
                layer.reset()
                assert everything(layer) == ((), 0, None)
                continue
            lengths, held = everything(layer)[::2]
            same_held = [
                lengths == other
                and (held is None) == (kept is None)
                and (held is None or all(torch.equal(x, y) for x, y in zip(held, kept, strict=True)))
                for other, kept in right
            ]
            assert any(same_held), (line, lengths)

    def test_room_behind_a_shorter_row_is_no_nan_whatever_was_there(self):
        layer = PreallocatedCache(16)
        cache = Cache([layer])
        k, v = new_tokens(2, 8, seed=0)
        v[1, :, 3:] = float("nan")
        layer.append(k, v)
        cache.truncate(3)
        with cache.step([5, 1]) as step:
            some = new_tokens(1, 6, seed=1)
            layer.append(*some, step)
        assert layer.attend(torch.randn(2, 2 * KV_HEADS, 1, HEAD_DIM)).isfinite().all()


FILES = ("layer.py", "dense.py", "quantized.py", "paged.py", "plug.py", "recording.py")


def interrupted_at(line: int, act, counted=lambda file: file.endswith(FILES)) -> bool:
    """Whether `act` was stopped by a KeyboardInterrupt, at so many lines of the files that are `counted`."""
    left = [line]

    def trace(frame, event, _):
        if not counted(frame.f_code.co_filename):
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


class RunsOut(TorchDispatchMode):
    """The operation after `place` others that make a tensor runs out of memory."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.left = place

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in ("cat", "clone", "empty", "zeros", "index_select", "_to_copy")):
            self.left -= 1
            if self.left < 0:
                raise MemoryError
        return func(*args, **(kwargs or {}))


class TestArgumentsThatCannotBe:
    @pytest.mark.parametrize("length", [1.5, True, "2"])
    def test_lengths(self, length):
        for kind in kinds():
            kind.append(*new_tokens(1, 3, seed=0))
            with pytest.raises(ValueError, match="a number of tokens is whole"):
                kind.truncate(length)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.uint8, torch.int32])
    def test_rows_of_any_whole_dtype_are_taken(self, dtype):
        cache = filled(2, 3)
        cache.select_rows(torch.tensor([1], dtype=dtype))
        assert cache.lengths == (3,)

    def test_queries_of_another_dtype(self):
        for kind in every_kind().values():
            kind.append(*wide_tokens(2, 20, seed=0))
            if not isinstance(kind, PluggedLayer):
                with pytest.raises(ValueError, match=r"queries are torch\.float16"):
                    kind.attend(torch.zeros(2, KV_HEADS, 1, 8, dtype=torch.float16))

    def test_keys_that_are_no_floats_or_have_no_heads(self):
        for k in (torch.zeros(1, 2, 3, 4, dtype=torch.int32), torch.zeros(1, 0, 3, 4), torch.zeros(1, 2, 3, 0)):
            with pytest.raises(ValueError, match="K and V are floats"):
                GrowingCache().append(k, k)

    @pytest.mark.parametrize("number", [4.0, float("inf"), True])
    def test_windows_and_capacities(self, number):
        with pytest.raises(ValueError, match="a whole number"):
            GrowingCache(window=number)
        with pytest.raises(ValueError, match="capacity is a number of tokens"):
            PreallocatedCache(number)


RAGGED = {
    "growing": lambda window: GrowingCache(window=window),
    "preallocated": lambda window: PreallocatedCache(64, window=window),
    "paged": lambda window: PagedCache(Pages(40, 3), window=window),
}


class TestRagged:
    """Rows of different lengths, chunks and single tokens in one step, against each row in a cache of its own."""

    @given(data=st.data(), kind=st.sampled_from([*RAGGED]), window=st.none() | st.integers(1, 6))
    @settings(max_examples=40, deadline=None)
    def test_each_row_is_as_in_a_cache_of_its_own(self, data, kind, window):
        batch = data.draw(st.integers(2, 4))
        together = RAGGED[kind](window)
        alone = [GrowingCache(window=window) for _ in range(batch)]
        cache = Cache([together])
        for turn in range(data.draw(st.integers(1, 4))):
            counts = data.draw(st.lists(st.integers(0, 5), min_size=batch, max_size=batch).filter(any))
            pieces = [new_tokens(1, count, seed=10 * turn + row) for row, count in enumerate(counts)]
            queries = [new_tokens(1, n, seed=99 + row, num_kv_heads=3 * KV_HEADS)[0] for row, n in enumerate(counts)]
            with cache.step(counts) as step:
                dim = 0 if step.is_rectangle else 2
                together.append(*(torch.cat(side, dim) for side in zip(*pieces, strict=True)), step)
                out = together.attend(torch.cat(queries, dim), step)
            rows = out.split(1) if step.is_rectangle else step.split(out, dim=2)
            for row, (mine, (k, v), q) in enumerate(zip(rows, pieces, queries, strict=True)):
                if counts[row]:
                    alone[row].append(k, v)
                    bound = attention_bound(q, *alone[row].held())
                    torch.testing.assert_close(mine, alone[row].attend(q), rtol=0, atol=bound)  # bounded
        assert together.lengths == tuple(layer.seq_len for layer in alone)
        for row, layer in enumerate(alone):
            if layer.lengths:
                for mine, own in zip(together.held(), layer.held(), strict=True):
                    assert torch.equal(mine[row : row + 1, :, : layer.seq_len], own)  # exact

    def test_a_kind_that_keeps_rows_equally_long_refuses_and_says_which_do_not(self):
        layer = QuantizedCache(4, group_size=4)
        with pytest.raises(ValueError, match=r"QuantizedCache keeps rows of one length.*growing or preallocated"):
            layer.append(*new_tokens(1, 5, seed=0), Step((2, 3), (0, 0)))
        assert layer.lengths == ()

    @pytest.mark.parametrize(
        ("counts", "before", "padding", "message"),
        [
            ((0, 0), (1, 1), (), "at least one token"),
            ((1, -1), (1, 1), (), "none fewer than 0"),
            ((), (), (), "at least one token"),
            ((1,), (1, 1), (), "one count, one length"),
            ((1, 1), (0, 0), (1,), "one count, one length and one padding per row"),
            ((1, 1), (0, 0), (-1, 0), "whole numbers, 0 or more"),
        ],
    )
    def test_steps_that_cannot_be(self, counts, before, padding, message):
        with pytest.raises(ValueError, match=message):
            Step(counts, before, padding)

    def test_a_step_of_another_cache_is_refused(self):
        layer = GrowingCache()
        layer.append(*new_tokens(2, 3, seed=0))
        with pytest.raises(ValueError, match=r"goes on from \[2, 2\] tokens by row; held are \[3, 3\]"):
            layer.append(*new_tokens(2, 1, seed=0), Step((1, 1), (2, 2)))
        with pytest.raises(ValueError, match="brings 1 tokens in 2 rows"):
            layer.append(*new_tokens(2, 2, seed=0), Step((1, 1), (3, 3)))
