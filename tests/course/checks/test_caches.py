"""Caches that learners wrote stand beside what was appended to them."""

from __future__ import annotations

import pytest
import torch

from labkit.course.checks.caches import (
    Beside,
    Sizes,
    check_device,
    check_isolation,
    check_methods,
    check_read_is_free,
    check_seq_len,
    read_pair,
    run_script,
)
from labkit.course.exercise import NotYet
from labkit.labs.lab02.references import GrowingCache, PreallocatedCache
from tests.course.exercises import Double

ROOMY = [Sizes(), Sizes(3, 5, 6, torch.bfloat16), Sizes(1, 2, 8, torch.float64)]
NARROW = [Sizes(capacity=8), Sizes(3, 5, 6, torch.bfloat16, capacity=11)]


def said(run) -> str:
    """The diagnosis, or that there is none."""
    try:
        run()
    except NotYet as not_yet:
        return not_yet.finding.diagnosis
    return "nothing"


class OnTheClass:
    kept = torch.ones(3)


class ByView(GrowingCache):
    def append(self, k, v):
        super().append(k.view(k.shape), v.reshape(-1).view(v.shape) if v.is_contiguous() else v.view(-1))


class CapacityOnTheClass(PreallocatedCache):
    capacity = 0

    def __init__(self, capacity):
        super().__init__(capacity)
        del self.capacity
        type(self).capacity = capacity


class Third(GrowingCache):
    """Loses a token at the third append."""

    def append(self, k, v):
        super().append(k, v)
        self.appends = getattr(self, "appends", 0) + 1
        if self.appends == 3:
            self.k, self.v = self.k[:, :, 1:], self.v[:, :, 1:]


@pytest.mark.parametrize(
    ("make", "diagnosis"),
    [
        (lambda sizes: GrowingCache(), "nothing"),
        (lambda sizes: ByView(), "layout"),
        (lambda sizes: Third(), "tokens-lost"),
    ],
)
def test_a_script_of_appends_tells_what_a_growing_cache_does(make, diagnosis: str) -> None:
    assert said(lambda: run_script(Double, make, ROOMY)) == diagnosis


@pytest.mark.parametrize(
    ("make", "diagnosis"),
    [
        (lambda sizes: PreallocatedCache(sizes.capacity), "nothing"),
        (lambda sizes: CapacityOnTheClass(sizes.capacity), "shared-between-caches"),
        (lambda sizes: PreallocatedCache(sizes.capacity + 1), "overflow"),
        (lambda sizes: PreallocatedCache(sizes.capacity - 1), "raised"),
        (lambda sizes: GrowingCache(), "overflow"),
    ],
)
def test_a_script_of_appends_and_refusals_tells_what_a_cache_with_room_does(make, diagnosis: str) -> None:
    assert said(lambda: run_script(Double, make, NARROW)) == diagnosis


def test_a_script_is_the_same_each_time_and_its_tensors_hold_fractions_and_large_numbers() -> None:
    def log() -> list[int]:
        sizes: list[int] = []

        class Noting(GrowingCache):
            def append(self, k, v):
                super().append(k, v)
                sizes.append(k.shape[2])

        run_script(Double, lambda sizes: Noting(), ROOMY)
        return sizes

    assert log() == log()
    k, v = Sizes().tokens(200)
    assert not torch.equal(k, k.half().float())
    assert not torch.equal(v, v.bfloat16().float())
    assert Sizes(dtype=torch.bfloat16).tokens(2)[0].dtype == torch.bfloat16


def test_a_mistake_that_gives_what_was_read_is_asked_for_before_a_neutral_finding() -> None:
    asked = []
    beside = Beside(Double, lambda sizes: Third(), Sizes(), lambda beside, got, want: asked.append(got[0].shape[2]))
    beside.add(2)
    beside.add(1)
    with pytest.raises(NotYet, match=r"after appends of 2, 1, 4 tokens .*: read\(\) gives 6 tokens"):
        beside.add(4)
    assert asked == [6]


