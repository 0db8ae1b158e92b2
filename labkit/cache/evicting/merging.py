"""The alternative to dropping: two neighbours become one that stands for both, and counts as both.

When there are more entries than the budget, those that are most like the one beside them are merged: keys and values
are averaged, each weighted by how many tokens it stands for (token merging, ToMe, arXiv:2210.09461; of caches D2O,
arXiv:2406.13035, and KVMerger, arXiv:2407.08454, merge too). Nothing is dropped, and nothing comes back exactly.

**What counts as n.** n equal keys and values in the softmax are one with log(n) added to its score: exp(s + log n) is
n exp(s). So log(n) is added to the score of an entry that stands for n tokens (ToMe's proportional attention); without
it, what was merged would lose weight with every token that joins it.

**Where it stands.** RoPE has turned each key to its own position, and the mean of keys that point apart is shorter than
either. So keys are turned back to position 0, averaged there, and turned to one position: the mean of the tokens' own,
rounded to a whole one. Neighbours alone are merged, and so an entry stands for a stretch of text, and order remains.

**Who with whom.** As in ToMe, every other entry, in the order of positions, looks at its two neighbours and takes the
one whose key is more like its own (cosine, of the keys turned back); the pairs most alike are merged, and where that is
not enough it goes on with what is left. Sinks and the newest are not merged.

**When.** As all evicting does, at the end of a step. A full cache chooses the next pair there; the two become one when
the next token comes, which takes the slot that is left. A step that is undone has both back, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.attention import Visibility, attention_scores, blended, weights_of, wide_dtype
from labkit.cache.evicting.budgets import Budget, tokens_of
from labkit.cache.evicting.choosing import MOST
from labkit.cache.evicting.kept import Kept, Overwritten, lines_of
from labkit.cache.evicting.layer import EvictingCache
from labkit.cache.evicting.places import turned
from labkit.cache.evicting.policy import BLOCK, Held, Notes, Policy
from labkit.cache.layer import Observer, size_of
from labkit.cache.step import Step


@dataclass(frozen=True, eq=False, kw_only=True)
class Merging(Policy):
    """Neighbours whose keys are alike become one entry (`MergingCache`, which `Cache.evicting` makes for this policy).

    frequencies: RoPE's, in radians per position, float `[head_dim / 2]` (`model.frequencies`). recent: the newest
    tokens stay single. Notes are how many other tokens each entry stands for.
    """

    frequencies: Tensor
    sinks: int = 4
    recent: int | float = 0.25
    lasting: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    def score(self, held: Held) -> Tensor:
        """Minus the likeness, a cosine, to the entry that stands before it; infinity where none does."""
        order = held.positions.argsort(dim=-1)
        keys = F.normalize(self.turned_back(held.k, held.positions), dim=-1)
        keys = keys.gather(2, order[..., None].expand_as(keys))
        unlike = F.pad(-(keys[:, :, 1:] * keys[:, :, :-1]).sum(dim=-1), (1, 0), value=float("inf"))
        return torch.empty_like(unlike).scatter(2, order, unlike)

    def turned_back(self, k: Tensor, positions: Tensor) -> Tensor:
        """Keys as they were before RoPE, in float32 or wider."""
        return turned(k.to(wide_dtype(k)), -positions, self.frequencies.to(k.device))

    def merged(self, k: Tensor, v: Tensor, positions: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Entries along the last dimension but one, `[..., entries, head_dim]`, as one: K, V, position and count.

        counts: tokens that each stands for, 0 for one that takes no part. Shapes out: `[..., head_dim]` and `[...]`.
        """
        total = counts.sum(dim=-1)
        share = (counts.double() / total[..., None].double()).to(wide_dtype(k))[..., None]
        # Float32 would not hold sums of positions.
        at = (positions.double() * counts.double()).sum(dim=-1).div(total.double()).round().to(positions.dtype)
        key = (self.turned_back(k, positions) * share).sum(dim=-2)
        key = turned(key, at, self.frequencies.to(k.device))
        return key.to(k.dtype), (v * share).sum(dim=-2).to(v.dtype), at, total


