"""Tensors: random ones to try answers with, whether two agree, and bytes counted below the functions one calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from labkit.course.checks.effort import effort_of

PLAIN = (bool, int, float, complex, str, list, tuple, dict, torch.dtype, torch.device, type(None))
TIGHT = 1e-9  # bounded: float64 sums of fewer than 200 terms of order 1 differ by less than 1e-12 between orders
LOOSE = 1e-4  # bounded: float32 sums of fewer than 200 terms of order 1


def heads(num_heads: int, num_kv_heads: int, new: int, held: int, *, batch: int = 2, head_dim: int = 8) -> list[Tensor]:
    """Random float64 q, k and v: `new` tokens' queries, and keys and values of these and of `held` before them."""
    shapes = ((num_heads, new), (num_kv_heads, new + held), (num_kv_heads, new + held))
    return [torch.randn(batch, count, tokens, head_dim, dtype=torch.float64) for count, tokens in shapes]


SHIFT = [0]  # what `examine` adds to each seed that is written down in a check: 0, or that of hidden cases
SEEDS = 2**32  # seeds are whole numbers below it: NumPy takes no larger ones


def shifted(seed: int) -> int:
    """The seed of a check's own random numbers: another one in every set of hidden cases."""
    return (seed + 1_000_003 * SHIFT[0]) % 2**63


@contextmanager
def cases_of(seed: int) -> Iterator[None]:
    """Inside, a check's random numbers are those of `seed`; 0 afterwards, whatever happened.

    Raises ValueError, with nothing changed, for what is no whole number from 0 to 2**32 - 1.
    """
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= seed < SEEDS:
        raise ValueError(f"the seed of a check is a whole number from 0 to {SEEDS - 1:,}, not {seed!r}")
    SHIFT[0] = int(seed)
    try:
        yield
    finally:
        SHIFT[0] = 0


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, the same on every device: drawn on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shifted(seed)), dtype=torch.float64).to(dtype)


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


def budget(own: Tensor, exact: Tensor) -> float:
    """How far a right answer may be from `exact`, given that the reference, computed in the dtype, gives `own`.

    Bounded: another order of the same operations loses as much as the reference does, within a factor of 8, and a few
    roundings of the largest number: 4 eps of it. exact: the same in float64 from the same inputs. 0 for whole numbers.
    """
    finite = torch.isfinite(exact) & torch.isfinite(own)
    if not own.is_floating_point() or not finite.any():
        return 0.0
    lost = (own.double() - exact.double())[finite].abs().max().item()
    return 8 * lost + 4 * torch.finfo(own.dtype).eps * exact.double()[finite].abs().max().item()


def wrong_places(got: Tensor, want: Tensor, tolerance: float = 0.0) -> Tensor:
    """Where `got` is not `want` within `tolerance`, bool, of their shape. NaN is right where it is wanted only."""
    got, want = got.double(), want.double()
    same = (got == want) | (got.isnan() & want.isnan())
    return ~(same | ((got - want).abs() <= tolerance))


def first_place(got: Tensor, want: Tensor, tolerance: float = 0.0) -> str:
    """The first entry that differs, with digits enough to tell the two apart, and how many differ."""
    wrong = wrong_places(got, want, tolerance)
    if not wrong.any():
        return "no entry differs"
    place = tuple(wrong.nonzero()[0].tolist())
    a, b = told_apart(got[place].item(), want[place].item())
    where = f"at {list(place)} " if place else ""
    count, many = int(wrong.sum()), wrong.numel()
    return f"{where}it holds {a}; it should be {b}" + (f" ({count:,} of {many:,} entries differ)" if many > 1 else "")


def shape_difference(got: Sequence[int], want: Sequence[int]) -> tuple[str, str]:
    """How one shape differs from another, and where to look: dimensions too many or missing, joined, exchanged, or of
    another length. They are counted from 0."""
    got, want, docstring = list(got), list(want), "the shapes in the docstring, line by line"
    more, fewer = len(got) - len(want), len(want) - len(got)
    if more > 0:
        if [n for n in got if n != 1] == [n for n in want if n != 1]:
            return (
                f"{dimensions(more)} of length 1 too many",
                "what adds one: unsqueeze, None in an index, keepdim=True",
            )
        return f"{dimensions(more)} too many{only_one(got, want)}", docstring
    if fewer > 0:
        if [n for n in got if n != 1] == [n for n in want if n != 1]:
            return (
                f"{dimensions(fewer)} of length 1 missing",
                "an index such as -1 drops its dimension, a slice keeps it; so does keepdim=True in a sum or a maximum",
            )
        joined = [place for place in range(len(want) - 1)
                  if [*want[:place], want[place] * want[place + 1], *want[place + 2 :]] == got]  # fmt: skip
        if fewer == 1 and joined:
            return f"dimensions {joined[0]} and {joined[0] + 1} have become one", docstring
        return f"{dimensions(fewer)} missing{only_one(want, got)}", docstring
    other = [place for place, (a, b) in enumerate(zip(got, want, strict=True)) if a != b]
    if sorted(got) == sorted(want):
        return (
            f"dimensions {other[0]} and {other[1]} have changed places"
            if len(other) == 2
            else "the dimensions stand in another order"
        ), docstring
    lengths = ", ".join(f"dimension {place} is {got[place]:,} long instead of {want[place]:,}" for place in other)
    return lengths, docstring


def only_one(longer: list[int], shorter: list[int]) -> str:
    """Which single dimension, left out of one shape, gives the other; nothing where none does."""
    where = [place for place in range(len(longer)) if longer[:place] + longer[place + 1 :] == shorter]
    return f": dimension {where[0]}, of length {longer[where[0]]}" if where else ""


