"""What lab 04 rebuilds a model for: other heads of keys and values, all else the same to the bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from labkit import models, prepacked
from labkit.labs.lab04.material import rebuilt
from labkit.specs import ModelSpec

SPEC = ModelSpec("small", 2, 4, 2, 32, 128, 512, 600, 256)  # weights large enough to be prepacked


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gain", [1.0, 9.0], ids=["plain", "prepacked"])
def test_a_model_rebuilt_from_its_own_weights_gives_the_same_logits_to_the_bit(gain, bias, monkeypatch) -> None:
    """Also where products go another way, which a short measurement decides anew in every process."""
    monkeypatch.setattr(prepacked, "float32_gain", lambda: gain)
    monkeypatch.setattr(prepacked, "least_gain", lambda: 1.5)
    model = models.random(dataclasses.replace(SPEC, qkv_bias=bias))
    other = rebuilt(model, lambda layer, k, v: (k, v))
    assert model.is_prepacked == other.is_prepacked == (gain > 1.5)
    tokens = torch.randint(0, SPEC.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    assert torch.equal(other(tokens), model(tokens))  # exact
    assert other.blocks[1].mlp is model.blocks[1].mlp  # shared, as the lab says, also where weights are prepacked
    assert other.blocks[1].attention.qkv is not model.blocks[1].attention.qkv
