"""Lab 01, attention basics: the references, their checks, the predictions and the questions."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from torch import Tensor

from labkit.course.exercise import Exercise, Finding, LabContents, NotYet, Prediction, Quiz, close
from labkit.ledger import ledger

# float64 sums of fewer than 100 terms of size about 1: two orders of summation differ by far less than this.
TOLERANCE = 1e-10


def recognise(got: Tensor, slips: Iterable[tuple[Tensor, Finding]], tolerance: float = TOLERANCE) -> None:
    """Raise `NotYet` with the finding of the first slip whose value `got` has."""
    for value, finding in slips:
        if not isinstance(got, Tensor) or got.shape != value.shape:
            continue
        if torch.allclose(got.double(), value.double(), rtol=0.0, atol=tolerance, equal_nan=True):
            raise NotYet(finding)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, the same on every device: drawn on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# 01.1


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """Weights of each query over all keys: softmax(q k^T / sqrt(head_dim)), one row per query.

    q: [..., queries, head_dim]. k: [..., keys, head_dim].
    Returns [..., queries, keys]: nothing negative, each row sums to 1.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return torch.softmax(scores, dim=-1)


class Weights(Exercise):
    """Scores, scaled, through softmax."""

    id = "01.1"
    title = "Scores and weights"
    minutes = 3
    difficulty = 1
    hints = (
        "A score is the dot product of one query and one key. Which matrix product gives all of them at once?",
        "q times k with its last two dimensions swapped, divided by sqrt(head_dim); then softmax along the keys.",
        "scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), then torch.softmax(scores, dim=...): which dim?",
    )
    hints_for: ClassVar = {
        "axis": "Shape [..., queries, keys]: which of the two dimensions should sum to 1 when you add along it?",
        "no-scale": "The formula has three steps: multiply, divide, softmax. Count yours.",
        "overflow": "exp(1000) is infinity here. Softmax may subtract the row's largest score first. Why?",
    }
    reference = staticmethod(attention_weights)

    def examine(self, answer: Callable) -> None:
        """Formula slips first, then other shapes and large scores."""
        q, k = draw(2, 4, 16), draw(2, 6, 16, seed=1)
        want = attention_weights(q, k)
        got = self.call(answer, q, k)
        recognise(got, self.slips(q, k))
        self.like(got, want, what="the weights of 4 queries over 6 keys")
        if not close(got.sum(-1), torch.ones_like(got.sum(-1)), TOLERANCE):
            self.fail(
                "rows",
                seen=f"the first row sums to {got[0, 0].sum():.3g}",
                cause="something is done to the weights after softmax, or softmax is not the last step",
                look="the order of the steps: multiply, divide, softmax",
            )
        self.same(got, want, what="the weights", tolerance=TOLERANCE)
        self.large_scores(answer)
        for dtype in (torch.float32, torch.bfloat16):
            q, k = draw(3, 1, 16, dtype=dtype), draw(3, 7, 16, seed=1, dtype=dtype)
            # A weight is at most 1, and a few roundings of the dtype separate two right answers.
            tolerance = 8 * torch.finfo(dtype).eps
            self.same(self.call(answer, q, k), attention_weights(q, k), what=f"{dtype} weights", tolerance=tolerance)

    def large_scores(self, answer: Callable) -> None:
        """Scores of thousands must give weights, not NaN."""
        q, k = 300 * draw(1, 4, 16), 300 * draw(1, 6, 16, seed=1)
        got = self.call(answer, q, k)
        if not torch.isfinite(got).all():
            self.fail(
                "overflow",
                seen="NaN weights where scores are in the thousands",
                cause="exp() of a large score is infinity, and infinity divided by infinity is NaN",
                look="torch.softmax, or subtract each row's largest score before exp()",
            )
        self.same(got, attention_weights(q, k), what="weights of large scores", tolerance=1e-6)

    @staticmethod
    def slips(q: Tensor, k: Tensor) -> Iterable[tuple[Tensor, Finding]]:
        """Wrong values and what each betrays."""
        raw, root = q @ k.transpose(-2, -1), math.sqrt(q.shape[-1])
        soft = torch.softmax
        axis = Finding(
            "axis",
            "each column sums to 1; each row should",
            "softmax ran along the queries: every key hands out 1, instead of every query spending 1",
            "dim= of softmax: the keys are the last dimension",
        )
        no_softmax = Finding(
            "no-softmax",
            "scores came back, some of them negative",
            "the last step is missing",
            "softmax along the keys turns a row of scores into a row of weights",
        )
        yield soft(raw / root, -2), axis
        yield soft(raw, -2), axis
        yield raw / root, no_softmax
        yield raw, no_softmax
        yield (
            soft(raw, -1),
            Finding(
                "no-scale",
                "rows sum to 1, but they are sharper than they should be",
                "the scores were not divided by sqrt(head_dim)",
                "the step between the product and softmax",
            ),
        )
        yield (
            soft(raw / root**2, -1),
            Finding(
                "scale-twice",
                "rows sum to 1, but they are flatter than they should be",
                "the scores were divided by head_dim, not by its square root",
                "the deviation of a sum of head_dim products grows with sqrt(head_dim)",
            ),
        )
        yield (
            soft(raw * root, -1),
            Finding(
                "scale-up",
                "rows sum to 1, but nearly all weight sits on one key",
                "the scores were multiplied by sqrt(head_dim) instead of divided",
                "the sign of the exponent: head_dim ** -0.5 divides",
            ),
        )
        yield (
            soft(raw / math.sqrt(k.shape[-2]), -1),
            Finding(
                "scale-by-keys",
                "rows sum to 1, but the scale depends on how many keys there are",
                "the root was taken of the number of keys, not of head_dim",
                "which dimension the dot product sums over: the last one of q",
            ),
        )
        yield (
            soft(raw, -1) / root,
            Finding(
                "scale-after",
                f"rows sum to {1 / root:.2f}, which is 1 / sqrt(head_dim)",
                "the division came after softmax",
                "divide the scores, then take softmax: the order matters because softmax is not linear",
            ),
        )
        shares = Finding(
            "proportional",
            "rows sum to 1, but some weights are negative",
            "scores were divided by their sum; a score may be negative, so that is no share",
            "softmax divides exp(score) by the sum of exp(score)",
        )
        yield raw / raw.sum(-1, keepdim=True), shares
        yield (
            soft(raw / root, -1).transpose(-2, -1),
            Finding(
                "swapped",
                "one row per key instead of one per query",
                "the two dimensions of the result are swapped",
                "queries are rows, keys are columns",
            ),
        )


