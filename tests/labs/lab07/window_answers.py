"""Wrong answers to 07.1, 07.d1 and 07.d2, and other right ones."""

from __future__ import annotations

from collections import deque

import torch

from labkit.labs.lab07.bounded import Bounded
from tests.labs.answer import Wrong

# 07.1


def positions_always_joined(seq_len, budget, sinks):
    return list(range(sinks)) + list(range(max(0, seq_len - (budget - sinks)), seq_len))


def positions_no_sinks(seq_len, budget, sinks):
    return list(range(max(0, seq_len - budget), seq_len))


def positions_sinks_besides(seq_len, budget, sinks):
    if seq_len <= budget:
        return list(range(seq_len))
    return list(range(sinks)) + list(range(max(sinks, seq_len - budget), seq_len))


def positions_overlapping(seq_len, budget, sinks):
    if seq_len <= budget:
        return list(range(seq_len))
    return list(range(sinks)) + list(range(seq_len - budget, seq_len))


def positions_one_more(seq_len, budget, sinks):
    if seq_len <= budget:
        return list(range(seq_len))
    return list(range(sinks)) + list(range(seq_len - (budget - sinks) - 1, seq_len))


def positions_one_less(seq_len, budget, sinks):
    if seq_len < budget:
        return list(range(seq_len))
    return list(range(sinks)) + list(range(seq_len - (budget - sinks) + 1, seq_len))


def positions_one_more_sink(seq_len, budget, sinks):
    if seq_len <= budget:
        return list(range(seq_len))
    return list(range(sinks + 1)) + list(range(seq_len - (budget - sinks) + 1, seq_len))


def positions_without_newest(seq_len, budget, sinks):
    if seq_len <= budget:
        return list(range(seq_len))
    return list(range(sinks)) + list(range(seq_len - (budget - sinks), seq_len - 1))


def positions_next_token(seq_len, budget, sinks):
    if seq_len <= budget:
        return list(range(seq_len))
    return list(range(sinks)) + list(range(seq_len - (budget - sinks) + 1, seq_len + 1))


def positions_from_one(seq_len, budget, sinks):
    if seq_len <= budget:
        return list(range(1, seq_len + 1))
    return list(range(1, sinks + 1)) + list(range(seq_len - (budget - sinks) + 1, seq_len + 1))


def positions_early_sinks(seq_len, budget, sinks):
    return list(range(sinks)) + list(range(max(sinks, seq_len - (budget - sinks)), seq_len))


def positions_descending(seq_len, budget, sinks):
    if seq_len <= budget:
        return list(range(seq_len))[::-1]
    return (list(range(sinks)) + list(range(seq_len - (budget - sinks), seq_len)))[::-1]


def positions_window_first(seq_len, budget, sinks):
    if seq_len <= budget:
        return list(range(seq_len))
    return list(range(seq_len - (budget - sinks), seq_len)) + list(range(sinks))


def positions_tensor(seq_len, budget, sinks):
    positions = torch.arange(seq_len)
    return positions[(positions < sinks) | (positions >= seq_len - (budget - sinks))]


def positions_nested(seq_len, budget, sinks):
    if seq_len <= budget:
        return [range(seq_len)]
    return [range(sinks), range(seq_len - (budget - sinks), seq_len)]


def positions_sign(seq_len, budget, sinks):
    if seq_len <= budget:
        return list(range(seq_len))
    return list(range(sinks)) + list(range(seq_len - budget - sinks, seq_len))


def positions_first(seq_len, budget, sinks):
    return list(range(min(seq_len, budget)))


