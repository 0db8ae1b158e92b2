"""Answers that lab 02's checks had not seen when they first met: their author knew the notebook, not the checks."""

from __future__ import annotations

import functools
import itertools
import math
import operator
import os.path
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.attention import attention as explicit_attention
from labkit.attention import fused_attention as attention
from labkit.cache import Cache
from labkit.course.plug import AttentionLayer
from labkit.generation import generate
from labkit.labs.lab02 import references
from labkit.labs.lab02.references import GrowingCache, PreallocatedCache
from labkit.llama import Llama
from labkit.specs import ModelSpec
from tests.labs.noting import noting

WRONG, RIGHT, wrong, right = noting(references)


# ---------------------------------------------------------------- 02.1 GrowingCache


@wrong("02.1", "joins along the heads (dim=1)", "tokens are dimension 2")
class GrowingCache:
    def __init__(self) -> None:
        self.seq_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        if self.seq_len:
            k, v = torch.cat((self.k, k), dim=1), torch.cat((self.v, v), dim=1)
        self.k, self.v = k, v
        self.seq_len = self.k.shape[2]

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v


@wrong("02.1", "a list, joined in read", "read moves everything at each step: join in append")
class GrowingCache:
    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor]] = []

    @property
    def seq_len(self) -> int:
        return sum(k.shape[2] for k, _ in self.parts)

    def append(self, k: Tensor, v: Tensor) -> None:
        self.parts.append((k, v))

    def read(self) -> tuple[Tensor, Tensor]:
        ks, vs = zip(*self.parts, strict=True)
        return torch.cat(ks, dim=2), torch.cat(vs, dim=2)


@wrong("02.1", "the store is on the class: all layers share one", "two caches share their tokens: keep them on self")
class GrowingCache:
    held: dict[str, Tensor] = {}

    def __init__(self) -> None:
        self.seq_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        for name, new in (("k", k), ("v", v)):
            self.held[name] = torch.cat((self.held[name], new), dim=2) if name in self.held else new
        self.seq_len += k.shape[2]

    def read(self) -> tuple[Tensor, Tensor]:
        return self.held["k"], self.held["v"]


@wrong("02.1", "seq_len counts appends", "seq_len counts tokens: a prompt brings several")
class GrowingCache:
    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.seq_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        self.k = k if self.k is None else torch.cat((self.k, k), dim=2)
        self.v = v if self.v is None else torch.cat((self.v, v), dim=2)
        self.seq_len += 1

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v


@wrong("02.1", "new tokens are put in front", "new tokens go BEHIND those held")
class GrowingCache:
    def __init__(self) -> None:
        self.seq_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        if self.seq_len > 0:
            k = torch.cat([k, self.k], dim=2)
            v = torch.cat([v, self.v], dim=2)
        self.k, self.v = k, v
        self.seq_len = k.shape[2]

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v


@wrong("02.1", "copy and paste: later values are joined from k", "v holds keys from the second append on")
class GrowingCache:
    def __init__(self) -> None:
        self.seq_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        if self.seq_len == 0:
            self.k, self.v = k, v
        else:
            self.k = torch.cat((self.k, k), dim=2)
            self.v = torch.cat((self.v, k), dim=2)
        self.seq_len = self.k.shape[2]

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v


@wrong("02.1", "starts from torch.empty(0): float32, so bfloat16 becomes float32", "what comes back has another dtype")
class GrowingCache:
    def __init__(self) -> None:
        self.k, self.v = torch.empty(0), torch.empty(0)
        self.seq_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        self.k = torch.cat((self.k, k), dim=2)
        self.v = torch.cat((self.v, v), dim=2)
        self.seq_len += k.shape[2]

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v


@wrong("02.1", "starts from zeros(1, 3, 0, 64), the notebook's sizes", "another batch, head count or head_dim raises")
class GrowingCache:
    def __init__(self) -> None:
        self.k = self.v = None
        self.seq_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        if self.k is None:
            self.k = torch.zeros(1, 3, 0, 64, dtype=k.dtype, device=k.device)
            self.v = torch.zeros(1, 3, 0, 64, dtype=v.dtype, device=v.device)
        self.k, self.v = torch.cat((self.k, k), 2), torch.cat((self.v, v), 2)
        self.seq_len = self.k.size(2)

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v


@wrong("02.1", "read stacks k and v", "read moves everything held: give back the two tensors, a tuple")
class GrowingCache:
    def __init__(self) -> None:
        self.seq_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        first = self.seq_len == 0
        self.k = k if first else torch.cat((self.k, k), dim=2)
        self.v = v if first else torch.cat((self.v, v), dim=2)
        self.seq_len = self.k.shape[2]

    def read(self) -> tuple[Tensor, Tensor]:
        return torch.stack((self.k, self.v))


@wrong("02.1", "seq_len is a method", "seq_len is an attribute or a property: a number, not a method")
class GrowingCache:
    def __init__(self) -> None:
        self.k = self.v = None

    def seq_len(self) -> int:
        return 0 if self.k is None else self.k.shape[2]

    def append(self, k: Tensor, v: Tensor) -> None:
        if self.k is not None:
            k, v = torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)
        self.k, self.v = k, v

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v


@wrong("02.1", "every earlier state is kept too", "memory grows quadratically: two tensors per layer, no history")
class GrowingCache:
    def __init__(self) -> None:
        self.states: list[tuple[Tensor, Tensor]] = []
        self.seq_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        if self.states:
            old_k, old_v = self.states[-1]
            k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
        self.states.append((k, v))
        self.seq_len = k.shape[2]

    def read(self) -> tuple[Tensor, Tensor]:
        return self.states[-1]


