"""02.6: the bytes of a cache."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from math import prod
from typing import Any, ClassVar

from torch import Tensor

from labkit.course.exercise import Exercise
from labkit.labs.lab02.references import (
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
        "hard-coded": "The check asks about another model than the lab's. Where does a function learn a model's sizes?",
        "k-only": "A key without its value answers nothing.",
    }
    spec = ModelSpec(
        name="odd", num_layers=11, num_heads=35, num_kv_heads=7, head_dim=22, hidden_size=221, intermediate_size=13,
        vocab_size=17, max_seq_len=19,
    )  # fmt: skip
    tokens, batch = 31, 37

    def examine(self, answer: Callable) -> None:
        """A spec whose sizes share no factor, so that a wrong factor can be read off the ratio, in two dtypes."""
        sizes = (4, 2)
        got = [self.number(self.call(answer, self.spec, self.tokens, self.batch, size)) for size in sizes]
        want = [cache_bytes(self.spec, self.tokens, self.batch, size) for size in sizes]
        if got != want:
            ratios = got[0] / want[0], got[1] / want[1]
            self.explain(ratios, f"{got[0]:,.0f} bytes in float32; K and V of this model take {want[0]:,}")
        if not all(isinstance(value, int) for value in got):
            self.fail(
                "not-whole",
                seen=f"{got[0]!r} came back: the right number, as a float",
                cause="a division with `/`, or a factor written as a float, such as 2.0",
                look="the operators: a product of ints is an int, and a count of bytes is whole",
            )

    def number(self, got: Any) -> int | float:
        """`got`, when it is a number."""
        if isinstance(got, (bool, Tensor)) or not isinstance(got, (int, float)):
            self.fail(
                "not-a-number",
                seen=f"a {type(got).__name__} came back",
                cause="something other than a count of bytes was returned",
                look="the return: one int",
            )
        return got

    def explain(self, ratios: tuple[float, float], seen: str) -> None:
        """Name the factor that is missing or wrong. ratios: of float32, of float16."""
        spec = self.spec
        group = spec.num_heads // spec.num_kv_heads
        known = {
            "k-only": (1 / 2, "K was counted and V was not"),
            "query-heads": (group, "query heads were counted, not KV heads"),
            "group-size": (group / spec.num_kv_heads, "num_heads // num_kv_heads was taken for the number of KV heads"),
            "hidden-size": (spec.hidden_size / (spec.num_kv_heads * spec.head_dim),
                            "hidden_size was taken for num_kv_heads * head_dim, which holds only without GQA"),
            "one-layer": (1 / spec.num_layers, "one layer was counted"),
            "one-row": (1 / self.batch, "the batch was left out"),
            "one-token": (1 / self.tokens, "the number of tokens was left out"),
            "bits": (8, "bits were counted"),
            **{"units" if i == 0 else f"units {i}": (1 / unit, "the result was scaled to kB, MB, KiB or MiB")
               for i, unit in enumerate((2**10, 10**3, 2**20, 10**6, 2**30, 10**9))},
        }  # fmt: skip
        if ratios[0] != ratios[1]:
            self.explain_dtype(ratios, seen)
        for diagnosis, (factor, cause) in known.items():
            if abs(ratios[0] / factor - 1) < 1e-6:
                self.fail(diagnosis.split()[0], seen=seen, cause=cause, look="the factors, one by one")
        self.explain_constants(ratios[0], seen)
        self.fail(
            "factors",
            seen=seen,
            cause="a factor is missing, doubled or divided by",
            look="one layer's K for one token, written down as a shape; then what multiplies it",
        )

    def explain_dtype(self, ratios: tuple[float, float], seen: str) -> None:
        """The ratio depends on the dtype: its size was left out, or written down."""
        if abs(ratios[0] * 4 - 1) < 1e-9:
            self.fail(
                "elements",
                seen=seen,
                cause="the numbers were counted, not their bytes",
                look="the parameter that the result does not depend on",
            )
        self.fail(
            "fixed-dtype",
            seen="the result is the same for float32 and float16" if ratios[0] * 2 == ratios[1] else seen,
            cause="the bytes of one element were written down as a number",
            look="the last parameter: it says how many bytes an element takes",
        )

    def explain_constants(self, ratio: float, seen: str) -> None:
        """The sizes of the lab model in the place of those of `spec`."""
        lab = {"num_layers": 30, "num_kv_heads": 3, "head_dim": 64}
        for count in (1, 2, 3):
            for names in combinations(lab, count):
                if abs(ratio / prod(lab[name] / getattr(self.spec, name) for name in names) - 1) < 1e-9:
                    self.fail(
                        "hard-coded",
                        seen=f"{seen}. The lab model's own {' and '.join(names)} gives exactly this",
                        cause="a number of the lab model was written into the formula",
                        look="the parameter `spec`: every size of the model is one of its attributes",
                    )
