"""The small parts of a decode step between its matrix products, each as one Triton kernel.

A step of one token per row moves little but the weights, and every kernel costs about two microseconds, however small:
what stands between two products is one launch. Each has its plain-PyTorch twin here, whose name ends in `_plain`; the
tests hold one to the other. `labkit.graphs` calls them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.kernels.split import DTYPES, check_can_run

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS: the rest of labkit works without
    triton = None

COLUMNS = 1024  # of the gated product that one program makes


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x + delta`, or `x` itself without a delta, and its RMS norm times `weight`: the twin is `add_norm_plain`.

    x, delta: `[batch, hidden_size]`, contiguous, of one dtype. weight: `[hidden_size]`. The sum is rounded to the
    dtype, as the residual stream is, before its norm is taken in float32.
    Raises ValueError when shapes or dtypes do not fit, RuntimeError where Triton cannot run.
    """
    check(x, "add_norm_plain")
    others = [weight] if delta is None else [weight, delta]
    if x.dim() != 2 or weight.shape != x.shape[1:] or (delta is not None and delta.shape != x.shape):
        raise ValueError(f"x and delta are [batch, hidden_size], weight [hidden_size]; got {shapes(x, *others)}")
    check_alike(x, *others)
    batch, size = x.shape
    added = x if delta is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    block = triton.next_power_of_2(size)
    _add_norm_kernel[(batch,)](
        x,
        x if delta is None else delta,
        weight,
        added,
        normed,
        eps,
        SIZE=size,
        BLOCK=block,
        HAS_DELTA=delta is not None,
        num_warps=min(16, max(1, block // 256)),
    )
    return added, normed


def add_norm_plain(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same in PyTorch."""
    x = x if delta is None else x + delta
    return x, F.rms_norm(x, weight.shape, weight, eps)


def rotate_and_store(qkv: Tensor, cos: Tensor, sin: Tensor, place: Tensor, skipped: Tensor, k: Tensor, v: Tensor):
    """Q of one new token per row, rotated, `[batch, num_heads, 1, head_dim]`; its K, rotated, and V go into the cache.

    qkv: `[batch, (num_heads + 2 * num_kv_heads) * head_dim]`, contiguous. cos, sin: `[positions, head_dim]`, by
    position, as `Llama.angles` has them (the first half of `sin` is negative). place: int32 `[batch]`, the index in the
    buffers `k` and `v`, `[batch, num_kv_heads, capacity, head_dim]`, where the new token goes. skipped: int32
    `[batch]`, padding at the left of the row: the token's position is `place - skipped`.
    Nothing checks that a place lies inside the buffers: that would be a wait for the device.
    Raises ValueError when shapes or dtypes do not fit, RuntimeError where Triton cannot run. Twin:
    `rotate_and_store_plain`.
    """
    check(qkv, "rotate_and_store_plain")
    num_heads = heads_of(qkv, k, v, cos, sin, place, skipped)
    check_alike(qkv, cos, sin)
    if k.dtype != qkv.dtype or v.dtype != qkv.dtype:
        raise ValueError(f"the cache holds {k.dtype} and {v.dtype}, the new tokens are {qkv.dtype}")
    batch, num_kv_heads, _, head_dim = k.shape
    q = qkv.new_empty(batch, num_heads, 1, head_dim)
    _rotate_kernel[(batch, num_heads + 2 * num_kv_heads)](
        qkv,
        cos,
        sin,
        place,
        skipped,
        q,
        k,
        v,
        *k.stride(),
        *v.stride(),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=head_dim // 2,
        HALF_BLOCK=triton.next_power_of_2(head_dim // 2),
        num_warps=1,
    )
    return q


def rotate_and_store_plain(
    qkv: Tensor, cos: Tensor, sin: Tensor, place: Tensor, skipped: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """The same in PyTorch."""
    num_heads = heads_of(qkv, k, v, cos, sin, place, skipped)
    batch, num_kv_heads, _, head_dim = k.shape
    heads = qkv.view(batch, num_heads + 2 * num_kv_heads, head_dim)
    position = (place - skipped).long()
    qk = heads[:, : num_heads + num_kv_heads]
    turned = torch.addcmul(qk * cos[position][:, None], qk.roll(head_dim // 2, dims=-1), sin[position][:, None])
    rows = torch.arange(batch, device=qkv.device)
    k[rows, :, place.long()] = turned[:, num_heads:]
    v[rows, :, place.long()] = heads[:, num_heads + num_kv_heads :]
    return turned[:, :num_heads, None]


def gate(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of `[batch, 2 * intermediate_size]`, gate first, contiguous: `[batch, intermediate_size]`.

    Raises ValueError when the shape or dtype does not fit, RuntimeError where Triton cannot run. Twin: `gate_plain`.
    """
    check(gate_up, "gate_plain")
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or not gate_up.is_contiguous():
        raise ValueError(f"gate and up lie in [batch, 2 * intermediate_size], contiguous; got {shapes(gate_up)}")
    batch, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(batch, size)
    _gate_kernel[(triton.cdiv(size, COLUMNS), batch)](gate_up, out, SIZE=size, BLOCK=COLUMNS, num_warps=4)
    return out


def gate_plain(gate_up: Tensor) -> Tensor:
    """The same in PyTorch."""
    gated, up = gate_up.chunk(2, dim=-1)
    return F.silu(gated) * up


def heads_of(qkv: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, place: Tensor, skipped: Tensor) -> int:
    """How many query heads there are; ValueError when shapes do not fit."""
    if k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"k and v are [batch, num_kv_heads, capacity, head_dim]; got {shapes(k, v)}")
    batch, num_kv_heads, _, head_dim = k.shape
    heads, rest = divmod(qkv.shape[-1], head_dim)
    if qkv.dim() != 2 or len(qkv) != batch or rest or heads <= 2 * num_kv_heads or head_dim % 2:
        raise ValueError(
            f"qkv is [batch, (num_heads + 2 * num_kv_heads) * head_dim], head_dim even; got {shapes(qkv)} for a cache "
            f"of {shapes(k)}"
        )
    if cos.shape != sin.shape or cos.dim() != 2 or cos.shape[1] != head_dim:
        raise ValueError(f"cos and sin are [positions, head_dim]; got {shapes(cos, sin)}")
    if place.shape != (batch,) or skipped.shape != (batch,) or {place.dtype, skipped.dtype} != {torch.int32}:
        raise ValueError(f"place and skipped are int32 [batch]; got {place.dtype}, {skipped.dtype}")
    return heads - 2 * num_kv_heads


def check(x: Tensor, twin: str) -> None:
    """ValueError for a dtype that no kernel here has; RuntimeError where Triton cannot run."""
    if x.dtype not in DTYPES:
        raise ValueError(f"kernels take float32, float16 or bfloat16; got {x.dtype}")
    check_can_run(x, f"labkit.kernels.decode_step.{twin}")


def check_alike(x: Tensor, *others: Tensor) -> None:
    """ValueError unless all are contiguous and of one dtype: the kernels count on it."""
    for other in (x, *others):
        if other.dtype != x.dtype or not other.is_contiguous():
            raise ValueError(f"all must be contiguous and of one dtype; got {x.dtype} and {other.dtype}")


def shapes(*tensors: Tensor) -> str:
    """Shapes for a message."""
    return ", ".join(str(list(x.shape)) for x in tensors)


if triton is not None:

    @triton.jit
    def _add_norm_kernel(
        x_ptr, delta_ptr, weight_ptr, added_ptr, normed_ptr, eps,
        SIZE: tl.constexpr, BLOCK: tl.constexpr, HAS_DELTA: tl.constexpr,
    ):  # fmt: skip
        """One row."""
        column = tl.arange(0, BLOCK)
        here = column < SIZE
        at = tl.program_id(0).to(tl.int64) * SIZE + column
        x = tl.load(x_ptr + at, mask=here, other=0.0)
        weight = tl.load(weight_ptr + column, mask=here, other=0.0).to(tl.float32)
        if HAS_DELTA:
            delta = tl.load(delta_ptr + at, mask=here, other=0.0)
            x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
            tl.store(added_ptr + at, x, mask=here)
        wide = x.to(tl.float32)
        factor = tl.rsqrt(tl.sum(wide * wide, axis=0) / SIZE + eps)
        tl.store(normed_ptr + at, (wide * factor * weight).to(x.dtype), mask=here)

    @triton.jit
    def _rotate_kernel(
        qkv_ptr, cos_ptr, sin_ptr, place_ptr, skipped_ptr, q_ptr, k_ptr, v_ptr,
        k_batch, k_head, k_token, k_dim, v_batch, v_head, v_token, v_dim,
        NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One head (program axis 1) of one row (axis 0): a query, a key, or a value, in that order."""
        row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        heads: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
        dim = tl.arange(0, HALF_BLOCK)
        here = dim < HALF
        place = tl.load(place_ptr + row).to(tl.int64)
        from_ = qkv_ptr + (row * heads + head) * (2 * HALF) + dim
        low, high = tl.load(from_, mask=here, other=0.0), tl.load(from_ + HALF, mask=here, other=0.0)
        if head < NUM_HEADS + NUM_KV_HEADS:
            angle = (place - tl.load(skipped_ptr + row)) * (2 * HALF) + dim
            cos = tl.load(cos_ptr + angle, mask=here, other=0.0).to(tl.float32)
            sin = tl.load(sin_ptr + angle + HALF, mask=here, other=0.0).to(tl.float32)  # the half that is not negated
            a, b = low.to(tl.float32), high.to(tl.float32)
            low, high = (a * cos - b * sin).to(low.dtype), (b * cos + a * sin).to(high.dtype)
        if head < NUM_HEADS:
            q_at = q_ptr + (row * NUM_HEADS + head) * (2 * HALF) + dim
            tl.store(q_at, low, mask=here)
            tl.store(q_at + HALF, high, mask=here)
        elif head < NUM_HEADS + NUM_KV_HEADS:
            k_at = k_ptr + row * k_batch + (head - NUM_HEADS) * k_head + place * k_token
            tl.store(k_at + dim * k_dim, low, mask=here)
            tl.store(k_at + (dim + HALF) * k_dim, high, mask=here)
        else:
            v_at = v_ptr + row * v_batch + (head - NUM_HEADS - NUM_KV_HEADS) * v_head + place * v_token
            tl.store(v_at + dim * v_dim, low, mask=here)
            tl.store(v_at + (dim + HALF) * v_dim, high, mask=here)

    @triton.jit
    def _gate_kernel(gate_up_ptr, out_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
        """BLOCK columns (program axis 0) of one row (axis 1)."""
        row = tl.program_id(1).to(tl.int64)
        column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        here = column < SIZE
        at = gate_up_ptr + row * 2 * SIZE + column
        gated = tl.load(at, mask=here, other=0.0).to(tl.float32)
        up = tl.load(at + SIZE, mask=here, other=0.0)
        out = gated * tl.sigmoid(gated) * up.to(tl.float32)
        tl.store(out_ptr + row * SIZE + column, out.to(up.dtype), mask=here)
