"""The figures draw the numbers they are given: right place, right unit, right order. All comparisons are exact."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest

from labkit import plots


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def widths(axes) -> list[float]:
    return [bar.get_width() for bar in axes.patches]


def test_against_length_draws_every_curve_over_its_lengths() -> None:
    curves = {"growing": [1.0, 3.0, 6.0], "preallocated": [1.0, 2.0, 3.0]}
    (axes,) = plots.against_length([1, 2, 3], curves, xlabel="tokens", ylabel="MB").axes
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    assert drawn == [([1, 2, 3], values) for values in curves.values()]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens", "MB")
