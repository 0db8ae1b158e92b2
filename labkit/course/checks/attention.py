"""Attention: random inputs, and the one list of what people write in its place.

    compare(type(self), answer, reference, cases, suspects=partial(suspects, mask=...))

Each suspect is one wrong turn, computed on the inputs at hand: another scale, another mask, another place for softmax,
another KV head, K and V or heads and tokens mixed up. The words are for any exercise whose blank computes attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from labkit.course.checks.suspects import Suspect

HIDDEN = float("-inf")


@dataclass(frozen=True)
class Turn:
    """One way to compute attention; the defaults are right.

    scale: what scores are multiplied by (None: head_dim ** -0.5). after: multiplied with the weights instead. axis: of
    softmax; None: no softmax. norm: what stands in place of softmax. see: which keys a row may see, from (new, held):
    bool [new, kv_len]. hide: "before" (-inf), "zeros" (scores times the mask), "after" (weights times the mask),
    "added" (0 and 1 added to the scores), "weak" (`weak` in place of -inf). heads: the KV head of each query head, from
    (num_heads, num_kv_heads). blend: whether weights meet values.
    """

    scale: Callable[[int, int, int], float] | None = None
    after: bool = False
    axis: int | None = -1
    norm: Callable[[Tensor], Tensor] | None = None
    weak: float = -100.0
    see: Callable[[int, int], Tensor] | None = None
    hide: str = "before"
    heads: Callable[[int, int], Tensor] | None = None
    blend: bool = True
    masked: bool = True


def attend(q: Tensor, k: Tensor, v: Tensor | None, turn: Turn = Turn(), *, causal: bool = True) -> Tensor:
    """Attention by one turn. q: `[..., num_heads, new, head_dim]`, k and v: `[..., num_kv_heads, kv_len, head_dim]`, or
    all without a dimension of heads. v None: the weights are what is asked for."""
    if q.dim() > 2 and k.shape[-3] != q.shape[-3]:
        num_heads, num_kv_heads = q.shape[-3], k.shape[-3]
        index = (turn.heads or neighbours)(num_heads, num_kv_heads)
        k, v = k.index_select(-3, index), None if v is None else v.index_select(-3, index)
    new, kv_len, head_dim = q.shape[-2], k.shape[-2], q.shape[-1]
    scale = turn.scale(head_dim, kv_len, q.shape[-3] if q.dim() > 2 else 1) if turn.scale else head_dim**-0.5
    scores = (q @ k.transpose(-2, -1)) * (1.0 if turn.after else scale)
    mask = (
        (turn.see or seen)(new, kv_len - new) if causal and turn.masked else torch.ones(new, kv_len, dtype=torch.bool)
    )
    if turn.hide == "before":
        scores = scores.masked_fill(~mask, HIDDEN)
    elif turn.hide == "zeros":
        scores = scores * mask
    elif turn.hide == "added":
        scores = scores + mask
    elif turn.hide == "weak":
        scores = scores.masked_fill(~mask, turn.weak)
    weights = turn.norm(scores) if turn.norm else scores if turn.axis is None else scores.softmax(turn.axis)
    weights = weights * mask if turn.hide == "after" else weights
    weights = weights * scale if turn.after else weights
    return weights if v is None or not turn.blend else weights @ v


def neighbours(num_heads: int, num_kv_heads: int) -> Tensor:
    """KV head h // (num_heads // num_kv_heads): the right one."""
    return torch.arange(num_heads) // (num_heads // num_kv_heads)


def seen(new: int, held: int) -> Tensor:
    """Row i stands at position held + i and sees everything up to itself."""
    return torch.ones(new, new + held, dtype=torch.bool).tril(held)


def triangle(shift: Callable[[int, int], int]) -> Callable[[int, int], Tensor]:
    """A triangle whose diagonal is somewhere else."""
    return lambda new, held: torch.ones(new, new + held, dtype=torch.bool).tril(shift(new, held))


def cache_hidden(new: int, held: int) -> Tensor:
    """New tokens see each other, and nothing that is held."""
    mask = seen(new, held)
    mask[:, :held] = False
    return mask


def cache_and_itself(new: int, held: int) -> Tensor:
    """New tokens see what is held and themselves."""
    return torch.cat((torch.ones(new, held, dtype=torch.bool), torch.eye(new, dtype=torch.bool)), dim=1)


def above(scores: Tensor) -> Tensor:
    """exp() of scores, each row's largest subtracted."""
    return (scores - scores.amax(-1, keepdim=True)).exp()


def over(scores: Tensor, start: int) -> Tensor:
    """One softmax over all dimensions from `start` on."""
    return scores.flatten(start).softmax(-1).view_as(scores)


SCALE = "the line that makes the scores: once, by 1 / sqrt(head_dim)"
MASK = "the mask: row i stands at position kv_len - new_tokens + i, and sees the keys up to its own"
SOFTMAX = "dim= of softmax, counted from the end: the keys are the last dimension"
HEADS = "query head h reads KV head h // (num_heads // num_kv_heads): neighbours share"
ORDER = "the order of the steps: product, scale, mask, softmax, product with V"

