"""The kernel that quantizes, against its plain-PyTorch twin, bit by bit; in the interpreter where there is no GPU."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit import kernels
from labkit.kernels.quantize import quantize_tiles, quantized, takes
from labkit.quantization import FLOAT8, Packed, Quantizer
from tests.kernels.effort import examples
from tests.kernels.test_packed_attention import in_a_process

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
needs_triton = pytest.mark.skipif(not kernels.available(DEVICE), reason="Triton is not installed here")


def assert_same_bits(x: torch.Tensor, quantizer: Quantizer) -> Packed:
    """Exact; of a zero point that is 0 or NaN only that it is."""
    right, got = quantizer.quantize(x.cpu()), quantize_tiles(x, quantizer)
    rows = got.rows.cpu()
    assert rows.shape == right.rows.shape
    assert got.overflow is not None
    assert got.overflows(x) == right.overflows(x.cpu())
    kept = quantizer.code_bytes + 2
    assert torch.equal(rows[..., :kept], right.rows[..., :kept])
    if quantizer.has_zero:
        zero = Packed(quantizer, rows).zero
        torch.testing.assert_close(zero, right.zero, rtol=0, atol=0, equal_nan=True)
    return got


def numbers(shape, dtype, seed, scale, shift):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale + shift
    return x.to(dtype)


FORMATS = {
    "nbits": st.sampled_from([8, 4, 2, *FLOAT8]),
    "axis": st.sampled_from(["channel", "token"]),
    "symmetric": st.booleans(),
    "metadata": st.sampled_from([torch.float16, torch.bfloat16]),
}


@needs_triton
@examples(40)
@given(st.data())
def test_any_format_shape_and_size_of_numbers(data):
    nbits, axis, symmetric, metadata = (data.draw(FORMATS[name]) for name in FORMATS)
    size = data.draw(st.sampled_from([16, 32, 64, 128]))
    head_dim = data.draw(st.integers(1, 100)) if axis == "channel" else size * data.draw(st.integers(1, 3))
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), size * data.draw(st.integers(1, 3)), head_dim)
    scale = data.draw(st.sampled_from([0.0, 1e-42, 1e-9, 1e-3, 1.0, 300.0, 6e4, 1e30]))
    x = numbers(shape, data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 99)), scale, scale * 5)
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if data.draw(st.booleans()) else x
    assert_same_bits(x.to(DEVICE), Quantizer(nbits, size, axis, symmetric, metadata))


@needs_triton
@pytest.mark.parametrize("nbits", [8, 4, 2, *FLOAT8], ids=str)
@pytest.mark.parametrize("metadata", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_halves_and_numbers_that_are_none(nbits, metadata, symmetric, axis):
    """Halves of a scale, where rounding decides; groups with NaN, infinities and what the metadata cannot hold."""
    x = torch.randint(-510, 511, (1, 2, 64, 64), generator=torch.Generator().manual_seed(0)) * 0.25
    x[..., 0], x[..., 1] = 63.75, -63.75
    x[:, :, ::7, 50] = -0.0
    x[0, 0, 3, 5], x[0, 0, 20, 6], x[0, 0, 21, 7] = float("nan"), float("inf"), -float("inf")
    x[0, 1, 5, 9], x[0, 1, 40, 10], x[0, 1, 41, 40] = 1e5, -7e4, 3.4e38
    x[0, 1, 20:23, 30] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    x[0, 1, 32:, 20] = float("inf")
    got = assert_same_bits(x.to(DEVICE), Quantizer(nbits, 32, axis, symmetric, metadata))
    assert got.scale.isnan().any()


@needs_triton
def test_it_is_what_a_gpu_uses_and_what_it_does_not_take_the_twin_does():
    quantizer, x = Quantizer(4, 16), torch.randn(1, 1, 32, 8, device=DEVICE)
    assert takes(x, quantizer)
    assert torch.equal(quantized(x, quantizer).codes, quantize_tiles(x, quantizer).codes)
    for other, some in ((quantizer, x.double()), (Quantizer(4, 8), x)):
        assert not takes(some, other)
        assert quantized(some, other).num_tokens == 32
        with pytest.raises(ValueError, match="the kernel takes"):
            quantize_tiles(some, other)
    with pytest.raises(ValueError, match="groups of 16 do not divide 24 tokens"):
        quantize_tiles(x[:, :, :24], quantizer)
    assert quantize_tiles(x[:, :, :0], quantizer).num_tokens == 0


COMPILE = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from labkit.kernels.quantize import _quantize_kernel, codes_of
from labkit.quantization import FLOAT8, Quantizer

for capability, nbits, axis, symmetric in (
    (80, 8, "channel", False), (90, 4, "channel", False), (90, 2, "channel", True), (90, FLOAT8[1], "channel", True),
    (80, 4, "token", False), (90, 8, "token", True), (90, 4, "far", False),
):
    size = 128 if axis == "far" else 16
    quantizer = Quantizer(nbits, size, "token" if axis == "token" else "channel", symmetric)
    word = 4 if quantizer.has_zero else 2
    kinds = {"x_ptr": "*bf16", "words_ptr": "*i32" if word == 4 else "*i16", "overflow_ptr": "*i32"}
    source = ASTSource(
        _quantize_kernel,
        {n: kinds.get(n, "constexpr" if n.isupper() else "i32") for n in _quantize_kernel.arg_names},
        {
            "HEAD_DIM": 80, "GROUP": size, "ROW_WORDS": quantizer.row_bytes // word, "ROWS": 64,
            "PER_CHANNEL": axis != "token", "IN_THREADS": axis == "channel",
            "LEVELS": (quantizer.code_bytes // word).bit_length() - 1, "HALF": True, "BY_RECIPROCAL": True,
            **codes_of(quantizer),
        },
    )
    assert "ptx" in triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm
"""


@needs_triton
def test_the_kernel_compiles_for_a_gpu_also_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    in_a_process(COMPILE)


@needs_triton
def test_it_tells_whether_a_group_of_finite_numbers_was_lost():
    x = torch.ones(1, 1, 32, 16, device=DEVICE)
    for axis in ("channel", "token"):
        quantizer = Quantizer(8, 16, axis)
        assert not quantize_tiles(x, quantizer).overflows(x)
        for value, overflows in ((1e30, True), (float("inf"), False), (float("nan"), False)):
            some = x.clone()
            some[0, 0, 20, 3] = value
            assert quantize_tiles(some, quantizer).overflows(some) == overflows
