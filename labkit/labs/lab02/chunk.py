"""02.7: the mask of a chunk, to mend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from labkit.course.checks.attention import now_and_then
from labkit.course.checks.attention import suspects as attention_suspects
from labkit.course.checks.effort import check_stays, effort_of
from labkit.course.checks.suspects import Suspect
from labkit.course.checks.tensors import heads
from labkit.course.checks.trials import Case, compare
from labkit.course.exercise import Exercise
from labkit.labs.lab02.references import attend_chunk

WORDS = {  # what the blank and the report use in place of a mask that is built by hand
    "mask-offset": ("row i of the mask was taken for position i, as if nothing were cached: tril() without offset, or "
                    "is_causal=True", "row 0 of the mask: which keys may the first new token see, and which does it?"),
    "no-mask": ("there is no mask, or one that hides nothing: its diagonal starts too far to the right",
                "the mask: new tokens must not see each other's future"),
    "cache-hidden": ("the mask's columns for cached tokens are False, or k and v were cut to the new tokens",
                     "the first kv_len - new_tokens keys: every row sees them"),
    "offset-negative": ("the offset has the wrong sign: tril(-n) takes diagonals away",
                        "the order of the subtraction: a cache can only let a row see more"),
}  # fmt: skip

FIXED = (8, 16, 32, 64, 1, 2, 3, 4, 5, 6, 7, 128, 256)  # offsets that may have been written down: chunks first


class AttendChunk(Exercise):
    """The mask that forgets what is cached."""

    id, title, minutes, difficulty = "02.7", "Debug: an answer that depends on the chunk size", 5, 3
    reference = staticmethod(attend_chunk)
    why = (
        "Row i stands at position kv_len - new_tokens + i, so the triangle starts kv_len - new_tokens columns in. For "
        "one token that row is all True, for an empty cache the shift is 0."
    )
    hints = (
        "Draw the mask for 2 new tokens after 3 cached ones: 2 rows, 5 columns. Which cells should be True?",
        "Row i is the i-th new token. It stands at position kv_len - new_tokens + i, not at i.",
        "tril(d) keeps d more diagonals above the main one. How many columns do the cached tokens add?",
    )
    hints_for: ClassVar = {
        "mask-offset": "The triangle is right; it starts in the wrong column. The mask has kv_len - new_tokens columns "
        "that every row may see.",
        "mask-offset-too-large": "Check row 0: its last True must be the column of the first new token itself.",
        "mask-added": "A bool mask says which keys may be seen. A mask of numbers is added to the scores.",
    }

    def examine(self, answer: Callable) -> None:
        """Chunks of several sizes behind caches of several lengths; scores so low that a weak mask shows."""
        sizes = (
            (6, 2, 3, 6, 8),
            (4, 2, 2, 298, 6),  # among the first two, tried in each dtype: a mask of another one shows in long rows
            (4, 4, 5, 2, 12),
            (6, 3, 1, 7, 20),
            (5, 1, 4, 0, 8),
            (6, 2, 3, 11, 8),
        )
        cases = [
            Case(tuple(x.float() for x in heads(num_heads, kv, new, held, batch=1 + place % 3, head_dim=head_dim)),
                 f"{new} new tokens after {held} cached")
            for place, (num_heads, kv, new, held, head_dim) in enumerate(sizes)
        ]  # fmt: skip
        q, k, v = (x.float() for x in heads(6, 2, 4, 3))
        cases.append(Case((q.abs(), -1e5 * k.abs(), v), "scores near -100,000, 4 new tokens after 3 cached"))
        known: dict[int, list[Suspect]] = {}

        def once(q: Tensor, k: Tensor, v: Tensor) -> list[Suspect]:
            if id(q) not in known:
                known[id(q)] = suspects(q, k, v)
            return known[id(q)]

        compare(type(self), answer, attend_chunk, cases, suspects=once, what="the output",
                dtypes=(torch.bfloat16, torch.float64))  # fmt: skip
        check_stays(type(self), effort_of(lambda: self.call(answer, *cases[0].args)))


def suspects(q: Tensor, k: Tensor, v: Tensor) -> list[Suspect]:
    """What wrong masks give, in the words of this blank."""
    new, held = q.shape[2], k.shape[2] - q.shape[2]
    kv_len = new + held
    every, where = torch.ones(new, kv_len, dtype=torch.bool), f"{new} new tokens after {held} cached"
    right = every.tril(held)
    listed = [
        Suspect("mask-added",
                [lambda mask=mask, dtype=dtype: by_mask(q, k, v, mask.to(dtype))
                 for mask in (right, every.tril(), ~right) for dtype in (torch.float32, q.dtype)],
                "the mask is made of floats: numbers are added to the scores, and 0.0 hides nothing",
                "the dtype of the mask: torch.bool says which keys may be seen",
                "nothing is hidden, some keys only weigh more"),
        *attention_suspects(q, k, v),
        Suspect("mask-inverted", lambda: by_mask(q, k, v, every.triu(held)), "the mask is upside down: triu for tril",
                "what True means in PyTorch's attn_mask: this key may be seen",
                "tokens see themselves, and what is behind them"),
        Suspect("mask-inverted", lambda: by_mask(q, k, v, ~right | (torch.arange(new) == new - 1)[:, None]),
                "the mask is upside down: True was taken for hidden, and the last row, which would see nothing, sees "
                "all", "what True means in PyTorch's attn_mask: this key may be seen",
                "tokens see what is behind them and not what is before"),
        Suspect("offset-is-heads", [lambda heads=heads: by_mask(q, k, v, every.tril(kv_len - heads))
                                    for heads in (q.shape[1], k.shape[1])],
                "the number of heads was taken for that of new tokens: q.shape[1] for q.shape[2]",
                "the order of the dimensions: [batch, num_heads, new_tokens, head_dim]",
                "the offset changes with the number of heads"),
        Suspect("new-hidden", lambda: by_mask(q, k, v, every & (torch.arange(kv_len) < held)),
                "the mask's columns for the new tokens are False",
                "the last new_tokens columns: a triangle, with True on its diagonal",
                "new tokens see what is held, and neither themselves nor each other"),
        Suspect("mask-flipped", lambda: by_mask(q, k, v, every.tril().flip(1)),
                "the triangle was mirrored: the newest keys go to the first rows", "row i sees the keys up to its own",
                "the first new token sees the last key"),
        Suspect("offset-in-whole-chunks",
                [lambda offset=offset: by_mask(q, k, v, every.tril(offset))
                 for offset in (held // new * new, (kv_len - 1) // new * new)],
                "the offset is a whole number of chunks as long as this one: the chunks before may have been longer",
                "the offset: kv_len - new_tokens, however the tokens before came",
                "the triangle starts in another column than that of the first new token"),
        Suspect("fixed-offset",
                [lambda offset=offset: by_mask(q, k, v, every.tril(offset)) for offset in FIXED],
                "the offset is one number, however many keys are held", "the offset: kv_len - new_tokens",
                "the triangle starts at the same column as after other lengths"),
    ]  # fmt: skip
    told = []
    for suspect in listed:
        cause, look = WORDS.get(suspect.diagnosis, (suspect.cause, suspect.look))
        told.append(replace(suspect, cause=cause, look=look,
                            seen=f"{where}: {suspect.seen}"))  # fmt: skip
    return now_and_then(q, k, v, told)


def by_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """PyTorch's attention with this mask."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
