"""Figures of lab 05: quantizing the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from torch import Tensor

from labkit.measure import Timing
from labkit.plots.described import described, ends, listed, number
from labkit.plots.style import COLORS, CYCLE, HEAT, MARKERS, bare, figure, plain_ticks, row_of, timed_line, whiskers

FORMATS = {
    "full": COLORS["theory"],
    "int8": COLORS["weights"],
    "int4": COLORS["cache"],
    "int2": COLORS["highlight"],
}
AXES = {"per channel": COLORS["with cache"], "per token": COLORS["without cache"]}
PARTS = {"codes": COLORS["cache"], "metadata": COLORS["query"], "full-precision tokens": COLORS["reserve"]}
POINTS = (*CYCLE, COLORS["weights"])  # as many colours as share no factor with the markers: 30 points that differ
BESIDE: dict[str, Any] = {"fontsize": 8, "loc": "upper left", "bbox_to_anchor": (1, 1)}
DECADES = 1e3  # from the largest error to the smallest that a map tells apart


def rounding(x: Sequence[float], nbits: Sequence[int]) -> Figure:
    """What a quantizer makes of one group of numbers, a row for each of `nbits`.

    Dots are the numbers, ticks the levels between the least and the greatest, and a line ties each number to the level
    that it comes back as. Beside a row: the scale, which is the distance of levels, and the largest error.
    """
    values = np.asarray(x, dtype=float)
    fig, axes = figure(8.0, 0.75 + 0.95 * len(nbits))
    names = []
    for row, count in enumerate(nbits):
        top = 2**count - 1
        zero, scale = values.min(), (values.max() - values.min()) / top
        codes = np.round((values - zero) / scale) if scale else np.zeros_like(values)
        back = zero + codes * scale
        axes.plot(
            zero + np.arange(top + 1) * scale, [row] * (top + 1), "|", markersize=13, color=COLORS["theory"],
            markeredgewidth=0.6 if count > 5 else 1.4, label=None if row else "levels",
        )  # fmt: skip
        for one, level in zip(values, back, strict=True):
            axes.plot([one, level], [row - 0.5, row], color=COLORS["query"], linewidth=1, zorder=1)
        axes.plot(
            values, [row - 0.5] * len(values), "o", markersize=6, color=COLORS["key"], label=None if row else "numbers"
        )
        axes.plot([], [], color=COLORS["query"], label=None if row else "comes back as")
        error = abs(back - values).max()
        names.append(f"{count} bits: {top + 1} levels\nscale {scale:.3g}\nlargest error {error:#.2g}")
    axes.set_yticks(np.arange(len(nbits)) - 0.25, names, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel="value of the number", ylim=(len(nbits) - 0.65, -0.75))
    axes.grid(False, axis="y")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=8)
    said = "; ".join(name.replace("\n", ", ") for name in names)
    return described(
        fig,
        f"{len(values)} numbers from {values.min():g} to {values.max():g}, tied by lines to the levels that "
        f"they come back as, a row for each number of bits. {said}.",
    )


def channel_sizes(keys: Tensor, values: Tensor, num_kv_heads: int = 1) -> Figure:
    """How large the channels of each layer are: two maps with one logarithmic colour scale.

    keys, values: mean absolute value, `[num_layers, num_kv_heads * head_dim]`. White lines part the KV heads.
    """
    fig, panels = row_of(2, 9.4, 3.6)
    both = np.concatenate([sizes.float().numpy(force=True) for sizes in (keys, values)])
    norm = LogNorm(max(np.quantile(both, 0.05), both.max() / DECADES), both.max())
    for axes, sizes, title in zip(panels, (keys, values), ("keys", "values"), strict=True):
        image = heat(
            axes, sizes, "channel (white lines part the KV heads)" if num_kv_heads > 1 else "channel", norm=norm
        )
        head_dim = sizes.shape[1] / num_kv_heads
        for head in range(1, num_kv_heads):
            axes.axvline(head * head_dim - 0.5, color="white", linewidth=1.2)
        axes.set_title(title)
    panels[0].set_ylabel("layer")
    bar = fig.colorbar(image, ax=panels, label="mean absolute value", extend="min")
    plain_ticks(bar.ax.yaxis)
    said = "; ".join(
        f"{name} from {number(sizes.min().item())} to {number(sizes.max().item())}, and half of the layers have a "
        f"channel {number((sizes.max(1).values / sizes.median(1).values).median().item())} times the middle one or more"
        for name, sizes in (("keys", keys.float()), ("values", values.float()))
    )
    return described(
        fig,
        f"Mean absolute value of each channel in {keys.shape[0]} layers, two heat maps of layers by channels, "
        f"log scale: {said}.",
    )


def token_channel_map(x: Tensor, y: Tensor, titles: Sequence[str]) -> Figure:
    """Absolute values of two tensors `[tokens, channels]`, one head's K and V, each with its own colour scale."""
    fig, panels = row_of(2, 9.4, 3.6)
    for axes, values, title in zip(panels, (x, y), titles, strict=True):
        image = heat(axes, values.abs(), "channel", vmin=0)
        axes.set(ylabel="token", title=title)
        fig.colorbar(image, ax=axes, label="absolute value")
    said = "; ".join(
        f"{title}: mean {number(part.abs().mean().item())}, largest {number(part.abs().max().item())}, and "
        f"{strength(part)}"
        for title, part in zip(titles, (x, y), strict=True)
    )
    return described(fig, f"Absolute values as heat maps of {x.shape[0]} tokens by {x.shape[1]} channels. {said}.")


