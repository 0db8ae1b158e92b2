"""Attention of one new token per row over a dense cache, as a Triton kernel.

Decoding reads all of K and V once per token and computes little with them, so the kernel is arranged around that read:
one program takes one row's one KV head, with all query heads that share it, and one part of the sequence. K and V are
read once, never expanded; the parts are merged by their log-sum-exps (Flash-Decoding, as in FlashAttention 2's
split-KV kernel, arXiv:2307.08691).

Its plain-PyTorch twin is `labkit.attention.attention`, which the tests hold it to. No cache calls it by itself: it is
chosen by calling it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from labkit.attention import check_mask, check_shapes

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS: the rest of labkit works without
    triton = None

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    padding: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    block_size: int = 64,
    num_splits: int | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v for one query per head: `[batch, num_heads, 1, head_dim]`, in q's dtype.

    q: `[batch, num_heads, 1, head_dim]`. k, v: `[batch, num_kv_heads, kv_len, head_dim]`, with any strides, such as
    the part in use of a preallocated buffer. float32, float16 or bfloat16; sums are kept in float32.
    padding: int `[batch]`, left padding of each row; a row that is all padding gives zeros.
    scale: default `head_dim ** -0.5`. window: keys the token sees, itself included.
    block_size: keys read at a time, a power of 2, at least 16. num_splits: parts of the sequence worked on in parallel.

    Raises ValueError when shapes, dtypes or sizes do not fit, RuntimeError where Triton cannot run.
    """
    queries_per_kv = check_inputs(q, k, v, padding, window, block_size)
    batch, num_heads, _, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    num_splits, split_len = split_sequence(kv_len, num_splits, block_size)

    grouped = q.reshape(batch, num_kv_heads, queries_per_kv, head_dim)
    shape = (batch, num_kv_heads, num_splits, queries_per_kv)
    parts = q.new_empty(*shape, head_dim, dtype=torch.float32)
    lse = q.new_empty(shape, dtype=torch.float32)
    first = first_seen(q, kv_len, padding, window)
    _decode_kernel[(batch * num_kv_heads, num_splits)](
        grouped,
        k,
        v,
        first,
        parts,
        lse,
        head_dim**-0.5 if scale is None else scale,
        num_kv_heads,
        kv_len,
        split_len,
        *grouped.stride(),
        *k.stride(),
        *v.stride(),
        QUERIES=queries_per_kv,
        HEAD_DIM=head_dim,
        QUERY_BLOCK=max(16, triton.next_power_of_2(queries_per_kv)),  # 16: the least that tl.dot takes on a GPU
        DIM_BLOCK=max(16, triton.next_power_of_2(head_dim)),
        BLOCK=block_size,
        **how_to_multiply(q.device, head_dim),
        num_stages=2,  # more would not fit the shared memory of smaller GPUs in float32
    )
    return merge(parts, lse).to(q.dtype).view(batch, num_heads, 1, head_dim)


def merge(parts: Tensor, lse: Tensor) -> Tensor:
    """The attention over all parts, `[batch, num_kv_heads, queries, head_dim]`, from what each part gave.

    parts: outputs, `[batch, num_kv_heads, num_splits, queries, head_dim]`. lse: log-sum-exps, without head_dim; -inf
    for a part in which a query saw no key. A query that saw none in any part gives zeros.
    """
    top = lse.amax(dim=2, keepdim=True)
    weights = torch.exp(lse - top.masked_fill(top == float("-inf"), 0.0))
    total = weights.sum(dim=2)
    out = (parts * weights[..., None]).sum(dim=2)
    return out / total.masked_fill(total == 0, 1.0)[..., None]


def first_seen(q: Tensor, kv_len: int, padding: Tensor | None, window: int | None) -> Tensor:
    """Position of the first key that the newest token of each row of `q` may see: int32 `[batch]`."""
    first = torch.zeros(q.shape[0], dtype=torch.int32, device=q.device) if padding is None else padding.int()
    return first if window is None else first.clamp(min=kv_len - window)


def split_sequence(kv_len: int, num_splits: int | None, block_size: int) -> tuple[int, int]:
    """How many parts there are, and how many tokens each has, in whole blocks; None for as many as `default_splits`."""
    num_splits = default_splits(kv_len) if num_splits is None else max(1, min(num_splits, kv_len))
    split_len = triton.cdiv(triton.cdiv(kv_len, num_splits), block_size) * block_size
    return triton.cdiv(kv_len, split_len), split_len


