"""`packed_attention` of one new token per row as a Triton kernel.

Dequantization is part of the decode loop, query heads that share a KV head are answered together, and the sequence is
split over programs whose results are merged. Tokens in full precision, before the packed ones and after them, are few:
PyTorch answers them, as one more part.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from labkit.attention import PLAIN, Constants, Visibility
from labkit.kernels.packed_attention import Dense, check_packed
from labkit.kernels.split import DTYPES, check_can_run, how_to_multiply, merge, query_blocks, split_sequence
from labkit.quantization import Packed

try:
    import triton
    import triton.language as tl

    from labkit.kernels.split import blend, store_part
except ImportError:  # macOS: the rest of labkit works without
    triton = None


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
    block_size: int | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """`packed_attention` of one new token per row; its twin's arguments, but for a soft cap.

    block_size: keys read at a time, a power of 2, at least 16; by default as many as fit the shared memory of small
    GPUs. num_splits: parts of the packed sequence worked on in parallel. Raises ValueError when shapes, dtypes, formats
    or sizes do not fit, RuntimeError where Triton cannot run. It has no backward pass.
    """
    if has_torch_function((q,)):
        return handle_torch_function(
            packed_decode_attention, (q,), q, k, v, constants, visible, before=before, after=after, rotation=rotation,
            block_size=block_size, num_splits=num_splits,
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
    batch, _, _, head_dim = q.shape
    if block_size is None:  # 32 KiB for K and V each, as float32: what a T4 has for a program
        block_size = max(16, min(64, 4096 // (1 << (head_dim - 1).bit_length())))
    check_can_run(q, block_size, "packed_attention")
    scale = constants.scale_for(head_dim)
    rows = q.reshape(batch, k.rows.shape[2], -1, head_dim).float()
    first, _ = visible.bounds(constants, batch, q.device)
    start = 0 if before is None else before[0].shape[2]
    turned = rows if rotation is None else rows @ rotation
    parts = [launch(turned, k, v, first - start, scale, block_size, num_splits)]
    for place, dense in ((0, before), (start + k.num_tokens, after)):
        if dense is not None and dense[0].shape[2]:
            parts.append(dense_part(rows, *dense, first - place, scale))
    out = merge(torch.cat([out for out, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2))
    return out.to(q.dtype).view(q.shape)


def dense_part(rows: Tensor, k: Tensor, v: Tensor, first: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the few tokens in full precision, shaped as the kernel's parts, with one split."""
    scores = (rows @ k.float().mT) * scale
    hidden = torch.arange(k.shape[2], device=k.device) < first[:, None, None, None]
    scores = scores.masked_fill(hidden, float("-inf"))
    lse = scores.logsumexp(-1, keepdim=True)
    weights = torch.exp(scores - lse.clamp(min=torch.finfo(lse.dtype).min))
    return (weights @ v.float()).unsqueeze(2), lse.squeeze(3).unsqueeze(2)


def launch(
    rows: Tensor, k: Packed, v: Packed, first: Tensor, scale: float, block_size: int, num_splits: int | None
) -> tuple[Tensor, Tensor]:
    """The kernel over all packed tokens: outputs and log-sum-exps, with a split dimension, as `merge` takes them."""
    batch, num_kv_heads, queries, head_dim = rows.shape
    tokens = k.num_tokens
    num_splits, split_len = split_sequence(tokens, num_splits, block_size)
    parts = rows.new_empty(batch, num_kv_heads, num_splits, queries, head_dim)
    lse = rows.new_empty(batch, num_kv_heads, num_splits, queries)
    quantizer, packed = k.quantizer, []
    for side in (k.rows.contiguous(), v.rows.contiguous()):  # one memory, seen as codes and as scales
        codes = side if isinstance(quantizer.nbits, int) else side.view(quantizer.nbits)
        packed += [codes, side.view(quantizer.metadata)]
    _packed_decode_kernel[(batch * num_kv_heads, num_splits)](
        rows.contiguous(),
        *packed,
        first.int().contiguous(),
        parts,
        lse,
        scale,
        num_kv_heads,
        tokens,
        split_len,
        **query_blocks(queries, head_dim),
        BLOCK=block_size,
        GROUP=quantizer.group_size,
        NBITS=quantizer.nbits if isinstance(quantizer.nbits, int) else 0,
        MIDDLE=quantizer.middle,
        HAS_ZERO=quantizer.has_zero,
        ROW_BYTES=k.rows.shape[4],
        K_PER_CHANNEL=quantizer.axis == "channel",
        V_PER_CHANNEL=v.quantizer.axis == "channel",
        **how_to_multiply(rows.device, head_dim),
        num_stages=1,  # the numbers are made in registers: there is nothing to fetch ahead into shared memory
    )
    return parts, lse


