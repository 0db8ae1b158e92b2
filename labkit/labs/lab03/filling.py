"""A GPU's memory filled with requests until one is refused: what section 3 computes, tried.

`recorded` reads what `benchmarks/gpu_memory.py` found on other machines; `fill` does the same on a GPU that is at hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from labkit import measure, results, sizing
from labkit.specs import DATA, ModelSpec


@dataclass(frozen=True)
class Filled:
    """How many requests of `context` tokens found room beside a model's weights until one was refused.

    free: bytes before the weights came. weights: what they were given. request: bytes of one cache. fitted: requests.
    why: what the refusal means in bytes; empty where it was not kept.
    """

    model: str
    context: int
    free: int
    weights: int
    request: int
    fitted: int
    why: str = ""

    def __str__(self) -> str:
        if not self.context:
            return f"{self.model}: the weights alone find no room: {self.why}"
        said = f"{self.model:<10} {self.context:>7,} tokens each: {self.fitted:>3} requests fitted"
        return f"{said}. The next: {self.why}" if self.why else said


def recorded(
    device: str, models: Sequence[ModelSpec], contexts: Sequence[int], folder: Path = DATA / "results"
) -> list[Filled]:
    """What a GPU with `device` in its name was found to hold, model by model; what is not recorded is left out."""
    figures, found = results.figures_on("memory", device, folder), []
    for spec in models:
        for context in contexts:
            fitted = figures.get(f"{spec.name}, {context} tokens: requests that fit until one is refused")
            weights = figures.get(f"{spec.name}: bytes of the weights, given")
            if fitted is None or weights is None:
                continue
            free = int(figures["free at the beginning, bytes"])
            found.append(Filled(spec.name, context, free, int(weights), request_bytes(spec, context), int(fitted)))
    return found


def fill(
    device: torch.device, spec: ModelSpec, contexts: Sequence[int], *, limit: int | None = None
) -> Iterator[Filled]:
    """Fill the memory of `device` with weights and then with caches, for each context anew, and let go of all of it.

    What is allocated is not written: only its size counts. Weights that find no room at all are the last that comes,
    with a context of 0. limit: bytes for everything, where the device's memory is not to be filled; a CPU needs one.
    """
    if limit is None and device.type != "cuda":
        raise ValueError("a computer that has no memory left stops: say a limit in bytes")
    if any(context < 1 for context in contexts):
        raise ValueError(f"requests hold at least one token, or memory never fills; got {list(contexts)}")
    measure.give_back(device)
    free = measure.memory(device)["free"] if limit is None else limit
    weights = sizing.weight_bytes(spec, "bfloat16")
    held: list[Tensor] = []
    try:
        if why := refusal(held, weights, device, limit):
            yield Filled(spec.name, 0, free, weights, weights, 0, why)
            return
        for context in contexts:
            request = request_bytes(spec, context)
            while not (why := refusal(held, request, device, limit)):
                pass
            yield Filled(spec.name, context, free, weights, request, len(held) - 1, why)
            del held[1:]
            measure.give_back(device)
    finally:
        held.clear()
        measure.give_back(device)


def refusal(held: list[Tensor], nbytes: int, device: torch.device, limit: int | None) -> str:
    """Hold so many bytes more, or say why not."""
    try:
        if limit is not None and sum(map(len, held)) + nbytes > limit:
            raise torch.OutOfMemoryError
        # One piece for a request: many small ones leave gaps in the allocator's segments of 20 MiB.
        held.append(torch.empty(nbytes, dtype=torch.uint8, device=device))
    except torch.OutOfMemoryError:
        tensors = sum(map(len, held))
        said = measure.room_told(device) if limit is None else f"tensors hold {tensors:,} B of a limit of {limit:,}"
        return f"{nbytes:,} B more were asked for; {said}"
    return ""


def request_bytes(spec: ModelSpec, context: int) -> int:
    """Bytes of one request's K and V in 16 bits."""
    return sizing.cache_bytes(spec, context, 1, dtype="bfloat16")
