"""What an engine says of itself, under the names of vLLM's `/metrics`; and its blocks at one moment, to be drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from labkit.engine.blocks import BlockManager
from labkit.engine.request import Timing
from labkit.engine.scheduler import Scheduler

TIMES = {"request_queue_time": "queue_time", "time_to_first_token": "ttft", "request_time_per_output_token": "tpot"}


COUNTS = ("prefix_cache_queries", "prefix_cache_hits", "generation_tokens")


class Totals:
    """Sums over requests, which need not be kept themselves."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = dict.fromkeys(COUNTS, 0)
        for name in TIMES:
            self.sums |= {f"{name}_seconds_sum": 0.0, f"{name}_seconds_count": 0}

    def add(self, timing: Timing) -> None:
        """One request more."""
        sums = self.sums
        sums["prefix_cache_queries"] += timing.prompt_tokens if known(timing.queue_time) else 0
        sums["prefix_cache_hits"] += timing.reused
        sums["generation_tokens"] += timing.new_tokens
        for name, of in TIMES.items():
            if known(seconds := getattr(timing, of)):
                sums[f"{name}_seconds_sum"] += seconds
                sums[f"{name}_seconds_count"] += 1

    def and_of(self, timings: Iterable[Timing]) -> dict[str, float]:
        """The sums with those of some more requests."""
        both = Totals()
        both.sums = dict(self.sums)
        for timing in timings:
            both.add(timing)
        return both.sums


def known(seconds: float) -> bool:
    """Whether a request came so far: NaN equals nothing."""
    return seconds == seconds


def metrics(blocks: BlockManager, scheduler: Scheduler, totals: Mapping[str, float]) -> dict[str, float]:
    """Counts, in tokens and requests, and seconds, each as the sum and the number of requests that know theirs.

    As in vLLM, a prompt is asked for in the prefix cache once, however often its request is preempted.
    """
    said = {
        "kv_cache_usage_perc": blocks.usage,
        "num_requests_running": len(scheduler.running),
        "num_requests_waiting": len(scheduler.waiting),
        "num_preemptions": scheduler.preemptions,
        **totals,
    }
    return {f"vllm:{name}": float(number) for name, number in said.items()}


@dataclass(frozen=True)
class Snapshot:
    """Behind a pass: who holds each block, in order of admission; of each request that runs, its tokens that have
    slots and those that have K and V; who waits; preemptions so far."""

    owners: dict[int, tuple[str, ...]]
    running: dict[str, tuple[int, int]]
    waiting: tuple[str, ...]
    preemptions: int


def snapshot(blocks: BlockManager, scheduler: Scheduler) -> Snapshot:
    """An engine's blocks as they are."""
    tables = {flight.id: blocks.table(flight.id) for flight in scheduler.running}
    running = {name: (len(table.tokens), table.computed) for name, table in tables.items()}
    return Snapshot(blocks.owners(), running, tuple(flight.id for flight in scheduler.waiting), scheduler.preemptions)
