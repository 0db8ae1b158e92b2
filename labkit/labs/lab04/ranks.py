"""04.5: KV heads over the GPUs of tensor parallelism."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import ClassVar

from labkit.course.checks.hidden import hidden
from labkit.course.checks.numbers import check_whole
from labkit.course.checks.suspects import Suspect, accuse
from labkit.course.exercise import Exercise, NotYet
from labkit.labs.lab04.references import split_kv_heads

DIVIDE = (
    (60, 12, 4), (60, 12, 1), (48, 6, 2), (48, 6, 6), (48, 6, 12), (48, 6, 48), (28, 4, 28), (40, 10, 20), (30, 1, 5),
    (72, 12, 3), (7, 7, 7), (7, 7, 1), (1, 1, 1), (10, 5, 1), (512, 256, 128), (1024, 4, 512),
)  # fmt: skip
REFUSED = (
    (28, 4, 8, "query heads"), (36, 4, 8, "query heads"), (6, 2, 12, "query heads"), (60, 5, 7, "query heads"),
    (48, 6, 4, "KV heads"), (48, 8, 12, "KV heads"), (24, 4, 6, "KV heads"), (60, 12, 10, "KV heads"),
)  # fmt: skip
Split = Callable[[int, int, int], object]


def some_division(chance: random.Random) -> tuple[int, int, int]:
    """Query heads, KV heads and GPUs of which one divides the other."""
    few, times = chance.randint(1, 16), chance.randint(1, 8)
    num_kv_heads, ranks = chance.sample((few, few * times), 2)
    return few * times * chance.randint(1, 8), num_kv_heads, ranks


class SplitKvHeads(Exercise):
    """Where the saving ends."""

    id, title, minutes, difficulty = "04.5", "KV heads over many GPUs", 4, 2
    reference = staticmethod(split_kv_heads)
    why = (
        "Query heads divide over the GPUs or nothing works. Then either the KV heads divide as well, or there are "
        "more GPUs than heads and each head is kept on several: max(1, ...) is the one rule for both."
    )
    hints = (
        "8 KV heads on 2 GPUs: how many each? Now 8 on 16: a GPU cannot keep half a head. What does it keep?",
        "With fewer GPUs than KV heads, each keeps num_kv_heads // ranks. With more, each keeps one, and ranks // "
        "num_kv_heads of them keep the same one.",
        "if num_heads % ranks: raise ValueError(...)\nif num_kv_heads % ranks and ranks % num_kv_heads: raise "
        "ValueError(...)\nreturn max(1, num_kv_heads // ranks), max(1, ranks // num_kv_heads)",
    )
    hints_for: ClassVar = {
        "no-head": "What would a GPU with 0 KV heads attend to?",
        "never-copied": "16 GPUs, one KV head each, 8 different KV heads: how often does each occur?",
        "refuses-copies": "More GPUs than KV heads is allowed. It costs memory, and that is the point.",
        "and-or": "8 KV heads on 2 GPUs: 2 divides 8, 8 does not divide 2. Is that to be refused?",
        "accepts-halves": "6 KV heads on 4 GPUs: which GPU would keep which?",
    }

    def examine(self, answer: Callable) -> None:
        """Divisions that fit, divisions that copy, and divisions that must be refused."""
        got = {case: self.divide(answer, *case) for case in (*DIVIDE, *hidden(some_division))}
        if refused := {case for case, pair in got.items() if isinstance(pair, Exception)}:
            self.explain_refusals(refused, got[min(refused, key=DIVIDE.index)])
        self.explain(got)
        for num_heads, num_kv_heads, ranks, what in REFUSED:
            self.refuse(answer, num_heads, num_kv_heads, ranks, what)

    def divide(self, answer: Callable, num_heads: int, num_kv_heads: int, ranks: int) -> tuple[int, ...] | Exception:
        """One division that works: the two numbers, or the error with which it was refused."""

        def attempt() -> object:
            try:
                return answer(num_heads, num_kv_heads, ranks)
            except (ValueError, ZeroDivisionError, AssertionError) as error:
                return error

        where, got = in_words(num_heads, num_kv_heads, ranks), self.call(attempt)
        if isinstance(got, Exception):
            return got
        if not isinstance(got, (tuple, list)) or len(got) != 2:
            self.fail("not-a-pair", seen=f"{where}: {got!r} came back", cause="one number is missing, "
                      "or one too many", look="the return: heads per GPU, copies")  # fmt: skip
        return tuple(check_whole(type(self), number, "a count of heads or of GPUs") for number in got)

    def explain_refusals(self, refused: set[tuple[int, int, int]], error: Exception | tuple) -> None:
        """Which of the divisions that work were refused, and what that has in common."""
        first = min(refused, key=DIVIDE.index)
        said = str(error)[:60] or "no message"
        seen = f"{in_words(*first)}: {type(error).__name__}, {said!r}; this division works"
        more = {case for case in DIVIDE if case[2] > case[1]}
        unequal = {case for case in DIVIDE if case[1] % case[2] or case[2] % case[1]}
        if isinstance(error, ZeroDivisionError):
            self.fail("no-head", seen=f"{in_words(*first)}: a division by zero",
                      cause="one of the two whole divisions, num_kv_heads // ranks or ranks // num_kv_heads, is 0 here",
                      look="what a GPU keeps when there are more GPUs than KV heads")  # fmt: skip
        accuse(type(self), [
            Suspect("refuses-copies", refused == more, "more GPUs than KV heads were taken for a division that fails",
                    "the docstring: either of num_kv_heads and ranks may divide the other"),
            Suspect("refuses-fewer", refused == {case for case in DIVIDE if case[2] < case[1]},
                    "fewer GPUs than KV heads were taken for a division that fails",
                    "the docstring: either of num_kv_heads and ranks may divide the other"),
            Suspect("and-or", refused == unequal, "`or` stands where `and` belongs: it is refused as soon as one of "
                    "the two does not divide the other", "the docstring: when *neither* divides the other"),
        ], seen)  # fmt: skip
        self.fail("refuses-too-much", seen=seen, cause="a division that works was taken for one that does not",
                  look="the docstring: which two cases are refused?")  # fmt: skip

    def explain(self, got: dict) -> None:
        """Name the mistake in pairs of numbers: a rule that gives what came back in every division."""
        want = {case: split_kv_heads(*case) for case in got}
        wrong = [case for case in got if tuple(got[case]) != want[case]]
        if not wrong:
            return
        first = wrong[0]
        a, b = got[first]
        seen = f"{in_words(*first)}: you say {a} per GPU, {b} copies; it is {want[first][0]} and {want[first][1]}"

        def each(rule: Split) -> bool:
            return all(got[case][0] == rule(*case) for case in got)

        def copies(rule: Split) -> bool:
            return all(got[case] == (want[case][0], rule(*case)) for case in got)

        accuse(type(self), [
            Suspect("swapped", all(got[case] == want[case][::-1] for case in got), "the two numbers changed places",
                    "the return: heads per GPU first"),
            Suspect("no-head", each(lambda heads, kv, ranks: kv // ranks),
                    "num_kv_heads // ranks is 0 when there are more GPUs than KV heads",
                    "the smallest thing a GPU can keep: one head"),
            Suspect("all-everywhere", each(lambda heads, kv, ranks: kv // ranks if kv % ranks == 0 else kv),
                    "where there are more GPUs than KV heads, every GPU was given all of them",
                    "a GPU keeps the KV heads that its own query heads read: one, where GPUs share a KV head"),
            Suspect("all-everywhere", each(lambda heads, kv, ranks: kv), "every GPU was given every KV head",
                    "a GPU needs only the KV heads that its own query heads read"),
            Suspect("query-heads", each(lambda heads, kv, ranks: heads // ranks),
                    "the query heads of each GPU were counted", "the first number: KV heads"),
            Suspect("no-copies-yet", copies(lambda heads, kv, ranks: ranks // kv),
                    "ranks // num_kv_heads is 0 when there are fewer GPUs than KV heads",
                    "a head that is kept on one GPU has 1 copy"),
            Suspect("never-copied", copies(lambda heads, kv, ranks: 1), "heads were divided and never copied",
                    "GPUs times heads per GPU, over the heads there are"),
            Suspect("group-size", [copies(lambda heads, kv, ranks: heads // kv),
                                   copies(lambda heads, kv, ranks: heads // ranks)],
                    "query heads were taken for the copies",
                    "query heads that share a KV head may all be on one GPU: GPUs over KV heads"),
            Suspect("on-every-gpu", copies(lambda heads, kv, ranks: ranks), "each head was said to be on every GPU",
                    "GPUs times heads per GPU, over the heads there are"),
            Suspect("all-kept", copies(lambda heads, kv, ranks: max(1, kv // ranks) * ranks),
                    "what all GPUs keep together was not divided by the heads there are",
                    "copies of one head: GPUs x heads per GPU / KV heads"),
            Suspect("extra-copies", copies(lambda heads, kv, ranks: max(1, ranks // kv) - 1),
                    "the copies besides the first were counted", "on how many GPUs a head is kept: 1 at least"),
        ], seen)  # fmt: skip
        self.fail("count", seen=seen, cause="one of the two rules is another one: "
                  f"{len(got) - len(wrong)} of {len(got)} divisions came out right",
                  look="this division by hand: which KV heads do the query heads of GPU 0 read, and which other GPUs "
                  "keep them?")  # fmt: skip

    def refuse(self, answer: Callable, num_heads: int, num_kv_heads: int, ranks: int, what: str) -> None:
        """One division that cannot be."""
        try:
            got = answer(num_heads, num_kv_heads, ranks)
        except ValueError:
            return
        except (NotYet, NotImplementedError):
            raise
        except Exception as error:
            self.fail(
                "other-error",
                seen=f"{in_words(num_heads, num_kv_heads, ranks)}: {type(error).__name__}",
                cause="the two cases are refused with another error (an assert, for one), or by accident",
                look="raise ValueError(...)",
            )
        if isinstance(got, Exception) or (isinstance(got, type) and issubclass(got, Exception)):
            self.fail(
                "error-returned",
                seen=f"{in_words(num_heads, num_kv_heads, ranks)}: an error came back as a result: {got!r}",
                cause="`return` stands where `raise` belongs: the caller goes on with the error as if it were a result",
                look="raise ValueError(...)",
            )
        self.fail(
            "accepts-halves" if what == "KV heads" else "query-heads-unchecked",
            seen=f"{in_words(num_heads, num_kv_heads, ranks)}: {got} came back",
            cause=f"the {what} do not divide, and a head cannot be cut",
            look="ValueError, before anything is returned",
        )


def in_words(num_heads: int, num_kv_heads: int, ranks: int) -> str:
    """A case in words."""
    sizes = ((num_heads, "query head"), (num_kv_heads, "KV head"), (ranks, "GPU"))
    return ", ".join(f"{count} {name}{'s' * (count != 1)}" for count, name in sizes)
