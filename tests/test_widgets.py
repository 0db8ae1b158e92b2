"""What the widgets share."""

from __future__ import annotations

import ipywidgets

from labkit.widgets import picture


def test_a_picture_is_not_stretched_by_the_column_it_stands_in() -> None:
    image = picture("some-image", display="none")
    ipywidgets.VBox([image])
    assert image.layout.align_self == "flex-start"
    assert image.layout.display == "none"
    assert "some-image" in image._dom_classes
