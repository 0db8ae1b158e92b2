"""Our own texts, and the facts planted in them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from labkit.files import read_text, user_path
from labkit.specs import DATA, unknown

TEXTS = DATA / "texts"


@dataclass(frozen=True)
class Fact:
    """Something that `text` (the text itself) says: `question` begins a sentence, `answer` goes on with it."""

    text: str
    question: str
    answer: str

    def __post_init__(self) -> None:
        if not self.question.strip() or not self.answer.strip():
            raise ValueError(f"a fact needs a question and an answer; got {self.question!r} and {self.answer!r}")

    def without_text(self) -> Fact:
        """The same question with no text before it: the control."""
        return replace(self, text="")


def load_text(name: str | Path) -> str:
    """One of our own texts by name ("lighthouse"), or that of a UTF-8 file. Raises ValueError when it is neither."""
    own = {path.stem: path for path in TEXTS.glob("*.txt")}
    path = own.get(name.removesuffix(".txt")) if isinstance(name, str) else None
    try:
        return read_text(path or user_path(name))
    except FileNotFoundError:
        raise ValueError(f"{unknown('text', str(name), own)}. Or give the path of a text file") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{str(name)[:60]!r} cannot be read as UTF-8 text: {why}") from None


def load_facts(name: str | None = None) -> list[Fact]:
    """The facts planted in our own texts, or in one of them. For another text, make them: `Fact(text, ...)`.

    Raises ValueError when there is no such text.
    """
    facts = json.loads((TEXTS / "facts.json").read_text(encoding="utf-8"))
    known = list(dict.fromkeys(fact["text"].removesuffix(".txt") for fact in facts))
    wanted = known if name is None else [str(name).removesuffix(".txt")]
    if wanted[0] not in known:
        raise ValueError(f"{unknown('text with facts', str(name), known)}. For your own: Fact(text, question, answer)")
    texts = {f"{stem}.txt": load_text(stem) for stem in wanted}
    return [Fact(texts[one["text"]], one["question"], one["answer"]) for one in facts if one["text"] in texts]
