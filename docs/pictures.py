"""Write the pictures of the README and of the site: `python docs/pictures.py`."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nbformat
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
PICTURES = {"time_per_token.png": ("02_cache_from_scratch.ipynb", "figures.time_per_token(")}


@dataclass(frozen=True)
class Station:
    """A stop of a decode step: a function by its module and name, what it does, what it hands on."""

    module: str
    name: str
    does: str
    gives: str = ""

    @property
    def place(self) -> str:
        """The module and the name in it, as one dotted path."""
        return f"{self.module}.{self.name}"


BEFORE = (
    Station("labkit.generation", "stream", "one record per new token", "the newest token, int [batch, 1]"),
    Station("labkit.generation", "timed_step", "one pass, its time, its work"),
    Station("labkit.llama", "Llama.forward", "lays the tokens out"),
    Station("labkit.cache.cache", "Cache.step", "notes where each layer stands", "a Step, the same for every layer"),
    Station("labkit.llama", "Llama.run", "embeds the token", "x  [batch, 1, hidden_size]"),
)
IN_A_LAYER = (
    Station("labkit.llama", "Block.forward", "attention, then the MLP"),
    Station(
        "labkit.llama", "Attention.project", "norms x, makes q, k and v of it", "q, k, v  [batch, heads, 1, head_dim]"
    ),
    Station("labkit.llama", "rotate", "turns q and k to the position", "k, v to append, q to attend"),
    Station("labkit.cache.layer", "LayerCache.append", "validates, then stores, or changes nothing"),
    Station("labkit.cache.dense", "PreallocatedCache.write", "writes in place", "all that is held, kv_len tokens"),
    Station("labkit.cache.layer", "LayerCache.attend", "reads it"),
    Station("labkit.attention", "fused_attention", "scores, softmax, blend", "out  [batch, num_heads, 1, head_dim]"),
    Station("labkit.llama", "Attention.merge", "joins the heads, adds them to x"),
    Station("labkit.llama", "MLP.forward", "each token alone, added to x", "x  [batch, 1, hidden_size]"),
)
AFTER = (
    Station("labkit.llama", "Llama.predict", "norm and output head", "logits  [batch, 1, vocab_size]"),
    Station("labkit.generation", "choose", "the likeliest, or a draw", "the next token, to stream"),
)
STATIONS = (*BEFORE, *IN_A_LAYER, *AFTER)
COLORS = {"generation": "#F3E3BF", "llama": "#DCE6F2", "cache": "#CFE8DD", "attention": "#F2D9E6"}  # by room


def picture(notebook: str, call: str) -> bytes:
    """The PNG that the cell with `call` in it shows."""
    for cell in nbformat.read(ROOT / "notebooks" / notebook, as_version=4).cells:
        if cell.cell_type == "code" and call in cell.source:
            for output in cell.outputs:
                if png := output.get("data", {}).get("image/png"):
                    return base64.b64decode(png)
    raise SystemExit(f"{notebook} has no cell with {call!r} that shows a picture: run `make notebooks` first")


def decode_step(path: Path) -> None:
    """One decode step through the code, from top to bottom; each box's id is its station's place."""
    width, box, gap, inset = 5.2, 0.44, 0.24, 0.42
    height = len(STATIONS) * (box + gap) + 1.0
    with plt.rc_context({"svg.hashsalt": "decode step", "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        fig = plt.figure(figsize=(width, height), facecolor="white")
        axes = fig.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        axes.axis("off")
        y, frame = 0.15, 0.0
        for number, station in enumerate(STATIONS, 1):
            if station is IN_A_LAYER[0]:
                frame, y = y, y + 0.36
            inside = station in IN_A_LAYER
            last = station is STATIONS[-1]
            draw_station(
                axes, number, station, (inset if inside else 0.15, y, width - 0.15 - (0.15 if inside else 0), box)
            )
            y += box
            if station is IN_A_LAYER[-1]:
                draw_frame(axes, frame + 0.05, y + 0.34, width)
                axes.text(
                    width - 0.25, frame + 0.27, "in each of num_layers layers", ha="right", fontsize=9.5, color="#444"
                )
            arrow = {"arrowstyle": "-|>", "color": "#555", "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
            if not last:
                axes.annotate("", (0.75, y + gap - 0.01), (0.75, y + 0.01), arrowprops=arrow)
            axes.text(0.9, y + gap / 2, station.gives, va="center", fontsize=8.6, color="#444")
            y += gap + (0.2 if station is IN_A_LAYER[-1] else 0)
        fig.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(fig)


def draw_station(axes: Any, number: int, station: Station, where: tuple[float, float, float, float]) -> None:
    """A box at (left, top, right, height): number, name and file, and what happens there."""
    left, top, right, height = where
    color = COLORS[station.module.split(".")[1]]
    shape = FancyBboxPatch(
        (left, top), right - left, height, "round,pad=0,rounding_size=0.06", fc=color, ec="#555", lw=0.8
    )
    shape.set_gid(station.place)
    axes.add_patch(shape)
    file = station.module.replace(".", "/") + ".py"
    name = {"weight": "bold", "fontsize": 9.6}
    axes.text(left + 0.1, top + height / 2, f"{number}", va="center", color="#222", fontsize=11)
    axes.text(left + 0.42, top + 0.15, station.name, va="center", color="#111", **name)
    axes.text(
        right - 0.1, top + 0.15, file, va="center", ha="right", fontsize=8.2, color="#333", family="DejaVu Sans Mono"
    )
    axes.text(left + 0.42, top + 0.325, station.does, va="center", fontsize=8.8, color="#222")


def draw_frame(axes: Any, top: float, bottom: float, width: float) -> None:
    """The layers' frame."""
    corner, size = (0.15, top), (width - 0.3, bottom - top)
    axes.add_patch(
        FancyBboxPatch(corner, *size, "round,pad=0,rounding_size=0.1", fc="none", ec="#888", lw=1.0, ls="--")
    )


def main() -> None:
    """Write every picture."""
    IMAGES.mkdir(exist_ok=True)
    for name, (notebook, call) in PICTURES.items():
        (IMAGES / name).write_bytes(picture(notebook, call))
    decode_step(IMAGES / "decode_step.svg")


if __name__ == "__main__":
    main()
