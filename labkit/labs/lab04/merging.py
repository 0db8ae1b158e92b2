"""04.4: KV heads of a trained model, merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from labkit.course.checks.suspects import Suspect, recognise
from labkit.course.checks.tensors import agree
from labkit.course.exercise import Exercise
from labkit.labs.lab04.references import merge_kv_heads


class MergeKvHeads(Exercise):
    """Mean pooling of neighbours (Ainslie and others, arXiv:2305.13245)."""

    id, title, minutes, difficulty = "04.4", "Merge KV heads", 4, 2
    needs = ("04.1",)
    reference = staticmethod(merge_kv_heads)
    hints = (
        "The rows of the weight are heads, each head_dim rows long. Which rows belong to KV heads 0 and 1?",
        "Give the rows three dimensions: groups, heads in a group, head_dim. Then average over the middle one.",
        "heads = weight.unflatten(0, (num_kv_heads // group, group, -1))\nreturn heads.mean(dim=1).flatten(0, 1)",
    )
    hints_for: ClassVar = {
        "strangers-merged": "Query heads 0 to 5 read KV heads 0 and 1 (three each). After merging 0 with 1, six query "
        "heads read one KV head: again neighbours.",
        "rows-interleaved": "Rows 0 to head_dim - 1 are head 0. Which rows of head 1 belong to them?",
        "still-as-large": "The cache shrinks because there are fewer rows. How many should come back?",
    }

    def examine(self, answer: Callable) -> None:
        """Weights of 6 heads in pairs and threes, all in one, a bias, another dtype; groups of one change nothing."""
        for num_kv_heads, group, head_dim, hidden in ((6, 2, 5, 7), (6, 3, 4, 9), (3, 3, 8, 5), (4, 1, 3, 5)):
            weight = torch.randn(num_kv_heads * head_dim, hidden, dtype=torch.float64)
            self.compare(answer, weight, num_kv_heads, group)
        self.compare(answer, torch.randn(30, dtype=torch.float64), 6, 2)
        half = torch.randn(24, 6).to(torch.bfloat16)
        got = self.call(answer, half, 6, 2)
        self.same(got, merge_kv_heads(half, 6, 2), what="the merged bfloat16 weight", tolerance=0.05)

    def compare(self, answer: Callable, weight: Tensor, num_kv_heads: int, group: int) -> None:
        """Judge the merge of one weight or bias: how many rows came back, then their values."""
        got, want = self.call(answer, weight, num_kv_heads, group), merge_kv_heads(weight, num_kv_heads, group)
        where = f"{num_kv_heads} heads of {len(weight) // num_kv_heads} rows, merged {group} at a time"
        if isinstance(got, Tensor) and got.shape == weight.shape and group > 1:
            self.fail(
                "still-as-large",
                seen=f"{where}: {len(got)} rows came back; it should be {len(want)}",
                cause="each head was replaced by its group's mean and kept, which saves nothing",
                look="the return: one head per group",
            )
        if isinstance(got, Tensor) and got.dim() == weight.dim() == 2 and got.shape[1] != weight.shape[1]:
            self.fail(
                "wrong-axis",
                seen=f"{where}: {list(weight.shape)} became {list(got.shape)}",
                cause="columns were averaged: those are the inputs, not the heads",
                look="dimension 0, where the heads lie",
            )
        self.like(got, want, what=f"{where}: the result")
        if not agree(got, want):
            self.explain(got, weight, num_kv_heads, group, where)

    def explain(self, got: Tensor, weight: Tensor, num_kv_heads: int, group: int, where: str) -> None:
        """Name the merge that gives what was seen."""
        heads = weight.unflatten(0, (num_kv_heads, -1))
        groups = heads.unflatten(0, (-1, group))
        want = groups.mean(1)
        got = got.view_as(want)
        strangers = heads.unflatten(0, (group, -1)).mean(0)
        rows = weight.unflatten(0, (-1, num_kv_heads // group, group)).mean(2).transpose(0, 1)
        mixed = weight.unflatten(0, (-1, group)).mean(1).view_as(want)
        scales = "the mean keeps a key's size; softmax feels every other"
        recognise(type(self), got, [
            Suspect("strangers-merged", strangers,
                    f"heads that are not neighbours were merged: 0 with {num_kv_heads // group}",
                    "the order of the dimensions: [groups, heads in a group, head_dim]; query head h reads "
                    "h // num_queries_per_kv before and after"),
            Suspect("rows-interleaved", [mixed, rows, rows.reshape(want.shape)],
                    "neighbouring rows were averaged, which belong to one head",
                    "how the rows lie: all of head 0 first"),
            Suspect("summed", groups.sum(1), "the heads were added up", scales),
            Suspect("divided-wrongly", [groups.sum(1) / num_kv_heads, groups.sum(1) / group**0.5],
                    "the sum was divided by another number than the heads in it", scales),
            Suspect("first-only", [groups[:, 0], groups[:, -1]], "one head of each group was kept, the others dropped",
                    "the docstring: their mean"),
            Suspect("all-in-one", heads.mean(0).expand_as(want), "all heads were averaged, whatever the group",
                    "the parameter `group`"),
        ], f"{where}: the shape fits, the heads do not")  # fmt: skip
        self.fail(
            "values",
            seen=f"{where}: the first row of the result starts with {got.flatten()[0].item():.3f}; it should be "
            f"{want.flatten()[0].item():.3f}",
            cause="the rows were grouped in another way",
            look="row 0 of the result: the mean of which rows of the weight?",
        )
