"""07.1, 07.d1 and 07.d2: what a window holds, and two bugs of caches that keep one, to mend."""

from __future__ import annotations

import copy
import numbers
import random
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from labkit.course.checks.hidden import hidden
from labkit.course.checks.numbers import judge
from labkit.course.checks.suspects import Suspect, accuse
from labkit.course.checks.tensors import agree, draw, first_place
from labkit.course.checks.trials import sliced, transposed
from labkit.course.exercise import Exercise, NotYet
from labkit.labs.lab07.bounded import Bounded
from labkit.labs.lab07.references import append_bounded, ring_slot, window_positions

# seq_len, budget, sinks: short, exactly full, one over, a window that has just left the sinks, one token of window.
HELD = (
    (3, 8, 2), (8, 8, 2), (9, 8, 2), (10, 8, 2), (11, 8, 2), (20, 8, 2), (1, 8, 3), (2, 8, 3), (7, 8, 3), (13, 8, 0),
    (1, 1, 0), (5, 1, 0), (6, 5, 4), (30, 5, 4), (5, 5, 4), (0, 4, 1), (12, 7, 5), (100, 9, 1), (2000, 24, 4),
)  # fmt: skip


def some_ring(chance: random.Random, most: int) -> tuple[int, int, int]:
    """Up to `most` tokens, a budget, and fewer sinks than that."""
    budget = chance.randint(1, 40)
    return chance.randint(0, most), budget, chance.randrange(budget)


def from_end(n: int, count: int) -> list[int]:
    """The newest `count` positions of `n`, or fewer."""
    return list(range(max(0, n - count), n))


def else_all(rule: Callable[[int, int, int], list[int]]) -> Callable[[int, int, int], list[int]]:
    """A rule for full windows; every token before."""
    return lambda n, b, s: list(range(n)) if n <= b else rule(n, b, s)


def both_ways(rule: Callable[[int, int, int], list[int]]) -> list[Callable[[int, int, int], list[int]]]:
    """A rule applied to full windows only, and always."""
    return [else_all(rule), rule]


