"""Lab 02, the cache from scratch: references in one module, one module per exercise for its check."""

from __future__ import annotations

from labkit.course.contents import LabContents
from labkit.labs.lab02.chunk import AttendChunk
from labkit.labs.lab02.decode import DecodeStep
from labkit.labs.lab02.generation import GenerateWithCache
from labkit.labs.lab02.growing import Growing
from labkit.labs.lab02.preallocated import Preallocated
from labkit.labs.lab02.questions import PREDICTIONS, QUIZZES
from labkit.labs.lab02.reuse import ReusablePrefix
from labkit.labs.lab02.size import CacheBytes

CONTENTS = LabContents(
    "02",
    "The cache from scratch",
    exercises=(
        Growing(), DecodeStep(), GenerateWithCache(), Preallocated(), ReusablePrefix(), CacheBytes(), AttendChunk(),
    ),
    predictions=PREDICTIONS,
    quizzes=QUIZZES,
)  # fmt: skip
