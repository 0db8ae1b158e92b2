"""07.2: the tokens of the highest scores, each KV head its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, ClassVar

import torch
from torch import Tensor

from labkit.course.checks.effort import check_stays, effort_of
from labkit.course.checks.suspects import Suspect
from labkit.course.checks.tensors import agree, draw, shifted
from labkit.course.checks.trials import Case, compare, described, same_kind
from labkit.course.exercise import Exercise, NotYet
from labkit.labs.lab07.references import keep_best
from labkit.ledger import memory_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PARTS = ("K", "V", "the positions")
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, int]


def layer(batch: int, num_kv_heads: int, tokens: int, head_dim: int, budget: int, *, seed: int = 0,
          whole: torch.dtype = torch.int64) -> Arguments:  # fmt: skip
    """Random k and v, positions with gaps, scores that all differ, in any dtype: quarters of whole numbers up to 255.

    Every KV head of every row has positions and an order of its own; with an odd seed, positions are in the thousands.
    """
    generator = torch.Generator().manual_seed(shifted(seed))
    k, v = (draw(batch, num_kv_heads, tokens, head_dim, seed=2 * seed + n) for n in range(2))
    shape = (batch, num_kv_heads, tokens)
    positions = (torch.randint(1, 4, shape, generator=generator).cumsum(-1) - 1 + 5000 * (seed % 2)).to(whole)
    order = torch.rand(shape, generator=generator).argsort(-1).double()
    return k, v, positions, (order - tokens // 3) / 4, budget


def gathered(x: Tensor, index: Tensor) -> Tensor:
    """The tokens at `index` [batch, num_kv_heads, kept]."""
    return x.gather(2, index if x.dim() == 3 else index[..., None].expand(*index.shape, x.shape[3]))


def wrong_choices(scores: Tensor, budget: int) -> list[tuple[str, list[Callable[[], Tensor]], str, str]]:
    """Which tokens people keep instead: (diagnosis, indices [batch, num_kv_heads, kept], cause, look)."""
    tokens, count = scores.shape[2], min(budget, scores.shape[2])

    def top(x: Tensor, largest: bool = True) -> Tensor:
        return x.topk(count, dim=-1, largest=largest).indices.sort(dim=-1).values.expand(*scores.shape[:2], count)

    def by_mask(mask: Tensor) -> Tensor:
        return torch.arange(tokens).expand(scores.shape)[mask].view(*scores.shape[:2], count)

    def range_of(first: int) -> Tensor:
        return torch.arange(first, first + count).expand(*scores.shape[:2], count)

    every = "scores [batch, num_kv_heads, tokens]: along which dimension is chosen, and for whom?"
    return [
        ("order", [lambda: scores.topk(count, dim=-1).indices,
                   lambda: scores.topk(count, dim=-1).indices.flip(-1),
                   lambda: scores.topk(count, dim=-1, sorted=False).indices],
         "the right tokens stand in the order of their scores, as topk or argsort gives them",
         "the indices: sort them before anything is gathered"),
        ("lowest", [lambda: top(scores, False), lambda: scores.topk(count, dim=-1, largest=False).indices,
                    lambda: scores.topk(count, dim=-1, largest=False).indices.flip(-1)],
         "the tokens with the lowest scores are kept", "which end of the order: topk gives the largest"),
        ("one-choice", [
            lambda: top(scores.mean(1, keepdim=True)), lambda: top(scores.amax(1, keepdim=True)),
            lambda: top(scores.mean((0, 1), keepdim=True)), lambda: top(scores.mean(0, keepdim=True)),
            lambda: top(scores.amax((0, 1), keepdim=True))],
         "several KV heads, or rows, share one choice: by the mean of their scores, or the greatest", every),
        ("first-head-for-all", [lambda: top(scores[:, :1]), lambda: top(scores[:1]), lambda: top(scores[:1, :1])],
         "the choice of the first KV head, or of the first row, was taken for all", every),
        ("order-for-rank", [
            lambda: by_mask(scores.argsort(-1, descending=True) < count),
            lambda: by_mask(scores.argsort(-1) >= tokens - count), lambda: by_mask(scores.argsort(-1) < count)],
         "what argsort gives was taken for each token's rank: its entry i is the token that comes i-th",
         "what the numbers of argsort mean: indices of tokens, to be gathered with"),
        ("absolute", [lambda: top(scores.abs())], "the sign of the scores was dropped", "a score may be negative"),
        ("first-tokens", [lambda: range_of(0)], "the first `budget` tokens are kept, whatever their scores", every),
        ("newest-tokens", [lambda: range_of(tokens - count)], "the last `budget` tokens are kept, whatever their "
         "scores", every),
        ("within-other-dimension", [lambda: gathered_order(scores, count)],
         "the order is that along another dimension: KV heads, or rows", "dim=-1: tokens are the last dimension"),
    ]  # fmt: skip


def now_and_then(ways: list[Callable[[], Tensor]], tokens: int, budget: int) -> list[Callable[[], Tensor]]:
    """The same choices, each also as one that is made only where there is something to choose."""

    def one_way(way: Callable[[], Tensor], least: int) -> Tensor:
        index = way()
        return index if tokens >= budget + least else torch.arange(tokens).expand(index.shape)

    return [partial(one_way, way, least) for least in (1, 0, -tokens - budget) for way in ways]


def gathered_order(scores: Tensor, count: int) -> Tensor:
    """Ranks along the KV heads, taken for indices of tokens."""
    return scores.argsort(1, descending=True)[..., :count].sort(dim=-1).values


def of_positions(k: Tensor, v: Tensor, positions: Tensor, scores: Tensor, budget: int) -> list[Suspect]:
    """What the mistakes give for the positions."""
    count = min(budget, k.shape[2])

    def index() -> Tensor:
        return scores.topk(count, dim=-1).indices.sort(dim=-1).values

    return [
        *(Suspect(name, [lambda way=way: positions.gather(2, way()) for way in now_and_then(ways, k.shape[2], budget)],
                  cause, look) for name, ways, cause, look in wrong_choices(scores, budget)),
        Suspect("index-for-position", [lambda: index().to(positions.dtype), lambda: scores.topk(count).indices.to(
                    positions.dtype)],
                "the indices came back: where a token lies in k, not where it stands in the text",
                "the positions: gathered like K and V"),
        Suspect("positions-of-others", [lambda: positions[:, :1].expand_as(positions).gather(2, index()),
                                        lambda: positions[:1].expand_as(positions).gather(2, index())],
                "the positions of the first KV head, or of the first row, were taken for all",
                "positions: each KV head of each row holds its own"),
        Suspect("renumbered", [lambda: torch.arange(count, dtype=positions.dtype).expand(*k.shape[:2], count)],
                "the tokens that stay were numbered anew", "the positions: gathered like K and V"),
    ]  # fmt: skip


def of_vectors(place: int, k: Tensor, v: Tensor, positions: Tensor, scores: Tensor, budget: int) -> list[Suspect]:
    """What the mistakes give for K (0) or V (1), where the positions are right."""
    own, other = ((k, v), (v, k))[place]
    count = min(budget, k.shape[2])

    def index() -> Tensor:
        return scores.topk(count, dim=-1).indices.sort(dim=-1).values

    return [
        Suspect("k-for-v", lambda: gathered(other, index()), "K and V changed places, or one was gathered twice",
                "the two lines that gather: k from k, v from v"),
        *(Suspect(name if name != "order" else "order-apart",
                  [lambda way=way: gathered(own, way()) for way in now_and_then(ways, k.shape[2], budget)],
                  f"the positions are right, and {PARTS[place]} beside them is chosen in another way: {cause}", look)
          for name, ways, cause, look in wrong_choices(scores, budget)),
        Suspect("index-is-position", [lambda: gathered(own, positions.long().gather(2, index()).clamp(
                    max=k.shape[2] - 1))],
                "vectors were looked up by position in the text: once tokens are gone, they lie elsewhere",
                "what gather takes: indices into k, not positions"),
    ]  # fmt: skip


class KeepBest(Exercise):
    """The highest scores."""

    id, title, minutes, difficulty = "07.2", "Keep the best", 7, 2
    reference = staticmethod(keep_best)
    why = (
        "topk says which tokens, each KV head its own; sorting the indices brings them back into the order they had. "
        "One index gathers all three, and gather makes new memory, so that nothing holds on to the old."
    )
    hints = (
        "Which function gives the indices of the largest numbers along a dimension? In which order?",
        "index = scores.topk(budget, dim=-1).indices is [batch, num_kv_heads, budget], in the order of the scores: "
        "sort it. positions.gather(2, index) takes it as it is; k needs it once for each channel.",
        "index = scores.topk(budget, dim=-1).indices.sort(dim=-1).values\n"
        "vectors = index[..., None].expand(-1, -1, -1, k.shape[3])\nk.gather(2, vectors), ...",
    )
    hints_for: ClassVar = {
        "order": "topk gives the best first. .sort(dim=-1) of the indices gives the order that the tokens had.",
        "one-choice": "Two KV heads, two rows of scores: may they keep different tokens?",
        "budget-beyond-tokens": "topk cannot give 9 of 5. What is to be returned then?",
        "keeps-old-memory": "A slice is as large as what it was cut from, to whoever counts memory.",
        "index-for-position": "The third token held may stand at position 40 of the text.",
        "order-for-rank": "scores 3, 9, 5: argsort(descending=True) gives 1, 2, 0. Which of these belongs to token 0?",
        "equal-scores": "Count what your rule keeps of five tokens of the same score, with a budget of 2.",
    }

    def examine(self, answer: Callable) -> None:
        """Which tokens, then their vectors; then equal scores, memory, and whether all stays in PyTorch."""
        cases = [
            Case(layer(2, 3, 9, 4, 5)),
            Case(layer(2, 3, 9, 4, 5, seed=12), "other positions"),
            Case(layer(3, 2, 12, 8, 7, seed=1)),
            Case(layer(1, 4, 7, 6, 1, seed=2, whole=torch.int32), "a budget of one token"),
            Case(layer(2, 2, 6, 5, 6, seed=3), "as many tokens as the budget"),
            Case(layer(1, 3, 5, 2, 9, seed=4), "fewer tokens than the budget"),
            Case(layer(4, 1, 40, 3, 17, seed=5)),
            Case(layer(1, 1, 1, 4, 1, seed=6), "one token"),
            Case(layer(2, 1, 4, 5, 2, seed=10)),
            Case(layer(1, 2, 8, 3, 12, seed=11), "fewer tokens than the budget"),
            Case(layer(2, 5, 200, 2, 3, seed=7, whole=torch.int32)),
            Case(close(layer(2, 2, 30, 3, 11, seed=8)), "scores that differ in the seventh digit"),
        ]
        got = self.call(answer, *cases[0].args)
        self.check_beyond(answer, cases[5].args)
        same_kind(type(self), got, keep_best(*cases[0].args), "the result", told(cases[0].args))
        parts: list[tuple[int, Callable]] = [
            (2, of_positions),
            (0, partial(of_vectors, 0)),
            (1, partial(of_vectors, 1)),
        ]
        for place, suspects in parts:
            own, right = (part(function, place) for function in (answer, keep_best))
            compare(type(self), own, right, cases, suspects=suspects, what=PARTS[place], exact=True, dtypes=DTYPES)
        self.check_precision(answer)
        self.check_ties(answer)
        self.check_memory(answer, cases[2].args)
        args = layer(2, 2, 14, 4, 6, seed=9)  # one head's indices may be a list
        check_stays(type(self), effort_of(lambda: self.run(lambda: answer(*args))))

    def check_beyond(self, answer: Callable, args: Arguments) -> None:
        """Fewer tokens than the budget: whatever is raised is about that, if a smaller budget is taken."""
        try:
            self.call(answer, *args)
        except NotYet as not_yet:
            try:
                self.call(answer, *args[:4], args[0].shape[2] - 1)
            except NotYet:
                raise not_yet from None
            if not_yet.finding.diagnosis != "raised":
                raise
            self.fail("budget-beyond-tokens", seen=not_yet.finding.seen,
                      cause="a smaller budget is taken; with fewer tokens than the budget there is nothing to choose",
                      look="what happens when k.shape[2] is no more than budget: all tokens stay")  # fmt: skip

    def check_precision(self, answer: Callable) -> None:
        """Scores in float32 beside K and V in half precision: they are compared as they are."""
        for dtype in (torch.bfloat16, torch.float16):
            k, v, positions, scores, budget = close(layer(2, 2, 30, 3, 11, seed=8))
            args = (k.to(dtype), v.to(dtype), positions, scores.float(), budget)
            got, want = self.call(answer, *args)[2], keep_best(*args)[2]
            if not torch.equal(got.long(), want.long()):
                self.fail("rounds-scores", seen=f"{told(args)}, scores that differ in the seventh digit: positions "
                          f"{got[0, 0].tolist()} are kept, and {want[0, 0].tolist()} have the highest scores",
                          cause=f"the scores were rounded, as to k's dtype, {dtype}, before they were compared",
                          look="what is done with scores before the choice: nothing has to be")  # fmt: skip

    def check_ties(self, answer: Callable) -> None:
        """Equal scores, infinite ones among them: any of them may stay, as many as there is room for."""
        inf = float("inf")
        for name, values, budget in (
            ("all scores equal", [0.5], 4), ("three different scores", [1.25, -2.0, 0.0], 5),
            ("scores of -inf", [-inf, -inf, 1.5, -inf], 6), ("scores of infinity", [inf, 0.25, inf, -1.0], 3),
            ("scores of 0 and -0", [0.0, -0.0], 7),
        ):  # fmt: skip
            k, v, positions, scores, _ = layer(2, 3, 11, 4, budget, seed=budget)
            scores = torch.tensor(values, dtype=scores.dtype)[(scores * 4).long() % len(values)]
            args = (k, v, positions, scores, budget)
            try:
                got = self.call(answer, *args)
                same_kind(type(self), got, keep_best(*args), "the result", f"{name}, {told(args)}")
            except NotYet as not_yet:
                self.fail_ties(name, not_yet.finding.seen)
            if trouble := off(got, args):
                self.fail_ties(name, trouble)

    def fail_ties(self, name: str, seen: str) -> None:
        """Right where all scores differ, and not here."""
        self.fail("equal-scores", seen=f"with {name}: {seen}. Where all scores differ and are finite, it was right",
                  cause="a test such as `score >= the smallest that stays` holds for more tokens, or fewer, than the "
                  "budget; or infinity was computed with",
                  look="how the choice is made: by a number of tokens, not by a value")  # fmt: skip

    def check_memory(self, answer: Callable, args: Arguments) -> None:
        """What comes back is alone in its memory."""
        got = self.call(answer, *args)
        old = {memory_of(x) for x in args[:4]}
        held = {memory_of(x): x.untyped_storage().nbytes() for x in got}
        own, behind = sum(x.nbytes for x in got), sum(held.values())
        if old & held.keys() or behind > 1.5 * own:
            self.fail(
                "keeps-old-memory",
                seen=f"{told(args)}: {own:,} bytes came back, and the memory behind them has {behind:,}",
                cause="a slice or a view of a larger tensor came back: as long as it lives, so does all of that memory",
                look="what is done last: gather and indexing make new tensors, a slice does not; clone() does",
            )


def part(function: Callable, place: int) -> Callable:
    """The function with one part of its result; the others must be there too."""

    @wraps(function)
    def one(*args: Any) -> Any:
        result = function(*args)
        return result[place] if isinstance(result, (tuple, list)) and len(result) == 3 else result

    return one


def close(args: Arguments) -> Arguments:
    """Scores that differ little: 1 and a few millionths."""
    k, v, positions, scores, budget = args
    return k, v, positions, 1 + scores * 4e-6, budget


def told(args: Arguments) -> str:
    """A call in words."""
    return f"with {described(keep_best, Case(args))}"


def off(got: tuple[Tensor, Tensor, Tensor], args: Arguments) -> str:
    """What is wrong with a choice among equals, in words; nothing when it is a right one."""
    k, v, positions, scores, budget = args
    kept = got[2].long()
    index = torch.searchsorted(positions.contiguous(), got[2].contiguous()).clamp(max=k.shape[2] - 1)
    if not torch.equal(positions.gather(2, index).long(), kept):
        return "a position came back that was not there"
    if not (kept.diff(dim=-1) > 0).all():
        return "the positions that came back do not ascend"
    best, mine = (x.sort(dim=-1).values for x in (scores.topk(budget, dim=-1).values, scores.gather(2, index)))
    if not torch.equal(best, mine):
        return f"the lowest score kept is {mine.amin():g}; {budget} tokens have {best.amin():g} or more"
    for name, x, own in (("K", got[0], k), ("V", got[1], v)):
        if not agree(x, gathered(own, index), 0.0):
            return f"{name} is not that of the positions that came back"
    return ""
