"""Whether a model turns its keys as a labkit cache takes it to, where the cache turns keys itself."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from labkit.cache import Cache
from labkit.cache.evicting.places import turned
from labkit.hf.cache import WrappedCache
from labkit.hf.refusal import CannotHold
from labkit.hf.trying import failure, tokens_of

TOKENS = 48  # positions that are looked at
SAME = 1e-3  # frequencies that differ by less are one: at 1,000 positions a turn of 1 radian is off by 0.001
CHANGES = ("dynamic", "longrope")  # RoPE whose frequencies change with the length: keys held were turned by others
OTHERWISE = "leave frequencies out, or take a policy that needs none"


def check_turns(model: PreTrainedModel, text: PretrainedConfig, cache: WrappedCache) -> None:
    """`CannotHold` unless each layer's keys turn as the cache says that turns them: pairs (i, i + head_dim / 2), by
    position times frequency.

    One token is read many times over: wherever it stands, every layer's key of it is the same but for RoPE. So it is
    seen, whatever the model's code is, that channels are paired otherwise (each with its neighbour, as Cohere and GLM
    have it), that only some are turned, or none, or that frequencies are another layer's. A slow channel hardly turns
    in so few tokens, less than half precision rounds away: where the model keeps its frequencies (`inv_freq`), those
    that were given have to be among them.
    """
    if not any(layer.layer.turns for layer in cache.wrapped):
        return
    name = type(model).__name__
    if changes := rope_types(text) & set(CHANGES):
        raise CannotHold(f"{name}'s RoPE ({', '.join(sorted(changes))}) changes with the text's length: {OTHERWISE}")
    keys = keys_of_one_token(model, len(cache))
    for index, (layer, k) in enumerate(zip(cache.wrapped, keys, strict=True)):
        for frequencies in layer.layer.turns:
            if not (kept_among(model, frequencies) and turns_by(k, frequencies)):
                raise CannotHold(
                    f"layer {index} of {name} does not turn its keys in pairs (i, i + head_dim / 2) by the frequencies "
                    f"that this cache was given: {OTHERWISE}"
                )


def rope_types(text: PretrainedConfig) -> set[str]:
    """The kinds of RoPE that a config names, of all layers or of each kind of layer."""
    said = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    parts = [said, *(part for part in said.values() if isinstance(part, dict))]
    return {str(part.get("rope_type", part.get("type", "default"))) for part in parts}


def keys_of_one_token(model: PreTrainedModel, num_layers: int) -> list[Tensor]:
    """K of each layer, `[1, num_kv_heads, TOKENS, head_dim]`, of one token read `TOKENS` times."""
    scratch = WrappedCache(Cache.growing(num_layers), attends=True)
    error = failure(model, tokens_of(model, [1] * TOKENS), scratch)
    if isinstance(error, CannotHold):
        raise error
    if error is not None:
        raise CannotHold(
            f"how {type(model).__name__} turns its keys cannot be seen with tokens alone ({error}): {OTHERWISE}"
        ) from error
    return [layer.read()[0] for layer in scratch.source.layers]


def kept_among(model: PreTrainedModel, frequencies: Tensor) -> bool:
    """Whether these are among the frequencies that the model keeps, or it keeps none for as many channels."""
    kept = [x for name, x in model.named_buffers() if name.endswith("inv_freq") and x.numel() == frequencies.numel()]
    known = [x for x in kept if not x.is_meta]
    given = frequencies.double().cpu()
    return not known or any(torch.allclose(x.double().cpu().flatten(), given, rtol=SAME, atol=0) for x in known)


def turns_by(k: Tensor, frequencies: Tensor) -> bool:
    """Whether keys of one token, `[1, num_kv_heads, tokens, head_dim]`, are its first, turned on to each position."""
    if 2 * frequencies.numel() != k.shape[3]:
        return False
    positions = torch.arange(k.shape[2], device=k.device)
    expected = turned(k[:, :, :1].expand_as(k), positions, frequencies.to(k.device))
    bound = torch.finfo(k.dtype).eps ** 0.5 * k.abs().max().item()  # half of the digits, as attention is compared
    return torch.allclose(k, expected, rtol=0, atol=bound)
