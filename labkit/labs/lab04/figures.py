"""Figures of lab 04: grouped-query attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from labkit.measure import Timing
from labkit.plots.described import described, ends, number
from labkit.plots.style import COLORS, bare, figure, plain_ticks, row_of, timed_line, whiskers

WAYS = {"MHA": COLORS["theory"], "GQA, repeated": COLORS["without cache"], "GQA, grouped": COLORS["with cache"]}
KINDS = {
    "MHA": COLORS["theory"],
    "GQA": COLORS["with cache"],
    "MQA": COLORS["weights"],
    "latent": COLORS["value"],
    "GQA, windows": COLORS["query"],
    "GQA, shared": COLORS["reference GPU"],
}
LINES = ("#D55E00", "#E69F00", "#0072B2", "#009E73", "#CC79A7")


def head_groups(num_heads: int, kv_heads: Sequence[int]) -> Figure:
    """Which KV head each query head reads, a panel for each number of KV heads."""
    fig, panels = row_of(len(kv_heads), 9.0, 2.5)
    for axes, count in zip(panels, kv_heads, strict=True):
        group = num_heads // count
        places = [(group - 1) / 2 + index * group for index in range(count)]
        for head in range(num_heads):
            axes.plot([head, places[head // group]], [1, 0], color=COLORS["theory"], linewidth=1.5, zorder=1)
        heads = axes.scatter(range(num_heads), [1] * num_heads, s=190, color=COLORS["query"], zorder=2)
        held = axes.scatter(places, [0] * count, s=190, marker="s", color=COLORS["key"], zorder=2)
        for points, marks, x in ((1, "black", range(num_heads)), (0, "white", places)):
            for index, place in enumerate(x):
                axes.text(place, points, str(index), ha="center", va="center", color=marks, fontsize=8, zorder=3)
        name = "MHA" if count == num_heads else "MQA" if count == 1 else "GQA"
        axes.set_title(f"{name}: {count} KV head{'s' if count > 1 else ''}, num_queries_per_kv = {group}", fontsize=9)
        bare(axes).set(xlim=(-0.7, num_heads - 0.3), ylim=(-0.45, 1.35))
        axes.axis("off")
    fig.legend([heads, held], ["query head", "KV head: K and V, cached"], loc="outside lower center", ncols=2,
                 fontsize=8)  # fmt: skip
    return described(
        fig,
        f"{num_heads} query heads above, KV heads below, a line from each query head to the KV head that it "
        f"reads. {'; '.join(f'KV heads: {count}, num_queries_per_kv = {num_heads // count}' for count in kv_heads)}.",
    )


def expansion_times(
    contexts: Sequence[int], timings: Mapping[str, Sequence[Timing]], theory: Mapping[str, Sequence[float]]
) -> Figure:
    """Milliseconds of one layer's decode step against context, both axes logarithmic: measured, and the bytes' floor.

    timings, theory (seconds): by "MHA", "GQA, repeated", "GQA, grouped".
    """
    fig, axes = figure(7.8, 3.6)
    for name, values in timings.items():
        timed_line(axes, contexts, values, WAYS[name], name)
        expected = [value * 1e3 for value in theory[name]]
        axes.plot(contexts, expected, ":", color=WAYS[name], label=f"{name}: floor")
    axes.set(xscale="log", yscale="log", xlabel="tokens held (both axes: log scale)",
             ylabel="ms per decode step, one layer\n(medians; whiskers: spread)")  # fmt: skip
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.minorticks_off()
    plain_ticks(axes.yaxis)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    medians = {name: [timing.median for timing in values] for name, values in timings.items()}
    return described(
        fig,
        "Milliseconds of one layer's decode step against tokens held, both axes logarithmic: measured, and "
        f"the bytes' floor as dotted lines. {ends(medians, contexts, 'ms', 1e3)}. Floors: "
        f"{ends(theory, contexts, 'ms', 1e3)}.",
    )


def kept_per_token(rows: Sequence[tuple[str, str, float, float]]) -> Figure:
    """What models keep per token and what MHA would keep, in KiB on a logarithmic axis, smallest at the top.

    rows: (model, kind, bytes kept, bytes with MHA); the kind is one of `KINDS`.
    """
    rows = sorted(rows, key=lambda row: row[2])
    fig, axes = figure(8.4, 0.3 * len(rows) + 1.2)
    for place, (_, kind, *both) in enumerate(rows):
        kept, full = (value / 1024 for value in both)
        axes.plot([kept, full], [place, place], color=COLORS["pale"], linewidth=4, zorder=1)
        axes.plot(full, place, "|", markersize=15, markeredgewidth=2, color=COLORS["theory"], zorder=2)
        axes.plot(kept, place, "o", markersize=8, color=KINDS[kind], zorder=3)
        if full > 1.01 * kept:
            axes.text(full * 1.15, place, f"{full / kept:.0f} times", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.set(
        xscale="log",
        xlabel="KiB per token, all layers (float16); figures: times smaller than with MHA",
        ylim=(len(rows) - 0.4, -0.6),
    )
    axes.set_xlim(right=axes.get_xlim()[1] * 2.5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    used = [kind for kind in KINDS if any(row[1] == kind for row in rows)]
    marks = [plt.Line2D([], [], marker="o", linestyle="", color=KINDS[kind], markersize=8) for kind in used]
    would = plt.Line2D([], [], marker="|", linestyle="", color=COLORS["theory"], markersize=11, markeredgewidth=2)
    axes.legend([*marks, would], [*used, "with MHA"], fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axes.grid(False, axis="y")
    said = "; ".join(
        f"{name} ({kind}) {number(kept / 1024)}, MHA {number(full / 1024)}" for name, kind, kept, full in rows
    )
    return described(
        fig, f"KiB per token, all layers, on a logarithmic axis: what each model keeps, and what MHA would. {said}."
    )


def perplexities(rows: Mapping[str, tuple[float, float, float]], guessing: float) -> Figure:
    """Perplexity of changed models, points on a logarithmic axis.

    rows: name -> (perplexity, low end, high end); "original" first.
    guessing: the perplexity of a model that gives every token of its vocabulary the same probability: their number.
    """
    fig, axes = figure(7.6, 0.32 * len(rows) + 1.1)
    for place, (name, (value, low, high)) in enumerate(rows.items()):
        color = COLORS["with cache"] if name == "original" else COLORS["without cache"]
        axes.plot(value, place, "o", markersize=8, color=color, zorder=3)
        axes.errorbar(value, place, xerr=whiskers(value, low, high), color="black", capsize=3, linewidth=1, zorder=2)
        left = high < guessing < 20 * high  # the dashed line would cross the number
        axes.text(low / 1.5 if left else high * 1.5, place, f"{float(f'{value:.3g}'):,.0f}", va="center",
                  ha="right" if left else "left", fontsize=8)  # fmt: skip
    axes.axvline(guessing, color=COLORS["theory"], linestyle="--", linewidth=1, label=f"guessing: {guessing:,.0f}")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set(xscale="log", xlabel="perplexity (log scale; whiskers: one standard error of the difference)")
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlim=(10, max(max(high for *_, high in rows.values()), guessing) * 40))
    axes.grid(False, axis="y")
    said = "; ".join(f"{name} {number(value)}" for name, (value, _, _) in rows.items())
    return described(
        fig,
        f"Perplexity of changed models, points with whiskers on a logarithmic axis. {said}; guessing "
        f"{number(guessing)}.",
    )


def over_ranks(curves: Mapping[str, Mapping[int, tuple[float, float]]]) -> Figure:
    """A cache over many GPUs. curves: name -> {GPUs: (share of the cache on each, all together over one GPU's)}."""
    fig, panels = row_of(2, 9.2, 3.4)
    titles = ("kept on each GPU", "kept on all GPUs together")
    labels = ("share of one request's cache", "times one request's cache")
    ranks = sorted({rank for points in curves.values() for rank in points})
    for which, axes in enumerate(panels):
        for index, (name, points) in enumerate(curves.items()):
            # Later curves thinner and dashed: where two lie on each other, both are seen.
            look: dict[str, Any] = {
                "color": LINES[index % len(LINES)],
                "linewidth": 4 - index,
                "markersize": 9 - 1.5 * index,
            }
            values = [pair[which] for pair in points.values()]
            axes.plot(list(points), values, ("o-", "s-", "^-", "D--", "v:")[index % 5], label=name, **look)
        axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel=labels[which], title=titles[which])
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.minorticks_off()
    least = min(share for points in curves.values() for share, _ in points.values())
    shares = [rank for rank in ranks if 1 / rank >= least]
    panels[0].set_yticks([1 / rank for rank in shares], ["1" if rank == 1 else f"1/{rank}" for rank in shares])
    panels[1].set_yticks(ranks, [str(rank) for rank in ranks])
    for axes in panels:
        axes.minorticks_off()
    handles, names = panels[0].get_legend_handles_labels()
    fig.legend(handles, names, loc="outside lower center", ncols=2, fontsize=8)
    said = "; ".join(
        f"{name}: on {max(points)} GPUs {number(points[max(points)][0])} of it on each, "
        f"{number(points[max(points)][1])} times it on all together"
        for name, points in curves.items()
    )
    return described(
        fig,
        f"One request's cache over 1 to {ranks[-1]} GPUs, both axes logarithmic: left the share on each GPU, "
        f"right all GPUs together. {said}.",
    )
