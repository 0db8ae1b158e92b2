"""01.4: rotary positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from labkit.course.checks.suspects import Suspect
from labkit.course.checks.tensors import agree, draw
from labkit.course.checks.trials import Case, compare
from labkit.course.exercise import Exercise, NotYet
from labkit.labs.lab01.references import apply_rope


class Rope(Exercise):
    """Rotary positions, Llama's pairing."""

    id = "01.4"
    title = "Rotary positions"
    minutes = 5
    difficulty = 3
    hints = (
        "How many angles are there for one token? What is the shape of all angles?",
        "Angles are positions[:, None] * frequencies, [tokens, head_dim / 2]. Cut x into its two halves: a and b.",
        "torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1), with cos and sin brought to x.dtype",
    )
    hints_for: ClassVar = {
        "sign-missing": "Turn (1, 0) by a quarter: where does it point? Then (0, 1). Which of the two has a minus?",
        "interleaved-pairs": "Two conventions exist. Here the partner of dimension 0 is head_dim / 2, not 1.",
        "own-positions": "A decode step brings one token. At which position is it, and how would arange know?",
        "low-precision": "bfloat16 keeps 8 significant bits: near 8,000 its numbers are 32 apart. In radians?",
        "position-not-reset": "Call your function twice with the same arguments. What should be different?",
    }
    why = (
        "A column of positions times a row of frequencies is a table of angles, in float32 because both are not in x's "
        "dtype. The two halves of x hold a pair's two numbers, and are turned together."
    )
    reference = staticmethod(apply_rope)

    def examine(self, answer: Callable) -> None:
        """State first, then turns of every kind, then the dtypes that a model computes in."""
        cases = calls()
        first = cases[0].args
        try:
            got, again = (self.call(answer, *first) for _ in range(2))
        except NotYet as not_yet:
            if any(f"tensor a ({a}) must match the size of tensor b ({b})" in not_yet.finding.seen for a, b in SIZES):
                self.fail(
                    "angles-not-outer",
                    seen="5 positions met 8 frequencies: PyTorch tried to multiply them one by one",
                    cause="there is an angle for every position and every frequency: a table, [tokens, head_dim / 2]",
                    look="positions[:, None] * frequencies, or torch.outer",
                )
            raise
        if isinstance(got, Tensor) and isinstance(again, Tensor) and not agree(got, again, 0.0, nan=True):
            self.fail(
                "position-not-reset",
                seen="two calls with the same arguments give different results",
                cause="a position counter outlives the call, so a second prompt starts where the first one ended",
                look="take every position from the argument; keep nothing between calls",
            )
        # frequencies are float32 whatever x is, so dtypes are tried by hand, below
        compare(type(self), answer, apply_rope, cases, suspects=suspects, what="the result", dtypes=())
        # so far on, float32 rounds two right ways to an angle differently: no wrong one could be told by its numbers
        compare(type(self), answer, apply_rope, far_on(), what="the result", dtypes=(), layouts=False)
        for x, positions, frequencies in (case.args for case in (far(), *cases[:2])):
            self.dtypes_of_models(answer, x, positions, frequencies)

    def dtypes_of_models(self, answer: Callable, x: Tensor, positions: Tensor, frequencies: Tensor) -> None:
        """What comes in float64 or bfloat16 goes out in it, with angles of float32."""
        for dtype, rounding in ((torch.bfloat16, 2**-9), (torch.float64, 0.0)):
            vectors = x.to(dtype)
            got = self.call(answer, vectors, positions, frequencies)
            want, exact = (apply_rope(vectors.double(), positions, f) for f in (frequencies, frequencies.double()))
            told = f"{str(dtype).removeprefix('torch.')}, positions {positions.tolist()}"
            if isinstance(got, Tensor) and dtype == torch.bfloat16 and got.dtype == torch.float32:
                self.fail(
                    "dtype-promoted",
                    seen="bfloat16 went in, float32 came out",
                    cause="a product with float32 cos and sin is float32: a cache of such keys is twice as large",
                    look="bring cos and sin, or the result, to x.dtype",
                )
            self.like(got, want.to(dtype), what=f"{told}: the result")
            # Angles in float32 are off by half an eps of the largest, an answer's own product by as much again; then
            # cos, sin, two products and a sum are rounded, each by `rounding` of what stays below the largest number.
            angles = 4 * (want - exact).abs().max() + 2**-22 * x.abs().max()
            tolerance = float(angles + 8 * rounding * x.abs().max())
            if not agree(got, exact, tolerance):
                if any(agree(got, x, 2 * tolerance) for x in coarse(vectors, positions, frequencies)):
                    self.fail(
                        "low-precision",
                        seen=f"{told}: values are off by up to {(got.double() - exact).abs().max():.2g}",
                        cause="the angles themselves were computed in bfloat16, which cannot tell position 8,191 from "
                        "8,192",
                        look="positions * frequencies in float32; only cos and sin go to x.dtype",
                    )
                self.explain_values(got, exact, what=f"{told}: the result", tolerance=tolerance)


