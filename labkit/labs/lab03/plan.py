"""03.3: how many requests fit. 03.7: a planner that counts the wrong heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from labkit.course.checks.numbers import judge
from labkit.course.checks.suspects import Suspect
from labkit.course.exercise import Exercise
from labkit.labs.lab03.references import capacity, request_bytes
from labkit.specs import ModelSpec


class Capacity(Exercise):
    """What fits beside the weights."""

    id, title, minutes, difficulty = "03.3", "How many fit", 3, 2
    reference = staticmethod(capacity)
    hints = (
        "What is left when the weights are in place? How much of that may be used? How many whole requests is it?",
        "Take the weights off first, then the reserve off what is left, then divide and drop the fraction. Below zero "
        "nobody fits.",
        "room = (memory_bytes - weight_bytes) * (1 - reserve)\nreturn max(0, int(room // request_bytes))",
    )
    hints_for: ClassVar = {
        "reserve-of-all": "The reserve is a share. Of what? The docstring says.",
        "rounded-up": "A request of which nine tenths fit does not fit.",
        "below-zero": "How many users does a GPU serve that cannot hold the weights?",
    }
    suspects: ClassVar = (
        Suspect("reserve-of-all", lambda m, w, q, r: max(0, int((m * (1 - r) - w) // q)),
                "the reserve was taken off the whole memory", "the docstring: a share of what the weights leave"),
        Suspect("reserve-of-all", lambda m, w, q, r: int((m * (1 - r) - w) // q),
                "the reserve was taken off the whole memory", "the docstring: a share of what the weights leave"),
        Suspect("no-reserve", lambda m, w, q, r: max(0, (m - w) // q), "nothing was kept free",
                "the parameter `reserve`"),
        Suspect("no-reserve", lambda m, w, q, r: (m - w) // q, "nothing was kept free", "the parameter `reserve`"),
        Suspect("only-the-reserve", lambda m, w, q, r: max(0, int((m - w) * r // q)), "only the reserve was filled",
                "reserve or 1 - reserve: 0.15 is what stays free"),
        Suspect("weights-left-out", lambda m, w, q, r: int(m * (1 - r) // q), "the weights were left out",
                "what stands in memory before the first request comes"),
        Suspect("below-zero", lambda m, w, q, r: int((m - w) * (1 - r) // q), "a negative number of requests fits",
                "the case in which the weights do not fit: 0"),
        Suspect("rounded-up", lambda m, w, q, r: max(0, -int(-((m - w) * (1 - r)) // q)),
                "the number was rounded up", "a request of which a part fits does not fit"),
        Suspect("rounded-up", lambda m, w, q, r: max(0, round((m - w) * (1 - r) / q)),
                "the number was rounded to the nearest", "a request of which a part fits does not fit"),
        Suspect("weights-per-request", lambda m, w, q, r: max(0, int(m * (1 - r) // (w + q))),
                "each request was given weights of its own", "weights are shared: they are stored once"),
        Suspect("not-rounded", lambda m, w, q, r: max(0.0, (m - w) * (1 - r) / q), "a fraction of a request came out",
                "whole requests: // rounds down"),
    )  # fmt: skip

    def examine(self, answer: Callable) -> None:
        """Room for many and for few, just short of one more, another reserve, and weights that do not fit."""
        cases = [
            (84_932_978_278, 15_231_233_024, 117_440_512, 0.15), (84_932_978_278, 15_231_233_024, 117_440_512, 0.31),
            (84_932_978_278, 15_231_233_024, 7_516_192_768, 0.15), (1_009, 211, 89, 0.1), (25_000, 40_000, 700, 0.15),
        ]  # fmt: skip
        judge(type(self), answer, capacity, cases, self.suspects, what="the number of requests", whole=True)


def shaped(name: str, layers: int, heads: int, kv_heads: int, head_dim: int, hidden: int) -> ModelSpec:
    """A spec with these sizes."""
    return ModelSpec(
        name=name, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, hidden_size=hidden,
        intermediate_size=64, vocab_size=64, max_seq_len=64,
    )  # fmt: skip


COINCIDENCE = shaped("64 heads, 8 KV heads", 80, 64, 8, 128, 8192)
FEW = shaped("28 heads, 4 KV heads", 28, 28, 4, 128, 3584)
MANY = shaped("32 heads, 8 KV heads", 32, 32, 8, 128, 4096)
ALL = shaped("40 heads, 40 KV heads", 40, 40, 40, 128, 5120)
ONE = shaped("71 heads, 1 KV head", 32, 71, 1, 64, 4096)


def with_heads(heads: Callable[[ModelSpec], float]) -> Callable[[ModelSpec, int, int], float]:
    """The formula with another number of heads."""
    return lambda spec, context, size: 2 * spec.num_layers * heads(spec) * spec.head_dim * context * size


class RequestBytes(Exercise):
    """A planner that is right for one model by coincidence."""

    id, title, minutes, difficulty = "03.7", "Debug: right for one model", 4, 2
    needs = ("03.1", "03.3")
    reference = staticmethod(request_bytes)
    hints = (
        "Print each factor for 64 heads and 8 KV heads, then for 28 and 4. Which one does not count what is stored?",
        "num_heads // num_kv_heads is the number of query heads that share one KV head. Which of the two is stored?",
        "return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * context * bytes_per_element",
    )
    hints_for: ClassVar = {
        "group-size": "64 // 8 is 8 and happens to be right. What is 28 // 4, and how many KV heads are there?",
        "query-heads": "How many keys does one token leave behind in a layer: one per query head, or fewer?",
        "written-down": "A number that fits one model is in the formula. Ask the spec.",
    }
    suspects: ClassVar = (
        Suspect("group-size", with_heads(lambda spec: spec.num_heads // spec.num_kv_heads),
                "one factor is right for some models, too large for others and too small for yet others",
                "the ratio of the two figures here, and for 64 heads with 8 KV heads: which sizes give both?"),
        Suspect("group-size", with_heads(lambda spec: max(spec.num_kv_heads, spec.num_heads // spec.num_kv_heads)),
                "the larger of group size and KV heads was taken", "the number of KV heads needs no choice"),
        Suspect("group-size", with_heads(lambda spec: min(spec.num_kv_heads, spec.num_heads // spec.num_kv_heads)),
                "the smaller of group size and KV heads was taken", "the number of KV heads needs no choice"),
        Suspect("query-heads", with_heads(lambda spec: spec.num_heads), "every query head was given K and V of its own",
                "num_heads or num_kv_heads: queries are not stored"),
        Suspect("hidden-size",
                lambda spec, context, size: 2 * spec.num_layers * spec.hidden_size * context * size,
                "hidden_size was taken for num_kv_heads * head_dim, which holds only without grouping",
                "the width of one token's keys in one layer"),
        Suspect("divided-twice",
                with_heads(lambda spec: spec.num_kv_heads / (spec.num_heads // spec.num_kv_heads)),
                "the grouping was applied to the KV heads once more", "num_kv_heads is what is left after grouping"),
        Suspect("written-down", with_heads(lambda spec: 8), "the number of heads is 8, whatever the model",
                "spec.num_kv_heads"),
        Suspect("written-down", with_heads(lambda spec: 4), "the number of heads is 4, whatever the model",
                "spec.num_kv_heads"),
        Suspect("k-only", with_heads(lambda spec: spec.num_kv_heads / 2), "K was counted and V was not",
                "the factor 2 at the start"),
    )  # fmt: skip

    def examine(self, answer: Callable) -> None:
        """The coincidence, then models where group size and KV heads differ either way."""
        cases = [
            (FEW, 1_009, 2), (FEW, 1_009, 4), (FEW, 2_003, 2), (MANY, 1_009, 2), (ALL, 1_009, 2), (ONE, 1_009, 2),
            (COINCIDENCE, 1_009, 2),
        ]  # fmt: skip
        judge(type(self), answer, request_bytes, cases, self.suspects, what="the cache in bytes", whole=True)
