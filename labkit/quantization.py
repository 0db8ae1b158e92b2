"""Numbers in few bits: groups that share a scale and a zero point, and codes packed into bytes.

The numbers of a group become whole codes and come back as `code * scale + zero`. Where a group lies decides what is
lost: along the tokens of one channel (axis "channel"), so that a channel of large numbers spoils no other, or along the
channels of one token (axis "token"), so that a large token spoils no other (KIVI, arXiv:2402.02750).

Tensors are `[batch, heads, tokens, head_dim]`. A tile is `group_size` successive tokens of one head of one row of the
batch; no group and no byte reaches beyond its tile. A group is kept as one row of bytes: codes, scale, zero point.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    metadata: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if self.nbits not in (8, 4, 2, *FLOAT8):
            raise ValueError(f"nbits is 8, 4 or 2, or a float8 dtype that this torch has; got {self.nbits}")
        if self.axis not in ("channel", "token"):
            raise ValueError(f'axis is "channel" or "token"; got {self.axis!r}')

    @property
    def middle(self) -> int:
        """The code that stands for 0 where codes are whole and symmetric; 0 otherwise."""
        return 2 ** (self.nbits - 1) if isinstance(self.nbits, int) and self.symmetric else 0

    @property
    def code_bytes(self) -> int:
        """Bytes of a group's codes."""
        return self.group_size * (self.nbits if isinstance(self.nbits, int) else 8) // 8

    @property
    def row_bytes(self) -> int:
        """Bytes of a group: its codes, its scale, and its zero point where there is one."""
        return self.code_bytes + (4 if self.has_zero else 2)

    @property
    def has_zero(self) -> bool:
        """Whether groups keep a zero point."""
        return isinstance(self.nbits, int) and not self.symmetric

    def quantize(self, x: Tensor) -> Packed:
        """`x`, `[batch, heads, tokens, head_dim]`, as codes, scales and zero points.

        A number comes back within half a scale of itself, where codes are whole: scales and zero points are rounded
        outwards. A float8 code is a float: its number comes back within half a unit of the code's last digit, times the
        scale. A group of equal numbers comes back as it was, to the precision of its scale. A group that holds NaN or
        infinity, or whose range `metadata` cannot hold, comes back as NaN throughout: an error that shows.
        Raises ValueError unless `group_size` divides the tokens and, for axis "token", head_dim.
        """
        groups = self.groups(x).to(torch.promote_types(x.dtype, torch.float32))
        zero = None
        least: float
        most: float
        if isinstance(self.nbits, int) and not self.symmetric:
            least, most = 0, 2**self.nbits - 1
            low, high = torch.aminmax(groups, dim=-1, keepdim=True)
            zero = round_down(low, self.metadata)
            scale = round_up((high - zero.to(high.dtype)) / on_device(most, groups), self.metadata)
            groups = groups - zero.to(groups.dtype)
        else:
            most = torch.finfo(self.nbits).max if isinstance(self.nbits, torch.dtype) else self.middle - 1
            least = -most
            scale = round_up(groups.abs().amax(-1, keepdim=True) / on_device(most, groups), self.metadata)
        offset = scale * -self.middle if zero is None else zero
        lost = ~(torch.isfinite(scale) & torch.isfinite(offset))
        steps = scale.to(groups.dtype)
        codes = (groups / steps.masked_fill(steps == 0, 1.0)).masked_fill(lost, 0.0)
        if isinstance(self.nbits, int):
            packed = pack((codes.round().clamp(least, most) + self.middle).to(torch.uint8), self.nbits)
        else:
            packed = codes.clamp(least, most).to(self.nbits).view(torch.uint8)
        metadata = [scale.masked_fill(lost, float("nan"))] + ([] if zero is None else [zero])
        return Packed(self, torch.cat((packed, *(part.view(torch.uint8) for part in metadata)), dim=-1))

    def check(self, x: Tensor) -> None:
        """ValueError unless groups divide the tokens of `x` and, for axis "token", its head_dim."""
        size, tokens, head_dim = self.group_size, x.shape[2], x.shape[3]
        if tokens % size:
            raise ValueError(f"groups of {size} do not divide {tokens} tokens")
        if self.axis == "token" and head_dim % size:
            raise ValueError(f"groups of {size} do not divide a head_dim of {head_dim}")

    def groups(self, x: Tensor) -> Tensor:
        """`[batch, heads, tokens, head_dim]` as groups, `[tiles, batch, heads, head_dim, group_size]`, contiguous.

        A tile has `head_dim` groups: for axis "channel" one per channel; for "token" head_dim / group_size per token,
        token after token.
        """
        self.check(x)
        (batch, heads, _, head_dim), size = x.shape, self.group_size
        if self.axis == "channel":
            return x.unflatten(2, (-1, size)).permute(2, 0, 1, 4, 3).contiguous()
        return x.unflatten(2, (-1, size)).permute(2, 0, 1, 3, 4).reshape(-1, batch, heads, head_dim, size)

    def tokens(self, groups: Tensor) -> Tensor:
        """The opposite of `groups`."""
        tiles, batch, heads, head_dim, size = groups.shape
        if self.axis == "channel":
            return groups.permute(1, 2, 0, 4, 3).reshape(batch, heads, tiles * size, head_dim)
        return groups.permute(1, 2, 0, 3, 4).reshape(batch, heads, tiles * size, head_dim)


