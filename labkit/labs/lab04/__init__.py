"""Lab 04, grouped-query attention: references in one module, one module per exercise for its check."""

from __future__ import annotations

from labkit.course.contents import LabContents
from labkit.labs.lab04.before_caching import CachedAttention
from labkit.labs.lab04.fitting import MostKvHeads
from labkit.labs.lab04.grouped import GroupedAttention
from labkit.labs.lab04.kinds import LayerElements
from labkit.labs.lab04.merging import MergeKvHeads
from labkit.labs.lab04.questions import PREDICTIONS, QUIZZES
from labkit.labs.lab04.ranks import SplitKvHeads

CONTENTS = LabContents(
    "04",
    "Grouped-query attention",
    exercises=(
        GroupedAttention(), MostKvHeads(), LayerElements(), MergeKvHeads(), SplitKvHeads(), CachedAttention(),
    ),
    predictions=PREDICTIONS,
    quizzes=QUIZZES,
)  # fmt: skip
