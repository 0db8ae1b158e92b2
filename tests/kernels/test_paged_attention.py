"""Attention by a block table, Triton's kernel, the CPU's and their plain-PyTorch twin, against attention in float64.

Everywhere the blocks that no row holds, and the room behind the end of a row's last block, are NaN: one number read
from a slot that is not the table's would spoil the answer.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import kernels
from labkit.attention import PLAIN, Constants, Visibility, attention
from labkit.kernels import paged_attention_cpu
from labkit.kernels.paged_attention import paged_attention, store
from labkit.kernels.paged_attention_cpu import paged_decode_attention_cpu
from labkit.kernels.paged_decode_attention import paged_decode_attention
from labkit.kernels.paged_store import paged_store
from labkit.ledger import ledger
from tests.bounds import attention_bound
from tests.kernels.effort import examples
from tests.kernels.test_packed_attention import in_a_process

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ON_CPU = [paged_decode_attention_cpu] if DEVICE == "cpu" else []
EVERY = [paged_decode_attention, paged_attention, *ON_CPU]
needs_triton = pytest.mark.skipif(not kernels.available(DEVICE), reason="Triton is not installed here")


def case(lengths, heads, per_kv, head_dim, block_size, dtype, *, seed=0, shared=0, new_tokens=1):
    """q, the two pools, the table, and K and V of each row, `[1, heads, tokens, head_dim]`.

    shared: so many blocks at the beginning are the same in every row. Blocks lie anywhere, in any order.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = [-(-length // block_size) for length in lengths]
    numbers = itertools.count()
    common = [next(numbers) for _ in range(shared)]
    rows = [(common + [next(numbers) for _ in range(n)])[:n] for n in blocks]
    total = next(numbers) + 3
    order = torch.randperm(total, generator=generator)
    pools = torch.full((2, total, block_size, heads, head_dim), float("nan"), dtype=dtype)
    table = torch.full((len(lengths), max(blocks)), -1, dtype=torch.int32)
    for row, length in zip(rows, lengths, strict=True):
        for place in range(length):
            slot = pools[:, order[row[place // block_size]], place % block_size]
            if slot.isnan().all():
                slot.copy_(torch.randn(2, heads, head_dim, generator=generator))
    for index, row in enumerate(rows):
        table[index, : len(row)] = order[row]
    own = [
        pools[:, order[row]].flatten(1, 2)[:, None, :n].transpose(2, 3) for row, n in zip(rows, lengths, strict=True)
    ]
    q = torch.randn(len(lengths), heads * per_kv, new_tokens, head_dim, generator=generator).to(dtype)
    return q.to(DEVICE), *pools.to(DEVICE), table.to(DEVICE), [kv.to(DEVICE) for kv in own]


def visible_of(lengths, padding=None, new_tokens=1):
    padding = padding or [0] * len(lengths)
    first_query = tuple(n - new_tokens - p for n, p in zip(lengths, padding, strict=True))
    return Visibility(new_tokens, max(lengths), first_query, tuple(-p for p in padding))


def assert_agrees(q, k, v, table, own, constants=PLAIN, padding=None, *, triton=None, **options):
    lengths = [kv.shape[3] for kv in own]
    visible = visible_of(lengths, padding, q.shape[2])
    outs = {}
    for run in {True: [paged_decode_attention], False: [paged_attention, *ON_CPU], None: EVERY}[triton]:
        if run is not paged_attention and (q.shape[2] > 1 or (run is paged_decode_attention and constants.soft_cap)):
            continue
        outs[run] = run(q, k, v, table, visible, constants, **(options if run is paged_decode_attention else {}))
        assert outs[run].dtype == q.dtype
    for row, (keys, values) in enumerate(own):
        some, length = q[row : row + 1], lengths[row]
        alone = Visibility.newest(q.shape[2], length, [padding[row]] if padding else [])
        expected = attention(some.double(), keys.double(), values.double(), constants, alone)
        # Bounded: sums in float32, one rounding to the inputs' dtype; a cap only makes scores' errors smaller, but for
        # its own two roundings.
        bound = attention_bound(some, keys, values, scale=constants.scale, sums=torch.float32, result=q.dtype)
        bound *= 2 if constants.soft_cap else 1
        for out in outs.values():
            torch.testing.assert_close(out[row : row + 1].double(), expected, rtol=0, atol=bound)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 2, 5, 16, 33, 128, 256])
def test_any_block_size_and_dtype(block_size, dtype):
    assert_agrees(*case([1, 70, 300], 2, 3, 16, block_size, dtype), num_splits=3)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 8, 64, 80, 256])
def test_any_head_dim(head_dim, dtype):
    assert_agrees(*case([33, 6], 2, 3, head_dim, 16, dtype))


@needs_triton
@pytest.mark.parametrize("per_kv", range(1, 10))
def test_any_number_of_queries_per_kv_head(per_kv):
    assert_agrees(*case([40, 3], 2, per_kv, 16, 8, torch.float32))


def structure(draw, triton):
    """A call, its constants and its padding; one that Triton's kernel takes, where it is for that."""
    lengths = draw(st.lists(st.integers(1, 150), min_size=1, max_size=5))
    block_size = draw(st.integers(1, 40) | st.sampled_from([64, 100, 256]))
    padding = draw(st.none() | st.tuples(*(st.integers(0, length) for length in lengths)).map(list))
    shapes = (draw(st.integers(1, 3)), draw(st.integers(1, 8)), draw(st.integers(1, 40)))
    constants = Constants(
        draw(st.none() | st.floats(0.05, 1.0)),
        draw(st.none() | st.integers(1, 160)),
        None if triton else draw(st.none() | st.floats(0.5, 30.0)),
    )
    made = case(
        lengths, *shapes, block_size, draw(st.sampled_from(DTYPES)), seed=draw(st.integers(0, 99)),
        shared=draw(st.integers(0, 1 + min(lengths) // block_size)),
        new_tokens=1 if triton else draw(st.integers(1, min(lengths))),
    )  # fmt: skip
    return *made, constants, padding


def decode_step(draw, triton):
    """The same of a decode step: longer rows, larger heads."""
    lengths = draw(st.lists(st.integers(1, 400), min_size=1, max_size=6))
    window = draw(st.none() | st.integers(1, 400))
    cap = None if triton else draw(st.none() | st.floats(0.5, 30.0))
    padding = draw(st.none() | st.tuples(*(st.integers(0, length) for length in lengths)).map(list))
    made = case(
        lengths, draw(st.integers(1, 3)), draw(st.integers(1, 8)), draw(st.integers(1, 70)),
        draw(st.integers(1, 256)), draw(st.sampled_from(DTYPES)), seed=draw(st.integers(0, 99)),
    )  # fmt: skip
    return *made, Constants(window=window, soft_cap=cap), padding


@pytest.mark.parametrize("kind", [structure, decode_step])
@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_structure(kind, data):
    assert_agrees(*kind(data.draw, triton=False), triton=False)


@needs_triton
@pytest.mark.parametrize("kind", [structure, decode_step])
@examples(80)
@given(st.data())
def test_any_structure_in_triton(kind, data):
    splits = {
        "tile_size": data.draw(st.sampled_from([16, 32, 64])),
        "num_splits": data.draw(st.none() | st.integers(1, 9)),
    }
    assert_agrees(*kind(data.draw, triton=True), triton=True, **splits)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_the_twin_gives_exactly_what_attention_gives_of_the_same_tokens_in_a_rectangle(data):
    """Exact: where tokens lie changes nothing, whatever the blocks, the chunk, the window and the padding."""
    draw = data.draw
    lengths = draw(st.lists(st.integers(1, 120), min_size=1, max_size=5))
    new_tokens, dtype = draw(st.integers(1, min(lengths))), draw(st.sampled_from([*DTYPES, torch.float64]))
    padding = draw(st.none() | st.tuples(*(st.integers(0, length) for length in lengths)).map(list))
    heads, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    constants = Constants(
        draw(st.none() | st.floats(0.05, 1.0)), draw(st.none() | st.integers(1, 130)),
        draw(st.none() | st.floats(0.5, 30.0)),
    )  # fmt: skip
    q, k, v, table, own = case(
        lengths, heads, draw(st.integers(1, 4)), head_dim, draw(st.integers(1, 256)), dtype,
        seed=draw(st.integers(0, 99)), new_tokens=new_tokens,
    )  # fmt: skip
    visible = visible_of(lengths, padding, new_tokens)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rectangle = torch.zeros(2, len(lengths), heads, max(lengths), head_dim, dtype=wide, device=DEVICE)
    for row, kv in enumerate(own):
        rectangle[:, row, :, : lengths[row]] = kv[:, 0]
    mask = visible.mask(constants, DEVICE)
    if mask is not None:  # nobody may see it: it is not looked at
        rectangle = rectangle.masked_fill(~mask.any(2)[:, :, :, None], 0)
    # Laid token by token, as the twin gathers: the order of a product's sums may depend on how its input lies.
    rectangle = rectangle.transpose(2, 3).contiguous().transpose(2, 3)
    expected = attention(q.to(wide), *rectangle, constants, visible).to(dtype)
    assert torch.equal(paged_attention(q, k, v, table, visible, constants), expected)


@needs_triton
@pytest.mark.parametrize("run", EVERY)
def test_a_row_that_is_all_padding_gives_zeros(run):
    q, k, v, table, _ = case([90, 40], 2, 3, 16, 16, torch.float32)
    out = run(q, k, v, table, visible_of([90, 40], [90, 0]))
    assert torch.equal(out[0], torch.zeros_like(out[0]))  # exact
    assert out[1].abs().min() > 0


@needs_triton
@pytest.mark.parametrize("run", EVERY)
def test_padding_and_what_left_the_window_are_not_read(run):
    q, k, v, table, _ = case([90, 40], 2, 3, 16, 8, torch.float32)
    poisoned = [x.clone() for x in (k, v)]
    for row, (begin, length) in enumerate([(90 - 20, 90), (40 - 20, 40)]):
        for place in range(begin):
            for x in poisoned:
                x[table[row, place // 8], place % 8] = float("nan")
        assert length - begin == 20
    visible = visible_of([90, 40])
    out = run(q, *poisoned, table, visible, Constants(window=20))
    assert torch.equal(out, run(q, k, v, table, visible, Constants(window=20)))  # exact: the same numbers were read
    padded = run(q, *poisoned, table, visible_of([90, 40], [70, 20]))
    assert padded.isfinite().all()


@needs_triton
@pytest.mark.parametrize("run", EVERY)
def test_large_scores_do_not_overflow(run):
    q, k, v, table, own = case([50, 9], 1, 2, 16, 4, torch.float32)
    assert_agrees(q * 40, k * 40, v, table, [torch.stack((kv[0] * 40, kv[1])) for kv in own], num_splits=2)


@needs_triton
def test_the_triton_kernel_takes_any_strides():
    q, k, v, table, own = case([33, 70], 4, 2, 16, 8, torch.float32)
    k = k.transpose(1, 2).contiguous().transpose(1, 2)  # heads before tokens
    v = v.transpose(0, 3).contiguous().transpose(0, 3)
    visible = visible_of([33, 70])
    assert len({x.stride() for x in (k, v)}) == 2
    expected = paged_attention(q, k, v, table, visible)
    bound = max(attention_bound(q[:1], *kv, sums=torch.float32) for kv in own)
    wide = torch.cat((table, torch.full_like(table, -1)), dim=1)  # a table may have room for longer rows
    for some in (table, wide, table.T.contiguous().T, wide.long()):
        out = paged_decode_attention(q, k, v, some, visible)
        torch.testing.assert_close(out, expected, rtol=0, atol=bound)  # bounded


@needs_triton
@pytest.mark.parametrize("num_splits", [1, 2, 5, 1000])
def test_any_split_of_the_sequence_gives_the_same(num_splits):
    assert_agrees(*case([200, 1], 1, 3, 32, 16, torch.float32), num_splits=num_splits, tile_size=16)


class TestStore:
    """Exact: each number to its slot and to no other."""

    @needs_triton
    @pytest.mark.parametrize("run", [store, paged_store])
    @settings(max_examples=30, deadline=None)
    @given(
        sizes=st.tuples(*(st.integers(1, n) for n in (3, 3, 7, 40))),
        dtype=st.sampled_from(DTYPES),
        block_size=st.integers(1, 30),
        seed=st.integers(0, 99),
    )
    def test_any_shape(self, run, sizes, dtype, block_size, seed):
        batch, heads, new, head_dim = sizes
        generator = torch.Generator().manual_seed(seed)
        projected = torch.randn(batch, new, 2 * heads, head_dim, generator=generator).to(DEVICE, dtype)
        k, v = projected.transpose(1, 2).split(heads, dim=1)  # views of one product, as a model gives them
        keys, values = torch.full((2, 9, block_size, heads, head_dim), -7.0, dtype=dtype, device=DEVICE)
        size = 9 * block_size
        if batch * new > size:
            return
        slots = torch.randperm(size, generator=generator)[: batch * new].to(DEVICE)
        expected = []
        for new_ones, old in ((k, keys), (v, values)):
            right = old.clone().flatten(0, 1)
            for at, slot in enumerate(slots.tolist()):
                right[slot] = new_ones[at // new, :, at % new]
            expected.append(right.view_as(old))
        run(k, v, keys, values, slots)
        assert torch.equal(keys, expected[0])
        assert torch.equal(values, expected[1])

    @needs_triton
    def test_a_long_chunk_of_which_programs_take_several_tokens(self, monkeypatch):
        monkeypatch.setattr("labkit.kernels.paged_store.MANY", 50)
        monkeypatch.setattr("labkit.kernels.paged_store.AT_ONCE", 256)
        k, v = torch.randn(2, 3, 2, 17, 24, device=DEVICE)  # 51 tokens, 4 a program
        keys, values = torch.full((2, 9, 8, 2, 24), -7.0, device=DEVICE)
        slots = torch.randperm(72)[:51].to(DEVICE)
        paged_store(k, v, keys, values, slots)
        for new, pool in ((k, keys), (v, values)):
            right = torch.full((72, 2, 24), -7.0, device=DEVICE)
            right[slots] = new.transpose(1, 2).flatten(0, 1)
            assert torch.equal(pool.flatten(0, 1), right)

    @needs_triton
    def test_what_does_not_fit_is_refused(self):
        k, pool, slots = torch.zeros(1, 2, 3, 4), torch.zeros(5, 2, 2, 4), torch.arange(3)
        k, pool, slots = k.to(DEVICE), pool.to(DEVICE), slots.to(DEVICE)
        for bad, message in (
            ((k[:, :1], k[:, :1], pool, pool, slots), "do not fit blocks"),
            ((k, k, pool.half(), pool.half(), slots), "one dtype"),
            ((k, k, pool.transpose(0, 1), pool.transpose(0, 1), slots), "contiguous"),
            ((k, k, pool, pool, slots[:2]), "3 new tokens need as many slots"),
        ):
            with pytest.raises(ValueError, match=message):
                paged_store(*bad)


@pytest.mark.skipif(DEVICE != "cpu", reason="loops for a CPU")
class TestOnACpu:
    """What only the loops for a CPU have; that they agree with the twin, every test above says."""

    def test_what_is_not_taken_is_refused_and_says_who_takes_it(self):
        q, k, v, table, _ = case([20, 7], 2, 3, 16, 8, torch.float32)
        many = case([20, 7], 2, 3, 16, 8, torch.float32, new_tokens=3)[0]
        strided = k.transpose(1, 2).contiguous().transpose(1, 2)
        for bad in (
            (q.double(), k.double(), v.double()),
            (q.clone().requires_grad_(), k, v),
            (q, strided, v),
        ):
            with pytest.raises(ValueError, match="paged_attention takes all of these"):
                paged_decode_attention_cpu(*bad, table, visible_of([20, 7]))
        with pytest.raises(ValueError, match="paged_attention takes all of these"):
            paged_decode_attention_cpu(many, k, v, table, visible_of([20, 7], new_tokens=3))

    @pytest.mark.parametrize("threads", [2, 3, 7])
    def test_neither_threads_nor_other_rows_change_a_bit_of_a_row(self, threads):
        lengths = [2600, 1, 1024, 1025, 300]
        q, k, v, table, _ = case(lengths, 3, 3, 64, 16, torch.float32)
        visible = visible_of(lengths)
        assert 2 * sum(lengths) * 3 * 64 > paged_attention_cpu.PAYS
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            once = paged_decode_attention_cpu(q, k, v, table, visible)
            torch.set_num_threads(threads)
            assert torch.equal(paged_decode_attention_cpu(q, k, v, table, visible), once)  # exact
            for row, length in enumerate(lengths):
                one = slice(row, row + 1)
                alone = paged_decode_attention_cpu(q[one], k, v, table[one], visible_of([length]))
                assert torch.equal(alone, once[one])  # exact
        finally:
            torch.set_num_threads(before)

    def test_as_many_heads_as_fit_the_cache_are_worked_on_together(self, monkeypatch):
        for heads, head_dim, together in ((3, 64, 3), (8, 128, 4), (32, 128, 4), (7, 256, 1), (2, 999, 1)):
            assert paged_attention_cpu.together(heads, head_dim) == together
        q, k, v, table, _ = case([70, 3, 40], 6, 2, 16, 8, torch.float32)
        once = paged_decode_attention_cpu(q, k, v, table, visible_of([70, 3, 40]))
        for wide in (16, 40, 50):
            monkeypatch.setattr(paged_attention_cpu, "WIDE", wide)
            assert torch.equal(paged_decode_attention_cpu(q, k, v, table, visible_of([70, 3, 40])), once)  # exact

    def test_one_compilation_serves_every_layout_and_dtype(self):
        for dtype in DTYPES:
            q, k, v, table, _ = case([20, 7], 2, 3, 16, 8, dtype)
            strided = torch.stack((q, q), dim=-1)[..., 0]
            for window in (None, 5):
                paged_decode_attention_cpu(strided, k, v, table.long(), visible_of([20, 7]), Constants(window=window))
        assert len(paged_attention_cpu._attend.signatures) == 1

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_every_16_bit_number_is_read_as_it_is(self, dtype):
        every_number(dtype)

    def test_every_16_bit_number_is_read_as_it_is_where_denormals_are_flushed(self):
        in_a_process("""
import torch
from tests.kernels.test_paged_attention import every_number
torch.set_flush_denormal(True)
every_number(torch.float16)
every_number(torch.bfloat16)
""")


def every_number(dtype):
    """Each of the 65,536 numbers of a 16-bit dtype, NaN and infinity among them, against what NumPy makes of it."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    _, halves = paged_attention_cpu.as_arrays(numbers.view(8, 32, 1, 256))
    out, blocks = torch.empty(8, 1, 32, 256), torch.arange(8, dtype=torch.int32).numpy()
    for block, tile in enumerate(out.numpy()):
        kind = DTYPES.index(dtype)
        paged_attention_cpu._fill(halves, blocks, 32 * block, 32, 0, kind, tile, tile.view("uint32"))
    out = out.flatten()
    if dtype == torch.float16:
        expected = torch.from_numpy(numbers.numpy().astype("float32"))
    else:
        expected = (numbers.view(torch.int16).int() << 16).view(torch.float32)
    same = out.view(torch.int32) == expected.view(torch.int32)
    assert bool((same | (out.isnan() & expected.isnan())).all())


@needs_triton
@pytest.mark.parametrize("run", EVERY)
def test_the_ledger_counts_the_tokens_that_are_seen(run):
    q, k, v, table, _ = case([30, 9], 2, 3, 16, 8, torch.float32)
    with ledger() as work:
        run(q, k, v, table, visible_of([30, 9], [2, 0]), Constants(window=20))
    assert work.scores == 6 * (20 + 9)
    assert work.bytes_read == (20 + 9) * 2 * 2 * 16 * 4  # tokens, K and V, heads, head_dim, bytes
    assert work.bytes_copied == 0


class TestErrors:
    @needs_triton
    @pytest.mark.parametrize("run", EVERY)
    def test_what_does_not_fit(self, run):
        q, k, v, table, _ = case([20, 7], 2, 3, 16, 8, torch.float32)
        visible = visible_of([20, 7])
        for bad, message in (
            ((q[:, :5], k, v, table, visible), "a multiple of num_kv_heads"),
            ((q, k, v[:1], table, visible), "paged attention takes"),
            ((q[..., :8], k, v, table, visible), "paged attention takes"),
            ((q.half(), k, v, table, visible), "share one dtype"),
            ((q, k, v, table[:, :2], visible), r"20 tokens in blocks of 8 need a block table \[2, 3\]; got \[2, 2\]"),
            ((q, k, v, table[:1], visible), r"need a block table \[2, 3\]; got \[1, 3\]"),
            ((q, k, v, table, visible_of([20, 7, 1])), "1 queries and 20 keys in 3 rows"),
        ):
            with pytest.raises(ValueError, match=message):
                run(*bad)

    @pytest.mark.parametrize("run", [paged_attention, *ON_CPU])
    @pytest.mark.parametrize("block", [-1, None, 10**6])
    def test_a_table_that_lacks_a_block_that_is_read(self, run, block):
        q, k, v, table, _ = case([20, 7], 2, 3, 16, 8, torch.float32)
        table[0, 1] = len(k) if block is None else block  # the first number that is no block
        with pytest.raises(ValueError, match="the block table lacks a block of tokens that are read"):
            run(q, k, v, table, visible_of([20, 7]))
        run(q, k, v, table, visible_of([20, 7]), Constants(window=4))  # it is not read

    @needs_triton
    def test_what_the_triton_kernel_does_not_take(self):
        q, k, v, table, _ = case([20, 7], 2, 3, 16, 8, torch.float32)
        many = case([20, 7], 2, 3, 16, 8, torch.float32, new_tokens=3)[0]
        with pytest.raises(ValueError, match="takes one new token; got 3"):
            paged_decode_attention(many, k, v, table, visible_of([20, 7], new_tokens=3))
        with pytest.raises(ValueError, match="has no soft cap"):
            paged_decode_attention(q, k, v, table, visible_of([20, 7]), Constants(soft_cap=3.0))
        with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
            paged_decode_attention(q.double(), k.double(), v.double(), table, visible_of([20, 7]))
        with pytest.raises(ValueError, match="power of 2, at least 16"):
            paged_decode_attention(q, k, v, table, visible_of([20, 7]), tile_size=24)
