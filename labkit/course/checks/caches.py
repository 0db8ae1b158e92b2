"""Caches that a learner wrote, beside what was appended to them.

    run_script(type(self), lambda sizes: answer(sizes.capacity), [Sizes(capacity=8), Sizes(3, 5, 6, capacity=11)])

`Beside` is one cache and everything it was given: it appends, lets the cache refuse, and compares what is read, both
tensors and `seq_len`, whatever the class calls its own attributes. `run_script` drives several of them in turn with
random operations. When something fails there, the same operations are tried on one cache alone, and with contiguous
tensors, so that the finding says what it is due to.
"""

from __future__ import annotations

import numbers
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from labkit.course.checks.effort import Effort, check_stays, effort_of
from labkit.course.checks.held import bytes_behind, tensors_behind
from labkit.course.checks.tensors import shifted
from labkit.course.checks.trials import sliced, transposed
from labkit.course.exercise import Exercise, NotYet
from labkit.ledger import memory_of

Pair = tuple[Tensor, Tensor]
LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (lambda x: x, transposed, sliced)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the K and V that a cache is tried with. capacity: of the cache, in tokens; None: it has no limit."""

    batch: int = 3
    num_kv_heads: int = 5
    head_dim: int = 6
    dtype: torch.dtype = torch.float32
    capacity: int | None = None

    def tokens(self, count: int, *, device: str = "cpu") -> Pair:
        """Random K and V of `count` tokens: fractions, some of them large or tiny."""
        shape = (self.batch, self.num_kv_heads, count, self.head_dim)
        scale = 10.0 ** torch.randint(-6, 6, (1, 1, 1, self.head_dim))
        k, v = (torch.randn(shape, dtype=torch.float64) * scale for _ in range(2))
        return k.to(device, self.dtype), v.to(device, self.dtype)

    def __str__(self) -> str:
        dtype = "" if self.dtype == torch.float32 else f", {str(self.dtype).removeprefix('torch.')}"
        room = "" if self.capacity is None else f", capacity {self.capacity:,}"
        return f"batch {self.batch}, {self.num_kv_heads} KV heads, head_dim {self.head_dim}{dtype}{room}"


Explain = Callable[["Beside", Pair, Pair], None]


@dataclass
class Beside:
    """A learner's cache and what was appended to it.

    make: makes the cache. explain: called with the pair read and the right pair before a neutral finding, to name a
    mistake that gives what was read.
    """

    exercise: type[Exercise]
    make: Callable[[Sizes], Any]
    sizes: Sizes
    explain: Explain = lambda beside, got, want: None
    parts: list[Pair] = field(default_factory=list)
    log: list[tuple[bool, Tensor, Tensor]] = field(default_factory=list)  # whether it fits, k, v
    earlier: tuple[Pair, Pair] | None = None  # the latest read, and a copy of it

    def __post_init__(self) -> None:
        self.cache = self.exercise.run(lambda: self.make(self.sizes))
        check_methods(self.exercise, self.cache)
        self.check_seq_len()

    @property
    def held(self) -> int:
        """Tokens that should be held."""
        return sum(k.shape[2] for k, _ in self.parts)

    @property
    def when(self) -> str:
        """The appends so far, in words."""
        if not self.parts:
            return "before the first append"
        counts = [f"{k.shape[2]:,}" for k, _ in self.parts]
        shown = counts if len(counts) <= 6 else ["...", *counts[-5:]]
        return (
            f"after append{'s' * (len(counts) > 1)} of {', '.join(shown)} token{'s' * (self.held > 1)} ({self.sizes})"
        )

    def want(self) -> Pair:
        """What read() should give."""
        return torch.cat([k for k, _ in self.parts], dim=2), torch.cat([v for _, v in self.parts], dim=2)

    def add(self, count: int, layout: Callable[[Tensor], Tensor] = LAYOUTS[0]) -> None:
        """Append so many new tokens; where they do not fit, they must be refused and change nothing."""
        k, v = self.sizes.tokens(count)
        fits = self.sizes.capacity is None or self.held + count <= self.sizes.capacity
        self.give(fits, layout(k), layout(v))

    def give(self, fits: bool, k: Tensor, v: Tensor) -> None:
        """Append these, or have them refused; then compare."""
        self.log.append((fits, k, v))
        if fits:
            kept = k.clone(), v.clone()
            self.exercise.run(lambda: self.cache.append(k, v))
            self.exercise.check_unchanged(kept, (k, v))
            self.parts.append(kept)
        else:
            self.check_refusal(k, v)
        self.compare()

    def compare(self) -> None:
        """Fail unless `seq_len` and read() are as they should be."""
        if self.parts:
            got, want = read_pair(self.exercise, self.cache), self.want()
            if not all(same_numbers(a, b) for a, b in zip(got, want, strict=True)):
                check_kinds(self.exercise, got, want, self.when)
                self.explain(self, got, want)
                self.check_all_kept(got, want)
                if all(a.shape[:2] + a.shape[3:] == b.shape[:2] + b.shape[3:] for a, b in zip(got, want, strict=True)):
                    self.check_seq_len()  # a length that is off explains how many tokens are read
            for name, a, b in zip("KV", got, want, strict=True):
                self.exercise.same(a, b, what=f"{self.when}: {name}")
            self.check_earlier_read(got)
        self.check_seq_len()

    def check_all_kept(self, got: Pair, want: Pair) -> None:
        """Fail when fewer numbers are kept than came: then it is no wrong length that hides the others."""
        kept = sum(x.numel() for x in {memory_of(x): x for x in tensors_behind(self.cache)}.values())
        fewer = [x.shape[2] for x in got if x.dim() == 4 and x.shape[2] < self.held]
        if fewer and kept < sum(x.numel() for x in want):
            self.exercise.fail(
                "tokens-lost",
                seen=f"{self.when}: read() gives {min(fewer)} tokens, and no more are kept; {self.held} came",
                cause="append keeps a part of what comes, or of what was held, and drops the rest",
                look="append: what is joined, all of it: both K and V, every token held and every token that comes",
            )

    def check_earlier_read(self, now: Pair) -> None:
        """Fail when what was read before has changed since; then remember what is read now."""
        if self.earlier and not all(map(torch.equal, *self.earlier)):
            self.exercise.fail(
                "result-overwritten",
                seen=f"{self.when}: what read() gave before has changed: tokens that were held were written over",
                cause="one piece of memory is filled anew at every read, or old tokens move in it",
                look="what read() returns: tokens stay where they are, and new ones stand behind them",
            )
        self.earlier = now, (now[0].clone(), now[1].clone())

    def check_seq_len(self) -> None:
        """Fail unless `seq_len` is the number of tokens held."""
        newest = self.parts[-1][0].shape if self.parts else ()
        others = {"the appends were counted, not their tokens": len(self.parts)} | (
            {"the newest append's tokens alone were counted": newest[2], "dimension 0, the batch, was counted":
             newest[0], "dimension 1, the heads, was counted": newest[1], "head_dim was counted": newest[3],
             "tokens were counted once per row": newest[0] * self.held,
             "tokens were counted twice, for K and for V": 2 * self.held,
             "one token is counted that was never appended": self.held + 1} if newest else {}
        )  # fmt: skip
        check_seq_len(self.exercise, self.cache, self.held, self.when, others)

    def check_refusal(self, k: Tensor, v: Tensor) -> None:
        """Fail unless tokens that do not fit are refused with ValueError and take no memory."""
        before, case = bytes_behind(self.cache), f"{self.sizes}: {self.held:,} held, {k.shape[2]:,} more"
        try:
            self.cache.append(k, v)
        except NotImplementedError:
            raise
        except ValueError:
            pass
        except Exception as error:
            self.explain_error(error, case)
        else:
            self.exercise.fail(
                "overflow",
                seen=f"{case}: taken without a word",
                cause=self.other_test()
                or "no test for room: tokens were dropped, or wrote over old ones, or more memory was taken",
                look="the start of append: raise ValueError when the tokens do not fit",
            )
        self.check_nothing_changed(case, before)

    def other_test(self) -> str:
        """What a test for room may compare, where there is one: some appends that do not fit are refused."""
        capacity = self.sizes.capacity or 0
        first = self.refuses(capacity + 1)
        if capacity > 1 and not first and self.refuses(1, capacity):
            return "the first append is taken whatever its size: only later ones are compared with the capacity"
        if first and not self.refuses(1, capacity + 1):
            return "only the first append is compared with the capacity; later ones are not"
        if first:
            return "the tokens that come are compared with the capacity, without those that are held"
        if self.refuses(3 * capacity + 9):
            return "the test compares with another number than the capacity: a few tokens too many pass"
        if self.refuses(capacity, 1):
            return "the tokens held are compared with the capacity, without those that come"
        if self.refuses(capacity, 1, 1) or self.refuses(capacity - 1, 2, 1):
            return "the tokens held are compared with the capacity, one too late and without those that come"
        return ""

    def refuses(self, *counts: int) -> bool:
        """Whether a new cache refuses the last of these appends with ValueError, and not one before."""
        *first, last = counts
        try:
            cache = self.make(self.sizes)
            for count in first:
                cache.append(*self.sizes.tokens(count))
        except Exception:
            return False
        try:
            cache.append(*self.sizes.tokens(last))
        except Exception as error:
            return isinstance(error, ValueError)
        return False

    def explain_error(self, error: Exception, case: str) -> None:
        """Tell a test with another error from a write that failed."""
        if not isinstance(error, RuntimeError) or not any(word in str(error) for word in ("size", "shape", "range")):
            self.exercise.fail(
                "other-error",
                seen=f"{case}: {type(error).__name__}, not ValueError",
                cause="the tokens are refused, but with an error that the caller does not expect; `assert` is also "
                "skipped under python -O",
                look="the line that refuses: raise ValueError(...), as the docstring promises",
            )
        full = self.held == self.sizes.capacity
        self.exercise.fail(
            "overflow" if full else "room-for-some",
            seen=f"{case}: the write itself failed ({type(error).__name__}), no ValueError came before it",
            cause=self.other_test() or "no test for room before the write"
            if full or self.other_test()
            else "no test before the write whether all that comes fits; whether the cache is full is another question",
            look="the start of append: compare seq_len + new tokens with the capacity before anything changes",
        )

    def check_nothing_changed(self, case: str, before: int) -> None:
        """Fail when a refusal left its mark."""
        changed = ""
        if getattr(self.cache, "seq_len", None) != self.held:
            changed = f"seq_len is {self.cache.seq_len}"
        elif bytes_behind(self.cache) > before + self.sizes.head_dim * 8:
            changed = "memory was allocated"
        elif self.parts:
            got = read_pair(self.exercise, self.cache)
            changed = "" if all(map(same_numbers, got, self.want())) else "other tokens are read"
        if changed:
            self.exercise.fail(
                "half-done",
                seen=f"{case}: refused, but the cache was changed: {changed}",
                cause="seq_len or the memory was changed before the test for room",
                look="the order in append: test first, then allocate and write",
            )

    def again(self, change: Callable[[Tensor], Tensor]) -> NotYet | None:
        """What a new cache, alone, is found to do with the same operations, tensors changed; None: all is right."""
        try:
            alone = Beside(self.exercise, self.make, self.sizes)
            for fits, k, v in self.log:
                alone.give(fits, change(k), change(v))
        except NotYet as not_yet:
            return not_yet
        return None


def run_script(
    exercise: type[Exercise],
    make: Callable[[Sizes], Any],
    sizes: Sequence[Sizes],
    *,
    steps: int = 40,
    counts: Sequence[int] = (1, 1, 1, 2, 3, 5),
    explain: Explain = lambda beside, got, want: None,
) -> None:
    """Pass when caches of these sizes, used in turn, each stay what they should be through random operations.

    make: makes a cache for given sizes. counts: tokens of an append, drawn at random; where a cache is nearly full, one
    too many and as many as fit are among them. Tensors come in several layouts. The operations are the same each time.
    """
    draw, caches = random.Random(shifted(steps)), [Beside(exercise, make, each, explain) for each in sizes]
    for _ in range(steps):
        one = draw.choice(caches)
        room = None if one.sizes.capacity is None else one.sizes.capacity - one.held
        few = counts if room is None else [*counts, room + 1, max(room, 1), room + one.sizes.batch]
        try:
            one.add(draw.choice(few), draw.choice(LAYOUTS))
        except NotYet as not_yet:
            say_what_it_is_due_to(one, not_yet)
        for other in caches:
            try:
                other.compare()
            except NotYet as not_yet:
                say_what_it_is_due_to(other, not_yet)


def say_what_it_is_due_to(one: Beside, not_yet: NotYet) -> None:
    """Fail with what a script found: by itself, by the other caches, or by the order of the tensors in memory."""
    if one.again(lambda x: x) is None:
        fail_shared(
            one.exercise, f"{one.when}: {not_yet.finding.seen}. The same operations on one cache alone are right"
        )
    if one.again(Tensor.contiguous) is None:
        one.exercise.fail(
            "layout",
            seen=f"{not_yet.finding.seen}. The same numbers, contiguous in memory, were right",
            cause="the code counts on the order in memory; k and v come as slices and transposes of larger tensors",
            look="reshape instead of view, and dimensions by their place, not by the order in memory",
        )
    raise not_yet


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape and hold the same numbers, whatever their dtypes."""
    return a.shape == b.shape and a.device == b.device and torch.equal(a.double(), b.double())