def powers(base: float, head_dim: int) -> Tensor:
    """Frequencies base ** (-2 i / head_dim), float32 [head_dim / 2]."""
    return (base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)).float()


def call(*shape: int, at: Sequence[int], base: float, name: str = "", dtype: torch.dtype = torch.float32) -> Case:
    """One call: random vectors, the positions of their tokens, frequencies of a base."""
    return Case((draw(*shape, dtype=dtype), torch.tensor(at), powers(base, shape[-1])), name)


SIZES = ((5, 8), (8, 5))  # of the first call: tokens, frequencies


def calls() -> list[Case]:
    """Positions from 0 and not, with gaps, in any order, twice the same, far on; 2 to 4 dimensions; bases that nobody
    writes down. Drawn when they are asked for: a check's seed is set by then."""
    return [
        call(2, 3, 5, 16, at=range(5), base=700.0),
        call(3, 4, 12, at=(3, 9, 60, 17), base=90.0),
        call(2, 3, 5, 16, at=range(5), base=40.0),
        call(2, 3, 5, 16, at=(2, 0, 9, 33, 4), base=700.0),
        call(1, 2, 1, 16, at=(17,), base=700.0),
        call(2, 1, 3, 10, at=(40, 41, 42), base=900.0),
        call(4, 6, at=(7, 7, 2, 0), base=30.0),
        call(1, 3, 2, at=(300, 1, 0), base=5.0),
    ]


def far_on() -> list[Case]:
    """Positions beyond what models are trained for."""
    return [call(2, 2, 64, at=(70_001, 65_536), base=10_000.0), call(1, 1, 32, at=(8_200,), base=10_000.0)]


def far() -> Case:
    """Positions that bfloat16 cannot tell from their neighbours."""
    return call(1, 2, 3, 16, at=(4_001, 6_005, 8_191), base=10_000.0)


def coarse(x: Tensor, positions: Tensor, frequencies: Tensor) -> Iterator[Tensor]:
    """Turned by angles that went through bfloat16, each in another place."""
    low = positions[:, None].to(torch.bfloat16), frequencies.to(torch.bfloat16)
    full = positions[:, None].float(), frequencies
    for angles in (low[0] * low[1], low[0] * full[1], full[0] * low[1].float(), (full[0] * full[1]).bfloat16()):
        yield by_angles(x.double(), angles.double())


