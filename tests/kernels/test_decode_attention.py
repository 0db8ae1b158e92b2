"""The decode kernel against its plain-PyTorch twin in float64; in the interpreter where there is no GPU."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit import kernels
from labkit.attention import PLAIN, Constants, Visibility, attention
from labkit.kernels import split
from labkit.kernels.decode_attention import decode_attention, decode_between
from labkit.kernels.split import merge
from tests.attending import how
from tests.bounds import attention_bound
from tests.kernels.effort import examples
from tests.pairs import every_pair

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
needs_triton = pytest.mark.skipif(not kernels.available(DEVICE), reason="Triton is not installed here")


def tensors(batch, num_kv_heads, queries_per_kv, kv_len, head_dim, dtype, seed=0, capacity=None):
    """q, k, v; with a `capacity`, k and v are the part in use of a larger buffer whose rest is NaN."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, num_kv_heads * queries_per_kv, 1, head_dim, generator=generator)
    kv = torch.randn(2, batch, num_kv_heads, kv_len, head_dim, generator=generator)
    buffer = torch.full((2, batch, num_kv_heads, capacity or kv_len, head_dim), float("nan"))
    buffer[:, :, :, :kv_len] = kv
    k, v = buffer.to(DEVICE, dtype)[:, :, :, :kv_len]
    return q.to(DEVICE, dtype), k, v


def assert_agrees(q, k, v, **options):
    more = {name: options.pop(name) for name in ("block_size", "num_splits") if name in options}
    settings_ = how(q, k, **options)
    expected = attention(q.double(), k.double(), v.double(), *settings_)
    got = decode_attention(q, k, v, *settings_, **more)
    assert got.dtype == q.dtype
    # Bounded: sums in float32, one rounding to the inputs' dtype.
    bound = attention_bound(q, k, v, scale=options.get("scale"), sums=torch.float32)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=bound)


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "kv_len", "head_dim"), every_pair(DTYPES, [1, 15, 16, 17, 64, 300], [8, 64, 80]), ids=str
)
def test_any_length_and_head_dim(dtype, kv_len, head_dim):
    assert_agrees(*tensors(2, 2, 3, kv_len, head_dim, dtype))


@needs_triton
@pytest.mark.parametrize("queries_per_kv", range(1, 9))
def test_any_number_of_queries_per_kv_head(queries_per_kv):
    assert_agrees(*tensors(1, 2, queries_per_kv, 40, 16, torch.float32))


@needs_triton
@examples(40)
@given(st.data())
def test_any_structure(data):
    batch, kv_len = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 150))
    shape = (batch, data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8)), kv_len, data.draw(st.integers(1, 40)))
    padding = data.draw(st.none() | st.lists(st.integers(0, kv_len), min_size=batch, max_size=batch))
    assert_agrees(
        *tensors(*shape, data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 99)), kv_len + 5),
        padding=padding,
        window=data.draw(st.none() | st.integers(1, kv_len + 3)),
        scale=data.draw(st.none() | st.floats(0.05, 1.0)),
        block_size=data.draw(st.sampled_from([16, 32, 64])),
        num_splits=data.draw(st.none() | st.integers(1, 9)),
    )


@needs_triton
def test_the_slack_of_a_preallocated_buffer_is_never_used():
    assert_agrees(*tensors(2, 2, 3, 70, 24, torch.float32, capacity=128), num_splits=3)


@needs_triton
def test_strides_may_be_any():
    q, k, v = tensors(2, 4, 2, 33, 16, torch.float32)
    tokens_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    dims_first = [x.mT.contiguous().mT for x in (k, v)]
    assert len({x.stride() for x in (k, tokens_first[0], dims_first[0])}) == 3
    assert_agrees(q, *tokens_first)
    assert_agrees(q, *dims_first)
    assert_agrees(q, tokens_first[0], dims_first[1])


@needs_triton
@pytest.mark.parametrize("num_splits", [1, 2, 5, 1000])
def test_any_split_of_the_sequence_gives_the_same(num_splits):
    assert_agrees(*tensors(1, 2, 3, 200, 32, torch.float32), num_splits=num_splits, block_size=16)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_all_padding_gives_zeros(dtype):
    q, k, v = tensors(2, 2, 3, 90, 16, dtype)
    out = decode_attention(q, k, v, *how(q, k, padding=[90, 0]), num_splits=2)
    assert torch.equal(out[0], torch.zeros_like(out[0]))  # exact
    assert out[1].abs().min() > 0


@needs_triton
@given(lengths=st.lists(st.integers(1, 90), min_size=2, max_size=4), window=st.none() | st.integers(1, 60))
@examples(20)
def test_rows_of_different_lengths_see_their_own_tokens(lengths, window):
    q, k, v = tensors(len(lengths), 2, 3, max(lengths), 16, torch.float32)
    for row, length in enumerate(lengths):
        k[row, :, length:], v[row, :, length:] = float("nan"), float("nan")  # room behind a row's end
    visible = Visibility(1, max(lengths), tuple(length - 1 for length in lengths))
    out = decode_attention(q, k, v, Constants(window=window), visible, num_splits=2, block_size=16)
    for row, length in enumerate(lengths):
        own = [x[row : row + 1, :, :length].double() for x in (k, v)]
        expected = attention(q[row : row + 1].double(), *own, Constants(window=window))
        bound = attention_bound(q[row : row + 1], *own, sums=torch.float32)
        torch.testing.assert_close(out[row : row + 1].double(), expected, rtol=0, atol=bound)  # bounded


@needs_triton
def test_large_scores_do_not_overflow():
    q, k, v = tensors(1, 1, 2, 50, 16, torch.float32)
    assert_agrees(q * 40, k * 40, v, num_splits=2, block_size=16)


