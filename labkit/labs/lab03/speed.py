"""03.4: the floor of a decode step. 03.5: the roofline."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from labkit.course.checks.hidden import hidden
from labkit.course.checks.numbers import judge
from labkit.course.checks.suspects import Suspect
from labkit.course.exercise import Exercise
from labkit.labs.lab03.references import attainable, tpot_floor
from labkit.labs.lab03.slips import Slip, suspects_of


def step_time(
    *,
    weights: Callable[[float, float], float] = lambda w, b: w,
    cache: Callable[[float, float, float], float] = lambda t, c, b: t * c * b,
    time: Callable[[float, float, float, float], float] = lambda w, x, b, s: (w + x) / s,
) -> Callable[..., float]:
    """A step with another idea of which bytes are read, or of how long that takes."""
    return lambda w, t, c, b, s: time(weights(w, b), cache(t, c, b), b, s)


HELD = "`context`: attention reads every token held"
OWN = "`batch`: each request has K and V of its own"
STEP_SLIPS = {
    "weights": (
        Slip("weights-per-request", lambda w, b: b * w, "the weights were counted once per request",
             "what `batch` multiplies: what each request has alone"),
        Slip("weights-left-out", lambda w, b: 0, "only the cache was counted",
             "a step multiplies with every weight, so it reads them all"),
        Slip("weights-shared-out", lambda w, b: w / b, "the weights were divided among the requests",
             "a step reads the weights once, however many requests there are"),
    ),
    "cache": (
        Slip("cache-shared", lambda t, c, b: t * c, "one request's K and V were counted for all of the batch", OWN),
        Slip("cache-left-out", lambda t, c, b: 0, "only the weights were counted",
             "attention reads all that is held, at each step"),
        Slip("one-token", lambda t, c, b: t * b, "the K and V of the new token alone were counted", HELD),
        Slip("one-token", lambda t, c, b: t, "the K and V of one token were counted", HELD),
        Slip("tokens-not-bytes", lambda t, c, b: c * b, "tokens were counted, not their bytes", "`bytes_per_token`"),
        Slip("token-more", lambda t, c, b: t * (c + 1) * b, "one token more than `context` was counted", HELD),
        Slip("token-more", lambda t, c, b: t * (c - 1) * b, "one token fewer than `context` was counted", HELD),
        Slip("k-and-v-twice", lambda t, c, b: 2 * t * c * b, "K and V were counted twice",
             "bytes_per_token holds K and V of all layers already"),
        Slip("context-plus-batch", lambda t, c, b: t * (c + b), "context and batch were added", OWN),
        Slip("quadratic", lambda t, c, b: t * c * c * b, "each token held was read once per token held",
             "a step has one new token per request; it reads what is held once"),
        Slip("half-the-context", lambda t, c, b: t * c / 2 * b, "half of what is held was counted",
             "the step reads all `context` tokens; that they came one by one is past"),
        Slip("cache-shared", lambda t, c, b: t * c / b, "one request's K and V were divided by the batch", OWN),
        Slip("quadratic", lambda t, c, b: t * c * (c + 1) / 2 * b, "all steps up to this one were counted", "one step"),
        Slip("batch-squared", lambda t, c, b: t * c * b * b, "`batch` was multiplied in twice", OWN),
    ),
    "time": (
        Slip("per-request", lambda w, x, b, s: (w + x) / s / b, "the step's time was divided by the number of requests",
             "what a user waits for: a step gives everybody one token, after all of it"),
        Slip("batch-times", lambda w, x, b, s: (w + x) / s * b, "the time was multiplied by the number of requests",
             "a step serves all requests at once"),
        Slip("inverted", lambda w, x, b, s: s / (w + x), "steps per second came out, not seconds",
             "which is divided by which: bytes / (bytes / s) = s"),
        Slip("inverted", lambda w, x, b, s: b * s / (w + x), "tokens per second came out, not seconds",
             "which is divided by which: bytes / (bytes / s) = s"),
        Slip("multiplied", lambda w, x, b, s: (w + x) * s, "bytes were multiplied with bytes per second",
             "which is divided by which: bytes / (bytes / s) = s"),
        Slip("bytes", lambda w, x, b, s: w + x, "bytes came out, not seconds", "`bytes_per_s`"),
        Slip("longest", lambda w, x, b, s: max(w, x) / s, "the larger of the two reads was taken",
             "both come through the same memory, one after the other: they add up"),
        Slip("brackets", lambda w, x, b, s: w + x / s, "only the cache was divided by bytes_per_s",
             "the brackets: a quotient comes before a sum"),
        Slip("brackets", lambda w, x, b, s: w / s + x, "only the weights were divided by bytes_per_s",
             "the brackets: a quotient comes before a sum"),
        Slip("difference", lambda w, x, b, s: abs(w - x) / s, "the two reads were subtracted", "both take time"),
        Slip("rounded", lambda w, x, b, s: (w + x) // s, "the seconds were rounded down", "/ and not //"),
    ),
}  # fmt: skip


def roof(
    *,
    slanted: Callable[[float, float, float], float] = lambda f, n, b: f / n * b,
    both: Callable[..., float] = lambda flat, slanted, f, n, b: min(flat, slanted),
) -> Callable[..., float]:
    """The roofline with another idea of what memory allows, or of what two limits come to."""
    return lambda f, n, p, b: both(p, slanted(f, n, b), f, n, b)


UNITS = "the units: (operations / byte) x (bytes / s) = operations / s"
SAME_TIME = "a device reads and multiplies at the same time: the slower of the two decides"
ROOF_SLIPS = {
    "slanted": (
        Slip("inverted", lambda f, n, b: n / f * b, "bytes per operation were taken", UNITS),
        Slip("bandwidth-roof", lambda f, n, b: b, "the intensity of the work does not occur",
             "the slanted roof: bytes per second times operations per byte"),
        Slip("bytes-left-out", lambda f, n, b: f * b, "the bytes that the work moves do not occur", UNITS),
        Slip("intensity", lambda f, n, b: f / n, "the bandwidth does not occur", UNITS),
        Slip("intensity", lambda f, n, b: f / n / b, "the intensity was divided by the bandwidth", UNITS),
        Slip("bytes-for-work", lambda f, n, b: n * b, "the bytes were taken for the intensity", UNITS),
        Slip("seconds-for-rate", lambda f, n, b: n / b, "the time for the bytes was taken for a rate", UNITS),
        Slip("bytes-multiplied", lambda f, n, b: f * n / b, "operations were multiplied with bytes", UNITS),
        Slip("bytes-multiplied", lambda f, n, b: f * n * b, "operations were multiplied with bytes", UNITS),
        Slip("two-per-byte", lambda f, n, b: 2 * f / n * b, "the operations were counted twice",
             "flops are operations already: a multiplication and an addition are two of them"),
    ),
    "both": (
        Slip("peaks-exchanged", lambda flat, slanted, f, n, b: min(b, f / n * flat),
             "the two rates of the device were exchanged", UNITS),
        Slip("higher-roof", lambda flat, slanted, f, n, b: max(flat, slanted), "the higher of the two roofs was taken",
             "min or max? Work stays below both"),
        Slip("compute-only", lambda flat, slanted, f, n, b: flat, "memory sets no limit in your formula",
             "work that does few operations per byte waits for its bytes"),
        Slip("memory-only", lambda flat, slanted, f, n, b: slanted, "arithmetic sets no limit in your formula",
             "work that does many operations per byte waits for its arithmetic"),
        Slip("one-after-the-other", lambda flat, slanted, f, n, b: 1 / (1 / flat + 1 / slanted),
             "the two times were added", SAME_TIME),
        Slip("added", lambda flat, slanted, f, n, b: flat + slanted, "the two roofs were added", SAME_TIME),
        Slip("mean", lambda flat, slanted, f, n, b: (flat * slanted) ** 0.5, "a mean of them was taken", SAME_TIME),
        Slip("mean", lambda flat, slanted, f, n, b: (flat + slanted) / 2, "the mean of the roofs was taken", SAME_TIME),
        Slip("seconds", lambda flat, slanted, f, n, b: f / min(flat, slanted), "the time came out",
             "the docstring: operations per second"),
        Slip("seconds", lambda flat, slanted, f, n, b: f / max(flat, slanted), "the shorter of the two times came out",
             "the docstring: operations per second"),
        Slip("share", lambda flat, slanted, f, n, b: 100 * min(1.0, slanted / flat), "a percentage came out",
             "the docstring: operations per second"),
        Slip("share", lambda flat, slanted, f, n, b: min(1.0, slanted / flat), "a share of the peak came out",
             "the docstring: operations per second"),
        Slip("intensity", lambda flat, slanted, f, n, b: f / n, "the intensity came out, operations per byte",
             "one step more: so many bytes come per second"),
        Slip("intensity", lambda flat, slanted, f, n, b: min(flat, f / n), "the bandwidth does not occur", UNITS),
        Slip("ridge", lambda flat, slanted, f, n, b: flat / b, "the ridge came out", "the docstring: a rate"),
    ),
}  # fmt: skip


class TpotFloor(Exercise):
    """The time that reading weights and cache takes, which no decode step can be faster than."""

    id, title, minutes, difficulty = "03.4", "The floor of a decode step", 3, 2
    reference = staticmethod(tpot_floor)
    why = (
        "One reading of the weights serves the whole batch; K and V are each request's own, and all of them are "
        "read. All bytes come through the same memory, so they add up before they are divided by its rate."
    )
    hints = (
        "One step gives each request one token. Which bytes must come from memory for it, once for all or "
        "anew for each?",
        "The weights are read once for the whole batch. Each request's K and V are its own. Then bytes over bytes per "
        "second.",
        "return (weight_bytes + batch * context * bytes_per_token) / bytes_per_s",
    )
    hints_for: ClassVar = {
        "weights-per-request": "A weight that has come from memory can be multiplied with every request's number.",
        "one-token": "Which keys does the new token's query meet?",
        "inverted": "A request waits longer when there are more bytes. Does yours?",
        "k-and-v-twice": "bytes_per_token came from cache_bytes of one token. What did that count?",
        "cache-shared": "May one request read another's keys?",
        "per-request": "The floor is of a step. Everybody in the batch waits for the whole of it.",
    }
    suspects: ClassVar = tuple(suspects_of(step_time, STEP_SLIPS))

    def examine(self, answer: Callable) -> None:
        """Sizes that share no factor, each changed alone once; one request, nothing held, whole and large numbers."""
        cases = [
            (7_000_003, 1_009, 211, 13, 3.1e4), (500_009, 1_009, 211, 13, 3.1e4), (7_000_003, 499, 211, 13, 3.1e4),
            (7_000_003, 1_009, 89, 13, 3.1e4), (7_000_003, 1_009, 211, 1, 3.1e4), (7_000_003, 1_009, 211, 13, 1.7e4),
            (15_231_233_024, 57_344, 131_072, 7, 3.35e12), (7_000_003, 1_009, 1, 1, 3.1e4),
            (7_000_003, 1_009, 211, 13, 3.1e4),
        ]  # fmt: skip
        cases += hidden(lambda chance: (
            chance.randint(10**6, 10**10), chance.randint(1, 10**6), chance.randint(1, 10**5), chance.randint(1, 500),
            chance.uniform(1e4, 1e13),
        ))  # fmt: skip
        nothing = [(7_000_003, 1_009, 0, 13, 3.1e4), (0, 1_009, 211, 13, 31_000)]
        for some in (cases, nothing):
            judge(type(self), answer, tpot_floor, some, self.suspects, what="the step in seconds")


class Attainable(Exercise):
    """What arithmetic and memory each allow; the lower of the two roofs is what can be reached."""

    id, title, minutes, difficulty = "03.5", "The roofline", 3, 2
    reference = staticmethod(attainable)
    why = (
        "Bytes that arrive feed flops / nbytes operations each, so memory allows that many times bytes_per_s. "
        "Both limits hold at once, and the lower one is felt."
    )
    hints = (
        "If memory were the only limit, how many operations a second would the bytes that arrive feed?",
        "flops / nbytes operations for each byte, times bytes_per_s. That is one roof; the other does not depend on "
        "the work.",
        "return min(flop_per_s, flops / nbytes * bytes_per_s)",
    )
    hints_for: ClassVar = {
        "higher-roof": "Two limits hold at once. Which of them is felt?",
        "inverted": "Operations per byte, times bytes per second: do the units give operations per second?",
        "memory-only": "A prompt of a million tokens: does its rate grow without end?",
        "compute-only": "A step that reads everything for one token: does it reach the peak?",
        "one-after-the-other": "While one tile is multiplied, the next is on its way.",
    }
    suspects: ClassVar = (
        Suspect("operations-as-rate", (lambda f, n, p, b: min(f, p, f / n * b), lambda f, n, p, b: min(f, p)),
                "the operations themselves were taken for a rate, and set a limit",
                "the units of what min compares: each in operations per second"),
        Suspect("threshold", (lambda f, n, p, b: p if f > n else f / n * b, lambda f, n, p, b: p if f >= n else
                f / n * b), "arithmetic was taken for the limit as soon as there is more than one operation per byte",
                "the ridge: flop_per_s / bytes_per_s operations per byte, not 1"),
        *suspects_of(roof, ROOF_SLIPS),
    )  # fmt: skip

    def examine(self, answer: Callable) -> None:
        """Left of the ridge, on it and right of it, near and far; every argument changed alone; whole numbers."""
        cases = [
            (3e9, 2e9, 7e12, 1.1e11), (4e13, 2e9, 7e12, 1.1e11), (3e9, 2e9, 7e12, 1.3e11), (4e13, 2e9, 5e12, 1.1e11),
            (7e10, 5e9, 7e12, 1.1e11), (5e9, 13e9, 7e12, 1.1e11), (3e9, 2.5e9, 7e12, 1.1e11), (5e9, 2e9, 7e12, 1.1e11),
            (640, 10, 6_400, 100), (63, 1, 6_400, 100), (6, 3, 6_400, 100), (1, 1_003, 6_400, 100), (65, 1, 6_400, 100),
            (3e9, 2e9, 7e12, 1.1e11),
        ]  # fmt: skip
        cases += hidden(lambda chance: (
            10 ** chance.uniform(6, 14), 10 ** chance.uniform(6, 11), 10 ** chance.uniform(9, 15),
            10 ** chance.uniform(9, 13),
        ))  # fmt: skip
        judge(type(self), answer, attainable, cases, self.suspects, what="the rate in operations per second")
