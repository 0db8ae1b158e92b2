"""02.5: how much of a kept cache may be reused."""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable
from typing import ClassVar

from labkit.course.checks.hidden import hidden
from labkit.course.checks.numbers import judge
from labkit.course.checks.suspects import Suspect
from labkit.course.exercise import Exercise
from labkit.labs.lab02.references import reusable_prefix

Count = Callable[[list[int], list[int]], int]


def prefix(held: list[int], wanted: list[int]) -> int:
    """Equal tokens at the beginning, however many."""
    return next((i for i, (a, b) in enumerate(zip(held, wanted, strict=False)) if a != b), min(len(held), len(wanted)))


def equal_places(held: list[int], wanted: list[int]) -> list[int]:
    """Where both lists hold the same token."""
    return [place for place, (a, b) in enumerate(zip(held, wanted, strict=False)) if a == b]


def identical(held: list[int], wanted: list[int]) -> int:
    """Tokens at the beginning that are the same objects."""
    pairs = enumerate(zip(held, wanted, strict=False))
    return next((i for i, (a, b) in pairs if a is not b), min(len(held), len(wanted)))


def stops_at_zero(held: list[int], wanted: list[int]) -> int:
    """Equal tokens at the beginning that are not token 0."""
    same = prefix(held, wanted)
    return held.index(0, 0, same) if 0 in held[:same] else same


def either_way(count: Count) -> list[Count]:
    """A count, and the count with one token of `wanted` left to run, in two ways."""
    return [count, lambda held, wanted: min(count(held, wanted), len(wanted) - 1),
            lambda held, wanted: count(held, wanted[:-1])]  # fmt: skip


def longest_run(held: list[int], wanted: list[int]) -> int:
    """The longest stretch that both lists have, wherever it stands."""
    return difflib.SequenceMatcher(None, held, wanted, autojunk=False).find_longest_match().size


def last_index(held: list[int], wanted: list[int]) -> int:
    """The place of the first difference; where there is none, that of the last token compared."""
    return unless_equal(lambda held, wanted: max(min(len(held), len(wanted)) - 1, 0))(held, wanted)


def unless_equal(otherwise: Count) -> Count:
    """The first place that differs, and something else where none does."""
    return lambda held, wanted: min(
        (i for i, (a, b) in enumerate(zip(held, wanted, strict=False)) if a != b), default=otherwise(held, wanted)
    )


LOOP = "the loop: stop at the first token that differs"
LAST = "the last token to run is a token of `wanted`, not always one of `held`"
SUSPECTS = (
    Suspect("nothing-left-to-run",
            [prefix, lambda held, wanted: prefix(held, wanted) - (held == wanted),
             lambda held, wanted: min(prefix(held, wanted), max(len(held), len(wanted)) - 1)],
            "where the whole prompt is held, no token is left to run, so there are no logits",
            "the return: at most len(wanted) - 1"),
    Suspect("no-difference",
            [unless_equal(lambda held, wanted: len(held)), unless_equal(lambda held, wanted: len(wanted) - 1),
             unless_equal(lambda held, wanted: len(wanted)), unless_equal(lambda held, wanted: 0)],
            "where no token differs before one of the lists ends, the loop finds no place; what is returned then is "
            "not the number of equal tokens", "what stands behind the loop: which of the two lists has ended?"),
    Suspect("zero-taken-for-none",
            [lambda held, wanted: min(prefix(held, wanted) or len(held), len(wanted) - 1),
             lambda held, wanted: min(prefix(held, wanted) or len(held), len(held), len(wanted) - 1),
             lambda held, wanted: min(prefix(held, wanted) or len(wanted), len(wanted) - 1)],
            "a difference at place 0 was taken for no difference: 0 counts as false",
            "`or`, or `if` before a place: compare it with None"),
    Suspect("token-0-ends", either_way(stops_at_zero),
            "token 0 ended the comparison: the number of a token was used as true or false",
            "the loop: token 0 is a token like any other"),
    Suspect("all-or-nothing",
            either_way(lambda held, wanted: len(held) if wanted[: len(held)] == held else 0),
            "what is held counts as a whole or not at all; a part of it may stay",
            "the first place that differs: what stands before it may stay"),
    Suspect("all-or-nothing",
            either_way(lambda held, wanted: len(wanted) if held[: len(wanted)] == wanted else 0),
            "the prompt counts as a whole or not at all; a part of it may be held",
            "the first place that differs: what stands before it may stay"),
    Suspect("assumes-same-beginning", either_way(lambda held, wanted: len(held)),
            "everything held is reused, whatever it is", "compare the tokens, one by one"),
    Suspect("matches-anywhere",
            [*either_way(lambda held, wanted: len(equal_places(held, wanted))),
             *either_way(lambda held, wanted: len(set(held) & set(wanted))),
             *either_way(lambda held, wanted: sum(token in held for token in wanted)),
             *either_way(lambda held, wanted: sum(token in wanted for token in held))],
            "equal tokens behind the first difference were counted", LOOP),
    Suspect("last-match", either_way(lambda held, wanted: max(equal_places(held, wanted), default=-1) + 1),
            "the count goes up to the last place where the tokens agree, whatever stands before it", LOOP),
    Suspect("from-the-end", either_way(lambda held, wanted: prefix(held[::-1], wanted[::-1])),
            "tokens were compared from the end", "where the comparison begins: token 0 of both"),
    Suspect("matches-anywhere", either_way(longest_run),
            "the longest equal stretch was looked for, wherever it stands; only one from the beginning counts", LOOP),
    Suspect("index-for-count", either_way(last_index),
            "where nothing differs, the place of the last equal token was returned: one less than their number",
            "what stands behind the loop: how many tokens are equal, not where the last one stands"),
    Suspect("one-too-few",
            [lambda held, wanted: max(prefix(held, wanted) - 1, 0),
             lambda held, wanted: prefix(held, wanted) - 1,
             lambda held, wanted: prefix(held[:-1], wanted),
             lambda held, wanted: min(prefix(held, wanted), len(held) - 1),
             lambda held, wanted: min(prefix(held, wanted), len(held) - 1, len(wanted) - 1),
             lambda held, wanted: prefix(held[:-1], wanted[:-1]),
             lambda held, wanted: min(prefix(held, wanted), max(len(held) - 1, 0), len(wanted) - 1)],
            "one token is held back even when another is left to run", LAST),
    Suspect("one-too-few", lambda held, wanted: min(prefix(held, wanted), max(len(wanted) - 2, 0)),
            "two tokens of `wanted` are always run", "the return: at most len(wanted) - 1"),
    Suspect("identity", either_way(identical),
            "tokens were compared with `is`: that asks whether two names stand for one object, not for equal numbers",
            "the comparison: == and !="),
    Suspect("one-too-many", either_way(lambda held, wanted: prefix(held, wanted) + 1),
            "the first token that differs was counted too", LOOP),
    Suspect("counts-what-runs",
            [lambda held, wanted: len(wanted) - reusable_prefix(held, wanted),
             lambda held, wanted: len(wanted) - prefix(held, wanted),
             lambda held, wanted: len(wanted) - 1 - prefix(held, wanted)],
            "the tokens that must be run were counted, not those that the cache saves",
            "the docstring's first line: how many tokens need not be run"),
    Suspect("counts-what-goes", lambda held, wanted: len(held) - reusable_prefix(held, wanted),
            "the tokens that the cache must drop were counted, not those that may stay",
            "the docstring's first line: how many tokens need not be run"),
)  # fmt: skip


