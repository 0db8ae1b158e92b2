"""What one pass of a model brings: which row, and which place in it, each new token has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from labkit.attention import Visibility, check_padding


@dataclass(frozen=True, eq=False)
class Step:
    """The layout of one pass. The model's cache makes it once, and every layer is handed the same.

    counts: new tokens of each row. before: tokens that each row held already. padding: tokens at the left of each row
    that are none, counted in `before` and `counts`; empty where no row has any. ends: whether layers are asked at its
    end what they plan, so that what they learn of it can wait until then. shared: what layers make once for all.

    Rows with the same number of new tokens come as a rectangle, `[batch, ..., new_tokens, ...]`. Others come end to
    end in a single row, `[1, ..., total, ...]`: nothing is padded, a chunk of one row and single tokens of others go
    through a model's products together. Raises ValueError for counts that cannot be.
    """

    counts: tuple[int, ...]
    before: tuple[int, ...]
    padding: tuple[int, ...] = ()
    ends: bool = False
    shared: dict = field(default_factory=dict, init=False, repr=False)
    _places: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.counts) != len(self.before) or len(self.padding) not in (0, len(self.counts)):
            raise ValueError(
                f"a step has one count, one length and one padding per row; got {len(self.counts)}, "
                f"{len(self.before)} and {len(self.padding)}"
            )
        if not self.counts or min(self.counts) < 0 or max(self.counts) < 1:
            raise ValueError(f"a step brings at least one token, and none fewer than 0; got {list(self.counts)} by row")
        if min(self.before) < 0:
            raise ValueError(f"rows held fewer than no tokens: {list(self.before)}")
        check_padding(self.padding)

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self.counts)

    @cached_property
    def is_rectangle(self) -> bool:
        """Whether every row has the same number of new tokens."""
        return len(set(self.counts)) == 1

    @property
    def new_tokens(self) -> int:
        """Tokens in each row of what comes: of every row in a rectangle, of all rows together where they lie in one."""
        return self.counts[0] if self.is_rectangle else sum(self.counts)

    @cached_property
    def after(self) -> tuple[int, ...]:
        """Tokens that each row holds behind this step."""
        return tuple(held + new for held, new in zip(self.before, self.counts, strict=True))

    @cached_property
    def is_even(self) -> bool:
        """Whether all rows were as long as each other and are so again."""
        return self.is_rectangle and len(set(self.before)) == 1

    @cached_property
    def skipped(self) -> tuple[int, ...]:
        """`padding`, with a zero for each row where there is none."""
        return self.padding or (0,) * self.batch

    @cached_property
    def visible(self) -> Visibility:
        """Who may see whom in a rectangle whose rows lie side by side, each from index 0."""
        first_query = tuple(held - skip for held, skip in zip(self.before, self.skipped, strict=True))
        first_key = tuple(-skip for skip in self.skipped)
        return Visibility(self.counts[0], max(self.after), shortened(first_query), shortened(first_key))

    def newest_of(self, kv_len: int) -> Visibility:
        """Who may see whom where a rectangle's tokens are the newest of `kv_len` keys, none of them padding.

        Made once: the layers of a model share it, and its mask.
        """
        if ("newest", kv_len) not in self._places:
            self._places["newest", kv_len] = Visibility.newest(self.counts[0], kv_len)
        return self._places["newest", kv_len]

    def of_row(self, row: int) -> Visibility:
        """Who may see whom in one row by itself."""
        skip = self.skipped[row]
        return Visibility(self.counts[row], self.after[row], (self.before[row] - skip,), (-skip,))

    def positions(self, device: torch.device | str) -> Tensor:
        """Of each new token, int64 `[batch or 1, new_tokens]`; padding stands at 0, as a row's first token does."""
        firsts = [held - skip for held, skip in zip(self.before, self.skipped, strict=True)]
        if self.is_rectangle:
            start = torch.tensor(shortened(tuple(firsts)), device=device)[:, None]
            position = start + torch.arange(self.counts[0], device=device)
        else:
            numbers = [
                first + place for first, count in zip(firsts, self.counts, strict=True) for place in range(count)
            ]
            position = torch.tensor([numbers], device=device)
        return position.clamp(min=0) if self.padding else position

    def text_positions(self, device: torch.device | str) -> Tensor:
        """As `positions` of a rectangle, but negative for padding: int64 `[batch or 1, new_tokens]`. Made once."""
        device = torch.device(device)
        if (device, "text") not in self._places:
            first = torch.tensor(self.visible.first_query, device=device)[:, None]
            self._places[device, "text"] = first + torch.arange(self.counts[0], device=device)
        return self._places[device, "text"]

    def key_positions(self, num_kv_heads: int, device: torch.device | str) -> Tensor:
        """Of each new token, int32 `[batch, num_kv_heads, new_tokens]`, -1 for padding. Made once: do not write it."""
        device = torch.device(device)
        if (device, num_kv_heads) not in self._places:
            positions = self.text_positions(device).clamp(min=-1).to(torch.int32)
            made = positions[:, None].expand(self.batch, num_kv_heads, -1).contiguous()
            self._places[device, num_kv_heads] = made
        return self._places[device, num_kv_heads]

    def places(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Row and index in that row of each new token, row after row, both int64 `[all new tokens]`. Made once."""
        device = torch.device(device)
        if device not in self._places:
            rows = [row for row, count in enumerate(self.counts) for _ in range(count)]
            places = [held + i for held, count in zip(self.before, self.counts, strict=True) for i in range(count)]
            self._places[device] = torch.tensor(rows, device=device), torch.tensor(places, device=device)
        return self._places[device]

    def last_places(self) -> list[int]:
        """Where the newest token of each row that has any lies among all that lie end to end."""
        return [end - 1 for end, count in zip(accumulate(self.counts), self.counts, strict=True) if count]

    def split(self, x: Tensor, dim: int) -> Iterator[Tensor]:
        """What lies end to end along `dim`, row by row; a row of no new tokens gives an empty piece."""
        return iter(x.split(list(self.counts), dim=dim))


def rectangle(batch: int, new_tokens: int, held: Sequence[int] = (), padding: Sequence[int] = ()) -> Step:
    """A step of `new_tokens` for each of `batch` rows, which hold `held` tokens (none, where nothing is said)."""
    return Step((new_tokens,) * batch, tuple(held) or (0,) * batch, tuple(padding) if any(padding) else ())


def shortened(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """One number where all are alike."""
    return numbers[:1] if len(set(numbers)) == 1 else numbers
