"""What a compressed cache does to a model's answers: perplexity, KL divergence and top-1 agreement.

Every figure is measured against the same model with its full cache, on the same tokens, by decoding or in chunks. One
forward pass over a whole text measures nothing: some caches (Hugging Face's QuantizedCache among them) hand the first
pass the very tensors it gave them, so its figure is the full cache's, and no cache is read back as decoding reads it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from labkit.quality.side_by_side import Beside

BLOCK = 32  # successive tokens that count as one observation

Model = Callable[[Tensor, Any], Tensor]
"""`model(tokens, cache)`: int `[1, new_tokens]` in, logits `[1, new_tokens, vocab_size]` out; a `Llama`, for one. With
`one_batch` there are as many rows as caches."""
MakeCache = Callable[[], Any]
"""Makes a new, empty cache."""


@dataclass(frozen=True, eq=False)
class Quality:
    """How one cache predicts a text, token by token, beside the full cache. Each tensor is `[tokens]`, on the CPU.

    surprise, full_surprise: -log p(token) in nats, float64, under this cache and under the full one. divergence:
    KL(full || this) between the two next-token distributions, in nats, float64. agrees: bool, the likeliest token is
    the same. cache_bytes, full_cache_bytes: `nbytes` after the last token, None where the cache does not tell.

    Each `..._spread` is one standard error, from the means of whole blocks of 32 successive tokens, because neighbours
    are not independent; NaN with fewer than two blocks. That of `ratio` and `difference` is paired: it comes from what
    the two caches differ by on the same tokens, not from what the text's tokens differ by.
    """

    surprise: Tensor
    full_surprise: Tensor
    divergence: Tensor
    agrees: Tensor
    cache_bytes: int | None = None
    full_cache_bytes: int | None = None

    @classmethod
    def pooled(cls, parts: Sequence[Quality]) -> Quality:
        """Several texts as one sample; bytes add up. Raises ValueError when there is none."""
        if not parts:
            raise ValueError("nothing to pool: give at least one Quality")

        def total(values: list[int | None]) -> int | None:
            known = [value for value in values if value is not None]
            return sum(known) if len(known) == len(values) else None

        return cls(
            torch.cat([part.surprise for part in parts]),
            torch.cat([part.full_surprise for part in parts]),
            torch.cat([part.divergence for part in parts]),
            torch.cat([part.agrees for part in parts]),
            total([part.cache_bytes for part in parts]),
            total([part.full_cache_bytes for part in parts]),
        )

    @property
    def tokens(self) -> int:
        """Tokens scored: the sample's size."""
        return len(self.surprise)

    @property
    def blocks(self) -> int:
        """Whole blocks of 32 tokens, the observations that the spreads come from."""
        return self.tokens // BLOCK

    @cached_property
    def perplexity(self) -> float:
        """exp of the mean surprise."""
        return self.surprise.mean().exp().item()

    @cached_property
    def full_perplexity(self) -> float:
        """The full cache's perplexity on the same tokens."""
        return self.full_surprise.mean().exp().item()

    @cached_property
    def ratio(self) -> float:
        """Perplexity over the full cache's."""
        return (self.surprise - self.full_surprise).mean().exp().item()

    @property
    def difference(self) -> float:
        """Perplexity minus the full cache's."""
        return self.perplexity - self.full_perplexity

    @property
    def kl(self) -> float:
        """Mean KL(full || this) in nats per token, as llama.cpp's `--kl-divergence` gives it."""
        return self.divergence.mean().item()

    @property
    def agreement(self) -> float:
        """Share of tokens before which both caches make the same token the likeliest."""
        return self.agrees.double().mean().item()

    # A function of a mean spreads by its derivative times the mean's spread (the delta method).

    @property
    def perplexity_spread(self) -> float:
        """Of this text's perplexity; mostly the text's own unevenness, which both caches share."""
        return self.perplexity * block_error(self.surprise)

    @property
    def ratio_spread(self) -> float:
        """Of the perplexity over the full cache's: from what the two surprises differ by, token by token."""
        return self.ratio * block_error(self.surprise - self.full_surprise)

    @property
    def difference_spread(self) -> float:
        """Of the perplexity minus the full cache's: from what the two differ by, token by token."""
        return block_error(self.perplexity * self.surprise - self.full_perplexity * self.full_surprise)

    @property
    def kl_spread(self) -> float:
        """Of the mean divergence, in nats per token."""
        return block_error(self.divergence)

    @property
    def agreement_spread(self) -> float:
        """Of the share of tokens on which both caches agree."""
        return block_error(self.agrees.double())

    def __str__(self) -> str:
        return (
            f"perplexity {plus_minus(self.perplexity, self.perplexity_spread)} on {self.tokens:,} tokens; "
            f"to the full cache's: ratio {plus_minus(self.ratio, self.ratio_spread)}, "
            f"difference {plus_minus(self.difference, self.difference_spread)}, "
            f"KL {plus_minus(self.kl, self.kl_spread)} nats per token, "
            f"top-1 agreement {plus_minus(self.agreement, self.agreement_spread)}"
        )


