"""A labkit cache as transformers' `past_key_values`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

import transformers
from torch import Tensor

from labkit.cache import Cache, Step
from labkit.hf.layer import WrappedLayer
from labkit.hf.masks import Masks
from labkit.hf.refusal import OWN_CACHE, WITHOUT, CannotHold


class WrappedCache(transformers.Cache):
    """A labkit cache, `source`, that `generate()` and `forward()` of a transformers model take as `past_key_values`."""

    def __init__(self, source: Cache, attends: bool = False) -> None:
        self.masks = Masks(source)
        self.wrapped = [WrappedLayer(layer, self.masks, attends) for layer in source.layers]
        super().__init__(layers=list(self.wrapped))
        self.source, self.attends = source, attends
        self.evicts = any(layer.evicts for layer in source.layers)
        if self.evicts and not attends:
            raise CannotHold(
                "a cache that evicts holds other tokens than transformers' masks speak of, and its policy looks at "
                "queries: use wrap(cache, model)"
            )
        if not attends and any(layer.selects for layer in source.layers):
            raise CannotHold(
                "a cache that reads a part of what it holds chooses it by the query, and transformers would read all: "
                "use wrap(cache, model)"
            )
        for layer in self.wrapped:
            layer.attended = self.after_layer
        if attends and not all(layer.constants.causal for layer in source.layers):
            raise CannotHold(f"a layer of this cache attends without the causal mask, and the model with it: {WITHOUT}")
        self.visited: list[int] = []  # layers that the pass under way has updated, in order
        self.start = 0  # tokens held before it

    def __getattr__(self, name: str) -> NoReturn:
        raise CannotHold(f"the model asks for {name!r} of its cache, which a labkit cache has not: {OWN_CACHE}")

    def __iter__(self) -> Iterator[Any]:
        raise CannotHold(f"the model takes its cache for a list of tensors: {OWN_CACHE}")

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """As of a layer; ValueError when the model has more layers than the cache, or a pass was interrupted."""
        if layer_idx >= len(self.layers):
            raise CannotHold(f"the cache has {len(self.layers)} layers, the model has more: make it for this model")
        if not self.attends:
            check_no_padding(self.source)
        if layer_idx in self.visited or not self.visited:
            self.begin_pass(layer_idx)
        elif self.wrapped[self.visited[-1]].waiting is not None:
            raise CannotHold(f"the model did not attend with the K and V that the cache gave it: {WITHOUT}")
        check_even({self.wrapped[layer_idx].get_seq_length(), self.start})
        self.visited.append(layer_idx)
        given = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if not self.attends:
            self.source.knows_padding = False  # nobody shows us the attention_mask, nor where keys were rotated to
        return given

    def begin_pass(self, layer_idx: int) -> None:
        """A pass begins with layer `layer_idx`: what an earlier one left unfinished is dropped, or refused.

        A layer that holds nothing may be one that the model never updates; what others hold must agree. The first says
        how many tokens there are, so that it must be one that is updated.
        """
        self.forget_pass()
        self.source.check_whole()
        if ragged := next((layer.layer for layer in self.wrapped if len(set(layer.layer.lengths)) > 1), None):
            raise CannotHold(
                f"the cache holds rows of {list(ragged.lengths)} tokens, and transformers knows one length for all: go "
                f"on with labkit's decoder, or read the rows anew, padded at the left"
            )
        if layer_idx:
            raise CannotHold(f"the model keeps K and V from layer {layer_idx} on, other things before: {OWN_CACHE}")
        lengths = [layer.get_seq_length() for layer in self.wrapped]
        self.start = lengths[layer_idx]
        check_even({length for length in lengths if length} | {self.start})
        self.masks.crop(self.start)  # what was padding and is no longer held may come back as something else

    def after_layer(self) -> None:
        """A layer has attended. When it was the last of its pass, layers that evict do so, all or none."""
        if not self.evicts or len(self.visited) < len(self.wrapped) or any(x.waiting is not None for x in self.wrapped):
            return
        lengths = self.source.lengths
        counts = tuple(length - self.start for length in lengths)
        step = Step(counts, (self.start,) * len(lengths), self.source.padding)
        self.source.settle(self.source.plan(step))

    def forget_pass(self) -> None:
        """The next update begins a pass, whatever the last one was."""
        self.visited = []
        self.masks.clear()
        for layer in self.wrapped:
            layer.waiting = None

    def reset(self) -> None:
        """Forget everything, counters included."""
        self.forget_pass()
        self.source.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens. transformers gives their number as a negative one."""
        self.forget_pass()
        self.change([partial(layer.crop, tokens_to_remove) for layer in self.wrapped])
        self.masks.crop(max(layer.get_seq_length() for layer in self.wrapped))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row `i` becomes what row `beam_idx[i]` was."""
        self.change([partial(layer.reorder_cache, beam_idx) for layer in self.wrapped])
        self.masks.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` rows in succession."""
        self.change([partial(layer.batch_repeat_interleave, repeats) for layer in self.wrapped])
        if self.masks.blank is not None:
            self.masks.blank = self.masks.blank.repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, int `[rows]` or bool `[batch]`."""
        self.change([partial(layer.batch_select_indices, indices) for layer in self.wrapped])
        self.masks.select_rows(indices)

    def change(self, acts: Sequence[Callable[[], object]]) -> None:
        """An act for each layer of the labkit cache, which must be whole."""
        self.source.check_whole()
        self.source.on_every_layer(acts)

    def no_state(self, *args: Any, **kwargs: Any) -> NoReturn:
        """A labkit cache has no states of convolutions or recurrences, and no indexer's keys: raises `CannotHold`."""
        raise CannotHold(
            f"the model keeps more than K and V of its layers (a state, or an indexer's keys), which a labkit cache "
            f"does not hold: {OWN_CACHE}"
        )

    has_previous_state = get_conv_state = update_conv_state = no_state
    get_recurrent_state = update_recurrent_state = update_indexer = no_state


def check_even(lengths: set[int]) -> None:
    """ValueError when layers that should hold the same number of tokens do not."""
    if len(lengths) > 1:
        raise ValueError(
            f"the layers hold between {min(lengths)} and {max(lengths)} tokens: a pass over them was interrupted, or "
            f"the model updates a layer twice. truncate({min(lengths)}) on the labkit cache goes back to what all of "
            f"them hold; reset() starts anew"
        )


def check_no_padding(source: Cache) -> None:
    """ValueError when padding was said to the labkit cache, where transformers does not look without the model."""
    if source.padding:
        raise ValueError(
            "this cache holds padding, and transformers' own attention sees no more of it than an attention_mask says: "
            "use wrap(cache, model), which holds the mask against it, or reset() the cache first"
        )
