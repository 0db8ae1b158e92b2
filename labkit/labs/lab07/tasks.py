"""Work for a cache that has forgotten: what is read, what is asked when it has, and what the answer is."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from labkit import quality
from labkit.quality.recall import NUMBER, PLACES, QUESTION
from labkit.quality.recall import planted as plant

OWNERS = ("harbour master", "pilot", "cook")
WORDS = ("anchor", "basket", "candle", "donkey", "engine", "feather", "garden", "hammer", "island", "jacket", "kettle",
         "ladder", "mirror", "needle", "orange", "pocket")  # fmt: skip

FOLLOWING = 32  # tokens of a text that goes on


@dataclass(frozen=True)
class Task:
    """Token ids. text: what is read; then the cache evicts. asked: what comes then. answer: what should follow."""

    name: str
    text: tuple[int, ...]
    asked: tuple[int, ...]
    answer: tuple[int, ...]

    def places(self, question: Sequence[int]) -> tuple[list[int], int]:
        """Where the answer stands in the text, the position of each of its tokens, and where the text has `question`,
        given as its tokens, last."""
        asked = tuple(question)
        first = next(i for i in range(len(self.text)) if self.text[i : i + len(self.answer)] == self.answer)
        begins = [i for i in range(len(self.text)) if self.text[i : i + len(asked)] == asked]
        return list(range(first, first + len(self.answer))), begins[-1]


def tasks(tokenizer: Any, seed: int, text_tokens: int = 300) -> list[Task]:
    """One task of each kind, each about a passage of its own from a text of the project's; another `seed` takes other
    passages and numbers.

    ValueError where a text of the project's is shorter than `text_tokens` and what follows them.
    """
    chance = random.Random(seed)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    names = sorted(path.stem for path in quality.TEXTS.glob("*.txt"))

    def passage(following: int = 0) -> list[int]:
        """So many tokens of prose, and so many more, from anywhere in a text."""
        name = chance.choice(names)
        whole = encode(quality.load_text(name))
        starts = len(whole) - text_tokens - FOLLOWING + 1
        if starts < 1:
            raise ValueError(f"{name} has {len(whole)} tokens: take text_tokens of at most {len(whole) - FOLLOWING}")
        start = chance.randrange(0, starts)
        return whole[start : start + text_tokens + following]

    prose = passage(FOLLOWING)
    made = [Task("the text goes on", tuple(prose[:text_tokens]), (), tuple(prose[text_tokens:]))]

    def planted(facts: Mapping[float, str]) -> list[int]:
        """The prose with each fact behind the sentence that ends nearest to its place."""
        told = {place: encode(fact) for place, fact in facts.items()}
        return plant(passage(), told, text_tokens, ends=lambda token: tokenizer.decode([token]).endswith("."))

    def put(question: str, answer: str) -> tuple[list[int], list[int]]:
        """A space before the answer, where it is a token of its own, is asked, not answered."""
        asked, answered = encode(question), encode(answer)
        while not tokenizer.decode(answered[:1]).strip():
            asked.append(answered.pop(0))
        return asked, answered

    def known(name: str, text: Sequence[int], question: str, answer: str) -> Task:
        asked, answered = put(question, answer)
        return Task(name, (*text, *asked[:-1]), (asked[-1],), tuple(answered))

    for place, share in PLACES.items():
        number = str(chance.randint(1000, 9999))
        made.append(known(f"a number, {place}", planted({share: NUMBER.format(number)}), QUESTION, f" {number}"))
    numbers = [str(chance.randint(1000, 9999)) for _ in OWNERS]
    several = planted({
        0.2 + 0.3 * i: f" The number of the {owner}'s locker is {number}."
        for i, (owner, number) in enumerate(zip(OWNERS, numbers, strict=True))
    })  # fmt: skip
    which = chance.randrange(len(OWNERS))
    made.append(known("one number of three", several, f"\nThe number of the {OWNERS[which]}'s locker is",
                      f" {numbers[which]}"))  # fmt: skip
    words = " ".join(chance.sample(WORDS, 10))
    made.append(known("a list, copied", [*encode(f"The list: {words}.\n"), *passage()], "\nThe list:", f" {words}"))
    number = str(chance.randint(1000, 9999))
    system = f"<|im_start|>system\nThe number of the guest's room is {number}.<|im_end|>\n<|im_start|>user\n"
    talk = [*encode(system + "Tell me a story.<|im_end|>\n<|im_start|>assistant\n"), *passage()[:200]]
    turn = ("<|im_end|>\n<|im_start|>user\nWhat is the number of the guest's room?<|im_end|>\n<|im_start|>assistant\n"
            "The number of the guest's room is")  # fmt: skip
    made.append(known("a conversation's first line", talk, turn, f" {number}"))
    number = str(chance.randint(1000, 9999))
    asked, answer = put(QUESTION, f" {number}")
    later = tuple(planted({0.5: NUMBER.format(number)}))
    made.append(Task("a number, asked for later", later, tuple(asked), tuple(answer)))
    return made
