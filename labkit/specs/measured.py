"""What transformers' own class keeps: built on the meta device, run for a few tokens, its cache's tensors counted."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from labkit.specs import built, heard
from labkit.specs.files import SpecError
from labkit.specs.names import NAMES, first, said_in_a_line

if TYPE_CHECKING:
    import torch

Config = Mapping[str, Any]
Held = dict[str, "torch.Tensor"]

PROMPT = 5  # tokens of the first pass; the second has one, as a decode step
AFAR = 2**31  # tokens that a layer's cache is fed to see whether it stops growing: more than any window
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)(?:\.|$)")


def measure(config: Config, part: Config) -> dict[str, Any]:
    """What the class that transformers has for `config` keeps, layer by layer, its sizes and its weights; JSON only.

    config: the whole of a config.json; part: what in it describes the language model. Nothing is allocated: weights,
    tokens and cache are on the meta device. Raises SpecError with the reason where the class cannot be built or run,
    where it keeps no K and V, or keeps them in a way that no layer of a spec can say.
    """
    with _quietly():
        import torch

        asked = next(one["model_type"] for one in (config, part) if built.is_known(one.get("model_type") or ""))
        text = built.text_config(config, part)
        text.bytes_of_a_number = 4 if "float32" in str(first(part, ("dtype", "torch_dtype"))) else 2
        with torch.device("meta"):
            model, has_head = built.build(text, asked)
            experts = built.bypass_experts(model)
            cache, layers = _run(model, text, [PROMPT, 1])
        if cache is None:
            raise SpecError(_no_cache(asked))
        states = [tensor for one in layers[-1] for name, tensor in one.items() if name not in ("keys", "values")]
        text.has_float32_states = any(tensor.dtype == torch.float32 for tensor in states)
        read = _layers(model, text, cache, layers)
        text.allow_global_per_layer_attribute_access = True  # what differs by layer is said by the layers
        heard.check_heard(part, text, read)
        release = ".".join(version("transformers").split(".")[:2])
        note = _once_each(text, read)
        heard.check_sizes(part, text, read)
        return {
            "found": f"measured on transformers {release}'s {type(model).__name__}{note}",
            "kind": text.model_type,
            "layers": read,
            "sizes": built.sizes_of(text),
            "text": built.plain_keys(text),
            **built.count_weights(model, text, has_head, experts),
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


def _no_cache(kind: str) -> str:
    return f"model_type {kind!r} keeps no KV cache: what it holds is as large after any number of tokens"
