"""Figures of the labs. One look, and one colour for one thing in every lab (Okabe and Ito's colour-blind-safe set)."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
