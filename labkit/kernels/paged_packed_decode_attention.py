"""`paged_packed_attention` of one new token per row as a Triton kernel.

As in `paged_decode_attention`, where tokens lie is looked up in the block table; as in `packed_decode_attention`, codes
are multiplied as they are. The block that waits is the last of a row, and read as it is.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from labkit.attention import PLAIN, Constants, Visibility
from labkit.kernels.packed_attention import Dense
from labkit.kernels.packed_decode_attention import PROGRAMS, format_of, how_to_run, memory_of, terms
from labkit.kernels.paged_packed_attention import check_paged_packed
from labkit.kernels.split import (
    DTYPES,
    LOG2_E,
    check_can_run,
    how_to_multiply,
    make_parts,
    merged,
    query_blocks,
    split_sequence,
)
from labkit.quantization import Packed

try:
    import triton
    import triton.language as tl

    from labkit.kernels.packed_decode_attention import (
        fetch,
        nothing_yet,
        place_in_group,
        queries_by_group,
        scores_of_tile,
        store_by_group,
        values_of_tile,
    )
    from labkit.kernels.split import reach, weigh
except ImportError:  # macOS: the rest of labkit works without
    triton = None


def paged_packed_decode_attention(
    q: Tensor,
    k: Packed,
    v: Packed,
    waiting: Dense,
    block_table: Tensor,
    visible: Visibility,
    constants: Constants = PLAIN,
    *,
    num_splits: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
) -> Tensor:
    """`paged_packed_attention` of one new token per row; its twin's arguments, but for a soft cap.

    The table's numbers are not checked: each that is read must be a block, one that waits where a row ends within it
    and a packed one before. num_splits: parts of the sequence worked on in parallel, each of whole blocks. num_warps,
    num_stages: Triton's. By default what suits the device. Raises ValueError when shapes, dtypes, formats or sizes do
    not fit, RuntimeError where Triton cannot run. It has no backward pass.
    """
    if has_torch_function((q,)):
        return handle_torch_function(
            paged_packed_decode_attention, (q,), q, k, v, waiting, block_table, visible, constants,
            num_splits=num_splits, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    queries = check_paged_packed(q, k, v, waiting, block_table, visible)
    if replace(v.quantizer, axis=k.quantizer.axis) != k.quantizer:
        raise ValueError(f"the kernel takes K and V of one format; got {k.quantizer} and {v.quantizer}")
    if q.shape[2] != 1:
        raise ValueError(
            f"paged_packed_decode_attention takes one new token; got {q.shape[2]}. paged_packed_attention takes any"
        )
    if q.dtype not in DTYPES:
        raise ValueError(f"q must be float32, float16 or bfloat16; got {q.dtype}")
    if constants.soft_cap is not None or not constants.causal:
        raise ValueError(f"the kernel has no soft cap and is causal; got {constants}. paged_packed_attention takes all")
    batch, num_heads, _, head_dim = q.shape
    num_blocks, _, num_kv_heads, _, _ = k.rows.shape
    check_can_run(q, "paged_packed_attention")
    parts = split_sequence(visible.kv_len, num_splits, k.quantizer.group_size, batch * num_kv_heads, q.device, PROGRAMS)
    grouped = q.reshape(batch, num_kv_heads, queries, head_dim)
    room = make_parts(grouped, parts[0], q.dtype)
    _paged_packed_decode_kernel[(batch * num_kv_heads, parts[0])](
        grouped,
        *memory_of(k),
        *memory_of(v),
        *(x.contiguous() for x in waiting),
        block_table,
        *visible.bounds(constants, batch, q.device),
        *room,
        constants.scale_for(head_dim) * LOG2_E,
        num_kv_heads,
        num_blocks,
        parts[1],
        parts[0],
        *block_table.stride(),
        *grouped.stride(),
        **query_blocks(queries, head_dim),
        **format_of(k, v),
        **terms(q, exact=k.quantizer.axis == "token"),
        **{name: how for name, how in how_to_multiply(q.device, q.dtype).items() if name != "SHIFT"},
        **how_to_run(k, num_warps, num_stages),
    )
    return merged(*room, q.dtype).view(batch, num_heads, 1, head_dim)


if triton is not None:

    @triton.jit(do_not_specialize=["num_blocks", "split_len", "num_parts", "table_row"])
    def _paged_packed_decode_kernel(
        q_ptr,
        k_words_ptr,
        k_scale_ptr,
        v_words_ptr,
        v_scale_ptr,
        waiting_k_ptr,
        waiting_v_ptr,
        table_ptr,
        first_ptr,
        end_ptr,
        parts_ptr,
        lse_ptr,
        scale,
        num_kv_heads,
        num_blocks,
        split_len,
        num_parts,
        table_row,
        table_place,
        q_batch,
        q_head,
        q_query,
        q_dim,
        QUERIES: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        QUERY_BLOCK: tl.constexpr,
        DIM_BLOCK: tl.constexpr,
        GROUP: tl.constexpr,
        NBITS: tl.constexpr,
        MIDDLE: tl.constexpr,
        HAS_ZERO: tl.constexpr,
        ROW_BYTES: tl.constexpr,
        WORD_BYTES: tl.constexpr,
        WORDS: tl.constexpr,
        GROUP_BLOCK: tl.constexpr,
        K_PER_CHANNEL: tl.constexpr,
        V_PER_CHANNEL: tl.constexpr,
        UNPACK: tl.constexpr,
        SCORE_TERMS: tl.constexpr,
        WEIGHT_TERMS: tl.constexpr,
        NATIVE: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """One row's KV head (program axis 0) over one part of the sequence (axis 1)."""
        BFLOAT16: tl.constexpr = k_scale_ptr.dtype.element_ty == tl.bfloat16
        row, head, start, end = reach(first_ptr, end_ptr, num_kv_heads, split_len)
        row_end = tl.load(end_ptr + row)
        full = row_end // GROUP * GROUP  # behind this, the block waits
        table = table_ptr + row * table_row
        q = queries_by_group(
            q_ptr, row, head, q_batch, q_head, q_query, q_dim,
            QUERIES, QUERY_BLOCK, HEAD_DIM, DIM_BLOCK, GROUP, NBITS, WORD_BYTES, GROUP_BLOCK, K_PER_CHANNEL,
        )  # fmt: skip
        top = tl.full([QUERY_BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([QUERY_BLOCK, GROUP_BLOCK], tl.float32)
        outs, offsets = nothing_yet(QUERY_BLOCK, HEAD_DIM, DIM_BLOCK, GROUP, GROUP_BLOCK, V_PER_CHANNEL)
        place = place_in_group(NBITS, WORD_BYTES, GROUP_BLOCK)
        for index in range(start // GROUP, tl.minimum(end, full) // GROUP):
            token = index * GROUP + place
            seen = (token >= start) & (place < GROUP)
            tile = (tl.load(table + index * table_place).to(tl.int64) * num_kv_heads + head) * HEAD_DIM
            k = fetch(
                k_words_ptr, k_scale_ptr, tile, seen, NBITS, HEAD_DIM, DIM_BLOCK, GROUP, HAS_ZERO, ROW_BYTES,
                WORD_BYTES, WORDS, GROUP_BLOCK, K_PER_CHANNEL,
            )  # fmt: skip
            v = fetch(
                v_words_ptr, v_scale_ptr, tile, seen, NBITS, HEAD_DIM, DIM_BLOCK, GROUP, HAS_ZERO, ROW_BYTES,
                WORD_BYTES, WORDS, GROUP_BLOCK, V_PER_CHANNEL,
            )  # fmt: skip
            scores = scores_of_tile(
                q, k, NBITS, MIDDLE, HEAD_DIM, GROUP, HAS_ZERO, BFLOAT16, WORD_BYTES, GROUP_BLOCK, K_PER_CHANNEL,
                UNPACK, SCORE_TERMS,
            )  # fmt: skip
            weights, shrink, top, total = weigh(scores * scale, seen, top, total, 0.0)
            outs, offsets = values_of_tile(
                weights, shrink, outs, offsets, v, NBITS, MIDDLE, HEAD_DIM, GROUP, HAS_ZERO, BFLOAT16, WORD_BYTES,
                V_PER_CHANNEL, UNPACK, WEIGHT_TERMS,
            )  # fmt: skip

        ends_here = (start < end) & (end == row_end)
        for _ in range(tl.where(ends_here, full, row_end), row_end, GROUP):  # once or never
            token = full + place
            seen = (token >= start) & (token < end) & (place < GROUP)
            block = tl.load(table + full // GROUP * table_place).to(tl.int64) - num_blocks
            at = ((block * num_kv_heads + head) * GROUP + place)[:, None] * HEAD_DIM
            scores = tl.zeros([QUERY_BLOCK, GROUP_BLOCK], tl.float32)
            K_WIDE: tl.constexpr = HEAD_DIM if K_PER_CHANNEL else GROUP
            if K_PER_CHANNEL:
                k_dim = tl.arange(0, DIM_BLOCK)
            else:
                k_dim = place
            for group in tl.static_range(HEAD_DIM // K_WIDE):
                k_at = waiting_k_ptr + at + group * K_WIDE + k_dim[None, :]
                k = tl.load(k_at, mask=seen[:, None] & (k_dim < K_WIDE)[None, :], other=0.0)
                if NATIVE:
                    scores += tl.dot(q[group].to(k.dtype), tl.trans(k))
                else:
                    scores += tl.dot(q[group], tl.trans(k.to(tl.float32)), input_precision=PRECISION)
            weights, shrink, top, total = weigh(scores * scale, seen, top, total, 0.0)
            V_WIDE: tl.constexpr = HEAD_DIM if V_PER_CHANNEL else GROUP
            if V_PER_CHANNEL:
                v_dim = tl.arange(0, DIM_BLOCK)
            else:
                v_dim = place
            found, shrunk = (), ()
            for group in tl.static_range(HEAD_DIM // V_WIDE):
                v_at = waiting_v_ptr + at + group * V_WIDE + v_dim[None, :]
                v = tl.load(v_at, mask=seen[:, None] & (v_dim < V_WIDE)[None, :], other=0.0)
                if NATIVE:
                    out = tl.dot(weights.to(v.dtype), v, outs[group] * shrink[:, None])
                else:
                    out = tl.dot(weights, v.to(tl.float32), outs[group] * shrink[:, None], input_precision=PRECISION)
                found = found + (out,)  # type: ignore
                shrunk = shrunk + (offsets[group] * shrink[:, None],)  # type: ignore
            outs, offsets = found, shrunk

        store_by_group(
            parts_ptr, lse_ptr, 0, num_parts, top, total, outs, offsets,
            QUERIES, QUERY_BLOCK, HEAD_DIM, DIM_BLOCK, GROUP, NBITS, WORD_BYTES, GROUP_BLOCK, V_PER_CHANNEL,
        )  # fmt: skip
