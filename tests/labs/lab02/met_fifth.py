"""Answers that lab 02's checks had not seen when they met: their author knew the notebook, not the checks."""

# ruff: noqa: B905, F405, F811, RUF071 - written as learners write

from __future__ import annotations

import math
import os.path

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.labs.lab02 import references
from labkit.labs.lab02.references import *  # noqa: F403
from tests.labs.noting import noting

WRONG, RIGHT, wrong, right = noting(references)


# 02.1
@wrong(
    "02.1",
    "starts from an empty tensor of the lab model's shape",
    "other batches, heads, head_dims or dtypes must fit: the first append tells them",
)
class GrowingCache:
    def __init__(self) -> None:
        self.k = torch.zeros(1, 3, 0, 64)
        self.v = torch.zeros(1, 3, 0, 64)

    @property
    def seq_len(self) -> int:
        return self.k.shape[2]

    def append(self, k: Tensor, v: Tensor) -> None:
        self.k = torch.cat((self.k, k), dim=2)
        self.v = torch.cat((self.v, v), dim=2)

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v


@wrong(
    "02.1",
    "no else: the first append is stored and then joined to itself",
    "the tokens of the first append are held twice",
)
class GrowingCache:
    def __init__(self) -> None:
        self.k = None
        self.v = None

    @property
    def seq_len(self) -> int:
        return 0 if self.k is None else self.k.shape[2]

    def append(self, k: Tensor, v: Tensor) -> None:
        if self.k is None:
            self.k, self.v = k, v
        self.k = torch.cat([self.k, k], dim=2)
        self.v = torch.cat([self.v, v], dim=2)

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v


@wrong(
    "02.1",
    "seq_len is that of the newest append",
    "seq_len counts the tokens of the last append, not all that are held",
)
class GrowingCache:
    def __init__(self) -> None:
        self.k, self.v = None, None
        self.seq_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        self.seq_len = k.shape[2]
        if self.k is None:
            self.k, self.v = k, v
        else:
            self.k = torch.cat((self.k, k), dim=2)
            self.v = torch.cat((self.v, v), dim=2)

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v


@right("02.1", "one tuple that is replaced; seq_len is a property")
class GrowingCache:
    def __init__(self) -> None:
        self.pair = ()

    @property
    def seq_len(self) -> int:
        return self.pair[0].size(-2) if self.pair else 0

    def append(self, k: Tensor, v: Tensor) -> None:
        news = (k, v)
        self.pair = tuple(torch.cat(both, dim=-2) for both in zip(self.pair, news)) if self.pair else news

    def read(self) -> tuple[Tensor, Tensor]:
        return self.pair


# 02.2
@wrong(
    "02.2",
    "rotate is called as if it turned in place: its result is dropped",
    "q and k were never turned: rotate returns a new tensor",
)
def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
    q, k, v = layer.project(x)
    position = cache.seq_len
    layer.rotate(q, position)
    layer.rotate(k, position)
    cache.append(k, v)
    keys, values = cache.read()
    return layer.merge(attention(q, keys, values))


@wrong(
    "02.2",
    "heads laid side by side by hand, without merge's output projection",
    "the output did not go through layer.merge: it is the heads side by side",
)
def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
    q, k, v = layer.project(x)
    position = cache.seq_len
    q, k = layer.rotate(q, position), layer.rotate(k, position)
    cache.append(k, v)
    out = attention(q, *cache.read())
    return out.transpose(1, 2).flatten(2)


STEPS: dict[int, int] = {}


@wrong(
    "02.2",
    "counts its own calls per cache instead of asking the cache",
    "position must come from cache.seq_len: tokens that a prefill put there are not counted",
)
def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
    position = STEPS.get(id(cache), 0)
    STEPS[id(cache)] = position + 1
    q, k, v = layer.project(x)
    cache.append(layer.rotate(k, position), v)
    keys, values = cache.read()
    return layer.merge(attention(layer.rotate(q, position), keys, values))


@right("02.2", "products by hand, queries of a group as rows")
def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
    stands_at = cache.seq_len
    queries, key, value = layer.project(x)
    cache.append(layer.rotate(key, stands_at), value)
    held_k, held_v = cache.read()
    rows = layer.rotate(queries, stands_at).reshape(key.shape[0], key.shape[1], -1, key.shape[3])
    weights = torch.softmax(rows @ held_k.mT / math.sqrt(key.shape[3]), dim=-1)
    return layer.merge((weights @ held_v).reshape(queries.shape))


# 02.3
@wrong("02.3", "empties the cache first", "tokens follow what the cache holds; it was emptied")
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    cache.truncate(0)  # start clean
    logits = model(tokens, cache, last_only=True)
    out = []
    for i in range(max_new_tokens):
        token = logits[:, -1].argmax(dim=-1, keepdim=True)
        out.append(token)
        if i + 1 < max_new_tokens:
            logits = model(token, cache, last_only=True)
    return torch.cat(out, dim=1)


