"""A small decoder and a text of 60 tokens for it: what the tests of a reading and of lab 07's material read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from labkit import models
from labkit.cache import Cache
from labkit.llama import Llama
from labkit.specs import ModelSpec

SPEC = ModelSpec("tiny", 3, 4, 2, 16, 48, 96, 100, 512)


@pytest.fixture(scope="module", name="model")
def small_model() -> Llama:
    return models.random(SPEC, prepack=False)


@pytest.fixture(scope="module", name="tokens")
def small_text() -> Tensor:
    return torch.randint(0, SPEC.vocab_size, (1, 60), generator=torch.Generator().manual_seed(0))


def kept(cache: Cache) -> list[Tensor]:
    """The positions that each layer holds, in order."""
    return [layer.positions.sort(dim=-1).values for layer in cache.layers]
