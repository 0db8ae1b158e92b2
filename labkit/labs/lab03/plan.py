"""03.3: how many requests fit. 03.7: a planner that counts the wrong heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

from labkit.course.checks.hidden import hidden
from labkit.course.checks.numbers import check_number, judge, shown
from labkit.course.checks.suspects import Suspect
from labkit.course.exercise import Exercise
from labkit.labs.lab03.references import capacity, request_bytes
from labkit.labs.lab03.slips import Slip, remembered, shape, suspects_of
from labkit.specs import ModelSpec


def fitting(
    *,
    room: Callable[[float, float, float], float] = lambda m, w, r: (m - w) * (1 - r),
    each: Callable[[float, float, float], float] = lambda w, q, r: q,
    whole: Callable[[float], float] = math.floor,
) -> Callable[[int, int, int, float], float]:
    """The number of requests with another idea of the room, of what a request takes, or of rounding."""
    return lambda m, w, q, r: max(0, whole(room(m, w, r) / each(w, q, r)))


SHARE = "the docstring: a share of what the weights leave"
WHOLE = "a request of which a part fits does not fit"
CAPACITY_SLIPS = {
    "room": (
        Slip("reserve-of-all", lambda m, w, r: m * (1 - r) - w, "the reserve was taken off the whole memory", SHARE),
        Slip("no-reserve", lambda m, w, r: m - w, "nothing was kept free", "the parameter `reserve`"),
        Slip("only-the-reserve", lambda m, w, r: (m - w) * r, "only the reserve was filled",
             "reserve or 1 - reserve: 0.15 is what stays free"),
        Slip("weights-left-out", lambda m, w, r: m * (1 - r), "the weights were left out",
             "what stands in memory before the first request comes"),
        Slip("weights-left-out", lambda m, w, r: m, "weights and reserve were left out",
             "what stands in memory before the first request comes"),
        Slip("reserve-added", lambda m, w, r: (m - w) * (1 + r), "the reserve was added to the room", SHARE),
        Slip("reserve-added", lambda m, w, r: (m - w) / (1 - r), "the reserve made the room larger", SHARE),
        Slip("reserve-divided", lambda m, w, r: (m - w) / (1 + r), "the room was divided by 1 + reserve",
             "a share that is kept free: what may be used is 1 - reserve of the room"),
        Slip("reserve-of-weights", lambda m, w, r: m - w * (1 + r), "the reserve was taken as a share of the weights",
             SHARE),
        Slip("reserve-of-weights", lambda m, w, r: m - w * (1 - r), "the reserve was taken off the weights", SHARE),
        Slip("reserve-in-percent", lambda m, w, r: (m - w) * (1 - r / 100), "the reserve was divided by 100",
             "the docstring: a share such as 0.15"),
        Slip("weights-added", lambda m, w, r: (m + w) * (1 - r), "the weights were added to the memory",
             "what stands in memory before the first request comes"),
    ),
    "each": (
        Slip("weights-per-request", lambda w, q, r: w + q, "each request was given weights of its own",
             "weights are shared: they are stored once"),
        Slip("reserve-per-request", lambda w, q, r: q * (1 + r), "each request was made larger by the reserve", SHARE),
        Slip("reserve-per-request", lambda w, q, r: q * (1 - r), "each request was made smaller by the reserve", SHARE),
    ),
    "whole": (
        Slip("one-at-least", lambda x: max(1, math.floor(x)), "one request was let in where none fits", WHOLE),
        Slip("rounded-up", math.ceil, "the number was rounded up", WHOLE),
        Slip("rounded-up", round, "the number was rounded to the nearest", WHOLE),
        Slip("rounded-up", lambda x: math.floor(x) + 1, "one was added to what fits", WHOLE),
        Slip("one-too-few", lambda x: math.ceil(x) - 1, "a request that fills the room to the last byte was left out",
             "what happens when nothing is left over: < or <="),
        Slip("one-too-few", lambda x: math.floor(x) - 1, "one request fewer than fits", "where counting starts"),
        Slip("not-rounded", lambda x: x, "a fraction of a request came out", "whole requests: // rounds down"),
    ),
}  # fmt: skip


class Capacity(Exercise):
    """What fits beside the weights."""

    id, title, minutes, difficulty = "03.3", "How many fit", 3, 2
    reference = staticmethod(capacity)
    why = (
        "The weights are there whatever happens, so the reserve is a share of what they leave. A part of a "
        "request serves nobody: // rounds down, int makes it a count, and max keeps it from going below none."
    )
    hints = (
        "What is left when the weights are in place? How much of that may be used? How many whole requests is it?",
        "Take the weights off first, then the reserve off what is left, then divide and drop the fraction. Below zero "
        "nobody fits.",
        "room = (memory_bytes - weight_bytes) * (1 - reserve)\nreturn max(0, int(room // request_bytes))",
    )
    hints_for: ClassVar = {
        "reserve-of-all": "The reserve is a share. Of what? The docstring says.",
        "no-reserve": "Of ten bytes that the weights leave and a reserve of 0.15, how many may be used?",
        "rounded-up": "A request of which nine tenths fit does not fit.",
        "rounded-twice": "Ten requests fit, and 15% is kept free: is that a request and a half, or bytes?",
        "below-zero": "How many users does a GPU serve that cannot hold the weights?",
    }
    suspects: ClassVar = (
        Suspect("weights-per-request", fitting(room=lambda m, w, r: m * (1 - r), each=lambda w, q, r: w + q),
                "each request was given weights of its own", "weights are shared: they are stored once"),
        Suspect("rounded-twice", lambda m, w, q, r: max(0, int((m - w) // q * (1 - r))),
                "the reserve was taken off a number of requests that had been rounded down",
                "the reserve is a share of bytes: round at the end"),
        Suspect("rounded-twice", lambda m, w, q, r: max(0, (m - w) // q - math.ceil((m - w) // q * r)),
                "requests were kept free, not bytes", "the reserve is a share of bytes: round at the end"),
        *suspects_of(fitting, CAPACITY_SLIPS),
    )  # fmt: skip

    def examine(self, answer: Callable) -> None:
        """Room for many, few and none; full to the last byte and one short of it; no reserve; each argument alone; at
        the end weights that do not fit."""
        what = "the number of requests"
        cases = [
            (84_932_978_278, 15_231_233_024, 117_440_512, 0.15), (84_932_978_278, 15_231_233_024, 117_440_512, 0.31),
            (84_932_978_278, 15_231_233_024, 7_516_192_768, 0.15), (84_932_978_278, 40_000_000_007, 117_440_512, 0.15),
            (84_932_978_278, 70_000_000_001, 117_440_512, 0.15),
            (42_294_690_447, 15_231_233_024, 117_440_512, 0.15), (1_009, 211, 89, 0.1), (1_000, 200, 100, 0.5),
            (1_001, 200, 100, 0.5), (998, 200, 100, 0.5), (1_200, 200, 100, 0.0), (1_000, 200, 401, 0.5),
            (1_000, 200, 400, 0.5), (10**12 + 1, 7, 30_000_001, 0.25), (1_009, 211, 89, 0.1),
        ]  # fmt: skip
        cases += hidden(lambda chance: (
            chance.randint(10**10, 10**11), chance.randint(10**8, 10**10), chance.randint(10**6, 10**9),
            chance.randint(1, 60) / 100,
        ))  # fmt: skip
        judge(type(self), answer, capacity, cases, self.suspects, what=what, whole=True)
        cases = [
            (25_000, 40_000, 700, 0.15), (40_000, 40_000, 700, 0.15), (40_000, 40_100, 700, 0.15),
            (40_000, 40_100, 700, 0.0),
        ]  # fmt: skip
        for case in cases:
            if (count := check_number(type(self), self.call(answer, *case), what)) < 0:
                self.fail(
                    "below-zero",
                    seen=f"{shown(capacity, case)}: {count:,} came back",
                    cause="a negative number of requests fits",
                    look="the case in which the weights do not fit: 0",
                )
        judge(type(self), answer, capacity, cases, (), what=what, whole=True)


COINCIDENCE = shape("the coincidence", (80, 64, 8, 128, 8192))
FEW = shape("few KV heads", (28, 28, 4, 128, 3584))
MANY = shape("groups of four", (32, 32, 8, 128, 4096))
ALL = shape("no groups", (40, 40, 40, 128, 5120))
ONE = shape("one KV head", (32, 71, 1, 64, 4096))


def planned(
    *,
    heads: Callable[[ModelSpec], float] = lambda spec: spec.num_kv_heads,
    width: Callable[[ModelSpec], float] = lambda spec: spec.head_dim,
    layers: Callable[[ModelSpec], float] = lambda spec: spec.num_layers,
    both: float = 2,
    rest: Callable[[int, int], float] = lambda context, size: context * size,
) -> Callable[[ModelSpec, int, int], float]:
    """The planner's formula with another idea of one of its factors."""
    return lambda spec, context, size: both * layers(spec) * heads(spec) * width(spec) * rest(context, size)


