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
from labkit.kernels.split import (
    DTYPES,
    LOG2_E,
    capability,
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


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    constants: Constants = PLAIN,
    visible: Visibility | None = None,
    **launch: int | None,
) -> Tensor:
    """softmax(q k^T * scale) v for one query per head: `[batch, num_heads, 1, head_dim]`, in q's dtype.

    q: `[batch, num_heads, 1, head_dim]`. k, v: `[batch, num_kv_heads, kv_len, head_dim]`, with any strides, such as
    the part in use of a preallocated buffer. float32, float16 or bfloat16; sums are kept in float32.
    constants: without a soft cap. visible: who may see whom, rows of different lengths and padding included; a row that
    sees nothing gives zeros. launch: keywords of `decode_between`, with None as it would choose.

    Raises ValueError when shapes, dtypes or sizes do not fit, RuntimeError where Triton cannot run.
    """
    check_inputs(q, k, v, constants)
    first, end = visible_to(q, k, visible).bounds(constants, len(q), q.device)
    return decode_between(q, k, v, first, end, constants, **launch)


def decode_between(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    end: Tensor,
    constants: Constants = PLAIN,
    *,
    block_size: int | None = None,
    num_splits: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> Tensor:
    """`decode_attention` of the keys from `first` up to `end`, int32 `[batch]` on the device: nothing waits for them.

    What is launched depends on the shapes alone, so that a CUDA graph of it serves every step over one buffer. The
    numbers in `first` and `end` are not looked at: `end` is at most `kv_len`.
    block_size: keys read at a time, a power of 2, at least 16. num_splits: parts of the sequence worked on in parallel.
    num_warps, num_stages: Triton's. By default what suits the device.
    """
    queries_per_kv = check_inputs(q, k, v, constants)
    batch, num_heads, _, head_dim = q.shape
    if any(x.shape != (batch,) or x.dtype != torch.int32 or x.device != q.device for x in (first, end)):
        raise ValueError(
            f"first and end are int32 [{batch}] on {q.device}; got {first.dtype} {list(first.shape)} on {first.device} "
            f"and {end.dtype} {list(end.shape)} on {end.device}"
        )
    check_can_run(q, "labkit.attention.attention", 16 if block_size is None else block_size)
    sizes = sizes_for(q.device, q.dtype, head_dim, block_size, num_warps, num_stages)
    grouped = q.reshape(batch, k.shape[1], queries_per_kv, head_dim)
    parts = split_sequence(k.shape[2], num_splits, sizes["BLOCK"], batch * k.shape[1], q.device)
    room = make_parts(grouped, parts[0], q.dtype)
    launch_dense(grouped, k, v, first, end, constants.scale_for(head_dim), room, 0, parts, sizes)
    return merged(*room, q.dtype).view(batch, num_heads, 1, head_dim)


def launch_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    end: Tensor,
    scale: float,
    room: tuple[Tensor, Tensor],
    first_part: int,
    parts: tuple[int, int],
    sizes: dict[str, int],
) -> None:
    """Write outputs and log-sum-exps of `parts`, how many and of how many tokens, into `room` from `first_part` on.

    q: `[batch, num_kv_heads, queries_per_kv, head_dim]`. room: as `make_parts` makes it.
    """
    batch, num_kv_heads, queries_per_kv, head_dim = q.shape
    _decode_kernel[(batch * num_kv_heads, parts[0])](
        q,
        k,
        v,
        first,
        end,
        *room,
        scale * LOG2_E,
        num_kv_heads,
        parts[1],
        first_part,
        room[1].shape[2],
        *q.stride(),
        *k.stride(),
        *v.stride(),
        **query_blocks(queries_per_kv, head_dim),
        **how_to_multiply(q.device, q.dtype if k.dtype == v.dtype == q.dtype else torch.float32),
        **sizes,
    )


def sizes_for(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    block_size: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> dict[str, int]:
    """Keys read at a time, warps, and blocks in flight, where a call does not say.

    K and V of the blocks in flight lie in shared memory: 72 KB of it for 16-bit heads of 128, of the 99 KB that the
    smallest GPU with asynchronous copies has, and 90 KB in float32. Older ones, with 64 KB, read one block at a time.
    """
    old, wide = capability(device) < (8, 0), dtype == torch.float32
    fits = max(16, min(64, (4096 if old else 8192) // triton.next_power_of_2(head_dim)))
    return {
        "BLOCK": fits if block_size is None else block_size,
        "num_warps": (8 if (old or wide) and head_dim > 64 else 4) if num_warps is None else num_warps,
        "num_stages": (2 if old or wide else 3) if num_stages is None else num_stages,
    }


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

    @triton.jit(do_not_specialize=["split_len", "first_part", "num_parts"])
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
        first_part,
        num_parts,
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
        at = (start + place).to(tl.int64)[:, None]
        k_at = k_ptr + row * k_batch + head * k_head + at * k_token + dim[None, :] * k_dim
        v_at = v_ptr + row * v_batch + head * v_head + at * v_token + dim[None, :] * v_dim
        for block in range(start, end, BLOCK):
            seen = block + place < end
            wanted = seen[:, None]
            if HEAD_DIM < DIM_BLOCK:
                wanted = wanted & (dim < HEAD_DIM)[None, :]
            k = tl.load(k_at, mask=wanted, other=0.0)
            v = tl.load(v_at, mask=wanted, other=0.0)
            k_at += BLOCK * k_token
            v_at += BLOCK * v_token
            top, total, out = blend(q, k, v, seen, scale, top, total, out, NATIVE, PRECISION, SHIFT)
        store_part(
            parts_ptr, lse_ptr, first_part, num_parts, top, total, out,
            QUERIES, HEAD_DIM, QUERY_BLOCK, DIM_BLOCK, SHIFT,
        )  # fmt: skip
