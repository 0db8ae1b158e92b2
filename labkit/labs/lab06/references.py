"""What fills the blanks of lab 06: ordinary code with the signatures of the stubs."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from labkit.cache import OutOfBlocks
from labkit.labs.lab06.chains import Written, chain
from labkit.labs.lab06.launch import tl


def waste(held: list[int], final: list[int], room: int, block_size: int) -> tuple[int, int, int]:
    """Slots that are taken and hold no token: reserved, never filled, empty in blocks.

    Request i holds held[i] tokens now and will end with final[i]. The first two numbers are those of one piece of
    memory of `room` tokens for each request: slots that it will still fill, and slots that it never will. The third is
    that of blocks, taken one at a time when they are needed: the empty slots of each request's last block.
    """
    reserved = sum(final) - sum(held)
    never = sum(room - tokens for tokens in final)
    in_blocks = sum(-tokens % block_size for tokens in held)
    return reserved, never, in_blocks


def slots_of(block_table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Where tokens lie: a slot for each position, int64 [rows, new_tokens].

    block_table: int32 [rows, blocks], each row's blocks in order of its tokens, padded with -1.
    positions: int64 [rows, new_tokens], of tokens that their row has a block for. A slot is block * block_size + the
    place within the block; there may be more slots than int32 can count. As many operations for many rows and tokens
    as for one.
    """
    blocks = block_table.gather(1, positions // block_size).long()
    return blocks * block_size + positions % block_size


class BlockAllocator:
    """Which of the blocks 0 to num_blocks - 1 are free, and how many hold each of the others.

    Every operation takes constant time, however many blocks there are.
    """

    def __init__(self, num_blocks: int) -> None:
        self.free = OrderedDict.fromkeys(range(num_blocks))  # the next to be taken in front
        self.holders = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self.free)

    def ref_count(self, block: int) -> int:
        """How many hold this block."""
        return self.holders[block]

    def take(self) -> int:
        """A free block, held once from now on; OutOfBlocks when there is none."""
        if not self.free:
            raise OutOfBlocks(f"all {len(self.holders)} blocks are held")
        block, _ = self.free.popitem(last=False)
        self.holders[block] = 1
        return block

    def hold(self, block: int) -> None:
        """One holder more. The block may be free: what was written there before may still be of use."""
        self.free.pop(block, None)
        self.holders[block] += 1

    def drop(self, block: int, *, keep: bool = False) -> bool:
        """One holder fewer; True when nobody holds it now. ValueError, and nothing changed, when nobody held it.

        keep: what the block holds may be of use again. Such free blocks are taken last, the one dropped first before
        the others.
        """
        if self.holders[block] == 0:
            raise ValueError(f"nobody holds block {block}")
        self.holders[block] -= 1
        if self.holders[block]:
            return False
        self.free[block] = None
        self.free.move_to_end(block, last=keep)
        return True