def strength(x: Tensor) -> str:
    """How far the largest channel of `[tokens, channels]` stands out, in words."""
    means = x.abs().float().mean(0)
    times = number((means.max() / means.median()).item())
    return f"the largest channel, {int(means.argmax())}, is {times} times the middle one"


def error_maps(maps: Mapping[str, Tensor], *, largest: float | None = None) -> Figure:
    """Errors of one head, `[tokens, channels]`, a map for each name, with one logarithmic colour scale.

    In each title is the root mean square (RMS). What came back exactly is pale. largest: where the scale ends, instead
    of at the largest error: for maps that are to be compared with maps of other figures.
    """
    errors = {name: values.detach().abs().float().cpu() for name, values in maps.items()}
    top = largest or max(values.max().item() for values in errors.values()) or 1.0
    fig, panels = row_of(len(maps), 1.2 + max(4.6, 2.4 * len(maps)), 3.6)
    for axes, (name, values) in zip(panels, errors.items(), strict=True):
        image = heat(axes, values.where(values > 0, float("nan")), "channel", norm=LogNorm(top / DECADES, top))
        axes.set_facecolor(COLORS["pale"])
        axes.set_title(f"{name}\nRMS {values.square().mean().sqrt().item():.3g}", fontsize=9)
    panels[0].set_ylabel("token")
    fig.colorbar(image, ax=panels, label="absolute error (pale: exact)", extend="both" if largest else "min")
    said = "; ".join(
        f"{name}: RMS {number(values.square().mean().sqrt().item())}, largest {number(values.max().item())}"
        for name, values in errors.items()
    )
    return described(
        fig, f"Absolute errors of one head's numbers as heat maps of tokens by channels, log scale. {said}."
    )


def axis_errors(errors: Mapping[str, Mapping[str, float]]) -> Figure:
    """Relative RMS errors as bars: a group for each tensor ("keys", "values"), a bar for each way to group numbers."""
    fig, axes = figure(6.6, 3.2)
    ways = list(dict.fromkeys(way for group in errors.values() for way in group))
    width = 0.8 / len(ways)
    for index, way in enumerate(ways):
        places = [place + (index - (len(ways) - 1) / 2) * width for place in range(len(errors))]
        heights = [group.get(way, float("nan")) for group in errors.values()]
        color = AXES.get(way) or CYCLE[index % len(CYCLE)]
        bars = axes.bar(places, heights, 0.92 * width, color=color, label=way)
        axes.bar_label(bars, fmt="{:#.2g}", padding=2, fontsize=8)
    axes.set_xticks(range(len(errors)), list(errors))
    axes.set(ylabel="relative RMS error")
    axes.margins(y=0.12)
    axes.grid(False, axis="x")
    axes.legend(title="scale and zero point", title_fontsize=8, **BESIDE)
    said = "; ".join(
        f"{tensor}: {listed(f'{way} {number(error)}' for way, error in group.items())}"
        for tensor, group in errors.items()
    )
    return described(fig, f"Bars of the relative RMS error by the way to share a scale and zero point. {said}.")


