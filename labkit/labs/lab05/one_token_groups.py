"""05.7: a decode step's single token taken for a group, to mend."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

import torch
from torch import Tensor

from labkit.course.checks.hidden import hidden
from labkit.course.checks.suspects import Suspect, accuse
from labkit.course.checks.trials import LAYOUTS
from labkit.course.exercise import Exercise, NotYet
from labkit.labs.lab05.layers import SHAPE, Shape, fits, ids, listed, numbered
from labkit.labs.lab05.references import groups_to_quantize

Rule = Callable[[int, int, int], list[int]]


def split(tokens: int, size: int, *, rest: bool = False) -> list[int]:
    """Sizes of whole groups, and of what is left over."""
    return [size] * (tokens // size) + [tokens % size] * (rest and tokens % size > 0)


# How many tokens the groups have, from (waiting, new, group_size), under what people write.
RULES: tuple[tuple[str, tuple[Rule, ...], str, str], ...] = (
    ("one-token-groups", (lambda w, n, g: [w + n], lambda w, n, g: [n], lambda w, n, g: [1] * n),
     "something is quantized that is no whole group yet: its scale and zero point take 32 bits, however few tokens "
     "share them", "how many tokens each group holds here, and how many the docstring asks for"),
    ("groups-as-they-came",
     (lambda w, n, g: [w + n] if w + n >= g else [], lambda w, n, g: [(w + n) // g * g] if w + n >= g else []),
     "all that may be quantized was made one group", "cut the joined tensor every group_size tokens"),
    ("short-group",
     (lambda w, n, g: split(w + n, g, rest=True), lambda w, n, g: split(w + n, g, rest=True) if w + n >= g else []),
     "the tokens left over behind the last whole group were made a group too",
     "where the loop ends: tokens // group_size * group_size"),
    ("one-group-only", (lambda w, n, g: [g] if w + n >= g else [],),
     "an `if` where a loop is needed: one group is cut, however many there are",
     "the number of whole groups: tokens // group_size"),
    ("whole-group-waits",
     (lambda w, n, g: split(max(0, w + n - 1), g), lambda w, n, g: split(max(0, w + n - g), g), lambda w, n, g: []),
     "the condition asks for more than group_size tokens, a group is held back, or nothing is ever quantized",
     "the number of whole groups: tokens // group_size"),
    ("new-tokens-only", (lambda w, n, g: split(n, g),), "groups are cut from the new tokens alone",
     "torch.cat((waiting, new), dim=2)"),
    ("counted-in-new", (lambda w, n, g: split(n, g),),
     "groups are cut from old and new tokens, but as many of them as the new tokens alone would fill",
     "the number of groups: all tokens, those that waited among them, // group_size"),
    ("group-size",
     (*(lambda w, n, g, size=size: split(w + n, size) for size in range(1, 65)),
      lambda w, n, g: split(w + n, g - 1), lambda w, n, g: split(w + n, g + 1)),
     "groups have another size than group_size", "every number in the slice: group_size"),
)  # fmt: skip


class GroupsToQuantize(Exercise):
    """An error of zero that costs more than it saves."""

    id, title, minutes, difficulty = "05.7", "Debug: lossless at 2 bits", 5, 2
    needs = ("05.3",)
    reference = staticmethod(groups_to_quantize)
    why = (
        "Old and new tokens are joined before anything is cut, so that the pieces they came in do not matter; "
        "what no whole group takes waits."
    )
    hints = (
        "What are the least and the greatest number of a group of one? And how many bits do its scale and zero take?",
        "Join waiting and new. Of n tokens, n // group_size * group_size form whole groups; the others, the newest, "
        "go on waiting.",
        "tokens = torch.cat((waiting, new), dim=2)\nwhole = tokens.shape[2] // group_size * group_size\n"
        "groups = [tokens[:, :, i : i + group_size] for i in range(0, whole, group_size)]\n"
        "return groups, tokens[:, :, whole:]",
    )
    hints_for: ClassVar = {
        "one-token-groups": "With group_size 4, one token must wait for three more.",
        "groups-as-they-came": "What came at once has nothing to do with what is quantized together.",
        "short-group": "The tokens behind the last whole group are not a group yet.",
        "one-group-only": "11 tokens hold two groups of 4.",
        "new-tokens-only": "Tokens that waited come first: join them with the new ones, then cut.",
        "counted-in-new": "3 tokens wait and 1 comes. How many groups of 4 is that?",
        "group-size": "Which number in your slice is group_size?",
        "remainder-in-front": "Which tokens should still be exact, the oldest or the newest?",
        "empty-group": "torch.split of no tokens gives one piece of no tokens.",
    }

    def examine(self, answer: Callable) -> None:
        """Steps that complete no group, pieces that complete one or more, prompts, no token at all; other shapes; keys
        in another order in memory."""
        for held, count, group_size, shape in (
            (2, 1, 4, SHAPE), (0, 1, 4, SHAPE), (3, 6, 4, SHAPE), (3, 1, 4, SHAPE), (0, 4, 4, SHAPE), (0, 11, 4, SHAPE),
            (2, 13, 3, (1, 2, 7)), (5, 0, 4, SHAPE), (3, 4, 1, SHAPE), (31, 1, 32, (3, 1, 4)), (31, 2, 32, (3, 1, 4)),
            (30, 1, 32, (3, 1, 4)), (7, 3000, 64, (1, 1, 2)), (0, 0, 4, SHAPE),
            *hidden(lambda chance: (chance.randint(0, 9), chance.randint(0, 40), chance.randint(1, 9), SHAPE)),
        ):  # fmt: skip
            self.case(
                answer, numbered(range(held), shape=shape), numbered(range(held, held + count), shape=shape), group_size
            )
        waiting, new = numbered(range(3)), numbered(range(3, 9))
        for change, words in LAYOUTS:
            try:
                self.case(answer, change(waiting), change(new), 4, words)
            except NotYet as not_yet:
                if not_yet.finding.diagnosis not in ("raised", "keys-changed"):
                    raise
                self.fail("layout", seen=f"3 waiting, 6 new, {words}: {not_yet.finding.seen}",
                          cause="the code counts on the order in memory: view, or a reshape that assumes it",
                          look="slices and cat, along dim=2")  # fmt: skip
        for held, count in ((2, 1), (3, 6)):  # as many as before, other tokens
            first, behind = 20 + held, 20 + held + count
            others = numbered(range(20, first)), numbered(range(first, behind))
            groups, rest = self.parts(self.call(answer, *others, 4), f"{held} waiting, {count} new, others", SHAPE)
            tokens = list(range(20, behind))
            whole = len(tokens) // 4 * 4
            if [*groups, rest] != [*(tokens[start : start + 4] for start in range(0, whole, 4)), tokens[whole:]]:
                self.fail("remembered", seen=f"tokens 20 to {behind - 1} came: groups {groups}, {rest} go on waiting",
                          cause="right for other tokens, as many: something of an earlier call was kept",
                          look="everything that is returned is made of waiting and new")  # fmt: skip
        for dtype in (torch.bfloat16, torch.float64):
            for group in self.call(answer, numbered(range(3), dtype), numbered([3], dtype), 4)[0]:
                self.same(group, numbered(range(4), dtype), what=f"a group of {str(dtype).removeprefix('torch.')} keys")

    def case(self, answer: Callable, waiting: Tensor, new: Tensor, group_size: int, words: str = "") -> None:
        """Judge one call: sizes of groups, then which tokens are in them and which go on waiting."""
        got = self.call(answer, waiting, new, group_size)
        shape: Shape = (*new.shape[:2], new.shape[3])
        held, count = waiting.shape[2], new.shape[2]
        where = f"{held} waiting, {count} new, group_size {group_size}" + f", {words}" * bool(words)
        groups, rest = self.parts(got, where, shape)
        sizes, tokens = [len(group) for group in groups], [token for group in groups for token in group]
        seen = f"{where}: groups of {listed(sizes)} tokens, {len(rest)} go on waiting"
        whole = (held + count) // group_size
        if sizes == [group_size] * whole and [*tokens, *rest] == list(range(held + count)):
            return
        self.explain_memory(answer, seen)
        if sizes != [group_size] * whole:
            self.explain_sizes(answer, sizes, f"{seen}; whole groups: {whole}")
        self.explain_lost(sorted([*tokens, *rest]), held, count, seen)
        if rest and tokens and min(rest) < max(tokens):
            oldest = rest == list(range(len(rest)))
            self.fail(
                "remainder-in-front" if oldest and len(sizes) == whole else "older-tokens-wait",
                seen=f"{seen}: tokens {listed(rest)}, while {listed(tokens)} are quantized",
                cause="groups were counted from the end, so that the oldest tokens are left over"
                if oldest and len(sizes) == whole
                else "groups were cut from the new tokens alone, past those that waited already",
                look="groups begin at the first token of torch.cat((waiting, new), dim=2)",
            )
        order = [*tokens, *rest]
        if any(group != list(range(group[0], group[0] + group_size)) and group == sorted(group) for group in groups):
            self.fail(
                "strided-groups",
                seen=f"{where}: a group of tokens {listed(groups[0])}",
                cause="the tokens of a group lie apart: every n-th was taken, or a reshape put groups last",
                look="a group: group_size successive tokens, [:, :, i : i + group_size]",
            )
        self.fail(
            "order",
            seen=f"{where}: tokens in the order {listed(order)}",
            cause="new tokens were put before those that waited"
            if order == [*range(held, held + count), *range(held)]
            else "groups were turned round"
            if groups[::-1] == [list(range(start, start + group_size)) for start in range(0, len(tokens), group_size)]
            else "tokens do not stand in the order in which they came",
            look="torch.cat((waiting, new), dim=2), and the order of the groups: oldest first",
        )

    def parts(self, got: Any, where: str, shape: Shape) -> tuple[list[list[int]], list[int]]:
        """The tokens of each group and of what waits; a finding when they are no tokens of the case."""
        pair = isinstance(got, (tuple, list)) and len(got) == 2
        if pair and isinstance(got[0], Tensor) and isinstance(got[1], (list, tuple)):
            self.fail("swapped", seen=f"{where}: a tensor came back first, then a list",
                      cause="the two results changed places",
                      look="the return: a list of groups, then the tensor of those that wait")  # fmt: skip
        if not (pair and isinstance(got[0], (list, tuple)) and isinstance(got[1], Tensor)):
            kinds = [type(part).__name__ for part in got] if isinstance(got, (tuple, list)) else type(got).__name__
            self.fail(
                "not-groups-and-rest",
                seen=f"{where}: returned {kinds}",
                cause="groups were stacked into one tensor, or one of the two results is missing",
                look="the return: a list of tensors, then the tensor of those that wait",
            )
        for name, x in [*(("a group", group) for group in got[0]), ("what waits", got[1])]:
            if not fits(x, shape):
                self.fail(
                    "shape",
                    seen=f"{where}: {name} is {list(x.shape) if isinstance(x, Tensor) else type(x).__name__}; it should"
                    f" be [{shape[0]}, {shape[1]}, tokens, {shape[2]}]",
                    cause="another dimension than the tokens' was joined, sliced or split",
                    look="dim=2 in cat and split, [:, :, a:b] in slices",
                )
            if not torch.equal(x, numbered(ids(x), shape=shape)):
                self.fail(
                    "keys-changed",
                    seen=f"{where}: {name} holds other numbers than the keys that came",
                    cause="keys were converted on the way, reshaped across tokens, padded, or quantized here already",
                    look="what is returned: slices of the joined tensor, nothing else",
                )
        return [ids(group) for group in got[0]], ids(got[1])

    def explain_memory(self, answer: Callable, seen: str) -> None:
        """Name tokens of another call, where they turn up: those from 50 on come in the second of two calls."""
        kept: set[int] = set()
        with suppress(Exception):  # what it raises there has its own case
            answer(numbered([40]), numbered([41]), 4)
            groups, rest = answer(numbered([50, 51]), numbered([52]), 4)
            kept = {token for x in (*groups, rest) if torch.equal(x, numbered(ids(x))) for token in ids(x)}
        if any(token < 50 for token in kept):
            self.fail(
                "remembered",
                seen=f"{seen}. In another call came tokens 50, 51 and 52; returned were {sorted(kept)}",
                cause="something of an earlier call was kept, and used in place of what came",
                look="everything that is returned is made of waiting and new, the arguments of this call",
            )

    def explain_sizes(self, answer: Callable, sizes: list[int], seen: str) -> None:
        """Name the rule by which groups get their sizes, in several calls alike."""
        if 0 in sizes:
            self.fail("empty-group", seen=seen, cause="a loop or a split that makes a group of no tokens",
                      look="the case that no group is whole: an empty list")  # fmt: skip
        probes = ((0, 1, 4), (2, 1, 4), (0, 11, 4), (3, 6, 4), (2, 14, 3), (1, 39, 5))
        cut, newer, oldest = {}, True, True
        for held, new, group_size in probes:
            try:
                groups = answer(numbered(range(held)), numbered(range(held, held + new)), group_size)[0]
                cut[held, new, group_size] = [group.shape[2] for group in groups]
                tokens = [token for group in groups for token in ids(group)]
                newer &= all(token >= held for token in tokens)
                oldest &= tokens == list(range(len(tokens)))
            except Exception:  # what it raises there has its own case
                continue
        holds = {"new-tokens-only": newer, "counted-in-new": oldest}  # of sizes alike: which tokens are in the groups
        accuse(type(self), [
            Suspect(diagnosis, holds.get(diagnosis, True)
                    and any(cut and all(got == rule(*probe) for probe, got in cut.items()) for rule in rules),
                    cause, look)
            for diagnosis, rules, cause, look in RULES
        ], seen)  # fmt: skip
        tokens = [token for group in answer(numbered(range(2)), numbered([2]), 4)[0] for token in ids(group)]
        if tokens and len(set(tokens)) < len(tokens):
            self.fail("filled-up", seen=seen, cause="a group that is not complete was filled up with copies of a token",
                      look="tokens that do not fill a group wait as they are")  # fmt: skip
        self.fail("group-sizes", seen=seen, cause="groups are cut by another rule",
                  look="of n tokens, n // group_size groups of group_size; the others wait")  # fmt: skip

    def explain_lost(self, tokens: list[int], held: int, new: int, seen: str) -> None:
        """Name what is missing or there twice."""
        if len(set(tokens)) < len(tokens):
            self.fail(
                "tokens-twice",
                seen=f"{seen}, of {held + new} in all",
                cause="quantized tokens go on waiting too, or groups overlap",
                look="where what waits begins: behind the last group",
            )
        if missing := sorted(set(range(held + new)) - set(tokens)):
            dropped = held and missing == list(range(held))
            self.fail(
                "waiting-dropped" if dropped else "tokens-lost",
                seen=f"{seen}: tokens {listed(missing)} are gone",
                cause="only the new tokens were looked at"
                if dropped
                else "tokens behind the last group, or between groups, are in neither result",
                look="torch.cat((waiting, new), dim=2): every token of it is in a group or waits",
            )
