"""Attention's settings as the tests say them: by name, for the newest queries of some keys."""

from __future__ import annotations

from torch import Tensor

from labkit.attention import Constants, Visibility


def how(q: Tensor, k: Tensor | int, *, padding: Tensor | list[int] | None = None, **constants) -> tuple:
    """The constants and the visibility of a call: queries that are the newest of the keys (or of so many keys)."""
    numbers = [] if padding is None else padding.tolist() if isinstance(padding, Tensor) else padding
    kv_len = k if isinstance(k, int) else k.shape[2]
    return Constants(**constants), Visibility.newest(q.shape[2], kv_len, numbers)
