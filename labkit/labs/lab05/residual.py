"""05.5: groups of tokens quantized once, and a residual window in full precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from labkit.course.checks.caches import check_methods, read_pair
from labkit.course.checks.held import bytes_behind, tensors_behind
from labkit.course.checks.tensors import shifted
from labkit.course.exercise import Exercise, NotYet
from labkit.labs.lab05.bookkeeping import check_given, check_read
from labkit.labs.lab05.layers import SHAPE, Recorder, Shape, fits, is_restored, numbered_pair
from labkit.labs.lab05.references import QuantizedLayer
from labkit.ledger import memory_of

CASES: tuple[tuple[int, int, tuple[int, ...], Shape], ...] = (  # group_size, residual_length, tokens of each append
    (4, 3, (1, 1, 5, 4, 6), SHAPE),  # appends, groups and what is left over have different sizes
    (2, 3, (1,) * 10, SHAPE),
    (4, 3, (20, 1, 1, 1), SHAPE),
    (4, 3, (5, 9, 2, 6), (1, 2, 7)),
    (2, 5, (3, 8, 1, 1, 1, 1), (3, 1, 4)),
    (3, 7, (7, 2, 1, 13), SHAPE),
    (1, 2, (1, 1, 5), SHAPE),
    (5, 5, (9, 1, 1, 4, 1), SHAPE),  # one token short of a group and the residual; just both; one more
    (32, 32, (1, 63, 1), (1, 1, 6)),
    (64, 100, (3000, 1, 75, 1), (1, 1, 2)),
)


class QuantizedLayerExercise(Exercise):
    """The bookkeeping of a quantized cache."""

    id, title, minutes, difficulty = "05.5", "Groups and a residual window", 12, 4
    needs = ("05.3",)
    reference = QuantizedLayer
    why = (
        "How many groups there are depends on the tokens alone: as long as a group and the residual fit into what"
        " waits, the oldest group goes. clone() lets go of the memory that a slice would keep."
    )
    hints = (
        "At every moment the tokens fall in two: whole groups, oldest first, and those that wait. After n tokens, "
        "how many groups are there, and how many tokens wait? In what pieces they came does not matter.",
        "append: join what waits and what comes, then, while at least group_size + residual_length tokens are there, "
        "quantize the oldest group_size of them and go on with the others. read: restore each group, then what waits.",
        "size = self.group_size\nwhile k.shape[2] >= size + self.residual_length:\n"
        "    self.groups.append(self.quantize_group(k[:, :, :size], v[:, :, :size]))\n"
        "    k, v = k[:, :, size:], v[:, :, size:]\nself.waiting = k.clone(), v.clone()",
    )
    hints_for: ClassVar = {
        "quantized-twice": "What quantize_group returned is never opened again in append: only read restores it.",
        "quantized-again": "After a group is quantized, its tokens must leave what waits.",
        "one-group-per-append": "A prompt of 20 tokens holds several groups. Which keyword repeats an `if`?",
        "residual-not-kept": "With 4 tokens held and residual_length 3, only one token is old enough. Is one a group?",
        "waits-too-long": "As soon as group_size + residual_length tokens wait, a group can go.",
        "tokens-lost": "After every append, groups and waiting tokens together are all that ever came.",
        "tokens-twice": "When a group is cut off K, what happens to V?",
        "sizes-swapped": "In which order does __init__ get the two sizes?",
        "joined-along": "K is [batch, num_kv_heads, tokens, head_dim]. Which dimension grows when a token comes?",
        "callers-tensor": "A slice or a plain assignment is the same memory as the caller's. clone() is not.",
        "group-overwritten": "A slice of a buffer is the buffer's memory. Who writes there next?",
        "slice-keeps-all": "x[:, :, 100:] is small, and the memory behind it is that of x.",
        "keeps-restored": "Restored numbers are as large as those that came. Which form is small?",
        "no-residual": "x[:, :, :-0] holds nothing. Count from the front.",
        "read-order": "Which tokens are older, those in groups or those that wait?",
    }

    def examine(self, answer: Callable) -> None:
        """What is quantized and what is read after every append, in many pieces; then whose memory, and how much."""
        check_methods(type(self), self.made(answer, 4, 3)[0])
        self.check_apart(answer)
        for group_size, residual_length, pieces, shape in CASES:
            self.follow(answer, group_size, residual_length, pieces, shape)
        for group_size in (4, 1):
            self.check_without_residual(answer, group_size)
        self.check_callers_tensor(answer)
        self.check_given_stays(answer)
        self.check_memory(answer)
        for dtype in (torch.bfloat16, torch.float64):
            for contiguous in (True, False):
                self.check_script(answer, dtype, contiguous=contiguous)

    def made(
        self, answer: Callable, group_size: int, residual_length: int, *, copies: bool = True
    ) -> tuple[Any, Recorder]:
        """A cache, and the quantizer that it was given, which copies or keeps what comes."""
        recorder = Recorder(type(self), copies=copies)
        make = partial(answer, group_size, residual_length, recorder.quantize_group, recorder.restore)
        return self.run(make), recorder

    def check_apart(self, answer: Callable) -> None:
        """Two caches in turn: one that has too few tokens for a group reads what it was given. Other trouble is for the
        cases to tell."""
        caches = [self.made(answer, 4, 3)[0] for _ in range(2)]
        held, more = [0, 0], False
        try:
            for which, count in ((0, 1), (1, 1), (0, 8), (1, 1)):
                caches[which].append(*numbered_pair(held[which], count))
                held[which] += count
                pair = caches[which].read()
                if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                    return
                more |= held[which] < 4 and fits(pair[0]) and pair[0].shape[2] > held[which]
        except (NotYet, NotImplementedError):
            raise
        except Exception:
            return
        if more:
            self.fail(
                "shared-between-caches",
                seen="a cache that was given one token or two reads more: those of another cache turned up",
                cause="tokens are kept on the class, in a default argument or in a global, not on the instance",
                look="__init__: everything a cache keeps belongs on self",
            )

    def follow(
        self, answer: Callable, group_size: int, residual_length: int, pieces: Sequence[int], shape: Shape = SHAPE
    ) -> None:
        """Append tokens in these pieces; check after each."""
        cache, recorder = self.made(answer, group_size, residual_length)
        held = 0
        reads: list[tuple[Tensor, Tensor]] = []  # what was read, each beside a copy
        for count, piece in enumerate(pieces, 1):
            groups_before = len(recorder.given)
            k, v = numbered_pair(held, piece, shape=shape)
            kept = k.clone(), v.clone()
            self.run(partial(cache.append, k, v))
            self.check_unchanged(kept, (k, v))
            held += piece
            groups = max(0, held - residual_length) // group_size
            where = f"group_size {group_size}, residual_length {residual_length}, tokens: {held}, last append: {piece}"
            quantized, got, trouble = len(recorder.given), None, None
            try:
                got = read_pair(type(self), cache)
            except NotYet as not_yet:
                trouble = not_yet
            if len(recorder.given) > quantized:
                self.fail(
                    "quantizes-in-read",
                    seen=f"{where}: read() called quantize_group",
                    cause="tokens are quantized when they are read, so they are held in full precision until then, "
                    "or quantized at every read",
                    look="append quantizes, read restores",
                )
            if got is not None:
                self.check_read_again(cache, got, where)
                if got[0].dim() == 4 and got[0].shape[2] < held and quantized < groups:  # lost, not waiting
                    check_read(type(self), got, held, quantized * group_size, where, shape, group_size)
            sizes = (group_size, residual_length)
            check_given(type(self), recorder.given, sizes, groups, groups_before, pieces[:count], where, shape)
            if got is None and groups == 0 and trouble and trouble.finding.diagnosis == "raised":
                self.fail(
                    "read-before-a-group",
                    seen=f"{where}: read() stopped with {trouble.finding.seen}",
                    cause="no group is complete yet, and read() counts on one",
                    look="read(): what it joins when self.groups is empty",
                )
            if got is None:
                assert trouble is not None
                raise trouble
            check_read(type(self), got, held, groups * group_size, where, shape, group_size)
            reads += [(x, x.clone()) for x in got]
            self.check_earlier_reads(reads, where)

    def check_earlier_reads(self, reads: list[tuple[Tensor, Tensor]], where: str) -> None:
        """What was read before still holds what it held."""
        if not all(torch.equal(now, then) for now, then in reads):
            self.fail(
                "result-overwritten",
                seen=f"{where}: what read() gave after an earlier append has changed since",
                cause="read() gave a view of memory that later appends write into",
                look="what read() returns while no group is complete, or what waits: torch.cat and clone() make copies",
            )

    def check_without_residual(self, answer: Callable, group_size: int) -> None:
        """residual_length 0: at times no token waits."""
        try:
            self.follow(answer, group_size, 0, (1, 1, 1, 1, 1, 6))
        except NotYet as not_yet:
            self.fail(
                "no-residual",
                seen=f"right with a residual, not without: {not_yet.finding.seen}",
                cause="[:-0] is empty and [-0:] is everything, and at times no token waits",
                look="where residual_length stands in a slice, and read() when nothing waits",
            )

    def check_callers_tensor(self, answer: Callable) -> None:
        """The caller writes over its tensors after an append, as a model does that uses its buffers again."""
        cache, _ = self.made(answer, 4, 3)
        for first, count in ((0, 2), (2, 3)):
            k, v = numbered_pair(first, count)
            self.run(partial(cache.append, k, v))
            k.fill_(-1), v.fill_(-1)
            if not all(map(torch.equal, read_pair(type(self), cache), numbered_pair(0, first + count))):
                self.fail(
                    "callers-tensor",
                    seen="the caller wrote over the tensors it had appended, and the cache's tokens changed",
                    cause="what waits is the caller's tensor, or a slice of it, not a copy",
                    look="where append keeps what waits: clone() it",
                )

    def check_given_stays(self, answer: Callable) -> None:
        """A quantizer that keeps the very tensors it is given, as one does that changes nothing: they stay as they
        were."""
        for pieces in ((1,) * 20, (6, 9, 1, 4), (20, 1, 1, 30)):
            cache, recorder = self.made(answer, 4, 3, copies=False)
            held = 0
            for piece in pieces:
                self.run(partial(cache.append, *numbered_pair(held, piece)))
                held += piece
                for number, (form, given) in enumerate(zip(recorder.forms, recorder.given, strict=True)):
                    if not (torch.equal(form.k, given[0]) and torch.equal(form.v, given[1])):
                        self.fail(
                            "group-overwritten",
                            seen=f"group {number} was given to quantize_group, which kept the very tensors: after "
                            f"{held} tokens they hold others than they did",
                            cause="they are views of memory that append writes into again",
                            look="the call of quantize_group: clone() what it is given of a buffer that is used again",
                        )

    def check_read_again(self, cache: Any, got: tuple[Tensor, Tensor], where: str) -> None:
        """A second read gives the same."""
        try:
            again = read_pair(type(self), cache)
            seen = "" if all(map(torch.equal, got, again)) else f"and a second read() of {again[0].shape[2]}, or others"
        except NotYet as not_yet:
            seen = f"and a second read() stops with {not_yet.finding.seen}"
        if seen:
            self.fail("read-changes", seen=f"{where}: read() gives K of {got[0].shape[2]} tokens, {seen}",
                      cause="read() changes what the cache holds",
                      look="read(): it joins, and assigns to no attribute")  # fmt: skip

    def check_script(self, answer: Callable, dtype: torch.dtype, *, contiguous: bool) -> None:
        """Random numbers in random pieces, beside the reference. contiguous, or laid out as a model hands them over."""
        random = torch.Generator().manual_seed(shifted(1))
        caches = [self.made(QuantizedLayer, 3, 5), self.made(answer, 3, 5)]
        where = f"random {str(dtype).removeprefix('torch.')} K and V in random pieces, group_size 3, residual_length 5"
        for step in range(12):
            new = int(torch.randint(1, 9, (1,), generator=random))
            both = torch.randn(2, 2, new, 3, 8, generator=random, dtype=torch.float64).to(dtype).transpose(2, 3)
            both = both.contiguous() if contiguous else both
            caches[0][0].append(both[0], both[1])
            try:
                self.run(partial(caches[1][0].append, both[0], both[1]))
            except NotYet as not_yet:
                if contiguous or not_yet.finding.diagnosis != "raised":
                    raise
                self.fail("layout", seen=f"{where}: {not_yet.finding.seen}. Contiguous in memory, they were taken",
                          cause="the code counts on the order in memory: view, or a reshape that assumes it",
                          look="slices and cat, along dim=2")  # fmt: skip
            (want, right), (cache, recorder) = caches
            for name, x, wanted in zip("KV", read_pair(type(self), cache), want.read(), strict=True):
                self.same(x, wanted, what=f"{where}, append {step + 1}: {name}")
            for pair, rights in zip(recorder.given, right.given, strict=False):
                for name, x, wanted in zip("KV", pair, rights, strict=True):
                    self.same(x, wanted, what=f"{where}: {name} of a group")

    def check_memory(self, answer: Callable) -> None:
        """After a long prompt, no more than a few groups' worth of tensors is alive; nor after the first token, nor
        after what was read is gone."""
        cache, recorder = self.made(answer, 4, 3)
        self.run(partial(cache.append, *numbered_pair(0, 1)))
        token = sum(x.nbytes for x in numbered_pair(0, 1))
        if (held_bytes := bytes_behind(cache, without=[recorder])) > 4 * (4 + 3) * token:
            self.fail(
                "room-unused",
                seen=f"group_size 4, residual_length 3: after 1 token it holds the bytes of {held_bytes // token}",
                cause="room is made for more tokens than ever wait: group_size + residual_length - 1 at most",
                look="where the memory is made",
            )
        cache, recorder = self.made(answer, 4, 3)
        k, v = numbered_pair(0, 120)
        self.run(partial(cache.append, k, v))
        limit = 3 * (4 + 3) * (k.nbytes + v.nbytes) // 120
        held = tensors_behind(cache, without=[recorder])
        behind, prompt = bytes_behind(cache, without=[recorder]), k.nbytes + v.nbytes
        waiting = sum(x.nbytes for x in held)
        if waiting <= limit < sum({memory_of(x): x.untyped_storage().nbytes() for x in held}.values()):
            self.fail(
                "slice-keeps-all",
                seen="a prompt of 120 tokens: few wait, but the memory behind them is that of "
                f"{behind / prompt:.0%} of the prompt",
                cause="what waits is a slice, and a slice keeps alive all that it was cut from",
                look="where append keeps what waits: clone() it",
            )
        case = "a prompt of 120 tokens, 4 of which should wait"
        self.check_kept(cache, recorder, limit, prompt, case)
        read_pair(type(self), cache)
        self.check_kept(cache, recorder, limit, prompt, f"{case}, after a read()")

    def check_kept(self, cache: Any, recorder: Recorder, limit: int, prompt: int, case: str) -> None:
        """No more than `limit` bytes in full precision, of the `prompt` bytes that came."""
        if (behind := bytes_behind(cache, without=[recorder])) <= limit:
            return
        seen = f"{case}: the cache holds {behind / prompt:.0%} of its bytes in full precision"
        if any(map(is_restored, tensors_behind(cache, without=[recorder]))):
            self.fail(
                "keeps-restored",
                seen=seen,
                cause="what restore gave back is kept: as many numbers as came, in full precision again",
                look="what the cache keeps: what quantize_group returned. read() restores it each time",
            )
        self.fail(
            "keeps-originals",
            seen=seen,
            cause="tokens that were quantized are held in full precision all the same",
            look="append: once a group is quantized, its tokens are kept in no other form",
        )
