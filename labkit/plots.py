"""Figures of the labs. One look, and one colour for one thing in every lab (Okabe and Ito's colour-blind-safe set)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from labkit.measure import Timing
from labkit.specs import DATA

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
}
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
    """A figure in the labs' style, sizes in inches; `columns` panels side by side."""
    plt.rcParams.update(STYLE)
    return plt.subplots(1, columns, figsize=(width, height), **options)


# Lab 01


def bare(axes: Axes) -> Axes:
    """No grid: for pictures of matrices, where a cell's colour is the reading."""
    axes.grid(False)
    return axes


def lookup(query: Tensor, keys: Tensor, weights: Tensor, names: Sequence[str], features: Sequence[str]) -> Figure:
    """One query against key cards: the cards, the scores, the weights. `keys` is `[names, features]`."""
    shape, (cards, bars, shares) = row_of(3, 9.0, 2.9, widths=(2.2, 1, 1))
    table, rows = [query.tolist(), *keys.tolist()], ["query", *names]
    low, high = min(map(min, table)), max(map(max, table))
    bare(cards).imshow(table, cmap=HEAT, vmin=low, vmax=high, aspect="auto")
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            dark = value < (low + high) / 2
            cards.text(j, i, f"{value:g}", ha="center", va="center", color="white" if dark else "black")
    cards.axhline(0.5, color="white", linewidth=4)
    cards.set_xticks(range(len(features)), features)
    cards.set_yticks(range(len(rows)), rows)
    cards.set_title("the query and the key cards", fontsize=10)
    scores = (keys @ query).tolist()
    for axes, values, title, color, digits in (
        (bars, scores, "score: query · key", COLORS["key"], ".3g"),
        (shares, weights.tolist(), "weight: softmax", COLORS["query"], ".2f"),
    ):
        axes.barh(range(len(names)), values, color=color)
        for i, value in enumerate(values):
            axes.text(max(value, 0), i, f" {value + 0.0:{digits}}", va="center")  # + 0.0: no "-0"
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        low, high = min(0, *values), max(0, *values)
        axes.set_xlim(low - 0.05 * (high - low), high + 0.4 * (high - low or 1))
        axes.set_title(title, fontsize=10)
    return shape


def row_of(
    columns: int, width: float, height: float, widths: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """A row of panels, as a list; `widths` are relative."""
    plt.rcParams.update(STYLE)
    shape, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False, width_ratios=widths)
    return shape, list(axes[0])


def largest_weights(unscaled: Tensor, scaled: Tensor) -> Figure:
    """Histograms of the largest weight of each query, without and with the division by sqrt(head_dim)."""
    shape, axes = figure(7.0, 2.8)
    bins = [i / 40 for i in range(41)]
    axes.hist(scaled.tolist(), bins=bins, color=COLORS["key"], label="scores / sqrt(head_dim)")
    axes.hist(unscaled.tolist(), bins=bins, color=COLORS["highlight"], alpha=0.75, label="scores as they are")
    axes.set(xlabel="largest weight of a query over 32 keys", ylabel="queries", xlim=(0, 1))
    axes.legend()
    return shape


def permissions(mask: Tensor, past: int) -> Figure:
    """A causal mask, `[new_tokens, past + new_tokens]`: which keys each new token may see."""
    new_tokens, kv_len = mask.shape
    shape, axes = figure(0.55 * kv_len + 2.4, 0.5 * new_tokens + 1.4)
    color = [COLORS["pale"], COLORS["key"]]
    for i in range(new_tokens):
        for j in range(kv_len):
            seen = bool(mask[i, j])
            bare(axes).add_patch(plt.Rectangle((j, i), 1, 1, facecolor=color[seen], edgecolor="white", linewidth=2))
    if past:
        axes.axvline(past, color=COLORS["highlight"], linewidth=3)
        axes.text(past / 2, -0.15, "held", ha="center")
    axes.text(past + new_tokens / 2, -0.15, "new", ha="center")
    axes.set(xlim=(0, kv_len), ylim=(new_tokens, 0), xlabel="key at position (blue: may be seen)", aspect="equal")
    axes.set_xticks([j + 0.5 for j in range(kv_len)], [str(j) for j in range(kv_len)])
    axes.set_yticks([i + 0.5 for i in range(new_tokens)], [f"new {i} (at {past + i})" for i in range(new_tokens)])
    return shape


