"""Which blocks are free, and how many hold each of the others: every operation takes constant time."""

from __future__ import annotations

from collections import OrderedDict

from labkit.attention import is_count
from labkit.cache.paged import OutOfBlocks


class Allocator:
    """Hands out the numbers 0 to `num_blocks - 1`, one at a time; a block is held by as many as took or hold it.

    Raises ValueError for a block that cannot be meant: one that nobody holds is dropped (for the second time, say).
    """

    def __init__(self, num_blocks: int) -> None:
        if not is_count(num_blocks) or num_blocks < 1:
            raise ValueError(f"num_blocks is a whole number, at least 1; got {num_blocks!r}")
        self.num_blocks = int(num_blocks)
        self._fresh = 0  # blocks from here on were never handed out
        self._free: OrderedDict[int, None] = OrderedDict()  # let go by all, of no use: the next to be taken at the end
        self._kept: OrderedDict[int, None] = OrderedDict()  # let go by all, may be wanted: the oldest in front
        self._holders: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return self.num_blocks - len(self._holders)

    def ref_count(self, block: int) -> int:
        """How many hold this block."""
        return self._holders.get(block, 0)

    def take(self) -> int:
        """A free block, held by one: one of no use, else one never used, else the one kept longest.

        OutOfBlocks when there is none.
        """
        if self._free:
            block, _ = self._free.popitem()
        elif self._fresh < self.num_blocks:
            block, self._fresh = self._fresh, self._fresh + 1
        elif self._kept:
            block, _ = self._kept.popitem(last=False)
        else:
            raise OutOfBlocks(f"all {self.num_blocks} blocks are held")
        self._holders[block] = 1
        return block

    def hold(self, block: int) -> None:
        """One holder more, of a block that is held, or that was let go and not taken since."""
        if block not in self._holders and block not in self._kept and block not in self._free:
            raise ValueError(f"block {block!r} was never taken: there is nothing in it to share")
        self._kept.pop(block, None)
        self._free.pop(block, None)
        self._holders[block] = self.ref_count(block) + 1

    def drop(self, block: int, *, keep: bool = False) -> bool:
        """One holder fewer; True when that was the last, and the block is free.

        keep: its content may be wanted again, so it is taken after all that are free; else it is the next to be taken.
        """
        holders = self.ref_count(block)
        if not holders:
            raise ValueError(f"nobody holds block {block!r}: it was let go already, or is none")
        if holders > 1:
            self._holders[block] = holders - 1
            return False
        del self._holders[block]
        (self._kept if keep else self._free)[block] = None
        return True
