"""The packed paged cache beside quantized caches, one for each row: the same bits, whatever shares which block.

After every act of the state machine the packed blocks that no row holds are NaN, and so is the room in blocks that
wait: nothing may be read that is not a row's.
"""

import copy
import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from labkit.cache import Cache, OutOfBlocks, PagedQuantizedCache, Pages, QuantizedCache, Step
from labkit.cache.paged import Layout
from labkit.course.checks.effort import effort_of
from labkit.engine import Engine, Request
from labkit.engine import blocks as engine
from labkit.generation import generate
from labkit.ledger import ledger
from labkit.llama import Llama
from labkit.quantization import FLOAT8
from labkit.sizing import PagedQuantized
from labkit.specs import decoder_spec
from tests.bounds import attention_bound
from tests.cache.test_paged import joined, prompt
from tests.engine import tiny
from tests.tiny import hf_model

KV_HEADS, PER_KV, HEAD_DIM = 2, 3, 16
CODES = [8, 4, 2, *FLOAT8]
BLOCKS = [8, 16]


def prompt_of(tokens, seed):
    """A prompt for the engine's small model."""
    return tuple(random.Random(seed).choices(range(1, tiny.VOCAB), k=tokens))


def new_tokens(counts, seed, dtype=torch.float32, size=1.0):
    """Tensors for each row, `[1, heads, count, head_dim]`: K, V and queries."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (KV_HEADS, KV_HEADS, KV_HEADS * PER_KV)
    return [[size * torch.randn(1, n, c, HEAD_DIM, generator=generator).to(dtype) for c in counts] for n in sizes]


class ByRow:
    """What a packed paged layer is held to: a quantized cache for each row, which packs a group when it is full."""

    def __init__(self, nbits, block_size, window=None, **options):
        self.make = lambda: QuantizedCache(nbits, group_size=block_size, residual_length=0, window=window, **options)
        self.rows = []

    def run(self, pieces):
        self.rows = self.rows or [self.make() for _ in pieces[0]]
        outs = []
        for layer, k, v, q in zip(self.rows, *pieces, strict=True):
            if not k.shape[2]:
                outs.append(None)
                continue
            layer.append(k, v)
            outs.append(layer.attend(q))
        return outs

    def select(self, rows):
        self.rows = [copy.deepcopy(self.rows[row]) for row in rows]

    def truncate(self, seq_len):
        for layer in self.rows:
            layer.truncate(min(seq_len, layer.seq_len))


def run(cache, counts, seed, *, dtype=torch.float32, size=1.0):
    """One step through every layer: what each answered, by row."""
    outs = []
    with cache.step(counts) as step:
        for index, layer in enumerate(cache.layers):
            k, v, q = (joined(x, step) for x in new_tokens(counts, 100 * seed + index, dtype, size))
            layer.append(k, v, step)
            out = layer.attend(q, step)
            outs.append(out.split(1) if step.is_rectangle else list(step.split(out, dim=2)))
    return outs


def assert_answers(mine, others, by_row, queries):
    """Bounded: the same numbers, summed in another order, codes times scale plus zero up to three times as large."""
    for got, expected, layer, q in zip(mine, others, by_row.rows, queries, strict=True):
        if expected is not None:
            bound = 4 * attention_bound(q, *layer.held(), sums=torch.float32)
            torch.testing.assert_close(got, expected, rtol=0, atol=bound)


def assert_holds_the_same(layer, by_row):
    """Exact: bit by bit what the rows' own caches read back, and zeros behind the ends."""
    assert layer.lengths == tuple(row.seq_len for row in by_row.rows)
    if not layer.lengths:
        assert layer.held() is None
        return
    held = layer.held()
    for index, row in enumerate(by_row.rows):
        assert not any(x[index, :, row.seq_len :].any() for x in held)
        if row.seq_len:
            for x, y in zip(held, row.held(), strict=True):
                assert torch.equal(x[index, :, : row.seq_len], y[0])


