"""A model spec from a Hugging Face `config.json`, of any architecture.

What transformers has is built (`built.py`), measured (`measured.py`) and held against what the config says besides
(`heard.py`); Llama's shape, and types that transformers lacks, are read by arithmetic (`plain.py`). `ModelSpec.found`
says which way it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from labkit.printable import printable
from labkit.specs import bounds, plain
from labkit.specs.files import SpecError, parse, read_text, short, user_path
from labkit.specs.kept import kept
from labkit.specs.model import DECODER_TYPES, HOLDS, LayerGroup, ModelSpec
from labkit.specs.names import NAMES, said_in_a_line

Config = Mapping[str, Any]

NESTED = ("text_config", "llm_config", "language_config", "thinker_config")
TRAINED = {"bloom": 2048, "recurrent_gemma": 8192}  # tokens that it was trained with, where no config says it
NO_DECODER = {  # common types of which it is known without building one
    "albert", "align", "bart", "bert", "camembert", "clip", "convnext", "deberta", "deberta-v2", "distilbert",
    "electra", "longt5", "marian", "mbart", "modernbert", "mpnet", "mt5", "pegasus", "resnet", "roberta", "siglip",
    "swin",    "switch_transformers", "t5", "umt5", "vit", "wav2vec2", "whisper", "xlm-roberta",
}  # fmt: skip
NO_CACHE = {"falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"}
SHAPE = ("num_kv_heads", "head_dim", "v_head_dim")


def from_hf_config(config: Config | str | Path, name: str = "", parameters: int | None = None) -> ModelSpec:
    """The spec that a Hugging Face config describes: a dict, a `config.json`, or a folder that holds one.

    Of a multimodal model it is that of its language model. An architecture that the installed transformers has is
    built from the config without memory, run for a few tokens, and what its cache holds is measured: some seconds,
    once, as the answer is kept in the cache folder. Llama's shape needs no torch. A type that transformers does not
    have is read as a plain decoder if every key of its config is understood.

    parameters: weights in all. Where they are not given they are counted; a type that transformers does not have needs
    them. Raises SpecError, in one line.
    """
    if not isinstance(config, Mapping):
        if not isinstance(config, str | Path):
            raise SpecError(f"a config is a dict, a config.json or a folder; got a {type(config).__name__}")
        path = user_path(config)
        config, name = _load(path, str(config)), name or _default_name(path)
    config = {key: value for key, value in config.items() if key not in NESTED or value}  # an empty part says nothing
    part = _text_part(config)
    for one in (config, part):
        _check_type(one)
        bounds.check(one)
    try:
        answer = _answer(config, part)
        fields = _fields(answer, parameters)
    except SpecError:
        raise
    except (TypeError, AttributeError, ValueError, ArithmeticError, KeyError) as error:
        raise SpecError(f"the config cannot be read ({error}): are its sizes whole numbers?") from None
    return ModelSpec(**fields, name=name or config.get("_name_or_path") or answer["kind"])


def decoder_spec(config: Config | str | Path, name: str = "") -> ModelSpec:
    """As `from_hf_config`, for a model that `labkit.llama` is to run; SpecError for one that it cannot."""
    if not isinstance(config, Mapping):
        path = user_path(config)
        config, name = _load(path, str(config)), name or _default_name(path)
    if (kind := config.get("model_type")) not in DECODER_TYPES:
        raise SpecError(f"model_type {kind!r} is not supported; one of {', '.join(DECODER_TYPES)} is needed")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise SpecError(f"{key} is not supported: only Qwen2's bias, on q, k and v, is")
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise SpecError(f"hidden_act {activation!r} is not supported; silu is")
    spec = from_hf_config(config, name)
    if spec.layers is not None:
        raise SpecError("some layers have a sliding window and some have none: only one kind for all is supported")
    spec.check_runs()
    return spec


def _default_name(path: Path) -> str:
    return printable(path.resolve().parent.name if path.name == "config.json" else path.resolve().stem)


def _load(path: Path, given: str) -> dict[str, Any]:
    """The dict in a config file, or in the `config.json` of a folder; `given`: as the user names it."""
    try:
        path = path / "config.json" if path.is_dir() else path
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        said = f"there is no file {short(given)}: name a config.json, or a folder that holds one"
        raise SpecError(said) from None
    except (OSError, ValueError) as error:  # a name that no file can have
        raise SpecError(f"{short(path.name)!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    config = parse(read_text(path), path.name)
    if not isinstance(config, dict):
        raise SpecError(f"{short(path.name)} holds a {type(config).__name__}, no object: is it a model's config.json?")
    return config


def _text_part(config: Config) -> Config:
    """The part of a multimodal model's config that describes its language model, with what the whole says for it."""
    part = next((config[key] for key in NESTED if isinstance(config.get(key), Mapping)), None)
    if part is None:
        return config
    outer = {key: config[key] for key in ("dtype", "torch_dtype", "tie_word_embeddings") if key in config}
    inner = _text_part(part)
    return {**outer, **inner}


