"""02.7: the mask of a chunk, to mend."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.attention import causal_mask
from labkit.attention import fused_attention as attention
from labkit.course.checks.suspects import Suspect, accuse
from labkit.course.checks.tensors import LOOSE, agree
from labkit.course.exercise import Exercise
from labkit.labs.lab02.references import attend_chunk


class AttendChunk(Exercise):
    """The mask that forgets what is cached."""

    id, title, minutes, difficulty = "02.7", "Debug: an answer that depends on the chunk size", 5, 3
    reference = staticmethod(attend_chunk)
    why = (
        "Row i stands at position kv_len - new_tokens + i, so the triangle's diagonal is shifted by what was held "
        "before. A mask that starts at column 0 takes the first new token for the first of the text."
    )
    hints = (
        "Draw the mask for 2 new tokens after 3 cached ones: 2 rows, 5 columns. Which cells should be True?",
        "Row i is the i-th new token. It stands at position kv_len - new_tokens + i, not at i.",
        "tril(d) keeps d more diagonals above the main one. How many columns do the cached tokens add?",
    )
    hints_for: ClassVar = {
        "mask-offset": "The triangle is right; it starts in the wrong column. The mask has kv_len - new_tokens columns "
        "that every row may see.",
        "sees-the-future": "Check row 0: its last True must be the column of the first new token itself.",
    }

    def examine(self, answer: Callable) -> None:
        """Chunks after a cache: each wrong mask gives an output of its own."""
        torch.manual_seed(7)
        for new, held, batch in ((3, 6, 1), (1, 6, 1), (5, 0, 2), (2, 7, 2)):
            q = torch.randn(batch, 6, new, 8)
            k, v = torch.randn(batch, 2, new + held, 8), torch.randn(batch, 2, new + held, 8)
            got = self.call(answer, q, k, v)
            want = attention(q, k, v)
            if isinstance(got, Tensor) and got.shape == want.shape and not got.isfinite().all():
                self.explain(got.nan_to_num(0.0), q, k, v, new, held)
            self.like(got, want, what="the output")
            if not agree(got, want, LOOSE):
                self.explain(got, q, k, v, new, held)

    def explain(self, got: Tensor, q: Tensor, k: Tensor, v: Tensor, new: int, held: int) -> None:
        """Find the mask that gives what was seen."""

        def fits(mask: Tensor) -> bool:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            return agree(got, out.nan_to_num(0.0), LOOSE)

        accuse(type(self), suspects(new, held, q.dtype), fits=fits)
        self.fail(
            "mask",
            seen=f"{new} new tokens after {held} cached: the output fits no mask that this check knows",
            cause="a mask that is right for another case",
            look="the rule for row i, in words, before code",
        )


def suspects(new: int, held: int, dtype: torch.dtype) -> list[Suspect]:
    """Wrong masks for `new` tokens after `held`: bool, or numbers of `dtype` that are added to the scores."""
    every, right = torch.ones(new, new + held, dtype=torch.bool), causal_mask(new, new + held)
    new_alone = right.clone()
    new_alone[:, :held] = False
    empty = "the offset when nothing is cached, kv_len == new_tokens: it must be 0"
    where = f"{new} new tokens after {held} cached"
    return [
        Suspect("mask-offset", [every.tril()] if held else [],
                "row i of the mask was taken for position i, as if nothing were cached",
                "tril(): its diagonal starts at column 0. Where does the first new token stand?",
                f"{where}: the first new token sees 1 key; it should see {held + 1}"),
        Suspect("offset-is-new-tokens", [every.tril(new)] if held not in (0, new) else [],
                f"the triangle was shifted by the {new} new tokens",
                "what the shift has to skip: the cached tokens. How many are they, from kv_len and new_tokens?",
                f"{where}: the first new token sees {new + 1} keys; it should see {held + 1}"),
        Suspect("offset-negative", [every.tril(-held)] if held else [],
                "the offset has the wrong sign: tril(-n) takes diagonals away",
                "the order of the subtraction: a cache can only let a row see more",
                f"{where}: the first new token sees nothing"),
        Suspect("mask-added", [mask.to(dtype) for mask in (right, every.tril(), ~right)],
                f"the mask is {str(dtype).removeprefix('torch.')}: numbers are added to the scores, and 0.0 hides "
                "nothing", "the dtype of the mask: torch.bool says which keys may be seen",
                f"{where}: nothing is hidden, some keys only weigh more"),
        Suspect("sees-everything", every, "no mask at all", "the mask: new tokens must not see each other's future",
                f"{where}: the first new token sees the ones behind it"),
        Suspect("sees-the-future", every.tril(held + 1), "the offset is one too large", empty,
                f"{where}: every token sees one token too many"),
        Suspect("blind-to-itself", every.tril(held - 1), "the offset is one too small, or `<` stands for `<=`", empty,
                f"{where}: no token sees itself"),
        Suspect("mask-inverted", [~right, every.triu(held)],
                "the mask is upside down: True was taken for hidden, or triu for tril",
                "what True means in PyTorch's attn_mask: this key may be seen",
                f"{where}: tokens see the ones behind them and not those before"),
        Suspect("cache-hidden", [new_alone] if held else [], "the mask's columns for cached tokens are False",
                "the first kv_len - new_tokens columns: True in every row",
                f"{where}: the new tokens see each other and nothing that is cached"),
    ]  # fmt: skip