if triton is not None:

    @triton.jit
    def _numbers(
        codes_ptr, scale_ptr, row_head, row_heads, token, dim, wanted,
        HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, NBITS: tl.constexpr, MIDDLE: tl.constexpr,
        HAS_ZERO: tl.constexpr, ROW_BYTES: tl.constexpr, PER_CHANNEL: tl.constexpr,
    ):  # fmt: skip
        """Dequantized numbers of a block, float32 `[tokens, dims]`; NBITS 0: codes are float8."""
        at, column = token[:, None].to(tl.int64), dim[None, :]
        tile = (at // GROUP * row_heads + row_head) * HEAD_DIM
        if PER_CHANNEL:
            row, place = tile + column, at % GROUP + column * 0
        else:
            row, place = tile + at % GROUP * (HEAD_DIM // GROUP) + column // GROUP, column % GROUP + at * 0
        CODE_BYTES: tl.constexpr = GROUP if NBITS == 0 else GROUP * NBITS // 8
        if NBITS == 0:
            numbers = tl.load(codes_ptr + row * ROW_BYTES + place, mask=wanted, other=0.0).to(tl.float32)
        else:
            byte = tl.load(codes_ptr + row * ROW_BYTES + place * NBITS // 8, mask=wanted, other=0).to(tl.int32)
            shift = (place * NBITS % 8).to(tl.int32)
            numbers = (((byte >> shift) & ((1 << NBITS) - 1)) - MIDDLE).to(tl.float32)
        metadata = scale_ptr + (row * ROW_BYTES + CODE_BYTES) // 2
        numbers *= tl.load(metadata, mask=wanted, other=0.0).to(tl.float32)
        if HAS_ZERO:
            numbers += tl.load(metadata + 1, mask=wanted, other=0.0).to(tl.float32)
        return numbers

    @triton.jit(do_not_specialize=["kv_len", "split_len"])
    def _packed_decode_kernel(
        q_ptr,
        k_codes_ptr,
        k_scale_ptr,
        v_codes_ptr,
        v_scale_ptr,
        first_ptr,
        parts_ptr,
        lse_ptr,
        scale,
        num_kv_heads,
        kv_len,
        split_len,
        QUERIES: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        QUERY_BLOCK: tl.constexpr,
        DIM_BLOCK: tl.constexpr,
        BLOCK: tl.constexpr,
        GROUP: tl.constexpr,
        NBITS: tl.constexpr,
        MIDDLE: tl.constexpr,
        HAS_ZERO: tl.constexpr,
        ROW_BYTES: tl.constexpr,
        K_PER_CHANNEL: tl.constexpr,
        V_PER_CHANNEL: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """One row's KV head (program axis 0) over one part of the packed sequence (axis 1)."""
        row_head = tl.program_id(0).to(tl.int64)  # offsets into a large cache overflow 32 bits
        row_heads = tl.num_programs(0)
        split = tl.program_id(1)
        query, dim = tl.arange(0, QUERY_BLOCK), tl.arange(0, DIM_BLOCK)
        here = (query[:, None] < QUERIES) & (dim[None, :] < HEAD_DIM)
        q = tl.load(q_ptr + (row_head * QUERIES + query[:, None]) * HEAD_DIM + dim[None, :], mask=here, other=0.0)

        first = tl.load(first_ptr + row_head // num_kv_heads)
        end = tl.minimum((split + 1) * split_len, kv_len)
        start = tl.maximum(split * split_len, first)  # padding is not read
        top = tl.full([QUERY_BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([QUERY_BLOCK], tl.float32)
        out = tl.zeros([QUERY_BLOCK, DIM_BLOCK], tl.float32)
        for block in range(start, end, BLOCK):
            token = block + tl.arange(0, BLOCK)
            seen = token < end
            wanted = seen[:, None] & (dim[None, :] < HEAD_DIM)
            k = _numbers(
                k_codes_ptr, k_scale_ptr, row_head, row_heads, token, dim, wanted,
                HEAD_DIM, GROUP, NBITS, MIDDLE, HAS_ZERO, ROW_BYTES, K_PER_CHANNEL,
            )  # fmt: skip
            v = _numbers(
                v_codes_ptr, v_scale_ptr, row_head, row_heads, token, dim, wanted,
                HEAD_DIM, GROUP, NBITS, MIDDLE, HAS_ZERO, ROW_BYTES, V_PER_CHANNEL,
            )  # fmt: skip
            top, total, out = blend(q, k, v, seen, scale, top, total, out, PRECISION)

        store_part(parts_ptr, lse_ptr, top, total, out, row_head, split, query, dim, here, QUERIES, HEAD_DIM)
