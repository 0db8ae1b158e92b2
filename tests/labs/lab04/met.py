"""Answers that lab 04's checks had not seen when they first met: their author knew the notebook, not the checks."""

from __future__ import annotations

import functools
import math
from itertools import takewhile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.cache import LayerCache
from labkit.labs.lab04.references import grouped_attention as earlier_grouped_attention
from labkit.specs import Layer, ModelSpec

WRONG = []  # (exercise id, the mistake in words, what a fitting message would have to say in one line, function)
RIGHT = []  # (exercise id, the style in words, function)

# ---------------------------------------------------------------------------------------------------- 04.1 wrong


def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    times = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(times, dim=1)
    v = v.repeat_interleave(times, dim=1)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    new, held = scores.shape[-2:]
    mask = torch.ones(new, held, dtype=torch.bool, device=q.device).tril(held - new)
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v


WRONG.append(
    (
        "04.1",
        "K and V repeated with repeat_interleave",
        "K and V are copied: stack the queries instead",
        grouped_attention,
    )
)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    kv, t = k.shape[1:3]
    rows = q.reshape(b, h // kv, kv, n, d).transpose(1, 2).reshape(b, kv, -1, d)
    scores = (rows @ k.mT).view(b, h, n, t) * d**-0.5
    mask = torch.ones(n, t, dtype=torch.bool, device=q.device).tril(t - n)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    out = weights.view(b, kv, -1, t) @ v
    return out.view(b, kv, h // kv, n, d).transpose(1, 2).reshape(b, h, n, d)


WRONG.append(
    (
        "04.1",
        "query head h reads KV head h % num_kv_heads",
        "neighbours share: head h reads KV head h // num_queries_per_kv",
        grouped_attention,
    )
)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    kv, t = k.shape[1:3]
    scores = (q.reshape(b, kv, -1, d) @ k.mT).view(b, h, n, t) * d**-0.5
    mask = torch.ones(n, t, dtype=torch.bool, device=q.device).tril()
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return (weights.view(b, kv, -1, t) @ v).view(b, h, n, d)


WRONG.append(
    (
        "04.1",
        "mask aligned at the beginning (tril without offset)",
        "the new tokens are the last of kv_len: the diagonal lies kv_len - new_tokens further right",
        grouped_attention,
    )
)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    kv, t = k.shape[1:3]
    scores = (q.reshape(b, kv, -1, d) @ k.mT) * d**-0.5
    return (scores.softmax(dim=-1) @ v).view(b, h, n, d)


WRONG.append(
    (
        "04.1",
        "no mask: right for one new token only",
        "several new tokens: none may see those after it",
        grouped_attention,
    )
)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    kv, t = k.shape[1:3]
    scores = (q.reshape(b, kv, -1, d) @ k.mT) * d**-0.5
    rows = scores.shape[2]
    mask = torch.ones(rows, t, dtype=torch.bool, device=q.device).tril(t - rows)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1).nan_to_num()
    return (weights @ v).view(b, h, n, d)


WRONG.append(
    (
        "04.1",
        "the mask laid over the stacked rows, as if a group's queries were successive tokens",
        "bring the scores back to [batch, num_heads, new_tokens, kv_len] before the mask",
        grouped_attention,
    )
)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    kv, t = k.shape[1:3]
    scores = (q.view(b, kv, -1, d) @ k.mT).view(b, h, n, t) * d**-0.5
    mask = torch.ones(n, t, dtype=torch.bool, device=q.device).tril(t - n)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return (weights.view(b, kv, -1, t) @ v).view(b, h, n, d)


WRONG.append(
    ("04.1", "view for q: fails where q lies in pieces", "q may be a transposed view: reshape", grouped_attention)
)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = grouped @ k[:, :, None].mT * q.shape[-1] ** -0.5
    new, held = scores.shape[-2:]
    mask = torch.ones(new, held, dtype=torch.bool, device=q.device).tril(held - new)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return (weights @ v[:, :, None]).flatten(1, 2)


WRONG.append(
    (
        "04.1",
        "broadcast: matmul writes the repeated K and V out below the line",
        "no line copies, yet K and V are made as large as for all heads",
        grouped_attention,
    )
)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    kv, t = k.shape[1:3]
    scores = (q.reshape(b, kv, -1, d) @ k.mT).view(b, h, n, t).float() * d**-0.5
    mask = torch.ones(n, t, dtype=torch.bool, device=q.device).tril(t - n)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1).view(b, kv, -1, t)
    return (weights.to(v.dtype) @ v).view(b, h, n, d).float()


WRONG.append(("04.1", "float32 comes back whatever went in", "the result has the dtype of q", grouped_attention))


def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)


