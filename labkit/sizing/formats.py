"""Ways to keep K and V: each says the bytes of one request at a length, and the length at which most is taken."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol

from labkit.sizing.units import SizeError, bits, ceil, check_count, check_flag, dtype_name, shown, to_bytes

if TYPE_CHECKING:
    from labkit.specs import Layer


class Layered(Protocol):
    """What has a cache: a model, or the part of one that a rank holds."""

    @property
    def layer_counts(self) -> Mapping[Layer, int]:
        """How many layers there are of each sort."""
        ...


class Format(Protocol):
    """A way to keep K and V. Sizes are of one request: so many requests take so many times as much."""

    @property
    def name(self) -> str:
        """What it is called in print, as "float16" or "int4, groups of 32"."""
        ...

    @property
    def bits_per_element(self) -> Fraction:
        """Bits of one kept number of K or V in the long run, metadata included."""
        ...

    @property
    def limit(self) -> int | None:
        """The most tokens of a request that can be kept at all; None: as many as memory holds."""
        ...

    def token_bytes(self, layer: Layer, position: int) -> Fraction:
        """Bytes that the token at `position` adds to one layer, in the long run."""
        ...

    def layer_bytes(self, layer: Layer, tokens: int) -> int:
        """Bytes that one layer takes for a request of `tokens` tokens."""
        ...

    def model_bytes(self, tokens: int) -> int:
        """Bytes that all layers share, such as a row of a block table."""
        ...

    def read_bytes(self, layer: Layer, tokens: int) -> int:
        """Bytes of one layer that a decode step here must read: no room left over, nothing beyond a window."""
        ...

    def fullest(self, model: Layered, tokens: int) -> int:
        """The length, of all up to `tokens`, at which a request takes most."""
        ...


def held(layer: Layer, tokens: int, drops: bool) -> int:
    """Tokens that a layer holds after `tokens`, if those that have left its window are given up or not."""
    return layer.tokens_held(tokens) if drops or layer.window is None else tokens


def token_bytes(layer: Layer, position: int, drops: bool, width: Fraction) -> Fraction:
    """Bytes that the token at `position` adds to a layer whose numbers take `width` bits: none if one leaves for it."""
    grows = held(layer, position + 1, drops) > held(layer, position, drops)
    return layer.elements_per_token * width / 8 if grows else Fraction(0)


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
        check_flag("drops", self.drops)

    @property
    def name(self) -> str:
        """The dtype, and the room that is taken at once."""
        return self.dtype if self.capacity is None else f"{self.dtype}, room for {self.capacity:,} tokens"

    @property
    def bits_per_element(self) -> Fraction:
        """Bits of the dtype."""
        return bits(self.dtype)

    @property
    def limit(self) -> int | None:
        """The capacity."""
        return self.capacity

    def token_bytes(self, layer: Layer, position: int) -> Fraction:
        """Numbers times their size; a place in memory that was taken at once counts when its token comes."""
        return token_bytes(layer, position, self.drops, bits(self.dtype))

    def layer_bytes(self, layer: Layer, tokens: int) -> int:
        """Numbers times their size, for the tokens that memory is taken for: none before the first."""
        if self.capacity is not None and tokens > self.capacity:
            raise SizeError(f"{tokens:,} tokens do not fit a capacity of {self.capacity:,}")
        places = held(layer, (self.capacity or tokens) if tokens else 0, self.drops)
        return to_bytes(places * layer.elements_per_token, self.dtype) + layer.state_bytes

    def model_bytes(self, tokens: int) -> int:
        """Nothing is shared."""
        return 0

    def read_bytes(self, layer: Layer, tokens: int) -> int:
        """What the newest token sees."""
        return Dense(self.dtype).layer_bytes(layer, tokens)

    def fullest(self, model: Layered, tokens: int) -> int:
        """The longest: no token makes it smaller."""
        return tokens


@dataclass(frozen=True)
class Quantized:
    """K and V in `nbits`, packed, in groups of `group_size` numbers that share a scale (and a zero point).

    Values are grouped along the channels of a token, keys along the tokens of a channel (key_axis "channel") or as the
    values are ("token"). Tokens are packed `group_size` at once, and the newest wait in `dtype`: at least
    `residual_length`, at most `group_size` - 1 more. The first `sink_length` tokens stay in `dtype`.
    metadata: dtype of scale and zero point. symmetric: no zero point; float8 is 8 bits, symmetric. drops: as of
    `Dense`. A layer with a latent stays in `dtype`, so does the whole of a layer with an `index_dim`; a state is as its
    layer says.
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
        if not isinstance(self.nbits, int) or self.nbits not in (2, 4, 8):
            raise SizeError(f"nbits is 2, 4 or 8; got {shown(self.nbits)}")
        check_count("group_size", self.group_size)
        check_count("residual_length", self.residual_length, least=0)
        check_count("sink_length", self.sink_length, least=0)
        if self.key_axis not in ("channel", "token"):
            raise SizeError(f'key_axis is "channel" or "token"; got {shown(self.key_axis)}')
        for name in ("dtype", "metadata"):
            object.__setattr__(self, name, dtype_name(getattr(self, name)))
        for name in ("symmetric", "drops"):
            check_flag(name, getattr(self, name))
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
    def name(self) -> str:
        """Bits, and what differs from the defaults."""
        said = [f"int{self.nbits}"]
        if self.group_size != Quantized.group_size:
            said.append(f"groups of {self.group_size:,}")
        if self.residual_length != Quantized.residual_length:
            said.append(f"newest {self.residual_length:,} in {self.dtype}")
        if self.sink_length:
            said.append(f"first {self.sink_length:,} in {self.dtype}")
        return ", ".join(said)

    @property
    def bits_per_element(self) -> Fraction:
        """`nbits` and the share of the group's metadata."""
        return self.nbits + (1 if self.symmetric else 2) * bits(self.metadata) / self.group_size

    @property
    def limit(self) -> int | None:
        """None."""
        return None

    def quantized_tokens(self, tokens: int) -> int:
        """Tokens of `tokens` that are held in `nbits`; the others are held in full precision."""
        candidates = tokens - self.sink_length - self.residual_length
        return max(0, candidates) // self.group_size * self.group_size

    def bits_held(self, tokens: int) -> Fraction:
        """Bits per channel and head that `tokens` tokens take."""
        packed = self.quantized_tokens(tokens)
        return packed * self.bits_per_element + (tokens - packed) * bits(self.dtype)

    def packs(self, layer: Layer) -> bool:
        """Whether all that the layer keeps of a token is K and V: no latent, and no numbers to choose tokens by."""
        return layer.kind in ("full", "window", "hybrid") and not layer.index_dim

    def check_head_dim(self, k_dim: int, v_dim: int) -> None:
        """SizeError unless keys and values of these sizes can be packed."""
        for dim in (k_dim, v_dim):
            if dim % 8:
                raise SizeError(f"a head_dim of {dim} is no multiple of 8: keep it dense, in float16 or float8")
        for dim in (v_dim, k_dim) if self.key_axis == "token" else (v_dim,):
            if dim % self.group_size:
                raise SizeError(
                    f"groups of {self.group_size} do not divide a head_dim of {dim}: take a group_size that does, "
                    f"as in group_size={math.gcd(dim, self.group_size)}, or a dense float8"
                )

    def token_bytes(self, layer: Layer, position: int) -> Fraction:
        """What a token takes once it is packed; all of a layer that is not packed in full precision."""
        width = self.bits_per_element if self.packs(layer) else bits(self.dtype)
        return token_bytes(layer, position, self.drops, width)

    def layer_bytes(self, layer: Layer, tokens: int) -> int:
        """Packed numbers, metadata, and the tokens that wait."""
        if not self.packs(layer):
            return Dense(self.dtype).layer_bytes(layer, tokens)
        self.check_head_dim(layer.k_dim, layer.v_dim)
        packed = ceil(layer.elements_per_token * self.bits_held(held(layer, tokens, self.drops)) / 8)
        return packed + layer.state_bytes

    def model_bytes(self, tokens: int) -> int:
        """Nothing is shared."""
        return 0

    def read_bytes(self, layer: Layer, tokens: int) -> int:
        """What is held of the tokens that the newest one sees."""
        return self.layer_bytes(layer, layer.tokens_held(tokens) if self.packs(layer) else tokens)

    def fullest(self, model: Layered, tokens: int) -> int:
        """`tokens`, where a window has just filled, or the last length before a group was packed on the way there.

        Between two of these each token adds, and what a group gives up is less than what its tokens had added.
        """
        windows = {layer.window for layer in model.layer_counts if self.drops and self.packs(layer)}
        ends = {tokens, *(window for window in windows if window is not None and window < tokens)}
        lengths = ends | {self.before_packing(end) for end in ends}
        return max(sorted(lengths), key=lambda length: request_bytes(model, length, self))

    def before_packing(self, tokens: int) -> int:
        """The length just before the newest packed group of `tokens` tokens was packed; `tokens` if there is none."""
        packed = self.quantized_tokens(tokens)
        return max(1, self.sink_length + packed + self.residual_length - 1) if packed else tokens


