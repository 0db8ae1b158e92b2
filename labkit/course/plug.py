"""What lets a learner's own small class or function drive the real model.

A learner's cache keeps the K and V of one layer:

    append(k, v)    new tokens' K and V, both [batch, num_kv_heads, new_tokens, head_dim]
    read()          (k, v) of every token held, [batch, num_kv_heads, tokens, head_dim]

`as_cache` puts one behind each layer; `run_with` runs the model through a learner's decode step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.cache import Cache, LayerCache
from labkit.ledger import tensors_in
from labkit.llama import Attention, Llama, rotate

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class SmallCache(Protocol):
    """A learner's cache of one layer."""

    def append(self, k: Tensor, v: Tensor) -> Any:
        """Add new tokens."""

    def read(self) -> tuple[Tensor, Tensor]:
        """K and V of every token held."""


class PluggedLayer(LayerCache):
    """One layer's cache, kept by an object of the learner's.

    make: makes that object. attend: answers queries in the place of PyTorch's attention, `attend(q, k, v)`.
    `nbytes` is what the object keeps in its attributes, each piece of memory counted once.
    """

    def __init__(self, make: Callable[[], SmallCache], attend: Attend | None = None) -> None:
        super().__init__()
        self.make, self.own_attend = make, attend
        self.own = checked(make())
        self._seq_len = 0

    @property
    def name(self) -> str:
        """The name of the learner's class."""
        return type(self.own).__name__

    @property
    def seq_len(self) -> int:
        """Tokens appended."""
        return self._seq_len

    @property
    def nbytes(self) -> int:
        """Bytes that the object keeps."""
        kept: dict[int, int] = {}
        for tensor in tensors_in(vars(self.own)):
            kept[tensor.data_ptr()] = max(kept.get(tensor.data_ptr(), 0), tensor.nbytes)
        return sum(kept.values())

    def held(self) -> tuple[Tensor, Tensor] | None:
        """What `read` gives; TypeError or ValueError when that is not K and V."""
        if not self._seq_len:
            return None
        both = self.own.read()
        if not isinstance(both, (tuple, list)) or len(both) != 2 or not all(isinstance(x, Tensor) for x in both):
            raise TypeError(f"{self.name}.read() must return two tensors, (k, v); it returned a {type(both).__name__}")
        k, v = both
        if k.dim() != 4 or k.shape != v.shape:
            raise ValueError(
                f"{self.name}.read() must return k and v of one shape, [batch, num_kv_heads, tokens, head_dim]; got "
                f"{list(k.shape)} and {list(v.shape)}"
            )
        return k, v

    def write(self, k: Tensor, v: Tensor) -> None:
        """Append; ValueError when not every token appended is held."""
        self.own.append(k, v)
        self._seq_len += k.shape[2]
        held = self.held()
        if held and held[0].shape[2] != self._seq_len:
            tokens = held[0].shape[2]
            raise ValueError(f"{self.name} was given {self._seq_len} tokens; its read() returned {tokens}")

    def attend(self, q: Tensor) -> Tensor:
        """Attention over what `read` gives, the learner's where there is one."""
        if self.own_attend is None:
            return super().attend(q)
        k, v = self.read()
        return self.own_attend(q, k, v)

    def truncate(self, seq_len: int) -> None:
        """A new object with the first `seq_len` tokens."""
        if seq_len < self._seq_len:
            self.rebuild(lambda x: x[:, :, :seq_len])

    def select_rows(self, rows: Tensor) -> None:
        """A new object with these rows."""
        if self._seq_len:
            self.rebuild(lambda x: x.index_select(0, rows.to(x.device)))

    def rebuild(self, part: Callable[[Tensor], Tensor]) -> None:
        """Put part of what is held into a new object, since a learner's class can only append."""
        k, v = (part(x).clone() for x in self.own.read())
        self.own, self._seq_len = self.make(), 0
        if k.shape[2]:
            self.write(k, v)

    def reset(self) -> None:
        """A new, empty object."""
        self.own, self._seq_len = self.make(), 0
        self.bytes_written = self.bytes_copied = self.bytes_read = 0


