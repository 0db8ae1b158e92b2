"""The widget of lab 05: its figures are those of sizing and of quality, and what was measured stays measured."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
import torch
from torch import Tensor

from labkit import models, quality, sizing
from labkit.cache import Cache
from labkit.labs.lab05.widget import Quantizing
from labkit.llama import Llama
from labkit.quantization import Quantizer
from labkit.sizing import Dense, Quantized, SizeError
from labkit.specs import ModelSpec

SPEC = ModelSpec("tiny", 2, 4, 2, 32, 48, 96, 100, 512)


@pytest.fixture(scope="module")
def model() -> Llama:
    """Weights wide enough that 2 bits show in the logits."""
    made = models.random(SPEC, prepack=False)
    for name, parameter in made.named_parameters():
        if "norm" not in name:
            parameter.mul_(12)
    return made


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, SPEC.vocab_size, (1, 160), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def closed():
    yield
    assert plt.get_fignums() == []  # the widget closes what it draws


@pytest.fixture
def widget(model: Llama, tokens: Tensor) -> Quantizing:
    return Quantizing(model, tokens, layer=1)


@pytest.fixture
def measured(monkeypatch) -> list:
    """Grows by one for each measurement."""
    calls, real = [], quality.compare
    monkeypatch.setattr(quality, "compare", lambda *args, **how: calls.append(how) or real(*args, **how))
    return calls


def test_only_group_sizes_that_divide_head_dim_are_offered_and_it_starts_with_the_largest(widget) -> None:
    assert [value for value in widget.group_size.options] == [16, 32]
    assert widget.group_size.value == 32
    assert widget.setting == (8, "channel", 32, 0, 0)


def test_the_bytes_are_those_of_sizing(widget) -> None:
    widget.nbits.value, widget.group_size.value = 4, 16
    widget.residual_length.value, widget.sink_length.value = 32, 4
    kept = Quantized(4, 16, 32, sink_length=4)
    said = widget.label.value
    assert f"{float(sizing.bytes_per_token(SPEC, kept)):,.10g} bytes per token" in said
    assert "6 bits per element, 2 of them scales and zero points" in said
    held, full = sizing.cache_bytes(SPEC, 2000, dtype=kept), sizing.cache_bytes(SPEC, 2000, dtype="float16")
    assert f"{held / 1e6:.2f} MB at 2,000 tokens: {held / full:.1%} of the full float16 cache" in said
    assert f"{full / 1e6:.2f} MB" in said


def test_the_share_is_that_of_a_cache_that_was_filled(model, widget) -> None:
    widget.nbits.value = 2
    generator = torch.Generator().manual_seed(0)
    packed, full = Cache.quantized(2, 2, group_size=32, residual_length=0), model.cache()
    for cache in (packed, full):
        for layer in cache.layers:
            x = torch.randn(1, SPEC.num_kv_heads, 2000, SPEC.head_dim, generator=generator).half()
            layer.append(x, x)
    assert f"{packed.nbytes / full.nbytes:.1%} of the full float16 cache" in widget.label.value


@pytest.mark.parametrize(
    ("control", "value"),
    [("nbits", 2), ("key_axis", "token"), ("group_size", 16), ("residual_length", 64), ("sink_length", 4)],
)
def test_each_control_measures_and_draws_anew_once(widget, measured, control, value) -> None:
    before = widget.setting, widget.image.png, widget.quality.value
    getattr(widget, control).value = value
    assert len(measured) == 1
    assert widget.setting != before[0]
    assert widget.image.png != before[1]
    assert widget.quality.value != before[2]
    assert widget.image.png.startswith(b"\x89PNG")


def test_the_ratio_is_that_of_a_comparison_by_hand(model, tokens, widget) -> None:
    widget.nbits.value, widget.key_axis.value = 2, "token"
    make = {"mine": lambda: Cache.quantized(2, 2, key_axis="token", group_size=32, residual_length=0)}
    found = quality.compare(model, tokens, make, chunk=32, context=64)["mine"]
    assert found.kl > 0
    assert widget.measured[2, "token", 32, 0, 0].ratio == found.ratio
    said = widget.quality.value
    assert quality.plus_minus(found.ratio, found.ratio_spread) in said
    assert quality.plus_minus(found.kl, found.kl_spread) in said
    assert "on 96 tokens in 3 blocks of 32" in said
    assert "160 of 160 tokens were packed" in said
    widget.residual_length.value = 64
    assert "96 of 160 tokens were packed" in widget.quality.value


def test_going_back_measures_nothing_again_and_says_the_same(widget, measured) -> None:
    first = widget.label.value, widget.image.png, widget.quality.value
    widget.nbits.value = 4
    assert len(measured) == 1
    widget.nbits.value = 8
    widget.nbits.value = 4
    widget.nbits.value = 8
    assert len(measured) == 1
    assert (widget.label.value, widget.image.png, widget.quality.value) == first
    assert set(widget.measured) == {(8, "channel", 32, 0, 0), (4, "channel", 32, 0, 0)}


def test_bytes_and_picture_are_there_before_the_measurement_ends(widget, monkeypatch) -> None:
    seen, real = [], quality.compare

    def watch(*args, **how):
        seen.append((widget.label.value, widget.image.png, widget.quality.value))
        return real(*args, **how)

    monkeypatch.setattr(quality, "compare", watch)
    widget.nbits.value = 4
    ((label, image, said),) = seen
    assert (label, image) == (widget.label.value, widget.image.png)
    assert said.startswith("measuring")
    assert not widget.quality.value.startswith("measuring")


def test_the_error_is_that_of_the_layers_own_keys(model, tokens, widget) -> None:
    cache = model.cache()
    model(tokens, cache)
    k, _ = cache[1].held()
    torch.testing.assert_close(widget.k, k, rtol=0, atol=0)
    for nbits, axis in ((8, "channel"), (2, "channel"), (2, "token")):
        widget.nbits.value, widget.key_axis.value = nbits, axis
        back = Quantizer(nbits, 32, axis).quantize(k).dequantize()
        torch.testing.assert_close(widget.error(), (k - back)[0, 0].abs(), rtol=0, atol=0)
        assert widget.error().max() <= widget.largest * 1.01  # scales are rounded up


def test_sinks_and_newest_tokens_have_no_error(widget) -> None:
    widget.nbits.value, widget.residual_length.value, widget.sink_length.value = 2, 16, 4
    error = widget.error()
    packed = Quantized(2, 32, 16, sink_length=4).quantized_tokens(160)
    assert not error[:4].any()
    assert not error[4 + packed :].any()
    assert error[4 : 4 + packed].any(dim=1).all()


def test_another_head_is_another_picture(model, tokens) -> None:
    first, second = (Quantizing(model, tokens, head=head) for head in (0, 1))
    assert not torch.equal(first.error(), second.error())


def test_a_setting_that_cannot_be_is_one_line_in_place_of_figures(model, tokens, measured) -> None:
    widget = Quantizing(model, tokens, group_size=64)
    with pytest.raises(SizeError) as problem:
        Quantized(8).check_head_dim(32, 32)
    assert widget.label.value == str(problem.value)
    assert widget.quality.value == ""
    assert widget.image.layout.display == "none"
    assert measured == []
    widget.group_size.value = 16
    assert "bits per element" in widget.label.value
    assert widget.image.layout.display is None
    assert "perplexity ratio" in widget.quality.value
    widget.group_size.value = 64
    assert widget.label.value == str(problem.value)
    assert widget.image.layout.display == "none"
    assert widget.quality.value == ""


@pytest.mark.parametrize(("start", "line"), [({"nbits": 3}, "nbits is 2, 4 or 8"), ({"sink_length": -1}, "sink")])
def test_start_values_outside_the_controls_are_answered_by_sizing(model, tokens, start, line) -> None:
    widget = Quantizing(model, tokens, **start)
    assert line in widget.label.value
    assert widget.image.layout.display == "none"


def test_a_head_dim_that_no_group_divides_has_its_line_and_breaks_nothing(tokens) -> None:
    model = models.random(ModelSpec("narrow", 1, 2, 1, 8, 16, 32, 100, 512), prepack=False)
    widget = Quantizing(model, tokens)
    assert "do not divide a head_dim of 8" in widget.label.value
    for control, value in (("nbits", 2), ("group_size", 16), ("key_axis", "token"), ("sink_length", 4)):
        getattr(widget, control).value = value
        assert "do not divide a head_dim of 8" in widget.label.value


@pytest.mark.parametrize(
    ("wrong", "how", "line"),
    [
        (torch.zeros(1, 60, dtype=torch.long), {}, "leaves none of the 60 tokens"),
        (torch.zeros(160, dtype=torch.long), {}, "tokens are int"),
        (torch.zeros(1, 160, dtype=torch.long), {"context": 16}, "too short for chunk=32"),
    ],
)
def test_tokens_that_cannot_be_measured_are_refused_at_once(model, wrong, how, line) -> None:
    with pytest.raises(ValueError, match=line):
        Quantizing(model, wrong, group_size=64, **how)


def test_a_model_with_a_window_keeps_it_and_its_bytes(tokens) -> None:
    model = models.random(ModelSpec("windowed", 1, 2, 1, 16, 16, 32, 100, 512, window=24), prepack=False)
    widget = Quantizing(model, tokens, nbits=4)
    held = sizing.cache_bytes(model.spec, 2000, dtype=Quantized(4, 16, 0, drops=False))
    full = sizing.cache_bytes(model.spec, 2000, dtype=Dense("float16", drops=False))
    assert f"{held / full:.1%} of the full float16 cache" in widget.label.value
    assert "perplexity ratio" in widget.quality.value


def test_a_bfloat16_model_can_be_asked(tokens) -> None:
    widget = Quantizing(models.random(SPEC, torch.bfloat16, prepack=False), tokens, nbits=4, key_axis="token")
    assert widget.k.dtype == torch.float32
    assert "perplexity ratio" in widget.quality.value
