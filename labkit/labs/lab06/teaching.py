"""Lab 06 for teachers."""

from __future__ import annotations

from labkit.course.editions.boards import Board
from labkit.course.editions.teaching import Ask, Picture, Teaching


def draw_table(board: Board) -> None:
    """From a position to a slot."""
    board.words(0.3, 7.2, "block_size 4, position 6")
    board.words(0.3, 5.6, "block_table")
    board.cells(4.5, 5.1, ["7", "2", "5"], ["", "new", ""], size=1.8)
    board.words(11, 5.6, "6 // 4 = 1: block 2")
    board.words(0.3, 3.1, "memory")
    board.cells(4.5, 2.6, [str(slot) for slot in range(8, 12)], ["", "", "new", ""], size=1.8)
    board.words(4.5, 2.1, "block 2", small=True)
    board.arrow(7.2, 5.1, 9, 3.6)
    board.words(12.4, 3.1, "6 % 4 = 2: its place 2")
    board.words(0.3, 0.9, "slot = block_table[6 // 4] * 4 + 6 % 4 = 2 * 4 + 2 = 10")


def draw_fork(board: Board) -> None:
    """Copy on write: parent and child share until one writes."""
    board.words(0.3, 7.2, "before: both hold blocks 0 and 1")
    board.words(10.8, 7.2, "the child writes token 6")
    for x, child in ((0.3, "1"), (10.8, "2")):
        board.words(x, 5.9, "parent")
        board.cells(x + 2.6, 5.4, ["0", "1"], ["key", "key"], size=1.5)
        board.words(x, 4.3, "child")
        board.cells(x + 2.6, 3.8, ["0", child], ["key", "key" if child == "1" else "new"], size=1.5)
    board.words(0.3, 2.5, "ref_count: block 0 has 2, block 1 has 2")
    board.words(10.8, 2.5, "block 0 has 2, block 1 has 1, block 2 has 1")
    board.words(0.3, 0.9, "copied: block 1 to block 2, in every layer; block 0 is full and nobody writes into it")


TEACHING = Teaching(
    aims=(
        "say what reserving wastes, and what blocks leave;",
        "write an allocator, a table that grows, attention by table, and copy on write;",
        "run a real model's requests on their own blocks, and name the mistakes that mix up two people's words.",
    ),
    before="More than two thirds of the minutes are writing. In a short class leave out the kernel (section 9) and "
    "block sizes (section 10); section 8 needs 3 to 7.",
    asks=(
        Ask(
            "1",
            "Who knows each answer's length in advance has no inner waste. What is left?",
            "Gaps between requests that ended, which fit nobody: outer waste. Pieces of one size have none.",
        ),
        Ask(
            "2",
            "A page fault fetches a page from disk. What is its counterpart here?",
            "None: a kernel cannot stop and wait. A whole request is put out and run again.",
        ),
        Ask(
            "3",
            "Why is `list.remove` forbidden, if it gives the right block?",
            "It looks through the list. An engine does this for each block of each request at every step; constant "
            "time is part of the task.",
        ),
        Ask(
            "4",
            "Three blocks are needed and two are free. What should the table look like when the error has been raised?",
            "As before: nothing taken. Whoever catches the error must be able to go on. Blocks taken halfway belong "
            "to nobody and never come back.",
        ),
        Ask(
            "5",
            "What stands behind a row's last token in its last block?",
            "What somebody else left there. It must not be read: take `lengths`, not the blocks' size.",
        ),
        Ask(
            "6",
            "After a fork, which block must be copied, and when?",
            "The half-full last one, when either side writes. Full blocks are never written again and stay shared.",
        ),
        Ask(
            "7",
            "Why is the key of a block made of everything up to its end, and not of its own 16 tokens?",
            "Its K and V depend on all tokens before. The same 16 tokens behind another beginning have other K and V.",
        ),
        Ask(
            "11",
            "All three reports have right answers most of the time. What would have caught them early?",
            "Invariants, checked after every step: each block is free or held, once; a row without a request points "
            "nowhere; at least one token is always run.",
        ),
    ),
    pictures=(
        Picture(
            "2",
            "from a position to a slot",
            "Do it once with position 6, then let the class do position 9.",
            "A block table 7, 2, 5. Position 6 with blocks of 4 is at index 1, which is block 2, place 2: slot 10.",
            draw_table,
        ),
        Picture(
            "6",
            "copy on write",
            "Draw the left half, then ask what must happen before the child writes, and what the counts are "
            "afterwards.",
            "Before: parent and child hold blocks 0 and 1. The child writes: block 1 is copied to block 2, the child "
            "then holds 0 and 2; block 0 still counts two holders.",
            draw_fork,
        ),
    ),
    trouble=(
        "06.3: a count that goes below zero, or a block that is free twice. Ask what a third drop should do.",
        "06.4: blocks are taken one by one and the fourth is missing. Count first, take afterwards.",
        "06.6: the copy is made although nobody else holds the block. Look at ref_count.",
        "06.7: tokens are compared for one block only, or the salt is forgotten.",
        "06.d1: people mend the symptom (a check for double entries). Ask who calls `finish` twice.",
    ),
)
