"""The site as `make site` makes it, for the tests that read it and those that look at it in a browser."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from filelock import FileLock

from labkit import measure

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "build" / "tested-site"
TOOK = BUILT / "took.json"
READ = ("docs/**/*", "notebooks/*.ipynb", "labkit/**/*.py", "*.md", "Makefile", "pyproject.toml", "data/claims.yaml")


def built() -> Path:
    """The folder of a site made of the files as they are now: made once, however many test runs ask for it.

    Raises AssertionError with what Sphinx said when it does not build, or warns.
    """
    BUILT.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILT / "lock"):
        stamp, state = BUILT / "stamp", state_of_files()
        if not (stamp.exists() and stamp.read_text() == state and TOOK.exists()):
            stamp.unlink(missing_ok=True)
            shutil.rmtree(BUILT / "html", ignore_errors=True)
            TOOK.write_text(json.dumps(timed("html")))
            stamp.write_text(state)
    return BUILT / "html"


def timed(name: str) -> dict[str, float | str]:
    """`make`, with the seconds it took, those of computing among them, and what else the machine did, or nothing."""
    try:
        busy = measure.quiet().get("busy", "")
    except measure.BusyError as error:
        busy = str(error)
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    make(name)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    computing = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - start, "computing": computing, "busy": busy}


def make(name: str) -> None:
    """`make site` into a folder of `BUILT`."""
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    command = ["make", "site", f"PY={sys.executable}", f"SITE={BUILT / name}"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def state_of_files() -> str:
    """A digest of every file that the site is made of."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in READ for path in ROOT.glob(pattern) if path.is_file()}):
        if "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()
