"""Makes `.venv-kvpress`, an environment of its own for kvpress, which wants a transformers older than the labs'.

    python -m benchmarks.kvpress_environment [more arguments for pip]

A benchmark asks `ready()` for its Python, and the environment is made then if it is not there: nobody has to run this
file. It is made under a lock and stamped when it is whole, by `course/once.py`; what becomes of one that fails, or that
was killed, is `course/environments.py`'s.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from labkit.course import once
from labkit.course.environments import NotMade, make_whole

VERSION = "0.5.5"
TRANSFORMERS = "5.2.0"  # the newest that this kvpress takes
TORCH = "2.13.0"
ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".venv-kvpress"
STAMP = f".kvpress-{VERSION}-{TRANSFORMERS}-{TORCH}"  # in the folder: it is whole
BYTES_NEEDED = 3e9  # on disk while it is made, what pip unpacks on its way included; with a torch for GPUs, more
MODULE = "benchmarks.kvpress_environment"
CHECK = f"""
import importlib.metadata as m
import kvpress
found = {{name: m.version(name).split("+")[0] for name in ("kvpress", "transformers", "torch")}}
meant = {{"kvpress": "{VERSION}", "transformers": "{TRANSFORMERS}", "torch": "{TORCH}"}}
assert found == meant, f"{{found}} where {{meant}} are meant"
"""
# What pip says when the disk is full, when versions do not go together, and when it found no index that has them.
FULL, CONFLICT = "No space left on device", "conflicting dependencies"
NO_INDEX = re.compile(r"NewConnectionError|connection broken|name resolution|from versions: none")


def ready(pip_arguments: Sequence[str] = (), folder: Path = FOLDER) -> Path:
    """The Python of the environment, which is made first where it is not there or half made. Raises NotMade."""
    python = folder / "bin" / "python"
    if not (folder / STAMP).is_file():
        making = [sys.executable, "-m", MODULE, "--in", str(folder), *pip_arguments]
        status = subprocess.run(
            [sys.executable, "-P", once.__file__, str(folder / STAMP), *making], cwd=ROOT, check=False
        ).returncode
        if status:
            raise NotMade(f"there is no environment for kvpress {VERSION} (exit {status}); the reason stands above")
    if not os.access(python, os.X_OK):
        raise NotMade(f"the Python of {folder.name} is gone: remove that folder, and it is made anew")
    return python


def main(folder: Path, pip_arguments: Sequence[str] = ()) -> int:
    """Make the environment in `folder`, which may hold anything half made. Returns an exit status."""
    return make_whole(
        folder,
        lambda folder: make(folder, pip_arguments),
        bytes_needed=BYTES_NEEDED,
        says=f"Making {folder.name}: kvpress {VERSION} with transformers {TRANSFORMERS}, 1.4 GB on disk (more where "
        "pip brings a torch for GPUs), about 2 minutes. The labs' own environment stays as it is.",
        who="kvpress",
    )


def make(folder: Path, pip_arguments: Sequence[str]) -> None:
    """The environment itself, step by step. Raises NotMade."""
    step([sys.executable, "-m", "venv", str(folder)], "a virtual environment could not be made")
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *pip_arguments]
    step([*pip, f"torch=={TORCH}", f"transformers=={TRANSFORMERS}", f"kvpress=={VERSION}"], "pip could not install it")
    step([python, "-P", "-c", CHECK], "it is installed and cannot be used")


def step(command: Sequence[str], otherwise: str) -> None:
    """Run one step. NotMade, with `otherwise` and the reason, when it fails; what it said is shown then."""
    quiet = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    result = subprocess.run(command, env=quiet, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    if result.returncode:
        print(result.stderr, file=sys.stderr, flush=True)
        raise NotMade(f"{otherwise}: {reason(result.stderr)}. Nothing is left of it; `python -m {MODULE}` tries again")


def reason(said: str) -> str:
    """Why a step failed, from what it said."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ").rstrip(".") for line in lines if line.startswith("ERROR: ")]
    if FULL in said:
        return "the disk is full"
    if CONFLICT in said:
        return (
            f"versions conflict, so look at pip's settings and constraints. pip says: {errors[0] if errors else said}"
        )
    if NO_INDEX.search(said):
        return (
            "no package index that has it was reached; that takes a network once, or a folder of wheels "
            "(--no-index --find-links FOLDER)"
        )
    return (errors or lines or ["it said nothing"])[-1]


def run(arguments: Sequence[str]) -> int:
    """`--in FOLDER` makes it there, and is for `ready`; without it, it is made where benchmarks look for it."""
    if arguments[:1] == ["--in"]:
        return main(Path(arguments[1]), arguments[2:])
    try:
        print(f"kvpress {VERSION} is in {ready(arguments).parents[1].name}.")
    except NotMade as error:
        print(f"kvpress: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
