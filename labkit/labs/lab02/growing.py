"""02.1: a cache that grows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from labkit.course.checks.caches import check_isolation, check_kinds, check_methods, check_seq_len, read_pair
from labkit.course.exercise import Exercise
from labkit.labs.lab02.material import new_tokens
from labkit.labs.lab02.references import GrowingCache
from labkit.ledger import ledger


class Growing(Exercise):
    """The cache that concatenates."""

    id, title, minutes, difficulty = "02.1", "A cache that grows", 5, 1
    reference = GrowingCache
    why = (
        "Dimension 2 counts tokens, and the old ones come first, so that an index in the cache is a position in the "
        "text. Joining in append, once per token, leaves read with nothing to do."
    )
    hints = (
        "Which of the four dimensions counts tokens? Nothing else may grow.",
        "The first append has nothing to join: keep k and v. Every later one joins old and new, old first.",
        "if self.seq_len == 0:\n    self.k, self.v = k, v\nelse:\n    self.k = torch.cat((self.k, k), dim=2)  # v too",
    )
    hints_for: ClassVar = {
        "wrong-dimension": "Shapes are [batch, num_kv_heads, tokens, head_dim]. Count to the tokens, from 0.",
        "shared-between-caches": "A name assigned in the class body is one for all instances. Assign in __init__.",
        "newest-only": "append must keep what was there: join it with what comes.",
        "read-copies": "Join when a token arrives, and keep the result. Then read has nothing left to do.",
        "new-before-old": "The order of the tensors in torch.cat is the order of the tokens.",
    }

    def examine(self, answer: Callable) -> None:
        """Appends of several lengths, read back exactly; then what reading moves, a second cache, another dtype."""
        cache, fresh = self.run(answer), self.run(answer)
        check_methods(type(self), cache)
        check_isolation(type(self), cache, fresh)  # what an earlier check left on the class shows here
        check_seq_len(type(self), cache, 0, "before the first append")
        parts = [new_tokens(count) for count in (5, 5, 1, 2)]
        for index, (k, v) in enumerate(parts):
            self.append(cache, k, v)
            if index == 0:
                check_seq_len(type(self), cache, k.shape[2], "after the first append")
            self.check_content(cache, parts[: index + 1])
            tokens = sum(k.shape[2] for k, _ in parts[: index + 1])
            check_seq_len(type(self), cache, tokens, f"after append {index + 1}")
        check_isolation(type(self), cache, fresh)
        self.check_reading(cache)
        for dtype in (torch.bfloat16, torch.float64):
            cache, (k, v) = self.run(answer), new_tokens(3, dtype=dtype)
            self.append(cache, k, v)
            self.append(cache, k, v)
            got = read_pair(type(self), cache)
            self.same(got[0], torch.cat((k, k), dim=2), what=f"K of a {dtype} cache")
            self.same(got[1], torch.cat((v, v), dim=2), what=f"V of a {dtype} cache")

    def append(self, cache: Any, k: Tensor, v: Tensor) -> None:
        """One append, whose arguments must come back unchanged."""
        kept = k.clone(), v.clone()
        self.run(lambda: cache.append(k, v))
        self.check_unchanged(kept, (k, v))

    def check_reading(self, cache: Any) -> None:
        """Fail when a second read, with nothing new appended, still moves what is held."""
        with ledger() as work:
            read_pair(type(self), cache)
        if work.bytes_copied:
            self.fail(
                "read-copies",
                seen=f"read() moved {work.bytes_copied:,} bytes though nothing had been appended since the last read",
                cause="the tokens are joined, or copied, each time they are read; attention reads at every step",
                look="read(): it only hands out what append has joined",
            )

    def check_content(self, cache: Any, parts: list[tuple[Tensor, Tensor]]) -> None:
        """Fail unless read() gives all parts in order."""
        k, v = read_pair(type(self), cache)
        want_k, want_v = (torch.cat([part[i] for part in parts], dim=2) for i in (0, 1))
        self.check_shape(k, v, want_k, parts)
        check_kinds(type(self), (k, v), (want_k, want_v), f"after append {len(parts)}")
        if len(parts) > 1 and torch.equal(k, torch.cat([part[0] for part in reversed(parts)], dim=2)):
            self.fail(
                "new-before-old",
                seen="the newest token comes first",
                cause="torch.cat got the new tensor before the old one",
                look="torch.cat((old, new)): position in the cache is position in the sequence",
            )
        self.same(k, want_k, what="K")
        self.same(v, want_v, what="V")

    def check_shape(self, k: Tensor, v: Tensor, want: Tensor, parts: list[tuple[Tensor, Tensor]]) -> None:
        """Say which dimension grew in place of the tokens'."""
        for name, x in (("K", k), ("V", v)):
            if len(parts) > 1 and x.shape == parts[-1][0].shape:
                self.fail(
                    "newest-only",
                    seen=f"after {len(parts)} appends {name} holds the last one only",
                    cause="append replaces what was held",
                    look="the second branch of append: join old and new",
                )
            for dim, label in ((0, "batch"), (1, "heads"), (3, "head_dim")):
                if x.dim() == 4 and x.shape[dim] > want.shape[dim]:
                    self.fail(
                        "wrong-dimension",
                        seen=f"{name} is {list(x.shape)}: {label} grew from {want.shape[dim]} to {x.shape[dim]}",
                        cause=f"the tensors were joined along dimension {dim}",
                        look="the dim of torch.cat: tokens are dimension 2",
                    )
