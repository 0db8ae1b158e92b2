"""`paged_packed_attention` of one new token per row for a CPU: the loops over packed bytes, led by a block table.

All rows of a batch, each of its own length, are answered in one call: what is done with a packed tile is
`packed_attention_cpu`'s, how a batch of rows is divided into parts and merged `paged_attention_cpu`'s. No dense K or V
is made but of the blocks that wait, which are few: as float32, one block of a row.
"""

from __future__ import annotations

import functools
import math
import sys
import threading
from typing import Any

import numpy as np
import torch
from numpy import float32
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from labkit.attention import PLAIN, Constants, Visibility
from labkit.kernels import packed_attention_cpu
from labkit.kernels.packed_attention import Dense, wants_gradient
from labkit.kernels.packed_attention_cpu import (
    PART,
    PAYS,
    _blend,
    _blend_dense,
    _metadata,
    _powers,
    _score,
    _score_dense,
    _score_tokens,
    _unpack,
    compiled,
    settings,
    share_out,
    table_of,
)
from labkit.kernels.paged_attention_cpu import _merged, _parts
from labkit.kernels.paged_packed_attention import check_paged_packed, missing
from labkit.quantization import Packed, Quantizer


def takes(q: Tensor, k: Packed, v: Packed, waiting: Dense) -> bool:
    """Whether these loops answer: what `packed_attention_cpu` takes, and no gradient wanted of blocks that wait."""
    return packed_attention_cpu.takes(q, k, v) and not wants_gradient(*waiting)


