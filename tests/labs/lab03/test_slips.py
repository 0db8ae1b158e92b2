"""Slips: each way to take a step wrongly is a suspect, alone and beside each way to take another step wrongly."""

from __future__ import annotations

import pytest

from labkit.labs.lab03 import cost, limit, plan, size, speed
from labkit.labs.lab03.references import (
    attainable,
    cache_bytes,
    capacity,
    conversation_cost,
    count_weights,
    first_limit,
    request_bytes,
    tpot_floor,
)
from labkit.labs.lab03.slips import Slip, suspects_of


def area(*, width=lambda a: a, height=lambda b: b):
    return lambda a, b: width(a) * height(b)


def test_slips_are_suspects_alone_first_and_then_in_pairs_of_different_steps() -> None:
    slips = {
        "width": (Slip("one", lambda a: 1, "no width", "a"), Slip("double", lambda a: 2 * a, "twice the width", "2")),
        "height": (Slip("half", lambda b: b / 2, "half the height", "b"),),
    }
    suspects = suspects_of(area, slips)
    assert [(suspect.diagnosis, suspect.gives(3, 8)) for suspect in suspects] == [
        ("one", 8), ("double", 48), ("half", 12), ("one", 4), ("double", 24),
    ]  # fmt: skip
    assert suspects[0].cause == "no width"
    assert suspects[3].cause == "two things: no width; and half the height"
    assert suspects[3].look == "first a; then b"


FORMULAS = [
    (size.layers_bytes, size.CACHE_SLIPS, cache_bytes, (size.MIXED, 101, 29, 2)),
    (size.counted, size.WEIGHT_SLIPS, count_weights, (size.BIASED,)),
    (plan.fitting, plan.CAPACITY_SLIPS, capacity, (84_932_978_278, 15_231_233_024, 7_516_192_768, 0.15)),
    (plan.planned, plan.PLANNER_SLIPS, request_bytes, (plan.FEW, 1_009, 2)),
    (speed.step_time, speed.STEP_SLIPS, tpot_floor, (7_000_003, 1_009, 211, 13, 3.1e6)),
    (speed.roof, speed.ROOF_SLIPS, attainable, (3e9, 2e9, 7e12, 1.1e11)),
    (cost.bill, cost.BILL_SLIPS, conversation_cost, (5, 1_009, 211, 89, 3.0, 17.0, 0.7)),
    (limit.limit, limit.LIMIT_SLIPS, first_limit, limit.cases()[0]),
]


@pytest.mark.parametrize(("formula", "slips", "reference", "case"), FORMULAS, ids=[row[0].__name__ for row in FORMULAS])
def test_a_formula_without_a_slip_is_the_reference_and_every_step_is_one_of_its_own(
    formula, slips, reference, case
) -> None:
    right = reference(*case)
    assert formula()(*case) == (right if isinstance(right, str) else pytest.approx(right, rel=1e-12))
    assert slips.keys() <= formula.__kwdefaults__.keys()
    assert all(slip.diagnosis and slip.cause and slip.look for several in slips.values() for slip in several)