TURNS: tuple[tuple[str, Turn, str, str, str], ...] = (
    ("no-scale", Turn(scale=lambda d, n, h: 1.0), "the scores were not divided by sqrt(head_dim)", SCALE,
     "the weights are sharper than they should be"),
    ("scale-twice", Turn(scale=lambda d, n, h: 1 / d), "the scores were divided by head_dim, not by its square root",
     SCALE, "the weights are flatter than they should be"),
    ("scale-up", Turn(scale=lambda d, n, h: d**0.5), "the scores were multiplied by sqrt(head_dim) instead of divided",
     SCALE, "nearly all weight sits on one key"),
    ("scale-by-keys", Turn(scale=lambda d, n, h: n**-0.5), "the root was taken of the number of keys, not of head_dim",
     SCALE, "the scale depends on how many keys there are"),
    ("scale-by-hidden", Turn(scale=lambda d, n, h: (d * h) ** -0.5),
     "the root was taken of all heads' dimensions together, not of one head's", SCALE,
     "the scale depends on how many heads there are"),
    ("fixed-scale", Turn(scale=lambda d, n, h: 1 / 8), "the number 8 was written down: the root of a head_dim of 64",
     "take head_dim from the tensors: q.shape[-1]", "the scores were divided by 8, whatever head_dim is"),
    ("scale-after", Turn(after=True), "the division came after softmax", ORDER, "the weights do not sum to 1"),
    ("no-mask", Turn(masked=False), "no key is hidden: new tokens see the ones behind them", MASK,
     "every row sees every key"),
    ("mask-offset", Turn(see=triangle(lambda new, held: 0)),
     "row i of the mask was taken for position i, as if nothing were held before", MASK,
     "the first new token sees one key, however many are held"),
    ("mask-offset-too-large", Turn(see=triangle(lambda new, held: held + 1)), "the mask's offset is one too large",
     MASK, "every token sees one key of its future"),
    ("blind-to-itself", Turn(see=triangle(lambda new, held: held - 1)),
     "the mask's offset is one too small, or `<` stands for `<=`", MASK, "no token sees itself"),
    ("offset-is-new-tokens", Turn(see=triangle(lambda new, held: new)),
     "the triangle was shifted by the new tokens, not by those that are held", MASK,
     "the offset grows with the new tokens"),
    ("offset-negative", Turn(see=triangle(lambda new, held: -held)), "the offset has the wrong sign", MASK,
     "the more is held, the less a token sees"),
    ("mask-inverted", Turn(see=lambda new, held: ~seen(new, held)),
     "the mask is upside down: True was taken for hidden", "what True means in this mask: this key may be seen",
     "tokens see what is behind them and not what is before"),
    ("cache-hidden", Turn(see=cache_hidden), "the mask's columns for held tokens hide them", MASK,
     "new tokens see each other, and nothing that is held"),
    ("mask-multiplied", Turn(hide="zeros"), "hidden scores were set to 0; exp(0) is 1, so they still get weight",
     "what softmax must get for a hidden key: -inf", "hidden keys get weight"),
    ("mask-added", Turn(hide="added"), "the mask was added as numbers: 0 and 1 hide nothing",
     "a bool mask with masked_fill, or -inf where a key is hidden", "nothing is hidden, some keys only weigh more"),
    ("mask-after", Turn(hide="after"), "the mask came after softmax, so that what is left does not sum to 1", ORDER,
     "rows that should hide keys sum to less than 1"),
    *(("mask-weak", Turn(hide="weak", weak=weak), f"hidden scores were set to {weak:g}, which scores may come near",
       "what softmax must get for a hidden key: -inf", "hidden keys get weight where scores are large")
      for weak in (-100.0, -1.0, -5.0, -10.0, -50.0)),
    ("new-tokens-unseen", Turn(see=cache_and_itself),
     "a new token sees what is held and itself, and no new token before it", MASK, "new tokens do not see each other"),
    ("window", Turn(see=lambda new, held: seen(new, held).triu(held - new)),
     "the mask hides the oldest keys too: each row sees as many keys as there are new tokens, and itself", MASK,
     "the oldest keys are out of sight"),
    ("window", Turn(see=lambda new, held: seen(new, held).triu(held - new + 1)),
     "the mask hides the oldest keys too: each row sees as many keys as there are new tokens", MASK,
     "the oldest keys are out of sight"),
    ("axis", Turn(axis=-2), "softmax ran along the queries", SOFTMAX, "each column sums to 1; each row should"),
    ("axis-heads", Turn(axis=-3), "softmax ran along the heads", SOFTMAX,
     "the same place of all heads together sums to 1"),
    ("one-sum", Turn(norm=lambda s: over(s, -2)), "softmax ran over queries and keys together", SOFTMAX,
     "all rows of a head together sum to 1; each row should"),
    ("one-sum", Turn(norm=lambda s: over(s, 1) if s.dim() > 2 else s.softmax(-1)),
     "softmax ran over all heads together", SOFTMAX, "all heads together sum to 1; each row should"),
    ("one-sum", Turn(norm=lambda s: over(s, 0)), "softmax ran over everything", SOFTMAX,
     "all weights together sum to 1; each row should"),
    ("no-sum", Turn(norm=lambda s: s.exp()), "exp() is there, the division by the row's sum is not",
     "softmax: exp(score) / sum of exp(score)", "rows do not sum to 1"),
    ("no-sum", Turn(norm=above), "exp() is there, the division by the row's sum is not",
     "softmax: exp(score) / sum of exp(score)", "rows do not sum to 1"),
    ("by-length", Turn(norm=lambda s: torch.nn.functional.normalize(above(s), dim=-1)),
     "exp(score) was divided by the row's length, the root of the sum of squares, as F.normalize does",
     "softmax: exp(score) / sum of exp(score)", "the squares of a row sum to 1, its weights do not"),
    ("no-softmax", Turn(axis=None), "softmax is missing", ORDER, "scores are used as weights"),
    ("head-mapping", Turn(heads=lambda h, kv: torch.arange(h) % kv),
     "query head h was sent to KV head h % num_kv_heads, as repeat or tile do", HEADS,
     "query heads alternate between KV heads; neighbours should share one"),
    ("first-kv-head", Turn(heads=lambda h, kv: torch.zeros(h, dtype=torch.long)),
     "every query head was given the first KV head", HEADS, "all query heads read one KV head"),
    ("heads-reversed", Turn(heads=lambda h, kv: neighbours(h, kv).flip(0)), "the KV heads are in reverse order", HEADS,
     "the first query heads read the last KV head"),
    ("no-values", Turn(blend=False), "the weights came back; they were not multiplied with V", ORDER,
     "a row has as many numbers as there are keys"),
)  # fmt: skip


