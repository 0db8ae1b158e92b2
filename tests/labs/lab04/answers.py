"""Wrong answers to lab 04, and other right ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from types import FunctionType

import numpy as np
import torch
import torch.nn.functional as F

from labkit import sizing
from labkit.attention import attention, causal_mask, online_attention
from labkit.labs.lab04.references import (
    cached_attention,
    grouped_attention,
    layer_elements,
    merge_kv_heads,
    split_kv_heads,
)
from tests.labs.answer import Wrong
from tests.labs.lab04 import later_answers

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
    """PyTorch's own: wrong where the grouping is what one is to write, right elsewhere."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_mask(q.shape[2], k.shape[2]), enable_gqa=True)


def grouped(q, k, v, *, soft=lambda s: s.softmax(-1), hide=None, rows=None, back=None, keys=lambda x: x):
    """The right way, with parts replaced; what follows softmax has the dtype of q."""
    k, v = keys(k), keys(v)
    rows = (rows or (lambda x: x.reshape(x.shape[0], k.shape[1], -1, x.shape[3])))(q)
    scores = (rows @ k.mT) * q.shape[3] ** -0.5
    scores = scores.reshape(*q.shape[:3], -1)
    hide = hide or (lambda s: s.masked_fill(~causal_mask(*s.shape[2:]), float("-inf")))
    weights = soft(hide(scores)).to(v.dtype)
    out = weights.reshape(*rows.shape[:3], -1) @ v
    return (back or (lambda x: x.reshape(q.shape)))(out).to(q.dtype)


def seen_of(scores):
    return causal_mask(*scores.shape[2:])


def with_softmax(soft):
    return lambda q, k, v: grouped(q, k, v, soft=soft)


def hidden(hide):
    return lambda q, k, v: grouped(q, k, v, hide=hide)


def after_softmax(q, k, v):
    return grouped(q, k, v, hide=lambda s: s, soft=lambda s: s.softmax(-1) * seen_of(s))


def exp_by_hand(scores):
    """Without subtracting the largest score."""
    return scores.exp() / scores.exp().sum(-1, keepdim=True)


def largest_subtracted(scores):
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


def rows_of_the_mask_in_turn(q, k, v):
    rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    mask = causal_mask(q.shape[2], k.shape[2])
    scores = (rows @ k.mT) * q.shape[3] ** -0.5
    hidden_rows = ~mask.repeat_interleave(times_of(q, k), 0)
    return (scores.masked_fill(hidden_rows, float("-inf")).softmax(-1) @ v).view(q.shape)


def mask_rows_repeated(q, k, v):
    """Right: the mask is stacked like the rows."""
    rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    mask = causal_mask(q.shape[2], k.shape[2]).repeat(times_of(q, k), 1)
    return (((rows @ k.mT) * q.shape[3] ** -0.5).masked_fill(~mask, float("-inf")).softmax(-1) @ v).reshape(q.shape)


def fused_rows(q, k, v):
    """Right: stacked by hand, multiplied by PyTorch's own."""
    rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    mask = causal_mask(q.shape[2], k.shape[2]).repeat(times_of(q, k), 1)
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask).reshape(q.shape)


def scaled_before(q, k, v):
    """Right: the queries are scaled, a bias hides."""
    new, kv_len = q.shape[2], k.shape[2]
    bias = torch.full((new, kv_len), float("-inf"), dtype=q.dtype).triu(kv_len - new + 1)
    rows = (q / q.shape[3] ** 0.5).reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    weights = ((rows @ k.mT).view(*q.shape[:3], kv_len) + bias).softmax(-1)
    return (weights.view(*rows.shape[:3], -1) @ v).view(q.shape)


def flat_heads(q, k, v):
    """Right: bmm over batch and KV heads at once."""
    (batch, count, kv_len, head_dim), new = k.shape, q.shape[2]
    rows, keys = q.reshape(batch * count, -1, head_dim), k.reshape(batch * count, kv_len, head_dim)
    scores = torch.bmm(rows, keys.transpose(1, 2)).view(batch, -1, new, kv_len) / head_dim**0.5
    weights = scores.masked_fill(~causal_mask(new, kv_len), float("-inf")).softmax(-1)
    return torch.bmm(weights.view(batch * count, -1, kv_len), v.reshape(keys.shape)).view(q.shape)


def request_by_request(q, k, v):
    """Right: a loop over the batch."""
    return torch.cat([grouped_attention(*one) for one in zip(q.split(1), k.split(1), v.split(1), strict=True)])


