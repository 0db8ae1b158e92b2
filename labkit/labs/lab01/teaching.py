"""Lab 01 for teachers."""

from __future__ import annotations

from labkit.course.editions.boards import Board
from labkit.course.editions.teaching import Ask, Picture, Teaching


def draw_mask(board: Board) -> None:
    """Two new tokens behind three held ones."""
    board.words(2.2, 7.2, "position")
    for position in range(5):
        board.words(9.45 + 1.9 * position, 7.2, str(position), centred=True)
    rows = (("new token 0, at 3", "1 1 1 1 0"), ("new token 1, at 4", "1 1 1 1 1"))
    for row, (name, seen) in enumerate(rows):
        y = 5 - 1.5 * row
        board.words(2.2, y + 0.5, name)
        board.cells(8.5, y, seen.split(), ["key" if mark == "1" else "gone" for mark in seen.split()], size=1.9)
    board.line([14.2, 14.2], [2.8, 6.6], dashed=True)
    board.words(9.7, 2.3, "held, past = 3")
    board.words(15, 2.3, "new")
    board.words(2.2, 1, "row i stands at past + i and sees the positions 0 to past + i")


def draw_roads(board: Board) -> None:
    """What may flow from token to token, through three layers."""
    for layer in range(3):
        y = 1.2 + 2.2 * layer
        board.words(0.2, y + 0.5, ("embeddings", "layer 0 out", "layer 1 out")[layer])
        for token in range(4):
            board.box(5 + 3.6 * token, y, 1.6, 1, f"t{token}", "new" if token == 3 else "key")
            for source in range(token + 1) if layer else ():
                board.arrow(5.8 + 3.6 * source, y - 1.2, 5.8 + 3.6 * token, y)
    board.words(5, 0.5, "every arrow goes up, or up and to the right: t3 reaches nobody on its left")


TEACHING = Teaching(
    aims=(
        "write attention for several heads, with a mask that knows what came before;",
        "say why keys are kept after they were turned by RoPE, and queries are not kept at all;",
        "give the right reason why K and V of old tokens never change, and name a model where they do.",
    ),
    before="Run the notebook once, so that the model is in the cache folder. Those who never used PyTorch need double "
    "the minutes of the blanks; sit them beside somebody who did.",
    asks=(
        Ask(
            "1",
            "Ben's key is made four times as long, and he knows no more about Mara. What happens, and is it fair?",
            "His score grows fourfold, and with it his weight: a dot product rewards length as well as direction. "
            "Models learn the lengths, so it is a means, not a flaw; lab 07 meets short keys again.",
        ),
        Ask(
            "2",
            "Why the root of head_dim, and not head_dim itself?",
            "Variances of independent terms add up, deviations do not: 64 terms of variance 1 have variance 64 and "
            "deviation 8. Whoever says 64 has taken the variance for the deviation.",
        ),
        Ask(
            "3",
            "A test always starts from an empty cache. Which columns of this mask does it never see?",
            "The first three, those of what is held. From an empty cache rows and columns begin at the same place, "
            "so a mask without the offset passes every such test.",
        ),
        Ask(
            "4",
            "view(heads, tokens, head_dim) gives the right shape. How would you notice that it is wrong?",
            "By content, not by shape: put each token's index into its numbers and look where they went, as the "
            "picture does. No error and no warning come.",
        ),
        Ask(
            "5",
            "Every position is 500 too large. Does the model write worse? And if only the new tokens' are?",
            "Not in the first case, as only differences count (within the trained length). In the second yes: two "
            "counts in one text. Let them say it before the code is run.",
        ),
        Ask(
            "6",
            "Somebody says: K and V stay because embeddings are fixed. Which layer is that true for? Why do the "
            "others stay?",
            "For layer 0. Above it a layer reads hidden states, into which attention has mixed other tokens; they "
            "stay since the mask lets nothing later in. BERT has fixed embeddings as well and cannot keep K and V.",
        ),
        Ask(
            "7",
            "Why is no mask needed for the newest token, and why is its query thrown away?",
            "Nothing comes after it. Its row of the matrix is finished; no later step asks the old question again.",
        ),
    ),
    pictures=(
        Picture(
            "3",
            "a mask with three tokens held",
            "Write the positions first, then the rows. Ask for each cell before you fill it in.",
            "Two rows, for new tokens at positions 3 and 4, and five columns, for positions 0 to 4. The first row "
            "allows 0 to 3, the second 0 to 4. A dashed line parts held from new.",
            draw_mask,
        ),
        Picture(
            "6",
            "roads between tokens",
            "Draw the arrows of one layer and let the class draw the next. Then ask for a way from t3 to t1. There is "
            "none.",
            "Three rows of four tokens: embeddings, the output of layer 0, the output of layer 1. Arrows lead from "
            "each token to itself and to all later ones in the row above, never to an earlier one.",
            draw_roads,
        ),
    ),
    trouble=(
        "01.2: a mask of new_tokens x new_tokens. Point at the second argument, and at the board.",
        "01.3: `view` without `transpose`. Let them print a tensor that holds token indices.",
        "01.4: neighbours are paired instead of halves. The docstring says which dimensions belong together.",
        "01.6: people put a second mask behind the softmax. Ask what a row's weights add up to.",
    ),
)
