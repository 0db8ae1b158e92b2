"""The references of lab 06 inside the engine: the tokens of one at a time, and every block back at the end."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from labkit.cache import OutOfBlocks
from labkit.course.examine import examine
from labkit.engine import Allocator, Engine, Request
from labkit.engine.blocks import BlockManager
from labkit.labs.lab06.allocating import Allocate
from labkit.labs.lab06.inside import OwnBlocks
from labkit.labs.lab06.references import BlockAllocator, BlockTable, copy_on_write
from tests.engine import tiny
from tests.labs.lab06.block_answers import AHeap, ByDivmod, RollsBack, TwoDicts, by_generator, by_index

MINE = (BlockAllocator, BlockTable, copy_on_write)
ODD = (AHeap, ByDivmod, by_generator)


@pytest.mark.parametrize("written", [MINE, (TwoDicts, RollsBack, copy_on_write), (TwoDicts, BlockTable, by_index), ODD])
@pytest.mark.parametrize("num_blocks", [64, 14])
def test_eight_ragged_requests_get_the_tokens_of_one_at_a_time(written, num_blocks: int) -> None:
    model = tiny.model()
    draw = random.Random(0)
    requests = [Request(str(n), [draw.randrange(tiny.VOCAB) for _ in range(draw.randint(3, 30))], 12) for n in range(8)]
    engine = Engine(model, manager=OwnBlocks(num_blocks, 4, *written))
    together = engine.run(requests)
    alone = {request.id: Engine(model, num_blocks=64, block_size=4).run([request])[request.id] for request in requests}
    assert together == alone
    assert engine.blocks.num_free == num_blocks


@pytest.mark.parametrize("allocator", [BlockAllocator, TwoDicts, AHeap])
def test_a_learners_allocator_serves_the_engines_own_tables(allocator) -> None:
    model = tiny.model()
    beginning = [n % tiny.VOCAB for n in range(19)]
    requests = [Request(str(n), [*beginning, n], 6) for n in range(4)]
    engine = Engine(model, num_blocks=32, block_size=4, allocator=allocator(32))
    answers = {}
    for request in requests:
        answers |= engine.run([request])
    plain = {r.id: Engine(model, num_blocks=32, block_size=4).run([r])[r.id] for r in requests}
    assert answers == plain
    assert engine.blocks.counts.hits > 0
    assert engine.blocks.num_free == 32


def test_it_does_what_the_engines_own_manager_does() -> None:
    draw = random.Random(3)
    one, other = OwnBlocks(20, 4, *MINE), BlockManager(20, 4, reuse=False)
    for step in range(400):
        request, what, tokens = str(draw.randrange(6)), draw.random(), [1] * draw.randint(1, 9)
        done = []
        for manager in (one, other):
            try:
                if what < 0.3:
                    done.append(manager.admit(request, tokens))
                elif what < 0.6:
                    done.append(len(manager.extend(request, tokens)))
                elif what < 0.8:
                    done.append(manager.fork(request, str((int(request) + 1) % 6)))
                else:
                    done.append(manager.release(request))
            except (ValueError, OutOfBlocks) as error:
                done.append(type(error))
        assert done[0] == done[1], step
        assert one.num_free == other.num_free
        assert {name: len(table.blocks) for name, table in one.tables.items()} == {
            name: len(table.blocks) for name, table in other.tables.items()
        }


def test_a_table_that_writes_never_writes_into_a_block_of_another() -> None:
    manager = OwnBlocks(20, 4, *MINE)
    manager.admit("a", [1] * 6)
    manager.fork("a", "b")
    copies = manager.extend("b", [2])
    assert copies == [(manager.block_table("a")[-1], manager.block_table("b")[-1])]
    assert manager.extend("a", [3]) == []
    assert manager.counts.copied == 1
    assert all(x != y for x, y in pairwise([manager.block_table("a"), manager.block_table("b")]))
    with pytest.raises(NotImplementedError):
        manager.shorten("a", 2)
    assert torch.tensor(manager.slots("a", 0, 7)).unique().numel() == 7


def test_the_engines_own_allocator_passes_the_learners_check() -> None:
    verdict = examine(Allocate(), Allocator)
    assert verdict.status == "pass", verdict.finding
