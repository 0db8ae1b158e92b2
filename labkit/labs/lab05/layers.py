"""What 05.5 and 05.7 try answers with: tokens that can be told apart, and a quantizer that keeps a list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from labkit.course.exercise import Exercise

Shape = tuple[int, int, int]
SHAPE: Shape = (2, 3, 5)  # batch, heads, head_dim; 32 numbers or fewer
STEP, VALUES = 64.0, 32.0  # from one token's numbers to the next one's; from keys to values
FRACTION = 0.2  # no 16-bit float holds it
CHANGE = 0.25  # what one round through the quantizer adds to every number


def numbered(tokens: Sequence[int], dtype: torch.dtype = torch.float32, shape: Shape = SHAPE) -> Tensor:
    """Keys [batch, heads, tokens, head_dim] in which every number says whose it is: no two alike."""
    batch, heads, head_dim = shape
    places = torch.arange(batch * heads * head_dim, dtype=torch.float64).view(batch, heads, 1, head_dim) + FRACTION
    return (places + STEP * torch.tensor(list(tokens), dtype=torch.float64).view(1, 1, -1, 1)).to(dtype)


def numbered_pair(
    first: int, count: int, dtype: torch.dtype = torch.float32, shape: Shape = SHAPE
) -> tuple[Tensor, Tensor]:
    """K and V of tokens `first` to `first + count - 1`."""
    k = numbered(range(first, first + count), torch.float64, shape)
    return k.to(dtype), (k + VALUES).to(dtype)


def ids(x: Tensor) -> list[int]:
    """Which tokens a tensor of numbered keys or values holds."""
    return (x[0, 0, :, 0].double() // STEP).long().tolist()


def listed(tokens: Sequence[int]) -> str:
    """Tokens in few characters."""
    return str(list(tokens)) if len(tokens) <= 12 else f"[{', '.join(map(str, tokens[:6]))}, ..., {tokens[-1]}]"


def is_values(x: Tensor) -> bool:
    """Whether these are values, not keys."""
    return bool((x % STEP >= VALUES).all()) and x.numel() > 0


def is_restored(x: Tensor) -> bool:
    """Whether some of these numbers went through the quantizer."""
    return x.is_floating_point() and bool(((x.double() % 1 - FRACTION - CHANGE).abs() < 0.01).any())


def fits(x: Any, shape: Shape = SHAPE) -> bool:
    """Whether `x` is a tensor of the numbered tokens' batch, heads and head_dim."""
    return isinstance(x, Tensor) and x.dim() == 4 and (*x.shape[:2], x.shape[3]) == shape


@dataclass(frozen=True, eq=False)
class Form:
    """A quantized group. It has no parts that an answer could use."""

    exercise: type[Exercise]
    k: Tensor
    v: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        self.exercise.fail(
            "opens-the-form",
            seen="what quantize_group returned was taken apart",
            cause="it was taken for a pair of K and V; it is one object, in a form that only restore knows",
            look="where quantize_group is called: keep what it returns, whole, and give it to restore in read",
        )
        yield self.k

    def __getitem__(self, index: Any) -> Tensor:
        return next(iter(self))


class Recorder:
    """quantize_group and restore of one layer. Each round adds `CHANGE`; `given` is what was to be quantized.

    copies: whether a form holds copies of what was given, as real ones do, or the very tensors.
    """

    def __init__(self, exercise: type[Exercise], *, copies: bool = True) -> None:
        self.exercise, self.copies = exercise, copies
        self.given: list[tuple[Tensor, Tensor]] = []
        self.forms: list[Form] = []

    def quantize_group(self, k: Tensor, v: Tensor) -> Form:
        """Keep what was given, and return it as a form."""
        self.given.append((k.clone(), v.clone()))
        self.forms.append(Form(self.exercise, *(x.clone() if self.copies else x for x in (k, v))))
        return self.forms[-1]

    def restore(self, packed: Form) -> tuple[Tensor, Tensor]:
        """The group as it comes back, every number changed."""
        if not isinstance(packed, Form):
            self.exercise.fail(
                "restores-something-else",
                seen=f"restore was given a {type(packed).__name__}, not what quantize_group returned",
                cause="waiting tokens, or a list of groups, went through restore",
                look="read(): restore each group, one by one; waiting tokens are K and V already",
            )
        return packed.k + CHANGE, packed.v + CHANGE
