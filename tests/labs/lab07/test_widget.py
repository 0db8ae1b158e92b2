"""The widget of lab 07 shows the chosen policy at the chosen token."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest

from labkit.labs.lab07.timeline import Timeline
from labkit.labs.lab07.widget import Forgetting

WORDS = ("The", " sea", "\n", " was", " $5", " calm")


def line(policy: str, answer: str, drop: int) -> Timeline:
    held = []
    for moment in range(len(WORDS)):
        row = [1.0 if place <= moment else 0.0 for place in range(len(WORDS))]
        if moment > 3:
            row[drop] = 0.0
        held.append(tuple(row))
    return Timeline(policy, 4, WORDS, tuple(held), answer)


@pytest.fixture
def widget() -> Forgetting:
    return Forgetting([line("window", " <b>blue</b>", 0), line("TOVA", " grey", 2)])


@pytest.fixture(autouse=True)
def closed():
    yield
    assert plt.get_fignums() == []  # the widget closes what it draws


def test_it_begins_at_the_last_token_of_the_first_policy(widget: Forgetting) -> None:
    assert widget.moment.value == 5
    assert widget.label.value.startswith("6 tokens seen, 4 held by each KV head; 1 held by none.")
    assert "&lt;b&gt;blue&lt;/b&gt;" in widget.label.value


def test_another_policy_and_another_token_change_picture_and_words(widget: Forgetting) -> None:
    seen = {widget.image.png}
    widget.policy.value = "TOVA"
    assert "grey" in widget.label.value
    seen.add(widget.image.png)
    widget.moment.value = 2
    assert widget.label.value.startswith("3 tokens seen, 3 held by each KV head; 0 held by none.")
    seen.add(widget.image.png)
    assert len(seen) == 3
