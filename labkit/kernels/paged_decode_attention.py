"""`paged_attention` of one new token per row as a Triton kernel.

As in `decode_attention`, one program takes one row's one KV head, with all query heads that share it, and one part of
the sequence. What is new is one load: where a token lies is looked up in the block table.
"""

from __future__ import annotations

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from labkit.attention import PLAIN, Constants, Visibility
from labkit.kernels.decode_attention import sizes_for
from labkit.kernels.paged_attention import check_paged
from labkit.kernels.split import (
    DTYPES,
    LOG2_E,
    check_can_run,
    how_to_multiply,
    make_parts,
    merged,
    query_blocks,
    split_sequence,
)

try:
    import triton
    import triton.language as tl

    from labkit.kernels.split import blend, load_queries, reach, store_part
except ImportError:  # macOS: the rest of labkit works without
    triton = None


PROGRAMS = 5
"""Programs per multiprocessor, three of which run at a time: one waits for its block table while others read. On an
H100, for 16 rows of 32,768 tokens, 5 take 0.72 ms, one takes 0.96."""


def paged_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    visible: Visibility,
    constants: Constants = PLAIN,
    *,
    tile_size: int | None = None,
    num_splits: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> Tensor:
    """`paged_attention` of one new token per row; its twin's arguments, but for a soft cap.

    float32, float16 or bfloat16; sums are kept in float32. Blocks may have any size, K and V any strides. The table's
    numbers are not checked: each that is read must be a block.
    tile_size: keys read at a time, a power of 2, at least 16. num_splits: parts of the sequence worked on in parallel.
    num_warps, num_stages: Triton's. By default what suits the device. Raises ValueError when shapes, dtypes or sizes do
    not fit, RuntimeError where Triton cannot run. It has no backward pass.
    """
    if has_torch_function((q,)):
        return handle_torch_function(
            paged_decode_attention, (q,), q, k, v, block_table, visible, constants, tile_size=tile_size,
            num_splits=num_splits, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    queries_per_kv = check_paged(q, k, v, block_table, visible)
    if q.shape[2] != 1:
        raise ValueError(f"paged_decode_attention takes one new token; got {q.shape[2]}. paged_attention takes any")
    if q.dtype not in DTYPES:
        raise ValueError(f"q must be float32, float16 or bfloat16; got {q.dtype}")
    if constants.soft_cap is not None or not constants.causal:
        raise ValueError(f"the kernel has no soft cap and is causal; got {constants}. paged_attention takes all")
    check_can_run(q, "paged_attention", 16 if tile_size is None else tile_size)
    batch, num_heads, _, head_dim = q.shape
    block_size, num_kv_heads = k.shape[1:3]
    first, end = visible.bounds(constants, batch, q.device)
    sizes = sizes_for(q.device, q.dtype, head_dim, tile_size, num_warps, num_stages)
    parts = split_sequence(visible.kv_len, num_splits, sizes["BLOCK"], batch * num_kv_heads, q.device, PROGRAMS)
    grouped = q.reshape(batch, num_kv_heads, queries_per_kv, head_dim)
    room = make_parts(grouped, parts[0], q.dtype)
    _paged_decode_kernel[(batch * num_kv_heads, parts[0])](
        grouped,
        k,
        v,
        block_table,
        first,
        end,
        *room,
        constants.scale_for(head_dim) * LOG2_E,
        num_kv_heads,
        parts[1],
        parts[0],
        *block_table.stride(),
        *grouped.stride(),
        *k.stride(),
        *v.stride(),
        BLOCK_SIZE=block_size,
        **query_blocks(queries_per_kv, head_dim),
        **how_to_multiply(q.device, q.dtype),
        **sizes,
    )
    return merged(*room, q.dtype).view(batch, num_heads, 1, head_dim)


if triton is not None:

    @triton.jit(do_not_specialize=["split_len", "num_parts", "table_row"])
    def _paged_decode_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        table_ptr,
        first_ptr,
        end_ptr,
        parts_ptr,
        lse_ptr,
        scale,
        num_kv_heads,
        split_len,
        num_parts,
        table_row,
        table_place,
        q_batch,
        q_head,
        q_query,
        q_dim,
        k_block,
        k_token,
        k_head,
        k_dim,
        v_block,
        v_token,
        v_head,
        v_dim,
        QUERIES: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        QUERY_BLOCK: tl.constexpr,
        DIM_BLOCK: tl.constexpr,
        BLOCK_SIZE: tl.constexpr,
        BLOCK: tl.constexpr,
        NATIVE: tl.constexpr,
        PRECISION: tl.constexpr,
        SHIFT: tl.constexpr,
    ):
        """One row's KV head (program axis 0) over one part of the sequence (axis 1)."""
        row, head, start, end = reach(first_ptr, end_ptr, num_kv_heads, split_len)
        dim = tl.arange(0, DIM_BLOCK)
        q = load_queries(q_ptr, row, head, dim, dim < HEAD_DIM, q_batch, q_head, q_query, q_dim, QUERIES, QUERY_BLOCK)
        top = tl.full([QUERY_BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([QUERY_BLOCK, BLOCK], tl.float32)
        out = tl.zeros([QUERY_BLOCK, DIM_BLOCK], tl.float32)
        place = tl.arange(0, BLOCK)
        table = table_ptr + row * table_row
        k_head_at = k_ptr + head * k_head + dim[None, :] * k_dim
        v_head_at = v_ptr + head * v_head + dim[None, :] * v_dim
        for tile in range(start, end, BLOCK):
            token = tile + place
            seen = token < end
            wanted = seen[:, None]
            if HEAD_DIM < DIM_BLOCK:
                wanted = wanted & (dim < HEAD_DIM)[None, :]
            block = tl.load(table + token // BLOCK_SIZE * table_place, mask=seen, other=0).to(tl.int64)
            at = token % BLOCK_SIZE
            k = tl.load(k_head_at + (block * k_block + at * k_token)[:, None], mask=wanted, other=0.0)
            v = tl.load(v_head_at + (block * v_block + at * v_token)[:, None], mask=wanted, other=0.0)
            top, total, out = blend(q, k, v, seen, scale, top, total, out, NATIVE, PRECISION, SHIFT)
        store_part(
            parts_ptr, lse_ptr, 0, num_parts, top, total, out,
            QUERIES, HEAD_DIM, QUERY_BLOCK, DIM_BLOCK, SHIFT,
        )  # fmt: skip
