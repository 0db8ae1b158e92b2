"""Clocks, memory, bandwidth and provenance: figures that a meter gave on this machine."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from typing import Any

import torch

from labkit.ledger import Ledger, Work, ledger

__all__ = [
    "Ledger",
    "Timing",
    "Work",
    "alternate",
    "ledger",
    "memory",
    "peak_memory",
    "provenance",
    "read_bandwidth",
    "time_call",
]

PEAK_BEGINS = "labkit.measure.peak_memory"  # marks, among the profiler's events, where `peak_memory` starts to count


@dataclass(frozen=True)
class Timing:
    """Repeated timings of one thing, in seconds."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle sample, in seconds."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, in seconds."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / 2

    def __str__(self) -> str:
        return f"{self.median * 1e3:.3g} ms ± {self.spread * 1e3:.2g}"


def synchronize(device: torch.device | str = "cpu") -> None:
    """Wait until `device` has done all it was asked; a GPU call returns before its work is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def time_call(run: Callable[[], Any], *, device: torch.device | str = "cpu") -> float:
    """Seconds that one call takes, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def alternate(
    runs: Mapping[str, Callable[[], Any]], *, repeats: int = 7, warmup: int = 1, device: torch.device | str = "cpu"
) -> dict[str, Timing]:
    """Time several things in turn, `repeats` rounds after `warmup` unrecorded ones, so that drift hits all alike."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + repeats):
        for name, run in runs.items():
            seconds = time_call(run, device=device)
            if turn >= warmup:
                samples[name].append(seconds)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def read_bandwidth(device: torch.device | str = "cpu", *, nbytes: int = 512 * 2**20, repeats: int = 7) -> float:
    """Bytes per second at which this device reads one large float32 tensor that fits in no cache (it is summed)."""
    tensor = torch.ones(nbytes // 4, device=device)
    timing = alternate({"sum": tensor.sum}, repeats=repeats, warmup=2, device=device)["sum"]
    return tensor.nbytes / min(timing.samples)


def memory(device: torch.device | str = "cpu") -> dict[str, int]:
    """Bytes: `free` and `total` of the device, `used` by this process there."""
    if torch.device(device).type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return {"free": free, "total": total, "used": torch.cuda.memory_allocated(device)}
    import psutil

    machine = psutil.virtual_memory()
    return {"free": machine.available, "total": machine.total, "used": psutil.Process().memory_info().rss}


def device_name(device: torch.device | str = "cpu") -> str:
    """A device in words: the GPU's name, or the processor's family and thread count. Never a host name."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def provenance(device: torch.device | str = "cpu", command: str = "") -> dict[str, str]:
    """Where a figure came from: device, versions, date and command, ready for JSON."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    driver = torch.version.cuda or "" if torch.device(device).type == "cuda" else ""
    return {
        "device": device_name(device),
        "python": platform.python_version(),
        **versions,
        **({"cuda": driver} if driver else {}),
        "date": date.today().isoformat(),
        **({"command": command} if command else {}),
    }


def peak_memory(
    run: Callable[[Any], Any], setup: Callable[[], Any] = lambda: None, *, device: torch.device | str = "cpu"
) -> int:
    """Bytes of tensors that `run(setup())` holds at its peak beyond what there was when `run` began."""
    if torch.device(device).type == "cuda":
        made = setup()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(made)
        return torch.cuda.max_memory_allocated(device) - before
    # `setup` runs inside: the profiler knows the size of what is given back only if it saw it taken.
    with torch.profiler.profile(profile_memory=True) as profile:
        made = setup()
        with torch.profiler.record_function(PEAK_BEGINS):
            run(made)
    held = peak = 0
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())  # type: ignore
    begins = next(event.start_ns() for event in events if event.name() == PEAK_BEGINS)
    for event in events:
        if event.name() == "[memory]" and event.start_ns() >= begins:
            held += event.nbytes()  # negative when memory is given back
            peak = max(peak, held)
    return peak
