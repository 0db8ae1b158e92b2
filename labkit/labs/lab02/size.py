"""02.6: the bytes of a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import ClassVar

from labkit.course.checks.hidden import hidden
from labkit.course.checks.numbers import judge
from labkit.course.checks.suspects import Suspect
from labkit.course.exercise import Exercise, NotYet
from labkit.labs.lab02.references import cache_bytes
from labkit.specs import ModelSpec

ODD = ModelSpec(  # sizes that share no factor, so that a wrong one shows
    name="odd", num_layers=11, num_heads=35, num_kv_heads=7, head_dim=46, hidden_size=221, intermediate_size=13,
    vocab_size=17, max_seq_len=19,
)  # fmt: skip
WIDE = replace(ODD, name="wide", num_layers=5, num_heads=39, num_kv_heads=3, head_dim=34, hidden_size=323)
LAB_MODEL = {"num_layers": 30, "num_kv_heads": 3, "head_dim": 64}
FACTORS = "the factors, one by one"
SIZE = "the last parameter: it says how many bytes an element takes"

Formula = Callable[[ModelSpec, int, int, int], float]


def with_factor(change: Callable[[ModelSpec, int, int, int], float]) -> Formula:
    """The right formula times another factor."""
    return lambda *case: cache_bytes(*case) * change(*case)


def with_element_of(nbytes: int) -> Formula:
    """The formula for elements of so many bytes, whatever they are."""
    return lambda spec, tokens, batch, size: cache_bytes(spec, tokens, batch, nbytes)


def group(spec: ModelSpec) -> int:
    """Query heads that share a KV head."""
    return spec.num_heads // spec.num_kv_heads


def written_down() -> list[Suspect]:
    """Sizes of the lab model in the place of those of `spec`: each, each two, all three."""
    return [
        Suspect("hard-coded", with_factor(lambda spec, *_, names=names: replaced(spec, names)),
                f"the lab model's own {' and '.join(names)} went into the formula",
                "the parameter `spec`: every size of the model is one of its attributes")
        for count in (1, 2, 3) for names in combinations(LAB_MODEL, count)
    ]  # fmt: skip


def replaced(spec: ModelSpec, names: tuple[str, ...]) -> float:
    """The factor that the lab model's sizes, in the place of a spec's, make."""
    factor = 1.0
    for name in names:
        factor *= LAB_MODEL[name] / getattr(spec, name)
    return factor


class CacheBytes(Exercise):
    """How many bytes a model's cache takes, computed from the model's sizes before there is a cache."""

    id, title, minutes, difficulty = "02.6", "Bytes of a cache", 2, 1
    reference = staticmethod(cache_bytes)
    why = (
        "Two tensors, K and V, in each layer, of shape [batch, num_kv_heads, tokens, head_dim]: the size is the "
        "product of all that, times the bytes of one number."
    )
    hints = (
        "Write down the shape of one layer's K for one token. How many numbers is that, and how often does it occur?",
        "K and V, in each layer, per KV head, head_dim numbers, for each token of each row.",
        "2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * bytes_per_element, times tokens, times batch",
    )
    hints_for: ClassVar = {
        "query-heads": "The cache holds K and V. How many heads of those does the model have?",
        "hard-coded": "The check asks about another model than the lab's. Where does a function learn a model's sizes?",
        "k-only": "A key without its value answers nothing.",
    }
    suspects: ClassVar = (
        Suspect("elements", with_factor(lambda spec, tokens, batch, size: 1 / size),
                "the numbers were counted, not their bytes", SIZE),
        Suspect("fixed-dtype", [with_element_of(2), with_element_of(4), with_element_of(8)],
                "the bytes of one element were written down as a number", SIZE),
        Suspect("k-only", with_factor(lambda *_: 1 / 2), "K was counted and V was not", FACTORS),
        Suspect("query-heads", with_factor(lambda spec, *_: group(spec)), "query heads were counted, not KV heads",
                FACTORS),
        Suspect("group-size", with_factor(lambda spec, *_: group(spec) / spec.num_kv_heads),
                "num_heads // num_kv_heads was taken for the number of KV heads", FACTORS),
        Suspect("hidden-size", with_factor(lambda spec, *_: spec.hidden_size / (spec.num_kv_heads * spec.head_dim)),
                "hidden_size was taken for num_kv_heads * head_dim, which holds only without GQA", FACTORS),
        Suspect("head-dim", with_factor(lambda spec, *_: (spec.hidden_size // spec.num_heads) / spec.head_dim),
                "hidden_size // num_heads was taken for head_dim, which a model may set otherwise", FACTORS),
        Suspect("hidden-size", with_factor(lambda spec, *_: spec.hidden_size / (spec.num_heads * spec.head_dim)),
                "hidden_size * num_kv_heads / num_heads was taken for num_kv_heads * head_dim; head_dim may be another",
                FACTORS),
        Suspect("k-only", with_factor(lambda spec, *_: group(spec) / 2),
                "K was counted and V was not, and query heads were counted, not KV heads", FACTORS),
        Suspect("one-layer", with_factor(lambda spec, *_: 1 / spec.num_layers), "one layer was counted", FACTORS),
        Suspect("one-row", with_factor(lambda spec, tokens, batch, size: 1 / batch), "the batch was left out", FACTORS),
        Suspect("one-token", with_factor(lambda spec, tokens, batch, size: 1 / tokens),
                "the number of tokens was left out", FACTORS),
        *written_down(),
    )  # fmt: skip

    def examine(self, answer: Callable) -> None:
        """Two models, and each number changed alone."""
        alone = [
            replace(ODD, num_layers=13), replace(ODD, num_heads=21), replace(ODD, num_kv_heads=5),
            replace(ODD, head_dim=58), replace(ODD, hidden_size=323),
        ]  # fmt: skip
        cases = [(ODD, 31, 37, 4), (ODD, 31, 37, 2), (ODD, 41, 37, 4), (ODD, 31, 29, 4), (WIDE, 31, 37, 4)]
        cases += [(each, 31, 37, 4) for each in alone]
        cases += [(ODD, 1, 37, 4), (ODD, 31, 1, 4), (ODD, 1_000_003, 257, 1)]
        cases += hidden(lambda chance: (
            replace(ODD, num_layers=chance.randint(1, 90), head_dim=2 * chance.randint(1, 90)),
            chance.randint(1, 9_999), chance.randint(1, 99), chance.choice((1, 2, 4, 8)),
        ))  # fmt: skip
        self.check_names(answer, cases[0])
        judge(
            type(self), answer, cache_bytes, cases, self.suspects, what="the cache in bytes", whole=True,
            otherwise="factors",
        )  # fmt: skip

    def check_names(self, answer: Callable, case: tuple) -> None:
        """An attribute of the spec that is None here was multiplied: its likeliest is `layers`."""
        try:
            self.call(answer, *case)
        except NotYet as not_yet:
            if "NoneType" not in not_yet.finding.seen:
                raise
            self.fail(
                "none-multiplied",
                seen=not_yet.finding.seen,
                cause="an attribute of spec that is None for this model was multiplied; the number of layers is "
                "num_layers, `layers` lists kinds of layers where they differ",
                look="the names in the docstring: num_layers, num_kv_heads, head_dim",
            )
