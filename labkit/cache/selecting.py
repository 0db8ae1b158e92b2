"""A cache that drops nothing and reads little: of all pages of tokens a decode step reads those that may matter to it.

Quest (arXiv:2406.10774): of each page, `page_size` neighbours, the least and the greatest number that its keys have in
each channel are kept. No key of the page can have a larger product with a query than the sum over channels of the
larger of query times least and query times greatest: an upper bound, for the price of reading two keys. The pages of
the highest bounds are read, and the newest, which is not yet full.

Settled here: the query heads that share a KV head read the same pages, those of the highest bound of any of them. The
paper reads all of the first two layers, and all of the prompt's pass; so does this cache where a step brings several
tokens, or there are no more than `budget`; layers have budgets of their own (`Cache.selecting`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from labkit.attention import Visibility, is_count
from labkit.cache.dense import GrowingCache
from labkit.cache.layer import Observer, size_of
from labkit.cache.step import Step
from labkit.sizing import Selecting


class SelectingCache(GrowingCache):
    """All K and V, of which a decode step reads at most `budget` tokens for each KV head, in pages of `page_size`.

    `nbytes` counts the bounds, too: of each page the size of two keys. `bytes_read` counts the bounds and what of K and
    V was chosen; making them one piece copies them, which `bytes_copied` does not count.
    Raises ValueError unless the budget has room for the newest page and one more.
    """

    takes_ragged = False
    selects = True

    def __init__(
        self,
        budget: int,
        *,
        page_size: int = 16,
        scale: float | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> None:
        if not is_count(page_size) or page_size < 1:
            raise ValueError(f"page_size is a number of tokens, at least 1; got {page_size!r}")
        if not is_count(budget) or budget < 2 * page_size:
            raise ValueError(
                f"budget is a number of tokens, at least two pages of {page_size}: one is the newest; got {budget!r}"
            )
        super().__init__(scale=scale, window=window, soft_cap=soft_cap)
        self.budget, self.page_size = int(budget), int(page_size)
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    @property
    def format(self) -> Selecting:
        """What `labkit.sizing` calls this, in the dtype of what is held; float16 when empty."""
        return Selecting(self.budget, self.page_size, self.kept_dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of K, V and the bounds."""
        return super().nbytes + sum(size_of(x) for x in (self.low, self.high) if x is not None)

    def forget(self) -> None:
        """Hold nothing."""
        super().forget()
        self.low = self.high = None

    def mark(self) -> Any:
        """The lengths and all tensors, which are made anew by every step."""
        return super().mark(), self.low, self.high

    def restore(self, mark: Any) -> None:
        """The lengths and tensors that were."""
        dense, self.low, self.high = mark
        super().restore(dense)

    def write(self, k: Tensor, v: Tensor, step: Step) -> None:
        """Concatenate, and bound the pages that have new tokens."""
        super().write(k, v, step)
        self.bound(step.before[0] // self.page_size)

    def bound(self, first: int) -> None:
        """Make the bounds of the pages from `first` on anew."""
        assert self.k is not None
        with torch.inference_mode(False), torch.no_grad():
            keys = self.k[:, :, first * self.page_size :]
            whole = keys.shape[2] // self.page_size * self.page_size
            parts = [keys[:, :, :whole].unflatten(2, (-1, self.page_size)), keys[:, :, None, whole:]]
            found = [torch.aminmax(part, dim=3) for part in parts if part.numel()]
            before = [x[:, :, :first] for x in (self.low, self.high) if x is not None] or [keys[:, :, :0]] * 2
            self.low = torch.cat((before[0], *(part.min for part in found)), dim=2)
            self.high = torch.cat((before[1], *(part.max for part in found)), dim=2)

    def forget_from(self, seq_len: int) -> None:
        """Keep a copy of the first `seq_len` tokens, and bound the page that was cut."""
        mark = self.mark()
        try:
            super().forget_from(seq_len)
            self.bound(seq_len // self.page_size)
        except BaseException:
            self.restore(mark)
            raise

    def choose_rows(self, rows: Tensor) -> None:
        """Copy the chosen rows, their bounds with them."""
        assert self.low is not None
        assert self.high is not None
        low, high = (x.index_select(0, rows.to(x.device)) for x in (self.low, self.high))
        super().choose_rows(rows)
        self.low, self.high = low, high

    def attend(self, q: Tensor, step: Step | None = None, *, observe: Observer | None = None) -> Tensor:
        """Attention of the newest tokens' queries; of a single query for each row over the pages that it reads.

        observe: gets the weights over what was read, `[batch, num_heads, new_tokens, tokens read]`.
        """
        self.check_queries(q)
        if q.shape[2] > 1 or self.seq_len <= self.budget or self.k is None or self.v is None:
            return super().attend(q, step, observe=observe)
        visible = (step or self.newest(q)).visible
        pages = self.pages_read(q, visible)
        k, v, places = self.gathered(pages)
        hides = visible.has_padding or self.constants.window is not None
        skips = torch.tensor(visible.first_key, device=q.device)[:, None, None]  # minus each row's padding
        seen = (
            Visibility(1, k.shape[2], visible.first_query, key_position=places + skips)
            if hides
            else Visibility.newest(1, k.shape[2])
        )
        assert self.low is not None
        self.bytes_read += 2 * size_of(self.low)
        return self.answer(q, (k, v), seen, observe)

    def bounds_of(self, q: Tensor) -> Tensor:
        """But for rounding, no key of a page has a larger product with the query: `[batch, num_heads, pages]`."""
        assert self.low is not None
        assert self.high is not None
        grouped = q[:, :, 0].unflatten(1, (self.low.shape[1], -1))
        most = grouped.clamp(min=0) @ self.high.mT + grouped.clamp(max=0) @ self.low.mT
        return most.flatten(1, 2)

    def pages_read(self, q: Tensor, visible: Visibility) -> Tensor:
        """The full pages that are read, in their order, int64 `[batch, num_kv_heads, pages]`; the newest is besides."""
        assert self.k is not None
        newest = (self.seq_len - 1) // self.page_size
        sign = -1.0 if self.constants.scale_for(q.shape[3]) < 0 else 1.0
        with torch.no_grad():
            bounds = self.bounds_of(q * sign)[:, :, :newest].unflatten(1, (self.k.shape[1], -1)).amax(dim=2)
            if visible.has_padding or self.constants.window is not None:
                last = torch.arange(self.page_size - 1, newest * self.page_size, self.page_size, device=q.device)
                last = last + torch.tensor(visible.first_key, device=q.device)[:, None, None]
                query = torch.tensor(visible.first_query, device=q.device)[:, None, None]
                far = -1 if self.constants.window is None else query - self.constants.window
                bounds = bounds.masked_fill((last < 0) | (last <= far), float("-inf"))
            count = min(newest, self.budget // self.page_size - 1)
            return bounds.topk(count, dim=-1).indices.sort(dim=-1).values

    def gathered(self, pages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """K and V of these pages and of the newest, in one piece each, and where each token lies in its row."""
        assert self.k is not None
        assert self.v is not None
        batch, heads, _ = pages.shape
        whole = (self.seq_len - 1) // self.page_size * self.page_size
        index = pages[..., None, None].expand(-1, -1, -1, self.page_size, self.k.shape[3])
        sides = []
        for x in (self.k, self.v):
            some = x[:, :, :whole].unflatten(2, (-1, self.page_size)).gather(2, index).flatten(2, 3)
            sides.append(torch.cat((some, x[:, :, whole:]), dim=2))
        places = (pages[..., None] * self.page_size + torch.arange(self.page_size, device=pages.device)).flatten(2)
        newest = torch.arange(whole, self.seq_len, device=pages.device).expand(batch, heads, -1)
        return sides[0], sides[1], torch.cat((places, newest), dim=2)
