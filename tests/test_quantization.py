"""Quantization: how far a number may be from itself, what groups share, and what happens to numbers that are none."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.quantization import FLOAT8, Packed, Quantizer, hadamard, pack, round_down, round_up, unpack

NBITS = [8, 4, 2]
CODES = [*NBITS, *FLOAT8]
AXES = ["channel", "token"]
METADATA = [torch.float16, torch.bfloat16]


def numbers(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def per_number(quantizer: Quantizer, packed: Packed, part: torch.Tensor) -> torch.Tensor:
    """A figure of each group, such as its scale, at each of its numbers: [batch, heads, tokens, head_dim]."""
    groups = part.float().expand(*part.shape[:-1], quantizer.group_size)
    return quantizer.tokens(groups)


class TestPacking:
    @given(data=st.data(), nbits=st.sampled_from(NBITS))
    def test_what_is_packed_comes_back(self, data, nbits):
        count = data.draw(st.integers(0, 12)) * 8
        codes = torch.tensor(data.draw(st.lists(st.integers(0, 2**nbits - 1), min_size=count, max_size=count)))
        codes = codes.to(torch.uint8).view(1, -1)
        packed = pack(codes, nbits)
        assert packed.nbytes * 8 == codes.numel() * nbits
        assert torch.equal(unpack(packed, nbits), codes)  # exact

    def test_the_first_code_lies_lowest(self):
        assert pack(torch.tensor([1, 2], dtype=torch.uint8), 4).tolist() == [1 + 16 * 2]
        assert pack(torch.tensor([3, 0, 1, 2], dtype=torch.uint8), 2).tolist() == [3 + 16 + 64 * 2]

    def test_codes_that_fill_no_byte_are_refused(self):
        with pytest.raises(ValueError, match="3 codes of 4 bits do not fill whole bytes"):
            pack(torch.zeros(2, 3, dtype=torch.uint8), 4)


class TestRounding:
    @given(st.floats(-6e4, 6e4), st.sampled_from(METADATA))
    def test_down_is_the_nearest_number_not_above_and_up_not_below(self, value, dtype):
        x = torch.tensor([value], dtype=torch.float64)
        down, up = round_down(x, dtype), round_up(x.abs(), dtype)
        assert down.double() <= x
        assert up.double() >= x.abs()
        near = x.to(dtype).double()
        assert down.double() == near or torch.nextafter(down, torch.tensor([torch.inf], dtype=dtype)).double() > x
        assert up.double() == x.abs().to(dtype).double() or up.double() > x.abs()


class TestError:
    @settings(max_examples=60, deadline=None)
    @given(
        nbits=st.sampled_from(NBITS), group=st.sampled_from([8, 16, 32]), axis=st.sampled_from(AXES),
        symmetric=st.booleans(), metadata=st.sampled_from(METADATA), seed=st.integers(0, 99),
        scale=st.sampled_from([1e-3, 1.0, 300.0]), shift=st.sampled_from([0.0, 5.0, -40.0]),
    )  # fmt: skip
    def test_no_number_is_further_from_itself_than_half_a_scale(
        self, nbits, group, axis, symmetric, metadata, seed, scale, shift
    ):
        quantizer = Quantizer(nbits, group, axis, symmetric, metadata)
        x = numbers(2, 3, 2 * group, 32, seed=seed, scale=scale) + shift
        packed = quantizer.quantize(x)
        # Bounded: half a scale, and the rounding of code * scale + zero in float32.
        bound = per_number(quantizer, packed, packed.scale) / 2 + 4 * torch.finfo(torch.float32).eps * x.abs().max()
        assert bool(((packed.dequantize() - x).abs() <= bound).all())

    @pytest.mark.parametrize("nbits", FLOAT8, ids=str)
    @pytest.mark.parametrize("axis", AXES)
    def test_float8_is_as_near_as_its_mantissa_allows(self, nbits, axis):
        x = numbers(1, 2, 64, 32, scale=7.0)
        quantizer = Quantizer(nbits, 16, axis)
        packed = quantizer.quantize(x)
        info = torch.finfo(nbits)
        smallest = per_number(quantizer, packed, packed.scale) * info.smallest_normal
        # Bounded: half a unit of the mantissa's last place, of a number that is no smaller than the least normal one.
        bound = info.eps / 2 * torch.maximum(x.abs(), smallest) * (1 + 1e-5)
        assert bool(((packed.dequantize() - x).abs() <= bound).all())

    def test_a_later_outlier_is_not_clipped_since_every_group_has_its_own_scale(self):
        x = numbers(1, 1, 128, 16)
        x[:, :, 100] *= 1000
        for nbits in CODES:
            back = Quantizer(nbits, 16, "token").quantize(x).dequantize()
            assert (back - x)[:, :, 100].abs().max() <= 0.51 * x[:, :, 100].abs().max()
            assert (back - x)[:, :, :96].abs().max() < 2


class TestGroups:
    def test_an_outlier_channel_costs_no_other_channel_anything_per_channel(self):
        x = numbers(1, 2, 32, 16)
        large = x.clone()
        large[..., 5] *= 100
        quantizer = Quantizer(4, 16, "channel")
        before, after = quantizer.quantize(x).dequantize(), quantizer.quantize(large).dequantize()
        others = [channel for channel in range(16) if channel != 5]
        assert torch.equal(before[..., others], after[..., others])  # exact
        per_token = Quantizer(4, 16, "token")
        assert (per_token.quantize(large).dequantize() - large)[..., others].abs().max() > 3 * (before - x).abs().max()

    @pytest.mark.parametrize("axis", AXES)
    @pytest.mark.parametrize("nbits", CODES, ids=str)
    def test_no_group_reaches_across_heads_rows_or_tiles(self, axis, nbits):
        x = numbers(2, 3, 32, 16)
        quantizer = Quantizer(nbits, 16, axis)
        before = quantizer.quantize(x).dequantize()
        for row, head, tile in ((0, 1, 0), (1, 2, 1)):
            changed = x.clone()
            part = (row, head, slice(tile * 16, tile * 16 + 16))
            changed[part] = numbers(16, 16, seed=1, scale=50)
            after = quantizer.quantize(changed).dequantize()
            elsewhere = torch.ones_like(x, dtype=torch.bool)
            elsewhere[part] = False
            assert torch.equal(before[elsewhere], after[elsewhere])  # exact

    @pytest.mark.parametrize("axis", AXES)
    @pytest.mark.parametrize("nbits", CODES, ids=str)
    def test_tiles_quantized_one_by_one_are_the_same_bits(self, axis, nbits):
        x = numbers(2, 2, 48, 16)
        quantizer = Quantizer(nbits, 16, axis)
        whole = quantizer.quantize(x)
        first, *others = (quantizer.quantize(x[:, :, start : start + 16]) for start in (0, 16, 32))
        for part in others:
            first = first.joined(part)
        assert torch.equal(first.rows, whole.rows)  # exact
        assert torch.equal(whole.tiles(1, 2).dequantize(), whole.dequantize()[:, :, 16:32])
        assert torch.equal(whole.of_rows(torch.tensor([1, 0])).dequantize(), whole.dequantize().flip(0))

    @pytest.mark.parametrize(
        ("axis", "shape", "message"),
        [("channel", (1, 1, 30, 16), "divide 30 tokens"), ("token", (1, 1, 16, 24), "divide a head_dim of 24")],
    )
    def test_groups_that_do_not_divide_are_refused(self, axis, shape, message):
        with pytest.raises(ValueError, match=f"groups of 16 do not {message}"):
            Quantizer(4, 16, axis).quantize(torch.zeros(shape))


class TestStrangeNumbers:
    @pytest.mark.parametrize("value", [0.0, 1.0, -3.25, 0.1, 1e-30, -700.3])
    @pytest.mark.parametrize("nbits", CODES, ids=str)
    @pytest.mark.parametrize("symmetric", [False, True])
    @pytest.mark.parametrize("metadata", METADATA)
    def test_a_constant_group_comes_back_and_is_no_nan(self, value, nbits, symmetric, metadata):
        x = torch.full((1, 1, 16, 16), value)
        quantizer = Quantizer(nbits, 16, "channel", symmetric, metadata)
        packed = quantizer.quantize(x)
        # Bounded: half a scale, as for any numbers; of float8, half a unit of the mantissa's last place.
        bound = per_number(quantizer, packed, packed.scale) / 2 + 1e-6 * abs(value)
        if isinstance(nbits, torch.dtype):
            bound = bound + torch.finfo(nbits).eps / 2 * abs(value)
        assert bool(((packed.dequantize() - x).abs() <= bound).all())
        if value in (0.0, 1.0, -3.25) and quantizer.has_zero:
            assert torch.equal(packed.dequantize(), x)  # exact: the metadata can hold it

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("nbits", CODES, ids=str)
    @pytest.mark.parametrize("axis", AXES)
    def test_a_group_that_holds_nan_or_infinity_is_nan_throughout_and_no_other_group_is(self, bad, nbits, axis):
        x = numbers(1, 2, 32, 32)
        x[0, 1, 20, 3] = bad
        back = Quantizer(nbits, 16, axis).quantize(x).dequantize()
        lost = torch.zeros_like(x, dtype=torch.bool)
        lost[0, 1][(slice(16, 32), 3) if axis == "channel" else (20, slice(0, 16))] = True
        assert torch.equal(back.isnan(), lost)

    def test_a_range_that_float16_cannot_hold_is_nan_and_bfloat16_holds_it(self):
        x = torch.full((1, 1, 16, 16), 1e5)
        x[:, :, ::2] = -1e5
        assert Quantizer(8, 16).quantize(x).dequantize().isnan().all()
        assert not Quantizer(8, 16, metadata=torch.bfloat16).quantize(x).dequantize().isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_numbers_come_back_in_the_dtype_that_is_asked_for(dtype):
    x = numbers(1, 1, 16, 16).to(dtype)
    packed = Quantizer(8, 16).quantize(x)
    assert packed.dequantize(dtype).dtype == dtype
    # Bounded: half a scale of a range of about 8 in 255 steps, and the rounding of numbers up to 4.
    assert (packed.dequantize(dtype) - x).abs().max() <= 0.02 + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("size", [8, 16, 40, 64, 80, 96, 128, 256])
def test_the_hadamard_matrix_is_its_own_inverse_and_spreads_a_channel(size):
    matrix = hadamard(size)
    assert torch.allclose(matrix @ matrix, torch.eye(size), atol=1e-5)  # bounded: float32 sums of at most 256 terms
    block = size & -size
    assert torch.allclose(matrix.abs().amax(0), torch.full((size,), block**-0.5))
