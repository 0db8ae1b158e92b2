"""Whether transformers' class did what a config says of its layers and sizes, also where it does not read the key."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
from collections.abc import Mapping
from typing import Any

from labkit.specs.built import sizes_of
from labkit.specs.files import SpecError
from labkit.specs.keys import EVERY, GROUPED, READ, STRUCTURAL, says_nothing
from labkit.specs.names import NAMES, first

Config = Mapping[str, Any]

HEARD = ("sliding_window", "attention_chunk_size", "layer_types")  # what the cache reads of any config
OFF = {  # what means nothing where a flag is false
    "use_sliding_window": ("max_window_layers",),
    "use_cla": ("cla_share_factor",),
    "mamba_enabled": ("mamba_step", "mamba_num_heads", "mamba_d_state", "mamba_d_conv"),
}


def check_heard(part: Config, text: Any, read: list[dict[str, Any]]) -> None:
    """SpecError where the config says something of its layers that transformers does not read and did not do.

    Published configs repeat in a key of their own what the class takes for granted; another value of it is no figure
    of this class.
    """
    own = type(text).__module__
    modules = [own, own.replace(".configuration_", ".modeling_"), "transformers.configuration_utils"]
    sources = []
    for name in modules:
        with contextlib.suppress(ImportError):  # some types are another's class under a name of their own
            sources.append(inspect.getsource(importlib.import_module(name)))
    meant_nothing = [key for flag, keys in OFF.items() if part.get(flag) is False for key in keys]
    unheard = []
    for key, value in part.items():
        structural = key in READ or (STRUCTURAL.search(key) and value is not True)
        off = not value and (value is None or key not in (*GROUPED, "multi_query"))
        if off or not structural or says_nothing(key) or key in (*HEARD, *meant_nothing):
            continue
        bare = key.lstrip("_")
        if bare == key or hasattr(type(text), bare):  # another underscored key is one of the class's own, overwritten
            if any(re.search(rf"\b{re.escape(bare)}\b", source) for source in sources):
                continue
        if key == "mamba_ssm_dtype" and value == "float32" and text.has_float32_states:
            continue
        if not _agrees(bare, value, read, first(text, NAMES["num_heads"])):
            unheard.append(key)
    if unheard:
        raise SpecError(
            f"{', '.join(unheard)} is not read by transformers' {type(text).__name__}, and is not read here: write the "
            f"layers into a file in data/models by hand, or take out what says nothing of the cache"
        )


def _agrees(key: str, value: Any, read: list[dict[str, Any]], num_heads: Any) -> bool:
    """Whether what an unheard key says is what was measured."""
    windows = {window for layer in read if (window := layer.get("window"))}
    windowed = [int(layer["kind"] == "window") for layer in read]  # as MiMo-V2 lists them
    attends = [int(layer["kind"] in ("full", "window", "latent", "hybrid")) for layer in read]
    if key == "attn_type_list":
        return bool(value == attends)
    if key in ("attn_layer_indices", "full_attention_layers"):
        return bool(value == [index for index, one in enumerate(attends) if one])
    if key == "num_kv_shared_layers":
        return bool(value == sum(layer["kind"] == "shared" for layer in read))
    if key == "multi_query":
        return bool(({layer["num_kv_heads"] for layer in read if "num_kv_heads" in layer} == {1}) == value)
    if key in GROUPED:
        return all((layer["num_kv_heads"] < num_heads) == value for layer in read if "num_kv_heads" in layer)
    if key == "use_sliding_window":
        return bool(windows)
    if key == "use_mla":
        return any(layer["kind"] == "latent" for layer in read)
    if key in ("v_head_dim", "qk_head_dim"):
        own = "v_head_dim" if key == "v_head_dim" else "head_dim"
        return {layer[own] for layer in read if own in layer} == {value}
    if key in EVERY and isinstance(value, int) and not isinstance(value, bool) and value > 0:
        others = windowed if EVERY[key] == "window" else [int(layer["kind"] == "state") for layer in read]
        return others == [int((index + 1) % value > 0) for index in range(len(read))]
    if isinstance(value, int) and not isinstance(value, bool) and "window" in key:
        return bool({value, value + 1} & windows)
    return bool(value == windowed)


def check_sizes(part: Config, text: Any, read: list[dict[str, Any]]) -> None:
    """SpecError where the config gives a size under a name that the class does not read, and another was measured."""
    sizes = sizes_of(text)
    measured = {field: {layer[field] for layer in read if field in layer} for field in ("num_kv_heads", "head_dim")}
    for field, names in NAMES.items():
        given = {name: value for name in names if isinstance(value := first(part, [name]), int)}
        built = measured.get(field) or ({sizes[field]} if isinstance(sizes.get(field), int) else set())
        if field in measured and (not measured[field] or getattr(text, "kv_lora_rank", None)):
            continue  # a latent has neither
        if field == "num_kv_heads" and part.get("multi_query") and measured[field] == {1}:
            continue
        if field in ("vocab_size", "max_seq_len") or not built:
            continue
        # Zamba 2 has kv_channels beside an attention_head_dim; LongCat num_layers, and twice as many num_hidden_layers
        if field not in measured or any(value in built for value in given.values()):
            own = [cls for cls in type(text).__mro__ if cls.__module__.startswith("transformers.models.")]
            declares = "".join(map(inspect.getsource, own))
            given = {name: value for name, value in given.items() if not re.search(rf"\b{name}\b", declares)}
        if wrong := next((name for name, value in given.items() if value not in built), None):
            said = " or ".join(map(str, sorted(built)))
            raise SpecError(
                f"{wrong} is {given[wrong]}, but transformers' {type(text).__name__} does not follow it: it makes "
                f"{said}: give it by the name that this type reads, or take it out"
            )