@right("02.1", "__slots__, a property, an empty slice to begin with")
class GrowingCache:
    __slots__ = ("_keys", "_values")

    def __init__(self) -> None:
        self._keys = self._values = None

    @property
    def seq_len(self) -> int:
        return 0 if self._keys is None else self._keys.size(dim=2)

    def append(self, k: Tensor, v: Tensor) -> None:
        keys = k[:, :, :0] if self._keys is None else self._keys
        values = v[:, :, :0] if self._values is None else self._values
        self._keys = torch.cat(tensors=(keys, k), dim=-2)
        self._values = torch.cat(tensors=(values, v), dim=-2)

    def read(self) -> tuple[Tensor, Tensor]:
        return self._keys, self._values


@right("02.1", "one tensor [2, batch, heads, tokens, head_dim], read as two views")
class GrowingCache:
    def __init__(self) -> None:
        self.both: Tensor | None = None
        self.seq_len: int = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        new = torch.stack((k, v))
        self.both = new if self.both is None else torch.cat((self.both, new), dim=3)
        self.seq_len += new.shape[3]

    def read(self) -> tuple[Tensor, Tensor]:
        keys, values = self.both.unbind(0)
        return keys, values


@right("02.1", "a dataclass whose fields are not arguments")
@dataclass
class GrowingCache:
    seq_len: int = field(default=0, init=False)
    held: tuple[Tensor, ...] = field(default=(), init=False, repr=False)

    def append(self, k: Tensor, v: Tensor) -> None:
        new = (k, v)
        self.held = tuple(torch.cat(pair, 2) for pair in zip(self.held, new, strict=True)) if self.held else new
        self.seq_len = self.held[0].shape[2]

    def read(self) -> tuple[Tensor, Tensor]:
        return self.held


@right("02.1", "a new tensor made and filled by hand")
class GrowingCache:
    def __init__(self) -> None:
        self.store: dict[str, Tensor] = {}
        self.seq_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        old, end = self.seq_len, self.seq_len + k.shape[2]
        for name, new in zip("kv", (k, v), strict=True):
            longer = new.new_empty((*new.shape[:2], end, new.shape[3]))
            if old:
                longer[:, :, :old] = self.store[name]
            longer[:, :, old:] = new
            self.store[name] = longer
        self.seq_len = end

    def read(self) -> tuple[Tensor, Tensor]:
        return self.store["k"], self.store["v"]


# ---------------------------------------------------------------- 02.2 decode_step


@wrong("02.2", "position taken after append, for q alone", "q stands one place too far: ask seq_len before append")
def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
    q, k, v = layer.project(x)
    cache.append(layer.rotate(k, cache.seq_len), v)
    keys, values = cache.read()
    return layer.merge(attention(layer.rotate(q, cache.seq_len), keys, values))


@wrong("02.2", "q and k both stand one place too far", "the key in the cache is turned to seq_len + 1")
def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
    q, k, v = layer.project(x)
    position = cache.seq_len + 1
    cache.append(layer.rotate(k, position), v)
    return layer.merge(attention(layer.rotate(q, position), *cache.read()))


@wrong("02.2", "position from x: always 0", "only the cache knows how many tokens came before")
def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
    q, k, v = layer.project(x)
    position = x.shape[1] - 1
    cache.append(layer.rotate(k, position), v)
    keys, values = cache.read()
    return layer.merge(attention(layer.rotate(q, position), keys, values))


@wrong("02.2", "k is not turned", "keys are kept after turning")
def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
    q, k, v = layer.project(x)
    q = layer.rotate(q, cache.seq_len)
    cache.append(k, v)
    keys, values = cache.read()
    return layer.merge(attention(q, keys, values))


@wrong("02.2", "v is turned as well", "values are not turned")
def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
    q, k, v = (layer.rotate(t, cache.seq_len) for t in layer.project(x))
    cache.append(k, v)
    keys, values = cache.read()
    return layer.merge(attention(q, keys, values))


@wrong("02.2", "attention over the new token alone", "attend to what the cache holds, not to k and v of this step")
def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
    q, k, v = layer.project(x)
    position = cache.seq_len
    q, k = layer.rotate(q, position), layer.rotate(k, position)
    cache.append(k, v)
    return layer.merge(attention(q, k, v))


@wrong("02.2", "reads before it appends", "the new token must see itself; and an empty cache cannot be read")
def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
    q, k, v = layer.project(x)
    position = cache.seq_len
    keys, values = cache.read()
    cache.append(layer.rotate(k, position), v)
    return layer.merge(attention(layer.rotate(q, position), keys, values))


@wrong("02.2", "K and V repeated for every query head", "nothing needs repeating: 3 times the bytes are moved and read")
def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
    q, k, v = layer.project(x)
    position = cache.seq_len
    cache.append(layer.rotate(k, position), v)
    keys, values = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in cache.read())
    return layer.merge(attention(layer.rotate(q, position), keys, values))


@wrong("02.2", "the residual is added here", "attention's output alone: the block adds x itself")
def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
    q, k, v = layer.project(x)
    position = cache.seq_len
    cache.append(layer.rotate(k, position), v)
    keys, values = cache.read()
    return x + layer.merge(attention(layer.rotate(q, position), keys, values))


@wrong("02.2", "heads not merged", "[batch, 1, hidden_size]: layer.merge is missing")
def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
    q, k, v = layer.project(x)
    position = cache.seq_len
    cache.append(layer.rotate(k, position), v)
    keys, values = cache.read()
    return attention(layer.rotate(q, position), keys, values)


@wrong(
    "02.2",
    "joins by hand behind what was read, and appends besides",
    "append joins already: read gives all, nothing is to be joined (moved) a second time",
)
def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
    q, k, v = layer.project(x)
    q, k = (layer.rotate(t, cache.seq_len) for t in (q, k))
    if cache.seq_len:
        keys, values = cache.read()
        keys, values = torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
    else:
        keys, values = k, v
    cache.append(k, v)
    return layer.merge(attention(q, keys, values))


