"""Lab 07 for teachers."""

from __future__ import annotations

from labkit.course.editions.boards import Board
from labkit.course.editions.teaching import Ask, Picture, Teaching


def draw_window(board: Board) -> None:
    """A budget of eight: a window, and a window with sinks, after 20 tokens."""
    for y, name, kept in (
        (5.2, "window", set(range(12, 20))),
        (2.8, "2 sinks", {0, 1, *range(14, 20)}),
    ):
        board.words(0, y + 0.45, name)
        for token in range(20):
            board.box(3 + 0.82 * token, y, 0.82, 1, str(token), "key" if token in kept else "gone")
    board.words(0, 7.2, "20 tokens seen, budget 8: blue is held, grey is gone for good")
    board.words(
        0, 1.2, "the sinks count: 2 + 6. Without token 0 the model loses its place to look at when it looks for nothing"
    )


def draw_lengths(board: Board) -> None:
    """Tokens seen and tokens held."""
    board.words(0.3, 7.2, "a window of 6 with one sink, after 20 tokens")
    board.words(0.3, 5.4, "slot")
    board.words(0.3, 4.1, "position")
    board.cells(4.5, 4.9, ["0", "1", "2", "3", "4", "5"], size=2)
    board.cells(4.5, 3.6, ["0", "15", "16", "17", "18", "19"], ["key"] * 6, size=2)
    board.words(0.3, 2.2, "tokens held: 6, the physical length; it sizes memory")
    board.words(0.3, 1.1, "tokens seen: 20, the logical length; the next token stands at 20, not at 6")


TEACHING = Teaching(
    aims=(
        "write the policies that decide what is forgotten: a window with sinks, heavy hitters, SnapKV;",
        "say which policy serves which work, and why a question that comes afterwards finds nothing;",
        "keep positions and slots apart: tokens seen, tokens held.",
    ),
    before="The table of section 6 rests on four texts a cell; set LABKIT_PROFILE=full for twelve, and start it before "
    "the break.",
    asks=(
        Ask(
            "1",
            "The first token says nothing. Why is it looked at most?",
            "Softmax weights add up to 1, so a head that finds nothing must put them somewhere. Every query sees the "
            "first token, and its value is short, so looking there changes little.",
        ),
        Ask(
            "2",
            "Which token's loss does the jump in the curve show, and why does it look like a climb?",
            "Token 0's. Each point is a mean over 32 tokens.",
        ),
        Ask(
            "3",
            "Why do a mask and a view free no memory?",
            "A mask keeps every byte and only hides it; a view keeps alive the whole it looks into. What is kept "
            "needs memory of its own.",
        ),
        Ask(
            "4",
            "A sum of attention: who is at a disadvantage?",
            "The newest tokens: token 3 was seen by 297 queries, the newest by one. So they are kept whatever their "
            "score.",
        ),
        Ask(
            "4",
            "Why not simply take the weights from the kernel?",
            "Fused kernels never write them down; one layer's would be 39 GB for 32,768 tokens. They are computed "
            "again, some queries at a time.",
        ),
        Ask(
            "5",
            "Why do only the last queries vote, and why is the score smoothed?",
            "The prompt's end says what is wanted. An answer is seldom one token: smoothing carries a score to its "
            "neighbours.",
        ),
        Ask(
            "6",
            "Random is in the table. What for?",
            "It is the control: a policy no better than it has learnt nothing. H2O finds numbers no better, though it "
            "carries a text on well.",
        ),
        Ask(
            "7",
            "At which position does the next token stand, when 6 are held and 20 were seen?",
            "At 20. Taken for 6 it stands where an old one did, and two tokens share a position.",
        ),
    ),
    pictures=(
        Picture(
            "2",
            "a window, with and without sinks",
            "Let the class cross out what leaves, token by token from the ninth on.",
            "Twenty tokens and a budget of eight. A plain window holds 12 to 19. With two sinks 0, 1 and 14 to 19 are "
            "held.",
            draw_window,
        ),
        Picture(
            "7",
            "seen and held",
            "Write the slots first, then the positions. Ask for the next token's position before you write the last "
            "line.",
            "Six slots, 0 to 5, hold positions 0 and 15 to 19. Six tokens are held, twenty were seen.",
            draw_lengths,
        ),
    ),
    trouble=(
        "07.1: sinks on top of the budget. They are a part of it.",
        "07.2: the kept tokens come in the order of their scores. Sort the places, and take positions along.",
        "07.3: the causal edge of a block of queries: query i sees up to kv_len - n + i.",
        "07.4: infinity is put at slots instead of positions.",
        "07.5: the window's own tokens are scored as well. Look at what the docstring says they get.",
    ),
)
