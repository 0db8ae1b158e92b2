"""Run notebooks in place and keep outputs, with what they are outputs of: `python -m labkit.course.record FILE...`.

Beside each code cell's output stands, in the cell's metadata, `labkit`: the digest of the `source` that was run, and of
a measured cell what the `machine` did else, before the notebook ran and after it. `labkit lint` reads both.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from labkit.files import write_whole

MEASURED = "nbval-ignore-output"  # the tag of cells that no two runs print alike
KEY = "labkit"


def digest(source: str) -> str:
    """What a cell's source is known by: 16 hexadecimal digits; blanks at line ends and around it do not count."""
    lines = [line.rstrip() for line in source.strip().splitlines()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def kept(cell: NotebookNode) -> dict[str, Any]:
    """What was written beside a cell's output; empty when nothing was."""
    return cell.metadata.get(KEY, {})


def stamp(cells: Iterable[NotebookNode], machine: str = "") -> None:
    """Write beside outputs that have just been made what they are of. machine: "quiet", or "busy: " and why."""
    for cell in cells:
        if cell.cell_type == "code" and cell.source.strip():
            cell.metadata[KEY] = {"source": digest(cell.source)}
            if machine and MEASURED in cell.metadata.get("tags", []):
                cell.metadata[KEY]["machine"] = machine


def look() -> str:
    """ "quiet", or "busy: " and why where LABKIT_BUSY=allow lets that pass; BusyError where it does not."""
    from labkit import measure

    found = measure.quiet()
    return f"busy: {found['busy']}" if "busy" in found else "quiet"


def execute(path: Path) -> NotebookNode:
    """The notebook, run from top to bottom in its own folder by nbconvert and stripped of what is of one run alone."""
    with tempfile.TemporaryDirectory() as folder:
        run = ["nbconvert", "--to", "notebook", "--execute", "--ExecutePreprocessor.record_timing=False"]
        module(*run, f"--output-dir={folder}", str(path))
        made = Path(folder, path.name)
        module("nbstripout", "--keep-output", "--keep-count", "--keep-id", "--extra-keys",
               "metadata.widgets metadata.language_info.version cell.metadata.execution", str(made))  # fmt: skip
        return nbformat.read(made, as_version=4)


def module(*command: str) -> None:
    """Run a module of this Python; CalledProcessError when it fails."""
    subprocess.run([sys.executable, "-m", *command], check=True)


def record(path: Path, only: Sequence[str] = ()) -> str:
    """Run a notebook and write it back, all of it or the outputs of the cells named in `only`; says what it was.

    Raises BusyError before it starts where the machine is busy; ValueError for a cell that is not there.
    """
    before = nbformat.read(path, as_version=4)
    if missing := set(only) - {cell.id for cell in before.cells}:
        raise ValueError(f"{path} has no cell {', '.join(sorted(missing))}")
    machine = look()
    made = execute(path)
    if machine == "quiet":
        machine = afterwards()
    if only:
        outputs = {cell.id: cell for cell in made.cells}
        chosen = [cell for cell in before.cells if cell.id in only]
        for cell in chosen:
            cell.outputs, cell.execution_count = outputs[cell.id].outputs, outputs[cell.id].execution_count
        made = before
    else:
        chosen = made.cells
    stamp(chosen, machine)
    write(made, path)
    return machine


def afterwards() -> str:
    """As `look`, after the run: a machine that has become busy is no reason to lose what was made, but it is said."""
    from labkit.measure import BusyError

    try:
        return look()
    except BusyError as error:
        return f"busy: {str(error).partition(': wait')[0]}"


def write(notebook: NotebookNode, path: Path) -> None:
    """All or nothing."""
    write_whole(path, nbformat.writes(notebook).encode() + b"\n", mode=0o644)


def main(arguments: Sequence[str] | None = None) -> int:
    """Record what was named; 1 when the machine is busy, a cell fails or is not there."""
    from labkit.device import set_threads
    from labkit.measure import BusyError

    parser = argparse.ArgumentParser(prog="python -m labkit.course.record", description=__doc__.partition("\n")[0])
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="FILE")
    parser.add_argument(
        "--only", action="append", default=[], metavar="CELL", help="keep the output of this cell alone"
    )
    options = parser.parse_args(arguments)
    set_threads()
    for path in options.notebooks:
        try:
            print(f"{path}: recorded, the machine was {record(path, options.only)}", flush=True)
        except (BusyError, ValueError, OSError, subprocess.CalledProcessError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
