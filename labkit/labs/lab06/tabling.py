"""06.4 and 06.6: block tables, beside what their blocks must be; what is taken, held and dropped is noted."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import isgenerator
from typing import Any, ClassVar

from labkit.cache import OutOfBlocks
from labkit.course.checks.tensors import shifted
from labkit.course.exercise import Exercise, NotYet
from labkit.labs.lab06.references import BlockAllocator, BlockTable

NAMES = ("append", "fork", "release")


class Watched(BlockAllocator):
    """An allocator that hands out blocks in no order, and notes what is done."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        for block in random.Random(shifted(num_blocks)).sample(range(num_blocks), num_blocks):
            self.free.move_to_end(block)
        self.done: list[tuple[str, int]] = []

    def take(self) -> int:
        """Noted."""
        block = super().take()
        self.done.append(("take", block))
        return block

    def hold(self, block: int) -> None:
        """Noted."""
        super().hold(block)
        self.done.append(("hold", block))

    def drop(self, block: int, *, keep: bool = False) -> bool:
        """Noted."""
        free = super().drop(block, keep=keep)
        self.done.append(("drop", block))
        return free

    def since(self, what: str, mark: int) -> list[int]:
        """The blocks of one kind of operation, from a mark on."""
        return [block for name, block in self.done[mark:] if name == what]


