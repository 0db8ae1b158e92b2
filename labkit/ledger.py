"""The work ledger: what code really does, counted while it runs. Exact where clocks are noisy.

    with ledger(model) as work:
        model(tokens)
    work.kv_projections, work.scores, work.bytes_read, work.bytes_copied, work.allocations

It watches calls of PyTorch functions, not the kernels below them, so that the counts of a CPU and a GPU are the same.

The rules. A *weight* is a parameter, or a tensor given to `watch`; anything else is an *activation*.

- A product of two activations is attention. A first product (queries with keys) gives scores: each entry counts one to
  `scores`. A product with something that came from scores blends values. Either way the operand that holds keys or
  values counts to `bytes_read`; a tensor that was broadcast counts once. PyTorch's fused attention counts the same, and
  so does labkit's over packed K and V, with the bytes they are packed in, and over K and V in blocks, with the tokens
  of each row that are seen; of packed blocks with the whole block.
- A product with a watched weight counts one projection per row of the activation, times the weight's share.
- A softmax of three or more dimensions over numbers that no such product gave counts as scores too: somebody multiplied
  and summed by hand. What was read is then not seen.
- `bytes_copied` are bytes written by functions that only move data: concatenating, indexing, copying, repeating,
  changing the dtype or the layout.
- An allocation is a result that shares no memory with what went in.

Not seen: a weight that was copied or converted before its product; which part of a weight a view of it is (it counts as
the whole); work inside fused modules such as `nn.MultiheadAttention`; moves by `copy.deepcopy`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from labkit.kernels.paged_packed_attention import what_is_read
from labkit.prepacked import prepacked_linear

# By name: importing the last one imports Numba.
PACKED = {"packed_attention", "packed_decode_attention", "packed_decode_attention_cpu"}
PAGED = {"paged_attention", "paged_decode_attention", "paged_decode_attention_cpu"}
PAGED_PACKED = {"paged_packed_attention", "paged_packed_decode_attention", "paged_packed_decode_attention_cpu"}
PRODUCTS = {
    "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "addmm_", "addmv", "baddbmm", "baddbmm_",
    "addbmm", "einsum", "tensordot", "inner", "dot", "vdot", "vecdot",
}  # fmt: skip
MOVES = {
    "cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "clone", "contiguous", "repeat", "tile",
    "repeat_interleave", "roll", "flip", "index_select", "gather", "take_along_dim", "masked_select", "pad", "to",
    "type", "float", "half", "bfloat16", "double", "reshape", "flatten", "slice_scatter", "select_scatter",
    "index_copy", "scatter", "__getitem__",
}  # fmt: skip
WRITES = {"__setitem__", "copy_", "index_copy_", "scatter_", "index_put_"}


@dataclass
class Work:
    """Counts of the work done.

    kv_projections: tokens whose K and V were computed, summed over layers. scores: entries of attention's score
    matrices. bytes_read: K and V that attention read. bytes_copied: bytes that only moved. allocations: new tensors.
    bytes_allocated: their bytes.
    """

    kv_projections: float = 0
    scores: int = 0
    bytes_read: int = 0
    bytes_copied: int = 0
    allocations: int = 0
    bytes_allocated: int = 0

    def __sub__(self, other: Work) -> Work:
        return Work(*(getattr(self, field.name) - getattr(other, field.name) for field in fields(self)))

    def copy(self) -> Work:
        """The counts as they stand now."""
        return Work(*(getattr(self, field.name) for field in fields(self)))


class Ledger(TorchFunctionMode):
    """Counts the work of every PyTorch function called while it is active. `work` holds the counts."""

    def __init__(self, watch: Iterable[tuple[Tensor, float]] = ()) -> None:
        super().__init__()
        self.work = Work()
        # kept alive, so that an id means one tensor; a prepacked weight reads as a copy, made when it is asked for
        self.watched = [(getattr(weight, "_prepacked", weight), share) for weight, share in watch]
        self.shares = {memory_of(weight): share for weight, share in self.watched}

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.is_property(func):
            result = func(*args, **kwargs)
            if isinstance(result, Tensor) and getattr(args[0], "_scores", False):  # x.T, x.mT
                result._scores = True  # type: ignore[attr-defined]
            return result
        name = getattr(func, "__name__", "")
        before = {memory_of(tensor) for tensor in tensors_in((args, kwargs))}
        result = func(*args, **kwargs)
        self.count_products(func, name, args, kwargs, result)
        self.count_memory(name, args, kwargs, before, result)
        return result

    @staticmethod
    def is_property(func: Callable) -> bool:
        """Whether this call only looks at a tensor (`x.shape`, `x.T`), which is no work."""
        return getattr(func, "__name__", "") in (
            "__get__",
            "__set__",
            "size",
            "dim",
            "stride",
            "numel",
            "item",
            "data_ptr",
        )

    def count_products(self, func: Callable, name: str, args: tuple, kwargs: dict, result: Any) -> None:
        """Projections, scores and attention's reads."""
        if func is F.scaled_dot_product_attention:
            query, key, value = (
                args[i] if i < len(args) else kwargs[n] for i, n in enumerate(("query", "key", "value"))
            )
            self.work.scores += query[..., 0].numel() * key.shape[-2]
            self.work.bytes_read += unique_bytes(key) + unique_bytes(value)
        elif name in PACKED:
            query, key, value = args[:3]
            dense = [x for pair in (kwargs["before"], kwargs["after"]) if pair is not None for x in pair]
            tokens = key.num_tokens + sum(x.shape[2] for x in dense) // 2
            self.work.scores += query[..., 0].numel() * tokens
            self.work.bytes_read += key.nbytes + value.nbytes + sum(x.nbytes for x in dense)
        elif name in PAGED:
            query, key, value, _, visible, constants = args
            tokens = visible.keys_read(constants, len(query))
            self.work.scores += query[0, ..., 0].numel() * tokens
            self.work.bytes_read += tokens * (key[0, 0].nbytes + value[0, 0].nbytes)
        elif name in PAGED_PACKED:
            query, key, value, (waiting, _), _, visible, constants = args
            self.work.scores += query[0, ..., 0].numel() * visible.keys_read(constants, len(query))
            blocks, tokens = what_is_read(visible, constants, len(query), key.quantizer.group_size)
            self.work.bytes_read += blocks * (key.rows[0].nbytes + value.rows[0].nbytes)
            self.work.bytes_read += 2 * tokens * waiting[0, :, 0].nbytes if tokens else 0
        elif func in (F.linear, prepacked_linear):
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            activation = args[0] if args else kwargs["input"]
            self.count_projection(activation, weight, activation.shape[-1])
        elif name in PRODUCTS:
            left, right = operands(name, args, kwargs)
            if left is None or right is None:
                return
            if self.is_weight(right):
                self.count_projection(left, right, left.shape[-1])
            elif self.is_weight(left):
                self.count_projection(right, left, left.shape[-1])
            elif result.numel() and not is_outer(name, left, right):
                self.count_attention(left, right, result)
        elif isinstance(result, Tensor):
            self.follow_scores(name, args, kwargs, result)

    def follow_scores(self, name: str, args: tuple, kwargs: dict, result: Tensor) -> None:
        """What is made from scores entry by entry still stands for scores: scaled, masked, softmaxed, cut, joined."""
        part = name in ("__getitem__", "narrow", "select", "cat", "concat", "concatenate", "stack")
        for source in tensors_in((args, kwargs)):
            if getattr(source, "_scores", False) and (part or source.numel() == result.numel()):
                result._scores = True  # type: ignore[attr-defined]
        if name == "softmax" and result.dim() >= 3 and not getattr(result, "_scores", False):
            self.work.scores += result.numel()
            result._scores = True  # type: ignore[attr-defined]

    def count_attention(self, left: Tensor, right: Tensor, result: Tensor) -> None:
        """One product of two activations: queries with keys, or weights with values."""
        if getattr(left, "_scores", False):
            self.work.bytes_read += unique_bytes(right)
        elif getattr(right, "_scores", False):
            self.work.bytes_read += unique_bytes(left)
        else:
            self.work.scores += result.numel()
            self.work.bytes_read += unique_bytes(right)
            result._scores = True  # type: ignore[attr-defined]

    def is_weight(self, tensor: Tensor) -> bool:
        """A parameter, a view of one, or a watched tensor."""
        base = tensor._base if tensor._base is not None else tensor
        return isinstance(base, nn.Parameter) or memory_of(tensor) in self.shares

    def count_projection(self, activation: Tensor, weight: Tensor, summed: int) -> None:
        """One projection per row of `activation`, times the watched weight's share. `summed`: the length of a row."""
        if share := self.shares.get(memory_of(weight)):
            self.work.kv_projections += activation.numel() // max(summed, 1) * share

    def count_memory(self, name: str, args: tuple, kwargs: dict, before: set[int], result: Any) -> None:
        """Allocations and bytes moved."""
        if name in WRITES:
            self.work.bytes_copied += written_bytes(name, args, kwargs)
            return
        if kwargs.get("out") is not None and name in MOVES:
            self.work.bytes_copied += kwargs["out"].nbytes
            return
        for tensor in tensors_in(result):
            if tensor.numel() and memory_of(tensor) not in before:
                self.work.allocations += 1
                self.work.bytes_allocated += tensor.nbytes
                if name in MOVES:
                    self.work.bytes_copied += tensor.nbytes


