"""What the checks of lab 02 try answers with."""

from __future__ import annotations

import torch
from torch import Tensor

from labkit.llama import Llama
from labkit.specs import ModelSpec

BATCH, HEADS, HEAD_DIM = 2, 3, 4  # of the small tensors that the caches are tried with


def new_tokens(count: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Random K and V of `count` tokens."""
    shape = (BATCH, HEADS, count, HEAD_DIM)
    return torch.randn(shape).to(dtype).to(device), torch.randn(shape).to(dtype).to(device)


def tiny_model(num_heads: int = 6, num_kv_heads: int = 2, head_dim: int = 8, *, vocab_size: int = 97) -> Llama:
    """A float64 model of two layers whose attention is sharp enough that a wrong position shows."""
    spec = ModelSpec(
        name="tiny", num_layers=2, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        hidden_size=num_heads * head_dim, intermediate_size=64, vocab_size=vocab_size, max_seq_len=128,
    )  # fmt: skip
    model = Llama(spec).double()
    for block in model.blocks:
        block.attention.qkv.weight.mul_(3)
    return model