def check_methods(exercise: type[Exercise], cache: Any) -> None:
    """Fail when the class lacks one of the methods of the blank."""
    missing = [name for name in ("append", "read") if not callable(getattr(cache, name, None))]
    if missing:
        exercise.fail(
            "missing-method",
            seen=f"the class has no method {' and no method '.join(missing)}",
            cause="it was removed or renamed, or stands outside the class because of its indentation",
            look="the names in the blank: __init__, append, read, indented alike",
        )


def check_kinds(exercise: type[Exercise], got: Pair, want: Pair, when: str) -> None:
    """Fail when K and V were mixed up on the way in; `want` is what K and V should be."""
    (k, v), (want_k, want_v) = got, want
    if not k.shape == v.shape == want_k.shape:
        return
    if torch.equal(k, want_v) and torch.equal(v, want_k):
        exercise.fail(
            "k-and-v-swapped",
            seen="what read() gives first is V",
            cause="k and v change places on the way in or out",
            look="the order in append's parameters and in read's return: k, v",
        )
    if torch.equal(k, want_v) and torch.equal(v, want_v):
        exercise.fail(
            "k-holds-v",
            seen=f"{when}, K and V are the same numbers: those of V",
            cause="both names stand for one piece of memory, and V was written over K",
            look="where the memory is made: K and V need one tensor each",
        )
    if torch.equal(k, want_k) and (v == want_k).flatten(3).all(dim=3).any() and not torch.equal(v, want_v):
        exercise.fail(
            "v-holds-k",
            seen=f"{when}, K is right and V holds keys",
            cause="the line for V was copied from the line for K and still says k",
            look="the lines that store and that return V: which of the two do they take?",
        )


