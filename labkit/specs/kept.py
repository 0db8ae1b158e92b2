"""Answers that took transformers some seconds, kept in the cache folder so that they are there at once next time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MEASURING = (
    "measured.py",
    "names.py",
    "keys.py",
)  # what an answer depends on besides the config: these files, and transformers
LARGEST = 10**6  # bytes of an answer


def kept(question: Any, answer: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The answer kept for `question` (JSON), or else the one that `answer` gives now, which is then kept.

    A file that is damaged or of another version is not believed; a folder that cannot be written keeps nothing.
    """
    from labkit.lab_model import cache_folder

    key = _digest([question, _versions()])
    path = cache_folder() / "specs" / f"{key}.json"
    if (found := _read(path)) is not None:
        return found
    given = json.loads(json.dumps(answer(), default=str))
    with contextlib.suppress(OSError):
        _write(path, given)
    return given


def _versions() -> list[str]:
    here = Path(__file__).parent
    sources = [hashlib.sha256((here / name).read_bytes()).hexdigest() for name in MEASURING]
    try:
        return [version("transformers"), *sources]
    except PackageNotFoundError:
        return sources


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            return None
        stored = json.loads(path.read_text(encoding="utf-8"))
        return stored["answer"] if stored["digest"] == _digest(stored["answer"]) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _write(path: Path, answer: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, work = tempfile.mkstemp(prefix=".", suffix=".json", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"digest": _digest(answer), "answer": answer}, file)
        os.replace(work, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(work)
        raise
