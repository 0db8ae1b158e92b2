"""How long decode steps take: the part of `benchmarks.eviction` that needs a quiet machine.

A sample has as many steps as victims are chosen for at once, so that each has its whole share of choosing; the slowest
step of a sample is the one that chooses.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from benchmarks.eviction_caches import filled, policies, progress, quest, step_of_caches
from benchmarks.report import bar
from labkit.cache import Cache
from labkit.llama import Llama
from labkit.measure import Timing, alternate

OVERHEAD = {  # policies, and how many victims are chosen at once: of a window the same tokens go, in the same order
    "sinks and window": 16, "H2O": 16, "TOVA": 1, "key norm": 16, "SnapKV": 32, "KeyDiff": 16,
    "expected attention": 128, "merging": 16,
}  # fmt: skip
NOT_EVICTING = ("merging", "Quest")  # timed beside the others, and no bar is theirs


@dataclass(frozen=True)
class Steps:
    """Seconds of a decode step. mean: of whole rounds of choosing. slowest: the slowest step of each such round."""

    mean: Timing
    slowest: Timing


@torch.inference_mode()
def measure_overhead(model: Llama, rounds: int) -> dict[str, Steps]:
    """A decode step of the whole model at 2,000 tokens: full, evicting one at every step, merging, and Quest."""
    tokens, spec = 2000, model.spec
    caches = {"full": filled(model.cache(tokens + (rounds + 2) * 16), spec, tokens)}
    for name, every in OVERHEAD.items():
        caches[name] = filled(Cache.evicting(spec.num_layers, policies(model)[name], tokens, every=every), spec, tokens)
    caches["Quest"] = filled(quest(model, tokens // 4), spec, tokens)
    token = torch.tensor([[7]])
    return times_of_steps(caches, lambda cache: model(token, cache, last_only=True), 16, rounds)


@torch.inference_mode()
def measure_quarter(model: Llama, rounds: int) -> dict[str, Steps]:
    """What a step spends on its caches, attention and evicting, at 8,000 tokens seen: all, and a quarter kept or read.

    In all layers, without the model's products: what a step does once for all of them counts once, as in the model.
    """
    seen, spec = 8000, model.spec
    caches = {"full": filled(model.cache(seen + (rounds + 2) * 4), spec, seen)}
    for name, every in OVERHEAD.items():
        policy = policies(model)[name]
        caches[name] = filled(Cache.evicting(spec.num_layers, policy, seen // 4, every=every), spec, seen)
    caches["Quest"] = filled(quest(model, seen // 4), spec, seen)
    return times_of_steps(caches, lambda cache: step_of_caches(cache, spec), 4, rounds)


def times_of_steps(
    caches: dict[str, Cache], act: Callable[[Cache], object], least: int, rounds: int
) -> dict[str, Steps]:
    """Seconds of one `act` on each cache, in alternation: a sample is of `least` steps, or of a whole round of choosing
    where several victims are chosen at once."""
    steps = {name: max(least, OVERHEAD.get(name, 1)) for name in caches}
    length = caches["full"].seq_len if "full" in caches else 0
    slowest: dict[str, list[float]] = {name: [] for name in caches}

    def run(name: str) -> None:
        longest = 0.0
        if name == "full":  # the others read no more for being fed
            caches[name].truncate(length)
        for _ in range(steps[name]):
            start = time.perf_counter()
            act(caches[name])
            longest = max(longest, time.perf_counter() - start)
        slowest[name].append(longest)

    timings = alternate({name: partial(run, name) for name in caches}, repeats=rounds, warmup=1)
    return {
        name: Steps(Timing(tuple(sample / steps[name] for sample in one.samples)), Timing(tuple(slowest[name][1:])))
        for name, one in timings.items()
    }


def overhead_figures(times: dict[str, Steps]) -> tuple[dict[str, float], list[dict]]:
    """Milliseconds of a step at 2,000 tokens, and the bar on what evicting adds to it."""
    figures, bars = step_figures("ms a step at 2000 tokens", times), []
    for name, one in times.items():
        added = share_added(one.mean, times["full"].mean)
        worst = median(one.slowest.samples) / median(times["full"].slowest.samples) - 1
        said = f"{one.mean} a step of the model, {added:+.1%}; {slowest_told(one)}, {worst:+.1%}"
        print(f"  2,000 tokens, {name:<20} {said}")
        if name != "full" and name not in NOT_EVICTING:
            bars.append(bar(f"{name}: share that evicting adds to a step at 2000 tokens", added, "<=", 0.10))
    return figures, bars


def share_added(one: Timing, full: Timing) -> float:
    """By which share a step is longer than a full cache's: the median over the rounds, whose steps are neighbours."""
    return median(mine / theirs for mine, theirs in zip(one.samples, full.samples, strict=True)) - 1


def quarter_figures(times: dict[str, Steps]) -> tuple[dict[str, float], list[dict]]:
    """Milliseconds of a step's caches at 8,000 tokens, and the bar on how much faster a quarter is."""
    figures, bars = step_figures("ms of a step's caches at 8000 tokens", times), []
    for name, one in times.items():
        gain = times["full"].mean.median / one.mean.median
        print(
            f"  8,000 tokens, {name:<20} {one.mean} a step of all caches, {gain:.2f} times as fast; {slowest_told(one)}"
        )
        if name != "full" and name not in NOT_EVICTING:
            bars.append(bar(f"{name}: a quarter of 8000 tokens, times as fast", gain, ">=", 1.5))
    return figures, bars


def step_figures(what: str, times: dict[str, Steps]) -> dict[str, float]:
    """The median of a step by cache, and of the slowest step of a round."""
    figures = {}
    for name, one in times.items():
        figures[f"{what}, {name}"] = round(one.mean.median * 1e3, 4)
        figures[f"{what}, {name}, slowest"] = round(one.slowest.median * 1e3, 4)
    return figures


def slowest_told(one: Steps) -> str:
    """The slowest step, in words."""
    return f"the slowest step of a round {one.slowest}"


def measure_times(model: Llama, rounds: int) -> tuple[dict[str, float], list[dict]]:
    """Both, printed as they come."""
    figures, bars = overhead_figures(measure_overhead(model, rounds))
    progress("times of a step at 2,000 tokens")
    more, own = quarter_figures(measure_quarter(model, rounds))
    progress("times of a step's caches at 8,000 tokens")
    return figures | more, bars + own
