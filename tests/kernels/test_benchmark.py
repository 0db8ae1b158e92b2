"""The kernels' benchmark in the interpreter: its stages run to the end, and answers are right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from labkit import kernels

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not kernels.available(), reason="Triton's interpreter is for CPUs")
def test_stages_run_and_their_answers_are_right():
    command = [
        sys.executable,
        "-m",
        "benchmarks.kernels",
        "--device",
        "cpu",
        "--tiny",
        "--only",
        "dense",
        "append",
        "float32",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "LABKIT_BUSY": "allow", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    told = json.loads(done.stdout.splitlines()[-1])
    assert "FAILED" not in done.stdout
    assert "Traceback" not in done.stderr
    assert told["benchmark"] == "kernels"
    answers = [one for one in told["bars"] if "error" in one["name"] or "unlike" in one["name"]]
    assert answers
    assert all(one["holds"] for one in answers)
