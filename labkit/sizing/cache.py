"""Bytes of a KV cache, exactly: per layer kind and way of keeping K and V, and the most on the way to a length."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from labkit.sizing.formats import Format, Layered, kv_format, request_bytes
from labkit.sizing.units import check_count, check_spec

if TYPE_CHECKING:
    from labkit.specs import Layer, ModelSpec


def cache_bytes(model: Layered, tokens: int, batch: int = 1, dtype: str | Format = "float16") -> int:
    """Bytes of the cache of `batch` requests that have seen `tokens` tokens each: what the cache's `nbytes` will say.

    dtype: how K and V are kept, by name or as `Dense`, `Quantized`, `Paged`, `PagedQuantized`, `Evicting`. Raises
    SizeError.
    """
    check_spec("model", model)
    check_count("tokens", tokens, least=0)
    return check_count("batch", batch) * request_bytes(model, tokens, kv_format(dtype))


def peak_bytes(model: Layered, tokens: int, batch: int = 1, dtype: str | Format = "float16") -> int:
    """The most that the cache of `batch` requests takes at any length up to `tokens`: what must fit.

    A cache in few bits is fullest just before a group is packed. Arguments as of `cache_bytes`. Raises SizeError.
    """
    check_spec("model", model)
    check_count("tokens", tokens, least=0)
    kept = kv_format(dtype)
    return check_count("batch", batch) * request_bytes(model, kept.fullest(model, tokens), kept)


def step_bytes(model: Layered, tokens: int, batch: int = 1, dtype: str | Format = "float16") -> int:
    """Bytes of the cache that a decode step of `batch` requests of `tokens` tokens must read; as `cache_bytes`."""
    check_spec("model", model)
    check_count("tokens", tokens, least=0)
    kept = kv_format(dtype)
    layers = sum(count * kept.read_bytes(layer, tokens) for layer, count in model.layer_counts.items())
    return check_count("batch", batch) * (layers + kept.model_bytes(tokens))


def bytes_per_token(model: Layered, dtype: str | Format = "float16", *, position: int = 0) -> int | Fraction:
    """Bytes that the token at `position` adds to the cache of one request, all layers together.

    2 x layers x KV heads x head_dim x bytes per number where all layers keep everything. A layer whose window is full
    adds nothing: ask at a later position. Whole for dense formats.
    """
    check_spec("model", model)
    check_count("position", position, least=0)
    kept = kv_format(dtype)
    return plain(sum((n * kept.token_bytes(layer, position) for layer, n in model.layer_counts.items()), Fraction(0)))


def mha_bytes_per_token(model: ModelSpec, dtype: str | Format = "float16") -> int | Fraction:
    """Bytes per token if every query head of every attention layer had a K and a V of its own."""
    check_spec("model", model)
    width = sum(count * head_width(model, layer) for layer, count in model.layer_counts.items() if layer.attends)
    return plain(model.num_heads * width * kv_format(dtype).bits_per_element / 8)


def head_width(model: ModelSpec, layer: Layer) -> int:
    """Numbers of one head's key and value: the model's where the layer keeps a latent, or reads an earlier layer's."""
    if layer.kind in ("latent", "shared"):
        return model.head_dim + (model.v_head_dim or model.head_dim)
    return layer.k_dim + layer.v_dim


def plain(number: Fraction) -> int | Fraction:
    """A whole number as an int."""
    return int(number) if number.denominator == 1 else number
