"""05.3: keys per channel, values per token."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from labkit.course.checks.suspects import Suspect, accuse
from labkit.course.checks.tensors import agree
from labkit.course.checks.trials import LAYOUTS
from labkit.course.exercise import Exercise, NotYet
from labkit.labs.lab05.references import quantize, quantize_cache

SIZES = (
    2,
    3,
    48,
    40,
)  # batch, KV heads, tokens, head_dim. However they are cut, no group of two: it comes back exactly
PLACE = (1, 1, 13, 6)  # the number that is made large, in the middle of everything
TOLERANCE = 1e-3  # bounded: a wrong code is off by a scale, 0.01 or more; an eps of 1e-6 in a scale by under 3e-4

alike = partial(agree, tolerance=TOLERANCE)

Pair = tuple[Tensor, Tensor]


class QuantizeCache(Exercise):
    """KIVI's choice of groups (Liu and others, arXiv:2402.02750)."""

    id, title, minutes, difficulty = "05.3", "Keys per channel, values per token", 8, 3
    needs = ("05.1",)
    reference = staticmethod(quantize_cache)
    why = (
        "quantize groups whatever comes last. For values that is head_dim already; for keys .mT puts the tokens "
        "last, and the same .mT afterwards undoes it."
    )
    hints = (
        "`quantize` makes a group of the last dimension. Which dimension must come last for keys, which for values?",
        "Values: head_dim is last already; unflatten(-1, (-1, group_size)) cuts it into groups. Keys: swap tokens and "
        "head_dim first (k.mT), cut the tokens, and undo both in the opposite order.",
        "groups = k.mT.unflatten(-1, (-1, group_size))\ncodes, scale, zero = quantize(groups, nbits)\n"
        "keys = (codes * scale + zero).flatten(-2).mT\n# values: the same without .mT",
    )
    hints_for: ClassVar = {
        "keys-per-token": "Some channels of keys are large in every token. With whom should such a channel share a "
        "scale: with other channels, or with itself at other tokens?",
        "values-per-channel": "Values have no large channels, but whole tokens are large or small. And a new token's "
        "values can be quantized at once if they share a scale with nobody.",
        "axes-swapped": "`quantize` groups the last dimension. Which of k and v has to be turned for it?",
        "group-size-ignored": "unflatten(-1, (-1, group_size)) makes of n numbers n / group_size groups.",
        "constant-group": "What is the scale of a channel of zeros? quantize knows what to do with it.",
        "groups-counted": "In unflatten(-1, (a, b)), which of a and b is the size of a group?",
        "strided-groups": "unflatten(-1, (-1, group_size)) or (group_size, -1): in which are neighbours in one group?",
        "rearranged": "Undo the steps in the opposite order: the last one first.",
    }

    def examine(self, answer: Callable) -> None:
        """Two group sizes and several widths, one group, groups of one, groups of equal numbers, the same shape again,
        tensors in another order in memory, other dtypes."""
        self.judge(answer, large_here_and_there(SIZES), 4, 8)
        self.judge_equal_numbers(answer)
        for sizes, nbits, group_size in (
            (SIZES, 2, 4), (SIZES, 4, 8), ((1, 2, 96, 32), 8, 8), ((1, 2, 16, 16), 4, 16), ((1, 3, 256, 64), 4, 32),
            ((1, 1, 3, 5), 2, 1),
        ):  # fmt: skip
            self.judge(answer, large_here_and_there(sizes), nbits, group_size)
        for change, words in LAYOUTS:
            k, v = torch.randn(2, *SIZES, dtype=torch.float64)
            self.judge_layout(answer, change(k), change(v), words)
        for dtype in (torch.float32, torch.bfloat16):
            k, v = torch.randn(2, 1, 2, 24, 16).to(dtype)
            self.judge_dtype(answer, k, v)

    def judge(self, answer: Callable, given: Pair, nbits: int, group_size: int) -> None:
        """One call beside the reference."""
        k, v = given
        got, want = self.pair(answer, k, v, nbits, group_size), quantize_cache(k, v, nbits, group_size)
        ties = [
            halfway(x, nbits, group_size, turn) for x, turn in ((k, True), (v, False))
        ]  # may become either neighbour
        wrong = [not alike(a.where(~tie, b), b) for a, b, tie in zip(got, want, ties, strict=True)]
        if any(wrong):
            self.explain_difference(got, want, given, nbits, group_size)
            self.explain_groups(answer, wrong, group_size)

    def judge_equal_numbers(self, answer: Callable) -> None:
        """A channel of zeros, a token of ones: groups whose scale is 0."""
        k, v = torch.randn(2, 1, 2, 8, 12, dtype=torch.float64)
        k[..., 5], v[:, :, 3] = 0.0, 1.0
        try:
            keys, values = self.pair(answer, k, v, 4, 4)
            wrong, seen = (
                bool(keys[..., 5].any() or (values[:, :, 3] != 1.0).any()),
                "other numbers come back for these",
            )
        except NotYet as not_yet:
            if not_yet.finding.diagnosis != "not-finite":
                raise
            wrong, seen = True, "NaN comes back"
        if wrong:
            self.fail("constant-group", seen=f"a channel of K is 0 throughout, a token of V 1 throughout: {seen}",
                      cause="the scale of such a group is 0, and 0 / 0 is NaN",
                      look="quantize from 05.1, which takes care of it")  # fmt: skip

    def judge_layout(self, answer: Callable, k: Tensor, v: Tensor, words: str) -> None:
        """Tensors that lie in memory in another order than their dimensions, as a model's K and V do."""
        try:
            right = all(map(alike, self.pair(answer, k, v, 4, 8), quantize_cache(k, v, 4, 8)))
            seen = "other numbers come back"
        except NotYet as not_yet:
            if not_yet.finding.diagnosis != "raised":
                raise
            right, seen = False, not_yet.finding.seen
        if not right:
            self.fail("layout", seen=f"k and v {list(k.shape)}, {words}: {seen}. Contiguous in memory, they were right",
                      cause="the code counts on the order in memory: view, or a reshape that assumes it",
                      look="reshape or unflatten in place of view")  # fmt: skip

    def judge_dtype(self, answer: Callable, k: Tensor, v: Tensor) -> None:
        """Another dtype: it stays, and no number is further off than half a scale and the dtype's rounding."""
        for side, x, back in zip("KV", (k, v), self.pair(answer, k, v, 4, 8), strict=True):
            groups, restored = (
                (part.mT if side == "K" else part).double().unflatten(-1, (-1, 8)) for part in (x, back)
            )
            scale = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
            rounding = 16 * torch.finfo(x.dtype).eps * groups.abs().amax(-1, keepdim=True)
            off = ((restored - groups).abs() - rounding) / scale
            if (off > 0.5).any():
                self.fail("precision", seen=f"{side} in {str(x.dtype).removeprefix('torch.')}: a number comes back "
                          f"{off.max().item():.2g} scales off; half a scale is the most. In float64 it was right",
                          cause="a step is computed in too few bits",
                          look="every dtype that is written down")  # fmt: skip

    def pair(self, answer: Callable, k: Tensor, v: Tensor, nbits: int, group_size: int) -> Pair:
        """K and V as the answer gives them back, when they have the shapes that came in."""
        got = self.call(answer, k, v, nbits, group_size)
        if not isinstance(got, (tuple, list)) or len(got) != 2:
            self.fail("not-a-pair", seen=f"a {type(got).__name__} came back, not K and V",
                      cause="one of the two is missing, or codes and scales were returned",
                      look="the return: two tensors of numbers, shaped as k and v")  # fmt: skip
        for side, part in zip("KV", got, strict=True):
            if isinstance(part, Tensor):
                accuse(type(self), [
                    Suspect("not-turned-back", part.shape == k.mT.shape != k.shape,
                            "tokens and head_dim are still swapped", "the last step for keys: .mT once more"),
                    Suspect("groups-left", part.dim() == k.dim() + 1, "the groups still have a dimension of their own",
                            "the opposite of unflatten: .flatten(-2)"),
                    Suspect("codes-returned", part.dtype == torch.uint8, "the codes were returned",
                            "codes * scale + zero"),
                ], f"{side} came back as {list(part.shape)} {part.dtype}; it went in as {list(k.shape)} "
                   f"{k.dtype}")  # fmt: skip
            self.like(part, k, what=side)
        return got[0], got[1]

    def explain_difference(self, got: Pair, want: Pair, given: Pair, nbits: int, group_size: int) -> None:
        """Name what else than the groups can make other numbers."""
        if alike(got[0], want[1]) and alike(got[1], want[0]):
            self.fail("swapped", seen="V came back first", cause="the two changed places", look="the return: K, V")
        for mine, other in ((0, 1), (1, 0)):
            if (got[mine] - given[other]).abs().mean() < 0.5 * (got[mine] - given[mine]).abs().mean():
                name = "KV"[mine]
                self.fail("one-for-the-other", seen=f"{name}, as it came back, is {'KV'[other]}",
                          cause="a name was written twice",
                          look=f"the lines for {name}: which of k and v?")  # fmt: skip
        for name, back, right, raw, turn in zip("KV", got, want, given, (True, False), strict=True):
            groups = (raw.mT if turn else raw).unflatten(-1, (-1, group_size))
            codes, scale, zero = quantize(groups, nbits)
            least = groups.amin(-1, keepdim=True)
            steps, wider = (groups - least) / scale, (groups.amax(-1, keepdim=True) - least) / 2**nbits
            largest = groups.abs().amax(-1, keepdim=True) / (2 ** (nbits - 1) - 1)
            ways = (codes * scale, (codes - zero) * scale, codes.double(), (codes + zero) * scale, codes * zero + scale,
                    codes * (scale + zero), steps.floor() * scale + least, ((groups - least) / wider).round() * wider +
                    least, (groups / largest).round() * largest)  # fmt: skip
            made = [part.flatten(-2).mT if turn else part.flatten(-2) for part in ways]
            worst = int((back - right).abs().argmax())
            shown = [f"{part.flatten()[worst].item():.3f}" for part in (raw, back, right)]
            others = [quantize_cache(*given, bits, group_size)["KV".index(name)] for bits in (8, 4, 2) if bits != nbits]
            untouched = (back - raw).abs() < TOLERANCE
            accuse(type(self), [
                Suspect("one-for-all", any(not alike(right, first) and alike(back, first) for first in (
                            right[:1].expand_as(right), right[:, :1].expand_as(right))),
                        "every row, or every head, came back as the first one",
                        f"an index 0 in the lines for {name}: all rows and heads have groups of their own"),
                Suspect("not-quantized", alike(back, raw), "it went through unchanged",
                        f"the line that quantizes {name}"),
                Suspect("partly-quantized", bool(untouched[(right - raw).abs() > TOLERANCE].any()) and
                        bool((untouched | ((back - right).abs() < TOLERANCE)).all()),
                        f"{int(untouched.sum()):,} of {raw.numel():,} numbers went through unchanged, the others not",
                        "the slices or the loop: every group"),
                Suspect("codes-returned", alike(back, made[2]), "the codes were returned", "codes * scale + zero"),
                Suspect("zero-not-added", alike(back, made[0]) or alike(back, made[1]),
                        "the zero point was not added", "codes * scale + zero"),
                Suspect("zero-misplaced", any(alike(back, part) for part in made[3:6]),
                        "codes, scale and zero were put together in another way", "codes * scale + zero"),
                Suspect("truncated", alike(back, made[6]), "fractions of codes were cut off", "quantize from 05.1"),
                Suspect("one-level-too-many", alike(back, made[7]), "the range was cut into 2**nbits steps",
                        "quantize from 05.1"),
                Suspect("symmetric", alike(back, made[8]), "scale from the largest absolute value, no zero point",
                        "quantize from 05.1"),
                Suspect("fixed-bits", any(alike(back, other) for other in others),
                        "another number of bits was written down", "the parameter nbits"),
                Suspect("rearranged",
                        not alike(back, right) and alike(back.flatten().sort()[0], right.flatten().sort()[0]),
                        "the numbers are right, their places are not: the way back is not the way there",
                        "the dimensions before and after; a reshape does not swap dimensions, .mT does"),
            ], "{} in {} bits: a number of {} became {}; it should be {}".format(name, nbits, *shown))  # fmt: skip

    def explain_groups(self, answer: Callable, wrong: list[bool], group_size: int) -> None:
        """Make one number large, see which others change: they share its scale. Name the groups from that."""
        spoilt = [self.changed_by_one(answer, side, group_size) for side in range(2)]
        axes = [spread(mask) for mask in spoilt]
        if all(wrong) and axes[0] == {3} and axes[1] == {2}:
            self.fail("axes-swapped", seen=f"{described('key', spoilt[0])}. {described('value', spoilt[1])}",
                      cause="keys were quantized per token and values per channel",
                      look="which of the two is turned so that its tokens come last: keys")  # fmt: skip
        for side, (noun, axis) in enumerate((("key", 2), ("value", 3))):
            if wrong[side]:
                self.name_groups(noun, axis, spoilt[side], group_size)
        given = torch.rand(4, *SIZES, dtype=torch.float64)
        twice = [self.pair(answer, given[i], given[i + 1], 4, group_size) for i in (0, 2)]
        if all(map(torch.equal, *twice)):
            self.fail("remembered", seen=f"two calls with K and V of {list(SIZES)}, of other numbers, gave the same",
                      cause="a result is kept from call to call, or the numbers that came in are not used",
                      look="what outlives a call: a global, a default argument, a cache decorator")  # fmt: skip
        for side, name in enumerate("KV"):
            if wrong[side] and int(spoilt[side].sum()) == 1:
                row = f"in row {PLACE[0]}, head {PLACE[1]}, token {PLACE[2]}, channel {PLACE[3]}"
                self.fail("not-read",
                          seen=f"a number of {name} made large, {row}, changes no other that comes back",
                          cause=f"that part of {name} is not read, or each number is a group of its own",
                          look=f"the lines for {name}: every row, head, token and channel")  # fmt: skip
        self.fail("values", seen="one large number changes none but its own group, yet other numbers come back",
                  cause="something inside a group is computed in another way",
                  look="one group by hand: quantize, then codes * scale + zero")  # fmt: skip

    def name_groups(self, noun: str, axis: int, spoilt: Tensor, group_size: int) -> None:
        """One side whose groups are not what they should be."""
        along, places = spread(spoilt), spoilt.nonzero()[:, axis].tolist()
        gaps = [after - before for before, after in pairwise(places)] or [0]
        block = along == {axis} and set(gaps) == {1}
        start = PLACE[axis] // group_size * group_size
        right_places = list(range(start, start + group_size))
        whole = len(places) == spoilt.shape[axis]
        per = {"key": "group_size successive tokens of one channel", "value": "group_size successive channels of one "
               "token"}[noun]  # fmt: skip
        accuse(type(self), [
            Suspect("rows-mixed", 0 in along,
                    "rows of the batch share a scale: what one user sends changes another's cache",
                    f"the dimensions that were joined before the groups were cut; {per}"),
            Suspect("heads-mixed", 1 in along, "heads share a scale, whose sizes have nothing to do with each other",
                    f"the dimensions that were joined before the groups were cut; {per}"),
            Suspect("tile-shares-a-scale", {2, 3} <= along, "a block of tokens and channels has one scale",
                    f"the shape that quantize gets: its last dimension is {per}"),
            Suspect("keys-per-token", axis == 2 and along == {3},
                    "channels of one token share a scale: the default of many libraries, or k reshaped where it "
                    "should be transposed", "k.mT before the groups are cut: the tokens of a channel come last"),
            Suspect("values-per-channel", axis == 3 and along == {2},
                    "tokens of one channel share a scale, as is right for keys",
                    "the values' last dimension is head_dim as it is: no .mT"),
            Suspect("group-size-ignored", along == {axis} and whole,
                    "group_size was not used: all of them share a scale",
                    "unflatten(-1, (-1, group_size)) before quantize"),
            Suspect("strided-groups", along == {axis} and min(gaps) == max(gaps) > 1,
                    "a group holds numbers that are not successive",
                    "the order in unflatten: (-1, group_size), groups first"),
            Suspect("groups-counted", block and len(places) == spoilt.shape[axis] // group_size,
                    "group_size was taken for the number of groups",
                    "unflatten(-1, (-1, group_size)): groups first, then their size"),
            Suspect("group-size", block and len(places) != group_size and not set(places) <= set(right_places),
                    "a group has another size than group_size", per),
            Suspect("groups-shifted", block and len(places) == group_size and places != right_places,
                    "groups begin elsewhere than at the first number",
                    f"the first group: numbers 0 to {group_size - 1}"),
        ], f"{described(noun, spoilt)}; group_size is {group_size}")  # fmt: skip

    def changed_by_one(self, answer: Callable, side: int, group_size: int) -> Tensor:
        """Which numbers of K (side 0) or V (1) come back otherwise when the one at PLACE is large; bool, itself too.

        The least of a group stays when another is made large, the greatest when another is made small: try both.
        """
        given = torch.rand(2, *SIZES, dtype=torch.float64)
        before = self.pair(answer, given[0], given[1], 4, group_size)[side]
        changed = torch.zeros(SIZES, dtype=torch.bool)
        for size in (1000.0, -1000.0):
            other = given.clone()
            other[(side, *PLACE)] = size
            changed |= (self.pair(answer, other[0], other[1], 4, group_size)[side] - before).abs() > TOLERANCE
        changed[PLACE] = True
        return changed


