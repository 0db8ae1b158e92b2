"""From scores to tokens: who is kept whatever its score, who goes first, and the indices of both.

First goes what no later query could see: padding, then what has left the model's window. Last goes what a policy always
keeps, its sinks and the newest. In between the score decides, each KV head for itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

UNSEEN = torch.finfo(torch.float32).min
MOST = 1e38  # scores are held between -MOST and MOST, so that no score reaches what decides before them


def ranked(
    scores: Tensor,
    positions: Tensor,
    newest: int | Tensor,
    *,
    sinks: int,
    recent: int,
    window: int | None,
    has_padding: bool,
) -> Tensor:
    """Scores in which protection and uselessness are said as numbers, float32 `[batch, num_kv_heads, tokens]`.

    A score that is NaN counts as the lowest. newest: the position of the newest token, int or `[batch, 1, 1]`.
    Of several layers at once: `[layers, batch, num_kv_heads, tokens]`.
    """
    ranks = torch.nan_to_num(scores.float(), nan=-MOST, posinf=MOST, neginf=-MOST)
    if recent:
        ranks = ranks.masked_fill(positions > newest - recent, math.inf)
    if sinks:
        ranks = ranks.masked_fill(positions < sinks, math.inf)
    if window is not None:
        ranks = ranks.masked_fill(left_window(positions, newest, window), UNSEEN)
    if has_padding:
        ranks = ranks.masked_fill(positions < 0, -math.inf)
    return ranks


def left_window(positions: Tensor, newest: int | Tensor, window: int) -> Tensor:
    """Which tokens the next query, which stands at `newest` + 1, does not see for their distance, bool."""
    return positions <= newest + 1 - window


def highest(ranks: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest, in the order they lie in, int64 `[batch, num_kv_heads, count]`."""
    return ranks.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values


def highest_of_all(ranks: Tensor, count: int, sure: int) -> tuple[Tensor, Tensor]:
    """Indices of the highest of all KV heads together, `count` for each on average and at least `sure`.

    int64 `[batch, num_kv_heads, most]`, in the order they lie in, `most` as the head that gets most has; and which of
    them are none, since their head gets fewer, bool.
    """
    own = ranks.topk(sure, dim=-1).indices
    common = ranks.scatter(2, own, math.inf).flatten(1)
    kept = torch.zeros_like(common, dtype=torch.bool).scatter(1, common.topk(count * ranks.shape[1]).indices, True)
    kept = kept.view(ranks.shape)
    most = int(kept.sum(dim=-1).max())
    index = kept.float().topk(most, dim=-1, sorted=False).indices.sort(dim=-1).values
    return index, ~kept.gather(2, index)


def lowest(ranks: Tensor, count: int) -> Tensor:
    """Indices of the `count` lowest, the lowest first, int64 `[batch, num_kv_heads, count]`."""
    if count == 1:
        return ranks.argmin(dim=-1, keepdim=True)
    return ranks.topk(count, dim=-1, largest=False, sorted=True).indices
