"""Answers that lab 07's checks had not seen when they met: their author knew the notebook, not the checks."""

# ruff: noqa: F405, F811, RUF059 - written as learners write

from __future__ import annotations

import math
from itertools import chain as joined
from itertools import cycle, islice

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.labs.lab07 import references
from labkit.labs.lab07.references import *  # noqa: F403
from tests.labs.noting import noting

WRONG, RIGHT, wrong, right = noting(references)


# 07.1
@wrong(
    "07.1",
    "plays a ring through and returns its slots' order, not ascending",
    "the positions are not in ascending order",
)
def window_positions(seq_len: int, budget: int, sinks: int) -> list[int]:
    slots: list[int] = []
    turn = sinks
    for position in range(seq_len):
        if len(slots) < budget:
            slots.append(position)
        else:
            slots[turn] = position
            turn = turn + 1 if turn + 1 < budget else sinks
    return slots


@wrong(
    "07.1",
    "takes seq_len for the newest token's position",
    "position seq_len has not come yet; the newest is seq_len - 1",
)
def window_positions(seq_len: int, budget: int, sinks: int) -> list[int]:
    if seq_len <= budget:
        return list(range(seq_len))
    newest = budget - sinks
    return [*range(sinks), *range(seq_len - newest + 1, seq_len + 1)]


@wrong("07.1", "returns a tensor", "a tensor came back where a list of int is wanted")
def window_positions(seq_len: int, budget: int, sinks: int) -> list[int]:
    every = torch.arange(seq_len)
    if seq_len <= budget:
        return every
    return torch.cat((every[:sinks], every[seq_len - (budget - sinks) :]))


@right("07.1", "one comprehension, no branch")
def window_positions(seq_len: int, budget: int, sinks: int) -> list[int]:
    return [place for place in range(seq_len) if place < sinks or seq_len - place <= budget - sinks]


