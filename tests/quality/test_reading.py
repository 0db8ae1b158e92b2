"""A text read once stands for a text read by each cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from labkit.cache import Cache
from labkit.cache.evicting import H2O, TOVA, KeyDiff, KeyNorm, Policy, SnapKV, Window
from labkit.llama import Llama
from labkit.quality.reading import read
from tests.reading import SPEC, kept, small_model, small_text  # noqa: F401


@pytest.mark.parametrize("policy", [Window(sinks=2), KeyNorm(), KeyDiff(), H2O(), TOVA(), SnapKV(window=4)], ids=str)
def test_a_cache_that_is_given_a_reading_holds_what_it_holds_after_reading(
    model: Llama, tokens: Tensor, policy: Policy
) -> None:
    given = read(model, tokens).given(Cache.evicting(SPEC.num_layers, policy, 20, during="prompt"))
    own = Cache.evicting(SPEC.num_layers, policy, 20, during="prompt")
    model(tokens, own, last_only=True)
    assert all(map(torch.equal, kept(given), kept(own)))
    follows = torch.tensor([[7, 8, 9]])
    # Bounded: K and V are the same numbers, attention over them is summed in another order of slots at most.
    torch.testing.assert_close(model(follows, given), model(follows, own), rtol=1e-5, atol=1e-5)


def test_a_readings_weights_are_those_of_each_query(model: Llama, tokens: Tensor) -> None:
    reading = read(model, tokens)
    weights = reading.weights(1, 10, 30)
    assert weights.shape == (4, 20, 30)
    assert all((weights[:, row, 11 + row :] == 0).all() for row in range(19))
    # Bounded: a softmax's weights add up to 1, each of up to 30 rounded in float32.
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4, 20), rtol=0, atol=30 * 2**-23)
    for query in range(30):  # alone, or among others: bounded by the order in which products are summed
        scores = reading.q[1][0, :, query] * 16**-0.5 @ reading.k[1][0, :, : query + 1].repeat_interleave(2, 0).mT
        want = scores.diagonal().mT.softmax(dim=-1)
        torch.testing.assert_close(reading.weights(1, query, query + 1)[:, 0], want, rtol=1e-5, atol=1e-5)
        if query >= 10:
            torch.testing.assert_close(weights[:, query - 10, : query + 1], want, rtol=1e-5, atol=1e-5)
