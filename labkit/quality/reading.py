"""A text read once, and given to any number of caches without running the model again.

What a layer hands its cache while a prompt is read, q, K and V, is the same whatever cache evicts at the prompt's end.
So it is written down in one pass, and `given` hands it to other caches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.cache import Cache, EvictingCache, GrowingCache, SelectingCache
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
                if isinstance(layer, EvictingCache):
                    layer.look(q, step)  # of the answer nothing would come
                elif not isinstance(layer, SelectingCache):
                    layer.attend(q, step)
        return cache

    def first(self, tokens: int) -> Reading:
        """The reading of the first tokens alone, which is the same: nobody sees what comes later. Views."""
        cut = [tuple(x[:, :, :tokens] for x in side) for side in (self.q, self.k, self.v)]
        return Reading(self.tokens[:, :tokens], *cut)

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
