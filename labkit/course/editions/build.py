"""`labkit build`: each edition into a folder of its own, from `notebooks/`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from labkit.course.catalogue import contents, numbers
from labkit.course.contents import LabContents
from labkit.course.workspace import WorkspaceError
from labkit.files import make_folder, write_whole

LINK = re.compile(r"\]\(\.\./([^)#\s]+)")  # to a file beside `notebooks/`


class BuildError(WorkspaceError):
    """An edition cannot be built; the message says why and what to do."""


def build(
    root: Path, out: Path, editions: Sequence[str], labs: Sequence[str] = (), say: Callable[[str], None] = print
) -> list[Path]:
    """Write the editions of the labs (all when none is named) from `root`/notebooks; returns the files written.

    Each goes to `out`/EDITION. Files that their text links to are put beside, at the same place from there. Raises
    BuildError.
    """
    unknown = [name for name in editions if name not in EDITIONS]
    if unknown:
        raise BuildError(f"there is no edition {unknown[0][:40]!r}; there are {', '.join(EDITIONS)}")
    sources = notebooks(root, labs)
    if (out / "notebooks").resolve() == (root / "notebooks").resolve() or out.resolve() == (
        root / "notebooks"
    ).resolve():
        raise BuildError(f"{out} is where the notebooks come from: name another folder with --out")
    written: list[Path] = []
    try:
        for name in editions:
            folder = out / name
            make_folder(folder)
            for target, content in EDITIONS[name](sources, folder):
                make_folder(target.parent)
                write_whole(target, content, mode=0o644)
                written.append(target)
            say(f"{name}: {len(sources)} labs in {folder}")
        for linked in sorted(linked_files(sources)):
            if (root / linked).is_file():
                make_folder((out / linked).parent)
                write_whole(out / linked, (root / linked).read_bytes(), mode=0o644)
    except OSError as error:
        raise BuildError(f"{error.filename or out} cannot be written ({error.strerror or error}): try --out") from None
    return written


def notebooks(root: Path, labs: Sequence[str] = ()) -> dict[Path, LabContents]:
    """The notebooks of these labs and what the labs hold, in order."""
    known = numbers()
    wanted = [f"{int(lab):02d}" if lab.isascii() and lab.isdigit() else lab for lab in labs] or known
    if unknown := [lab for lab in wanted if lab not in known]:
        raise BuildError(f"there is no lab {unknown[0][:20]!r}; there are {', '.join(known)}")
    found = {path.name[:2]: path for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))}
    if missing := [lab for lab in wanted if lab not in found]:
        raise BuildError(f"{root / 'notebooks'} has no notebook of lab {missing[0]}")
    return {found[lab]: contents(lab) for lab in sorted(set(wanted))}


def read(path: Path) -> NotebookNode:
    """A notebook. Raises BuildError."""
    try:
        return nbformat.read(path, as_version=4)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, UnicodeDecodeError) as error:
        raise BuildError(f"{path.name} is no notebook: {' '.join(str(error).split())[:120]}") from None


def to_bytes(notebook: NotebookNode) -> bytes:
    """A notebook as a file's content."""
    nbformat.validate(notebook)
    return (nbformat.writes(notebook).rstrip("\n") + "\n").encode()


def linked_files(sources: Iterable[Path]) -> set[str]:
    """What the notebooks' text links to beside their folder, as paths from the top."""
    text = "\n".join(cell.source for path in sources for cell in read(path).cells if cell.cell_type == "markdown")
    return {*LINK.findall(text), *(f"docs/kill_table/lab{path.name[:2]}.md" for path in sources)}


Made = Iterable[tuple[Path, bytes]]


def self_paced(sources: dict[Path, LabContents], folder: Path) -> Made:
    """As they stand."""
    for path in sources:
        yield folder / path.name, path.read_bytes()


def instructor(sources: dict[Path, LabContents], folder: Path) -> Made:
    """With references and teaching notes."""
    from labkit.course.editions.instructor import instructor

    for path, lab in sources.items():
        yield folder / path.name, to_bytes(instructor(read(path), lab))


def slides(sources: dict[Path, LabContents], folder: Path) -> Made:
    """As slides in HTML, with reveal.js beside them."""
    from labkit.course.editions.reveal import reveal_files
    from labkit.course.editions.slides import slides

    for name, content in reveal_files().items():
        yield folder / "reveal.js" / name, content
    for path, lab in sources.items():
        yield folder / f"{path.stem}.html", slides(read(path), lab).encode()


EDITIONS: dict[str, Callable[[dict[Path, LabContents], Path], Made]] = {
    "self-paced": self_paced,
    "instructor": instructor,
    "slides": slides,
}
