"""Answers that lab 02's checks had not seen when they met: their author knew the notebook, not the checks."""

# ruff: noqa: F811
from __future__ import annotations

import math
import os.path
from collections.abc import Iterator
from difflib import SequenceMatcher
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.attention import fused_attention as attention
from labkit.cache import Cache
from labkit.course.plug import AttentionLayer
from labkit.labs.lab02 import references
from labkit.labs.lab02.references import GrowingCache
from labkit.llama import Llama
from labkit.specs import ModelSpec
from tests.labs.noting import noting

WRONG, RIGHT, wrong, right = noting(references)


# 02.1 · A cache that grows


@wrong("02.1", "one default dict for all caches", "a second cache holds the first one's tokens")
class GrowingCache:
    def __init__(self, held: dict = {}) -> None:  # noqa: B006
        self.held = held

    @property
    def seq_len(self) -> int:
        return self.held["k"].shape[2] if self.held else 0

    def append(self, k: Tensor, v: Tensor) -> None:
        for name, new in (("k", k), ("v", v)):
            self.held[name] = torch.cat((self.held[name], new), dim=2) if name in self.held else new

    def read(self) -> tuple[Tensor, Tensor]:
        return self.held["k"], self.held["v"]


@wrong("02.1", "seq_len counts appends", "after a prompt of several tokens seq_len is 1")
class GrowingCache:
    def __init__(self) -> None:
        self.k = self.v = None
        self.seq_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        if self.k is None:
            self.k, self.v = k, v
        else:
            self.k, self.v = torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2)
        self.seq_len += 1

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v


@wrong("02.1", "pieces are kept and joined in read", "read moves what is held: join in append")
class GrowingCache:
    def __init__(self) -> None:
        self.pieces = []

    @property
    def seq_len(self) -> int:
        return sum(k.shape[2] for k, _ in self.pieces)

    def append(self, k: Tensor, v: Tensor) -> None:
        self.pieces.append((k, v))

    def read(self) -> tuple[Tensor, Tensor]:
        keys, values = zip(*self.pieces, strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)


@wrong(
    "02.1",
    "begun with an empty float32 tensor, which cat joins to anything",
    "bfloat16 comes back as float32, at twice the bytes",
)
class GrowingCache:
    def __init__(self) -> None:
        self.k, self.v = torch.empty(0), torch.empty(0)
        self.seq_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        self.k = torch.cat((self.k, k), dim=-2)
        self.v = torch.cat((self.v, v), dim=-2)
        self.seq_len = self.k.shape[-2]

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v


@wrong("02.1", "from the second append on the values get the new keys", "new values are not those that were appended")
class GrowingCache:
    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    @property
    def seq_len(self) -> int:
        return 0 if self.k is None else self.k.size(2)

    def append(self, k: Tensor, v: Tensor) -> None:
        if self.k is None or self.v is None:
            self.k, self.v = k.clone(), v.clone()
            return
        self.k = torch.cat((self.k, k), dim=2)
        self.v = torch.cat((self.v, k), dim=2)

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v


@right("02.1", "K and V stacked in one tensor, seq_len its property")
class GrowingCache:
    def __init__(self) -> None:
        self.both: Tensor | None = None

    @property
    def seq_len(self) -> int:
        return 0 if self.both is None else self.both.shape[-2]

    def append(self, k: Tensor, v: Tensor) -> None:
        new = torch.stack((k, v))
        self.both = new if self.both is None else torch.cat((self.both, new), dim=-2)

    def read(self) -> tuple[Tensor, Tensor]:
        k, v = self.both
        return k, v


@right("02.1", "no cat: a longer tensor is made and both parts are written into it")
class GrowingCache:
    def __init__(self) -> None:
        self.seq_len, self.held = 0, ()

    def append(self, k: Tensor, v: Tensor) -> None:
        before, after = self.seq_len, self.seq_len + k.shape[2]

        def longer(new: Tensor, index: int) -> Tensor:
            room = new.new_empty(*new.shape[:2], after, new.shape[3])
            if before:
                room[:, :, :before] = self.held[index]
            room[:, :, before:] = new
            return room

        self.held = longer(k, 0), longer(v, 1)
        self.seq_len = after

    def read(self) -> tuple[Tensor, Tensor]:
        return self.held