@wrong(
    "02.3",
    "argmax over the whole batch, one number for all rows",
    "each row has a likeliest token of its own: argmax over the vocabulary only",
)
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    batch = tokens.shape[0]
    result = []
    current = tokens
    for _ in range(max_new_tokens):
        logits = model(current, cache, last_only=True)
        best = logits.argmax().item() % logits.shape[-1]
        current = torch.full((batch, 1), best, dtype=tokens.dtype, device=tokens.device)
        result.append(current)
    return torch.cat(result, dim=1)


@wrong(
    "02.3",
    "after the prefill the prompt's last token is run again",
    "the last token of the prompt was run twice: prefill's logits give the first new token",
)
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    model(tokens, cache, last_only=True)  # prefill
    last = tokens[:, -1:]
    generated = []
    for _ in range(max_new_tokens):
        logits = model(last, cache, last_only=True)
        last = logits[:, -1].argmax(-1, keepdim=True)
        generated.append(last)
    return torch.cat(generated, dim=1)


@right("02.3", "recursion")
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    def rest(run: Tensor, count: int) -> list[Tensor]:
        if count == 0:
            return []
        token = model(run, cache, last_only=True).argmax(dim=-1)
        return [token, *rest(token, count - 1)]

    return torch.cat([tokens[:, :0], *rest(tokens, max_new_tokens)], dim=1)


@right("02.3", "written into a tensor of the final size, topk for argmax")
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    said = tokens.new_zeros(tokens.shape[0], max_new_tokens)
    place = 0
    while place < max_new_tokens:
        feed = tokens if place == 0 else said[:, place - 1 : place]
        said[:, place] = model(feed, cache, last_only=True)[:, 0].topk(1, dim=-1).indices[:, 0]
        place += 1
    return said


# 02.4
@wrong("02.4", "one buffer under two names: V overwrites K", "k reads back as v: both names are the same memory")
class PreallocatedCache:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.k = self.v = None
        self.seq_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        new = k.shape[2]
        if self.seq_len + new > self.capacity:
            raise ValueError(f"{new} tokens do not fit: {self.seq_len} of {self.capacity} in use")
        if self.k is None:
            batch, heads, _, head_dim = k.shape
            self.k = self.v = torch.empty(batch, heads, self.capacity, head_dim, dtype=k.dtype, device=k.device)
        self.k[:, :, self.seq_len : self.seq_len + new] = k
        self.v[:, :, self.seq_len : self.seq_len + new] = v
        self.seq_len += new

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k[:, :, : self.seq_len], self.v[:, :, : self.seq_len]


@wrong(
    "02.4",
    "allocates before it refuses: a refused first append leaves its memory behind",
    "a refused first append changed the cache: memory of its shape was allocated",
)
class PreallocatedCache:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.seq_len = 0
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> None:
        if self.k is None:
            b, h, _, d = k.shape
            self.k = k.new_zeros(b, h, self.capacity, d)
            self.v = v.new_zeros(b, h, self.capacity, d)
        end = self.seq_len + k.shape[2]
        if end > self.capacity:
            raise ValueError("the cache is full")
        self.k[:, :, self.seq_len : end] = k
        self.v[:, :, self.seq_len : end] = v
        self.seq_len = end

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k[:, :, : self.seq_len], self.v[:, :, : self.seq_len]


@wrong(
    "02.4",
    "asks only whether it is full, not whether all that comes fits",
    "what fits in part must be a ValueError: ask whether seq_len + new tokens fit",
)
class PreallocatedCache:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.keys = None
        self.values = None
        self.seq_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        if self.seq_len >= self.capacity:
            raise ValueError(f"cache of {self.capacity} tokens is full")
        if self.keys is None:
            shape = (k.shape[0], k.shape[1], self.capacity, k.shape[3])
            self.keys = torch.zeros(shape, dtype=k.dtype, device=k.device)
            self.values = torch.zeros(shape, dtype=v.dtype, device=v.device)
        n = k.shape[2]
        self.keys[:, :, self.seq_len : self.seq_len + n] = k
        self.values[:, :, self.seq_len : self.seq_len + n] = v
        self.seq_len += n

    def read(self) -> tuple[Tensor, Tensor]:
        return self.keys[:, :, : self.seq_len], self.values[:, :, : self.seq_len]


