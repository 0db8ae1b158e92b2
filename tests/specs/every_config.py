"""Every text decoder that transformers has, its default config: the spec against the cache of the model itself.

`python -m tests.specs.every_config` prints how many agree, and which are refused with which reason. The model is built
on the meta device and run anew, in passes that go past each window where no state makes that long: what its cache holds
after each is counted, tensor by tensor.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from transformers import CONFIG_MAPPING, DynamicCache, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_MAPPING,
)
from transformers.utils import logging

from labkit.sizing import bytes_per_token, cache_bytes
from labkit.specs import ModelSpec, SpecError, from_hf_config
from labkit.specs.measured import unvalidated

FAR = 10**6
FEW = (4, 6, 8)  # layers, of which the first that is enough for one period of a default is taken, or else its own
KINDS = sorted(
    {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    | {*MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
    | {kind for kind in CONFIG_MAPPING if kind.endswith(("_text", "_text_model"))}
)


def shrunk(kind: str) -> dict[str, Any]:
    """The default config of that type as a published one states it, with fewer layers where all their kinds remain."""
    cls = CONFIG_MAPPING[kind]
    try:
        default = cls()
    except Exception:  # no defaults
        return {"model_type": kind}
    for layers in FEW:
        for part in ("text_config", None):
            given = {part: {"num_hidden_layers": layers}} if part else {"num_hidden_layers": layers}
            if part and not isinstance(default.to_dict().get(part), dict):
                continue
            if part:
                given[part]["model_type"] = default.to_dict()[part].get("model_type")
            try:
                config = cls(**given)
            except Exception:  # fewer than its defaults need
                continue
            if same_kinds(default, config, layers):
                return config.to_dict()
    return default.to_dict()


def same_kinds(default: PreTrainedConfig, config: PreTrainedConfig, layers: int) -> bool:
    """Whether the shortened stack has every kind of layer that the default has, and differs in nothing else."""
    texts = [one.get_text_config(decoder=True) for one in (default, config)]
    kinds = [set(getattr(one, "layer_types", None) or ()) for one in texts]
    few = getattr(texts[1], "num_hidden_layers", None) == layers < (getattr(texts[0], "num_hidden_layers", None) or 0)
    lists = [value for value in texts[1].to_dict().values() if isinstance(value, list) and len(value) > layers]
    return few and kinds[0] == kinds[1] and not lists and not getattr(texts[0], "num_kv_shared_layers", 0)


def read(config: dict[str, Any]) -> ModelSpec | SpecError:
    """The spec; that the number of weights is given keeps none from being read."""
    try:
        return from_hf_config(config, parameters=10**13)
    except SpecError as refused:
        return refused


def text_of(config: dict[str, Any]) -> PreTrainedConfig:
    """What in a config describes the text model."""
    text = CONFIG_MAPPING[config["model_type"]].from_dict(config).get_text_config(decoder=True)
    if (getattr(text, "pad_token_id", None) or 0) >= text.vocab_size:
        text.pad_token_id = None
    return text


def build(text: PreTrainedConfig) -> Any:
    """The text model of a config on the meta device, its experts passing on what they get."""
    with torch.device("meta"):
        cls = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None) or MODEL_MAPPING.get(type(text), None) or beside(text)
        model = cls._from_config(text, dtype=torch.bfloat16).eval()
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            module.forward = lambda states, *args, **kwargs: torch.empty_like(states)
    for module in model.modules():
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):
            module.warn_if_padding_and_no_attention_mask = lambda *args: None
    if hasattr(model, "set_attn_implementation") and type(text).model_type in EAGER:
        model.set_attn_implementation("eager")
    return model


FOUND: dict[tuple, list[int]] = {}  # bytes of the text models that were run
EAGER = {"biogpt"}  # whose mask for PyTorch's attention looks at data


def beside(text: PreTrainedConfig) -> Any:
    """The class of a text config that no automatic class names."""
    module = sys.modules[
        __import__(type(text).__module__.replace("configuration_", "modeling_"), fromlist="x").__name__
    ]
    named = [
        cls
        for cls in vars(module).values()
        if getattr(cls, "config_class", None) is type(text)
        and "past_key_values" in inspect.signature(cls.forward).parameters
    ]
    return max(named, key=lambda cls: cls.__name__.endswith("ForCausalLM"))


def live_bytes(config: dict[str, Any], lengths: list[int]) -> list[int]:
    """Bytes that the cache of the model holds after that many tokens, a pass from each length to the next.

    Several types have one text model in common, Llama's default for one: it is run once.
    """
    text = text_of(config)
    key = type(text), json.dumps(text.to_dict(), sort_keys=True, default=str), tuple(lengths)
    if key not in FOUND:
        FOUND[key] = run(build(text), text, lengths)
    return FOUND[key]


def run(model: Any, text: PreTrainedConfig, lengths: list[int]) -> list[int]:
    """The same, of this model."""
    own = hasattr(model, "_supports_default_dynamic_cache") and not model._supports_default_dynamic_cache()
    cache, sizes, before = None if own else DynamicCache(config=text), [], 0
    for length in lengths:
        tokens = torch.zeros((1, length - before), dtype=torch.long, device="meta")
        with torch.no_grad(), torch.device("meta"), unvalidated():
            out = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        cache = cache if out.get("past_key_values") is None else out["past_key_values"]
        in_modules = [value for module in model.modules() for key, value in vars(module).items() if "state" in key]
        once = {id(tensor): tensor for tensor in tensors([vars(cache), in_modules])}
        sizes.append(sum(tensor.nbytes for tensor in once.values()))
        before = length
    return sizes


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor of numbers anywhere inside."""
    if isinstance(value, torch.Tensor):
        if value.dtype.is_floating_point:
            yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors(one)
    elif hasattr(value, "get_max_length") or type(value).__name__ == "DummyLayer":
        yield from tensors(vars(value))


