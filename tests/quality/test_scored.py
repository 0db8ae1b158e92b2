"""A policy that has looked at a text once stands for one that looks on for every budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from labkit.cache import Cache
from labkit.cache.evicting import H2O, TOVA, ExpectedAttention, KeyDiff, KeyNorm, Policy, Random, SnapKV, Window
from labkit.llama import Llama
from labkit.quality.reading import read
from labkit.quality.scored import Scored
from tests.reading import SPEC, kept, small_model, small_text  # noqa: F401


@pytest.mark.parametrize(
    "policy",
    [H2O(), TOVA(), SnapKV(window=4, pool=5), KeyDiff(), KeyNorm(), Window(sinks=4), Random(seed=3), None],
    ids=lambda policy: type(policy).__name__,
)
def test_it_keeps_what_the_policy_keeps_whatever_the_budget(
    model: Llama, tokens: Tensor, policy: Policy | None
) -> None:
    policy = policy or ExpectedAttention(frequencies=model.frequencies)
    reading, once = read(model, tokens), Scored(policy=policy)
    for budget in (0.5, 0.25, 0.12):
        own, given = (Cache.evicting(SPEC.num_layers, one, budget, during="prompt") for one in (policy, once))
        model(tokens, own, last_only=True)
        assert all(map(torch.equal, kept(own), kept(reading.given(given))))  # exact