# 07.2
@wrong(
    "07.2",
    "returns the places of the kept in place of their positions",
    "places in the tensor came back, not the positions there",
)
def keep_best(k: Tensor, v: Tensor, positions: Tensor, scores: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    if k.shape[2] <= budget:
        return k.clone(), v.clone(), positions.clone()
    kept = scores.topk(budget, dim=-1).indices.sort(dim=-1).values
    index = kept.unsqueeze(-1).expand(-1, -1, -1, k.shape[-1])
    return k.gather(2, index), v.gather(2, index), kept


@wrong(
    "07.2",
    "a threshold at the budget-th score: with ties more than the budget stay",
    "with equal scores more than budget tokens pass the threshold",
)
def keep_best(k: Tensor, v: Tensor, positions: Tensor, scores: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, tokens, head_dim = k.shape
    if tokens <= budget:
        return k.clone(), v.clone(), positions.clone()
    least = scores.sort(dim=-1, descending=True).values[..., budget - 1 : budget]
    mask = scores >= least
    return (
        k[mask].view(batch, heads, -1, head_dim), v[mask].view(batch, heads, -1, head_dim),
        positions[mask].view(batch, heads, -1),
    )  # fmt: skip


@wrong("07.2", "goes through the heads, but by the first row's scores for all rows", "all rows keep what row 0 keeps")
def keep_best(k: Tensor, v: Tensor, positions: Tensor, scores: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    budget = min(budget, k.shape[2])
    ks, vs, ps = [], [], []
    for head in range(k.shape[1]):
        kept, _ = scores[0, head].topk(budget).indices.sort()
        ks.append(k[:, head, kept])
        vs.append(v[:, head, kept])
        ps.append(positions[:, head, kept])
    return torch.stack(ks, dim=1), torch.stack(vs, dim=1), torch.stack(ps, dim=1)


@right("07.2", "nested loops over rows and heads, Python's sorted on the scores")
def keep_best(k: Tensor, v: Tensor, positions: Tensor, scores: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, tokens, head_dim = k.shape
    count = min(budget, tokens)
    new_k, new_v = k.new_empty(batch, heads, count, head_dim), v.new_empty(batch, heads, count, v.shape[-1])
    new_positions = positions.new_empty(batch, heads, count)
    for row in range(batch):
        for head in range(heads):
            worth = scores[row, head].tolist()
            best = sorted(sorted(range(tokens), key=worth.__getitem__, reverse=True)[:count])
            for place, old in enumerate(best):
                new_k[row, head, place] = k[row, head, old]
                new_v[row, head, place] = v[row, head, old]
                new_positions[row, head, place] = positions[row, head, old]
    return new_k, new_v, new_positions


# 07.3
@wrong(
    "07.3",
    "only whole blocks of queries: what is left over is never counted",
    "the queries behind the last whole block are left out",
)
def attention_received(q: Tensor, k: Tensor, block: int) -> Tensor:
    batch, num_heads, n, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1:3]
    keys = k.float().repeat_interleave(num_heads // num_kv_heads, dim=1)
    total = torch.zeros(batch, num_heads, kv_len, device=q.device)
    at = torch.arange(kv_len, device=q.device)
    block = min(block, n)
    for i in range(n // block):
        part = q[:, :, i * block : (i + 1) * block].float()
        scores = part @ keys.mT / math.sqrt(head_dim)
        own = kv_len - n + i * block + torch.arange(block, device=q.device)
        scores = scores.masked_fill(at > own[:, None], -math.inf)
        total += scores.softmax(dim=-1).sum(dim=2)
    return total.unflatten(1, (num_kv_heads, -1)).mean(dim=2)


@wrong(
    "07.3",
    "weights and sums in q's dtype, float32 only at the very end",
    "sums were made in float16: they lose what is small beside them",
)
def attention_received(q: Tensor, k: Tensor, block: int) -> Tensor:
    batch, num_heads, new_tokens, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    group = num_heads // num_kv_heads
    received = q.new_zeros(batch, num_heads, kv_len)
    keys = k.repeat_interleave(group, dim=1).mT
    for start in range(0, new_tokens, block):
        piece = q[:, :, start : start + block]
        first = kv_len - new_tokens + start
        hidden = torch.ones(piece.shape[2], kv_len, dtype=torch.bool, device=q.device).triu(first + 1)
        weights = (piece @ keys / head_dim**0.5).masked_fill(hidden, float("-inf")).softmax(-1)
        for query in range(weights.shape[2]):
            received += weights[:, :, query]
    return received.view(batch, num_kv_heads, group, kv_len).mean(dim=2).float()


@wrong(
    "07.3",
    "heads are grouped in turns: query head h is joined to KV head h % num_kv_heads",
    "query heads h, h + num_kv_heads, ... are joined, not neighbours",
)
def attention_received(q: Tensor, k: Tensor, block: int) -> Tensor:
    batch, num_heads, n, d = q.shape
    num_kv_heads, kv_len = k.shape[1:3]
    grouped = q.float().reshape(batch, num_heads // num_kv_heads, num_kv_heads, n, d)
    keys = k.float()[:, None]
    columns = torch.arange(kv_len, device=q.device)
    out = torch.zeros(batch, num_kv_heads, kv_len, device=q.device)
    for start in range(0, n, block):
        part = grouped[..., start : start + block, :]
        rows = columns[kv_len - n + start :][: part.shape[-2], None]
        scores = (part @ keys.mT) * d**-0.5
        weights = torch.where(columns <= rows, scores, -math.inf).softmax(dim=-1)
        out += weights.sum(dim=-2).mean(dim=1)
    return out


@right("07.3", "one query at a time, cut to the keys it sees")
def attention_received(q: Tensor, k: Tensor, block: int) -> Tensor:
    batch, num_heads, new_tokens, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    group = num_heads // num_kv_heads
    keys = k.float()
    total = torch.zeros(batch, num_kv_heads, kv_len, dtype=torch.float32, device=q.device)
    for i in range(new_tokens):
        seen = kv_len - new_tokens + i + 1
        query = q[:, :, i].float().reshape(batch, num_kv_heads, group, head_dim)
        scores = torch.einsum("bhgd,bhtd->bhgt", query, keys[:, :, :seen]) / math.sqrt(head_dim)
        total[:, :, :seen] += scores.softmax(dim=-1).mean(dim=2)
    return total


@right("07.3", "KV head by KV head, exp(scores - logsumexp), in chunks from split")
def attention_received(q: Tensor, k: Tensor, block: int) -> Tensor:
    n, kv_len = q.shape[2], k.shape[2]
    columns = []
    for heads, key in zip(q.chunk(k.shape[1], dim=1), k.unbind(dim=1), strict=True):
        key = key.float().unsqueeze(1)  # [batch, 1, kv_len, head_dim]
        received = 0
        own = kv_len - n
        for piece in heads.split(block, dim=2):
            scores = torch.matmul(piece.float(), key.mT).div_(q.shape[-1] ** 0.5)
            later = (
                torch.arange(kv_len, device=q.device)
                > torch.arange(own, own + piece.shape[2], device=q.device)[:, None]
            )
            scores.masked_fill_(later, -torch.inf)
            scores.sub_(scores.logsumexp(dim=-1, keepdim=True)).exp_()
            received = received + scores.sum(dim=2).mean(dim=1)
            own += piece.shape[2]
        columns.append(received)
    return torch.stack(columns, dim=1)


# 07.4
@wrong(
    "07.4",
    "one newest position for the whole batch: rows that have come less far keep too few",
    "the newest token of another row is taken for this row's",
)
def protected(scores: Tensor, positions: Tensor, sinks: int, recent: int) -> Tensor:
    newest = int(positions.max())
    keep = (positions < sinks) | (positions > newest - recent)
    return scores.masked_fill(keep, float("inf"))


@wrong(
    "07.4",
    "the `recent` greatest positions held, in place of the text's newest `recent` as far as held",
    "tokens older than the text's newest `recent` are kept, since newer ones are gone",
)
def protected(scores: Tensor, positions: Tensor, sinks: int, recent: int) -> Tensor:
    out = scores.clone()
    newest = positions.topk(min(recent, positions.shape[-1]), dim=-1).indices
    out.scatter_(-1, newest, math.inf)
    out[positions < sinks] = math.inf
    return out


@wrong(
    "07.4",
    "adds mask times infinity: 0 * inf is NaN for all that is not kept",
    "tokens that are not kept have NaN for a score",
)
def protected(scores: Tensor, positions: Tensor, sinks: int, recent: int) -> Tensor:
    newest = positions.amax(dim=-1, keepdim=True)
    keep = torch.logical_or(positions < sinks, positions + recent > newest)
    return scores + keep.to(scores.dtype) * float("inf")


@right("07.4", "index_put of the kept places into a clone")
def protected(scores: Tensor, positions: Tensor, sinks: int, recent: int) -> Tensor:
    age = positions.max(dim=-1, keepdim=True).values - positions  # 0 for the newest
    kept = ~((age >= recent) & (positions >= sinks))
    return scores.clone().index_put_(kept.nonzero(as_tuple=True), scores.new_tensor(math.inf))


# 07.5
@wrong(
    "07.5",
    "the average leaves out places beyond the ends (count_include_pad=False)",
    "at the ends the mean is over fewer places; those beyond count as 0",
)
def snapkv_scores(q: Tensor, k: Tensor, window: int, pool: int) -> Tensor:
    tokens = k.shape[2]
    received = attention_received(q[:, :, tokens - window :], k, window) / window
    before = received[..., : tokens - window]
    smooth = F.avg_pool1d(before, pool, stride=1, padding=pool // 2, count_include_pad=False)
    return torch.cat((smooth, torch.full_like(received[..., tokens - window :], math.inf)), dim=-1)


@wrong(
    "07.5",
    "softmax over the tokens before the window only",
    "the weights are those of attention to the prefix alone, not to all tokens",
)
def snapkv_scores(q: Tensor, k: Tensor, window: int, pool: int) -> Tensor:
    batch, num_heads, tokens, head_dim = q.shape
    num_kv_heads = k.shape[1]
    asking = q[:, :, -window:].float()
    prefix = k[:, :, :-window].float().repeat_interleave(num_heads // num_kv_heads, dim=1)
    weights = (asking @ prefix.mT / math.sqrt(head_dim)).softmax(dim=-1)
    votes = weights.mean(dim=2).view(batch, num_kv_heads, -1, tokens - window).mean(dim=2)
    votes = F.avg_pool1d(votes, pool, stride=1, padding=pool // 2)
    return F.pad(votes, (0, window), value=float("inf"))


@wrong(
    "07.5",
    "no causal mask inside the window: its queries see later keys",
    "queries of the window see keys behind themselves",
)
def snapkv_scores(q: Tensor, k: Tensor, window: int, pool: int) -> Tensor:
    batch, num_heads, tokens, head_dim = q.shape
    grouped = q[:, :, tokens - window :].float().reshape(batch, k.shape[1], -1, window, head_dim)
    scores = torch.einsum("bkgwd,bktd->bkgwt", grouped, k.float()) / head_dim**0.5
    mean = scores.softmax(dim=-1).mean(dim=(2, 3))[..., : tokens - window]
    padded = F.pad(mean, (pool // 2, pool // 2))
    smooth = sum(padded[..., i : i + tokens - window] for i in range(pool)) / pool
    tail = smooth.new_full((batch, k.shape[1], window), float("inf"))
    return torch.cat((smooth, tail), dim=-1)


@right("07.5", "einsum for the weights, unfold for the mean over places")
def snapkv_scores(q: Tensor, k: Tensor, window: int, pool: int) -> Tensor:
    batch, num_heads, tokens, head_dim = q.shape
    num_kv_heads, before = k.shape[1], tokens - window
    last = q[:, :, before:].float().unflatten(1, (num_kv_heads, num_heads // num_kv_heads))
    scores = torch.einsum("bhgwd,bhtd->bhgwt", last * head_dim**-0.5, k.float())
    place = torch.arange(tokens, device=q.device)
    scores = scores.where(place <= place[before:, None], -math.inf)
    votes = scores.softmax(dim=-1)[..., :before].mean(dim=(2, 3))
    side = pool // 2
    out = torch.full((batch, num_kv_heads, tokens), math.inf, dtype=torch.float32, device=q.device)
    out[..., :before] = F.pad(votes, (side, side)).unfold(-1, pool, 1).mean(dim=-1)
    return out


# 07.6
@wrong(
    "07.6",
    "angles computed in k's dtype: in float16 a turn of thousands of positions is off by radians",
    "angles are too coarse in float16",
)
def at_places(k: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    places = torch.arange(k.shape[2], device=k.device)
    turn = (places - positions).to(k.dtype)
    angles = turn[..., None] * frequencies.to(k.dtype)
    cos, sin = angles.cos(), angles.sin()
    a, b = k.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@wrong(
    "07.6",
    "moves all keys by the first position held: gaps between tokens stay",
    "only the gap before the first token is closed",
)
def at_places(k: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    half = k.shape[-1] // 2
    shift = positions[..., :1].expand_as(positions)
    angles = -shift.unsqueeze(-1).float() * frequencies
    a, b = k[..., :half].float(), k[..., half:].float()
    turned_a = a * torch.cos(angles) - b * torch.sin(angles)
    turned_b = b * torch.cos(angles) + a * torch.sin(angles)
    return torch.cat((turned_a, turned_b), dim=-1).to(k.dtype)


@wrong("07.6", "the first head's positions for all heads", "all heads are turned by KV head 0's positions")
def at_places(k: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    held = positions[0, 0]
    turn = torch.arange(held.numel(), device=k.device) - held
    angles = torch.outer(turn.float(), frequencies.float())  # [tokens, head_dim / 2]
    a, b = k.float().tensor_split(2, dim=-1)
    c, s = angles.cos(), angles.sin()
    return torch.cat((a * c - b * s, a * s + b * c), dim=-1).to(k.dtype)


@right("07.6", "channel pairs as complex numbers")
def at_places(k: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    real, imaginary = k.double().chunk(2, dim=-1)
    turn = torch.arange(k.shape[2], device=k.device).expand_as(positions) - positions
    angle = turn.double().unsqueeze(-1) * frequencies.double()
    moved = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((moved.real, moved.imag), dim=-1).to(k.dtype)


@right("07.6", "turned back to position 0, then on to the place, by 2 x 2 matrices in einsum")
def at_places(k: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    def rotate(pairs: Tensor, n: Tensor) -> Tensor:
        angle = n.double()[..., None] * frequencies.double()
        cos, sin = angle.cos(), angle.sin()
        matrix = torch.stack((torch.stack((cos, -sin)), torch.stack((sin, cos))))  # [2, 2, ..., tokens, half]
        return torch.einsum("xybhtf,bhtyf->bhtxf", matrix, pairs)

    pairs = k.unflatten(-1, (2, -1)).double()
    places = torch.arange(k.shape[2], device=k.device).expand(positions.shape)
    return rotate(rotate(pairs, -positions), places).flatten(-2).to(k.dtype)


# 07.7
@wrong(
    "07.7",
    "the mean over the query heads of each KV head: every KV head keeps its own",
    "KV heads get scores of their own; the mean is to be over all query heads",
)
class LastLook(Policy):
    def watch(self, seen: Seen) -> Notes:
        weights = seen.weights(1)[:, :, 0]  # [batch, num_heads, tokens]
        return Notes(weights.unflatten(1, (seen.k.shape[1], -1)).mean(dim=2))

    def score(self, held: Held) -> Tensor:
        return held.tally


@wrong(
    "07.7",
    "remembers the last look in the policy itself, which all layers share",
    "score returns what another layer saw last, not what was noted for this one",
)
class LastLook(Policy):
    def watch(self, seen: Seen) -> Notes:
        mean = seen.weights(1).mean(dim=1)  # [batch, 1, tokens]
        self.last = mean.expand(-1, seen.k.shape[1], -1)
        return Notes(self.last)

    def score(self, held: Held) -> Tensor:
        return self.last


@wrong(
    "07.7",
    "takes the first num_kv_heads query heads for the KV heads",
    "the weights of a few query heads, not the mean of all",
)
class LastLook(Policy):
    def watch(self, seen: Seen) -> Notes:
        num_kv_heads = seen.k.shape[1]
        newest = seen.weights(1).squeeze(2)
        noted = newest[:, :num_kv_heads]
        return Notes(noted.contiguous())

    def score(self, held: Held) -> Tensor:
        return held.tally


@right("07.7", "einsum sum over heads, stacked for every KV head")
class LastLook(Policy):
    def watch(self, seen: Seen) -> Notes:
        weights = seen.weights(1)
        batch, num_heads, _, tokens = weights.shape
        look = torch.einsum("bhqt->bt", weights) / num_heads
        return Notes(torch.stack([look] * seen.k.shape[1], dim=1))

    def score(self, held: Held) -> Tensor:
        return held.tally


# 07.d1
@wrong(
    "07.d1",
    "the next position is read off the last one held: an empty cache has none",
    "the first append fails: nothing is held yet",
)
def append_bounded(cache: Bounded, k: Tensor, v: Tensor) -> None:
    new = cache.positions[-1] + 1 + torch.arange(k.shape[1])
    cache.k = torch.cat((cache.k, k), dim=1)
    cache.v = torch.cat((cache.v, v), dim=1)
    cache.positions = torch.cat((cache.positions, new))
    cache.seq_len += k.shape[1]
    recent = cache.seq_len - (cache.budget - cache.sinks)
    kept = (cache.positions < cache.sinks) | (cache.positions >= recent)
    cache.k, cache.v, cache.positions = cache.k[:, kept], cache.v[:, kept], cache.positions[kept]


@wrong(
    "07.d1",
    "cuts sinks and newest out also while all fit: tokens are there twice",
    "before the cache is full, tokens that are sinks and newest at once are held twice",
)
def append_bounded(cache: Bounded, k: Tensor, v: Tensor) -> None:
    first = cache.seq_len
    keys, values = torch.cat((cache.k, k), dim=1), torch.cat((cache.v, v), dim=1)
    positions = torch.cat((cache.positions, torch.arange(first, first + k.shape[1])))
    newest = cache.budget - cache.sinks
    cache.k = torch.cat((keys[:, : cache.sinks], keys[:, -newest:]), dim=1)
    cache.v = torch.cat((values[:, : cache.sinks], values[:, -newest:]), dim=1)
    cache.positions = torch.cat((positions[: cache.sinks], positions[-newest:]))
    cache.seq_len = first + k.shape[1]


@wrong(
    "07.d1",
    "one token leaves at each append, however many come",
    "after a piece of several tokens more than budget are held",
)
def append_bounded(cache: Bounded, k: Tensor, v: Tensor) -> None:
    new = k.shape[1]
    cache.k = torch.cat((cache.k, k), dim=1)
    cache.v = torch.cat((cache.v, v), dim=1)
    cache.positions = torch.cat((cache.positions, torch.arange(cache.seq_len, cache.seq_len + new)))
    cache.seq_len += new
    if cache.positions.numel() > cache.budget:
        oldest = cache.sinks  # the first that is no sink
        stay = torch.arange(cache.positions.numel()) != oldest
        cache.k, cache.v, cache.positions = cache.k[:, stay], cache.v[:, stay], cache.positions[stay]


@right("07.d1", "a list of the places that stay, and index_select")
def append_bounded(cache: Bounded, k: Tensor, v: Tensor) -> None:
    end = cache.seq_len + k.shape[1]
    everywhere = cache.positions.tolist() + list(range(cache.seq_len, end))
    window = range(end - cache.budget + cache.sinks, end)
    stay = torch.tensor([i for i, p in enumerate(everywhere) if p < cache.sinks or p in window], dtype=torch.int64)
    cache.k, cache.v = (
        torch.cat(pair, dim=1).index_select(1, stay.to(k.device)) for pair in ((cache.k, k), (cache.v, v))
    )
    cache.positions = cache.positions.new_tensor(everywhere).index_select(0, stay)
    cache.seq_len = end


# 07.d2
@wrong(
    "07.d2",
    "mends the symptom: never below sinks, still one behind",
    "one slot is written twice in a row; the newest token is overwritten",
)
def ring_slot(position: int, budget: int, sinks: int) -> int:
    if position <= budget - 1:
        return position
    return max(sinks, sinks + (position - budget) % (budget - sinks) - 1)


@wrong(
    "07.d2",
    "counts the turn from the text's beginning, not from the full cache",
    "the first token to replace another does not take the oldest's slot",
)
def ring_slot(position: int, budget: int, sinks: int) -> int:
    if position < budget:
        return position
    ring = budget - sinks
    return sinks + position % ring


@wrong(
    "07.d2",
    "goes round the whole ring and steps over the sinks: slots behind them are written twice a round",
    "after a round, slots behind the sinks are overwritten too early",
)
def ring_slot(position: int, budget: int, sinks: int) -> int:
    slot = position % budget
    if position >= budget and slot < sinks:
        slot += sinks
    return slot


@right("07.d2", "the slots as an endless chain, the position's picked out of it")
def ring_slot(position: int, budget: int, sinks: int) -> int:
    return next(islice(joined(range(budget), cycle(range(sinks, budget))), position, None))


@right("07.d2", "one turn of the ring back at a time, by recursion")
def ring_slot(position: int, budget: int, sinks: int) -> int:
    def back(position: int) -> int:
        if position < budget:
            return position
        turns = max(1, (position - budget) // (budget - sinks))
        return back(position - turns * (budget - sinks))

    return back(position)
