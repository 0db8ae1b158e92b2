"""The work ledger counts what arithmetic says, however the code is written. All comparisons are exact."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.cache import Cache
from labkit.ledger import ledger
from labkit.llama import Llama
from labkit.models import random
from tests.shapes import TINY as SPEC

KV_BYTES = 2 * SPEC.num_kv_heads * SPEC.head_dim * 4  # K and V of one token in one layer, float32


@pytest.fixture(scope="module")
def model() -> Llama:
    return random(SPEC)


def written_out(q, k, v):
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
    return torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1) @ v


def with_einsum(q, k, v):
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return torch.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdim=True), v)


def in_place(q, k, v):
    scores = torch.matmul(q, k.mT)
    scores.mul_(0.125)
    return torch.matmul(scores.softmax(-1), v)


def with_baddbmm(q, k, v):
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    scores = torch.baddbmm(torch.zeros(()), flat[0], flat[1].mT, beta=0)
    return torch.bmm(scores.softmax(-1), flat[2]).view_as(q)


def head_by_head(q, k, v):
    scores = torch.stack([q[:, head] @ k[:, head].mT for head in range(q.shape[1])], dim=1)
    return torch.softmax(scores, dim=-1).matmul(other=v)


def key_by_key(q, k, v):
    scores = torch.cat([q @ k[:, :, i : i + 1].mT for i in range(k.shape[2])], dim=-1)
    return torch.matmul(scores.softmax(-1), v)


def row_by_row(q, k, v):
    return torch.cat([torch.softmax(q[:, :, i : i + 1] @ k.mT, -1) @ v for i in range(q.shape[2])], dim=2)


WAYS = [written_out, with_einsum, in_place, with_baddbmm, head_by_head, key_by_key, F.scaled_dot_product_attention]


@pytest.mark.parametrize("attend", WAYS)
@pytest.mark.parametrize(("new", "total"), [(1, 1), (1, 9), (5, 5), (3, 11)])
def test_attention_counts_the_same_however_it_is_written(attend, new: int, total: int) -> None:
    q, k, v = torch.randn(2, 3, new, 8), torch.randn(2, 3, total, 8), torch.randn(2, 3, total, 8)
    with ledger() as work:
        attend(q, k, v)
    assert work.scores == 2 * 3 * new * total
    assert work.bytes_read == k.nbytes + v.nbytes
    assert work.kv_projections == 0


def test_rows_one_at_a_time_read_the_keys_again_for_each_row() -> None:
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    with ledger() as work:
        row_by_row(q, k, v)
    assert work.scores == 2 * 6 * 6
    assert work.bytes_read == 6 * (k.nbytes + v.nbytes)


def test_scores_made_by_hand_are_counted_when_they_meet_softmax() -> None:
    q, k, v = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    with ledger() as work:
        torch.softmax((q * k).sum(-1)[:, :, None], dim=-1) @ v
    assert work.scores == 2 * 6


def test_the_softmax_that_draws_a_token_is_no_attention() -> None:
    with ledger() as work:
        torch.softmax(torch.randn(2, 100), dim=-1)
    assert work.scores == 0


def test_weights_from_the_right_read_the_left_operand() -> None:
    q, k, v = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5, 8)
    with ledger() as work:
        weights = torch.softmax(q @ k.T, dim=-1)
        before = work.bytes_read
        v.T @ weights.T
    assert work.bytes_read - before == v.nbytes


def test_broadcast_keys_are_read_once() -> None:
    q, k = torch.randn(1, 6, 4, 8), torch.randn(1, 1, 4, 8)
    with ledger() as work:
        torch.matmul(q, k.expand(1, 6, 4, 8).transpose(-2, -1))
    assert work.bytes_read == k.nbytes


def test_expanding_keys_to_the_query_heads_shows_as_bytes_copied() -> None:
    k = torch.randn(1, 2, 5, 8)
    with ledger() as work:
        k.repeat_interleave(3, dim=1)
    assert work.bytes_copied == 3 * k.nbytes


@pytest.mark.parametrize(
    "project",
    [
        lambda x, w: F.linear(x, w),
        lambda x, w: x @ w.T,
        lambda x, w: torch.matmul(x, w.mT),
        lambda x, w: torch.einsum("ti,oi->to", x, w),
        lambda x, w: F.linear(x, weight=w),
        lambda x, w: torch.addmm(torch.zeros(8), x, w.T),
        lambda x, w: w @ x.T,
        lambda x, w: torch.stack([torch.mv(w, row) for row in x]),
    ],
)
def test_a_projection_is_seen_however_it_is_written(project) -> None:
    x, w = torch.randn(7, 16), torch.randn(8, 16)
    with ledger([(w, 0.5)]) as work:
        project(x, w)
    assert work.kv_projections == 3.5
    assert work.scores == work.bytes_read == 0


@given(chunks=st.lists(st.integers(1, 6), min_size=1, max_size=5))
@settings(max_examples=20, deadline=None)
def test_with_a_cache_each_token_is_projected_once_per_layer_in_any_chunks(chunks: list[int]) -> None:
    model, cache, total = random(SPEC), Cache.preallocated(2, 32), sum(chunks)
    tokens = torch.arange(total)[None, :]
    with ledger(model) as work:
        start = 0
        for size in chunks:
            model(tokens[:, start : start + size], cache)
            start += size
    ends = torch.tensor(chunks).cumsum(0).tolist()
    assert work.kv_projections == SPEC.num_layers * total
    assert work.scores == SPEC.num_layers * SPEC.num_heads * sum(n * end for n, end in zip(chunks, ends, strict=True))
    assert work.bytes_read == SPEC.num_layers * KV_BYTES * sum(ends)


def test_without_a_cache_the_projections_add_up_to_n_times_n_plus_1_over_2(model: Llama) -> None:
    tokens = torch.arange(12)[None, :]
    with ledger(model) as work:
        for end in range(1, 13):
            model(tokens[:, :end])
    assert work.kv_projections == SPEC.num_layers * 12 * 13 // 2


def test_growing_copies_everything_at_each_step_and_preallocated_only_the_new_token(model: Llama) -> None:
    copied = {}
    for name, cache in {"growing": Cache.growing(2), "preallocated": Cache.preallocated(2, 16)}.items():
        k = torch.randn(1, SPEC.num_kv_heads, 1, SPEC.head_dim)
        with ledger(model) as work:
            for _ in range(10):
                cache.layers[0].append(k, k)
        copied[name] = work.bytes_copied
    assert copied["growing"] == KV_BYTES * sum(range(1, 11))  # the new token and all before it, at every step
    assert copied["preallocated"] == KV_BYTES * 10


def test_moving_is_counted_and_viewing_is_not() -> None:
    x = torch.zeros(4, 4)
    with ledger() as work:
        _ = x.view(16), x[1:3], x.t(), x.reshape(16), x.contiguous(), x.expand(2, 4, 4), x.to(torch.float32)
    assert (work.bytes_copied, work.allocations) == (0, 0)
    with ledger() as work:
        x.t().reshape(16)
        x.to(torch.bfloat16)
        x[1:2] = torch.ones(1, 4)
        x[0].copy_(torch.ones(4))
    assert work.bytes_copied == 64 + 32 + 16 + 16


@pytest.mark.parametrize(
    "write",
    [
        lambda held, new: held.index_copy_(1, torch.tensor([2, 3]), new),
        lambda held, new: held.index_copy_(dim=1, index=torch.tensor([2, 3]), source=new),
        lambda held, new: held[:, 2:4].copy_(new),
        lambda held, new: held.__setitem__((slice(None), slice(2, 4)), new),
        lambda held, new: held.narrow(1, 2, 2).copy_(new),
        lambda held, new: held.scatter_(1, torch.tensor([[[2] * 5, [3] * 5]] * 3), new),
    ],
)
def test_a_write_in_place_counts_what_is_written(write) -> None:
    held, new = torch.zeros(3, 6, 5), torch.ones(3, 2, 5)
    with ledger() as work:
        write(held, new)
    assert work.bytes_copied == new.nbytes


def test_joining_into_memory_that_is_there_counts_all_that_is_written() -> None:
    a, b, out = torch.ones(2, 4), torch.ones(1, 4), torch.empty(3, 4)
    with ledger() as work:
        torch.cat((a, b), out=out)
    assert work.bytes_copied == out.nbytes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_counts_what_a_cpu_counts() -> None:
    counts, copied = [], []
    for device in ("cpu", "cuda"):
        model = random(SPEC, device=device)
        with ledger(model) as work:
            model(torch.arange(9, device=device)[None, :], model.cache(16))
        counts.append((work.kv_projections, work.scores, work.bytes_read))
        copied.append(work.bytes_copied)
    assert counts[0] == counts[1]
    # Some fused kernels lay their output out so that joining its heads copies nothing.
    assert abs(copied[0] - copied[1]) in (0, SPEC.num_layers * 9 * SPEC.num_heads * SPEC.head_dim * 4)


def test_a_hugging_face_model_counts_like_ours() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    with torch.no_grad(), ledger(theirs) as work:
        theirs(torch.arange(10)[None, :])
    assert work.kv_projections == 2 * 10
    assert work.scores == 2 * SPEC.num_heads * 10 * 10


def test_a_model_without_k_and_v_projections_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match="give \\(weight, share\\) pairs"), ledger(torch.nn.Linear(2, 2)):
        pass


def test_a_ledger_leaves_results_as_they_are(model: Llama) -> None:
    tokens = torch.arange(9)[None, :]
    plain = model(tokens)
    with ledger(model):
        counted = model(tokens)
    assert torch.equal(plain, counted)
