"""07.3: the attention that each token gets, a block of queries at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from labkit.course.checks.attention import Turn, attend
from labkit.course.checks.attention import suspects as attention_suspects
from labkit.course.checks.suspects import Suspect
from labkit.course.checks.trials import Case, Judge, compare
from labkit.labs.lab07.references import attention_received
from labkit.labs.lab07.weighing import (
    Scores,
    check_far_down,
    check_large,
    check_rows,
    exact_weights,
    far_down,
    large,
    of_kv_heads,
    pair,
    wide,
)

RIGHT = Turn()


def right(q: Tensor, k: Tensor, block: int) -> Tensor:
    """The reference; of float64, computed in float64 throughout and rounded once."""
    if not wide(q.dtype):
        return attention_received(q, k, block)
    return of_kv_heads(exact_weights(q, k).sum(2), k.shape[1]).float()


def by_blocks(q: Tensor, k: Tensor, block: int, see: Callable[[int, int, int, int], Tensor]) -> list[Tensor]:
    """Summed weights of each block, [batch, num_heads, kv_len], masked by see(start, rows, new_tokens, kv_len)."""
    new, kv_len, parts = q.shape[2], k.shape[2], []
    for start in range(0, new, block):
        some = q[:, :, start : start + block]
        mask = see(start, some.shape[2], new, kv_len)
        parts.append(attend(some, k, None, Turn(see=lambda *_, mask=mask: mask)).sum(2))
    return parts


def along_queries(q: Tensor, k: Tensor, block: int) -> list[Tensor]:
    """Summed weights of each block where softmax runs along its queries; columns that nobody sees are even or 0."""
    new, kv_len, parts = q.shape[2], k.shape[2], []
    for start in range(0, new, block):
        some = q[:, :, start : start + block]
        mask = seen(start, some.shape[2], new, kv_len)
        parts.append(attend(some, k, None, Turn(see=lambda *_, mask=mask: mask, axis=-2)).nan_to_num(0.0).sum(2))
    return parts


def tril(rows: int, kv_len: int, shift: int) -> Tensor:
    """A triangle."""
    return torch.ones(rows, kv_len, dtype=torch.bool).tril(shift)


def seen(start: int, rows: int, new: int, kv_len: int) -> Tensor:
    """The right mask of a block."""
    return tril(rows, kv_len, kv_len - new + start)


def suspects(q: Tensor, k: Tensor, block: int) -> list[Suspect]:
    """What goes wrong between weights and scores, and between blocks; then in any attention."""
    num_heads, num_kv_heads, new, kv_len = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    group, whole = num_heads // num_kv_heads, new // block * block

    def weights(turn: Turn = RIGHT) -> Tensor:
        return attend(q, k, None, turn)

    def each(by_head: Tensor) -> Tensor:
        return of_kv_heads(by_head, num_kv_heads)

    def masked(see: Callable[[int, int, int, int], Tensor]) -> Tensor:
        return each(torch.stack(by_blocks(q, k, block, see)).sum(0))

    def only(place: int) -> Tensor:
        return each(by_blocks(q, k, block, seen)[place])

    def own_block(start: int, rows: int, new: int, kv_len: int) -> Tensor:
        mask = seen(start, rows, new, kv_len)
        mask[:, : kv_len - new + start] = False
        return mask

    apart = Turn(heads=lambda h, kv: torch.arange(h) % kv)
    start_in_mask = "the mask of a block: its row i stands at position kv_len - new_tokens + start + i"
    heads = "the heads: sums are [batch, num_heads, kv_len]; neighbours share a KV head, and their mean is taken"
    queries = "what is done over the queries: a sum, in each block and over the blocks"
    loop = "the loop: every query is in one block, and every block is added"
    listed = [
        Suspect("block-masked-as-first", [lambda: masked(lambda s, r, n, kv: tril(r, kv, kv - n))],
                "every block was masked as if it were the first", start_in_mask,
                "later queries do not see the tokens that came since the first block"),
        Suspect("block-masked-as-last", [lambda: masked(lambda s, r, n, kv: tril(r, kv, kv - r)),
                                         lambda: masked(lambda s, r, n, kv: tril(r, kv, kv - block))],
                "every block was taken for the newest queries: earlier ones see keys that come after them",
                start_in_mask),
        Suspect("block-alone", [lambda: masked(lambda s, r, n, kv: tril(r, kv, 0))],
                "the mask counts rows within the block only: neither what is held nor what came in earlier blocks is "
                "seen", start_in_mask),
        Suspect("held-hidden", [lambda: masked(lambda s, r, n, kv: tril(r, kv, s))],
                "the mask begins at position 0, as if nothing were held before the first query", start_in_mask),
        Suspect("own-block-only", [lambda: masked(own_block)],
                "queries see the keys of their own block only", "which keys meet a block: all up to its own"),
        Suspect("axis", [lambda: each(torch.stack(along_queries(q, k, block)).sum(0))],
                "softmax ran along a block's queries", "dim= of softmax: the keys are the last dimension"),
        Suspect("sum-over-heads", [lambda: each(weights().sum(2)) * group],
                "the query heads of a KV head were summed; their mean is asked for", heads,
                "every score is as many times too large as query heads share a KV head"),
        Suspect("divided-by-keys", [lambda: each(weights().sum(2)) / kv_len],
                "the sums were divided by the number of keys", queries),
        Suspect("mean-over-queries", [lambda: each(weights().mean(2)),
                                      lambda: each(weights().sum(2)) / block,
                                      lambda: each(torch.stack([part / min(block, new - i * block) for i, part in
                                                                enumerate(by_blocks(q, k, block, seen))]).sum(0)),
                                      lambda: each(torch.stack(by_blocks(q, k, block, seen)).mean(0))],
                "the sums were divided by a number of queries, as a mean does, over all or in each block", queries),
        Suspect("max-over-queries", [lambda: each(weights().amax(2)),
                                     lambda: each(weights()).amax(2)],
                "the greatest weight was taken, not the sum", queries),
        Suspect("max-over-heads", [lambda: weights().sum(2).unflatten(1, (num_kv_heads, group)).amax(2)],
                "of the query heads that share a KV head the greatest was taken, not the mean", heads),
        Suspect("first-head-of-group", [lambda: weights().sum(2)[:, ::group],
                                        lambda: weights().sum(2)[:, :num_kv_heads]],
                "one query head stands for all that share a KV head", heads),
        Suspect("mean-of-all-heads", [lambda: weights().sum(2).mean(1, keepdim=True).expand(-1, num_kv_heads, -1)],
                "the mean was taken over all query heads of the layer", heads),
        Suspect("heads-apart", [lambda: weights().sum(2).unflatten(1, (group, num_kv_heads)).mean(1),
                                lambda: weights(apart).sum(2).unflatten(1, (group, num_kv_heads)).mean(1),
                                lambda: each(weights(apart).sum(2))],
                "query heads were put together in strides, h % num_kv_heads, as repeat or tile do; h // "
                "num_queries_per_kv is the KV head of query head h", heads),
        Suspect("last-block-dropped", [lambda: each(weights()[:, :, :whole].sum(2))],
                "queries that do not fill a block were left out", loop),
        Suspect("one-block-only", [lambda: only(-1), lambda: only(0)],
                "the scores are one block's: they were overwritten, or returned inside the loop", loop),
        Suspect("newest-query-only", [lambda: each(weights()[:, :, -1])],
                "only the newest query's weights were taken", queries),
        Suspect("first-query-twice", [lambda: each(weights().sum(2) + weights()[:, :, 0])],
                "the first query was counted twice", loop),
        Suspect("per-visible-query", [lambda: each(weights().sum(2)) / weights().gt(0).sum(2)[:, :num_kv_heads]],
                "each sum was divided by how many queries see the key", "the docstring: summed over queries"),
        Suspect("in-few-bits", [lambda dtype=dtype: attention_received(q.to(dtype), k.to(dtype), block)
                                for dtype in (torch.bfloat16, torch.float16)],
                "q and k were turned into a dtype of fewer bits", "every dtype that is written down"),
        Suspect("itself-left-out", [lambda: each((weights() * ~torch.eye(kv_len, dtype=torch.bool)[-new:]).sum(2))],
                "the weight that a token gives to itself was left out", queries),
    ]  # fmt: skip
    general = [
        Suspect(one.diagnosis, [partial(summed, give, num_kv_heads, kv_len) for give in one.variants], one.cause,
                one.look, one.seen)
        for one in attention_suspects(q, k)
    ]  # fmt: skip
    return listed + general


def summed(give: Callable[[], Tensor], num_kv_heads: int, kv_len: int) -> Tensor | None:
    """What a suspect's weights come to."""
    weights = give()
    return of_kv_heads(weights.sum(2), num_kv_heads) if weights.shape[-1] == kv_len else None


