"""Attention over packed K and V, which are never dense as a whole, in plain PyTorch.

`packed_attention` takes any number of new tokens, and defines what the operation does: it makes numbers of a block of
tokens at a time. `packed_decode_attention` is the same as a Triton kernel, for one new token, and
`packed_attention_cpu` has one for CPUs.

All take tokens in full precision as well, before the packed ones (sinks) and after them (the newest).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from labkit.attention import PLAIN, Constants, Visibility, visible_among, wide_dtype
from labkit.kernels.split import merge
from labkit.quantization import Packed

Dense = tuple[Tensor, Tensor]
Segment = tuple[int, Tensor | Packed, Tensor | Packed]
QUERIES_AT_ONCE, BLOCKS_AT_ONCE = 256, 8  # new tokens and blocks whose scores are held at one time


def packed_attention(
    q: Tensor,
    k: Packed,
    v: Packed,
    constants: Constants = PLAIN,
    visible: Visibility | None = None,
    *,
    before: Dense | None = None,
    after: Dense | None = None,
    rotation: Tensor | None = None,
    block_size: int = 2048,
) -> Tensor:
    """Causal softmax(q k^T * scale) v over `before`, then the packed tokens, then `after`: shape and dtype of `q`.

    q: `[batch, num_heads, new_tokens, head_dim]`, the queries of the newest tokens. before, after: K and V, both
    `[batch, num_kv_heads, tokens, head_dim]`. visible: who may see whom among all these keys.
    rotation: orthogonal, `[head_dim, head_dim]`; the packed keys are keys times it.
    block_size: packed tokens worked on at one time, in whole tiles. With groups of 32 or more, what is made of them is
    smaller than their K and V would be in the dtype of the sums: float32, or float64 for float64 queries.
    Raises ValueError when shapes or sizes do not fit.
    """
    if has_torch_function((q,)):  # the work ledger sees one operation, as it does of PyTorch's fused attention
        return handle_torch_function(
            packed_attention, (q,), q, k, v, constants, visible, before=before, after=after, rotation=rotation,
            block_size=block_size,
        )  # fmt: skip
    visible = check_packed(q, k, v, before, after, visible)
    head_dim, new_tokens = q.shape[3], q.shape[2]
    grouped = q.unflatten(1, (k.rows.shape[2], -1)).to(wide_dtype(q))  # [batch, KV heads, queries per KV, new, dims]
    grouped = grouped * constants.scale_for(head_dim)
    answers = []
    for start in range(0, new_tokens, QUERIES_AT_ONCE):
        some = grouped[:, :, :, start : start + QUERIES_AT_ONCE]
        seen = visible.of_queries(start, start + some.shape[3])
        blocks = segments(k, v, before, after, block_size // 2)  # numbers are made with a copy of theirs
        answers.append(answer(some.flatten(2, 3), blocks, constants, seen, rotation).view_as(some))
    out = answers[0] if len(answers) == 1 else torch.cat(answers, dim=3)
    return out.flatten(1, 2).to(q.dtype)


def answer(
    rows: Tensor, blocks: Iterator[Segment], constants: Constants, visible: Visibility, rotation: Tensor | None
) -> Tensor:
    """Attention of scaled query rows, `[batch, num_kv_heads, rows, head_dim]`, over segments with their first index."""
    turned = rows if rotation is None else rows @ rotation.to(rows.dtype)
    parts = [(keys, values, visible.of_keys(start, start + tokens_in(keys))) for start, keys, values in blocks]
    seen = [part for part in parts if part[2].meets(constants)]
    outs: list[Tensor] = []
    sums: list[Tensor] = []
    for first in range(0, len(seen), BLOCKS_AT_ONCE):
        span = seen[first : first + BLOCKS_AT_ONCE]
        scores, hides = [], False
        for keys, _, sees in span:
            some = (turned if isinstance(keys, Packed) else rows) @ numbers_of(keys, rows.dtype).mT
            if constants.soft_cap is not None:
                some = constants.soft_cap * torch.tanh(some / constants.soft_cap)
            if (mask := sees.mask(constants, some.device)) is not None:
                hides = True
                some.unflatten(2, (-1, sees.new_tokens)).masked_fill_(~mask[:, :, None], float("-inf"))
            scores.append(some)
        joined = torch.cat(scores, dim=3)
        weights = joined.softmax(-1)
        if hides:  # a query that sees no key of the span weighs none
            weights = weights.masked_fill((joined == float("-inf")).all(-1, keepdim=True), 0.0)
        shares = weights.split([some.shape[3] for some in scores], dim=3)
        for index, (share, (_, values, _)) in enumerate(zip(shares, span, strict=True)):
            outs.append(share @ numbers_of(values, share.dtype) + (outs.pop() if index else 0.0))
        if len(seen) > BLOCKS_AT_ONCE:
            sums.append(joined.logsumexp(-1))
    return outs[0] if len(outs) == 1 else merge(torch.stack(outs, 2), torch.stack(sums, 2))


def tokens_in(keys: Tensor | Packed) -> int:
    """Tokens of a segment."""
    return keys.num_tokens if isinstance(keys, Packed) else keys.shape[2]


def numbers_of(x: Tensor | Packed, dtype: torch.dtype) -> Tensor:
    """Keys or values of a segment as numbers, `[batch, heads, tokens, head_dim]`."""
    return x.dequantize(dtype) if isinstance(x, Packed) else x.to(dtype)


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether what is made of these must have a backward pass, which no kernel has."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def segments(k: Packed, v: Packed, before: Dense | None, after: Dense | None, block_size: int) -> Iterator[Segment]:
    """Index of the first token, keys and values of each segment; packed ones of about `block_size` tokens."""
    index = 0
    if before is not None and before[0].shape[2]:
        yield index, *before
        index += before[0].shape[2]
    per_block = max(1, block_size // k.quantizer.group_size)
    for tile in range(0, len(k.rows), per_block):
        block = k.tiles(tile, tile + per_block)
        yield index, block, v.tiles(tile, tile + per_block)
        index += block.num_tokens
    if after is not None and after[0].shape[2]:
        yield index, *after


def check_packed(
    q: Tensor, k: Packed, v: Packed, before: Dense | None, after: Dense | None, visible: Visibility | None
) -> Visibility:
    """Who may see whom among all keys, or a ValueError that names what does not fit."""
    _, batch, num_kv_heads, head_dim, _ = k.rows.shape
    if q.dim() != 4 or (q.shape[0], q.shape[3]) != (batch, head_dim) or q.shape[1] % num_kv_heads:
        raise ValueError(
            f"q {list(q.shape)} does not fit packed keys of batch {batch}, {num_kv_heads} KV heads, head_dim {head_dim}"
        )
    if v.rows.shape[:4] != k.rows.shape[:4] or v.quantizer.group_size != k.quantizer.group_size:
        raise ValueError(f"packed values {list(v.rows.shape)} do not fit packed keys {list(k.rows.shape)}")
    kv_len = k.num_tokens
    for pair in (before, after):
        if pair is None:
            continue
        tokens = pair[0].shape[2]
        if any(x.shape != (batch, num_kv_heads, tokens, head_dim) for x in pair):
            raise ValueError(
                f"K {list(pair[0].shape)} and V {list(pair[1].shape)} do not fit packed keys of batch {batch}, "
                f"{num_kv_heads} KV heads, head_dim {head_dim}"
            )
        kv_len += tokens
    return visible_among(batch, q.shape[2], kv_len, visible)