def scales_the_keys(q, k, v):
    root = k.shape[3] ** 0.5
    return grouped_attention(q * root, k * (1 / root), v)


def divides_the_keys(q, k, v):
    root = k.shape[3] ** 0.5
    return grouped_attention(q * root, (k.mT / root).mT, v)


def in_float64(q, k, v):
    """Right: float64 inside, cast back."""
    return grouped_attention(q.double(), k.double(), v.double()).to(q.dtype)


def head_by_head_in_float64(q, k, v):
    """Right: float64 inside, one KV head after the other."""
    parts = zip(q.split(times_of(q, k), dim=1), k.split(1, dim=1), v.split(1, dim=1), strict=True)
    return torch.cat([in_float64(*part) for part in parts], dim=1)


def token_by_token(q, k, v):
    new, kv_len = q.shape[2], k.shape[2]
    parts = [(q[:, :, i : i + 1], kv_len - new + i + 1) for i in range(new)]
    return torch.cat([grouped_attention(row, k[:, :, :end], v[:, :, :end]) for row, end in parts], dim=2)


def repeats_prompts_only(q, k, v):
    return by_repeat_interleave(q, k, v) if q.shape[2] > 1 else grouped_attention(q, k, v)


def repeats_bfloat16_only(q, k, v):
    return by_repeat_interleave(q, k, v) if q.dtype == torch.bfloat16 else grouped_attention(q, k, v)


def through_numpy(q, k, v):
    return grouped_attention(q, torch.from_numpy(k.numpy().copy()), torch.from_numpy(v.numpy().copy()))


def heads_dealt(q, k, v):
    """Split as [group, num_kv_heads], and put back as they came."""
    rows = q.unflatten(1, (-1, k.shape[1])).transpose(1, 2).flatten(1, 2)
    return grouped_attention(rows, k, v)


def rows_by_token(q, k, v):
    return grouped(q, k, v, rows=lambda x: x.unflatten(1, (k.shape[1], -1)).transpose(2, 3).flatten(2, 3))


def memory_of_shapes(answer):
    kept = {}

    def wrong(*args):
        key = tuple(arg.shape if hasattr(arg, "shape") else arg for arg in args)
        return kept.setdefault(key, answer(*args)).clone()

    return wrong


def one_output(answer):
    kept = {}

    def wrong(*args):
        result = answer(*args)
        return kept.setdefault((result.shape, result.dtype), result.clone()).copy_(result)

    return wrong


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


def next_divisor(spec, tokens, batch, room, bytes_per_element):
    one = 2 * spec.num_layers * spec.head_dim * bytes_per_element * tokens * batch
    return next((n for n in range(1, spec.num_heads) if divides(spec, n) and n * one > room), spec.num_heads)


def own_heads(spec, tokens, batch, room, bytes_per_element):
    one = 2 * spec.num_layers * spec.head_dim * bytes_per_element * tokens * batch
    return max((n for n in range(1, spec.num_kv_heads + 1) if spec.num_heads % n == 0 and n * one <= room), default=0)


