"""The small kernels of a decode step, and the product of a matrix and one vector, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import kernels
from labkit.kernels.decode_step import (
    add_norm,
    add_norm_plain,
    gate,
    gate_plain,
    rotate_and_store,
    rotate_and_store_plain,
)
from labkit.kernels.matvec import matvec, matvec_plain, sizes
from tests.pairs import every_pair

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
pytestmark = pytest.mark.skipif(not kernels.available(DEVICE), reason="Triton is not installed here")


def normal(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_near(got, exact, dtype, terms, size):
    """Bounded: float32 sums of `terms` terms, whose sizes add up to `size`, and a few roundings of the result."""
    assert got.dtype == dtype
    bound = (terms + 8) * torch.finfo(torch.float32).eps * size + 4 * torch.finfo(dtype).eps * exact.abs()
    assert bool(((got.double() - exact).abs() <= bound).all()), (got.double() - exact).abs().max()


@pytest.mark.parametrize(
    ("dtype", "size", "has_delta"), every_pair(DTYPES, [1, 7, 64, 576, 1000], [False, True]), ids=str
)
def test_the_norm_of_a_sum_and_the_sum(dtype, size, has_delta):
    x, weight = normal(3, size, dtype=dtype), normal(size, dtype=dtype, seed=1)
    delta = normal(3, size, dtype=dtype, seed=2) if has_delta else None
    before = x.clone()
    added, normed = add_norm(x, delta, weight, 1e-5)
    expected = x + delta if has_delta else x
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        # Bounded: the interpreter rounds to bfloat16 by cutting off.
        torch.testing.assert_close(added, expected, rtol=torch.finfo(dtype).eps, atol=0)
    else:
        assert torch.equal(added, expected)  # exact: one rounding of a float32 sum, as PyTorch's is
    _, exact = add_norm_plain(added.double(), None, weight.double(), 1e-5)  # the norm is of the rounded sum
    assert_near(normed, exact, dtype, size, exact.abs())
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 33, 1024, 1500])
def test_a_gate(dtype, size):
    gate_up = normal(2, 2 * size, dtype=dtype) * 4
    exact = gate_plain(gate_up.double())
    assert_near(gate(gate_up), exact, dtype, 8, exact.abs())


@pytest.mark.parametrize(
    ("dtype", "head_dim", "heads"), every_pair(DTYPES, [2, 24, 64, 128], [(3, 1), (4, 4), (7, 1)]), ids=str
)
def test_rotated_and_stored_in_the_place_of_each_row_and_nowhere_else(dtype, head_dim, heads):
    num_heads, num_kv_heads = heads
    qkv = normal(2, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    angle = torch.rand(9, head_dim // 2, generator=torch.Generator().manual_seed(1)) * 6.3
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([-angle.sin(), angle.sin()], -1)
    cos, sin = cos.to(DEVICE, dtype), sin.to(DEVICE, dtype)
    place, skipped = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([8, 5], [0, 2]))
    # Buffers lie as tokens before heads, so that strides matter; all that is not written stays NaN.
    made = [torch.full((2, 9, num_kv_heads, head_dim), float("nan"), device=DEVICE, dtype=dtype) for _ in range(2)]
    k, v = (x.transpose(1, 2) for x in made)
    q = rotate_and_store(qkv, cos, sin, place, skipped, k, v)
    wide_k, wide_v = (torch.full(k.shape, float("nan"), dtype=torch.float64, device=DEVICE) for _ in range(2))
    exact = rotate_and_store_plain(qkv.double(), cos.double(), sin.double(), place, skipped, wide_k, wide_v)
    size = qkv.double().abs().max() * 2
    assert_near(q, exact, dtype, 2, size)
    rows = torch.arange(2, device=DEVICE)
    assert_near(k[rows, :, place.long()], wide_k[rows, :, place.long()], dtype, 2, size)
    assert torch.equal(k.isnan(), wide_k.isnan())
    assert torch.equal(v.nan_to_num(9.0).double(), wide_v.nan_to_num(9.0))  # exact: V is copied


@pytest.mark.parametrize(
    ("dtype", "shape", "rows"),
    every_pair(DTYPES, [(1, 1), (5, 17), (64, 64), (33, 600), (130, 1024)], [None, 4, 8]),
    ids=str,
)
def test_a_product_of_any_shape(dtype, shape, rows):
    outs, columns = shape
    x, weight, bias = (
        normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(1, columns), (outs, columns), (outs,)])
    )
    exact = matvec_plain(x.double(), weight.double(), bias.double())
    size = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    assert_near(matvec(x, weight, bias, rows=rows), exact, dtype, columns, size)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_product_with_all_that_goes_along(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    outs, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 300))
    gated, seed = data.draw(st.booleans()), data.draw(st.integers(0, 99))
    x, weight = (
        normal(1, columns, dtype=dtype, seed=seed),
        normal(outs * (1 + gated), columns, dtype=dtype, seed=seed + 1),
    )
    norm = (normal(columns, dtype=dtype, seed=seed + 2), 1e-5) if data.draw(st.booleans()) else None
    bias = normal(len(weight), dtype=dtype, seed=seed + 3) if not gated and data.draw(st.booleans()) else None
    residual = normal(1, outs, dtype=dtype, seed=seed + 4) if data.draw(st.booleans()) else None
    options = {"block_size": data.draw(st.sampled_from([16, 64, 512])), "rows": data.draw(st.sampled_from([1, 2, 8]))}
    got = matvec(x, weight, bias, norm=norm, gated=gated, residual=residual, **options)
    wide = None if norm is None else (norm[0].double(), norm[1])
    wides = [None if y is None else y.double() for y in (x, weight, bias, residual)]
    exact = matvec_plain(*wides[:3], norm=wide, gated=gated, residual=wides[3])
    normed = wides[0] if wide is None else torch.nn.functional.rms_norm(wides[0], wide[0].shape, *wide)
    size = (normed.abs() @ wides[1].abs().T).max() + (0 if bias is None else wides[2].abs().max())
    size = size * (1 + size) if gated else size  # an error in either factor is as large as the other makes it
    assert_near(got, exact, dtype, columns, size + (0 if residual is None else wides[3].abs().max()))


@pytest.mark.parametrize("outs", [1, 576, 3584, 4608, 18944, 152064])
@pytest.mark.parametrize("gated", [False, True])
def test_the_sizes_that_a_shape_gets_are_powers_of_2(outs, gated):
    rows, block = sizes(outs, 3584, gated)
    assert rows & (rows - 1) == 0
    assert block & (block - 1) == 0


def test_what_does_not_fit_is_refused_and_says_shapes():
    x, weight = normal(2, 8, dtype=torch.float32), normal(6, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"x is \[1, in\].*\[2, 8\], \[6, 8\]"):
        matvec(x, weight)
    with pytest.raises(ValueError, match="one dtype"):
        matvec(x[:1], weight.half())
    with pytest.raises(ValueError, match="contiguous"):
        matvec(x[:1], normal(8, 6, dtype=torch.float32).T)
    with pytest.raises(ValueError, match=r"residual is \[1, 6\]"):
        matvec(x[:1], weight, residual=x)
    with pytest.raises(ValueError, match="halves of the rows"):
        matvec(x[:1], weight[:5], gated=True)
    with pytest.raises(ValueError, match="powers of 2"):
        matvec(x[:1], weight, rows=3)
    with pytest.raises(ValueError, match="float64"):
        gate(x.double())
    with pytest.raises(ValueError, match="hidden_size"):
        add_norm(x, None, weight[0, :3], 1e-5)
    place = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    k = torch.zeros(2, 1, 4, 2, device=DEVICE)
    with pytest.raises(ValueError, match="int32"):
        rotate_and_store(x, k[0, 0], k[0, 0], place.long(), place, k, k)
    with pytest.raises(ValueError, match="qkv is"):
        rotate_and_store(x[:1], k[0, 0], k[0, 0], place, place, k, k)