# 01.2


def causal_mask(new_tokens: int, past: int) -> Tensor:
    """Which keys each new token may see: bool [new_tokens, past + new_tokens], True = may see.

    past: how many tokens are held already. Row i is the i-th new token, column j the token at position j.
    """
    position = torch.arange(new_tokens)[:, None] + past
    return torch.arange(past + new_tokens)[None, :] <= position


class Mask(Exercise):
    """A causal mask that knows what came before."""

    id = "01.2"
    title = "A causal mask, with what came before"
    minutes = 3
    hints = (
        "Row i is the i-th *new* token. At which position of the whole text does it stand?",
        "With `past` tokens held, new token i stands at past + i and may see the positions 0 to past + i.",
        "rows: torch.arange(new_tokens)[:, None] + past; columns: torch.arange(past + new_tokens). Compare them.",
    )
    hints_for: ClassVar = {
        "no-offset": "For new_tokens=1, past=4 the one new token may see all five. What does yours say?",
        "inverted": "Read the docstring's last words of the first line again.",
    }
    reference = staticmethod(causal_mask)

    def examine(self, answer: Callable) -> None:
        """One telling case, then the corners."""
        got = self.call(answer, 3, 2)
        self.shape_of(got)
        if got.dtype != torch.bool:
            self.fail(
                "not-bool",
                seen=f"a tensor of {got.dtype}",
                cause="numbers (0 and 1, or 0 and -inf) instead of permissions",
                look="return the comparison itself: it is bool",
            )
        recognise(got, self.slips(), tolerance=0)
        for new_tokens, past in ((3, 2), (1, 0), (1, 7), (5, 0), (4, 9)):
            got, want = self.call(answer, new_tokens, past), causal_mask(new_tokens, past)
            if not isinstance(got, Tensor) or got.shape != want.shape or not torch.equal(got, want):
                self.fail(
                    "one-case-only",
                    seen=f"another mask than needed for {new_tokens} new tokens after {past} held",
                    cause="the rule fits some sizes only",
                    look="say the rule for row i in words first: it sees the positions 0 to past + i",
                )

    def shape_of(self, got: Tensor) -> None:
        """Rows are new tokens, columns are all tokens."""
        if isinstance(got, Tensor) and got.shape == (3, 3):
            self.fail(
                "no-past-columns",
                seen="a 3 x 3 mask for 3 new tokens after 2 held",
                cause="the tokens held have no column, so no new token could see them",
                look="the number of columns: past + new_tokens",
            )
        if isinstance(got, Tensor) and got.shape == (5, 5):
            self.fail(
                "old-rows",
                seen="5 rows for 3 new tokens",
                cause="the tokens held got a row each; their queries are not computed again",
                look="the number of rows: new_tokens",
            )
        self.like(got, got if isinstance(got, Tensor) and got.shape == (3, 5) else causal_mask(3, 2), what="the mask")

    @staticmethod
    def slips() -> Iterable[tuple[Tensor, Finding]]:
        """Wrong masks for 3 new tokens after 2 held."""
        want, row, column = causal_mask(3, 2), torch.arange(3)[:, None], torch.arange(5)[None, :]
        yield (
            ~want,
            Finding(
                "inverted",
                "every permission is turned round: the first new token sees only what comes after it",
                "True was taken for 'hidden'",
                "the docstring: True = may see",
            ),
        )
        yield (
            column <= row,
            Finding(
                "no-offset",
                "the first new token sees 1 key; it should see 3: the two held and itself",
                "row i was taken for position i, as if nothing were held",
                "add past to the row's position",
            ),
        )
        yield (
            column < row + 2,
            Finding(
                "not-itself",
                "the first new token sees 2 keys; it should see 3: itself, too",
                "a strict comparison",
                "<= instead of <",
            ),
        )
        yield (
            column <= row + 3,
            Finding(
                "sees-next",
                "the first new token sees 4 keys; it should see 3: its successor is visible",
                "the diagonal is one too far to the right",
                "the first new token stands at position past, and sees position past at most",
            ),
        )
        yield (
            want & (column >= 2),
            Finding(
                "past-hidden",
                "no new token sees a token that is held",
                "the columns of the past are False",
                "what was there before may be seen by every new token",
            ),
        )
        yield (
            torch.cat((torch.ones(3, 3).tril().bool(), torch.ones(3, 2).bool()), dim=1),
            Finding(
                "past-at-the-end",
                "the last columns are visible to all, the first ones are not",
                "the columns of the past were put to the right of the new tokens'",
                "the order of columns is the order of positions: the past comes first",
            ),
        )
        yield (
            torch.ones(3, 5).bool(),
            Finding(
                "all-visible",
                "every new token sees every key, later ones included",
                "nothing compares the key's position with the query's",
                "column j is visible to row i when j <= past + i",
            ),
        )