class MergingCache(EvictingCache):
    """K and V of at most `budget` entries for each row and KV head, each of one token or of several merged ones.

    policy: a `Merging`. budget, during, every, scale, soft_cap: as of `EvictingCache`. Which pairs are chosen means a
    look at all keys: `every` chooses several at once. Positions say where an entry stands (see the module), and a step
    of several tokens may merge other pairs than its tokens one by one would.
    Bytes are those of `EvictingCache` with a policy that notes a number for each token, and two victims for one.
    Padding is refused, and so is a window: what nobody sees would be averaged with what is seen.
    Raises ValueError for what cannot be: at once, or with the first tokens.
    """

    merges: ClassVar[bool] = True

    def __init__(self, policy: Merging, budget: Budget, **options: Any) -> None:
        if not isinstance(policy, Merging):
            raise ValueError(f"a MergingCache merges as Merging says; got {policy!r}")
        for name, why in (
            ("frequencies", "entries of several tokens have no place of their own in the cache"),
            ("safeguard", "heads that share a budget give slots up, and merging fills them"),
            ("window", "what left a window would be averaged with what is seen"),
        ):
            if options.get(name) is not None:
                raise ValueError(f"{why}: leave {name} out, or take another policy than Merging")
        super().__init__(policy, budget, **options)
        self.policy: Merging = policy
        if not isinstance(budget, float):
            check_room(policy, int(budget))

    @property
    def keeps_notes(self) -> bool:
        """Counts are always needed: attention asks for them."""
        return True

    def validate(self, k: Tensor, v: Tensor, step: Step) -> None:
        """As of `EvictingCache`; ValueError, too, for padding and for frequencies of another head_dim."""
        super().validate(k, v, step)
        if any(step.padding):
            raise ValueError("padding would be averaged with tokens: take rows of one length, or another policy")
        if self.kept is None:
            check_room(self.policy, tokens_of(self.budget, step))
            if 2 * self.policy.frequencies.numel() != k.shape[3]:
                turn = 2 * self.policy.frequencies.numel()
                raise ValueError(f"Merging's frequencies turn {turn} channels; keys have {k.shape[3]}")

    def write(self, k: Tensor, v: Tensor, step: Step) -> None:
        """As of `EvictingCache`; every new token stands for itself."""
        super().write(k, v, step)
        if self.kept is not None and self.kept.notes.tokens is None:
            with torch.inference_mode(False):
                self.kept = self.kept.noted(Notes(torch.zeros(self.kept.positions.shape, device=k.device)))

    def overwrite(self, kept: Kept, k: Tensor, v: Tensor, step: Step) -> None:
        """Merge the next pair into one of its slots, and put the new token into the other, in place."""
        assert kept.victims is not None
        assert kept.notes.tokens is not None
        pair = kept.victims[kept.used : kept.used + 2]
        spare = Overwritten.of(kept, pair)
        with torch.no_grad():
            noted = kept.notes.tokens.reshape(-1)
            counts = 1 + noted[spare.slots].view(2, -1)
            k_sides, v_sides, places = (
                x.unflatten(0, (2, -1)).movedim(0, 1) for x in (spare.k, spare.v, spare.positions)
            )
            key, value, at, count = self.policy.merged(k_sides, v_sides, places, counts.mT)
            # The first of a pair leaves its slot to the new token.
            notes = noted.index_copy(0, spare.slots, torch.cat((torch.zeros_like(count), count - 1)))
        self.spare = spare
        positions = step.key_positions(k.shape[1], k.device)
        new = torch.cat((k.flatten(0, 2), key)), torch.cat((v.flatten(0, 2), value))
        spare.put(kept, *new, torch.cat((positions.flatten(), at)))
        self.kept = kept.taken(Notes(notes.view(kept.positions.shape)), 2)

    # Attending.

    def answer(
        self, q: Tensor, held: tuple[Tensor, Tensor], visible: Visibility, observe: Observer | None = None
    ) -> Tensor:
        """Attention in which an entry counts as the tokens that it stands for."""
        if self.constants.window is not None:
            raise ValueError("what left a window would be averaged with what is seen: take another policy than Merging")
        if self.physical_len == self.seq_len:  # each stands for itself
            return super().answer(q, held, visible, observe)
        k, v = held
        self.bytes_read += size_of(k) + size_of(v)
        assert self.kept is not None
        assert self.kept.notes.tokens is not None
        more = (
            self.kept.notes.tokens.to(wide_dtype(q))
            .log1p()
            .repeat_interleave(q.shape[1] // k.shape[1], dim=1)[:, :, None]
        )
        outs, found = [], []
        for start in range(0, q.shape[2], BLOCK):  # never all queries' weights at once, unless they are asked for
            stop = min(start + BLOCK, q.shape[2])
            scores = attention_scores(q[:, :, start:stop], k, self.constants) + more
            weights = weights_of(scores, visible.of_queries(start, stop).mask(self.constants, q.device)).to(q.dtype)
            outs.append(blended(weights, v))
            if observe is not None:
                found.append(weights)
        if observe is not None:
            observe(torch.cat(found, dim=2))
        return torch.cat(outs, dim=2)

    def answer_one(
        self, q: Tensor, k: Tensor, v: Tensor, visible: Visibility, wants_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """`answer` of one query per row, and its weights, if they are wanted."""
        found: list[Tensor] = []
        out = self.answer(q, (k, v), visible, found.append if wants_weights else None)
        return out, found[0] if found else None

    # Merging.

    def victims_of(self, room: int) -> int:
        """Slots in the pairs that a full cache of so many entries chooses at once."""
        return 2 * min(self.every, self.firsts(room, max(0, self.policy.recent_of(room) - 1)))

    def firsts(self, tokens: int, recent: int) -> int:
        """How many even places there are among so many entries, beside sinks and the newest, if there is a pair."""
        start, stop = self.policy.sinks, tokens - recent
        return len(range(start + start % 2, stop, 2)) if stop - start > 1 else 0

    def chosen(self, kept: Kept, step: Step, newest: int | Tensor) -> Kept:
        """What is held merged down to the budget, and the next pairs."""
        assert self.room is not None
        recent = self.policy.recent_of(self.room)
        with torch.no_grad():
            while kept.tokens > self.room:
                most = min(kept.tokens - self.room, self.firsts(kept.tokens, recent))
                kept = self.fewer(kept, *self.pairs(kept, newest, recent, most))
            if self.during == "prompt":
                return kept
            pairs = self.pairs(kept, newest, max(0, recent - 1), self.victims_of(self.room) // 2)
            return kept.doomed(lines_of(self.slots(*pairs), kept.tokens))

    def pairs(self, kept: Kept, newest: int | Tensor, recent: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs most alike, those first: the order of positions, int64 `[batch, num_kv_heads, tokens]`, and in it
        the place of each pair's first, which is even, and of its partner, `[batch, num_kv_heads, count]`.

        A first is in one pair alone; a partner may be in two.
        """
        order = kept.positions.argsort(dim=-1)
        at = kept.positions.gather(2, order)
        free = (at >= self.policy.sinks) & (at <= newest - recent)
        unlike = self.scores(kept, newest).gather(2, order).float().nan_to_num(nan=MOST).clamp(-MOST, MOST)
        before = unlike.masked_fill(~(free & F.pad(free[:, :, :-1], (1, 0))), float("inf"))
        behind = F.pad(before[:, :, 1:], (0, 1), value=float("inf"))[:, :, ::2]
        before = before[:, :, ::2]
        index = torch.minimum(before, behind).topk(count, dim=-1, largest=False, sorted=True).indices
        side = torch.where(before.gather(2, index) <= behind.gather(2, index), -1, 1)
        return order, 2 * index, 2 * index + side

    @staticmethod
    def slots(order: Tensor, first: Tensor, partner: Tensor) -> Tensor:
        """The slots of pairs, the first of a pair and then its partner, `[batch, num_kv_heads, 2 * count]`."""
        return torch.stack((order.gather(2, first), order.gather(2, partner)), dim=-1).flatten(2)

    def fewer(self, kept: Kept, order: Tensor, first: Tensor, partner: Tensor) -> Kept:
        """Each first of a pair merged into its partner, in the order of positions; what joins nothing stays exact."""
        kept = kept.chosen(order)
        assert kept.notes.tokens is not None
        counts = 1 + kept.notes.tokens
        to = torch.zeros_like(order).scatter(2, first, partner - first)  # -1, 1, or 0 for what stays
        joins = [shifted(counts.masked_fill(to != side, 0.0), side) for side in (1, -1)]
        sides = kept.k, kept.v, kept.positions
        k, v, positions = (torch.stack([shifted(x, 1), x, shifted(x, -1)], dim=3) for x in sides)
        made = self.policy.merged(k, v, positions, torch.stack((joins[0], counts, joins[1]), dim=3))
        touched = joins[0] + joins[1] > 0
        k, v = (torch.where(touched[..., None], *x) for x in ((made[0], kept.k), (made[1], kept.v)))
        positions = torch.where(touched, made[2], kept.positions)
        stays = (to == 0).nonzero()[:, 2].view(*order.shape[:2], -1)
        return Kept(k, v, positions, Notes(made[3] - 1)).chosen(stays)

    # Going back.

    def forget_from(self, seq_len: int) -> None:
        """Let go of the newest tokens; those that stay count for as many as before."""
        assert self.kept is not None
        notes = self.kept.notes
        assert notes.tokens is not None
        staying = self.kept.tokens - (self.seq_len - seq_len)
        counts = notes.tokens[:, :, :staying].clone()  # first: without memory for it nothing has changed
        super().forget_from(seq_len)
        self.kept = self.kept.noted(Notes(counts))


def shifted(x: Tensor, by: int) -> Tensor:
    """Along the third dimension each entry's neighbour before it (1) or behind it (-1); zeros where there is none."""
    rest = torch.zeros_like(x[:, :, :1])
    return torch.cat((rest, x[:, :, :-1]) if by == 1 else (x[:, :, 1:], rest), dim=2)


def check_room(policy: Merging, tokens: int) -> None:
    """ValueError unless beside what stays single there is room for one that is merged."""
    least = policy.sinks + max(1, policy.recent_of(tokens)) + 1
    if tokens < least:
        raise ValueError(
            f"a budget of {tokens} entries leaves none to merge into beside {policy.sinks} sinks and the newest "
            f"{max(1, policy.recent_of(tokens))}: take a budget of at least {least}, or keep fewer of these"
        )
