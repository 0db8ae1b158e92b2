"""01.2: the causal mask, with tokens held."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from labkit.course.checks.hidden import hidden
from labkit.course.checks.suspects import Suspect
from labkit.course.checks.trials import compare
from labkit.course.exercise import Exercise
from labkit.labs.lab01.references import causal_mask

# Few, one, none held, as many new as held and one more or less, more than a byte counts or than half precision does.
CALLS = ((3, 2), (5, 3), (2, 6), (1, 0), (1, 7), (6, 0), (4, 4), (4, 5), (5, 4), (2, 300), (270, 3), (2, 3_000))


class Mask(Exercise):
    """A causal mask that knows what came before."""

    id = "01.2"
    title = "A causal mask, with what came before"
    minutes = 3
    hints = (
        "Row i is the i-th *new* token. At which position of the whole text does it stand?",
        "With `past` tokens held, new token i stands at past + i and may see the positions 0 to past + i.",
        "rows: torch.arange(new_tokens)[:, None] + past; columns: torch.arange(past + new_tokens). Compare them.",
    )
    hints_for: ClassVar = {
        "mask-offset": "For new_tokens=1, past=4 the one new token may see all five. What does yours say?",
        "mask-inverted": "Read the docstring's last words of the first line again.",
        "blind-to-itself": "At which position does the first new token stand, and may it see its own key?",
        "not-bool": "What does a comparison of two tensors give?",
    }
    why = (
        "Row i stands at position past + i of the whole text. A column of these positions, compared with a row of all "
        "positions, broadcasts to the mask."
    )
    reference = staticmethod(causal_mask)

    def examine(self, answer: Callable) -> None:
        """What kind of thing it is, then all calls. A mask that is another call's has another shape, too."""
        self.kind_of([self.call(answer, *call) for call in CALLS[:3]])
        calls = [*CALLS, *hidden(lambda chance: (chance.randint(1, 40), chance.randint(0, 60)))]
        compare(type(self), answer, causal_mask, calls, suspects=suspects, what="the mask", exact=True)

    def kind_of(self, masks: list[Tensor]) -> None:
        """Rows are new tokens, columns are all tokens, entries are permissions."""
        shapes = [list(mask.shape) for mask in masks if isinstance(mask, Tensor)]
        if shapes == [[new, new] for new, _ in CALLS[:3]]:
            self.fail(
                "no-past-columns",
                seen="a 3 x 3 mask for 3 new tokens after 2 held",
                cause="the tokens held have no column, so no new token could see them",
                look="the number of columns: past + new_tokens",
            )
        if shapes == [[past + new] * 2 for new, past in CALLS[:3]]:
            self.fail(
                "old-rows",
                seen="5 rows for 3 new tokens",
                cause="the tokens held got a row each; their queries are not computed again",
                look="the number of rows: new_tokens",
            )
        if shapes == [[past + new, new] for new, past in CALLS[:3]]:
            self.fail(
                "swapped",
                seen="5 rows and 3 columns for 3 new tokens after 2 held",
                cause="rows and columns changed places",
                look="the docstring: a row for each new token, a column for every token",
            )
        if shapes == [[past, past + new] for new, past in CALLS[:3]]:
            self.fail(
                "arguments-exchanged",
                seen="2 rows for 3 new tokens after 2 held",
                cause="new_tokens and past changed places",
                look="the number of rows: new_tokens",
            )
        if shapes == [[new, past + new] for new, past in CALLS[:3]] and masks[0].dtype != torch.bool:
            self.fail(
                "not-bool",
                seen=f"a tensor of {masks[0].dtype}",
                cause="numbers (0 and 1, or 0 and -inf) instead of permissions",
                look="a comparison gives bool; .bool() makes it of 0 and 1",
            )

    @classmethod
    def explain_values(cls, got: Tensor, want: Tensor, *, what: str, tolerance: float = 0.0) -> None:
        """Say of the first row that differs which keys it sees and which it should see."""
        row = int((got != want).any(-1).nonzero()[0])
        sees, should = (places(mask[row]) for mask in (got, want))
        cls.fail(
            "values",
            seen=f"{what}: new token {row} may see {sees}; it should be {should}",
            cause="the rule for a row is another one, or one that fits some sizes only",
            look="the rule in words first: new token i stands at position past + i, and sees the positions 0 to there",
        )


