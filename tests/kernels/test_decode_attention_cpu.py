"""Attention of one new token per row over dense K and V, on a CPU: float64's numbers within a derived bound."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit import models
from labkit.attention import PLAIN, Constants, fused_attention
from labkit.cache import PreallocatedCache, layer
from labkit.cache.step import Step
from labkit.generation import generate
from labkit.kernels import threads
from labkit.kernels.decode_attention_cpu import PART, decode_attention_cpu, takes
from labkit.kernels.decode_attention_cpu import warm_up as WARM
from labkit.kernels.matvec_cpu import DTYPES
from labkit.ledger import ledger
from labkit.specs import ModelSpec
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
    assert_near(decode_attention_cpu(q, k, v, constants, step.visible), q, k, v, constants, step.visible)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_threads_nor_other_rows_change_a_bit(dtype):
    q, k, v = drawn(3, 3, 3, 2 * PART + 9, 64, dtype)
    lengths = (700 % PART, 2 * PART + 8, 3)
    step, before = Step((1,) * 3, lengths, (0,) * 3), torch.get_num_threads()
    try:
        some = []
        for number in range(1, threads.MOST + 2):  # one more than Numba has
            torch.set_num_threads(number)
            some.append(decode_attention_cpu(q, k, v, visible=step.visible))
    finally:
        torch.set_num_threads(before)
    assert len(some) > 1
    assert all(torch.equal(some[0], one) for one in some)  # exact
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = decode_attention_cpu(q[one], k[one, :, : length + 1], v[one, :, : length + 1], visible=step.of_row(row))
        assert torch.equal(alone[0], some[0][row])  # exact


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_does_not_matter_how_tensors_lie(dtype):
    q, k, v = drawn(2, 3, 2, 40, 64, dtype)
    expected = decode_attention_cpu(q, k, v)
    turned = q.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    spaced = torch.stack((q, -q), dim=-1).flatten(-2)[..., ::2]
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    odd = [torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape) for x in (k, v)]
    for queries, (keys, values) in ((turned, (k, v)), (spaced, (k, v)), (q, by_token), (q, odd)):
        assert torch.equal(decode_attention_cpu(queries, keys, values), expected)  # exact
    shared = [x[:, :1].expand(-1, 3, -1, -1) for x in (k, v)]
    assert torch.equal(decode_attention_cpu(q, *shared), decode_attention_cpu(q, *(x.clone() for x in shared)))


def test_a_part_of_infinitely_unlikely_keys_weighs_nothing():
    q, k, v = drawn(1, 1, 1, 3 * PART, 64, torch.float32)
    q, k[:, :, : PART + 9, 5] = q.abs(), float("-inf")
    got, rest = decode_attention_cpu(q, k, v), [x[:, :, PART + 9 :] for x in (k, v)]
    assert (got - fused_attention(q, *rest)).abs().max() <= 2 * attention_bound(q, *rest)  # bounded


def test_what_lies_behind_a_row_or_before_its_window_is_not_read():
    q, k, v = drawn(2, 2, 2, 90, 64, torch.float32)
    step, constants = Step((1, 1), (89, 30), (0, 4)), Constants(window=20)
    expected = decode_attention_cpu(q, k, v, constants, step.visible)
    for x in (k, v):
        x[0, :, :70], x[1, :, 31:], x[1, :, :11] = float("nan"), float("nan"), float("nan")
    assert torch.equal(decode_attention_cpu(q, k, v, constants, step.visible), expected)  # exact


def given_up(how: str):
    """A call's tensors and constants, of which one thing is not for the loops."""
    dtype = {"float16": torch.float16, "float64": torch.float64}.get(how, torch.float32)
    q, k, v = drawn(1, 2, 2, 30, 48 if how == "head_dim" else 64, dtype)
    constants = {"soft cap": Constants(soft_cap=5.0), "not causal": Constants(causal=False)}.get(how, PLAIN)
    q = q.expand(-1, -1, 2, -1) if how == "two tokens" else q
    if how in ("K along channels", "V along channels"):
        k, v = (x.mT.contiguous().mT if name in how else x for name, x in (("K", k), ("V", v)))
    k = k.requires_grad_() if how == "a gradient" else k.half() if how == "K in another dtype" else k
    v = v.bfloat16() if how == "V in another dtype" else v.to("meta") if how == "V elsewhere" else v
    k = torch._neg_view(k) if how == "negated" else k
    return q, k, v, constants


