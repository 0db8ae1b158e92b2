"""Attention over packed blocks, Triton's kernel, the CPU's and their plain-PyTorch twin, against attention in float64.

Everywhere the blocks that no row holds are NaN, and so is the room in blocks that wait: one number read from a place
that is not the table's would spoil the answer.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import kernels
from labkit.attention import PLAIN, Constants, Visibility, attention
from labkit.kernels import paged_packed_attention_cpu
from labkit.kernels.packed_attention import packed_attention
from labkit.kernels.paged_packed_attention import paged_packed_attention
from labkit.kernels.paged_packed_attention_cpu import paged_packed_decode_attention_cpu
from labkit.kernels.paged_packed_decode_attention import paged_packed_decode_attention
from labkit.ledger import ledger
from labkit.quantization import Packed
from tests.bounds import attention_bound
from tests.kernels.effort import FEW, MOST, examples
from tests.kernels.test_packed_attention import CODES, DEVICE, DTYPES, in_a_process, quantizers
from tests.kernels.test_paged_attention import visible_of
from tests.pairs import every_pair

ON_CPU = [paged_packed_decode_attention_cpu] if DEVICE == "cpu" else []
EVERY = [paged_packed_decode_attention, paged_packed_attention, *ON_CPU]
needs_triton = pytest.mark.skipif(not kernels.available(DEVICE), reason="Triton is not installed here")


def case(lengths, heads, per_kv, head_dim, scheme, dtype, *, seed=0, shared=0, new_tokens=1, scale_of=1.0):
    """q, packed keys and values, the blocks that wait, the table, and of each row what its K and V are made of.

    shared: so many full blocks at the beginning are the same in every row. Blocks lie anywhere, in any order.
    """
    generator = torch.Generator().manual_seed(seed)
    size, numbers = scheme[0].group_size, itertools.count()
    common = [next(numbers) for _ in range(shared)]
    rows = [(common + [next(numbers) for _ in range(n // size)])[: n // size] for n in lengths]
    total = next(numbers) + 3
    order = torch.randperm(total, generator=generator).tolist()
    kv = [scale_of * torch.randn(2, 1, heads, n, head_dim, generator=generator).to(dtype) for n in lengths]
    for row, x in zip(rows, kv, strict=True):  # what is shared is the same
        same = len(set(row) & set(common)) * size
        x[:, :, :, :same] = kv[lengths.index(max(lengths))][:, :, :, :same]
    pools = [
        torch.full((total, 1, heads, head_dim, q.row_bytes), 255, dtype=torch.uint8)
        for q in scheme  # NaN throughout
    ]
    rests = [row for row, n in enumerate(lengths) if n % size]
    waiting = torch.full((2, len(rests) + 1, heads, size, head_dim), float("nan"), dtype=dtype)
    table = torch.full((len(lengths), max(-(-n // size) for n in lengths)), -1, dtype=torch.int32)
    parts = []
    for index, (row, x) in enumerate(zip(rows, kv, strict=True)):
        packed = [q.quantize(side[:, :, : len(row) * size]) for q, side in zip(scheme, x, strict=True)]
        for pool, some in zip(pools, packed, strict=True):
            for place, block in enumerate(row):
                pool[order[block]] = some.rows[place]
        table[index, : len(row)] = torch.tensor([order[block] for block in row])
        if rest := lengths[index] % size:
            place = len(rests) - rests.index(index)  # in another order, and not from 0 on
            waiting[:, place, :, :rest] = x[:, 0, :, len(row) * size :]
            table[index, len(row)] = total + place
        parts.append((*packed, tuple(x[:, :, :, len(row) * size :])))
    q = torch.randn(len(lengths), heads * per_kv, new_tokens, head_dim, generator=generator).to(dtype)
    k, v = (Packed(q, pool.to(DEVICE)) for q, pool in zip(scheme, pools, strict=True))
    return q.to(DEVICE), k, v, tuple(waiting.to(DEVICE)), table.to(DEVICE), parts


def numbers(part):
    """K and V of a row as they come back, float64 `[1, heads, tokens, head_dim]`."""
    k, v, after = part
    return [
        torch.cat((x.dequantize(torch.float64), y.double()), 2).to(DEVICE) for x, y in zip((k, v), after, strict=True)
    ]


def implementations(q, k, v, waiting, constants, triton=None):
    """Triton's kernel alone, all but that, or (None) all that take these."""
    if triton:
        return [paged_packed_decode_attention]
    runs = [paged_packed_attention]
    if q.shape[2] == 1:
        on_cpu = DEVICE == "cpu" and paged_packed_attention_cpu.takes(q, k, v, waiting)
        runs += [paged_packed_decode_attention_cpu] if on_cpu else []
        runs += [paged_packed_decode_attention] if triton is None and not constants.soft_cap else []
    return runs


