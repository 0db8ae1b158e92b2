"""Lab 01, attention basics: references in one module, one module per exercise for its check."""

from __future__ import annotations

from labkit.course.contents import LabContents
from labkit.labs.lab01.heads import Merge, Split
from labkit.labs.lab01.last_row import LastRow
from labkit.labs.lab01.leak import Leak
from labkit.labs.lab01.mask import Mask
from labkit.labs.lab01.questions import PREDICTIONS, QUIZZES
from labkit.labs.lab01.rope import Rope
from labkit.labs.lab01.weights import Weights

CONTENTS = LabContents(
    "01",
    "Attention basics",
    exercises=(Weights(), Mask(), Split(), Merge(), Rope(), LastRow(), Leak()),
    predictions=PREDICTIONS,
    quizzes=QUIZZES,
)
