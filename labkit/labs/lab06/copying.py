"""06.6: copy on write, beside a second world of tables where the reference does it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, ClassVar

from labkit.cache import OutOfBlocks
from labkit.course.checks.tensors import shifted
from labkit.course.exercise import Exercise
from labkit.labs.lab06.references import BlockTable, copy_on_write
from labkit.labs.lab06.tabling import Watched


class World:
    """Tables over one allocator."""

    def __init__(self, num_blocks: int, size: int) -> None:
        self.allocator, self.size = Watched(num_blocks), size
        self.tables = [BlockTable(self.allocator, size)]

    def state(self) -> list[Any]:
        """Each table's blocks and length, each block's holders."""
        return [(list(table.blocks), table.seq_len) for table in self.tables] + [list(self.allocator.holders)]


class CopyOnWrite(Exercise):
    """Copy on write."""

    id, title, minutes, difficulty = "06.6", "Copy on write", 5, 3
    needs = ("06.4",)
    reference = staticmethod(copy_on_write)
    why = (
        "A copy is due only where the next token goes into a block that is begun and held by others. The new block is "
        "taken first, so that a refusal changes nothing; the shared one has one holder fewer then."
    )
    hints = (
        "When does the next token go into a block that is there already? What tells whether others hold it?",
        "seq_len % block_size == 0: a block of its own will be taken. ref_count(block) == 1: nobody else.",
        "own = table.allocator.take()\nshared, table.blocks[-1] = table.blocks[-1], own\ntable.allocator.drop(shared)\n"
        "return [(shared, own)]",
    )
    hints_for: ClassVar = {
        "not-released": "The table names its own block now. Who still counts it among the holders of the shared one?",
        "copies-full": "After 8 tokens in blocks of 4, where does token 9 go?",
        "no-copy": "ref_count says how many hold a block: two tables after a fork.",
        "copies-own": "A block that one table holds can be written by it.",
    }

    def examine(self, answer: Callable) -> None:
        """Each case by hand, then scripts of forks, appends and ends."""
        for size, tokens in ((4, 0), (4, 8), (4, 6), (4, 1), (3, 5), (1, 2), (7, 6)):
            for forks in (0, 1, 2):
                self.forked(answer, size, tokens, forks)
        self.none_free(answer)
        for seed, size in enumerate((4, 3, 1, 5)):
            self.script(answer, size, seed)

    def forked(self, answer: Callable, size: int, tokens: int, forks: int) -> None:
        """A table of so many tokens and its forks, each of which goes on."""
        worlds = World(20, size), World(20, size)
        for world in worlds:
            world.tables[0].append(tokens)
            world.tables += [world.tables[0].fork() for _ in range(forks)]
        for place in reversed(range(forks + 1)):
            self.both(answer, worlds, place)
            for world in worlds:
                world.tables[place].append(1)

    def none_free(self, answer: Callable) -> None:
        """A copy is due and no block is free; none is due and no block is free."""
        for forks, tokens in ((1, 10), (0, 10), (1, 12)):
            worlds = World(3, 4), World(3, 4)
            for world in worlds:
                world.tables[0].append(tokens)
                world.tables += [world.tables[0].fork() for _ in range(forks)]
            self.both(answer, worlds, 0)

    def script(self, answer: Callable, size: int, seed: int) -> None:
        """Random forks, appends and ends in both worlds."""
        draw, worlds = random.Random(shifted(seed)), (World(24, size), World(24, size))
        for _ in range(80):
            place, what, count = draw.randrange(len(worlds[0].tables)), draw.random(), draw.choice((1, 1, 2, 5))
            if what < 0.6:
                if self.both(answer, worlds, place) and worlds[0].allocator.num_free >= 5:
                    for world in worlds:
                        world.tables[place].append(count)
                continue
            for world in worlds:
                if what < 0.75 and len(world.tables) < 8:
                    world.tables.append(world.tables[place].fork())
                elif what > 0.85:
                    world.tables[place].release()

    def both(self, answer: Callable, worlds: tuple[World, World], place: int) -> bool:
        """The same table in both worlds gets ready for its next token; whether it could."""
        right, mine = worlds
        table, before = mine.tables[place], mine.state()
        holders = mine.allocator.ref_count(table.blocks[-1]) if table.blocks else 0
        case = (f"block_size {mine.size}, {table.seq_len} tokens in blocks {table.blocks}, the last one held by "
                f"{holders}, {mine.allocator.num_free} free")  # fmt: skip
        try:
            want = copy_on_write(right.tables[place])
        except OutOfBlocks:
            self.refused(answer, mine, table, case)
            return False
        if not table.blocks:
            try:
                got = answer(table)
            except IndexError as error:
                self.fail("empty-table", seen=f"{case}: {error}", cause="a table without a token has no last block",
                          look="the first question: does the next token open a block of its own?")  # fmt: skip
        else:
            got = self.run(lambda: self.unrefused(answer, table, want, case), told=case)
        self.check_copies(answer, got, want, mine, table, case)
        self.check_state(right, mine, place, before, case)
        return True

    def unrefused(self, answer: Callable, table: BlockTable, want: list[tuple[int, int]], case: str) -> Any:
        """The answer's copies, where nothing has to be refused."""
        try:
            return answer(table)
        except OutOfBlocks as error:
            if want:
                raise
            self.fail("refused-needlessly", seen=f"{case}: OutOfBlocks ({error}), and nothing is to be copied",
                      cause="a free block was asked for before it was known whether one is needed",
                      look="the order of the questions: does the next token open a block, do others hold the last one, "
                      "and only then take()")  # fmt: skip

    def refused(self, answer: Callable, mine: World, table: BlockTable, case: str) -> None:
        """No block is free: OutOfBlocks, and nothing changed."""
        before = mine.state()
        try:
            answer(table)
        except NotImplementedError:
            raise
        except OutOfBlocks:
            pass
        except Exception as error:
            self.fail("other-error", seen=f"{case}: {type(error).__name__}, not OutOfBlocks",
                      cause="it was stopped by an error that the caller does not expect",
                      look="allocator.take() raises OutOfBlocks by itself")  # fmt: skip
        else:
            self.fail("not-refused", seen=f"{case}: done without a word", cause="no copy is made, or the error was "
                      "swallowed", look="allocator.take() raises OutOfBlocks; let it through")  # fmt: skip
        if mine.state() != before:
            self.fail("half-done", seen=f"{case}: refused, but the table or its holders changed",
                      cause="the shared block was let go of before there was another",
                      look="the order: take first, then change the table, then drop")  # fmt: skip

    def explain_question(self, answer: Callable, seen: str) -> None:
        """Name another question by which the answer copies or does not, for all tables of a few sizes."""
        places = [(size, tokens) for size in (3, 4, 5, 7) for tokens in range(1, 3 * size)]
        alone, shared, thrice = ([self.copies(answer, size, tokens, holders) for size, tokens in places]
                                 for holders in (1, 2, 3))  # fmt: skip
        if None in alone + shared + thrice:
            return

        def due(shift: int = 0, fixed: int = 0) -> list[bool]:
            return [(tokens + shift) % (fixed or size) != 0 for size, tokens in places]

        right, asked = due(), "the first question: table.seq_len % table.block_size"
        if shared == thrice:
            for shift, words in ((1, "seq_len + 1"), (-1, "seq_len - 1")):
                both = [a and b for a, b in zip(right, due(shift), strict=True)]
                if shared in (due(shift), both):
                    self.fail("question-off-by-one", seen=seen,
                              cause=f"whether the next token opens a block was asked of {words}: it is written to "
                              "position seq_len", look=asked)  # fmt: skip
            for fixed in (16, 4, 8):
                if shared == due(fixed=fixed):
                    self.fail("fixed-size", seen=seen, cause=f"the block size {fixed} was written down",
                              look="table.block_size")  # fmt: skip
        if not any(shared) and thrice == right:
            self.fail("no-copy", seen=f"{seen}; with three holders a copy was made",
                      cause="a block was taken for shared only when three or more hold it: two are enough",
                      look="ref_count of the last block: 1 means this table alone")  # fmt: skip
        if not any(shared + thrice):
            self.fail("no-copy", seen=f"{seen}, and so in {len(places)} tables of several sizes whose last block two "
                      "or three hold", cause="that others hold the last block was not seen",
                      look="ref_count of the last block")  # fmt: skip

    @staticmethod
    def copies(answer: Callable, size: int, tokens: int, holders: int) -> bool | None:
        """Whether the answer copies in a table of so many tokens; None where it stops or returns something else."""
        world = World(40, size)
        world.tables[0].append(tokens)
        world.tables += [world.tables[0].fork() for _ in range(holders - 1)]
        try:
            return len(answer(world.tables[0])) > 0
        except Exception:
            return None

    def check_copies(self, answer: Callable, got: Any, want: list[tuple[int, int]], mine: World, table: BlockTable,
                     case: str) -> None:  # fmt: skip
        """What is to be copied."""
        if isinstance(got, tuple) and len(got) == 2 and all(isinstance(x, int) for x in got):
            self.fail("not-a-list", seen=f"{case}: {got} came back, a pair", cause="the pair is not in a list",
                      look="the return: a list of pairs, with one or none in it")  # fmt: skip
        if not isinstance(got, (list, tuple)):
            self.fail("not-a-list", seen=f"{case}: {'nothing' if got is None else f'a {type(got).__name__}'} came back",
                      cause="no list was returned on the path that was taken",
                      look="the return: a list of pairs, empty when nothing is to be copied")  # fmt: skip
        pairs = [tuple(pair) if isinstance(pair, (list, tuple)) else pair for pair in got]
        if bool(pairs) == bool(want) and (not pairs or (len(pairs) == 1 and pairs[0] == want[0])):
            return
        seen = f"{case}: {pairs} came back"
        if bool(want) != bool(pairs):
            self.explain_question(answer, seen + ("; the next token would be written into a block that others read"
                                                  if want else "; no copy is due"))  # fmt: skip
        if want and not pairs:
            self.fail("no-copy", seen=f"{seen}; the next token would be written into a block that others read",
                      cause="it was thought to open a block of its own, or that others hold the last block was not "
                      "seen", look="seq_len % block_size, and ref_count of the last block")  # fmt: skip
        if not want and table.seq_len % mine.size == 0:
            self.fail("copies-full", seen=f"{seen}; the next token opens a block of its own",
                      cause="a full block, or none, was copied though nothing is written into it",
                      look="the first question: table.seq_len % table.block_size")  # fmt: skip
        if not want:
            self.fail("copies-own", seen=f"{seen}; nobody else holds it", cause="a block was copied that this table "
                      "can write", look="ref_count(block) == 1: only this table")  # fmt: skip
        if len(pairs) == 1 and pairs[0] == want[0][::-1]:
            self.fail("direction", seen=f"{seen}: from the new block to the shared one",
                      cause="the pair is turned round", look="(from, to): the shared block first")  # fmt: skip
        if len(pairs) > 1:
            self.fail("copies-all", seen=f"{seen}; only the last block is written",
                      cause="full blocks were copied too", look="one pair: the last block")  # fmt: skip
        self.fail("other-pair", seen=f"{seen}; {want} is due", cause="another block was copied, or into another one",
                  look="from the table's last block to the one that was taken")  # fmt: skip

    def check_state(self, right: World, mine: World, place: int, before: list[Any], case: str) -> None:
        """Tables and holders afterwards."""
        want, got = right.state(), mine.state()
        if want == got:
            return
        if got[:-1] != want[:-1]:
            changed = [i for i, (a, b) in enumerate(zip(got[:-1], want[:-1], strict=True)) if a != b]
            if changed == [place] and got[place] == before[place]:
                self.fail("not-swapped", seen=f"{case}: the table still has {got[place][0]}",
                          cause="the new block was not put into the table", look="table.blocks[-1]")  # fmt: skip
            if changed == [place] and got[place] == ([*before[place][0], got[place][0][-1]], before[place][1]) and (
                    want[place] == before[place]):  # fmt: skip
                self.fail("taken-early", seen=f"{case}: the table has {got[place][0]} now, one block more",
                          cause="the block of the next token was taken already; append takes it when the token comes",
                          look="where no copy is due the table stays as it is: return []")  # fmt: skip
            if changed == [place] and got[place] == ([*before[place][0], want[place][0][-1]], before[place][1]):
                self.fail("put-behind", seen=f"{case}: the table has {got[place][0]} now, and should have "
                          f"{want[place][0]}", cause="the new block was put behind the shared one, not in its place",
                          look="table.blocks[-1] = the new block")  # fmt: skip
            self.fail("other-table", seen=f"{case}: table {changed[0]} is {got[changed[0]]} now, and should be "
                      f"{want[changed[0]]}",
                      cause="another place of the table was changed, seq_len, or another table",
                      look="table.blocks[-1], and nothing else")  # fmt: skip
        block = next(i for i, (a, b) in enumerate(zip(got[-1], want[-1], strict=True)) if a != b)
        more = got[-1][block] > want[-1][block]
        self.fail(
            "not-released" if more else "released-too-often",
            seen=f"{case}: block {block} is held by {got[-1][block]} now; tables that have it: {want[-1][block]}",
            cause="the shared block was not let go of, or one was taken that nobody has" if more else
            "a block was let go of that the tables still have",
            look="allocator.drop(the shared block), once, and take() only when a copy is due",
        )  # fmt: skip
