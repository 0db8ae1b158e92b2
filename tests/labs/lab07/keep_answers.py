"""Wrong answers to 07.2 and 07.4, and other right ones."""

from __future__ import annotations

import heapq

import torch

from tests.labs.answer import Wrong

INF = float("inf")

# 07.2


def by_index(index_of, *, short=True):
    """keep_best with another choice: index_of(scores, budget) gives [batch, num_kv_heads, budget]."""

    def keep_best(k, v, positions, scores, budget):
        if short and k.shape[2] <= budget:
            return k, v, positions
        index = index_of(scores, budget)
        vectors = index[..., None].expand(-1, -1, -1, k.shape[3])
        return k.gather(2, vectors), v.gather(2, vectors), positions.gather(2, index)

    return keep_best


def best(scores, budget):
    return scores.topk(budget, dim=-1).indices.sort(dim=-1).values


def of_mean(scores, budget):
    return best(scores.mean(dim=1, keepdim=True), budget).expand(-1, scores.shape[1], -1)


def of_first_head(scores, budget):
    return best(scores[:, :1], budget).expand(-1, scores.shape[1], -1)


def of_all_rows(scores, budget):
    return best(scores.mean(dim=(0, 1), keepdim=True), budget).expand(*scores.shape[:2], -1)


def argsort_for_rank(scores, budget):
    mask = scores.argsort(dim=-1, descending=True) < budget
    return mask.nonzero()[:, 2].view(*scores.shape[:2], budget)


def keep_slice(k, v, positions, scores, budget):
    order = scores.argsort(dim=-1, descending=True)
    count = min(budget, k.shape[2])
    order = torch.cat((order[..., :count].sort(dim=-1).values, order[..., count:]), dim=-1)
    vectors = order[..., None].expand_as(k)
    return tuple(x[:, :, :count] for x in (k.gather(2, vectors), v.gather(2, vectors), positions.gather(2, order)))


def keep_by_scores_like_k(k, v, positions, scores, budget):
    return by_index(lambda s, b: best(s.type_as(k), b))(k, v, positions, scores, budget)


def keep_indices(k, v, positions, scores, budget):
    k, v, _ = by_index(best)(k, v, positions, scores, budget)
    return k, v, best(scores, min(budget, scores.shape[2])).to(positions.dtype)


def keep_positions_as_they_are(k, v, positions, scores, budget):
    k, v, _ = by_index(best)(k, v, positions, scores, budget)
    return k, v, positions[..., :budget]


def keep_k_twice(k, v, positions, scores, budget):
    k, _, positions = by_index(best)(k, v, positions, scores, budget)
    return k, k.clone(), positions


def keep_v_unsorted(k, v, positions, scores, budget):
    if k.shape[2] <= budget:
        return k, v, positions
    first, _, third = by_index(best)(k, v, positions, scores, budget)
    index = scores.topk(budget, dim=-1).indices
    return first, v.gather(2, index[..., None].expand(-1, -1, -1, v.shape[3])), third


def keep_v_of_first_head(k, v, positions, scores, budget):
    if k.shape[2] <= budget:
        return k, v, positions
    first, _, third = by_index(best)(k, v, positions, scores, budget)
    index = of_first_head(scores, budget)
    return first, v.gather(2, index[..., None].expand(-1, -1, -1, v.shape[3])), third


def keep_in_place(k, v, positions, scores, budget):
    scores[..., 0] = INF
    return by_index(best)(k, v, positions, scores, budget)


def keep_two(k, v, positions, scores, budget):
    return by_index(best)(k, v, positions, scores, budget)[:2]


def keep_by_threshold(k, v, positions, scores, budget):
    if k.shape[2] <= budget:
        return k, v, positions
    kept = scores >= scores.topk(budget, dim=-1).values[..., -1:]
    shape = (*k.shape[:2], budget)
    return k[kept].view(*shape, -1), v[kept].view(*shape, -1), positions[kept].view(shape)


def keep_scores_in_bfloat16(k, v, positions, scores, budget):
    return by_index(best)(k, v, positions, scores.bfloat16(), budget)


def keep_by_lists(k, v, positions, scores, budget):
    if k.shape[2] <= budget:
        return k, v, positions
    chosen = [
        [sorted(heapq.nlargest(budget, range(len(one)), one.__getitem__)) for one in row] for row in scores.tolist()
    ]
    return by_index(lambda *_: torch.tensor(chosen))(k, v, positions, scores, budget)


