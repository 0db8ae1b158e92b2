"""05.6: scores from codes, without making the keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from labkit.course.checks.effort import Effort, Kernels
from labkit.course.checks.suspects import Suspect, accuse
from labkit.course.checks.tensors import TIGHT, agree, near
from labkit.course.exercise import Exercise, NotYet
from labkit.labs.lab05.references import packed_scores
from labkit.ledger import tensors_in


class PackedScores(Exercise):
    """The scale and the zero point moved from the large side of the product to the small one."""

    id, title, minutes, difficulty = "05.6", "Scores without dequantizing", 6, 3
    needs = ("05.1",)
    reference = staticmethod(packed_scores)
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
        "zero-scaled": "Is it code * scale + zero, or (code + zero) * scale?",
        "zero-not-per-channel": "A sum of products is not the product of the sums.",
        "dequantized": "Scale and zero are one number for each channel, and so is q. Multiply those two first.",
        "one-scale": "Each channel has its own scale, so it must be applied before channels are added up.",
        "codes-not-converted": "A matrix product wants both sides in one dtype. Which of the two may change without "
        "losing anything?",
    }

    def examine(self, answer: Callable) -> None:
        """Values for several shapes and numbers of bits, in float64; dtype; then what was made on the way."""
        for lead, queries, nbits in (((), 1, 2), ((2, 3), 1, 8), ((2, 3), 4, 4), ((3,), 5, 8), ((), 3, 8)):
            inputs = packed_keys(*lead, queries=queries, nbits=nbits)
            got = self.called(answer, inputs)
            want = packed_scores(*inputs)
            where = f"q {list(inputs[0].shape)}, codes {list(inputs[1].shape)} of {nbits} bits"
            if isinstance(got, Tensor) and got.shape == want.mT.shape and got.shape != want.shape:
                self.fail(
                    "transposed",
                    seen=f"{where}: scores of shape {list(got.shape)}",
                    cause="k @ q.mT was computed",
                    look="the docstring: [..., queries, tokens], queries first",
                )
            self.like(got, want, what=f"the result for {where},")
            if not agree(got, want):
                self.explain(got, *inputs, where)
        half = packed_keys(2, 3, queries=1, nbits=4, dtype=torch.bfloat16)
        self.like(self.called(answer, half), packed_scores(*half), what="the scores of bfloat16 tensors")
        self.check_work(answer)

    def called(self, answer: Callable, inputs: tuple[Tensor, ...]) -> Any:
        """One call, where an error about dtypes has a finding of its own."""
        try:
            return self.call(answer, *inputs)
        except NotYet as not_yet:
            finding = not_yet.finding
            if finding.diagnosis == "raised" and ("dtype" in finding.seen or "same type" in finding.seen):
                self.fail(
                    "codes-not-converted",
                    seen=f"q is {str(inputs[0].dtype).removeprefix('torch.')}, codes are uint8: {finding.seen}",
                    cause="the product got two dtypes",
                    look="the codes: codes.to(q.dtype), not another dtype, and not q",
                )
            raise

    def explain(self, got: Tensor, q: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, where: str) -> None:
        """Name the formula that gives what was seen."""
        codes_ = codes.to(q.dtype)
        products, zeros = (q * scale) @ codes_.mT, (q * zero).sum(-1, keepdim=True)
        signed = codes.view(torch.int8).to(q.dtype)
        known = [
            Suspect("zero-forgotten", products, "the zero point is nowhere", "the second term: q * zero"),
            Suspect("scale-forgotten", q @ codes_.mT + zeros, "the scale is nowhere", "the first term: q * scale"),
            Suspect("zero-scaled", products + (q * scale * zero).sum(-1, keepdim=True),
                    "the zero point was multiplied by the scale too, as in (codes + zero) * scale",
                    "the docstring: codes * scale + zero. The second term takes q as it came"),
            Suspect("zero-subtracted", (products - zeros, products - (q * scale * zero).sum(-1, keepdim=True)),
                    "the zero point was subtracted; other formats do that, (codes - zero) * scale among them",
                    "the docstring: codes * scale + zero"),
            Suspect("zero-unweighted", (products + zero.sum(-1, keepdim=True), products + zero.mean(-1, keepdim=True)),
                    "the zero points were added to the scores without q",
                    "the second term: q[d] * zero[d], summed over channels"),
            Suspect("zero-not-per-channel",
                    tuple(products + q.sum(-1, keepdim=True) * total
                    for total in (zero.sum(-1, keepdim=True), zero.mean(-1, keepdim=True))),
                    "the sum of q was multiplied by the sum, or the mean, of the zero points",
                    "the order: multiply channel by channel, then add up"),
            Suspect("zero-of-all-queries",
                    (products + (q * zero).sum(), products + (q * zero).sum((-2, -1), keepdim=True)),
                    "q * zero was summed over queries, heads or rows as well",
                    "the sum: over the last dimension only, sum(-1, keepdim=True)"),
            Suspect("one-scale",
                    tuple((q @ codes_.mT) * one + zeros
                    for one in (scale.mean(-1, keepdim=True), scale[..., :1], scale.sum(-1, keepdim=True))),
                    "one scale for all channels was applied to the sums", "q * scale, before the product"),
            Suspect("scale-inverted", (q / scale) @ codes_.mT + zeros, "q was divided by the scale", "q * scale"),
            Suspect("codes-signed", (q * scale) @ signed.mT + zeros,
                    "codes from 128 on became negative: they went through int8",
                    "the conversion: from uint8 straight to q's dtype"),
            Suspect("divided-by-root", (products + zeros) * q.shape[-1] ** -0.5,
                    "the scores were divided by sqrt(head_dim); q is taken as it comes",
                    "the docstring: q @ k.mT, no more"),
            Suspect("softmax", (products + zeros).softmax(-1), "softmax was applied",
                    "the docstring: scores, not weights"),
        ]  # fmt: skip
        off = f"{where}: scores off by up to {(got - products - zeros).abs().max():.3g}"
        accuse(type(self), known, off, fits=lambda value: agree(got, value.expand_as(got)))
        if agree(got - zeros, (got - zeros).round(), 1e-6):
            self.fail(
                "q-rounded",
                seen=f"{where}: without the zero point's term the scores are whole numbers",
                cause="q, or q * scale, was converted to the codes' dtype: fractions are lost and sums wrap at 256",
                look="the conversion: codes.to(q.dtype), never q.to(codes.dtype)",
            )
        self.same(got, products + zeros, what=f"the scores of {where}", tolerance=TIGHT)

    def check_work(self, answer: Callable) -> None:
        """One query on 256 tokens: of tensors as large as the keys, only the converted codes are made, once."""
        inputs = packed_keys(2, 3, queries=1, nbits=4, tokens=256, head_dim=64, dtype=torch.float32)
        _, codes, scale, zero = inputs
        keys = codes * scale + zero
        with Large(codes.numel()) as made:
            answer(*inputs)
        halfway = (keys, codes * scale, codes + zero, codes + zero / scale)
        if any(near(x.reshape_as(k), k) for x in made.scaled for k in (*halfway, *(k.mT for k in halfway))
               if x.numel() == k.numel()):  # fmt: skip
            self.fail(
                "dequantized",
                seen="the scores are right, and a tensor as large as the keys was made, of codes scaled or shifted",
                cause="scale or zero was applied to the codes: that much memory is written and read at every step",
                look="the side of the product that is small: q * scale",
            )
        if made.scaled or made.effort.made > 1.5 * keys.nbytes:
            times = f"{made.effort.made / keys.nbytes:.1f} times the bytes of the keys"
            self.fail(
                "large-tensors",
                seen="the scores are right, and one product for each query, token and channel was written out"
                if made.scaled
                else f"the scores are right, and tensors of {times} were made; converted codes are 1.0 times",
                cause="an elementwise product that is summed afterwards: each step writes and reads all of it"
                if made.scaled
                else "the converted codes were copied, or converted twice",
                look="one matrix product, with codes.to(q.dtype).mT as it is",
            )


class Large(Kernels):
    """Counts every kernel, and keeps tensors of `numel` numbers or more that hold anything but whole ones."""

    def __init__(self, numel: int) -> None:
        super().__init__(Effort())
        self.numel = numel
        self.scaled: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        large = [x for x in tensors_in(result) if x.numel() >= self.numel and x.is_floating_point()]
        self.scaled += [x.clone() for x in large if (x != x.round()).any()]
        return result


def packed_keys(
    *lead: int, queries: int, nbits: int, tokens: int = 9, head_dim: int = 6, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random q, codes, scale and zero."""
    q, zero = torch.randn(*lead, queries, head_dim).to(dtype), torch.randn(*lead, 1, head_dim).to(dtype) * 3
    codes = torch.randint(0, 2**nbits, (*lead, tokens, head_dim), dtype=torch.uint8)
    return q, codes, torch.rand(*lead, 1, head_dim).to(dtype) + 0.5, zero
