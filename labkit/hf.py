"""Any labkit cache inside Hugging Face transformers.

    model.generate(ids, past_key_values=wrap(Cache.growing(num_layers)))

transformers then keeps to its own attention: it appends to a layer and reads K and V back, a quantized cache's as
numbers. `wrap(cache, model)` lets the model attend through the labkit layers instead, which read K and V as they are
kept. Either way what is attended to (scale, window, padding) comes from the model and its `attention_mask`, not from
the labkit layer. Keys are appended after RoPE, as `labkit.llama` does.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from labkit.attention import Constants, causal_mask
from labkit.cache import Cache, LayerCache
from labkit.cache.step import rectangle


class WrappedLayer(CacheLayerMixin):
    """One labkit layer, spoken to in transformers' words. K and V are `[batch, num_kv_heads, tokens, head_dim]`."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False  # a labkit layer takes its shape from the first tokens appended

    def __init__(self, layer: LayerCache, attends: bool = False) -> None:
        super().__init__()
        self.layer, self.attends = layer, attends
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: `append` initializes."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append the new tokens; K and V of all that is held, or what `labkit_attention` takes for them."""
        self.layer.append(key_states, value_states)
        if not self.attends:
            return self.layer.read()
        batch, heads, _, head_dim = key_states.shape
        # One NaN, seen in every place: any attention but labkit's shows that it cannot read this cache.
        keys = key_states.new_full((1, 1, 1, 1), float("nan")).expand(batch, heads, self.layer.physical_len, head_dim)
        keys.labkit_layer = self.layer  # type: ignore[attr-defined]
        return keys, keys

    def get_seq_length(self) -> int:
        """Logical length, in tokens."""
        return self.layer.seq_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys the next `update` will return, and the position of the first of them."""
        return self.layer.physical_len + query_length, self.layer.seq_len - self.layer.physical_len

    def get_max_length(self) -> int:
        """Tokens that fit; -1 when there is no limit."""
        return -1 if self.layer.capacity is None else self.layer.capacity

    def reset(self) -> None:
        """Forget everything, counters and padding included."""
        self.layer.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens. transformers gives their number as a negative one."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to forget; got {tokens_to_remove}")
        self.layer.truncate(max(0, self.layer.seq_len + int(tokens_to_remove)))  # some versions give a tensor

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row `i` becomes what row `beam_idx[i]` was."""
        self.layer.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` rows in succession."""
        if (held := self.layer.template()) is not None:
            rows = torch.arange(held.shape[0], device=held.device)
            self.layer.select_rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, int `[rows]` or bool `[batch]`."""
        self.layer.select_rows(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def offload(self) -> None:
        """labkit layers stay where they are: raises NotImplementedError."""
        raise NotImplementedError("a labkit cache cannot be offloaded")


class WrappedCache(transformers.Cache):
    """A labkit cache, `source`, that `generate()` and `forward()` of a transformers model take as `past_key_values`."""

    def __init__(self, source: Cache, attends: bool = False) -> None:
        super().__init__(layers=[WrappedLayer(layer, attends) for layer in source.layers])
        self.source = source

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """As of a layer; ValueError when the model has more layers than the cache."""
        if layer_idx >= len(self.layers):
            raise ValueError(f"the cache has {len(self.layers)} layers, the model has more: make it for this model")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def labkit_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: the labkit layer's `attend` where there is one, PyTorch's fused one elsewhere.

    query `[batch, num_heads, new_tokens, head_dim]`; returns `[batch, new_tokens, num_heads, head_dim]`.
    """
    layer: LayerCache | None = getattr(key, "labkit_layer", None)
    if layer is None:
        options = {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if kwargs.get("s_aux") is not None:
        raise ValueError("labkit's caches know no learned attention sinks (s_aux): use wrap(cache) without the model")
    layer.constants, padding = Constants(scaling, sliding_window, softcap), ()
    if attention_mask is not None:
        # All layers of a kind get the same mask: it is looked through once.
        if not hasattr(attention_mask, "labkit_padding"):
            attention_mask.labkit_padding = left_padding(attention_mask, sliding_window)  # type: ignore[attr-defined]
        padding = attention_mask.labkit_padding.tolist()  # type: ignore[attr-defined]
    new = query.shape[2]
    step = rectangle(query.shape[0], new, [length - new for length in layer.lengths], padding)
    return layer.attend(query, step).transpose(1, 2), None


def left_padding(attention_mask: Tensor, window: int | None) -> Tensor:
    """Padding of each row, int `[batch]`, of a mask, bool `[batch, 1, new_tokens, kv_len]`.

    Raises ValueError when the mask hides anything else than the future, what has left the window, and left padding.
    """
    mask = attention_mask[:, 0]
    new_tokens, kv_len = mask.shape[1:]
    seen = mask.any(dim=1)
    padding = torch.where(seen.any(dim=1), seen.int().argmax(dim=1), kv_len)  # the keys before the first that is seen
    position = torch.arange(kv_len, device=mask.device)
    expected = causal_mask(new_tokens, kv_len, window=window, device=mask.device) & (position >= padding[:, None, None])
    real = position[-new_tokens:] >= padding[:, None]  # what padding itself sees is nobody's business
    if not torch.equal(mask[real], expected[real]):
        raise ValueError(
            "this attention_mask hides more than the future and padding at the left, which is all that a labkit cache "
            "can hide: use wrap(cache) without the model"
        )
    return padding


def wrap(cache: Cache, model: transformers.PreTrainedModel | None = None) -> WrappedCache:
    """`cache` as transformers' `past_key_values`. It is the same cache: what one side appends, the other sees.

    model: with a transformers model its attention goes through the cache's own `attend`, so that a quantized cache is
    read packed. The model's attention implementation becomes "labkit", which serves other caches as "sdpa" does.
    Raises ValueError when padding was said to `cache`: transformers takes it as `attention_mask`.
    """
    if cache.padding:
        raise ValueError("give transformers an attention_mask instead of padding: reset() the cache first")
    if model is not None:
        AttentionInterface.register("labkit", labkit_attention)
        AttentionMaskInterface.register("labkit", sdpa_mask)
        model.set_attn_implementation("labkit")
    return WrappedCache(cache, attends=model is not None)
