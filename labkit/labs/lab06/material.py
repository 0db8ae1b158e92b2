"""What lab 06 looks at: a trace of requests in memory that is reserved or in blocks; a story of blocks in scenes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from labkit.engine.blocks import BlockManager


@dataclass(frozen=True)
class Moment:
    """Slots at one step of a trace: that hold a token, that will, that are taken and never will; requests done."""

    held: int
    reserved: int
    never: int
    running: int
    done: int


def reserving(prompts: Sequence[int], answers: Sequence[int], slots: int, room: int) -> list[Moment]:
    """The trace in pieces of `room` slots, one for each request that runs, first come, first served.

    Every request waits at the beginning; a step gives each that runs one token. ValueError where one has no room.
    """
    if not 0 < max(map(sum, zip(prompts, answers, strict=True))) <= room <= slots:
        raise ValueError(f"every request must fit into a room of {room}, and a room into {slots} slots")
    waiting, done = deque(zip(prompts, answers, strict=True)), 0
    running: list[list[int]] = []
    moments = []
    while waiting or running:
        while waiting and (len(running) + 1) * room <= slots:
            prompt, answer = waiting.popleft()
            running.append([prompt, prompt + answer])
        held, final = (sum(request[part] for request in running) for part in (0, 1))
        moments.append(Moment(held, final - held, len(running) * room - final, len(running), done))
        running = [[now + 1, last] for now, last in running if now < last]
        done = len(prompts) - len(waiting) - len(running)
    return moments


def paging(prompts: Sequence[int], answers: Sequence[int], slots: int, block_size: int) -> list[Moment]:
    """The same trace in blocks, taken when a token needs one. Where none is left, the newest request waits again.

    It comes back with its answer so far as part of its prompt. A request is admitted where its tokens fit and leave a
    block for each that runs.
    """
    blocks = slots // block_size

    def taken(tokens: int) -> int:
        return -(-tokens // block_size)

    if not 0 < max(taken(a + b) for a, b in zip(prompts, answers, strict=True)) <= blocks:
        raise ValueError(f"every request must fit into {blocks} blocks of {block_size}")
    waiting = deque([prompt, prompt + answer] for prompt, answer in zip(prompts, answers, strict=True))
    running: list[list[int]] = []
    moments, done = [], 0
    while waiting or running:
        used = sum(taken(now) for now, _ in running)
        while used > blocks:
            waiting.appendleft(running.pop())
            used -= taken(waiting[0][0])
        while waiting and (not running or used + taken(waiting[0][0]) + len(running) + 1 <= blocks):
            running.append(waiting.popleft())
            used += taken(running[-1][0])
        held = sum(now for now, _ in running)
        moments.append(Moment(held, 0, used * block_size - held, len(running), done))
        done += sum(now == last for now, last in running)
        running = [[now + 1, last] for now, last in running if now < last]
    return moments


@dataclass(frozen=True)
class Scene:
    """Blocks at one moment. owners: who holds each block that is held. found: free ones whose content may be found.

    tables: each request's blocks and its tokens, in order of arrival. text: what has just happened.
    """

    text: str
    owners: dict[int, tuple[str, ...]]
    found: frozenset[int]
    tables: dict[str, tuple[tuple[int, ...], int]]


def story(allocator: Callable[[int], Any] | None = None, num_blocks: int = 16, block_size: int = 4) -> list[Scene]:
    """Requests arrive, grow, fork and end, on the engine's block manager. allocator: a learner's own."""
    manager = BlockManager(num_blocks, block_size, allocator=allocator(num_blocks) if allocator else None)
    scenes: list[Scene] = []
    anna, berta = list(range(100, 110)), list(range(200, 207))

    def look(text: str) -> None:
        owners = manager.owners()
        tables = {name: (tuple(table.blocks), len(table.tokens)) for name, table in manager.tables.items()}
        scenes.append(Scene(text, owners, manager.findable() - owners.keys(), tables))

    def admit(name: str, tokens: list[int]) -> int:
        reused = manager.admit(name, tokens)
        manager.computed(name, len(tokens))
        return reused

    def grow(name: str, tokens: int) -> list[tuple[int, int]]:
        length = len(manager.table(name).tokens)
        copies = manager.extend(name, range(1000 + length, 1000 + length + tokens))
        manager.computed(name, length + tokens)
        return copies

    look(f"nobody is here: {num_blocks} free blocks of {block_size}")
    admit("anna", anna)
    look("anna's prompt of 10 tokens takes 3 blocks; the last has 2 empty slots")
    grow("anna", 2)
    look("2 tokens of her answer fill it: no new block")
    grow("anna", 1)
    look("the next token needs a block, and takes one")
    admit("berta", berta)
    look("berta's prompt of 7 tokens takes 2")
    reused = admit("clara", [*anna[:8], *range(300, 306)])
    look(f"clara begins as anna did: {reused} tokens are reused, in 2 blocks that both hold now")
    for _ in range(3):
        grow("anna", 1)
        grow("clara", 1)
    look("anna and clara answer on; their blocks lie wherever one was free")
    manager.fork("berta", "berta 2")
    look("a second answer for berta: a fork shares every block")
    ((old, new),) = grow("berta 2", 1)
    look(f"berta 2 writes into a block that is shared: block {old} is copied to {new} first")
    grow("berta", 1)
    look("berta writes too: her block is hers alone now, so nothing is copied")
    manager.release("anna")
    look("anna's answer ends. What clara shares stays; full blocks that nobody holds (hatched) may still be found")
    reused = admit("dora", [*anna, *range(1010, 1013), 400, 401])
    look(f"dora goes on from anna's conversation: {reused} tokens are found again")
    manager.release("berta")
    manager.release("berta 2")
    look("both of berta's end")
    admit("emil", list(range(500, 534)))
    look("emil's long prompt takes every block that nobody needs: what was kept there is forgotten")
    for name in ("clara", "dora", "emil"):
        manager.release(name)
    look("everyone has gone: every block is free, and some still hold what the next may begin with")
    return scenes


def names_in(scenes: Sequence[Scene]) -> list[str]:
    """Everyone who appears, in order of arrival."""
    return list(dict.fromkeys(name for scene in scenes for name in scene.tables))
