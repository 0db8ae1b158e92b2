"""Figures: `style` is what the labs share. What one lab draws is in its folder, `labkit/labs/labNN/figures.py`."""

from labkit.plots.described import described
from labkit.plots.style import (
    COLORS,
    CYCLE,
    HEAT,
    MARKERS,
    against_length,
    bare,
    figure,
    plain_ticks,
    row_of,
)

__all__ = [
    "COLORS",
    "CYCLE",
    "HEAT",
    "MARKERS",
    "against_length",
    "bare",
    "described",
    "figure",
    "plain_ticks",
    "row_of",
]
