"""The allocator knows who holds what, and says so when it is asked for what cannot be."""

from __future__ import annotations

import pytest

from labkit.cache import OutOfBlocks
from labkit.engine import Allocator


def test_blocks_are_handed_out_once_and_then_there_are_none() -> None:
    allocator = Allocator(3)
    assert [allocator.take() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OutOfBlocks, match="all 3 blocks are held"):
        allocator.take()
    assert (allocator.num_free, allocator.ref_count(1)) == (0, 1)


def test_a_block_is_free_when_its_last_holder_drops_it() -> None:
    allocator = Allocator(2)
    block = allocator.take()
    allocator.hold(block)
    assert (allocator.drop(block), allocator.num_free) == (False, 1)
    assert (allocator.drop(block), allocator.num_free, allocator.ref_count(block)) == (True, 2, 0)


def test_what_may_be_wanted_again_is_taken_last_and_the_first_let_go_of_it_first() -> None:
    allocator = Allocator(4)
    for _ in range(4):
        allocator.take()
    for block, keep in ((2, True), (0, True), (3, False), (1, False)):
        allocator.drop(block, keep=keep)
    assert [allocator.take() for _ in range(4)] == [1, 3, 2, 0]


def test_a_block_that_was_let_go_can_be_held_again_until_it_is_taken() -> None:
    allocator = Allocator(1)
    block = allocator.take()
    allocator.drop(block, keep=True)
    allocator.hold(block)
    assert (allocator.ref_count(block), allocator.num_free) == (1, 0)
    with pytest.raises(OutOfBlocks):
        allocator.take()


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda a: a.drop(0), "nobody holds block 0: it was let go already"),  # a second time
        (lambda a: a.drop(1), "nobody holds block 1"),
        (lambda a: a.drop(9), "nobody holds block 9"),
        (lambda a: a.hold(1), "block 1 was never taken"),
        (lambda a: a.hold(-1), "block -1 was never taken"),
        (lambda a: Allocator(0), "num_blocks is a whole number, at least 1; got 0"),
        (lambda a: Allocator(True), "num_blocks is a whole number"),
    ],
)
def test_what_cannot_be_is_one_clear_line_and_changes_nothing(act, said: str) -> None:
    allocator = Allocator(2)
    allocator.drop(allocator.take())
    before = repr(vars(allocator))
    with pytest.raises(ValueError, match=said):
        act(allocator)
    assert repr(vars(allocator)) == before
