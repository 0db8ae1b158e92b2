"""04.2: how many KV heads a budget allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from labkit.course.checks.numbers import judge
from labkit.course.checks.suspects import Suspect
from labkit.course.exercise import Exercise
from labkit.labs.lab04.references import most_kv_heads
from labkit.specs import ModelSpec

SPEC = ModelSpec(
    name="odd", num_layers=11, num_heads=60, num_kv_heads=4, head_dim=22, hidden_size=221, intermediate_size=13,
    vocab_size=17, max_seq_len=19,
)  # fmt: skip
LOAD = 31, 37  # tokens, batch
ROOMS = (7.5, 12.0, 11.99, 1000.0, 1.0, 0.5, 4.5, 29.9, 0.03, 12.0)  # in heads of 2-byte numbers
COST = "the cost of one KV head: 2 x layers x head_dim x bytes per element x tokens x requests"


def dearer(times: Callable[[ModelSpec, int, int, int], float]) -> Callable[[ModelSpec, int, int, int, int], int]:
    """The right choice where one head costs so many times as much."""

    def formula(spec: ModelSpec, tokens: int, batch: int, room: int, size: int) -> int:
        cost = one_head(spec, tokens, batch, size) * times(spec, tokens, batch, size)
        fit = (n for n in range(1, spec.num_heads + 1) if spec.num_heads % n == 0 and n * cost <= room * (1 + 1e-12))
        return max(fit, default=0)

    return formula


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
    suspects: ClassVar = (
        Suspect("not-a-divisor", lambda spec, tokens, batch, room, size: min(
                    room // one_head(spec, tokens, batch, size), spec.num_heads),
                "how many fit was returned, whether or not it divides num_heads",
                "each KV head must serve the same number of query heads: num_heads % count == 0"),
        Suspect("more-than-heads", lambda spec, tokens, batch, room, size: room // one_head(spec, tokens, batch, size),
                "what fits was neither capped nor made to divide",
                "at most num_heads KV heads, and a number that divides num_heads"),
        Suspect("halved", lambda spec, tokens, batch, room, size: halving(
                    spec.num_heads, room / one_head(spec, tokens, batch, size)), "num_heads was halved until it fits",
                "the counts that you try: every divisor of num_heads, not the halves alone"),
        Suspect("group-size", lambda spec, *rest: spec.num_heads // (most_kv_heads(spec, *rest) or spec.num_heads + 1),
                "num_queries_per_kv was returned",
                "the return: the number of KV heads, not of query heads for each"),
        Suspect("smallest", lambda *case: min(most_kv_heads(*case), 1),
                "the first count that fits was taken, starting from 1", "the order of the loop: largest first"),
        Suspect("never-zero", lambda *case: max(most_kv_heads(*case), 1), "at least one head is always returned",
                "the case where one head is already too much"),
        Suspect("full-is-refused", lambda spec, tokens, batch, room, size: most_kv_heads(
                    spec, tokens, batch, room - 1, size),
                "a cache that fills the room exactly was refused", "the comparison: `<` or `<=`"),
        Suspect("k-only", dearer(lambda *_: 1 / 2), "K was counted and V was not", COST),
        Suspect("one-row", dearer(lambda spec, tokens, batch, size: 1 / batch), "the batch was left out", COST),
        Suspect("one-token", dearer(lambda spec, tokens, batch, size: 1 / tokens), "the tokens were left out", COST),
        Suspect("one-layer", dearer(lambda spec, *_: 1 / spec.num_layers), "one layer was counted", COST),
        Suspect("own-kv-heads", dearer(lambda spec, *_: spec.num_kv_heads),
                "the spec's own KV heads went into the cost", COST),
        Suspect("fixed-dtype", dearer(lambda spec, tokens, batch, size: 2 / size),
                "2 bytes per number were written down", "the last parameter"),
        Suspect("elements", dearer(lambda spec, tokens, batch, size: 1 / size), "numbers were counted, not bytes",
                "the last parameter"),
    )  # fmt: skip

    def examine(self, answer: Callable) -> None:
        """Rooms between divisors, on one, beyond all of them and below one; two dtypes; a model with fewer heads."""
        rooms = [int(heads * one_head(SPEC, *LOAD, 2)) for heads in ROOMS]
        cases = [(SPEC, *LOAD, room, 2) for room in rooms] + [(SPEC, *LOAD, rooms[-1], 4), (SPEC, *LOAD, rooms[-1], 1)]
        judge(
            type(self), answer, most_kv_heads, cases, self.suspects, what="the number of KV heads", whole=True,
            otherwise="count", show=room_in_heads,
        )  # fmt: skip


def room_in_heads(spec: ModelSpec, tokens: int, batch: int, room: int, size: int) -> str:
    """A case in words."""
    return f"{spec.num_heads} query heads, room for {room / one_head(spec, tokens, batch, size):.4g} KV heads"


def one_head(spec: ModelSpec, tokens: int, batch: int, size: int) -> int:
    """Bytes of one KV head, everything counted."""
    return 2 * spec.num_layers * spec.head_dim * size * tokens * batch


def halving(heads: int, room: float) -> int:
    """What halving `heads` until it fits comes to; 0 when nothing does."""
    while heads > room and heads:
        heads //= 2
    return heads
