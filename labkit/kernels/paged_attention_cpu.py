"""`paged_attention` of one new token per row for a CPU: loops compiled by Numba when they are first needed.

All rows of a batch, each of its own length, are answered in one call. K and V are read where they lie, in the order in
which they lie, each token with all its KV heads. Halves are brought to float32 some tokens at a time, in a buffer that
stays in the core's fastest caches; float32 is read at its place, and asked for a few tokens ahead, so that the core
does not wait for memory at each of them. No dense K or V is ever made, whatever the block size.

Tokens are answered in parts, each with a softmax of its own, and merged, as in `packed_attention_cpu`. A part begins at
a multiple of `PART` in its row, whatever else is in the batch and however many threads there are: so neither changes a
bit of a row's numbers.
"""

from __future__ import annotations

import functools
import math
import sys
import threading
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy import float32, int32, uint32
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from labkit.attention import PLAIN, Constants, Visibility
from labkit.kernels.packed_attention import wants_gradient
from labkit.kernels.packed_attention_cpu import _add_weighted, _powers, compiled, share_out
from labkit.kernels.paged_attention import check_paged
from labkit.kernels.split import DTYPES

PART = 1024  # tokens to a part; a multiple of TILE
TILE = 32  # tokens brought to float32 at a time
AHEAD = 8  # tokens that are asked for before they are needed: float32 ones are read where they lie, one by one
WIDE = 512  # numbers of a token brought to float32 at a time: a tile of 64 KiB
PAYS = 2**20  # numbers of K and V, half a millisecond's work; of less, waking a thread would cost too large a share


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether these loops answer: one new token per row on a CPU, float32 or 16 bits, contiguous, without gradient."""
    fits = q.device.type == "cpu" and q.shape[2] == 1 and q.dtype in DTYPES and k.is_contiguous() and v.is_contiguous()
    return fits and not wants_gradient(q, k, v) and sys.byteorder == "little"


def paged_decode_attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, block_table: Tensor, visible: Visibility, constants: Constants = PLAIN
) -> Tensor:
    """`paged_attention` of one new token per row where `takes` says so; its twin's arguments.

    It takes the threads that PyTorch does (`torch.set_num_threads`), where there is enough to read. Sums are kept in
    float32. Raises ValueError when shapes or dtypes do not fit or the table lacks a block that is read. It has no
    backward pass.
    """
    if has_torch_function((q,)):
        return handle_torch_function(paged_decode_attention_cpu, (q,), q, k, v, block_table, visible, constants)
    queries = check_paged(q, k, v, block_table, visible)
    if not takes(q, k, v):
        raise ValueError(
            f"paged_decode_attention_cpu takes one new token on a CPU, float32 or 16 bits, contiguous blocks and no "
            f"gradients; got q {list(q.shape)}, {q.dtype} on {q.device}. paged_attention takes all of these"
        )
    batch, _, _, head_dim = q.shape
    heads = k.shape[2]
    rows = q.detach().float().numpy().reshape(batch, heads, queries, head_dim)
    rows = np.multiply(rows, float32(constants.scale_for(head_dim)), order="C")
    bounds = [x.numpy() for x in visible.bounds(constants, batch, "cpu")]
    table = block_table.int().contiguous().numpy()
    loops, parts_of, merged = warm_up()
    parts = parts_of(*bounds, table, k.shape[1], len(k), PART)
    if len(parts) and parts[0, 1] < 0:
        raise ValueError(f"the block table lacks a block of tokens that are read: its numbers are 0 to {len(k) - 1}")
    pays = 2 * int((parts[:, 2] - parts[:, 1]).sum()) * heads * head_dim >= PAYS
    threads = torch.get_num_threads() if pays else 1
    at_once = together(heads, head_dim) if len(parts) >= threads else 1
    threads = max(1, min(threads, len(parts) * heads // at_once))
    blended = np.zeros((len(parts), heads, queries, head_dim), np.float32)
    sums = np.empty((len(parts), heads, queries, 2), np.float32)
    share_out(
        functools.partial(
            loops, rows, *as_arrays(k), *as_arrays(v), table, parts, DTYPES.index(k.dtype),
            float32(constants.soft_cap or 0.0), at_once, blended, sums,
        ),
        threads,
    )  # fmt: skip
    return torch.from_numpy(merged(batch, parts, blended, sums)).to(q.dtype).view(q.shape)


def together(heads: int, head_dim: int) -> int:
    """KV heads that are worked on at one time, since they lie side by side: a divisor of all, and few enough."""
    return next(n for n in range(heads, 0, -1) if heads % n == 0 and (n * head_dim <= WIDE or n == 1))


def as_arrays(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The memory of K or V as float32 and as words of 16 bits, one of the two empty.

    Numba has no 16-bit floats on a CPU, and so one compilation serves all dtypes.
    """
    if x.dtype == torch.float32:
        return x.detach().numpy(), NO_HALVES
    return NO_FLOATS, x.detach().view(torch.int16).numpy().view(np.uint16)


