"""Where the course's own files lie: at the top of a checkout, inside the package in an installed wheel.

`setup.py` maps the one to the other.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def course_folder(name: str, package: Path = PACKAGE) -> Path:
    """`data`, `docs` or `notebooks`: the folder in the package, where a wheel has it, or the one beside it."""
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def beside(notebooks: Path, path: str) -> Path:
    """A file by its path from the top of the tree, such as `docs/claims.md` or `labkit/cache/dense.py`.

    notebooks: the folder `notebooks` of a checkout or of an installed wheel, where the package is what it lies in.
    """
    top = notebooks.parent
    return top.parent / path if path.startswith(f"{top.name}/") and not (top / top.name).is_dir() else top / path


def checkout(package: Path = PACKAGE) -> Path | None:
    """The top of the tree that the package is read from; None where a wheel was installed."""
    top = package.parent
    return top if (top / "notebooks").is_dir() and (top / "pyproject.toml").is_file() else None
