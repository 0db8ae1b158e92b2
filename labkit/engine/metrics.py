"""What an engine says of itself, under the names of vLLM's `/metrics`; and its blocks at one moment, to be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from labkit.engine.blocks import BlockManager
from labkit.engine.request import Timing
from labkit.engine.scheduler import Scheduler

TIMES = {"request_queue_time": "queue_time", "time_to_first_token": "ttft", "request_time_per_output_token": "tpot"}


def metrics(blocks: BlockManager, scheduler: Scheduler, timings: Sequence[Timing]) -> dict[str, float]:
    """Counts, in tokens and requests, and seconds, each as the sum and the number of requests that know theirs.

    As in vLLM, a prompt is asked for in the prefix cache once, however often its request is preempted.
    """
    said = {
        "kv_cache_usage_perc": blocks.usage,
        "num_requests_running": len(scheduler.running),
        "num_requests_waiting": len(scheduler.waiting),
        "num_preemptions": scheduler.preemptions,
        "prefix_cache_queries": sum(t.prompt_tokens for t in timings if t.queue_time == t.queue_time),
        "prefix_cache_hits": sum(t.reused for t in timings),
        "generation_tokens": sum(t.new_tokens for t in timings),
    }
    for name, of in TIMES.items():
        known = [seconds for t in timings if (seconds := getattr(t, of)) == seconds]  # NaN equals nothing
        said |= {f"{name}_seconds_sum": sum(known), f"{name}_seconds_count": len(known)}
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
