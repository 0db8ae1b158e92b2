"""03.8: a sizing from end to end: what breaks first."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import ClassVar

from labkit import specs
from labkit.course.checks.hidden import hidden
from labkit.course.checks.suspects import Suspect, accuse
from labkit.course.exercise import Exercise
from labkit.labs.lab03.references import cache_bytes, capacity, count_weights, first_limit
from labkit.labs.lab03.slips import Slip, shape, suspects_of
from labkit.specs import GpuSpec, ModelSpec

ANSWERS = ("length", "weights", "cache", "time", "fits")
MODEL = shape(
    "6 layers, 4 KV heads, trained for 4,096 tokens", (6, 12, 4, 66, 790), mlp=2_050, vocabulary=9_001, trained=4_096
)
OTHER = shape(
    "5 layers, 1 KV head, trained for 70,000 tokens",
    (5, 9, 1, 30, 350),
    mlp=910,
    vocabulary=5_003,
    trained=70_000,
    tied_head=True,
)
WINDOWED = shape(
    "7 layers with a window of 131 tokens", (7, 6, 3, 42, 270), mlp=710, vocabulary=3_001, trained=16_384, window=131
)
EXACT = 2**39 / 1e9  # GB/s: a power of two in bytes, so that a time comes out without rounding
FACTORS = tuple(1.31**power for power in (*range(-14, 0), *range(1, 15)))  # from 1/44 to 44
Case = tuple[ModelSpec, GpuSpec, int, int, float]


def sizes(spec: ModelSpec, context: int) -> tuple[int, int]:
    """Bytes of the weights and of one request's cache, in 16 bits."""
    return 2 * count_weights(spec), cache_bytes(spec, context, 1, 2)


def table(spec: ModelSpec) -> int:
    """Bytes of the embedding, in 16 bits."""
    return 2 * spec.vocab_size * spec.hidden_size


def case(
    spec: ModelSpec, users: int, context: int, *, requests: float, share: float = 0.5, bandwidth: float = 901.0
) -> Case:
    """A case in which `requests` requests fit and a step of all users reads for `share` of the time allowed."""
    weights, request = sizes(spec, context)
    memory = weights + requests * request / 0.85
    gpu = replace(specs.gpu("h100-80gb"), memory_gib=memory / 2**30, bandwidth_gb_s=bandwidth)
    return spec, gpu, users, context, (weights + users * request) / gpu.bytes_per_s / share


@cache
def cases() -> list[Case]:
    """Each limit alone, just met and just missed; several at once; one user and many; two models."""
    return [
        case(MODEL, 13, 1_009, requests=13.01), case(MODEL, 13, 1_009, requests=12.99),
        case(MODEL, 13, 1_009, requests=13.99), case(MODEL, 1, 1_009, requests=1.01),
        case(MODEL, 13, 1_009, requests=1.01), case(MODEL, 13, 1_009, requests=0.99),
        case(MODEL, 1, 1_009, requests=0.99), case(MODEL, 13, 1_009, requests=-3.0),
        case(MODEL, 13, 1_009, requests=14.5, share=1.001), case(MODEL, 13, 1_009, requests=14.5, share=0.999),
        case(MODEL, 13, 1_009, requests=14.5, share=0.999, bandwidth=307.0),
        case(MODEL, 13, 1_009, requests=14.5, share=1.001, bandwidth=307.0),
        case(MODEL, 13, 1_009, requests=14.5, share=9.0), case(MODEL, 7, 1_009, requests=90, share=1.001),
        case(MODEL, 7, 1_009, requests=90, share=0.999), case(MODEL, 3, 4_096, requests=3.5, share=1.55),
        case(MODEL, 3, 4_096, requests=3.5), case(MODEL, 3, 4_097, requests=3.5), case(MODEL, 3, 4_095, requests=3.5),
        case(MODEL, 3, 4_097, requests=1.5, share=9.0), case(MODEL, 3, 4_097, requests=-1.0),
        case(MODEL, 3, 4_097, requests=3.5, share=9.0),
        case(MODEL, 13, 1_009, requests=4.5, share=9.0), case(MODEL, 13, 1_009, requests=0.5, share=9.0),
        case(OTHER, 17, 65_539, requests=17.2), case(OTHER, 17, 65_539, requests=16.8),
        case(OTHER, 17, 65_539, requests=17.2, share=3.0), case(OTHER, 17, 70_001, requests=17.2),
        case(OTHER, 17, 65_539, requests=0.9), case(OTHER, 500, 131, requests=500.5),
        case(OTHER, 500, 131, requests=500.5, share=1.01),
        case(MODEL, 13, 1_009, requests=14.5, share=1.0, bandwidth=EXACT),  # just in time
        case(MODEL, 13, 1_009, requests=14.5, share=1e-5, bandwidth=9.0),
        case(MODEL, 13, 1_009, requests=14.5, share=0.9e-3, bandwidth=9.0),
        case(MODEL, 7, 1_009, requests=90, share=0.3), case(MODEL, 13, 1_009, requests=14.5, share=0.6),
        case(WINDOWED, 19, 8_009, requests=19.5, share=0.95), case(WINDOWED, 19, 8_009, requests=18.5, share=0.95),
        case(WINDOWED, 19, 8_009, requests=19.5, share=0.0007), case(WINDOWED, 19, 8_009, requests=19.5, share=1.05),
        case(replace(MODEL, num_layers=3), 13, 1_009, requests=13.01),  # of one name with MODEL
        case(replace(MODEL, num_layers=9), 13, 1_009, requests=12.99),
        case(replace(MODEL, max_seq_len=512), 13, 1_009, requests=13.01),
        case(MODEL, 13, 1_009, requests=13.01),
        # Two mistakes come to the same here and there; over many sizes of memory and of time they do not.
        *(case(spec, 13, 1_009, requests=13 * factor) for spec in (MODEL, OTHER) for factor in FACTORS),
        *(case(spec, 13, 1_009, requests=14.5, share=factor) for spec in (MODEL, OTHER) for factor in FACTORS),
    ]  # fmt: skip


