"""03.6: what a growing conversation costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from labkit.course.checks.numbers import judge
from labkit.course.checks.suspects import Suspect
from labkit.course.exercise import Exercise
from labkit.labs.lab03.references import conversation_cost


def bill(
    *,
    sent: Callable[[int, int, int, int], int] = lambda call, prefix, added, answer: (
        prefix + call * added + (call - 1) * answer
    ),
    cached: Callable[[int, list[int], int, int], int] = lambda call, sent, prefix, answer: (
        sent[call - 2] if call > 1 else 0
    ),
    answers: Callable[[int], int] = lambda calls: calls,
    billed_twice: bool = False,
) -> Callable[..., float]:
    """The bill with another idea of what a call sends, what of it is cached, or which answers are paid for.

    sent: tokens of a call. cached: of those, read from the cache. billed_twice: the cached part is new input as well.
    """

    def formula(calls: int, prefix: int, added: int, answer: int, new: float, out: float, old: float) -> float:
        each = [sent(call, prefix, added, answer) for call in range(1, calls + 1)]
        dollars = answers(calls) * answer * out
        for call in range(1, calls + 1):
            kept = cached(call, each, prefix, answer)
            dollars += kept * old + (each[call - 1] - (0 if billed_twice else kept)) * new
        return dollars / 1e6

    return formula


BEFORE = "what the call before had sent: all of it is cached, nothing else is"


ANSWER = "call 2 in the drawing above the blank: it sends a1 for the first time, and call 1 sends everything so"


class ConversationCost(Exercise):
    """Every call sends everything so far."""

    id, title, minutes, difficulty = "03.6", "The bill of a conversation", 5, 3
    reference = staticmethod(conversation_cost)
    hints = (
        "Write down, for calls 1, 2 and 3, how many tokens are sent. How many of those did the call before send?",
        "Call i sends prefix + i x added + (i - 1) x answer. What call i - 1 sent has the cached price; the rest the "
        "input price. Each call pays for its answer.",
        "before = 0\nfor call in range(1, calls + 1):\n    sent = prefix + call*added + (call - 1)*answer\n"
        "    dollars += before*cached_price + (sent - before)*input_price + answer*output_price\n    before = sent",
    )
    hints_for: ClassVar = {
        "history-not-sent": "A stateless server knows nothing of call 3 when call 4 comes.",
        "first-call-cached": "Who put the prefix into the cache before the first call?",
        "only-the-prefix": "Call 3 sends the first question again. Had call 2 sent it?",
        "answer-cached": "The model wrote the last answer. When was it first part of what you sent?",
        "answers-not-sent": "The model's own answer is part of what the next call sends.",
    }
    suspects: ClassVar = (
        Suspect("history-not-sent", bill(sent=lambda call, prefix, added, answer: prefix + added,
                                         cached=lambda call, sent, prefix, answer: prefix if call > 1 else 0),
                "each call sends the prefix and one message only", "call 3: it sends the messages of 1 and 2 as well"),
        Suspect("history-not-sent", bill(sent=lambda call, prefix, added, answer: prefix + added,
                                         cached=lambda call, sent, prefix, answer: sent[0] if call > 1 else 0),
                "each call sends the prefix and one message only", "call 3: it sends the messages of 1 and 2 as well"),
        Suspect("answers-not-sent", bill(sent=lambda call, prefix, added, answer: prefix + call * added),
                "the answers are not sent again", "call 2: the answer to call 1 stands between the messages"),
        Suspect("answers-too-early", bill(sent=lambda call, prefix, added, answer: prefix + call * (added + answer)),
                "a call sends the answer that it is to bring", "call 1 sends no answer, call 2 one"),
        Suspect("starts-at-nothing",
                bill(sent=lambda call, prefix, added, answer: prefix + (call - 1) * (added + answer)),
                "the first call sends the prefix without a message", "range: the first call adds its message too"),
        Suspect("first-call-cached",
                bill(cached=lambda call, sent, prefix, answer: sent[call - 2] if call > 1 else prefix),
                "the prefix has the cached price at the first call already", "call 1: nothing was sent before"),
        Suspect("answer-cached",
                bill(cached=lambda call, sent, prefix, answer: sent[call - 2] + answer if call > 1 else 0),
                "the last answer has the cached price, though no call had sent it yet", ANSWER),
        Suspect("answer-cached",
                bill(cached=lambda call, sent, prefix, answer: sent[call - 2] + answer if call > 1 else prefix),
                "two things: the last answer has the cached price, and so has the prefix at the first call", ANSWER),
        Suspect("first-call-cached", bill(cached=lambda call, sent, prefix, answer: prefix),
                "the prefix has the cached price at the first call already, and the history never", BEFORE),
        Suspect("only-the-prefix", bill(cached=lambda call, sent, prefix, answer: prefix if call > 1 else 0),
                "only the prefix is read from the cache", BEFORE),
        Suspect("no-caching", bill(cached=lambda call, sent, prefix, answer: 0),
                "all input has the input price", BEFORE),
        Suspect("all-cached", bill(cached=lambda call, sent, prefix, answer: sent[call - 1] if call > 1 else 0),
                "a call's new tokens have the cached price as well", BEFORE),
        Suspect("billed-twice", bill(billed_twice=True), "cached tokens are billed as new input as well",
                "the new part: what is sent less what was sent before"),
        Suspect("output-free", bill(answers=lambda calls: 0), "answers cost nothing", "output_price"),
        Suspect("output-free", bill(answers=lambda calls: 1), "one answer is paid for", "every call brings an answer"),
    )  # fmt: skip

    def examine(self, answer: Callable) -> None:
        """One call, several, each size and price changed alone, and all input at one price."""
        cases = [
            (5, 1_009, 211, 89, 3.0, 17.0, 0.7), (1, 1_009, 211, 89, 3.0, 17.0, 0.7), (5, 499, 211, 89, 3.0, 17.0, 0.7),
            (5, 1_009, 107, 89, 3.0, 17.0, 0.7), (5, 1_009, 211, 31, 3.0, 17.0, 0.7),
            (5, 1_009, 211, 89, 5.0, 17.0, 0.7), (5, 1_009, 211, 89, 3.0, 13.0, 0.7),
            (5, 1_009, 211, 89, 3.0, 17.0, 0.3), (5, 1_009, 211, 89, 3.0, 17.0, 3.0),
        ]  # fmt: skip
        judge(type(self), answer, conversation_cost, cases, self.suspects, what="the bill in dollars")
