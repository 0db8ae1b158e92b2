"""The packed decode kernels, Triton's and the CPU's, and their plain-PyTorch twin against attention in float64."""

import os
import struct
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import kernels
from labkit.attention import Constants, Visibility, attention
from labkit.cache import QuantizedCache
from labkit.kernels import packed_attention_cpu
from labkit.kernels import packed_decode_attention as kernel
from labkit.kernels.packed_attention import packed_attention
from labkit.kernels.packed_decode_attention import packed_decode_attention
from labkit.ledger import ledger
from labkit.quantization import FLOAT8, Quantizer, hadamard
from tests.attending import how
from tests.bounds import attention_bound
from tests.kernels.effort import FEW, INTERPRETED, MOST, examples
from tests.pairs import every_pair

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CODES = [8, 4, 2, *FLOAT8]
ON_CPU = [packed_attention_cpu.packed_decode_attention_cpu] if DEVICE == "cpu" else []
EVERY = [packed_decode_attention, packed_attention, *ON_CPU]
needs_triton = pytest.mark.skipif(not kernels.available(DEVICE), reason="Triton is not installed here")


def case(batch, kv_heads, per_kv, tokens, head_dim, dtype, quantizers, *, before=0, seed=0, rotate=False):
    """q, packed k and v of all whole tiles, the tokens before and after them, and K and V as they come back."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, kv_heads * per_kv, 1, head_dim, generator=generator).to(DEVICE, dtype)
    kv = torch.randn(2, batch, kv_heads, tokens, head_dim, generator=generator).to(DEVICE, dtype)
    size = quantizers[0].group_size
    end = before + (tokens - before) // size * size
    rotation = hadamard(head_dim, device=DEVICE) if rotate else None
    k = kv[0, :, :, before:end].float()
    packed_k = quantizers[0].quantize(k if rotation is None else k @ rotation)
    packed_v = quantizers[1].quantize(kv[1, :, :, before:end])
    back = packed_k.dequantize(torch.float64)
    back = back if rotation is None else back @ rotation.double().mT
    wide = kv.double()
    wide[0, :, :, before:end], wide[1, :, :, before:end] = back, packed_v.dequantize(torch.float64)
    options = {"before": tuple(kv[:, :, :, :before]), "after": tuple(kv[:, :, :, end:]), "rotation": rotation}
    return q, packed_k, packed_v, options, wide


def quantizers(nbits, group=16, axis="channel", symmetric=False, metadata=torch.float16):
    return Quantizer(nbits, group, axis, symmetric, metadata), Quantizer(nbits, group, "token", symmetric, metadata)


def implementations(q, k, v, triton=None):
    """Triton's kernel alone, all but that, or (None) all that take these."""
    on_cpu = [packed_attention_cpu.packed_decode_attention_cpu] if packed_attention_cpu.takes(q, k, v) else []
    rest = [packed_attention, *on_cpu]
    return {True: [packed_decode_attention], False: rest, None: [packed_decode_attention, *rest]}[triton]


def assert_agrees(q, k, v, options, wide, *, triton=None, **more):
    shared = {name: more.pop(name) for name in ("padding", "scale", "window") if name in more}
    settings_ = how(q, wide[0], **shared)
    expected = attention(q.double(), *wide, *settings_)
    # Bounded: float32 sums of numbers that are codes times scale plus zero, up to three times as large as what they add
    # up to, and one rounding to the queries' dtype.
    bound = 4 * attention_bound(q, *wide, scale=shared.get("scale"), sums=torch.float32, result=q.dtype)
    for run in implementations(q, k, v, triton):
        got = run(q, k, v, *settings_, **options, **(more if run is packed_decode_attention else {}))
        assert got.dtype == q.dtype
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=bound)


@needs_triton
@pytest.mark.parametrize(("nbits", "head_dim", "dtype"), every_pair(CODES, [64, 80, 96, 128, 256], DTYPES), ids=str)
def test_any_head_dim_and_dtype(nbits, head_dim, dtype):
    assert_agrees(*case(1, 1, 3, 75, head_dim, dtype, quantizers(nbits), before=2))


@needs_triton
@pytest.mark.parametrize("tokens", [17, 31, 97, 150, *([] if INTERPRETED else [333, 1000])])
@pytest.mark.parametrize("nbits", [8, 4, 2])
def test_lengths_that_divide_nothing(nbits, tokens):
    assert_agrees(*case(1, 1, 3, tokens, 32, torch.float32, quantizers(nbits, 16), before=1))


@needs_triton
@pytest.mark.parametrize("per_kv", range(1, 9))
@pytest.mark.parametrize("nbits", [4, 2])
def test_any_number_of_queries_per_kv_head(nbits, per_kv):
    assert_agrees(*case(1, 2, per_kv, 50, 32, torch.float32, quantizers(nbits)))


