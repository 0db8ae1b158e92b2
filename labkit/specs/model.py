"""A model's shape: the numbers that fix what its weights and its KV cache take. No torch."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import field
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from labkit.specs.files import SpecError, explain

DECODER_TYPES = ("llama", "mistral", "qwen2")
ROPE_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
T = TypeVar("T")
LIMIT = 10**9  # larger than any size of a real model: beyond it, a unit was mixed up
MAX_LAYERS = 10_000  # as for LIMIT, and each layer is written out
Count = Annotated[int, Field(ge=1, le=LIMIT)]
Layers = Annotated[int, Field(ge=1, le=MAX_LAYERS)]
Number = Annotated[int, Field(ge=1, le=10**15)]
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

Kind = Literal["full", "window", "latent", "shared", "state", "hybrid", "none"]
# What a layer of each kind may say of itself; what it must say stands first.
FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "full": ((), ("num_kv_heads", "head_dim", "v_head_dim", "index_dim")),
    "window": ((), ("window", "num_kv_heads", "head_dim", "v_head_dim", "index_dim")),
    "latent": (("latent_dim",), ("window", "index_dim")),
    "shared": ((), ()),
    "state": (("state_bytes",), ()),
    "hybrid": (("state_bytes",), ("window", "num_kv_heads", "head_dim", "v_head_dim", "index_dim")),
    "none": ((), ()),
}
HOLDS = ("full", "window", "latent", "hybrid")  # kinds that keep something of each token
NEEDS = {"latent_dim": "numbers kept per token", "state_bytes": "bytes kept per request"}


def one_line_errors(cls: type[T]) -> type[T]:
    """Let `cls(...)` raise SpecError in one line where pydantic would list all that is wrong over several."""
    build = cls.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            build(self, *args, **kwargs)
        except ValidationError as error:
            said = explain(error.errors()[0])
            name = kwargs.get("name") or (args[0] if args and "name" in vars(cls)["__annotations__"] else "")
            raise SpecError(said if said.startswith(f"{name}: ") or not name else f"{name}: {said}") from None

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer as its cache sees it.

    kind: "full" keeps K and V of every token; "window" of the last `window`; "latent" one vector of `latent_dim`
    numbers per token in their place (DeepSeek's multi-head latent attention); "shared" nothing, as it reads an earlier
    layer's; "state" `state_bytes` per request however long that is (Mamba, linear attention); "hybrid" K and V, of the
    last `window` where it has one, and a state beside them (Falcon-H1); "none" nothing at all of the text: it has no
    attention, or attends to images (Nemotron-H, Llama 3.2 Vision). index_dim: numbers per token kept beside K and V to
    choose which of them are read (DeepSeek-V3.2), one in float32 counting as two.
    """

    kind: Kind
    num_kv_heads: int = 0
    k_dim: int = 0
    v_dim: int = 0
    window: int | None = None
    latent_dim: int = 0
    state_bytes: int = 0
    index_dim: int = 0

    @property
    def elements_per_token(self) -> int:
        """Numbers that one token adds, K and V together, while no window is full."""
        if self.kind == "latent":
            return self.latent_dim + self.index_dim
        return self.num_kv_heads * (self.k_dim + self.v_dim) + self.index_dim

    @property
    def attends(self) -> bool:
        """Whether it reads keys and values of the text, its own or an earlier layer's."""
        return self.kind not in ("state", "none")

    def tokens_held(self, seq_len: int) -> int:
        """Tokens of one request that the layer holds after `seq_len`."""
        if self.kind in ("shared", "state", "none"):
            return 0
        return seq_len if self.window is None else min(seq_len, self.window)


@one_line_errors
@dataclass(frozen=True, config=STRICT)
class LayerGroup:
    """`count` neighbouring layers of one kind, as a file states them. What is left out is the model's.

    v_head_dim: where head_dim is given and values are not as wide as keys. Raises SpecError for what the kind has not.
    """

    kind: Kind
    count: Layers = 1
    window: Count | None = None
    num_kv_heads: Count | None = None
    head_dim: Count | None = None
    v_head_dim: Count | None = None
    latent_dim: Count | None = None
    index_dim: Count | None = None
    state_bytes: Count | None = None

    def __post_init__(self) -> None:
        needed, allowed = FIELDS[self.kind]
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f'a layer of kind "{self.kind}" needs {name}: {NEEDS[name]}')
        for name in ("window", "num_kv_heads", "head_dim", "v_head_dim", "latent_dim", "index_dim", "state_bytes"):
            if getattr(self, name) is not None and name not in (*needed, *allowed):
                fitting = [kind for kind, (must, may) in FIELDS.items() if name in (*must, *may)]
                raise ValueError(
                    f'a layer of kind "{self.kind}" has no {name}: take it out, or is the kind {" or ".join(fitting)}?'
                )