def quality_against_bits(points: Mapping[str, tuple[float, float, float, float]]) -> Figure:
    """Perplexity over the full cache's, logarithmic, against bits per element, metadata included.

    points: name -> (bits per element, ratio, low end, high end). The legend repeats each ratio.
    """
    fig, axes = figure(8.8, max(3.8, 0.6 + 0.21 * len(points)))
    axes.axhline(1, color=COLORS["theory"], linestyle="--", linewidth=1, label="full cache")
    for (name, (nbits, ratio, low, high)), color, marker in zip(
        points.items(), cycle(POINTS), cycle(MARKERS), strict=False
    ):
        written = f"{ratio:.3f}" if ratio < 2 else f"{ratio:.3g}" if ratio < 1000 else f"{ratio:,.0f}"
        ends = whiskers(ratio, low, high)
        axes.errorbar(nbits, ratio, ends, fmt=marker, markersize=6, capsize=5, color=color, label=f"{name}: {written}")
    least = min(ratio - whiskers(ratio, low, high)[0][0] for _, ratio, low, high in points.values())
    most = max(high for *_, high in points.values())
    room = max(most / least, 1.02) ** 0.06
    axes.set(xscale="log", yscale="log", xlabel="bits per element, with metadata", ylabel="perplexity / full cache's")
    bits = [nbits for nbits, *_ in points.values()]
    sides = min(2, *bits) * 0.94, max(bits) * 1.1
    axes.set(ylim=(min(least, 1) / room, max(most, 1) * room))
    shown = [nbits for nbits in (2, 3, 4, 5, 6, 8, 10, 16) if nbits <= sides[1]]
    axes.set_xticks(shown, [str(nbits) for nbits in shown])
    axes.set(xlim=sides)
    plain_ticks(axes.yaxis)
    if most < 20:  # too few of 1, 2, 5
        axes.yaxis.set_major_locator(MaxNLocator(6) if most < 1.6 else LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.minorticks_off()
    axes.legend(**BESIDE)
    said = "; ".join(
        f"{name}: {number(nbits)} bits, {number(ratio) if ratio >= 2 else f'{ratio:.3f}'}"
        for name, (nbits, ratio, _, _) in points.items()
    )
    return described(
        fig,
        "Perplexity over the full cache's against bits per element, metadata included, both axes logarithmic, "
        f"points with whiskers. {said}.",
    )


def reading_times(contexts: Sequence[int], timings: Mapping[str, Sequence[Timing]]) -> Figure:
    """Milliseconds of one layer's decode step, append and attend, against tokens held, both axes logarithmic.

    timings: by name, for each context. An upright line stands at the first context at which a packed cache's median is
    below that of "full", if there is one.
    """
    fig, axes = figure(7.8, 3.6)
    others = cycle((COLORS["query"], COLORS["value"], COLORS["reference GPU"]))
    for name, values in timings.items():
        timed_line(axes, contexts, values, FORMATS.get(name) or next(others), name)
    for place, context in enumerate(contexts):
        medians = {name: values[place].median for name, values in timings.items()}
        fastest = min(medians, key=lambda name: medians[name])
        if medians[fastest] < medians.get("full", 0):
            label = f"{context:,} tokens: {fastest}\nis faster than full"
            axes.axvline(context, color=FORMATS.get(fastest, "black"), linestyle="--", linewidth=1, label=label)
            break
    axes.set(xscale="log", yscale="log", xlabel="tokens held", ylabel="ms per decode step, one layer")
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    plain_ticks(axes.yaxis)
    axes.minorticks_off()
    handles, names = axes.get_legend_handles_labels()
    order = sorted(range(len(names)), key=lambda index: names[index] not in timings)  # the upright line last
    axes.legend([handles[index] for index in order], [names[index] for index in order], **BESIDE)
    curves = {name: [timing.median for timing in values] for name, values in timings.items()}
    return described(
        fig,
        "Milliseconds of one layer's decode step against tokens held, both axes logarithmic. "
        f"{ends(curves, contexts, 'ms', 1e3)}.",
    )


def bytes_parts(rows: Mapping[str, Mapping[str, float]], unit: str = "bits per element") -> Figure:
    """Where a format's bits go: a bar for each name, stacked from `PARTS`, with the sum behind it, in `unit`."""
    fig, axes = figure(8.0, 0.9 + 0.4 * len(rows))
    start = np.zeros(len(rows))
    for part in dict.fromkeys(part for row in rows.values() for part in row):
        sizes = np.array([row.get(part, 0.0) for row in rows.values()])
        axes.barh(range(len(rows)), sizes, 0.6, start, color=PARTS[part], edgecolor="white", linewidth=0.8, label=part)
        start = start + sizes
    for place, total in enumerate(start):
        axes.text(total + 0.01 * start.max(), place, f"{total:#.3g}" if total < 100 else f"{total:,.0f}", va="center",
                  fontsize=8)  # fmt: skip
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set(xlabel=unit, ylim=(len(rows) - 0.5, -0.5), xlim=(0, 1.1 * start.max()))
    axes.grid(False, axis="y")
    axes.legend(**BESIDE)
    said = "; ".join(
        f"{name}: {listed(f'{part} {number(size)}' for part, size in row.items())}" for name, row in rows.items()
    )
    return described(fig, f"Stacked bars: where {unit} go. {said}.")


def heat(axes: Axes, values: Tensor, xlabel: str, **scale):
    """A matrix as colours, rows from the top; `scale` goes to `imshow`."""
    bare(axes).set_xlabel(xlabel)
    return axes.imshow(values.float().numpy(force=True), aspect="auto", interpolation="nearest", cmap=HEAT, **scale)
