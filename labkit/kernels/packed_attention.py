"""Attention over packed K and V, which are never dense as a whole.

`packed_attention` is plain PyTorch, takes any number of new tokens, and defines what the operation does: it makes
numbers of a block of tokens at a time. `packed_decode_attention` is the same as a Triton kernel, for one new token
(`packed_attention_cpu` has one for CPUs): dequantization is part of the decode loop, query heads that share a KV head
are answered together, and the sequence is split over programs whose results are merged by their log-sum-exps
(Flash-Decoding, as in FlashAttention 2's split-KV kernel, arXiv:2307.08691).

Both take tokens in full precision as well, before the packed ones (sinks) and after them (the newest).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from labkit.attention import check_mask, wide_dtype
from labkit.kernels.decode_attention import DTYPES, check_can_run, first_seen, how_to_multiply, merge, split_sequence
from labkit.quantization import Packed

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS: the rest of labkit works without
    triton = None

Dense = tuple[Tensor, Tensor]
Segment = tuple[int, Tensor | Packed, Tensor | Packed]
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
    block_size: packed tokens worked on at one time, in whole tiles. With groups of 32 or more, what is made of them is
    smaller than their K and V would be in the dtype of the sums: float32, or float64 for float64 queries.
    Raises ValueError when shapes or sizes do not fit.
    """
    if has_torch_function((q,)):  # the work ledger sees one operation, as it does of PyTorch's fused attention
        return handle_torch_function(
            packed_attention, (q,), q, k, v, before=before, after=after, padding=padding, scale=scale, window=window,
            soft_cap=soft_cap, rotation=rotation, block_size=block_size,
        )  # fmt: skip
    kv_len = check_packed(q, k, v, before, after, padding, window)
    head_dim, new_tokens = q.shape[3], q.shape[2]
    grouped = q.unflatten(1, (k.rows.shape[2], -1)).to(wide_dtype(q))  # [batch, KV heads, queries per KV, new, dims]
    grouped = grouped * (head_dim**-0.5 if scale is None else scale)
    answers = []
    for start in range(0, new_tokens, QUERIES_AT_ONCE):
        some = grouped[:, :, :, start : start + QUERIES_AT_ONCE]
        mask = Mask(kv_len - new_tokens + start, some.shape[3], window, padding)
        rows = some.flatten(2, 3)
        blocks = segments(k, v, before, after, block_size // 2)  # numbers are made with a copy of theirs
        out = answer(rows, blocks, mask, soft_cap, rotation)
        answers.append(out.view_as(some))
    out = answers[0] if len(answers) == 1 else torch.cat(answers, dim=3)
    return out.flatten(1, 2).to(q.dtype)


def answer(
    rows: Tensor, blocks: Iterator[Segment], mask: Mask, soft_cap: float | None, rotation: Tensor | None
) -> Tensor:
    """Attention of scaled query rows, `[batch, num_kv_heads, rows, head_dim]`, over segments with their positions."""
    turned = rows if rotation is None else rows @ rotation.to(rows.dtype)
    seen = [block for block in blocks if mask.meets(*block[:2])]
    outs: list[Tensor] = []
    sums: list[Tensor] = []
    for first in range(0, len(seen), BLOCKS_AT_ONCE):
        span = seen[first : first + BLOCKS_AT_ONCE]
        scores, hides = [], False
        for start, keys, _ in span:
            some = (turned if isinstance(keys, Packed) else rows) @ numbers_of(keys, rows.dtype).mT
            if soft_cap is not None:
                some = soft_cap * torch.tanh(some / soft_cap)
            hides |= mask.hide(some, start)
            scores.append(some)
        joined = torch.cat(scores, dim=3)
        weights = joined.softmax(-1)
        if hides:  # a query that sees no key of the span weighs none
            weights = weights.masked_fill((joined == float("-inf")).all(-1, keepdim=True), 0.0)
        parts = weights.split([some.shape[3] for some in scores], dim=3)
        for index, (part, (_, _, values)) in enumerate(zip(parts, span, strict=True)):
            outs.append(part @ numbers_of(values, part.dtype) + (outs.pop() if index else 0.0))
        if len(seen) > BLOCKS_AT_ONCE:
            sums.append(joined.logsumexp(-1))
    return outs[0] if len(outs) == 1 else merge(torch.stack(outs, 2), torch.stack(sums, 2))


def numbers_of(x: Tensor | Packed, dtype: torch.dtype) -> Tensor:
    """Keys or values of a segment as numbers, `[batch, heads, tokens, head_dim]`."""
    return x.dequantize(dtype) if isinstance(x, Packed) else x.to(dtype)


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether what is made of these must have a backward pass, which no kernel has."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


class Mask:
    """Which keys each of `new_tokens` queries, the first at position `first`, may see: earlier, near, no padding."""

    def __init__(self, first: int, new_tokens: int, window: int | None, padding: Tensor | None) -> None:
        self.first, self.last, self.new_tokens = first, first + new_tokens - 1, new_tokens
        self.window, self.padding = window, padding

    def meets(self, start: int, keys: Tensor | Packed) -> bool:
        """Whether any query may see any of these keys, the first of which stands at `start`."""
        stop = start + (keys.num_tokens if isinstance(keys, Packed) else keys.shape[2])
        return start <= self.last and (self.window is None or stop - 1 > self.first - self.window)

    def hide(self, scores: Tensor, start: int) -> bool:
        """Write -inf where a query may not see a key, the first of which stands at `start`; whether any may be."""
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
        scores.unflatten(2, (-1, self.new_tokens)).masked_fill_(hidden, float("-inf"))
        return True


def segments(k: Packed, v: Packed, before: Dense | None, after: Dense | None, block_size: int) -> Iterator[Segment]:
    """Position of the first token, keys and values of each segment; packed ones of about `block_size` tokens."""
    position = 0
    if before is not None and before[0].shape[2]:
        yield position, *before
        position += before[0].shape[2]
    per_block = max(1, block_size // k.quantizer.group_size)
    for tile in range(0, len(k.rows), per_block):
        block = k.tiles(tile, tile + per_block)
        yield position, block, v.tiles(tile, tile + per_block)
        position += block.num_tokens
    if after is not None and after[0].shape[2]:
        yield position, *after


def check_packed(
    q: Tensor,
    k: Packed,
    v: Packed,
    before: Dense | None,
    after: Dense | None,
    padding: Tensor | None,
    window: int | None,
) -> int:
    """Tokens held in all, or a ValueError that names what does not fit."""
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
    if q.shape[2] > kv_len:
        raise ValueError(f"{q.shape[2]} queries but only {kv_len} keys: append the new tokens' keys first")
    check_mask(batch, padding, window)
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
    block_size: int | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """`packed_attention` of one new token per row as a Triton kernel; its twin's arguments, but for `soft_cap`.

    block_size: keys read at a time, a power of 2, at least 16; by default as many as fit the shared memory of small
    GPUs. num_splits: parts of the packed sequence worked on in parallel. Raises ValueError when shapes, dtypes, formats
    or sizes do not fit, RuntimeError where Triton cannot run. It has no backward pass.
    """
    if has_torch_function((q,)):
        return handle_torch_function(
            packed_decode_attention, (q,), q, k, v, before=before, after=after, padding=padding, scale=scale,
            window=window, rotation=rotation, block_size=block_size, num_splits=num_splits,
        )  # fmt: skip
    kv_len = check_packed(q, k, v, before, after, padding, window)
    if replace(v.quantizer, axis=k.quantizer.axis) != k.quantizer:
        raise ValueError(f"the kernel takes K and V of one format; got {k.quantizer} and {v.quantizer}")
    if q.shape[2] != 1:
        raise ValueError(f"packed_decode_attention takes one new token; got {q.shape[2]}. packed_attention takes any")
    if q.dtype not in DTYPES:
        raise ValueError(f"q must be float32, float16 or bfloat16; got {q.dtype}")
    check_can_run(q.device, "packed_attention")
    batch, _, _, head_dim = q.shape
    if block_size is None:  # 32 KiB for K and V each, as float32: what a T4 has for a program
        block_size = max(16, min(64, 4096 // triton.next_power_of_2(head_dim)))
    if block_size < 16 or block_size & (block_size - 1):
        raise ValueError(f"block_size must be a power of 2, at least 16; got {block_size}")
    scale = head_dim**-0.5 if scale is None else scale
    rows = q.reshape(batch, k.rows.shape[2], -1, head_dim).float()
    first = first_seen(q, kv_len, padding, window)
    start = 0 if before is None else before[0].shape[2]
    turned = rows if rotation is None else rows @ rotation
    parts = [launch(turned, k, v, first - start, scale, block_size, num_splits)]
    for place, dense in ((0, before), (start + k.num_tokens, after)):
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
    tokens = k.num_tokens
    num_splits, split_len = split_sequence(tokens, num_splits, block_size)
    parts = rows.new_empty(batch, num_kv_heads, num_splits, queries, head_dim)
    lse = rows.new_empty(batch, num_kv_heads, num_splits, queries)
    quantizer, packed = k.quantizer, []
    for side in (k.rows.contiguous(), v.rows.contiguous()):  # one memory, seen as codes and as scales
        codes = side if isinstance(quantizer.nbits, int) else side.view(quantizer.nbits)
        packed += [codes, side.view(quantizer.metadata)]
    _packed_decode_kernel[(batch * num_kv_heads, num_splits)](
        rows.contiguous(),
        *packed,
        first.int().contiguous(),
        parts,
        lse,
        scale,
        num_kv_heads,
        tokens,
        split_len,
        QUERIES=queries,
        HEAD_DIM=head_dim,
        QUERY_BLOCK=max(16, triton.next_power_of_2(queries)),  # 16: the least that tl.dot takes on a GPU
        DIM_BLOCK=max(16, triton.next_power_of_2(head_dim)),
        BLOCK=block_size,
        GROUP=quantizer.group_size,
        NBITS=quantizer.nbits if isinstance(quantizer.nbits, int) else 0,
        MIDDLE=quantizer.middle,
        HAS_ZERO=quantizer.has_zero,
        ROW_BYTES=k.rows.shape[4],
        K_PER_CHANNEL=quantizer.axis == "channel",
        V_PER_CHANNEL=v.quantizer.axis == "channel",
        **how_to_multiply(rows.device, head_dim),
        num_stages=1,  # the numbers are made in registers: there is nothing to fetch ahead into shared memory
    )
    return parts, lse


if triton is not None:

    @triton.jit
    def _numbers(
        codes_ptr, scale_ptr, row_head, row_heads, token, dim, wanted,
        HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, NBITS: tl.constexpr, MIDDLE: tl.constexpr,
        HAS_ZERO: tl.constexpr, ROW_BYTES: tl.constexpr, PER_CHANNEL: tl.constexpr,
    ):  # fmt: skip
        """Dequantized numbers of a block, float32 `[tokens, dims]`; NBITS 0: codes are float8."""
        at, column = token[:, None].to(tl.int64), dim[None, :]
        tile = (at // GROUP * row_heads + row_head) * HEAD_DIM
        if PER_CHANNEL:
            row, place = tile + column, at % GROUP + column * 0
        else:
            row, place = tile + at % GROUP * (HEAD_DIM // GROUP) + column // GROUP, column % GROUP + at * 0
        CODE_BYTES: tl.constexpr = GROUP if NBITS == 0 else GROUP * NBITS // 8
        if NBITS == 0:
            numbers = tl.load(codes_ptr + row * ROW_BYTES + place, mask=wanted, other=0.0).to(tl.float32)
        else:
            byte = tl.load(codes_ptr + row * ROW_BYTES + place * NBITS // 8, mask=wanted, other=0).to(tl.int32)
            shift = (place * NBITS % 8).to(tl.int32)
            numbers = (((byte >> shift) & ((1 << NBITS) - 1)) - MIDDLE).to(tl.float32)
        metadata = scale_ptr + (row * ROW_BYTES + CODE_BYTES) // 2
        numbers *= tl.load(metadata, mask=wanted, other=0.0).to(tl.float32)
        if HAS_ZERO:
            numbers += tl.load(metadata + 1, mask=wanted, other=0.0).to(tl.float32)
        return numbers

    @triton.jit(do_not_specialize=["kv_len", "split_len"])
    def _packed_decode_kernel(
        q_ptr,
        k_codes_ptr,
        k_scale_ptr,
        v_codes_ptr,
        v_scale_ptr,
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
        ROW_BYTES: tl.constexpr,
        K_PER_CHANNEL: tl.constexpr,
        V_PER_CHANNEL: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """One row's KV head (program axis 0) over one part of the packed sequence (axis 1)."""
        row_head = tl.program_id(0).to(tl.int64)  # offsets into a large cache overflow 32 bits
        row_heads = tl.num_programs(0)
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
                k_codes_ptr, k_scale_ptr, row_head, row_heads, token, dim, wanted,
                HEAD_DIM, GROUP, NBITS, MIDDLE, HAS_ZERO, ROW_BYTES, K_PER_CHANNEL,
            )  # fmt: skip
            v = _numbers(
                v_codes_ptr, v_scale_ptr, row_head, row_heads, token, dim, wanted,
                HEAD_DIM, GROUP, NBITS, MIDDLE, HAS_ZERO, ROW_BYTES, V_PER_CHANNEL,
            )  # fmt: skip
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            scores = tl.where(seen[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: keep exp(-inf) = 0
            shrink = tl.exp(top - safe_top)
            weights = tl.exp(scores - safe_top[:, None])
            total = total * shrink + tl.sum(weights, axis=1)
            out = out * shrink[:, None] + tl.dot(weights, v, input_precision=PRECISION)
            top = new_top

        some = tl.where(total == 0.0, 1.0, total)
        part = (row_head * tl.num_programs(1) + split) * QUERIES + query
        tl.store(parts_ptr + part[:, None] * HEAD_DIM + dim[None, :], out / some[:, None], mask=here)
        tl.store(lse_ptr + part, top + tl.log(some), mask=query < QUERIES)
