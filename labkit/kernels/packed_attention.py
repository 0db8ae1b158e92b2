"""Attention over packed K and V, which are never dense as a whole.

`packed_attention` is plain PyTorch, takes any number of new tokens, and defines what the operation does: it makes
numbers of a block of tokens at a time. `packed_decode_attention` is the same as a Triton kernel, for one new token:
dequantization is part of the decode loop, query heads that share a KV head are answered together, and the sequence is
split over programs whose results are merged by their log-sum-exps (Flash-Decoding, as in FlashAttention 2's split-KV
kernel, arXiv:2307.08691).

Both take tokens in full precision as well, before the packed ones (sinks) and after them (the newest).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from labkit.attention import wide_dtype
from labkit.kernels.decode_attention import DTYPES, check_can_run, default_splits, merge
from labkit.quantization import Packed

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS: the rest of labkit works without
    triton = None

Dense = tuple[Tensor, Tensor]
QUERIES_AT_ONCE, BLOCKS_AT_ONCE = 256, 8  # new tokens and blocks whose scores are held at one time


def packed_attention(
    q: Tensor,
    k: Packed,
    v: Packed,
    *,
    before: Dense | None = None,
    after: Dense | None = None,
    padding: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    rotation: Tensor | None = None,
    block_size: int = 2048,
) -> Tensor:
    """Causal softmax(q k^T * scale) v over `before`, then the packed tokens, then `after`: shape and dtype of `q`.

    q: `[batch, num_heads, new_tokens, head_dim]`, the queries of the newest tokens. before, after: K and V, both
    `[batch, num_kv_heads, tokens, head_dim]`. padding, scale, window, soft_cap: as in `labkit.attention.attention`.
    rotation: orthogonal, `[head_dim, head_dim]`; the packed keys are keys times it.
    block_size: packed tokens that are numbers at one time, rounded to whole tiles. Sums are kept in float32, or in
    float64 for float64 queries. Raises ValueError when the shapes do not fit.
    """
    if has_torch_function((q,)):  # the work ledger sees one operation, as it does of PyTorch's fused attention
        return handle_torch_function(
            packed_attention, (q,), q, k, v, before=before, after=after, padding=padding, scale=scale, window=window,
            soft_cap=soft_cap, rotation=rotation, block_size=block_size,
        )  # fmt: skip
    kv_len = check_packed(q, k, v, before, after)
    head_dim, new_tokens = q.shape[3], q.shape[2]
    grouped = q.unflatten(1, (k.codes.shape[1], -1)).to(wide_dtype(q))  # [batch, KV heads, queries per KV, new, dims]
    grouped = grouped * (head_dim**-0.5 if scale is None else scale)
    answers = []
    for start in range(0, new_tokens, QUERIES_AT_ONCE):
        some = grouped[:, :, :, start : start + QUERIES_AT_ONCE]
        mask = Mask(kv_len - new_tokens + start, some.shape[3], window, padding)
        answers.append(answer(some.flatten(2, 3), k, v, before, after, mask, soft_cap, rotation, block_size).view_as(some))
    out = answers[0] if len(answers) == 1 else torch.cat(answers, dim=3)
    return out.flatten(1, 2).to(q.dtype)


def answer(
    rows: Tensor,
    k: Packed,
    v: Packed,
    before: Dense | None,
    after: Dense | None,
    mask: Mask,
    soft_cap: float | None,
    rotation: Tensor | None,
    block_size: int,
) -> Tensor:
    """Attention of scaled query rows, `[batch, num_kv_heads, rows, head_dim]`: of a span at a time, spans merged."""
    count = rows.shape[2]
    if count % 4 and count < 16:  # MKL multiplies 4 rows in two thirds of the time that 3 take
        rows = F.pad(rows, (0, 0, 0, -count % 4))
    turned = rows if rotation is None else rows @ rotation.to(rows.dtype)
    scratch = Scratch(rows, k, block_size)
    outs, sums = [], []
    for span in spans(k, v, before, after, block_size, mask.last):
        scores, hides = [], False
        for start, keys, _ in span:
            some = packed_scores(turned, keys, scratch) if isinstance(keys, Packed) else rows @ keys.to(rows.dtype).mT
            if soft_cap is not None:
                some = soft_cap * torch.tanh(some / soft_cap)
            hides |= mask.hide(some, start, count)
            scores.append(some)
        weights, lse = softmax(torch.cat(scores, dim=3), hides)
        out = 0
        for values, some in zip((values for *_, values in span), weights.split([x.shape[3] for x in scores], 3), strict=True):
            out = out + (packed_blend(some, values, scratch) if isinstance(values, Packed) else some @ values.to(rows.dtype))
        outs.append(out)
        sums.append(lse)
    out = outs[0] if len(outs) == 1 else merge(torch.stack(outs, 2), torch.stack(sums, 2))
    return out[:, :, :count]


def softmax(scores: Tensor, hides: bool) -> tuple[Tensor, Tensor]:
    """Weights and log-sum-exp of scores; where some are hidden, a row that sees nothing gets weights of 0."""
    lse = scores.logsumexp(-1)
    if not hides:
        return scores.softmax(-1), lse
    return torch.exp(scores - lse.clamp(min=torch.finfo(lse.dtype).min).unsqueeze(-1)), lse


class Scratch:
    """Memory for one block's numbers, used for every block in turn: fresh memory costs more than the arithmetic."""

    def __init__(self, rows: Tensor, packed: Packed, block_size: int) -> None:
        batch, heads, tiles, _, head_dim = packed.codes.shape
        self.size = packed.quantizer.group_size
        self.memory = rows.new_empty(batch * heads * min(tiles, tiles_per_block(packed, block_size)) * self.size * head_dim)

    def like(self, packed: Packed) -> Tensor:
        """Room for the numbers of these tiles, `[batch, heads, tiles, group_size, head_dim]`."""
        batch, heads, tiles, _, head_dim = packed.codes.shape
        shape = (batch, heads, tiles, self.size, head_dim)
        return self.memory[: math.prod(shape)].view(shape)


