"""What the checks of lab 05 share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from labkit.course.exercise import Exercise

Known = Mapping[str, tuple[bool, str, str]]  # diagnosis: whether it fits, the cause, where to look


def name_it(exercise: type[Exercise], known: Known, seen: str) -> None:
    """Fail with the first of `known` that fits."""
    for diagnosis, (fits, cause, look) in known.items():
        if fits:
            exercise.fail(diagnosis, seen=seen, cause=cause, look=look)


def near(got: Tensor, want: Tensor, ratio: float = 1e-3) -> bool:
    """Whether `got` is `want` everywhere, within `ratio` of its largest number.

    Bounded, and wide on purpose: 1e-3 is far above what float32 rounding or a small eps in a scale makes, and far below
    what tells one rule for a scale from the next (1 in 256 at 8 bits).
    """
    return got.shape == want.shape and bool((got - want).abs().max() <= ratio * want.abs().max())


def broken(x: Tensor, quantized: tuple[Tensor, Tensor, Tensor], nbits: int) -> Tensor:
    """Which groups break a promise, bool [...]: codes in range, both ends used, errors of half a scale at most.

    Bounded: half a scale, and what rounding of the dtype adds to scale, zero and each of the last code's steps.
    """
    last, eps = 2**nbits - 1, torch.finfo(x.dtype).eps
    codes, scale, zero = (part.double() for part in quantized)
    error = (codes * scale + zero - x.double()).abs()
    bound = (0.5 + 4 * last * eps) * scale.abs() + 2 * eps * x.double().abs().amax(-1, keepdim=True)
    least, greatest = (codes.gather(-1, pick(-1, keepdim=True)) for pick in (x.argmin, x.argmax))
    return ((codes > last) | (least != 0) | (greatest != last) | (error > bound)).any(-1)


class NaNAs255(TorchDispatchMode):
    """A machine that makes 255 of a NaN converted to uint8. C leaves it open: others make 0 of it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {torch.ops.aten._to_copy.default: 0, torch.ops.aten.copy_.default: 1}.get(func)
        if given is not None and result.dtype == torch.uint8 and args[given].is_floating_point():
            result.masked_fill_(args[given].isnan(), 255)
        return result
