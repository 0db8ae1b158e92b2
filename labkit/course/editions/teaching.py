"""What a teacher is told beside a lab: aims, questions, pictures for the board. Each lab has its own `teaching.py`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from labkit.course.catalogue import LABS
from labkit.course.editions.boards import Board
from labkit.course.workspace import WorkspaceError


class TeachingError(WorkspaceError):
    """A lab without notes; the message says where to write them."""


@dataclass(frozen=True)
class Ask:
    """A question to put to the class before it goes on. `answer`: what to expect, and what to say to it."""

    section: str
    question: str
    answer: str


@dataclass(frozen=True)
class Picture:
    """A picture for the board. `alt`: the same in words; `say`: what to say while it is drawn; `draw`: draws it."""

    section: str
    title: str
    say: str
    alt: str
    draw: Callable[[Board], None]


@dataclass(frozen=True)
class Teaching:
    """Notes of one lab. Sections are named as the notebook numbers them: "3".

    aims: what people can do afterwards. before: what to see to before the class comes. trouble: where a class gets
    stuck, and the way out.
    """

    aims: tuple[str, ...]
    before: str
    asks: tuple[Ask, ...]
    pictures: tuple[Picture, ...]
    trouble: tuple[str, ...]


def teaching(number: str) -> Teaching:
    """The notes of lab `number`. Raises TeachingError."""
    name = f"{LABS}.lab{number}.teaching"
    try:
        return importlib.import_module(name).TEACHING
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):  # something that the notes themselves import
            raise
        raise TeachingError(f"lab {number} has no teaching notes: write {name.replace('.', '/')}.py") from None
