"""04.4: KV heads of a trained model, merged."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import ClassVar

import torch
from torch import Tensor

from labkit.course.checks.suspects import Suspect
from labkit.course.checks.tensors import LOOSE, draw
from labkit.course.checks.trials import compare
from labkit.course.exercise import Exercise, NotYet
from labkit.labs.lab04.references import merge_kv_heads

DTYPES = (torch.bfloat16, torch.float16, torch.float64)


class MergeKvHeads(Exercise):
    """Mean pooling of neighbours (Ainslie and others, arXiv:2305.13245)."""

    id, title, minutes, difficulty = "04.4", "Merge KV heads", 4, 2
    needs = ("04.1",)
    reference = staticmethod(merge_kv_heads)
    why = (
        "Heads lie one behind the other in the rows of the weight, so a group of neighbours is one dimension after "
        "unflatten, and its mean is one line, for a matrix and for a bias alike."
    )
    hints = (
        "The rows of the weight are heads, each head_dim rows long. Which rows belong to KV heads 0 and 1?",
        "Give the rows three dimensions: groups, heads in a group, head_dim. Then average over the middle one.",
        "heads = weight.unflatten(0, (num_kv_heads // group, group, -1))\nreturn heads.mean(dim=1).flatten(0, 1)",
    )
    hints_for: ClassVar = {
        "strangers-merged": "Query heads 0 to 5 read KV heads 0 and 1 (three each). After merging 0 with 1, six query "
        "heads read one KV head: again neighbours.",
        "rows-interleaved": "Rows 0 to head_dim - 1 are head 0. Which rows of head 1 belong to them?",
        "bias": "What does unflatten(0, ...) do with a tensor of one dimension?",
        "fixed-head-dim": "The function is not told head_dim. From what can it be had?",
        "group-and-groups-swapped": "6 heads, 2 at a time: how many groups, and how many heads in each?",
        "still-as-large": "The cache shrinks because there are fewer rows. How many should come back?",
    }

    def examine(self, answer: Callable) -> None:
        """Weights of heads in pairs, threes and all in one, groups of one, a bias; other dtypes and layouts."""
        self.examine_weights(answer)
        self.examine_biases(answer)

    def examine_weights(self, answer: Callable) -> None:
        """Weights of two dimensions; whether what raises here works for the lab model's sizes."""
        sizes = ((6, 2, 5, 7), (6, 3, 4, 11), (12, 4, 9, 13), (3, 3, 8, 5), (4, 1, 3, 5), (9, 3, 64, 17), (8, 2, 32, 3))
        cases = [(draw(heads * head_dim, hidden, seed=i, dtype=torch.float32) * 3, heads, group)
                 for i, (heads, group, head_dim, hidden) in enumerate(sizes)]  # fmt: skip
        try:
            compare(type(self), answer, merge_kv_heads, cases, suspects=suspects, what="the result", dtypes=DTYPES)
        except NotYet as not_yet:
            if not_yet.finding.diagnosis in ("raised", "shape") and self.fits_the_model(answer):
                self.fail(
                    "fixed-head-dim",
                    seen=f"heads of 64 numbers come out right, heads of 5 do not: {not_yet.finding.seen}",
                    cause="the 64 of the lab model was written down, or taken from the notebook's head_dim; the rows "
                    "of a head are len(weight) // num_kv_heads",
                    look="what the function knows: weight, num_kv_heads, group; unflatten takes one -1",
                )
            raise

    def fits_the_model(self, answer: Callable) -> bool:
        """Whether the answer is right for KV heads as the lab model has them."""
        weight = draw(6 * 64, 7, seed=8, dtype=torch.float32)
        with suppress(NotYet):
            self.same(self.call(answer, weight, 6, 2), merge_kv_heads(weight, 6, 2), what="", tolerance=LOOSE)
            return True
        return False

    def examine_biases(self, answer: Callable) -> None:
        """Biases have one dimension."""
        cases = [(draw(heads * head_dim, seed=heads, dtype=torch.float32), heads, group)
                 for heads, group, head_dim in ((6, 2, 5), (12, 3, 7), (5, 5, 4))]  # fmt: skip
        try:
            compare(type(self), answer, merge_kv_heads, cases, suspects=suspects, what="the result", dtypes=DTYPES)
        except NotYet as not_yet:
            if not_yet.finding.diagnosis != "raised":
                raise
            self.fail(
                "bias",
                seen=f"weights come out right; with a bias, [num_kv_heads * head_dim], {not_yet.finding.seen}",
                cause="the code counts on two dimensions: a second size, a second index, or a reshape that names it",
                look="the docstring: a weight or a bias; dimension 0 is the one to split, whatever comes behind it",
            )


