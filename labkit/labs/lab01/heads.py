"""01.3 and 01.3b: heads split and merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from labkit.course.checks.suspects import Suspect, recognise
from labkit.course.checks.tensors import draw
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
        "mixed-tokens": "view() only relabels. In memory, which numbers lie together: a head's or a token's?",
    }
    reference = staticmethod(split_heads)

    def examine(self, answer: Callable) -> None:
        """Numbers that say where they came from, then a case of equal sizes."""
        for tokens, num_heads in ((5, 3), (4, 4)):
            x = torch.arange(2 * tokens * num_heads * 6, dtype=torch.float64).view(2, tokens, num_heads * 6)
            got = self.call(answer, x, num_heads)
            recognise(type(self), got, cuts(x, num_heads), tolerance=0)
            self.same(got, split_heads(x, num_heads), what=f"{tokens} tokens in {num_heads} heads")
        x = draw(1, 2, 8, dtype=torch.bfloat16)
        self.same(self.call(answer, x, 1), split_heads(x, 1), what="one head")


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
    reference = staticmethod(merge_heads)

    def examine(self, answer: Callable) -> None:
        """What split_heads gives, and back."""
        x = torch.arange(2 * 5 * 18, dtype=torch.float64).view(2, 5, 18)
        heads = split_heads(x, 3).contiguous()
        try:
            got = self.call(answer, heads)
        except NotYet as not_yet:
            if "view size is not compatible" in not_yet.finding.seen:
                self.fail(
                    "view-of-a-transpose",
                    seen="view() refused: the tensor's numbers are not in memory order",
                    cause="transpose only changes labels; view needs numbers in a row",
                    look="reshape(), which copies where it must",
                )
            raise
        recognise(type(self), got, joins(heads), tolerance=0)
        self.same(got, x, what="5 tokens of 3 heads, merged")
        for tokens, num_heads in ((4, 4), (1, 2)):
            heads = draw(1, num_heads, tokens, 4, dtype=torch.bfloat16)
            self.same(
                self.call(answer, heads), merge_heads(heads), what=f"{tokens} tokens of {num_heads} heads, merged"
            )


def cuts(x: Tensor, num_heads: int) -> list[Suspect]:
    """Wrong ways to cut."""
    batch, tokens, size = x.shape
    head_dim = size // num_heads
    cut = x.view(batch, tokens, num_heads, head_dim)
    return [
        Suspect("mixed-tokens", x.view(batch, num_heads, tokens, head_dim),
                "view straight to the final shape: it relabels in memory order, where a token's heads lie together",
                "cut the last dimension first, then swap tokens and heads with transpose",
                "the shape is right, but head 0 holds slices of all heads of the first tokens"),
        Suspect("swapped-before-cut", x.transpose(1, 2).reshape(batch, num_heads, tokens, head_dim),
                "tokens and dimensions were swapped first, and reshape then cut across both",
                "cut the last dimension first, then swap tokens and heads",
                "the shape is right, but a row of head 0 holds one dimension of several tokens"),
        Suspect("tokens-first", cut, "the cut is right, the swap is missing",
                "transpose the dimensions of tokens and heads", f"shape {list(cut.shape)}: tokens before heads"),
        Suspect("interleaved", x.view(batch, tokens, head_dim, num_heads).permute(0, 3, 1, 2),
                "the last dimension was cut as [head_dim, num_heads]",
                "the order of the cut: num_heads first, head_dim inside it",
                f"head 0 holds one in {num_heads} of a token's numbers instead of its first {head_dim}"),
        Suspect("sizes-swapped", x.view(batch, tokens, head_dim, num_heads).transpose(1, 2),
                "num_heads was taken for head_dim", "head_dim is x.shape[-1] // num_heads",
                f"{head_dim} heads of {num_heads} dimensions; {num_heads} of {head_dim} were asked for"),
        Suspect("dimensions-last", cut.permute(0, 2, 3, 1),
                "one swap too many: this is the shape that keys have inside the score product",
                "the docstring's order: batch, num_heads, tokens, head_dim",
                "tokens stand last, where head_dim should be"),
    ]  # fmt: skip


def joins(heads: Tensor) -> list[Suspect]:
    """Wrong ways to join."""
    batch, num_heads, tokens, head_dim = heads.shape
    return [
        Suspect("mixed-tokens", heads.reshape(batch, tokens, num_heads * head_dim),
                "reshape without swapping back: in memory, one head's tokens lie together", "transpose(1, 2) first",
                "the shape is right, but one token's vector holds one head's results of several tokens"),
        Suspect("interleaved", heads.permute(0, 2, 3, 1).reshape(batch, tokens, -1),
                "the heads were moved to the last place before joining",
                "heads stand before head_dim when the two are joined",
                "the heads' numbers alternate instead of lying side by side"),
        Suspect("heads-blended", [heads.mean(1), heads.sum(1)], "the heads were summed or averaged",
                "merging keeps every number: heads lie side by side; the output projection blends them later",
                f"vectors of {head_dim} numbers; {num_heads * head_dim} are needed"),
        Suspect("along-tokens", heads.reshape(batch, num_heads * tokens, head_dim),
                "heads were joined to tokens, not to head_dim",
                "which two dimensions become one: num_heads and head_dim",
                f"{num_heads * tokens} tokens instead of {tokens}"),
        Suspect("not-joined", heads.transpose(1, 2), "the swap is right, the join is missing",
                "reshape to [batch, tokens, num_heads * head_dim]", "four dimensions came back; three are needed"),
    ]  # fmt: skip
