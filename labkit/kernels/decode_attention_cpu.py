"""`decode_attention` for a CPU: one new token per row over dense K and V, in loops that Numba compiles when needed.

PyTorch's fused attention computes with tiles of queries, and one new token has no tile: it then reaches about half the
speed at which memory gives K and V. Here a KV head's keys are read once for all its queries, some tokens at a time, so
that they stay in the core's fastest caches until every query has had them.

Tokens are answered in parts, each with a softmax of its own, and merged by their sums (as in Flash-Decoding,
arXiv:2311.01282). A part begins at a multiple of `PART`, whatever else is in the batch and however many threads there
are: so neither changes a bit of a row's numbers.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable

import numpy as np
import torch
from numba import prange
from numpy import float32
from torch import Tensor

from labkit.attention import PLAIN, Constants, Visibility, check_shapes, visible_to
from labkit.kernels import threads
from labkit.kernels.matvec_cpu import DTYPES
from labkit.kernels.packed_attention import wants_gradient
from labkit.kernels.packed_attention_cpu import _merged, _powers, compiled
from labkit.kernels.threads import shared_out
from labkit.kernels.vectors import LANES, blend_rows, score_rows

PART = 256  # tokens to a part; a multiple of TILE
TILE = 32  # tokens that all queries of a KV head have in turn: 8 KiB of float32 keys of 64

_score_floats, _score_halves = score_rows(False), score_rows(True)
_blend_floats, _blend_halves = blend_rows(False), blend_rows(True)


def takes(q: Tensor, k: Tensor, v: Tensor, constants: Constants, visible: Visibility) -> bool:
    """Whether these loops answer: one new token per row on a CPU, each seeing one stretch of keys, no gradient wanted.

    In float32 or bfloat16, of a head_dim of whole vectors, without a soft cap, and as `threads.takes` says.
    """
    return (
        q.shape[2] == 1
        and q.dtype in DTYPES
        and q.dtype == k.dtype == v.dtype
        and q.shape[3] % LANES == 0
        and constants.soft_cap is None
        and constants.causal
        and visible.key_position is None
        and k.stride(3) == v.stride(3) == 1
        and threads.takes(q, k, v)
        and not wants_gradient(q, k, v)
    )


def decode_attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, constants: Constants = PLAIN, visible: Visibility | None = None
) -> Tensor:
    """`fused_attention` of one new token per row where `takes` says so; its arguments, its shapes.

    It takes the threads that PyTorch does (`torch.set_num_threads`). Sums are kept in float32. It has no backward pass.
    Raises ValueError when shapes do not fit, or `takes` says no.
    """
    queries, visible = check_shapes(q, k, v), visible_to(q, k, visible)
    if not takes(q, k, v, constants, visible):
        raise ValueError(
            f"decode_attention_cpu takes one new token on a CPU, float32 or bfloat16, head_dim a multiple of {LANES}, "
            f"no soft cap and no gradients; got q {list(q.shape)}, {q.dtype} on {q.device}, {constants}. "
            f"fused_attention takes all of these"
        )
    batch, _, _, head_dim = q.shape
    heads, kv_len = k.shape[1], k.shape[2]
    rows = q.detach().float().contiguous().numpy().reshape(batch * heads, queries, head_dim)
    rows = rows * float32(constants.scale_for(head_dim))
    first, stop = (x.numpy() for x in visible.bounds(constants, batch, "cpu"))
    parts = max(1, -(-kv_len // PART))
    blended = np.zeros((parts, *rows.shape), np.float32)
    sums = np.empty((parts, *rows.shape[:2], 2), np.float32)
    lying = tuple(number * x.element_size() for x in (k, v) for number in x.stride()[:3])
    loops = warm_up()
    threads.as_torch()
    out = loops(
        rows, k.data_ptr(), v.data_ptr(), lying, k.dtype == torch.bfloat16, heads, kv_len, first, stop, blended, sums
    )
    return torch.from_numpy(out).to(q.dtype).view(q.shape)


LOCK = threading.Lock()


def warm_up() -> Callable[..., np.ndarray]:
    """The compiled loops, one set for both dtypes and all shapes: some seconds when a process first calls it.

    Call it before timing a step. On a terminal it says that it compiles.
    """
    with LOCK:
        return _compiled()


@functools.cache
def _compiled() -> Callable[..., np.ndarray]:
    if sys.stderr is not None and sys.stderr.isatty():
        print("compiling the loops for attention (some seconds, once per process)", file=sys.stderr)
    row, room = np.zeros((1, 1, LANES), np.float32), np.zeros((1, 1, 1, LANES), np.float32)
    bounds = np.zeros(1, np.int32)
    _attend(row, 0, 0, (0,) * 6, False, 1, 1, bounds, bounds, room, np.zeros((1, 1, 1, 2), np.float32))
    return _attend


@shared_out
def _attend(rows, k, v, lying, halves, heads, kv_len, firsts, stops, blended, sums):
    """softmax(rows k^T) v, float32 `[batch * heads, queries, head_dim]`; zeros where no key is seen.

    k, v: addresses. lying: bytes from one row, KV head and token to the next, of k and of v. blended, sums: room for
    what each part gives.
    """
    count = rows.shape[0]
    for task in prange(len(blended) * count):
        _attend_part(
            rows, k, v, lying, halves, heads, kv_len, firsts, stops, blended, sums, task // count, task % count
        )
    return _merged(blended, sums)


@compiled
def _attend_part(rows, k, v, lying, halves, heads, kv_len, firsts, stops, blended, sums, part, row):
    """One part of one KV head's keys."""
    queries, at, head = rows.shape[1], row // heads, row % heads
    first, stop = max(firsts[at], part * PART), min(stops[at], kv_len, (part + 1) * PART)
    size = max(0, stop - first)
    scores, exponents = np.empty((queries, PART), np.float32), np.empty(PART, np.int32)
    k += at * lying[0] + head * lying[1] + first * lying[2]
    v += at * lying[3] + head * lying[4] + first * lying[5]
    for begin in range(0, size, TILE):
        some = min(TILE, size - begin)
        for query in range(queries):
            if halves:
                _score_halves(k + begin * lying[2], lying[2], rows[row, query], scores[query], begin, some)
            else:
                _score_floats(k + begin * lying[2], lying[2], rows[row, query], scores[query], begin, some)
    for query in range(queries):
        _powers(scores[query, :size], exponents, sums[part, row, query])
    for begin in range(0, size, TILE):
        some = min(TILE, size - begin)
        for query in range(queries):
            to = blended[part, row, query]
            if halves:
                _blend_halves(v + begin * lying[5], lying[5], scores[query], begin, some, to)
            else:
                _blend_floats(v + begin * lying[5], lying[5], scores[query], begin, some, to)
