"""What the tests of quality measure: a model whose damaged keys show, and caches that damage them."""

from __future__ import annotations

import torch
from torch import Tensor

from labkit import models
from labkit.cache import Cache, GrowingCache, Step
from labkit.llama import Llama
from tests.shapes import TINY as SPEC


class CoarseCache(GrowingCache):
    """Keeps the signs of K alone, times one size: two levels."""

    def write(self, k: Tensor, v: Tensor, step: Step) -> None:
        super().write(k.sign() * k.abs().mean(), v, step)


class LateCache(CoarseCache):
    """Coarse, but its first pass attends to what it was given: as Hugging Face's QuantizedCache does."""

    def attend(self, q: Tensor, step: Step | None = None, **options) -> Tensor:
        if self.seq_len > q.shape[2]:
            return super().attend(q, step, **options)
        exact = GrowingCache()
        exact.append(*self.given)
        return exact.attend(q)

    def write(self, k: Tensor, v: Tensor, step: Step) -> None:
        self.given = k, v
        super().write(k, v, step)


def make(layer) -> Cache:
    return Cache.of(SPEC.num_layers, layer)


def wide(dtype: torch.dtype = torch.float64) -> Llama:
    """A random model with weights wide enough that damaged keys show in its logits."""
    model = models.random(SPEC, dtype=dtype, prepack=False)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.mul_(12)
    return model


def text(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, SPEC.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))


def surprise(logits: Tensor, tokens: Tensor) -> Tensor:
    """-log p of each token but the first, `[tokens - 1]`, written out."""
    wanted = logits[0, :-1].double().gather(1, tokens[0, 1:, None])[:, 0]
    return logits[0, :-1].double().logsumexp(dim=-1) - wanted
