"""Who runs in the next pass of the model, and how many tokens of each: decided anew before every pass.

Those that run come first, in the order in which they were admitted: the next token of an answer, the next chunk of a
prompt, as far as the budget of tokens goes. Then those that wait are admitted in turn, each if all of its tokens fit
and leave a block for each that runs. Who finds no block for its next token preempts the one admitted last, which gives
up its blocks and waits, in front, to be run again from its beginning, with its answer so far as prompt. So the first
that runs always goes on, and everyone's turn comes.
"""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

from labkit.cache.paged import OutOfBlocks
from labkit.engine.blocks import BlockManager
from labkit.engine.request import InFlight


class Chunk(NamedTuple):
    """Tokens `start` to `end - 1` of a request, run in one pass. ends: they are its last, its next token comes."""

    flight: InFlight
    start: int
    end: int
    ends: bool


class Scheduler:
    """Requests that wait and requests that run: `token_budget` tokens and `max_rows` requests in one pass."""

    def __init__(self, blocks: BlockManager, token_budget: int, max_rows: int) -> None:
        self.blocks, self.token_budget, self.max_rows = blocks, token_budget, max_rows
        self.waiting: deque[InFlight] = deque()
        self.running: list[InFlight] = []
        self.preemptions = 0

    def plan(self) -> list[Chunk]:
        """The next pass, empty when there is nothing to do. Its tokens have slots from now on.

        A pass that failed is simply planned again. Raises OutOfBlocks when there is no block even for one alone.
        """
        chunks: list[Chunk] = []
        budget, before = self.token_budget, self.preemptions
        while budget:
            if len(chunks) < len(self.running):
                flight = self.running[len(chunks)]
                if not self.make_room(flight):
                    continue
            elif not self.waiting or len(self.running) == self.max_rows or self.preemptions > before:
                break
            elif (flight := self.waiting[0]) and not self.admit(flight):
                break
            start, known = self.blocks.table(flight.id).computed, len(flight.tokens)
            end = min(known, start + budget)
            budget -= end - start
            chunks.append(Chunk(flight, start, end, end == known))
        return chunks

    def make_room(self, flight: InFlight) -> bool:
        """Slots for all its tokens, at the cost of those admitted last; False when it is itself the last."""
        while True:
            try:
                self.blocks.extend(flight.id, flight.tokens[len(self.blocks.table(flight.id).tokens) :])
                return True
            except OutOfBlocks:
                if len(self.running) == 1:
                    raise
                self.preempt(last := self.running[-1])
                if last is flight:
                    return False

    def admit(self, flight: InFlight) -> bool:
        """Let the first that waits run, if it fits."""
        try:
            reused = self.blocks.admit(flight.id, flight.tokens, flight.request.salt, spare=len(self.running))
        except OutOfBlocks:
            if not self.running:
                raise
            return False
        self.running.append(self.waiting.popleft())
        if not flight.timing.preemptions:
            flight.timing.reused, flight.timing.queue_time = reused, time.perf_counter() - flight.timing.arrived
        return True

    def preempt(self, flight: InFlight) -> None:
        """Take the blocks of one that runs; it waits in front."""
        self.remove(flight)
        self.waiting.appendleft(flight)
        self.preemptions += 1
        flight.timing.preemptions += 1

    def remove(self, flight: InFlight) -> None:
        """Have no more to do with it; its blocks are free."""
        if flight in self.waiting:
            self.waiting.remove(flight)
        else:
            self.running.remove(flight)
            self.blocks.release(flight.id)
