"""06.8: the kernel, run by Triton's interpreter; what it reads is noted."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from labkit.course.checks.attention import neighbours
from labkit.course.checks.suspects import Suspect, recognise
from labkit.course.checks.tensors import agree, budget, first_place
from labkit.course.exercise import Exercise, NotYet
from labkit.labs.lab06.attending import Arguments, batch
from labkit.labs.lab06.launch import Memory, Stray, available, launch
from labkit.labs.lab06.references import paged_attention, paged_decode

Entry = Callable[..., int]  # of row, start, blocks_per_row, BLOCK_SIZE, query head, the row's length, rows
Here = Callable[[int, Tensor, int, int], Tensor]
LOAD = "the load: table_ptr + row * blocks_per_row + which block of the row"
WITH_LOAD = "`tl.load(...)` around the address gives the number that stands there"
MASK = "the mask: the token in place p of this block stands at position start + p"


def entry(row: int, start: int, wide: int, size: int, *_: int) -> int:
    """Which number of the table names the block of the tokens from `start` on."""
    return row * wide + start // size


def here(start: int, place: Tensor, length: int, size: int) -> Tensor:
    """Which slots of the block hold tokens."""
    return start + place < length


def twin(arguments: Arguments, at: Entry = entry, mask: Here = here, *, table: bool = True,
         heads: Callable[[int, int], Tensor] = neighbours) -> Tensor | None:  # fmt: skip
    """What the kernel gives with another load, mask or KV `heads`, in float64; NaN where it reads no slot
    of a row, None when it reads what is not there."""
    q, keys, values, block_table, lengths = arguments
    size, wide, entries = keys.shape[1], block_table.shape[1], block_table.flatten()
    place, out = torch.arange(size), torch.empty_like(q, dtype=torch.float64)
    kv_heads = heads(q.shape[1], keys.shape[2]).tolist()
    for row, length in enumerate(lengths.tolist()):
        for head, kv_head in enumerate(kv_heads):
            slots = []
            for start in range(0, length, size):
                where = at(row, start, wide, size, head, length, len(q))
                if table and not 0 <= where < len(entries):
                    return None
                block = int(entries[where]) if table else where
                slots.append(block * size + place[mask(start, place, length, size)])
            chosen = torch.cat(slots)
            if len(chosen) and (int(chosen.min()) < 0 or int(chosen.max()) >= keys.shape[0] * size):
                return None
            k, v = (x[:, :, kv_head].double().flatten(0, 1)[chosen] for x in (keys, values))
            weights = torch.softmax(k @ q[row, head].double() / q.shape[2] ** 0.5, dim=0)
            out[row, head] = weights @ v if len(chosen) else float("nan")
    return out


OTHER_ENTRIES: tuple[tuple[str, Entry, str], ...] = (
    ("first-row", lambda row, start, wide, size, *_: start // size, "every row read the first row's entries"),
    ("row-not-multiplied", lambda row, start, wide, size, *_: row + start // size,
     "the row's number was added as it is; a row begins blocks_per_row entries after the one before"),
    ("entry-not-divided", lambda row, start, wide, size, *_: row * wide + start,
     "the first token's position was taken for the entry's number"),
    ("always-first-block", lambda row, start, wide, size, *_: row * wide, "every round read the row's first block"),
    ("next-block", lambda row, start, wide, size, *_: row * wide + start // size + 1, "the entry is one too far"),
    ("row-times-block-size", lambda row, start, wide, size, *_: row * size + start // size,
     "the row was multiplied by BLOCK_SIZE; a row of the table has blocks_per_row entries"),
    ("head-for-row", lambda row, start, wide, size, head, *_: head * wide + start // size,
     "the query head was taken for the row; all heads of a row have one table"),
    ("own-row-length", lambda row, start, wide, size, head, length, rows: row * -(-length // size) + start // size,
     "the row was multiplied by the blocks that it needs itself; each row of the table has blocks_per_row entries, "
     "padding too"),
    ("by-columns", lambda row, start, wide, size, head, length, rows: row + start // size * rows,
     "the table was read down its columns; it lies row after row"),
)  # fmt: skip
OTHER_MASKS: tuple[tuple[str, Here, str], ...] = (
    ("no-mask", lambda start, place, length, size: place >= 0, "every slot of a block was taken for a token"),
    ("mask-by-place", lambda start, place, length, size: place < length,
     "the place in the block was compared with the length of the whole row"),
    ("one-too-many", lambda start, place, length, size: start + place <= length,
     "the slot behind the last token was read: `<=` stands for `<`"),
    ("newest-left-out", lambda start, place, length, size: start + place < max(length - 1, 1),
     "the newest token was not read"),
    ("rest-of-length", lambda start, place, length, size: place < length % size,
     "only as many slots of each block were read as the last one has tokens"),
    ("rest-of-length", lambda start, place, length, size: place < (length - 1) % size + 1,
     "only as many slots of each block were read as the last one has tokens"),
    ("full-last-block", lambda start, place, length, size: (place < length % size) | (start + size < length),
     "where BLOCK_SIZE divides the length the last block was left out: the remainder is 0 there, and the block full"),
    ("from-the-end", lambda start, place, length, size: start + size - 1 - place < length,
     "the places of a block were counted from its end: its first slots are hidden in place of its last"),
)  # fmt: skip


class PagedDecode(Exercise):
    """The kernel."""

    id, title, minutes, difficulty = "06.8", "A kernel that reads by table", 7, 4
    needs = ("06.5",)
    reference = staticmethod(paged_decode)
    why = (
        "The table lies row after row, so the block of token `start` is entry row * blocks_per_row + start // "
        "BLOCK_SIZE. Place p of it holds token start + p, which is there if it is below the row's length."
    )
    hints = (
        "block is one number: entry start // BLOCK_SIZE of this row's part of the table. here has BLOCK_SIZE of them.",
        "A row of the table has blocks_per_row entries, so row's part begins at row * blocks_per_row.",
        "block = tl.load(table_ptr + row * blocks_per_row + start // BLOCK_SIZE)\nhere = start + place < length",
    )
    hints_for: ClassVar = {
        "first-row": "Two rows, two tables: where does the second begin in memory?",
        "entry-not-divided": "start counts tokens. How many blocks come before token `start`?",
        "address-for-block": "A pointer plus a number is a pointer. What reads the number that it points at?",
        "mask-by-place": "In the second block, place 0 is token BLOCK_SIZE.",
        "no-mask": "A row of 5 tokens in blocks of 4: which places of its second block hold tokens?",
    }

    def examine(self, answer: Callable) -> None:
        """Rows of several lengths, grouped heads, several block sizes; low scores; NaN in empty slots; bfloat16."""
        if not available():
            self.fail("no-triton", seen="Triton is not installed here, so no kernel can be run",
                      cause="it has no build for this system",
                      look="lab.solution('06.8') shows the two lines")  # fmt: skip
        cases = [
            batch([6, 1, 8], 4, 2, 4, dtype=torch.float32),
            batch([5, 6], 2, 2, 2, head_dim=16, padding=0, seed=4, dtype=torch.float32),
            batch([9, 19], 3, 1, 16, head_dim=4, padding=5, seed=8, dtype=torch.float32),
        ]
        self.look_for_blanks(answer, cases[0])
        for case in cases[1:]:
            self.compare(answer, case)
        low = [x.abs() * size for x, size in zip(cases[1][:2], (1.0, -3e4), strict=True)]
        self.compare(answer, (*low, *cases[1][2:]), ", scores near -100,000")  # type: ignore[arg-type]
        q, keys, values, table, lengths = batch([3, 6], 2, 1, 4, padding=2, seed=11, dtype=torch.float32)
        empty = torch.ones(keys.shape[:2], dtype=torch.bool)
        for row, length in enumerate(lengths.tolist()):
            for place in range(length):
                empty[table[row, place // 4], place % 4] = False
        stale = [x.masked_fill(empty[..., None, None], float("nan")) for x in (keys, values)]
        self.compare(answer, (q, stale[0], stale[1], table, lengths), ", NaN in slots that hold no token")
        self.compare(answer, tuple(x.bfloat16() if x.is_floating_point() else x for x in cases[0]))  # type: ignore[arg-type]

    def look_for_blanks(self, answer: Callable, case: Arguments) -> None:
        """A line that is still `...`."""
        try:
            self.compare(answer, case)
        except NotYet as not_yet:
            said = not_yet.finding.seen
            if not_yet.finding.diagnosis != "raised" or "ellipsis" not in said:
                raise
            name, look = ("block", LOAD) if "attribute 'to'" in said else ("here", MASK)
            self.fail("left-open", seen=f"`{name}` is still `...`", cause="a line that is yours has no code yet",
                      look=look)  # fmt: skip

    def compare(self, answer: Callable, case: Arguments, words: str = "") -> None:
        """One launch beside attention over gathered K and V."""
        q, keys, values, table, lengths = case
        told = (f"{str(q.dtype).removeprefix('torch.')}, lengths {lengths.tolist()}, BLOCK_SIZE {keys.shape[1]}, table "
                f"of {table.shape[1]} entries a row, {q.shape[1]} heads on {keys.shape[2]}{words}")  # fmt: skip
        strays, memory = list[Stray](), Memory({})

        def launched(q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
            try:
                return launch(answer, q, keys, values, block_table, lengths, memory=memory)
            except Stray as stray:
                strays.append(stray)
                return q

        got = self.call(launched, *case)
        if strays:
            self.explain_stray(strays[0], memory, case, told)
        own = paged_attention(*case)
        exact = paged_attention(q.double(), keys.double(), values.double(), table, lengths)
        tolerance = budget(own, exact)
        if agree(got, exact, tolerance):
            return
        listed = [
            *(Suspect(name, twin(case, at=at), cause, LOAD) for name, at, cause in OTHER_ENTRIES),
            Suspect("no-table", twin(case, at=lambda row, start, wide, size, *_: start // size, table=False),
                    "blocks 0, 1, ... were read: the table was not asked", LOAD),
            Suspect("no-table", twin(case, table=False),
                    "the number of the table's entry was taken for the block that stands there", WITH_LOAD),
            *(Suspect(name, twin(case, mask=mask), cause, MASK) for name, mask, cause in OTHER_MASKS),
            Suspect("head-mapping", twin(case, heads=lambda h, kv: torch.arange(h) % kv),
                    "query head h read KV head h % num_kv_heads; neighbours share one",
                    "kv_head, as the blank gives it: head // (num_heads // num_kv_heads)"),
        ]  # fmt: skip
        seen = f"{told}: {first_place(got, exact, tolerance)}"
        recognise(type(self), got, [one for one in listed if one.gives is not None], seen, tolerance=tolerance + 1e-5)
        if got.isnan().any():
            self.fail("not-finite", seen=f"{told}: the output holds NaN",
                      cause="slots that hold no token were read, or a block of which none is taken for one",
                      look=MASK)  # fmt: skip
        self.fail("values", seen=seen,
                  cause="another block was read, or other slots of it, or a given line was changed",
                  look=f"{LOAD}; {MASK}")  # fmt: skip

    def explain_stray(self, stray: Stray, memory: Memory, case: Arguments, told: str) -> None:
        """Something was read that is nobody's: which other entry explains it, and all entries read before?"""
        q, keys, _, table, lengths = case
        if not memory.reads.get("table") and "of table" not in str(stray) and stray.count > 1:  # K or V, not the table
            address = "far from" in str(stray)
            self.fail("address-for-block" if address else "no-table",
                      seen=f"{told}: {stray}; nothing was read from the table before",
                      cause="`block` is an address in the table, not the number that stands there" if address else
                      "`block` is computed, not read from the table", look=WITH_LOAD)  # fmt: skip
        read = [int(number) for part in memory.reads.get("table", ()) for number in part.ravel()]
        size, wide, entries = keys.shape[1], table.shape[1], table.flatten().tolist()
        for name, at, cause in OTHER_ENTRIES:
            places = [at(row, start, wide, size, head, length, len(q)) for row, length in enumerate(lengths.tolist())
                      for head in range(q.shape[1]) for start in range(0, length, size)]  # fmt: skip
            end = next(
                (n for n, place in enumerate(places) if not 0 <= place < len(entries) or entries[place] < 0), None
            )
            if end is None:
                continue
            padding = 0 <= places[end] < len(entries)
            outside = f"number {places[end]} of table was read"
            if read == places[: end + padding] and padding != str(stray).startswith(outside):
                self.fail(name, seen=f"{told}: {stray}{'; the entry read before is padding, -1' * padding}",
                          cause=cause, look=LOAD)  # fmt: skip
        self.fail("stray", seen=f"{told}: {stray}", cause="an address was computed that belongs to none of the "
                  "tensors; on a GPU it would read another's memory, or stop the process",
                  look=f"{LOAD}; {MASK}")  # fmt: skip
