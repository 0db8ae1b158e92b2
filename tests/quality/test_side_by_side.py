"""Caches side by side answer as each would alone, or are refused. The benchmark's own test has every kind of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from labkit.cache import Cache, GrowingCache
from labkit.cache.evicting import H2O, Merging, Window
from labkit.llama import Llama
from labkit.quality.reading import read
from labkit.quality.side_by_side import logits_beside
from tests.reading import SPEC, small_model, small_text  # noqa: F401


def test_each_row_is_answered_as_by_its_cache_alone(model: Llama, tokens: Tensor) -> None:
    reading, new = read(model, tokens), torch.tensor([[5, 6, 7], [9, 8, 7], [1, 2, 3]])

    def caches() -> list[Cache]:
        evicting = [Cache.evicting(SPEC.num_layers, policy, 20, during="prompt") for policy in (H2O(), Window())]
        return [reading.given(cache) for cache in (model.cache(), *evicting)]

    together = logits_beside(model, caches(), new)
    assert torch.equal(logits_beside(model, caches(), new, last=2), together[:, -2:])
    for row, cache, own in zip(together, caches(), new, strict=True):
        # Bounded: products of one row and of three sum in another order.
        torch.testing.assert_close(row, model(own[None], cache)[0], rtol=1e-4, atol=1e-4)


MAKERS = {
    "a window": lambda model: Cache([GrowingCache(window=8) for _ in range(SPEC.num_layers)]),
    "a soft cap": lambda model: Cache([GrowingCache(soft_cap=0.5) for _ in range(SPEC.num_layers)]),
    "another scale": lambda model: Cache([GrowingCache(scale=0.1) for _ in range(SPEC.num_layers)]),
    "heads that share": lambda model: Cache.evicting(SPEC.num_layers, H2O(), 20, during="prompt", safeguard=0.2),
    "places in the cache": lambda model: Cache.evicting(
        SPEC.num_layers, H2O(), 20, during="prompt", frequencies=model.frequencies
    ),
    "packed": lambda model: Cache.quantized(SPEC.num_layers, 4, group_size=16, residual_length=16),
    "merging": lambda model: Cache.evicting(
        SPEC.num_layers, Merging(frequencies=model.frequencies, sinks=1), 20, during="prompt"
    ),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_what_makes_a_cache_special_stays_when_another_like_it_stands_beside(
    model: Llama, tokens: Tensor, make
) -> None:
    reading, new = read(model, tokens), torch.tensor([[5, 6, 7], [9, 8, 7], [1, 2, 3]])

    def caches() -> list[Cache]:
        return [reading.given(one) for one in (make(model), make(model), model.cache())]

    for row, cache, own in zip(logits_beside(model, caches(), new), caches(), new, strict=True):
        # Bounded: products of one row and of three sum in another order.
        torch.testing.assert_close(row, logits_beside(model, [cache], own[None])[0], rtol=1e-4, atol=1e-4)


def test_caches_of_other_lengths_or_that_would_evict_again_are_refused(model: Llama, tokens: Tensor) -> None:
    one, other, always = model.cache(), model.cache(), Cache.evicting(SPEC.num_layers, Window(), 10)
    model(tokens, one, last_only=True)
    model(tokens[:, :9], other, last_only=True)
    model(tokens, always, last_only=True)
    with pytest.raises(ValueError, match="equally many tokens"):
        logits_beside(model, [one, other], torch.tensor([[1], [2]]))
    with pytest.raises(ValueError, match="during"):
        logits_beside(model, [one, always], torch.tensor([[1], [2]]))