def _counting_step() -> Callable:
    stands = itertools.count()

    def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
        q, k, v = layer.project(x)
        position = next(stands)
        cache.append(layer.rotate(k, position), v)
        keys, values = cache.read()
        return layer.merge(attention(layer.rotate(q, position), keys, values))

    return decode_step


WRONG.append((
    "02.2",
    "counts its own calls for the position, over all layers and caches",
    "a counter of its own outlives the cache: ask cache.seq_len",
    _counting_step(),
))  # fmt: skip


@right("02.2", "PyTorch's own with enable_gqa, keywords only")
def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
    stands = cache.seq_len
    query, key, value = layer.project(x)
    cache.append(k=layer.rotate(key, stands), v=value)
    keys, values = cache.read()
    return layer.merge(
        F.scaled_dot_product_attention(query=layer.rotate(query, stands), key=keys, value=values, enable_gqa=True)
    )


@right("02.2", "q and k turned in one call, as one tensor")
def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
    q, k, v = layer.project(x)
    turned = layer.rotate(torch.cat((q, k), dim=1), cache.seq_len)
    q, k = turned.split((q.shape[1], k.shape[1]), dim=1)
    cache.append(k, v)
    return layer.merge(attention(q, *cache.read()))


@right("02.2", "grouped einsum, float32 softmax cast back")
def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
    q, k, v = layer.project(x)
    q, k = (layer.rotate(t, cache.seq_len) for t in (q, k))
    cache.append(k, v)
    keys, values = cache.read()
    grouped = q.squeeze(2).unflatten(1, (keys.shape[1], -1))  # [batch, num_kv_heads, queries per kv, head_dim]
    scores = torch.einsum("bngd,bntd->bngt", grouped, keys) / math.sqrt(q.shape[-1])
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
    out = torch.einsum("bngt,bntd->bngd", weights, values)
    return layer.merge(out.flatten(1, 2).unsqueeze(2))


@right("02.2", "position counted back from what was read, after append")
def decode_step(x: Tensor, layer: AttentionLayer, cache: GrowingCache) -> Tensor:
    q, k, v = layer.project(x)
    cache.append(layer.rotate(k, cache.seq_len), v)
    keys, values = cache.read()
    return layer.merge(explicit_attention(layer.rotate(q, keys.shape[2] - 1), keys, values))


# ---------------------------------------------------------------- 02.3 generate_with_cache