def some_case(chance: random.Random) -> Case:
    """Any of the limits, near it and not."""
    spec, users = chance.choice((MODEL, OTHER, WINDOWED)), chance.randint(1, 60)
    context = min(chance.randint(100, 6_000), spec.max_seq_len + chance.choice((0, 1)))
    requests = users * chance.uniform(0.9, 1.2) if chance.random() < 0.7 else chance.uniform(-2.0, 2.0)
    return case(spec, users, context, requests=requests, share=chance.uniform(0.3, 1.3))


def limit(
    *,
    length: Callable[[int, int, int], bool] = lambda context, trained, users: context > trained,
    fits: Callable[[int, int, int], float] = lambda memory, weights, request: capacity(memory, weights, request, 0.15),
    weights: Callable[[ModelSpec], int] = lambda spec: 2 * count_weights(spec),
    request: Callable[[ModelSpec, int, int], int] = lambda spec, context, users: cache_bytes(spec, context, 1, 2),
    few: Callable[[float, int], bool] = lambda fit, users: fit < users,
    none: Callable[[float, int, int, int], bool] = lambda fit, memory, weights, request: fit < 1,
    slow: Callable[[float, float, int], bool] = lambda seconds, tpot, users: seconds > tpot,
    read: Callable[..., float] = lambda spec, weights, request, users, fit, context: weights + users * request,
    order: tuple[str, ...] = ANSWERS[:4],
) -> Callable[..., str]:
    """The answer with one of its parts changed."""

    def formula(spec: ModelSpec, gpu: GpuSpec, users: int, context: int, tpot: float) -> str:
        stored, one = weights(spec), request(spec, context, users)
        fit = fits(gpu.memory_bytes, stored, one)
        found = {
            "length": length(context, spec.max_seq_len, users),
            "weights": few(fit, users) and none(fit, gpu.memory_bytes, stored, one),
            "cache": few(fit, users),
            "time": slow(read(spec, stored, one, users, fit, context) / gpu.bytes_per_s, tpot, users),
        }
        return next((name for name in order if found[name]), "fits")

    return formula


