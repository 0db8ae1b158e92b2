"""Figures of lab 07: eviction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import LogNorm, to_hex
from matplotlib.figure import Figure
from torch import Tensor

from labkit.labs.lab07.material import times_as_fast
from labkit.labs.lab07.scores import FULL, Kept, Score
from labkit.labs.lab07.timeline import Timeline
from labkit.measure import Timing
from labkit.plots.described import described, ends, listed
from labkit.plots.style import COLORS, CYCLE, HEAT, MARKERS, bare, figure, row_of
from labkit.quality.recall import wilson

BESIDE: dict[str, Any] = {"fontsize": 8, "loc": "upper left", "bbox_to_anchor": (1, 1)}
LINES = {0: COLORS["without cache"], 1: COLORS["query"], 4: COLORS["with cache"]}


def attention_by_position(shares: Tensor, first: int = 16) -> Figure:
    """How much attention each position gets, `[layers, tokens]`, averaged over heads and later queries; the `first`
    positions once more, enlarged."""
    fig, (near, whole) = row_of(2, 9.2, 3.4, widths=(1, 2.4))
    least, tokens = 1e-4, shares.shape[1]
    for axes, last in ((near, first), (whole, tokens)):
        image = bare(axes).imshow(shares[:, :last].clamp(min=least), aspect="auto", cmap=HEAT, norm=LogNorm(least, 1),
                                  interpolation="nearest")  # fmt: skip
    near.set(xlabel="position in the text", ylabel="layer", title=f"the first {first} tokens")
    whole.set(xlabel="position in the text", title=f"all {tokens}")
    for axes in (near, whole):
        axes.title.set_fontsize(9)
    fig.colorbar(image, ax=whole, pad=0.01).set_label("share of the attention\n(log scale)")
    mean = shares.mean(0)
    return described(
        fig,
        f"Share of the attention that each of {tokens} positions gets in {shares.shape[0]} layers, heat maps "
        f"on a log scale, the first {first} enlarged. Averaged over layers, position 0 gets {mean[0]:.0%}, "
        f"positions 1 to {first - 1} together {mean[1:first].sum():.0%}, all later ones {mean[first:].sum():.0%}.",
    )


def hitters(received: Tensor, words: Sequence[str], most: int = 10) -> Figure:
    """The tokens that got most attention, `[tokens]`, with their positions; the rest as one bar."""
    share = (received / received.sum()).double().cpu()
    order = share.argsort(descending=True)[:most].tolist()
    names = [f"{shown(words[place])}  {place}" for place in order]
    fig, axes = figure(7.0, 0.26 * (most + 1) + 0.9)
    values = [100 * share[place].item() for place in order]
    rest = 100 - sum(values)
    axes.barh(range(most), values, color=COLORS["with cache"])
    axes.barh(most, rest, color=COLORS["reserve"])
    axes.set_yticks(range(most + 1), [*names, f"the other {len(words) - most}"])
    axes.invert_yaxis()
    for place, value in enumerate([*values, rest]):
        axes.text(value + 0.5, place, f"{value:.1f}%", va="center", fontsize=8)
    axes.set(xlabel="share of the attention, %", ylabel="token and position", xlim=(0, max(*values, rest) * 1.12))
    said = ", ".join(
        f"“{words[place].strip()}” at {place} {value:.1f}%" for place, value in zip(order, values, strict=True)
    )
    return described(
        fig,
        f"Bars: the {most} tokens that get most attention, and all others as one. {said}; the other "
        f"{len(words) - most} together {rest:.1f}%.",
    )


def shown(word: str) -> str:
    """A token as a label: its spaces and line breaks made visible, nothing that matplotlib would set as a formula."""
    return word.replace("\n", "⏎").replace(" ", "·").replace("$", r"\$") or "∅"


def losses_over_text(losses: Mapping[int | None, Tensor], budget: int, average: int = 32) -> Figure:
    """Running means of the loss per token, by the number of sinks; None is the full cache."""
    fig, axes = figure(8.0, 3.4)
    for sinks, values in losses.items():
        kernel = torch.ones(1, 1, average, dtype=values.dtype) / average
        mean = torch.nn.functional.conv1d(values[None, None], kernel)[0, 0]
        name = "everything kept" if sinks is None else f"{sinks} sink{'s' if sinks != 1 else ''}"
        color = COLORS["theory"] if sinks is None else LINES.get(sinks, COLORS["reference GPU"])
        axes.plot(range(average, len(values) + 1), mean, color=color,
                  label=name, linestyle="--" if sinks is None else ":" if sinks == 4 else "-",
                  linewidth=2.5 if sinks == 1 else 1.5)  # fmt: skip
    axes.axvline(budget, color=COLORS["reserve"], linewidth=1)
    axes.text(budget + 2, axes.get_ylim()[1], "the budget is full", va="top", fontsize=8, color=COLORS["theory"])
    axes.set(xlabel="tokens seen", ylabel=f"loss, nats per token\n(mean of the last {average})")
    axes.legend(fontsize=8, loc="upper left")
    means = "; ".join(
        f"{'everything kept' if sinks is None else f'sinks: {sinks}'}: {values[budget:].mean():.2f}"
        for sinks, values in losses.items()
    )
    return described(
        fig,
        f"Loss per token over {len(next(iter(losses.values())))} tokens seen, running means of {average}. "
        f"Until the budget of {budget} is full all lines are one. Mean after that, nats: {means}.",
    )


def kept(by_policy: Mapping[str, Sequence[float]], fact: Sequence[int], question: int) -> Figure:
    """By how many KV heads each position of a text is kept, a row per policy. fact: positions of what will be asked
    for; question: where the question begins."""
    fig, axes = figure(8.8, 0.42 * len(by_policy) + 1.3)
    shares = torch.tensor([list(values) for values in by_policy.values()])
    image = bare(axes).imshow(shares, aspect="auto", cmap=HEAT, vmin=0, vmax=1, interpolation="nearest")
    for row in range(1, len(by_policy)):
        axes.axhline(row - 0.5, color="white", linewidth=3)
    axes.set_yticks(range(len(by_policy)), list(by_policy))
    for first, last, name in ((fact[0], fact[-1], "the number"), (question, shares.shape[1] - 1, "the question")):
        axes.annotate("", (first - 0.5, -0.75), (last + 0.5, -0.75), annotation_clip=False,
                      arrowprops={"arrowstyle": "|-|", "mutation_scale": 3, "color": COLORS["highlight"]})  # fmt: skip
        axes.text((first + last) / 2, -0.95, name, ha="center", va="bottom", fontsize=8, color=COLORS["highlight"])
    axes.set(xlabel="position in the text")
    axes.set_title(" ", fontsize=10)  # room for the marks
    fig.colorbar(image, ax=axes, pad=0.01).set_label("share of KV heads\nthat keep it")
    said = "; ".join(
        f"{name}: {100 * sum(values[place] for place in fact) / len(fact):.0f}%" for name, values in by_policy.items()
    )
    return described(
        fig,
        f"Which positions of a text each policy keeps, a heat map of policies by {shares.shape[1]} positions, "
        f"with the number and the question marked. Share of KV heads that keep the number's tokens, {fact[0]} "
        f"to {fact[-1]}: {said}.",
    )


def table(found: Mapping[str, Mapping[Kept, Score]], first: str) -> Figure:
    """Tasks by policies and budgets, the full cache at the left: the share of the answers' tokens that are right, in
    %; of `first`, the perplexity over the full cache's."""
    tasks, columns = list(found), list(next(iter(found.values())))
    names = dict.fromkeys(name for name, _ in columns)
    fig, axes = figure(11.4, 0.4 * len(tasks) + 1.5)
    values = [[goodness(found[task][kept], task == first) for kept in columns] for task in tasks]
    bare(axes).imshow(values, aspect="auto", cmap=HEAT, vmin=0, vmax=1)
    for row, task in enumerate(tasks):
        for column, kept in enumerate(columns):
            axes.text(column, row, cell(found[task][kept], task == first), ha="center", va="center", fontsize=7.5,
                      color="black" if values[row][column] > 0.55 else "white")  # fmt: skip
    axes.set_xticks(range(len(columns)), [f"{100 * share:.0f}" for _, share in columns], fontsize=8)
    for name in names:
        places = [place for place, (other, _) in enumerate(columns) if other == name]
        axes.text(sum(places) / len(places), -1.15, name.replace(", ", ",\n"), ha="center", va="bottom", fontsize=9)
        axes.axvline(places[-1] + 0.5, color="white", linewidth=4)
    axes.text(-0.7, -0.55, "% kept", ha="right", va="bottom", fontsize=8)
    rows = [f"{task}\n(perplexity: low is good)" if task == first else task for task in tasks]
    axes.set_yticks(range(len(tasks)), rows, fontsize=9)
    axes.axhline(tasks.index(first) + 0.5, color="white", linewidth=6)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)

    def by_budget(row: Mapping[Kept, Score], name: str, task: str) -> str:
        return ", ".join(cell(score, task == first) for (other, _), score in row.items() if other == name)

    said = ". ".join(
        f"{task}: {'; '.join(f'{name} {by_budget(row, name, task)}' for name in names)}" for task, row in found.items()
    )
    kept_by = "; ".join(
        f"{name} {', '.join(f'{100 * share:.0f}' for other, share in columns if other == name)}" for name in names
    )
    return described(
        fig,
        f"A table of tasks by policies and by how much they keep, coloured from bad to good. Of “{first}” perplexity "
        f"over the full cache's, of the others % of the answers' tokens. % kept: {kept_by}. {said}.",
    )


