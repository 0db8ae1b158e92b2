"""Wrong answers to 07.6, and other right ones."""

from __future__ import annotations

import torch

from tests.labs.answer import Wrong


def turned(k, angle, *, low=False, interleaved=False, combine=None, keep=False):
    """Keys turned by an angle."""
    x = k if low else k.double() if k.dtype == torch.float64 else k.float()
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    first, second = (combine or (lambda a, b, c, s: (a * c - b * s, b * c + a * s)))(a, b, cos, sin)
    out = torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), dim=-1)
    return out if keep else out.to(k.dtype)


def placed(steps=None, angle=None, **how):
    """at_places with another number of steps, or other angles."""

    def at_places(k, positions, frequencies):
        places = torch.arange(k.shape[2], device=k.device)
        by = places - positions if steps is None else steps(places, positions)
        angles = by[..., None] * frequencies if angle is None else angle(by, frequencies, k)
        return turned(k, angles, **how)

    return at_places


def placed_in_place(k, positions, frequencies):
    k.copy_(placed()(k, positions, frequencies))
    return k


def placed_view(k, positions, frequencies):
    return placed()(k.view(-1).view(k.shape), positions, frequencies)


def placed_numpy(k, positions, frequencies):
    return torch.from_numpy(placed()(k.float(), positions, frequencies).numpy().copy()).to(k.dtype)


def twice(k, positions, frequencies):
    """Back to 0, then on to the place."""
    places = torch.arange(k.shape[2]).expand(positions.shape)
    x = k.to(torch.promote_types(k.dtype, torch.float32))
    for steps in (-positions, places):
        angle = steps[..., None].to(frequencies.dtype) * frequencies
        cos, sin = (torch.cat((part, part), -1) for part in (angle.cos(), angle.sin()))
        half = x.shape[-1] // 2
        x = x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin
    return x.to(k.dtype)


def by_complex(k, positions, frequencies):
    wide = k.double()
    half = k.shape[-1] // 2
    numbers = torch.complex(wide[..., :half], wide[..., half:])
    angle = torch.einsum("bht,f->bhtf", (torch.arange(k.shape[2]) - positions).double(), frequencies.double())
    out = numbers * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((out.real, out.imag), dim=-1).type_as(k)


def by_loop(k, positions, frequencies):
    out = torch.empty_like(k)
    half = k.shape[3] // 2
    for row in range(k.shape[0]):
        for head in range(k.shape[1]):
            for place in range(k.shape[2]):
                angle = (place - int(positions[row, head, place])) * frequencies
                a, b = k[row, head, place, :half].float(), k[row, head, place, half:].float()
                out[row, head, place, :half] = (a * angle.cos() - b * angle.sin()).to(k.dtype)
                out[row, head, place, half:] = (b * angle.cos() + a * angle.sin()).to(k.dtype)
    return out


def rotate_half(k, positions, frequencies):
    n = torch.arange(k.size(2)).view(1, 1, -1) - positions
    angle = n.unsqueeze(-1) * torch.cat((frequencies, frequencies)).float()
    x1, x2 = k.split(k.size(-1) // 2, dim=-1)
    return (k * angle.cos() + torch.cat((-x2, x1), dim=-1) * angle.sin()).to(k.dtype)


def cos_in_own_dtype(k, positions, frequencies):
    """Angles in float32, their cosines in the dtype of the keys, as most models do it."""
    angle = (torch.arange(k.shape[2]) - positions)[..., None] * frequencies
    cos, sin = angle.cos().to(k.dtype), angle.sin().to(k.dtype)
    a, b = k.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


WRONG = [
    Wrong("07.6", "turned-other-way", "position - place", placed(lambda places, p: p - places)),
    Wrong("07.6", "turned-other-way", "the signs exchanged",
          placed(combine=lambda a, b, c, s: (a * c + b * s, b * c - a * s))),
    Wrong("07.6", "turned-again", "turned by the place", placed(lambda places, p: places.expand(p.shape))),
    Wrong("07.6", "turned-back-only", "turned back only", placed(lambda places, p: -p)),
    Wrong("07.6", "turned-to-position-again", "turned by the position", placed(lambda places, p: p)),
    Wrong("07.6", "places-from-first", "places from the first position",
          placed(lambda places, p: p[..., :1] + places - p)),
    Wrong("07.6", "places-from-one", "places from 1", placed(lambda places, p: places + 1 - p)),
    Wrong("07.6", "one-place-for-all", "all at the last place", placed(lambda places, p: len(places) - 1 - p)),
    Wrong("07.6", "positions-of-first-head", "the first head's positions", placed(lambda places, p: places - p[:, :1])),
    Wrong("07.6", "interleaved-pairs", "neighbouring channels", placed(interleaved=True)),
    Wrong("07.6", "sign-missing", "two plus signs", placed(combine=lambda a, b, c, s: (a * c + b * s, b * c + a * s))),
    Wrong("07.6", "halves-exchanged", "the halves change places",
          placed(combine=lambda a, b, c, s: (b * c + a * s, a * c - b * s))),
    Wrong("07.6", "degrees", "degrees", placed(angle=lambda by, f, k: torch.deg2rad(by[..., None] * f))),
    Wrong("07.6", "precision", "angles in the dtype of the keys",
          placed(angle=lambda by, f, k: by[..., None] * f.to(k.dtype), low=True)),
    Wrong("07.6", "precision", "angles rounded to the dtype of the keys",
          placed(angle=lambda by, f, k: (by[..., None] * f).to(k.dtype), low=True)),
    Wrong("07.6", "in-few-bits", "keys in bfloat16",
          lambda k, positions, frequencies: placed()(k.bfloat16(), positions, frequencies).to(k.dtype)),
    Wrong("07.6", "whole-turns", "divided by 2 pi", placed(angle=lambda by, f, k: by[..., None] * f / (2 * torch.pi))),
    Wrong("07.6", "dtype", "float32 comes back", placed(keep=True)),
    Wrong("07.6", "arguments-changed", "in place", placed_in_place),
    Wrong("07.6", "layout", "a view of k", placed_view),
    Wrong("07.6", "left-pytorch", "through NumPy", placed_numpy),
    Wrong("07.6", "not-turned", "as they are", lambda k, positions, frequencies: k.clone()),
    Wrong("07.6", "values", "half as far", placed(lambda places, p: (places - p) / 2)),
]  # fmt: skip

RIGHT = [
    ("07.6", placed()),
    ("07.6", twice),
    ("07.6", by_complex),
    ("07.6", by_loop),
    ("07.6", rotate_half),
    ("07.6", cos_in_own_dtype),
]
