"""labkit's caches inside Hugging Face transformers.

    model.generate(ids, past_key_values=wrap(Cache.growing(num_layers)))

transformers then keeps to its own attention: it appends to a layer and reads K and V back, a quantized cache's as
numbers. What is attended to is what the model's masks show. `wrap(cache, model)` lets the model attend through the
labkit layers instead, which read K and V as they are kept. Either way scale, window, soft cap and padding come from the
model and its `attention_mask`, not from the labkit layer. Keys are appended after RoPE, as `labkit.llama` does.

A labkit layer holds K and V of one size, and attends causally, with a scale, a soft cap, a window and padding at the
left. A model that needs anything else meets `CannotHold`, a ValueError, before it has computed with it.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from labkit.cache import Cache
from labkit.hf.cache import WrappedCache, check_no_padding
from labkit.hf.model import let_attend
from labkit.hf.refusal import CannotHold

__all__ = ["CannotHold", "WrappedCache", "wrap"]


def wrap(cache: Cache, model: PreTrainedModel | None = None) -> WrappedCache:
    """`cache` as transformers' `past_key_values`. It is the same cache: what one side appends, the other sees.

    model: with a transformers model its attention goes through the cache's own `attend`, so that a quantized cache is
    read packed. The attention implementation of its text decoder becomes "labkit+sdpa" or "labkit+eager", after what
    it was: with other caches, or none, it computes what it computed before. Two tokens are run through the model to
    see that with a labkit cache, too, it computes what it computed before.

    A cache that evicts needs the model. It does so when the last layer of a pass has attended, and what comes after
    cannot be undone. One that turns keys itself (`frequencies`, or a policy that has them) is refused where the model
    turns them otherwise, which one token read many times shows; so is one that merges, where a layer has a window.

    Padding that the cache holds must stay hidden by the `attention_mask`; with the model it is checked, and what a mask
    hides at the left becomes the cache's padding.

    Raises ValueError for a model that a labkit cache cannot serve, with the reason and what to do; without the model it
    is the first pass that raises, and a cache that holds padding is refused.
    """
    if model is None:
        check_no_padding(cache)
        return WrappedCache(cache)
    wrapped = WrappedCache(cache, attends=True)
    let_attend(model, wrapped)
    return wrapped
