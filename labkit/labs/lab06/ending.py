"""06.d1 to 06.d3: three bugs of engines, to mend."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

import torch
from torch import Tensor

from labkit.course.checks.hidden import hidden
from labkit.course.checks.suspects import Suspect
from labkit.course.checks.trials import sliced, transposed
from labkit.course.exercise import Exercise, NotYet
from labkit.labs.lab06.parts import judge_parts
from labkit.labs.lab06.references import finish, first_chunk, set_row


def some_requests(chance: random.Random) -> tuple[dict[str, list[int]], list[str]]:
    """Requests, two of them with one beginning and one without a block; and who ends, in which order."""
    blocks = chance.sample(range(40), 12)
    running = {"a": blocks[:3], "b": [*blocks[:2], *blocks[3:5]], "c": blocks[5:], "d": []}
    return running, chance.choices([*running, "nobody"], k=12)


def some_rows(chance: random.Random) -> tuple[int, int, list[tuple[int, list[int], int]]]:
    """Rows of a table, entries of a row, and who comes into which row: blocks and tokens."""
    rows, wide, steps = chance.randint(1, 4), chance.randint(1, 7), []
    for _ in range(8):
        blocks = chance.sample(range(50), chance.randint(0, wide))
        steps.append((chance.randrange(rows), blocks, max(0, 16 * len(blocks) - chance.randrange(16))))
    return rows, wide, steps


def some_chunk(chance: random.Random) -> tuple[int, int, int, int]:
    """Tokens of a prompt, those found in whole blocks, the size of a block, and the budget."""
    size, prompt = chance.randint(1, 32), chance.randint(1, 600)
    return prompt, chance.randint(0, prompt // size) * size, size, chance.randint(1, 512)


class Finish(Exercise):
    """A block freed twice."""

    id, title, minutes, difficulty = "06.d1", "Debug: two users, one memory", 3, 2
    reference = staticmethod(finish)
    why = (
        "Who ends a request takes its table away in the same move, so nobody finds anything to free a second time. "
        "pop with a default makes the second call do nothing."
    )
    hints = (
        "The answer is complete and the user presses stop: the function runs twice. What does it do the second time?",
        "A block that is in `free` twice is handed out twice. After the first call, who still knows the blocks?",
        "tables.pop(request, []) gives the blocks and takes the table away; without a table, it gives no blocks.",
    )
    hints_for: ClassVar = {
        "table-left": "get looks; pop looks and takes away.",
        "raises-when-gone": "A request that has ended is no error: pop(request, []).",
        "freed-while-held": "Two requests with one beginning have the same blocks. When is such a block nobody's?",
    }

    def examine(self, answer: Callable) -> None:
        """Ends once, ends twice, ends unknown; no blocks; blocks of one, two and three requests; in any order."""
        scripts: list[tuple[dict[str, list[int]], list[str]]] = [
            ({"anna": [3, 5], "berta": [1]}, ["anna", "anna", "berta", "anna"]),
            ({"a": [7], "b": [2, 9, 4], "c": []}, ["c", "b", "nobody", "b", "c", "a"]),
            ({"x": [0]}, ["nobody", "x", "x"]),
            ({"x": [6, 2, 0], "y": [6, 2, 8], "z": [6, 1]}, ["y", "y", "x", "y", "x", "z", "z"]),
            ({str(n): [0, 3 * n + 1, 3 * n + 2] for n in range(20)}, [str(n % 20) for n in range(0, 147, 7)]),
            *hidden(some_requests, count=4),
        ]
        for running, ends in scripts:
            tables = copy.deepcopy(running)
            most = max((block for blocks in tables.values() for block in blocks), default=0) + 3
            count = Counter(block for blocks in tables.values() for block in blocks)
            holders = [count[block] for block in range(most)]
            free = [block for block in range(most) if not count[block]]
            for request in ends:
                self.step(answer, tables, holders, free, request)

    def step(self, answer: Callable, tables: dict, holders: list, free: list, request: str) -> None:
        """One end, beside the reference's."""
        few = f"tables {tables}, holders {holders}, free {free}; " if len(tables) < 5 else ""
        case, right, there = f"{few}finish {request!r}", copy.deepcopy((tables, holders, free)), request in tables
        finish(*right, request)
        try:
            answer(tables, holders, free, request)
        except KeyError as error:
            if not there:
                self.fail("raises-when-gone", seen=f"{case}: KeyError {error}",
                          cause="a request that has ended already, or was never there, is no error",
                          look="what happens without a table: nothing")  # fmt: skip
            raise
        if there and request in tables:
            self.explain_left(answer, tables, holders, free, request, case)
        self.judge((tables, holders, free), right, case, request)

    def explain_left(self, answer: Callable, *state: Any) -> None:
        """The request still has a table: what does a second call do with it?"""
        *arguments, case = state
        tables, holders, free, request = copy.deepcopy(arguments)
        with suppress(Exception):
            answer(tables, holders, free, request)
        if wrong := [block for block, count in Counter(free).items() if count > 1]:
            self.fail("freed-twice", seen=f"{case}, and once more: block {wrong[0]} is in free twice, and two requests "
                      "will get it", cause="the first call leaves the request's table for the second to find",
                      look="where the blocks are read: pop gives them and takes the table away")  # fmt: skip

    def judge(self, got: tuple[dict, list, list], right: tuple[dict, list, list], case: str, request: str) -> None:
        """All three afterwards."""
        (tables, holders, free), (want_tables, want_holders, want_free) = got, right
        small = len(tables) < 5
        seen = f"{case}: tables {tables}, holders {holders}, free {free}" if small else case
        for block, count in Counter(free).items():
            if count > 1:
                self.fail("freed-twice", seen=f"{seen}: block {block} is free twice, and two requests will get it",
                          cause="a block that was free already was given back again",
                          look="what the first call leaves behind for the second to find")  # fmt: skip
            if block not in want_free:
                self.fail("freed-while-held", seen=f"{seen}: block {block} is free, and another request still reads it",
                          cause="a block was given back while others hold it",
                          look="holders[block]: only the last one frees it")  # fmt: skip
        for block in want_free:
            if block not in free:
                self.fail("not-freed", seen=f"{seen}: block {block} is nobody's and not free",
                          cause="not all of the request's blocks were given back, or not to this list",
                          look="each block of the request, and `free` in place")  # fmt: skip
        if holders != want_holders:
            block = next(n for n, (a, b) in enumerate(zip(holders, want_holders, strict=False)) if a != b)
            self.fail("holders", seen=f"{seen}: {holders[block]} hold block {block}, it says; {want_holders[block]} do",
                      cause="the request is still counted, or was taken off twice",
                      look="holders[block] -= 1, once for each block of the table")  # fmt: skip
        if request in tables:
            empty = not tables[request]
            self.fail("table-left", seen=f"{seen}: the request still has a table",
                      cause="an empty table was taken for none" if empty else
                      "it goes on running with blocks that are another's soon",
                      look="what asks whether there is a table: `not []` is True" if empty else
                      "tables: the request's entry goes away, too")  # fmt: skip
        if tables != want_tables:
            self.fail("other-request", seen=f"{seen}: another request's table changed",
                      cause="more than this request's table was taken away",
                      look="tables.pop(request, ...)")  # fmt: skip