# 01.3


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Give each head its own slice of every token's vector.

    x: [batch, tokens, num_heads * head_dim].
    Returns [batch, num_heads, tokens, head_dim]: head h has dimensions h * head_dim to (h + 1) * head_dim.
    """
    batch, tokens, _ = x.shape
    return x.view(batch, tokens, num_heads, -1).transpose(1, 2)


class Split(Exercise):
    """From one vector per token to one per token and head."""

    id = "01.3"
    title = "Split into heads"
    minutes = 2
    hints = (
        "Cut first, move second: which dimension is cut into heads, and where must the heads stand afterwards?",
        "Cut the last dimension in two, [batch, tokens, num_heads, head_dim], then swap tokens and heads.",
        "x.view(batch, tokens, num_heads, -1) and then .transpose(1, 2)",
    )
    hints_for: ClassVar = {
        "mixed-tokens": "view() only relabels. In memory, which numbers lie together: a head's or a token's?",
    }
    reference = staticmethod(split_heads)

    def examine(self, answer: Callable) -> None:
        """Numbers that say where they came from, then a case of equal sizes."""
        for tokens, num_heads in ((5, 3), (4, 4)):
            x = torch.arange(2 * tokens * num_heads * 6, dtype=torch.float64).view(2, tokens, num_heads * 6)
            got = self.call(answer, x, num_heads)
            recognise(got, self.slips(x, num_heads), tolerance=0)
            self.same(got, split_heads(x, num_heads), what=f"{tokens} tokens in {num_heads} heads")
        x = draw(1, 2, 8, dtype=torch.bfloat16)
        self.same(self.call(answer, x, 1), split_heads(x, 1), what="one head")

    @staticmethod
    def slips(x: Tensor, num_heads: int) -> Iterable[tuple[Tensor, Finding]]:
        """Wrong ways to cut."""
        batch, tokens, size = x.shape
        head_dim = size // num_heads
        cut = x.view(batch, tokens, num_heads, head_dim)
        yield (
            x.view(batch, num_heads, tokens, head_dim),
            Finding(
                "mixed-tokens",
                "the shape is right, but head 0 holds slices of all heads of the first tokens",
                "view straight to the final shape: it relabels in memory order, where a token's heads lie together",
                "cut the last dimension first, then swap tokens and heads with transpose",
            ),
        )
        yield (
            cut,
            Finding(
                "tokens-first",
                f"shape {list(cut.shape)}: tokens before heads",
                "the cut is right, the swap is missing",
                "transpose the dimensions of tokens and heads",
            ),
        )
        yield (
            x.view(batch, tokens, head_dim, num_heads).permute(0, 3, 1, 2),
            Finding(
                "interleaved",
                f"head 0 holds every {num_heads}th number of a token instead of its first {head_dim}",
                "the last dimension was cut as [head_dim, num_heads]",
                "the order of the cut: num_heads first, head_dim inside it",
            ),
        )
        yield (
            x.view(batch, tokens, head_dim, num_heads).transpose(1, 2),
            Finding(
                "sizes-swapped",
                f"{head_dim} heads of {num_heads} dimensions; {num_heads} of {head_dim} were asked for",
                "num_heads was taken for head_dim",
                "head_dim is x.shape[-1] // num_heads",
            ),
        )
        yield (
            cut.permute(0, 2, 3, 1),
            Finding(
                "dimensions-last",
                "tokens stand last, where head_dim should be",
                "one swap too many: this is the shape that keys have inside the score product",
                "the docstring's order: batch, num_heads, tokens, head_dim",
            ),
        )


# 01.3b


def merge_heads(x: Tensor) -> Tensor:
    """Lay the heads' results of each token side by side again: the inverse of split_heads.

    x: [batch, num_heads, tokens, head_dim].
    Returns [batch, tokens, num_heads * head_dim].
    """
    batch, num_heads, tokens, head_dim = x.shape
    return x.transpose(1, 2).reshape(batch, tokens, num_heads * head_dim)


class Merge(Exercise):
    """And back."""

    id = "01.3b"
    title = "Merge the heads"
    minutes = 1
    needs = ("01.3",)
    hints = (
        "Undo split_heads step by step, the last step first.",
        "Swap heads and tokens back, then join the last two dimensions into one.",
        "x.transpose(1, 2) is no longer in memory order: reshape(batch, tokens, -1) copies it into order, view cannot.",
    )
    hints_for: ClassVar = {
        "view-of-a-transpose": "transpose moved no number, only labels. Which method copies where labels will not do?",
    }
    reference = staticmethod(merge_heads)

    def examine(self, answer: Callable) -> None:
        """What split_heads gives, and back."""
        x = torch.arange(2 * 5 * 18, dtype=torch.float64).view(2, 5, 18)
        heads = split_heads(x, 3).contiguous()
        try:
            got = self.call(answer, heads)
        except NotYet as not_yet:
            if "view size is not compatible" in not_yet.finding.seen:
                self.fail(
                    "view-of-a-transpose",
                    seen="view() refused: the tensor's numbers are not in memory order",
                    cause="transpose only changes labels; view needs numbers in a row",
                    look="reshape(), which copies where it must",
                )
            raise
        recognise(got, self.slips(heads), tolerance=0)
        self.same(got, x, what="5 tokens of 3 heads, merged")
        for tokens, num_heads in ((4, 4), (1, 2)):
            heads = draw(1, num_heads, tokens, 4, dtype=torch.bfloat16)
            self.same(
                self.call(answer, heads), merge_heads(heads), what=f"{tokens} tokens of {num_heads} heads, merged"
            )

    @staticmethod
    def slips(heads: Tensor) -> Iterable[tuple[Tensor, Finding]]:
        """Wrong ways to join."""
        batch, num_heads, tokens, head_dim = heads.shape
        yield (
            heads.reshape(batch, tokens, num_heads * head_dim),
            Finding(
                "mixed-tokens",
                "the shape is right, but one token's vector holds one head's results of several tokens",
                "reshape without swapping back: in memory, one head's tokens lie together",
                "transpose(1, 2) first",
            ),
        )
        yield (
            heads.permute(0, 2, 3, 1).reshape(batch, tokens, -1),
            Finding(
                "interleaved",
                "the heads' numbers alternate instead of lying side by side",
                "the heads were moved to the last place before joining",
                "heads stand before head_dim when the two are joined",
            ),
        )
        one_vector = Finding(
            "heads-blended",
            f"vectors of {head_dim} numbers; {num_heads * head_dim} are needed",
            "the heads were summed or averaged",
            "merging keeps every number: heads lie side by side; the output projection blends them later",
        )
        yield heads.mean(1), one_vector
        yield heads.sum(1), one_vector
        yield (
            heads.reshape(batch, num_heads * tokens, head_dim),
            Finding(
                "along-tokens",
                f"{num_heads * tokens} tokens instead of {tokens}",
                "heads were joined to tokens, not to head_dim",
                "which two dimensions become one: num_heads and head_dim",
            ),
        )
        yield (
            heads.transpose(1, 2),
            Finding(
                "not-joined",
                "four dimensions came back; three are needed",
                "the swap is right, the join is missing",
                "reshape to [batch, tokens, num_heads * head_dim]",
            ),
        )


# 01.4


def apply_rope(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Turn each pair of dimensions (i, i + head_dim / 2) by the angle position * frequencies[i], in radians.

    A pair (a, b) becomes (a cos - b sin, a sin + b cos).
    x: [..., tokens, head_dim]. positions: int [tokens]. frequencies: float32 [head_dim / 2].
    Returns a tensor of x's shape and dtype. The angles are computed in float32, whatever dtype x has.
    """
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Rope(Exercise):
    """Rotary positions, Llama's pairing."""

    id = "01.4"
    title = "Rotary positions"
    minutes = 5
    difficulty = 3
    hints = (
        "How many angles are there for one token? What is the shape of all angles?",
        "Angles are positions[:, None] * frequencies, [tokens, head_dim / 2]. Cut x into its two halves: a and b.",
        "torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1), with cos and sin brought to x.dtype",
    )
    hints_for: ClassVar = {
        "interleaved-pairs": "Two conventions exist. Here the partner of dimension 0 is head_dim / 2, not 1.",
        "own-positions": "A decode step brings one token. At which position is it, and how would arange know?",
        "low-precision": "bfloat16 keeps 8 significant bits: near 8,000 its numbers are 32 apart. In radians?",
        "position-not-reset": "Call your function twice with the same arguments. What should be different?",
    }
    reference = staticmethod(apply_rope)

    def examine(self, answer: Callable) -> None:
        """State first, then pairing and sign, then positions and precision."""
        frequencies = 10_000.0 ** -(torch.arange(0, 8, dtype=torch.float32) / 8)
        x, start = draw(2, 3, 5, 16, dtype=torch.float32), torch.arange(5)
        got, again = (self.call(answer, x, start, frequencies) for _ in range(2))
        if (
            isinstance(got, Tensor)
            and isinstance(again, Tensor)
            and not (got.shape == again.shape and torch.equal(got, again))
        ):
            self.fail(
                "position-not-reset",
                seen="two calls with the same arguments give different results",
                cause="a position counter outlives the call, so a second prompt starts where the first one ended",
                look="take every position from the argument; keep nothing between calls",
            )
        # Angles of up to 60 radians in float32 are off by at most 60 * 2**-24, times |x| < 5: well below the tolerance.
        recognise(got, self.slips(x, start, frequencies), tolerance=1e-4)
        self.same(got, apply_rope(x, start, frequencies), what="5 tokens at positions 0 to 4", tolerance=1e-4)
        self.later_positions(answer, frequencies)
        self.half_precision(answer, frequencies)

    def later_positions(self, answer: Callable, frequencies: Tensor) -> None:
        """Positions that do not start at 0, and that have gaps."""
        for places in ([17], [40, 41, 42], [3, 9, 60]):
            x, positions = draw(1, 2, len(places), 16, dtype=torch.float32), torch.tensor(places)
            got = self.call(answer, x, positions, frequencies)
            recognise(
                got,
                [
                    (
                        apply_rope(x, torch.arange(len(places)), frequencies),
                        Finding(
                            "own-positions",
                            f"a token at position {places[0]} was turned as if it stood at position 0",
                            "the positions were counted from 0 inside the function",
                            "the argument positions: a decode step brings one token, at whatever position it has",
                        ),
                    )
                ],
                tolerance=1e-4,
            )
            self.same(got, apply_rope(x, positions, frequencies), what=f"tokens at positions {places}", tolerance=1e-4)

    def half_precision(self, answer: Callable, frequencies: Tensor) -> None:
        """bfloat16 in, bfloat16 out, with float32 angles."""
        x, positions = draw(1, 2, 3, 16, dtype=torch.bfloat16), torch.tensor([4_001, 6_005, 8_191])
        got = self.call(answer, x, positions, frequencies)
        if isinstance(got, Tensor) and got.dtype == torch.float32:
            self.fail(
                "dtype-promoted",
                seen="bfloat16 went in, float32 came out",
                cause="a product with float32 cos and sin is float32: a cache of such keys is twice as large",
                look="bring cos and sin, or the result, to x.dtype",
            )
        want = apply_rope(x.float(), positions, frequencies)
        self.like(got, want.to(torch.bfloat16), what="bfloat16 tokens")
        # bfloat16 rounds cos, sin, two products and a sum, each by 2**-9 of a value below 5: under 0.05 in all.
        if not close(got, want, 0.05):
            self.fail(
                "low-precision",
                seen=f"bfloat16, near position 8,000: values are off by up to {(got.float() - want).abs().max():.2g}",
                cause="the angles themselves were computed in bfloat16, which cannot tell position 8,191 from 8,192",
                look="positions * frequencies in float32; only cos and sin go to x.dtype",
            )

    @staticmethod
    def slips(x: Tensor, positions: Tensor, frequencies: Tensor) -> Iterable[tuple[Tensor, Finding]]:
        """Wrong turns at positions 0 to 4."""
        angles = positions[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        (a, b), (even, odd) = x.chunk(2, dim=-1), (x[..., 0::2], x[..., 1::2])
        paired = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
        halves = torch.cat((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
        pairs = Finding(
            "interleaved-pairs",
            "dimension 0 was turned together with dimension 1",
            "the pairing of the original paper; Llama's weights pair dimension i with i + head_dim / 2",
            "x.chunk(2, dim=-1) gives the two halves",
        )
        yield paired, pairs
        yield halves, pairs
        yield (
            torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1),
            Finding(
                "wrong-sign",
                "every pair turns the other way",
                "the signs of the two sine terms are exchanged",
                "the docstring: (a cos - b sin, a sin + b cos)",
            ),
        )
        yield (
            apply_rope(x, positions + 1, frequencies),
            Finding(
                "starts-at-1",
                "the token at position 0 was turned by one step; it should stay as it is",
                "positions were counted from 1",
                "use positions as they come: the first token stands at 0",
            ),
        )
        yield (
            torch.cat((a * cos - b * sin, b), dim=-1),
            Finding(
                "half-turned",
                "the second half of the dimensions is unchanged",
                "only one of each pair was computed",
                "both numbers of a pair change: the second becomes a sin + b cos",
            ),
        )
        yield (
            torch.cat((a * cos - b * cos, a * sin + b * sin), dim=-1),
            Finding(
                "not-a-rotation",
                "the vectors change their length; turning keeps it",
                "cos and sin stand in the wrong places",
                "each output mixes a and b with one cosine and one sine",
            ),
        )
        yield (
            torch.cat((a * cos - b * sin, a * cos + b * sin), dim=-1),
            Finding(
                "not-a-rotation",
                "the vectors change their length; turning keeps it",
                "cos and sin stand in the wrong places in the second half",
                "the second half is a sin + b cos",
            ),
        )


# 01.5


def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention output of the newest token alone, with the work of one row.

    q, k, v: [batch, num_heads, tokens, head_dim], of all tokens; the newest stands last.
    Returns [batch, num_heads, 1, head_dim].
    """
    scores = q[:, :, -1:] @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return torch.softmax(scores, dim=-1) @ v


class LastRow(Exercise):
    """The newest token's row, and no other."""

    id = "01.5"
    title = "Only the last row"
    minutes = 3
    needs = ("01.1",)
    hints = (
        "Which query asks, and which keys may it see? Is there anything left to hide?",
        "Cut q before the product, not the result after it; keep the dimension of length 1.",
        "q[:, :, -1:] is [batch, num_heads, 1, head_dim]: from there it is 01.1, times v. No mask.",
    )
    hints_for: ClassVar = {
        "whole-matrix": "Where in your code does the -1 stand: before the product or after it?",
        "sees-first-only": "The newest token stands after all others. Which keys would a causal mask hide from it?",
    }
    reference = staticmethod(attend_last)

    def examine(self, answer: Callable) -> None:
        """Value slips first, then the work."""
        q, k, v = (draw(2, 3, 7, 8, seed=seed) for seed in range(3))
        want = attend_last(q, k, v)
        with ledger() as work:
            got = self.call(answer, q, k, v)
        recognise(got, self.slips(q, k, v))
        self.same(got, want, what="the newest token's output", tolerance=TOLERANCE)
        if work.scores > 2 * 3 * 7:
            self.fail(
                "whole-matrix",
                seen=f"{work.scores} score entries were computed; {2 * 3 * 7} are needed",
                cause="every row of the matrix is computed and all but the last are thrown away",
                look="take the last query before the product, not the last row after it",
            )
        q, k, v = (draw(1, 2, 1, 8, seed=seed, dtype=torch.float32) for seed in range(3))
        self.same(self.call(answer, q, k, v), attend_last(q, k, v), what="a single token", tolerance=1e-5)

    @staticmethod
    def slips(q: Tensor, k: Tensor, v: Tensor) -> Iterable[tuple[Tensor, Finding]]:
        """Wrong rows."""
        last, keys = q[:, :, -1:], k.transpose(-2, -1)
        root = math.sqrt(q.shape[-1])
        yield (
            attend_last(q[:, :, :1], k, v),
            Finding(
                "first-query",
                "this is what the first token's query finds",
                "the wrong end of q was taken",
                "the newest token stands last: index -1",
            ),
        )
        yield (
            attend_last(q, k, v)[:, :, 0],
            Finding(
                "dimension-lost",
                "three dimensions came back; the one of length 1 is missing",
                "an index such as -1 drops a dimension, a slice such as -1: keeps it",
                "q[:, :, -1:]",
            ),
        )
        yield (
            v[:, :, :1],
            Finding(
                "sees-first-only",
                "the output is the first token's value: nothing else was seen",
                "a causal mask for one query and no offset hides every key but the first",
                "no mask is needed: the newest token may see all",
            ),
        )
        yield (
            torch.softmax(last @ keys, dim=-1) @ v,
            Finding("no-scale", "the weights are too sharp", "the division by sqrt(head_dim) is missing", "01.1"),
        )
        yield (
            attend_last(q, k[:, :, :-1], v[:, :, :-1]),
            Finding(
                "not-itself",
                "the newest token does not see itself",
                "its own key and value were cut off",
                "k and v are used whole; only q is cut",
            ),
        )
        yield (
            torch.softmax(last @ keys / root, dim=-2) @ v,
            Finding(
                "axis",
                "the output is the plain sum of all values: every weight is 1",
                "softmax ran along the queries, of which there is one",
                "dim=-1: the keys",
            ),
        )


# 01.6


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of a whole prompt: what comes after a token must not change its output.

    q, k, v: [..., tokens, head_dim]. Returns [..., tokens, head_dim].
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = causal_mask(q.shape[-2], 0).to(q.device)
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
    return weights @ v


def leaky_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of a whole prompt: what comes after a token must not change its output.

    q, k, v: [..., tokens, head_dim]. Returns [..., tokens, head_dim].
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = causal_mask(q.shape[-2], 0).to(q.device)
    weights = torch.softmax(scores, dim=-1) * mask
    return weights @ v


class Leak(Exercise):
    """A mask that comes too late."""

    id = "01.6"
    title = "Debug: a leak that no picture shows"
    minutes = 3
    difficulty = 3
    needs = ("01.1", "01.2")
    starting_point = inspect.getsource(leaky_attend).replace("leaky_attend", "attend")
    hints = (
        "No weight on a later token is left. So what else in the output depends on the later tokens?",
        "Softmax divides by a sum over all keys. Which keys are in that sum when the mask comes afterwards?",
        "Hide scores before softmax: scores.masked_fill(~mask, float('-inf')). exp(-inf) is 0, in the sum as well.",
    )
    hints_for: ClassVar = {
        "renormalised": "What is left to divide by when the hidden score was 200 larger than every visible one?",
        "zeroed-scores": "exp(0) is 1. Which score gives exp(score) = 0?",
    }
    reference = staticmethod(attend)

    def examine(self, answer: Callable) -> None:
        """Known values, then a later token that dominates, then the promise itself."""
        q, k, v = (draw(2, 5, 8, seed=seed) for seed in range(3))
        got = self.call(answer, q, k, v)
        recognise(got, self.slips(q, k, v))
        self.same(got, attend(q, k, v), what="the output", tolerance=TOLERANCE)
        # Only the key of the last token is large: hidden from the others, its score dominates theirs by hundreds.
        q = q.abs().float()
        k = torch.cat((k[:, :-1].float(), torch.full((2, 1, 8), 300.0)), dim=1)
        got, want = self.call(answer, q, k, v.float()), attend(q, k, v.float())
        if not close(got, want, 1e-3):
            self.fail(
                "renormalised",
                seen="right for ordinary numbers; wrong where a hidden score is hundreds larger than the visible ones",
                cause="softmax ran over all keys, and what the mask left was scaled up afterwards: by then it is 0",
                look="mask the scores, before softmax",
            )

    @staticmethod
    def slips(q: Tensor, k: Tensor, v: Tensor) -> Iterable[tuple[Tensor, Finding]]:
        """The bug as it stands, and repairs that do not mend it."""
        mask = causal_mask(q.shape[-2], 0)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])

        def blend(masked: Tensor, dim: int = -1) -> Tensor:
            return torch.softmax(masked, dim=dim) @ v

        yield (
            leaky_attend(q, k, v),
            Finding(
                "mask-after-softmax",
                f"the first token's weights sum to {torch.softmax(scores, -1)[0, 0, 0]:.2f}, not to 1",
                "softmax divides by a sum that includes the later tokens; the mask comes when that is done",
                "the order of the two: hide scores first, then softmax",
            ),
        )
        yield (
            blend(scores),
            Finding(
                "no-mask",
                "rows sum to 1, but every token sees every other",
                "the mask is gone",
                "hide the scores that the mask forbids before softmax",
            ),
        )
        yield (
            blend(scores * mask),
            Finding(
                "zeroed-scores",
                "later tokens still get weight",
                "a score of 0 is not hidden: exp(0) is 1",
                "the score that exp() turns into 0 is -inf",
            ),
        )
        yield (
            blend(scores.masked_fill(~mask, -1.0)),
            Finding(
                "weak-mask",
                "later tokens still get weight",
                "a small negative score is not hidden",
                "the score that exp() turns into 0 is -inf",
            ),
        )
        inverted = Finding(
            "inverted",
            "each token sees only later ones, and the last sees none: NaN",
            "the mask is turned round: True = may see",
            "masked_fill hides where its mask is True: give it ~mask",
        )
        yield blend(scores.masked_fill(mask, float("-inf"))), inverted
        yield (
            blend(scores.masked_fill(~mask, float("-inf")), dim=-2),
            Finding(
                "axis",
                "columns sum to 1, rows do not",
                "softmax runs along the queries",
                "dim=-1: a query spends 1 on its keys",
            ),
        )


