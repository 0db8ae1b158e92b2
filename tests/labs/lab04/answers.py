"""Wrong answers to lab 04, and other right ones."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
import torch.nn.functional as F

from labkit import sizing
from labkit.attention import attention, causal_mask
from labkit.labs.lab04.references import grouped_attention, layer_elements, split_kv_heads
from tests.labs.answer import Wrong

# 04.1


def times_of(q, k):
    return q.shape[1] // k.shape[1]


def by_repeat_interleave(q, k, v):
    times = times_of(q, k)
    return grouped_attention(q, k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1))


def by_expand_and_reshape(q, k, v):
    def all_heads(x):
        return x[:, :, None].expand(-1, -1, times_of(q, k), -1, -1).reshape(x.shape[0], q.shape[1], *x.shape[2:])

    return grouped_attention(q, all_heads(k), all_heads(v))


def by_indexing_heads(q, k, v):
    which = torch.arange(q.shape[1]) // times_of(q, k)
    return grouped_attention(q, k[:, which], v[:, which])


def only_values_repeated(q, k, v):
    times = times_of(q, k)
    rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    scores = (rows @ k.mT).view(*q.shape[:3], -1) * q.shape[3] ** -0.5
    return softmaxed(scores, q, k) @ v.repeat_interleave(times, dim=1)


def softmaxed(scores, q, k):
    return scores.masked_fill(~causal_mask(q.shape[2], k.shape[2]), float("-inf")).softmax(-1)


def by_broadcast(q, k, v):
    """No line copies; matmul does."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = (grouped @ k[:, :, None].mT) * q.shape[3] ** -0.5
    return (softmaxed(scores, q, k) @ v[:, :, None]).flatten(1, 2)


def by_elementwise_products(q, k, v):
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = (grouped[..., None, :] * k[:, :, None, None]).sum(-1) * q.shape[3] ** -0.5
    return (softmaxed(scores, q, k)[..., None] * v[:, :, None, None]).sum(-2).flatten(1, 2)


def by_query_head(q, k, v):
    heads = []
    for head in range(q.shape[1]):
        shared = head // times_of(q, k)
        scores = (q[:, head] @ k[:, shared].mT) * q.shape[3] ** -0.5
        heads.append(softmaxed(scores, q, k) @ v[:, shared])
    return torch.stack(heads, dim=1)


def by_modulo(q, k, v):
    times = times_of(q, k)
    return attention(q, k.repeat(1, times, 1, 1), v.repeat(1, times, 1, 1))


def groups_first(q, k, v):
    """The same mistake without a copy."""
    rows = q.unflatten(1, (-1, k.shape[1])).transpose(1, 2)
    out = torch.stack([grouped_attention(part, k, v) for part in rows.unbind(2)], dim=2)
    return out.transpose(1, 2).flatten(1, 2)


def with_mask(make):
    def wrong(q, k, v):
        scores = (q.reshape(q.shape[0], k.shape[1], -1, q.shape[3]) @ k.mT) * q.shape[3] ** -0.5
        weights = scores.view(*q.shape[:3], -1)
        mask = make(q.shape[2], k.shape[2])
        if mask is not None:
            weights = weights.masked_fill(~mask, float("-inf"))
        return (weights.softmax(-1).view_as(scores) @ v).view(q.shape)

    return wrong


def masked_while_stacked(q, k, v):
    rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    scores = (rows @ k.mT) * q.shape[3] ** -0.5
    seen = torch.ones(rows.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v).view(q.shape)


def masked_while_stacked_from_the_end(q, k, v):
    rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    scores = (rows @ k.mT) * q.shape[3] ** -0.5
    seen = torch.ones(rows.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - rows.shape[2])
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v).view(q.shape)


def with_scale(power):
    def wrong(q, k, v):
        return grouped_attention(q * q.shape[3] ** (0.5 + power), k, v)

    return wrong


def not_brought_back(q, k, v):
    return grouped_attention(q, k, v).unflatten(1, (k.shape[1], -1))


def tokens_before_heads(q, k, v):
    mixed = q.transpose(1, 2).reshape(q.shape)
    return grouped_attention(mixed, k, v)


def by_view(q, k, v):
    q.view(q.shape[0], k.shape[1], -1, q.shape[3])
    return grouped_attention(q, k, v)