def assert_agrees(q, k, v, waiting, table, parts, constants=PLAIN, padding=None, *, triton=None, **options):
    lengths = [numbers(part)[0].shape[2] for part in parts]
    visible = visible_of(lengths, padding, q.shape[2])
    for run in implementations(q, k, v, waiting, constants, triton):
        more = options if run is paged_packed_decode_attention else {}
        out = run(q, k, v, waiting, table, visible, constants, **more)
        assert out.dtype == q.dtype
        for row, part in enumerate(parts):
            some, wide = q[row : row + 1], numbers(part)
            alone = Visibility.newest(q.shape[2], lengths[row], [padding[row]] if padding else [])
            expected = attention(some.double(), *wide, constants, alone)
            # Bounded: float32 sums of numbers that are codes times scale plus zero, up to three times as large as what
            # they add up to, and one rounding to the queries' dtype; a cap has two roundings of its own.
            bound = 4 * attention_bound(some, *wide, scale=constants.scale, sums=torch.float32, result=q.dtype)
            bound *= 2 if constants.soft_cap else 1
            torch.testing.assert_close(out[row : row + 1].double(), expected, rtol=0, atol=bound)


@needs_triton
@pytest.mark.parametrize(("nbits", "block_size", "dtype"), every_pair(CODES, [8, 16, 48], DTYPES), ids=str)
def test_any_bits_block_size_and_dtype(nbits, block_size, dtype):
    assert_agrees(*case([1, block_size, 75, 2 * block_size + 1], 1, 3, 48, quantizers(nbits, block_size), dtype))


@needs_triton
@pytest.mark.parametrize(("nbits", "head_dim", "dtype"), every_pair([8, 4], [24, 64, 80, 256], DTYPES), ids=str)
def test_any_head_dim(nbits, head_dim, dtype):
    assert_agrees(*case([33, 6], 1, 3, head_dim, quantizers(nbits, 8), dtype))


@needs_triton
@pytest.mark.parametrize("per_kv", range(1, 9))
def test_any_number_of_queries_per_kv_head(per_kv):
    assert_agrees(*case([40, 3, 16], 2, per_kv, 32, quantizers(4, 16), torch.float32))


