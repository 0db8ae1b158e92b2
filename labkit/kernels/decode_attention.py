"""Attention of one new token per row over a dense cache, as a Triton kernel.

Decoding reads all of K and V once per token and computes little with them, so the kernel is arranged around that read:
one program takes one row's one KV head, with all query heads that share it, and one part of the sequence. K and V are
read once, never expanded.

Its plain-PyTorch twin is `labkit.attention.attention`, which the tests hold it to. No cache calls it by itself: it is
chosen by calling it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from labkit.attention import PLAIN, Constants, Visibility, check_shapes, visible_to
from labkit.kernels.split import DTYPES, check_can_run, how_to_multiply, merge, query_blocks, split_sequence

try:
    import triton
    import triton.language as tl

    from labkit.kernels.split import begin, blend, store_part
except ImportError:  # macOS: the rest of labkit works without
    triton = None


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    constants: Constants = PLAIN,
    visible: Visibility | None = None,
    *,
    block_size: int = 64,
    num_splits: int | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v for one query per head: `[batch, num_heads, 1, head_dim]`, in q's dtype.

    q: `[batch, num_heads, 1, head_dim]`. k, v: `[batch, num_kv_heads, kv_len, head_dim]`, with any strides, such as
    the part in use of a preallocated buffer. float32, float16 or bfloat16; sums are kept in float32.
    constants: without a soft cap. visible: who may see whom, rows of different lengths and padding included; a row that
    sees nothing gives zeros.
    block_size: keys read at a time, a power of 2, at least 16. num_splits: parts of the sequence worked on in parallel.

    Raises ValueError when shapes, dtypes or sizes do not fit, RuntimeError where Triton cannot run.
    """
    queries_per_kv = check_inputs(q, k, v, constants)
    check_can_run(q, block_size, "labkit.attention.attention")
    batch, num_heads, _, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    first, end = visible_to(q, k, visible).bounds(constants, batch, q.device)
    num_splits, split_len = split_sequence(kv_len, num_splits, block_size)

    grouped = q.reshape(batch, num_kv_heads, queries_per_kv, head_dim)
    shape = (batch, num_kv_heads, num_splits, queries_per_kv)
    parts = q.new_empty(*shape, head_dim, dtype=torch.float32)
    lse = q.new_empty(shape, dtype=torch.float32)
    _decode_kernel[(batch * num_kv_heads, num_splits)](
        grouped,
        k,
        v,
        first,
        end,
        parts,
        lse,
        constants.scale_for(head_dim),
        num_kv_heads,
        split_len,
        *grouped.stride(),
        *k.stride(),
        *v.stride(),
        BLOCK=block_size,
        **query_blocks(queries_per_kv, head_dim),
        **how_to_multiply(q.device, head_dim),
        num_stages=2,  # more would not fit the shared memory of smaller GPUs in float32
    )
    return merge(parts, lse).to(q.dtype).view(batch, num_heads, 1, head_dim)


def check_inputs(q: Tensor, k: Tensor, v: Tensor, constants: Constants) -> int:
    """`num_queries_per_kv` of a call, or the error that says what does not fit."""
    queries_per_kv = check_shapes(q, k, v)
    if q.shape[2] != 1:
        raise ValueError(
            f"decode_attention takes one new token; got {q.shape[2]}. For more use attention.fused_attention"
        )
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"q, k and v must share one dtype of float32, float16, bfloat16; got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if constants.soft_cap is not None or not constants.causal:
        raise ValueError(f"the kernel has no soft cap and is causal; got {constants}. Use attention.fused_attention")
    return queries_per_kv


if triton is not None:

    @triton.jit(do_not_specialize=["split_len"])
    def _decode_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
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
        k_batch,
        k_head,
        k_token,
        k_dim,
        v_batch,
        v_head,
        v_token,
        v_dim,
        QUERIES: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        QUERY_BLOCK: tl.constexpr,
        DIM_BLOCK: tl.constexpr,
        BLOCK: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """One row's KV head (program axis 0) over one part of the sequence (axis 1)."""
        row, head, dim, q, start, end, top, total, out = begin(
            q_ptr, first_ptr, end_ptr, num_kv_heads, split_len, q_batch, q_head, q_query, q_dim,
            QUERIES, HEAD_DIM, QUERY_BLOCK, DIM_BLOCK,
        )  # fmt: skip
        for block in range(start, end, BLOCK):
            token = block + tl.arange(0, BLOCK)
            seen = token < end
            wanted = seen[:, None] & (dim[None, :] < HEAD_DIM)
            at = token[:, None].to(tl.int64)
            k_at = k_ptr + row * k_batch + head * k_head + at * k_token + dim[None, :] * k_dim
            v_at = v_ptr + row * v_batch + head * v_head + at * v_token + dim[None, :] * v_dim
            k = tl.load(k_at, mask=wanted, other=0.0).to(tl.float32)
            v = tl.load(v_at, mask=wanted, other=0.0).to(tl.float32)

            top, total, out = blend(q, k, v, seen, scale, top, total, out, PRECISION)

        store_part(parts_ptr, lse_ptr, top, total, out, QUERIES, HEAD_DIM, QUERY_BLOCK, DIM_BLOCK)
