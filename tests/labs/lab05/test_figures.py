"""The figures of lab 05 draw what they are given: right place, right unit, right order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from labkit import plots
from labkit.labs.lab05 import figures
from labkit.measure import Timing


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_rounding_ties_each_number_to_its_nearest_level_and_says_the_scale() -> None:
    (axes,) = figures.rounding([-1.0, 0.4, 2.0], [2, 1]).axes
    levels = [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "|"]
    assert levels == [[-1.0, 0.0, 1.0, 2.0], [-1.0, 2.0]]
    dots = [(list(line.get_xdata()), line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "o"]
    assert dots == [([-1.0, 0.4, 2.0], -0.5), ([-1.0, 0.4, 2.0], 0.5)]
    ties = [list(line.get_xdata()) for line in axes.lines if line.get_color() == plots.COLORS["query"]]
    assert [tie for tie in ties if tie] == [[-1, -1], [0.4, 0], [2, 2], [-1, -1], [0.4, -1], [2, 2]]
    first, second = (label.get_text() for label in axes.get_yticklabels())
    assert first == "2 bits: 4 levels\nscale 1\nlargest error 0.40"
    assert second == "1 bits: 2 levels\nscale 3\nlargest error 1.4"


def test_rounding_draws_levels_that_a_quantizer_has() -> None:
    from labkit.quantization import Quantizer

    x = torch.linspace(-1, 2, 32).square()[None, None, :, None]
    back = Quantizer(4, 32).quantize(x).dequantize().flatten()
    (axes,) = figures.rounding(x.flatten().tolist(), [4]).axes
    ties = [line.get_xdata() for line in axes.lines if line.get_color() == plots.COLORS["query"]]
    drawn = torch.tensor([tie[1] for tie in ties if len(tie)], dtype=torch.float32)
    # Bounded: the quantizer's scale and zero point are rounded to float16, up to 15 steps of a scale below 0.5.
    torch.testing.assert_close(drawn, back, rtol=0, atol=(15 * 0.5 + 1) * 2**-10)


def test_rounding_gives_equal_numbers_back() -> None:
    (axes,) = figures.rounding([3.0, 3.0], [4]).axes
    assert "scale 0\nlargest error 0" in axes.get_yticklabels()[0].get_text()


def test_channel_sizes_share_one_scale_and_part_the_heads() -> None:
    keys, values = torch.rand(3, 8) + 0.1, torch.rand(3, 8) + 0.1
    keys[1, 5] = 40.0
    left, right, bar = figures.channel_sizes(keys, values, num_kv_heads=4).axes
    for axes, given in ((left, keys), (right, values)):
        np.testing.assert_array_equal(axes.images[0].get_array(), given.numpy())
        assert [line.get_xdata()[0] for line in axes.lines] == [1.5, 3.5, 5.5]
    assert left.images[0].norm is right.images[0].norm
    assert left.images[0].norm.vmax == 40.0
    assert [axes.get_title() for axes in (left, right)] == ["keys", "values"]
    assert (left.get_ylabel(), bar.get_ylabel()) == ("layer", "mean absolute value")
    assert left.get_xlabel().startswith("channel")


def test_token_channel_map_draws_absolute_values_tokens_down_and_channels_across() -> None:
    x, y = torch.randn(10, 4), torch.randn(10, 4)
    left, right, *_ = figures.token_channel_map(x, y, ["K", "V"]).axes
    for axes, given in ((left, x), (right, y)):
        np.testing.assert_array_equal(axes.images[0].get_array(), given.abs().numpy())
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("channel", "token")
    assert [left.get_title(), right.get_title()] == ["K", "V"]


def test_maps_take_bfloat16() -> None:
    x = torch.randn(6, 8).bfloat16()
    assert figures.token_channel_map(x, x, ["K", "V"]).axes
    assert figures.channel_sizes(x.abs(), x.abs()).axes
    assert figures.error_maps({"one": x}).axes


def test_error_maps_share_one_scale_say_the_rms_and_leave_out_what_is_exact() -> None:
    small, large = torch.full((4, 3), 0.1), torch.full((4, 3), -2.0)
    large[0] = 0.0
    left, right, bar = figures.error_maps({"int4": small, "int2": large}).axes
    assert left.get_title() == "int4\nRMS 0.1"
    assert right.get_title() == f"int2\nRMS {2 * 0.75**0.5:.3g}"
    assert [axes.images[0].norm.vmax for axes in (left, right)] == [2.0, 2.0]
    assert [axes.images[0].norm.vmin for axes in (left, right)] == [0.002, 0.002]
    shown = right.images[0].get_array()
    assert np.ma.getmaskarray(shown)[0].all()
    assert (shown[1:] == 2.0).all()
    assert to_hex(right.get_facecolor()) == plots.COLORS["pale"].lower()
    assert "absolute error" in bar.get_ylabel()


def test_error_maps_can_be_drawn_where_nothing_is_wrong_and_with_a_given_scale() -> None:
    nothing, _ = figures.error_maps({"exact": torch.zeros(4, 3)}).axes
    assert nothing.get_title() == "exact\nRMS 0"
    given, _ = figures.error_maps({"one": torch.ones(4, 3)}, largest=5.0).axes
    assert given.images[0].norm.vmax == 5.0


def test_axis_errors_draw_a_bar_for_each_way_in_its_group() -> None:
    errors = {"keys": {"per channel": 0.07, "per token": 0.13}, "values": {"per channel": 0.11, "per token": 0.09}}
    (axes,) = figures.axis_errors(errors).axes
    drawn = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
    assert drawn == {"per channel": [0.07, 0.11], "per token": [0.13, 0.09]}
    assert [text.get_text() for text in axes.texts] == ["0.070", "0.11", "0.13", "0.090"]
    middles = [[bar.get_x() + bar.get_width() / 2 for bar in bars] for bars in axes.containers]
    np.testing.assert_allclose(middles, [[-0.2, 0.8], [0.2, 1.2]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["keys", "values"]
    assert axes.get_ylabel() == "relative RMS error"
    assert legend(axes) == ["per channel", "per token"]


def test_quality_against_bits_draws_points_with_their_ends_over_a_line_at_one() -> None:
    points = {"float16": (16.0, 1.0, 1.0, 1.0), "int4": (4.5, 1.25, 1.125, 1.5), "int2": (2.5, 2000.0, 1000.0, 4000.0)}
    (axes,) = figures.quality_against_bits(points).axes
    drawn = {bars.get_label(): bars for bars in axes.containers}
    assert list(drawn) == ["float16: 1.000", "int4: 1.250", "int2: 2,000"]
    for bars, (nbits, ratio, low, high) in zip(drawn.values(), points.values(), strict=True):
        assert (bars.lines[0].get_xdata()[0], bars.lines[0].get_ydata()[0]) == (nbits, ratio)
        (segment,) = bars.lines[2][0].get_segments()
        np.testing.assert_allclose(segment, [[nbits, low], [nbits, high]])
    assert any(line.get_label() == "full cache" and set(line.get_ydata()) == {1} for line in axes.lines)
    assert axes.get_yscale() == "log"
    assert axes.get_ylim()[0] < 1 < 4000 < axes.get_ylim()[1]
    assert axes.get_xlim()[0] < 2.5 < 16 < axes.get_xlim()[1]
    assert "bits per element" in axes.get_xlabel()


def test_quality_against_bits_leaves_no_room_beyond_its_last_point() -> None:
    (axes,) = figures.quality_against_bits({"int8": (9.0, 1.0, 1.0, 1.0), "int2": (3.0, 1.2, 1.1, 1.3)}).axes
    assert 9 < axes.get_xlim()[1] < 10
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2", "3", "4", "5", "6", "8"]


@pytest.mark.parametrize("most", [1.001, 1.3, 3.0, 15.0, 800.0])
def test_quality_against_bits_has_ticks_to_read_by_at_every_range(most: float) -> None:
    fig = figures.quality_against_bits({"float16": (16, 1, 1, 1), "int2": (2.5, most, 1 + (most - 1) / 2, most)})
    fig.canvas.draw()
    (axes,) = fig.axes
    low, high = axes.get_ylim()
    labels = [tick.label1.get_text() for tick in axes.yaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert 3 <= len(labels) <= 12
    assert len(set(labels)) == len(labels)


def test_many_points_of_quality_against_bits_have_looks_of_their_own() -> None:
    points = {str(index): (4.5, 1 + index / 10, 1.0, 4.0) for index in range(30)}
    (axes,) = figures.quality_against_bits(points).axes
    looks = {(bars.lines[0].get_color(), bars.lines[0].get_marker()) for bars in axes.containers}
    assert len(axes.containers) == len(looks) == 30


def test_reading_times_draw_medians_in_milliseconds_and_where_a_packed_cache_becomes_faster() -> None:
    timings = {
        "full": [Timing((0.001, 0.001, 0.002)), Timing((0.004,)), Timing((0.009,))],
        "int4": [Timing((0.002,)), Timing((0.003,)), Timing((0.0035,))],
        "int2": [Timing((0.003,)), Timing((0.0031,)), Timing((0.002,))],
    }
    (axes,) = figures.reading_times([512, 1024, 2048], timings).axes
    measured = {bars.get_label(): list(bars.lines[0].get_ydata()) for bars in axes.containers}
    assert measured == {"full": [1, 4, 9], "int4": [2, 3, 3.5], "int2": [3, 3.1, 2]}
    for bars, fastest in zip(axes.containers, (1.0, 2.0, 3.0), strict=True):
        assert bars.lines[2][0].get_segments()[0][0][1] >= fastest - 1e-9
    assert legend(axes) == ["full", "int4", "int2", "1,024 tokens: int4\nis faster than full"]
    assert [line.get_xdata() for line in axes.lines if "faster" in line.get_label()] == [[1024, 1024]]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert "ms" in axes.get_ylabel()


def test_reading_times_mark_nothing_where_no_packed_cache_is_faster() -> None:
    timings = {"full": [Timing((0.001,))], "int4": [Timing((0.001,))]}
    (axes,) = figures.reading_times([512], timings).axes
    assert legend(axes) == ["full", "int4"]
    (axes,) = figures.reading_times([512], {"int4": [Timing((0.001,))]}).axes
    assert legend(axes) == ["int4"]


def test_bytes_parts_stack_in_the_order_given_and_write_the_sum() -> None:
    rows = {
        "float16": {"codes": 0.0, "metadata": 0.0, "full-precision tokens": 16.0},
        "int4": {"codes": 3.5, "metadata": 0.5, "full-precision tokens": 1.0},
    }
    (axes,) = figures.bytes_parts(rows).axes
    drawn = {bars.get_label(): [(bar.get_x(), bar.get_width()) for bar in bars] for bars in axes.containers}
    assert drawn == {
        "codes": [(0, 0), (0, 3.5)],
        "metadata": [(0, 0), (3.5, 0.5)],
        "full-precision tokens": [(0, 16), (4, 1)],
    }
    assert [text.get_text() for text in axes.texts] == ["16.0", "5.00"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["float16", "int4"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row on top
    assert axes.get_xlabel() == "bits per element"


def test_bytes_parts_say_another_unit_and_refuse_a_part_without_a_colour() -> None:
    (axes,) = figures.bytes_parts({"int4": {"codes": 11_520.0}}, "bytes per token").axes
    assert axes.get_xlabel() == "bytes per token"
    assert [text.get_text() for text in axes.texts] == ["11,520"]
    with pytest.raises(KeyError):
        figures.bytes_parts({"int4": {"another part": 1.0}})
