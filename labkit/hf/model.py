"""Which models a labkit cache can attend for: what transformers says of one, and what two tokens through it show."""

from __future__ import annotations

import inspect
import re
import sys

from transformers import DynamicCache, PretrainedConfig, PreTrainedModel, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from labkit.cache import Cache
from labkit.hf.attention import ORIGINALS, PREFIX
from labkit.hf.cache import WrappedCache
from labkit.hf.refusal import OWN_CACHE, WITHOUT, CannotHold
from labkit.hf.trying import failure, tokens_of
from labkit.hf.turning import check_turns

# Keeps nothing, or reads what another layer keeps; older releases have no layer there at all.
DummyLayer = getattr(cache_utils, "DummyLayer", None)


def let_attend(model: PreTrainedModel, cache: WrappedCache) -> None:
    """Have the model's text decoder attend through labkit layers where it is given some; `CannotHold` if it cannot."""
    text = decoder(model)
    before = text._attn_implementation
    original = before.removeprefix(PREFIX)
    for layer, window in zip(cache.wrapped, own_windows(text), strict=False):
        layer.own_window = window
    text._attn_implementation = {"": PREFIX + original}  # a dict: parts of the config keep what they have
    try:
        windows = probe(model, len(cache))
        check_merging(model, cache, windows)
        check_turns(model, text, cache)
        check_name_is_not_asked(model, text, original)
    except ValueError:
        text._attn_implementation = {"": before}
        raise


def decoder(model: PreTrainedModel) -> PretrainedConfig:
    """The config of the model's text decoder; `CannotHold` when its attention cannot be set, or was set to others."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"wrap takes a transformers model; got a {name}")
    if model.config.is_encoder_decoder:
        raise CannotHold(
            f"{name} has an encoder: take EncoderDecoderCache(wrap(one), wrap(another)), without the model"
        )
    if not getattr(model, "_supports_default_dynamic_cache", bool)():  # a model that does not generate has none
        raise CannotHold(f"{name} does not generate with transformers' caches of K and V: {OWN_CACHE}")
    text = model.config.get_text_config(decoder=True)
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.config is text and not part._can_set_attn_implementation():
            raise CannotHold(f"the attention of {type(part).__name__} cannot be set: {WITHOUT}")
    if (said := str(text._attn_implementation)).removeprefix(PREFIX) not in ORIGINALS:
        known = " or ".join(f"model.set_attn_implementation({original!r})" for original in ORIGINALS)
        raise CannotHold(f"{name} attends with {said!r}: call {known} first")
    return text


def own_windows(text: PretrainedConfig) -> list[int | None]:
    """The window of each layer in the cache that transformers makes for a decoder; None for a layer that keeps all.

    `CannotHold` when it keeps anything else than K and V.
    """
    windows: list[int | None] = []
    for index, layer in enumerate(DynamicCache(config=text).layers):
        if type(layer) is DummyLayer:
            continue
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise CannotHold(
                f"layer {index} of {text.model_type} is a {type(layer).__name__} in transformers' own cache, which "
                f"keeps more than K and V of each token: {OWN_CACHE}"
            )
        windows.append(getattr(layer, "sliding_window", None))
    return windows


def check_merging(model: PreTrainedModel, cache: WrappedCache, windows: list[int | None]) -> None:
    """`CannotHold` when a layer that averages tokens is given one that attends to a window, or keeps no more."""
    for index, (layer, window) in enumerate(zip(cache.wrapped, windows, strict=True)):
        window = layer.own_window if window is None else window
        if layer.layer.merges and window is not None:
            raise CannotHold(
                f"layer {index} of {type(model).__name__} attends to a window of {window} tokens, and what left it "
                f"would be averaged with what is seen: take another policy than Merging"
            )


def probe(model: PreTrainedModel, num_layers: int) -> list[int | None]:
    """Run two tokens through the model with a labkit cache of `num_layers`; `CannotHold` unless it serves.

    Returns the window that each layer's attention is told, None for none. Each layer's attention is set beside the
    model's own. A model that cannot be run on two tokens alone, whatever its cache, is judged when it is used.
    """
    scratch = WrappedCache(Cache.growing(num_layers), attends=True)
    for layer in scratch.wrapped:
        layer.checks = True
    tokens = tokens_of(model, [1, 2])
    error = failure(model, tokens, scratch)
    if isinstance(error, CannotHold):
        raise error
    if error is not None:
        if failure(model, tokens, DynamicCache(config=model.config)) is None:
            raise CannotHold(f"{type(model).__name__} fails with a labkit cache ({error}): {OWN_CACHE}") from error
        return [None] * num_layers
    filled = sum(layer.get_seq_length() == tokens.shape[1] for layer in scratch.wrapped)
    if filled != num_layers:
        raise CannotHold(
            f"the cache has {num_layers} layers, of which {type(model).__name__} fills {filled}: make it with as many "
            f"as keep K and V of their own, or {WITHOUT}"
        )
    return [layer.told_window for layer in scratch.wrapped]


def check_name_is_not_asked(model: PreTrainedModel, text: PretrainedConfig, original: str) -> None:
    """`CannotHold` when the model's code compares its attention's name with `original`, which is the name no longer."""
    asked = re.compile(rf"_attn_implementation\b[^\n]*[\"']{original}[\"']")
    parts = {type(part).__module__ for part in model.modules() if getattr(part, "config", None) is text}
    if any(asked.search(inspect.getsource(sys.modules[part])) for part in parts):
        other = next(name for name in ORIGINALS if name != original)
        raise CannotHold(
            f"{type(model).__name__} does something else when its attention is called {original!r}: call "
            f"model.set_attn_implementation({other!r}) first, or {WITHOUT}"
        )