def places(row: Tensor) -> str:
    """The positions that a row of a mask allows, in few words."""
    seen = row.nonzero().flatten().tolist()
    if len(seen) > 8:
        return f"{len(seen):,} keys, from {seen[0]:,} to {seen[-1]:,}"
    return f"keys {seen}" if seen else "no key"


def suspects(new: int, past: int) -> list[Suspect]:
    """Wrong masks of the right shape."""
    row, column = torch.arange(new)[:, None], torch.arange(past + new)[None, :]
    at = row + past
    ones = torch.ones(new, past, dtype=torch.bool)
    look = "new token i stands at position past + i and sees the positions 0 to there"
    return [
        Suspect("mask-inverted", [column > at], "True was taken for 'hidden'", "the docstring: True = may see",
                "every permission is turned round: the first new token sees only what comes after it"),
        Suspect("sees-later", [column >= at], "the comparison is turned round: >= for <=, or triu for tril", look,
                "each new token sees itself and what comes after it"),
        Suspect("mask-offset", [column <= row], "row i was taken for position i, as if nothing were held",
                "add past to the row's position", "the first new token sees 1 key, however many are held"),
        Suspect("blind-to-itself", [column < at], "the diagonal is one too far to the left: a strict comparison?",
                "a token sees its own key, too", "no new token sees itself"),
        Suspect("mask-offset-too-large", [column <= at + 1], "the diagonal is one too far to the right",
                "the first new token stands at position past, and sees position past at most",
                "every new token sees its successor"),
        Suspect("offset-is-new-tokens", [column <= row + new], "the diagonal was shifted by new_tokens, not by past",
                "which of the two says where the first new token stands", "the offset grows with the new tokens"),
        Suspect("offset-negative", [column <= row - past], "the diagonal was shifted to the wrong side",
                "past stands on the side of the rows: column <= row + past", "the more is held, the less is seen"),
        Suspect("cache-hidden", [(column <= at) & (column >= past)], "the columns of the past are False",
                "what was there before may be seen by every new token", "no new token sees a token that is held"),
        Suspect("past-at-the-end", [torch.cat((torch.ones(new, new).tril().bool(), ones), dim=1)],
                "the columns of the past were put to the right of the new tokens'",
                "the order of columns is the order of positions: the past comes first",
                "the last columns are visible to all, the first ones are not"),
        Suspect("no-mask", [(column >= 0).expand(new, -1)], "nothing compares the key's position with the query's",
                "column j is visible to row i when j <= past + i",
                "every new token sees every key, later ones included"),
        Suspect("mask-offset", [column > row], "row i was taken for position i, and True for 'hidden'",
                "add past to the row's position; True = may see", "the first new token sees all but the first key"),
        Suspect("no-mask-without-past", [column <= at if past else column >= row - row[-1] - 1],
                "where nothing is held, nothing is hidden", "past 0 is a past like any other: the plain triangle",
                "with past 0, every new token sees every other"),
        *[Suspect("past-written-down", [column <= row + number],
                  f"the diagonal is shifted by {number}, however many are held", "the argument past",
                  "the first new token sees as many keys after 2 held as after 7") for number in range(1, 9)],
        Suspect("past-is-the-total", [column <= at - new, column <= row + max(past - new, 0)],
                "past was taken for all tokens, the new ones included",
                "the docstring: past tokens are held, and new_tokens come after them",
                "the first new token does not see itself"),
        Suspect("past-only", [(column < past).expand(new, -1)], "only what is held is visible", look,
                "no new token sees itself or another new one"),
        Suspect("first-row-everywhere", [(column <= past).expand(new, -1)], "the rows do not differ",
                "the position of row i grows with i", "every new token sees what the first one sees"),
        Suspect("past-and-itself", [(column < past) | (column == at)],
                "a new token sees what is held and itself, but no new token before it", look,
                "new tokens do not see each other"),
        Suspect("itself-only", [column == at], "only the diagonal is True", look,
                "each new token sees its own key alone"),
        Suspect("window", [(column <= at) & (column >= row), (column <= at) & (column > row)],
                "a first key was given to each row as well as a last one", look,
                "the later a new token, the fewer of the first keys it sees"),
        Suspect("rows-reversed", [(column <= at).flip(0)], "the rows are in reverse order",
                "row 0 is the first new token", "the first new token sees most, the last one least"),
    ]  # fmt: skip
