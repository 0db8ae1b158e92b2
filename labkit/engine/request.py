"""A request, and what becomes of it: the tokens of its answer one by one, and how long it took."""

from __future__ import annotations

import numbers
from collections.abc import Collection, Sequence
from dataclasses import KW_ONLY, dataclass

import torch

from labkit.attention import is_count
from labkit.engine.blocks import checked


@dataclass(frozen=True)
class Request:
    """What is asked for: up to `max_new_tokens` tokens behind `tokens`.

    stop: tokens that end the answer; they are not part of it. temperature: 0 takes the likeliest token, otherwise a
    draw, the same every time for one `seed`. salt: only requests of the same salt share K and V.
    Raises ValueError for what cannot be.
    """

    id: str
    tokens: Sequence[int]
    max_new_tokens: int
    _: KW_ONLY
    stop: Collection[int] = ()
    temperature: float = 0.0
    seed: int | None = None
    salt: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(checked(self.tokens)))
        object.__setattr__(self, "stop", frozenset(checked(self.stop)))
        if not isinstance(self.id, str) or not isinstance(self.salt, str):
            raise ValueError(f"a request's id and salt are strings; got {self.id!r} and {self.salt!r}")
        try:
            self.salt.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the salt {self.salt!r} is no text that UTF-8 can write") from None
        if not self.tokens:
            raise ValueError(f"request {self.id!r} has no tokens")
        if not is_count(self.max_new_tokens) or self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is a whole number, at least 1; got {self.max_new_tokens!r}")
        if not isinstance(self.temperature, numbers.Real) or not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is a number, 0 or more, and finite; got {self.temperature!r}")
        if self.seed is not None and (not is_count(self.seed) or not -(2**63) <= self.seed < 2**64):
            raise ValueError(f"seed is a whole number of 64 bits or None; got {self.seed!r}")


@dataclass(frozen=True)
class Token:
    """The `index`-th token of an answer, from 0. finished: why it is the last, if it is: "length" (the limit that was
    asked for), "stop" (a stop token, which is no part of the answer), "cancelled" or "not finite" (its logits were no
    finite numbers, as of weights with NaN); `token` is None for the last two."""

    id: str
    token: int | None
    index: int
    finished: str | None = None


@dataclass
class Timing:
    """Seconds that a request took, NaN where it never came so far, and what was done for it, in tokens.

    queue_time: from `arrived` (`time.perf_counter`) to its first pass. ttft: to its first token. tpot: per token behind
    the first. latest: `time.perf_counter` of its newest token. reused: prompt tokens whose K and V were there at its
    first pass. finished: why it ended.
    """

    arrived: float
    prompt_tokens: int
    new_tokens: int = 0
    reused: int = 0
    preemptions: int = 0
    queue_time: float = float("nan")
    ttft: float = float("nan")
    tpot: float = float("nan")
    latest: float = float("nan")
    finished: str | None = None


class InFlight:
    """A request that waits or runs: all its tokens so far, and where its draws stand."""

    def __init__(self, request: Request, arrived: float) -> None:
        self.request, self.id, self.tokens = request, request.id, list(request.tokens)
        self.timing = Timing(arrived, len(self.tokens))
        self.generator = torch.Generator()
        self.generator.seed() if request.seed is None else self.generator.manual_seed(request.seed)