def checked(own: Any) -> SmallCache:
    """`own`, or a TypeError that says what its class lacks."""
    missing = [f"{name}()" for name in ("append", "read") if not callable(getattr(own, name, None))]
    if missing:
        raise TypeError(
            f"{type(own).__name__} cannot keep K and V: it has no {' and no '.join(missing)}. A layer's cache needs "
            f"append(k, v) and read() -> (k, v)"
        )
    return own


def as_cache(
    num_layers: int,
    make_layer: Callable[[], SmallCache],
    attend: Attend | None = None,
) -> Cache:
    """A model's cache with a learner's object in each layer.

    make_layer: called once per layer, such as the class itself, or `lambda: PreallocatedCache(512)`. Raises TypeError
    when it cannot be called or what it makes lacks `append` or `read`, and ValueError when it makes one object twice.
    attend: `attend(q, k, v)` in the place of PyTorch's attention.
    """
    if not callable(make_layer):
        raise TypeError(
            f"as_cache takes something that makes a layer's cache, such as the class itself; got a "
            f"{type(make_layer).__name__}"
        )
    layers = [PluggedLayer(make_layer, attend) for _ in range(num_layers)]
    if len({id(layer.own) for layer in layers}) < num_layers:
        raise ValueError("every layer needs a cache of its own: make_layer returned one object twice")
    return Cache(layers)


class AttentionLayer:
    """One attention layer of a model, taken apart: what happens before and after the cache.

    num_heads, num_kv_heads, head_dim: its shape.
    """

    def __init__(self, model: Llama, attention: Attention) -> None:
        self.model, self.attention = model, attention
        self.num_heads, self.num_kv_heads, _ = attention.heads
        self.head_dim = attention.head_dim

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q `[batch, num_heads, tokens, head_dim]`, k and v `[batch, num_kv_heads, tokens, head_dim]`; nothing rotated.

        x: `[batch, tokens, hidden_size]`.
        """
        batch, tokens, _ = x.shape
        heads = self.attention.heads
        qkv = self.attention.qkv(x).view(batch, tokens, sum(heads), self.head_dim).transpose(1, 2)
        q, k, v = qkv.split(heads, dim=1)
        return q, k, v

    def rotate(self, x: Tensor, position: int) -> Tensor:
        """Rotary positions for q or k: its tokens stand at `position`, `position + 1`, ..."""
        cos, sin = self.model.angles(position, x.shape[2], None)
        return rotate(x, cos, sin)

    def merge(self, out: Tensor) -> Tensor:
        """What attention gave, `[batch, num_heads, tokens, head_dim]`, as `[batch, tokens, hidden_size]`."""
        batch, _, tokens, _ = out.shape
        return self.attention.out(out.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim))


@torch.no_grad()
def run_with(
    decode_step: Callable[[Tensor, AttentionLayer, Any], Tensor], model: Llama, tokens: Tensor, caches: Sequence[Any]
) -> Tensor:
    """Logits `[batch, 1, vocab_size]` of one new token, with `decode_step(x, layer, cache)` as every layer's attention.

    tokens: int `[batch, 1]`. caches: one per layer.
    """
    if len(caches) != len(model.blocks):
        raise ValueError(f"{len(caches)} caches for {len(model.blocks)} layers: make one per layer")
    x = model.embedding(tokens)
    for block, cache in zip(model.blocks, caches, strict=True):
        x = x + decode_step(block.attention_norm(x), AttentionLayer(model, block.attention), cache)
        x = x + block.mlp(block.mlp_norm(x))
    x = model.norm(x)
    return F.linear(x, model.embedding.weight) if model.head is None else model.head(x)
