"""A cache that forgets: of all tokens it holds no more than a budget, those that its policy scores highest.

One mechanism for every policy: score, keep, compact. Evicted tokens are gone, and so is their memory.

**When.** Eviction is decided when a step has succeeded (`Cache.step`), for all layers or none; until then all can be
undone. A step of several tokens attends to all that is held and to its own tokens, up to each query; at its end the
layer is cut to the budget. Where the cache is full, the end of a step also decides whose slot the next token takes: a
decode step writes there, in place, and so attends to exactly `budget` tokens, the newest included. Nothing is
reallocated or moved then, and undoing it takes that one token.

A layer whose steps nobody ends (`append` and `attend` alone) evicts nothing: beyond the budget it grows, until somebody
calls `layer.settle(layer.plan(step))`. It is slower, and never wrong.

**What is where.** Each KV head keeps tokens of its own, in slots that are in no order. `positions` says which: they are
kept beside the keys, and who may see whom is read from them. `seq_len` is logical, what was seen; `physical_len` is
what is held, the smaller of `seq_len` and the budget.

**Bytes.** `nbytes` counts everything, to the byte: of each token K, V and a position of 4 bytes; 4 more where the
policy notes a number for each token in later steps too (`Policy.lasting`); when the cache is full 8 for each victim;
and what a policy notes of whole rows. `EvictingCache.format` is what `labkit.sizing` calls that. Layers that noted
together have their notes in one piece of memory, of which each counts its part; a copy has its own. While a step of
several tokens runs its tokens are held, too, and at its end for a moment the old tensors beside the new ones. In a
decode step of a policy that reads weights, those of all layers are held until the end, and there for a moment twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from labkit.attention import Visibility, attention_scores, attention_weights, blended, is_count, weights_of
from labkit.cache.evicting.budgets import Budget, check_budget, check_protected, tokens_of
from labkit.cache.evicting.choosing import highest, highest_of_all, lowest, ranked
from labkit.cache.evicting.kept import Kept, Overwritten, lines_of
from labkit.cache.evicting.places import places_of, turned
from labkit.cache.evicting.policy import Held, Notes, Policy, Seen
from labkit.cache.evicting.together import (
    WAITING,
    checked_notes,
    newest_of,
    show_together,
    victims_together,
)  # fmt: skip
from labkit.cache.evicting.window import Window
from labkit.cache.layer import LayerCache, Observer, size_of
from labkit.cache.step import Step
from labkit.sizing import Evicting

DURING = ("always", "prompt")


@dataclass(frozen=True, eq=False)
class Plan:
    """What the end of a step leaves: what is kept, and the length at which a token was lost for good."""

    kept: Kept
    lost_at: int
    moved: int


class EvictingCache(LayerCache):
    """K and V of at most `budget` tokens for each row and KV head, chosen by `policy`. See the module for when and how.

    budget: tokens, or as a float a fraction of the first step's tokens. during: "always" never holds more at the end of
    a step; "prompt" evicts once, when the first step has ended, and grows from then on. every: how many victims a full
    cache chooses at once. With more than 1 the policy scores, and looks on for that, only once in so many decode steps,
    and the tokens that came since are safe meanwhile.
    safeguard: shares what all KV heads of a layer keep among them by score (Ada-KV, arXiv:2407.11550): `budget` is then
    what a head keeps on average, and `safeguard` the fraction of it that each is sure of (the paper's alpha, 0.2). None
    gives all the same. Heads' slots lie in one tensor, as many as the head has that keeps most, and those are the
    bytes: of a head that keeps fewer some are empty. It goes with `during="prompt"` alone, after which nothing is
    evicted. Scores must mean the same in every head, as weights of attention do.
    frequencies: RoPE's, in radians per position, float `[head_dim / 2]` (`model.frequencies`): keys and queries are
    then turned to the places that the tokens held have in the cache, 0 to `budget` - 1, each time they are read
    (StreamingLLM, arXiv:2309.17453). None leaves them as they came. A window without gaps is as far from a decode
    step's query in the cache as it was in the text: there only the query is turned, for the sinks. Of other policies
    all keys are, which takes longer than attention to them.

    Rows are of one length, padded at the left; padding is hidden, and evicted first, then what left the model's window.
    `truncate` goes back no further than to where the last token was lost. No gradient through what was evicted.
    Raises ValueError for what cannot be: at once, or for a fraction with the first tokens.
    """

    evicts: ClassVar[bool] = True

    def __init__(
        self,
        policy: Policy,
        budget: Budget,
        *,
        during: str = "always",
        every: int = 1,
        safeguard: float | None = None,
        frequencies: Tensor | None = None,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__(scale=scale, window=window, soft_cap=soft_cap)
        if not isinstance(policy, Policy):
            raise ValueError(f"policy is one of labkit.cache.evicting's, as in KeyNorm(); got {policy!r}")
        if policy.merges and not self.merges:
            raise ValueError(
                f"{type(policy).__name__} averages neighbours, as only a MergingCache does (Cache.evicting makes one "
                f"without nbits): packed numbers would be rounded anew with every token that joins them"
            )
        check_budget(budget)
        if is_count(budget):
            check_protected(policy, int(budget))
        if during not in DURING:
            raise ValueError(f'during is "always" or "prompt"; got {during!r}')
        if not is_count(every) or every < 1:
            raise ValueError(f"every is a number of steps, at least 1; got {every!r}")
        if every > 1 and during == "prompt":
            raise ValueError('during="prompt" evicts once, and no decode step does: leave every out')
        if safeguard is not None:
            check_safeguard(safeguard, during, frequencies)
        self.policy, self.budget, self.during, self.every = policy, budget, during, int(every)
        self.safeguard = safeguard
        self.frequencies = frequencies
        self.forget()

    def forget(self) -> None:
        """Hold nothing."""
        self.kept: Kept | None = None
        self.spare: Overwritten | None = None  # what the slot taken since a step ended held
        self.room: int | None = None  # the budget in tokens
        self.first_ended = 0  # tokens seen when the first step had ended
        self.lost_at = 0  # tokens seen when the last one was lost for good
        self.attended = self.constants  # what was computed with, as far as known

    def mark(self) -> Any:
        """What is held, a value that is never changed but in one slot, which `spare` remembers."""
        return self.lengths, self.kept, self.spare, self.room, self.first_ended, self.lost_at

    def restore(self, mark: Any) -> None:
        """What was held. RuntimeError when a step has ended since, and a token is lost that was held."""
        lengths, kept, spare, room, first_ended, lost_at = mark
        if lost_at != self.lost_at:
            raise RuntimeError(f"a token was evicted since, after {self.lost_at} tokens: there is no way back")
        if self.spare is not None and spare is None:
            self.spare.put_back(kept)
        self.lengths, self.kept, self.spare, self.room, self.first_ended = lengths, kept, spare, room, first_ended

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held, and of the token that undoing a step would take."""
        return (0 if self.kept is None else self.kept.nbytes) + (0 if self.spare is None else self.spare.nbytes)

    @property
    def format(self) -> Evicting:
        """What `labkit.sizing` calls this, in the dtype held (float16 when empty), without what a policy notes of rows.

        ValueError before there are tokens if the budget is a fraction of them.
        """
        room = self.room if self.room is not None else self.budget
        if not is_count(room):
            raise ValueError("a budget that is a fraction of the prompt is known with the first tokens: append before")
        always = self.during == "always"
        if self.kept is not None and self.kept.hides:  # slots of the head that keeps most
            room = self.kept.tokens - (self.seq_len - self.lost_at)
        return Evicting(
            budget=int(room),
            dtype=self.kept_dtype,
            tally=self.keeps_notes,
            victims=self.victims_of(int(room)) if always else 0,
            prompt_tokens=None if always else self.first_ended or None,
        )

    @property
    def turns(self) -> tuple[Tensor, ...]:
        """The layer's own frequencies and its policy's, where there are any."""
        return tuple(x for x in (self.frequencies, getattr(self.policy, "frequencies", None)) if x is not None)

    @property
    def physical_len(self) -> int:
        """Tokens held in each row, by each KV head."""
        return 0 if self.kept is None else self.kept.tokens

    @property
    def positions(self) -> Tensor | None:
        """Where the tokens held stand, int32 `[batch, num_kv_heads, physical_len]`; -1 is padding. None when empty."""
        return None if self.kept is None else self.kept.positions

    def template(self) -> Tensor | None:
        """The keys themselves."""
        return None if self.kept is None else self.kept.k

    def held(self) -> tuple[Tensor, Tensor] | None:
        """K and V of the tokens held, slot by slot; `positions` says which they are."""
        return None if self.kept is None else self.kept.dense()

    # Appending.

    def validate(self, k: Tensor, v: Tensor, step: Step) -> None:
        """As for every cache; ValueError, too, for a budget that is too small, or frequencies of another head_dim."""
        super().validate(k, v, step)
        if self.room is None:
            check_protected(self.policy, tokens_of(self.budget, step))
            if self.frequencies is not None and 2 * self.frequencies.numel() != k.shape[3]:
                raise ValueError(
                    f"{self.frequencies.numel()} frequencies turn {2 * self.frequencies.numel()} channels; keys have "
                    f"{k.shape[3]}: give model.frequencies, [head_dim / 2]"
                )

    def write(self, k: Tensor, v: Tensor, step: Step) -> None:
        """Put a single token into a victim's slot, others behind what is held."""
        if self.room is None:
            self.room = tokens_of(self.budget, step)
        kept = self.kept
        if kept is not None and step.new_tokens == 1 and kept.victims_left and self.spare is None:
            self.overwrite(kept, k, v, step)
            return
        with torch.inference_mode(False):  # what is made inside could not be written outside
            positions = step.key_positions(k.shape[1], k.device)
            if kept is None:
                # A clone: a view would keep the projection's whole output alive.
                k, v = (x.clone(memory_format=torch.contiguous_format) for x in (k, v))
                self.kept = Kept(k, v, positions.clone())
            else:
                self.bytes_copied += size_of(kept.k) + size_of(kept.v)
                self.kept = kept.extended(k, v, positions)

    def overwrite(self, kept: Kept, k: Tensor, v: Tensor, step: Step) -> None:
        """Put one token into the next victim's slot, in place."""
        assert kept.victims is not None
        notes, spare = kept.notes, Overwritten.of(kept, kept.victims[kept.used])
        if notes.tokens is not None:
            tokens = notes.tokens.reshape(-1).index_fill(0, spare.slots, 0.0)
            notes = Notes(tokens.view(kept.positions.shape), notes.rows)
        self.spare = spare
        spare.put(kept, k, v, step.key_positions(k.shape[1], k.device))
        self.kept = kept.taken(notes, 1)

    # Attending.

    def attend(self, q: Tensor, step: Step | None = None, *, observe: Observer | None = None) -> Tensor:
        """Causal attention of the newest tokens' queries over all that is held; the policy looks on.

        observe: gets the weights, `[batch, num_heads, new_tokens, physical_len]`, slot by slot.
        """
        self.check_queries(q)
        if (kept := self.kept) is None:
            raise ValueError("the cache is empty: append before you attend")
        step = step or self.newest(q)
        self.attended = self.constants
        visible, positions = self.visible(step), step.text_positions(q.device)
        k, v = kept.dense()
        if self.frequencies is not None and kept.tokens < self.seq_len:
            if self.is_sinks_and_window(step) and q.shape[2] == 1 and observe is None and not self.looks_on():
                return self.over_sinks_and_window(q, k, v, positions)
            q, k, positions = self.in_places(q, k, kept.positions, positions)
        watched, known = self.looks_on(), None
        if q.shape[2] == 1:  # the weights of one query are no more than a row: computed once, for both
            spelled = observe is not None or (watched and self.policy.reads_weights)
            out, known = self.answer_one(q, k, v, visible, spelled)
            if observe is not None and known is not None:
                observe(known.to(q.dtype))
        else:
            out = self.answer(q, (k, v), visible, observe)
        if watched and q.shape[2] == 1 and self.waits(step):
            step.shared.setdefault(WAITING, {}).setdefault(id(self), []).append((q, known))
        elif watched:
            self.show(kept, step, (q, k, v, positions), visible, known)
        return out

    def look(self, q: Tensor, step: Step) -> None:
        """Show the policy a first step that was attended elsewhere, as `attend` does, if it looks on."""
        self.check_queries(q)
        if (kept := self.kept) is None or kept.tokens < self.seq_len:
            raise ValueError("what was attended elsewhere is all that was seen: append before you look, and look once")
        self.attended = self.constants
        if self.looks_on():
            self.show(kept, step, (q, *kept.dense(), step.text_positions(q.device)), self.visible(step), None)

    def show(
        self,
        kept: Kept,
        step: Step,
        attended: tuple[Tensor, Tensor, Tensor, Tensor],
        visible: Visibility,
        known: Tensor | None,
    ) -> None:
        """Keep what the policy notes of a step. attended: q, k, v and the queries' positions, as attention had them."""
        q, k, v, positions = attended
        with torch.inference_mode(False), torch.no_grad():
            newest = newest_of(step, q.device)
            seen = Seen(
                k, v, kept.positions, newest, self.constants, kept.notes, q, positions, visible, known, step.shared
            )
            self.kept = kept.noted(checked_notes(self.policy, self.policy.watch(seen), kept))

    def is_sinks_and_window(self, step: Step) -> bool:
        """Whether the first slots are the sinks, the others the newest tokens without a gap, and all are visible.

        Not in rows that were padded: the tokens that took the padding's slots stand before the sinks.
        """
        whole = isinstance(self.kept, Kept) and self.constants.window is None
        return whole and type(self.policy).score is Window.score and not any(step.padding)

    def over_sinks_and_window(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """Attention of one query per row at places in the cache, over sinks and a window.

        The window is as far from the query as in the text, the sinks are nearer: for them the query is turned.
        """
        assert self.frequencies is not None
        self.frequencies = self.frequencies.to(q.device)
        own = k.shape[2] - 1
        sinks, nearer = self.policy.sinks, turned(q, (own - positions)[:, None], self.frequencies)
        self.bytes_read += size_of(k) + size_of(v)
        scores = attention_scores(q, k, self.constants)
        scores[..., :sinks] = attention_scores(nearer, k[:, :, :sinks], self.constants)
        return blended(weights_of(scores).to(q.dtype), v)

    def answer_one(
        self, q: Tensor, k: Tensor, v: Tensor, visible: Visibility, wants_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of one query per row, and its weights, if they are wanted."""
        if not wants_weights:
            return self.answer(q, (k, v), visible), None
        self.bytes_read += size_of(k) + size_of(v)
        weights = attention_weights(q, k, self.constants, visible)
        return blended(weights.to(q.dtype), v), weights

    def visible(self, step: Step) -> Visibility:
        """Who may see whom: by index while nothing has left; else by position, if anything held may be hidden at all.

        What was held stands before every new token, and new tokens lie at the end in their order, or there is only one.
        """
        if self.physical_len == self.seq_len and self.kept is not None and not self.kept.hides:
            return step.visible
        if self.constants.window is None and not self.has_padding(step):
            return step.newest_of(self.physical_len)
        return Visibility(
            step.counts[0], self.physical_len, step.visible.first_query, key_position=self.positions
        )  # fmt: skip

    def has_padding(self, step: Step) -> bool:
        """Whether some slot holds padding, which is evicted first, so that numbers tell; or nothing."""
        if self.kept is not None and self.kept.hides:
            return True
        return bool(step.padding) and self.physical_len > min(
            after - skip for after, skip in zip(step.after, step.skipped, strict=True)
        )

    def in_places(self, q: Tensor, k: Tensor, held: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys turned to their places among the tokens held, and the places of the queries."""
        assert self.frequencies is not None
        self.frequencies = self.frequencies.to(q.device)
        places = places_of(held)
        k = turned(k, places - held, self.frequencies)
        last = places.amax(dim=(1, 2))[:, None]  # every KV head holds as many tokens of a row
        own = last - torch.arange(q.shape[2] - 1, -1, -1, device=q.device)
        return turned(q, (own - positions)[:, None], self.frequencies), k, own

    # Evicting.

    def decides(self) -> bool:
        """Whether something is chosen at the end of this step."""
        if (kept := self.kept) is None or self.room is None:
            return False
        if self.during == "prompt":
            return not self.first_ended and kept.tokens > self.room
        return kept.tokens > self.room or (kept.tokens == self.room and not kept.victims_left)

    def looks_on(self) -> bool:
        """Whether the policy is shown this step."""
        return self.policy.watches and (self.keeps_notes or self.decides())

    def waits(self, step: Step) -> bool:
        """Whether the policy is shown a single query at the end of the step, with the other layers'."""
        return step.ends and self.policy.is_shown_at_once and self.frequencies is None

    @property
    def keeps_notes(self) -> bool:
        """Whether what was noted is still needed when a step has ended."""
        return self.policy.lasting and self.during == "always"

    @classmethod
    def plan_all(cls, layers: Sequence[EvictingCache], step: Step) -> list[Plan | None]:
        """`plan` of several layers; where all are full and alike, their victims are chosen at once.

        Before that, policies note the queries that waited for it: undoing the step takes that back.
        """
        show_together(layers, step)
        if (victims := victims_together(layers, step)) is None:
            return [layer.plan(step) for layer in layers]
        return [layer.plan(step, some) for layer, some in zip(layers, victims, strict=True)]

    def plan(self, step: Step, victims: Tensor | None = None) -> Plan | None:
        """What is left when the step has ended. ValueError for scores of another shape.

        victims: the slots that the next tokens take, as `Kept` has them, where nothing is to be cut.
        """
        if (kept := self.kept) is None:
            return None
        moved, lost_at = 0, self.lost_at if self.spare is None else self.seq_len
        if victims is not None:
            kept = kept.doomed(victims)
        elif self.decides():
            newest = newest_of(step, kept.k.device)
            with torch.inference_mode(False):
                left = self.chosen(kept, step, newest)
            if left.tokens < kept.tokens or left.hides:
                moved, lost_at = left.numbers, self.seq_len
            kept = left
        if not self.keeps_notes:
            kept = kept.noted(Notes())
        return Plan(kept, lost_at, moved)

    def settle(self, plan: Plan) -> None:
        """Hold what was planned."""
        self.kept, self.lost_at, self.spare = plan.kept, plan.lost_at, None
        self.first_ended = self.first_ended or self.seq_len
        self.bytes_copied += plan.moved

    def kind_of_choice(self) -> tuple[Any, ...] | None:
        """What layers must have in common to choose victims together; None where there is more to do, or nothing."""
        kept = self.kept
        if kept is None or self.during == "prompt" or kept.tokens != self.room or kept.victims_left:
            return None
        alone = type(self).ranked is not EvictingCache.ranked or type(self).chosen is not EvictingCache.chosen
        if alone or not self.victims_of(self.room):
            return None
        protected = self.policy.sinks, self.policy.recent_of(self.room), self.victims_of(self.room)
        return kept.positions.shape, kept.k.dtype, kept.k.device, self.attended.window, protected

    def chosen(self, kept: Kept, step: Step, newest: int | Tensor) -> Kept:
        """What is held cut to the budget, and the victims among what is left, by the same scores."""
        assert self.room is not None
        recent, has_padding = self.policy.recent_of(self.room), self.has_padding(step)
        with torch.no_grad():
            scores = self.scores(kept, newest)
            if self.safeguard is not None:
                ranks = self.ranked(scores, kept, newest, recent, has_padding)
                index, empty = highest_of_all(ranks, self.room, max(1, int(self.safeguard * self.room + 1e-9)))
                return kept.chosen(index).emptied(empty)
            if kept.tokens > self.room:
                index = highest(self.ranked(scores, kept, newest, recent, has_padding), self.room)
                scores = scores.gather(2, index)
        if kept.tokens > self.room:
            kept = kept.chosen(index)
        if self.during == "prompt":
            return kept
        with torch.no_grad():  # when the next token has come, one less of these is among the newest
            ranks = self.ranked(scores, kept, newest, max(0, recent - 1), has_padding)
            return kept.doomed(lines_of(lowest(ranks, self.victims_of(self.room)), kept.tokens))

    def scores(self, kept: Kept, newest: int | Tensor) -> Tensor:
        """What the policy says of each token, float `[batch, num_kv_heads, tokens]`."""
        scores = self.policy.score(Held(*kept.dense(), kept.positions, newest, self.attended, kept.notes))
        if not isinstance(scores, Tensor) or scores.shape != kept.positions.shape:
            got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"{type(self.policy).__name__}.score gives [batch, num_kv_heads, tokens], here "
                f"{list(kept.positions.shape)}; got {got}"
            )
        return scores

    def ranked(self, scores: Tensor, kept: Kept, newest: int | Tensor, recent: int, has_padding: bool) -> Tensor:
        """Scores with what is always kept at the top, and what no later query sees at the bottom."""
        window = self.attended.window
        return ranked(
            scores, kept.positions, newest, sinks=self.policy.sinks, recent=recent, window=window,
            has_padding=has_padding,
        )  # fmt: skip

    def victims_of(self, room: int) -> int:
        """How many victims a full cache of so many tokens chooses at once: `every`, as far as there are unprotected."""
        return min(self.every, room - self.policy.sinks - max(0, self.policy.recent_of(room) - 1))

    # Going back, and choosing rows.

    def check_length(self, seq_len: int) -> None:
        """As for every cache; ValueError, too, for a length at which something was held that is lost."""
        super().check_length(seq_len)
        if seq_len in (0, self.seq_len):
            return
        lost_at = self.lost_at if self.spare is None else self.seq_len
        name = type(self.policy).__name__
        if seq_len < lost_at:
            raise ValueError(
                f"cannot go back to {seq_len} tokens: what {name} evicted after {lost_at} is lost. Keep a "
                f"copy.deepcopy of the cache to go back to, or truncate(0) and read the tokens again"
            )
        if self.keeps_notes and self.policy.watches:
            raise ValueError(
                f"cannot go back to {seq_len} tokens: {name} has noted the attention of those that came after. Keep a "
                f"copy.deepcopy of the cache to go back to, or truncate(0) and read the tokens again"
            )

    def forget_from(self, seq_len: int) -> None:
        """Let go of the newest tokens, which lie behind the others since the last was lost."""
        assert self.kept is not None
        self.kept = self.kept.first(self.kept.tokens - (self.seq_len - seq_len))
        self.bytes_copied += size_of(self.kept.k) + size_of(self.kept.v)

    def choose_rows(self, rows: Tensor) -> None:
        """Copy the chosen rows, notes and victims with them."""
        assert self.kept is not None
        rows = rows.to(self.kept.k.device)
        with torch.inference_mode(False):
            kept = self.kept.of_rows(rows)
        lost_at = self.lost_at if self.spare is None else self.seq_len
        self.kept, self.spare, self.lost_at = kept, None, lost_at
        self.bytes_copied += size_of(kept.k) + size_of(kept.v)


def check_safeguard(safeguard: float, during: str, frequencies: Tensor | None) -> None:
    """ValueError unless heads can share a budget so."""
    if not isinstance(safeguard, float | int) or isinstance(safeguard, bool) or not 0 <= safeguard <= 1:
        raise ValueError(f"safeguard is a fraction of the budget, 0 to 1; got {safeguard!r}")
    if during != "prompt":
        raise ValueError('heads share a budget once, when the prompt has ended: take during="prompt" with safeguard')
    if frequencies is not None:
        raise ValueError("places in the cache are for heads that keep equally many: leave frequencies or safeguard out")
