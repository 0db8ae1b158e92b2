"""Lab 02 for teachers."""

from __future__ import annotations

from labkit.course.editions.boards import Board
from labkit.course.editions.teaching import Ask, Picture, Teaching


def draw_passes(board: Board) -> None:
    """Tokens run by four passes, without a cache and with one."""
    board.words(1.2, 7.4, "without a cache: 1 + 2 + 3 + 4 = 10")
    board.words(11.2, 7.4, "with one: 4")
    for step in range(4):
        y = 5.6 - 1.4 * step
        board.words(0, y + 0.5, f"{step + 1}", small=True)
        board.cells(1.2, y, [f"t{token}" for token in range(step + 1)], ["new"] * (step + 1), size=1.7)
        board.cells(11.2, y, [f"t{token}" for token in range(step + 1)], ["key"] * step + ["new"], size=1.7)
    board.words(1.2, 0.5, "orange: its K and V are computed in this pass.  blue: they are held")


def draw_chunk(board: Board) -> None:
    """A mask for two new tokens behind three held ones, wrong and right."""
    for x, name, rows in (
        (1, "tril(), from the corner", ("1 0 0 0 0", "1 1 0 0 0")),
        (11, "moved by kv_len - new", ("1 1 1 1 0", "1 1 1 1 1")),
    ):
        board.words(x, 6.8, name)
        for row, seen in enumerate(rows):
            fills = ["key" if mark == "1" else "gone" for mark in seen.split()]
            board.cells(x, 4.8 - row * 1.2, seen.split(), fills, size=1.5)
        board.line([x + 4.5, x + 4.5], [3.3, 6.2], dashed=True)
        board.words(x + 1, 2.8, "held")
        board.words(x + 5.2, 2.8, "new")
    board.words(1, 1.3, "with nothing held both are the same, and with one new token there is no mask:")
    board.words(1, 0.5, "the two cases that every test has")


TEACHING = Teaching(
    aims=(
        "write a cache that grows and one that is allocated once, and say what each costs;",
        "drive a real model with it, and prove by counting that nothing is computed twice;",
        "compute a cache's bytes, and say how much of it the next request may reuse.",
    ),
    before="Section 5 uses the clock: ask everybody to close other programs. On a shared server let one person run it "
    "and show the figure; the counts are the same for all.",
    asks=(
        Ask(
            "1",
            "Sixteen passes. Which quantities grow with the square, and which would with a cache?",
            "Projections, layer by layer: 136 without, 16 with one. Scores stay quadratic with a cache as well; it "
            "takes one power off each.",
        ),
        Ask(
            "2",
            "What would go wrong if all layers shared one cache?",
            "Each layer's K and V come from its own matrices. The second layer would attend over the first one's "
            "keys, and after one pass of one token the cache would hold 30.",
        ),
        Ask(
            "3",
            "Where does the new token stand? Who knows it?",
            "At the number of tokens held before it is appended, and only the cache knows. Asked after the append it "
            "is one too many: the most common mistake here, and the words still look fine.",
        ),
        Ask(
            "4",
            "Eight new tokens after a prompt of five: how many tokens are run, and how many are held at the end?",
            "12 and 12: the prompt gives the first new token by itself, and the last one is returned but never run.",
        ),
        Ask(
            "5",
            "The cached step reads the K and V held. Why does its time hardly grow?",
            "Beside 538 MB of weights they are 9.5 MB at position 206. The step waits for the weights; lab 03 shows "
            "where that turns round.",
        ),
        Ask(
            "6",
            "The growing cache gives the same tokens. Where did the square go?",
            "Into copies: append i moves i tokens, 20,100 for 200. No answer shows it, only the ledger does.",
        ),
        Ask(
            "7",
            "A prompt is exactly what the cache holds. May all of it be reused?",
            "All but one token: the cache holds no logits, so something has to be run.",
        ),
        Ask(
            "9",
            "Their unit tests prefill once and decode one token at a time. Which test would you add?",
            "The same prompt in chunks of any size gives the same answer.",
        ),
    ),
    pictures=(
        Picture(
            "1",
            "what each pass computes",
            "Draw the left half step by step and let the class add it up. Then draw the right one and ask what the "
            "blue cells cost: memory, and reading.",
            "Four passes. On the left, without a cache, pass n computes K and V of n tokens, 10 in all. On the right "
            "each pass computes one token's and holds the others', 4 in all.",
            draw_passes,
        ),
        Picture(
            "9",
            "a triangle that starts in the wrong corner",
            "Let people fill in the left mask by PyTorch's rule, then ask what the first new token may see.",
            "Two masks for two new tokens behind three held. tril() from the corner lets the first new token see one "
            "key; moved by kv_len minus new tokens it sees four.",
            draw_chunk,
        ),
    ),
    trouble=(
        "02.1: a class attribute instead of one on `self`, so that all layers share it. Ask who else sees that list.",
        "02.2: `seq_len` read after the append. Let them write the position down for the second token.",
        "02.3: one token too many or too few. Use the count of the question to section 4.",
        (
            "02.4: the tensors are written before it is known whether all tokens fit. Ask what the caller finds after "
            "the error."
        ),
        "02.7: `is_causal` again. Draw the second picture.",
    ),
)
