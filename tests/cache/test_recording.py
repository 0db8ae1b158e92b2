"""The cache that can be looked into, against the oracle and against the cache it extends."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit import models
from labkit.attention import attention
from labkit.cache import Cache, GrowingCache
from labkit.cache.recording import RecordingCache
from labkit.cache.step import rectangle
from tests.bounds import attention_bound
from tests.shapes import TINY


def fill(cache: GrowingCache, chunks: list[int], seed: int = 0) -> list[torch.Tensor]:
    """Append and attend chunk by chunk; the outputs of `attend`. 6 query heads, 2 KV heads, batch 2."""
    generator = torch.Generator().manual_seed(seed)
    outputs = []
    for count in chunks:
        k, v = torch.randn(2, 2, 2, count, 8, generator=generator)
        cache.append(k, v)
        outputs.append(cache.attend(torch.randn(2, 6, count, 8, generator=generator)))
    return outputs


@given(chunks=st.lists(st.integers(1, 5), min_size=1, max_size=4), window=st.sampled_from([None, 1, 3]))
def test_output_and_counters_are_those_of_the_growing_cache(chunks: list[int], window: int | None) -> None:
    plain, recording = GrowingCache(window=window), RecordingCache(window=window)
    pairs = zip(fill(plain, chunks), fill(recording, chunks), strict=True)
    k, v = plain.held()
    bound = attention_bound(torch.full((2, 6, 1, 8), 6.0), k, v)  # bounded: no entry of a normal q exceeds 6
    assert all((a - b).abs().max() <= bound for a, b in pairs)
    for name in ("bytes_written", "bytes_copied", "bytes_read", "nbytes", "seq_len"):
        assert getattr(plain, name) == getattr(recording, name), name


@given(chunks=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_weights_are_the_oracles_for_the_last_attend(chunks: list[int]) -> None:
    cache = RecordingCache()
    generator = torch.Generator().manual_seed(1)
    for count in chunks:
        k, v = torch.randn(2, 2, 2, count, 8, generator=generator)
        cache.append(k, v)
        q = torch.randn(2, 6, count, 8, generator=generator)
        cache.attend(q)
    _, want = attention(q, *cache.held(), return_weights=True)
    assert cache.weights.shape == (2, 6, chunks[-1], sum(chunks))
    assert torch.equal(cache.weights, want)  # exact: the same computation


def test_with_the_mask_off_every_query_sees_every_key() -> None:
    cache = RecordingCache(causal=False)
    fill(cache, [4])
    assert (cache.weights > 0).all()
    on = RecordingCache()
    fill(on, [4])
    assert (on.weights.triu(1) == 0).all()


def test_padding_reaches_the_weights() -> None:
    cache, step = Cache.of(1, RecordingCache), rectangle(2, 4, padding=[0, 2])
    cache[0].append(*torch.randn(2, 2, 2, 4, 8), step)
    cache[0].attend(torch.randn(2, 6, 4, 8), step)
    assert (cache.layers[0].weights[1, :, :, :2] == 0).all()
    assert (cache.layers[0].weights[0, :, :, 0] > 0).all()


def test_reset_forgets_the_weights() -> None:
    cache = RecordingCache()
    fill(cache, [2])
    cache.reset()
    assert cache.weights is None
    assert cache.seq_len == 0


def test_a_window_without_the_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="causal=True"):
        RecordingCache(causal=False, window=4)


def test_old_keys_stay_with_the_mask_and_change_without_it_below_the_first_layer() -> None:
    model = models.random(replace(TINY, num_layers=3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)  # attention far from uniform
    tokens = torch.arange(12)[None] * 3 % 50

    def change(causal: bool) -> list[float]:
        short, long = (Cache.of(3, lambda: RecordingCache(causal=causal)) for _ in range(2))
        model(tokens[:, :7], short)
        model(tokens, long)
        pairs = [(a.held()[0], b.held()[0][:, :, :7]) for a, b in zip(short.layers, long.layers, strict=True)]
        return [((b - a).norm() / a.norm()).item() for a, b in pairs]

    # bounded: float64 keeps 16 digits, three layers of sums of at most 64 terms leave more than 10
    assert max(change(causal=True)) < 1e-10
    first, *deeper = change(causal=False)
    assert first < 1e-10
    assert min(deeper) > 1e-3
