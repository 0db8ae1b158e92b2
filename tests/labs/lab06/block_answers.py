"""Wrong answers to 06.3, 06.4 and 06.6, and other right ones."""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque

from labkit.cache import OutOfBlocks
from labkit.labs.lab06.references import BlockAllocator, BlockTable
from tests.labs.answer import Wrong

# 06.3


class FreedTwice(BlockAllocator):
    def drop(self, block, *, keep=False):
        self.holders[block] = max(0, self.holders[block] - 1)
        if self.holders[block]:
            return False
        self.free[block] = None
        self.free.move_to_end(block, last=keep)
        return True


class HoldLeavesIt(BlockAllocator):
    def hold(self, block):
        self.holders[block] += 1


class KeepIgnored(BlockAllocator):
    def drop(self, block, *, keep=False):
        return super().drop(block)


class KeepTheOtherWay(BlockAllocator):
    def drop(self, block, *, keep=False):
        return super().drop(block, keep=not keep)


class NewestKeptFirst(BlockAllocator):
    """Plain free blocks in one list, kept ones on a stack."""

    def __init__(self, num_blocks):
        self.plain, self.kept, self.holders = dict.fromkeys(range(num_blocks)), {}, [0] * num_blocks

    @property
    def num_free(self):
        return len(self.plain) + len(self.kept)

    def take(self):
        if not self.num_free:
            raise OutOfBlocks
        block, _ = (self.plain or self.kept).popitem()
        self.holders[block] = 1
        return block

    def hold(self, block):
        self.plain.pop(block, None)
        self.kept.pop(block, None)
        self.holders[block] += 1

    def drop(self, block, *, keep=False):
        if not self.holders[block]:
            raise ValueError
        self.holders[block] -= 1
        if not self.holders[block]:
            (self.kept if keep else self.plain)[block] = None
        return not self.holders[block]


class AList:
    """The free blocks in a list."""

    def __init__(self, num_blocks):
        self.free, self.holders = list(range(num_blocks)), [0] * num_blocks

    @property
    def num_free(self):
        return len(self.free)

    def ref_count(self, block):
        return self.holders[block]

    def take(self):
        if not self.free:
            raise OutOfBlocks
        block = self.free.pop(0)
        self.holders[block] = 1
        return block

    def hold(self, block):
        if self.holders[block] == 0:
            self.free.remove(block)
        self.holders[block] += 1

    def drop(self, block, *, keep=False):
        if not self.holders[block]:
            raise ValueError
        self.holders[block] -= 1
        if not self.holders[block]:
            self.free.insert(len(self.free) if keep else 0, block)
        return not self.holders[block]


class ADeque(AList):
    """Both ends are fast; a search in the middle is not."""

    def __init__(self, num_blocks):
        self.free, self.holders = deque(range(num_blocks)), [0] * num_blocks

    def take(self):
        if not self.free:
            raise OutOfBlocks
        block = self.free.popleft()
        self.holders[block] = 1
        return block

    def drop(self, block, *, keep=False):
        if not self.holders[block]:
            raise ValueError
        self.holders[block] -= 1
        if not self.holders[block]:
            (self.free.append if keep else self.free.appendleft)(block)
        return not self.holders[block]


class HoldersInAList(BlockAllocator):
    """A block stands there once for each who holds it."""

    def __init__(self, num_blocks):
        self.free, self.held = dict.fromkeys(range(num_blocks)), []

    def ref_count(self, block):
        return self.held.count(block)

    def take(self):
        if not self.free:
            raise OutOfBlocks
        block = next(iter(self.free))
        del self.free[block]
        self.held.append(block)
        return block

    def hold(self, block):
        self.free.pop(block, None)
        self.held.append(block)

    def drop(self, block, *, keep=False):
        if block not in self.held:
            raise ValueError
        self.held.remove(block)
        if block in self.held:
            return False
        self.free = {**self.free, block: None} if keep else {block: None, **self.free}
        return True


class HoldersSearched(BlockAllocator):
    """Counts as they should be; what is held is also kept in a list, and looked up there."""

    def __init__(self, num_blocks):
        super().__init__(num_blocks)
        self.held = []

    def take(self):
        self.held.append(super().take())
        return self.held[-1]

    def hold(self, block):
        super().hold(block)
        self.held.append(block)

    def drop(self, block, *, keep=False):
        freed = super().drop(block, keep=keep)
        self.held.remove(block)
        return freed


