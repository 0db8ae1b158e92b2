"""01.2: the causal mask, with tokens held."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from labkit.course.checks.suspects import Suspect, recognise
from labkit.course.exercise import Exercise
from labkit.labs.lab01.references import causal_mask


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
        "no-offset": "For new_tokens=1, past=4 the one new token may see all five. What does yours say?",
        "inverted": "Read the docstring's last words of the first line again.",
    }
    reference = staticmethod(causal_mask)

    def examine(self, answer: Callable) -> None:
        """One telling case, then the corners."""
        got = self.call(answer, 3, 2)
        self.shape_of(got)
        if got.dtype != torch.bool:
            self.fail(
                "not-bool",
                seen=f"a tensor of {got.dtype}",
                cause="numbers (0 and 1, or 0 and -inf) instead of permissions",
                look="return the comparison itself: it is bool",
            )
        recognise(type(self), got, suspects(), tolerance=0)
        for new_tokens, past in ((3, 2), (1, 0), (1, 7), (5, 0), (4, 9)):
            got, want = self.call(answer, new_tokens, past), causal_mask(new_tokens, past)
            if not isinstance(got, Tensor) or got.shape != want.shape or not torch.equal(got, want):
                self.fail(
                    "one-case-only",
                    seen=f"another mask than needed for {new_tokens} new tokens after {past} held",
                    cause="the rule fits some sizes only",
                    look="say the rule for row i in words first: it sees the positions 0 to past + i",
                )

    def shape_of(self, got: Tensor) -> None:
        """Rows are new tokens, columns are all tokens."""
        if isinstance(got, Tensor) and got.shape == (3, 3):
            self.fail(
                "no-past-columns",
                seen="a 3 x 3 mask for 3 new tokens after 2 held",
                cause="the tokens held have no column, so no new token could see them",
                look="the number of columns: past + new_tokens",
            )
        if isinstance(got, Tensor) and got.shape == (5, 5):
            self.fail(
                "old-rows",
                seen="5 rows for 3 new tokens",
                cause="the tokens held got a row each; their queries are not computed again",
                look="the number of rows: new_tokens",
            )
        self.like(got, got if isinstance(got, Tensor) and got.shape == (3, 5) else causal_mask(3, 2), what="the mask")


def suspects() -> list[Suspect]:
    """Wrong masks for 3 new tokens after 2 held."""
    want, row, column = causal_mask(3, 2), torch.arange(3)[:, None], torch.arange(5)[None, :]
    return [
        Suspect("inverted", ~want, "True was taken for 'hidden'", "the docstring: True = may see",
                "every permission is turned round: the first new token sees only what comes after it"),
        Suspect("no-offset", column <= row, "row i was taken for position i, as if nothing were held",
                "add past to the row's position",
                "the first new token sees 1 key; it should see 3: the two held and itself"),
        Suspect("not-itself", column < row + 2, "a strict comparison", "<= instead of <",
                "the first new token sees 2 keys; it should see 3: itself, too"),
        Suspect("sees-next", column <= row + 3, "the diagonal is one too far to the right",
                "the first new token stands at position past, and sees position past at most",
                "the first new token sees 4 keys; it should see 3: its successor is visible"),
        Suspect("past-hidden", want & (column >= 2), "the columns of the past are False",
                "what was there before may be seen by every new token", "no new token sees a token that is held"),
        Suspect("past-at-the-end", torch.cat((torch.ones(3, 3).tril().bool(), torch.ones(3, 2).bool()), dim=1),
                "the columns of the past were put to the right of the new tokens'",
                "the order of columns is the order of positions: the past comes first",
                "the last columns are visible to all, the first ones are not"),
        Suspect("all-visible", torch.ones(3, 5).bool(), "nothing compares the key's position with the query's",
                "column j is visible to row i when j <= past + i",
                "every new token sees every key, later ones included"),
    ]  # fmt: skip
