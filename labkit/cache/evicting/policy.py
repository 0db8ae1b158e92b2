"""What decides which tokens stay: a policy gives every token held a score, and the cache keeps the highest.

    class LargeValues(Policy):
        def score(self, held):
            return held.v.norm(dim=-1)                     # [batch, num_kv_heads, tokens]

A policy is a value: parameters, and no state. What it learns by looking on while a step attends it returns as notes,
which the cache keeps, moves and undoes together with the keys.

    class MuchRead(Policy):
        lasting = True                                     # what was noted is needed in later steps, too

        def watch(self, seen):
            return Notes(seen.tally + seen.received())     # attention that each token has got so far

        def score(self, held):
            return held.tally

    Cache.evicting(model.spec.num_layers, MuchRead(sinks=4, recent=16), budget=128)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from labkit.attention import Constants, Visibility, attention_weights, is_count
from labkit.cache.evicting.choosing import left_window

BLOCK = 64  # queries whose weights are held at once


@dataclass(frozen=True, eq=False)
class Notes:
    """What a policy wrote down. tokens: float32 `[batch, num_kv_heads, tokens]`, a number for each token held.

    rows: other tensors, whatever is known of a whole row, each `[batch, ...]`.
    """

    tokens: Tensor | None = None
    rows: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class Held:
    """What a layer holds when a policy is asked, slots in no order. Nothing in it may be changed in place.

    k, v: `[batch, num_kv_heads, tokens, head_dim]`, keys turned by RoPE to the positions they came at.
    positions: int32 `[batch, num_kv_heads, tokens]`, from 0 for a row's first token; -1 is padding. newest: the
    greatest of them, a number, or int `[batch, 1, 1]` where rows differ. constants: what attention was computed with.
    notes: what `watch` returned last.
    """

    k: Tensor
    v: Tensor
    positions: Tensor
    newest: int | Tensor
    constants: Constants
    notes: Notes

    @cached_property
    def tally(self) -> Tensor:
        """The number noted for each token, float32 `[batch, num_kv_heads, tokens]`; 0 where nothing was."""
        if self.notes.tokens is not None:
            return self.notes.tokens
        return torch.zeros(self.positions.shape, device=self.positions.device)

    @property
    def real(self) -> Tensor:
        """Which tokens are no padding, bool `[batch, num_kv_heads, tokens]`."""
        return self.positions >= 0

    @property
    def visible_later(self) -> Tensor:
        """Which tokens the next query sees: no padding, and in the model's window; bool, as `real`.

        Of the others any may stay while there is room: what is made of several tokens should leave them out.
        """
        window = self.constants.window
        return self.real if window is None else self.real & ~left_window(self.positions, self.newest, window)


@dataclass(frozen=True, eq=False)
class Seen(Held):
    """What a policy looks at while a step attends: what is held, and the queries.

    q: `[batch, num_heads, new_tokens, head_dim]`, those of the newest tokens. query_positions: int `[batch or 1,
    new_tokens]`, what RoPE turned them to; negative for padding. visible: who sees whom. known: the weights of a single
    query, which attention computed anyway. shared: what the layers of a step have in common, for a policy to put there
    what need not be made for each of them.
    """

    q: Tensor
    query_positions: Tensor
    visible: Visibility
    known: Tensor | None = field(default=None, repr=False)
    shared: dict = field(default_factory=dict, repr=False)

    def weights(self, newest: int) -> Tensor:
        """Attention's weights of the `newest` queries, float32 `[batch, num_heads, newest, tokens]`."""
        queries = self.q.shape[2]
        return self.weights_between(max(0, queries - newest), queries)

    def received(self, newest: int | None = None) -> Tensor:
        """The attention that each token gets from the `newest` queries (all): `[batch, num_kv_heads, tokens]`, float32.

        Summed over the queries, and the mean of the query heads that share a KV head. Weights are computed for 64
        queries at a time.
        """
        batch, num_heads, queries, _ = self.q.shape
        first = 0 if newest is None else max(0, queries - newest)
        if queries == 1:
            total = self.weights_between(0, 1)[:, :, 0]
        else:
            total = torch.zeros(batch, num_heads, self.k.shape[2], device=self.k.device)
            for start in range(first, queries, BLOCK):
                some = self.weights_between(start, min(start + BLOCK, queries))
                total[:, :, : some.shape[3]] += some.sum(dim=2)
        return total.view(batch, self.k.shape[1], -1, self.k.shape[2]).mean(dim=2).float()

    def weights_between(self, start: int, stop: int) -> Tensor:
        """Of some of the queries, over the tokens that came no later than they: `[..., stop - start, so many]`."""
        if self.known is not None:
            return self.known
        end = self.k.shape[2] - self.q.shape[2] + stop
        visible = self.visible.of_queries(start, stop).of_keys(0, end)
        return attention_weights(self.q[:, :, start:stop], self.k[:, :, :end], self.constants, visible)


@dataclass(frozen=True, eq=False, kw_only=True)
class Policy(ABC):
    """Which tokens a cache keeps: those of the highest score.

    sinks: the first tokens of each row, which are always kept. recent: the newest, always kept as well: how many, or,
    as a float, a fraction of the budget. Raises ValueError for what cannot be.
    """

    sinks: int = 0
    recent: int | float = 0
    lasting: ClassVar[bool] = False
    """Whether notes are needed in later steps; else they are dropped when the step has ended, and `watch` is only asked
    in steps at whose end something is evicted."""
    reads_weights: ClassVar[bool] = True
    """Whether `watch` asks for attention's weights; where it does not, attention need not spell them out for it."""
    reads_held: ClassVar[bool] = True
    """Whether `watch` asks for K, V or positions of what is held. The class that defines `watch` says so for it: where
    it does not ask, layers of one policy that do a decode step of `Cache.step` are shown at its end, all at once, as if
    they were rows of one batch; what is held then has a shape and no numbers. Not where keys are turned to places."""
    merges: ClassVar[bool] = False
    """Whether tokens of the lowest scores join a neighbour instead of leaving: what `MergingCache` does."""

    def __post_init__(self) -> None:
        if not is_count(self.sinks) or self.sinks < 0:
            raise ValueError(f"sinks are a number of tokens, 0 or more; got {self.sinks!r}")
        whole = is_count(self.recent) and self.recent >= 0
        if not whole and not (isinstance(self.recent, float) and 0 <= self.recent <= 1):
            raise ValueError(
                f"recent is a number of tokens, or as a float a fraction of the budget; got {self.recent!r}"
            )

    @abstractmethod
    def score(self, held: Held) -> Tensor:
        """Of each token held, `[batch, num_kv_heads, tokens]`: the highest are kept. What padding gets is no matter."""

    def watch(self, seen: Seen) -> Notes:
        """What to remember of a step, asked after it has attended; `seen.notes` is what was remembered before."""
        return seen.notes

    @property
    def watches(self) -> bool:
        """Whether this policy looks on."""
        return type(self).watch is not Policy.watch

    @property
    def is_shown_at_once(self) -> bool:
        """Whether `watch`, as it is defined, can be shown several layers at once; a subclass's own says so anew."""
        owner = next(kind for kind in type(self).__mro__ if "watch" in vars(kind))
        return not vars(owner).get("reads_held", True)

    def for_layer(self, layer: int) -> Policy:
        """This policy as layer `layer` of a model has it: the same, unless layers must not choose alike."""
        return self

    def recent_of(self, budget: int) -> int:
        """How many of the newest tokens are always kept under a budget of so many."""
        return int(self.recent * budget) if isinstance(self.recent, float) else int(self.recent)