def heads_in_memory(tokens: int, num_heads: int, head_dim: int, wrong: Tensor, right: Tensor) -> Figure:
    """Which token each number of a head belongs to, for two ways of splitting `[heads, tokens, head_dim]` token ids."""
    shape, panels = row_of(2, 8.4, 2.3)
    for axes, heads, title in (
        (panels[0], wrong, "view to the final shape: heads mix tokens"),
        (panels[1], right, "cut, then transpose"),
    ):
        flat = heads.reshape(num_heads * tokens, head_dim).T
        bare(axes).imshow(flat.tolist(), cmap=HEAT, vmin=0, vmax=tokens - 1, aspect="auto")
        for row in range(head_dim):
            for column in range(num_heads * tokens):
                value = int(flat[row, column])
                axes.text(
                    column, row, str(value), ha="center", va="center", color="white" if value < tokens / 2 else "black"
                )
        for h in range(1, num_heads):
            axes.axvline(h * tokens - 0.5, color="white", linewidth=4)
        axes.set_xticks(
            [h * tokens + (tokens - 1) / 2 for h in range(num_heads)], [f"head {h}" for h in range(num_heads)]
        )
        axes.set_yticks([])
        axes.set_xlabel(f"in each head, left to right: places 0 to {tokens - 1}")
        axes.set_title(title, fontsize=10)
    panels[0].set_ylabel("head_dim")
    return shape


def turning(frequencies: Tensor, distances: Tensor, scores: Tensor) -> Figure:
    """Rotary positions: how far three pairs have turned by each position, and a score against the distance."""
    shape, (turn, score) = row_of(2, 8.6, 3.0)
    for pair, color, end in ((0, "key", 13), (8, "query", 65), (16, "value", 65)):
        positions = [step / 10 for step in range(10 * (end - 1) + 1)]
        angle = [(p * float(frequencies[pair])) % (2 * math.pi) for p in positions]
        # A line from one whole turn to the start of the next would cross the picture: break it there.
        line = [b if b >= a else math.nan for a, b in zip([0.0, *angle], angle, strict=False)]
        turn.plot(positions, line, "-", linewidth=1, color=COLORS[color])
        turn.plot(positions[::10], angle[::10], ".", markersize=4, color=COLORS[color], label=f"pair {pair}")
    turn.set(xlabel="position", ylabel="angle (radians, one turn = 6.28)")
    turn.legend(loc="upper left", ncols=3, fontsize=8, bbox_to_anchor=(0, 1.17))
    for row, (color, style) in zip(scores, (("highlight", "-"), ("key", "--")), strict=True):
        score.plot(distances, row, style, color=COLORS[color])
    score.set(xlabel="distance between query and key (tokens)", ylabel="score")
    score.legend(["query at position 100", "query at position 5,000"], fontsize=8)
    return shape


def key_change(change: Mapping[str, Sequence[float]]) -> Figure:
    """Relative change of the old tokens' keys by layer, log scale. Keys of `change`: "mask on", "mask off"."""
    shape, axes = figure(7.4, 3.2)
    for name, color in (("mask off", "highlight"), ("mask on", "key")):
        values = [max(value, 1e-9) for value in change[name]]
        axes.semilogy(range(len(values)), values, "o-", markersize=4, color=COLORS[color], label=name)
    axes.axhline(1.2e-7, color=COLORS["theory"], linestyle=":", label="spacing of float32 numbers, 1.2e-7")
    axes.set(xlabel="layer", ylabel="relative change of old keys\n(0 drawn at 1e-9)", ylim=(5e-10, 10))
    axes.legend(fontsize=8)
    return shape


