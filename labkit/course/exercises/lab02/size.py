"""02.6: the bytes of a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from labkit.course.exercise import Exercise
from labkit.course.exercises.lab02.references import (
    cache_bytes,
)
from labkit.specs import ModelSpec


class CacheBytes(Exercise):
    """Bytes from shapes."""

    id, title, minutes, difficulty = "02.6", "Bytes of a cache", 2, 1
    reference = staticmethod(cache_bytes)
    hints = (
        "Write down the shape of one layer's K for one token. How many numbers is that, and how often does it occur?",
        "K and V, in each layer, per KV head, head_dim numbers, for each token of each row.",
        "2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * bytes_per_element, times tokens, times batch",
    )
    hints_for: ClassVar = {
        "query-heads": "The cache holds K and V. How many heads of those does the model have?",
        "k-only": "A key without its value answers nothing.",
    }
    spec = ModelSpec(
        name="odd", num_layers=5, num_heads=21, num_kv_heads=3, head_dim=22, hidden_size=221, intermediate_size=13,
        vocab_size=17, max_seq_len=19,
    )  # fmt: skip

    def examine(self, answer: Callable) -> None:
        """A spec whose sizes share no factor, so that a wrong factor can be read off the ratio."""
        spec, tokens, batch, size = self.spec, 31, 37, 2
        got = self.call(answer, spec, tokens, batch, size)
        if isinstance(got, (bool, Tensor)) or not isinstance(got, (int, float)):
            self.fail(
                "not-a-number",
                seen=f"a {type(got).__name__} came back",
                cause="something other than a count of bytes was returned",
                look="the return: one int",
            )
        want = cache_bytes(spec, tokens, batch, size)
        if got != want:
            self.explain(got / want)
        one = self.call(answer, spec, 1, 1, 4)
        self.same(torch.tensor(one), torch.tensor(cache_bytes(spec, 1, 1, 4)), what="bytes of one token")

    def explain(self, ratio: float) -> None:
        """Name the factor that is missing or wrong."""
        spec = self.spec
        known = {
            "k-only": (1 / 2, "half the bytes", "K was counted and V was not"),
            "query-heads": (spec.num_heads / spec.num_kv_heads, "too many", "query heads were counted, not KV heads"),
            "group-size": (spec.num_heads // spec.num_kv_heads / spec.num_kv_heads, "too many",
                           "num_heads // num_kv_heads was taken for the number of KV heads"),
            "hidden-size": (spec.hidden_size / (spec.num_kv_heads * spec.head_dim), "too many",
                            "hidden_size was taken for num_kv_heads * head_dim, which holds only without GQA"),
            "one-layer": (1 / spec.num_layers, "too few", "one layer was counted"),
            "one-row": (1 / 37, "too few", "the batch was left out"),
            "bits": (8, "eight times too many", "bits were counted"),
        }  # fmt: skip
        for diagnosis, (factor, amount, cause) in known.items():
            if abs(ratio - factor) < 1e-9:
                self.fail(diagnosis, seen=f"{ratio:.3g} times the bytes: {amount}", cause=cause, look="the factors")
        self.fail(
            "factors",
            seen=f"{ratio:.3g} times the right number of bytes",
            cause="a factor is missing, doubled, or the result was scaled to kB or GiB",
            look="2, layers, KV heads, head_dim, tokens, batch, bytes per element: seven factors",
        )
