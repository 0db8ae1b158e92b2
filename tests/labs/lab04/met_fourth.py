"""Answers that lab 04's checks had not seen when they met: their author knew the notebook, not the checks."""

# ruff: noqa: F811

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.cache import LayerCache
from labkit.labs.lab04 import references
from labkit.specs import Layer, ModelSpec
from tests.labs.noting import noting

WRONG, RIGHT, wrong, right = noting(references)


# 04.1 · grouped attention without expanding


@wrong("04.1", "mask counted from the first key", "the new tokens are the last of the keys: shift the diagonal")
def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, new, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    rows = q.reshape(batch, kv_heads, heads // kv_heads * new, head_dim)
    scores = (rows @ k.mT * head_dim**-0.5).view(batch, heads, new, kv_len)
    if new > 1:
        seen = torch.ones(new, kv_len, dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    weights = scores.softmax(dim=-1).view(batch, kv_heads, -1, kv_len)
    return (weights @ v).view(batch, heads, new, head_dim)


@wrong("04.1", "query head h reads KV head h % kv_heads", "neighbouring query heads share: h // num_queries_per_kv")
def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, new, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    rows = q.unflatten(1, (-1, kv_heads)).transpose(1, 2).reshape(batch, kv_heads, -1, head_dim)
    seen = torch.ones(new, kv_len, dtype=torch.bool, device=q.device).tril(kv_len - new)
    scores = (rows @ k.mT * head_dim**-0.5).masked_fill(~seen.repeat(heads // kv_heads, 1), float("-inf"))
    out = (scores.softmax(dim=-1) @ v).unflatten(2, (-1, new))
    return out.transpose(1, 2).reshape(batch, heads, new, head_dim)


@wrong("04.1", "the mask's rows repeated in another order than q's", "rows are head by head, then token: the mask too")
def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, new, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    times = heads // kv_heads
    rows = q.reshape(batch, kv_heads, times * new, head_dim)
    seen = torch.ones(new, kv_len, dtype=torch.bool, device=q.device).tril(kv_len - new)
    seen = seen.repeat_interleave(times, dim=0)
    scores = (rows @ k.mT * head_dim**-0.5).masked_fill(~seen, float("-inf"))
    return (scores.softmax(dim=-1) @ v).reshape(batch, heads, new, head_dim)


@wrong("04.1", "q is scaled in place", "the caller's q has changed: an input is not yours to write")
def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, new, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    q *= head_dim**-0.5
    rows = q.reshape(batch, kv_heads, heads // kv_heads * new, head_dim)
    scores = (rows @ k.mT).unflatten(2, (-1, new))
    if new > 1:
        late = torch.ones(new, kv_len, dtype=torch.bool, device=q.device).triu(kv_len - new + 1)
        scores = scores.masked_fill(late, float("-inf"))
    out = scores.softmax(dim=-1).flatten(2, 3) @ v
    return out.reshape(batch, heads, new, head_dim)


@wrong("04.1", "each query head reads its KV head anew", "K and V are read once per KV head, not once per query head")
def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads, new = q.shape[1], q.shape[2]
    times, kv_len = heads // k.shape[1], k.shape[2]
    late = torch.ones(new, kv_len, dtype=torch.bool, device=q.device).triu(kv_len - new + 1)
    outs = []
    for head in range(heads):
        scores = q[:, head] @ k[:, head // times].mT * q.shape[-1] ** -0.5
        outs.append(scores.masked_fill(late, float("-inf")).softmax(dim=-1) @ v[:, head // times])
    return torch.stack(outs, dim=1)


@wrong("04.1", "K and V broadcast to all query heads by the product", "made anew below `@`: stack the queries as rows")
def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    new, kv_len = q.shape[2], k.shape[2]
    grouped = q.unflatten(1, (k.shape[1], -1))
    late = torch.ones(new, kv_len, dtype=torch.bool, device=q.device).triu(kv_len - new + 1)
    scores = grouped @ k.unsqueeze(2).mT * q.shape[-1] ** -0.5
    weights = scores.masked_fill(late, float("-inf")).softmax(dim=-1)
    return (weights @ v.unsqueeze(2)).flatten(1, 2)


@wrong("04.1", "PyTorch's own grouping", "enable_gqa is not allowed here: group the queries yourself")
def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    new, kv_len = q.shape[2], k.shape[2]
    seen = torch.ones(new, kv_len, dtype=torch.bool, device=q.device).tril(kv_len - new)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


@wrong("04.1", "masked after the softmax", "hidden keys keep their share of the sum: mask the scores before")
def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, new, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    rows = q.reshape(batch, kv_heads, -1, head_dim)
    weights = (rows @ k.mT * head_dim**-0.5).softmax(dim=-1)
    seen = torch.ones(new, kv_len, dtype=weights.dtype, device=q.device).tril(kv_len - new)
    weights = weights * seen.repeat(heads // kv_heads, 1)
    return (weights @ v).reshape(batch, heads, new, head_dim)


@wrong("04.1", "scaled by head_dim, the root forgotten", "the scale is head_dim ** -0.5")
def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, new, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    rows = q.reshape(batch, kv_heads, heads // kv_heads * new, head_dim)
    seen = torch.ones(new, kv_len, dtype=torch.bool, device=q.device).tril(kv_len - new)
    scores = (rows @ k.mT / head_dim).unflatten(2, (-1, new))
    weights = torch.where(seen, scores, float("-inf")).softmax(dim=-1)
    return (weights.flatten(2, 3) @ v).reshape(batch, heads, new, head_dim)


@right("04.1", "a loop over KV heads, products of three dimensions")
def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, new, head_dim = q.shape
    times, kv_len = heads // k.shape[1], k.shape[2]
    late = torch.ones(new, kv_len, dtype=torch.bool, device=q.device).triu(kv_len - new + 1)
    outs = []
    for group, some in enumerate(q.split(times, dim=1)):
        scores = torch.bmm(some.reshape(batch, times * new, head_dim), k[:, group].mT) * head_dim**-0.5
        scores = scores.view(batch, times, new, kv_len).masked_fill(late, -torch.inf)
        out = torch.bmm(scores.softmax(dim=-1).view(batch, times * new, kv_len), v[:, group])
        outs.append(out.view(batch, times, new, head_dim))
    return torch.cat(outs, dim=1)


@right("04.1", "blocks of keys, with the softmax carried along in float32 or wider")
def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, new, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = q.reshape(batch, kv_heads, heads // kv_heads * new, head_dim).to(wide) * head_dim**-0.5
    position = torch.arange(kv_len - new, kv_len, device=q.device).repeat(heads // kv_heads)[:, None]
    highest = rows.new_full((*rows.shape[:3], 1), -torch.inf)
    total, out = torch.zeros_like(highest), torch.zeros_like(rows)
    for start in range(0, kv_len, 64):
        keys, values = (x[:, :, start : start + 64].to(wide) for x in (k, v))
        late = torch.arange(start, start + keys.shape[2], device=q.device) > position
        scores = (rows @ keys.mT).masked_fill(late, -torch.inf)
        higher = torch.maximum(highest, scores.amax(dim=-1, keepdim=True))
        weights, shrink = (scores - higher).exp(), (highest - higher).exp()
        total = total * shrink + weights.sum(dim=-1, keepdim=True)
        out = out * shrink + weights @ values
        highest = higher
    return (out / total).to(q.dtype).reshape(batch, heads, new, head_dim)


@right("04.1", "einsum with a letter for the group, the mask added")
def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    new, kv_len = q.shape[2], k.shape[2]
    grouped = q.unflatten(1, (k.shape[1], q.shape[1] // k.shape[1]))
    hidden = torch.full((new, kv_len), -torch.inf, dtype=q.dtype, device=q.device).triu(kv_len - new + 1)
    scores = torch.einsum("bgrnd,bgkd->bgrnk", grouped, k) * q.shape[-1] ** -0.5 + hidden
    return torch.einsum("bgrnk,bgkd->bgrnd", scores.softmax(dim=-1), v).flatten(1, 2)


# 04.2 · as many KV heads as fit


@wrong("04.2", "powers of two only", "28 or 40 heads have other divisors too")
def most_kv_heads(spec: ModelSpec, tokens: int, batch: int, room: int, bytes_per_element: int) -> int:
    per_head = 2 * spec.num_layers * spec.head_dim * tokens * batch * bytes_per_element
    count = spec.num_heads
    while count > 1 and count * per_head > room:
        count //= 2
    return count if spec.num_heads % count == 0 and count * per_head <= room else 0


@wrong("04.2", "no more KV heads than the model has", "how many it has is not asked: up to num_heads")
def most_kv_heads(spec: ModelSpec, tokens: int, batch: int, room: int, bytes_per_element: int) -> int:
    per_head = 2 * spec.num_layers * spec.head_dim * tokens * batch * bytes_per_element
    for count in range(spec.num_kv_heads, 0, -1):
        if spec.num_heads % count == 0 and count * per_head <= room:
            return count
    return 0


@wrong("04.2", "a cache that fills the room to the byte is refused", "equal fits")
def most_kv_heads(spec: ModelSpec, tokens: int, batch: int, room: int, bytes_per_element: int) -> int:
    per_head = 2 * spec.num_layers * spec.head_dim * tokens * batch * bytes_per_element
    fitting = [n for n in range(1, spec.num_heads + 1) if spec.num_heads % n == 0 and n * per_head < room]
    return max(fitting, default=0)


@wrong("04.2", "the common divisor of the heads and of what fits", "not the largest: 12 fit, 32 heads: 8, not 4")
def most_kv_heads(spec: ModelSpec, tokens: int, batch: int, room: int, bytes_per_element: int) -> int:
    per_head = 2 * spec.num_layers * spec.head_dim * tokens * batch * bytes_per_element
    affordable = min(room // per_head, spec.num_heads)
    return math.gcd(spec.num_heads, affordable) if affordable > 0 else 0


@wrong("04.2", "as many KV heads as heads is never tried", "MHA is an answer too: include num_heads")
def most_kv_heads(spec: ModelSpec, tokens: int, batch: int, room: int, bytes_per_element: int) -> int:
    per_head = 2 * spec.num_layers * spec.head_dim * tokens * batch * bytes_per_element
    best = 0
    for count in range(1, spec.num_heads // 2 + 1):
        if spec.num_heads % count == 0 and count * per_head <= room:
            best = count
    return best


@wrong("04.2", "at least one head, whether or not it fits", "0 when not even one KV head fits")
def most_kv_heads(spec: ModelSpec, tokens: int, batch: int, room: int, bytes_per_element: int) -> int:
    per_head = 2 * spec.num_layers * spec.head_dim * tokens * batch * bytes_per_element
    count = spec.num_heads
    while count > 1 and (count * per_head > room or spec.num_heads % count):
        count -= 1
    return count


@wrong("04.2", "head_dim guessed as hidden_size / num_heads", "head_dim is in the spec")
def most_kv_heads(spec: ModelSpec, tokens: int, batch: int, room: int, bytes_per_element: int) -> int:
    head_dim = spec.hidden_size // spec.num_heads
    one = 2 * spec.num_layers * head_dim * tokens * batch * bytes_per_element
    return max((n for n in range(1, spec.num_heads + 1) if spec.num_heads % n == 0 and n * one <= room), default=0)


@right("04.2", "takewhile over the divisors, smallest first")
def most_kv_heads(spec: ModelSpec, tokens: int, batch: int, room: int, bytes_per_element: int) -> int:
    per_head = math.prod((2, spec.num_layers, spec.head_dim, tokens, batch, bytes_per_element))
    divisors = (n for n in range(1, spec.num_heads + 1) if not spec.num_heads % n)
    *_, last = 0, *itertools.takewhile(lambda n: n * per_head <= room, divisors)
    return last


@right("04.2", "query heads per KV head tried from 1 up, recursively")
def most_kv_heads(spec: ModelSpec, tokens: int, batch: int, room: int, bytes_per_element: int) -> int:
    def with_sharing(queries_per_kv: int) -> int:
        if queries_per_kv > spec.num_heads:
            return 0
        count, rest = divmod(spec.num_heads, queries_per_kv)
        needed = 2 * spec.num_layers * count * spec.head_dim * tokens * batch * bytes_per_element
        return count if rest == 0 and needed <= room else with_sharing(queries_per_kv + 1)

    return with_sharing(1)


# 04.3 · what each kind of layer keeps


@wrong("04.3", "a latent counted for K and for V", "one vector, from which both are made")
def layer_elements(layer: Layer, seq_len: int) -> int:
    if layer.kind == "latent":
        return 2 * layer.latent_dim * seq_len
    if layer.kind in ("shared", "state"):
        return 0
    tokens = seq_len if layer.kind == "full" else min(seq_len, layer.window)
    return layer.num_kv_heads * (layer.k_dim + layer.v_dim) * tokens


@wrong("04.3", "a window is counted whole before it is full", "no more tokens than there are")
def layer_elements(layer: Layer, seq_len: int) -> int:
    per_token = layer.num_kv_heads * (layer.k_dim + layer.v_dim)
    return {
        "full": per_token * seq_len,
        "window": per_token * (layer.window or 0),
        "latent": layer.latent_dim * seq_len,
        "shared": 0,
        "state": 0,
    }[layer.kind]


@wrong("04.3", "the state's bytes are counted", "a state is no K and V and is not counted here")
def layer_elements(layer: Layer, seq_len: int) -> int:
    if layer.kind == "state":
        return layer.state_bytes
    if layer.kind == "shared":
        return 0
    if layer.kind == "latent":
        return layer.latent_dim * seq_len
    tokens = min(seq_len, layer.window) if layer.kind == "window" else seq_len
    return layer.num_kv_heads * (layer.k_dim + layer.v_dim) * tokens


@wrong("04.3", "values are taken to be as wide as keys", "v_dim may differ from k_dim")
def layer_elements(layer: Layer, seq_len: int) -> int:
    match layer.kind:
        case "full":
            return 2 * layer.num_kv_heads * layer.k_dim * seq_len
        case "window":
            return 2 * layer.num_kv_heads * layer.k_dim * min(seq_len, layer.window)
        case "latent":
            return layer.latent_dim * seq_len
        case _:
            return 0


@wrong("04.3", "a state is refused", "a layer of kind state has no K and V: 0, no error")
def layer_elements(layer: Layer, seq_len: int) -> int:
    numbers = layer.num_kv_heads * (layer.k_dim + layer.v_dim)
    if layer.kind == "full":
        return numbers * seq_len
    if layer.kind == "window":
        return numbers * min(seq_len, layer.window)
    if layer.kind == "latent":
        return layer.latent_dim * seq_len
    if layer.kind == "shared":
        return 0
    raise ValueError(f"no such kind: {layer.kind}")


@wrong("04.3", "a latent per KV head", "one vector of latent_dim numbers for all heads together")
def layer_elements(layer: Layer, seq_len: int) -> int:
    tokens = {"full": seq_len, "latent": seq_len, "window": min(seq_len, layer.window or seq_len)}.get(layer.kind, 0)
    width = layer.latent_dim if layer.kind == "latent" else layer.k_dim + layer.v_dim
    return layer.num_kv_heads * width * tokens


@right("04.3", "a table of functions, with a default")
def layer_elements(layer: Layer, seq_len: int) -> int:
    def keys_and_values(tokens: int) -> int:
        return sum(layer.num_kv_heads * width * tokens for width in (layer.k_dim, layer.v_dim))

    kept = {
        "full": lambda: keys_and_values(seq_len),
        "window": lambda: keys_and_values(sorted((layer.window, seq_len))[0]),
        "latent": lambda: seq_len * layer.latent_dim,
    }
    return kept.get(layer.kind, int)()


@right("04.3", "a slice of a range as long as the text; match")
def layer_elements(layer: Layer, seq_len: int) -> int:
    text = range(seq_len)
    match layer:
        case Layer(kind="latent", latent_dim=width):
            return len(text) * width
        case Layer(kind="full" | "window" as kind, num_kv_heads=heads, k_dim=k, v_dim=v):
            held = text if kind == "full" else text[-layer.window :]
            return len(held) * heads * (k + v)
        case Layer(kind="shared" | "state"):
            return 0
    raise ValueError(layer.kind)


# 04.4 · merge KV heads


@wrong("04.4", "heads that are not neighbours are merged", "a group is `group` heads in a row")
def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    parts = weight.unflatten(0, (group, num_kv_heads // group, -1))
    return parts.mean(dim=0).flatten(0, 1)


@wrong("04.4", "neighbouring rows are averaged, within a head", "average heads, row i with row i, not rows of one head")
def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    return weight.unflatten(0, (-1, group)).mean(dim=1)


@wrong("04.4", "summed up in the weight's own memory", "the weight that came in has changed: work on a copy")
def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    parts = weight.detach().unflatten(0, (num_kv_heads // group, group, -1))
    merged = parts[:, 0]
    for index in range(1, group):
        merged += parts[:, index]
    return (merged / group).flatten(0, 1)


@wrong("04.4", "all heads merged into one, whatever the group", "num_kv_heads // group heads are to remain")
def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    return weight.unflatten(0, (num_kv_heads, -1)).mean(dim=0)


@wrong("04.4", "for a matrix only", "a bias has one dimension, and is merged too")
def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    head_dim, hidden_size = weight.shape[0] // num_kv_heads, weight.shape[-1]
    parts = weight.reshape(num_kv_heads // group, group, head_dim, hidden_size)
    return parts.mean(dim=1).reshape(-1, hidden_size)


@wrong("04.4", "the mean stands in each head's place", "num_kv_heads // group heads come back, not as many as before")
def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    parts = weight.unflatten(0, (num_kv_heads // group, group, -1))
    return parts.mean(dim=1, keepdim=True).expand_as(parts).flatten(0, 2)


@wrong("04.4", "divided by the root of the group, to keep the length", "the mean divides by group")
def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    parts = weight.unflatten(0, (num_kv_heads // group, group, -1))
    return (parts.sum(dim=1) / group**0.5).flatten(0, 1)


@right("04.4", "a product with a matrix that averages, in float64")
def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    head_dim = weight.shape[0] // num_kv_heads
    by_head = torch.eye(num_kv_heads // group, dtype=torch.float64, device=weight.device).repeat_interleave(group, 1)
    averaging = torch.kron(by_head / group, torch.eye(head_dim, dtype=torch.float64, device=weight.device))
    return (averaging @ weight.double()).to(weight.dtype)


@right("04.4", "slices of rows: one group after another, one member after another")
def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    heads = weight.chunk(num_kv_heads, dim=0)
    merged = []
    for start in range(0, num_kv_heads, group):
        total = torch.zeros_like(heads[start], dtype=torch.promote_types(weight.dtype, torch.float32))
        for head in heads[start : start + group]:
            total = total + head
        merged.append(total.div(group).to(weight.dtype))
    return torch.cat(merged)


@right("04.4", "strided views: member i of every group, stacked")
def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    heads = weight.reshape(num_kv_heads, weight.shape[0] // num_kv_heads, *weight.shape[1:])
    members = torch.stack([heads[member::group] for member in range(group)], dim=-1)
    return members.mean(dim=-1).reshape(weight.shape[0] // group, *weight.shape[1:])


# 04.5 · KV heads over many GPUs


@wrong("04.5", "KV heads and ranks that do not divide each other pass", "ValueError for 4 KV heads on 6 GPUs")
def split_kv_heads(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    if num_heads % ranks:
        raise ValueError(f"{num_heads} query heads do not divide over {ranks} GPUs")
    return max(1, num_kv_heads // ranks), max(1, ranks // num_kv_heads)


@wrong("04.5", "query heads are not looked at", "ValueError when the query heads do not divide: 28 on 8")
def split_kv_heads(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    if num_kv_heads % ranks == 0:
        return num_kv_heads // ranks, 1
    if ranks % num_kv_heads == 0:
        return 1, ranks // num_kv_heads
    raise ValueError(f"{num_kv_heads} KV heads do not divide over {ranks} GPUs, nor the other way round")


@wrong("04.5", "beyond the KV heads, each GPU keeps all of them", "it keeps what its query heads read: one KV head")
def split_kv_heads(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    if num_heads % ranks or (num_kv_heads % ranks and ranks % num_kv_heads):
        raise ValueError("the heads do not divide")
    if ranks > num_kv_heads:
        return num_kv_heads, ranks
    return num_kv_heads // ranks, 1


@wrong("04.5", "more GPUs than KV heads are refused", "several GPUs may keep the same KV head")
def split_kv_heads(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    if num_heads % ranks or num_kv_heads % ranks:
        raise ValueError(f"{num_heads} heads, {num_kv_heads} KV heads do not divide over {ranks} GPUs")
    return num_kv_heads // ranks, 1


@wrong("04.5", "an assertion in place of ValueError", "ValueError is promised: a caller catches that")
def split_kv_heads(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    assert num_heads % ranks == 0, "query heads do not divide"
    assert num_kv_heads % ranks == 0 or ranks % num_kv_heads == 0, "KV heads do not divide"
    return max(1, num_kv_heads // ranks), max(1, ranks // num_kv_heads)


@wrong("04.5", "copies counted by the queries that share a KV head", "copies are GPUs over KV heads")
def split_kv_heads(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    if num_heads % ranks or (num_kv_heads % ranks and ranks % num_kv_heads):
        raise ValueError("the heads do not divide")
    if ranks <= num_kv_heads:
        return num_kv_heads // ranks, 1
    return 1, num_heads // num_kv_heads


@right("04.5", "a fraction in lowest terms: one of its two numbers is 1")
def split_kv_heads(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    share = Fraction(num_kv_heads, ranks)
    if Fraction(num_heads, ranks).denominator != 1 or 1 not in share.as_integer_ratio():
        raise ValueError(f"{num_heads} query heads and {num_kv_heads} KV heads do not divide over {ranks} GPUs")
    return share.as_integer_ratio()


@right("04.5", "the query heads dealt out, and what they read collected")
def split_kv_heads(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    if num_heads % ranks:
        raise ValueError("each GPU gets whole query heads, and equally many")
    small, large = sorted((num_kv_heads, ranks))
    if large % small:
        raise ValueError("neither KV heads nor GPUs divide the other")
    kept: list[set[int]] = [set() for _ in range(ranks)]
    for head in range(num_heads):
        kept[head * ranks // num_heads].add(head * num_kv_heads // num_heads)
    return len(kept[0]), sum(0 in heads for heads in kept)


# 04.6 · debug


@wrong("04.6", "half mended: repeated after reading", "each step copies all that is held: do not repeat at all")
def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    cache.append(k, v)
    keys, values = cache.read()
    times = q.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(times, dim=1), values.repeat_interleave(times, dim=1)
    return references.grouped_attention(q, keys, values)


@wrong("04.6", "expanded after reading, as if that were a view only", "flattening an expanded view copies it")
def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    cache.append(k, v)
    times = q.shape[1] // k.shape[1]
    keys, values = (x[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) for x in cache.read())
    mask = torch.ones(q.shape[2], keys.shape[2], dtype=torch.bool, device=q.device).tril(keys.shape[2] - q.shape[2])
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


@wrong(
    "04.6", "is_causal whenever there are several new tokens", "is_causal counts from the first key: wrong after a past"
)
def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    cache.append(k, v)
    keys, values = cache.read()
    return F.scaled_dot_product_attention(q, keys, values, is_causal=q.shape[2] > 1, enable_gqa=True)


@wrong("04.6", "the new tokens meet only each other", "attention is over all that the cache holds: read it")
def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    cache.append(k, v)
    return references.grouped_attention(q, k, v)


@wrong("04.6", "what is held is joined to the new tokens once more", "no step may copy what is held: append, then read")
def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    keys, values = k, v
    if cache.seq_len:
        past_k, past_v = cache.read()
        keys, values = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)
    cache.append(k, v)
    return references.grouped_attention(q, keys, values)


@wrong(
    "04.6", "heads mended, and kept in another dtype besides", "K and V are kept as they came: rounding loses digits"
)
def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    cache.append(k.bfloat16(), v.bfloat16())
    keys, values = (x.to(q.dtype) for x in cache.read())
    return references.grouped_attention(q, keys, values)


@wrong("04.6", "no mask", "several new tokens see those that come after them")
def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    cache.append(k, v)
    return F.scaled_dot_product_attention(q, *cache.read(), enable_gqa=True)


@right("04.6", "enable_gqa with a mask from positions")
def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    cache.append(k, v)
    held = dict(zip(("key", "value"), cache.read(), strict=True))
    keys = torch.arange(held["key"].shape[2], device=q.device)
    seen = keys <= keys[-q.shape[2] :, None]
    return F.scaled_dot_product_attention(query=q, **held, attn_mask=seen, enable_gqa=True)


@right("04.6", "by hand, one KV head after another")
def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    cache.append(k, v)
    keys, values = cache.read()
    batch, heads, new, head_dim = q.shape
    times, kv_len = heads // keys.shape[1], keys.shape[2]
    late = torch.ones(new, kv_len, dtype=torch.bool, device=q.device).triu(kv_len - new + 1)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for group in range(keys.shape[1]):
        mine = slice(group * times, (group + 1) * times)
        rows = q[:, mine].reshape(batch, times * new, head_dim)
        scores = (rows @ keys[:, group].mT).mul_(head_dim**-0.5).view(batch, times, new, kv_len)
        weights = scores.masked_fill_(late, -torch.inf).softmax(dim=-1).view(batch, times * new, kv_len)
        out[:, mine] = (weights @ values[:, group]).view(batch, times, new, head_dim)
    return out


@right("04.6", "the cache's own attend")
def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    cache.append(k, v)
    return cache.attend(q)
