"""06.2: the slots of tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from labkit.course.checks.effort import check_stays, effort_of
from labkit.course.checks.suspects import Suspect
from labkit.course.checks.tensors import agree, shifted
from labkit.course.checks.trials import Case, compare
from labkit.course.exercise import Exercise, NotYet
from labkit.labs.lab06.references import slots_of

FORMULA = "slot = block * block_size + place: which block, and which place within it?"


def tables(rows: int, blocks: int, size: int, new: int, *, most: int = 0, seed: int = 0) -> tuple[Tensor, Tensor, int]:
    """Random rows of different lengths, and positions that they have blocks for, their last ones among them."""
    random = torch.Generator().manual_seed(shifted(seed))
    table = torch.randperm(rows * blocks + 5, generator=random)[: rows * blocks].view(rows, blocks).int() + most
    lengths = torch.randint(1, blocks + 1, (rows,), generator=random)
    lengths[-1] = blocks
    table[torch.arange(blocks) >= lengths[:, None]] = -1
    positions = (torch.rand(rows, new, generator=random) * lengths[:, None] * size).long()
    positions[:, -1] = lengths * size - 1
    return table, positions, size


class Slots(Exercise):
    """Slot arithmetic."""

    id, title, minutes, difficulty = "06.2", "Where a token lies", 4, 2
    reference = staticmethod(slots_of)
    why = (
        "positions // block_size says which entry of the row's table, positions % block_size which place in it. The "
        "table is int32, and block * block_size may be more than int32 holds: widen first."
    )
    hints = (
        "One token first: position 6, blocks of 4, table [7, 2, 5]. Which entry of the table, which place in it?",
        "block_table[positions // block_size] picks rows. Each row has to look into its own: gather(1, ...).",
        "blocks = block_table.gather(1, positions // block_size).long()\n"
        "return blocks * block_size + positions % block_size",
    )
    hints_for: ClassVar = {
        "rows-picked": "One index on a matrix picks whole rows. gather(1, index) picks within each row.",
        "overflow": "int32 ends at 2,147,483,647. Which two numbers are multiplied, and in which dtype?",
        "loops": "gather(1, index) takes an index for all rows and tokens; * and + work on all of them, too.",
        "first-row": "Every row of a batch has a table of its own.",
    }

    def examine(self, answer: Callable) -> None:
        """Several sizes, a block of one, many blocks, one new token, slots beyond int32."""
        cases = [
            Case(tables(4, 4, 7, 4)),  # square, so that an index on rows comes to a result
            Case(tables(4, 4, 7, 4, seed=6)),
            Case(tables(3, 4, 5, 6)),
            Case(tables(2, 6, 16, 3, seed=1)),
            Case(tables(2, 6, 8, 3, seed=1)),
            Case(tables(5, 3, 1, 2, seed=2)),
            Case(tables(1, 7, 3, 1, seed=3)),
            Case(tables(2, 300, 7, 40, seed=4)),
            Case(tables(2, 3, 32, 4, most=2**27, seed=5), "slots beyond int32"),
        ]
        try:
            compare(type(self), answer, slots_of, cases, suspects=suspects, what="the slots", exact=True)
        except NotYet as not_yet:
            self.explain_dtype(answer, cases[0])
            self.explain_powers(answer, not_yet)
            raise
        self.check_work(answer)

    def explain_dtype(self, answer: Callable, case: Case) -> None:
        """The slots are int32, whatever they were computed in."""
        try:
            dtype = answer(*case.args).dtype
        except Exception:  # what was found says it
            return
        if dtype == torch.int32:
            self.fail("int32-result", seen="the slots came back as int32; int64 is asked for",
                      cause="the result, or the positions before it, was turned into int32, which ends at "
                      "2,147,483,647: there may be more slots", look="every .int() and dtype= behind the table; "
                      "positions are int64 as they come")  # fmt: skip

    def explain_powers(self, answer: Callable, not_yet: NotYet) -> None:
        """Right with every block size that is a power of two, and with no other."""
        sizes = {size: self.is_right(answer, size) for size in (1, 2, 4, 8, 16, 32, 3, 5, 7, 12)}
        if all(right == (size.bit_count() == 1) for size, right in sizes.items()):
            self.fail("powers-of-two", seen=f"right with blocks of 1, 2, 4, 8, 16 and 32, and not with blocks of 3, 5, "
                      f"7 and 12: {not_yet.finding.seen}",
                      cause="this is arithmetic for powers of two, as that of shifts (<<, >>) and bit masks (&) is",
                      look="*, // and % work with any block_size")  # fmt: skip

    @staticmethod
    def is_right(answer: Callable, size: int) -> bool:
        """Whether the slots are right with blocks of this size."""
        case = tables(4, 4, size, 4, seed=6)
        try:
            return agree(answer(*case), slots_of(*case), 0.0)
        except Exception:
            return False

    def check_work(self, answer: Callable) -> None:
        """As many operations for many rows and tokens as for few."""
        sizes = ((2, 3), (20, 3), (2, 30))
        given = [tables(rows, 4, 8, new, seed=7) for rows, new in sizes]
        efforts = [effort_of(partial(self.run, partial(answer, *case))) for case in given]
        check_stays(type(self), efforts[1])
        for what, (rows, new), effort in zip(("row", "token"), sizes[1:], efforts[1:], strict=True):
            if effort.calls > efforts[0].calls:
                self.fail(
                    "loops",
                    seen=f"{effort.calls} operations for {rows} rows of {new} tokens, {efforts[0].calls} for "
                    f"{sizes[0][0]} rows of {sizes[0][1]}",
                    cause=f"a loop goes through the {what}s; on a GPU each operation has to be launched, in every step",
                    look="all rows at once: gather(1, ...), or an index for both dimensions",
                )


def suspects(block_table: Tensor, positions: Tensor, block_size: int) -> list[Suspect]:
    """What people write in place of it."""
    table = block_table.long()
    entry, place = positions // block_size, positions % block_size
    blocks = table.gather(1, entry)

    def other_entry(index: Tensor, rest: Tensor) -> list[Callable[[], Tensor] | None]:
        """With another entry of each row: as it is, where the table has it, and no further than the last."""
        last, fits = table.shape[1] - 1, bool((index < table.shape[1]).all())
        return [
            (lambda: table.gather(1, index) * block_size + rest) if fits else None,
            lambda: table.gather(1, index.clamp(max=last)) * block_size + rest,
        ]

    def by_column(index: Tensor) -> Tensor:
        """Each column of the table by itself, as gather(0, ...) reads it."""
        return table.gather(0, index) * block_size + place

    rows = bool((entry < len(table)).all())
    wide = entry.shape[1] <= table.shape[1]
    up = (positions + block_size - 1) // block_size
    floats = table.float().gather(1, entry)
    return [
        Suspect("overflow", lambda: (blocks.int() * block_size + place.int()).long(),
                "the product was made in int32, where it does not fit", ".long() before anything is multiplied",
                "right as long as slots fit into int32, negative or small beyond"),
        Suspect("float32", [lambda: (floats * block_size + place).long(),
                            lambda: (floats * block_size).long() + place],
                "the product was made in float32, which counts to 16,777,216 and rounds beyond",
                ".long() before anything is multiplied, no float on the way",
                "right as long as slots are few, rounded beyond"),
        Suspect("wrong-axis", [(lambda: by_column(entry)) if wide and rows else None,
                               (lambda: by_column(entry.clamp(max=len(table) - 1))) if wide else None],
                "the entries were looked up along dimension 0, down the rows of other requests",
                "gather(1, ...): each row its own",
                "the slots are those of other rows' blocks"),
        Suspect("rows-picked", [
                    lambda: table[entry] * block_size + place[..., None],
                    lambda: table[entry] * block_size + place if {*place.shape} == {table.shape[1]} else None,
                    lambda: table[entry]] if rows else [None] * 3, "block_table[index] picks whole rows of the table",
                "gather(1, ...), or an index for both dimensions",
                "whole rows of the table came into the result"),
        Suspect("first-row", lambda: table[0][entry] * block_size + place,
                "every row looked into the first row's table", "gather(1, ...): each row its own",
                "all rows got slots of the first row's blocks"),
        Suspect("first-rows-positions", [lambda: table[:, entry[0]] * block_size + place,
                                         lambda: table[:, entry[0]] * block_size + place[:1]],
                "every row was looked up with the first row's positions", "gather(1, ...): each row its own",
                "each row's blocks are those that the first row's tokens need"),
        Suspect("one-block-for-all", [lambda: blocks[:, :1] * block_size + place],
                "the block of a row's first new token was taken for all of them; they may lie in several",
                "an entry for each position, not one for each row",
                "all new tokens of a row got slots of one block"),
        Suspect("one-block-for-all", [lambda: blocks[:, -1:] * block_size + place],
                "the block of a row's last new token was taken for all of them; they may lie in several",
                "an entry for each position, not one for each row",
                "all new tokens of a row got slots of one block"),
        Suspect("no-table", lambda: positions.clone(), "the positions came back: the table was not used", FORMULA,
                "what came back are the positions"),
        Suspect("block-not-multiplied", lambda: blocks + place, "the block's number was taken for its first slot",
                FORMULA,
                "neighbouring blocks' slots overlap"),
        Suspect("place-missing", lambda: blocks * block_size, "the place within the block is missing", FORMULA,
                "all tokens of a block got its first slot"),
        Suspect("position-for-place", lambda: blocks * block_size + positions,
                "the whole position was added, not the place within the block", FORMULA,
                "slots grow beyond their block"),
        Suspect("entry-for-block", lambda: entry * block_size + place,
                "the entry's number was used, not the block that stands there", FORMULA,
                "rows with other blocks got the same slots"),
        Suspect("rounded-up", other_entry(up, place), "positions / block_size was rounded up; the entry is the number "
                "of whole blocks before the token", "positions // block_size rounds down",
                "tokens past the first place of a block got the next block"),
        Suspect("division-and-rest-swapped", other_entry(place, entry),
                "// and % changed places", FORMULA,
                "neighbouring tokens lie in other blocks"),
        Suspect("next-block", other_entry(entry + 1, place), "the entry is one too far",
                "positions start at 0, and so do entries",
                "each token got the slot of the token a block later"),
        Suspect("fixed-size", [
                    (lambda fixed=fixed, index=index: table.gather(1, index) * fixed + positions % fixed)
                    if bool((index < table.shape[1]).all()) else None
                    for fixed in (16, 4, 8, 32) for index in (entry, positions // fixed)],
                "a block size was written down", "block_size stands for it, in each place",
                "the slots are those of blocks of another size"),
        Suspect("multiplied-both", lambda: (blocks + place) * block_size, "the place was multiplied too", FORMULA,
                "neighbouring tokens lie a whole block apart"),
    ]  # fmt: skip