def has_states(spec: ModelSpec) -> bool:
    return any(layer.state_bytes for layer in spec.each_layer)


def held(spec: ModelSpec, tokens: int) -> int:
    """What the spec says of it. Between steps transformers keeps of a window all but the token that comes next."""
    total = cache_bytes(spec, tokens, dtype="bfloat16")
    for layer in spec.each_layer:
        if layer.window and tokens >= layer.window and layer.kind in ("window", "hybrid", "latent"):
            total -= 2 * layer.elements_per_token
    return total


def compare(kind: str) -> str:
    """ "equal", "refused: reason", or "WRONG: what differs"."""
    config = shrunk(kind)
    spec = read(config)
    if isinstance(spec, SpecError) and FEW[0] in config.values():  # refused for its few layers?
        config = CONFIG_MAPPING[kind]().to_dict()
        spec = read(config)
    if isinstance(spec, SpecError):
        return f"refused: {reason(str(spec))}"
    windows = sorted({layer.window for layer in spec.each_layer if layer.window})
    lengths = [3, 4]
    if not has_states(spec):  # a scan over a million tokens, one by one, is no test
        lengths += [length for window in windows for length in (window - 1, window)] + [FAR, FAR + 1]
    lengths = sorted({length for length in lengths if length > 0})
    try:
        try:
            found = live_bytes(config, lengths)
        except Exception:  # positions that it learned end before
            lengths = [length for length in lengths if length <= spec.max_seq_len]
            found = live_bytes(config, lengths)
    except Exception as error:
        return f"WRONG: the model does not run here: {error}"
    expected = [held(spec, length) for length in lengths]
    if found != expected:
        return f"WRONG: live {found}, spec {expected} after {lengths}"
    grown = dict(zip(lengths, found, strict=True))
    for position in (3, FAR):
        if position + 1 in grown and position in grown:
            step = grown[position + 1] - grown[position]
            full = [layer.window for layer in spec.each_layer if layer.window == position + 1]
            if not full and step != bytes_per_token(spec, "bfloat16", position=position):
                return f"WRONG: token {position} adds {step}, the spec says {bytes_per_token(spec, position=position)}"
    return "equal"


def reason(said: str) -> str:
    """A refusal without what is particular to one type."""
    for sort in (
        "is no decoder",
        "keeps no KV cache",
        "in a way that is not read here",
        "cannot build",
        "does not run",
    ):
        if sort in said:
            return sort
    return re.sub(r"'[^']*'|\d[\d,]*", "..", said)[:60]


def main() -> int:
    logging.set_verbosity(logging.CRITICAL)
    results = {}
    for kind in sys.argv[1:] or KINDS:
        start = time.perf_counter()
        results[kind] = compare(kind)
        print(f"{kind:<32}{time.perf_counter() - start:6.1f} s  {results[kind][:200]}", flush=True)
    counts = Counter(result.partition(": ")[0] if result.startswith("WRONG") else result for result in results.values())
    for result, count in counts.most_common():
        print(f"{count:>5} {result}")
    return 1 if counts["WRONG"] else 0


if __name__ == "__main__":
    sys.exit(main())
