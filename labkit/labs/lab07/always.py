"""07.4: what is kept whatever its score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from labkit.course.checks.effort import check_stays, effort_of
from labkit.course.checks.suspects import Suspect
from labkit.course.checks.tensors import agree, draw, shifted
from labkit.course.checks.trials import Case, compare, described
from labkit.course.exercise import Exercise
from labkit.labs.lab07.references import protected

INF = float("inf")


def held(batch: int, num_kv_heads: int, tokens: int, sinks: int, recent: int, *, seen: int, shuffled: bool = True,
         whole: torch.dtype = torch.int64, seed: int = 0) -> tuple[Tensor, Tensor, int, int]:  # fmt: skip
    """Random scores; positions of `tokens` of the `seen` tokens of each row, in any order: each KV head its own choice,
    the newest among them. Rows have seen different numbers."""
    generator = torch.Generator().manual_seed(shifted(seed))
    positions = torch.zeros(batch, num_kv_heads, tokens, dtype=whole)
    for row in range(batch):
        newest = seen - 1 + 2 * row
        for head in range(num_kv_heads):
            chosen = torch.randperm(newest, generator=generator)[: tokens - 1].tolist()
            order = torch.tensor([*chosen, newest])
            order = order[torch.randperm(tokens, generator=generator)] if shuffled else order.sort().values
            positions[row, head] = order.to(whole)
    return draw(batch, num_kv_heads, tokens, seed=seed), positions, sinks, recent


def suspects(scores: Tensor, positions: Tensor, sinks: int, recent: int) -> list[Suspect]:
    """What people protect instead."""
    positions, tokens = positions.long(), scores.shape[2]
    index = torch.arange(tokens).expand(scores.shape)
    newest = positions.amax(-1, keepdim=True)
    rank = positions.argsort(-1).argsort(-1)  # among the held, by position
    first, last = positions < sinks, positions > newest - recent

    def inf(always: Tensor) -> Tensor:
        return scores.masked_fill(always, INF)

    slices = scores.clone()
    slices[..., :sinks] = INF
    slices[..., -recent:] = INF
    newest_where = "the newest token: the greatest position that this row holds"
    recent_where = "the test of the newest: positions from newest - recent + 1 on"
    by_position = "what the docstring counts by: positions in the text, not places in the tensor"
    return [
        Suspect("by-index", [inf((index < sinks) | (index >= tokens - recent)), slices,
                             inf((index < sinks) | last), inf(first | (index >= tokens - recent)),
                             inf((index < sinks) | (index > newest - recent))],
                "tokens were protected by where they lie in the tensor", by_position),
        Suspect("newest-of-all-rows", [inf(first | (positions > positions.max() - recent)),
                                       inf(first | (positions > positions.amax((0, 2), keepdim=True) - recent)),
                                       inf(first | (positions > positions.amax(0, keepdim=True) - recent))],
                "the newest token of the whole batch was taken for that of every row", newest_where),
        Suspect("newest-of-first-row", [inf(first | (positions > positions[0].max() - recent)),
                                        inf(first | (positions > newest[:1] - recent))],
                "the first row's newest token was taken for that of every row", newest_where),
        Suspect("last-is-newest", [inf(first | (positions > positions[..., -1:] - recent))],
                "the last token in the tensor was taken for the newest", newest_where),
        Suspect("held-for-seen", [inf(first | (positions >= tokens - recent)),
                                  inf(first | (positions > tokens - recent)),
                                  inf(first | (positions > tokens - 1 - recent))],
                "the newest position was taken from how many tokens are held", newest_where),
        Suspect("recent-among-held", [inf(first | (rank >= tokens - recent))],
                "the `recent` newest of those held were protected, however old: by rank, not by position",
                recent_where),
        Suspect("sinks-among-held", [inf((rank < sinks) | last)],
                "the `sinks` oldest of those held were protected, though the text's first are gone",
                "the test of the sinks: positions below `sinks`"),
        Suspect("both-among-held", [inf((rank < sinks) | (rank >= tokens - recent))],
                "the oldest and the newest of those held were protected: by rank, not by position", by_position),
        Suspect("one-recent-more", [inf(first | (positions >= newest - recent))],
                "one token too many counts as recent: the newest itself is the first of them", recent_where),
        Suspect("one-recent-less", inf(first | (positions > newest - recent + 1)),
                "one token too few counts as recent", recent_where),
        Suspect("one-sink-more", [inf((positions <= sinks) | last)], "one sink too many: position `sinks` is none",
                "the test of the sinks: positions below `sinks`"),
        Suspect("one-sink-less", [inf((positions < sinks - 1) | last), inf((positions > 0) & first | last)],
                "one sink too few: positions begin at 0", "the test of the sinks: positions below `sinks`"),
        Suspect("newest-forgotten", [inf(first | (positions >= newest - recent) & (positions < newest))],
                "the newest token itself is not protected", recent_where),
        Suspect("sinks-only", inf(first), "only the sinks are protected", "the second half: the newest `recent`"),
        Suspect("recent-only", inf(last), "only the newest are protected", "the first half: the first `sinks`"),
        Suspect("both-at-once", inf(first & last), "only tokens that are sinks and recent at once are protected",
                "how the two tests are joined: one of them is enough, |"),
        Suspect("turned-round", [inf(~(first | last)), scores.masked_fill(first | last, -INF),
                                 scores.masked_fill(~(first | last), -INF)],
                "the wrong ones got infinity, or the right ones -infinity", "what masked_fill's True means, and the "
                "sign: the highest scores are kept"),
        Suspect("sinks-and-recent-swapped", inf((positions < recent) | (positions > newest - sinks)),
                "`sinks` and `recent` changed places", "the two tests, each with its own number"),
        Suspect("mask-returned", first | last, "the mask came back, not the scores",
                "the return: scores.masked_fill(mask, ...)"),
    ]  # fmt: skip


class Protected(Exercise):
    """Sinks and the newest."""

    id, title, minutes, difficulty = "07.4", "Always kept", 4, 2
    reference = staticmethod(protected)
    why = (
        "Both tests ask for a position in the text, so that it does not matter where a token lies, or what was dropped "
        "between two of them. Infinity is above every score, so that topk takes these first."
    )
    hints = (
        "Which positions are the first `sinks`? If the newest token of a row stands at 90, which are its newest 4?",
        "newest = positions.amax(dim=-1, keepdim=True): [batch, num_kv_heads, 1]. Two tests of positions, joined by |.",
        "always = (positions < sinks) | (positions > newest - recent)\nreturn scores.masked_fill(always, ...)",
    )
    hints_for: ClassVar = {
        "by-index": "A cache in which tokens are overwritten has them in any order. What says which is which?",
        "recent-among-held": "Held are 0, 7, 40, 90; recent is 4. Does 40 belong to the newest 4 of the text?",
        "newest-of-all-rows": "Two rows of different lengths: each has a newest token of its own.",
        "one-recent-more": "The newest stands at 90, recent is 4: 87, 88, 89, 90.",
        "not-infinity": "How large may a score be? What is larger than that?",
    }

    @classmethod
    def like(cls, got: Any, want: Tensor, *, what: str) -> None:
        """As for any exercise, but that infinity is left to the values; NaN has a cause of its own."""
        if isinstance(got, Tensor) and got.shape == want.shape and got.is_floating_point():
            if got.isnan().any():
                cls.fail("not-a-score", seen=f"{what} holds NaN",
                         cause="infinity was multiplied by 0, or added to a score of -infinity",
                         look="masked_fill or torch.where: they put a number there, and compute nothing")  # fmt: skip
            got = got.masked_fill(got.isinf(), 0.0)
        super().like(got, want, what=what)

    def examine(self, answer: Callable) -> None:
        """Tokens in any order, positions with gaps, rows of different lengths, numbers of sinks and recent from 0."""
        cases = [
            Case(held(3, 2, 9, 3, 4, seen=16)),
            Case(held(3, 2, 9, 3, 4, seen=16, seed=12), "other positions"),
            Case(held(2, 3, 14, 2, 6, seen=23, seed=1)),
            Case(held(2, 4, 7, 0, 3, seen=12, seed=2, whole=torch.int32), "no sinks"),
            Case(held(3, 1, 8, 4, 0, seen=13, seed=3), "none recent"),
            Case(held(2, 2, 6, 0, 0, seen=10, seed=4), "neither"),
            Case(held(1, 2, 10, 2, 5, seen=10, shuffled=False, seed=5), "nothing dropped, in order"),
            Case(held(2, 1, 5, 30, 2, seen=9, seed=6), "more sinks than tokens"),
            Case(held(1, 3, 4, 1, 50, seen=11, seed=7), "more recent than tokens"),
            Case(held(1, 1, 1, 1, 1, seen=1, seed=8), "one token"),
            Case(held(2, 2, 40, 4, 12, seen=3000, seed=9, whole=torch.int32), "few of many tokens"),
            Case(held(4, 2, 12, 5, 1, seen=15, seed=10)),
        ]
        ends = torch.cat((torch.arange(9), torch.arange(2971, 3001))).flip(0).expand(2, 3, 39)
        cases.append(Case((draw(2, 3, 39, seed=11), ends, 6, 13), "the first of 3,001 tokens, and the newest"))
        first = cases[2].args
        cases.append(Case((first[0].masked_fill(first[0] < 0, -INF), *first[1:]), "some scores -inf"))
        cases.append(Case((first[0] * 3e4, *first[1:]), "scores in the ten thousands"))
        self.check_infinity(answer, cases[0].args)
        compare(type(self), answer, protected, cases, suspects=suspects, what="the result", exact=True,
                dtypes=(torch.float32, torch.bfloat16, torch.float16))  # fmt: skip
        args = held(2, 2, 14, 3, 4, seen=20)
        check_stays(type(self), effort_of(lambda: self.run(lambda: answer(*args))))

    def check_infinity(self, answer: Callable, args: tuple[Tensor, Tensor, int, int]) -> None:
        """The right tokens, and a finite number."""
        got, want = self.call(answer, *args), protected(*args)
        if not isinstance(got, Tensor) or got.shape != want.shape or not got.is_floating_point():
            return
        always = want == INF
        if agree(got[~always], want[~always], 0.0) and got[always].isfinite().all() and (
                got[always] != args[0][always]).all():  # fmt: skip
            self.fail("not-infinity", seen=f"with {described(protected, Case(args))}: the right tokens get "
                      f"{got[always].amax():g}; the docstring says infinity",
                      cause="a number stands for infinity: a score may come near it, or a dtype not hold it",
                      look='the number that is filled in: float("inf")')  # fmt: skip
