"""06.7: which blocks can be reused."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, ClassVar

from labkit.course.checks.hidden import hidden
from labkit.course.checks.suspects import Suspect, accuse
from labkit.course.exercise import Exercise
from labkit.labs.lab06.chains import Written, chain, written
from labkit.labs.lab06.parts import some
from labkit.labs.lab06.references import reusable

Call = tuple[list[int], dict[int, Written], int, str]


def other(*, last: int = 0, least: int = 0, check: str = "all", holes: bool = False, key: str = "chain",
          salted: bool = True, fixed: int = 0, zero: bool = True,
          cut: int = 0) -> Callable[..., list[int]]:  # fmt: skip
    """The search with one thing done in another way.

    last: tokens that may be reused of the last one; least: fewer than that. check: what is compared. holes: go on
    behind a miss. key: "own" for a key of the salt and the block alone. salted: whether keys begin with the salt.
    fixed: a block size written down. zero: whether block 0 is one. cut: found blocks left out at the end.
    """

    def search(tokens: list[int], found: dict[int, Written], block_size: int, salt: str) -> list[int]:
        size, blocks, before = fixed or block_size, [], salt if salted else ""
        chained: str | int = before
        for end in range(size, len(tokens) + last - least, size):
            own = tuple(tokens[end - size : end])
            chained = chain(chained if key == "chain" else before, own)
            one = found.get(chained)
            fits = (
                one is not None
                and {
                    "all": one.salt == salt and list(one.tokens) == tokens[:end],
                    "tokens": list(one.tokens) == tokens[:end],
                    "salt": one.salt == salt,
                    "first": one.salt == salt and list(one.tokens[:size]) == tokens[:size],
                    "own": one.salt == salt and one.tokens[-size:] == own,
                    "same set": one.salt == salt and set(one.tokens) == set(tokens[:end]),
                    "sorted": one.salt == salt and sorted(one.tokens) == sorted(tokens[:end]),
                    "sum": one.salt == salt and sum(one.tokens) == sum(tokens[:end]),
                    "beginning": one.salt == salt and list(one.tokens[:end]) == tokens[:end],
                    "as far as it goes": one.salt == salt and list(one.tokens) == tokens[: len(one.tokens)],
                    "pairs": one.salt == salt and all(a == b for a, b in zip(one.tokens, tokens, strict=False)),
                    "nothing": True,
                }[check]
            )
            if fits and one is not None and (zero or one.block):
                blocks.append(one.block)
            elif not holes:
                break
        return blocks[:-cut] if cut else blocks

    return search


COMPARE = "what was found: its salt and its tokens, all of them, against tokens[:end]"
KEYS = "key = chain(key, this block's tokens), where key is the salt at first"
SUSPECTS = (
    Suspect("last-token-reused", [other(last=1), other(last=1, check="nothing"), other(last=1, check="tokens")],
            "where the whole prompt is found, no token is left to run, so there are no logits",
            "the last block that may be reused: it ends before the last token"),
    Suspect("not-compared", other(check="nothing"), "what stands under the key was taken without a look: two texts may "
            "have one key", COMPARE),
    Suspect("salt-not-compared", other(check="tokens"), "what was found was written for another salt", COMPARE),
    Suspect("tokens-not-compared", other(check="salt"), "what was found was written for other tokens", COMPARE),
    Suspect("only-own-tokens", other(check="own"), "the block's own tokens were compared, not those before them: its K "
            "and V depend on all", COMPARE),
    Suspect("only-first-tokens", other(check="first"), "the first block's tokens were compared, and no later ones",
            COMPARE),
    Suspect("order-not-compared", [other(check="same set"), other(check="sorted"), other(check="sum")],
            "the same tokens in another order were taken for the same text", COMPARE),
    Suspect("length-not-compared", [other(check="beginning"), other(check="as far as it goes"), other(check="pairs")],
            "a text that is longer or shorter was taken for this one: the block holds other tokens", COMPARE),
    Suspect("goes-on-after-a-miss", [other(holes=True), other(holes=True, check="nothing")],
            "blocks behind one that was not found were reused: a table has no holes",
            "the loop: it ends with the first block that is not found"),
    Suspect("not-chained", [other(key="own"), other(key="own", holes=True)],
            "from the second block on nothing was found: its key was made of something else than the key before it and "
            "its own tokens", KEYS),
    Suspect("not-chained", [other(key="own", check="nothing"), other(key="own", check="nothing", holes=True),
                            other(key="own", check="own"), other(key="own", check="own", holes=True)],
            "each block's key was made of its own tokens alone", KEYS),
    Suspect("no-salt", [other(salted=False), other(salted=False, check="tokens")],
            "the keys do not begin with the salt", KEYS),
    Suspect("nothing-found", lambda *case: [], "in no case was anything found: keys are made in another way, or a "
            "tuple was compared with a list, which it never equals", f"{KEYS}; {COMPARE}"),
    Suspect("one-too-few", [other(least=1), other(least=2)],
            "a block that ends just before the last token was left out",
            "one token is left to run: a block may end at len(tokens) - 1"),
    Suspect("block-0", [other(zero=False), other(zero=False, holes=True)],
            "block 0 was taken for none: 0 is false in a condition", "what says that nothing was found: `is None`"),
    Suspect("last-block-left-out", [other(last=1, cut=1), other(cut=1)],
            "the last block that was found is left out, also where tokens behind it are left to run",
            "which blocks end before the last token? All of those are reused"),
    Suspect("fixed-size", [other(fixed=16), other(fixed=4)], "a block size was written down", "block_size"),
)  # fmt: skip


class Reusable(Exercise):
    """Prefix reuse."""

    id, title, minutes, difficulty = "06.7", "One beginning, many requests", 7, 3
    reference = staticmethod(reusable)
    why = (
        "A chained key stands for all tokens up to a block's end, as its K and V do; a match is believed only when "
        "salt and tokens are the same. The range ends before the last token, which must be run for its logits."
    )
    hints = (
        "Where does the first block end, where the second? Which of them end before the last token?",
        "Walk through the ends, block by block: make the key, look it up, compare, stop at the first miss.",
        "key = salt\nfor end in range(block_size, len(tokens), block_size):\n"
        "    key = chain(key, tuple(tokens[end - block_size : end]))\n    written = found.get(key)",
    )
    hints_for: ClassVar = {
        "last-token-reused": "32 tokens in blocks of 16, both found. What is left to run? Where do logits come from?",
        "only-own-tokens": "K of token 20 depends on token 3. Which tokens must be equal for it to be of use?",
        "not-chained": "The second block's key begins with the first block's key, not with the salt.",
        "goes-on-after-a-miss": "break, not continue: the tokens of the missing block would have no K and V.",
    }

    def examine(self, answer: Callable) -> None:
        """Nothing found, a part, everything; ends of blocks; other beginnings; other salts; keys that collide."""
        got: list[tuple[Call, list[int], list[int]]] = []
        for call in [*cases(), *hidden(some_call, count=30)]:
            got.append((call, self.called(answer, call, got), reusable(*call)))
        wrong = [one for one in got if one[1] != one[2]]
        if not wrong:
            return
        (tokens, found, size, salt), came, want = wrong[0]
        case = f"tokens {some(tokens)}, blocks of {size}, salt {salt!r}, {len(found)} blocks found"
        seen = f"{case}: {came} came back, not {want}"
        accuse(type(self), SUSPECTS, seen, fits=lambda way: all(way(*case) == came for case, came, _ in got))
        self.fail("blocks", seen=seen, cause="another search than that of the docstring: "
                  f"{len(got) - len(wrong)} of {len(got)} cases came out right",
                  look="this case by hand: each end, its key, what is found, what it is compared with")  # fmt: skip

    def called(self, answer: Callable, case: Call, before: list[tuple[Call, list[int], list[int]]]) -> list[int]:
        """What came back, as a list of blocks. before: earlier calls, and what came back."""
        got = self.call(answer, *case)
        if not isinstance(got, (list, tuple)):
            self.fail("not-a-list", seen=f"what came back is no list: {type(got).__name__}",
                      cause="tokens or blocks were counted",
                      look="the return: the blocks themselves, in order")  # fmt: skip
        known: Any = {one.block for one in case[1].values()}
        if strange := [one for one in got if isinstance(one, tuple) or one not in known]:
            if any(earlier[0] == case[0] and came == list(got) for earlier, came, _ in before):
                self.fail("remembered", seen=f"{strange[0]} came back, and `found` has no such block: it came back for "
                          "the same tokens in an earlier call, with another `found`",
                          cause="answers are kept from call to call, and `found` may have changed since",
                          look="what outlives a call: a global, a default argument, an attribute")  # fmt: skip
            self.fail("not-blocks", seen=f"{str(strange[0])[:80]} came back among the blocks",
                      cause="the key, the Written or the place came back in place of its block",
                      look="what is put into the list: found[key].block")  # fmt: skip
        return [int(one) for one in got]


def some_call(chance: random.Random) -> Call:
    """A text, part of another that was run; at times with one token changed."""
    size, text = chance.randint(2, 6), chance.choices(range(300), k=70)
    found = written(text, chance.sample(range(99), 70 // size), size, "anna")
    tokens, place = text[: chance.randint(1, 70)], chance.randrange(70)
    if place < len(tokens) and chance.random() < 0.5:
        tokens[place] += 1
    return tokens, found, size, "anna"


def cases() -> list[Call]:
    """From nothing found to two texts with one key."""
    text = [(7 * place + 3) % 300 for place in range(70)]
    four = written(text, [30, 11, 4, 25, 8, 2, 40, 19, 33, 17, 6, 9, 13, 21, 5, 1, 50], 4, "anna")
    sixteen = written(text, [3, 9, 1, 7], 16, "anna")
    hole = {key: one for key, one in four.items() if one.block != 11}
    zero = written([0] * 24, [2, 0, 5, 1, 4, 3], 4, "")
    second, third = list(four)[1:3]
    swapped = {**four, second: Written(60, "anna", (*text[:3], 999, *text[4:8]))}  # one key, another beginning
    strange = {**four, second: Written(61, "anna", (*text[:4], 1, 2, 3, 4))}
    tenant = {**four, second: Written(62, "berta", tuple(text[:8])), third: Written(63, "berta", tuple(text[:12]))}
    turned = {**four, second: Written(64, "anna", (*text[4:8], *text[:4]))}  # the same tokens in another order
    longer = {**four, second: Written(65, "anna", tuple(text[:12]))}
    shorter = {**four, second: Written(66, "anna", tuple(text[:4]))}
    late = {chain("anna", tuple(text[start : start + 4])): Written(70 + start, "anna", tuple(text[start : start + 4]))
            for start in range(0, 24, 4)}  # fmt: skip
    return [
        (text[:10], four, 4, "anna"),
        (text[:9], four, 4, "anna"),
        (text[:8], four, 4, "anna"),
        (text[:4], four, 4, "anna"),
        (text[:3], four, 4, "anna"),
        (text[:1], four, 4, "anna"),
        (text, four, 4, "anna"),
        (text, sixteen, 16, "anna"),
        (text[:33], sixteen, 16, "anna"),
        (text[:64], sixteen, 16, "anna"),
        (text, four, 4, "berta"),
        (text, four, 4, ""),
        (text, {}, 4, "anna"),
        ([*text[:6], 5, *text[7:]], four, 4, "anna"),
        ([5, *text[1:]], four, 4, "anna"),
        (text[4:], four, 4, "anna"),
        (text[:20], hole, 4, "anna"),
        ([0] * 21, zero, 4, ""),
        ([0] * 20, zero, 4, ""),
        (text[:20], swapped, 4, "anna"),
        (text[:20], strange, 4, "anna"),
        (text[:20], tenant, 4, "anna"),
        (text[:20], turned, 4, "anna"),
        (text[:20], longer, 4, "anna"),
        (text[:20], shorter, 4, "anna"),
        (text[:24], late, 4, "anna"),
        (text[:13], written(text[:13], [8, 6, 7], 4, "anna"), 4, "anna"),
        (text[:13], written(text[:13], [8, 6], 6, "anna"), 6, "anna"),
    ]
