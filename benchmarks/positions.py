"""The time of one decode step by position, with a cache and without: the curve of lab 02.

    python -m benchmarks.positions [--positions 8 64 128] [--seconds 60] | tail -1 > data/results/NAME_positions.json

Lab 02 draws what `labkit.results` finds there beside the learner's own points. The clock of --seconds starts when the
model is there and a GPU awake: imports, the look whether the machine is quiet and the rest take longer than a position.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from functools import partial

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
WARMUP, LEAST = 3, 5  # rounds that are not recorded, and rounds that are whatever the time


def in_time(rounds: range, end: float) -> Iterator[int]:
    """These rounds while there is time, the first few in any case. end: of `time.perf_counter`."""
    for turn in rounds:
        if turn >= WARMUP + LEAST and time.perf_counter() > end:
            return
        yield turn


def step_times(model: Llama, position: int, repeats: int, end: float = float("inf")) -> dict[str, Timing]:
    """Timings of the step that runs the token at `position`, in alternation; fewer where the time ends."""
    tokens = torch.randint(model.spec.vocab_size, (1, position + 1), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(model.device)
    cache = Cache.preallocated(model.spec.num_layers, position + 1)
    model(tokens[:, :-1], cache, last_only=True)

    def with_cache() -> None:
        cache.truncate(position)
        model(tokens[:, -1:], cache, last_only=True)

    runs = {"with": with_cache, "without": lambda: model(tokens, last_only=True)}
    rounds = partial(in_time, end=end)
    return alternate(runs, repeats=repeats, warmup=WARMUP, device=model.device, watch=rounds)


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
    parser.add_argument(
        "--seconds", type=float, help="for the positions, in their order; by default as long as it takes"
    )
    arguments = parser.parse_args()
    begun = time.perf_counter()
    set_threads()
    begin()
    device = pick_device().torch_device
    on_gpu = device.type == "cuda"
    positions = arguments.positions or (GPU_POSITIONS if on_gpu else POSITIONS)
    repeats = arguments.repeats or (31 if on_gpu else 7)
    random = arguments.model == "random"
    model = models.random(specs.model("smollm2-135m"), torch.float32, device) if random else models.load(device=device)
    wake(device)
    print(f"{device_name(device)}; float32, batch 1" + ("; random weights" if random else ""), end="; ")
    print(f"ready in {time.perf_counter() - begun:.1f} s after the imports", flush=True)
    figures: dict[str, float] = {}
    end, last = time.perf_counter() + (arguments.seconds or float("inf")), positions[0]
    for place, position in enumerate(positions):
        if place and time.perf_counter() > end:
            print(f"  left out for lack of time: {', '.join(map(str, positions[place:]))}")
            break
        share = (end - time.perf_counter()) / (len(positions) - place)  # a position that is quick leaves more to others
        last = position
        for name, timing in step_times(model, position, repeats, time.perf_counter() + share).items():
            print(f"  position {position:>5}, {name:<7} cache: {timing}", flush=True)
            figures[f"{name}_cache_ms_at_{position}"] = round(timing.median * 1e3, 3)
    ratio = figures[f"without_cache_ms_at_{last}"] / figures[f"with_cache_ms_at_{last}"]
    bars = [bar(f"times faster with the cache at position {last}", ratio, ">=", 1.0)]
    command = "python -m benchmarks.positions" + (" --model random" if random else "")
    command += f" --seconds {arguments.seconds:g}" if arguments.seconds else ""
    return finish("positions", figures, bars, device, command)


if __name__ == "__main__":
    raise SystemExit(main())