@dataclass
class Beside:
    """A learner's table, and what it must be. number: which of several it is, in words."""

    exercise: type[Exercise]
    table: Any
    allocator: Watched
    block_size: int
    name: str = "the table"
    blocks: list[int] = field(default_factory=list)
    seq_len: int = 0
    log: list[str] = field(default_factory=list)

    @property
    def when(self) -> str:
        """What was done with it, in words."""
        done = self.log if len(self.log) <= 6 else ["...", *self.log[-5:]]
        return f"block_size {self.block_size}, {self.name}: " + (", ".join(done) or "new")

    def read(self) -> tuple[list[int], Any]:
        """Its blocks and seq_len as it has them."""
        blocks = self.exercise.run(lambda: list(map(int, self.table.blocks)))
        seq_len = self.exercise.run(lambda: self.table.seq_len)
        if callable(seq_len):
            self.exercise.fail("seq-len-is-a-method", seen="table.seq_len is a method, not a number",
                               cause="@property is missing above it",
                               look="seq_len: an attribute or a property")  # fmt: skip
        return blocks, seq_len

    def check_methods(self) -> None:
        """It has what the blank has."""
        missing = [name for name in NAMES if not callable(getattr(self.table, name, None))]
        if missing:
            self.exercise.fail(
                "missing-method", seen=f"what came back has no method {', no '.join(missing)}",
                cause="it was removed or renamed, or it is no table", look="the names in the blank, indented alike",
            )  # fmt: skip

    def check_attributes(self) -> None:
        """It has what 06.6 and the engine read."""
        for name, want in (("allocator", self.allocator), ("block_size", self.block_size)):
            if getattr(self.table, name, None) is not want:
                self.exercise.fail(
                    "missing-attribute", seen=f"table.{name} is not what the table was made with",
                    cause="it is kept under another name, or not at all",
                    look=f"__init__: self.{name} = {name}; 06.6 and the engine read it",
                )  # fmt: skip

    def append(self, new_tokens: int) -> None:
        """Append so many tokens; compare slots, blocks and what was taken."""
        needed = -(-(self.seq_len + new_tokens) // self.block_size) - len(self.blocks)
        if needed > self.allocator.num_free:
            self.refused(new_tokens, needed)
            return
        mark, room = len(self.allocator.done), self.allocator.num_free
        refusals: list[OutOfBlocks] = []

        def append() -> Any:
            try:
                return self.table.append(new_tokens)
            except OutOfBlocks as error:
                refusals.append(error)
                raise

        try:
            got = self.exercise.run(append, told=f"append({new_tokens}); {self.when}")
        except NotYet as not_yet:
            if refusals:
                self.exercise.fail(
                    "refused-though-it-fits",
                    seen=f"{self.when}; append({new_tokens}): OutOfBlocks, {needed} blocks needed, {room} free",
                    cause="the comparison refuses what just fits, or counts blocks that are there already",
                    look="the test: more blocks than num_free are too many; as many are enough",
                )  # fmt: skip
            taken = self.allocator.since("take", mark)
            if not_yet.finding.diagnosis == "raised" and len(taken) != needed:
                self.explain_taken(
                    len(taken), needed, new_tokens, 0, f", and then {not_yet.finding.seen.split(' (')[0]}"
                )
            raise
        before = self.when
        self.log.append(f"append({new_tokens})")
        if isgenerator(got):
            self.exercise.fail("no-list", seen=f"{self.when}: a generator came back, which has done nothing yet",
                               cause="`yield` makes a function that runs when its result is looped over",
                               look="the return of append: a list")  # fmt: skip
        taken, dropped = self.allocator.since("take", mark), self.allocator.since("drop", mark)
        if room - self.allocator.num_free != needed or dropped:
            self.explain_taken(len(taken), needed, new_tokens, len(dropped))
        blocks, seq_len = self.read()
        if blocks[: len(self.blocks)] != self.blocks or Counter(blocks) != Counter(self.blocks + taken):
            self.exercise.fail(
                "blocks", seen=f"{self.when}: blocks are {blocks}; they were {self.blocks}, and {taken} were taken",
                cause="blocks that were taken are not in the table, or others are, or old ones moved",
                look="self.blocks: what was there, and behind it what was taken",
            )  # fmt: skip
        first, self.seq_len, self.blocks = self.seq_len, self.seq_len + new_tokens, blocks
        if seq_len != self.seq_len:
            self.exercise.fail(
                "seq-len", seen=f"{self.when}: seq_len is {seq_len!r}; {self.seq_len} tokens have a slot",
                cause="appends were counted, or new tokens alone, or nothing", look="append: how seq_len grows",
            )  # fmt: skip
        self.check_slots(got, first, before)

    def check_slots(self, got: Any, first: int, before: str) -> None:
        """The slots of the tokens from place `first` on."""
        size, blocks = self.block_size, self.blocks
        places = range(first, self.seq_len)
        want = [blocks[p // size] * size + p % size for p in places]
        if got is None or not hasattr(got, "__iter__"):
            self.exercise.fail(
                "no-list", seen=f"{self.when}: {'nothing' if got is None else f'a {type(got).__name__}'} came back",
                cause="the slots are not returned, or one of them only", look="the return of append: a list, one slot "
                "for each new token",
            )  # fmt: skip
        slots = self.exercise.run(lambda: list(map(int, got)))
        if slots == want:
            return
        gave = f"{before}; append({len(want)}) gave {shortly(slots)}"
        seen = f"{gave}; blocks are {blocks}, so it should give {shortly(want)}"
        new = blocks[first // size :] or blocks
        ways = (
            ("last-slot-only", want[-1:], "the last token's slot came back alone", "a slot for each new token"),
            ("all-slots", [blocks[p // size] * size + p % size for p in range(self.seq_len)],
             "the slots of all tokens came back, not of the new ones", "positions from the old seq_len on"),
            ("begins-anew", [new[min(p // size, len(new) - 1)] * size + p % size for p in range(len(want))],
             "the new tokens' places were counted from 0, as if nothing were held",
             "positions: seq_len, seq_len + 1, ..."),
            ("begins-anew", [blocks[p // size] * size + p % size for p in range(len(want))],
             "the new tokens got the slots of the first ones", "positions: seq_len, seq_len + 1, ..."),
            ("entry-for-block", list(places), "positions came back: as if blocks lay one after the other",
             "which block stands at entry position // block_size?"),
            ("block-for-slot", [blocks[p // size] for p in places], "blocks came back, not slots",
             "slot = block * block_size + place"),
            ("block-not-multiplied", [blocks[p // size] + p % size for p in places],
             "the block's number was taken for its first slot", "slot = block * block_size + place"),
            ("one-too-far", [blocks[p // size] * size + p % size for p in range(first + 1, self.seq_len)] or None,
             "positions begin one too late", "the first new token stands at the old seq_len"),
            ("last-block-for-all", [blocks[-1] * size + p % size for p in places],
             "every new token was put into the last block", "entry position // block_size, for each token"),
        )  # fmt: skip
        for diagnosis, value, cause, look in ways:
            if value is not None and slots == value:
                self.exercise.fail(diagnosis, seen=seen, cause=cause, look=look)
        self.exercise.fail(
            "slots", seen=seen, cause="a position, a block or a place is another one",
            look="slot = blocks[position // block_size] * block_size + position % block_size",
        )  # fmt: skip

    def explain_taken(self, taken: int, needed: int, new_tokens: int, dropped: int, then: str = "") -> None:
        """Name why another number of blocks was taken than is needed."""
        size, held, before = self.block_size, self.seq_len, len(self.blocks)
        seen = (f"{self.when}: blocks taken: {taken}{f', dropped: {dropped}' * bool(dropped)}; {held + new_tokens} "
                f"tokens need {needed} more beside the {before} that there were{then}")  # fmt: skip
        if taken == needed and dropped:
            self.exercise.fail("drops-in-append", seen=seen, cause="append let go of blocks",
                               look="append: nothing is let go of")  # fmt: skip
        ways = (
            ("block-too-early", (held + new_tokens) // size + 1 - before,
             "a block was taken for a token that is not there yet", "how many blocks so many tokens need: round up"),
            ("room-not-used", -(-new_tokens // size), "the room in the last block was not used",
             "how many blocks all tokens need together, less those that are there"),
            ("full-blocks-only", (held + new_tokens) // size - before, "blocks were rounded down",
             "a last block that is not full is needed too: round up"),
            ("all-taken-again", -(-(held + new_tokens) // size), "blocks for all tokens were taken again",
             "what is there already"),
            ("one-block", 1, "one block was taken, however many are needed", "a long prompt needs several at once"),
        )  # fmt: skip
        for diagnosis, count, cause, look in ways:
            if taken == max(count, 0) != needed:
                self.exercise.fail(diagnosis, seen=seen, cause=cause, look=look)
        self.exercise.fail("taken", seen=seen, cause="another number of blocks was taken than the tokens need",
                           look="(seq_len + new_tokens) / block_size, rounded up, less len(self.blocks)")  # fmt: skip

    def refused(self, new_tokens: int, needed: int) -> None:
        """Too few blocks: OutOfBlocks, and nothing changed."""
        before, free = (list(self.blocks), self.seq_len), self.allocator.num_free
        mark = len(self.allocator.done)
        case = f"{self.when}; append({new_tokens}), {needed} blocks needed, {free} free"
        try:
            self.table.append(new_tokens)
        except NotImplementedError:
            raise
        except OutOfBlocks:
            pass
        except Exception as error:
            self.exercise.fail(
                "other-error", seen=f"{case}: {type(error).__name__}, not OutOfBlocks",
                cause="it was stopped by an error that the caller does not expect",
                look="the start of append: raise OutOfBlocks when there are too few blocks",
            )  # fmt: skip
        else:
            self.exercise.fail(
                "not-refused", seen=f"{case}: done without a word", cause="an OutOfBlocks was swallowed, or blocks are "
                "not taken", look="append: it has a slot for every token, or raises",
            )  # fmt: skip
        after = self.read()
        if after != before or self.allocator.num_free != free:
            taken = free - self.allocator.num_free
            moved = f"blocks and seq_len were {before}, they are {after}"
            changed = f"{taken} blocks were taken all the same" if taken else moved
            self.exercise.fail(
                "half-done", seen=f"{case}: refused, but {changed}",
                cause="blocks were taken, or attributes changed, before it was known whether there are enough",
                look="the order in append: compare with allocator.num_free first, then take",
            )  # fmt: skip
        if given_back := self.allocator.since("take", mark):
            self.exercise.fail(
                "taken-and-given-back", seen=f"{case}: refused, but {len(given_back)} blocks were taken and given back",
                cause="what a free block held may have been of use; whoever takes it and gives it back has lost that",
                look="the order in append: compare with allocator.num_free first, then take",
            )  # fmt: skip
        self.log.append(f"append({new_tokens}) refused")

    def fork(self, name: str) -> Beside:
        """A second table."""
        mark = len(self.allocator.done)
        child = self.exercise.run(lambda: self.table.fork(), told=f"fork(); {self.when}")
        self.log.append("fork()")
        other = Beside(self.exercise, child, self.allocator, self.block_size, name, list(self.blocks), self.seq_len,
                       [f"forked from {self.name} with {self.seq_len} tokens"])  # fmt: skip
        if child is None or child is self.table:
            self.exercise.fail(
                "no-second-table", seen=f"{self.when}: {'nothing' if child is None else 'the table itself'} came back",
                cause="a fork is a table of its own", look="the return of fork",
            )  # fmt: skip
        other.check_methods()
        copied = getattr(child, "allocator", None)
        if copied is not self.allocator and isinstance(copied, type(self.allocator)):
            self.exercise.fail(
                "allocator-copied", seen=f"{self.when}: the fork's allocator is another one than its parent's",
                cause="the allocator was copied with the table, as copy.deepcopy does: two of them hand out the same "
                "blocks", look="fork: a table with self.allocator itself; only the list of blocks is its own",
            )  # fmt: skip
        other.check_attributes()
        held, taken = self.allocator.since("hold", mark), self.allocator.since("take", mark)
        if taken:
            self.exercise.fail(
                "fork-copies", seen=f"{self.when}: it took {len(taken)} blocks",
                cause="the child got blocks of its own; a fork shares them", look="fork: hold, not take",
            )  # fmt: skip
        if Counter(held) != Counter(self.blocks):
            self.exercise.fail(
                "not-held", seen=f"{self.when}: blocks are {self.blocks}, held once more were {held}",
                cause="the child's blocks are not counted, so the first table to end frees them under the other",
                look="fork: allocator.hold(block) for each block, once",
            )  # fmt: skip
        self.compare()
        other.compare()
        return other

    def release(self) -> None:
        """Let go of everything."""
        mark = len(self.allocator.done)
        self.exercise.run(lambda: self.table.release(), told=f"release(); {self.when}")
        self.log.append("release()")
        dropped = self.allocator.since("drop", mark)
        if Counter(dropped) != Counter(self.blocks):
            self.exercise.fail(
                "not-dropped", seen=f"{self.when}: blocks were {self.blocks}, dropped were {dropped}",
                cause="a block is not let go of, or twice", look="release: allocator.drop(block) for each block, once",
            )  # fmt: skip
        if dropped != self.blocks[::-1]:
            self.exercise.fail(
                "first-block-first", seen=f"{self.when}: blocks were {self.blocks}, dropped in the order {dropped}",
                cause="blocks that are dropped first are taken first, and a beginning is wanted again more often "
                "than an end", look="release: the last block first, reversed(self.blocks)",
            )  # fmt: skip
        self.blocks, self.seq_len = [], 0
        if self.read() != ([], 0):
            blocks, seq_len = self.read()
            self.exercise.fail(
                "still-there", seen=f"{self.when}: blocks are {blocks}, seq_len is {seq_len}",
                cause="the blocks are free and the table still names them: who uses it writes into another's memory"
                if blocks
                else "no block is left, and the length still counts tokens",
                look="release: no block and no token afterwards",
            )  # fmt: skip

    def compare(self) -> None:
        """Fail unless it holds what it should."""
        blocks, seq_len = self.read()
        if blocks == self.blocks and seq_len != self.seq_len:
            self.exercise.fail(
                "length-lost", seen=f"{self.when}: blocks are right, seq_len is {seq_len} and should be {self.seq_len}",
                cause="a fork did not take over the length, or two tables share one",
                look="fork: the child's seq_len is its parent's; afterwards each has its own",
            )  # fmt: skip
        if (blocks, seq_len) != (self.blocks, self.seq_len):
            self.exercise.fail(
                "changed-by-another",
                seen=f"{self.when}: blocks are {blocks} and seq_len is {seq_len}; it was not touched, and should have "
                f"{self.blocks} and {self.seq_len}",
                cause="two tables share a list: the fork got the parent's own, or it is kept on the class",
                look="list(self.blocks) makes a second list; everything that a table keeps belongs on self",
            )


def shortly(slots: list[int]) -> str:
    """A list, or its beginning."""
    return str(slots) if len(slots) <= 9 else f"[{', '.join(map(str, slots[:8]))}, ...]"


class Table(Exercise):
    """The block table."""

    id, title, minutes, difficulty = "06.4", "A table that grows", 8, 3
    needs = ("06.2", "06.3")
    reference = BlockTable
    why = (
        "How many blocks all tokens need, rounded up, less those that are there: that many are taken, after a look at "
        "num_free, so that a refusal changes nothing. A fork has a list of its own and holds every block once more."
    )
    hints = (
        "How many blocks do seq_len + new_tokens tokens need? How many are there?",
        "Compare the difference with allocator.num_free before you take anything. Then the slots of positions seq_len "
        "to seq_len + new_tokens - 1.",
        "more = -(-(self.seq_len + new_tokens) // self.block_size) - len(self.blocks)\n"
        "if more > self.allocator.num_free: raise OutOfBlocks(...)\n"
        "self.blocks += [self.allocator.take() for _ in range(more)]",
    )
    hints_for: ClassVar = {
        "half-done": "Whoever catches OutOfBlocks waits and appends again. Which lines ran before the error came?",
        "block-too-early": "16 tokens in blocks of 16 need one block, not two. What does 16 // 16 + 1 say?",
        "not-held": "Who ends first drops the blocks. What does the allocator know of the other?",
        "changed-by-another": "b = a gives one list two names. list(a) makes another.",
        "room-not-used": "After 3 tokens a block of 4 has room for one more.",
    }

    def examine(self, answer: Callable) -> None:
        """Block boundaries by hand, a fork, the end, too few blocks; then scripts on several tables in turn."""
        self.check_isolation(answer)
        for size, counts in ((4, (9, 2, 1, 1, 7, 4, 0, 1)), (1, (1, 3)), (16, (33, 15, 1, 40)), (5, (5, 5, 0, 11))):
            table = self.made(answer, Watched(40), size)
            for count in counts:
                table.append(count)
        self.too_few(answer)
        self.forks(answer)
        self.script(answer)

    def check_isolation(self, answer: Callable) -> None:
        """A new table is empty, whatever others hold."""
        try:
            answer(Watched(8), 4).append(3)
            fresh = answer(Watched(8), 4)
        except NotImplementedError:
            raise
        except Exception:  # what follows says it better
            return
        if getattr(fresh, "blocks", None) or getattr(fresh, "seq_len", 0) not in (0, None):
            self.fail("shared", seen="a new table is not empty when another one was used before it",
                      cause="blocks or the length are kept on the class, in a default argument or in a global",
                      look="__init__: everything that a table keeps belongs on self")  # fmt: skip

    def made(self, answer: Callable, allocator: Watched, size: int, name: str = "the table") -> Beside:
        """A new table."""
        table = self.run(lambda: answer(allocator, size), told=f"with an allocator and block_size {size}")
        beside = Beside(type(self), table, allocator, size, name)
        beside.check_methods()
        beside.check_attributes()
        beside.compare()
        return beside

    def too_few(self, answer: Callable) -> None:
        """Out of blocks with none left, with some, from the first token on; what fits then is taken."""
        allocator = Watched(4)
        table, other = self.made(answer, allocator, 3), self.made(answer, allocator, 3, "another table")
        table.append(13)
        table.append(7)
        other.append(4)
        table.append(3)
        table.append(2)
        table.append(1)
        other.append(2)
        other.append(1)
        table.compare()

    def forks(self, answer: Callable) -> None:
        """A fork goes its way; both end; an end that comes again; a table used again."""
        allocator = Watched(20)
        table = self.made(answer, allocator, 4, "the parent")
        table.fork("the child of an empty one").append(2)
        table.compare()
        table.append(9)
        child = table.fork("the child")
        child.append(5)
        table.compare()
        table.append(8)
        child.compare()
        table.release()
        child.compare()
        table.release()
        table.append(3)
        grandchild = child.fork("the grandchild")
        child.release()
        grandchild.append(1)
        grandchild.release()

    def script(self, answer: Callable) -> None:
        """Random operations on tables of two allocators in turn."""
        draw = random.Random(shifted(5))
        pools = [(Watched(12), 3), (Watched(30), 7)]
        tables = [self.made(answer, *pool, f"table {number}") for number, pool in enumerate(pools * 2)]
        for count in range(120):
            one = draw.choice(tables)
            what = draw.random()
            if what < 0.65:
                one.append(draw.choice((0, 1, 1, 1, 2, 3, 7, 20)))
            elif what < 0.8 and len(tables) < 12:
                tables.append(one.fork(f"table {4 + count}"))
            else:
                one.release()
            for other in tables:
                other.compare()
        for one in tables:
            one.release()
        for allocator, _ in pools:
            held = len(allocator.holders) - allocator.num_free
            if held:
                self.fail("lost", seen=f"every table ended, and {held} blocks are held still",
                          cause="a block is in nobody's table and was not dropped",
                          look="every take and hold: which drop ends it?")  # fmt: skip
