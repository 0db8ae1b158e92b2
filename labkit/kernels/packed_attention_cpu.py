"""`packed_decode_attention` for a CPU: loops over the packed bytes, compiled by Numba when they are first called.

PyTorch has no operation that multiplies by numbers of 4 or 2 bits, so `packed_attention` first writes the numbers of a
block out, 8 or 16 times the bytes that were read. Here a tile is spread to one code a byte, in a buffer that stays in
the core's fastest cache and is overwritten by the next, and codes become floats in registers. Between the loop over K
and the loop over V lies an ordinary softmax.

The other thing that makes it fast is where the metadata goes. A sum of groups, each weighted, is
`sum(weight * (code * scale + zero)) = sum((weight * scale) * code) + sum(weight * zero)`: one multiplication per code.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy import float32, int32, uint16, uint32
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from labkit.attention import PLAIN, Constants, Visibility
from labkit.kernels.packed_attention import Dense, check_packed, wants_gradient
from labkit.quantization import Packed, Quantizer

# LLVM may regroup sums, which lets it use vectors, but not assume that there is no NaN.
compiled: Any = njit(nogil=True, fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")


def takes(q: Tensor, k: Packed, v: Packed) -> bool:
    """Whether these loops answer: one new token on a CPU, whole codes, keys per channel, and no gradient wanted."""
    if q.device.type != "cpu" or q.shape[2] != 1 or q.dtype == torch.float64 or wants_gradient(q):
        return False
    keys, values = k.quantizer, v.quantizer
    one_format = (keys.nbits, keys.symmetric, keys.metadata) == (values.nbits, values.symmetric, values.metadata)
    axes = (keys.axis, values.axis)
    return isinstance(keys.nbits, int) and one_format and axes == ("channel", "token") and sys.byteorder == "little"


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
    """`packed_attention` of one new token per row where `takes` says so, on one core; its twin's arguments.

    Raises ValueError when shapes, formats or sizes do not fit. It has no backward pass.
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
            "cap, and keys per channel and values per token of one format of 8, 4 or 2 bits; "
            f"got q {list(q.shape)}, {q.dtype}, {k.quantizer} and {v.quantizer}. packed_attention takes all of these"
        )
    batch, heads, head_dim = k.rows.shape[1:4]
    rows = (q.reshape(batch, heads, -1, head_dim).float() * constants.scale_for(head_dim)).contiguous()
    turned = rows if rotation is None else rows @ rotation.to(rows.dtype)
    first, _ = visible.bounds(constants, batch, q.device)
    nothing = rows.new_empty(batch, heads, 0, head_dim)
    (first_k, first_v), (last_k, last_v) = (
        (nothing, nothing) if pair is None else [x.float().contiguous() for x in pair] for pair in (before, after)
    )
    tokens = first_k.shape[2] + k.num_tokens + last_k.shape[2]
    scores, out = rows.new_empty(batch, heads, rows.shape[2], tokens), torch.zeros_like(rows)
    given = (rows, turned, first, k.rows.contiguous(), v.rows.contiguous(), first_k, first_v, last_k, last_v)
    _attend(*(x.detach().numpy() for x in (*given, scores, out)), *settings(k.quantizer))
    return out.to(q.dtype).view(q.shape)


def settings(x: Quantizer) -> tuple[int, int, int, int, bool, bool]:
    """What the loops must know of a format."""
    assert isinstance(x.nbits, int)
    return x.nbits, x.group_size, x.code_bytes, x.middle, x.has_zero, x.metadata == torch.bfloat16


