"""What kernels share that split the sequence: how a program begins, its step over some keys, its end, the merge.

Each part of the sequence gives an output and a log-sum-exp, and these are merged at the end (Flash-Decoding, as in
FlashAttention 2's split-KV kernel, arXiv:2307.08691).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS: the rest of labkit works without
    triton = None

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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


def split_sequence(kv_len: int, num_splits: int | None, block_size: int) -> tuple[int, int]:
    """How many parts there are, and how many tokens each has, in whole blocks; None for as many as `default_splits`."""
    num_splits = default_splits(kv_len) if num_splits is None else max(1, min(num_splits, kv_len))
    split_len = triton.cdiv(triton.cdiv(kv_len, num_splits), block_size) * block_size
    return triton.cdiv(kv_len, split_len), split_len


def default_splits(kv_len: int) -> int:
    """Parts of at least 256 tokens, 32 at most. A plain guess, not tuned on any GPU."""
    return max(1, min(32, kv_len // 256))


def how_to_multiply(device: torch.device, head_dim: int) -> dict[str, Any]:
    """PRECISION and warps of a program that multiplies float32.

    From NVIDIA's compute capability 8.0 on, tensor cores do it, as three tf32 products whose sum is as exact as
    float32's: on an H200, for K and V of 32,768 tokens with heads of 128, in 0.11 ms instead of 2.3. Without them, 4
    warps have too few registers for large heads.
    """
    if device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device) >= (8, 0):
        return {"PRECISION": "tf32x3", "num_warps": 4}
    return {"PRECISION": "ieee", "num_warps": 8 if head_dim > 64 else 4}


def query_blocks(queries: int, head_dim: int) -> dict[str, int]:
    """Sizes of a program's tile of queries: powers of 2, and 16 the least that tl.dot takes on a GPU."""
    return {
        "QUERIES": queries,
        "HEAD_DIM": head_dim,
        "QUERY_BLOCK": max(16, triton.next_power_of_2(queries)),
        "DIM_BLOCK": max(16, triton.next_power_of_2(head_dim)),
    }


def check_can_run(q: Tensor, block_size: int, twin: str) -> None:
    """ValueError for a block size that cannot be; RuntimeError where Triton cannot run. `twin` gives the same."""
    if block_size < 16 or block_size & (block_size - 1):
        raise ValueError(f"block_size must be a power of 2, at least 16; got {block_size}")
    if triton is None:
        raise RuntimeError(f"Triton is not installed here: use {twin}, which gives the same")
    if q.device.type != "cuda" and not is_interpreted():
        raise RuntimeError(f"on a CPU Triton needs TRITON_INTERPRET=1 set before Python starts; {twin} needs none")


def is_interpreted() -> bool:
    """Whether kernels were compiled for Triton's interpreter, which is decided when Triton is imported."""
    return not isinstance(blend, triton.JITFunction)


if triton is not None:

    @triton.jit
    def begin(
        q_ptr, first_ptr, end_ptr, num_kv_heads, split_len, q_batch, q_head, q_query, q_dim,
        QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, QUERY_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One row's KV head (program axis 0) over one part of the sequence (axis 1): its queries, from where to where
        it reads, and the running maximum, sum and output before anything is read."""
        row_head = tl.program_id(0).to(tl.int64)  # offsets into a large cache overflow 32 bits
        split = tl.program_id(1)
        row, head = row_head // num_kv_heads, row_head % num_kv_heads
        query, dim = tl.arange(0, QUERY_BLOCK), tl.arange(0, DIM_BLOCK)
        here = (query[:, None] < QUERIES) & (dim[None, :] < HEAD_DIM)
        q_at = q_ptr + row * q_batch + head * q_head + query[:, None] * q_query + dim[None, :] * q_dim
        q = tl.load(q_at, mask=here, other=0.0).to(tl.float32)
        start = tl.maximum(split * split_len, tl.load(first_ptr + row))  # padding is not read, nor what left the window
        end = tl.minimum((split + 1) * split_len, tl.load(end_ptr + row))
        top = tl.full([QUERY_BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([QUERY_BLOCK], tl.float32)
        out = tl.zeros([QUERY_BLOCK, DIM_BLOCK], tl.float32)
        return row, head, dim, q, start, end, top, total, out

    @triton.jit
    def blend(q, k, v, seen, scale, top, total, out, PRECISION: tl.constexpr):
        """The running maximum, sum and output of some queries after one more block of keys, all float32."""
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: keep exp(-inf) = 0
        shrink = tl.exp(top - safe_top)
        weights = tl.exp(scores - safe_top[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        out = out * shrink[:, None] + tl.dot(weights, v, input_precision=PRECISION)
        return new_top, total, out

    @triton.jit
    def store_part(
        parts_ptr, lse_ptr, top, total, out,
        QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, QUERY_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Write one part's output and log-sum-exp where `merge` expects them."""
        query, dim = tl.arange(0, QUERY_BLOCK), tl.arange(0, DIM_BLOCK)
        here = (query[:, None] < QUERIES) & (dim[None, :] < HEAD_DIM)
        some = tl.where(total == 0.0, 1.0, total)
        part = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * QUERIES + query
        tl.store(parts_ptr + part[:, None] * HEAD_DIM + dim[None, :], out / some[:, None], mask=here)
        tl.store(lse_ptr + part, top + tl.log(some), mask=query < QUERIES)
