"""A policy that has looked at a text once stands for one that looks on for every budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from labkit.cache import Cache
from labkit.cache.evicting import (
    H2O,
    TOVA,
    ExpectedAttention,
    KeyDiff,
    KeyNorm,
    Merging,
    Policy,
    Random,
    SnapKV,
    Window,
)
from labkit.llama import Llama
from labkit.quality.reading import read
from labkit.quality.scored import Scored, scored_once
from tests.reading import SPEC, kept, small_model, small_text  # noqa: F401


def test_it_is_of_one_reading_and_no_policy_that_merges(model: Llama, tokens: Tensor) -> None:
    once = Scored(policy=H2O())
    read(model, tokens).given(Cache.evicting(SPEC.num_layers, once, 20, during="prompt"))
    with pytest.raises(ValueError, match="of one reading"):
        read(model, tokens.flip(1)).given(Cache.evicting(SPEC.num_layers, once, 20, during="prompt"))
    merging = Merging(frequencies=model.frequencies)
    assert scored_once(merging) is merging
    with pytest.raises(ValueError, match="scores what it has merged"):
        Scored(policy=merging)


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
