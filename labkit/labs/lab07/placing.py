"""07.6: keys turned from their positions in the text to their places in the cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from labkit.cache.evicting.places import spun
from labkit.course.checks.effort import check_stays, effort_of
from labkit.course.checks.suspects import Suspect
from labkit.course.checks.tensors import draw, shifted
from labkit.course.checks.trials import Case, Judge, compare
from labkit.course.exercise import Exercise
from labkit.labs.lab07.references import at_places

BITS = (torch.bfloat16, torch.float16)


def turned(k: Tensor, angle: Tensor) -> Tensor:
    """Keys turned by these angles, [batch, num_kv_heads, tokens, head_dim / 2], in k's dtype."""
    return spun(k, angle.cos(), angle.sin())


def right(k: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """The reference; of float64, computed in float64 throughout."""
    if k.dtype != torch.float64:
        return at_places(k, positions, frequencies)
    return turned(k, (torch.arange(k.shape[2]) - positions)[..., None] * frequencies.double())


def suspects(k: Tensor, positions: Tensor, frequencies: Tensor) -> list[Suspect]:
    """Other turns: to other places, by other angles, of other pairs."""
    tokens, positions = k.shape[2], positions.long()
    places = torch.arange(tokens)
    angle = (places - positions)[..., None] * frequencies

    def by(steps: Tensor, scale: float = 1.0) -> Callable[[], Tensor]:
        """Turned by so many positions."""
        return lambda: turned(k, steps.expand(positions.shape)[..., None] * frequencies * scale)

    def pairs(angle: Tensor) -> Tensor:
        """Channels 2 i and 2 i + 1 are partners."""
        a, b = k[..., ::2], k[..., 1::2]
        cos, sin = angle.cos(), angle.sin()
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(k.dtype)

    def made(first: Tensor, second: Tensor) -> Tensor:
        return torch.cat((first, second), dim=-1).to(k.dtype)

    a, b = k.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    way = "the angle: by how many positions has a key to be turned that stands at 90 and belongs at 3?"
    own = "positions: [batch, num_kv_heads, tokens], each head's own"
    places_look = "the places: 0, 1, 2, ... in the order held, whatever the positions are"
    formula = "the docstring's formula: (a cos - b sin, b cos + a sin)"
    return [
        Suspect("turned-other-way", [by(positions - places), lambda: pairs(-angle)],
                "keys were turned by position - place: away from their place, not to it", way),
        Suspect("turned-again", [by(places)],
                "keys were turned by their places on top of their positions: they came turned already", way),
        Suspect("turned-back-only", [by(-positions)],
                "keys were turned back to position 0, and not on to their places", way),
        Suspect("turned-to-position-again", [by(positions), by(positions + places)],
                "keys were turned by their positions once more", way),
        Suspect("places-from-first", [by(positions[..., :1] + places - positions),
                                      by(positions.amin() + places - positions)],
                "places were counted from the first position held, not from 0", places_look),
        Suspect("places-from-one", [by(places + 1 - positions)], "places were counted from 1", places_look),
        Suspect("places-backwards", [by(places.flip(0) - positions)], "the newest token got place 0", places_look),
        Suspect("places-from-end", [by(positions[..., -1:] - (tokens - 1) + places - positions),
                                    by(positions.amax() - (tokens - 1) + places - positions)],
                "places were counted back from the newest position", places_look),
        Suspect("one-place-for-all", [by(torch.tensor(tokens - 1) - positions), by(torch.tensor(tokens) - positions)],
                "all tokens were turned to one place", places_look),
        Suspect("one-turn-for-all", [by((places - positions)[..., -1:]), by((places - positions)[..., :1])],
                "all tokens were turned by one and the same angle", way),
        Suspect("positions-of-first-head", [by((places - positions)[:, :1]), by((places - positions)[:1]),
                                            by((places - positions)[:1, :1])],
                "the positions of the first KV head, or of the first row, were taken for all", own),
        Suspect("interleaved-pairs", [lambda: pairs(angle)],
                "channels 2 i and 2 i + 1 were taken for partners; here they are i and i + head_dim / 2",
                "how a and b are cut: two halves, chunk(2, dim=-1)"),
        Suspect("interleaved-back", [lambda: torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(
                    -2).to(k.dtype)],
                "the halves were turned and then interleaved", "how the result is put together: cat, not stack"),
        Suspect("sign-missing", [lambda: made(a * cos + b * sin, b * cos + a * sin),
                                 lambda: made(a * cos - b * sin, b * cos - a * sin)],
                "the signs of the two sines are the same", formula),
        Suspect("new-a-in-b", [lambda: made(a * cos - b * sin, b * cos + (a * cos - b * sin) * sin)],
                "the second half was computed from the first half's new numbers", formula),
        Suspect("halves-exchanged", [lambda: made(b * cos + a * sin, a * cos - b * sin),
                                     lambda: made(b * cos - a * sin, a * cos + b * sin)],
                "the two halves changed places", formula),
        Suspect("cos-and-sin-swapped", [lambda: made(a * sin - b * cos, b * sin + a * cos)],
                "sine and cosine changed places", formula),
        Suspect("degrees", [by(places - positions, math.pi / 180), by(places - positions, 180 / math.pi)],
                "radians were taken for degrees, or turned into them", "the unit of `frequencies`: radians"),
        Suspect("whole-turns", [by(places - positions, 2 * math.pi), by(places - positions, 0.5 / math.pi)],
                "radians were taken for whole turns",
                "the unit of `frequencies`: radians"),
        Suspect("frequencies-inverted", [
                    lambda: turned(k, (places - positions)[..., None] / frequencies),
                    lambda: turned(k, (places - positions)[..., None] * frequencies.flip(0))],
                "the frequencies were divided by, or taken in reverse order", "the angle: n * frequencies[i]"),
        Suspect("in-few-bits", [lambda dtype=dtype: at_places(k.to(dtype), positions, frequencies).to(k.dtype)
                                for dtype in BITS],
                "the keys were turned into a dtype of fewer bits", "every dtype that is written down"),
        Suspect("not-turned", [k], "the keys came back as they are", way),
        Suspect("as-if-turned-twice", [by(2 * (places - positions))], "keys were turned twice as far", way),
    ]  # fmt: skip


class AtPlaces(Exercise):
    """Keys at their places."""

    id, title, minutes, difficulty = "07.6", "Places in the cache", 7, 3
    reference = staticmethod(at_places)
    why = (
        "Turns add up: a key turned to its position, turned by place - position more, is turned to its place. So no "
        "key need be kept unturned."
    )
    hints = (
        "A key stands at 90 and belongs at 3. By how many positions is it to be turned, and in which direction?",
        "angle = (places - positions)[..., None] * frequencies is [batch, num_kv_heads, tokens, head_dim / 2]. Then "
        "it is lab 01's rotation, with a cos and a sin for each KV head.",
        "places = torch.arange(k.shape[2])\nangle = (places - positions)[..., None] * frequencies\n"
        "a, b = k.float().chunk(2, dim=-1)\n# cat of (a cos - b sin) and (b cos + a sin), back in k's dtype",
    )
    hints_for: ClassVar = {
        "turned-other-way": "From 90 to 3: is that forwards or back?",
        "turned-again": "k is turned already, to its position. What is left to do?",
        "places-from-first": "The docstring: 0, 1, 2, ... Where does the first token held stand then?",
        "interleaved-pairs": "The partner of channel 0 is channel head_dim / 2.",
        "positions-of-first-head": "Two KV heads hold different tokens. Which shape has the angle?",
        "precision": "Near 8,000, bfloat16 has one number in 32. In which dtype is your angle?",
        "dtype": "float32 angles make float32 keys. What does the cache hold?",
    }

    def examine(self, answer: Callable) -> None:
        """Each head its own gaps; nothing dropped; one token; far on; then the dtypes of models."""
        cases = [
            Case(call(2, 3, 7, 8, step=4)),
            Case(call(2, 3, 7, 8, step=6, seed=8), "other positions"),
            Case(call(3, 2, 5, 12, step=9, seed=1, base=500.0)),
            Case(call(1, 4, 11, 20, step=3, seed=2, whole=torch.int32)),
            Case(call(2, 2, 6, 4, step=1, seed=3), "nothing dropped"),
            Case(call(2, 1, 4, 16, step=5, seed=4, first=150), "no token of the first 150"),
            Case(call(1, 3, 1, 6, step=50, seed=5), "one token"),
            Case(call(4, 1, 30, 2, step=2, seed=6), "one pair of channels"),
        ]
        compare(type(self), answer, right, cases, suspects=suspects, what="the result", dtypes=(torch.float64,))
        judge = Judge(type(self), answer, right, lambda *_: (), "the keys", False, cases)
        far = call(2, 2, 40, 64, step=300, seed=7, base=10_000.0)
        for k, positions, frequencies in (far, cases[0].args, cases[5].args):  # frequencies stay what they are
            for dtype in (torch.float32, *BITS):
                judge.call(Case((k.to(dtype), positions, frequencies), str(dtype).removeprefix("torch.")), "precision")
        check_stays(type(self), effort_of(lambda: self.run(lambda: answer(*cases[0].args))))


def call(batch: int, num_kv_heads: int, tokens: int, head_dim: int, *, step: int, seed: int = 0, first: int = 0,
         base: float = 100.0, whole: torch.dtype = torch.int64) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Random float32 keys; positions with gaps of up to `step`, each head its own; frequencies of a base."""
    generator = torch.Generator().manual_seed(shifted(seed))
    positions = torch.randint(1, step + 1, (batch, num_kv_heads, tokens), generator=generator).cumsum(-1) - 1 + first
    frequencies = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    k = draw(batch, num_kv_heads, tokens, head_dim, seed=seed, dtype=torch.float32)
    return k, positions.to(whole), frequencies.float()
