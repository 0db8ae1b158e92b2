"""Answers that lab 06's checks had not seen when they met: their author knew the notebook, not the checks."""

# ruff: noqa: B905, F405, F811, RUF059 - written as learners write

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from itertools import accumulate, takewhile
from typing import Self

import torch
from torch import Tensor

from labkit.labs.lab06 import references
from labkit.labs.lab06.references import *  # noqa: F403
from tests.labs.noting import noting

WRONG, RIGHT, wrong, right = noting(references)


# 06.1
@wrong(
    "06.1",
    "requests are put into blocks together: empty slots of the sum, not of each",
    "each request has a last block of its own; here the tokens of all were added first",
)
def waste(held: list[int], final: list[int], room: int, block_size: int) -> tuple[int, int, int]:
    reserved = sum(final) - sum(held)
    never = len(final) * room - sum(final)
    blocks = math.ceil(sum(held) / block_size)
    return reserved, never, blocks * block_size - sum(held)


@wrong(
    "06.1",
    "reserved is all room without a token: what will never be filled is counted twice",
    "reserved counts the slots that will never be filled, too",
)
def waste(held: list[int], final: list[int], room: int, block_size: int) -> tuple[int, int, int]:
    reserved = sum(room - h for h in held)
    never = sum(room - f for f in final)
    empty = sum(-(-h // block_size) * block_size - h for h in held)
    return reserved, never, empty


@wrong("06.1", "a full last block counts as an empty one", "a request that fills its blocks has no empty slot")
def waste(held: list[int], final: list[int], room: int, block_size: int) -> tuple[int, int, int]:
    reserved = never = empty = 0
    for now, end in zip(held, final, strict=True):
        reserved += end - now
        never += room - end
        empty += block_size - now % block_size
    return reserved, never, empty


@right("06.1", "tensors, and remainder of the negative")
def waste(held: list[int], final: list[int], room: int, block_size: int) -> tuple[int, int, int]:
    now = torch.tensor(held, dtype=torch.int64)
    end = torch.tensor(final, dtype=torch.int64)
    columns = torch.stack([end - now, room - end, torch.remainder(-now, block_size)])
    reserved, never, empty = columns.sum(dim=1).tolist()
    return reserved, never, empty


# 06.2
@wrong("06.2", "a Python loop over rows", "the operations grow with the rows")
def slots_of(block_table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    rows = []
    for table, where in zip(block_table.long(), positions, strict=True):
        rows.append(table[where // block_size] * block_size + where % block_size)
    return torch.stack(rows)


@wrong(
    "06.2", "the whole position is added, not the place within the block", "position is added whole: no % block_size"
)
def slots_of(block_table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    index = torch.div(positions, block_size, rounding_mode="floor")
    blocks = torch.gather(block_table.to(torch.int64), 1, index)
    return blocks * block_size + positions


@wrong(
    "06.2",
    "the first row's positions choose the columns for all rows",
    "row 1 looks its blocks up at row 0's positions",
)
def slots_of(block_table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    columns = positions[0] // block_size  # all rows decode the same step
    return block_table[:, columns].long() * block_size + positions % block_size


@right("06.2", "lists every slot of every row and gathers by position")
def slots_of(block_table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    places = torch.arange(block_size, device=block_table.device)
    every = (block_table.long()[:, :, None] * block_size + places).flatten(1)
    return torch.take_along_dim(every, positions, dim=1)


# 06.3
@wrong("06.3", "num_free counts through all blocks", "num_free takes time that grows with the number of blocks")
class BlockAllocator:
    def __init__(self, num_blocks: int) -> None:
        self.holders = [0] * num_blocks
        self.free = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return sum(count == 0 for count in self.holders)

    def ref_count(self, block: int) -> int:
        return self.holders[block]

    def take(self) -> int:
        if not self.free:
            raise OutOfBlocks("no block is free")
        block, _ = self.free.popitem(last=False)
        self.holders[block] = 1
        return block

    def hold(self, block: int) -> None:
        self.free.pop(block, None)
        self.holders[block] += 1

    def drop(self, block: int, *, keep: bool = False) -> bool:
        if self.holders[block] == 0:
            raise ValueError(f"block {block} is held by nobody")
        self.holders[block] -= 1
        if self.holders[block]:
            return False
        self.free[block] = None
        self.free.move_to_end(block, last=keep)
        return True


@wrong(
    "06.3",
    "kept blocks are a stack: the one dropped last is taken before the others",
    "of the kept blocks the one dropped last is taken first",
)
class BlockAllocator:
    def __init__(self, num_blocks: int) -> None:
        self._count: dict[int, int] = {}
        self._plain: dict[int, None] = dict.fromkeys(reversed(range(num_blocks)))
        self._kept: dict[int, None] = {}

    @property
    def num_free(self) -> int:
        return len(self._plain) + len(self._kept)

    def ref_count(self, block: int) -> int:
        return self._count.get(block, 0)

    def take(self) -> int:
        for pool in (self._plain, self._kept):
            if pool:
                block, _ = pool.popitem()
                self._count[block] = 1
                return block
        raise OutOfBlocks("all blocks are held")

    def hold(self, block: int) -> None:
        if block not in self._count:
            self._plain.pop(block, None)
            self._kept.pop(block, None)
        self._count[block] = self._count.get(block, 0) + 1

    def drop(self, block: int, *, keep: bool = False) -> bool:
        if block not in self._count:
            raise ValueError(block)
        self._count[block] -= 1
        if self._count[block] > 0:
            return False
        del self._count[block]
        (self._kept if keep else self._plain)[block] = None
        return True


@wrong(
    "06.3",
    "hold takes a free block out of the plain ones only: a kept one stays among the free",
    "a kept block that is held again is still free, and is handed out a second time",
)
class BlockAllocator:
    def __init__(self, num_blocks: int) -> None:
        self.refs = [0] * num_blocks
        self.plain = OrderedDict((block, True) for block in range(num_blocks))
        self.kept: deque[int] = deque()

    @property
    def num_free(self) -> int:
        return len(self.plain) + len(self.kept)

    def ref_count(self, block: int) -> int:
        return self.refs[block]

    def take(self) -> int:
        if self.plain:
            block = self.plain.popitem(last=False)[0]
        elif self.kept:
            block = self.kept.popleft()
        else:
            raise OutOfBlocks("out of blocks")
        self.refs[block] = 1
        return block

    def hold(self, block: int) -> None:
        if self.refs[block] == 0 and block in self.plain:
            del self.plain[block]
        self.refs[block] += 1

    def drop(self, block: int, *, keep: bool = False) -> bool:
        if self.refs[block] < 1:
            raise ValueError(f"nobody holds block {block}")
        self.refs[block] -= 1
        if self.refs[block] > 0:
            return False
        if keep:
            self.kept.append(block)
        else:
            self.plain[block] = True
        return True


@right("06.3", "a doubly linked ring in two lists, as vLLM's free queue")
class BlockAllocator:
    def __init__(self, num_blocks: int) -> None:
        ring = num_blocks + 1  # the last is no block: it is head and tail
        self._end = num_blocks
        self._next = [(i + 1) % ring for i in range(ring)]
        self._before = [(i - 1) % ring for i in range(ring)]
        self._holders = [0] * num_blocks
        self._free = num_blocks

    def _link(self, block: int, left: int) -> None:
        after = self._next[left]
        self._next[left], self._before[block] = block, left
        self._next[block], self._before[after] = after, block
        self._free += 1

    def _unlink(self, block: int) -> None:
        left, after = self._before[block], self._next[block]
        self._next[left], self._before[after] = after, left
        self._free -= 1

    @property
    def num_free(self) -> int:
        return self._free

    def ref_count(self, block: int) -> int:
        return self._holders[block]

    def take(self) -> int:
        block = self._next[self._end]
        if block == self._end:
            raise OutOfBlocks("every block is held")
        self.hold(block)
        return block

    def hold(self, block: int) -> None:
        if not self._holders[block]:
            self._unlink(block)
        self._holders[block] += 1

    def drop(self, block: int, *, keep: bool = False) -> bool:
        if not self._holders[block]:
            raise ValueError(f"block {block}: nobody holds it")
        self._holders[block] -= 1
        freed = self._holders[block] == 0
        if freed:
            self._link(block, self._before[self._end] if keep else self._end)
        return freed


@right("06.3", "two ordered pools in a tuple, chosen by keep; a Counter of holders")
class BlockAllocator:
    def __init__(self, num_blocks: int) -> None:
        self.pools = (OrderedDict.fromkeys(range(num_blocks)), OrderedDict())
        self.holders = Counter()

    @property
    def num_free(self) -> int:
        return sum(map(len, self.pools))

    def ref_count(self, block: int) -> int:
        return self.holders[block]

    def take(self) -> int:
        pool = self.pools[0] or self.pools[1]
        try:
            block, _ = pool.popitem(last=False)
        except KeyError:
            raise OutOfBlocks("no free block is left") from None
        self.holders[block] = 1
        return block

    def hold(self, block: int) -> None:
        for pool in self.pools:
            pool.pop(block, None)
        self.holders.update((block,))

    def drop(self, block: int, *, keep: bool = False) -> bool:
        match self.holders[block]:
            case 0:
                raise ValueError("nobody held it")
            case 1:
                del self.holders[block]
                self.pools[keep][block] = None
                return True
            case _:
                self.holders[block] -= 1
                return False


# 06.4
@wrong(
    "06.4",
    "gives the blocks back when it fails, and forgets that seq_len has grown meanwhile",
    "after OutOfBlocks seq_len is not what it was",
)
class BlockTable:
    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        self.allocator, self.block_size = allocator, block_size
        self.blocks: list[int] = []
        self.seq_len = 0

    def append(self, new_tokens: int) -> list[int]:
        before = len(self.blocks)
        slots = []
        try:
            for _ in range(new_tokens):
                place = self.seq_len % self.block_size
                if place == 0:
                    self.blocks.append(self.allocator.take())
                slots.append(self.blocks[-1] * self.block_size + place)
                self.seq_len += 1
        except OutOfBlocks:
            while len(self.blocks) > before:
                self.allocator.drop(self.blocks.pop())
            raise
        return slots

    def fork(self) -> Self:
        other = type(self)(self.allocator, self.block_size)
        for block in self.blocks:
            self.allocator.hold(block)
        other.blocks, other.seq_len = list(self.blocks), self.seq_len
        return other

    def release(self) -> None:
        while self.blocks:
            self.allocator.drop(self.blocks.pop())
        self.seq_len = 0


@wrong(
    "06.4",
    "slots counted on from the first new one, as if blocks were neighbours",
    "tokens behind a block's end get the next number, not a slot of the table's next block",
)
class BlockTable:
    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        self.allocator = allocator
        self.block_size = block_size
        self.blocks = []
        self.seq_len = 0

    def append(self, new_tokens: int) -> list[int]:
        if new_tokens == 0:
            return []
        total = math.ceil((self.seq_len + new_tokens) / self.block_size)
        missing = total - len(self.blocks)
        if missing > self.allocator.num_free:
            raise OutOfBlocks(f"{missing} blocks are wanted, {self.allocator.num_free} are free")
        self.blocks += [self.allocator.take() for _ in range(missing)]
        block, place = self.blocks[self.seq_len // self.block_size], self.seq_len % self.block_size
        first = block * self.block_size + place
        self.seq_len += new_tokens
        return list(range(first, first + new_tokens))

    def fork(self) -> Self:
        child = self.__class__(self.allocator, self.block_size)
        child.blocks = self.blocks[:]
        child.seq_len = self.seq_len
        for block in child.blocks:
            self.allocator.hold(block)
        return child

    def release(self) -> None:
        for block in reversed(self.blocks):
            self.allocator.drop(block)
        self.blocks.clear()
        self.seq_len = 0


@wrong(
    "06.4",
    "fork by copy.copy: both tables share one list of blocks",
    "a block that the fork takes appears in the parent's list too",
)
class BlockTable:
    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        self.allocator = allocator
        self.block_size = block_size
        self.blocks: list[int] = []
        self.seq_len = 0

    def append(self, new_tokens: int) -> list[int]:
        end = self.seq_len + new_tokens
        need = -(-end // self.block_size) - len(self.blocks)
        if need > self.allocator.num_free:
            raise OutOfBlocks("too few blocks are free")
        for _ in range(need):
            self.blocks.append(self.allocator.take())
        slots = [
            self.blocks[p // self.block_size] * self.block_size + p % self.block_size for p in range(self.seq_len, end)
        ]
        self.seq_len = end
        return slots

    def fork(self) -> Self:
        import copy

        twin = copy.copy(self)
        for block in twin.blocks:
            twin.allocator.hold(block)
        return twin

    def release(self) -> None:
        while self.blocks:
            self.allocator.drop(self.blocks.pop())
        self.seq_len = 0


@right("06.4", "divmod, a generator of slots, blocks counted by positions that open one")
class BlockTable:
    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        vars(self).update(allocator=allocator, block_size=block_size, blocks=[], seq_len=0)

    def append(self, new_tokens: int) -> list[int]:
        start, stop = self.seq_len, self.seq_len + new_tokens
        openings = [position for position in range(start, stop) if position % self.block_size == 0]
        if len(openings) > self.allocator.num_free:
            raise OutOfBlocks(f"{len(openings)} blocks needed")
        self.blocks.extend(self.allocator.take() for _ in openings)
        self.seq_len = stop
        return list(self._slots(start, stop))

    def _slots(self, start: int, stop: int):
        for index, place in (divmod(position, self.block_size) for position in range(start, stop)):
            yield self.blocks[index] * self.block_size + place

    def fork(self) -> Self:
        other = type(self)(self.allocator, self.block_size)
        for block in self.blocks:
            self.allocator.hold(block)
            other.blocks.append(block)
        other.seq_len = self.seq_len
        return other

    def release(self) -> None:
        self.seq_len = 0
        for _ in range(len(self.blocks)):
            self.allocator.drop(self.blocks.pop())


# 06.5
@wrong("06.5", "the whole memory is turned to float32 first", "the memory as a whole is copied")
def paged_attention(q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    k_all, v_all = (x.to(torch.float32, copy=True).flatten(0, 1) for x in (keys, values))
    rows, num_heads, head_dim = q.shape
    block_size, num_kv_heads = keys.shape[1:3]
    out = torch.empty_like(q)
    for row in range(rows):
        position = torch.arange(int(lengths[row]), device=q.device)
        slots = block_table[row].long()[position // block_size] * block_size + position % block_size
        k, v = k_all[slots], v_all[slots]  # [tokens, kv heads, head_dim]
        grouped = q[row].float().view(num_kv_heads, -1, head_dim)
        weights = (torch.einsum("kgd,tkd->kgt", grouped, k) / head_dim**0.5).softmax(dim=-1)
        out[row] = torch.einsum("kgt,tkd->kgd", weights, v).reshape(num_heads, head_dim).to(q.dtype)
    return out


@wrong(
    "06.5",
    "KV heads repeated in turns: head h reads KV head h % num_kv_heads",
    "query head h reads KV head h % num_kv_heads, not h // num_queries_per_kv",
)
def paged_attention(q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    rows, num_heads, head_dim = q.shape
    repeats = num_heads // keys.shape[2]
    outputs = []
    for row, length in enumerate(lengths.tolist()):
        used = block_table[row, : -(-length // keys.shape[1])].long()
        k = keys[used].flatten(0, 1)[:length].repeat(1, repeats, 1)
        v = values[used].flatten(0, 1)[:length].repeat(1, repeats, 1)
        scores = (q[row][None] * k).sum(dim=-1).float() / math.sqrt(head_dim)  # [tokens, heads]
        weights = scores.softmax(dim=0).to(v.dtype)
        outputs.append((weights[..., None] * v).sum(dim=0))
    return torch.stack(outputs)


@wrong(
    "06.5",
    "NaN behind the last token made 0, and then attended to: a score of 0 is not no score",
    "slots behind the last token still get weight",
)
def paged_attention(q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    block_size = keys.shape[1]
    out = torch.empty_like(q)
    for row in range(q.shape[0]):
        count = math.ceil(lengths[row].item() / block_size)
        blocks = block_table[row, :count].long()
        k = keys[blocks].flatten(0, 1).transpose(0, 1).clone()  # [kv heads, slots, head_dim]
        v = values[blocks].flatten(0, 1).transpose(0, 1).clone()
        k[:, lengths[row] :] = 0  # somebody else's, or NaN
        v[:, lengths[row] :] = 0
        out[row] = torch.nn.functional.scaled_dot_product_attention(
            q[row][None, :, None], k[None], v[None], enable_gqa=True
        )[0, :, 0]
    return out


@right("06.5", "softmax made block by block, row by row, as the kernel does it")
def paged_attention(q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    rows, num_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = keys.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    answers = []
    for row in range(rows):
        query = q[row].to(wide).reshape(num_kv_heads, num_heads // num_kv_heads, head_dim) * head_dim**-0.5
        top = torch.full_like(query[..., :1], -math.inf)
        total, out = torch.zeros_like(top), torch.zeros_like(query)
        left = int(lengths[row])
        for block in block_table[row].tolist():
            if left <= 0:
                break
            here = min(left, block_size)
            k, v = (x[block, :here].to(wide).transpose(0, 1) for x in (keys, values))
            scores = query @ k.mT
            new_top = torch.maximum(top, scores.amax(dim=-1, keepdim=True))
            weights, shrink = (scores - new_top).exp(), (top - new_top).exp()
            total = total * shrink + weights.sum(dim=-1, keepdim=True)
            out = out * shrink + weights @ v
            top, left = new_top, left - here
        answers.append((out / total).reshape(num_heads, head_dim))
    return torch.stack(answers).to(q.dtype)


# 06.6
@wrong("06.6", "copies every shared block, not the last alone", "blocks that nobody will write into are copied, too")
def copy_on_write(table: BlockTable) -> list[tuple[int, int]]:
    if table.seq_len % table.block_size == 0:
        return []
    copies = []
    shared = [i for i, block in enumerate(table.blocks) if table.allocator.ref_count(block) > 1]
    if len(shared) > table.allocator.num_free:
        raise OutOfBlocks("too few free blocks for the copies")
    for i in shared:
        old = table.blocks[i]
        table.blocks[i] = table.allocator.take()
        table.allocator.drop(old)
        copies.append((old, table.blocks[i]))
    return copies


@wrong(
    "06.6",
    "drops the shared block before it takes one: when none is free the holder is gone",
    "after OutOfBlocks the old block has one holder fewer",
)
def copy_on_write(table: BlockTable) -> list[tuple[int, int]]:
    place = table.seq_len % table.block_size
    if place == 0:
        return []
    allocator, last = table.allocator, table.blocks[-1]
    if allocator.ref_count(last) == 1:
        return []
    allocator.drop(last)
    own = allocator.take()
    table.blocks[-1] = own
    return [(last, own)]


@wrong(
    "06.6",
    "the new block is appended behind the shared one, which stays in the table",
    "the shared block is still in the table: the copy stands behind it, not in its place",
)
def copy_on_write(table: BlockTable) -> list[tuple[int, int]]:
    if not table.blocks or table.seq_len % table.block_size == 0:
        return []
    old = table.blocks[-1]
    if table.allocator.ref_count(old) <= 1:
        return []
    new = table.allocator.take()
    table.blocks.append(new)
    table.allocator.drop(old)
    return [(old, new)]


@right("06.6", "match on where the next token goes, the list spliced")
def copy_on_write(table: BlockTable) -> list[tuple[int, int]]:
    match divmod(table.seq_len, table.block_size):
        case (_, 0):
            return []
        case (index, _) if table.allocator.ref_count(table.blocks[index]) < 2:
            return []
        case (index, _):
            pair = table.blocks[index], table.allocator.take()
            table.blocks[index : index + 1] = pair[1:]
            table.allocator.drop(pair[0])
            return [pair]


@right("06.6", "a comprehension over the blocks that the next token would write into")
def copy_on_write(table: BlockTable) -> list[tuple[int, int]]:
    written = table.blocks[table.seq_len // table.block_size :]  # none, when a block opens
    allocator = table.allocator
    copies = [(block, allocator.take()) for block in written if allocator.ref_count(block) != 1]
    for old, new in copies:
        table.blocks[table.blocks.index(old)] = new
        allocator.drop(old)
    return copies


# 06.7
@wrong(
    "06.7",
    "compares the block's own tokens only: what stood before it is trusted to the key",
    "a block is reused though the tokens before it are others",
)
def reusable(tokens: list[int], found: Mapping[int, Written], block_size: int, salt: str) -> list[int]:
    blocks, before = [], salt
    for start in range(0, len(tokens) - block_size, block_size):
        own = tuple(tokens[start : start + block_size])
        before = chain(before, own)
        entry = found.get(before)
        if entry is None or entry.salt != salt or tuple(entry.tokens[-block_size:]) != own:
            break
        blocks.append(entry.block)
    return blocks


@wrong(
    "06.7",
    "goes on behind a block that was not found: what comes back has a hole",
    "blocks behind a missing one are returned: they do not hold the beginning",
)
def reusable(tokens: list[int], found: Mapping[int, Written], block_size: int, salt: str) -> list[int]:
    key: int | str = salt
    result = []
    for i in range((len(tokens) - 1) // block_size):
        stop = (i + 1) * block_size
        key = chain(key, tuple(tokens[i * block_size : stop]))
        if key not in found:
            continue
        hit = found[key]
        if hit.salt == salt and list(hit.tokens) == list(tokens[:stop]):
            result.append(hit.block)
    return result


@wrong(
    "06.7",
    "leaves the last full block out always, to spare the last token, also when tokens follow it",
    "the last full block is not reused, though the last token lies behind it",
)
def reusable(tokens: list[int], found: Mapping[int, Written], block_size: int, salt: str) -> list[int]:
    full = len(tokens) // block_size
    parent, out = salt, []
    for n in range(full - 1):  # never the last one: its logits are wanted
        piece = tuple(tokens[n * block_size : (n + 1) * block_size])
        parent = chain(parent, piece)
        w = found.get(parent)
        if w is None or (w.salt, tuple(w.tokens)) != (salt, tuple(tokens[: (n + 1) * block_size])):
            return out
        out.append(w.block)
    return out


@right("06.7", "accumulate makes the keys, takewhile ends the search")
def reusable(tokens: list[int], found: Mapping[int, Written], block_size: int, salt: str) -> list[int]:
    ends = range(block_size, len(tokens), block_size)  # never the last token's
    pieces = (tuple(tokens[end - block_size : end]) for end in ends)
    keys = accumulate(pieces, chain, initial=salt)
    next(keys)  # the salt itself
    hits = ((found.get(key), tuple(tokens[:end])) for end, key in zip(ends, keys))
    same = takewhile(lambda hit: hit[0] is not None and hit[0].salt == salt and tuple(hit[0].tokens) == hit[1], hits)
    return [written.block for written, _ in same]


# 06.8
@wrong(
    "06.8",
    "the table's entry is looked up at the token, not at its block (start, not start // BLOCK_SIZE)",
    "the second block of a row is looked up at place BLOCK_SIZE of the table",
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
        block = tl.load(table_ptr + row * blocks_per_row + start)
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


@wrong(
    "06.8",
    "the mask asks whether the block is one (not -1), not whether the slot holds a token",
    "slots behind the last token are read: the mask does not ask for length",
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


@wrong("06.8", "no row in the table's address: all rows read row 0's blocks", "every row reads the first row's table")
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
        here = place < length - start
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


@right("06.8", "the mask from whole blocks and the remainder, the address grouped another way")
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
        here = (start + BLOCK_SIZE <= length) | (place < length % BLOCK_SIZE)
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
@wrong("06.9", "of several that cost the same, the first in the list", "of two that cost the same, not the smallest")
def best_block_size(
    lengths: list[int], shared: list[int], sizes: list[int], slot_cost: float, block_cost: float
) -> int:
    def cost(size: int) -> float:
        empty = sum(-length % size for length in lengths)
        lost = sum(common % size for common in shared)
        blocks = sum(-(-length // size) for length in lengths)
        return slot_cost * (empty + lost) + block_cost * blocks

    return min(sizes, key=cost)


@wrong("06.9", "only blocks that are not shared cost something", "shared blocks are left out of block_cost")
def best_block_size(
    lengths: list[int], shared: list[int], sizes: list[int], slot_cost: float, block_cost: float
) -> int:
    best, least = 0, math.inf
    for size in sorted(sizes):
        total = 0.0
        for length, common in zip(lengths, shared, strict=True):
            all_blocks = math.ceil(length / size)
            shared_blocks = common // size
            slots = all_blocks * size - length + common - shared_blocks * size
            total += slots * slot_cost + (all_blocks - shared_blocks) * block_cost
        if total < least:
            best, least = size, total
    return best


@wrong(
    "06.9",
    "half a block stays empty on average: an estimate in place of the lengths given",
    "empty slots are estimated as half a block, not counted from the lengths",
)
def best_block_size(
    lengths: list[int], shared: list[int], sizes: list[int], slot_cost: float, block_cost: float
) -> int:
    costs = {}
    for size in sorted(sizes):
        empty = len(lengths) * (size - 1) / 2
        unshared = sum(s - s // size * size for s in shared)
        blocks = sum((n + size - 1) // size for n in lengths)
        costs[size] = slot_cost * (empty + unshared) + block_cost * blocks
    return min(costs, key=costs.get)


@right("06.9", "the least of (cost, size) pairs")
def best_block_size(
    lengths: list[int], shared: list[int], sizes: list[int], slot_cost: float, block_cost: float
) -> int:
    def priced(size: int) -> tuple[float, int]:
        blocks = [(length + size - 1) // size for length in lengths]
        needless = size * sum(blocks) - sum(lengths) + sum(map(size.__rmod__, shared))
        return needless * slot_cost + sum(blocks) * block_cost, size

    return min(map(priced, sizes))[1]


@right("06.9", "a table of sizes by requests, in tensors")
def best_block_size(
    lengths: list[int], shared: list[int], sizes: list[int], slot_cost: float, block_cost: float
) -> int:
    size = torch.tensor(sorted(sizes))[:, None]
    tokens, common = torch.tensor(lengths), torch.tensor(shared)
    slots = ((-tokens) % size + common % size).sum(dim=1)
    blocks = ((tokens + size - 1) // size).sum(dim=1)
    cost = slots.double() * slot_cost + blocks.double() * block_cost
    return int(size[(cost == cost.min()).nonzero()[0, 0], 0])


# 06.d1
@wrong(
    "06.d1",
    "keeps a block from being free twice, but its holders still go down at each call",
    "a second call takes a holder away once more: the table is still there",
)
def finish(tables: dict[str, list[int]], holders: list[int], free: list[int], request: str) -> None:
    for block in tables.get(request, []):
        if holders[block] > 0:
            holders[block] -= 1
        if holders[block] == 0 and block not in free:
            free.append(block)


@wrong(
    "06.d1",
    "makes new lists and gives them to the local names: nothing of the caller's changes but the table",
    "holders and free are not changed in place",
)
def finish(tables: dict[str, list[int]], holders: list[int], free: list[int], request: str) -> None:
    gone = tables.pop(request, [])
    holders = [count - (block in gone) for block, count in enumerate(holders)]
    free = free + [block for block in gone if holders[block] == 0]


@wrong(
    "06.d1",
    "a request whose table is empty is taken for one without a table: it stays",
    "a request that has an empty table keeps it",
)
def finish(tables: dict[str, list[int]], holders: list[int], free: list[int], request: str) -> None:
    blocks = tables.get(request)
    if not blocks:
        return
    for block in blocks:
        holders[block] -= 1
        if holders[block] == 0:
            free.append(block)
    del tables[request]


@right("06.d1", "the free list is written anew from the holders, in place")
def finish(tables: dict[str, list[int]], holders: list[int], free: list[int], request: str) -> None:
    try:
        blocks = tables.pop(request)
    except KeyError:
        return
    for block in blocks:
        holders[block] -= 1
    free[:] = [block for block, count in enumerate(holders) if not count]


# 06.d2
@wrong(
    "06.d2",
    "clears the row only when nobody gets it: a shorter request leaves the tail of a longer one",
    "behind the new blocks stand the last ones of the request before",
)
def set_row(block_table: Tensor, lengths: Tensor, row: int, blocks: list[int], tokens: int) -> None:
    if blocks:
        block_table[row, : len(blocks)] = torch.tensor(blocks, dtype=block_table.dtype)
    else:
        block_table[row].fill_(-1)
    lengths[row] = tokens


@wrong("06.d2", "the table is mended, the length still never falls", "the length of the request before is left")
def set_row(block_table: Tensor, lengths: Tensor, row: int, blocks: list[int], tokens: int) -> None:
    block_table[row] = -1
    if blocks:
        block_table[row, : len(blocks)] = torch.tensor(blocks, dtype=block_table.dtype)
    lengths[row] = max(tokens, int(lengths[row])) if blocks else 0


@wrong(
    "06.d2",
    "what is behind the new blocks is cleared, but a row for nobody keeps its blocks",
    "a row that nobody has still holds the old blocks",
)
def set_row(block_table: Tensor, lengths: Tensor, row: int, blocks: list[int], tokens: int) -> None:
    lengths[row] = tokens
    if not blocks:
        return
    count = len(blocks)
    block_table[row, :count] = torch.tensor(blocks, dtype=block_table.dtype)
    block_table[row, count:] = -1


@right("06.d2", "every cell of the row written in a loop")
def set_row(block_table: Tensor, lengths: Tensor, row: int, blocks: list[int], tokens: int) -> None:
    for column in range(block_table.shape[1]):
        block_table[row, column] = blocks[column] if column < len(blocks) else -1
    lengths.index_fill_(0, torch.tensor([row], device=lengths.device), tokens)


# 06.d3
@wrong(
    "06.d3",
    "everything is reused and the last token is run all the same, into a block that others read",
    "32 reused and 1 run of a prompt of 32: the last token is written into a shared block",
)
def first_chunk(prompt_tokens: int, found_tokens: int, block_size: int, budget: int) -> tuple[int, int]:
    reused = found_tokens
    run = min(max(prompt_tokens - reused, 1), budget)
    return reused, run


@wrong("06.d3", "the budget is spent on reused tokens, too", "reused tokens are counted against the budget")
def first_chunk(prompt_tokens: int, found_tokens: int, block_size: int, budget: int) -> tuple[int, int]:
    reused = found_tokens
    while reused >= prompt_tokens:
        reused -= block_size
    run = min(prompt_tokens, budget) - reused
    return reused, max(0, run)


@wrong(
    "06.d3",
    "whole or not at all is read as all or nothing: a prompt that is found whole is run whole",
    "only the last block need be run again, not all of them",
)
def first_chunk(prompt_tokens: int, found_tokens: int, block_size: int, budget: int) -> tuple[int, int]:
    reused = found_tokens if found_tokens < prompt_tokens else 0
    return reused, min(prompt_tokens - reused, budget)


@right("06.d3", "goes along the prompt block by block")
def first_chunk(prompt_tokens: int, found_tokens: int, block_size: int, budget: int) -> tuple[int, int]:
    reused = 0
    while reused + block_size <= found_tokens and reused + block_size < prompt_tokens:
        reused += block_size
    to_run = range(reused, prompt_tokens)
    return reused, len(to_run[:budget])


@right("06.d3", "sorted, and floor to whole blocks")
def first_chunk(prompt_tokens: int, found_tokens: int, block_size: int, budget: int) -> tuple[int, int]:
    usable, _ = sorted((found_tokens, prompt_tokens - 1))
    reused = usable - usable % block_size
    left = prompt_tokens - reused
    return (reused, left) if left <= budget else (reused, budget)