@compiled
def _attend(
    rows, turned, first, k_rows, v_rows, first_k, first_v, last_k, last_v, scores, out,
    nbits, group, code_bytes, middle, has_zero, is_bfloat16,
):  # fmt: skip
    """Everything, into `scores` and `out`."""
    tiles, _, _, dims, row_bytes = k_rows.shape
    k_halves, v_halves = k_rows.view(np.uint16), v_rows.view(np.uint16)  # scales and zero points are in 16 bits
    room = np.empty((dims, row_bytes * 8 // nbits), np.uint8)
    scale, zero = np.empty(dims, np.float32), np.empty(dims, np.float32)
    scaled, some = np.empty((rows.shape[2], dims), np.float32), np.empty((rows.shape[2], group), np.float32)
    scaled_v = np.empty((rows.shape[2], group), np.float32)
    sinks = first_k.shape[2]
    for row in range(len(rows)):
        for head in range(rows.shape[1]):
            q, to = rows[row, head], scores[row, head]
            _score_dense(q, first_k[row, head], 0, to)
            _score_dense(q, last_k[row, head], sinks + tiles * group, to)
    for tile in range(tiles):
        for row in range(len(rows)):
            for head in range(rows.shape[1]):
                codes = _unpack(k_rows[tile, row, head], nbits, room)
                _metadata(k_halves[tile, row, head], code_bytes // 2, 1, middle, has_zero, is_bfloat16, scale, zero)
                _score(turned[row, head], codes, scale, zero, scaled, some, scores[row, head], sinks + tile * group)
    for row in range(len(rows)):
        for head in range(rows.shape[1]):
            _softmax(scores[row, head], first[row])
    for tile in range(tiles):
        for row in range(len(rows)):
            for head in range(rows.shape[1]):
                codes = _unpack(v_rows[tile, row, head], nbits, room)
                _metadata(
                    v_halves[tile, row, head],
                    code_bytes // 2,
                    dims // group,
                    middle,
                    has_zero,
                    is_bfloat16,
                    scale,
                    zero,
                )
                _blend(scores[row, head], sinks + tile * group, codes, scale, zero, scaled_v, some, out[row, head])
    for row in range(len(rows)):
        for head in range(rows.shape[1]):
            weights, to = scores[row, head], out[row, head]
            _blend_dense(weights, 0, first_v[row, head], to)
            _blend_dense(weights, sinks + tiles * group, last_v[row, head], to)


@compiled
def _score(rows, codes, scale, zero, scaled, some, scores, place):
    """Scores of a tile's tokens: its channels, weighted by the query and summed. `scaled` and `some` are room."""
    queries, dims = rows.shape
    for query in range(queries):
        q, offset = rows[query], float32(0)
        for dim in range(dims):
            scaled[query, dim] = q[dim] * scale[dim]
            offset += q[dim] * zero[dim]
        for token in range(some.shape[1]):
            some[query, token] = offset
    _add_weighted(codes, 0, 1, scaled, some)
    for query in range(queries):
        to = scores[query, place : place + some.shape[1]]
        for token in range(len(to)):
            to[token] = some[query, token]


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
def _score_dense(rows, keys, place, scores):
    """Scores of tokens in full precision."""
    for token in range(len(keys)):
        key = keys[token]
        for query in range(len(rows)):
            row, score = rows[query], float32(0)
            for dim in range(len(key)):
                score += row[dim] * key[dim]
            scores[query, place + token] = score


@compiled
def _blend_dense(weights, place, values, out):
    """Sums of values in full precision."""
    for token in range(len(values)):
        value = values[token]
        for query in range(len(out)):
            weight = weights[query, place + token]
            for dim in range(len(value)):
                out[query, dim] += weight * value[dim]


@compiled
def _unpack(rows, nbits, room):
    """A tile's codes, one to a byte, in `room` if they are not so already; `[head_dim, ...]`, metadata behind them.

    The codes of a byte are spread over 2 or 4 bytes by shifting copies of it, then masking: the first lies lowest. All
    bytes are taken, metadata too: one long loop is faster than many short ones.
    """
    packed = rows.reshape(-1)
    if nbits == 8:
        return rows
    if nbits == 4:
        pairs = room.reshape(-1).view(np.uint16)
        for at in range(len(packed)):
            byte = uint16(packed[at])
            pairs[at] = (byte | uint16(byte << uint16(4))) & uint16(0x0F0F)
    else:
        fours = room.reshape(-1).view(np.uint32)
        for at in range(len(packed)):
            twice = uint32(packed[at]) | uint32(packed[at]) << uint32(12)
            fours[at] = (twice | twice << uint32(6)) & uint32(0x03030303)
    return room


@compiled
def _metadata(halves, at, step, middle, has_zero, is_bfloat16, scale, zero):
    """Scales and zero points of a tile's groups: of the first and every `step`th, then of the second and so on."""
    size = len(scale) // step
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
    """Column `at` as float32. Numba has no 16-bit floats on a CPU: their bits are moved to where float32 has them."""
    bits = out.view(np.uint32)
    if is_bfloat16:
        for group in range(len(bits)):
            bits[group] = uint32(halves[group, at]) << uint32(16)
        return
    for group in range(len(bits)):
        half = uint32(halves[group, at])
        moved = ((half & uint32(0x8000)) << uint32(16)) | ((half & uint32(0x7FFF)) << uint32(13))
        bits[group] = uint32(0x7FC00000) if (half & uint32(0x7C00)) == uint32(0x7C00) else moved  # NaN for infinity too
    for group in range(len(bits)):
        out[group] *= float32(2.0**112)  # exponents count from -15 there, from -127 here


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
        for query in range(0, pairs, 2):  # two at a time: codes are read and made floats once for them
            w, to = weights[query], out[query]
            w0, w1, w2, w3 = w[index], w[index + 1], w[index + 2], w[index + 3]
            x, beside = weights[query + 1], out[query + 1]
            x0, x1, x2, x3 = x[index], x[index + 1], x[index + 2], x[index + 3]
            for code in range(size):
                d0, d1, d2, d3 = float32(c0[code]), float32(c1[code]), float32(c2[code]), float32(c3[code])
                to[code] += w0 * d0 + w1 * d1 + w2 * d2 + w3 * d3
                beside[code] += x0 * d0 + x1 * d1 + x2 * d2 + x3 * d3
        for query in range(pairs, queries):
            w, to = weights[query], out[query]
            w0, w1, w2, w3 = w[index], w[index + 1], w[index + 2], w[index + 3]
            for code in range(size):
                some = w0 * float32(c0[code]) + w1 * float32(c1[code])
                to[code] += some + w2 * float32(c2[code]) + w3 * float32(c3[code])
    for index in range(fours, count):
        c0 = codes[first + index * step]
        for query in range(queries):
            w, to = weights[query], out[query]
            for code in range(size):
                to[code] += w[index] * float32(c0[code])


@compiled
def _softmax(scores, first):
    """In place; tokens before `first` weigh nothing, and of a row in which all are hidden none does."""
    queries, tokens = scores.shape
    first = min(max(first, 0), tokens)
    exponents = np.empty(tokens - first, np.int32)
    for query in range(queries):
        scores[query, :first] = float32(0)
        _softmax_row(scores[query, first:], exponents)


@compiled
def _softmax_row(scores, exponents):
    """exp(score - top) over their sum: 2**n exp(f), with exp(f) as Cephes' expf has it, to 2e-7.

    A call of the C library per number would take longer than all the sums.
    """
    keys, key = exponents, np.int64(-(2**31))
    bits = scores.view(np.int32)
    for token in range(len(scores)):  # as integers: the greatest of floats that may be NaN is found one by one
        keys[token] = bits[token] ^ ((bits[token] >> 31) & 0x7FFFFFFF)
    for token in range(len(scores)):
        key = max(key, np.int64(keys[token]))
    at_top = np.empty(1, np.int32)
    at_top[0] = key ^ ((key >> 31) & 0x7FFFFFFF)
    top = at_top.view(np.float32)[0]
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
    for token in range(len(scores)):
        scores[token] /= total