def test_a_refusal_may_change_neither_the_length_nor_the_memory_nor_what_is_read() -> None:
    class Allocates(PreallocatedCache):
        def append(self, k, v):
            self.spare = k.new_empty(2, *k.shape[:2], self.capacity, k.shape[3])
            super().append(k, v)

    class Empties(PreallocatedCache):
        def append(self, k, v):
            if self.seq_len + k.shape[2] > self.capacity and self.seq_len:
                self.k.zero_()
            super().append(k, v)

    for kind in (Allocates, Empties):
        beside = Beside(Double, lambda sizes, kind=kind: kind(sizes.capacity), Sizes(capacity=4))
        if kind is Empties:
            beside.add(2)
        assert said(lambda: beside.add(5)) == "half-done"  # noqa: B023


def test_memory_shared_by_two_caches_is_said() -> None:
    assert said(lambda: check_isolation(Double, OnTheClass(), OnTheClass())) == "shared-between-caches"


def test_a_cache_without_its_methods_and_a_read_that_gives_no_pair_are_said() -> None:
    assert said(lambda: check_methods(Double, OnTheClass())) == "missing-method"
    for both, diagnosis in (
        (None, "not-a-pair"),
        (torch.ones(2), "not-a-pair"),
        ((torch.ones(2), 1), "not-a-pair"),
        ((None, None), "nothing-stored"),
        ((torch.ones(2), None), "nothing-stored"),
        ([torch.ones(2), torch.ones(2)], "nothing"),
    ):
        cache = type("Read", (), {"read": lambda self, both=both: both})()
        assert said(lambda: read_pair(Double, cache)) == diagnosis  # noqa: B023


@pytest.mark.parametrize(
    ("seq_len", "diagnosis"),
    [
        (3, "nothing"),
        (torch.tensor(3), "nothing"),
        (3.0, "seq-len"),
        (2, "seq-len"),
        (None, "seq-len"),
        (lambda: 3, "seq-len-method"),
    ],
)
def test_the_length_is_a_whole_number_and_the_right_one(seq_len, diagnosis: str) -> None:
    class Cache:
        pass

    cache = Cache()
    cache.seq_len = seq_len
    assert said(lambda: check_seq_len(Double, cache, 3, "after three")) == diagnosis


def test_what_was_counted_in_place_of_tokens_is_named_only_where_one_thing_fits() -> None:
    cache = type("Cache", (), {"seq_len": 2})()
    for others, cause in (({"appends": 2}, "appends"), ({"appends": 2, "rows": 2}, "tokens are not counted")):
        with pytest.raises(NotYet) as caught:
            check_seq_len(Double, cache, 5, "then", others)
        assert caught.value.finding.cause.startswith(cause)


def test_reading_may_not_copy_nor_leave_pytorch() -> None:
    class Contiguous(PreallocatedCache):
        def read(self):
            return tuple(x.contiguous() for x in super().read())

    class Numpy(PreallocatedCache):
        def read(self):
            return tuple(torch.from_numpy(x.numpy()) for x in super().read())

    for kind, diagnosis in ((PreallocatedCache, "nothing"), (Contiguous, "read-copies"), (Numpy, "left-pytorch")):
        beside = Beside(Double, lambda sizes, kind=kind: kind(sizes.capacity), Sizes(capacity=9))
        beside.add(3)
        assert said(lambda: check_read_is_free(Double, beside)) == diagnosis  # noqa: B023


def test_memory_on_the_cpu_is_told_from_a_class_that_looks_at_numbers() -> None:
    class OnTheCpu(PreallocatedCache):
        def append(self, k, v):
            self.spare = torch.zeros(k.shape)
            super().append(k, v)

    class Looks(PreallocatedCache):
        def append(self, k, v):
            assert not k.isnan().any()
            super().append(k, v)

    for kind, diagnosis in ((PreallocatedCache, "nothing"), (Looks, "nothing"), (OnTheCpu, "wrong-device")):
        assert said(lambda: check_device(Double, lambda s: kind(s.capacity), Sizes(capacity=4))) == diagnosis  # noqa: B023
