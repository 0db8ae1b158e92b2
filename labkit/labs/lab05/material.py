"""What lab 05 measures with: two ways around a small cache, a measured number in words, and a bar while one waits.

`rest` and `layer` have append(k, v) and read().
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from labkit import quality
from labkit.course import waiting
from labkit.course.plug import SmallCache
from labkit.llama import Llama
from labkit.quality.compare import MakeCache

Pair = tuple[Tensor, Tensor]


class WithSinks:
    """The first `sink_length` tokens in full precision, every later one in `rest`."""

    def __init__(self, rest: SmallCache, sink_length: int) -> None:
        self.rest, self.sink_length = rest, sink_length
        self.sinks: Pair | None = None
        self.rest_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add new tokens' K and V, both [batch, num_kv_heads, new_tokens, head_dim]."""
        sinks = self.sinks or (k[:, :, :0], v[:, :, :0])
        missing = self.sink_length - sinks[0].shape[2]
        self.sinks = torch.cat((sinks[0], k[:, :, :missing]), 2), torch.cat((sinks[1], v[:, :, :missing]), 2)
        if k.shape[2] > missing:
            self.rest.append(k[:, :, missing:], v[:, :, missing:])
            self.rest_len += k.shape[2] - missing

    def read(self) -> Pair:
        """K and V of every token held."""
        assert self.sinks is not None
        if not self.rest_len:
            return self.sinks
        k, v = self.rest.read()
        return torch.cat((self.sinks[0], k), 2), torch.cat((self.sinks[1], v), 2)


class FirstPassExact:
    """Gives back the first tokens as they came until more come: what the first pass sees was never quantized.

    As transformers' QuantizedLayer does: its first `update` quantizes what it is given and returns what it was given.
    """

    def __init__(self, layer: SmallCache) -> None:
        self.layer = layer
        self.first: Pair | None = None
        self.appends = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add new tokens' K and V, both [batch, num_kv_heads, new_tokens, head_dim]."""
        self.layer.append(k, v)
        self.appends += 1
        self.first = (k, v) if self.appends == 1 else None

    def read(self) -> Pair:
        """K and V of every token held."""
        return self.first or self.layer.read()


def between(value: float, low: float, high: float) -> str:
    """A measured number, told so that two machines say the same: the range if it lies in it, else the number."""
    return f"{low:g} to {high:g}" if low <= value <= high else f"{value:.3g}"


class Counting:
    """A model that moves a bar on at each pass. `passes`: how many there will be, None where nobody knows."""

    def __init__(self, model: Llama, passes: int | None = None) -> None:
        self.model, self.device, self.cache = model, model.device, model.cache
        self.bar = waiting.bar(None, "passes through the model", total=passes)

    def __call__(self, tokens: Tensor, cache: Any) -> Tensor:
        """One pass of the model."""
        self.bar.update()
        return self.model(tokens, cache)

    def __enter__(self) -> Counting:
        return self

    def __exit__(self, *raised: object) -> None:
        self.bar.close()


def compare(
    model: Llama, tokens: Tensor, caches: Mapping[str, MakeCache], *, chunk: int, context: int
) -> dict[str, quality.Quality]:
    """`quality.compare`, with a row of one batch for every cache, and a bar while it runs."""
    passes = len(list(quality.passes(tokens.shape[1], chunk, context)))
    with Counting(model, passes) as counting:
        return quality.compare(counting, tokens, caches, chunk=chunk, context=context, one_batch=True)
