"""Loops over 64 numbers at once, for Numba's functions, written in LLVM's own terms.

Numba turns a loop into vectors only where it can prove that what is written does not lie on top of what is read, and
between arrays it cannot. Here the sums stay in registers. LLVM cuts 64 numbers into vectors as the processor has them.

What is read is float32, or bfloat16, which is the upper half of float32's bits. Sums are float32.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 64
FLOATS, WORDS, HALVES = (ir.VectorType(kind, LANES) for kind in (ir.FloatType(), ir.IntType(32), ir.IntType(16)))
inlined: Any = intrinsic
FUSED = ("contract",)  # a product and a sum may be rounded once


@inlined
def number(typing: Any, x: Any, index: Any) -> Any:
    """A number of a float32 array, or of a uint16 one that holds bfloat16, as float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        loaded = builder.load(builder.gep(data, [args[1]]))
        if x.dtype == types.float32:
            return loaded
        word = builder.zext(loaded, ir.IntType(32))
        return builder.bitcast(builder.shl(word, word.type(16)), ir.FloatType())

    return types.float32(x, types.intp), generate


@inlined
def put(typing: Any, x: Any, index: Any, value: Any) -> Any:
    """The same way back: to bfloat16 by rounding to the nearest, and to the even one of two as near."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        rounded = args[2]
        if x.dtype != types.float32:
            bits = builder.bitcast(args[2], ir.IntType(32))
            half = builder.lshr(bits, bits.type(16))
            nearest = builder.add(builder.add(bits, bits.type(0x7FFF)), builder.and_(half, bits.type(1)))
            is_nan = builder.fcmp_unordered("uno", args[2], args[2])
            half = builder.select(is_nan, bits.type(0x7FC0), builder.lshr(nearest, bits.type(16)))
            rounded = builder.trunc(half, ir.IntType(16))
        builder.store(rounded, builder.gep(data, [args[1]]))
        return context.get_dummy_value()

    return types.void(x, types.intp, types.float32), generate


@inlined
def multiply(typing: Any, blocks: Any, block: Any, x: Any, sums: Any) -> Any:
    """`sums`, float32 `[64]`: a block of a weight times `x`, float32 `[columns]`, column after column.

    blocks: `[blocks, columns, 64]`, contiguous, float32; or, of bfloat16, uint32 `[blocks, columns / 2, 64]`, with the
    even column of two in the low half.
    """
    paired = blocks.dtype == types.uint32

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        weight, row, out = (context.make_array(signature.args[at])(context, builder, args[at]) for at in (0, 2, 3))
        _, columns, lanes = cgutils.unpack_tuple(builder, weight.shape, 3)
        begin = builder.gep(weight.data, [builder.mul(args[1], builder.mul(columns, lanes))])
        total = sum_of(builder, ir.Constant(FLOATS, None))
        with cgutils.for_range(builder, columns) as loop:
            at = builder.gep(begin, [builder.mul(loop.index, lanes)])
            if paired:
                loaded, even = load(builder, at, WORDS), builder.mul(loop.index, loop.index.type(2))
                odd = builder.bitcast(builder.and_(loaded, ir.Constant(WORDS, [0xFFFF0000] * LANES)), FLOATS)
                add(builder, total, upper(builder, loaded), spread(builder, row.data, even))
                add(builder, total, odd, spread(builder, row.data, builder.add(even, even.type(1))))
            else:
                add(builder, total, load(builder, at, FLOATS), spread(builder, row.data, loop.index))
        store(builder, out.data, builder.load(total))
        return context.get_dummy_value()

    return types.void(blocks, types.intp, x, sums), generate


def score_rows(halves: bool) -> Any:
    """The function `(address, stride, x, scores, place, count)`, compiled into its caller.

    `scores[place:place + count]` become the products of `x`, float32 `[a multiple of 64]`, with `count` rows: the first
    begins at `address`, each next one `stride` bytes on.
    """

    @inlined
    def products(typing: Any, address: Any, stride: Any, x: Any, scores: Any, place: Any, count: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, to = (context.make_array(signature.args[at])(context, builder, args[at]) for at in (2, 3))
            (size,) = cgutils.unpack_tuple(builder, x.shape, 1)
            kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), FLOATS])
            summed = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
            with cgutils.for_range(builder, args[5]) as row:
                begin = builder.add(args[0], builder.mul(row.index, args[1]))
                total = sum_of(builder, ir.Constant(FLOATS, None))
                with pieces(builder, size) as (first, _):
                    numbers = read(builder, begin, first, halves)
                    add(builder, total, numbers, load(builder, builder.gep(x.data, [first]), FLOATS))
                score = builder.call(summed, [ir.FloatType()(0.0), builder.load(total)], fastmath=("reassoc",))
                builder.store(score, builder.gep(to.data, [builder.add(args[4], row.index)]))
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, x, scores, types.intp, types.intp), generate

    return products


def blend_rows(halves: bool) -> Any:
    """The function `(address, stride, weights, place, count, out)`, compiled into its caller.

    `count` rows, which lie as for `score_rows`, are added to `out`, float32 `[a multiple of 64]`, times
    `weights[place:place + count]`.
    """

    @inlined
    def sums(typing: Any, address: Any, stride: Any, weights: Any, place: Any, count: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            weights, out = (context.make_array(signature.args[at])(context, builder, args[at]) for at in (2, 5))
            (size,) = cgutils.unpack_tuple(builder, out.shape, 1)
            with pieces(builder, size) as (first, _):
                to = builder.gep(out.data, [first])
                total = sum_of(builder, load(builder, to, FLOATS))
                with cgutils.for_range(builder, args[4]) as row:
                    begin = builder.add(args[0], builder.mul(row.index, args[1]))
                    weight = spread(builder, weights.data, builder.add(args[3], row.index))
                    add(builder, total, read(builder, begin, first, halves), weight)
                store(builder, to, builder.load(total))
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, weights, types.intp, types.intp, out), generate

    return sums


def pieces(builder: Any, size: Any) -> Any:
    """A loop over `size`, 64 at a time: where each begins."""
    return cgutils.for_range_slice(builder, size.type(0), size, size.type(LANES), size.type)


def read(builder: Any, address: Any, first: Any, halves: bool) -> Any:
    """64 numbers as float32: from number `first` of a row that begins at `address`."""
    kind = ir.IntType(16) if halves else ir.FloatType()
    at = builder.gep(builder.inttoptr(address, kind.as_pointer()), [first])
    if not halves:
        return load(builder, at, FLOATS)
    return upper(builder, builder.zext(load(builder, at, HALVES), WORDS))


def upper(builder: Any, words: Any) -> Any:
    """What the lower halves of words say in bfloat16, as float32."""
    return builder.bitcast(builder.shl(words, ir.Constant(WORDS, [16] * LANES)), FLOATS)


def load(builder: Any, at: Any, kind: Any) -> Any:
    """64 numbers; a vector's memory need not lie at a multiple of its size, as LLVM would take for granted."""
    return builder.load(builder.bitcast(at, kind.as_pointer()), align=2 if kind is HALVES else 4)


def store(builder: Any, at: Any, numbers: Any) -> None:
    """64 numbers, back to memory."""
    builder.store(numbers, builder.bitcast(at, FLOATS.as_pointer()), align=4)


def spread(builder: Any, data: Any, index: Any) -> Any:
    """One number of an array, 64 times."""
    one = builder.insert_element(
        ir.Constant(FLOATS, ir.Undefined), builder.load(builder.gep(data, [index])), ir.IntType(32)(0)
    )
    return builder.shuffle_vector(one, one, ir.Constant(WORDS, None))


def sum_of(builder: Any, beginning: Any) -> Any:
    """64 sums. They are variables here, and registers once LLVM has looked at them."""
    total = cgutils.alloca_once(builder, FLOATS)
    builder.store(beginning, total)
    return total


def add(builder: Any, total: Any, numbers: Any, others: Any) -> None:
    """Add products to sums."""
    product = builder.fmul(numbers, others, flags=FUSED)
    builder.store(builder.fadd(builder.load(total), product, flags=FUSED), total)
