"""Caches that a learner wrote: the methods they must have, what they give back, and what they keep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from labkit.course.checks.held import tensors_behind
from labkit.course.exercise import Exercise
from labkit.ledger import memory_of


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


def check_kinds(exercise: type[Exercise], got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], when: str) -> None:
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
            look="the line that stores V: which of the two new tensors does it take?",
        )


def read_pair(exercise: type[Exercise], cache: Any) -> tuple[Tensor, Tensor]:
    """What `cache.read()` gives, when it is a pair of tensors of one shape."""
    both = exercise.run(cache.read)
    if not isinstance(both, (tuple, list)) or len(both) != 2 or not all(isinstance(x, Tensor) for x in both):
        kind = type(both).__name__
        exercise.fail(
            "not-a-pair",
            seen=f"read() returned {'nothing' if both is None else f'a {kind}'}",
            cause="no return, or only one of the two",
            look="the last line of read(): return k, v",
        )
    return both[0], both[1]


def check_isolation(exercise: type[Exercise], filled: Any, fresh: Any) -> None:
    """Fail when appending to one cache shows in another."""
    seen = getattr(fresh, "seq_len", None)
    shared = set(map(memory_of, tensors_behind(filled))) & set(map(memory_of, tensors_behind(fresh)))
    if (seen not in (None, 0) and not callable(seen)) or shared:
        exercise.fail(
            "shared-between-caches",
            seen="tokens appended to one cache turned up in another one",
            cause="they are kept on the class (or in a default argument or a global), not on the instance",
            look="__init__: everything a cache keeps belongs on self",
        )


def check_seq_len(exercise: type[Exercise], cache: Any, want: int, when: str) -> None:
    """Fail unless `cache.seq_len` is `want`."""
    got = getattr(cache, "seq_len", None)
    if callable(got):
        exercise.fail(
            "seq-len-method",
            seen=f"{when}, seq_len is a method; it is read without parentheses, as cache.seq_len",
            cause="`def seq_len(self)` without @property above it",
            look="put @property above the method, or keep a number in self.seq_len",
        )
    if got != want:
        seen = "there is no seq_len" if got is None else f"seq_len is {got}"
        exercise.fail(
            "seq-len",
            seen=f"{when}, {seen}; it should be {want}",
            cause="the count of tokens is not kept, or counts appends instead of tokens",
            look="the end of append: seq_len grows by k.shape[2]",
        )
