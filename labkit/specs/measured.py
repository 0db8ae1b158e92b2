"""What transformers' own class keeps: built on the meta device, run for a few tokens, its cache's tensors counted."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from labkit.specs.files import SpecError
from labkit.specs.keys import EVERY, HARMLESS, READ
from labkit.specs.names import NAMES, first, said_in_a_line

if TYPE_CHECKING:
    import torch

Config = Mapping[str, Any]
Held = dict[str, "torch.Tensor"]

PROMPT = 5  # tokens of the first pass; the second has one, as a decode step
AFAR = 2**31  # tokens that a layer's cache is fed to see whether it stops growing: more than any window
BUILDABLE = 1_000  # layers: each takes some milliseconds and some hundred kilobytes of Python objects
MODALITIES = ("vision_config", "audio_config", "vit_config", "speech_config", "video_config")
DROPPED = ("quantization_config", "auto_map", "dtype", "torch_dtype", "attn_implementation", "_attn_implementation")
STRUCTURAL = re.compile(  # keys that speak of what layers keep
    r"pattern|layer_type|attn_type|block_type|mamba|ssm|linear_attn|index_head|window|hybrid|lightning|recurrent|use_cla"
    r"|per_layer|attn_layer|attention_layers|kv_shar"
)
HEARD = ("sliding_window", "attention_chunk_size", "layer_types")  # what the cache reads of any config
OFF = {  # what means nothing where a flag is false
    "use_sliding_window": ("max_window_layers",),
    "use_cla": ("cla_share_factor",),
    "mamba_enabled": ("mamba_step", "mamba_num_heads", "mamba_d_state", "mamba_d_conv"),
}
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)(?:\.|$)")


def is_known(kind: str) -> bool:
    """Whether the installed transformers has a config class for that model type."""
    from transformers import CONFIG_MAPPING

    return kind in CONFIG_MAPPING


def measure(config: Config, part: Config) -> dict[str, Any]:
    """What the class that transformers has for `config` keeps, layer by layer, its sizes and its weights; JSON only.

    config: the whole of a config.json; part: what in it describes the language model. Nothing is allocated: weights,
    tokens and cache are on the meta device. Raises SpecError with the reason where the class cannot be built or run,
    where it keeps no K and V, or keeps them in a way that no layer of a spec can say.
    """
    with _quietly():
        import torch

        asked = next(one["model_type"] for one in (config, part) if is_known(one.get("model_type") or ""))
        text = _text_config(config, part)
        text.bytes_of_a_number = 4 if "float32" in str(first(part, ("dtype", "torch_dtype"))) else 2
        with torch.device("meta"):
            model, has_head = _build(text, asked)
            experts = _bypass_experts(model)
            cache, layers = _run(model, text, [PROMPT, 1])
        if cache is None:
            raise SpecError(_no_cache(asked))
        states = [tensor for one in layers[-1] for name, tensor in one.items() if name not in ("keys", "values")]
        text.has_float32_states = any(tensor.dtype == torch.float32 for tensor in states)
        read = _layers(model, text, cache, layers)
        text.allow_global_per_layer_attribute_access = True  # what differs by layer is said by the layers
        _check_heard(part, text, read)
        release = ".".join(version("transformers").split(".")[:2])
        note = _once_each(text, read)
        _check_sizes(part, text, read)
        return {
            "found": f"measured on transformers {release}'s {type(model).__name__}{note}",
            "kind": text.model_type,
            "layers": read,
            "sizes": _sizes(text),
            "text": _plain(text),
            **_weights(model, text, has_head, experts),
        }


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """No advice about kernels that are missing here and would change nothing."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def _text_config(config: Config, part: Config) -> Any:
    """The config object of the language model: the outer class fills in what its text part leaves out."""
    from transformers import CONFIG_MAPPING

    reason = None
    for given in (config, part):
        kind = given.get("model_type") or ""
        if kind not in CONFIG_MAPPING:
            continue
        built = {key: value for key, value in given.items() if key not in (*DROPPED, *MODALITIES, "model_type")}
        pattern, layers = built.get("sliding_window_pattern"), first(built, NAMES["num_layers"])
        if isinstance(pattern, str) and set(pattern) == {"L", "G"} and built.get("sliding_window") and layers:
            named = {"L": "sliding_attention", "G": "full_attention"}  # EXAONE 4's, whose class counts with it
            built.setdefault("layer_types", [named[pattern[index % len(pattern)]] for index in range(layers)])
        try:
            cls = CONFIG_MAPPING[kind]
            names = {key.lstrip("_"): key for key in built if key.startswith("_")}  # RecurrentGemma's _block_types
            own = {name: built[key] for name, key in names.items() if name not in built and hasattr(cls, name)}
            whole = cls.from_dict({**built, **own})
            text = whole.get_text_config(decoder=True)
        except Exception as error:  # each class has checks of its own
            reason = reason or said_in_a_line(error)
            continue
        if isinstance(text, Mapping):
            reason = reason or f"a {kind} has no part for text"
            continue
        if getattr(text, "is_encoder_decoder", False):
            raise SpecError(_no_decoder(kind))
        return text
    raise SpecError(f"transformers' class for model_type {config.get('model_type')!r} refuses this config: {reason}")


