"""What the widgets share: how wide a control is, and a figure as a picture."""

from __future__ import annotations

import io
from typing import Any

import ipywidgets
import matplotlib.pyplot as plt
from matplotlib.figure import Figure


def wide() -> dict[str, Any]:
    """Options that make a control as wide as the pictures, with room for its name."""
    return {"layout": ipywidgets.Layout(width="640px"), "style": {"description_width": "80px"}}


def picture(name: str, **layout: Any) -> ipywidgets.Image:
    """A picture of the CSS class `name` that keeps its own size: a column of widgets would stretch it to its width."""
    return ipywidgets.Image(format="png", layout=ipywidgets.Layout(align_self="flex-start", **layout)).add_class(name)


def png(fig: Figure) -> bytes:
    """A figure as PNG bytes; the figure is closed."""
    file = io.BytesIO()
    fig.savefig(file, format="png")
    plt.close(fig)
    return file.getvalue()


def choice(description: str, options: list[Any], value: Any) -> ipywidgets.Dropdown:
    """A dropdown that has `value` among its options."""
    return ipywidgets.Dropdown(options=with_value(options, value), value=value, description=description, **wide())


def with_value(options: list[Any], value: Any) -> list[Any]:
    """The options, and `value` behind them if it is none of them."""
    return options if value in options else [*options, value]
