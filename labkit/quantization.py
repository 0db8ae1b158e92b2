"""Numbers in few bits: groups that share a scale and a zero point, and codes packed into bytes.

The numbers of a group become whole codes and come back as `code * scale + zero`. Where a group lies decides what is
lost: along the tokens of one channel (axis "channel"), so that a channel of large numbers spoils no other, or along the
channels of one token (axis "token"), so that a large token spoils no other (KIVI, arXiv:2402.02750).

Tensors are `[batch, heads, tokens, head_dim]`. A tile is `group_size` successive tokens of one head of one row of the
batch; no group and no byte reaches beyond its tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

FLOAT8 = tuple(getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2") if hasattr(torch, name))


@dataclass(frozen=True)
class Quantizer:
    """How numbers become codes.

    nbits: 8, 4 or 2, or one of torch's float8 dtypes, whose codes are themselves small floats.
    group_size: numbers that share a scale, and tokens to a tile. axis: "channel", successive tokens of one channel, or
    "token", successive channels of one token. symmetric: no zero point, codes lie around 0 (float8 codes always do).
    metadata: the dtype of scales and zero points, bfloat16 or float16.
    """

    nbits: int | torch.dtype = 4
    group_size: int = 64
    axis: str = "channel"
    symmetric: bool = False
    metadata: torch.dtype = torch.bfloat16

    @property
    def middle(self) -> int:
        """The code that stands for 0 where codes are whole and symmetric; 0 otherwise."""
        return 2 ** (self.nbits - 1) if isinstance(self.nbits, int) and self.symmetric else 0

    def quantize(self, x: Tensor) -> Packed:
        """`x`, `[batch, heads, tokens, head_dim]`, as codes, scales and zero points.

        A number comes back within half a scale of itself: scales and zero points are rounded outwards. A group of equal
        numbers comes back as it was, to the precision of its scale. A group that holds NaN or infinity, or whose range
        `metadata` cannot hold, comes back as NaN throughout: an error that shows.
        Raises ValueError unless `group_size` divides the tokens and, for axis "token", head_dim.
        """
        tiles = self.tiles(x)
        groups = self.groups(tiles).to(torch.promote_types(x.dtype, torch.float32))
        along, zero = (3 if self.axis == "channel" else 5), None
        if isinstance(self.nbits, torch.dtype) or self.symmetric:
            most = torch.finfo(self.nbits).max if isinstance(self.nbits, torch.dtype) else self.middle - 1
            least = -most
            scale = round_up(groups.abs().amax(along, keepdim=True) / most, self.metadata)
        else:
            least, most = 0, 2**self.nbits - 1
            low, high = torch.aminmax(groups, dim=along, keepdim=True)
            zero = round_down(low, self.metadata)
            scale = round_up((high - zero.to(high.dtype)) / most, self.metadata)
            groups = groups - zero.to(groups.dtype)
        lost = ~torch.isfinite(scale) if zero is None else ~(torch.isfinite(scale) & torch.isfinite(zero))
        steps = scale.to(groups.dtype)
        codes = (groups / steps.masked_fill(steps == 0, 1.0)).masked_fill(lost, 0.0).view_as(tiles)
        scale = scale.masked_fill(lost, float("nan"))
        if self.axis == "token":
            scale, zero = scale.squeeze(5), None if zero is None else zero.squeeze(5)
        if isinstance(self.nbits, torch.dtype):
            return Packed(self, codes.clamp(least, most).to(self.nbits), scale, zero)
        whole = (codes.round().clamp(least, most) + self.middle).to(torch.uint8)
        return Packed(self, pack(whole, self.nbits), scale, zero)

    def tiles(self, x: Tensor) -> Tensor:
        """`[batch, heads, tokens, head_dim]` as `[batch, heads, tiles, group_size, head_dim]`."""
        if x.shape[2] % self.group_size:
            raise ValueError(f"groups of {self.group_size} do not divide {x.shape[2]} tokens")
        return x.unflatten(2, (x.shape[2] // self.group_size, self.group_size))

    def groups(self, tiles: Tensor) -> Tensor:
        """Tiles as they are for axis "channel"; for "token" the last dimension becomes (groups, group_size)."""
        if self.axis == "channel":
            return tiles
        if tiles.shape[4] % self.group_size:
            raise ValueError(f"groups of {self.group_size} do not divide a head_dim of {tiles.shape[4]}")
        return tiles.unflatten(4, (tiles.shape[4] // self.group_size, self.group_size))


@dataclass(frozen=True)
class Packed:
    """Quantized tokens of K or of V.

    codes: uint8 `[batch, heads, tiles, group_size * nbits / 8, head_dim]`, or float8 with `group_size` rows to a tile.
    scale, zero: `[batch, heads, tiles, 1, head_dim]` for axis "channel", `[batch, heads, tiles, group_size,
    head_dim / group_size]` for axis "token"; zero is None where there is no zero point.
    """

    quantizer: Quantizer
    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return self.codes.shape[2] * self.quantizer.group_size

    @property
    def tensors(self) -> list[Tensor]:
        """All that is kept."""
        return [self.codes, self.scale] if self.zero is None else [self.codes, self.scale, self.zero]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(x.nbytes for x in self.tensors)

    @property
    def offset(self) -> Tensor | None:
        """What code 0 stands for, shaped as `scale`: the zero point, or for symmetric codes `-middle * scale`."""
        middle = self.quantizer.middle
        return self.scale.float() * -middle if middle else self.zero

    def numbers(self, out: Tensor) -> Tensor:
        """The codes as numbers, without scale and zero point, written to `out`: wide floats, shaped as the tiles."""
        nbits = self.quantizer.nbits
        return out.copy_(unpack(self.codes, nbits) if isinstance(nbits, int) else self.codes)

    def dequantize(self, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """What comes back, `[batch, heads, tokens, head_dim]`: float32 arithmetic (float64 for that), then `dtype`.

        out: memory for the numbers, as `numbers` takes it.
        """
        batch, heads, tiles, _, head_dim = self.codes.shape
        size = self.quantizer.group_size
        if out is None:
            wide = torch.promote_types(dtype, torch.float32)
            out = self.codes.new_empty(batch, heads, tiles, size, head_dim, dtype=wide)
        groups = self.quantizer.groups(self.numbers(out))
        if self.quantizer.middle:
            groups.sub_(self.quantizer.middle)
        per_group = [x if self.quantizer.axis == "channel" else x.unsqueeze(5) for x in self.tensors[1:]]
        groups.mul_(per_group[0])
        if self.zero is not None:
            groups.add_(per_group[1])
        return out.view(batch, heads, tiles * size, head_dim).to(dtype)

    def tiles(self, start: int, stop: int) -> Packed:
        """Tiles `start` to `stop`, as views."""
        return self.each(lambda x: x[:, :, start:stop])

    def rows(self, rows: Tensor) -> Packed:
        """The chosen rows of the batch, copied."""
        return self.each(lambda x: x[rows])

    def joined(self, other: Packed) -> Packed:
        """These tiles, and `other`'s behind them, in new tensors."""
        both = [torch.cat(pair, dim=2) for pair in zip(self.tensors, other.tensors, strict=True)]
        return Packed(self.quantizer, both[0], both[1], None if self.zero is None else both[2])

    def each(self, change: Callable[[Tensor], Tensor]) -> Packed:
        """The same with every tensor changed."""
        zero = None if self.zero is None else change(self.zero)
        return Packed(self.quantizer, change(self.codes), change(self.scale), zero)


