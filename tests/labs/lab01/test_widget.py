"""The attention explorer: its controls, its label, and what it does with odd sentences."""

from __future__ import annotations

import html
from dataclasses import replace

import pytest
import torch

from labkit import models
from labkit.labs.lab01.widget import AttentionExplorer, read_sentence
from tests.shapes import TINY


class Words:
    """A tokenizer of one token per word."""

    def __init__(self) -> None:
        self.known: list[str] = []

    def __call__(self, text: str, return_tensors: str = "pt"):
        self.known += [word for word in text.split() if word not in self.known]
        ids = torch.tensor([[self.known.index(word) for word in text.split()]], dtype=torch.long).view(1, -1)
        return type("Encoding", (), {"input_ids": ids})()

    def decode(self, tokens: list[int]) -> str:
        return " ".join(self.known[token] for token in tokens)


@pytest.fixture
def explorer() -> AttentionExplorer:
    model = models.random(replace(TINY, num_layers=3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)  # weights far from uniform, so that layers and heads differ
    return AttentionExplorer(model, Words(), "the cat sat on the mat")


def test_read_sentence_gives_rows_that_sum_to_one_and_see_nothing_later(explorer: AttentionExplorer) -> None:
    words, weights = read_sentence(explorer.model, explorer.tokenizer, "the cat sat", limit=2)
    assert words == ["the", "cat"]
    assert weights.shape == (3, 6, 2, 2)
    # bounded: a softmax over 2 entries in float32 is off by a few rounding errors of 2**-24
    assert torch.allclose(weights.sum(-1), torch.ones(3, 6, 2), atol=1e-6)
    assert (weights[..., 0, 1] == 0).all()


def test_every_control_of_the_explorer_changes_picture_and_label(explorer: AttentionExplorer) -> None:
    seen = {(explorer.label.value, explorer.image.png)}
    for count, (control, value) in enumerate(
        [(explorer.layer, 2), (explorer.head, 3), (explorer.query, 2), (explorer.sentence, "a dog sat on a cat")], 2
    ):
        control.value = value
        seen.add((explorer.label.value, explorer.image.png))
        assert len({label for label, _ in seen}) == len({image for _, image in seen}) == count


def test_the_explorers_label_names_the_largest_weights(explorer: AttentionExplorer) -> None:
    explorer.head.value = 1
    row = explorer.weights[0, 1, 5]
    best = int(row.argmax())
    assert html.unescape(explorer.label.value).startswith(
        f"layer 0, head 1: 5 “mat” gives {row[best]:.0%} to {best} “{explorer.words[best]}”"
    )


def test_the_explorer_shows_markup_as_text(explorer: AttentionExplorer) -> None:
    explorer.sentence.value = "<img> <b>"
    assert "<" not in explorer.label.value


def test_an_empty_sentence_gets_a_message_and_the_next_one_works(explorer: AttentionExplorer) -> None:
    explorer.sentence.value = ""
    assert explorer.label.value == "type a sentence: there is nothing to read"
    explorer.sentence.value = "hello"
    assert "hello" in explorer.label.value


def test_sliders_and_text_wait_until_the_learner_lets_go(explorer: AttentionExplorer) -> None:
    assert not explorer.layer.continuous_update
    assert not explorer.sentence.continuous_update


def test_the_explorer_asks_from_the_word_it_is_given_and_else_from_the_last(explorer: AttentionExplorer) -> None:
    given = AttentionExplorer(explorer.model, explorer.tokenizer, "the cat sat on the mat", query=2)
    assert (given.query.value, explorer.query.value) == (2, 5)
    assert "2 “sat” gives" in html.unescape(given.label.value)
