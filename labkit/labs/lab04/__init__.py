"""Lab 04, grouped-query attention: references in one module, one module per exercise for its check."""

from __future__ import annotations

from labkit.course.exercise import LabContents
from labkit.labs.lab04.before_caching import CachedAttention
from labkit.labs.lab04.fitting import MostKvHeads
from labkit.labs.lab04.grouped import GroupedAttention
from labkit.labs.lab04.kinds import LayerElements
from labkit.labs.lab04.merging import MergeKvHeads
from labkit.labs.lab04.questions import PREDICTIONS, QUIZZES
from labkit.labs.lab04.ranks import SplitKvHeads
from labkit.labs.lab04.references import (
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
