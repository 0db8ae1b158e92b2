"""The labs as a learner runs them: seconds to the first figure, seconds in all, and the kernel's peak memory.

    python -m benchmarks.labs [--lab 01 02]

Every notebook is run twice in a fresh kernel: as it stands, and with the references filled in.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from benchmarks.report import bar, begin, finish
from labkit.course import editions
from labkit.course.catalogue import contents, numbers

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
SECONDS, FIRST_FIGURE_SECONDS, GIGABYTES = 90, 20, 4
PEAK = """
import resource, sys
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


def run(notebook: nbformat.NotebookNode) -> tuple[float, float, int]:
    """Run a notebook: `(seconds to the first figure, seconds, peak bytes of the kernel)`."""
    notebook.cells.append(nbformat.v4.new_code_cell(PEAK))
    first_figure: list[float] = []

    def executed(cell, cell_index, execute_reply) -> None:
        shows = any("image/png" in output.get("data", {}) for output in cell.outputs)
        if shows and not first_figure:
            first_figure.append(time.perf_counter() - start)

    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, timeout=600, resources={"metadata": {"path": folder}}, on_cell_executed=executed
        )
        start = time.perf_counter()
        client.execute()
        seconds = time.perf_counter() - start
    return first_figure[0], seconds, int(notebook.cells[-1].outputs[0].text)


def main() -> int:
    """Run, print, and say with the exit code whether every bar holds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--lab", nargs="+", default=numbers(), choices=numbers())
    arguments = parser.parse_args()
    begin()
    figures: dict[str, float] = {}
    bars = []
    for number in arguments.lab:
        (path,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
        notebook = nbformat.read(path, as_version=4)
        exercises = {exercise.id: exercise for exercise in contents(number).exercises}
        for edition, made in (("open", notebook), ("filled", editions.fill(notebook, exercises))):
            first, seconds, peak = run(made)
            name = f"lab {number} {edition}"
            found = {"first figure s": first, "seconds": seconds, "peak GB": peak / 1e9}
            figures |= {f"{name} {what}": round(value, 2) for what, value in found.items()}
            print(f"{name}: first figure {first:.1f} s, all {seconds:.1f} s, peak {peak / 1e9:.2f} GB")
            bars += [
                bar(f"{name} seconds", seconds, "<=", SECONDS),
                bar(f"{name} peak GB", peak / 1e9, "<=", GIGABYTES),
            ]
            bars.append(bar(f"{name} first figure s", first, "<=", FIRST_FIGURE_SECONDS))
    return finish("labs", figures, bars, "cpu", "python -m benchmarks.labs")


if __name__ == "__main__":
    raise SystemExit(main())
