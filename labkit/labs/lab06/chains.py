"""How full blocks are found again: a key for everything up to a block's end, and what was written for it."""

from __future__ import annotations

import hashlib
from typing import NamedTuple


class Written(NamedTuple):
    """A full block whose K and V are written. tokens: all of its request, from the first to the block's last."""

    block: int
    salt: str
    tokens: tuple[int, ...]


def chain(before: str | int, tokens: tuple[int, ...]) -> int:
    """A number for a block's tokens and everything before them: `before` is the key of the block before, or the salt.

    Other tokens, or another beginning, give another number, but for collisions: it has 64 bits.
    """
    text = f"{before!r} {tuple(tokens)!r}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def written(prompt: list[int], blocks: list[int], block_size: int, salt: str) -> dict[int, Written]:
    """The full blocks of a prompt that was run, by their keys: what `found` is made of."""
    found: dict[int, Written] = {}
    key: str | int = salt
    for block, end in zip(blocks, range(block_size, len(prompt) + 1, block_size), strict=False):
        key = chain(key, tuple(prompt[end - block_size : end]))
        found[key] = Written(block, salt, tuple(prompt[:end]))
    return found
