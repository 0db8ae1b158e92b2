"""Clocks and provenance."""

from __future__ import annotations

import json
import mmap
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
    before = measure.memory()["used"]
    kept = mmap.mmap(-1, 256 * 2**20)  # new pages: a tensor may get memory that this process has had and kept
    torch.frombuffer(kept, dtype=torch.uint8).fill_(1)
    assert measure.memory()["used"] - before >= 0.9 * len(kept)


def test_a_gpu_is_given_its_memory_back_and_a_cpu_is_left_alone(monkeypatch) -> None:
    emptied: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("emptied"))
    measure.give_back("cpu")
    assert emptied == []
    measure.give_back("cuda")
    assert emptied == ["emptied"]


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


class TestQuiet:
    """Whether a time measured now would be of one thing alone."""

    def test_a_quiet_machine_passes(self) -> None:
        assert not measure.busy(0.1, {"a read": 40.0, "a product": 300.0}, {"a read": 41.0, "a product": 310.0})
        assert not measure.busy(0.1, {"a read": 40.0, "a product": 300.0}, {})  # nothing known yet

    @pytest.mark.parametrize(
        ("others", "read", "said"),
        [(1.6, 40.0, "other processes use 1.6 cores"), (0.0, 12.0, "a read runs at 12 GB/s, this machine gave 41")],
    )
    def test_a_busy_machine_is_named_by_its_figure(self, others, read, said) -> None:
        assert said in measure.busy(others, {"a read": read, "a product": 300.0}, {"a read": 41.0, "a product": 310.0})

    def test_a_slow_read_is_refused_and_allowed_only_when_said(self, tmp_path, monkeypatch) -> None:
        known = tmp_path / "some" / "speeds.json"
        measure.keep_speeds(known, {"a read": 1e6, "a product": 1e6})
        monkeypatch.delenv("LABKIT_BUSY", raising=False)
        with pytest.raises(measure.BusyError, match=r"LABKIT_BUSY=allow"):
            measure.quiet(known)
        monkeypatch.setenv("LABKIT_BUSY", "allow")
        assert "busy" in measure.quiet(known)
        assert measure.known_speeds(known) == {"a read": 1e6, "a product": 1e6}
        monkeypatch.setenv("LABKIT_BUSY", "yes")
        with pytest.raises(ValueError, match="LABKIT_BUSY is unset or allow; got yes"):
            measure.quiet(known)

    def test_speeds_are_kept_by_machine_and_a_damaged_file_is_as_none(self, tmp_path) -> None:
        known = tmp_path / "speeds.json"
        known.write_text('{"another machine": {"a read": [7.0]}}')
        assert measure.known_speeds(known) == {}
        measure.keep_speeds(known, {"a read": 3.0})
        assert measure.known_speeds(known) == {"a read": 3.0}
        assert json.loads(known.read_text())["another machine"] == {"a read": [7.0]}
        assert [path.name for path in tmp_path.iterdir()] == ["speeds.json"]
        for damaged in ("{", "[]", '{"another machine": {"a read": 7.0}}', '{"a": {"b": ["c"]}}'):
            known.write_text(damaged)
            assert measure.known_speeds(known) == {}

    def test_one_look_that_was_fast_by_luck_does_not_make_the_next_ones_busy(self, tmp_path) -> None:
        known = tmp_path / "speeds.json"
        for speed in (20.0, 21.0, 33.0, 20.0):
            assert not measure.busy(0.0, {"a read": speed}, measure.known_speeds(known))
            measure.keep_speeds(known, {"a read": speed})
        assert measure.known_speeds(known) == {"a read": 20.5}

    def test_only_the_latest_looks_count(self, tmp_path) -> None:
        known = tmp_path / "speeds.json"
        for speed in (50.0,) * 5 + (20.0,) * measure.LOOKS:
            measure.keep_speeds(known, {"a read": speed})
        assert measure.known_speeds(known) == {"a read": 20.0}
