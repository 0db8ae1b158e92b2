"""What fits: weights, cache and reserve against a device's memory, on one device or divided over several."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from labkit.sizing.cache import peak_bytes
from labkit.sizing.formats import Format, Layered, kv_format
from labkit.sizing.units import LIMIT, SizeError, check_count, check_share, check_spec, shown, to_bytes

if TYPE_CHECKING:
    from labkit.specs import GpuSpec, Layer, ModelSpec

RESERVE = 0.15
"""Share of what the weights leave that is kept free: activations, the allocator's gaps, the framework. With it, one
H100 of 79.1 GiB serves Qwen2.5-7B to 504, 126, 31 and 7 requests of 2K, 8K, 32K and 128K tokens."""


def weight_bytes(model: ModelSpec, dtype: str = "bfloat16") -> int:
    """Bytes of all weights, each kept in `dtype`. All experts of a mixture count: any of them may be needed next."""
    check_spec("model", model)
    return to_bytes(model.num_parameters, dtype)


def room_for_cache(
    model: ModelSpec, gpu: GpuSpec, *, weight_dtype: str = "bfloat16", reserve: float = RESERVE, ranks: int = 1
) -> int:
    """Bytes per device left for the cache: (memory - weights) x (1 - reserve). Negative: no room for the weights."""
    check_spec("gpu", gpu)
    share = check_share("reserve", reserve, zero=True)
    left = gpu.memory_bytes - ceil_div(weight_bytes(model, weight_dtype), check_count("ranks", ranks))
    return int(left * (1 - share)) if left > 0 else left


def capacity(
    model: ModelSpec,
    gpu: GpuSpec,
    context: int,
    *,
    dtype: str | Format = "float16",
    weight_dtype: str = "bfloat16",
    reserve: float = RESERVE,
    ranks: int = 1,
) -> int:
    """How many requests fit beside the weights at every length up to `context` tokens; 0 when not even the weights do.

    What counts is the most that a request takes on the way (`peak_bytes`), which in few bits is not at its end.
    """
    check_count("context", context)
    room = room_for_cache(model, gpu, weight_dtype=weight_dtype, reserve=reserve, ranks=ranks)
    one = peak_bytes(on_one_rank(model, ranks), context, 1, dtype)
    if room <= 0:
        return 0
    if one <= 0:  # of a format of one's own
        raise SizeError(
            f"{context:,} tokens take {one:,} bytes in {kv_format(dtype).name}: nothing limits how many fit"
        )
    return room // one


def longest_context(
    model: ModelSpec,
    gpu: GpuSpec,
    batch: int = 1,
    *,
    dtype: str | Format = "float16",
    weight_dtype: str = "bfloat16",
    reserve: float = RESERVE,
    ranks: int = 1,
) -> int | None:
    """The most tokens that each of `batch` requests may grow to; 0 when none fit, None when memory sets no limit.

    Every length on the way fits as well: as `capacity`. A format with a capacity of its own is a limit where memory is
    none. What the model was trained for is another: `model.max_seq_len`.
    """
    check_count("batch", batch)
    room = room_for_cache(model, gpu, weight_dtype=weight_dtype, reserve=reserve, ranks=ranks)
    part, kept = on_one_rank(model, ranks), kv_format(dtype)
    most = kept.limit or LIMIT
    longest = largest(most, lambda tokens: peak_bytes(part, tokens, batch, kept) <= room)
    return None if longest == LIMIT and kept.limit is None else longest


def largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to `most` that fits, where no larger one does; 0 if none does."""
    if not fits(1):
        return 0
    if fits(most):
        return most
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def max_batch_context_frontier(
    model: ModelSpec, gpu: GpuSpec, contexts: Iterable[int], **options: object
) -> list[tuple[int, int]]:
    """Pairs of context and the most requests that fit up to it; options as in `capacity`."""
    if isinstance(contexts, str) or not isinstance(contexts, Iterable):
        raise SizeError(f"contexts are numbers of tokens, as in [2048, 8192]; got {shown(contexts)}")
    return [(context, capacity(model, gpu, context, **options)) for context in contexts]  # type: ignore[arg-type]


MOST_RANKS = 1024  # that are offered where heads do not divide


@dataclass(frozen=True)
class Split:
    """K and V heads of one layer over the ranks of tensor parallelism.

    kv_heads_per_rank, and copies: on how many ranks each KV head is kept. total: bytes over all ranks / on one device.
    """

    ranks: int
    kv_heads_per_rank: int
    copies: int
    total: float


def split_heads(num_heads: int, num_kv_heads: int, ranks: int) -> Split:
    """Divide heads over ranks. With fewer KV heads than ranks each is copied, and the cache no longer shrinks.

    Raises SizeError when query heads do not divide, or KV heads neither divide nor are divided.
    """
    for name, value in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads), ("ranks", ranks)):
        check_count(name, value)
    if num_heads % ranks:
        fitting = [n for n in range(1, min(num_heads, MOST_RANKS) + 1) if num_heads % n == 0]
        raise SizeError(f"{num_heads} query heads do not divide over {ranks} ranks: take one of {fitting}")
    if num_kv_heads % ranks and ranks % num_kv_heads:
        raise SizeError(
            f"{num_kv_heads} KV heads and {ranks} ranks: one must divide the other, so that a rank has whole heads"
        )
    per_rank = max(1, num_kv_heads // ranks)
    return Split(ranks, per_rank, max(1, ranks // num_kv_heads), ranks * per_rank / num_kv_heads)


def on_one_rank(model: ModelSpec, ranks: int) -> Layered:
    """What one of `ranks` ranks of tensor parallelism keeps of the cache."""
    check_spec("model", model)
    return model if check_count("ranks", ranks) == 1 else Part(model, ranks)


class Part:
    """The layers of one rank. A latent is needed whole by every head, so every rank keeps all of it."""

    def __init__(self, model: ModelSpec, ranks: int) -> None:
        split_heads(model.num_heads, model.num_heads, ranks)  # where layers have no KV heads, query heads must divide
        self.layer_counts: dict[Layer, int] = {}
        for layer, count in model.layer_counts.items():
            layer = replace(layer, state_bytes=ceil_div(layer.state_bytes, ranks))
            if layer.num_kv_heads:
                split = split_heads(model.num_heads, layer.num_kv_heads, ranks)
                layer = replace(layer, num_kv_heads=split.kv_heads_per_rank)
            self.layer_counts[layer] = self.layer_counts.get(layer, 0) + count


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
