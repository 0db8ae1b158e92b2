"""Wrong answers to the first half of lab 05, and other right ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from labkit.labs.lab05.references import bits_per_element, pack, quantize, quantize_cache
from labkit.sizing import Quantized
from tests.labs.answer import Wrong

# 05.1


def ends(x, dim=-1):
    return x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)


def guarded(scale):
    return torch.where(scale == 0, 1.0, scale)


def by(levels, *, clamp=False, finish=torch.round, span=None):
    """The right rule with its number of steps, its rounding or its range replaced."""

    def wrong(x, nbits):
        least, most = ends(x)
        scale = (span(x) if span else most - least) / levels(nbits)
        codes = finish((x - least) / guarded(scale))
        return (codes.clamp(0, 2**nbits - 1) if clamp else codes).to(torch.uint8), scale, least

    return wrong


def last(nbits):
    return 2**nbits - 1


def largest(x):
    return x.abs().amax(-1, keepdim=True)


def then(change):
    """The reference's three results, changed."""
    return lambda x, nbits: change(*quantize(x, nbits), x, nbits)


def symmetric_in_signed_codes(x, nbits):
    scale = largest(x) / (2 ** (nbits - 1) - 1)
    return (x / guarded(scale)).round().to(torch.int8), scale, torch.zeros_like(scale)


def symmetric_without_zero(x, nbits):
    scale = largest(x) / (2**nbits - 1)
    return (x / guarded(scale)).round().clamp(0, 2**nbits - 1).to(torch.uint8), scale, torch.zeros_like(scale)


def zero_as_a_code(x, nbits):
    low, high = ends(x)
    scale = (high - low) / (2**nbits - 1)
    zero = (-low / guarded(scale)).round()
    return ((x / guarded(scale)).round() + zero).clamp(0, 2**nbits - 1).to(torch.uint8), scale, zero


def zero_as_a_byte(x, nbits):
    codes, scale, zero = zero_as_a_code(x, nbits)
    return codes, scale, zero.clamp(0, 255).to(torch.uint8)


def one_scale(x, nbits):
    low, high = x.min(), x.max()
    scale = (high - low) / (2**nbits - 1)
    return ((x - low) / guarded(scale)).round().to(torch.uint8), scale, low


def one_scale_spread_out(x, nbits):
    codes, scale, low = one_scale(x, nbits)
    return codes, scale.expand(*x.shape[:-1], 1), low.expand(*x.shape[:-1], 1)


def along_the_first(x, nbits):
    low, high = ends(x, 0)
    scale = (high - low) / (2**nbits - 1)
    return ((x - low) / guarded(scale)).round().to(torch.uint8), scale, low


def unguarded(x, nbits):
    low, high = ends(x)
    scale = (high - low) / (2**nbits - 1)
    return ((x - low) / scale).round().to(torch.uint8), scale, low


def one_for_equal_numbers(x, nbits):
    """Where the range is 0 the scale becomes 1, and the code 1."""
    codes, scale, low = quantize(x, nbits)
    return torch.where(scale == 0, 1, codes).to(torch.uint8), guarded(scale), low


def eps_added(x, nbits):
    low, high = ends(x)
    scale = (high - low) / (2**nbits - 1) + 1e-5
    return ((x - low) / scale).round().to(torch.uint8), scale, low


def zero_not_subtracted(x, nbits):
    _, scale, low = quantize(x, nbits)
    return (x / guarded(scale)).round().to(torch.int64).to(torch.uint8), scale, low


def counted_from_the_greatest(x, nbits):
    codes, scale, low = quantize(-x, nbits)
    return codes, -scale, -low


def negative_codes_from_the_greatest(x, nbits):
    codes, scale, low = quantize(-x, nbits)
    return codes, scale, -low


def in_place(x, nbits):
    low, high = ends(x)
    scale = (high - low) / (2**nbits - 1)
    x -= low
    x /= guarded(scale)
    return x.round().to(torch.uint8), scale, low


def without_keepdim(x, nbits):
    codes, scale, low = quantize(x, nbits)
    return codes, scale.squeeze(-1), low.squeeze(-1)


def broadcasts_wrongly(x, nbits):
    low, high = x.amin(-1), x.amax(-1)
    scale = (high - low) / (2**nbits - 1)
    return ((x - low) / guarded(scale)).round().to(torch.uint8), scale, low


def quantize_by_aminmax(x, nbits):
    """Right: aminmax, a clamp and nan_to_num."""
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    scale = (high - low) / (2**nbits - 1)
    return ((x - low) / scale).nan_to_num(0.0).round().clamp(0, 2**nbits - 1).to(torch.uint8), scale, low


def quantize_mended_afterwards(x, nbits):
    """Right: divides 0 by 0, and replaces the codes that came of it."""
    low, high = ends(x)
    scale = (high - low) / (2**nbits - 1)
    codes = ((x - low) / scale).round().clamp(max=2**nbits - 1).to(torch.uint8)
    return torch.where(high == low, 0, codes).to(torch.uint8), scale, low


def quantize_in(dtype):
    """All steps in one dtype, scale and zero given back in x's. Right in float64; float32 loses digits of float64."""

    def answer(x, nbits):
        codes, scale, zero = quantize(x.to(dtype), nbits)
        return codes, scale.to(x.dtype), zero.to(x.dtype)

    return answer


def quantize_with_a_least_scale(x, nbits):
    """Right: the least scale that the dtype holds, and half added before the fraction is cut off."""
    low = x.min(dim=-1, keepdim=True).values
    scale = (x.max(dim=-1, keepdim=True).values - low) / (2**nbits - 1)
    scale = scale.clamp(min=torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps)
    return ((x - low) / scale + 0.5).floor().clamp(max=2**nbits - 1).byte(), scale, low


