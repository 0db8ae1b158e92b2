"""How long a step must at least take: bytes over bandwidth, operations over the peak rate, and which decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from labkit.sizing.cache import head_width, step_bytes
from labkit.sizing.formats import Evicting, Format, Selecting, kv_format
from labkit.sizing.memory import ceil_div, on_one_rank
from labkit.sizing.units import (
    LIMIT,
    SizeError,
    check_count,
    check_number,
    check_share,
    check_spec,
    dtype_name,
    shown,
    to_bytes,
)

if TYPE_CHECKING:
    from labkit.specs import GpuSpec, Layer, LinkSpec, ModelSpec

MOST_TOKENS = LIMIT**2  # of one pass: so many requests of so many tokens


@dataclass(frozen=True)
class Floor:
    """The least time of one pass, in seconds, and what it is made of.

    weight_bytes, kv_bytes: read (decode) or read and written (prefill) per device; flops: operations per device.
    reading and computing go on at the same time, so the longer one decides; communication comes on top.
    """

    weight_bytes: int
    kv_bytes: int
    flops: int
    reading: float
    computing: float
    communicating: float = 0.0

    @property
    def seconds(self) -> float:
        """The pass cannot be faster."""
        return max(self.reading, self.computing) + self.communicating

    @property
    def bound(self) -> str:
        """What decides: "memory" or "compute"."""
        return "memory" if self.reading >= self.computing else "compute"

    @property
    def intensity(self) -> float:
        """Operations per byte moved."""
        return arithmetic_intensity(self.flops, self.weight_bytes + self.kv_bytes)


def weights_met(model: ModelSpec, tokens: int) -> int:
    """Weights that a pass over `tokens` tokens reads, on average.

    All that a token meets of a dense model but an embedding table that is no head as well; of a mixture with E experts,
    k per token, those that at least one token chose: E x (1 - (1 - k/E)^tokens), choices being independent and even.
    """
    check_spec("model", model)
    check_count("tokens", tokens, most=MOST_TOKENS)
    embedding = 0 if model.tied_head else model.vocab_size * model.hidden_size
    if model.num_experts is None or model.experts_per_token is None:
        return model.num_active_parameters - embedding
    experts, chosen = model.num_experts, model.experts_per_token
    if experts == chosen:
        return model.num_parameters - embedding
    one = (model.num_parameters - model.num_active_parameters) / (experts - chosen)  # this expert in every layer
    met = experts * (1 - (1 - chosen / experts) ** tokens)
    return round(model.num_active_parameters - chosen * one + met * one) - embedding


def step_flops(model: ModelSpec, tokens: int, *, past: int = 0, batch: int = 1) -> int:
    """Operations of a pass over `tokens` new tokens behind `past` cached ones, for `batch` requests.

    Two per weight of the layers and token, two per weight of the head for the last token, and those of attention: each
    query meets each key it may see, two operations per number of key and of value.
    """
    check_spec("model", model)
    check_count("tokens", tokens)
    check_count("past", past, least=0)
    check_count("batch", batch)
    head = model.vocab_size * model.hidden_size
    layers = model.num_active_parameters - head * (1 if model.tied_head else 2)
    attention = sum(
        count * 2 * model.num_heads * attention_width(model, layer, tokens) * pairs(tokens, past, layer.window)
        for layer, count in model.layer_counts.items()
        if layer.attends
    )
    return batch * (2 * layers * tokens + 2 * head + attention)


def attention_width(model: ModelSpec, layer: Layer, tokens: int) -> int:
    """Numbers of one key and one value that a query head meets.

    A latent is met as it is when one token decodes (scores over all of it, values over all but its rotary part, here
    counted whole), and expanded to heads in a prompt.
    """
    return 2 * layer.latent_dim if layer.kind == "latent" and tokens == 1 else head_width(model, layer)


def pairs(tokens: int, past: int, window: int | None) -> int:
    """Pairs of a new query and a key that it may see, itself included, at most `window` of them."""
    last = past + tokens
    if window is None or last <= window:
        return tokens * past + tokens * (tokens + 1) // 2
    growing = max(0, window - past)  # queries whose window is not yet full
    return growing * past + growing * (growing + 1) // 2 + (tokens - growing) * window


def decode_floor(
    model: ModelSpec,
    gpu: GpuSpec,
    context: int,
    batch: int = 1,
    *,
    dtype: str | Format = "float16",
    weight_dtype: str = "bfloat16",
    ranks: int = 1,
    link: LinkSpec | None = None,
) -> Floor:
    """The least time of one decode step of `batch` requests that hold `context` tokens each, the new one included.

    Of the cache, what the new token sees is read: no room left over, and nothing beyond a window.
    """
    check_count("context", context)
    return _floor(model, gpu, 1, context - 1, batch, dtype, weight_dtype, ranks, link)


def prefill_floor(
    model: ModelSpec,
    gpu: GpuSpec,
    prompt: int,
    batch: int = 1,
    *,
    dtype: str | Format = "float16",
    weight_dtype: str = "bfloat16",
    ranks: int = 1,
    link: LinkSpec | None = None,
) -> Floor:
    """The least time of one pass over `batch` prompts of `prompt` tokens: weights read once, K and V written once."""
    check_count("prompt", prompt)
    return _floor(model, gpu, prompt, 0, batch, dtype, weight_dtype, ranks, link)


def _floor(
    model: ModelSpec,
    gpu: GpuSpec,
    new: int,
    past: int,
    batch: int,
    dtype: str | Format,
    weight_dtype: str,
    ranks: int,
    link: LinkSpec | None,
) -> Floor:
    """Of a pass over `new` tokens behind `past` cached ones, for `batch` requests."""
    check_spec("model", model)
    check_count("batch", batch)
    check_count("ranks", ranks)
    check_spec("gpu", gpu)
    weights = ceil_div(to_bytes(weights_met(model, new * batch), weight_dtype), ranks)
    cache = step_bytes(on_one_rank(model, ranks), past + new, batch, dtype)
    flops = ceil_div(step_flops(model, new, past=left_of(model, past, kv_format(dtype)), batch=batch), ranks)
    return Floor(
        weights,
        cache,
        flops,
        reading=(weights + cache) / gpu.bytes_per_s,
        computing=flops / math_rate(gpu, weight_dtype),
        communicating=all_reduce_seconds(model, ranks, new * batch, link),
    )


def left_of(model: ModelSpec, past: int, kept: Format) -> int:
    """How many of `past` tokens later queries meet: what every layer has left of them, or reads."""
    if isinstance(kept, Evicting) and past and all(kept.evicts(layer) for layer in model.layer_counts):
        return kept.keeps(past + 1) - 1
    if isinstance(kept, Selecting) and all(kept.selects(layer) for layer in model.layer_counts):
        return min(past, kept.budget - 1)
    return past


def all_reduce_seconds(model: ModelSpec, ranks: int, tokens: int, link: LinkSpec | None) -> float:
    """Time that tensor parallelism spends on its link: two sums over the ranks per layer, of `tokens` hidden states.

    A ring moves 2 (ranks - 1) / ranks of the data over each link (bandwidth only, no latency; 16-bit numbers).
    """
    check_spec("model", model)
    check_count("ranks", ranks)
    check_count("tokens", tokens, most=MOST_TOKENS)
    if link is not None:
        check_spec("link", link)
    if ranks == 1 or link is None:
        return 0.0
    moved = 2 * model.num_layers * tokens * model.hidden_size * 2 * 2 * (ranks - 1) / ranks
    return moved / (link.gb_s * 1e9)


def math_rate(gpu: GpuSpec, weight_dtype: str) -> float:
    """Operations a second of products with weights of this dtype. Integers are widened first, to 16 bits."""
    name = dtype_name(weight_dtype)
    if name in ("float64", "float32", "float16", "bfloat16", "float8"):
        return gpu.flop_per_s(name)
    return max(gpu.flop_per_s("float16"), gpu.flop_per_s("bfloat16"))


def arithmetic_intensity(flops: float, nbytes: float) -> float:
    """Operations per byte that is moved."""
    return check_number("flops", flops, zero=True) / check_number("bytes", nbytes)


def ridge(gpu: GpuSpec, dtype: str = "bfloat16") -> float:
    """Operations per byte above which a device waits for its arithmetic and no longer for its memory."""
    check_spec("gpu", gpu)
    return gpu.flop_per_s(_arithmetic(dtype)) / gpu.bytes_per_s


def _arithmetic(dtype: Any) -> str:
    """A dtype's name, for `GpuSpec.flop_per_s` to look up."""
    if not isinstance(dtype, str):
        raise SizeError(f'dtype is a name, as "bfloat16"; got {shown(dtype)}')
    return dtype


def attainable(gpu: GpuSpec, intensity: float, dtype: str = "bfloat16") -> float:
    """The roofline: operations a second at `intensity` operations per byte, the lower of the two roofs."""
    check_spec("gpu", gpu)
    return min(gpu.flop_per_s(_arithmetic(dtype)), check_number("intensity", intensity, zero=True) * gpu.bytes_per_s)


def ttft(floor: Floor, *, mfu: float = 0.5, mbu: float = 0.6) -> float:
    """Time to first token in seconds, estimated from a prefill's floor: the shares of the peaks that are reached.

    The defaults are assumptions, not measurements; put in what your engine reaches. Waiting in a queue comes on top.
    """
    if not isinstance(floor, Floor):
        raise SizeError(f"floor is what prefill_floor or decode_floor gives; got {shown(floor)}")
    return max(floor.computing / check_share("mfu", mfu), floor.reading / check_share("mbu", mbu)) + floor.communicating


def tpot(floor: Floor, *, mfu: float = 0.5, mbu: float = 0.6) -> float:
    """Time per output token in seconds, estimated from a decode step's floor; as `ttft`."""
    return ttft(floor, mfu=mfu, mbu=mbu)
