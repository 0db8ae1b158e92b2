"""Answers that lab 07's checks had not seen when they met: their author knew the notebook, not the checks."""

# ruff: noqa: F811

from __future__ import annotations

import itertools
import math
from collections import deque

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.cache.evicting import Held, Notes, Policy, Seen
from labkit.labs.lab07 import references
from labkit.labs.lab07.bounded import Bounded
from labkit.labs.lab07.references import *  # noqa: F403
from tests.labs.noting import noting

WRONG, RIGHT, wrong, right = noting(references)


# 07.1 · window_positions


@wrong("07.1", "the sinks are held on top of the budget", "the budget counts the sinks, too")
def window_positions(seq_len: int, budget: int, sinks: int) -> list[int]:
    if seq_len <= budget:
        return list(range(seq_len))
    start = max(sinks, seq_len - budget)
    return list(range(sinks)) + list(range(start, seq_len))


@wrong("07.1", "no case for a text that still fits: early tokens twice", "while all fit, each token once")
def window_positions(seq_len: int, budget: int, sinks: int) -> list[int]:
    everything = list(range(seq_len))
    return everything[:sinks] + everything[-(budget - sinks) :]


@wrong("07.1", "a set, but positions below 0 while the text is short", "no position before the first token, 0")
def window_positions(seq_len: int, budget: int, sinks: int) -> list[int]:
    recent = budget - sinks
    return sorted(set(range(sinks)) | set(range(seq_len - recent, seq_len)))


@wrong("07.1", "sinks are held before they have come", "a text shorter than the sinks holds only what has come")
def window_positions(seq_len: int, budget: int, sinks: int) -> list[int]:
    return list(range(sinks)) + list(range(max(sinks, seq_len - (budget - sinks)), seq_len))


@wrong("07.1", "the window ends one token early", "the newest token, seq_len - 1, must be held")
def window_positions(seq_len: int, budget: int, sinks: int) -> list[int]:
    if seq_len <= budget:
        return list(range(seq_len))
    newest = seq_len - 1
    return [*range(sinks), *range(newest - (budget - sinks), newest)]


@wrong("07.1", "the first token is held even with 0 sinks", "without sinks the first token leaves")
def window_positions(seq_len: int, budget: int, sinks: int) -> list[int]:
    if seq_len <= budget:
        return list(range(seq_len))
    sinks = max(1, sinks)
    return [*range(sinks), *range(seq_len - budget + sinks, seq_len)]


@wrong("07.1", "in the order of a ring's slots", "positions in ascending order")
def window_positions(seq_len: int, budget: int, sinks: int) -> list[int]:
    slots = []
    for position in range(seq_len):
        if position < budget:
            slots.append(position)
        else:
            slots[sinks + (position - sinks) % (budget - sinks)] = position
    return slots