def cell(score: Score, by_perplexity: bool) -> str:
    """As the table writes it: % of the tokens, or how many times the full cache's perplexity."""
    ratio = score.perplexity
    return f"{ratio:.2f}" if by_perplexity and ratio < 10 else f"{ratio if by_perplexity else 100 * score.share:.0f}"


def goodness(score: Score, by_perplexity: bool) -> float:
    """From 0 to 1, for the colour: the share that is right, or one over the perplexity's ratio."""
    return min(1.0, 1 / score.perplexity) if by_perplexity else score.share


def recalled(counts: Mapping[Kept, tuple[int, int]], control: str) -> Figure:
    """Which share of the answers is right to the last token, a panel for each budget: points, and Wilson's interval of
    95%. counts: by policy and budget such answers, and texts. `control` has a colour of its own; the band is the full
    cache's interval."""
    budgets = sorted({share for _, share in counts if share < 1}, reverse=True)
    names = list(dict.fromkeys(name for name, share in counts if share < 1))
    texts = next(iter(counts.values()))[1]
    fig, panels = row_of(len(budgets), 9.2, 0.26 * len(names) + 1.3)
    for axes, budget in zip(panels, budgets, strict=True):
        low, high = (100 * min(1.0, end) for end in wilson(*counts[FULL]))
        axes.axvspan(low, high, color=COLORS["pale"], label="everything kept")
        for place, name in enumerate(names):
            hits, trials = counts[name, budget]
            share, ends_at = 100 * hits / trials, [100 * end for end in wilson(hits, trials)]
            color = COLORS["without cache"] if name == control else COLORS["with cache"]
            label = "the control" if name == control else "a policy" if place == 0 else None
            axes.errorbar(share, place, xerr=[[max(0, share - ends_at[0])], [max(0, ends_at[1] - share)]], color=color,
                          fmt="D" if name == control else "o", markersize=5, capsize=3, label=label)  # fmt: skip
        axes.set_yticks(range(len(names)), names if axes is panels[0] else [""] * len(names), fontsize=9)
        axes.set(xlim=(-4, 104), ylim=(len(names) - 0.5, -0.5), xlabel="% of numbers found whole")
        axes.set_title(f"{budget:.0%} kept", fontsize=10)
    fig.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    said = "; ".join(
        f"{budget:.0%} kept: {listed(f'{name} {counts[name, budget][0]}' for name in names)}" for budget in budgets
    )
    return described(
        fig,
        f"Numbers found whole, of {texts} texts, points with intervals of 95%, a panel for each budget. Everything "
        f"kept: {counts[FULL][0]}. {said}.",
    )


