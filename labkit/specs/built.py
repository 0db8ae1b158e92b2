"""The model of a config on the meta device, as transformers has it, with its sizes and the number of its weights."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
from collections.abc import Mapping
from typing import Any

from labkit.specs.files import SpecError
from labkit.specs.names import NAMES, first, said_in_a_line

Config = Mapping[str, Any]

BUILDABLE = 1_000  # layers: each takes some milliseconds and some hundred kilobytes of Python objects
MODALITIES = ("vision_config", "audio_config", "vit_config", "speech_config", "video_config")
# Buffers that training sets, and that published counts hold. All others are constants: decays, tables, frequencies.
TRAINED = re.compile(r"(?:correction_bias|balancing_biases|layer_scalar)$")
DROPPED = ("quantization_config", "auto_map", "dtype", "torch_dtype", "attn_implementation", "_attn_implementation")


def is_known(kind: str) -> bool:
    """Whether the installed transformers has a config class for that model type."""
    from transformers import CONFIG_MAPPING

    return kind in CONFIG_MAPPING


def text_config(config: Config, part: Config) -> Any:
    """The config object of the language model: the outer class fills in what its text part leaves out. Or SpecError."""
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


def build(text: Any, asked: str) -> tuple[Any, bool]:
    """The model on torch's default device, in bfloat16, and whether it has a head; or SpecError."""
    import torch

    layers = first(text, NAMES["num_layers"])
    if isinstance(layers, int) and layers > BUILDABLE:
        raise SpecError(f"num_hidden_layers is {layers:,}: more than {BUILDABLE:,} layers are not built here")
    cls = _class(text, asked)
    vocabulary = first(text, NAMES["vocab_size"]) or 1
    if (getattr(text, "pad_token_id", None) or 0) >= vocabulary:  # it is of the class's own
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


def bypass_experts(model: Any) -> dict[str, int]:
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


def sizes_of(text: Any) -> dict[str, Any]:
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


def plain_keys(text: Any) -> dict[str, Any]:
    """What `labkit.llama` needs of the config besides, and whether the head is the embedding."""
    keys = ("rope_parameters", "rope_theta", "rope_scaling", "rms_norm_eps")
    found = {key: getattr(text, key) for key in keys if getattr(text, key, None) is not None}
    return {**found, "tie_word_embeddings": bool(getattr(text, "tie_word_embeddings", False))}


def count_weights(model: Any, text: Any, has_head: bool, chosen: Mapping[str, int]) -> dict[str, Any]:
    """Weights in all, tied ones once; those of experts that a token is not sent to; and of tables it reads a row of."""
    weights = {id(tensor) for tensor in model.parameters()}
    tensors = {
        id(tensor): (name, tensor)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if id(tensor) in weights or TRAINED.search(name)
    }
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


def _no_decoder(kind: str) -> str:
    return f"model_type {kind!r} is no decoder: it does not generate text from a KV cache of its own"
