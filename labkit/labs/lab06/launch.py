"""Running a kernel that a learner wrote: compiled on a GPU, by Triton's interpreter on a CPU, each address looked at.

The interpreter runs a kernel's lines in NumPy, and reads whatever address they come to: one that is nobody's ends the
process. So here every load and store is compared with the tensors that the kernel was given, before it happens, and
`Stray` says what was meant. Whether `TRITON_INTERPRET` was set when Triton was imported makes no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS: a kernel can be defined, and not run
    triton, tl = None, SimpleNamespace(constexpr=int)

OUT = "out"
MARGIN = 2**20  # bytes around each tensor that belong to no other: what is read there was meant to be in it


class Stray(IndexError):
    """A kernel read or wrote where none of its tensors is. count: addresses of that load or store."""

    def __init__(self, said: str, count: int = 0) -> None:
        super().__init__(said)
        self.count = count


@dataclass
class Memory:
    """The tensors of a launch by name, and which of their numbers were read, as ranges of element indices."""

    tensors: Mapping[str, Tensor]
    reads: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def look(self, addresses: np.ndarray, mask: np.ndarray, *, write: bool = False) -> None:
        """Note what is read; Stray for an address that is not an element of one tensor, or may not be written."""
        wanted = np.broadcast_to(addresses, np.broadcast_shapes(addresses.shape, mask.shape))[
            np.broadcast_to(mask, np.broadcast_shapes(addresses.shape, mask.shape)).astype(bool)
        ].astype(np.int64)
        if not wanted.size:
            return
        verb, name = "written" if write else "read", self.nearest(int(np.median(wanted)))
        if not name:
            raise Stray(f"an address was {verb} that is far from every tensor", wanted.size)
        held, index = self.tensors[name].numel(), (wanted - self.span(name)[0]) // self.tensors[name].element_size()
        if (index < 0).any() or (index >= held).any():
            worst = index[(index < 0) | (index >= held)][0]
            raise Stray(f"number {worst} of {name} was {verb}, which has {held}", wanted.size)
        if write and name != OUT:
            raise Stray(f"{name} was written, not {OUT}")
        self.reads.setdefault(name, []).append(index)

    def nearest(self, address: int) -> str:
        """The tensor that an address is in, or in whose margins; "" when there is none."""
        for name in self.tensors:
            start, end = self.span(name)
            if start - MARGIN <= address < end + MARGIN:
                return name
        return ""

    def span(self, name: str) -> tuple[int, int]:
        """First and last address + 1."""
        start = self.tensors[name].data_ptr()
        return start, start + self.tensors[name].nbytes

    def entries(self, name: str) -> set[int]:
        """Which numbers of a tensor were read."""
        return {int(number) for part in self.reads.get(name, ()) for number in part.ravel()}


def available() -> bool:
    """Whether kernels can be run here: Triton is installed."""
    return triton is not None


def launch(
    kernel: Callable,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    memory: Memory | None = None,
) -> Tensor:
    """`paged_decode`, or a kernel with its parameters, over these tensors: [rows, num_heads, head_dim], like q.

    Shapes as in `paged_attention`. scale: of the scores, 1 / sqrt(head_dim) by default. memory: noted there is what is
    read, on a CPU. Raises RuntimeError without Triton, Stray for an address that is none of the tensors', on a CPU.
    """
    if triton is None:
        raise RuntimeError("Triton is not installed here: it has no build for this system")
    given = {"q": q, "keys": keys, "values": values, "table": block_table, "lengths": lengths}
    tensors = {name: x.contiguous() for name, x in given.items()}
    out = torch.empty_like(tensors["q"])
    rows, num_heads, head_dim = q.shape
    block_size, num_kv_heads = keys.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    numbers = (scale, block_table.shape[1], num_heads, num_kv_heads)
    if q.is_cuda:
        compiled(kernel)[rows, num_heads](*tensors.values(), out, *numbers, HEAD_DIM=head_dim, BLOCK_SIZE=block_size)
        return out
    memory = Memory({}) if memory is None else memory
    memory.tensors = {name: apart(x) for name, x in {**tensors, OUT: out}.items()}
    interpret(kernel, (rows, num_heads), (*memory.tensors.values(), *numbers), (head_dim, block_size), memory)
    return memory.tensors[OUT].clone()


def apart(x: Tensor) -> Tensor:
    """A copy with nothing else within MARGIN bytes. What is not written takes no memory."""
    room = torch.empty(2 * MARGIN + x.nbytes, dtype=torch.uint8)
    return room[MARGIN : MARGIN + x.nbytes].view(x.dtype).view(x.shape).copy_(x)


@cache
def compiled(kernel: Callable) -> Any:
    """The kernel for a GPU."""
    return kernel if hasattr(kernel, "run") else triton.jit(kernel)


def interpret(
    kernel: Callable, grid: tuple[int, int], arguments: tuple, constants: tuple[int, ...], memory: Memory
) -> None:
    """Run every program of the grid, one after the other, in Triton's interpreter."""
    from triton.runtime import interpreter

    kernel = getattr(kernel, "fn", kernel)  # decorated with triton.jit all the same
    converted = [interpreter._implicit_cvt(argument) for argument in arguments]
    silent = np.errstate(all="ignore")  # exp(-inf - -inf) of a row that saw nothing is the kernel's affair
    with silent, plain_language(interpreter), watched(interpreter.interpreter_builder, memory):
        interpreter.interpreter_builder.set_grid_dim(*grid, 1)
        for row in range(grid[0]):
            for head in range(grid[1]):
                interpreter.interpreter_builder.set_grid_idx(row, head, 0)
                kernel(*converted, *constants)