WRONG.append(
    (
        "04.1",
        "SDPA with is_causal: aligned at the first key, not the last",
        "the new tokens are the last of kv_len; is_causal takes them for the first",
        grouped_attention,
    )
)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    times = q.shape[1] // k.shape[1]
    out = []
    for head in range(q.shape[1]):
        keys, values = k[:, head // times], v[:, head // times]
        scores = q[:, head] @ keys.mT * q.shape[-1] ** -0.5
        new, held = scores.shape[-2:]
        mask = torch.ones(new, held, dtype=torch.bool, device=q.device).tril(held - new)
        out.append(scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ values)
    return torch.stack(out, dim=1)


WRONG.append(
    (
        "04.1",
        "a loop over query heads: each KV head is read once per query head",
        "K and V are to be read once: a group's queries together",
        grouped_attention,
    )
)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    kv, t = k.shape[1:3]
    q *= d**-0.5
    scores = (q.reshape(b, kv, -1, d) @ k.mT).view(b, h, n, t)
    mask = torch.ones(n, t, dtype=torch.bool, device=q.device).tril(t - n)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return (weights.view(b, kv, -1, t) @ v).view(b, h, n, d)


WRONG.append(("04.1", "q scaled in place: the caller's tensor is changed", "q must stay as it was", grouped_attention))


def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    kv, t = k.shape[1:3]
    scores = (q.reshape(b, kv, -1, d) @ k.mT).view(b, h, n, t) * d**-0.5
    mask = torch.ones(n, t, dtype=q.dtype, device=q.device).tril(t - n)
    weights = scores.softmax(dim=-1) * mask
    return (weights.view(b, kv, -1, t) @ v).view(b, h, n, d)


WRONG.append(
    (
        "04.1",
        "masked after the softmax: weights do not sum to 1",
        "mask before softmax, so that the weights of what is seen sum to 1",
        grouped_attention,
    )
)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    kv, t = k.shape[1:3]
    k, v = k.contiguous().clone(), v.contiguous().clone()
    scores = (q.reshape(b, kv, -1, d) @ k.mT).view(b, h, n, t) * d**-0.5
    mask = torch.ones(n, t, dtype=torch.bool, device=q.device).tril(t - n)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return (weights.view(b, kv, -1, t) @ v).view(b, h, n, d)


WRONG.append(
    ("04.1", "K and V copied whole before the product", "K and V need no copy: use them as they are", grouped_attention)
)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    kv, t = k.shape[1:3]
    scores = (q.reshape(b, kv, -1, d) @ k.mT).view(b, h, n, t) * (h * d) ** -0.5
    mask = torch.ones(n, t, dtype=torch.bool, device=q.device).tril(t - n)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return (weights.view(b, kv, -1, t) @ v).view(b, h, n, d)


WRONG.append(("04.1", "scaled by the width of all heads", "scale by head_dim ** -0.5", grouped_attention))


def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    kv, t = k.shape[1:3]
    scores = (q.reshape(kv, -1, d) @ k[0].mT).view(h, n, t) * d**-0.5
    mask = torch.ones(n, t, dtype=torch.bool, device=q.device).tril(t - n)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return (weights.view(kv, -1, t) @ v[0]).view(b, h, n, d)


WRONG.append(("04.1", "a batch of 1 only", "batch may be larger than 1", grouped_attention))

# ---------------------------------------------------------------------------------------------------- 04.1 right


def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    kv, t = k.shape[1:3]
    rows = q.reshape(b, kv, h // kv * n, d)
    after = torch.arange(t, device=q.device) > torch.arange(t - n, t, device=q.device)[:, None]
    scores = torch.einsum("bgrd,bgtd->bgrt", rows, k).mul_(1 / math.sqrt(d))
    scores = scores.masked_fill(after.repeat(h // kv, 1), -math.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype)
    return torch.einsum("bgrt,bgtd->bgrd", weights, v).reshape(b, h, n, d)


RIGHT.append(("04.1", "einsum, mask repeated over the rows, float32 softmax cast back", grouped_attention))


def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    kv, t = k.shape[1:3]
    bias = torch.zeros(n, t, dtype=q.dtype, device=q.device)
    bias.masked_fill_(torch.ones_like(bias, dtype=torch.bool).triu(diagonal=t - n + 1), float("-inf"))
    out = F.scaled_dot_product_attention(
        query=q.reshape(b, kv, -1, d), key=k, value=v, attn_mask=bias.repeat(h // kv, 1)
    )
    return out.reshape(q.shape)


RIGHT.append(("04.1", "SDPA on the stacked rows with an additive mask, keyword-only", grouped_attention))


def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    times = q.shape[1] // k.shape[1]
    new, held, d = q.shape[2], k.shape[2], q.shape[3]
    hidden = torch.full((new, held), -torch.inf, dtype=q.dtype, device=q.device).triu_(held - new + 1)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for g in range(k.shape[1]):
        mine = slice(g * times, (g + 1) * times)
        rows = q[:, mine].reshape(q.shape[0], -1, d) * d**-0.5
        scores = torch.bmm(rows, k[:, g].mT).unflatten(1, (times, new)) + hidden
        top = scores.amax(-1, keepdim=True)
        weights = (scores - top).exp_()
        weights /= weights.sum(-1, keepdim=True)
        out[:, mine] = torch.bmm(weights.flatten(1, 2), v[:, g]).unflatten(1, (times, new))
    return out


RIGHT.append(("04.1", "loop over KV heads, softmax by hand, written into a buffer of its own", grouped_attention))


def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    kv, t = k.shape[1:3]
    scores = torch.matmul(q.reshape(b, kv, -1, d), k.transpose(-2, -1)).div(d**0.5).unflatten(2, (-1, n))
    index = torch.arange(n, device=q.device).view(n, 1) + (t - n)
    seen = torch.arange(t, device=q.device).view(1, t) <= index
    scores = torch.where(seen, scores, torch.finfo(scores.dtype).min)
    weights = torch.exp(torch.log_softmax(scores, -1)).flatten(2, 3)
    return torch.matmul(weights, v).unflatten(2, (-1, n)).flatten(1, 2)


RIGHT.append(("04.1", "finfo.min, log_softmax and exp, five dimensions for scores only", grouped_attention))

# ---------------------------------------------------------------------------------------------------- 04.2 wrong


def most_kv_heads(spec: ModelSpec, tokens: int, batch: int, room: int, bytes_per_element: int) -> int:
    one = 2 * spec.num_layers * spec.head_dim * bytes_per_element * tokens * batch
    return min(spec.num_heads, room // one)


WRONG.append(("04.2", "need not divide num_heads", "each KV head must serve equally many query heads", most_kv_heads))


def most_kv_heads(spec: ModelSpec, tokens: int, batch: int, room: int, bytes_per_element: int) -> int:
    one = 2 * spec.num_layers * spec.head_dim * bytes_per_element * tokens * batch
    heads = spec.num_heads
    while heads > 1 and heads * one > room:
        heads //= 2
    return heads if heads * one <= room else 0


WRONG.append(
    (
        "04.2",
        "halves until it fits: misses divisors that are no halves (28: 4 of 14, 7, 3, 1)",
        "all divisors of num_heads, not only halves",
        most_kv_heads,
    )
)


def most_kv_heads(spec: ModelSpec, tokens: int, batch: int, room: int, bytes_per_element: int) -> int:
    one = 2 * spec.num_layers * spec.head_dim * bytes_per_element * tokens * batch
    fitting = [n for n in range(1, spec.num_heads + 1) if spec.num_heads % n == 0 and n * one <= room]
    return max(fitting, default=1)


WRONG.append(("04.2", "1 when not even one head fits", "0 when nothing fits", most_kv_heads))


def most_kv_heads(spec: ModelSpec, tokens: int, batch: int, room: int, bytes_per_element: int) -> int:
    one = 2 * spec.num_layers * spec.head_dim * bytes_per_element * tokens * batch
    return max((n for n in range(1, spec.num_heads + 1) if spec.num_heads % n == 0 and n * one < room), default=0)


WRONG.append(("04.2", "what fills the room exactly is refused (<)", "exactly `room` bytes fit", most_kv_heads))


def most_kv_heads(spec: ModelSpec, tokens: int, batch: int, room: int, bytes_per_element: int) -> int:
    one = 2 * spec.num_layers * spec.head_dim * bytes_per_element * tokens * batch
    fit = min(spec.num_heads, room // one)
    return math.gcd(fit, spec.num_heads) if fit else 0


WRONG.append(
    (
        "04.2",
        "gcd of what fits and num_heads, not the largest divisor that fits",
        "11 fit of 64: 8 divide, gcd gives 1",
        most_kv_heads,
    )
)


def most_kv_heads(spec: ModelSpec, tokens: int, batch: int, room: int, bytes_per_element: int) -> int:
    one = 2 * spec.num_layers * spec.head_dim * bytes_per_element * tokens * batch
    for count in range(spec.num_kv_heads, 0, -1):
        if spec.num_heads % count == 0 and count * one <= room:
            return count
    return 0


WRONG.append(
    (
        "04.2",
        "never more than the model has now",
        "how many KV heads the model has is not asked: up to num_heads",
        most_kv_heads,
    )
)


def most_kv_heads(spec: ModelSpec, tokens: int, batch: int, room: int, bytes_per_element: int) -> int:
    one = spec.num_layers * spec.head_dim * bytes_per_element * tokens * batch
    for count in range(spec.num_heads, 0, -1):
        if spec.num_heads % count == 0 and count * one <= room:
            return count
    return 0


WRONG.append(("04.2", "only K counted", "K and V: twice as many bytes", most_kv_heads))


def most_kv_heads(spec: ModelSpec, tokens: int, batch: int, room: int, bytes_per_element: int) -> int:
    one = 2 * spec.num_layers * spec.head_dim * bytes_per_element * tokens * batch
    for count in range(spec.num_heads // 2, 0, -1):
        if spec.num_heads % count == 0 and count * one <= room:
            return count
    return 0


WRONG.append(
    (
        "04.2",
        "divisors sought up to half: num_heads itself (MHA) is never the answer",
        "with room for all, every query head has its own",
        most_kv_heads,
    )
)


def most_kv_heads(spec: ModelSpec, tokens: int, batch: int, room: int, bytes_per_element: int) -> int:
    one = 2 * spec.num_layers * spec.head_dim * bytes_per_element * tokens * batch
    for count in range(spec.num_heads, 1, -1):
        if spec.num_heads % count == 0 and count * one <= room:
            return count
    return 0


WRONG.append(
    ("04.2", "the range ends before 1: one head is never the answer", "one KV head (MQA) is allowed", most_kv_heads)
)


def most_kv_heads(spec: ModelSpec, tokens: int, batch: int, room: int, bytes_per_element: int) -> int:
    one = 2 * spec.num_layers * spec.head_dim * bytes_per_element * tokens
    for count in range(spec.num_heads, 0, -1):
        if spec.num_heads % count == 0 and count * one <= room:
            return count
    return 0


WRONG.append(("04.2", "batch left out", "all requests share the room", most_kv_heads))


def most_kv_heads(spec: ModelSpec, tokens: int, batch: int, room: int, bytes_per_element: int) -> int:
    one = 2 * spec.num_layers * spec.head_dim * bytes_per_element * tokens * batch
    for count in (64, 32, 16, 8, 4, 2, 1):
        if spec.num_heads % count == 0 and count * one <= room:
            return count
    return 0


WRONG.append(
    ("04.2", "powers of two up to 64 tried, other divisors not", "28 heads: 7 and 14 divide too", most_kv_heads)
)


def most_kv_heads(spec: ModelSpec, tokens: int, batch: int, room: int, bytes_per_element: int) -> int:
    per_token = 2 * spec.num_layers * (spec.hidden_size // spec.num_heads) * bytes_per_element
    for count in range(spec.num_heads, 0, -1):
        if spec.num_heads % count == 0 and count * per_token * tokens * batch <= room:
            return count
    return 0


WRONG.append(("04.2", "head_dim from hidden_size // num_heads", "head_dim is in the spec", most_kv_heads))

# ---------------------------------------------------------------------------------------------------- 04.2 right


def most_kv_heads(spec: ModelSpec, tokens: int, batch: int, room: int, bytes_per_element: int) -> int:
    fit = room // (2 * spec.num_layers * spec.head_dim * bytes_per_element * tokens * batch)
    shared = next(
        (g for g in range(1, spec.num_heads + 1) if spec.num_heads % g == 0 and spec.num_heads // g <= fit), None
    )
    return spec.num_heads // shared if shared else 0


RIGHT.append(("04.2", "the smallest group size that fits", most_kv_heads))


def most_kv_heads(spec: ModelSpec, tokens: int, batch: int, room: int, bytes_per_element: int) -> int:
    counts = np.arange(1, spec.num_heads + 1, dtype=np.int64)
    needed = counts * (2 * spec.num_layers * spec.head_dim * bytes_per_element * tokens * batch)
    good = counts[(spec.num_heads % counts == 0) & (needed <= room)]
    return good[-1] if good.size else np.int64(0)


RIGHT.append(("04.2", "numpy, returns a numpy int64", most_kv_heads))


def most_kv_heads(spec: ModelSpec, tokens: int, batch: int, room: int, bytes_per_element: int) -> int:
    def needs(count: int) -> int:
        return sum(2 * count * spec.head_dim * tokens * batch * bytes_per_element for _ in range(spec.num_layers))

    divisors = (n for n in range(1, spec.num_heads + 1) if not spec.num_heads % n)
    return max([0, *takewhile(lambda n: needs(n) <= room, divisors)])


RIGHT.append(("04.2", "takewhile over ascending divisors, closure", most_kv_heads))

# ---------------------------------------------------------------------------------------------------- 04.3 wrong


def layer_elements(layer: Layer, seq_len: int) -> int:
    if layer.kind in ("shared", "state"):
        return 0
    if layer.kind == "latent":
        return 2 * seq_len * layer.latent_dim
    held = min(seq_len, layer.window) if layer.kind == "window" else seq_len
    return held * layer.num_kv_heads * (layer.k_dim + layer.v_dim)


WRONG.append(("04.3", "a latent for K and one for V", "one latent makes both K and V", layer_elements))


def layer_elements(layer: Layer, seq_len: int) -> int:
    if layer.kind in ("shared", "state"):
        return 0
    if layer.kind == "latent":
        return seq_len * layer.latent_dim
    return seq_len * layer.num_kv_heads * (layer.k_dim + layer.v_dim)


WRONG.append(("04.3", "windows ignored", "a window keeps at most its last tokens", layer_elements))


def layer_elements(layer: Layer, seq_len: int) -> int:
    if layer.kind in ("shared", "state"):
        return 0
    if layer.kind == "latent":
        return seq_len * layer.latent_dim
    held = layer.window if layer.kind == "window" else seq_len
    return held * layer.num_kv_heads * (layer.k_dim + layer.v_dim)


WRONG.append(
    (
        "04.3",
        "the window counted whole from the first token",
        "before the window is full only what came is held",
        layer_elements,
    )
)


def layer_elements(layer: Layer, seq_len: int) -> int:
    if layer.kind in ("shared", "state"):
        return 0
    if layer.kind == "latent":
        return seq_len * layer.latent_dim
    held = min(seq_len, layer.window) if layer.kind == "window" else seq_len
    return 2 * held * layer.num_kv_heads * layer.k_dim


WRONG.append(("04.3", "V as wide as K", "v_dim is a width of its own", layer_elements))


def layer_elements(layer: Layer, seq_len: int) -> int:
    if layer.kind in ("shared", "state"):
        return 0
    if layer.kind == "latent":
        return seq_len * layer.latent_dim * max(1, layer.num_kv_heads)
    held = min(seq_len, layer.window) if layer.kind == "window" else seq_len
    return held * max(1, layer.num_kv_heads) * (layer.k_dim + layer.v_dim)


WRONG.append(("04.3", "a latent per KV head", "one latent serves all heads", layer_elements))


def layer_elements(layer: Layer, seq_len: int) -> int:
    if layer.kind == "shared":
        return 0
    if layer.kind == "state":
        return layer.state_bytes // 2
    if layer.kind == "latent":
        return seq_len * layer.latent_dim
    held = min(seq_len, layer.window) if layer.kind == "window" else seq_len
    return held * layer.num_kv_heads * (layer.k_dim + layer.v_dim)


WRONG.append(("04.3", "the state counted as numbers of the cache", "a state counts as nothing here", layer_elements))


def layer_elements(layer: Layer, seq_len: int) -> int:
    if layer.kind == "state":
        return 0
    if layer.kind == "latent":
        return seq_len * layer.latent_dim
    held = min(seq_len, layer.window) if layer.kind == "window" else seq_len
    return held * layer.num_kv_heads * (layer.k_dim + layer.v_dim)


WRONG.append(
    (
        "04.3",
        "a shared layer counted by its sizes, which happen to be 0 in labkit's specs",
        "shared keeps nothing, whatever sizes it names",
        layer_elements,
    )
)


def layer_elements(layer: Layer, seq_len: int) -> int:
    if layer.kind in ("shared", "state"):
        return 0
    if layer.kind == "latent":
        return layer.latent_dim
    held = min(seq_len, layer.window) if layer.kind == "window" else seq_len
    return held * layer.num_kv_heads * (layer.k_dim + layer.v_dim)


WRONG.append(("04.3", "one latent for the whole request", "one latent per token", layer_elements))


def layer_elements(layer: Layer, seq_len: int) -> int:
    if layer.kind in ("shared", "state"):
        return 0
    if layer.kind == "latent":
        return seq_len * layer.latent_dim
    held = min(seq_len, 1024) if layer.kind == "window" else seq_len
    return held * layer.num_kv_heads * (layer.k_dim + layer.v_dim)


WRONG.append(("04.3", "Gemma's window written down", "layer.window is not used", layer_elements))


def layer_elements(layer: Layer, seq_len: int) -> int:
    if layer.kind in ("shared", "state"):
        return 0
    if layer.kind == "latent":
        return seq_len * (layer.latent_dim + 64)
    held = min(seq_len, layer.window) if layer.kind == "window" else seq_len
    return held * layer.num_kv_heads * (layer.k_dim + layer.v_dim)


WRONG.append(
    (
        "04.3",
        "64 rotary numbers added to the latent, which has them already",
        "latent_dim is all that is kept per token",
        layer_elements,
    )
)


def layer_elements(layer: Layer, seq_len: int) -> int:
    if layer.kind in ("shared", "state"):
        return 0
    if layer.kind == "latent":
        return seq_len * layer.latent_dim
    if layer.kind == "window" and seq_len > layer.window:
        return (layer.window + 1) * layer.num_kv_heads * (layer.k_dim + layer.v_dim)
    return seq_len * layer.num_kv_heads * (layer.k_dim + layer.v_dim)


WRONG.append(
    (
        "04.3",
        "a full window holds one more (the window and the new token)",
        "the last `window` tokens, the new one among them",
        layer_elements,
    )
)

# ---------------------------------------------------------------------------------------------------- 04.3 right


def layer_elements(layer: Layer, seq_len: int) -> int:
    match layer.kind:
        case "latent":
            return layer.latent_dim * seq_len
        case "full":
            return layer.num_kv_heads * (layer.k_dim + layer.v_dim) * seq_len
        case "window":
            return layer.num_kv_heads * (layer.k_dim + layer.v_dim) * len(range(seq_len)[-layer.window :])
    return 0


RIGHT.append(("04.3", "match, tokens of a window by slicing a range", layer_elements))


def layer_elements(layer: Layer, seq_len: int) -> int:
    per_token = {
        "full": lambda: layer.num_kv_heads * layer.k_dim + layer.num_kv_heads * layer.v_dim,
        "window": lambda: layer.num_kv_heads * layer.k_dim + layer.num_kv_heads * layer.v_dim,
        "latent": lambda: layer.latent_dim,
    }.get(layer.kind, int)()
    held = {"window": lambda: min(seq_len, layer.window)}.get(layer.kind, lambda: seq_len)()
    return per_token * held


RIGHT.append(("04.3", "dict of lambdas", layer_elements))


def layer_elements(layer: Layer, seq_len: int) -> int:
    first = seq_len - layer.window if layer.kind == "window" and seq_len > layer.window else 0
    kept = 0
    for _ in range(first, seq_len):
        if layer.kind == "latent":
            kept += layer.latent_dim
        elif layer.kind not in {"shared", "state"}:
            kept += layer.num_kv_heads * layer.k_dim
            kept += layer.num_kv_heads * layer.v_dim
    return kept


RIGHT.append(("04.3", "token by token", layer_elements))


def layer_elements(layer: Layer, seq_len: int) -> int:
    if layer.kind in ("shared", "state"):
        return np.int64(0)
    width = layer.latent_dim if layer.kind == "latent" else layer.num_kv_heads * np.add(layer.k_dim, layer.v_dim)
    return np.int64(width) * (np.minimum(seq_len, layer.window) if layer.kind == "window" else seq_len)


RIGHT.append(("04.3", "numpy integers come back", layer_elements))

# ---------------------------------------------------------------------------------------------------- 04.4 wrong


def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    return weight.unflatten(0, (num_kv_heads // group, group, -1)).sum(dim=1).flatten(0, 1)


WRONG.append(("04.4", "sum in place of mean", "the mean of the group's heads", merge_kv_heads))


def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    return weight.unflatten(0, (group, num_kv_heads // group, -1)).mean(dim=0).flatten(0, 1)


WRONG.append(
    (
        "04.4",
        "heads that lie num_kv_heads / group apart are merged, not neighbours",
        "neighbouring heads form a group",
        merge_kv_heads,
    )
)


def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    return weight.unflatten(0, (-1, group)).mean(dim=1)


WRONG.append(
    (
        "04.4",
        "neighbouring rows merged, not neighbouring heads",
        "whole heads are averaged, row i with row i of the next head",
        merge_kv_heads,
    )
)


def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    head_dim, hidden = weight.shape[0] // num_kv_heads, weight.shape[1]
    heads = weight.reshape(num_kv_heads // group, group, head_dim, hidden)
    return heads.mean(dim=1).reshape(-1, hidden)


WRONG.append(("04.4", "matrices only: fails for a bias", "a bias has one dimension", merge_kv_heads))


def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    return weight.unflatten(0, (num_kv_heads // group, group, -1))[:, 0].flatten(0, 1)


WRONG.append(
    ("04.4", "the first head of each group in place of the mean", "the mean of all heads of the group", merge_kv_heads)
)


def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    heads = weight.unflatten(0, (num_kv_heads // group, group, -1))
    total = heads[:, 0]
    for member in range(1, group):
        total += heads[:, member]
    return (total / group).flatten(0, 1)


WRONG.append(
    (
        "04.4",
        "adds into a view of the weight: the model's own rows are changed",
        "weight must stay as it was",
        merge_kv_heads,
    )
)


def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    heads = weight.unflatten(0, (-1, group, 64))
    return heads.mean(dim=1).flatten(0, 1)


WRONG.append(("04.4", "head_dim 64 written down", "head_dim is weight.shape[0] // num_kv_heads", merge_kv_heads))


def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    return weight.unflatten(0, (num_kv_heads, -1)).mean(dim=0)


WRONG.append(
    ("04.4", "all heads into one, whatever group says", "num_kv_heads // group heads come back", merge_kv_heads)
)


def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    return weight.float().unflatten(0, (num_kv_heads // group, group, -1)).mean(dim=1).flatten(0, 1)


WRONG.append(("04.4", "float32 comes back whatever went in", "the result has weight's dtype", merge_kv_heads))


def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    return weight.unflatten(0, (num_kv_heads // group, group, -1)).mean(dim=1)


WRONG.append(
    (
        "04.4",
        "the heads stay a dimension of their own",
        "heads and head_dim are one dimension in the result",
        merge_kv_heads,
    )
)


def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    heads = weight.unflatten(0, (num_kv_heads // group, group, -1)).mean(dim=1, keepdim=True)
    return heads.repeat_interleave(group, dim=1).flatten(0, 2)


WRONG.append(
    (
        "04.4",
        "the mean written into each place: as many heads as before",
        "num_kv_heads // group heads come back",
        merge_kv_heads,
    )
)


def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    return weight.unflatten(0, (num_kv_heads // group, group, -1)).mean(dim=1).flatten(0, 1) * group**0.5


WRONG.append(
    ("04.4", "the mean scaled by the root of the group (to keep the length)", "the plain mean is asked", merge_kv_heads)
)


def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    heads = weight.view(num_kv_heads // group, group, -1)
    merged = heads.mean(dim=1)
    return merged.view(weight.shape[0] // group, *weight.shape[1:])


WRONG.append(
    (
        "04.4",
        "view over head_dim and hidden: fails where the weight is transposed or sliced",
        "the weight may lie in pieces: only dimension 0 can be split without a copy",
        merge_kv_heads,
    )
)

# ---------------------------------------------------------------------------------------------------- 04.4 right


def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    heads = weight.chunk(num_kv_heads, dim=0)
    return torch.cat([torch.stack(heads[i : i + group]).mean(0) for i in range(0, num_kv_heads, group)])


RIGHT.append(("04.4", "chunk, stack and cat", merge_kv_heads))


def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    head_dim = weight.shape[0] // num_kv_heads
    share = torch.eye(num_kv_heads // group, dtype=torch.float64, device=weight.device).repeat_interleave(group, 1)
    share = torch.kron(share / group, torch.eye(head_dim, dtype=torch.float64, device=weight.device))
    return (share @ weight.double()).to(weight.dtype)


RIGHT.append(("04.4", "a product with an averaging matrix, float64 inside", merge_kv_heads))


def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    head_dim = weight.shape[0] // num_kv_heads
    out = torch.zeros((num_kv_heads // group * head_dim, *weight.shape[1:]), dtype=torch.float64, device=weight.device)
    to = torch.arange(weight.shape[0], device=weight.device)
    to = to.div(group * head_dim, rounding_mode="floor") * head_dim + to % head_dim
    return out.index_add_(0, to, weight.double()).div_(group).type_as(weight)


RIGHT.append(("04.4", "index_add into float64, cast back", merge_kv_heads))


def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    heads = weight.unflatten(0, (num_kv_heads, -1))
    members = [heads[first::group].to(torch.promote_types(weight.dtype, torch.float32)) for first in range(group)]
    return (sum(members) / group).to(weight.dtype).flatten(end_dim=1)


RIGHT.append(("04.4", "strided slices of heads, summed with Python's sum, cast back", merge_kv_heads))

# ---------------------------------------------------------------------------------------------------- 04.5 wrong


def split_kv_heads(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    if num_kv_heads % ranks and ranks % num_kv_heads:
        raise ValueError("KV heads and GPUs do not divide")
    return max(1, num_kv_heads // ranks), max(1, ranks // num_kv_heads)


WRONG.append(("04.5", "query heads are not checked", "ValueError where the query heads do not divide", split_kv_heads))


def split_kv_heads(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    if num_heads % ranks:
        raise ValueError("query heads do not divide")
    if num_kv_heads % ranks:
        raise ValueError("KV heads do not divide")
    return num_kv_heads // ranks, 1


WRONG.append(("04.5", "more GPUs than KV heads are refused", "then several GPUs keep the same head", split_kv_heads))


def split_kv_heads(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    if num_heads % ranks:
        raise ValueError("query heads do not divide")
    return max(1, num_kv_heads // ranks), max(1, ranks // num_kv_heads)


WRONG.append(
    (
        "04.5",
        "KV heads that do not divide are let through",
        "ValueError where neither of KV heads and GPUs divides the other",
        split_kv_heads,
    )
)


def split_kv_heads(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    if num_heads % ranks or (num_kv_heads % ranks and ranks % num_kv_heads):
        raise ValueError("heads do not divide")
    return num_kv_heads // ranks, max(1, ranks // num_kv_heads)


WRONG.append(
    (
        "04.5",
        "0 heads per GPU when there are more GPUs",
        "half a head serves nobody: one whole head is kept",
        split_kv_heads,
    )
)


def split_kv_heads(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    if num_heads % ranks or (num_kv_heads % ranks and ranks % num_kv_heads):
        raise ValueError("heads do not divide")
    return max(1, ranks // num_kv_heads), max(1, num_kv_heads // ranks)


WRONG.append(("04.5", "the two numbers exchanged", "first heads per GPU, then GPUs per head", split_kv_heads))


def split_kv_heads(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    assert num_heads % ranks == 0, "query heads do not divide"
    assert num_kv_heads % ranks == 0 or ranks % num_kv_heads == 0, "KV heads do not divide"
    return max(1, num_kv_heads // ranks), max(1, ranks // num_kv_heads)


WRONG.append(("04.5", "assert: AssertionError in place of ValueError", "ValueError is promised", split_kv_heads))


def split_kv_heads(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    if num_heads % ranks or (num_kv_heads % ranks and ranks % num_kv_heads):
        raise ValueError("heads do not divide")
    return max(1, num_kv_heads / ranks), max(1, ranks / num_kv_heads)


WRONG.append(("04.5", "floats come back", "whole heads and whole GPUs: ints", split_kv_heads))


def split_kv_heads(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    if num_heads % ranks:
        raise ValueError("query heads do not divide")
    if ranks < num_kv_heads and num_kv_heads % ranks:
        raise ValueError("KV heads do not divide")
    return max(1, num_kv_heads // ranks), max(1, ranks // num_kv_heads)


WRONG.append(
    (
        "04.5",
        "with more GPUs than KV heads nothing is checked (4 KV heads on 6 GPUs)",
        "ranks must be a multiple of num_kv_heads then",
        split_kv_heads,
    )
)


def split_kv_heads(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    if num_heads % ranks or (num_kv_heads % ranks and ranks % num_kv_heads):
        raise ValueError("heads do not divide")
    return max(1, num_kv_heads // ranks), max(0, ranks // num_kv_heads - 1)


WRONG.append(
    (
        "04.5",
        "copies beyond the first are counted",
        "on how many GPUs a head is kept: 1 where each is kept once",
        split_kv_heads,
    )
)


def split_kv_heads(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    if (num_heads % ranks and ranks % num_heads) or (num_kv_heads % ranks and ranks % num_kv_heads):
        raise ValueError("heads do not divide")
    return max(1, num_kv_heads // ranks), max(1, ranks // num_kv_heads)


WRONG.append(
    (
        "04.5",
        "more GPUs than query heads are let through",
        "every GPU gets whole query heads: ranks divides num_heads",
        split_kv_heads,
    )
)


def split_kv_heads(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    if num_heads % ranks:
        raise ValueError("query heads do not divide")
    if num_kv_heads % ranks == 0:
        return num_kv_heads // ranks, 1
    return num_kv_heads, ranks


WRONG.append(
    (
        "04.5",
        "where KV heads do not divide all are kept everywhere",
        "a GPU keeps only the KV heads that its query heads read",
        split_kv_heads,
    )
)


def split_kv_heads(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    if num_heads % ranks or (num_kv_heads % ranks and ranks % num_kv_heads):
        raise ValueError("heads do not divide")
    return max(1, num_kv_heads // ranks), max(1, ranks // (num_heads // num_kv_heads))


WRONG.append(
    (
        "04.5",
        "copies from the size of a group of query heads, not from the number of KV heads",
        "GPUs / KV heads",
        split_kv_heads,
    )
)

# ---------------------------------------------------------------------------------------------------- 04.5 right


def split_kv_heads(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    if num_heads % ranks:
        raise ValueError(num_heads, ranks)
    common = math.gcd(num_kv_heads, ranks)
    if common not in (num_kv_heads, ranks):
        raise ValueError(f"{num_kv_heads=} {ranks=}")
    return num_kv_heads // common, ranks // common


RIGHT.append(("04.5", "gcd", split_kv_heads))


def split_kv_heads(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    def whole(a: int, b: int) -> int:
        quotient, rest = divmod(a, b)
        if rest:
            raise ValueError(f"{b} does not divide {a}")
        return quotient

    whole(num_heads, ranks)
    if num_kv_heads >= ranks:
        return whole(num_kv_heads, ranks), 1
    return 1, whole(ranks, num_kv_heads)


RIGHT.append(("04.5", "divmod in a closure that raises", split_kv_heads))


def split_kv_heads(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    # each GPU's query heads, and the KV heads that they read
    queries = np.arange(num_heads)
    try:
        read = queries.reshape(ranks, -1) // (num_heads // num_kv_heads)
    except ValueError:
        raise ValueError(f"{num_heads} query heads do not divide over {ranks} GPUs") from None
    if max(num_kv_heads, ranks) % min(num_kv_heads, ranks):
        raise ValueError(f"{num_kv_heads} KV heads, {ranks} GPUs")
    kept = [frozenset(row.tolist()) for row in read]
    return len(kept[0]), sum(0 in heads for heads in kept)


RIGHT.append(("04.5", "counted: which KV heads each GPU's queries read", split_kv_heads))

# ---------------------------------------------------------------------------------------------------- 04.6 wrong

grouped_attention = earlier_grouped_attention


def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    times = q.shape[1] // k.shape[1]
    k = k[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)
    v = v[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)
    cache.append(k, v)
    return grouped_attention(q, *cache.read())


WRONG.append(
    (
        "04.6",
        "still repeated before append, with expand and flatten",
        "the cache holds a K and V per query head",
        cached_attention,
    )
)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    cache.append(k, v)
    times = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(times, dim=1) for x in cache.read())
    return grouped_attention(q, keys, values)


WRONG.append(
    (
        "04.6",
        "repeated after read",
        "each step copies all that is held; grouped_attention takes K and V as they are",
        cached_attention,
    )
)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    cache.append(k, v)
    return grouped_attention(q, k, v)


WRONG.append(
    ("04.6", "attends to the new tokens only", "read what the cache holds: older tokens are missing", cached_attention)
)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    if cache.seq_len:
        keys, values = cache.read()
        keys, values = torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
    else:
        keys, values = k, v
    cache.append(k, v)
    return grouped_attention(q, keys, values)


WRONG.append(
    (
        "04.6",
        "reads first and concatenates the new tokens itself",
        "append, then read: no step may copy what is held",
        cached_attention,
    )
)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    cache.append(k, v)
    keys, values = cache.read()
    return F.scaled_dot_product_attention(q, keys, values, is_causal=q.shape[2] > 1, enable_gqa=True)


WRONG.append(
    (
        "04.6",
        "SDPA with is_causal: right for a prompt and for single tokens, wrong for a second piece",
        "new tokens are the last of those held; is_causal takes them for the first",
        cached_attention,
    )
)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    cache.append(k, v)
    keys, values = cache.read()
    times = q.shape[1] // keys.shape[1]
    heads = [
        grouped_attention(q[:, h : h + 1], keys[:, h // times, None], values[:, h // times, None])
        for h in range(q.shape[1])
    ]
    return torch.cat(heads, dim=1)


WRONG.append(
    (
        "04.6",
        "head by head: K and V read num_queries_per_kv times",
        "read each KV head once for all its queries",
        cached_attention,
    )
)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    cache.append(k[:, :, -1:], v[:, :, -1:])
    return grouped_attention(q, *cache.read())


WRONG.append(("04.6", "only the newest token is appended", "all new tokens are kept", cached_attention))


def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    cache.append(k, v)
    keys, values = (x.clone() for x in cache.read())
    return grouped_attention(q, keys, values)


WRONG.append(("04.6", "all that is held is cloned at each step", "no step may copy what is held", cached_attention))


def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    cache.append(k, v)
    keys, values = cache.read()
    keys *= q.shape[-1] ** -0.5
    b, h, n, d = q.shape
    kv, t = keys.shape[1:3]
    scores = (q.reshape(b, kv, -1, d) @ keys.mT).view(b, h, n, t)
    mask = torch.ones(n, t, dtype=torch.bool, device=q.device).tril(t - n)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return (weights.view(b, kv, -1, t) @ values).view(b, h, n, d)


WRONG.append(
    (
        "04.6",
        "keys scaled in place: the cache itself is changed, again at each step",
        "what read gives is the cache's own: it must stay",
        cached_attention,
    )
)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    cache.append(k, v)
    keys, values = cache.read()
    b, h, n, d = q.shape
    kv = keys.shape[1]
    scores = q.reshape(b, kv, -1, d) @ keys.mT * d**-0.5
    return (scores.softmax(dim=-1) @ values).view(b, h, n, d)


WRONG.append(
    (
        "04.6",
        "without a mask: right token by token only",
        "causal: several new tokens must not see those after them",
        cached_attention,
    )
)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    times = q.shape[1] // k.shape[1]
    cache.append(k, v)
    keys, values = cache.read()
    b, h, n, d = q.shape
    q = q.unflatten(1, (times, -1)).transpose(1, 2).flatten(1, 2)
    out = grouped_attention(q, keys, values)
    return out.unflatten(1, (-1, times)).transpose(1, 2).flatten(1, 2)


WRONG.append(("04.6", "query head h reads KV head h % num_kv_heads", "neighbours share a KV head", cached_attention))

# ---------------------------------------------------------------------------------------------------- 04.6 right


def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    cache.append(k=k, v=v)
    return functools.partial(grouped_attention, q)(*cache.read())


RIGHT.append(("04.6", "partial, keyword arguments", cached_attention))


def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    cache.append(k, v)
    keys, values = cache.read()
    new, held, times = q.shape[2], keys.shape[2], q.shape[1] // keys.shape[1]
    seen = torch.arange(held, device=q.device) <= torch.arange(held - new, held, device=q.device).unsqueeze(-1)
    rows = q.unflatten(1, (-1, times)).flatten(2, 3)
    out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=seen.repeat(times, 1))
    return out.unflatten(2, (times, new)).flatten(1, 2)


RIGHT.append(("04.6", "SDPA on stacked rows, boolean mask", cached_attention))


def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    cache.append(k, v)
    keys, values = cache.read()
    times = q.shape[1] // keys.shape[1]
    parts = (
        grouped_attention(mine, keys[:, g : g + 1], values[:, g : g + 1])
        for g, mine in enumerate(q.split(times, dim=1))
    )
    return torch.cat(tuple(parts), dim=1)


RIGHT.append(("04.6", "KV head by KV head, each a view, generator expression", cached_attention))


def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    cache.append(k, v)
    keys, values = cache.read()
    b, h, n, d = q.shape
    kv, t = keys.shape[1:3]
    scores = torch.einsum("bgrd,bgtd->bgrt", q.reshape(b, kv, -1, d), keys) / math.sqrt(d)
    late = torch.ones(n, t, dtype=torch.bool, device=q.device).triu_(t - n + 1)
    scores.view(b, h, n, t).masked_fill_(late, -torch.inf)
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(values.dtype)
    return torch.einsum("bgrt,bgtd->bgrd", weights, values).reshape(b, h, n, d)


RIGHT.append(("04.6", "einsum written out, masked in place in its own scores, float32 softmax", cached_attention))


def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    cache.append(k, v)
    keys, values = cache.read()
    mask = torch.ones(q.shape[2], keys.shape[2], dtype=torch.bool, device=q.device)
    mask = mask.tril(diagonal=keys.shape[2] - q.shape[2])
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)


RIGHT.append(("04.6", "SDPA with enable_gqa and a mask aligned at the end", cached_attention))


# Whoever wrote this took it for wrong: in bfloat16 it writes out all that is held. It was accepted, and the blank says
# since then what 04.1 always said, that a cast does not count as a copy.
def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    cache.append(k, v)
    keys, values = cache.read()
    return grouped_attention(q.float(), keys.float(), values.float()).to(q.dtype)


RIGHT.append(("04.6", "K and V widened to float32 at each step", cached_attention))