def large_here_and_there(sizes: tuple[int, ...]) -> Pair:
    """Random K and V, with a channel that is large in every token of K, a token that is large in every channel of V."""
    k, v = torch.randn(2, *sizes, dtype=torch.float64)
    k[..., -3] *= 30.0
    v[:, :, 2] *= 30.0
    return k, v


def halfway(x: Tensor, nbits: int, group_size: int, turn: bool) -> Tensor:
    """Which numbers lie in the middle of two levels, bool of x's shape; turn: whether groups lie along the tokens."""
    groups = (x.mT if turn else x).unflatten(-1, (-1, group_size))
    least = groups.amin(-1, keepdim=True)
    scale = (groups.amax(-1, keepdim=True) - least) / (2**nbits - 1)
    tie = (((groups - least) / scale.masked_fill(scale == 0, 1.0)) % 1 - 0.5).abs() < 1e-4
    return tie.flatten(-2).mT if turn else tie.flatten(-2)


def spread(mask: Tensor) -> set[int]:
    """The dimensions along which the chosen numbers lie at more than one place."""
    return {dim for dim, places in enumerate(mask.nonzero().unbind(1)) if len(places.unique()) > 1}


def described(noun: str, mask: Tensor) -> str:
    """What one large number changes, in words."""
    places = [dim.unique().tolist() for dim in mask.nonzero().unbind(1)]
    names = ("row", "head", "token", "channel")
    where = ", ".join(f"{name}{'s' * (len(at) > 1)} {listed(at)}" for name, at in zip(names, places, strict=True))
    return f"one large {noun}, at token {PLACE[2]}, channel {PLACE[3]}, changes {int(mask.sum())}: {where}"


def listed(at: list[int]) -> str:
    """Whole numbers in few characters: a range, or the list."""
    if len(at) > 2 and at == list(range(at[0], at[-1] + 1)):
        return f"{at[0]} to {at[-1]}"
    return " ".join(map(str, at))