@dataclass(frozen=True)
class Paged:
    """K and V in blocks of `block_size` tokens, whole blocks only, and an int32 block table that all layers share.

    drops: whether a layer with a window gives up blocks of which every token has left it; what is left of the oldest
    block stays. The table keeps its places.
    """

    block_size: int = 16
    dtype: str = "float16"
    drops: bool = True

    def __post_init__(self) -> None:
        check_count("block_size", self.block_size)
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        check_flag("drops", self.drops)

    @property
    def name(self) -> str:
        """The dtype and the size of a block."""
        return f"{self.dtype} in blocks of {self.block_size:,}"

    @property
    def bits_per_element(self) -> Fraction:
        """Bits of the dtype; the table adds 32 per block."""
        return bits(self.dtype)

    @property
    def limit(self) -> int | None:
        """None."""
        return None

    def blocks(self, tokens: int) -> int:
        """Blocks that `tokens` tokens of one request take."""
        return -(-tokens // self.block_size)

    def token_bytes(self, layer: Layer, position: int) -> Fraction:
        """A token's own numbers: its share of a block."""
        return token_bytes(layer, position, self.drops, bits(self.dtype))

    def layer_bytes(self, layer: Layer, tokens: int) -> int:
        """Whole blocks: the last one has room left, and the first of a window tokens that nobody sees."""
        left = tokens - held(layer, tokens, self.drops)
        places = (self.blocks(tokens) - left // self.block_size) * self.block_size
        return to_bytes(places * layer.elements_per_token, self.dtype) + layer.state_bytes

    def model_bytes(self, tokens: int) -> int:
        """A row of the block table: four bytes per block."""
        return 4 * self.blocks(tokens)

    def read_bytes(self, layer: Layer, tokens: int) -> int:
        """What the newest token sees: a block is read as far as it is filled."""
        return Dense(self.dtype).layer_bytes(layer, tokens)

    def fullest(self, model: Layered, tokens: int) -> int:
        """Where the newest block begins: a later token adds none, and may let a window give one up."""
        return (self.blocks(tokens) - 1) * self.block_size + 1 if tokens else 0


@dataclass(frozen=True)
class PagedQuantized:
    """K and V in `nbits`, in blocks of `block_size` tokens: a block is a group, and is packed once it is full.

    The newest block of a request waits in `dtype` until it is full, beside the packed block that it will become, whose
    memory is taken with it. A block table as in `Paged`. metadata, symmetric, key_axis: as of `Quantized`; drops: as of
    `Paged`. A layer with a latent or an `index_dim` stays in `dtype`, in blocks.
    """

    nbits: int = 4
    block_size: int = 64
    dtype: str = "float16"
    metadata: str = "float16"
    symmetric: bool = False
    key_axis: str = "channel"
    drops: bool = True

    def __post_init__(self) -> None:
        check_count("block_size", self.block_size)
        for name in ("dtype", "metadata"):
            object.__setattr__(self, name, dtype_name(getattr(self, name)))
        for name in ("symmetric", "drops"):
            check_flag(name, getattr(self, name))
        self.packing  # noqa: B018 - raises for what cannot be packed

    @property
    def packing(self) -> Quantized:
        """How a full block is packed."""
        return Quantized(
            self.nbits, self.block_size, 0, self.dtype, self.metadata, self.symmetric, self.key_axis, drops=self.drops
        )

    @property
    def paging(self) -> Paged:
        """How what is not packed lies in blocks."""
        return Paged(self.block_size, self.dtype, self.drops)

    @property
    def name(self) -> str:
        """The bits and the size of a block."""
        return f"int{self.nbits} in blocks of {self.block_size:,}"

    @property
    def bits_per_element(self) -> Fraction:
        """`nbits` and the share of the block's metadata; the table adds 32 per block."""
        return self.packing.bits_per_element

    @property
    def limit(self) -> int | None:
        """None."""
        return None

    def token_bytes(self, layer: Layer, position: int) -> Fraction:
        """What a token takes once its block is packed."""
        return self.packing.token_bytes(layer, position)

    def layer_bytes(self, layer: Layer, tokens: int) -> int:
        """Whole packed blocks, and one in full precision while the newest is not full."""
        paging, packing = self.paging, self.packing
        if not packing.packs(layer):
            return paging.layer_bytes(layer, tokens)
        packing.check_head_dim(layer.k_dim, layer.v_dim)
        left = tokens - held(layer, tokens, self.drops)
        a_block = self.block_size * layer.elements_per_token
        packed = (paging.blocks(tokens) - left // self.block_size) * ceil(a_block * self.bits_per_element / 8)
        waits = to_bytes(a_block, self.dtype) if tokens % self.block_size else 0
        return packed + waits + layer.state_bytes

    def model_bytes(self, tokens: int) -> int:
        """A row of the block table."""
        return self.paging.model_bytes(tokens)

    def read_bytes(self, layer: Layer, tokens: int) -> int:
        """What is held of the tokens that the newest one sees: packed, or as they wait."""
        if not self.packing.packs(layer):
            return self.paging.read_bytes(layer, tokens)
        seen = layer.tokens_held(tokens)
        waiting = min(seen, tokens % self.block_size)
        width = waiting * bits(self.dtype) + (seen - waiting) * self.bits_per_element
        return ceil(layer.elements_per_token * width / 8) + layer.state_bytes

    def fullest(self, model: Layered, tokens: int) -> int:
        """Where the newest block begins: it waits, and a later token adds none."""
        return self.paging.fullest(model, tokens)


@dataclass(frozen=True)
class Evicting:
    """K and V as they are, of at most `budget` tokens: beyond it others are evicted.

    Of each token held, each KV head keeps 4 bytes for its position besides; 4 more with `tally`, where a policy goes on
    counting for each token. victims: tokens that a full cache has chosen to lose next, 8 bytes each. state_bytes: what
    a policy notes of a request, in every layer.
    prompt_tokens: where eviction happens once, at the end of a prompt of so many, and what follows is kept; None where
    the budget always holds. What a pass holds of its own tokens until it ends is not counted.
    packing: how what is kept is packed, whose dtype goes then for this one's. Where the budget always holds, whole
    groups are evicted, so that down to `budget` - `group_size` + 1 tokens are held; none is chosen ahead.
    A layer with a latent or an `index_dim` keeps all, in `dtype`.
    """

    budget: int
    dtype: str = "float16"
    prompt_tokens: int | None = None
    tally: bool = False
    victims: int = 1
    state_bytes: int = 0
    packing: Quantized | None = None

    def __post_init__(self) -> None:
        check_count("budget", self.budget)
        if self.packing is not None and not isinstance(self.packing, Quantized):
            raise SizeError(f"packing is a Quantized, as in Quantized(4), or None; got {shown(self.packing)}")
        dtype = dtype_name(self.dtype)
        object.__setattr__(self, "dtype", dtype if self.packing is None else self.packing.dtype)
        if self.prompt_tokens is not None:
            check_count("prompt_tokens", self.prompt_tokens)
        self.check_packing()
        check_flag("tally", self.tally)
        check_count("victims", self.victims, least=0)
        check_count("state_bytes", self.state_bytes, least=0)

    def check_packing(self) -> None:
        """SizeError for what no cache can do with groups."""
        if self.packing is None:
            return
        if self.packing.sink_length:
            raise SizeError("a budget's sinks are packed with the others: leave sink_length out")
        least = self.packing.residual_length + 3 * self.packing.group_size
        if self.prompt_tokens is None and self.budget < least:
            raise SizeError(
                f"a budget of {self.budget:,} tokens leaves no group of {self.packing.group_size} to evict: take "
                f"at least {least:,}, or a smaller group_size"
            )

    @property
    def name(self) -> str:
        """The dtype, and how many tokens are kept."""
        dtype = self.dtype if self.packing is None else self.packing.name
        kept = f"{dtype}, {self.budget:,} tokens kept"
        return kept if self.prompt_tokens is None else f"{kept} of a prompt of {self.prompt_tokens:,}"

    @property
    def bits_per_element(self) -> Fraction:
        """Bits of the dtype, or as packed; positions add 32 per token and KV head, a tally as many."""
        return bits(self.dtype) if self.packing is None else self.packing.bits_per_element

    @property
    def limit(self) -> int | None:
        """None."""
        return None

    def keeps(self, tokens: int) -> int:
        """Tokens held after `tokens`."""
        if self.packing is not None and self.prompt_tokens is None and tokens > self.budget:
            return self.budget - (self.budget - tokens) % self.packing.group_size
        if self.prompt_tokens is None or tokens <= self.prompt_tokens:
            return min(tokens, self.budget)
        return min(self.prompt_tokens, self.budget) + tokens - self.prompt_tokens

    def evicts(self, layer: Layer) -> bool:
        """Whether all that the layer keeps of a token is K and V."""
        return layer.kind in ("full", "window", "hybrid") and not layer.index_dim

    def token_bytes(self, layer: Layer, position: int) -> Fraction:
        """K, V, position and tally of a token for which none leaves; else nothing."""
        if not self.evicts(layer):
            return Dense(self.dtype).token_bytes(layer, position)
        each = layer.elements_per_token * self.bits_per_element / 8 + self.beside(layer)
        return each * max(0, self.keeps(position + 1) - self.keeps(position))

    def beside(self, layer: Layer) -> int:
        """Bytes of a token held besides K and V, all KV heads together."""
        return layer.num_kv_heads * (8 if self.tally else 4)

    def layer_bytes(self, layer: Layer, tokens: int) -> int:
        """What is held, its positions and tally, the victims of a full cache, and what a policy noted."""
        if not self.evicts(layer):
            return Dense(self.dtype).layer_bytes(layer, tokens)
        if not tokens:
            return layer.state_bytes
        held = self.keeps(tokens)
        full = self.prompt_tokens is None and self.packing is None and held == self.budget
        victims = 8 * layer.num_kv_heads * self.victims if full else 0
        beside = held * self.beside(layer) + victims
        return self.numbers(layer, held) + beside + self.state_bytes + layer.state_bytes

    def numbers(self, layer: Layer, held: int) -> int:
        """Bytes of K and V of so many tokens held."""
        if self.packing is None:
            return to_bytes(held * layer.elements_per_token, self.dtype)
        self.packing.check_head_dim(layer.k_dim, layer.v_dim)
        return ceil(layer.elements_per_token * self.packing.bits_held(held) / 8)

    def model_bytes(self, tokens: int) -> int:
        """Nothing is shared."""
        return 0

    def read_bytes(self, layer: Layer, tokens: int) -> int:
        """K and V of what is held; where a layer has a window and nothing is packed, of no more than that."""
        if not self.evicts(layer):
            return Dense(self.dtype).read_bytes(layer, tokens)
        if self.packing is not None:
            return self.numbers(layer, self.keeps(tokens)) + layer.state_bytes
        return Dense(self.dtype).layer_bytes(layer, min(self.keeps(tokens), layer.tokens_held(tokens)))

    def fullest(self, model: Layered, tokens: int) -> int:
        """The longest: no token makes it smaller. With groups, a length just before one was packed, or evicted."""
        if self.packing is None:
            return tokens
        ends = {tokens, min(tokens, self.budget)}
        lengths = {at for end in ends for at in range(max(0, end - 2 * self.packing.group_size), end + 1)}
        return max(sorted(lengths), key=lambda length: request_bytes(model, length, self))


@dataclass(frozen=True)
class Selecting:
    """K and V as they are, all of them, and of each page of `page_size` tokens two bounds for each channel of its keys.

    budget: tokens of a request that a decode step reads at most, in pages; what a window hides is not counted off.
    A layer with a latent or an `index_dim` is read whole, and keeps no such numbers.
    """

    budget: int
    page_size: int = 16
    dtype: str = "float16"

    def __post_init__(self) -> None:
        check_count("page_size", self.page_size)
        check_count("budget", self.budget, least=2 * self.page_size)
        object.__setattr__(self, "dtype", dtype_name(self.dtype))

    @property
    def name(self) -> str:
        """The dtype, and how many tokens are read."""
        return f"{self.dtype}, {self.budget:,} tokens read"

    @property
    def bits_per_element(self) -> Fraction:
        """Bits of the dtype; the bounds of a page take as much as two keys besides."""
        return bits(self.dtype)

    @property
    def limit(self) -> int | None:
        """None."""
        return None

    def selects(self, layer: Layer) -> bool:
        """Whether all that the layer keeps of a token is K and V."""
        return layer.kind in ("full", "window", "hybrid") and not layer.index_dim

    def bounds(self, layer: Layer, tokens: int) -> int:
        """Bytes of the bounds of all pages."""
        if not self.selects(layer):
            return 0
        return to_bytes(2 * -(-tokens // self.page_size) * layer.num_kv_heads * layer.k_dim, self.dtype)

    def token_bytes(self, layer: Layer, position: int) -> Fraction:
        """A token's own numbers, and its share of its page's bounds."""
        own = token_bytes(layer, position, False, bits(self.dtype))
        return own + Fraction(self.bounds(layer, self.page_size), self.page_size)

    def layer_bytes(self, layer: Layer, tokens: int) -> int:
        """All tokens, and the bounds."""
        return Dense(self.dtype, drops=False).layer_bytes(layer, tokens) + self.bounds(layer, tokens)

    def model_bytes(self, tokens: int) -> int:
        """Nothing is shared."""
        return 0

    def read_bytes(self, layer: Layer, tokens: int) -> int:
        """All, up to the budget; beyond it the bounds, and whole pages but for the newest."""
        if tokens <= self.budget or not self.selects(layer):
            return Dense(self.dtype).read_bytes(layer, tokens)
        newest = (tokens - 1) % self.page_size + 1
        read = (self.budget // self.page_size - 1) * self.page_size + newest
        return Dense(self.dtype, drops=False).layer_bytes(layer, read) + self.bounds(layer, tokens)

    def fullest(self, model: Layered, tokens: int) -> int:
        """The longest: no token makes it smaller."""
        return tokens


def kv_format(dtype: str | Format) -> Format:
    """The format a name stands for: int8, int4 and int2 quantized in groups of 64, any other dtype dense."""
    if isinstance(dtype, type):
        raise SizeError(f"a way to keep K and V is given with its sizes: {dtype.__name__}(), not {dtype.__name__}")
    if not isinstance(dtype, str) and hasattr(dtype, "layer_bytes"):
        return dtype
    name = dtype_name(dtype)
    return Quantized(int(name[3:])) if name.startswith("int") else Dense(name)


def request_bytes(model: Layered, tokens: int, kept: Format) -> int:
    """Bytes of the cache of one request, nothing checked."""
    layers = sum(count * kept.layer_bytes(layer, tokens) for layer, count in model.layer_counts.items())
    return layers + kept.model_bytes(tokens)