SUM = "how many tokens are held in all: the sinks are among the `budget`"
EDGE = "the first position of the window: seq_len - (budget - sinks), and the last: seq_len - 1"
SHORT = "what is held while seq_len is no more than budget, with small numbers: 3 tokens, a budget of 8"
POSITIONS = (
    Suspect("sinks-besides-budget",
            [*both_ways(lambda n, b, s: [*range(min(s, n)), *range(max(s, n - b), n)]),
             *both_ways(lambda n, b, s: [*range(s), *range(n - b, n)]),
             *both_ways(lambda n, b, s: sorted({*range(min(s, n)), *from_end(n, b)})),
             *both_ways(lambda n, b, s: [*range(s), *from_end(n, b)]),
             lambda n, b, s: list(range(n)) if n <= b + s else [*range(s), *range(n - b, n)]],
            "the newest `budget` tokens were kept, and the sinks besides", SUM),
    Suspect("sinks-left-out",
            [*both_ways(lambda n, b, s: from_end(n, b)), *both_ways(lambda n, b, s: from_end(n, b - s)),
             *both_ways(lambda n, b, s: list(range(n - b, n))), *both_ways(lambda n, b, s: list(range(n - b + s, n)))],
            "only the newest tokens are held, the first ones are not", "the first part: positions 0 to sinks - 1"),
    Suspect("sinks-only", both_ways(lambda n, b, s: list(range(min(s, n)))), "only the sinks are held",
            "the second part: the newest tokens"),
    Suspect("first-tokens", [lambda n, b, s: list(range(min(n, b)))],
            "the first `budget` tokens are held, whatever comes after", "the second part: the newest tokens"),
    Suspect("window-one-longer", both_ways(lambda n, b, s: [*range(s), *range(n - (b - s) - 1, n)]),
            "the window begins one position too early: budget + 1 tokens are held", EDGE),
    Suspect("window-one-shorter",
            [*both_ways(lambda n, b, s: [*range(s), *range(n - (b - s) + 1, n)]),
             lambda n, b, s: list(range(n)) if n < b else [*range(s), *range(n - (b - s) + 1, n)]],
            "the window begins one position too late: budget - 1 tokens are held", EDGE),
    Suspect("one-sink-more", else_all(lambda n, b, s: [*range(s + 1), *range(n - (b - s) + 1, n)]),
            "one sink too many is held: they end at position sinks - 1", "the first part: positions 0 to sinks - 1"),
    Suspect("newest-missing",
            [*both_ways(lambda n, b, s: [*range(s), *range(n - (b - s), n - 1)]),
             *both_ways(lambda n, b, s: [*range(s), *range(n - (b - s) - 1, n - 1)]),
             lambda n, b, s: list(range(n - 1)) if n <= b else [*range(s), *range(n - (b - s), n - 1)],
             lambda n, b, s: list(range(n - 1)) if n <= b else [*range(s), *range(n - (b - s) - 1, n - 1)]],
            "the newest token is not held: after seq_len tokens it is at seq_len - 1", EDGE),
    Suspect("counts-one-more",
            [*both_ways(lambda n, b, s: [*range(s), *range(n - (b - s) + 1, n + 1)]),
             *both_ways(lambda n, b, s: [*range(s), *range(n - (b - s), n + 1)]),
             lambda n, b, s: list(range(n + 1)) if n <= b else [*range(s), *range(n - (b - s), n + 1)],
             lambda n, b, s: list(range(n + 1)) if n <= b else [*range(s), *range(n - (b - s) + 1, n + 1)]],
            "position seq_len is among them, of a token that has not come yet", EDGE),
    Suspect("counts-from-one", lambda n, b, s: [p + 1 for p in window_positions(n, b, s)],
            "positions were counted from 1", "the docstring: the first position is 0"),
    Suspect("always-full",
            [lambda n, b, s: [*range(s), *range(n - (b - s), n)],
             lambda n, b, s: [*range(s), *range(max(0, n - (b - s)), n)]],
            "sinks and window are joined while the window still reaches into the sinks", SHORT),
    Suspect("sinks-before-they-came", lambda n, b, s: [*range(s), *range(max(s, n - (b - s)), n)],
            "the sinks are listed though fewer tokens have come", SHORT),
    Suspect("drops-too-early",
            lambda n, b, s: list(range(n)) if n <= b - s else [*range(s), *range(n - (b - s), n)],
            "tokens are dropped, or listed twice, before `budget` of them have come", SHORT),
    Suspect("descending",
            [lambda n, b, s: window_positions(n, b, s)[::-1],
             else_all(lambda n, b, s: [*range(s), *range(n - 1, n - 1 - (b - s), -1)]),
             lambda n, b, s: window_positions(n, b, s)[::-1] if n > b else list(range(n))],
            "the right positions came, the newest first", "the order: ascending"),
    Suspect("window-first", else_all(lambda n, b, s: [*range(n - (b - s), n), *range(s)]),
            "the window stands before the sinks", "the order: ascending"),
    Suspect("sinks-subtracted-twice",
            both_ways(lambda n, b, s: [*range(s), *range(max(s, n - b + 2 * s), n)]),
            "the window has budget - 2 * sinks tokens", EDGE),
    Suspect("sign", both_ways(lambda n, b, s: [*range(s), *range(n - b - s, n)]),
            "the window begins at seq_len - budget - sinks: a sign is lost with the brackets", EDGE),
)  # fmt: skip


