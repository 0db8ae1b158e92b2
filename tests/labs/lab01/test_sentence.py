"""A learner's own sentence: tokens within bounds, labels that figures can write."""

from __future__ import annotations

import pytest
import torch

from labkit.course.contents import Mistyped
from labkit.labs.lab01.sentence import label, sentence_tokens


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
