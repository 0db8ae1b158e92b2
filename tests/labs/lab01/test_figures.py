"""The figures draw the numbers they are given: right place, right unit, right order. All comparisons are exact."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
import torch

from labkit.labs.lab01 import figures


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def widths(axes) -> list[float]:
    return [bar.get_width() for bar in axes.patches]


def test_lookup_draws_the_scores_and_the_weights_beside_their_names() -> None:
    query, keys = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    weights = torch.tensor([0.25, 0.75])
    cards, scores, shares = figures.lookup(query, keys, weights, ["a", "b"], ["x", "y"]).axes[:3]
    assert cards.images[0].get_array().tolist() == [[1.0, 2.0], [1.0, 0.0], [0.0, 3.0]]
    assert widths(scores) == [1.0, 6.0]
    assert widths(shares) == [0.25, 0.75]
    assert [label.get_text() for label in scores.get_yticklabels()] == ["a", "b"]


def test_tower_draws_the_layers_it_names() -> None:
    weights = torch.arange(4.0)[:, None, None, None].expand(4, 2, 3, 3) / 4
    panels = figures.tower(weights, ["a", "b", "c"], layers=[1, 3]).axes[:2]
    assert [float(axes.images[0].get_array().max()) for axes in panels] == [0.25, 0.75]
    assert [axes.get_title().split(",")[0] for axes in panels] == ["layer 1", "layer 3"]


def test_shares_are_stacked_in_the_order_given() -> None:
    shares = {"first": [0.5, 0.1], "itself": [0.25, 0.2], "before": [0.125, 0.3], "others": [0.125, 0.4]}
    (axes,) = figures.where_weight_goes(shares).axes
    layer_0 = [bar for bar in axes.patches if bar.get_x() < 0]
    assert [(bar.get_y(), bar.get_height()) for bar in layer_0] == [
        (0.0, 0.5),
        (0.5, 0.25),
        (0.75, 0.125),
        (0.875, 0.125),
    ]