def structure(draw, tokens=150, few=3):
    """A call, and its options: at most so many tokens, so few rows and heads."""
    group = draw(st.sampled_from([8, 16, 32]))
    tokens, batch = draw(st.integers(group + 4, tokens)), draw(st.integers(1, few))
    scheme = quantizers(
        draw(st.sampled_from(CODES)), group, draw(st.sampled_from(["channel", "token"])), draw(st.booleans()),
        draw(st.sampled_from([torch.float16, torch.bfloat16])),
    )  # fmt: skip
    padding = draw(st.none() | st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
    made = case(
        batch, draw(st.integers(1, few)), draw(st.integers(1, 8)), tokens, group * draw(st.integers(1, 3)),
        draw(st.sampled_from(DTYPES)), scheme, before=draw(st.integers(0, 4)), rotate=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )  # fmt: skip
    return made, {
        "padding": padding,
        "window": draw(st.none() | st.integers(1, tokens + 3)),
        "scale": draw(st.none() | st.floats(0.05, 1.0)),
        "num_splits": draw(st.none() | st.integers(1, 9)),
    }


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_structure(data):
    made, options = structure(data.draw)
    assert_agrees(*made, **options, triton=False)


@needs_triton
@examples(50)
@given(st.data())
def test_any_structure_in_triton(data):
    made, options = structure(data.draw, MOST, FEW)
    assert_agrees(*made, **options, triton=True)


def as_ptx_does(text, word):
    """The bfloat16 numbers that `unpack_assembly` makes of a 32-bit word, its instructions done here one by one."""
    values, outputs = {}, {}

    def number(name):
        return int(name, 16) if name.startswith("0x") else word if name.startswith("$") else values[name]

    def halves(register):
        return torch.tensor([register & 0xFFFF, register >> 16], dtype=torch.int32).to(torch.int16).view(torch.bfloat16)

    for line in (part.strip(" {}") for part in text.replace("mov.b32 {", "split {").split(";")):
        operation, _, rest = line.partition(" ")
        names = [name.strip(" {}") for name in rest.split(",")]
        if operation in ("", ".reg"):
            continue
        if operation == "split":  # mov.b32 {low, high}, register
            for name, half in zip(names, halves(number(names[2])), strict=False):
                outputs[int(name[1:])] = half.item()
            continue
        a, *more = (number(name) if not name.isdigit() else int(name) for name in names[1:])
        if operation == "mov.b32":
            done = a
        elif operation == "shr.u32":
            done = a >> more[0]
        elif operation == "lop3.b32":
            assert names[4] == "0xEA"  # (a & b) | c
            done = (a & more[0]) | more[1]
        elif operation == "and.b32":
            done = a & more[0]
        elif operation == "mul.lo.u32":
            done = a * more[0] & 0xFFFFFFFF
        elif operation == "fma.rn.bf16x2":
            exact = halves(a).double() * halves(more[0]).double() + halves(more[1]).double()
            low, high = (exact.bfloat16().view(torch.int16).int() & 0xFFFF).tolist()
            done = high << 16 | low
        else:
            raise AssertionError(f"an instruction that is not known here: {line}")
        values[names[0]] = done
    return [outputs[place] for place in range(len(outputs))]


@pytest.mark.parametrize("nbits", [8, 4, 2])
def test_codes_become_bfloat16_two_at_a_time_exactly(nbits):
    text = kernel.unpack_assembly(Quantizer(nbits, 64))
    generator = torch.Generator().manual_seed(0)
    words = [0, 0xFFFFFFFF, *torch.randint(2**32, (300,), generator=generator).tolist()]
    for word in words:
        codes = [word >> shift & (2**nbits - 1) for shift in range(0, 32, nbits)]
        assert as_ptx_does(text, word) == codes  # exact


@pytest.mark.parametrize("nbits", [8, 4, 2])
def test_symmetric_codes_are_taken_apart_one_by_one_since_their_rows_are_no_words(nbits):
    assert kernel.unpack_assembly(Quantizer(nbits, 64, symmetric=True)) == ""


@needs_triton
@pytest.mark.parametrize("num_splits", [1, 2, 5, 1000])
def test_any_split_of_the_sequence_gives_the_same(num_splits):
    assert_agrees(*case(1, 2, 3, 200, 32, torch.float32, quantizers(4)), num_splits=num_splits)


@needs_triton
def test_a_row_that_is_all_padding_gives_zeros():
    q, k, v, options, _ = case(2, 2, 3, 90, 16, torch.float32, quantizers(4), before=2)
    for run in implementations(q, k, v):
        out = run(q, k, v, *how(q, 90, padding=[90, 0]), **options)
        assert torch.equal(out[0], torch.zeros_like(out[0]))  # exact
        assert out[1].abs().min() > 0


@needs_triton
@pytest.mark.parametrize("nbits", CODES, ids=str)
def test_a_group_that_is_nan_shows_in_its_head_only(nbits):
    quantizer, values = quantizers(nbits)
    k = torch.randn(1, 2, 48, 16, device=DEVICE)
    k[0, 1, 20, 3] = float("nan")
    k, v = quantizer.quantize(k), values.quantize(torch.randn(1, 2, 48, 16, device=DEVICE))
    q = torch.randn(1, 4, 1, 16, device=DEVICE)
    for run in implementations(q, k, v):
        out = run(q, k, v)
        assert out[:, 2:].isnan().all()
        assert not out[:, :2].isnan().any()


def in_a_process(code):
    """Run Python code in a process of its own, which must end well."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def read_scales():
    """Every finite positive scale there is, read by the loops out of a tile of keys."""
    for metadata, end in ((torch.float16, 0x7C00), (torch.bfloat16, 0x7F80)):
        scales = torch.arange(end, dtype=torch.int16)
        rows = torch.zeros(end, 6, dtype=torch.uint8)
        rows[:, 4:] = scales.view(torch.uint8).view(-1, 2)
        got, zero = np.empty(end, np.float32), np.empty(end, np.float32)
        once = np.int64(1)
        packed_attention_cpu._metadata(rows.numpy(), 4, once, 0, False, metadata == torch.bfloat16, got, zero)
        assert (got.view(np.int32) == float32_bits(scales, metadata)).all()  # exact, to the bit


def float32_bits(bits, metadata):
    """The float32 bits of 16-bit floats, in whole numbers: nothing that flushed denormals could touch."""
    if metadata == torch.bfloat16:
        return (bits.int() << 16).numpy()
    size = bits.numpy().view(np.float16).astype(object)
    return np.array([struct.unpack("<i", struct.pack("<f", float(x)))[0] for x in size])


@pytest.mark.skipif(DEVICE != "cpu", reason="is about CPUs")
class TestOnACPU:
    """Which calls the compiled loops answer; that they agree with their twin, every test above says."""

    def arguments(self, nbits=4, axis="channel", tokens=1):
        q, k, v, _, _ = case(2, 2, 3, 48, 16, torch.float32, quantizers(nbits, axis=axis))
        return (q if tokens == 1 else q.expand(-1, -1, tokens, -1)), k, v

    @pytest.mark.parametrize("axis", ["channel", "token"])
    @pytest.mark.parametrize("nbits", CODES, ids=str)
    def test_every_format_of_a_cache_is_taken(self, nbits, axis):
        assert packed_attention_cpu.takes(*self.arguments(nbits, axis))

    def test_what_is_not_taken_is_refused_and_says_who_takes_it(self):
        q, k, v = self.arguments()
        odd = q, *(some.quantize(torch.randn(2, 2, 48, 16)) for some in quantizers(2, group=4))
        refused = [
            odd, self.arguments(tokens=3), (q.double(), k, v), (q.clone().requires_grad_(), k, v),
            (q, k, self.arguments(8)[2]), (q, k, replace(v, quantizer=replace(v.quantizer, axis="channel"))),
        ]  # fmt: skip
        for arguments in refused:
            with pytest.raises(ValueError, match="packed_attention takes all of these"):
                packed_attention_cpu.packed_decode_attention_cpu(*arguments)
        with pytest.raises(ValueError, match="no soft cap"):
            packed_attention_cpu.packed_decode_attention_cpu(q, k, v, Constants(soft_cap=5.0))

    def test_a_cache_hands_its_decode_steps_to_them_and_the_ledger_counts_their_reads(self):
        cache = QuantizedCache(4, group_size=16, residual_length=16)
        cache.append(*torch.randn(2, 1, 2, 60, 16))
        q = torch.randn(1, 6, 1, 16)
        with ledger() as work:
            cache.attend(q)
        assert work.bytes_read == cache.nbytes
        assert cache.kernel_for(q) is packed_attention_cpu.packed_decode_attention_cpu
        assert cache.kernel_for(torch.randn(1, 6, 2, 16)) is None

    @pytest.mark.parametrize("threads", [2, 3, 7])
    def test_any_number_of_threads_gives_the_same_numbers(self, threads, monkeypatch):
        q, k, v, options, _ = case(2, 3, 3, 2600, 64, torch.float32, quantizers(4, 32), before=3)
        assert 2 * k.rows.numel() > packed_attention_cpu.PAYS
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            alone = packed_attention_cpu.packed_decode_attention_cpu(q, k, v, **options)
            torch.set_num_threads(threads)
            assert torch.equal(packed_attention_cpu.packed_decode_attention_cpu(q, k, v, **options), alone)  # exact
        finally:
            torch.set_num_threads(before)

    def test_one_compilation_serves_every_layout_and_dtype(self):
        q, k, v, options, _ = case(2, 2, 3, 75, 32, torch.float32, quantizers(8), before=2)
        packed_attention_cpu.packed_decode_attention_cpu(q, k, v, **options)
        first = packed_attention_cpu._attend.signatures
        strided = [torch.stack((x, x), dim=-1)[..., 0] for x in (q, k.rows, v.rows)]
        for dtype in DTYPES:
            packed_attention_cpu.packed_decode_attention_cpu(
                strided[0].to(dtype), replace(k, rows=strided[1]), replace(v, rows=strided[2]),
                before=[x.mT.contiguous().mT.to(dtype) for x in options["before"]],
            )  # fmt: skip
        assert packed_attention_cpu._attend.signatures == first
        assert len(first) == 1

    def test_every_16_bit_scale_is_read_as_it_is_with_denormals_kept_and_flushed(self):
        read_scales()
        in_a_process("""
import torch
from tests.kernels.test_packed_attention import read_scales
torch.set_flush_denormal(True)
read_scales()
""")

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_forked_process_shares_work_out_to_threads_of_its_own(self):
        in_a_process("""
import os
from labkit.kernels.packed_attention_cpu import share_out
done = []
share_out(lambda index, threads: done.append(index), 3)
child = os.fork()
share_out(lambda index, threads: done.append(index), 3)
assert sorted(done) == [0, 0, 1, 1, 2, 2]
os._exit(0) if child == 0 else None
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
""")

    def test_half_precision_and_inference_mode_are_taken(self):
        q, k, v = self.arguments(2)
        with torch.inference_mode():
            out = packed_attention_cpu.packed_decode_attention_cpu(q.bfloat16(), k, v)
        assert out.dtype == torch.bfloat16


class TestErrors:
    def arguments(self, **changes):
        q, k, v, _, _ = case(2, 2, 3, 48, 16, torch.float32, quantizers(4))
        return {"q": q, "k": k, "v": v} | changes

    @pytest.mark.parametrize("run", EVERY)
    def test_queries_that_do_not_fit(self, run):
        for q in (torch.zeros(1, 6, 1, 16), torch.zeros(2, 5, 1, 16), torch.zeros(2, 6, 1, 8)):
            with pytest.raises(ValueError, match="does not fit packed keys of batch 2, 2 KV heads, head_dim 16"):
                run(**self.arguments(q=q.to(DEVICE)))

    @pytest.mark.parametrize("run", EVERY)
    def test_values_that_do_not_fit_the_keys(self, run):
        v = self.arguments()["v"].tiles(0, 1)
        with pytest.raises(ValueError, match=r"packed values .* do not fit packed keys"):
            run(**self.arguments(v=v))

    def test_more_queries_than_keys(self):
        with pytest.raises(ValueError, match="49 queries but only 48 keys"):
            packed_attention(**self.arguments(q=torch.zeros(2, 6, 49, 16, device=DEVICE)))

    def test_more_than_one_new_token(self):
        with pytest.raises(ValueError, match="takes one new token; got 3"):
            packed_decode_attention(**self.arguments(q=torch.zeros(2, 6, 3, 16, device=DEVICE)))

    def test_a_dtype_it_does_not_take(self):
        with pytest.raises(ValueError, match=r"float32, float16 or bfloat16; got torch\.float64"):
            packed_decode_attention(**self.arguments(q=torch.zeros(2, 6, 1, 16, device=DEVICE).double()))

    def test_keys_and_values_of_two_formats(self):
        q, k, _, _, _ = case(2, 2, 3, 48, 16, torch.float32, quantizers(8))
        for other in (quantizers(4)[1], quantizers(8, symmetric=True)[1], quantizers(8, metadata=torch.bfloat16)[1]):
            v = other.quantize(torch.randn(2, 2, 48, 16, device=DEVICE))
            with pytest.raises(ValueError, match="K and V of one format"):
                packed_decode_attention(q, k, v)

    @pytest.mark.parametrize("run", EVERY)
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"visible": Visibility.newest(1, 48, [1, 2, 3])}, "1 queries and 48 keys in 3 rows"),
            ({"visible": Visibility.newest(1, 47)}, "1 queries and 47 keys"),
            ({"before": (torch.zeros(2, 1, 3, 16), torch.zeros(2, 1, 3, 16))}, "do not fit packed keys of batch 2"),
            ({"after": (torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16))}, "do not fit packed keys of batch 2"),
        ],
    )
    def test_masks_and_dense_tokens_that_do_not_fit(self, run, changes, message):
        with pytest.raises(ValueError, match=message):
            run(**self.arguments(**changes))
