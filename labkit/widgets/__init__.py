"""What the labs' widgets are made of: ipywidgets alone. A lab's own is in its folder, `labkit/labs/labNN/widget.py`."""

from labkit.widgets.parts import Picture, choice, picture, png, wide, with_value

__all__ = ["Picture", "choice", "picture", "png", "wide", "with_value"]