def how_to_multiply(device: torch.device, head_dim: int) -> dict[str, Any]:
    """PRECISION and warps of a program that multiplies float32.

    From NVIDIA's compute capability 8.0 on, tensor cores do it, as three tf32 products whose sum is as exact as
    float32's: on an H200, for K and V of 32,768 tokens with heads of 128, in 0.11 ms instead of 2.3. Without them, 4
    warps have too few registers for large heads.
    """
    if device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device) >= (8, 0):
        return {"PRECISION": "tf32x3", "num_warps": 4}
    return {"PRECISION": "ieee", "num_warps": 8 if head_dim > 64 else 4}


def default_splits(kv_len: int) -> int:
    """Parts of at least 256 tokens, 32 at most. A plain guess, not tuned on any GPU."""
    return max(1, min(32, kv_len // 256))


def check_inputs(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, window: int | None, block_size: int) -> int:
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
    check_mask(q.shape[0], padding, window)
    if block_size < 16 or block_size & (block_size - 1):
        raise ValueError(f"block_size must be a power of 2, at least 16; got {block_size}")
    check_can_run(q.device, "labkit.attention.attention")
    return queries_per_kv


def check_can_run(device: torch.device, twin: str) -> None:
    """RuntimeError where Triton cannot run; `twin`: what gives the same without it."""
    if triton is None:
        raise RuntimeError(f"Triton is not installed here: use {twin}, which gives the same")
    if device.type != "cuda" and not is_interpreted():
        raise RuntimeError(f"on a CPU Triton needs TRITON_INTERPRET=1 set before Python starts; {twin} needs none")


def is_interpreted() -> bool:
    """Whether the kernel was compiled for Triton's interpreter, which is decided when Triton is imported."""
    return not isinstance(_decode_kernel, triton.JITFunction)


if triton is not None:

    @triton.jit(do_not_specialize=["kv_len", "split_len"])
    def _decode_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        first_ptr,
        parts_ptr,
        lse_ptr,
        scale,
        num_kv_heads,
        kv_len,
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
        row_head = tl.program_id(0).to(tl.int64)  # offsets into a large cache overflow 32 bits
        split = tl.program_id(1)
        row, head = row_head // num_kv_heads, row_head % num_kv_heads
        query, dim = tl.arange(0, QUERY_BLOCK), tl.arange(0, DIM_BLOCK)
        here = (query[:, None] < QUERIES) & (dim[None, :] < HEAD_DIM)
        q_at = q_ptr + row * q_batch + head * q_head + query[:, None] * q_query + dim[None, :] * q_dim
        q = tl.load(q_at, mask=here, other=0.0).to(tl.float32)

        first = tl.load(first_ptr + row)
        end = tl.minimum((split + 1) * split_len, kv_len)
        start = tl.maximum(split * split_len, first)  # padding is not read
        top = tl.full([QUERY_BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([QUERY_BLOCK], tl.float32)
        out = tl.zeros([QUERY_BLOCK, DIM_BLOCK], tl.float32)
        for block in range(start, end, BLOCK):
            token = block + tl.arange(0, BLOCK)
            seen = (token >= first) & (token < end)
            wanted = seen[:, None] & (dim[None, :] < HEAD_DIM)
            at = token[:, None].to(tl.int64)
            k_at = k_ptr + row * k_batch + head * k_head + at * k_token + dim[None, :] * k_dim
            v_at = v_ptr + row * v_batch + head * v_head + at * v_token + dim[None, :] * v_dim
            k = tl.load(k_at, mask=wanted, other=0.0).to(tl.float32)
            v = tl.load(v_at, mask=wanted, other=0.0).to(tl.float32)

            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            scores = tl.where(seen[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: keep exp(-inf) = 0
            shrink = tl.exp(top - safe_top)
            weights = tl.exp(scores - safe_top[:, None])
            total = total * shrink + tl.sum(weights, axis=1)
            out = out * shrink[:, None] + tl.dot(weights, v, input_precision=PRECISION)
            top = new_top

        some = tl.where(total == 0.0, 1.0, total)
        part = (row_head * tl.num_programs(1) + split) * QUERIES + query
        tl.store(parts_ptr + part[:, None] * HEAD_DIM + dim[None, :], out / some[:, None], mask=here)
        tl.store(lse_ptr + part, top + tl.log(some), mask=query < QUERIES)
