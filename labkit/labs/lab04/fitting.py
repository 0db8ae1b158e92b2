"""04.2: how many KV heads a budget allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from labkit.course.checks.numbers import check_whole, explain_number
from labkit.course.exercise import Exercise
from labkit.labs.lab04.references import most_kv_heads
from labkit.specs import ModelSpec


class MostKvHeads(Exercise):
    """The choice that a model's designer makes."""

    id, title, minutes, difficulty = "04.2", "As many KV heads as fit", 4, 2
    reference = staticmethod(most_kv_heads)
    hints = (
        "What does one KV head cost, in all layers, for all tokens of all requests? How often does that go into room?",
        "Not every count will do: num_heads must be a multiple of it. Try the divisors of num_heads, largest first.",
        "one = 2 * spec.num_layers * spec.head_dim * bytes_per_element * tokens * batch\n"
        "for count in range(spec.num_heads, 0, -1):\n    if spec.num_heads % count == 0 and count * one <= room:\n"
        "        return count\nreturn 0",
    )
    hints_for: ClassVar = {
        "not-a-divisor": "60 query heads over 7 KV heads: how many query heads would each KV head serve?",
        "group-size": "num_queries_per_kv = num_heads // num_kv_heads. Which of the two was asked for?",
        "own-kv-heads": "The spec describes a model as it is; the question is how many heads it could have.",
        "never-zero": "There may be too little room even for one head. What does the docstring say then?",
    }
    spec = ModelSpec(
        name="odd", num_layers=11, num_heads=60, num_kv_heads=4, head_dim=22, hidden_size=221, intermediate_size=13,
        vocab_size=17, max_seq_len=19,
    )  # fmt: skip
    tokens, batch = 31, 37
    shares = (7.5, 12.0, 11.99, 1000.0, 1.0, 0.5, 4.5, 29.9, 0.03)  # of room, in heads of 2-byte numbers

    def examine(self, answer: Callable) -> None:
        """Rooms between divisors, on one, beyond all of them and below one; two dtypes; a model with fewer heads."""
        got, want = [], []
        for share, size in [(share, 2) for share in self.shares] + [(6.0, 4), (12.0, 1)]:
            room = int(share * self.head_bytes(2))
            got.append(
                check_whole(type(self), self.call(answer, self.spec, self.tokens, self.batch, room, size), "a room")
            )
            want.append(most_kv_heads(self.spec, self.tokens, self.batch, room, size))
        if got != want:
            self.explain(got, want)

    def head_bytes(self, size: int) -> int:
        """One KV head, everything counted."""
        return 2 * self.spec.num_layers * self.spec.head_dim * size * self.tokens * self.batch

    def explain(self, got: list[int], want: list[int]) -> None:
        """Name the rule that gives what was seen in every case."""
        heads, divisors = (
            self.spec.num_heads,
            [n for n in range(1, self.spec.num_heads + 1) if self.spec.num_heads % n == 0],
        )
        fit = [share * factor for share, factor in zip((*self.shares, 6.0, 12.0), (1,) * 9 + (0.5, 2), strict=True)]

        def rule(factor: float, *, dtype: bool = True) -> list[int]:
            """The right rule with one head `factor` times as dear."""
            rooms = fit if dtype else [*fit[:9], 6.0, 12.0]
            return [max((n for n in divisors if n * factor <= room), default=0) for room in rooms]

        at = next(index for index, pair in enumerate(zip(got, want, strict=True)) if pair[0] != pair[1])
        seen = f"{heads} query heads, room for {fit[at]:.4g} KV heads: you take {got[at]}; {want[at]} is right"
        look = "the cost of one KV head: 2 x layers x head_dim x bytes per element x tokens x requests"
        known = {
            "not-a-divisor": ([min(int(room), heads) for room in fit],
                              "how many fit was returned, whether or not it divides num_heads",
                              "each KV head must serve the same number of query heads: num_heads % count == 0"),
            "more-than-heads": ([int(room) for room in fit], "what fits was neither capped nor made to divide",
                                "at most num_heads KV heads, and a number that divides num_heads"),
            "halved": ([halving(heads, room) for room in fit], "num_heads was halved until it fits",
                       "the counts that you try: every divisor of num_heads, not the halves alone"),
            "group-size": ([heads // n if n else 0 for n in want], "num_queries_per_kv was returned",
                           "the return: the number of KV heads, not of query heads for each"),
            "smallest": ([1 if n else 0 for n in want], "the first count that fits was taken, starting from 1",
                         "the order of the loop: largest first"),
            "never-zero": ([max(n, 1) for n in want], "at least one head is always returned",
                           "the case where one head is already too much"),
            "full-is-refused": ([max((n for n in divisors if n < room), default=0) for room in fit],
                                "a cache that fills the room exactly was refused", "the comparison: `<` or `<=`"),
            "k-only": (rule(0.5), "K was counted and V was not", look),
            "one-row": (rule(1 / self.batch), "the batch was left out", look),
            "one-token": (rule(1 / self.tokens), "the tokens were left out", look),
            "one-layer": (rule(1 / self.spec.num_layers), "one layer was counted", look),
            "own-kv-heads": (rule(self.spec.num_kv_heads), "the spec's own KV heads went into the cost", look),
            "fixed-dtype": (rule(1, dtype=False), "2 bytes per number were written down", "the last parameter"),
            "elements": (rule(0.5, dtype=False), "numbers were counted, not bytes", "the last parameter"),
        }  # fmt: skip
        explain_number(type(self), got, known, seen)
        self.fail("count", seen=seen, cause="a factor of the cost, or the choice among the divisors", look=look)


def halving(heads: int, room: float) -> int:
    """What halving `heads` until it fits comes to; 0 when nothing does."""
    while heads > room and heads:
        heads //= 2
    return heads
