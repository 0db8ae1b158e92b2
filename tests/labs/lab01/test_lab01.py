"""What lab 01 shows besides its blanks: the debug exercise's starting point, the explorer, the figures' data."""

import ast
import html
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch

from labkit import models, plots
from labkit.course import editions
from labkit.course.contents import Mistyped
from labkit.course.examine import examine
from labkit.labs.lab01 import CONTENTS, figures
from labkit.labs.lab01.leak import Leak
from labkit.labs.lab01.references import causal_mask
from labkit.labs.lab01.sentence import label, sentence_tokens
from labkit.labs.lab01.widget import AttentionExplorer, read_sentence
from tests.cache.test_recording import SPEC

NOTEBOOK = Path(__file__).resolve().parents[3] / "notebooks" / "01_attention_basics.ipynb"


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
    model = models.random(SPEC)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)  # weights far from uniform, so that layers and heads differ
    return AttentionExplorer(model, Words(), "the cat sat on the mat")


def test_the_debug_blank_in_the_notebook_is_the_bug_that_the_check_knows() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    blank = next(blank for blank in editions.blanks(notebook) if blank.exercise == "01.6")
    stub = editions.definition(notebook.cells[blank.cell].source, "attend")
    assert ast.dump(stub) == ast.dump(ast.parse(Leak.starting_point).body[0])


def test_the_untouched_bug_is_told_what_it_is_and_the_reference_goes_on() -> None:
    names = {"causal_mask": causal_mask, "torch": torch, "math": __import__("math"), "Tensor": torch.Tensor}
    exec(Leak.starting_point, names)
    verdict = examine(Leak(), names["attend"])
    assert verdict.status == "not yet"
    assert verdict.finding.diagnosis == "mask-after-softmax"


def test_read_sentence_gives_rows_that_sum_to_one_and_see_nothing_later(explorer: AttentionExplorer) -> None:
    words, weights = read_sentence(explorer.model, explorer.tokenizer, "the cat sat", limit=2)
    assert words == ["the", "cat"]
    assert weights.shape == (3, 6, 2, 2)
    # bounded: a softmax over 2 entries in float32 is off by a few rounding errors of 2**-24
    assert torch.allclose(weights.sum(-1), torch.ones(3, 6, 2), atol=1e-6)
    assert (weights[..., 0, 1] == 0).all()


def test_every_control_of_the_explorer_changes_picture_and_label(explorer: AttentionExplorer) -> None:
    seen = {(explorer.label.value, explorer.image.value)}
    for count, (control, value) in enumerate(
        [(explorer.layer, 2), (explorer.head, 3), (explorer.query, 2), (explorer.sentence, "a dog sat on a cat")], 2
    ):
        control.value = value
        seen.add((explorer.label.value, explorer.image.value))
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


def test_the_mask_figure_colours_what_may_be_seen() -> None:
    shape = figures.permissions(causal_mask(2, 3), past=3)
    colors = [plt.matplotlib.colors.to_hex(patch.get_facecolor()) for patch in shape.axes[0].patches]
    assert [color.upper() == plots.COLORS["key"] for color in colors] == causal_mask(2, 3).flatten().tolist()
    plt.close(shape)


def test_the_head_figure_writes_each_numbers_token() -> None:
    right = torch.arange(4).view(1, 4, 1).expand(3, 4, 2)
    shape = figures.heads_in_memory(4, 3, 2, right, right)
    assert [text.get_text() for text in shape.axes[0].texts] == list("012301230123") * 2
    plt.close(shape)


def test_the_key_figure_shows_layers_and_values() -> None:
    shape = figures.key_change({"mask on": [0.0, 1e-7], "mask off": [0.0, 0.5]})
    lines = {line.get_label(): line.get_ydata() for line in shape.axes[0].lines}
    assert list(lines["mask off"]) == [1e-9, 0.5]
    assert list(lines["mask on"]) == [1e-9, 1e-7]
    plt.close(shape)


def test_the_minutes_of_the_blanks_fit_the_lab() -> None:
    assert sum(exercise.minutes for exercise in CONTENTS.exercises) <= 25


class Letters:
    """A tokenizer of one token per character."""

    def __call__(self, text: str, return_tensors: str = "pt"):
        return type("Encoding", (), {"input_ids": torch.tensor([[ord(c) for c in text]], dtype=torch.long)})()

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))


@pytest.mark.parametrize("text", ["", "a", "two"])
def test_a_sentence_that_is_too_short_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(Mistyped, match=f"too short, {len(text)} of at least 4 tokens: type a longer one"):
        sentence_tokens(Letters(), text)


def test_a_long_sentence_is_cut_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence_tokens(Letters(), "abcd" * 8).tolist() == [[ord(c) for c in "abcd" * 8]]
    assert capsys.readouterr().out == ""
    assert sentence_tokens(Letters(), "x" * 3_000).shape == (1, 32)
    assert capsys.readouterr().out == "This sentence has 3000 tokens; only the first 32 are read.\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" warm", "warm"),
        ("é", "é"),
        ("\n", "\\n"),
        ("  ", "␣␣"),
        ("", "#7"),
        ("茶", "#7"),
        ("\ufffd", "#7"),
        ("$$", "#7"),
        ("internationalisation", "international…"),
    ],
)
def test_a_label_is_text_that_a_figure_can_write(text: str, shown: str) -> None:
    assert label(text, 7) == shown


def test_the_explorer_asks_from_the_word_it_is_given_and_else_from_the_last(explorer: AttentionExplorer) -> None:
    given = AttentionExplorer(explorer.model, explorer.tokenizer, "the cat sat on the mat", query=2)
    assert (given.query.value, explorer.query.value) == (2, 5)
    assert "2 “sat” gives" in html.unescape(given.label.value)
