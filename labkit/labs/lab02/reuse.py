"""02.5: how much of a kept cache may be reused."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from labkit.course.checks.numbers import check_whole
from labkit.course.exercise import Exercise
from labkit.labs.lab02.references import reusable_prefix


class ReusablePrefix(Exercise):
    """What a kept cache is worth for the next prompt."""

    id, title, minutes, difficulty = "02.5", "How much of the cache may stay", 4, 2
    reference = staticmethod(reusable_prefix)
    why = (
        "K and V of a token depend on every token before it, so only a common beginning can be kept. One token at "
        "least is run again, because the next token's logits come out of it."
    )
    hints = (
        "If token 3 is another one, are the K and V of token 4 still right in the layers above the first?",
        "Count equal tokens from the start and stop at the first difference. Then think of wanted == held.",
        "same = 0\nfor old, new in zip(held, wanted):\n    if old != new: break\n    same += 1\n"
        "return min(same, len(wanted) - 1)",
    )
    hints_for: ClassVar = {
        "nothing-left-to-run": "A cache holds K and V, no logits. To get logits, at least one token must run.",
        "matches-anywhere": "K and V depend on every token before. After the first difference nothing counts.",
    }

    def examine(self, answer: Callable) -> None:
        """Cases from the plainest to the one that everybody forgets."""
        self.case(answer, [1, 2, 3], [1, 2, 3, 4, 5], 3)
        self.case(answer, [1, 2, 3], [9, 2, 3, 4, 5], 0)
        self.case(answer, [1, 2, 3, 4], [1, 2, 9, 4, 5], 2)
        self.case(answer, [1, 2, 3, 4, 5, 6], [1, 2, 7], 2)
        self.case(answer, [], [1, 2], 0)
        self.case(answer, [1, 2, 3], [1, 2, 3], 2)
        self.case(answer, [1, 2, 3, 4, 5, 6], [1, 2, 3], 2)
        self.case(answer, [4], [4], 0)
        self.case(answer, [1, 1, 1, 1], [1, 1, 1, 1, 1, 1], 4)

    def counts_the_rest(self, answer: Callable) -> bool:
        """Whether the answer gives the tokens left to run, also where these differ most from the tokens reused."""
        pairs = (([1, 2, 3], [9, 2, 3, 4, 5], 5), ([1, 2, 3, 4], [1, 2, 9, 4, 5], 3), ([1, 2], [1, 2, 3, 4, 5, 6], 4))
        return all(self.call(answer, held, wanted) == rest for held, wanted, rest in pairs)

    def case(self, answer: Callable, held: list[int], wanted: list[int], want: int) -> None:
        """One pair of token lists."""
        got = check_whole(type(self), self.call(answer, held, wanted), "how many tokens are reused")
        if got == want:
            return
        seen = f"held {held}, wanted {wanted}: you reuse {got}; {want} is right"
        if got == len(wanted) - want and self.counts_the_rest(answer):
            self.fail(
                "counts-what-runs",
                seen=seen,
                cause="the tokens that must be run were counted, not those that the cache saves",
                look="the docstring's first line: how many tokens need not be run",
            )
        same = sum(old == new for old, new in zip(held, wanted, strict=False))
        if got >= len(wanted):
            self.fail(
                "nothing-left-to-run",
                seen=seen,
                cause="every token of the prompt is taken from the cache, so no token is run and there are no logits",
                look="the return: at most len(wanted) - 1",
            )
        if got == len(held):
            self.fail(
                "assumes-same-beginning",
                seen=seen,
                cause="everything held is reused, whatever it is",
                look="compare the tokens, one by one",
            )
        if got in (same, len(set(held) & set(wanted))) and got > want:
            self.fail(
                "matches-anywhere",
                seen=seen,
                cause="equal tokens behind the first difference were counted",
                look="the loop: stop at the first token that differs",
            )
        if got == want - 1:
            self.fail(
                "one-too-few",
                seen=seen,
                cause="one token is held back even when another is left to run",
                look="the last token to run is a token of `wanted`, not always one of `held`",
            )
        self.fail("count", seen=seen, cause="the count is off for this pair", look="this pair, by hand")
