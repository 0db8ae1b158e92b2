"""Clocks, memory, bandwidth and provenance: figures that a meter gave on this machine."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from labkit import limits
from labkit.ledger import Ledger, Work, ledger

__all__ = [
    "BusyError",
    "Ledger",
    "Timing",
    "Work",
    "alternate",
    "give_back",
    "ledger",
    "memory",
    "peak_memory",
    "provenance",
    "quiet",
    "read_bandwidth",
    "time_call",
]

MOST_BY_OTHERS = 0.25  # cores that other processes may use beside a figure that is to be kept
UNITS = {"a read": "GB/s", "a product": "GFLOP/s"}
LEAST_OF_BEFORE = 0.7  # of the median speed that this machine gave before; quiet runs differ by less
LOOKS = 9  # quiet looks that are remembered: one that was fast by luck must not make all later ones busy
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
    runs: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 7,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    watch: Callable[[range], Iterable[int]] = iter,
) -> dict[str, Timing]:
    """Time several things in turn, `repeats` rounds after `warmup` unrecorded ones, so that drift hits all alike.

    watch: is handed the rounds and gives them back one by one, a progress bar for one.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in watch(range(warmup + repeats)):
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
    """Bytes: `free` for this process and `total` of the device, `used` by this process there.

    A container's limits count, and so does `ulimit -v`.
    """
    if torch.device(device).type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return {"free": free, "total": total, "used": torch.cuda.memory_allocated(device)}
    import psutil

    free, total = limits.memory()
    return {"free": free, "total": total, "used": psutil.Process().memory_info().rss}


def give_back(device: torch.device | str = "cpu") -> None:
    """Let a GPU have the memory that nobody holds any more and PyTorch keeps for later; a CPU has none to give."""
    if torch.device(device).type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # waits for the device where it frees


def room_told(device: torch.device | str) -> str:
    """Who has the memory of a GPU, in words: what an out-of-memory error does not say."""
    free, total = torch.cuda.mem_get_info(device)
    held, kept = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return (
        f"of {total / 1e9:.2f} GB tensors hold {held / 1e9:.2f}, the allocator keeps {(kept - held) / 1e9:.2f} more "
        f"for later, {(total - free - kept) / 1e9:.2f} are the driver's and others', {free / 1e9:.2f} are free"
    )


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


class BusyError(RuntimeError):
    """The machine does something else as well: a time measured now would be of both."""


def quiet(known: Path | None = None) -> dict[str, str]:
    """What a quiet CPU gives, ready for provenance; BusyError, naming the figure, when it gives less or others use it.

    Others' use of the cores is read over half a second; a product and a read are timed, and compared with the median of
    the speeds that this machine gave before, which `known` holds (a file in labkit's cache folder).
    `LABKIT_BUSY=allow` lets a busy machine pass, and what was busy stands in the answer.
    """
    allowed = os.environ.get("LABKIT_BUSY", "").strip()
    if allowed not in ("", "allow"):
        raise ValueError(f"LABKIT_BUSY is unset or allow; got {allowed}")
    import psutil

    others = psutil.cpu_percent(interval=0.5) / 100 * (psutil.cpu_count() or 1)
    speeds = {"a read": round(read_bandwidth(nbytes=128 * 2**20, repeats=5) / 1e9, 1), "a product": product_speed()}
    known = known or default_known()
    if reason := busy(others, speeds, known_speeds(known)):
        if not allowed:
            raise BusyError(
                f"{reason}: wait until this machine is quiet, or set LABKIT_BUSY=allow to measure all the same"
            )
        return {"busy": reason}
    keep_speeds(known, speeds)
    return {"quiet": ", ".join(f"{name} at {speed:g} {UNITS[name]}" for name, speed in speeds.items())}


def busy(others: float, speeds: Mapping[str, float], before: Mapping[str, float]) -> str:
    """Why a machine is not quiet, with the figure; empty when it is. others: cores that other processes use."""
    if others > MOST_BY_OTHERS:
        return f"other processes use {others:.1f} cores"
    for name, speed in speeds.items():
        if speed < LEAST_OF_BEFORE * before.get(name, 0.0):
            return (
                f"{name} runs at {speed:g} {UNITS[name]}, this machine gave {before[name]:g}: something else is running"
            )
    return ""


def product_speed() -> float:
    """GFLOP/s of a float32 product of two square matrices, the best of five."""
    square = torch.ones(1024, 1024)
    timing = alternate({"product": lambda: square @ square}, repeats=5)["product"]
    return round(2 * 1024**3 / min(timing.samples) / 1e9, 1)


def default_known() -> Path:
    """Where the speeds of this machine's quiet looks are kept."""
    from labkit.lab_model import cache_folder

    return cache_folder() / "speeds.json"


def this_machine() -> str:
    """What speeds belong to: the processor, as precisely as it says what it is, the threads and the torch in use."""
    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def known_speeds(known: Path) -> dict[str, float]:
    """The median speeds that this machine gave before; empty when none are known."""
    return {name: statistics.median(looks) for name, looks in remembered(known).get(this_machine(), {}).items()}


def remembered(known: Path) -> dict[str, dict[str, list[float]]]:
    """The latest quiet looks of each machine; a file that holds anything else is as good as none."""
    try:
        every = json.loads(known.read_text(encoding="utf-8"))
        return {
            machine: {name: [float(speed) for speed in looks][-LOOKS:] for name, looks in speeds.items() if looks}
            for machine, speeds in every.items()
        }
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def keep_speeds(known: Path, speeds: Mapping[str, float]) -> None:
    """Add one look to this machine's, all or nothing; a folder that cannot be written to keeps none."""
    every = remembered(known)
    before = every.get(this_machine(), {})
    every[this_machine()] = {name: [*before.get(name, []), speed][-LOOKS:] for name, speed in speeds.items()}
    try:
        known.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=known.parent, delete=False, encoding="utf-8") as file:
            json.dump(every, file, indent=1)
        os.replace(file.name, known)
    except OSError:
        return


def main() -> int:
    """Say whether this machine is quiet; 1 when it is not."""
    from labkit.device import set_threads

    set_threads()
    try:
        print(*(f"{name}: {what}" for name, what in quiet().items()), sep="\n")
    except BusyError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
