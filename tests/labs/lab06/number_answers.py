"""Wrong answers to 06.1, 06.2, 06.7, 06.9 and 06.d1 to 06.d3, and other right ones."""

from __future__ import annotations

import numpy as np
import torch

from labkit.labs.lab06.chains import chain
from labkit.labs.lab06.prefixes import other
from labkit.labs.lab06.references import best_block_size, finish, first_chunk, reusable, slots_of, waste
from tests.labs.answer import Wrong

# 06.1


def waste_swapped(held, final, room, block_size):
    reserved, never, in_blocks = waste(held, final, room, block_size)
    return never, reserved, in_blocks


def waste_all_empty(held, final, room, block_size):
    _, never, in_blocks = waste(held, final, room, block_size)
    return sum(room - h for h in held), never, in_blocks


def waste_never_from_now(held, final, room, block_size):
    reserved, _, in_blocks = waste(held, final, room, block_size)
    return reserved, sum(room - h for h in held), in_blocks


def waste_full_block(held, final, room, block_size):
    return (*waste(held, final, room, block_size)[:2], sum(block_size - h % block_size for h in held))


def waste_remainders(held, final, room, block_size):
    return (*waste(held, final, room, block_size)[:2], sum(h % block_size for h in held))


def waste_together(held, final, room, block_size):
    return (*waste(held, final, room, block_size)[:2], -sum(held) % block_size)


def waste_one_room(held, final, room, block_size):
    reserved, _, in_blocks = waste(held, final, room, block_size)
    return reserved, room - sum(final), in_blocks


def waste_final(held, final, room, block_size):
    return (*waste(held, final, room, block_size)[:2], sum(-f % block_size for f in final))


