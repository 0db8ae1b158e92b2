"""Pictures for a board: boxes, rows of cells, arrows and words, few enough to copy by hand."""

from __future__ import annotations

import contextlib
import io
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from labkit.course.syllabus import Section

INK = "#222222"
FILLS = {
    "": "#FFFFFF", "query": "#F6D9A3", "key": "#A9CFE8", "value": "#A6DCC9", "new": "#F3B98F", "gone": "#DDDDDD",
    "core": "#A9CFE8", "further": "#EEEEEE",
}  # fmt: skip
FONT: Any = {"font.family": "DejaVu Sans", "font.size": 13}  # matplotlib's own: the same picture on every machine


class Board:
    """A board `wide` x `high` units large; (0, 0) is its lower left corner, a unit holds about four characters."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes

    def box(self, x: float, y: float, wide: float, high: float, text: str = "", fill: str = "") -> None:
        """A rectangle with words in it. fill: query, key, value, new, gone, or nothing."""
        self.axes.add_patch(Rectangle((x, y), wide, high, facecolor=FILLS[fill], edgecolor=INK, linewidth=1.4))
        self.words(x + wide / 2, y + high / 2, text, centred=True)

    def cells(self, x: float, y: float, texts: Sequence[str], fills: Sequence[str] = (), size: float = 1.0) -> None:
        """A row of cells from left to right, `size` units wide and one high."""
        for place, text in enumerate(texts):
            fill = fills[place] if place < len(fills) else ""
            self.box(x + place * size, y, size, 1, text, fill)

    def words(self, x: float, y: float, text: str, *, centred: bool = False, small: bool = False) -> None:
        """Words that begin at x, or are centred on it; y is the middle of the line."""
        self.axes.text(
            x, y, text, ha="center" if centred else "left", va="center", color=INK, fontsize=11 if small else 13
        )

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        """From one point to another."""
        style = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
        self.axes.annotate("", (to_x, to_y), (x, y), arrowprops=style)

    def line(self, xs: Sequence[float], ys: Sequence[float], *, dashed: bool = False) -> None:
        """A line through points."""
        self.axes.plot(xs, ys, color=INK, linewidth=1.8, linestyle="--" if dashed else "-")


def picture(draw: Callable[[Board], None], wide: float = 20, high: float = 8) -> bytes:
    """A board as PNG; the same bytes each time."""
    with _own_style():
        figure, axes = _canvas(wide * 0.5, high * 0.5)
        axes.set_xlim(0, wide)
        axes.set_ylim(0, high)
        axes.set_axis_off()
        draw(Board(axes))
        return _png(figure)


def strip(sections: Sequence[Section], title: str) -> bytes:
    """A lab's sections along its minutes as PNG: as wide as they are long, the core blue."""
    with _own_style():
        figure, axes = _canvas(12, 2.1)
        start = 0
        for section in sections:
            fill = FILLS["further" if section.further else "core"]
            box = Rectangle((start, 0), section.minutes, 1, facecolor=fill, edgecolor=INK, linewidth=1.2)
            axes.add_patch(box)
            number, middle = section.id[3:], start + section.minutes / 2
            axes.text(middle, 0.62, number, ha="center", va="center", fontsize=11, color=INK)
            axes.text(middle, 0.28, f"{section.minutes}", ha="center", va="center", fontsize=9, color=INK)
            start += section.minutes
        axes.set_xlim(-0.3, start + 0.3)
        axes.set_ylim(-0.05, 1.05)
        axes.set_yticks([])
        axes.set_xticks(range(0, start + 1, 10))
        axes.set_xlabel("minutes from the beginning; in a box: the section, and its minutes")
        axes.set_title(title, loc="left", fontsize=12)
        for side in ("left", "right", "top"):
            axes.spines[side].set_visible(False)
        return _png(figure)


@contextlib.contextmanager
def _own_style() -> Iterator[None]:
    """Matplotlib's defaults and one font, whatever was drawn in this process before."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(FONT)
        yield


def _canvas(wide: float, high: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(wide, high), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _png(figure: Figure) -> bytes:
    kept = io.BytesIO()
    figure.savefig(kept, format="png", dpi=100, metadata={"Software": None})
    return kept.getvalue()


def strip_in_words(sections: Sequence[Section]) -> str:
    """What a strip shows."""
    told = ", ".join(f"{section.id[3:]}: {section.minutes}" for section in sections)
    return textwrap.shorten(f"Sections and their minutes, in order: {told}.", 2000)
