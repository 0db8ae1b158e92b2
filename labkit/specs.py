"""Model specs: the numbers that fix a model's shape, read from `data/models/*.json` or from a Hugging Face config.

Imports no torch. Every size is a count; nothing here is in bytes.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent.parent / "data"
DECODER_TYPES = ("llama", "mistral", "qwen2")
ROPE_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a Llama-style decoder.

    name, source, date say where the numbers come from. `window` is the sliding window in tokens, None for full
    attention. `qkv_bias` is Qwen2's. `rope_scaling` is Hugging Face's dict (`rope_type` "llama3" or "linear") or None.
    """

    name: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_seq_len: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied_head: bool = False
    qkv_bias: bool = False
    window: int | None = None
    rope_scaling: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)
    source: str = ""
    date: str = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type not in ("int", "int | None") or (field.name == "window" and value is None):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{self.name}: {field.name} must be a whole number, at least 1; got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.name}: num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"{self.name}: head_dim ({self.head_dim}) must be even, for rotary positions")
        if self.rope_scaling:
            kind = self.rope_scaling.get("rope_type", "default")
            if kind not in ROPE_KEYS:
                raise ValueError(f"{self.name}: rope_type {kind!r} is not supported; {' and '.join(ROPE_KEYS)} are")
            if missing := [key for key in ROPE_KEYS[kind] if key not in self.rope_scaling]:
                raise ValueError(f"{self.name}: rope_scaling of type {kind} has no {', '.join(missing)}")

    @property
    def num_queries_per_kv(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_parameters(self) -> int:
        """Weights in all, norms and biases included."""
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


def from_hf_config(config: Mapping[str, Any], name: str = "") -> ModelSpec:
    """The spec that a Hugging Face `config.json`, as a dict, describes.

    Raises ValueError for an architecture other than Llama, Mistral or Qwen2, for a feature of those that is not
    supported, or when a key is missing.
    """
    kind = config.get("model_type")
    if kind not in DECODER_TYPES:
        raise ValueError(f"model_type {kind!r} is not supported; one of {', '.join(DECODER_TYPES)} is needed")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise ValueError(f"{key} is not supported: only Qwen2's bias, on q, k and v, is")
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"hidden_act {activation!r} is not supported; silu is")
    try:
        num_heads, hidden_size = config["num_attention_heads"], config["hidden_size"]
        rope = rope_of(config)
        return ModelSpec(
            name=name or config.get("_name_or_path") or kind,
            num_layers=config["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=config.get("head_dim") or hidden_size // num_heads,
            hidden_size=hidden_size,
            intermediate_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            max_seq_len=config["max_position_embeddings"],
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta", 10_000.0)),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            tied_head=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2",
            window=window_of(config),
            rope_scaling=rope if rope["rope_type"] != "default" else None,
        )
    except KeyError as error:
        raise ValueError(f"the config has no {error.args[0]!r}: is it a text model's config.json?") from None


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of a config, `rope_type` among them, wherever its transformers version kept them."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    return rope


def window_of(config: Mapping[str, Any]) -> int | None:
    """The sliding window of every layer, None for full attention; ValueError when the layers differ."""
    if config["model_type"] == "mistral":
        return config.get("sliding_window", 4096)
    if config["model_type"] != "qwen2" or not config.get("use_sliding_window") or not config.get("sliding_window"):
        return None
    full = min(config.get("max_window_layers", 28), config["num_hidden_layers"])
    kinds = config.get("layer_types") or [
        "full_attention" if layer < full else "sliding_attention" for layer in range(config["num_hidden_layers"])
    ]
    if len(set(kinds)) > 1:
        raise ValueError("some layers have a sliding window and some have none: only one kind for all is supported")
    return config["sliding_window"] if kinds[0] == "sliding_attention" else None


@cache
def models() -> dict[str, ModelSpec]:
    """Every spec in `data/models/`, by name."""
    found = {}
    for path in sorted((DATA / "models").glob("*.json")):
        try:
            spec = ModelSpec(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path.name} is not a model spec: {error}") from None
        found[spec.name] = spec
    return found


def model(name: str) -> ModelSpec:
    """The spec called `name`; a ValueError offers the nearest names when there is none."""
    known = models()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or sorted(known)[:3]
    raise ValueError(f"no model spec is called {name!r}; nearest: {', '.join(near)}")
