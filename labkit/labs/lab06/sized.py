"""06.9: the block size that costs least."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial
from typing import ClassVar

from labkit.course.checks.numbers import judge
from labkit.course.checks.suspects import Suspect
from labkit.course.checks.tensors import shifted
from labkit.course.exercise import Exercise
from labkit.labs.lab06.parts import shown
from labkit.labs.lab06.references import best_block_size

Cost = Callable[[list[int], list[int], int, float, float], float]


def blocks(lengths: list[int], size: int) -> int:
    """Blocks of all requests."""
    return sum(-(-tokens // size) for tokens in lengths)


def empty(lengths: list[int], size: int) -> int:
    """Empty slots of last blocks."""
    return sum(-tokens % size for tokens in lengths)


def again(shared: list[int], size: int) -> int:
    """Shared tokens in no full block."""
    return sum(tokens % size for tokens in shared)


def least(cost: Cost, *, largest: bool = False, most: bool = False) -> Callable[..., int]:
    """The size of least cost by another reckoning."""

    def choose(lengths: list[int], shared: list[int], sizes: list[int], slot: float, block: float) -> int:
        sign = -1 if most else 1
        return min(sorted(sizes, reverse=largest), key=lambda size: sign * cost(lengths, shared, size, slot, block))

    return choose


def right(lengths: list[int], shared: list[int], size: int, slot: float, block: float) -> float:
    """The cost as the docstring has it."""
    return slot * (empty(lengths, size) + again(shared, size)) + block * blocks(lengths, size)


def one_beginning(of: Callable[[list[int]], int]) -> Cost:
    """The cost where one number of shared tokens, made of all of them, stands for every request's."""
    return lambda n, s, size, slot, block: slot * (empty(n, size) + of(s) % size) + block * blocks(n, size)


def masked(n: list[int], s: list[int], size: int, slot: float, block: float, *, both: bool, up: bool) -> float:
    """The cost with bit masks in place of remainders, those of shared tokens too if `both`; up: blocks by a shift."""
    rest = sum(-tokens & (size - 1) for tokens in n)
    other = sum(tokens & (size - 1) for tokens in s) if both else again(s, size)
    count = sum((tokens + size - 1) >> (size.bit_length() - 1) for tokens in n) if up else blocks(n, size)
    return slot * (rest + other) + block * count


def until_dearer(*, equal: bool, ordered: bool) -> Callable[..., int]:
    """A search that ends where the cost rises for the first time; equal: or stays the same."""

    def choose(lengths: list[int], shared: list[int], sizes: list[int], slot: float, block: float) -> int | None:
        best, least = None, math.inf
        for size in sorted(sizes) if ordered else sizes:
            cost = right(lengths, shared, size, slot, block)
            if cost > least or (equal and cost == least):
                break
            if cost < least:
                best, least = size, cost
        return best

    return choose  # type: ignore[return-value]


def below(start: float) -> Callable[..., int]:
    """A search that begins with a cost written down: what is dearer is never chosen."""

    def choose(lengths: list[int], shared: list[int], sizes: list[int], slot: float, block: float) -> int:
        best, least = sizes[0], start
        for size in sorted(sizes):
            cost = right(lengths, shared, size, slot, block)
            if cost < least:
                best, least = size, cost
        return best

    return choose


