"""04.5: KV heads over the GPUs of tensor parallelism."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from labkit.course.checks.numbers import check_whole
from labkit.course.checks.suspects import Suspect, accuse
from labkit.course.exercise import Exercise, NotYet
from labkit.labs.lab04.references import split_kv_heads

DIVIDE = (
    (64, 8, 1),
    (64, 8, 2),
    (64, 8, 8),
    (60, 12, 4),
    (64, 8, 16),
    (64, 8, 32),
    (28, 4, 14 * 2),
    (32, 1, 4),
    (6, 6, 6),
)
REFUSED = ((28, 4, 8, "query heads"), (60, 5, 7, "query heads"), (48, 6, 4, "KV heads"), (48, 8, 12, "KV heads"))


class SplitKvHeads(Exercise):
    """Where the saving ends."""

    id, title, minutes, difficulty = "04.5", "KV heads over many GPUs", 4, 2
    reference = staticmethod(split_kv_heads)
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
        "accepts-halves": "6 KV heads on 4 GPUs: which GPU would keep which?",
    }

    def examine(self, answer: Callable) -> None:
        """Divisions that fit, divisions that copy, and divisions that must be refused."""
        for num_heads, num_kv_heads, ranks in DIVIDE:
            self.divide(answer, num_heads, num_kv_heads, ranks)
        for num_heads, num_kv_heads, ranks, what in REFUSED:
            self.refuse(answer, num_heads, num_kv_heads, ranks, what)

    def divide(self, answer: Callable, num_heads: int, num_kv_heads: int, ranks: int) -> None:
        """One division that works."""
        where = f"{num_heads} query heads, {num_kv_heads} KV heads, {ranks} GPUs"
        want = split_kv_heads(num_heads, num_kv_heads, ranks)
        try:
            got = answer(num_heads, num_kv_heads, ranks)
        except ValueError as error:
            if "GPU" in str(error) or ranks > num_kv_heads:
                self.fail(
                    "refuses-copies" if ranks > num_kv_heads else "refuses-too-much",
                    seen=f"{where}: refused with {str(error)[:60]!r}",
                    cause="a division that works was taken for one that does not",
                    look="the docstring: which two cases are refused?",
                )
            raise
        except ZeroDivisionError:
            self.fail("no-head", seen=f"{where}: a division by zero", cause="num_kv_heads // ranks is 0 here",
                      look="what a GPU keeps when there are more GPUs than KV heads")  # fmt: skip
        got = self.call(lambda: got)
        if not isinstance(got, (tuple, list)) or len(got) != 2:
            self.fail("not-a-pair", seen=f"{where}: a {type(got).__name__} came back", cause="one number is missing",
                      look="the return: heads per GPU, copies")  # fmt: skip
        pair = tuple(check_whole(type(self), number, "a count of heads or of GPUs") for number in got)
        if pair != want:
            self.explain(pair, want, where, num_heads // num_kv_heads, num_kv_heads)

    def explain(self, got: tuple, want: tuple[int, int], where: str, group: int, num_kv_heads: int) -> None:
        """Name the mistake in a pair of numbers."""
        seen = f"{where}: you say {got[0]} per GPU, {got[1]} copies; it is {want[0]} and {want[1]}"
        accuse(type(self), [
            Suspect("swapped", got == want[::-1], "the two numbers changed places", "the return: heads per GPU first"),
            Suspect("no-head", got[0] == 0, "num_kv_heads // ranks is 0 when there are more GPUs than KV heads",
                    "the smallest thing a GPU can keep: one head"),
            Suspect("no-copies-yet", got[1] == 0, "ranks // num_kv_heads is 0 when there are fewer GPUs than KV heads",
                    "a head that is kept on one GPU has 1 copy"),
            Suspect("never-copied", got == (want[0], 1), "heads were divided and never copied",
                    "GPUs times heads per GPU, over the heads there are"),
            Suspect("group-size", got == (want[0], group), "num_queries_per_kv was taken for the copies",
                    "query heads that share a KV head may all be on one GPU: GPUs over KV heads"),
            Suspect("all-everywhere", got[0] == num_kv_heads, "every GPU was given every KV head",
                    "a GPU needs only the KV heads that its own query heads read"),
        ], seen)  # fmt: skip
        self.fail("count", seen=seen, cause="one of the two numbers is off",
                  look="GPUs x heads per GPU = KV heads x copies")  # fmt: skip

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
                seen=f"{num_heads} query heads, {num_kv_heads} KV heads, {ranks} GPUs: {type(error).__name__}",
                cause="the two cases are refused with another error (an assert, for one), or by accident",
                look="raise ValueError(...)",
            )
        self.fail(
            "accepts-halves" if what == "KV heads" else "query-heads-unchecked",
            seen=f"{num_heads} query heads, {num_kv_heads} KV heads, {ranks} GPUs: {got} came back",
            cause=f"the {what} do not divide, and a head cannot be cut",
            look="ValueError, before anything is returned",
        )
