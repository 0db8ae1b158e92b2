"""The figures of lab 07 draw what they are given: right place, right unit, right order."""

from __future__ import annotations

import pytest
import torch
from matplotlib.colors import to_hex

from labkit.labs.lab07 import figures
from labkit.labs.lab07.tasks import Score
from labkit.labs.lab07.timeline import Timeline
from labkit.plots.style import COLORS


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
    found = {
        "goes on": {"full": Score(0, 2, 0.3, 1.0), "x": Score(0, 2, 0.2, 4.0)},
        "a number": {"full": Score(2, 2, 1.0, 1.0), "x": Score(0, 2, 0.25, 50.0)},
    }
    (axes,) = figures.table(found, first="goes on").axes
    assert texts(axes) == ["1.00x", "4.00x", "100%", "25%"]
    assert axes.images[0].get_array().tolist() == [[1.0, 0.25], [1.0, 0.25]]


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