def last_row(weights: Tensor, words: Sequence[str]) -> Figure:
    """One attention matrix `[tokens, tokens]`: the row that the next token needs framed, the others faded."""
    tokens = len(words)
    shape, axes = figure(5.4, 3.9)
    shade = [[float(weights[i, j]) if j <= i else float("nan") for j in range(tokens)] for i in range(tokens)]
    image = bare(axes).imshow(shade, cmap=HEAT, vmin=0, vmax=1)
    veil = plt.Rectangle((-0.5, -0.5), tokens, tokens - 1, facecolor="white", alpha=0.55, linewidth=0)
    axes.add_patch(veil)
    shape.colorbar(image, ax=axes, label="weight (rows above: the same scale, faded)", shrink=0.9)
    axes.add_patch(
        plt.Rectangle((-0.5, tokens - 1.5), tokens, 1, fill=False, edgecolor=COLORS["highlight"], linewidth=2.5)
    )
    axes.set(ylim=(tokens - 0.5, -0.5), xlim=(-0.5, tokens - 0.5), xlabel="key", ylabel="query")
    axes.set_xticks(range(tokens), words, rotation=60, ha="right")
    axes.set_yticks(range(tokens), words)
    return shape


def tower(weights: Tensor, words: Sequence[str], layers: Sequence[int]) -> Figure:
    """Attention of some layers, mean over heads. `weights` is `[num_layers, num_heads, tokens, tokens]`."""
    side = max(3.3, 0.6 + 0.12 * len(words))  # inches: room for one label per token
    shape, panels = row_of(len(layers), side * len(layers), side + 0.4, widths=None)
    for axes, layer in zip(panels, layers, strict=True):
        image = bare(axes).imshow(weights[layer].mean(0).tolist(), cmap=HEAT, vmin=0, vmax=1)
        axes.set_title(f"layer {layer}, mean of {weights.shape[1]} heads", fontsize=10)
        axes.set_xticks(range(len(words)), words, rotation=90, fontsize=7)
        axes.set_yticks(range(len(words)), words if axes is panels[0] else [], fontsize=7)
        axes.set_xlabel("key")
    panels[0].set_ylabel("query")
    shape.colorbar(image, ax=panels, label="weight", shrink=0.8)
    return shape


def where_weight_goes(shares: Mapping[str, Sequence[float]]) -> Figure:
    """Stacked shares of attention by layer: to the first token, the token itself, the one before, all others."""
    shape, axes = figure(7.6, 3.2)
    colors = [COLORS["highlight"], COLORS["query"], COLORS["value"], COLORS["pale"]]
    bottom = [0.0] * len(next(iter(shares.values())))
    for (name, values), color in zip(shares.items(), colors, strict=True):
        axes.bar(range(len(bottom)), values, width=1.0, bottom=bottom, color=color, label=name)
        bottom = [below + value for below, value in zip(bottom, values, strict=True)]
    axes.set(xlabel="layer", ylabel="share of attention", ylim=(0, 1), xlim=(-0.5, len(bottom) - 0.5))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.18), ncols=4, fontsize=8)
    return shape


def attention_row(weights: Tensor, words: Sequence[str], query: int, title: str) -> Figure:
    """One query's weights over the words it may see; the query's own word is marked. `weights` is `[tokens]`."""
    shape, axes = figure(max(5.5, 0.42 * len(words) + 1.2), 2.7)
    colors = [COLORS["highlight"] if i == query else COLORS["key"] for i in range(len(words))]
    axes.bar(range(len(words)), weights.tolist(), color=colors)
    axes.axvspan(query + 0.5, len(words) - 0.5, color=COLORS["pale"], zorder=0)
    axes.set_xticks(range(len(words)), words, rotation=60, ha="right")
    top = min(1.0, max(0.05, 1.15 * float(weights.max())))
    axes.set(ylabel="weight", ylim=(0, top), xlim=(-0.6, len(words) - 0.4))
    axes.set_title(title, fontsize=10)
    return shape


