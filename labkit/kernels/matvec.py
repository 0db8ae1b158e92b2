"""A matrix times one vector, as a Triton kernel that takes the small work around the product along.

A decode step at batch 1 is four such products a layer, and each reads its whole matrix once: the bytes of the weights
over the memory bandwidth are all the time there is to win. So the kernel reads rows of the matrix in 16-byte pieces,
sums in float32, and does in passing what would otherwise be launches of their own: the norm before the product, the
gate or the residual after it.

The norm costs no pass of its own: norm(x) is `x * weight / rms(x)`, so `rms(x)` may divide the finished sums, and it is
summed up beside them. A tensor core is of no use here: every weight is multiplied once.

The twin is `matvec_plain`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from labkit.kernels.decode_step import check, check_alike, gate_plain, shapes

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS: the rest of labkit works without
    triton = None

ENOUGH_PROGRAMS = 4 * 132  # several per multiprocessor of a large GPU, so that their ends do not leave it idle


def matvec(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
    rows: int | None = None,
    block_size: int | None = None,
    num_warps: int | None = None,
) -> Tensor:
    """`F.linear(x, weight, bias)` for one `x`, `[1, in]`: `[1, out]`, in x's dtype, summed in float32.

    weight: `[out, in]`, contiguous. bias: `[out]`. norm: weight `[in]` and eps of an RMS norm of `x` that comes first.
    gated: the rows of `weight` are gate and up, one half below the other, and what comes out is silu(gate) * up,
    `[1, out / 2]`. residual: `[1, out]`, added.
    rows, block_size, num_warps: how much of the matrix one program has at a time, powers of 2; by default by the shape.
    Raises ValueError when shapes, dtypes or sizes do not fit, RuntimeError where Triton cannot run.
    """
    check(x, "matvec_plain")
    columns, outs = check_fits(x, weight, bias, norm, gated, residual)
    guess = sizes(outs, columns, gated)
    rows, block_size = guess[0] if rows is None else rows, guess[1] if block_size is None else block_size
    num_warps = 4 if num_warps is None else num_warps
    if any(size < least or size & (size - 1) for size, least in ((rows, 1), (block_size, 16), (num_warps, 1))):
        raise ValueError(
            f"rows, block_size and num_warps are powers of 2, block_size at least 16; got {rows}, {block_size}, "
            f"{num_warps}"
        )
    out = x.new_empty(1, outs)
    _matvec_kernel[(triton.cdiv(outs, rows),)](
        x,
        weight,
        x if bias is None else bias,
        x if norm is None else norm[0],
        x if residual is None else residual,
        out,
        0.0 if norm is None else norm[1],
        OUTS=outs,
        COLUMNS=columns,
        ROWS=rows,
        BLOCK=block_size,
        EVEN=outs % rows == 0 and columns % block_size == 0,
        BIAS=bias is not None,
        NORM=norm is not None,
        GATED=gated,
        RESIDUAL=residual is not None,
        num_warps=num_warps,
    )
    return out


def matvec_plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """The same in PyTorch, for any number of rows of `x`."""
    if norm is not None:
        x = F.rms_norm(x, norm[0].shape, *norm)
    out = F.linear(x, weight, bias)
    out = gate_plain(out) if gated else out
    return out if residual is None else residual + out


def sizes(outs: int, columns: int, gated: bool = False) -> tuple[int, int]:
    """Rows of the result, and columns, that one program has at a time: as many rows as leave enough programs."""
    most = 4 if gated else 8
    rows = next((rows for rows in (8, 4, 2) if rows <= most and outs >= rows * ENOUGH_PROGRAMS), 1)
    block = 1024 if rows == 1 else 512
    return rows, min(block, max(16, triton.next_power_of_2(columns)))


def check_fits(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor, float] | None,
    gated: bool,
    residual: Tensor | None,
) -> tuple[int, int]:
    """Columns of the matrix and numbers in the result; ValueError for what does not fit."""
    if x.dim() != 2 or len(x) != 1 or weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"x is [1, in] and weight [out, in]; got {shapes(x, weight)}")
    outs, columns = weight.shape
    if gated and (outs % 2 or bias is not None):
        raise ValueError(f"gate and up are halves of the rows, without a bias; got weight {shapes(weight)}")
    outs = outs // 2 if gated else outs
    for name, other, shape in (
        ("bias", bias, (outs,)),
        ("the norm's weight", None if norm is None else norm[0], (columns,)),
        ("residual", residual, (1, outs)),
    ):
        if other is not None:
            if tuple(other.shape) != shape:
                raise ValueError(f"{name} is {list(shape)} here; got {shapes(other)}")
            check_alike(x, other)
    check_alike(x, weight)
    return columns, outs


if triton is not None:

    @triton.jit
    def _matvec_kernel(
        x_ptr, weight_ptr, bias_ptr, norm_ptr, residual_ptr, out_ptr, eps,
        OUTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
        BIAS: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    ):  # fmt: skip
        """ROWS numbers of the result."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        here = row < OUTS
        at = weight_ptr + row[:, None].to(tl.int64) * COLUMNS
        up_at = at + OUTS * COLUMNS
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
        ups = tl.zeros([ROWS, BLOCK], tl.float32)
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, COLUMNS, BLOCK):
            column = start + tl.arange(0, BLOCK)
            if EVEN:
                weight = tl.load(at + column[None, :], eviction_policy="evict_first")
                x = tl.load(x_ptr + column).to(tl.float32)
            else:
                inside = column < COLUMNS
                wanted = here[:, None] & inside[None, :]
                weight = tl.load(at + column[None, :], mask=wanted, other=0.0, eviction_policy="evict_first")
                x = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
            if GATED:
                if EVEN:
                    up = tl.load(up_at + column[None, :], eviction_policy="evict_first")
                else:
                    up = tl.load(up_at + column[None, :], mask=wanted, other=0.0, eviction_policy="evict_first")
            if NORM:
                squares += x * x
                if EVEN:
                    x *= tl.load(norm_ptr + column).to(tl.float32)
                else:
                    x *= tl.load(norm_ptr + column, mask=inside, other=0.0).to(tl.float32)
            sums += weight.to(tl.float32) * x[None, :]
            if GATED:
                ups += up.to(tl.float32) * x[None, :]
        out = tl.sum(sums, axis=1)
        if NORM:
            factor = tl.rsqrt(tl.sum(squares, axis=0) / COLUMNS + eps)
            out *= factor
        if BIAS:
            out += tl.load(bias_ptr + row, mask=here, other=0.0).to(tl.float32)
        if GATED:
            rises = tl.sum(ups, axis=1)
            if NORM:
                rises *= factor
            out = out * tl.sigmoid(out) * rises
        if RESIDUAL:
            out += tl.load(residual_ptr + row, mask=here, other=0.0).to(tl.float32)
        tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty), mask=here)
