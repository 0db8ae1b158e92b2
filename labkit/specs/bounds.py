"""What no config can mean, said before anything is built from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from labkit.specs.files import SpecError, short
from labkit.specs.keys import GROUPED
from labkit.specs.model import LIMIT, MAX_LAYERS
from labkit.specs.names import NAMES, first

MANY = 65_536  # of heads, experts, groups and the like: transformers makes a list or a module of each
COUNTS = re.compile(r"(num|n)_(?!positions|ctx|embd|embed|inner|vocab).*|.*_(layers|heads|experts|blocks|repeats)")
PER_LAYER = (
    "layer_types",
    "layers_block_type",
    "mlp_layer_types",
    "attn_type_list",
    "hybrid_layer_pattern",
    "no_rope_layers",
)
FLAGS = (
    "tie_word_embeddings", "use_sliding_window", "use_cla", "use_mla", "multi_query", *GROUPED,
    "use_cache_quantization", "new_decoder_architecture", "mamba_enabled",
)  # fmt: skip
UNBOUNDED = ("model_max_length", "seed", "_commit_hash")  # not of the model's shape
FROM_ZERO = ("num_experts", "experts_per_token")  # a dense member of a family of mixtures has none


def check(config: Mapping[str, Any]) -> None:
    """Raise SpecError for sizes that are no whole numbers of a model's order, and lists that are not one per layer."""
    layers = first(config, NAMES["num_layers"])
    if isinstance(layers, int) and layers > MAX_LAYERS:
        raise SpecError(f"num_hidden_layers is {layers:,}: more than {MAX_LAYERS:,} cannot be meant")
    for field, names in NAMES.items():
        for name in names:
            value = config.get(name)
            least = 0 if field in FROM_ZERO else 1
            for one in value if isinstance(value, list | tuple) and value else [value]:
                _check_size(name, one, least)
    _check_heads(config)
    for name in FLAGS:
        if not isinstance(config.get(name), bool | None):
            raise SpecError(f"{name} is true or false; got {short(repr(config[name]))}")
    _walk(config)
    if isinstance(layers, int):
        _check_lists(config, layers)


def _check_size(name: str, value: Any, least: int) -> None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and least <= value <= LIMIT):
        return
    if isinstance(value, int) and not isinstance(value, bool) and value > LIMIT:
        raise SpecError(f"{name} is {value:,}: more than {LIMIT:,} cannot be meant")
    raise SpecError(f"{name} must be a whole number, at least {least}; got {short(repr(value))}")


def _check_heads(config: Mapping[str, Any]) -> None:
    given = {field: _named(config, field) for field in ("num_heads", "num_kv_heads")}
    (heads, many), (kv_heads, few) = given["num_heads"], given["num_kv_heads"]
    if isinstance(many, int) and isinstance(few, int) and many % few and config.get("kv_lora_rank") is None:
        raise SpecError(f"{heads} ({many}) must be a multiple of {kv_heads} ({few})")


def _named(config: Mapping[str, Any], field: str) -> tuple[str, Any]:
    """The name that the config has for a size, and the size."""
    return next(((name, value) for name in NAMES[field] if (value := first(config, [name])) is not None), ("", None))


def _walk(config: Mapping[str, Any], depth: int = 0) -> None:
    """Numbers anywhere in it, those of nested parts included."""
    if depth > 20:
        raise SpecError("the config is nested deeper than 20 levels: is it a model's config.json?")
    for key, value in config.items():
        if isinstance(value, Mapping):
            _walk(value, depth + 1)
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, Mapping):
                _walk(one, depth + 1)
            if isinstance(one, bool) or not isinstance(one, int) or key in UNBOUNDED:
                continue
            most = MANY if COUNTS.fullmatch(str(key)) else LIMIT
            if abs(one) > most:
                raise SpecError(f"{short(str(key))} is {one:,}: more than {most:,} cannot be meant")


def _check_lists(config: Mapping[str, Any], layers: int) -> None:
    further = config.get("num_nextn_predict_layers") or 0  # heads that guess tokens, in some lists the last
    for key in PER_LAYER:
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, list | tuple):
            raise SpecError(f"{key} is a list, one for each layer; got {short(repr(value))}")
        if value and len(value) not in (layers, layers + (further if isinstance(further, int) else 0)):
            raise SpecError(f"{key} names {len(value)} layers, num_hidden_layers is {layers}: correct one of them")
    shared = config.get("num_kv_shared_layers")
    if shared is not None and (isinstance(shared, bool) or not isinstance(shared, int) or not 0 <= shared < layers):
        raise SpecError(
            f"num_kv_shared_layers is from 0 to {layers - 1}, of {layers} layers; got {short(repr(shared))}"
        )
