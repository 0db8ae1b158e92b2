"""The loop: one pass of the model after another, each over a mix of prompts' chunks and single tokens of answers.

    engine = Engine(model, num_blocks=256, block_size=16)
    engine.add(Request("a", prompt, max_new_tokens=64))
    for token in engine.stream():               # a Token of any request, as soon as there is one
        ...
    answers = engine.run([Request("b", other, 64), Request("c", third, 64)])

A greedy answer is the one that its request gets alone, whatever runs beside it, in whatever chunks its prompt comes,
whatever is reused and however often it is preempted: the same numbers enter every K, V and logit. A mix changes the
order in which a product adds them, and with it the last bits of a float32 logit, about 1e-6 of it: where the two
likeliest tokens are closer than that, either is right. A cache that packs K and V rounds by what a pass brings.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from labkit.attention import is_count
from labkit.cache import Cache, Pages
from labkit.engine.allocator import Allocator
from labkit.engine.blocks import BlockManager, Counts
from labkit.engine.metrics import Snapshot, Totals, metrics, snapshot
from labkit.engine.request import InFlight, Request, Timing, Token
from labkit.engine.scheduler import Chunk, Scheduler
from labkit.generation import choose, likeliest
from labkit.interrupts import uninterrupted
from labkit.llama import Llama

Pick = tuple[int | None, torch.Generator] | None
"""A chunk's next token, None for logits that are no finite numbers, and where the draws stand; or no token is due."""


class WithoutPlans:
    """PyTorch's attention on a GPU without cuDNN's, which plans each new length of a chunk: 70 ms on an H100.

    What else is enabled stays so. The switch is the process's: the last one out turns it back.
    """

    lock, inside, was = threading.Lock(), 0, False

    def __init__(self, device: torch.device) -> None:
        self.needed = device.type == "cuda"

    def __enter__(self) -> None:
        if self.needed:
            with self.lock:
                if WithoutPlans.inside == 0:
                    WithoutPlans.was = torch.backends.cuda.cudnn_sdp_enabled()
                    torch.backends.cuda.enable_cudnn_sdp(False)
                WithoutPlans.inside += 1

    def __exit__(self, *_: object) -> None:
        if self.needed:
            with self.lock:
                WithoutPlans.inside -= 1
                if WithoutPlans.inside == 0:
                    torch.backends.cuda.enable_cudnn_sdp(WithoutPlans.was)


