"""`packed_decode_attention` for a CPU: loops over the packed bytes, compiled by Numba when they are first needed.

PyTorch has no operator that multiplies by numbers of 4 or 2 bits, so `packed_attention` first writes the numbers of a
block out, 8 or 16 times the bytes that were read. Here one tile at a time is spread to floats, in a buffer that stays
in the core's fastest caches and is overwritten by the next.

The other thing that makes it fast is where the metadata goes. A sum of groups, each weighted, is
`sum(weight * (code * scale + zero)) = sum((weight * scale) * code) + sum(weight * zero)`: one multiplication per code.

The tokens of one KV head are answered in parts of about a thousand, each with a softmax of its own, and merged by their
sums (as in Flash-Decoding, arXiv:2311.01282). Threads share the parts out; since the parts are the same however many
threads there are, so are the numbers that come out.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy import float32, int32, uint8, uint32
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from labkit.attention import PLAIN, Constants, Visibility
from labkit.kernels.packed_attention import Dense, check_packed, wants_gradient
from labkit.quantization import Packed, Quantizer

# LLVM may regroup sums, which lets it use vectors, but not assume that there is no NaN.
compiled: Any = njit(nogil=True, fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")
PART = 1024  # packed tokens to a part, about
PAYS = 2**20  # codes of K and V, half a millisecond's work; of less, waking a thread would cost too large a share


def takes(q: Tensor, k: Packed, v: Packed) -> bool:
    """Whether these loops answer: one new token per row on a CPU, K and V of one format, and no gradient wanted.

    The format: 8, 4 or 2 bits or float8, keys per channel or per token, values per token, in rows of whole 16-bit words
    (groups of 4 at 2 bits are none). Queries of float64 go to the twin, as the sums here are float32.
    """
    if q.device.type != "cpu" or q.shape[2] != 1 or q.dtype == torch.float64 or wants_gradient(q):
        return False
    keys, values = k.quantizer, v.quantizer
    one_format = (keys.nbits, keys.symmetric, keys.metadata) == (values.nbits, values.symmetric, values.metadata)
    return one_format and values.axis == "token" and keys.code_bytes % 2 == 0 and sys.byteorder == "little"


def packed_decode_attention_cpu(
    q: Tensor,
    k: Packed,
    v: Packed,
    constants: Constants = PLAIN,
    visible: Visibility | None = None,
    *,
    before: Dense | None = None,
    after: Dense | None = None,
    rotation: Tensor | None = None,
) -> Tensor:
    """`packed_attention` of one new token per row where `takes` says so; its twin's arguments.

    It takes the threads that PyTorch does (`torch.set_num_threads`), and gives the same numbers with any number of
    them. Raises ValueError when shapes, formats or sizes do not fit. It has no backward pass.
    """
    if has_torch_function((q,)):
        return handle_torch_function(
            packed_decode_attention_cpu, (q,), q, k, v, constants, visible, before=before, after=after,
            rotation=rotation,
        )  # fmt: skip
    visible = check_packed(q, k, v, before, after, visible)
    if not takes(q, k, v) or constants.soft_cap is not None:
        raise ValueError(
            "packed_decode_attention_cpu takes one new token on a CPU, float32 or 16 bits, without gradients, no soft "
            "cap, and keys and values of one format, values per token, whose codes fill 16-bit words; "
            f"got q {list(q.shape)}, {q.dtype}, {k.quantizer} and {v.quantizer}. packed_attention takes all of these"
        )
    batch, heads, head_dim = k.rows.shape[1:4]
    rows = q.reshape(batch * heads, -1, head_dim).float() * constants.scale_for(head_dim)
    turned = rows if rotation is None else rows @ rotation.to(rows.dtype)
    first, stop = visible.bounds(constants, batch, q.device)
    return attend(rows, turned, first, stop, k, v, before, after).to(q.dtype).view(q.shape)


def attend(
    rows: Tensor, turned: Tensor, first: Tensor, stop: Tensor, k: Packed, v: Packed, before: Dense | None,
    after: Dense | None,
) -> Tensor:  # fmt: skip
    """softmax(rows k^T) v, float32 `[batch * num_kv_heads, queries, head_dim]`, zeros where no key is seen.

    rows: scaled queries, of that shape. turned: the same, as they multiply packed keys. first, stop: int `[batch]`, the
    first key that a row of the batch sees and the one behind the last, counted over `before`, `k` and `after`.
    """
    (tiles, batch, heads, head_dim, _), quantizer = k.rows.shape, k.quantizer
    tiles_per_part = max(1, PART // quantizer.group_size)
    parts = 1 + -(-tiles // tiles_per_part)  # the tokens in full precision are the first
    nothing = rows.new_empty(batch, heads, 0, head_dim)
    dense = [x.float().flatten(0, 1) for pair in (before, after) for x in (pair or (nothing, nothing))]
    bounds = torch.stack((first, stop), dim=1).long().repeat_interleave(heads, dim=0)
    given = (rows, turned, bounds, k.rows.flatten(1, 2), v.rows.flatten(1, 2), *dense)
    arrays = [x.detach().contiguous().numpy() for x in given]
    blended = np.zeros((parts, *rows.shape), np.float32)
    sums = np.empty((parts, *rows.shape[:2], 2), np.float32)
    loops, merged = warm_up()
    run = functools.partial(
        loops, *arrays, blended, sums, table_of(quantizer.nbits), *settings(quantizer), tiles_per_part
    )
    pays = 2 * k.num_tokens * batch * heads * head_dim >= PAYS
    share_out(run, min(torch.get_num_threads(), parts * batch * heads) if pays else 1)
    return torch.from_numpy(merged(blended, sums))


def share_out(run: Callable[[int, int], None], threads: int) -> None:
    """Call `run(index, threads)` for each index below `threads`, all at the same time."""
    others = [pool().submit(run, index, threads) for index in range(1, threads)]
    run(0, threads)
    for other in others:
        other.result()


@functools.cache
def pool() -> ThreadPoolExecutor:
    """Threads that wait for work; they start when they are first needed."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="labkit-packed-attention")


