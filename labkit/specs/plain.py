"""A plain decoder read by arithmetic: Llama's shape in a moment, and a type that transformers does not have.

Of the latter every key of its config must be understood: what a key that nobody here knows says of its layers is not
to be guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from labkit.specs.files import SpecError
from labkit.specs.keys import HARMLESS, READ, SIZES, WEIGHTS
from labkit.specs.model import DECODER_TYPES
from labkit.specs.names import NAMES, first

Config = Mapping[str, Any]

NEEDED = ("num_layers", "num_heads", "hidden_size", "vocab_size", "max_seq_len")
KINDS = {
    "full_attention": "full", "attention": "full", "sliding_attention": "window", "chunked_attention": "window",
    "linear_attention": "state", "mamba": "state", "conv": "state",
}  # fmt: skip
EVERY = {  # one layer in so many has full attention; the others are of this kind
    "full_attention_interval": "state",
    "sliding_window_pattern": "window",
    "no_rope_layer_interval": "window",  # of those that have an attention_chunk_size
}
LLAMA_KEYS = (  # what a config of Llama's shape must say, so that no default of a class is needed
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip


def is_llama(config: Config) -> bool:
    """Whether it is Llama's shape, said in full, with one kind of layers: known by arithmetic, without transformers."""
    kind = config.get("model_type")
    if kind not in DECODER_TYPES or any(config.get(key) is None for key in LLAMA_KEYS):
        return False
    if config.get("attention_bias") or config.get("mlp_bias"):  # a spec does not state them: they are counted
        return False
    asks = {"num_key_value_heads", "head_dim"}
    if kind == "mistral":
        asks |= {"sliding_window"}
        if "sliding_window" not in config:
            return False
    if kind == "qwen2":
        if config.get("use_sliding_window"):
            return False
        asks |= {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
        if config.get("layer_types") and set(config["layer_types"]) != {"full_attention"}:
            return False
    if config.get("num_key_value_heads") is None and (kind != "llama"):
        return False
    return all(key in HARMLESS or key in LLAMA_KEYS or key in asks or value is None for key, value in config.items())


def read(config: Config) -> dict[str, Any]:
    """Sizes and layers, as `measured.measure` gives them, of a config whose every key is understood; or SpecError."""
    sizes = {field: first(config, names) for field, names in NAMES.items()}
    if missing := next((field for field in NEEDED if sizes[field] is None), None):
        raise SpecError(f"the config has no {NAMES[missing][0]!r}: is it a text model's config.json?")
    refuse_unknown_keys(config)
    if sizes["num_kv_heads"] is None:
        sizes["num_kv_heads"] = sizes["num_heads"]
    if _is_multi_query(config):
        sizes["num_kv_heads"] = 1
    for field in ("num_heads", "num_kv_heads", "head_dim", "num_experts", "experts_per_token"):
        if isinstance(sizes[field], list):
            if field in ("num_heads", "num_kv_heads", "head_dim"):
                raise SpecError(f"{_named(config, field)} is a list, one for each layer: write the layers into a file")
            sizes[field] = max(sizes[field])
    if sizes["intermediate_size"] is None:
        sizes["intermediate_size"] = 4 * sizes["hidden_size"]
    if sizes["head_dim"] is None:
        sizes["head_dim"] = sizes["hidden_size"] // sizes["num_heads"]
        if sizes["head_dim"] * sizes["num_heads"] != sizes["hidden_size"]:
            raise SpecError(
                f"hidden_size ({sizes['hidden_size']}) does not divide by num_attention_heads ({sizes['num_heads']}), "
                f"and the config has no head_dim"
            )
    layers = _layers(config, sizes)
    if (sizes["num_experts"] or 1) > 1 and not sizes["experts_per_token"]:
        many = f"{_named(config, 'num_experts')} is {sizes['num_experts']}"
        raise SpecError(f"{many}, but how many of them a token meets is not said: num_experts_per_tok is the usual key")
    if (sizes["num_experts"] or 1) == 1:
        sizes["num_experts"] = sizes["experts_per_token"] = None
    answer: dict[str, Any] = {"sizes": {field: value for field, value in sizes.items() if value is not None}}
    answer |= {"layers": layers, "kind": str(config.get("model_type") or "unknown"), "text": dict(config)}
    answer |= {"parameters": None, "rows": 0, "unmet": _unmet(config, answer["sizes"])}
    if answer["unmet"]:
        answer |= {field: sizes[field] for field in ("num_experts", "experts_per_token")}
    return answer


def refuse_unknown_keys(config: Config) -> None:
    """SpecError naming the keys of which it is not known what they say. A null says nothing."""
    known = HARMLESS | WEIGHTS | READ | SIZES
    unknown = [key for key, value in config.items() if key not in known and value is not None and value != {}]
    if unknown:
        kind = config.get("model_type")
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        raise SpecError(
            f"transformers has no model_type {kind!r}, and {', '.join(unknown[:8])}{more} is not read here: write the "
            f"layers into a file in data/models by hand, or take out what says nothing of the cache"
        )


def _named(config: Config, field: str) -> str:
    return next((name for name in NAMES[field] if first(config, [name]) is not None), NAMES[field][0])


def _is_multi_query(config: Config) -> bool:
    """Whether all heads share one K and V, as Falcon's older form says it."""
    return bool(config.get("multi_query")) and not config.get("new_decoder_architecture")


def _layers(config: Config, sizes: dict[str, Any]) -> list[dict[str, Any]]:
    """Each layer as the fields of a `LayerGroup`."""
    count = sizes["num_layers"]
    said = [kinds for rule in (_listed, _lightning, _mamba, _periodic, _windowed) if (kinds := rule(config, count))]
    if len(said) > 1:
        raise SpecError("the config says the kinds of its layers in two ways: take one of them out")
    kinds = said[0] if said else ["full"] * count
    window = _window(config)
    if "window" in kinds and window is None:
        kinds = ["full" if kind == "window" else kind for kind in kinds]
    latent = _latent(config, sizes)
    if config.get("use_cla"):  # Hunyuan: of so many neighbours, the first keeps what the others read
        factor = config.get("cla_share_factor") or 2
        kinds = ["shared" if index % factor else kind for index, kind in enumerate(kinds)]
    shared = config.get("num_kv_shared_layers") or 0
    kinds = kinds[: count - shared] + ["shared"] * shared
    heads = {"num_kv_heads": sizes["num_kv_heads"], "head_dim": sizes["head_dim"]}
    own = heads | {"v_head_dim": config.get("v_head_dim") or sizes["head_dim"]}
    each = {
        "full": {"kind": "latent", "latent_dim": latent} if latent else {"kind": "full", **own},
        "window": {"kind": "latent", "latent_dim": latent, "window": window}
        if latent
        else {"kind": "window", "window": window, **own},
        "shared": {"kind": "shared"},
        "state": {"kind": "state", "state_bytes": _state_bytes(config, sizes) if "state" in kinds else 0},
    }
    return [dict(each[kind]) for kind in kinds]


def _latent(config: Config, sizes: dict[str, Any]) -> int | None:
    """Numbers per token of DeepSeek's latent attention, whose heads are wider in K than in V."""
    if not config.get("kv_lora_rank"):
        return None
    parts = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    if missing := next((key for key in parts if config.get(key) is None), None):
        raise SpecError(f"the config has no {missing!r}, which its kv_lora_rank needs")
    sizes["head_dim"] = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    sizes["v_head_dim"], sizes["num_kv_heads"] = config["v_head_dim"], sizes["num_heads"]
    return int(config["kv_lora_rank"] + config["qk_rope_head_dim"])


def _window(config: Config) -> int | None:
    """Tokens that a layer with a window sees."""
    window = first(config, ("sliding_window", "sliding_window_size", "attention_chunk_size"))
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise SpecError(f"a sliding window is a whole number of tokens, at least 1; got {window!r}")
    return window


def _listed(config: Config, count: int) -> list[str]:
    """Kinds that the config lists, layer by layer; those of further heads that guess tokens come last."""
    named = first(config, ("layer_types", "layers_block_type"))
    if not named:
        return []
    if unknown := next((kind for kind in named if kind not in KINDS), None):
        raise SpecError(f"a layer of type {unknown!r} is not known here: one of {', '.join(KINDS)} is")
    return [KINDS[kind] for kind in named][:count]


def _lightning(config: Config, count: int) -> list[str]:
    """MiniMax: 1 is attention, 0 a linear one that keeps a state."""
    listed = config.get("attn_type_list") or []
    if wrong := next((kind for kind in listed if kind not in (0, 1)), None):
        raise SpecError(f"attn_type_list holds 0 and 1; got {wrong!r}")
    return ["full" if kind else "state" for kind in listed]


def _mamba(config: Config, count: int) -> list[str]:
    """PLaMo 2: of `mamba_step` neighbours the middle one attends, and the last layer where there are few."""
    if not config.get("mamba_enabled"):
        return []
    step = config.get("mamba_step") or 0
    if step < 2:
        raise SpecError(f"mamba_step is at least 2 where mamba_enabled is set; got {config.get('mamba_step')!r}")
    if count <= step // 2:
        return ["state"] * (count - 1) + ["full"]
    return ["full" if index % step == step // 2 else "state" for index in range(count)]


def _periodic(config: Config, count: int) -> list[str]:
    """One layer in so many has full attention, or a list numbers those; EXAONE 4 writes LLLG, local and global."""
    if config.get("attn_layer_indices") is not None:
        return ["full" if index in config["attn_layer_indices"] else "state" for index in range(count)]
    if config.get("attention_chunk_size") and config.get("no_rope_layers"):  # Llama 4: 1 is a layer with positions
        return ["window" if has_rope else "full" for has_rope in config["no_rope_layers"]][:count]
    if period := config.get("attn_layer_period"):
        offset = config.get("attn_layer_offset") or 0
        return ["full" if index % period == offset else "state" for index in range(count)]
    for key, other in EVERY.items():
        period = config.get(key)
        if period is None or (key == "no_rope_layer_interval" and not config.get("attention_chunk_size")):
            continue
        if isinstance(period, str) and period and set(period) <= {"L", "G"}:
            return [other if period[index % len(period)] == "L" else "full" for index in range(count)]
        if isinstance(period, bool) or not isinstance(period, int) or period < 1:
            raise SpecError(f"{key} is a number of layers, at least 1, or as LLLG; got {period!r}")
        return [other if (index + 1) % period else "full" for index in range(count)]
    return []


def _windowed(config: Config, count: int) -> list[str]:
    """The window from layer `max_window_layers` on, where nothing else says which layers have it."""
    if _window(config) is None or config.get("use_sliding_window") is False:
        return []
    if any(config.get(key) is not None for key in ("layer_types", "layers_block_type", "attn_type_list", *EVERY)):
        return []
    full = config.get("max_window_layers") or 0
    return ["full" if index < full else "window" for index in range(count)]


def _state_bytes(config: Config, sizes: dict[str, Any]) -> int:
    """Bytes per request of a layer without attention: inputs in the config's dtype, recurrent states in float32."""
    wide = 4 if "float32" in str(first(config, ("dtype", "torch_dtype"))) else 2
    rule = next((rule for key, rule in STATES.items() if config.get(key)), None)
    if rule is None:
        raise SpecError(f"what a layer without attention keeps is said by one of {', '.join(STATES)}: none is there")
    try:
        inputs, state = rule(config, sizes)
    except KeyError as error:
        raise SpecError(
            f"the config has no {error.args[0]!r}, which says what a layer without attention keeps"
        ) from None
    return int(wide * inputs + 4 * state)


def _lightning_state(config: Config, sizes: Config) -> tuple[int, int]:
    """MiniMax: a matrix per head, in the config's dtype, as transformers' class of the first of them keeps it."""
    return sizes["num_heads"] * sizes["head_dim"] ** 2, 0


def _plamo(config: Config, sizes: Config) -> tuple[int, int]:
    """PLaMo 2: the last inputs but one step of a convolution, and a matrix per head."""
    width = config["mamba_num_heads"] * sizes["head_dim"]
    return width * ((config.get("mamba_d_conv") or 4) - 1), width * config["mamba_d_state"]


def _delta_net(config: Config, sizes: Config) -> tuple[int, int]:
    """Gated DeltaNet (Qwen3-Next): a matrix per value head; the convolution runs over queries, keys and values."""
    key_dim, value_dim = config["linear_key_head_dim"], config["linear_value_head_dim"]
    key, value = config["linear_num_key_heads"] * key_dim, config["linear_num_value_heads"] * value_dim
    return (2 * key + value) * config["linear_conv_kernel_dim"], value * key_dim


def _mamba1(config: Config, sizes: Config) -> tuple[int, int]:
    """Mamba (Jamba): `mamba_d_state` numbers for each of the widened channels."""
    width = config["mamba_expand"] * config["hidden_size"]
    return width * config["mamba_d_conv"], width * config["mamba_d_state"]


def _mamba2(config: Config, sizes: Config) -> tuple[int, int]:
    """Mamba 2 (Bamba, Granite 4): the convolution runs over the inputs and over both groups of state projections."""
    width, states = config["mamba_expand"] * config["hidden_size"], config["mamba_d_state"]
    return (width + 2 * config["mamba_n_groups"] * states) * config["mamba_d_conv"], width * states


def _short_convolution(config: Config, sizes: Config) -> tuple[int, int]:
    """LFM2: the last inputs of a convolution, nothing else."""
    return config["hidden_size"] * config["conv_L_cache"], 0


STATES: dict[str, Callable[[Config, Config], tuple[int, int]]] = {
    "attn_type_list": _lightning_state,
    "mamba_enabled": _plamo,
    "linear_num_value_heads": _delta_net,
    "mamba_n_heads": _mamba2,
    "mamba_d_state": _mamba1,
    "conv_L_cache": _short_convolution,
}


def _unmet(config: Config, sizes: Mapping[str, Any]) -> int:
    """Weights of the experts that one token does not meet: three matrices each, as wide as the config says."""
    experts, met = sizes.get("num_experts"), sizes.get("experts_per_token")
    if not experts or not met:
        return 0
    width = first(config, ("moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size"))
    if isinstance(width, list):
        width = max(width)
    layers = sizes["num_layers"] - (config.get("first_k_dense_replace") or config.get("moe_layer_start_index") or 0)
    layers -= len(config.get("mlp_only_layers") or ())
    every = first(config, ("expert_layer_period", "decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_freq"))
    layers = sum(every) if isinstance(every, list) else layers // (every or 1)
    return int(layers * (experts - met) * 3 * sizes["hidden_size"] * (width or sizes["intermediate_size"]))
