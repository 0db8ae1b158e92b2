"""Any labkit cache inside Hugging Face transformers.

    model.generate(ids, past_key_values=wrap(Cache.growing(num_layers)))

transformers keeps to its own attention: it appends to a layer and reads K and V back. What it attends to (scale,
window, padding) comes from its model and its `attention_mask`, not from the labkit layer. It appends keys after RoPE,
as `labkit.llama` does.
"""

from __future__ import annotations

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from labkit.cache import Cache, LayerCache


class WrappedLayer(CacheLayerMixin):
    """One labkit layer, spoken to in transformers' words. K and V are `[batch, num_kv_heads, tokens, head_dim]`."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False  # a labkit layer takes its shape from the first tokens appended

    def __init__(self, layer: LayerCache) -> None:
        super().__init__()
        self.layer = layer
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: `append` initializes."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append the new tokens; K and V of all that is held."""
        self.layer.append(key_states, value_states)
        return self.layer.read()

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
        """Forget everything, counters included."""
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

    def __init__(self, source: Cache) -> None:
        super().__init__(layers=[WrappedLayer(layer) for layer in source.layers])
        self.source = source

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """As of a layer; ValueError when the model has more layers than the cache."""
        if layer_idx >= len(self.layers):
            raise ValueError(f"the cache has {len(self.layers)} layers, the model has more: make it for this model")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def wrap(cache: Cache) -> WrappedCache:
    """`cache` as transformers' `past_key_values`. It is the same cache: what one side appends, the other sees.

    Raises ValueError when padding was said to `cache`: transformers takes it as `attention_mask`.
    """
    if cache.padding is not None:
        raise ValueError("give transformers an attention_mask instead of padding: reset() the cache first")
    return WrappedCache(cache)
