"""07.5: SnapKV's scores."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.course.checks.attention import Turn, attend
from labkit.course.checks.attention import suspects as attention_suspects
from labkit.course.checks.suspects import Suspect
from labkit.course.checks.tensors import agree
from labkit.course.checks.trials import Case, compare, described
from labkit.labs.lab07.references import snapkv_scores
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

INF = float("inf")
RIGHT = Turn()
Pooling = Callable[[Tensor, int], Tensor]


def mean_pool(x: Tensor, pool: int) -> Tensor:
    """The mean over `pool` places, zeros beyond the ends."""
    return F.avg_pool1d(x, pool, stride=1, padding=pool // 2)


def finish(mean: Tensor, window: int, pool: int, *, pooling: Pooling = mean_pool, zero: bool = True,
           end: float | None = INF, last: int | None = None) -> Tensor:  # fmt: skip
    """From mean weights to scores. zero: whether the window counts as 0. end: what the last `last` (window) get."""
    x = mean.clone()
    if zero:
        x[..., -window:] = 0
    x = pooling(x, pool)
    if end is not None:
        x[..., x.shape[2] - (window if last is None else last) :] = end
    return x


def right(q: Tensor, k: Tensor, window: int, pool: int) -> Tensor:
    """The reference; of float64, computed in float64 throughout and rounded once."""
    if not wide(q.dtype):
        return snapkv_scores(q, k, window, pool)
    return finish(of_kv_heads(exact_weights(q[:, :, -window:], k).mean(2), k.shape[1]), window, pool).float()


def one_sided(x: Tensor, left: int, right: int) -> Tensor:
    """The mean over so many places before and behind."""
    return F.avg_pool1d(F.pad(x, (left, right)), left + right + 1, stride=1)


def suspects(q: Tensor, k: Tensor, window: int, pool: int) -> list[Suspect]:
    """What goes wrong in pooling, in the mean, in the window; then in any attention."""
    num_kv_heads, tokens, half = k.shape[1], k.shape[2], pool // 2
    group = q.shape[1] // num_kv_heads

    def weights(turn: Turn = RIGHT) -> Tensor:
        return attend(q[:, :, -window:], k, None, turn)

    def each(by_head: Tensor) -> Tensor:
        return of_kv_heads(by_head, num_kv_heads)

    def scored(by_head: Tensor, **other: Any) -> Tensor:
        return finish(each(by_head), window, pool, **other)

    def mean(**other: Any) -> Tensor:
        return scored(weights().mean(2), **other)

    def before_only(by_head: Tensor) -> Tensor:
        x = each(by_head)
        return finish(F.pad(x, (0, tokens - x.shape[2])), window, pool)

    def cut(pooling: Pooling) -> Tensor:
        """Pooled without the window, which is put behind it."""
        pooled = pooling(each(weights().mean(2))[..., :-window], pool)
        return F.pad(pooled, (0, tokens - pooled.shape[2]), value=INF)

    def infinite_first() -> Tensor:
        x = each(weights().mean(2))
        x[..., -window:] = INF
        return mean_pool(x, pool)

    def inside(x: Tensor, pool: int) -> Tensor:
        return F.avg_pool1d(x, pool, stride=1, padding=half, count_include_pad=False)

    def max_pool(x: Tensor, pool: int) -> Tensor:
        return F.max_pool1d(x, pool, stride=1, padding=half)

    def none(x: Tensor, pool: int) -> Tensor:
        return x

    def future() -> Tensor:
        return q[:, :, -window:] @ k.repeat_interleave(group, 1).mT * q.shape[3] ** -0.5

    apart = Turn(heads=lambda h, kv: torch.arange(h) % kv)
    heads = "the query heads: neighbours share a KV head, and their mean is taken"
    queries = "the queries: the last `window` of q, and the mean of their weights"
    neighbours = "the pooling: the mean over the token's own place and pool // 2 on either side"
    window_zero = "what the window's places hold while the others are pooled: 0"
    window_last = "the last `window` places of what is returned: infinity"
    listed = [
        Suspect("pooled-over-window", [lambda: mean(zero=False)],
                "the window's own tokens were pooled into their neighbours", window_zero,
                "tokens before the window get some of the window's own weights"),
        Suspect("infinity-pooled", [infinite_first, lambda: finish(infinite_first(), window, pool, pooling=none,
                                                                   zero=False)],
                "infinity was filled in before pooling, and spread to the neighbours", window_last),
        Suspect("max-pooled", [lambda: mean(pooling=max_pool), lambda: mean(pooling=max_pool, zero=False),
                               lambda: cut(max_pool)],
                "the greatest of the places was taken, not their mean", neighbours),
        Suspect("ends-not-counted", [lambda: mean(pooling=inside), lambda: cut(inside), lambda: mean(
                    pooling=inside, zero=False)],
                "places beyond an end were left out of the mean; they count as 0, and pool is what is divided by",
                neighbours),
        Suspect("summed-places", [lambda: mean(pooling=lambda x, pool: mean_pool(x, pool) * pool)],
                "the places were summed, not averaged", neighbours),
        Suspect("not-pooled", [lambda: mean(pooling=none)], "nothing was pooled", neighbours),
        Suspect("one-sided", [lambda: mean(pooling=lambda x, p: one_sided(x, p - 1, 0)),
                              lambda: mean(pooling=lambda x, p: one_sided(x, 0, p - 1)),
                              lambda: mean(pooling=lambda x, p: one_sided(x, half, 0)),
                              lambda: mean(pooling=lambda x, p: one_sided(x, 0, half))],
                "places on one side only were pooled", neighbours),
        Suspect("pool-on-each-side", [lambda: mean(pooling=lambda x, p: one_sided(x, p, p))],
                "`pool` places on either side were pooled; pool is how many in all", neighbours),
        Suspect("pooled-again", [lambda: mean(pooling=lambda x, p: mean_pool(mean_pool(x, p), p))],
                "the places were pooled twice", neighbours),
        Suspect("window-finite", [lambda: mean(end=None), lambda: mean(end=0.0), lambda: mean(zero=False, end=None),
                                  lambda: mean(end=1.0), lambda: mean(end=-INF),
                                  lambda: mean(zero=False, end=0.0)],
                "the last `window` tokens did not get infinity", window_last),
        Suspect("window-one-off", [lambda: mean(last=window - 1), lambda: mean(last=window + 1)],
                "one token too many or too few got infinity", window_last),
        Suspect("window-keys-cut", [lambda: before_only(softmax(future()[..., :-window]).mean(2)),
                                    lambda: before_only(attend(q[:, :, -window:], k[:, :, :-window], None).mean(2))],
                "the window's own keys were cut off before softmax, so that the others share all attention",
                "the order: softmax over all tokens first, then the window's places are set to 0"),
        Suspect("window-unmasked", [lambda: scored(softmax(future()).mean(2))],
                "the window's queries see each other's future", "the mask: causal attention over all tokens"),
        Suspect("masked-from-the-start", [lambda: scored(softmax(future().masked_fill(
                    ~torch.ones(window, tokens, dtype=torch.bool).tril(), -INF)).mean(2))],
                "the window's queries were masked as if they were the first tokens of the text",
                "the mask: the window's query i stands at position tokens - window + i"),
        Suspect("sum-over-queries", [lambda: scored(weights().sum(2))],
                "the weights of the window's queries were summed; their mean is asked for", queries),
        Suspect("divided-by-tokens", [lambda: scored(weights().sum(2) / tokens)],
                "the sum was divided by all tokens, not by the window's queries", queries),
        Suspect("sum-over-heads", [lambda: scored(weights().mean(2) * group), lambda: scored(weights().sum(2) * group)],
                "the query heads of a KV head were summed; their mean is asked for", heads),
        Suspect("max-over-heads", [lambda: finish(weights().mean(2).unflatten(1, (num_kv_heads, group)).amax(2), window,
                                                  pool)],
                "of the query heads that share a KV head the greatest was taken, not the mean", heads),
        Suspect("max-over-queries", [lambda: scored(weights().amax(2))],
                "of the window's queries the greatest weight was taken, not the mean", queries),
        Suspect("first-head-of-group", [lambda: finish(weights().mean(2)[:, ::group], window, pool),
                                        lambda: finish(weights().mean(2)[:, :num_kv_heads], window, pool)],
                "one query head stands for all that share a KV head", heads),
        Suspect("mean-of-all-heads", [lambda: finish(weights().mean(2).mean(1, keepdim=True).expand(
                    -1, num_kv_heads, -1), window, pool)],
                "the mean was taken over all query heads of the layer", heads),
        Suspect("heads-apart", [lambda: finish(weights().mean(2).unflatten(1, (group, num_kv_heads)).mean(1), window,
                                               pool),
                                lambda: finish(weights(apart).mean(2).unflatten(1, (group, num_kv_heads)).mean(1),
                                               window, pool),
                                lambda: scored(weights(apart).mean(2))],
                "query heads were put together in strides, h % num_kv_heads, as repeat or tile do", heads),
        Suspect("first-queries", [lambda: scored(attend(q[:, :, :window], k, None).mean(2)),
                                  lambda: scored(attend(q, k, None)[:, :, :window].mean(2))],
                "the first queries were taken, not the last", queries),
        Suspect("all-queries", [lambda: scored(attend(q, k, None).mean(2)),
                                lambda: scored(attend(q, k, None).sum(2) / window),
                                lambda: scored(attend(q, k, None).sum(2))],
                "the weights of all queries were taken, not of the last `window`", queries),
        Suspect("newest-query-only", [lambda: scored(weights()[:, :, -1]),
                                      lambda: scored(weights()[:, :, -1] / window)],
                "only the newest query was asked", queries),
        Suspect("queries-before-window", [lambda: scored(attend(q, k, None)[:, :, :-window].mean(2)),
                                          lambda: scored(attend(q, k, None)[:, :, :-window].sum(2) / window)],
                "the queries before the window were asked, not those in it", queries),
        Suspect("window-and-pool-swapped", [lambda: finish(each(attend(q[:, :, -pool:], k, None).mean(2)), pool, window)
                                            if window % 2 and pool < tokens else None],
                "`window` and `pool` changed places", "each number where it belongs"),
    ]  # fmt: skip
    general = [
        Suspect(one.diagnosis, [partial(scores_of, give, k, window, pool) for give in one.variants], one.cause,
                one.look, one.seen)
        for one in attention_suspects(q[:, :, -window:], k)
    ]  # fmt: skip
    return listed + general


def softmax(scores: Tensor) -> Tensor:
    """Along the keys."""
    return scores.softmax(-1)


def scores_of(give: Callable[[], Tensor], k: Tensor, window: int, pool: int) -> Tensor | None:
    """What a suspect's weights come to."""
    weights = give()
    return finish(of_kv_heads(weights.mean(2), k.shape[1]), window, pool) if weights.shape[-1] == k.shape[2] else None


