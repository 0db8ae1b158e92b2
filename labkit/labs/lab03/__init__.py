"""Lab 03, memory math: references in one module, the checks beside them."""

from __future__ import annotations

from labkit.course.contents import LabContents
from labkit.labs.lab03.cost import ConversationCost
from labkit.labs.lab03.limit import FirstLimit
from labkit.labs.lab03.plan import Capacity, RequestBytes
from labkit.labs.lab03.questions import PREDICTIONS, QUIZZES
from labkit.labs.lab03.size import CacheBytes, CountWeights
from labkit.labs.lab03.speed import Attainable, TpotFloor

CONTENTS = LabContents(
    "03",
    "Memory math",
    exercises=(
        CacheBytes(), CountWeights(), Capacity(), TpotFloor(), Attainable(), ConversationCost(), RequestBytes(),
        FirstLimit(),
    ),
    predictions=PREDICTIONS,
    quizzes=QUIZZES,
)  # fmt: skip
