"""02.4: a cache that is allocated once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from labkit.course.checks.caches import (
    LAYOUTS,
    Beside,
    Pair,
    Sizes,
    check_device,
    check_isolation,
    check_length_is_free,
    check_read_is_free,
    effort_of_append,
    fail_shared,
    read_pair,
    run_script,
    same_numbers,
    token_bytes,
)
from labkit.course.checks.held import bytes_behind, tensors_behind
from labkit.course.exercise import Exercise
from labkit.labs.lab02 import growing
from labkit.labs.lab02.references import PreallocatedCache
from labkit.ledger import memory_of

SIZES = Sizes(capacity=8)


class Preallocated(Exercise):
    """The cache that is allocated once."""

    id, title, minutes, difficulty = "02.4", "A cache that is allocated once", 7, 3
    needs = ("02.1",)
    reference = PreallocatedCache
    why = (
        "The test comes before anything changes, so a refusal leaves the cache as it was. new_empty takes dtype and "
        "device from k; a slice on the left is written in place, a slice that is returned is a view."
    )
    hints = (
        "What is known when the cache is made, and what only at the first append?",
        "Allocate [batch, num_kv_heads, capacity, head_dim] like k. Each append fills the next rows; read() slices.",
        "end = self.seq_len + k.shape[2]\nif end > self.capacity: raise ValueError(...)\n"
        "if self.seq_len == 0: self.k = k.new_empty(batch, num_kv_heads, self.capacity, head_dim)  # v alike\n"
        "self.k[:, :, self.seq_len : end] = k\nself.seq_len = end",
    )
    hints_for: ClassVar = {
        "wrong-dtype": "k.new_empty(...) takes dtype and device from k. torch.zeros(...) takes neither.",
        "capacity-off-by-one": "A cache of capacity 8 holds 8 tokens. Try it on paper with capacity 1.",
        "grew-again": "torch.cat makes a new tensor. self.k[:, :, a:b] = k writes into the one that is there.",
        "overflow": "How many tokens would there be after this append? Compare that number with the capacity.",
        "room-for-some": "A cache with one free place is not full, and two tokens do not fit into it.",
        "one-written": "An append may bring a whole prompt. The slice that is written is as long as what comes.",
        "reads-slack": "Behind seq_len the memory holds whatever was there before. Slice it off.",
        "never-written": "K and V have a memory each. An append writes into both.",
        "half-done": "Whoever catches the ValueError goes on with this cache. Test for room before anything else.",
        "other-capacity": "`capacity` is how many tokens the third dimension has, no more and no less.",
    }

    def examine(self, answer: Callable) -> None:
        """Content, then room, several caches in turn, then memory: in place, no copy, dtype and device."""
        make = lambda sizes: answer(sizes.capacity)  # noqa: E731
        cache, fresh = Beside(type(self), make, SIZES, explain), self.run(lambda: make(SIZES))
        self.check_shared(cache, fresh)
        self.check_dtype(make)
        for count in (4, 1, 2):
            cache.add(count)
        check_isolation(type(self), cache.cache, fresh)
        for capacity in (8, 1, 7):
            self.check_full(make, capacity)
            for held, extra in ((capacity, 1), (capacity - 1, 2), (capacity - 2, capacity - 2), (0, capacity + 1)):
                if held >= 0 and held + extra > capacity:
                    self.check_refusal(make, capacity, held, extra)
        shapes = [
            SIZES,
            Sizes(2, 3, 4, torch.bfloat16, 11),
            Sizes(1, 2, 8, torch.float64, 17),
            Sizes(4, 1, 10, capacity=5),
        ]
        run_script(type(self), make, shapes, explain=explain)
        self.check_memory(make, Sizes(2, 3, 4, capacity=300))
        self.check_memory(make, Sizes(3, 1, 6, torch.bfloat16, 333))
        self.check_long(make)
        check_device(type(self), make, SIZES)

    def check_shared(self, cache: Beside, fresh: Any) -> None:
        """Memory that two caches have in common shows as soon as one holds tokens; else what follows says more."""
        k, v = cache.sizes.tokens(2)
        other = cache.make(cache.sizes)
        try:
            other.append(k, v)
        except NotImplementedError:
            raise
        except Exception:
            return
        check_isolation(type(self), other, fresh)

    def check_dtype(self, make: Callable) -> None:
        """A bfloat16 model must get bfloat16 back, a float64 model float64."""
        others: list[Tensor] = []
        for dtype in (torch.bfloat16, torch.float64):
            cache, (k, v) = self.run(lambda: make(SIZES)), replace(SIZES, dtype=dtype).tokens(2)
            self.run(lambda: cache.append(k, v))  # noqa: B023
            for name, x in zip("KV", read_pair(type(self), cache), strict=True):
                if x.dtype != dtype and memory_of(x) in map(memory_of, others):
                    fail_shared(type(self), "two caches of different dtypes read the same memory")
                others.append(x)
                if x.dtype != dtype:
                    went, came = (str(d).removeprefix("torch.") for d in (dtype, x.dtype))
                    self.fail(
                        "wrong-dtype",
                        seen=f"{went} went in, {came} came out ({name})",
                        cause="the memory was allocated in torch's default dtype"
                        if x.dtype == torch.float32
                        else "the memory was allocated in another dtype",
                        look="where the memory is allocated: dtype=k.dtype, device=k.device, or k.new_empty",
                    )

    def check_full(self, make: Callable, capacity: int) -> None:
        """It fills to the last token, at once."""
        beside = Beside(type(self), make, replace(SIZES, capacity=capacity), explain)
        k, v = beside.sizes.tokens(capacity)
        try:
            beside.cache.append(k, v)
        except NotImplementedError:
            raise
        except Exception as error:
            self.fail(
                "capacity-off-by-one",
                seen=f"{capacity} tokens do not go into a cache of capacity {capacity}: {error}",
                cause="the comparison refuses the last place, or too little memory was allocated",
                look="the test before the write: end > capacity is too much, end == capacity is full",
            )
        beside.parts.append((k, v))
        beside.compare()

    def check_refusal(self, make: Callable, capacity: int, held: int, extra: int) -> None:
        """What does not fit is refused, changes nothing, and what fits then is taken."""
        beside = Beside(type(self), make, replace(SIZES, capacity=capacity), explain)
        if held:
            beside.add(held)
        beside.add(extra)
        if not held:
            beside.sizes = Sizes(2, 3, 4, torch.float64, capacity)  # nothing was taken: another model may come
        if beside.held < capacity:
            beside.add(1)

    def check_memory(self, make: Callable, sizes: Sizes) -> None:
        """One allocation each for K and V, of `capacity` tokens; later appends move what is new; reading is free."""
        beside = Beside(type(self), make, sizes, explain)
        beside.add(200)
        check_length_is_free(type(self), beside)
        room = 2 * sizes.capacity * token_bytes(beside)  # type: ignore[operator]
        if bytes_behind(beside.cache) > room + 128:
            self.fail(
                "other-capacity",
                seen=f"{beside.when}: {bytes_behind(beside.cache):,} bytes are kept; {sizes.capacity} tokens "
                f"take {room:,}",
                cause="another number than capacity was allocated, or something is kept besides",
                look="the third dimension of what is allocated: self.capacity; and everything else assigned to self",
            )
        for count, layout in ((1, LAYOUTS[0]), (5, LAYOUTS[0]), (1, LAYOUTS[1]), (7, LAYOUTS[2])):
            effort, new = effort_of_append(type(self), beside, count, layout), 2 * count * token_bytes(beside)
            if effort.made >= (beside.held - count) * token_bytes(beside):  # as much as K held before
                self.fail(
                    "grew-again",
                    seen=f"with {beside.held - count} tokens held, an append of {count} made {effort.made:,} bytes of "
                    f"new tensors; {new:,} bytes are new, and have their place already",
                    cause="the memory is made again at every append: torch.cat, or an allocation at each append",
                    look="append: allocate once, then write into a slice",
                )
            beside.compare()
            check_read_is_free(type(self), beside)

    def check_long(self, make: Callable) -> None:
        """Thousands of tokens."""
        beside = Beside(type(self), make, Sizes(1, 1, 1, capacity=4200), explain)
        for count in (4090, 20, 1):
            effort_of_append(type(self), beside, count)
        beside.compare()


def explain(beside: Beside, got: Pair, want: Pair) -> None:
    """Name what gives the tokens that were read."""
    exercise, when, new = beside.exercise, beside.when, beside.parts[-1][0].shape[2]
    for name, x, w in zip("KV", got, want, strict=True):
        if x.dim() == 4 and x.shape[2] == beside.sizes.capacity != w.shape[2]:
            exercise.fail(
                "reads-slack",
                seen=f"read() gives {name} of {x.shape[2]} tokens; {w.shape[2]} were appended",
                cause="all of the memory is returned, the unwritten part with it",
                look="read(): a slice up to seq_len",
            )
        if x.shape != w.shape:
            growing.explain(beside, got, want)
        elif not same_numbers(x, w):
            moved = beside.earlier is not None and apart(got, beside.earlier[0])
            explain_content(beside, name, x, w, w.shape[2] - new, when, moved=moved)


def explain_content(beside: Beside, name: str, got: Tensor, want: Tensor, held: int, when: str, *, moved: bool) -> None:
    """Say what became of the tokens of a cache that holds the right number of them. moved: in other memory now."""
    exercise, new = beside.exercise, want.shape[2] - held
    if got.dtype != want.dtype:
        return
    right = rows_equal(got, want)
    if held and moved and not right[:held].any():
        exercise.fail(
            "allocated-again",
            seen=f"{when}, read() shows other memory than before, and the earlier tokens' {name} is gone",
            cause="memory is allocated at every append, and what the old memory held is left behind",
            look="the line that allocates: at the first append only",
        )
    if held >= new and rows_equal(got[:, :, :new], want[:, :, held:]).all():
        exercise.fail(
            "overwritten",
            seen=f"{when}, the first tokens' {name} is gone: the newest tokens stand there",
            cause="this append was written where earlier tokens stand",
            look="where the write starts: seq_len, as it was before this append",
        )
    if new > 1 and right[:held].all() and right[held] and not right[held + 1 :].any():
        exercise.fail(
            "one-written",
            seen=f"{when}, only one of the {new} new tokens is there ({name}); behind it stands unwritten memory",
            cause="the write covers one place, whatever the number of tokens that come",
            look="the slice that is written: from seq_len to seq_len + k.shape[2]",
        )
    if (found := place_in_memory(beside, want[:, :, held:])) is not None and found != held:
        exercise.fail(
            "misplaced",
            seen=f"{when}, the newest {name} stands from place {found} on; it belongs from place {held} on",
            cause="the slice that is written starts at another place than the tokens belong to",
            look="the two ends of the slice, by hand, for an append of 3 and then of 1: seq_len grows after the write",
        )
    if found == held:
        memory_right = [p for p in range(1, want.shape[2]) if torch.equal(got[:, :, :-p], want[:, :, p:])]
        exercise.fail(
            "read-misplaced",
            seen=f"{when}, the newest {name} stands where it belongs, from place {held} on; read() gives other places"
            + (f": it begins at place {memory_right[0]}" if memory_right else ""),
            cause="the slice that is read begins or ends at another place than the tokens do",
            look="read(): from place 0 up to seq_len",
        )
    alike = (got[:, :, held:] - want[:, :, held:]).abs() <= 0.01 * want[:, :, held:].abs()
    if not right[held:].any() and right[:held].all() and alike.double().mean() < 0.2:
        exercise.fail(
            "never-written",
            seen=f"{when}, no new token of {name} is there; every other place is right",
            cause=f"the line that writes {name} is missing, or writes into something that is not kept",
            look=f"the line that puts the new tokens into self's memory of {name}",
        )


def rows_equal(a: Tensor, b: Tensor) -> Tensor:
    """At which tokens two tensors agree, bool [tokens]."""
    return (a == b).flatten(3).all(dim=3).all(dim=1).all(dim=0)


def place_in_memory(beside: Beside, tokens: Tensor) -> int | None:
    """Where in the cache's memory these tokens stand, if in one place only."""
    capacity, count, found = beside.sizes.capacity or 0, tokens.shape[2], []
    for memory in tensors_behind(beside.cache):
        if memory.shape == (*tokens.shape[:2], capacity, tokens.shape[3]) and memory.dtype == tokens.dtype:
            found += [p for p in range(capacity - count + 1) if torch.equal(memory[:, :, p : p + count], tokens)]
    return found[0] if len(found) == 1 else None


def apart(now: Pair, before: Pair) -> bool:
    """Whether two reads show different memory. `before` is still alive, so its address cannot have been used again."""
    return any(memory_of(a) != memory_of(b) for a, b in zip(now, before, strict=True))
