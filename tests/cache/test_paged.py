"""The paged cache beside the growing one: what it holds, exactly, and what it answers, within the bounds of the dtype.

After every act of the state machine all slots that hold no token are NaN: nothing may be read that is not a row's.
"""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from labkit.cache import Cache, GrowingCache, OutOfBlocks, PagedCache, Pages, Step
from labkit.cache.paged import Layout
from labkit.cache.step import rectangle
from labkit.course.checks.effort import effort_of
from labkit.engine import blocks as engine
from labkit.generation import generate
from labkit.hf import wrap
from labkit.ledger import ledger
from labkit.llama import Llama
from labkit.specs import decoder_spec
from tests.bounds import attention_bound
from tests.tiny import VOCAB, hf_model

KV_HEADS, PER_KV, HEAD_DIM = 2, 3, 8
NUMBER = 4  # bytes


def new_tokens(counts, seed, dtype=torch.float32, heads=KV_HEADS):
    """Tensors for each row, `[1, heads, count, head_dim]`: K, V and queries."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (heads, heads, heads * PER_KV)
    return [[torch.randn(1, n, c, HEAD_DIM, generator=generator).to(dtype) for c in counts] for n in sizes]


def joined(pieces, step):
    return torch.cat(pieces, 0 if step.is_rectangle else 2)


def run(cache, counts, seed, *, padding=None, dtype=torch.float32):
    """One step through every layer: what each answered, by row."""
    outs = []
    with cache.step(counts, padding=padding) as step:
        for index, layer in enumerate(cache.layers):
            k, v, q = (joined(pieces, step) for pieces in new_tokens(counts, 100 * seed + index, dtype))
            layer.append(k, v, step)
            out = layer.attend(q, step)
            outs.append(out.split(1) if step.is_rectangle else list(step.split(out, dim=2)))
    return outs


def assert_close(mine, other, cache, counts, seed, dtype=torch.float32):
    """Bounded: the same numbers, summed in another order; the dense caches' sums may be in the dtype itself."""
    for index, (rows, others) in enumerate(zip(mine, other, strict=True)):
        *_, queries = new_tokens(counts, 100 * seed + index, dtype)
        held = cache[index].held()
        for row, (got, expected) in enumerate(zip(rows, others, strict=True)):
            if counts[row]:
                own = [x[row : row + 1, :, : cache.lengths[row]] for x in held]
                torch.testing.assert_close(got, expected, rtol=0, atol=attention_bound(queries[row], *own))