def packed_scores(rows: Tensor, keys: Packed, scratch: Scratch) -> Tensor:
    """rows `[batch, heads, rows, head_dim]` times the keys' transpose: `[batch, heads, rows, tokens]`."""
    numbers = scratch.like(keys)
    if keys.quantizer.axis == "token" or rows.shape[2] > keys.quantizer.group_size:
        return rows @ keys.dequantize(rows.dtype, numbers).mT
    # A tile's tokens share their scales: a few queries are cheaper to scale than all of its keys.
    by_tile, numbers = rows.unsqueeze(2), keys.numbers(numbers).flatten(0, 2)
    scaled = (by_tile * keys.scale).flatten(0, 2)
    if (offset := keys.offset) is None:
        scores = scaled @ numbers.mT
    else:
        scores = torch.baddbmm((by_tile * offset).sum(-1, keepdim=True).flatten(0, 2), scaled, numbers.mT)
    return scores.unflatten(0, keys.codes.shape[:3]).transpose(2, 3).flatten(3)


def packed_blend(weights: Tensor, values: Packed, scratch: Scratch) -> Tensor:
    """weights `[batch, heads, rows, tokens]` times the values: `[batch, heads, rows, head_dim]`."""
    size, numbers = values.quantizer.group_size, scratch.like(values)
    if values.quantizer.axis == "channel" or weights.shape[2] > size:
        return weights @ values.dequantize(weights.dtype, numbers)
    # A token's channels share a scale, group by group: its weight is scaled, and the codes are used as they are.
    numbers, scale = values.numbers(numbers).flatten(2, 3), values.scale.flatten(2, 3)
    groups = [
        (weights * scale[..., group].unsqueeze(2)) @ numbers[..., group * size : (group + 1) * size]
        for group in range(scale.shape[3])
    ]
    out = groups[0] if len(groups) == 1 else torch.cat(groups, dim=3)
    if (offset := values.offset) is not None:
        constant = weights @ offset.to(weights.dtype).flatten(2, 3)  # [batch, heads, rows, groups]
        out.unflatten(3, (-1, size)).add_(constant.unsqueeze(4))
    return out


