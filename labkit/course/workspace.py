"""The learner's copy of the notebooks: where it lies, and how it is refreshed without overwriting anything.

Beside the notebooks lie the pages that they link to, in `reading/` (`labkit.course.linked`).

A file in the work folder may be replaced only if it is, byte for byte, a version that was put there by `refresh`. The
manifest lists those versions; whatever is not in it belongs to the learner.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from labkit.course.linked import opened
from labkit.files import locked, make_folder, read_text, remove_leftovers, user_path, write_whole
from labkit.places import checkout

MANIFEST = ".labkit-copies.json"
KEPT = "yours is kept"
FOLDER = "kv-cache-labs"  # made by an installed wheel where the current folder holds other things


class WorkspaceError(RuntimeError):
    """The work folder cannot be used; the message says why and what to do."""


def work_folder(asked: str | None = None, top: Path | None = None) -> Path:
    """The folder for the learner's copies: `asked`, or `work/` in the checkout `top`.

    Without a checkout: the current folder, if nothing but the copies lies there, or else `kv-cache-labs/` in it.
    Raises WorkspaceError.
    """
    try:
        if asked is not None:
            return user_path(asked)
        if top is not None:
            return top / "work"
        here = user_path(".")
        empty = all(name.startswith(".") for name in os.listdir(here))
    except OSError as error:
        where = f"The folder {asked}" if asked else "The current folder"
        remedy = "name another, as in `labkit open ~/labs`"
        raise WorkspaceError(f"{where} cannot be used ({error.strerror}): {remedy}.") from error
    return here if empty or (here / MANIFEST).exists() else here / FOLDER


def opens() -> str:
    """What a learner types to open the labs: `make lab` in a checkout, `labkit open` where a wheel was installed."""
    return "make lab" if checkout() else "labkit open"


def refresh(notebooks: Path, work: Path) -> list[str]:
    """Bring `work` up to date with `notebooks/*.ipynb` and what they link to; returns one line per notebook that was
    copied or kept back, and per page that was kept back.

    New: copied. As it was copied before: replaced by the newer version. Changed by the learner: left alone, and named
    when a newer version exists. Safe to call from several processes at once. Raises WorkspaceError.
    """
    lines: list[str] = []
    try:
        make_folder(work)
        with locked(work / MANIFEST, timeout=60):
            remove_leftovers(work / MANIFEST)
            copies = _read(work / MANIFEST)
            for name, content in opened(notebooks).items():
                make_folder((work / name).parent)
                remove_leftovers(work / name)
                if (line := _refresh_one(name, content, work, copies)) and ("/" not in name or KEPT in line):
                    lines.append(line)
    except OSError as error:
        done = f"done so far: {', '.join(lines)}; the rest is as it was" if lines else "no notebook in it was changed"
        raise WorkspaceError(
            f"The work folder {work} cannot be used ({error.strerror or 'another process holds its lock'}). Make it a "
            f"writable folder with free space and run `{opens()}` again; {done}."
        ) from error
    return lines


def _refresh_one(name: str, content: bytes, work: Path, copies: dict[str, list[str]]) -> str | None:
    target = work / name
    newest = _digest(content)
    known = copies.setdefault(name, [])
    if not os.path.lexists(target):
        said = f"{name}: copied"
    else:
        here = _digest(target.read_bytes()) if target.is_file() else None
        if here == newest and newest in known:
            return None
        if here != newest and here not in known:
            return None if known[-1:] == [newest] else _kept_back(name, target)
        said = f"{name}: brought up to date" if here != newest else ""
    # The version is written down before the copy: killed in between, the copy is still known as ours.
    copies[name] = [version for version in known if version != newest] + [newest]
    write_whole(work / MANIFEST, json.dumps(copies, indent=1).encode(), mode=0o644)
    if said:
        write_whole(target, content, mode=0o644)
    return said or None


def _kept_back(name: str, target: Path) -> str:
    return (
        f"{name}: {KEPT}; a newer version exists. To get it, rename yours in {target.parent.name}/ and "
        f"run `{opens()}` again."
    )


def _read(manifest: Path) -> dict[str, list[str]]:
    """What was copied before; a damaged manifest counts as none, so that every file counts as the learner's."""
    try:
        found = json.loads(read_text(manifest))
        return {str(name): [str(version) for version in versions] for name, versions in found.items()}
    except (FileNotFoundError, ValueError, AttributeError, TypeError, RecursionError):
        return {}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
