"""A text read once, and given to any number of caches without running the model again.

What a layer hands its cache while a prompt is read, q, K and V, is the same whatever cache evicts at the prompt's end.
So it is written down in one pass, and `given` hands it to other caches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from labkit.cache import Cache, EvictingCache, GrowingCache
from labkit.cache.evicting import Held, Notes, Policy, Seen
from labkit.cache.layer import Observer
from labkit.cache.step import Step
from labkit.llama import Llama


class Noting(GrowingCache):
    """A growing cache that keeps the queries too."""

    q: Tensor | None = None

    def attend(self, q: Tensor, step: Step | None = None, *, observe: Observer | None = None) -> Tensor:
        """As every cache does; `q` holds the queries afterwards."""
        self.q = q
        return super().attend(q, step, observe=observe)


@dataclass(frozen=True, eq=False)
class Reading:
    """What the layers' attention was given. tokens: int `[1, tokens]`. q: of each layer, `[1, num_heads, tokens,
    head_dim]`; k, v: `[1, num_kv_heads, tokens, head_dim]`; q and k turned by RoPE.
    """

    tokens: Tensor
    q: tuple[Tensor, ...]
    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]

    @torch.inference_mode()
    def given(self, cache: Cache) -> Cache:
        """This cache, having read the text in one step: it evicts what it evicts."""
        with cache.step([self.tokens.shape[1]]) as step:
            for layer, q, k, v in zip(cache.layers, self.q, self.k, self.v, strict=True):
                layer.append(k, v, step)
                layer.attend(q, step)
        return cache

    def weights(self, layer: int, start: int, stop: int) -> Tensor:
        """Attention's weights of the queries from `start` up to `stop`, `[num_heads, stop - start, stop]`."""
        cache = GrowingCache()
        found: list[Tensor] = []
        cache.append(self.k[layer][:, :, :stop], self.v[layer][:, :, :stop])
        cache.attend(self.q[layer][:, :, start:stop], observe=found.append)
        return found[0][0]


@torch.inference_mode()
def read(model: Llama, tokens: Tensor) -> Reading:
    """The text's pass through the model, written down."""
    layers = [Noting() for _ in range(model.spec.num_layers)]
    model(tokens, Cache(layers), last_only=True)
    held = [layer.read() for layer in layers]
    queries = tuple(layer.q for layer in layers if layer.q is not None)
    return Reading(tokens, queries, tuple(k for k, _ in held), tuple(v for _, v in held))


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
