"""`benchmarks.on_gpu`: one step that fails or hangs ends no other, and records go to files of the device's name."""

import json
import sys
import time

import pytest

from benchmarks import on_gpu
from labkit.course.catalogue import numbers

RECORD = {"benchmark": "kernels", "device": "NVIDIA H100 80GB HBM3", "versions": {}, "figures": {}, "bars": []}


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"),
        ("Tesla T4", "t4"),
        ("/..", "gpu"),
    ],
)
def test_a_device_gives_its_files_a_short_name(device, name):
    assert on_gpu.slug(device) == name


@pytest.mark.parametrize("said", ["", "no JSON", "3", '{"device": 1, "benchmark": "x"}', '{"device": "a"}', "[]"])
def test_without_a_record_nothing_is_written(said, tmp_path):
    assert on_gpu.keep(said, tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def python(code):
    return (sys.executable, "-c", code)


def test_a_step_that_hangs_is_ended_and_the_next_one_runs():
    began = time.monotonic()
    hangs = python("import time; print('begun', flush=True); time.sleep(60)")
    done = on_gpu.run([("hangs", hangs, 2), ("runs", python("print('ran')"), 60)])
    assert done == {"hangs": (124, "begun\n"), "runs": (0, "ran\n")}
    assert time.monotonic() - began < 40


def test_all_run_and_the_exit_code_says_whether_all_passed(monkeypatch, tmp_path, capsys):
    steps = []

    def fake(name, command, seconds):
        steps.append((name, command))
        codes = {"gpu_decode": "raise SystemExit(3)", "positions": "print('no record')"}
        said = json.dumps({**RECORD, "benchmark": name})
        return step(name, python(codes.get(name, f"print('table'); print({said!r})")), 60)

    step = on_gpu.Step
    monkeypatch.setattr(on_gpu, "Step", fake)
    monkeypatch.setattr(on_gpu.shutil, "which", lambda name: f"/{name}")
    assert on_gpu.main(["--workers", "3", "--results", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert said.splitlines()[-2:] == ["FAILED: gpu_decode", "FAILED: positions"]
    assert {path.name for path in tmp_path.iterdir()} == {
        f"h100_{x}.json" for x in ("kernels", "gpu_engine", "gpu_memory")
    }
    assert json.loads((tmp_path / "h100_kernels.json").read_text()) == RECORD
    names = [name for name, _ in steps]
    assert names[0] == "tests"
    assert "3" in steps[0][1]
    assert sum(name.startswith("0") for name in names) == len(numbers())
    assert names[-1] == "sanitizer"
    assert steps[-1][1][0] == "compute-sanitizer"
    assert on_gpu.main(["--only", "kernels", "--results", str(tmp_path)]) == 0


def test_without_a_sanitizer_it_is_left_out_and_fails_only_where_it_was_asked_for(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(on_gpu.shutil, "which", lambda name: None)
    monkeypatch.setattr(on_gpu, "BENCHMARKS", {})
    monkeypatch.setattr(on_gpu, "run", lambda plan, side_by_side=False: {name: (0, "") for name, *_ in plan})
    assert on_gpu.main(["--results", str(tmp_path)]) == 0
    assert "no compute-sanitizer here" in capsys.readouterr().out
    assert on_gpu.main(["--only", "sanitizer", "--results", str(tmp_path)]) == 1
    assert "FAILED: sanitizer" in capsys.readouterr().out
