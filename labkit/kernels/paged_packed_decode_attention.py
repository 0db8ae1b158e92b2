"""`paged_packed_attention` of one new token per row as a Triton kernel.

As in `paged_decode_attention`, where a token lies is looked up in the block table; as in `packed_decode_attention`,
numbers are made of codes in registers. A block that waits is read as it is.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from labkit.attention import PLAIN, Constants, Visibility
from labkit.kernels.packed_attention import Dense
from labkit.kernels.packed_decode_attention import format_of, memory_of, tokens_at_once
from labkit.kernels.paged_packed_attention import check_paged_packed
from labkit.kernels.split import DTYPES, check_can_run, how_to_multiply, merge, query_blocks, split_sequence
from labkit.quantization import Packed

try:
    import triton
    import triton.language as tl

    from labkit.kernels.packed_decode_attention import numbers_in_tiles
    from labkit.kernels.split import begin, blend, store_part
except ImportError:  # macOS: the rest of labkit works without
    triton = None


def paged_packed_decode_attention(
    q: Tensor,
    k: Packed,
    v: Packed,
    waiting: Dense,
    block_table: Tensor,
    visible: Visibility,
    constants: Constants = PLAIN,
    *,
    tile_size: int | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """`paged_packed_attention` of one new token per row; its twin's arguments, but for a soft cap.

    The table's numbers are not checked: each that is read must be a block. tile_size: keys read at a time, a power of
    2, at least 16; by default as many as fit the shared memory of small GPUs. num_splits: parts of the sequence worked
    on in parallel. Raises ValueError when shapes, dtypes, formats or sizes do not fit, RuntimeError where Triton cannot
    run. It has no backward pass.
    """
    if has_torch_function((q,)):
        return handle_torch_function(
            paged_packed_decode_attention, (q,), q, k, v, waiting, block_table, visible, constants,
            tile_size=tile_size, num_splits=num_splits,
        )  # fmt: skip
    queries = check_paged_packed(q, k, v, waiting, block_table, visible)
    if replace(v.quantizer, axis=k.quantizer.axis) != k.quantizer:
        raise ValueError(f"the kernel takes K and V of one format; got {k.quantizer} and {v.quantizer}")
    if q.shape[2] != 1:
        raise ValueError(
            f"paged_packed_decode_attention takes one new token; got {q.shape[2]}. paged_packed_attention takes any"
        )
    if q.dtype not in DTYPES:
        raise ValueError(f"q must be float32, float16 or bfloat16; got {q.dtype}")
    if constants.soft_cap is not None or not constants.causal:
        raise ValueError(f"the kernel has no soft cap and is causal; got {constants}. paged_packed_attention takes all")
    batch, num_heads, _, head_dim = q.shape
    num_blocks, _, num_kv_heads, _, _ = k.rows.shape
    tile_size = tokens_at_once(head_dim) if tile_size is None else tile_size
    check_can_run(q, tile_size, "paged_packed_attention")
    num_splits, split_len = split_sequence(visible.kv_len, num_splits, tile_size)
    grouped = q.reshape(batch, num_kv_heads, queries, head_dim)
    parts = q.new_empty(batch, num_kv_heads, num_splits, queries, head_dim, dtype=torch.float32)
    lse = q.new_empty(batch, num_kv_heads, num_splits, queries, dtype=torch.float32)
    _paged_packed_decode_kernel[(batch * num_kv_heads, num_splits)](
        grouped,
        *memory_of(k),
        *memory_of(v),
        *(x.contiguous() for x in waiting),
        block_table,
        *visible.bounds(constants, batch, q.device),
        parts,
        lse,
        constants.scale_for(head_dim),
        num_kv_heads,
        num_blocks,
        split_len,
        *block_table.stride(),
        *grouped.stride(),
        TILE=tile_size,
        **query_blocks(queries, head_dim),
        **format_of(k, v),
        **how_to_multiply(q.device, head_dim),
        num_stages=1,  # the numbers are made in registers: there is nothing to fetch ahead into shared memory
    )
    return merge(parts, lse).to(q.dtype).view(batch, num_heads, 1, head_dim)


if triton is not None:

    @triton.jit(do_not_specialize=["num_blocks", "split_len", "table_row"])
    def _paged_packed_decode_kernel(
        q_ptr,
        k_codes_ptr,
        k_scale_ptr,
        v_codes_ptr,
        v_scale_ptr,
        waiting_k_ptr,
        waiting_v_ptr,
        table_ptr,
        first_ptr,
        end_ptr,
        parts_ptr,
        lse_ptr,
        scale,
        num_kv_heads,
        num_blocks,
        split_len,
        table_row,
        table_place,
        q_batch,
        q_head,
        q_query,
        q_dim,
        QUERIES: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        QUERY_BLOCK: tl.constexpr,
        DIM_BLOCK: tl.constexpr,
        TILE: tl.constexpr,
        GROUP: tl.constexpr,
        NBITS: tl.constexpr,
        MIDDLE: tl.constexpr,
        HAS_ZERO: tl.constexpr,
        ROW_BYTES: tl.constexpr,
        K_PER_CHANNEL: tl.constexpr,
        V_PER_CHANNEL: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """One row's KV head (program axis 0) over one part of the sequence (axis 1)."""
        row, head, dim, q, start, end, top, total, out = begin(
            q_ptr, first_ptr, end_ptr, num_kv_heads, split_len, q_batch, q_head, q_query, q_dim,
            QUERIES, HEAD_DIM, QUERY_BLOCK, DIM_BLOCK,
        )  # fmt: skip
        for first in range(start, end, TILE):
            token = first + tl.arange(0, TILE)
            seen = token < end
            wanted = seen[:, None] & (dim[None, :] < HEAD_DIM)
            entry = table_ptr + row * table_row + token // GROUP * table_place
            block = tl.load(entry, mask=seen, other=0).to(tl.int64)[:, None]
            place = (token % GROUP)[:, None].to(tl.int64)
            waits = block >= num_blocks
            tile = block * num_kv_heads + head
            packed = wanted & (block < num_blocks)
            k = numbers_in_tiles(
                k_codes_ptr, k_scale_ptr, tile, place, dim, packed,
                HEAD_DIM, GROUP, NBITS, MIDDLE, HAS_ZERO, ROW_BYTES, K_PER_CHANNEL,
            )  # fmt: skip
            v = numbers_in_tiles(
                v_codes_ptr, v_scale_ptr, tile, place, dim, packed,
                HEAD_DIM, GROUP, NBITS, MIDDLE, HAS_ZERO, ROW_BYTES, V_PER_CHANNEL,
            )  # fmt: skip
            at = ((tile - num_blocks * num_kv_heads) * GROUP + place) * HEAD_DIM + dim[None, :]
            open_k = tl.load(waiting_k_ptr + at, mask=wanted & waits, other=0.0).to(tl.float32)
            open_v = tl.load(waiting_v_ptr + at, mask=wanted & waits, other=0.0).to(tl.float32)
            k, v = tl.where(waits, open_k, k), tl.where(waits, open_v, v)

            top, total, out = blend(q, k, v, seen, scale, top, total, out, PRECISION)

        store_part(parts_ptr, lse_ptr, top, total, out, QUERIES, HEAD_DIM, QUERY_BLOCK, DIM_BLOCK)
