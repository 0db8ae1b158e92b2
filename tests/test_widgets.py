"""What the widgets share."""

from __future__ import annotations

import base64
from xml.etree import ElementTree

import ipywidgets
import matplotlib.pyplot as plt
import pytest

from labkit.plots import described, figure
from labkit.widgets import picture


def test_a_picture_is_not_stretched_by_the_column_it_stands_in() -> None:
    image = picture("some-image", display="none")
    ipywidgets.VBox([image])
    assert image.layout.align_self == "flex-start"
    assert image.layout.display == "none"
    assert "some-image" in image._dom_classes


def test_a_picture_shows_a_figure_and_says_what_is_in_it() -> None:
    image = picture("some-image")
    fig, axes = figure()
    axes.plot([1, 2], [3, 4])
    image.show(described(fig, 'a line that "rises" from 3 to 4 & no further'))
    assert image.png.startswith(b"\x89PNG")
    shown = ElementTree.fromstring(image.value.replace(">", "/>"))
    assert shown.attrib["alt"] == image.alt == 'a line that "rises" from 3 to 4 & no further'
    assert base64.b64decode(shown.attrib["src"].removeprefix("data:image/png;base64,")) == image.png
    assert not plt.fignum_exists(fig.number)


def test_a_picture_takes_no_figure_without_words() -> None:
    fig, _ = figure()
    with pytest.raises(ValueError, match=r"plots\.described"):
        picture("some-image").show(fig)
    plt.close(fig)