class Engine:
    """Answers many requests at once with one model, in `num_blocks` (256) blocks of `block_size` (16) tokens.

    token_budget: tokens of one pass; a longer prompt comes in chunks. max_rows: requests of one pass. reuse: whether
    K and V of equal beginnings are shared (they are). allocator, manager, cache: a block allocator, a `BlockManager`,
    which then says all of the blocks, a cache as `Cache.paged` makes it, unused, in place of the engine's own. record:
    keep a `Snapshot` of each pass in `history`. `finished`: the `Timing` of the newest `keep` requests that ended.
    Raises ValueError for what does not fit.

    A request whose logits are no finite numbers ends with "not finite"; the others go on.

    Requests may be added and cancelled at any moment, from other threads too. Whatever a step raises, the next goes on.
    """

    def __init__(
        self,
        model: Llama,
        num_blocks: int | None = None,
        block_size: int | None = None,
        *,
        token_budget: int = 512,
        max_rows: int = 32,
        reuse: bool | None = None,
        allocator: Allocator | None = None,
        manager: BlockManager | None = None,
        cache: Cache | None = None,
        record: bool = False,
        keep: int = 1024,
    ) -> None:
        for name, size in (("token_budget", token_budget), ("max_rows", max_rows), ("keep", keep)):
            if not is_count(size) or size < 1:
                raise ValueError(f"{name} is a whole number, at least 1; got {size!r}")
        self.model, self.spec = model, model.spec
        of_blocks = {"num_blocks": num_blocks, "block_size": block_size, "reuse": reuse, "allocator": allocator}
        said = [name for name, value in of_blocks.items() if value is not None]
        if manager is not None and said:
            raise ValueError(f"a block manager has its own {', '.join(said)}: say that where you make it")
        self.blocks = manager or BlockManager(
            256 if num_blocks is None else num_blocks,
            16 if block_size is None else block_size,
            reuse=True if reuse is None else reuse,
            allocator=allocator,
        )
        if self.blocks.counts != Counts():
            raise ValueError("the block manager was used: what it finds is in no cache of this engine")
        sizes = self.blocks.num_blocks, self.blocks.block_size
        self.cache = cache or Cache.paged(self.spec.num_layers, *sizes, window=self.spec.window)
        self.cache.check_fits(self.spec.num_layers, model.blocks[0].attention.constants)
        pages = self.pages = self.cache[0].shared
        if not isinstance(pages, Pages) or any(layer.shared is not pages for layer in self.cache.layers):
            raise ValueError("an engine's cache is one whose layers share their Pages: Cache.paged makes one")
        if self.cache.lengths or (pages.num_blocks, pages.block_size) != sizes:
            raise ValueError(
                f"an engine's cache is unused; the block manager has {sizes[0]} blocks of {sizes[1]} tokens"
            )
        self.scheduler = Scheduler(self.blocks, token_budget, max_rows)
        self.flights: dict[str, InFlight] = {}
        self.finished: dict[str, Timing] = {}
        self.history: list[Snapshot] | None = [] if record else None
        self._keep, self._totals = keep, Totals()  # of requests that ended, whether or not they are still kept
        self._out: list[Token] = []  # tokens that nobody was handed yet
        self._lock = threading.RLock()
        self._stepping: object = None  # whose step it is

    def add(self, request: Request) -> None:
        """Let a request wait for its turn. ValueError, and nothing changes, where it could never be answered."""
        tokens, total = len(request.tokens), len(request.tokens) + request.max_new_tokens
        asked = f"request {request.id!r} has {tokens} tokens and asks for {request.max_new_tokens}"
        if (highest := max(request.tokens)) >= self.spec.vocab_size:
            raise ValueError(f"tokens are ids from 0 to {self.spec.vocab_size - 1}; got {highest}")
        if total > self.spec.max_seq_len:
            raise ValueError(f"{asked}: the model has positions for {self.spec.max_seq_len}")
        if self.blocks.blocks_for(total - 1) > self.blocks.num_blocks:  # the last token is never run
            raise ValueError(
                f"{asked}: {self.blocks.num_blocks} blocks of {self.blocks.block_size} have no room for it"
            )
        with self._lock, uninterrupted():
            if request.id in self.flights:
                raise ValueError(f"there is a request {request.id!r} already")
            if any(token.id == request.id for token in self._out):
                raise ValueError(f"tokens of an earlier request {request.id!r} wait to be read: stream() gives them")
            self.flights[request.id] = flight = InFlight(request, time.perf_counter())
            self.scheduler.waiting.append(flight)

    def cancel(self, id: str) -> bool:
        """End a request: its blocks are free at once. False when it has ended by itself.

        ValueError for one unknown, or that ended so long ago that it is no longer in `finished`.
        """
        with self._lock, uninterrupted():
            if id in self.flights:
                self._end(self.flights[id], None, "cancelled")
            elif id not in self.finished:
                raise ValueError(f"there is no request {id!r}")
            return self.finished[id].finished == "cancelled"

    def step(self) -> list[Token]:
        """One pass of the model. Returns the tokens that came, with those that nobody was handed before."""
        self._advance()
        with self._lock:
            out, self._out = self._out, []
        return out

    def stream(self) -> Iterator[Token]:
        """Tokens of all requests as they come, until none is left. Who leaves it early may begin another."""
        while self.flights or self._out:
            if not self._out:
                self._advance()
            if self._out:
                yield self._out.pop(0)

    def run(self, requests: Iterable[Request]) -> dict[str, list[int]]:
        """The answer of each request, by its id. Whatever is raised, none of them stays in the engine."""
        answers: dict[str, list[int]] = {}
        others: list[Token] = []
        try:
            for request in requests:
                self.add(request)
                answers[request.id] = []
            for token in self.stream():
                if token.id not in answers:
                    others.append(token)
                elif token.token is not None and token.finished != "stop":
                    answers[token.id].append(token.token)
            return answers
        finally:
            for id in answers.keys() & self.flights.keys():
                self.cancel(id)
            self._out = others + [token for token in self._out if token.id not in answers]

    def metrics(self) -> dict[str, float]:
        """What vLLM's `/metrics` says, under the same names."""
        with self._lock:
            timings = [flight.timing for flight in self.flights.values()]
            return metrics(self.blocks, self.scheduler, self._totals.and_of(timings))

    def _advance(self) -> None:
        """One pass of the model, entered in the books as a whole or not at all."""
        me = object()
        try:
            with self._lock, uninterrupted():
                if self._stepping is not None:
                    raise RuntimeError("a step is running already")
                self._stepping = me
                self._mend()
                chunks = self.scheduler.plan()
                if not chunks:
                    return
                self.pages.rows = [self.blocks.table(chunk.flight.id).blocks for chunk in chunks]
            picked = self._pick(chunks, self._pass(chunks))
            with self._lock, uninterrupted():
                self._enter(chunks, picked)
        finally:
            if self._stepping is me:
                self._stepping = None

    def _mend(self) -> None:
        """Where an interrupt left the cache half changed, run everything again from its beginning."""
        try:
            self.cache.check_whole()
        except RuntimeError:
            for flight in reversed([*self.scheduler.running]):
                self.scheduler.preempt(flight)
            self.blocks.forget()
            self.cache.reset()

    def _pass(self, chunks: list[Chunk]) -> Tensor:
        """Logits behind each chunk, `[chunks, vocab_size]`. K and V are written, to slots that nobody reads yet."""
        lengths = tuple(chunk.start for chunk in chunks)
        for layer in self.cache.layers:
            layer.place(lengths)  # type: ignore[attr-defined]
        counts = [chunk.end - chunk.start for chunk in chunks]
        laid = torch.tensor([token for chunk in chunks for token in chunk.flight.tokens[chunk.start : chunk.end]])
        rows = laid.view(len(chunks), -1) if len(set(counts)) == 1 else laid.split(counts)
        with torch.inference_mode(), WithoutPlans(self.model.device):
            return self.model(rows, self.cache, last_only=True)[:, 0]

    def _pick(self, chunks: list[Chunk], logits: Tensor) -> list[Pick]:
        """The next token of each request whose last chunk this was, and where its draws stand then.

        What the device found is read once for all: until then nothing waits for it.
        """
        picked: list[Pick] = []
        greatest = likeliest(logits)
        finite = logits.gather(1, greatest[:, None])[:, 0].isfinite()  # where any is NaN, the greatest is
        found = torch.where(finite, greatest, -1).tolist()
        for row, (chunk, token) in enumerate(zip(chunks, found, strict=True)):
            draws, temperature = chunk.flight.generator, chunk.flight.request.temperature
            if token < 0:
                picked.append((None, draws))
                continue
            if chunk.ends and temperature:
                draws = draws.clone_state()  # a step that fails has drawn nothing
                token = int(choose(logits[row : row + 1], temperature, draws))
            picked.append((token, draws) if chunk.ends else None)
        return picked

    def _enter(self, chunks: list[Chunk], picked: list[Pick]) -> None:
        """Enter what a pass gave. Requests that were cancelled in the meantime are passed over."""
        for chunk, pick in zip(chunks, picked, strict=True):
            flight, timing = chunk.flight, chunk.flight.timing
            if self.flights.get(flight.id) is not flight:
                continue
            if pick is not None and pick[0] is None:  # nobody shall find K and V of that pass
                self._end(flight, None, "not finite")
                continue
            self.blocks.computed(flight.id, chunk.end)
            if pick is None:
                continue
            token, flight.generator = pick
            assert token is not None
            if not timing.new_tokens:
                timing.ttft = time.perf_counter() - timing.arrived
            if token in flight.request.stop:
                self._end(flight, token, "stop")
                continue
            timing.latest = time.perf_counter()
            flight.tokens.append(token)
            timing.new_tokens += 1
            if timing.new_tokens == flight.request.max_new_tokens:
                self._end(flight, token, "length")
            else:
                self._out.append(Token(flight.id, token, timing.new_tokens - 1))
        if self.history is not None:
            self.history.append(snapshot(self.blocks, self.scheduler))

    def _end(self, flight: InFlight, token: int | None, why: str) -> None:
        """A request has ended."""
        timing = flight.timing
        timing.finished = why
        if timing.new_tokens > 1:
            timing.tpot = (timing.latest - timing.arrived - timing.ttft) / (timing.new_tokens - 1)
        self._totals.add(timing)
        self.finished.pop(flight.id, None)
        self.finished[flight.id] = timing
        while len(self.finished) > self._keep:
            del self.finished[next(iter(self.finished))]
        self._out.append(Token(flight.id, token, timing.new_tokens - (why == "length"), why))
        del self.flights[flight.id]
        self.scheduler.remove(flight)