def read_pair(exercise: type[Exercise], cache: Any) -> Pair:
    """What `cache.read()` gives, when it is a pair of tensors of one shape."""
    both = exercise.run(cache.read)
    if isinstance(both, (tuple, list)) and len(both) == 2:
        if all(isinstance(x, Tensor) for x in both):
            return both[0], both[1]
        if None in [x if x is None else 0 for x in both]:
            names = " and ".join(name for name, x in zip("KV", both, strict=True) if x is None)
            exercise.fail(
                "nothing-stored",
                seen=f"read() gave None for {names}: append stored nothing there",
                cause="the first append has nothing to join with, and kept nothing",
                look="the first append: keep k and v as they come",
            )
    kind = "nothing" if both is None else f"a {type(both).__name__}"
    parts = f" of {', '.join(type(x).__name__ for x in both)}" if isinstance(both, (tuple, list)) else ""
    exercise.fail(
        "not-a-pair",
        seen=f"read() returned {kind}{parts}; it should return two tensors",
        cause="no return" if both is None else "something else than K and V is returned",
        look="the last line of read(): return k, v",
    )
    raise AssertionError("fail raises")


def fail_shared(exercise: type[Exercise], seen: str) -> None:
    """What one cache holds shows in another."""
    exercise.fail(
        "shared-between-caches",
        seen=seen,
        cause="something is kept on the class (or in a default argument or a global), not on the instance",
        look="__init__: everything a cache keeps belongs on self",
    )


