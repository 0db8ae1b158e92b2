"""An attention function for transformers: a labkit layer's `attend` where there is one, else what was there before."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from labkit.attention import Constants, Visibility, fused_attention
from labkit.hf.layer import StandIn, WrappedLayer
from labkit.hf.refusal import WITHOUT, CannotHold

PREFIX = "labkit+"
ORIGINALS: dict[str, Callable[..., Any]] = {"sdpa": sdpa_mask, "eager": eager_mask}
"""What a model may have attended with before, and what makes the masks of that."""

HARMLESS = {
    # Of FlashAttention, about sequences packed in one row: they are in the mask, too.
    "position_ids": "rotary positions are in the keys already; labkit's decoder could not go on from others",
    "deterministic": "which FlashAttention kernel runs",
    # What a model's forward hands down to every layer.
    "cache_position": "where the new tokens stand: the cache knows",
    "use_cache": "decided where the cache is made",
    "logits_to_keep": "about the head",
    "return_dict": "about what forward returns",
    "output_hidden_states": "about what forward returns",
    "output_router_logits": "about what forward returns",
    "num_items_in_batch": "about the loss",
    "token_type_ids": "in the embedding, or in the mask",
}
"""Keywords that change nothing in causal attention over a cache, each with the reason. All others are refused."""


def labkit_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | StandIn,
    value: Tensor | StandIn,
    attention_mask: Tensor | None,
    *,
    original: str,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The labkit layer's `attend` where `key` and `value` stand for one, else what was there before.

    query `[batch, num_heads, new_tokens, head_dim]`; returns `[batch, new_tokens, num_heads, head_dim]`.
    original: what the model attended with before, "sdpa" or "eager". Raises `CannotHold` for all that a labkit layer
    would compute otherwise than that.
    """
    if not isinstance(key, StandIn) and not isinstance(value, StandIn):
        return original_attention(module, original)(module, query, key, value, attention_mask, **kwargs)
    return attend_through(module, query, key, value, attention_mask, original, **kwargs), None


@torch.compiler.disable  # a layer's work is a kernel's, or changes what is held: not the compiler's
def attend_through(
    module: nn.Module,
    query: Tensor,
    key: Tensor | StandIn,
    value: Tensor | StandIn,
    attention_mask: Tensor | None,
    original: str,
    **kwargs: Any,
) -> Tensor:
    """The answer of the labkit layer that `key` and `value` stand for; `CannotHold` when it would be another's."""
    layer, kv_len = check_sides(key, value), key.shape[2]
    check_call(module, query, layer, **kwargs)
    q = check_query(query, kv_len, layer)
    padding, window = layer.masks.read(attention_mask, q, kv_len, kwargs.get("sliding_window"), original)
    check_own_window(layer, padding, window, kv_len)
    layer.masks.place(kwargs.get("position_ids"), q, kv_len)
    constants = Constants(kwargs.get("scaling"), window, kwargs.get("softcap"))
    skipped = () if padding is None else tuple(padding.tolist())
    if layer.checks and layer.waiting is not None:
        k, v = layer.waiting
        kwargs = {name: value for name, value in kwargs.items() if value is not None} | {"dropout": 0.0}
        expected, _ = original_attention(module, original)(module, q, k, v, attention_mask, **kwargs)
        visible = Visibility.newest(q.shape[2], k.shape[2], skipped)
        compare(fused_attention(q, k, v, constants, visible).transpose(1, 2), expected)
    return layer.attend(q, constants, skipped).transpose(1, 2).contiguous()


def original_attention(module: nn.Module, name: str) -> Any:
    """The attention function that `module` would have called under the implementation `name`."""
    used = inspect.unwrap(type(module).forward).__globals__
    functions = used.get("ALL_ATTENTION_FUNCTIONS", AttentionInterface())
    if (found := functions.get_interface(name, used.get("eager_attention_forward"))) is None:
        raise CannotHold(f"{type(module).__name__} has no attention function {name!r} that labkit finds: {WITHOUT}")
    return found


def check_sides(key: Tensor | StandIn, value: Tensor | StandIn) -> WrappedLayer:
    """The layer that these K and V stand for; `CannotHold` when they are not its K and its V."""
    if not (isinstance(key, StandIn) and isinstance(value, StandIn)):
        raise CannotHold(f"the model attends with only one of the cache's K and V: {WITHOUT}")
    if key.layer is not value.layer or (key.side, value.side) != ("K", "V"):
        raise CannotHold(f"the model attends with K and V that are not one layer's K and V: {WITHOUT}")
    return key.layer


def check_call(
    module: nn.Module,
    query: Tensor,
    layer: WrappedLayer,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> None:
    """`CannotHold` unless the call is for causal attention and nothing that a labkit layer does not know."""
    name = type(module).__name__
    owners = (module, getattr(module, "config", None))
    if any(said is False for said in (is_causal, *(getattr(owner, "is_causal", None) for owner in owners))):
        raise CannotHold(f"{name} does not attend causally: {WITHOUT}")
    if dropout and not layer.checks:
        raise CannotHold("labkit's caches attend without dropout: call model.eval() first")
    if output_attentions:
        raise CannotHold(f"labkit's caches return no attention weights: {WITHOUT}")
    if unknown := [key for key, value in kwargs.items() if value is not None and key not in HARMLESS]:
        raise CannotHold(f"{name} tells its attention {', '.join(unknown)}, which labkit does not know: {WITHOUT}")


def check_query(query: Tensor, kv_len: int, layer: WrappedLayer) -> Tensor:
    """The queries in the dtype of the keys; `CannotHold` when they are not of the newest tokens."""
    if layer.waiting is None and kv_len != layer.layer.seq_len:
        raise CannotHold(f"the model attends with K and V of an earlier pass: {WITHOUT}")
    if layer.waiting is not None and layer.waiting[0].shape[2] < query.shape[2]:
        raise CannotHold(f"{query.shape[2]} queries, but {layer.waiting[0].shape[2]} new keys: {WITHOUT}")
    keys = layer.layer.template() if layer.waiting is None else layer.waiting[0]
    assert keys is not None
    if query.dtype != keys.dtype and not torch.is_autocast_enabled(query.device.type):
        raise CannotHold(f"queries are {query.dtype}, keys {keys.dtype}: {WITHOUT}")
    return query.to(keys.dtype)


def check_own_window(layer: WrappedLayer, padding: Tensor | None, window: int | None, kv_len: int) -> None:
    """`CannotHold` when the model's mask shows what its own cache would have let go.

    Such a model computes one thing with its cache and another without: there is no right answer to give.
    """
    if (own := layer.own_window) is None or (window is not None and window <= own) or kv_len <= own:
        return
    if padding is None or int(padding.min()) < kv_len - own:
        raise CannotHold(
            f"the model's own cache keeps {own} tokens of this layer, but its mask shows {kv_len}: what it computes "
            f"depends on its cache. Use transformers' own"
        )


def compare(got: Tensor, expected: Tensor) -> None:
    """`CannotHold` when two results of attention differ by more than half of their digits."""
    bound = torch.finfo(expected.dtype).eps ** 0.5 * expected.abs().max().item()
    if not torch.allclose(got.to(expected.dtype), expected, rtol=0, atol=bound, equal_nan=True):
        raise CannotHold(f"the model's attention computes something else than softmax(q k^T * scale) v: {WITHOUT}")


for _name, _mask in ORIGINALS.items():
    AttentionInterface.register(PREFIX + _name, partial(labkit_attention, original=_name))
    AttentionMaskInterface.register(PREFIX + _name, _mask)
