"""01.4: rotary positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from labkit.course.checks.suspects import Suspect, recognise
from labkit.course.checks.tensors import agree, draw
from labkit.course.exercise import Exercise
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
        "interleaved-pairs": "Two conventions exist. Here the partner of dimension 0 is head_dim / 2, not 1.",
        "own-positions": "A decode step brings one token. At which position is it, and how would arange know?",
        "low-precision": "bfloat16 keeps 8 significant bits: near 8,000 its numbers are 32 apart. In radians?",
        "position-not-reset": "Call your function twice with the same arguments. What should be different?",
    }
    reference = staticmethod(apply_rope)

    def examine(self, answer: Callable) -> None:
        """State first, then pairing and sign, then positions and precision."""
        frequencies = 10_000.0 ** -(torch.arange(0, 8, dtype=torch.float32) / 8)
        x, start = draw(2, 3, 5, 16, dtype=torch.float32), torch.arange(5)
        got, again = (self.call(answer, x, start, frequencies) for _ in range(2))
        if isinstance(got, Tensor) and isinstance(again, Tensor) and not agree(got, again, 0.0, nan=True):
            self.fail(
                "position-not-reset",
                seen="two calls with the same arguments give different results",
                cause="a position counter outlives the call, so a second prompt starts where the first one ended",
                look="take every position from the argument; keep nothing between calls",
            )
        # Angles of up to 60 radians in float32 are off by at most 60 * 2**-24, times |x| < 5: well below the tolerance.
        recognise(type(self), got, suspects(x, start, frequencies), tolerance=1e-4)
        self.same(got, apply_rope(x, start, frequencies), what="5 tokens at positions 0 to 4", tolerance=1e-4)
        self.later_positions(answer, frequencies)
        self.half_precision(answer, frequencies)

    def later_positions(self, answer: Callable, frequencies: Tensor) -> None:
        """Positions that do not start at 0, and that have gaps."""
        for places in ([17], [40, 41, 42], [3, 9, 60]):
            x, positions = draw(1, 2, len(places), 16, dtype=torch.float32), torch.tensor(places)
            got = self.call(answer, x, positions, frequencies)
            from_0 = apply_rope(x, torch.arange(len(places)), frequencies)
            recognise(type(self), got, [
                Suspect("own-positions", from_0, "the positions were counted from 0 inside the function",
                        "the argument positions: a decode step brings one token, at whatever position it has",
                        f"a token at position {places[0]} was turned as if it stood at position 0"),
            ], tolerance=1e-4)  # fmt: skip
            self.same(got, apply_rope(x, positions, frequencies), what=f"tokens at positions {places}", tolerance=1e-4)

    def half_precision(self, answer: Callable, frequencies: Tensor) -> None:
        """bfloat16 in, bfloat16 out, with float32 angles."""
        x, positions = draw(1, 2, 3, 16, dtype=torch.bfloat16), torch.tensor([4_001, 6_005, 8_191])
        got = self.call(answer, x, positions, frequencies)
        if isinstance(got, Tensor) and got.dtype == torch.float32:
            self.fail(
                "dtype-promoted",
                seen="bfloat16 went in, float32 came out",
                cause="a product with float32 cos and sin is float32: a cache of such keys is twice as large",
                look="bring cos and sin, or the result, to x.dtype",
            )
        want = apply_rope(x.float(), positions, frequencies)
        self.like(got, want.to(torch.bfloat16), what="bfloat16 tokens")
        # bfloat16 rounds cos, sin, two products and a sum, each by 2**-9 of a value below 5: under 0.05 in all.
        if not agree(got, want, 0.05):
            self.fail(
                "low-precision",
                seen=f"bfloat16, near position 8,000: values are off by up to {(got.float() - want).abs().max():.2g}",
                cause="the angles themselves were computed in bfloat16, which cannot tell position 8,191 from 8,192",
                look="positions * frequencies in float32; only cos and sin go to x.dtype",
            )


def suspects(x: Tensor, positions: Tensor, frequencies: Tensor) -> list[Suspect]:
    """Wrong turns at positions 0 to 4."""
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    (a, b), (even, odd) = x.chunk(2, dim=-1), (x[..., 0::2], x[..., 1::2])
    paired = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    halves = torch.cat((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    first, second = a * cos - b * sin, a * sin + b * cos
    return [
        Suspect("unchanged", x, "the turned halves are not in what is returned",
                "the last line: join the two new halves and return them", "x came back as it was"),
        Suspect("interleaved-pairs", [paired, halves],
                "the pairing of the original paper; Llama's weights pair dimension i with i + head_dim / 2",
                "x.chunk(2, dim=-1) gives the two halves", "dimension 0 was turned together with dimension 1"),
        Suspect("wrong-sign", torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1),
                "the signs of the two sine terms are exchanged", "the docstring: (a cos - b sin, a sin + b cos)",
                "every pair turns the other way"),
        Suspect("a-overwritten", torch.cat((first, first * sin + b * cos), dim=-1),
                "a was overwritten with its new value before the second half was made from it",
                "compute both halves from the old a and b, under new names",
                "the first half is right, the second is not"),
        Suspect("interleaved-output", torch.stack((first, second), dim=-1).flatten(-2),
                "the halves were stacked pair by pair; pair i belongs at places i and i + head_dim / 2",
                "torch.cat along the last dimension lays the halves one after the other",
                "the numbers are right, but the two halves alternate"),
        Suspect("cos-sin-swapped", torch.cat((a * sin - b * cos, a * cos + b * sin), dim=-1),
                "cos and sin are exchanged: cos(0) is 1, sin(0) is 0",
                "which of the two is called cos, and the docstring's (a cos - b sin, a sin + b cos)",
                "at position 0, where nothing should turn, every pair has made a quarter turn"),
        Suspect("starts-at-1", apply_rope(x, positions + 1, frequencies), "positions were counted from 1",
                "use positions as they come: the first token stands at 0",
                "the token at position 0 was turned by one step; it should stay as it is"),
        Suspect("half-turned", torch.cat((a * cos - b * sin, b), dim=-1), "only one of each pair was computed",
                "both numbers of a pair change: the second becomes a sin + b cos",
                "the second half of the dimensions is unchanged"),
        Suspect("not-a-rotation", torch.cat((a * cos - b * cos, a * sin + b * sin), dim=-1),
                "cos and sin stand in the wrong places", "each output mixes a and b with one cosine and one sine",
                "the vectors change their length; turning keeps it"),
        Suspect("not-a-rotation", torch.cat((a * cos - b * sin, a * cos + b * sin), dim=-1),
                "cos and sin stand in the wrong places in the second half", "the second half is a sin + b cos",
                "the vectors change their length; turning keeps it"),
    ]  # fmt: skip
