"""Blocks are handed out, shared, found again and given back, and none is ever lost or held twice."""

from __future__ import annotations

import statistics
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from labkit.engine import Allocator
from labkit.engine.blocks import BlockManager, OutOfBlocks


def filled(manager: BlockManager, request: str, tokens, salt: str = "") -> int:
    """Admit a request, and say that all of it has K and V."""
    reused = manager.admit(request, tokens, salt)
    manager.computed(request, len(list(tokens)))
    return reused


class TestAdmission:
    def test_a_prompt_gets_as_many_blocks_as_it_fills_and_its_slots_lie_in_them(self) -> None:
        manager = BlockManager(8, 4)
        assert manager.admit("a", range(10)) == 0
        assert manager.block_table("a") == [0, 1, 2]
        assert manager.slots("a", 3, 6) == [3, 4, 5]
        assert (manager.num_free, manager.usage) == (5, 3 / 8)

    def test_what_does_not_fit_is_refused_and_nothing_changes(self) -> None:
        manager = BlockManager(4, 4)
        manager.admit("a", range(9))
        before = vars_of(manager)
        with pytest.raises(OutOfBlocks, match="request 'b' needs 2 more blocks, 1 of 4 are free"):
            manager.admit("b", range(5))
        with pytest.raises(OutOfBlocks):
            manager.extend("a", range(8))
        assert vars_of(manager) == before

    @pytest.mark.parametrize(
        ("act", "said"),
        [
            (lambda m: m.admit("a", [1]), "a request 'a' already"),
            (lambda m: m.fork("a", "a"), "a request 'a' already"),
            (lambda m: m.admit("b", []), "'b' has no tokens"),
            (lambda m: m.admit("b", [1.5]), "whole numbers, 0 or more; got 1.5"),
            (lambda m: m.admit("b", [-1]), "whole numbers, 0 or more; got -1"),
            (lambda m: m.extend("b", [1]), "no request 'b'"),
            (lambda m: m.release("b"), "no request 'b'"),
            (lambda m: m.computed("a", 99), "99 cannot be"),
            (lambda m: m.computed("a", 2), "2 cannot be"),
            (lambda m: m.shorten("a", 0), "0 cannot be kept"),
            (lambda m: BlockManager(0, 16), "num_blocks is a whole number, at least 1; got 0"),
            (lambda m: BlockManager(4, 0), "block_size is a whole number, at least 1; got 0"),
            (lambda m: BlockManager(True, 4), "num_blocks is a whole number"),
        ],
    )
    def test_what_cannot_be_is_one_clear_line_and_changes_nothing(self, act, said: str) -> None:
        manager = BlockManager(4, 4)
        filled(manager, "a", range(9))
        before = vars_of(manager)
        with pytest.raises(ValueError, match=said):
            act(manager)
        assert vars_of(manager) == before

    def test_a_request_is_released_once(self) -> None:
        manager = BlockManager(4, 4)
        manager.admit("a", range(9))
        manager.release("a")
        with pytest.raises(ValueError, match="no request 'a'"):
            manager.release("a")
        assert manager.num_free == 4


