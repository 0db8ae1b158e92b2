"""06.1: slots that hold no token."""

from __future__ import annotations

import numbers
import random
from collections.abc import Callable
from typing import Any, ClassVar

from labkit.course.checks.suspects import Suspect
from labkit.course.checks.tensors import shifted
from labkit.course.exercise import Exercise, NotYet
from labkit.labs.lab06.parts import judge_parts
from labkit.labs.lab06.references import waste

NAMES = ("reserved", "never filled", "empty in blocks")
LAST = "one request by hand: 5 tokens in blocks of 4 take 2 blocks"


def reserved(held: list[int], final: list[int], room: int, size: int) -> int:
    """Slots for tokens to come."""
    return sum(final) - sum(held)


def never(held: list[int], final: list[int], room: int, size: int) -> int:
    """Slots behind the requests' ends."""
    return room * len(final) - sum(final)


def both(held: list[int], final: list[int], room: int, size: int) -> int:
    """Every slot without a token."""
    return room * len(held) - sum(held)


def in_blocks(held: list[int], final: list[int], room: int, size: int) -> int:
    """Empty slots of last blocks."""
    return sum(-tokens % size for tokens in held)


def over(function: Callable[[int, int, int, int], int]) -> Callable[..., int]:
    """The sum of a function of one request."""
    return lambda held, final, room, size: sum(function(h, f, room, size) for h, f in zip(held, final, strict=True))


def suspects(place: int) -> list[Suspect]:
    """What is returned in place of one of the three numbers."""
    others: list[Callable[..., Any]] = [reserved, never, in_blocks]
    own = others.pop(place)
    look = f"the order of the return: {', '.join(NAMES)}"
    listed = [Suspect("order", others, "another of the three numbers stands in this place", look)]
    for share in (lambda room, held: room * len(held), lambda room, held: room):
        listed.append(Suspect(
            "share", lambda held, final, room, size, of=share: own(held, final, room, size) / of(room, held),
            "a share of the slots came back; the slots themselves are asked for",
            "the return: whole numbers, no division",
        ))  # fmt: skip
    if own is reserved:
        listed += [
            Suspect("counts-all-empty", both, "every empty slot was counted; those behind the request's end will never "
                    "be filled", "what is still to come: from held[i] to final[i]"),
            Suspect("counts-tokens", [lambda held, final, room, size: sum(final),
                                      lambda held, final, room, size: sum(held)],
                    "tokens were counted, not slots without one", "what is still to come: from held[i] to final[i]"),
        ]  # fmt: skip
    if own is never:
        listed += [
            Suspect("counts-all-empty", both, "slots that are reserved for tokens to come were counted too",
                    "what is never filled: from final[i] to room"),
            Suspect("one-request", [lambda held, final, room, size: room - sum(final),
                                    lambda held, final, room, size: room - max(final, default=0)],
                    "room was counted once, not for each request", "the sum: each request has room of its own"),
        ]  # fmt: skip
    if own is in_blocks:
        listed += [
            Suspect("full-block-empty", over(lambda h, f, room, size: size - h % size),
                    "where the tokens fill their last block, a whole empty block was counted",
                    "a length that block_size divides: nothing is empty"),
            Suspect("counts-tokens", over(lambda h, f, room, size: h % size),
                    "the tokens in the last block were counted, not its empty slots", LAST),
            Suspect("one-request", lambda held, final, room, size: -sum(held) % size,
                    "all tokens were put into blocks together; requests do not share a last block",
                    "the sum: round up each request's tokens by itself"),
            Suspect("final-tokens", over(lambda h, f, room, size: -f % size),
                    "the blocks are those of the request's end; blocks are taken when they are needed",
                    "which tokens are there now: held"),
            Suspect("slots-taken", over(lambda h, f, room, size: -(-h // size) * size),
                    "all slots of the blocks were counted", LAST),
            Suspect("blocks-for-final", over(lambda h, f, room, size: -(-f // size) * size - h),
                    "the blocks of all tokens to come were counted as taken; blocks are taken when they are needed",
                    "which tokens are there now: held"),
            Suspect("powers-of-two", [over(lambda h, f, room, size: -h & (size - 1)),
                                      over(lambda h, f, room, size: (size - h) & (size - 1)),
                                      over(lambda h, f, room, size: -(h & (size - 1)) % size)],
                    "a bit mask (&) gives a rest only where block_size is a power of two; 3 and 7 are sizes, too",
                    "-tokens % block_size, for any block_size"),
            Suspect("a-block-for-none", over(lambda h, f, room, size: max(1, -(-h // size)) * size - h),
                    "a request without a token was given a block; blocks are taken when a token needs one",
                    "a request that holds 0 tokens has no block"),
            Suspect("blocks-counted", over(lambda h, f, room, size: -(-h // size)), "blocks were counted, not slots",
                    LAST),
        ]  # fmt: skip
    return listed


class Waste(Exercise):
    """What reserving wastes, and what blocks waste."""

    id, title, minutes, difficulty = "06.1", "What reserving wastes", 4, 1
    reference = staticmethod(waste)
    why = (
        "A request's room has three parts: tokens, what it will still fill, what it never will. Of blocks only the "
        "last one has empty slots, and -tokens % block_size are missing to the next multiple."
    )
    hints = (
        "Draw one request: held[i], final[i] and room are three marks on a line.",
        "reserved is final - held, never filled is room - final. In blocks, tokens are rounded up to whole blocks.",
        "in_blocks = sum(-tokens % block_size for tokens in held)",
    )
    hints_for: ClassVar = {
        "full-block-empty": "16 tokens in blocks of 16: how many slots are empty? What does 16 - 16 % 16 say?",
        "one-request": "Two requests of one token each: how many blocks of 16, and how many empty slots?",
    }

    def examine(self, answer: Callable) -> None:
        """No request, one, many; full blocks, full rooms, requests at their end; each argument changed alone."""
        draw = random.Random(shifted(0))
        final = [draw.randint(30, 900) for _ in range(200)]
        held = [draw.randint(1, tokens) for tokens in final]
        cases = [
            ([5], [9], 20, 4),
            ([5], [9], 31, 4),
            ([5], [12], 20, 4),
            ([5], [9], 20, 3),
            ([6], [9], 20, 4),
            ([8, 5, 1], [8, 11, 16], 16, 4),
            ([7, 7, 30], [13, 21, 30], 40, 1),
            ([33, 48], [60, 48], 64, 16),
            ([0, 5, 0], [9, 9, 12], 20, 4),
            (held, final, 1000, 16),
            (held, final, 1000, 7),
            ([], [], 50, 8),
        ]
        named = [suspects(place) for place in range(len(NAMES))]
        try:
            for some in (cases[:-1], cases):  # without a request, a wrong formula may stop before it is seen
                judge_parts(type(self), answer, waste, some, named, NAMES, lambda name: f"the number of slots, {name},")
        except NotYet as not_yet:
            if not_yet.finding.diagnosis == "not-whole":
                self.explain_empty(answer, cases)
            raise

    def explain_empty(self, answer: Callable, cases: list[tuple]) -> None:
        """Whole numbers for requests, and floats only where there is none."""
        floats = [case for case in cases if not all(isinstance(x, numbers.Integral) for x in answer(*case))]
        if floats and not any(held for held, *_ in floats):
            self.fail(
                "float-when-empty",
                seen=f"with no request, {answer(*floats[0])!r} came back; with requests, whole numbers",
                cause="an empty list does not say that its numbers would be whole: a tensor or an array made of it "
                "holds floats",
                look="where the lists are turned into a tensor or an array: dtype=torch.int64, say, or sum() of a list",
            )
