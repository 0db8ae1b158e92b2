"""The figures draw the numbers they are given: right place, right unit, right order. All comparisons are exact."""

from __future__ import annotations

from labkit.labs.lab02 import figures
from labkit.measure import Timing


def test_time_per_token_draws_medians_and_theory_in_milliseconds() -> None:
    timings = {"with cache": [Timing((0.01, 0.02, 0.04)), Timing((0.03,))], "without cache": [Timing((0.1,))] * 2}
    theory = {"with cache": [0.005, 0.006], "without cache": [0.05, 0.06]}
    recorded = [
        ("a GPU", "with cache", 64, 0.002),
        ("a GPU", "without cache", 8, 0.003),
        ("a GPU", "with cache", 8, 0.001),
    ]
    (axes,) = figures.time_per_token([8, 64], timings, theory, recorded).axes
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(drawn["with cache, theory"]) == [5.0, 6.0]
    assert list(drawn["without cache, theory"]) == [50.0, 60.0]
    assert list(drawn["a GPU, with cache"]) == [1.0, 2.0]  # by position
    assert list(drawn["a GPU, without cache"]) == [3.0]
    measured = {part.get_label(): list(part.lines[0].get_ydata()) for part in axes.containers}
    assert measured == {"with cache": [20.0, 30.0], "without cache": [100.0, 100.0]}


def test_step_times_are_milliseconds_with_prefill_first() -> None:
    (axes,) = figures.step_times([0.2, 0.01, 0.02], prompt=128).axes
    assert [bar.get_height() for bar in axes.patches] == [200.0, 10.0, 20.0]


def test_tokens_per_turn_shows_both_servers_turn_by_turn() -> None:
    (axes,) = figures.tokens_per_turn([10, 20, 30], [10, 12, 14]).axes
    heights = sorted(bar.get_height() for bar in axes.patches)
    assert heights == [10, 10, 12, 14, 20, 30]


def test_moved_and_held_draws_both_caches_in_both_panels() -> None:
    moved, held = (
        {"growing": [1.0, 3.0], "preallocated": [1.0, 2.0]},
        {"growing": [1.0, 2.0], "preallocated": [8.0, 8.0]},
    )
    for axes, curves in zip(figures.moved_and_held(moved, held).axes, (moved, held), strict=True):
        assert {line.get_label(): list(line.get_ydata()) for line in axes.lines} == curves


def test_change_by_layer_marks_layers_that_do_not_change() -> None:
    (axes,) = figures.change_by_layer([0.0, 0.2, 0.1]).axes
    assert [(text.get_text(), text.xy[0]) for text in axes.texts] == [("0", 0)]


def test_what_a_step_finds_in_the_cache_is_drawn_paler_than_what_it_runs() -> None:
    without, cached = figures.work_per_step(prompt=2, steps=2).axes
    assert {cell.get_alpha() for cell in without.patches} == {1.0}
    assert sorted(cell.get_alpha() for cell in cached.patches) == [figures.KEPT, figures.KEPT, 1.0, 1.0, 1.0]
