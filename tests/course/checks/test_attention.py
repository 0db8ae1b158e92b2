"""The suspects of attention: right turns are attention, wrong ones are all different from it and from each other."""

from __future__ import annotations

import itertools

import pytest
import torch

from labkit.attention import online_attention
from labkit.course.checks.attention import Turn, attend, suspects
from labkit.course.checks.tensors import agree, heads

CASES = [(6, 2, 3, 4), (6, 3, 5, 2), (12, 4, 2, 7)]


@pytest.mark.parametrize("case", CASES)
def test_the_right_turn_is_the_oracles_attention(case) -> None:
    q, k, v = heads(*case, head_dim=12)
    assert agree(attend(q, k, v, Turn()), online_attention(q, k, v))


def test_every_suspect_differs_from_what_is_right_and_from_every_other_in_some_case() -> None:
    torch.manual_seed(3)
    tried = [heads(*case, head_dim=12) for case in CASES] + [heads(6, 6, 4, 0, head_dim=20)]
    tried += [[20 * q, 20 * k, v] for q, k, v in tried]
    listed = []
    for q, k, v in tried:
        row = [("right", attend(q, k, v))]
        row += [
            (f"{s.diagnosis}: {s.cause}", s.gives[0]().nan_to_num(9.0) if s.gives else None) for s in suspects(q, k, v)
        ]
        listed.append(row)
    for (i, (name, _)), (j, (other, _)) in itertools.combinations(enumerate(listed[0]), 2):
        pairs = [(row[i][1], row[j][1]) for row in listed if row[i][1] is not None and row[j][1] is not None]
        assert any(a.shape != b.shape or not agree(a, b) for a, b in pairs) or not pairs, (name, other)


def test_without_a_future_to_hide_no_suspect_concerns_the_mask() -> None:
    q, k, v = heads(4, 4, 3, 2)
    names = {suspect.diagnosis for suspect in suspects(q, k, v, causal=False) if suspect.gives}
    assert "no-scale" in names
    assert not {"no-mask", "mask-offset", "mask-after", "mask-weak"} & names