ORDER = "the docstring lists them in the order in which they are asked; the first that applies is the answer"
TIME = "one step gives every user a token; it reads the weights once and each user's K and V"
LIMIT_SLIPS = {
    "length": (
        Slip("length-ignored", lambda context, trained, users: False,
             "what the model was trained for sets no limit in your answer", "spec.max_seq_len"),
        Slip("boundary", lambda context, trained, users: context >= trained,
             "a request of exactly max_seq_len tokens was refused", "> or >=: the docstring says longer"),
        Slip("length-of-all", lambda context, trained, users: users * context > trained,
             "the tokens of all users together were compared with max_seq_len", "a request is one sequence"),
        Slip("length-reversed", lambda context, trained, users: context < trained,
             "requests shorter than max_seq_len were refused", "the comparison of context with spec.max_seq_len"),
    ),
    "few": (
        Slip("boundary", lambda fit, users: fit <= users,
             "exactly as many as there are users was taken for too few", "< or <=: the docstring says fewer"),
        Slip("users-ignored", lambda fit, users: fit < 1, "room for one request was taken for enough", "`users`"),
    ),
    "fits": (
        Slip("no-reserve", lambda memory, weights, request: capacity(memory, weights, request, 0.0),
             "nothing was kept free", "the reserve of 0.15"),
        Slip("reserve-of-all", lambda memory, weights, request: (memory * 0.85 - weights) // request,
             "the reserve was taken off the whole memory", "the reserve is a share of what the weights leave"),
        Slip("only-the-reserve", lambda memory, weights, request: capacity(memory, weights, request, 0.85),
             "only the reserve was filled", "capacity's reserve: the share that is kept free"),
        Slip("units", lambda memory, weights, request: capacity(memory * 10**9 // 2**30, weights, request, 0.15),
             "GiB were taken for GB", "gpu.memory_bytes is in bytes already"),
        Slip("weights-left-out", lambda memory, weights, request: capacity(memory, 0, request, 0.15),
             "the weights take no memory in your answer", "capacity's weight_bytes"),
    ),
    "weights": (
        Slip("weights-counted", count_weights, "the number of weights was taken for their bytes",
             "16 bits are two bytes per weight"),
        Slip("weights-counted", lambda spec: 4 * count_weights(spec), "the weights were given four bytes each",
             "16 bits are two bytes per weight"),
        Slip("weights-counted", lambda spec: 16 * count_weights(spec), "the weights were given sixteen bytes each",
             "16 bits are two bytes per weight"),
    ),
    "request": (
        Slip("cache-bytes", lambda spec, context, users: cache_bytes(spec, context, 1, 1),
             "numbers of the cache were counted, not their bytes", "16 bits are two bytes per number"),
        Slip("cache-bytes", lambda spec, context, users: cache_bytes(spec, context, 1, 4),
             "the cache was given four bytes a number", "16 bits are two bytes per number"),
        Slip("cache-bytes", lambda spec, context, users: cache_bytes(spec, context, 1, 16),
             "the cache was given sixteen bytes a number", "16 bits are two bytes per number"),
        Slip("batch-twice", lambda spec, context, users: cache_bytes(spec, context, users, 2),
             "the cache of all users was taken for that of one request", "batch: one request, or all of them?"),
        Slip("window-ignored", lambda spec, context, users: context * cache_bytes(spec, 1, 1, 2),
             "layers with a window were taken to keep every token", "cache_bytes for the whole request"),
        Slip("one-token", lambda spec, context, users: cache_bytes(spec, 1, 1, 2),
             "the cache of one token was taken for that of a request", "`context`"),
    ),
    "none": (
        Slip("weights-alone", lambda fit, memory, weights, request: weights >= memory,
             '"weights" came only where they alone do not fit', "the docstring: where not one request fits"),
        Slip("weights-alone", lambda fit, memory, weights, request: weights + request > memory,
             'nothing was kept free where "weights" was asked', "the docstring: with 0.15 kept free"),
        Slip("weights-alone", lambda fit, memory, weights, request: weights > 0.85 * memory,
             '"weights" came where they take more than 0.85 of memory', "the docstring: where not one request fits"),
        Slip("words-exchanged", lambda fit, memory, weights, request: fit >= 1,
             '"weights" and "cache" were exchanged', 'the docstring: "weights" where not one request fits'),
        Slip("order", lambda fit, memory, weights, request: False, '"weights" never comes', ORDER),
        Slip("order", lambda fit, memory, weights, request: True, '"cache" never comes', ORDER),
    ),
    "order": (
        Slip("order", ("weights", "cache", "time", "length"), "the length was asked about last", ORDER),
        Slip("order", ("weights", "cache", "length", "time"), "memory was asked first", ORDER),
        Slip("order", ("length", "time", "weights", "cache"), "time was asked before memory", ORDER),
        Slip("order", ("length", "weights", "time", "cache"), "time was asked before the cache", ORDER),
        Slip("order", ("time", "length", "weights", "cache"), "the time was asked first", ORDER),
        Slip("order", ("time", "cache", "weights", "length"), "the questions were asked in the opposite order", ORDER),
    ),
    "read": (
        Slip("time-of-one", lambda spec, weights, request, users, fit, context: weights + request,
             "a step was timed as that of one user", TIME),
        Slip("weights-per-request", lambda spec, weights, request, users, fit, context: users * (weights + request),
             "the weights were read once per user", TIME),
        Slip("cache-left-out", lambda spec, weights, request, users, fit, context: weights,
             "a step was timed as reading the weights alone", TIME),
        Slip("all-that-fit", lambda spec, weights, request, users, fit, context: weights + fit * request,
             "a step was timed with all users that fit", "`users`: as many as are asked for"),
        Slip("context-twice", lambda spec, weights, request, users, fit, context: weights + users * request * context,
             "the cache of a request was multiplied with its tokens again", "bytes_per_token: of one token"),
        Slip("users-twice", lambda spec, weights, request, users, fit, context: weights + users * users * request,
             "the users were multiplied in twice", TIME),
        Slip("weights-counted", lambda spec, weights, request, users, fit, context: weights / 2 + users * request,
             "a step was timed as reading one byte per weight", "16 bits are two bytes per weight"),
        Slip("embedding-left-out", lambda spec, weights, request, users, fit, context:
             weights - table(spec) + users * request,
             "the embedding was left out of what a step reads", "the text above the blank: all weights count as read"),
        Slip("embedding-left-out", lambda spec, weights, request, users, fit, context:
             weights - table(spec) * (not spec.tied_head) + users * request,
             "the embedding was left out of what a step reads", "the text above the blank: all weights count as read"),
        Slip("window-read", lambda spec, weights, request, users, fit, context:
             weights + users * context * cache_bytes(spec, 1, 1, 2),
             "a step was timed as reading K and V of every token, those included that a window has let go",
             "what a request holds, in cache_bytes; one token's bytes times the context is more"),
        Slip("weights-not-read", lambda spec, weights, request, users, fit, context: users * request,
             "a step was timed as reading the cache alone", TIME),
    ),
    "slow": (
        Slip("time-ignored", lambda seconds, tpot, users: False,
             "time sets no limit in your answer", "tpot and gpu.bytes_per_s"),
        Slip("always-late", lambda seconds, tpot, users: True, "whatever fits comes out as too slow",
             "the units on both sides of the comparison with tpot: seconds"),
        Slip("boundary", lambda seconds, tpot, users: seconds >= tpot,
             "a step that takes exactly tpot was refused", "> or >=: the docstring says more than"),
        Slip("per-request", lambda seconds, tpot, users: seconds / users > tpot,
             "the step's time was divided by the number of users", TIME),
        Slip("inverted", lambda seconds, tpot, users: 1 / seconds > tpot,
             "tokens per second were compared with seconds", "tpot: seconds per token"),
        Slip("inverted", lambda seconds, tpot, users: seconds < tpot,
             "a step that is short enough was refused", "the comparison of the floor with tpot"),
        Slip("milliseconds", lambda seconds, tpot, users: seconds * 1e3 > tpot,
             "milliseconds were compared with seconds", "tpot: seconds"),
        Slip("milliseconds", lambda seconds, tpot, users: seconds > tpot * 1e3,
             "seconds were compared with milliseconds", "tpot: seconds"),
    ),
}  # fmt: skip


class FirstLimit(Exercise):
    """Length, weights, cache, time: which of them fails first."""

    id, title, minutes, difficulty = "03.8", "What breaks first", 8, 3
    needs = ("03.1", "03.2", "03.3", "03.4")
    reference = staticmethod(first_limit)
    why = (
        "Each question is a function of this lab, and an early return asks the next one only where the one before "
        "was passed. The order makes the answer what has to change first."
    )
    hints = (
        "Four questions, one after the other; each is one of the functions you wrote, or a comparison. What does each "
        "of them need, and is that bytes or a count?",
        "weights = 2 x count_weights(spec); request = cache_bytes(spec, context, 1, 2). capacity(...) says how many "
        "requests fit: none, fewer than users, or enough. Only then ask for the time: tpot_floor's sum, of whole "
        "requests.",
        'if context > spec.max_seq_len: return "length"\n'
        "fit = capacity(gpu.memory_bytes, weights, request, 0.15)\n"
        'if fit == 0: return "weights"\nif fit < users: return "cache"\n'
        "step = (weights + users * request) / gpu.bytes_per_s\n"
        'return "time" if step > tpot else "fits"',
    )  # fmt: skip
    hints_for: ClassVar = {
        "length-ignored": "Memory may hold more tokens than the model ever saw in a row. Where does the spec say so?",
        "no-reserve": "Activations and the allocator need room too. How much did 03.3 keep free?",
        "weights-counted": "count_weights gives a count. How many bytes is each in 16 bits?",
        "weights-alone": "A GPU that holds the weights and nothing else: how many requests does it serve?",
        "boundary": "Exactly as many as allowed: is that more than allowed?",
        "reserve-of-all": "capacity from 03.3 keeps its reserve of what the weights leave. Is it in use?",
        "batch-twice": "capacity counts requests. What is it told that one of them takes?",
        "window-ignored": "03.1 asked each layer what it keeps. Does yours?",
        "window-read": "What a layer with a window has let go is not read. How many bytes does a request hold?",
        "embedding-left-out": "Section 4 left it out. What does the text above the blank say of weights?",
        "time-of-one": "Whose K and V does a step of the whole batch read?",
        "order": "Two limits may fail at once. Which one does the docstring ask about first?",
    }
    suspects: ClassVar = (
        Suspect("batch-twice", limit(request=lambda spec, context, users: cache_bytes(spec, context, users, 2),
                                     read=lambda spec, weights, request, users, fit, context: weights + request),
                "capacity was handed the cache of all users as that of one request", "capacity's request_bytes"),
        Suspect("remembered", lambda spec, *others: first_limit(MODEL if spec.name == MODEL.name else spec, *others),
                "the sizes of an earlier model of this name were used",
                "what outlives a call: a global, a default argument, a cache decorator"),
        *suspects_of(limit, LIMIT_SLIPS),
    )  # fmt: skip

    def examine(self, answer: Callable) -> None:
        """`cases`, in words."""
        listed = [*cases(), *hidden(some_case, count=60)]
        got = [self.call(answer, *each) for each in listed]
        for value in got:
            if value not in ANSWERS:
                self.fail(
                    "not-an-answer", seen=f"{value!r} came back", cause=f"the answer is one of {', '.join(ANSWERS)}",
                    look="the words in the docstring, as text",
                )  # fmt: skip
        wanted = [first_limit(*each) for each in listed]
        wrong = [index for index, pair in enumerate(zip(got, wanted, strict=True)) if pair[0] != pair[1]]
        if not wrong:
            return
        seen = f"{shown(listed[wrong[0]])}: {got[wrong[0]]!r} came back, and it is {wanted[wrong[0]]!r}"
        pairs = sorted(
            zip(listed, got, wanted, strict=True), key=lambda pair: pair[1] == pair[2]
        )  # the wrong ones first
        accuse(type(self), self.suspects, seen, fits=lambda formula: all(formula(*a) == b for a, b, _ in pairs))
        self.fail(
            "values",
            seen=seen,
            cause=f"the answer is another in {len(wrong)} of {len(listed)} cases",
            look="the four figures of this case, one at a time, and the order of the questions",
        )


def shown(each: Case) -> str:
    """A case by the figures that decide it."""
    spec, gpu, users, context, tpot = each
    weights, request = sizes(spec, context)
    fit = capacity(gpu.memory_bytes, weights, request, 0.15)
    step = (weights + users * request) / gpu.bytes_per_s
    return (
        f"{users:,} users of {context:,} tokens (trained for {spec.max_seq_len:,}), weights of {weights / 1e6:,.1f} MB "
        f"in {gpu.memory_bytes / 1e6:,.1f} MB, where {fit:,} requests fit; {step * 1e3:.4g} ms a step, "
        f"{tpot * 1e3:.4g} allowed"
    )
