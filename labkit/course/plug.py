"""What lets a learner's own small class or function drive the real model.

A learner's cache keeps the K and V of one layer:

    append(k, v)    new tokens' K and V, both [batch, num_kv_heads, new_tokens, head_dim]
    read()          (k, v) of every token held, [batch, num_kv_heads, tokens, head_dim]

`as_cache` puts one behind each layer; `run_with` runs the model through a learner's decode step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FunctionType, ModuleType
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor

from labkit.attention import Constants
from labkit.cache import Cache, LayerCache, Step
from labkit.cache.layer import Observer
from labkit.llama import Attention, Llama
from labkit.rotation import rotate

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

    @property
    def name(self) -> str:
        """The name of the learner's class."""
        return type(self.own).__name__

    @property
    def nbytes(self) -> int:
        """Bytes that the object keeps."""
        pieces: dict[int, dict[Any, int]] = {}  # of each piece of memory, what is held of it
        for thing in things_in(self.own):
            memory, where, nbytes, whole = place_of(thing)
            held = pieces.setdefault(memory, {"whole": whole})
            held[where] = max(held.get(where, 0), nbytes)
        return sum(min(held.pop("whole"), sum(held.values())) for held in pieces.values())

    def template(self) -> Tensor | None:
        """None: what is wrong with the learner's class is said when it is read, not when something is appended."""
        return None

    def held(self) -> tuple[Tensor, Tensor] | None:
        """What `read` gives; TypeError or ValueError when that is not K and V of every token appended."""
        return self.read_out(self.seq_len) if self.lengths else None

    def read_out(self, tokens: int) -> tuple[Tensor, Tensor]:
        """What `read` gives; TypeError or ValueError when that is not K and V of so many tokens."""
        both = self.own.read()
        if not isinstance(both, (tuple, list)) or len(both) != 2 or not all(isinstance(x, Tensor) for x in both):
            raise TypeError(f"{self.name}.read() must return two tensors, (k, v); it returned a {type(both).__name__}")
        k, v = both
        if k.dim() != 4 or k.shape != v.shape:
            raise ValueError(
                f"{self.name}.read() must return k and v of one shape, [batch, num_kv_heads, tokens, head_dim]; got "
                f"{list(k.shape)} and {list(v.shape)}"
            )
        if k.shape[2] != tokens:
            raise ValueError(f"{self.name} was given {tokens} tokens; its read() returned {k.shape[2]}")
        return k, v

    def write(self, k: Tensor, v: Tensor, step: Step) -> None:
        """Append; ValueError when not every token appended is held."""
        self.own.append(k, v)
        self.read_out(step.after[0])

    def attend(self, q: Tensor, step: Step | None = None, *, observe: Observer | None = None) -> Tensor:
        """Attention over what `read` gives, the learner's where there is one."""
        if self.own_attend is None:
            return super().attend(q, step, observe=observe)
        usual = self.constants in (Constants(), Constants(q.shape[3] ** -0.5))
        if not usual or observe is not None or (step is not None and step.padding):
            raise ValueError(
                f"an attention of your own takes q, k and v alone; here it would have to know {self.constants}, "
                f"padding or somebody who looks on: leave out attend="
            )
        k, v = self.read()
        return self.own_attend(q, k, v)

    def mark(self) -> Any:
        """The object, and what its attributes hold; tensors are expected not to be written where tokens are held."""
        return self.lengths, self.own, [(part, copied(content)) for part, content in reachable(self.own)]

    def restore(self, mark: Any) -> None:
        """The object with the attributes it had."""
        self.lengths, self.own, parts = mark
        for part, content in parts:
            put_back(part, content)

    def forget_from(self, seq_len: int) -> None:
        """A new object with the first `seq_len` tokens."""
        self.rebuild(lambda x: x[:, :, :seq_len])

    def choose_rows(self, rows: Tensor) -> None:
        """A new object with these rows."""
        self.rebuild(lambda x: x.index_select(0, rows.to(x.device)))

    def rebuild(self, part: Callable[[Tensor], Tensor]) -> None:
        """Put part of what is held into a new object, since a learner's class can only append."""
        k, v = (part(x).clone() for x in self.read_out(self.seq_len))
        own = checked(self.make())
        own.append(k, v)
        self.own = own

    def forget(self) -> None:
        """A new, empty object."""
        self.own = checked(self.make())


