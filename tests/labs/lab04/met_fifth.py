"""Answers that lab 04's checks had not seen when they met: their author knew the notebook, not the checks."""

# ruff: noqa: B905, F405, F811 - written as learners write

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.labs.lab04 import references
from labkit.labs.lab04.references import *  # noqa: F403
from tests.labs.noting import noting

WRONG, RIGHT, wrong, right = noting(references)


# 04.1
@wrong(
    "04.1",
    "the mask's rows are repeated one by one, the queries lie head after head",
    "stacked rows go head after head: the mask as a whole must be repeated, not each row",
)
def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, num_heads, new, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    per_kv = num_heads // num_kv_heads
    rows = q.reshape(batch, num_kv_heads, per_kv * new, head_dim)
    scores = rows @ k.mT * head_dim**-0.5
    mask = torch.ones(new, kv_len, dtype=torch.bool, device=q.device).tril(kv_len - new)
    mask = mask.repeat_interleave(per_kv, dim=0)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return (weights @ v).reshape(batch, num_heads, new, head_dim)


@wrong(
    "04.1",
    "k and v made contiguous and flattened for bmm: a copy where they are a view of a larger cache",
    "K and V are copied where they are a slice of a preallocated cache: contiguous",
)
def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, num_heads, new, head_dim = q.shape
    _, num_kv_heads, kv_len, _ = k.shape
    per_kv = num_heads // num_kv_heads
    flat_k = k.contiguous().view(batch * num_kv_heads, kv_len, head_dim)
    flat_v = v.contiguous().view(batch * num_kv_heads, kv_len, head_dim)
    flat_q = q.reshape(batch * num_kv_heads, per_kv * new, head_dim)
    scores = torch.bmm(flat_q, flat_k.transpose(1, 2)) / math.sqrt(head_dim)
    hidden = torch.ones(new, kv_len, dtype=torch.bool, device=q.device).triu(kv_len - new + 1).repeat(per_kv, 1)
    weights = torch.softmax(scores.masked_fill(hidden, -math.inf), dim=-1)
    return torch.bmm(weights, flat_v).view(batch, num_heads, new, head_dim)


