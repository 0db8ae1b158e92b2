"""Lab 04, grouped-query attention: references in one module, one module per exercise for its check."""

from __future__ import annotations

from labkit.course.exercise import LabContents
from labkit.course.exercises.lab04.before_caching import CachedAttention
from labkit.course.exercises.lab04.fitting import MostKvHeads
from labkit.course.exercises.lab04.grouped import GroupedAttention
from labkit.course.exercises.lab04.kinds import LayerElements
from labkit.course.exercises.lab04.merging import MergeKvHeads
from labkit.course.exercises.lab04.questions import PREDICTIONS, QUIZZES
from labkit.course.exercises.lab04.ranks import SplitKvHeads
from labkit.course.exercises.lab04.references import (
    cached_attention,
    grouped_attention,
    layer_elements,
    merge_kv_heads,
    most_kv_heads,
    split_kv_heads,
)

__all__ = [
    "CONTENTS",
    "cached_attention",
    "grouped_attention",
    "layer_elements",
    "merge_kv_heads",
    "most_kv_heads",
    "split_kv_heads",
]


CONTENTS = LabContents(
    "04",
    "Grouped-query attention",
    exercises=(
        GroupedAttention(), MostKvHeads(), LayerElements(), MergeKvHeads(), SplitKvHeads(), CachedAttention(),
    ),
    predictions=PREDICTIONS,
    quizzes=QUIZZES,
)  # fmt: skip
