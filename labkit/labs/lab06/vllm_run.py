"""What is asked of vLLM and what comes back: requests, answers, a run and its figures; the runs that were recorded."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from labkit import models, quality, results


class Asks(Protocol):
    """A request, of whatever class: the engine's `Request` is one, `Prompt` is the least of them."""

    @property
    def id(self) -> str:
        """Its name, unlike the others'."""

    @property
    def tokens(self) -> Sequence[int]:
        """The prompt, as ids of at least one token."""

    @property
    def max_new_tokens(self) -> int:
        """How many tokens the answer has at most."""


@dataclass(frozen=True)
class Prompt:
    """The least that a request is."""

    id: str
    tokens: Sequence[int]
    max_new_tokens: int


@dataclass(frozen=True)
class Answer:
    """New tokens, and seconds after the request was sent: of the first token, of the last."""

    tokens: list[int]
    first: float
    last: float

    @property
    def ttft(self) -> float:
        """Time to first token, in seconds."""
        return self.first

    @property
    def tpot(self) -> float:
        """Time per output token after the first, in seconds; 0.0 for one token."""
        return (self.last - self.first) / max(len(self.tokens) - 1, 1)


@dataclass(frozen=True)
class Run:
    """What came of some requests that were sent at once.

    answers: by the request's id. seconds: from the first request to the last token. metrics: as `Server.metrics` names
    them; counters say what this run added, gauges their peak. cache_config: what vLLM says of its blocks. recorded:
    device, version and date of a recorded run; empty where it ran just now.
    """

    answers: dict[str, Answer]
    seconds: float
    metrics: dict[str, float]
    cache_config: dict[str, str]
    recorded: str = ""

    def figures(self) -> dict[str, float]:
        """What lab 06 sets beside the learner's engine, by name."""
        answers = list(self.answers.values())
        new_tokens = sum(len(answer.tokens) for answer in answers)
        several = [answer.tpot for answer in answers if len(answer.tokens) > 1]
        return {
            "new tokens": new_tokens,
            "tokens per second": round(new_tokens / self.seconds, 1),
            "median TTFT ms": round(1e3 * statistics.median(answer.ttft for answer in answers), 1),
            "median TPOT ms": round(1e3 * statistics.median(several), 1) if several else 0.0,
            "peak of vllm:kv_cache_usage_perc": round(self.metrics.get("vllm:kv_cache_usage_perc", 0.0), 4),
            "vllm:prefix_cache_queries": self.metrics.get("vllm:prefix_cache_queries", 0.0),
            "vllm:prefix_cache_hits": self.metrics.get("vllm:prefix_cache_hits", 0.0),
            "vllm:num_preemptions": self.metrics.get("vllm:num_preemptions", 0.0),
        }


def eight_requests() -> list[Prompt]:
    """Eight ragged requests for the lab model: prompts of 9 to 200 tokens of our own texts, 32 to 64 new tokens each.

    Two of them, c and g, begin with the same 96 tokens.
    """
    tokenizer = models.tokenizer()
    text = {
        name: tokenizer(quality.load_text(name)).input_ids for name in ("lighthouse", "clock", "bread", "detective")
    }
    shared = text["lighthouse"][:96]
    return [
        Prompt("a", text["clock"][:9], 64),
        Prompt("b", text["bread"][:57], 40),
        Prompt("c", shared + text["clock"][40:71], 48),
        Prompt("d", text["detective"][:200], 32),
        Prompt("e", text["clock"][100:117], 56),
        Prompt("f", text["bread"][200:364], 36),
        Prompt("g", shared + text["bread"][90:102], 64),
        Prompt("h", text["detective"][300:333], 48),
    ]


def recorded(record: str = "eight requests", folder: Path = results.DATA / "results") -> Run:
    """A run of `eight_requests` that was recorded: "eight requests", or "few blocks", where some had to be preempted.

    LookupError when there is none of that name.
    """
    for kept in results.records("vllm", folder):
        if found := kept.get("runs", {}).get(record):
            said = kept["versions"]
            where = f"{kept['device']}, vLLM {said['vllm']}, {said['date']}"
            answers = {id: Answer(**answer) for id, answer in found["answers"].items()}
            return Run(answers, found["seconds"], found["metrics"], found["cache_config"], where)
    raise LookupError(f"no run called {record!r} was recorded")