@wrong(
    "04.1",
    "is_causal over the stacked rows",
    "is_causal numbers the stacked rows as if they were one head's tokens: row r must see kv_len - new + r % new",
)
def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, num_heads, new, head_dim = q.shape
    num_kv_heads = k.shape[1]
    rows = q.reshape(batch, num_kv_heads, num_heads // num_kv_heads * new, head_dim)
    out = F.scaled_dot_product_attention(rows, k, v, is_causal=new > 1)
    return out.reshape(batch, num_heads, new, head_dim)


@right("04.1", "one KV head after the other, the rows of its group at once")
def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, _, new, size = q.shape
    length = k.shape[2]
    sees = torch.arange(length, device=q.device) <= torch.arange(length - new, length, device=q.device)[:, None]
    outs = []
    for group, keys, values in zip(q.chunk(k.shape[1], dim=1), k.unbind(dim=1), v.unbind(dim=1)):
        scores = group.reshape(batch, -1, size) @ keys.mT * size**-0.5
        scores = scores.view(batch, -1, new, length).masked_fill(~sees, -math.inf)
        outs.append((scores.softmax(dim=-1).flatten(1, 2) @ values).view(group.shape))
    return torch.cat(outs, dim=1)


# 04.2
@wrong(
    "04.2",
    "halves the query heads until it fits: for 28 heads 28, 14, 7, 3",
    "must divide num_heads: halving leaves the divisors when a number is odd",
)
def most_kv_heads(spec: ModelSpec, tokens: int, batch: int, room: int, bytes_per_element: int) -> int:
    per_head = 2 * spec.num_layers * spec.head_dim * tokens * batch * bytes_per_element
    heads = spec.num_heads
    while heads > 0 and heads * per_head > room:
        heads //= 2
    return heads


@wrong(
    "04.2",
    "greatest common divisor of the heads that fit and the query heads",
    "the largest divisor that is at most what fits, not the common divisor: of 5 that fit and 8 it is 4",
)
def most_kv_heads(spec: ModelSpec, tokens: int, batch: int, room: int, bytes_per_element: int) -> int:
    one_head = 2 * spec.num_layers * spec.head_dim * bytes_per_element * tokens * batch
    fit = min(room // one_head, spec.num_heads)
    if fit == 0:
        return 0
    return math.gcd(fit, spec.num_heads)


@wrong("04.2", "an exact fit is refused", "what fills the room exactly fits")
def most_kv_heads(spec: ModelSpec, tokens: int, batch: int, room: int, bytes_per_element: int) -> int:
    best = 0
    for count in range(1, spec.num_heads + 1):
        if spec.num_heads % count:
            continue
        size = 2 * spec.num_layers * count * spec.head_dim * tokens * batch * bytes_per_element
        if size < room:
            best = count
    return best


@right("04.2", "from the number of query heads that share: fewest sharers that fit")
def most_kv_heads(spec: ModelSpec, tokens: int, batch: int, room: int, bytes_per_element: int) -> int:
    shape = (2, spec.num_layers, batch, tokens, spec.head_dim, bytes_per_element)
    divisors = {spec.num_heads // sharers for sharers in range(1, spec.num_heads + 1) if not spec.num_heads % sharers}
    return max((count for count in divisors if math.prod((count, *shape)) <= room), default=0)


# 04.3
@wrong("04.3", "a state layer falls through to the formula of K and V", "a state layer keeps no K and V: 0")
def layer_elements(layer: Layer, seq_len: int) -> int:
    if layer.kind == "shared":
        return 0
    if layer.kind == "latent":
        return seq_len * layer.latent_dim
    held = min(seq_len, layer.window) if layer.kind == "window" else seq_len
    return held * layer.num_kv_heads * (layer.k_dim + layer.v_dim)


@wrong("04.3", "a latent per head", "one latent per token serves all heads: not times num_heads")
def layer_elements(layer: Layer, seq_len: int) -> int:
    match layer.kind:
        case "full":
            return seq_len * layer.num_kv_heads * (layer.k_dim + layer.v_dim)
        case "window":
            return min(seq_len, layer.window) * layer.num_kv_heads * (layer.k_dim + layer.v_dim)
        case "latent":
            return seq_len * layer.latent_dim * layer.num_kv_heads
        case _:
            return 0


@wrong(
    "04.3", "K's width for V as well, in window layers", "values may be of another width in window layers, too: v_dim"
)
def layer_elements(layer: Layer, seq_len: int) -> int:
    if layer.kind == "full":
        return layer.num_kv_heads * layer.k_dim * seq_len + layer.num_kv_heads * layer.v_dim * seq_len
    if layer.kind == "window":
        last = min(layer.window, seq_len)
        return 2 * layer.num_kv_heads * layer.k_dim * last
    if layer.kind == "latent":
        return layer.latent_dim * seq_len
    return 0


@right("04.3", "a dict of functions by kind")
def layer_elements(layer: Layer, seq_len: int) -> int:
    def both(tokens: int) -> int:
        return sum(layer.num_kv_heads * width * tokens for width in (layer.k_dim, layer.v_dim))

    kept = {
        "full": lambda: both(seq_len),
        "window": lambda: both(seq_len if seq_len < layer.window else layer.window),
        "latent": lambda: layer.latent_dim * seq_len,
    }
    return kept.get(layer.kind, lambda: 0)()


@right("04.3", "token by token, those that are still held")
def layer_elements(layer: Layer, seq_len: int) -> int:
    if layer.kind in ("shared", "state"):
        return 0
    first = max(0, seq_len - layer.window) if layer.kind == "window" else 0
    one = (
        layer.latent_dim
        if layer.kind == "latent"
        else layer.num_kv_heads * layer.k_dim + layer.num_kv_heads * layer.v_dim
    )
    return one * len(range(first, seq_len))


# 04.4
@wrong(
    "04.4",
    "averages heads that lie num_kv_heads // group apart, not neighbours",
    "neighbouring heads are merged: 0 and 1, not 0 and 2",
)
def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    rest = weight.shape[1:]
    head_dim = weight.shape[0] // num_kv_heads
    heads = weight.reshape(group, num_kv_heads // group, head_dim, *rest)
    return heads.mean(dim=0).reshape(num_kv_heads // group * head_dim, *rest)


@wrong(
    "04.4",
    "averages neighbouring rows inside a head",
    "rows of one head are averaged: the mean is over heads, row by row",
)
def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    return weight.unflatten(0, (-1, group)).mean(dim=1)


@wrong("04.4", "takes a matrix for granted: fails on a bias", "a bias has one dimension")
def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    rows, hidden_size = weight.shape
    head_dim = rows // num_kv_heads
    heads = weight.view(num_kv_heads // group, group, head_dim, hidden_size)
    return heads.mean(dim=1).reshape(-1, hidden_size)


@right("04.4", "slices that are stacked and averaged")
def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    heads = weight.tensor_split(num_kv_heads, dim=0)
    return torch.cat([torch.stack(heads[i : i + group]).mean(dim=0) for i in range(0, num_kv_heads, group)])


# 04.5
@wrong(
    "04.5",
    "only the query heads are asked to divide; KV heads are rounded",
    "3 KV heads on 2 GPUs: neither divides the other, ValueError",
)
def split_kv_heads(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    if num_heads % ranks != 0:
        raise ValueError(f"{num_heads} query heads do not divide over {ranks} GPUs")
    kv_per_rank = max(1, num_kv_heads // ranks)
    copies = max(1, ranks // num_kv_heads)
    return kv_per_rank, copies


@wrong(
    "04.5",
    "more GPUs than KV heads is refused",
    "with more GPUs than KV heads each is kept several times: no ValueError when num_kv_heads divides ranks",
)
def split_kv_heads(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    if num_heads % ranks or num_kv_heads % ranks:
        raise ValueError("heads do not divide evenly over the GPUs")
    return num_kv_heads // ranks, 1


@wrong("04.5", "counts the extra copies, not the GPUs", "on how many GPUs a head is kept: 1 when on one only, here 0")
def split_kv_heads(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    if num_heads % ranks:
        raise ValueError("query heads do not divide")
    if num_kv_heads % ranks and ranks % num_kv_heads:
        raise ValueError("KV heads and ranks do not divide each other")
    if ranks <= num_kv_heads:
        return num_kv_heads // ranks, 0
    return 1, ranks // num_kv_heads - 1


@right("04.5", "each GPU's query heads, the set of KV heads they read, counted")
def split_kv_heads(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    if num_heads % ranks or min(num_kv_heads % ranks, ranks % num_kv_heads):
        raise ValueError(f"{num_heads} query heads and {num_kv_heads} KV heads on {ranks} GPUs")
    mine, sharers = num_heads // ranks, num_heads // num_kv_heads
    kept = [{head // sharers for head in range(rank * mine, (rank + 1) * mine)} for rank in range(ranks)]
    return len(kept[0]), sum(0 in heads for heads in kept)


# 04.6
@wrong(
    "04.6",
    "no mask: several new tokens see later ones",
    "not causal: with several new tokens the first sees those after it",
)
def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    cache.append(k, v)
    keys, values = cache.read()
    return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)


@wrong(
    "04.6",
    "expand and reshape of all that is held: believed to be a view",
    "reshape after expand copies all K and V at each step",
)
def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    cache.append(k, v)
    keys, values = cache.read()
    times = q.shape[1] // keys.shape[1]

    def spread(t: Tensor) -> Tensor:  # expand makes no copy
        batch, heads, tokens, head_dim = t.shape
        return t[:, :, None].expand(batch, heads, times, tokens, head_dim).reshape(batch, -1, tokens, head_dim)

    return grouped_attention(q, spread(keys), spread(values))


@wrong(
    "04.6",
    "new K and V are still repeated; every times-th head is kept",
    "the new tokens' K and V are still repeated: never repeated, says the blank",
)
def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    times = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)
    cache.append(k[:, ::times], v[:, ::times])  # keep one of each group
    keys, values = cache.read()
    return grouped_attention(q, keys, values)


@right("04.6", "enable_gqa with the mask of the newest rows")
def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    cache.append(k, v)
    held = dict(zip(("key", "value"), cache.read()))
    length, new = held["key"].shape[2], q.shape[2]
    mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()[length - new :]
    return F.scaled_dot_product_attention(q, attn_mask=mask, enable_gqa=True, **held)


@right("04.6", "one line, append in an expression")
def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    return (cache.append(k, v), grouped_attention(q, *cache.read()))[1]