class WindowPositions(Exercise):
    """What a window with sinks holds."""

    id, title, minutes, difficulty = "07.1", "What a window holds", 4, 1
    reference = staticmethod(window_positions)
    why = (
        "A budget counts everything that is held, so that sinks leave budget - sinks places to the newest. Before more "
        "than `budget` tokens have come, nothing has to go."
    )
    hints = (
        "A budget of 8 and 2 sinks: of 20 tokens, which 8 are held? And of 3 tokens?",
        "Two pieces: positions 0 to sinks - 1, and the newest budget - sinks. Where does the second one begin?",
        "if seq_len <= budget:\n    return list(range(seq_len))\n"
        "first_of_window = seq_len - (budget - sinks)\n# then both pieces in one list",
    )
    hints_for: ClassVar = {
        "sinks-besides-budget": "Count what you return for 20 tokens, a budget of 8, 2 sinks.",
        "always-full": "3 tokens, a budget of 8, 2 sinks: nothing is full. What is held?",
        "window-one-longer": "Of 20 tokens the newest is at 19. The 6 newest begin at 14, which is 20 - 6.",
        "sinks-before-they-came": "1 token has come, 3 sinks are asked for. Which positions are there?",
    }

    def examine(self, answer: Callable) -> None:
        """Windows that are short, full, just over, long; with no sinks, and with nothing but sinks and one token."""
        cases = [*HELD, *hidden(lambda chance: some_ring(chance, 200))]
        got = [self.positions(self.call(answer, *case), case) for case in cases]
        wrong = [i for i, case in enumerate(cases) if got[i] != window_positions(*case)]
        if not wrong:
            return
        case = cases[wrong[0]]
        want, mine = window_positions(*case), got[wrong[0]]
        seen = f"{told(case)}: {brief(mine)} came back; held are {brief(want)}"
        accuse(type(self), POSITIONS, seen, fits=lambda rule: all(map(same_as(rule), cases, got)))
        self.explain(case, mine, want, f"{seen}; {len(wrong)} of {len(cases)} cases")

    def positions(self, got: Any, case: tuple[int, int, int]) -> list[int]:
        """What came back, as a list of ints; a finding where it is none."""
        if isinstance(got, Tensor) or not isinstance(got, (list, tuple, range)):
            self.fail("not-a-list", seen=f"{told(case)}: a {type(got).__name__} came back",
                      cause="positions were put together as something else than a list, or counted",
                      look="the return: a list of positions; .tolist() makes one of a tensor")  # fmt: skip
        for one in got:
            if isinstance(one, bool) or not isinstance(one, numbers.Integral):
                self.fail("not-positions", seen=f"{told(case)}: {brief(list(got))} holds a {type(one).__name__}",
                          cause="positions are ints, one after the other in one list",
                          look="what is joined: two lists with +, or [*first, *second]; // for whole ones")  # fmt: skip
        return [int(one) for one in got]

    def explain(self, case: tuple[int, int, int], got: list[int], want: list[int], seen: str) -> None:
        """No known rule: say what can be seen in the first case that differs."""
        if len(set(got)) < len(got):
            diagnosis, cause = "held-twice", "a position is listed twice"
        elif sorted(got) == want:
            diagnosis, cause = "order", "the right positions came in another order"
        elif len(got) != len(want):
            diagnosis, cause = "count", f"{len(got)} positions came back; {len(want)} tokens are held"
        else:
            diagnosis, cause = "values", "as many positions as are held, and others"
        self.fail(diagnosis, seen=seen, cause=cause, look="this case by hand: which tokens are the newest?")


def told(case: tuple[int, int, int]) -> str:
    """A case in words."""
    return "seq_len {:,}, budget {}, sinks {}".format(*case)


def brief(positions: Sequence[Any]) -> str:
    """A list, or the ends of a long one."""
    if len(positions) <= 12:
        return str(list(positions))
    return f"[{', '.join(map(str, positions[:5]))}, ... {', '.join(map(str, positions[-3:]))}] ({len(positions)})"


def same_as(rule: Callable) -> Callable[[tuple[int, int, int], list[int]], bool]:
    """Whether a rule gives a list for a case."""
    return lambda case, got: rule(*case) == got


