"""`packed_attention` of one new token per row as a Triton kernel.

A program reads a tile at a time, one group of tokens, and multiplies its codes as they are: tensor cores take whole
numbers up to 255 as bfloat16, exactly. Scales and zero points never meet the codes. With `code * scale + zero` for a
number, scales along the tokens belong to a channel and are multiplied into the queries, zero points are a number that
is added to a query's scores; scales along the channels belong to a token and are multiplied into its weights. What is
multiplied into is float32 and becomes a sum of bfloat16 numbers, so many that nothing is lost that matters.

Tokens in full precision, before the packed ones and after them, are one more part each, of the dense kernel.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from labkit.attention import PLAIN, Constants, Visibility
from labkit.kernels.decode_attention import launch_dense, sizes_for
from labkit.kernels.packed_attention import Dense, check_packed
from labkit.kernels.split import (
    DTYPES,
    LOG2_E,
    capability,
    check_can_run,
    make_parts,
    merged,
    query_blocks,
    split_sequence,
)
from labkit.quantization import Packed, Quantizer

try:
    import triton
    import triton.language as tl

    from labkit.kernels.split import load_queries, part_of, reach, store_lse, weigh
except ImportError:  # macOS: the rest of labkit works without
    triton = None


PROGRAMS = 6
"""Programs per multiprocessor, of which two or three run at a time: while some compute, others' reads are on their way.
On an H100, for 16 rows of 32,768 tokens in 8 bits, 6 take 0.75 ms, 3 take 0.81, one takes 0.91."""


def packed_decode_attention(
    q: Tensor,
    k: Packed,
    v: Packed,
    constants: Constants = PLAIN,
    visible: Visibility | None = None,
    *,
    before: Dense | None = None,
    after: Dense | None = None,
    rotation: Tensor | None = None,
    num_splits: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> Tensor:
    """`packed_attention` of one new token per row; its twin's arguments, but for a soft cap.

    num_splits: parts of the packed sequence worked on in parallel, each of whole groups. num_warps, num_stages:
    Triton's. By default what suits the device. Raises ValueError when shapes, dtypes, formats or sizes do not fit,
    RuntimeError where Triton cannot run. It has no backward pass.
    """
    if has_torch_function((q,)):
        return handle_torch_function(
            packed_decode_attention, (q,), q, k, v, constants, visible, before=before, after=after, rotation=rotation,
            num_splits=num_splits, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    visible = check_packed(q, k, v, before, after, visible)
    if replace(v.quantizer, axis=k.quantizer.axis) != k.quantizer:
        raise ValueError(f"the kernel takes K and V of one format; got {k.quantizer} and {v.quantizer}")
    if q.shape[2] != 1:
        raise ValueError(f"packed_decode_attention takes one new token; got {q.shape[2]}. packed_attention takes any")
    if q.dtype not in DTYPES:
        raise ValueError(f"q must be float32, float16 or bfloat16; got {q.dtype}")
    if constants.soft_cap is not None:
        raise ValueError("packed_decode_attention has no soft cap: packed_attention has")
    batch, num_heads, _, head_dim = q.shape
    check_can_run(q, "packed_attention")
    num_kv_heads, group = k.rows.shape[2], k.quantizer.group_size
    scale = constants.scale_for(head_dim)
    grouped = q.reshape(batch, num_kv_heads, -1, head_dim)
    first, end = visible.bounds(constants, batch, q.device)
    start = 0 if before is None else before[0].shape[2]
    dense = [(at, x) for at, x in ((0, before), (start + k.num_tokens, after)) if x is not None and x[0].shape[2]]
    parts = split_sequence(k.num_tokens, num_splits, group, batch * num_kv_heads, q.device, PROGRAMS)
    room = make_parts(grouped, parts[0] + len(dense), q.dtype)
    turned = grouped if rotation is None else (grouped.float() @ rotation)
    exact = rotation is None and k.quantizer.axis == "token"
    bounds = (first - start if start else first), ((end - start).clamp(max=k.num_tokens) if dense else end)
    launch(turned, k, v, *bounds, scale, room, parts, terms(q, exact), num_warps, num_stages)
    for part, (at, (keys, values)) in enumerate(dense, parts[0]):
        sizes = sizes_for(q.device, keys.dtype, head_dim)
        one = 1, keys.shape[2]
        launch_dense(grouped, keys, values, first - at, (end - at).clamp(max=one[1]), scale, room, part, one, sizes)
    return merged(*room, q.dtype).view(batch, num_heads, 1, head_dim)


def launch(
    q: Tensor,
    k: Packed,
    v: Packed,
    first: Tensor,
    end: Tensor,
    scale: float,
    room: tuple[Tensor, Tensor],
    parts: tuple[int, int],
    precision: dict[str, int],
    num_warps: int | None,
    num_stages: int | None,
) -> None:
    """Write outputs and log-sum-exps of all packed tokens into the first `parts` of `room`.

    q: `[batch, num_kv_heads, queries_per_kv, head_dim]`. parts: how many, and of how many tokens. precision: `terms`.
    """
    batch, num_kv_heads, queries, head_dim = q.shape
    _packed_decode_kernel[(batch * num_kv_heads, parts[0])](
        q,
        *memory_of(k),
        *memory_of(v),
        first,
        end,
        *room,
        scale * LOG2_E,
        num_kv_heads,
        parts[1],
        room[1].shape[2],
        *q.stride(),
        **query_blocks(queries, head_dim),
        **format_of(k, v),
        **precision,
        **how_to_run(k, num_warps, num_stages),
    )


def how_to_run(k: Packed, num_warps: int | None, num_stages: int | None) -> dict[str, int]:
    """Warps of a program, stages, and how many registers a thread may have.

    A stage more is a tile of keys and of values in shared memory, of which small GPUs have 99 KB for a program. On an
    H100, for 16 rows of 32,768 tokens with heads of 128: with 168 registers, of which three programs fit, 4 bits take
    0.55 ms instead of 0.57; 8 bits, which then keep numbers in local memory, 1.05 instead of 0.75.
    """
    tile = 2 * k.rows.shape[3] * k.rows.shape[4]
    stages = min(3, 1 + 48 * 1024 // tile) if num_stages is None else num_stages
    few = capability(k.rows.device) >= (8, 0) and num_warps in (None, 4)
    few = few and k.quantizer.nbits in (4, 2) and k.rows.shape[3] <= 128
    sizes = {"num_warps": 4 if num_warps is None else num_warps, "num_stages": stages}
    return sizes | ({"maxnreg": 168} if few else {})


def memory_of(x: Packed) -> tuple[Tensor, Tensor]:
    """One memory, seen as codes, in words as large as rows are made of, and as scales."""
    rows = x.rows.contiguous()
    if not isinstance(x.quantizer.nbits, int):
        return rows.view(x.quantizer.nbits), rows.view(x.quantizer.metadata)
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[word_bytes(x.quantizer)]
    return rows.view(word), rows.view(x.quantizer.metadata)


def word_bytes(quantizer: Quantizer) -> int:
    """The largest word of up to 4 bytes that codes, and whole rows, are made of."""
    if not isinstance(quantizer.nbits, int):
        return 1
    return next(size for size in (4, 2, 1) if not (quantizer.code_bytes % size or quantizer.row_bytes % size))


def format_of(k: Packed, v: Packed) -> dict[str, Any]:
    """What a kernel must know of a format at compile time."""
    quantizer = k.quantizer
    word = word_bytes(quantizer)
    return {
        "GROUP": quantizer.group_size,
        "NBITS": quantizer.nbits if isinstance(quantizer.nbits, int) else 0,
        "MIDDLE": quantizer.middle,
        "HAS_ZERO": quantizer.has_zero,
        "ROW_BYTES": quantizer.row_bytes,
        "WORD_BYTES": word,
        "WORDS": group_block(quantizer) * quantizer.code_bytes // quantizer.group_size // word,
        "GROUP_BLOCK": group_block(quantizer),
        "K_PER_CHANNEL": quantizer.axis == "channel",
        "V_PER_CHANNEL": v.quantizer.axis == "channel",
        "UNPACK": unpack_assembly(quantizer) if capability(k.rows.device) >= (8, 0) else "",
    }


@functools.cache
def unpack_assembly(quantizer: Quantizer) -> str:
    """PTX that makes bfloat16 numbers of the codes in a 32-bit word, two at a time; "" where rows are no such words.

    Codes half a word apart stand in the halves of a register after one shift. Under the exponent of 128, whose last
    digit is worth 1, a code is 128 more than itself: one subtraction gives it. The eighth bit of a code has no place
    there: times 0x86 it is the number 128 by itself. Symmetric codes have no zero point, so that their rows are no
    whole words: they are taken apart one by one.
    """
    if not isinstance(quantizer.nbits, int) or word_bytes(quantizer) < 4:
        return ""
    nbits, count = quantizer.nbits, 32 // quantizer.nbits
    kept = 2 ** min(nbits, 7) - 1
    one, mask, base, minus = (f"0x{half:04X}{half:04X}" for half in (0x3F80, kept, 0x4300, 0xC300))
    lines = [".reg .b32 word, low, high, one, minus;", f"mov.b32 one, {one};", f"mov.b32 minus, {minus};"]
    for code in range(count // 2):
        lines.append(f"shr.u32 word, ${count}, {code * nbits};")
        lines.append(f"lop3.b32 low, word, {mask}, {base}, 0xEA;")
        if nbits == 8:
            lines += ["and.b32 high, word, 0x00800080;", "mul.lo.u32 high, high, 0x86;"]
            lines.append("fma.rn.bf16x2 high, high, one, minus;")
        lines.append(f"fma.rn.bf16x2 low, low, one, {'high' if nbits == 8 else 'minus'};")
        lines.append(f"mov.b32 {{${code}, ${code + count // 2}}}, low;")
    return "{ " + " ".join(lines) + " }"


def group_block(quantizer: Quantizer) -> int:
    """Tokens, or channels, of a tile of one group: a power of 2, and 16 the least that tl.dot takes."""
    return max(16, triton.next_power_of_2(quantizer.group_size))


def terms(q: Tensor, exact: bool) -> dict[str, int]:
    """How many bfloat16 numbers stand for one that is multiplied by codes; 0 where float32 is multiplied itself.

    Two lose 2**-17 of a score's terms, three nothing that float32 holds. Weights are rounded as in FlashAttention,
    for queries of 16 bits, whose answers are rounded so themselves. exact: queries reach the product as they came.
    """
    if capability(q.device) < (8, 0):
        return {"SCORE_TERMS": 0, "WEIGHT_TERMS": 0}
    if q.dtype == torch.float32:
        return {"SCORE_TERMS": 3, "WEIGHT_TERMS": 3}
    return {"SCORE_TERMS": 1 if exact and q.dtype == torch.bfloat16 else 2, "WEIGHT_TERMS": 1}


if triton is not None:

    @triton.jit
    def dot_codes(a, codes, TERMS: tl.constexpr):
        """a times codes, float32: a as a sum of `TERMS` bfloat16 numbers, or, of none, as it is."""
        if TERMS == 0:
            out = tl.dot(a, codes.to(tl.float32), input_precision="ieee")
        else:
            high = a.to(tl.bfloat16)
            out = tl.dot(high, codes)
            if TERMS > 1:
                rest = a - high.to(tl.float32)
                middle = rest.to(tl.bfloat16)
                out = tl.dot(middle, codes, out)
                if TERMS > 2:
                    out = tl.dot((rest - middle.to(tl.float32)).to(tl.bfloat16), codes, out)
        return out

    @triton.jit
    def place_in_group(NBITS: tl.constexpr, WORD_BYTES: tl.constexpr, GROUP_BLOCK: tl.constexpr):
        """Which number of a group each position stands for: the codes of a word come in pairs, half a word apart."""
        position = tl.arange(0, GROUP_BLOCK)
        if NBITS == 0:
            place = position
        else:
            PER_WORD: tl.constexpr = WORD_BYTES * 8 // NBITS
            HALF: tl.constexpr = PER_WORD // 2
            within = position % PER_WORD
            place = position // PER_WORD * PER_WORD + (within // 2 + within % 2 * HALF if HALF > 0 else 0)
        return place

    @triton.jit
    def fetch_groups(
        words_ptr, scale_ptr, tile, row, there, NBITS: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr,
        ROW_BYTES: tl.constexpr, WORD_BYTES: tl.constexpr, WORDS: tl.constexpr,
    ):  # fmt: skip
        """Words of codes of some groups of a tile, `[groups, words]`, their scales and zero points, as they lie.

        tile: its first row of all. row: each group's, in the tile. there: which groups are wanted. Where scale and zero
        point are one word, it is given twice.
        """
        CODE_BYTES: tl.constexpr = GROUP if NBITS == 0 else GROUP * NBITS // 8
        # 32-bit words are read as halves: words of rows of an odd number Triton would fetch ahead into one bank of 32.
        HALVES: tl.constexpr = 2 if WORD_BYTES == 4 else 1
        unit = tl.arange(0, WORDS * HALVES)
        wanted = there[:, None]
        if WORDS * WORD_BYTES > CODE_BYTES:
            wanted = wanted & (unit < CODE_BYTES // WORD_BYTES * HALVES)[None, :]
        STEP: tl.constexpr = ROW_BYTES // WORD_BYTES * HALVES
        units_ptr = words_ptr
        if WORD_BYTES == 4:
            units_ptr = words_ptr.to(tl.pointer_type(tl.int16))
        at = (units_ptr + tile * STEP) + (row[:, None] * STEP + unit[None, :])
        words = tl.load(at, mask=wanted, other=0.0 if NBITS == 0 else 0)
        if WORD_BYTES == 4:
            low, high = tl.split(tl.reshape(words, [row.shape[0], WORDS, 2]))
            words = (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
        if HAS_ZERO and WORD_BYTES == 4:
            at = (words_ptr + tile * (ROW_BYTES // 4)) + (row * (ROW_BYTES // 4) + CODE_BYTES // 4)
            scale = tl.load(at, mask=there, other=0)
            zero = scale
        else:
            at = (scale_ptr + tile * (ROW_BYTES // 2)) + (row * (ROW_BYTES // 2) + CODE_BYTES // 2)
            scale = tl.load(at, mask=there, other=0.0)
            zero = scale
            if HAS_ZERO:
                zero = tl.load(at + 1, mask=there, other=0.0)
        return words, scale, zero

    @triton.jit
    def fetch(
        words_ptr, scale_ptr, tile, seen, NBITS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
        GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, ROW_BYTES: tl.constexpr, WORD_BYTES: tl.constexpr,
        WORDS: tl.constexpr, GROUP_BLOCK: tl.constexpr, PER_CHANNEL: tl.constexpr,
    ):  # fmt: skip
        """`fetch_groups` of a whole tile: of all channels, or by group of them, of the tokens that are seen."""
        if PER_CHANNEL:
            channel = tl.arange(0, DIM_BLOCK)
            there = channel < HEAD_DIM
            words, scale, zero = fetch_groups(
                words_ptr, scale_ptr, tile, channel, there, NBITS, GROUP, HAS_ZERO, ROW_BYTES, WORD_BYTES, WORDS
            )
            raw = ((words, scale, zero),)
        else:
            token = place_in_group(NBITS, WORD_BYTES, GROUP_BLOCK)
            GROUPS: tl.constexpr = HEAD_DIM // GROUP
            raw = ()  # type: ignore
            for group in tl.static_range(GROUPS):
                words, scale, zero = fetch_groups(
                    words_ptr, scale_ptr, tile, token * GROUPS + group, seen, NBITS, GROUP, HAS_ZERO, ROW_BYTES,
                    WORD_BYTES, WORDS,
                )  # fmt: skip
                raw = raw + ((words, scale, zero),)  # type: ignore
        return raw

    @triton.jit
    def codes_of(words, NBITS: tl.constexpr, MIDDLE: tl.constexpr, WORD_BYTES: tl.constexpr, UNPACK: tl.constexpr):
        """Codes of groups as bfloat16, `[groups, codes]`, in the order of `place_in_group`; NBITS 0: float8."""
        if NBITS == 0:
            codes = words.to(tl.float32).to(tl.bfloat16)
        else:
            PER_WORD: tl.constexpr = WORD_BYTES * 8 // NBITS
            if UNPACK == "":
                wide = words.to(tl.int32)
                if PER_WORD == 1:
                    codes = one_by_one(wide, 0, 1, 1, NBITS, MIDDLE)
                else:
                    HALF: tl.constexpr = PER_WORD // 2
                    low = one_by_one(wide, 0, HALF, 1, NBITS, MIDDLE)
                    codes = tl.join(low, one_by_one(wide, HALF, HALF, 1, NBITS, MIDDLE))
            elif NBITS == 8:
                codes = four_codes(words, UNPACK)
            elif NBITS == 4:
                codes = eight_codes(words, UNPACK)
            else:
                codes = sixteen_codes(words, UNPACK)
            # Seen through to a `join`, Triton would lay out the other factor for half the loads: a sum of one hides it.
            codes = tl.reduce(tl.reshape(codes, [words.shape[0], words.shape[1] * PER_WORD, 1]), 2, either)
        return codes

    @triton.jit
    def either(a, b):
        """One of two."""
        return a

    @triton.jit
    def one_by_one(
        words, FIRST: tl.constexpr, COUNT: tl.constexpr, STEP: tl.constexpr, NBITS: tl.constexpr, MIDDLE: tl.constexpr
    ):
        """`COUNT` codes of each word, the first and each `STEP` behind, in a last dimension: halves, joined again."""
        if COUNT == 1:
            codes = (((words >> (FIRST * NBITS)) & ((1 << NBITS) - 1)) - MIDDLE).to(tl.float32).to(tl.bfloat16)
        else:
            even = one_by_one(words, FIRST, COUNT // 2, STEP * 2, NBITS, MIDDLE)
            odd = one_by_one(words, FIRST + STEP, COUNT // 2, STEP * 2, NBITS, MIDDLE)
            codes = tl.reshape(tl.join(even, odd), [words.shape[0], words.shape[1], COUNT])
        return codes

    @triton.jit
    def four_codes(words, UNPACK: tl.constexpr):
        """The same, in pairs, of 32-bit words of 8-bit codes, by `unpack_assembly`."""
        c0, c1, c2, c3 = tl.inline_asm_elementwise(
            UNPACK, "=h,=h,=h,=h,r", [words], (tl.bfloat16,) * 4, is_pure=True, pack=1
        )
        return tl.join(tl.join(c0, c1), tl.join(c2, c3))

    @triton.jit
    def eight_codes(words, UNPACK: tl.constexpr):
        """The same of 4-bit codes."""
        c0, c1, c2, c3, c4, c5, c6, c7 = tl.inline_asm_elementwise(
            UNPACK, "=h,=h,=h,=h,=h,=h,=h,=h,r", [words], (tl.bfloat16,) * 8, is_pure=True, pack=1
        )
        low = tl.join(tl.join(c0, c2), tl.join(c1, c3))
        return tl.join(low, tl.join(tl.join(c4, c6), tl.join(c5, c7)))

    @triton.jit
    def sixteen_codes(words, UNPACK: tl.constexpr):
        """The same of 2-bit codes."""
        c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, c14, c15 = tl.inline_asm_elementwise(
            UNPACK, "=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,r", [words], (tl.bfloat16,) * 16,
            is_pure=True, pack=1,
        )  # fmt: skip
        low = tl.join(tl.join(tl.join(c0, c4), tl.join(c2, c6)), tl.join(tl.join(c1, c5), tl.join(c3, c7)))
        high = tl.join(tl.join(tl.join(c8, c12), tl.join(c10, c14)), tl.join(tl.join(c9, c13), tl.join(c11, c15)))
        return tl.join(low, high)

    @triton.jit
    def scale_of(raw, BFLOAT16: tl.constexpr, HAS_ZERO: tl.constexpr, WORD_BYTES: tl.constexpr):
        """Scales and zero points of some groups, float32 `[groups]`: zeros where there is none."""
        _, scale, zero = raw
        if HAS_ZERO and WORD_BYTES == 4:
            if BFLOAT16:
                low, high = (scale << 16).to(tl.float32, bitcast=True), (scale & -65536).to(tl.float32, bitcast=True)
            else:
                low = scale.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
                high = (scale >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        else:
            low = scale.to(tl.float32)
            high = zero.to(tl.float32) if HAS_ZERO else low * 0.0
        return low, high

    @triton.jit
    def queries_by_group(
        q_ptr, row, head, q_batch, q_head, q_query, q_dim, QUERIES: tl.constexpr, QUERY_BLOCK: tl.constexpr,
        HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, GROUP: tl.constexpr, NBITS: tl.constexpr,
        WORD_BYTES: tl.constexpr, GROUP_BLOCK: tl.constexpr, PER_CHANNEL: tl.constexpr,
    ):  # fmt: skip
        """Queries as float32, all channels in one where keys are scaled by channel, else one for each group of them."""
        if PER_CHANNEL:
            dim = tl.arange(0, DIM_BLOCK)
            q = load_queries(
                q_ptr, row, head, dim, dim < HEAD_DIM, q_batch, q_head, q_query, q_dim, QUERIES, QUERY_BLOCK
            )
            some = (q.to(tl.float32),)
        else:
            dim = place_in_group(NBITS, WORD_BYTES, GROUP_BLOCK)
            some = ()  # type: ignore
            for group in tl.static_range(HEAD_DIM // GROUP):
                q = load_queries(
                    q_ptr, row, head, group * GROUP + dim, dim < GROUP, q_batch, q_head, q_query, q_dim, QUERIES,
                    QUERY_BLOCK,
                )  # fmt: skip
                some = some + (q.to(tl.float32),)  # type: ignore
        return some

    @triton.jit
    def nothing_yet(
        QUERY_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, GROUP: tl.constexpr,
        GROUP_BLOCK: tl.constexpr, PER_CHANNEL: tl.constexpr,
    ):  # fmt: skip
        """Outputs before anything is read, all channels in one where values are scaled by channel, else by group.

        And what is added to all channels of each, `[queries, tokens]`: each token of a tile has a sum of its own.
        """
        offsets = (tl.zeros([QUERY_BLOCK, GROUP_BLOCK], tl.float32),)
        if PER_CHANNEL:
            outs = (tl.zeros([QUERY_BLOCK, DIM_BLOCK], tl.float32),)
        else:
            outs = (tl.zeros([QUERY_BLOCK, GROUP_BLOCK], tl.float32),)
            for _ in tl.static_range(1, HEAD_DIM // GROUP):
                outs = outs + (tl.zeros([QUERY_BLOCK, GROUP_BLOCK], tl.float32),)  # type: ignore
                offsets = offsets + (tl.zeros([QUERY_BLOCK, GROUP_BLOCK], tl.float32),)  # type: ignore
        return outs, offsets

    @triton.jit
    def scores_of_tile(
        q, raw, NBITS: tl.constexpr, MIDDLE: tl.constexpr, HEAD_DIM: tl.constexpr, GROUP: tl.constexpr,
        HAS_ZERO: tl.constexpr, BFLOAT16: tl.constexpr, WORD_BYTES: tl.constexpr, GROUP_BLOCK: tl.constexpr,
        PER_CHANNEL: tl.constexpr, UNPACK: tl.constexpr, TERMS: tl.constexpr,
    ):  # fmt: skip
        """Products of queries and the keys of one tile, float32 `[queries, tokens]`."""
        if PER_CHANNEL:
            codes = codes_of(raw[0][0], NBITS, MIDDLE, WORD_BYTES, UNPACK)
            scale, zero = scale_of(raw[0], BFLOAT16, HAS_ZERO, WORD_BYTES)
            scores = dot_codes(q[0] * scale[None, :], codes, TERMS)
            if HAS_ZERO:
                scores += tl.sum(q[0] * zero[None, :], axis=1)[:, None]
        else:
            scores = tl.zeros([q[0].shape[0], GROUP_BLOCK], tl.float32)
            for group in tl.static_range(HEAD_DIM // GROUP):
                codes = codes_of(raw[group][0], NBITS, MIDDLE, WORD_BYTES, UNPACK)
                scale, zero = scale_of(raw[group], BFLOAT16, HAS_ZERO, WORD_BYTES)
                scores += dot_codes(q[group], tl.trans(codes), TERMS) * scale[None, :]
                if HAS_ZERO:
                    scores += tl.sum(q[group], axis=1)[:, None] * zero[None, :]
        return scores

    @triton.jit
    def values_of_tile(
        weights, shrink, outs, offsets, raw, NBITS: tl.constexpr, MIDDLE: tl.constexpr, HEAD_DIM: tl.constexpr,
        GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, BFLOAT16: tl.constexpr, WORD_BYTES: tl.constexpr,
        PER_CHANNEL: tl.constexpr, UNPACK: tl.constexpr, TERMS: tl.constexpr,
    ):  # fmt: skip
        """Outputs after the values of one more tile: what they were, shrunk, and `weights` times the values."""
        if PER_CHANNEL:
            codes = codes_of(raw[0][0], NBITS, MIDDLE, WORD_BYTES, UNPACK)
            scale, zero = scale_of(raw[0], BFLOAT16, HAS_ZERO, WORD_BYTES)
            out = outs[0] * shrink[:, None] + dot_codes(weights, tl.trans(codes), TERMS) * scale[None, :]
            if HAS_ZERO:
                out += tl.sum(weights, axis=1)[:, None] * zero[None, :]
            found, added = (out,), offsets
        else:
            found, added = (), ()  # type: ignore
            for group in tl.static_range(HEAD_DIM // GROUP):
                codes = codes_of(raw[group][0], NBITS, MIDDLE, WORD_BYTES, UNPACK)
                scale, zero = scale_of(raw[group], BFLOAT16, HAS_ZERO, WORD_BYTES)
                out = outs[group] * shrink[:, None] + dot_codes(weights * scale[None, :], codes, TERMS)
                found = found + (out,)  # type: ignore
                if HAS_ZERO:
                    added = added + (offsets[group] * shrink[:, None] + weights * zero[None, :],)
                else:
                    added = added + (offsets[group],)
        return found, added

    @triton.jit
    def store_by_group(
        parts_ptr, lse_ptr, first_part, num_parts, top, total, outs, offsets, QUERIES: tl.constexpr,
        QUERY_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, GROUP: tl.constexpr,
        NBITS: tl.constexpr, WORD_BYTES: tl.constexpr, GROUP_BLOCK: tl.constexpr, PER_CHANNEL: tl.constexpr,
    ):  # fmt: skip
        """`store_part` of outputs that may lie group by group."""
        at = part_of(first_part, num_parts, QUERIES, QUERY_BLOCK)
        some = store_lse(lse_ptr, at, top, total, QUERIES, QUERY_BLOCK, 0.0)
        WIDE: tl.constexpr = HEAD_DIM if PER_CHANNEL else GROUP
        if PER_CHANNEL:
            dim = tl.arange(0, DIM_BLOCK)
        else:
            dim = place_in_group(NBITS, WORD_BYTES, GROUP_BLOCK)
        here = (tl.arange(0, QUERY_BLOCK)[:, None] < QUERIES) & (dim[None, :] < WIDE)
        for group in tl.static_range(HEAD_DIM // WIDE):
            to = parts_ptr + at[:, None] * HEAD_DIM + group * WIDE + dim[None, :]
            out = outs[group] + tl.sum(offsets[group], axis=1)[:, None]
            tl.store(to, out / some[:, None], mask=here)

    @triton.jit(do_not_specialize=["split_len", "num_parts"])
    def _packed_decode_kernel(
        q_ptr,
        k_words_ptr,
        k_scale_ptr,
        v_words_ptr,
        v_scale_ptr,
        first_ptr,
        end_ptr,
        parts_ptr,
        lse_ptr,
        scale,
        num_kv_heads,
        split_len,
        num_parts,
        q_batch,
        q_head,
        q_query,
        q_dim,
        QUERIES: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        QUERY_BLOCK: tl.constexpr,
        DIM_BLOCK: tl.constexpr,
        GROUP: tl.constexpr,
        NBITS: tl.constexpr,
        MIDDLE: tl.constexpr,
        HAS_ZERO: tl.constexpr,
        ROW_BYTES: tl.constexpr,
        WORD_BYTES: tl.constexpr,
        WORDS: tl.constexpr,
        GROUP_BLOCK: tl.constexpr,
        K_PER_CHANNEL: tl.constexpr,
        V_PER_CHANNEL: tl.constexpr,
        UNPACK: tl.constexpr,
        SCORE_TERMS: tl.constexpr,
        WEIGHT_TERMS: tl.constexpr,
    ):
        """One row's KV head (program axis 0) over one part of the packed sequence (axis 1)."""
        BFLOAT16: tl.constexpr = k_scale_ptr.dtype.element_ty == tl.bfloat16
        row, head, start, end = reach(first_ptr, end_ptr, num_kv_heads, split_len)
        q = queries_by_group(
            q_ptr, row, head, q_batch, q_head, q_query, q_dim,
            QUERIES, QUERY_BLOCK, HEAD_DIM, DIM_BLOCK, GROUP, NBITS, WORD_BYTES, GROUP_BLOCK, K_PER_CHANNEL,
        )  # fmt: skip
        top = tl.full([QUERY_BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([QUERY_BLOCK, GROUP_BLOCK], tl.float32)
        outs, offsets = nothing_yet(QUERY_BLOCK, HEAD_DIM, DIM_BLOCK, GROUP, GROUP_BLOCK, V_PER_CHANNEL)
        place = place_in_group(NBITS, WORD_BYTES, GROUP_BLOCK)
        tiles, head_row = tl.num_programs(0), row * num_kv_heads + head
        for index in range(start // GROUP, tl.cdiv(end, GROUP)):
            token = index * GROUP + place
            seen = (token >= start) & (token < end) & (place < GROUP)
            tile = (head_row + tiles * index) * HEAD_DIM
            k = fetch(
                k_words_ptr, k_scale_ptr, tile, seen, NBITS, HEAD_DIM, DIM_BLOCK, GROUP, HAS_ZERO, ROW_BYTES,
                WORD_BYTES, WORDS, GROUP_BLOCK, K_PER_CHANNEL,
            )  # fmt: skip
            v = fetch(
                v_words_ptr, v_scale_ptr, tile, seen, NBITS, HEAD_DIM, DIM_BLOCK, GROUP, HAS_ZERO, ROW_BYTES,
                WORD_BYTES, WORDS, GROUP_BLOCK, V_PER_CHANNEL,
            )  # fmt: skip
            scores = scores_of_tile(
                q, k, NBITS, MIDDLE, HEAD_DIM, GROUP, HAS_ZERO, BFLOAT16, WORD_BYTES, GROUP_BLOCK, K_PER_CHANNEL,
                UNPACK, SCORE_TERMS,
            )  # fmt: skip
            weights, shrink, top, total = weigh(scores * scale, seen, top, total, 0.0)
            outs, offsets = values_of_tile(
                weights, shrink, outs, offsets, v, NBITS, MIDDLE, HEAD_DIM, GROUP, HAS_ZERO, BFLOAT16, WORD_BYTES,
                V_PER_CHANNEL, UNPACK, WEIGHT_TERMS,
            )  # fmt: skip
        store_by_group(
            parts_ptr, lse_ptr, 0, num_parts, top, total, outs, offsets,
            QUERIES, QUERY_BLOCK, HEAD_DIM, DIM_BLOCK, GROUP, NBITS, WORD_BYTES, GROUP_BLOCK, V_PER_CHANNEL,
        )  # fmt: skip
