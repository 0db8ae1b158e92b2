"""05.6: scores from codes, without making the keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from labkit.course.checks.effort import EMPTY, Effort, Kernels, check_stays, effort_of
from labkit.course.checks.suspects import Suspect
from labkit.course.checks.trials import Case, compare, sliced
from labkit.course.exercise import Exercise, NotYet
from labkit.labs.lab05.references import packed_scores
from labkit.ledger import tensors_in


class PackedScores(Exercise):
    """The scale and the zero point moved from the large side of the product to the small one."""

    id, title, minutes, difficulty = "05.6", "Scores without dequantizing", 6, 3
    needs = ("05.1",)
    reference = staticmethod(packed_scores)
    why = (
        "Scale and zero point belong to a channel, so they can be multiplied into q, which is small; the product "
        "then takes the codes as they are, and the zero points come to one number for each query."
    )
    hints = (
        "Write one score as a sum over channels d: q[d] * (code[d] * scale[d] + zero[d]). Which factors are the same "
        "for every token?",
        "The sum falls in two. In the first, scale[d] can be multiplied into q[d] before the product with the codes. "
        "The second holds no code at all: one number for each query.",
        "products = (q * scale) @ codes.to(q.dtype).mT\nsame_for_all = (q * zero).sum(-1, keepdim=True)\n"
        "return products + same_for_all",
    )
    hints_for: ClassVar = {
        "zero-forgotten": "Expand q * (code * scale + zero): there are two terms.",
        "zero-averaged": "q · k is a sum over channels, in both of its terms.",
        "zero-added-to-q": "(q + zero) * code is not q * (code + zero).",
        "zero-scaled": "Is it code * scale + zero, or (code + zero) * scale?",
        "zero-not-per-channel": "A sum of products is not the product of the sums.",
        "dequantized": "Scale and zero are one number for each channel, and so is q. Multiply those two first.",
        "one-scale": "Each channel has its own scale, so it must be applied before channels are added up.",
        "codes-not-converted": "A matrix product wants both sides in one dtype. Which of the two may change without "
        "losing anything?",
    }

    def examine(self, answer: Callable) -> None:
        """Values for several shapes and numbers of bits; then what is made on the way, for one query and for three."""
        cases = [
            Case(packed_keys(2, 3, queries=1, nbits=4, tokens=11, head_dim=8)),
            Case(packed_keys(2, 3, queries=1, nbits=4, tokens=11, head_dim=8), "other codes"),
            Case(packed_keys(3, queries=5, nbits=8, tokens=7, head_dim=4)),
            Case(packed_keys(queries=1, nbits=2, tokens=9, head_dim=6)),
            Case(packed_keys(2, 3, queries=4, nbits=4, tokens=5, head_dim=12)),
            Case(packed_keys(queries=3, nbits=8, tokens=1, head_dim=10), "one token"),
            Case(packed_keys(4, queries=2, nbits=4, tokens=300, head_dim=64, small=1e-3), "small scales"),
        ]
        self.check_shape(answer, cases[0])
        try:
            compare(type(self), answer, packed_scores, cases, suspects=suspects, what="the result",
                    dtypes=(torch.float64, torch.bfloat16))  # fmt: skip
        except NotYet as not_yet:
            self.explain_dtypes(not_yet.finding.seen)
            raise
        for queries in (1, 3):
            inputs = packed_keys(2, 3, queries=queries, nbits=4, tokens=256, head_dim=64)
            self.check_keys(answer, inputs)
            for dtype in (torch.float32, torch.bfloat16):
                narrow = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
                self.check_work(answer, narrow)
                self.check_work(answer, [sliced(x) for x in narrow])

    def check_shape(self, answer: Callable, case: Case) -> None:
        """Queries are rows; an error about dtypes has a finding of its own."""
        try:
            got = self.call(answer, *case.args)
        except NotYet as not_yet:
            self.explain_dtypes(not_yet.finding.seen)
            raise
        q, codes = case.args[:2]
        if isinstance(got, Tensor) and got.shape == (*q.shape[:-2], codes.shape[-2], q.shape[-2]):
            self.fail("transposed", seen=f"q {list(q.shape)}, codes {list(codes.shape)}: scores of {list(got.shape)}",
                      cause="k @ q.mT was computed",
                      look="the docstring: [..., queries, tokens], queries first")  # fmt: skip

    def explain_dtypes(self, seen: str) -> None:
        """What PyTorch says when a product gets two dtypes."""
        if "dtype" in seen or "same type" in seen or "scalar type" in seen:
            self.fail("codes-not-converted", seen=f"two dtypes met in a product: {seen}",
                      cause="codes are uint8 and q is a float of any kind: float32, float64 or bfloat16",
                      look="the codes: codes.to(q.dtype), not another dtype, and not q")  # fmt: skip

    def check_keys(self, answer: Callable, inputs: tuple[Tensor, ...]) -> None:
        """None of the tensors made on the way, however small, holds keys, or codes that were scaled or shifted."""
        _, codes, scale, zero = inputs
        ways = (codes * scale + zero, codes * scale, codes + zero, codes + zero / scale, codes - zero)
        halfway = torch.cat([way[codes > 1] for way in ways]).unique()  # of codes 0 and 1: zero and scale themselves
        with Fractions() as made:
            answer(*inputs)
        if any(mostly_among(x, halfway) for x in made.found):
            self.fail(
                "dequantized",
                seen="the scores are right, and keys were made on the way: codes scaled or shifted",
                cause="scale or zero was applied to the codes: as many numbers as K has, made anew at every step",
                look="the side of the product that is small: q * scale",
            )

    def check_work(self, answer: Callable, inputs: list[Tensor]) -> None:
        """Of tensors as large as the keys, only the converted codes are made, once. Codes that lie apart may be laid
        side by side before: a copy of codes is no tensor of keys."""
        q, codes = inputs[:2]
        effort = effort_of(lambda: answer(*inputs))
        check_stays(type(self), effort)
        converted = codes.numel() * torch.promote_types(q.dtype, torch.float64).itemsize
        with Fractions() as made:
            answer(*inputs)
        where = f"{q.shape[-2]} queries, {codes.shape[-2]} tokens, {str(q.dtype).removeprefix('torch.')}"
        large = [x for x in made.found if x.numel() >= codes.numel()]
        many = made.large(codes.numel(), besides=None if codes.is_contiguous() else codes.dtype)
        if large or many > 1 or effort.largest > converted:
            self.fail(
                "large-tensors",
                seen=f"{where}: the scores are right, and one product for each query, token and channel was written out"
                if large
                else f"{where}: the scores are right, and {many} tensors with as many numbers as "
                "the keys were made; converted codes are one",
                cause="an elementwise product that is summed afterwards: each step writes and reads all of it"
                if large
                else "the converted codes were copied, or converted twice",
                look="one matrix product, with codes.to(q.dtype).mT as it is",
            )


class Fractions(Kernels):
    """Keeps the float tensors that are made and hold anything but whole numbers, and the sizes of all."""

    def __init__(self) -> None:
        super().__init__(Effort())
        self.found: list[Tensor] = []
        self.sizes: list[tuple[int, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        before = self.effort.made
        result = super().__torch_dispatch__(func, types, args, kwargs)
        new = list(tensors_in(result)) if self.effort.made > before else []
        self.sizes += [(x.numel(), x.dtype) for x in new]
        written = list(tensors_in(result)) if func._schema.is_mutable else new
        if func.overloadpacket in EMPTY:  # what stands in new memory is left from something else
            written = []
        self.found += [x.clone() for x in written if x.is_floating_point() and x.numel() >= 32 and (x % 1).any()]
        return result

    def large(self, numel: int, *, besides: torch.dtype | None) -> int:
        """How many new tensors have `numel` numbers or more, not counting one of exactly `numel` in dtype `besides`."""
        return sum(size >= numel for size, _ in self.sizes) - ((numel, besides) in self.sizes)


def mostly_among(x: Tensor, values: Tensor) -> bool:
    """Whether of a few numbers of `x`, spread over it, most are among the sorted `values`, but for rounding."""
    some = x.flatten()[:: max(1, x.numel() // 48)].to(values.dtype)
    places = torch.searchsorted(values, some.contiguous()).clamp(1, len(values) - 1)
    nearest = torch.minimum((values[places] - some).abs(), (values[places - 1] - some).abs())
    return bool((nearest <= 1e-6 * some.abs()).double().mean() > 0.7)


def suspects(q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> list[Suspect]:
    """What each mistake gives."""
    numbers, signed = codes.to(q.dtype), codes.view(torch.int8).to(q.dtype)
    products, zeros = (q * scale) @ numbers.mT, (q * zero).sum(-1, keepdim=True)

    def whole(rows: Tensor) -> Tensor:
        """A product in the codes' dtype."""
        return (rows.to(codes.dtype) @ codes.mT).to(q.dtype)

    return [
        Suspect("zero-forgotten", products, "the zero point is nowhere", "the second term: q * zero"),
        Suspect("scale-forgotten", q @ numbers.mT + zeros, "the scale is nowhere", "the first term: q * scale"),
        Suspect("codes-alone", q @ numbers.mT, "neither scale nor zero point is anywhere",
                "the docstring: keys are codes * scale + zero"),
        Suspect("scale-twice", (q * scale * scale) @ numbers.mT + zeros, "q and the codes were both scaled",
                "the first term: one scale for each channel, on the side of q"),
        Suspect("zero-scaled", products + (q * scale * zero).sum(-1, keepdim=True),
                "the zero point was multiplied by the scale too, as in (codes + zero) * scale",
                "the docstring: codes * scale + zero. The second term takes q as it came"),
        Suspect("zero-subtracted", (products - zeros, products - (q * scale * zero).sum(-1, keepdim=True)),
                "the zero point was subtracted; other formats do that, (codes - zero) * scale among them",
                "the docstring: codes * scale + zero"),
        Suspect("zero-unweighted",
                tuple(products + added for added in
                (zero.sum(-1, keepdim=True), zero.sum(), zero.mean(-1, keepdim=True))),
                "the zero points were added to the scores without q",
                "the second term: q[d] * zero[d], summed over channels"),
        Suspect("zero-averaged", products + (q * zero).mean(-1, keepdim=True),
                "q * zero was averaged over the channels", "the second term is a sum: sum(-1, keepdim=True)"),
        Suspect("zero-not-per-channel",
                tuple(products + q.sum(-1, keepdim=True) * total
                for total in (zero.sum(-1, keepdim=True), zero.mean(-1, keepdim=True), zero[..., :1])),
                "the sum of q was multiplied by the sum, the mean, or the first, of the zero points",
                "the order: multiply channel by channel, then add up"),
        Suspect("zero-of-all-queries",
                (products + (q * zero).sum(), products + (q * zero).sum((-2, -1), keepdim=True)),
                "q * zero was summed over queries, heads or rows as well",
                "the sum: over the last dimension only, sum(-1, keepdim=True)"),
        Suspect("zero-of-one-query", (products + zeros[..., :1, :], products + zeros[..., -1:, :]),
                "q * zero of one query was added to the scores of all",
                "the second term: [..., queries, 1], one number for each query"),
        Suspect("precision", [lambda dtype=dtype: ((q * scale).to(dtype) @ numbers.to(dtype).mT).to(q.dtype) + zeros
                              for dtype in (torch.bfloat16, torch.float16)],
                "the product was computed in fewer bits than q has", "the dtype of the product: q.dtype"),
        Suspect("zero-times-codes", products + (q * zero) @ numbers.mT,
                "the zero points were multiplied by the codes", "the second term holds no code"),
        Suspect("zero-added-to-q", (((q + zero) * scale) @ numbers.mT, (q * scale + zero) @ numbers.mT),
                "the zero point was added to q: then the codes multiply it", "the second term holds no code"),
        Suspect("not-transposed", (q * scale) @ numbers.reshape(*numbers.shape[:-2], *numbers.shape[:-3:-1]) + zeros,
                "codes were reshaped where they should be transposed", "codes.to(q.dtype).mT"),
        Suspect("one-scale",
                tuple((q @ numbers.mT) * one + zeros
                for one in (scale.mean(-1, keepdim=True), scale[..., :1], scale.sum(-1, keepdim=True))),
                "one scale for all channels was applied to the sums", "q * scale, before the product"),
        Suspect("scale-inverted", (q / scale) @ numbers.mT + zeros, "q was divided by the scale", "q * scale"),
        Suspect("codes-signed", (q * scale) @ signed.mT + zeros,
                "codes from 128 on became negative: they went through int8",
                "the conversion: from uint8 straight to q's dtype"),
        Suspect("q-rounded", (lambda: whole(q * scale) + zeros, lambda: whole(q) * scale.mean() + zeros),
                "q * scale was converted to the codes' dtype: fractions are lost and sums wrap at 256",
                "the conversion: codes.to(q.dtype), never q.to(codes.dtype)"),
        Suspect("divided-by-root", (products + zeros) * q.shape[-1] ** -0.5,
                "the scores were divided by sqrt(head_dim); q is taken as it comes",
                "the docstring: q @ k.mT, no more"),
        Suspect("softmax", (products + zeros).softmax(-1), "softmax was applied",
                "the docstring: scores, not weights"),
    ]  # fmt: skip


def packed_keys(
    *lead: int, queries: int, nbits: int, tokens: int, head_dim: int, small: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random q, codes, scale and zero, float32. small: what scales are multiplied by."""
    q, zero = torch.randn(*lead, queries, head_dim), torch.randn(*lead, 1, head_dim) * 3
    codes = torch.randint(0, 2**nbits, (*lead, tokens, head_dim), dtype=torch.uint8)
    return q, codes, (torch.rand(*lead, 1, head_dim) + 0.5) * small, zero