def times_by_length(
    lengths: Sequence[int], seconds: Mapping[str, Sequence[float]], ylabel: str = "milliseconds"
) -> Figure:
    """Measured time against the number of tokens, both axes logarithmic."""
    shape, axes = figure(7.0, 3.3)
    looks = [(COLORS["without cache"], "o-"), (COLORS["key"], "s-"), (COLORS["value"], "^-")]
    for (name, values), (color, style) in zip(seconds.items(), looks, strict=False):
        axes.loglog(lengths, [1e3 * value for value in values], style, color=color, label=name, markersize=5)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set(xlabel="tokens in the prompt", ylabel=ylabel)
    axes.legend()
    return shape


# Lab 02


def work_per_step(prompt: int, steps: int) -> Figure:
    """Tokens run at each step of a generation, one cell per token: without a cache and with one."""
    shape, panels = row_of(2, 8.4, 3.0)
    total = prompt + steps - 1
    for axes, cached in zip(panels, (False, True), strict=True):
        run = 0
        for step in range(steps):
            for token in range(prompt + step):
                new = not cached or step == 0 or token == prompt + step - 1
                color = COLORS["with cache" if cached else "without cache"] if new else COLORS["pale"]
                bare(axes).add_patch(plt.Rectangle((step, token), 1, 1, facecolor=color, edgecolor="white"))
                run += new
        name = "with a cache" if cached else "without a cache"
        axes.set(xlim=(0, steps), ylim=(total, 0), xlabel="step", title=f"{name}: {run} tokens run")
        axes.set_xticks([step + 0.5 for step in range(steps)], [str(step + 1) for step in range(steps)])
        axes.set_yticks([token + 0.5 for token in range(total)], [str(token) for token in range(total)], fontsize=8)
    panels[0].set_ylabel("position of the token")
    marks = {"run, without a cache": "without cache", "run, with a cache": "with cache", "kept, not run": "pale"}
    patches = [plt.Rectangle((0, 0), 1, 1, color=COLORS[color]) for color in marks.values()]
    shape.legend(patches, list(marks), loc="outside lower center", ncols=3, fontsize=8)
    return shape