def suspects(q: Tensor, k: Tensor, v: Tensor | None = None, *, causal: bool = True) -> list[Suspect]:
    """What each wrong turn gives for these inputs, computed when it is asked for; always in the same order.

    causal: whether the blank hides the future; without, the turns that concern the mask give nothing.
    """
    grouped = q.dim() > 2 and q.shape[-3] != k.shape[-3]
    listed = []
    for diagnosis, turn, cause, look, saw in TURNS:
        about_mask = not turn.masked or turn.see or turn.hide != "before"
        applies = (causal or not about_mask) and (grouped or not turn.heads) and (q.dim() > 2 or turn.axis != -3)
        listed.append(Suspect(
            diagnosis, [lambda turn=turn: attend(q, k, v, turn, causal=causal)] if applies else [], cause, look, saw,
        ))  # fmt: skip
    if v is not None:
        listed += mixed_up(q, k, v, causal=causal)
    return listed


def now_and_then(q: Tensor, k: Tensor, v: Tensor, listed: Iterable[Suspect]) -> list[Suspect]:
    """The same suspects, each also as a mistake that is made now and then: for several new tokens only, since one needs
    no mask; only where something is held, or only where nothing is; and with zeros, which PyTorch gives, for rows that
    see nothing."""

    def one_way(give: Callable[[], Any], zeros: bool, least: int, past: int) -> Any:
        new, held = q.shape[-2], k.shape[-2] - q.shape[-2]
        if new < least or held < past or (past < 0 and held):
            return attend(q, k, v)
        return give().nan_to_num(0.0) if zeros else give()

    ways = [(zeros, least, past) for past in (0, 1, -1) for zeros in (False, True) for least in (1, 2)]
    return [
        replace(suspect, gives=[
            partial(one_way, give, *way) for give in suspect.variants for way in ways
        ])
        for suspect in listed
    ]  # fmt: skip


def mixed_up(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> list[Suspect]:
    """The right steps on the wrong tensors, or on dimensions in the wrong order."""
    heads, square = q.dim() > 2, q.shape[:-1] == k.shape[:-1]
    right = partial(attend, causal=causal)
    return [
        Suspect("k-and-v-swapped", [lambda: right(q, v, k)] if k.shape == v.shape else [], "K and V changed places",
                "queries meet keys, weights meet values", "the scores are those of queries with values"),
        Suspect("weights-transposed", [lambda: right(q, k, None).transpose(-2, -1) @ v] if square else [],
                "the weights were transposed before they met V", "queries are rows, keys are columns",
                "every key's value was spread over the queries"),
        Suspect("tokens-and-heads-mixed", [lambda: right(q.transpose(-3, -2).reshape(q.shape), k, v)] if heads else [],
                "a reshape ran over heads and tokens in another order than they lie in",
                "the dimensions in order: [..., num_heads, tokens, head_dim]",
                "heads read the queries of other tokens"),
        Suspect("tokens-and-heads-mixed", [lambda: right(q, k, v).transpose(-3, -2).reshape(*q.shape[:-1], -1)] if heads
                else [], "the result's heads and tokens were exchanged by a reshape",
                "transpose moves dimensions, reshape does not", "the right numbers stand in other places"),
    ]  # fmt: skip
