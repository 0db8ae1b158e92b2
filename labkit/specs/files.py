"""JSON specs read from files, and what is wrong with one said in a line: file, line, field, remedy."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from labkit import files
from labkit.printable import printable

T = TypeVar("T")
LARGEST = 10**7  # bytes of a file: a config has some thousands


class SpecError(ValueError):
    """A spec that cannot be, or is not there. The message is one line that says what to do."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def read(path: Path, kind: type[T]) -> T:
    """The `kind` that a JSON file holds. Raises SpecError naming file, line and field."""
    text = read_text(path)
    parse(text, path.name)
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        # A mistyped name is also a missing field: say the name that is in the file.
        first = min(error.errors(), key=lambda one: one["type"] != "unexpected_keyword_argument")
        line = line_of(text, first["loc"])
        raise SpecError(f"{short(path.name)}, line {line}: {explain(first)}") from None


def read_text(path: Path) -> str:
    """The text of a regular file of at most `LARGEST` bytes, a byte order mark taken off. SpecError for all else."""
    name = short(path.name)
    try:
        return files.read_text(path, LARGEST)
    except UnicodeDecodeError as error:
        raise SpecError(f"{name} cannot be read as UTF-8 text: {error}") from None
    except (OSError, ValueError) as error:  # a null byte is a ValueError
        raise SpecError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def parse(text: str, name: str) -> Any:
    """What the JSON text says. SpecError for invalid JSON, and for a key that an object has twice."""
    name = short(name)
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _once(pairs, text))
    except json.JSONDecodeError as error:
        raise SpecError(f"{name}, line {error.lineno}: not valid JSON: {error.msg}") from None
    except _Twice as error:
        raise SpecError(f"{name}, line {error.line}: {error}: take one of the two out") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond all bounds
        raise SpecError(f"{name!r} cannot be read: {error}") from None


class _Twice(Exception):
    def __init__(self, key: str, text: str) -> None:
        places = [
            match.start() for match in re.finditer(re.escape(json.dumps(key, ensure_ascii=False)) + r"\s*:", text)
        ]
        self.line = text.count("\n", 0, places[-1]) + 1 if places else 1
        super().__init__(f"{short(json.dumps(key))} is given twice")


def _once(pairs: list[tuple[str, Any]], text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Twice(key, text)
        found[key] = value
    return found


def user_path(given: str | Path) -> Path:
    """The path that a user names, `~` opened. SpecError for one that no file can have."""
    try:
        return files.user_path(given)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise SpecError(f"{short(str(given))!r} cannot be read: {why}: write the path out") from None


def short(text: str) -> str:
    """A name as a message can hold it: on one line, and not for ever."""
    text = printable(text)
    return text if len(text) <= 80 else f"{text[:77]}..."


def line_of(text: str, place: Sequence[int | str]) -> int:
    """The line (from 1) of the value at `place`, keys and indices from the outside in; of the nearest around it."""
    try:
        node = yaml.compose(text.replace("\t", " "), Loader=yaml.SafeLoader)  # JSON is YAML, and YAML keeps lines
    except yaml.YAMLError:
        return 1
    line = node.start_mark.line + 1
    for step in place:
        if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
        elif isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(step)]
            if not found:
                break
            key, node = found[0]
            line = key.start_mark.line + 1
            continue
        else:
            break
        line = node.start_mark.line + 1
    return line


WORDS = {
    "missing": "is missing: add it",
    "missing_argument": "is missing: add it",
    "unexpected_keyword_argument": "is no field of a spec: take it out, or correct its name",
    "extra_forbidden": "is no field of a spec: take it out, or correct its name",
    "int_type": "must be a whole number, at least 1; got {value!r}",
    "int_from_float": "must be a whole number, at least 1; got {value!r}",
    "bool_type": "must be true or false; got {value!r}",
    "string_type": "must be text in quotes; got {value!r}",
    "float_type": "must be a number; got {value!r}",
    "finite_number": "must be a finite number; got {value!r}",
}


def explain(error: Any) -> str:
    """One of pydantic's errors as "field: what is wrong and what to write", in a line."""
    field = ".".join(str(step) for step in error["loc"])
    kind, value, limits = error["type"], error["input"], error.get("ctx", {})
    if kind == "value_error":
        said = str(limits["error"])
    elif kind in ("greater_than_equal", "greater_than") and isinstance(value, int) and limits.get("ge") == 1:
        said = WORDS["int_type"].format(value=value)
    elif kind in WORDS:
        said = WORDS[kind].format(value=value)
    else:
        said = f"{error['msg'][0].lower()}{error['msg'][1:]}; got {value!r}"
    return f"{field}: {said}" if field and kind == "value_error" else f"{field} {said}".strip()
