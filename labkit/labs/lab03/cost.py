"""03.6: what a growing conversation costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import ClassVar

from labkit.course.checks.hidden import hidden
from labkit.course.checks.numbers import judge
from labkit.course.checks.suspects import Suspect
from labkit.course.exercise import Exercise
from labkit.labs.lab03.references import conversation_cost
from labkit.labs.lab03.slips import Slip, suspects_of


def bill(
    *,
    sent: Callable[[int, int, int, int], int] = lambda call, prefix, added, answer: (
        prefix + call * added + (call - 1) * answer
    ),
    cached: Callable[[int, list[int], int, int], int] = lambda call, sent, prefix, answer: (
        sent[call - 2] if call > 1 else 0
    ),
    answers: Callable[[int], float] = lambda calls: calls,
    calls: Callable[[int], Iterable[int]] = lambda count: range(1, count + 1),
    prices: Callable[[float, float, float], tuple[float, float, float]] = lambda new, out, old: (new, out, old),
    billed_twice: bool = False,
    step: Callable[[float], float] = lambda dollars: dollars,
    total: Callable[[float], float] = lambda dollars: dollars,
) -> Callable[..., float]:
    """The bill with another idea of what a call sends, what of it is cached, or which answers are paid for.

    sent: tokens of a call. cached: of those, read from the cache. answers: how many are paid for. calls: which are
    added up. prices: those of new input, answers and cached input. billed_twice: the cached part is new input as well.
    step: what is added up of a call's dollars. total: what is returned.
    """

    def formula(
        count: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
    ) -> float:
        new, out, old = prices(input_price, output_price, cached_price)
        each = [sent(call, prefix, added, answer) for call in range(1, count + 2)]
        bills = []
        for call in calls(count):
            kept = cached(call, each, prefix, answer)
            bills.append(kept * old + (each[call - 1] - (0 if billed_twice else kept)) * new)
        output = answers(count) * answer * out  # each call's share of it, before a call is rounded
        return total(sum(step((bill + output / len(bills)) / 1e6) for bill in bills) if bills else output / 1e6)

    return formula


def by_news(*, all_cached: bool) -> Callable[..., float]:
    """The bill of new parts: each call's new part as new input; and as cached, the new part of the call before, or all
    that this call sends."""

    def formula(
        count: int, prefix: int, added: int, answer: int, input_price: float, output_price: float, cached_price: float
    ) -> float:
        dollars, sent, cached = 0.0, 0, 0
        for call in range(count):
            new = answer + added if call else prefix + added
            sent += new
            old = (sent if call else 0) if all_cached else cached
            dollars += old * cached_price + new * input_price + answer * output_price
            cached = new
        return dollars / 1e6

    return formula


BEFORE = "what the call before had sent: all of it is cached, nothing else is"
ANSWER = "call 2 in the drawing above the blank: it sends a1 for the first time, and call 1 sends everything so"
PRICES = "the last two lines of the docstring: which price is whose"
STEP = "the sum: fractions of a cent add up, so nothing is rounded on the way"
BILL_SLIPS = {
    "sent": (
        Slip("answers-not-sent", lambda call, prefix, added, answer: prefix + call * added,
             "the answers are not sent again", "call 2: the answer to call 1 stands between the messages"),
        Slip("answers-too-early", lambda call, prefix, added, answer: prefix + call * (added + answer),
             "a call sends the answer that it is to bring", "call 1 sends no answer, call 2 one"),
        Slip("starts-at-nothing", lambda call, prefix, added, answer: prefix + (call - 1) * (added + answer),
             "the first call sends the prefix without a message", "range: the first call adds its message too"),
        Slip("history-not-sent", lambda call, prefix, added, answer: prefix + added,
             "each call sends the prefix and one message only", "call 3: it sends the messages of 1 and 2 as well"),
        Slip("history-not-sent", lambda call, prefix, added, answer: prefix + added + (answer if call > 1 else 0),
             "each call sends the prefix, the last answer and one message only", "call 3: it sends all before it"),
        Slip("prefix-once",
             lambda call, prefix, added, answer: (prefix if call == 1 else 0) + call * added + (call - 1) * answer,
             "only the first call sends the prefix", "a stateless server is sent everything at each call"),
        Slip("prefix-left-out", lambda call, prefix, added, answer: call * added + (call - 1) * answer,
             "the prefix is not sent", "`prefix`: every call begins with it"),
        Slip("prefix-every-time", lambda call, prefix, added, answer: call * (prefix + added) + (call - 1) * answer,
             "the prefix is sent once more at each call", "call 3 in the drawing: it has one prefix"),
        Slip("messages-left-out", lambda call, prefix, added, answer: prefix + (call - 1) * answer,
             "the messages are not sent", "`added`: each call brings one"),
    ),
    "cached": (
        Slip("first-call-cached", lambda call, sent, prefix, answer: sent[call - 2] if call > 1 else prefix,
             "the prefix has the cached price at the first call already", "call 1: nothing was sent before"),
        Slip("first-call-cached", lambda call, sent, prefix, answer: prefix,
             "the prefix has the cached price at the first call already, and the history never", BEFORE),
        Slip("answer-cached", lambda call, sent, prefix, answer: sent[call - 2] + answer if call > 1 else 0,
             "the last answer has the cached price, though no call had sent it yet", ANSWER),
        Slip("answer-cached", lambda call, sent, prefix, answer: sent[call - 2] + answer if call > 1 else prefix,
             "two things: the last answer has the cached price, and so has the prefix at the first call", ANSWER),
        Slip("only-the-prefix", lambda call, sent, prefix, answer: prefix if call > 1 else 0,
             "only the prefix is read from the cache", BEFORE),
        Slip("no-caching", lambda call, sent, prefix, answer: 0, "all input has the input price", BEFORE),
        Slip("all-cached", lambda call, sent, prefix, answer: sent[call - 1] if call > 1 else 0,
             "what a call sends for the first time has the cached price too", BEFORE),
        Slip("all-cached", lambda call, sent, prefix, answer: sent[call - 1], "all input has the cached price", BEFORE),
        Slip("prefix-not-cached", lambda call, sent, prefix, answer: sent[call - 2] - prefix if call > 1 else 0,
             "the prefix has the input price at every call", BEFORE),
        Slip("two-calls-late", lambda call, sent, prefix, answer: sent[call - 3] if call > 2 else 0,
             "what the call before sent is taken for new", BEFORE),
        Slip("news-cached", lambda call, sent, prefix, answer: sent[call - 2] - sent[call - 3] if call > 2 else (
                 sent[0] if call > 1 else 0), "of what the call before sent, only its new part is taken as cached",
             "`=` where `+=` was meant: what is cached grows with every call"),
        Slip("sum-cached", lambda call, sent, prefix, answer: sum(sent[: call - 1]),
             "the input of all calls before was added up as cached", "the input of the last call holds all of it"),
    ),
    "answers": (
        Slip("output-free", lambda calls: 0, "answers cost nothing", "output_price"),
        Slip("output-free", lambda calls: 1, "one answer is paid for", "every call brings an answer"),
        Slip("output-free", lambda calls: calls - 1, "the last answer is not paid for", "every call brings an answer"),
        Slip("output-too-often", lambda calls: calls + 1, "one answer too many is paid for", "range: how many calls"),
        Slip("output-too-often", lambda calls: calls * (calls + 1) / 2, "answers are paid for again at each call",
             "an answer is output once; when it is sent again it is input"),
    ),
    "calls": (
        Slip("one-call-fewer", lambda count: range(1, count), "the last call's input is not paid for",
             "range: it ends before its second number"),
        Slip("one-call-fewer", lambda count: range(2, count + 1), "the first call's input is not paid for",
             "range: where it begins"),
        Slip("one-call-more", lambda count: range(1, count + 2), "one call too many is paid for", "where range ends"),
        Slip("last-call-only", lambda count: range(count, count + 1), "only the last call's input is paid for",
             "`=` where `+=` was meant, or a sum outside the loop"),
    ),
    "prices": (
        Slip("prices-exchanged", lambda new, out, old: (out, new, old), "input and output price are exchanged", PRICES),
        Slip("prices-exchanged", lambda new, out, old: (old, out, new), "input and cached price are exchanged", PRICES),
        Slip("prices-exchanged", lambda new, out, old: (new, old, out), "output and cached are exchanged", PRICES),
        Slip("output-at-input-price", lambda new, out, old: (new, new, old), "answers have the input price", PRICES),
        Slip("cached-price", lambda new, out, old: (new, out, new - old),
             "the cached price was taken off the input price", "cached_price is what cached input costs"),
        Slip("cached-free", lambda new, out, old: (new, out, 0.0), "cached input costs nothing", "cached_price"),
        Slip("cached-twice", lambda new, out, old: (new, out, new * old),
             "the cached price was taken as a share of the input price", PRICES),
    ),
    "total": (
        Slip("rounded", lambda dollars: round(dollars, 2), "the bill was rounded to cents", "return it as it is"),
        Slip("rounded", lambda dollars: round(dollars, 3), "the bill was rounded", "return it as it is"),
        Slip("rounded", lambda dollars: round(dollars, 4), "the bill was rounded", "return it as it is"),
        Slip("rounded", int, "the bill was rounded to whole dollars", "return it as it is"),
    ),
    "step": (
        Slip("rounded", lambda dollars: round(dollars, 2), "each call was rounded to cents", STEP),
        Slip("rounded", lambda dollars: round(dollars, 3), "each call was rounded", STEP),
        Slip("rounded", lambda dollars: round(dollars, 4), "each call was rounded", STEP),
        Slip("rounded", lambda dollars: math.ceil(dollars * 100) / 100, "each call was rounded up to cents", STEP),
        Slip("rounded", lambda dollars: int(dollars * 100) / 100, "each call's fractions of a cent were cut off", STEP),
    ),
    "billed_twice": (
        Slip("billed-twice", True, "cached tokens are billed as new input as well",
             "the new part: what is sent less what was sent before"),
    ),
}  # fmt: skip


class ConversationCost(Exercise):
    """Every call sends everything so far."""

    id, title, minutes, difficulty = "03.6", "The bill of a conversation", 5, 3
    reference = staticmethod(conversation_cost)
    why = (
        "`before` is what the last call sent, and just that is cached. The last answer was written, but not sent: "
        "it is new input once, which `sent - before` counts by itself."
    )
    hints = (
        "Write down, for calls 1, 2 and 3, how many tokens are sent. How many of those did the call before send?",
        "Call i sends prefix + i x added + (i - 1) x answer. What call i - 1 sent has the cached price; the rest the "
        "input price. Each call pays for its answer.",
        "before = 0\nfor call in range(1, calls + 1):\n    sent = prefix + call*added + (call - 1)*answer\n"
        "    dollars += before*cached_price + (sent - before)*input_price + answer*output_price\n    before = sent",
    )
    hints_for: ClassVar = {
        "rounded": "A call may cost less than half a cent. What does a hundred of them cost?",
        "history-not-sent": "A stateless server knows nothing of call 3 when call 4 comes.",
        "first-call-cached": "Who put the prefix into the cache before the first call?",
        "only-the-prefix": "Call 3 sends the first question again. Had call 2 sent it?",
        "no-caching": "What call 3 sends begins with all that call 2 sent. Which price has that part?",
        "billed-twice": "A token is read from the cache or it is new. Which tokens are in both of your sums?",
        "answer-cached": "The model wrote the last answer. When was it first part of what you sent?",
        "answers-not-sent": "The model's own answer is part of what the next call sends.",
    }
    suspects: ClassVar = (
        Suspect("history-not-sent", (
                bill(sent=lambda call, prefix, added, answer: prefix + added,
                     cached=lambda call, sent, prefix, answer: prefix if call > 1 else 0),
                bill(sent=lambda call, prefix, added, answer: prefix + added,
                     cached=lambda call, sent, prefix, answer: sent[0] if call > 1 else 0)),
                "each call sends the prefix and one message only", "call 3: it sends the messages of 1 and 2 as well"),
        Suspect("news-cached", by_news(all_cached=False),
                "of what the call before sent, only its new part is taken as cached, not what stood before it",
                "`=` where `+=` was meant: what is cached grows with every call"),
        Suspect("billed-twice", by_news(all_cached=True),
                "all that a call sends has the cached price, and its new part the input price besides",
                "the cached part: what the call before had sent, and no more"),
        *suspects_of(bill, BILL_SLIPS),
    )  # fmt: skip

    def examine(self, answer: Callable) -> None:
        """One call, two, several and many; each size and price changed alone; parts that are nothing; one price."""
        cases = [
            (5, 1_009, 211, 89, 3.0, 17.0, 0.7), (1, 1_009, 211, 89, 3.0, 17.0, 0.7), (5, 499, 211, 89, 3.0, 17.0, 0.7),
            (5, 1_009, 107, 89, 3.0, 17.0, 0.7), (5, 1_009, 211, 31, 3.0, 17.0, 0.7),
            (5, 1_009, 211, 89, 5.0, 17.0, 0.7), (5, 1_009, 211, 89, 3.0, 13.0, 0.7),
            (5, 1_009, 211, 89, 3.0, 17.0, 0.3), (5, 1_009, 211, 89, 3.0, 17.0, 3.0),
            (2, 1_009, 211, 89, 3.0, 17.0, 0.7), (101, 10_007, 1_511, 503, 3, 15, 0.3),
            (5, 1_009, 211, 89, 3.0, 17.0, 0.7),
        ]  # fmt: skip
        cases += hidden(lambda chance: (
            chance.randint(1, 40), chance.randint(0, 20_000), chance.randint(0, 2_000), chance.randint(0, 2_000),
            chance.randint(10, 500) / 100, chance.randint(10, 2_000) / 100, chance.randint(0, 500) / 100,
        ))  # fmt: skip
        nothing = [
            (3, 0, 211, 89, 3.0, 17.0, 0.7), (20, 131_072, 0, 0, 3, 0, 0.3), (20, 10_007, 1_511, 0, 3, 15, 0.3),
            (20, 10_007, 0, 503, 3, 15, 0.3), (5, 1_009, 211, 89, 3.0, 17.0, 0.0),
        ]  # fmt: skip
        for some in (cases, nothing):
            judge(type(self), answer, conversation_cost, some, self.suspects, what="the bill in dollars")
