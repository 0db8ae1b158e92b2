"""Attention of one new token per row over dense K and V, on a CPU: float64's numbers within a derived bound."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit.attention import PLAIN, Constants, fused_attention
from labkit.cache import PreallocatedCache, layer
from labkit.cache.step import Step
from labkit.kernels import threads
from labkit.kernels.decode_attention_cpu import PART, decode_attention_cpu, takes
from labkit.kernels.matvec_cpu import DTYPES
from labkit.ledger import ledger
from tests.bounds import attention_bound

pytestmark = pytest.mark.skipif(not threads.available(), reason="Numba has neither OpenMP nor TBB here")
GROUPS = [(1, 1), (2, 1), (3, 3), (1, 8)]  # KV heads, queries to each


def drawn(batch: int, heads: int, queries: int, room: int, head_dim: int, dtype: torch.dtype, seed: int = 0):
    """Q of one token, and K and V with room behind them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (batch, heads * queries, 1, head_dim), *((batch, heads, room, head_dim),) * 2
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def assert_near(got, q, k, v, constants, visible):
    """Bounded: within what float32 sums and one rounding cost against float64, of what the longest row sees."""
    exact = fused_attention(q.double(), k.double(), v.double(), constants, visible)
    limit = attention_bound(q, k, v, scale=constants.scale, sums=torch.float32)
    assert (got.double() - exact).abs().max() <= limit


@given(
    groups=st.sampled_from(GROUPS), lengths=st.lists(st.integers(0, 2 * PART + 3), min_size=1, max_size=3),
    head_dim=st.sampled_from([64, 128]), dtype=st.sampled_from(DTYPES), window=st.sampled_from([None, 1, 40]),
    scale=st.sampled_from([None, 0.3]), padded=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_the_loops_give_what_attention_gives_in_float64(groups, lengths, head_dim, dtype, window, scale, padded, seed):
    longest = max(lengths) + 1
    skipped = tuple(min(length, 5) if padded else 0 for length in lengths)
    step = Step((1,) * len(lengths), tuple(lengths), skipped)
    constants = Constants(scale=scale, window=window)
    q, *held = drawn(len(lengths), *groups, longest + 7, head_dim, dtype, seed)
    k, v = (x[:, :, :longest] for x in held)  # as a preallocated cache gives it: not contiguous
    assert takes(q, k, v, constants, step.visible)
    assert_near(decode_attention_cpu(q, k, v, step.visible, constants), q, k, v, constants, step.visible)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_threads_nor_other_rows_change_a_bit(dtype):
    q, k, v = drawn(3, 3, 3, 2 * PART + 9, 64, dtype)
    lengths = (700 % PART, 2 * PART + 8, 3)
    step, before = Step((1,) * 3, lengths, (0,) * 3), torch.get_num_threads()
    try:
        some = []
        for number in (1, 2, 64):
            torch.set_num_threads(number)
            some.append(decode_attention_cpu(q, k, v, step.visible))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(some[0], some[1])  # exact
    assert torch.equal(some[0], some[2])
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = decode_attention_cpu(q[one], k[one, :, : length + 1], v[one, :, : length + 1], step.of_row(row))
        assert torch.equal(alone[0], some[0][row])  # exact


def test_what_lies_behind_a_row_or_before_its_window_is_not_read():
    q, k, v = drawn(2, 2, 2, 90, 64, torch.float32)
    step, constants = Step((1, 1), (89, 30), (0, 4)), Constants(window=20)
    expected = decode_attention_cpu(q, k, v, step.visible, constants)
    for x in (k, v):
        x[0, :, :70], x[1, :, 31:], x[1, :, :11] = float("nan"), float("nan"), float("nan")
    assert torch.equal(decode_attention_cpu(q, k, v, step.visible, constants), expected)  # exact


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 2}, {"head_dim": 48}, {"dtype": torch.float16}, {"dtype": torch.float64},
        {"constants": Constants(soft_cap=5.0)}, {"constants": Constants(causal=False)},
        {"grad": True}, {"turned": True},
    ],
    ids=str,
)  # fmt: skip
def test_what_the_loops_do_not_take_they_refuse(change):
    dtype, constants = change.get("dtype", torch.float32), change.get("constants", PLAIN)
    tokens = change.get("tokens", 1)
    q, k, v = drawn(1, 2, 2, 30, change.get("head_dim", 64), dtype)
    q, step = q.expand(-1, -1, tokens, -1), Step((tokens,), (30 - tokens,), (0,))
    if "grad" in change:
        k.requires_grad_()
    if "turned" in change:
        k = k.transpose(2, 3).contiguous().transpose(2, 3)
    assert not takes(q, k, v, constants, step.visible)
    with pytest.raises(ValueError, match="fused_attention takes all of these"):
        decode_attention_cpu(q, k, v, step.visible, constants)


class TestACache:
    """A dense layer goes through the loops where there is enough to read, and says the same."""

    @pytest.fixture
    def asked(self, monkeypatch):
        seen, real = [], decode_attention_cpu

        def watched(*args):
            seen.append(args)
            return real(*args)

        monkeypatch.setattr("labkit.kernels.decode_attention_cpu.decode_attention_cpu", watched)
        monkeypatch.setattr(layer, "PAYS", 2 * 2 * 64 * 40)
        return seen

    def grown(self, tokens: int):
        cache = PreallocatedCache(200)
        q, k, v = drawn(1, 2, 2, tokens, 64, torch.float32)
        cache.append(k[:, :, :-1], v[:, :, :-1]) if tokens > 1 else None
        cache.append(k[:, :, -1:], v[:, :, -1:])
        return cache, q, k, v

    @pytest.mark.parametrize(("tokens", "loops"), [(39, False), (40, True)])
    def test_one_token_pays_from_enough_keys_on(self, asked, tokens, loops):
        cache, q, k, v = self.grown(tokens)
        got = cache.attend(q)
        assert bool(asked) == loops
        assert (got - fused_attention(q, k, v)).abs().max() <= 2 * attention_bound(q, k, v)  # bounded

    def test_the_ledger_counts_the_same_reads(self, asked):
        cache, q, k, v = self.grown(60)
        with ledger([]) as work:
            cache.attend(q)
        assert not asked  # watched calls are PyTorch's
        assert work.bytes_read == k.nbytes + v.nbytes