def structure(draw, triton):
    """A call, its constants and its padding; one that Triton's kernel takes, where it is for that."""
    most, rows, heads = (MOST, 2 * FEW - 1, FEW) if triton else (120, 5, 3)
    lengths = draw(st.lists(st.integers(1, most), min_size=1, max_size=rows))
    group = draw(st.sampled_from([8, 16, 32]))
    padding = draw(st.none() | st.tuples(*(st.integers(0, length) for length in lengths)).map(list))
    scheme = quantizers(
        draw(st.sampled_from(CODES)), group, draw(st.sampled_from(["channel", "token"])), draw(st.booleans()),
        draw(st.sampled_from([torch.float16, torch.bfloat16])),
    )  # fmt: skip
    constants = Constants(
        draw(st.none() | st.floats(0.05, 1.0)),
        draw(st.none() | st.integers(1, 130)),
        None if triton else draw(st.none() | st.floats(0.5, 30.0)),
    )
    made = case(
        lengths, draw(st.integers(1, heads)), draw(st.integers(1, 8)), group * draw(st.integers(1, 3)), scheme,
        draw(st.sampled_from(DTYPES)), seed=draw(st.integers(0, 99)),
        shared=draw(st.integers(0, min(lengths) // group)),
        new_tokens=1 if triton else draw(st.integers(1, min(lengths)) | st.just(1)),
    )  # fmt: skip
    return *made, constants, padding


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_structure(data):
    assert_agrees(*structure(data.draw, triton=False), triton=False)


@needs_triton
@examples(40)
@given(st.data())
def test_any_structure_in_triton(data):
    assert_agrees(*structure(data.draw, triton=True), triton=True, num_splits=data.draw(st.none() | st.integers(1, 9)))


@needs_triton
@pytest.mark.parametrize("num_splits", [1, 2, 5, 1000])
def test_any_split_of_the_sequence_gives_the_same(num_splits):
    arguments = case([200, 1, 64], 1, 3, 32, quantizers(4, 16), torch.float32)
    assert_agrees(*arguments, num_splits=num_splits)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4), nbits=st.sampled_from(CODES), seed=st.integers(0, 99),
    window=st.none() | st.integers(1, 90), axis=st.sampled_from(["channel", "token"]),
)  # fmt: skip
def test_the_twin_gives_what_packed_attention_gives_of_each_row_by_itself(lengths, nbits, seed, window, axis):
    """Exact: the same numbers in the same order, wherever their blocks lie."""
    q, k, v, waiting, table, parts = case(lengths, 2, 3, 16, quantizers(nbits, 8, axis), torch.float32, seed=seed)
    constants = Constants(window=window)
    out = paged_packed_attention(q, k, v, waiting, table, visible_of(lengths), constants)
    for row, (keys, values, after) in enumerate(parts):
        seen = Visibility.newest(1, lengths[row])
        left = seen.unseen(constants) // 8  # blocks that nobody looks at are left out there, too
        keys, values = (x.tiles(left, len(x.rows)) for x in (keys, values))
        keys, values = (Packed(x.quantizer, x.rows.to(DEVICE)) for x in (keys, values))
        alone = packed_attention(
            q[row : row + 1], keys, values, constants, seen.of_keys(8 * left, lengths[row]),
            after=tuple(x.to(DEVICE) for x in after),
        )  # fmt: skip
        assert torch.equal(out[row : row + 1], alone)


@needs_triton
@pytest.mark.parametrize("run", EVERY)
def test_a_row_that_is_all_padding_gives_zeros(run):
    *given_, _ = case([90, 40], 2, 3, 16, quantizers(4, 16), torch.float32)
    out = run(*given_, visible_of([90, 40], [90, 0]))
    assert torch.equal(out[0], torch.zeros_like(out[0]))  # exact
    assert out[1].abs().min() > 0