def pack(codes: Tensor, nbits: int) -> Tensor:
    """uint8 codes of `nbits` bits, `[..., rows, head_dim]`, as bytes `[..., rows * nbits / 8, head_dim]`.

    The rows are cut into 8 / nbits runs of equal length. Byte i of a column holds the i-th code of each run, the first
    run lowest. Runs, and not neighbours, so that what is unpacked lies in order without being moved.
    """
    per_byte = 8 // nbits
    if codes.shape[-2] % per_byte:
        raise ValueError(f"{codes.shape[-2]} codes of {nbits} bits do not fill whole bytes")
    first, *others = codes.chunk(per_byte, dim=-2)
    packed = first.clone(memory_format=torch.contiguous_format)
    for run, part in enumerate(others, start=1):
        packed |= part << (run * nbits)
    return packed


def unpack(packed: Tensor, nbits: int) -> Tensor:
    """What `pack` packed: uint8 `[..., rows, head_dim]`. All runs at once: one shift and one mask."""
    if nbits == 8:
        return packed
    codes = packed.unsqueeze(-3) >> run_shifts(nbits, packed.device)
    codes &= 2**nbits - 1
    return codes.flatten(-3, -2)


@cache
def run_shifts(nbits: int, device: torch.device) -> Tensor:
    """How far each run's codes are shifted, uint8 `[runs, 1, 1]`."""
    return torch.arange(0, 8, nbits, dtype=torch.uint8, device=device).view(-1, 1, 1)


def round_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The least number of a 16-bit float dtype that is not below `x`, where `x` is 0 or more."""
    near = x.to(dtype)
    return torch.where(near.to(x.dtype) < x, (near.view(torch.int16) + 1).view(dtype), near)


def round_down(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The greatest number of a 16-bit float dtype that is not above `x`."""
    near = x.to(dtype)
    bits = near.view(torch.int16)  # sign and magnitude: one step down is a smaller magnitude above 0, a larger below
    return torch.where(near.to(x.dtype) > x, (bits + torch.where(bits > 0, -1, 1).to(torch.int16)).view(dtype), near)


def hadamard(size: int, *, device: torch.device | str | None = None) -> Tensor:
    """An orthogonal matrix that spreads each channel over many, float32 `[size, size]`, symmetric: its own inverse.

    Sylvester's matrix of the largest power of 2 that divides `size`, scaled to length 1, once per block of the diagonal.
    Queries and keys that are both turned by it have the same products as before (QuaRot, arXiv:2404.00456).
    """
    block = size & -size
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < block:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return torch.block_diag(*[matrix * block**-0.5] * (size // block))