class AttentionReceived(Scores):
    """Attention that each token gets."""

    id, title, minutes, difficulty = "07.3", "What each token gets", 9, 3
    reference = staticmethod(attention_received)
    why = (
        "A sum over queries can be taken block by block, so that weights of `block` queries are all that ever exists. "
        "Each block's rows stand behind all before them: that is the `start` in the mask."
    )
    hints = (
        "For one block of queries: their scores with all keys, a mask, softmax. What is left of it when the next block "
        "comes?",
        "Row i of the block that begins at `start` stands at position kv_len - new_tokens + start + i. Add "
        "weights.sum over the block's queries to a float32 tensor; the mean over a KV head's query heads comes last.",
        "for start in range(0, new_tokens, block):\n"
        "    some = q[:, :, start : start + block].unflatten(1, (num_kv_heads, -1))\n"
        "    scores = (some @ k[:, :, None].mT).float() * head_dim**-0.5\n"
        "    # mask: tril(kv_len - new_tokens + start); softmax; add the sum over dim 3, its mean over dim 2",
    )
    hints_for: ClassVar = {
        "block-masked-as-first": "The second block's first query: at which position does it stand?",
        "no-mask": "The first of several new tokens: may it give weight to the last?",
        "mean-over-queries": "A key that ten queries read should get ten times as much as one that one query reads.",
        "sum-over-heads": "Three query heads share the key. The docstring says what is taken of the three.",
        "heads-apart": "With 6 query heads and 2 KV heads, heads 0, 1, 2 read KV head 0.",
        "all-at-once": "Of 1,000 queries over 1,000 keys, how many weights exist at a time in your code?",
        "last-block-dropped": "7 queries in blocks of 3: range(0, 7, 3) gives three starts.",
        "one-block-only": "What stood in your result before the second block?",
        "dtype": "bfloat16 adds 0.4 to 128 and gets 128. Which dtype should sums have?",
    }

    def examine(self, answer: Callable) -> None:
        """Blocks that fit and that do not, one query, tokens held before; large scores; few bits; then the work."""
        what = "the scores"
        cases = [
            Case((*pair(6, 3, 20, 0, 2, 8), 7)),
            Case((*pair(10, 2, 4, 7, 3, 8), 3)),
            Case((*pair(6, 2, 1, 12, 1, 16), 4), "one query"),
            Case((*pair(12, 4, 5, 0, 2, 20), 9), "fewer queries than a block"),
            Case((*pair(7, 1, 6, 9, 4, 24), 2)),
            Case((*pair(4, 4, 8, 6, 2, 12), 4)),
            Case((*pair(2, 1, 3, 1, 1, 32), 1), "blocks of one query"),
            Case((*pair(4, 2, 3, 600, 1, 8), 2)),
        ]
        compare(type(self), answer, right, cases, suspects=suspects, what=what,
                dtypes=(torch.bfloat16, torch.float16))  # fmt: skip
        check_large(type(self), answer, right, (*large(*pair(6, 2, 9, 5, 2, 8)), 4))
        far = Case((*far_down(6, 2, 3, 4), 2), "all scores near -100,000")
        check_far_down(type(self), answer, right, suspects, cases, far)
        judge = Judge(type(self), answer, right, lambda *_: (), what, False, cases)
        judge.call(Case(sink(260), "a first token that all queries read"), "precision")
        self.check_work(answer)

    def check_work(self, answer: Callable) -> None:
        """Of 127 queries, a prime, in blocks of 5: how many rows of weights exist at a time."""
        num_heads, new, block = 4, 127, 5
        q, k = pair(num_heads, 2, new, 30, 1, 8)
        run = partial(answer, q, k, block)
        rows = check_rows(type(self), run, k.shape[2], num_heads * block, num_heads * new)
        seen = (
            f"{new} queries of {num_heads} heads, {k.shape[2]} keys, block {block}: the scores are right, and {rows} "
        )
        seen += f"rows of weights existed at a time, of which a block has {num_heads * block}"
        look = "the slice of q that meets the keys: q[:, :, start : start + block]"
        if rows >= new and rows % new == 0:
            self.fail("all-at-once", seen=seen, cause="weights of all queries are made before they are summed: for a "
                      "text of 8,000 tokens that is 64 million numbers for each head", look=look)  # fmt: skip
        if rows > num_heads * block:
            self.fail("more-than-a-block", seen=seen, cause="more queries are taken at a time than `block` says",
                      look=look)  # fmt: skip


def sink(queries: int) -> tuple[Any, ...]:
    """bfloat16, blocks of one query; each gives the first token nearly half of its attention, so that the sum is some
    hundred: bfloat16 could not add up to it."""
    q, k = pair(2, 1, queries, 0, 1, 8)
    q = 0.5 * q + 1.0
    k = 0.4 * k
    k[:, :, 0] = 1.9
    return q.bfloat16(), k.bfloat16(), 1