def check_isolation(exercise: type[Exercise], filled: Any, fresh: Any) -> None:
    """Fail when appending to one cache shows in another."""
    seen = getattr(fresh, "seq_len", None)
    shared = set(map(memory_of, tensors_behind(filled))) & set(map(memory_of, tensors_behind(fresh)))
    if (seen not in (None, 0) and not callable(seen)) or shared:
        fail_shared(exercise, "tokens appended to one cache turned up in another one")


def check_seq_len(
    exercise: type[Exercise], cache: Any, want: int, when: str, others: Mapping[str, int] | None = None
) -> None:
    """Fail unless `cache.seq_len` is the whole number `want`. others: what else it may have counted, in words."""
    got = getattr(cache, "seq_len", None)
    if callable(got):
        exercise.fail(
            "seq-len-method",
            seen=f"{when}, seq_len is a method; it is read without parentheses, as cache.seq_len",
            cause="`def seq_len(self)` without @property above it",
            look="put @property above the method, or keep a number in self.seq_len",
        )
    if isinstance(got, Tensor) and got.dim() == 0 and not got.is_floating_point():
        got = got.item()
    if got is None:
        exercise.fail(
            "seq-len",
            seen=f"{when}, there is no seq_len; it should be {want}",
            cause="it is not set" if want else "__init__ does not set it",
            look="append: seq_len grows by k.shape[2]" if want else "__init__: self.seq_len = 0",
        )
    if not isinstance(got, numbers.Integral) or got != want:
        counted = [words for words, count in (others or {}).items() if count == got != want]
        exercise.fail(
            "seq-len",
            seen=f"{when}, seq_len is {got!r}; it should be {want}",
            cause=counted[0] if len(counted) == 1 else "tokens are not counted as they are appended",
            look="the end of append: seq_len grows by k.shape[2]",
        )