def paged_packed_decode_attention_cpu(
    q: Tensor,
    k: Packed,
    v: Packed,
    waiting: Dense,
    block_table: Tensor,
    visible: Visibility,
    constants: Constants = PLAIN,
) -> Tensor:
    """`paged_packed_attention` of one new token per row where `takes` says so; its twin's arguments.

    It takes the threads that PyTorch does (`torch.set_num_threads`), where there is enough to read; neither their
    number nor the other rows change a bit of a row's numbers. Raises ValueError when shapes or formats do not fit or
    the table lacks a block that is read. It has no backward pass.
    """
    if has_torch_function((q,)):
        return handle_torch_function(
            paged_packed_decode_attention_cpu, (q,), q, k, v, waiting, block_table, visible, constants
        )  # fmt: skip
    queries = check_paged_packed(q, k, v, waiting, block_table, visible)
    if not takes(q, k, v, waiting):
        raise ValueError(
            "paged_packed_decode_attention_cpu takes one new token on a CPU, float32 or 16 bits, without gradients, "
            "and keys and values of one format, values per token, whose codes fill 16-bit words; "
            f"got q {list(q.shape)}, {q.dtype}, {k.quantizer} and {v.quantizer}. paged_packed_attention takes all of "
            f"these"
        )
    batch, _, _, head_dim = q.shape
    (num_blocks, _, heads, _, _), size = k.rows.shape, k.quantizer.group_size
    rows = q.detach().reshape(batch, heads, queries, head_dim).float() * constants.scale_for(head_dim)
    bounds = [x.numpy() for x in visible.bounds(constants, batch, "cpu")]
    table = block_table.int().contiguous().numpy()
    loops, parts_of, merged = warm_up()
    part = max(1, PART // size) * size
    parts = parts_of(*bounds, table, size, num_blocks + len(waiting[0]), part)
    if len(parts) and parts[0, 1] < 0:
        raise missing(k, waiting)
    given = (rows, k.rows[:, 0], v.rows[:, 0], *(x.detach().float() for x in waiting))
    arrays = [x.contiguous().numpy() for x in given]
    blended = np.zeros((len(parts), heads, queries, head_dim), np.float32)
    sums = np.empty((len(parts), heads, queries, 2), np.float32)
    run = functools.partial(
        loops, *arrays, table, parts, table_of(k.quantizer.nbits), *settings(k.quantizer),
        float32(constants.soft_cap or 0.0), part, blended, sums,
    )  # fmt: skip
    pays = 2 * int((parts[:, 2] - parts[:, 1]).sum()) * heads * head_dim >= PAYS
    share_out(run, max(1, min(torch.get_num_threads(), len(parts) * heads)) if pays else 1)
    return torch.from_numpy(merged(batch, parts, blended, sums)).to(q.dtype).view(q.shape)


LOCK = threading.Lock()


@functools.cache
def warm_up() -> tuple[Any, Any, Any]:
    """The compiled loops, one set for all formats and shapes: some seconds when a process first calls it, then nothing.

    Call it before timing a step. On a terminal it says that it compiles.
    """
    with LOCK:
        if not _attend.signatures:
            if sys.stderr is not None and sys.stderr.isatty():
                print("compiling the loops for packed blocks (some seconds, once per process)", file=sys.stderr)
            rows, packed = np.zeros((1, 1, 1, 4), np.float32), np.zeros((1, 1, 4, 6), np.uint8)
            waiting, table, ends = np.zeros((0, 1, 4, 4), np.float32), np.zeros((1, 1), np.int32), np.ones(1, np.int32)
            blended, sums = np.zeros((1, 1, 1, 4), np.float32), np.zeros((1, 1, 1, 2), np.float32)
            parts = _parts(ends - ends, ends, table, 4, 1, 4)
            arrays = rows, packed, packed, waiting, waiting, table, parts, table_of(8)
            _attend(*arrays, *settings(Quantizer(8, 4)), float32(0), 4, blended, sums, 0, 1)
            _merged(1, parts, blended, sums)
    return _attend, _parts, _merged


@compiled
def _attend(
    rows, k_rows, v_rows, waiting_k, waiting_v, block_table, parts, table,
    nbits, group, code_bytes, middle, has_zero, is_bfloat16, per_channel, soft_cap, size, blended, sums, index, threads,
):  # fmt: skip
    """This thread's share of the parts, into `blended` and `sums`, which holds the top score and the sum above it.

    rows: scaled queries `[batch, num_kv_heads, queries, head_dim]`. A share is one KV head of one part.
    """
    _, heads, queries, dims = rows.shape
    num_blocks, row_bytes = len(k_rows), k_rows.shape[3]
    once = np.int64(1)  # Numba compiles a function anew for each number written in its call
    codes = np.empty((dims, row_bytes * 8 // nbits), np.float32)
    scale, zero = np.empty(dims, np.float32), np.empty(dims, np.float32)
    scaled_k, scaled_v = np.empty((queries, dims), np.float32), np.empty((queries, group), np.float32)
    some = np.empty((queries, group), np.float32)  # whole arrays: of a part, Numba cannot know that it is contiguous
    scores, exponents = np.empty((queries, size), np.float32), np.empty(size, np.int32)
    for share in range(index, len(parts) * heads, threads):
        part, head = share // heads, share % heads
        row, first, stop = parts[part]
        begin = first // size * size  # of the part
        low, high = first - begin, stop - begin
        place_low, place_high = first // group, (stop + group - 1) // group
        for place in range(place_low, place_high):
            block, at = block_table[row, place], place * group - begin
            if block >= num_blocks:
                left, right = max(low - at, 0), min(high - at, group)
                _score_dense(rows[row, head], waiting_k[block - num_blocks, head], left, right, at + left, scores)
                continue
            _unpack(k_rows[block, head], nbits, table, codes)
            _metadata(k_rows[block, head], code_bytes, once, middle, has_zero, is_bfloat16, scale, zero)
            if per_channel:
                _score(rows[row, head], codes, scale, zero, scaled_k, some, scores, at)
            else:
                _score_tokens(rows[row, head], codes, scale, zero, group, scores, at)
        for query in range(queries):
            for token in range(place_low * group - begin, low):
                scores[query, token] = float32(0)
            for token in range(high, place_high * group - begin):
                scores[query, token] = float32(0)
            if soft_cap > float32(0):
                for token in range(low, high):
                    scores[query, token] = soft_cap * math.tanh(scores[query, token] / soft_cap)
            _powers(scores[query, low:high], exponents, sums[part, head, query])
        for place in range(place_low, place_high):
            block, at = block_table[row, place], place * group - begin
            if block >= num_blocks:
                left, right = max(low - at, 0), min(high - at, group)
                _blend_dense(scores, at + left, waiting_v[block - num_blocks, head], left, right, blended[part, head])
                continue
            _unpack(v_rows[block, head], nbits, table, codes)
            _metadata(v_rows[block, head], code_bytes, dims // group, middle, has_zero, is_bfloat16, scale, zero)
            _blend(scores, at, codes, scale, zero, scaled_v, some, blended[part, head])
