"""Tensors: random ones to try answers with, whether two agree, and bytes counted below the functions one calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from labkit.ledger import memory_of, tensors_in

TIGHT = 1e-9  # bounded: float64 sums of fewer than 200 terms of order 1 differ by less than 1e-12 between orders
LOOSE = 1e-4  # bounded: float32 sums of fewer than 200 terms of order 1


def heads(num_heads: int, num_kv_heads: int, new: int, held: int, *, batch: int = 2, head_dim: int = 8) -> list[Tensor]:
    """Random float64 q, k and v: `new` tokens' queries, and keys and values of these and of `held` before them."""
    shapes = ((num_heads, new), (num_kv_heads, new + held), (num_kv_heads, new + held))
    return [torch.randn(batch, count, tokens, head_dim, dtype=torch.float64) for count, tokens in shapes]


def agree(got: Tensor, want: Tensor, tolerance: float = TIGHT) -> bool:
    """Whether two tensors of one shape agree within `tolerance`; NaN agrees with nothing."""
    return got.shape == want.shape and bool((got - want).abs().max() <= tolerance)


class Made(TorchDispatchMode):
    """Counts the bytes of every new tensor that PyTorch's kernels make, below the functions that one calls."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        before = {memory_of(tensor) for tensor in tensors_in((args, dict(kwargs or {})))}
        result = func(*args, **(kwargs or {}))
        self.nbytes += sum(tensor.nbytes for tensor in tensors_in(result) if memory_of(tensor) not in before)
        return result


def bytes_made(run: Callable[[], Any]) -> int:
    """Bytes of all tensors that `run()` makes, those included that PyTorch makes inside one function.

    The work ledger counts the functions that are called; this counts what they do.
    """
    with Made() as made:
        run()
    return made.nbytes
