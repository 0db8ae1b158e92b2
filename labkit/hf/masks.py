"""What transformers' attention masks say, in the words of a labkit cache: padding at the left, and a window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from labkit.attention import causal_mask
from labkit.cache import Cache
from labkit.hf.refusal import WITHOUT, CannotHold

ADDITIVE = -1e4
"""An additive mask hides a key by this or less: no weight is left of it."""


class Masks:
    """What the masks of the pass under way hide. All layers of a kind get the same one: it is looked through once.

    blank: tokens at the start of each row, int `[batch]`, that were padding when they were read. What a model computes
    for padding is nobody's business, so that it must stay hidden. `source`, the labkit cache, knows it as its padding.
    """

    def __init__(self, source: Cache) -> None:
        self.source = source
        self.placed = False
        self.seen: list[tuple[Tensor, int, tuple[Any, ...], tuple[Tensor | None, int | None]]] = []

    @property
    def blank(self) -> Tensor | None:
        """The padding of the labkit cache, int `[batch]`; None where there is none."""
        return torch.tensor(self.source.padding) if self.source.padding else None

    @blank.setter
    def blank(self, padding: Tensor | None) -> None:
        numbers = () if padding is None else tuple(padding.tolist())
        self.source.padding = numbers if any(numbers) else ()

    def clear(self) -> None:
        """A new pass has new masks, or old ones with other contents."""
        self.seen = []
        self.placed = False

    def place(self, positions: Tensor | None, q: Tensor, kv_len: int) -> None:
        """Note, once a pass, whether new tokens stand where labkit's decoder would place them: from 0 behind padding.

        positions: int `[batch or 1, new_tokens]`, as the model rotates its keys; if it says none, they count padding.
        """
        if self.placed:
            return
        self.placed = True
        skipped = torch.tensor(self.source.padding or [0])[:, None]
        index = torch.arange(kv_len - q.shape[2], kv_len)[None]
        expected = (index - skipped).clamp(min=0)
        said = index if positions is None or positions.dim() != 2 else positions.cpu()
        real = (index >= skipped).expand(max(len(said), len(skipped)), -1)
        if said.shape[1] != q.shape[2] or bool((said != expected)[real].any()):
            self.source.knows_padding = False

    def read(
        self, mask: Tensor | None, q: Tensor, kv_len: int, window: int | None, original: str
    ) -> tuple[Tensor | None, int | None]:
        """Padding of each row, int `[batch]`, and window: all that `mask` hides besides the future.

        mask: as transformers hands it to an attention function, bool or additive, `[batch, 1 or heads, new_tokens,
        kv_len]`. The mask decides: `window`, which the model also says, is only tried first.
        """
        batch, _, new_tokens, _ = q.shape
        if mask is None:
            # Then "sdpa" is causal if all keys are new, and "eager" hides nothing at all.
            if new_tokens > 1 and (original == "eager" or new_tokens != kv_len):
                raise CannotHold(f"without a mask, {original} does not hide the future here: {WITHOUT}")
            self.keep_hidden(None, batch, new_tokens, kv_len)
            return None, None
        asked = (batch, new_tokens, kv_len, window)
        version = None if mask.is_inference() else mask._version
        for known, then, question, answer in self.seen:
            if known is mask and then == version and question == asked:
                return answer
        shown = shown_by(mask, batch, new_tokens, kv_len)
        found = hidden(shown, window)
        self.keep_hidden(shown, batch, new_tokens, kv_len)
        if found[0] is not None:
            new = found[0].clamp(min=kv_len - new_tokens) - (kv_len - new_tokens)  # of the new tokens, the padding
            blank = torch.where(new > 0, kv_len - new_tokens + new, 0).cpu()
            self.blank = blank if self.blank is None else torch.maximum(self.blank, blank)
        if version is not None:
            self.seen.append((mask, version, asked, found))
        return found

    def keep_hidden(self, shown: Tensor | None, batch: int, new_tokens: int, kv_len: int) -> None:
        """`CannotHold` when a mask shows what was padding when it was read. shown: None for all."""
        if (padding := self.blank) is None:
            return
        padding = padding.to(padding.device if shown is None else shown.device)
        blank = torch.arange(kv_len, device=padding.device) < padding[:, None]
        real = torch.arange(kv_len - new_tokens, kv_len, device=padding.device) >= padding[:, None]
        seen = blank[:, None] & real[:, :, None] & (True if shown is None else shown)
        if bool(seen.any()):
            raise CannotHold(f"this attention_mask shows tokens that it hid as padding when they were read: {WITHOUT}")

    def select_rows(self, rows: Tensor) -> None:
        """Row `i` becomes what row `rows[i]` was, int `[rows]` or bool `[batch]`."""
        if (padding := self.blank) is not None:
            self.blank = padding[rows.to(padding.device)]

    def crop(self, tokens: int) -> None:
        """Only the first `tokens` are left."""
        if (padding := self.blank) is not None:
            self.blank = padding.clamp(max=tokens)


def shown_by(mask: Tensor, batch: int, new_tokens: int, kv_len: int) -> Tensor:
    """An attention mask as bool `[batch, new_tokens, kv_len]`, True = may see; `CannotHold` when it says more."""
    if mask.dim() != 4 or mask.shape[2:] != (new_tokens, kv_len) or mask.shape[0] not in (1, batch):
        raise CannotHold(
            f"the attention_mask is {list(mask.shape)}; there are {batch} rows, {new_tokens} queries, {kv_len} keys: "
            f"{WITHOUT}"
        )
    if mask.dtype != torch.bool:
        if not mask.is_floating_point():
            raise CannotHold(f"an attention_mask of {mask.dtype} is neither bool nor additive: {WITHOUT}")
        shown, hides = mask == 0, mask <= ADDITIVE
        if not bool((shown | hides).all()):
            raise CannotHold(f"this attention_mask weighs keys instead of showing or hiding them: {WITHOUT}")
        mask = shown
    first = mask[:, :1]
    if mask.shape[1] > 1 and not bool((mask == first).all()):
        raise CannotHold(f"this attention_mask differs from head to head: {WITHOUT}")
    return first[:, 0].expand(batch, new_tokens, kv_len)


def hidden(shown: Tensor, window: int | None) -> tuple[Tensor | None, int | None]:
    """Padding of each row and window of a mask, bool `[batch, new_tokens, kv_len]`.

    Raises `CannotHold` when the mask hides anything else than the future, what has left the window, and left padding.
    """
    new_tokens, kv_len = shown.shape[1:]
    position = torch.arange(kv_len, device=shown.device)
    seen = shown.any(dim=1)
    first = torch.where(seen.any(dim=1), seen.int().argmax(dim=1), kv_len)  # the keys before the first that is seen
    for candidate in [window, None] if window is not None else [None]:
        causal = causal_mask(new_tokens, kv_len, window=candidate, device=shown.device)
        whole = (shown == causal).all(dim=2).all(dim=1)  # nothing is hidden besides
        padding = torch.where(whole, 0, first)
        expected = causal & (position >= padding[:, None, None])
        real = position[-new_tokens:] >= padding[:, None]  # what padding itself sees is nobody's business
        if torch.equal(shown[real], expected[real]):
            return (None if bool(whole.all()) else padding), candidate
    raise CannotHold(
        f"this attention_mask hides more than the future and padding at the left, which is all that a labkit cache "
        f"can hide: {WITHOUT}"
    )
