"""Policies that look at attention: what was read much before will be read again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.attention import is_count
from labkit.cache.evicting.policy import Held, Notes, Policy, Seen


@dataclass(frozen=True, eq=False, kw_only=True)
class H2O(Policy):
    """Heavy hitters: what has got most attention so far, and the newest half (H2O, arXiv:2306.14048).

    recent: half of the budget, as in the paper. mean: divide by the number of queries that could see the token, so that
    old tokens are not favoured for their age.

    Settled here: attention is summed over all queries since the token came, in float32; the query heads that share a KV
    head count as one, by their mean, as there is but one key to keep or drop. `recent=0, mean=True` is kvpress's
    ObservedAttentionPress. Weights are those of the attention that took place, over what was held then.
    """

    recent: int | float = 0.5
    mean: bool = False
    lasting: ClassVar[bool] = True
    reads_held: ClassVar[bool] = False

    def watch(self, seen: Seen) -> Notes:
        """Adds what each token gets."""
        return Notes(seen.tally + seen.received())

    def score(self, held: Held) -> Tensor:
        """The attention it got, in all or per query."""
        if not self.mean:
            return held.tally
        queries = held.newest + 1 - held.positions
        return held.tally / (queries if held.constants.window is None else queries.clamp(max=held.constants.window))


@dataclass(frozen=True, eq=False, kw_only=True)
class TOVA(Policy):
    """What the newest query looks at (Token Omission Via Attention, arXiv:2401.06104).

    by_head: each KV head goes by its own query heads. The paper, and the default, takes the mean of all heads of the
    layer, so that they drop the same token.

    Settled here: the newest token itself is always kept, as in kvpress; the paper lets it go if it looks away.
    """

    recent: int | float = 1
    by_head: bool = False
    reads_held: ClassVar[bool] = False

    def watch(self, seen: Seen) -> Notes:
        """The newest query's weights."""
        if self.by_head:
            return Notes(seen.received(1))
        mean = seen.weights(1)[:, :, 0].mean(dim=1, keepdim=True)
        return Notes(mean.expand(-1, seen.k.shape[1], -1))

    def score(self, held: Held) -> Tensor:
        """Its weight."""
        return held.tally


@dataclass(frozen=True, eq=False, kw_only=True)
class SnapKV(Policy):
    """What the last `window` queries look at, and their neighbours (SnapKV, arXiv:2404.14469).

    window: the observation window, whose tokens are always kept. pool: tokens, an odd number, over which weights are
    pooled, so that what stands around a token that is read is kept with it. pool_by: "mean" or "max".

    Settled here: the mean over the window's queries; pooling with zeros at the ends, over the tokens before the window,
    in the order of their positions, by the mean unless said (the paper's code pools by the mean, its text by the
    maximum); query heads that share a KV head by their mean (SnapKV issue 22). That is kvpress's SnapKVPress. The paper
    evicts at the end of the prompt only. Where eviction goes on, the window goes on as a running mean: each later query
    replaces 1 / `window` of what was noted, and so does each of a prompt that comes in pieces shorter than the window.
    """

    window: int = 64
    pool: int = 5
    pool_by: str = "mean"
    recent: int | float = field(default=0, init=False)
    lasting: ClassVar[bool] = True
    reads_held: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("window", "pool"):
            if not is_count(getattr(self, name)) or getattr(self, name) < 1:
                raise ValueError(f"{name} is a number of tokens, at least 1; got {getattr(self, name)!r}")
        if self.pool % 2 == 0:
            raise ValueError(f"pool is an odd number of tokens, one with as many at each side; got {self.pool}")
        if self.pool_by not in ("mean", "max"):
            raise ValueError(f'pool_by is "mean" or "max"; got {self.pool_by!r}')
        object.__setattr__(self, "recent", self.window)
        super().__post_init__()

    def watch(self, seen: Seen) -> Notes:
        """The mean weight from the newest `window` queries."""
        stays = max(0.0, 1 - seen.q.shape[2] / self.window)
        newest = seen.received(self.window)
        if not stays:
            return Notes(newest / self.window)
        return Notes(torch.add(stays * seen.tally, newest, alpha=1 / self.window))

    def score(self, held: Held) -> Tensor:
        """That, pooled."""
        order = held.positions.argsort(dim=-1)
        counts = held.visible_later & (held.positions <= held.newest - self.window)
        before = held.tally.masked_fill(~counts, 0.0).gather(2, order)
        pool = F.avg_pool1d if self.pool_by == "mean" else F.max_pool1d  # weights are never below the zeros at the ends
        pooled = pool(before, self.pool, stride=1, padding=self.pool // 2)
        return pooled.scatter(2, order, pooled)