NO_FLOATS, NO_HALVES = np.empty((0, 0, 0, 0), np.float32), np.empty((0, 0, 0, 0), np.uint16)
LOCK = threading.Lock()


@functools.cache
def warm_up() -> tuple[Any, Any, Any]:
    """The compiled loops, one set for all dtypes and shapes: some seconds when a process first calls it, then nothing.

    Call it before timing a step. On a terminal it says that it compiles.
    """
    with LOCK:
        if not _attend.signatures:
            if sys.stderr is not None and sys.stderr.isatty():
                print("compiling the loops for paged attention (some seconds, once per process)", file=sys.stderr)
            table, ends = np.zeros((1, 1), np.int32), np.ones(1, np.int32)
            rows = numbers = np.zeros((1, 1, 1, 4), np.float32)
            blended, sums = np.zeros((1, 1, 1, 4), np.float32), np.zeros((1, 1, 1, 2), np.float32)
            parts = _parts(ends - ends, ends, table, 1, 1, PART)
            both = numbers, NO_HALVES, numbers, NO_HALVES
            _attend(rows, *both, table, parts, 0, float32(0), 1, blended, sums, 0, 1)
            _merged(1, parts, blended, sums)
    return _attend, _parts, _merged


@compiled
def _parts(first, end, table, block_size, num_blocks, size):
    """Row, first token and the one behind the last of each part that is read, int64 `[parts, 3]`, row after row.

    A part has up to `size` tokens. The first token of the first part is -1 where the table lacks a block.
    """
    count, lacks = 0, False
    for row in range(len(first)):
        if end[row] > first[row]:
            count += (end[row] - 1) // size - first[row] // size + 1
            for place in range(first[row] // block_size, (end[row] - 1) // block_size + 1):
                lacks |= table[row, place] < 0 or table[row, place] >= num_blocks
    parts = np.empty((count, 3), np.int64)
    at = 0
    for row in range(len(first)):
        low, high = np.int64(first[row]), np.int64(end[row])
        while low < high:
            stop = min(high, (low // size + 1) * size)
            parts[at, 0], parts[at, 1], parts[at, 2] = row, low, stop
            low, at = stop, at + 1
    if lacks:
        parts[0, 1] = -1
    return parts


@compiled
def _attend(
    rows, k, k_halves, v, v_halves, table, parts, dtype, soft_cap, at_once, blended, sums, index, threads
):  # fmt: skip
    """This thread's share of the parts, into `blended` and `sums`, which holds the top score and the sum above it.

    rows: scaled queries `[batch, num_kv_heads, queries, head_dim]`. A share is `at_once` KV heads of one part.
    """
    _, heads, queries, dims = rows.shape
    groups, zeroth, once = heads // at_once, np.int64(0), np.int64(1)
    tile = np.empty((at_once, TILE, dims), np.float32)
    bits = tile.view(np.uint32)
    scores, exponents = np.empty((at_once * queries, PART), np.float32), np.empty(PART, np.int32)
    for share in range(index, len(parts) * groups, threads):
        part, begin = share // groups, share % groups * at_once
        row, low, high = parts[part]
        blocks = table[row]
        for start in range(low, high, TILE):
            count = min(TILE, high - start)
            if dtype == 0:
                some = rows[row, begin : begin + at_once]
                _score_lying(some, k, blocks, start, count, high, begin, scores, start - low)
                continue
            _fill(k_halves, blocks, start, count, begin, dtype, tile, bits)
            for one in range(at_once):
                _score(rows[row, begin + one], tile[one], count, scores, one * queries, start - low)
        for one in range(at_once):
            for query in range(queries):
                mine = scores[one * queries + query, : high - low]
                if soft_cap > float32(0):
                    for token in range(len(mine)):
                        mine[token] = soft_cap * math.tanh(mine[token] / soft_cap)
                _powers(mine, exponents, sums[part, begin + one, query])
        for start in range(low, high, TILE):
            count = min(TILE, high - start)
            if dtype == 0:
                to = blended[part, begin : begin + at_once]
                _add_lying(v, blocks, start, count, high, begin, scores[:, start - low : start - low + count], to)
                continue
            _fill(v_halves, blocks, start, count, begin, dtype, tile, bits)
            for one in range(at_once):
                weights = scores[one * queries : (one + 1) * queries, start - low : start - low + count]
                _add_weighted(tile[one], zeroth, once, weights, blended[part, begin + one])


@intrinsic
def fetch(typing: Any, x: Any, index: Any) -> Any:
    """Ask for the memory of the contiguous array `x` at flat `index`, and wait for nothing."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number, place = ir.IntType(32), ir.IntType(8).as_pointer()
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        at = builder.bitcast(builder.gep(data, [args[1]]), place)
        asking = ir.FunctionType(ir.VoidType(), [place, number, number, number])
        ask = cgutils.get_or_insert_function(builder.module, asking, "llvm.prefetch.p0i8")
        builder.call(ask, [at, number(0), number(3), number(1)])  # to read, to keep in every cache, data
        return context.get_dummy_value()

    return types.void(x, types.int64), generate


@compiled
def _ask(x, blocks, place, head, count):
    """Ask for `count` numbers of the token at `place`, from KV head `head` on: 16 come at once, a line of 64 bytes."""
    size = x.shape[1]
    first = ((np.int64(blocks[place // size]) * size + place % size) * x.shape[2] + head) * x.shape[3]
    for number in range(0, count, 16):
        fetch(x, first + number)  # type: ignore[call-arg]  # Numba hands in the first argument


@compiled
def _score_lying(rows, k, blocks, start, count, high, begin, scores, place):
    """Scores of `count` tokens from place `start` on, whose float32 keys are read where they lie."""
    heads, queries, dims = rows.shape
    size = k.shape[1]
    for token in range(count):
        block, at = blocks[(start + token) // size], (start + token) % size
        _ask(k, blocks, min(start + token + AHEAD, high - 1), begin, heads * dims)
        for one in range(heads):
            for query in range(queries):
                score = float32(0)
                for dim in range(dims):
                    score += rows[one, query, dim] * k[block, at, begin + one, dim]
                scores[one * queries + query, place + token] = score


@compiled
def _add_lying(v, blocks, start, count, high, begin, weights, out):
    """Add the float32 values of `count` tokens from place `start` on to `out`, weighted, where they lie."""
    heads, queries, dims = out.shape
    size, fours = v.shape[1], count // 4 * 4
    for token in range(0, fours, 4):
        b0, a0 = blocks[(start + token) // size], (start + token) % size
        b1, a1 = blocks[(start + token + 1) // size], (start + token + 1) % size
        b2, a2 = blocks[(start + token + 2) // size], (start + token + 2) % size
        b3, a3 = blocks[(start + token + 3) // size], (start + token + 3) % size
        for ahead in range(start + token + AHEAD, start + token + AHEAD + 4):
            _ask(v, blocks, min(ahead, high - 1), begin, heads * dims)
        for one in range(heads):
            head = begin + one
            for query in range(queries):
                w = weights[one * queries + query]
                w0, w1, w2, w3 = w[token], w[token + 1], w[token + 2], w[token + 3]
                for dim in range(dims):
                    out[one, query, dim] += (
                        w0 * v[b0, a0, head, dim]
                        + w1 * v[b1, a1, head, dim]
                        + w2 * v[b2, a2, head, dim]
                        + w3 * v[b3, a3, head, dim]
                    )
    for token in range(fours, count):
        block, at = blocks[(start + token) // size], (start + token) % size
        for one in range(heads):
            for query in range(queries):
                w0 = weights[one * queries + query, token]
                for dim in range(dims):
                    out[one, query, dim] += w0 * v[block, at, begin + one, dim]


@compiled
def _fill(halves, blocks, start, count, head, dtype, tile, bits):
    """`count` tokens from place `start` on as float32, of KV head `head` and as many behind it as `tile` has room for.

    In the order in which they lie: memory is read in one go, which is most of what the loops wait for. dtype: float16
    or bfloat16, by its place in `DTYPES`. bits: the tile in whole numbers: of floats, a number below 2**-126 is 0 where
    denormals are flushed. Each number is reached by all its indices: taking a token's row out first costs more
    than its numbers, and loops that read and write the same memory as two types are not vectorized.
    """
    heads, _, dims = tile.shape
    size = halves.shape[1]
    place, at = start // size, start % size
    for token in range(count):
        block = blocks[place]
        if dtype == 2:
            for one in range(heads):
                for dim in range(dims):
                    bits[one, token, dim] = uint32(halves[block, at, head + one, dim]) << uint32(16)
        else:
            for one in range(heads):
                for dim in range(dims):  # as if all were denormal
                    below = int32(halves[block, at, head + one, dim]) & 0x7FFF
                    tile[one, token, dim] = float32(below) * float32(2.0**-24)
                for dim in range(dims):
                    half = uint32(halves[block, at, head + one, dim])
                    number = half & uint32(0x7FFF)
                    moved = (number << uint32(13)) + uint32((127 - 15) << 23)
                    moved += uint32((255 - 31 - 112) << 23) if number >= uint32(0x7C00) else uint32(0)  # infinity, NaN
                    moved = moved if number >= uint32(0x0400) else bits[one, token, dim]
                    bits[one, token, dim] = moved | ((half & uint32(0x8000)) << uint32(16))
        at += 1
        if at == size:
            place, at = place + 1, 0


@compiled
def _score(rows, tile, count, scores, first, place):
    """Scores of a tile's tokens, from `place` on, in the rows of `scores` from `first` on."""
    for query in range(len(rows)):
        for token in range(count):
            score = float32(0)
            for dim in range(tile.shape[1]):
                score += rows[query, dim] * tile[token, dim]
            scores[first + query, place + token] = score


@compiled
def _merged(batch, parts, blended, sums):
    """One part of all of a row: what each blended, weighted by exp(its top - the greatest), over their sum."""
    _, heads, queries, dims = blended.shape
    out = np.zeros((batch, heads, queries, dims), np.float32)
    begin = 0
    while begin < len(parts):
        row, stop = parts[begin, 0], begin
        while stop < len(parts) and parts[stop, 0] == row:
            stop += 1
        for head in range(heads):
            for query in range(queries):
                top, total, to = sums[begin, head, query, 0], float32(0), out[row, head, query]
                for part in range(begin + 1, stop):
                    top = max(top, sums[part, head, query, 0])
                for part in range(begin, stop):
                    at, some = sums[part, head, query], blended[part, head, query]
                    weight = float32(math.exp(at[0] - top))
                    total += weight * at[1]
                    for dim in range(dims):
                        to[dim] += weight * some[dim]
                for dim in range(dims):
                    to[dim] /= total
        begin = stop
    return out
