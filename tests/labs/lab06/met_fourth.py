"""Answers that lab 06's checks had not seen when they met: their author knew the notebook, not the checks."""

# ruff: noqa: F811

from __future__ import annotations

import copy
import math
from collections import OrderedDict, deque
from collections.abc import Mapping
from functools import reduce
from itertools import accumulate, takewhile
from typing import Self

import numpy as np
import torch
from torch import Tensor

from labkit.cache import OutOfBlocks
from labkit.labs.lab06 import references
from labkit.labs.lab06.chains import Written, chain
from labkit.labs.lab06.launch import tl
from tests.labs.noting import noting

WRONG, RIGHT, wrong, right = noting(references)


# 06.1


@wrong("06.1", "blocks for the final length", "blocks are taken when needed: those of the tokens held now")
def waste(held: list[int], final: list[int], room: int, block_size: int) -> tuple[int, int, int]:
    reserved = sum(final) - sum(held)
    never = sum(room - f for f in final)
    return reserved, never, sum(-f % block_size for f in final)


@wrong("06.1", "never filled counted from what is held", "slots still to be filled are counted twice")
def waste(held: list[int], final: list[int], room: int, block_size: int) -> tuple[int, int, int]:
    reserved = sum(f - h for h, f in zip(held, final, strict=True))
    never = sum(room - h for h in held)
    return reserved, never, sum(-h % block_size for h in held)


@wrong("06.1", "all tokens in one list of blocks", "each request has a last block of its own")
def waste(held: list[int], final: list[int], room: int, block_size: int) -> tuple[int, int, int]:
    tokens = sum(held)
    blocks = math.ceil(tokens / block_size)
    return sum(final) - tokens, len(final) * room - sum(final), blocks * block_size - tokens


