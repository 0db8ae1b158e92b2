"""`paged_attention` of one new token per row as a Triton kernel, and the kernel that writes new K and V to their slots.

As in `decode_attention`, one program takes one row's one KV head, with all query heads that share it, and one part of
the sequence. What is new is one load: where a token lies is looked up in the block table.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from labkit.attention import PLAIN, Constants, Visibility
from labkit.kernels.paged_attention import check_paged
from labkit.kernels.split import DTYPES, check_can_run, how_to_multiply, merge, query_blocks, split_sequence

try:
    import triton
    import triton.language as tl

    from labkit.kernels.split import begin, blend, store_part
except ImportError:  # macOS: the rest of labkit works without
    triton = None


def paged_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    visible: Visibility,
    constants: Constants = PLAIN,
    *,
    tile_size: int = 64,
    num_splits: int | None = None,
) -> Tensor:
    """`paged_attention` of one new token per row; its twin's arguments, but for a soft cap.

    float32, float16 or bfloat16; sums are kept in float32. Blocks may have any size, K and V any strides. The table's
    numbers are not checked: each that is read must be a block.
    tile_size: keys read at a time, a power of 2, at least 16. num_splits: parts of the sequence worked on in parallel.
    Raises ValueError when shapes, dtypes or sizes do not fit, RuntimeError where Triton cannot run. It has no backward
    pass.
    """
    if has_torch_function((q,)):
        return handle_torch_function(
            paged_decode_attention, (q,), q, k, v, block_table, visible, constants, tile_size=tile_size,
            num_splits=num_splits,
        )  # fmt: skip
    queries_per_kv = check_paged(q, k, v, block_table, visible)
    if q.shape[2] != 1:
        raise ValueError(f"paged_decode_attention takes one new token; got {q.shape[2]}. paged_attention takes any")
    if q.dtype not in DTYPES:
        raise ValueError(f"q must be float32, float16 or bfloat16; got {q.dtype}")
    if constants.soft_cap is not None or not constants.causal:
        raise ValueError(f"the kernel has no soft cap and is causal; got {constants}. paged_attention takes all")
    check_can_run(q, tile_size, "paged_attention")
    batch, num_heads, _, head_dim = q.shape
    block_size, num_kv_heads = k.shape[1:3]
    first, end = visible.bounds(constants, batch, q.device)
    num_splits, split_len = split_sequence(visible.kv_len, num_splits, tile_size)

    grouped = q.reshape(batch, num_kv_heads, queries_per_kv, head_dim)
    shape = (batch, num_kv_heads, num_splits, queries_per_kv)
    parts = q.new_empty(*shape, head_dim, dtype=torch.float32)
    lse = q.new_empty(shape, dtype=torch.float32)
    _paged_decode_kernel[(batch * num_kv_heads, num_splits)](
        grouped,
        k,
        v,
        block_table,
        first,
        end,
        parts,
        lse,
        constants.scale_for(head_dim),
        num_kv_heads,
        split_len,
        *block_table.stride(),
        *grouped.stride(),
        *k.stride(),
        *v.stride(),
        BLOCK_SIZE=block_size,
        TILE=tile_size,
        **query_blocks(queries_per_kv, head_dim),
        **how_to_multiply(q.device, head_dim),
        num_stages=2,  # more would not fit the shared memory of smaller GPUs in float32
    )
    return merge(parts, lse).to(q.dtype).view(batch, num_heads, 1, head_dim)


def paged_store(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """`paged_attention.store` as one kernel: new K and V, of any strides, each token's to its slot.

    Raises ValueError when sizes or dtypes do not fit or the blocks are not contiguous, RuntimeError where Triton cannot
    run.
    """
    batch, num_kv_heads, new_tokens, head_dim = k.shape
    if k.shape != v.shape or keys.shape != values.shape or keys.shape[2:] != (num_kv_heads, head_dim):
        raise ValueError(
            f"K {list(k.shape)} and V {list(v.shape)} do not fit blocks {list(keys.shape)} and {list(values.shape)}"
        )
    if len({x.dtype for x in (k, v, keys, values)}) > 1 or not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("new K and V and their blocks have one dtype, and the blocks are contiguous")
    if slots.shape != (batch * new_tokens,):
        raise ValueError(f"{batch * new_tokens} new tokens need as many slots; got {list(slots.shape)}")
    check_can_run(k, 16, "paged_attention.store")
    _store_kernel[(batch * new_tokens,)](
        k,
        v,
        keys,
        values,
        slots,
        new_tokens,
        *k.stride(),
        *v.stride(),
        HEAD_DIM=head_dim,
        NUMBERS=num_kv_heads * head_dim,
        BLOCK=triton.next_power_of_2(num_kv_heads * head_dim),
    )


if triton is not None:

    @triton.jit(do_not_specialize=["split_len", "table_row"])
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
        TILE: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """One row's KV head (program axis 0) over one part of the sequence (axis 1)."""
        row, head, dim, q, start, end, top, total, out = begin(
            q_ptr, first_ptr, end_ptr, num_kv_heads, split_len, q_batch, q_head, q_query, q_dim,
            QUERIES, HEAD_DIM, QUERY_BLOCK, DIM_BLOCK,
        )  # fmt: skip
        for tile in range(start, end, TILE):
            token = tile + tl.arange(0, TILE)
            seen = token < end
            wanted = seen[:, None] & (dim[None, :] < HEAD_DIM)
            entry = table_ptr + row * table_row + token // BLOCK_SIZE * table_place
            block = tl.load(entry, mask=seen, other=0).to(tl.int64)[:, None]
            at = (token % BLOCK_SIZE)[:, None]
            k_at = k_ptr + block * k_block + at * k_token + head * k_head + dim[None, :] * k_dim
            v_at = v_ptr + block * v_block + at * v_token + head * v_head + dim[None, :] * v_dim
            k = tl.load(k_at, mask=wanted, other=0.0).to(tl.float32)
            v = tl.load(v_at, mask=wanted, other=0.0).to(tl.float32)

            top, total, out = blend(q, k, v, seen, scale, top, total, out, PRECISION)

        store_part(parts_ptr, lse_ptr, top, total, out, QUERIES, HEAD_DIM, QUERY_BLOCK, DIM_BLOCK)

    @triton.jit(do_not_specialize=["new_tokens"])
    def _store_kernel(
        k_ptr,
        v_ptr,
        keys_ptr,
        values_ptr,
        slots_ptr,
        new_tokens,
        k_batch,
        k_head,
        k_token,
        k_dim,
        v_batch,
        v_head,
        v_token,
        v_dim,
        HEAD_DIM: tl.constexpr,
        NUMBERS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One token: K and V of all its heads, which lie side by side in a slot."""
        token = tl.program_id(0).to(tl.int64)
        row, place = token // new_tokens, token % new_tokens
        number = tl.arange(0, BLOCK)
        head, dim, here = number // HEAD_DIM, number % HEAD_DIM, number < NUMBERS
        to = tl.load(slots_ptr + token).to(tl.int64) * NUMBERS + number
        k = tl.load(k_ptr + row * k_batch + head * k_head + place * k_token + dim * k_dim, mask=here)
        v = tl.load(v_ptr + row * v_batch + head * v_head + place * v_token + dim * v_dim, mask=here)
        tl.store(keys_ptr + to, k, mask=here)
        tl.store(values_ptr + to, v, mask=here)