def quantize_by_the_nearest_mark(x, nbits):
    """Right: the distance to every mark, and the nearest."""
    low, high = ends(x)
    scale = (high - low) / (2**nbits - 1)
    marks = torch.arange(2**nbits, dtype=x.dtype) * scale + low
    return (x[..., None] - marks[..., None, :]).abs().argmin(-1).to(torch.uint8), scale, low


def quantize_by_reciprocal(x, nbits):
    """Right: in float32, multiplied by steps per number."""
    wide = x if x.dtype == torch.float64 else x.float()
    low, high = ends(wide)
    steps = torch.where(high > low, (2**nbits - 1) / (high - low), 0.0)
    return ((wide - low) * steps).round().to(torch.uint8), ((high - low) / (2**nbits - 1)).to(x.dtype), low.to(x.dtype)


def stepped(levels):
    return by(levels, clamp=True)


def signed_range(x, nbits):
    codes, scale, low = quantize(x, nbits)
    return (codes.int() - 2 ** (nbits - 1)).to(torch.uint8), scale, low


def clipped_at(most):
    return then(lambda c, s, z, x, n: (c.clamp(max=most(n)), s, z))


def multiplied(x, nbits):
    _, scale, low = quantize(x, nbits)
    return ((x - low) * scale).round().to(torch.uint8), scale, low


def one_guard_for_all(x, nbits):
    """Where one group has no range, every scale becomes 1."""
    low, high = ends(x)
    scale = (high - low) / (2**nbits - 1)
    if (scale == 0).any():
        scale = torch.ones_like(scale)
    return ((x - low) / scale).round().to(torch.uint8), scale, low


def by_a_view(x, nbits):
    return tuple(part.view(*x.shape[:-1], -1) for part in quantize(x.view(-1, x.shape[-1]), nbits))


def remembered(function):
    """The first result again for arguments of the same shapes."""
    known = {}

    def wrong(*args):
        key = tuple(arg.shape if isinstance(arg, torch.Tensor) else arg for arg in args)
        return known.setdefault(key, function(*args))

    return wrong


def in_one_buffer(codes, nbits, buffers={}):  # noqa: B006
    """One output for every call."""
    got = pack(codes, nbits)
    buffer = buffers.setdefault((got.shape, nbits), torch.empty_like(got))
    return buffer.copy_(got)


def quantize_in_float64(x, nbits):
    """Right: float64 inside, cast back."""
    codes, scale, zero = quantize(x.double(), nbits)
    return [codes, scale.to(x.dtype), zero.to(x.dtype)]


def quantize_in_numpy(x, nbits):
    """The right numbers, by NumPy's arithmetic."""
    numbers = x.double().numpy()
    low, high = numbers.min(-1, keepdims=True), numbers.max(-1, keepdims=True)
    scale = (high - low) / (2**nbits - 1)
    codes = np.rint((numbers - low) / np.where(scale == 0, 1, scale)).astype(np.uint8)
    return torch.from_numpy(codes), torch.from_numpy(scale).to(x.dtype), torch.from_numpy(low).to(x.dtype)


def quantize_row_by_row(x, nbits):
    """Right: a loop over groups, and a case for those without a range."""
    rows = x.reshape(-1, x.shape[-1])
    codes, scale, zero = (
        torch.zeros(rows.shape, dtype=torch.uint8),
        x.new_zeros(len(rows), 1),
        x.new_zeros(len(rows), 1),
    )
    for place, row in enumerate(rows):
        zero[place] = row.min()
        if row.max() > row.min():
            scale[place] = (row.max() - row.min()) / ((1 << nbits) - 1)
            steps = ((row - zero[place]) / scale[place]).round()
            codes[place] = torch.minimum(steps, steps.new_tensor((1 << nbits) - 1)).to(torch.uint8)
    return codes.view(x.shape), scale.view(*x.shape[:-1], 1), zero.view(*x.shape[:-1], 1)


# 05.2


def plus_binds_tighter(codes, nbits):
    per_byte = 8 // nbits
    out = codes[..., ::per_byte].clone()
    for place in range(1, per_byte):
        out = out + codes[..., place::per_byte] << place * nbits
    return out


def joined_by_and(codes, nbits):
    return codes[..., ::2] & (codes[..., 1::2] << 4) if nbits == 4 else pack(codes, nbits)


