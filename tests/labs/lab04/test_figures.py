"""The figures of lab 04 draw what they are given: right place, right unit, right order."""

from __future__ import annotations

import pytest

from labkit.labs.lab04 import figures
from labkit.measure import Timing


def test_head_groups_draw_a_line_from_each_query_head_to_the_kv_head_it_reads() -> None:
    full, grouped, single = figures.head_groups(6, [6, 2, 1]).axes
    assert [tuple(line.get_xdata()) for line in grouped.lines] == [(0, 1), (1, 1), (2, 1), (3, 4), (4, 4), (5, 4)]
    assert [tuple(line.get_xdata()) for line in full.lines] == [(head, head) for head in range(6)]
    assert {line.get_xdata()[1] for line in single.lines} == {2.5}
    assert [axes.get_title().split(":")[0] for axes in (full, grouped, single)] == ["MHA", "GQA", "MQA"]


def test_expansion_times_draw_medians_and_floors_in_milliseconds() -> None:
    timings = {"MHA": [Timing((0.001, 0.002, 0.009)), Timing((0.02,))], "GQA, grouped": [Timing((0.001,))] * 2}
    floors = {"MHA": [0.0005, 0.01], "GQA, grouped": [0.0001, 0.0002]}
    (axes,) = figures.expansion_times([16, 1024], timings, floors).axes
    measured = {part.get_label(): list(part.lines[0].get_ydata()) for part in axes.containers}
    assert measured == {"MHA": [2.0, 20.0], "GQA, grouped": [1.0, 1.0]}
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert drawn["MHA: floor"] == [0.5, 10.0]
    assert drawn["GQA, grouped: floor"] == [0.1, 0.2]


def test_expansion_times_never_draw_a_spread_below_the_fastest_sample() -> None:
    samples = (0.001, 0.0011, 0.05, 0.06, 0.07)
    values = {"MHA": [Timing((0.002, 0.002, 0.002, 0.9, 0.9))], "GQA, grouped": [Timing(samples)]}
    (axes,) = figures.expansion_times([16], values, {name: [0.001] for name in values}).axes
    for part, fastest in zip(axes.containers, (2.0, 1.0), strict=True):
        (segment,) = part.lines[2][0].get_segments()
        assert segment[0][1] >= fastest - 1e-9


def test_kept_per_token_puts_the_smallest_on_top_and_says_how_much_less() -> None:
    rows = [
        ("large", "MHA", 819_200, 819_200),
        ("small", "latent", 10_240, 727_040),
        ("middle", "GQA", 102_400, 409_600),
    ]
    (axes,) = figures.kept_per_token(rows).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["small", "middle", "large"]
    dots = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "o"]
    assert dots == [(10.0, 0), (100.0, 1), (800.0, 2)]
    assert [text.get_text() for text in axes.texts] == ["71 times", "4 times"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["MHA", "GQA", "latent", "with MHA"]


def test_kept_per_token_refuses_a_kind_without_a_colour() -> None:
    with pytest.raises(KeyError):
        figures.kept_per_token([("a model", "another kind", 1.0, 2.0)])


def test_perplexities_draw_a_point_for_each_model_and_a_line_for_guessing() -> None:
    rows = {"original": (30.0, 30.0, 30.0), "merged": (13_000.0, 12_000.0, 14_000.0), "copied": (16e6, 15e6, 17e6)}
    (axes,) = figures.perplexities(rows, guessing=49_152).axes
    points = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    assert points == [30.0, 13_000.0, 16e6]
    assert [text.get_text() for text in axes.texts] == ["30", "13,000", "16,000,000"]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(rows)
    assert any(list(line.get_xdata()) == [49_152, 49_152] for line in axes.lines)


def test_over_ranks_draws_shares_on_the_left_and_totals_on_the_right() -> None:
    curves = {"eight": {1: (1.0, 1), 8: (1 / 8, 1), 16: (1 / 8, 2)}, "one": {1: (1.0, 1), 8: (1.0, 8)}}
    left, right = figures.over_ranks(curves).axes
    assert [list(line.get_ydata()) for line in left.lines] == [[1.0, 1 / 8, 1 / 8], [1.0, 1.0]]
    assert [list(line.get_ydata()) for line in right.lines] == [[1, 1, 2], [1, 8]]
    assert [list(line.get_xdata()) for line in right.lines] == [[1, 8, 16], [1, 8]]
    assert [label.get_text() for label in left.get_yticklabels()] == ["1", "1/8"]
