"""Wrong answers to 06.5 and 06.8, and other right ones."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F

from labkit.course.editions import source_of
from labkit.labs.lab06.launch import tl
from labkit.labs.lab06.references import paged_attention, paged_decode, slots_of
from tests.labs.answer import Wrong

# 06.5


def gathered(q, keys, values, block_table, lengths, *, slots=None, map_heads=None, scale=None, weigh=None, see=None):
    """Attention row by row, one step of which is another one."""
    size, num_kv_heads = keys.shape[1:3]
    out = torch.empty_like(q)
    for row, length in enumerate(lengths.tolist()):
        read = length if see is None else see(length, size)
        blocks = block_table[row, : -(-read // size)].long()
        if slots is not None:
            blocks = slots(block_table, row, -(-read // size))
        k, v = (x[blocks].flatten(0, 1)[:read] for x in (keys, values))
        head = torch.arange(q.shape[1]) // (q.shape[1] // num_kv_heads)
        if map_heads is not None:
            head = map_heads(torch.arange(q.shape[1]), num_kv_heads)
        k, v = k[:, head].transpose(0, 1), v[:, head].transpose(0, 1)
        scores = (k @ q[row][:, :, None])[..., 0] * (q.shape[2] ** -0.5 if scale is None else scale)
        weights = torch.softmax(scores, dim=-1) if weigh is None else weigh(scores)
        out[row] = (weights[:, None] @ v)[:, 0]
    return out


def paged(**other) -> Callable:
    def paged_attention(q, keys, values, block_table, lengths):
        return gathered(q, keys, values, block_table, lengths, **other)

    return paged_attention


def padded(q, keys, values, block_table, lengths, *, fill=float("-inf"), clean=False):
    """All rows at once, padded to the longest."""
    size, most = keys.shape[1], int(lengths.max())
    positions = torch.arange(most).expand(len(q), most)
    here = positions < lengths[:, None]
    slots = slots_of(block_table.clamp(min=0), positions, size)
    k, v = (x.flatten(0, 1)[slots].transpose(1, 2) for x in (keys, values))  # [rows, kv heads, most, head_dim]
    if clean:
        k, v = (x.masked_fill(~here[:, None, :, None], 0) for x in (k, v))
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = (grouped @ k.transpose(2, 3) / math.sqrt(q.shape[2])).masked_fill(~here[:, None, None], fill)
    return (torch.softmax(scores, dim=-1) @ v).flatten(1, 2)


def padded_and_masked(q, keys, values, block_table, lengths):
    return padded(q, keys, values, block_table, lengths)


def padded_clean(q, keys, values, block_table, lengths):
    return padded(q, keys, values, block_table, lengths, clean=True)


def padded_zero_scores(q, keys, values, block_table, lengths):
    return padded(q, keys, values, block_table, lengths, fill=0.0, clean=True)


def dense_memory(q, keys, values, block_table, lengths):
    """Scores with every slot there is, then the row's own."""
    size, num_kv_heads = keys.shape[1:3]
    k, v = (x.flatten(0, 1).transpose(0, 1) for x in (keys, values))
    grouped = q.unflatten(1, (num_kv_heads, -1))
    scores = grouped @ k.transpose(1, 2) / math.sqrt(q.shape[2])
    own = torch.zeros(len(q), k.shape[1], dtype=torch.bool)
    for row, length in enumerate(lengths.tolist()):
        own[row, slots_of(block_table[row : row + 1], torch.arange(length)[None], size)[0]] = True
    weights = torch.softmax(scores.masked_fill(~own[:, None, None], float("-inf")), dim=-1)
    return (weights @ v.masked_fill(v.isnan(), 0)).flatten(1, 2)


def by_fused(q, keys, values, block_table, lengths):
    rows = []
    for row in range(len(q)):
        length = lengths[row].item()
        slots = slots_of(block_table[[row]], torch.arange(length)[None], keys.shape[1])[0]
        block, place = slots // keys.shape[1], slots % keys.shape[1]
        k, v = (x[block, place].permute(1, 0, 2) for x in (keys, values))
        rows.append(F.scaled_dot_product_attention(q[row, :, None], k, v, enable_gqa=True)[:, 0])
    return torch.stack(rows)