@wrong("07.1", "half the window is dropped at once, whenever it is full", "exactly `budget` tokens once full")
def window_positions(seq_len: int, budget: int, sinks: int) -> list[int]:
    held: list[int] = []
    for position in range(seq_len):
        held.append(position)
        if len(held) > budget:
            held = held[:sinks] + held[sinks + max(1, (budget - sinks) // 2) :]
    return held


@right("07.1", "one filter over all positions")
def window_positions(seq_len: int, budget: int, sinks: int) -> list[int]:
    return [p for p in range(seq_len) if p < sinks or seq_len - p <= budget - sinks]


@right("07.1", "a deque for the newest, token by token")
def window_positions(seq_len: int, budget: int, sinks: int) -> list[int]:
    tokens = iter(range(seq_len))
    first = list(itertools.islice(tokens, sinks))
    return first + list(deque(tokens, maxlen=budget - sinks))


@right("07.1", "del of a slice; max for the short text")
def window_positions(seq_len: int, budget: int, sinks: int) -> list[int]:
    held = list(range(seq_len))
    surplus = max(0, seq_len - budget)
    del held[sinks : sinks + surplus]
    return held


@right("07.1", "a mask in torch")
def window_positions(seq_len, budget, sinks=0):
    places = torch.arange(seq_len)
    return places[(places < sinks) | (places >= seq_len - (budget - sinks))].tolist()


# 07.2 · keep_best


@wrong("07.2", "in the order of the scores", "what is kept stays in the order it had")
def keep_best(k: Tensor, v: Tensor, positions: Tensor, scores: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    best = scores.topk(min(budget, k.shape[2]), dim=-1).indices
    wide = best[..., None].expand(-1, -1, -1, k.shape[-1])
    return k.gather(2, wide), v.gather(2, wide), positions.gather(2, best)


@wrong("07.2", "one choice for all KV heads, by their mean score", "each KV head keeps its own")
def keep_best(k: Tensor, v: Tensor, positions: Tensor, scores: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    if k.shape[2] <= budget:
        return k.clone(), v.clone(), positions.clone()
    best = scores.mean(dim=1, keepdim=True).topk(budget, dim=-1).indices.sort(dim=-1).values
    best = best.expand(-1, k.shape[1], -1)
    wide = best[..., None].expand(-1, -1, -1, k.shape[-1])
    return k.gather(2, wide), v.gather(2, wide), positions.gather(2, best)


@wrong("07.2", "the first row's choice for every row", "each row keeps its own")
def keep_best(k: Tensor, v: Tensor, positions: Tensor, scores: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    if k.shape[2] <= budget:
        return k.clone(), v.clone(), positions.clone()
    best = scores[0].topk(budget, dim=-1).indices.sort(dim=-1).values
    heads = torch.arange(k.shape[1], device=k.device)[:, None]
    return k[:, heads, best], v[:, heads, best], positions[:, heads, best]


@wrong("07.2", "a slice of a copy of everything", "memory of its own: the copy's dropped tokens stay alive")
def keep_best(k: Tensor, v: Tensor, positions: Tensor, scores: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    order = scores.argsort(dim=-1, descending=True)
    order = torch.cat((order[..., :budget].sort(dim=-1).values, order[..., budget:]), dim=-1)
    wide = order[..., None].expand_as(k)
    k, v, positions = k.gather(2, wide), v.gather(2, wide), positions.gather(2, order)
    return k[:, :, :budget], v[:, :, :budget], positions[..., :budget]


@wrong("07.2", "a threshold: of equal scores early ones push out a higher one", "the highest scores, ties or not")
def keep_best(k: Tensor, v: Tensor, positions: Tensor, scores: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    if k.shape[2] <= budget:
        return k.clone(), v.clone(), positions.clone()
    least = scores.sort(dim=-1, descending=True).values[..., budget - 1 : budget]
    enough = scores >= least
    enough &= enough.cumsum(dim=-1) <= budget
    shape = (*k.shape[:2], budget, k.shape[-1])
    return k[enough].reshape(shape), v[enough].reshape(shape), positions[enough].reshape(shape[:3])


@wrong("07.2", "places instead of positions come back", "positions are those of the text, taken along")
def keep_best(k: Tensor, v: Tensor, positions: Tensor, scores: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    if k.shape[2] <= budget:
        return k.clone(), v.clone(), positions.clone()
    best = scores.topk(budget, dim=-1).indices.sort(dim=-1).values
    wide = best[..., None].expand(-1, -1, -1, k.shape[-1])
    return k.gather(2, wide), v.gather(2, wide), best.to(positions.dtype)


@wrong("07.2", "scores are rounded to the keys' dtype first", "the highest scores as given: float32 stays float32")
def keep_best(k: Tensor, v: Tensor, positions: Tensor, scores: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    count = min(budget, k.shape[2])
    best = scores.to(k.dtype).topk(count, dim=-1).indices.sort(dim=-1).values
    wide = best.unsqueeze(-1).expand(-1, -1, -1, k.shape[-1])
    return k.gather(2, wide), v.gather(2, wide), positions.gather(2, best)


@wrong("07.2", "no case for fewer tokens than the budget", "with no more than `budget` tokens, all of them")
def keep_best(k: Tensor, v: Tensor, positions: Tensor, scores: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    best = scores.topk(budget, dim=-1).indices.sort(dim=-1).values
    wide = best[..., None].expand(-1, -1, -1, k.shape[-1])
    return k.gather(2, wide), v.gather(2, wide), positions.gather(2, best)


@wrong("07.2", "takes the best one by one and marks them in the caller's scores", "scores must not be changed")
def keep_best(k: Tensor, v: Tensor, positions: Tensor, scores: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    best = []
    for _ in range(min(budget, k.shape[2])):
        best.append(scores.argmax(dim=-1, keepdim=True))
        scores.scatter_(-1, best[-1], -math.inf)
    chosen = torch.cat(best, dim=-1).sort(dim=-1).values
    wide = chosen[..., None].expand(-1, -1, -1, k.shape[-1])
    return k.gather(2, wide), v.gather(2, wide), positions.gather(2, chosen)


@wrong("07.2", "keeps one more than the budget once something leaves", "`budget` tokens, no more")
def keep_best(k: Tensor, v: Tensor, positions: Tensor, scores: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens = k.shape[2]
    if tokens <= budget:
        return k.clone(), v.clone(), positions.clone()
    gone = scores.topk(tokens - budget, dim=-1, largest=False).indices[..., 1:]
    stays = torch.ones_like(scores, dtype=torch.bool).scatter(-1, gone, False)
    shape = (*k.shape[:2], budget + 1)
    return k[stays].reshape(*shape, -1), v[stays].reshape(*shape, -1), positions[stays].reshape(shape)


@right("07.2", "a mask by scatter, and boolean indexing")
def keep_best(k: Tensor, v: Tensor, positions: Tensor, scores: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, tokens, dim = k.shape
    count = min(budget, tokens)
    stays = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    stays.scatter_(-1, scores.topk(count, dim=-1, sorted=False).indices, True)
    return (
        k[stays].reshape(batch, heads, count, dim),
        v[stays].reshape(batch, heads, count, dim),
        positions[stays].reshape(batch, heads, count),
    )


@right("07.2", "row by row and head by head, index_select and stack")
def keep_best(k: Tensor, v: Tensor, positions: Tensor, scores: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    kept: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for row, head in itertools.product(range(k.shape[0]), range(k.shape[1])):
        ranked = torch.argsort(scores[row, head], descending=True, stable=True)
        places, _ = torch.sort(ranked[:budget])
        for out, x in zip(kept, (k, v, positions), strict=True):
            out.append(x[row, head].index_select(0, places))
    return tuple(torch.stack(x).unflatten(0, k.shape[:2]) for x in kept)


@right("07.2", "flat indices into all tokens of all heads")
def keep_best(k: Tensor, v: Tensor, positions: Tensor, scores: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, tokens, _ = k.shape
    ranks = scores.argsort(dim=-1, descending=True).argsort(dim=-1)
    flat = (ranks < budget).flatten().nonzero().squeeze(1)
    shape = (batch, heads, min(budget, tokens))
    return (
        k.reshape(-1, k.shape[-1])[flat].reshape(*shape, k.shape[-1]),
        v.reshape(-1, v.shape[-1])[flat].reshape(*shape, v.shape[-1]),
        positions.reshape(-1)[flat].reshape(shape),
    )


@right("07.2", "take_along_dim, in a helper; the early case cloned")
def keep_best(k, v, positions, scores, budget):
    if scores.size(-1) <= budget:
        return tuple(x.clone(memory_format=torch.contiguous_format) for x in (k, v, positions))
    places = torch.sort(scores.topk(budget).indices).values

    def taken(x: Tensor) -> Tensor:
        return torch.take_along_dim(x, places if x.ndim == 3 else places.unsqueeze(3), dim=2)

    return taken(k), taken(v), taken(positions)


# 07.3 · attention_received


def _blocks(q: Tensor, k: Tensor, block: int, *, scale: float | None = None, offset: int | None = None) -> Tensor:
    """The usual road: summed over queries, per query head."""
    batch, num_heads, new_tokens, dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    scale = dim**-0.5 if scale is None else scale
    offset = kv_len - new_tokens if offset is None else offset
    wide = k.float().repeat_interleave(num_heads // kv_heads, dim=1)
    total = torch.zeros(batch, num_heads, kv_len, device=q.device)
    places = torch.arange(kv_len, device=q.device)
    for start in range(0, new_tokens, block):
        some = q[:, :, start : start + block].float()
        own = offset + start + torch.arange(some.shape[2], device=q.device)
        scores = (some @ wide.mT * scale).masked_fill(places > own[:, None], -math.inf)
        total += scores.softmax(dim=-1).sum(dim=2)
    return total


@wrong("07.3", "each block's mask starts anew", "query i, counted over all blocks, sees up to kv_len - n + i")
def attention_received(q: Tensor, k: Tensor, block: int) -> Tensor:
    batch, num_heads, new_tokens, dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    wide = k.float().repeat_interleave(num_heads // kv_heads, dim=1)
    total = torch.zeros(batch, num_heads, kv_len, device=q.device)
    for some in q.float().split(block, dim=2):
        count = some.shape[2]
        later = torch.ones(count, kv_len, dtype=torch.bool, device=q.device).triu(kv_len - new_tokens + 1)
        total += (some @ wide.mT / math.sqrt(dim)).masked_fill(later, -math.inf).softmax(-1).sum(2)
    return total.unflatten(1, (kv_heads, -1)).mean(2)


@wrong("07.3", "query head h reads KV head h % num_kv_heads", "h // num_queries_per_kv: neighbours share a KV head")
def attention_received(q: Tensor, k: Tensor, block: int) -> Tensor:
    batch, num_heads, new_tokens, dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    group = num_heads // kv_heads
    wide = k.float().repeat(1, group, 1, 1)
    total = torch.zeros(batch, num_heads, kv_len, device=q.device)
    places = torch.arange(kv_len, device=q.device)
    for start in range(0, new_tokens, block):
        some = q[:, :, start : start + block].float()
        own = kv_len - new_tokens + start + torch.arange(some.shape[2], device=q.device)
        scores = (some @ wide.mT / math.sqrt(dim)).masked_fill(places > own[:, None], -math.inf)
        total += scores.softmax(dim=-1).sum(dim=2)
    return total.unflatten(1, (group, kv_heads)).mean(1)


@wrong("07.3", "no scale by the root of head_dim", "scores are divided by sqrt(head_dim)")
def attention_received(q: Tensor, k: Tensor, block: int) -> Tensor:
    return _blocks(q, k, block, scale=1.0).unflatten(1, (k.shape[1], -1)).mean(dim=2)


@wrong("07.3", "a last block that is not full is left out", "all queries, whatever new_tokens % block")
def attention_received(q: Tensor, k: Tensor, block: int) -> Tensor:
    batch, _, new_tokens, dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    grouped = q.float().unflatten(1, (kv_heads, -1))
    keys = k.float().unsqueeze(2)
    total = torch.zeros(batch, kv_heads, kv_len, device=q.device)
    block = min(block, new_tokens)
    for number in range(new_tokens // block):
        start = number * block
        scores = grouped[:, :, :, start : start + block] @ keys.mT / dim**0.5
        seen = torch.ones(block, kv_len, dtype=torch.bool, device=q.device).tril(kv_len - new_tokens + start)
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        total += weights.mean(dim=2).sum(dim=2)
    return total


@wrong("07.3", "query heads that share a KV head are summed", "their mean, not their sum")
def attention_received(q: Tensor, k: Tensor, block: int) -> Tensor:
    return _blocks(q, k, block).unflatten(1, (k.shape[1], -1)).sum(dim=2)


@wrong("07.3", "query i sees up to i, as if it were the text's first", "queries are the newest: kv_len - n + i")
def attention_received(q: Tensor, k: Tensor, block: int) -> Tensor:
    return _blocks(q, k, block, offset=0).unflatten(1, (k.shape[1], -1)).mean(dim=2)


@wrong("07.3", "all weights at once, block ignored", "weights of at most `block` queries at a time")
def attention_received(q: Tensor, k: Tensor, block: int) -> Tensor:
    return _blocks(q, k, q.shape[2]).unflatten(1, (k.shape[1], -1)).mean(dim=2)


@wrong("07.3", "all weights at once, only their sum is done in blocks", "weights of at most `block` queries at a time")
def attention_received(q: Tensor, k: Tensor, block: int) -> Tensor:
    new_tokens, kv_len = q.shape[2], k.shape[2]
    grouped = q.float().unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bgrqd,bgkd->bgrqk", grouped, k.float()) * q.shape[-1] ** -0.5
    later = torch.ones(new_tokens, kv_len, dtype=torch.bool, device=q.device).triu(kv_len - new_tokens + 1)
    weights = scores.masked_fill_(later, -math.inf).softmax(dim=-1)
    return sum(some.sum(dim=3).mean(dim=2) for some in weights.split(block, dim=3))


@wrong("07.3", "summed up in the queries' dtype, float32 only at the end", "in bfloat16 the sum loses small weights")
def attention_received(q: Tensor, k: Tensor, block: int) -> Tensor:
    batch, num_heads, new_tokens, dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    wide = k.repeat_interleave(num_heads // kv_heads, dim=1)
    total = torch.zeros(batch, num_heads, kv_len, dtype=q.dtype, device=q.device)
    places = torch.arange(kv_len, device=q.device)
    for start in range(0, new_tokens, block):
        some = q[:, :, start : start + block]
        own = kv_len - new_tokens + start + torch.arange(some.shape[2], device=q.device)
        scores = (some @ wide.mT * dim**-0.5).masked_fill(places > own[:, None], -math.inf)
        for query in scores.softmax(dim=-1).unbind(dim=2):
            total += query
    return total.unflatten(1, (kv_heads, -1)).mean(dim=2).float()


@wrong("07.3", "the mean of the query heads is taken before the softmax", "the mean of their weights, not of their q")
def attention_received(q: Tensor, k: Tensor, block: int) -> Tensor:
    return _blocks(q.float().unflatten(1, (k.shape[1], -1)).mean(dim=2), k, block)


@wrong("07.3", "q is scaled in place", "the caller's q must stay as it was")
def attention_received(q: Tensor, k: Tensor, block: int) -> Tensor:
    q *= q.shape[-1] ** -0.5
    return _blocks(q, k, block, scale=1.0).unflatten(1, (k.shape[1], -1)).mean(dim=2)


@wrong("07.3", "divided by the number of queries that could see the key", "summed over queries, not their mean")
def attention_received(q: Tensor, k: Tensor, block: int) -> Tensor:
    kv_len = k.shape[2]
    could = (kv_len - torch.arange(kv_len, device=q.device)).clamp(max=q.shape[2])
    return _blocks(q, k, block).unflatten(1, (k.shape[1], -1)).mean(dim=2) / could


@wrong("07.3", "softmax over the queries of a block", "each query's weights add up to 1 over the keys")
def attention_received(q: Tensor, k: Tensor, block: int) -> Tensor:
    new_tokens, kv_len = q.shape[2], k.shape[2]
    grouped = q.float().unflatten(1, (k.shape[1], -1))
    total = torch.zeros(k.shape[:3], device=q.device)
    for start in range(0, new_tokens, block):
        scores = grouped[:, :, :, start : start + block] @ k.float().unsqueeze(2).mT * q.shape[-1] ** -0.5
        later = torch.ones_like(scores, dtype=torch.bool).triu(kv_len - new_tokens + start + 1)
        weights = scores.masked_fill(later, -1e30).softmax(dim=-2).masked_fill(later, 0.0)
        total += weights.sum(dim=3).mean(dim=2)
    return total


@right("07.3", "exponentials by hand in float64, einsum")
def attention_received(q: Tensor, k: Tensor, block: int) -> Tensor:
    new_tokens, kv_len = q.shape[2], k.shape[2]
    grouped = q.double().unflatten(1, (k.shape[1], -1)) / math.sqrt(q.shape[-1])
    keys = k.double()
    total = torch.zeros(k.shape[:3], dtype=torch.float64, device=q.device)
    for start in range(0, new_tokens, block):
        part = grouped[:, :, :, start : start + block]
        scores = torch.einsum("bgrqd,bgkd->bgrqk", part, keys)
        own = torch.arange(start, start + part.shape[3], device=q.device) + kv_len - new_tokens
        later = torch.arange(kv_len, device=q.device) > own.unsqueeze(1)
        scores.masked_fill_(later, -math.inf)
        scores -= scores.amax(dim=-1, keepdim=True)
        scores.exp_()
        total += torch.einsum("bgrqk,bgrq->bgk", scores, 1 / scores.sum(dim=-1)) / part.shape[2]
    return total.float()


@right("07.3", "one query at a time, only the keys that it sees")
def attention_received(q: Tensor, k: Tensor, block: int) -> Tensor:
    first = k.shape[2] - q.shape[2]
    grouped = q.unflatten(1, (k.shape[1], -1)).float()
    total = k.new_zeros(k.shape[:-1], dtype=torch.float32)
    for query in range(q.shape[2]):
        end = first + query + 1
        scores = grouped[:, :, :, query] @ k[:, :, :end].float().mT
        total[:, :, :end] += (scores * k.shape[-1] ** -0.5).softmax(dim=-1).mean(dim=2)
    return total


@right("07.3", "from the last block to the first, keys cut at the block's end, query heads one by one")
def attention_received(q: Tensor, k: Tensor, block: int) -> Tensor:
    (batch, num_heads, new_tokens, dim), (_, kv_heads, kv_len, _) = q.shape, k.shape
    group = num_heads // kv_heads
    total = torch.zeros((batch, kv_heads, kv_len), dtype=torch.float32, device=q.device)
    stop = new_tokens
    while stop > 0:
        start = max(0, stop - block)
        end = kv_len - new_tokens + stop
        bias = torch.full((stop - start, end), -math.inf, device=q.device).triu(end - (stop - start) + 1)
        for head in range(num_heads):
            scores = q[:, head, start:stop].float() @ k[:, head // group, :end].float().transpose(1, 2)
            total[:, head // group, :end] += torch.softmax(scores / dim**0.5 + bias, dim=2).sum(dim=1) / group
        stop = start
    return total


# 07.4 · protected


@wrong("07.4", "by slot, not by position (and all of them with recent=0)", "slots are in no order: go by positions")
def protected(scores: Tensor, positions: Tensor, sinks: int, recent: int) -> Tensor:
    out = scores.clone()
    out[..., :sinks] = math.inf
    out[..., -recent:] = math.inf
    return out


@wrong("07.4", "the caller's scores are changed", "a new tensor comes back")
def protected(scores: Tensor, positions: Tensor, sinks: int, recent: int) -> Tensor:
    newest = positions.amax(dim=-1, keepdim=True)
    scores[(positions < sinks) | (positions > newest - recent)] = math.inf
    return scores


@wrong("07.4", "one newest position for all rows", "each row has a newest token of its own")
def protected(scores: Tensor, positions: Tensor, sinks: int, recent: int) -> Tensor:
    newest = positions.max()
    return scores.masked_fill((positions < sinks) | (positions > newest - recent), math.inf)


@wrong("07.4", "the newest position is taken to be the number of slots less 1", "held is not seen: ask positions")
def protected(scores: Tensor, positions: Tensor, sinks: int, recent: int) -> Tensor:
    newest = positions.shape[-1] - 1
    return scores.masked_fill((positions < sinks) | (positions > newest - recent), math.inf)


@wrong("07.4", "one recent token too many", "the newest `recent`: positions above newest - recent")
def protected(scores: Tensor, positions: Tensor, sinks: int, recent: int) -> Tensor:
    newest = positions.amax(dim=-1, keepdim=True)
    return torch.where((positions < sinks) | (positions >= newest - recent), math.inf, scores)


@wrong("07.4", "one sink too many", "the first `sinks`: positions 0 to sinks - 1")
def protected(scores: Tensor, positions: Tensor, sinks: int, recent: int) -> Tensor:
    newest = positions.amax(dim=-1, keepdim=True)
    return torch.where((positions <= sinks) | (positions > newest - recent), math.inf, scores)


@wrong("07.4", "the newest that are held, however old", "the text's newest `recent`, as far as they are held")
def protected(scores: Tensor, positions: Tensor, sinks: int, recent: int) -> Tensor:
    newest = positions.topk(min(recent, positions.shape[-1]), dim=-1).indices
    return scores.scatter(-1, newest, math.inf).masked_fill(positions < sinks, math.inf)


@wrong("07.4", "the oldest that are held count as sinks", "the text's first `sinks`, as far as they are held")
def protected(scores: Tensor, positions: Tensor, sinks: int, recent: int) -> Tensor:
    ranks = positions.argsort(dim=-1).argsort(dim=-1)
    newest = positions.amax(dim=-1, keepdim=True)
    return scores.masked_fill((ranks < sinks) | (positions > newest - recent), math.inf)


@wrong("07.4", "the mask times infinity is added: 0 * inf is NaN", "other scores stay as they were")
def protected(scores: Tensor, positions: Tensor, sinks: int, recent: int) -> Tensor:
    newest = positions.amax(dim=-1, keepdim=True)
    keep = (positions < sinks) | (positions > newest - recent)
    return scores + keep * math.inf


@wrong("07.4", "infinity is added: a score of -inf becomes NaN", "infinity whatever the score was")
def protected(scores: Tensor, positions: Tensor, sinks: int, recent: int) -> Tensor:
    newest = positions.amax(dim=-1, keepdim=True)
    keep = (positions < sinks) | (positions > newest - recent)
    return scores + torch.zeros_like(scores).masked_fill(keep, math.inf)


@wrong("07.4", "one more than the highest score in place of infinity", "infinity, which nothing beats")
def protected(scores: Tensor, positions: Tensor, sinks: int, recent: int) -> Tensor:
    newest = positions.amax(dim=-1, keepdim=True)
    keep = (positions < sinks) | (positions > newest - recent)
    return torch.where(keep, scores.amax(dim=-1, keepdim=True) + 1, scores)


@wrong("07.4", "nothing is protected unless the sinks are there, too", "sinks and recent tokens, each by itself")
def protected(scores: Tensor, positions: Tensor, sinks: int, recent: int) -> Tensor:
    if not sinks or not recent:
        return scores.clone()
    newest = positions.amax(dim=-1, keepdim=True)
    return scores.masked_fill((positions < sinks) | (positions > newest - recent), math.inf)


@right("07.4", "a clone, filled where the age is small")
def protected(scores: Tensor, positions: Tensor, sinks: int, recent: int) -> Tensor:
    out = scores.clone()
    age = positions.max(dim=2, keepdim=True).values - positions
    out[age < recent] = float("inf")
    out[positions < sinks] = float("inf")
    return out


@right("07.4", "every protected position compared with every token held")
def protected(scores: Tensor, positions: Tensor, sinks: int, recent: int) -> Tensor:
    first = torch.arange(sinks, device=positions.device)
    newest = positions.amax(-1, keepdim=True)[..., None] - torch.arange(recent, device=positions.device)
    keep = (positions[..., None] == first).any(-1) | (positions[..., None] == newest).any(-1)
    return torch.where(keep, torch.full_like(scores, math.inf), scores)


@right("07.4", "the greater of the score and infinity, or minus infinity where nothing is protected")
def protected(scores: Tensor, positions: Tensor, sinks: int, recent: int) -> Tensor:
    newest, _ = positions.sort(dim=-1)
    between = positions.ge(sinks) * positions.le(newest[..., -1:] - recent)
    floor = torch.full_like(scores, math.inf)
    floor[between] *= -1
    return torch.maximum(scores, floor)


# 07.5 · snapkv_scores


@wrong("07.5", "the window's own weights are pooled into its neighbours", "a place in the window counts as 0")
def snapkv_scores(q: Tensor, k: Tensor, window: int, pool: int) -> Tensor:
    mean = attention_received(q[:, :, -window:], k, window) / window
    out = F.avg_pool1d(mean, pool, stride=1, padding=pool // 2)
    out[..., -window:] = math.inf
    return out


@wrong("07.5", "the sum over the window's queries", "the mean of the weights: divide by `window`")
def snapkv_scores(q: Tensor, k: Tensor, window: int, pool: int) -> Tensor:
    received = attention_received(q[:, :, -window:], k, window)[..., :-window]
    out = F.avg_pool1d(received, pool, stride=1, padding=pool // 2)
    return F.pad(out, (0, window), value=math.inf)


@wrong("07.5", "at the ends the mean is over the places that are there", "places beyond an end count as 0")
def snapkv_scores(q: Tensor, k: Tensor, window: int, pool: int) -> Tensor:
    mean = attention_received(q[:, :, -window:], k, window)[..., :-window] / window
    out = F.avg_pool1d(mean, pool, stride=1, padding=pool // 2, count_include_pad=False)
    return F.pad(out, (0, window), value=math.inf)


@wrong("07.5", "weights of all queries, of which the last are used", "no weights of other queries are computed")
def snapkv_scores(q: Tensor, k: Tensor, window: int, pool: int) -> Tensor:
    tokens = q.shape[2]
    grouped = q.float().unflatten(1, (k.shape[1], -1))
    scores = grouped @ k.float().unsqueeze(2).mT * q.shape[-1] ** -0.5
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(later, -math.inf).softmax(-1)
    mean = weights[..., -window:, :-window].mean(dim=(2, 3))
    out = F.avg_pool1d(mean, pool, stride=1, padding=pool // 2)
    return F.pad(out, (0, window), value=math.inf)


@wrong("07.5", "all queries' sums less those of the older ones", "no weights of other queries are computed")
def snapkv_scores(q: Tensor, k: Tensor, window: int, pool: int) -> Tensor:
    before = q.shape[2] - window
    older = F.pad(attention_received(q[:, :, :before], k[:, :, :before], 16), (0, window))
    mean = (attention_received(q, k, 16) - older)[..., :before] / window
    return F.pad(F.avg_pool1d(mean, pool, stride=1, padding=pool // 2), (0, window), value=math.inf)


@wrong("07.5", "infinity is set before pooling", "infinity only in the window: pooling carries it to neighbours")
def snapkv_scores(q: Tensor, k: Tensor, window: int, pool: int) -> Tensor:
    mean = attention_received(q[:, :, -window:], k, window) / window
    mean[..., -window:] = math.inf
    return F.avg_pool1d(mean, pool, stride=1, padding=pool // 2)


@wrong("07.5", "the maximum of the places", "the mean over `pool` places")
def snapkv_scores(q: Tensor, k: Tensor, window: int, pool: int) -> Tensor:
    mean = attention_received(q[:, :, -window:], k, window)[..., :-window] / window
    return F.pad(F.max_pool1d(mean, pool, stride=1, padding=pool // 2), (0, window), value=math.inf)


@wrong("07.5", "no causal mask within the window", "a query of the window sees no later key")
def snapkv_scores(q: Tensor, k: Tensor, window: int, pool: int) -> Tensor:
    grouped = q[:, :, -window:].float().unflatten(1, (k.shape[1], -1))
    weights = (grouped @ k.float().unsqueeze(2).mT * q.shape[-1] ** -0.5).softmax(-1)
    mean = weights[..., :-window].mean(dim=(2, 3))
    return F.pad(F.avg_pool1d(mean, pool, stride=1, padding=pool // 2), (0, window), value=math.inf)


@wrong("07.5", "the softmax is over the older keys only", "causal attention over all tokens, the window's too")
def snapkv_scores(q: Tensor, k: Tensor, window: int, pool: int) -> Tensor:
    grouped = q[:, :, -window:].float().unflatten(1, (k.shape[1], -1))
    older = k[:, :, :-window].float().unsqueeze(2)
    mean = (grouped @ older.mT * q.shape[-1] ** -0.5).softmax(-1).mean(dim=(2, 3))
    return F.pad(F.avg_pool1d(mean, pool, stride=1, padding=pool // 2), (0, window), value=math.inf)


@wrong("07.5", "pools a place and those before it", "its own and as many on either side")
def snapkv_scores(q: Tensor, k: Tensor, window: int, pool: int) -> Tensor:
    mean = attention_received(q[:, :, -window:], k, window)[..., :-window] / window
    out = F.avg_pool1d(F.pad(mean, (pool - 1, 0)), pool, stride=1)
    return F.pad(out, (0, window), value=math.inf)


@wrong("07.5", "window 8 and pool 7, as in the notebook's example", "`window` and `pool` as given")
def snapkv_scores(q: Tensor, k: Tensor, window: int, pool: int) -> Tensor:
    mean = attention_received(q[:, :, -8:], k, 8)[..., :-8] / 8
    return F.pad(F.avg_pool1d(mean, 7, stride=1, padding=3), (0, k.shape[2] - mean.shape[-1]), value=math.inf)


@wrong("07.5", "the last query alone", "the mean over the last `window` queries")
def snapkv_scores(q: Tensor, k: Tensor, window: int, pool: int) -> Tensor:
    mean = attention_received(q[:, :, -1:], k, 1)[..., :-window]
    return F.pad(F.avg_pool1d(mean, pool, stride=1, padding=pool // 2), (0, window), value=math.inf)


@right("07.5", "an own attention, and a convolution with equal weights")
def snapkv_scores(q: Tensor, k: Tensor, window: int, pool: int) -> Tensor:
    batch, kv_heads, tokens, dim = k.shape
    asking = q[:, :, tokens - window :].float().reshape(batch, kv_heads, -1, dim)
    scores = torch.matmul(asking, k.float().transpose(-1, -2)).unflatten(2, (-1, window)) / math.sqrt(dim)
    own = torch.arange(tokens - window, tokens, device=q.device)
    scores.masked_fill_(torch.arange(tokens, device=q.device)[None] > own[:, None], -math.inf)
    mean = scores.softmax(dim=-1)[..., : tokens - window].mean(dim=3).mean(dim=2)
    kernel = torch.full((1, 1, pool), 1 / pool, device=q.device)
    pooled = F.conv1d(mean.reshape(batch * kv_heads, 1, -1), kernel, padding=(pool - 1) // 2)
    out = torch.full((batch, kv_heads, tokens), math.inf, device=q.device)
    out[..., : tokens - window] = pooled.reshape(batch, kv_heads, -1)
    return out


@right("07.5", "differences of a running sum in float64")
def snapkv_scores(q: Tensor, k: Tensor, window: int, pool: int) -> Tensor:
    older = k.shape[2] - window
    mean = attention_received(q[:, :, older:], k, block=1).double()[..., :older] / window
    half = pool // 2
    sums = F.pad(mean, (half + 1, half)).cumsum(dim=-1)
    pooled = (sums[..., pool:] - sums[..., :-pool]) / pool
    return torch.cat((pooled.float(), torch.full_like(k[..., -window:, 0], math.inf, dtype=torch.float32)), dim=-1)


@right("07.5", "zeros in the window, shifted copies added up, query by query")
def snapkv_scores(q: Tensor, k: Tensor, window: int, pool: int) -> Tensor:
    tokens = k.shape[2]
    mean = torch.zeros(k.shape[:3], dtype=torch.float32, device=k.device)
    for place in range(tokens - window, tokens):
        query = q[:, :, place : place + 1].float().unflatten(1, (k.shape[1], -1))
        scores = (query * k[:, :, None, : place + 1].float()).sum(dim=-1) / q.shape[-1] ** 0.5
        mean[..., : place + 1] += scores.softmax(dim=-1).mean(dim=2) / window
    mean[..., tokens - window :] = 0
    out = mean / pool
    for shift in range(1, min(pool // 2, tokens - 1) + 1):
        out[..., shift:] += mean[..., :-shift] / pool
        out[..., :-shift] += mean[..., shift:] / pool
    out[..., tokens - window :] = math.inf
    return out


# 07.6 · at_places


def _turned(k: Tensor, by: Tensor, frequencies: Tensor) -> Tensor:
    """k turned by so many positions, [batch, num_kv_heads, tokens]."""
    angles = by[..., None].float() * frequencies.float()
    a, b = k.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(k.dtype)


@wrong("07.6", "turned the other way, by p - c", "from position p to place c is a turn of c - p")
def at_places(k: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    return _turned(k, positions - torch.arange(k.shape[2], device=k.device), frequencies)


@wrong("07.6", "channels 2i and 2i + 1 as a pair", "channels i and i + head_dim / 2 are a pair")
def at_places(k: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    by = torch.arange(k.shape[2], device=k.device) - positions
    angles = by[..., None] * frequencies
    a, b = k.float()[..., 0::2], k.float()[..., 1::2]
    out = torch.stack((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1)
    return out.flatten(-2).to(k.dtype)


@wrong("07.6", "the first KV head's positions for all", "each KV head holds tokens of its own")
def at_places(k: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    return _turned(k, torch.arange(k.shape[2], device=k.device) - positions[:, :1], frequencies)


@wrong("07.6", "the first row's positions for all", "each row holds tokens of its own")
def at_places(k: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    return _turned(k, torch.arange(k.shape[2], device=k.device) - positions[0], frequencies)


@wrong("07.6", "places start at 1", "places are 0, 1, 2, ...")
def at_places(k: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    return _turned(k, torch.arange(1, k.shape[2] + 1, device=k.device) - positions, frequencies)


@wrong("07.6", "turned by the place, on top of the position", "keys are turned already: by place less position")
def at_places(k: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    return _turned(k, torch.arange(k.shape[2], device=k.device).expand_as(positions), frequencies)


@wrong("07.6", "shifted so that the first is at 0; gaps stay", "places follow one another, without gaps")
def at_places(k: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    return _turned(k, -positions[..., :1].expand_as(positions), frequencies)


@wrong("07.6", "angles in the keys' dtype", "angles in float32: in half precision a far position loses its angle")
def at_places(k: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    by = torch.arange(k.shape[2], device=k.device) - positions
    angles = by[..., None].to(k.dtype) * frequencies.to(k.dtype)
    a, b = k.chunk(2, dim=-1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1)


@wrong("07.6", "the caller's keys are turned in place", "k must stay as it was")
def at_places(k: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    return k.copy_(_turned(k, torch.arange(k.shape[2], device=k.device) - positions, frequencies))


@wrong("07.6", "the second half is made from a first half already turned", "b cos + a sin with the a of before")
def at_places(k: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    angles = (torch.arange(k.shape[2], device=k.device) - positions)[..., None] * frequencies
    out = k.clone()
    a, b = out.chunk(2, dim=-1)
    a.copy_(a * angles.cos() - b * angles.sin())
    b.copy_(b * angles.cos() + a * angles.sin())
    return out


@wrong("07.6", "frequencies of base 10,000, those given ignored", "the model's frequencies, as given")
def at_places(k: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    half = k.shape[-1] // 2
    usual = 10_000.0 ** (-torch.arange(half, device=k.device) / half)
    return _turned(k, torch.arange(k.shape[2], device=k.device) - positions, usual)


@right("07.6", "complex numbers in float64")
def at_places(k: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    half = k.shape[-1] // 2
    by = (torch.arange(k.shape[2], device=k.device) - positions).double()
    turn = torch.exp(1j * by.unsqueeze(-1) * frequencies.double())
    z = torch.complex(k[..., :half].double(), k[..., half:].double()) * turn
    return torch.cat((z.real, z.imag), dim=-1).to(k.dtype)


@right("07.6", "rotate half, cos and sin twice as wide")
def at_places(k: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    places = torch.ones_like(positions).cumsum(dim=-1) - 1
    angles = torch.einsum("bht,f->bhtf", (places - positions).to(torch.float32), frequencies.to(torch.float32))
    angles = torch.cat((angles, angles), dim=-1)
    wide = k.to(torch.float32)
    a, b = wide.tensor_split(2, dim=-1)
    return (wide * angles.cos() + torch.cat((-b, a), dim=-1) * angles.sin()).type_as(k)


@right("07.6", "a 2 by 2 matrix for each channel pair, token by token")
def at_places(k: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    out = torch.empty_like(k)
    for place in range(k.shape[2]):
        angle = (place - positions[:, :, place, None]) * frequencies.double()
        cos, sin = torch.cos(angle), torch.sin(angle)
        matrix = torch.stack((torch.stack((cos, -sin), dim=-1), torch.stack((sin, cos), dim=-1)), dim=-2)
        pairs = k[:, :, place].double().unflatten(-1, (2, -1))
        out[:, :, place] = torch.einsum("bhfij,bhjf->bhif", matrix, pairs).flatten(2).to(k.dtype)
    return out


# 07.7 · LastLook


@wrong("07.7", "each KV head goes by its own query heads", "the same in every KV head: the mean over all query heads")
class LastLook(Policy):
    def watch(self, seen: Seen) -> Notes:
        return Notes(seen.weights(1)[:, :, 0].unflatten(1, (seen.k.shape[1], -1)).mean(dim=2))

    def score(self, held: Held) -> Tensor:
        return held.tally


@wrong("07.7", "adds to what was noted before", "the newest query alone: earlier notes do not count")
class LastLook(Policy):
    lasting = True

    def watch(self, seen: Seen) -> Notes:
        mean = seen.weights(1).mean(dim=1).expand(-1, seen.k.shape[1], -1)
        return Notes(seen.tally + mean)

    def score(self, held: Held) -> Tensor:
        return held.tally


@wrong("07.7", "the highest of the query heads' weights", "the mean over all query heads")
class LastLook(Policy):
    def watch(self, seen: Seen) -> Notes:
        most = seen.weights(1)[:, :, 0].amax(dim=1, keepdim=True)
        return Notes(most.expand(-1, seen.k.shape[1], -1))

    def score(self, held: Held) -> Tensor:
        return held.tally


@wrong("07.7", "the first of the step's queries", "the newest query, the last of the step")
class LastLook(Policy):
    def watch(self, seen: Seen) -> Notes:
        mean = seen.weights(seen.q.shape[2])[:, :, 0].mean(dim=1, keepdim=True)
        return Notes(mean.expand(-1, seen.k.shape[1], -1))

    def score(self, held: Held) -> Tensor:
        return held.tally


@wrong("07.7", "the mean of all the step's queries", "the newest query alone")
class LastLook(Policy):
    def watch(self, seen: Seen) -> Notes:
        new_tokens = seen.q.shape[2]
        mean = seen.received().mean(dim=1, keepdim=True) / new_tokens
        return Notes(mean.expand(-1, seen.k.shape[1], -1))

    def score(self, held: Held) -> Tensor:
        return held.tally


@wrong("07.7", "what was seen is kept on the class, shared by all layers", "a policy has no state: notes hold it")
class LastLook(Policy):
    looks: list = []  # noqa: RUF012

    def watch(self, seen: Seen) -> Notes:
        mean = seen.weights(1)[:, :, 0].mean(dim=1, keepdim=True).expand(-1, seen.k.shape[1], -1)
        self.looks[:] = [mean]
        return Notes(mean)

    def score(self, held: Held) -> Tensor:
        return self.looks[-1]


@wrong("07.7", "one number for all rows", "each row has weights of its own")
class LastLook(Policy):
    def watch(self, seen: Seen) -> Notes:
        mean = seen.weights(1)[:, :, 0].mean(dim=(0, 1))
        return Notes(mean.expand(seen.k.shape[:3]).contiguous())

    def score(self, held: Held) -> Tensor:
        return held.tally


@wrong("07.7", "keeps what the query looks at least", "the highest scores are kept: the weight itself")
class LastLook(Policy):
    def watch(self, seen: Seen) -> Notes:
        mean = seen.weights(1)[:, :, 0].mean(dim=1, keepdim=True)
        return Notes(mean.expand(-1, seen.k.shape[1], -1))

    def score(self, held: Held) -> Tensor:
        return -held.tally


@wrong("07.7", "the sum over the query heads", "the mean over all query heads")
class LastLook(Policy):
    def watch(self, seen: Seen) -> Notes:
        whole = seen.weights(1)[:, :, 0].sum(dim=1, keepdim=True)
        return Notes(whole.expand(-1, seen.k.shape[1], -1))

    def score(self, held: Held) -> Tensor:
        return held.tally


@wrong("07.7", "the first query head of each KV head", "all query heads, by their mean")
class LastLook(Policy):
    def watch(self, seen: Seen) -> Notes:
        num_kv_heads = seen.k.shape[1]
        group = seen.q.shape[1] // num_kv_heads
        mean = seen.weights(1)[:, ::group, 0].mean(dim=1, keepdim=True)
        return Notes(mean.expand(-1, num_kv_heads, -1))

    def score(self, held: Held) -> Tensor:
        return held.tally


@wrong("07.7", "noted once for all KV heads, [batch, 1, tokens]", "Notes: [batch, num_kv_heads, tokens]")
class LastLook(Policy):
    def watch(self, seen: Seen) -> Notes:
        return Notes(seen.weights(1)[:, :, 0].mean(dim=1, keepdim=True))

    def score(self, held: Held) -> Tensor:
        return held.tally


@right("07.7", "einsum, and a lambda as score")
class LastLook(Policy):
    def watch(self, seen: Seen) -> Notes:
        weights = seen.weights(1).squeeze(2)
        ones = torch.full((weights.shape[1], seen.k.shape[1]), 1 / weights.shape[1], device=weights.device)
        return Notes(torch.einsum("bht,hg->bgt", weights, ones))

    score = lambda self, held: held.tally  # noqa: E731


@right("07.7", "a loop over query heads, repeated for the KV heads, noted by name")
class LastLook(Policy):
    def watch(self, seen: Seen) -> Notes:
        batch, num_heads, _, tokens = seen.q.shape[:3] + seen.k.shape[2:3]
        newest = seen.weights(newest=1)
        total = torch.zeros(batch, tokens, device=newest.device)
        for head in range(num_heads):
            total += newest[:, head, -1, :]
        return Notes(tokens=(total / num_heads).unsqueeze(1).repeat(1, seen.k.shape[1], 1))

    def score(self, held: Held) -> Tensor:
        return held.notes.tokens


@right("07.7", "by way of each KV head's received(1), then their mean")
class LastLook(Policy):
    def watch(self, seen: Seen) -> Notes:
        by_head = seen.received(1)
        return Notes(torch.stack([by_head.mean(dim=1)] * by_head.shape[1], dim=1))

    def score(self, held: Held) -> Tensor:
        return held.tally.clone()


# 07.d1 · append_bounded


@wrong("07.d1", "as reported", "positions and seq_len go by what was seen, not by what is held")
def append_bounded(cache: Bounded, k: Tensor, v: Tensor) -> None:
    first = cache.k.shape[1]
    cache.k = torch.cat((cache.k, k), dim=1)
    cache.v = torch.cat((cache.v, v), dim=1)
    cache.positions = torch.cat((cache.positions, torch.arange(first, first + k.shape[1])))
    recent = cache.k.shape[1] - (cache.budget - cache.sinks)
    kept = (cache.positions < cache.sinks) | (cache.positions >= recent)
    cache.k, cache.v, cache.positions = cache.k[:, kept], cache.v[:, kept], cache.positions[kept]
    cache.seq_len = cache.k.shape[1]


@wrong("07.d1", "only seq_len is mended", "new tokens' positions follow seq_len, not the number held")
def append_bounded(cache: Bounded, k: Tensor, v: Tensor) -> None:
    first = cache.k.shape[1]
    cache.k = torch.cat((cache.k, k), dim=1)
    cache.v = torch.cat((cache.v, v), dim=1)
    cache.positions = torch.cat((cache.positions, torch.arange(first, first + k.shape[1])))
    recent = cache.k.shape[1] - (cache.budget - cache.sinks)
    kept = (cache.positions < cache.sinks) | (cache.positions >= recent)
    cache.k, cache.v, cache.positions = cache.k[:, kept], cache.v[:, kept], cache.positions[kept]
    cache.seq_len += k.shape[1]


@wrong("07.d1", "first and seq_len are mended, the window's start is not", "more than the budget is held")
def append_bounded(cache: Bounded, k: Tensor, v: Tensor) -> None:
    first = cache.seq_len
    cache.k = torch.cat((cache.k, k), dim=1)
    cache.v = torch.cat((cache.v, v), dim=1)
    cache.positions = torch.cat((cache.positions, torch.arange(first, first + k.shape[1])))
    recent = cache.k.shape[1] - (cache.budget - cache.sinks)
    kept = (cache.positions < cache.sinks) | (cache.positions >= recent)
    cache.k, cache.v, cache.positions = cache.k[:, kept], cache.v[:, kept], cache.positions[kept]
    cache.seq_len = first + k.shape[1]


@wrong("07.d1", "first and the window go by seq_len, which still ends as what is held", "seq_len counts tokens seen")
def append_bounded(cache: Bounded, k: Tensor, v: Tensor) -> None:
    first = cache.seq_len
    seen = first + k.shape[1]
    cache.k = torch.cat((cache.k, k), dim=1)
    cache.v = torch.cat((cache.v, v), dim=1)
    cache.positions = torch.cat((cache.positions, torch.arange(first, seen)))
    recent = seen - (cache.budget - cache.sinks)
    kept = (cache.positions < cache.sinks) | (cache.positions >= recent)
    cache.k, cache.v, cache.positions = cache.k[:, kept], cache.v[:, kept], cache.positions[kept]
    cache.seq_len = cache.k.shape[1]


@wrong("07.d1", "counts calls: one token a call", "several tokens may come at once")
def append_bounded(cache: Bounded, k: Tensor, v: Tensor) -> None:
    first = cache.seq_len
    cache.k = torch.cat((cache.k, k), dim=1)
    cache.v = torch.cat((cache.v, v), dim=1)
    cache.positions = torch.cat((cache.positions, torch.arange(first, first + k.shape[1])))
    cache.seq_len += 1
    recent = cache.seq_len - (cache.budget - cache.sinks)
    kept = (cache.positions < cache.sinks) | (cache.positions >= recent)
    cache.k, cache.v, cache.positions = cache.k[:, kept], cache.v[:, kept], cache.positions[kept]


@wrong("07.d1", "one token leaves a call, however many came", "after several tokens at once no more than the budget")
def append_bounded(cache: Bounded, k: Tensor, v: Tensor) -> None:
    new = torch.arange(cache.seq_len, cache.seq_len + k.shape[1])
    cache.k = torch.cat((cache.k, k), dim=1)
    cache.v = torch.cat((cache.v, v), dim=1)
    cache.positions = torch.cat((cache.positions, new))
    cache.seq_len += k.shape[1]
    if cache.k.shape[1] > cache.budget:
        kept = torch.arange(cache.k.shape[1]) != cache.sinks
        cache.k, cache.v, cache.positions = cache.k[:, kept], cache.v[:, kept], cache.positions[kept]


@wrong("07.d1", "the window is as long as the budget, sinks on top", "the budget counts the sinks")
def append_bounded(cache: Bounded, k: Tensor, v: Tensor) -> None:
    first = cache.seq_len
    cache.seq_len += k.shape[1]
    cache.k = torch.cat((cache.k, k), dim=1)
    cache.v = torch.cat((cache.v, v), dim=1)
    cache.positions = torch.cat((cache.positions, torch.arange(first, cache.seq_len)))
    kept = (cache.positions < cache.sinks) | (cache.positions >= cache.seq_len - cache.budget)
    cache.k, cache.v, cache.positions = cache.k[:, kept], cache.v[:, kept], cache.positions[kept]


@wrong("07.d1", "sinks by slice without a look at the length: doubled while there is room", "each token once")
def append_bounded(cache: Bounded, k: Tensor, v: Tensor) -> None:
    new = torch.arange(cache.seq_len, cache.seq_len + k.shape[1])
    recent = cache.budget - cache.sinks
    for name, some, dim in (("k", k, 1), ("v", v, 1), ("positions", new, 0)):
        whole = torch.cat((getattr(cache, name), some), dim=dim)
        first, last = whole.narrow(dim, 0, min(cache.sinks, whole.shape[dim])), min(recent, whole.shape[dim])
        setattr(cache, name, torch.cat((first, whole.narrow(dim, whole.shape[dim] - last, last)), dim=dim))
    cache.seq_len += k.shape[1]


@wrong("07.d1", "the right tokens, but numbered anew from 0", "positions are those of the text, with a gap")
def append_bounded(cache: Bounded, k: Tensor, v: Tensor) -> None:
    whole_k, whole_v = torch.cat((cache.k, k), dim=1), torch.cat((cache.v, v), dim=1)
    surplus = max(0, whole_k.shape[1] - cache.budget)
    places = torch.tensor([p for p in range(whole_k.shape[1]) if not cache.sinks <= p < cache.sinks + surplus])
    cache.k, cache.v = whole_k[:, places.long()], whole_v[:, places.long()]
    cache.positions = torch.arange(cache.k.shape[1])
    cache.seq_len += k.shape[1]


@wrong("07.d1", "makes room before the new tokens come, for one only", "no more than the budget after each call")
def append_bounded(cache: Bounded, k: Tensor, v: Tensor) -> None:
    recent = cache.seq_len + 1 - (cache.budget - cache.sinks)
    kept = (cache.positions < cache.sinks) | (cache.positions >= recent)
    cache.k = torch.cat((cache.k[:, kept], k), dim=1)
    cache.v = torch.cat((cache.v[:, kept], v), dim=1)
    new = torch.arange(cache.seq_len, cache.seq_len + k.shape[1])
    cache.positions = torch.cat((cache.positions[kept], new))
    cache.seq_len += k.shape[1]


@right("07.d1", "slices around what leaves")
def append_bounded(cache: Bounded, k: Tensor, v: Tensor) -> None:
    new_tokens = k.shape[1]
    new = torch.arange(new_tokens, device=cache.positions.device) + cache.seq_len
    surplus = max(0, cache.k.shape[1] + new_tokens - cache.budget)
    sinks = cache.sinks

    def joined(old: Tensor, some: Tensor, dim: int) -> Tensor:
        whole = torch.cat((old, some), dim=dim).movedim(dim, 0)
        return torch.cat((whole[:sinks], whole[sinks + surplus :])).movedim(0, dim).contiguous()

    cache.k, cache.v = joined(cache.k, k, 1), joined(cache.v, v, 1)
    cache.positions = joined(cache.positions, new, 0)
    cache.seq_len += new_tokens


@right("07.d1", "token by token, the oldest but the sinks leaves when there is no room")
def append_bounded(cache: Bounded, k: Tensor, v: Tensor) -> None:
    for token in range(k.shape[1]):
        keep = list(range(cache.positions.numel()))
        if len(keep) == cache.budget:
            del keep[cache.sinks]
        places = torch.tensor(keep, dtype=torch.int64, device=cache.k.device)
        cache.k = torch.cat((cache.k.index_select(1, places), k[:, token : token + 1]), dim=1)
        cache.v = torch.cat((cache.v.index_select(1, places), v[:, token : token + 1]), dim=1)
        own = cache.positions.new_tensor([cache.seq_len])
        cache.positions = torch.cat((cache.positions[places], own))
        cache.seq_len += 1


@right("07.d1", "the positions first, by the newest one, and what belongs to them after")
def append_bounded(cache: Bounded, k: Tensor, v: Tensor) -> None:
    seen = cache.seq_len + k.shape[1]
    cache.seq_len = seen
    positions = torch.cat((cache.positions, torch.arange(seen - k.shape[1], seen, dtype=torch.int64)))
    age = seen - 1 - positions
    leaves = (positions >= cache.sinks) & (age >= cache.budget - cache.sinks)
    stays = (~leaves).nonzero().flatten()
    cache.positions = positions.take(stays)
    cache.k = torch.cat((cache.k, k), dim=-2)[..., stays, :]
    cache.v = torch.cat((cache.v, v), dim=-2)[..., stays, :]


# 07.d2 · ring_slot


@wrong("07.d2", "as reported", "the first slot after the sinks comes first; the sink is overwritten")
def ring_slot(position: int, budget: int, sinks: int) -> int:
    if position <= budget - 1:
        return position
    return sinks + (position - budget) % (budget - sinks) - 1


@wrong("07.d2", "the 1 goes, but the ring is as long as the budget", "a ring of budget - sinks slots")
def ring_slot(position: int, budget: int, sinks: int) -> int:
    if position <= budget - 1:
        return position
    return sinks + (position - budget) % budget


@wrong("07.d2", "the sink is spared, the slots stay one off", "the oldest token's slot, each in its turn")
def ring_slot(position: int, budget: int, sinks: int) -> int:
    if position <= budget - 1:
        return position
    return max(sinks, sinks + (position - budget) % (budget - sinks) - 1)


@wrong("07.d2", "the 1 inside the modulo: starts at the last slot", "position `budget` takes the slot of token `sinks`")
def ring_slot(position: int, budget: int, sinks: int) -> int:
    if position <= budget - 1:
        return position
    return sinks + (position - budget - 1) % (budget - sinks)


@wrong("07.d2", "position modulo budget, sinks skipped to the next slot", "each of the other slots in its turn")
def ring_slot(position: int, budget: int, sinks: int) -> int:
    return position if position < sinks else max(sinks, position % budget)


@wrong("07.d2", "right for one sink only", "any number of sinks")
def ring_slot(position: int, budget: int, sinks: int) -> int:
    if position <= budget - 1:
        return position
    return 1 + (position - budget) % (budget - 1) if budget > 1 else 0


@wrong("07.d2", "counted from position 0 instead of from the first that wraps", "position `budget` takes slot `sinks`")
def ring_slot(position: int, budget: int, sinks: int) -> int:
    if position < budget:
        return position
    return sinks + position % (budget - sinks)


@wrong("07.d2", "mended, but position `budget` counts as still fitting", "slots are 0 to budget - 1")
def ring_slot(position: int, budget: int, sinks: int) -> int:
    if position <= budget:
        return position
    return sinks + (position - budget) % (budget - sinks)


@wrong("07.d2", "the 1 goes into the ring's length", "a ring of budget - sinks slots, the last one, too")
def ring_slot(position: int, budget: int, sinks: int) -> int:
    if position <= budget - 1:
        return position
    return sinks + (position - budget) % max(1, budget - sinks - 1)


@right("07.d2", "one formula for all but the sinks")
def ring_slot(position: int, budget: int, sinks: int) -> int:
    return position if position < sinks else sinks + (position - sinks) % (budget - sinks)


@right("07.d2", "an index into the range of the free slots")
def ring_slot(position: int, budget: int, sinks: int) -> int:
    free = range(sinks, budget)
    return range(budget)[position] if position < budget else free[(position - budget) % len(free)]


@right("07.d2", "whole rounds are taken back")
def ring_slot(position: int, budget: int, sinks: int) -> int:
    ring = budget - sinks
    rounds = max(0, -(-(position - budget + 1) // ring))
    return position - rounds * ring


@right("07.d2", "divmod, negative numbers and all")
def ring_slot(position: int, budget: int, sinks: int) -> int:
    _, back = divmod(budget - 1 - position, budget - sinks)
    return position if position < budget else budget - 1 - back
