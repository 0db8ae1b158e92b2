"""Runs of the notebooks under strict nbval: made, kept as JUnit that says where, when and of which commit, and read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from labkit.course.workspace import WorkspaceError

NBVAL = ("--nbval", "--nbval-current-env", "--nbval-cell-timeout=400", "--nbval-kernel-startup-timeout=120")
PLAIN = ("-q", "-p", "no:randomly", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:timeout")
UNTOLD = ("time", "timestamp", "hostname")  # what a JUnit file says of the machine and the minute


class ReleaseError(WorkspaceError):
    """A release cannot be made; the message says why and what to do."""


@dataclass(frozen=True)
class Run:
    """One run. `cells`: (edition, lab): how many cells ran, how many failed."""

    where: Mapping[str, str]  # commit, date, device, versions
    cells: Mapping[tuple[str, str], tuple[int, int]]

    @property
    def on_gpu(self) -> bool:
        """Whether it ran on a CUDA GPU."""
        return "cuda" in self.where

    @property
    def failed(self) -> list[str]:
        """The labs in which a cell failed."""
        return [f"{edition}/{lab}" for (edition, lab), (_, failed) in self.cells.items() if failed]


def run_notebooks(tree: Path, folders: Iterable[Path], where: Mapping[str, str], target: Path) -> None:
    """Run every notebook of these folders in `tree`, each an edition, with its labkit; write JUnit to `target`.

    where: what the file says of the run, see `whereabouts`. Failing cells are in the file; ReleaseError when no file
    was written.
    """
    with tempfile.TemporaryDirectory() as scratch:
        own = {"PYTHONPATH": str(tree), "LABKIT_PROGRESS": f"{scratch}/progress.json", "PYTHONIOENCODING": "utf-8"}
        made = Path(scratch, "junit.xml")
        notebooks = sorted(path for folder in folders for path in folder.glob("*.ipynb"))
        names = [str(path.relative_to(tree)) for path in notebooks]
        command = [sys.executable, "-m", "pytest", *PLAIN, *NBVAL, f"--rootdir={tree}", f"--junitxml={made}", *names]
        said = subprocess.run(command, cwd=tree, env=os.environ | own, capture_output=True, text=True, check=False)
        if not made.is_file():
            raise ReleaseError(f"the notebooks could not be run: {(said.stdout + said.stderr).strip()[-400:]}")
        target.write_text(settled(made.read_text(encoding="utf-8"), where), encoding="utf-8")


def settled(text: str, where: Mapping[str, str]) -> str:
    """A JUnit file without times and host, and with `where` as its properties."""
    root = ElementTree.fromstring(text)
    for element in root.iter():
        for name in UNTOLD:
            if name in element.attrib:
                del element.attrib[name]
    for suite in root.iter("testsuite"):
        for old in suite.findall("properties"):
            suite.remove(old)
        properties = ElementTree.Element("properties")
        for name, value in sorted(where.items()):
            ElementTree.SubElement(properties, "property", name=name, value=value)
        suite.insert(0, properties)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def read(path: Path) -> Run:
    """A run from its JUnit file. Raises ReleaseError where the file does not say of which commit it is."""
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise ReleaseError(f"{path.name} cannot be read as JUnit ({error})") from None
    where = {found.get("name", ""): found.get("value", "") for found in root.iter("property")}
    if missing := [name for name in ("commit", "date", "device") if not where.get(name)]:
        raise ReleaseError(f"{path.name} does not say its {missing[0]}: let `labkit verify` write it")
    cells: dict[tuple[str, str], tuple[int, int]] = {}
    for case in root.iter("testcase"):
        named = re.search(r"([\w-]+)\.((\d\d)_[^.]*)\.ipynb", case.get("classname", ""))
        if not named:
            raise ReleaseError(f"{path.name} has a case that is no notebook's: {case.get('classname')}")
        bad = any(case.find(tag) is not None for tag in ("failure", "error", "skipped"))
        ran, failed = cells.get((named[1], named[3]), (0, 0))
        cells[named[1], named[3]] = (ran + 1, failed + bad)
    if not cells:
        raise ReleaseError(f"{path.name} holds no cell that ran")
    return Run(where, dict(sorted(cells.items())))


def whereabouts(commit: str, date: str = "") -> dict[str, str]:
    """What a run now is to say of itself: commit, device, versions, date (today, unless one is given)."""
    from labkit.device import pick_device
    from labkit.measure import provenance

    said = provenance(pick_device().torch_device)
    return said | {"commit": commit} | ({"date": date} if date else {})
