"""A timeline of the cache: token by token, what each policy holds, what it lets go, and what the answer becomes."""

from __future__ import annotations

import html
from collections.abc import Sequence

import ipywidgets

from labkit.labs.lab07 import figures
from labkit.labs.lab07.timeline import Timeline
from labkit.widgets import picture, wide


class Forgetting(ipywidgets.VBox):
    """Choose a policy, and scrub through the text. All `lines` are of one text."""

    def __init__(self, lines: Sequence[Timeline], moment: int | None = None) -> None:
        self.lines = {line.policy: line for line in lines}
        last = len(lines[0].words) - 1
        self.policy = ipywidgets.Dropdown(options=list(self.lines), description="policy", **wide())
        self.moment = ipywidgets.IntSlider(
            last if moment is None else moment, 0, last, description="token", continuous_update=False, **wide()
        )
        self.label = ipywidgets.HTML().add_class("labkit-label")
        self.image = picture("forgetting-image")
        super().__init__([self.policy, self.moment, self.label, self.image])
        self.draw()
        for control in (self.policy, self.moment):
            control.observe(self.draw, "value")

    def draw(self, change: object = None) -> None:
        """Bring picture and label up to date."""
        line, moment = self.lines[self.policy.value], self.moment.value
        self.image.show(figures.moment_of(line, moment))
        gone = sum(share < 1e-6 for share in line.held[moment][: moment + 1])
        self.label.value = (
            f"{moment + 1} tokens seen, {min(moment + 1, line.budget)} held by each KV head; {gone} held by none. "
            f"The answer, after the whole text: {html.escape(line.answer.strip())!r}"
        )
