"""Whether facts told in a text are still found through a cache: each is asked for after the text was read."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from labkit.quality.compare import MakeCache, Model, check_chunk, mean_error, new_cache, plus_minus, run
from labkit.quality.texts import Fact

NUMBER = " The number of the harbour master's locker is {}."
"""A fact that no prose has, to be planted in some."""
QUESTION = "\nThe number of the harbour master's locker is"
PLACES = {"early": 0.1, "middle": 0.5, "late": 0.9}
"""Where in a text, from 0 to 1, facts are planted."""


@dataclass(frozen=True)
class Answer:
    """What a model with one cache made of one fact.

    hit: every token of the answer is the likeliest one. log_probability: mean over the answer's tokens, in nats.
    position: of the answer's first token where the text first has it, as whole words; None where it does not.
    text_tokens: the text's length.
    """

    fact: Fact
    hit: bool
    log_probability: float
    position: int | None
    text_tokens: int


@dataclass(frozen=True)
class Recall:
    """The answers under one cache."""

    answers: tuple[Answer, ...]

    @property
    def facts(self) -> int:
        """Facts asked for: the sample's size."""
        return len(self.answers)

    @property
    def hits(self) -> int:
        """How many of the facts were recalled: every token of the answer was the likeliest."""
        return sum(answer.hit for answer in self.answers)

    @property
    def share(self) -> float:
        """Hits per fact, from 0 to 1."""
        return self.hits / self.facts

    @property
    def share_spread(self) -> float:
        """Half of Wilson's interval at one standard error: unlike sqrt(p (1 - p) / n), not 0 when all or none hit."""
        low, high = wilson(self.hits, self.facts, 1.0)
        return (high - low) / 2

    @property
    def log_probability(self) -> float:
        """Mean over facts of the answers' log-probability per token, in nats: the finer measure."""
        return sum(answer.log_probability for answer in self.answers) / self.facts

    @property
    def log_probability_spread(self) -> float:
        """One standard error over facts; NaN for a single fact."""
        return mean_error(torch.tensor([answer.log_probability for answer in self.answers], dtype=torch.float64))

    def __str__(self) -> str:
        return (
            f"{self.hits} of {self.facts} facts recalled, a share of {plus_minus(self.share, self.share_spread)}; "
            f"log-probability {plus_minus(self.log_probability, self.log_probability_spread)} nats per answer token"
        )


def planted(
    prose: Sequence[int],
    facts: Mapping[float, Sequence[int]],
    tokens: int,
    *,
    ends: Callable[[int], bool] | None = None,
) -> list[int]:
    """The first of the prose's tokens with each fact's put in at its place, from 0 to 1: so many tokens in all.

    ends: whether a token ends a sentence; facts are then put behind the sentence that ends nearest to their place.
    ValueError where the prose is too short.
    """
    rest = tokens - sum(map(len, facts.values()))
    if rest < 0 or len(prose) < rest:
        raise ValueError(f"{tokens} tokens with these facts take {max(rest, 0)} of prose; there are {len(prose)}")
    out = list(prose[:rest])
    stops = [i + 1 for i, token in enumerate(out) if ends(token)] if ends is not None else []
    behind = {at: min(stops or [rest], key=lambda end: abs(end - at * rest)) for at in facts}
    for at in sorted(facts, reverse=True):
        place = int(at * rest) if ends is None else behind[at]
        out[place:place] = facts[at]
    return out


def wilson(hits: int, trials: int, errors: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share, so many standard errors to each side: by default the one of 95%."""
    share, square = hits / trials, errors * errors / trials
    middle = (share + square / 2) / (1 + square)
    half = errors * math.sqrt(share * (1 - share) / trials + square / trials / 4) / (1 + square)
    return middle - half, middle + half


def recall(
    model: Model,
    tokenizer: Any,
    caches: Mapping[str, MakeCache],
    facts: Sequence[Fact],
    *,
    chunk: int = 256,
    full: MakeCache | None = None,
) -> dict[str, Recall]:
    """Whether facts told in a text are still found through each cache, by the names in `caches`.

    Each cache reads a text once, `chunk` tokens a pass; every question is put to a copy of it, so no cache has to take
    tokens back. The question comes in one pass, after a line break, then the answer, whatever the model would have
    said. Answers come in the order of `facts`. full: one more cache to measure, first, under the name "full". Raises
    ValueError for bad input.
    """
    check_chunk(chunk)
    if full is not None and "full" in caches:
        raise ValueError('one of the caches is called "full" already: give it another name, or leave `full` out')
    caches = caches if full is None else {"full": full, **caches}
    if not caches or not facts:
        raise ValueError(f"recall needs at least one cache and one fact; got {len(caches)} and {len(facts)}")
    answers: dict[str, dict[int, Answer]] = {name: {} for name in caches}
    for text in dict.fromkeys(fact.text for fact in facts):
        tokens = torch.tensor([tokenizer(text).input_ids], dtype=torch.long)
        for name, make in caches.items():
            cache = new_cache(name, make)
            for piece in tokens.split(chunk, dim=1) if tokens.numel() else ():
                run(model, piece, cache)
            for place, fact in enumerate(facts):
                if fact.text == text:
                    answers[name][place] = ask(model, tokenizer, cache, fact, tokens.shape[1])
    return {name: Recall(tuple(found[place] for place in range(len(facts)))) for name, found in answers.items()}


def ask(model: Model, tokenizer: Any, cache: Any, fact: Fact, text_tokens: int) -> Answer:
    """Put one question to a copy of `cache`, which has read the fact's text."""

    def encode(text: str) -> Tensor:
        return torch.tensor([tokenizer(text, add_special_tokens=False).input_ids], dtype=torch.long)

    question, answer = encode(f"\n{fact.question}"), encode(f" {fact.answer}")
    fork = copy.deepcopy(cache)
    logits = [run(model, question, fork)[0, -1:]]
    if answer.shape[1] > 1:
        logits.append(run(model, answer[:, :-1], fork)[0])
    logs = torch.cat(logits).double().log_softmax(dim=-1).cpu()
    found = re.search(rf"(?<!\w){re.escape(fact.answer)}(?!\w)", fact.text, re.IGNORECASE)  # a word, not part of one
    return Answer(
        fact,
        hit=torch.equal(logs.argmax(dim=-1), answer[0]),
        log_probability=logs.gather(1, answer.T).mean().item(),
        position=len(tokenizer(fact.text[: found.start()].rstrip()).input_ids) if found else None,
        text_tokens=text_tokens,
    )
