"""Wrong answers that lab 06's checks met as strangers and once let pass, and know since."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict, deque
from functools import partial

import torch

from labkit.cache import OutOfBlocks
from labkit.labs.lab06.chains import chain
from labkit.labs.lab06.references import (
    BlockAllocator,
    BlockTable,
    best_block_size,
    copy_on_write,
    first_chunk,
    reusable,
    slots_of,
    waste,
)
from tests.labs.answer import Wrong


def a_block_for_no_token(held, final, room, block_size):
    empty = sum(max(1, -(-tokens // block_size)) * block_size - tokens for tokens in held)
    return sum(f - h for h, f in zip(held, final, strict=True)), sum(room - f for f in final), empty


class RemovesFromAList:
    def __init__(self, num_blocks):
        self.plain, self.kept = list(range(num_blocks))[::-1], OrderedDict()
        self.counts = [0] * num_blocks

    @property
    def num_free(self):
        return len(self.plain) + len(self.kept)

    def ref_count(self, block):
        return self.counts[block]

    def take(self):
        if self.plain:
            block = self.plain.pop()
        elif self.kept:
            block, _ = self.kept.popitem(last=False)
        else:
            raise OutOfBlocks("none")
        self.counts[block] = 1
        return block

    def hold(self, block):
        if self.counts[block] == 0:
            if block in self.kept:
                del self.kept[block]
            else:
                self.plain.remove(block)
        self.counts[block] += 1

    def drop(self, block, *, keep=False):
        if not self.counts[block]:
            raise ValueError(block)
        self.counts[block] -= 1
        if self.counts[block]:
            return False
        if keep:
            self.kept[block] = None
        else:
            self.plain.append(block)
        return True


class LooksForOneWithoutHolder:
    def __init__(self, num_blocks):
        self.kept = OrderedDict()
        self.counts = [0] * num_blocks
        self.free = num_blocks

    @property
    def num_free(self):
        return self.free

    def ref_count(self, block):
        return self.counts[block]

    def take(self):
        if not self.free:
            raise OutOfBlocks("none")
        block = next((b for b, count in enumerate(self.counts) if not count and b not in self.kept), None)
        if block is None:
            block = next(iter(self.kept))
        self.hold(block)
        return block

    def hold(self, block):
        self.kept.pop(block, None)
        self.free -= self.counts[block] == 0
        self.counts[block] += 1

    def drop(self, block, *, keep=False):
        if not self.counts[block]:
            raise ValueError(block)
        self.counts[block] -= 1
        if self.counts[block]:
            return False
        self.free += 1
        if keep:
            self.kept[block] = None
        return True


def exp_of_scores_as_they_are(q, keys, values, block_table, lengths):
    _, heads, dim = q.shape
    kv = keys.shape[2]
    index = block_table.long().clamp(min=0)
    k, v = keys[index].flatten(1, 2).to(q.dtype), values[index].flatten(1, 2).to(q.dtype)
    here = torch.arange(k.shape[1]) < lengths[:, None]
    k, v = (torch.where(here[..., None, None], x, 0.0) for x in (k, v))
    weights = torch.exp(torch.einsum("rkgd,rtkd->rkgt", q.unflatten(1, (kv, heads // kv)), k) * dim**-0.5)
    weights = weights * here[:, None, None]
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("rkgt,rtkd->rkgd", weights, v).flatten(1, 2).to(q.dtype)


def all_memory_in_float32(q, keys, values, block_table, lengths):
    block_size = keys.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values, out = keys.to(wide).flatten(0, 1), values.to(wide).flatten(0, 1), torch.empty_like(q)
    for row, length in enumerate(lengths.tolist()):
        position = torch.arange(length)
        slots = block_table[row].long()[position // block_size] * block_size + position % block_size
        k, v = (x[slots].transpose(0, 1)[None] for x in (keys, values))
        mixed = torch.nn.functional.scaled_dot_product_attention(q[row][None, :, None].to(wide), k, v, enable_gqa=True)
        out[row] = mixed[0, :, 0].to(q.dtype)
    return out


def dearer_than_a_million_is_never_chosen(lengths, shared, sizes, slot_cost, block_cost):
    best, least = sizes[0], 1e6
    for size in sorted(sizes):
        slots = sum(-n % size + s % size for n, s in zip(lengths, shared, strict=True))
        cost = slot_cost * slots + block_cost * sum(-(-n // size) for n in lengths)
        if cost < least:
            best, least = size, cost
    return best


# 06.1


def shares_of_all_slots(held, final, room, block_size):
    slots = len(held) * room
    return tuple(count / slots for count in waste(held, final, room, block_size))


def rests_by_mask(held, final, room, block_size):
    reserved, never, _ = waste(held, final, room, block_size)
    return reserved, never, sum((block_size - tokens) & (block_size - 1) for tokens in held)


def blocks_of_the_whole_answer(held, final, room, block_size):
    taken = sum(math.ceil(tokens / block_size) * block_size for tokens in final)
    return *waste(held, final, room, block_size)[:2], taken - sum(held)


# 06.2


def down_the_columns(block_table, positions, block_size):
    entry = torch.clamp(positions // block_size, max=len(block_table) - 1)
    return torch.gather(block_table.long(), 0, entry) * block_size + positions % block_size


def as_the_first_row_goes(block_table, positions, block_size):
    return block_table[:, positions[0] // block_size].long() * block_size + positions % block_size


def one_block_a_row(block_table, positions, block_size, which=0):
    entry = positions[:, which, None] // block_size
    return block_table.gather(1, entry).long() * block_size + positions % block_size


def in_floats(block_table, positions, block_size):
    blocks = block_table.gather(1, positions // block_size).to(torch.float32)
    return torch.add(positions % block_size, blocks * block_size).to(torch.int64)


def entries_rounded_up(block_table, positions, block_size):
    entry = torch.ceil(positions / block_size).long().clamp(max=block_table.shape[1] - 1)
    return block_table.gather(1, entry).long() * block_size + positions % block_size


def narrow_in_the_end(block_table, positions, block_size):
    return slots_of(block_table, positions, block_size).to(torch.int32)


def by_shifts(block_table, positions, block_size):
    bits = int(math.log2(block_size))
    return (block_table.gather(1, positions >> bits).long() << bits) + (positions & ((1 << bits) - 1))


# 06.3


class NextOfADict(BlockAllocator):
    """Where the first places of a dict were emptied, next(iter()) passes them each time."""

    def __init__(self, num_blocks, kept=OrderedDict):
        self.plain, self.kept, self.holders = dict.fromkeys(range(num_blocks)), kept(), [0] * num_blocks

    @property
    def num_free(self):
        return len(self.plain) + len(self.kept)

    def take(self):
        if not self.num_free:
            raise OutOfBlocks("none")
        line = self.plain or self.kept
        block = next(iter(line))
        self.hold(block)
        return block

    def hold(self, block):
        for line in (self.plain, self.kept):
            line.pop(block, None)
        self.holders[block] += 1

    def drop(self, block, *, keep=False):
        if not self.holders[block]:
            raise ValueError(block)
        self.holders[block] -= 1
        if not self.holders[block]:
            (self.kept if keep else self.plain)[block] = None
        return not self.holders[block]


class KeptInADict(NextOfADict):
    def __init__(self, num_blocks):
        super().__init__(num_blocks, dict)
        self.plain = OrderedDict(self.plain)


class GoesRound(NextOfADict):
    """The next one without a holder, from where the last one was found."""

    def __init__(self, num_blocks):
        super().__init__(num_blocks)
        self.at = 0

    def take(self):
        if not self.plain:
            return super().take()
        while self.at not in self.plain:
            self.at = (self.at + 1) % len(self.holders)
        self.hold(self.at)
        return self.at


class RemovesFromADeque(NextOfADict):
    def __init__(self, num_blocks):
        super().__init__(num_blocks)
        self.plain = deque(self.plain)

    def take(self):
        if self.plain:
            block = self.plain.popleft()
            self.holders[block] = 1
            return block
        return super().take()

    def hold(self, block):
        if block in self.kept:
            del self.kept[block]
        elif not self.holders[block]:
            self.plain.remove(block)
        self.holders[block] += 1

    def drop(self, block, *, keep=False):
        if keep or not self.holders[block]:
            return super().drop(block, keep=keep)
        self.holders[block] -= 1
        if not self.holders[block]:
            self.plain.append(block)
        return not self.holders[block]


class OldPlaceCounts(NextOfADict):
    """Kept blocks in a line that none ever leaves but by take()."""

    def __init__(self, num_blocks):
        super().__init__(num_blocks)
        self.plain, self.line = OrderedDict(self.plain), deque()

    def take(self):
        if not self.plain and self.kept:
            block = next(block for block in iter(self.line.popleft, None) if block in self.kept)
            self.hold(block)
            return block
        return super().take()

    def drop(self, block, *, keep=False):
        free = super().drop(block, keep=keep)
        if free and keep:
            self.line.append(block)
        return free


class OneLineForAll(BlockAllocator):
    free = OrderedDict()  # noqa: RUF012

    def __init__(self, num_blocks):
        self.holders = [0] * num_blocks
        for block in range(num_blocks):
            self.free[block] = None


class HeldTwice(BlockAllocator):
    def hold(self, block):
        if self.holders[block] == 0:
            self.holders[block] = 1
        super().hold(block)


class KeptForEver(BlockAllocator):
    def __init__(self, num_blocks):
        super().__init__(num_blocks)
        self.dear = set()

    def drop(self, block, *, keep=False):
        if keep:
            self.dear.add(block)
        return super().drop(block, keep=block in self.dear)


class KeptAreNotTaken(NextOfADict):
    def take(self):
        if not self.plain:
            raise OutOfBlocks("nothing but kept ones")
        return super().take()


# 06.4


class ForkCopiesAll(BlockTable):
    def fork(self):
        for block in self.blocks:
            self.allocator.hold(block)
        return copy.deepcopy(self)


# 06.5


def rectangle(q, keys, values, block_table, lengths, *, behind=0, cut=True, add=False, axis=-1, heads=None):
    """Attention over all entries of the table at once, with one thing done in another way."""
    dim, kv = q.shape[2], keys.shape[2]
    index = block_table.long().clamp(min=0)
    k, v = (x[index].flatten(1, 2).to(q.dtype) for x in (keys, values))
    length = (lengths if cut else lengths.max().expand_as(lengths)) + behind
    hidden = (torch.arange(k.shape[1]) >= length[:, None])[:, None]
    v = v.masked_fill(hidden[:, 0, :, None, None], 0)
    k = k if add else k.masked_fill(hidden[:, 0, :, None, None], 0)
    which = torch.arange(q.shape[1]) // (q.shape[1] // kv) if heads is None else heads(q.shape[1], kv)
    scores = torch.einsum("rhd,rthd->rht", q, k[:, :, which]) / math.sqrt(dim)
    if axis == -1:
        nothing = torch.zeros_like(scores).masked_fill(hidden, -math.inf)
        weights = (scores + nothing if add else scores.masked_fill(hidden, -math.inf)).softmax(-1)
    else:
        weights = scores.unflatten(1, (kv, -1)).softmax(axis).flatten(1, 2).masked_fill(hidden, 0)
    return torch.einsum("rht,rthd->rhd", weights, v[:, :, which])


# 06.6


def asks_one_further(table):
    return [] if not table.blocks or (table.seq_len + 1) % table.block_size == 0 else copy_on_write(table)


def in_blocks_of_four(table):
    if table.seq_len % 4 == 0 or table.allocator.ref_count(table.blocks[-1]) == 1:
        return []
    shared, table.blocks[-1] = table.blocks[-1], table.allocator.take()
    table.allocator.drop(shared)
    return [(shared, table.blocks[-1])]


def three_are_many(table):
    if table.blocks and table.allocator.ref_count(table.blocks[-1]) < 3:
        return []
    return copy_on_write(table)


def asks_for_room_first(table):
    if not table.allocator.num_free:
        raise OutOfBlocks("no room for a copy")
    return copy_on_write(table)


def takes_for_the_next_token(table):
    if table.seq_len % table.block_size == 0:
        table.blocks.append(table.allocator.take())
        return []
    return copy_on_write(table)


# 06.7


def zero_is_none(tokens, found, block_size, salt):
    blocks = reusable(tokens, found, block_size, salt)
    return blocks[: blocks.index(0)] if 0 in blocks else blocks


def all_but_the_last_found(tokens, found, block_size, salt):
    return reusable([*tokens, -1], found, block_size, salt)[:-1]


def remembers(tokens, found, block_size, salt, known={}):  # noqa: B006
    key = (*tokens, salt)
    if key not in known:
        known[key] = reusable(tokens, found, block_size, salt)
    return list(known[key])


def compares_one_block(tokens, found, block_size, salt):
    key, blocks = salt, []
    for end in range(block_size, len(tokens), block_size):
        key = chain(key, tuple(tokens[end - block_size : end]))
        one = found.get(key)
        if one is None or one.salt != salt or list(one.tokens)[:block_size] != tokens[:block_size]:
            return blocks
        blocks.append(one.block)
    return blocks


# 06.9


def cheapest(cost, lengths, shared, sizes, slot_cost, block_cost):
    """The size of least cost. cost: of a size, each request's tokens and shared tokens, a slot and a block."""
    return min(sorted(sizes), key=lambda size: cost(size, lengths, shared, slot_cost, block_cost))