class SetRow(Exercise):
    """The row of a finished request."""

    id, title, minutes, difficulty = "06.d2", "Debug: a row that remembers", 3, 2
    reference = staticmethod(set_row)
    why = (
        "The whole row is set to -1 before the new blocks go in, and the length is what it is now. So a row that "
        "nobody has names no block, and its token goes nowhere."
    )
    hints = (
        "A request of three blocks ends, and nobody gets its row. What stands in the row, and where does its token go?",
        "Every entry of the row has to be written: the new blocks, and -1 behind them. And the length.",
        "block_table[row] = -1 first; then the blocks; then lengths[row] = tokens.",
    )
    hints_for: ClassVar = {
        "old-blocks-left": "Three blocks, then one: which entries does a slice of one write?",
        "old-length-left": "A shorter request comes into the row. What does max() say?",
    }

    def examine(self, answer: Callable) -> None:
        """Rows that grow, shrink and empty, in tables of several sizes and layouts."""
        scripts = [
            (2, 4, [(0, [6, 2, 7], 40), (0, [1], 3), (1, [5], 16), (0, [], 0), (1, [9, 0, 4, 3], 61), (1, [8, 2], 20)]),
            (3, 2, [(2, [0, 1], 9), (2, [], 0), (0, [3], 1), (2, [4], 5), (0, [], 0)]),
            (1, 7, [(0, [2, 4, 6, 8, 10, 12, 14], 100), (0, [3, 5, 7], 48), (0, [3, 5, 7, 9], 49)]),
            *hidden(some_rows, count=4),
        ]
        for layout in (lambda x: x, transposed, sliced):
            for rows, wide, steps in scripts:
                table = layout(torch.full((rows, wide), -1, dtype=torch.int32))
                lengths = layout(torch.zeros(rows, dtype=torch.int64))
                for row, blocks, tokens in steps:
                    self.step(answer, table, lengths, row, blocks, tokens)

    def step(self, answer: Callable, table: Tensor, lengths: Tensor, row: int, blocks: list[int], tokens: int) -> None:
        """One request comes into a row, or leaves it."""
        before = table.clone(), lengths.clone()
        want = table.clone(), lengths.clone()
        set_row(*want, row, blocks, tokens)
        case = (
            f"row {row} was {before[0][row].tolist()} with {before[1][row]} tokens; set_row({row}, {blocks}, {tokens})"
        )
        given = list(blocks)
        self.run(lambda: answer(table, lengths, row, given, tokens), told=case)
        self.check_unchanged(blocks, given)
        got = table[row].tolist()
        seen = f"{case}: it is {got} with {lengths[row]} tokens"
        others = torch.arange(len(table)) != row
        if not torch.equal(table[others], before[0][others]) or not torch.equal(lengths[others], before[1][others]):
            self.fail("other-row", seen=f"{case}: another row changed", cause="more than this row was written",
                      look="block_table[row], lengths[row]")  # fmt: skip
        if got[: len(blocks)] != blocks:
            self.fail("blocks-missing", seen=seen, cause="the new blocks were not written in place",
                      look="block_table[row, : len(blocks)] = ...")  # fmt: skip
        if got != want[0][row].tolist():
            old = before[0][row].tolist()[len(blocks) :]
            self.fail("old-blocks-left" if got[len(blocks) :] == old else "not-padded", seen=seen,
                      cause=("behind the new blocks stand those of the request before, which are another's by now"
                             if blocks else "nobody has the row, and it still names the blocks of the one before")
                      if got[len(blocks) :] == old else "behind the new blocks stands something else than -1",
                      look="every entry of the row, also when there are no blocks")  # fmt: skip
        if int(lengths[row]) != tokens:
            left = int(lengths[row]) == int(before[1][row])
            self.fail("old-length-left" if left else "length", seen=seen,
                      cause="the length is still that of the request before" if left else "another length was written",
                      look="lengths[row] = tokens, whatever stood there")  # fmt: skip