# 02.2 · A decode step through the cache


@wrong("02.2", "the query's position is read after append", "the query is turned one position too far")
def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
    q, k, v = layer.project(x)
    cache.append(layer.rotate(k, cache.seq_len), v)
    q = layer.rotate(q, cache.seq_len)
    return layer.merge(attention(q, *cache.read()))


@wrong(
    "02.2", "K and V repeated for the query heads, and in the wrong order", "K and V are copied; heads read others' K"
)
def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
    position = cache.seq_len
    q, k, v = layer.project(x)
    q, k = layer.rotate(q, position), layer.rotate(k, position)
    cache.append(k, v)
    keys, values = cache.read()
    groups = q.shape[1] // keys.shape[1]
    return layer.merge(attention(q, keys.repeat(1, groups, 1, 1), values.repeat(1, groups, 1, 1)))


@wrong("02.2", "the heads laid side by side by hand, without layer.merge", "the output projection is missing")
def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
    position = cache.seq_len
    q, k, v = layer.project(x)
    cache.append(layer.rotate(k, position), v)
    out = attention(layer.rotate(q, position), *cache.read())
    return out.transpose(1, 2).flatten(2)


@wrong(
    "02.2",
    "attention first, then append: the token does not see itself",
    "the new token's own key is not among those seen",
)
def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
    position = cache.seq_len
    q, k, v = layer.project(x)
    q, k = layer.rotate(q, position), layer.rotate(k, position)
    keys, values = cache.read() if position else (k, v)
    out = attention(q, keys, values)
    cache.append(k, v)
    return layer.merge(out)


@wrong("02.2", "held and new joined outside of the cache", "K and V held are copied once more than append does")
def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
    position = cache.seq_len
    q, k, v = layer.project(x)
    q, k = layer.rotate(q, position), layer.rotate(k, position)
    keys, values = k, v
    if position:
        held_keys, held_values = cache.read()
        keys, values = torch.cat((held_keys, k), dim=2), torch.cat((held_values, v), dim=2)
    cache.append(k, v)
    return layer.merge(attention(q, keys, values))


@wrong("02.2", "values are turned like keys", "the values held are rotated: v has no position")
def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
    position = cache.seq_len
    q, k, v = (layer.rotate(t, position) for t in layer.project(x))
    cache.append(k, v)
    return layer.merge(attention(q, *cache.read()))


@right("02.2", "the query heads of a KV head as rows of PyTorch's own attention")
def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
    where = int(cache.seq_len)
    q, new_k, new_v = layer.project(x)
    cache.append(k=layer.rotate(new_k, where), v=new_v)
    k, v = cache.read()
    rows = layer.rotate(q, where).reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    return layer.merge(F.scaled_dot_product_attention(rows, k, v).reshape(q.shape))


@right("02.2", "a loop over the KV heads, all by hand")
def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
    q, k, v = layer.project(x)
    q, k = (layer.rotate(t, cache.seq_len) for t in (q, k))
    cache.append(k, v)
    del k, v
    keys, values = cache.read()
    num_kv_heads, scale = keys.shape[1], 1 / math.sqrt(keys.shape[3])
    outs = []
    for head, queries in enumerate(q.squeeze(2).chunk(num_kv_heads, dim=1)):
        scores = queries @ keys[:, head].transpose(1, 2) * scale  # [batch, queries of this KV head, tokens]
        outs.append(scores.softmax(-1) @ values[:, head])
    return layer.merge(torch.cat(outs, dim=1).unsqueeze(2))


# 02.3 · Generate with a cache


