"""The figures of lab 07 draw what they are given: right place, right unit, right order."""

from __future__ import annotations

import pytest
import torch
from matplotlib.colors import to_hex

from labkit.labs.lab07 import figures
from labkit.labs.lab07.scores import FULL, Score
from labkit.labs.lab07.timeline import Timeline
from labkit.measure import Timing
from labkit.plots.style import COLORS
from labkit.quality.recall import wilson


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_attention_by_position_shows_the_first_tokens_again_and_nothing_below_the_scale() -> None:
    shares = torch.rand(4, 30) * 0.1
    shares[0, 0] = 0.0
    near, whole, bar = figures.attention_by_position(shares, first=8).axes
    assert near.images[0].get_array().shape == (4, 8)
    drawn = torch.tensor(whole.images[0].get_array().tolist())
    assert torch.equal(drawn, shares.clamp(min=1e-4))
    assert "log" in bar.get_ylabel()


def test_hitters_are_sorted_named_by_token_and_position_and_add_up_to_all() -> None:
    (axes,) = figures.hitters(torch.tensor([6.0, 1.0, 2.0, 1.0]), ["I", " am", "\n", "$x"], most=2).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["I  0", "⏎  2", "the other 2"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([60, 20, 20])
    assert texts(axes) == ["60.0%", "20.0%", "20.0%"]


def test_losses_are_running_means_that_begin_when_there_are_enough() -> None:
    (axes,) = figures.losses_over_text({None: torch.ones(10), 1: torch.arange(10.0)}, budget=5, average=4).axes
    full, one = axes.lines[:2]
    assert list(full.get_xdata()) == [4, 5, 6, 7, 8, 9, 10]
    assert list(one.get_ydata()) == pytest.approx([1.5 + i for i in range(7)])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["everything kept", "1 sink"]
    assert axes.lines[2].get_xdata()[0] == 5


def test_kept_has_a_row_per_policy_and_marks_fact_and_question() -> None:
    axes, bar = figures.kept({"a": [0.0, 0.5, 1.0, 1.0], "b": [1.0, 0.0, 0.0, 1.0]}, [1, 2], 3).axes
    assert axes.images[0].get_array().tolist() == [[0.0, 0.5, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0]]
    assert [text for text in texts(axes) if text] == ["the number", "the question"]
    assert "share" in bar.get_ylabel()


def test_the_table_writes_shares_and_of_the_first_row_the_perplexitys_ratio() -> None:
    half, quarter = ("x", 0.5), ("x", 0.25)
    found = {
        "goes on": {FULL: Score(0, 2, 0.3, 1.0), half: Score(0, 2, 0.2, 4.0), quarter: Score(0, 2, 0.2, 20.4)},
        "a number": {FULL: Score(2, 2, 1.0, 1.0), half: Score(1, 2, 0.5, 9.0), quarter: Score(0, 2, 0.25, 50.0)},
    }
    fig = figures.table(found, first="goes on")
    (axes,) = fig.axes
    assert texts(axes)[:6] == ["1.00", "4.00", "20", "100", "50", "25"]
    assert axes.images[0].get_array().tolist() == [pytest.approx([1.0, 0.25, 1 / 20.4]), [1.0, 0.5, 0.25]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["100", "50", "25"]
    named = {text.get_text(): text.get_position()[0] for text in axes.texts[6:]}
    assert named["full"] == 0
    assert named["x"] == 1.5
    assert "% kept: full 100; x 50, 25." in fig.alt
    assert "a number: full 100; x 50, 25." in fig.alt


def test_recalled_draws_whole_answers_with_their_intervals_a_panel_for_each_budget() -> None:
    counts = {FULL: (12, 12), ("x", 0.5): (9, 12), ("random", 0.5): (0, 12), ("x", 0.25): (6, 12),
              ("random", 0.25): (3, 12)}  # fmt: skip
    fig = figures.recalled(counts, control="random")
    half, quarter = fig.axes
    assert [axes.get_title() for axes in (half, quarter)] == ["50% kept", "25% kept"]
    assert [label.get_text() for label in half.get_yticklabels()] == ["x", "random"]
    points = [(bar[0].get_xdata()[0], bar[0].get_ydata()[0]) for bar in quarter.containers]
    assert points == [(50, 0), (25, 1)]
    assert to_hex(quarter.containers[1][0].get_color()) != to_hex(quarter.containers[0][0].get_color())
    (segment,) = quarter.containers[0][2][0].get_segments()
    assert segment[:, 0].tolist() == pytest.approx([100 * end for end in wilson(6, 12)])
    assert "of 12 texts" in fig.alt


def test_paying_draws_how_many_times_as_long_the_full_step_takes() -> None:
    seconds = {"full": [Timing((2.0,)), Timing((6.0,))], "x": [Timing((4.0,)), Timing((3.0,))]}
    fig = figures.paying([64, 256], seconds, [1.0, 2.5])
    (axes,) = fig.axes
    level, theory = axes.lines[:2]
    assert list(level.get_ydata()) == [1, 1]
    assert list(theory.get_ydata()) == [1.0, 2.5]
    assert list(axes.containers[0][0].get_ydata()) == [0.5, 2.0]
    assert "x: 0.5 at 64, 2 at 256" in fig.alt


def test_bytes_are_drawn_in_megabytes_from_the_first_token_seen() -> None:
    (axes,) = figures.bytes_over_tokens({"everything": [2_000_000, 3_000_000]}, first=64).axes
    assert list(axes.lines[0].get_xdata()) == [64, 65]
    assert list(axes.lines[0].get_ydata()) == [2.0, 3.0]
    assert axes.get_ylim()[0] == 0


LINE = Timeline("p", 2, ("a", " b", "c"), ((1.0, 0, 0), (1.0, 1.0, 0), (0.0, 1.0, 1.0)), "x")


def test_timelines_have_a_panel_per_policy_with_its_name() -> None:
    one, other, _ = figures.timelines([LINE, LINE]).axes
    assert one.get_title() == other.get_title() == "p"
    assert one.images[0].get_array().tolist() == [[1.0, None, None], [1.0, 1.0, None], [0.0, 1.0, 1.0]]  # None: to come


def test_a_moment_frames_what_was_dropped_and_leaves_what_is_to_come_white() -> None:
    (axes,) = figures.moment_of(LINE, 2).axes
    assert [to_hex(box.get_edgecolor()) == COLORS["highlight"].lower() for box in axes.patches] == [True, False, False]
    (axes,) = figures.moment_of(LINE, 1).axes
    assert to_hex(axes.patches[2].get_facecolor()) == "#ffffff"
    assert texts(axes) == ["a", "·b", "c"]
