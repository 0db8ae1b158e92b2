"""Recorded results: what the benchmarks printed on other machines, as `data/results/` keeps it.

Each file is the last line of one benchmark: {"benchmark", "device", "versions", "figures": {name: number}, "bars"}.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from labkit.specs import DATA

FALL = 0.9  # the share of an earlier step's time that a later one may take, as noise


class Step(NamedTuple):
    """One recorded decode step: the device, "with cache" or "without cache", the token's position, seconds."""

    device: str
    name: str
    position: int
    seconds: float


def records(benchmark: str, folder: Path = DATA / "results") -> Iterator[dict[str, Any]]:
    """What one benchmark, such as "positions", printed, machine by machine."""
    for path in sorted(folder.glob(f"*_{benchmark}.json")):
        if path.stem.partition("_")[2] != benchmark:  # "gpu_decode" is not "decode"
            continue
        yield json.loads(path.read_text(encoding="utf-8"))


def figures_on(benchmark: str, device: str, folder: Path = DATA / "results") -> dict[str, float]:
    """The figures that one benchmark gave on a device whose name has `device` in it; empty where nobody recorded it."""
    return next((dict(one["figures"]) for one in records(benchmark, folder) if device in one["device"]), {})


def recorded_steps(folder: Path = DATA / "results") -> list[Step]:
    """Times of decode steps on reference GPUs, by position.

    A record in which a step at a later position, which has more to read, took less than 0.9 of the time is left out:
    its times follow no curve, something else was measured with them.
    """
    found: list[Step] = []
    for record in records("positions", folder):
        steps = [
            Step(record["device"], f"{match[1]} cache", int(match[2]), value / 1e3)
            for name, value in record["figures"].items()
            if (match := re.fullmatch(r"(with|without)_cache_ms_at_(\d+)", name))
        ]
        if "cuda" in record["versions"] and follow_a_curve(steps):
            found += steps
    return found


def follow_a_curve(steps: Sequence[Step]) -> bool:
    """Whether times never fall with the position, but for noise."""
    for name in {step.name for step in steps}:
        seconds = [step.seconds for step in sorted(steps, key=lambda step: step.position) if step.name == name]
        if any(after < FALL * before for before, after in itertools.pairwise(seconds)):
            return False
    return True