@wrong("02.3", "feeds the whole sequence at every step", "decode runs one token a pass: the cache holds the rest")
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    sequence = tokens
    for _ in range(max_new_tokens):
        logits = model(sequence, cache, last_only=True)
        sequence = torch.cat((sequence, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    return sequence[:, tokens.shape[1] :]


@wrong("02.3", "runs the last new token too", "one pass too many: prompt + max_new_tokens - 1 tokens are run")
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    logits = model(tokens, cache, last_only=True)
    new = []
    for _ in range(max_new_tokens):
        token = logits[:, -1].argmax(dim=-1, keepdim=True)
        new.append(token)
        logits = model(token, cache, last_only=True)
    return torch.cat(new, dim=1)


@wrong("02.3", "the prompt comes back in front", "new tokens only: [batch, max_new_tokens]")
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    out, fed = tokens, tokens
    for _ in range(max_new_tokens):
        fed = model(fed, cache, last_only=True)[:, -1].argmax(-1, keepdim=True)
        out = torch.cat([out, fed], dim=1)
    return out


@wrong("02.3", "prefill's token is fed but not returned", "the first new token comes from prefill")
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    token = model(tokens, cache, last_only=True)[:, -1:].argmax(-1)
    new = []
    for _ in range(max_new_tokens):
        token = model(token, cache, last_only=True)[:, -1:].argmax(-1)
        new.append(token)
    return torch.cat(new, dim=1)


@wrong(
    "02.3",
    "argmax without a dimension: one number for the whole batch, right for one row",
    "each row its own token: argmax(dim=-1)",
)
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    new, fed = [], tokens
    for _ in range(max_new_tokens):
        fed = model(fed, cache, last_only=True).argmax().view(1, 1)
        new.append(fed)
    return torch.cat(new, dim=1)


@wrong("02.3", "draws in place of taking the likeliest", "the likeliest token: argmax, no drawing")
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    new, fed = [], tokens
    for _ in range(max_new_tokens):
        logits = model(fed, cache, last_only=True)[:, -1]
        fed = torch.multinomial(logits.softmax(dim=-1), num_samples=1)
        new.append(fed)
    return torch.cat(new, dim=1)


@wrong("02.3", "stops at token 0, the end of text", "max_new_tokens are asked, whatever they are")
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    new, fed = [], tokens
    for _ in range(max_new_tokens):
        fed = model(fed, cache, last_only=True)[:, -1:].argmax(dim=-1)
        new.append(fed)
        if bool((fed == 0).all()):
            break
    return torch.cat(new, dim=1)


@wrong("02.3", "empties the cache first", "tokens follow what the cache holds: the conversation is thrown away")
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    if cache.seq_len:
        cache.truncate(0)
    new, fed = [], tokens
    for _ in range(max_new_tokens):
        fed = model(fed, cache, last_only=True)[:, -1:].argmax(dim=-1)
        new.append(fed)
    return torch.cat(new, dim=1)


@wrong("02.3", "cache not empty means decode: only the prompt's last token is fed", "all of tokens must be run")
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    sequence = tokens
    for _ in range(max_new_tokens):
        fed = sequence if cache.seq_len == 0 else sequence[:, -1:]
        token = model(fed, cache, last_only=True)[:, -1:].argmax(dim=-1)
        sequence = torch.cat((sequence, token), dim=1)
    return sequence[:, tokens.shape[1] :]


@wrong("02.3", "the prompt is run token by token", "prefill runs the prompt in one pass")
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    for index in range(tokens.shape[1]):
        logits = model(tokens[:, index : index + 1], cache, last_only=True)
    new = [logits[:, -1].argmax(-1, keepdim=True)]
    while len(new) < max_new_tokens:
        new.append(model(new[-1], cache, last_only=True)[:, -1].argmax(-1, keepdim=True))
    return torch.cat(new, dim=1)


@wrong("02.3", "collected in torch.zeros: floats come back", "tokens are int")
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    out, fed = torch.zeros(tokens.shape[0], max_new_tokens, device=tokens.device), tokens
    for step in range(max_new_tokens):
        fed = model(fed, cache, last_only=True)[:, -1].argmax(dim=-1, keepdim=True)
        out[:, step] = fed[:, 0]
    return out


@wrong("02.3", "stacked the other way: [max_new_tokens, batch]", "[batch, max_new_tokens]")
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    new, fed = [], tokens
    for _ in range(max_new_tokens):
        token = model(fed, cache, last_only=True)[:, -1].argmax(dim=-1)
        new.append(token)
        fed = token[:, None]
    return torch.stack(new)


@wrong("02.3", "the plain loop: cache never used", "the cache stays empty and every token is run again")
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    return generate(model, tokens, max_new_tokens).tokens


@right("02.3", "a table filled column by column, max instead of argmax")
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    out = tokens.new_empty((tokens.shape[0], max_new_tokens))
    fed = tokens
    for column in out.unbind(dim=1):
        column.copy_(model(fed, cache, last_only=True).squeeze(1).max(dim=-1).indices)
        fed = column.unsqueeze(-1)
    return out


@right("02.3", "a generator function")
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    def likeliest(fed: Tensor):
        while True:
            fed = torch.argmax(input=model(fed, cache, last_only=True)[:, 0], dim=1, keepdim=True)
            yield fed

    return torch.hstack(list(itertools.islice(likeliest(tokens), max_new_tokens)))


@right("02.3", "recursion")
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    def more(fed: Tensor, left: int) -> list[Tensor]:
        token = model(fed, cache, last_only=True)[:, -1, :].argmax(-1)
        return [token] if left <= 1 else [token, *more(token[:, None], left - 1)]

    return torch.stack(more(tokens, max_new_tokens), dim=-1)


@right("02.3", "prefill first, then accumulate")
def generate_with_cache(model: Llama, tokens: Tensor, max_new_tokens: int, cache: Cache) -> Tensor:
    def step(fed: Tensor, _: object = None) -> Tensor:
        return model(fed, cache, last_only=True).argmax(dim=-1)

    first = step(tokens)
    return torch.cat(list(itertools.accumulate(range(max_new_tokens - 1), step, initial=first)), dim=1)


# ---------------------------------------------------------------- 02.4 PreallocatedCache


@wrong("02.4", "counts before it checks: seq_len is changed on refusal", "after ValueError seq_len must be as before")
class PreallocatedCache:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.seq_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        start = self.seq_len
        self.seq_len += k.shape[2]
        if self.seq_len > self.capacity:
            raise ValueError("cache is full")
        if start == 0:
            self.k = k.new_empty(*k.shape[:2], self.capacity, k.shape[3])
            self.v = v.new_empty(*v.shape[:2], self.capacity, v.shape[3])
        self.k[:, :, start : self.seq_len] = k
        self.v[:, :, start : self.seq_len] = v

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k[:, :, : self.seq_len], self.v[:, :, : self.seq_len]


@wrong("02.4", ">= : refuses what fits exactly", "capacity tokens fit into a cache of that capacity")
class PreallocatedCache:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.seq_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        end = self.seq_len + k.shape[2]
        if end >= self.capacity:
            raise ValueError(f"capacity of {self.capacity} exceeded")
        if self.seq_len == 0:
            self.k = k.new_zeros(k.shape[0], k.shape[1], self.capacity, k.shape[3])
            self.v = torch.zeros_like(self.k)
        self.k[:, :, self.seq_len : end] = k
        self.v[:, :, self.seq_len : end] = v
        self.seq_len = end

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k[:, :, : self.seq_len], self.v[:, :, : self.seq_len]


@wrong("02.4", "an assertion in place of ValueError", "ValueError is promised, not AssertionError")
class PreallocatedCache:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.seq_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        end = self.seq_len + k.shape[2]
        assert end <= self.capacity, "does not fit"
        if self.seq_len == 0:
            self.k = k.new_zeros(k.shape[0], k.shape[1], self.capacity, k.shape[3])
            self.v = torch.zeros_like(self.k)
        self.k[:, :, self.seq_len : end] = k
        self.v[:, :, self.seq_len : end] = v
        self.seq_len = end

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k[:, :, : self.seq_len], self.v[:, :, : self.seq_len]


@wrong("02.4", "read gives the whole room, slack included", "only the filled part: [:, :, :seq_len]")
class PreallocatedCache:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.seq_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        end = self.seq_len + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"capacity of {self.capacity} exceeded")
        if self.seq_len == 0:
            self.k = k.new_zeros(k.shape[0], k.shape[1], self.capacity, k.shape[3])
            self.v = torch.zeros_like(self.k)
        self.k[:, :, self.seq_len : end] = k
        self.v[:, :, self.seq_len : end] = v
        self.seq_len = end

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v


@wrong("02.4", "contiguous() in read copies the filled part", "read must be a view, without a copy")
class PreallocatedCache:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.seq_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        end = self.seq_len + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"capacity of {self.capacity} exceeded")
        if self.seq_len == 0:
            self.k = k.new_zeros(k.shape[0], k.shape[1], self.capacity, k.shape[3])
            self.v = torch.zeros_like(self.k)
        self.k[:, :, self.seq_len : end] = k
        self.v[:, :, self.seq_len : end] = v
        self.seq_len = end

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k[:, :, : self.seq_len].contiguous(), self.v[:, :, : self.seq_len].contiguous()


