"""One labkit layer in transformers' words, and what a model gets for the K and V of a layer that attends itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from labkit.attention import Constants
from labkit.cache import LayerCache
from labkit.cache.step import rectangle
from labkit.hf.masks import Masks
from labkit.hf.refusal import OWN_CACHE, WITHOUT, CannotHold


class StandIn:
    """What the model gets for the K or V of a layer that attends itself: shape, dtype and device, and no numbers.

    Whatever else is asked of it, by a method, an operator or one of PyTorch's functions, raises `CannotHold`. It is no
    tensor, which `torch.compile` would look into.
    """

    def __init__(self, side: str, like: Tensor, tokens: int, layer: WrappedLayer) -> None:
        batch, heads, _, head_dim = like.shape
        self.side, self.layer = side, layer
        self.shape = torch.Size((batch, heads, tokens, head_dim))
        self.dtype, self.device, self.ndim = like.dtype, like.device, like.dim()

    def size(self, dim: int | None = None) -> torch.Size | int:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """As of a tensor."""
        return self.ndim

    def to(self, device: torch.device) -> StandIn:
        """Itself, on the device where it is: releases such as 5.17 ask that of K and V that layers share."""
        if device != self.device:
            not_a_tensor("to")
        return self

    def __getattr__(self, name: str) -> NoReturn:
        not_a_tensor(name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        """PyTorch's functions, wherever a stand-in is among their arguments."""
        not_a_tensor(getattr(func, "__name__", str(func)))


def not_a_tensor(asked: str) -> NoReturn:
    """Raise `CannotHold` for what was asked of a stand-in."""
    raise CannotHold(
        f"the model computes with K or V ({asked}) between the cache and its attention, or its attention is not "
        f"labkit's: {WITHOUT}, or wrap(cache, model) with this model"
    )


def _refused(name: str) -> Callable[..., NoReturn]:
    return lambda self, *args, **kwargs: not_a_tensor(name)


# Python looks operators up on the class, past __getattr__: each that a tensor has must be refused there.
for _name in set(dir(Tensor)) - set(dir(StandIn)) | {f"__{name}__" for name in ("eq", "ne", "lt", "le", "gt", "ge")}:
    if _name.startswith("__"):
        setattr(StandIn, _name, _refused(_name))


class WrappedLayer(CacheLayerMixin):
    """One labkit layer, spoken to in transformers' words. K and V are `[batch, num_kv_heads, tokens, head_dim]`."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False  # a labkit layer takes its shape from the first tokens appended

    def __init__(self, layer: LayerCache, masks: Masks, attends: bool) -> None:
        self.layer, self.masks, self.attends = layer, masks, attends
        self.waiting: tuple[Tensor, Tensor] | None = None  # K and V that `attend` will append
        self.own_window: int | None = None  # tokens that the model's own cache would keep
        self.told_window: int | None = None  # what the model told its attention last
        self.checks = False  # whether the model's own attention is asked, too
        self.attended: Callable[[], None] = lambda: None  # called when the model has attended through this layer

    def __getattr__(self, name: str) -> NoReturn:
        raise CannotHold(f"the model asks for {name!r} of a layer's cache, which a labkit layer has not: {OWN_CACHE}")

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether anything is held."""
        return self.layer.seq_len > 0

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """K of all that is held; None when empty. Cross-attention reads it without appending."""
        return self.read(0)

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """V of all that is held; None when empty."""
        return self.read(1)

    def read(self, side: int) -> Tensor | None:
        """One side of what is held."""
        if not self.is_initialized:
            return None
        if self.attends:  # no AttributeError: in a property that would be answered by __getattr__
            raise ValueError(f"the model reads K or V of a layer that it did not append to in this pass: {WITHOUT}")
        return self.layer.read()[side]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: `append` initializes."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append the new tokens; K and V of all that is held, or what `labkit_attention` takes for them."""
        k, v = one_size(key_states, value_states)
        if not self.attends:
            self.layer.append(k, v)
            return self.layer.read()
        self.waiting = k, v
        tokens = self.layer.seq_len + k.shape[2]  # logical: a layer that evicts knows itself who sees what it holds
        return StandIn("K", k, tokens, self), StandIn("V", v, tokens, self)  # type: ignore[return-value]

    def attend(self, q: Tensor, constants: Constants, padding: tuple[int, ...]) -> Tensor:
        """Append what `update` took, if that is still to be done, and answer the newest tokens' queries."""
        new, self.waiting = self.waiting, None
        self.told_window = constants.window
        if new is None and self.layer.evicts:
            raise CannotHold(f"the model attends again to what a layer keeps, which may have left it: {OWN_CACHE}")
        if self.layer.evicts:  # its positions count from behind the padding, also when a window's mask shows none of it
            padding = self.masks.source.padding
        out = append_and_attend(self.layer, new, q, constants, padding)
        self.attended()
        return out

    def get_seq_length(self) -> int:
        """Logical length, in tokens."""
        return self.layer.seq_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys the next `update` will speak of, and the position of the first: all that were seen, from 0.

        Masks are made by it. They say which tokens are padding; which of them are held is the layer's to know.
        """
        return self.layer.seq_len + query_length, 0

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


def one_size(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """K and V as a labkit layer takes them; `CannotHold` when it cannot."""
    if k is None or v is None or k.dim() != 4 or k.shape != v.shape:
        sizes = [None if x is None else list(x.shape) for x in (k, v)]
        raise CannotHold(
            f"the model keeps K {sizes[0]} and V {sizes[1]}: a labkit cache holds K and V of one size, [batch, "
            f"num_kv_heads, new_tokens, head_dim] (not latent attention, nor values of another head_dim): {OWN_CACHE}"
        )
    if k.dtype != v.dtype and torch.is_autocast_enabled(k.device.type):
        # RoPE makes float32 keys under autocast; its matrix products would take both in the autocast dtype.
        k, v = (x.to(torch.get_autocast_dtype(k.device.type)) for x in (k, v))
    return k, v


def append_and_attend(
    layer: LayerCache, new: tuple[Tensor, Tensor] | None, q: Tensor, constants: Constants, padding: tuple[int, ...]
) -> Tensor:
    """Append `new` and attend, as this model attends. The one place where a model's words meet a layer's."""
    own, layer.constants = layer.constants, constants
    try:
        if new is not None:
            layer.append(*new, rectangle(len(q), new[0].shape[2], layer.lengths, padding))
        before = [length - q.shape[2] for length in layer.lengths]  # there may be fewer queries than new tokens
        return layer.attend(q, rectangle(len(q), q.shape[2], before, padding))
    finally:
        layer.constants = own
