"""Attention over K and V that lie in blocks, by a block table, in plain PyTorch (PagedAttention, arXiv:2309.06180).

    keys, values   [num_blocks, block_size, num_kv_heads, head_dim]   the memory that all rows share
    block_table    int32 [batch, blocks], padded with -1              the blocks of each row, in order of its tokens

The token at place `p` of a row lies in block `block_table[row, p // block_size]`, at `p % block_size`; its *slot* is
`block * block_size + p % block_size`. `paged_attention` defines what the operation does, for any number of new tokens:
it gathers K and V, which makes them dense. `paged_decode_attention` is the same as a Triton kernel, for one new token,
and `paged_attention_cpu` has one for CPUs; these read K and V where they lie.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from labkit.attention import PLAIN, Constants, Visibility, attention, visible_among, wide_dtype


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, block_table: Tensor, visible: Visibility, constants: Constants = PLAIN
) -> Tensor:
    """Causal softmax(q k^T * scale) v over the tokens that the table names: shape and dtype of `q`.

    q: `[batch, num_heads, new_tokens, head_dim]`. k, v, block_table: as above. visible: who may see whom, where
    `kv_len` is the length of the longest row. Slots of tokens that no query of a row may see are not looked at.
    Raises ValueError when shapes do not fit or the table lacks a block that is read.
    """
    if has_torch_function((q,)):  # the work ledger sees one operation, as it does of PyTorch's fused attention
        return handle_torch_function(paged_attention, (q,), q, k, v, block_table, visible, constants)
    check_paged(q, k, v, block_table, visible)
    size = k.shape[1]
    blocks = block_table[:, : -(-visible.kv_len // size)].long()
    place = torch.arange(visible.kv_len, device=q.device)
    mask = visible.mask(constants, q.device)
    seen = torch.ones(1, len(place), dtype=torch.bool, device=q.device) if mask is None else mask.any(2)[:, 0]
    block = blocks[:, place // size]
    if bool((seen & ((block < 0) | (block >= len(k)))).any()):
        raise ValueError(f"the block table lacks a block of tokens that are read: its numbers are 0 to {len(k) - 1}")
    slot = torch.where(seen, block * size + place % size, 0)
    keys, values = (
        x.flatten(0, 1)[slot].masked_fill(~seen[:, :, None, None], 0).transpose(1, 2).to(wide_dtype(q)) for x in (k, v)
    )
    out = attention(q.to(wide_dtype(q)), keys, values, constants, visible)
    assert isinstance(out, Tensor)
    return out.to(q.dtype)


def store(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Write new K and V, `[batch, num_kv_heads, new_tokens, head_dim]`, to their slots, int64 `[all new tokens]`."""
    for new, to in ((k, keys), (v, values)):
        to.view(-1, *to.shape[2:]).index_copy_(0, slots, new.transpose(1, 2).flatten(0, 1))


def check_paged(q: Tensor, k: Tensor, v: Tensor, block_table: Tensor, visible: Visibility) -> int:
    """`num_queries_per_kv` of a call, or a ValueError that names what does not fit."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[2]:
        raise ValueError(
            f"paged attention takes q [batch, num_heads, new_tokens, head_dim] and k, v [num_blocks, block_size, "
            f"num_kv_heads, head_dim], num_heads a multiple of num_kv_heads; got q {list(q.shape)}, k {list(k.shape)}, "
            f"v {list(v.shape)}"
        )
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k and v must share one dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    visible_among(q.shape[0], q.shape[2], visible.kv_len, visible)
    wide = -(-visible.kv_len // k.shape[1])
    if block_table.dim() != 2 or len(block_table) != len(q) or block_table.shape[1] < wide:
        raise ValueError(
            f"{visible.kv_len} tokens in blocks of {k.shape[1]} need a block table [{len(q)}, {wide}]; got "
            f"{list(block_table.shape)}"
        )
    return q.shape[1] // k.shape[2]
