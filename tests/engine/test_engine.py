"""Every answer is the one that its request gets alone, and every block comes back, whatever happens in between."""

from __future__ import annotations

import signal
import threading
from collections import Counter

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from labkit.cache import Cache, OutOfBlocks, PagedCache, Pages
from labkit.engine import Allocator, BlockManager, Engine, Request
from labkit.engine.engine import WithoutPlans
from tests.engine import tiny


@pytest.fixture
def inside():
    """What to do in the middle of a pass, in the model's second layer."""
    acts: list = []

    def hook(*_) -> None:
        for act in acts:
            act()

    handle = tiny.model().blocks[1].register_forward_pre_hook(hook)
    yield acts
    handle.remove()


def some_requests(count: int = 8, **options) -> list[Request]:
    """Ragged prompts of 1 to 22 tokens, answers of 1 to 12."""
    return [
        Request(
            f"r{i}", [(5 * i + 3 * j * j + j) % tiny.VOCAB for j in range(3 * i % 23 + 1)], 5 * i % 12 + 1, **options
        )
        for i in range(count)
    ]


def raising(error: BaseException):
    """What raises it once, and then does nothing."""
    left = [error]

    def act() -> None:
        if left:
            raise left.pop()

    return act


def is_whole(engine: Engine) -> bool:
    """Whether every request and block is accounted for."""
    running, waiting = ([flight.id for flight in some] for some in (engine.scheduler.running, engine.scheduler.waiting))
    holders = Counter(block for table in engine.blocks.tables.values() for block in table.blocks)
    return (
        sorted(running + waiting) == sorted(engine.flights)
        and sorted(engine.blocks.tables) == sorted(running)
        and engine.blocks.num_free == engine.blocks.num_blocks - len(holders)
        and all(engine.blocks.ref_count(block) == holders[block] for block in range(engine.blocks.num_blocks))
    )