@one_line_errors
@dataclass(frozen=True, config=STRICT)
class ModelSpec:
    """The shape of a decoder. Sizes are counts; nothing here is in bytes, `state_bytes` aside.

    name, title, source, date say what it is and where the numbers come from. `model_type` is Hugging Face's.
    window: the sliding window in tokens of the layers that have one; None for full attention.
    layers: the kinds of the layers, in order from the first, beginning anew until `num_layers` are named; None when all
    are of one kind: "window" where a window is given, else "full".
    v_head_dim: where values are not as wide as keys. max_seq_len: the longest context it was trained for.
    found: how it was found where it was read from a config: measured, or by arithmetic.
    parameters: weights in all, as published; a Llama-style shape needs none, they can be counted. active_parameters:
    those that one token meets, in a mixture of experts (num_experts, of which experts_per_token are met) or beside
    Gemma 3n's tables of embeddings per layer, of which it reads a row each.
    The rest is what `labkit.llama` needs to run it: `qkv_bias` is Qwen2's, `rope_scaling` Hugging Face's dict.
    """

    name: str
    num_layers: Layers
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    hidden_size: Count
    intermediate_size: Count
    vocab_size: Count
    max_seq_len: Count
    rope_theta: Annotated[float, Field(gt=0)] = 10_000.0
    norm_eps: Annotated[float, Field(ge=0)] = 1e-5
    tied_head: bool = False
    qkv_bias: bool = False
    window: Count | None = None
    rope_scaling: dict[str, Any] | None = field(default=None, hash=False)
    source: str = ""
    date: str = ""
    title: str = ""
    model_type: str = "llama"
    layers: list[LayerGroup] | None = field(default=None, hash=False)
    v_head_dim: Count | None = None
    parameters: Number | None = None
    active_parameters: Number | None = None
    num_experts: Count | None = None
    experts_per_token: Count | None = None
    found: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for problem in (self._heads(), self._layers(), self._parameters(), self._decoder()):
            if problem:
                raise ValueError(f"{self.name}: {problem}")

    def _heads(self) -> str | None:
        if self.num_heads % self.num_kv_heads:
            return f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})"
        return None

    def _layers(self) -> str | None:
        for group in self.layers or ():
            if group.kind == "window" and (group.window or self.window) is None:
                return 'a layer of kind "window" needs a window, its own or the model\'s: tokens it sees'
            if group.num_kv_heads and self.num_heads % group.num_kv_heads:
                return f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({group.num_kv_heads})"
        if self.layers is None:
            return None
        if not self.layers:
            return "layers is empty: leave it out when all layers are of one kind"
        if self.window is not None and not any(group.kind == "window" for group in self.layers):
            return 'window is given, but no layer is of kind "window": take it out, or correct the kinds'
        for index, layer in enumerate(self.each_layer):
            if layer.kind in HOLDS:
                break
            if layer.kind == "shared" and index == 0:
                return "the first layer cannot be shared: there is no earlier one to read"
            if layer.kind == "shared":
                return f"layer {index} cannot be shared: no earlier one keeps K and V to read"
        if all(layer.kind == "none" for layer in self.each_layer):
            return 'all layers are of kind "none": the model keeps nothing of the text, and has no cache to size'
        before = sum(group.count for group in self.layers[:-1])
        if before >= self.num_layers:
            last = len(self.layers) - 1
            return f"layers[{last}] begins after {before} layers, num_layers is {self.num_layers}: it never occurs"
        return None

    def _parameters(self) -> str | None:
        if self.parameters is None:
            return None if self.model_type in DECODER_TYPES else "parameters is missing: how many weights are there?"
        if self.parameters < self.vocab_size * self.hidden_size:
            return (
                f"parameters ({self.parameters:,}) are fewer than the embeddings alone "
                f"({self.vocab_size * self.hidden_size:,}): write the number out, 7B is 7000000000"
            )
        if (self.active_parameters or 0) > self.parameters:
            return f"active_parameters ({self.active_parameters:,}) are more than parameters ({self.parameters:,})"
        if (self.num_experts is None) != (self.experts_per_token is None):
            return "num_experts and experts_per_token belong together: give both, or neither"
        own = self.hidden_size * self.hidden_size  # a layer's projections of queries and outputs are not far from it
        if self.active_parameters is not None and self.active_parameters < own:
            return (
                f"active_parameters ({self.active_parameters:,}) cannot be: one layer has about {own:,} for all tokens"
            )
        needed = (1 if self.tied_head else 2) * self.vocab_size * self.hidden_size
        for name in ("parameters", "active_parameters"):
            if (value := getattr(self, name)) is not None and value < needed:
                return f"{name} ({value:,}) are fewer than the embeddings and the head have ({needed:,})"
        if self.num_experts and self.active_parameters is None:
            return "active_parameters is missing: how many weights does one token of this mixture of experts meet?"
        if (self.experts_per_token or 0) > (self.num_experts or 0):
            return f"experts_per_token ({self.experts_per_token}) are more than num_experts ({self.num_experts})"
        return None

    def _decoder(self) -> str | None:
        if self.model_type not in DECODER_TYPES:
            return None
        if self.head_dim % 2:
            return f"head_dim ({self.head_dim}) must be even, for rotary positions"
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            value = (self.rope_scaling or {}).get(key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
                return f"{key} of rope_scaling must be a number above 0; got {value!r}"
        return None

    def _rotary(self) -> str | None:
        if not self.rope_scaling:
            return None
        kind = self.rope_scaling.get("rope_type", "default")
        if kind not in ROPE_KEYS:
            return f"rope_type {kind!r} is not supported; {' and '.join(ROPE_KEYS)} are"
        if missing := [key for key in ROPE_KEYS[kind] if key not in self.rope_scaling]:
            return f"rope_scaling of type {kind} has no {', '.join(missing)}"
        return None

    @property
    def num_queries_per_kv(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @cached_property
    def each_layer(self) -> tuple[Layer, ...]:
        """The layers, from first to last, each with its kind and sizes."""
        groups = self.layers or [LayerGroup("full" if self.window is None else "window")]
        cycle = [self._layer(group) for group in groups for _ in range(group.count)]
        return tuple(cycle[index % len(cycle)] for index in range(self.num_layers))

    def _layer(self, group: LayerGroup) -> Layer:
        state, index = group.state_bytes or 0, group.index_dim or 0
        if group.kind in ("shared", "none", "state"):
            return Layer(group.kind, state_bytes=state)
        if group.kind == "latent":
            return Layer("latent", window=group.window, latent_dim=group.latent_dim or 0, index_dim=index)
        k_dim = group.head_dim or self.head_dim
        v_dim = group.v_head_dim or (k_dim if group.head_dim else self.v_head_dim or k_dim)
        window = (group.window or self.window) if group.kind == "window" else group.window
        heads = group.num_kv_heads or self.num_kv_heads
        return Layer(group.kind, heads, k_dim, v_dim, window, state_bytes=state, index_dim=index)

    @cached_property
    def layer_counts(self) -> Mapping[Layer, int]:
        """How many layers there are of each sort, in order of first appearance."""
        return Counter(self.each_layer)

    @property
    def num_parameters(self) -> int:
        """Weights in all: as published, or else counted for a Llama-style shape, norms and biases included."""
        if self.parameters is not None:
            return self.parameters
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        per_layer = (
            qkv * self.hidden_size
            + (qkv if self.qkv_bias else 0)
            + self.num_heads * self.head_dim * self.hidden_size
            + 3 * self.hidden_size * self.intermediate_size
            + 2 * self.hidden_size
        )
        heads = 1 if self.tied_head else 2
        return self.num_layers * per_layer + heads * self.vocab_size * self.hidden_size + self.hidden_size

    @property
    def num_active_parameters(self) -> int:
        """Weights that one token meets: all of them, unless `active_parameters` says otherwise."""
        return self.active_parameters or self.num_parameters

    def check_runs(self) -> None:
        """Raise SpecError unless `labkit.llama` can run a model of this shape."""
        if self.model_type not in DECODER_TYPES or self.layers is not None:
            kinds = " and ".join(dict.fromkeys(layer.kind for layer in self.each_layer))
            raise SpecError(
                f"{self.name} ({self.model_type}, layers: {kinds}) is no Llama-style model with layers of one kind: "
                f"its sizes can be computed, but labkit's decoder cannot run it"
            )
        if problem := self._rotary():
            raise SpecError(f"{self.name}: {problem}")