def check_length_is_free(exercise: type[Exercise], beside: Beside) -> None:
    """Fail when to say `seq_len` takes memory as large as a token, or numbers that leave PyTorch."""
    effort = effort_of(lambda: exercise.run(lambda: beside.cache.seq_len))
    if effort.left or effort.made >= token_bytes(beside):
        exercise.fail(
            "seq-len-works",
            seen=f"{beside.when}: to say seq_len, "
            + ("numbers leave PyTorch" if effort.left else f"{effort.made:,} bytes of new tensors are made"),
            cause="seq_len is worked out from the numbers held each time it is asked for, and every step asks",
            look="append knows how many tokens came: keep a count, or take it from a shape",
        )


def check_read_is_free(exercise: type[Exercise], beside: Beside) -> None:
    """Fail when reading, with nothing appended since the last read, makes new memory, or leaves PyTorch."""
    check_length_is_free(exercise, beside)
    effort = effort_of(lambda: read_pair(exercise, beside.cache))
    check_stays(exercise, effort)
    if effort.made >= token_bytes(beside):
        exercise.fail(
            "read-copies",
            seen=f"{beside.when}: read() made {effort.made:,} bytes of new tensors though nothing had been appended "
            "since the last read",
            cause="tokens are joined or copied each time they are read (cat, clone, contiguous, an index); attention "
            "reads at every step",
            look="read(): it hands out what append has stored, or a slice of it, which is a view",
        )


def effort_of_append(exercise: type[Exercise], beside: Beside, count: int, layout: Callable = LAYOUTS[0]) -> Effort:
    """What one append makes and touches; its tokens count among those that should be held."""
    k, v = (layout(x) for x in beside.sizes.tokens(count))
    beside.parts.append((k.clone(), v.clone()))
    beside.log.append((True, k, v))
    effort = effort_of(lambda: exercise.run(lambda: beside.cache.append(k, v)))
    check_stays(exercise, effort)
    return effort


def token_bytes(beside: Beside) -> int:
    """Bytes of one token's K."""
    sizes = beside.sizes
    return sizes.batch * sizes.num_kv_heads * sizes.head_dim * torch.empty(0, dtype=sizes.dtype).element_size()


def check_device(exercise: type[Exercise], make: Callable[[Sizes], Any], sizes: Sizes) -> None:
    """Fail when K and V of another device are kept on the CPU. Tensors on the meta device stand for a GPU."""
    cache, (k, v) = exercise.run(lambda: make(sizes)), sizes.tokens(2, device="meta")
    out: list[Tensor] = []
    with suppress(Exception):  # what holds no numbers cannot be looked at: to try is no fault
        cache.append(k, v)
        out += cache.read()
    if any(x.device.type == "cpu" and x.numel() >= k.numel() for x in [*out, *tensors_behind(cache)]):
        exercise.fail(
            "wrong-device",
            seen="tensors on another device went in; memory for them was allocated on the CPU",
            cause="the memory was allocated without device=k.device",
            look="where the memory is allocated: k.new_empty takes dtype and device from k",
        )
