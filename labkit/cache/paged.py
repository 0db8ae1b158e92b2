"""K and V in blocks of equal size, which rows hold by a block table (PagedAttention, arXiv:2309.06180).

    pages = Pages(num_blocks=64, block_size=16)
    layers = [PagedCache(pages) for _ in range(num_layers)]     # as Cache.paged(num_layers, 64, 16) has them

Memory is taken a block at a time, wherever one is free: a row may grow while there are blocks, and wastes less than
one. Rows that were one before `select_rows` go on sharing their blocks; who writes into a block that another row holds
as well gets a copy first.

A block table is a value, a tuple of blocks for each row, and never changes. Every layer keeps the table that it is at,
so that going back is taking up an older one, and asks `Pages` for the next: the first layer that asks gets it made, and
all that ask the same are given the same. So the layers share one table, and what kernels need of it is made once a
step; yet none depends on another, as each has K and V of its own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from labkit import kernels
from labkit.attention import Constants, Visibility, is_count
from labkit.cache.layer import LayerCache, Observer, size_of
from labkit.cache.step import Step, shortened
from labkit.kernels.packed_attention import wants_gradient
from labkit.kernels.paged_attention import paged_attention, store
from labkit.kernels.paged_decode_attention import paged_decode_attention
from labkit.kernels.paged_store import paged_store
from labkit.kernels.split import DTYPES

Rows = tuple[tuple[int, ...], ...]
Copies = tuple[tuple[int, int], ...]


def uploaded(numbers: np.ndarray, device: torch.device) -> Tensor:
    """These numbers on a device. To a GPU they go from pinned memory: nobody waits for what it has yet to do."""
    made = torch.from_numpy(numbers)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)


class OutOfBlocks(RuntimeError):
    """No block is left for what was asked. Nothing changed: let go of some, and ask again."""


class Pages:
    """The block tables of all rows, one object for all layers of a model's cache: `num_blocks` blocks of `block_size`.

    `rows`: the blocks of each row, in order of its tokens, as the layer that moved last has them. Who keeps tables of
    their own (an engine's block manager) sets `rows`; the layers then read those and take no block by themselves, until
    they are emptied. Raises ValueError for sizes that cannot be.
    """

    def __init__(self, num_blocks: int, block_size: int = 16) -> None:
        for name, size in (("num_blocks", num_blocks), ("block_size", block_size)):
            if not is_count(size) or size < 1:
                raise ValueError(f"{name} is a whole number, at least 1; got {size!r}")
        self.num_blocks, self.block_size = int(num_blocks), int(block_size)
        self.given = False  # whether the tables come from outside
        self._rows: Rows = ()
        self._counted: tuple[Rows, Counter[int]] = (), Counter()
        self._asked: tuple[Any, tuple[Rows, Copies]] | None = None
        self._layouts: tuple[Layout, ...] = ()
        self._fitting: tuple[Rows, Sequence[int]] | None = None  # tables from outside that were found long enough

    @property
    def rows(self) -> Rows:
        """The blocks of each row."""
        return self._rows

    @rows.setter
    def rows(self, rows: Iterable[Iterable[int]]) -> None:
        """Tables from outside; blocks may be in several rows. ValueError for a number that is no block."""
        listed = tuple(tuple(row) for row in rows)
        for block in chain.from_iterable(listed):
            if type(block) is not int or not 0 <= block < self.num_blocks:  # an engine sets thousands at every step
                self.check_block(block)
        self._rows, self.given, self._asked = listed, True, None

    def moved(self, rows: Rows) -> None:
        """A layer has moved to this table of its own."""
        if self.given:
            self._asked = None
        self._rows, self.given = rows, False

    @property
    def nbytes(self) -> int:
        """Bytes of the table as kernels read it: int32, as wide as the longest row."""
        return 4 * len(self.rows) * max(map(len, self.rows), default=0)

    @property
    def num_free(self) -> int:
        """Blocks that no row holds."""
        return self.num_blocks - len(self.holders(self.rows))

    def holders(self, rows: Rows) -> Counter[int]:
        """How many rows hold each block that any holds."""
        if self._counted[0] is not rows:
            self._counted = rows, Counter(chain.from_iterable(rows))
        return self._counted[1]

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-tokens // self.block_size)

    def check_block(self, block: object) -> None:
        """ValueError for what is no block's number."""
        if not is_count(block) or not 0 <= block < self.num_blocks:  # type: ignore[operator]
            raise ValueError(f"blocks are numbered 0 to {self.num_blocks - 1}; got {block!r}")

    def extended(self, rows: Rows, step: Step) -> tuple[Rows, Copies]:
        """The table with room for a step's new tokens, and blocks to copy, (from, to), before these are written.

        A block that is written into and that another row holds as well is replaced by a copy. OutOfBlocks when there
        are too few.
        """
        asked = rows, step.before, step.counts
        if self._asked is None or self._asked[0] != asked:
            self._asked = asked, self.extend(rows or ((),) * step.batch, step)
        return self._asked[1]

    def extend(self, rows: Rows, step: Step) -> tuple[Rows, Copies]:
        """`extended`, made anew."""
        if self.given:
            self.check_given(step.after)
            self.check_written(rows, step)
            return rows, ()
        held, longer, copies = self.holders(rows), list(rows), []
        wanted = [max(0, self.blocks_for(after) - len(row)) for row, after in zip(rows, step.after, strict=True)]
        let_go: Counter[int] = Counter()
        written = []  # rows whose last block is written into while another holds it
        for index, (row, before, count) in enumerate(zip(rows, step.before, step.counts, strict=True)):
            if count and before % self.block_size:
                last = row[before // self.block_size]
                if held[last] - let_go[last] > 1:
                    let_go[last] += 1
                    written.append(index)
        needed = sum(wanted) + len(written)
        if needed > self.num_blocks - len(held):
            raise OutOfBlocks(
                f"{sum(step.counts)} new tokens need {needed} more blocks of {self.block_size}; "
                f"{self.num_blocks - len(held)} of {self.num_blocks} are free"
            )
        free = list(islice((block for block in range(self.num_blocks) if block not in held), needed))
        for index in written:
            place = step.before[index] // self.block_size
            copies.append((longer[index][place], free[0]))
            longer[index] = (*longer[index][:place], free.pop(0), *longer[index][place + 1 :])
        for index, count in enumerate(wanted):
            if count:
                longer[index] = (*longer[index], *free[:count])
                del free[:count]
        return (tuple(longer) if needed else rows), tuple(copies)

    def check_given(self, lengths: Sequence[int]) -> None:
        """ValueError unless the tables from outside have room for rows of these lengths. Every layer asks the same."""
        if self._fitting is not None and self._fitting[0] is self._rows and self._fitting[1] is lengths:
            return
        there, needed = list(map(len, self.rows)), list(map(self.blocks_for, lengths))
        if len(there) != len(needed) or any(has < needs for has, needs in zip(there, needed, strict=True)):
            raise ValueError(
                f"the tables set from outside have {there} blocks by row; rows of {list(lengths)} tokens need {needed}"
            )
        self._fitting = self._rows, lengths

    def check_written(self, rows: Rows, step: Step) -> None:
        """ValueError where a step writes one block for two rows, or at two places of one."""
        writers: dict[int, int] = {}
        for index, (row, before, count) in enumerate(zip(rows, step.before, step.counts, strict=True)):
            for block in row[before // self.block_size : self.blocks_for(before + count)] if count else ():
                if block in writers:
                    raise ValueError(
                        f"rows {writers[block]} and {index} would both write into block {block}: set a table in which "
                        f"one of them has a copy of its own"
                    )
                writers[block] = index

    def layout(self, rows: Rows, step: Step) -> Layout:
        """What kernels read of a step over this table: the same for every layer that asks the same."""
        asked = rows, step.before, step.counts, step.padding
        for known in reversed(self._layouts):
            if known.asked == asked:
                return known
        layout = Layout(rows, step, self.block_size)
        self._layouts = (*self._layouts[-1:], layout)  # two: what is written, and what is read back whole
        return layout


@dataclass(frozen=True, eq=False)
class Layout:
    """A step over a block table, as tensors. Each is made once per device."""

    rows: Rows
    step: Step
    block_size: int
    _made: dict = field(default_factory=dict, init=False, repr=False)
    _numbers: dict[tuple[int, ...], np.ndarray] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def asked(self) -> tuple:
        """What it was made of."""
        return self.rows, self.step.before, self.step.counts, self.step.padding

    def made(self, key: tuple, make: Callable[[], Any]) -> Any:
        """What `make` gives, once."""
        if key not in self._made:
            with torch.inference_mode(False):  # a later pass may want gradients
                self._made[key] = make()
        return self._made[key]

    def slots(self, device: torch.device) -> Tensor:
        """Of each new token, row after row, int64 `[all new tokens]`."""

        def make() -> Tensor:
            counts, before = np.array(self.step.counts), np.array(self.step.before)
            rows = np.repeat(np.arange(len(counts)), counts)
            places = np.arange(len(rows)) + np.repeat(before - (np.cumsum(counts) - counts), counts)
            blocks = self.numbers(range(self.step.batch))[rows, places // self.block_size].astype(np.int64)
            return uploaded(blocks * self.block_size + places % self.block_size, device)

        return self.made(("slots", device), make)

    def block_table(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """The blocks of some rows, int32 `[rows, blocks of the longest]`, padded with -1."""

        return self.made(("table", tuple(rows), device), lambda: uploaded(self.numbers(rows), device))

    def numbers(self, rows: Sequence[int]) -> np.ndarray:
        """The numbers of `block_table`. Made once."""

        key = tuple(rows)
        if key not in self._numbers:
            tables = [self.rows[row][: -(-self.step.after[row] // self.block_size)] for row in rows]
            padded = np.full((len(tables), max(map(len, tables))), -1, dtype=np.int32)
            for line, table in zip(padded, tables, strict=True):
                line[: len(table)] = table
            self._numbers[key] = padded
        return self._numbers[key]

    @cached_property
    def singles(self) -> list[int]:
        """Rows with one new token."""
        return [row for row, count in enumerate(self.step.counts) if count == 1]

    @cached_property
    def pieces(self) -> list[tuple[int, int | None]]:
        """What lies end to end, in as few pieces as can be answered each in one go: how many new tokens, and of which
        row; None for successive rows with one new token each."""
        found: list[tuple[int, int | None]] = []
        for row, count in enumerate(self.step.counts):
            if count > 1:
                found.append((count, row))
            elif count and found and found[-1][1] is None:
                found[-1] = found[-1][0] + 1, None
            elif count:
                found.append((1, None))
        return found

    @cached_property
    def visible(self) -> Visibility:
        """Who may see whom in the rows of `singles`, each from index 0."""
        step, rows = self.step, self.singles
        first_query = tuple(step.before[row] - step.skipped[row] for row in rows)
        first_key = tuple(-step.skipped[row] for row in rows)
        return Visibility(1, max(step.after[row] for row in rows), shortened(first_query), shortened(first_key))

    def sight(self, row: int, constants: Constants) -> tuple[int, Visibility]:
        """The first block of a row that its new tokens see into, and who may see whom from there on."""

        def make() -> tuple[int, Visibility]:
            visible = self.step.of_row(row)
            begin = visible.unseen(constants) // self.block_size
            return begin, visible.of_keys(begin * self.block_size, visible.kv_len)

        return self.made(("sight", row, constants.window), make)

    def gathered(self, x: Tensor, row: int, begin: int) -> Tensor:
        """K or V of one row, dense, `[1, num_kv_heads, tokens, head_dim]`, from its block at place `begin` on."""
        blocks = self.block_table([row], x.device)[0, begin:]
        tokens = self.step.after[row] - begin * self.block_size
        return x.index_select(0, blocks).flatten(0, 1)[None, :tokens].transpose(1, 2)


class BlockCache(LayerCache):
    """What caches in blocks have in common: a block table, and which new tokens a kernel answers.

    `rows`: the block table that the layer is at. One new token per row is answered by a kernel that reads K and V where
    they lie, a chunk row by row. Appending raises OutOfBlocks when there are too few blocks, and then changes nothing.
    No block is given up when its tokens leave the window: reading passes over it.
    """

    takes_ragged: ClassVar[bool] = True

    def __init__(
        self,
        pages: Pages,
        *,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__(scale=scale, window=window, soft_cap=soft_cap)
        self.shared = self.pages = pages
        self._rows: Rows = ()
        self._like: Tensor | None = None  # there as soon as blocks are allocated

    @abstractmethod
    def gathered(self, layout: Layout, row: int) -> tuple[Tensor, Tensor]:
        """K and V of one row, dense, `[1, num_kv_heads, tokens, head_dim]`."""

    @abstractmethod
    def decode(self, q: Tensor, layout: Layout) -> Tensor:
        """Attention of one new token of each row that has one, `[rows, num_heads, 1, head_dim]`."""

    @abstractmethod
    def chunk(self, q: Tensor, row: int, layout: Layout) -> Tensor:
        """Attention of one row's new tokens over that row."""

    @property
    def rows(self) -> Rows:
        """The blocks of each row, in order of its tokens."""
        return self.pages.rows if self.pages.given else self._rows

    def move(self, rows: Rows) -> None:
        """Be at this table."""
        self._rows = rows
        if not self.pages.given:
            self.pages.moved(rows)

    def template(self) -> Tensor | None:
        """A tensor without tokens: all that is asked of it is what it is like."""
        if self._like is not None and len(self._like) != len(self.lengths):
            self._like = self._like.new_empty(len(self.lengths), self._like.shape[1], 0, self._like.shape[3])
        return self._like

    def held(self) -> tuple[Tensor, Tensor] | None:
        """K and V gathered by the table, zeros behind the ends of shorter rows; None when empty."""
        if self._like is None or not self.lengths:
            return None
        if not self.seq_len:  # rows are there, as yet without tokens
            none = self._like.new_empty(len(self.lengths), *self._like.shape[1:])
            return none, none
        step = Step(tuple(min(1, length) for length in self.lengths), tuple(max(0, n - 1) for n in self.lengths))
        layout = self.pages.layout(self.rows, step)
        shape = len(self.lengths), self._like.shape[1], self.seq_len, self._like.shape[3]
        pair = self._like.new_zeros(shape), self._like.new_zeros(shape)
        for row, length in enumerate(self.lengths):
            if length:
                for dense, x in zip(pair, self.gathered(layout, row), strict=True):
                    dense[row, :, :length] = x[0]
        return pair

    def forget_from(self, seq_len: int) -> None:
        """Give back the blocks behind; those of a table from outside are not the layer's to give."""
        if not self.pages.given:
            self.move(tuple(row[: self.pages.blocks_for(seq_len)] for row in self.rows))

    def choose_rows(self, rows: Tensor) -> None:
        """Share the chosen rows' blocks: nothing is copied before it is written. ValueError for tables from outside."""
        if self.pages.given:
            raise ValueError("the tables were set from outside: set the chosen rows' there")
        self.move(tuple(self.rows[row] for row in rows.tolist()))

    def forget(self) -> None:
        """Hold nothing."""
        self._like, self._rows = None, ()
        self.pages.moved(())

    def place(self, lengths: Sequence[int], copies: Iterable[tuple[int, int]] = ()) -> None:
        """Tables were set from outside: carry out their `copies`, and hold so many tokens of each row from now on.

        Raises ValueError when the tables have no room for that, and changes nothing.
        """
        self.check_whole()
        lengths, copies = tuple(lengths), tuple(copies)
        if any(not is_count(length) or length < 0 for length in lengths):
            raise ValueError(f"lengths count tokens: whole numbers, 0 or more; got {lengths}")
        if not self.pages.given:
            raise ValueError("no tables were set from outside: set pages.rows first")
        self.pages.check_given(lengths)
        for block in chain.from_iterable(copies):
            self.pages.check_block(block)
        self.change(lambda: self.placed(lengths, copies), lengths)

    def placed(self, lengths: tuple[int, ...], copies: Copies) -> None:
        """What `place` does to K and V."""
        self.copy_blocks(copies)

    @abstractmethod
    def blocks(self) -> tuple[Tensor, ...]:
        """What the blocks lie in, `[num_blocks, ...]` each; nothing before the first append."""

    def copy_blocks(self, copies: Copies) -> None:
        """Copy whole blocks, each (from, to)."""
        for x in self.blocks() if copies else ():
            sources, targets = (torch.tensor(side, device=x.device) for side in zip(*copies, strict=True))
            x.index_copy_(0, targets, x.index_select(0, sources))
            self.bytes_copied += size_of(x) // len(x) * len(copies)

    def attend(self, q: Tensor, step: Step | None = None, *, observe: Observer | None = None) -> Tensor:
        """Causal attention of the newest tokens' queries over all that is held.

        With `observe`, which gets the weights, K and V are made dense.
        """
        if self._like is None or observe is not None:
            return super().attend(q, step, observe=observe)
        self.check_queries(q)
        step = step or self.newest(q)
        come = (step.batch if step.is_rectangle else 1, step.new_tokens)
        if q.dim() != 4 or (q.shape[0], q.shape[2]) != come:
            raise ValueError(f"the step has {come[1]} queries in {come[0]} rows; q is {list(q.shape)}")
        layout = self.pages.layout(self.rows, step)
        if step.is_rectangle and step.counts[0] == 1:
            return self.decode(q, layout)
        if step.is_rectangle:
            return torch.cat([self.chunk(some, row, layout) for row, some in enumerate(q.split(1))])
        sizes = [size for size, _ in layout.pieces]
        asked = list(zip(q.split(sizes, dim=2), (row for _, row in layout.pieces), strict=True))
        ones = [some for some, row in asked if row is None]
        answered: Iterator[Tensor] = iter(())
        if ones:  # hundreds of rows may have one new token: they are never taken apart
            one = torch.cat(ones, dim=2).transpose(0, 2)
            answered = iter(self.decode(one, layout).transpose(0, 2).split([x.shape[2] for x in ones], dim=2))
        return torch.cat(
            [next(answered) if row is None else self.chunk(some, row, layout) for some, row in asked], dim=2
        )


class PagedCache(BlockCache):
    """K and V of one layer in blocks, allocated at the first append.

    `k`, `v`: `[num_blocks, block_size, num_kv_heads, head_dim]`.
    """

    def __init__(
        self,
        pages: Pages,
        *,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__(pages, scale=scale, window=window, soft_cap=soft_cap)
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks, free ones included. The table is `pages.nbytes`, once for all layers."""
        return 0 if self.k is None or self.v is None else size_of(self.k) + size_of(self.v)

    def gathered(self, layout: Layout, row: int) -> tuple[Tensor, Tensor]:
        """Copied out of the blocks."""
        assert self.k is not None
        assert self.v is not None
        return layout.gathered(self.k, row, 0), layout.gathered(self.v, row, 0)

    def write(self, k: Tensor, v: Tensor, step: Step) -> None:
        """Take the blocks that are needed, and write each new token to its slot."""
        rows, copies = self.pages.extended(self.rows, step)
        if self.k is None or self.v is None:
            self.k, self.v = self.allocate(k), self.allocate(v)
            self._like = self.k.new_empty(0, k.shape[1], 0, k.shape[3])
        self.copy_blocks(copies)
        slots = self.pages.layout(rows, step).slots(k.device)
        by_kernel = k.is_cuda and kernels.available(k.device) and not wants_gradient(k, v)
        (paged_store if by_kernel else store)(k, v, self.k, self.v, slots)
        self.move(rows)

    def allocate(self, like: Tensor) -> Tensor:
        """All blocks of K or V, with the heads, dtype and device of `like`. Zeros cost nothing until written."""
        with torch.inference_mode(False):  # a buffer made in inference mode could not be written outside it
            return like.new_zeros(self.pages.num_blocks, self.pages.block_size, like.shape[1], like.shape[3])

    def blocks(self) -> tuple[Tensor, ...]:
        """K and V."""
        return () if self.k is None or self.v is None else (self.k, self.v)

    def forget(self) -> None:
        """Hold nothing."""
        super().forget()
        self.k = self.v = None

    def mark(self) -> Any:
        """The lengths, the table and both tensors: slots of tokens that are held are never written."""
        return self.lengths, self._rows, self._like, self.k, self.v

    def restore(self, mark: Any) -> None:
        """The lengths, table and tensors that were."""
        self.lengths, rows, self._like, self.k, self.v = mark
        self.move(rows)

    def chunk(self, q: Tensor, row: int, layout: Layout) -> Tensor:
        """Attention of one row's new tokens over that row, gathered from where the first of them sees."""
        assert self.k is not None
        assert self.v is not None
        begin, visible = layout.sight(row, self.constants)
        return self.answer(q, (layout.gathered(self.k, row, begin), layout.gathered(self.v, row, begin)), visible)

    def decode(self, q: Tensor, layout: Layout) -> Tensor:
        """Attention of one new token of each row that has one, `[rows, num_heads, 1, head_dim]`."""
        assert self.k is not None
        assert self.v is not None
        tokens = layout.made(("read", self.constants.window), lambda: layout.visible.keys_read(self.constants, len(q)))
        self.bytes_read += tokens * 2 * self.k.shape[2] * self.k.shape[3] * self.k.element_size()
        table = layout.block_table(layout.singles, q.device)
        answer = self.kernel_for(q) or paged_attention
        return answer(q, self.k, self.v, table, layout.visible, self.constants)

    def kernel_for(self, q: Tensor) -> Callable[..., Tensor] | None:
        """The kernel that answers one new token per row, if there is one: without gradients, and not in float64.

        On a GPU it has no soft cap.
        """
        assert self.k is not None
        assert self.v is not None
        if q.is_cuda:
            takes = q.dtype in DTYPES and self.constants.soft_cap is None and not wants_gradient(q, self.k, self.v)
            return paged_decode_attention if takes and kernels.available(q.device) else None
        if q.device.type == "cpu":
            from labkit.kernels import paged_attention_cpu as on_cpu  # Numba takes a while to import

            return on_cpu.paged_decode_attention_cpu if on_cpu.takes(q, self.k, self.v) else None
        return None