def paying(
    lengths: Sequence[int], seconds: Mapping[str, Sequence[Timing]], theory: Sequence[float], full: str = "full"
) -> Figure:
    """How many times as long the full cache's step takes as an evicting one, against tokens seen: above 1 evicting
    pays. seconds: by cache, for each length; theory: the ratio of the bytes that the two read."""
    fig, axes = figure(7.8, 3.4)
    axes.axhline(1, color=COLORS["reserve"], linewidth=1.2, label="as long as the full cache's")
    axes.plot(lengths, theory, ":", color=COLORS["theory"], label="theory: bytes read")
    ratios = {}
    for (name, timings), color, marker in zip(
        ((name, timings) for name, timings in seconds.items() if name != full), CYCLE, MARKERS, strict=False
    ):
        ratios[name], off = zip(*map(times_as_fast, seconds[full], timings), strict=True)
        axes.errorbar(lengths, ratios[name], off, fmt=f"{marker}-", markersize=4.5, capsize=2, color=color, label=name)
    axes.set(xscale="log", xlabel="tokens seen (log scale); an evicting cache holds a quarter of them",
             ylabel="full step's time /\nevicting step's")  # fmt: skip
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.legend(**BESIDE)
    return described(
        fig,
        "The full cache's decode step over an evicting one's, against tokens seen, lines with spreads; above 1 "
        f"evicting pays. {ends({**ratios, 'theory, bytes read': theory}, lengths)}.",
    )


