"""Blocks: the memory of K and V in equal pieces, handed out one at a time, shared where beginnings are the same.

    blocks = BlockManager(num_blocks=64, block_size=16)
    reused = blocks.admit("a", prompt)          # slots for every token of the prompt; so many have K and V already
    blocks.computed("a", len(prompt))           # K and V are written: full blocks can be found by others
    copies = blocks.extend("a", [token])        # slots for what comes next, and blocks to copy before it is written
    blocks.fork("a", "b")                       # "b" shares every block of "a" until one of them writes
    blocks.release("a")

Nothing here holds a tensor: a block is a number, its slots are `block * block_size` to `(block + 1) * block_size - 1`.
Every operation takes constant time per block that it touches, and either happens or raises and changes nothing.

Prefix reuse as in vLLM: a *full* block whose K and V are written is found again by the chain of tokens up to its end
and by a salt (a tenant's name, say), never across salts. The tokens themselves are compared, so that no collision of
hashes can hand out another text's K and V. A block that nobody holds stays findable until it is needed: the one that
was let go first is taken first, and of one request the last, since a beginning is wanted more often than an end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from labkit.attention import is_count
from labkit.cache.paged import OutOfBlocks
from labkit.engine.allocator import Allocator


@dataclass(frozen=True)
class Content:
    """What a full block holds: its own tokens, and the chain of all before them, which the salt begins."""

    before: bytes
    tokens: tuple[int, ...]

    @cached_property
    def chain(self) -> bytes:
        """16 bytes that stand for everything up to the end of this block."""
        numbers = b"".join(token.to_bytes(8, "little") for token in self.tokens)
        return hashlib.blake2b(self.before + numbers, digest_size=16).digest()


@dataclass
class Table:
    """One request: its tokens, the blocks that hold them in order, and how many tokens have K and V written.

    chains: of each full block that is written, in order; `chains[i]` stands for everything up to the end of block `i`.
    """

    root: bytes
    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    chains: list[bytes] = field(default_factory=list)
    computed: int = 0


@dataclass
class Counts:
    """What was asked and found so far, in tokens: `queries` of admitted prompts, `hits` of these that were reused.
    `copied`: blocks that were written by one of several holders. `evicted`: contents that made room for others."""

    queries: int = 0
    hits: int = 0
    copied: int = 0
    evicted: int = 0


class BlockManager:
    """Hands out `num_blocks` blocks of `block_size` tokens each.

    reuse: whether full blocks are found again. allocator: says which blocks are free, by default an `Allocator`.
    Raises ValueError for sizes that cannot be, and for an allocator of another number of free blocks.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, reuse: bool = True, allocator: Allocator | None = None
    ) -> None:
        for name, size in (("num_blocks", num_blocks), ("block_size", block_size)):
            if not is_count(size) or size < 1:
                raise ValueError(f"{name} is a whole number, at least 1; got {size!r}")
        self.num_blocks, self.block_size, self.reuse = int(num_blocks), int(block_size), reuse
        self.tables: dict[str, Table] = {}
        self.counts = Counts()
        self.allocator = Allocator(self.num_blocks) if allocator is None else allocator
        if self.num_free != self.num_blocks:
            raise ValueError(f"the allocator has {self.num_free} free blocks; {self.num_blocks} are needed")
        self._content: dict[int, Content] = {}
        self._found: dict[bytes, int] = {}  # chain: block

    # What is there.

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds. Some of them may still be found."""
        return self.allocator.num_free

    @property
    def usage(self) -> float:
        """Share of the blocks that somebody holds, 0 to 1."""
        return 1 - self.num_free / self.num_blocks

    def ref_count(self, block: int) -> int:
        """How many requests hold this block."""
        return self.allocator.ref_count(block)

    def owners(self) -> dict[int, tuple[str, ...]]:
        """Who holds each block that is held, in order of arrival."""
        found: dict[int, tuple[str, ...]] = {}
        for name, table in self.tables.items():
            found |= {block: (*found.get(block, ()), name) for block in table.blocks}
        return found

    def findable(self) -> frozenset[int]:
        """Blocks whose content can be found, whether or not somebody holds them."""
        return frozenset(self._content)

    def table(self, request: str) -> Table:
        """The table of a request; ValueError when there is none."""
        if request not in self.tables:
            raise ValueError(f"there is no request {request!r}")
        return self.tables[request]

    def block_table(self, request: str) -> list[int]:
        """The blocks of a request, in order of its tokens."""
        return list(self.table(request).blocks)

    def slots(self, request: str, start: int, end: int) -> list[int]:
        """The slots of tokens `start` to `end - 1` of a request."""
        blocks, size = self.table(request).blocks, self.block_size
        return [blocks[place // size] * size + place % size for place in range(start, end)]

    def blocks_for(self, tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-tokens // self.block_size)

    # What can be done.

    def reusable(self, tokens: Sequence[int], salt: str = "") -> int:
        """How many of these tokens have K and V in blocks that can be found: whole blocks, and never the last token."""
        return len(self._matching(tokens, root(salt))) * self.block_size

    def admit(self, request: str, tokens: Iterable[int], salt: str = "", *, spare: int = 0) -> int:
        """Slots for a new request's prompt. Returns how many of its tokens are reused: they need not be run.

        The last token is never reused, since the next token's logits come from it. spare: blocks that have to stay
        free. ValueError for an id that is taken or a prompt without tokens; OutOfBlocks when not all of it fits.
        """
        tokens = checked(tokens)
        self._check_new(request)
        if not tokens:
            raise ValueError(f"request {request!r} has no tokens")
        table = Table(root(salt))
        found = self._matching(tokens, table.root)
        free_found = sum(self.ref_count(block) == 0 for block in found)
        new = self.blocks_for(len(tokens)) - len(found)
        self._check_room(new + free_found, request, spare)
        table.chains = [self._content[block].chain for block in found]
        table.blocks = self._gather(found, new)
        table.tokens, table.computed = tokens, len(found) * self.block_size
        self.tables[request] = table
        self.counts.queries += len(tokens)
        self.counts.hits += table.computed
        return table.computed

    def extend(self, request: str, tokens: Iterable[int]) -> list[tuple[int, int]]:
        """Slots for tokens behind those of a request. Returns blocks to copy, (from, to), before anything is written.

        A block that others hold as well is not written into: the request gets a copy of its own.
        """
        table, tokens = self.table(request), checked(tokens)
        if not tokens:
            return []
        last = table.blocks[-1] if len(table.tokens) % self.block_size else None
        shared = last is not None and self.ref_count(last) > 1
        more = self.blocks_for(len(table.tokens) + len(tokens)) - len(table.blocks)
        self._check_room(more + shared, request)
        new, copies = self._gather((), more + shared), []
        if last is not None and shared:
            table.blocks[-1] = new.pop(0)
            copies.append((last, table.blocks[-1]))
            self._drop(last)
            self.counts.copied += 1
        elif last is not None:
            self._forget_content(last)  # it was full before tokens were forgotten
        table.blocks += new
        table.tokens += tokens
        return copies

    def computed(self, request: str, tokens: int) -> None:
        """K and V of the first `tokens` tokens are written: their full blocks can be found from now on."""
        table = self.table(request)
        if not table.computed <= tokens <= len(table.tokens):
            raise ValueError(
                f"request {request!r} has {len(table.tokens)} tokens, {table.computed} of them written; "
                f"{tokens} cannot be"
            )
        size = self.block_size
        for place in range(len(table.chains), tokens // size if self.reuse else 0):
            content = Content(
                table.chains[-1] if table.chains else table.root, tuple(table.tokens[place * size : (place + 1) * size])
            )
            table.chains.append(content.chain)
            block = table.blocks[place]
            if content.chain not in self._found and block not in self._content:
                self._found[content.chain], self._content[block] = block, content
        table.computed = tokens

    def fork(self, request: str, child: str) -> None:
        """A second request with the same tokens, in the same blocks, until one of the two writes."""
        table = self.table(request)
        self._check_new(child)
        blocks = self._gather(table.blocks, 0)
        self.tables[child] = Table(table.root, list(table.tokens), blocks, list(table.chains), table.computed)

    def shorten(self, request: str, tokens: int) -> None:
        """Forget a request's tokens from place `tokens` on, at least one stays: for guesses that were not accepted."""
        table = self.table(request)
        if not is_count(tokens) or not 1 <= tokens <= len(table.tokens):
            raise ValueError(f"request {request!r} has {len(table.tokens)} tokens: {tokens!r} cannot be kept")
        kept = self.blocks_for(tokens)
        for block in reversed(table.blocks[kept:]):
            self._drop(block)
        del table.blocks[kept:], table.tokens[tokens:], table.chains[tokens // self.block_size :]
        table.computed = min(table.computed, tokens)

    def release(self, request: str) -> None:
        """Let go of every block of a request. What can be found stays so until the memory is needed."""
        table = self.table(request)
        del self.tables[request]
        for block in reversed(table.blocks):
            self._drop(block)

    def forget(self) -> None:
        """What is in the blocks is gone: nothing written before is found from now on."""
        self._content.clear()
        self._found.clear()

    # One block at a time.

    def _matching(self, tokens: Sequence[int], chain: bytes) -> list[int]:
        """The blocks that hold a beginning of `tokens`, the last of them left out."""
        found: list[int] = []
        for start in range(0, len(tokens) - self.block_size, self.block_size) if self.reuse else ():
            content = Content(chain, tuple(tokens[start : start + self.block_size]))
            block = self._found.get(content.chain)
            if block is None or self._content[block] != content:
                break
            found.append(block)
            chain = content.chain
        return found

    def _check_new(self, request: str) -> None:
        if request in self.tables:
            raise ValueError(f"there is a request {request!r} already")

    def _check_room(self, blocks: int, request: str, spare: int = 0) -> None:
        if blocks + spare > self.num_free:
            said = f"request {request!r} needs {blocks} more blocks{f' and {spare} to stay free' if spare else ''}"
            raise OutOfBlocks(f"{said}, {self.num_free} of {self.num_blocks} are free")

    def _gather(self, found: Iterable[int], new: int) -> list[int]:
        """These blocks, held once more, and so many free ones: all, or, where an allocator raises, none."""
        gathered: list[int] = []
        try:
            for block in found:
                self.allocator.hold(block)
                gathered.append(block)
            for _ in range(new):
                gathered.append(self._take())
        except BaseException:
            for block in reversed(gathered):
                self._drop(block)
            raise
        return gathered

    def _take(self) -> int:
        """A free block, in which nothing is found any longer."""
        block = self.allocator.take()
        self.counts.evicted += self._forget_content(block)
        return block

    def _forget_content(self, block: int) -> bool:
        """Let a block no longer be found; whether it could be."""
        content = self._content.pop(block, None)
        if content is not None:
            del self._found[content.chain]
        return content is not None

    def _drop(self, block: int) -> None:
        """One holder fewer. A block that nobody can find is of no use to keep: it is taken first."""
        self.allocator.drop(block, keep=block in self._content)


def root(salt: str) -> bytes:
    """Where a chain begins: another place for each salt."""
    return hashlib.blake2b(salt.encode(), digest_size=16).digest()


def checked(tokens: Iterable[int]) -> list[int]:
    """Token ids as numbers; ValueError for anything else."""
    listed = list(tokens)
    for token in listed:
        if not is_count(token) or not 0 <= token < 2**63:
            raise ValueError(f"tokens are whole numbers, 0 or more; got {token!r}")
    return [*map(int, listed)]
