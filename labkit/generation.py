"""Generation in its two phases: prefill, the prompt's pass, and decode, one token a step. With a cache and without.

`stream` yields a record per token while it works; `generate` collects them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.cache import Cache
from labkit.ledger import Ledger, Work
from labkit.llama import Llama
from labkit.measure import synchronize


@dataclass(frozen=True)
class Step:
    """One generated token per row, and what it took.

    tokens: int `[batch]`. position: of the new token, in the row with no padding. phase: "prefill" for the first
    token, then "decode". seconds: the step's time, the device's work included. cache_bytes: held after the step.
    work: counted by the ledger, or None when it was not asked for.
    """

    tokens: Tensor
    position: int
    phase: str
    seconds: float
    cache_bytes: int
    work: Work | None


@dataclass(frozen=True)
class Generation:
    """What `generate` made: `tokens`, int `[batch, new tokens]`, and the record of each step."""

    tokens: Tensor
    steps: tuple[Step, ...]

    @property
    def ttft(self) -> float:
        """Time to first token, in seconds."""
        return self.steps[0].seconds

    @property
    def tpot(self) -> float:
        """Time per output token, in seconds: the mean over decode steps; NaN when there was none."""
        decode = [step.seconds for step in self.steps[1:]]
        return sum(decode) / len(decode) if decode else float("nan")


def pad_left(prompts: Sequence[Sequence[int]], pad_token: int = 0) -> tuple[Tensor, Tensor]:
    """A ragged batch as `(tokens, padding)`: int `[batch, longest]`, and int `[batch]`, the padding of each row."""
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token")
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(prompt) for prompt in prompts])
    rows = [[pad_token] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    return torch.tensor(rows), padding


def choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """The next token of each row, int `[batch]`, from logits `[batch, vocab_size]`: the likeliest, or a draw."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    weights = torch.softmax(logits.float() / temperature, dim=-1)
    return torch.multinomial(weights.cpu(), 1, generator=generator)[:, 0].to(logits.device)


def stream(
    model: Llama,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    cache: Cache | None = None,
    padding: Tensor | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    stop_token: int | None = None,
    count_work: bool = False,
) -> Iterator[Step]:
    """Generate up to `max_new_tokens` after `tokens`, int `[batch, prompt tokens]`, one `Step` at a time.

    cache: with one, the first step runs `tokens` (which follow whatever the cache holds already) and every later step
    runs one token; without, every step runs the whole sequence again.
    padding: int `[batch]`, left padding of each row. temperature: 0 takes the likeliest token; otherwise a draw from
    `softmax(logits / temperature)`, the same on every device for one `seed`.
    stop_token: ends the generation once every row has produced it. count_work: fill in `Step.work`.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must be 0 or more; got {temperature}")
    tokens = tokens.to(model.device)
    padding = None if padding is None else padding.to(model.device)
    generator = torch.Generator().manual_seed(seed) if temperature else None
    held = 0 if cache is None else cache.seq_len
    sequence, done = tokens, torch.zeros(len(tokens), dtype=torch.bool, device=model.device)
    counter = Ledger(model.kv_weights()) if count_work else None
    for index in range(max_new_tokens):
        first = index == 0
        fed = sequence if first or cache is None else sequence[:, -1:]
        said = padding if first or cache is None else None
        new, seconds, work = timed_step(model, fed, cache, said, counter, temperature, generator)
        sequence = torch.cat((sequence, new[:, None]), dim=1)
        yield Step(
            tokens=new,
            position=held + sequence.shape[1] - 1,
            phase="prefill" if first else "decode",
            seconds=seconds,
            cache_bytes=0 if cache is None else cache.nbytes,
            work=work,
        )
        if stop_token is not None:
            done |= new == stop_token
            if bool(done.all()):
                return


def timed_step(
    model: Llama,
    tokens: Tensor,
    cache: Cache | None,
    padding: Tensor | None,
    counter: Ledger | None,
    temperature: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, float, Work | None]:
    """One pass of the model and the choice of the next token: `(tokens, seconds, work)`."""
    synchronize(model.device)
    start = time.perf_counter()
    before = counter.work.copy() if counter else None
    with torch.inference_mode():  # saves the bookkeeping that even no_grad does for views, 7% of a decode step
        if counter:
            with counter:
                logits = model(tokens, cache, padding=padding, last_only=True)
        else:
            logits = model(tokens, cache, padding=padding, last_only=True)
        new = choose(logits[:, -1], temperature, generator)
    new = new.clone()  # an ordinary tensor again, that a learner may change in place
    synchronize(model.device)
    return new, time.perf_counter() - start, counter.work - before if counter and before else None


def generate(model: Llama, tokens: Tensor, max_new_tokens: int, **options) -> Generation:
    """All of `stream` at once; it takes the same options."""
    steps = tuple(stream(model, tokens, max_new_tokens, **options))
    return Generation(torch.stack([step.tokens for step in steps], dim=1), steps)