@dataclass(frozen=True)
class Packed:
    """Quantized tokens of K or of V.

    rows: uint8 `[tiles, batch, heads, head_dim, row_bytes]`. A row is a group: its codes, its scale, and its zero point
    where there is one. Rows of 4 or 2 bits with float16 metadata are what PyTorch can unpack at once on a CPU.
    overflow: int32 `[1]` where a kernel packed all of this: not 0 if a group was lost whose numbers are finite.
    """

    quantizer: Quantizer
    rows: Tensor
    overflow: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens held."""
        return self.rows.shape[0] * self.quantizer.group_size

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return self.rows.numel()

    @property
    def codes(self) -> Tensor:
        """The groups' codes, packed: uint8 `[tiles, batch, heads, head_dim, code_bytes]`, a view."""
        return self.rows[..., : self.quantizer.code_bytes]

    @property
    def scale(self) -> Tensor:
        """`[tiles, batch, heads, head_dim, 1]`, a view."""
        start = self.quantizer.code_bytes
        return self.rows[..., start : start + 2].view(self.quantizer.metadata)

    @property
    def zero(self) -> Tensor:
        """What code 0 stands for, `[tiles, batch, heads, head_dim, 1]`: kept, or `-middle * scale`."""
        if self.quantizer.has_zero:
            return self.rows[..., self.quantizer.code_bytes + 2 :].view(self.quantizer.metadata)
        return self.scale.float() * -self.quantizer.middle

    def overflows(self, x: Tensor) -> bool:
        """Whether a group of `x`, which was packed into this, was lost although all its numbers are finite.

        On a GPU this waits for the kernel that packed `x`, and reads the 4 bytes of `overflow`.
        """
        if self.overflow is not None:
            return bool(self.overflow.item())
        lost = self.scale.isnan()
        if lost.is_meta:
            return False
        return bool(lost.any()) and bool((self.quantizer.groups(x).isfinite().all(-1, keepdim=True) & lost).any())

    @property
    def fit_for_unpacking(self) -> bool:
        """Whether PyTorch has an operator that makes numbers of the rows as they lie: FBGEMM's, on a CPU."""
        quantizer = self.quantizer
        if quantizer.nbits not in (4, 2):
            return False
        return self.rows.device.type == "cpu" and quantizer.has_zero and quantizer.metadata == torch.float16

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What comes back, `[batch, heads, tokens, head_dim]`: float32 arithmetic (float64 for that), then `dtype`."""
        wide, nbits = torch.promote_types(dtype, torch.float32), self.quantizer.nbits
        if self.fit_for_unpacking and wide == torch.float32:
            bags = torch.ops.quantized
            unpack_rows = bags.embedding_bag_4bit_unpack if nbits == 4 else bags.embedding_bag_2bit_unpack
            groups = unpack_rows(self.rows.flatten(0, 3)).unflatten(0, self.rows.shape[:4])
        else:
            groups = (unpack(self.codes, nbits) if isinstance(nbits, int) else self.codes.view(nbits)).to(wide)
            groups.mul_(self.scale)
            if isinstance(nbits, int):
                groups.add_(self.zero)
        return self.quantizer.tokens(groups).to(dtype)

    def tiles(self, start: int, stop: int) -> Packed:
        """Tiles `start` to `stop`, as a view."""
        return Packed(self.quantizer, self.rows[start:stop])

    def of_rows(self, rows: Tensor) -> Packed:
        """The chosen rows of the batch, copied."""
        return Packed(self.quantizer, self.rows.index_select(1, rows))

    def joined(self, other: Packed) -> Packed:
        """These tiles, and `other`'s behind them, in new memory."""
        return Packed(self.quantizer, torch.cat((self.rows, other.rows)))


def pack(codes: Tensor, nbits: int) -> Tensor:
    """uint8 codes of `nbits` bits, `[..., n]`, as bytes `[..., n * nbits / 8]`; the first code lies lowest.

    Raises ValueError when they do not fill whole bytes.
    """
    per_byte = 8 // nbits
    if codes.shape[-1] % per_byte:
        raise ValueError(f"{codes.shape[-1]} codes of {nbits} bits do not fill whole bytes")
    packed = codes[..., ::per_byte].clone()
    for place in range(1, per_byte):
        packed |= codes[..., place::per_byte] << (place * nbits)
    return packed


def unpack(packed: Tensor, nbits: int) -> Tensor:
    """What `pack` packed: uint8 `[..., n]`."""
    if nbits == 8:
        return packed
    places = [(packed >> shift) & (2**nbits - 1) for shift in range(0, 8, nbits)]
    return torch.stack(places, dim=-1).flatten(-2)


def on_device(value: float, like: Tensor) -> Tensor:
    """A divisor where the numbers are: by one that is not, CUDA divides as by its reciprocal, which rounds twice."""
    return torch.full((), value, dtype=like.dtype, device=like.device)


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

    Sylvester's matrix of the largest power of 2 that divides `size`, with rows of length 1, in blocks on the diagonal.
    Queries and keys that are both turned by it have the same products as before (QuaRot, arXiv:2404.00456).
    """
    block = size & -size
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < block:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return torch.block_diag(*[matrix * block**-0.5] * (size // block))