def compare(
    model: Model,
    tokens: Tensor,
    caches: Mapping[str, MakeCache],
    *,
    full: MakeCache | None = None,
    chunk: int = 32,
    context: int = 256,
    one_batch: bool = False,
) -> dict[str, Quality]:
    """The `Quality` of each cache on one text, `tokens`, int `[1, seq_len]`, by the names in `caches`.

    full: makes the reference, the full-precision cache; `model.cache` unless said. All caches go through the text in
    lockstep, so that no distribution is kept longer than its chunk. Every pass feeds at most `chunk` tokens; chunk=1 is
    decoding. The first `context` tokens are not scored, the `seq_len - context` others are, none from the first pass.
    one_batch: for a `Llama` and labkit's own caches. A pass is `[caches, new_tokens]`, a row for every cache, with a
    `Beside` for its cache, so that the weights are read once for all of them. Products of many rows sum in another
    order: figures are those of each cache alone up to rounding. Logits of all rows are there at once.
    Raises ValueError for a call in which chunks would tell no more than one pass over the text: `chunk` may not be
    longer than `context`, and `context` not than the text; and for caches that `Beside` does not take.
    """
    if not caches:
        raise ValueError('no caches to compare: give at least one, {"name": function that makes an empty cache}')
    reference = new_cache("full", full or own_cache(model))
    compressed = [new_cache(name, make) for name, make in caches.items()]
    measured = lockstep(model, tokens, [reference, *compressed], chunk, context, one_batch)
    return dict(zip(caches, measured[1:], strict=True))


def perplexity(
    model: Model, tokens: Tensor, make_cache: MakeCache | None = None, *, chunk: int = 32, context: int = 256
) -> Quality:
    """The `Quality` of one cache (the model's own unless said) beside itself: what `compare` gives without a reference.

    Its perplexity, surprise and bytes are the cache's; its ratio is 1 and its KL 0 by definition.
    """
    cache = new_cache("full", make_cache or own_cache(model))
    return lockstep(model, tokens, [cache], chunk, context)[0]


def lockstep(
    model: Model, tokens: Tensor, caches: Sequence[Any], chunk: int, context: int, one_batch: bool = False
) -> list[Quality]:
    """The `Quality` of each empty cache beside the first of them."""
    check_tokens(tokens)
    seq_len = tokens.shape[1]
    check_passes(seq_len, chunk, context)
    if len({id(cache) for cache in caches}) < len(caches):
        raise ValueError("two names got the same cache object: each function has to make a new one when it is called")
    beside = Beside(caches) if one_batch else None
    scores: list[list[Tensor]] = [[] for _ in caches]
    for start, end in passes(seq_len, chunk, context):
        first = max(start + 1, context)  # the logits of token t predict token t + 1
        targets = tokens[0, first : end + 1]
        reference = None
        for logits, rows in zip(answers(model, tokens[:, start:end], beside or caches), scores, strict=True):
            if len(targets):
                logs = logits[first - 1 - start :][: len(targets)].double().log_softmax(dim=-1)
                reference = logs if reference is None else reference
                rows.append(score(logs, reference, targets))
    measured = [torch.cat(rows, dim=1) for rows in scores]
    held = [getattr(cache, "nbytes", None) for cache in caches]
    return [
        Quality(rows[0], measured[0][0], rows[1], rows[2].bool(), nbytes, held[0])
        for rows, nbytes in zip(measured, held, strict=True)
    ]


def passes(seq_len: int, chunk: int, context: int) -> Iterator[tuple[int, int]]:
    """Start and end of each forward pass over a text."""
    starts = [*range(0, context, chunk), *range(context, seq_len, chunk), seq_len]
    if context == chunk:
        starts.insert(1, context - 1)  # the token after the context is scored by a second pass
    return itertools.pairwise(starts)