def by_angles(x: Tensor, angles: Tensor) -> Tensor:
    """Turned by these angles."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), dim=-1)


SIGNS = "the docstring: (a cos - b sin, a sin + b cos)"


def joined(first: Tensor, second: Tensor) -> Tensor:
    """Two halves, one behind the other."""
    return torch.cat((first, second), dim=-1)


def suspects(x: Tensor, positions: Tensor, frequencies: Tensor) -> list[Suspect]:
    """Wrong turns."""
    angles = positions[:, None] * frequencies
    return [*wrong_pairs(x, angles), *wrong_turns(x, angles), *wrong_angles(x, positions, frequencies)]


def wrong_pairs(x: Tensor, angles: Tensor) -> list[Suspect]:
    """Nothing is turned, or other numbers with each other than `i` and `i + head_dim / 2`."""
    cos, sin = angles.cos(), angles.sin()
    (a, b), (even, odd) = x.chunk(2, dim=-1), (x[..., 0::2], x[..., 1::2])
    one, two = even * cos - odd * sin, even * sin + odd * cos
    paired, swapped = torch.stack((-odd, even), dim=-1).flatten(-2), joined(-b, a)  # neighbours exchanged, halves
    doubled, repeated = joined(angles, angles), angles.repeat_interleave(2, -1)
    return [
        Suspect("unchanged", [x], "the turned halves are not in what is returned",
                "the last line: join the two new halves and return them", "x came back as it was"),
        Suspect("interleaved-pairs", [torch.stack((one, two), dim=-1).flatten(-2), joined(one, two)],
                "neighbours were paired, as in Meta's own code; here, as in Hugging Face's weights, i goes with "
                "i + head_dim / 2",
                "x.chunk(2, dim=-1) gives the two halves", "dimension 0 was turned together with dimension 1"),
        Suspect("two-pairings", [x * repeated.cos() + swapped * repeated.sin(),
                                 x * doubled.cos() + paired * doubled.sin()],
                "angles are laid out for one pairing, and the numbers are taken in the other",
                "both halves take the same angles: torch.cat((angles, angles), dim=-1)",
                "dimensions i and i + head_dim / 2 were not turned by the same angle"),
    ]  # fmt: skip


def wrong_turns(x: Tensor, angles: Tensor) -> list[Suspect]:
    """The right pairs, mixed wrongly or put in other places."""
    cos, sin, doubled = angles.cos(), angles.sin(), joined(angles, angles)
    a, b = x.chunk(2, dim=-1)
    first, second = a * cos - b * sin, a * sin + b * cos
    return [
        Suspect("wrong-sign", [joined(a * cos + b * sin, b * cos - a * sin)],
                "the signs of the two sine terms are exchanged", SIGNS, "every pair turns the other way"),
        Suspect("sign-missing", [joined(a * cos + b * sin, second), joined(first, b * cos - a * sin),
                                 joined(first, -second), joined(-first, second)],
                "one sign is wrong: in rotate_half, (-b, a) has one minus", SIGNS,
                "the vectors change their length, or one half has the wrong sign"),
        Suspect("a-overwritten", [joined(first, first * sin + b * cos)],
                "a was overwritten with its new value before the second half was made from it",
                "compute both halves from the old a and b, under new names",
                "the first half is right, the second is not"),
        Suspect("interleaved-output", [torch.stack((first, second), dim=-1).flatten(-2)],
                "the halves were stacked pair by pair; pair i belongs at places i and i + head_dim / 2",
                "torch.cat along the last dimension lays the halves one after the other",
                "the numbers are right, but the two halves alternate"),
        Suspect("halves-exchanged", [joined(second, first)], "the second half was put before the first",
                "the order in torch.cat", "the right numbers stand in the other half"),
        Suspect("cos-sin-swapped", [joined(a * sin - b * cos, a * cos + b * sin)],
                "cos and sin are exchanged: cos(0) is 1, sin(0) is 0", f"which of the two is called cos, and {SIGNS}",
                "at position 0, where nothing should turn, every pair has made a quarter turn"),
        Suspect("not-a-rotation", [joined(a * cos - b * cos, a * sin + b * sin), joined(first, a * cos + b * sin),
                                   joined(a * cos, b * sin), joined(a * cos, b * cos),
                                   joined(a * cos - b * cos, second),
                                   joined(a - b * sin, a * sin + b), x * doubled.cos() + x * doubled.sin()],
                "cos and sin stand in the wrong places", f"each output mixes a and b; {SIGNS}",
                "the vectors change their length; turning keeps it"),
        Suspect("half-turned", [joined(first, b), joined(a, second)], "only one of each pair was computed",
                "both numbers of a pair change", "one half of the dimensions is unchanged"),
    ]  # fmt: skip


def wrong_angles(x: Tensor, positions: Tensor, frequencies: Tensor) -> list[Suspect]:
    """The right turn by other angles than position times frequency."""
    angles = positions[:, None] * frequencies
    start, count = torch.arange(len(positions)), positions - positions[0]
    size = x.shape[-1]

    def turned(positions: Tensor, frequencies: Tensor = frequencies) -> Tensor:
        return apply_rope(x, positions, frequencies)

    return [
        Suspect("starts-at-1", [turned(positions + 1), turned(start + 1), turned(positions - 1)],
                "positions are off by one", "use positions as they come: the first token stands at 0",
                "the token at position 0 was turned by one step; it should stay as it is"),
        Suspect("own-positions", [turned(start), turned(count), turned(positions[0] + start),
                                  turned(positions[-1] - start.flip(0))],
                "positions were counted inside the call, from 0 or on from one of those that came",
                "the argument positions: a decode step brings one token, at whatever position it has",
                "some tokens were turned as if they stood elsewhere"),
        Suspect("one-position", [turned(positions[place].expand_as(positions)) for place in (0, -1)],
                "all tokens were turned by one token's position", "positions[:, None]: a row of angles per token",
                "every token was turned by the same angles"),
        Suspect("own-frequencies", [turned(positions, powers(base, size)) for base in (1e4, 1e5, 5e5, 1e6)]
                + [turned(positions, other) for other in (torch.ones_like(frequencies), frequencies[:1])],
                "the argument frequencies is not used", "the angles: positions[:, None] * frequencies",
                "the angles are the same whatever the frequencies"),
        Suspect("frequencies-turned-round", [by_angles(x, positions[:, None] / frequencies),
                                              *(turned(positions, f) for f in (frequencies.flip(0), 1 / frequencies))],
                "the frequencies are in reverse order, or stand below the fraction bar",
                "the angles: positions[:, None] * frequencies", "pair 0 should turn fastest"),
        Suspect("not-radians", [by_angles(x, angles * f) for f in (math.pi / 180, 180 / math.pi, 2 * math.pi, 0.5)],
                "the angles were changed to another unit", "cos and sin take radians, and the angles are in radians",
                "the angles are off by a constant factor"),
        Suspect("angles-not-multiplied", [by_angles(x, positions[:, None] + frequencies),
                                             by_angles(x, frequencies ** positions[:, None])],
                "position and frequency were not multiplied", "the angles: positions[:, None] * frequencies",
                "the angles are not position times frequency"),
        Suspect("turned-twice", [apply_rope(turned(positions), positions, frequencies)], "the turn was applied twice",
                SIGNS, "every angle is twice as large"),
    ]  # fmt: skip
