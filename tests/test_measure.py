"""Clocks and provenance."""

from __future__ import annotations

import gc
import json
import time

import pytest
import torch

from labkit import measure


def test_alternate_takes_turns_and_drops_the_warmup() -> None:
    order: list[str] = []
    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    timings = measure.alternate(runs, repeats=3, warmup=2)
    assert order == ["a", "b"] * 5
    assert all(len(timing.samples) == 3 for timing in timings.values())


def test_a_call_is_timed_from_its_start_to_its_end() -> None:
    start = time.perf_counter()
    seconds = measure.time_call(lambda: time.sleep(0.02))
    assert 0.02 <= seconds <= time.perf_counter() - start


def test_median_and_spread_are_of_the_samples() -> None:
    timing = measure.Timing((1.0, 2.0, 3.0, 4.0, 100.0))
    assert timing.median == 3.0
    assert timing.spread == 1.0
    assert measure.Timing((5.0,)).spread == 0.0


def test_read_bandwidth_is_bytes_over_seconds(monkeypatch) -> None:
    timing = measure.Timing((0.5, 0.25, 1.0))
    monkeypatch.setattr(measure, "alternate", lambda runs, **options: {name: timing for name in runs})
    assert measure.read_bandwidth(nbytes=64 * 2**20) == 64 * 2**20 / 0.25  # the best sample: noise only slows


def test_read_bandwidth_is_at_least_that_of_the_whole_call() -> None:
    nbytes, start = 16 * 2**20, time.perf_counter()
    best = measure.read_bandwidth(nbytes=nbytes, repeats=3)
    assert best >= 3 * nbytes / (time.perf_counter() - start)  # the best of three reads is no slower than their mean


def test_memory_names_free_total_and_used() -> None:
    memory = measure.memory()
    assert 0 < memory["free"] <= memory["total"]
    assert memory["used"] > 10 * 2**20


def test_memory_used_grows_by_what_is_allocated() -> None:
    gc.collect()
    before = measure.memory()["used"]
    kept = torch.ones(256 * 2**20 // 4)
    assert measure.memory()["used"] - before >= 0.9 * kept.nbytes


def test_provenance_names_device_versions_and_date_but_no_host() -> None:
    said = measure.provenance(command="benchmarks/decode.py")
    assert said.keys() - {"cuda"} == {"device", "python", "torch", "transformers", "date", "command"}
    assert json.loads(json.dumps(said)) == said


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_an_error_not_a_figure() -> None:
    with pytest.raises((RuntimeError, AssertionError)):
        measure.time_call(lambda: None, device="cuda")


def test_peak_memory_counts_what_is_held_at_once_and_not_what_was_there_or_was_let_go() -> None:
    size = 1_000_000

    def run(made: list[torch.Tensor]) -> None:
        made.append(made[0] * 2)  # one more
        made.pop(0)  # one that was there before goes
        for _ in range(3):
            made[0] + 1  # one at a time, and gone again

    peak = measure.peak_memory(run, lambda: [torch.zeros(size // 4)])
    assert size <= peak < 1.1 * size
