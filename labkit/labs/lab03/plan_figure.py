"""What a device's memory goes to: the picture of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from labkit.plots.described import described
from labkit.plots.style import COLORS, figure
from labkit.sizing import GB, Plan
from labkit.sizing.report import count_users

PARTS = ("weights", "reserve", "cache", "free")  # from the left: what is decided first stands first
BEYOND = 2.0  # the axis ends at so many times the largest memory: a cache of 1,000 times it would hide the rest
HEIGHT = 0.5
LETTER = 0.0095  # width of a digit, of the axis: a part carries its figure where there is room for it


def plan_bars(plans: Sequence[Plan]) -> Figure:
    """Where each device's memory goes, a bar per plan, in GB: weights, reserve, cache and what is free.

    The line across a bar is its device's memory. What does not fit stands hatched behind that line, and a bar that is
    too long for the axis says how long it is. Beside each label is the floor of a decode step (TPOT). Raises ValueError
    without a plan.
    """
    if not plans:
        raise ValueError("plan_bars needs at least one plan: plan_bars([sizing.plan(model, gpu)])")
    fig, axes = figure(7.6, 1.15 + 0.72 * len(plans))
    limit = _limit(plans)
    for row, plan in enumerate(plans):
        _bar(axes, row, plan, limit)
    devices = " on each device" if any(plan.ranks > 1 for plan in plans) else ""
    axes.set(xlim=(0, limit), ylim=(len(plans) - 0.55, -0.8), xlabel=f"GB (10⁹ bytes){devices}", yticks=[])
    axes.spines["left"].set_visible(False)
    axes.grid(False, axis="y")
    axes.legend(handles=_legend(plans), loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=6, fontsize=8)
    return described(fig, "Bars of a device's memory in GB, one for each plan. " + " ".join(map(_words, plans)))


def _words(plan: Plan) -> str:
    """One bar in words."""
    parts = ", ".join(f"{part} {_size(getattr(plan, part) / GB)}" for part in PARTS[:3])
    left = f"{_size(plan.free / GB)} free" if plan.fits else f"{_size(-plan.free / GB)} over, it does not fit"
    return (
        f"{plan.model} on {plan.ranks} x {plan.gpu}, {plan.context:,} tokens x {count_users(plan.users)}, K and V in "
        f"{plan.kv_dtype}: {parts} of {_size(plan.memory / GB)}, {left}; TPOT at least {_time(plan.step)}."
    )


def _needed(plan: Plan) -> float:
    """GB that weights, reserve and cache take together."""
    return (plan.weights + plan.reserve + plan.cache) / GB


def _limit(plans: Sequence[Plan]) -> float:
    """Where the axis ends, in GB: behind the longest bar and its figure, within bounds."""
    largest = max(plan.memory for plan in plans) / GB
    return max(1.04 * largest, min(1.16 * max(map(_needed, plans)), BEYOND * largest))


def _bar(axes: Axes, row: int, plan: Plan, limit: float) -> None:
    """One plan: its label, its parts, the mark of its memory."""
    memory, start = plan.memory / GB, 0
    for part in PARTS:
        end = start + max(0, getattr(plan, part))  # in bytes, so that the last part ends on the mark and not beside it
        _part(axes, row, part, start / GB, end / GB, memory, limit)
        start = end
    if not plan.fits:
        _over(axes, row, memory, start / GB, limit)
    axes.plot([memory] * 2, [row - 0.32, row + 0.32], color="black", linewidth=2, solid_capstyle="butt", zorder=4)
    devices = plan.gpu if plan.ranks == 1 else f"{plan.ranks} x {plan.gpu}"
    what = f"{plan.model} on {devices} · {plan.context:,} tokens x {count_users(plan.users)}"
    what += f" · weights in {plan.weight_dtype}, K and V in {plan.kv_dtype}"
    axes.text(0, row - 0.36, what, va="bottom", fontsize=8.5)
    axes.text(limit, row - 0.36, f"TPOT ≥ {_time(plan.step)}", va="bottom", ha="right", fontsize=8.5)


def _part(axes: Axes, row: int, part: str, start: float, whole: float, memory: float, limit: float) -> None:
    """One part of a bar, paler behind the mark, with its whole size where there is room for it."""
    end = min(whole, limit)
    cut = min(max(start, memory), end)  # where it leaves the memory
    for left, right, alpha in ((start, cut, 1.0), (cut, end, 0.35)):
        if right > left:
            color = COLORS[part]
            axes.barh(row, right - left, HEIGHT, left, color=color, alpha=alpha, edgecolor="white", linewidth=0.8)
    said, color = _size(whole - start), "white" if part == "cache" else "black"
    if cut - start > (len(said) + 2) * LETTER * limit:
        axes.text((start + cut) / 2, row, said, ha="center", va="center", fontsize=8, color=color)


def _over(axes: Axes, row: int, memory: float, needed: float, limit: float) -> None:
    """The hatch over what does not fit, and how much that is; an arrow where the axis ends before the bar does."""
    end = min(needed, limit)
    hatch: dict[str, Any] = {"facecolor": "none", "edgecolor": COLORS["highlight"], "hatch": "////", "linewidth": 1.2}
    axes.barh(row, end - memory, HEIGHT, memory, **hatch)
    said = f"{_size(needed - memory)} over"
    style: dict[str, Any] = {"va": "center", "fontsize": 8, "color": COLORS["highlight"], "zorder": 5}
    if limit - end > (len(said) + 2) * LETTER * limit:
        axes.text(end + 0.008 * limit, row, said, fontweight="bold", **style)
    else:
        said += " →" if needed > limit else ""
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        axes.text(end - 0.012 * limit, row, said, ha="right", fontweight="bold", bbox=box, **style)


def _legend(plans: Sequence[Plan]) -> list[Patch | Line2D]:
    """What the colours mean; what does not fit only where something does not."""
    handles: list[Patch | Line2D] = [Patch(color=COLORS[part], label=part) for part in PARTS]
    handles.append(Line2D([], [], color="black", linewidth=2, label="device's memory"))
    if not all(plan.fits for plan in plans):
        handles.append(Patch(facecolor="white", edgecolor=COLORS["highlight"], hatch="////", label="does not fit"))
    return handles


def _size(gb: float) -> str:
    return f"{gb:,.1f}" if gb < 100 else f"{gb:,.0f}"


def _time(seconds: float) -> str:
    """Three digits in ms, or in s from a second on."""
    value, unit = (seconds * 1e3, "ms") if seconds < 1 else (seconds, "s")
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
