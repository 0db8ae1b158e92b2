"""Held: the memory that an object keeps alive, wherever it hides it."""

from __future__ import annotations

import array
import collections
import functools
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from labkit.ledger import memory_of

PLAIN = (str, int, float, complex, bool, type(None), types.ModuleType, types.CodeType, types.FrameType)


def tensors_behind(*roots: Any, without: Sequence[Any] = ()) -> list[Tensor]:
    """Every tensor that can be reached from `roots`: attributes and slots, containers of any kind, closures, defaults,
    inner objects, the classes' own attributes; each once, empty ones left out. without: what is reached from these is
    not theirs, such as what a check handed in."""
    return [thing for thing in walk(roots, without) if isinstance(thing, Tensor) and thing.numel()]


def bytes_behind(*roots: Any, without: Sequence[Any] = ()) -> int:
    """Bytes of all numbers that `roots` keep alive: tensors with all the memory that they were cut from, NumPy arrays,
    bytes and arrays, lists of numbers (8 bytes each). Memory that two share counts once."""
    memory: dict[Any, int] = {}
    for thing in walk(roots, without):
        if isinstance(thing, Tensor):
            memory[memory_of(thing)] = thing.untyped_storage().nbytes()
        elif isinstance(thing, np.ndarray):
            owner = thing
            while isinstance(owner.base, np.ndarray):
                owner = owner.base
            memory[owner.__array_interface__["data"][0]] = owner.nbytes
        elif isinstance(thing, (bytes, bytearray)):
            memory[id(thing)] = len(thing)
        elif isinstance(thing, array.array):
            memory[id(thing)] = len(thing) * thing.itemsize
        elif isinstance(thing, (list, tuple)) and thing and isinstance(thing[0], (int, float)):
            memory[id(thing)] = 8 * len(thing)
    return sum(memory.values())


def walk(roots: Iterable[Any], without: Iterable[Any] = ()) -> Iterator[Any]:
    """Everything reachable from `roots` and not from `without`, each once."""
    seen: set[int] = set()
    waiting = collections.deque(roots)
    alive = list(walk(without)) if without else []  # what is made on the way must not be freed: its id would be reused
    seen.update(map(id, alive))
    while waiting:
        thing = waiting.popleft()
        if isinstance(thing, PLAIN) or id(thing) in seen:
            continue
        seen.add(id(thing))
        alive.append(thing)
        yield thing
        waiting.extend(inside(thing))


def inside(thing: Any) -> Iterator[Any]:
    """What one object refers to. Of functions what they closed over; of classes written by hand what stands in them."""
    if isinstance(thing, Tensor):
        yield from vars(thing).values()
        if thing.grad is not None:
            yield thing.grad
    elif isinstance(thing, Mapping):
        yield from thing.keys()
        yield from thing.values()
    elif isinstance(thing, (list, tuple, set, frozenset, collections.deque)):
        if not (len(thing) > 64 and all(isinstance(x, (int, float)) for x in thing)):
            yield from thing
    elif isinstance(thing, functools.partial):
        yield from (thing.func, thing.args, thing.keywords)
    elif isinstance(thing, types.MethodType):
        yield from (thing.__self__, thing.__func__)
    elif isinstance(thing, types.FunctionType):
        yield from (thing.__defaults__, thing.__kwdefaults__, thing.__dict__)
        yield from (cell.cell_contents for cell in thing.__closure__ or () if not is_empty(cell))
    elif isinstance(thing, weakref.ref):
        pass  # keeps nothing alive
    elif isinstance(thing, type):
        if thing.__module__ not in ("builtins", "typing", "abc", "enum") and not thing.__module__.startswith("torch"):
            yield from vars(thing).values()
    elif isinstance(thing, np.ndarray):
        if thing.dtype == object:
            yield from thing.flat
    elif isinstance(thing, (property, staticmethod, classmethod, functools.cached_property)):
        yield from (getattr(thing, name, None) for name in ("fget", "fset", "__func__", "func"))
    else:
        yield type(thing)
        yield from getattr(thing, "__dict__", {}).values()
        for kind in type(thing).__mro__:
            slots = vars(kind).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                name = (
                    f"_{kind.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
                )
                yield getattr(thing, name, None)
        if isinstance(thing, types.GeneratorType) and thing.gi_frame is not None:
            yield from thing.gi_frame.f_locals.values()


def is_empty(cell: types.CellType) -> bool:
    """Whether a closure's cell was never filled."""
    return cell == types.CellType()
