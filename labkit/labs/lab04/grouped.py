"""04.1: attention of grouped heads, without expanding K and V."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from labkit.course.checks import attention
from labkit.course.checks.attention import Turn, attend
from labkit.course.checks.copies import check_step, steps
from labkit.course.checks.suspects import Suspect
from labkit.course.checks.tensors import heads
from labkit.course.checks.trials import Case, compare
from labkit.course.exercise import Exercise
from labkit.labs.lab04.references import grouped_attention


class GroupedAttention(Exercise):
    """One function for MHA, GQA and MQA."""

    id, title, minutes, difficulty = "04.1", "Grouped attention without expanding", 7, 3
    reference = staticmethod(grouped_attention)
    why = (
        "Query heads that share K and V are only more rows of the same product: reshaping q, the small tensor, does "
        "what repeating k, the large one, would. The mask needs the heads apart again, since stacked rows count "
        "differently."
    )
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
        "copied-whole": "k may lie in memory as a slice of something larger. Which of your lines asks that it lie in "
        "one piece?",
        "enable-gqa": "Take enable_gqa out. What shape must q have for its number of heads to be that of k?",
        "head-mapping": "With 6 query heads and 2 KV heads, heads 0, 1, 2 read KV head 0. Which function of h is that?",
        "mask-over-stacked-rows": "After stacking, row 0 of the second head follows the last row of the first. Undo "
        "the stacking before you mask, or repeat the whole mask, once for each head of the group.",
        "made-anew": "The scale may meet q, or the scores, before it meets k. Which of the three is large?",
        "mask-inverted": "masked_fill writes where its mask is True. Which keys should get -inf?",
        "mask-offset": "With 7 tokens held, how many keys does the first new token see?",
        "reads-again": "Loop over KV heads, or better over nothing: one product per group serves all its queries.",
        "layout": "view needs memory in one piece; reshape takes what comes.",
    }

    def examine(self, answer: Callable) -> None:
        """Values for MHA, GQA and MQA in prefill, chunk and decode; then what is copied and read."""
        listed, what = cases(), "the output"
        compare(type(self), answer, grouped_attention, listed, suspects=suspects, what=what, dtypes=())
        self.check_work(answer)
        compare(type(self), answer, grouped_attention, listed[:2], what=what, layouts=False,
                dtypes=(torch.bfloat16, torch.float64))  # fmt: skip

    def check_work(self, answer: Callable) -> None:
        """Decode and chunk: K and V neither made anew nor read more than once."""
        for when, q, k, v in steps():
            check_step(type(self), partial(answer, q, k, v), k, v, when, once=True, enable_gqa=False)


def cases() -> list[Case]:
    """Calls in float32: sizes pairwise distinct, then each boundary, then many keys and scores near -1e5."""
    sizes = (  # num_heads, num_kv_heads, new, held, batch, head_dim
        (10, 2, 4, 7, 3, 8), (6, 3, 1, 12, 1, 16), (12, 4, 5, 0, 2, 20), (7, 1, 2, 9, 5, 24), (4, 4, 3, 6, 2, 12),
        (6, 2, 1, 0, 4, 8), (8, 2, 3, 1, 1, 32), (4, 2, 3, 2050, 1, 8),
    )  # fmt: skip
    listed = [Case(tuple(x.float() for x in heads(*size[:4], batch=size[4], head_dim=size[5]))) for size in sizes]
    return [*listed, Case(far_down(3, 4), "all scores near -100,000")]


def far_down(new: int, held: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v whose scores lie near -1e5, numbers that float32 holds exactly: only -inf hides a key then."""
    q, k, v = heads(6, 2, new, held, batch=1, head_dim=16)
    q, k = ((4 * x).round() / 4 for x in (q, k))
    q[..., 0], k[..., 0] = 1.0, -4e5
    return q.float(), k.float(), v.float()


def suspects(q: Tensor, k: Tensor, v: Tensor) -> list[Suspect]:
    """What goes wrong in any attention, and what only stacked rows make possible."""
    num_heads, num_kv_heads, new, kv_len = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    group = num_heads // num_kv_heads

    def masked(shift: int) -> Tensor:
        """One triangle over the stacked rows of each group."""
        rows = torch.ones(group * new, kv_len, dtype=torch.bool).tril(shift)
        return attend(q, k, v, Turn(see=lambda *_: rows.view(group, new, kv_len).repeat(num_kv_heads, 1, 1)))

    def rows_in_turn() -> Tensor:
        """Each row of the mask several times in a row, for rows that lie head after head."""
        rows = attention.seen(new, kv_len - new).repeat_interleave(group, 0)
        return attend(q, k, v, Turn(see=lambda *_: rows.view(group, new, kv_len).repeat(num_kv_heads, 1, 1)))

    def dealt(x: Tensor, outer: int) -> Tensor:
        """Heads that lay as [outer, inner] in the order [inner, outer]."""
        return x.unflatten(1, (outer, -1)).transpose(1, 2).flatten(1, 2)

    def tokens_first(x: Tensor) -> Tensor:
        """The rows of each group, head after head, put token after token."""
        return x.unflatten(1, (-1, group)).transpose(2, 3).reshape(x.shape)

    def heads_first(x: Tensor) -> Tensor:
        """And back."""
        return x.reshape(x.shape[0], num_kv_heads, new, group, -1).transpose(2, 3).reshape(x.shape)

    same_mask = "the shape of the scores where they are masked: [batch, num_heads, new_tokens, kv_len]"
    back = "each reshape of q: undo it in the opposite order before the result is returned"
    return attention.now_and_then(q, k, v, [
        *attention.suspects(q, k, v),
        Suspect("mask-over-stacked-rows", [lambda: masked(kv_len - new), lambda: masked(0),
                                           lambda: masked(kv_len - group * new)],
                "the triangle ran over all stacked rows of a group; every query head needs the same mask", same_mask,
                "the second head of a group sees other keys than the first"),
        Suspect("mask-over-stacked-rows", [rows_in_turn], "repeat_interleave repeats each row of the mask in its "
                "place, but the stacked rows lie head after head: repeat the whole mask", same_mask,
                "the mask's rows meet the rows of other tokens"),
        Suspect("queries-averaged", [lambda: attend(
                    q.unflatten(1, (num_kv_heads, group)).mean(2).repeat_interleave(group, 1), k, v)],
                "the queries of a group were averaged before they met the keys",
                "the queries of a group: more rows of the product, each its own",
                "all query heads of a group give the same"),
        Suspect("heads-reordered", [lambda: dealt(attend(q, k, v), num_kv_heads), lambda: dealt(attend(q, k, v), group),
                                    lambda: attend(dealt(q, group), k, v),
                                    lambda: attend(dealt(q, num_kv_heads), k, v)],
                "heads were split into groups in one order and put back together in another", back,
                "query heads stand in other places than they came in"),
        Suspect("tokens-and-heads-mixed", [lambda: attend(tokens_first(q), k, v),
                                           lambda: heads_first(attend(tokens_first(q), k, v)),
                                           lambda: tokens_first(attend(q, k, v)),
                                           lambda: heads_first(attend(q, k, v))],
                "rows were stacked token after token and read head after head, or the other way round", back,
                "right for one new token, wrong for several"),
    ])  # fmt: skip