class TestReuse:
    def test_full_blocks_of_a_common_beginning_are_reused_and_the_last_token_never(self) -> None:
        manager = BlockManager(16, 4)
        filled(manager, "a", range(12))
        assert manager.reusable(range(12)) == 8  # the twelfth token has to be run: its logits are wanted
        assert manager.reusable(range(13)) == 12
        assert filled(manager, "b", [*range(8), 99, 98, 97]) == 8
        assert manager.block_table("b")[:2] == manager.block_table("a")[:2]

    def test_nothing_is_found_before_it_is_written(self) -> None:
        manager = BlockManager(16, 4)
        manager.admit("a", range(12))
        assert manager.reusable(range(12)) == 0
        manager.computed("a", 7)
        assert manager.reusable(range(12)) == 4

    def test_the_same_tokens_after_other_ones_are_another_content(self) -> None:
        manager = BlockManager(16, 4)
        filled(manager, "a", [1, 2, 3, 4, 5, 6, 7, 8])
        assert manager.reusable([5, 6, 7, 8, 9]) == 0
        assert manager.reusable([9, 2, 3, 4, 5, 6, 7, 8, 9]) == 0

    def test_no_salt_finds_what_another_wrote(self) -> None:
        manager = BlockManager(16, 4)
        filled(manager, "a", range(9), salt="one tenant")
        assert manager.reusable(range(9), salt="another") == 0
        assert manager.reusable(range(9)) == 0
        assert manager.reusable(range(9), salt="one tenant") == 8

    def test_what_was_released_is_found_until_the_memory_is_needed_and_ends_go_first(self) -> None:
        manager = BlockManager(4, 4)
        filled(manager, "a", range(12))
        manager.release("a")
        assert manager.reusable([*range(12), 50]) == 12
        manager.admit("b", [90, 91, 92, 93, 94])  # one block was never used, one has to make room: the last of "a"
        assert manager.reusable([*range(12), 50]) == 8
        assert manager.counts.evicted == 1

    def test_without_reuse_nothing_is_found(self) -> None:
        manager = BlockManager(8, 4, reuse=False)
        filled(manager, "a", range(12))
        assert manager.reusable(range(12)) == 0

    def test_hits_and_queries_are_counted_in_tokens(self) -> None:
        manager = BlockManager(16, 4)
        filled(manager, "a", range(12))
        filled(manager, "b", range(12))
        assert (manager.counts.queries, manager.counts.hits) == (24, 8)


class TestSharing:
    def test_a_fork_shares_every_block_and_the_one_who_writes_gets_a_copy(self) -> None:
        manager = BlockManager(8, 4)
        filled(manager, "a", range(6))
        manager.fork("a", "b")
        assert manager.num_free == 6
        assert manager.extend("b", [7]) == [(1, 2)]
        assert (manager.block_table("a"), manager.block_table("b")) == ([0, 1], [0, 2])
        assert manager.extend("a", [8]) == []  # now it is alone in its last block
        assert (manager.ref_count(0), manager.ref_count(1), manager.ref_count(2)) == (2, 1, 1)

    def test_a_full_block_is_never_copied(self) -> None:
        manager = BlockManager(8, 4)
        filled(manager, "a", range(8))
        manager.fork("a", "b")
        assert manager.extend("b", [9]) == []
        assert manager.block_table("b")[:2] == manager.block_table("a")

    def test_tokens_that_were_forgotten_give_back_their_blocks_and_are_no_longer_found(self) -> None:
        manager = BlockManager(8, 4)
        filled(manager, "a", range(12))
        manager.shorten("a", 6)
        assert manager.num_free == 6
        assert manager.extend("a", [77, 78]) == []
        manager.computed("a", 8)
        assert manager.reusable([0, 1, 2, 3, 4, 5, 77, 78, 0]) == 8
        assert manager.reusable([*range(8), 0]) == 4


