"""The figures of lab 03 draw the numbers they are given: right place, right unit, right order."""

from __future__ import annotations

import pytest

from labkit.labs.lab03 import figures
from labkit.measure import Timing


def lines_of(axes) -> dict[str, tuple[list[float], list[float]]]:
    """Labelled lines, as x and y."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_memory_parts_stacks_each_row_and_marks_the_published_total() -> None:
    parts = {"weights": [14.0, 14.5], "cache": [1.0, 2.0], "logits": [0.5, 4.0]}
    (axes,) = figures.memory_parts(["1", "8"], parts, [15.75, 20.25]).axes
    second_row = [(bar.get_x(), bar.get_width()) for container in axes.containers for bar in container.patches[1:]]
    assert second_row == [(0.0, 14.5), (14.5, 2.0), (16.5, 4.0)]
    assert lines_of(axes)["published total"] == ([15.75, 20.25], [0, 1])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "8"]
    assert "GiB" in axes.get_xlabel()


def test_frontier_draws_every_pair_that_holds_a_request_on_logarithmic_axes() -> None:
    (axes,) = figures.frontier({"a": [(1024, 8), (2048, 4), (4096, 0)], "b": [(1024, 2), (2048, 1)]}).axes
    assert lines_of(axes) == {"a": ([1024, 2048], [8, 4]), "b": ([1024, 2048], [2, 1])}
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1K", "2K", "4K"]


def test_decode_times_draws_medians_and_floors_in_milliseconds() -> None:
    timings = {"decode": [Timing((0.01, 0.02, 0.04)), Timing((0.03,))]}
    (axes,) = figures.decode_times([16, 1024], timings, {"decode": [0.005, 0.006]}).axes
    assert lines_of(axes)["decode, floor"] == ([16, 1024], [5.0, 6.0])
    (measured,) = axes.containers
    assert list(measured.lines[0].get_ydata()) == [20.0, 30.0]
    assert axes.get_ylim()[0] == 0


def test_throughput_is_dotted_where_the_batch_no_longer_fits() -> None:
    rates = {"short": [10.0, 20.0, 40.0], "long": [10.0, 15.0, 18.0]}
    (axes,) = figures.throughput([1, 2, 4], rates, {"short": 4, "long": 2}, {"short": 100.0, "long": 20.0}).axes
    solid = lines_of(axes)
    assert solid["short"] == ([1, 2, 4], [10.0, 20.0, 40.0])
    assert solid["long"] == ([1, 2], [10.0, 15.0])
    dotted = [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() == ":" and len(line.get_xdata())]
    assert dotted == [[4], [2, 4]]
    ceilings = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--" and len(line.get_xdata())]
    assert ceilings == [100.0, 20.0]


def test_throughput_marks_the_batch_at_which_cache_and_weights_are_equal() -> None:
    rates = {"short": [10.0, 20.0, 40.0], "long": [10.0, 15.0, 18.0]}
    (axes,) = figures.throughput(
        [1, 2, 4], rates, {"short": 4, "long": 2}, {"short": 100.0, "long": 20.0}, {"short": 2.0, "long": 9.0}
    ).axes
    stars = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "*" and len(line.get_xdata())]
    assert len(stars) == 1, "a balance beyond the batches shown has no place on its curve"
    assert stars[0][0] == pytest.approx([2.0, 20.0])


def test_throughput_of_what_fits_at_no_batch_is_dotted_throughout_and_still_named() -> None:
    (axes,) = figures.throughput([1, 2], {"huge": [1.0, 2.0]}, {"huge": 0}, {"huge": 4.0}).axes
    dotted = next(line for line in axes.lines if line.get_label() == "huge")
    assert (list(dotted.get_xdata()), dotted.get_linestyle()) == ([1, 2], ":")


def test_roofline_bends_at_the_ridge_and_places_work_by_intensity_and_rate() -> None:
    points = {"decode": [("one", 0.5, 4e9)], "prefill": [("many", 200.0, 9e10)]}
    (axes,) = figures.roofline(1e11, 1e10, points).axes
    drawn = lines_of(axes)
    across, roof = drawn["attainable"]
    assert max(roof) == 100.0
    assert list(roof) == pytest.approx([min(100.0, 10 * x) for x in across], rel=1e-12)
    assert drawn["ridge: 10 operations per byte"][0] == [10.0, 10.0]
    assert drawn["decode"] == ([0.5], [4.0])
    assert drawn["prefill"] == ([200.0], [90.0])
    assert [text.get_text() for text in axes.texts] == ["one", "many"]


def test_cache_growth_draws_each_models_sizes_on_logarithmic_axes_with_lengths_as_people_say_them() -> None:
    (axes,) = figures.cache_growth([512, 1024, 2048], {"a": [0.5, 1.0, 2.0], "b": [0.5, 0.5, 0.6]}).axes
    assert lines_of(axes) == {"a": ([512, 1024, 2048], [0.5, 1.0, 2.0]), "b": ([512, 1024, 2048], [0.5, 0.5, 0.6])}
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["512", "1K", "2K"]
    assert "GB" in axes.get_ylabel()


def test_throughput_says_a_note_at_the_largest_batch_that_fits() -> None:
    rates = {"short": [10.0, 20.0, 20.0], "long": [10.0, 15.0, 18.0]}
    limits, ceilings = {"short": 2, "long": 4}, {"short": 100.0, "long": 20.0}
    (axes,) = figures.throughput([1, 2, 4], rates, limits, ceilings, notes={"short": "full"}).axes
    assert [(text.get_text(), text.xy) for text in axes.texts] == [("full", (2, 20.0))]
