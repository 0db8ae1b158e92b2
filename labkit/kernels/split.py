"""What kernels share that split the sequence: how a program begins, its step over some keys, its end, the merge.

Each part of the sequence gives an output and a log-sum-exp, and these are merged at the end (Flash-Decoding, as in
FlashAttention 2's split-KV kernel, arXiv:2307.08691). Where there is one part, it writes the answer itself.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS: the rest of labkit works without
    triton = None

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEAST_PART = 64
"""Tokens for which a part is worth it: its output is written and read again, 2 KB of float32 for four heads of 128."""
LOG2_E = math.log2(math.e)


def merge(parts: Tensor, lse: Tensor) -> Tensor:
    """The attention over all parts, `[batch, num_kv_heads, queries, head_dim]`, from what each part gave.

    parts: outputs, `[batch, num_kv_heads, num_parts, queries, head_dim]`. lse: log-sum-exps, without head_dim; -inf
    for a part in which a query saw no key. A query that saw none in any part gives zeros. `merged` is the same as a
    kernel.
    """
    top = lse.amax(dim=2, keepdim=True)
    weights = torch.exp(lse - top.masked_fill(top == float("-inf"), 0.0))
    total = weights.sum(dim=2)
    out = (parts * weights[..., None]).sum(dim=2)
    return out / total.masked_fill(total == 0, 1.0)[..., None]


def make_parts(q: Tensor, num_parts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Memory for the outputs and log-sum-exps of parts, shaped as `merge` takes them.

    q: `[batch, num_kv_heads, queries, head_dim]`. dtype: of the answer, in which a single part is kept.
    """
    batch, num_kv_heads, queries, head_dim = q.shape
    shape = batch, num_kv_heads, num_parts, queries
    parts = q.new_empty(*shape, head_dim, dtype=torch.float32 if num_parts > 1 else dtype)
    return parts, q.new_empty(shape, dtype=torch.float32)


def merged(parts: Tensor, lse: Tensor, dtype: torch.dtype) -> Tensor:
    """`merge` as a kernel, with one rounding to `dtype`; a single part is the answer already."""
    batch, num_kv_heads, num_parts, queries, head_dim = parts.shape
    if num_parts == 1:
        return parts.squeeze(2)
    out = parts.new_empty(batch, num_kv_heads, queries, head_dim, dtype=dtype)
    _merge_kernel[(batch * num_kv_heads, queries)](
        parts,
        lse,
        out,
        num_parts,
        QUERIES=queries,
        HEAD_DIM=head_dim,
        DIM_BLOCK=triton.next_power_of_2(head_dim),
        AT_ONCE=16,
        num_warps=4,
    )
    return out


def split_sequence(
    kv_len: int, num_splits: int | None, block_size: int, pairs: int, device: torch.device, programs: int = 1
) -> tuple[int, int]:
    """How many parts there are, and how many tokens each has, in whole blocks; None for as many as `default_splits`.

    pairs: rows times KV heads, each of which is split so. programs: how many there shall be per multiprocessor.
    Raises ValueError for a number of parts that cannot be.
    """
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits is a number of parts, at least 1; got {num_splits}")
    num_splits = (
        default_splits(kv_len, pairs, device, programs) if num_splits is None else max(1, min(num_splits, kv_len))
    )
    split_len = triton.cdiv(triton.cdiv(kv_len, num_splits), block_size) * block_size
    split_len = max(split_len, block_size)  # of no tokens there is no part
    return triton.cdiv(kv_len, split_len), split_len


