"""Whatever is imported is declared: nothing comes along only because something else happens to need it."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.tracked import tracked

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OWN = {"labkit", "tests", "benchmarks", "docs", "pictures", "extensions", "get_config"}
NAMES = {
    "IPython": "ipython",
    "rattler": "py-rattler",
    "websocket": "websocket-client",
    "yaml": "pyyaml",
    "zmq": "pyzmq",
}
# Rooms where an extra is there, too; elsewhere what the labs need has to do.
EXTRAS = {
    "labkit/course/grading/": ("classes",),
    "labkit/kernels/": ("test",),  # triton, which torch brings where there is a GPU
    "labkit/labs/lab06/": ("test",),
    "labkit/": (),
    "notebooks/": (),
    "docs/": ("site",),
    "benchmarks/": ("test", "classes", "bench"),
    "tests/": ("test", "site", "classes"),
    "conftest.py": ("test",),
}
ELSEWHERE = {  # run in an environment of their own, which they or the Makefile set up
    "benchmarks/kvpress_inside.py": {"kvpress"},
    "benchmarks/paged_vllm.py": {"vllm"},
}


def declared(extras: Iterable[str]) -> set[str]:
    """The names that are asked for with these extras."""
    texts = PROJECT["dependencies"] + [text for extra in extras for text in PROJECT["optional-dependencies"][extra]]
    return {canonicalize_name(Requirement(text).name) for text in texts}


def imported(source: str) -> Iterator[str]:
    """The top-level packages that code imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0]


def source_of(path: Path) -> str:
    if path.suffix == ".py":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(re.sub(r"^[%!].*", "", c.source, flags=re.M) for c in cells if c.cell_type == "code")


def undeclared(name: str, source: str) -> set[str]:
    """What a file imports and nothing asks for that its room may use."""
    extras = next(extras for room, extras in EXTRAS.items() if name.startswith(room))
    known = declared(extras) | ELSEWHERE.get(name, set())
    found = set(imported(source)) - sys.stdlib_module_names - OWN
    return {package for package in found if canonicalize_name(NAMES.get(package, package)) not in known}


@pytest.mark.parametrize("room", EXTRAS)
def test_every_package_that_is_imported_is_declared_for_its_place(room: str) -> None:
    files = [name for name in tracked(ROOT) if name.startswith(room) and name.endswith((".py", ".ipynb"))]
    assert files
    missing = {name: found for name in files if (found := undeclared(name, source_of(ROOT / name)))}
    assert missing == {}, "declare it in pyproject.toml, then `make lock`"


def test_a_package_that_is_not_declared_is_found_also_inside_a_function() -> None:
    assert undeclared("labkit/new.py", "def f():\n    import scipy.stats\n") == {"scipy"}
    assert undeclared("labkit/new.py", "from nbgrader.api import Gradebook") == {"nbgrader"}
    assert undeclared("labkit/course/grading/new.py", "import nbgrader, json, labkit.cache") == set()
