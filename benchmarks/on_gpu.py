"""Everything that a machine with a CUDA GPU is for: tests and notebooks on it, then all benchmarks, one file each.

    python -m benchmarks.on_gpu [--workers 4] [--only tests notebooks kernels positions sanitizer]

The notebooks run side by side, each in a process of its own, under strict nbval. A benchmark's last line is kept as
`data/results/<device>_<benchmark>.json`, whether its bars hold or not. Last, where CUDA has its compute-sanitizer, it
watches the kernels' tests for accesses beside memory. What fails or takes too long is named at the end, ends nothing
else, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from labkit.course.release.runs import NBVAL, PLAIN

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "data" / "results"
BENCHMARKS = {  # seconds that each may take
    "kernels": 300, "gpu_decode": 240, "positions": 300, "gpu_engine": 300, "gpu_memory": 240,
}  # fmt: skip
SANITIZER = "compute-sanitizer"
TESTS, NOTEBOOKS, WATCHED, WARNING = 1800, 1200, 1800, 10  # seconds; the last from being asked to end to being ended


class Step:
    """A process whose output goes to a file; it ends, with all that it started, when its time is over."""

    def __init__(self, name: str, command: Sequence[str], seconds: float) -> None:
        self.name, self.log, self.until = name, tempfile.TemporaryFile("w+"), time.monotonic() + seconds
        self.scratch = tempfile.TemporaryDirectory()
        own = {"LABKIT_DEVICE": "cuda", "LABKIT_PROGRESS": str(Path(self.scratch.name) / "progress.json")}
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=subprocess.STDOUT, env=os.environ | own, cwd=ROOT, start_new_session=True
        )

    def wait(self) -> tuple[int, str]:
        """Exit code, and what was printed. The code is 124 where time ran out."""
        try:
            code = self.process.wait(max(0.0, self.until - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = 124
            for sent in (signal.SIGTERM, signal.SIGKILL):
                os.killpg(self.process.pid, sent)
                try:
                    self.process.wait(WARNING)
                    break
                except subprocess.TimeoutExpired:
                    continue
        self.log.seek(0)
        said = self.log.read()
        self.log.close()
        self.scratch.cleanup()
        return code, said


def slug(device: str) -> str:
    """A GPU's name as files are called: "NVIDIA H100 80GB HBM3" is h100."""
    words = re.findall(r"[a-z0-9]+", device.lower())
    models = [word for word in words if re.search(r"[a-z]", word) and re.search(r"\d", word)]
    models = [word for word in models if not re.fullmatch(r"\d+gb|hbm\d+\w*", word)]
    return models[0] if models else "-".join(word for word in words if word != "nvidia") or "gpu"


def last_object(said: str) -> dict[str, Any] | None:
    """What a benchmark printed last, if that is a record."""
    try:
        record = json.loads(said.strip().rpartition("\n")[2])
        return record if isinstance(record["device"], str) and re.fullmatch(r"\w+", record["benchmark"]) else None
    except (ValueError, KeyError, TypeError):
        return None


def keep(said: str, folder: Path) -> Path | None:
    """Write the record to its file, and say which; None where there is none."""
    if (record := last_object(said)) is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slug(record['device'])}_{record['benchmark']}.json"
    path.write_text(json.dumps(record, indent=4) + "\n", encoding="utf-8")
    return path


def run(plan: Sequence[tuple[str, Sequence[str], float]], side_by_side: bool = False) -> dict[str, tuple[int, str]]:
    """Exit code and output of each step, printed as they end."""
    done = {}
    started = [Step(*step) for step in plan] if side_by_side else (Step(*step) for step in plan)
    for step in started:
        code, said = done[step.name] = step.wait()
        print(f"==== {step.name}: exit {code}{' (out of time)' if code == 124 else ''}\n{said}", flush=True)
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; 0 when all of it passed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", default="2", help="processes for the tests")
    parser.add_argument("--only", nargs="+", default=None, choices=["tests", "notebooks", *BENCHMARKS, "sanitizer"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args(arguments)
    only = asked.only or ["tests", "notebooks", *BENCHMARKS, "sanitizer"]
    pytest = (sys.executable, "-m", "pytest")
    done = {}
    if "tests" in only:
        parallel = ("-n", asked.workers, "--dist", "worksteal")
        done |= run(
            [("tests", (*pytest, "-p", "no:cacheprovider", "tests", "--ignore=tests/browser", *parallel), TESTS)]
        )
    if "notebooks" in only:
        notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
        done |= run(
            [(path.stem, (*pytest, *PLAIN, *NBVAL, str(path)), NOTEBOOKS) for path in notebooks],
            side_by_side=True,
        )
    for name in (name for name in BENCHMARKS if name in only):
        done |= run([(name, (sys.executable, "-m", f"benchmarks.{name}"), BENCHMARKS[name])])
        path = keep(done[name][1], asked.results)
        print(f"kept as {path.name}" if path else f"{name} printed no record", flush=True)
        if path is None:
            done[name] = (done[name][0] or 1, done[name][1])
    if "sanitizer" in only and not shutil.which(SANITIZER):
        print(f"sanitizer: left out, since there is no {SANITIZER} here; it comes with the CUDA toolkit")
        done |= {"sanitizer": (1, "")} if asked.only else {}
    elif "sanitizer" in only:
        watched = (SANITIZER, "--error-exitcode", "1", "--target-processes", "all")
        done |= run([("sanitizer", (*watched, *pytest, "-q", "-p", "no:cacheprovider", "tests/kernels"), WATCHED)])
    failed = [name for name, (code, _) in done.items() if code]
    print(f"{len(done) - len(failed)} of {len(done)} passed" + "".join(f"\nFAILED: {name}" for name in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
