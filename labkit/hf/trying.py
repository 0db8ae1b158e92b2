"""A few tokens through a model, to see how it goes: nothing of it stays behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def tokens_of(model: PreTrainedModel, thirds: Sequence[int]) -> Tensor:
    """Tokens that the model knows, int `[1, len(thirds)]`: each so many thirds into its vocabulary."""
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    return torch.tensor([thirds], device=embedding.device) * (len(embedding) // 3)


def failure(model: PreTrainedModel, tokens: Tensor, cache: Any) -> Exception | None:
    """What the model raised over these tokens with this cache; None when it took them."""
    # Not compiled for this, and a model in train() must not draw other numbers afterwards.
    with torch.no_grad(), torch.random.fork_rng(enabled=model.training), torch.compiler.set_stance("force_eager"):
        try:
            model(input_ids=tokens, past_key_values=cache, use_cache=True)
        except Exception as error:
            return error
    return None
