"""02.4: a cache that is allocated once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch

from labkit.course.exercise import Exercise
from labkit.course.exercises.lab02.references import (
    PreallocatedCache,
)
from labkit.course.exercises.lab02.tools import (
    check_isolation,
    check_seq_len,
    new_tokens,
    read_pair,
)
from labkit.ledger import ledger


class Preallocated(Exercise):
    """The cache that is allocated once."""

    id, title, minutes, difficulty = "02.4", "A cache that is allocated once", 7, 3
    needs = ("02.1",)
    reference = PreallocatedCache
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
        "reads-slack": "Behind seq_len the memory holds whatever was there before. Slice it off.",
    }
    capacity = 8

    def examine(self, answer: Callable) -> None:
        """Content, then room, then memory: in place, no copy, dtype and device of what comes in."""
        make = partial(self.run, partial(answer, self.capacity))
        cache, fresh = make(), make()
        check_seq_len(type(self), cache, 0, "before the first append")
        self.check_dtype(make())
        self.check_content(cache)
        check_isolation(type(self), cache, fresh)
        self.check_room(make())
        self.check_memory(make())
        self.check_device(make())

    def check_dtype(self, cache: Any) -> None:
        """A bfloat16 model must get bfloat16 back."""
        k, v = new_tokens(2, dtype=torch.bfloat16)
        self.run(lambda: cache.append(k, v))
        got = read_pair(type(self), cache)
        for name, x in (("K", got[0]), ("V", got[1])):
            if x.dtype != torch.bfloat16:
                self.fail(
                    "wrong-dtype",
                    seen=f"bfloat16 went in, {str(x.dtype).removeprefix('torch.')} came out ({name})",
                    cause="the memory was allocated in torch's default dtype",
                    look="where the memory is allocated: dtype=k.dtype, device=k.device, or k.new_empty",
                )

    def check_content(self, cache: Any) -> None:
        """What is read is what was appended, and no more."""
        parts = [new_tokens(count) for count in (3, 1, 2)]
        for index, (k, v) in enumerate(parts):
            self.run(partial(cache.append, k, v))
            got = read_pair(type(self), cache)
            want = [torch.cat([part[i] for part in parts[: index + 1]], dim=2) for i in (0, 1)]
            for name, x, w in zip("KV", got, want, strict=True):
                if x.dim() == 4 and x.shape[2] == self.capacity:
                    self.fail(
                        "reads-slack",
                        seen=f"read() gives {name} of {self.capacity} tokens; {w.shape[2]} were appended",
                        cause="all of the memory is returned, the unwritten part with it",
                        look="read(): a slice up to seq_len",
                    )
                if index and x.shape == w.shape and not torch.equal(x[:, :, :1], w[:, :, :1]):
                    self.fail(
                        "overwritten",
                        seen=f"after append {index + 1} the first token's {name} is gone",
                        cause="every append writes at the same place",
                        look="where the write starts: seq_len, as it was before this append",
                    )
                self.same(x, w, what=f"{name} after append {index + 1}")
            check_seq_len(type(self), cache, want[0].shape[2], f"after append {index + 1}")

    def check_room(self, cache: Any) -> None:
        """It fills to the last token, and refuses one more without changing."""
        k, v = new_tokens(self.capacity)
        try:
            cache.append(k, v)
        except NotImplementedError:
            raise
        except Exception as error:
            self.fail(
                "capacity-off-by-one",
                seen=f"{self.capacity} tokens do not go into a cache of capacity {self.capacity}: {error}",
                cause="the comparison refuses the last place, or too little memory was allocated",
                look="the test before the write: end > capacity is too much, end == capacity is full",
            )
        try:
            cache.append(*new_tokens(1))
        except NotImplementedError:
            raise
        except ValueError:
            pass
        except Exception as error:
            self.fail(
                "overflow",
                seen=f"one token too many raises {type(error).__name__}, not ValueError",
                cause="the write itself failed; nobody tested for room",
                look="the start of append: compare with the capacity before anything changes",
            )
        else:
            self.fail(
                "overflow",
                seen=f"a cache of capacity {self.capacity} took {self.capacity + 1} tokens without a word",
                cause="no test for room: the new token was dropped, or wrote over an old one, or more memory was taken",
                look="the start of append: raise ValueError when the tokens do not fit",
            )
        got = read_pair(type(self), cache)
        if getattr(cache, "seq_len", None) != self.capacity or not torch.equal(got[0], k):
            self.fail(
                "half-done",
                seen="the refused append changed the cache",
                cause="seq_len or the memory was changed before the test for room",
                look="the order in append: test first, then write",
            )

    def check_memory(self, cache: Any) -> None:
        """One allocation each for K and V; later appends move only what is new; read() copies nothing."""
        k, v = new_tokens(1)
        self.run(lambda: cache.append(k, v))
        with ledger() as work:
            self.run(lambda: cache.append(k, v))
        new = k.nbytes + v.nbytes
        if work.bytes_copied > new or work.allocations:
            self.fail(
                "grew-again",
                seen=f"the second append moved {work.bytes_copied} bytes and made {work.allocations} new tensors; "
                f"{new} bytes are new and no tensor is needed",
                cause="the memory is made again at every append: torch.cat, or an allocation outside the first append",
                look="append: allocate once, then write into a slice",
            )
        with ledger() as work:
            read_pair(type(self), cache)
        if work.bytes_copied:
            self.fail(
                "read-copies",
                seen=f"read() moved {work.bytes_copied} bytes",
                cause="clone(), contiguous() or indexing with a tensor makes a copy",
                look="read(): a slice is a view and costs nothing",
            )

    def check_device(self, cache: Any) -> None:
        """Tensors on the meta device stand for a GPU."""
        k, v = new_tokens(1, device="meta")
        try:
            cache.append(k, v)
            device = cache.read()[0].device.type
        except Exception:
            device = "cpu"
        if device != "meta":
            self.fail(
                "wrong-device",
                seen="tensors on another device went in; the memory was allocated on the CPU",
                cause="the memory was allocated without device=k.device",
                look="where the memory is allocated: k.new_empty takes dtype and device from k",
            )