@wrong("02.4", "torch.zeros without dtype: float32 whatever comes", "the room must have the dtype of what arrives")
class PreallocatedCache:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.seq_len = 0
        self.k = self.v = None

    def append(self, k: Tensor, v: Tensor) -> None:
        batch, heads, new_tokens, head_dim = k.shape
        if self.seq_len + new_tokens > self.capacity:
            raise ValueError("full")
        if self.k is None:
            self.k = torch.zeros(batch, heads, self.capacity, head_dim, device=k.device)
            self.v = torch.zeros(batch, heads, self.capacity, head_dim, device=v.device)
        self.k[:, :, self.seq_len : self.seq_len + new_tokens] = k
        self.v[:, :, self.seq_len : self.seq_len + new_tokens] = v
        self.seq_len += new_tokens

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k[:, :, : self.seq_len], self.v[:, :, : self.seq_len]


@wrong("02.4", "k and v are given one and the same memory", "values overwrite keys: two allocations")
class PreallocatedCache:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.seq_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        end = self.seq_len + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"capacity of {self.capacity} exceeded")
        if self.seq_len == 0:
            self.k = self.v = k.new_zeros(k.shape[0], k.shape[1], self.capacity, k.shape[3])
        self.k[:, :, self.seq_len : end] = k
        self.v[:, :, self.seq_len : end] = v
        self.seq_len = end

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k[:, :, : self.seq_len], self.v[:, :, : self.seq_len]


@wrong("02.4", "new room at every append, the old moved over", "allocated once: nothing held may move again")
class PreallocatedCache:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.seq_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        end = self.seq_len + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"capacity of {self.capacity} exceeded")
        keys = k.new_empty(k.shape[0], k.shape[1], self.capacity, k.shape[3])
        values = torch.empty_like(keys)
        if self.seq_len:
            keys[:, :, : self.seq_len], values[:, :, : self.seq_len] = self.read()
        keys[:, :, self.seq_len : end] = k
        values[:, :, self.seq_len : end] = v
        self.k, self.v, self.seq_len = keys, values, end

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k[:, :, : self.seq_len], self.v[:, :, : self.seq_len]


@wrong(
    "02.4", "only asks whether it is full already", "several tokens that do not all fit: ValueError, not RuntimeError"
)
class PreallocatedCache:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.seq_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        if self.seq_len >= self.capacity:
            raise ValueError("cache is full")
        end = self.seq_len + k.shape[2]
        if self.seq_len == 0:
            self.k = k.new_zeros(k.shape[0], k.shape[1], self.capacity, k.shape[3])
            self.v = torch.zeros_like(self.k)
        self.k[:, :, self.seq_len : end] = k
        self.v[:, :, self.seq_len : end] = v
        self.seq_len = end

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k[:, :, : self.seq_len], self.v[:, :, : self.seq_len]


@wrong("02.4", "writes what fits, then raises", "all of it is refused, before anything changes")
class PreallocatedCache:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.seq_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        if self.seq_len == 0:
            self.k = k.new_zeros(k.shape[0], k.shape[1], self.capacity, k.shape[3])
            self.v = torch.zeros_like(self.k)
        for index in range(k.shape[2]):
            if self.seq_len == self.capacity:
                raise ValueError(f"no room behind {self.capacity} tokens")
            self.k[:, :, self.seq_len] = k[:, :, index]
            self.v[:, :, self.seq_len] = v[:, :, index]
            self.seq_len += 1

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k[:, :, : self.seq_len], self.v[:, :, : self.seq_len]


@wrong("02.4", "allocates before it checks, and once for all: a refused first append fixes batch and dtype", "changed on refusal: a smaller batch or other dtype comes out wrong afterwards")  # fmt: skip
class PreallocatedCache:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.seq_len = 0
        self.k: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> None:
        batch, heads, new_tokens, head_dim = k.shape
        if self.k is None:
            self.k = k.new_empty(batch, heads, self.capacity, head_dim)
            self.v = v.new_empty(batch, heads, self.capacity, head_dim)
        end = self.seq_len + new_tokens
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit into {self.capacity}")
        self.k[:, :, self.seq_len : end] = k
        self.v[:, :, self.seq_len : end] = v
        self.seq_len = end

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k[:, :, : self.seq_len], self.v[:, :, : self.seq_len]


@wrong("02.4", "the room belongs to the class", "two caches write into one memory: keep it on self")
class PreallocatedCache:
    k = v = None

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.seq_len = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        end, own = self.seq_len + k.shape[2], type(self)
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit into {self.capacity}")
        shape = (*k.shape[:2], self.capacity, k.shape[3])
        if own.k is None or own.k.shape != shape or own.k.dtype != k.dtype:
            own.k, own.v = k.new_empty(shape), v.new_empty(shape)
        self.k[:, :, self.seq_len : end] = k
        self.v[:, :, self.seq_len : end] = v
        self.seq_len = end

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k[:, :, : self.seq_len], self.v[:, :, : self.seq_len]


@right("02.4", "narrow and copy_, a property, __slots__")
class PreallocatedCache:
    __slots__ = ("_filled", "_keys", "_values", "capacity")

    def __init__(self, capacity: int) -> None:
        self.capacity, self._filled = capacity, 0

    @property
    def seq_len(self) -> int:
        return self._filled

    def append(self, k: Tensor, v: Tensor) -> None:
        new_tokens = k.size(2)
        if new_tokens > self.capacity - self._filled:
            raise ValueError(f"room for {self.capacity - self._filled} more tokens, got {new_tokens}")
        if not self._filled:
            shape = torch.Size((k.size(0), k.size(1), self.capacity, k.size(3)))
            self._keys = torch.zeros(shape, dtype=k.dtype, device=k.device)
            self._values = torch.zeros(shape, dtype=v.dtype, device=v.device)
        self._keys.narrow(2, self._filled, new_tokens).copy_(k)
        self._values.narrow(2, self._filled, new_tokens).copy_(v)
        self._filled += new_tokens

    def read(self) -> tuple[Tensor, Tensor]:
        return self._keys.narrow(2, 0, self._filled), self._values.narrow(2, 0, self._filled)