def score(logs: Tensor, full: Tensor, targets: Tensor) -> Tensor:
    """Surprise, KL(full || this) and agreement of each token, float64 `[3, tokens]`, of two sets of log-probabilities.

    `logs` and `full` are `[tokens, vocab_size]`, `targets` int `[tokens]`.
    """
    weights = full.exp()
    # A token that the full cache rules out (log-probability -inf) adds nothing, where 0 * inf would add NaN.
    terms = (weights * (full - logs)).masked_fill(weights == 0, 0.0)
    surprise = -logs.gather(1, targets.to(logs.device)[:, None])[:, 0]
    return torch.stack((surprise, terms.sum(dim=-1), (logs.argmax(-1) == full.argmax(-1)).double())).cpu()


def answers(model: Model, tokens: Tensor, caches: Sequence[Any] | Beside) -> Iterator[Tensor]:
    """Logits `[new_tokens, vocab_size]` of the same tokens, int `[1, new_tokens]`, through each cache."""
    if isinstance(caches, Beside):
        yield from run(model, tokens.expand(len(caches), -1), caches)
        return
    for cache in caches:
        yield run(model, tokens, cache)[0]


@torch.no_grad()
def run(model: Model, tokens: Tensor, cache: Any) -> Tensor:
    """Logits `[rows, new_tokens, vocab_size]` of one pass, int `[rows, new_tokens]`, on the model's device."""
    logits = model(tokens.to(getattr(model, "device", tokens.device)), cache)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != tokens.shape:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"model(tokens, cache) gives logits [{len(tokens)}, {tokens.shape[1]}, vocab_size]; got {got}. A "
            f"transformers model: lambda tokens, cache: model(tokens, past_key_values=cache).logits"
        )
    return logits


def new_cache(name: str, make: MakeCache) -> Any:
    """What `make()` makes; ValueError when it is no function, or what it makes is not empty."""
    if not callable(make):
        raise ValueError(f"{name!r} is a {type(make).__name__}: give a function that makes an empty cache")
    cache = make()
    held = getattr(cache, "seq_len", None) or (cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0)
    if held:
        raise ValueError(f"the cache of {name!r} holds {held} tokens already: its function has to make an empty one")
    return cache


def own_cache(model: Model) -> MakeCache:
    """`model.cache`; ValueError when the model has none."""
    if not hasattr(model, "cache"):
        raise ValueError("this model does not say what its full cache is: give a function that makes one")
    return model.cache


def check_tokens(tokens: Tensor) -> None:
    """Raise ValueError unless these are the tokens of one text."""
    whole = isinstance(tokens, Tensor) and not (tokens.is_floating_point() or tokens.dtype == torch.bool)
    if not whole or tokens.dim() != 2 or len(tokens) != 1:
        got = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"tokens are int [1, seq_len], one text; got {got}. Several texts: one call each, then pooled")
    if tokens.shape[1] == 0:
        raise ValueError("there are no tokens: the text is empty")


def check_passes(seq_len: int, chunk: int, context: int) -> None:
    """Raise ValueError unless chunks would tell more than one pass over the text would."""
    check_chunk(chunk)
    if chunk >= seq_len:
        raise ValueError(
            f"chunk={chunk} would take all {seq_len} tokens in one pass, which does not measure a cache: some hand the "
            f"first pass its own tensors back, uncompressed. Take chunk=1 (decoding) or a small part of the text"
        )
    if context >= seq_len:
        raise ValueError(f"context={context} leaves none of the {seq_len} tokens to score: make it smaller")
    if context < max(2, chunk):
        raise ValueError(
            f"context={context} is too short for chunk={chunk}: tokens would be scored in the first pass, or see "
            f"little but their own pass, as if the text came in one. Take a context of at least {max(2, chunk)}"
        )


def check_chunk(chunk: int) -> None:
    """Raise ValueError unless this is a number of tokens."""
    if chunk < 1:
        raise ValueError(f"chunk is a number of tokens per pass, at least 1; got {chunk}")


def block_error(values: Tensor) -> float:
    """Standard error of the mean of `values`, `[tokens]`, from whole blocks of 32; NaN with fewer than two."""
    return mean_error(values[: len(values) // BLOCK * BLOCK].view(-1, BLOCK).mean(dim=1))


def mean_error(values: Tensor) -> float:
    """Standard error of the mean of independent values; NaN with fewer than two."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


def plus_minus(value: float, spread: float) -> str:
    """Both, to the spread's second digit."""
    if not 0 < spread < math.inf:
        return f"{value:.4g} ± {'unknown' if math.isnan(spread) else f'{spread:.2g}'}"
    decimals = max(0, 1 - math.floor(math.log10(spread)))
    return f"{value:.{decimals}f} ± {spread:.{decimals}f}"