class FreeIsTheRest(HoldersSearched):
    """num_free from the different blocks that are held."""

    num_free = property(lambda self: len(self.holders) - len(set(self.held)))

    def drop(self, block, *, keep=False):
        freed = BlockAllocator.drop(self, block, keep=keep)
        self.held[self.held.index(block)] = self.held[-1]
        self.held.pop()
        return freed


class CountsAll(BlockAllocator):
    @property
    def num_free(self):
        return sum(count == 0 for count in self.holders)


class CountsHolders(BlockAllocator):
    @property
    def num_free(self):
        return len(self.holders) - sum(self.holders)


class OnTheClass(BlockAllocator):
    holders: list = []  # noqa: RUF012

    def __init__(self, num_blocks):
        super().__init__(num_blocks)
        kept = type(self).holders
        kept += [0] * (num_blocks - len(kept))
        kept[:num_blocks] = [0] * num_blocks
        self.holders = kept


class ClassFree(BlockAllocator):
    free: dict = {}  # noqa: RUF012

    def __init__(self, num_blocks):
        self.free.update((block, None) for block in range(num_blocks) if not self.free)
        self.holders = [0] * num_blocks

    def take(self):
        if not self.free:
            raise OutOfBlocks
        block = next(iter(self.free))
        del self.free[block]
        self.holders[block] = 1
        return block


class Empty(BlockAllocator):
    def take(self):
        block, _ = self.free.popitem(last=False)
        self.holders[block] = 1
        return block


class NoneWhenEmpty(BlockAllocator):
    def take(self):
        return super().take() if self.free else None


class HalfDropped(BlockAllocator):
    def drop(self, block, *, keep=False):
        self.holders[block] -= 1
        if self.holders[block] < 0:
            raise ValueError
        if self.holders[block]:
            return False
        self.free[block] = None
        self.free.move_to_end(block, last=keep)
        return True


class SaysNothing(BlockAllocator):
    def drop(self, block, *, keep=False):
        super().drop(block, keep=keep)


class FreedWhileHeld(BlockAllocator):
    def drop(self, block, *, keep=False):
        if not self.holders[block]:
            raise ValueError
        self.holders[block] -= 1
        self.free[block] = None
        self.free.move_to_end(block, last=keep)
        return not self.holders[block]


class TakesAPair(BlockAllocator):
    def take(self):
        if not self.free:
            raise OutOfBlocks
        block = self.free.popitem(last=False)
        self.holders[block[0]] = 1
        return block


class NotTaken(BlockAllocator):
    def take(self):
        if not self.free:
            raise OutOfBlocks
        block = next(iter(self.free))
        self.holders[block] = 1
        return block


class AMethod(BlockAllocator):
    def num_free(self):
        return len(self.free)


class Asserts(BlockAllocator):
    def drop(self, block, *, keep=False):
        assert self.holders[block]
        return super().drop(block, keep=keep)


class TwoDicts:
    """Plain and kept free blocks apart, one dict a stack and one in order; slots."""

    __slots__ = ("counts", "kept", "plain")

    def __init__(self, num_blocks):
        self.plain, self.kept = {block: 1 for block in range(num_blocks)[::-1]}, OrderedDict()
        self.counts = {}

    num_free = property(lambda self: len(self.plain) + len(self.kept))

    def ref_count(self, block):
        return self.counts.get(block, 0)

    def take(self):
        if not self.num_free:
            raise OutOfBlocks("none left")
        block, _ = self.plain.popitem() if self.plain else self.kept.popitem(last=False)
        self.counts[block] = 1
        return block

    def hold(self, block):
        self.plain.pop(block, 0), self.kept.pop(block, 0)
        self.counts[block] = self.ref_count(block) + 1

    def drop(self, block, *, keep=False):
        left = self.ref_count(block) - 1
        if left < 0:
            raise ValueError("nobody has it")
        if left:
            self.counts[block] = left
        else:
            del self.counts[block]
            (self.kept if keep else self.plain)[block] = 1
        return left == 0