def poison(layer):
    """NaN in every packed block that is not a row's full one, and in the room of blocks that wait."""
    if layer.packed is None:
        return
    size = layer.pages.block_size
    full = {row[place] for row, n in zip(layer.rows, layer.lengths, strict=True) for place in range(n // size)}
    others = [block for block in range(layer.pages.num_blocks) if block not in full]
    for x in layer.packed:
        x.rows[others] = 255
    rest = {row[n // size]: n % size for row, n in zip(layer.rows, layer.lengths, strict=True) if n % size}
    for place, block in enumerate(layer.open):
        for x in layer.waiting:
            x[place, :, rest.get(block, 0) :] = float("nan")


def bytes_of(layer, batch_blocks):
    """What arithmetic says: every packed block, and one dense block for each that waits."""
    row_bytes = [q.row_bytes for q in (x.quantizer for x in layer.packed)] if layer.packed else [0, 0]
    pools = layer.pages.num_blocks * KV_HEADS * HEAD_DIM * sum(row_bytes)
    return pools + batch_blocks * 2 * KV_HEADS * layer.pages.block_size * HEAD_DIM * 4


class PackedBesideQuantized(RuleBasedStateMachine):
    """A step that does not fit, or fails, changes nothing; what waits is what arithmetic says."""

    @initialize(
        batch=st.integers(1, 4), block_size=st.sampled_from(BLOCKS), nbits=st.sampled_from(CODES),
        window=st.none() | st.integers(1, 30), axis=st.sampled_from(["channel", "token"]), symmetric=st.booleans(),
        num_blocks=st.integers(1, 30),
    )  # fmt: skip
    def start(self, batch, block_size, nbits, window, axis, symmetric, num_blocks):
        self.batch, self.block_size, self.num_blocks = batch, block_size, num_blocks
        options = {"window": window, "key_axis": axis, "symmetric": symmetric}
        self.cache = Cache.paged(2, num_blocks, block_size, nbits=nbits, **options)
        self.by_row = [ByRow(nbits, block_size, **options) for _ in self.cache.layers]
        self.seed = 0

    @property
    def pages(self):
        return self.cache[0].pages

    @rule(data=st.data(), fails=st.booleans())
    def step(self, data, fails):
        one = st.integers(0, 20) if data.draw(st.booleans()) else st.just(1)
        counts = data.draw(st.lists(one, min_size=self.batch, max_size=self.batch).filter(any), label="counts")
        self.seed += 1
        free, before = self.pages.num_free, self.cache[0].rows
        try:
            mine = run(self.cache, counts, self.seed)
        except OutOfBlocks:
            assert self.cache[0].rows == self.cache[1].rows == before
            assert self.pages.num_free == free
            return
        for index, (got, by_row) in enumerate(zip(mine, self.by_row, strict=True)):
            pieces = new_tokens(counts, 100 * self.seed + index)
            assert_answers(got, by_row.run(pieces), by_row, pieces[2])
        if fails:
            self.undone(data.draw(st.integers(1, 20), label="undone"))

    def undone(self, count):
        """One more step, which raises when every layer but the last has it."""

        def half():
            with self.cache.step([count] * self.batch) as step:
                k, v, _ = (joined(x, step) for x in new_tokens([count] * self.batch, 7, size=1e7))
                self.cache[0].append(k, v, step)
                raise KeyboardInterrupt

        kept = self.cache[0].format
        with pytest.raises((KeyboardInterrupt, OutOfBlocks)):
            half()
        assert self.cache[0].format == kept

    @precondition(lambda self: self.cache.lengths)
    @rule(data=st.data())
    def truncate(self, data):
        keep = data.draw(st.integers(0, self.cache.seq_len), label="keep")
        self.cache.truncate(keep)
        for by_row in self.by_row:
            by_row.truncate(keep)
            if not keep:
                by_row.rows = []

    @precondition(lambda self: self.cache.lengths)
    @rule(data=st.data())
    def select_rows(self, data):
        rows = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=4), label="rows")
        self.cache.select_rows(torch.tensor(rows))
        for by_row in self.by_row:
            by_row.select(rows)
        self.batch = len(rows)

    @rule(batch=st.integers(1, 4))
    def reset(self, batch):
        self.cache.reset()
        for by_row in self.by_row:
            by_row.rows = []
        self.batch = batch

    @invariant()
    def they_hold_the_same_and_no_block_is_lost(self):
        for layer, by_row in zip(self.cache.layers, self.by_row, strict=True):
            assert_holds_the_same(layer, by_row)
            poison(layer)
            assert_holds_the_same(layer, by_row)
            ends = {row[n // self.block_size] for row, n in zip(layer.rows, layer.lengths, strict=True)
                    if n % self.block_size}  # fmt: skip
            assert set(layer.open) == ends
            assert layer.nbytes == bytes_of(layer, len(ends))
        assert self.cache[0].rows == self.cache[1].rows == self.pages.rows
        in_use = set(itertools.chain.from_iterable(self.pages.rows))
        assert self.pages.num_free == self.num_blocks - len(in_use)


PackedBesideQuantized.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
TestPackedBesideQuantized = PackedBesideQuantized.TestCase


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_stored_bits_are_the_same_in_whatever_pieces_the_tokens_come(data):
    draw, nbits = data.draw, data.draw(st.sampled_from(CODES))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    tokens, size = draw(st.integers(1, 120)), draw(st.sampled_from(BLOCKS))
    k, v, _ = (x[0] for x in new_tokens([tokens], draw(st.integers(0, 99)), dtype))
    layer, whole = PagedQuantizedCache(Pages(40, size), nbits), PagedQuantizedCache(Pages(40, size), nbits)
    whole.append(k, v)
    begin = 0
    while begin < tokens:
        end = begin + draw(st.integers(1, tokens - begin))
        layer.append(k[:, :, begin:end], v[:, :, begin:end])
        begin = end
    assert (layer.open, layer.rows, layer.nbytes) == (whole.open, whole.rows, whole.nbytes)
    for mine, other in zip(layer.packed, whole.packed, strict=True):
        assert torch.equal(mine.rows, other.rows)  # exact
    for x, y in zip(layer.held(), whole.held(), strict=True):
        assert torch.equal(x, y)  # exact
    for x, new in zip(layer.held(), (k, v), strict=True):
        left = tokens // size * size
        assert torch.equal(x[:, :, left:], new[:, :, left:])  # exact: what waits is as it came


def test_no_token_is_packed_twice(monkeypatch):
    layer, seen = PagedQuantizedCache(Pages(40, 8)), []
    pack = PagedQuantizedCache.pack

    def noted(self, blocks, k, v):
        seen.extend(k[:, 0, :, 0].flatten().tolist())
        pack(self, blocks, k, v)

    monkeypatch.setattr(PagedQuantizedCache, "pack", noted)
    k, v = torch.randn(2, 1, KV_HEADS, 100, HEAD_DIM)
    k[..., 0] = torch.arange(100.0)  # each token's name
    for begin, end in itertools.pairwise([0, 3, 4, 30, 31, 64, 99, 100]):
        layer.append(k[:, :, begin:end], v[:, :, begin:end])
    assert seen == list(range(96))


class TestSharedBlocks:
    def forked(self, tokens=21, rows=(0, 0)):
        cache, by_row = Cache.paged(1, 12, 8, nbits=4), ByRow(4, 8)
        run(cache, [tokens], 1)
        by_row.run(new_tokens([tokens], 100))
        cache.select_rows(torch.tensor(rows))
        by_row.select(rows)
        return cache, by_row

    A_BLOCK = 2 * 8 * KV_HEADS * HEAD_DIM * 4

    def test_rows_that_were_one_hold_the_same_packed_and_waiting_blocks_and_nothing_is_copied(self):
        cache, by_row = self.forked()
        assert (cache[0].pages.num_free, cache[0].bytes_copied, len(cache[0].open)) == (9, 0, 1)
        assert_holds_the_same(cache[0], by_row)

    def test_who_writes_into_a_shared_block_copies_what_waits_and_no_packed_block(self):
        cache, by_row = self.forked(rows=(0, 0, 0))
        shared = cache[0].rows[0]
        run(cache, [1, 4, 0], 2)
        by_row.run(new_tokens([1, 4, 0], 200))
        assert_holds_the_same(cache[0], by_row)
        rows = cache[0].rows
        assert rows[2] == shared  # it wrote nothing
        assert {row[:2] for row in rows} == {shared[:2]}  # the full blocks are still everybody's
        assert len({row[2] for row in rows}) == 3
        assert cache[0].bytes_copied == 3 * self.A_BLOCK  # of each row what waited

    def test_a_packed_block_that_is_cut_for_two_rows_is_filled_anew_by_each(self):
        cache, by_row = self.forked()
        cache.truncate(11)
        by_row.truncate(11)
        assert_holds_the_same(cache[0], by_row)
        assert len(cache[0].open) == 1
        for seed, counts in enumerate([[2, 9], [7, 1]], 2):
            run(cache, counts, seed)
            by_row.run(new_tokens(counts, 100 * seed))
            assert_holds_the_same(cache[0], by_row)

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    @pytest.mark.parametrize("keep", [21, 11])
    def test_a_step_that_is_undone_shares_again_to_the_bit(self, error, keep):
        cache, by_row = self.forked()
        cache.truncate(keep)
        by_row.truncate(keep)
        layer = cache[0]
        before = layer.rows, layer.open, layer.nbytes, [x.clone() for x in layer.waiting]

        def undone():
            with cache.step([9, 2]) as step:
                k, v, _ = (joined(x, step) for x in new_tokens([9, 2], 9))
                layer.append(k, v, step)
                raise error

        with pytest.raises(error):
            undone()
        assert (layer.rows, layer.open, layer.nbytes) == before[:3]
        rest = keep % 8
        for x, y in zip(layer.waiting, before[3], strict=True):
            assert torch.equal(x[:, :, :rest], y[:, :, :rest])  # exact
        assert_holds_the_same(layer, by_row)
        run(cache, [9, 2], 2)
        by_row.run(new_tokens([9, 2], 200))
        assert_holds_the_same(layer, by_row)

    def test_marks_nest(self):
        cache, by_row = self.forked(rows=(0,))
        layer = cache[0]
        mark = layer.mark()
        for turn in range(30):
            layer.append(*(x[0] for x in new_tokens([1], turn)[:2]))
        layer.restore(mark)
        assert_holds_the_same(layer, by_row)


class TestMetadata:
    def test_a_range_that_float16_cannot_hold_makes_all_metadata_wider(self):
        layer = PagedQuantizedCache(Pages(40, 8), 4)
        k, v, _ = (x[0] for x in new_tokens([64], 1))
        layer.append(k, v)
        mark, nbytes, before = layer.mark(), layer.nbytes, layer.held()
        layer.append(*(1e7 * x[0] for x in new_tokens([20], 2)[:2]))
        assert layer.format.metadata == "bfloat16"
        for x, y in zip(layer.held(), before, strict=True):
            spread = y.abs().max() * 2
            # Lossy: packed anew, within a step of 4 bits and what bfloat16 rounds outwards.
            assert (x[:, :, :64] - y).abs().max() <= 0.1 * spread
        layer.restore(mark)
        assert (layer.format.metadata, layer.nbytes) == ("float16", nbytes)
        assert all(torch.equal(x, y) for x, y in zip(layer.held(), before, strict=True))  # exact

    def test_reset_forgets_that(self):
        layer = PagedQuantizedCache(Pages(40, 8), 4)
        layer.append(*(1e7 * x[0] for x in new_tokens([20], 2)[:2]))
        layer.reset()
        assert (layer.format.metadata, layer.nbytes, layer.lengths) == ("float16", 0, ())

    def test_nan_shows_in_its_block(self):
        layer = PagedQuantizedCache(Pages(40, 8), 4)
        k, v, _ = (x[0] for x in new_tokens([20], 1))
        k[0, 1, 10, 3] = float("nan")
        layer.append(k, v)
        assert layer.held()[0][0, 1, 8:16, 3].isnan().all()
        assert layer.held()[0].isnan().sum() == 8


class TestDecode:
    @pytest.mark.parametrize("counts", [[1, 1, 1], [1, 0, 1]])
    def test_no_dense_copy_is_made(self, counts):
        cache = Cache.paged(1, 130, 16, nbits=4)
        run(cache, [900, 700, 5], 1)
        layer = cache[0]
        with cache.step(counts) as step:
            k, v, q = (joined(x, step) for x in new_tokens(counts, 2))
            layer.append(k, v, step)
            layer.attend(q, step)  # the loops are compiled
            effort = effort_of(lambda: layer.attend(q, step))
        waits = 16 * KV_HEADS * HEAD_DIM * 4 * len(layer.open)
        assert effort.largest <= 2 * waits
        assert effort.made < KV_HEADS * HEAD_DIM * 4 * 160  # of 1,600 tokens

    def test_an_append_that_fills_no_block_moves_nothing(self):
        cache = Cache.paged(1, 130, 16, nbits=4)
        run(cache, [33, 18], 1)
        before = cache[0].waiting[0].data_ptr(), cache[0].bytes_copied
        run(cache, [1, 1], 2)
        assert (cache[0].waiting[0].data_ptr(), cache[0].bytes_copied) == before

    def test_only_what_is_seen_is_counted_as_read(self):
        cache = Cache.paged(1, 60, 8, nbits=4, window=20)
        run(cache, [90, 7], 1)
        layer = cache[0]
        a_block, a_token = 2 * KV_HEADS * HEAD_DIM * (4 + 4), 2 * KV_HEADS * HEAD_DIM * 4
        for counts, blocks, tokens in (([1, 1], 3 + 1, 3), ([0, 5], 1, 5)):  # tokens 71 to 90 and 0 to 7; 0 to 12
            with cache.step(counts) as step:
                k, v, q = (joined(x, step) for x in new_tokens(counts, 2))
                layer.append(k, v, step)
                before = layer.bytes_read
                with ledger() as work:
                    layer.attend(q, step)
            assert layer.bytes_read - before == work.bytes_read == blocks * a_block + tokens * a_token

    def test_what_is_made_of_a_step_is_made_once_for_all_layers(self, monkeypatch):
        made = []

        def layout(*args):
            made.append(Layout(*args))
            return made[-1]

        monkeypatch.setattr("labkit.cache.paged.Layout", layout)
        cache = Cache.paged(5, 40, 8, nbits=4)
        for turn, counts in enumerate([[9, 9], [1, 1], [1, 1], [3, 1], [0, 1]]):
            run(cache, counts, turn)
            assert len(made) == turn + 1
        for decode in made[1:3]:
            assert sorted(key[0] for key in decode._made) == ["moves", "packed table", "read", "table"]

    def test_float64_and_gradients_go_to_the_twin(self):
        for dtype in (torch.float64, torch.float32):
            layer, other = PagedQuantizedCache(Pages(9, 8), 8), QuantizedCache(8, group_size=8, residual_length=0)
            k, v, q = (x[0] for x in new_tokens([13], 1, dtype))
            outs = []
            for cache in (layer, other):
                leaf = v.clone().requires_grad_(dtype == torch.float32)
                cache.append(k, leaf)
                out = cache.attend(q[:, :, -1:])
                outs.append(out.detach())
                if leaf.requires_grad:
                    out.sum().backward()
                    assert leaf.grad[:, :, 8:].abs().sum() > 0  # of tokens that wait
            bound = 4 * attention_bound(q, k, v)
            torch.testing.assert_close(*outs, rtol=0, atol=bound)  # bounded

    def test_filled_in_inference_mode_it_goes_on_outside(self):
        cache, by_row = Cache.paged(1, 20, 8, nbits=4), ByRow(4, 8)
        with torch.inference_mode():
            run(cache, [5, 17], 1)
            cache.select_rows(torch.tensor([1, 0, 1]))
            cache.truncate(14)
        by_row.run(new_tokens([5, 17], 100))
        by_row.select([1, 0, 1])
        by_row.truncate(14)
        run(cache, [1, 1, 3], 2)
        by_row.run(new_tokens([1, 1, 3], 200))
        assert_holds_the_same(cache[0], by_row)

    def test_an_observer_gets_the_weights(self):
        layer, other, seen = PagedQuantizedCache(Pages(9, 8)), QuantizedCache(4, group_size=8, residual_length=0), []
        k, v, q = (x[0] for x in new_tokens([13], 1))
        for cache in (layer, other):
            cache.append(k, v)
        outs = [cache.attend(q[:, :, -2:], observe=seen.append) for cache in (layer, other)]
        assert torch.equal(*seen)  # exact: the same computation over the same numbers
        assert torch.equal(*outs)


class TestTablesFromOutside:
    """As an engine with a block manager of its own drives the cache."""

    def test_a_block_that_waits_is_kept_while_no_row_names_it(self):
        cache, by_row = Cache.paged(1, 9, 8, nbits=4), ByRow(4, 8)
        cache[0].pages.rows = [[8, 3], [5]]
        run(cache, [11, 3], 1)
        by_row.run(new_tokens([11, 3], 100))
        cache[0].pages.rows = [[5]]  # a step without the first request
        cache[0].place([3])
        run(cache, [2], 2)
        cache[0].pages.rows = [[8, 3], [5]]
        cache[0].place([11, 5])
        nothing = [torch.empty(1, n, 0, HEAD_DIM) for n in (KV_HEADS, KV_HEADS, KV_HEADS * PER_KV)]
        by_row.run([[none, new[0]] for none, new in zip(nothing, new_tokens([2], 200), strict=True)])
        assert_holds_the_same(cache[0], by_row)

    def test_a_block_that_waited_is_begun_anew_by_another_row(self):
        cache = Cache.paged(1, 9, 8, nbits=4)
        cache[0].pages.rows = [[8, 3]]
        run(cache, [11], 1)
        cache[0].pages.rows = [[3]]
        cache[0].place([0])
        run(cache, [2], 2)
        k = new_tokens([2], 200)[0][0]
        assert torch.equal(cache[0].held()[0], k)  # exact
        assert cache[0].open == (3,)

    @pytest.mark.parametrize("tokens", [16, 14])
    def test_a_prefix_found_again_may_end_within_a_packed_block(self, tokens):
        cache, by_row = Cache.paged(1, 9, 8, nbits=4), ByRow(4, 8)
        cache[0].pages.rows = [[8, 3]]
        run(cache, [16], 1)
        by_row.run(new_tokens([16], 100))
        cache[0].pages.rows = [[8, 1]]
        cache[0].place([tokens], [(3, 1)])
        by_row.truncate(tokens)
        if tokens < 16:
            run(cache, [2], 2)
            by_row.run(new_tokens([2], 200))
        assert_holds_the_same(cache[0], by_row)
        cache[0].pages.rows = [[8, 3]]  # what it was copied from
        cache[0].place([16])
        whole = ByRow(4, 8)
        whole.run(new_tokens([16], 100))
        assert_holds_the_same(cache[0], whole)

    def test_tokens_that_should_wait_and_do_not_are_missed(self):
        cache = Cache.paged(2, 9, 8, nbits=4)
        cache[0].pages.rows = [[8, 3]]
        run(cache, [11], 1)
        cache[0].pages.rows = [[8, 4]]
        with pytest.raises(ValueError, match=r"tokens of blocks \[4\] should wait here"):
            run(cache, [1], 2)
        assert cache.lengths == (11,)

    def test_a_model_answers_requests_that_come_grow_fork_and_go_as_quantized_caches_do(self):
        """The engine's block manager keeps the tables: prefix reuse, copies on write, chunks beside decodes."""
        hf = hf_model("llama")
        llama = Llama(decoder_spec(hf.config.to_dict())).load(hf.state_dict())
        size, chance = 8, random.Random(3)
        manager = engine.BlockManager(40, size)
        cache = Cache.paged(3, 40, size, nbits=8)
        prefix = prompt(21, 0)
        texts, alone, names = {}, {}, itertools.count()
        for _ in range(50):
            pending, copies = {}, []
            if len(texts) < 4:
                name = f"r{next(names)}"
                texts[name] = prefix[: chance.randint(1, 21)] + prompt(chance.randint(1, 9), chance.randint(0, 9))
                pending[name] = manager.admit(name, texts[name])
                alone[name] = Cache.quantized(3, 8, group_size=size, residual_length=0)
                if pending[name]:
                    llama(torch.tensor([texts[name][: pending[name]]]), alone[name])
            for name in list(texts):
                if name in pending or chance.random() < 0.3:
                    continue
                if chance.random() < 0.15:
                    child = f"r{next(names)}"
                    manager.fork(name, child)
                    texts[child], alone[child] = list(texts[name]), copy.deepcopy(alone[name])
                pending[name] = len(texts[name])
                new = prompt(chance.choice([1, 1, 1, 4]), chance.randint(0, 99))
                texts[name] += new
                copies += manager.extend(name, new)
            order = [name for name in texts if name in pending or chance.random() < 0.5]  # not all, in every step
            if pending:
                counts = {name: len(texts[name]) - pending[name] if name in pending else 0 for name in order}
                cache[0].pages.rows = [manager.block_table(name) for name in order]
                for layer in cache.layers:
                    layer.place([len(texts[name]) - counts[name] for name in order], copies)
                new = [torch.tensor(texts[name][len(texts[name]) - counts[name] :]).long() for name in order]
                for name, mine, some in zip(order, llama(new, cache), new, strict=True):
                    if counts[name]:
                        manager.computed(name, len(texts[name]))
                        expected = llama(some[None], alone[name])[0]
                        # Lossy: a prefix found again was written in other pieces, and read packed or not yet packed
                        # meanwhile. Another row's tokens would move logits by as much as they are spread.
                        assert (mine - expected).abs().max() < 0.1 * expected.std()
            for name in list(texts):
                if chance.random() < 0.1 or manager.num_free < 20:
                    manager.release(name)
                    del texts[name], alone[name]
        assert manager.counts.hits > 0
        assert manager.counts.copied > 0


class TestInTheEngine:
    def requests(self, count, longer=0):
        return [Request(str(n), prompt_of(3 + 5 * n % 17, n), 4 + 3 * n % 13 + longer) for n in range(count)]

    def test_it_answers_as_quantized_caches_do_one_at_a_time(self):
        """Exact: in float64 no two logits are within a rounding. Prompts come whole and nothing is reused."""
        made = tiny.model()
        cache = Cache.paged(2, 24, 8, nbits=8)
        engine = Engine(made, 24, 8, reuse=False, max_rows=3, cache=cache)
        requests = self.requests(9)
        answers = engine.run(requests)
        for request in requests:
            kept = Cache.quantized(2, 8, group_size=8, residual_length=0)
            alone = generate(made, torch.tensor([request.tokens]), request.max_new_tokens, cache=kept)
            assert answers[request.id] == alone.tokens[0].tolist()
        assert engine.blocks.num_free == 24
        assert len(cache[0].open) <= 9  # at most one of each request, until its number is handed out again

    def test_chunks_prefixes_preemptions_and_cancelled_requests_leave_every_block_free(self):
        made, cache = tiny.model(), Cache.paged(2, 6, 8, nbits=4)
        engine = Engine(made, 6, 8, token_budget=7, max_rows=4, cache=cache)
        requests = self.requests(9, longer=14)
        requests += [Request(f"{r.id} again", r.tokens, r.max_new_tokens) for r in requests]
        for request in requests:
            engine.add(request)
        got = {request.id: [] for request in requests}
        for turn, token in enumerate(engine.stream()):
            if token.token is not None:
                got[token.id].append(token.token)
            if turn == 20:
                engine.cancel(next(iter(engine.flights)))
        assert sum(len(got[r.id]) == r.max_new_tokens for r in requests) == len(requests) - 1
        assert engine.blocks.num_free == 6
        assert engine.metrics()["vllm:num_preemptions"] > 0
        assert all(x.isfinite().all() for layer in cache.layers for x in layer.waiting)


class TestInAModel:
    @pytest.mark.parametrize("name", ["llama", "mistral, window 6"])
    @pytest.mark.parametrize("nbits", [8, 4])
    def test_rows_of_any_length_give_the_tokens_of_quantized_caches(self, name, nbits):
        hf = hf_model(name)
        model = Llama(decoder_spec(hf.config.to_dict())).load(hf.state_dict())
        rows = [torch.tensor(prompt(n, n)) for n in (3, 17, 1, 9)]
        paged = Cache.paged(3, 40, 8, nbits=nbits, window=model.spec.window)
        got = generate(model, rows, 20, cache=paged).tokens
        for row, tokens in zip(rows, got, strict=True):
            kept = Cache.quantized(3, nbits, group_size=8, residual_length=0, window=model.spec.window)
            assert torch.equal(tokens[None], generate(model, row[None], 20, cache=kept).tokens)  # exact

    def test_a_padded_rectangle_answers_as_the_quantized_cache_does(self):
        hf = hf_model("llama")
        llama = Llama(decoder_spec(hf.config.to_dict())).load(hf.state_dict())
        tokens, padding = torch.tensor([prompt(24, 1), prompt(24, 2)]), [0, 11]
        logits = []
        for cache in (Cache.paged(3, 20, 8, nbits=4), Cache.quantized(3, 4, group_size=8, residual_length=0)):
            parts = [llama(tokens[:, :15], cache, padding=padding)]
            parts += [llama(tokens[:, a:b], cache) for a, b in ((15, 16), (16, 20), (20, 24))]
            logits.append(torch.cat(parts, dim=1))
        for row, skip in enumerate(padding):
            # Bounded: float32, three layers of wide weights, sums of at most 80 terms in another order.
            torch.testing.assert_close(logits[0][row, skip:], logits[1][row, skip:], rtol=0, atol=1e-3)


class TestErrors:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: PagedQuantizedCache(Pages(9, 16), 3), "nbits is 2, 4 or 8; got 3"),
            (lambda: PagedQuantizedCache(Pages(9, 16), torch.float16), "nbits is 8, 4 or 2, or a float8 dtype"),
            (lambda: PagedQuantizedCache(Pages(9, 1), 4), "whole 16-bit words"),
            (lambda: PagedQuantizedCache(Pages(9, 16), 4, key_axis=0), 'key_axis is "channel" or "token"; got 0'),
            (lambda: PagedQuantizedCache(Pages(9, 16), metadata=torch.float32), "metadata is torch.bfloat16 or"),
        ],
    )
    def test_what_cannot_be_is_one_clear_line(self, make, message):
        with pytest.raises(ValueError, match=message) as error:
            make()
        assert "\n" not in str(error.value)

    def test_a_head_dim_that_blocks_do_not_divide_is_refused_and_nothing_is_appended(self):
        cache = Cache.paged(2, 9, 12, nbits=4)
        with pytest.raises(ValueError, match="groups of 12 do not divide a head_dim of 16"):
            run(cache, [3], 1)
        assert (cache.lengths, cache.nbytes, cache[0].rows) == ((), 0, ())

    def test_out_of_blocks_changes_nothing_in_any_layer(self):
        cache, by_row = Cache.paged(2, 4, 8, nbits=4), ByRow(4, 8)
        run(cache, [15, 9], 1)
        by_row.run(new_tokens([15, 9], 100))
        with pytest.raises(OutOfBlocks, match="10 new tokens need 1 more blocks of 8; 0 of 4 are free"):
            run(cache, [3, 7], 2)
        assert_holds_the_same(cache[0], by_row)

    def test_an_append_that_runs_out_of_memory_changes_nothing(self, monkeypatch):
        cache, by_row = Cache.paged(1, 9, 8, nbits=4), ByRow(4, 8)
        run(cache, [15], 1)
        by_row.run(new_tokens([15], 100))

        def full(*_):
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(PagedQuantizedCache, "pack", full)
            with pytest.raises(MemoryError):
                run(cache, [1], 2)
        assert_holds_the_same(cache[0], by_row)
        assert isinstance(cache[0].format, PagedQuantized)
        step = Step((1,), (15,))
        cache[0].append(*(x[0] for x in new_tokens([1], 200)[:2]), step)
        by_row.run(new_tokens([1], 200))
        assert_holds_the_same(cache[0], by_row)
