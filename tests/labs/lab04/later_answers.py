"""Answers to lab 04 that a check once let pass or explained wrongly, and their neighbours."""

from __future__ import annotations

from collections.abc import Callable

import torch

from labkit.labs.lab04.references import (
    grouped_attention,
    layer_elements,
    merge_kv_heads,
    most_kv_heads,
    split_kv_heads,
)
from tests.labs.answer import Wrong


def heads_by(unit):
    """As many heads as a quotient of floats says."""

    def answer(spec, tokens, batch, room, bytes_per_element):
        one = 2 * spec.num_layers * spec.head_dim * bytes_per_element * tokens * batch / unit
        most = int(room / unit / one)
        return max((n for n in range(1, spec.num_heads + 1) if spec.num_heads % n == 0 and n <= most), default=0)

    return answer


def returns_the_error(num_heads, num_kv_heads, ranks):
    try:
        return split_kv_heads(num_heads, num_kv_heads, ranks)
    except ValueError as error:
        return error


def returns_the_class(num_heads, num_kv_heads, ranks):
    try:
        return split_kv_heads(num_heads, num_kv_heads, ranks)
    except ValueError:
        return ValueError


def misspelt(kind):
    return lambda layer, seq_len: 0 if layer.kind == kind else layer_elements(layer, seq_len)


def in_blocks(size):
    """Right: softmax as it goes, each block of K and V met once."""

    def answer(q, k, v):
        group = q.shape[1] // k.shape[1]
        rows = q.unflatten(1, (-1, group)).flatten(2, 3) * q.shape[-1] ** -0.5
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2]).repeat(group, 1)
        best, total, out = rows.new_full((*rows.shape[:3], 1), -1e38), 0.0, 0.0
        for keys, values, seen in zip(k.split(size, 2), v.split(size, 2), mask.split(size, 1), strict=True):
            scores = (rows @ keys.mT).masked_fill(~seen, -torch.inf)
            now = torch.maximum(best, scores.amax(-1, keepdim=True))
            weights, kept = (scores - now).exp(), (best - now).exp()
            total, out, best = total * kept + weights.sum(-1, keepdim=True), out * kept + weights @ values, now
        return (out / total).unflatten(2, (group, -1)).flatten(1, 2)

    return answer


def blocks_for_each_head(q, k, v):
    """Blocks, read anew for every query head."""
    group = q.shape[1] // k.shape[1]
    return torch.cat([in_blocks(16)(q[:, head : head + 1], k[:, head // group :][:, :1], v[:, head // group :][:, :1])
                      for head in range(q.shape[1])], 1)  # fmt: skip


def mean_queries(q, k, v):
    mean = q.unflatten(1, (k.shape[1], -1)).mean(2, keepdim=True)
    return grouped_attention(mean.expand(-1, -1, q.shape[1] // k.shape[1], -1, -1).flatten(1, 2), k, v)


def keys_of_row_0(q, k, v):
    return grouped_attention(q, k[:1].repeat(len(k), 1, 1, 1), v[:1].repeat(len(v), 1, 1, 1))


def tried(counts):
    """04.2 that tries the divisors for which `counts` holds."""

    def answer(spec, tokens, batch, room, size):
        one = 2 * spec.num_layers * spec.head_dim * tokens * batch * size
        fits = [n for n in range(1, spec.num_heads + 1) if spec.num_heads % n == 0 and n * one <= room]
        return max((n for n in fits if counts(n, spec.num_heads)), default=0)

    return answer


def room_by(change):
    return lambda spec, tokens, batch, room, size: most_kv_heads(spec, tokens, batch, change(room), size)


def overlapping(weight, num_kv_heads, group):
    heads = weight.unflatten(0, (num_kv_heads, -1)).unfold(0, group, 1).mean(-1)
    return heads[: num_kv_heads // group].flatten(0, 1)


def pairs_of(weight, num_kv_heads, group):
    heads = weight.unflatten(0, (num_kv_heads // group, group, -1))
    return heads[:, [0, -1]].mean(1).flatten(0, 1)


def all_where_there_are_more(num_heads, num_kv_heads, ranks):
    each, copies = split_kv_heads(num_heads, num_kv_heads, ranks)
    return (num_kv_heads, ranks) if ranks > num_kv_heads else (each, copies)


def repeats_and_cuts(q, k, v, cache):
    group = q.shape[1] // k.shape[1]
    wide = [x[:, :, None].repeat(1, 1, group, 1, 1) for x in (k, v)]
    cache.append(*(x[:, :, 0] for x in wide))
    return grouped_attention(q, *cache.read())


def asks_the_cache(q, k, v, cache):
    """Right: every cache can attend."""
    cache.append(k, v)
    return cache.attend(q)


WRONG = [
    Wrong("04.2", "quotient-cut", "int() of a quotient of GB", heads_by(1e9)),
    Wrong("04.2", "quotient-cut", "int() of a quotient of MB", heads_by(1e6)),
    Wrong("04.5", "error-returned", "returns the error", returns_the_error),
    Wrong("04.5", "error-returned", "returns the error's class", returns_the_class),
    Wrong("04.3", "kind-not-met", "a typo in 'window'", misspelt("window")),
    Wrong("04.3", "kind-not-met", "a typo in 'full'", misspelt("full")),
    Wrong("04.3", "kind-not-met", "a typo in 'latent'", misspelt("latent")),
    Wrong("04.1", "reads-again", "blocks, once for each query head", blocks_for_each_head),
    Wrong("04.1", "queries-averaged", "the mean query of a group", mean_queries),
    Wrong("04.1", "one-for-all", "the first row's K and V for all", keys_of_row_0),
    Wrong("04.2", "some-not-tried", "one head is not tried", tried(lambda n, heads: n != 1)),
    Wrong("04.2", "some-not-tried", "up to the root", tried(lambda n, heads: n <= heads**0.5)),
    Wrong("04.2", "argument", "a tenth of the room is kept free", room_by(lambda room: int(room * 0.9))),
    Wrong("04.2", "bits", "the room in bits", room_by(lambda room: 8 * room)),
    Wrong(
        "04.4",
        "shape",
        "a matrix for a bias",
        lambda weight, heads, group: merge_kv_heads(weight, heads, group).reshape(
            len(weight) // group, *(weight.shape[1:] or (1,))
        ),
    ),
    Wrong("04.4", "groups-overlap", "groups that begin one head apart", overlapping),
    Wrong("04.4", "ends-averaged", "the mean of first and last", pairs_of),
    Wrong("04.5", "all-everywhere", "all heads where there are more GPUs", all_where_there_are_more),
    Wrong("04.6", "repeats-new-tokens", "repeats the new tokens, and cuts them again", repeats_and_cuts),
]

RIGHT: list[tuple[str, Callable]] = [
    ("04.1", in_blocks(16)),
    ("04.1", in_blocks(32)),
    ("04.6", asks_the_cache),
]