def blocks_of(size, lengths):
    return sum((tokens + size - 1) // size for tokens in lengths)


def one_more_each(size, lengths, shared, slot, block):
    blocks = sum(1 + tokens // size for tokens in lengths)
    return slot * (blocks * size - sum(lengths) + sum(s % size for s in shared)) + block * blocks


def full_ones_cost(size, lengths, shared, slot, block):
    again = sum(s - s % size for s in shared)
    return slot * (sum(-n % size for n in lengths) + again) + block * blocks_of(size, lengths)


def one_beginning(size, lengths, shared, slot, block):
    return slot * (sum(-n % size for n in lengths) + max([0, *shared]) % size) + block * blocks_of(size, lengths)


def one_long_row(size, lengths, shared, slot, block):
    tokens = sum(lengths)
    return slot * (-tokens % size + sum(s % size for s in shared)) + block * math.ceil(tokens / size)


def shared_slots_are_free_of_cost(size, lengths, shared, slot, block):
    return slot * sum(-n % size for n in lengths) + sum(s % size for s in shared) + block * blocks_of(size, lengths)


def with_masks(size, lengths, shared, slot, block):
    slots = sum((-n & size - 1) + (s & size - 1) for n, s in zip(lengths, shared, strict=True))
    return slot * slots + block * blocks_of(size, lengths)


def for_each_slot(size, lengths, shared, slot, block):
    slots = sum(-n % size + s % size for n, s in zip(lengths, shared, strict=True))
    return (slot * slots + block * blocks_of(size, lengths)) / size


def until_it_rises(lengths, shared, sizes, slot_cost, block_cost):
    tried = []
    for size in sorted(sizes):
        slots = sum(-n % size + s % size for n, s in zip(lengths, shared, strict=True))
        tried.append((slot_cost * slots + block_cost * blocks_of(size, lengths), size))
        if len(tried) > 1 and tried[-1][0] > tried[-2][0]:
            break
    return best_block_size(lengths, shared, [size for _, size in tried], slot_cost, block_cost)


# 06.d3


def one_runs_all_the_same(prompt_tokens, found_tokens, block_size, budget):
    return found_tokens, min(prompt_tokens - found_tokens or 1, budget)


def never_the_prompts_last(prompt_tokens, found_tokens, block_size, budget):
    reused = min(found_tokens, max(prompt_tokens // block_size - 1, 0) * block_size)
    return reused, min(prompt_tokens - reused, budget)


def in_blocks_of_16(prompt_tokens, found_tokens, block_size, budget):
    reused = min(found_tokens, (prompt_tokens - 1) // 16 * 16)
    return reused, min(prompt_tokens - reused, budget)


def rounded_by_mask(prompt_tokens, found_tokens, block_size, budget):
    reused = min(found_tokens, (prompt_tokens - 1) & -block_size)
    return reused, min(prompt_tokens - reused, budget)


def later_ones_are_reused(prompt_tokens, found_tokens, block_size, budget):
    run = first_chunk(prompt_tokens, found_tokens, block_size, budget)[1]
    return prompt_tokens - run, run


def a_block_without_asking(prompt_tokens, found_tokens, block_size, budget):
    reused, run = first_chunk(prompt_tokens, found_tokens, block_size, budget)
    return reused, block_size if found_tokens == prompt_tokens else run


WRONG = [
    Wrong("06.1", "a-block-for-none", "a request with no token yet is given a block", a_block_for_no_token),
    Wrong("06.3", "not-constant", "list.remove in hold, of a block that was not kept", RemovesFromAList),
    Wrong("06.3", "not-constant", "take looks for the first block without holders", LooksForOneWithoutHolder),
    Wrong("06.1", "share", "shares of all slots", shares_of_all_slots),
    Wrong("06.1", "powers-of-two", "a bit mask for the rest", rests_by_mask),
    Wrong("06.1", "blocks-for-final", "the blocks of all tokens to come", blocks_of_the_whole_answer),
    Wrong("06.2", "wrong-axis", "gather along dimension 0", down_the_columns),
    Wrong("06.2", "first-rows-positions", "the first row's positions for all", as_the_first_row_goes),
    Wrong("06.2", "one-block-for-all", "the block of a row's first token for all", one_block_a_row),
    Wrong("06.2", "one-block-for-all", "the block of a row's last token for all", partial(one_block_a_row, which=-1)),
    Wrong("06.2", "float32", "the product in float32", in_floats),
    Wrong("06.2", "rounded-up", "entries rounded up", entries_rounded_up),
    Wrong("06.2", "int32-result", "computed in int64, returned in int32", narrow_in_the_end),
    Wrong("06.2", "powers-of-two", "shifts and a mask", by_shifts),
    Wrong("06.3", "not-constant", "next(iter()) of a plain dict", NextOfADict),
    Wrong("06.3", "not-constant", "kept blocks in a plain dict", KeptInADict),
    Wrong("06.3", "not-constant", "a search that goes on where the last one ended", GoesRound),
    Wrong("06.3", "not-constant", "deque.remove in hold", RemovesFromADeque),
    Wrong("06.3", "stale-place", "a block kept twice is taken at its first place", OldPlaceCounts),
    Wrong("06.3", "shared", "one line of free blocks for all allocators, filled by each", OneLineForAll),
    Wrong("06.3", "ref-count", "two holders after hold() of a free block", HeldTwice),
    Wrong("06.3", "keep-sticks", "kept once, kept for ever", KeptForEver),
    Wrong("06.3", "refused-though-free", "kept blocks are never taken", KeptAreNotTaken),
    Wrong("06.4", "allocator-copied", "fork by deepcopy", ForkCopiesAll),
    Wrong("06.5", "one-too-many", "`<=` for `<`", partial(rectangle, behind=1)),
    Wrong("06.5", "empty-slots-read", "all rows as long as the longest", partial(rectangle, cut=False)),
    Wrong("06.5", "axis-group", "softmax along the query heads of a group", partial(rectangle, axis=2)),
    Wrong("06.5", "axis-heads", "softmax along the KV heads", partial(rectangle, axis=1)),
    Wrong(
        "06.5",
        "head-mapping",
        "KV head h, or the last",
        partial(rectangle, heads=lambda heads, kv: torch.arange(heads).clamp(max=kv - 1)),
    ),
    Wrong("06.5", "reads-stale-keys", "-inf is added to scores that are NaN", partial(rectangle, add=True)),
    Wrong("06.6", "question-off-by-one", "whether the token after the next opens a block", asks_one_further),
    Wrong("06.6", "fixed-size", "4 is written down", in_blocks_of_four),
    Wrong("06.6", "no-copy", "shared is what three hold", three_are_many),
    Wrong("06.6", "refused-needlessly", "a free block is asked for first", asks_for_room_first),
    Wrong("06.6", "taken-early", "the next token's block is taken here", takes_for_the_next_token),
    Wrong("06.7", "block-0", "block 0 is taken for none", zero_is_none),
    Wrong("06.7", "last-block-left-out", "the last block found is left out", all_but_the_last_found),
    Wrong("06.7", "remembered", "answers are kept by tokens and salt", remembers),
    Wrong("06.7", "only-first-tokens", "only the first block's tokens are compared", compares_one_block),
    Wrong("06.9", "one-block-more", "// + 1", partial(cheapest, one_more_each)),
    Wrong("06.9", "shared-turned-round", "shared tokens of full blocks cost", partial(cheapest, full_ones_cost)),
    Wrong("06.9", "shared-once", "one beginning for all", partial(cheapest, one_beginning)),
    Wrong("06.9", "together", "all tokens in one row of blocks", partial(cheapest, one_long_row)),
    Wrong("06.9", "slot-cost-left-out", "shared tokens weigh 1", partial(cheapest, shared_slots_are_free_of_cost)),
    Wrong("06.9", "powers-of-two", "bit masks", partial(cheapest, with_masks)),
    Wrong("06.9", "divided-by-size", "the cost of a slot", partial(cheapest, for_each_slot)),
    Wrong("06.9", "stops-early", "until the cost rises", until_it_rises),
    Wrong("06.d3", "written-into-shared", "all reused, one run", one_runs_all_the_same),
    Wrong("06.d3", "prompts-last-block", "the prompt's last full block is never reused", never_the_prompts_last),
    Wrong("06.d3", "fixed-size", "16 is written down", in_blocks_of_16),
    Wrong("06.d3", "powers-of-two", "a bit mask", rounded_by_mask),
    Wrong("06.d3", "not-run-yet", "what is run later is called reused", later_ones_are_reused),
    Wrong("06.d3", "a-block-whatever-the-budget", "a whole block is run, whatever the budget", a_block_without_asking),
    Wrong("06.5", "scores-overflow", "a softmax that does not take the greatest score off", exp_of_scores_as_they_are),
    Wrong(
        "06.5", "reads-everything", "all memory is made float32, a copy where K and V are halves", all_memory_in_float32
    ),
    Wrong("06.9", "start-value", "a search that begins at a cost of a million", dearer_than_a_million_is_never_chosen),
]
