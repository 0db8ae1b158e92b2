"""Bytes of a KV cache, exactly: per layer kind, and per way of keeping K and V."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol

from labkit.sizing.units import SizeError, bits, ceil, check_count, check_spec, dtype_name, to_bytes

if TYPE_CHECKING:
    from labkit.specs import Layer, ModelSpec


class Layered(Protocol):
    """What has a cache: a model, or the part of one that a rank holds."""

    @property
    def layer_counts(self) -> Mapping[Layer, int]:
        """How many layers there are of each sort."""
        ...


class Format(Protocol):
    """A way to keep K and V."""

    @property
    def bits_per_element(self) -> Fraction:
        """Bits of one kept number in the long run, metadata included."""
        ...

    def layer_bytes(self, layer: Layer, tokens: int, batch: int) -> int:
        """Bytes that one layer takes for `batch` requests of `tokens` tokens each."""
        ...

    def model_bytes(self, tokens: int, batch: int) -> int:
        """Bytes that all layers share, such as a block table."""
        ...


@dataclass(frozen=True)
class Dense:
    """K and V as they are.

    capacity: tokens per request that memory is taken for at once; None for exactly what is held. drops: whether a layer
    with a window gives up tokens that have left it. labkit's dense caches, like many engines, keep them.
    """

    dtype: str = "float16"
    capacity: int | None = None
    drops: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        if self.capacity is not None:
            check_count("capacity", self.capacity)

    @property
    def bits_per_element(self) -> Fraction:
        """Bits of the dtype."""
        return bits(self.dtype)

    def layer_bytes(self, layer: Layer, tokens: int, batch: int) -> int:
        """Numbers times their size, for the tokens that memory is taken for."""
        if self.capacity is not None and tokens > self.capacity:
            raise SizeError(f"{tokens:,} tokens do not fit a capacity of {self.capacity:,}")
        places = self.capacity or tokens
        held = layer.tokens_held(places) if self.drops or layer.window is None else places
        return to_bytes(batch * held * layer.elements_per_token, self.dtype) + batch * layer.state_bytes

    def model_bytes(self, tokens: int, batch: int) -> int:
        """Nothing is shared."""
        return 0


@dataclass(frozen=True)
class Quantized:
    """K and V in `nbits`, packed, in groups of `group_size` numbers that share a scale (and a zero point).

    Values are grouped along the channels of a token, keys along the tokens of a channel (key_axis "channel") or as the
    values are ("token"). Tokens are packed `group_size` at once, and the newest wait in `dtype`: at least
    `residual_length`, at most `group_size` - 1 more. The first `sink_length` tokens stay in `dtype`.
    metadata: dtype of scale and zero point. symmetric: no zero point; float8 is 8 bits, symmetric. drops: as of
    `Dense`. A latent or a state stays in `dtype`.
    """

    nbits: int = 4
    group_size: int = 64
    residual_length: int = 64
    dtype: str = "float16"
    metadata: str = "float16"
    symmetric: bool = False
    key_axis: str = "channel"
    sink_length: int = 0
    drops: bool = True

    def __post_init__(self) -> None:
        if self.nbits not in (2, 4, 8):
            raise SizeError(f"nbits is 2, 4 or 8; got {self.nbits!r}")
        check_count("group_size", self.group_size)
        check_count("residual_length", self.residual_length, least=0)
        check_count("sink_length", self.sink_length, least=0)
        if self.key_axis not in ("channel", "token"):
            raise SizeError(f'key_axis is "channel" or "token"; got {self.key_axis!r}')
        for name in ("dtype", "metadata"):
            object.__setattr__(self, name, dtype_name(getattr(self, name)))
        if self.group_size * self.nbits % 16:
            raise SizeError(
                f"groups of {self.group_size} codes of {self.nbits} bits do not fill whole 16-bit words, as packing "
                f"needs: take a group_size that is a multiple of {16 // self.nbits}"
            )
        if self.bits_per_element >= 16:
            raise SizeError(
                f"{self.nbits} bits in groups of {self.group_size} take {float(self.bits_per_element):g} bits per "
                f"element with their metadata, float16 takes 16: take a larger group_size"
            )

    @property
    def bits_per_element(self) -> Fraction:
        """`nbits` and the share of the group's metadata."""
        return self.nbits + (1 if self.symmetric else 2) * bits(self.metadata) / self.group_size

    def quantized_tokens(self, tokens: int) -> int:
        """Tokens of `tokens` that are held in `nbits`; the others are held in full precision."""
        candidates = tokens - self.sink_length - self.residual_length
        return max(0, candidates) // self.group_size * self.group_size

    def fullest(self, tokens: int) -> int:
        """The length up to `tokens` at which most is held: this one, or just before the newest group was packed."""
        packed = self.quantized_tokens(tokens)
        if not packed:
            return tokens
        before = max(1, self.sink_length + packed + self.residual_length - 1)
        return max(tokens, before, key=self.bits_held)

    def bits_held(self, tokens: int) -> Fraction:
        """Bits per channel and head that `tokens` tokens take."""
        packed = self.quantized_tokens(tokens)
        return packed * self.bits_per_element + (tokens - packed) * bits(self.dtype)

    def check_head_dim(self, k_dim: int, v_dim: int) -> None:
        """SizeError unless keys and values of these sizes can be packed."""
        for dim in (k_dim, v_dim):
            if dim % 8:
                raise SizeError(f"a head_dim of {dim} is no multiple of 8: keep it dense, in float16 or float8")
        for dim in (v_dim, k_dim) if self.key_axis == "token" else (v_dim,):
            if dim % self.group_size:
                raise SizeError(
                    f"groups of {self.group_size} do not divide a head_dim of {dim}: take a group_size that does, "
                    f"as in Quantized({self.nbits}, group_size={math.gcd(dim, self.group_size)}), or a dense float8"
                )

    def layer_bytes(self, layer: Layer, tokens: int, batch: int) -> int:
        """Packed numbers, metadata, and the tokens that wait."""
        if layer.kind not in ("full", "window"):
            return Dense(self.dtype).layer_bytes(layer, tokens, batch)
        self.check_head_dim(layer.k_dim, layer.v_dim)
        held = layer.tokens_held(tokens) if self.drops or layer.window is None else tokens
        packed = self.quantized_tokens(held)
        elements = batch * layer.elements_per_token
        return ceil(elements * packed * self.bits_per_element / 8) + to_bytes(elements * (held - packed), self.dtype)

    def model_bytes(self, tokens: int, batch: int) -> int:
        """Nothing is shared."""
        return 0