CONTAINERS = (dict, list, set, tuple, deque, bytearray)
THINGS = (Tensor, numpy.ndarray, type, ModuleType, FunctionType, str, bytes, int, float, type(None))


def reachable(own: Any) -> Iterator[tuple[Any, Any]]:
    """Each object that `own` keeps its things in, itself first, and what is in it: attributes, or items.

    Tensors, arrays, classes, functions and modules are things, not what things are kept in.
    """
    waiting, seen = [own], set()
    while waiting:
        part = waiting.pop()
        if id(part) in seen or isinstance(part, THINGS):
            continue
        seen.add(id(part))
        content = part if isinstance(part, CONTAINERS) else attributes(part)
        waiting += [] if isinstance(part, bytearray) else items(content)
        if len(content):
            yield part, content


def items(content: Any) -> list[Any]:
    """What is in a container, or the values of attributes."""
    return list(dict.values(content)) if isinstance(content, dict) else list(iter(content))


def things_in(own: Any) -> Iterator[Any]:
    """Every tensor, array and byte array that `own` keeps, however deep."""
    for part, content in reachable(own):
        if isinstance(part, bytearray):
            yield part
        else:
            yield from (thing for thing in items(content) if isinstance(thing, (Tensor, numpy.ndarray)))


def place_of(thing: Any) -> tuple[int, Any, int, int]:
    """The memory that a thing lies in, where in it, its bytes, and those of all of that memory."""
    if isinstance(thing, Tensor):
        storage = thing.untyped_storage()
        return storage.data_ptr(), thing.data_ptr(), thing.nbytes, storage.nbytes()
    if isinstance(thing, numpy.ndarray):
        owner = thing
        while isinstance(owner.base, numpy.ndarray):
            owner = owner.base
        return owner.__array_interface__["data"][0], thing.__array_interface__["data"][0], thing.nbytes, owner.nbytes
    return id(thing), 0, len(thing), len(thing)


def attributes(own: Any) -> dict[str, Any]:
    """What an object keeps, in its `__dict__` and its `__slots__`."""
    slots = [
        f"_{kind.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
        for kind in type(own).__mro__
        for name in as_names(vars(kind).get("__slots__", ()))
    ]
    kept = {name: getattr(own, name) for name in slots if name != "__dict__" and hasattr(own, name)}
    return kept | getattr(own, "__dict__", {})


def as_names(slots: Any) -> Iterable[str]:
    """`__slots__` may be one name."""
    return [slots] if isinstance(slots, str) else slots


def copied(content: Any) -> Any:
    """What is in a container, as it is now; a class of the learner's own may have other methods than its base."""
    if isinstance(content, dict):
        return dict(dict.items(content))
    return bytes(content) if isinstance(content, bytearray) else list(iter(content))


def put_back(part: Any, content: Any) -> None:
    """Make a container, or the attributes of an object, what they were, whatever methods the learner gave it."""
    if isinstance(part, tuple):
        return
    if isinstance(part, dict):
        dict.clear(part)
        dict.update(part, content)
    elif isinstance(part, set):
        set.clear(part)
        set.update(part, content)
    elif isinstance(part, list):
        list.__setitem__(part, slice(None), content)
    elif isinstance(part, bytearray):
        part[:] = content
    elif isinstance(part, deque):
        deque.clear(part)
        deque.extend(part, content)
    else:
        for name in attributes(part).keys() - content.keys():
            object.__delattr__(part, name)
        for name, value in content.items():
            object.__setattr__(part, name, value)


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
        q, k, v = self.attention.project(x).split(self.attention.heads, dim=1)
        return q, k, v

    def rotate(self, x: Tensor, position: int) -> Tensor:
        """Rotary positions for q or k: its tokens stand at `position`, `position + 1`, ..."""
        return rotate(x, *self.model.angles(torch.arange(position, position + x.shape[2], device=x.device)[None]))

    def merge(self, out: Tensor) -> Tensor:
        """What attention gave, `[batch, num_heads, tokens, head_dim]`, as `[batch, tokens, hidden_size]`."""
        return self.attention.merge(out)


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
        layer = AttentionLayer(model, block.attention)
        x = block.around(x, step_of(decode_step, layer, cache))
    return model.predict(x)


def step_of(decode_step: Callable, layer: AttentionLayer, cache: Any) -> Callable[[Tensor], Tensor]:
    """The learner's step as one layer's attention."""
    return lambda normed: decode_step(normed, layer, cache)
