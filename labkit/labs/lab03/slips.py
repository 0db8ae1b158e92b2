"""Slips: a formula whose steps can each be taken in another way, and what every one or two of these ways come to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from labkit.course.checks.suspects import Suspect
from labkit.specs import ModelSpec


@dataclass(frozen=True, eq=False)
class Slip:
    """One step taken in another way. takes: what the formula gets in its place."""

    diagnosis: str
    takes: Any
    cause: str
    look: str


def suspects_of(formula: Callable[..., Callable], slips: Mapping[str, Sequence[Slip]]) -> list[Suspect]:
    """Every slip alone, then every two slips in different steps, in the order given.

    formula: by keyword, a step each, what it takes; right where nothing is given. slips: by the name of the step.
    """
    single = [(step, slip) for step, several in slips.items() for slip in several]
    alone = [Suspect(slip.diagnosis, formula(**{step: slip.takes}), slip.cause, slip.look) for step, slip in single]
    pairs = [
        Suspect(
            one.diagnosis,
            formula(**{step: one.takes, other_step: other.takes}),
            f"two things: {one.cause}; and {other.cause}",
            f"first {one.look}; then {other.look}",
        )
        for (step, one), (other_step, other) in combinations(single, 2)
        if step != other_step
    ]
    return [*alone, *pairs]


def shape(
    name: str,
    sizes: tuple[int, int, int, int, int],
    *,
    mlp: int = 13,
    vocabulary: int = 17,
    trained: int = 64,
    **more: Any,
) -> ModelSpec:
    """A small model to count. sizes: layers, query heads, KV heads, head_dim, hidden_size. mlp: intermediate_size.
    trained: max_seq_len. more: what else its spec says."""
    layers, heads, kv_heads, head_dim, hidden = sizes
    return ModelSpec(
        name, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, hidden_size=hidden,
        intermediate_size=mlp, vocab_size=vocabulary, max_seq_len=trained, **more,
    )  # fmt: skip


def remembered(formula: Callable[..., float], first: ModelSpec) -> Suspect:
    """What `formula` gives when whatever model comes is taken for `first`, as code does that knows a model by name."""
    return Suspect(
        "remembered",
        lambda spec, *others: formula(first, *others),
        "the sizes of an earlier model of this name were used",
        "what outlives a call: a global, a default argument, a cache decorator. Two models may have one name",
    )