# A script: budget, sinks, num_kv_heads, head_dim, and the tokens of each append.
SCRIPTS = (
    (6, 2, 2, 4, (1, 1, 1, 1, 1, 1, 1, 3, 1)),  # token by token, past the budget
    (6, 2, 3, 8, (13, 1, 4, 1)),  # a prompt that is longer
    (5, 0, 1, 6, (2, 3, 4, 1, 9)),  # no sinks; appends that end at the budget
    (4, 3, 2, 5, (1, 1, 6, 1, 1)),  # a window of one token
    (8, 1, 4, 2, (7, 2, 8, 3, 20)),
    (1, 0, 1, 3, (1, 1, 3)),
    (40, 4, 1, 4, (30, 15, 1, 100, 1, 1)),
    (9, 4, 2, 3, (2, 1, 1, 12)),  # fewer tokens than sinks at first
)
State = tuple[int, list[int]]


def variant(
    first: Callable[[Bounded], int] = lambda cache: cache.seq_len,
    length: Callable[[Bounded, int, int, int], int] = lambda cache, seen, held, left: seen,
    kept: Callable[[Bounded, Tensor, int], Tensor] | None = None,
    stored: Callable[[Bounded, Tensor], Tensor] = lambda cache, positions: positions,
    step: int = 0,
    by_seen: bool = False,
) -> Callable[[Bounded, Tensor, Tensor], None]:
    """append_bounded, one step of which is another one. first: of the new tokens' positions. length: what seq_len
    becomes, from what has been seen, was held, and is left. kept: which positions stay, given seq_len. stored: what
    becomes of the positions that stay. by_seen: the window ends at the tokens seen, not at the last new position."""

    def append(cache: Bounded, k: Tensor, v: Tensor) -> None:
        begin, seen, held = first(cache), cache.seq_len + k.shape[1], cache.k.shape[1]
        positions = torch.cat((cache.positions, torch.arange(begin, begin + k.shape[1]) + step))
        newest = seen if by_seen else begin + k.shape[1]
        recent = newest - (cache.budget - cache.sinks)
        stay = kept(cache, positions, newest) if kept else (positions < cache.sinks) | (positions >= recent)
        cache.k, cache.v = torch.cat((cache.k, k), 1)[:, stay], torch.cat((cache.v, v), 1)[:, stay]
        cache.positions = stored(cache, positions[stay])
        cache.seq_len = length(cache, seen, held, cache.k.shape[1])

    return append


def held_first(cache: Bounded) -> int:
    """The physical length where the logical one is meant."""
    return cache.k.shape[1]


