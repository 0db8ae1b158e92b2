"""The two ways around a small cache that lab 05 measures with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from labkit.labs.lab05.material import FirstPassExact, WithSinks


class Halves:
    """Holds tokens and gives half of each number back: what was quantized is told apart from what was not."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor]] = []

    def append(self, k: Tensor, v: Tensor) -> None:
        self.parts.append((k / 2, v / 2))

    def read(self) -> tuple[Tensor, Tensor]:
        return torch.cat([k for k, _ in self.parts], dim=2), torch.cat([v for _, v in self.parts], dim=2)


@pytest.fixture
def tokens() -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, 1, 2, 9, 4, generator=torch.Generator().manual_seed(0))
    return k, v


@pytest.mark.parametrize("pieces", [[9], [1] * 9, [2, 5, 2], [3, 6]], ids=str)
def test_sinks_are_exact_and_the_others_in_the_cache_behind(pieces: list[int], tokens) -> None:
    cache = WithSinks(Halves(), 3)
    seen = 0
    for k, v in zip(*(x.split(pieces, dim=2) for x in tokens), strict=True):
        cache.append(k, v)
        seen += k.shape[2]
        for got, x in zip(cache.read(), tokens, strict=True):
            assert torch.equal(got, torch.cat((x[:, :, :3], x[:, :, 3:] / 2), dim=2)[:, :, :seen])


def test_the_first_pass_is_exact_until_the_second_one_comes(tokens) -> None:
    cache = FirstPassExact(Halves())
    first, second = (x[:, :, :6] for x in tokens), (x[:, :, 6:] for x in tokens)
    cache.append(*first)
    for got, x in zip(cache.read(), tokens, strict=True):
        assert torch.equal(got, x[:, :, :6])
    cache.append(*second)
    for got, x in zip(cache.read(), tokens, strict=True):
        assert torch.equal(got, x / 2)
