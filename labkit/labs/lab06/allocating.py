"""06.3: the allocator, beside a simple model of what is free, held and kept."""

from __future__ import annotations

import numbers
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from labkit.cache import OutOfBlocks
from labkit.course.checks.tensors import shifted
from labkit.course.exercise import Exercise, NotYet
from labkit.labs.lab06.references import BlockAllocator

NAMES = ("num_free", "ref_count", "take", "hold", "drop")
MANY, FEW = 200_000, 64  # blocks, to compare what one operation costs
MANY_HELD, FEW_HELD = 1_000, 50  # blocks, to count what one operation looks at when nearly all are held
SLOWER = 12  # times: above what memory that is far away costs (4), below a walk through half the blocks (30)
NOISE = 15e-6  # seconds


class Counted(int):
    """A block's number that counts how often any of them is compared or hashed: once for each place that a search of a
    list, a set or a count comes past. No clock is asked."""

    looks: ClassVar[int] = 0


def counting(name: str) -> Callable[..., Any]:
    """A method of `int` that counts."""
    plain = getattr(int, name)

    def method(self: Counted, *others: Any) -> Any:
        Counted.looks += 1
        return plain(self, *others)

    return method


for _name in ("eq", "ne", "lt", "le", "gt", "ge", "hash", "add", "radd", "sub", "rsub"):
    setattr(Counted, f"__{_name}__", counting(f"__{_name}__"))