def hidden_per_head(spec, *rest):
    return fitting(heads=spec.hidden_size // spec.num_heads / spec.head_dim)(spec, *rest)


def by_numpy(spec, tokens, batch, room, bytes_per_element):
    """Right: a NumPy whole number."""
    counts = np.arange(1, spec.num_heads + 1)
    one = 2 * spec.num_layers * spec.head_dim * bytes_per_element * tokens * batch
    fits = counts[(spec.num_heads % counts == 0) & (counts * one <= room)]
    return fits[-1] if fits.size else 0


def up_to_the_first_too_many(spec, tokens, batch, room, bytes_per_element):
    """Right: upwards, while it fits."""
    best = 0
    for count in range(1, spec.num_heads + 1):
        if spec.num_heads % count:
            continue
        if 2 * count * spec.head_dim * spec.num_layers * tokens * batch * bytes_per_element > room:
            break
        best = count
    return best


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


def in_bytes(layer, seq_len):
    return 2 * layer_elements(layer, seq_len)


def a_state_is_full(layer, seq_len):
    return all_tokens(layer, seq_len) if layer.kind == "state" else layer_elements(layer, seq_len)


def larger_of_both(layer, seq_len):
    return all_tokens(layer, max(layer.window, seq_len))


def by_table(layer, seq_len):
    """Right: a table of rules."""
    kv = layer.num_kv_heads * (layer.k_dim + layer.v_dim)
    return {
        "full": lambda: seq_len * kv,
        "window": lambda: (layer.window if seq_len > layer.window else seq_len) * kv,
        "latent": lambda: layer.latent_dim * seq_len,
    }.get(layer.kind, lambda: 0)()


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


def with_the_models_head_dim(weight, num_kv_heads, group):
    head_dim = 64
    return weight.view(num_kv_heads // group, group, head_dim, -1).mean(1).view(num_kv_heads // group * head_dim, -1)


def weights_only(weight, num_kv_heads, group):
    rows, columns = weight.shape
    return weight.reshape(-1, group, rows // num_kv_heads, columns).mean(1).reshape(-1, columns)


def groups_swapped(weight, num_kv_heads, group):
    return weight.unflatten(0, (group, num_kv_heads // group, -1)).mean(1).flatten(0, 1)


def first_heads(weight, num_kv_heads, group):
    return weight[: len(weight) // group]


def merged_in_float64(weight, num_kv_heads, group):
    """Right: float64 inside, cast back."""
    return groups(weight.double(), num_kv_heads, group).mean(1).flatten(0, 1).to(weight.dtype)


def merged_by_slices(weight, num_kv_heads, group):
    """Right: each group's rows, cut out."""
    d = len(weight) // num_kv_heads
    out = torch.zeros_like(weight[: len(weight) // group])
    for place in range(num_kv_heads // group):
        rows = weight[place * group * d : (place + 1) * group * d]
        out[place * d : (place + 1) * d] = torch.stack(rows.split(d)).mean(0)
    return out


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


def refuses_either(num_heads, num_kv_heads, ranks):
    if num_heads % ranks or num_kv_heads % ranks or ranks % num_kv_heads:
        raise ValueError
    return split_kv_heads(num_heads, num_kv_heads, ranks)


def refuses_one_gpu(num_heads, num_kv_heads, ranks):
    if ranks == 1:
        raise ValueError("one GPU is no division")
    return split_kv_heads(num_heads, num_kv_heads, ranks)


def split_by_branches(num_heads, num_kv_heads, ranks):
    """Right: a list, branch by branch."""
    if num_heads % ranks != 0:
        raise ValueError
    if ranks <= num_kv_heads:
        if num_kv_heads % ranks:
            raise ValueError
        return [num_kv_heads // ranks, 1]
    if ranks % num_kv_heads:
        raise ValueError
    return [1, ranks // num_kv_heads]


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


def keeps_half(q, k, v, cache):
    cache.append(k.half(), v.half())
    keys, values = cache.read()
    return grouped_attention(q, keys.to(q.dtype), values.to(q.dtype))


def copies_what_it_reads(q, k, v, cache):
    cache.append(k, v)
    keys, values = cache.read()
    return grouped_attention(q, keys.contiguous(), values.contiguous())


def clones_what_it_reads(q, k, v, cache):
    cache.append(k, v)
    return grouped_attention(q, *(x.clone() for x in cache.read()))


def keeps_besides(q, k, v, cache, kept=[]):  # noqa: B006
    kept.append(k)
    cache.append(k, v)
    return grouped_attention(q, *cache.read())


def hangs_onto(q, k, v, cache):
    cache.append(k, v)
    cache.newest = k
    return grouped_attention(q, *cache.read())


def appends_twice(q, k, v, cache):
    cache.append(k, v)
    cache.append(k, v)
    return grouped_attention(q, *cache.read())


def unmasked(q, k, v, cache):
    cache.append(k, v)
    return F.scaled_dot_product_attention(q, *cache.read(), enable_gqa=True)


def causal_from_the_top(q, k, v, cache):
    cache.append(k, v)
    return F.scaled_dot_product_attention(q, *cache.read(), is_causal=True, enable_gqa=True)


def mended_token_by_token(q, k, v, cache):
    """Right: one new token after the other."""
    outputs = []
    for place in range(q.shape[2]):
        cache.append(k[:, :, place : place + 1], v[:, :, place : place + 1])
        outputs.append(grouped_attention(q[:, :, place : place + 1], *cache.read()))
    return torch.cat(outputs, dim=2)


def mended_by_fused(q, k, v, cache):
    """Right: PyTorch's own attention on what is read."""
    cache.append(k, v)
    return by_fused(q, *cache.read())


def mended_by_einsum(q, k, v, cache):
    """Right: with a dimension for the group."""
    cache.append(k, v)
    return by_einsum(q, *cache.read())


def mended_by_query_head(q, k, v, cache):
    cache.append(k, v)
    keys, values = cache.read()
    times = times_of(q, keys)
    parts = [
        grouped_attention(row, *(x[:, place // times, None] for x in (keys, values)))
        for place, row in enumerate(q.split(1, dim=1))
    ]
    return torch.cat(parts, dim=1)


def casts_what_it_reads(q, k, v, cache):
    """Right: the softmax of bfloat16 in float32."""
    cache.append(k, v)
    return grouped_attention(*(x.float() if x.dtype == torch.bfloat16 else x for x in (q, *cache.read()))).to(q.dtype)


def reads_the_newest(q, k, v, cache):
    cache.append(k, v)
    return grouped_attention(q, *(x[:, :, -128:] for x in cache.read()))


def appends_the_newest(q, k, v, cache):
    cache.append(k[:, :, -1:], v[:, :, -1:])
    return grouped_attention(q, *cache.read())


def causal_for_several(q, k, v, cache):
    cache.append(k, v)
    return F.scaled_dot_product_attention(q, *cache.read(), is_causal=q.shape[2] > 1, enable_gqa=True)


class OnlyRead:
    """A cache that holds what it is made with."""

    def __init__(self, k, v):
        self.read = lambda: (k, v)

    def append(self, k, v):
        """Nothing is kept."""


def stacked_triangle(q, k, v):
    rows = q.reshape(*k.shape[:2], -1, q.shape[3])
    scores = rows @ k.mT * q.shape[3] ** -0.5
    mask = torch.ones(scores.shape[2:], dtype=torch.bool).tril(scores.shape[3] - scores.shape[2])
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num() @ v).view(q.shape)


# Right where a learner's grouped_attention, accepted in 04.1, casts: as in a notebook, one name among its globals.
mended_with_an_earlier_answer = FunctionType(
    cached_attention.__code__, {"grouped_attention": in_float64, "__builtins__": __builtins__}, "cached_attention"
)


WRONG = [
    Wrong("04.1", "expanded", "repeats K and V with repeat_interleave", by_repeat_interleave,
           "rasbt/LLMs-from-scratch, the GQA bonus"),
    Wrong("04.1", "expanded", "expands and reshapes, which copies", by_expand_and_reshape),
    Wrong("04.1", "expanded", "picks a KV head for every query head", by_indexing_heads),
    Wrong("04.1", "expanded", "groups the keys and repeats the values", only_values_repeated),
    Wrong("04.1", "broadcast-copies", "lets matmul broadcast K and V", by_broadcast),
    Wrong("04.1", "broadcast-copies", "multiplies by hand over a broadcast", by_elementwise_products),
    Wrong("04.1", "made-anew", "scales the keys, not the queries", scales_the_keys),
    Wrong("04.1", "made-anew", "divides the keys, turned around", divides_the_keys),
    Wrong("04.1", "reads-again", "loops over query heads", by_query_head),
    Wrong("04.1", "head-mapping", "sends head h to h % num_kv_heads, by repeat", by_modulo),
    Wrong("04.1", "head-mapping", "splits heads as [group, num_kv_heads]", groups_first),
    Wrong("04.1", "no-mask", "no mask", with_mask(lambda new, kv: None)),
    Wrong("04.1", "mask-offset", "a triangle that starts top left",
           with_mask(lambda new, kv: torch.ones(new, kv, dtype=torch.bool).tril()), "rasbt/LLMs-from-scratch#697"),
    Wrong("04.1", "mask-offset-too-large", "an offset that is one too large",
           with_mask(lambda new, kv: torch.ones(new, kv, dtype=torch.bool).tril(kv - new + 1))),
    Wrong("04.1", "mask-over-stacked-rows", "masks while the rows are stacked", masked_while_stacked),
    Wrong("04.1", "mask-over-stacked-rows", "masks the stacked rows as if all were new tokens",
           masked_while_stacked_from_the_end),
    Wrong("04.1", "no-scale", "forgets the scale", with_scale(0)),
    Wrong("04.1", "scale-twice", "divides by head_dim", with_scale(-1)),
    Wrong("04.1", "shape", "does not bring the heads back together", not_brought_back),
    Wrong("04.1", "tokens-and-heads-mixed", "reshapes over tokens and heads in the wrong order", tokens_before_heads),
    Wrong("04.1", "layout", "views q, which a projection does not give in one piece", by_view),
    Wrong("04.1", "enable-gqa", "lets PyTorch do the grouping", by_fused),
    Wrong("04.1", "mask-inverted", "hides what may be seen",
           hidden(lambda s: s.masked_fill(seen_of(s), float("-inf")))),
    Wrong("04.1", "mask-multiplied", "sets hidden scores to 0", hidden(lambda s: s * seen_of(s))),
    Wrong("04.1", "mask-after", "masks after softmax", after_softmax),
    Wrong("04.1", "mask-weak", "hides with -100", hidden(lambda s: s.masked_fill(~seen_of(s), -100.0))),
    Wrong("04.1", "mask-weak", "hides with -1e4", hidden(lambda s: s.masked_fill(~seen_of(s), -1e4))),
    Wrong("04.1", "mask-over-stacked-rows", "repeats each row of the mask in its place", rows_of_the_mask_in_turn),
    Wrong("04.1", "axis", "softmax along the queries", with_softmax(lambda s: s.softmax(-2))),
    Wrong("04.1", "not-finite", "exponentiates large scores", with_softmax(exp_by_hand)),
    Wrong("04.1", "fixed-scale", "divides by 8", lambda q, k, v: grouped_attention(q * q.shape[3] ** 0.5 / 8, k, v)),
    Wrong("04.1", "copied-whole", "asks for K in one piece",
           lambda q, k, v: grouped(q, k, v, keys=lambda x: x.contiguous())),
    Wrong("04.1", "copied-whole", "clones K and V", lambda q, k, v: grouped(q, k, v, keys=lambda x: x.clone())),
    Wrong("04.1", "expanded", "repeats where several tokens come", repeats_prompts_only),
    Wrong("04.1", "expanded", "repeats in one dtype", repeats_bfloat16_only),
    Wrong("04.1", "reads-again", "goes token by token", token_by_token),
    Wrong("04.1", "left-pytorch", "goes through NumPy", through_numpy),
    Wrong("04.1", "heads-reordered", "deals heads out and leaves them so", heads_dealt),
    Wrong("04.1", "tokens-and-heads-mixed", "stacks token after token, reads head after head", rows_by_token),
    Wrong("04.1", "first-kv-head", "gives all query heads one KV head",
           lambda q, k, v: grouped_attention(q, k[:, :1], v[:, :1])),
    Wrong("04.1", "dtype", "computes in float32 and leaves it so",
           lambda q, k, v: grouped_attention(q.float(), k.float(), v.float())),
    Wrong("04.1", "remembered", "keeps results by shape", memory_of_shapes(grouped_attention)),
    Wrong("04.1", "result-overwritten", "has one output for all calls", one_output(grouped_attention)),
    Wrong("04.2", "capped", "tries the spec's own KV heads", own_heads),
    Wrong("04.2", "own-divisors", "divides the spec's own KV heads",
           fitting(allow=lambda spec, n: spec.num_kv_heads % n == 0)),
    Wrong("04.2", "powers-of-two", "tries powers of two", fitting(allow=lambda spec, n: n & (n - 1) == 0)),
    Wrong("04.2", "powers-of-two", "tries powers of two that divide",
           fitting(allow=lambda spec, n: n & (n - 1) == 0 and spec.num_heads % n == 0)),
    Wrong("04.2", "mha-left-out", "stops one before all heads",
           fitting(allow=lambda spec, n: spec.num_heads % n == 0 and n < spec.num_heads)),
    Wrong("04.2", "too-large", "returns the first that does not fit", next_divisor),
    Wrong("04.2", "head-dim", "takes hidden_size / num_heads for head_dim", hidden_per_head),
    Wrong("04.2", "head-dim", "takes hidden_size for head_dim",
           fitting(kinds=2, heads=lambda spec: spec.hidden_size / spec.head_dim)),
    Wrong("04.2", "all-heads", "counts every query head", fitting(heads=lambda spec: spec.num_heads)),
    Wrong("04.2", "bits", "counts bits", fitting(kinds=16)),
    Wrong("04.2", "always-all", "takes room for GiB",
           lambda spec, tokens, batch, room, size: fitting()(spec, tokens, batch, room * 2**30, size)),
    Wrong("04.2", "divides-backwards", "divides the count by the heads",
           fitting(allow=lambda spec, n: n % spec.num_heads == 0)),
    Wrong("04.2", "not-a-divisor", "rounds what fits",
           lambda spec, tokens, batch, room, size:
           round(room / (2 * spec.num_layers * spec.head_dim * size * tokens * batch))),
    Wrong("04.2", "twice", "counts K and V twice", fitting(kinds=4)),
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
    Wrong("04.3", "factor", "counts K and V twice", elements(full=lambda layer, n: 2 * all_tokens(layer, n))),
    Wrong("04.3", "returned-none", "has no answer for a state", elements(state=lambda layer, seq_len: None)),
    Wrong("04.3", "factor", "counts bytes", in_bytes),
    Wrong("04.3", "state-counted", "lets a state fall into the rule for full layers", a_state_is_full),
    Wrong("04.3", "window-overfull", "takes the larger of tokens and window", elements(window=larger_of_both)),
    Wrong("04.3", "window-off-by-one", "lets a window hold one token more",
           elements(window=lambda layer, seq_len: all_tokens(layer, min(seq_len, layer.window + 1)))),
    Wrong("04.3", "bracket", "adds v_dim after the product",
           elements(full=lambda layer, seq_len: seq_len * layer.num_kv_heads * layer.k_dim + layer.v_dim)),
    Wrong("04.3", "raised", "looks for a window everywhere",
           lambda layer, seq_len: all_tokens(layer, min(seq_len, layer.window))),
    Wrong("04.3", "one-head", "forgets the KV heads",
           elements(full=lambda layer, seq_len: seq_len * (layer.k_dim + layer.v_dim))),
    Wrong("04.3", "widths-multiplied", "multiplies the widths",
           elements(full=lambda layer, seq_len: seq_len * layer.num_kv_heads * layer.k_dim * layer.v_dim)),
    Wrong("04.3", "latent-and-heads", "counts the latent and what is made of it",
           elements(latent=lambda layer, seq_len: all_tokens(layer, seq_len) + seq_len * layer.latent_dim)),
    Wrong("04.4", "fixed-head-dim", "writes the model's head_dim down", with_the_models_head_dim),
    Wrong("04.4", "bias", "asks for two dimensions", weights_only),
    Wrong("04.4", "group-and-groups-swapped", "swaps groups and group", groups_swapped),
    Wrong("04.4", "first-only", "keeps the first heads", first_heads),
    Wrong("04.4", "not-the-mean", "takes the median", lambda w, n, g: groups(w, n, g).median(1).values.flatten(0, 1)),
    Wrong("04.4", "remembered", "keeps results by shape", memory_of_shapes(merge_kv_heads)),
    Wrong("04.4", "result-overwritten", "has one output for all calls", one_output(merge_kv_heads)),
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
    Wrong("04.5", "all-kept", "does not divide by the heads there are",
           split_as(one_at_least, lambda kv, ranks: one_at_least(kv, ranks) * ranks)),
    Wrong("04.5", "on-every-gpu", "says that each head is on every GPU",
           split_as(one_at_least, lambda kv, ranks: ranks)),
    Wrong("04.5", "query-heads", "counts query heads per GPU",
           lambda heads, kv, ranks: (heads // ranks, split_kv_heads(heads, kv, ranks)[1])),
    Wrong("04.5", "extra-copies", "counts the copies besides the first",
           split_as(one_at_least, lambda kv, ranks: copies_of(kv, ranks) - 1)),
    Wrong("04.5", "and-or", "refuses when either does not divide", refuses_either),
    Wrong("04.5", "refuses-too-much", "refuses one GPU", refuses_one_gpu),
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
    Wrong("04.6", "expanded", "repeats what it reads", repeats_after_reading),
    Wrong("04.6", "broadcast-copies", "broadcasts what it reads", expands_after_reading),
    Wrong("04.6", "head-mapping", "repeats what it reads, in the wrong order", repeats_in_the_wrong_order),
    Wrong("04.6", "heads-dropped", "caches the first head only", first_head_only),
    Wrong("04.6", "kept-otherwise", "caches averages", averages_heads),
    Wrong("04.6", "cache-unread", "attends to the new tokens only", attends_to_the_new),
    Wrong("04.6", "not-appended", "does not append", never_appends),
    Wrong("04.6", "k-and-v-swapped", "swaps K and V in the cache", swaps),
    Wrong("04.6", "read-before-append", "reads before it appends", reads_before_appending),
    Wrong("04.6", "kept-in-another-dtype", "caches float16", keeps_half),
    Wrong("04.6", "copied-whole", "copies a slice to have it in one piece", copies_what_it_reads),
    Wrong("04.6", "mask-weak", "hides with -1e4",
           lambda q, k, v, cache: cache.append(k, v) or hidden(
               lambda s: s.masked_fill(~seen_of(s), -1e4))(q, *cache.read())),
    Wrong("04.6", "kept-besides", "keeps what it appends besides", keeps_besides),
    Wrong("04.6", "kept-besides", "hangs what it appends onto the cache", hangs_onto),
    Wrong("04.6", "copied-whole", "clones what it reads", clones_what_it_reads),
    Wrong("04.6", "not-appended", "appends twice", appends_twice),
    Wrong("04.6", "no-mask", "leaves the mask out", unmasked),
    Wrong("04.6", "mask-offset", "lets is_causal mask a chunk", causal_from_the_top),
    Wrong("04.6", "returned-none", "forgets to return", forgets_to_return),
    Wrong("04.6", "reads-again", "one query head after the other", mended_by_query_head),
    Wrong("04.6", "values", "reads the newest 128 tokens", reads_the_newest),
    Wrong("04.6", "not-appended", "appends the newest of several tokens", appends_the_newest),
    Wrong("04.6", "mask-offset", "lets is_causal mask a chunk, and no mask for one token", causal_for_several),
    Wrong("04.1", "mask-offset", "lets is_causal mask a chunk, and no mask for one token",
           lambda q, k, v: causal_for_several(q, k, v, OnlyRead(k, v))),
    Wrong("04.1", "mask-over-stacked-rows", "a triangle over all stacked rows, zeros where nothing is seen",
           stacked_triangle),
]  # fmt: skip


def reads_before_it_appends(q, k, v, cache):
    """Held and new tokens apart, their scores joined; nothing is copied."""
    batch, heads, new, head_dim = q.shape
    kv_heads = k.shape[1]
    rows = q.reshape(batch, kv_heads, -1, head_dim) * head_dim**-0.5
    late = torch.ones(new, new, dtype=torch.bool, device=q.device).triu(1).repeat(heads // kv_heads, 1)
    scores = (rows @ k.mT).masked_fill(late, float("-inf"))
    if cache.seq_len == 0:
        out = scores.softmax(-1) @ v
    else:
        held_k, held_v = cache.read()
        held = held_k.shape[2]
        weights = torch.cat((rows @ held_k.mT, scores), dim=-1).softmax(-1)
        out = weights[..., :held] @ held_v + weights[..., held:] @ v
    cache.append(k, v)
    return out.reshape(batch, heads, new, head_dim)


RIGHT: list[tuple[str, Callable]] = [
    ("04.1", by_einsum),
    ("04.1", fused_rows),
    ("04.1", mask_rows_repeated),
    ("04.1", scaled_before),
    ("04.1", flat_heads),
    ("04.1", request_by_request),
    ("04.1", in_float64),
    ("04.1", head_by_head_in_float64),
    ("04.1", with_softmax(lambda s: s.softmax(-1, dtype=torch.float32))),
    ("04.1", with_softmax(largest_subtracted)),
    ("04.1", hidden(lambda s: torch.where(seen_of(s), s, torch.finfo(s.dtype).min))),
    ("04.1", lambda q, k, v: online_attention(q, k, v)),
    ("04.1", by_kv_head),
    ("04.2", by_sizing),
    ("04.2", fitting()),
    ("04.3", through_the_package),
    ("04.2", by_numpy),
    ("04.2", up_to_the_first_too_many),
    ("04.3", by_match),
    ("04.3", by_table),
    ("04.4", merged_by_a_loop),
    ("04.4", merged_by_a_matrix),
    ("04.4", merged_in_float64),
    ("04.4", merged_by_slices),
    ("04.5", split_by_branches),
    ("04.5", split_by_sizing),
    ("04.5", split_by_listing),
    ("04.6", mended_by_fused),
    ("04.6", mended_by_einsum),
    ("04.6", mended_with_an_earlier_answer),
    ("04.6", casts_what_it_reads),
    ("04.6", mended_token_by_token),
    ("04.6", reads_before_it_appends),
    ("04.6", lambda q, k, v, cache: cache.append(k, v) or attention(q, *cache.read())),
]

WRONG += later_answers.WRONG
RIGHT += later_answers.RIGHT
