"""How long decode steps take: the part of `benchmarks.eviction` that needs a quiet machine.

Steps of each cache alternate with steps of the full one, one by one, so that what it adds is told by neighbours. A
sample has as many as victims are chosen for at once, its whole share of choosing; the slowest of them chooses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, quantiles

import torch

from benchmarks.eviction_caches import filled, policies, progress, quest, step_of_caches
from benchmarks.report import bar
from labkit.cache import Cache
from labkit.llama import Llama
from labkit.measure import Timing

OVERHEAD = {  # policies, and how many victims are chosen at once: of a window the same tokens go, in the same order
    "sinks and window": 16, "H2O": 16, "TOVA": 1, "key norm": 16, "SnapKV": 32, "KeyDiff": 16,
    "expected attention": 128, "merging": 16,
}  # fmt: skip
NOT_EVICTING = ("merging", "Quest")  # timed beside the others, and no bar is theirs


@dataclass(frozen=True)
class Steps:
    """Seconds of decode steps in rounds of choosing, and of the full cache's steps between them.

    mean: of a step, a sample for each round. slowest: of such a round. full, full_slowest: the same of the full cache.
    """

    mean: Timing
    slowest: Timing
    full: Timing
    full_slowest: Timing

    @property
    def added(self) -> list[float]:
        """By which share each round took longer than the full cache's steps."""
        return [mine / other - 1 for mine, other in zip(self.mean.samples, self.full.samples, strict=True)]

    @property
    def quartiles(self) -> tuple[float, float] | None:
        """Between which shares the middle half of the rounds lies; None of a single round."""
        if len(self.added) < 2:
            return None
        low, _, high = quantiles(self.added, n=4)
        return low, high

    @property
    def gain(self) -> float:
        """How many times as fast as the full cache's, the median over the rounds."""
        return median(other / mine for mine, other in zip(self.mean.samples, self.full.samples, strict=True))


@torch.inference_mode()
def measure_overhead(model: Llama, rounds: int) -> dict[str, Steps]:
    """A decode step of the whole model at 2,000 tokens: full, evicting one at every step, merging, and Quest."""
    tokens, spec = 2000, model.spec
    caches = {"full": filled(model.cache(tokens + 16), spec, tokens)}
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
    caches = {"full": filled(model.cache(seen + 4), spec, seen)}
    for name, every in OVERHEAD.items():
        policy = policies(model)[name]
        caches[name] = filled(Cache.evicting(spec.num_layers, policy, seen // 4, every=every), spec, seen)
    caches["Quest"] = filled(quest(model, seen // 4), spec, seen)
    return times_of_steps(caches, lambda cache: step_of_caches(cache, spec), 4, rounds)


def times_of_steps(
    caches: dict[str, Cache], act: Callable[[Cache], object], least: int, rounds: int
) -> dict[str, Steps]:
    """Seconds of one `act` on each cache, step by step in alternation with the full one.

    `rounds` times `least` steps, and as many more as whole rounds of choosing take, 4 of them at least where there are
    several; the first `least` are not counted.
    """
    full, length, found = caches["full"], caches["full"].seq_len, {}
    theirs: list[float] = []
    for name, cache in caches.items():
        if cache is full:
            continue
        count = max(least, OVERHEAD.get(name, 1))  # steps of a round of choosing
        seconds: dict[int, list[float]] = {id(full): [], id(cache): []}
        steps = count * max(-(-rounds * least // count), min(rounds, 4))
        for step in range(-least, steps):
            if step % least == 0:  # the other reads no more for being fed
                full.truncate(length)
            for one in (full, cache) if step % 2 else (cache, full):
                start = time.perf_counter()
                act(one)
                if step >= 0:
                    seconds[id(one)].append(time.perf_counter() - start)
        found[name] = steps_of(seconds[id(cache)], seconds[id(full)], count)
        theirs += seconds[id(full)]
    return {"full": steps_of(theirs, theirs, least), **found}


def steps_of(seconds: Sequence[float], full: Sequence[float], count: int) -> Steps:
    """Steps in rounds of `count`, and the full cache's that stand beside them."""
    rounds, theirs = ([some[i : i + count] for i in range(0, len(some), count)] for some in (seconds, full))
    return Steps(*(Timing(tuple(map(which, some))) for some in (rounds, theirs) for which in (fmean, max)))


def overhead_figures(times: dict[str, Steps]) -> tuple[dict[str, float], list[dict]]:
    """Milliseconds of a step at 2,000 tokens, and the bar on what evicting adds to it."""
    what = "a step at 2000 tokens"
    figures, bars = step_figures(f"ms {what}", times), []
    for name, one in times.items():
        if name == "full":
            continue
        added = median(one.added)
        figures[f"share added to {what}, {name}"] = round(added, 4)
        figures[f"share added to {what}, {name}, rounds"] = len(one.added)
        if one.quartiles is not None:
            figures[f"share added to {what}, {name}, quartiles"] = round(one.quartiles[1] - one.quartiles[0], 4)
        print(f"  2,000 tokens, {name:<20} {beside_told(one)}: {spread_told(one)}")
        if name not in NOT_EVICTING:
            bars.append(bar(f"{name}: share that evicting adds to a step at 2000 tokens", added, "<=", 0.10))
    return figures, bars


def quarter_figures(times: dict[str, Steps]) -> tuple[dict[str, float], list[dict]]:
    """Milliseconds of a step's caches at 8,000 tokens, and the bar on how much faster a quarter is."""
    figures, bars = step_figures("ms of a step's caches at 8000 tokens", times), []
    for name, one in times.items():
        if name == "full":
            continue
        print(f"  8,000 tokens, {name:<20} {beside_told(one)}: {one.gain:.2f} times as fast")
        if name not in NOT_EVICTING:
            bars.append(bar(f"{name}: a quarter of 8000 tokens, times as fast", one.gain, ">=", 1.5))
    return figures, bars


def step_figures(what: str, times: dict[str, Steps]) -> dict[str, float]:
    """The median of a step by cache and of the slowest step of a round, each beside the full cache's in between."""
    figures = {}
    for name, one in times.items():
        figures[f"{what}, {name}"] = round(one.mean.median * 1e3, 4)
        figures[f"{what}, {name}, slowest"] = round(one.slowest.median * 1e3, 4)
        if name != "full":
            figures[f"{what}, full beside {name}"] = round(one.full.median * 1e3, 4)
            figures[f"{what}, full beside {name}, slowest"] = round(one.full_slowest.median * 1e3, 4)
    return figures


def spread_told(one: Steps) -> str:
    """The median of what was added, and where the middle half of the rounds lies."""
    if one.quartiles is None:
        return f"{one.added[0]:+.1%} in one round"
    low, high = one.quartiles
    return f"{median(one.added):+.1%} ({low:+.1%} to {high:+.1%}, {len(one.added)} rounds)"


def beside_told(one: Steps) -> str:
    """A step and the full cache's, each with its slowest of a round, in words."""
    return f"{one.mean}, slowest {one.slowest}; full beside it {one.full}, slowest {one.full_slowest}"


def measure_times(model: Llama, rounds: int) -> tuple[dict[str, float], list[dict]]:
    """Both, printed as they come."""
    figures, bars = overhead_figures(measure_overhead(model, rounds))
    progress("times of a step at 2,000 tokens")
    more, own = quarter_figures(measure_quarter(model, rounds))
    progress("times of a step's caches at 8,000 tokens")
    return figures | more, bars + own
