"""K and V in blocks, packed: a block holds one group of tokens, and is packed once, when it is full.

    layers = [PagedQuantizedCache(pages, nbits=4) for _ in range(num_layers)]   # as Cache.paged(..., nbits=4) has them

The packed blocks are one `Packed` of `labkit.quantization`, whose tile `b` is block `b`. The last block of a row that
is not full *waits*: its tokens lie in full precision in a small tensor beside the packed blocks, one place for each
block that waits. So a row of n tokens keeps the newest n % block_size of them exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from labkit.attention import Visibility
from labkit.cache.layer import size_of
from labkit.cache.paged import BlockCache, Copies, Layout, Pages, Rows
from labkit.cache.quantized import Pair, both, check_device_has, check_format, gpu_reads
from labkit.cache.step import Step
from labkit.kernels.packed_attention import wants_gradient
from labkit.kernels.paged_packed_attention import paged_packed_attention, what_is_read
from labkit.kernels.paged_packed_decode_attention import paged_packed_decode_attention
from labkit.kernels.quantize import quantized
from labkit.quantization import Packed, Quantizer
from labkit.sizing import PagedQuantized

AT_ONCE = 64  # blocks that are packed anew at one time


class PagedQuantizedCache(BlockCache):
    """Packed K and V of one layer in blocks, and in full precision the tokens of blocks that are not full.

    nbits: 8, 4 or 2, or torch.float8_e4m3fn or torch.float8_e5m2. key_axis, symmetric, metadata: as of
    `QuantizedCache`. The group size is the size of a block, which divides head_dim; the newest tokens of a row wait
    until their block is full, no longer. When float16 cannot hold a group's range all metadata becomes bfloat16, and
    what was packed before is packed anew.

    `k`, `v`: the packed blocks, `rows` `[num_blocks, 1, num_kv_heads, head_dim, row_bytes]`, allocated at the first
    append. `waiting`: K and V of blocks that are not full, `[waiting, num_kv_heads, block_size, head_dim]`, in the
    order of `open`, the numbers of these blocks. `format` is what `labkit.sizing` calls this.

    A chunk's own queries see its tokens as later queries will: packed, where their block is full. Where the tables come
    from outside, a block that waits is kept until it is full or begun anew, whether or not a row names it meanwhile.
    Raises ValueError (SizeError where sizing refuses it too) for what cannot be.
    """

    def __init__(
        self,
        pages: Pages,
        nbits: int | torch.dtype = 4,
        *,
        key_axis: str = "channel",
        symmetric: bool = False,
        metadata: torch.dtype = torch.float16,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__(pages, scale=scale, window=window, soft_cap=soft_cap)
        check_format(nbits, metadata)
        self.as_made = PagedQuantized(
            nbits=8 if isinstance(nbits, torch.dtype) else nbits,
            block_size=pages.block_size,
            metadata=str(metadata),
            symmetric=symmetric or isinstance(nbits, torch.dtype),
            key_axis=key_axis,
            drops=False,
        )
        self.quantizers = tuple(
            Quantizer(nbits, pages.block_size, axis, symmetric, metadata) for axis in (key_axis, "token")
        )
        self.packed: tuple[Packed, Packed] | None = None
        self.waiting: Pair | None = None
        self.open: tuple[int, ...] = ()

    @property
    def k(self) -> Packed | None:
        """The packed keys; None before the first append."""
        return None if self.packed is None else self.packed[0]

    @property
    def v(self) -> Packed | None:
        """The packed values."""
        return None if self.packed is None else self.packed[1]

    @property
    def format(self) -> PagedQuantized:
        """How K and V are kept now: metadata that float16 could not hold is bfloat16."""
        quantizer = self.quantizers[0] if self.packed is None else self.packed[0].quantizer
        return replace(self.as_made, metadata=str(quantizer.metadata))

    @property
    def nbytes(self) -> int:
        """Bytes of all packed blocks, free ones included, and of the blocks that wait; the table is `pages.nbytes`."""
        return sum(x.nbytes for x in self.packed or ()) + sum(map(size_of, self.waiting or ()))

    def validate(self, k: Tensor, v: Tensor, step: Step) -> None:
        """As for every cache; ValueError, too, for heads that blocks do not divide or a dtype that the device lacks."""
        super().validate(k, v, step)
        if self.packed is None:
            self.as_made.packing.check_head_dim(k.shape[3], v.shape[3])
            check_device_has(self.quantizers[0].nbits, k.device)

    def write(self, k: Tensor, v: Tensor, step: Step) -> None:
        """Put each new token into its block, among those that wait; pack the blocks that are full now."""
        rows, copies = self.pages.extended(self.rows, step)
        layout = self.pages.layout(rows, step)
        if self.packed is None or self.waiting is None:
            self.allocate(k)
        moves = layout.made(("moves", self.open, copies, k.device), lambda: self.moves(layout, copies, k.device))
        assert self.waiting is not None
        # What an undo would come back to is not written, only room behind it: where blocks come or go, in new memory.
        buffers = self.waiting if moves.in_place else both(moves.carry, self.waiting)
        for buffer, new in zip(buffers, (k, v), strict=True):
            buffer[moves.block, :, moves.place] = new.transpose(1, 2).flatten(0, 1)
        if not moves.in_place:
            self.bytes_copied += 2 * len(moves.kept[0]) * size_of(k[0, :, 0]) * self.pages.block_size
            self.keep(moves, buffers)
        self.move(rows)

    def keep(self, moves: Moves, buffers: Pair) -> None:
        """Pack the blocks that are full now; the others wait."""
        waits = len(moves.open)
        if moves.full:
            full = torch.tensor(moves.full, device=buffers[0].device)
            self.pack(full, *both(lambda x: x[waits:], buffers))
            buffers = both(lambda x: owned(x[:waits]), buffers)
        self.waiting, self.open = buffers, moves.open

    def moves(self, layout: Layout, copies: Copies, device: torch.device) -> Moves:
        """Which blocks wait behind a step and which are full, and where its tokens go."""
        size, step, copied = self.pages.block_size, layout.step, {target: source for source, target in copies}
        still = set(self.open) if self.pages.given else set()
        sources: dict[int, int] = {}
        full: list[int] = []
        written: list[tuple[tuple[int, ...], int]] = []
        for row, before, after in zip(layout.rows, step.before, step.after, strict=True):
            if before % size and (before < after or after % size):
                last = row[before // size]
                sources[last] = copied.get(last, last)
            if after % size:
                still.add(row[after // size])
            if before < after:
                ends = row[before // size : -(-after // size)]
                written.append((ends, before % size))
                full += ends[: after // size - before // size]
        still -= set(full)
        waits = tuple(sorted(still))
        number = {block: index for index, block in enumerate((*waits, *full))}
        was = {block: index for index, block in enumerate(self.open)}
        begun = {block for ends, first in written for block in ends[bool(first) :]}
        kept = {block: sources.get(block, block) for block in number if block not in begun}
        if lost := [block for block, source in kept.items() if source not in was]:
            raise ValueError(f"tokens of blocks {lost} should wait here, and are not held: were the tables changed?")
        pairs = [(was[source], number[block]) for block, source in kept.items()]
        tokens = [
            (number[ends[(first + i) // size]], (first + i) % size)
            for (ends, first), count in zip(written, filter(None, step.counts), strict=True)
            for i in range(count)
        ]
        return Moves(
            waits,
            tuple(full),
            waits == self.open and not full and not begun and all(source == block for block, source in kept.items()),
            tensors(pairs, device),
            *tensors(tokens, device),
        )

    def allocate(self, like: Tensor) -> None:
        """All packed blocks, of zeros, which cost nothing until they are written; none waits yet."""
        _, heads, _, head_dim = like.shape
        shape = self.pages.num_blocks, 1, heads, head_dim
        with torch.inference_mode(False):  # a buffer made in inference mode could not be written outside it
            k, v = (Packed(q, like.new_zeros(*shape, q.row_bytes, dtype=torch.uint8)) for q in self.quantizers)
            self.waiting = like.new_zeros(2, 0, heads, self.pages.block_size, head_dim).unbind()  # type: ignore[assignment]
        self.packed = k, v
        self._like = like.new_empty(0, heads, 0, head_dim)

    def pack(self, blocks: Tensor, k: Tensor, v: Tensor) -> None:
        """Pack full blocks, `[blocks, num_kv_heads, block_size, head_dim]`, each to its place. None is packed twice."""
        assert self.packed is not None
        packed = [quantized(x, held.quantizer) for held, x in zip(self.packed, (k, v), strict=True)]
        if any(new.overflows(x) for new, x in zip(packed, (k, v), strict=True)):
            self.packed = self.wider(self.packed)
            packed = [quantized(x, held.quantizer) for held, x in zip(self.packed, (k, v), strict=True)]
        for held, new in zip(self.packed, packed, strict=True):
            held.rows.index_copy_(0, blocks, new.rows.transpose(0, 1))

    def wider(self, packed: tuple[Packed, Packed]) -> tuple[Packed, Packed]:
        """The same blocks with scales and zero points in bfloat16, which has float32's range, in new memory."""
        wide = []
        for x in packed:
            quantizer = replace(x.quantizer, metadata=torch.bfloat16)
            with torch.inference_mode(False):
                rows = torch.zeros_like(x.rows)
            for start in range(0, len(rows), AT_ONCE):
                some = x.tiles(start, start + AT_ONCE)
                rows[start : start + AT_ONCE] = quantized(some.dequantize(), quantizer).rows
            wide.append(Packed(quantizer, rows))
        return wide[0], wide[1]

    def wait_for(self, blocks: Iterable[int], copies: dict[int, int] | None = None) -> None:
        """Have exactly these blocks wait: as they do already (or what they are copies of), else unpacked.

        What was packed is no more exact than it was; it is the one case in which a token can be packed twice.
        """
        waits, copies = tuple(sorted(set(blocks))), copies or {}
        if self.packed is None or self.waiting is None or (waits == self.open and not copies.keys() & set(waits)):
            return
        was = {block: index for index, block in enumerate(self.open)}
        device = self.waiting[0].device
        kept: list[tuple[int, int]] = []
        cut: list[tuple[int, int]] = []
        for index, block in enumerate(waits):
            place = was.get(copies.get(block, block))
            (cut if place is None else kept).append((block if place is None else place, index))
        goes_on, unpacked = tensors(kept, device), tensors(cut, device)
        pair = []
        for x, packed in zip(self.waiting, self.packed, strict=True):
            new = carried(x, len(waits), goes_on)
            if cut:
                rows = packed.rows.index_select(0, unpacked[0]).transpose(0, 1)
                new.index_copy_(0, unpacked[1], Packed(packed.quantizer, rows).dequantize(x.dtype))
            pair.append(new)
        self.waiting, self.open = (pair[0], pair[1]), waits
        self.bytes_copied += sum(map(size_of, pair))

    def last_blocks(self, rows: Rows, lengths: Sequence[int]) -> list[int]:
        """The blocks of these rows that are not full."""
        size = self.pages.block_size
        return [row[length // size] for row, length in zip(rows, lengths, strict=True) if length % size]

    def forget_from(self, seq_len: int) -> None:
        """Give back the blocks behind; what is left of a packed block that is cut waits again."""
        lengths = [min(length, seq_len) for length in self.lengths]
        also = self.open if self.pages.given else ()
        self.wait_for([*self.last_blocks(self.rows, lengths), *also])
        super().forget_from(seq_len)

    def choose_rows(self, rows: Tensor) -> None:
        """Share the chosen rows' blocks; a block that waits for no row any more is let go."""
        chosen = rows.tolist()
        if not self.pages.given:
            self.wait_for(
                self.last_blocks([self.rows[row] for row in chosen], [self.lengths[row] for row in chosen])  # type: ignore[arg-type]
            )
        super().choose_rows(rows)

    def placed(self, lengths: tuple[int, ...], copies: Copies) -> None:
        """Copies, and which blocks wait: those that do, and what is left of a packed block that a row now ends in."""
        self.copy_blocks(copies)
        sources = {target: source for source, target in copies}
        stays = set(self.open) - sources.keys()
        self.wait_for({*self.last_blocks(self.rows, lengths), *stays}, sources)

    def blocks(self) -> tuple[Tensor, ...]:
        """The packed rows."""
        return tuple(x.rows for x in self.packed or ())

    def forget(self) -> None:
        """Hold nothing."""
        super().forget()
        self.packed = self.waiting = None
        self.open = ()

    def mark(self) -> Any:
        """What is held, by reference: tokens that are held are never written, a block that waits not even when full."""
        return self.lengths, self._rows, self._like, self.packed, self.waiting, self.open

    def restore(self, mark: Any) -> None:
        """The lengths, table and tensors that were, to the bit."""
        self.lengths, rows, self._like, self.packed, self.waiting, self.open = mark
        self.move(rows)

    def block_table(self, layout: Layout, rows: Sequence[int], device: torch.device) -> Tensor:
        """As of `layout`, where a block that waits is told by its place among those, behind the packed blocks."""

        def make() -> Tensor:
            table, size = layout.block_table(rows, device).clone(), self.pages.block_size
            was = {block: index for index, block in enumerate(self.open)}
            for index, row in enumerate(rows):
                if (after := layout.step.after[row]) % size:
                    table[index, after // size] = self.pages.num_blocks + was[layout.rows[row][after // size]]
            return table

        return layout.made(("packed table", tuple(rows), self.open, device), make)

    def gathered(self, layout: Layout, row: int) -> Pair:
        """Copied out of the blocks that wait, and made of codes."""
        assert self.packed is not None
        assert self.waiting is not None
        full, rest = divmod(layout.step.after[row], self.pages.block_size)
        blocks = self.block_table(layout, [row], self.packed[0].rows.device)[0]
        pair = []
        for packed, waiting in zip(self.packed, self.waiting, strict=True):
            parts = []
            if full:
                some = Packed(packed.quantizer, packed.rows.index_select(0, blocks[:full]))
                parts.append(some.dequantize(waiting.dtype))
            if rest:
                parts.append(waiting[int(blocks[full]) - self.pages.num_blocks, None, :, :rest])
            pair.append(torch.cat(parts, dim=2))
        return pair[0], pair[1]

    def chunk(self, q: Tensor, row: int, layout: Layout) -> Tensor:
        """Attention of one row's new tokens over that row, by the twin: it makes numbers of a few blocks at a time."""
        return self.answered(paged_packed_attention, q, layout, [row], layout.step.of_row(row))

    def decode(self, q: Tensor, layout: Layout) -> Tensor:
        """Attention of one new token of each row that has one, `[rows, num_heads, 1, head_dim]`."""
        return self.answered(self.kernel_for(q) or paged_packed_attention, q, layout, layout.singles, layout.visible)

    def answered(
        self, by: Callable[..., Tensor], q: Tensor, layout: Layout, rows: Sequence[int], visible: Visibility
    ) -> Tensor:
        """The answer of a kernel or its twin, and what it reads counted: packed blocks whole, tokens that wait."""
        assert self.packed is not None
        assert self.waiting is not None
        table = self.block_table(layout, rows, q.device)
        blocks, tokens = layout.made(
            ("read", tuple(rows), self.constants.window),
            lambda: what_is_read(visible, self.constants, len(q), self.pages.block_size),
        )
        self.bytes_read += blocks * sum(x.nbytes // len(x.rows) for x in self.packed)
        self.bytes_read += 2 * tokens * self.waiting[0].shape[1] * size_of(q[0, 0, 0])
        return by(q, *self.packed, self.waiting, table, visible, self.constants)

    def kernel_for(self, q: Tensor) -> Callable[..., Tensor] | None:
        """The kernel that answers one new token per row, if there is one: without gradients, and not in float64.

        On a GPU it has no soft cap, and float8 needs compute capability 8.9; on a CPU codes must fill 16-bit words.
        """
        assert self.packed is not None
        assert self.waiting is not None
        if q.dtype == torch.float64 or wants_gradient(q, *self.waiting):
            return None
        if q.is_cuda:
            there = gpu_reads(self.quantizers[0].nbits, q.device)
            return paged_packed_decode_attention if there and self.constants.soft_cap is None else None
        if q.device.type == "cpu":
            from labkit.kernels import paged_packed_attention_cpu as on_cpu  # Numba takes a while to import

            takes = on_cpu.takes(q, *self.packed, self.waiting)
            return on_cpu.paged_packed_decode_attention_cpu if takes else None
        return None


@dataclass(frozen=True, eq=False)
class Moves:
    """What a step does to the blocks that wait.

    open: the blocks that wait behind it. full: those that it fills, in the order in which they are packed. in_place:
    whether the same blocks wait as before it. kept: places of blocks that go on, before and now, int64. block, place:
    where each new token goes, row after row: which of `(*open, *full)`, and which token of it.
    """

    open: tuple[int, ...]
    full: tuple[int, ...]
    in_place: bool
    kept: tuple[Tensor, Tensor]
    block: Tensor
    place: Tensor

    def carry(self, x: Tensor) -> Tensor:
        """Room for the blocks that wait or are filled, with what goes on in its place."""
        return carried(x, len(self.open) + len(self.full), self.kept)


def carried(x: Tensor, size: int, kept: tuple[Tensor, Tensor]) -> Tensor:
    """New memory for `size` blocks like those of `x`, of which some are `kept`: places in `x`, and in what is made."""
    with torch.inference_mode(False):
        new = x.new_zeros(size, *x.shape[1:])
    return new.index_copy_(0, kept[1], x.index_select(0, kept[0])) if len(kept[0]) else new


def owned(x: Tensor) -> Tensor:
    """A copy that can be written in any mode, and keeps nothing else alive."""
    with torch.inference_mode(False):
        new = torch.zeros_like(x)
    return new.copy_(x)


def tensors(pairs: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Two columns of numbers, int64."""
    first, second = torch.tensor(pairs, dtype=torch.long, device=device).view(-1, 2).unbind(1)
    return first, second