class APlainSet(TwoDicts):
    """What is free and not kept in a set, whose pop() goes on where it last found one."""

    __slots__ = ()

    def __init__(self, num_blocks):
        super().__init__(num_blocks)
        self.plain = set(self.plain)

    def take(self):
        if not self.num_free:
            raise OutOfBlocks("none left")
        block = self.plain.pop() if self.plain else self.kept.popitem(last=False)[0]
        self.counts[block] = 1
        return block

    def hold(self, block):
        self.plain.discard(block), self.kept.pop(block, 0)
        self.counts[block] = self.ref_count(block) + 1

    def drop(self, block, *, keep=False):
        if self.ref_count(block) == 1 and not keep:
            self.plain.add(block)
            return bool(self.counts.pop(block))
        return super().drop(block, keep=keep)


class AHeap:
    """By the time of dropping, stale entries passed over."""

    def __init__(self, num_blocks):
        self.heap = [(0, 0, block) for block in range(num_blocks)]
        self.valid = {block: (0, 0, block) for block in range(num_blocks)}
        self.count, self.clock = [0] * num_blocks, 0

    @property
    def num_free(self):
        return len(self.valid)

    def ref_count(self, block):
        return self.count[block]

    def take(self):
        while self.heap:
            entry = heapq.heappop(self.heap)
            if self.valid.get(entry[2]) == entry:
                del self.valid[entry[2]]
                self.count[entry[2]] = 1
                return entry[2]
        raise OutOfBlocks

    def hold(self, block):
        self.valid.pop(block, None)
        self.count[block] += 1

    def drop(self, block, *, keep=False):
        if self.count[block] < 1:
            raise ValueError(block)
        self.count[block] -= 1
        if self.count[block]:
            return False
        self.clock += 1
        self.valid[block] = (int(keep), self.clock, block)
        heapq.heappush(self.heap, self.valid[block])
        return True


# 06.4


