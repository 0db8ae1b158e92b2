"""The time of one decode step by position, with a cache and without: the curve of lab 02.

    python -m benchmarks.positions [--positions 8 64 128 207 512] | tail -1 > data/results/NAME_positions.json

Lab 02 draws what `labkit.results` finds there beside the learner's own points.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as in the labs

import torch

from benchmarks.report import bar, begin, finish
from labkit import models
from labkit.cache import Cache
from labkit.device import pick_device, set_threads
from labkit.llama import Llama
from labkit.measure import Timing, alternate, device_name


def step_times(model: Llama, position: int, repeats: int) -> dict[str, Timing]:
    """Timings of the step that runs the token at `position`, in alternation."""
    tokens = torch.randint(model.spec.vocab_size, (1, position + 1), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(model.device)
    cache = Cache.preallocated(model.spec.num_layers, position + 1)
    model(tokens[:, :-1], cache, last_only=True)

    def with_cache() -> None:
        cache.truncate(position)
        model(tokens[:, -1:], cache, last_only=True)

    runs = {"with": with_cache, "without": lambda: model(tokens, last_only=True)}
    return alternate(runs, repeats=repeats, device=model.device)


def main() -> int:
    """Run, print, and say with the exit code whether every bar holds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--positions", type=int, nargs="+", default=[8, 64, 128, 207, 512])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    set_threads()
    begin()
    device = pick_device().torch_device
    model = models.load(device=device)
    print(f"{device_name(device)}; float32, batch 1")
    figures: dict[str, float] = {}
    for position in arguments.positions:
        for name, timing in step_times(model, position, arguments.repeats).items():
            print(f"  position {position:>5}, {name:<7} cache: {timing}")
            figures[f"{name}_cache_ms_at_{position}"] = round(timing.median * 1e3, 3)
    last = arguments.positions[-1]
    ratio = figures[f"without_cache_ms_at_{last}"] / figures[f"with_cache_ms_at_{last}"]
    bars = [bar(f"times faster with the cache at position {last}", ratio, ">=", 1.0)]
    return finish("positions", figures, bars, device, "python -m benchmarks.positions")


if __name__ == "__main__":
    raise SystemExit(main())
