"""Figures of lab 03: memory math."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from labkit.measure import Timing
from labkit.plots.described import described, ends, listed, number
from labkit.plots.style import COLORS, CYCLE, MARKERS, figure, plain_ticks, timed_line


def cache_growth(lengths: Sequence[int], sizes: Mapping[str, Sequence[float]]) -> Figure:
    """GB of one request's cache against its tokens, a curve per name, both axes logarithmic."""
    fig, axes = figure(7.6, 3.4)
    for (name, values), color, marker in zip(sizes.items(), CYCLE, MARKERS, strict=False):
        axes.plot(lengths, values, marker=marker, markersize=4, color=color, label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens of one request", ylabel="GB (10⁹ bytes), float16")
    powers_of_two(axes, lengths)
    plain_ticks(axes.yaxis)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return described(
        fig,
        f"GB of one request's cache against its tokens, both axes logarithmic. {ends(sizes, lengths, 'GB')}.",
    )


def memory_parts(rows: Sequence[str], parts: Mapping[str, Sequence[float]], published: Sequence[float]) -> Figure:
    """Stacked bars in GiB, a bar per row: what arithmetic says each part takes, and a mark at the published total."""
    fig, axes = figure(7.6, 0.9 + 0.45 * len(rows))
    known = {"weights": COLORS["weights"], "cache": COLORS["cache"]}
    others = iter((COLORS["query"], COLORS["value"], COLORS["reference GPU"]))
    start = np.zeros(len(rows))
    for name, sizes in parts.items():
        color = known.get(name) or next(others)
        axes.barh(range(len(rows)), sizes, 0.55, start, color=color, edgecolor="white", linewidth=0.8, label=name)
        start = start + np.asarray(sizes)
    axes.plot(
        published, range(len(rows)), "|", color="black", markersize=20, markeredgewidth=2, label="published total"
    )
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="GiB (2³⁰ bytes)", ylim=(len(rows) - 0.5, -0.5))
    axes.grid(False, axis="y")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), markerscale=0.5)
    bars = "; ".join(
        f"{name}: {listed(f'{part} {number(sizes[row])}' for part, sizes in parts.items())}, published total "
        f"{number(published[row])}"
        for row, name in enumerate(rows)
    )
    return described(fig, f"Stacked bars of GiB, with a mark at the published total. {bars}.")


