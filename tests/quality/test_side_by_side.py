"""Caches side by side answer as each would alone, or are refused. The benchmark's own test has every kind of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from labkit.cache import Cache, GrowingCache
from labkit.cache.evicting import H2O, Held, KeyNorm, Merging, Window
from labkit.llama import Llama
from labkit.quality.reading import read
from labkit.quality.side_by_side import Beside, logits_beside
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
    padded = model.cache()
    model(tokens[:, :9], padded, padding=[2])
    with pytest.raises(ValueError, match="no padding"):
        logits_beside(model, [other, padded], torch.tensor([[1], [2]]))
    with pytest.raises(ValueError, match="have read a text"):
        logits_beside(model, [model.cache(), model.cache()], torch.tensor([[1], [2]]))


def test_the_rows_of_a_batch_through_caches_that_evict_on_are_those_of_each_alone(model: Llama, tokens: Tensor) -> None:
    def caches() -> list[Cache]:
        return [model.cache(), *(Cache.evicting(SPEC.num_layers, policy, 20) for policy in (H2O(), Window()))]

    beside, alone = Beside(caches()), caches()
    for part in tokens[:, :32].split([25, 1, 1, 5], dim=1):
        together = model(part.expand(3, -1), beside)
        for row, cache in zip(together, alone, strict=True):
            # Bounded: products of one row and of three sum in another order.
            torch.testing.assert_close(row, model(part, cache)[0], rtol=1e-4, atol=1e-4)
    assert [cache.nbytes for cache in beside.caches] == [cache.nbytes for cache in alone]
    for mine, own in zip(beside.caches[1:], alone[1:], strict=True):
        assert all(torch.equal(a.positions, b.positions) for a, b in zip(mine.layers, own.layers, strict=True))


def test_where_one_row_fails_every_cache_of_the_batch_is_as_it_was(model: Llama, tokens: Tensor) -> None:
    small = Cache.preallocated(SPEC.num_layers, 10)
    beside = Beside([model.cache(), small])
    model(tokens[:, :8].expand(2, -1), beside)
    with pytest.raises(ValueError, match="10"):
        model(tokens[:, 8:12].expand(2, -1), beside)
    assert [cache.lengths for cache in beside.caches] == [(8,), (8,)]
    model(tokens[:, 8:10].expand(2, -1), beside)


class Fails(KeyNorm):
    """A policy whose scores cannot be made any more, once it is told."""

    def score(self, held: Held) -> Tensor:
        if failing:
            raise MemoryError
        return super().score(held)


failing: list[bool] = []


def test_where_the_end_of_one_rows_step_fails_no_cache_of_the_batch_has_evicted(model: Llama, tokens: Tensor) -> None:
    policies = Fails(), H2O(), Fails()
    beside = Beside([Cache.evicting(SPEC.num_layers, policy, 12) for policy in policies])
    model(tokens[:, :20].expand(3, -1), beside)

    def held() -> list[Tensor]:
        return [x.clone() for cache in beside.caches for layer in cache.layers for x in (layer.positions, layer.kept.k)]

    was = held()
    failing.append(True)
    try:
        with pytest.raises(MemoryError):
            model(tokens[:, 20:21].expand(3, -1), beside)
    finally:
        failing.clear()
    assert [cache.lengths for cache in beside.caches] == [(20,)] * 3
    assert all(map(torch.equal, was, held()))
    again = model(tokens[:, 20:21].expand(3, -1), beside)
    alone = Cache.evicting(SPEC.num_layers, H2O(), 12)
    model(tokens[:, :20], alone)
    # Bounded: products of one row and of three sum in another order.
    torch.testing.assert_close(again[1], model(tokens[:, 20:21], alone)[0], rtol=1e-4, atol=1e-4)


def test_a_cache_that_was_given_tokens_of_its_own_is_no_row_of_the_batch_any_more(model: Llama, tokens: Tensor) -> None:
    for padding, reason in ((None, "equally many tokens"), ([2], "no padding")):
        caches = [model.cache(), model.cache()]
        beside = Beside(caches)
        model(tokens[:, :5], caches[0], padding=padding)
        if padding:
            model(tokens[:, :5], caches[1])
        with pytest.raises(ValueError, match=reason):
            model(tokens[:, 5:7].expand(2, -1), beside)


def test_what_cannot_be_rows_of_one_batch_is_refused_with_the_reason(model: Llama, tokens: Tensor) -> None:
    filled, padded, two = model.cache(), model.cache(), model.cache()
    model(tokens[:, :5], filled)
    model(tokens[:, :5], padded, padding=[2])
    model(tokens[:, :5].expand(2, -1), two)
    for caches, reason in [
        ([model.cache(), []], "a list"),
        ([model.cache(), filled], "equally many tokens"),
        ([two], "one row each"),
        ([filled, filled], "given twice"),
        ([], "there is none"),
        ([padded, filled], "no padding"),
        ([model.cache(), Cache.growing(SPEC.num_layers + 1)], "layers"),
    ]:
        with pytest.raises(ValueError, match=reason):
            Beside(caches)
    with pytest.raises(ValueError, match="3 rows"):
        model(tokens[:, :2].expand(2, -1), Beside([model.cache() for _ in range(3)]))
    with pytest.raises(ValueError, match="window"):
        model(tokens[:, :2], Beside([Cache([GrowingCache(window=8) for _ in range(SPEC.num_layers)])]))