class ReusablePrefix(Exercise):
    """What a kept cache is worth for the next prompt."""

    id, title, minutes, difficulty = "02.5", "How much of the cache may stay", 4, 2
    reference = staticmethod(reusable_prefix)
    why = (
        "K and V depend on all tokens before, so what follows the first difference is worth nothing. The cap leaves "
        "the last token to run, since a cache holds no logits."
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
        "all-or-nothing": "A cache can be cut: cache.truncate(n) keeps the first n tokens. How large may n be?",
    }

    def examine(self, answer: Callable) -> None:
        """Differences at every place, lengths that differ either way, tokens twice, token 0, large ids, long lists."""
        judge(
            type(self), answer, reusable_prefix,
            [tuple(map(fresh, pair)) for pair in [*pairs(), *hidden(some_pair)]], SUSPECTS,
            what="the number of tokens that need not be run", whole=True, otherwise="count", show=shown,
        )  # fmt: skip


def pairs() -> list[tuple[list[int], list[int]]]:
    """Pairs of `held` and `wanted`, from the plainest to the one that everybody forgets."""
    long = [(7 * place) % 50_000 for place in range(400)]
    return [
        ([1, 2, 3], [1, 2, 3, 4, 5]),
        ([1, 2, 3], [9, 2, 3, 4, 5]),
        ([1, 2, 3, 4], [1, 2, 9, 4, 5]),
        ([1, 2, 3, 4, 5, 6], [1, 2, 7]),
        ([], [1, 2]),
        ([1, 2, 3], [1, 2, 3]),
        ([1, 2, 3, 4, 5, 6], [1, 2, 3]),
        ([1, 2, 3, 4], [1, 2, 3]),
        ([1, 2, 3], [1, 2, 3, 4]),
        ([4], [4]),
        ([4], [5]),
        ([], [6]),
        ([1, 1, 1, 1], [1, 1, 1, 1, 1, 1]),
        ([5, 6, 5, 7], [5, 6, 5, 6, 5, 7]),
        ([8, 9, 3, 4], [1, 2, 3, 4]),
        ([0, 0, 3, 0], [0, 0, 3, 5, 0]),
        ([300, 4097, 259], [300, 4097, 515, 259]),
        ([257, 70_000, 2049], [257, 70_001, 2049]),
        ([2, 1, 3], [1, 2, 3, 4]),
        (long, [*long, 3, 4]),
        (long, [*long[:390], 1, *long[391:]]),
    ]  # fmt: skip


def some_pair(chance: random.Random) -> tuple[list[int], list[int]]:
    """Few tokens, so that many are equal; one beginning, of any length."""
    same, held, wanted = (chance.choices(range(4), k=chance.randint(least, 20)) for least in (0, 0, 1))
    return [*same, *held], [*same, *wanted]


def fresh(tokens: list[int]) -> list[int]:
    """The same tokens as other objects: equal, but not identical."""
    return [int(str(token)) for token in tokens]


def shown(held: list[int], wanted: list[int]) -> str:
    """A pair in words."""
    return f"held {some(held)}, wanted {some(wanted)}"


def some(tokens: list[int]) -> str:
    """A list, or its ends."""
    return str(tokens) if len(tokens) < 12 else f"[{tokens[0]}, {tokens[1]}, ... {tokens[-1]}] ({len(tokens)} tokens)"