class TestAllocators:
    class Breaking(Allocator):
        """Raises at the call that is said, of those that give a block a holder."""

        def __init__(self, num_blocks: int) -> None:
            super().__init__(num_blocks)
            self.left = -1

        def count(self) -> None:
            self.left -= 1
            if self.left == 0:
                raise MemoryError("in the allocator")

        def take(self) -> int:
            self.count()
            return super().take()

        def hold(self, block: int) -> None:
            self.count()
            super().hold(block)

    @pytest.mark.parametrize("at", [1, 2, 3, 4])
    @pytest.mark.parametrize(
        "act",
        [
            lambda m: m.admit("c", [*range(8), 9, 9, 9, 9, 9]),  # two blocks are found, two are new
            lambda m: m.extend("a", range(20)),
            lambda m: m.extend("b", range(20)),  # the first of them replaces a shared block
            lambda m: m.fork("a", "c"),
        ],
    )
    def test_one_that_raises_in_the_middle_leaves_everything_as_it_was(self, act, at: int) -> None:
        allocator = self.Breaking(16)
        manager = BlockManager(16, 4, allocator=allocator)
        filled(manager, "a", range(14))
        manager.fork("a", "b")
        before = repr(manager.tables), manager.num_free, [manager.ref_count(block) for block in range(16)]
        allocator.left = at
        with pytest.raises(MemoryError):
            act(manager)
        allocator.left = -1
        assert (repr(manager.tables), manager.num_free, [manager.ref_count(block) for block in range(16)]) == before
        act(manager)
        for request in list(manager.tables):
            manager.release(request)
        assert manager.num_free == 16

    def test_any_class_with_the_five_methods_will_do(self) -> None:
        class Plain:
            def __init__(self, num_blocks: int) -> None:
                self.counts = [0] * num_blocks

            @property
            def num_free(self) -> int:
                return self.counts.count(0)

            def take(self) -> int:
                block = self.counts.index(0)
                self.counts[block] = 1
                return block

            def hold(self, block: int) -> None:
                self.counts[block] += 1

            def drop(self, block: int, *, keep: bool = False) -> bool:
                self.counts[block] -= 1
                return not self.counts[block]

            def ref_count(self, block: int) -> int:
                return self.counts[block]

        manager = BlockManager(8, 4, allocator=Plain(8))
        filled(manager, "a", range(12))
        assert filled(manager, "b", [*range(8), 50]) == 8
        manager.release("a")
        manager.release("b")
        assert (manager.num_free, manager.reusable(range(12))) == (8, 8)

    def test_one_of_another_size_or_in_use_is_refused(self) -> None:
        used = Allocator(8)
        used.take()
        for allocator, free in ((Allocator(7), 7), (used, 7)):
            with pytest.raises(ValueError, match=f"the allocator has {free} free blocks; 8 are needed"):
                BlockManager(8, 4, allocator=allocator)


def test_contents_that_are_gone_are_found_no_more() -> None:
    manager = BlockManager(8, 4)
    filled(manager, "a", range(12))
    manager.forget()
    assert manager.reusable(range(12)) == 0
    manager.release("a")
    assert filled(manager, "b", range(12)) == 0
    assert manager.reusable(range(12)) == 8


def test_blocks_that_have_to_stay_free_are_not_given_to_a_new_request() -> None:
    manager = BlockManager(4, 4)
    with pytest.raises(OutOfBlocks, match="needs 3 more blocks and 2 to stay free, 4 of 4 are free"):
        manager.admit("a", range(12), spare=2)
    assert manager.admit("a", range(12), spare=1) == 0


