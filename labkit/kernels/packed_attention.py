"""Attention over packed K and V, which are never dense as a whole.

`packed_attention` is plain PyTorch, takes any number of new tokens, and defines what the operation does: it makes
numbers of a block of tokens at a time. `packed_decode_attention` is the same as a Triton kernel, for one new token:
dequantization is part of the decode loop, query heads that share a KV head are answered together, and the sequence is
split over programs whose results are merged by their log-sum-exps (Flash-Decoding, as in FlashAttention 2's split-KV
kernel, arXiv:2307.08691).

Both take tokens in full precision as well, before the packed ones (sinks) and after them (the newest).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
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
    block_size: int = 1024,
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
    batch, num_heads, new_tokens, head_dim = q.shape
    rows = q.reshape(batch, k.codes.shape[1], -1, head_dim).to(wide_dtype(q))
    rows = rows * (head_dim**-0.5 if scale is None else scale)
    turned = rows if rotation is None else rows @ rotation.to(rows.dtype)
    mask = Mask(kv_len, new_tokens, window, padding)
    sums = RunningSoftmax(rows)
    for start, keys, values in segments(k, v, before, after, block_size):
        scores = packed_scores(turned, keys) if isinstance(keys, Packed) else rows @ keys.to(rows.dtype).mT
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        weights = sums.weigh(mask.hide(scores, start))
        sums.add(packed_blend(weights, values) if isinstance(values, Packed) else weights @ values.to(rows.dtype))
    return sums.result().to(q.dtype).view(q.shape)


def packed_scores(rows: Tensor, keys: Packed) -> Tensor:
    """rows `[batch, heads, rows, head_dim]` times the keys' transpose: `[batch, heads, rows, tokens]`."""
    if keys.quantizer.axis == "token":
        return rows @ keys.dequantize(rows.dtype).mT
    numbers = keys.numbers(rows.dtype).mul_(keys.scale.to(rows.dtype)).flatten(2, 3)
    scores = rows @ numbers.mT
    if (offset := keys.offset) is not None:  # the same for all tokens of a tile: one product per tile, not per token
        per_tile = rows @ offset.squeeze(3).to(rows.dtype).mT
        scores.unflatten(3, (-1, keys.quantizer.group_size)).add_(per_tile.unsqueeze(4))
    return scores


def packed_blend(weights: Tensor, values: Packed) -> Tensor:
    """weights `[batch, heads, rows, tokens]` times the values: `[batch, heads, rows, head_dim]`."""
    if values.quantizer.axis == "channel" or values.scale.shape[4] > 1:
        return weights @ values.dequantize(weights.dtype)
    # One scale per token: it goes to the token's weight, so that the codes are used as they are.
    numbers = values.numbers(weights.dtype).flatten(2, 3)
    scale = values.scale.to(weights.dtype).flatten(2, 4)
    out = (weights * scale.unsqueeze(2)) @ numbers
    if (offset := values.offset) is not None:
        out += weights @ offset.to(weights.dtype).flatten(2, 3)
    return out


class RunningSoftmax:
    """A softmax-weighted sum over segments: running maximum, sum of weights and output (arXiv:1805.02867)."""

    def __init__(self, rows: Tensor) -> None:
        self.top = rows.new_full((*rows.shape[:3], 1), float("-inf"))
        self.total = torch.zeros_like(self.top)
        self.out = torch.zeros_like(rows)

    def weigh(self, scores: Tensor) -> Tensor:
        """Weights of a segment's scores, `[batch, heads, rows, tokens]`, which are overwritten."""
        top = torch.maximum(self.top, scores.amax(-1, keepdim=True))
        safe = top.clamp(min=torch.finfo(top.dtype).min)  # nothing seen yet: keep exp(-inf) = 0
        shrink = (self.top - safe).exp_()
        weights = scores.sub_(safe).exp_()
        self.top, self.total = top, self.total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
        self.out.mul_(shrink)
        return weights

    def add(self, out: Tensor) -> None:
        """Add a segment's weighted sum."""
        self.out.add_(out)

    def result(self) -> Tensor:
        """The attention, `[batch, heads, rows, head_dim]`; zeros where no key was seen."""
        return self.out / self.total.masked_fill(self.total == 0, 1.0)


class Mask:
    """Which of `kv_len` keys each of the newest `new_tokens` queries may see: causal, within a window, no padding."""

    def __init__(self, kv_len: int, new_tokens: int, window: int | None, padding: Tensor | None) -> None:
        self.kv_len, self.new_tokens, self.window, self.padding = kv_len, new_tokens, window, padding

    def hide(self, scores: Tensor, start: int) -> Tensor:
        """`scores` of a segment whose first key stands at `start`, with -inf where a key may not be seen."""
        stop, first = start + scores.shape[3], self.kv_len - self.new_tokens
        future, left = stop - 1 > first, self.window is not None and start <= self.kv_len - 1 - self.window
        if not future and not left and self.padding is None:
            return scores
        key = torch.arange(start, stop, device=scores.device)
        query = torch.arange(first, self.kv_len, device=scores.device)[:, None]
        hidden = key > query
        if self.window is not None:
            hidden = hidden | (key <= query - self.window)
        if self.padding is not None:
            hidden = hidden | (key < self.padding[:, None, None, None, None])
        scores.unflatten(2, (-1, self.new_tokens)).masked_fill_(hidden, float("-inf"))
        return scores


def segments(
    k: Packed, v: Packed, before: Dense | None, after: Dense | None, block_size: int
) -> Iterator[tuple[int, Tensor | Packed, Tensor | Packed]]:
    """Position of the first token, keys and values of each segment in turn; packed ones of about `block_size` tokens."""
    position = 0
    if before is not None and before[0].shape[2]:
        yield position, *before
        position += before[0].shape[2]
    size = k.quantizer.group_size
    per_block = max(1, block_size // size)
    for tile in range(0, k.codes.shape[2], per_block):
        yield position + tile * size, k.tiles(tile, tile + per_block), v.tiles(tile, tile + per_block)
    position += k.tokens
    if after is not None and after[0].shape[2]:
        yield position, *after


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