@wrong("02.3", "the prompt's last token is run twice", "one token too many is run and held: the prompt's last, twice")
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    model(tokens, cache, last_only=True)  # prefill
    token, new = tokens[:, -1:], []
    for _ in range(max_new_tokens):
        token = model(token, cache, last_only=True)[:, -1].argmax(-1, keepdim=True)
        new.append(token)
    return torch.cat(new, dim=1)


@wrong("02.3", "row 0's token for all rows", "with two prompts the second row gets the first one's tokens")
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    new = []
    for _ in range(max_new_tokens):
        logits = model(tokens, cache, last_only=True)
        tokens = logits[0, -1].argmax().expand(len(tokens), 1)
        new.append(tokens)
    return torch.cat(new, dim=1)


@wrong(
    "02.3",
    "as many tokens skipped as the cache holds, as if they were the prompt's first",
    "a cache that holds something: the first tokens of what follows are not run",
)
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    length = tokens.shape[1]
    for _ in range(max_new_tokens):
        fresh = tokens[:, min(cache.seq_len, tokens.shape[1] - 1) :]
        best = model(fresh, cache, last_only=True)[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat((tokens, best), dim=1)
    return tokens[:, length:]


@wrong("02.3", "the prompt one token a pass", "logits of the prompt's earlier tokens are computed: many passes for one")
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    for token in tokens.split(1, dim=1):
        logits = model(token, cache, last_only=True)
    new = [logits[:, -1].argmax(-1)]
    while len(new) < max_new_tokens:
        logits = model(new[-1][:, None], cache, last_only=True)
        new.append(logits[:, -1].argmax(-1))
    return torch.stack(new, dim=1)


@wrong("02.3", "the last new token is run as well", "one pass too many: its logits are thrown away")
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    logits = model(tokens, cache, last_only=True)
    new = []
    for _ in range(max_new_tokens):
        new.append(logits[:, -1:].argmax(-1))
        logits = model(new[-1], cache, last_only=True)
    return torch.cat(new, dim=1)


@wrong("02.3", "prefill without last_only", "logits of all the prompt's tokens are computed, and one row is read")
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    new = [model(tokens, cache)[:, -1].argmax(-1, keepdim=True)]
    for _ in range(max_new_tokens - 1):
        new.append(model(new[-1], cache)[:, -1].argmax(-1, keepdim=True))
    return torch.cat(new, dim=1)


@right("02.3", "an endless generator, of which as many are taken")
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    def endless(fed: Tensor) -> Iterator[Tensor]:
        while True:
            logits = model(fed, cache, last_only=True)
            fed = logits.squeeze(1).argmax(dim=-1, keepdim=True)
            yield fed

    return torch.cat([tokens[:, :0], *islice(endless(tokens), max_new_tokens)], dim=1)


@right("02.3", "written into a table, each step fed from it")
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    table = torch.zeros(tokens.size(0), max_new_tokens, dtype=torch.long, device=tokens.device)
    fed = tokens
    for i in range(max_new_tokens):
        table[:, i] = model(fed, cache, last_only=True)[:, 0].max(dim=-1).indices
        fed = table[:, i, None]
    return table


# 02.4 · A cache that is allocated once


@wrong("02.4", "one memory for K and V", "the keys read are the values")
class PreallocatedCache:
    def __init__(self, capacity: int) -> None:
        self.capacity, self.seq_len = capacity, 0
        self.k = self.v = None

    def append(self, k: Tensor, v: Tensor) -> None:
        end = self.seq_len + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"no room for {end} tokens")
        if self.k is None:
            batch, heads, _, head_dim = k.shape
            self.k = self.v = k.new_zeros(batch, heads, self.capacity, head_dim)
        self.k[:, :, self.seq_len : end] = k
        self.v[:, :, self.seq_len : end] = v
        self.seq_len = end

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k[:, :, : self.seq_len], self.v[:, :, : self.seq_len]


