"""04.1: attention of grouped heads, without expanding K and V."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from labkit.attention import Constants
from labkit.attention import online_attention as attention
from labkit.course.checks.suspects import Suspect, accuse
from labkit.course.checks.tensors import TIGHT, agree, bytes_made, heads
from labkit.course.exercise import Exercise
from labkit.labs.lab04.references import grouped_attention
from labkit.ledger import Work, ledger


class GroupedAttention(Exercise):
    """One function for MHA, GQA and MQA."""

    id, title, minutes, difficulty = "04.1", "Grouped attention without expanding", 7, 3
    reference = staticmethod(grouped_attention)
    hints = (
        "All query heads of a group meet the same keys. To a matrix product, is a second query head anything other "
        "than more query rows?",
        "q.reshape(batch, num_kv_heads, num_queries_per_kv * new_tokens, head_dim) stacks a group's queries as rows: "
        "one product with k. Bring the scores back to [batch, num_heads, new_tokens, kv_len] for the mask.",
        "rows = q.reshape(batch, num_kv_heads, -1, head_dim)\nscores = (rows @ k.mT) * head_dim**-0.5\n"
        "scores = scores.view(batch, num_heads, new_tokens, kv_len)\n# mask: tril(kv_len - new_tokens); softmax\n"
        "out = weights.view(batch, num_kv_heads, -1, kv_len) @ v\nreturn out.view(q.shape)",
    )
    hints_for: ClassVar = {
        "expanded": "Which of the two should change its shape, the small one (q) or the large one (k)?",
        "broadcast-copies": "matmul makes the batch dimensions of both sides equal before it multiplies. Give it sides "
        "whose batch dimensions are equal already: [batch, num_kv_heads].",
        "head-mapping": "With 6 query heads and 2 KV heads, heads 0, 1, 2 read KV head 0. Which function of h is that?",
        "mask-over-stacked-rows": "After stacking, row 0 of the second head follows the last row of the first. Undo "
        "the stacking before you mask, or repeat the mask's rows.",
        "reads-again": "Loop over KV heads, or better over nothing: one product per group serves all its queries.",
    }

    def examine(self, answer: Callable) -> None:
        """Values for MHA, GQA and MQA, prefill, chunk and decode; then what was copied and read."""
        for num_heads, num_kv_heads, new, held in (
            (6, 2, 1, 9),
            (6, 2, 3, 6),
            (12, 4, 5, 0),
            (5, 1, 2, 7),
            (4, 4, 3, 4),
        ):
            q, k, v = heads(num_heads, num_kv_heads, new, held)
            got = self.call(answer, q, k, v)
            want = attention(q, k, v)
            if isinstance(got, Tensor) and got.shape == want.shape and got.isnan().any():
                self.explain(got.nan_to_num(0.0), q, k, v)
            self.like(got, want, what="the output")
            if not agree(got, want):
                self.explain(got, q, k, v)
        self.check_layout(answer)
        self.check_work(answer)
        half = [x.to(torch.bfloat16) for x in heads(6, 2, 2, 5)]
        self.like(self.call(answer, *half), half[0], what="the output of bfloat16 tensors")

    def check_layout(self, answer: Callable) -> None:
        """q as a projection gives it, with its heads behind its tokens in memory, and K and V cut from a buffer."""
        q, k, v = heads(6, 2, 3, 6)
        got = self.call(answer, q.transpose(1, 2).contiguous().transpose(1, 2), k[:, :, :8], v[:, :, :8])
        self.same(got, attention(q, k[:, :, :8], v[:, :, :8]), what="the output for q as the model gives it",
                  tolerance=TIGHT)  # fmt: skip

    def explain(self, got: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Name the attention that gives what was seen."""
        num_heads, num_kv_heads, new, kv_len = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
        group, held = num_heads // num_kv_heads, kv_len - new
        where = f"{num_heads} query heads, {num_kv_heads} KV heads, {new} new tokens after {held} cached"
        k_all, v_all = k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1)
        accuse(type(self), [
            Suspect("head-mapping", [(q, k_all, v_all)],
                    "query head h was sent to KV head h % num_kv_heads, as k.repeat or a reshape to "
                    "[num_queries_per_kv, num_kv_heads] does",
                    "the rule in the docstring: neighbours share, h // num_queries_per_kv",
                    f"{where}: query head 1 reads KV head {1 % num_kv_heads}; it should read KV head {1 // group}"),
        ], fits=lambda operands: agree(got, attention(*operands)))  # fmt: skip
        self.explain_mask(got, q, k, v, where)
        line = "the line that makes the scores: head_dim ** -0.5"
        mixed = q.transpose(1, 2).reshape(q.shape)
        accuse(type(self), [
            Suspect("unscaled", [(q, 1.0)], "the scores were not divided by sqrt(head_dim)", line,
                    f"{where}: the weights are too sharp"),
            Suspect("scaled-twice", [(q, q.shape[-1] ** -1.0)],
                    "the scores were divided by head_dim, not by its square root", line,
                    f"{where}: the weights are too flat"),
            Suspect("tokens-and-heads-mixed", [(mixed, None)] if new > 1 else [],
                    "the reshape ran over heads and tokens in another order than they lie in",
                    "the dimensions of q, in order: [batch, num_heads, new_tokens, head_dim]; split num_heads alone",
                    f"{where}: right for one new token, wrong for several"),
        ], fits=lambda query: agree(got, attention(query[0], k, v, Constants(scale=query[1]))))  # fmt: skip
        self.fail(
            "values",
            seen=f"{where}: the output fits no attention that this check knows",
            cause="rows were brought back in another order than they were stacked, or a step is missing",
            look="one batch row, two query heads and one KV head, by hand",
        )

    def explain_mask(self, got: Tensor, q: Tensor, k: Tensor, v: Tensor, where: str) -> None:
        """Name the mask that gives what was seen."""
        num_heads, new, kv_len = q.shape[1], q.shape[2], k.shape[2]
        held, group = kv_len - new, num_heads // k.shape[1]
        every = torch.ones(new, kv_len, dtype=torch.bool)
        stacked = torch.ones(group * new, kv_len, dtype=torch.bool)
        offset = "the diagonal of the triangle: kv_len - new_tokens columns are past for every new token"
        shape = "the shape of the scores where they are masked: [batch, num_heads, new_tokens, kv_len]"

        def over_rows(shift: int) -> Tensor:
            return stacked.tril(shift).view(group, new, kv_len).repeat(k.shape[1], 1, 1)

        accuse(type(self), [
            Suspect("sees-the-future", every, "no mask: new tokens see the ones behind them", "the mask: tril"),
            Suspect("mask-offset", every.tril(),
                    "row i of the mask was taken for position i, as if nothing were cached", offset),
            Suspect("mask-over-stacked-rows", over_rows(held),
                    "the triangle ran over all stacked rows, so that the second head of a group sees more than the "
                    "first", shape),
            Suspect("mask-offset-too-large", every.tril(held + 1), "every token sees one token too many", offset),
            Suspect("mask-over-stacked-rows", over_rows(0), "the triangle ran over all stacked rows, without the "
                    "offset of what is cached; every query head needs the same mask", shape),
            Suspect("mask-over-stacked-rows", over_rows(kv_len - group * new), "the triangle ran over all stacked "
                    "rows, offset by all of them; every query head needs the same mask", shape),
        ], f"{where}: the heads are right, the mask is not",
           fits=lambda mask: agree(got, masked(q, k, v, mask)))  # fmt: skip

    def check_work(self, answer: Callable) -> None:
        """One decode step of 6 query heads on 2 KV heads: K and V neither made anew nor read more than once."""
        q, k, v = heads(6, 2, 1, 149, head_dim=64)
        with ledger() as work:
            self.call(answer, q, k, v)
        made = bytes_made(lambda: answer(q, k, v))
        if made >= k.nbytes:
            self.explain_copies(work, made / k.nbytes, k)
        if work.bytes_read > k.nbytes + v.nbytes:
            times = work.bytes_read / (k.nbytes + v.nbytes)
            self.fail(
                "reads-again",
                seen=f"nothing is copied, but K and V are read {times:.0f} times over",
                cause="a product per query head: each reads the keys of its group once more",
                look="one product per KV head, with all query heads of its group as rows",
            )

    def explain_copies(self, work: Work, times: float, k: Tensor) -> None:
        """Where tensors as large as K came from."""
        if work.bytes_copied >= k.nbytes:
            self.fail(
                "expanded",
                seen=f"the values are right, and {work.bytes_copied / k.nbytes:.0f} times the bytes of K were copied",
                cause="K or V was repeated to all query heads: by repeat_interleave, an index, stack, or an expand "
                "that a reshape then has to write out",
                look="what is done to k and v: nothing need be. Reshape q",
            )
        self.fail(
            "broadcast-copies",
            seen=f"no line of yours copies, yet tensors of {times:.1f} times the bytes of K were made",
            cause="k and v met q with another number of batch dimensions: matmul broadcasts them to "
            "[batch, num_kv_heads, num_queries_per_kv] and writes that out; * writes out every product",
            look="both sides of the product: 4 dimensions each, with [batch, num_kv_heads] in front",
        )


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention with this mask, `[new, kv_len]` or `[num_heads, new, kv_len]`; rows that see nothing give zeros."""
    times = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)
    scores: Any = (q @ keys.mT) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0.0) @ values
