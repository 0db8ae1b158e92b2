"""02.1: a cache that grows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import ClassVar

import torch
from torch import Tensor

from labkit.course.checks.caches import (
    LAYOUTS,
    Beside,
    Pair,
    Sizes,
    check_isolation,
    check_read_is_free,
    effort_of_append,
    read_pair,
    run_script,
    same_numbers,
    token_bytes,
)
from labkit.course.checks.effort import Effort, effort_of
from labkit.course.checks.held import bytes_behind, tensors_behind
from labkit.course.checks.suspects import Suspect, recognise
from labkit.course.exercise import Exercise
from labkit.labs.lab02.references import GrowingCache

DIMENSIONS = {0: "batch", 1: "heads", 3: "head_dim"}


class Growing(Exercise):
    """The cache that concatenates."""

    id, title, minutes, difficulty = "02.1", "A cache that grows", 5, 1
    reference = GrowingCache
    why = (
        "The first append keeps k and v as they come, so shapes, dtype and device are theirs. Every later one joins "
        "old before new along dimension 2, so that a place in the cache is a position in the text."
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
        "first-only": "torch.cat changes neither of its tensors: it returns a new one. Where does that go?",
        "nothing-stored": "At the first append there is nothing to join with. Then k and v are all that is held.",
        "read-copies": "Join when a token arrives, and keep the result. Then read has nothing left to do.",
        "joined-in-read": "Join when a token arrives: what comes then, and not the next time somebody reads.",
        "new-before-old": "The order of the tensors in torch.cat is the order of the tokens.",
        "promoted": "The first append need not join anything: keep k and v as they come, in their own dtype.",
    }

    def examine(self, answer: Callable) -> None:
        """Appends one by one, then several caches in turn, a long one, other dtypes; what is read costs and holds."""
        make = lambda sizes: answer()  # noqa: E731
        cache, fresh = Beside(type(self), make, Sizes(), explain), Beside(type(self), make, Sizes(), explain)
        check_isolation(type(self), cache.cache, fresh.cache)  # what an earlier check left on the class shows here
        for count in (7, 7, 1, 2, 1):
            cache.add(count)
        check_isolation(type(self), cache.cache, fresh.cache)
        check_read_is_free(type(self), cache)
        for dtype in (torch.float64, torch.bfloat16):
            self.check_dtype(make, dtype)
        shapes = [Sizes(), Sizes(2, 3, 4, torch.bfloat16), Sizes(1, 2, 8, torch.float64), Sizes(4, 1, 10)]
        run_script(type(self), make, shapes, explain=explain)
        moved = self.check_cost(make, Sizes(2, 1, 3), (1500, 1, 700, 1, 300))
        moved += self.check_cost(make, Sizes(1, 1, 1, torch.bfloat16), (5000, 1))
        for each in moved:
            self.check_moved(*each)

    def check_dtype(self, make: Callable, dtype: torch.dtype) -> None:
        """What is read has the dtype of what was appended."""
        beside = Beside(type(self), make, Sizes(dtype=dtype), explain)
        k, v = beside.sizes.tokens(3)
        self.run(lambda: beside.cache.append(k, v))
        both = beside.cache.read()
        for name, x in zip("KV", both, strict=True):
            if dtype == torch.bfloat16 and x.dtype == torch.float32:  # float64 came back as float64 before
                self.fail(
                    "promoted",
                    seen=f"bfloat16 went in, float32 came out ({name}); float64 came out as float64",
                    cause="what comes was joined with a float32 tensor, such as torch.empty(0): the result has the "
                    "wider of the two dtypes",
                    look="what is held before the first append: nothing, so that the first k and v stay as they are",
                )
            self.like(x, k, what=f"{name} of a {str(dtype).removeprefix('torch.')} cache")

    def check_cost(self, make: Callable, sizes: Sizes, counts: Sequence[int]) -> list[tuple[str, int, float]]:
        """Thousands of tokens, what holding them takes, and what reading them costs. Returns what each append moved:
        when, its tokens, and bytes read and written over bytes held."""
        beside = Beside(type(self), make, sizes, explain)
        ratios, moved = [], []
        for count in counts:
            effort = effort_of_append(type(self), beside, count, LAYOUTS[count == 1])
            first_read = effort_of(lambda: read_pair(type(self), beside.cache))
            beside.compare()
            bytes_moved = effort.touched - effort.filled  # memory that is set to zero holds no token yet
            moved.append((beside.when, count, bytes_moved / sum(x.nbytes for x in beside.want())))
            check_read_is_free(type(self), beside)
            self.check_first_read(beside, first_read)
            ratios.append(bytes_behind(beside.cache) / sum(x.nbytes for x in beside.want()))
        if len(counts) > 2 and min(ratios[1:]) > 1.9:  # memory that grows in steps is full now and then
            self.fail(
                "held-twice",
                seen=f"{beside.when}: the cache keeps {min(ratios[1:]):.1f} times the bytes of its K and V at least",
                cause="pieces are kept beside what was joined from them, or more memory is held than there are tokens",
                look="everything that append and read assign to self: K and V, once",
            )
        return moved

    def check_first_read(self, beside: Beside, effort: Effort) -> None:
        """The first read after an append moves nothing either."""
        if effort.made >= token_bytes(beside):
            self.fail(
                "joined-in-read",
                seen=f"{beside.when}: the first read() after it made {effort.made:,} bytes of new tensors; the next "
                "made none",
                cause="append keeps pieces, and the first read joins them: at every step one append is followed by one "
                "read",
                look="append: join there, and read() hands out what is stored",
            )

    def check_moved(self, when: str, count: int, times: float) -> None:
        """An append reads what it joins and writes it once."""
        if times > 3.5:
            self.fail(
                "moved-again",
                seen=f"{when}: the last append read and wrote {times:,.1f} times the bytes of all K and V held; "
                "joining them once takes 2",
                cause="tokens are joined one at a time, and each cat copies all that is held"
                if count > 1 and times > 10
                else "what was joined is copied once more: by clone, contiguous, a second cat, or through a list",
                look="append: one torch.cat for K and one for V, whatever the number of tokens that come",
            )


def explain(beside: Beside, got: Pair, want: Pair) -> None:
    """Name what gives the tokens that were read."""
    for place, (name, x) in enumerate(zip("KV", got, strict=True)):
        parts = [part[place] for part in beside.parts]
        if same_numbers(x, want[place]):
            continue
        kept = max((tensor.numel() for tensor in tensors_behind(beside.cache)), default=0) >= want[place].numel()
        suspects = list(mistakes(name, x, parts, beside.when, kept=kept))
        recognise(beside.exercise, x, suspects, tolerance=0.0)


def mistakes(name: str, x: Tensor, parts: list[Tensor], when: str, *, kept: bool) -> Iterator[Suspect]:
    """What people hold in place of all parts in order. kept: whether the cache has a tensor as large as all of them."""
    yield Suspect("newest-only", parts[-1], "append replaces what was held", "the second branch of append: join old "
                  "and new", f"{when}, {name} holds the last of them only")  # fmt: skip
    yield Suspect("first-only", parts[0], "what torch.cat returned was not stored, or a later append does nothing",
                  "the second branch of append: self.k = torch.cat(...), and v alike",
                  f"{when}, {name} holds the first of them only")  # fmt: skip
    yield Suspect("first-lost", torch.cat(parts[1:], dim=2) if parts[1:] else [], "the first append stored nothing",
                  "the first append: keep k and v as they come", f"{when}, {name} lacks the first of them")  # fmt: skip
    yield Suspect("last-token", torch.cat(parts, dim=2)[:, :, -1:],
                  "read() hands out the last token alone" if kept else "append keeps the last token alone",
                  "read(): everything that is held" if kept else "append: all tokens that come are kept, behind those "
                  "held", f"{when}, read() gives {name} of the last token")  # fmt: skip
    whole = torch.cat(parts, dim=2)
    twice = [torch.cat((parts[0], *parts), dim=2), torch.cat([part for part in parts for _ in range(2)], dim=2)]
    yield Suspect("appended-twice", twice, "what an append brings is stored twice, one behind the other",
                  "append: the first k and v are kept, later ones are joined to what is held, each once",
                  f"{when}, read() gives tokens of {name} twice")  # fmt: skip
    if x.dim() == 4 and x.shape[2] > whole.shape[2] and same_numbers(x[:, :, : whole.shape[2]], whole):
        yield Suspect("reads-slack", x, "all of the memory is returned, the unwritten part with it",
                      "read(): a slice up to seq_len",
                      f"{when}, read() gives {name} of {x.shape[2]} tokens")  # fmt: skip
    for dim, noun in ((0, "row of the batch"), (1, "head")):
        for place, word in ((slice(1), "first"), (slice(-1, None), "last")):
            if whole.shape[dim] > 1:
                yield Suspect("one-of-all", whole[(slice(None),) * dim + (place,)],
                              f"only the {word} {noun} is kept, or only that one is read",
                              f"every index into {name}: all rows and heads are kept",
                              f"{when}, {name} holds the {word} {noun} only")  # fmt: skip
    yield Suspect("new-before-old", torch.cat(parts[::-1], dim=2), "torch.cat got the new tensor before the old one",
                  "torch.cat((old, new)): position in the cache is position in the sequence",
                  f"{when}, the newest token of {name} comes first")  # fmt: skip
    for dim, label in DIMENSIONS.items() if x.dim() == 4 else ():
        with suppress(RuntimeError):
            joined = torch.cat(parts, dim=dim)
            yield Suspect("wrong-dimension", joined, f"the tensors were joined along dimension {dim}",
                          "the dim of torch.cat: tokens are dimension 2", f"{name} is {list(x.shape)}: {label} grew "
                          f"from {parts[0].shape[dim]} to {x.shape[dim]}")  # fmt: skip
