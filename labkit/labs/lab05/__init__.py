"""Lab 05, quantizing the cache: references in one module, one module per exercise for its check."""

from __future__ import annotations

from labkit.course.contents import LabContents
from labkit.labs.lab05.axes import QuantizeCache
from labkit.labs.lab05.bits import BitsPerElement
from labkit.labs.lab05.one_pass import MeanSurprise
from labkit.labs.lab05.one_token_groups import GroupsToQuantize
from labkit.labs.lab05.packing import Pack
from labkit.labs.lab05.quantizing import Quantize
from labkit.labs.lab05.questions import PREDICTIONS, QUIZZES
from labkit.labs.lab05.residual import QuantizedLayerExercise
from labkit.labs.lab05.scores import PackedScores

CONTENTS = LabContents(
    "05",
    "Quantizing the cache",
    exercises=(
        Quantize(), Pack(), QuantizeCache(), BitsPerElement(), QuantizedLayerExercise(), PackedScores(),
        GroupsToQuantize(), MeanSurprise(),
    ),
    predictions=PREDICTIONS,
    quizzes=QUIZZES,
)  # fmt: skip
