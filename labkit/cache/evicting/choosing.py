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
    """
    ranks = torch.nan_to_num(scores.float(), nan=-MOST, posinf=MOST, neginf=-MOST)
    if recent:
        ranks = ranks.masked_fill(positions > newest - recent, math.inf)
    if sinks:
        ranks = ranks.masked_fill(positions < sinks, math.inf)
    if window is not None:  # the next query stands at newest + 1
        ranks = ranks.masked_fill(positions <= newest + 1 - window, UNSEEN)
    if has_padding:
        ranks = ranks.masked_fill(positions < 0, -math.inf)
    return ranks


def highest(ranks: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest, in the order they lie in, int64 `[batch, num_kv_heads, count]`."""
    return ranks.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values


def lowest(ranks: Tensor, count: int) -> Tensor:
    """Indices of the `count` lowest, the lowest first, int64 `[batch, num_kv_heads, count]`."""
    if count == 1:
        return ranks.argmin(dim=-1, keepdim=True)
    return ranks.topk(count, dim=-1, largest=False, sorted=True).indices
