"""Effort counts what reaches PyTorch's kernels, whatever the functions are called."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from labkit.course.checks.effort import effort_of

K = torch.randn(2, 3, 50, 8)


def test_a_view_costs_nothing_and_a_copy_is_made_read_and_written() -> None:
    view, copy = effort_of(lambda: K.transpose(1, 2)[:, :, 4:]), effort_of(lambda: K.transpose(1, 2).contiguous())
    assert (view.made, view.touched, view.calls) == (0, 0, 0)
    assert (copy.made, copy.touched, copy.largest) == (K.nbytes, 2 * K.nbytes, K.nbytes)


def test_what_a_function_makes_inside_is_counted() -> None:
    q = torch.randn(2, 6, 1, 8)
    by_hand = effort_of(lambda: torch.einsum("bhqd,bhkd->bhqk", q, K.repeat_interleave(2, 1)))
    assert by_hand.largest >= 2 * K.nbytes


def test_a_dimension_that_was_broadcast_is_read_once() -> None:
    assert effort_of(lambda: K.unsqueeze(2).expand(2, 3, 4, 50, 8) + 0).touched == K.nbytes + 4 * K.nbytes


def test_memory_that_is_only_reserved_is_made_but_not_touched() -> None:
    effort = effort_of(lambda: K.new_empty(1000, 8))
    assert (effort.made, effort.touched) == (32_000, 0)


def test_numbers_that_leave_pytorch_are_noticed_whatever_the_way() -> None:
    for leave in (
        lambda: K.numpy(),
        lambda: np.asarray(K),
        lambda: K.tolist(),
        lambda: np.array(K),
        lambda: np.einsum("bhkd->bh", K),
    ):
        assert effort_of(leave).left, leave


def test_a_length_or_a_shape_may_be_read_out() -> None:
    assert effort_of(lambda: (torch.tensor([3, 4]).tolist(), K.sum().item())).left == []


def test_counting_does_not_import_the_compiler() -> None:
    """PyTorch would, at the first kernel of a process: seconds in the middle of a learner's check."""
    script = """if True:
        import sys, torch
        from labkit.course.checks.effort import effort_of
        assert effort_of(lambda: torch.ones(3) + 1).calls
        sys.exit("torch._dynamo" in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_tensor_of_a_class_of_its_own_can_be_made_while_work_is_counted() -> None:
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 7, 8)
    effort = effort_of(lambda: F.scaled_dot_product_attention(q, k, k, attn_mask=causal_lower_right(3, 7)))
    assert effort.calls
    assert effort.made >= q.nbytes


def test_what_is_filled_is_not_read() -> None:
    x = torch.ones(1000)
    assert effort_of(lambda: x.new_zeros(5)).touched < 100