def by_einsum(q, keys, values, block_table, lengths):
    out = []
    for one, table, length in zip(q, block_table, lengths, strict=True):
        count = int(-(-length // keys.size(1)))
        k, v = (torch.cat([x[block] for block in table[:count]])[:length] for x in (keys, values))
        grouped = one.reshape(k.size(1), -1, one.size(-1))
        weights = torch.einsum("kgd,tkd->kgt", grouped, k).mul(one.size(-1) ** -0.5).softmax(-1)
        out.append(torch.einsum("kgt,tkd->kgd", weights, v).reshape_as(one))
    return torch.stack(out)


def online(q, keys, values, block_table, lengths):
    """Block by block, as a kernel does it."""
    out = torch.empty_like(q)
    for row, length in enumerate(lengths.tolist()):
        grouped = q[row].reshape(keys.shape[2], -1, q.shape[2]).to(torch.float64)
        top = torch.full(grouped.shape[:2], float("-inf"), dtype=torch.float64)
        total, blend = torch.zeros_like(top), torch.zeros_like(grouped)
        for entry in range(-(-length // keys.shape[1])):
            block, count = int(block_table[row, entry]), min(keys.shape[1], length - entry * keys.shape[1])
            k, v = (x[block, :count].transpose(0, 1).to(torch.float64) for x in (keys, values))
            scores = grouped @ k.transpose(1, 2) / math.sqrt(q.shape[2])
            now = torch.maximum(top, scores.amax(-1))
            weights, shrink = torch.exp(scores - now[..., None]), torch.exp(top - now)
            total = total * shrink + weights.sum(-1)
            blend = blend * shrink[..., None] + weights @ v
            top = now
        out[row] = (blend / total[..., None]).flatten(0, 1)
    return out


def by_view(q, keys, values, block_table, lengths):
    """All slots in one dimension, as a view: the memory is one piece."""
    flat_k, flat_v = (x.view(-1, *x.shape[2:]) for x in (keys, values))
    out = []
    for row, length in enumerate(lengths.tolist()):
        slots = slots_of(block_table[[row]], torch.arange(length)[None], keys.shape[1])[0]
        k, v = flat_k[slots].transpose(0, 1), flat_v[slots].transpose(0, 1)
        grouped = q[row].reshape(len(k), -1, q.shape[2])
        weights = torch.softmax(grouped @ k.transpose(1, 2) / math.sqrt(q.shape[2]), dim=-1)
        out.append((weights @ v).flatten(0, 1))
    return torch.stack(out)


def queries_by_view(q, keys, values, block_table, lengths):
    """The same of q, whose rows may lie anywhere."""
    return paged_attention(q.view(-1).view(q.shape), keys, values, block_table, lengths)


def in_float32(q, keys, values, block_table, lengths):
    own = block_table.clamp(min=0).long()
    keys, values = (x[own].flatten(0, 1).float() for x in (keys, values))
    table = torch.arange(own.numel(), dtype=torch.int32).view(own.shape)
    return paged_attention(q.float(), keys, values, table, lengths).to(q.dtype)


# 06.8: the reference with lines in other words, run from its source as a cell of a notebook is.

SOURCE = source_of(paged_decode)
BLOCK = "block = tl.load(table_ptr + row * blocks_per_row + start // BLOCK_SIZE)"
HERE = "here = start + place < length"
ENTRY = "block = tl.load(table_ptr + {})"


def kernel(**lines: str) -> Callable:
    """The kernel with other lines for `block` and `here`."""
    source = SOURCE
    for name, old in (("block", BLOCK), ("here", HERE)):
        assert old in source
        source = re.sub(rf"^( +){re.escape(old)}$", rf"\g<1>{lines.get(name, old)}", source, flags=re.MULTILINE)
    space = {"tl": tl}
    exec(compile(source, "<a cell>", "exec", dont_inherit=True), space)
    return space["paged_decode"]


WRONG = [
    Wrong("06.5", "no-table", "blocks in order", paged(slots=lambda table, row, count: torch.arange(count))),
    Wrong("06.5", "first-row", "the first row's table",
          paged(slots=lambda table, row, count: torch.cat((table[0], table[row]))[:count].long()
                if int(table[0, min(count, table.shape[1]) - 1]) >= 0 else table[row, :count].long())),
    Wrong("06.5", "empty-slots-read", "whole blocks", paged(see=lambda length, size: -(-length // size) * size)),
    Wrong("06.5", "empty-slots-weigh", "scores of empty slots are 0", padded_zero_scores),
    Wrong("06.5", "newest-left-out", "the newest token is left out",
          paged(see=lambda length, size: max(length - 1, 1))),
    Wrong("06.5", "blocks-reversed", "the last block first",
          paged(slots=lambda table, row, count: table[row, :count].long().flip(0))),
    Wrong("06.5", "reads-stale", "padded and masked: 0 times NaN", padded_and_masked, "paged attention with padding"),
    Wrong("06.5", "head-mapping", "query head h reads KV head h % num_kv_heads",
          paged(map_heads=lambda heads, kv: heads % kv)),
    Wrong("06.5", "no-scale", "no scale", paged(scale=1.0)),
    Wrong("06.5", "no-softmax", "no softmax", paged(weigh=lambda scores: scores)),
    Wrong("06.5", "reads-everything", "scores with every slot there is", dense_memory),
    Wrong("06.5", "layout", "q as a view", queries_by_view),
    Wrong("06.8", "left-open", "block is open", kernel(block="block = ...")),
    Wrong("06.8", "left-open", "here is open", kernel(here="here = ...")),
    Wrong("06.8", "left-open", "both are open", kernel(block="block = ...", here="here = ...")),
    Wrong("06.8", "address-for-block", "an address without a load",
          kernel(block="block = table_ptr + row * blocks_per_row + start // BLOCK_SIZE")),
    Wrong("06.8", "no-table", "the entry's number, without a load",
          kernel(block="block = tl.full([1], row * blocks_per_row + start // BLOCK_SIZE, tl.int32)")),
    Wrong("06.8", "stray", "a table far away", kernel(block=ENTRY.format("row * blocks_per_row + 10**9"))),
    Wrong("06.8", "no-table", "the table is not asked",
          kernel(block="block = tl.full([1], start // BLOCK_SIZE, tl.int32)")),
    Wrong("06.8", "first-row", "the first row's entries", kernel(block=ENTRY.format("start // BLOCK_SIZE"))),
    Wrong("06.8", "row-not-multiplied", "row + entry",
          kernel(block=ENTRY.format("row + start // BLOCK_SIZE"))),
    Wrong("06.8", "entry-not-divided", "a position for an entry",
          kernel(block=ENTRY.format("row * blocks_per_row + start"))),
    Wrong("06.8", "always-first-block", "the row's first block, each time",
          kernel(block=ENTRY.format("row * blocks_per_row"))),
    Wrong("06.8", "next-block", "one entry too far",
          kernel(block=ENTRY.format("row * blocks_per_row + start // BLOCK_SIZE + 1"))),
    Wrong("06.8", "no-mask", "no mask", kernel(here="here = place >= 0")),
    Wrong("06.8", "mask-by-place", "the place against the whole length", kernel(here="here = place < length")),
    Wrong("06.8", "one-too-many", "<= for <", kernel(here="here = start + place <= length")),
    Wrong("06.8", "newest-left-out", "the newest token is hidden",
          kernel(here="here = start + place < tl.maximum(length - 1, 1)")),
    Wrong("06.8", "rest-of-length", "every block as full as the last one",
          kernel(here="here = place < (length - 1) % BLOCK_SIZE + 1")),
    Wrong("06.8", "stray", "an address of its own", kernel(block=ENTRY.format("1000"))),
    Wrong("06.8", "not-finite", "nothing is a token", kernel(here="here = place < 0")),
    Wrong("06.8", "raised", "an index on a pointer",
          kernel(block="block = table_ptr[row * blocks_per_row + start // BLOCK_SIZE]")),
]  # fmt: skip

RIGHT = [
    ("06.5", padded_clean),
    ("06.5", by_fused),
    ("06.5", by_einsum),
    ("06.5", online),
    ("06.5", in_float32),
    ("06.5", by_view),
    ("06.5", paged()),
    ("06.5", lambda q, keys, values, block_table, lengths: paged_attention(q, keys, values, block_table, lengths)),
    ("06.8", kernel()),
    ("06.8", kernel(here="here = place < length - start")),
    ("06.8", kernel(here="here = (start + tl.arange(0, BLOCK_SIZE)) < length")),
    ("06.8", kernel(block=ENTRY.format("start // BLOCK_SIZE + blocks_per_row * row, mask=start < length"))),
    ("06.8", kernel(block=ENTRY.format("row * blocks_per_row + tl.cdiv(start, BLOCK_SIZE)"))),
]  # fmt: skip