def keep_view(k, v, positions, scores, budget):
    shape = k.shape
    flat = k.view(-1, *shape[2:]), v.view(-1, *shape[2:])
    k, v = (x.view(shape) for x in flat)
    return by_index(best)(k, v, positions, scores, budget)


def keep_by_loop(k, v, positions, scores, budget):
    count = min(budget, k.shape[2])
    batch, num_kv_heads, _, head_dim = k.shape
    out = k.new_empty(batch, num_kv_heads, count, head_dim), v.new_empty(batch, num_kv_heads, count, head_dim)
    kept = positions.new_empty(batch, num_kv_heads, count)
    for row in range(batch):
        for head in range(num_kv_heads):
            index, _ = torch.sort(torch.argsort(scores[row, head])[-count:])
            out[0][row, head], out[1][row, head] = k[row, head, index], v[row, head, index]
            kept[row, head] = positions[row, head, index]
    return *out, kept


def keep_head_by_head(k, v, positions, scores, budget):
    rows = []
    for one in zip(k, v, positions, scores, strict=True):
        heads = []
        for keys, values, where, marks in zip(*one, strict=True):
            chosen = sorted(marks.topk(min(budget, len(marks))).indices.tolist())
            heads.append((keys[chosen], values[chosen], where[chosen]))
        rows.append([torch.stack(parts) for parts in zip(*heads, strict=True)])
    return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))


def keep_by_mask(k, v, positions, scores, budget):
    count = min(budget, scores.size(-1))
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(count).indices, True)
    return tuple(x[mask].unflatten(0, (*scores.shape[:2], count)) for x in (k, v, positions))


def keep_by_indexing(k, v, positions, scores, budget):
    rows, heads = torch.arange(k.shape[0])[:, None, None], torch.arange(k.shape[1])[None, :, None]
    index = scores.argsort(dim=-1, descending=True, stable=True)[..., :budget].sort().values
    return [x[rows, heads, index] for x in (k, v, positions)]


def keep_take_along(k, v, positions, scores, budget):
    index, _ = torch.topk(scores.float(), min(budget, k.shape[2])).indices.sort()
    return (torch.take_along_dim(k, index.unsqueeze(-1), dim=2), torch.take_along_dim(v, index.unsqueeze(-1), dim=2),
            torch.take_along_dim(positions, index, dim=2))  # fmt: skip


def keep_both_at_once(k, v, positions, scores, budget):
    if scores.shape[-1] <= budget:
        return k.clone(), v.clone(), positions.clone()
    index = best(scores, budget)
    both = torch.stack((k, v)).gather(3, index[None, ..., None].expand(2, -1, -1, -1, k.shape[-1]))
    return both[0], both[1], positions.gather(2, index)


def keep_by_ranks(k, v, positions, scores, budget):
    rank = scores.argsort(dim=-1, descending=True).argsort(dim=-1)
    kept = rank < budget
    shape = (*k.shape[:2], -1)
    return k[kept].reshape(*shape, k.shape[3]), v[kept].reshape(*shape, v.shape[3]), positions[kept].reshape(shape)


# 07.4


def test_of(make):
    """protected with another mask: make(positions, sinks, recent, newest, index, tokens)."""

    def protected(scores, positions, sinks, recent):
        newest = positions.amax(dim=-1, keepdim=True)
        tokens = positions.shape[-1]
        index = torch.arange(tokens).expand(positions.shape)
        return scores.masked_fill(make(positions, sinks, recent, newest, index, tokens), INF)

    return protected


def ranked(positions):
    return positions.argsort(dim=-1).argsort(dim=-1)


def protected_slices(scores, positions, sinks, recent):
    scores = scores.clone()
    scores[..., :sinks] = INF
    scores[..., -recent:] = INF
    return scores


def protected_in_place(scores, positions, sinks, recent):
    newest = positions.amax(dim=-1, keepdim=True)
    scores[(positions < sinks) | (positions > newest - recent)] = INF
    return scores


def protected_large(scores, positions, sinks, recent):
    newest = positions.amax(dim=-1, keepdim=True)
    return scores.masked_fill((positions < sinks) | (positions > newest - recent), 1e4)


