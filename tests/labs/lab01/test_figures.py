"""The figures draw the numbers they are given: right place, right unit, right order. All comparisons are exact."""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch

from labkit import plots
from labkit.labs.lab01 import figures
from labkit.labs.lab01.references import causal_mask


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


def test_the_mask_figure_colours_what_may_be_seen() -> None:
    fig = figures.permissions(causal_mask(2, 3), past=3)
    colors = [plt.matplotlib.colors.to_hex(patch.get_facecolor()) for patch in fig.axes[0].patches]
    assert [color.upper() == plots.COLORS["key"] for color in colors] == causal_mask(2, 3).flatten().tolist()


def test_the_head_figure_writes_each_numbers_token() -> None:
    right = torch.arange(4).view(1, 4, 1).expand(3, 4, 2)
    fig = figures.heads_in_memory(4, 3, 2, right, right)
    assert [text.get_text() for text in fig.axes[0].texts] == list("012301230123") * 2


def test_the_key_figure_shows_layers_and_values() -> None:
    fig = figures.key_change({"mask on": [0.0, 1e-7], "mask off": [0.0, 0.5]})
    lines = {line.get_label(): line.get_ydata() for line in fig.axes[0].lines}
    assert list(lines["mask off"]) == [1e-9, 0.5]
    assert list(lines["mask on"]) == [1e-9, 1e-7]
