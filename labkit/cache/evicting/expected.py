"""A policy that looks ahead: how much attention later queries are expected to pay, if they are like those so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.attention import is_count
from labkit.cache.evicting.places import spun
from labkit.cache.evicting.policy import Held, Notes, Policy, Seen
from labkit.rotation import rotate, signed


@dataclass(frozen=True, eq=False, kw_only=True)
class ExpectedAttention(Policy):
    """What later queries are expected to look at, times what it would give them (arXiv:2510.00636).

    frequencies: RoPE's, in radians per position, float `[head_dim / 2]` (`model.frequencies`). future: how many
    positions ahead queries are expected at. covariance: count how queries vary, not only their mean. value_norm:
    multiply by the norm of the value; epsilon is added before.

    Queries before RoPE are taken to be normal, with the mean m and the covariance C of those seen so far. R turns by
    RoPE's mean rotation over the next `future` positions. The expected exp(q k scale) is then
    exp(scale k R m + scale^2 / 2 k R C R^T k); over the tokens that makes a softmax, and the mean of it over the query
    heads of a KV head is the score.

    Settled here, all as in kvpress's ExpectedAttentionPress: the first `sinks` queries and tokens, which are unlike the
    others, are left out of the statistics and of the softmax. A soft cap is not counted. Where eviction goes on,
    statistics are of all queries so far: they are kept with the cache, head_dim^2 + head_dim + 1 numbers for each query
    head, and in the sums' float32.
    """

    sinks: int = 4
    frequencies: Tensor
    future: int = 512
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = 0.0
    lasting: ClassVar[bool] = True
    reads_weights: ClassVar[bool] = False
    reads_held: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_count(self.future) or self.future < 1:
            raise ValueError(f"future is a number of positions, at least 1; got {self.future!r}")

    def watch(self, seen: Seen) -> Notes:
        """Adds to the number of queries, and to the sums of their products and, as one more column, of themselves."""
        batch, heads, queries, _ = seen.q.shape
        q = rotate(seen.q.float(), *self.back(seen))
        count: int | Tensor = queries
        if not isinstance(seen.newest, int) or seen.newest - queries + 1 < self.sinks:  # some do not count
            real = (seen.query_positions >= self.sinks).expand(batch, -1)[:, None, :, None]
            q, count = q * real, real.sum(dim=2).float()
        ones = F.pad(q, (0, 1), value=1.0)  # of what does not count q is 0, and so is what it adds
        if not seen.notes.rows:
            return Notes(rows=(torch.zeros(batch, heads, 1, device=q.device) + count, q.mT @ ones))
        counted, sums = seen.notes.rows
        sums = torch.addcmul(sums, q.mT, ones) if queries == 1 else sums + q.mT @ ones
        return Notes(rows=(counted + count, sums))

    def back(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """cos and sin that undo the queries' RoPE, as `rotate` takes them: once for the layers that have the same."""
        positions, frequencies = seen.query_positions, self.frequencies
        known = seen.shared.get(id(frequencies))
        if known is None or known[0] is not positions or known[1] is not frequencies:
            angle = -positions[:, None, :, None] * frequencies.to(positions.device)
            known = positions, frequencies, signed(angle.cos().float(), angle.sin().float())
            seen.shared[id(frequencies)] = known
        return known[2]

    def score(self, held: Held) -> Tensor:
        """The expected attention."""
        if not held.notes.rows:  # nobody attended yet
            return held.tally
        count, sums = held.notes.rows
        products, mean = sums[..., :-1], sums[..., -1] / count.clamp(min=1)
        cos, sin = self.rotation(held)
        k, scale = held.k.float(), held.constants.scale_for(held.k.shape[3])
        ahead = spun(mean, cos, sin).unflatten(1, (held.k.shape[1], -1))  # [batch, num_kv_heads, heads of it, head_dim]
        logits = (ahead @ k.mT) * scale
        if self.covariance:
            spread = products / count.clamp(min=1)[..., None] - mean[..., None] * mean[..., None, :]
            spread = spun(spun(spread, cos[:, :, None], sin[:, :, None]).mT, cos[:, :, None], sin[:, :, None])
            # One product for all query heads of a KV head: for each by itself PyTorch would copy the keys.
            spread = (
                spread.unflatten(1, (k.shape[1], -1)).transpose(2, 3).flatten(3)
            )  # [..., head_dim, heads, head_dim]
            some = (k @ spread).unflatten(3, (-1, k.shape[3])) * k[:, :, :, None]
            logits = logits + some.sum(dim=-1).mT * (scale**2 / 2)
        logits = logits.masked_fill((held.positions < self.sinks)[:, :, None], float("-inf"))
        expected = torch.softmax(logits, dim=-1).mean(dim=2)
        return (expected + self.epsilon) * held.v.float().norm(dim=-1) if self.value_norm else expected

    def rotation(self, held: Held) -> tuple[Tensor, Tensor]:
        """RoPE's mean cos and sin over the positions to come, `[batch or 1, 1, head_dim / 2]`."""
        newest = torch.as_tensor(held.newest, device=held.k.device).reshape(-1, 1)
        ahead = newest + torch.arange(1, self.future + 1, device=held.k.device)
        angle = ahead[..., None] * self.frequencies.to(held.k.device)
        return angle.cos().mean(dim=1)[:, None], angle.sin().mean(dim=1)[:, None]
