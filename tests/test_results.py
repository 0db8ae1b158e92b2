"""Recorded results: read by benchmark, and drawn only where times follow a curve."""

from __future__ import annotations

import json
from pathlib import Path

from labkit import results
from labkit.results import Step, recorded_steps, records


def record(folder: Path, machine: str, figures: dict[str, float], **versions: str) -> None:
    made = {"benchmark": "positions", "device": machine, "versions": versions, "figures": figures, "bars": []}
    (folder / f"{machine}_positions.json").write_text(json.dumps(made), encoding="utf-8")


def test_the_steps_of_a_reference_gpu_come_in_seconds(tmp_path: Path) -> None:
    record(tmp_path, "gpu", {"with_cache_ms_at_8": 2.0, "without_cache_ms_at_8": 3.0, "times faster": 1.5}, cuda="13.0")
    assert recorded_steps(tmp_path) == [Step("gpu", "with cache", 8, 0.002), Step("gpu", "without cache", 8, 0.003)]


def test_a_record_whose_times_fall_with_the_position_is_left_out_and_noise_is_not(tmp_path: Path) -> None:
    record(tmp_path, "falls", {"with_cache_ms_at_512": 1.0, "with_cache_ms_at_8": 2.0}, cuda="13.0")
    record(tmp_path, "noisy", {"with_cache_ms_at_512": 1.95, "with_cache_ms_at_8": 2.0}, cuda="13.0")
    assert {step.device for step in recorded_steps(tmp_path)} == {"noisy"}


def test_a_cpu_is_no_reference_gpu(tmp_path: Path) -> None:
    record(tmp_path, "cpu", {"with_cache_ms_at_8": 2.0}, torch="2.13.0")
    assert recorded_steps(tmp_path) == []


def test_every_file_of_the_project_is_found_by_its_benchmark() -> None:
    folder = results.DATA / "results"
    names = {path.stem.split("_", 1)[1] for path in folder.glob("*.json")}
    found = [each for name in names for each in records(name)]
    assert len(found) == len(list(folder.glob("*.json")))
    assert {each["benchmark"] for each in found} == names


def test_the_recorded_h200_is_not_drawn_since_its_times_follow_no_curve() -> None:
    assert "NVIDIA H200" in {record["device"] for record in records("positions")}
    assert "NVIDIA H200" not in {step.device for step in recorded_steps()}
