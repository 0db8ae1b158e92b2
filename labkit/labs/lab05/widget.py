"""What a quantized cache saves and what it costs: a widget for the ways to quantize one model's cache."""

from __future__ import annotations

import html
from typing import Any

import ipywidgets
import torch
from torch import Tensor

from labkit import quality, sizing
from labkit.cache import Cache, QuantizedCache
from labkit.labs.lab05 import figures
from labkit.llama import Llama
from labkit.quality import Quality
from labkit.sizing import Quantized, SizeError
from labkit.widgets import choice, picture, wide, with_value

NBITS = [8, 4, 2]
KEY_AXES = ["channel", "token"]
GROUP_SIZES = [16, 32, 64]
RESIDUAL_LENGTHS = [0, 16, 32, 64]
SINK_LENGTHS = [0, 4]
LONG = 2000  # tokens at which the cache's whole size is said

Setting = tuple[int, str, int, int, int]
"""nbits, key_axis, group_size, residual_length, sink_length."""


class Quantizing(ipywidgets.VBox):
    """A way to quantize the cache: its bytes, the error of one head's keys, and the perplexity ratio, measured.

    tokens: int `[1, seq_len]`, one text; the first `context` are not scored, the others in passes of `chunk`. layer,
    head: whose keys the picture shows. The rest is what the controls start with; group_size: the largest that divides
    head_dim unless said. What was measured once is kept in `measured`, by setting. Raises ValueError for tokens that
    `quality.compare` refuses.
    """

    def __init__(
        self,
        model: Llama,
        tokens: Tensor,
        *,
        layer: int = 0,
        head: int = 0,
        nbits: int = 8,
        key_axis: str = "channel",
        group_size: int | None = None,
        residual_length: int = 0,
        sink_length: int = 0,
        context: int = 64,
        chunk: int = 32,
    ) -> None:
        quality.check_tokens(tokens)
        quality.check_passes(tokens.shape[1], chunk, context)
        self.model, self.tokens, self.layer, self.head = model, tokens, layer, head
        self.context, self.chunk = context, chunk
        self.k, self.v = keys_and_values(model, tokens, layer)
        # The most that 2 bits can be wrong by: one scale of colours for all settings.
        self.largest = (self.k[0, head].max() - self.k[0, head].min()).item() / 6
        self.measured: dict[Setting, Quality] = {}
        sizes = [size for size in GROUP_SIZES if model.spec.head_dim % size == 0] or GROUP_SIZES
        self.nbits = steps("bits", NBITS, nbits)
        self.key_axis = choice("keys per", KEY_AXES, key_axis)
        self.group_size = steps("group size", sizes, group_size or sizes[-1])
        self.residual_length = steps("residual", RESIDUAL_LENGTHS, residual_length)
        self.sink_length = steps("sinks", SINK_LENGTHS, sink_length)
        self.label = ipywidgets.HTML().add_class("labkit-label")
        self.image = picture("quantizing-image")
        self.quality = ipywidgets.HTML().add_class("quantizing-quality")
        self.controls = [self.nbits, self.key_axis, self.group_size, self.residual_length, self.sink_length]
        super().__init__([*self.controls, self.label, self.image, self.quality])
        self.add_class("quantizing")
        self.draw()
        for control in self.controls:
            control.observe(self.draw, "value")

    @property
    def setting(self) -> Setting:
        """What the controls say."""
        nbits, key_axis, group_size, residual_length, sink_length = (control.value for control in self.controls)
        return nbits, key_axis, group_size, residual_length, sink_length

    def options(self) -> dict[str, Any]:
        """The setting as the options of a `QuantizedCache`."""
        names = ("nbits", "key_axis", "group_size", "residual_length", "sink_length")
        return dict(zip(names, self.setting, strict=True))

    def draw(self, change: object = None) -> None:
        """Bring text and picture up to date; a setting that cannot be is one line in place of all figures."""
        try:
            kept = Quantized(**self.options(), drops=False)  # labkit's caches keep what has left a window
            lines = self.summary(kept)
            error = self.error()
        except SizeError as problem:
            self.label.value, self.quality.value = html.escape(str(problem)), ""
            self.image.layout.display = "none"
            return
        self.label.value = "<br>".join(html.escape(line) for line in lines)
        title = f"|K − K̂|, layer {self.layer}, KV head {self.head}: int{kept.nbits} per {kept.key_axis}"
        self.image.show(figures.error_maps({title: error}, largest=self.largest))
        self.image.layout.display = None
        if self.setting not in self.measured:
            self.quality.value = "measuring the perplexity …"  # sent at once: the measurement takes seconds
        self.quality.value = "<br>".join(html.escape(line) for line in verdict(self.measure(), kept, self.tokens))

    def summary(self, kept: Quantized) -> list[str]:
        """The memory that a way to quantize takes, in two lines."""
        spec, full = self.model.spec, sizing.Dense("float16", drops=False)
        per_token = float(sizing.bytes_per_token(spec, kept))
        nbits = float(kept.bits_per_element)
        long, dense = (sizing.cache_bytes(spec, LONG, dtype=format) for format in (kept, full))
        return [
            f"{per_token:,.10g} bytes per token in the long run · {nbits:.4g} bits per element, "
            f"{nbits - kept.nbits:.4g} of them scales and zero points",
            f"{long / 1e6:,.2f} MB at {LONG:,} tokens: {long / dense:.1%} of the full float16 cache, "
            f"{dense / 1e6:,.2f} MB",
        ]

    def error(self) -> Tensor:
        """|K - K^| of the head shown, float32 `[tokens, head_dim]`: K^ is what a cache gives back."""
        layer = QuantizedCache(**self.options())
        layer.append(self.k, self.v)
        held = layer.held()
        assert held is not None
        return (self.k - held[0])[0, self.head].abs()

    def measure(self) -> Quality:
        """The setting's quality beside the full cache's; measured once."""
        if self.setting not in self.measured:
            spec, options = self.model.spec, self.options()
            found = quality.compare(
                self.model,
                self.tokens,
                {"quantized": lambda: Cache.quantized(spec.num_layers, window=spec.window, **options)},
                chunk=self.chunk,
                context=self.context,
            )
            self.measured[self.setting] = found["quantized"]
        return self.measured[self.setting]


def verdict(found: Quality, kept: Quantized, tokens: Tensor) -> list[str]:
    """A measured quality, its sample, and how much of the text was packed at all, in two lines."""
    seq_len = tokens.shape[1]
    return [
        f"perplexity ratio to the full cache: {quality.plus_minus(found.ratio, found.ratio_spread)} "
        f"(± one standard error) on {found.tokens:,} tokens in {found.blocks} blocks of {quality.BLOCK}",
        f"KL {quality.plus_minus(found.kl, found.kl_spread)} nats per token · at the end of the text "
        f"{kept.quantized_tokens(seq_len):,} of {seq_len:,} tokens were packed",
    ]


def keys_and_values(model: Llama, tokens: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """One layer's K and V of a text, float32 `[1, num_kv_heads, seq_len, head_dim]`."""
    cache = model.cache()
    with torch.no_grad():
        model(tokens.to(model.device), cache, last_only=True)
    held = cache[layer].held()
    assert held is not None
    return held[0].float(), held[1].float()


def steps(description: str, options: list[int], value: int) -> ipywidgets.SelectionSlider:
    """A slider over some numbers, and `value` behind them if it is none of them."""
    return ipywidgets.SelectionSlider(
        options=with_value(options, value), value=value, description=description, continuous_update=False, **wide()
    )
