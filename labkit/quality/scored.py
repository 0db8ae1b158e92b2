"""A policy's look at a text, taken once for every budget: budgets differ in how many are kept, not in the scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from labkit.cache.evicting import Held, Notes, Policy, Seen


def scored_once(policy: Policy) -> Policy:
    """The policy for several budgets of one reading: `Scored`, or as it is where it scores what it has merged."""
    return policy if policy.merges else Scored(policy=policy)


@dataclass(frozen=True, eq=False, kw_only=True)
class Scored(Policy):
    """A policy whose notes and scores of one reading are made once for all budgets, on which they do not depend.

    For caches that evict once, `during="prompt"`. Raises ValueError for a policy that merges, and where it is shown
    other keys than the first time.
    """

    policy: Policy
    known: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.policy.merges:
            raise ValueError(f"{type(self.policy).__name__} scores what it has merged, which its budget decides: take "
                             "it as it is")  # fmt: skip
        for name in ("sinks", "recent"):
            object.__setattr__(self, name, getattr(self.policy, name))

    @property
    def watches(self) -> bool:
        """As the policy does."""
        return self.policy.watches

    def for_layer(self, layer: int) -> Scored:
        """The layer's own, the same for every budget."""
        return self.known.setdefault(layer, Scored(policy=self.policy.for_layer(layer)))

    def watch(self, seen: Seen) -> Notes:
        """The policy's notes."""
        return self.once("notes", self.policy.watch, seen)

    def score(self, held: Held) -> Tensor:
        """The policy's scores."""
        return self.once("scores", self.policy.score, held)

    def once(self, name: str, make: Callable[[Any], Any], shown: Held) -> Any:
        """What `make` says of what is shown, the first time that it is asked."""
        if name not in self.known:
            self.known[name] = shown.k, make(shown)
        keys, made = self.known[name]
        if not torch.equal(keys, shown.k):
            raise ValueError("a Scored is of one reading, and of caches that evict once: make one for each text")
        return made
