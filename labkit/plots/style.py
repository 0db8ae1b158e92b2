"""One look for all figures, and one colour for one thing in every lab (Okabe and Ito's colour-blind-safe set)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from labkit.measure import Timing
from labkit.plots.described import Described, described, ends

COLORS = {
    "query": "#E69F00",
    "key": "#0072B2",
    "value": "#009E73",
    "with cache": "#0072B2",
    "without cache": "#D55E00",
    "preallocated": "#009E73",
    "theory": "#555555",
    "reference GPU": "#CC79A7",
    "highlight": "#D55E00",
    "pale": "#D9DEE4",
    "weights": "#56B4E9",
    "cache": "#0072B2",
    "reserve": "#A9B1BA",
    "free": "#E4E9EE",
}
CYCLE = (COLORS["with cache"], COLORS["query"], COLORS["value"], COLORS["reference GPU"], COLORS["highlight"])
MARKERS = ("o", "s", "^", "D", "v")
HEAT = "cividis"  # readable in grey and by colour-blind eyes
STYLE: dict[Any, Any] = {
    "figure.dpi": 110,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E9ED",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def figure(width: float = 7.0, height: float = 3.4, columns: int = 1, **options) -> tuple[Figure, Axes]:
    """A figure in the labs' style, sizes in inches; `columns` panels side by side. `described` gives it its words."""
    plt.rcParams.update(STYLE)
    return plt.subplots(1, columns, figsize=(width, height), FigureClass=Described, **options)


def row_of(
    columns: int, width: float, height: float, widths: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """A row of panels, as a list; `widths` are relative."""
    plt.rcParams.update(STYLE)
    fig, axes = plt.subplots(
        1, columns, figsize=(width, height), squeeze=False, width_ratios=widths, FigureClass=Described
    )
    return fig, list(axes[0])


def bare(axes: Axes) -> Axes:
    """No grid: for pictures of matrices, where a cell's colour is the reading."""
    axes.grid(False)
    return axes


def plain_ticks(axis: Axis) -> None:
    """1, 2, 5, 10, 20, ... on a logarithmic axis, written as people write them."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def timed_line(axes: Axes, lengths: Sequence[float], timings: Sequence[Timing], color: str, label: str) -> None:
    """Medians in milliseconds against length, with their spread, for logarithmic axes."""
    middle = [t.median * 1e3 for t in timings]
    # Not below the fastest sample: a logarithmic axis has no place for less than nothing.
    below = [min(t.spread, t.median - min(t.samples)) * 1e3 for t in timings]
    above = [t.spread * 1e3 for t in timings]
    axes.errorbar(lengths, middle, [below, above], fmt="o-", markersize=4, capsize=2, color=color, label=label)


def whiskers(value: float, low: float, high: float) -> list[list[float]]:
    """The ends of an error bar on a logarithmic axis, as `errorbar` takes them: how far below and above `value`.

    An end at or below 0, which such an axis has no place for, is drawn a decade below `value`.
    """
    below = value - low
    return [[below if value - below > 0 else 0.9 * value], [high - value]]


def against_length(
    lengths: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    *,
    xlabel: str,
    ylabel: str,
    level: tuple[float, str] | None = None,
    log: bool = False,
) -> Figure:
    """Some quantity against a length, a curve per name. `level`: a horizontal line and what it stands for."""
    fig, axes = figure(7.0, 3.2)
    fallback = iter((COLORS["with cache"], COLORS["query"], COLORS["value"]))
    for name, values in curves.items():
        color = COLORS.get(name) or next(fallback)
        label = name if len(curves) > 1 else None  # one curve is what the axis says
        axes.plot(lengths, values, "o-" if len(lengths) < 20 else "-", markersize=4, color=color, label=label)
    if level:
        axes.axhline(level[0], color=COLORS["theory"], linestyle="--", linewidth=1, label=level[1])
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if log:
        axes.set(xscale="log", yscale="log")
        plain_ticks(axes.xaxis)
        plain_ticks(axes.yaxis)
    if len(curves) > 1 or level:
        axes.legend(fontsize=8)
    mark = f" The dashed line: {level[1]}." if level else ""
    return described(fig, f"Lines: {ylabel} against {xlabel}. {ends(curves, lengths)}.{mark}")