class Mask:
    """Which keys each of `new_tokens` queries, the first at position `first`, may see: causal, in a window, no padding."""

    def __init__(self, first: int, new_tokens: int, window: int | None, padding: Tensor | None) -> None:
        self.first, self.last, self.new_tokens = first, first + new_tokens - 1, new_tokens
        self.window, self.padding = window, padding

    def hide(self, scores: Tensor, start: int, rows: int) -> bool:
        """Write -inf where one of the first `rows` may not see a key, the first of which stands at `start`; whether any."""
        stop = start + scores.shape[3]
        if stop - 1 <= self.first and (self.window is None or start > self.last - self.window) and self.padding is None:
            return False
        key = torch.arange(start, stop, device=scores.device)
        query = torch.arange(self.first, self.last + 1, device=scores.device)[:, None]
        hidden = key > query
        if self.window is not None:
            hidden = hidden | (key <= query - self.window)
        if self.padding is not None:
            hidden = hidden | (key < self.padding[:, None, None, None, None])
        scores[:, :, :rows].unflatten(2, (-1, self.new_tokens)).masked_fill_(hidden, float("-inf"))
        return True


def spans(
    k: Packed, v: Packed, before: Dense | None, after: Dense | None, block_size: int, last: int
) -> Iterator[list[tuple[int, Tensor | Packed, Tensor | Packed]]]:
    """Segments `(position, keys, values)` up to position `last`, `BLOCKS_AT_ONCE` at a time; one packed block each."""
    every = [segment for segment in segments(k, v, before, after, block_size) if segment[0] <= last]
    for start in range(0, len(every), BLOCKS_AT_ONCE):
        yield every[start : start + BLOCKS_AT_ONCE]


def segments(
    k: Packed, v: Packed, before: Dense | None, after: Dense | None, block_size: int
) -> Iterator[tuple[int, Tensor | Packed, Tensor | Packed]]:
    """Position of the first token, keys and values of each segment in turn; packed ones of about `block_size` tokens."""
    position = 0
    if before is not None and before[0].shape[2]:
        yield position, *before
        position += before[0].shape[2]
    size, per_block = k.quantizer.group_size, tiles_per_block(k, block_size)
    for tile in range(0, k.codes.shape[2], per_block):
        yield position + tile * size, k.tiles(tile, tile + per_block), v.tiles(tile, tile + per_block)
    position += k.tokens
    if after is not None and after[0].shape[2]:
        yield position, *after