@dataclass
class Beside:
    """A learner's allocator and what is known of it. holders: of each block; before: as it was when it was last right.
    kept: free ones that may be of use, the first dropped in front; entries: all that were ever kept, in that order, but
    for those taken since. revived: blocks that were held while free. latest: what was done last, and with which block.
    again: what the script in which this is one goes through, see `kept_ones`.
    """

    exercise: type[Exercise]
    make: Callable[[int], Any]
    num_blocks: int
    holders: list[int] = field(default_factory=list)
    before: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)
    revived: set[int] = field(default_factory=set)
    log: list[str] = field(default_factory=list)
    latest: str = ""
    block: int = -1
    again: str = ""

    def __post_init__(self) -> None:
        self.allocator = self.exercise.run(lambda: self.make(self.num_blocks), told=f"with {self.num_blocks} blocks")
        missing = [name for name in NAMES if not hasattr(type(self.allocator), name) and
                   not hasattr(self.allocator, name)]  # fmt: skip
        if missing:
            self.exercise.fail(
                "missing-method", seen=f"the class has no {', no '.join(missing)}",
                cause="it was removed or renamed, or stands outside the class because of its indentation",
                look="the names in the blank, indented alike",
            )  # fmt: skip
        self.holders = [0] * self.num_blocks
        self.before = list(self.holders)
        self.compare()

    @property
    def when(self) -> str:
        """What was done, in words."""
        done = self.log if len(self.log) <= 6 else ["...", *self.log[-6:]]
        return f"{self.num_blocks} blocks; " + (", ".join(done) or "nothing done yet")

    @property
    def free(self) -> list[int]:
        """Blocks that nobody holds."""
        return [block for block, count in enumerate(self.holders) if not count]

    def take(self) -> None:
        """Take a block, or be refused when none is free."""
        if not self.free:
            self.refused(lambda: self.allocator.take(), OutOfBlocks, "take()", "took-from-none",
                         "a test for no free block is missing, or what is free was counted wrong",
                         "the start of take: raise OutOfBlocks when nothing is free")  # fmt: skip
            return
        block = self.exercise.run(self.take_one, told=f"take(); {self.when}")
        self.log.append(f"take() -> {block}")
        if isinstance(block, bool) or not isinstance(block, numbers.Integral) or not 0 <= int(block) < self.num_blocks:
            self.exercise.fail(
                "no-block", seen=f"{self.when}: that is no block's number",
                cause="something else than a block was returned, such as the pair that popitem() gives, or numbers do "
                "not begin at 0", look="the return of take: one number, 0 to num_blocks - 1",
            )  # fmt: skip
        block = int(block)
        if self.holders[block]:
            if block in self.revived:
                self.exercise.fail(
                    "hold-leaves-it-free",
                    seen=f"{self.when}: it was free and somebody came to hold it; it was handed out all the same",
                    cause="hold() counts the holder and leaves the block among the free ones",
                    look="hold: a block that is held by one is not free any more",
                )
            self.exercise.fail(
                "handed-out-twice", seen=f"{self.when}: it is held by {self.holders[block]} already",
                cause="a block stays among the free ones when it is taken, or comes back to them while it is held",
                look="take and drop: where does a block leave the free ones, when does it return?",
            )  # fmt: skip
        self.check_order(block)
        self.holders[block], self.latest, self.block = 1, "taken", block
        self.kept, self.entries = ([other for other in line if other != block] for line in (self.kept, self.entries))
        self.revived.discard(block)

    def take_one(self) -> Any:
        """take() where a block is free."""
        try:
            return self.allocator.take()
        except OutOfBlocks:
            all_kept = set(self.free) == set(self.kept)
            self.exercise.fail(
                "refused-though-free",
                seen=f"{self.when}; take(): OutOfBlocks, and nobody holds {shortly(self.free)}",
                cause="what was kept is not taken: such blocks are free, too" if all_kept else
                "what is free was counted wrong, or a block did not come back when it was dropped",
                look="take: when nothing else is free, the kept block that was dropped first" if all_kept else
                "take: what it asks before it raises OutOfBlocks",
            )  # fmt: skip

    def check_order(self, block: int) -> None:
        """What may be of use is taken last, what was dropped first before the rest."""
        if block not in self.kept or (set(self.free) == set(self.kept) and block == self.kept[0]):
            return
        if set(self.free) == set(self.kept):
            oldest = next(other for other in self.entries if other in self.kept)
            if block == oldest and self.entries.count(block) > 1:
                self.exercise.fail(
                    "stale-place",
                    seen=f"{self.when}: block {block} was kept, held again, and kept once more; block {self.kept[0]} "
                    "was dropped before that",
                    cause="the block was taken at the place that it had before it was held again: that entry is still "
                    "in the line",
                    look="hold: a free block leaves its place in the line. drop: its new place is the last",
                )
            newest = block == self.kept[-1]
            self.exercise.fail(
                "newest-kept-first" if newest else "kept-in-another-order",
                seen=f"{self.when}: all free blocks were kept, and block {self.kept[0]} was dropped first",
                cause="the block that was kept last was taken first" if newest else "another order than that of drop()",
                look="at which end take() takes, and at which end drop(block, keep=True) adds",
            )
        others = [one for one in self.free if one not in self.kept]
        if self.again == "let go" and all(one in self.entries for one in others):  # the others came at their turn
            self.exercise.fail(
                "keep-sticks",
                seen=f"{self.when}: its content was to be kept; block {others[0]} was kept earlier, and was dropped "
                "without keep since",
                cause="that a block was kept once still counts when it is dropped without keep",
                look="drop: the keep of this drop decides, not an earlier one's",
            )
        self.exercise.fail(
            "kept-taken-early",
            seen=f"{self.when}: its content was to be kept, and block {others[0]} was free with nothing of use in it",
            cause="keep makes no difference, or the wrong one: what is of no use has to be taken before",
            look="drop: at which end of the free blocks does one go that is kept, at which one that is not?",
        )

    def hold(self, block: int) -> None:
        """One holder more."""
        self.exercise.run(lambda: self.allocator.hold(block), told=f"hold({block}); {self.when}")
        self.log.append(f"hold({block})")
        self.latest, self.block = "held", block
        if not self.holders[block]:
            self.revived.add(block)
        self.kept = [other for other in self.kept if other != block]
        self.holders[block] += 1

    def drop(self, block: int, *, keep: bool) -> None:
        """One holder fewer, or be refused when there is none."""
        words = f"drop({block}{', keep=True' * keep})"
        if not self.holders[block]:
            self.refused(lambda: self.allocator.drop(block, keep=keep), ValueError, words, "freed-twice",
                         "a block that nobody holds was dropped again: freed twice, it would be handed out twice",
                         "the start of drop: raise ValueError when nobody holds the block")  # fmt: skip
            return
        got = self.exercise.run(lambda: self.allocator.drop(block, keep=keep) if keep else self.allocator.drop(block),
                                told=f"{words}; {self.when}")  # fmt: skip
        self.log.append(f"{words} -> {got}")
        self.holders[block] -= 1
        freed = not self.holders[block]
        self.latest, self.block = "freed" if freed else "still held", block
        if freed and keep:
            self.kept.append(block)
            self.entries.append(block)
        self.revived.discard(block) if freed else None
        if got is None or bool(got) != freed:
            self.exercise.fail(
                "drop-says-otherwise",
                seen=f"{self.when}: block {block} is held by {self.holders[block]} now",
                cause="nothing was returned" if got is None else "it returned something else than whether the block is "
                "free now", look="the return of drop: True when nobody holds the block now, else False",
            )  # fmt: skip

    def refused(self, step: Callable[[], Any], error: type[Exception], words: str, diagnosis: str, cause: str,
                look: str) -> None:  # fmt: skip
        """What cannot be done raises the error that was promised, and changes nothing."""
        when = self.when
        self.log.append(f"{words} (cannot be)")
        try:
            step()
        except NotImplementedError:
            raise
        except error:
            self.compare(refused=words)
            return
        except Exception as other:
            self.exercise.fail(
                "other-error", seen=f"{when}; {words}: {type(other).__name__}, not {error.__name__}",
                cause="it was stopped by an error that the caller does not expect",
                look=f"a test before anything changes: raise {error.__name__}",
            )  # fmt: skip
        self.exercise.fail(diagnosis, seen=f"{when}; {words} was done without a word", cause=cause, look=look)

    def compare(self, *, refused: str = "") -> None:
        """Fail unless num_free and every ref_count are right."""
        got = self.exercise.run(lambda: self.allocator.num_free)
        if callable(got):
            self.exercise.fail("num-free-is-a-method", seen="allocator.num_free is a method, not a number",
                               cause="@property is missing above it", look="the line above def num_free")  # fmt: skip
        counts = [self.exercise.run(lambda: self.allocator.ref_count(block)) for block in range(self.num_blocks)]  # noqa: B023
        wrong = [block for block, count in enumerate(counts) if count != self.holders[block]]
        free = len(self.free)
        if refused and (wrong or got != free):
            self.exercise.fail(
                "half-done",
                seen=f"{self.when}: refused, but it changed something: num_free is {got}, it was {free}"
                if got != free
                else f"{self.when}: refused, but ref_count({wrong[0]}) is {counts[wrong[0]]}, it was "
                f"{self.holders[wrong[0]]}",
                cause="something was changed before the test",
                look="the order: test first, then change",
            )
        if wrong:
            self.explain_count(wrong[0], counts[wrong[0]])
        self.before = list(self.holders)
        if got != free:
            left = sum(bool(self.holders[block]) for block in self.revived)
            if left and got == free + left:
                self.exercise.fail(
                    "hold-leaves-it-free",
                    seen=f"{self.when}: num_free is {got}; nobody holds {free}",
                    cause="hold() counts the holder of a free block and leaves the block among the free ones",
                    look="hold: a block that is held by one is not free any more",
                )
            if got == free + 1 and self.latest == "taken":
                self.exercise.fail(
                    "not-taken",
                    seen=f"{self.when}: num_free is {got} as before, {free} it should be",
                    cause="the block was looked at, and stays among the free ones",
                    look="take: the block leaves the free ones",
                )
            if got == free + 1 and self.latest == "still held":
                self.exercise.fail(
                    "freed-while-held",
                    seen=f"{self.when}: others hold it still, and num_free is {got}, {free} it should be",
                    cause="a block comes back to the free ones at every drop, not at its last holder's",
                    look="drop: only the last holder's frees the block",
                )
            by_holder = got == self.num_blocks - sum(self.holders) and sum(self.holders) != self.num_blocks - free
            self.exercise.fail(
                "num-free-counts-holders" if by_holder else "num-free",
                seen=f"{self.when}: num_free is {got!r}; nobody holds {free}",
                cause="holders were counted: a block with two of them is one block"
                if by_holder
                else "a block is missing among the free ones, is there though somebody holds it, or is there twice",
                look="num_free: blocks that nobody holds"
                if by_holder
                else "where a block leaves the free ones, and where it returns: at its last holder's drop",
            )

    def explain_count(self, block: int, count: Any) -> None:
        """Name what the last operation did to a block's count, which was right before it."""
        was, done = self.before[block], {"taken": "take()", "held": f"hold({self.block})"}.get(
            self.latest, f"drop({self.block})")  # fmt: skip
        seen = f"{self.when}: ref_count({block}) is {count!r}; held by {self.holders[block]}"
        if not self.log or isinstance(count, bool) or not isinstance(count, numbers.Integral):
            cause = "ref_count gives something else than the number of holders"
        elif block != self.block:
            cause = f"{done} changed another block's count"
        elif self.latest == "held":
            cause = f"hold() of a {'free ' * (was == 0)}block made {int(count)} of {was}: it adds one holder"
        elif self.latest == "taken":
            cause = f"after take() it is {int(count)}: whoever takes a block is its one holder"
        else:
            cause = f"drop() made {int(count)} of {was}: it takes one holder off"
        self.exercise.fail("ref-count", seen=seen, cause=cause, look="take: 1. hold: one more. drop: one fewer")