ONE_MORE = "tokens // size + 1 has a block too many where size divides tokens: round up"
EACH = "shared[i] % block size, of each request"
SUSPECTS = (
    Suspect("largest-of-equals", least(right, largest=True), "of sizes that cost the same the largest was taken",
            "`<` or `<=`, and the order in which sizes are tried: sorted(sizes)"),
    Suspect("order-of-sizes", lambda lengths, shared, sizes, slot, block: min(
                sizes, key=lambda size: right(lengths, shared, size, slot, block)),
            "of sizes that cost the same the first in the list was taken; the list may have any order",
            "sorted(sizes) before the search"),
    Suspect("dearest", [least(right, most=True), least(right, most=True, largest=True)],
            "the size that costs most came back", "min, not max"),
    Suspect("no-shared", least(lambda n, s, size, slot, block: slot * empty(n, size) + block * blocks(n, size)),
            "shared tokens that lie in no full block were left out, or all of them counted at every size",
            "shared[i] % block size, at slot_cost each"),
    Suspect("no-empty", least(lambda n, s, size, slot, block: slot * again(s, size) + block * blocks(n, size)),
            "empty slots of last blocks were left out", "-tokens % block size, at slot_cost each"),
    Suspect("no-blocks", least(lambda n, s, size, slot, block: slot * (empty(n, size) + again(s, size))),
            "what blocks cost was left out, or not counted once for each block",
            "block_cost for each block of each request"),
    Suspect("full-blocks-only", least(lambda n, s, size, slot, block: slot * (empty(n, size) + again(s, size))
                                      + block * sum(tokens // size for tokens in n)),
            "blocks were rounded down: the last one costs too", "blocks of a request: its tokens rounded up"),
    Suspect("blocks-not-rounded", least(lambda n, s, size, slot, block: slot * (empty(n, size) + again(s, size))
                                        + block * sum(tokens / size for tokens in n)),
            "5 tokens were given one and a quarter blocks of 4", "blocks of a request: its tokens rounded up"),
    Suspect("full-block-empty", least(lambda n, s, size, slot, block: slot * (
                sum(size - tokens % size for tokens in n) + again(s, size)) + block * blocks(n, size)),
            "where tokens fill their last block, a whole empty block was counted", "-tokens % size is 0 there"),
    Suspect("costs-swapped", least(lambda n, s, size, slot, block: right(n, s, size, block, slot)),
            "slot_cost and block_cost changed places", "which of the two multiplies slots, which blocks?"),
    Suspect("together", least(lambda n, s, size, slot, block: slot * (-sum(n) % size + sum(s) % size)
                              + block * -(-sum(n) // size)),
            "all requests were counted as one long one", "the sums: round each request by itself"),
    Suspect("shared-blocks-free", least(lambda n, s, size, slot, block: right(n, s, size, slot, block)
                                        - block * sum(tokens // size for tokens in s)),
            "full shared blocks were left out of the blocks", "block_cost: each block of a request costs it"),
    Suspect("one-block-more", [
                least(lambda n, s, size, slot, block: slot * (sum(size - tokens % size for tokens in n)
                                                              + again(s, size))
                      + block * sum(tokens // size + 1 for tokens in n)),
                least(lambda n, s, size, slot, block: slot * (empty(n, size) + again(s, size))
                      + block * sum(tokens // size + 1 for tokens in n))],
            "where tokens fill their last block, one more was counted", ONE_MORE),
    Suspect("shared-turned-round", [
                least(lambda n, s, size, slot, block: slot * (empty(n, size) + sum(t // size * size for t in s))
                      + block * blocks(n, size)),
                least(lambda n, s, size, slot, block: slot * (empty(n, size) + sum(t // size for t in s))
                      + block * blocks(n, size))],
            "shared tokens that lie in full blocks were counted; those are taken once for all",
            "shared[i] % block size: the rest, which every request has for itself"),
    Suspect("shared-once", [least(one_beginning(of)) for of in (sum, partial(max, default=0), partial(min, default=0))],
            "the shared beginning was counted once for all requests", EACH),
    Suspect("together", [
                least(lambda n, s, size, slot, block: slot * (-sum(n) % size + again(s, size))
                      + block * -(-sum(n) // size)),
                least(lambda n, s, size, slot, block: slot * (-sum(n) % size + again(s, size))
                      + block * blocks(n, size)),
                least(lambda n, s, size, slot, block: slot * (empty(n, size) + again(s, size))
                      + block * -(-sum(n) // size))],
            "the tokens of all requests were rounded up together; each has a last block of its own",
            "the sums: round each request by itself"),
    Suspect("slot-cost-left-out", [
                least(lambda n, s, size, slot, block: slot * empty(n, size) + again(s, size) + block * blocks(n, size)),
                least(lambda n, s, size, slot, block: empty(n, size) + slot * again(s, size) + block * blocks(n, size)),
                least(lambda n, s, size, slot, block: empty(n, size) + again(s, size) + block * blocks(n, size))],
            "slot_cost does not multiply all the slots: empty ones and shared ones cost it alike",
            "slot_cost * (both kinds of slots)"),
    Suspect("stops-early", [until_dearer(equal=equal, ordered=ordered) for equal in (False, True)
                            for ordered in (True, False)],
            "the search ended at the first size that costs no less than the one before; costs may fall again",
            "the loop: every size is tried"),
    Suspect("powers-of-two", [
                least(partial(masked, both=both, up=up)) for both in (True, False) for up in (False, True)],
            "a bit mask (&) gives a rest only where the size is a power of two; others are among the sizes, too",
            "-tokens % size and tokens % size, for any size"),
    Suspect("start-value", [below(10.0**power) for power in range(3, 10)],
            "the least cost so far began with a number written down, and all sizes cost more than that here",
            "the cost that the search begins with: the first size's, or math.inf"),
    Suspect("divided-by-size", [
                least(lambda n, s, size, slot, block: right(n, s, size, slot, block) / size),
                least(lambda n, s, size, slot, block: right(n, s, size, slot, block) / max(1, blocks(n, size) * size))],
            "the cost was divided by the size or by all slots; the whole cost is compared",
            "the last line of the cost: nothing is divided"),
)  # fmt: skip


class BestBlockSize(Exercise):
    """The optimum of the block size."""

    id, title, minutes, difficulty = "06.9", "How large a block should be", 5, 2
    needs = ("06.1",)
    reference = staticmethod(best_block_size)
    why = (
        "Empty slots and shared tokens in no full block grow with the size, the number of blocks falls with it. The "
        "sum has a least value in between; where it lies depends on what a block costs beside a slot."
    )
    hints = (
        "For one size and one request: how many blocks, how many empty slots, how many shared tokens in no full block?",
        "Write a function that gives the cost of one size, and take the size with the least.",
        "cost = slot_cost * (sum(-n % size for n in lengths) + sum(s % size for s in shared)) + block_cost * "
        "sum(-(-n // size) for n in lengths)\nmin(sorted(sizes), key=...)",
    )
    hints_for: ClassVar = {
        "no-shared": "40 shared tokens in blocks of 16: two full blocks are shared. What of the other 8?",
        "full-blocks-only": "A request of 5 tokens has two blocks of 4.",
    }

    def examine(self, answer: Callable) -> None:
        """Costs on both sides, small and large, ties, sizes in any order, no request, sizes that are no powers of 2."""
        draw = random.Random(shifted(0))
        many = [draw.randint(10, 400) for _ in range(60)]
        common = [min(tokens, 90) - draw.randint(0, 9) for tokens in many]
        sizes = [2**power for power in range(9)]
        cases = [
            (many, common, sizes, 1.0, block_cost) for block_cost in (0.0, 0.5, 1.5, 3.0, 6.0, 20.0, 200.0)
        ] + [
            (many, common, sizes, 25.0, 3.0),
            (many, [0] * 60, sizes, 1.0, 40.0),
            (many, [96] * 60, [13, 16, 48, 64, 96, 5], 1.0, 3.0),
            ([37, 37], [36, 36], [5, 12, 37, 18], 1.0, 2.0),
            ([16, 32], [0, 16], [16, 8, 4], 1.0, 0.0),
            ([16, 32], [0, 16], [4, 16, 8], 1.0, 0.0),
            ([16, 32], [0, 16], [16, 8, 4], 1.0, 1.0),
            ([5, 6, 7], [0, 0, 0], [4, 3, 8], 2.0, 5.0),
            ([1000, 3], [999, 2], [128, 64, 256, 1000], 1.0, 7.0),
            ([40, 40, 40, 40], [40, 0, 0, 0], [20, 30, 16], 1.0, 4.0),
            ([5, 5, 5, 5], [0, 0, 0, 0], [4, 5, 10, 20], 1.0, 4.0),
            ([12, 12], [0, 0], [4, 5], 1.0, 5.0),
            ([5, 5], [0, 0], [3, 4], 1.0, 6.0),
            ([1000, 3], [999, 2], [128, 64, 256, 1000], 4.0e9, 2.8e10),
            ([], [], [32, 16], 1.0, 1.0),
        ]  # fmt: skip
        judge(
            type(self), answer, best_block_size, cases, SUSPECTS, what="the block size that costs least", whole=True,
            show=shown(best_block_size),
        )  # fmt: skip
