"""What would stop on a GPU is found on a CPU; what would run there is left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.course.checks.devices import mixed_devices
from labkit.course.checks.trials import compare
from labkit.course.exercise import Exercise, NotYet

Q, K = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8)
POSITIONS = torch.arange(6)
OUTSIDE = torch.ones(4, 6).tril().bool()  # made by another cell, wherever that put it


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT


def mask_by(make: Callable[[Tensor], Tensor]) -> Callable:
    """Masked scores, with a mask made in this way from the queries."""
    return lambda q, k, positions: scores(q, k).masked_fill(~make(q), float("-inf"))


STOPS = {
    "a mask": mask_by(lambda q: torch.ones(4, 6).tril().bool()),
    "a mask made with where": lambda q, k, p: torch.where(torch.ones(4, 6).tril() > 0, scores(q, k), 0.0),
    "a mask on 'cpu'": mask_by(lambda q: torch.ones(4, 6, device="cpu").tril().bool()),
    "positions of its own": lambda q, k, p: k * (p - torch.arange(6))[:, None],
    "compared positions": lambda q, k, p: k * (torch.arange(6) <= p)[:, None],
    "what scores are added to": lambda q, k, p: torch.zeros(2, 3, 4, 6).add_(scores(q, k)),
    "a bias inside attention": lambda q, k, p: F.scaled_dot_product_attention(q, k, k, attn_mask=torch.zeros(4, 6)),
    "concatenated": lambda q, k, p: torch.cat([scores(q, k), torch.zeros(2, 3, 1, 6)], dim=2),
    "a list of a table": lambda q, k, p: k.index_select(2, torch.tensor([1, 3])),
    "a buffer that is filled": lambda q, k, p: q @ filled(torch.zeros(2, 3, 6, 8), k).mT,
    "indexed by what came": lambda q, k, p: torch.zeros(6)[p],
    "numbers read out": lambda q, k, p: k * torch.tensor(p.tolist())[:, None],
    "a result": lambda q, k, p: torch.zeros(2, 3, 4, 6),
}


def filled(buffer: Tensor, k: Tensor) -> Tensor:
    buffer[:] = k  # a copy from device to device, which is allowed
    return buffer


RUNS = {
    "plain": lambda q, k, p: scores(q, k),
    "a device that is taken": mask_by(lambda q: torch.ones(4, 6, device=q.device).tril().bool()),
    "moved there": mask_by(lambda q: torch.ones(4, 6).tril().bool().to(q.device)),
    "moved there by its like": mask_by(lambda q: torch.ones(4, 6).tril().to(q).bool()),
    "made like what came": mask_by(lambda q: q.new_ones(4, 6).tril().bool()),
    "with a device around": lambda q, k, p: mask_by(lambda q: around(q.device))(q, k, p),
    "a mask from outside": mask_by(lambda q: OUTSIDE),
    "a part of it": mask_by(lambda q: OUTSIDE[torch.arange(4)]),
    "one number": lambda q, k, p: scores(q, k) * torch.tensor(0.5),
    "an index on the CPU": lambda q, k, p: k[:, :, torch.tensor([1, 2])],
    "an index that is made": lambda q, k, p: k[:, :, torch.arange(3)],
    "written from the CPU": lambda q, k, p: filled(torch.empty_like(k), torch.zeros(2, 3, 6, 8)),
    "numbers read out": lambda q, k, p: k[:, :, : int(p.max())] * p.float().mean().item(),
    "through the CPU and back": lambda q, k, p: k.cpu().flip(2).to(k.device) + k,
    "a branch on what came": lambda q, k, p: k * 2 if bool((p > 3).any()) else k * torch.arange(6)[:, None],
}


def right(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    return scores(q, k)


@pytest.mark.parametrize("name", STOPS)
def test_what_a_gpu_would_stop_at_is_said(name: str) -> None:
    assert "made on the CPU" in mixed_devices(STOPS[name], right, (Q, K, POSITIONS), {})


@pytest.mark.parametrize("name", RUNS)
def test_what_a_gpu_would_run_is_left_alone(name: str) -> None:
    assert mixed_devices(RUNS[name], right, (Q, K, POSITIONS), {}) == ""


def around(device: torch.device) -> Tensor:
    with device:
        return torch.ones(4, 6).tril().bool()


def test_a_gpu_agrees_with_all_of_it() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    there = tuple(x.cuda() for x in (Q, K, POSITIONS))
    for name, run in RUNS.items():
        if "outside" not in name and "part" not in name:
            assert run(*there).is_cuda, name
    for name, run in STOPS.items():
        if name != "a result":
            with pytest.raises(RuntimeError):
                run(*there)


def test_what_raises_says_nothing_and_arguments_stay() -> None:
    def stops(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
        raise ValueError("no")

    before = Q.clone()
    assert mixed_devices(stops, right, (Q, K, POSITIONS), {}) == ""
    assert mixed_devices(right, stops, (Q, K, POSITIONS), {}) == ""
    assert torch.equal(Q, before)


def test_a_result_made_on_the_cpu_is_right_where_the_right_one_is() -> None:
    def table(positions: Tensor) -> Tensor:
        return torch.arange(7)

    assert mixed_devices(table, table, (POSITIONS,), {}) == ""


def test_what_the_reference_would_stop_at_is_not_asked_of_an_answer() -> None:
    stops = STOPS["a mask"]
    assert mixed_devices(stops, right, (Q, K, POSITIONS), {}) != ""
    assert mixed_devices(stops, stops, (Q, K, POSITIONS), {}) == ""


def test_the_first_line_that_mixes_is_shown() -> None:
    def added(x: Tensor) -> Tensor:
        places = torch.arange(6)
        return x + places

    assert mixed_devices(added, lambda x: x + x, (POSITIONS,), {}) == (
        "`add` meets a tensor [6] that was made on the CPU, in `return x + places`"
    )


def test_compare_tells_it_after_everything_else() -> None:
    class Sum(Exercise):
        id = "00.1"

    def add(x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def on_cpu(x: Tensor, y: Tensor) -> Tensor:
        return x + y + torch.zeros(y.shape[-1], dtype=x.dtype)

    def wrong_too(x: Tensor, y: Tensor) -> Tensor:
        return x - y + torch.zeros(y.shape[-1], dtype=x.dtype)

    calls = [(torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64))]
    compare(Sum, add, add, calls)
    for answer, diagnosis in ((on_cpu, "wrong-device"), (wrong_too, "values")):
        with pytest.raises(NotYet) as caught:
            compare(Sum, answer, add, calls)
        assert caught.value.finding.diagnosis == diagnosis
    assert "x [3, 4], y [3, 4]" in str(caught.value.finding.seen)


def test_whatever_else_a_check_finds_is_said_first() -> None:
    def add(x: Tensor) -> Tensor:
        return x + 1

    def on_cpu(x: Tensor) -> Tensor:
        return x + torch.ones(x.shape, dtype=x.dtype)

    class More(Exercise):
        id = "00.2"

        def examine(self, answer: Callable) -> None:
            compare(type(self), answer, add, [(torch.randn(3, 4, dtype=torch.float64),)])
            if self.strict:
                self.fail("slow", seen="", cause="", look="")

    for strict, diagnosis in ((True, "slow"), (False, "wrong-device")):
        More.strict = strict
        with pytest.raises(NotYet) as caught:
            More().trial(on_cpu)
        assert caught.value.finding.diagnosis == diagnosis