def pack_by_python(codes, nbits):
    """Right: Python's whole numbers, byte by byte."""
    rows = codes.reshape(-1, 8 // nbits).tolist()
    sums = [sum(code << place * nbits for place, code in enumerate(row)) for row in rows]
    return torch.tensor(sums, dtype=torch.uint8).reshape(*codes.shape[:-1], -1)


def packed(parts, shift, start=lambda codes, per: torch.zeros_like(codes[..., : codes.shape[-1] // per])):
    """Codes of a byte, from `parts(codes, per_byte, place)`, shifted by `shift(place, nbits)` and joined."""

    def wrong(codes, nbits):
        per_byte = 8 // nbits
        out = start(codes, per_byte)
        for place in range(per_byte):
            out |= parts(codes, per_byte, place) << shift(place, nbits)
        return out

    return wrong


def neighbour(codes, per_byte, place):
    return codes[..., place::per_byte]


def piece(codes, per_byte, place):
    return codes.chunk(per_byte, dim=-1)[place]


def up(place, nbits):
    return place * nbits


def down(place, nbits):
    return 8 - nbits - place * nbits


def pairs_always(codes, nbits):
    return codes[..., ::2] | codes[..., 1::2] << 4


def pairs_or_bytes(codes, nbits):
    return codes if nbits == 8 else pairs_always(codes, nbits)


def no_case_for_eight(codes, nbits):
    return pack(codes, nbits) if nbits < 8 else codes[..., ::2] | codes[..., 1::2]


def shifted_eight(codes, nbits):
    return pack(codes, nbits) if nbits < 8 else codes >> 4


def summed(codes, nbits):
    weights = 2 ** (nbits * torch.arange(8 // nbits))
    return (codes.unflatten(-1, (-1, 8 // nbits)) * weights).sum(-1)


def shifts_codes_themselves(codes, nbits):
    for place in range(1, 8 // nbits):
        codes[..., place :: 8 // nbits] <<= place * nbits
    return codes.unflatten(-1, (-1, 8 // nbits)).sum(-1, dtype=torch.uint8)


def writes_into_the_buffer(codes, nbits):
    out = torch.zeros_like(codes)
    got = pack(codes, nbits)
    out[..., : got.shape[-1]] = got
    return out[..., : got.shape[-1]]


def buffer_and_all(codes, nbits):
    out = torch.zeros_like(codes)
    got = pack(codes, nbits)
    out[..., : got.shape[-1]] = got
    return out


def along_the_first_dimension(codes, nbits):
    return pack(codes.movedim(0, -1), nbits).movedim(-1, 0)


def by_another_view(codes, nbits):
    pairs = codes.view(torch.int16) if nbits == 4 else None
    return pack(codes, nbits) if pairs is None else (pairs & 15 | pairs >> 4).to(torch.uint8)


def pack_by_weights(codes, nbits):
    """Right: weights, and a sum in uint8."""
    weights = 2 ** (nbits * torch.arange(8 // nbits, dtype=torch.uint8))
    return (codes.unflatten(-1, (-1, 8 // nbits)) * weights).sum(-1, dtype=torch.uint8)


def pack_from_the_last(codes, nbits):
    """Right: shifts what it has before each code it adds."""
    places = codes.unflatten(-1, (-1, 8 // nbits)).unbind(-1)
    out = places[-1]
    for part in reversed(places[:-1]):
        out = out * 2**nbits + part
    return out


def pack_in_int64(codes, nbits):
    """Right: wide numbers between, and a case for each width."""
    wide = codes.long()
    if nbits == 8:
        return codes
    if nbits == 4:
        return (wide[..., ::2] + 16 * wide[..., 1::2]).to(torch.uint8)
    return (wide[..., ::4] + 4 * wide[..., 1::4] + 16 * wide[..., 2::4] + 64 * wide[..., 3::4]).to(torch.uint8)


# 05.3


def there_and_back(groups, nbits):
    codes, scale, zero = quantize(groups, nbits)
    return codes * scale + zero


def regrouped(x, nbits, places):
    """Numbers that share a scale as `places` says: it arranges any tensor of x's shape so that groups come last."""
    order = places(torch.arange(x.numel()).view_as(x))
    out = torch.empty(x.numel(), dtype=x.dtype)
    out[order] = there_and_back(x.flatten()[order], nbits)
    return out.view_as(x)


def cache_by(keys, values):
    """Groups of keys and of values: functions of a tensor and the group size."""

    def wrong(k, v, nbits, group_size):
        return (
            regrouped(k, nbits, lambda x: keys(x, group_size)),
            regrouped(v, nbits, lambda x: values(x, group_size)),
        )

    return wrong


def channel(x, size):
    return x.mT.unflatten(-1, (-1, size))


def token(x, size):
    return x.unflatten(-1, (-1, size))


def every_nth(places):
    """The same dimension, strided."""
    return lambda x, size: places(x, places(x, 1).shape[-2] // size).mT


def whole_channel(x, size):
    return x.mT


def whole_token(x, size):
    return x


def tile(x, size):
    return x.unflatten(2, (-1, size)).flatten(-2)


def per_head(x, size):
    return x.flatten(-2)


def heads_within_tokens(x, size):
    """Tokens and heads flattened, tokens outside."""
    return x.transpose(1, 2).flatten(1, 2).mT.unflatten(-1, (-1, size))


def token_of_all_heads(x, size):
    return x.transpose(1, 2).flatten(2)


def rows_within_tokens(x, size):
    return x.permute(1, 3, 2, 0).flatten(-2).unflatten(-1, (-1, size))


def all_rows(x, size):
    return x.permute(1, 2, 0, 3).flatten(-2)


def changed(change_k, change_v=lambda v, *_: v):
    """The right pair, changed."""

    def wrong(k, v, nbits, group_size):
        keys, values = quantize_cache(k, v, nbits, group_size)
        return change_k(keys, k, nbits, group_size), change_v(values, v, nbits, group_size)

    return wrong


def without_zero(x, nbits, group_size, turn):
    codes, scale, _ = quantize((x.mT if turn else x).unflatten(-1, (-1, group_size)), nbits)
    return (codes * scale).flatten(-2).mT if turn else (codes * scale).flatten(-2)


def codes_of_values(_, v, nbits, group_size):
    return quantize(v.unflatten(-1, (-1, group_size)), nbits)[0].flatten(-2).to(v.dtype)


def twice_the_keys(k, v, nbits, group_size):
    return quantize_cache(k, k, nbits, group_size)


def reshaped_keys(k, v, nbits, group_size):
    """A reshape where a transpose is needed: the groups are those of a token."""
    keys = there_and_back(k.reshape(*k.shape[:2], k.shape[3], k.shape[2]).unflatten(-1, (-1, group_size)), nbits)
    return keys.reshape(k.shape), quantize_cache(k, v, nbits, group_size)[1]


def cache_by_loops(k, v, nbits, group_size):
    """Right: group after group, each written to its place."""
    keys, values = torch.empty_like(k), torch.empty_like(v)
    for start in range(0, k.shape[2], group_size):
        part = k[:, :, start : start + group_size]
        keys[:, :, start : start + group_size] = there_and_back(part.mT, nbits).mT
    for start in range(0, v.shape[3], group_size):
        values[..., start : start + group_size] = there_and_back(v[..., start : start + group_size], nbits)
    return keys, values


def cache_by_reshape(k, v, nbits, group_size):
    """Right: reshape and permute, with all sizes written out."""
    batch, heads, tokens, head_dim = k.shape
    keys = k.reshape(batch, heads, tokens // group_size, group_size, head_dim).transpose(-1, -2)
    keys = there_and_back(keys, nbits).transpose(-1, -2).reshape(k.shape)
    return keys, there_and_back(v.reshape(-1, group_size), nbits).view(v.shape)


def cache_along_a_dimension(k, v, nbits, group_size):
    """Right: no turning, scales taken along dimension 3 of five; an eps in the scale."""

    def along(x, dim):
        groups = x.unflatten(dim, (-1, group_size))
        low, high = ends(groups, dim + 1)
        scale = (high - low) / (2**nbits - 1) + 1e-8
        return (((groups - low) / scale).round() * scale + low).flatten(dim, dim + 1)

    return along(k, 2), along(v, 3)


def restored_by(formula):
    """Right groups, put back by a formula of (codes, scale, zero)."""

    def wrong(k, v, nbits, group_size):
        keys, values = (formula(*quantize(x.unflatten(-1, (-1, group_size)), nbits)).flatten(-2) for x in (k.mT, v))
        return keys.mT, values

    return wrong


def in_groups_of_its_own(formula):
    """Right groups; formula(groups, nbits) gives them back."""

    def wrong(k, v, nbits, group_size):
        keys, values = (formula(x.unflatten(-1, (-1, group_size)), nbits).flatten(-2) for x in (k.mT, v))
        return keys.mT, values

    return wrong


def without_guard(groups, nbits):
    low, high = ends(groups)
    scale = (high - low) / (2**nbits - 1)
    return ((groups - low) / scale).round() * scale + low


def of_2_to_the_nbits(groups, nbits):
    low, high = ends(groups)
    scale = (high - low) / 2**nbits
    return ((groups - low) / guarded(scale)).round() * scale + low


def floored(groups, nbits):
    scale, zero = quantize(groups, nbits)[1:]
    return ((groups - zero) / guarded(scale)).floor() * scale + zero


def symmetric(groups, nbits):
    scale = largest(groups) / (2 ** (nbits - 1) - 1)
    return (groups / guarded(scale)).round() * scale


def counted_groups(x, size):
    """(group_size, -1) where (-1, group_size) belongs."""
    return x.unflatten(-1, (size, -1))


def values_by_a_view(k, v, nbits, group_size):
    return quantize_cache(k, v, nbits, group_size)[0], there_and_back(v.view(-1, group_size), nbits).view(v.shape)


def keys_through_half(k, v, nbits, group_size):
    return quantize_cache(k.half(), v, nbits, group_size)[0].to(k.dtype), quantize_cache(k, v, nbits, group_size)[1]


def cache_in_float64(k, v, nbits, group_size):
    """Right: float64 inside, cast back, in a list."""
    return [x.to(k.dtype) for x in quantize_cache(k.double(), v.double(), nbits, group_size)]


def cache_by_split(k, v, nbits, group_size):
    """Right: split and cat."""
    keys = torch.cat([there_and_back(part.mT, nbits).mT for part in k.split(group_size, dim=2)], dim=2)
    return keys, torch.cat([there_and_back(part, nbits) for part in v.split(group_size, dim=3)], dim=3)


# 05.4


def from_sums(total):
    """total(packed, rest, nbits, group_size, residual_length, full_bits), over all tokens."""

    def wrong(tokens, nbits, group_size, residual_length, full_bits=16):
        count = max(0, tokens - residual_length) // group_size * group_size
        return total(count, tokens - count, nbits, group_size, residual_length, full_bits) / tokens

    return wrong


def other_default(tokens, nbits, group_size, residual_length, full_bits=32):
    return bits_per_element(tokens, nbits, group_size, residual_length, full_bits)


def bits_in_numpy(tokens, nbits, group_size, residual_length, full_bits=16):
    """Right: a float of NumPy's."""
    return np.float64(bits_per_element(tokens, nbits, group_size, residual_length, full_bits))


def counted(*, packed=None, per=None, full=None, total=lambda bits, tokens, packed: bits / tokens):
    """The right sum, with some of its parts replaced."""

    def wrong(tokens, nbits, group_size, residual_length, full_bits=16):
        older = max(0, tokens - residual_length)
        count = packed(tokens, group_size, residual_length) if packed else older // group_size * group_size
        each = per(nbits, group_size, full_bits) if per else nbits + 32 / group_size
        return total(count * each + (tokens - count) * (full or full_bits), tokens, count)

    return wrong


def rounded_up(tokens, group_size, residual_length):
    return -(-max(0, tokens - residual_length) // group_size) * group_size


def swapped_parts(tokens, nbits, group_size, residual_length, full_bits=16):
    packed = max(0, tokens - residual_length) // group_size * group_size
    return (packed * full_bits + (tokens - packed) * (nbits + 32 / group_size)) / tokens


def then_bits(change):
    """The right average, changed: change(bits, full_bits)."""

    def wrong(tokens, nbits, group_size, residual_length, full_bits=16):
        return change(bits_per_element(tokens, nbits, group_size, residual_length, full_bits), full_bits)

    return wrong


def bits_by_sizing(tokens, nbits, group_size, residual_length, full_bits=16):
    """Right: the package's own arithmetic, a Fraction, where packing knows such groups."""
    if group_size % 4:
        return bits_by_group(tokens, nbits, group_size, residual_length, full_bits)
    dtype = {16: "float16", 32: "float32"}[full_bits]
    kept = Quantized(nbits=nbits, group_size=group_size, residual_length=residual_length, dtype=dtype)
    return kept.bits_held(tokens) / tokens


def bits_token_by_token(tokens, nbits, group_size, residual_length, full_bits=16):
    """Right: a queue that packs its oldest group when enough newer tokens wait."""
    waiting = groups = 0
    for _ in range(tokens):
        waiting += 1
        if waiting >= group_size + residual_length:
            waiting, groups = waiting - group_size, groups + 1
    return (groups * (group_size * nbits + 16 + 16) + waiting * full_bits) / tokens


def bits_by_shares(tokens, nbits, group_size, residual_length, full_bits=16):
    """Right: the share of packed tokens, and a case for a young cache."""
    if tokens < residual_length + group_size:
        return full_bits
    older = tokens - residual_length
    share = (older - older % group_size) / tokens
    return share * (nbits + 16 * 2 / group_size) + (1 - share) * full_bits


def bits_by_group(tokens, nbits, group_size, residual_length, full_bits=16):
    """Right: a group's bits, group after group."""
    groups = max((tokens - residual_length) // group_size, 0)
    return groups * (nbits * group_size + 32) / tokens + full_bits * (1 - groups * group_size / tokens)


WRONG = [
    Wrong("05.1", "left-pytorch", "by NumPy", quantize_in_numpy),
    Wrong("05.1", "truncated", "cuts fractions off", by(last, finish=torch.floor)),
    Wrong("05.1", "one-level-too-many", "divides by 2**nbits; the greatest of 8 bits wraps to 0",
           by(lambda nbits: 2**nbits)),
    Wrong("05.1", "one-level-too-many", "divides by 2**nbits, and clamps", by(lambda nbits: 2**nbits, clamp=True)),
    Wrong("05.1", "fixed-bits", "writes 15 down", by(lambda nbits: 15)),
    Wrong("05.1", "half-the-codes", "takes signed codes' range", by(lambda nbits: 2 ** (nbits - 1) - 1, clamp=True)),
    Wrong("05.1", "symmetric", "no zero point: numbers below 0 are lost", symmetric_without_zero),
    Wrong("05.1", "codes-dtype", "symmetric, in int8", symmetric_in_signed_codes),
    Wrong("05.1", "codes-dtype", "leaves the codes floats", then(lambda c, s, z, x, n: (c.float(), s, z))),
    Wrong("05.1", "abs-max", "scale from the largest absolute value", by(last, span=largest)),
    Wrong("05.1", "abs-max", "scale from the greatest number", by(last, span=lambda x: ends(x)[1])),
    Wrong("05.1", "zero-is-a-code", "rounds the zero point to a code", zero_as_a_code),
    Wrong("05.1", "zero-is-a-code", "keeps the zero point as a byte", zero_as_a_byte),
    Wrong("05.1", "zero-sign", "a zero point to subtract", then(lambda c, s, z, x, n: (c, s, -z))),
    Wrong("05.1", "no-zero", "returns 0 for zero", then(lambda c, s, z, x, n: (c, s, torch.zeros_like(z)))),
    Wrong("05.1", "one-scale-for-all", "one range for the tensor", one_scale),
    Wrong("05.1", "one-scale-for-all", "one range, repeated for each group", one_scale_spread_out),
    Wrong("05.1", "wrong-dimension", "groups along the first dimension", along_the_first),
    Wrong("05.1", "no-keepdim", "drops the group's dimension", without_keepdim),
    Wrong("05.1", "raised", "drops it before it subtracts", broadcasts_wrongly),
    Wrong("05.1", "constant-group", "divides 0 by 0", unguarded),
    Wrong("05.1", "constant-group", "gives equal numbers code 1 and scale 1", one_for_equal_numbers),
    Wrong("05.1", "small-group", "adds 1e-5 to the scale", eps_added),
    Wrong("05.1", "zero-not-subtracted", "divides x as it is", zero_not_subtracted),
    Wrong("05.1", "not-divided", "rounds without the scale",
           then(lambda c, s, z, x, n: ((x - z).round().to(torch.uint8), s, z))),
    Wrong("05.1", "scale-inverted", "returns steps per number",
           then(lambda c, s, z, x, n: (c, 1 / guarded(s), z))),
    Wrong("05.1", "reversed", "counts from the greatest number down", negative_codes_from_the_greatest),
    Wrong("05.1", "reversed", "counts down with a negative scale", counted_from_the_greatest),
    Wrong("05.1", "rounded-up", "rounds up", by(last, finish=torch.ceil)),
    Wrong("05.1", "swapped", "returns scale first", then(lambda c, s, z, x, n: (s, z, c))),
    Wrong("05.1", "swapped", "returns zero before scale", then(lambda c, s, z, x, n: (c, z, s))),
    Wrong("05.1", "not-three", "returns the codes alone", then(lambda c, s, z, x, n: c)),
    Wrong("05.1", "arguments-changed", "subtracts in place", in_place),
    Wrong("05.1", "dtype", "returns scales in float32",
           then(lambda c, s, z, x, n: (c, s.float(), z.float()))),
    Wrong("05.1", "precision", "float64 squeezed through float32", quantize_in(torch.float32)),
    Wrong("05.1", "one-off", "adds one to every code", then(lambda c, s, z, x, n: (c + 1, s, z))),
    Wrong("05.1", "levels-miscounted", "nbits steps", stepped(lambda nbits: nbits)),
    Wrong("05.1", "levels-miscounted", "2 * nbits for 2**nbits", stepped(lambda nbits: 2 * nbits - 1)),
    Wrong("05.1", "xor", "2 ^ nbits - 1", stepped(lambda nbits: 2 ^ nbits - 1)),
    Wrong("05.1", "range-not-divided", "returns the range", then(lambda c, s, z, x, n: (c, s * (2**n - 1), z))),
    Wrong("05.1", "abs-max", "from the least to the largest absolute value",
           by(last, span=lambda x: largest(x) - x.amin(-1, keepdim=True))),
    Wrong("05.1", "zero-is-the-middle", "zero from the mean",
           then(lambda c, s, z, x, n: (c, s, x.mean(-1, keepdim=True)))),
    Wrong("05.1", "signed", "subtracts half of the codes", signed_range),
    Wrong("05.1", "clipped", "clamps at the last signed code", clipped_at(lambda nbits: 2 ** (nbits - 1) - 1)),
    Wrong("05.1", "clipped", "clamps at 15", clipped_at(lambda nbits: 15)),
    Wrong("05.1", "multiplied", "multiplies by the scale", multiplied),
    Wrong("05.1", "constant-group", "guards every group when one has no range", one_guard_for_all),
    Wrong("05.1", "small-group", "adds 1e-8 to the scale it returns",
           then(lambda c, s, z, x, n: (c, s + 1e-8, z))),
    Wrong("05.1", "small-group", "takes 1e-3 for the least scale",
           lambda x, n: (((x - ends(x)[0]) / quantize(x, n)[1].clamp(min=1e-3)).round().to(torch.uint8),
                         *quantize(x, n)[1:])),
    Wrong("05.1", "layout", "views x as rows", by_a_view),
    Wrong("05.1", "error", "gives the first result of the same shapes again", remembered(quantize)),
    Wrong("05.1", "error", "goes through float16",
           lambda x, n: (quantize(x.half(), n)[0], *quantize(x, n)[1:])),
    Wrong("05.2", "precedence", "adds before it shifts", plus_binds_tighter),
    Wrong("05.2", "joined-by-and", "& for |", joined_by_and),
    Wrong("05.2", "wrong-shift", "shifts one place too far",
           packed(neighbour, lambda place, nbits: (place + 1) * nbits)),
    Wrong("05.2", "codes-lost", "shifts down", lambda codes, nbits: pack(codes, nbits) & 2**nbits - 1),
    Wrong("05.2", "result-overwritten", "one output for every call", in_one_buffer),
    Wrong("05.2", "values", "gives the first result of the same shapes again", remembered(pack)),
    Wrong("05.2", "not-packed", "keeps a byte for each code", lambda codes, nbits: codes.clone(),
           "sgl-project/sglang#22777"),
    Wrong("05.2", "not-packed", "packs into the front of a tensor as long as before", buffer_and_all),
    Wrong("05.2", "memory-kept", "returns a slice of a tensor as long as before", writes_into_the_buffer),
    Wrong("05.2", "first-code-high", "puts the first code highest", packed(neighbour, down)),
    Wrong("05.2", "halves", "packs the first half with the second", packed(piece, up)),
    Wrong("05.2", "halves", "packs halves, the first highest", packed(piece, down)),
    Wrong("05.2", "unshifted", "forgets the shift", packed(neighbour, lambda place, nbits: 0)),
    Wrong("05.2", "fixed-bits", "packs pairs, whatever nbits", pairs_or_bytes),
    Wrong("05.2", "fixed-bits", "shifts by 4, whatever nbits", packed(neighbour, lambda place, nbits: min(7, 4 * place)
                                                                      if place < 2 else 8)),
    Wrong("05.2", "wrong-shift", "shifts by the place alone", packed(neighbour, lambda place, nbits: place)),
    Wrong("05.2", "codes-lost", "keeps one code in each byte",
           lambda codes, nbits: codes[..., :: 8 // nbits].clone()),
    Wrong("05.2", "fixed-bits", "packs 8-bit codes by twos", no_case_for_eight),
    Wrong("05.2", "eight-bits", "shifts 8-bit codes", shifted_eight),
    Wrong("05.2", "dtype", "sums, which widens", summed),
    Wrong("05.2", "arguments-changed", "shifts the codes in place", shifts_codes_themselves),
    Wrong("05.2", "arguments-changed", "starts from a view of the codes",
           packed(neighbour, up, lambda codes, per: codes[..., ::per])),
    Wrong("05.2", "wrong-dimension", "forgets the dots in codes[..., place::per_byte]", along_the_first_dimension),
    Wrong("05.2", "groups-left", "leaves a byte's codes side by side",
           lambda codes, nbits: codes.unflatten(-1, (-1, 8 // nbits)).clone()),
    Wrong("05.2", "bits-flipped", "turns every bit round", lambda codes, nbits: pack(codes, nbits) ^ 255),
    Wrong("05.2", "layout", "reads pairs as int16, which needs codes in order", by_another_view),
    Wrong("05.3", "keys-per-token", "keys as values", cache_by(token, token), "llama.cpp, --cache-type-k q4_0"),
    Wrong("05.3", "keys-per-token", "one scale for each token's keys", cache_by(whole_token, token)),
    Wrong("05.3", "keys-per-token", "reshapes keys where they should be transposed", reshaped_keys),
    Wrong("05.3", "values-per-channel", "values as keys", cache_by(channel, channel)),
    Wrong("05.3", "axes-swapped", "keys per token, values per channel", cache_by(token, channel)),
    Wrong("05.3", "group-size-ignored", "one scale for each channel's keys", cache_by(whole_channel, token)),
    Wrong("05.3", "group-size-ignored", "one scale for each token's values", cache_by(channel, whole_token)),
    Wrong("05.3", "group-size", "always groups of 8", cache_by(lambda x, size: channel(x, 8), token)),
    Wrong("05.3", "strided-groups", "every third token's key", cache_by(every_nth(channel), token)),
    Wrong("05.3", "strided-groups", "every second channel's value", cache_by(channel, every_nth(token))),
    Wrong("05.3", "heads-mixed", "flattens tokens and heads, then groups keys", cache_by(heads_within_tokens, token),
           "sgl-project/sglang#22777"),
    Wrong("05.3", "heads-mixed", "one scale for a token's values in all heads", cache_by(channel, token_of_all_heads)),
    Wrong("05.3", "rows-mixed", "flattens rows and tokens, then groups keys", cache_by(rows_within_tokens, token)),
    Wrong("05.3", "rows-mixed", "one scale for all rows' values", cache_by(channel, all_rows)),
    Wrong("05.3", "tile-shares-a-scale", "one scale for a block of tokens", cache_by(tile, token)),
    Wrong("05.3", "tile-shares-a-scale", "one scale for each head", cache_by(channel, per_head)),
    Wrong("05.3", "not-turned-back", "leaves keys transposed", changed(lambda keys, *_: keys.mT)),
    Wrong("05.3", "groups-left", "leaves values in groups",
           changed(lambda keys, *_: keys, lambda values, v, n, size: values.unflatten(-1, (-1, size)))),
    Wrong("05.3", "rearranged", "reshapes keys back", changed(lambda keys, k, *_: keys.mT.reshape(k.shape))),
    Wrong("05.3", "not-quantized", "leaves values as they are", changed(lambda keys, *_: keys, lambda q, v, *_: v)),
    Wrong("05.3", "zero-not-added", "forgets zero", changed(lambda _, k, n, size: without_zero(k, n, size, True))),
    Wrong("05.3", "codes-returned", "returns values' codes", changed(lambda keys, *_: keys, codes_of_values)),
    Wrong("05.3", "fixed-bits", "always 4 bits", lambda k, v, nbits, size: quantize_cache(k, v, 4, size)),
    Wrong("05.3", "one-for-the-other", "quantizes K twice", twice_the_keys),
    Wrong("05.3", "swapped", "returns V first", lambda *args: quantize_cache(*args)[::-1]),
    Wrong("05.3", "not-a-pair", "returns the keys", lambda *args: quantize_cache(*args)[0]),
    Wrong("05.3", "dtype", "computes in float32",
           lambda k, v, nbits, size: quantize_cache(k.float(), v.float(), nbits, size)),
    Wrong("05.3", "values", "clips what comes back", changed(lambda keys, *_: keys.clamp(max=1.0))),
    Wrong("05.3", "groups-counted", "(group_size, -1) for (-1, group_size)",
           cache_by(lambda x, size: counted_groups(x.mT, size), counted_groups)),
    Wrong("05.3", "groups-counted", "the same, for values", cache_by(channel, counted_groups)),
    Wrong("05.3", "zero-misplaced", "(codes + zero) * scale", restored_by(lambda c, s, z: (c + z) * s)),
    Wrong("05.3", "zero-misplaced", "codes * zero + scale", restored_by(lambda c, s, z: c * z + s)),
    Wrong("05.3", "partly-quantized", "leaves the last group of keys as it came",
           changed(lambda keys, k, n, size: torch.cat((keys[:, :, :-size], k[:, :, -size:]), dim=2))),
    Wrong("05.3", "truncated", "cuts fractions off", in_groups_of_its_own(floored)),
    Wrong("05.3", "one-level-too-many", "divides by 2**nbits", in_groups_of_its_own(of_2_to_the_nbits)),
    Wrong("05.3", "symmetric", "has no zero point", in_groups_of_its_own(symmetric)),
    Wrong("05.3", "constant-group", "divides 0 by 0", in_groups_of_its_own(without_guard)),
    Wrong("05.3", "layout", "views values as rows", values_by_a_view),
    Wrong("05.3", "values", "keys go through float16", keys_through_half),
    Wrong("05.3", "remembered", "gives the first result of the same shapes again", remembered(quantize_cache)),
    Wrong("05.3", "group-size-ignored", "groups of 32 where they fit",
           cache_by(lambda x, size: channel(x, 32 if x.shape[2] % 32 == 0 else size), whole_token)),
    Wrong("05.4", "metadata-once", "one scale for all", from_sums(lambda p, rest, n, g, r, f: p * n + 32 + rest * f)),
    Wrong("05.4", "metadata-for-all", "scales for what waits",
           from_sums(lambda p, rest, n, g, r, f: p * n + rest * f + (p + rest) * 32 / g)),
    Wrong("05.4", "metadata-multiplied", "metadata times group_size", counted(per=lambda n, g, f: n + 32 * g)),
    Wrong("05.4", "metadata-in-nbits", "scales in nbits", counted(per=lambda n, g, f: n + 2 * n / g)),
    Wrong("05.4", "packed-only", "forgets what waits", from_sums(lambda p, rest, n, g, r, f: p * (n + 32 / g))),
    Wrong("05.4", "rest-forgotten", "counts the residual, not the incomplete group",
           from_sums(lambda p, rest, n, g, r, f: p * (n + 32 / g) + r * f)),
    Wrong("05.4", "rest-forgotten", "the same, never more than there are",
           from_sums(lambda p, rest, n, g, r, f: p * (n + 32 / g) + min(r, p + rest) * f)),
    Wrong("05.4", "rest-twice", "counts the residual twice",
           from_sums(lambda p, rest, n, g, r, f: p * (n + 32 / g) + (rest + r) * f)),
    Wrong("05.4", "groups-for-tokens", "takes groups for tokens", counted(packed=lambda t, g, r: max(0, t - r) // g)),
    Wrong("05.4", "rest-of-all", "takes the residual off whole groups",
           counted(packed=lambda t, g, r: max(0, t // g * g - r))),
    Wrong("05.4", "residual-in-groups", "cuts the residual to whole groups",
           counted(packed=lambda t, g, r: max(0, t // g - r // g) * g)),
    Wrong("05.4", "one-short", "`>` for `>=`", counted(packed=lambda t, g, r: max(0, t - r - 1) // g * g)),
    Wrong("05.4", "to-the-nearest", "rounds the number of groups",
           counted(packed=lambda t, g, r: round(max(0, t - r) / g) * g)),
    Wrong("05.4", "unweighted", "takes the mean of both sizes",
           lambda tokens, nbits, group_size, residual_length, full_bits=16: (nbits + 32 / group_size + full_bits) / 2),
    Wrong("05.4", "packed-for-all", "counts packed sizes for every token",
           from_sums(lambda p, rest, n, g, r, f: (p + rest) * (n + 32 / g) + rest * f)),
    Wrong("05.4", "factor", "counts K and V", then_bits(lambda bits, full: 2 * bits)),
    Wrong("05.4", "signature", "another default", other_default),
    Wrong("05.4", "not-a-fraction", "rounds to two digits",
           then_bits(lambda bits, full: round(bits, 2))),
    Wrong("05.4", "no-metadata", "counts codes only", counted(per=lambda n, g, f: n)),
    Wrong("05.4", "scale-only", "counts the scale only", counted(per=lambda n, g, f: n + 16 / g)),
    Wrong("05.4", "metadata-in-bytes", "adds 4 bytes to bits", counted(per=lambda n, g, f: n + 4 / g)),
    Wrong("05.4", "metadata-per-number", "adds a scale to each number", counted(per=lambda n, g, f: n + 32)),
    Wrong("05.4", "metadata-twice", "counts scales for K and for V", counted(per=lambda n, g, f: n + 2 * 32 / g)),
    Wrong("05.4", "metadata-in-full-bits", "counts scales in full_bits", counted(per=lambda n, g, f: n + 2 * f / g)),
    Wrong("05.4", "floor-division", "divides whole numbers with //", counted(per=lambda n, g, f: n + 32 // g)),
    Wrong("05.4", "no-residual", "packs every whole group", counted(packed=lambda t, g, r: t // g * g)),
    Wrong("05.4", "no-residual", "packs every token", counted(packed=lambda t, g, r: t)),
    Wrong("05.4", "no-whole-groups", "packs all but the residual", counted(packed=lambda t, g, r: max(0, t - r))),
    Wrong("05.4", "rounded-up", "packs a group that is not complete", counted(packed=rounded_up)),
    Wrong("05.4", "negative", "packs less than nothing", counted(packed=lambda t, g, r: (t - r) // g * g)),
    Wrong("05.4", "residual-at-a-time", "packs the residual when it is full",
           counted(packed=lambda t, g, r: t // (r or g) * (r or g)), "jy-yuan/KIVI, its keys"),
    Wrong("05.4", "fixed-full-bits", "writes 16 down", counted(full=16)),
    Wrong("05.4", "parts-swapped", "swaps the two sizes", swapped_parts),
    Wrong("05.4", "total", "forgets to divide", counted(total=lambda bits, tokens, packed: bits)),
    Wrong("05.4", "bytes", "returns bytes", counted(total=lambda bits, tokens, packed: bits / tokens / 8)),
    Wrong("05.4", "ratio", "returns how many times smaller", then_bits(lambda bits, full: full / bits)),
    Wrong("05.4", "not-a-fraction", "divides the sum with //",
           counted(total=lambda bits, tokens, packed: bits // tokens)),
    Wrong("05.4", "no-residual", "counts the packed tokens only",
           lambda tokens, nbits, group_size, residual_length, full_bits=16: nbits + 32 / group_size),
    Wrong("05.4", "packed-alone", "divides by the packed tokens where there are any",
           counted(total=lambda bits, tokens, packed: bits / (packed or tokens))),
    Wrong("05.4", "raised", "divides by the packed tokens",
           counted(total=lambda bits, tokens, packed: bits / packed)),
    Wrong("05.4", "not-a-number", "returns a tensor", then_bits(lambda bits, full: torch.tensor(bits))),
    Wrong("05.4", "count", "counts three numbers for each group", counted(per=lambda n, g, f: n + 48 / g)),
]  # fmt: skip

RIGHT: list[tuple[str, Callable]] = [
    ("05.1", quantize_by_aminmax),
    ("05.1", quantize_mended_afterwards),
    ("05.1", quantize_in(torch.float64)),
    ("05.1", quantize_with_a_least_scale),
    ("05.1", quantize_by_the_nearest_mark),
    ("05.1", quantize_by_reciprocal),
    ("05.1", quantize_in_float64),
    ("05.1", quantize_row_by_row),
    ("05.2", pack_by_python),
    ("05.2", pack_by_weights),
    ("05.2", pack_from_the_last),
    ("05.2", pack_in_int64),
    ("05.3", cache_in_float64),
    ("05.3", cache_by_split),
    ("05.3", cache_by_loops),
    ("05.3", cache_by_reshape),
    ("05.3", cache_along_a_dimension),
    ("05.4", bits_in_numpy),
    ("05.4", bits_by_sizing),
    ("05.4", bits_token_by_token),
    ("05.4", bits_by_shares),
    ("05.4", bits_by_group),
]