@contextmanager
def ledger(watch: Any = None) -> Iterator[Work]:
    """Count the work of the block.

    watch: whose K and V projections to count: a `Llama`, a Hugging Face model (its `k_proj` and `v_proj`), or pairs
    (weight, share of one layer's K/V projection).
    """
    counter = Ledger(weights_to_watch(watch))
    with counter:
        yield counter.work


def weights_to_watch(watch: Any) -> list[tuple[Tensor, float]]:
    """The (weight, share) pairs that `watch` stands for."""
    if watch is None:
        return []
    if hasattr(watch, "kv_weights"):
        return list(watch.kv_weights())
    if isinstance(watch, nn.Module):
        names = ("k_proj.weight", "v_proj.weight")
        found: list[tuple[Tensor, float]] = [
            (weight, 0.5) for name, weight in watch.named_parameters() if name.endswith(names)
        ]
        if not found:
            raise ValueError(f"{type(watch).__name__} has no k_proj and v_proj: give (weight, share) pairs instead")
        return found
    return list(watch)


def memory_of(tensor: Tensor) -> int:
    """What tells one piece of memory from another: the address of the storage."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (NotImplementedError, RuntimeError):  # an opaque layout, such as a packed weight
        return id(tensor)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def unique_bytes(tensor: Tensor) -> int:
    """Bytes behind a tensor, each counted once: a dimension that was broadcast (stride 0) holds one entry."""
    entries = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        entries *= size if stride else 1
    return entries * tensor.element_size()


def operands(name: str, args: tuple, kwargs: dict) -> tuple[Tensor | None, Tensor | None]:
    """The two factors of a product, in the order of the call; None where there are not two tensors.

    What is added (`addmm(added, left, right)`) stands first and is no factor.
    """
    factors = list(tensors_in((args, {key: value for key, value in kwargs.items() if key != "out"})))
    if len(factors) != (3 if name.startswith(("add", "badd")) else 2):
        return None, None
    left, right = factors[-2:]
    return (right, left) if name == "__rmatmul__" else (left, right)


def is_outer(name: str, left: Tensor, right: Tensor) -> bool:
    """Whether a product sums over nothing, such as positions times frequencies: no attention."""
    return name != "einsum" and (left.dim() == 0 or left.shape[-1] == 1) and not getattr(left, "_scores", False)


def written_bytes(name: str, args: tuple, kwargs: dict) -> int:
    """Bytes that an in-place write puts into its target."""
    target = args[0]
    if name == "__setitem__":
        return target[args[1]].nbytes if isinstance(target, Tensor) else 0
    if name == "copy_":
        return target.nbytes
    sources = [tensor for tensor in tensors_in((args[1:], kwargs)) if tensor.dtype == target.dtype]
    return sources[-1].nbytes if sources else 0