class TestAnswers:
    @pytest.mark.parametrize("block_size", [1, 3, 16])
    @pytest.mark.parametrize("token_budget", [1, 5, 64])
    def test_are_those_of_one_at_a_time_whatever_the_mix_and_the_chunks(
        self, block_size: int, token_budget: int
    ) -> None:
        requests = some_requests()
        engine = Engine(tiny.model(), 400 // block_size, block_size, token_budget=token_budget)
        assert engine.run(requests) == {request.id: tiny.alone(request) for request in requests}
        assert engine.blocks.usage == 0

    def test_are_the_same_when_requests_are_preempted(self) -> None:
        requests = [Request(str(i), [1, i], 12) for i in range(6)]
        engine = Engine(tiny.model(), 20, 1)
        assert engine.run(requests) == {request.id: tiny.alone(request) for request in requests}
        assert engine.metrics()["vllm:num_preemptions"] > 2
        assert engine.blocks.usage == 0

    @pytest.mark.parametrize("reuse", [True, False])
    def test_are_the_same_when_their_beginning_was_there_and_the_last_token_is_run_all_the_same(
        self, reuse: bool
    ) -> None:
        prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
        engine = Engine(tiny.model(), 64, 3, reuse=reuse)
        for id, tokens, reused in (("a", prompt, 0), ("b", prompt, 6), ("c", [*prompt, 1], 9), ("d", [2, *prompt], 0)):
            request = Request(id, tokens, 6)
            assert engine.run([request])[id] == tiny.alone(request)
            assert engine.finished[id].reused == (reused if reuse else 0)
        assert engine.metrics()["vllm:prefix_cache_hits"] == (15 if reuse else 0)
        assert engine.metrics()["vllm:prefix_cache_queries"] == 38

    def test_are_the_same_when_a_window_hides_what_is_far(self) -> None:
        model, requests = tiny.model(window=4), some_requests()
        engine = Engine(model, 40, 3, token_budget=7)
        assert engine.run(requests) == {request.id: tiny.alone(request, model) for request in requests}

    def test_in_float32_through_the_kernels_differ_at_most_where_two_tokens_are_equally_likely(self) -> None:
        """Bounded: logits of some units, sums of up to 40 terms in another order; a tie is nearer than 1e-4."""
        model, requests = tiny.model(torch.float32), some_requests(16)
        answers = Engine(model, 60, 3, token_budget=9).run(requests)
        for request in requests:
            wanted, got = tiny.alone(request, model), answers[request.id]
            assert len(got) == len(wanted)
            if got != wanted:
                same = next(i for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if a != b)
                logits = model(torch.tensor([[*request.tokens, *wanted[:same]]]), last_only=True)[0, 0]
                assert logits.max() - logits[got[same]] < 1e-4

    def test_drawn_with_a_seed_are_those_of_the_seed_alone(self) -> None:
        requests = [Request(str(i), [1, i], 12, temperature=0.8, seed=7) for i in range(6)]
        engine = Engine(tiny.model(), 20, 1, token_budget=9)
        assert engine.run(requests) == {request.id: tiny.alone(request) for request in requests}
        assert engine.metrics()["vllm:num_preemptions"] > 0

    def test_drawn_without_a_seed_differ(self) -> None:
        requests = [Request(str(i), [1, 2], 10, temperature=2.0) for i in range(4)]
        assert len({tuple(answer) for answer in Engine(tiny.model(), 40, 3).run(requests).values()}) > 1

    def test_end_at_a_stop_token_which_is_no_part_of_them(self) -> None:
        whole = tiny.alone(Request("a", [1, 2, 3], 10))
        request = Request("a", [1, 2, 3], 10, stop={whole[4]})
        engine = Engine(tiny.model(), 40, 3)
        engine.add(request)
        tokens = list(engine.stream())
        assert [token.token for token in tokens] == whole[: whole.index(whole[4]) + 1]
        assert [token.finished for token in tokens] == [None] * (len(tokens) - 1) + ["stop"]
        assert engine.run([request])["a"] == tiny.alone(request)

    def test_come_token_by_token_in_order(self) -> None:
        engine = Engine(tiny.model(), 60, 3, token_budget=8)
        requests = some_requests(4)
        for request in requests:
            engine.add(request)
        tokens = list(engine.stream())
        for request in requests:
            mine = [token for token in tokens if token.id == request.id]
            assert [token.token for token in mine] == tiny.alone(request)
            assert [token.index for token in mine] == list(range(request.max_new_tokens))
            assert [token.finished for token in mine] == [None] * (len(mine) - 1) + ["length"]

    def test_are_not_lost_when_a_stream_is_left_early(self) -> None:
        engine, requests = Engine(tiny.model(), 60, 3), some_requests(4)
        for request in requests:
            engine.add(request)
        tokens = []
        while engine.flights:
            for token in engine.stream():
                tokens.append(token)
                break
        tokens += engine.stream()
        for request in requests:
            assert [token.token for token in tokens if token.id == request.id] == tiny.alone(request)

    def test_may_be_asked_for_beside_those_that_run_already(self) -> None:
        first, second = some_requests(2)[1], Request("x", [4, 5], 3)
        engine = Engine(tiny.model(), 60, 3)
        engine.add(first)
        assert engine.run([second]) == {"x": tiny.alone(second)}
        assert [token.token for token in engine.stream()] == tiny.alone(first)


class TestMemory:
    def test_as_many_run_as_fit_and_the_others_wait_their_turn(self) -> None:
        engine = Engine(tiny.model(), 8, 4)
        for i in range(4):
            engine.add(Request(str(i), [1, i] * 5, 3))
        engine.step()
        assert [flight.id for flight in engine.scheduler.running] == ["0", "1"]  # 3 blocks each, 1 stays free for each
        assert engine.metrics()["vllm:kv_cache_usage_perc"] == 6 / 8
        assert (engine.metrics()["vllm:num_requests_running"], engine.metrics()["vllm:num_requests_waiting"]) == (2, 2)
        assert [token.id for token in engine.stream() if token.finished] == ["0", "1", "2", "3"]

    def test_a_pass_holds_no_more_tokens_and_rows_than_it_may(self, monkeypatch) -> None:
        model, passes = tiny.model(), []
        forward = type(model).forward

        def watched(self, rows, *args, **options):
            passes.append([len(row) for row in rows])
            return forward(self, rows, *args, **options)

        monkeypatch.setattr(type(model), "forward", watched)
        Engine(model, 60, 3, token_budget=6, max_rows=3).run(some_requests())
        assert max(map(sum, passes)) == 6
        assert max(map(len, passes)) == 3
        assert any(
            max(counts) > 1 and min(counts) == 1 and len(counts) > 1 for counts in passes
        )  # chunks beside answers

    def test_the_first_that_runs_is_never_preempted(self) -> None:
        engine = Engine(tiny.model(), 8, 2, reuse=False)
        for i in range(3):
            engine.add(Request(str(i), [1, i], 12))
        list(engine.stream())
        assert engine.finished["0"].preemptions == 0
        assert sum(timing.preemptions for timing in engine.finished.values()) > 0

    def test_who_was_preempted_waits_in_front_of_those_that_came_later(self) -> None:
        engine = Engine(tiny.model(), 8, 2, max_rows=2)
        for i in range(4):
            engine.add(Request(str(i), [1, i], 12))
        while not engine.scheduler.preemptions:
            engine.step()
        assert [flight.id for flight in engine.scheduler.running] == ["0"]
        assert [flight.id for flight in engine.scheduler.waiting] == ["1", "2", "3"]

    def test_no_tenant_finds_what_another_wrote(self) -> None:
        engine = Engine(tiny.model(), 64, 3)
        for id, salt, reused in (("a", "one", 0), ("b", "another", 0), ("c", "", 0), ("d", "one", 6)):
            engine.run([Request(id, range(1, 10), 2, salt=salt)])
            assert engine.finished[id].reused == reused

    def test_snapshots_show_who_holds_what(self) -> None:
        engine = Engine(tiny.model(), 12, 3, record=True)
        engine.run([Request("a", range(1, 8), 2), Request("b", range(1, 8), 2)])
        assert engine.history[0].owners == {0: ("a",), 1: ("a",), 2: ("a",), 3: ("b",), 4: ("b",), 5: ("b",)}
        assert engine.history[0].running == {"a": (7, 7), "b": (7, 7)}
        assert engine.history[-1].owners == {}
        assert len(engine.history) == 2


class TestCancelling:
    def at(self, engine: Engine, steps: int) -> set[str]:
        """So many steps after six requests came; who got a token in the last."""
        for request in some_requests(6):
            engine.add(request)
        tokens = []
        for _ in range(steps):
            tokens = engine.step()
        return {token.id for token in tokens}

    @pytest.mark.parametrize("steps", range(12))
    def test_frees_the_blocks_at_once_and_leaves_the_others_their_answers(self, steps: int) -> None:
        engine = Engine(tiny.model(), 12, 3, token_budget=5)
        self.at(engine, steps)
        held = len(engine.blocks.tables["r5"].blocks) if "r5" in engine.blocks.tables else 0
        free = engine.blocks.num_free
        assert engine.cancel("r5")
        assert (engine.blocks.num_free, is_whole(engine)) == (free + held, True)
        tokens = list(engine.stream())
        last = [token for token in tokens if token.id == "r5"]
        assert [(token.token, token.finished) for token in last] == [(None, "cancelled")]
        assert engine.finished["r5"].finished == "cancelled"
        assert engine.blocks.usage == 0

    def test_works_between_the_plan_of_a_pass_and_the_pass(self, monkeypatch) -> None:
        engine = Engine(tiny.model(), 40, 3)
        run = engine._pass
        for request in some_requests(3):
            engine.add(request)
        monkeypatch.setattr(engine, "_pass", lambda chunks: (engine.cancel("r1"), run(chunks))[1])
        tokens = engine.step()
        monkeypatch.undo()
        tokens += engine.stream()
        for request in some_requests(3):
            mine = [token.token for token in tokens if token.id == request.id]
            assert mine == ([None] if request.id == "r1" else tiny.alone(request))
        assert engine.blocks.usage == 0

    def test_works_in_the_middle_of_a_pass_and_from_another_thread(self, inside) -> None:
        engine = Engine(tiny.model(), 40, 3)
        first = self.at(engine, 1)

        def cancel() -> None:
            inside.clear()
            thread = threading.Thread(target=engine.cancel, args=("r5",))
            thread.start()
            thread.join(timeout=10)

        inside.append(cancel)
        tokens = engine.step()
        assert [token.finished for token in tokens if token.id == "r5"] == ["cancelled"]
        assert is_whole(engine)
        tokens += engine.stream()
        wanted = {request.id: request.max_new_tokens - (request.id in first) for request in some_requests(5)}
        assert Counter(token.id for token in tokens if token.token is not None) == Counter(wanted)
        assert engine.blocks.usage == 0

    def test_of_one_that_ended_says_so_and_of_one_unknown_is_an_error(self) -> None:
        engine = Engine(tiny.model(), 40, 3)
        engine.run([Request("a", [1], 1)])
        assert engine.cancel("a") is False
        with pytest.raises(ValueError, match="no request 'b'"):
            engine.cancel("b")


class TestFailures:
    @pytest.mark.parametrize("error", [RuntimeError("out of memory"), OutOfBlocks("none"), KeyboardInterrupt()])
    @pytest.mark.parametrize("steps", [0, 1, 4])
    def test_in_a_pass_leave_everything_as_it_was_and_the_next_step_goes_on(self, inside, error, steps: int) -> None:
        engine, requests = Engine(tiny.model(), 16, 3, token_budget=6), some_requests(6)
        for request in requests:
            engine.add(request)
        tokens = [token for _ in range(steps) for token in engine.step()]
        inside.append(raising(error))
        with pytest.raises(type(error)):
            engine.step()
        assert is_whole(engine)
        tokens += engine.stream()
        for request in requests:
            assert [token.token for token in tokens if token.id == request.id] == tiny.alone(request)
        assert engine.blocks.usage == 0

    def test_a_failed_step_has_drawn_nothing(self, monkeypatch) -> None:
        request = Request("a", [1, 2], 6, temperature=1.0, seed=3)
        engine = Engine(tiny.model(), 16, 3)
        engine.add(request)
        enter, act = engine._enter, raising(KeyboardInterrupt())
        monkeypatch.setattr(engine, "_enter", lambda *what: (act(), enter(*what)))  # behind the draw
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        assert [token.token for token in engine.stream()] == tiny.alone(request)

    def test_an_interrupt_waits_until_the_books_are_right_and_loses_no_token(self) -> None:
        class Interrupted(Allocator):
            def take(self) -> int:
                if self.num_free == 4:
                    signal.raise_signal(signal.SIGINT)
                return super().take()

        engine = Engine(tiny.model(), 10, 3, allocator=Interrupted(10))
        requests = [Request("a", [1] * 8, 5), Request("b", [2] * 8, 5)]
        for request in requests:
            engine.add(request)
        tokens, interrupts = [], 0
        while engine.flights:
            try:
                tokens += engine.step()
            except KeyboardInterrupt:
                interrupts += 1
                assert is_whole(engine)
        assert interrupts > 0
        for request in requests:
            assert [token.token for token in tokens if token.id == request.id] == tiny.alone(request)

    @pytest.mark.parametrize("torn", ["layer", "cache"])
    def test_a_cache_torn_by_an_interrupt_is_filled_anew(self, torn: str) -> None:
        engine, requests = Engine(tiny.model(), 30, 3), some_requests(4)
        for request in requests:
            engine.add(request)
        tokens = engine.step()
        (engine.cache if torn == "cache" else engine.cache[1]).torn = True
        tokens += engine.stream()
        for request in requests:
            assert [token.token for token in tokens if token.id == request.id] == tiny.alone(request)
        assert engine.blocks.usage == 0

    def test_a_request_whose_logits_are_no_numbers_ends_alone_and_leaves_nothing_to_be_found(self) -> None:
        model = tiny.model(torch.float32)
        spoiled = type(model)(model.spec)
        spoiled.load_state_dict(model.state_dict())
        spoiled.embedding.weight.data[7] = float("nan")
        engine = Engine(spoiled, 30, 3, token_budget=8)
        fine = Request("fine", [1, 2], 5)
        engine.add(fine)
        engine.add(Request("spoiled", [1, 7, 3, 4, 5, 1, 2, 3, 4, 5], 3))  # in two chunks: the first ends it
        tokens = list(engine.stream())
        assert [t.token for t in tokens if t.id == "fine"] == tiny.alone(fine, model)
        assert [(t.token, t.index, t.finished) for t in tokens if t.id == "spoiled"] == [(None, 0, "not finite")]
        assert engine.finished["spoiled"].finished == "not finite"
        assert not engine.cancel("spoiled")
        assert engine.blocks.reusable([1, 7, 3, 4]) == 0
        assert engine.blocks.usage == 0

    def test_only_the_newest_that_ended_are_kept_and_all_are_counted(self) -> None:
        engine = Engine(tiny.model(), 60, 3, keep=3)
        requests = some_requests(9)
        answers = engine.run(requests)
        assert len(engine.finished) == 3
        said = engine.metrics()
        assert said["vllm:generation_tokens"] == sum(map(len, answers.values()))
        assert said["vllm:time_to_first_token_seconds_count"] == 9
        ended = list(engine.finished)
        with pytest.raises(ValueError, match="no request"):
            engine.cancel(next(request.id for request in requests if request.id not in ended))

    @pytest.mark.parametrize(
        "said", [{"num_blocks": 8}, {"block_size": 4}, {"reuse": False}, {"allocator": Allocator(8)}]
    )
    def test_what_a_manager_says_is_not_said_besides(self, said: dict) -> None:
        with pytest.raises(ValueError, match=f"a block manager has its own {next(iter(said))}"):
            Engine(tiny.model(), manager=BlockManager(8, 4), **said)

    def test_run_leaves_none_of_its_requests_behind(self, inside) -> None:
        engine = Engine(tiny.model(), 30, 3)
        other = Request("other", [3, 4], 4)
        engine.add(other)
        inside.append(raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            engine.run(some_requests(4))
        assert list(engine.flights) == ["other"]
        with pytest.raises(ValueError, match="'other' already"):
            engine.run([*some_requests(2), other])
        assert list(engine.flights) == ["other"]
        assert [token.token for token in engine.stream()] == tiny.alone(other)

    def test_one_step_at_a_time(self, inside) -> None:
        engine = Engine(tiny.model(), 30, 3)
        engine.add(Request("a", [1, 2], 2))
        inside.append(engine.step)
        with pytest.raises(RuntimeError, match="a step is running already"):
            engine.step()
        inside.clear()
        assert len(list(engine.stream())) == 2

    def test_an_allocator_that_never_frees_ends_in_an_error_not_in_silence(self) -> None:
        class Leaking(Allocator):
            def drop(self, block: int, *, keep: bool = False) -> bool:
                return False

        for tokens, count in (2, 6), (10, 1):  # there is no block for the next token, or for the next request
            engine = Engine(tiny.model(), 8, 3, allocator=Leaking(8))
            with pytest.raises(OutOfBlocks):
                engine.run([Request(str(i), [1 + i] * tokens, count) for i in range(5)])
            assert not engine.flights


class TestBadInput:
    @pytest.mark.parametrize(
        ("make", "said"),
        [
            (lambda: Request("a", [], 1), "'a' has no tokens"),
            (lambda: Request("a", [1.5], 1), "whole numbers, 0 or more; got 1.5"),
            (lambda: Request("a", [-1], 1), "whole numbers, 0 or more; got -1"),
            (lambda: Request("a", [1], 0), "max_new_tokens is a whole number, at least 1; got 0"),
            (lambda: Request("a", [1], 2.5), "max_new_tokens is a whole number"),
            (lambda: Request("a", [1], 1, temperature=-1), "temperature is a number, 0 or more"),
            (
                lambda: Request("a", [1], 1, temperature=float("nan")),
                "temperature is a number, 0 or more, and finite; got nan",
            ),
            (lambda: Request("a", [1], 1, seed="x"), "seed is a whole number of 64 bits or None; got 'x'"),
            (lambda: Request("a", [1], 1, seed=2**70), "seed is a whole number of 64 bits or None"),
            (lambda: Request("a", [1], 1, temperature="hot"), "temperature is a number, 0 or more"),
            (lambda: Request("a", [1], 1, salt="\ud800"), "is no text that UTF-8 can write"),
            (lambda: Request("a", [1], 1, stop=[-2]), "whole numbers, 0 or more; got -2"),
            (lambda: Request(3, [1], 1), "id and salt are strings; got 3"),
            (lambda: Request("a", [1], 1, salt=None), "id and salt are strings"),
            (lambda: Request("a", [tiny.VOCAB], 1), "ids from 0 to 12; got 13"),
            (lambda: Request("a", [1] * 60, 5), "60 tokens and asks for 5: the model has positions for 64"),
            (lambda: Request("a", [1] * 30, 2), "30 tokens and asks for 2: 10 blocks of 3 have no room"),
            (lambda: Request("b", [1], 1), "a request 'b' already"),
        ],
    )
    def test_is_one_clear_line_and_no_block_is_lost(self, make, said: str) -> None:
        engine = Engine(tiny.model(), 10, 3)
        engine.add(Request("b", [1, 2], 2))
        engine.step()
        free = engine.blocks.num_free
        with pytest.raises(ValueError, match=said):
            engine.add(make())
        assert (list(engine.flights), engine.blocks.num_free, is_whole(engine)) == (["b"], free, True)

    def test_the_longest_request_that_fits_is_answered(self) -> None:
        request = Request("a", [1, 2, 3] * 9, 4)
        assert Engine(tiny.model(), 10, 3).run([request])["a"] == tiny.alone(
            request
        )  # 30 tokens are run, the last is not

    @pytest.mark.parametrize(
        ("make", "said"),
        [
            (lambda m: Engine(m, 10, 0), "block_size is a whole number, at least 1; got 0"),
            (lambda m: Engine(m, 0), "num_blocks is a whole number, at least 1; got 0"),
            (lambda m: Engine(m, token_budget=0), "token_budget is a whole number, at least 1; got 0"),
            (lambda m: Engine(m, max_rows=1.5), "max_rows is a whole number, at least 1; got 1.5"),
            (lambda m: Engine(m, 8, allocator=Allocator(4)), "the allocator has 4 free blocks; 8 are needed"),
            (lambda m: Engine(m, 8, cache=Cache.paged(3, 8)), "the cache has 3 layers, the model 2"),
            (lambda m: Engine(m, 8, cache=Cache.paged(2, 8, window=4)), "window=4"),
            (lambda m: Engine(m, 8, cache=Cache.paged(2, 9)), "the block manager has 8 blocks of 16 tokens"),
            (lambda m: Engine(m, 8, cache=Cache.paged(2, 8, 3)), "the block manager has 8 blocks of 16 tokens"),
            (lambda m: Engine(m, 8, cache=m.cache(20)), "whose layers share their Pages"),
            (lambda m: Engine(m, 8, cache=Cache.of(2, lambda: PagedCache(Pages(8)))), "whose layers share their Pages"),
            (lambda m: Engine(m, manager=used_manager()), "the block manager was used"),
            (lambda m: Engine(m, 8, cache=used_cache()), "an engine's cache is unused"),
        ],
    )
    def test_what_does_not_fit_the_model_is_refused(self, make, said: str) -> None:
        with pytest.raises(ValueError, match=said):
            make(tiny.model())


def used_manager() -> BlockManager:
    manager = BlockManager(8, 16)
    manager.admit("a", [1])
    manager.release("a")
    return manager


def used_cache() -> Cache:
    """A cache that holds another shape's K and V."""
    cache = Cache.paged(2, 8)
    for layer in cache.layers:
        layer.append(torch.zeros(1, 3, 1, 4), torch.zeros(1, 3, 1, 4))
    return cache


def test_times_and_counts_have_vllms_names() -> None:
    engine = Engine(tiny.model(), 40, 3)
    engine.run(some_requests(3))
    engine.add(Request("waits", [1], 1))
    said = engine.metrics()
    assert said["vllm:generation_tokens"] == sum(timing.new_tokens for timing in engine.finished.values()) == 18
    assert (said["vllm:time_to_first_token_seconds_count"], said["vllm:num_requests_waiting"]) == (3, 1)
    assert said["vllm:request_time_per_output_token_seconds_count"] == 2  # an answer of one token has none
    engine.run([Request("r1", [1], 2)])  # an id that was there before: nothing is counted less
    assert engine.metrics()["vllm:generation_tokens"] == 18 + 1 + 2
    for timing in engine.finished.values():
        assert 0 <= timing.queue_time <= timing.ttft
        assert timing.finished == "length"


class Served(RuleBasedStateMachine):
    """Requests arrive, end, are cancelled and preempted; passes, allocations and the cache fail. At the end every
    answer is the one-at-a-time answer, and every block is free."""

    BLOCKS, SIZE = 9, 3

    def __init__(self) -> None:
        super().__init__()
        machine = self

        class Failing(Allocator):
            def take(self) -> int:
                if machine.no_block:
                    machine.no_block -= 1
                    if not machine.no_block:
                        raise machine.error
                return super().take()

        self.no_block = self.no_layer = 0
        self.error: BaseException = OutOfBlocks("none, says the test")
        self.handle = tiny.model().blocks[1].register_forward_pre_hook(self.in_the_model)
        allocator = Failing(self.BLOCKS)
        self.engine = Engine(tiny.model(), self.BLOCKS, self.SIZE, token_budget=7, max_rows=3, allocator=allocator)
        self.asked: dict[str, Request] = {}
        self.got: dict[str, list[int]] = {}
        self.ended: dict[str, str] = {}

    def in_the_model(self, *_) -> None:
        if self.no_layer:
            self.no_layer = 0
            raise self.error

    def take(self, tokens) -> None:
        for token in tokens:
            assert token.id not in self.ended, "a token behind the last"
            if token.finished != "cancelled":
                assert token.index == len(self.got[token.id]), "a token is missing, or came twice"
            if token.finished in (None, "length"):
                self.got[token.id].append(token.token)
            if token.finished:
                self.ended[token.id] = token.finished

    PROMPTS = st.lists(st.integers(1, 2), min_size=1, max_size=20)

    @rule(
        tokens=PROMPTS,
        count=st.integers(1, 9),
        salt=st.sampled_from(["", "x"]),
        temperature=st.sampled_from([0, 0, 1.5]),
        stop=st.sets(st.integers(3, 6), max_size=1),
    )
    def arrive(self, tokens, count: int, salt: str, temperature: float, stop) -> None:
        id = f"r{len(self.asked)}"
        request = Request(id, tokens, count, salt=salt, temperature=temperature, seed=len(self.asked), stop=stop)
        if len(tokens) + count - 1 > self.BLOCKS * self.SIZE:
            with pytest.raises(ValueError, match="no room"):
                self.engine.add(request)
            return
        self.engine.add(request)
        self.asked[id], self.got[id] = request, []
        with pytest.raises(ValueError, match="already"):
            self.engine.add(request)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data) -> None:
        id = data.draw(st.sampled_from(sorted(self.asked)))
        assert self.engine.cancel(id) == (self.ended.get(id, "cancelled") == "cancelled")

    @rule(times=st.integers(1, 4))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.take(self.engine.step())

    @rule(error=st.sampled_from([OutOfBlocks, MemoryError, KeyboardInterrupt]))
    def fail_in_a_pass(self, error) -> None:
        self.no_layer, self.error = 1, error("in the model, says the test")
        self.step_that_may_fail()

    @rule(error=st.sampled_from([OutOfBlocks, MemoryError, KeyboardInterrupt]), at=st.integers(1, 5))
    def fail_to_allocate(self, error, at: int) -> None:
        self.no_block, self.error = at, error("at a block, says the test")
        self.step_that_may_fail()

    def step_that_may_fail(self) -> None:
        try:
            self.take(self.engine.step())
        except BaseException as raised:
            if raised is not self.error:
                raise
        self.no_block = self.no_layer = 0

    @rule(layer=st.integers(0, 1))
    def tear(self, layer: int) -> None:
        self.engine.cache[layer].torn = True

    @invariant()
    def everything_is_accounted_for(self) -> None:
        assert is_whole(self.engine)
        assert len(self.engine.scheduler.running) <= 3

    def teardown(self) -> None:
        self.handle.remove()
        self.take(self.engine.stream())
        assert self.ended.keys() == self.asked.keys()
        for id, request in self.asked.items():
            wanted = tiny.alone(request)
            assert self.got[id] == (wanted[: len(self.got[id])] if self.ended[id] == "cancelled" else wanted)
        assert self.engine.blocks.num_free == self.BLOCKS


TestServed = Served.TestCase
TestServed.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_attention_that_plans_each_length_is_off_during_a_pass_on_a_gpu_and_comes_back_when_the_last_is_done():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    outer, inner = WithoutPlans(torch.device("cuda")), WithoutPlans(torch.device("cuda"))
    with outer:
        with inner:
            assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
    with WithoutPlans(torch.device("cpu")):
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
