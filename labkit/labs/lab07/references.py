"""What fills the blanks of lab 07: ordinary code with the signatures of the stubs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.cache.evicting import Held, Notes, Policy, Seen
from labkit.labs.lab07.bounded import Bounded


def window_positions(seq_len: int, budget: int, sinks: int) -> list[int]:
    """Positions of the tokens that are held after `seq_len` tokens of a text, in ascending order.

    Every token while no more than `budget` have come. Then `budget` of them: the first `sinks` and the newest others.
    0 <= sinks < budget; the first position is 0.
    """
    if seq_len <= budget:
        return list(range(seq_len))
    return [*range(sinks), *range(seq_len - (budget - sinks), seq_len)]


def keep_best(k: Tensor, v: Tensor, positions: Tensor, scores: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    """K, V and positions of the `budget` tokens with the highest scores: each KV head of each row keeps its own.

    k, v: [batch, num_kv_heads, tokens, head_dim]. positions: int [batch, num_kv_heads, tokens], ascending along tokens.
    scores: float [batch, num_kv_heads, tokens]. What is kept stays in the order it had, in memory of its own, so that
    the old tensors can be freed. With no more than `budget` tokens, all of them.
    """
    if k.shape[2] <= budget:
        return k, v, positions
    index = scores.topk(budget, dim=-1).indices.sort(dim=-1).values
    vectors = index[..., None].expand(-1, -1, -1, k.shape[3])
    return k.gather(2, vectors), v.gather(2, vectors), positions.gather(2, index)


def attention_received(q: Tensor, k: Tensor, block: int) -> Tensor:
    """The attention that each key gets from all these queries: float32 [batch, num_kv_heads, kv_len].

    q: [batch, num_heads, new_tokens, head_dim], of the newest tokens. k: [batch, num_kv_heads, kv_len, head_dim], with
    the new tokens' own. No query sees a later key; query head h reads KV head h // num_queries_per_kv. The weights,
    softmax(q k / sqrt(head_dim)), are summed over queries; of the query heads that share a KV head the mean is taken.
    Weights of at most `block` queries exist at a time, [batch, num_heads, block, kv_len].
    """
    batch, _, new_tokens, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    received = torch.zeros(batch, num_kv_heads, kv_len, device=q.device)
    for start in range(0, new_tokens, block):
        some = q[:, :, start : start + block].unflatten(1, (num_kv_heads, -1))
        scores = (some @ k[:, :, None].mT).float() * head_dim**-0.5
        sees = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(kv_len - new_tokens + start)
        weights = scores.masked_fill(~sees, float("-inf")).softmax(dim=-1)
        received += weights.sum(dim=3).mean(dim=2)
    return received


def protected(scores: Tensor, positions: Tensor, sinks: int, recent: int) -> Tensor:
    """The scores, with infinity for the tokens that are to be kept whatever their score.

    scores: float [batch, num_kv_heads, tokens]. positions: int, of the same shape, of the tokens held, in any order;
    each KV head holds the newest token. Kept are the text's first `sinks` tokens and its newest `recent`, as far as
    they are held. A new tensor comes back.
    """
    newest = positions.amax(dim=-1, keepdim=True)
    always = (positions < sinks) | (positions > newest - recent)
    return scores.masked_fill(always, float("inf"))


def snapkv_scores(q: Tensor, k: Tensor, window: int, pool: int) -> Tensor:
    """SnapKV's scores of a prompt's tokens: float32 [batch, num_kv_heads, tokens].

    q: [batch, num_heads, tokens, head_dim]; k: [batch, num_kv_heads, tokens, head_dim]; 0 < window < tokens. The last
    `window` tokens get infinity. Any other first gets the mean of the weights that the last `window` queries give it
    (causal attention over all tokens), in all query heads that share the KV head. Then each of these means becomes
    the mean over `pool` places, an odd number: its own and as many on either side; a place that is beyond an end or in
    the window counts as 0. No weights of other queries are computed.
    """
    received = attention_received(q[:, :, -window:], k, window) / window
    received[..., -window:] = 0
    pooled = F.avg_pool1d(received, pool, stride=1, padding=pool // 2)
    pooled[..., -window:] = float("inf")
    return pooled


def at_places(k: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Keys turned from their positions in the text to their places in the cache: 0, 1, 2, ... in the order held.

    k: [batch, num_kv_heads, tokens, head_dim], each turned by RoPE to its position. positions: int [batch,
    num_kv_heads, tokens], ascending along tokens. frequencies: [head_dim / 2], in radians per position. To turn by n
    positions makes of channels (a, b), those at i and i + head_dim / 2, (a cos - b sin, b cos + a sin) with the angle
    n * frequencies[i]. They come back in k's dtype.
    """
    places = torch.arange(k.shape[2], device=k.device)
    angle = (places - positions)[..., None] * frequencies
    a, b = k.float().chunk(2, dim=-1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1).to(k.dtype)


class LastLook(Policy):
    """Keeps the tokens at which the newest query looks, the same in every KV head of a layer (TOVA).

    watch notes for each token its weight for the newest query, the mean over all query heads; score returns what was
    noted. seen.weights(1): the newest query's weights, [batch, num_heads, 1, tokens]. seen.k: [batch, num_kv_heads,
    tokens, head_dim]. Notes(x): x is [batch, num_kv_heads, tokens]; held.tally gives it back.
    """

    def watch(self, seen: Seen) -> Notes:
        """What the newest query gives each token."""
        mean = seen.weights(1)[:, :, 0].mean(dim=1, keepdim=True)
        return Notes(mean.expand(-1, seen.k.shape[1], -1))

    def score(self, held: Held) -> Tensor:
        """What was noted."""
        return held.tally


def append_bounded(cache: Bounded, k: Tensor, v: Tensor) -> None:
    """Appends new tokens, and drops what a window of `cache.budget` tokens with `cache.sinks` has no room for.

    k, v: [num_kv_heads, new_tokens, head_dim], of the tokens that follow the `cache.seq_len` seen so far.
    cache.k, cache.v: [num_kv_heads, held, head_dim]. cache.positions: int64 [held], each token's in the text.
    """
    first = cache.seq_len
    cache.seq_len = first + k.shape[1]
    cache.k = torch.cat((cache.k, k), dim=1)
    cache.v = torch.cat((cache.v, v), dim=1)
    cache.positions = torch.cat((cache.positions, torch.arange(first, cache.seq_len)))
    recent = cache.seq_len - (cache.budget - cache.sinks)
    kept = (cache.positions < cache.sinks) | (cache.positions >= recent)
    cache.k, cache.v, cache.positions = cache.k[:, kept], cache.v[:, kept], cache.positions[kept]


def ring_slot(position: int, budget: int, sinks: int) -> int:
    """The slot, from 0 to budget - 1, into which the token at `position` goes.

    The first `budget` tokens fill the slots in order. From then on each takes the slot of the oldest token that is none
    of the first `sinks`, which are never overwritten. 0 <= sinks < budget.
    """
    if position < budget:
        return position
    return sinks + (position - sinks) % (budget - sinks)
