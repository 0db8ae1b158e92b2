"""The cases that tests of many dimensions are left with."""

import itertools

import pytest

from tests.pairs import every_pair


@pytest.mark.parametrize("sizes", [*itertools.product(range(1, 6), repeat=3)], ids=str)
def test_any_two_values_of_different_lists_meet_and_no_case_comes_twice(sizes):
    lists = [[f"{name}{at}" for at in range(size)] for name, size in zip("abc", sizes, strict=True)]
    cases = every_pair(*lists)
    for one, other in itertools.combinations(range(3), 2):
        assert {(case[one], case[other]) for case in cases} == set(itertools.product(lists[one], lists[other]))
    assert len(set(cases)) == len(cases) == sizes[0] * sizes[1] * sizes[2] // min(sizes)
