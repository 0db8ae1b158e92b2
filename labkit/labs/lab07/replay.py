"""A policy's look at a prompt, taken once for every budget: budgets differ in how many are kept, not in the scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from labkit.cache.evicting import Held, Notes, Policy, Seen
from labkit.cache.step import Step
from labkit.llama import Llama
from labkit.quality.reading import Reading


@dataclass(frozen=True, eq=False, kw_only=True)
class Replayed(Policy):
    """A policy, with what it noted of one layer of a prompt: it need not look on again."""

    policy: Policy
    notes: Notes

    def score(self, held: Held) -> Tensor:
        """The policy's, from these notes."""
        return self.policy.score(replace(held, notes=self.notes))


@torch.inference_mode()
def replayed(model: Llama, reading: Reading, policy: Policy) -> Callable[[int], Policy]:
    """Of each layer the policy, as it has seen this text: what `Cache.evicting(..., during="prompt")` takes, with any
    budget, for `reading.given`."""
    tokens = reading.tokens.shape[1]
    step = Step((tokens,), (0,))
    made = []
    for index, (q, k, v) in enumerate(zip(reading.q, reading.k, reading.v, strict=True)):
        own = policy.for_layer(index)
        seen = Seen(
            k, v, step.key_positions(k.shape[1], k.device), tokens - 1, model.blocks[index].attention.constants,
            Notes(), q, step.text_positions(q.device), step.visible,
        )  # fmt: skip
        made.append(Replayed(policy=own, notes=own.watch(seen), sinks=own.sinks, recent=own.recent))
    return made.__getitem__