def _check_type(config: Config) -> None:
    """SpecError unless a config of that type can be a decoder's."""
    kind = config.get("model_type")
    if not isinstance(kind, str | None):
        raise SpecError(f'model_type must be text, as in "llama"; got {short(repr(kind))}')
    if kind in NO_CACHE:
        raise SpecError(f"model_type {kind!r} keeps no KV cache: what it holds is as large after any number of tokens")
    if config.get("is_encoder_decoder") or (kind in NO_DECODER and not config.get("is_decoder")):
        raise SpecError(f"model_type {kind!r} is no decoder: it does not generate text from a KV cache of its own")


def _answer(config: Config, part: Config) -> dict[str, Any]:
    """Sizes, layers and weights, and how they were found."""
    if part.get("model_type") in DECODER_TYPES and plain.is_llama(part):
        return plain.read(part) | {"found": "by arithmetic: plain Llama shape"}
    answer = kept([config, part], lambda: _ask_transformers(config, part))
    if answer.get("unknown"):
        return plain.read(part) | {"found": "read as a plain decoder: transformers has no such type"}
    return answer


def _ask_transformers(config: Config, part: Config) -> dict[str, Any]:
    from labkit.specs.built import is_known
    from labkit.specs.measured import measure

    if not any(is_known(one["model_type"]) for one in (config, part) if one.get("model_type")):
        return {"unknown": True}
    try:
        return measure(config, part)
    except SpecError:
        raise
    except Exception as error:  # of a class that is unlike all others
        said, kind = said_in_a_line(error), part.get("model_type") or config.get("model_type")
        raise SpecError(f"what transformers' {kind!r} keeps cannot be measured: {said}") from None


def _fields(answer: dict[str, Any], parameters: int | None) -> dict[str, Any]:
    """The fields of a ModelSpec, its name aside."""
    sizes, layers, kind, text = answer["sizes"], answer["layers"], answer["kind"], answer["text"]
    sizes = {field: value for field, value in sizes.items() if field not in ("num_experts", "experts_per_token")}
    sizes.setdefault("max_seq_len", TRAINED.get(kind))
    if missing := next((field for field in ("max_seq_len", "vocab_size") if sizes.get(field) is None), None):
        raise SpecError(f"the config has no {NAMES[missing][0]!r}: is it a text model's config.json?")
    sizes.setdefault("intermediate_size", 4 * sizes["hidden_size"])
    fields = {
        **sizes,
        **_layer_fields(sizes, layers),
        **(_for_llama(kind, text) if kind in DECODER_TYPES else {}),
        "model_type": kind,
        "tied_head": bool(text.get("tie_word_embeddings")),
        "found": answer["found"],
    }
    counted = answer["parameters"]
    if parameters is None and counted is None and kind not in DECODER_TYPES:
        raise SpecError(
            f"the weights of a {kind!r} model cannot be counted (transformers has no such type): give parameters=, or "
            f"--parameters on the command line: how many there are"
        )
    fields["parameters"] = counted if parameters is None else parameters
    if kind in DECODER_TYPES and parameters is None and counted is not None:
        shape = ModelSpec(**{**fields, "name": kind, "parameters": None})
        fields["parameters"] = None if shape.num_parameters == counted else counted
    if "num_experts" in answer:
        fields |= {field: answer[field] for field in ("num_experts", "experts_per_token")}
    if (answer["unmet"] or answer["rows"]) and fields["parameters"] is not None:
        fields["active_parameters"] = fields["parameters"] - answer["unmet"] - answer["rows"]
        if fields["active_parameters"] < 1:
            raise SpecError(
                f"of {fields['parameters']:,} weights, the experts that a token does not meet would have "
                f"{answer['unmet'] + answer['rows']:,}: write the number of all weights out, 7B is 7000000000"
            )
    return fields


