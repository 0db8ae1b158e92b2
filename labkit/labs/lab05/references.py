"""What fills the blanks of lab 05: ordinary code with the signatures of the stubs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def quantize(x: Tensor, nbits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero point of groups of numbers; a group is the last dimension of x, float [..., group].

    Codes are whole numbers from 0 to 2**nbits - 1, uint8 [..., group]; scale and zero are [..., 1], of x's dtype. The
    least number of a group gets code 0, the greatest the last code, and codes * scale + zero is within half a scale of
    x, all but for the rounding of x's dtype. A group of equal numbers comes back exactly, with no NaN.
    """
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (high - low) / (2**nbits - 1)
    steps = (x - low) / torch.where(scale == 0, 1.0, scale)
    return steps.round().clamp(0, 2**nbits - 1).to(torch.uint8), scale, low


def pack(codes: Tensor, nbits: int) -> Tensor:
    """Codes of nbits bits, uint8 [..., n], as bytes, uint8 [..., n * nbits / 8]; nbits is 8, 4 or 2.

    Neighbours share a byte, the first of them in its lowest bits: with 4 bits, byte 0 holds code 0 and 16 times code 1.
    """
    per_byte = 8 // nbits
    bytes_ = torch.zeros_like(codes[..., ::per_byte])
    for place in range(per_byte):
        bytes_ |= codes[..., place::per_byte] << (place * nbits)
    return bytes_


def quantize_cache(k: Tensor, v: Tensor, nbits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """K and V as they come back from quantization: keys per channel, values per token. Shapes stay as they are.

    k, v: [batch, num_kv_heads, tokens, head_dim]. A group of keys is group_size successive tokens of one channel; a
    group of values is group_size successive channels of one token. group_size divides tokens and head_dim.
    """
    keys = k.mT.unflatten(-1, (-1, group_size))
    codes, scale, zero = quantize(keys, nbits)
    keys = (codes * scale + zero).flatten(-2).mT
    values = v.unflatten(-1, (-1, group_size))
    codes, scale, zero = quantize(values, nbits)
    return keys, (codes * scale + zero).flatten(-2)


def bits_per_element(tokens: int, nbits: int, group_size: int, residual_length: int, full_bits: int = 16) -> float:
    """Bits that one number of a cache of so many tokens takes on average, everything counted.

    Each group has a scale and a zero point of 16 bits each. Tokens are packed group_size at a time; at least the newest
    residual_length stay in full_bits, and so do those behind them whose group is not complete.
    """
    packed = max(0, tokens - residual_length) // group_size * group_size
    per_packed = nbits + 2 * 16 / group_size
    return (packed * per_packed + (tokens - packed) * full_bits) / tokens


class QuantizedLayer:
    """K and V of one layer: whole groups of tokens quantized, the newest tokens as they came.

    quantize_group(k, v) is given K and V of group_size tokens, which this layer does not change afterwards, and returns
    both in a form of its own; restore(packed) gives such a pair of K and V back; only restore knows the form. Tokens
    wait in full precision, as copies, until group_size of them can be quantized while at least residual_length newer
    ones stay. Each token is given to quantize_group once, whatever the pieces it came in.
    """

    def __init__(self, group_size: int, residual_length: int, quantize_group: Callable, restore: Callable) -> None:
        self.group_size, self.residual_length = group_size, residual_length
        self.quantize_group, self.restore = quantize_group, restore
        self.groups: list = []
        self.waiting: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add new tokens' K and V, both [batch, num_kv_heads, new_tokens, head_dim]."""
        if self.waiting is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.waiting, (k, v), strict=True))
        size = self.group_size
        while k.shape[2] >= size + self.residual_length:
            self.groups.append(self.quantize_group(k[:, :, :size], v[:, :, :size]))
            k, v = k[:, :, size:], v[:, :, size:]
        self.waiting = k.clone(), v.clone()

    def read(self) -> tuple[Tensor, Tensor]:
        """K and V of every token held, [batch, num_kv_heads, tokens, head_dim], in order."""
        parts = [self.restore(group) for group in self.groups] + [self.waiting]
        k, v = (torch.cat(side, dim=2) for side in zip(*parts, strict=True))
        return k, v


def packed_scores(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """q @ k.mT for keys k = codes * scale + zero that are never computed: [..., queries, tokens].

    q: [..., queries, head_dim]. codes: uint8 [..., tokens, head_dim], one group of tokens. scale, zero:
    [..., 1, head_dim], one for each channel, since keys are quantized per channel.
    """
    return (q * scale) @ codes.to(q.dtype).mT + (q * zero).sum(-1, keepdim=True)


def groups_to_quantize(waiting: Tensor, new: Tensor, group_size: int) -> tuple[list[Tensor], Tensor]:
    """Which tokens are quantized now, in groups of group_size, oldest first, and which go on waiting.

    waiting, new: keys [batch, num_kv_heads, tokens, head_dim], either may hold no tokens. Keys are quantized per
    channel: every group holds exactly group_size tokens, however few come at a time.
    """
    tokens = torch.cat((waiting, new), dim=2)
    whole = tokens.shape[2] // group_size * group_size
    groups = [tokens[:, :, start : start + group_size] for start in range(0, whole, group_size)]
    return groups, tokens[:, :, whole:]


def mean_surprise(model: Callable, tokens: Tensor, cache: Any) -> float:
    """Mean of -log p(token), in nats, over the tokens from position 64 on: what a user of this cache gets.

    model(part, cache) gives logits [1, part, vocabulary] and appends the part to the cache. tokens: int [1, n], more
    than 65. They go through the model 32 at a time, so that a part meets what the cache holds of the parts before it.
    """
    surprises = []
    for start in range(0, tokens.shape[1], 32):
        logits = model(tokens[:, start : start + 32], cache)[0]
        targets = tokens[0, start + 1 : start + 33]
        surprises.append(F.cross_entropy(logits[: len(targets)], targets, reduction="none"))
    return torch.cat(surprises)[63:].mean().item()
