"""The caches that `benchmarks.eviction` sets beside each other, and what its parts do with them alike."""

from __future__ import annotations

import sys
import time

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
from labkit.quality.side_by_side import logits_beside
from labkit.specs import ModelSpec

SHARES = (1.0, 0.5, 0.25, 0.12)
PAGE = 16  # tokens to a page of Quest's
BEGAN = time.perf_counter()


def policies(model: Llama, seed: int = 0) -> dict[str, Policy]:
    """Every policy, by the name that it has in figures. seed: of the one that draws."""
    return {
        "SnapKV": SnapKV(window=32),
        "SnapKV, window of 64": SnapKV(),
        "SnapKV for a question": SnapKV(window=4, pool=13, pool_by="max", sinks=4),
        "H2O": H2O(),
        "H2O, mean": H2O(recent=0, mean=True),
        "KeyDiff": KeyDiff(),
        "expected attention": ExpectedAttention(frequencies=model.frequencies),
        "TOVA": TOVA(),
        "sinks and window": Window(sinks=4),
        "key norm": KeyNorm(),
        "merging": Merging(frequencies=model.frequencies),
        "random": Random(seed=seed),
    }


def quest(model: Llama, tokens: int, whole: int = 0) -> Cache:
    """A cache that keeps all and reads so many tokens in every layer but the first `whole`, in the paper 2."""
    budget = max(tokens, 2 * PAGE)
    return Cache.selecting(model.spec.num_layers, lambda layer: budget if layer >= whole else 10**9, page_size=PAGE)


def logits_of(model: Llama, tokens: Tensor, cache: Cache) -> Tensor:
    """Of each token, `[tokens, vocab_size]`; one by one where the cache reads less in a step of one token alone."""
    if any(layer.selects for layer in cache.layers):
        return logits_beside(model, [cache], tokens)[0]
    return model(tokens, cache)[0]


def filled(cache: Cache, spec: ModelSpec, tokens: int) -> Cache:
    """The cache with so many random tokens, in one step."""
    generator = torch.Generator().manual_seed(0)
    with cache.step([tokens]) as step:
        for layer in cache.layers:
            k, v = torch.randn(2, 1, spec.num_kv_heads, tokens, spec.head_dim, generator=generator)
            layer.append(k, v, step)
    return cache


def step_of_caches(cache: Cache, spec: ModelSpec) -> None:
    """One token through the layers of a cache, without the model's products."""
    generator = torch.Generator().manual_seed(cache.seq_len)
    k, v = torch.randn(2, 1, spec.num_kv_heads, 1, spec.head_dim, generator=generator)
    q = torch.randn(1, spec.num_heads, 1, spec.head_dim, generator=generator)
    with cache.step([1]) as step:
        for layer in cache.layers:
            layer.append(k, v, step)
            layer.attend(q, step)


def progress(done: str) -> None:
    """What is done, and after how many seconds, to stderr: the figures are stdout's."""
    print(f"[{time.perf_counter() - BEGAN:6.0f} s] {done}", file=sys.stderr, flush=True)
