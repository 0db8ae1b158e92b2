"""05.7: a decode step's single token taken for a group, to mend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from labkit.course.exercise import Exercise
from labkit.labs.lab05.layers import BATCH, HEAD_DIM, HEADS, fits, ids, numbered
from labkit.labs.lab05.references import groups_to_quantize


class GroupsToQuantize(Exercise):
    """An error of zero that costs more than it saves."""

    id, title, minutes, difficulty = "05.7", "Debug: lossless at 2 bits", 5, 2
    needs = ("05.3",)
    reference = staticmethod(groups_to_quantize)
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
        "remainder-in-front": "Which tokens should still be exact, the oldest or the newest?",
        "empty-group": "torch.split of no tokens gives one piece of no tokens.",
    }

    def examine(self, answer: Callable) -> None:
        """Steps that complete no group, pieces that complete one or more, prompts; at last no token at all."""
        for held, new, group_size in (
            (0, 1, 4), (2, 1, 4), (3, 6, 4), (3, 1, 4), (0, 4, 4), (0, 11, 4), (2, 13, 3), (5, 0, 4), (3, 4, 1),
            (0, 0, 4),
        ):  # fmt: skip
            self.case(answer, held, new, group_size)
        for group in self.call(answer, numbered(range(3)).bfloat16(), numbered([3]).bfloat16(), 4)[0]:
            self.like(group, numbered(range(4)).bfloat16(), what="a group of bfloat16 keys")

    def case(self, answer: Callable, held: int, new: int, group_size: int) -> None:
        """Judge one call: sizes of groups, then which tokens are in them and which go on waiting."""
        got = self.call(answer, numbered(range(held)), numbered(range(held, held + new)), group_size)
        where = f"{held} waiting, {new} new, group_size {group_size}"
        groups, rest = self.parts(got, where)
        sizes, tokens = [len(group) for group in groups], [token for group in groups for token in group]
        seen = f"{where}: groups of {sizes} tokens, {len(rest)} go on waiting"
        whole = (held + new) // group_size
        if sizes == [group_size] * whole and [*tokens, *rest] == list(range(held + new)):
            return
        self.explain_sizes(sizes, held, new, group_size, seen)
        self.explain_lost(sorted([*tokens, *rest]), held, new, seen)
        if rest and tokens and min(rest) < max(tokens):
            oldest = rest == list(range(len(rest)))
            self.fail(
                "remainder-in-front" if oldest and len(sizes) == whole else "older-tokens-wait",
                seen=f"{seen}: tokens {rest}, while {tokens} are quantized",
                cause="groups were counted from the end, so that the oldest tokens are left over"
                if oldest and len(sizes) == whole
                else "groups were cut from the new tokens alone, past those that waited already",
                look="groups begin at the first token of torch.cat((waiting, new), dim=2)",
            )
        if [*tokens, *rest] != list(range(held + new)):
            self.fail(
                "order",
                seen=f"{where}: tokens in the order {[*tokens, *rest]}",
                cause="new tokens were put before those that waited, or groups turned round",
                look="torch.cat((waiting, new), dim=2), and the order of the groups: oldest first",
            )
        only = len(sizes) == 1
        self.fail(
            "one-group-only" if only else "whole-group-waits",
            seen=f"{seen}; whole groups: {whole}",
            cause="an `if` where a loop is needed: one group is cut, however many there are"
            if only
            else "the condition asks for more than group_size tokens, or a group is held back",
            look="the number of whole groups: tokens // group_size",
        )

    def parts(self, got: Any, where: str) -> tuple[list[list[int]], list[int]]:
        """The tokens of each group and of what waits; a finding when they are no tokens of the case."""
        if not (isinstance(got, tuple) and len(got) == 2 and isinstance(got[0], (list, tuple))
                and isinstance(got[1], Tensor)):  # fmt: skip
            kinds = [type(part).__name__ for part in got] if isinstance(got, tuple) else type(got).__name__
            self.fail(
                "not-groups-and-rest",
                seen=f"{where}: returned {kinds}",
                cause="groups were stacked into one tensor, or one of the two results is missing",
                look="the return: a list of tensors, then the tensor of those that wait",
            )
        for name, x in [*(("a group", group) for group in got[0]), ("what waits", got[1])]:
            if not fits(x):
                self.fail(
                    "shape",
                    seen=f"{where}: {name} is {list(x.shape) if isinstance(x, Tensor) else type(x).__name__}; it should"
                    f" be [{BATCH}, {HEADS}, tokens, {HEAD_DIM}]",
                    cause="another dimension than the tokens' was joined, sliced or split",
                    look="dim=2 in cat and split, [:, :, a:b] in slices",
                )
            if not torch.equal(x, numbered(ids(x))):
                self.fail(
                    "keys-changed",
                    seen=f"{where}: {name} holds other numbers than the keys that came",
                    cause="keys were reshaped across tokens, padded, or quantized here already",
                    look="what is returned: slices of the joined tensor, nothing else",
                )
        return [ids(group) for group in got[0]], ids(got[1])

    def explain_sizes(self, sizes: list[int], held: int, new: int, group_size: int, seen: str) -> None:
        """Name what makes groups of another size."""
        if all(size == group_size for size in sizes):
            return
        if 0 in sizes:
            self.fail("empty-group", seen=seen, cause="a loop or a split that makes a group of no tokens",
                      look="the case that no group is whole: an empty list")  # fmt: skip
        if sizes in ([held + new], [new]) and held + new < group_size:
            self.fail(
                "one-token-groups",
                seen=seen,
                cause="whatever comes is a group. Of one token min = max: it comes back exactly, and its scale and "
                "zero take 32 bits a number",
                look="the condition under which tokens form a group: group_size of them, or they wait",
            )
        if len(sizes) == 1:
            self.fail("groups-as-they-came", seen=seen, cause="everything there is was made one group",
                      look="cut the joined tensor every group_size tokens")  # fmt: skip
        self.fail(
            "short-group",
            seen=seen,
            cause="the tokens left over behind the last whole group were made a group too, or groups were cut "
            "elsewhere than every group_size tokens",
            look="where the loop ends: tokens // group_size * group_size",
        )

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
                seen=f"{seen}: tokens {missing} are gone",
                cause="only the new tokens were looked at"
                if dropped
                else "tokens behind the last group, or between groups, are in neither result",
                look="torch.cat((waiting, new), dim=2): every token of it is in a group or waits",
            )
