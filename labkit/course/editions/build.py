"""`labkit build`: each edition into a folder of its own, from `notebooks/`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from labkit.course.catalogue import contents, numbers
from labkit.course.contents import LabContents
from labkit.course.linked import lead, pages, wanted
from labkit.course.workspace import WorkspaceError
from labkit.files import make_folder, write_whole


class BuildError(WorkspaceError):
    """An edition cannot be built; the message says why and what to do."""


def build(
    root: Path, out: Path, editions: Sequence[str], labs: Sequence[str] = (), say: Callable[[str], None] = print
) -> list[Path]:
    """Write the editions of the labs (all when none is named) from `root`/notebooks; returns the files written.

    Each goes to `out`/EDITION, with what its text links to in `reading/` there. Raises BuildError, before anything is
    written where the folder for nbgrader is a class's already.
    """
    unknown = [name for name in editions if name not in EDITIONS]
    if unknown:
        raise BuildError(f"there is no edition {unknown[0][:40]!r}; there are {', '.join(EDITIONS)}")
    sources = notebooks(root, labs)
    if (out / "notebooks").resolve() == (root / "notebooks").resolve() or out.resolve() == (
        root / "notebooks"
    ).resolve():
        raise BuildError(f"{out} is where the notebooks come from: name another folder with --out")
    if "nbgrader" in editions:
        refuse_a_class(out / "nbgrader")
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
    except OSError as error:
        raise BuildError(f"{error.filename or out} cannot be written ({error.strerror or error}): try --out") from None
    return written


def refuse_a_class(folder: Path) -> None:
    """Raise BuildError where a class lies in a folder: its hidden cases, points and limits would be lost."""
    if found := [name for name in ("gradebook.db", "nbgrader_config.py") if (folder / name).exists()]:
        raise BuildError(
            f"{folder} holds a class ({' and '.join(found)}): building there would draw new hidden cases and undo its "
            f"limits. Nothing was changed. Add a lab with labkit grade setup {folder} --lab 01, or name another "
            "folder with --out"
        )


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


def led(notebook: NotebookNode, sources: Collection[Path]) -> NotebookNode:
    """A notebook as an edition of these has it: its links lead to what lies beside it."""
    lead(notebook, next(iter(sources)).parent, {path.name for path in sources})
    return notebook


def linked(made: dict[Path, NotebookNode]) -> dict[str, bytes]:
    """What notebooks link to, by its place in the folder of an edition. made: by the files that they were made from."""
    paths = {path for notebook in made.values() for path in wanted(notebook)}
    return pages(paths, next(iter(made)).parent, {path.name for path in made})


Made = Iterator[tuple[Path, bytes]]


def as_notebooks(
    make: Callable[[NotebookNode, LabContents], NotebookNode], sources: dict[Path, LabContents], folder: Path
) -> Made:
    """An edition of notebooks, each made from the one in `notebooks/`."""
    made = {path: make(read(path), lab) for path, lab in sources.items()}
    for place, content in linked(made).items():
        yield folder / place, content
    for path, notebook in made.items():
        yield folder / path.name, to_bytes(led(notebook, sources))


def self_paced(sources: dict[Path, LabContents], folder: Path) -> Made:
    """As they stand."""
    return as_notebooks(lambda notebook, lab: notebook, sources, folder)


def instructor(sources: dict[Path, LabContents], folder: Path) -> Made:
    """With references and teaching notes."""
    from labkit.course.editions.instructor import instructor

    return as_notebooks(instructor, sources, folder)


def slides(sources: dict[Path, LabContents], folder: Path) -> Made:
    """As slides in HTML, with reveal.js beside them."""
    from labkit.course.editions.html import linked_pages
    from labkit.course.editions.reveal import reveal_files
    from labkit.course.editions.slides import slides

    for name, content in reveal_files().items():
        yield folder / "reveal.js" / name, content
    made = {path: read(path) for path in sources}
    for place, content in linked_pages(linked(made)).items():
        yield folder / place, content
    for path, lab in sources.items():
        yield folder / f"{path.stem}.html", slides(led(made[path], sources), lab).encode()


def nbgrader(sources: dict[Path, LabContents], folder: Path) -> Made:
    """A class's folder for nbgrader, with a source for every lab; nobody else may look into it."""
    from labkit.course.grading.classroom import configured
    from labkit.course.grading.room import Limits
    from labkit.course.grading.source import assignment

    folder.chmod(0o700)
    yield folder / "nbgrader_config.py", configured(Limits())
    for path in sources:
        for place, content in assignment(path)[1].items():
            yield folder / "source" / f"lab{path.name[:2]}" / place, content


EDITIONS: dict[str, Callable[[dict[Path, LabContents], Path], Made]] = {
    "self-paced": self_paced,
    "instructor": instructor,
    "slides": slides,
    "nbgrader": nbgrader,
}
PUBLISHED = tuple(name for name in EDITIONS if name != "nbgrader")  # whose cases are hidden, with seeds of one class