@right("02.4", "one room for both, tokens first in memory, read through permuted views")
class PreallocatedCache:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.seq_len = 0
        self.room: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> None:
        batch, heads, new_tokens, head_dim = k.shape
        start, stop = self.seq_len, self.seq_len + new_tokens
        if not stop <= self.capacity:
            raise ValueError("does not fit")
        if self.room is None:
            self.room = torch.empty(2, self.capacity, batch, heads, head_dim, dtype=k.dtype, device=k.device)
        self.room[0, start:stop] = k.permute(2, 0, 1, 3)
        self.room[1, start:stop] = v.permute(2, 0, 1, 3)
        self.seq_len = stop

    def read(self) -> tuple[Tensor, Tensor]:
        keys, values = self.room[:, : self.seq_len].permute(0, 2, 3, 1, 4)
        return keys, values


@right("02.4", "a dataclass, index_copy_")
@dataclass
class PreallocatedCache:
    capacity: int
    seq_len: int = field(default=0, init=False)
    rooms: tuple[Tensor, ...] = field(default=(), init=False, repr=False)

    def append(self, k: Tensor, v: Tensor) -> None:
        places = torch.arange(self.seq_len, self.seq_len + k.shape[2], device=k.device)
        if len(places) + self.seq_len > self.capacity:
            raise ValueError(f"{len(places) + self.seq_len} > {self.capacity}")
        if not self.rooms:
            self.rooms = tuple(t.new_empty((*t.shape[:2], self.capacity, t.shape[-1])) for t in (k, v))
        for room, new in zip(self.rooms, (k, v), strict=True):
            room.index_copy_(2, places, new)
        self.seq_len += len(places)

    def read(self) -> tuple[Tensor, Tensor]:
        return tuple(room[..., : self.seq_len, :] for room in self.rooms)


class _TooLong(ValueError):
    """A ValueError of its own."""


@right("02.4", "a subclass of ValueError, token by token after the check")
class PreallocatedCache:
    def __init__(self, capacity: int) -> None:
        self.capacity = int(capacity)
        self.seq_len = 0
        self.pair: dict[str, Tensor] = {}

    def append(self, k: Tensor, v: Tensor) -> None:
        if (overflow := self.seq_len + k.shape[2] - self.capacity) > 0:
            raise _TooLong(f"{overflow} tokens too many")
        for name, new in {"k": k, "v": v}.items():
            if name not in self.pair:
                self.pair[name] = new.new_full((*new.shape[:2], self.capacity, new.shape[3]), math.nan)
            for offset, token in enumerate(new.unbind(2)):
                self.pair[name][:, :, self.seq_len + offset] = token
        self.seq_len += k.shape[2]

    def read(self) -> tuple[Tensor, Tensor]:
        filled = slice(None, self.seq_len)
        return self.pair["k"][:, :, filled], self.pair["v"][:, :, filled]


# ---------------------------------------------------------------- 02.5 reusable_prefix


@wrong("02.5", "the last token of wanted may be reused", "one token must be run: at most len(wanted) - 1")
def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    same = 0
    for old, new in zip(held, wanted, strict=False):
        if old != new:
            break
        same += 1
    return same


@wrong("02.5", "always one less than what agrees", "one less only where all of wanted is held")
def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    same = 0
    while same < min(len(held), len(wanted)) and held[same] == wanted[same]:
        same += 1
    return max(same - 1, 0)


@wrong("02.5", "counts equal places behind the first difference too", "stop at the first token that differs")
def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    return min(sum(old == new for old, new in zip(held, wanted, strict=False)), len(wanted) - 1)


@wrong("02.5", "held's last token is kept out instead of wanted's", "the cap is len(wanted) - 1, not len(held) - 1")
def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    same = 0
    for old, new in zip(held, wanted, strict=False):
        if old != new:
            break
        same += 1
    return max(min(same, len(held) - 1), 0)


@wrong("02.5", "all of held or nothing", "what agrees before the first difference can be reused")
def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    if wanted[: len(held)] != held:
        return 0
    return min(len(held), len(wanted) - 1)


@wrong("02.5", "falls off the end: no difference found means all but the last", "held may be shorter than wanted")
def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    for index, (old, new) in enumerate(zip(held, wanted, strict=False)):
        if old != new:
            return index
    return len(wanted) - 1


@wrong("02.5", "0 or ...: a difference at the first place counts as none", "nothing is reusable when the first differs")
def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    pairs = enumerate(zip(held, wanted, strict=False))
    first_difference = next((index for index, (old, new) in pairs if old != new), None)
    return min(first_difference or len(held), len(wanted) - 1)


@wrong("02.5", "strict zip: both must be equally long", "held and wanted differ in length: ValueError")
def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    agree = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(held, wanted, strict=True))
    return min(sum(1 for _ in agree), len(wanted) - 1)


@wrong("02.5", "walks over held by index: IndexError when wanted is shorter", "held may be longer than wanted")
def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    same = 0
    for index in range(len(held)):
        if held[index] != wanted[index]:
            break
        same = index + 1
    return min(same, len(wanted) - 1)


@wrong(
    "02.5", "compares with `is`: ids above 256 are other objects", "equal ids that are not one object: compare with =="
)
def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    same = 0
    for old, new in zip(held, wanted, strict=False):
        if old is not new:
            break
        same += 1
    return min(same, len(wanted) - 1)


