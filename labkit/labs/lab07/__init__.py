"""Lab 07, eviction: references in one module, one module per exercise (or per kind of them) for its check."""

from __future__ import annotations

from labkit.course.contents import LabContents
from labkit.labs.lab07.always import Protected
from labkit.labs.lab07.keeping import KeepBest
from labkit.labs.lab07.own_policy import OwnPolicy
from labkit.labs.lab07.placing import AtPlaces
from labkit.labs.lab07.questions import PREDICTIONS, QUIZZES
from labkit.labs.lab07.receiving import AttentionReceived
from labkit.labs.lab07.snapping import SnapKVScores
from labkit.labs.lab07.windows import AppendBounded, RingSlot, WindowPositions

CONTENTS = LabContents(
    "07",
    "Eviction",
    exercises=(
        WindowPositions(), KeepBest(), AttentionReceived(), Protected(), SnapKVScores(), AppendBounded(), RingSlot(),
        AtPlaces(), OwnPolicy(),
    ),
    predictions=PREDICTIONS,
    quizzes=QUIZZES,
)  # fmt: skip