@wrong(
    "02.4",
    "allocated before the tokens are refused",
    "a refused first append has changed something: the next one meets its batch and dtype",
)
class PreallocatedCache:
    def __init__(self, capacity: int) -> None:
        self.capacity, self.seq_len = capacity, 0
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> None:
        if self.k is None or self.v is None:
            shape = (*k.shape[:2], self.capacity, k.shape[-1])
            self.k, self.v = k.new_empty(shape), v.new_empty(shape)
        new = k.shape[2]
        if self.seq_len + new > self.capacity:
            raise ValueError(f"{new} tokens do not fit behind {self.seq_len} of {self.capacity}")
        self.k[:, :, self.seq_len : self.seq_len + new] = k
        self.v[:, :, self.seq_len : self.seq_len + new] = v
        self.seq_len += new

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k[:, :, : self.seq_len], self.v[:, :, : self.seq_len]


@wrong("02.4", "seq_len is raised before the tokens are refused", "after a refusal seq_len says more than is held")
class PreallocatedCache:
    def __init__(self, capacity: int) -> None:
        self.capacity, self.seq_len, self.kv = capacity, 0, None

    def append(self, k: Tensor, v: Tensor) -> None:
        begin = self.seq_len
        self.seq_len += k.shape[2]
        if self.seq_len > self.capacity:
            raise ValueError("the cache is full")
        if self.kv is None:
            self.kv = k.new_zeros(2, *k.shape[:2], self.capacity, k.shape[3])
        self.kv[0, :, :, begin : self.seq_len] = k
        self.kv[1, :, :, begin : self.seq_len] = v

    def read(self) -> tuple[Tensor, Tensor]:
        return self.kv[0, :, :, : self.seq_len], self.kv[1, :, :, : self.seq_len]


@wrong("02.4", "read makes the filled part contiguous", "read copies K and V while there is slack")
class PreallocatedCache:
    def __init__(self, capacity: int) -> None:
        self.capacity, self.seq_len = capacity, 0
        self.buffers: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> None:
        free = self.capacity - self.seq_len
        if k.size(2) > free:
            raise ValueError(f"{k.size(2)} tokens, room for {free}")
        if self.buffers is None:
            self.buffers = tuple(x.new_zeros(x.size(0), x.size(1), self.capacity, x.size(3)) for x in (k, v))
        for buffer, new in zip(self.buffers, (k, v), strict=True):
            buffer.narrow(2, self.seq_len, new.size(2)).copy_(new)
        self.seq_len += k.size(2)

    def read(self) -> tuple[Tensor, Tensor]:
        k, v = (buffer[:, :, : self.seq_len].contiguous() for buffer in self.buffers)
        return k, v


@wrong("02.4", "memory of torch's default dtype", "bfloat16 comes back as float32, at twice the bytes")
class PreallocatedCache:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.seq_len = 0
        self.k = None

    def append(self, k: Tensor, v: Tensor) -> None:
        b, h, n, d = k.shape
        if self.seq_len + n > self.capacity:
            raise ValueError(f"capacity {self.capacity} exceeded")
        if self.k is None:
            self.k = torch.zeros(b, h, self.capacity, d, device=k.device)
            self.v = torch.zeros(b, h, self.capacity, d, device=v.device)
        self.k[:, :, self.seq_len : self.seq_len + n] = k
        self.v[:, :, self.seq_len : self.seq_len + n] = v
        self.seq_len += n

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k[:, :, : self.seq_len], self.v[:, :, : self.seq_len]


@wrong(
    "02.4",
    "what fits is written, and the rest refused",
    "after a refusal some of the refused tokens are held",
)
class PreallocatedCache:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.seq_len = 0
        self.k = self.v = None

    def append(self, k: Tensor, v: Tensor) -> None:
        if self.k is None:
            self.k, self.v = (x.new_zeros(*x.shape[:2], self.capacity, x.shape[3]) for x in (k, v))
        for i in range(k.shape[2]):
            if self.seq_len == self.capacity:
                raise ValueError("the cache is full")
            self.k[:, :, self.seq_len] = k[:, :, i]
            self.v[:, :, self.seq_len] = v[:, :, i]
            self.seq_len += 1

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k[:, :, : self.seq_len], self.v[:, :, : self.seq_len]