FIRST = "`first`, the position of the first new token: of how many tokens seen, not held, is it the next?"
LENGTH = "seq_len: it goes on by the new tokens, whatever is dropped"
KEPT = "the test that says which positions stay: the first `sinks`, and the newest budget - sinks"
# What people make of it, run over the whole script beside the answer.
MENDED: tuple[Suspect, ...] = (
    Suspect("held-for-seen", [variant(held_first, lambda c, seen, held, left: left)],
            "seq_len is set to what is left after dropping, a number of tokens held, and new positions begin there: "
            "once something was dropped, they start again", f"{LENGTH}; {FIRST}"),
    Suspect("positions-from-held", [variant(held_first), variant(held_first, by_seen=True)],
            "new positions still begin at the number of tokens held", FIRST),
    Suspect("length-is-held", [variant(lambda c: int(c.positions[-1]) + 1 if len(c.positions) else 0,
                                       lambda c, seen, held, left: left)],
            "positions are right, and seq_len is what is left after dropping, a number of tokens held", LENGTH),
    Suspect("length-before-dropping", [variant(length=lambda c, seen, held, left: held + seen - c.seq_len),
                                       variant(held_first, lambda c, seen, held, left: held + seen - c.seq_len)],
            "seq_len is what was held plus what came: less than was seen, once something is dropped", LENGTH),
    Suspect("length-stays", [variant(length=lambda c, seen, held, left: c.seq_len)],
            "seq_len does not go on", LENGTH),
    Suspect("length-by-one", [variant(length=lambda c, seen, held, left: c.seq_len + 1)],
            "seq_len goes on by one, however many tokens come", LENGTH),
    Suspect("length-twice", [variant(length=lambda c, seen, held, left: 2 * seen - c.seq_len)],
            "seq_len counts the new tokens twice", LENGTH),
    Suspect("positions-one-late", [variant(step=1)], "new positions begin one too far: the first token is at 0", FIRST),
    Suspect("one-too-many",
            [variant(kept=lambda c, p, n: (p < c.sinks) | (p >= n - (c.budget - c.sinks) - 1)),
             variant(kept=lambda c, p, n: (p < c.sinks) | (p > n - (c.budget - c.sinks) - 2))],
            "the window holds one token more than there is room for", KEPT),
    Suspect("one-too-few",
            [variant(kept=lambda c, p, n: (p < c.sinks) | (p > n - (c.budget - c.sinks)))],
            "the window holds one token less than there is room for", KEPT),
    Suspect("sinks-besides-budget", [variant(kept=lambda c, p, n: (p < c.sinks) | (p >= n - c.budget))],
            "the newest `budget` tokens stay, and the sinks besides", KEPT),
    Suspect("sinks-dropped", [variant(kept=lambda c, p, n: p >= n - (c.budget - c.sinks)),
                              variant(kept=lambda c, p, n: p >= n - c.budget)],
            "the first tokens are dropped too", KEPT),
    Suspect("one-sink-more", [variant(kept=lambda c, p, n: (p <= c.sinks) | (p >= n - (c.budget - c.sinks)))],
            "one sink more is kept than `sinks` says", KEPT),
    Suspect("nothing-dropped", [variant(kept=lambda c, p, n: p >= 0)], "nothing is dropped", KEPT),
    Suspect("renumbered", [variant(stored=lambda c, p: torch.arange(len(p)))],
            "the tokens that stay get new positions, 0, 1, 2, ...",
            "positions: each token's in the text, which never changes"),
)  # fmt: skip


