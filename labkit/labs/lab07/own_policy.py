"""07.7: a policy that a learner wrote, asked by itself and in a cache beside the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from labkit.attention import Constants, Visibility
from labkit.cache import Cache
from labkit.cache.evicting import Held, Notes, Policy, Seen
from labkit.course.checks.suspects import Suspect, accuse
from labkit.course.checks.tensors import agree, budget, draw, first_place, shape_difference
from labkit.course.exercise import Exercise
from labkit.labs.lab07.references import LastLook

# Bounded: a mean of float32 weights, in another order or in float32 from float64.
CLOSE = 1e-6
# num_heads, num_kv_heads, head_dim, batch, layers, budget, sinks, recent, and the tokens of each step.
SCRIPTS = (
    (6, 2, 8, 2, 3, 7, 0, 0, (15, 1, 1, 1, 1, 4, 1)),
    (4, 4, 6, 1, 2, 5, 1, 2, (3, 1, 1, 1, 1, 1, 1, 1)),
    (8, 2, 4, 3, 1, 9, 2, 1, (6, 5, 7, 1, 1, 2)),
    (3, 1, 10, 1, 2, 4, 0, 1, (30, 1, 1, 1)),
)


def looked(num_heads: int, num_kv_heads: int, new: int, before: int, *, batch: int = 1, head_dim: int = 8,
           dtype: torch.dtype = torch.float32, seed: int = 0) -> Seen:  # fmt: skip
    """What a policy is shown after a step of `new` tokens behind `before` others, of which every KV head holds its own;
    something was noted before."""
    sizes = ((num_heads, new), (num_kv_heads, new + before), (num_kv_heads, new + before))
    q, k, v = (draw(batch, *size, head_dim, seed=3 * seed + n, dtype=dtype) for n, size in enumerate(sizes))
    tokens = new + before
    positions = (2 * torch.arange(tokens, dtype=torch.int32)).expand(batch, num_kv_heads, tokens).contiguous()
    newest = 2 * (tokens - 1)
    notes = Notes(draw(batch, num_kv_heads, tokens, seed=seed + 50, dtype=torch.float32).abs())
    query_positions = torch.arange(newest - new + 1, newest + 1)[None]
    visible = Visibility.newest(new, tokens)
    return Seen(k, v, positions, newest, Constants(), notes, q, query_positions, visible)


def held_of(seen: Seen, notes: Notes) -> Held:
    """What a policy is asked about afterwards."""
    return Held(seen.k, seen.v, seen.positions, seen.newest, seen.constants, notes)


def right(seen: Seen) -> tuple[Tensor, float]:
    """What is to be noted, float32, from products in float64, and how far a right answer may be off."""
    own = LastLook().watch(seen).tokens
    exact = LastLook().watch(replace(seen, q=seen.q.double(), k=seen.k.double(), v=seen.v.double())).tokens
    assert own is not None
    assert exact is not None
    return exact.float(), max(CLOSE, budget(own, exact))


def noted(seen: Seen) -> list[Suspect]:
    """What people note instead."""
    num_kv_heads, new = seen.k.shape[1], seen.q.shape[2]
    newest, every = seen.weights(1)[:, :, 0], seen.weights(new)

    def of_all(one: Tensor) -> Tensor:
        return one[:, None].expand(-1, num_kv_heads, -1)

    mean = of_all(newest.mean(1))
    heads = "over which heads the mean is taken: all query heads of the layer"
    query = "whose weights: seen.weights(1) has those of the newest query only"
    return [
        Suspect("by-kv-head", seen.received(1), "the mean was taken over the query heads of each KV head", heads),
        Suspect("sum-over-heads", of_all(newest.sum(1)), "the query heads were summed; their mean is asked for", heads),
        Suspect("max-over-heads", [of_all(newest.amax(1)), newest.unflatten(1, (num_kv_heads, -1)).amax(2)],
                "of the query heads the greatest weight was taken, not the mean", heads),
        Suspect("one-head", [of_all(newest[:, 0]), of_all(newest[:, -1]), newest[:, :num_kv_heads]],
                "one query head's weights were taken for a KV head, not the mean of all", heads),
        Suspect("all-queries", [of_all(every.mean((1, 2))), of_all(every.sum(2).mean(1)), seen.received(),
                                seen.received() / new],
                "the weights of all the step's queries were taken", query),
        Suspect("oldest-query", [of_all(every[:, :, 0].mean(1)), every[:, :, 0].unflatten(1, (num_kv_heads, -1)).mean(
                    2)],
                "the weights of the step's first query were taken", query),
        Suspect("added-up", [seen.tally + mean, seen.tally + seen.received(1), seen.tally + seen.received()],
                "the weights were added to what was noted before", "the return of watch: this step's weights, no more"),
        Suspect("even-over-tokens", [(mean.mean(-1, keepdim=True)).expand_as(mean)],
                "the mean was taken over the tokens: all get the same", "dim= of the mean: heads are dimension 1"),
        Suspect("nothing-noted", [seen.tally], "what was noted before came back",
                "the return of watch: Notes of this step's weights"),
    ]  # fmt: skip


class OwnPolicy(Exercise):
    """A policy in ten lines."""

    id, title, minutes, difficulty = "07.7", "A policy of your own", 7, 2
    reference = LastLook
    why = (
        "watch sees the queries, score does not: what it needs of them is noted. Notes are kept by the cache, layer by "
        "layer, and move with the tokens; the policy itself keeps nothing, so that one serves all layers."
    )
    hints = (
        "What does watch get that score does not? How does it reach score?",
        "seen.weights(1) is [batch, num_heads, 1, tokens]. Every KV head gets the same numbers: the mean over dim 1, "
        "expanded to seen.k.shape[1] heads.",
        "mean = seen.weights(1)[:, :, 0].mean(dim=1, keepdim=True)\n"
        "return Notes(mean.expand(-1, seen.k.shape[1], -1))\n# and score: held.tally",
    )
    hints_for: ClassVar = {
        "by-kv-head": "TOVA drops the same token in all heads of a layer. Over which heads is the mean?",
        "all-queries": "In a prompt's pass there are many queries. How many of them are the newest?",
        "on-self": "Three layers, one policy: watch, watch, watch, and then score. Whose weights are on self by then?",
        "not-notes": "Notes(x) around what you return.",
        "noted-shape": "x is [batch, num_kv_heads, tokens]; the mean over heads has lost a dimension.",
        "score-not-noted": "held.tally is what watch noted, moved along with the tokens.",
        "sum-over-heads": "The docstring says mean.",
    }

    def examine(self, answer: Callable) -> None:
        """The class; then what it notes, and says; then what a cache of several layers keeps by it."""
        self.check_class(answer)
        policy = self.run(answer)
        for place, case in enumerate(cases()):
            self.check_watch(policy, place, case)
        self.check_state(policy)
        for script in SCRIPTS:
            self.script(answer, script)

    def check_class(self, answer: Any) -> None:
        """A Policy, with Policy's parameters."""
        if not issubclass(answer, Policy):
            self.fail("not-a-policy", seen=f"{answer.__name__} is no Policy", cause="a cache asks a Policy only",
                      look="the first line of the class: class LastLook(Policy)")  # fmt: skip
        try:
            policy, plain = answer(sinks=2, recent=3), answer()
        except TypeError as error:
            if "abstract" in str(error):
                raise
            self.fail("parameters", seen=f"LastLook(sinks=2, recent=3): {error}",
                      cause="an __init__ of its own hides the parameters that every policy has",
                      look="leave __init__ out: sinks and recent are Policy's")  # fmt: skip
        if (policy.sinks, policy.recent) != (2, 3) or (plain.sinks, plain.recent) != (0, 0):
            self.fail("parameters", seen=f"LastLook(sinks=2, recent=3) has sinks {policy.sinks}, recent "
                      f"{policy.recent}; LastLook() has {plain.sinks} and {plain.recent}; both are 0 by default",
                      cause="the class sets what its parameters should say",
                      look="leave sinks and recent to Policy")  # fmt: skip

    def check_watch(self, policy: Policy, place: int, seen: Seen) -> None:
        """What is noted of one step, then what score says of it."""
        want, tolerance = right(seen)
        told = (f"{seen.q.shape[1]} query heads, {seen.k.shape[1]} KV heads, {seen.q.shape[2]} new tokens of "
                f"{seen.k.shape[2]}, {str(seen.q.dtype).removeprefix('torch.')}")  # fmt: skip
        given = [x.clone() for x in of(seen)]
        notes = self.run(lambda: policy.watch(seen), told=f"watch, {told}")
        self.check_unchanged(given, of(seen))
        self.check_notes(notes, want, told)
        got = notes.tokens
        if not agree(got, want, tolerance):
            self.explain(policy, got, want, tolerance, told)
        held = held_of(seen, Notes(got))
        scores = self.run(lambda: policy.score(held), told=f"score, {told}")
        self.check_unchanged(given, of(seen))
        self.check_returned(scores, told=f"score, {told}")
        if not isinstance(scores, Tensor) or scores.shape != want.shape:
            is_now = list(scores.shape) if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            self.fail("score-shape", seen=f"score, {told}: {is_now}; it should be {list(want.shape)}",
                      cause="a score is asked for each token of each KV head",
                      look="the return of score: what was noted, held.tally")  # fmt: skip
        other = Notes(got.flip(-1).contiguous())  # other numbers than watch saw: the cache's notes count
        for notes in (Notes(got), other):
            scores = self.run(lambda: policy.score(held_of(seen, notes)))  # noqa: B023
            assert notes.tokens is not None
            if not agree(scores, notes.tokens, CLOSE):
                what = first_place(scores, notes.tokens, CLOSE)
                if agree(scores, -notes.tokens, CLOSE):
                    self.fail("lowest", seen=f"score, {told}: {what}", cause="the sign was turned: the tokens that are "
                              "looked at least would be kept",
                              look="the docstring of score: the highest are kept")  # fmt: skip
                if notes is other and agree(scores, got, CLOSE):
                    self.state(f"score, {told}: the cache's notes were other numbers than watch saw last, and score "
                               "gave those of watch")  # fmt: skip
                self.fail("score-not-noted", seen=f"score, {told}: {what}",
                          cause="score does not return what the cache has noted for the tokens",
                          look="held.tally, as it is")  # fmt: skip

    def check_notes(self, notes: Any, want: Tensor, told: str) -> None:
        """Notes of one number for each token of each KV head."""
        self.check_returned(notes, told=f"watch, {told}")
        if not isinstance(notes, Notes):
            self.fail("not-notes", seen=f"watch, {told}: a {type(notes).__name__} came back",
                      cause="watch returns Notes, which a cache keeps beside the keys",
                      look="the return of watch: Notes(...)")  # fmt: skip
        if not isinstance(notes.tokens, Tensor):
            self.fail("not-notes", seen=f"watch, {told}: Notes.tokens is a {type(notes.tokens).__name__}",
                      cause="Notes(x) takes numbers for tokens; rows are for what is known of a whole row",
                      look="the return of watch: Notes(x), x [batch, num_kv_heads, tokens]")  # fmt: skip
        if notes.tokens.shape != want.shape:
            self.fail("noted-shape", seen=f"watch, {told}: noted is {list(notes.tokens.shape)}; it should be "
                      f"{list(want.shape)}", cause=shape_difference(notes.tokens.shape, want.shape)[0],
                      look="x of Notes(x): one number for each token, for each KV head")  # fmt: skip
        if notes.tokens.isnan().any():
            self.fail("not-finite", seen=f"watch, {told}: NaN was noted", cause="a division by 0, or infinity was "
                      "computed with", look="what is made of seen.weights(1)")  # fmt: skip

    def explain(self, policy: Policy, got: Tensor, want: Tensor, tolerance: float, told: str) -> None:
        """Name what was noted instead, in every case."""
        seen = f"watch, {told}: {first_place(got, want, tolerance)}"
        listed = [(noted(case), self.tokens(policy, case), right(case)[1]) for case in cases()]
        for place, suspect in enumerate(listed[0][0]):
            for variant in range(len(suspect.variants)):
                fits = (agree(mine, suspects[place].variants[variant], near) for suspects, mine, near in listed)
                if all(fits):
                    accuse(type(self), [Suspect(suspect.diagnosis, True, suspect.cause, suspect.look)], seen)
        self.explain_values(got, want, what=f"watch, {told}: what was noted", tolerance=tolerance)

    @staticmethod
    def tokens(policy: Policy, seen: Seen) -> Any:
        """What is noted, or nothing where it raises."""
        try:
            return policy.watch(seen).tokens
        except Exception:
            return None

    def check_state(self, policy: Policy) -> None:
        """Two layers look on, then each is asked."""
        layers = [looked(4, 2, 3, 5, seed=20), looked(4, 2, 3, 5, seed=21)]
        notes = [self.run(lambda seen=seen: policy.watch(seen)) for seen in layers]  # type: ignore[misc]
        for seen, one in zip(layers, notes, strict=True):
            scores = self.run(lambda: policy.score(held_of(seen, one)))  # noqa: B023
            if not agree(scores, *right(seen)):
                self.state("two layers looked on, then both were asked: one of them got the other's scores")

    def state(self, seen: str) -> None:
        """Something is kept on the policy."""
        self.fail("on-self", seen=seen, cause="what watch saw is kept on self, or outside: one policy serves all "
                  "layers, and tokens are moved and dropped between watch and score",
                  look="the return of watch, and held.tally: the cache keeps the notes, for each layer")  # fmt: skip

    def script(self, answer: Callable, script: tuple) -> None:
        """The same steps through two caches: which tokens are held after each."""
        num_heads, num_kv_heads, head_dim, batch, layers, budget, sinks, recent, steps = script
        mine, right = (Cache.evicting(layers, kind(sinks=sinks, recent=recent), budget) for kind in (answer, LastLook))
        for turn, count in enumerate(steps):
            told = f"a cache of {layers} layers, budget {budget}, sinks {sinks}, recent {recent}; step {turn + 1} of " \
                   f"{len(steps)} brings {count} tokens"  # fmt: skip
            for cache in (right, mine):
                step = lambda cache=cache: feed(cache, num_heads, num_kv_heads, head_dim, batch, count, turn)  # noqa: B023, E731
                self.run(step, told=told)
            for layer, (one, other) in enumerate(zip(mine.layers, right.layers, strict=True)):
                got, want = (cache.positions.sort(dim=-1).values for cache in (one, other))  # type: ignore[attr-defined]
                if not torch.equal(got, want):
                    row, head, _ = (got != want).nonzero()[0].tolist()
                    self.fail("other-tokens", seen=f"{told}: layer {layer} holds {got[row, head].tolist()}; "
                              f"it should hold {want[row, head].tolist()}",
                              cause="alone, watch and score were right: what they do depends on the step, the layer or "
                              "what was asked before, or another method of Policy was changed",
                              look="the class, top to bottom: only watch and score are needed")  # fmt: skip