def dimensions(count: int) -> str:
    """So many dimensions, in words."""
    return f"{count} dimension{'s' * (count != 1)}"


def told_apart(a: Any, b: Any) -> tuple[str, str]:
    """Two numbers in as few digits as show that they are not the same."""
    if isinstance(a, (bool, int)) or isinstance(b, (bool, int)):
        return str(a), str(b)
    for digits in range(4, 18):
        shown = f"{a:.{digits}g}", f"{b:.{digits}g}"
        if shown[0] != shown[1]:
            break
    return shown


def short_value(value: Any) -> str:
    """A value in a few characters: a tensor's shape, the name of what has one, a number or a list as it is."""
    if isinstance(value, Tensor):
        dtype = "" if value.dtype in (torch.float64, torch.float32) else f" {str(value.dtype).removeprefix('torch.')}"
        return f"{list(value.shape)}{dtype}"
    name = getattr(value, "name", None)
    text = name if isinstance(name, str) else repr(value) if isinstance(value, PLAIN) else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."


def bytes_made(run: Callable[[], Any]) -> int:
    """Bytes of all tensors that `run()` makes, those included that PyTorch makes inside one function.

    The work ledger counts the functions that are called; this counts what they do.
    """
    return effort_of(run).made


def relation(got: Tensor, want: Tensor, tolerance: float) -> tuple[str, str, str] | None:
    """What turns `want` into `got` throughout, computed: (diagnosis, what was seen, the likely cause); None if nothing.

    The rounding of a smaller dtype; one part for all along a dimension; a constant factor, a constant added, the same
    numbers in other places. Each has to hold everywhere. Last, where all that is right has one place in a dimension.
    """
    return (
        made_from(got, want, tolerance) or proportion(got, want, tolerance) or right_in_one_place(got, want, tolerance)
    )


def made_from(got: Tensor, want: Tensor, tolerance: float) -> tuple[str, str, str] | None:
    """`relation`, for what is made of `want` itself: rounded, or a part of it repeated."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if want.is_floating_point() else ():
        if not want.numel():
            break
        largest = want.double().abs().nan_to_num(0.0, 0.0, 0.0).max().item()
        close = max(tolerance, 4 * torch.finfo(want.dtype).eps * largest)
        narrow = want.to(dtype).to(want.dtype)
        if (
            torch.finfo(dtype).eps > torch.finfo(want.dtype).eps
            and agree(got, narrow, close)
            and not agree(want, narrow, close)
        ):
            name = str(dtype).removeprefix("torch.")
            return "precision", f"every number is rounded as {name} rounds it", (
                f"on the way, numbers were turned into {name} and back; some code does so to save memory"
            )  # fmt: skip
    for dim in range(want.dim() - 1 if want.numel() else 0):
        for place, word in ((0, "first"), (-1, "last")):
            if want.shape[dim] > 1 and agree(got, want.select(dim, place).unsqueeze(dim).expand_as(want), tolerance):
                return "one-for-all", f"all along dimension {dim} are the {word}", (
                    f"along dimension {dim}, the {word} was taken for all: an index, or a broadcast of one of them"
                )  # fmt: skip
    return None


def right_in_one_place(got: Tensor, want: Tensor, tolerance: float) -> tuple[str, str, str] | None:
    """`relation`, for the first along a dimension that is right, while numbers of every other one are wrong. The last
    two dimensions are left out: the first token is right under many a wrong mask."""
    wrong = wrong_places(got, want, tolerance)
    for dim in range(want.dim() - 2):
        others = wrong.movedim(dim, 0).flatten(1).any(1)
        if len(others) > 1 and not others[0] and others[1:].all():
            every = "the other one" if len(others) == 2 else f"all {len(others) - 1} others"
            place = f"right at place 0 of dimension {dim}, wrong at {every}"
            return "right-in-the-first", place, (
                f"what should change from one to the next along dimension {dim} is that of the first, or changes by "
                "another rule; or only the first is worked on"
            )  # fmt: skip
    return None


def proportion(got: Tensor, want: Tensor, tolerance: float) -> tuple[str, str, str] | None:
    """`relation`, for a factor, an offset, or another order."""
    a, b = got.double().flatten(), want.double().flatten()
    finite = torch.isfinite(a) & torch.isfinite(b)
    if b.numel() < 3 or not torch.equal(a[~finite], b[~finite]) or not finite.any():
        return None
    a, b = a[finite], b[finite]
    large = b.abs() > 1e3 * max(tolerance, 1e-12)
    if int(large.sum()) >= 3 and b[large].unique().numel() >= 3:
        factor = (a[large] / b[large]).median().item()
        if (
            factor
            and abs(factor - 1) > 1e-5
            and torch.allclose(a, factor * b, rtol=1e-6, atol=tolerance * max(1.0, abs(factor)))
        ):
            return "factor", f"every number is {factor:.6g} times what it should be", (
                "a factor is missing, one too many, or turned upside down"
            )  # fmt: skip
    added = (a - b).median().item()
    if abs(added) > 10 * tolerance and torch.allclose(a, b + added, rtol=0.0, atol=10 * tolerance + 1e-9 * abs(added)):
        return "offset", f"every number is {abs(added):.6g} too {'large' if added > 0 else 'small'}", (
            "something is added that does not belong there, or left out"
        )  # fmt: skip
    if b.unique().numel() > b.numel() // 2 and torch.allclose(
        a.sort().values, b.sort().values, rtol=0.0, atol=tolerance
    ):
        return "order", "these are the right numbers, in other places", (
            "two dimensions changed places, or a reshape ran over them in another order than they lie in"
        )  # fmt: skip
    return None
