"""03.4: the floor of a decode step. 03.5: the roofline."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from labkit.course.checks.numbers import judge
from labkit.course.checks.suspects import Suspect
from labkit.course.exercise import Exercise
from labkit.labs.lab03.references import attainable, tpot_floor


class TpotFloor(Exercise):
    """The time that reading weights and cache takes, which no decode step can be faster than."""

    id, title, minutes, difficulty = "03.4", "The floor of a decode step", 3, 2
    reference = staticmethod(tpot_floor)
    hints = (
        "One step gives each request one token. Which bytes must come from memory for it, and which of them twice?",
        "The weights are read once for the whole batch. Each request's K and V are its own. Then bytes over bytes per "
        "second.",
        "return (weight_bytes + batch * context * bytes_per_token) / bytes_per_s",
    )
    hints_for: ClassVar = {
        "weights-per-request": "A weight that has come from memory can be multiplied with every request's number.",
        "cache-shared": "May one request read another's keys?",
        "per-request": "The floor is of a step. Everybody in the batch waits for the whole of it.",
    }
    suspects: ClassVar = (
        Suspect("weights-per-request", lambda w, t, c, b, s: b * (w + c * t) / s,
                "the weights were counted once per request", "what `batch` multiplies: what each request has alone"),
        Suspect("cache-shared", lambda w, t, c, b, s: (w + c * t) / s,
                "one request's K and V were counted for all of the batch", "`batch`: each has K and V of its own"),
        Suspect("per-request", lambda w, t, c, b, s: (w + b * c * t) / s / b,
                "the step's time was divided by the number of requests",
                "what a user waits for: a step gives everybody one token, after all of it"),
        Suspect("weights-left-out", lambda w, t, c, b, s: b * c * t / s, "only the cache was counted",
                "a step multiplies with every weight, so it reads them all"),
        Suspect("cache-left-out", lambda w, t, c, b, s: w / s, "only the weights were counted",
                "attention reads all that is held, at each step"),
        Suspect("one-token", lambda w, t, c, b, s: (w + b * t) / s, "the K and V of the new token alone were counted",
                "`context`: attention reads every token held"),
        Suspect("inverted", lambda w, t, c, b, s: s / (w + b * c * t), "steps per second came out, not seconds",
                "which is divided by which: bytes / (bytes / s) = s"),
        Suspect("longest", lambda w, t, c, b, s: max(w, b * c * t) / s, "the larger of the two reads was taken",
                "both come through the same memory, one after the other: they add up"),
    )  # fmt: skip

    def examine(self, answer: Callable) -> None:
        """Sizes that share no factor, each changed alone once."""
        cases = [
            (7_000_003, 1_009, 211, 13, 3.1e6), (500_009, 1_009, 211, 13, 3.1e6), (7_000_003, 499, 211, 13, 3.1e6),
            (7_000_003, 1_009, 89, 13, 3.1e6), (7_000_003, 1_009, 211, 1, 3.1e6), (7_000_003, 1_009, 211, 13, 1.7e6),
        ]  # fmt: skip
        judge(type(self), answer, tpot_floor, cases, self.suspects, what="the step in seconds")


class Attainable(Exercise):
    """What arithmetic and memory each allow; the lower of the two roofs is what can be reached."""

    id, title, minutes, difficulty = "03.5", "The roofline", 3, 2
    reference = staticmethod(attainable)
    hints = (
        "If memory were the only limit, how many operations a second would the bytes that arrive feed?",
        "flops / nbytes operations for each byte, times bytes_per_s. That is one roof; the other does not depend on "
        "the work.",
        "return min(flop_per_s, flops / nbytes * bytes_per_s)",
    )
    hints_for: ClassVar = {
        "higher-roof": "Two limits hold at once. Which of them is felt?",
        "inverted": "Operations per byte, times bytes per second: do the units give operations per second?",
        "one-after-the-other": "While one tile is multiplied, the next is on its way.",
    }
    suspects: ClassVar = (
        Suspect("higher-roof", lambda f, n, p, b: max(p, f / n * b), "the higher of the two roofs was taken",
                "min or max? Work stays below both"),
        Suspect("inverted", lambda f, n, p, b: min(p, n / f * b), "bytes per operation were taken",
                "the units: (operations / byte) x (bytes / s) = operations / s"),
        Suspect("compute-only", lambda f, n, p, b: p, "memory sets no limit in your formula",
                "work that does few operations per byte waits for its bytes"),
        Suspect("memory-only", lambda f, n, p, b: f / n * b, "arithmetic sets no limit in your formula",
                "work that does many operations per byte waits for its arithmetic"),
        Suspect("one-after-the-other", lambda f, n, p, b: f / (f / p + n / b), "the two times were added",
                "a device reads and multiplies at the same time: the slower of the two decides"),
        Suspect("seconds", lambda f, n, p, b: max(f / p, n / b), "the time came out",
                "the docstring: operations per second"),
        Suspect("intensity", lambda f, n, p, b: f / n, "the intensity came out, operations per byte",
                "one step more: so many bytes come per second"),
        Suspect("bandwidth-roof", lambda f, n, p, b: min(p, b), "the intensity of the work does not occur",
                "the slanted roof: bytes per second times operations per byte"),
    )  # fmt: skip

    def examine(self, answer: Callable) -> None:
        """Left of the ridge, right of it, and either device rate changed alone."""
        cases = [
            (3e9, 2e9, 7e12, 1.1e11), (4e13, 2e9, 7e12, 1.1e11), (3e9, 2e9, 7e12, 1.3e11), (4e13, 2e9, 5e12, 1.1e11),
            (7e10, 5e9, 7e12, 1.1e11), (5e9, 13e9, 7e12, 1.1e11),
        ]  # fmt: skip
        judge(type(self), answer, attainable, cases, self.suspects, what="the rate in operations per second")