class TooEarly(BlockTable):
    def append(self, new_tokens):
        end = self.seq_len + new_tokens
        more = max(0, end // self.block_size + 1 - len(self.blocks))
        if more > self.allocator.num_free:
            raise OutOfBlocks
        self.blocks += [self.allocator.take() for _ in range(more)]
        first, self.seq_len = self.seq_len, end
        return [self.blocks[p // self.block_size] * self.block_size + p % self.block_size for p in range(first, end)]


class RoundedDown(BlockTable):
    def append(self, new_tokens):
        end = self.seq_len + new_tokens
        more = end // self.block_size - len(self.blocks)
        if more > self.allocator.num_free:
            raise OutOfBlocks
        self.blocks += [self.allocator.take() for _ in range(more)]
        first, self.seq_len = self.seq_len, end
        return [
            self.blocks[p // self.block_size - 1] * self.block_size + p % self.block_size for p in range(first, end)
        ]


class RoomNotUsed(BlockTable):
    def append(self, new_tokens):
        more = -(-new_tokens // self.block_size)
        if more > self.allocator.num_free:
            raise OutOfBlocks
        new = [self.allocator.take() for _ in range(more)]
        self.blocks += new
        self.seq_len += new_tokens
        return [new[p // self.block_size] * self.block_size + p % self.block_size for p in range(new_tokens)]


class OneByOne(BlockTable):
    """Takes until there is none: what was taken by then stays taken."""

    def append(self, new_tokens):
        slots = []
        for _ in range(new_tokens):
            if self.seq_len % self.block_size == 0:
                self.blocks.append(self.allocator.take())
            slots.append(self.blocks[-1] * self.block_size + self.seq_len % self.block_size)
            self.seq_len += 1
        return slots


class LengthFirst(BlockTable):
    def append(self, new_tokens):
        self.seq_len += new_tokens
        more = -(-self.seq_len // self.block_size) - len(self.blocks)
        if more > self.allocator.num_free:
            raise OutOfBlocks
        self.blocks += [self.allocator.take() for _ in range(more)]
        places = range(self.seq_len - new_tokens, self.seq_len)
        return [self.blocks[p // self.block_size] * self.block_size + p % self.block_size for p in places]


class LastSlot(BlockTable):
    def append(self, new_tokens):
        return super().append(new_tokens)[-1:]


class BeginsAnew(BlockTable):
    def append(self, new_tokens):
        super().append(new_tokens)
        return [self.blocks[p // self.block_size] * self.block_size + p % self.block_size for p in range(new_tokens)]


class Positions(BlockTable):
    def append(self, new_tokens):
        super().append(new_tokens)
        return list(range(self.seq_len - new_tokens, self.seq_len))


class LastBlock(BlockTable):
    def append(self, new_tokens):
        super().append(new_tokens)
        places = range(self.seq_len - new_tokens, self.seq_len)
        return [self.blocks[-1] * self.block_size + p % self.block_size for p in places]


class Unequal(BlockTable):
    def append(self, new_tokens):
        end = self.seq_len + new_tokens
        if -(-end // self.block_size) - len(self.blocks) >= self.allocator.num_free:
            raise OutOfBlocks
        return super().append(new_tokens)


class ForkShares(BlockTable):
    def fork(self):
        child = super().fork()
        child.blocks = self.blocks
        return child


class ForkNotHeld(BlockTable):
    def fork(self):
        child = type(self)(self.allocator, self.block_size)
        child.blocks, child.seq_len = list(self.blocks), self.seq_len
        return child


class ForkCopies(BlockTable):
    def fork(self):
        child = type(self)(self.allocator, self.block_size)
        child.append(self.seq_len)
        return child


class ForkLengthless(BlockTable):
    def fork(self):
        child = super().fork()
        child.seq_len = 0
        return child


class ReleasedForwards(BlockTable):
    def release(self):
        for block in self.blocks:
            self.allocator.drop(block)
        self.blocks, self.seq_len = [], 0


class StillThere(BlockTable):
    def release(self):
        for block in reversed(self.blocks):
            self.allocator.drop(block)


class NotDropped(BlockTable):
    def release(self):
        self.blocks, self.seq_len = [], 0


class SharedBlocks(BlockTable):
    blocks: list = []  # noqa: RUF012

    def __init__(self, allocator, block_size):
        self.allocator, self.block_size, self.seq_len = allocator, block_size, 0


class Yields(BlockTable):
    def append(self, new_tokens):
        yield from super().append(new_tokens)


class OneBlock(BlockTable):
    def append(self, new_tokens):
        if self.seq_len + new_tokens > len(self.blocks) * self.block_size:
            self.blocks.append(self.allocator.take())
        first, self.seq_len = self.seq_len, self.seq_len + new_tokens
        return [self.blocks[p // self.block_size] * self.block_size + p % self.block_size
                for p in range(first, self.seq_len)]  # fmt: skip


class WrongError(BlockTable):
    def append(self, new_tokens):
        try:
            return super().append(new_tokens)
        except OutOfBlocks as error:
            raise ValueError from error


class OtherNames(BlockTable):
    def __init__(self, allocator, block_size):
        self.pool, self.block_size, self.blocks, self.seq_len = allocator, block_size, [], 0

    allocator = property(lambda self: None)


class RollsBack:
    """Takes one by one, gives back when it fails; a length that is computed."""

    def __init__(self, allocator, block_size):
        self.allocator = self.pool = allocator
        self.block_size = self.size = block_size
        self.blocks, self.last = [], block_size

    @property
    def seq_len(self):
        return (len(self.blocks) - 1) * self.size + self.last if self.blocks else 0

    def append(self, new_tokens):
        slots, before, last = [], len(self.blocks), self.last
        try:
            for _ in range(new_tokens):
                if self.last == self.size:
                    self.blocks.append(self.pool.take())
                    self.last = 0
                slots.append(self.size * self.blocks[-1] + self.last)
                self.last += 1
        except OutOfBlocks:
            while len(self.blocks) > before:
                self.pool.drop(self.blocks.pop())
            self.last = last
            raise
        return tuple(slots)

    def fork(self):
        twin = RollsBack(self.pool, self.size)
        twin.blocks, twin.last = self.blocks[:], self.last
        for block in twin.blocks:
            self.pool.hold(block)
        return twin

    def release(self):
        while self.blocks:
            self.pool.drop(self.blocks.pop())
        self.last = self.size


class ByDivmod(BlockTable):
    def append(self, new_tokens):
        free, room = self.allocator.num_free, len(self.blocks) * self.block_size - self.seq_len
        if new_tokens > room + free * self.block_size:
            raise OutOfBlocks("no room")
        slots = []
        for place in range(self.seq_len, self.seq_len + new_tokens):
            entry, within = divmod(place, self.block_size)
            if entry == len(self.blocks):
                self.blocks.append(self.allocator.take())
            slots.append(self.blocks[entry] * self.block_size + within)
        self.seq_len += new_tokens
        return slots


# 06.6


def always_copies(table):
    own = table.allocator.take()
    shared, table.blocks[-1] = table.blocks[-1], own
    table.allocator.drop(shared)
    return [(shared, own)]


def begun_copies(table):
    return always_copies(table) if table.seq_len % table.block_size else []


def shared_copies(table):
    if not table.blocks or table.allocator.ref_count(table.blocks[-1]) == 1:
        return []
    return always_copies(table)


def due(table):
    return table.seq_len % table.block_size and table.allocator.ref_count(table.blocks[-1]) > 1


def no_copy(table):
    return []


def only_swapped(table):
    if due(table):
        shared, table.blocks[-1] = table.blocks[-1], table.allocator.take()
        table.allocator.drop(shared)
    return []


def not_released(table):
    if not due(table):
        return []
    shared, table.blocks[-1] = table.blocks[-1], table.allocator.take()
    return [(shared, table.blocks[-1])]


def not_swapped(table):
    if not due(table):
        return []
    own = table.allocator.take()
    table.allocator.drop(table.blocks[-1])
    return [(table.blocks[-1], own)]


def turned_round(table):
    return [pair[::-1] for pair in always_copies(table)] if due(table) else []


def drops_first(table):
    if not due(table):
        return []
    shared = table.blocks[-1]
    table.allocator.drop(shared)
    table.blocks[-1] = table.allocator.take()
    return [(shared, table.blocks[-1])]


def first_block(table):
    if not due(table):
        return []
    shared, table.blocks[0] = table.blocks[0], table.allocator.take()
    table.allocator.drop(shared)
    return [(shared, table.blocks[0])]


def every_block(table):
    if not due(table):
        return []
    copies = []
    for place, shared in enumerate(table.blocks):
        table.blocks[place] = table.allocator.take()
        table.allocator.drop(shared)
        copies.append((shared, table.blocks[place]))
    return copies


def a_pair(table):
    return always_copies(table)[0] if due(table) else []


def nothing_else(table):
    return always_copies(table) if due(table) else None


def looks_first(table):
    shared = table.blocks[-1]
    if table.allocator.ref_count(shared) == 1 or table.seq_len % table.block_size == 0:
        return []
    return always_copies(table)


def exactly_two(table):
    if table.seq_len % table.block_size == 0 or table.allocator.ref_count(table.blocks[-1]) != 2:
        return []
    return always_copies(table)


def by_index(table):
    entry, place = divmod(table.seq_len, table.block_size)
    if not place:
        return []
    old = table.blocks[entry]
    if table.allocator.ref_count(old) < 2:
        return []
    new = table.allocator.take()
    table.allocator.drop(old)
    table.blocks = [*table.blocks[:entry], new]
    return [(old, new)]


def by_generator(table):
    copies = []
    if place := table.seq_len % table.block_size:
        *rest, last = table.blocks
        if place and table.allocator.ref_count(last) > 1:
            table.blocks[:] = [*rest, table.allocator.take()]
            copies.append([last, table.blocks[-1]])
            assert not table.allocator.drop(last)
    return copies


WRONG = [
    Wrong("06.3", "freed-twice", "a block that nobody holds is dropped", FreedTwice, "allocators anywhere"),
    Wrong("06.3", "hold-leaves-it-free", "a free block that is held stays free", HoldLeavesIt),
    Wrong("06.3", "kept-taken-early", "keep makes no difference", KeepIgnored),
    Wrong("06.3", "kept-taken-early", "keep the other way", KeepTheOtherWay),
    Wrong("06.3", "newest-kept-first", "a stack of kept blocks", NewestKeptFirst),
    Wrong("06.3", "not-constant", "list.pop(0) and list.remove", AList, "nano-vllm's free list"),
    Wrong("06.3", "not-constant", "deque.remove", ADeque, "nano-vllm's free list"),
    Wrong("06.3", "not-constant", "num_free counts every block", CountsAll),
    Wrong("06.3", "not-constant", "a list of holders", HoldersInAList),
    Wrong("06.3", "not-constant", "a search through what is held", HoldersSearched),
    Wrong("06.3", "not-constant", "a set of what is held", FreeIsTheRest),
    Wrong("06.3", "num-free-counts-holders", "holders are subtracted, not blocks", CountsHolders),
    Wrong("06.3", "shared", "a list on the class", OnTheClass),
    Wrong("06.3", "shared", "a dict on the class", ClassFree),
    Wrong("06.3", "other-error", "no test for an empty pool", Empty),
    Wrong("06.3", "took-from-none", "None when nothing is free", NoneWhenEmpty),
    Wrong("06.3", "half-done", "counted down before the test", HalfDropped),
    Wrong("06.3", "drop-says-otherwise", "drop returns nothing", SaysNothing),
    Wrong("06.3", "freed-while-held", "free while others hold it", FreedWhileHeld),
    Wrong("06.3", "no-block", "popitem's pair", TakesAPair),
    Wrong("06.3", "not-taken", "looked at, not taken", NotTaken),
    Wrong("06.3", "num-free-is-a-method", "no @property", AMethod),
    Wrong("06.3", "other-error", "assert for raise", Asserts),
    Wrong("06.4", "block-too-early", "n // size + 1 blocks", TooEarly),
    Wrong("06.4", "full-blocks-only", "n // size blocks", RoundedDown),
    Wrong("06.4", "room-not-used", "blocks for the new tokens alone", RoomNotUsed),
    Wrong("06.4", "half-done", "takes until there is none", OneByOne),
    Wrong("06.4", "half-done", "seq_len before the test", LengthFirst),
    Wrong("06.4", "last-slot-only", "one slot", LastSlot),
    Wrong("06.4", "begins-anew", "positions from 0", BeginsAnew),
    Wrong("06.4", "entry-for-block", "positions for slots", Positions),
    Wrong("06.4", "last-block-for-all", "the last block for every token", LastBlock),
    Wrong("06.4", "refused-though-it-fits", "the last free block is not used", Unequal),
    Wrong("06.4", "changed-by-another", "a fork with the parent's list", ForkShares),
    Wrong("06.4", "not-held", "a fork that holds nothing", ForkNotHeld),
    Wrong("06.4", "fork-copies", "a fork with blocks of its own", ForkCopies),
    Wrong("06.4", "length-lost", "a fork without a length", ForkLengthless),
    Wrong("06.4", "taken-and-given-back", "takes first, gives back", RollsBack),
    Wrong("06.4", "first-block-first", "released from the first on", ReleasedForwards),
    Wrong("06.4", "still-there", "blocks are still named", StillThere),
    Wrong("06.4", "not-dropped", "blocks are lost", NotDropped),
    Wrong("06.4", "shared", "a list on the class", SharedBlocks),
    Wrong("06.4", "other-error", "ValueError", WrongError),
    Wrong("06.4", "no-list", "a generator", Yields),
    Wrong("06.4", "one-block", "one block for a whole prompt", OneBlock),
    Wrong("06.4", "missing-attribute", "the allocator under another name", OtherNames),
    Wrong("06.6", "empty-table", "always copies", always_copies),
    Wrong("06.6", "copies-own", "copies whatever is begun", begun_copies),
    Wrong("06.6", "copies-full", "copies a full block", shared_copies),
    Wrong("06.6", "no-copy", "never copies", no_copy),
    Wrong("06.6", "no-copy", "swaps, and copies nothing", only_swapped),
    Wrong("06.6", "not-released", "the shared block keeps its holder", not_released),
    Wrong("06.6", "not-swapped", "the table keeps the shared block", not_swapped),
    Wrong("06.6", "direction", "(to, from)", turned_round),
    Wrong("06.6", "half-done", "drops before it takes", drops_first),
    Wrong("06.6", "other-pair", "the first block", first_block),
    Wrong("06.6", "copies-all", "every block", every_block),
    Wrong("06.6", "not-a-list", "a pair", a_pair),
    Wrong("06.6", "not-a-list", "nothing", nothing_else),
    Wrong("06.6", "empty-table", "looks at the last block first", looks_first),
    Wrong("06.6", "no-copy", "two holders exactly", exactly_two),
]

RIGHT = [
    ("06.3", TwoDicts),
    ("06.3", APlainSet),
    ("06.3", AHeap),
    ("06.4", ByDivmod),
    ("06.6", by_index),
    ("06.6", by_generator),
]
