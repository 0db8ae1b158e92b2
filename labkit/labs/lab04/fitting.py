"""04.2: how many KV heads a budget allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from labkit.course.checks.hidden import hidden
from labkit.course.checks.numbers import judge
from labkit.course.checks.suspects import Suspect
from labkit.course.exercise import Exercise
from labkit.labs.lab04.references import most_kv_heads
from labkit.specs import ModelSpec

SPEC = ModelSpec(
    name="odd", num_layers=11, num_heads=60, num_kv_heads=4, head_dim=22, hidden_size=221, intermediate_size=13,
    vocab_size=17, max_seq_len=19,
)  # fmt: skip
WIDE = ModelSpec(
    name="wide", num_layers=7, num_heads=96, num_kv_heads=12, head_dim=26, hidden_size=505, intermediate_size=23,
    vocab_size=29, max_seq_len=43,
)  # fmt: skip
EVEN = ModelSpec(  # rooms for whole heads, in GB or GiB, are no round floats
    name="even", num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128, hidden_size=3584, intermediate_size=31,
    vocab_size=37, max_seq_len=47,
)  # fmt: skip
LOAD = 31, 37  # tokens, requests
ROOMS = (7.5, 12.0, 11.99, 13.0, 59.99, 60.0, 1000.0, 1.0, 0.99, 4.5, 29.9, 1.5, 3.2, 2.0, 0.03)  # in heads of 2 bytes
COST = "the cost of one KV head: 2 x layers x head_dim x bytes per element x tokens x requests"
Times = Callable[[ModelSpec, int, int, int], float]


def choice(
    times: Times = lambda *_: 1,
    allow: Callable[[ModelSpec, int], bool] = lambda spec, n: spec.num_heads % n == 0,
    pick: Callable[[list[int]], int] = lambda fits: max(fits, default=0),
) -> Callable[[ModelSpec, int, int, int, int], int]:
    """The right choice where one head costs `times` as much, other counts are allowed, or another one is picked."""

    def formula(spec: ModelSpec, tokens: int, batch: int, room: int, size: int) -> int:
        cost = one_head(spec, tokens, batch, size) * times(spec, tokens, batch, size)
        return pick([n for n in range(1, spec.num_heads + 1) if allow(spec, n) and n * cost <= room * (1 + 1e-12)])

    return formula


def divisors(rule: Callable[[int, int], bool]) -> Callable[[ModelSpec, int], bool]:
    """The divisors of num_heads for which a rule of (num_heads, n) holds."""
    return lambda spec, n: spec.num_heads % n == 0 and rule(spec.num_heads, n)


UNTRIED: tuple[Callable[[int, int], bool], ...] = (  # what loops over divisors leave out
    lambda heads, n: n > 1,
    lambda heads, n: n * n <= heads,
    lambda heads, n: n * n < heads,
    lambda heads, n: n * n <= heads or n == heads,
    lambda heads, n: 1 < n < heads,
    lambda heads, n: 1 < n <= heads // 2,
    lambda heads, n: n == 1 or n % 2 == 0,
)


def by_quotient(unit: float) -> Callable[[ModelSpec, int, int, int, int], int]:
    """The choice by how many heads fit according to a quotient of floats, in another unit than bytes."""

    def formula(spec: ModelSpec, tokens: int, batch: int, room: int, size: int) -> int:
        most = int(room / unit / (one_head(spec, tokens, batch, size) / unit))
        return max((n for n in range(1, spec.num_heads + 1) if spec.num_heads % n == 0 and n <= most), default=0)

    return formula


def next_larger(spec: ModelSpec, tokens: int, batch: int, room: int, size: int) -> int:
    """The first divisor that does not fit, or all heads."""
    fits = most_kv_heads(spec, tokens, batch, room, size)
    return min((n for n in range(fits + 1, spec.num_heads) if spec.num_heads % n == 0), default=spec.num_heads)


class MostKvHeads(Exercise):
    """The choice that a model's designer makes."""

    id, title, minutes, difficulty = "04.2", "As many KV heads as fit", 4, 2
    reference = staticmethod(most_kv_heads)
    why = (
        "One KV head's cache is the unit; the most that fit are searched downwards among the divisors of num_heads, "
        "since a group has to be whole. No divisor that fits means 0, not an error."
    )
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
        "capped": "How many KV heads the model has today is not asked. How many query heads has it?",
        "never-zero": "There may be too little room even for one head. What does the docstring say then?",
    }
    suspects: ClassVar = (
        Suspect("always-all", lambda spec, *_: spec.num_heads, "room is far too large beside the cost, or the test is "
                "always true: is one of the two in another unit?", COST),
        Suspect("always-none", lambda *_: 0, "room is far too small beside the cost, or the test is never true: is one "
                "of the two in another unit?", COST),
        Suspect("divides-backwards", choice(allow=lambda spec, n: n % spec.num_heads == 0),
                "the count was divided by num_heads, not num_heads by the count", "the order at %: num_heads % count"),
        Suspect("not-a-divisor", [lambda spec, tokens, batch, room, size: min(
                    room // one_head(spec, tokens, batch, size), spec.num_heads),
                    lambda spec, tokens, batch, room, size: round(room / one_head(spec, tokens, batch, size))],
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
        Suspect("quotient-cut", [by_quotient(unit) for unit in (1e9, 2**30, 1e6, 2**20, 1e3, 2**10)],
                "how many fit was taken from a quotient of floats: 6.999... where 7 heads fit exactly, and int() cuts "
                "that to 6", "bytes are whole numbers: compare count * one with room, or divide with //"),
        Suspect("capped", choice(allow=lambda spec, n: spec.num_heads % n == 0 and n <= spec.num_kv_heads),
                "no more KV heads were tried than the spec has", "the counts that you try: up to spec.num_heads"),
        Suspect("own-divisors", [choice(allow=lambda spec, n: spec.num_kv_heads % n == 0), choice(
                    allow=lambda spec, n: n % spec.num_kv_heads == 0)],
                "the counts tried were made to fit the KV heads that the spec has",
                "what must divide: num_heads % count"),
        Suspect("powers-of-two", [choice(allow=lambda spec, n: n & (n - 1) == 0), choice(
                    allow=lambda spec, n: n & (n - 1) == 0 and spec.num_heads % n == 0)],
                "only powers of two were tried", "the counts that you try: every divisor of num_heads"),
        Suspect("mha-left-out", choice(allow=lambda spec, n: spec.num_heads % n == 0 and n < spec.num_heads),
                "as many KV heads as query heads were not tried", "the end of the loop: range stops one before"),
        Suspect("some-not-tried", [choice(allow=divisors(rule)) for rule in UNTRIED],
                "the cost is right, and some divisors of num_heads are never tried",
                "the counts that you try: 1, num_heads, and everything between that divides it; a divisor below the "
                "root has a partner above it"),
        Suspect("too-large", next_larger, "the first count that does not fit was returned",
                "the comparison: the cache must fit into room"),
        Suspect("k-only", choice(lambda *_: 1 / 2), "K was counted and V was not", COST),
        Suspect("one-row", choice(lambda spec, tokens, batch, size: 1 / batch), "the batch was left out", COST),
        Suspect("one-token", choice(lambda spec, tokens, batch, size: 1 / tokens), "the tokens were left out", COST),
        Suspect("one-layer", choice(lambda spec, *_: 1 / spec.num_layers), "one layer was counted", COST),
        Suspect("own-kv-heads", choice(lambda spec, *_: spec.num_kv_heads),
                "the spec's own KV heads went into the cost", COST),
        Suspect("all-heads", choice(lambda spec, *_: spec.num_heads), "all query heads went into the cost", COST),
        Suspect("head-dim", [choice(lambda spec, *_: spec.hidden_size / spec.num_heads / spec.head_dim),
                             choice(lambda spec, *_: spec.hidden_size // spec.num_heads / spec.head_dim)],
                "hidden_size / num_heads was taken for head_dim; models need not be built so", "spec.head_dim"),
        Suspect("head-dim", choice(lambda spec, *_: spec.hidden_size / spec.head_dim),
                "hidden_size was taken for head_dim", "spec.head_dim"),
        Suspect("bits", choice(lambda *_: 1 / 8), "the bytes were divided by 8, as if bits had come in",
                "the size of one number: bytes, eight bits each"),
        Suspect("bits", choice(lambda *_: 8), "bits were counted", "the size of one number: bytes, eight bits each"),
        Suspect("twice", choice(lambda *_: 2), "one KV head costs twice as much as it does", COST),
        Suspect("fixed-dtype", choice(lambda spec, tokens, batch, size: 2 / size),
                "2 bytes per number were written down", "the last parameter"),
        Suspect("elements", choice(lambda spec, tokens, batch, size: 1 / size), "numbers were counted, not bytes",
                "the last parameter"),
    )  # fmt: skip

    def examine(self, answer: Callable) -> None:
        """Rooms between divisors, on one, a byte less, beyond all of them and below one; every argument alone."""
        tokens, batch = LOAD
        unit = one_head(SPEC, *LOAD, 2)
        cases = [(SPEC, *LOAD, int(heads * unit), 2) for heads in ROOMS]
        for heads in (1.5, 3.2, 12.0):
            room = int(heads * unit)
            cases += [(SPEC, *LOAD, room, 4), (SPEC, *LOAD, room, 1), (SPEC, tokens // 3, batch, room, 2)]
            cases += [(SPEC, tokens, batch // 3, room, 2), (WIDE, *LOAD, room, 2)]
        cases += [(SPEC, *LOAD, 12 * unit - 1, 2), (SPEC, *LOAD, 12 * unit + 1, 2), (SPEC, 1, 1, 10**9, 2)]
        cases += [(WIDE, 131_072, 500, heads * one_head(WIDE, 131_072, 500, 2), 2) for heads in (96, 95, 48, 200)]
        cases += [
            (EVEN, 2_048, n, heads * one_head(EVEN, 2_048, n, 2), 2) for heads in (7, 14, 28) for n in (3, 5, 7, 13)
        ]
        cases += hidden(lambda chance: (
            chance.choice((SPEC, WIDE, EVEN)), chance.randint(1, 500), chance.randint(1, 60),
            int(chance.uniform(0.5, 70) * 10 ** chance.uniform(4, 9)), chance.choice((1, 2, 4)),
        ))  # fmt: skip
        judge(
            type(self), answer, most_kv_heads, cases, self.suspects, what="the number of KV heads", whole=True,
            otherwise="count", show=in_words,
        )  # fmt: skip


def in_words(spec: ModelSpec, tokens: int, batch: int, room: int, size: int) -> str:
    """A case in words, with all that one needs to do it by hand."""
    return (
        f"with {spec.num_layers} layers, {spec.num_heads} query heads of {spec.head_dim}, {tokens:,} tokens of "
        f"{batch} requests, {size} bytes per element and room {room:,}, which is "
        f"{room / one_head(spec, tokens, batch, size):.4g} KV heads"
    )


def one_head(spec: ModelSpec, tokens: int, batch: int, size: int) -> int:
    """Bytes of one KV head, everything counted."""
    return 2 * spec.num_layers * spec.head_dim * size * tokens * batch


def halving(heads: int, room: float) -> int:
    """What halving `heads` until it fits comes to; 0 when nothing does."""
    while heads > room and heads:
        heads //= 2
    return heads