def bytes_over_tokens(by_cache: Mapping[str, Sequence[int]], first: int) -> Figure:
    """MB that caches hold after each token; the first value is of `first` tokens."""
    fig, axes = figure(7.4, 3.2)
    for (name, values), color, marker in zip(by_cache.items(), CYCLE, MARKERS, strict=False):
        seen = range(first, first + len(values))
        axes.plot(seen, [value / 1e6 for value in values], color=color, label=name, marker=marker,
                  markevery=max(1, len(values) // 8), markersize=4)  # fmt: skip
    axes.set(xlabel="tokens seen", ylabel="MB held", ylim=(0, None))
    axes.legend(fontsize=8, loc="upper left")
    last = first + len(next(iter(by_cache.values()))) - 1
    return described(fig, f"MB held against tokens seen, as lines. {ends(by_cache, (first, last), 'MB', 1e-6)}.")


def timelines(lines: Sequence[Timeline]) -> Figure:
    """Which positions each policy holds after each token, a panel for each policy."""
    fig, panels = row_of(len(lines), 2.5 * len(lines) + 0.9, 3.1)
    for axes, line in zip(panels, lines, strict=True):
        come = torch.ones(len(line.held), len(line.words)).tril().bool()
        held = np.ma.masked_array(line.held, mask=~come.numpy())  # what has not come yet is white, what left is dark
        image = bare(axes).imshow(held, aspect="auto", cmap=HEAT, vmin=0, vmax=1, interpolation="nearest")
        axes.set(xlabel="position")
        axes.set_title(line.policy, fontsize=9)
    panels[0].set(ylabel="tokens seen")
    fig.colorbar(image, ax=panels, pad=0.01).set_label("share of KV heads that hold it")
    said = "; ".join(
        f"{line.policy}: {sum(share > 0 for share in line.held[-1])} of {len(line.words)} positions held by "
        f"some KV head, {sum(share > 0 for share in line.held[-1][:4])} of the first 4"
        for line in lines
    )
    return described(
        fig,
        "Which positions each policy holds after each token, a panel for each: tokens seen downwards, "
        f"positions to the right. At the end, {said}.",
    )


def moment_of(line: Timeline, moment: int, per_row: int = 9) -> Figure:
    """The text as far as it was read, each token's box coloured by how many KV heads hold it; what lost holders with
    this token is framed."""
    rows = -(-len(line.words) // per_row)
    fig, axes = figure(9.0, 0.5 * rows + 0.5)
    bare(axes).axis("off")
    colors = plt.get_cmap(HEAT)
    lost = set(line.dropped(moment)[:8])
    for place, word in enumerate(line.words):
        row, column = divmod(place, per_row)
        if place <= moment:
            share = line.held[moment][place]
            face, ink = to_hex(colors(share)), "black" if share > 0.55 else "white"
        else:
            face, ink = "#FFFFFF", "#999999"
        frame = COLORS["highlight"] if place in lost else "#BBBBBB"
        axes.add_patch(plt.Rectangle((column + 0.02, rows - row - 0.92), 0.96, 0.84, facecolor=face, edgecolor=frame,
                                     linewidth=2.2 if place in lost else 0.6))  # fmt: skip
        axes.text(column + 0.5, rows - row - 0.5, shown(word)[:12], ha="center", va="center", fontsize=8, color=ink)
    axes.set(xlim=(0, per_row), ylim=(0, rows))
    gone = sum(share < 1e-6 for share in line.held[moment][: moment + 1])
    let_go = listed(f"“{line.words[place].strip()}” at {place}" for place in sorted(lost)) if lost else "none"
    return described(
        fig,
        f"The text in {len(line.words)} boxes, coloured by how many KV heads hold each token. {line.policy}, "
        f"{moment + 1} tokens read: {gone} held by none; with this token others let go of (framed): {let_go}.",
    )
