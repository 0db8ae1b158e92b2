"""What the layers of a model note and choose in the same operations, at the end of a step.

An operation on the scores of one layer is short: much of its time is its call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from labkit.attention import Visibility
from labkit.cache.evicting.choosing import lowest, ranked
from labkit.cache.evicting.kept import Kept, lines_of
from labkit.cache.evicting.policy import Held, Notes, Policy, Seen
from labkit.cache.step import Step

if TYPE_CHECKING:
    from labkit.cache.evicting.layer import EvictingCache

WAITING = "queries of layers, and their weights, whose policies are asked at the end of a step"


def victims_together(layers: Sequence[EvictingCache], step: Step) -> Sequence[Tensor] | None:
    """Victims of each of several full layers, chosen by the same operations; None where they cannot be."""
    first, kinds = layers[0], {layer.kind_of_choice() for layer in layers}
    if len(layers) < 2 or len(kinds) > 1 or None in kinds:
        return None
    kept = first.kept
    assert kept is not None
    assert first.room is not None
    newest = newest_of(step, kept.k.device)
    with torch.inference_mode(False), torch.no_grad():
        scores = torch.stack([layer.scores(layer.kept, newest).float() for layer in layers if layer.kept is not None])
        positions = torch.stack([layer.kept.positions for layer in layers if layer.kept is not None])
        ranks = ranked(
            scores, positions, newest, sinks=first.policy.sinks, window=first.attended.window,
            recent=max(0, first.policy.recent_of(first.room) - 1), has_padding=first.has_padding(step),
        )  # fmt: skip
        return lines_of(lowest(ranks, first.victims_of(first.room)), kept.tokens).unbind()


Group = list[tuple["EvictingCache", Kept, Tensor, Tensor | None]]  # a layer, what it holds, its query, its weights


def show_together(layers: Sequence[EvictingCache], step: Step) -> None:
    """Keep what policies note of the queries that wait for the end of a step, those of alike layers in one call."""
    waiting = step.shared.get(WAITING, {})
    own = [(layer, waiting.pop(id(layer))) for layer in layers if id(layer) in waiting]
    while own:  # once, but for layers that were asked several times in the step
        groups: dict[tuple[Any, ...], Group] = {}
        for layer, asked in own:
            (q, known), kept = asked.pop(0), layer.kept
            if kept is None:
                continue
            noted = kept.notes.tokens is None, *(row.shape for row in kept.notes.rows)
            kind = id(layer.policy), q.shape, q.device, kept.positions.shape, layer.constants, known is None, noted
            groups.setdefault(kind, []).append((layer, kept, q, known))
        with torch.inference_mode(False), torch.no_grad():
            for group in groups.values():
                show_group(group, step)
        own = [(layer, asked) for layer, asked in own if asked]


def show_group(group: Group, step: Step) -> None:
    """Show layers that are alike to their policy, and let each keep its part of the notes."""
    policy, many, seen = group[0][0].policy, len(group), seen_together(group, step)
    try:
        notes = policy.watch(seen)
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
        raise ValueError(
            f"{type(policy).__name__}.watch reads K, V or positions, and its class says reads_held = False: say True"
        ) from error
    notes = checked_notes(policy, notes, seen)
    tokens = None if notes.tokens is None else notes.tokens.unflatten(0, (many, -1))
    rows = [row.unflatten(0, (many, -1)) for row in notes.rows]
    for i, (layer, kept, _, _) in enumerate(group):
        layer.kept = kept.noted(Notes(None if tokens is None else tokens[i], tuple(row[i] for row in rows)))


def seen_together(group: Group, step: Step) -> Seen:
    """What layers that are alike show their policy of a single query, as rows of one batch."""
    (first, kept, q, known), many = group[0], len(group)
    rows = (many * len(q), *kept.positions.shape[1:])
    if kept.notes.tokens is None:
        tokens = torch.zeros((), device=q.device).expand(rows)
    else:
        tokens = torch.cat([one.notes.tokens for _, one, _, _ in group if one.notes.tokens is not None])
    noted = tuple(torch.cat(some) for some in zip(*(one.notes.rows for _, one, _, _ in group), strict=True))
    newest, at = newest_of(step, q.device), step.text_positions(q.device)
    k = torch.empty(*rows, q.shape[3], device="meta")
    return Seen(
        k, k, torch.empty(*rows, device="meta"), newest.repeat(many, 1, 1) if isinstance(newest, Tensor) else newest,
        first.constants, Notes(tokens, noted), torch.cat([one for _, _, one, _ in group]),
        at.repeat(many, 1) if len(at) > 1 else at, Visibility.newest(1, kept.tokens),
        None if known is None else torch.cat([one for _, _, _, one in group if one is not None]), step.shared,
    )  # fmt: skip


def newest_of(step: Step, device: torch.device) -> int | Tensor:
    """The position of the newest token: a number where all rows are at the same, else int64 `[batch, 1, 1]`."""
    newest = [first + step.counts[0] - 1 for first in step.visible.first_query]
    return newest[0] if len(newest) == 1 else torch.tensor(newest, device=device)[:, None, None]


def checked_notes(policy: Policy, notes: Notes, kept: Kept | Held) -> Notes:
    """The notes of a policy, float32; ValueError unless they are of the tokens and rows held."""
    if not isinstance(notes, Notes):
        raise ValueError(f"{type(policy).__name__}.watch returns Notes; got a {type(notes).__name__}")
    tokens = notes.tokens
    if tokens is not None and tokens.shape != kept.positions.shape:
        raise ValueError(
            f"{type(policy).__name__}.watch notes a number for each token held, {list(kept.positions.shape)}; got "
            f"{list(tokens.shape)}"
        )
    if any(row.shape[:1] != kept.k.shape[:1] for row in notes.rows):
        raise ValueError(f"{type(policy).__name__}.watch notes of rows are [{kept.k.shape[0]}, ...] each")
    return notes if tokens is None or tokens.dtype == torch.float32 else replace(notes, tokens=tokens.float())
