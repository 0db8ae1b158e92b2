"""Answers to lab 05 that a check once let pass or explained wrongly, and their neighbours."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from labkit.labs.lab05.references import QuantizedLayer, packed_scores, quantize, quantize_cache
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


def zero_in_steps(x, nbits):
    """A zero point of whole steps, which is no number of the group."""
    _, scale, low = quantize(x, nbits)
    safe = torch.where(scale == 0, 1.0, scale)
    zero = (low / safe).round() * safe
    return ((x - zero) / safe).round().clamp(0, 2**nbits - 1).to(torch.uint8), scale, torch.where(scale == 0, low, zero)


def infinite_scale(x, nbits):
    codes, scale, zero = quantize(x, nbits)
    return codes, scale.where(scale > 0, torch.inf), zero


def first_head_for_all(k, v, nbits, group_size):
    return tuple(x[:, :1].expand_as(x).contiguous() for x in quantize_cache(k, v, nbits, group_size))


class OnlyWhatCame(QuantizedLayer):
    """As many groups as are due, cut from a long append alone; what waited before goes on waiting."""

    def append(self, k, v):
        size, kept = self.group_size, self.waiting or (k[:, :, :0], v[:, :, :0])
        held = size * len(self.groups) + kept[0].shape[2] + k.shape[2]
        due = max(0, held - self.residual_length) // size - len(self.groups)
        if k.shape[2] < due * size:
            (k, v), kept = (torch.cat(pair, 2) for pair in zip(kept, (k, v), strict=True)), (k[:, :, :0], v[:, :, :0])
        for start in range(0, due * size, size):
            self.groups.append(self.quantize_group(k[:, :, start : start + size], v[:, :, start : start + size]))
        rest = (x[:, :, due * size :] for x in (k, v))
        self.waiting = tuple(torch.cat(pair, 2) for pair in zip(kept, rest, strict=True))


def first_zero(q, codes, scale, zero):
    return packed_scores(q, codes, scale, torch.zeros_like(zero)) + (q[..., :1, :] * zero).sum(-1, keepdim=True)


def first_scales(q, codes, scale, zero):
    scale, zero = (x[(0,) * (x.dim() - 2)].expand_as(x) for x in (scale, zero))
    return packed_scores(q, codes, scale, zero)


def half_product(q, codes, scale, zero):
    return ((q * scale).half() @ codes.half().mT).to(q.dtype) + (q * zero).sum(-1, keepdim=True)


def every_nth(waiting, new, group_size):
    tokens = torch.cat((waiting, new), 2)
    count = tokens.shape[2] // group_size
    whole, rest = tokens[:, :, : count * group_size], tokens[:, :, count * group_size :]
    return [whole.unflatten(2, (group_size, count))[:, :, :, i] for i in range(count)], rest


def padded_with_zeros_of_the_first(waiting, new, group_size):
    tokens = torch.cat((waiting, new), 2)
    count = -(-tokens.shape[2] // group_size) * group_size
    places = torch.arange(count).clamp(max=max(tokens.shape[2] - 1, 0))
    return list(tokens[:, :, places].split(group_size, 2)) if tokens.shape[2] else [], tokens[:, :, :0]


def unclamped(finish):
    """Quantizes with steps made whole by `finish` and not clamped."""

    def answer(x, nbits):
        _, scale, low = quantize(x, nbits)
        return finish((x - low) / torch.where(scale == 0, 1.0, scale)), scale, low

    return answer


class ReusedRoom(QuantizedLayer):
    """Groups are views of memory for group_size + residual_length tokens, which next tokens are written into."""

    def append(self, k, v):
        size, room = self.group_size, self.group_size + self.residual_length
        if self.waiting is None:
            self.room = tuple(x.new_zeros(*x.shape[:2], room, x.shape[3]) for x in (k, v))
            self.held = 0
        for place in range(k.shape[2]):
            for kept, new in zip(self.room, (k, v), strict=True):
                kept[:, :, self.held] = new[:, :, place]
            self.held += 1
            if self.held == room:
                self.groups.append(self.quantize_group(*(kept[:, :, :size] for kept in self.room)))
                self.held = self.residual_length
                for kept in self.room:
                    kept[:, :, : self.held] = kept[:, :, size:].clone()
        self.waiting = tuple(kept[:, :, : self.held] for kept in self.room)


class RoomAndCopies(ReusedRoom):
    """Right: what is given away is a copy."""

    def __init__(self, group_size, residual_length, quantize_group, restore):
        super().__init__(group_size, residual_length, lambda k, v: quantize_group(k.clone(), v.clone()), restore)


def as_many_as_new(waiting, new, group_size):
    tokens, count = torch.cat((waiting, new), 2), new.shape[2] // group_size
    return list(tokens[:, :, : count * group_size].split(group_size, 2))[:count], tokens[:, :, count * group_size :]


def of_new_alone(waiting, new, group_size):
    count = new.shape[2] // group_size * group_size
    rest = torch.cat((waiting, new[:, :, count:]), 2)
    return list(new[:, :, :count].split(group_size, 2)) if count else [], rest


def surprise_in_float32(finish):
    """05.8 with log_softmax in float32 and `finish` of the mean."""

    def answer(model, tokens, cache):
        rows = torch.cat([model(part, cache)[0] for part in tokens.split(32, dim=1)]).float().log_softmax(-1)
        return finish(-rows[63:-1].gather(1, tokens[0, 64:, None]).mean().item())

    return answer


def parts_alike(model, tokens, cache):
    rows = torch.cat([model(part, cache)[0] for part in tokens.split(32, dim=1)])[63:-1]
    parts = zip(rows.split(32), tokens[0, 64:].split(32), strict=True)
    return torch.stack([F.cross_entropy(*part) for part in parts]).mean().item()


WRONG = [
    Wrong(
        "05.1",
        "code-wraps",
        "no clamp, whole numbers on the way",
        unclamped(lambda steps: steps.round().long().to(torch.uint8)),
    ),
    Wrong("05.1", "code-wraps", "no clamp", unclamped(lambda steps: steps.round().to(torch.uint8))),
    Wrong(
        "05.1",
        "code-wraps",
        "half added, and no clamp",
        unclamped(lambda steps: (steps.float() + 0.5).floor().to(torch.uint8)),
    ),
    Wrong("05.5", "group-overwritten", "views of memory that is used again", ReusedRoom),
    Wrong("05.7", "counted-in-new", "as many groups as the new tokens fill", as_many_as_new),
    Wrong("05.7", "new-tokens-only", "groups of the new tokens alone", of_new_alone),
    Wrong("05.8", "mean-of-means", "the mean of the means of tokens 64 to 95, 96 to 127", parts_alike),
    Wrong("05.8", "rounded", "rounded to 6 digits", surprise_in_float32(lambda mean: round(mean, 6))),
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
    Wrong("05.1", "zero-rounded", "a zero point of whole steps", zero_in_steps),
    Wrong("05.1", "constant-group", "infinity for a scale of 0", infinite_scale),
    Wrong("05.3", "one-for-all", "the first head for all", first_head_for_all),
    Wrong("05.5", "groups-anew", "groups of each append alone", OnlyWhatCame),
    Wrong("05.6", "zero-of-one-query", "the first query's zero term for all", first_zero),
    Wrong("05.6", "one-for-all", "the first head's scales for all", first_scales),
    Wrong("05.6", "precision", "the product in float16", half_product),
    Wrong("05.7", "strided-groups", "tokens of a group lie apart", every_nth),
    Wrong("05.7", "filled-up", "the last group filled with copies", padded_with_zeros_of_the_first),
]

RIGHT: list[tuple[str, Callable]] = [
    ("05.6", scores_by_baddbmm),
    ("05.5", RoomAndCopies),
    ("05.8", surprise_in_float32(float)),
]