def suspects(weight: Tensor, num_kv_heads: int, group: int) -> list[Suspect]:
    """Other merges of the same rows."""
    kept = num_kv_heads // group
    heads = weight.unflatten(0, (num_kv_heads, -1))
    groups = heads.unflatten(0, (-1, group))
    rows = weight.unflatten(0, (-1, kept, group)).mean(2)
    wide = weight if weight.dim() > 1 else weight[:, None]
    columns = wide[:, : wide.shape[1] // group * group].unflatten(1, (-1, group)).mean(2)
    each_head = groups.mean(1, keepdim=True).expand_as(groups)
    scales = "the mean of the heads: their sum, divided by how many there are in it"
    return [
        Suspect("strangers-merged", heads.unflatten(0, (group, -1)).mean(0).flatten(0, 1),
                "heads that are not neighbours were merged",
                "the order of the dimensions: [groups, heads in a group, head_dim]; query head h reads "
                "h // num_queries_per_kv before and after"),
        Suspect("rows-interleaved", [weight.unflatten(0, (-1, group)).mean(1), rows.flatten(0, 1),
                                     rows.transpose(0, 1).flatten(0, 1)],
                "neighbouring rows were averaged, which belong to one head", "how the rows lie: all of head 0 first"),
        Suspect("group-and-groups-swapped", [
                    heads.unflatten(0, (-1, kept)).mean(1).flatten(0, 1) if num_kv_heads % kept == 0 else weight,
                    heads.unflatten(0, (kept, -1)).mean(0).flatten(0, 1)],
                "as many heads were merged into one as should have remained",
                "unflatten: (num_kv_heads // group, group, -1), the groups first"),
        Suspect("summed", groups.sum(1).flatten(0, 1), "the heads were added up", scales),
        Suspect("divided-wrongly", [groups.sum(1).flatten(0, 1) / by for by in (num_kv_heads, group**0.5, kept)],
                "the sum was divided by another number than the heads in it", scales),
        Suspect("first-only", [groups[:, 0].flatten(0, 1), groups[:, -1].flatten(0, 1)],
                "one head of each group was kept, the others dropped", "the docstring: their mean"),
        Suspect("first-only", [heads[:kept].flatten(0, 1), heads[-kept:].flatten(0, 1)],
                "some heads were kept as they are, the others dropped", "the docstring: their mean"),
        Suspect("groups-overlap", [torch.stack([heads[i : i + group].mean(0) for i in range(kept)]).flatten(0, 1)],
                "each group begins one head after the one before: they overlap", "group g begins at head g * group"),
        Suspect("ends-averaged", [((groups[:, 0] + groups[:, -1]) / 2).flatten(0, 1),
                                   groups[:, :2].mean(1).flatten(0, 1)],
                "two heads of each group were averaged, however many it has", "the mean over all `group` heads"),
        Suspect("not-the-mean", [groups.median(1).values.flatten(0, 1), groups.amax(1).flatten(0, 1)],
                "the median or the largest was taken", "the docstring: their mean"),
        Suspect("still-as-large", [each_head.flatten(0, 2), each_head.transpose(0, 1).flatten(0, 2),
                                   heads.mean(0).expand_as(heads).flatten(0, 1)],
                "each head was replaced by the mean and kept, which saves nothing", "the return: one head per group"),
        Suspect("all-in-one", [heads.mean(0).expand(kept, *heads.shape[1:]).flatten(0, 1), heads.mean(0)],
                "all heads were averaged, whatever the group", "the parameter `group`"),
        Suspect("wrong-axis", [columns if weight.dim() > 1 else weight],
                "columns were averaged: those are the inputs, not the heads", "dimension 0, where the heads lie"),
    ]  # fmt: skip
