"""Models and GPUs by name, read from `data/` and validated; a model also from a Hugging Face config.

torch is imported only where a config must be measured (`from_hf_config`).

Put a JSON file of your own into `data/models/`, or one like `gpus.json` beside it as `gpus-mine.json`, and it is there
under its name wherever a model or a GPU can be named.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from labkit.places import course_folder
from labkit.specs.files import SpecError, line_of, read, read_text, short
from labkit.specs.gpu import GpuFile, GpuSpec, LinkSpec
from labkit.specs.hf_config import decoder_spec, from_hf_config
from labkit.specs.model import DECODER_TYPES, Layer, LayerGroup, ModelSpec

__all__ = [
    "DATA",
    "DECODER_TYPES",
    "GpuSpec",
    "Layer",
    "LayerGroup",
    "LinkSpec",
    "ModelSpec",
    "SpecError",
    "decoder_spec",
    "from_hf_config",
    "gpu",
    "gpus",
    "link",
    "links",
    "model",
    "models",
    "problems",
]

Named = TypeVar("Named", GpuSpec, LinkSpec)
Stamp = tuple[int, int]
DATA = course_folder("data")


def model(name: str) -> ModelSpec:
    """The spec in `data/models/`; a SpecError offers the nearest names when there is none, or says what is wrong."""
    files = {path.stem: path for path in _model_files()}
    if not isinstance(name, str) or name not in files:
        raise SpecError(unknown("model spec", name, files))
    return _model(files[name], _stamp(files[name]))


def models() -> dict[str, ModelSpec]:
    """Every spec in `data/models/` that can be read, by name; `problems()` names the others."""
    return {path.stem: spec for path, spec in _read_models().items() if isinstance(spec, ModelSpec)}


def problems() -> list[str]:
    """What is wrong with the files in `data/` that cannot be read or clash, a line each; empty when all are right."""
    return [str(spec) for spec in _read_models().values() if isinstance(spec, SpecError)] + _gpu_table().problems


def _model_files() -> list[Path]:
    """The files of models. Names with a leading dot are other programs' (macOS keeps `._x.json` beside `x.json`)."""
    return sorted(path for path in (DATA / "models").glob("*.json") if not path.name.startswith("."))


def _read_models() -> dict[Path, ModelSpec | SpecError]:
    found: dict[Path, ModelSpec | SpecError] = {}
    for path in _model_files():
        try:
            found[path] = _model(path, _stamp(path))
        except SpecError as error:
            found[path] = error
    return found


def _stamp(path: Path) -> Stamp:
    """Time of change and size: another where the file was changed. (0, 0) where it is not there."""
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_mtime_ns, status.st_size
    return 0, 0


@cache
def _model(path: Path, stamp: Stamp) -> ModelSpec:
    """The stamp is there so that a file that was changed is read anew."""
    spec = read(path, ModelSpec)
    if spec.name != path.stem:
        raise SpecError(f'{path.name}: its name is "{spec.name}": call the file {spec.name}.json, or correct the name')
    return spec


def gpu(name: str) -> GpuSpec:
    """The GPU called `name`; a SpecError offers the nearest names when there is none, and says which file is wrong."""
    return _named("GPU", name, _gpu_table().gpus)


def gpus() -> dict[str, GpuSpec]:
    """Every GPU in `data/gpus.json` and in those of `data/gpus-*.json` that can be read; `problems()` names the others.

    Raises SpecError where `gpus.json` itself is wrong.
    """
    return dict(_gpu_table().gpus)


def link(name: str) -> LinkSpec:
    """The link called `name`; a SpecError offers the nearest names when there is none, and says which file is wrong."""
    return _named("link", name, _gpu_table().links)


def links() -> dict[str, LinkSpec]:
    """Every link between GPUs or machines in the same files, by name."""
    return dict(_gpu_table().links)


def _named(what: str, name: str, known: Mapping[str, Named]) -> Named:
    if not isinstance(name, str) or name not in known:
        wrong = "".join(f"; {problem}" for problem in _gpu_table().problems)  # it may stand there
        raise SpecError(unknown(what, name, known) + wrong)
    return known[name]


@dataclass(frozen=True)
class GpuTable:
    """GPUs and links of all files together, and what is wrong with the files that are not among them."""

    gpus: dict[str, GpuSpec]
    links: dict[str, LinkSpec]
    problems: list[str]


def _gpu_table() -> GpuTable:
    own = sorted(path for path in DATA.glob("gpus-*.json") if not path.name.startswith("."))
    files = [DATA / "gpus.json", *own]  # the course's first: a clash is the other's fault
    return _read_gpu_files(tuple((path, _stamp(path)) for path in files))


@cache
def _read_gpu_files(stamped: tuple[tuple[Path, Stamp], ...]) -> GpuTable:
    """The stamps are there so that a file mended is read anew. A user's file that is wrong adds nothing."""
    course, *own = (path for path, _ in stamped)
    problems: list[str] = []
    table = _merged(GpuTable({}, {}, []), {}, {course: read(course, GpuFile)})
    homes = {("gpus", name): course for name in table.gpus} | {("links", name): course for name in table.links}
    good: dict[Path, GpuFile] = {}
    for path in own:
        try:
            good[path] = read(path, GpuFile)
        except SpecError as error:
            problems.append(str(error))
    while True:  # a file whose links stand in a file that is taken out is wrong as well
        try:
            return dataclasses.replace(_merged(table, homes, good), problems=problems)
        except _WrongFile as error:
            problems.append(str(error))
            del good[error.path]


class _WrongFile(SpecError):
    """A SpecError about one of several files."""

    def __init__(self, path: Path, place: tuple[int | str, ...], said: str) -> None:
        line = line_of(read_text(path), place)
        super().__init__(f"{path.name}, line {line}: {'.'.join(map(str, place))}: {said}")
        self.path = path


def _merged(table: GpuTable, homes: Mapping[tuple[str, str], Path], files: Mapping[Path, GpuFile]) -> GpuTable:
    """The table with the content of `files`. Raises _WrongFile for a name that is taken, or a link that is nowhere."""
    known_gpus, known_links, homes = dict(table.gpus), dict(table.links), dict(homes)
    for path, content in files.items():
        _add(path, "gpus", content.gpus, known_gpus, homes)
        _add(path, "links", content.links, known_links, homes)
    for path, content in files.items():
        for index, spec in enumerate(content.gpus):
            for which, name in enumerate(spec.links):
                if name not in known_links:
                    said = f'{spec.name}: {unknown("link", name, known_links)}; correct it, or add it to "links"'
                    raise _WrongFile(path, ("gpus", index, "links", which), said)
    return GpuTable(known_gpus, known_links, [])


def _add(
    path: Path, key: str, specs: Iterable[Named], known: dict[str, Named], homes: dict[tuple[str, str], Path]
) -> None:
    for index, spec in enumerate(specs):
        if spec.name in known:
            home = homes[key, spec.name].name
            raise _WrongFile(path, (key, index, "name"), f'"{spec.name}" is in {home} already: take another name')
        known[spec.name], homes[key, spec.name] = spec, path


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """What to say when nothing is called `name`."""
    known, asked = sorted(known), str(name)[:80].lower()
    longer = [other for other in known if asked in other.lower()]  # "h100" means one of these, not "h200"
    near = [*longer, *difflib.get_close_matches(asked, known, n=3, cutoff=0.3)] or known
    return f"no {what} is called {short(repr(name))}; nearest: {', '.join(list(dict.fromkeys(near))[:3])}"
