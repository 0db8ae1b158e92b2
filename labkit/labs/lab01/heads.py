"""01.3 and 01.3b: heads split and merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

from torch import Tensor

from labkit.course.checks.suspects import Suspect
from labkit.course.checks.tensors import draw
from labkit.course.checks.trials import Case, compare
from labkit.course.exercise import Exercise, NotYet
from labkit.labs.lab01.references import merge_heads, split_heads


class Split(Exercise):
    """From one vector per token to one per token and head."""

    id = "01.3"
    title = "Split into heads"
    minutes = 2
    hints = (
        "Cut first, move second: which dimension is cut into heads, and where must the heads stand afterwards?",
        "Cut the last dimension in two, [batch, tokens, num_heads, head_dim], then swap tokens and heads.",
        "x.view(batch, tokens, num_heads, -1) and then .transpose(1, 2)",
    )
    hints_for: ClassVar = {
        "interleaved": "Which dimensions does the docstring give to head 0: the first ones, or every num_heads-th?",
        "mixed-tokens": "view() only relabels. In memory, which numbers lie together: a head's or a token's?",
    }
    why = (
        "view cuts each token's vector into heads where it lies, and transpose puts heads before tokens: no number "
        "moves in memory."
    )
    reference = staticmethod(split_heads)

    def examine(self, answer: Callable) -> None:
        """Sizes of every kind; numbers only move, so they come back to the bit."""
        cases = [Case((draw(*shape), num_heads)) for *shape, num_heads in SHAPES]
        with saying_why_view_refuses(self, "cut first and transpose afterwards"):
            compare(type(self), answer, split_heads, cases, suspects=cuts, what="the result", exact=True)


class Merge(Exercise):
    """From one vector per token and head back to one per token."""

    id = "01.3b"
    title = "Merge the heads"
    minutes = 1
    needs = ("01.3",)
    hints = (
        "Undo split_heads step by step, the last step first.",
        "Swap heads and tokens back, then join the last two dimensions into one.",
        "x.transpose(1, 2) is no longer in memory order: reshape(batch, tokens, -1) copies it into order, view cannot.",
    )
    hints_for: ClassVar = {
        "view-of-a-transpose": "transpose moved no number, only labels. Which method copies where labels will not do?",
    }
    why = "transpose puts each token's heads side by side again; reshape copies, since in memory they are apart."
    reference = staticmethod(merge_heads)

    def examine(self, answer: Callable) -> None:
        """The same sizes, backwards."""
        cases = [Case((split_heads(draw(*shape), num_heads).contiguous(),)) for *shape, num_heads in SHAPES]
        with saying_why_view_refuses(self, "reshape() or flatten(), which copy where they must"):
            compare(type(self), answer, merge_heads, cases, suspects=joins, what="the result", exact=True)


# batch, tokens, num_heads * head_dim; num_heads. Pairwise distinct, then one of each, then equal ones, then many.
SHAPES = ((2, 5, 18, 3), (3, 7, 20, 2), (2, 1, 12, 4), (1, 6, 5, 1), (4, 3, 6, 6), (4, 4, 16, 4), (1, 300, 520, 260))


@contextmanager
def saying_why_view_refuses(exercise: Exercise, otherwise: str) -> Iterator[None]:
    """What PyTorch says about strides, in words. otherwise: the way out."""
    try:
        yield
    except NotYet as not_yet:
        found = not_yet.finding
        if found.diagnosis == "raised" and "view size is not compatible" in found.seen:
            exercise.fail(
                "view-of-a-transpose",
                seen="view() refused: the tensor's numbers are not in memory order",
                cause="transpose only changes labels; view needs numbers in a row",
                look=otherwise,
            )
        raise


def cuts(x: Tensor, num_heads: int) -> list[Suspect]:
    """Wrong ways to cut."""
    batch, tokens, size = x.shape
    head_dim = size // num_heads
    cut = x.reshape(batch, tokens, num_heads, head_dim)
    other = x.reshape(batch, tokens, head_dim, num_heads)
    return [
        Suspect("mixed-tokens", [cut.reshape(batch, num_heads, tokens, head_dim)],
                "view straight to the final shape: it relabels in memory order, where a token's heads lie together",
                "cut the last dimension first, then swap tokens and heads with transpose",
                "the shape is right, but head 0 holds slices of all heads of the first tokens"),
        Suspect("swapped-before-cut", [x.transpose(1, 2).reshape(batch, num_heads, tokens, head_dim)],
                "tokens and dimensions were swapped first, and reshape then cut across both",
                "cut the last dimension first, then swap tokens and heads",
                "a row of head 0 holds one dimension of several tokens"),
        Suspect("tokens-first", [cut], "the cut is right, the swap is missing",
                "transpose the dimensions of tokens and heads", f"shape {list(cut.shape)}: tokens before heads"),
        Suspect("interleaved", [other.permute(0, 3, 1, 2)], "the last dimension was cut as [head_dim, num_heads]",
                "the order of the cut: num_heads first, head_dim inside it",
                "head 0 holds every num_heads-th number of a token instead of its first ones"),
        Suspect("sizes-swapped", [other.transpose(1, 2), other.reshape(batch, head_dim, tokens, num_heads)],
                "num_heads was taken for head_dim", "head_dim is x.shape[-1] // num_heads",
                f"{head_dim} heads of {num_heads} numbers; {num_heads} of {head_dim} were asked for"),
        Suspect("dimensions-last", [cut.permute(0, 2, 3, 1)],
                "one swap too many: this is the shape that keys have inside the score product",
                "the docstring's order: batch, num_heads, tokens, head_dim",
                "tokens stand last, where head_dim should be"),
        Suspect("swapped-wrongly", [cut.transpose(0, 1), cut.transpose(2, 3), cut.transpose(1, 3), cut.transpose(0, 2)],
                "other dimensions than tokens and heads were swapped",
                "[batch, tokens, num_heads, head_dim]: tokens are dimension 1, heads dimension 2",
                "the dimensions are the right ones, in another order"),
        Suspect("along-tokens", [cut.transpose(1, 2).flatten(1, 2), x.reshape(batch, -1, head_dim)],
                "the heads were laid one after the other as if they were tokens",
                "torch.stack makes a new dimension, torch.cat does not", "three dimensions came back; four are needed"),
        Suspect("heads-first", [cut.permute(2, 0, 1, 3)], "the heads were put before the batch",
                "the docstring's order: batch, num_heads, tokens, head_dim",
                "heads stand first, where the batch should be"),
        Suspect("heads-reversed", [cut.transpose(1, 2).flip(1)], "the heads are in reverse order",
                "head 0 has the first head_dim dimensions", "head 0 holds what belongs to the last head"),
    ]  # fmt: skip


def joins(heads: Tensor) -> list[Suspect]:
    """Wrong ways to join."""
    batch, num_heads, tokens, head_dim = heads.shape
    swapped = heads.transpose(1, 2)
    return [
        Suspect("mixed-tokens", [heads.reshape(batch, tokens, num_heads * head_dim)],
                "reshape without swapping back: in memory, one head's tokens lie together", "transpose(1, 2) first",
                "the shape is right, but one token's vector holds one head's results of several tokens"),
        Suspect("interleaved", [heads.permute(0, 2, 3, 1).flatten(2)],
                "the heads were moved to the last place before joining",
                "heads stand before head_dim when the two are joined",
                "the heads' numbers alternate instead of lying side by side"),
        Suspect("heads-blended", [heads.mean(1), heads.sum(1), heads[:, 0], heads[:, -1], heads.amax(1)],
                "the heads were summed or averaged, or one was taken",
                "merging keeps every number: heads lie side by side; the output projection blends them later",
                f"vectors of {head_dim} numbers; {num_heads * head_dim} are needed"),
        Suspect("along-tokens", [heads.flatten(1, 2), swapped.flatten(1, 2)],
                "heads were joined to tokens, not to head_dim",
                "which two dimensions become one: num_heads and head_dim",
                f"{num_heads * tokens} tokens instead of {tokens}"),
        Suspect("not-swapped", [heads.flatten(2)], "tokens were joined to head_dim: they were not swapped with heads",
                "transpose(1, 2) first: the heads must stand beside head_dim",
                "a row per head instead of one per token"),
        Suspect("not-joined", [swapped], "the swap is right, the join is missing",
                "reshape to [batch, tokens, num_heads * head_dim]", "four dimensions came back; three are needed"),
        Suspect("swapped-wrongly", [heads.transpose(2, 3).reshape(batch, tokens, -1),
                                    heads.transpose(1, 3).reshape(batch, tokens, -1),
                                    heads.permute(0, 3, 2, 1).reshape(batch, tokens, -1),
                                    heads.permute(2, 0, 1, 3).flatten(2)],
                "other dimensions than heads and tokens were swapped", "transpose(1, 2)",
                "a row holds numbers of several tokens, or stands in another place"),
        Suspect("heads-reversed", [swapped.flip(2).flatten(2)], "the heads are in reverse order",
                "head 0 comes first", "a token's first numbers are those of the last head"),
    ]  # fmt: skip
