"""What the labs' figures share draws the numbers it is given. All comparisons are exact."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit import plots
from labkit.measure import Timing
from labkit.plots.style import figure, timed_line, whiskers


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_against_length_draws_every_curve_over_its_lengths() -> None:
    curves = {"growing": [1.0, 3.0, 6.0], "preallocated": [1.0, 2.0, 3.0]}
    (axes,) = plots.against_length([1, 2, 3], curves, xlabel="tokens", ylabel="MB").axes
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    assert drawn == [([1, 2, 3], values) for values in curves.values()]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens", "MB")


@given(st.floats(1e-6, 1e6), st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_no_whisker_of_a_logarithmic_axis_ends_below_it(value: float, low: float, more: float) -> None:
    (below,), (above,) = whiskers(value, min(low, value), value + more)
    assert 0 < value - below <= value
    assert above >= 0


def test_a_timing_s_whisker_ends_at_the_fastest_sample_at_the_least() -> None:
    _, axes = figure()
    timed_line(axes, [1], [Timing((0.001, 0.002, 0.1, 0.2, 0.3))], "black", "slow and uneven")
    _, _, (bars,) = axes.containers[0]
    ((_, low), (_, high)) = bars.get_segments()[0]
    assert low == pytest.approx(1.0)  # ms
    assert high > 100
