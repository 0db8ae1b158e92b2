"""05.4: what a number of a quantized cache takes, everything counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from labkit.course.checks.hidden import hidden
from labkit.course.checks.numbers import judge
from labkit.course.checks.suspects import Suspect
from labkit.course.exercise import Exercise
from labkit.labs.lab05.references import bits_per_element

CASES = (  # tokens, nbits, group_size, residual_length, full_bits; neighbours differ in one of them
    (1000, 4, 64, 128, 16),
    (1000, 2, 64, 128, 16),
    (1000, 4, 20, 128, 16),
    (1000, 4, 64, 50, 16),
    (1000, 4, 64, 128, 32),
    (127, 4, 64, 64, 16),  # one token short of a group
    (128, 4, 64, 64, 16),  # just one
    (129, 4, 64, 64, 16),
    (64, 4, 64, 64, 16),
    (100, 2, 32, 128, 16),  # fewer than the residual
    (4, 4, 1, 8, 16),
    (9, 4, 1, 8, 16),
    (1, 8, 32, 0, 16),
    (2048, 2, 32, 0, 16),
    (300, 2, 16, 96, 32),
    (90, 4, 32, 64, 32),
    (1_000_003, 8, 48, 100, 16),
)
Rule = Callable[[int, int, int, int, int], float]


def rule(packed: Callable | None = None, per: Callable | None = None, full: Callable | None = None) -> Rule:
    """The right rule with a part replaced: tokens packed (tokens, group, residual), bits (nbits, group), full bits."""

    def bits(tokens: int, nbits: int, group: int, residual: int, full_bits: int) -> float:
        count = packed(tokens, group, residual) if packed else whole_groups(tokens, group, residual)
        each = per(nbits, group, full_bits) if per else nbits + 32 / group
        return (count * each + (tokens - count) * (full(full_bits) if full else full_bits)) / tokens

    return bits


def whole_groups(tokens: int, group: int, residual: int) -> int:
    """How many tokens are packed: the whole groups of those older than the residual."""
    return max(0, tokens - residual) // group * group


def per_packed(tokens: int, nbits: int, group: int, residual: int, full_bits: int) -> float:
    """The right total over the packed tokens alone; where none are, nothing to tell."""
    count = whole_groups(tokens, group, residual)
    return bits_per_element(tokens, nbits, group, residual, full_bits) * tokens / (count or tokens)


def total_of(total: Callable[..., float]) -> Rule:
    """A rule from the bits of all tokens: total(packed, rest, nbits, group, full_bits)."""

    def bits(tokens: int, nbits: int, group: int, residual: int, full_bits: int) -> float:
        packed = whole_groups(tokens, group, residual)
        return total(packed, tokens - packed, nbits, group, full_bits) / tokens

    return bits


META = "what each group keeps beside its codes: 2 numbers of 16 bits, shared by group_size codes"
SHARES = "what each kind of token takes, times how many there are, over all tokens"
PACKED = "the number of packed tokens: max(0, tokens - residual_length) // group_size * group_size"
SUSPECTS = (
    Suspect("total", lambda *a: bits_per_element(*a) * a[0], "the bits of all tokens were returned",
            "the average: divide by tokens"),
    Suspect("bytes", lambda *a: bits_per_element(*a) / 8, "bytes were returned", "the name: bits"),
    Suspect("ratio", (lambda *a: bits_per_element(*a) / a[4], lambda *a: a[4] / bits_per_element(*a)),
            "a ratio to full precision was returned", "the docstring: bits that one number takes"),
    Suspect("not-a-fraction", (lambda *a: int(bits_per_element(*a)), *(lambda *a, n=n: round(bits_per_element(*a), n)
            for n in range(4))), "the result was rounded", "an average of bits has a fraction: `/`, and no rounding"),
    Suspect("no-metadata", rule(per=lambda n, g, f: n), "scale and zero point were not counted", META),
    Suspect("scale-only", rule(per=lambda n, g, f: n + 16 / g), "one of scale and zero point was not counted", META),
    Suspect("metadata-in-bytes", (rule(per=lambda n, g, f: n + 4 / g), rule(per=lambda n, g, f: n + 2 / g)),
            "scale and zero point were counted in bytes, the codes in bits", META),
    Suspect("metadata-per-number", rule(per=lambda n, g, f: n + 32),
            "every number was given a scale and a zero point of its own", META),
    Suspect("metadata-twice", rule(per=lambda n, g, f: n + 64 / g),
            "scale and zero point were counted twice, as for K and V: this is an average over numbers, of whichever "
            "they are", META),
    Suspect("metadata-in-full-bits", rule(per=lambda n, g, f: n + 2 * f / g),
            "scale and zero point were counted with full_bits each",
            "the docstring: 16 bits each, whatever the cache's dtype"),
    Suspect("floor-division", rule(per=lambda n, g, f: n + 32 // g),
            "2 * 16 // group_size drops a fraction of a bit", "the division: `/`"),
    Suspect("no-residual", (rule(lambda t, g, r: t), rule(lambda t, g, r: t // g * g)),
            "residual_length was left out: every token was counted as packed, or every whole group", PACKED),
    Suspect("no-whole-groups", (rule(lambda t, g, r: max(0, t - r)), rule(lambda t, g, r: t - r)),
            "all tokens but the residual were packed; an incomplete group waits", PACKED),
    Suspect("rounded-up",
            (rule(lambda t, g, r: -(-max(0, t - r) // g) * g), rule(lambda t, g, r: -(-(t - r) // g) * g)),
            "an incomplete group was counted as a whole one", PACKED),
    Suspect("negative", (rule(lambda t, g, r: (t - r) // g * g), rule(lambda t, g, r: int((t - r) / g) * g)),
            "with fewer tokens than residual_length, less than none were packed", "max(0, ...)"),
    Suspect("residual-at-a-time", rule(lambda t, g, r: t // r * r if r else t // g * g),
            "the residual was taken to be packed as a whole when it is full, as some libraries do",
            "the docstring: group_size at a time, at least the newest residual_length stay"),
    Suspect("fixed-full-bits", rule(full=lambda f: 16), "16 was written down for full precision", "full_bits"),
    Suspect("metadata-once", total_of(lambda packed, rest, n, g, f: packed * n + 32 + rest * f),
            "one scale and one zero point were counted for the whole cache", META),
    Suspect("metadata-for-all", total_of(lambda packed, rest, n, g, f: packed * (n + 32 / g) + rest * (f + 32 / g)),
            "tokens that wait in full precision were given scales and zero points too", META),
    Suspect("metadata-multiplied", rule(per=lambda n, g, f: n + 32 * g), "metadata was multiplied by group_size",
            "the share of one number: 2 * 16 / group_size"),
    Suspect("metadata-in-nbits", (rule(per=lambda n, g, f: n + 2 * n / g), rule(per=lambda n, g, f: n + n / g)),
            "scale and zero point were counted with nbits each", META),
    Suspect("packed-only", total_of(lambda packed, rest, n, g, f: packed * (n + 32 / g)),
            "tokens that wait take no bits in this sum", SHARES),
    Suspect("rest-forgotten",
            tuple(lambda t, n, g, r, f, left=left: (whole_groups(t, g, r) * (n + 32 / g) + left(t, r) * f) / t
            for left in (min, lambda t, r: r)),
            "the residual was counted, tokens of a group that is not complete were not",
            "everything that is not packed waits: tokens - packed"),
    Suspect("rest-twice",
            lambda t, n, g, r, f: (whole_groups(t, g, r) * (n + 32 / g) + (t - whole_groups(t, g, r) + r) * f) / t,
            "the residual was counted twice", "everything that is not packed waits: tokens - packed"),
    Suspect("groups-for-tokens", (
            rule(lambda t, g, r: max(0, t - r) // g),
            *(lambda t, n, g, r, f, of=of: (max(0, t - r) // g * of(n, g) + (t - whole_groups(t, g, r)) * f) / t
            for of in (lambda n, g: n + 32 / g, lambda n, g: n + 32))),
            "groups were counted where tokens belong: each group holds group_size of them", PACKED),
    Suspect("rest-of-all",
            (rule(lambda t, g, r: max(0, t - r - t % g)), rule(lambda t, g, r: max(0, t // g * g - r)),
             rule(lambda t, g, r: max(0, t // g * g - r) // g * g)),
            "whole groups were taken of all tokens, and the residual taken off afterwards", PACKED),
    Suspect("residual-in-groups", rule(lambda t, g, r: max(0, t - r // g * g) // g * g),
            "the residual was cut to whole groups as well", "max(0, tokens - residual_length), then whole groups"),
    Suspect("one-short", (rule(lambda t, g, r: max(0, t - r - 1) // g * g), rule(lambda t, g, r: max(0, t - r - g) //
            g * g)), "the last whole group was not counted as packed", PACKED),
    Suspect("to-the-nearest", rule(lambda t, g, r: round(max(0, t - r) / g) * g),
            "groups were rounded to the nearest number; an incomplete one waits", PACKED),
    Suspect("packed-for-all", total_of(lambda packed, rest, n, g, f: (packed + rest) * (n + 32 / g) + rest * f),
            "what a packed number takes was counted for tokens that wait, too", SHARES),
    Suspect("unweighted", (lambda t, n, g, r, f: (n + 32 / g + f) / 2, lambda t, n, g, r, f: n + 32 / g + f),
            "the two sizes were put together as if there were as many tokens of each", SHARES),
    Suspect("parts-swapped", rule(lambda t, g, r: t - whole_groups(t, g, r)),
            "packed tokens were counted in full, and the others packed", "which count goes with which size"),
    Suspect("packed-alone", per_packed, "the bits of all tokens were divided by the packed tokens alone",
            "an average over all tokens: divide by tokens"),
)  # fmt: skip


class BitsPerElement(Exercise):
    """Why 4 bits are not a quarter of 16."""

    id, title, minutes, difficulty = "05.4", "Bits per element, everything counted", 4, 2
    reference = staticmethod(bits_per_element)
    why = (
        "Only whole groups of tokens older than the residual are packed; each of their numbers carries its share "
        "of 32 bits, every other number full_bits. The average weighs both by how many there are."
    )
    hints = (
        "Split the tokens in two: those that are packed and those that are not. What does one number of each take?",
        "Packed tokens come in whole groups from what is older than the residual. A packed number takes nbits, and its "
        "share of a scale and a zero point.",
        "packed = max(0, tokens - residual_length) // group_size * group_size\nper_packed = nbits + 2 * 16 / group_size"
        "\nreturn (packed * per_packed + (tokens - packed) * full_bits) / tokens",
    )
    hints_for: ClassVar = {
        "no-metadata": "64 codes of 4 bits are 256 bits. What else is kept for these 64 numbers?",
        "scale-only": "codes * scale + zero: how many numbers does a group need to come back?",
        "rest-forgotten": "Of 131 tokens with groups and a residual of 32, the drawing shows 35 that wait, not 32.",
        "rest-of-all": "Which comes first: taking the residual off, or cutting into groups?",
        "groups-for-tokens": "Three groups of 64: how many tokens are packed?",
        "metadata-for-all": "A token that waits in full precision has no code. Does it need a scale?",
        "packed-for-all": "Each token is either packed or waits: count it once.",
        "one-short": "192 tokens, a residual of 64, groups of 64: how many groups can go?",
        "no-whole-groups": "70 tokens may be packed, 64 at a time. How many are, and what do the others take?",
        "rounded-up": "70 tokens may be packed, 64 at a time. Is the second group complete?",
        "negative": "100 tokens, a residual of 128: how many are packed?",
        "metadata-in-full-bits": "A cache in 32 bits does not make its scales any wider.",
    }

    def examine(self, answer: Callable) -> None:
        """Each argument changed alone; groups that divide and that do not, one token more and less; no residual, too
        few tokens to pack."""
        more = hidden(lambda chance: (
            chance.randint(1, 9_999), chance.choice((2, 4, 8)), 8 * chance.randint(1, 16), chance.randint(0, 300),
            chance.choice((16, 32)),
        ))  # fmt: skip
        judge(
            type(self),
            answer,
            bits_per_element,
            [*CASES, *more],
            SUSPECTS,
            what="the average in bits",
            otherwise="count",
        )
