"""`Quantizer.quantize` as a Triton kernel: numbers are read once, codes, scales and zero points are written once.

Its plain-PyTorch twin is `Quantizer.quantize`, whose bits it gives: every operation is the twin's, in float32, and
rounded as the twin rounds it. `quantized` is what caches call: it takes the kernel on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from labkit import kernels
from labkit.kernels.split import DTYPES, check_can_run, is_interpreted
from labkit.quantization import Packed, Quantizer

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS: the rest of labkit works without
    triton = None

AT_ONCE = 8192  # numbers that a program holds, where threads share groups
IN_REGISTERS = 64  # numbers of a channel that one thread holds


def takes(x: Tensor, quantizer: Quantizer) -> bool:
    """Whether the kernel makes these codes of `x` here: no float64, and groups that are a power of 2, 16 at least."""
    size = quantizer.group_size
    return x.dtype in DTYPES and size >= 16 and size & (size - 1) == 0 and kernels.available(x.device)


def quantized(x: Tensor, quantizer: Quantizer) -> Packed:
    """`quantizer.quantize(x)`, by the kernel where `x` lies on a GPU and is of its kind."""
    return quantize_tiles(x, quantizer) if x.is_cuda and takes(x, quantizer) else quantizer.quantize(x)


def quantize_tiles(x: Tensor, quantizer: Quantizer) -> Packed:
    """`x`, `[batch, heads, tokens, head_dim]` with any strides, as codes, scales and zero points.

    To the bit what the twin gives, but where a group's zero point is 0 or NaN: which 0, and which NaN, is not said.
    Raises ValueError as the twin does, or for what `takes` says no to; RuntimeError where Triton cannot run.
    """
    batch, heads, tokens, head_dim = x.shape
    size = quantizer.group_size
    quantizer.check(x)
    check_can_run(x, "Quantizer.quantize")
    if not takes(x, quantizer):
        raise ValueError(
            f"the kernel takes float32, float16 or bfloat16 in groups of a power of 2, at least 16; got {x.dtype} in "
            f"groups of {size}"
        )
    tiles = tokens // size
    rows = torch.empty(tiles, batch, heads, head_dim, quantizer.row_bytes, dtype=torch.uint8, device=x.device)
    overflow = torch.zeros(1, dtype=torch.int32, device=x.device)
    if rows.numel():
        # With a zero point rows begin at multiples of 4 bytes, without one at multiples of 2.
        words = rows.view(torch.int32 if quantizer.has_zero else torch.int16)
        in_threads = quantizer.axis == "channel" and size <= IN_REGISTERS
        if in_threads:
            block = max(32, min(triton.next_power_of_2(head_dim), 128))
            warps = block // 32  # a channel a thread
        else:
            block = max(16, min(triton.next_power_of_2(head_dim), AT_ONCE // size))
            warps = 8 if block * size >= AT_ONCE else 4
        _quantize_kernel[(tiles * batch * heads, triton.cdiv(head_dim, block))](
            x.detach(),
            words,
            overflow,
            batch * heads,
            heads,
            *x.stride(),
            HEAD_DIM=head_dim,
            GROUP=size,
            ROW_WORDS=words.shape[4],
            ROWS=block,
            **codes_of(quantizer),
            PER_CHANNEL=quantizer.axis == "channel",
            IN_THREADS=in_threads,
            LEVELS=(quantizer.code_bytes // words.element_size()).bit_length() - 1,
            HALF=quantizer.metadata == torch.float16,
            # A scale in float16 is far from where a reciprocal or a remainder would leave float32's range.
            BY_RECIPROCAL=not is_interpreted() and quantizer.metadata == torch.float16,
            num_warps=warps,
        )
    return Packed(quantizer, rows, overflow)


def codes_of(quantizer: Quantizer) -> dict[str, float]:
    """What the kernel must know of the codes. FLOAT8: bits of their mantissa, 0 for whole codes."""
    if isinstance(quantizer.nbits, torch.dtype):
        info = torch.finfo(quantizer.nbits)
        mantissa = {0.125: 3, 0.25: 2}[info.eps]
        return {"NBITS": 8, "FLOAT8": mantissa, "MOST": info.max, "MIDDLE": 0, "HAS_ZERO": False}
    middle = quantizer.middle
    most = middle - 1 if quantizer.symmetric else 2**quantizer.nbits - 1
    return {
        "NBITS": quantizer.nbits, "FLOAT8": 0, "MOST": float(most), "MIDDLE": middle, "HAS_ZERO": quantizer.has_zero
    }  # fmt: skip


if triton is not None:

    @triton.jit
    def _bits(x):
        return x.to(tl.int32, bitcast=True)

    @triton.jit
    def _float(bits):
        return bits.to(tl.float32, bitcast=True)

    @triton.jit
    def _rounded(x, up: tl.constexpr, HALF: tl.constexpr):
        """The next number of the metadata's dtype that is not below x (up; x is 0 or more), or not above it: its 16
        bits, and its value in float32."""
        if HALF:
            near = x.to(tl.float16)
            value, bits = near.to(tl.float32), near.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
            if up:
                bits = tl.where(value < x, bits + 1, bits)
            else:
                bits = tl.where(value > x, tl.where(bits < 0x8000, bits - 1, bits + 1), bits)
            return bits, bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        bits, rest = (_bits(x) >> 16) & 0xFFFF, _bits(x) & 0xFFFF  # bfloat16: the upper half of float32
        if up:
            bits = tl.where(rest != 0, bits + 1, bits)
        else:
            bits = tl.where((rest != 0) & (bits >= 0x8000), bits + 1, bits)
        return bits, _float(bits << 16)

    @triton.jit
    def _codes(
        x, zero, steps, lost, NBITS: tl.constexpr, FLOAT8: tl.constexpr, MOST: tl.constexpr, MIDDLE: tl.constexpr,
        HAS_ZERO: tl.constexpr, HALF: tl.constexpr, BY_RECIPROCAL: tl.constexpr,
    ):  # fmt: skip
        """int32 codes of float32 numbers."""
        if HAS_ZERO:
            x = x - zero
        if (
            BY_RECIPROCAL
        ):  # division as it is rounded: twice a remainder without error, times the reciprocal (Markstein)
            inverse = tl.math.div_rn(tl.full(steps.shape, 1.0, tl.float32), steps)
            near = x * inverse
            negative = -steps  # once a group: the compiler would negate each quotient
            near = tl.fma(tl.fma(near, negative, x), inverse, near)
            code = tl.fma(tl.fma(near, negative, x), inverse, near)
        else:
            code = tl.math.div_rn(x, steps)
        code = tl.where(lost, 0.0, code)
        least: tl.constexpr = 0.0 if HAS_ZERO else -MOST
        if FLOAT8 == 0:
            if not HALF:  # scales in float16 are rounded up, far from what float32 lacks: no quotient rounds beyond
                code = tl.minimum(tl.maximum(code, least), MOST)
            return _bits(code + 12582912.0) - 0x4B400000 + MIDDLE  # 1.5 * 2**23: its last bit is worth 1
        sign = tl.where(lost, 0, (_bits(x) >> 24) & 0x80)  # of the number: the remainders of -0 add up to 0
        size = _float(_bits(tl.minimum(tl.maximum(code, least), MOST)) & 0x7FFFFFFF)
        bias: tl.constexpr = 7 if FLOAT8 == 3 else 15
        shift: tl.constexpr = 23 - FLOAT8
        bits = _bits(size)
        normal = ((bits + (1 << (shift - 1)) - 1 + ((bits >> shift) & 1)) >> shift) - ((127 - bias) << FLOAT8)
        least_normal: tl.constexpr = 2.0**-6 if FLOAT8 == 3 else 2.0**-14
        magic: tl.constexpr = 1.5 * 2.0 ** (23 - 9) if FLOAT8 == 3 else 1.5 * 2.0 ** (23 - 16)
        small = _bits(size + magic) & 0xFF  # below the least normal code the last bit is worth the same everywhere
        return tl.where(size < least_normal, small, normal) | sign

    @triton.jit
    def _metadata(
        low, high, nan, MOST: tl.constexpr, MIDDLE: tl.constexpr, HAS_ZERO: tl.constexpr, HALF: tl.constexpr
    ):  # fmt: skip
        """Of groups' least and greatest numbers (without a zero point: 0 and the greatest magnitude): the bits to keep,
        the zero point, the divisor of codes, whether the group is lost, and whether it is although all is finite."""
        range_ = high
        lost = nan
        zero_bits, zero = _rounded(low, False, HALF)
        if HAS_ZERO:
            range_ = high - zero
            lost = lost | ((zero_bits & 0x7FFF) >= (0x7C00 if HALF else 0x7F80))
            zero_bits = tl.where(nan, 0x7E00 if HALF else 0x7FC0, zero_bits)
        most = tl.full(high.shape, MOST, tl.float32)
        scale_bits, scale = _rounded(tl.math.div_rn(range_, most), True, HALF)
        if MIDDLE > 0:  # what code 0 stands for is a number of the metadata's dtype as well
            lost = lost | (scale * MIDDLE >= (65520.0 if HALF else float("inf")))
        lost = lost | ((scale_bits & 0x7FFF) >= (0x7C00 if HALF else 0x7F80))
        bits = tl.where(lost, 0x7E00 if HALF else 0x7FC0, scale_bits)
        if HAS_ZERO:
            bits |= zero_bits << 16
        overflows = lost & ~nan & (high < float("inf")) & (low > -float("inf"))
        return bits, zero, tl.where((scale == 0.0) | lost, 1.0, scale), lost, overflows

    @triton.jit(do_not_specialize=["row_heads", "heads"])
    def _quantize_kernel(
        x_ptr,
        words_ptr,
        overflow_ptr,
        row_heads,
        heads,
        x_batch,
        x_head,
        x_token,
        x_dim,
        HEAD_DIM: tl.constexpr,
        GROUP: tl.constexpr,
        ROW_WORDS: tl.constexpr,
        ROWS: tl.constexpr,
        NBITS: tl.constexpr,
        FLOAT8: tl.constexpr,
        MOST: tl.constexpr,
        MIDDLE: tl.constexpr,
        HAS_ZERO: tl.constexpr,
        PER_CHANNEL: tl.constexpr,
        IN_THREADS: tl.constexpr,
        LEVELS: tl.constexpr,
        HALF: tl.constexpr,
        BY_RECIPROCAL: tl.constexpr,
    ):
        """Some groups (program axis 1) of one head's tile (axis 0)."""
        tile_head = tl.program_id(0).to(tl.int64)
        tile, row_head = tile_head // row_heads, tile_head % row_heads
        group = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        here = group < HEAD_DIM
        at = x_ptr + row_head // heads * x_batch + row_head % heads * x_head + tile * GROUP * x_token
        row = words_ptr + (tile_head * HEAD_DIM + group) * ROW_WORDS
        kind: tl.constexpr = words_ptr.dtype.element_ty
        PER_WORD: tl.constexpr = (32 if HAS_ZERO else 16) // NBITS
        WORDS: tl.constexpr = GROUP // PER_WORD
        if IN_THREADS:
            # A thread has whole channels, token after token: nothing is read twice, and no threads exchange numbers.
            first = at + group * x_dim
            xs = ()
            for token in tl.static_range(GROUP):
                xs = xs + (tl.load(first + token * x_token, mask=here, other=0.0),)  # type: ignore
            high = xs[0].to(tl.float32)  # type: ignore
            low = high
            if not HAS_ZERO:
                high = tl.abs(high)
                low = tl.zeros_like(high)
            for token in tl.static_range(1, GROUP):
                x = xs[token].to(tl.float32)  # type: ignore
                if HAS_ZERO:
                    low = tl.minimum(low, x)
                else:
                    x = tl.abs(x)
                high = tl.maximum(high, x, propagate_nan=tl.PropagateNan.ALL)
            bits, zero, steps, lost, overflows = _metadata(low, high, high != high, MOST, MIDDLE, HAS_ZERO, HALF)
            parts = ()
            for word in tl.static_range(WORDS):
                part = tl.zeros([ROWS], tl.int32)
                for place in tl.static_range(PER_WORD):
                    x = xs[word * PER_WORD + place].to(tl.float32)
                    some = _codes(x, zero, steps, lost, NBITS, FLOAT8, MOST, MIDDLE, HAS_ZERO, HALF, BY_RECIPROCAL)
                    part += some << (place * NBITS)
                parts = parts + (part.to(kind),)  # type: ignore
            for level in tl.static_range(LEVELS):  # joined in pairs; the first axis of 2 tells the upper half
                pairs = ()
                for i in tl.static_range(WORDS >> (level + 1)):
                    pairs = pairs + (tl.join(parts[i], parts[i + (WORDS >> (level + 1))]),)  # type: ignore
                parts = pairs
            words = tl.reshape(parts[0], [ROWS, WORDS])  # type: ignore
        else:
            code = tl.arange(0, GROUP)[None, :]
            if PER_CHANNEL:
                first, step = at + group[:, None] * x_dim, x_token
            else:
                PER_TOKEN: tl.constexpr = HEAD_DIM // GROUP
                first = at + (group // PER_TOKEN)[:, None] * x_token + (group % PER_TOKEN * GROUP)[:, None] * x_dim
                step = x_dim
            x = tl.load(first + code * step, mask=here[:, None], other=0.0).to(tl.float32)
            nan = tl.max(_bits(x) & 0x7FFFFFFF, axis=1) > 0x7F800000
            if HAS_ZERO:
                low, high = tl.min(x, axis=1), tl.max(x, axis=1)
            else:
                high = tl.max(tl.abs(x), axis=1)
                low = tl.zeros_like(high)
            bits, zero, steps, lost, overflows = _metadata(low, high, nan, MOST, MIDDLE, HAS_ZERO, HALF)
            zero, steps, lost = zero[:, None], steps[:, None], lost[:, None]
            codes = _codes(x, zero, steps, lost, NBITS, FLOAT8, MOST, MIDDLE, HAS_ZERO, HALF, BY_RECIPROCAL)
            codes = codes << (code % PER_WORD * NBITS)
            words = tl.sum(tl.reshape(codes, [ROWS, WORDS, PER_WORD]), axis=2).to(kind)
        tl.store(row[:, None] + tl.arange(0, WORDS)[None, :], words, mask=here[:, None])
        tl.store(row + WORDS, bits.to(kind), mask=here)
        tl.store(overflow_ptr + tl.zeros_like(group), 1, mask=overflows)  # whoever writes it writes the same
