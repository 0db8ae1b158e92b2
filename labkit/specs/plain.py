"""A plain decoder read by arithmetic: Llama's shape in a moment, and a type that transformers does not have.

Of the latter every key of its config must be understood: what a key that nobody here knows says of its layers is not
to be guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from labkit.specs.files import SpecError, short
from labkit.specs.keys import EVERY, GROUPED, HARMLESS, READ, SIZES, WEIGHTS, says_nothing
from labkit.specs.model import DECODER_TYPES, LIMIT
from labkit.specs.names import NAMES, first

Config = Mapping[str, Any]

NEEDED = ("num_layers", "num_heads", "hidden_size", "vocab_size", "max_seq_len")
KINDS = {
    "full_attention": "full", "attention": "full", "sliding_attention": "window", "chunked_attention": "window",
    "linear_attention": "linear_attention", "mamba": "mamba", "conv": "conv",
}  # fmt: skip
LENGTHS = ("max_sequence_length", "model_max_length", "max_model_len", "training_seqlen", "base_seqlen")
WINDOWS = ("sliding_window", "sliding_window_size", "attention_chunk_size")
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
        window = config.get("sliding_window") is not None and config.get("use_sliding_window") is not False
        if config.get("use_sliding_window") or window:  # whether it is used, its class says
            return False
        asks |= {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
        if config.get("layer_types") and set(config["layer_types"]) != {"full_attention"}:
            return False
    if config.get("num_key_value_heads") is None and (kind != "llama"):
        return False
    return all(says_nothing(key) or key in LLAMA_KEYS or key in asks or value is None for key, value in config.items())


def read(config: Config) -> dict[str, Any]:
    """Sizes and layers, as `measured.measure` gives them, of a config whose every key is understood; or SpecError."""
    sizes = {field: _one_size(config, field) for field in NAMES}
    if missing := next((field for field in NEEDED if sizes[field] is None), None):
        raise SpecError(f"the config has no {NAMES[missing][0]!r}: is it a text model's config.json?")
    refuse_unknown_keys(config)
    said = _Said(config)
    sizes["num_kv_heads"] = _kv_heads(said, sizes)
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
    layers = _layers(said, sizes)
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
    known = WEIGHTS | READ | SIZES
    said = [key for key, value in config.items() if value is not None and value != {}]
    unknown = [key for key in said if key not in known and not says_nothing(key)]
    for outer in sorted({name.split(".")[0] for names in NAMES.values() for name in names if "." in name}):
        inner = config.get(outer)
        if not isinstance(inner, Mapping | None):
            raise SpecError(f"{outer} holds sizes by name; got {short(repr(inner))}")
        if inner:
            named = {name for names in NAMES.values() for name in names} | {f"{outer}.{key}" for key in HARMLESS}
            unknown += [f"{outer}.{key}" for key in inner if f"{outer}.{key}" not in named and inner[key] is not None]
    if unknown:
        kind = config.get("model_type")
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        raise SpecError(
            f"transformers has no model_type {kind!r}, and {', '.join(unknown[:8])}{more} is not read here: write the "
            f"layers into a file in data/models by hand, or take out what says nothing of the cache"
        )


def _named(config: Config, field: str) -> str:
    return next((name for name in NAMES[field] if first(config, [name]) is not None), NAMES[field][0])


class _Said:
    """The keys of a config that say something of its layers, and which of them a rule has made use of."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.left = {key for key in READ if config.get(key) is not None and config[key] != [] and config[key] != {}}

    def take(self, *keys: str) -> Any:
        """The value of the first of `keys`; all of them count as used."""
        self.left -= set(keys)
        return self.config.get(keys[0])

    def number(self, key: str, least: int = 1) -> int | None:
        """The whole number under `key`, None where it is not there."""
        value = self.take(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise SpecError(f"{key} must be a whole number, at least {least}; got {short(repr(value))}")
        return value

    def needed(self, key: str, least: int = 1) -> int:
        """As `number`, of a layer without attention, which needs it."""
        if (value := self.number(key, least)) is None:
            raise SpecError(f"the config has no {key!r}, which says what a layer without attention keeps")
        return value

    def check_all_used(self) -> None:
        """SpecError naming what no rule has used: another value of it would give the same figures."""
        if self.left:
            raise SpecError(
                f"{', '.join(sorted(self.left))}: alone, or beside what else the config says, this is not understood: "
                f"write the layers into a file in data/models by hand, or take out what says nothing of the cache"
            )


def _one_size(config: Config, field: str) -> Any:
    """The size that the config names, in whichever way; SpecError where two of its names say different sizes."""
    given = {name: value for name in NAMES[field] if (value := first(config, [name])) is not None}
    unused = [count for flag, count in GROUPED.items() if config.get(flag) is False]
    if field == "num_kv_heads":
        given = {name: value for name, value in given.items() if name not in unused}
    if field == "max_seq_len" and given:  # what all of them allow: none is of a layer's shape
        return min(given.values())
    if not given:
        return _length(config) if field == "max_seq_len" else None
    if field == "vocab_size" and given.get("padded_vocab_size", 0) >= given.get("vocab_size", 0):
        return next(iter(given.values()))  # padded is more than there are
    _refuse_two(given)
    return next(iter(given.values()))


def _length(config: Config) -> int | None:
    """The longest context by the names that some have instead; a tokenizer's own may be without bounds."""
    lengths = [config.get(name) for name in LENGTHS]
    return min((one for one in lengths if type(one) is int and 1 <= one <= LIMIT), default=None)


def _refuse_two(given: Mapping[str, Any]) -> None:
    (name, value), *others = given.items()
    if other := next((other for other, its in others if its != value), None):
        raise SpecError(f"{name} and {other} say different things: take one of them out, or correct it")


def _kv_heads(said: _Said, sizes: dict[str, Any]) -> int:
    """Heads of K and V, which Falcon's older form and ChatGLM's say with a flag."""
    heads, config = sizes["num_kv_heads"], said.config
    if config.get("multi_query") is False and heads == 1 < sizes["num_heads"]:
        raise SpecError(f"multi_query is false, but {_named(config, 'num_kv_heads')} is 1: take one of them out")
    if said.take("multi_query") and not said.take("new_decoder_architecture"):
        if heads not in (None, 1):
            raise SpecError(f"multi_query is one head of K and V, {_named(config, 'num_kv_heads')} is {heads}")
        return 1
    said.take("new_decoder_architecture")
    for flag, count in GROUPED.items():
        shared = said.take(flag)
        if shared and config.get(count) is None:
            raise SpecError(f"{flag} is set, but the config has no {count}")
        if shared is False and heads not in (None, sizes["num_heads"]):
            raise SpecError(
                f"{flag} is false, but {_named(config, 'num_kv_heads')} is {heads} and "
                f"{_named(config, 'num_heads')} {sizes['num_heads']}: take one of them out, or correct it"
            )
    return sizes["num_heads"] if heads is None else heads


def _layers(said: _Said, sizes: dict[str, Any]) -> list[dict[str, Any]]:
    """Each layer as the fields of a `LayerGroup`."""
    config, count = said.config, sizes["num_layers"]
    window = _window(said)
    rules = {name: kinds for name, rule in RULES.items() if (kinds := rule(said, name, count))}
    if any(len(kinds) != count for kinds in rules.values()):
        raise SpecError(f"{', '.join(rules)} must name {count} layers")
    if rules:
        _refuse_two(rules)
        kinds = next(iter(rules.values()))
    else:
        kinds = ["full" if window is None else "window"] * count
    if "window" in kinds:
        if window is None:
            if not any(key in config for key in WINDOWS) and config.get("use_sliding_window") is not False:
                raise SpecError(f"some layers have a sliding window, but its size is not said: {WINDOWS[0]} is missing")
            kinds = ["full" if kind == "window" else kind for kind in kinds]
        said.take(*WINDOWS)
    if config.get("use_cache_quantization") is False:  # Qwen's first: set, K and V are kept in 8 bits
        said.take("use_cache_quantization")
    latent = _latent(said, sizes)
    kinds = _shared(said, kinds)
    heads = {"num_kv_heads": sizes["num_kv_heads"], "head_dim": sizes["head_dim"]}
    own = heads | {"v_head_dim": sizes["head_dim"] if (v_dim := said.number("v_head_dim")) is None else v_dim}
    each: dict[str, dict[str, Any]] = {
        "full": {"kind": "latent", "latent_dim": latent} if latent else {"kind": "full", **own},
        "window": {"kind": "latent", "latent_dim": latent, "window": window}
        if latent
        else {"kind": "window", "window": window, **own},
        "shared": {"kind": "shared"},
    }
    for kind in dict.fromkeys(kinds):
        if kind not in each:
            each[kind] = {"kind": "state", "state_bytes": _state_bytes(said, sizes, kind)}
    said.check_all_used()
    return [dict(each[kind]) for kind in kinds]


def _shared(said: _Said, kinds: list[str]) -> list[str]:
    """The kinds, where some layers read what an earlier one keeps."""
    factor = said.number("cla_share_factor") if said.config.get("use_cla") is not None else None
    if said.take("use_cla"):  # Hunyuan: of so many neighbours, the first keeps what the others read
        if not set(kinds) <= {"full", "window"}:
            raise SpecError("use_cla shares K and V between neighbours, but some layers have none: write them by hand")
        kinds = ["shared" if index % (factor or 2) else kind for index, kind in enumerate(kinds)]
    shared = said.number("num_kv_shared_layers", least=0) or 0
    return kinds[: len(kinds) - shared] + ["shared"] * shared


def _latent(said: _Said, sizes: dict[str, Any]) -> int | None:
    """Numbers per token of DeepSeek's latent attention, whose heads are wider in K than in V."""
    rank, meant = said.number("kv_lora_rank"), said.take("use_mla")
    if meant is False and rank is not None:
        raise SpecError("use_mla is false, but the config has a kv_lora_rank: take one of them out")
    if rank is None:
        if meant:
            raise SpecError("the config has no 'kv_lora_rank', which use_mla needs")
        return None
    nope, rope, v_dim = (said.number(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    if nope is None or rope is None or v_dim is None:
        missing = "qk_nope_head_dim" if nope is None else "qk_rope_head_dim" if rope is None else "v_head_dim"
        raise SpecError(f"the config has no {missing!r}, which its kv_lora_rank needs")
    said.number("q_lora_rank")
    if said.number("qk_head_dim") not in (None, nope + rope):
        raise SpecError(f"qk_head_dim is not qk_nope_head_dim + qk_rope_head_dim ({nope} + {rope}): correct one")
    sizes["head_dim"], sizes["v_head_dim"], sizes["num_kv_heads"] = nope + rope, v_dim, sizes["num_heads"]
    return rank + rope


def _window(said: _Said) -> int | None:
    """Tokens that a layer with a window sees. What says that there is none is used with it."""
    given = {key: said.config[key] for key in WINDOWS if said.config.get(key) is not None}
    for window in given.values():
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise SpecError(f"a sliding window is a whole number of tokens, at least 1; got {window!r}")
    if said.take("use_sliding_window") is False:
        said.take("sliding_window", "sliding_window_size")
        said.number("max_window_layers", least=0)
        given = {key: value for key, value in given.items() if key == "attention_chunk_size"}
    if not given:
        if any(key in said.config for key in WINDOWS):  # a null: there is none
            said.number("max_window_layers", least=0)
        if said.config.get("use_sliding_window"):
            raise SpecError("use_sliding_window is set, but the config has no 'sliding_window'")
        return None
    _refuse_two(given)
    return int(next(iter(given.values())))


def _listed(said: _Said, name: str, count: int) -> list[str]:
    """Kinds that the config lists, layer by layer; those of further heads that guess tokens come last."""
    named = said.take(name)
    if not named:
        return []
    if unknown := next((kind for kind in named if not isinstance(kind, str) or kind not in KINDS), None):
        raise SpecError(f"a layer of type {short(repr(unknown))} is not known here: one of {', '.join(KINDS)} is")
    said.take(*WINDOWS)  # it says which layers have it
    return [KINDS[kind] for kind in named][:count]


def _lightning(said: _Said, name: str, count: int) -> list[str]:
    """MiniMax: 1 is attention, 0 a linear one that keeps a state."""
    listed = said.take(name) or []
    if wrong := next((kind for kind in listed if isinstance(kind, bool) or kind not in (0, 1)), None):
        raise SpecError(f"attn_type_list holds 0 and 1; got {wrong!r}")
    return ["full" if kind else "lightning" for kind in listed][:count]


def _mamba(said: _Said, name: str, count: int) -> list[str]:
    """PLaMo 2: of `mamba_step` neighbours the middle one attends."""
    enabled = said.take(name)
    if not enabled:
        if enabled is False:
            said.take("mamba_step", "mamba_num_heads", "mamba_d_state", "mamba_d_conv")
        return []
    step = said.number("mamba_step", least=2)
    if step is None or step > count:
        raise SpecError(f"mamba_step is from 2 to {count}, of {count} layers, where mamba_enabled is set; got {step}")
    return ["full" if index % step == step // 2 else "plamo" for index in range(count)]


def _numbered(said: _Said, name: str, count: int) -> list[str]:
    """A list numbers the layers with attention."""
    numbers = said.take(name)
    if numbers is None:
        return []
    whole = isinstance(numbers, list | tuple) and all(type(one) is int for one in numbers)
    if not whole or any(not 0 <= one < count for one in numbers) or len(set(numbers)) != len(numbers):
        raise SpecError(f"{name} numbers layers from 0 to {count - 1}, each once; got {short(repr(numbers))}")
    return ["full" if index in numbers else "state" for index in range(count)]


def _positions(said: _Said, name: str, count: int) -> list[str]:
    """Llama 4: 1 is a layer with positions, which attends within a chunk. Without chunks it says nothing of a cache."""
    listed = said.take(name) or []
    if wrong := next((one for one in listed if one not in (0, 1)), None):
        raise SpecError(f"{name} holds 0 and 1; got {wrong!r}")
    if said.config.get("attention_chunk_size") is None:
        return []
    return ["window" if has_rope else "full" for has_rope in listed][:count]


def _offset(said: _Said, name: str, count: int) -> list[str]:
    """Jamba: one layer in so many attends, the first of them at an offset."""
    if (period := said.number(name)) is None:
        return []
    offset = said.number("attn_layer_offset", least=0) or 0
    if offset >= min(period, count):
        raise SpecError(f"attn_layer_offset is from 0 to {min(period, count) - 1}; got {offset}")
    return ["full" if index % period == offset else "state" for index in range(count)]


def _periodic(said: _Said, name: str, count: int) -> list[str]:
    """One layer in so many has full attention; EXAONE 4 writes LLLG, local and global."""
    period, other = said.take(name), EVERY[name]
    if period is None or (name == "no_rope_layer_interval" and said.config.get("attention_chunk_size") is None):
        return []
    if name == "sliding_window_pattern" and isinstance(period, str) and period and set(period) <= {"L", "G"}:
        return [other if period[index % len(period)] == "L" else "full" for index in range(count)]
    if isinstance(period, bool) or not isinstance(period, int) or period < 1:
        raise SpecError(f"{name} is a number of layers, at least 1, or as LLLG; got {period!r}")
    return [other if (index + 1) % period else "full" for index in range(count)]


def _from_layer(said: _Said, name: str, count: int) -> list[str]:
    """Qwen 2: the layers from this one on have the window."""
    if name not in said.left or all(said.config.get(key) is None for key in WINDOWS):
        return []
    full = said.number(name, least=0) or 0
    said.take(*WINDOWS)
    return ["full" if index < full else "window" for index in range(count)]


RULES: dict[str, Callable[[_Said, str, int], list[str]]] = {  # by the key that says the kinds of the layers
    "layer_types": _listed,
    "layers_block_type": _listed,
    "attn_type_list": _lightning,
    "mamba_enabled": _mamba,
    "attn_layer_indices": _numbered,
    "no_rope_layers": _positions,
    "attn_layer_period": _offset,
    **dict.fromkeys(EVERY, _periodic),
    "max_window_layers": _from_layer,
}


def _state_bytes(said: _Said, sizes: dict[str, Any], kind: str) -> int:
    """Bytes per request of a layer without attention: inputs in the config's dtype, recurrent states in float32."""
    wide = 4 if "float32" in str(first(said.config, ("dtype", "torch_dtype"))) else 2
    fitting = [key for key, (kinds, _) in STATES.items() if kind in kinds]
    key = next((key for key in fitting if said.config.get(key) is not None), None)
    if key is None:
        raise SpecError(f"what a layer without attention keeps is said by one of {', '.join(fitting)}: none is there")
    if said.take("mamba_ssm_dtype") not in (None, "float32"):
        raise SpecError(f"mamba_ssm_dtype is float32 here; got {short(repr(said.config['mamba_ssm_dtype']))}")
    inputs, state = STATES[key][1](said, sizes)
    return wide * inputs + 4 * state


def _lightning_state(said: _Said, sizes: Config) -> tuple[int, int]:
    """MiniMax: a matrix per head, in the config's dtype, as transformers' class of the first of them keeps it."""
    return sizes["num_heads"] * sizes["head_dim"] ** 2, 0


def _plamo(said: _Said, sizes: Config) -> tuple[int, int]:
    """PLaMo 2: the last inputs but one step of a convolution, and a matrix per head."""
    width = said.needed("mamba_num_heads") * sizes["head_dim"]
    return width * ((said.number("mamba_d_conv") or 4) - 1), width * said.needed("mamba_d_state")


def _delta_net(said: _Said, sizes: Config) -> tuple[int, int]:
    """Gated DeltaNet (Qwen3-Next): a matrix per value head; the convolution runs over queries, keys and values."""
    key_dim, value_dim = said.needed("linear_key_head_dim"), said.needed("linear_value_head_dim")
    key, value = said.needed("linear_num_key_heads") * key_dim, said.needed("linear_num_value_heads") * value_dim
    return (2 * key + value) * said.needed("linear_conv_kernel_dim"), value * key_dim


def _mamba1(said: _Said, sizes: Config) -> tuple[int, int]:
    """Mamba (Jamba): `mamba_d_state` numbers for each of the widened channels."""
    width = said.needed("mamba_expand") * sizes["hidden_size"]
    return width * said.needed("mamba_d_conv"), width * said.needed("mamba_d_state")


def _mamba2(said: _Said, sizes: Config) -> tuple[int, int]:
    """Mamba 2 (Bamba, Granite 4): the convolution runs over the inputs and over both groups of state projections."""
    width, states = said.needed("mamba_expand") * sizes["hidden_size"], said.needed("mamba_d_state")
    heads = said.needed("mamba_n_heads")
    if said.config.get("mamba_d_head") == "auto":
        said.take("mamba_d_head")
    elif (dim := said.number("mamba_d_head")) is not None and heads * dim != width:
        raise SpecError(f"mamba_n_heads * mamba_d_head ({heads} * {dim}) is not mamba_expand * hidden_size ({width})")
    return (width + 2 * said.needed("mamba_n_groups") * states) * said.needed("mamba_d_conv"), width * states


def _short_convolution(said: _Said, sizes: Config) -> tuple[int, int]:
    """LFM2: the last inputs of a convolution, nothing else."""
    return sizes["hidden_size"] * said.needed("conv_L_cache"), 0


# By the key that tells it from the others: which kinds of layers keep it, and how large it is. In the order of looking.
STATES: dict[str, tuple[tuple[str, ...], Callable[[_Said, Config], tuple[int, int]]]] = {
    "attn_type_list": (("lightning",), _lightning_state),
    "mamba_enabled": (("plamo",), _plamo),
    "linear_num_value_heads": (("linear_attention", "state"), _delta_net),
    "mamba_n_heads": (("mamba", "state"), _mamba2),
    "mamba_d_state": (("mamba", "state"), _mamba1),
    "conv_L_cache": (("conv", "state"), _short_convolution),
}


EVERY_MOE = (
    "expert_layer_period", "decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_freq", "moe_layer_frequency",
)  # fmt: skip


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
    every = first(config, EVERY_MOE)
    layers = sum(every) if isinstance(every, list) else layers // (every or 1)
    return int(layers * (experts - met) * 3 * sizes["hidden_size"] * (width or sizes["intermediate_size"]))