class SnapKVScores(Scores):
    """SnapKV."""

    id, title, minutes, difficulty = "07.5", "What the last queries look at", 8, 3
    needs = ("07.3",)
    reference = staticmethod(snapkv_scores)
    infinite = True
    why = (
        "The last `window` queries see the whole prompt, so that their weights cost window rows and not tokens rows. "
        "The window's places are 0 while the others are pooled, and infinity only when that is done."
    )
    hints = (
        "Which of your functions gives the weights that each key gets from a few queries, summed?",
        "attention_received(q[:, :, -window:], k, window) / window is the mean. F.avg_pool1d takes [batch, channels, "
        "length] and fills up with zeros: padding=pool // 2. When must the window be 0, when infinity?",
        "received = attention_received(q[:, :, -window:], k, window) / window\nreceived[..., -window:] = 0\n"
        "pooled = F.avg_pool1d(received, pool, stride=1, padding=pool // 2)\n# then infinity for the window",
    )
    hints_for: ClassVar = {
        "pooled-over-window": "The token before the window has a neighbour in it. What should that one count?",
        "infinity-pooled": "What is the mean of 0.1 and infinity?",
        "sum-over-queries": "The docstring says mean. Of how many queries?",
        "all-queries": "Which slice of q are the last `window` queries?",
        "all-queries-weighed": "Slice q before the product, not the weights after it.",
        "window-keys-cut": "A query gives much weight to its own neighbours. Who gets it when they are cut off?",
        "max-pooled": "The docstring says which of mean and maximum.",
        "ends-not-counted": "pool is 3: what is the first token's sum divided by, 2 or 3?",
        "window-finite": "The window is always kept: which score makes sure of that?",
    }

    def examine(self, answer: Callable) -> None:
        """Windows of one token and of all but one, pools from 1 to wider than the text; large scores; the work."""
        what = "the scores"
        cases = [
            Case((*pair(6, 3, 12, 0, 2, 8), 4, 3)),
            Case((*pair(10, 2, 17, 0, 3, 12), 5, 5)),
            Case((*pair(4, 4, 9, 0, 1, 16), 1, 3), "a window of one token"),
            Case((*pair(12, 4, 7, 0, 2, 20), 6, 1), "one token before the window, pool 1"),
            Case((*pair(7, 1, 11, 0, 1, 24), 2, 7)),
            Case((*pair(8, 2, 6, 0, 1, 12), 3, 9), "a pool wider than the text"),
            Case((*pair(4, 2, 300, 0, 1, 8), 32, 5)),
        ]
        self.check_infinity(answer, cases[0])
        compare(type(self), answer, right, cases, suspects=suspects, what=what,
                dtypes=(torch.bfloat16, torch.float16))  # fmt: skip
        check_large(type(self), answer, right, (*large(*pair(6, 2, 14, 0, 2, 8)), 5, 3))
        far = Case((*far_down(6, 2, 9, 0), 4, 3), "all scores near -100,000")
        check_far_down(type(self), answer, right, suspects, cases, far)
        self.check_work(answer)

    def check_infinity(self, answer: Callable, case: Case) -> None:
        """All is right but the window, which has finite numbers."""
        got, want = self.call(answer, *case.args), right(*case.args)
        last = want == INF
        if isinstance(got, Tensor) and got.shape == want.shape and got[last].isfinite().all() and agree(
                got[~last], want[~last], 1e-5):  # fmt: skip
            self.fail("window-finite", seen=f"with {described(snapkv_scores, case)}: the window's tokens get "
                      f"{got[last].amax():g} at most; they should get infinity",
                      cause="the last `window` tokens keep what they have, or a number stands for infinity: a score "
                      "may be greater", look="the last `window` places of what is returned")  # fmt: skip

    def check_work(self, answer: Callable) -> None:
        """Of 120 tokens with a window of 5, how many queries are weighed."""
        num_heads, tokens, window = 4, 120, 5
        q, k = pair(num_heads, 2, tokens, 0, 1, 8)
        rows = check_rows(type(self), partial(answer, q, k, window, 3), tokens, num_heads * window, num_heads * tokens)
        if rows > num_heads * window:
            self.fail("all-queries-weighed",
                      seen=f"{tokens} tokens, {num_heads} heads, window {window}: the scores are right, and {rows} "
                      f"rows of weights were made, of which the window has {num_heads * window}",
                      cause="weights were made of queries that are not asked, and cut or hidden afterwards",
                      look="the slice of q before the product: q[:, :, -window:]")  # fmt: skip
