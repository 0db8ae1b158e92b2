"""Lab 04 for teachers."""

from __future__ import annotations

from labkit.course.editions.boards import Board
from labkit.course.editions.teaching import Ask, Picture, Teaching


def draw_groups(board: Board) -> None:
    """Nine query heads, three KV heads."""
    for head in range(9):
        board.box(1 + 2 * head, 6, 1.6, 1, f"q{head}", "query")
        board.arrow(1.8 + 2 * head, 6, 3.8 + 6 * (head // 3), 4.4)
    for head in range(3):
        board.box(2.4 + 6 * head, 3.4, 2.8, 1, f"K{head}, V{head}", "key")
    board.words(1, 2.2, "query head h reads KV head h // 3.   9 = MHA,  3 = GQA,  1 = MQA")
    board.words(1, 1.1, "the same product, with more rows:  [3, 3 * new, head_dim] @ [3, head_dim, kv_len]")


def draw_ranks(board: Board) -> None:
    """Eight KV heads on 4, 8 and 16 GPUs."""
    for row, (ranks, each) in enumerate(((4, 2), (8, 1), (16, 1))):
        y = 5.8 - 2 * row
        board.words(0.2, y + 0.5, f"{ranks} GPUs")
        size = 15.6 / ranks
        for rank in range(ranks):
            first = rank * 8 // ranks
            text = " ".join(str(head) for head in range(first, first + each))
            board.box(3.4 + rank * size, y, size, 1, text, "new" if ranks == 16 and rank % 2 else "key")
    board.words(0.2, 0.7, "with more GPUs than KV heads some are kept twice (orange): nothing more is saved on each")


TEACHING = Teaching(
    aims=(
        "write one function for MHA, GQA and MQA that never expands K or V;",
        "say what grouped heads save (bytes) and what they do not (scores);",
        "say why heads cannot be merged without training, and what a server of eight GPUs makes of eight KV heads.",
    ),
    before="Section 4 runs a ruined model on purpose. Say so, or somebody will look for their mistake.",
    asks=(
        Ask(
            "1",
            "Why does stacking query heads need no copy of K, and repeating K does?",
            "To a matrix product a further query head is more rows against the same keys. Repeating writes the same "
            "keys out again and reads them from there.",
        ),
        Ask(
            "2",
            "`broadcast` has no line that copies. How would you find out that it does?",
            "Count what is made, below the lines you see: matmul makes both sides' batch dimensions equal. That is "
            "why the ledger looks at tensors, not at source.",
        ),
        Ask(
            "3",
            "A model changes from 32 to 8 KV heads. Which of these fall: cache, scores, projection weights?",
            "Cache and the projections of K and V, to a quarter; scores stay, as every query head still meets every "
            "key.",
        ),
        Ask(
            "4",
            "A mean of three vectors with nothing in common: how long is it?",
            "1/sqrt(3), 0.58 of one. It is what the merged rows measure, so the heads' directions are unrelated; and "
            "giving the length back does not unmix them.",
        ),
        Ask(
            "4",
            "Why may perplexity be measured in one pass here, and not for a compressed cache?",
            "The model changed, not the cache: its K and V are the same numbers whether tokens come together or one "
            "by one. A compressed cache would never be read in a single pass.",
        ),
        Ask(
            "5",
            "16 GPUs for a model with 8 KV heads: how much cache does each keep, and all together?",
            "As much as with 8 each, and twice as much together: each KV head is there twice.",
        ),
        Ask(
            "8",
            "Answers match to the last token. How does one find this mistake?",
            "By bytes: what is held beside what the formula says. Values are right, so no test of answers can fail.",
        ),
    ),
    pictures=(
        Picture(
            "1",
            "who reads whom",
            "Draw the KV heads first and let the class connect the query heads. Ask for h // num_queries_per_kv each "
            "time.",
            "Nine query heads in a row, three KV heads below. Query heads 0 to 2 read KV head 0, 3 to 5 read 1, 6 to "
            "8 read 2.",
            draw_groups,
        ),
        Picture(
            "5",
            "KV heads on many GPUs",
            "Fill the rows one after the other. Before the third, ask where the ninth GPU's KV head comes from.",
            "Three rows. Four GPUs keep two KV heads each, eight keep one each, sixteen keep one each, so each head "
            "is there twice.",
            draw_ranks,
        ),
    ),
    trouble=(
        "04.1: query heads are dealt out like cards (h % num_kv_heads). Neighbours share: draw the picture.",
        (
            "04.1: the mask has `new` rows, the stacked scores have 3 * new. Bring the scores back into heads before "
            "the mask."
        ),
        "04.2: a number of KV heads that does not divide the query heads.",
        "04.4: rows are averaged across a head's dimensions. Say which axis is the group.",
        "04.6: K and V are repeated and then appended. Ask what `nbytes` says.",
    ),
)