def poison(cache):
    """NaN in every slot without a token."""
    for layer in cache.layers:
        if layer.k is None:
            continue
        size = layer.pages.block_size
        used = {
            row[place // size] * size + place % size
            for row, n in zip(layer.rows, layer.lengths, strict=True)
            for place in range(n)
        }
        empty = [slot for slot in range(layer.pages.num_blocks * size) if slot not in used]
        for x in (layer.k, layer.v):
            x.view(-1, *x.shape[2:])[empty] = float("nan")


def assert_holds_the_same(paged, dense):
    for mine, other in zip(paged.layers, dense.layers, strict=True):
        assert mine.lengths == other.lengths
        if (held := other.held()) is None:
            assert mine.held() is None
            continue
        for x, y in zip(mine.held(), held, strict=True):
            for row, length in enumerate(mine.lengths):
                assert torch.equal(x[row, :, :length], y[row, :, :length])  # exact
                assert not x[row, :, length:].any()  # room behind a row's end is zeros


class PagedBesideGrowing(RuleBasedStateMachine):
    """Two layers of each. A step that does not fit changes nothing; blocks in use are as many as arithmetic says."""

    @initialize(
        batch=st.integers(1, 4), block_size=st.integers(1, 7), window=st.none() | st.integers(1, 9), data=st.data()
    )
    def start(self, batch, block_size, window, data):
        self.batch, self.block_size = batch, block_size
        self.num_blocks = data.draw(st.integers(1, 40), label="num_blocks")
        self.paged = Cache.paged(2, self.num_blocks, block_size, window=window)
        self.dense = Cache.growing(2, window=window)
        self.seed = 0

    @property
    def pages(self):
        return self.paged[0].pages

    @rule(data=st.data(), fails=st.booleans())
    def step(self, data, fails):
        one = st.integers(0, 5) if data.draw(st.booleans()) else st.just(1)
        counts = data.draw(st.lists(one, min_size=self.batch, max_size=self.batch).filter(any), label="counts")
        padding = None
        if not self.dense.lengths and len(set(counts)) == 1:
            padding = [data.draw(st.integers(0, counts[0])) for _ in counts]
        self.seed += 1
        free, before = self.pages.num_free, self.paged[0].rows
        try:
            mine = run(self.paged, counts, self.seed, padding=padding)
        except OutOfBlocks:
            assert self.paged[0].rows == self.paged[1].rows == before
            assert self.pages.num_free == free
            return
        other = run(self.dense, counts, self.seed, padding=padding)
        assert_close(mine, other, self.dense, counts, self.seed)
        if fails:
            self.undone()

    def undone(self):
        """One more step, which raises half-way."""

        def half():
            with self.paged.step([2] * self.batch) as step:
                k, v, _ = (joined(pieces, step) for pieces in new_tokens([2] * self.batch, 7))
                self.paged[0].append(k, v, step)
                raise KeyboardInterrupt

        with pytest.raises((KeyboardInterrupt, OutOfBlocks)):
            half()

    @precondition(lambda self: self.dense.lengths)
    @rule(data=st.data())
    def truncate(self, data):
        keep = data.draw(st.integers(0, self.dense.seq_len), label="keep")
        for cache in (self.paged, self.dense):
            cache.truncate(keep)

    @precondition(lambda self: self.dense.lengths)
    @rule(data=st.data())
    def select_rows(self, data):
        rows = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=4), label="rows")
        for cache in (self.paged, self.dense):
            cache.select_rows(torch.tensor(rows))
        self.batch = len(rows)

    @rule(batch=st.integers(1, 4))
    def reset(self, batch):
        for cache in (self.paged, self.dense):
            cache.reset()
        self.batch = batch

    @invariant()
    def they_hold_the_same_and_no_block_is_lost(self):
        assert self.paged.padding == self.dense.padding
        assert_holds_the_same(self.paged, self.dense)
        poison(self.paged)
        assert self.paged[0].rows == self.paged[1].rows == self.pages.rows
        blocks = [-(-length // self.block_size) for length in self.paged.lengths]
        assert [len(row) for row in self.pages.rows] == blocks
        in_use = set(itertools.chain.from_iterable(self.pages.rows))
        assert self.pages.num_free == self.num_blocks - len(in_use)
        a_block = 2 * self.block_size * KV_HEADS * HEAD_DIM * NUMBER
        pools = 2 * self.num_blocks * a_block if blocks else 0
        assert self.paged.nbytes == pools + 4 * len(blocks) * max(blocks, default=0)


PagedBesideGrowing.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestPagedBesideGrowing = PagedBesideGrowing.TestCase


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_ragged_batches_answer_as_the_growing_cache_does(data):
    draw = data.draw
    batch, block_size = draw(st.integers(1, 4)), draw(st.integers(1, 256))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    attention = {
        "window": draw(st.none() | st.integers(1, 40)), "scale": draw(st.none() | st.floats(0.05, 1.0)),
        "soft_cap": draw(st.none() | st.floats(1.0, 30.0)),
    }  # fmt: skip
    pages = Pages(4 * (2 + 120 // block_size), block_size)
    paged, dense = Cache([PagedCache(pages, **attention)]), Cache([GrowingCache(**attention)])
    for turn in range(draw(st.integers(1, 4))):
        counts = draw(st.lists(st.integers(0, 30) | st.just(1), min_size=batch, max_size=batch).filter(any))
        mine, other = (run(cache, counts, turn, dtype=dtype) for cache in (paged, dense))
        poison(paged)
        assert_close(mine, other, dense, counts, turn, dtype)
    assert_holds_the_same(paged, dense)


class TestSharedBlocks:
    def forked(self, tokens=6, block_size=4, rows=(0, 0)):
        paged, dense = Cache.paged(2, 8, block_size), Cache.growing(2)
        for cache in (paged, dense):
            run(cache, [tokens], 1)
            cache.select_rows(torch.tensor(rows))
        return paged, dense

    def test_rows_that_were_one_hold_the_same_blocks_and_nothing_is_copied(self):
        paged, dense = self.forked()
        assert paged[0].rows[0] is paged[0].rows[1]
        assert (paged[0].pages.num_free, paged[0].bytes_copied) == (6, 0)
        assert_holds_the_same(paged, dense)

    def test_who_writes_into_a_shared_block_copies_that_block_alone(self):
        paged, dense = self.forked(rows=(0, 0, 0))
        shared = paged[0].rows[0]
        mine, other = (run(cache, [1, 1, 0], 2) for cache in (paged, dense))
        assert_close(mine, other, dense, [1, 1, 0], 2)
        assert_holds_the_same(paged, dense)
        rows = paged[0].rows
        assert rows[2] == shared  # it wrote nothing
        assert {row[0] for row in rows} == {shared[0]}  # the full block is still everybody's
        assert len({row[1] for row in rows}) == 3
        for layer in paged.layers:
            assert layer.bytes_copied == 2 * 2 * 4 * KV_HEADS * HEAD_DIM * NUMBER  # blocks, K and V, tokens

    def test_the_last_who_holds_a_block_writes_in_place(self):
        paged, _ = self.forked()
        run(paged, [1, 1], 2)
        assert paged[0].bytes_copied == 2 * 4 * KV_HEADS * HEAD_DIM * NUMBER  # one copy for two rows

    def test_a_full_shared_block_is_not_copied(self):
        paged, dense = self.forked(tokens=8)
        for cache in (paged, dense):
            run(cache, [3, 1], 2)
        assert paged[0].bytes_copied == 0
        assert_holds_the_same(paged, dense)

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_a_step_that_is_undone_shares_again(self, error):
        paged, dense = self.forked()
        before = paged[0].rows

        def undone():
            with paged.step([1, 2]) as step:
                for layer in paged.layers:
                    k, v, _ = (joined(pieces, step) for pieces in new_tokens([1, 2], 9))
                    layer.append(k, v, step)
                raise error

        with pytest.raises(error):
            undone()
        assert paged[0].rows == before
        assert paged[0].pages.num_free == 6
        assert_holds_the_same(paged, dense)
        mine, other = (run(cache, [1, 2], 2) for cache in (paged, dense))
        assert_close(mine, other, dense, [1, 2], 2)
        assert_holds_the_same(paged, dense)

    def test_layers_that_an_interrupted_pass_left_apart_go_on_after_truncate(self):
        paged, dense = self.forked()
        step = Step((1, 1), (6, 6))
        k, v, _ = (joined(pieces, step) for pieces in new_tokens([1, 1], 9))
        paged[0].append(k, v, step)  # the first layer has a copied block, the second has not
        with pytest.raises(RuntimeError, match="between 6 and 7 tokens"):
            _ = paged.lengths
        paged.truncate(6)
        for cache in (paged, dense):
            run(cache, [2, 1], 3)
        assert_holds_the_same(paged, dense)


class TestOutOfBlocks:
    def test_it_says_what_is_missing_and_changes_nothing_in_any_layer(self):
        paged, dense = Cache.paged(3, 5, 4), Cache.growing(3)
        for cache in (paged, dense):
            run(cache, [7, 5], 1)
        nbytes = paged.nbytes
        with pytest.raises(OutOfBlocks, match=r"10 new tokens need 2 more blocks of 4; 1 of 5 are free"):
            run(paged, [4, 6], 2)
        assert (paged.lengths, paged.nbytes) == ((7, 5), nbytes)
        assert_holds_the_same(paged, dense)
        for cache in (paged, dense):
            run(cache, [4, 3], 3)  # what fits goes on
        assert_holds_the_same(paged, dense)
        assert paged[0].pages.num_free == 0

    def test_in_a_layer_behind_the_first_it_changes_nothing_either(self):
        paged = Cache([PagedCache(pages) for pages in (Pages(9, 4), Pages(2, 4))])
        run(paged, [7], 1)
        with pytest.raises(OutOfBlocks, match="2 new tokens need 1 more"):
            run(paged, [2], 2)
        assert paged.lengths == (7,)

    def test_a_prompt_that_is_too_long_allocates_nothing(self):
        paged = Cache.paged(2, 5, 4)
        with pytest.raises(OutOfBlocks, match="21 new tokens need 6 more blocks of 4; 5 of 5 are free"):
            run(paged, [21], 1)
        assert (paged.nbytes, paged.lengths, paged[0].held()) == (0, (), None)

    def test_blocks_come_back_by_truncate_rows_that_go_and_reset(self):
        paged = Cache.paged(1, 6, 4)
        pages = paged[0].pages
        run(paged, [9, 9], 1)
        assert pages.num_free == 0
        paged.truncate(4)
        assert pages.num_free == 4
        paged.select_rows(torch.tensor([1]))
        assert pages.num_free == 5
        paged.reset()
        assert (pages.num_free, pages.nbytes, paged.nbytes) == (6, 0, 0)


class TestDecode:
    """A decode step reads K and V where they lie."""

    @pytest.mark.parametrize("counts", [[1, 1, 1], [1, 0, 1], [1, 30, 1]])
    def test_no_dense_copy_is_made(self, counts):
        lengths = [900, 700, 5]
        cache = Cache.paged(1, 120, 16)
        run(cache, lengths, 1)
        layer = cache[0]
        token = KV_HEADS * HEAD_DIM * NUMBER
        with cache.step(counts) as step:
            k, v, q = (joined(pieces, step) for pieces in new_tokens(counts, 2))
            layer.append(k, v, step)
            layer.attend(q, step)  # the loops are compiled
            effort = effort_of(lambda: layer.attend(q, step))
        chunk = 730 if 30 in counts else 0  # of a chunk its own row is gathered, with a mask of 30 queries
        assert effort.largest <= max(token * chunk, PER_KV * 30 * chunk * NUMBER, 20 * 1024)
        if not chunk:
            assert effort.made < token * 100  # of 1,600 tokens
            assert not any(x.shape[-2] > 16 for x in (effort.result,))

    def test_only_what_is_seen_is_counted_as_read(self):
        cache = Cache.paged(1, 60, 8, window=20)
        run(cache, [90, 7], 1)
        layer = cache[0]
        with cache.step([1, 1]) as step:
            k, v, q = (joined(pieces, step) for pieces in new_tokens([1, 1], 2))
            layer.append(k, v, step)
            before = layer.bytes_read
            with ledger() as work:
                layer.attend(q, step)
        assert layer.bytes_read - before == work.bytes_read == (20 + 8) * 2 * KV_HEADS * HEAD_DIM * NUMBER
        assert work.bytes_copied == 0

    def test_a_chunk_does_not_gather_what_left_the_window(self):
        cache = Cache.paged(1, 60, 8, window=20)
        run(cache, [90], 1)
        layer = cache[0]
        with cache.step([4]) as step:
            k, v, q = (joined(pieces, step) for pieces in new_tokens([4], 2))
            layer.append(k, v, step)
            layer.k[[*layer.rows[0][:8]]] = layer.v[[*layer.rows[0][:8]]] = float(
                "nan"
            )  # 64 tokens; 90 - 19 is the first
            assert layer.attend(q, step).isfinite().all()

    def test_slots_and_tables_are_made_once_a_step_for_all_layers(self, monkeypatch):
        made = []

        def layout(*args):
            made.append(Layout(*args))
            return made[-1]

        monkeypatch.setattr("labkit.cache.paged.Layout", layout)
        cache = Cache.paged(5, 40, 4)
        for turn, counts in enumerate([[9, 9], [1, 1], [1, 1], [3, 1], [0, 1]]):
            run(cache, counts, turn)
            assert len(made) == turn + 1
        for decode in made[1:3]:
            assert sorted(key[0] for key in decode._made) == ["read", "slots", "table"]

    def test_the_slots_are_what_the_tables_say(self):
        pages = Pages(30, 4)
        rows, step = ((7, 2, 9), (5,), (1, 3)), Step((3, 1, 0), (7, 2, 6))
        layout = pages.layout(rows, step)
        cpu = torch.device("cpu")
        assert layout.slots(cpu).tolist() == [2 * 4 + 3, 9 * 4, 9 * 4 + 1, 5 * 4 + 2]
        assert layout.block_table(range(3), cpu).tolist() == [[7, 2, 9], [5, -1, -1], [1, 3, -1]]
        assert layout.block_table(range(3), cpu).dtype == torch.int32

    def test_float64_and_gradients_go_to_the_twin(self):
        for dtype in (torch.float64, torch.float32):
            cache, dense = PagedCache(Pages(9, 4)), GrowingCache()
            k, v, q = (
                torch.randn(2, heads, 5, HEAD_DIM, dtype=dtype, generator=torch.Generator().manual_seed(heads))
                for heads in (KV_HEADS, KV_HEADS, KV_HEADS * PER_KV)
            )
            grads = []
            for layer in (cache, dense):
                leaf = k.clone().requires_grad_(dtype == torch.float32)
                layer.append(leaf, v)
                out = layer.attend(q[:, :, -1:])
                if leaf.requires_grad:
                    out.square().sum().backward()
                    grads.append(leaf.grad)
                grads.append(out.detach())
            for mine, other in zip(grads[: len(grads) // 2], grads[len(grads) // 2 :], strict=True):
                # Bounded: a gradient is a sum of a few products of numbers below 10.
                torch.testing.assert_close(mine, other, rtol=0, atol=1e3 * torch.finfo(dtype).eps)

    def test_what_was_made_in_inference_mode_serves_a_pass_with_gradients(self):
        cache = PagedCache(Pages(9, 4))
        step = rectangle(1, 5)
        with torch.inference_mode():
            cache.append(*torch.ones(2, 1, KV_HEADS, 5, HEAD_DIM), step)
            cache.attend(torch.ones(1, KV_HEADS, 5, HEAD_DIM), step)
        cache.truncate(0)
        k = torch.ones(1, KV_HEADS, 5, HEAD_DIM, requires_grad=True)
        cache.append(k, k, step)
        cache.attend(torch.ones(1, KV_HEADS, 5, HEAD_DIM), step).sum().backward()
        assert k.grad.abs().sum() > 0

    def test_filled_in_inference_mode_it_goes_on_outside(self):
        cache, dense = Cache.paged(1, 20, 4), Cache.growing(1)
        for some in (cache, dense):
            with torch.inference_mode():
                run(some, [5, 6], 1)
                some.select_rows(torch.tensor([1, 0, 1]))
            run(some, [1, 1, 2], 2)
        assert_holds_the_same(cache, dense)

    def test_an_observer_gets_the_weights(self):
        cache, dense, seen = PagedCache(Pages(9, 4)), GrowingCache(), []
        k, v, q = (x[0] for x in new_tokens([7], 1))
        for layer in (cache, dense):
            layer.append(k, v)
        outs = [layer.attend(q[:, :, -2:], observe=seen.append) for layer in (cache, dense)]
        assert torch.equal(*seen)  # exact: the same computation over the same numbers
        assert torch.equal(*outs)


class TestWhatLayersDoNotShare:
    """Layers share tables, and what is made of a step is made once: but not where it differs."""

    @pytest.mark.parametrize("counts", [[1, 1], [5, 4], [3, 1]])
    def test_each_layer_has_its_own_window(self, counts):
        pages = Pages(40, 3)
        paged = Cache([PagedCache(pages, window=window) for window in (4, None, 9)])
        dense = Cache([GrowingCache(window=window) for window in (4, None, 9)])
        for turn, some in enumerate(([20, 20], counts)):
            mine, other = (run(cache, some, turn) for cache in (paged, dense))
            assert_close(mine, other, dense, some, turn)

    @pytest.mark.parametrize("tokens", [1, 6])
    def test_a_batch_of_the_same_shape_has_its_own_padding(self, tokens):
        paged, dense = Cache.paged(1, 20, 4), Cache.growing(1)
        for padding in ([0, 1], [1, 0], None):
            for cache in (paged, dense):
                cache.reset()
            mine, other = (run(cache, [tokens, tokens], 1, padding=padding) for cache in (paged, dense))
            assert_close(mine, other, dense, [tokens, tokens], 1)


class TestTablesFromOutside:
    """As an engine with a block manager of its own drives the cache."""

    def test_they_are_read_and_written_as_set_and_none_is_taken(self):
        cache, dense = Cache.paged(2, 9, 4), Cache.growing(2)
        cache[0].pages.rows = [[8, 3], [8, 0, 5]]
        for some in (cache, dense):
            run(some, [4, 0], 1)
        for layer in cache.layers:
            layer.place([4, 4])  # the second row begins with the block of the first
        for layer in dense.layers:
            layer.select_rows(torch.tensor([0, 0]))
        mine, other = (run(some, [1, 6], 2) for some in (cache, dense))
        assert_close(mine, other, dense, [1, 6], 2)
        assert_holds_the_same(cache, dense)
        assert cache[0].rows == ((8, 3), (8, 0, 5))
        with pytest.raises(ValueError, match=r"have \[2, 3\] blocks by row; rows of \[5, 13\] tokens need \[2, 4\]"):
            run(cache, [0, 3], 3)
        assert cache.lengths == (5, 10)
        with pytest.raises(ValueError, match="the tables were set from outside"):
            cache.select_rows(torch.tensor([0]))
        assert cache.lengths == (5, 10)

    def test_copies_are_carried_out_by_each_layer(self):
        cache, dense = Cache.paged(2, 9, 4), Cache.growing(2)
        cache[0].pages.rows = [[2, 7]]
        for some in (cache, dense):
            run(some, [6], 1)
        cache[0].pages.rows = [[2, 7], [2, 1]]
        for layer in cache.layers:
            layer.place([6, 6], [(7, 1)])
            assert layer.bytes_copied == 2 * 4 * KV_HEADS * HEAD_DIM * NUMBER
        for layer in dense.layers:
            layer.select_rows(torch.tensor([0, 0]))
        for some in (cache, dense):
            run(some, [2, 1], 2)
        assert_holds_the_same(cache, dense)

    def test_the_same_tables_set_from_outside_are_the_layers_to_extend_no_longer(self):
        cache = Cache.paged(1, 9, 4)
        run(cache, [4], 1)
        mark = cache[0].mark()
        cache[0].append(*torch.zeros(2, 1, KV_HEADS, 1, HEAD_DIM))  # takes a block
        cache[0].restore(mark)
        cache[0].pages.rows = cache[0].rows
        with pytest.raises(ValueError, match=r"have \[1\] blocks by row; rows of \[5\] tokens need \[2\]"):
            run(cache, [1], 2)

    def test_an_undone_step_leaves_them(self):
        cache = Cache.paged(1, 9, 4)
        cache[0].pages.rows = [[8, 3]]
        run(cache, [3], 1)
        with pytest.raises(ValueError, match="need"):
            run(cache, [9], 2)
        assert (cache[0].rows, cache.lengths) == (((8, 3),), (3,))

    @pytest.mark.parametrize(
        ("rows", "counts", "said"),
        [
            ([[8, 3], [0, 3]], [6, 7], "rows 0 and 1 would both write into block 3"),
            ([[8, 3], [2, 2]], [1, 6], "rows 1 and 1 would both write into block 2"),
        ],
    )
    def test_one_block_is_written_for_one_row(self, rows, counts, said):
        cache = Cache.paged(2, 9, 4)
        cache[0].pages.rows = rows
        with pytest.raises(ValueError, match=said):
            run(cache, counts, 1)
        assert cache.lengths == ()
        run(cache, [4, 4], 1)  # the blocks that both hold are not written yet

    def test_what_cannot_be_is_refused(self):
        pages = Pages(9, 4)
        layer = PagedCache(pages)
        for rows in ([[9]], [[-1]], [[0], [True]], [[1.0]]):
            with pytest.raises(ValueError, match="blocks are numbered 0 to 8"):
                pages.rows = rows
        assert pages.rows == ()
        with pytest.raises(ValueError, match="no tables were set"):
            layer.place([3])
        pages.rows = [[1, 2]]
        for lengths, message in (([9], r"need \[3\]"), ([1, 1], "need"), ([-1], "whole numbers"), ([1.5], "whole")):
            with pytest.raises(ValueError, match=message):
                layer.place(lengths)
        layer.place([0])
        layer.append(*torch.zeros(2, 1, KV_HEADS, 3, HEAD_DIM))
        with pytest.raises(ValueError, match="blocks are numbered 0 to 8; got 9"):
            layer.place([3], [(1, 9)])
        assert layer.lengths == (3,)

    def test_emptied_the_cache_takes_blocks_by_itself_again(self):
        cache = Cache.paged(2, 9, 4)
        cache[0].pages.rows = [[8, 3]]
        run(cache, [3], 1)
        cache.reset()
        run(cache, [3, 5], 1)
        assert cache[0].rows == ((0,), (1, 2))

    def test_a_model_answers_requests_that_come_grow_fork_and_go_as_it_answers_each_alone(self, llama):
        """The engine's block manager keeps the tables: prefix reuse, copies on write, chunks beside decodes."""
        size, chance = 4, random.Random(3)
        manager = engine.BlockManager(60, size)
        cache = Cache.paged(3, 60, size)
        prefix = prompt(11, 0)
        texts: dict[str, list[int]] = {}
        names = itertools.count()
        for _ in range(60):
            pending: dict[str, int] = {}  # tokens that have K and V already
            copies: list[tuple[int, int]] = []
            if len(texts) < 4:
                name = f"r{next(names)}"
                texts[name] = prefix[: chance.randint(1, 11)] + prompt(chance.randint(1, 9), chance.randint(0, 9))
                pending[name] = manager.admit(name, texts[name])
            for name in list(texts):
                if name in pending or chance.random() < 0.3:
                    continue
                if chance.random() < 0.15:
                    child = f"r{next(names)}"
                    manager.fork(name, child)
                    texts[child] = list(texts[name])
                pending[name] = len(texts[name])
                new = prompt(chance.choice([1, 1, 1, 4]), chance.randint(0, 99))
                texts[name] += new
                copies += manager.extend(name, new)
            order = list(texts)
            if pending:
                counts = {name: len(texts[name]) - pending[name] if name in pending else 0 for name in order}
                cache[0].pages.rows = [manager.block_table(name) for name in order]
                for layer in cache.layers:
                    layer.place([len(texts[name]) - counts[name] for name in order], copies)
                logits = llama(
                    [torch.tensor(texts[name][len(texts[name]) - counts[name] :]).long() for name in order], cache
                )
                for name, mine in zip(order, logits, strict=True):
                    if counts[name]:
                        manager.computed(name, len(texts[name]))
                        alone = llama(torch.tensor([texts[name]]))[0, -counts[name] :]
                        assert (mine - alone).abs().max() < 1e-4  # bounded, as tests/test_llama.py has it
            for name in order:
                if chance.random() < 0.1 or manager.num_free < 20:
                    manager.release(name)
                    del texts[name]
        assert manager.counts.hits > 0
        assert manager.counts.copied > 0


@pytest.fixture(scope="module")
def llama():
    model = hf_model("llama")
    return Llama(decoder_spec(model.config.to_dict())).load(model.state_dict())


def prompt(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (tokens,), generator=generator).tolist()


class TestInAModel:
    """The tokens are those with the dense cache."""

    @pytest.mark.parametrize("name", ["llama", "mistral, window 6", "qwen2"])
    @pytest.mark.parametrize("block_size", [1, 3, 16, 256])
    def test_rows_of_any_length_give_the_same_tokens(self, name, block_size):
        hf = hf_model(name)
        model = Llama(decoder_spec(hf.config.to_dict())).load(hf.state_dict())
        rows = [torch.tensor(prompt(n, n)) for n in (3, 17, 1, 9)]
        paged = Cache.paged(3, 4 + 4 * (60 // block_size + 1), block_size, window=model.spec.window)
        expected = generate(model, rows, 20, cache=model.cache(), stop_token=5)
        got = generate(model, rows, 20, cache=paged, stop_token=5)
        assert torch.equal(got.tokens, expected.tokens)  # exact
        assert got.tokens.unique().numel() > 5

    def test_a_padded_rectangle_and_chunks_give_the_same_logits(self, llama):
        tokens, padding = torch.tensor([prompt(14, 1), prompt(14, 2)]), [0, 6]
        paged = Cache.paged(3, 20, 3)
        whole = llama(tokens, padding=padding)
        parts = [llama(tokens[:, :9], paged, padding=padding)]
        parts += [llama(tokens[:, a:b], paged) for a, b in ((9, 10), (10, 13), (13, 14))]
        got = torch.cat(parts, dim=1)
        for row, skip in enumerate(padding):
            assert (got[row, skip:] - whole[row, skip:]).abs().max() < 1e-4  # bounded, as tests/test_llama.py has it

    @pytest.mark.parametrize("name", ["llama", "mistral, window 6", "gpt2"])
    @pytest.mark.parametrize("mode", ["greedy", "beams", "padded"])
    def test_transformers_attends_through_it(self, name, mode):
        model = hf_model(name)
        ids, mask = torch.tensor([prompt(9, 1), prompt(9, 2)]), torch.ones(2, 9, dtype=torch.long)
        if mode == "padded":
            mask[1, :4] = 0
        options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        options |= {"num_beams": 3} if mode == "beams" else {}
        expected = model.generate(ids, **options)
        paged = Cache.paged(3, 200, 4)
        got = model.generate(ids, past_key_values=wrap(paged, model), **options)
        assert torch.equal(got, expected)  # exact
        assert paged[0].bytes_copied < paged[0].bytes_written if mode == "beams" else paged[0].bytes_copied == 0


def test_a_row_without_tokens_is_held_as_one():
    for nbits in (None, 4):
        paged, dense = Cache.paged(1, 9, 8, nbits=nbits), Cache.growing(1)
        for cache in (paged, dense):
            run(cache, [0, 3], 1)
            cache.select_rows(torch.tensor([0]))
        assert [x.shape for x in paged[0].held()] == [x.shape for x in dense[0].held()]
        mine, other = (run(cache, [2], 2) for cache in (paged, dense))
        assert_close(mine, other, dense, [2], 2)
        assert_holds_the_same(paged, dense)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "4"])
def test_sizes_that_cannot_be(size):
    for sizes in ((size, 4), (4, size)):
        with pytest.raises(ValueError, match="is a whole number, at least 1"):
            Pages(*sizes)


def test_queries_that_are_not_the_step_s_are_refused():
    cache = PagedCache(Pages(9, 4))
    with pytest.raises(ValueError, match="append before you attend"):
        cache.attend(torch.zeros(1, 6, 1, HEAD_DIM))
    with pytest.raises(ValueError, match="append before you read"):
        cache.read()
    cache.append(*torch.zeros(2, 2, KV_HEADS, 3, HEAD_DIM))
    for q in (torch.zeros(1, 6, 1, HEAD_DIM), torch.zeros(2, 6, 2, HEAD_DIM)):
        with pytest.raises(ValueError, match="the step has 1 queries in 2 rows"):
            cache.attend(q, rectangle(2, 1, [2, 2]))
    with pytest.raises(ValueError, match="4 queries but only 3 keys"):
        cache.attend(torch.zeros(2, 6, 4, HEAD_DIM))
    with pytest.raises(ValueError, match="head_dim 8; the new tokens"):
        cache.append(*torch.zeros(2, 2, KV_HEADS, 1, 4))