def of(seen: Seen) -> Sequence[Tensor]:
    """The tensors that may not be changed."""
    assert seen.notes.tokens is not None
    return seen.q, seen.k, seen.v, seen.positions, seen.notes.tokens


def cases() -> list[Seen]:
    """Steps to look at: a prompt, one token, a chunk; heads alone, in groups, all on one; dtypes."""
    return [
        looked(6, 2, 5, 4, batch=2),
        looked(4, 4, 1, 9, batch=3, head_dim=6, seed=1),
        looked(5, 1, 12, 0, head_dim=12, seed=2),
        looked(8, 4, 3, 70, head_dim=4, seed=3),
        looked(6, 3, 4, 6, batch=2, head_dim=10, dtype=torch.bfloat16, seed=4),
        looked(2, 1, 100, 3, seed=5, dtype=torch.float16),
    ]


def feed(cache: Cache, num_heads: int, num_kv_heads: int, head_dim: int, batch: int, count: int, turn: int) -> None:
    """One step through all layers."""
    with cache.step([count] * batch) as step:
        for layer, one in enumerate(cache.layers):
            sizes = (num_heads, num_kv_heads, num_kv_heads)
            q, k, v = (
                draw(batch, size, count, head_dim, seed=100 * turn + 10 * layer + n, dtype=torch.float32)
                for n, size in enumerate(sizes)
            )
            one.append(k, v, step)
            one.attend(2 * q, step)
