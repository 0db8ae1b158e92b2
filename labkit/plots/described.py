"""A figure in words: the sentence that stands for the picture where it cannot be seen.

`described(fig, "...")` gives a figure its sentence. Notebooks show and store it beside the picture, as the metadata
`{"image/png": {"alt": ...}}` of the output; widgets write it into their picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure


class Described(Figure):
    """A figure that knows what is to be seen in it: `alt`."""

    alt: str = ""

    def __repr__(self) -> str:
        """As matplotlib's own figures say it: a notebook stores this line, whichever of the two classes drew."""
        return super().__repr__().replace(type(self).__name__, "Figure", 1)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict, dict]:
        """No picture of its own, only what belongs to the picture that matplotlib makes."""
        return {}, {"image/png": {"alt": self.alt}} if self.alt else {}


def described(fig: Figure, alt: str) -> Figure:
    """`fig`, which `plots.figure` or `plots.row_of` made, with the sentence `alt`. Raises TypeError for another's."""
    if not isinstance(fig, Described):
        raise TypeError("only a figure of labkit.plots keeps a description: make it with plots.figure or plots.row_of")
    fig.alt = " ".join(alt.split())
    return fig


def number(value: float) -> str:
    """Three digits, as a person reads them: 0.0123, 4.5, 1,230."""
    value = float(f"{value:.3g}")
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def listed(parts: Iterable[str]) -> str:
    """a, b and c."""
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


def ends(curves: Mapping[str, Sequence[float]], places: Sequence[float], unit: str = "", times: float = 1) -> str:
    """Where each curve begins and ends: "with cache: 30 ms at 7, 41 at 206". Values are given so many `times`."""
    unit = f" {unit}" if unit else ""
    first, last = (
        f"{int(place):,}" if float(place).is_integer() else number(place) for place in (places[0], places[-1])
    )
    return "; ".join(
        f"{name}: {number(times * values[0])}{unit} at {first}, {number(times * values[-1])}{unit} at {last}"
        for name, values in curves.items()
    )


def final(curves: Mapping[str, Sequence[float]]) -> str:
    """Where each curve ends."""
    return listed(f"{name} {number(values[-1])}" for name, values in curves.items())


def spans(places: Sequence[int]) -> str:
    """Places in order, runs of them shortened: 0 to 3 and 5; none when there is none."""
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][-1] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return listed(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) if runs else "none"