def protected_largest(scores, positions, sinks, recent):
    newest = positions.amax(dim=-1, keepdim=True)
    most = torch.finfo(scores.dtype).max
    return torch.where((positions < sinks) | (positions > newest - recent), most, scores)


def protected_times(scores, positions, sinks, recent):
    newest = positions.amax(dim=-1, keepdim=True)
    always = ((positions < sinks) | (positions > newest - recent)).to(scores.dtype)
    return scores + always * INF


def protected_added(scores, positions, sinks, recent):
    newest = positions.amax(dim=-1, keepdim=True)
    always = (positions < sinks) | (positions > newest - recent)
    return scores + torch.zeros_like(scores).masked_fill(always, INF)


def protected_opposite(scores, positions, sinks, recent):
    newest = positions.amax(dim=-1, keepdim=True)
    return scores.masked_fill((positions >= sinks) & (positions <= newest - recent), INF)


def protected_mask(scores, positions, sinks, recent):
    newest = positions.amax(dim=-1, keepdim=True)
    return (positions < sinks) | (positions > newest - recent)


def protected_float32(scores, positions, sinks, recent):
    return test_of(right_test)(scores.float(), positions, sinks, recent)


def right_test(p, s, r, newest, i, t):
    return (p < s) | (p > newest - r)


def protected_by_where(scores, positions, sinks, recent):
    newest = positions.max(dim=-1, keepdim=True).values
    age = newest - positions
    return torch.where((age < recent) | (positions < sinks), torch.tensor(INF, dtype=scores.dtype), scores)


def protected_by_loop(scores, positions, sinks, recent):
    out = scores.clone()
    for row in range(len(scores)):
        for head in range(scores.shape[1]):
            newest = int(positions[row, head].max())
            for token in range(scores.shape[2]):
                position = int(positions[row, head, token])
                if position < sinks or newest - position < recent:
                    out[row, head, token] = INF
    return out


def protected_per_row(scores, positions, sinks, recent):
    newest = positions.flatten(1).amax(1).view(-1, 1, 1)
    kept = scores.clone()
    kept[torch.logical_or(torch.lt(positions, sinks), torch.ge(positions, newest + 1 - recent))] = torch.inf
    return kept


def protected_by_sum(scores, positions, sinks, recent):
    newest = positions.amax(-1, keepdim=True)
    count = (positions < sinks).int() + (positions > newest - recent).int()
    return scores.masked_fill(count > 0, float("inf"))


def protected_by_max(scores, positions, sinks, recent):
    """What is not protected stays what it is: the greater of the score and -inf."""
    newest = positions.amax(-1, keepdim=True)
    floor = torch.full_like(scores, -INF).masked_fill((positions < sinks) | (positions > newest - recent), INF)
    return torch.maximum(scores, floor)


