"""Figures of lab 06: paged attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from labkit.labs.lab06.material import Moment, Scene
from labkit.plots.described import Described, described, ends, listed
from labkit.plots.style import COLORS, CYCLE, bare, figure, plain_ticks, row_of

EMPTY = "#FFFFFF"


def memory_map() -> Figure:
    """The same three requests in memory, three ways: room for the longest, just enough, blocks. Drawn, not measured."""
    fig, axes = figure(8.4, 3.2)
    bare(axes)
    names, colors = ("anna", "berta", "clara"), CYCLE[:3]
    held, final = (5, 3, 9), (9, 4, 11)
    slots, room, block = 48, 16, 4

    def cells(row: int, start: int, count: int, color: str, alpha: float = 1.0, hatch: str = "") -> None:
        for at in range(start, start + count):
            axes.add_patch(
                plt.Rectangle((at, row + 0.12), 1, 0.76, facecolor=color, alpha=alpha, edgecolor="white", hatch=hatch)
            )

    for index, color in enumerate(colors):
        start = index * room
        cells(2, start, held[index], color)
        cells(2, start + held[index], final[index] - held[index], color, 0.4)
        cells(2, start + final[index], room - final[index], COLORS["pale"], 1, "////")
    start = 0
    for index, gap in enumerate((6, 9, 9)):  # the gaps are what requests that ended have left
        cells(1, start, held[index], colors[index])
        cells(1, start + held[index], final[index] - held[index], colors[index], 0.4)
        start += final[index] + gap
    places = {0: (2, 7), 1: (0,), 2: (5, 3, 10)}
    for index, blocks in places.items():
        for order, at in enumerate(blocks):
            here = min(block, held[index] - order * block)
            cells(0, at * block, here, colors[index])
            cells(0, at * block + here, block - here, colors[index], 0.15)
    for at in range(0, slots + 1, block):
        axes.plot((at, at), (0.06, 0.94), color="#555555", linewidth=0.8)
    axes.set(xlim=(0, slots), ylim=(0, 3), xlabel="slot")
    axes.set_yticks([2.5, 1.5, 0.5], ["room for the\nlongest", "as much as each\nwill need", f"blocks of {block}"])
    axes.set_xticks(range(0, slots + 1, 8))
    marks = [(color, 1.0, "", name) for color, name in zip(colors, names, strict=True)]
    marks += [("#888888", 0.4, "", "reserved: a token will come"), (COLORS["pale"], 1.0, "////", "never filled"),
              ("#888888", 0.15, "", "empty in a block"), (EMPTY, 1.0, "", "free")]  # fmt: skip
    patches = [
        plt.Rectangle(
            (0, 0), 1, 1, facecolor=color, alpha=alpha, hatch=hatch, edgecolor="#BBBBBB" if color == EMPTY else "white"
        )
        for color, alpha, hatch, _ in marks
    ]
    fig.legend(patches, [name for *_, name in marks], loc="outside lower center", ncols=4, fontsize=8)
    return described(
        fig,
        f"{slots} slots of memory in three rows, each with the same three requests. Room for the longest: "
        f"pieces of {room} slots, {slots - sum(final)} of all slots never filled. As much as each will need: less room "
        f"for each, with gaps between them that requests which ended left. Blocks of {block}: each request's "
        f"blocks lie anywhere, only the end of its last block is empty.",
    )


def memory_over_time(ways: Mapping[str, Sequence[Moment]], slots: int) -> Figure:
    """What becomes of `slots` while a trace runs, a panel for each way to hand them out; shares stacked."""
    fig, panels = row_of(len(ways), 8.6, 3.2)
    last = max(map(len, ways.values()))
    for axes, (name, moments) in zip(panels, ways.items(), strict=True):
        parts = [[100 * getattr(moment, part) / slots for moment in moments] for part in ("held", "reserved", "never")]
        axes.stackplot(
            range(len(moments)), *parts, colors=(COLORS["cache"], COLORS["weights"], COLORS["reserve"]),
            labels=("hold a token", "reserved: a token will come", "taken, and never filled"),
        )  # fmt: skip
        most = max(moment.running for moment in moments)
        axes.set(
            xlim=(0, last), ylim=(0, 100), xlabel="decode step",
            title=f"{name}: up to {most} at once, {len(moments):,} steps",
        )  # fmt: skip
        axes.title.set_fontsize(9)
    panels[0].set_ylabel("% of all slots")
    fig.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    said = "; ".join(
        f"{name}: up to {max(moment.running for moment in moments)} requests at once, {len(moments):,} steps, "
        f"on average {sum(moment.held for moment in moments) / len(moments) / slots:.0%} of the slots hold a "
        f"token and {sum(moment.never for moment in moments) / len(moments) / slots:.0%} are taken and never filled"
        for name, moments in ways.items()
    )
    return described(
        fig, f"What {slots:,} slots are used for while a trace runs, stacked areas over decode steps. {said}."
    )


def block_sizes(
    sizes: Sequence[int], empty: Sequence[float], unshared: Sequence[float], blocks: Sequence[float]
) -> Figure:
    """What a block size costs. empty: per cent of the slots taken. unshared: per cent of the tokens that could be
    shared and are not. blocks: how many a request has, on average."""
    fig, (left, right) = row_of(2, 8.4, 3.0)
    left.plot(sizes, empty, "o-", color=COLORS["highlight"], label="slots that stay empty, % of those taken")
    left.plot(sizes, unshared, "s-", color=COLORS["key"], label="of 100 common tokens, % not shared")
    left.set(xscale="log", xlabel="block size, tokens", ylabel="per cent", ylim=(0, None))
    left.legend(fontsize=8)
    right.plot(sizes, blocks, "^-", color=COLORS["value"])
    right.set(xscale="log", yscale="log", xlabel="block size, tokens", ylabel="blocks of a request, on average")
    for axes in (left, right):
        axes.set_xticks(list(sizes), [str(size) for size in sizes], fontsize=8)
        axes.minorticks_off()
    plain_ticks(right.yaxis)
    costs = ends({"slots that stay empty": empty, "common tokens not shared": unshared}, sizes, "%")
    return described(
        fig, f"Against the block size, log scale. Left: {costs}. Right: {ends({'blocks of a request': blocks}, sizes)}."
    )


def blocks_of(scene: Scene, num_blocks: int, block_size: int, names: Sequence[str]) -> Figure:
    """A moment of a story: the memory, block by block, coloured by who holds it; below it the table of each request.

    names: everyone who appears in the story, so that each keeps one colour.
    """
    fig, (memory, tables) = plt.subplots(
        2, 1, figsize=(8.4, 4.0), height_ratios=(1, 2.2), layout="constrained", FigureClass=Described
    )
    colors = {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(names)}
    for axes in (bare(memory), bare(tables)):
        axes.set(xlim=(0, num_blocks), xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for block in range(num_blocks):
        owners = scene.owners.get(block, ())
        draw_block(memory, block, 0, [colors[name] for name in owners], hatched=block in scene.found)
        memory.annotate(str(block), (block + 0.5, 0.5), ha="center", va="center", fontsize=9)
    memory.set(ylim=(0, 1), title=scene.text)
    memory.title.set_fontsize(9)
    memory.set_ylabel("memory", rotation=0, ha="right", va="center")
    for row, name in enumerate(names):
        blocks, tokens = scene.tables.get(name, ((), 0))
        height = len(names) - 1 - row
        for order, block in enumerate(blocks):
            draw_block(tables, order, height, [colors[name]], filled=min(1.0, tokens / block_size - order))
            tables.annotate(str(block), (order + 0.5, height + 0.5), ha="center", va="center", fontsize=9)
        if blocks:
            tables.annotate(f"{tokens} tokens", (len(blocks) + 0.2, height + 0.5), va="center", fontsize=8)
    tables.set(ylim=(0, len(names)))
    tables.set_yticks([len(names) - 0.5 - row for row in range(len(names))], names, fontsize=9)
    tables.tick_params(length=0)
    tables_said = "; ".join(
        f"{name}, {scene.tables[name][1]} tokens: blocks {listed(map(str, scene.tables[name][0]))}"
        for name in names
        if scene.tables.get(name, ((), 0))[0]
    )
    shared = [block for block, owners in sorted(scene.owners.items()) if len(owners) > 1]
    shared_said = f" Shared: {listed(map(str, shared))}." if shared else ""
    return described(
        fig,
        f"{num_blocks} blocks of {block_size} tokens, coloured by who holds them, and each request's table "
        f"below. {scene.text}: {tables_said or 'nobody holds a block'}.{shared_said}",
    )


PALETTE = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00")


def draw_block(
    axes: Axes, x: float, y: float, colors: Sequence[str], *, hatched: bool = False, filled: float = 1.0
) -> None:
    """A block: a stripe for each who holds it; `filled` of it opaque."""
    frame: dict[str, Any] = {"edgecolor": "#555555", "linewidth": 0.8}
    axes.add_patch(
        plt.Rectangle((x + 0.05, y + 0.1), 0.9, 0.8, facecolor=COLORS["free"], hatch="////" * hatched, **frame)
    )
    for index, color in enumerate(colors):
        height = 0.8 / len(colors)
        place = (x + 0.05, y + 0.1 + index * height)
        axes.add_patch(plt.Rectangle(place, 0.9, height, facecolor=color, alpha=0.3))
        axes.add_patch(plt.Rectangle(place, 0.9 * filled, height, facecolor=color))
    axes.add_patch(plt.Rectangle((x + 0.05, y + 0.1), 0.9, 0.8, fill=False, **frame))
