"""Answers to lab 05 that a check once let pass or explained wrongly, and their neighbours."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from labkit.labs.lab05.references import QuantizedLayer, quantize
from tests.labs.answer import Wrong


def least(eps):
    """Quantizes with a least scale; eps: a number, or a function of the dtype."""

    def answer(x, nbits):
        smallest = eps(x.dtype) if callable(eps) else eps
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scale = ((high - low) / (2**nbits - 1)).clamp(min=smallest)
        return ((x - low) / scale).round().clamp(0, 2**nbits - 1).to(torch.uint8), scale, low

    return answer


def nan_for_zeros(x, nbits):
    codes, scale, zero = quantize(x, nbits)
    return codes, scale, torch.where(zero == 0, torch.nan, zero)


def codes_come_back(k, v, nbits, group_size):
    keys = quantize(k.mT.unflatten(-1, (-1, group_size)), nbits)[0].flatten(-2).mT
    return keys, quantize(v.unflatten(-1, (-1, group_size)), nbits)[0].flatten(-2)


class OnceForEach(QuantizedLayer):
    def __init__(self, group_size, residual_length, quantize_group, restore):
        def both(k, v):
            return quantize_group(k, v), quantize_group(k, v)

        super().__init__(group_size, residual_length, both, lambda pair: (restore(pair[0])[0], restore(pair[1])[1]))


def least_of_16_bits(dtype):
    return 1e-3 if dtype.itemsize == 2 else 1e-38


def scores_by_baddbmm(q, codes, scale, zero):
    """Right: leading dimensions laid together, codes as they are; where they lie apart, that copies them."""
    scaled, flat, zeros = (x.reshape(-1, *x.shape[-2:]) for x in (q * scale, codes, q @ zero.mT))
    scores = torch.baddbmm(zeros, scaled, flat.to(q.dtype).mT)
    return scores.reshape(*q.shape[:-1], codes.shape[-2])


def copies_codes_to_transpose(q, codes, scale, zero):
    return (q * scale) @ codes.mT.contiguous().to(q.dtype) + q @ zero.mT


def surprise_by(cut):
    """05.8 with parts cut by `cut`: the number of tokens to (start, end) pairs."""

    def answer(model, tokens, cache):
        rows = torch.cat([model(tokens[:, start:end], cache)[0] for start, end in cut(tokens.shape[1])])
        wanted = tokens[0, 1 : len(rows) + 1]
        return F.cross_entropy(rows[: len(wanted)], wanted).item()

    return answer


def second_part_short(count):
    starts = [0, 32, *range(48, count, 32)]
    return zip(starts, [*starts[1:], count], strict=True)


def one_skipped(count):
    return [(0, 32), (32, 40), *((start, min(start + 32, count)) for start in range(41, count, 32))]


WRONG = [
    Wrong("05.1", "small-group", "least scale 1e-7", least(1e-7)),
    Wrong("05.1", "constant-group", "least scale 1e-8, which float16 does not hold", least(1e-8)),
    Wrong("05.1", "constant-group", "least scale 1e-12, which float16 does not hold", least(1e-12)),
    Wrong("05.1", "small-group", "least scale eps of the dtype", least(lambda dtype: torch.finfo(dtype).eps)),
    Wrong("05.1", "small-group", "least scale tiny of the dtype", least(lambda dtype: torch.finfo(dtype).tiny)),
    Wrong("05.1", "small-group", "least scale 1e-3 in 16 bits", least(least_of_16_bits)),
    Wrong("05.1", "constant-group", "NaN for a group of zeros alone", nan_for_zeros),
    Wrong("05.3", "codes-returned", "the codes come back as they are", codes_come_back),
    Wrong("05.5", "once-for-each", "quantize_group once for K and once for V", OnceForEach),
    Wrong("05.6", "large-tensors", "copies the codes to transpose them", copies_codes_to_transpose),
    Wrong("05.8", "part-length", "16 tokens in the second part", surprise_by(second_part_short)),
    Wrong("05.8", "tokens-skipped", "leaves token 40 out", surprise_by(one_skipped)),
]

RIGHT: list[tuple[str, Callable]] = [("05.6", scores_by_baddbmm)]