if hasattr(os, "register_at_fork"):  # a forked process has none of these threads
    os.register_at_fork(after_in_child=pool.cache_clear)


@functools.cache
def table_of(nbits: int | torch.dtype) -> np.ndarray:
    """The numbers that float8 codes stand for, float32 `[256]`; of whole codes, which are numbers themselves, none."""
    if isinstance(nbits, int):
        return np.empty(0, np.float32)
    return torch.arange(256, dtype=torch.uint8).view(nbits).float().numpy()


def settings(x: Quantizer) -> tuple[int, int, int, int, bool, bool, bool]:
    """What the loops must know of a format of keys."""
    nbits = x.nbits if isinstance(x.nbits, int) else 8
    return nbits, x.group_size, x.code_bytes, x.middle, x.has_zero, x.metadata == torch.bfloat16, x.axis == "channel"


LOCK = threading.Lock()


def warm_up() -> tuple[Any, Any]:
    """The compiled loops, one set for all formats and shapes: some seconds when a process first calls it, then nothing.

    Call it before timing a step. On a terminal it says that it compiles.
    """
    with LOCK:
        if not _attend.signatures:
            if sys.stderr is not None and sys.stderr.isatty():
                print("compiling the loops for packed attention (some seconds, once per process)", file=sys.stderr)
            few, rows = np.zeros((1, 1, 4), np.float32), np.zeros((1, 1, 4, 6), np.uint8)
            blended, sums = np.zeros((2, 1, 1, 4), np.float32), np.zeros((2, 1, 1, 2), np.float32)
            arrays = (few, few, np.array([[0, 6]]), rows, rows, few, few, few, few, blended, sums, table_of(8))
            _attend(*arrays, *settings(Quantizer(8, 4)), 1, 0, 1)
            _merged(blended, sums)
    return _attend, _merged


