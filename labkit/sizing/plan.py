"""One answer to "will it run?": a model, a device, a context and so many users."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from labkit.sizing import report
from labkit.sizing.cache import bytes_per_token, peak_bytes
from labkit.sizing.formats import Format, kv_format
from labkit.sizing.memory import RESERVE, capacity, ceil_div, longest_context, on_one_rank, room_for_cache, weight_bytes
from labkit.sizing.speed import decode_floor, prefill_floor
from labkit.sizing.units import check_count

if TYPE_CHECKING:
    from labkit.specs import GpuSpec, LinkSpec, ModelSpec


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes are per device. `free` is what is left after weights, reserve and cache; negative when they do not fit.

    cache: the most that it takes on the way to `context`. users_that_fit and context_that_fits move one while the other
    stays as asked; None: memory sets no limit. step (at `context`) and prefill are floors in seconds.
    """

    model: str
    gpu: str
    ranks: int
    context: int
    users: int
    kv_dtype: str
    weight_dtype: str
    bits_per_element: float
    bytes_per_token: float
    memory: int
    weights: int
    reserve: int
    cache: int
    users_that_fit: int
    context_that_fits: int | None
    trained_context: int
    step: float
    step_bound: str
    prefill: float
    prefill_bound: str

    @property
    def free(self) -> int:
        """Bytes left."""
        return self.memory - self.weights - self.reserve - self.cache

    @property
    def fits(self) -> bool:
        """Whether memory is enough at every length up to the context."""
        return self.free >= 0

    @property
    def verdict(self) -> str:
        """What breaks first, in a sentence."""
        return report.verdict(self)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        more = {"free": self.free, "fits": self.fits, "tokens_per_s": self.users / self.step, "verdict": self.verdict}
        return asdict(self) | more


def plan(
    model: ModelSpec,
    gpu: GpuSpec,
    *,
    context: int = 8192,
    users: int = 1,
    dtype: str | Format = "float16",
    weight_dtype: str = "bfloat16",
    reserve: float = RESERVE,
    ranks: int = 1,
    link: LinkSpec | None = None,
) -> Plan:
    """Bytes, limits, floors and a verdict. Raises SizeError for sizes that cannot be."""
    check_count("context", context)
    check_count("users", users)
    kept = kv_format(dtype)
    room = room_for_cache(model, gpu, weight_dtype=weight_dtype, reserve=reserve, ranks=ranks)
    weights = ceil_div(weight_bytes(model, weight_dtype), ranks)
    memory: dict[str, Any] = {"dtype": kept, "weight_dtype": weight_dtype, "reserve": reserve, "ranks": ranks}
    speed: dict[str, Any] = {"dtype": kept, "weight_dtype": weight_dtype, "ranks": ranks, "link": link}
    step = decode_floor(model, gpu, context, users, **speed)
    prefill = prefill_floor(model, gpu, context, **speed)
    return Plan(
        model=model.name,
        gpu=gpu.name,
        ranks=ranks,
        context=context,
        users=users,
        kv_dtype=kept.name,
        weight_dtype=weight_dtype,
        bits_per_element=float(kept.bits_per_element),
        bytes_per_token=float(bytes_per_token(model, kept)),
        memory=gpu.memory_bytes,
        weights=weights,
        reserve=max(0, gpu.memory_bytes - weights - max(0, room)),
        cache=peak_bytes(on_one_rank(model, ranks), context, users, kept),
        users_that_fit=capacity(model, gpu, context, **memory),
        context_that_fits=longest_context(model, gpu, users, **memory),
        trained_context=model.max_seq_len,
        step=step.seconds,
        step_bound=step.bound,
        prefill=prefill.seconds,
        prefill_bound=prefill.bound,
    )