def by_einsum(q, k, v):
    """Right: a dimension for the group."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bgrtd,bgkd->bgrtk", grouped, k) * q.shape[3] ** -0.5
    return torch.einsum("bgrtk,bgkd->bgrtd", softmaxed(scores, q, k), v).flatten(1, 2)


def by_fused(q, k, v):
    """Right: PyTorch's own on a CPU."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_mask(q.shape[2], k.shape[2]), enable_gqa=True)


def by_kv_head(q, k, v):
    """Right: a loop over KV heads, each read once."""
    out = torch.empty_like(q)
    times = times_of(q, k)
    for head in range(k.shape[1]):
        part = slice(head * times, (head + 1) * times)
        out[:, part] = grouped_attention(q[:, part], k[:, head : head + 1], v[:, head : head + 1])
    return out


# 04.2


def fitting(*, kinds=2, layers=None, batch=None, tokens=None, size=None, heads=1, pick=None, allow=None):
    """The right rule, with some of its parts replaced."""

    def wrong(spec, tokens_, batch_, room, bytes_per_element):
        factors = (
            kinds, spec.head_dim, layers or spec.num_layers, tokens or tokens_, batch or batch_,
            size or bytes_per_element, heads(spec) if callable(heads) else heads,
        )  # fmt: skip
        one = prod(factors)
        fits = [n for n in range(1, spec.num_heads + 1) if (allow or divides)(spec, n) and n * one <= room]
        return (pick or largest)(spec, fits)

    return wrong


def divides(spec, count):
    return spec.num_heads % count == 0


def largest(spec, fits):
    return max(fits, default=0)


def strictly_smaller(spec, tokens, batch, room, bytes_per_element):
    return fitting()(spec, tokens, batch, room - 1, bytes_per_element)


def by_division(spec, tokens, batch, room, bytes_per_element):
    return room // (2 * spec.num_layers * spec.head_dim * bytes_per_element * tokens * batch)


def by_true_division(spec, tokens, batch, room, bytes_per_element):
    return float(fitting()(spec, tokens, batch, room, bytes_per_element))


def as_a_spec(spec, tokens, batch, room, bytes_per_element):
    return [n for n in range(1, spec.num_heads + 1) if divides(spec, n)]


def by_sizing(spec, tokens, batch, room, bytes_per_element):
    """Right: asks the arithmetic of the package."""
    from dataclasses import replace

    dtype = {1: "int8", 2: "float16", 4: "float32"}[bytes_per_element]
    for count in sorted((n for n in range(1, spec.num_heads + 1) if divides(spec, n)), reverse=True):
        one = replace(spec, num_kv_heads=count)
        if sizing.cache_bytes(one, tokens, batch, sizing.Dense(dtype)) <= room:
            return count
    return 0


def by_halving(spec, tokens, batch, room, bytes_per_element):
    count = spec.num_heads
    while count and 2 * spec.num_layers * count * spec.head_dim * bytes_per_element * tokens * batch > room:
        count //= 2
    return count


# 04.3


def elements(**changes):
    """The right rule, with what is kept of one kind replaced: a function of (layer, seq_len)."""

    def wrong(layer, seq_len):
        return changes.get(layer.kind, layer_elements)(layer, seq_len)

    return wrong


def all_tokens(layer, seq_len):
    return seq_len * layer.num_kv_heads * (layer.k_dim + layer.v_dim)


def twice_the_keys(layer, seq_len):
    return 2 * layer.num_kv_heads * layer.k_dim * layer.tokens_held(seq_len)


def keys_only(layer, seq_len):
    return layer.num_kv_heads * layer.k_dim * layer.tokens_held(seq_len)


def through_the_package(layer, seq_len):
    """Right: what the specs say of themselves."""
    return layer.tokens_held(seq_len) * layer.elements_per_token


def by_match(layer, seq_len):
    """Right: a match statement, and windows as a general case."""
    match layer.kind:
        case "latent":
            return layer.latent_dim * seq_len
        case "full" | "window":
            return min(seq_len, layer.window or seq_len) * layer.num_kv_heads * (layer.k_dim + layer.v_dim)
        case _:
            return 0


# 04.4