@compiled
def _attend(
    rows, turned, bounds, k_rows, v_rows, first_k, first_v, last_k, last_v, blended, sums, table,
    nbits, group, code_bytes, middle, has_zero, is_bfloat16, per_channel, tiles_per_part, index, threads,
):  # fmt: skip
    """This thread's share of the parts, into `blended` and `sums`, which holds the top score and the sum above it.

    A row here is one KV head of one row of the batch.
    """
    count, queries, dims = rows.shape
    tiles, row_bytes = len(k_rows), k_rows.shape[3]
    sinks, last = first_k.shape[1], last_k.shape[1]
    zeroth, once = np.int64(0), np.int64(1)  # Numba compiles a function anew for each number written in its call
    codes = np.empty((dims, row_bytes * 8 // nbits), np.float32)
    scale, zero = np.empty(dims, np.float32), np.empty(dims, np.float32)
    scaled_k, scaled_v = np.empty((queries, dims), np.float32), np.empty((queries, group), np.float32)
    some = np.empty((queries, group), np.float32)  # whole arrays: of a part, Numba cannot know that it is contiguous
    scores = np.empty((queries, max(tiles_per_part * group, sinks + last)), np.float32)
    exponents = np.empty(scores.shape[1], np.int32)
    for task in range(index, len(blended) * count, threads):
        part, row = task // count, task % count
        first, stop, to, summed = bounds[row, 0], bounds[row, 1], blended[part, row], sums[part, row]
        if part == 0:
            behind = sinks + tiles * group
            low, high = _within(first, stop, sinks)
            last_low, last_high = _within(first - behind, stop - behind, last)
            _score_dense(rows[row], first_k[row], low, high, zeroth, scores)
            _score_dense(rows[row], last_k[row], last_low, last_high, high - low, scores)
            for query in range(queries):
                _powers(scores[query, : high - low + last_high - last_low], exponents, summed[query])
            _blend_dense(scores, zeroth, first_v[row], low, high, to)
            _blend_dense(scores, high - low, last_v[row], last_low, last_high, to)
            continue
        begin = (part - 1) * tiles_per_part
        size = min(tiles - begin, tiles_per_part) * group
        place = sinks + begin * group  # of the part's first token
        low, high = _within(first - place, stop - place, size)
        tile_low, tile_high = low // group, (high + group - 1) // group
        for tile in range(tile_low, tile_high):
            packed = k_rows[begin + tile, row]
            _unpack(packed, nbits, table, codes)
            _metadata(packed, code_bytes, once, middle, has_zero, is_bfloat16, scale, zero)
            if per_channel:
                _score(turned[row], codes, scale, zero, scaled_k, some, scores, tile * group)
            else:
                _score_tokens(turned[row], codes, scale, zero, group, scores, tile * group)
        for query in range(queries):
            for token in range(tile_low * group, low):
                scores[query, token] = float32(0)
            for token in range(high, tile_high * group):
                scores[query, token] = float32(0)
            _powers(scores[query, low:high], exponents, summed[query])
        for tile in range(tile_low, tile_high):
            packed = v_rows[begin + tile, row]
            _unpack(packed, nbits, table, codes)
            _metadata(packed, code_bytes, dims // group, middle, has_zero, is_bfloat16, scale, zero)
            _blend(scores, tile * group, codes, scale, zero, scaled_v, some, to)


@compiled
def _merged(blended, sums):
    """One part of all: what each blended, weighted by exp(its top - the greatest), over their sum."""
    parts, count, queries, dims = blended.shape
    out = np.zeros((count, queries, dims), np.float32)
    for row in range(count):
        for query in range(queries):
            top, total, to = float32(-np.inf), float32(0), out[row, query]
            for part in range(parts):
                top = max(top, sums[part, row, query, 0])
            for part in range(parts):
                at, some = sums[part, row, query], blended[part, row, query]
                if at[1] != float32(0):  # else the part sees nothing
                    weight = float32(math.exp(at[0] - top))
                    total += weight * at[1]
                    for dim in range(dims):
                        to[dim] += weight * some[dim]
            if total != float32(0):
                for dim in range(dims):
                    to[dim] /= total
    return out


@compiled
def _within(first, stop, size):
    """Where a stretch of `size` begins and ends to be seen; nowhere when it ends where it begins."""
    low = min(max(first, 0), size)
    return low, max(min(stop, size), low)


@compiled
def _score(rows, codes, scale, zero, scaled, some, scores, place):
    """Scores of a tile's tokens, keys per channel: its channels, weighted by the query and summed.

    `scaled` and `some` are room.
    """
    queries, dims = rows.shape
    for query in range(queries):
        q, offset = rows[query], float32(0)
        for dim in range(dims):
            scaled[query, dim] = q[dim] * scale[dim]
            offset += q[dim] * zero[dim]
        for token in range(some.shape[1]):
            some[query, token] = offset
    _add_weighted(codes, np.int64(0), np.int64(1), scaled, some)
    for query in range(queries):
        to = scores[query, place : place + some.shape[1]]
        for token in range(len(to)):
            to[token] = some[query, token]


@compiled
def _score_tokens(rows, codes, scale, zero, group, scores, place):
    """Scores of a tile's tokens, keys per token: products with each group of channels, summed."""
    queries, dims = rows.shape
    per_token = dims // group
    for query in range(queries):
        q, to = rows[query], scores[query, place : place + group]
        for token in range(group):
            score = float32(0)
            for part in range(per_token):
                at = token * per_token + part
                numbers, some, product, total = codes[at], q[part * group : (part + 1) * group], float32(0), float32(0)
                for channel in range(group):
                    product += some[channel] * numbers[channel]
                    total += some[channel]
                score += product * scale[at] + total * zero[at]
            to[token] = score


@compiled
def _blend(weights, place, codes, scale, zero, scaled, some, out):
    """Add a tile's tokens, weighted: each group of channels by itself. `scaled` and `some` are room."""
    queries, dims = out.shape
    group = some.shape[1]
    per_token = dims // group
    for part in range(per_token):
        here = slice(part * group, (part + 1) * group)
        scales, zeros = scale[here], zero[here]
        for query in range(queries):
            w, offset = weights[query, place : place + group], float32(0)
            for token in range(group):
                scaled[query, token] = w[token] * scales[token]
                offset += w[token] * zeros[token]
            for channel in range(group):
                some[query, channel] = offset
        _add_weighted(codes, part, per_token, scaled, some)
        for query in range(queries):  # tile by tile: codes and offsets are large and cancel within one
            to = out[query, here]
            for channel in range(group):
                to[channel] += some[query, channel]


@compiled
def _score_dense(rows, keys, low, high, place, scores):
    """Scores of tokens in full precision, `low` to `high`, the first of them at `place`."""
    for token in range(low, high):
        key = keys[token]
        for query in range(len(rows)):
            row, score = rows[query], float32(0)
            for dim in range(len(key)):
                score += row[dim] * key[dim]
            scores[query, place + token - low] = score


@compiled
def _blend_dense(weights, place, values, low, high, out):
    """Sums of values in full precision, those of `_score_dense`."""
    for token in range(low, high):
        value = values[token]
        for query in range(len(out)):
            weight = weights[query, place + token - low]
            for dim in range(len(value)):
                out[query, dim] += weight * value[dim]


@compiled
def _unpack(rows, nbits, table, codes):
    """A tile's codes as floats; `[head_dim, ...]`, what metadata would be as codes behind them. The first lies lowest.

    All bytes are taken: one long loop is faster than many short ones. float8 codes are looked up in `table`.
    """
    packed, to = rows.reshape(-1), codes.reshape(-1)
    if len(table):
        for at in range(len(packed)):
            to[at] = table[packed[at]]
    elif nbits == 8:
        for at in range(len(packed)):
            to[at] = float32(packed[at])
    elif nbits == 4:
        for at in range(len(packed)):
            byte = packed[at]
            to[2 * at] = float32(byte & uint8(15))
            to[2 * at + 1] = float32(byte >> uint8(4))
    else:
        for at in range(len(packed)):
            byte = packed[at]
            to[4 * at] = float32(byte & uint8(3))
            to[4 * at + 1] = float32((byte >> uint8(2)) & uint8(3))
            to[4 * at + 2] = float32((byte >> uint8(4)) & uint8(3))
            to[4 * at + 3] = float32(byte >> uint8(6))


@compiled
def _metadata(rows, code_bytes, step, middle, has_zero, is_bfloat16, scale, zero):
    """Scales and zero points of a tile's groups: of the first and every `step`th, then of the second and so on."""
    halves = rows.view(np.uint16)
    size, at = len(scale) // step, code_bytes // 2
    for part in range(step):
        groups, here = halves[part::step], slice(part * size, (part + 1) * size)
        _widen(groups, at, is_bfloat16, scale[here])
        if has_zero:
            _widen(groups, at + 1, is_bfloat16, zero[here])
    if not has_zero:
        for group in range(len(scale)):
            zero[group] = scale[group] * float32(-middle)


@compiled
def _widen(halves, at, is_bfloat16, out):
    """Column `at` as float32. Numba has no 16-bit floats on a CPU: their bits are moved to where float32 has them.

    In whole numbers throughout: a float32 product with a number below 2**-126 is 0 where denormals are flushed.
    """
    bits = out.view(np.uint32)
    if is_bfloat16:
        for group in range(len(bits)):
            bits[group] = uint32(halves[group, at]) << uint32(16)
        return
    for group in range(len(bits)):
        half = uint32(halves[group, at])
        size = half & uint32(0x7FFF)
        moved = (size << uint32(13)) + uint32((127 - 15) << 23)
        moved = uint32(0x7FC00000) if size >= uint32(0x7C00) else moved  # NaN for infinity too
        below = np.float32(int32(size)) * float32(2.0**-24)  # of a denormal number
        out[group] = below
        bits[group] = (bits[group] if size < uint32(0x0400) else moved) | ((half & uint32(0x8000)) << uint32(16))


@compiled
def _add_weighted(codes, first, step, weights, out):
    """Add groups of codes, the first and every `step`th, to `out`, weighted: `[queries, size]`, by `[queries, groups]`.

    Indices are plain loop variables: of others Numba cannot know that they are not negative, and gives up vectors.
    """
    queries, count = weights.shape
    size, fours, pairs = out.shape[1], count // 4 * 4, queries // 2 * 2
    for index in range(0, fours, 4):  # four at a time: `out` is read and written once for them
        at = first + index * step
        c0, c1, c2, c3 = codes[at], codes[at + step], codes[at + 2 * step], codes[at + 3 * step]
        for query in range(0, pairs, 2):  # two at a time: codes are read once for them
            w, to = weights[query], out[query]
            w0, w1, w2, w3 = w[index], w[index + 1], w[index + 2], w[index + 3]
            x, beside = weights[query + 1], out[query + 1]
            x0, x1, x2, x3 = x[index], x[index + 1], x[index + 2], x[index + 3]
            for code in range(size):
                d0, d1, d2, d3 = c0[code], c1[code], c2[code], c3[code]
                to[code] += w0 * d0 + w1 * d1 + w2 * d2 + w3 * d3
                beside[code] += x0 * d0 + x1 * d1 + x2 * d2 + x3 * d3
        for query in range(pairs, queries):
            w, to = weights[query], out[query]
            w0, w1, w2, w3 = w[index], w[index + 1], w[index + 2], w[index + 3]
            for code in range(size):
                to[code] += w0 * c0[code] + w1 * c1[code] + w2 * c2[code] + w3 * c3[code]
    for index in range(fours, count):
        c0 = codes[first + index * step]
        for query in range(queries):
            w, to = weights[query], out[query]
            for code in range(size):
                to[code] += w[index] * c0[code]


@compiled
def _powers(scores, exponents, summed):
    """Scores become exp(score - top) in place; `summed` gets the top and the sum. Nothing where there is no score.

    2**n exp(f), with exp(f) as Cephes' expf has it, to 2e-7: a call of the C library per number would take longer than
    all the products. `exponents` is room.
    """
    summed[0], summed[1] = float32(-np.inf), float32(0)
    keys, key = exponents, np.int64(-(2**31))
    bits = scores.view(np.int32)
    for token in range(len(scores)):  # as integers: the greatest of floats that may be NaN is found one by one
        keys[token] = bits[token] ^ ((bits[token] >> 31) & 0x7FFFFFFF)
    for token in range(len(scores)):
        key = max(key, np.int64(keys[token]))
    if len(scores) == 0:
        return
    at_top = np.empty(1, np.int32)
    at_top[0] = key ^ ((key >> 31) & 0x7FFFFFFF)
    top = at_top.view(np.float32)[0]
    if top == float32(-np.inf):  # a part of scores that are all minus infinity weighs nothing beside others
        scores[:] = float32(0)
        return
    for token in range(len(scores)):
        x = scores[token] - top
        low = x < float32(-87)
        x = float32(-87) if low else x
        n = np.floor(x * float32(1.44269504) + float32(0.5))
        f = x - n * float32(0.693147182)
        p = float32(1.9875691500e-4)
        p = p * f + float32(1.3981999507e-3)
        p = p * f + float32(8.3334519073e-3)
        p = p * f + float32(4.1665795894e-2)
        p = p * f + float32(1.6666665459e-1)
        p = p * f + float32(5.0000001201e-1)
        scores[token] = float32(0) if low else p * f * f + f + float32(1)
        exponents[token] = (int32(n) + int32(127)) << int32(23)
    powers, total = exponents.view(np.float32), float32(0)
    for token in range(len(scores)):
        scores[token] *= powers[token]
        total += scores[token]
    summed[0], summed[1] = top, total
