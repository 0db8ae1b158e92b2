"""What lab 05 measures with: two ways around a small cache, a range in words, a model that counts its passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from labkit import models, quality
from labkit.cache import Cache
from labkit.course import waiting
from labkit.labs.lab05.material import Counting, FirstPassExact, WithSinks, between, compare
from labkit.specs import ModelSpec


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


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.0, "0 to 0.02"), (0.02, "0 to 0.02"), (0.0213, "0.0213"), (-1.0, "-1"), (float("nan"), "nan")],
)
def test_a_number_is_told_as_its_range_or_as_itself(value: float, said: str) -> None:
    assert between(value, 0, 0.02) == said


@pytest.fixture
def bars(monkeypatch) -> list:
    """Every bar that is made, as if somebody looked on."""
    made, real = [], waiting.tqdm
    monkeypatch.setattr(waiting, "watched", lambda: True)
    monkeypatch.setattr(waiting, "tqdm", lambda *args, **how: made.append(real(*args, **how)) or made[-1])
    return made


def test_a_bar_counts_every_pass_and_changes_no_figure(bars, capsys) -> None:
    model = models.random(ModelSpec("tiny", 2, 4, 2, 32, 48, 96, 100, 512), prepack=False)
    tokens = torch.randint(0, 100, (1, 120), generator=torch.Generator().manual_seed(0))
    caches = {"int4": lambda: Cache.quantized(2, 4, group_size=8), "int2": lambda: Cache.quantized(2, 2, group_size=8)}
    found = compare(model, tokens, caches, chunk=16, context=40)
    plain = quality.compare(model, tokens, caches, chunk=16, context=40, one_batch=True)
    assert all(torch.equal(found[name].divergence, plain[name].divergence) for name in caches)
    assert [(bar.n, bar.total, bar.disable) for bar in bars] == [(8, 8, True)]  # closed: 8 passes, all caches in each
    said = capsys.readouterr().out  # on a slow machine the bar is seen, and is gone again
    assert said.rpartition("\r")[2] == ""
    assert "\n" not in said


def test_a_bar_is_closed_when_the_model_fails(bars) -> None:
    with pytest.raises(RuntimeError), Counting(models.random(ModelSpec("tiny", 2, 4, 2, 32, 48, 96, 100, 512))):
        raise RuntimeError
    assert bars[0].disable