@right("02.4", "one tensor for both, unbound in read")
class PreallocatedCache:
    def __init__(self, capacity: int) -> None:
        self.free, self._memory, self.seq_len = capacity, None, 0

    def append(self, k: Tensor, v: Tensor) -> None:
        batch, heads, new, head_dim = k.shape
        if new > self.free:
            raise ValueError(f"{new} more tokens do not fit: there is room for {self.free}")
        if self._memory is None:
            self._memory = k.new_empty((2, batch, heads, self.free, head_dim))
        here = self._memory.narrow(3, self.seq_len, new)
        here[0], here[1] = k, v
        self.seq_len += new
        self.free -= new

    def read(self) -> tuple[Tensor, Tensor]:
        return self._memory.narrow(3, 0, self.seq_len).unbind()


@right("02.4", "tokens lie outermost in memory; read gives permuted views")
class PreallocatedCache:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.__filled = 0
        self.__memory: dict[str, Tensor] = {}

    @property
    def seq_len(self) -> int:
        return self.__filled

    def append(self, k: Tensor, v: Tensor) -> None:
        end = self.__filled + k.shape[2]
        if not end <= self.capacity:
            raise ValueError(f"{end} tokens are more than {self.capacity}")
        for name, new in {"k": k, "v": v}.items():
            rows = new.permute(2, 0, 1, 3)
            if name not in self.__memory:
                self.__memory[name] = torch.zeros((self.capacity, *rows.shape[1:]), dtype=new.dtype, device=new.device)
            self.__memory[name][self.__filled : end].copy_(rows)
        self.__filled = end

    def read(self) -> tuple[Tensor, Tensor]:
        k, v = (self.__memory[name][: self.__filled].permute(1, 2, 0, 3) for name in "kv")
        return k, v


# 02.5 · How much of the cache may stay


@wrong("02.5", "equal places are counted behind the first difference, too", "tokens behind a difference are reused")
def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    return sum(a == b for a, b in zip(held, wanted[:-1], strict=False))


@wrong(
    "02.5",
    "the last token is run only where both are the same",
    "a prompt that the cache holds as its beginning: nothing is left to run",
)
def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    if held == wanted:
        return len(wanted) - 1
    n = 0
    while n < min(len(held), len(wanted)) and held[n] == wanted[n]:
        n += 1
    return n


@wrong("02.5", "the last token is taken off the caller's list", "wanted is a token shorter after the call")
def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    wanted.pop()  # is always run
    for i, (a, b) in enumerate(zip(held, wanted, strict=False)):
        if a != b:
            return i
    return min(len(held), len(wanted))


@wrong("02.5", "one less than is shared, always", "a token that is held is run again where more follow it")
def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    shared = 0
    for a, b in zip(held, wanted, strict=False):
        if a != b:
            break
        shared += 1
    return max(shared - 1, 0)


@wrong("02.5", "the longest common stretch, wherever it stands", "equal tokens at other places are reused")
def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    matcher = SequenceMatcher(a=held, b=wanted[:-1], autojunk=False)
    return matcher.find_longest_match().size


@right("02.5", "the library's common prefix, meant for paths")
def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    return len(os.path.commonprefix([list(held), list(wanted[:-1])]))  # noqa: RUF071


@right("02.5", "a running product of equalities in PyTorch")
def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    n = min(len(held), len(wanted) - 1)
    a, b = (torch.tensor(tokens[:n], dtype=torch.long) for tokens in (held, wanted))
    return int((a == b).long().cumprod(0).sum())


# 02.6 · Bytes of a cache


@wrong("02.6", "head_dim taken for hidden_size / num_heads", "a spec whose head_dim is another: spec.head_dim says it")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    head_dim = spec.hidden_size // spec.num_heads
    return 2 * spec.num_layers * spec.num_kv_heads * head_dim * tokens * batch * bytes_per_element