def test_parts_merge_by_their_log_sum_exps_and_an_empty_part_weighs_nothing():
    scores = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    values = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64)
    expected = scores.softmax(0) @ values
    cut = [(0, 1), (1, 4)]
    outs = [scores[a:b].softmax(0) @ values[a:b] for a, b in cut] + [torch.zeros(1, dtype=torch.float64)]
    lse = [scores[a:b].logsumexp(0) for a, b in cut] + [torch.tensor(float("-inf"), dtype=torch.float64)]
    got = merge(torch.stack(outs).view(1, 1, 3, 1, 1), torch.stack(lse).view(1, 1, 3, 1))
    # Bounded: a few roundings of float64, of numbers below 4.
    torch.testing.assert_close(got.view(1), expected, rtol=0, atol=16 * 4 * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize(
    ("kv_len", "pairs", "splits"),
    [(1, 1, 1), (127, 1, 1), (128, 1, 2), (10**6, 1, 132), (10**6, 8, 16), (10**6, 900, 1)],
)
def test_the_default_number_of_parts_fills_the_multiprocessors(kv_len, pairs, splits, monkeypatch):
    monkeypatch.setattr(split, "multiprocessors", lambda device: 132)
    assert split.default_splits(kv_len, pairs, torch.device("cuda")) == splits
    assert split.default_splits(10**6, 8, torch.device("cuda"), programs=3) == 49


@needs_triton
@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU multiplies so by itself")
def test_float16_is_multiplied_as_tensor_cores_do(monkeypatch):
    dtype = torch.float16  # in bfloat16 the interpreter cannot multiply
    monkeypatch.setattr(split, "capability", lambda device: (9, 0))
    q, k, v = tensors(2, 2, 3, 300, 64, dtype)
    assert_agrees(q, k, v, num_splits=2)
    out = decode_attention(q * 40, k, v * 0 + 1)  # one key has nearly all weight: the others' are small
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=torch.finfo(dtype).eps)  # bounded: one rounding


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_parts_are_merged_as_by_their_twin(dtype):
    parts, lse = torch.randn(2, 3, 37, 5, 24, device=DEVICE), torch.randn(2, 3, 37, 5, device=DEVICE) * 3
    lse[0, 1, ::2], lse[1, 2] = float("-inf"), float("-inf")
    expected = merge(parts.double(), lse.double())
    bound = 64 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps  # bounded: sums of 37, one rounding
    got = split.merged(parts, lse, dtype)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=bound * parts.abs().max().item())


CALL = """
import torch
from labkit.kernels import split
from labkit.kernels.decode_attention import decode_attention, decode_between
x = torch.zeros(1, 1, 1, 16)
try:
    decode_attention(x, x, x)
except RuntimeError as error:
    print(error)
"""


class TestErrors:
    def arguments(self, dtype=torch.float32):
        return tensors(2, 2, 3, 20, 16, dtype)

    def test_more_than_one_new_token(self):
        q, k, v = self.arguments()
        with pytest.raises(ValueError, match="takes one new token; got 3"):
            decode_attention(q.expand(-1, -1, 3, -1), k, v)

    def test_shapes_that_do_not_fit(self):
        q, k, v = self.arguments()
        with pytest.raises(ValueError, match="multiple of num_kv_heads"):
            decode_attention(q[:, :5], k, v)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
    def test_a_dtype_it_does_not_take(self, dtype):
        with pytest.raises(ValueError, match="must share one dtype"):
            decode_attention(*self.arguments(dtype))

    def test_keys_of_another_dtype(self):
        q, k, v = self.arguments()
        with pytest.raises(ValueError, match="must share one dtype"):
            decode_attention(q, k.half(), v)

    def test_a_visibility_of_another_batch(self):
        with pytest.raises(ValueError, match="1 queries and 20 keys in 3 rows"):
            decode_attention(*self.arguments(), PLAIN, Visibility.newest(1, 20, [1, 2, 3]))

    def test_a_soft_cap(self):
        with pytest.raises(ValueError, match="the kernel has no soft cap"):
            decode_attention(*self.arguments(), Constants(soft_cap=3.0))

    @needs_triton
    def test_bounds_that_are_no_bounds_of_these_rows(self):
        q, k, v = self.arguments()
        good = torch.zeros(2, dtype=torch.int32, device=DEVICE)
        for bad in (good[:1], good.long()):
            with pytest.raises(ValueError, match=r"first and end are int32 \[2\]"):
                decode_between(q, k, v, good, bad)

    @needs_triton
    def test_a_number_of_parts_that_cannot_be(self):
        with pytest.raises(ValueError, match="at least 1; got -3"):
            decode_attention(*self.arguments(), num_splits=-3)

    @needs_triton
    def test_no_rows_give_no_answers(self):
        q, k, v = self.arguments()
        assert decode_attention(q[:0], k[:0], v[:0]).shape == (0, 6, 1, 16)

    @pytest.mark.parametrize("block_size", [8, 24])
    def test_a_block_size_that_is_no_power_of_two_or_too_small(self, block_size):
        with pytest.raises(ValueError, match="power of 2, at least 16"):
            decode_attention(*self.arguments(), block_size=block_size)

    def run(self, before):
        """What a fresh Python prints, `TRITON_INTERPRET` unset, when it calls the kernel on a CPU."""
        code = f"import sys\n{before}\n{CALL}"
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    def test_without_triton_it_can_be_imported_and_says_what_to_use_instead(self):
        assert "Triton is not installed here: use labkit.attention.attention" in self.run(
            'sys.modules["triton"] = None'
        )

    @needs_triton
    def test_on_a_cpu_without_the_interpreter_it_says_what_to_set(self):
        assert "TRITON_INTERPRET=1" in self.run("")
