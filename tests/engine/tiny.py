"""A model small enough to run thousands of passes, and what it answers to one request alone."""

from __future__ import annotations

import functools

import torch

from labkit import models
from labkit.engine import Request
from labkit.generation import generate
from labkit.llama import Llama
from labkit.specs import ModelSpec

VOCAB = 13


@functools.cache
def model(dtype: torch.dtype = torch.float64, window: int | None = None) -> Llama:
    """Random weights, so wide that attention is far from uniform. In float64 no two logits are within a rounding."""
    spec = ModelSpec(
        "tiny", num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, hidden_size=24, intermediate_size=40,
        vocab_size=VOCAB, max_seq_len=64, window=window,
    )  # fmt: skip
    made = models.random(spec, dtype, prepack=False)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(15)
    return made


@functools.cache
def long_answer(tokens: tuple[int, ...], temperature: float, seed: int, made: Llama) -> list[int]:
    """The answer as far as the model's positions go."""
    count = min(20, made.spec.max_seq_len - len(tokens))
    told = generate(made, torch.tensor([tokens]), count, cache=made.cache(), temperature=temperature, seed=seed)
    return told.tokens[0].tolist()


def alone(request: Request, made: Llama | None = None) -> list[int]:
    """What one-at-a-time generation answers."""
    answer = long_answer(request.tokens, request.temperature, request.seed or 0, made or model())
    answer = answer[: request.max_new_tokens]
    ends = [place for place, token in enumerate(answer) if token in request.stop]
    return answer[: ends[0]] if ends else answer
