"""Wrong answers to 07.7, and other right ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from labkit.cache.evicting import Notes, Policy
from tests.labs.answer import Wrong


def looking(watch, score=lambda self, held: held.tally, **fields):
    """A LastLook with these methods."""
    return type("LastLook", (Policy,), {"watch": watch, "score": score, **fields})


def for_all(seen, one):
    """The same numbers for every KV head. one: [batch, tokens]."""
    return one[:, None].expand(-1, seen.k.shape[1], -1)


def mean_of(seen):
    return for_all(seen, seen.weights(1)[:, :, 0].mean(dim=1))


def right_watch(self, seen):
    return Notes(mean_of(seen))


class NoPolicy:
    def watch(self, seen):
        return Notes(mean_of(seen))

    def score(self, held):
        return held.tally


class NoPolicyEither(NoPolicy):
    def __init__(self, *, sinks=0, recent=0):
        self.sinks, self.recent = sinks, recent


class OnSelf(Policy):
    def watch(self, seen):
        self.seen = mean_of(seen)
        return Notes(self.seen)

    def score(self, held):
        return self.seen


class OnTheClass(Policy):
    last = None

    def watch(self, seen):
        type(self).last = mean_of(seen)
        return Notes(self.last)

    def score(self, held):
        return self.last if self.last.shape == held.positions.shape else held.tally


class NotesBesides(Policy):
    """Notes something else, and keeps the right numbers on self."""

    def watch(self, seen):
        self.seen = mean_of(seen)
        return Notes()

    def score(self, held):
        return self.seen


class OwnInit(Policy):
    def __init__(self):
        super().__init__()

    def watch(self, seen):
        return Notes(mean_of(seen))

    def score(self, held):
        return held.tally


class OwnFields(Policy):
    def __init__(self, **fields):
        super().__init__(sinks=4, recent=0)

    def watch(self, seen):
        return Notes(mean_of(seen))

    def score(self, held):
        return held.tally


@dataclass(frozen=True, eq=False, kw_only=True)
class RecentOfOne(Policy):
    recent: int = 1

    def watch(self, seen):
        return Notes(mean_of(seen))

    def score(self, held):
        return held.tally


class NoRecent(Policy):
    def watch(self, seen):
        return Notes(mean_of(seen))

    def score(self, held):
        return held.tally

    def recent_of(self, budget):
        return 0


class CountsSteps(Policy):
    """Right nine times."""

    def watch(self, seen):
        self.steps = getattr(self, "steps", 0) + 1
        return Notes(mean_of(seen) if self.steps < 10 else seen.tally)

    def score(self, held):
        return held.tally


class WritesOnTally(Policy):
    def watch(self, seen):
        seen.notes.tokens.copy_(mean_of(seen))
        return seen.notes

    def score(self, held):
        return held.tally


def recomputed(self, held):
    return -held.k.norm(dim=-1)


def by_position(self, held):
    return held.positions.float()


def boosted(self, held):
    return held.tally.masked_fill(held.positions == held.newest, torch.inf)


class ByRecomputing(Policy):
    """Weights by hand; right where attention is plain, as here."""

    def watch(self, seen):
        group = seen.q.shape[1] // seen.k.shape[1]
        q = seen.q[:, :, -1].unflatten(1, (-1, group)).float()
        scores = torch.einsum("bhgd,bhtd->bhgt", q, seen.k.float()) * q.shape[-1] ** -0.5
        mean = scores.softmax(-1).mean(dim=(1, 2))
        return Notes(mean.unsqueeze(1).repeat(1, seen.k.shape[1], 1))

    def score(self, held):
        return held.tally


class OfNotes(Policy):
    lasting = True

    def watch(self, seen):
        weights = seen.weights(newest=1)
        batch, _, _, tokens = weights.shape
        return Notes(tokens=weights.squeeze(2).mean(1, True).expand(batch, seen.positions.shape[1], tokens).clone())

    def score(self, held):
        return held.notes.tokens


@dataclass(frozen=True, eq=False, kw_only=True)
class Decorated(Policy):
    def watch(self, seen):
        total = sum(seen.weights(1)[:, head, -1] for head in range(seen.q.shape[1]))
        return Notes(torch.stack([total / seen.q.shape[1]] * seen.k.shape[1], dim=1))

    def score(self, held):
        return held.tally.clone()


class MeanOfMeans(Policy):
    """All KV heads have as many query heads: the mean of their means is the mean."""

    def watch(self, seen):
        return Notes(torch.zeros_like(seen.tally) + seen.received(1).mean(dim=1, keepdim=True))

    def score(self, held):
        return held.tally


WRONG = [
    Wrong("07.7", "by-kv-head", "each KV head by its own query heads",
          looking(lambda self, seen: Notes(seen.received(1))), "TOVA(by_head=True)"),
    Wrong("07.7", "sum-over-heads", "a sum over heads",
          looking(lambda self, seen: Notes(for_all(seen, seen.weights(1)[:, :, 0].sum(1))))),
    Wrong("07.7", "max-over-heads", "the greatest of the heads",
          looking(lambda self, seen: Notes(for_all(seen, seen.weights(1)[:, :, 0].amax(1))))),
    Wrong("07.7", "one-head", "the first head",
          looking(lambda self, seen: Notes(for_all(seen, seen.weights(1)[:, 0, 0])))),
    Wrong("07.7", "all-queries", "all the step's queries",
          looking(lambda self, seen: Notes(for_all(seen, seen.weights(seen.q.shape[2]).mean((1, 2)))))),
    Wrong("07.7", "all-queries", "received()", looking(lambda self, seen: Notes(seen.received()))),
    Wrong("07.7", "oldest-query", "the first of all queries' weights",
          looking(lambda self, seen: Notes(for_all(seen, seen.weights(seen.q.shape[2])[:, :, 0].mean(1))))),
    Wrong("07.7", "added-up", "added to the tally", looking(lambda self, seen: Notes(seen.tally + mean_of(seen)))),
    Wrong("07.7", "nothing-noted", "what was noted before", looking(lambda self, seen: seen.notes)),
    Wrong("07.7", "not-notes", "a tensor", looking(lambda self, seen: mean_of(seen))),
    Wrong("07.7", "not-notes", "as what is known of a row", looking(lambda self, seen: Notes(rows=(mean_of(seen),)))),
    Wrong("07.7", "noted-shape", "one head", looking(lambda self, seen: Notes(seen.weights(1)[:, :, 0].mean(1, True)))),
    Wrong("07.7", "noted-shape", "all query heads", looking(lambda self, seen: Notes(seen.weights(1)[:, :, 0]))),
    Wrong("07.7", "on-self", "kept on self", OnSelf),
    Wrong("07.7", "on-self", "kept on the class", OnTheClass),
    Wrong("07.7", "not-notes", "kept on self, nothing noted", NotesBesides),
    Wrong("07.7", "signature", "an __init__ without parameters", OwnInit),
    Wrong("07.7", "parameters", "an __init__ that drops them", OwnFields),
    Wrong("07.7", "signature", "another default", RecentOfOne),
    Wrong("07.7", "other-tokens", "recent is not heeded", NoRecent),
    Wrong("07.7", "other-tokens", "right at first", CountsSteps),
    Wrong("07.7", "arguments-changed", "written over what was noted", WritesOnTally),
    Wrong("07.7", "signature", "no Policy", NoPolicy),
    Wrong("07.7", "not-a-policy", "no Policy, with its parameters", NoPolicyEither),
    Wrong("07.7", "score-not-noted", "a score of its own", looking(right_watch, recomputed)),
    Wrong("07.7", "score-not-noted", "the newest", looking(right_watch, by_position)),
    Wrong("07.7", "score-not-noted", "the newest besides", looking(right_watch, boosted)),
    Wrong("07.7", "lowest", "the sign", looking(right_watch, lambda self, held: -held.tally)),
    Wrong("07.7", "score-shape", "the notes", looking(right_watch, lambda self, held: held.notes)),
    Wrong("07.7", "score-shape", "one head", looking(right_watch, lambda self, held: held.tally[:, 0])),
    Wrong("07.7", "returned-none", "no return in score", looking(right_watch, lambda self, held: None)),
]  # fmt: skip

RIGHT = [
    ("07.7", looking(right_watch)),
    ("07.7", ByRecomputing),
    ("07.7", OfNotes),
    ("07.7", Decorated),
    ("07.7", MeanOfMeans),
]