NAMES = ("reused", "run")


def whole_minus_one(prompt: int, found: int, size: int, budget: int) -> int:
    """All but the last token."""
    return min(found, prompt - 1)


def one_block_less(prompt: int, found: int, size: int, budget: int) -> int:
    """All but the last block found."""
    return max(found - size, 0)


WHOLE = "the return: reused is a multiple of block_size, and below prompt_tokens"


def masked(prompt: int, found: int, size: int, budget: int) -> int:
    """With a bit mask in place of a division."""
    return min(found, (prompt - 1) & ~(size - 1))


REUSED = (
    Suspect("nothing-left-to-run", lambda prompt, found, size, budget: found,
            "where the whole prompt is found, no token is left to run, and there are no logits",
            "the most that may be reused: something below prompt_tokens"),
    Suspect("not-whole-blocks", whole_minus_one,
            "all but the last token are reused: its K and V would be written into a block that others read", WHOLE),
    Suspect("not-whole-blocks", [lambda prompt, found, size, budget: max(found - 1, 0),
                                 lambda prompt, found, size, budget: found - 1],
            "one token less is reused than was found: its K and V would be written into a block that others read",
            WHOLE),
    Suspect("always-a-block-less", [one_block_less, lambda prompt, found, size, budget: found - size],
            "a block is given up though tokens are left to run without it", "only where found_tokens is prompt_tokens"),
    Suspect("blocks-counted", [lambda prompt, found, size, budget: right(prompt, found, size, budget) // size,
                               lambda prompt, found, size, budget: min(found, (prompt - 1) // size),
                               lambda prompt, found, size, budget: max(found - 1, 0) // size,
                               lambda prompt, found, size, budget: (found - 1) // size],
            "blocks were counted where tokens are asked for", "the last factor: a block has block_size tokens"),
    Suspect("reuses-nothing", lambda prompt, found, size, budget: 0 if found == prompt else found,
            "where the whole prompt is found, nothing is reused: all blocks but the last could be",
            "how many whole blocks end before the last token"),
    Suspect("by-budget", lambda prompt, found, size, budget: min(found, (prompt - 1) // size * size, budget),
            "what is reused was limited by the budget, which is for tokens that are run", "budget: only for `run`"),
    Suspect("prompts-last-block", [lambda prompt, found, size, budget: min(found, max(0, prompt // size - 1) * size),
                                   lambda prompt, found, size, budget: min(found, (prompt // size - 1) * size)],
            "the prompt's last full block is never reused, also where tokens behind it are left to run",
            "how many whole blocks end before the last token: (prompt_tokens - 1) // block_size"),
    Suspect("fixed-size", [lambda prompt, found, size, budget, fixed=fixed: min(found, (prompt - 1) // fixed * fixed)
                           for fixed in (16, 32, 8, 4)]
            + [lambda prompt, found, size, budget, fixed=fixed: max(0, found - fixed) if found == prompt else found
               for fixed in (16, 32, 8, 4)],
            "a block size was written down", "block_size stands for it"),
    Suspect("powers-of-two", masked, "a bit mask (&) rounds down only where block_size is a power of two; 3 is a size, "
            "too", "// block_size * block_size, for any block_size"),
    Suspect("not-run-yet", lambda prompt, found, size, budget: prompt - min(
                prompt - min(found, (prompt - 1) // size * size), budget),
            "all that is not run in this step was called reused; the budget leaves the rest for later steps",
            "reused: whole blocks that were found, whatever the budget is"),
)  # fmt: skip


def after(reused: Callable[..., int]) -> Callable[..., int]:
    """What is run when so many are reused."""
    return lambda prompt, found, size, budget: min(prompt - reused(prompt, found, size, budget), budget)


def right(prompt: int, found: int, size: int, budget: int) -> int:
    """Whole blocks that end before the last token."""
    return min(found, (prompt - 1) // size * size)


RUN = (
    Suspect("budget-left-out", lambda prompt, found, size, budget: prompt - right(prompt, found, size, budget),
            "more than budget tokens are run in one step", "min(..., budget)"),
    Suspect("budget-for-all", lambda prompt, found, size, budget: max(0, min(prompt, budget) - right(
                prompt, found, size, budget)),
            "the budget was taken for the whole prompt: reused tokens are not run, and cost none of it",
            "min(prompt_tokens - reused, budget)"),
    Suspect("reused-run-again", lambda prompt, found, size, budget: min(prompt, budget),
            "the whole prompt is run, what is reused too", "prompt_tokens - reused"),
    Suspect("a-block-whatever-the-budget", lambda prompt, found, size, budget: size if found == prompt else min(
                prompt - found, budget),
            "where the whole prompt is found a block is run, whatever the budget is", "min(..., budget), there too"),
    Suspect("at-least-one", after(whole_minus_one), "one token is run where its whole block is not reused",
            "prompt_tokens - reused"),
    Suspect("found-not-reused", after(lambda prompt, found, size, budget: found),
            "the number that is run goes with another number reused than the one that is returned",
            "prompt_tokens - reused, with the reused of the line above"),
)  # fmt: skip


class FirstChunk(Exercise):
    """The full prefix hit."""

    id, title, minutes, difficulty = "06.d3", "Debug: a question asked twice", 4, 3
    needs = ("06.7",)
    reference = staticmethod(first_chunk)
    why = (
        "Logits come from the last token's run, so it is never reused; and blocks are reused whole, so its block is "
        "run with it. (prompt_tokens - 1) // block_size blocks end before it."
    )
    hints = (
        "Take a prompt of 32 tokens in blocks of 16, all found. How many are left to run? What are logits made of?",
        "At least the last token must run, and nothing may be written into a shared block. How many whole blocks end "
        "before the last token?",
        "most = (prompt_tokens - 1) // block_size * block_size\nreused = min(found_tokens, most)",
    )
    hints_for: ClassVar = {
        "nothing-left-to-run": "A cache holds K and V, no logits.",
        "not-whole-blocks": "Reused 31 of 32: into which block are K and V of token 31 written, and who reads it?",
        "always-a-block-less": "33 tokens, 32 found: one token is left to run as it is.",
    }

    def examine(self, answer: Callable) -> None:
        """Nothing found, a part, all; ends of blocks; budgets below and above; blocks of one token."""
        cases = [
            (32, 32, 16, 512), (32, 16, 16, 512), (32, 0, 16, 512), (33, 32, 16, 512), (31, 16, 16, 512),
            (64, 64, 16, 8), (64, 48, 16, 8), (64, 48, 16, 16), (65, 64, 16, 8), (100, 96, 8, 3), (96, 96, 8, 3),
            (96, 96, 4, 3), (96, 96, 32, 40), (7, 7, 1, 50), (7, 6, 1, 50), (1, 1, 1, 4), (1, 0, 16, 4),
            (16, 16, 16, 5), (9, 9, 3, 2), (1000, 0, 16, 256), (1000, 992, 16, 256), (1024, 1024, 16, 1),
            (48, 48, 16, 512),
        ]  # fmt: skip
        cases += hidden(some_chunk, count=30)
        try:
            judge_parts(
                type(self),
                answer,
                first_chunk,
                cases,
                (REUSED, RUN),
                NAMES,
                lambda name: f"the number of tokens {name}",
            )
        except NotYet as not_yet:
            if not_yet.finding.diagnosis == "nothing-left-to-run":
                self.explain_run(answer, [case for case in cases if case[0] == case[1]], not_yet)
            raise

    def explain_run(self, answer: Callable, whole: list[tuple[int, int, int, int]], not_yet: NotYet) -> None:
        """The whole prompt is reused, and something is run all the same."""
        runs = [answer(*case)[1] for case in whole]
        if all(isinstance(run, int) and run > 0 for run in runs):
            self.fail("written-into-shared", seen=f"{not_yet.finding.seen}; {runs[0]} run",
                      cause=f"all {whole[0][1]} tokens are reused and {runs[0]} of them run again: K and V would be "
                      "written into a block that others read", look=WHOLE)  # fmt: skip