def test_an_operation_costs_the_same_however_many_blocks_there_are() -> None:
    """Bounded: constant time, with room for a noisy machine; a walk over a free list would be 1,000 times slower."""

    def seconds(num_blocks: int) -> float:
        manager = BlockManager(num_blocks, 4)
        for number in range(min(num_blocks // 4, 20_000)):  # so that blocks come from those that were let go
            filled(manager, str(number), [number] * 12)
            manager.release(str(number))
        taken = []
        for _ in range(200):
            start = time.perf_counter()
            filled(manager, "x", range(9))
            manager.extend("x", [1])
            manager.release("x")
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    assert seconds(1_000_000) < 5 * seconds(1_000)


def vars_of(manager: BlockManager):
    """Everything that a manager knows, to compare."""
    known = vars(manager) | {"allocator": vars(manager.allocator)}
    return repr([known[name] for name in sorted(known)])


class Blocks(RuleBasedStateMachine):
    """Any sequence of operations beside a model that keeps each request's tokens in full and remembers what is written.

    What a slot holds is kept by the test as if it were memory: (salt, all tokens up to and with this one). A reused or
    shared slot must hold exactly what its new holder would have written.
    """

    requests = Bundle("requests")
    SIZE, BLOCKS = 3, 9

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(self.BLOCKS, self.SIZE)
        self.texts: dict[str, tuple[str, list[int]]] = {}
        self.written: dict[str, int] = {}
        self.memory: dict[int, tuple] = {}
        self.number = 0

    def new_name(self) -> str:
        self.number += 1
        return f"r{self.number}"

    def write(self, request: str, upto: int) -> None:
        """Write the K and V of a request's tokens, as a model would."""
        salt, tokens = self.texts[request]
        slots = self.manager.slots(request, 0, len(tokens))
        for place in range(self.written[request], upto):
            assert self.manager.ref_count(slots[place] // self.SIZE) == 1, "written into what somebody else holds"
            self.memory[slots[place]] = (salt, *tokens[: place + 1])
        self.written[request] = max(upto, self.written[request])
        self.manager.computed(request, self.written[request])

    TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=10)

    @rule(target=requests, tokens=TOKENS, salt=st.sampled_from(["", "x"]))
    def admit(self, tokens: list[int], salt: str):
        request, before = self.new_name(), vars_of(self.manager)
        try:
            reused = self.manager.admit(request, tokens, salt)
        except OutOfBlocks:
            assert vars_of(self.manager) == before
            return request  # unknown to the manager: every use of it must be refused
        assert reused < len(tokens)
        assert reused % self.SIZE == 0
        self.texts[request], self.written[request] = (salt, list(tokens)), reused
        return request

    @rule(request=requests, data=st.data())
    def compute(self, request: str, data) -> None:
        if request in self.texts:
            done, end = self.written[request], len(self.texts[request][1])
            self.write(request, data.draw(st.integers(done, end)))

    @rule(request=requests, tokens=st.lists(st.integers(0, 1), max_size=5))
    def extend(self, request: str, tokens: list[int]) -> None:
        if request not in self.texts:
            with pytest.raises(ValueError, match="no request"):
                self.manager.extend(request, tokens)
            return
        self.write(request, len(self.texts[request][1])) if self.alone(request) else None
        before = vars_of(self.manager)
        try:
            copies = self.manager.extend(request, tokens)
        except OutOfBlocks:
            assert vars_of(self.manager) == before
            return
        for source, target in copies:
            for place in range(self.SIZE):
                if source * self.SIZE + place in self.memory:
                    self.memory[target * self.SIZE + place] = self.memory[source * self.SIZE + place]
        self.texts[request][1].extend(tokens)

    def alone(self, request: str) -> bool:
        """Whether nobody else holds the blocks that this request has still to write."""
        blocks = self.manager.block_table(request)[self.written[request] // self.SIZE :]
        return all(self.manager.ref_count(block) == 1 for block in blocks)

    @rule(target=requests, request=requests)
    def fork(self, request: str):
        child = self.new_name()
        if request in self.texts and self.written[request] == len(self.texts[request][1]):
            self.manager.fork(request, child)
            salt, tokens = self.texts[request]
            self.texts[child], self.written[child] = (salt, list(tokens)), self.written[request]
        return child

    @rule(request=requests, data=st.data())
    def shorten(self, request: str, data) -> None:
        if request in self.texts:
            tokens = self.texts[request][1]
            keep = data.draw(st.integers(1, len(tokens)))
            self.manager.shorten(request, keep)
            del tokens[keep:]
            self.written[request] = min(self.written[request], keep)

    @rule(request=consumes(requests))
    def release(self, request: str) -> None:
        if request in self.texts:
            self.manager.release(request)
            del self.texts[request], self.written[request]
        else:
            with pytest.raises(ValueError, match="no request"):
                self.manager.release(request)

    @invariant()
    def every_block_is_free_or_held_by_as_many_as_the_tables_say(self) -> None:
        holders = [block for request in self.texts for block in self.manager.block_table(request)]
        assert all(self.manager.ref_count(block) == holders.count(block) for block in range(self.BLOCKS))
        assert self.manager.num_free == self.BLOCKS - len(set(holders))

    @invariant()
    def every_request_has_the_blocks_for_its_tokens_and_no_more(self) -> None:
        assert self.manager.tables.keys() == self.texts.keys()
        for request, (_, tokens) in self.texts.items():
            table = self.manager.table(request)
            assert table.tokens == tokens
            assert len(table.blocks) == self.manager.blocks_for(len(tokens))
            assert len(set(table.blocks)) == len(table.blocks)

    @invariant()
    def every_written_slot_holds_what_its_request_would_have_written(self) -> None:
        for request, (salt, tokens) in self.texts.items():
            for place, slot in enumerate(self.manager.slots(request, 0, self.written[request])):
                assert self.memory[slot] == (salt, *tokens[: place + 1])


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
