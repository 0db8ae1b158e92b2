"""Lab 05 for teachers."""

from __future__ import annotations

from labkit.course.editions.boards import Board
from labkit.course.editions.teaching import Ask, Picture, Teaching


def draw_levels(board: Board) -> None:
    """Four levels for a group, with and without an outlier."""
    for y, name, ends, points in (
        (5.6, "a group", ("-1", "1"), (3, 6.5, 8.2, 10.4, 14)),
        (2.4, "with a 20", ("-1", "20"), (3, 3.3, 3.6, 3.9, 14)),
    ):
        board.words(0.1, y, name)
        board.line([3, 14], [y, y])
        for level in range(4):
            x = 3 + level * 11 / 3
            board.line([x, x], [y - 0.45, y + 0.45])
            board.words(x, y - 0.95, f"{level}", centred=True, small=True)
        board.words(3, y + 0.95, ends[0], centred=True)
        board.words(14, y + 0.95, ends[1], centred=True)
        for x in points:
            board.box(x - 0.12, y - 0.12, 0.24, 0.24, "", "new")
    board.words(15, 5.6, "scale = 2 / 3")
    board.words(15, 2.4, "scale = 7")
    board.words(0.1, 0.4, "2 bits, four levels: one large number moves them all, and its neighbours become one code")


def draw_axes(board: Board) -> None:
    """Groups of keys down the channels, of values along the tokens."""
    for x, name, fill, down in ((1, "keys: per channel", "key", True), (11, "values: per token", "value", False)):
        board.words(x, 7.4, name)
        for row in range(4):
            for column in range(4):
                mine = column == 2 if down else row == 1
                board.box(x + 1.6 * column, 5.4 - 1.2 * row, 1.6, 1.2, "", fill if mine else "")
        board.words(x + 6.8, 4.2, "tokens\ndown", small=True)
        board.words(x, 1.2, "channels across", small=True)
    board.words(1, 0.4, "coloured: one group, with one scale and one zero point")


TEACHING = Teaching(
    aims=(
        "turn numbers into codes, a scale and a zero point, and give the error and the bits, everything counted;",
        "say along which axis groups of keys and of values lie, and how they know;",
        "judge a compressed cache by what the model says, measured in parts and not in one pass.",
    ),
    before="Section 4 is the longest blank of the course (12 minutes). Plan a break behind it.",
    asks=(
        Ask(
            "1",
            "Sixteen levels: how many steps lie between the least and the greatest? And of a group of equal numbers?",
            "Fifteen; with 16 the greatest number cannot be written. Of equal numbers the scale would be 0: take any "
            "other, the codes are 0 and the zero point says it all.",
        ),
        Ask(
            "2",
            "Codes of 4 bits in a tensor of whole numbers. What is saved?",
            "Half of float16, not three quarters: a whole number takes a byte at least. Two codes have to share it.",
        ),
        Ask(
            "2",
            "2 bits in groups of 32. How many bits does a number really take?",
            "3: a scale and a zero point of 16 bits for every 32 codes are one bit more each.",
        ),
        Ask(
            "3",
            "Some channels of K are large in every token. Which way must a group lie so that they harm nobody?",
            "Down the channel: each large channel then has its own scale, and its constant part goes into the zero "
            "point.",
        ),
        Ask(
            "4",
            "Why must tokens wait before keys are quantized per channel?",
            "A group is 32 tokens of one channel; until it is complete its least and greatest are not known. "
            "Quantizing again when more come adds an error each time.",
        ),
        Ask(
            "5",
            "Values per channel have the smaller error. Would you ship them?",
            "No: the first token's short value shares its scales with 31 long ones and is read more than all the "
            "others. The model gets far worse. An error counts all tokens alike, attention does not.",
        ),
        Ask(
            "10",
            "An error of exactly zero at 2 bits. What is the first thing you look at?",
            "The bytes. 34 bits a number say that the zero point was the number itself: groups of one token.",
        ),
    ),
    pictures=(
        Picture(
            "1",
            "an outlier spoils its group",
            "Place five points, draw the levels, let the class give the codes. Then move one point to 20 and do it "
            "again.",
            "Two number lines with four levels. In the first, from -1 to 1, points get different codes. In the "
            "second, from -1 to 20, all but the outlier get code 0.",
            draw_levels,
        ),
        Picture(
            "3",
            "which way groups lie",
            "Colour one group in each table. Ask where a channel that is always large does harm.",
            "Two tables, tokens down and channels across. For keys a column is one group, for values a row is.",
            draw_axes,
        ),
    ),
    trouble=(
        "05.1: 2**nbits steps, or a division by zero for equal numbers.",
        "05.3: `quantize` takes the last dimension. For keys transpose, cut, quantize, and undo both in reverse order.",
        (
            "05.5: what comes in one piece of a thousand must end as what comes one by one. Let them try 150 tokens "
            "both ways."
        ),
        "05.5: groups cut from the end instead of the beginning. Token 0 belongs to the first group.",
        "05.7: ask for the bits per number before anything else.",
    ),
)
