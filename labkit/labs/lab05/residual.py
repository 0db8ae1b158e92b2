"""05.5: groups of tokens quantized once, and a residual window in full precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch

from labkit.course.checks.caches import check_methods, read_pair
from labkit.course.checks.held import bytes_behind, tensors_behind
from labkit.course.exercise import Exercise, NotYet
from labkit.labs.lab05.bookkeeping import check_given, check_read
from labkit.labs.lab05.layers import Recorder, numbered_pair
from labkit.labs.lab05.references import QuantizedLayer

CASES = (  # group_size, residual_length, tokens of each append
    (4, 3, (1,) * 13),
    (4, 3, (20, 1, 1, 1)),
    (4, 3, (5, 9, 2, 6)),
    (2, 5, (3, 8, 1, 1, 1, 1)),
    (3, 7, (7, 2, 1, 13)),
    (1, 2, (1, 1, 5)),
)


class QuantizedLayerExercise(Exercise):
    """The bookkeeping of a quantized cache."""

    id, title, minutes, difficulty = "05.5", "Groups and a residual window", 12, 4
    needs = ("05.3",)
    reference = QuantizedLayer
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
        "callers-tensor": "A slice or a plain assignment is the same memory as the caller's. clone() is not.",
        "slice-keeps-all": "x[:, :, 100:] is small, and the memory behind it is that of x.",
        "no-residual": "x[:, :, :-0] holds nothing. Count from the front.",
        "read-order": "Which tokens are older, those in groups or those that wait?",
    }

    def examine(self, answer: Callable) -> None:
        """What is quantized and what is read after every append, in many pieces; then whose memory, and how much."""
        check_methods(type(self), self.made(answer, 4, 3)[0])
        self.check_apart(answer)
        for group_size, residual_length, pieces in CASES:
            self.follow(answer, group_size, residual_length, pieces)
        for group_size in (4, 1):
            self.check_without_residual(answer, group_size)
        self.check_callers_tensor(answer)
        self.check_memory(answer)
        k, v = numbered_pair(0, 2, torch.bfloat16)
        cache, _ = self.made(answer, 4, 3)
        self.run(partial(cache.append, k, v))
        self.same(read_pair(type(self), cache)[0], k, what="K of two bfloat16 tokens")

    def made(self, answer: Callable, group_size: int, residual_length: int) -> tuple[Any, Recorder]:
        """A cache, and the quantizer that it was given."""
        recorder = Recorder(type(self))
        make = partial(answer, group_size, residual_length, recorder.quantize_group, recorder.restore)
        return self.run(make), recorder

    def check_apart(self, answer: Callable) -> None:
        """A second cache holds its own tokens only. Trouble of other kinds is for the cases to tell."""
        first, second = self.made(answer, 4, 3)[0], self.made(answer, 4, 3)[0]
        tokens = 1
        try:
            first.append(*numbered_pair(0, 8))
            second.append(*numbered_pair(8, 1))
            tokens = second.read()[0].shape[2]
        except (NotYet, NotImplementedError):
            raise
        except Exception:
            return
        if tokens > 1:
            self.fail(
                "shared-between-caches",
                seen="a new cache that was given 1 token reads more: tokens of another cache turned up",
                cause="groups are kept on the class, in a default argument or in a global, not on the instance",
                look="__init__: everything a cache keeps belongs on self",
            )

    def follow(self, answer: Callable, group_size: int, residual_length: int, pieces: Sequence[int]) -> None:
        """Append tokens in these pieces; check after each."""
        cache, recorder = self.made(answer, group_size, residual_length)
        held = 0
        for piece in pieces:
            groups_before = len(recorder.given)
            k, v = numbered_pair(held, piece)
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
            check_given(type(self), recorder.given, group_size, groups, groups_before, piece, where)
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
            check_read(type(self), got, held, groups * group_size, where)

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

    def check_memory(self, answer: Callable) -> None:
        """After a long prompt, no more than a few groups' worth of tensors is alive."""
        cache, recorder = self.made(answer, 4, 3)
        k, v = numbered_pair(0, 120)
        self.run(partial(cache.append, k, v))
        limit = 3 * (4 + 3) * (k.nbytes + v.nbytes) // 120
        held = tensors_behind(cache, without=[recorder])
        if sum(x.nbytes for x in held) > limit:
            self.fail(
                "keeps-originals",
                seen="a prompt of 120 tokens, 4 of which should wait: the cache holds "
                f"{sum(x.nbytes for x in held) / (k.nbytes + v.nbytes):.0%} of its bytes in full precision",
                cause="quantized tokens are kept as they came as well: more memory than without quantization",
                look="append: once a group is quantized, its tokens are kept in no other form",
            )
        if bytes_behind(cache, without=[recorder]) > limit:
            self.fail(
                "slice-keeps-all",
                seen="a prompt of 120 tokens: few wait, but the memory behind them is that of "
                f"{bytes_behind(cache, without=[recorder]) / (k.nbytes + v.nbytes):.0%} of the prompt",
                cause="what waits is a slice, and a slice keeps alive all that it was cut from",
                look="where append keeps what waits: clone() it",
            )
