"""What fills the blanks of lab 04: ordinary code with the signatures of the stubs."""

from __future__ import annotations

import torch
from torch import Tensor

from labkit.cache import LayerCache
from labkit.specs import Layer, ModelSpec


def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the newest tokens; K and V are neither repeated nor copied, and each is read once.

    q: [batch, num_heads, new_tokens, head_dim]. k, v: [batch, num_kv_heads, kv_len, head_dim], the new tokens included.
    Query head h reads KV head h // num_queries_per_kv. Returns [batch, num_heads, new_tokens, head_dim]. Not allowed
    here: enable_gqa, PyTorch's own grouping. A cast of k or v does not count as a copy.
    """
    batch, num_heads, new_tokens, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    rows = q.reshape(batch, num_kv_heads, -1, head_dim)
    scores = (rows @ k.mT) * head_dim**-0.5
    scores = scores.view(batch, num_heads, new_tokens, kv_len)
    seen = torch.ones(new_tokens, kv_len, dtype=torch.bool, device=q.device).tril(kv_len - new_tokens)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    out = weights.view(batch, num_kv_heads, -1, kv_len) @ v
    return out.view(batch, num_heads, new_tokens, head_dim)


def most_kv_heads(spec: ModelSpec, tokens: int, batch: int, room: int, bytes_per_element: int) -> int:
    """The most KV heads with which the cache of `batch` requests of `tokens` tokens fits into `room` bytes.

    spec gives num_layers, num_heads and head_dim; how many KV heads it has is not asked. The answer divides
    spec.num_heads, and is 0 when not even one KV head fits.
    """
    one_head = 2 * spec.num_layers * spec.head_dim * bytes_per_element * tokens * batch
    for count in range(spec.num_heads, 0, -1):
        if spec.num_heads % count == 0 and count * one_head <= room:
            return count
    return 0


def layer_elements(layer: Layer, seq_len: int) -> int:
    """Numbers of K and V that one layer's cache holds for one request after `seq_len` tokens.

    layer.kind: "full" keeps K (layer.num_kv_heads x layer.k_dim) and V (layer.num_kv_heads x layer.v_dim) of every
    token; "window" the same of the last layer.window tokens; "latent" one vector of layer.latent_dim numbers per token,
    from which K and V are both made; "shared" nothing, since it reads an earlier layer's; "state" no K and V,
    but something of fixed size that is not counted here.
    """
    if layer.kind == "latent":
        return seq_len * layer.latent_dim
    if layer.kind in ("shared", "state"):
        return 0
    held = seq_len if layer.window is None else min(seq_len, layer.window)
    return held * layer.num_kv_heads * (layer.k_dim + layer.v_dim)


def merge_kv_heads(weight: Tensor, num_kv_heads: int, group: int) -> Tensor:
    """The projection of K or V with every `group` neighbouring heads replaced by their mean.

    weight: [num_kv_heads * head_dim, hidden_size], the rows of head 0 first, or a bias, [num_kv_heads * head_dim].
    Returns num_kv_heads // group heads: [num_kv_heads // group * head_dim, hidden_size], or as long a bias.
    """
    heads = weight.unflatten(0, (num_kv_heads // group, group, -1))
    return heads.mean(dim=1).flatten(0, 1)


def split_kv_heads(num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, int]:
    """KV heads that each of `ranks` GPUs keeps, and on how many GPUs each KV head is kept.

    Every GPU gets as many query heads, whole, and the KV heads that these read. ValueError when the query heads do not
    divide, or when neither of num_kv_heads and ranks divides the other.
    """
    if num_heads % ranks:
        raise ValueError(f"{num_heads} query heads do not divide over {ranks} GPUs")
    if num_kv_heads % ranks and ranks % num_kv_heads:
        raise ValueError(f"{num_kv_heads} KV heads do not divide over {ranks} GPUs, nor the other way round")
    return max(1, num_kv_heads // ranks), max(1, ranks // num_kv_heads)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    """Causal attention of new tokens over all that the layer's cache holds, their own K and V included.

    q: [batch, num_heads, new_tokens, head_dim]. k, v: the new tokens', [batch, num_kv_heads, new_tokens, head_dim].
    cache.append(k, v) keeps them; cache.read() gives (k, v) of all tokens so far. K and V are never repeated; a cast
    does not count as a copy, as in 04.1.
    """
    cache.append(k, v)
    keys, values = cache.read()
    return grouped_attention(q, keys, values)