PREDICTIONS = (
    Prediction("01.p1", "By how much must one score lead another for its weight to be 100 times as large?"),
    Prediction("01.p2", "How large is the standard deviation of q · k, for vectors of 64 standard normal numbers?"),
    Prediction("01.p3", "With the mask off, by how many percent do layer 29's old keys change?", "%", within=1.5),
    Prediction("01.p4", "128 tokens, one at a time: rows computed by the wasteful loop / rows used", "times"),
    Prediction("01.p5", "What percentage of all attention goes to the first token?", "%", within=1.5),
)

QUIZZES = (
    Quiz(
        "01.q1",
        "Every score of a query rises by 5. What happens to its weights?",
        {
            "a": "They become more even.",
            "b": "They become sharper.",
            "c": "Nothing.",
        },
        {
            "a": "Flatter weights come from smaller differences between scores; adding 5 to all leaves them.",
            "b": "Sharper weights come from larger differences between scores: multiply, do not add.",
            "c": "exp(s + 5) = exp(5) exp(s): the factor stands above and below the fraction and cancels.",
        },
        "c",
    ),
    Quiz(
        "01.q2",
        "Three tokens are held; two new ones arrive together. How many keys may the first of them see?",
        {"a": "1", "b": "3", "c": "4", "d": "5"},
        {
            "a": "That is the mask without the offset: it forgets the three tokens that are held.",
            "b": "The three held, yes, and itself: a token always sees its own key.",
            "c": "Three held and itself. Its neighbour, at position 4, comes after it.",
            "d": "That is what the second new token sees. For the first, position 4 is the future.",
        },
        "c",
    ),
    Quiz(
        "01.q3",
        "Why may the keys and values of old tokens be kept, in all 30 layers?",
        {
            "a": "They are made from the token's embedding, which does not change.",
            "b": "Each layer reads hidden states that, by the causal mask, depend on nothing later.",
            "c": "They change a little with each token, but too little to matter.",
        },
        {
            "a": "True in layer 0 only. Deeper layers read hidden states, and without the mask those change.",
            "b": "A later token can reach an old one only through attention, and the mask forbids that in every layer.",
            "c": "They do not change at all. The last digits differ only because a sum was taken in another order.",
        },
        "b",
    ),
    Quiz(
        "01.q4",
        "Why are K and V kept, but not Q?",
        {
            "a": "Q is larger, so that keeping it would not pay.",
            "b": "Q of an old token changes with every new token, so it would have to be computed anew.",
            "c": "A query is used in its own token's row, once; keys and values are used by every later token.",
            "d": "Q can be computed back from K.",
        },
        {
            "a": "It is larger here (nine heads against three), but no size pays for what is never read again.",
            "b": "It does not change, for the same reason as K and V do not. It is simply not asked for again.",
            "c": "Row i of the matrix belongs to query i. New tokens add new rows; the old rows are finished.",
            "d": "They come from two different weight matrices; neither gives the other.",
        },
        "c",
    ),
    Quiz(
        "01.q5",
        "A counter was not reset: the prompt's positions are 500, 501, and so on. What does a RoPE model do?",
        {
            "a": "It answers as if 500 unknown tokens stood before the prompt.",
            "b": "The same as at positions 0, 1, ..., apart from rounding, while all positions fit the trained length.",
            "c": "It produces noise, since the keys are all different.",
        },
        {
            "a": "Nothing stands there: no keys are held for those positions, and scores see only distances.",
            "b": "All keys and queries turn by the same extra angle, and scores see the difference only.",
            "c": "The keys differ, and so do the queries, by the same angle. Two counts in one text do break it.",
        },
        "b",
    ),
    Quiz(
        "01.q6",
        "A head gives 90% of its weight to the first token. What follows?",
        {
            "a": "The first word is the most important one of the sentence.",
            "b": "Perhaps nothing: the first token's value is short here, so that the head adds little.",
            "c": "The head is broken and can be removed.",
        },
        {
            "a": "You saw the same share with another first word. It goes to the place, not to the meaning.",
            "b": "Weights sum to 1 even if nothing fits; a first token with a short value is a place to put the rest.",
            "c": "On another text the same head may look elsewhere. A share is no proof of use, nor of uselessness.",
        },
        "b",
    ),
)

CONTENTS = LabContents(
    "01",
    "Attention basics",
    exercises=(Weights(), Mask(), Split(), Merge(), Rope(), LastRow(), Leak()),
    predictions=PREDICTIONS,
    quizzes=QUIZZES,
)
