"""Figures of lab 02: a cache from scratch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap, to_rgba
from matplotlib.figure import Figure

from labkit.measure import Timing
from labkit.plots.described import described, ends, final, listed, number
from labkit.plots.style import COLORS, bare, figure, plain_ticks, row_of, timed_line

KEPT = 0.3  # opacity of what a step finds in the cache


def work_per_step(prompt: int, steps: int) -> Figure:
    """Tokens run at each step of a generation, one cell per token: without a cache and with one."""
    fig, panels = row_of(2, 8.4, 3.0)
    total = prompt + steps - 1
    for axes, cached in zip(panels, (False, True), strict=True):
        run = 0
        for step in range(steps):
            for token in range(prompt + step):
                new = not cached or step == 0 or token == prompt + step - 1
                color, alpha = COLORS["with cache" if cached else "without cache"], 1.0 if new else KEPT
                bare(axes).add_patch(
                    plt.Rectangle((step, token), 1, 1, facecolor=color, alpha=alpha, edgecolor="white")
                )
                run += new
        name = "with a cache" if cached else "without a cache"
        axes.set(xlim=(0, steps), ylim=(total, 0), xlabel="step", title=f"{name}: {run} tokens run")
        axes.set_xticks([step + 0.5 for step in range(steps)], [str(step + 1) for step in range(steps)])
        axes.set_yticks([token + 0.5 for token in range(total)], [str(token) for token in range(total)], fontsize=8)
    panels[0].set_ylabel("position of the token")
    marks = {
        "run, without a cache": ("without cache", 1.0),
        "run, with a cache": ("with cache", 1.0),
        "held, not run": ("with cache", KEPT),
    }
    patches = [plt.Rectangle((0, 0), 1, 1, color=COLORS[color], alpha=alpha) for color, alpha in marks.values()]
    fig.legend(patches, list(marks), loc="outside lower center", ncols=3, fontsize=8)
    fewest = prompt + steps - 1
    without = sum(range(prompt, prompt + steps))
    return described(
        fig,
        f"Which tokens each of {steps} steps runs, as two grids of positions by steps. Without a cache a step "
        f"runs every token so far, {without} in all. With a cache the first step runs the prompt's {prompt} "
        f"and each later one a single token, {fewest} in all; the others are held.",
    )


def cache_fill(words: Sequence[str], prompt: int, num_layers: int, step: int, layers_done: int) -> Figure:
    """What a cache holds after `layers_done` layers of a step: layers up, positions to the right.

    words: the sequence, one per token. prompt: tokens of it that prefill runs, in step 0; step i runs token
    `prompt + i - 1`. Columns of this step are highlighted in the layers that have run.
    """
    first, end = (0, prompt) if step == 0 else (prompt + step - 1, prompt + step)
    fig, axes = figure(9.0, 3.7)
    state = [[0.0] * len(words) for _ in range(num_layers)]
    for layer in range(num_layers):
        for position in range(end):
            if position < first:
                state[layer][position] = 1.0
            elif layer < layers_done:
                state[layer][position] = 2.0
    held, now = to_rgba(COLORS["with cache"], KEPT), to_rgba(COLORS["with cache"])
    colors = ListedColormap([to_rgba(COLORS["pale"]), held, now])
    bare(axes).pcolormesh(state, cmap=colors, vmin=0, vmax=2, edgecolors="white", linewidth=0.5)
    end_of_prompt = axes.axvline(prompt, color="black", linestyle="--", linewidth=1)
    axes.set_xticks([i + 0.5 for i in range(len(words))], words, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks([0.5, num_layers - 0.5], ["0", str(num_layers - 1)])
    axes.set(ylabel="layer", xlabel="token", xlim=(0, len(words)))
    phase = "prefill: the prompt's tokens together" if step == 0 else f"decode step {step}: one token"
    axes.set_title(f"{phase}; {layers_done} of {num_layers} layers have appended", fontsize=10)
    marks = [("held", held), ("appended in this step", now), ("empty", COLORS["pale"])]
    patches = [plt.Rectangle((0, 0), 1, 1, color=color) for _, color in marks]
    handles, names = [*patches, end_of_prompt], [*(name for name, _ in marks), "end of the prompt"]
    axes.legend(handles, names, loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    found = f"tokens 0 to {first - 1} are held in every layer" if first else "nothing is held yet"
    new = f"token {first}" if end == first + 1 else f"tokens 0 to {end - 1}"
    return described(
        fig,
        f"A cache as a grid of {num_layers} layers by {len(words)} tokens; {phase}: {found}, {new} appended in "
        f"{layers_done} of {num_layers} layers, the rest is empty.",
    )


def time_per_token(
    positions: Sequence[int],
    seconds: Mapping[str, Sequence[Timing]],
    theory: Mapping[str, Sequence[float]],
    recorded: Sequence[tuple[str, str, int, float]] = (),
) -> Figure:
    """Milliseconds of one step against position, log scale: this machine's points, the theory as lines, records.

    seconds, theory: by "with cache" and "without cache". recorded: (device, name, position, seconds).
    """
    fig, axes = figure(7.4, 3.8)
    for name, timings in seconds.items():
        timed_line(axes, positions, timings, COLORS[name], name)
        expected = [value * 1e3 for value in theory[name]]
        axes.plot(positions, expected, ":", color=COLORS[name], label=f"{name}, theory")
    for device, name in dict.fromkeys((device, name) for device, name, _, _ in recorded):
        points = sorted((at, value * 1e3) for where, what, at, value in recorded if (where, what) == (device, name))
        marker, line = ("s", "-") if name == "with cache" else ("D", "--")
        axes.plot(*zip(*points, strict=True), marker + line, color=COLORS["reference GPU"], label=f"{device}, {name}")
    axes.set(yscale="log", xlabel="position of the new token", ylabel="ms per token (log scale)")
    plain_ticks(axes.yaxis)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    medians = {name: [timing.median for timing in timings] for name, timings in seconds.items()}
    records = "".join(
        f" Recorded on {device}, {name}, as points."
        for device, name in dict.fromkeys((device, name) for device, name, _, _ in recorded)
    )
    return described(
        fig,
        "Milliseconds per token against its position, log scale: measured, and the theory as dotted lines. "
        f"{ends(medians, positions, 'ms', 1e3)}. Theory: {ends(theory, positions, 'ms', 1e3)}.{records}",
    )


def moved_and_held(moved: Mapping[str, Sequence[float]], held: Mapping[str, Sequence[float]]) -> Figure:
    """MB moved so far and MB held, against tokens appended, for two kinds of cache."""
    fig, panels = row_of(2, 8.4, 3.0)
    colors = {"growing": COLORS["query"], "preallocated": COLORS["value"]}
    for axes, curves, what in zip(panels, (moved, held), ("MB moved so far", "MB held"), strict=True):
        for name, values in curves.items():
            axes.plot(range(1, len(values) + 1), values, color=colors[name], label=name)
        axes.set(xlabel="tokens appended", ylabel=f"{what}, all layers", ylim=(0, None))
        axes.legend(fontsize=8)
    last = len(next(iter(held.values())))
    return described(
        fig,
        f"Two panels of lines against tokens appended. MB moved so far, at {last} tokens: {final(moved)}. MB "
        f"held: {final(held)}.",
    )


def step_times(seconds: Sequence[float], prompt: int) -> Figure:
    """The time of each step of one generation: the prefill of `prompt` tokens, then decode."""
    fig, axes = figure(7.4, 2.9)
    colors = [COLORS["query"], *[COLORS["with cache"]] * (len(seconds) - 1)]
    axes.bar(range(len(seconds)), [value * 1e3 for value in seconds], color=colors)
    axes.set(xlabel="step: each gives one new token", ylabel="ms")
    axes.set_xticks(range(0, len(seconds), 4))
    patches = [plt.Rectangle((0, 0), 1, 1, color=color) for color in (colors[0], colors[-1])]
    axes.legend(patches, [f"prefill, {prompt} tokens: TTFT", "decode, 1 token each: TPOT"], fontsize=8)
    rest = sorted(1e3 * value for value in seconds[1:])
    return described(
        fig,
        f"Bars of milliseconds per step: prefill of {prompt} tokens {number(1e3 * seconds[0])} ms, then "
        f"{len(rest)} decode steps of one token, {number(rest[0])} to {number(rest[-1])} ms each.",
    )


def tokens_per_turn(stateless: Sequence[int], stateful: Sequence[int]) -> Figure:
    """Tokens run in each turn of a conversation, for a server that forgets and one that keeps its cache."""
    fig, axes = figure(6.4, 2.9)
    for shift, values, name, color in (
        (-0.2, stateless, "stateless: the whole history again", COLORS["without cache"]),
        (0.2, stateful, "stateful: what is new", COLORS["with cache"]),
    ):
        bars = axes.bar([turn + shift for turn in range(len(values))], values, width=0.38, color=color, label=name)
        axes.bar_label(bars, fontsize=8)
    axes.set_xticks(range(len(stateless)), [f"turn {turn + 1}" for turn in range(len(stateless))])
    axes.set(ylabel="tokens run")
    axes.legend(fontsize=8)
    turns = "; ".join(
        f"turn {turn}: {all} stateless, {new} stateful"
        for turn, (all, new) in enumerate(zip(stateless, stateful, strict=True), 1)
    )
    return described(fig, f"Tokens run in each turn of a conversation, pairs of bars. {turns}.")


def change_by_layer(changes: Sequence[float]) -> Figure:
    """Relative change of the keys, one bar per layer."""
    fig, axes = figure(7.0, 2.7)
    axes.bar(range(len(changes)), changes, color=COLORS["key"])
    for layer, change in enumerate(changes):
        if change < 1e-3:
            axes.annotate("0", (layer, 0), ha="center", va="bottom", fontsize=8)
    axes.set(xlabel="layer", ylabel="change of the other tokens' keys\n(fraction of their norm)", ylim=(0, None))
    axes.grid(False, axis="x")
    same = [layer for layer, change in enumerate(changes) if change < 1e-3]
    largest = max(range(len(changes)), key=lambda layer: changes[layer])
    return described(
        fig,
        f"Bars, one for each of {len(changes)} layers: change of the other tokens' keys as a fraction of their "
        f"norm. {'No change in layer ' + listed(map(str, same)) + '; ' if same else ''}the largest, "
        f"{changes[largest]:.2f}, in layer {largest}.",
    )