@right("02.4", "one tensor for both, narrow and copy_")
class PreallocatedCache:
    def __init__(self, capacity: int) -> None:
        self.room, self.seq_len, self.both = capacity, 0, None

    def append(self, k: Tensor, v: Tensor) -> None:
        count = k.size(2)
        if count > self.room - self.seq_len:
            raise ValueError(f"no room for {count} more")
        if self.both is None:
            self.both = k.new_empty(2, k.size(0), k.size(1), self.room, k.size(3))
        for target, source in zip(self.both, (k, v)):
            target.narrow(2, self.seq_len, count).copy_(source)
        self.seq_len += count

    def read(self) -> tuple[Tensor, Tensor]:
        keys, values = self.both.narrow(3, 0, self.seq_len)
        return keys, values


# 02.5
@wrong(
    "02.5",
    "holds back the last token of held, not of wanted",
    "the last of wanted is run, not the last of held: one token too few where held is shorter",
)
def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    common = 0
    for a, b in zip(held, wanted):
        if a != b:
            break
        common += 1
    return max(0, min(common, len(held) - 1))


@wrong(
    "02.5",
    "all or nothing: 0 unless wanted begins with all of held",
    "tokens before the first that differs can be reused",
)
def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    n = len(held)
    if wanted[:n] != held:
        return 0  # not a continuation: start over
    return min(n, len(wanted) - 1)


@wrong("02.5", "runs over held and fails where it is longer than wanted", "IndexError: held may be longer than wanted")
def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    for i in range(len(held)):
        if held[i] != wanted[i]:
            return min(i, len(wanted) - 1)
    return min(len(held), len(wanted) - 1)


@right("02.5", "os.path.commonprefix on lists")
def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    return len(os.path.commonprefix([held, wanted[:-1]]))


# 02.6
@wrong("02.6", "head_dim from hidden_size // num_heads", "head_dim is a size of its own: spec.head_dim")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    head_dim = spec.hidden_size // spec.num_heads
    per_token = 2 * spec.num_layers * spec.num_kv_heads * head_dim
    return per_token * tokens * batch * bytes_per_element


@wrong(
    "02.6",
    "query heads per KV head taken for KV heads: 3 in the lab model either way",
    "num_heads // num_kv_heads is how many share one; KV heads are num_kv_heads",
)
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    kv_heads = spec.num_heads // spec.num_kv_heads
    elements_per_layer = 2 * kv_heads * spec.head_dim * tokens * batch
    return spec.num_layers * elements_per_layer * bytes_per_element


@wrong("02.6", "the queries are counted as well", "only K and V are kept, no queries")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    heads = spec.num_heads + 2 * spec.num_kv_heads  # what the qkv projection gives
    return batch * tokens * spec.num_layers * heads * spec.head_dim * bytes_per_element


@right("02.6", "numel of a tensor without memory")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    shape = (2, spec.num_layers, batch, spec.num_kv_heads, tokens, spec.head_dim)
    return torch.empty(shape, dtype=torch.int8, device="meta").nbytes * bytes_per_element


@right("02.6", "sum over layers and over K and V")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    row = spec.num_kv_heads * spec.head_dim * bytes_per_element
    return sum(row * tokens * batch for _ in range(spec.num_layers) for _ in "kv")


# 02.7
@wrong(
    "02.7",
    "the triangle is moved by the new tokens, not by those held before",
    "the diagonal is kv_len - new_tokens, not new_tokens",
)
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    new_tokens, kv_len = q.shape[2], k.shape[2]
    mask = None
    if new_tokens > 1:
        offset = new_tokens if kv_len > new_tokens else 0
        mask = torch.ones(new_tokens, kv_len, dtype=torch.bool, device=q.device).tril(diagonal=offset)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@wrong(
    "02.7",
    "the mask is a float tensor of ones and zeros: it is added, hides nothing",
    "a float mask is added to the scores: 0 and 1 hide nothing; bool, or -inf",
)
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    new_tokens, kv_len = q.shape[2], k.shape[2]
    mask = torch.ones(new_tokens, kv_len, dtype=q.dtype, device=q.device).tril(diagonal=kv_len - new_tokens)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@wrong("02.7", "no mask when something is cached", "with tokens cached, new tokens see later new ones")
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    new_tokens, kv_len = q.shape[2], k.shape[2]
    first_chunk = new_tokens == kv_len
    mask = None
    if first_chunk and new_tokens > 1:
        mask = torch.ones(new_tokens, kv_len, dtype=torch.bool, device=q.device).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@right("02.7", "scores and softmax by hand, one KV head after the other")
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    new, held = q.shape[2], k.shape[2]
    sees = torch.arange(held, device=q.device) <= torch.arange(held - new, held, device=q.device)[:, None]
    outs = []
    for queries, keys, values in zip(q.chunk(k.shape[1], dim=1), k.unbind(1), v.unbind(1)):
        scores = torch.matmul(queries, keys[:, None].mT) / math.sqrt(q.shape[3])
        outs.append(scores.masked_fill(~sees, -math.inf).softmax(dim=-1) @ values[:, None])
    return torch.cat(outs, dim=1)
