"""`labkit lint`: what is wrong with notebooks and is seen without running them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Add `labkit lint [NOTEBOOK ...]`."""
    parser = commands.add_parser("lint", help="find what is wrong with notebooks, without running them (authors)")
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK", help="default: all of notebooks/")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print what is found: file, cell, what, and a line on what to do; 1 when anything is."""
    from labkit.course.lint import lint
    from labkit.places import course_folder

    paths = options.notebooks or sorted(course_folder("notebooks").glob("*.ipynb"))
    findings = [finding for path in paths for finding in lint(shortest(path))]
    for finding in findings:
        print(finding)
    print(f"notebooks: {len(paths)}, findings: {len(findings)}")
    return 1 if findings or not paths else 0


def shortest(path: Path) -> Path:
    """A path as one would type it here."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_absolute() and path.is_relative_to(here) else path