def shortly(blocks: list[int]) -> str:
    """A few blocks, and how many more."""
    more = len(blocks) - 4
    return f"block{'s' * (len(blocks) > 1)} {', '.join(map(str, blocks[:4]))}" + f" and {more} more" * (more > 0)


class Allocate(Exercise):
    """The allocator."""

    id, title, minutes, difficulty = "06.3", "An allocator of blocks", 8, 3
    reference = BlockAllocator
    why = (
        "A count per block, and the free ones in an OrderedDict: it takes from one end, adds at either, and finds one "
        "in the middle, without looking at the others. Tests come before changes, so a refusal leaves all as it was."
    )
    hints = (
        "Two things to know: how many hold a block, and which blocks are free in which order.",
        "self.free = OrderedDict.fromkeys(range(num_blocks)); take() pops at the front; drop adds at the front, or, "
        "with keep, at the end.",
        "drop: if not self.holders[block]: raise ValueError\nself.holders[block] -= 1\nif self.holders[block]: return "
        "False\nself.free[block] = None\nself.free.move_to_end(block, last=keep)\nreturn True",
    )
    hints_for: ClassVar = {
        "freed-twice": "What does ref_count say of a block that was dropped by all? drop has to ask it.",
        "hold-leaves-it-free": "hold() of a free block takes it out of the free ones: pop(block, None).",
        "not-constant": "list.pop(0), list.remove and `in` on a list look at every entry; so do min, sum and sorted. "
        "next(iter(d)) of a plain dict passes every place that was emptied; an OrderedDict's popitem does not.",
        "kept-taken-early": "Free blocks stand in a line. take() takes in front: who may stand there, who at the end?",
        "shared": "A list written below `class` is one for all instances. In __init__: self.free = ...",
        "newest-kept-first": "take() takes where it is first's turn: popitem(last=False).",
    }

    def examine(self, answer: Callable) -> None:
        """By hand what goes wrong most, then long scripts on several in turn, then the time of each operation."""
        self.check_isolation(answer)
        for num_blocks in (3, 1):
            self.by_hand(answer, num_blocks)
        for again in ("", "kept", "let go"):
            self.kept_ones(answer, again)
        self.script(answer, (6,), seed=1)
        try:
            self.script(answer, (4, 4, 9, 1), seed=2)
        except NotYet as not_yet:
            self.alone(answer, not_yet)
            raise
        self.count(answer)
        self.time(answer)

    def check_isolation(self, answer: Callable) -> None:
        """An allocator has as many free blocks as before, whatever others are made and give away."""
        try:
            one = answer(4)
            before = [one.num_free, answer(2).num_free]
            answer(4).take()
            after = [one.num_free]
            answer(max(before) + 1)
            after.append(answer(2).num_free)
        except NotImplementedError:
            raise
        except Exception:  # what follows says it better
            return
        if not callable(after[0]) and after != before:
            self.fail(
                "shared",
                seen="an allocator has another number of free blocks after others of its class were made and used",
                cause="free blocks or counts are kept on the class, in a default argument or in a global",
                look="__init__: everything that an allocator keeps belongs on self",
            )

    def by_hand(self, answer: Callable, num_blocks: int) -> None:
        """Take all, share one, give back, give back too often."""
        beside = Beside(type(self), answer, num_blocks)
        for _ in range(num_blocks + 1):
            beside.take()
            beside.compare()
        block = num_blocks - 1
        beside.hold(block)
        beside.compare()
        for _ in range(3):
            beside.drop(block, keep=False)
            beside.compare()
        beside.hold(block)  # free, and wanted again
        beside.compare()
        beside.take()
        beside.compare()
        beside.drop(block, keep=True)
        beside.drop(block, keep=True)
        beside.compare()

    def kept_ones(self, answer: Callable, again: str) -> None:
        """Kept blocks are taken last, the first dropped first. again: "kept" where one is held once more and kept once
        more, so that it loses its place; "let go" where it is dropped without keep then."""
        beside = Beside(type(self), answer, 6, again=again)
        for _ in range(5):
            beside.take()
            beside.compare()
        first, second, third, fourth, fifth = (block for block, count in enumerate(beside.holders) if count)
        for block, keep in ((second, True), (fourth, True), (first, False), (third, True), (fifth, False)):
            beside.drop(block, keep=keep)
            beside.compare()
        if again == "let go":  # where only kept ones are free, one that never was goes before them
            for _ in range(3):
                beside.take()
                beside.compare()
            beside.drop(first, keep=False)
            beside.take()
            beside.compare()
        if again:
            beside.hold(second)
            beside.compare()
            beside.drop(second, keep=again == "kept")
            beside.compare()
        while beside.free:
            beside.take()
            beside.compare()
        beside.take()

    def script(self, answer: Callable, sizes: tuple[int, ...], *, seed: int) -> None:
        """Random operations on several allocators in turn."""
        draw, all_of_them = random.Random(shifted(seed)), [Beside(type(self), answer, size) for size in sizes]
        for _ in range(150 * len(sizes)):
            one = draw.choice(all_of_them)
            self.step(one, draw)
            one.compare()
        for one in all_of_them:
            one.compare()

    @staticmethod
    def step(one: Beside, draw: random.Random) -> None:
        """A random operation."""
        what, block = draw.random(), draw.randrange(one.num_blocks)
        if what < 0.4:
            one.take()
        elif what < 0.6 and (one.holders[block] or block in one.kept):
            one.hold(block)
        else:
            one.drop(block, keep=draw.random() < 0.5)

    def alone(self, answer: Callable, not_yet: NotYet) -> None:
        """Fail with what is due to other instances: each size alone is right."""
        try:
            for size in (4, 9, 1):
                self.script(answer, (size,), seed=3)
        except NotYet:
            return
        self.fail(
            "shared", seen=f"one allocator alone is right; several in turn: {not_yet.finding.seen}",
            cause="something is kept on the class, in a default argument or in a global, not on the instance",
            look="__init__: everything that an allocator keeps belongs on self",
        )  # fmt: skip

    def count(self, answer: Callable) -> None:
        """With nearly all blocks held, by two each: how many numbers each operation looks at."""
        few, many = (self.looks(answer, num_blocks) for num_blocks in (FEW_HELD, MANY_HELD))
        name = max(many, key=lambda one: many[one] - 4 * few[one])
        if many[name] > 4 * few[name] + 64:
            self.fail(
                "not-constant",
                seen=f"{name} looks at {many[name]:,} blocks' numbers where nearly all of {MANY_HELD:,} are held, "
                f"and at {few[name]} of {FEW_HELD}",
                cause="it goes through all that are held: `in`, count() or remove() of a list, a set made of one",
                look=f"{name}: what does it go through? ref_count is one number for each block",
            )

    def looks(self, answer: Callable, num_blocks: int) -> dict[str, int]:
        """Of each operation, the least of several calls: what one of them puts in order for others is theirs, too."""
        allocator = self.run(lambda: answer(num_blocks))
        taken = [self.run(allocator.take) for _ in range(num_blocks - 8)]
        for block in taken:
            self.run(partial(allocator.hold, Counted(block)))
        found: dict[str, int] = {}

        def counted(name: str, calls: list[Callable[[], Any]]) -> None:
            for call in calls:
                before = Counted.looks
                self.run(call)
                found[name] = min(found.get(name, 10**9), Counted.looks - before)

        middle = [Counted(block) for block in taken[len(taken) // 2 :][:4]]
        counted("num_free", [lambda: allocator.num_free] * 4)
        counted("ref_count()", [partial(allocator.ref_count, block) for block in middle])
        counted("hold()", [partial(allocator.hold, block) for block in middle])
        counted("drop()", [partial(allocator.drop, block) for block in middle])
        for block in middle:
            self.run(partial(allocator.drop, block))
        counted("the last drop()", [partial(allocator.drop, block) for block in middle])
        counted("hold() of a free block", [partial(allocator.hold, block) for block in middle])
        counted("take()", [allocator.take] * 4)
        return found

    def time(self, answer: Callable) -> None:
        """Every operation takes as long with many blocks as with few; the first that does not ends it."""
        few: dict[str, float] = {}
        for name, took in self.seconds(answer, FEW):
            few[name] = min(few.get(name, took), took)
        for name, took in self.seconds(answer, MANY):
            if took <= SLOWER * few[name] + NOISE:
                continue
            walks = ", when" in name
            self.fail(
                "not-constant",
                seen=f"{name} takes over {SLOWER} times as long with {MANY:,} blocks as with {FEW}"
                + "; the first ones did not" * walks,
                cause="it walks over blocks that are held until it finds a free one: a search from the first on, or "
                "next(iter(d)) of a plain dict or set, which passes each place that was emptied" if walks else
                "it looks at all blocks: list.pop(0), remove or `in` on a list, a sum, a search",
                look=f"{name.rstrip(',')}: what does it go through?",
            )  # fmt: skip

    def seconds(self, answer: Callable, num_blocks: int) -> Iterator[tuple[str, float]]:
        """Of one call of each operation, the best of several: what others do on the machine hardly counts."""
        allocator = self.run(lambda: answer(num_blocks))

        def best(name: str, calls: Iterable[Callable[[], Any]]) -> tuple[str, float]:
            times = []
            for call in calls:
                start = time.thread_time()
                self.run(call)
                times.append(time.thread_time() - start)
            return name, min(times)

        def taking(name: str) -> tuple[str, float]:
            return best(name, [lambda: held.append(allocator.take())] * 6)

        def each(name: str, step: Callable[[int], Any], blocks: list[int]) -> Iterator[tuple[str, float]]:
            for start in range(0, len(blocks), 4096):
                yield best(name, [partial(step, block) for block in blocks[start : start + 6]])
                rest = blocks[start + 6 : start + 4096]
                self.run(lambda: [step(block) for block in rest])  # noqa: B023

        held: list[int] = []
        yield taking("take()")
        held += [self.run(allocator.take) for _ in range(num_blocks // 50)]
        yield taking("take(), when some are taken,")
        held += [self.run(allocator.take) for _ in range(num_blocks // 10 - len(held))]
        yield taking("take(), when a tenth is taken,")
        yield best("num_free", [lambda: allocator.num_free] * 6)
        for block in held:
            self.run(lambda: allocator.drop(block, keep=True))  # noqa: B023
        middle = held[len(held) // 2 :][:6]
        yield best("ref_count()", [lambda: allocator.ref_count(middle[0])] * 6)
        yield best("hold() of a free block", [partial(allocator.hold, block) for block in middle])
        yield best("drop()", [partial(allocator.drop, block) for block in middle])
        yield best("hold() of a free block that was not kept", [partial(allocator.hold, block) for block in middle])
        held = list(middle)
        yield taking("take() behind blocks that were let go")
        take, hold = (lambda _: allocator.take()), allocator.hold
        yield from each("take(), when more and more are taken,", take, list(range(num_blocks - len(held))))
        half, drop, keep = list(range(num_blocks // 2)), allocator.drop, partial(allocator.drop, keep=True)
        yield from each("drop()", drop, half)
        for place in (len(half) // 2, 0, len(half) - 6):
            yield best("hold() of a free block", [partial(hold, block) for block in half[place : place + 6]])
            for block in half[place : place + 6]:
                self.run(partial(drop, block))
        yield from each("hold() of a free block", hold, half)
        yield from each("drop()", keep, half)
        # One block is free and not kept, then one is free at all: each a little behind the one before, where the finger
        # of set.pop() finds it and a search in Python is slow.
        far = [num_blocks // 2 + place * (num_blocks // 64) for place in range(6)]
        yield best("take(), when one is free beside those that were kept,", self.turns(allocator, far, keep=False))
        yield from each("hold() of a free block", hold, half)
        yield best("take(), when one is free,", self.turns(allocator, far, keep=True))

    @staticmethod
    def turns(allocator: Any, blocks: list[int], *, keep: bool) -> Iterator[Callable[[], Any]]:
        """A take() for each block, which is let go of just before."""
        for block in blocks:
            allocator.drop(block, keep=keep)
            yield allocator.take
