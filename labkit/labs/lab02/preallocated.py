"""02.4: a cache that is allocated once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from labkit.course.checks.caches import check_isolation, check_kinds, check_methods, check_seq_len, read_pair
from labkit.course.exercise import Exercise
from labkit.labs.lab02.material import new_tokens
from labkit.labs.lab02.references import PreallocatedCache
from labkit.ledger import ledger


class Preallocated(Exercise):
    """The cache that is allocated once."""

    id, title, minutes, difficulty = "02.4", "A cache that is allocated once", 7, 3
    needs = ("02.1",)
    reference = PreallocatedCache
    why = (
        "All is checked before anything is written, so a refusal leaves the cache as it was. The first append knows "
        "dtype, device and sizes; every later one writes into a slice, and read hands out a view: no byte moves "
        "twice."
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
        "one-written": "An append may bring a whole prompt. The slice that is written is as long as what comes.",
        "reads-slack": "Behind seq_len the memory holds whatever was there before. Slice it off.",
    }
    capacity = 8

    def examine(self, answer: Callable) -> None:
        """Content, then room, then memory: in place, no copy, dtype and device of what comes in."""
        make = partial(self.run, partial(answer, self.capacity))
        cache, fresh = make(), make()
        check_methods(type(self), cache)
        check_seq_len(type(self), cache, 0, "before the first append")
        self.check_dtype(make())
        self.check_content(cache)
        check_isolation(type(self), cache, fresh)
        self.check_full(make())
        for held, extra in ((self.capacity, 1), (6, 6), (7, 2), (0, self.capacity + 1)):
            self.check_refusal(make(), held, extra)
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
        before: tuple[Tensor, Tensor] | None = None
        for index, (k, v) in enumerate(parts):
            self.run(partial(cache.append, k, v))
            if index == 0:
                check_seq_len(type(self), cache, k.shape[2], "after the first append")
            got = read_pair(type(self), cache)
            want_k, want_v = (torch.cat([part[i] for part in parts[: index + 1]], dim=2) for i in (0, 1))
            want, when = (want_k, want_v), f"after append {index + 1}"
            check_kinds(type(self), got, want, when)
            for name, x, w in zip("KV", got, want, strict=True):
                if x.dim() == 4 and x.shape[2] == self.capacity:
                    self.fail(
                        "reads-slack",
                        seen=f"read() gives {name} of {self.capacity} tokens; {w.shape[2]} were appended",
                        cause="all of the memory is returned, the unwritten part with it",
                        look="read(): a slice up to seq_len",
                    )
                if x.shape == w.shape and not torch.equal(x, w):
                    self.explain_content(name, x, w, k.shape[2], when, moved=before is not None and apart(got, before))
                self.same(x, w, what=f"{name} {when}")
            check_seq_len(type(self), cache, want_k.shape[2], when)
            before = got

    def explain_content(self, name: str, got: Tensor, want: Tensor, new: int, when: str, *, moved: bool) -> None:
        """Say what became of the tokens of a cache that holds the right number of them. moved: in other memory now."""
        held, right = want.shape[2] - new, (got == want).flatten(3).all(dim=3).all(dim=1).all(dim=0)
        if held and moved and not right[:held].all():
            self.fail(
                "allocated-again",
                seen=f"{when}, read() shows other memory than before, and the first token's {name} is gone",
                cause="memory is allocated at every append, and what the old memory held is left behind",
                look="the line that allocates: at the first append only",
            )
        if held and not right[:held].all():
            self.fail(
                "overwritten",
                seen=f"{when}, the first token's {name} is gone",
                cause="every append writes at the same place",
                look="where the write starts: seq_len, as it was before this append",
            )
        if right[:held].all() and right[held] and not right[held + 1 :].any():
            self.fail(
                "one-written",
                seen=f"{when}, only one of the {new} new tokens is there ({name}); behind it stands unwritten memory",
                cause="the write covers one place, whatever the number of tokens that come",
                look="the slice that is written: from seq_len to seq_len + k.shape[2]",
            )
        self.fail(
            "misplaced",
            seen=f"{when}, {name} holds the right number of tokens, and the right ones at positions "
            f"{right.nonzero().flatten().tolist()} only",
            cause="the slice that is written starts or ends at another place than the tokens belong to",
            look="the two ends of the slice, by hand, for an append of 3 and then of 1",
        )

    def check_full(self, cache: Any) -> None:
        """It fills to the last token."""
        try:
            cache.append(*new_tokens(self.capacity))
        except NotImplementedError:
            raise
        except Exception as error:
            self.fail(
                "capacity-off-by-one",
                seen=f"{self.capacity} tokens do not go into a cache of capacity {self.capacity}: {error}",
                cause="the comparison refuses the last place, or too little memory was allocated",
                look="the test before the write: end > capacity is too much, end == capacity is full",
            )

    def check_refusal(self, cache: Any, held: int, extra: int) -> None:
        """What does not fit is refused with ValueError, and nothing changes."""
        k, v = new_tokens(max(held, 1))
        if held:
            self.run(lambda: cache.append(k, v))
        case = f"capacity {self.capacity}, {held} held, {extra} more"
        try:
            cache.append(*new_tokens(extra))
        except NotImplementedError:
            raise
        except ValueError:
            pass
        except Exception as error:
            self.explain_error(error, case, full=held == self.capacity)
        else:
            self.fail(
                "overflow",
                seen=f"{case}: taken without a word",
                cause="no test for room: tokens were dropped, or wrote over old ones, or more memory was taken",
                look="the start of append: raise ValueError when the tokens do not fit",
            )
        got = read_pair(type(self), cache)[0] if held else k
        if getattr(cache, "seq_len", None) != held or not torch.equal(got, k):
            self.fail(
                "half-done",
                seen=f"{case}: refused, but the cache was changed",
                cause="seq_len or the memory was changed before the test for room",
                look="the order in append: test first, then write",
            )

    def explain_error(self, error: Exception, case: str, *, full: bool) -> None:
        """Tell a test with another error from a write that failed."""
        if not isinstance(error, RuntimeError):
            self.fail(
                "other-error",
                seen=f"{case}: {type(error).__name__}, not ValueError",
                cause="the tokens are refused, but with an error that the caller does not expect; `assert` is also "
                "skipped under python -O",
                look="the line that refuses: raise ValueError(...), as the docstring promises",
            )
        self.fail(
            "overflow" if full else "room-for-some",
            seen=f"{case}: the write itself failed ({type(error).__name__}), no ValueError came before it",
            cause="no test for room" if full else "a test whether the cache is full, not whether all that comes fits",
            look="the start of append: compare seq_len + new tokens with the capacity before anything changes",
        )

    def check_memory(self, cache: Any) -> None:
        """One allocation each for K and V; later appends move only what is new; read() copies nothing."""
        k, v = new_tokens(1)
        self.run(lambda: cache.append(k, v))
        with ledger() as work:
            self.run(lambda: cache.append(k, v))
        new = k.nbytes + v.nbytes
        if work.bytes_copied > new or work.bytes_allocated > new:  # a few indices may be made, K and V may not
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


def apart(now: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor]) -> bool:
    """Whether two reads show different memory. `before` is still alive, so its address cannot have been used again."""
    return any(
        a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr() for a, b in zip(now, before, strict=True)
    )