def default_splits(kv_len: int, pairs: int, device: torch.device, programs: int = 1) -> int:
    """Parts for `programs` per multiprocessor, of about 64 tokens each or more.

    One that reads K and V of 16 bits keeps enough blocks in flight to have a multiprocessor to itself: on an H100, for
    32,768 tokens of 8 KV heads of 128, 16 parts take 51 us, 33 take 53, 66 take 66.
    """
    return max(1, min(programs * multiprocessors(device) // max(1, pairs), kv_len // LEAST_PART))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 where the interpreter runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """NVIDIA's compute capability; (0, 0) for other GPUs, for CPUs, and wherever the interpreter runs."""
    if device.type != "cuda" or not torch.version.cuda or is_interpreted():
        return 0, 0
    return torch.cuda.get_device_capability(device)


def how_to_multiply(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """How a program multiplies numbers of `dtype`: NATIVE, or as float32 with PRECISION; SHIFT of the weights.

    From compute capability 8.0 on tensor cores multiply 16-bit numbers exactly and add in float32, and they multiply
    float32, as three tf32 products whose sum is as exact as float32's.
    The weights of a softmax, at most 1, are rounded to the dtype of V as in FlashAttention; float16, whose smallest
    numbers are not small, gets them times 2**SHIFT.
    """
    cores = capability(device) >= (8, 0)
    native = cores and dtype != torch.float32
    return {
        "NATIVE": native,
        "PRECISION": "tf32x3" if cores else "ieee",
        "SHIFT": 8.0 if native and dtype == torch.float16 else 0.0,
    }


def query_blocks(queries: int, head_dim: int) -> dict[str, int]:
    """Sizes of a program's tile of queries: powers of 2, and 16 the least that tl.dot takes on a GPU."""
    return {
        "QUERIES": queries,
        "HEAD_DIM": head_dim,
        "QUERY_BLOCK": max(16, triton.next_power_of_2(queries)),
        "DIM_BLOCK": max(16, triton.next_power_of_2(head_dim)),
    }


def check_can_run(q: Tensor, twin: str, block_size: int = 16) -> None:
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
    LN_2 = tl.constexpr(math.log(2.0))

    @triton.jit
    def reach(first_ptr, end_ptr, num_kv_heads, split_len):
        """A program's row and KV head (program axis 0), and the tokens of its part of the sequence (axis 1).

        What is not read: padding, and what left the window.
        """
        row_head = tl.program_id(0).to(tl.int64)  # offsets into a large cache overflow 32 bits
        split = tl.program_id(1)
        row, head = row_head // num_kv_heads, row_head % num_kv_heads
        start = tl.maximum(split * split_len, tl.load(first_ptr + row))
        end = tl.minimum((split + 1) * split_len, tl.load(end_ptr + row))
        return row, head, start, end

    @triton.jit
    def load_queries(
        q_ptr, row, head, dim, wanted, q_batch, q_head, q_query, q_dim,
        QUERIES: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    ):  # fmt: skip
        """The queries of one row's KV head, `[QUERY_BLOCK, dims]`; zeros below the last."""
        query = tl.arange(0, QUERY_BLOCK)
        here = (query[:, None] < QUERIES) & wanted[None, :]
        q_at = q_ptr + row * q_batch + head * q_head + query[:, None] * q_query + dim[None, :] * q_dim
        return tl.load(q_at, mask=here, other=0.0)

    @triton.jit
    def weigh(scores, seen, top, total, SHIFT: tl.constexpr):
        """Weights of some more keys, by how much what was summed before shrinks, the running maximum and the sums.

        Scores are logarithms to base 2. The sums, `[queries, keys]`, are one per key of a block, added up at the end.
        """
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: keep exp(-inf) = 0
        shrink = tl.exp2(top - safe_top)
        weights = tl.exp2(scores - (safe_top - SHIFT)[:, None])
        return weights, shrink, new_top, total * shrink[:, None] + weights

    @triton.jit
    def blend(
        q, k, v, seen, scale, top, total, out,
        NATIVE: tl.constexpr, PRECISION: tl.constexpr, SHIFT: tl.constexpr,
    ):  # fmt: skip
        """The running maximum, sum and output of some queries after one more block of keys; scale is to base 2."""
        if NATIVE:
            scores = tl.dot(q, tl.trans(k)) * scale
            weights, shrink, top, total = weigh(scores, seen, top, total, SHIFT)
            out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None])
        else:
            k, v = k.to(tl.float32), v.to(tl.float32)
            scores = tl.dot(q.to(tl.float32), tl.trans(k), input_precision=PRECISION) * scale
            weights, shrink, top, total = weigh(scores, seen, top, total, SHIFT)
            out = tl.dot(weights, v, out * shrink[:, None], input_precision=PRECISION)
        return top, total, out

    @triton.jit
    def part_of(first_part, num_parts, QUERIES: tl.constexpr, QUERY_BLOCK: tl.constexpr):
        """Where a program's part lies among all, by query: the first of its splits is part `first_part`."""
        part = tl.program_id(0).to(tl.int64) * num_parts + first_part + tl.program_id(1)
        return part * QUERIES + tl.arange(0, QUERY_BLOCK)

    @triton.jit
    def store_lse(lse_ptr, at, top, total, QUERIES: tl.constexpr, QUERY_BLOCK: tl.constexpr, SHIFT: tl.constexpr):
        """Write the log-sum-exps where `merge` expects them; returns what outputs are divided by."""
        total = tl.sum(total, axis=1)
        some = tl.where(total == 0.0, 1.0, total)
        tl.store(lse_ptr + at, (top - SHIFT + tl.log2(some)) * LN_2, mask=tl.arange(0, QUERY_BLOCK) < QUERIES)
        return some

    @triton.jit
    def store_part(
        parts_ptr, lse_ptr, first_part, num_parts, top, total, out,
        QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, QUERY_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr,
        SHIFT: tl.constexpr,
    ):  # fmt: skip
        """Write one part's output and log-sum-exp where `merge` expects them."""
        query, dim = tl.arange(0, QUERY_BLOCK), tl.arange(0, DIM_BLOCK)
        at = part_of(first_part, num_parts, QUERIES, QUERY_BLOCK)
        some = store_lse(lse_ptr, at, top, total, QUERIES, QUERY_BLOCK, SHIFT)
        here = (query[:, None] < QUERIES) & (dim[None, :] < HEAD_DIM)
        tl.store(parts_ptr + at[:, None] * HEAD_DIM + dim[None, :], out / some[:, None], mask=here)

    @triton.jit(do_not_specialize=["num_parts"])
    def _merge_kernel(
        parts_ptr, lse_ptr, out_ptr, num_parts,
        QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
    ):  # fmt: skip
        """All parts of one query (program axis 1) of one row's KV head (axis 0), `AT_ONCE` at a time."""
        pair, query = tl.program_id(0).to(tl.int64), tl.program_id(1)
        dim = tl.arange(0, DIM_BLOCK)
        top = tl.full([1], float("-inf"), tl.float32)
        total = tl.zeros([1], tl.float32)
        out = tl.zeros([DIM_BLOCK], tl.float32)
        for first in range(0, num_parts, AT_ONCE):
            part = first + tl.arange(0, AT_ONCE)
            at = (pair * num_parts + part) * QUERIES + query
            lse = tl.load(lse_ptr + at, mask=part < num_parts, other=float("-inf"))
            wanted = (part < num_parts)[:, None] & (dim < HEAD_DIM)[None, :]
            outs = tl.load(parts_ptr + at[:, None] * HEAD_DIM + dim[None, :], mask=wanted, other=0.0)
            new_top = tl.maximum(top, tl.max(lse, axis=0))
            safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
            shrink, weights = tl.exp(top - safe_top), tl.exp(lse - safe_top)
            total = total * shrink + tl.sum(weights, axis=0)
            out = out * shrink + tl.sum(outs * weights[:, None], axis=0)
            top = new_top
        out = out / tl.where(total == 0.0, 1.0, total)
        tl.store(out_ptr + (pair * QUERIES + query) * HEAD_DIM + dim, out, mask=dim < HEAD_DIM)
