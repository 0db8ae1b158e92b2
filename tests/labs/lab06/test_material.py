"""Lab 06's traces and its story of blocks, by what must hold of any memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.labs.lab06 import material
from labkit.labs.lab06.references import BlockAllocator

TRACES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=12)


@given(TRACES, st.integers(80, 400))
def test_reserved_rooms_add_up_and_every_token_of_every_answer_takes_a_step(trace, slots: int) -> None:
    prompts, answers = zip(*trace, strict=True)
    moments = material.reserving(prompts, answers, slots, room=80)
    for moment in moments:
        assert moment.held + moment.reserved + moment.never == 80 * moment.running <= slots
    assert sum(moment.running for moment in moments) == sum(answers) + len(trace)


@given(TRACES, st.integers(80, 400), st.integers(1, 16))
def test_blocks_never_exceed_memory_leave_less_than_one_block_each_and_end_every_request(
    trace, slots, block_size
) -> None:
    prompts, answers = zip(*trace, strict=True)
    slots = max(slots, 80 + block_size)
    moments = material.paging(prompts, answers, slots, block_size)
    for moment in moments:
        assert moment.held + moment.never <= slots
        assert 0 <= moment.never <= moment.running * (block_size - 1)
        assert moment.running > 0
    assert moments[-1].done < len(trace) <= moments[-1].done + moments[-1].running


def test_with_memory_for_all_both_ways_take_the_longest_answers_steps() -> None:
    prompts, answers = (3, 5, 2), (7, 2, 9)
    for moments in (material.reserving(prompts, answers, 60, 20), material.paging(prompts, answers, 60, 4)):
        assert len(moments) == 10
        assert moments[0].running == 3


@pytest.mark.parametrize(
    "way", [lambda *a: material.reserving(*a, room=32), lambda *a: material.paging(*a, block_size=4)]
)
def test_a_request_without_any_room_is_refused(way) -> None:
    with pytest.raises(ValueError, match="every request must fit"):
        way((30,), (10,), 36)


@pytest.mark.parametrize("allocator", [None, BlockAllocator], ids=["the engine's", "a learner's"])
def test_the_story_accounts_for_every_block_at_every_moment(allocator) -> None:
    scenes = material.story(allocator)
    for scene in scenes:
        holders: dict[int, set[str]] = {}
        for name, (blocks, tokens) in scene.tables.items():
            assert len(blocks) == -(-tokens // 4)
            for block in blocks:
                holders.setdefault(block, set()).add(name)
        assert {block: set(owners) for block, owners in scene.owners.items()} == holders
        assert not scene.found & scene.owners.keys()
    assert any(len(owners) > 1 for owners in scenes[8].owners.values())
    assert len(scenes[13].owners) == 16
    assert scenes[-1].owners == {}
    assert scenes[-1].found


def test_the_story_tells_what_its_tables_show() -> None:
    scenes = material.story()
    before, after = (scene.tables["berta 2"][0] for scene in scenes[7:9])
    assert f"block {before[-1]} is copied to {after[-1]}" in scenes[8].text
    assert material.names_in(scenes) == ["anna", "berta", "clara", "berta 2", "dora", "emil"]