def _build(text: Any, asked: str) -> tuple[Any, bool]:
    """The model on the meta device, in bfloat16; and whether it has a head."""
    import torch

    layers = first(text, NAMES["num_layers"])
    if isinstance(layers, int) and layers > BUILDABLE:
        raise SpecError(f"num_hidden_layers is {layers:,}: more than {BUILDABLE:,} layers are not built here")
    cls = _class(text, asked)
    if (getattr(text, "pad_token_id", None) or 0) >= (
        first(text, NAMES["vocab_size"]) or 1
    ):  # of the class's own vocabulary
        text.pad_token_id = None
    try:
        model = cls._from_config(text, dtype=torch.bfloat16).eval()
    except Exception as error:  # sizes that do not go together, defaults that its class lacks, a missing package
        said = said_in_a_line(error)
        raise SpecError(f"transformers cannot build a {text.model_type!r} of these sizes: {said}") from None
    if _only_encodes(model):
        raise SpecError(_no_decoder(asked))
    for module in model.modules():
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):  # it would look at the tokens
            module.warn_if_padding_and_no_attention_mask = lambda *_: None
    return model, model.get_output_embeddings() is not None


def _only_encodes(model: Any) -> bool:
    """Whether its layers say that they decode nothing, as BERT's do unless `is_decoder` is set."""
    said = [module.is_decoder for module in model.modules() if hasattr(module, "is_decoder")]
    return bool(said) and not any(said) and not any(getattr(module, "is_causal", False) for module in model.modules())


def _class(text: Any, asked: str) -> Any:
    """The class that makes text from this config: what AutoModelForCausalLM takes, or else one beside the config's."""
    from transformers import PreTrainedModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
    beside = []
    with contextlib.suppress(ImportError):
        module = importlib.import_module(type(text).__module__.replace(".configuration_", ".modeling_"))
        beside = [cls for cls in vars(module).values() if isinstance(cls, type) and issubclass(cls, PreTrainedModel)]
    fitting = [
        cls
        for cls in beside
        if getattr(cls, "config_class", None) is type(text)
        and {"input_ids", "past_key_values"} <= set(inspect.signature(cls.forward).parameters)
    ]
    if not fitting:
        raise SpecError(f"model_type {asked!r} is no decoder: transformers has no class of it that makes text")
    return min(fitting, key=lambda cls: (not cls.__name__.endswith("ForCausalLM"), len(cls.__name__)))