class AppendBounded(Exercise):
    """Seen and held are two numbers."""

    id, title, minutes, difficulty = "07.d1", "Debug: seen and held", 4, 2
    reference = staticmethod(append_bounded)
    why = (
        "seq_len goes on by the new tokens and never goes back: the next token's position is how many have been seen. "
        "How many are held is another number, which stops at the budget."
    )
    hints = (
        "A budget of 6. Append token by token and print cache.positions: what becomes of the seventh?",
        "Two numbers are equal until something is dropped: tokens seen, and tokens held. Which lines mean which?",
        "first = cache.seq_len\ncache.seq_len = first + k.shape[1]\n# and no other line that sets cache.seq_len",
    )
    hints_for: ClassVar = {
        "held-for-seen": "cache.k.shape[1] stops at the budget. At which position is the next token?",
        "positions-from-held": "seq_len is right now. Which number do the new positions begin at?",
        "one-too-many": "A budget of 6 with 2 sinks leaves room for 4 newest. Count those you keep.",
    }

    def examine(self, answer: Callable) -> None:
        """Appends of one token and of many, past the budget and far past it, after each of which all is compared."""
        for script in SCRIPTS:
            self.script(answer, script, torch.float32, lambda x: x)
        for dtype, layout in ((torch.bfloat16, transposed), (torch.float16, sliced)):
            for script in SCRIPTS[:2]:
                self.script(answer, script, dtype, layout)

    def script(self, answer: Callable, script: tuple, dtype: torch.dtype, layout: Callable) -> None:
        """One script, the answer's cache beside the reference's."""
        budget, sinks, num_kv_heads, head_dim, pieces = script
        mine, right = (Bounded.empty(budget, sinks, num_kv_heads, head_dim) for _ in range(2))
        for cache in (mine, right):
            cache.k, cache.v = cache.k.to(dtype), cache.v.to(dtype)
        for turn, count in enumerate(pieces):
            k, v = (layout(x) for x in new_tokens(num_kv_heads, count, head_dim, turn, dtype))
            before = f"budget {budget}, sinks {sinks}, {right.seq_len} tokens seen, {count} more"
            append_bounded(right, k, v)
            given = k.clone(), v.clone()
            back = self.run(lambda: answer(mine, k, v), told=before)  # noqa: B023
            self.check_unchanged(given, (k, v))
            self.compare(answer, mine, right, before, back)

    def compare(self, answer: Callable, mine: Bounded, right: Bounded, before: str, back: Any) -> None:
        """Everything that the cache holds after one append."""
        self.check_tensors(mine, before)
        held = mine.positions.tolist()
        if (mine.budget, mine.sinks) != (right.budget, right.sinks):
            self.fail("settings-changed", seen=f"{before}: budget {mine.budget}, sinks {mine.sinks} afterwards",
                      cause="the cache's settings were written over", look="what stands before an `=`")  # fmt: skip
        seen = f"{before}: seq_len {mine.seq_len}, positions {brief(held)}"
        if (mine.seq_len, held) != (right.seq_len, right.positions.tolist()):
            should = f"they should be {right.seq_len} and {brief(right.positions.tolist())}"
            traces = [trace(answer, script) for script in SCRIPTS]
            accuse(type(self), MENDED, f"{seen}; {should}", fits=lambda other: traces == [
                trace(other, script) for script in SCRIPTS])  # fmt: skip
            self.explain(mine, right, f"{seen}; {should}", back)
        for name, x, wanted in (("K", mine.k, right.k), ("V", mine.v, right.v)):
            if x.shape != wanted.shape:
                self.fail("held-apart", seen=f"{seen}: cache.{name.lower()} is {list(x.shape)}; positions name "
                          f"{len(held)} tokens", cause="tokens were dropped in one of the three and not in another",
                          look="the last line: K, V and positions lose the same tokens")  # fmt: skip
            if x.dtype != wanted.dtype or not agree(x, wanted, 0.0):
                what = first_place(x, wanted) if x.dtype == wanted.dtype else f"{x.dtype}, not {wanted.dtype}"
                self.fail("other-vectors", seen=f"{seen}: {name}: {what}",
                          cause="positions are right, and the vectors beside them are another token's, or were changed",
                          look="K, V and positions: joined and cut in the same way")  # fmt: skip

    def check_tensors(self, cache: Bounded, before: str) -> None:
        """The fields hold what they are meant to hold."""
        whole = isinstance(cache.seq_len, numbers.Integral) and not isinstance(cache.seq_len, bool)
        if not whole:
            self.fail("length-type", seen=f"{before}: cache.seq_len is a {type(cache.seq_len).__name__}",
                      cause="a number of tokens is an int", look=LENGTH)  # fmt: skip
        for name in ("k", "v", "positions"):
            x, dims = getattr(cache, name), 1 if name == "positions" else 3
            if not isinstance(x, Tensor) or x.dim() != dims:
                is_now = f"of {x.dim()} dimensions" if isinstance(x, Tensor) else f"a {type(x).__name__}"
                self.fail("field-type", seen=f"{before}: cache.{name} is {is_now}",
                          cause="another object was put there, or a dimension came or went",
                          look="the shapes in the docstring")  # fmt: skip
        if cache.positions.dtype != torch.int64:
            self.fail("positions-dtype", seen=f"{before}: cache.positions is {cache.positions.dtype}",
                      cause="the new positions were made in another dtype; the docstring: int64",
                      look="torch.arange of whole numbers gives int64")  # fmt: skip

    def explain(self, mine: Bounded, right: Bounded, seen: str, back: Any) -> None:
        """None of the known ones: say which of the two numbers is off, and how."""
        held, want = mine.positions.tolist(), right.positions.tolist()
        if isinstance(back, Bounded) and back is not mine and back.positions.tolist() == want:
            self.fail("not-in-place", seen=f"{seen}. Another cache with the right ones came back",
                      cause="the caller keeps the cache that it gave, and reads that one",
                      look="assign to cache.k, cache.v, cache.positions, cache.seq_len; return nothing")  # fmt: skip
        if mine.seq_len != right.seq_len:
            self.fail("seq-len", seen=seen, cause="seq_len is not the number of tokens seen", look=LENGTH)
        if sorted(held) == want:
            self.fail("order", seen=seen, cause="the right tokens, in another order than they came in",
                      look="torch.cat: what is held first, then what is new")  # fmt: skip
        if len(held) != len(want):
            self.fail("count", seen=seen, cause=f"{len(held)} tokens are held; there should be {len(want)}", look=KEPT)
        self.fail("positions", seen=seen, cause="other positions than those of the tokens that should be held",
                  look=f"{FIRST} And {KEPT}")  # fmt: skip


