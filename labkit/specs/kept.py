"""Answers that took transformers some seconds, kept in the cache folder so that they are there at once next time."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from labkit import files

# What an answer depends on besides the config: these files, and transformers.
MEASURING = ("measured.py", "built.py", "heard.py", "names.py", "keys.py")
LARGEST = 10**6  # bytes of an answer


def kept(question: Any, answer: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The answer kept for `question` (JSON), or else the one that `answer` gives now, which is then kept.

    A file that is damaged or of another version is not believed; a folder that cannot be written keeps nothing.
    """
    path = _path(_digest([question, _versions()]))
    if path is not None and (found := _read(path)) is not None:
        return found
    given = json.loads(json.dumps(answer(), default=str))
    if path is not None:
        with contextlib.suppress(OSError):
            files.make_folder(path.parent)
            files.remove_leftovers(path)
            files.write_whole(path, json.dumps({"digest": _digest(given), "answer": given}).encode())
    return given


def _path(key: str) -> Path | None:
    """Where the answer is kept; None where there can be no cache folder."""
    from labkit.lab_model import ModelError, cache_folder

    try:
        return cache_folder() / "specs" / f"{key}.json"
    except ModelError:
        return None


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
        stored = json.loads(files.read_file(path, LARGEST))
        return stored["answer"] if stored["digest"] == _digest(stored["answer"]) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
