"""Attention over packed K and V that lie in blocks, by a block table, in plain PyTorch.

    k, v           `Packed` of batch 1: tile `b` is block `b`, so that a block holds one group of tokens
    waiting        K and V in full precision, both [waiting, num_kv_heads, block_size, head_dim]
    block_table    int32 [batch, blocks], padded with -1: a number below `num_blocks` is a packed block, and
                   `num_blocks + i` is block `i` of those that wait

The last block of a row waits in full precision until it is full: then it is packed, once. `paged_packed_attention`
defines what the operation does, for any number of new tokens, row by row, in the words of `packed_attention`.
`paged_packed_decode_attention` is the same as a Triton kernel, for one new token, and `paged_packed_attention_cpu` has
one for CPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from labkit.attention import PLAIN, Constants, Visibility, visible_among
from labkit.kernels.packed_attention import Dense, packed_attention
from labkit.quantization import Packed


def paged_packed_attention(
    q: Tensor,
    k: Packed,
    v: Packed,
    waiting: Dense,
    block_table: Tensor,
    visible: Visibility,
    constants: Constants = PLAIN,
) -> Tensor:
    """Causal softmax(q k^T * scale) v over the tokens that the table names: shape and dtype of `q`.

    q: `[batch, num_heads, new_tokens, head_dim]`. k, v, waiting, block_table: as above. visible: who may see whom,
    where `kv_len` is the length of the longest row. Blocks that no query of a row may see are not looked at.
    Raises ValueError when shapes do not fit or the table lacks a block that is read.
    """
    if has_torch_function((q,)):  # the work ledger sees one operation, as it does of PyTorch's fused attention
        return handle_torch_function(
            paged_packed_attention, (q,), q, k, v, waiting, block_table, visible, constants
        )  # fmt: skip
    check_paged_packed(q, k, v, waiting, block_table, visible)
    size = k.quantizer.group_size
    outs = []
    for row, (alone, begin) in enumerate(row_by_row(visible, constants, len(q), size)):
        full, rest = divmod(alone.kv_len, size)
        blocks = block_table[row, begin:full].long()
        if bool(((blocks < 0) | (blocks >= len(k.rows))).any()):
            raise missing(k, waiting)
        newest = None
        if rest:
            last = int(block_table[row, full]) - len(k.rows)
            if not 0 <= last < len(waiting[0]):
                raise missing(k, waiting)
            newest = waiting[0][last : last + 1, :, :rest], waiting[1][last : last + 1, :, :rest]
        keys, values = (Packed(x.quantizer, x.rows.index_select(0, blocks)) for x in (k, v))
        seen = alone.of_keys(begin * size, alone.kv_len)
        outs.append(packed_attention(q[row : row + 1], keys, values, constants, seen, after=newest))
    return torch.cat(outs)


def row_by_row(visible: Visibility, constants: Constants, batch: int, size: int) -> list[tuple[Visibility, int]]:
    """Each row by itself: who may see whom in it, and the first of its blocks that is read."""
    pairs = visible.pairs()
    alone = []
    for query, key in pairs * (batch if len(pairs) == 1 else 1):
        one = Visibility(visible.new_tokens, query + visible.new_tokens - key, (query,), (key,))
        hidden = min(one.kv_len - 1, max(0, -key, one.unseen(constants)))  # padding, or out of every query's window
        alone.append((one, hidden // size))
    return alone


def what_is_read(visible: Visibility, constants: Constants, batch: int, size: int) -> tuple[int, int]:
    """Packed blocks, which are read whole, and tokens in full precision that some query of their row sees."""
    blocks = tokens = 0
    for one, begin in row_by_row(visible, constants, batch, size):
        full, seen = one.kv_len // size, one.keys_read(constants, 1)
        blocks += max(0, full - begin) if seen else 0
        tokens += seen - one.of_keys(0, full * size).keys_read(constants, 1)
    return blocks, tokens


def check_paged_packed(
    q: Tensor, k: Packed, v: Packed, waiting: Dense, block_table: Tensor, visible: Visibility
) -> int:
    """`num_queries_per_kv` of a call, or a ValueError that names what does not fit."""
    _, one, heads, head_dim, _ = k.rows.shape
    if q.dim() != 4 or q.shape[3] != head_dim or q.shape[1] % heads:
        raise ValueError(f"q {list(q.shape)} does not fit packed blocks of {heads} KV heads, head_dim {head_dim}")
    if v.rows.shape[:4] != k.rows.shape[:4] or v.quantizer.group_size != k.quantizer.group_size or one != 1:
        raise ValueError(f"packed values {list(v.rows.shape)} do not fit packed keys {list(k.rows.shape)}")
    size = k.quantizer.group_size
    if any(x.shape[1:] != (heads, size, head_dim) or x.dtype != q.dtype for x in waiting) or len(waiting[0]) != len(
        waiting[1]
    ):
        raise ValueError(
            f"blocks that wait are [waiting, {heads}, {size}, {head_dim}] in {q.dtype}; got K {list(waiting[0].shape)} "
            f"in {waiting[0].dtype} and V {list(waiting[1].shape)} in {waiting[1].dtype}"
        )
    visible_among(len(q), q.shape[2], visible.kv_len, visible)
    wide = -(-visible.kv_len // size)
    if block_table.dim() != 2 or len(block_table) != len(q) or block_table.shape[1] < wide:
        raise ValueError(
            f"{visible.kv_len} tokens in blocks of {size} need a block table [{len(q)}, {wide}]; got "
            f"{list(block_table.shape)}"
        )
    return q.shape[1] // heads


def missing(k: Packed, waiting: Dense) -> ValueError:
    """The table lacks a block that is read."""
    return ValueError(
        f"the block table lacks a block of tokens that are read: its numbers are 0 to {len(k.rows) - 1}, and "
        f"{len(k.rows)} to {len(k.rows) + len(waiting[0]) - 1} for a last block that waits"
    )
