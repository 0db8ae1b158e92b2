"""What the widgets share: how wide a control is, and a figure as a picture that is told in words, too."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

import ipywidgets
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from labkit.plots.described import Described


def wide() -> dict[str, Any]:
    """Options that make a control as wide as the pictures, with room for its name; narrower where the page is."""
    return {"layout": ipywidgets.Layout(width="640px", max_width="98%"), "style": {"description_width": "80px"}}


class Picture(ipywidgets.HTML):
    """A figure with its words, in an `<img>` with `alt`, which ipywidgets' own Image lacks.

    png: the bytes shown; empty before the first. alt: what the figure says in words.
    """

    png, alt = b"", ""

    def show(self, fig: Figure) -> None:
        """Put a figure in place of the one before; it is closed. Raises ValueError when it has no words."""
        self.alt = fig.alt if isinstance(fig, Described) else ""
        if not self.alt:
            raise ValueError("a figure without words: say with plots.described what is to be seen in it")
        self.png = png(fig)
        encoded = base64.b64encode(self.png).decode()
        self.value = (
            f'<img src="data:image/png;base64,{encoded}" alt="{html.escape(self.alt)}" style="max-width: 100%">'
        )


def picture(name: str, **layout: Any) -> Picture:
    """A picture of the CSS class `name` that keeps its own size: a column of widgets would stretch it to its width."""
    return Picture(layout=ipywidgets.Layout(align_self="flex-start", **layout)).add_class(name)


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
