"""How a cache fills: a widget for a generation, step by step."""

from __future__ import annotations

import html
from collections.abc import Sequence

import ipywidgets

from labkit.labs.lab02 import figures
from labkit.widgets import picture, wide


class CacheStepper(ipywidgets.VBox):
    """Step through a generation and see the cache fill: a slider for the step, one for the layers that have run.

    words: the sequence whose K and V end up in the cache, one per token, of which prefill runs the first `prompt`.
    bytes_per_token: of one layer.
    """

    def __init__(self, words: Sequence[str], prompt: int, num_layers: int, bytes_per_token: int, step: int = 0) -> None:
        self.words, self.prompt, self.num_layers, self.bytes_per_token = words, prompt, num_layers, bytes_per_token
        self.step = ipywidgets.IntSlider(
            step, 0, len(words) - prompt, description="step", continuous_update=False, **wide()
        )
        self.layer = ipywidgets.IntSlider(
            num_layers, 0, num_layers, description="layers run", continuous_update=False, **wide()
        )
        self.label = ipywidgets.HTML().add_class("labkit-label")
        self.image = picture("cache-stepper-image")
        super().__init__([self.step, self.layer, self.label, self.image])
        self.add_class("cache-stepper")
        self.draw()
        for control in (self.step, self.layer):
            control.observe(self.draw, "value")

    def held(self) -> tuple[int, int]:
        """Tokens held before the step, and tokens that the step runs."""
        return (0, self.prompt) if self.step.value == 0 else (self.prompt + self.step.value - 1, 1)

    def nbytes(self) -> int:
        """Bytes held at the moment shown."""
        before, new = self.held()
        return (before * self.num_layers + new * self.layer.value) * self.bytes_per_token

    def draw(self, change: object = None) -> None:
        """Bring picture and label up to date."""
        before, new = self.held()
        self.image.show(figures.cache_fill(self.words, self.prompt, self.num_layers, self.step.value, self.layer.value))
        what = f"prefill of {new} tokens" if self.step.value == 0 else f"“{html.escape(self.words[before])}”"
        self.label.value = (
            f"step {self.step.value}: {what}; {self.layer.value} of {self.num_layers} layers have appended; "
            f"{self.nbytes():,} bytes held"
        )
