"""`paged_attention.store` as a Triton kernel: new K and V, each token's to its slot."""

from __future__ import annotations

from torch import Tensor

from labkit.kernels.split import check_can_run

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS: the rest of labkit works without
    triton = None

MANY = 2048  # tokens from which a program takes several: fewer would leave multiprocessors without work
AT_ONCE = 4096  # numbers of K, and as many of V, that a program then holds: 8 loads of 16 bytes a thread in 16 bits


def paged_store(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """`paged_attention.store` as one kernel: new K and V, of any strides, each token's to its slot.

    Raises ValueError when sizes or dtypes do not fit or the blocks are not contiguous, RuntimeError where Triton cannot
    run.
    """
    batch, num_kv_heads, new_tokens, head_dim = k.shape
    if k.shape != v.shape or keys.shape != values.shape or keys.shape[2:] != (num_kv_heads, head_dim):
        raise ValueError(
            f"K {list(k.shape)} and V {list(v.shape)} do not fit blocks {list(keys.shape)} and {list(values.shape)}"
        )
    if len({x.dtype for x in (k, v, keys, values)}) > 1 or not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("new K and V and their blocks have one dtype, and the blocks are contiguous")
    tokens = batch * new_tokens
    if slots.shape != (tokens,):
        raise ValueError(f"{tokens} new tokens need as many slots; got {list(slots.shape)}")
    check_can_run(k, "paged_attention.store")
    block = triton.next_power_of_2(num_kv_heads * head_dim)
    at_once = max(1, AT_ONCE // block) if tokens >= MANY else 1
    _store_kernel[(triton.cdiv(tokens, at_once),)](
        k,
        v,
        keys,
        values,
        slots,
        tokens,
        new_tokens,
        *k.stride(),
        *v.stride(),
        HEAD_DIM=head_dim,
        NUMBERS=num_kv_heads * head_dim,
        TOKENS=at_once,
        BLOCK=block,
    )


if triton is not None:

    @triton.jit(do_not_specialize=["tokens", "new_tokens"])
    def _store_kernel(
        k_ptr,
        v_ptr,
        keys_ptr,
        values_ptr,
        slots_ptr,
        tokens,
        new_tokens,
        k_batch,
        k_head,
        k_token,
        k_dim,
        v_batch,
        v_head,
        v_token,
        v_dim,
        HEAD_DIM: tl.constexpr,
        NUMBERS: tl.constexpr,
        TOKENS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Some tokens: K and V of all their heads, which lie side by side in a slot."""
        token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
        row, place = (token // new_tokens)[:, None], (token % new_tokens)[:, None]
        number = tl.arange(0, BLOCK)[None, :]
        head, dim = (number // HEAD_DIM).to(tl.int64), number % HEAD_DIM
        here = (token < tokens)[:, None] & (number < NUMBERS)
        slot = tl.load(slots_ptr + token, mask=token < tokens, other=0).to(tl.int64)
        to = slot[:, None] * NUMBERS + number
        k = tl.load(k_ptr + row * k_batch + place * k_token + head * k_head + dim * k_dim, mask=here)
        v = tl.load(v_ptr + row * v_batch + place * v_token + head * v_head + dim * v_dim, mask=here)
        tl.store(keys_ptr + to, k, mask=here)
        tl.store(values_ptr + to, v, mask=here)