class BlockTable:
    """One request's blocks, in order of its tokens.

    Attributes that others read: allocator and block_size, as given; blocks, a list of numbers; seq_len, how many tokens
    have a slot.
    """

    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        self.allocator, self.block_size = allocator, block_size
        self.blocks: list[int] = []
        self.seq_len = 0

    def append(self, new_tokens: int) -> list[int]:
        """The slots of the next new_tokens tokens; blocks are taken when a token needs one.

        OutOfBlocks, and nothing changed, when there are too few. A slot is block * block_size + the place in it.
        """
        end = self.seq_len + new_tokens
        more = -(-end // self.block_size) - len(self.blocks)
        if more > self.allocator.num_free:
            raise OutOfBlocks(f"{more} more blocks are needed, {self.allocator.num_free} are free")
        self.blocks += [self.allocator.take() for _ in range(more)]
        positions = range(self.seq_len, end)
        self.seq_len = end
        return [self.blocks[p // self.block_size] * self.block_size + p % self.block_size for p in positions]

    def fork(self) -> Self:
        """A second table of the same tokens in the same blocks, each held once more. From then on both go their way."""
        child = type(self)(self.allocator, self.block_size)
        for block in self.blocks:
            self.allocator.hold(block)
        child.blocks, child.seq_len = list(self.blocks), self.seq_len
        return child

    def release(self) -> None:
        """Let go of every block, the last one first; no token has a slot any more."""
        for block in reversed(self.blocks):
            self.allocator.drop(block)
        self.blocks, self.seq_len = [], 0


def paged_attention(q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    """Attention of one new token in each row over its row's tokens, the new one included: shape and dtype of q.

    q: [rows, num_heads, head_dim]. keys, values: [num_blocks, block_size, num_kv_heads, head_dim], the memory of all
    rows. block_table: int32 [rows, blocks], padded with -1. lengths: int64 [rows], tokens of each row, at least 1.
    The memory as a whole is not copied. Slots behind a row's last token may hold anything, NaN too.
    """
    block_size, num_kv_heads = keys.shape[1:3]
    out = torch.empty_like(q)
    for row, length in enumerate(lengths.tolist()):
        blocks = block_table[row, : -(-length // block_size)]
        k = keys[blocks].flatten(0, 1)[:length].transpose(0, 1)  # [num_kv_heads, length, head_dim]
        v = values[blocks].flatten(0, 1)[:length].transpose(0, 1)
        grouped = q[row].reshape(num_kv_heads, -1, q.shape[2])  # query heads of a KV head side by side
        scores = grouped @ k.transpose(1, 2) / math.sqrt(q.shape[2])
        out[row] = (torch.softmax(scores, dim=-1) @ v).flatten(0, 1)
    return out


def copy_on_write(table: BlockTable) -> list[tuple[int, int]]:
    """Make sure that the next token can be written. Returns the blocks whose K and V must be copied first, (from, to).

    A token that opens a block of its own needs no copy, nor does a last block that only this table holds. Otherwise
    the table gets a block of its own in place of the shared one. OutOfBlocks, and nothing changed, when none is free.
    """
    if table.seq_len % table.block_size == 0:
        return []
    shared = table.blocks[-1]
    if table.allocator.ref_count(shared) == 1:
        return []
    own = table.allocator.take()
    table.blocks[-1] = own
    table.allocator.drop(shared)
    return [(shared, own)]


def reusable(tokens: list[int], found: Mapping[int, Written], block_size: int, salt: str) -> list[int]:
    """The blocks that hold the beginning of `tokens` already, in order.

    found: every full block that was written, by its key. The key of a request's first block is chain(salt, its
    tokens), that of each later block chain(the key before it, its tokens), tokens as a tuple. A Written has .block,
    .salt and .tokens, all of them from the request's first to the block's last. Two texts may have one key: only what
    was written for the same salt and the same tokens is reused. The last of `tokens` is not, since its logits are
    wanted.
    """
    blocks = []
    key: str | int = salt
    for end in range(block_size, len(tokens), block_size):
        key = chain(key, tuple(tokens[end - block_size : end]))
        written = found.get(key)
        if written is None or written.salt != salt or list(written.tokens) != tokens[:end]:
            break
        blocks.append(written.block)
    return blocks


def paged_decode(
    q_ptr, keys_ptr, values_ptr, table_ptr, lengths_ptr, out_ptr, scale, blocks_per_row, num_heads, num_kv_heads,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """One program: one row (axis 0), one query head (axis 1), one block of the row's table at a time.

    q, out: [rows, num_heads, head_dim]. keys, values: [num_blocks, block_size, num_kv_heads, head_dim]. table: int32
    [rows, blocks_per_row], padded with -1. lengths: int64 [rows]. All contiguous; sizes in capitals are powers of 2.
    """
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


def best_block_size(
    lengths: list[int], shared: list[int], sizes: list[int], slot_cost: float, block_cost: float
) -> int:
    """The block size that costs least, of `sizes`; of several the smallest.

    Request i ends with lengths[i] tokens, of which the first shared[i] are another request's too. slot_cost: what a
    slot costs that need not have been taken, empty in a last block, or of a shared token that lies in no full shared
    block. block_cost: what each block of a request costs, whatever is in it.
    """

    def cost(size: int) -> float:
        blocks = sum(-(-tokens // size) for tokens in lengths)
        empty = sum(-tokens % size for tokens in lengths)
        again = sum(tokens % size for tokens in shared)
        return slot_cost * (empty + again) + block_cost * blocks

    return min(sorted(sizes), key=cost)


def finish(tables: dict[str, list[int]], holders: list[int], free: list[int], request: str) -> None:
    """A request has ended, whatever ended it: its blocks have one holder fewer, and it has no table any more.

    tables: the blocks of each running request. holders: of each block, how many running requests have it. free: blocks
    that nobody holds, each once. All three are changed in place. A request without a table changes nothing.
    """
    for block in tables.pop(request, []):
        holders[block] -= 1
        if holders[block] == 0:
            free.append(block)


def set_row(block_table: Tensor, lengths: Tensor, row: int, blocks: list[int], tokens: int) -> None:
    """Give a row of the running batch to a request with these blocks and so many tokens, in place.

    block_table: int32 [rows, blocks], padded with -1. lengths: int64 [rows]. No blocks and no tokens: nobody has the
    row. Whatever stood in the row before, nothing of it is left.
    """
    block_table[row] = -1
    block_table[row, : len(blocks)] = torch.tensor(blocks, dtype=block_table.dtype)
    lengths[row] = tokens


def first_chunk(prompt_tokens: int, found_tokens: int, block_size: int, budget: int) -> tuple[int, int]:
    """A new request's first step: how many tokens are reused, and how many are run.

    found_tokens: of the prompt's beginning, how many lie in full blocks that were found, block_size to a block. Blocks
    are reused whole or not at all: others read them, so nothing is written into one. The prompt's last token is run,
    in this step or a later one. At most `budget` tokens are run in a step.
    """
    most = (prompt_tokens - 1) // block_size * block_size
    reused = min(found_tokens, most)
    return reused, min(prompt_tokens - reused, budget)
