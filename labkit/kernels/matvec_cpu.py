"""`matvec` for a CPU: a prepacked weight times one row, in loops that Numba compiles when they are first needed.

oneDNN lays a weight out in blocks of 64 rows, column after column, so that a product with many rows of input keeps its
sums in registers. With one row it reads those blocks at about three quarters of the speed at which memory gives them.
Here each column of a block is one load of 64 numbers and one multiplication, nothing else, and that runs as fast as
memory does. The norm before the product, the gate and the residual after it are done in passing, as on a GPU.

Threads are Numba's, of OpenMP: they are awake within microseconds, and a product takes fifty. Every block is summed by
one thread, so their number changes no bit.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import prange
from numpy import float32
from torch import Tensor

from labkit.kernels import threads
from labkit.kernels.packed_attention_cpu import compiled
from labkit.kernels.threads import shared_out
from labkit.kernels.vectors import LANES, multiply, number, put

DTYPES = (torch.float32, torch.bfloat16)
NOTHING = {torch.float32: np.empty(0, np.float32), torch.bfloat16: np.empty(0, np.uint16)}


def in_blocks(weight: Tensor) -> Tensor:
    """A weight `[outs, columns]` as the loops read it: `[outs / 64, columns, 64]`, float32.

    Of bfloat16 two columns lie together, `[outs / 64, columns / 2, 64, 2]`, in one word of 32 bits each.
    """
    together = () if weight.dtype == torch.float32 else (2,)
    return weight.view(len(weight) // LANES, LANES, -1, *together).transpose(1, 2).contiguous()


class Blocks:
    """A weight as the loops read it, with its bias.

    laid: as `in_blocks` has it, contiguous, on a CPU. bias: `[outs]`, of its dtype. owner: whatever must live as long.
    Raises ValueError for what does not fit.
    """

    def __init__(self, laid: Tensor, bias: Tensor | None = None, owner: Any = None) -> None:
        self.dtype, self.bias, self.owner = laid.dtype, bias, laid if owner is None else owner
        ends = (LANES,) if laid.dtype == torch.float32 else (LANES, 2)
        fits = laid.dtype in DTYPES and laid.shape[2:] == ends and laid.is_contiguous() and laid.numel() > 0
        if not fits or laid.device.type != "cpu":
            raise ValueError(
                f"a weight in blocks is float32 or bfloat16, contiguous, as in_blocks lays it out, on a CPU; got "
                f"{laid.dtype} {list(laid.shape)} on {laid.device}"
            )
        self.outs, self.columns = len(laid) * LANES, laid[0].numel() // LANES
        if bias is not None and (bias.shape != (self.outs,) or bias.dtype != laid.dtype):
            raise ValueError(
                f"the bias of {self.outs} outputs is {laid.dtype} [{self.outs}]; got {bias.dtype} {list(bias.shape)}"
            )
        whole = laid.detach() if len(ends) == 1 else laid.detach().view(torch.int32)[..., 0]
        self.numbers = whole.numpy() if len(ends) == 1 else whole.numpy().view(np.uint32)

    def outs_of(self, gated: bool) -> int:
        """Entries of a product; 0 where gate and up do not fill blocks of their own."""
        whole = self.outs % (2 * LANES) == 0
        return (self.outs // 2 if whole else 0) if gated else self.outs


def matvec_cpu(
    x: Tensor,
    weight: Blocks,
    *,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """`F.linear(x, weight, bias)` for the one row of `x`, `[..., in]`: `[..., out]`, in x's dtype, summed in float32.

    norm: weight `[in]` and eps of an RMS norm of `x` that comes first. gated: the rows of the weight are gate and up,
    one half below the other, and what comes out is silu(gate) * up, `[..., out / 2]`. residual: `[..., out]`, added.
    It takes the threads that PyTorch does, and gives the same numbers with any number of them. It has no backward pass.
    Raises ValueError when shapes, dtypes or sizes do not fit. The twin is `matvec_plain`.
    """
    outs = weight.outs_of(gated)
    made = (*x.shape[:-1], outs)
    if (
        x.dim() == 0
        or not x.numel() == x.shape[-1] == weight.columns
        or not outs
        or (norm is not None and norm[0].shape != (weight.columns,))
        or (residual is not None and residual.shape != made)
    ):
        raise ValueError(
            f"a weight of [{weight.outs}, {weight.columns}] takes one row of {weight.columns}, a norm of as many, a "
            f"residual of {list(made)}, and is gated in multiples of {LANES}; got {list(x.shape)}, "
            f"{None if norm is None else list(norm[0].shape)}, {None if residual is None else list(residual.shape)}"
        )
    scale, eps = (None, 0.0) if norm is None else norm
    row, scaled, bias, added = (numbers(y, weight.dtype) for y in (x, scale, weight.bias, residual))
    loops = warm_up(weight.dtype)
    threads.as_torch()
    out = torch.empty(made, dtype=weight.dtype)
    loops(weight.numbers, row, scaled, float32(eps), bias, added, gated, numbers(out, weight.dtype))
    return out


def numbers(x: Tensor | None, dtype: torch.dtype) -> Any:
    """All of a tensor one after the other, as float32, or as the bits of bfloat16; nothing of None."""
    if x is None:
        return NOTHING[dtype]
    if x.dtype != dtype or x.device.type != "cpu":
        raise ValueError(f"the weight is {dtype} on a CPU, what goes with it {x.dtype} on {x.device}: they must agree")
    x = x.detach().contiguous()
    if dtype == torch.float32:
        return x.numpy().reshape(-1)
    return x.view(torch.int16).numpy().view(np.uint16).reshape(-1)


LOCK = threading.Lock()


def warm_up(dtype: torch.dtype) -> Callable[..., None]:
    """The compiled loops, one set for all shapes: two seconds when a process first calls it for a dtype, then nothing.

    Call it before timing a step.
    """
    with LOCK:
        return _compiled(dtype)


@functools.cache
def _compiled(dtype: torch.dtype) -> Callable[..., None]:
    few, out = numbers(torch.zeros(2, dtype=dtype), dtype), numbers(torch.zeros(LANES, dtype=dtype), dtype)
    blocks = Blocks(in_blocks(torch.zeros(LANES, 2, dtype=dtype)))
    _matvec(blocks.numbers, few, few, float32(1), out, out, False, out)
    return _matvec


@shared_out
def _matvec(blocks, x, norm, eps, bias, residual, gated, out):
    """`out` of one row; an array that is empty is not asked for."""
    turned = _normed(x, norm, eps)
    for block in prange(len(out) // LANES):
        _fill(blocks, np.int64(block), turned, bias, residual, gated, out)


@compiled
def _normed(x, norm, eps):
    """`x` in float32, divided by its root mean square and times `norm` where there is one."""
    total, out = float32(0), np.empty(len(x), np.float32)
    for column in range(len(x)):
        out[column] = number(x, column)
    if len(norm):
        for column in range(len(x)):
            total += out[column] * out[column]
        factor = float32(1) / float32(math.sqrt(total / float32(len(x)) + eps))
        for column in range(len(x)):
            out[column] *= factor * number(norm, column)
    return out


@compiled
def _fill(blocks, block, x, bias, residual, gated, out):
    """One block of `out`."""
    at, sums = block * LANES, np.empty(LANES, np.float32)
    multiply(blocks, block, x, sums)
    _add(sums, bias, at)
    if gated:
        up = np.empty(LANES, np.float32)
        multiply(blocks, block + len(out) // LANES, x, up)
        _add(up, bias, at + len(out))
        for lane in range(LANES):
            sums[lane] *= up[lane] / (float32(1) + float32(math.exp(-sums[lane])))
    _add(sums, residual, at)
    for lane in range(LANES):
        put(out, at + lane, sums[lane])


@compiled
def _add(sums, x, at):
    """A block of `x`, where there is one."""
    if len(x):
        for lane in range(LANES):
            sums[lane] += number(x, at + lane)