@wrong(
    "02.6", "keys for the query heads, values for the KV heads", "too many keys: a KV head has one, for all its queries"
)
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    per_layer = (spec.num_heads + spec.num_kv_heads) * spec.head_dim
    return spec.num_layers * per_layer * tokens * batch * bytes_per_element


@wrong("02.6", "30 layers, the lab model's", "the number of layers does not follow the spec")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    per_token = 2 * spec.num_kv_heads * spec.head_dim * 30 * bytes_per_element
    return batch * tokens * per_token


@wrong("02.6", "multiplied in float32", "large caches are rounded: above 16 million not every whole number is there")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    factors = [2, spec.num_layers, spec.num_kv_heads, spec.head_dim, tokens, batch, bytes_per_element]
    return int(torch.tensor(factors, dtype=torch.float32).prod().item())


@right("02.6", "the shape of a tensor that is never made")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    layer = torch.empty(2, batch, spec.num_kv_heads, tokens, spec.head_dim, dtype=torch.uint8, device="meta")
    return spec.num_layers * layer.numel() * bytes_per_element


@right("02.6", "added up layer by layer, K and V apart")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    one = math.prod((batch, spec.num_kv_heads, tokens, spec.head_dim))
    return sum(one * bytes_per_element for _ in range(spec.num_layers) for _ in ("k", "v"))


# 02.7 · Debug: an answer that depends on the chunk size


@wrong("02.7", "no mask at all once something is cached", "the first new token sees the new ones after it")
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    new_tokens, kv_len = q.shape[2], k.shape[2]
    mask = None
    if new_tokens == kv_len:
        mask = torch.ones(new_tokens, kv_len, dtype=torch.bool, device=q.device).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@wrong("02.7", "cut to the new tokens, so that the triangle fits", "what is cached is not seen at all")
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    new_tokens = q.shape[2]
    if new_tokens == 1:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    k, v = k[:, :, -new_tokens:], v[:, :, -new_tokens:]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@wrong("02.7", "what is held is taken for whole chunks of 8", "right only where a multiple of 8 is cached")
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    new_tokens, kv_len = q.shape[2], k.shape[2]
    mask = None
    if new_tokens > 1:
        held = (kv_len - 1) // 8 * 8
        mask = torch.ones(new_tokens, kv_len, dtype=torch.bool, device=q.device).tril(held)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@wrong(
    "02.7",
    "the right triangle, in q's dtype: ones and zeros are added",
    "later tokens are seen: a mask of numbers is added to the scores",
)
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    new_tokens, kv_len = q.shape[2], k.shape[2]
    mask = None
    if new_tokens > 1:
        mask = torch.ones(new_tokens, kv_len, dtype=q.dtype, device=q.device).tril(kv_len - new_tokens)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@wrong("02.7", "the triangle begins one column too early", "a new token does not see itself")
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    new_tokens, kv_len = q.shape[2], k.shape[2]
    mask = None
    if new_tokens > 1:
        held = max(kv_len - new_tokens - 1, 0)
        mask = torch.ones(new_tokens, kv_len, dtype=torch.bool, device=q.device).tril(held)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@wrong(
    "02.7",
    "the same triangle, from two ranges that both begin at 0",
    "the first new token sees one key, whatever is cached",
)
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = torch.arange(q.shape[2], device=q.device)
    columns = torch.arange(k.shape[2], device=k.device)
    mask = rows[:, None] >= columns if len(rows) > 1 else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@right("02.7", "an upper triangle, flipped both ways")
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu().flip(0, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@right("02.7", "queries of zeros stand in for the cached tokens, so that the matrix is square")
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    held = k.shape[2] - q.shape[2]
    square = F.pad(q, (0, 0, held, 0))
    return F.scaled_dot_product_attention(square, k, v, is_causal=True, enable_gqa=True)[:, :, held:]