def _layer_fields(sizes: dict[str, Any], layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`layers` of the spec, and the heads and the window of most of them, which need not be said again."""
    heads = [layer for layer in layers if "num_kv_heads" in layer]
    fields: dict[str, Any] = {"num_layers": len(layers)}
    if heads and not any(layer["kind"] == "latent" for layer in layers):
        usual = Counter(tuple(layer[key] for key in SHAPE) for layer in heads).most_common(1)[0][0]
        fields |= dict(zip(SHAPE, usual, strict=True))
    else:
        fields |= {key: sizes[key] for key in SHAPE if key in sizes}
    fields.setdefault("head_dim", sizes["hidden_size"] // sizes["num_heads"])
    fields.setdefault("num_kv_heads", sizes["num_heads"])
    if fields.get("v_head_dim") == fields["head_dim"]:
        fields["v_head_dim"] = None
    windows = Counter(layer["window"] for layer in layers if layer["kind"] == "window")
    if windows:
        fields["window"] = windows.most_common(1)[0][0]
    groups = [_group(layer, fields) for layer in layers]
    if all(group == LayerGroup("full") for group in groups) or all(group == LayerGroup("window") for group in groups):
        return fields
    if not any(layer["kind"] in HOLDS for layer in layers):
        raise SpecError("no layer keeps K and V: the model has no KV cache")
    period = next(n for n in range(1, len(groups) + 1) if all(groups[i] == groups[i % n] for i in range(len(groups))))
    runs = [(group, len(list(run))) for group, run in groupby(groups[:period])]
    return fields | {"layers": [_counted(group, count) for group, count in runs]}


def _group(layer: Mapping[str, Any], usual: Mapping[str, Any]) -> LayerGroup:
    """A layer as it differs from the usual ones."""
    own = dict(layer)
    if own["kind"] == "window" and own["window"] == usual["window"]:
        own.pop("window")
    if "head_dim" in own:
        k_dim, v_dim = own.pop("head_dim"), own.pop("v_head_dim")
        if (k_dim, v_dim) != (usual["head_dim"], usual.get("v_head_dim") or usual["head_dim"]):
            own |= {"head_dim": k_dim} | ({"v_head_dim": v_dim} if v_dim != k_dim else {})
        if own["num_kv_heads"] == usual["num_kv_heads"]:
            own.pop("num_kv_heads")
    return LayerGroup(**own)


def _counted(group: LayerGroup, count: int) -> LayerGroup:
    own = {key: value for key, value in vars(group).items() if value is not None and not key.startswith("_")}
    return LayerGroup(**{**own, "count": count})


def _for_llama(kind: str, text: Config) -> dict[str, Any]:
    """What `labkit.llama` needs besides sizes, wherever the transformers version that wrote the config kept it."""
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    theta = text.get("rope_theta") if rope.get("rope_theta") is None else rope["rope_theta"]
    eps = text.get("rms_norm_eps")
    return {
        "rope_theta": 10_000.0 if theta is None else float(theta),
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "norm_eps": 1e-6 if eps is None else float(eps),
        "qkv_bias": kind == "qwen2",
    }
