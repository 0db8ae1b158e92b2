"""`packed_attention` of one new token per row as a Triton kernel.

Dequantization is part of the decode loop, query heads that share a KV head are answered together, and the sequence is
split over programs whose results are merged. Tokens in full precision, before the packed ones and after them, are few:
PyTorch answers them, as one more part.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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

    from labkit.kernels.split import begin, blend, store_part
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
    block_size = tokens_at_once(head_dim) if block_size is None else block_size
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
    rows, first = rows.contiguous(), first.int().contiguous()
    _packed_decode_kernel[(batch * num_kv_heads, num_splits)](
        rows,
        *memory_of(k),
        *memory_of(v),
        first,
        torch.full_like(first, tokens),
        parts,
        lse,
        scale,
        num_kv_heads,
        split_len,
        *rows.stride(),
        **query_blocks(queries, head_dim),
        BLOCK=block_size,
        **format_of(k, v),
        **how_to_multiply(rows.device, head_dim),
        num_stages=1,  # the numbers are made in registers: there is nothing to fetch ahead into shared memory
    )
    return parts, lse


def tokens_at_once(head_dim: int) -> int:
    """Tokens that a program makes numbers of: 32 KiB for K and V together, as float32, which a T4 has for one."""
    return max(16, min(64, 4096 // (1 << (head_dim - 1).bit_length())))


def memory_of(x: Packed) -> tuple[Tensor, Tensor]:
    """One memory, seen as codes and as scales."""
    rows = x.rows.contiguous()
    codes = rows if isinstance(x.quantizer.nbits, int) else rows.view(x.quantizer.nbits)
    return codes, rows.view(x.quantizer.metadata)


def format_of(k: Packed, v: Packed) -> dict[str, Any]:
    """What a kernel must know of a format at compile time."""
    quantizer = k.quantizer
    return {
        "GROUP": quantizer.group_size,
        "NBITS": quantizer.nbits if isinstance(quantizer.nbits, int) else 0,
        "MIDDLE": quantizer.middle,
        "HAS_ZERO": quantizer.has_zero,
        "ROW_BYTES": k.rows.shape[4],
        "K_PER_CHANNEL": quantizer.axis == "channel",
        "V_PER_CHANNEL": v.quantizer.axis == "channel",
    }


if triton is not None:

    @triton.jit
    def numbers_in_tiles(
        codes_ptr, scale_ptr, tile, place, dim, wanted,
        HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, NBITS: tl.constexpr, MIDDLE: tl.constexpr,
        HAS_ZERO: tl.constexpr, ROW_BYTES: tl.constexpr, PER_CHANNEL: tl.constexpr,
    ):  # fmt: skip
        """Dequantized numbers of some tokens, float32 `[tokens, dims]`; NBITS 0: codes are float8.

        tile, place: of each token, `[tokens, 1]`: which tile of all that lie in memory, and which token of it.
        """
        column = dim[None, :]
        if PER_CHANNEL:
            row, code = tile * HEAD_DIM + column, place + column * 0
        else:
            row = tile * HEAD_DIM + place * (HEAD_DIM // GROUP) + column // GROUP
            code = column % GROUP + place * 0
        CODE_BYTES: tl.constexpr = GROUP if NBITS == 0 else GROUP * NBITS // 8
        if NBITS == 0:
            numbers = tl.load(codes_ptr + row * ROW_BYTES + code, mask=wanted, other=0.0).to(tl.float32)
        else:
            byte = tl.load(codes_ptr + row * ROW_BYTES + code * NBITS // 8, mask=wanted, other=0).to(tl.int32)
            shift = (code * NBITS % 8).to(tl.int32)
            numbers = (((byte >> shift) & ((1 << NBITS) - 1)) - MIDDLE).to(tl.float32)
        metadata = scale_ptr + (row * ROW_BYTES + CODE_BYTES) // 2
        numbers *= tl.load(metadata, mask=wanted, other=0.0).to(tl.float32)
        if HAS_ZERO:
            numbers += tl.load(metadata + 1, mask=wanted, other=0.0).to(tl.float32)
        return numbers

    @triton.jit(do_not_specialize=["split_len"])
    def _packed_decode_kernel(
        q_ptr,
        k_codes_ptr,
        k_scale_ptr,
        v_codes_ptr,
        v_scale_ptr,
        first_ptr,
        end_ptr,
        parts_ptr,
        lse_ptr,
        scale,
        num_kv_heads,
        split_len,
        q_batch,
        q_head,
        q_query,
        q_dim,
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
        row, head, dim, q, start, end, top, total, out = begin(
            q_ptr, first_ptr, end_ptr, num_kv_heads, split_len, q_batch, q_head, q_query, q_dim,
            QUERIES, HEAD_DIM, QUERY_BLOCK, DIM_BLOCK,
        )  # fmt: skip
        for block in range(start, end, BLOCK):
            token = block + tl.arange(0, BLOCK)
            seen = token < end
            wanted = seen[:, None] & (dim[None, :] < HEAD_DIM)
            at = token[:, None].to(tl.int64)
            tile, place = at // GROUP * tl.num_programs(0) + row * num_kv_heads + head, at % GROUP
            k = numbers_in_tiles(
                k_codes_ptr, k_scale_ptr, tile, place, dim, wanted,
                HEAD_DIM, GROUP, NBITS, MIDDLE, HAS_ZERO, ROW_BYTES, K_PER_CHANNEL,
            )  # fmt: skip
            v = numbers_in_tiles(
                v_codes_ptr, v_scale_ptr, tile, place, dim, wanted,
                HEAD_DIM, GROUP, NBITS, MIDDLE, HAS_ZERO, ROW_BYTES, V_PER_CHANNEL,
            )  # fmt: skip
            top, total, out = blend(q, k, v, seen, scale, top, total, out, PRECISION)

        store_part(parts_ptr, lse_ptr, top, total, out, QUERIES, HEAD_DIM, QUERY_BLOCK, DIM_BLOCK)