def tiles_per_block(packed: Packed, block_size: int) -> int:
    """Whole tiles in a block of about `block_size` tokens."""
    return max(1, block_size // packed.quantizer.group_size)


def check_packed(q: Tensor, k: Packed, v: Packed, before: Dense | None, after: Dense | None) -> int:
    """Tokens held in all, or a ValueError that names what does not fit."""
    batch, num_kv_heads, tiles, _, head_dim = k.codes.shape
    if q.dim() != 4 or (q.shape[0], q.shape[3]) != (batch, head_dim) or q.shape[1] % num_kv_heads:
        raise ValueError(
            f"q {list(q.shape)} does not fit packed keys of batch {batch}, {num_kv_heads} KV heads, head_dim {head_dim}"
        )
    if (*v.codes.shape[:3], v.codes.shape[4]) != (batch, num_kv_heads, tiles, head_dim):
        raise ValueError(f"packed values {list(v.codes.shape)} do not fit packed keys {list(k.codes.shape)}")
    kv_len = k.tokens + sum(part[0].shape[2] for part in (before, after) if part is not None)
    if q.shape[2] > kv_len:
        raise ValueError(f"{q.shape[2]} queries but only {kv_len} keys: append the new tokens' keys first")
    return kv_len


def packed_decode_attention(
    q: Tensor,
    k: Packed,
    v: Packed,
    *,
    before: Dense | None = None,
    after: Dense | None = None,
    padding: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    rotation: Tensor | None = None,
    block_size: int = 64,
    num_splits: int | None = None,
) -> Tensor:
    """`packed_attention` of one new token per row as a Triton kernel; its twin's arguments, but for `soft_cap`.

    block_size: keys read at a time, a power of 2, at least 16. num_splits: parts of the packed sequence worked on in
    parallel. Raises ValueError when shapes, dtypes or sizes do not fit, RuntimeError where Triton cannot run.
    """
    kv_len = check_packed(q, k, v, before, after)
    if q.shape[2] != 1:
        raise ValueError(f"packed_decode_attention takes one new token; got {q.shape[2]}. packed_attention takes any")
    if q.dtype not in DTYPES:
        raise ValueError(f"q must be float32, float16 or bfloat16; got {q.dtype}")
    if block_size < 16 or block_size & (block_size - 1):
        raise ValueError(f"block_size must be a power of 2, at least 16; got {block_size}")
    check_can_run(q.device, "packed_attention")
    batch, _, _, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    rows = q.reshape(batch, k.codes.shape[1], -1, head_dim).float()
    first = torch.zeros(batch, dtype=torch.int32, device=q.device) if padding is None else padding.int()
    if window is not None:
        first = first.clamp(min=kv_len - window)
    start = 0 if before is None else before[0].shape[2]
    turned = rows if rotation is None else rows @ rotation
    parts = [launch(turned, k, v, first - start, scale, block_size, num_splits)]
    for place, dense in ((0, before), (start + k.tokens, after)):
        if dense is not None and dense[0].shape[2]:
            parts.append(dense_part(rows, *dense, first - place, scale))
    out = merge(torch.cat([out for out, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2))
    return out.to(q.dtype).view(q.shape)


def dense_part(rows: Tensor, k: Tensor, v: Tensor, first: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the few tokens in full precision, shaped as the kernel's parts, with one split."""
    scores = (rows @ k.float().mT) * scale
    hidden = torch.arange(k.shape[2], device=k.device) < first[:, None, None, None]
    scores = scores.masked_fill(hidden, float("-inf"))
    lse = scores.logsumexp(-1, keepdim=True)
    weights = torch.exp(scores - lse.clamp(min=torch.finfo(lse.dtype).min))
    return (weights @ v.float()).unsqueeze(2), lse.squeeze(3).unsqueeze(2)


def launch(
    rows: Tensor, k: Packed, v: Packed, first: Tensor, scale: float, block_size: int, num_splits: int | None
) -> tuple[Tensor, Tensor]:
    """The kernel over all packed tokens: outputs and log-sum-exps, with a split dimension, as `merge` takes them."""
    batch, num_kv_heads, queries, head_dim = rows.shape
    num_splits = default_splits(k.tokens) if num_splits is None else max(1, min(num_splits, k.tokens))
    split_len = triton.cdiv(triton.cdiv(k.tokens, num_splits), block_size) * block_size  # whole blocks
    num_splits = triton.cdiv(k.tokens, split_len)
    parts = rows.new_empty(batch, num_kv_heads, num_splits, queries, head_dim)
    lse = rows.new_empty(batch, num_kv_heads, num_splits, queries)
    packed = [x.contiguous() for side in (k, v) for x in (side.codes, side.scale, side.scale if side.zero is None else side.zero)]
    _packed_decode_kernel[(batch * num_kv_heads, num_splits)](
        rows.contiguous(),
        *packed,
        first.int().contiguous(),
        parts,
        lse,
        scale,
        num_kv_heads,
        k.tokens,
        split_len,
        QUERIES=queries,
        HEAD_DIM=head_dim,
        QUERY_BLOCK=max(16, triton.next_power_of_2(queries)),  # 16: the least that tl.dot takes on a GPU
        DIM_BLOCK=max(16, triton.next_power_of_2(head_dim)),
        BLOCK=block_size,
        GROUP=k.quantizer.group_size,
        NBITS=k.quantizer.nbits if isinstance(k.quantizer.nbits, int) else 0,
        MIDDLE=k.quantizer.middle,
        HAS_ZERO=k.zero is not None,
        K_PER_CHANNEL=k.quantizer.axis == "channel",
        V_PER_CHANNEL=v.quantizer.axis == "channel",
        num_stages=2,  # more would not fit the shared memory of smaller GPUs in float32
    )
    return parts, lse


if triton is not None:

    @triton.jit
    def _numbers(
        codes_ptr, scale_ptr, zero_ptr, row_head, num_tiles, token, dim, wanted,
        HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, NBITS: tl.constexpr, MIDDLE: tl.constexpr,
        HAS_ZERO: tl.constexpr, PER_CHANNEL: tl.constexpr,
    ):  # fmt: skip
        """Dequantized numbers of a block, float32 `[tokens, dims]`; NBITS 0: codes are float8."""
        at, column = token[:, None].to(tl.int64), dim[None, :]
        tile = row_head * num_tiles + at // GROUP
        within = at % GROUP
        if NBITS == 0:
            codes = tl.load(codes_ptr + (tile * GROUP + within) * HEAD_DIM + column, mask=wanted, other=0.0)
            numbers = codes.to(tl.float32)
        else:
            bytes_per_column: tl.constexpr = GROUP * NBITS // 8
            byte = (tile * bytes_per_column + within % bytes_per_column) * HEAD_DIM + column
            codes = tl.load(codes_ptr + byte, mask=wanted, other=0).to(tl.int32)
            shift = (within // bytes_per_column * NBITS).to(tl.int32)
            numbers = (((codes >> shift) & ((1 << NBITS) - 1)) - MIDDLE).to(tl.float32)
        if PER_CHANNEL:
            group = tile * HEAD_DIM + column
        else:
            group = (tile * GROUP + within) * (HEAD_DIM // GROUP) + column // GROUP
        numbers *= tl.load(scale_ptr + group, mask=wanted, other=0.0).to(tl.float32)
        if HAS_ZERO:
            numbers += tl.load(zero_ptr + group, mask=wanted, other=0.0).to(tl.float32)
        return numbers

    @triton.jit(do_not_specialize=["kv_len", "split_len"])
    def _packed_decode_kernel(
        q_ptr,
        k_codes_ptr,
        k_scale_ptr,
        k_zero_ptr,
        v_codes_ptr,
        v_scale_ptr,
        v_zero_ptr,
        first_ptr,
        parts_ptr,
        lse_ptr,
        scale,
        num_kv_heads,
        kv_len,
        split_len,
        QUERIES: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        QUERY_BLOCK: tl.constexpr,
        DIM_BLOCK: tl.constexpr,
        BLOCK: tl.constexpr,
        GROUP: tl.constexpr,
        NBITS: tl.constexpr,
        MIDDLE: tl.constexpr,
        HAS_ZERO: tl.constexpr,
        K_PER_CHANNEL: tl.constexpr,
        V_PER_CHANNEL: tl.constexpr,
    ):
        """One row's KV head (program axis 0) over one part of the packed sequence (axis 1)."""
        row_head = tl.program_id(0).to(tl.int64)  # offsets into a large cache overflow 32 bits
        split = tl.program_id(1)
        query, dim = tl.arange(0, QUERY_BLOCK), tl.arange(0, DIM_BLOCK)
        here = (query[:, None] < QUERIES) & (dim[None, :] < HEAD_DIM)
        q = tl.load(q_ptr + (row_head * QUERIES + query[:, None]) * HEAD_DIM + dim[None, :], mask=here, other=0.0)

        first = tl.load(first_ptr + row_head // num_kv_heads)
        end = tl.minimum((split + 1) * split_len, kv_len)
        start = tl.maximum(split * split_len, first)  # padding is not read
        top = tl.full([QUERY_BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([QUERY_BLOCK], tl.float32)
        out = tl.zeros([QUERY_BLOCK, DIM_BLOCK], tl.float32)
        for block in range(start, end, BLOCK):
            token = block + tl.arange(0, BLOCK)
            seen = token < end
            wanted = seen[:, None] & (dim[None, :] < HEAD_DIM)
            k = _numbers(
                k_codes_ptr, k_scale_ptr, k_zero_ptr, row_head, kv_len // GROUP, token, dim, wanted,
                HEAD_DIM, GROUP, NBITS, MIDDLE, HAS_ZERO, K_PER_CHANNEL,
            )  # fmt: skip
            v = _numbers(
                v_codes_ptr, v_scale_ptr, v_zero_ptr, row_head, kv_len // GROUP, token, dim, wanted,
                HEAD_DIM, GROUP, NBITS, MIDDLE, HAS_ZERO, V_PER_CHANNEL,
            )  # fmt: skip
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            scores = tl.where(seen[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: keep exp(-inf) = 0
            shrink = tl.exp(top - safe_top)
            weights = tl.exp(scores - safe_top[:, None])
            total = total * shrink + tl.sum(weights, axis=1)
            out = out * shrink[:, None] + tl.dot(weights, v, input_precision="ieee")
            top = new_top

        some = tl.where(total == 0.0, 1.0, total)
        part = (row_head * tl.num_programs(1) + split) * QUERIES + query
        tl.store(parts_ptr + part[:, None] * HEAD_DIM + dim[None, :], out / some[:, None], mask=here)
        tl.store(lse_ptr + part, top + tl.log(some), mask=query < QUERIES)