def groups(weight, num_kv_heads, group):
    return weight.unflatten(0, (num_kv_heads // group, group, -1))


def strangers(weight, num_kv_heads, group):
    return weight.unflatten(0, (group, num_kv_heads // group, -1)).mean(0).flatten(0, 1)


def neighbouring_rows(weight, num_kv_heads, group):
    return weight.unflatten(0, (-1, group)).mean(1)


def heads_last(weight, num_kv_heads, group):
    return weight.unflatten(0, (-1, num_kv_heads // group, group)).mean(2).transpose(0, 1).flatten(0, 1)


def kept_as_large(weight, num_kv_heads, group):
    return (
        groups(weight, num_kv_heads, group).mean(1, keepdim=True).expand(-1, group, *[-1] * weight.dim()).flatten(0, 2)
    )


def in_place(weight, num_kv_heads, group):
    heads = groups(weight, num_kv_heads, group)
    for other in range(1, group):
        heads[:, 0] += heads[:, other]
    return (heads[:, 0] / group).flatten(0, 1)


def columns(weight, num_kv_heads, group):
    return (
        weight[:, : weight.shape[1] // group * group].unflatten(1, (-1, group)).mean(2) if weight.dim() > 1 else weight
    )


def merged_in_float32(weight, num_kv_heads, group):
    wide = weight if weight.dtype == torch.float64 else weight.float()
    return groups(wide, num_kv_heads, group).mean(1).flatten(0, 1)


def merged_by_a_loop(weight, num_kv_heads, group):
    """Right: chunks, averaged group by group."""
    heads = weight.chunk(num_kv_heads)
    return torch.cat([sum(heads[i : i + group]) / group for i in range(0, num_kv_heads, group)])


def merged_by_a_matrix(weight, num_kv_heads, group):
    """Right: a matrix that averages."""
    average = torch.kron(torch.eye(num_kv_heads // group), torch.ones(1, group)).to(weight.dtype) / group
    return torch.einsum("gh,hd...->gd...", average, weight.unflatten(0, (num_kv_heads, -1))).flatten(0, 1)


# 04.5


def split_as(heads, copies, check=True):
    """A split from two rules, functions of (num_kv_heads, ranks), after the right refusals."""

    def wrong(num_heads, num_kv_heads, ranks):
        if check:
            split_kv_heads(num_heads, num_kv_heads, ranks)
        return heads(num_kv_heads, ranks), copies(num_kv_heads, ranks)

    return wrong


def one_at_least(a, b):
    return max(1, a // b)


def copies_of(num_kv_heads, ranks):
    return max(1, ranks // num_kv_heads)


def never_refuses(num_heads, num_kv_heads, ranks):
    return one_at_least(num_kv_heads, ranks), copies_of(num_kv_heads, ranks)


def query_heads_only(num_heads, num_kv_heads, ranks):
    if num_heads % ranks:
        raise ValueError("query heads do not divide")
    return never_refuses(num_heads, num_kv_heads, ranks)


def kv_heads_only(num_heads, num_kv_heads, ranks):
    if num_kv_heads % ranks and ranks % num_kv_heads:
        raise ValueError("KV heads do not divide")
    return never_refuses(num_heads, num_kv_heads, ranks)


def refuses_more_gpus(num_heads, num_kv_heads, ranks):
    if num_heads % ranks or num_kv_heads % ranks:
        raise ValueError("heads do not divide")
    return num_kv_heads // ranks, 1


def by_assert(num_heads, num_kv_heads, ranks):
    assert num_heads % ranks == 0
    return kv_heads_only(num_heads, num_kv_heads, ranks)


def heads_alone(num_heads, num_kv_heads, ranks):
    return split_kv_heads(num_heads, num_kv_heads, ranks)[0]


def by_division_in_ranks(num_heads, num_kv_heads, ranks):
    split_kv_heads(num_heads, num_kv_heads, ranks)
    heads = num_kv_heads // ranks
    return heads, ranks * heads // num_kv_heads if heads else 1 // heads


def split_by_sizing(num_heads, num_kv_heads, ranks):
    """Right: the package's own division."""
    split = sizing.split_heads(num_heads, num_kv_heads, ranks)
    return split.kv_heads_per_rank, split.copies


def split_by_listing(num_heads, num_kv_heads, ranks):
    """Right: list which KV heads each GPU's query heads read."""
    if num_heads % ranks or (num_kv_heads % ranks and ranks % num_kv_heads):
        raise ValueError("heads cannot be cut")
    each, group = num_heads // ranks, num_heads // num_kv_heads
    needs = [{head // group for head in range(rank * each, (rank + 1) * each)} for rank in range(ranks)]
    return len(needs[0]), sum(0 in need for need in needs)


# 04.6


def expanded(x, times):
    return x.repeat_interleave(times, dim=1)


def as_it_stands(q, k, v, cache):
    times = times_of(q, k)
    cache.append(expanded(k, times), expanded(v, times))
    return grouped_attention(q, *cache.read())


def repeats_with_repeat(q, k, v, cache):
    times = times_of(q, k)
    cache.append(k.repeat(1, times, 1, 1), v.repeat(1, times, 1, 1))
    return grouped_attention(q, *cache.read())


def repeats_after_reading(q, k, v, cache):
    cache.append(k, v)
    keys, values = cache.read()
    return grouped_attention(q, expanded(keys, times_of(q, k)), expanded(values, times_of(q, k)))


def expands_after_reading(q, k, v, cache):
    cache.append(k, v)
    return by_broadcast(q, *cache.read())


def repeats_in_the_wrong_order(q, k, v, cache):
    cache.append(k, v)
    return by_modulo(q, *cache.read())


def first_head_only(q, k, v, cache):
    cache.append(k[:, :1], v[:, :1])
    return grouped_attention(q, *cache.read())


def reads_before_appending(q, k, v, cache):
    if cache.seq_len:
        out = grouped_attention(q, *cache.read())
        cache.append(k, v)
        return out
    cache.append(k, v)
    return grouped_attention(q, *cache.read())


def attends_to_the_new(q, k, v, cache):
    cache.append(k, v)
    return grouped_attention(q, k, v)


def never_appends(q, k, v, cache):
    return grouped_attention(q, k, v)


def swaps(q, k, v, cache):
    cache.append(v, k)
    values, keys = cache.read()
    return grouped_attention(q, keys, values)


def averages_heads(q, k, v, cache):
    cache.append(k.mean(1, keepdim=True).expand_as(k), v)
    return grouped_attention(q, *cache.read())


def forgets_to_return(q, k, v, cache):
    cache.append(k, v)
    grouped_attention(q, *cache.read())


def mended_by_fused(q, k, v, cache):
    """Right: PyTorch's own attention on what is read."""
    cache.append(k, v)
    return by_fused(q, *cache.read())


def mended_by_einsum(q, k, v, cache):
    """Right: with a dimension for the group."""
    cache.append(k, v)
    return by_einsum(q, *cache.read())


WRONG = [
    Wrong("04.1", "expanded", "repeats K and V with repeat_interleave", by_repeat_interleave,
           "rasbt/LLMs-from-scratch, the GQA bonus"),
    Wrong("04.1", "expanded", "expands and reshapes, which copies", by_expand_and_reshape),
    Wrong("04.1", "expanded", "picks a KV head for every query head", by_indexing_heads),
    Wrong("04.1", "expanded", "groups the keys and repeats the values", only_values_repeated),
    Wrong("04.1", "broadcast-copies", "lets matmul broadcast K and V", by_broadcast),
    Wrong("04.1", "broadcast-copies", "multiplies by hand over a broadcast", by_elementwise_products),
    Wrong("04.1", "reads-again", "loops over query heads", by_query_head),
    Wrong("04.1", "head-mapping", "sends head h to h % num_kv_heads, by repeat", by_modulo),
    Wrong("04.1", "head-mapping", "splits heads as [group, num_kv_heads]", groups_first),
    Wrong("04.1", "sees-the-future", "no mask", with_mask(lambda new, kv: None)),
    Wrong("04.1", "mask-offset", "a triangle that starts top left",
           with_mask(lambda new, kv: torch.ones(new, kv, dtype=torch.bool).tril()), "rasbt/LLMs-from-scratch#697"),
    Wrong("04.1", "mask-offset-too-large", "an offset that is one too large",
           with_mask(lambda new, kv: torch.ones(new, kv, dtype=torch.bool).tril(kv - new + 1))),
    Wrong("04.1", "mask-over-stacked-rows", "masks while the rows are stacked", masked_while_stacked),
    Wrong("04.1", "mask-over-stacked-rows", "masks the stacked rows as if all were new tokens",
           masked_while_stacked_from_the_end),
    Wrong("04.1", "unscaled", "forgets the scale", with_scale(0)),
    Wrong("04.1", "scaled-twice", "divides by head_dim", with_scale(-1)),
    Wrong("04.1", "shape", "does not bring the heads back together", not_brought_back),
    Wrong("04.1", "tokens-and-heads-mixed", "reshapes over tokens and heads in the wrong order", tokens_before_heads),
    Wrong("04.1", "raised", "views q, which a projection does not give in one piece", by_view),
    Wrong("04.2", "halved", "halves num_heads until it fits", by_halving),
    Wrong("04.2", "not-a-divisor", "takes any number that fits", fitting(allow=lambda spec, n: True)),
    Wrong("04.2", "more-than-heads", "divides, and asks no more", by_division),
    Wrong("04.2", "group-size", "returns num_queries_per_kv",
           fitting(pick=lambda spec, fits: spec.num_heads // max(fits) if fits else 0), "rasbt/LLMs-from-scratch#922"),
    Wrong("04.2", "smallest", "takes the first that fits", fitting(pick=lambda spec, fits: min(fits, default=0))),
    Wrong("04.2", "never-zero", "always grants one head", fitting(pick=lambda spec, fits: max(fits, default=1))),
    Wrong("04.2", "full-is-refused", "refuses a cache that fills the room", strictly_smaller),
    Wrong("04.2", "k-only", "forgets the values", fitting(kinds=1)),
    Wrong("04.2", "one-row", "forgets the batch", fitting(batch=1)),
    Wrong("04.2", "one-token", "forgets the tokens", fitting(tokens=1)),
    Wrong("04.2", "one-layer", "counts one layer", fitting(layers=1)),
    Wrong("04.2", "own-kv-heads", "multiplies by the spec's KV heads", fitting(heads=lambda spec: spec.num_kv_heads)),
    Wrong("04.2", "fixed-dtype", "writes 2 bytes down", fitting(size=2)),
    Wrong("04.2", "elements", "counts numbers, not bytes", fitting(size=1)),
    Wrong("04.2", "not-whole", "returns a float", by_true_division),
    Wrong("04.2", "not-a-number", "returns all the divisors", as_a_spec),
    Wrong("04.2", "count", "counts K, V and something else", fitting(kinds=3)),
    Wrong("04.3", "k-only", "forgets the values", elements(full=keys_only)),
    Wrong("04.3", "k-width-for-both", "takes the keys' width for the values'", elements(full=twice_the_keys)),
    Wrong("04.3", "window-ignored", "counts every token of a window", elements(window=all_tokens)),
    Wrong("04.3", "window-overfull", "counts a full window from the start",
           elements(window=lambda layer, seq_len: all_tokens(layer, layer.window))),
    Wrong("04.3", "latent-twice", "counts the latent for K and for V",
           elements(latent=lambda layer, seq_len: 2 * seq_len * layer.latent_dim)),
    Wrong("04.3", "latent-per-head", "counts the latent per head",
           elements(latent=lambda layer, seq_len: seq_len * layer.latent_dim * max(1, layer.num_kv_heads))),
    Wrong("04.3", "latent-as-heads", "counts K and V of a latent layer's heads", elements(latent=all_tokens)),
    Wrong("04.3", "shared-counted", "counts what another layer keeps", elements(shared=all_tokens)),
    Wrong("04.3", "state-counted", "counts a state per token",
           elements(state=lambda layer, seq_len: layer.state_bytes)),
    Wrong("04.3", "one-token", "forgets the tokens", elements(full=lambda layer, seq_len: all_tokens(layer, 1))),
    Wrong("04.3", "not-whole", "divides with /", elements(full=lambda layer, seq_len: all_tokens(layer, seq_len) / 1)),
    Wrong("04.3", "count", "counts K and V twice", elements(full=lambda layer, n: 2 * all_tokens(layer, n))),
    Wrong("04.3", "returned-none", "has no answer for a state", elements(state=lambda layer, seq_len: None)),
    Wrong("04.4", "strangers-merged", "merges heads that are not neighbours", strangers),
    Wrong("04.4", "rows-interleaved", "averages neighbouring rows", neighbouring_rows),
    Wrong("04.4", "rows-interleaved", "takes head_dim for the outer dimension", heads_last),
    Wrong("04.4", "summed", "adds the heads up", lambda w, n, g: groups(w, n, g).sum(1).flatten(0, 1)),
    Wrong("04.4", "divided-wrongly", "divides by all heads", lambda w, n, g: groups(w, n, g).sum(1).flatten(0, 1) / n),
    Wrong("04.4", "first-only", "keeps the first head of each group",
           lambda w, n, g: groups(w, n, g)[:, 0].flatten(0, 1)),
    Wrong("04.4", "still-as-large", "writes the mean into every head", kept_as_large),
    Wrong("04.4", "all-in-one", "averages all heads",
           lambda w, n, g: w.unflatten(0, (n, -1)).mean(0).repeat(n // g, *[1] * (w.dim() - 1))),
    Wrong("04.4", "arguments-changed", "adds up in place", in_place),
    Wrong("04.4", "wrong-axis", "averages columns", columns),
    Wrong("04.4", "shape", "leaves heads and rows apart", lambda w, n, g: groups(w, n, g).mean(1)),
    Wrong("04.4", "dtype", "returns float32", merged_in_float32),
    Wrong("04.5", "no-head", "lets heads per GPU fall to 0", split_as(lambda kv, ranks: kv // ranks, copies_of)),
    Wrong("04.5", "no-head", "divides by those 0 heads", by_division_in_ranks),
    Wrong("04.5", "never-copied", "always says one copy", split_as(one_at_least, lambda kv, ranks: 1)),
    Wrong("04.5", "no-copies-yet", "says 0 copies where nothing is copied",
           split_as(one_at_least, lambda kv, ranks: ranks // kv)),
    Wrong("04.5", "all-everywhere", "keeps every head on every GPU",
           split_as(lambda kv, ranks: kv, lambda kv, ranks: ranks)),
    Wrong("04.5", "group-size", "copies each head for every query head that shares it",
           lambda heads, kv, ranks: (split_kv_heads(heads, kv, ranks)[0], heads // kv)),
    Wrong("04.5", "swapped", "returns copies first", lambda *sizes: split_kv_heads(*sizes)[::-1]),
    Wrong("04.5", "not-whole", "divides with /", split_as(lambda kv, ranks: kv / ranks, copies_of)),
    Wrong("04.5", "accepts-halves", "checks the query heads alone", query_heads_only),
    Wrong("04.5", "query-heads-unchecked", "refuses nothing", never_refuses),
    Wrong("04.5", "query-heads-unchecked", "checks the KV heads alone", kv_heads_only),
    Wrong("04.5", "refuses-copies", "refuses more GPUs than KV heads", refuses_more_gpus),
    Wrong("04.5", "other-error", "asserts", by_assert),
    Wrong("04.5", "not-a-pair", "returns one number", heads_alone),
    Wrong("04.6", "repeated-before-caching", "as it stands in the blank", as_it_stands, "FasterDecoding/SnapKV#16"),
    Wrong("04.6", "repeated-before-caching", "repeats in another order", repeats_with_repeat),
    Wrong("04.6", "repeats-at-every-step", "repeats what it reads", repeats_after_reading),
    Wrong("04.6", "repeats-at-every-step", "broadcasts what it reads", expands_after_reading),
    Wrong("04.6", "head-mapping", "repeats what it reads, in the wrong order", repeats_in_the_wrong_order),
    Wrong("04.6", "heads-dropped", "caches the first head only", first_head_only),
    Wrong("04.6", "kept-otherwise", "caches averages", averages_heads),
    Wrong("04.6", "cache-unread", "attends to the new tokens only", attends_to_the_new),
    Wrong("04.6", "not-appended", "does not append", never_appends),
    Wrong("04.6", "k-and-v-swapped", "swaps K and V in the cache", swaps),
    Wrong("04.6", "values", "reads before it appends", reads_before_appending),
    Wrong("04.6", "returned-none", "forgets to return", forgets_to_return),
]  # fmt: skip

RIGHT: list[tuple[str, Callable]] = [
    ("04.1", by_einsum),
    ("04.1", by_fused),
    ("04.1", by_kv_head),
    ("04.2", by_sizing),
    ("04.2", fitting()),
    ("04.3", through_the_package),
    ("04.3", by_match),
    ("04.4", merged_by_a_loop),
    ("04.4", merged_by_a_matrix),
    ("04.5", split_by_sizing),
    ("04.5", split_by_listing),
    ("04.6", mended_by_fused),
    ("04.6", mended_by_einsum),
]
