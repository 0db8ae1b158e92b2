"""Fewer cases than a product has, in which any two values still meet."""

from __future__ import annotations

from collections.abc import Sequence


def every_pair(first: Sequence, second: Sequence, third: Sequence) -> list[tuple]:
    """Triples in which every two values of different lists meet at least once: as many as the two longer lists have
    pairs. The shortest list goes round along both, so that each of its values meets each of theirs."""
    lists = first, second, third
    short = min(range(3), key=lambda at: len(lists[at]))
    one, other = (at for at in range(3) if at != short)
    made = []
    for i, x in enumerate(lists[one]):
        for j, y in enumerate(lists[other]):
            z = lists[short][(i + j) % len(lists[short])]
            made.append(tuple({one: x, other: y, short: z}[at] for at in range(3)))
    return made
