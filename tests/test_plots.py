"""The figures draw the numbers they are given: right place, right unit, right order. All comparisons are exact."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
import torch

from labkit import plots
from labkit.measure import Timing


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def widths(axes) -> list[float]:
    return [bar.get_width() for bar in axes.patches]


def test_lookup_draws_the_scores_and_the_weights_beside_their_names() -> None:
    query, keys = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    weights = torch.tensor([0.25, 0.75])
    cards, scores, shares = plots.lookup(query, keys, weights, ["a", "b"], ["x", "y"]).axes[:3]
    assert cards.images[0].get_array().tolist() == [[1.0, 2.0], [1.0, 0.0], [0.0, 3.0]]
    assert widths(scores) == [1.0, 6.0]
    assert widths(shares) == [0.25, 0.75]
    assert [label.get_text() for label in scores.get_yticklabels()] == ["a", "b"]


def test_time_per_token_draws_medians_and_theory_in_milliseconds() -> None:
    timings = {"with cache": [Timing((0.01, 0.02, 0.04)), Timing((0.03,))], "without cache": [Timing((0.1,))] * 2}
    theory = {"with cache": [0.005, 0.006], "without cache": [0.05, 0.06]}
    (axes,) = plots.time_per_token([8, 64], timings, theory, [("a GPU", "with cache", 64, 0.002)]).axes
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(drawn["with cache, theory"]) == [5.0, 6.0]
    assert list(drawn["without cache, theory"]) == [50.0, 60.0]
    assert list(drawn["a GPU"]) == [2.0]
    measured = {part.get_label(): list(part.lines[0].get_ydata()) for part in axes.containers}
    assert measured == {"with cache": [20.0, 30.0], "without cache": [100.0, 100.0]}


def test_tower_draws_the_layers_it_names() -> None:
    weights = torch.arange(4.0)[:, None, None, None].expand(4, 2, 3, 3) / 4
    panels = plots.tower(weights, ["a", "b", "c"], layers=[1, 3]).axes[:2]
    assert [float(axes.images[0].get_array().max()) for axes in panels] == [0.25, 0.75]
    assert [axes.get_title().split(",")[0] for axes in panels] == ["layer 1", "layer 3"]


def test_shares_are_stacked_in_the_order_given() -> None:
    shares = {"first": [0.5, 0.1], "itself": [0.25, 0.2], "before": [0.125, 0.3], "others": [0.125, 0.4]}
    (axes,) = plots.where_weight_goes(shares).axes
    layer_0 = [bar for bar in axes.patches if bar.get_x() < 0]
    assert [(bar.get_y(), bar.get_height()) for bar in layer_0] == [
        (0.0, 0.5),
        (0.5, 0.25),
        (0.75, 0.125),
        (0.875, 0.125),
    ]


def test_against_length_draws_every_curve_over_its_lengths() -> None:
    curves = {"growing": [1.0, 3.0, 6.0], "preallocated": [1.0, 2.0, 3.0]}
    (axes,) = plots.against_length([1, 2, 3], curves, xlabel="tokens", ylabel="MB").axes
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    assert drawn == [([1, 2, 3], values) for values in curves.values()]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens", "MB")


def test_step_times_are_milliseconds_with_prefill_first() -> None:
    (axes,) = plots.step_times([0.2, 0.01, 0.02], prompt=128).axes
    assert [bar.get_height() for bar in axes.patches] == [200.0, 10.0, 20.0]


def test_tokens_per_turn_shows_both_servers_turn_by_turn() -> None:
    (axes,) = plots.tokens_per_turn([10, 20, 30], [10, 12, 14]).axes
    heights = sorted(bar.get_height() for bar in axes.patches)
    assert heights == [10, 10, 12, 14, 20, 30]
