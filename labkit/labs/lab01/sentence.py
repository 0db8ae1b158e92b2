"""A learner's own sentence: tokens within bounds, and a short label for each that a figure can show."""

from __future__ import annotations

from functools import cache

from matplotlib.font_manager import findfont, get_font
from torch import Tensor

from labkit.course.contents import Mistyped

LEAST, MOST = 4, 32  # tokens: fewer have no pattern to see, more leave no room for their labels
LONGEST = 14  # characters of a label


def sentence_tokens(tokenizer, sentence: str) -> Tensor:
    """The tokens of `sentence`, `[1, tokens]`, at most 32; says so when it cuts. Raises Mistyped below 4 tokens."""
    tokens = tokenizer(sentence, return_tensors="pt").input_ids
    count = tokens.shape[1]
    if count < LEAST:
        raise Mistyped(f"This sentence is too short, {count} of at least {LEAST} tokens: type a longer one.")
    if count > MOST:
        print(f"This sentence has {count} tokens; only the first {MOST} are read.")
    return tokens[:, :MOST]


def labels(tokenizer, tokens: Tensor) -> list[str]:
    """A label for each token of `[1, tokens]`: its text without spaces around, or #id where figures cannot write it."""
    return [label(tokenizer.decode([token]), token) for token in tokens[0].tolist()]


def label(text: str, token: int) -> str:
    """The label of one token; a token of white space alone is shown by its escapes."""
    short = text.strip() or text.replace(" ", "␣").encode("unicode_escape").decode().replace("\\u2423", "␣")
    if not short or short.count("$") > 1 or not all(map(drawable, short)):
        return f"#{token}"
    return short if len(short) <= LONGEST else short[: LONGEST - 1] + "…"


@cache
def drawable(character: str) -> bool:
    """Whether the figures' font has this character; a byte that is no character by itself (U+FFFD) is none."""
    return character.isprintable() and character != "\ufffd" and bool(font().get_char_index(ord(character)))


@cache
def font():
    """The font of matplotlib's figures."""
    return get_font(findfont("DejaVu Sans"))