def frontier(curves: Mapping[str, Sequence[tuple[int, int]]], *, title: str = "") -> Figure:
    """How many requests fit against how long they are, both axes logarithmic; what is below and left of a curve fits.

    curves: by name, pairs of context and requests. A pair with no request is left out.
    """
    fig, axes = figure(7.6, 3.8)
    for (name, pairs), color, marker in zip(curves.items(), CYCLE, MARKERS, strict=False):
        shown = [(context, requests) for context, requests in pairs if requests > 0]
        axes.plot(*zip(*shown, strict=True), marker=marker, markersize=4, color=color, label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens of each request", ylabel="requests that fit", title=title)
    contexts = [context for pairs in curves.values() for context, _ in pairs]
    powers_of_two(axes, contexts)
    plain_ticks(axes.yaxis)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    said = "; ".join(
        f"{name}: {pairs[0][1]:,} requests of {pairs[0][0]:,} tokens, {pairs[-1][1]:,} of {pairs[-1][0]:,}"
        for name, pairs in curves.items()
    )
    return described(
        fig,
        "How many requests fit against the tokens of each, both axes logarithmic, falling "
        f"lines{': ' * bool(title)}{title}. {said}.",
    )


def decode_times(
    contexts: Sequence[int], timings: Mapping[str, Sequence[Timing]], floors: Mapping[str, Sequence[float]]
) -> Figure:
    """Milliseconds of a decode step against the tokens held: measured points, and the floor in seconds as a line."""
    fig, axes = figure(7.4, 3.4)
    for (name, samples), color in zip(timings.items(), CYCLE, strict=False):
        timed_line(axes, contexts, samples, color, f"{name}, measured")
        axes.plot(contexts, [value * 1e3 for value in floors[name]], ":", color=color, label=f"{name}, floor")
    axes.set(xlabel="tokens held by each request", ylabel="ms per step", ylim=(0, None))
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    medians = {name: [timing.median for timing in samples] for name, samples in timings.items()}
    return described(
        fig,
        "Milliseconds per decode step against tokens held by each request: measured points, the floor as a "
        f"dotted line. {ends(medians, contexts, 'ms', 1e3)}. Floor: {ends(floors, contexts, 'ms', 1e3)}.",
    )


def throughput(
    batches: Sequence[int],
    rates: Mapping[str, Sequence[float]],
    limits: Mapping[str, int],
    ceilings: Mapping[str, float],
    balances: Mapping[str, float] | None = None,
    notes: Mapping[str, str] | None = None,
) -> Figure:
    """Tokens per second of all requests together against their number, both axes logarithmic.

    rates: by name, for each batch. limits: the largest batch that fits; beyond it a curve is dotted. ceilings: what the
    rate goes to, a dashed level at the right. balances: the batch at which K and V equal the weights, marked on its
    curve. notes: what to say at the largest batch that fits.
    """
    fig, axes = figure(7.6, 3.8)
    for (name, values), color in zip(rates.items(), CYCLE, strict=False):
        pairs = list(zip(batches, values, strict=True))
        fits = [pair for pair in pairs if pair[0] <= limits[name]]
        beyond = pairs[max(0, len(fits) - 1) :]
        if fits:
            axes.plot(*zip(*fits, strict=True), "o-", markersize=4, color=color, label=name)
        axes.plot(*zip(*beyond, strict=True), ":", color=color, label=None if fits else name)
        if balances and batches[0] <= balances[name] <= batches[-1]:
            height = np.exp(np.interp(np.log(balances[name]), np.log(batches), np.log(values)))
            axes.plot([balances[name]], [height], "*", markersize=13, color=color, markeredgecolor="black", zorder=3)
        if fits and name in (notes or {}):
            style: dict[str, Any] = {"ha": "right", "va": "top", "fontsize": 8, "color": color}
            axes.annotate((notes or {})[name], fits[-1], xytext=(4, -7), textcoords="offset points", **style)
        axes.axhline(ceilings[name], xmin=0.88, color=color, linestyle="--", linewidth=1.2)
    if balances:
        axes.plot([], [], "*", markersize=12, color="white", markeredgecolor="black", label="K and V equal the weights")
    axes.plot([], [], ":", color=COLORS["theory"], label="more than fit")
    axes.plot([], [], "--", color=COLORS["theory"], label="bandwidth / K and V of one")
    axes.set(xscale="log", yscale="log", xlabel="requests in the batch", ylabel="tokens per second, all together")
    powers_of_two(axes, batches)
    plain_ticks(axes.yaxis)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    said = "; ".join(
        f"{name}: {number(values[0])} at {batches[0]:,}, up to {limits[name]:,} requests fit, ceiling "
        f"{number(ceilings[name])}"
        for name, values in rates.items()
    )
    stars = (
        " K and V equal the weights (stars) at "
        f"{listed(f'{number(at)} requests of {name}' for name, at in balances.items())}."
        if balances
        else ""
    )
    return described(
        fig,
        "Tokens per second of all requests together against their number, both axes logarithmic: rising lines "
        f"that flatten towards a dashed ceiling, dotted where more than fit. {said}.{stars}",
    )


def roofline(flop_per_s: float, bytes_per_s: float, points: Mapping[str, Sequence[tuple[str, float, float]]]) -> Figure:
    """Operations per second against operations per byte: the two roofs, and measured work below them.

    points: by kind of work, triples of a label, an intensity and a rate in operations per second.
    """
    fig, axes = figure(7.6, 4.0)
    found = [triple for triples in points.values() for triple in triples]
    ridge = flop_per_s / bytes_per_s
    low = min(ridge, *(x for _, x, _ in found)) / 5  # room for the labels at the left
    high = max(ridge, *(x for _, x, _ in found)) * 3
    across = np.geomspace(low, high, 200)
    roof = np.minimum(flop_per_s, across * bytes_per_s) / 1e9
    axes.plot(across, roof, color=COLORS["theory"], linewidth=1.5, label="attainable")
    axes.axvline(
        ridge, color=COLORS["theory"], linestyle=":", linewidth=1, label=f"ridge: {ridge:.3g} operations per byte"
    )
    sides = cycle((("left", 7, -1), ("center", 0, -15)))  # two kinds meet at like intensities, their labels must not
    for (kind, triples), color, marker, (side, right, up) in zip(points.items(), CYCLE, MARKERS, sides, strict=False):
        xs, ys = [x for _, x, _ in triples], [y / 1e9 for _, _, y in triples]
        axes.plot(xs, ys, marker, markersize=6, color=color, label=kind)
        for label, x, y in triples:
            axes.annotate(label, (x, y / 1e9), xytext=(right, up), textcoords="offset points", ha=side, fontsize=8)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte moved",
        ylabel="10⁹ operations per second",
        ylim=(min(y for _, _, y in found) / 3e9, flop_per_s / 5e8),
    )
    plain_ticks(axes.xaxis)
    plain_ticks(axes.yaxis)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    said = "; ".join(
        f"{kind}: "
        f"{listed(f'{label} at {number(x)} operations per byte, {number(y / 1e9)} GFLOP/s' for label, x, y in triples)}"
        for kind, triples in points.items()
    )
    return described(
        fig,
        "A roofline, both axes logarithmic: operations per second against operations per byte. The roof rises "
        f"with {number(bytes_per_s / 1e9)} GB/s up to {number(ridge)} operations per byte and is flat at "
        f"{number(flop_per_s / 1e9)} GFLOP/s from there. {said}.".replace("\n", " "),
    )


def powers_of_two(axes: Axes, values: Sequence[int]) -> None:
    """Ticks of the x axis at those values that are powers of two, as 512, 8K, 1M."""
    powers = sorted({value for value in values if value > 0 and value & (value - 1) == 0})
    axes.set_xticks(powers, [short(value) for value in powers])
    axes.xaxis.set_minor_locator(NullLocator())


def short(value: int) -> str:
    """8192 as 8K, 1048576 as 1M; other numbers with commas."""
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if value >= size and value % size == 0:
            return f"{value // size}{letter}"
    return f"{value:,}"
