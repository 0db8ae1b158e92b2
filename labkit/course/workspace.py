"""The learner's copy of the notebooks: refreshed, never overwritten.

A file in the work folder may be replaced only if it is, byte for byte, a version that was put there by `refresh`. The
manifest lists those versions; whatever is not in it belongs to the learner.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from labkit.files import locked, make_folder, read_text, remove_leftovers, write_whole

MANIFEST = ".labkit-copies.json"


class WorkspaceError(RuntimeError):
    """The work folder cannot be used; the message says why and what to do."""


def refresh(notebooks: Path, work: Path) -> list[str]:
    """Bring `work` up to date with `notebooks/*.ipynb`; returns one line per notebook that was copied or kept back.

    New: copied. As it was copied before: replaced by the newer version. Changed by the learner: left alone, and named
    when a newer version exists. Safe to call from several processes at once. Raises WorkspaceError.
    """
    lines: list[str] = []
    try:
        make_folder(work)
        with locked(work.parent / f".{work.name}", timeout=60):
            remove_leftovers(work / MANIFEST)
            copies = _read(work / MANIFEST)
            for source in sorted(notebooks.glob("*.ipynb")):
                remove_leftovers(work / source.name)
                if line := _refresh_one(source, work, copies):
                    lines.append(line)
    except OSError as error:
        done = f"done so far: {', '.join(lines)}; the rest is as it was" if lines else "no notebook in it was changed"
        raise WorkspaceError(
            f"The work folder {work} cannot be used ({error.strerror or 'another process holds its lock'}). Make it a "
            f"writable folder with free space and run `make lab` again; {done}."
        ) from error
    return lines


def _refresh_one(source: Path, work: Path, copies: dict[str, list[str]]) -> str | None:
    content, target = source.read_bytes(), work / source.name
    newest = _digest(content)
    known = copies.setdefault(source.name, [])
    if not os.path.lexists(target):
        said = f"{source.name}: copied"
    else:
        here = _digest(target.read_bytes()) if target.is_file() else None
        if here == newest and newest in known:
            return None
        if here != newest and here not in known:
            return None if known[-1:] == [newest] else _kept_back(target)
        said = f"{source.name}: brought up to date" if here != newest else ""
    # The version is written down before the copy: killed in between, the copy is still known as ours.
    copies[source.name] = [version for version in known if version != newest] + [newest]
    write_whole(work / MANIFEST, json.dumps(copies, indent=1).encode(), mode=0o644)
    if said:
        write_whole(target, content, mode=0o644)
    return said or None


def _kept_back(target: Path) -> str:
    return (
        f"{target.name}: yours is kept; a newer version exists. To get it, rename yours in {target.parent.name}/ and "
        "run `make lab` again."
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