WRONG = [
    Wrong("07.2", "order", "topk's order", by_index(lambda s, b: s.topk(b, dim=-1).indices)),
    Wrong("07.2", "order", "argsort's order, the best last", by_index(lambda s, b: s.argsort(dim=-1)[..., -b:])),
    Wrong("07.2", "lowest", "the lowest stay",
          by_index(lambda s, b: s.topk(b, dim=-1, largest=False).indices.sort(dim=-1).values)),
    Wrong("07.2", "lowest", "argsort ascending, the first of it", by_index(lambda s, b: s.argsort(dim=-1)[..., :b])),
    Wrong("07.2", "one-choice", "one choice for all heads", by_index(of_mean)),
    Wrong("07.2", "one-choice", "one choice for all rows too", by_index(of_all_rows)),
    Wrong("07.2", "first-head-for-all", "the first head's choice", by_index(of_first_head)),
    Wrong("07.2", "order-for-rank", "argsort taken for ranks", by_index(argsort_for_rank)),
    Wrong("07.2", "keeps-old-memory", "all gathered, then cut", keep_slice),
    Wrong("07.2", "budget-beyond-tokens", "topk of more than there are", by_index(best, short=False)),
    Wrong("07.2", "index-for-position", "indices for positions", keep_indices),
    Wrong("07.2", "first-tokens", "positions are cut, not gathered", keep_positions_as_they_are),
    Wrong("07.2", "k-for-v", "K gathered twice", keep_k_twice),
    Wrong("07.2", "order-apart", "V in topk's order", keep_v_unsorted),
    Wrong("07.2", "first-head-for-all", "V by the first head's index", keep_v_of_first_head),
    Wrong("07.2", "arguments-changed", "the scores are written on", keep_in_place),
    Wrong("07.2", "not-a-tuple", "positions are not returned", keep_two),
    Wrong("07.2", "equal-scores", "by a threshold", keep_by_threshold),
    Wrong("07.2", "precision", "scores compared in bfloat16", keep_scores_in_bfloat16),
    Wrong("07.2", "rounds-scores", "scores in k's dtype", keep_by_scores_like_k),
    Wrong("07.2", "left-pytorch", "sorted as lists", keep_by_lists),
    Wrong("07.2", "layout", "a view of k", keep_view),
    Wrong("07.2", "absolute", "without signs", by_index(lambda s, b: best(s.abs(), b))),
    Wrong("07.4", "by-index", "slices", protected_slices),
    Wrong("07.4", "by-index", "sinks by index", test_of(lambda p, s, r, newest, i, t: (i < s) | (p > newest - r))),
    Wrong("07.4", "newest-of-all-rows", "the batch's newest",
          test_of(lambda p, s, r, newest, i, t: (p < s) | (p > p.max() - r))),
    Wrong("07.4", "last-is-newest", "the last in the tensor",
          test_of(lambda p, s, r, newest, i, t: (p < s) | (p > p[..., -1:] - r))),
    Wrong("07.4", "held-for-seen", "tokens held for tokens seen",
          test_of(lambda p, s, r, newest, i, t: (p < s) | (p >= t - r))),
    Wrong("07.4", "recent-among-held", "the newest of those held",
          test_of(lambda p, s, r, newest, i, t: (p < s) | (ranked(p) >= t - r))),
    Wrong("07.4", "sinks-among-held", "the oldest of those held",
          test_of(lambda p, s, r, newest, i, t: (ranked(p) < s) | (p > newest - r))),
    Wrong("07.4", "both-among-held", "both by rank",
          test_of(lambda p, s, r, newest, i, t: (ranked(p) < s) | (ranked(p) >= t - r))),
    Wrong("07.4", "one-recent-more", ">= for >", test_of(lambda p, s, r, newest, i, t: (p < s) | (p >= newest - r))),
    Wrong("07.4", "one-recent-less", "one recent less",
          test_of(lambda p, s, r, newest, i, t: (p < s) | (p > newest + 1 - r))),
    Wrong("07.4", "one-sink-more", "<= for <", test_of(lambda p, s, r, newest, i, t: (p <= s) | (p > newest - r))),
    Wrong("07.4", "both-at-once", "& for |", test_of(lambda p, s, r, newest, i, t: (p < s) & (p > newest - r))),
    Wrong("07.4", "sinks-only", "no recent", test_of(lambda p, s, r, newest, i, t: p < s)),
    Wrong("07.4", "recent-only", "no sinks", test_of(lambda p, s, r, newest, i, t: p > newest - r)),
    Wrong("07.4", "arguments-changed", "in place", protected_in_place),
    Wrong("07.4", "not-infinity", "ten thousand", protected_large),
    Wrong("07.4", "not-infinity", "the largest number", protected_largest),
    Wrong("07.4", "not-a-score", "infinity times 0", protected_times),
    Wrong("07.4", "not-a-score", "infinity added to -infinity", protected_added),
    Wrong("07.4", "turned-round", "infinity for all others", protected_opposite),
    Wrong("07.4", "mask-returned", "the mask", protected_mask),
    Wrong("07.4", "dtype", "float32 comes back", protected_float32),
    Wrong("07.4", "values", "sinks count from 2", test_of(lambda p, s, r, n, i, t: ((p < s) & (p > 1)) | (p > n - r))),
]  # fmt: skip

RIGHT = [
    ("07.2", keep_by_loop),
    ("07.2", keep_head_by_head),
    ("07.2", keep_by_mask),
    ("07.2", keep_by_indexing),
    ("07.2", keep_take_along),
    ("07.2", keep_both_at_once),
    ("07.2", keep_by_ranks),
    ("07.4", protected_by_where),
    ("07.4", protected_by_loop),
    ("07.4", protected_per_row),
    ("07.4", protected_by_sum),
    ("07.4", protected_by_max),
]
