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


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, the same on every device: drawn on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def agree(got: Any, want: Tensor, tolerance: float = TIGHT, *, nan: bool = False) -> bool:
    """Whether `got` is a tensor of `want`'s shape, within `tolerance` of it everywhere; 0: equal, whatever the dtypes.

    Infinities have to be the same ones. NaN agrees with nothing, or with NaN where `nan` is true.
    """
    if not isinstance(got, Tensor) or got.shape != want.shape:
        return False
    if tolerance == 0:
        same = got == want
        return bool((same | ((got != got) & (want != want)) if nan else same).all())
    return torch.allclose(got.double(), want.double(), rtol=0.0, atol=tolerance, equal_nan=nan)


def near(got: Any, want: Tensor, ratio: float = 1e-3) -> bool:
    """Whether `got` is `want` everywhere, within `ratio` of its largest number.

    Bounded, and wide on purpose: 1e-3 is far above what float32 rounding or a small eps in a scale makes, and far below
    what tells one rule for a scale from the next (1 in 256 at 8 bits).
    """
    return agree(got, want, ratio * want.double().abs().max().item())


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
