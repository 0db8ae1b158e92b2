"""The oracle, proved against a loop over single numbers and against PyTorch; then the other two against the oracle."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from labkit.attention import (
    PLAIN,
    Constants,
    Visibility,
    attention,
    attention_weights,
    blended,
    causal_by_kv_head,
    causal_mask,
    fused_attention,
    online_attention,
)
from tests.attending import how
from tests.bounds import attention_bound

THREE = [attention, online_attention, fused_attention]


def tensors(batch, num_kv_heads, queries_per_kv, new_tokens, kv_len, head_dim, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, num_kv_heads * queries_per_kv, new_tokens, head_dim, generator=generator, dtype=dtype)
    k, v = torch.randn(2, batch, num_kv_heads, kv_len, head_dim, generator=generator, dtype=dtype)
    return q, k, v


def may_see(row, i, j, new_tokens, kv_len, causal, padding, window):
    """Whether query `i` of batch row `row` may see key `j`: the rules, one pair at a time."""
    position = kv_len - new_tokens + i
    if padding is not None and j < padding[row]:
        return False
    if causal and j > position:
        return False
    return window is None or j > position - window


def loop_attention(q, k, v, *, causal=True, padding=None, scale=None, window=None, soft_cap=None):
    """Attention one number at a time, in Python floats (64 bits)."""
    (batch, num_heads, new_tokens, head_dim), (num_kv_heads, kv_len) = q.shape, k.shape[1:3]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    left = None if padding is None else padding.tolist()
    out = torch.zeros(q.shape, dtype=torch.float64)
    for row in range(batch):
        for head in range(num_heads):
            kv_head = head // (num_heads // num_kv_heads)
            keys, values = k[row, kv_head].tolist(), v[row, kv_head].tolist()
            for i, query in enumerate(q[row, head].tolist()):
                scores = {}
                for j in range(kv_len):
                    if may_see(row, i, j, new_tokens, kv_len, causal, left, window):
                        score = scale * sum(a * b for a, b in zip(query, keys[j], strict=True))
                        scores[j] = score if soft_cap is None else soft_cap * math.tanh(score / soft_cap)
                top = max(scores.values(), default=0.0)
                weights = {j: math.exp(score - top) for j, score in scores.items()}
                total = sum(weights.values())
                for d in range(head_dim):
                    out[row, head, i, d] = sum(w * values[j][d] for j, w in weights.items()) / total if total else 0.0
    return out


@st.composite
def calls(draw):
    """q, k, v and the settings of one call, of any structure the three functions take."""
    batch, num_kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    new_tokens, past = draw(st.integers(1, 4)), draw(st.integers(0, 6))
    kv_len = new_tokens + past
    shape = (batch, num_kv_heads, draw(st.integers(1, 8)), new_tokens, kv_len, draw(st.integers(1, 9)))
    causal = draw(st.booleans())
    padded = st.lists(st.integers(0, kv_len), min_size=batch, max_size=batch).map(torch.tensor)
    options = {
        "causal": causal,
        "padding": draw(st.none() | padded),
        "scale": draw(st.none() | st.floats(0.1, 2.0)),
        "window": draw(st.none() | st.integers(1, kv_len + 2)) if causal else None,
        "soft_cap": draw(st.none() | st.floats(0.5, 20.0)),
    }
    return tensors(*shape, seed=draw(st.integers(0, 2**32 - 1))), options


@settings(max_examples=60, deadline=None)
@given(calls())
def test_each_function_agrees_with_a_loop_over_single_numbers(call):
    (q, k, v), options = call
    expected, bound = loop_attention(q, k, v, **options), attention_bound(q, k, v, scale=options["scale"])
    for function in THREE:
        torch.testing.assert_close(function(q, k, v, *how(q, k, **options)), expected, rtol=0, atol=bound)  # bounded


@settings(max_examples=30, deadline=None)
@given(calls(), st.integers(1, 12))
def test_online_attention_gives_the_same_for_any_block_size(call, block_size):
    (q, k, v), options = call
    got = online_attention(q, k, v, *how(q, k, **options), block_size=block_size)
    bound = attention_bound(q, k, v, scale=options["scale"])
    torch.testing.assert_close(got, attention(q, k, v, *how(q, k, **options)), rtol=0, atol=bound)  # bounded


@pytest.mark.parametrize("function", THREE)
@pytest.mark.parametrize("queries_per_kv", [1, 3, 8])
@pytest.mark.parametrize("window", [None, 7])
def test_agrees_with_torch_over_expanded_keys_and_a_spelled_out_mask(function, queries_per_kv, window):
    new_tokens, kv_len, padding = 13, 40, torch.tensor([0, 9])
    q, k, v = tensors(2, 2, queries_per_kv, new_tokens, kv_len, 24)
    mask = torch.tensor(
        [
            [
                [may_see(b, i, j, new_tokens, kv_len, True, padding, window) for j in range(kv_len)]
                for i in range(new_tokens)
            ]
            for b in range(2)
        ]
    )
    wide_k, wide_v = (x.repeat_interleave(queries_per_kv, dim=1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q, wide_k, wide_v, attn_mask=mask[:, None])
    got = function(q, k, v, *how(q, k, padding=padding, window=window))
    torch.testing.assert_close(got, expected, rtol=0, atol=attention_bound(q, k, v))  # bounded


@pytest.mark.parametrize("function", THREE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_stay_within_the_bound_of_float64(function, dtype):
    q, k, v = tensors(2, 2, 3, 5, 33, 16, dtype=dtype)
    got = function(q, k, v, *how(q, k, padding=[0, 4]))
    assert got.dtype == dtype
    expected = attention(q.double(), k.double(), v.double(), *how(q, k, padding=[0, 4]))
    # Bounded: scores and weights are rounded to the dtype, so its eps governs the sums too.
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=attention_bound(q, k, v, sums=dtype))


@pytest.mark.parametrize("function", THREE)
@settings(max_examples=15, deadline=None)
@given(cuts=st.sets(st.integers(1, 20), max_size=6), window=st.none() | st.integers(1, 25))
def test_a_sequence_in_chunks_gives_the_rows_of_one_pass(function, cuts, window):
    q, k, v = tensors(2, 2, 2, 21, 21, 8)
    padding = torch.tensor([0, 3])
    whole = function(q, k, v, *how(q, k, padding=padding, window=window))
    edges = [0, *sorted(cuts), 21]
    for start, end in pairwise(edges):
        some = q[:, :, start:end]
        part = function(some, k[:, :, :end], v[:, :, :end], *how(some, end, padding=padding, window=window))
        torch.testing.assert_close(part, whole[:, :, start:end], rtol=0, atol=attention_bound(q, k, v))  # bounded


@pytest.mark.parametrize("function", THREE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("new_tokens", [1, 5])
def test_a_row_that_is_all_padding_gives_zeros(function, dtype, new_tokens):
    q, k, v = tensors(2, 2, 3, new_tokens, 5, 8, dtype=dtype)
    out = function(q, k, v, *how(q, k, padding=[5, 0]))
    assert torch.equal(out[0], torch.zeros_like(out[0]))  # exact
    assert out[1].isfinite().all()
    assert out[1].abs().min() > 0


def test_fused_attention_gives_zeros_also_where_the_devices_kernel_gives_nan(monkeypatch):
    def kernel(q, k, v, attn_mask=None, scale=None):
        scores = (q @ k.mT * k.shape[-1] ** -0.5).masked_fill(~attn_mask, float("-inf"))
        return scores.softmax(-1) @ v  # a row without keys is 0/0

    q, k, v = tensors(2, 2, 3, 2, 5, 8)
    padding = torch.tensor([5, 1])
    expected = attention(q, k, v, *how(q, k, padding=padding))
    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    got = fused_attention(q, k, v, *how(q, k, padding=padding))
    torch.testing.assert_close(got, expected, rtol=0, atol=attention_bound(q, k, v))  # bounded


@pytest.mark.parametrize("function", THREE)
def test_a_nan_that_a_query_may_see_is_not_hidden(function):
    q, k, v = tensors(1, 1, 2, 3, 3, 4)
    k[0, 0, 1] = float("nan")
    out = function(q, k, v, *how(q, k, padding=[0]))
    assert out[:, :, 1:].isnan().all()


def test_weights_sum_to_one_over_the_keys_a_query_may_see_and_are_zero_elsewhere():
    q, k, v = tensors(2, 2, 2, 6, 9, 8)
    padding = torch.tensor([0, 2])
    out, weights = attention(q, k, v, *how(q, k, padding=padding, window=4), return_weights=True)
    allowed = torch.tensor(
        [[[may_see(b, i, j, 6, 9, True, padding, 4) for j in range(9)] for i in range(6)] for b in range(2)]
    )
    assert torch.equal(weights > 0, allowed[:, None].expand_as(weights))  # exact
    ones = torch.ones(2, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(weights.sum(-1), ones, rtol=0, atol=9 * torch.finfo(torch.float64).eps)  # bounded
    blend = weights @ v.repeat_interleave(2, dim=1)
    torch.testing.assert_close(out, blend, rtol=0, atol=attention_bound(q, k, v))  # bounded


@pytest.mark.parametrize(("new_tokens", "kv_len", "window"), [(1, 1, None), (3, 3, None), (2, 5, None), (3, 6, 2)])
def test_causal_mask_is_offset_by_what_is_held(new_tokens, kv_len, window):
    expected = [
        [may_see(0, i, j, new_tokens, kv_len, True, None, window) for j in range(kv_len)] for i in range(new_tokens)
    ]
    assert causal_mask(new_tokens, kv_len, window=window).tolist() == expected


class LargestResult(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation made, views aside."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("function", THREE)
@pytest.mark.parametrize("new_tokens", [1, 3])
@pytest.mark.parametrize("padding", [None, torch.tensor([0, 7])])
def test_keys_and_values_are_never_expanded_to_the_query_heads(function, new_tokens, padding):
    q, k, v = (x.clone() for x in tensors(2, 2, 8, new_tokens, 50, 64, dtype=torch.float32))
    with LargestResult() as seen:
        function(q, k, v, *how(q, k, padding=padding))
    assert 0 < seen.largest <= k.numel()  # expanded they have 8 times as many entries


@pytest.mark.parametrize("function", THREE)
class TestErrors:
    def test_shapes_that_are_not_four_dimensional(self, function):
        q, k, v = tensors(1, 1, 1, 1, 2, 4)
        with pytest.raises(ValueError, match="attention takes q"):
            function(q[0], k, v)

    def test_keys_and_values_of_different_lengths(self, function):
        q, k, v = tensors(1, 1, 1, 1, 2, 4)
        with pytest.raises(ValueError, match="attention takes q"):
            function(q, k, v[:, :, 1:])

    def test_query_heads_that_the_kv_heads_do_not_divide(self, function):
        q, k, v = tensors(1, 2, 2, 1, 2, 4)
        with pytest.raises(ValueError, match="multiple of num_kv_heads"):
            function(q[:, :3], k, v)

    def test_another_head_dim(self, function):
        q, k, v = tensors(1, 2, 2, 1, 2, 4)
        with pytest.raises(ValueError, match="head_dim must agree"):
            function(q[..., :2], k, v)

    def test_more_queries_than_keys(self, function):
        q, k, v = tensors(1, 1, 1, 3, 3, 4)
        with pytest.raises(ValueError, match="3 queries but only 2 keys"):
            function(q, k[:, :, :2], v[:, :, :2])

    def test_a_visibility_of_another_call(self, function):
        q, k, v = tensors(2, 1, 1, 2, 3, 4)
        others = {
            "2 queries and 3 keys in 3 rows": Visibility.newest(2, 3, [0, 0, 1]),
            "1 queries and 3 keys": Visibility.newest(1, 3),
            "2 queries and 2 keys": Visibility.newest(2, 2),
        }
        for words, visible in others.items():
            with pytest.raises(ValueError, match=words):
                function(q, k, v, PLAIN, visible)


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"causal": False, "window": 2}, "needs causal=True"),
        ({"window": 0}, "at least 1; got 0"),
        ({"window": 1.5}, "a whole number; got 1.5"),
        ({"scale": math.nan}, "a finite number; got nan"),
        ({"soft_cap": 0.0}, "a finite number above 0; got 0.0"),
        ({"soft_cap": math.inf}, "a finite number above 0; got inf"),
    ],
)
def test_constants_that_cannot_be_are_refused_when_they_are_said(constants, message):
    with pytest.raises(ValueError, match=message):
        Constants(**constants)


@pytest.mark.parametrize("padding", [[0, -1], [0.5, 1]])
def test_padding_that_counts_nothing_is_refused(padding):
    with pytest.raises(ValueError, match="whole numbers, 0 or more"):
        Visibility.newest(2, 4, padding)


@st.composite
def rows_of_any_length(draw):
    """Padding and length of each row, and how many of its tokens are new."""
    new = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(new, 9), min_size=1, max_size=4))
    return new, lengths, [draw(st.integers(0, length)) for length in lengths]


def seen_by(visible, constants, like):
    """The mask of each row, where there is none all True."""
    mask = visible.mask(constants)
    return torch.ones_like(like) if mask is None else mask[:, 0].expand_as(like)


class TestVisibility:
    """Exact: which pairs may see each other is told one pair at a time."""

    @given(rows_of_any_length(), st.none() | st.integers(1, 12), st.data())
    def test_mask_bounds_and_parts_agree_with_the_rules_pair_by_pair(self, rows, window, data):
        new, lengths, padding = rows
        kv_len = max(lengths)
        visible = Visibility(
            new, kv_len, tuple(n - new - p for n, p in zip(lengths, padding, strict=True)), tuple(-p for p in padding)
        )
        expected = torch.tensor(
            [
                [[may_see(0, i, j, new, n, True, [p], window) for j in range(kv_len)] for i in range(new)]
                for n, p in zip(lengths, padding, strict=True)
            ]
        )
        constants = Constants(window=window)
        assert torch.equal(seen_by(visible, constants, expected), expected)
        start = data.draw(st.integers(0, kv_len - 1))
        stop = data.draw(st.integers(start + 1, kv_len))
        part = visible.of_keys(start, stop)
        assert torch.equal(seen_by(part, constants, expected[:, :, start:stop]), expected[:, :, start:stop])
        assert part.meets(constants) or not expected[:, :, start:stop].any()
        assert not expected[:, :, : visible.unseen(constants)].any()
        assert visible.keys_read(constants, len(lengths)) == expected.any(1).sum()
        if new == 1:
            first, end = visible.bounds(constants, len(lengths), "cpu")
            index = torch.arange(kv_len)
            between = (index >= first[:, None]) & (index < end[:, None])
            assert torch.equal(between, expected[:, 0])

    def test_keys_whose_positions_are_not_their_indices_are_seen_by_position(self):
        held = torch.tensor([[0, 1, 7, 8, 9], [0, 3, 4, 5, 9]])  # of ten tokens five are left
        visible = Visibility(1, 5, (9,), key_position=held)
        mask = visible.mask(Constants(window=3))
        assert mask[:, 0, 0].tolist() == [[False, False, True, True, True], [False, False, False, False, True]]
        with pytest.raises(ValueError, match="among keys in their order"):
            visible.keys_read(Constants(), 2)
        assert visible.mask(Constants())[:, 0, 0].all()

    @given(seed=st.integers(0, 2**32 - 1), window=st.none() | st.integers(1, 9), new=st.integers(1, 3))
    @settings(max_examples=30, deadline=None)
    def test_each_kv_head_may_hold_keys_of_its_own_and_padding(self, seed, window, new):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = tensors(2, 3, 2, new, 7, 4, seed)
        positions = torch.stack([torch.randperm(14, generator=generator)[:7] - 2 for _ in range(6)]).view(2, 3, 7)
        first = tuple(torch.randint(0, 12, (2,), generator=generator).tolist())
        visible = Visibility(new, 7, first, key_position=positions)
        bound = attention_bound(q, k, v)
        for function in THREE:
            out = function(q, k, v, Constants(window=window), visible)
            for row in range(2):
                for head in range(6):
                    for i in range(new):
                        at = positions[row, head // 2]
                        seen = (at >= 0) & (at <= first[row] + i)
                        if window is not None:
                            seen &= at > first[row] + i - window
                        keys, values = k[row, head // 2][seen], v[row, head // 2][seen]
                        weights = torch.softmax(keys @ q[row, head, i] / 2, dim=0)
                        torch.testing.assert_close(out[row, head, i], weights @ values, rtol=0, atol=bound)  # bounded

    def test_the_two_halves_are_the_whole(self):
        q, k, v = tensors(2, 2, 3, 4, 9, 8, dtype=torch.float32)
        out, weights = attention(q, k, v, return_weights=True)
        halves = attention_weights(q, k)
        assert torch.equal(weights, halves)  # exact
        assert torch.equal(out, blended(halves, v))
        assert attention_weights(q.bfloat16(), k.bfloat16()).dtype == torch.float32


def test_a_block_of_no_tokens_is_an_error():
    with pytest.raises(ValueError, match="block_size is a number of tokens"):
        online_attention(*tensors(1, 1, 1, 2, 2, 4), block_size=0)


@pytest.mark.parametrize("batch", [1, 3])
def test_kv_heads_as_a_batch_give_what_grouped_attention_gives(batch):
    torch.manual_seed(0)
    q, buffer = torch.randn(batch, 6, 9, 16), torch.randn(2, batch, 2, 20, 16)
    k, v = buffer[:, :, :, :9]  # the part in use of a larger buffer
    for scale in (None, 0.3):
        expected = attention(q.double(), k.double(), v.double(), Constants(scale=scale))
        bound = attention_bound(q, k, v, scale=scale)
        torch.testing.assert_close(causal_by_kv_head(q, k, v, scale).double(), expected, rtol=0, atol=bound)