GROUP = "the number of KV heads needs no choice"
PLANNER_SLIPS = {
    "heads": (
        Slip("group-size", lambda spec: spec.num_heads // spec.num_kv_heads,
             "one factor is right for some models, too large for others and too small for yet others",
             "the ratio of the two figures here, and for 64 heads with 8 KV heads: which sizes give both?"),
        Slip("group-size", lambda spec: max(spec.num_kv_heads, spec.num_heads // spec.num_kv_heads),
             "the larger of group size and KV heads was taken", GROUP),
        Slip("group-size", lambda spec: min(spec.num_kv_heads, spec.num_heads // spec.num_kv_heads),
             "the smaller of group size and KV heads was taken", GROUP),
        Slip("query-heads", lambda spec: spec.num_heads, "every query head was given K and V of its own",
             "num_heads or num_kv_heads: queries are not stored"),
        Slip("query-heads", lambda spec: spec.num_heads + spec.num_kv_heads, "query heads were counted as well",
             "num_heads or num_kv_heads: queries are not stored"),
        Slip("divided-twice", lambda spec: spec.num_kv_heads / (spec.num_heads // spec.num_kv_heads),
             "the grouping was applied to the KV heads once more", "num_kv_heads is what is left after grouping"),
        Slip("divided-twice", lambda spec: spec.num_kv_heads // (spec.num_heads // spec.num_kv_heads),
             "the grouping was applied to the KV heads once more", "num_kv_heads is what is left after grouping"),
        Slip("written-down", lambda spec: 8, "the number of heads is 8, whatever the model", "spec.num_kv_heads"),
        Slip("written-down", lambda spec: 4, "the number of heads is 4, whatever the model", "spec.num_kv_heads"),
        Slip("square-root", lambda spec: spec.num_heads**0.5, "the square root of the query heads was taken",
             "spec.num_kv_heads"),
        Slip("square-root", lambda spec: int(spec.num_heads**0.5), "the square root of the query heads was taken",
             "spec.num_kv_heads"),
        Slip("heads-left-out", lambda spec: 1, "one KV head was counted", "spec.num_kv_heads"),
    ),
    "width": (
        Slip("hidden-size", lambda spec: spec.hidden_size // spec.num_heads,
             "head_dim was taken to be hidden_size / num_heads", "spec.head_dim: a model may choose it freely"),
        Slip("hidden-size", lambda spec: spec.hidden_size / spec.num_heads,
             "head_dim was taken to be hidden_size / num_heads", "spec.head_dim: a model may choose it freely"),
        Slip("written-down", lambda spec: 128, "head_dim is 128, whatever the model", "spec.head_dim"),
        Slip("width-left-out", lambda spec: 1, "one number per head was counted", "spec.head_dim"),
    ),
    "both": (
        Slip("k-only", 1, "K was counted and V was not", "the factor 2 at the start"),
        Slip("two-too-many", 4, "K and V were counted twice", "the factor 2 at the start"),
    ),
    "layers": (
        Slip("one-layer", lambda spec: 1, "one layer was counted", "spec.num_layers"),
        Slip("written-down", lambda spec: 80, "the number of layers is 80, whatever the model", "spec.num_layers"),
    ),
    "rest": (
        Slip("ignored", lambda context, size: context * 2, "two bytes a number were counted, whatever is asked",
             "`bytes_per_element`"),
        Slip("ignored", lambda context, size: context, "numbers were counted, not bytes", "`bytes_per_element`"),
        Slip("trained-length", lambda context, size: min(context, 64) * size, "tokens beyond max_seq_len were left out",
             "`context`: as many as are asked for"),
        Slip("ignored", lambda context, size: size, "one token was counted", "`context`"),
    ),
}  # fmt: skip


class RequestBytes(Exercise):
    """A planner that is right for one model by coincidence."""

    id, title, minutes, difficulty = "03.7", "Debug: right for one model", 4, 2
    needs = ("03.1", "03.3")
    reference = staticmethod(request_bytes)
    why = (
        "What is stored is one key and one value per KV head. num_heads // num_kv_heads is how many query heads "
        "share one, which happens to be 8 for 64 and 8."
    )
    hints = (
        "Print each factor for 64 heads and 8 KV heads, then for 28 and 4. Which one does not count what is stored?",
        "num_heads // num_kv_heads is the number of query heads that share one KV head. Which of the two is stored?",
        "return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * context * bytes_per_element",
    )
    hints_for: ClassVar = {
        "group-size": "64 // 8 is 8 and happens to be right. What is 28 // 4, and how many KV heads are there?",
        "query-heads": "How many keys does one token leave behind in a layer: one per query head, or fewer?",
        "hidden-size": "hidden_size is the width of a token between layers. How wide are its keys?",
        "written-down": "A number that fits one model is in the formula. Ask the spec.",
    }
    suspects: ClassVar = (
        Suspect("hidden-size", lambda spec, context, size: 2 * spec.num_layers * spec.hidden_size * context * size,
                "hidden_size was taken for num_kv_heads * head_dim, which holds only without grouping",
                "the width of one token's keys in one layer"),
        *suspects_of(planned, PLANNER_SLIPS),
    )  # fmt: skip

    def examine(self, answer: Callable) -> None:
        """The coincidence, then models where group size and KV heads differ either way; every size changed alone; more
        than 32 bits count; several models of one name."""
        cases = [
            (FEW, 1_009, 2), (FEW, 1_009, 4), (FEW, 2_003, 2), (MANY, 1_009, 2), (ALL, 1_009, 2), (ONE, 1_009, 2),
            (COINCIDENCE, 1_009, 2), (replace(FEW, name="narrow heads", head_dim=96), 1_009, 2),
            (replace(FEW, name="a layer more", num_layers=29), 1_009, 2), (ONE, 131_072, 1), (MANY, 1, 2),
            (FEW, 1_009, 2),
        ]  # fmt: skip
        models = (FEW, MANY, ALL, ONE, COINCIDENCE)
        cases += hidden(lambda chance: (chance.choice(models), chance.randint(1, 131_072), chance.choice((1, 2, 4))))
        for some in (cases, [(MANY, 0, 2)], [(COINCIDENCE, 131_072, 2), (MANY, 70_001, 4)]):
            judge(type(self), answer, request_bytes, some, self.suspects, what="the cache in bytes", whole=True)
        others = [(replace(FEW, num_layers=31), 1_009, 2), (replace(FEW, num_kv_heads=7), 1_009, 2)]
        known = (remembered(request_bytes, FEW), *self.suspects)
        judge(type(self), answer, request_bytes, others, known, what="the cache in bytes", whole=True)
