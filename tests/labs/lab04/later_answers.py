"""Answers to lab 04 that a check once let pass or explained wrongly, and their neighbours."""

from __future__ import annotations

from collections.abc import Callable

from labkit.labs.lab04.references import layer_elements, split_kv_heads
from tests.labs.answer import Wrong


def heads_by(unit):
    """As many heads as a quotient of floats says."""

    def answer(spec, tokens, batch, room, bytes_per_element):
        one = 2 * spec.num_layers * spec.head_dim * bytes_per_element * tokens * batch / unit
        most = int(room / unit / one)
        return max((n for n in range(1, spec.num_heads + 1) if spec.num_heads % n == 0 and n <= most), default=0)

    return answer


def returns_the_error(num_heads, num_kv_heads, ranks):
    try:
        return split_kv_heads(num_heads, num_kv_heads, ranks)
    except ValueError as error:
        return error


def returns_the_class(num_heads, num_kv_heads, ranks):
    try:
        return split_kv_heads(num_heads, num_kv_heads, ranks)
    except ValueError:
        return ValueError


def misspelt(kind):
    return lambda layer, seq_len: 0 if layer.kind == kind else layer_elements(layer, seq_len)


WRONG = [
    Wrong("04.2", "quotient-cut", "int() of a quotient of GB", heads_by(1e9)),
    Wrong("04.2", "quotient-cut", "int() of a quotient of MB", heads_by(1e6)),
    Wrong("04.5", "error-returned", "returns the error", returns_the_error),
    Wrong("04.5", "error-returned", "returns the error's class", returns_the_class),
    Wrong("04.3", "kind-not-met", "a typo in 'window'", misspelt("window")),
    Wrong("04.3", "kind-not-met", "a typo in 'full'", misspelt("full")),
    Wrong("04.3", "kind-not-met", "a typo in 'latent'", misspelt("latent")),
]

RIGHT: list[tuple[str, Callable]] = []