@pytest.mark.parametrize(
    "how",
    [
        "two tokens", "head_dim", "float16", "float64", "soft cap", "not causal", "a gradient", "K along channels",
        "V along channels", "K in another dtype", "V in another dtype", "V elsewhere", "negated",
    ],
)  # fmt: skip
def test_what_the_loops_do_not_take_they_refuse(how):
    q, k, v, constants = given_up(how)
    step = Step((q.shape[2],), (30 - q.shape[2],), (0,))
    assert not takes(q, k, v, constants, step.visible)
    with pytest.raises(ValueError, match="fused_attention takes all of these"):
        decode_attention_cpu(q, k, v, constants, step.visible)


def test_what_another_call_sees_is_refused():
    q, k, v = drawn(1, 2, 2, 30, 64, torch.float32)
    for step in (Step((1,), (20,), (0,)), Step((1, 1), (29, 25), (0, 0))):
        with pytest.raises(ValueError, match="this visibility is of"):
            decode_attention_cpu(q, k, v, visible=step.visible)


def run(code: str, **environment: str) -> str:
    """What a Python of its own prints."""
    said = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stderr
    return said.stdout.strip()


PREPACKED = """
import os, torch
from labkit.prepacked import PrepackedLinear
from labkit.generation import generate
from labkit.kernels import threads
layer, x = PrepackedLinear(torch.ones(64, 64)), torch.ones(1, 64)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_leaves_the_work_to_pytorch():
    code = f"""{PREPACKED}
torch.set_num_threads(1)
with torch.no_grad():
    before = layer.takes(x), layer(x)[0, 0].item()
    if (child := os.fork()) == 0:
        os._exit(7 if (layer.takes(x), layer(x)[0, 0].item()) == (False, 64.0) else 1)
    print(before, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(code) in ("(True, 64.0) 7", "(False, 64.0) 7")  # the latter where oneDNN has another layout


@pytest.mark.parametrize(("asked", "has"), [("workqueue", False), ("forksafe", False), ("default", True)])
def test_threads_that_serve_one_caller_at_a_time_are_not_used(asked, has):
    said = run(f"{PREPACKED}\nprint(threads.available(), layer.blocks is None)", NUMBA_THREADING_LAYER=asked).split()
    assert said[0] == str(has)
    assert has or said[1] == "True"


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("decode_attention_cpu", "packed_attention_cpu"), ("packed_attention_cpu", "decode_attention_cpu"),
        ("paged_packed_attention_cpu", "paged_attention_cpu"),
    ],
)  # fmt: skip
def test_loops_are_warm_after_their_own_warm_up_whatever_was_compiled_before(first, then):
    code = f"from labkit.kernels import {first}, {then}\n{first}.warm_up()\n{then}.warm_up()\n"
    assert run(f"{code}print(len({then}._attend.signatures))") == "1"


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

    def test_no_step_of_a_generation_waits_for_the_compiler(self, asked, monkeypatch):
        calls = []
        monkeypatch.setattr("labkit.kernels.decode_attention_cpu.warm_up", lambda: calls.append(len(asked)) or WARM())
        spec = ModelSpec(
            name="tiny", num_layers=1, num_heads=4, num_kv_heads=2, head_dim=64, hidden_size=32, intermediate_size=32,
            vocab_size=30, max_seq_len=64,
        )  # fmt: skip
        model = models.random(spec)
        tokens = torch.ones(1, 30, dtype=torch.long)
        generate(model, tokens, 5, cache=model.cache(60))
        assert calls == []
        generate(model, tokens, 15, cache=model.cache(60))
        assert calls[0] == 0  # before the first call of the loops
        assert asked