@wrong("06.1", "everybody has a block at once", "a request of no tokens has no block yet")
def waste(held: list[int], final: list[int], room: int, block_size: int) -> tuple[int, int, int]:
    reserved = never = empty = 0
    for h, f in zip(held, final, strict=True):
        blocks = max(1, (h + block_size - 1) // block_size)
        reserved, never, empty = reserved + f - h, never + room - f, empty + blocks * block_size - h
    return reserved, never, empty


@wrong("06.1", "the filled slots of the last block", "those that are filled are counted, not those that are empty")
def waste(held: list[int], final: list[int], room: int, block_size: int) -> tuple[int, int, int]:
    pairs = list(zip(held, final, strict=True))
    return sum(f - h for h, f in pairs), sum(room - f for _, f in pairs), sum(h % block_size for h in held)


@right("06.1", "folded, by reduce")
def waste(held: list[int], final: list[int], room: int, block_size: int) -> tuple[int, int, int]:
    def add(so_far: tuple[int, int, int], request: tuple[int, int]) -> tuple[int, int, int]:
        now, end = request
        blocks, over = divmod(now, block_size)
        taken = (blocks + bool(over)) * block_size
        return so_far[0] + end - now, so_far[1] + room - end, so_far[2] + taken - now

    return reduce(add, zip(held, final, strict=True), (0, 0, 0))


@right("06.1", "lists of numbers in NumPy; Python's numbers come back")
def waste(held: list[int], final: list[int], room: int, block_size: int) -> tuple[int, int, int]:
    now, end = np.array(held, dtype=np.int64), np.array(final, dtype=np.int64)
    empty = (now + block_size - 1) // block_size * block_size - now
    return int((end - now).sum()), int((room - end).sum()), int(empty.sum())


# 06.2


@wrong("06.2", "slots in float32", "slots beyond 2**24 are not exact")
def slots_of(block_table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    blocks = block_table.gather(1, positions // block_size).float()
    return (blocks * block_size + positions % block_size).long()


@wrong("06.2", "take, which reads the table as one row", "all rows read the first row's blocks")
def slots_of(block_table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    return block_table.long().take(positions // block_size) * block_size + positions % block_size


@wrong("06.2", "row by row", "the more rows, the more operations")
def slots_of(block_table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    rows = []
    for table, at in zip(block_table.long(), positions, strict=True):
        rows.append(table[at // block_size] * block_size + at % block_size)
    return torch.stack(rows)


@wrong("06.2", "positions divided in place", "the positions given have changed")
def slots_of(block_table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    place = positions % block_size
    index = positions.div_(block_size, rounding_mode="floor")
    return block_table.gather(1, index).long() * block_size + place


@wrong("06.2", "cast to int64 after the product", "int32 overflows: block * block_size is more than it can count")
def slots_of(block_table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    first_slot = block_table * block_size
    rows = torch.arange(len(positions), device=positions.device)[:, None]
    return first_slot[rows, positions // block_size].long() + positions.remainder(block_size)


@wrong("06.2", "all rows at the first row's positions", "each row has positions of its own")
def slots_of(block_table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    index = positions[0] // block_size
    return block_table[:, index].long() * block_size + positions[0] % block_size


@right("06.2", "rows and columns as indices")
def slots_of(block_table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    column = torch.div(positions, block_size, rounding_mode="floor")
    row = torch.arange(positions.shape[0], device=positions.device).unsqueeze(1).expand_as(column)
    blocks = block_table[row, column].to(torch.int64)
    return torch.add(positions - column * block_size, blocks, alpha=block_size)


@right("06.2", "how far each block lies from where it would lie without a table")
def slots_of(block_table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    rows, width = block_table.shape
    index = positions.floor_divide(block_size)
    start = torch.arange(0, rows * width, max(width, 1), device=positions.device).view(-1, 1)
    moved = block_table.reshape(-1).take(start + index).long().sub_(index)
    return moved.mul_(block_size).add_(positions)


# 06.3


@wrong("06.3", "of kept blocks the newest is taken first", "kept blocks: the one dropped first goes first")
class BlockAllocator:
    def __init__(self, num_blocks: int) -> None:
        self.plain, self.kept = OrderedDict.fromkeys(range(num_blocks)), OrderedDict()
        self.refs = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self.plain) + len(self.kept)

    def ref_count(self, block: int) -> int:
        return self.refs[block]

    def take(self) -> int:
        if not self.num_free:
            raise OutOfBlocks("no block is free")
        block, _ = self.plain.popitem(last=False) if self.plain else self.kept.popitem()
        self.refs[block] = 1
        return block

    def hold(self, block: int) -> None:
        if self.refs[block] == 0:
            self.plain.pop(block, None)
            self.kept.pop(block, None)
        self.refs[block] += 1

    def drop(self, block: int, *, keep: bool = False) -> bool:
        if self.refs[block] == 0:
            raise ValueError(f"nobody holds block {block}")
        self.refs[block] -= 1
        if self.refs[block]:
            return False
        (self.kept if keep else self.plain)[block] = None
        return True


@wrong("06.3", "old entries of a queue come to life again", "a kept block held and dropped again keeps its old place")
class BlockAllocator:
    def __init__(self, num_blocks: int) -> None:
        self.plain, self.kept = deque(range(num_blocks)), deque()
        self.refs = [0] * num_blocks
        self.is_kept = [False] * num_blocks
        self.free = num_blocks

    @property
    def num_free(self) -> int:
        return self.free

    def ref_count(self, block: int) -> int:
        return self.refs[block]

    def take(self) -> int:
        for queue, kept in ((self.plain, False), (self.kept, True)):
            while queue:
                block = queue.popleft()
                if self.refs[block] == 0 and self.is_kept[block] == kept:  # else held meanwhile: look further
                    self.refs[block], self.free = 1, self.free - 1
                    return block
        raise OutOfBlocks("no block is free")

    def hold(self, block: int) -> None:
        self.free -= self.refs[block] == 0
        self.refs[block] += 1

    def drop(self, block: int, *, keep: bool = False) -> bool:
        if self.refs[block] == 0:
            raise ValueError("dropped already")
        self.refs[block] -= 1
        if self.refs[block] == 0:
            self.free += 1
            self.is_kept[block] = keep
            (self.kept if keep else self.plain).append(block)
        return self.refs[block] == 0


@wrong("06.3", "counted down before the refusal", "after a drop that is refused the block has -1 holders")
class BlockAllocator:
    def __init__(self, num_blocks: int) -> None:
        self.free = OrderedDict((block, None) for block in range(num_blocks))  # kept ones at the end
        self.refs = dict.fromkeys(range(num_blocks), 0)

    @property
    def num_free(self) -> int:
        return len(self.free)

    def ref_count(self, block: int) -> int:
        return self.refs[block]

    def take(self) -> int:
        if not self.free:
            raise OutOfBlocks("no block is free")
        block, _ = self.free.popitem(last=False)
        self.refs[block] = 1
        return block

    def hold(self, block: int) -> None:
        self.refs[block] += 1
        self.free.pop(block, None)

    def drop(self, block: int, *, keep: bool = False) -> bool:
        self.refs[block] -= 1
        if self.refs[block] < 0:
            raise ValueError(f"block {block} is free")
        if self.refs[block] == 0:
            self.free[block] = None
            if not keep:
                self.free.move_to_end(block, last=False)
        return self.refs[block] == 0


@wrong("06.3", "free blocks counted one by one", "num_free takes longer the more blocks there are")
class BlockAllocator:
    def __init__(self, num_blocks: int) -> None:
        self.refs = [0] * num_blocks
        self.plain, self.kept = OrderedDict.fromkeys(range(num_blocks)), OrderedDict()

    @property
    def num_free(self) -> int:
        return sum(1 for count in self.refs if count == 0)

    def ref_count(self, block: int) -> int:
        return self.refs[block]

    def take(self) -> int:
        queue = self.plain or self.kept
        if not queue:
            raise OutOfBlocks("no block is free")
        block = queue.popitem(last=False)[0]
        self.refs[block] = 1
        return block

    def hold(self, block: int) -> None:
        for queue in (self.plain, self.kept):
            queue.pop(block, None)
        self.refs[block] += 1

    def drop(self, block: int, *, keep: bool = False) -> bool:
        if not self.refs[block]:
            raise ValueError("nobody holds it")
        self.refs[block] -= 1
        if not self.refs[block]:
            (self.kept if keep else self.plain)[block] = None
        return not self.refs[block]


@wrong("06.3", "True only where nothing is kept", "drop says False of a kept block that nobody holds now")
class BlockAllocator:
    def __init__(self, num_blocks: int) -> None:
        self.refs = [0] * num_blocks
        self.plain, self.kept = OrderedDict.fromkeys(range(num_blocks)), OrderedDict()

    @property
    def num_free(self) -> int:
        return len(self.plain) + len(self.kept)

    def ref_count(self, block: int) -> int:
        return self.refs[block]

    def take(self) -> int:
        for queue in (self.plain, self.kept):
            if queue:
                block = queue.popitem(last=False)[0]
                self.refs[block] = 1
                return block
        raise OutOfBlocks("no block is free")

    def hold(self, block: int) -> None:
        self.plain.pop(block, None)
        self.kept.pop(block, None)
        self.refs[block] += 1

    def drop(self, block: int, *, keep: bool = False) -> bool:
        if self.refs[block] == 0:
            raise ValueError("nobody holds it")
        self.refs[block] -= 1
        if self.refs[block] > 0:
            return False
        if keep:
            self.kept[block] = None
            return False
        self.plain[block] = None
        return True


@wrong("06.3", "a free block that is held stays among the free", "take gives a block that somebody holds")
class BlockAllocator:
    def __init__(self, num_blocks: int) -> None:
        self.refs = [0] * num_blocks
        self.free = deque(range(num_blocks))
        self.kept = deque()

    @property
    def num_free(self) -> int:
        return len(self.free) + len(self.kept)

    def ref_count(self, block: int) -> int:
        return self.refs[block]

    def take(self) -> int:
        if not self.num_free:
            raise OutOfBlocks("no block is free")
        block = self.free.popleft() if self.free else self.kept.popleft()
        self.refs[block] += 1
        return block

    def hold(self, block: int) -> None:
        self.refs[block] += 1

    def drop(self, block: int, *, keep: bool = False) -> bool:
        if self.refs[block] == 0:
            raise ValueError("nobody holds it")
        self.refs[block] -= 1
        if self.refs[block] == 0:
            (self.kept if keep else self.free).append(block)
            return True
        return False


@right("06.3", "a ring of numbers: who comes before and after each free block")
class BlockAllocator:
    def __init__(self, num_blocks: int) -> None:
        plain, kept = num_blocks, num_blocks + 1  # the two rings' own places
        self._plain, self._kept = plain, kept
        self._after = [*range(1, num_blocks + 1), 0, kept]
        self._before = [plain, *range(num_blocks), kept]
        self._holders = [0] * num_blocks
        self._num_free = num_blocks

    @property
    def num_free(self) -> int:
        return self._num_free

    def ref_count(self, block: int) -> int:
        return self._holders[block]

    def _out(self, block: int) -> None:
        before, after = self._before[block], self._after[block]
        self._after[before], self._before[after] = after, before
        self._num_free -= 1

    def _last_in(self, ring: int, block: int) -> None:
        last = self._before[ring]
        self._after[last] = self._before[ring] = block
        self._before[block], self._after[block] = last, ring
        self._num_free += 1

    def take(self) -> int:
        for ring in (self._plain, self._kept):
            block = self._after[ring]
            if block != ring:
                self.hold(block)
                return block
        raise OutOfBlocks("every block is held")

    def hold(self, block: int) -> None:
        if self._holders[block] == 0:
            self._out(block)
        self._holders[block] += 1

    def drop(self, block: int, *, keep: bool = False) -> bool:
        if not 0 <= block < len(self._holders) or self._holders[block] == 0:
            raise ValueError(f"nobody holds block {block}")
        self._holders[block] -= 1
        if self._holders[block] == 0:
            self._last_in(self._kept if keep else self._plain, block)
        return self._holders[block] == 0


@right("06.3", "one dictionary with two ends; only blocks that are held have a count")
class BlockAllocator:
    def __init__(self, num_blocks: int) -> None:
        self.free = OrderedDict((block, True) for block in range(num_blocks))
        self.holders: dict[int, int] = {}

    num_free = property(lambda self: len(self.free))

    def ref_count(self, block: int) -> int:
        return self.holders.get(block, 0)

    def take(self) -> int:
        try:
            block, _ = self.free.popitem(last=False)
        except KeyError:
            raise OutOfBlocks("none is free") from None
        self.holders[block] = 1
        return block

    def hold(self, block: int) -> None:
        self.free.pop(block, None)
        self.holders[block] = self.holders.get(block, 0) + 1

    def drop(self, block: int, *, keep: bool = False) -> bool:
        match self.holders.get(block):
            case None:
                raise ValueError(f"block {block} has no holder")
            case 1:
                del self.holders[block]
                self.free[block] = True
                self.free.move_to_end(block, last=keep)
                return True
            case count:
                self.holders[block] = count - 1
                return False


# 06.4


@wrong("06.4", "room in the last block is forgotten", "refuses tokens that its last block has room for")
class BlockTable:
    def __init__(self, allocator, block_size: int) -> None:
        self.allocator, self.block_size = allocator, block_size
        self.blocks, self.seq_len = [], 0

    def append(self, new_tokens: int) -> list[int]:
        if -(-new_tokens // self.block_size) > self.allocator.num_free:
            raise OutOfBlocks(f"{new_tokens} tokens find no room")
        slots = []
        for _ in range(new_tokens):
            index, place = divmod(self.seq_len, self.block_size)
            if index == len(self.blocks):
                self.blocks.append(self.allocator.take())
            slots.append(self.blocks[index] * self.block_size + place)
            self.seq_len += 1
        return slots

    def fork(self) -> Self:
        other = type(self)(self.allocator, self.block_size)
        other.blocks, other.seq_len = self.blocks.copy(), self.seq_len
        for block in self.blocks:
            self.allocator.hold(block)
        return other

    def release(self) -> None:
        while self.blocks:
            self.allocator.drop(self.blocks.pop())
        self.seq_len = 0


@wrong("06.4", "the next block is taken as soon as one is full", "a block more than the tokens need")
class BlockTable:
    def __init__(self, allocator, block_size: int) -> None:
        self.allocator, self.block_size = allocator, block_size
        self.blocks, self.seq_len = [], 0

    def append(self, new_tokens: int) -> list[int]:
        end = self.seq_len + new_tokens
        missing = end // self.block_size + 1 - len(self.blocks)
        if missing > self.allocator.num_free:
            raise OutOfBlocks(f"{missing} blocks are missing")
        for _ in range(missing):
            self.blocks.append(self.allocator.take())
        slots = [
            self.blocks[p // self.block_size] * self.block_size + p % self.block_size for p in range(self.seq_len, end)
        ]
        self.seq_len = end
        return slots

    def fork(self) -> Self:
        other = type(self)(self.allocator, self.block_size)
        other.blocks, other.seq_len = list(self.blocks), self.seq_len
        for block in other.blocks:
            self.allocator.hold(block)
        return other

    def release(self) -> None:
        for block in reversed(self.blocks):
            self.allocator.drop(block)
        self.blocks, self.seq_len = [], 0


@wrong("06.4", "a fork holds full blocks only", "the last block, half full, is not held once more")
class BlockTable:
    def __init__(self, allocator, block_size: int) -> None:
        self.allocator, self.block_size = allocator, block_size
        self.blocks, self.seq_len = [], 0

    def append(self, new_tokens: int) -> list[int]:
        end = self.seq_len + new_tokens
        missing = -(-end // self.block_size) - len(self.blocks)
        if missing > self.allocator.num_free:
            raise OutOfBlocks(f"{missing} blocks are missing")
        self.blocks += [self.allocator.take() for _ in range(missing)]
        slots = [
            self.blocks[p // self.block_size] * self.block_size + p % self.block_size for p in range(self.seq_len, end)
        ]
        self.seq_len = end
        return slots

    def fork(self) -> Self:
        other = type(self)(self.allocator, self.block_size)
        other.blocks, other.seq_len = list(self.blocks), self.seq_len
        for block in self.blocks[: self.seq_len // self.block_size]:
            self.allocator.hold(block)
        return other

    def release(self) -> None:
        for block in reversed(self.blocks):
            if self.allocator.ref_count(block):
                self.allocator.drop(block)
        self.blocks, self.seq_len = [], 0


@wrong("06.4", "seq_len stays after a release", "a table that was let go of says that it has tokens")
class BlockTable:
    def __init__(self, allocator, block_size: int) -> None:
        self.allocator, self.block_size = allocator, block_size
        self.blocks, self.seq_len = [], 0

    def append(self, new_tokens: int) -> list[int]:
        end = self.seq_len + new_tokens
        missing = -(-end // self.block_size) - len(self.blocks)
        if missing > self.allocator.num_free:
            raise OutOfBlocks(f"{missing} blocks are missing")
        self.blocks += [self.allocator.take() for _ in range(missing)]
        slots = [
            self.blocks[p // self.block_size] * self.block_size + p % self.block_size for p in range(self.seq_len, end)
        ]
        self.seq_len = end
        return slots

    def fork(self) -> Self:
        other = type(self)(self.allocator, self.block_size)
        other.blocks, other.seq_len = list(self.blocks), self.seq_len
        for block in other.blocks:
            self.allocator.hold(block)
        return other

    def release(self) -> None:
        while self.blocks:
            self.allocator.drop(self.blocks.pop())


@wrong("06.4", "slots counted on from the first one", "right only while the blocks lie one behind the other")
class BlockTable:
    def __init__(self, allocator, block_size: int) -> None:
        self.allocator, self.block_size = allocator, block_size
        self.blocks, self.seq_len = [], 0

    def append(self, new_tokens: int) -> list[int]:
        if new_tokens == 0:
            return []
        end = self.seq_len + new_tokens
        missing = -(-end // self.block_size) - len(self.blocks)
        if missing > self.allocator.num_free:
            raise OutOfBlocks(f"{missing} blocks are missing")
        self.blocks += [self.allocator.take() for _ in range(missing)]
        first = self.blocks[self.seq_len // self.block_size] * self.block_size + self.seq_len % self.block_size
        self.seq_len = end
        return list(range(first, first + new_tokens))

    def fork(self) -> Self:
        other = type(self)(self.allocator, self.block_size)
        other.blocks, other.seq_len = list(self.blocks), self.seq_len
        for block in other.blocks:
            self.allocator.hold(block)
        return other

    def release(self) -> None:
        while self.blocks:
            self.allocator.drop(self.blocks.pop())
        self.seq_len = 0


@wrong("06.4", "blocks are given back, the tokens stay counted", "after OutOfBlocks seq_len has grown")
class BlockTable:
    def __init__(self, allocator, block_size: int) -> None:
        self.allocator, self.block_size = allocator, block_size
        self.blocks, self.seq_len = [], 0

    def append(self, new_tokens: int) -> list[int]:
        begin = self.seq_len
        self.seq_len += new_tokens
        missing = math.ceil(self.seq_len / self.block_size) - len(self.blocks)
        if missing > self.allocator.num_free:
            raise OutOfBlocks(f"{missing} blocks are missing")
        for _ in range(missing):
            self.blocks.append(self.allocator.take())
        size = self.block_size
        return [self.blocks[p // size] * size + p % size for p in range(begin, self.seq_len)]

    def fork(self) -> Self:
        other = type(self)(self.allocator, self.block_size)
        other.blocks, other.seq_len = list(self.blocks), self.seq_len
        for block in other.blocks:
            self.allocator.hold(block)
        return other

    def release(self) -> None:
        while self.blocks:
            self.allocator.drop(self.blocks.pop())
        self.seq_len = 0


@wrong(
    "06.4",
    "takes what there is and gives it back",
    "nothing changed: kept blocks that were taken and given back are now taken first",
)
class BlockTable:
    def __init__(self, allocator, block_size: int) -> None:
        self.allocator, self.block_size = allocator, block_size
        self.blocks, self.seq_len = [], 0

    def append(self, new_tokens: int) -> list[int]:
        end = self.seq_len + new_tokens
        taken = []
        try:
            while (len(self.blocks) + len(taken)) * self.block_size < end:
                taken.append(self.allocator.take())
        except OutOfBlocks:
            for block in taken:
                self.allocator.drop(block)
            raise
        self.blocks += taken
        size = self.block_size
        slots = [self.blocks[p // size] * size + p % size for p in range(self.seq_len, end)]
        self.seq_len = end
        return slots

    def fork(self) -> Self:
        other = type(self)(self.allocator, self.block_size)
        other.blocks, other.seq_len = list(self.blocks), self.seq_len
        for block in other.blocks:
            self.allocator.hold(block)
        return other

    def release(self) -> None:
        while self.blocks:
            self.allocator.drop(self.blocks.pop())
        self.seq_len = 0


@right("06.4", "copy.copy, slots cut out of whole blocks")
class BlockTable:
    def __init__(self, allocator, block_size: int) -> None:
        self.allocator = allocator
        self.block_size = block_size
        self.blocks: list[int] = []
        self.seq_len = 0

    def append(self, new_tokens: int) -> list[int]:
        size, (first, place) = self.block_size, divmod(self.seq_len, self.block_size)
        empty = len(self.blocks) * size - self.seq_len
        wanted = math.ceil(max(0, new_tokens - empty) / size)
        if self.allocator.num_free < wanted:
            raise OutOfBlocks(f"{wanted} blocks wanted, {self.allocator.num_free} are free")
        self.blocks.extend(self.allocator.take() for _ in range(wanted))
        room = [slot for block in self.blocks[first:] for slot in range(block * size, (block + 1) * size)]
        self.seq_len += new_tokens
        return room[place : place + new_tokens]

    def fork(self) -> Self:
        twin = copy.copy(self)
        twin.blocks = [*map(self._held, self.blocks)]
        return twin

    def _held(self, block: int) -> int:
        self.allocator.hold(block)
        return block

    def release(self) -> None:
        blocks, self.blocks, self.seq_len = self.blocks, [], 0
        for block in blocks[::-1]:
            self.allocator.drop(block)


@right("06.4", "a list of slots, its length a property")
class BlockTable:
    __slots__ = ("_slots", "allocator", "block_size", "blocks")

    def __init__(self, allocator, block_size: int) -> None:
        self.allocator, self.block_size = allocator, block_size
        self.blocks, self._slots = [], []

    @property
    def seq_len(self) -> int:
        return len(self._slots)

    def append(self, new_tokens: int) -> list[int]:
        before = self.seq_len
        positions = range(before, before + new_tokens)
        if sum(p % self.block_size == 0 for p in positions) > self.allocator.num_free:
            raise OutOfBlocks("too few blocks are free")
        for position in positions:
            if position % self.block_size == 0:
                self.blocks.append(self.allocator.take())
            self._slots.append(self.blocks[-1] * self.block_size + position % self.block_size)
        return self._slots[before:]

    def fork(self) -> Self:
        other = self.__class__(self.allocator, self.block_size)
        for block in self.blocks:
            self.allocator.hold(block)
            other.blocks.append(block)
        other._slots.extend(self._slots)
        return other

    def release(self) -> None:
        self._slots.clear()
        while self.blocks:
            self.allocator.drop(self.blocks.pop())


# 06.5


@wrong("06.5", "only the scores are masked", "NaN behind a row's last token: 0 times NaN is NaN")
def paged_attention(q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    blocks = block_table.long().clamp_min(0)
    k, v = (x[blocks].flatten(1, 2).transpose(1, 2) for x in (keys, values))  # [rows, kv heads, slots, head_dim]
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = grouped @ k.mT / math.sqrt(q.shape[-1])
    behind = torch.arange(k.shape[2], device=q.device) >= lengths[:, None]
    weights = scores.masked_fill(behind[:, None, None], float("-inf")).softmax(-1)
    return (weights @ v).flatten(1, 2)


@wrong("06.5", "query head h reads KV head h % num_kv_heads", "neighbouring query heads share a KV head")
def paged_attention(q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    blocks = block_table.long().clamp_min(0)
    groups = q.shape[1] // keys.shape[2]
    behind = torch.arange(blocks.shape[1] * keys.shape[1], device=q.device) >= lengths[:, None]
    k, v = (x[blocks].flatten(1, 2).masked_fill(behind[..., None, None], 0) for x in (keys, values))
    k, v = k.repeat(1, 1, groups, 1), v.repeat(1, 1, groups, 1)  # [rows, slots, heads, head_dim]
    scores = torch.einsum("rhd,rshd->rhs", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(behind[:, None], float("-inf")).softmax(-1)
    return torch.einsum("rhs,rshd->rhd", weights, v)


@wrong("06.5", "whatever block is in the table counts in full", "slots behind the last token are attended to")
def paged_attention(q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    blocks = block_table.long()
    valid = (blocks >= 0).repeat_interleave(keys.shape[1], dim=1)  # [rows, slots]
    k, v = (x[blocks.clamp_min(0)].flatten(1, 2).nan_to_num().transpose(1, 2) for x in (keys, values))
    out = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, None], k, v, attn_mask=valid[:, None, None], enable_gqa=True
    )
    return out[:, :, 0]


@wrong("06.5", "the whole memory for every query head", "the memory is copied, and more than once")
def paged_attention(q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    groups = q.shape[1] // keys.shape[2]
    keys, values = keys.repeat_interleave(groups, dim=2), values.repeat_interleave(groups, dim=2)
    out = torch.empty_like(q)
    for row, length in enumerate(lengths.tolist()):
        blocks = block_table[row, : -(-length // keys.shape[1])].long()
        k, v = (x[blocks].flatten(0, 1)[:length].transpose(0, 1) for x in (keys, values))
        scores = (q[row][:, None] @ k.mT).float() / math.sqrt(q.shape[-1])
        out[row] = (scores.softmax(-1).to(v.dtype) @ v)[:, 0]
    return out


@wrong(
    "06.5",
    "what lies behind is wiped where it lies",
    "the memory has changed, and a row that shares the block loses tokens",
)
def paged_attention(q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    size = keys.shape[1]
    for row, length in enumerate(lengths.tolist()):
        if length % size:
            last = block_table[row, length // size]
            keys[last, length % size :] = 0
            values[last, length % size :] = 0
    out = torch.empty_like(q)
    for row, length in enumerate(lengths.tolist()):
        blocks = block_table[row, : -(-length // size)].long()
        k, v = (x[blocks].flatten(0, 1)[:length].transpose(0, 1)[None] for x in (keys, values))
        query = q[row][None, :, None]
        out[row] = torch.nn.functional.scaled_dot_product_attention(query, k, v, enable_gqa=True)[0, :, 0]
    return out


@wrong("06.5", "float32 comes back", "the dtype of q is asked for")
def paged_attention(q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    size = keys.shape[1]
    rows = []
    for row, length in enumerate(lengths.tolist()):
        blocks = block_table[row, : -(-length // size)].long()
        k, v = (x[blocks].flatten(0, 1)[:length].float() for x in (keys, values))
        query = q[row].float().unflatten(0, (keys.shape[2], -1))  # [kv heads, group, head_dim]
        scores = torch.einsum("kgd,skd->kgs", query, k) / math.sqrt(q.shape[-1])
        rows.append(torch.einsum("kgs,skd->kgd", scores.softmax(-1), v).flatten(0, 1))
    return torch.stack(rows)


@right("06.5", "row by row, only its own tokens, PyTorch's attention")
def paged_attention(q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    size, groups = keys.shape[1], q.shape[1] // keys.shape[2]
    out = torch.empty_like(q)
    for query, table, length, place in zip(q, block_table.tolist(), lengths.tolist(), out, strict=True):
        blocks = table[: (length + size - 1) // size]
        k, v = (torch.cat([x[block] for block in blocks])[:length].movedim(1, 0) for x in (keys, values))
        grouped = query.reshape(keys.shape[2], groups, -1)  # the heads of a group as so many queries
        place.copy_(torch.nn.functional.scaled_dot_product_attention(grouped[None], k[None], v[None])[0].flatten(0, 1))
    return out


@right("06.5", "one column of the table at a time, the softmax as in a kernel")
def paged_attention(q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    size, kv_heads = keys.shape[1:3]
    query = q.to(wide).unflatten(1, (kv_heads, -1)) * q.shape[-1] ** -0.5  # [rows, kv heads, group, head_dim]
    top = query.new_full((*query.shape[:3], 1), float("-inf"))
    total, out = torch.zeros_like(top), torch.zeros_like(query)
    for column in range((int(lengths.max()) + size - 1) // size):
        blocks = block_table[:, column].clamp(min=0).long()
        place = torch.arange(column * size, (column + 1) * size, device=q.device)
        here = place < lengths[:, None]  # [rows, size]
        k, v = (torch.where(here[..., None, None], x[blocks], 0).to(wide) for x in (keys, values))
        scores = torch.einsum("rkgd,rskd->rkgs", query, k)
        scores = torch.where(here[:, None, None], scores, float("-inf"))
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        weights, shrink = (scores - new_top).exp(), (top - new_top).exp()
        total = total * shrink + weights.sum(-1, keepdim=True)
        out = out * shrink + torch.einsum("rkgs,rskd->rkgd", weights, v)
        top = new_top
    return (out / total).reshape(q.shape).to(q.dtype)


# 06.6


@wrong("06.6", "drops before it takes", "when none is free, the block has a holder fewer all the same")
def copy_on_write(table) -> list[tuple[int, int]]:
    if table.seq_len % table.block_size == 0:
        return []
    old = table.blocks[-1]
    if table.allocator.ref_count(old) == 1:
        return []
    table.allocator.drop(old)
    table.blocks[-1] = table.allocator.take()
    return [(old, table.blocks[-1])]


@wrong("06.6", "the shared block is never dropped", "the old block counts a holder that does not have it any more")
def copy_on_write(table) -> list[tuple[int, int]]:
    if table.seq_len % table.block_size and table.allocator.ref_count(table.blocks[-1]) > 1:
        old, table.blocks[-1] = table.blocks[-1], table.allocator.take()
        return [(old, table.blocks[-1])]
    return []


@wrong("06.6", "every shared block is copied", "only the block that is written into needs a copy")
def copy_on_write(table) -> list[tuple[int, int]]:
    if table.seq_len % table.block_size == 0:
        return []
    shared = [i for i, block in enumerate(table.blocks) if table.allocator.ref_count(block) > 1]
    if not shared or shared[-1] != len(table.blocks) - 1:
        return []
    if len(shared) > table.allocator.num_free:
        raise OutOfBlocks("too few blocks are free")
    copies = []
    for i in shared:
        old, new = table.blocks[i], table.allocator.take()
        table.allocator.drop(old)
        table.blocks[i] = new
        copies.append((old, new))
    return copies


@wrong(
    "06.6",
    "when none is free, nothing is copied and nothing said",
    "OutOfBlocks: else the next token goes into a shared block",
)
def copy_on_write(table) -> list[tuple[int, int]]:
    last = table.seq_len // table.block_size
    if last == len(table.blocks) or table.allocator.ref_count(table.blocks[last]) < 2:
        return []
    try:
        new = table.allocator.take()
    except OutOfBlocks:
        return []
    old, table.blocks[last] = table.blocks[last], new
    table.allocator.drop(old)
    return [(old, new)]


@wrong(
    "06.6",
    "the copy comes behind the shared block",
    "the shared block is still in the table: in its place, not behind it",
)
def copy_on_write(table) -> list[tuple[int, int]]:
    if table.seq_len % table.block_size == 0 or table.allocator.ref_count(table.blocks[-1]) == 1:
        return []
    new = table.allocator.take()
    old = table.blocks[-1]
    table.allocator.drop(old)
    table.blocks.append(new)
    return [(old, new)]


@wrong(
    "06.6", "whoever shares gets a copy, also of a full block", "a token that opens a block of its own needs no copy"
)
def copy_on_write(table) -> list[tuple[int, int]]:
    *before, last = table.blocks or [None]
    if last is None or table.allocator.ref_count(last) <= 1:
        return []
    new = table.allocator.take()
    table.allocator.drop(last)
    table.blocks = [*before, new]
    return [(last, new)]


@right("06.6", "a list of at most one")
def copy_on_write(table) -> list[tuple[int, int]]:
    allocator, at = table.allocator, table.seq_len // table.block_size
    shared = [block for block in table.blocks[at : at + 1] if allocator.ref_count(block) >= 2]
    copies = [(block, allocator.take()) for block in shared]
    for index, (old, new) in enumerate(copies, start=at):
        table.blocks[index : index + 1] = [new]
        allocator.drop(old)
    return copies


@right("06.6", "asks for every case, and whether a block is free")
def copy_on_write(table) -> list[tuple[int, int]]:
    opens_a_block = not table.seq_len % table.block_size
    if opens_a_block or not table.blocks:
        return []
    if not table.allocator.ref_count(old := table.blocks[-1]) > 1:
        return []
    if table.allocator.num_free < 1:
        raise OutOfBlocks(f"no block is free for a copy of block {old}")
    new = table.allocator.take()
    table.blocks.pop()
    table.blocks.append(new)
    still_held = not table.allocator.drop(old)
    assert still_held
    return [(old, new)]


# 06.7


@wrong("06.7", "only the block's own tokens are compared", "a collision: what stood before the block was another text")
def reusable(tokens: list[int], found: Mapping[int, Written], block_size: int, salt: str) -> list[int]:
    blocks, key = [], salt
    for start in range(0, (len(tokens) - 1) // block_size * block_size, block_size):
        own = tuple(tokens[start : start + block_size])
        key = chain(key, own)
        hit = found.get(key)
        if hit is None or hit.salt != salt or tuple(hit.tokens[-block_size:]) != own:
            break
        blocks.append(hit.block)
    return blocks


@wrong(
    "06.7", "goes on behind a block that is not found", "blocks behind a gap: the beginning ends with the first miss"
)
def reusable(tokens: list[int], found: Mapping[int, Written], block_size: int, salt: str) -> list[int]:
    blocks, key = [], salt
    for end in range(block_size, len(tokens), block_size):
        key = chain(key, tuple(tokens[end - block_size : end]))
        if key in found:
            hit = found[key]
            if hit.salt == salt and list(hit.tokens) == tokens[:end]:
                blocks.append(hit.block)
    return blocks


@wrong("06.7", "the salt is in the key only", "a collision: written for another salt")
def reusable(tokens: list[int], found: Mapping[int, Written], block_size: int, salt: str) -> list[int]:
    blocks, key = [], salt
    for end in range(block_size, len(tokens), block_size):
        key = chain(key, tuple(tokens[end - block_size : end]))
        hit = found.get(key)
        if hit is None or list(hit.tokens) != list(tokens[:end]):
            break
        blocks.append(hit.block)
    return blocks


@wrong("06.7", "a prompt of whole blocks loses the last block found", "fewer found than there are: nothing to give up")
def reusable(tokens: list[int], found: Mapping[int, Written], block_size: int, salt: str) -> list[int]:
    blocks, key = [], salt
    for end in range(block_size, len(tokens) + 1, block_size):
        key = chain(key, tuple(tokens[end - block_size : end]))
        hit = found.get(key)
        if hit is None or hit.salt != salt or list(hit.tokens) != list(tokens[:end]):
            break
        blocks.append(hit.block)
    if blocks and len(tokens) % block_size == 0:
        blocks.pop()
    return blocks


@wrong("06.7", "a collision is an error", "two texts may have one key: then it is not reused, that is all")
def reusable(tokens: list[int], found: Mapping[int, Written], block_size: int, salt: str) -> list[int]:
    blocks, key = [], salt
    for end in range(block_size, len(tokens), block_size):
        key = chain(key, tuple(tokens[end - block_size : end]))
        if key not in found:
            break
        hit = found[key]
        if (hit.salt, list(hit.tokens)) != (salt, list(tokens[:end])):
            raise ValueError(f"key {key} stands for another text")
        blocks.append(hit.block)
    return blocks


@wrong("06.7", "one token too many is spared", "only the last token is left out: of 33 tokens two blocks of 16 serve")
def reusable(tokens: list[int], found: Mapping[int, Written], block_size: int, salt: str) -> list[int]:
    blocks, key = [], salt
    for end in range(block_size, len(tokens) - 1, block_size):
        key = chain(key, tuple(tokens[end - block_size : end]))
        hit = found.get(key)
        if hit is None or hit.salt != salt or list(hit.tokens) != list(tokens[:end]):
            break
        blocks.append(hit.block)
    return blocks


@right("06.7", "accumulated keys, taken while they are found")
def reusable(tokens: list[int], found: Mapping[int, Written], block_size: int, salt: str) -> list[int]:
    whole = (len(tokens) - 1) // block_size if tokens else 0
    pieces = (tuple(tokens[i * block_size : (i + 1) * block_size]) for i in range(whole))
    keys = accumulate(pieces, chain, initial=salt)
    next(keys)  # the salt itself
    hits = ((found.get(key), number * block_size) for number, key in enumerate(keys, start=1))

    def same(hit_and_end: tuple) -> bool:
        hit, end = hit_and_end
        return hit is not None and hit.salt == salt and tuple(hit.tokens) == tuple(tokens[:end])

    return [hit.block for hit, _ in takewhile(same, hits)]


@right("06.7", "a walk with try, compared token by token")
def reusable(tokens: list[int], found: Mapping[int, Written], block_size: int, salt: str) -> list[int]:
    blocks: list[int] = []
    key: object = salt
    rest = list(tokens)[:-1]  # the last one is run
    seen: list[int] = []
    while len(rest) >= block_size:
        own, rest = rest[:block_size], rest[block_size:]
        seen += own
        key = chain(key, tuple(own))
        try:
            hit = found[key]
        except KeyError:
            return blocks
        same_length = len(hit.tokens) == len(seen)
        if not same_length or hit.salt != salt or any(a != b for a, b in zip(hit.tokens, seen, strict=True)):
            return blocks
        blocks += [hit.block]
    return blocks


# 06.8


@wrong("06.8", "the first row's table for every row", "each row has a row of the table")
def paged_decode(
    q_ptr, keys_ptr, values_ptr, table_ptr, lengths_ptr, out_ptr, scale, blocks_per_row, num_heads, num_kv_heads,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // (num_heads // num_kv_heads)
    place, dim = tl.arange(0, BLOCK_SIZE), tl.arange(0, HEAD_DIM)
    at = (row * num_heads + head) * HEAD_DIM + dim
    q = tl.load(q_ptr + at).to(tl.float32)
    length = tl.load(lengths_ptr + row)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    out = tl.zeros([HEAD_DIM], tl.float32)
    for start in range(0, length, BLOCK_SIZE):
        block = tl.load(table_ptr + start // BLOCK_SIZE)
        here = start + place < length
        slot = block.to(tl.int64) * BLOCK_SIZE + place
        number = (slot * num_kv_heads + kv_head)[:, None] * HEAD_DIM + dim[None, :]  # [BLOCK_SIZE, HEAD_DIM]
        k = tl.load(keys_ptr + number, mask=here[:, None], other=0.0).to(tl.float32)
        v = tl.load(values_ptr + number, mask=here[:, None], other=0.0).to(tl.float32)
        scores = tl.where(here, tl.sum(q[None, :] * k, axis=1) * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=0))
        weights, shrink = tl.exp(scores - new_top), tl.exp(top - new_top)
        total = total * shrink + tl.sum(weights, axis=0)
        out = out * shrink + tl.sum(weights[:, None] * v, axis=0)
        top = new_top
    tl.store(out_ptr + at, out / total)


@wrong("06.8", "places compared with the whole length", "a row's last block: slots behind the last token count")
def paged_decode(
    q_ptr, keys_ptr, values_ptr, table_ptr, lengths_ptr, out_ptr, scale, blocks_per_row, num_heads, num_kv_heads,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // (num_heads // num_kv_heads)
    place, dim = tl.arange(0, BLOCK_SIZE), tl.arange(0, HEAD_DIM)
    at = (row * num_heads + head) * HEAD_DIM + dim
    q = tl.load(q_ptr + at).to(tl.float32)
    length = tl.load(lengths_ptr + row)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    out = tl.zeros([HEAD_DIM], tl.float32)
    for start in range(0, length, BLOCK_SIZE):
        block = tl.load(table_ptr + row * blocks_per_row + start // BLOCK_SIZE)
        here = place < length
        slot = block.to(tl.int64) * BLOCK_SIZE + place
        number = (slot * num_kv_heads + kv_head)[:, None] * HEAD_DIM + dim[None, :]  # [BLOCK_SIZE, HEAD_DIM]
        k = tl.load(keys_ptr + number, mask=here[:, None], other=0.0).to(tl.float32)
        v = tl.load(values_ptr + number, mask=here[:, None], other=0.0).to(tl.float32)
        scores = tl.where(here, tl.sum(q[None, :] * k, axis=1) * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=0))
        weights, shrink = tl.exp(scores - new_top), tl.exp(top - new_top)
        total = total * shrink + tl.sum(weights, axis=0)
        out = out * shrink + tl.sum(weights[:, None] * v, axis=0)
        top = new_top
    tl.store(out_ptr + at, out / total)


@wrong("06.8", "one slot too many", "the slot behind the last token counts")
def paged_decode(
    q_ptr, keys_ptr, values_ptr, table_ptr, lengths_ptr, out_ptr, scale, blocks_per_row, num_heads, num_kv_heads,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // (num_heads // num_kv_heads)
    place, dim = tl.arange(0, BLOCK_SIZE), tl.arange(0, HEAD_DIM)
    at = (row * num_heads + head) * HEAD_DIM + dim
    q = tl.load(q_ptr + at).to(tl.float32)
    length = tl.load(lengths_ptr + row)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    out = tl.zeros([HEAD_DIM], tl.float32)
    for start in range(0, length, BLOCK_SIZE):
        block = tl.load(table_ptr + row * blocks_per_row + start // BLOCK_SIZE)
        here = start + place <= length
        slot = block.to(tl.int64) * BLOCK_SIZE + place
        number = (slot * num_kv_heads + kv_head)[:, None] * HEAD_DIM + dim[None, :]  # [BLOCK_SIZE, HEAD_DIM]
        k = tl.load(keys_ptr + number, mask=here[:, None], other=0.0).to(tl.float32)
        v = tl.load(values_ptr + number, mask=here[:, None], other=0.0).to(tl.float32)
        scores = tl.where(here, tl.sum(q[None, :] * k, axis=1) * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=0))
        weights, shrink = tl.exp(scores - new_top), tl.exp(top - new_top)
        total = total * shrink + tl.sum(weights, axis=0)
        out = out * shrink + tl.sum(weights[:, None] * v, axis=0)
        top = new_top
    tl.store(out_ptr + at, out / total)


@wrong(
    "06.8",
    "what fills the last block, for every block",
    "blocks before the last one are full; a full last block has no rest",
)
def paged_decode(
    q_ptr, keys_ptr, values_ptr, table_ptr, lengths_ptr, out_ptr, scale, blocks_per_row, num_heads, num_kv_heads,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // (num_heads // num_kv_heads)
    place, dim = tl.arange(0, BLOCK_SIZE), tl.arange(0, HEAD_DIM)
    at = (row * num_heads + head) * HEAD_DIM + dim
    q = tl.load(q_ptr + at).to(tl.float32)
    length = tl.load(lengths_ptr + row)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    out = tl.zeros([HEAD_DIM], tl.float32)
    for start in range(0, length, BLOCK_SIZE):
        block = tl.load(table_ptr + row * blocks_per_row + start // BLOCK_SIZE)
        here = place < length % BLOCK_SIZE
        slot = block.to(tl.int64) * BLOCK_SIZE + place
        number = (slot * num_kv_heads + kv_head)[:, None] * HEAD_DIM + dim[None, :]  # [BLOCK_SIZE, HEAD_DIM]
        k = tl.load(keys_ptr + number, mask=here[:, None], other=0.0).to(tl.float32)
        v = tl.load(values_ptr + number, mask=here[:, None], other=0.0).to(tl.float32)
        scores = tl.where(here, tl.sum(q[None, :] * k, axis=1) * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=0))
        weights, shrink = tl.exp(scores - new_top), tl.exp(top - new_top)
        total = total * shrink + tl.sum(weights, axis=0)
        out = out * shrink + tl.sum(weights[:, None] * v, axis=0)
        top = new_top
    tl.store(out_ptr + at, out / total)


@wrong(
    "06.8",
    "every slot of a block that the table names",
    "the table names blocks; length says how many slots hold tokens",
)
def paged_decode(
    q_ptr, keys_ptr, values_ptr, table_ptr, lengths_ptr, out_ptr, scale, blocks_per_row, num_heads, num_kv_heads,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // (num_heads // num_kv_heads)
    place, dim = tl.arange(0, BLOCK_SIZE), tl.arange(0, HEAD_DIM)
    at = (row * num_heads + head) * HEAD_DIM + dim
    q = tl.load(q_ptr + at).to(tl.float32)
    length = tl.load(lengths_ptr + row)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    out = tl.zeros([HEAD_DIM], tl.float32)
    for start in range(0, length, BLOCK_SIZE):
        block = tl.load(table_ptr + row * blocks_per_row + start // BLOCK_SIZE)
        here = (place >= 0) & (block >= 0)
        slot = block.to(tl.int64) * BLOCK_SIZE + place
        number = (slot * num_kv_heads + kv_head)[:, None] * HEAD_DIM + dim[None, :]  # [BLOCK_SIZE, HEAD_DIM]
        k = tl.load(keys_ptr + number, mask=here[:, None], other=0.0).to(tl.float32)
        v = tl.load(values_ptr + number, mask=here[:, None], other=0.0).to(tl.float32)
        scores = tl.where(here, tl.sum(q[None, :] * k, axis=1) * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=0))
        weights, shrink = tl.exp(scores - new_top), tl.exp(top - new_top)
        total = total * shrink + tl.sum(weights, axis=0)
        out = out * shrink + tl.sum(weights[:, None] * v, axis=0)
        top = new_top
    tl.store(out_ptr + at, out / total)


@wrong("06.8", "the table read down its columns", "a row's blocks lie one behind the other, blocks_per_row to a row")
def paged_decode(
    q_ptr, keys_ptr, values_ptr, table_ptr, lengths_ptr, out_ptr, scale, blocks_per_row, num_heads, num_kv_heads,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // (num_heads // num_kv_heads)
    place, dim = tl.arange(0, BLOCK_SIZE), tl.arange(0, HEAD_DIM)
    at = (row * num_heads + head) * HEAD_DIM + dim
    q = tl.load(q_ptr + at).to(tl.float32)
    length = tl.load(lengths_ptr + row)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    out = tl.zeros([HEAD_DIM], tl.float32)
    for start in range(0, length, BLOCK_SIZE):
        block = tl.load(table_ptr + start // BLOCK_SIZE * tl.num_programs(0) + row)
        here = start + place < length
        slot = block.to(tl.int64) * BLOCK_SIZE + place
        number = (slot * num_kv_heads + kv_head)[:, None] * HEAD_DIM + dim[None, :]  # [BLOCK_SIZE, HEAD_DIM]
        k = tl.load(keys_ptr + number, mask=here[:, None], other=0.0).to(tl.float32)
        v = tl.load(values_ptr + number, mask=here[:, None], other=0.0).to(tl.float32)
        scores = tl.where(here, tl.sum(q[None, :] * k, axis=1) * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=0))
        weights, shrink = tl.exp(scores - new_top), tl.exp(top - new_top)
        total = total * shrink + tl.sum(weights, axis=0)
        out = out * shrink + tl.sum(weights[:, None] * v, axis=0)
        top = new_top
    tl.store(out_ptr + at, out / total)


@right("06.8", "a pointer of the row's own, and what is left")
def paged_decode(
    q_ptr, keys_ptr, values_ptr, table_ptr, lengths_ptr, out_ptr, scale, blocks_per_row, num_heads, num_kv_heads,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // (num_heads // num_kv_heads)
    place, dim = tl.arange(0, BLOCK_SIZE), tl.arange(0, HEAD_DIM)
    at = (row * num_heads + head) * HEAD_DIM + dim
    q = tl.load(q_ptr + at).to(tl.float32)
    length = tl.load(lengths_ptr + row)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    out = tl.zeros([HEAD_DIM], tl.float32)
    for start in range(0, length, BLOCK_SIZE):
        own_table = table_ptr + row * blocks_per_row
        left = length - start
        block = tl.load(own_table + tl.cdiv(start, BLOCK_SIZE))
        here = place < left
        slot = block.to(tl.int64) * BLOCK_SIZE + place
        number = (slot * num_kv_heads + kv_head)[:, None] * HEAD_DIM + dim[None, :]  # [BLOCK_SIZE, HEAD_DIM]
        k = tl.load(keys_ptr + number, mask=here[:, None], other=0.0).to(tl.float32)
        v = tl.load(values_ptr + number, mask=here[:, None], other=0.0).to(tl.float32)
        scores = tl.where(here, tl.sum(q[None, :] * k, axis=1) * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=0))
        weights, shrink = tl.exp(scores - new_top), tl.exp(top - new_top)
        total = total * shrink + tl.sum(weights, axis=0)
        out = out * shrink + tl.sum(weights[:, None] * v, axis=0)
        top = new_top
    tl.store(out_ptr + at, out / total)


@right("06.8", "the index by another way, and not behind")
def paged_decode(
    q_ptr, keys_ptr, values_ptr, table_ptr, lengths_ptr, out_ptr, scale, blocks_per_row, num_heads, num_kv_heads,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // (num_heads // num_kv_heads)
    place, dim = tl.arange(0, BLOCK_SIZE), tl.arange(0, HEAD_DIM)
    at = (row * num_heads + head) * HEAD_DIM + dim
    q = tl.load(q_ptr + at).to(tl.float32)
    length = tl.load(lengths_ptr + row)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    out = tl.zeros([HEAD_DIM], tl.float32)
    for start in range(0, length, BLOCK_SIZE):
        block = tl.load(table_ptr + (row * blocks_per_row * BLOCK_SIZE + start) // BLOCK_SIZE)
        here = (length - 1 - start - place) >= 0
        slot = block.to(tl.int64) * BLOCK_SIZE + place
        number = (slot * num_kv_heads + kv_head)[:, None] * HEAD_DIM + dim[None, :]  # [BLOCK_SIZE, HEAD_DIM]
        k = tl.load(keys_ptr + number, mask=here[:, None], other=0.0).to(tl.float32)
        v = tl.load(values_ptr + number, mask=here[:, None], other=0.0).to(tl.float32)
        scores = tl.where(here, tl.sum(q[None, :] * k, axis=1) * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=0))
        weights, shrink = tl.exp(scores - new_top), tl.exp(top - new_top)
        total = total * shrink + tl.sum(weights, axis=0)
        out = out * shrink + tl.sum(weights[:, None] * v, axis=0)
        top = new_top
    tl.store(out_ptr + at, out / total)


# 06.9


@wrong("06.9", "blocks that are shared cost nothing", "each block of a request costs, whatever is in it")
def best_block_size(
    lengths: list[int], shared: list[int], sizes: list[int], slot_cost: float, block_cost: float
) -> int:
    def cost(size: int) -> float:
        slots = sum(-n % size + s % size for n, s in zip(lengths, shared, strict=True))
        blocks = sum(-(-n // size) - s // size for n, s in zip(lengths, shared, strict=True))
        return slot_cost * slots + block_cost * blocks

    return min(sizes, key=lambda size: (cost(size), size))


@wrong("06.9", "of several the first in the list", "of several the smallest, in whatever order sizes come")
def best_block_size(
    lengths: list[int], shared: list[int], sizes: list[int], slot_cost: float, block_cost: float
) -> int:
    def cost(size: int) -> float:
        slots = sum(-n % size for n in lengths) + sum(s % size for s in shared)
        return slot_cost * slots + block_cost * sum(-(-n // size) for n in lengths)

    return min(sizes, key=cost)


@wrong(
    "06.9", "what a shared beginning lacks to whole blocks", "tokens in no full block: the rest, not what is missing"
)
def best_block_size(
    lengths: list[int], shared: list[int], sizes: list[int], slot_cost: float, block_cost: float
) -> int:
    def cost(size: int) -> float:
        slots = sum(-n % size for n in lengths) + sum(-s % size for s in shared)
        return slot_cost * slots + block_cost * sum(-(-n // size) for n in lengths)

    return min(sorted(sizes), key=cost)


@wrong("06.9", "blocks of all tokens together", "each request has blocks and a last block of its own")
def best_block_size(
    lengths: list[int], shared: list[int], sizes: list[int], slot_cost: float, block_cost: float
) -> int:
    def cost(size: int) -> float:
        blocks = math.ceil(sum(lengths) / size)
        empty = blocks * size - sum(lengths)
        return slot_cost * (empty + sum(s % size for s in shared)) + block_cost * blocks

    return min(sorted(sizes), key=cost)


@wrong("06.9", "a shared token in no full block costs 1", "it costs slot_cost, as an empty slot does")
def best_block_size(
    lengths: list[int], shared: list[int], sizes: list[int], slot_cost: float, block_cost: float
) -> int:
    best, least = 0, math.inf
    for size in sorted(sizes):
        cost = 0.0
        for tokens, common in zip(lengths, shared, strict=True):
            blocks = math.ceil(tokens / size)
            cost += slot_cost * (blocks * size - tokens) + (common - common // size * size) + block_cost * blocks
        if cost < least:
            best, least = size, cost
    return best


@wrong("06.9", "a full last block counts as empty", "a length that the size divides leaves no slot empty")
def best_block_size(
    lengths: list[int], shared: list[int], sizes: list[int], slot_cost: float, block_cost: float
) -> int:
    def cost(size: int) -> float:
        slots = sum(size - n % size for n in lengths) + sum(s % size for s in shared)
        return slot_cost * slots + block_cost * sum(n // size + 1 for n in lengths)

    return min(sorted(sizes), key=cost)


@right("06.9", "a dictionary of costs, the smallest of the cheapest")
def best_block_size(
    lengths: list[int], shared: list[int], sizes: list[int], slot_cost: float, block_cost: float
) -> int:
    costs = {}
    for size in sizes:
        blocks = sum(tokens // size + (tokens % size > 0) for tokens in lengths)
        slots = size * blocks - sum(lengths) + sum(common % size for common in shared)
        costs[size] = slots * slot_cost + blocks * block_cost
    least = min(costs.values())
    return min(size for size, cost in costs.items() if cost == least)


@right("06.9", "sorted, counted by divmod, greater ones only where they cost less")
def best_block_size(
    lengths: list[int], shared: list[int], sizes: list[int], slot_cost: float, block_cost: float
) -> int:
    def counts(size: int) -> tuple[int, int]:
        slots = blocks = 0
        for tokens, common in zip(lengths, shared, strict=True):
            full, rest = divmod(tokens, size)
            blocks += full + 1 if rest else full
            slots += size - rest if rest else 0
            slots += divmod(common, size)[1]
        return slots, blocks

    def cheaper(best: tuple[float, int], size: int) -> tuple[float, int]:
        slots, blocks = counts(size)
        cost = slot_cost * slots + block_cost * blocks
        return (cost, size) if cost < best[0] else best

    first, *others = sorted(set(sizes))
    slots, blocks = counts(first)
    return reduce(cheaper, others, (slot_cost * slots + block_cost * blocks, first))[1]


# 06.d1


@wrong("06.d1", "an empty table stays", "the request still has a table")
def finish(tables: dict[str, list[int]], holders: list[int], free: list[int], request: str) -> None:
    for block in tables.get(request, []):
        holders[block] -= 1
        if holders[block] == 0:
            free.append(block)
    tables[request] = []


@wrong(
    "06.d1", "only what is in free already is left out", "the second call takes Berta's block: the table is still there"
)
def finish(tables: dict[str, list[int]], holders: list[int], free: list[int], request: str) -> None:
    for block in tables.get(request, []):
        holders[block] = max(0, holders[block] - 1)
        if holders[block] == 0 and block not in free:
            free.append(block)


@wrong("06.d1", "pop without a default", "KeyError: a request without a table changes nothing")
def finish(tables: dict[str, list[int]], holders: list[int], free: list[int], request: str) -> None:
    for block in tables.pop(request):
        holders[block] -= 1
        if holders[block] == 0:
            free.append(block)


@wrong("06.d1", "a new list of free blocks", "free is not changed in place")
def finish(tables: dict[str, list[int]], holders: list[int], free: list[int], request: str) -> None:
    blocks = tables.pop(request, [])
    for block in blocks:
        holders[block] -= 1
    free = free + [block for block in blocks if holders[block] == 0]


@wrong("06.d1", "the last holder is not counted down", "a free block has a holder still")
def finish(tables: dict[str, list[int]], holders: list[int], free: list[int], request: str) -> None:
    for block in tables.pop(request, []):
        if holders[block] == 1:
            free.append(block)
        else:
            holders[block] -= 1


@wrong("06.d1", "all its blocks are free at once", "a block that Berta has as well is not free")
def finish(tables: dict[str, list[int]], holders: list[int], free: list[int], request: str) -> None:
    if request in tables:
        blocks = tables.pop(request)
        for block in blocks:
            holders[block] -= 1
        free.extend(blocks)


@right("06.d1", "asks first, deletes, extends")
def finish(tables: dict[str, list[int]], holders: list[int], free: list[int], request: str) -> None:
    if request not in tables:
        return
    blocks = tuple(tables[request])
    del tables[request]
    for block in blocks:
        holders[block] = holders[block] - 1
    free += [block for block in blocks if not holders[block]]


@right("06.d1", "try, and slices")
def finish(tables: dict[str, list[int]], holders: list[int], free: list[int], request: str) -> None:
    try:
        blocks = tables.pop(request)
    except KeyError:
        blocks = []
    for block in reversed(blocks):
        left = holders.__getitem__(block) - 1
        holders[block : block + 1] = [left]
        if left == 0:
            free[len(free) :] = [block]


# 06.d2


@wrong("06.d2", "the row is cleared when it has blocks only", "no blocks: the row before is still there")
def set_row(block_table: Tensor, lengths: Tensor, row: int, blocks: list[int], tokens: int) -> None:
    if blocks:
        block_table[row] = -1
        block_table[row, : len(blocks)] = torch.tensor(blocks, dtype=block_table.dtype)
        lengths[row] = tokens


@wrong("06.d2", "cleared when it has no blocks only", "behind fewer blocks stand those of the request before")
def set_row(block_table: Tensor, lengths: Tensor, row: int, blocks: list[int], tokens: int) -> None:
    if blocks:
        block_table[row, : len(blocks)] = torch.tensor(blocks, dtype=block_table.dtype)
    else:
        block_table[row] = -1
    lengths[row] = tokens


@wrong("06.d2", "the greater length stays", "the tokens of the request before are still counted")
def set_row(block_table: Tensor, lengths: Tensor, row: int, blocks: list[int], tokens: int) -> None:
    block_table[row, : len(blocks)] = torch.tensor(blocks, dtype=block_table.dtype)
    block_table[row, len(blocks) :] = -1
    lengths[row] = max(tokens, int(lengths[row])) if blocks else 0


@wrong("06.d2", "filled with zeros", "0 is a block, and somebody's: -1 is nowhere")
def set_row(block_table: Tensor, lengths: Tensor, row: int, blocks: list[int], tokens: int) -> None:
    block_table[row].zero_()
    block_table[row, : len(blocks)] = torch.tensor(blocks, dtype=block_table.dtype)
    lengths[row] = tokens


@wrong("06.d2", "all rows are cleared", "the other requests have lost their rows")
def set_row(block_table: Tensor, lengths: Tensor, row: int, blocks: list[int], tokens: int) -> None:
    block_table.fill_(-1)
    lengths.zero_()
    block_table[row, : len(blocks)] = torch.tensor(blocks, dtype=block_table.dtype)
    lengths[row] = tokens


@wrong("06.d2", "new tensors", "not in place: the batch's own tables are as they were")
def set_row(block_table: Tensor, lengths: Tensor, row: int, blocks: list[int], tokens: int) -> None:
    padded = torch.tensor(blocks + [-1] * (block_table.shape[1] - len(blocks)), dtype=block_table.dtype)
    here = torch.arange(len(lengths)) == row
    block_table = torch.where(here[:, None], padded, block_table)
    lengths = torch.where(here, tokens, lengths)


@right("06.d2", "entry by entry")
def set_row(block_table: Tensor, lengths: Tensor, row: int, blocks: list[int], tokens: int) -> None:
    for index in range(block_table.shape[1]):
        block_table[row, index] = blocks[index] if index < len(blocks) else -1
    lengths[row] = tokens


@right("06.d2", "a padded row, copied over the old one")
def set_row(block_table: Tensor, lengths: Tensor, row: int, blocks: list[int], tokens: int) -> None:
    own = block_table.new_full((block_table.size(1),), -1)
    own[: len(blocks)] = own.new_tensor(blocks)
    block_table.select(0, row).copy_(own)
    lengths.select(0, row).fill_(tokens)


# 06.d3


@wrong("06.d3", "always a block less", "a longer prompt may reuse all that was found")
def first_chunk(prompt_tokens: int, found_tokens: int, block_size: int, budget: int) -> tuple[int, int]:
    reused = max(0, found_tokens - block_size)
    return reused, min(prompt_tokens - reused, budget)


@wrong("06.d3", "nothing is reused when all was found", "all blocks but the last one may be reused")
def first_chunk(prompt_tokens: int, found_tokens: int, block_size: int, budget: int) -> tuple[int, int]:
    reused = 0 if found_tokens >= prompt_tokens else found_tokens
    return reused, min(prompt_tokens - reused, budget)


@wrong("06.d3", "all reused, and one run all the same", "the last token is reused and run, into a block of others")
def first_chunk(prompt_tokens: int, found_tokens: int, block_size: int, budget: int) -> tuple[int, int]:
    return found_tokens, max(1, min(prompt_tokens - found_tokens, budget))


@wrong("06.d3", "all but the last token", "blocks are reused whole or not at all")
def first_chunk(prompt_tokens: int, found_tokens: int, block_size: int, budget: int) -> tuple[int, int]:
    reused = min(found_tokens, prompt_tokens - 1)
    return reused, min(prompt_tokens - reused, budget)


@wrong("06.d3", "blocks of 16", "block_size need not be 16")
def first_chunk(prompt_tokens: int, found_tokens: int, block_size: int, budget: int) -> tuple[int, int]:
    reused = min(found_tokens, (prompt_tokens - 1) // 16 * 16)
    return reused, min(prompt_tokens - reused, budget)


@wrong("06.d3", "what is reused counts against the budget", "the budget is of tokens that are run")
def first_chunk(prompt_tokens: int, found_tokens: int, block_size: int, budget: int) -> tuple[int, int]:
    reused = min(found_tokens, (prompt_tokens - 1) // block_size * block_size)
    return reused, max(0, min(prompt_tokens, budget) - reused)


@right("06.d3", "a block less, times whether all was found")
def first_chunk(prompt_tokens: int, found_tokens: int, block_size: int, budget: int) -> tuple[int, int]:
    reused = found_tokens - block_size * (found_tokens == prompt_tokens)
    return reused, sorted((budget, prompt_tokens - reused))[0]


@right("06.d3", "the last of a range of whole blocks")
def first_chunk(prompt_tokens: int, found_tokens: int, block_size: int, budget: int) -> tuple[int, int]:
    *_, reused = (end for end in range(0, prompt_tokens, block_size) if end <= found_tokens)
    return reused, budget if prompt_tokens - reused > budget else prompt_tokens - reused
