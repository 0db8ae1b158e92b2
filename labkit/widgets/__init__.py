"""What the labs' widgets are made of: ipywidgets alone. A lab's own is in its folder, `labkit/labs/labNN/widget.py`."""

from labkit.widgets.parts import choice, picture, png, wide, with_value

__all__ = ["choice", "picture", "png", "wide", "with_value"]