def positions_spread(seq_len, budget, sinks):
    if seq_len <= budget:
        return list(range(seq_len))
    return sorted({i * (seq_len - 1) // max(1, budget - 1) for i in range(budget)})


def positions_by_test(seq_len, budget, sinks):
    return [p for p in range(seq_len) if p < sinks or p >= seq_len - (budget - sinks)]


def positions_by_max(seq_len, budget, sinks):
    return [*range(min(sinks, seq_len)), *range(max(sinks, seq_len - budget + sinks), seq_len)]


def positions_range_while_short(seq_len, budget, sinks):
    if seq_len <= budget:
        return range(seq_len)
    return (*range(sinks), *range(sinks + seq_len - budget, seq_len))


def positions_by_simulation(seq_len, budget, sinks):
    first, ring = [], deque(maxlen=budget - sinks)
    for position in range(seq_len):
        if position < sinks:
            first.append(position)
        else:
            ring.append(position)
    return first + list(ring)


def positions_by_slice(seq_len, budget, sinks):
    everything = list(range(seq_len))
    return everything if len(everything) <= budget else everything[:sinks] + everything[sinks - budget :]


def positions_by_torch(seq_len, budget, sinks):
    return positions_tensor(seq_len, budget, sinks).tolist()


# 07.d1: the function with other lines. By name: `first`, `recent`, `length` and `kept` are expressions.

SOURCE = """
def append_bounded(cache, k, v):
    first = {first}
    {before}
    cache.k = torch.cat((cache.k, k), dim=1)
    cache.v = torch.cat((cache.v, v), dim=1)
    cache.positions = torch.cat((cache.positions, {new}))
    recent = {recent}
    kept = {kept}
    cache.k, cache.v, cache.positions = {cut}
    {after}
"""
LINES = {
    "first": "cache.seq_len",
    "before": "cache.seq_len = first + k.shape[1]",
    "new": "torch.arange(first, first + k.shape[1])",
    "recent": "first + k.shape[1] - (cache.budget - cache.sinks)",
    "kept": "(cache.positions < cache.sinks) | (cache.positions >= recent)",
    "cut": "cache.k[:, kept], cache.v[:, kept], cache.positions[kept]",
    "after": "pass",
}
HELD = {"first": "cache.k.shape[1]", "before": "pass", "after": "cache.seq_len = cache.k.shape[1]"}


def bounded(**lines):
    """append_bounded with these lines in place of the right ones."""
    space = {"torch": torch}
    exec(compile(SOURCE.format(**{**LINES, **lines}), "<a cell>", "exec", dont_inherit=True), space)
    return space["append_bounded"]


def append_returns_another(cache, k, v):
    other = Bounded(cache.budget, cache.sinks, cache.k, cache.v, cache.positions, cache.seq_len)
    bounded()(other, k, v)
    return other


def append_newest_first(cache, k, v):
    bounded()(cache, k, v)
    place = torch.arange(len(cache.positions))
    order = torch.cat((place[cache.sinks :], place[: cache.sinks]))
    cache.k, cache.v, cache.positions = cache.k[:, order], cache.v[:, order], cache.positions[order]


def append_in_place_on_arguments(cache, k, v):
    bounded()(cache, k, v)
    k.zero_()


def append_one_by_one(cache, k, v):
    for place in range(k.shape[1]):
        cache.k = torch.cat((cache.k, k[:, place : place + 1]), 1)
        cache.v = torch.cat((cache.v, v[:, place : place + 1]), 1)
        cache.positions = torch.cat((cache.positions, torch.tensor([cache.seq_len])))
        cache.seq_len += 1
        if len(cache.positions) > cache.budget:
            left = [i for i in range(len(cache.positions)) if i != cache.sinks]
            cache.k, cache.v, cache.positions = cache.k[:, left], cache.v[:, left], cache.positions[left]


def append_by_slices(cache, k, v):
    position = torch.arange(k.shape[1]) + cache.seq_len
    cache.seq_len += k.shape[1]
    k, v, position = torch.cat((cache.k, k), 1), torch.cat((cache.v, v), 1), torch.cat((cache.positions, position))
    if len(position) > cache.budget:
        window = cache.budget - cache.sinks
        k, v = (torch.cat((x[:, : cache.sinks], x[:, -window:]), 1) for x in (k, v))
        position = torch.cat((position[: cache.sinks], position[-window:]))
    cache.k, cache.v, cache.positions = k, v, position


# 07.d2


def slot_bug(position, budget, sinks):
    if position <= budget - 1:
        return position
    return sinks + (position - budget) % (budget - sinks) - 1


def slot_modulo_budget(position, budget, sinks):
    return position % budget


def slot_without_sinks_added(position, budget, sinks):
    return position if position < budget else (position - sinks) % (budget - sinks)


def slot_shifted(position, budget, sinks):
    return position if position < budget else sinks + position % (budget - sinks)


def slot_of_budget(position, budget, sinks):
    return position if position < budget else sinks + (position - sinks) % budget


def slot_boundary(position, budget, sinks):
    return position if position <= budget else sinks + (position - sinks) % (budget - sinks)


def slot_clamped(position, budget, sinks):
    return position if position < budget else max(sinks, slot_bug(position, budget, sinks))


def slot_minus_inside(position, budget, sinks):
    return position if position < budget else sinks + (position - budget - 1) % (budget - sinks)


def slot_plus_inside(position, budget, sinks):
    return position if position < budget else sinks + (position - budget + 1) % (budget - sinks)


def slot_float(position, budget, sinks):
    return position if position < budget else sinks + (position - sinks) % float(budget - sinks)


def slot_ring_one_shorter(position, budget, sinks):
    return position if position < budget else sinks + (position - budget) % max(1, budget - sinks - 1)


def slot_over_the_end(position, budget, sinks):
    return position if position < budget else sinks + (position - budget) % (budget - sinks + 2)


def slot_always_oldest(position, budget, sinks):
    return position if position < budget else sinks


def slot_by_while(position, budget, sinks):
    while position >= budget:
        position -= (budget - sinks) * max(1, (position - budget) // (budget - sinks))
    return position


def slot_by_simulation(position, budget, sinks):
    slot = -1
    for _ in range(position % 100_000 + 1):
        slot = slot + 1 if slot + 1 < budget else sinks
    return slot


def slot_by_divmod(position, budget, sinks):
    return min(position, sinks + divmod(position - budget, budget - sinks)[1]) if position >= sinks else position


def slot_from_budget(position, budget, sinks):
    if position < budget:
        return position
    return sinks + (position - budget) % (budget - sinks)


WRONG = [
    Wrong("07.1", "always-full", "joined while the window reaches into the sinks", positions_always_joined),
    Wrong("07.1", "sinks-left-out", "a window alone", positions_no_sinks),
    Wrong("07.1", "sinks-besides-budget", "budget newest tokens and the sinks", positions_sinks_besides,
          "the cache sizes of StreamingLLM's code: start_size + recent_size"),
    Wrong("07.1", "sinks-besides-budget", "the same, listed twice where they overlap", positions_overlapping),
    Wrong("07.1", "window-one-longer", "one token too many", positions_one_more),
    Wrong("07.1", "window-one-shorter", "one token too few", positions_one_less),
    Wrong("07.1", "one-sink-more", "one sink more, one newest less", positions_one_more_sink),
    Wrong("07.1", "newest-missing", "the range ends one too early", positions_without_newest),
    Wrong("07.1", "counts-one-more", "position seq_len is held", positions_next_token),
    Wrong("07.1", "counts-from-one", "positions from 1", positions_from_one),
    Wrong("07.1", "sinks-before-they-came", "sinks that have not come yet", positions_early_sinks),
    Wrong("07.1", "descending", "newest first", positions_descending),
    Wrong("07.1", "window-first", "the window before the sinks", positions_window_first),
    Wrong("07.1", "not-a-list", "a tensor", positions_tensor),
    Wrong("07.1", "not-positions", "a list of two ranges", positions_nested),
    Wrong("07.1", "sign", "brackets lost", positions_sign),
    Wrong("07.1", "first-tokens", "the first tokens", positions_first),
    Wrong("07.1", "values", "tokens spread over the text", positions_spread),
    Wrong("07.d1", "held-for-seen", "the bug as it is", bounded(**HELD)),
    Wrong("07.d1", "held-for-seen", "only `first` mended: seq_len is still what is held",
          bounded(**{**HELD, "first": "cache.seq_len"})),
    Wrong("07.d1", "positions-from-held", "only seq_len mended",
          bounded(first="cache.k.shape[1]", before="cache.seq_len += k.shape[1]")),
    Wrong("07.d1", "positions-from-held", "only seq_len mended, and the window's end with it",
          bounded(first="cache.k.shape[1]", before="cache.seq_len += k.shape[1]",
                  recent="cache.seq_len - (cache.budget - cache.sinks)")),
    Wrong("07.d1", "length-is-held", "positions from the last one, seq_len from what is held",
          bounded(**{**HELD, "first": "int(cache.positions[-1]) + 1 if len(cache.positions) else 0"})),
    Wrong("07.d1", "length-stays", "seq_len is never set", bounded(before="pass")),
    Wrong("07.d1", "length-by-one", "seq_len counts appends", bounded(before="cache.seq_len += 1")),
    Wrong("07.d1", "length-before-dropping", "seq_len before dropping",
          bounded(before="pass", recent="cache.k.shape[1] - (cache.budget - cache.sinks)",
                  first="cache.k.shape[1]", kept="(cache.positions < cache.sinks) | (cache.positions >= recent)",
                  after="cache.seq_len = first + k.shape[1]")),
    Wrong("07.d1", "one-too-many", "the window one too long",
          bounded(recent="first + k.shape[1] - (cache.budget - cache.sinks) - 1")),
    Wrong("07.d1", "one-too-few", "> for >=",
          bounded(kept="(cache.positions < cache.sinks) | (cache.positions > recent)")),
    Wrong("07.d1", "sinks-besides-budget", "sinks besides the budget",
          bounded(recent="first + k.shape[1] - cache.budget")),
    Wrong("07.d1", "sinks-dropped", "no sinks", bounded(kept="cache.positions >= recent")),
    Wrong("07.d1", "renumbered", "positions in the cache",
          bounded(after="cache.positions = torch.arange(len(cache.positions))")),
    Wrong("07.d1", "held-apart", "V is not cut", bounded(cut="cache.k[:, kept], cache.v, cache.positions[kept]")),
    Wrong("07.d1", "other-vectors", "K is cut for V",
          bounded(cut="cache.k[:, kept], cache.k[:, kept], cache.positions[kept]")),
    Wrong("07.d1", "positions-dtype", "positions in float",
          bounded(new="torch.arange(float(first), first + k.shape[1])")),
    Wrong("07.d1", "not-in-place", "another cache comes back", append_returns_another),
    Wrong("07.d1", "order", "sinks behind the window", append_newest_first),
    Wrong("07.d1", "arguments-changed", "k is emptied", append_in_place_on_arguments),
    Wrong("07.d2", "last-sink-overwritten", "the bug as it is", slot_bug),
    Wrong("07.d2", "no-sinks", "position % budget", slot_modulo_budget),
    Wrong("07.d2", "sinks-not-added", "the ring begins at 0", slot_without_sinks_added),
    Wrong("07.d2", "ring-shifted", "position is not taken from the ring's first", slot_shifted),
    Wrong("07.d2", "ring-too-long", "modulo the budget", slot_of_budget),
    Wrong("07.d2", "one-too-late", "<= budget", slot_boundary),
    Wrong("07.d2", "first-twice", "clamped to the first of the ring", slot_clamped),
    Wrong("07.d2", "newest-overwritten", "-1 moved inside", slot_minus_inside),
    Wrong("07.d2", "one-slot-late", "-1 turned into +1 inside", slot_plus_inside),
    Wrong("07.d2", "not-whole", "a float", slot_float),
    Wrong("07.d2", "values", "a ring one slot shorter", slot_ring_one_shorter),
    Wrong("07.d2", "no-such-slot", "a ring two slots longer", slot_over_the_end),
    Wrong("07.d2", "always-the-same", "always the first of the ring", slot_always_oldest),
]  # fmt: skip

RIGHT = [
    ("07.1", positions_by_test),
    ("07.1", positions_by_max),
    ("07.1", positions_range_while_short),
    ("07.1", positions_by_simulation),
    ("07.1", positions_by_slice),
    ("07.1", positions_by_torch),
    ("07.d1", bounded()),
    ("07.d1", append_one_by_one),
    ("07.d1", append_by_slices),
    ("07.d2", slot_by_while),
    ("07.d2", slot_by_simulation),
    ("07.d2", slot_by_divmod),
    ("07.d2", slot_from_budget),
]
