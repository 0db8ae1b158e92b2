"""Bytes, capacity, bandwidth, cost: arithmetic only, no torch.

Sizes are in bytes, times in seconds, rates per second. What is predicted here is what `nbytes` says, to the byte; what
fits, fits at every length on the way. Raises SizeError for sizes that cannot be.

    from labkit import sizing, specs
    model, gpu = specs.model("qwen2.5-7b"), specs.gpu("h100-80gb")
    sizing.bytes_per_token(model, dtype="float16")    # 57344
    sizing.capacity(model, gpu, 128 * 1024)           # 7
"""

from labkit.sizing.cache import (
    bytes_per_token,
    cache_bytes,
    mha_bytes_per_token,
    peak_bytes,
    step_bytes,
)
from labkit.sizing.cost import Bill, Price, conversation_cost
from labkit.sizing.formats import Dense, Evicting, Format, Paged, PagedQuantized, Quantized, Selecting, kv_format
from labkit.sizing.memory import (
    RESERVE,
    Split,
    capacity,
    longest_context,
    max_batch_context_frontier,
    room_for_cache,
    split_heads,
    weight_bytes,
)
from labkit.sizing.plan import Plan, plan
from labkit.sizing.report import table
from labkit.sizing.speed import (
    Floor,
    all_reduce_seconds,
    arithmetic_intensity,
    attainable,
    decode_floor,
    prefill_floor,
    ridge,
    step_flops,
    tpot,
    ttft,
    weights_met,
)
from labkit.sizing.units import BITS, GB, GIB, SizeError, bits, gigabytes

__all__ = [
    "BITS",
    "GB",
    "GIB",
    "RESERVE",
    "Bill",
    "Dense",
    "Evicting",
    "Floor",
    "Format",
    "Paged",
    "PagedQuantized",
    "Plan",
    "Price",
    "Quantized",
    "Selecting",
    "SizeError",
    "Split",
    "all_reduce_seconds",
    "arithmetic_intensity",
    "attainable",
    "bits",
    "bytes_per_token",
    "cache_bytes",
    "capacity",
    "conversation_cost",
    "decode_floor",
    "gigabytes",
    "kv_format",
    "longest_context",
    "max_batch_context_frontier",
    "mha_bytes_per_token",
    "peak_bytes",
    "plan",
    "prefill_floor",
    "ridge",
    "room_for_cache",
    "split_heads",
    "step_bytes",
    "step_flops",
    "table",
    "tpot",
    "ttft",
    "weight_bytes",
    "weights_met",
]
