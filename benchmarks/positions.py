"""The time of one decode step by position, with a cache and without: the curve of lab 02.

    python -m benchmarks.positions [--positions 8 64 128 207 512] | tail -1 > data/results/NAME_positions.json

Lab 02 draws what `labkit.results` finds there beside the learner's own points.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as in the labs

import torch

from benchmarks.report import bar, begin, finish
from labkit import models, specs
from labkit.cache import Cache
from labkit.device import pick_device, set_threads
from labkit.llama import Llama
from labkit.measure import Timing, alternate, device_name

POSITIONS = (8, 64, 128, 207, 512)
GPU_POSITIONS = (8, 64, 207, 512, 1024, 2048, 4096, 8000)  # where a GPU has something to do


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
    return alternate(runs, repeats=repeats, warmup=3, device=model.device)


def wake(device: torch.device, seconds: float = 1.5) -> None:
    """Keep a GPU busy until its clocks stand where they stay: an idle one takes a while to raise them."""
    square, ends = torch.randn(4096, 4096, device=device), time.perf_counter() + seconds
    while device.type == "cuda" and time.perf_counter() < ends:
        for _ in range(10):
            square @ square
        torch.cuda.synchronize(device)


def main() -> int:
    """Run, print, and say with the exit code whether every bar holds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--positions", type=int, nargs="+", help="by default more on a GPU")
    parser.add_argument("--repeats", type=int, help="by default 7, on a GPU 31")
    parser.add_argument(
        "--model", choices=["lab", "random"], default="lab", help="random weights of its sizes take as long"
    )
    arguments = parser.parse_args()
    set_threads()
    begin()
    device = pick_device().torch_device
    on_gpu = device.type == "cuda"
    positions = arguments.positions or (GPU_POSITIONS if on_gpu else POSITIONS)
    repeats = arguments.repeats or (31 if on_gpu else 7)
    random = arguments.model == "random"
    model = models.random(specs.model("smollm2-135m"), torch.float32, device) if random else models.load(device=device)
    wake(device)
    print(f"{device_name(device)}; float32, batch 1" + ("; random weights" if random else ""))
    figures: dict[str, float] = {}
    for position in positions:
        for name, timing in step_times(model, position, repeats).items():
            print(f"  position {position:>5}, {name:<7} cache: {timing}")
            figures[f"{name}_cache_ms_at_{position}"] = round(timing.median * 1e3, 3)
    last = positions[-1]
    ratio = figures[f"without_cache_ms_at_{last}"] / figures[f"with_cache_ms_at_{last}"]
    bars = [bar(f"times faster with the cache at position {last}", ratio, ">=", 1.0)]
    command = "python -m benchmarks.positions" + (" --model random" if random else "")
    return finish("positions", figures, bars, device, command)


if __name__ == "__main__":
    raise SystemExit(main())