def _bypass_experts(model: Any) -> dict[str, int]:
    """Let every bank of experts pass on what it gets; returns a dict that will hold how many a token was sent to.

    Which tokens go to which expert depends on data, which the meta device has not; no key or value does.
    """
    import torch

    chosen: dict[str, int] = {}

    def bypass(name: str) -> Any:
        def forward(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            for given in (*args, *kwargs.values()):
                if isinstance(given, torch.Tensor) and not given.dtype.is_floating_point and given.ndim > 1:
                    chosen[name] = given.shape[-1]
            return torch.empty_like(hidden_states)

        return forward

    for name, module in model.named_modules():
        if type(module).__name__.endswith("Experts"):
            module.forward = bypass(name)
    return chosen


def _run(model: Any, text: Any, passes: Sequence[int]) -> tuple[Any, list[list[Held]]]:
    """The cache that `generate` would make, after passes of so many tokens; and what each layer held after each."""
    try:
        return _passes(model, text, passes)
    except Exception as first_error:  # some masks for PyTorch's own attention depend on data; the plain ones do not
        try:
            model.set_attn_implementation("eager")
            return _passes(model, text, passes)
        except Exception:
            said = said_in_a_line(first_error)
            raise SpecError(f"transformers' {type(model).__name__} of these sizes does not run: {said}") from None


@contextlib.contextmanager
def unvalidated() -> Iterator[None]:
    """Without PyTorch's look at a distribution's parameters (gemma3n makes one): a tensor on meta has no value to look
    at. Some packages switch it off when they are imported, so that only some machines would fail."""
    from torch.distributions import Distribution

    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def _passes(model: Any, text: Any, passes: Sequence[int]) -> tuple[Any, list[list[Held]]]:
    import torch
    from transformers import DynamicCache

    makes_its_own = hasattr(model, "_supports_default_dynamic_cache") and not model._supports_default_dynamic_cache()
    cache: Any = None if makes_its_own else DynamicCache(config=text)
    held = []
    for tokens in passes:
        with torch.no_grad(), unvalidated():
            out = model(input_ids=torch.zeros((1, tokens), dtype=torch.long), past_key_values=cache, use_cache=True)
        cache = cache if out.get("past_key_values") is None else out["past_key_values"]
        if not hasattr(cache, "layers"):
            return None, []
        held.append([_tensors(layer) for layer in cache.layers])
    return cache, held


def _tensors(layer: Any) -> Held:
    """All numbers that a layer of a cache holds, by name."""
    import torch

    found: Held = {}
    for name, value in vars(layer).items():
        parts = value if isinstance(value, dict) else {"": value}
        for key, tensor in parts.items():
            if isinstance(tensor, torch.Tensor) and tensor.dtype.is_floating_point:
                found[f"{name}{key}"] = tensor
    return found


def _layers(model: Any, text: Any, cache: Any, held: list[list[Held]]) -> list[dict[str, Any]]:
    """Each layer as the fields of a `LayerGroup`."""
    count = max(len(cache.layers), first(text, NAMES["num_layers"]) or 0)
    states = _states_in_modules(model, text)
    read = []
    for index in range(count):
        if index < len(cache.layers):
            layer = _layer(text, index, cache.layers[index], *(snapshot[index] for snapshot in held))
        else:
            layer = {"kind": "none"}
        nbytes = states.get(index, 0) + _states_beside(text, cache, index)
        if nbytes:
            layer = {"kind": "state", "state_bytes": nbytes} if layer["kind"] == "none" else layer
        read.append(_shared(text, index, count) if layer["kind"] == "none" else layer)
    if not any(layer["kind"] in ("full", "window", "latent", "hybrid") for layer in read):
        raise SpecError(_no_cache(text.model_type))
    if any(type(layer).__module__ != "transformers.cache_utils" for layer in cache.layers):
        _check_growth(model, text, read)
    return read


def _layer(text: Any, index: int, layer: Any, before: Held, after: Held) -> dict[str, Any]:
    """One layer of a cache: what grows with each token, what does not, and whether it stops growing."""
    keys: Any = after.pop("keys", None)
    values: Any = after.pop("values", None)
    grows = {name for name, tensor in after.items() if tensor.numel() != before[name].numel()}
    beside = {name: after[name].numel() / (PROMPT + 1) for name in grows}
    for name, each in beside.items():
        if before[name].numel() != PROMPT * each:
            raise SpecError(_strange(text, layer))
        wide = after[name].element_size() // 2  # in numbers of 16 bits: some keep these in float32
        beside[name] = each * max(1, wide)
    state = sum(_bytes(text, tensor) for name, tensor in after.items() if name not in grows)
    if keys is None or not keys.numel():
        if grows:
            raise SpecError(_strange(text, layer))
        return {"kind": "state", "state_bytes": state} if state else {"kind": "none"}
    window = _window(layer, keys, values)
    heads, k_dim, v_dim = keys.shape[1], keys.shape[-1], values.shape[-1]
    own = text.per_layer_config[index] if index < len(text.per_layer_config) else text
    rank, rope = getattr(own, "kv_lora_rank", None), getattr(own, "qk_rope_head_dim", None) or 0
    found: dict[str, Any] = {"window": window, "index_dim": int(sum(beside.values())) or None}
    if rank and heads == 1 and values.shape[1] == 1 and rank in (k_dim, v_dim, k_dim - rope):
        found |= {"kind": "latent", "latent_dim": k_dim + v_dim}
    else:
        if values.shape[1] != heads:
            raise SpecError(_strange(text, layer))
        found |= {"kind": "window" if window else "full", "num_kv_heads": heads, "head_dim": k_dim, "v_head_dim": v_dim}
    if state:
        if found["kind"] == "latent":
            raise SpecError(_strange(text, layer))
        found |= {"kind": "hybrid", "state_bytes": state}
    return {key: value for key, value in found.items() if value is not None}


def _window(layer: Any, keys: Any, values: Any) -> int | None:
    """How many tokens the layer sees at most; None when it keeps all. Between steps it may lack the one to come."""
    import torch

    new = [torch.empty((*one.shape[:2], AFAR, one.shape[-1]), dtype=one.dtype, device="meta") for one in (keys, values)]
    layer.update(*new)
    left = layer.keys.shape[-2]
    if left >= AFAR:
        return None
    said = getattr(layer, "sliding_window", None)
    return said if said in (left, left + 1) else left


def _states_in_modules(model: Any, text: Any) -> dict[int, int]:
    """Bytes of the states that layers keep in themselves rather than in a cache, as RecurrentGemma's do."""
    import torch

    found: dict[int, int] = {}
    for name, module in model.named_modules():
        index = LAYER.search(name)
        for key, value in vars(module).items():
            if index and isinstance(value, torch.Tensor) and "state" in key and value.dtype.is_floating_point:
                layer = int(index[1])
                found[layer] = found.get(layer, 0) + _bytes(text, value)
    return found


def _states_beside(text: Any, cache: Any, index: int) -> int:
    """Bytes of the states that a cache keeps in a list of its own, beside its layers, as MiniMax's does."""
    import torch

    lists = [value for value in vars(cache).values() if isinstance(value, list) and index < len(value)]
    return sum(_bytes(text, value[index]) for value in lists if isinstance(value[index], torch.Tensor))


def _shared(text: Any, index: int, count: int) -> dict[str, Any]:
    """A layer that holds nothing: it reads another layer's keys and values, or it does not attend to the text."""
    modes = getattr(text, "kv_sharing_modes", None)
    if modes is not None and index < len(modes) and modes[index] == "reuse":
        return {"kind": "shared"}
    return {"kind": "shared" if index >= count - (getattr(text, "num_kv_shared_layers", None) or 0) else "none"}


def _bytes(text: Any, tensor: Any) -> int:
    """Bytes of a state: as wide as the model's own dtype where it follows it (it ran in bfloat16), else as it is."""
    import torch

    return tensor.numel() * (text.bytes_of_a_number if tensor.dtype == torch.bfloat16 else tensor.element_size())


def _check_heard(part: Config, text: Any, read: list[dict[str, Any]]) -> None:
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
    off = [key for flag, keys in OFF.items() if part.get(flag) is False for key in keys]
    unheard = []
    for key, value in part.items():
        structural = key in READ or (STRUCTURAL.search(key) and value is not True)
        if not value or not structural or key in (*HARMLESS, *HEARD, *off):
            continue
        bare = key.lstrip("_")
        if bare == key or hasattr(type(text), bare):  # another underscored key is one of the class's own, overwritten
            if any(re.search(rf"\b{re.escape(bare)}\b", source) for source in sources):
                continue
        if key == "mamba_ssm_dtype" and value == "float32" and text.has_float32_states:
            continue
        if not _agrees(bare, value, read):
            unheard.append(key)
    if unheard:
        raise SpecError(
            f"{', '.join(unheard)} is not read by transformers' {type(text).__name__}, and is not read here: write the "
            f"layers into a file in data/models by hand, or take out what says nothing of the cache"
        )


def _agrees(key: str, value: Any, read: list[dict[str, Any]]) -> bool:
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
        return {layer.get("num_kv_heads") for layer in read if "num_kv_heads" in layer} == {1}
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


def _check_sizes(part: Config, text: Any, read: list[dict[str, Any]]) -> None:
    """SpecError where the config gives a size under a name that the class does not read, and another was measured."""
    sizes = _sizes(text)
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


def _once_each(text: Any, read: list[dict[str, Any]]) -> str:
    """Count each KV head once where a class repeats them for its queries before it keeps them; returns a note of it.

    Falcon's newer form does. Whoever else runs such a model keeps what the config names.
    """
    heads, said = first(text, NAMES["num_heads"]), getattr(text, "num_kv_heads", None)
    repeats = getattr(text, "new_decoder_architecture", False) and isinstance(said, int) and said < heads
    for layer in read if repeats else ():
        if layer.get("num_kv_heads") == heads:
            layer["num_kv_heads"] = said
    return f", which keeps each KV head {heads // said} times: counted once" if repeats else ""


def _check_growth(model: Any, text: Any, read: list[dict[str, Any]]) -> None:
    """SpecError unless layers of a class that one model defines for itself grow as `read` says at other lengths too."""
    import torch

    for passes in ([2 * PROMPT, 1], [4099, 1, 1]):
        with torch.device("meta"):
            cache, held = _run(model, text, passes)
        for layer, own, snapshot in zip(read, cache.layers, held[-1], strict=False):
            seen = sum(passes)
            if window := layer.get("window"):
                seen = min(seen, window - 1)
            each = layer.get("latent_dim") or layer.get("num_kv_heads", 0) * sum(
                layer.get(key, 0) for key in ("head_dim", "v_head_dim")
            )
            expected = seen * text.bytes_of_a_number * each + sum(passes) * text.bytes_of_a_number * layer.get(
                "index_dim", 0
            )
            expected += layer.get("state_bytes", 0)
            if sum(_bytes(text, tensor) for tensor in snapshot.values()) != expected:
                raise SpecError(_strange(text, own))


def _strange(text: Any, layer: Any) -> str:
    return (
        f"model_type {text.model_type!r} keeps K and V in a way that is not read here (its layers' cache is a "
        f"{type(layer).__name__}): write the layers that it comes near to into a file in data/models"
    )


def _no_decoder(kind: str) -> str:
    return f"model_type {kind!r} is no decoder: it does not generate text from a KV cache of its own"


def _no_cache(kind: str) -> str:
    return f"model_type {kind!r} keeps no KV cache: what it holds is as large after any number of tokens"


def _sizes(text: Any) -> dict[str, Any]:
    """The sizes by their names in a spec, wherever the class has them."""
    found = {field: first(text, names) for field, names in NAMES.items()}
    if isinstance(found["intermediate_size"], list | tuple):  # Gemma 3n has one per layer
        found["intermediate_size"] = max(found["intermediate_size"])
    for field in ("num_heads", "num_kv_heads"):
        if isinstance(found[field], list | tuple):
            found[field] = max(found[field])
    if getattr(text, "kv_lora_rank", None):
        found["head_dim"] = text.qk_nope_head_dim + text.qk_rope_head_dim
        found |= {"v_head_dim": text.v_head_dim, "num_kv_heads": found["num_heads"]}
    return {field: value for field, value in found.items() if value is not None}


def _plain(text: Any) -> dict[str, Any]:
    """What `labkit.llama` needs of the config besides, and whether the head is the embedding."""
    keys = ("rope_parameters", "rope_theta", "rope_scaling", "rms_norm_eps")
    found = {key: getattr(text, key) for key in keys if getattr(text, key, None) is not None}
    return {**found, "tie_word_embeddings": bool(getattr(text, "tie_word_embeddings", False))}


def _weights(model: Any, text: Any, has_head: bool, chosen: Mapping[str, int]) -> dict[str, Any]:
    """Weights in all, tied ones once; those of experts that a token is not sent to; and of tables it reads a row of."""
    tensors = {id(tensor): (name, tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    total = sum(tensor.numel() for _, tensor in tensors.values())
    if not has_head and not getattr(text, "tie_word_embeddings", False):
        total += text.vocab_size * text.hidden_size
    rows = sum(tensor.numel() for name, tensor in tensors.values() if "embed_tokens_per_layer" in name)
    answer: dict[str, Any] = {"parameters": total, "rows": rows, "unmet": 0}
    routed: dict[tuple[int, int], int] = {}
    for name, module in model.named_modules():
        if not type(module).__name__.endswith("Experts"):
            continue
        own = sum(tensor.numel() for tensor in module.parameters())
        many, met = _experts(text, module), chosen.get(name) or _per_token(text)
        if own and many and met:
            answer["unmet"] += own - own * min(met, many) // many
            routed[many, met] = routed.get((many, met), 0) + own
    if routed:
        answer["num_experts"], answer["experts_per_token"] = max(routed, key=lambda pair: routed[pair])
    return answer


def _experts(text: Any, module: Any) -> int | None:
    """How many experts a bank holds: as it says, as its tensors say, or the config."""
    banks = {tensor.shape[0] for tensor in module.parameters() if tensor.ndim == 3}
    return banks.pop() if len(banks) == 1 else getattr(module, "num_experts", None) or first(text, NAMES["num_experts"])


def _per_token(text: Any) -> int | None:
    found = first(text, NAMES["experts_per_token"])
    return max(found) if isinstance(found, list | tuple) else found
