"""Lab 03 for teachers."""

from __future__ import annotations

from labkit.course.editions.boards import Board
from labkit.course.editions.teaching import Ask, Picture, Teaching


def draw_gpu(board: Board) -> None:
    """What fills an 80 GB GPU."""
    board.words(0.5, 7.2, "an 80 GB GPU: 79.1 GiB are found there")
    parts = ((3.6, "weights\n14.2", "value"), (2.4, "reserve\n9.7", "gone"), (13.1, "K and V: 55.2 GiB", "key"))
    x = 0.5
    for wide, text, fill in parts:
        board.box(x, 4.2, wide, 2, text, fill)
        x += wide
    board.cells(6.5, 2.4, ["8K", "8K", "8K", "...", "8K"], ["key"] * 5, size=2)
    board.words(17, 2.9, "126 fit")
    board.words(0.5, 2.9, "one request: 0.44 GiB")
    board.words(0.5, 0.9, "floor((79.1 - 14.2) x 0.85 / 0.4375) = 126: state the rule with the number")


def draw_roofline(board: Board) -> None:
    """The roof, and where decode and prefill stand under it."""
    board.arrow(2, 1, 2, 7.4)
    board.arrow(2, 1, 18.5, 1)
    board.line([2, 11], [1.2, 6])
    board.line([11, 18], [6, 6])
    board.line([11, 11], [1, 6], dashed=True)
    board.words(0.2, 7.7, "operations per second")
    board.words(10.8, 0.4, "operations per byte", small=True)
    board.words(11.2, 1.6, "ridge: 295 on an H100", small=True)
    board.words(4.5, 5.4, "memory decides")
    board.words(13, 6.6, "arithmetic decides")
    for x, y, text in (
        (3.1, 1.8, "decode, one user: 1"),
        (6.5, 3.6, "decode, 32 users: 32"),
        (14.5, 5.5, "a long prefill"),
    ):
        board.box(x - 0.15, y - 0.15, 0.3, 0.3, "", "new")
        board.words(x + 0.5, y - 0.3, text, small=True)


TEACHING = Teaching(
    aims=(
        "compute a cache's and a model's bytes, layer by layer, and say the unit;",
        "say how many users fit on a GPU, by which rule, and what breaks first;",
        "read a roofline: why decode waits for memory, and where batching stops helping.",
    ),
    before="Nothing here needs the model but a few live checks. Calculators and paper help: the guesses are meant to "
    "be worked out by hand.",
    asks=(
        Ask(
            "1",
            "Llama 3.1 70B has 64 query heads. Where do they stand in the formula?",
            "Nowhere: only KV heads are stored. 2 x 80 layers x 8 x 128 x 2 bytes are 327,680.",
        ),
        Ask(
            "1",
            "A figure says 40 GB. Which two sizes could that be, and how far apart are they?",
            "40 x 10^9, or 40 x 2^30 = 42.9 x 10^9 bytes: 2.9 GB, nine thousand tokens of that model.",
        ),
        Ask(
            "2",
            "Its name says 7B. Why are there 7.6 thousand million weights?",
            "Embedding and output head: a vocabulary of 152,064 times 3,584, twice. Names are rounded as sellers like.",
        ),
        Ask(
            "3",
            "Two planners give 504 and 593 requests for one GPU. Who is wrong?",
            "Neither need be: one keeps 15% free, one nothing. A capacity without its rule says little.",
        ),
        Ask(
            "4",
            "32 users take twice the time of one. What do they share, and what not?",
            "The weights are read once for all; K and V are each user's own. That is why servers batch, and why it "
            "ends.",
        ),
        Ask(
            "5",
            "Can a batch large enough bring decode over the ridge at 8K tokens each?",
            "No. Each user adds operations and bytes, so the intensity goes to their ratio, 37 there; the ridge is at "
            "295.",
        ),
        Ask(
            "7",
            "Cached input costs a tenth. Why is the bill not a tenth?",
            "Answers are not cheaper, and what is new must be paid in full. Sent-again tokens grow with the square of "
            "the calls, so the tenth is the limit of long conversations.",
        ),
        Ask(
            "12",
            "Before the table comes: what would you check first, and why in that order?",
            "Trained length, weights, cache, time: what is hardest to mend first. Nobody rents a larger GPU against a "
            "length that the model was not trained for.",
        ),
    ),
    pictures=(
        Picture(
            "3",
            "what fills a GPU",
            "Take the weights off first, then the share that is kept free, and only then divide.",
            "A bar of 79.1 GiB: 14.2 of weights, 9.7 in reserve, 55.2 for K and V, which hold 126 requests of 8K "
            "tokens.",
            draw_gpu,
        ),
        Picture(
            "5",
            "the roofline",
            "Draw the axes and the roof without any point. Let the class place decode of one user, then of 32, then a "
            "long prompt.",
            "A roof: slanted where memory decides, flat where arithmetic does, the ridge at 295 operations per byte. "
            "Decode of one user stands at 1, of 32 users at 32, a long prefill under the flat part.",
            draw_roofline,
        ),
    ),
    trouble=(
        (
            "03.1: one window for all layers, or a window that holds more than there is. Two tokens in a window of "
            "four are two."
        ),
        (
            "03.2: the norm at the end, the biases, or the tied head is missing. Compare with the lab model's count, "
            "which is printed."
        ),
        "03.3: the reserve taken of the whole memory. It is a share of what the weights leave.",
        "03.6: an answer is billed twice in one call. Use the diagram of calls in the text.",
        "03.7: num_heads // num_kv_heads is the size of a group, not the number of groups.",
    ),
)
