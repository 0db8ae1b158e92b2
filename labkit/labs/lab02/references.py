"""What fills the blanks of lab 02: ordinary code with the signatures of the stubs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.attention import fused_attention as attention
from labkit.cache import Cache
from labkit.course.plug import AttentionLayer
from labkit.llama import Llama
from labkit.specs import ModelSpec


class GrowingCache:
    """K and V of one layer, longer with every append. `seq_len`: tokens held, 0 at first."""

    def __init__(self) -> None:
        self.seq_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        """Put new tokens behind those held; k and v are [batch, num_kv_heads, new_tokens, head_dim]."""
        if self.seq_len == 0:
            self.k, self.v = k, v
        else:
            self.k = torch.cat((self.k, k), dim=2)
            self.v = torch.cat((self.v, v), dim=2)
        self.seq_len = self.k.shape[2]

    def read(self) -> tuple[Tensor, Tensor]:
        """k and v of every token held, both [batch, num_kv_heads, seq_len, head_dim]."""
        return self.k, self.v


def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
    """The attention output of one new token, [batch, 1, hidden_size]; K and V held are neither repeated nor copied.

    x: the new token's hidden state, [batch, 1, hidden_size]. cache: what the layer holds of the tokens before it.
    layer.project(x): q [batch, num_heads, 1, head_dim] and k, v [batch, num_kv_heads, 1, head_dim], not yet rotated.
    layer.rotate(t, position): q or k, turned to the position it stands at. layer.merge(out): heads to hidden state.
    """
    q, k, v = layer.project(x)
    position = cache.seq_len
    cache.append(layer.rotate(k, position), v)
    keys, values = cache.read()
    return layer.merge(attention(layer.rotate(q, position), keys, values))


def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    """The likeliest next tokens, one after the other: int [batch, max_new_tokens].

    tokens: int [batch, prompt_tokens], at least one. They follow whatever `cache` holds already.
    model(tokens, cache, last_only=True): logits [batch, 1, vocab_size] of the last token; appends to the cache. Those
    of earlier tokens, which plain model(tokens, cache) computes too, are work that nobody reads.
    """
    new: list[Tensor] = []
    fed = tokens
    for _ in range(max_new_tokens):
        logits = model(fed, cache, last_only=True)
        fed = logits[:, -1:].argmax(dim=-1)
        new.append(fed)
    return torch.cat(new, dim=1)


class PreallocatedCache:
    """K and V of one layer, in memory that is allocated once. `seq_len`: tokens held, 0 at first.

    capacity: room, in tokens. The first append tells batch, heads, head_dim, dtype and device: allocate then.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.seq_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        """Write new tokens in place; ValueError, and nothing changed, when they do not fit."""
        batch, num_kv_heads, new_tokens, head_dim = k.shape
        end = self.seq_len + new_tokens
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit into a cache made for {self.capacity}")
        if self.seq_len == 0:
            self.k = k.new_empty(batch, num_kv_heads, self.capacity, head_dim)
            self.v = torch.empty_like(self.k)
        self.k[:, :, self.seq_len : end] = k
        self.v[:, :, self.seq_len : end] = v
        self.seq_len = end

    def read(self) -> tuple[Tensor, Tensor]:
        """k and v of the tokens held, both [batch, num_kv_heads, seq_len, head_dim], without a copy."""
        return self.k[:, :, : self.seq_len], self.v[:, :, : self.seq_len]


def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    """How many tokens of `wanted` need not be run, because the cache holds their K and V.

    held: the tokens in the cache, in order; it may be empty. wanted: the next prompt, whole; at least one token.
    The last token of `wanted` is always run: the next token's logits come from it.
    """
    same = 0
    for old, new in zip(held, wanted, strict=False):
        if old != new:
            break
        same += 1
    return min(same, len(wanted) - 1)


def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    """Bytes of a model's K and V: all layers, `tokens` tokens in each of `batch` rows.

    spec: num_layers, num_heads, num_kv_heads, head_dim, hidden_size, ... of the model.
    bytes_per_element: 4 for float32, 2 for float16 and bfloat16.
    """
    per_token = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * bytes_per_element
    return per_token * tokens * batch


def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the newest tokens over everything held, themselves included.

    q: [batch, num_heads, new_tokens, head_dim]. k, v: [batch, num_kv_heads, kv_len, head_dim], kv_len >= new_tokens.
    Returns [batch, num_heads, new_tokens, head_dim].
    """
    new_tokens, kv_len = q.shape[2], k.shape[2]
    mask = torch.ones(new_tokens, kv_len, dtype=torch.bool, device=q.device).tril(kv_len - new_tokens)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
