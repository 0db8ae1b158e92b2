"""What a conversation costs through an API that bills tokens, with prompt caching and without."""

from __future__ import annotations

from dataclasses import dataclass

from labkit.sizing.units import SizeError, check_count, check_flag, is_number, shown


@dataclass(frozen=True)
class Price:
    """Dollars per million tokens. cached: input that was read from a kept cache; written: input put into one.

    A provider that charges nothing for writing bills it as input: leave `written` out.
    """

    input: float
    output: float
    cached: float | None = None
    written: float | None = None

    def __post_init__(self) -> None:
        for name in ("input", "output", "cached", "written"):
            value = getattr(self, name)
            left_out = value is None and name in ("cached", "written")
            if not left_out and not (is_number(value) and 0 <= value <= 10_000):
                raise SizeError(
                    f"{name} is {shown(value)}: a price is in dollars per million tokens, $3 per million is 3"
                )


@dataclass(frozen=True)
class Bill:
    """Tokens of a whole conversation by the price they have, and the sum in dollars."""

    input_tokens: int
    cached_tokens: int
    written_tokens: int
    output_tokens: int
    dollars: float


def conversation_cost(
    price: Price,
    calls: int,
    *,
    prefix: int,
    added: int = 0,
    answer: int = 0,
    caching: bool = False,
) -> Bill:
    """The bill of `calls` calls that each send everything so far.

    Call i sends the prefix, i messages of `added` tokens and i - 1 answers of `answer` tokens. With caching, what the
    call before had sent is read from the cache, and the rest is written to it.
    """
    if not isinstance(price, Price):
        raise SizeError(f"price is a Price, as Price(input=3, output=15); got {shown(price)}")
    check_count("calls", calls)
    for name, value in (("prefix", prefix), ("added", added), ("answer", answer)):
        check_count(name, value, least=0)
    check_flag("caching", caching)
    if caching and price.cached is None:
        raise SizeError("caching needs a price for cached input: Price(input=3, output=15, cached=0.3)")
    first, last = prefix + added, prefix + calls * added + (calls - 1) * answer
    sent, output = calls * (first + last) // 2, calls * answer  # each call sends as much more as the one before it
    if not caching:
        return Bill(sent, 0, 0, output, (sent * price.input + output * price.output) / 1e6)
    cached = sent - last  # each token is written once
    cost = cached * (price.cached or 0.0) + last * (price.input if price.written is None else price.written)
    return Bill(0, cached, last, output, (cost + output * price.output) / 1e6)