def waste_blocks(held, final, room, block_size):
    return (*waste(held, final, room, block_size)[:2], sum(-(-h // block_size) for h in held))


def waste_slots(held, final, room, block_size):
    return (*waste(held, final, room, block_size)[:2], sum(-(-h // block_size) * block_size for h in held))


def waste_floats(held, final, room, block_size):
    return tuple(map(float, waste(held, final, room, block_size)))


def waste_two(held, final, room, block_size):
    return waste(held, final, room, block_size)[:2]


def waste_tokens(held, final, room, block_size):
    return (sum(final), *waste(held, final, room, block_size)[1:])


def waste_torch(held, final, room, block_size):
    now, end = torch.tensor(held), torch.tensor(final)
    return (end - now).sum().item(), (room - end).sum().item(), (-now % block_size).sum().item()


def waste_array(held, final, room, block_size):
    now, end = np.array(held), np.array(final)
    return (end - now).sum(), (room - end).sum(), (-now % block_size).sum()


def waste_by_loop(held, final, room, block_size):
    reserved = never = empty = 0
    for now, end in zip(held, final, strict=True):
        reserved += end - now
        never += room - end
        blocks = (now + block_size - 1) // block_size
        empty += blocks * block_size - now
    return [reserved, never, empty]


def waste_numpy(held, final, room, block_size):
    now, end = np.array(held, dtype=np.int64), np.array(final, dtype=np.int64)
    return (end - now).sum(), (room - end).sum(), ((-now) % block_size).sum()


# 06.2


def slots_rows(block_table, positions, block_size):
    return block_table[positions // block_size] * block_size + positions % block_size


def slots_first(block_table, positions, block_size):
    return block_table[0, positions // block_size].long() * block_size + positions % block_size


def slots_narrow(block_table, positions, block_size):
    return (block_table.gather(1, positions // block_size) * block_size + (positions % block_size).int()).long()


def slots_no_table(block_table, positions, block_size):
    return positions // block_size * block_size + positions % block_size


def slots_not_multiplied(block_table, positions, block_size):
    return block_table.gather(1, positions // block_size).long() + positions % block_size


def slots_no_place(block_table, positions, block_size):
    return block_table.gather(1, positions // block_size).long() * block_size


def slots_position(block_table, positions, block_size):
    return block_table.gather(1, positions // block_size).long() * block_size + positions


def slots_both(block_table, positions, block_size):
    return (block_table.gather(1, positions // block_size).long() + positions % block_size) * block_size


def slots_16(block_table, positions, block_size):
    return block_table.gather(1, positions // block_size).long() * 16 + positions % 16


def slots_int32(block_table, positions, block_size):
    return slots_of(block_table, positions, block_size).int()


def slots_shift(block_table, positions, block_size):
    bits = block_size.bit_length() - 1
    return (block_table.gather(1, positions // block_size).long() << bits) + positions % block_size


def slots_by_rows(block_table, positions, block_size):
    rows = [
        block_table[row].long()[positions[row] // block_size] * block_size + positions[row] % block_size
        for row in range(len(positions))
    ]
    return torch.stack(rows)


def slots_by_index(block_table, positions, block_size):
    row = torch.arange(len(block_table))[:, None]
    entry, place = positions.div(block_size, rounding_mode="floor"), positions.remainder(block_size)
    return block_table[row, entry].to(torch.int64).mul(block_size).add(place)


def slots_all_slots(block_table, positions, block_size):
    every = block_table.long()[:, :, None] * block_size + torch.arange(block_size)
    return every.flatten(1).take_along_dim(positions, dim=1)


def slots_by_tokens(block_table, positions, block_size):
    slots = torch.empty_like(positions)
    for token in range(positions.shape[1]):
        at = positions[:, token]
        blocks = block_table[torch.arange(len(at)), at // block_size].long()
        slots[:, token] = blocks * block_size + at % block_size
    return slots


def slots_in_python(block_table, positions, block_size):
    rows = zip(block_table.tolist(), positions.tolist(), strict=True)
    return torch.tensor([[t[p // block_size] * block_size + p % block_size for p in ps] for t, ps in rows])


# 06.7


def counts_tokens(tokens, found, block_size, salt):
    return block_size * len(reusable(tokens, found, block_size, salt))


def gives_keys(tokens, found, block_size, salt):
    blocks = reusable(tokens, found, block_size, salt)
    return [key for key, one in found.items() if one.block in blocks]


def tuple_and_list(tokens, found, block_size, salt):
    blocks, key = [], salt
    for end in range(block_size, len(tokens), block_size):
        key = chain(key, tuple(tokens[end - block_size : end]))
        if key not in found or found[key].salt != salt or found[key].tokens != tokens[:end]:
            break
        blocks.append(found[key].block)
    return blocks


def whole_prefixes(tokens, found, block_size, salt):
    blocks, key = [], salt
    for end in range(block_size, len(tokens), block_size):
        key = chain(key, tuple(tokens[:end]))
        if key not in found or found[key].salt != salt or list(found[key].tokens) != tokens[:end]:
            break
        blocks.append(found[key].block)
    return blocks


def last_block_dropped(tokens, found, block_size, salt):
    return reusable(tokens, found, block_size, salt)[:-1]


def reuse_backwards(tokens, found, block_size, salt):
    return reusable(tokens, found, block_size, salt)[::-1]


def reuse_by_iterator(tokens, found, block_size, salt):
    def walk():
        key, held = salt, ()
        for index in range((len(tokens) - 1) // block_size):
            own = tuple(tokens[index * block_size : (index + 1) * block_size])
            key, held = chain(key, own), held + own
            one = found[key] if key in found else None
            if one is None or (one.salt, one.tokens) != (salt, held):
                return
            yield one.block

    return list(walk())


def reuse_by_while(tokens, found, block_size, salt):
    out, end, key = (), block_size, salt
    while end <= len(tokens) - 1:
        key = chain(key, tuple(tokens[end - block_size : end]))
        try:
            block, whose, what = found[key]
        except KeyError:
            break
        if whose == salt and what == tuple(tokens[:end]):
            out, end = (*out, block), end + block_size
        else:
            break
    return out


# 06.9


def best(cost, order=sorted, choose=min):
    return lambda lengths, shared, sizes, slot_cost, block_cost: choose(
        order(sizes), key=lambda size: cost(lengths, shared, size, slot_cost, block_cost)
    )


def named(function):
    """With the blank's parameters, as the notebook calls them."""

    def best_block_size(lengths, shared, sizes, slot_cost, block_cost):
        return function(lengths, shared, sizes, slot_cost, block_cost)

    return best_block_size


def full_cost(lengths, shared, size, slot_cost, block_cost):
    empty = sum(-n % size for n in lengths)
    return slot_cost * (empty + sum(s % size for s in shared)) + block_cost * sum(-(-n // size) for n in lengths)


def without_shared(lengths, shared, size, slot_cost, block_cost):
    return full_cost(lengths, [], size, slot_cost, block_cost)


def without_empty(lengths, shared, size, slot_cost, block_cost):
    return slot_cost * sum(s % size for s in shared) + block_cost * sum(-(-n // size) for n in lengths)


def rounded_down(lengths, shared, size, slot_cost, block_cost):
    empty = sum(-n % size for n in lengths)
    return slot_cost * (empty + sum(s % size for s in shared)) + block_cost * sum(n // size for n in lengths)


def not_rounded(lengths, shared, size, slot_cost, block_cost):
    empty = sum(-n % size for n in lengths)
    return slot_cost * (empty + sum(s % size for s in shared)) + block_cost * sum(n / size for n in lengths)


def whole_empty_block(lengths, shared, size, slot_cost, block_cost):
    empty = sum(size - n % size for n in lengths)
    return slot_cost * (empty + sum(s % size for s in shared)) + block_cost * sum(-(-n // size) for n in lengths)


def best_by_numpy(lengths, shared, sizes, slot_cost, block_cost):
    n, s, tried = np.array(lengths, dtype=int), np.array(shared, dtype=int), np.array(sorted(sizes))[:, None]
    cost = slot_cost * ((-n % tried).sum(1) + (s % tried).sum(1)) + block_cost * (-(-n // tried)).sum(1)
    return tried[cost.argmin(), 0]


def best_by_loop(lengths, shared, sizes, slot_cost, block_cost):
    found, least = None, None
    for size in sizes:
        total = 0.0
        for n, s in zip(lengths, shared, strict=True):
            blocks = (n + size - 1) // size
            total += slot_cost * (blocks * size - n) + slot_cost * (s - s // size * size) + block_cost * blocks
        if least is None or (total, size) < (least, found):
            found, least = size, total
    return found


# 06.d1


def finish_get(tables, holders, free, request):
    for block in tables.get(request, []):
        holders[block] -= 1
        if holders[block] <= 0:
            free.append(block)


def finish_del(tables, holders, free, request):
    for block in tables[request]:
        holders[block] -= 1
        if not holders[block]:
            free.append(block)
    del tables[request]


def finish_emptied(tables, holders, free, request):
    if request in tables:
        for block in tables[request]:
            holders[block] -= 1
            if not holders[block]:
                free.append(block)
        tables[request] = []


def finish_new_list(tables, holders, free, request):
    for block in tables.pop(request, []):
        holders[block] -= 1
        if not holders[block]:
            free = [*free, block]


def finish_only_table(tables, holders, free, request):
    tables.pop(request, None)


def finish_clear(tables, holders, free, request):
    finish(tables, holders, free, request)
    tables.clear()


def finish_all_free(tables, holders, free, request):
    for block in tables.pop(request, []):
        holders[block] -= 1
        free.append(block)


def finish_uncounted(tables, holders, free, request):
    for block in tables.pop(request, []):
        if holders[block] == 1:
            free.append(block)


def finish_first(tables, holders, free, request):
    blocks = tables.pop(request, [])
    finish({request: blocks[:1]}, holders, free, request)


def finish_by_if(tables, holders, free, request):
    if request not in tables:
        return
    for block in reversed(tables.pop(request)):
        if holders[block] == 1:
            free.insert(0, block)
        holders[block] = holders[block] - 1


def finish_plus(tables, holders, free, request):
    blocks = tables.pop(request, ())
    for block in blocks:
        holders[block] -= 1
    free += [block for block in blocks if not holders[block]]


def finish_checked(tables, holders, free, request):
    try:
        blocks = tables.pop(request)
    except KeyError:
        blocks = []
    while blocks:
        holders[block := blocks.pop()] += -1
        free[len(free) :] = [block] * (holders[block] < 1)
    return free


# 06.d2


def row_slice(block_table, lengths, row, blocks, tokens):
    block_table[row, : len(blocks)] = torch.tensor(blocks, dtype=block_table.dtype)
    lengths[row] = tokens


def row_if(block_table, lengths, row, blocks, tokens):
    if blocks:
        block_table[row] = -1
        block_table[row, : len(blocks)] = torch.tensor(blocks, dtype=block_table.dtype)
        lengths[row] = tokens


def row_max(block_table, lengths, row, blocks, tokens):
    block_table[row] = -1
    block_table[row, : len(blocks)] = torch.tensor(blocks, dtype=block_table.dtype)
    lengths[row] = max(tokens, int(lengths[row]))


def row_zeros(block_table, lengths, row, blocks, tokens):
    block_table[row] = 0
    block_table[row, : len(blocks)] = torch.tensor(blocks, dtype=block_table.dtype)
    lengths[row] = tokens


def row_all(block_table, lengths, row, blocks, tokens):
    block_table[:] = -1
    block_table[row, : len(blocks)] = torch.tensor(blocks, dtype=block_table.dtype)
    lengths[row] = tokens


def row_new(block_table, lengths, row, blocks, tokens):
    block_table = torch.full_like(block_table, -1)
    block_table[row, : len(blocks)] = torch.tensor(blocks, dtype=block_table.dtype)
    lengths[row] = tokens


def row_block_count(block_table, lengths, row, blocks, tokens):
    block_table[row] = -1
    block_table[row, : len(blocks)] = torch.tensor(blocks, dtype=block_table.dtype)
    lengths[row] = len(blocks)


def row_padded_list(block_table, lengths, row, blocks, tokens):
    wide = block_table.shape[1]
    padded = list(blocks) + [-1] * (wide - len(blocks))
    block_table[row].copy_(torch.tensor(padded))
    lengths[row : row + 1].fill_(tokens)


def row_by_loop(block_table, lengths, row, blocks, tokens):
    for place in range(block_table.size(1)):
        block_table[row, place] = blocks[place] if place < len(blocks) else -1
    lengths[row] = tokens


# 06.d3


def chunk_all(prompt_tokens, found_tokens, block_size, budget):
    return found_tokens, min(prompt_tokens - found_tokens, budget)


def chunk_one_token(prompt_tokens, found_tokens, block_size, budget):
    reused = min(found_tokens, prompt_tokens - 1)
    return reused, min(prompt_tokens - reused, budget)


def chunk_always_less(prompt_tokens, found_tokens, block_size, budget):
    reused = max(found_tokens - block_size, 0)
    return reused, min(prompt_tokens - reused, budget)


def chunk_nothing(prompt_tokens, found_tokens, block_size, budget):
    reused = 0 if found_tokens == prompt_tokens else found_tokens
    return reused, min(prompt_tokens - reused, budget)


def chunk_at_least_one(prompt_tokens, found_tokens, block_size, budget):
    reused, _ = first_chunk(prompt_tokens, found_tokens, block_size, budget)
    return reused, max(1, min(prompt_tokens - found_tokens, budget))


def chunk_no_budget(prompt_tokens, found_tokens, block_size, budget):
    reused, _ = first_chunk(prompt_tokens, found_tokens, block_size, budget)
    return reused, prompt_tokens - reused


def chunk_one_less(prompt_tokens, found_tokens, block_size, budget):
    reused = max(found_tokens - 1, 0)
    return reused, min(prompt_tokens - reused, budget)


def chunk_blocks(prompt_tokens, found_tokens, block_size, budget):
    reused = max(found_tokens - 1, 0) // block_size
    return reused, min(prompt_tokens - reused, budget)


def chunk_below_nothing(prompt_tokens, found_tokens, block_size, budget):
    reused = found_tokens - block_size
    return reused, min(prompt_tokens - reused, budget)


def chunk_whole_prompt(prompt_tokens, found_tokens, block_size, budget):
    return first_chunk(prompt_tokens, found_tokens, block_size, budget)[0], min(prompt_tokens, budget)


def chunk_only_budget(prompt_tokens, found_tokens, block_size, budget):
    return first_chunk(prompt_tokens, found_tokens, block_size, budget)[0], budget


def chunk_only_run(prompt_tokens, found_tokens, block_size, budget):
    return first_chunk(prompt_tokens, found_tokens, block_size, budget)[1]


def chunk_by_if(prompt_tokens, found_tokens, block_size, budget):
    reused = found_tokens
    if reused >= prompt_tokens:
        reused -= block_size
    left = prompt_tokens - reused
    return [reused, left if left < budget else budget]


def chunk_by_while(prompt_tokens, found_tokens, block_size, budget):
    reused = 0
    while reused + block_size <= found_tokens and reused + block_size < prompt_tokens:
        reused += block_size
    return reused, int(np.minimum(prompt_tokens - reused, budget))


WRONG = [
    Wrong("06.1", "order", "reserved and never filled changed places", waste_swapped),
    Wrong("06.1", "counts-all-empty", "every empty slot is reserved", waste_all_empty),
    Wrong("06.1", "counts-all-empty", "what is reserved is never filled too", waste_never_from_now),
    Wrong("06.1", "full-block-empty", "a full last block counts as empty", waste_full_block),
    Wrong("06.1", "counts-tokens", "the tokens of last blocks", waste_remainders),
    Wrong("06.1", "counts-tokens", "all tokens are reserved", waste_tokens),
    Wrong("06.1", "one-request", "one last block for all requests", waste_together),
    Wrong("06.1", "one-request", "room for one", waste_one_room),
    Wrong("06.1", "final-tokens", "blocks as if all tokens were there", waste_final),
    Wrong("06.1", "blocks-counted", "blocks, not slots", waste_blocks),
    Wrong("06.1", "slots-taken", "all slots of the blocks", waste_slots),
    Wrong("06.1", "not-whole", "floats", waste_floats),
    Wrong("06.1", "float-when-empty", "a tensor of an empty list", waste_torch),
    Wrong("06.1", "float-when-empty", "an array of an empty list", waste_array),
    Wrong("06.1", "not-a-tuple", "two of three", waste_two),
    Wrong("06.2", "rows-picked", "an index on rows", slots_rows),
    Wrong("06.2", "first-row", "the first row's table for all", slots_first),
    Wrong("06.2", "overflow", "the product in int32", slots_narrow, "kernels with 32-bit offsets"),
    Wrong("06.2", "no-table", "the table is not used", slots_no_table),
    Wrong("06.2", "block-not-multiplied", "a block is taken for its first slot", slots_not_multiplied),
    Wrong("06.2", "place-missing", "the block's first slot", slots_no_place),
    Wrong("06.2", "position-for-place", "the whole position is added", slots_position),
    Wrong("06.2", "multiplied-both", "the place is multiplied too", slots_both),
    Wrong("06.2", "fixed-size", "16 is written down", slots_16),
    Wrong("06.2", "int32-result", "int32 slots", slots_int32),
    Wrong("06.2", "powers-of-two", "a shift: sizes are powers of 2", slots_shift),
    Wrong("06.2", "loops", "row by row", slots_by_rows),
    Wrong("06.2", "left-pytorch", "token by token, in Python", slots_in_python),
    Wrong("06.2", "loops", "token by token", slots_by_tokens),
    Wrong("06.7", "last-token-reused", "all blocks of a prompt", other(last=1), "nano-vllm#144"),
    Wrong("06.7", "not-compared", "the key is trusted", other(check="nothing"), "prefix caching anywhere"),
    Wrong("06.7", "salt-not-compared", "another tenant's block under the same key", other(check="tokens")),
    Wrong("06.7", "tokens-not-compared", "only the salt is compared", other(check="salt")),
    Wrong("06.7", "only-own-tokens", "only the block's own tokens are compared", other(check="own")),
    Wrong("06.7", "goes-on-after-a-miss", "continue for break", other(holes=True)),
    Wrong("06.7", "not-chained", "a key of the block's own tokens", other(key="own", check="own", holes=True)),
    Wrong("06.7", "not-chained", "a key of the block's own tokens, not compared", other(key="own", check="nothing")),
    Wrong("06.7", "not-chained", "all tokens so far in every key", whole_prefixes),
    Wrong("06.7", "no-salt", "keys without salt", other(salted=False)),
    Wrong("06.7", "one-too-few", "a block before the last token is left out", other(least=1)),
    Wrong("06.7", "fixed-size", "blocks of 16", other(fixed=16)),
    Wrong("06.7", "nothing-found", "a tuple compared with a list", tuple_and_list),
    Wrong("06.7", "not-a-list", "tokens are counted", counts_tokens),
    Wrong("06.7", "not-blocks", "keys come back", gives_keys),
    Wrong("06.7", "last-block-left-out", "always a block less", last_block_dropped),
    Wrong("06.7", "blocks", "the last block first", reuse_backwards),
    Wrong("06.9", "no-shared", "shared tokens are left out", named(best(without_shared))),
    Wrong("06.9", "no-empty", "empty slots are left out", named(best(without_empty))),
    Wrong("06.9", "full-blocks-only", "blocks are rounded down", named(best(rounded_down))),
    Wrong("06.9", "blocks-not-rounded", "n / size blocks", named(best(not_rounded))),
    Wrong("06.9", "full-block-empty", "a full block has an empty one behind it", named(best(whole_empty_block))),
    Wrong("06.9", "order-of-sizes", "the first of equals as they come", named(best(full_cost, order=list))),
    Wrong("06.9", "largest-of-equals", "the largest of equals",
          named(best(full_cost, order=lambda sizes: sorted(sizes, reverse=True)))),
    Wrong("06.9", "dearest", "max for min", named(best(full_cost, choose=max))),
    Wrong("06.9", "costs-swapped", "the costs changed places",
          named(lambda n, s, sizes, slot, block: best_block_size(n, s, sizes, block, slot))),
    Wrong("06.d1", "freed-twice", "the bug as it is", finish_get, "allocators anywhere"),
    Wrong("06.d1", "raises-when-gone", "del of what is gone", finish_del),
    Wrong("06.d1", "table-left", "an empty table stays", finish_emptied),
    Wrong("06.d1", "not-freed", "a new list, not in place", finish_new_list),
    Wrong("06.d1", "not-freed", "the blocks are lost", finish_only_table),
    Wrong("06.d1", "not-freed", "the first block only", finish_first),
    Wrong("06.d1", "freed-while-held", "free whoever holds it", finish_all_free),
    Wrong("06.d1", "holders", "freed at one holder, never counted", finish_uncounted),
    Wrong("06.d1", "other-request", "every table goes", finish_clear),
    Wrong("06.d2", "old-blocks-left", "only the new entries are written", row_slice, "vllm#7018"),
    Wrong("06.d2", "old-blocks-left", "an empty row is left as it is", row_if),
    Wrong("06.d2", "old-length-left", "the longer of two lengths", row_max),
    Wrong("06.d2", "not-padded", "0 is a block", row_zeros),
    Wrong("06.d2", "other-row", "the whole table is emptied", row_all),
    Wrong("06.d2", "blocks-missing", "a new table, not in place", row_new),
    Wrong("06.d2", "length", "blocks are counted", row_block_count),
    Wrong("06.d3", "nothing-left-to-run", "the bug as it is", chunk_all, "nano-vllm#144"),
    Wrong("06.d3", "not-whole-blocks", "all but one token", chunk_one_token),
    Wrong("06.d3", "always-a-block-less", "one block less in any case", chunk_always_less),
    Wrong("06.d3", "reuses-nothing", "a full hit counts for nothing", chunk_nothing),
    Wrong("06.d3", "at-least-one", "one token is run, its block reused as before", chunk_at_least_one),
    Wrong("06.d3", "budget-left-out", "no budget", chunk_no_budget),
    Wrong("06.d3", "not-whole-blocks", "one token less than was found", chunk_one_less),
    Wrong("06.d3", "blocks-counted", "blocks for tokens", chunk_blocks),
    Wrong("06.d3", "always-a-block-less", "a block less than nothing", chunk_below_nothing),
    Wrong("06.d3", "reused-run-again", "the whole prompt is run", chunk_whole_prompt),
    Wrong("06.d3", "ignored", "as many as the budget allows, whatever is left", chunk_only_budget),
    Wrong("06.d3", "not-a-tuple", "only what is run", chunk_only_run),
]  # fmt: skip

RIGHT = [
    ("06.1", waste_by_loop),
    ("06.1", waste_numpy),
    ("06.2", slots_by_index),
    ("06.2", slots_all_slots),
    ("06.7", reuse_by_iterator),
    ("06.7", reuse_by_while),
    ("06.9", best_by_numpy),
    ("06.9", best_by_loop),
    ("06.d1", finish_by_if),
    ("06.d1", finish_plus),
    ("06.d1", finish_checked),
    ("06.d2", row_padded_list),
    ("06.d2", row_by_loop),
    ("06.d3", chunk_by_if),
    ("06.d3", chunk_by_while),
]