def new_tokens(num_kv_heads: int, count: int, head_dim: int, turn: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """K and V that differ in every number."""
    k, v = (draw(num_kv_heads, count, head_dim, seed=2 * turn + n, dtype=dtype) for n in range(2))
    return k, v


def trace(append: Callable, script: tuple) -> list[State]:
    """seq_len and positions after each append; shorter where it raises."""
    budget, sinks, num_kv_heads, head_dim, pieces = script
    cache, states = Bounded.empty(budget, sinks, num_kv_heads, head_dim), []
    for turn, count in enumerate(pieces):
        k, v = new_tokens(num_kv_heads, count, head_dim, turn, torch.float32)
        try:
            append(cache, k, v)
            states.append((int(cache.seq_len), cache.positions.tolist()))
        except Exception:
            break
    return copy.deepcopy(states)


def full(slot: Callable[[int, int, int], int]) -> Callable[[int, int, int], int]:
    """A rule for tokens that come when all slots are full."""
    return lambda position, budget, sinks: position if position < budget else slot(position, budget, sinks)


RING = "the window is a ring of budget - sinks slots behind the sinks: who comes first, and into which slot?"
SLOTS = (
    Suspect("last-sink-overwritten", full(lambda p, b, s: s + (p - b) % (b - s) - 1),
            "the token that comes when all slots are full goes one slot too far to the front: into the last sink's, or "
            "without sinks into slot -1", "the -1 at the end: the oldest token of the window lies in slot `sinks`"),
    Suspect("no-sinks", [lambda p, b, s: p % b], "slots are used in turn, the sinks' too",
            "which slots are in the ring: not the first `sinks`"),
    Suspect("sinks-not-added", [full(lambda p, b, s: (p - s) % (b - s)), full(lambda p, b, s: (p - b) % (b - s)),
                                full(lambda p, b, s: p % (b - s)), lambda p, b, s: (p - s) % (b - s)],
            "the ring begins at slot 0, where the sinks are", "what is added to the place within the ring"),
    Suspect("ring-shifted", [full(lambda p, b, s: s + p % (b - s)), lambda p, b, s: p if p < s else s + p % (b - s)],
            "position `sinks` is not taken for the first of the ring", "what is subtracted before the %"),
    Suspect("ring-too-long", [full(lambda p, b, s: s + (p - s) % b), full(lambda p, b, s: s + (p - b) % b),
                              full(lambda p, b, s: s + p % b)],
            "the ring was taken to be `budget` slots long: slots beyond the last come out",
            "how many slots are not a sink's: budget - sinks"),
    Suspect("one-slot-late", [full(lambda p, b, s: s + (p - b + 1) % (b - s)), full(lambda p, b, s: s + 1 + (p - b) % (
                b - s)), full(lambda p, b, s: s + (p - s + 1) % (b - s))],
            "the first token that finds all slots full takes the slot behind the oldest one's", RING),
    Suspect("newest-overwritten", [full(lambda p, b, s: s + (p - b - 1) % (b - s)),
                                   full(lambda p, b, s: s + (p - s - 1) % (b - s))],
            "the first token that finds all slots full takes the newest one's slot, not the oldest one's", RING),
    Suspect("one-too-late", [lambda p, b, s: p if p <= b else s + (p - s) % (b - s),
                             lambda p, b, s: p if p <= b else s + (p - b) % (b - s),
                             lambda p, b, s: p if p <= b else s + (p - b - 1) % (b - s)],
            "position `budget` goes into slot `budget`: slots end at budget - 1", "the first line: `<` or `<=`"),
    Suspect("one-too-early", [lambda p, b, s: p if p < b - 1 else s + (p - b + 1) % (b - s)],
            "the last slot is not used before the ring begins anew", "the first line: which position fills the last?"),
    Suspect("first-twice", [full(lambda p, b, s: max(s, s + (p - b) % (b - s) - 1)),
                            full(lambda p, b, s: s + max(0, (p - b) % (b - s) - 1)),
                            full(lambda p, b, s: max(s, (p - b) % (b - s) + s - 1))],
            "the sink is spared, but two tokens in a row go into the same slot, and the last slot is never used again",
            "the -1 at the end, not what it leads to"),
    Suspect("always-the-same", [full(lambda p, b, s: s), full(lambda p, b, s: b - 1)],
            "every later token goes into the same slot", RING),
    Suspect("backwards", [full(lambda p, b, s: b - 1 - (p - b) % (b - s))], "the ring is gone through backwards", RING),
)  # fmt: skip


class RingSlot(Exercise):
    """A ring behind the sinks."""

    id, title, minutes, difficulty = "07.d2", "Debug: the edge of the window", 4, 2
    reference = staticmethod(ring_slot)
    why = (
        "Behind the sinks lies a ring of budget - sinks slots, in which position `sinks` comes first. Counted from "
        "there, the remainder is a place in the ring, and what is never below `sinks` is never a sink's."
    )
    hints = (
        "A budget of 6, 2 sinks. Write down the slots of positions 0 to 10. Whose slot does token 6 take?",
        "Token 6 takes the slot of the oldest that is no sink, token 2, in slot 2. What does the formula give?",
        "sinks + (position - sinks) % (budget - sinks): the remainder alone is the place in the ring",
    )
    hints_for: ClassVar = {
        "last-sink-overwritten": "For position == budget the remainder is 0. Which slot should that be?",
        "first-twice": "List the slots of five tokens in a row: each should take another one.",
        "no-sinks": "position % budget is 0 again at position == budget. Who lies there?",
        "one-slot-late": "At position == budget, which token of the window is the oldest, and where does it lie?",
    }

    def examine(self, answer: Callable) -> None:
        """Every position of three rounds, in rings of several lengths, one slot long too; then far on."""
        rings = ((6, 2), (5, 0), (4, 3), (9, 4), (1, 0), (8, 1))
        cases = [(position, budget, sinks) for budget, sinks in rings for position in range(3 * budget + 2)]
        cases += [(1000, 6, 2), (1001, 6, 2), (1001, 7, 2), (1001, 7, 3)]
        cases += [(99_999, 512, 4), (511, 512, 4), (512, 512, 4)]
        cases += hidden(lambda chance: some_ring(chance, 9_999), count=30)
        try:
            judge(type(self), answer, ring_slot, cases, SLOTS, what="the slot", whole=True)
        except NotYet as not_yet:
            if not_yet.finding.diagnosis in ("values", "ignored", "factor", "term"):
                self.explain(answer, cases, not_yet.finding.seen)
            raise

    def explain(self, answer: Callable, cases: Sequence[tuple[int, int, int]], seen: str) -> None:
        """None of the known ones: what becomes of a sink, of a slot that is not there, of the oldest token."""
        for position, budget, sinks in cases:
            slot, case = answer(position, budget, sinks), f"position {position:,}, budget {budget}, sinks {sinks}"
            if not 0 <= slot < budget:
                self.fail("no-such-slot", seen=f"{case}: slot {slot}; {seen}",
                          cause=f"slots are 0 to {budget - 1}", look=RING)  # fmt: skip
            if position >= budget and slot < sinks:
                self.fail("sink-overwritten", seen=f"{case}: slot {slot}, a sink's; {seen}",
                          cause="the first `sinks` slots are never written again", look=RING)  # fmt: skip
