"""What an object keeps alive is found wherever it is hidden."""

from __future__ import annotations

import collections
import functools

import numpy as np
import pytest
import torch

from labkit.course.checks.held import bytes_behind, tensors_behind

X = torch.ones(100)


class Slots:
    __slots__ = ("_Slots__inner", "x")

    def __init__(self) -> None:
        self.x = None
        self.__inner = [X]


class Shared:
    kept: dict = {"x": X}  # noqa: RUF012


class Computed:
    def __init__(self) -> None:
        self.inner = Slots()


def closed_over():
    x = X
    return lambda: x


class Holder:
    def __init__(self, thing) -> None:
        self.thing = thing


def waiting():
    x = X
    yield x


def started():
    generator = waiting()
    next(generator)
    return generator


PLACES = {
    "slots": Slots, "on the class": Shared, "in an inner object": Computed, "in a closure": closed_over,
    "in a default": lambda: (lambda x=X: x), "in a partial": lambda: functools.partial(print, X),
    "in a deque": lambda: collections.deque([X]), "in a dict of sets": lambda: {1: ({X},)},
    "in a bound method": lambda: Slots().__init__, "in a generator": started,
    "on a function": lambda: setattr(f := (lambda: 0), "x", X) or f,
    "as a gradient": lambda: Holder(functools.reduce(lambda a, _: a, [0], X)),
}  # fmt: skip


@pytest.mark.parametrize("make", PLACES.values(), ids=PLACES)
def test_a_tensor_is_found(make) -> None:
    assert [x.data_ptr() for x in tensors_behind(Holder(make()))] == [X.data_ptr()]
    assert bytes_behind(Holder(make())) == X.untyped_storage().nbytes()


def test_a_slice_keeps_all_that_it_was_cut_from_and_two_slices_keep_it_once() -> None:
    assert bytes_behind(Holder([X[:2], X[50:]])) == 400


def test_numbers_outside_of_pytorch_count_too() -> None:
    assert bytes_behind(Holder(np.ones(50)[:3])) == 400
    assert bytes_behind(Holder(b"x" * 70), Holder(bytearray(30))) == 100
    assert bytes_behind(Holder(list(range(300)))) == 2400


def test_a_circle_ends_and_modules_are_no_part_of_an_object() -> None:
    holder = Holder(torch)
    holder.me = holder
    assert bytes_behind(holder) == 0


def test_what_was_handed_in_is_left_out() -> None:
    given = Holder(torch.ones(7))
    assert bytes_behind(Holder([given, X]), without=[given]) == X.nbytes