def cache_fill(words: Sequence[str], prompt: int, num_layers: int, step: int, layers_done: int) -> Figure:
    """What a cache holds after `layers_done` layers of a step: layers up, positions to the right.

    words: the sequence, one per token. prompt: tokens of it that prefill runs, in step 0; step i runs token
    `prompt + i - 1`. Columns of this step are highlighted in the layers that have run.
    """
    first, end = (0, prompt) if step == 0 else (prompt + step - 1, prompt + step)
    shape, axes = figure(9.0, 3.7)
    state = [[0.0] * len(words) for _ in range(num_layers)]
    for layer in range(num_layers):
        for position in range(end):
            if position < first:
                state[layer][position] = 1.0
            elif layer < layers_done:
                state[layer][position] = 2.0
    colors = ListedColormap([COLORS["pale"], COLORS["with cache"], COLORS["highlight"]])
    bare(axes).pcolormesh(state, cmap=colors, vmin=0, vmax=2, edgecolors="white", linewidth=0.5)
    end_of_prompt = axes.axvline(prompt, color="black", linestyle="--", linewidth=1)
    axes.set_xticks([i + 0.5 for i in range(len(words))], words, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks([0.5, num_layers - 0.5], ["0", str(num_layers - 1)])
    axes.set(ylabel="layer", xlabel="token", xlim=(0, len(words)))
    phase = "prefill: the prompt's tokens together" if step == 0 else f"decode step {step}: one token"
    axes.set_title(f"{phase}; {layers_done} of {num_layers} layers have appended", fontsize=10)
    marks = [("held", COLORS["with cache"]), ("appended in this step", COLORS["highlight"]), ("empty", COLORS["pale"])]
    patches = [plt.Rectangle((0, 0), 1, 1, color=color) for _, color in marks]
    handles, names = [*patches, end_of_prompt], [*(name for name, _ in marks), "end of the prompt"]
    axes.legend(handles, names, loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    return shape


def time_per_token(
    positions: Sequence[int],
    seconds: Mapping[str, Sequence[Timing]],
    theory: Mapping[str, Sequence[float]],
    recorded: Sequence[tuple[str, str, int, float]] = (),
) -> Figure:
    """Milliseconds of one step against position, log scale: this machine's points, the theory as lines, records.

    seconds, theory: by "with cache" and "without cache". recorded: (device, name, position, seconds).
    """
    shape, axes = figure(7.4, 3.8)
    for name, timings in seconds.items():
        middle = [timing.median * 1e3 for timing in timings]
        spread = [timing.spread * 1e3 for timing in timings]
        axes.errorbar(positions, middle, spread, fmt="o-", markersize=4, capsize=2, color=COLORS[name], label=name)
        expected = [value * 1e3 for value in theory[name]]
        axes.plot(positions, expected, ":", color=COLORS[name], label=f"{name}, theory")
    for index, (device, name, position, value) in enumerate(recorded):
        marker = "s" if name == "with cache" else "D"
        axes.plot(position, value * 1e3, marker, color=COLORS["reference GPU"], label=device if not index else None)
    axes.set(yscale="log", xlabel="position of the new token", ylabel="ms per token (log scale)")
    plain_ticks(axes.yaxis)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return shape


def plain_ticks(axis: Axis) -> None:
    """1, 2, 5, 10, 20, ... on a logarithmic axis, written as people write them."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


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
    shape, axes = figure(7.0, 3.2)
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
    return shape


def step_times(seconds: Sequence[float], prompt: int) -> Figure:
    """The time of each step of one generation: the prefill of `prompt` tokens, then decode."""
    shape, axes = figure(7.4, 2.9)
    colors = [COLORS["query"], *[COLORS["with cache"]] * (len(seconds) - 1)]
    axes.bar(range(len(seconds)), [value * 1e3 for value in seconds], color=colors)
    axes.set(xlabel="step (each gives one token)", ylabel="ms")
    axes.set_xticks(range(0, len(seconds), 4))
    patches = [plt.Rectangle((0, 0), 1, 1, color=color) for color in (colors[0], colors[-1])]
    axes.legend(patches, [f"prefill, {prompt} tokens: TTFT", "decode, 1 token each: TPOT"], fontsize=8)
    return shape


def tokens_per_turn(stateless: Sequence[int], stateful: Sequence[int]) -> Figure:
    """Tokens run in each turn of a conversation, for a server that forgets and one that keeps its cache."""
    shape, axes = figure(6.4, 2.9)
    for shift, values, name, color in (
        (-0.2, stateless, "stateless: the whole history again", COLORS["without cache"]),
        (0.2, stateful, "stateful: what is new", COLORS["with cache"]),
    ):
        bars = axes.bar([turn + shift for turn in range(len(values))], values, width=0.38, color=color, label=name)
        axes.bar_label(bars, fontsize=8)
    axes.set_xticks(range(len(stateless)), [f"turn {turn + 1}" for turn in range(len(stateless))])
    axes.set(ylabel="tokens run")
    axes.legend(fontsize=8)
    return shape


def change_by_layer(changes: Sequence[float]) -> Figure:
    """Relative change of the keys, one bar per layer."""
    shape, axes = figure(7.0, 2.7)
    axes.bar(range(len(changes)), changes, color=COLORS["key"])
    axes.set(xlabel="layer", ylabel="relative change\nof the other tokens' keys", ylim=(0, None))
    axes.grid(False, axis="x")
    return shape


def recorded_decode() -> list[tuple[str, str, int, float]]:
    """Recorded times of a decode step, as (device, "with cache" or "without cache", position, seconds).

    From the figures called `with_cache_ms_at_<position>` and `without_cache_ms_at_<position>` in
    `data/results/decode_*.json`; empty when there is no such file.
    """
    found = []
    for path in sorted((DATA / "results").glob("decode_*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        for name, value in record.get("figures", {}).items():
            if match := re.fullmatch(r"(with|without)_cache_ms_at_(\d+)", name):
                found.append((str(record["device"]), f"{match[1]} cache", int(match[2]), float(value) / 1e3))
    return found
