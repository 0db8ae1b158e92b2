"""What lab 07 measures with: losses along a text, a policy made of a function, who holds a position, and steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from labkit.cache import Cache, EvictingCache
from labkit.cache.evicting import Held, Notes, Policy, Seen
from labkit.llama import Llama
from labkit.measure import Timing


@torch.inference_mode()
def losses(model: Llama, tokens: Tensor, cache: Cache, chunk: int = 16) -> Tensor:
    """Minus the log-probability of each next token, in nats, `[tokens - 1]`, the text read `chunk` tokens a step."""
    found = []
    for start in range(0, tokens.shape[1] - 1, chunk):
        given = tokens[:, start : min(start + chunk, tokens.shape[1] - 1)]
        logs = model(given, cache)[0].double().log_softmax(dim=-1)
        following = tokens[0, start + 1 : start + 1 + given.shape[1], None]
        found.append(-logs.gather(1, following)[:, 0])
    return torch.cat(found).cpu()


def by_queries(function: Callable[[Tensor, Tensor], Tensor], **options: Any) -> Policy:
    """A policy that scores tokens at a prompt's end by `function(q, k)`, `[batch, num_kv_heads, tokens]`. The options
    are those of every policy: sinks and recent."""
    return ByQueries(**options, function=function)


@dataclass(frozen=True, eq=False, kw_only=True)
class ByQueries(Policy):
    """Scores of one step's queries and keys."""

    function: Callable[[Tensor, Tensor], Tensor]

    def watch(self, seen: Seen) -> Notes:
        """What the function says."""
        return Notes(self.function(seen.q, seen.k))

    def score(self, held: Held) -> Tensor:
        """That."""
        return held.tally


def kept_share(cache: Cache, tokens: int) -> list[float]:
    """Of each position of a text, which share of all the layers' KV heads hold it."""
    counts, heads = torch.zeros(tokens), 0
    for layer in cache.layers:
        assert isinstance(layer, EvictingCache)
        assert layer.positions is not None
        places = layer.positions[0]
        heads += places.shape[0]
        counts += torch.bincount(places[places >= 0].long().cpu(), minlength=tokens)  # -1: a slot without a token
    return (counts / heads).tolist()


@torch.inference_mode()
def filled(cache: Cache, model: Llama, tokens: int) -> Cache:
    """The cache, having seen so many tokens of random K and V, the same in every layer, in one step: for clocks."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 1, model.spec.num_kv_heads, tokens, model.spec.head_dim)
    k, v = torch.randn(shape, generator=generator).to(model.device, model.dtype)
    with cache.step([tokens]) as step:
        for layer in cache.layers:
            layer.append(k, v, step)
    return cache


def times_as_fast(full: Timing, own: Timing) -> tuple[float, float]:
    """How many times as long a full cache's step takes as an evicting one's, and the spread of that."""
    ratio = full.median / own.median
    return ratio, ratio * math.hypot(full.spread / full.median, own.spread / own.median)


def begins_to_pay(lengths: Sequence[int], full: Sequence[Timing], own: Sequence[Timing]) -> str:
    """Between which lengths an evicting cache's step gets faster for good, by more than the spread."""
    times = [times_as_fast(*pair) for pair in zip(full, own, strict=True)]
    loses = [index for index, (ratio, spread) in enumerate(times) if ratio - spread <= 1]
    if not loses:
        return f"pays from {lengths[0]:,} tokens on"
    if loses[-1] == len(lengths) - 1:
        return f"does not pay up to {lengths[-1]:,} tokens"
    return f"pays from between {lengths[loses[-1]]:,} and {lengths[loses[-1] + 1]:,} tokens on"
