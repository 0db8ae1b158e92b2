"""05.1: numbers as codes, a scale and a zero point."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from labkit.course.checks.effort import check_stays, effort_of
from labkit.course.checks.suspects import Suspect, accuse
from labkit.course.checks.tensors import near
from labkit.course.checks.trials import LAYOUTS
from labkit.course.exercise import Exercise, NotYet
from labkit.labs.lab05.references import quantize

Parts = tuple[Tensor, Tensor, Tensor]
STEPS = "the scale: (high - low) / (2**nbits - 1), the number of steps between the first code and the last"
RULES: tuple[tuple[str, Callable[[int], float], str, str], ...] = (  # into how many steps a range was cut
    ("fixed-bits", lambda nbits: 15, "15, the last code of 4 bits, was written down", "2**nbits - 1"),
    ("fixed-bits", lambda nbits: 255, "255, the last code of 8 bits, was written down", "2**nbits - 1"),
    ("one-level-too-many", lambda nbits: 2**nbits, "the range was cut into 2**nbits steps, so that the greatest number "
     "gets code 2**nbits, which does not exist", STEPS),
    ("half-the-codes", lambda nbits: 2 ** (nbits - 1), "the range was cut as for signed codes, half of which lie below "
     "0", STEPS),
    ("half-the-codes", lambda nbits: 2 ** (nbits - 1) - 1, "the range was cut as for signed codes, half of which lie "
     "below 0", STEPS),
    ("levels-miscounted", lambda nbits: nbits, "nbits was taken for the number of steps", STEPS),
    ("levels-miscounted", lambda nbits: nbits - 1, "nbits was taken for the number of levels", STEPS),
    ("levels-miscounted", lambda nbits: 2 * nbits, "2 * nbits stands where 2**nbits belongs", STEPS),
    ("levels-miscounted", lambda nbits: 2 * nbits - 1, "2 * nbits stands where 2**nbits belongs", STEPS),
    ("levels-miscounted", lambda nbits: nbits**2 - 1, "nbits**2 stands where 2**nbits belongs", STEPS),
    ("levels-miscounted", lambda nbits: 2**nbits - 2, "one step too few: the fence has 2**nbits posts", STEPS),
    ("xor", lambda nbits: 2 ^ (nbits - 1), "in Python ^ is exclusive or; powers are **", "2**nbits - 1"),
    ("xor", lambda nbits: (2 ^ nbits) - 1, "in Python ^ is exclusive or; powers are **", "2**nbits - 1"),
    ("range-not-divided", lambda nbits: 1, "the scale is the whole range", STEPS),
)  # fmt: skip


class Quantize(Exercise):
    """Asymmetric quantization of groups, rounded to the nearest code."""

    id, title, minutes, difficulty = "05.1", "Numbers as codes", 6, 2
    reference = staticmethod(quantize)
    why = (
        "2**nbits codes have 2**nbits - 1 steps between them, so the scale is the range over that, and the "
        "nearest code is at most half a step off. Where the range is 0 any divisor will do, since 0 steps are 0."
    )
    hints = (
        "Codes are evenly spaced marks from the least number of a group to the greatest. With 16 marks, how many steps "
        "lie between the first and the last?",
        "zero is the least number of the group, scale the range divided by the number of steps. A code says how many "
        "steps a number lies above zero, to the nearest. A range of 0 must not be divided by.",
        "low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)\nscale = (high - low) / (2**nbits - 1)\n"
        "steps = (x - low) / torch.where(scale == 0, 1.0, scale)\n"
        "# round, clamp to the codes that there are, then uint8; zero is low",
    )
    hints_for: ClassVar = {
        "levels-miscounted": "4 bits make 2 * 2 * 2 * 2 codes. How many steps lie between the first and the last?",
        "xor": "Try 2 ^ 4 in a cell of its own.",
        "signed": "uint8 counts from 0. What does it make of -1?",
        "clipped": "What is the last code of 8 bits? And of 4?",
        "rounded-up": "Which code is nearest to 6.1?",
        "truncated": "`.to(torch.uint8)` cuts off what is behind the point. Which code is nearest to 6.9?",
        "one-level-too-many": "A fence of 16 posts has how many gaps?",
        "symmetric": "A group from 4 to 10 uses how many of its codes if code 0 stands for 0?",
        "abs-max": "In a group from 4 to 10, how far is it from the least number to the greatest?",
        "zero-is-a-code": "The docstring's formula is codes * scale + zero. What must zero be for code 0 to give the "
        "least number?",
        "constant-group": "What is the scale of a group of equal numbers, and what is 0 / 0?",
        "code-wraps": "How often does a scale that was rounded down fit into the range that it was made of?",
        "small-group": "What does your eps do to a group whose scale is smaller than eps?",
        "one-scale-for-all": "`x.min()` sees every group at once. Which method takes a dimension?",
    }

    def examine(self, answer: Callable) -> None:
        """Groups to follow by hand; random ones of many sizes, in every number of bits; equal numbers alone and among
        others; small and large numbers; other layouts and dtypes."""
        by_hand = torch.tensor([[-0.65, -2.0, -0.48, 1.0], [10.0, 5.1, 7.25, 4.0]])
        self.judge(answer, by_hand, 4)
        self.judge(answer, by_hand.flip(0, 1) + 0.3, 4)
        for nbits in (4, 8, 2):
            x = torch.randn(2, 3, 9)
            x[0, 0, 4] = 40.0
            x[1] += torch.tensor([20.0, -20.0, 3.0])[:, None]
            self.judge(answer, x, nbits)
        self.judge_equal_numbers(answer)
        self.judge_small_numbers(answer)
        self.judge_rounded_scales(answer)
        for shape, nbits, factor in (((11,), 4, 1.0), ((2, 3, 4, 5), 2, 1.0), ((3, 700), 8, 1e6), ((4, 2), 4, 1e-2)):
            self.judge(answer, torch.randn(shape) * factor + factor, nbits)
        for change, words in LAYOUTS:
            self.judge_layout(answer, change(torch.randn(3, 4, 7)), words)
        for dtype, nbits in ((torch.float64, 8), (torch.float16, 8), (torch.bfloat16, 4)):
            self.judge(answer, torch.randn(5, 12).to(dtype), nbits)
        self.judge_bfloat16(answer)
        self.judge_float64(answer)
        check_stays(type(self), effort_of(lambda: self.call(answer, torch.randn(9, 12), 8)))

    def judge_bfloat16(self, answer: Callable) -> None:
        """8 bits in a dtype of 8: groups whose steps, each rounded, stay below the last code: uint8 has no 256."""
        x = torch.randn(200, 12).bfloat16()
        low, scale = x.amin(-1, keepdim=True), quantize(x, 8)[1]
        self.judge(answer, x[((x - low) / scale).amax(-1) < 255], 8)

    def judge_float64(self, answer: Callable) -> None:
        """Numbers that float32 cannot tell apart, and equal ones that it does not hold."""
        x = 1e6 + 1e-3 * torch.randn(5, 12, dtype=torch.float64)
        x[3:] = torch.tensor([[0.1], [-1 / 3]], dtype=torch.float64)
        codes, scale, zero = self.parts(answer, x, 8)
        if not broken(x[:3], (codes[:3], scale[:3], zero[:3]), 8).any() and torch.equal(
            (codes * scale + zero)[3:], x[3:]
        ):
            return
        if torch.equal(zero, x.float().amin(-1, keepdim=True).double()):
            self.fail("precision", seen="float64 numbers of 1,000,000 that differ by thousandths, and groups of 0.1: "
                      "zero is the least number rounded to float32",
                      cause="on the way, numbers were turned into float32 and back",
                      look="every dtype that is written down: take it from x")  # fmt: skip
        if not torch.equal((codes * scale + zero)[3:], x[3:]):
            self.fail("constant-group", seen="groups of equal float64 numbers do not come back exactly",
                      cause="the special case for a scale of 0 does not give the number back",
                      look="zero: the least number itself; the scale: 0")  # fmt: skip
        self.explain(answer, x[:3], (codes[:3], scale[:3], zero[:3]), 8, 0)

    def judge(self, answer: Callable, x: Tensor, nbits: int) -> None:
        """The properties that the docstring promises of groups."""
        got = self.parts(answer, x, nbits)
        if (wrong := broken(x, got, nbits)).any():
            self.explain(answer, x, got, nbits, int(wrong.flatten().int().argmax()))

    def judge_layout(self, answer: Callable, x: Tensor, words: str) -> None:
        """Numbers that lie in memory in another order than their dimensions."""
        try:
            wrong = broken(x, self.parts(answer, x, 4), 4).any()
            seen = "other numbers"
        except NotYet as not_yet:
            if not_yet.finding.diagnosis != "raised":
                raise
            wrong, seen = torch.tensor(True), not_yet.finding.seen
        if wrong:
            self.fail("layout", seen=f"x {list(x.shape)}, {words}: {seen}. Contiguous in memory, groups were right",
                      cause="the code counts on the order in memory: view, or a reshape that assumes it",
                      look="reshape instead of view, and the last dimension by its place: -1")  # fmt: skip

    def parts(self, answer: Callable, x: Tensor, nbits: int) -> Parts:
        """Codes, scale and zero, when they are tensors of the right kind; a finding otherwise."""
        got = self.call(answer, x, nbits)
        if not isinstance(got, (tuple, list)) or len(got) != 3:
            self.fail("not-three", seen=f"a {type(got).__name__} came back, not three tensors",
                      cause="codes alone, or the numbers as they come back, were returned",
                      look="the return: codes, scale, zero")  # fmt: skip
        codes, scale, zero = got
        if any(isinstance(part, Tensor) and part.dtype == torch.uint8 and part.shape == x.shape for part in got[1:]):
            if not isinstance(codes, Tensor) or codes.dtype != torch.uint8:
                self.fail("swapped", seen="the codes did not come first", cause="another order of the three results",
                          look="the return: codes, scale, zero")  # fmt: skip
        if isinstance(codes, Tensor) and codes.shape == x.shape and codes.dtype != torch.uint8:
            self.fail("codes-dtype", seen=f"the codes are {codes.dtype}; they should be torch.uint8",
                      cause="the last step, which makes bytes of the rounded numbers, is missing or names another type",
                      look="the last step: .to(torch.uint8)")  # fmt: skip
        want = quantize(x, nbits)
        self.like(codes, want[0], what="the codes")
        for name, part, right in (("scale", scale, want[1]), ("zero", zero, want[2])):
            self.check_metadata(name, part, right, x)
        return codes, scale, zero

    def check_metadata(self, name: str, part: Any, want: Tensor, x: Tensor) -> None:
        """One scale or zero point per group, of the dtype of x."""
        if isinstance(part, Tensor):
            shape, along = part.shape, range(x.dim() - 1)
            others = [x.amin(dim, keepdim=keep).shape for dim in along for keep in (True, False)]
            known = [
                Suspect("zero-is-a-code", name == "zero" and not part.is_floating_point(),
                        "the zero point was rounded to the code that stands for 0",
                        "the docstring's formula: codes * scale + zero, so zero is one of the numbers"),
                Suspect("one-scale-for-all", part.numel() == 1 < want.numel(),
                        "min and max were taken of the whole tensor", "amin and amax of the last dimension: dim=-1"),
                Suspect("no-keepdim", shape == want.shape[:-1] != want.shape, "the group's dimension was dropped",
                        "keepdim=True: codes [..., group] and scale [..., 1] must broadcast"),
                Suspect("wrong-dimension", shape != want.shape and shape in others,
                        "min and max were taken along another dimension", "a group is the last: dim=-1"),
            ]  # fmt: skip
            accuse(type(self), known, f"{name} of {part.dtype} {list(shape)} for x {list(x.shape)}")
        self.like(part, want, what=f"{name} for {x.dtype} numbers")

    def explain(self, answer: Callable, x: Tensor, got: Parts, nbits: int, which: int) -> None:
        """Name the rule that gives these codes, scales and zero points. `which`: the group to show."""
        codes, scale, zero = got[0].long(), got[1].double(), got[2].double()
        x, last = x.double(), 2**nbits - 1
        low, high, largest = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), x.abs().amax(-1, keepdim=True)
        right = (high - low) / last
        one, shown = [part.flatten(0, -2)[which] if part.dim() > 1 else part for part in (x, codes)]
        where = f"a group from {one.min().item():.3g} to {one.max().item():.3g} in {nbits} bits"
        values = [part.flatten()[which].item() for part in (scale, zero, right, low)]
        seen = "{}: scale {:.3g}, zero {:.3g}; scale {:.3g}, zero {:.3g} is right".format(where, *values)
        by_largest = near(scale, high / last) or near(scale, (largest - low) / last)
        by_largest |= any(near(scale, largest / n) for n in (last, last + 1, last / 2, last // 2, last // 2 + 1) if n)
        no_zero = bool((zero == 0).all())
        everything = near(scale, ((x.max() - x.min()) / last).expand_as(scale))
        accuse(type(self), [
            Suspect("swapped", near(zero, right) and near(scale, low), "scale and zero changed places", "the return"),
            Suspect("one-scale-for-all", x.dim() > 1 and everything, "min and max were taken of the whole tensor",
                    "amin and amax of the last dimension: dim=-1"),
            *self.suspected_steps(answer),
            Suspect("symmetric", no_zero and by_largest,
                    "scale from the largest absolute value, no zero point: codes of numbers that do not occur are "
                    "wasted", "the docstring: the least number gets code 0"),
            Suspect("abs-max", by_largest,
                    "the scale was taken from the largest absolute value, or from the greatest number", STEPS),
            Suspect("zero-rounded", near(scale, right) and near(zero / right, (zero / right).round())
                    and bool(((zero - low).abs() < 0.6 * right).all()) and not near(zero, low),
                    "the zero point was rounded to a whole number of scales, as integer kernels do",
                    "zero: the least number itself, so that it comes back exactly"),
            Suspect("scale-inverted", near(scale, 1 / right), "steps per number in place of numbers per step",
                    "the docstring's formula: codes are multiplied by scale"),
            Suspect("scale-sign", near(scale, -right) and not near(zero, high), "low - high stands for high - low",
                    STEPS),
        ], seen)  # fmt: skip
        if near(scale.abs(), right):
            as_codes = [sign * low / right for sign in (1, -1)]
            middles = (
                (low + high) / 2,
                x.mean(-1, keepdim=True),
                x.median(-1, keepdim=True).values,
                low + right * (last // 2 + 1),
            )
            accuse(type(self), [
                Suspect("zero-is-a-code", any(near(zero, code) or near(zero, code.round()) for code in as_codes),
                        "the zero point was given in steps",
                        "the docstring: codes * scale + zero; zero is one of the numbers, not a code"),
                Suspect("zero-sign", near(zero, -low), "zero was made to be subtracted", "the docstring: + zero"),
                Suspect("reversed", near(zero, high), "codes were counted down from the greatest number",
                        "the docstring: the least number gets code 0"),
                Suspect("no-zero", no_zero, "zero was left at 0", "what code 0 stands for: the least number"),
                Suspect("zero-is-the-middle", any(near(zero, middle) for middle in middles),
                        "zero is the middle of the group", "what code 0 stands for: the least number"),
            ], seen)  # fmt: skip
        self.explain_codes(x, codes, right, low, f"{where}: codes {str(shown.tolist())[:60]}", last)

    def suspected_steps(self, answer: Callable) -> list[Suspect]:
        """The rules by which the answer cuts every range into as many steps as it does, in 4, 8 and 2 bits alike."""
        used = {}
        for nbits in (4, 8, 2):
            x = torch.randn(3, 9, dtype=torch.float64)
            try:
                scale = answer(x.clone(), nbits)[1].double()
            except Exception:  # what it raises there has its own case
                continue
            steps = ((x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / scale).flatten()
            used[nbits] = steps.mean().item() if near(steps, steps.mean().expand_as(steps)) else float("nan")
        return [
            Suspect(diagnosis, bool(used) and all(abs(n - rule(nbits)) < 1e-3 * abs(n) for nbits, n in used.items()),
                    cause, look)
            for diagnosis, rule, cause, look in RULES
        ]  # fmt: skip

    def explain_codes(self, x: Tensor, codes: Tensor, scale: Tensor, low: Tensor, seen: str, last: int) -> None:
        """Scale and zero are right, or unknown; name the rule that gives these codes."""
        unsubtracted, steps = (x / scale).round().long(), (x - low) / scale
        rounded = steps.round().long()
        accuse(type(self), [
            Suspect("truncated", torch.equal(codes, ((x - low) / scale + 1e-5).long()),
                    "fractions were cut off, so that errors reach a whole scale", "round() before uint8"),
            Suspect("zero-not-subtracted",
                    any(torch.equal(codes, c) for c in (unsubtracted % 256, unsubtracted.clamp(0, 255),
                    unsubtracted.clamp(0, last))), "x was divided as it is: numbers below 0 have no code",
                    "x - low, then divide"),
            Suspect("rounded-up", torch.equal(codes, (steps - 1e-5).ceil().long()),
                    "codes were rounded up, so that errors reach a whole scale", "round(), to the nearest"),
            Suspect("clipped", any(torch.equal(codes, rounded.clamp(max=most)) for most in {15, last // 2, last - 1} if
                    most < last), "codes were clamped below the last one", f"the clamp: 0 to {last}"),
            Suspect("one-off", torch.equal(codes, rounded + 1) or torch.equal(codes, (rounded + 1).clamp(max=last)),
                    "every code is one too large", "the least number gets code 0"),
            Suspect("signed", torch.equal(codes, (rounded - last // 2 - 1) % 256),
                    "half of the codes were subtracted, as for signed ones, and uint8 has none below 0",
                    "the least number gets code 0"),
            Suspect("multiplied", torch.equal(codes, ((x - low) * scale).round().long()),
                    "x - low was multiplied by the scale", "how many steps of one scale lie between low and x?"),
            Suspect("not-divided", torch.equal(codes, (x - low).round().long()),
                    "x - low was rounded without the scale", "how many steps of one scale lie between low and x?"),
            Suspect("code-too-large", bool((codes > last).any()), f"{last} is the last code", "the scale, or a clamp"),
        ], seen)  # fmt: skip
        self.fail("error", seen=f"{seen}; some number is more than half a scale off, or an end has another code",
                  cause="a step of the rule does something else than the docstring says",
                  look="x - low, divided by scale, rounded; by hand for one group")  # fmt: skip

    def judge_equal_numbers(self, answer: Callable) -> None:
        """Groups without a range come back to the bit, alone and beside others, and no NaN stood in for a code."""
        equal = torch.tensor([0.1, -3.7, 0.0])[:, None].repeat(1, 6)
        for x, words in (
            (equal, "six times"),
            (equal[:, :1], "one"),
            (torch.cat((equal, torch.randn(2, 6))), "six times"),
            (equal.half(), "float16, six times"),
            (equal.bfloat16(), "bfloat16, six times"),
        ):
            try:
                with AnotherMachine():
                    codes, scale, zero = self.parts(answer, x, 4)
            except NotYet as not_yet:
                if not_yet.finding.diagnosis != "not-finite":
                    raise
                parts = [part.isfinite().all(-1) for part in answer(x.clone(), 4)[1:]]
                first = int((~(parts[0] & parts[1])).int().argmax())
                infinite = bool(answer(x.clone(), 4)[1].isinf().any())
                self.fail("constant-group", seen=f"a group of {words} {x[first, 0].item():.2g}: {not_yet.finding.seen}",
                          cause="its scale is infinite, by a division or because infinity was put in place of 0; 0 "
                          "times infinity is NaN"
                          if infinite
                          else "a division by the scale, or by the numbers themselves, where these are 0",
                          look="what each division gets where the scale or the least number is 0")  # fmt: skip
            back = codes * scale + zero
            same = (x == x[:, :1]).all(-1)
            off = back.isnan() | (back != x) | (codes > 15)
            first = int((same & off.any(-1)).int().argmax())
            seen = f"{back[first, 0].item():.3g}"
            cause = "the special case for a scale of 0 does not give the number back"
            if nan := bool((codes[same] > 15).any() | back[same].isnan().any()):
                seen = "NaN on the way"
                cause = (
                    "the divisor is 0, and 0 / 0 is NaN: uint8 has no code for it, and what comes out differs between "
                    "machines"
                )
            if nan or not torch.equal(back[same], x[same]):
                self.fail("constant-group", seen=f"a group of {words} {x[first, 0].item():.2g}: {seen}", cause=cause,
                          look="the division: by 1 where the scale is 0, say")  # fmt: skip
            if broken(x[~same], (codes[~same], scale[~same], zero[~same]), 4).any():
                self.fail("constant-group",
                          seen="groups of different numbers come back wrong beside a group of equal ones",
                          cause="the special case for a scale of 0 took hold of every group",
                          look="torch.where, group by group, not `if` over all of them")  # fmt: skip

    def judge_small_numbers(self, answer: Callable) -> None:
        """An eps that is not small beside the scale spoils small numbers; what is small depends on the dtype."""
        for dtype, ranges in (
            (torch.float32, (1e-4, 2e-4, 3e-4)),
            (torch.float32, (1e-6, 2e-6, 3e-6)),
            (torch.bfloat16, (0.1, 0.2, 0.05)),
            (torch.float16, (0.1, 0.2, 0.05)),
            (torch.float16, (0.01, 0.02, 0.03)),
        ):
            x = (torch.rand(300, 8) * torch.tensor(ranges).repeat(100)[:, None]).to(dtype)
            low, scale = x.amin(-1, keepdim=True), quantize(x, 8)[1]
            most = 255 if dtype == torch.bfloat16 else 255.5  # as in judge_bfloat16
            self.judge_small(answer, x[((x - low) / scale).amax(-1) < most][:3])

    def judge_rounded_scales(self, answer: Callable) -> None:
        """Scales of which float16's rounding takes a large part: the greatest number lies more than the last code's
        number of scales above the least, and has the last code all the same."""
        for nbits, greatest in ((8, (357, 612, 5202)), (4, (21, 36, 66)), (2, (4, 7, 13))):
            units = torch.rand(3, 8) * torch.tensor(greatest)[:, None]
            units[:, 2], units[:, 5] = 0.0, torch.tensor(greatest)
            x = (units.round() * torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps).half()
            with AnotherMachine():
                got = self.parts(answer, x, nbits)
            if not (wrong := broken(x, got, nbits)).any():
                continue
            which, last = int(wrong.int().argmax()), 2**nbits - 1
            steps = (x - x.amin(-1, keepdim=True)) / quantize(x, nbits)[1]
            kept = got[0].long()
            accuse(type(self), [
                Suspect("code-wraps", any(torch.equal(kept, made % 256) for made in (
                            steps.round().long(), (steps.float() + 0.5).floor().long(), steps.long())),
                        "the scale was rounded down, so that the greatest number lies beyond the last code; what is "
                        "beyond 255 wraps round in uint8" if last == 255 else
                        "the scale was rounded down, so that the greatest number lies beyond the last code",
                        f"the codes, before they become uint8: clamp(0, {last}), for any nbits 2**nbits - 1"),
            ], f"float16 numbers of 0 to {x[which].max().item():.2g} in {nbits} bits: the greatest lies "
               f"{steps[which].max().item():.0f} scales above the least and got code {int(kept[which, 5])} of "
               f"{last}")  # fmt: skip
            self.explain(answer, x, got, nbits, which)

    def judge_small(self, answer: Callable, x: Tensor) -> None:
        """Some groups of small numbers in 8 bits."""
        got = self.parts(answer, x, 8)
        codes, scale = got[:2]
        if not (wrong := broken(x, got, 8)).any():
            return
        info = torch.finfo(x.dtype)
        low, right = x.amin(-1, keepdim=True), (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 255
        least = (*(10.0**-n for n in range(1, 13)), info.eps, info.tiny, torch.finfo(torch.float32).eps)
        guards = [guard for eps in least for guard in (right + eps, right.clamp(min=eps))]
        guarded = [((x - low) / guard).round().long() for guard in guards]
        which = int(wrong.int().argmax())
        close = 1e-4 if x.dtype == torch.float32 else 4 * info.eps
        accuse(type(self), [
            Suspect("small-group", any(near(scale.float(), guard.float(), close) for guard in guards) or
                    any(torch.equal(codes.long(), made) for made in guarded),
                    "an eps, added to the scale or its least value, is not small beside this scale",
                    "treat a scale of 0 apart: torch.where(scale == 0, ...)"),
        ], f"{str(x.dtype).removeprefix('torch.')} numbers of 0 to {x[which].max().item():.1g} in 8 bits: the greatest "
           f"code is {int(codes[which].max())} of 255, scale {scale[which].item():.3g}; {right[which].item():.3g} is "
           "right")  # fmt: skip
        self.explain(answer, x, got, 8, which)


def broken(x: Tensor, quantized: tuple[Tensor, Tensor, Tensor], nbits: int) -> Tensor:
    """Which groups of different numbers break a promise, bool [...]: codes in range, both ends used, errors of half a
    scale at most.

    Bounded: half a scale, and what rounding of the dtype adds to scale, zero and each of the last code's steps: eps of
    it, or half of the least number that the dtype holds. The greatest number's code may be as far from the last: in
    bfloat16 and 8 bits, by 7.
    """
    last, eps = 2**nbits - 1, torch.finfo(x.dtype).eps
    least_half = torch.finfo(x.dtype).smallest_normal * eps / 2
    if not x.numel():
        return torch.zeros(0, dtype=torch.bool)
    codes, scale, zero = (part.double() for part in quantized)
    error = (codes * scale + zero - x.double()).abs()
    bound = (0.5 + 4 * last * eps) * scale.abs() + 2 * eps * x.double().abs().amax(-1, keepdim=True)
    bound += last * least_half
    short = (4 * last * eps + last * least_half / scale.abs()).nan_to_num(0.0).floor()
    least, greatest = (codes.gather(-1, pick(-1, keepdim=True)) for pick in (x.argmin, x.argmax))
    return ((codes > last) | (least != 0) | (greatest < last - short) | (error > bound)).any(-1)


class AnotherMachine(TorchDispatchMode):
    """A machine that makes 255 of a NaN converted to uint8, and wraps numbers beyond 0 to 255 round. C leaves both
    open: others make 0 of NaN, or the nearest byte of a number."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {torch.ops.aten._to_copy.default: 0, torch.ops.aten.copy_.default: 1}.get(func)
        if given is not None and result.dtype == torch.uint8 and args[given].is_floating_point():
            x = args[given].double()
            result.masked_fill_(x.isnan(), 255)
            beyond = x.isfinite() & ((x < 0) | (x > 255))
            result.copy_(torch.where(beyond, x.trunc().nan_to_num().remainder(256).to(torch.uint8), result))
        return result
