"""Wrong answers that lab 06's checks met as strangers and once let pass, and know since."""

from __future__ import annotations

from collections import OrderedDict

import torch

from labkit.cache import OutOfBlocks
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


WRONG = [
    Wrong("06.1", "values", "a request with no token yet is given a block", a_block_for_no_token),
    Wrong("06.3", "not-constant", "list.remove in hold, of a block that was not kept", RemovesFromAList),
    Wrong("06.3", "not-constant", "take looks for the first block without holders", LooksForOneWithoutHolder),
    Wrong("06.5", "scores-overflow", "a softmax that does not take the greatest score off", exp_of_scores_as_they_are),
    Wrong(
        "06.5", "reads-everything", "all memory is made float32, a copy where K and V are halves", all_memory_in_float32
    ),
    Wrong("06.9", "values", "a search that begins at a cost of a million", dearer_than_a_million_is_never_chosen),
]