@dataclass(frozen=True)
class Paged:
    """K and V in blocks of `block_size` tokens, whole blocks only, and an int32 block table that all layers share."""

    block_size: int = 16
    dtype: str = "float16"

    def __post_init__(self) -> None:
        check_count("block_size", self.block_size)
        object.__setattr__(self, "dtype", dtype_name(self.dtype))

    @property
    def bits_per_element(self) -> Fraction:
        """Bits of the dtype; the table adds 32 per block."""
        return bits(self.dtype)

    def blocks(self, tokens: int) -> int:
        """Blocks that `tokens` tokens of one request take."""
        return -(-tokens // self.block_size)

    def layer_bytes(self, layer: Layer, tokens: int, batch: int) -> int:
        """Whole blocks: the last one has room left."""
        places = self.blocks(layer.tokens_held(tokens)) * self.block_size
        return to_bytes(batch * places * layer.elements_per_token, self.dtype) + batch * layer.state_bytes

    def model_bytes(self, tokens: int, batch: int) -> int:
        """The block table: four bytes per block and request."""
        return 4 * batch * self.blocks(tokens)


def kv_format(dtype: str | Format) -> Format:
    """The format a name stands for: int8, int4 and int2 quantized in groups of 64, any other dtype dense."""
    if not isinstance(dtype, str) and hasattr(dtype, "layer_bytes"):
        return dtype
    name = dtype_name(dtype)
    return Quantized(int(name[3:])) if name.startswith("int") else Dense(name)


def bytes_per_token(model: Layered, dtype: str | Format = "float16", *, position: int = 0) -> int | Fraction:
    """Bytes that the token at `position` adds to the cache of one request, all layers together.

    2 x layers x KV heads x head_dim x bytes per number where all layers keep everything. A layer whose window is full
    adds nothing: ask at a later position. Whole for dense formats.
    """
    check_spec("model", model)
    check_count("position", position, least=0)
    elements = sum(
        count * layer.elements_per_token
        for layer, count in model.layer_counts.items()
        if layer.tokens_held(position + 1) > layer.tokens_held(position)
    )
    nbytes = elements * kv_format(dtype).bits_per_element / 8
    return int(nbytes) if nbytes.denominator == 1 else nbytes


def cache_bytes(model: Layered, tokens: int, batch: int = 1, dtype: str | Format = "float16") -> int:
    """Bytes of the cache of `batch` requests that have seen `tokens` tokens each: what the cache's `nbytes` will say.

    dtype: how K and V are kept, by name or as `Dense`, `Quantized` or `Paged`. Raises SizeError.
    """
    check_spec("model", model)
    check_count("tokens", tokens, least=0)
    check_count("batch", batch)
    kept = kv_format(dtype)
    layers = sum(count * kept.layer_bytes(layer, tokens, batch) for layer, count in model.layer_counts.items())
    return layers + kept.model_bytes(tokens, batch)


def mha_bytes_per_token(model: ModelSpec, dtype: str | Format = "float16") -> int | Fraction:
    """Bytes per token if every query head of every attention layer had a K and a V of its own."""
    check_spec("model", model)
    width = model.head_dim + (model.v_head_dim or model.head_dim)
    attending = sum(count for layer, count in model.layer_counts.items() if layer.kind != "state")
    nbytes = attending * model.num_heads * width * kv_format(dtype).bits_per_element / 8
    return int(nbytes) if nbytes.denominator == 1 else nbytes