@needs_triton
@pytest.mark.parametrize("run", EVERY)
def test_blocks_of_padding_and_what_left_the_window_are_not_read(run):
    q, k, v, waiting, table, _ = case([90, 40], 2, 3, 16, quantizers(4, 8), torch.float32)
    poisoned = [Packed(x.quantizer, x.rows.clone()) for x in (k, v)]
    for row, length in enumerate((90, 40)):
        for x in poisoned:
            x.rows[table[row, : (length - 20) // 8].long()] = 255
    visible = visible_of([90, 40])
    out = run(q, *poisoned, waiting, table, visible, Constants(window=20))
    assert torch.equal(out, run(q, k, v, waiting, table, visible, Constants(window=20)))  # exact: the same was read
    assert run(q, *poisoned, waiting, table, visible_of([90, 40], [70, 20])).isfinite().all()


@needs_triton
@pytest.mark.parametrize("run", EVERY)
def test_large_scores_do_not_overflow(run):
    *given_, parts = case([50, 9], 1, 2, 16, quantizers(8, 8), torch.float32, scale_of=40.0)
    given_[0] *= 40
    assert_agrees(*given_, parts, num_splits=2)
    assert run(*given_, visible_of([50, 9])).isfinite().all()


@pytest.mark.skipif(DEVICE != "cpu", reason="loops for a CPU")
class TestOnACpu:
    """What only the loops for a CPU have; that they agree with the twin, every test above says."""

    @pytest.mark.parametrize("threads", [2, 3, 7])
    def test_neither_threads_nor_other_rows_change_a_bit_of_a_row(self, threads):
        lengths = [2600, 1, 1024, 1025, 300]
        *given_, _ = case(lengths, 3, 3, 64, quantizers(4, 64), torch.float32)
        q, k, v, waiting, table = given_
        visible = visible_of(lengths)
        assert 2 * sum(lengths) * 3 * 64 > paged_packed_attention_cpu.PAYS
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            once = paged_packed_decode_attention_cpu(*given_, visible)
            torch.set_num_threads(threads)
            assert torch.equal(paged_packed_decode_attention_cpu(*given_, visible), once)  # exact
            for row, length in enumerate(lengths):
                one = slice(row, row + 1)
                alone = paged_packed_decode_attention_cpu(q[one], k, v, waiting, table[one], visible_of([length]))
                assert torch.equal(alone, once[one])  # exact
        finally:
            torch.set_num_threads(before)

    def test_one_compilation_serves_every_format_and_dtype(self):
        for dtype, nbits in itertools.product(DTYPES, CODES):
            q, k, v, waiting, table, _ = case([20, 7], 2, 3, 16, quantizers(nbits, 8), dtype)
            strided = torch.stack((q, q), dim=-1)[..., 0]
            for window in (None, 5):
                paged_packed_decode_attention_cpu(
                    strided, k, v, waiting, table.long(), visible_of([20, 7]), Constants(window=window)
                )
        assert len(paged_packed_attention_cpu._attend.signatures) == 1

    def test_what_is_not_taken_is_refused_and_says_who_takes_it(self):
        q, k, v, waiting, table, _ = case([20, 7], 2, 3, 16, quantizers(4, 8), torch.float32)
        other = quantizers(8, 8)[1].quantize(torch.randn(len(k.rows), 2, 8, 16))
        wide = q.double(), k, v, tuple(x.double() for x in waiting)
        for bad in (
            wide,
            (q.clone().requires_grad_(), k, v, waiting),
            (q, k, v, tuple(x.clone().requires_grad_() for x in waiting)),
            (q, k, Packed(other.quantizer, other.rows.transpose(0, 1)), waiting),
        ):
            with pytest.raises(ValueError, match="paged_packed_attention takes all of these"):
                paged_packed_decode_attention_cpu(*bad, table, visible_of([20, 7]))


@needs_triton
@pytest.mark.parametrize("run", EVERY)
def test_the_ledger_counts_blocks_and_tokens_that_are_seen(run):
    q, k, v, waiting, table, _ = case([30, 9], 2, 3, 16, quantizers(4, 8), torch.float32)
    with ledger() as work:
        run(q, k, v, waiting, table, visible_of([30, 9], [2, 0]), Constants(window=20))
    assert work.scores == 6 * (20 + 9)
    a_block, a_token = 2 * 2 * 16 * (4 + 4), 2 * 2 * 16 * 4  # K and V, heads, head_dim, bytes
    assert work.bytes_read == (2 + 1) * a_block + (6 + 1) * a_token  # tokens 10 to 29: two blocks, and 6 that wait
    assert work.bytes_copied == 0


class TestErrors:
    def arguments(self, nbits=4, new_tokens=1):
        *given_, _ = case([20, 7], 2, 3, 16, quantizers(nbits, 8), torch.float32, new_tokens=new_tokens)
        return given_

    @needs_triton
    @pytest.mark.parametrize("run", EVERY)
    def test_what_does_not_fit(self, run):
        q, k, v, waiting, table = self.arguments()
        visible = visible_of([20, 7])
        few = Packed(v.quantizer, v.rows[:1])
        for bad, message in (
            ((q[:, :5], k, v, waiting, table, visible), "does not fit packed blocks of 2 KV heads, head_dim 16"),
            ((q[..., :8], k, v, waiting, table, visible), "does not fit packed blocks"),
            ((q, k, few, waiting, table, visible), "do not fit packed keys"),
            ((q.half(), k, v, waiting, table, visible), "blocks that wait are"),
            ((q, k, v, (waiting[0][:1], waiting[1]), table, visible), "blocks that wait are"),
            ((q, k, v, tuple(x[:, :, :4] for x in waiting), table, visible), r"are \[waiting, 2, 8, 16\]"),
            ((q, k, v, waiting, table[:, :2], visible), r"20 tokens in blocks of 8 need a block table \[2, 3\]"),
            ((q, k, v, waiting, table, visible_of([20, 7, 1])), "1 queries and 20 keys in 3 rows"),
        ):
            with pytest.raises(ValueError, match=message):
                run(*bad)

    @pytest.mark.parametrize("run", [paged_packed_attention, *ON_CPU])
    @pytest.mark.parametrize("place", [0, 2])
    @pytest.mark.parametrize("block", [-1, 10**6])
    def test_a_table_that_lacks_a_block_that_is_read(self, run, place, block):
        q, k, v, waiting, table = self.arguments()
        table[0, place] = block
        with pytest.raises(ValueError, match="the block table lacks a block of tokens that are read"):
            run(q, k, v, waiting, table, visible_of([20, 7]))
        if place == 0:
            run(q, k, v, waiting, table, visible_of([20, 7]), Constants(window=4))  # it is not read

    @needs_triton
    def test_what_the_triton_kernel_does_not_take(self):
        q, k, v, waiting, table = self.arguments()
        visible = visible_of([20, 7])
        with pytest.raises(ValueError, match="takes one new token; got 3"):
            paged_packed_decode_attention(*self.arguments(new_tokens=3), visible_of([20, 7], new_tokens=3))
        with pytest.raises(ValueError, match="has no soft cap"):
            paged_packed_decode_attention(q, k, v, waiting, table, visible, Constants(soft_cap=3.0))
        wide = tuple(x.double() for x in waiting)
        with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
            paged_packed_decode_attention(q.double(), k, v, wide, table, visible)
        other = self.arguments(8)[2]
        with pytest.raises(ValueError, match="K and V of one format"):
            paged_packed_decode_attention(q, k, other, waiting, table, visible)


COMPILE = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from labkit.kernels.decode_attention import _decode_kernel
from labkit.kernels.packed_decode_attention import _packed_decode_kernel, format_of, unpack_assembly, word_bytes
from labkit.kernels.paged_decode_attention import _paged_decode_kernel
from labkit.kernels.paged_packed_decode_attention import _paged_packed_decode_kernel
from labkit.kernels.split import _merge_kernel
from labkit.quantization import FLOAT8, Packed, Quantizer

POINTERS = {"first_ptr": "*i32", "end_ptr": "*i32", "table_ptr": "*i32", "parts_ptr": "*fp32", "lse_ptr": "*fp32"}
SHAPE = {"QUERIES": 3, "HEAD_DIM": 80, "QUERY_BLOCK": 16, "DIM_BLOCK": 128}
DENSE = {"BLOCK": 64, "NATIVE": True, "PRECISION": "tf32x3", "SHIFT": 0.0}
TERMS = {"SCORE_TERMS": 2, "WEIGHT_TERMS": 1}

def kind(name, words):
    if name.endswith("_ptr"):
        return POINTERS.get(name, words if "words" in name else "*fp16" if "scale" in name else "*bf16")
    return "constexpr" if name.isupper() else "fp32" if name == "scale" else "i32"

def build(kernel, sizes, words=""):
    source = ASTSource(kernel, {name: kind(name, words) for name in kernel.arg_names}, sizes)
    assert "ptx" in triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm

build(_decode_kernel, SHAPE | DENSE)
build(_paged_decode_kernel, SHAPE | DENSE | {"BLOCK_SIZE": 5})
build(_merge_kernel, {"QUERIES": 3, "HEAD_DIM": 80, "DIM_BLOCK": 128, "AT_ONCE": 16})
FORMATS = (8, "channel", True), (4, "channel", False), (2, "token", False), (FLOAT8[1], "token", True)
for nbits, axis, symmetric in FORMATS:
    keys, values = (Quantizer(nbits, 16, along, symmetric) for along in (axis, "token"))
    rows = torch.empty(1, 1, 1, 80, keys.row_bytes, dtype=torch.uint8, device="meta")
    bits = format_of(Packed(keys, rows), Packed(values, rows)) | {"UNPACK": unpack_assembly(keys)}
    words = {1: "*u8", 2: "*i16", 4: "*i32"}[word_bytes(keys)] if isinstance(nbits, int) else "*fp8e5"
    build(_packed_decode_kernel, SHAPE | TERMS | bits, words)
    if nbits == 4:
        build(_paged_packed_decode_kernel, SHAPE | TERMS | bits | {"NATIVE": True, "PRECISION": "tf32x3"}, words)
"""


@needs_triton
def test_the_kernels_compile_for_a_gpu_also_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    in_a_process(COMPILE)
