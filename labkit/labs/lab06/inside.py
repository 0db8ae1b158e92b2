"""What a learner wrote, in the place of the engine's own: an allocator, block tables, copy on write.

    manager = OwnBlocks(256, 16, BlockAllocator, BlockTable, copy_on_write)
    Engine(model, manager=manager)

Nothing is found again here; an engine with `allocator=BlockAllocator(256)` finds blocks again by its own tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from labkit.engine.blocks import BlockManager, Table, checked, root


class OwnBlocks(BlockManager):
    """A block manager whose blocks are handed out, listed and shared by the classes and the function that it is given.

    allocator: made with the number of blocks. table: made with that allocator and block_size. copy_on_write: called
    with a table before it is appended to. Raises what `BlockManager` raises.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        allocator: Callable[[int], Any],
        table: Callable[[Any, int], Any],
        copy_on_write: Callable[[Any], list[tuple[int, int]]],
    ) -> None:
        super().__init__(num_blocks, block_size, reuse=False, allocator=allocator(num_blocks))
        self.make_table, self.copy_on_write = table, copy_on_write
        self.own: dict[str, Any] = {}

    def admit(self, request: str, tokens: Iterable[int], salt: str = "", *, spare: int = 0) -> int:
        """A table of the learner's for a new request."""
        tokens = checked(tokens)
        self._check_new(request)
        if not tokens:
            raise ValueError(f"request {request!r} has no tokens")
        self._check_room(self.blocks_for(len(tokens)), request, spare)
        own = self.make_table(self.allocator, self.block_size)
        own.append(len(tokens))
        self.own[request] = own
        self.tables[request] = Table(root(salt), tokens, own.blocks)
        self.counts.queries += len(tokens)
        return 0

    def extend(self, request: str, tokens: Iterable[int]) -> list[tuple[int, int]]:
        """Copy on write, then append."""
        table, tokens = self.table(request), checked(tokens)
        if not tokens:
            return []
        begun = len(table.tokens) % self.block_size
        shared = bool(begun) and self.ref_count(table.blocks[-1]) > 1
        more = self.blocks_for(len(table.tokens) + len(tokens)) - len(table.blocks)
        self._check_room(more + shared, request)  # both, or neither
        own = self.own[request]
        copies = list(self.copy_on_write(own))
        own.append(len(tokens))
        table.blocks = own.blocks
        table.tokens += tokens
        self.counts.copied += len(copies)
        return copies

    def fork(self, request: str, child: str) -> None:
        """The learner's fork."""
        table = self.table(request)
        self._check_new(child)
        self.own[child] = self.own[request].fork()
        self.tables[child] = Table(table.root, list(table.tokens), self.own[child].blocks, [], table.computed)

    def shorten(self, request: str, tokens: int) -> None:
        """Tables of this lab only grow."""
        raise NotImplementedError("a BlockTable does not get shorter")

    def release(self, request: str) -> None:
        """The learner's release."""
        self.table(request)
        del self.tables[request]
        self.own.pop(request).release()