@contextmanager
def plain_language(interpreter: Any) -> Iterator[None]:
    """`tl` as the interpreter has it. Its functions written in Triton itself are replaced too: without
    `TRITON_INTERPRET` they were made for the compiler when Triton was imported."""
    standard = tl.standard
    own = {
        "sum": lambda x, axis=None, keep_dims=False: tl.reduce(x, axis, standard._sum_combine, keep_dims=keep_dims),
        "max": lambda x, axis=None, keep_dims=False: tl.reduce(x, axis, standard._elementwise_max, keep_dims=keep_dims),
        "min": lambda x, axis=None, keep_dims=False: tl.reduce(x, axis, standard._elementwise_min, keep_dims=keep_dims),
        "zeros": lambda shape, dtype: tl.full(shape, 0, dtype),
        "zeros_like": lambda x: tl.full(x.shape, 0, x.dtype),
        "cdiv": lambda x, by: (x + by - 1) // by,
    }
    before = {name: getattr(tl, name) for name in own}
    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl}))
    # A scalar is an array of one element there, which Triton 3.6 hands to int(); NumPy 2.5 refuses that.
    scope.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
    try:
        for name, function in own.items():
            setattr(tl, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(tl, name, function)
        scope.restore()


@contextmanager
def watched(builder: Any, memory: Memory) -> Iterator[None]:
    """Loads and stores of the interpreter, each looked at first. A plain load is a masked one to it; nothing here is
    atomic."""

    def load(ptrs: Any, mask: Any, *rest: Any) -> Any:
        memory.look(ptrs.data, mask.data)
        return type(builder).create_masked_load(builder, ptrs, mask, *rest)

    def store(ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        memory.look(ptrs.data, mask.data, write=True)
        return type(builder).create_masked_store(builder, ptrs, value, mask, *rest)

    def atomic(*arguments: Any) -> Any:
        raise Stray("an atomic operation was used: each program writes numbers of its own")

    mine = {
        "create_masked_load": load, "create_masked_store": store, "create_atomic_cas": atomic,
        "create_atomic_rmw": atomic,
    }  # fmt: skip
    vars(builder).update(mine)
    try:
        yield
    finally:
        for name in mine:
            vars(builder).pop(name, None)