@wrong("02.5", "eats up the caller's lists", "held and wanted must stay as they are")
def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    same = 0
    while held and len(wanted) > 1 and held[0] == wanted[0]:
        held.pop(0)
        wanted.pop(0)
        same += 1
    return same


@wrong("02.5", "token 0 ends the prefix (truth of the id)", "0 is a token like any other")
def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    same = 0
    while same < len(wanted) - 1 and same < len(held) and held[same] and held[same] == wanted[same]:
        same += 1
    return same


@right("02.5", "os.path.commonprefix, which takes lists too")
def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    return len(os.path.commonprefix([held, wanted[:-1]]))


@right("02.5", "takewhile and sum")
def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    same = itertools.takewhile(lambda pair: operator.eq(*pair), zip(held, wanted[:-1], strict=False))
    return sum(1 for _ in same)


@right("02.5", "NumPy: a running product")
def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    most = min(len(held), len(wanted) - 1)
    agrees = np.asarray(held[:most], dtype=np.int64) == np.asarray(wanted[:most], dtype=np.int64)
    return int(np.cumprod(agrees).sum())


@right("02.5", "next over candidates, longest first")
def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    return next(n for n in range(len(wanted) - 1, -1, -1) if n <= len(held) and held[:n] == wanted[:n])


@right("02.5", "bisection")
def reusable_prefix(held: list[int], wanted: list[int]) -> int:
    low, high = 0, min(len(held), len(wanted) - 1)
    while low < high:
        middle = (low + high + 1) // 2
        if held[low:middle] == wanted[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


# ---------------------------------------------------------------- 02.6 cache_bytes


@wrong("02.6", "query heads for KV heads", "num_kv_heads: query heads are not stored")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    return 2 * spec.num_layers * spec.num_heads * spec.head_dim * tokens * batch * bytes_per_element


@wrong("02.6", "K alone: no factor 2", "K and V: twice as much")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    return spec.num_layers * spec.num_kv_heads * spec.head_dim * tokens * batch * bytes_per_element


@wrong("02.6", "head_dim as hidden_size // num_heads", "spec.head_dim: some models' heads do not divide hidden_size so")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    head_dim = spec.hidden_size // spec.num_heads
    return 2 * spec.num_layers * spec.num_kv_heads * head_dim * tokens * batch * bytes_per_element


@wrong("02.6", "batch forgotten", "each of batch rows has its own tokens")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * tokens * bytes_per_element


@wrong("02.6", "float32 assumed: bytes_per_element ignored", "bytes_per_element is not used")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * tokens * batch * 4


@wrong("02.6", "elements times bits", "bytes, not bits: 8 times too many")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    elements = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * tokens * batch
    return elements * bytes_per_element * 8


@wrong("02.6", "a float comes back: true division", "bytes are a whole number, int")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    all_heads = 2 * spec.num_layers * spec.num_heads * spec.head_dim * tokens * batch * bytes_per_element
    return all_heads / (spec.num_heads // spec.num_kv_heads)


@wrong("02.6", "tokens - 1: the newest is not held", "tokens are what is held: the count is not yours to change")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * (tokens - 1) * batch * bytes_per_element


@wrong("02.6", "one layer only", "all layers")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    return 2 * spec.num_kv_heads * spec.head_dim * tokens * batch * bytes_per_element


@wrong("02.6", "queries per KV head for KV heads", "num_heads // num_kv_heads is the group's size; here both are 3")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    kv_heads = spec.num_heads // spec.num_kv_heads
    return 2 * spec.num_layers * kv_heads * spec.head_dim * tokens * batch * bytes_per_element


@wrong("02.6", "the lab model's 30 layers, 3 heads and 64 written down", "spec is ignored")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    return 2 * 30 * 3 * 64 * bytes_per_element * tokens * batch


@wrong("02.6", "kibibytes, rounded down", "bytes, not KiB")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * tokens * batch * bytes_per_element // 1024


@right("02.6", "math.prod")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    return math.prod((2, spec.num_layers, batch, spec.num_kv_heads, tokens, spec.head_dim, bytes_per_element))


@right("02.6", "a tensor without memory, measured")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    shape = (batch, spec.num_kv_heads, tokens, spec.head_dim, bytes_per_element)
    one = torch.empty(shape, dtype=torch.uint8, device="meta")
    return sum(t.nbytes for _ in range(spec.num_layers) for t in (one, one))


@right("02.6", "functools.reduce over a generator expression")
def cache_bytes(spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
    factors = (getattr(spec, name) for name in ("num_layers", "num_kv_heads", "head_dim"))
    return functools.reduce(operator.mul, factors, bytes_per_element) * tokens * batch << 1


class _Bytes:
    """A callable object."""

    parts = ("k", "v")

    def __call__(self, spec: ModelSpec, tokens: int, batch: int, bytes_per_element: int) -> int:
        return sum(spec.num_kv_heads * spec.head_dim * spec.num_layers for _ in self.parts) * (tokens * batch) * bytes_per_element  # fmt: skip


RIGHT.append(("02.6", "a callable object", _Bytes()))


# ---------------------------------------------------------------- 02.7 attend_chunk


@wrong("02.7", "left as it stands: the triangle starts in the top left corner", "held tokens are hidden from the chunk")
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    new_tokens, kv_len = q.shape[2], k.shape[2]
    mask = None
    if new_tokens > 1:
        mask = torch.ones(new_tokens, kv_len, dtype=torch.bool, device=q.device).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@wrong("02.7", "no mask where something is held", "within the chunk the future is visible")
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] == k.shape[2], enable_gqa=True)


@wrong("02.7", "offset one too small: no token sees itself", "a token sees itself; the first row of a prompt is nan")
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    new_tokens, kv_len = q.shape[2], k.shape[2]
    mask = torch.ones(new_tokens, kv_len, dtype=torch.bool, device=q.device).tril(kv_len - new_tokens - 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@wrong("02.7", "offset one too large", "each token sees one of the future")
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    new_tokens, kv_len = q.shape[2], k.shape[2]
    mask = torch.ones(new_tokens, kv_len, dtype=torch.bool, device=q.device).tril(kv_len - new_tokens + 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@wrong("02.7", "sign of the offset", "the offset is kv_len - new_tokens, not the other way round")
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    new_tokens, kv_len = q.shape[2], k.shape[2]
    mask = None
    if new_tokens > 1:
        mask = torch.ones(new_tokens, kv_len, dtype=torch.bool, device=q.device).tril(new_tokens - kv_len)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@wrong("02.7", "mask inverted: True = hidden", "PyTorch's attn_mask: True may be seen")
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    new_tokens, kv_len = q.shape[2], k.shape[2]
    mask = None
    if new_tokens > 1:
        mask = torch.ones(new_tokens, kv_len, dtype=torch.bool, device=q.device).triu(kv_len - new_tokens + 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@wrong("02.7", "dtype=bool lost: 0 and 1 are added to the scores", "a float mask is added: nothing is hidden")
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    new_tokens, kv_len = q.shape[2], k.shape[2]
    mask = torch.ones(new_tokens, kv_len, dtype=q.dtype, device=q.device).tril(kv_len - new_tokens)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@wrong("02.7", "only the chunk's own keys are read", "what is held must be seen as well")
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    own = slice(-q.shape[2], None)
    return F.scaled_dot_product_attention(q, k[:, :, own], v[:, :, own], is_causal=True, enable_gqa=True)


@wrong("02.7", "enable_gqa lost", "fewer KV heads than query heads raise")
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    new_tokens, kv_len = q.shape[2], k.shape[2]
    mask = torch.ones(new_tokens, kv_len, dtype=torch.bool, device=q.device).tril(kv_len - new_tokens)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@wrong("02.7", "KV heads tiled 0 1 2 0 1 2 in place of 0 0 0 1 1 1", "query head h reads KV head h // group")
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    new_tokens, kv_len, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    mask = torch.ones(new_tokens, kv_len, dtype=torch.bool, device=q.device).tril(kv_len - new_tokens)
    return F.scaled_dot_product_attention(q, k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1), attn_mask=mask)


@wrong("02.7", "offset 8, the notebook's chunk, written down", "right only where 8 are held")
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    new_tokens, kv_len = q.shape[2], k.shape[2]
    mask = None
    if new_tokens > 1:
        past = 8 if kv_len > new_tokens else 0
        mask = torch.ones(new_tokens, kv_len, dtype=torch.bool, device=q.device).tril(past)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@wrong(
    "02.7", "supposes that all chunks were as long as this one", "the last chunk may be shorter: kv_len - new_tokens"
)
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    new_tokens, kv_len = q.shape[2], k.shape[2]
    earlier_chunks = kv_len // new_tokens - 1
    mask = torch.ones(new_tokens, kv_len, dtype=torch.bool, device=q.device).tril(earlier_chunks * new_tokens)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@wrong(
    "02.7",
    "additive mask in float32 whatever q is",
    "float64 q, k, v: silently other numbers; the mask must be bool or of q's dtype",
)
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    new_tokens, kv_len = q.shape[2], k.shape[2]
    mask = torch.full((new_tokens, kv_len), float("-inf"), device=q.device).triu(kv_len - new_tokens + 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@wrong("02.7", "scale 1/8, that of head_dim 64, written down while mending", "another head_dim: the scale is not 1/8")
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    new_tokens, kv_len = q.shape[2], k.shape[2]
    mask = torch.ones(new_tokens, kv_len, dtype=torch.bool, device=q.device).tril(kv_len - new_tokens)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.125, enable_gqa=True)


@right("02.7", "positions compared")
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    positions = torch.arange(k.shape[2], device=q.device)
    return F.scaled_dot_product_attention(
        query=q, key=k, value=v, attn_mask=positions[-q.shape[2] :, None] >= positions, enable_gqa=True
    )


@right("02.7", "token by token over the prefix that each may see, no mask")
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    past = k.shape[2] - q.shape[2]
    rows = (
        F.scaled_dot_product_attention(one, k[:, :, :seen], v[:, :, :seen], enable_gqa=True)
        for seen, one in enumerate(q.split(1, dim=2), start=past + 1)
    )
    return torch.cat(list(rows), dim=2)


@right("02.7", "written out, query heads grouped by a reshape, additive -inf, softmax in float32 or wider")
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped = q.unflatten(1, (k.shape[1], -1))  # [batch, num_kv_heads, group, new_tokens, head_dim]
    scores = torch.einsum("bngqd,bnkd->bngqk", grouped, k) * q.shape[-1] ** -0.5
    hide = torch.full(scores.shape[-2:], -math.inf, device=q.device).triu(k.shape[2] - q.shape[2] + 1)
    wide = (scores + hide.to(scores.dtype)).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    return torch.einsum("bngqk,bnkd->bngqd", wide.to(v.dtype), v).flatten(1, 2)


@right("02.7", "labkit's own explicit attention")
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return explicit_attention(q, k, v)


@right("02.7", "a loop over query heads; a mask from np.tri; float64 inside")
def attend_chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (_, heads, new_tokens, _), (_, kv_heads, kv_len, _) = q.shape, k.shape
    seen = torch.from_numpy(np.tri(new_tokens, kv_len, kv_len - new_tokens, dtype=bool)).to(q.device)
    out = torch.empty_like(q)
    for head in range(heads):
        mine = head * kv_heads // heads
        scores = q[:, head].double() @ k[:, mine].double().mT / math.sqrt(q.shape[-1])
        out[:, head] = (scores.where(seen, -math.inf).softmax(-1) @ v[:, mine].double()).to(q.dtype)
    return out
