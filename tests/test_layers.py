"""The house stands: dependencies point down only, labs know nothing of each other, no module is imported in a circle.

Read off every import statement in the package and every notebook, those inside functions included.
"""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "labkit"

# From the bottom; rooms of one floor do not know each other. A room is a module or a package of labkit.
FLOORS = (
    ("files", "interrupts", "limits", "places", "printable"),
    ("device", "lab_model"),
    ("specs",),
    ("sizing",),
    ("attention", "quantization", "rotation"),
    ("kernels",),
    ("prepacked",),
    ("cache", "ledger"),
    ("llama", "measure"),
    ("generation", "graphs", "models"),
    ("engine", "hf", "quality", "claims", "plots", "results"),
    ("widgets",),
    ("course",),
    ("labs",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
NOTEBOOK_WORLD = {
    "IPython",
    "ipykernel",
    "ipywidgets",
    "jupyter_client",
    "jupyterlab",
    "nbclient",
    "nbconvert",
    "nbformat",
}


def name_of(path: Path) -> str:
    """labkit.cache.cache, and labkit.cache for its __init__."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def imported(node: ast.AST) -> Iterator[str]:
    """What an import statement imports: modules by their whole name, where a name is one."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"a relative import of {node.module}"
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            yield whole if whole in MODULES else str(node.module)


def imports(tree: ast.AST) -> set[str]:
    """All that a module imports, wherever the statement stands."""
    return {name for node in ast.walk(tree) for name in imported(node)}


def room(module: str) -> str:
    """labkit.cache.dense stands in the room `cache`."""
    return module.split(".")[1]


def lab(module: str) -> str:
    """The lab that a module or file belongs to, as "02"; nothing for others."""
    found = re.match(r"(?:labkit\.labs\.lab|tests\.labs\.lab)(\d\d)", module)
    return found[1] if found else ""


def test_every_room_has_its_floor() -> None:
    rooms = {room(name) for name in MODULES if "." in name}
    assert rooms - FLOOR.keys() == set(), "say in FLOORS what the new room stands on"


@pytest.mark.parametrize("module", [name for name in MODULES if "." in name])
def test_dependencies_point_down(module: str) -> None:
    mine = room(module)
    for name in imports(MODULES[module]):
        if name.startswith("labkit.") and (other := room(name)) != mine:
            assert FLOOR[other] < FLOOR[mine], f"{module} imports {name}, which stands no lower"


def test_labs_import_nothing_of_another_lab() -> None:
    for module, tree in MODULES.items():
        assert {lab(name) for name in imports(tree)} - {"", lab(module)} == set(), module


def test_a_lab_s_notebook_and_tests_import_nothing_of_another_lab() -> None:
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        assert {lab(name) for name in imports(ast.parse(source))} - {"", path.name[:2]} == set(), path.name
    for path in (ROOT / "tests" / "labs").glob("lab*/*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert {lab(name) for name in imports(tree)} - {"", lab(name_of(path))} == set(), path


def test_what_stands_below_the_course_knows_no_notebooks() -> None:
    for module, tree in MODULES.items():
        if "." in module and FLOOR[room(module)] < FLOOR["course"] and room(module) != "widgets":
            assert {name.split(".")[0] for name in imports(tree)} & NOTEBOOK_WORLD == set(), module


def test_sizing_and_specs_load_no_torch() -> None:
    for module, tree in MODULES.items():
        if "." in module and room(module) in ("specs", "sizing"):
            for node in at_import(tree):
                assert not any(name.split(".")[0] in ("torch", "transformers") for name in imported(node)), module


def at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """The statements that run when a module is imported."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)


def test_no_module_is_imported_in_a_circle() -> None:
    graph = {
        module: {name for node in at_import(tree) for name in imported(node) if name in MODULES and name != module}
        for module, tree in MODULES.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
