"""Lab 06, paged attention: references in one module, one module per exercise (or per kind of them) for its check."""

from __future__ import annotations

from labkit.course.contents import LabContents
from labkit.labs.lab06.allocating import Allocate
from labkit.labs.lab06.attending import PagedAttention
from labkit.labs.lab06.copying import CopyOnWrite
from labkit.labs.lab06.ending import Finish, FirstChunk, SetRow
from labkit.labs.lab06.kernel import PagedDecode
from labkit.labs.lab06.prefixes import Reusable
from labkit.labs.lab06.questions import PREDICTIONS, QUIZZES
from labkit.labs.lab06.sized import BestBlockSize
from labkit.labs.lab06.slots import Slots
from labkit.labs.lab06.tabling import Table
from labkit.labs.lab06.wasted import Waste

CONTENTS = LabContents(
    "06",
    "Paged attention",
    exercises=(
        Waste(), Slots(), Allocate(), Table(), PagedAttention(), CopyOnWrite(), Reusable(), PagedDecode(),
        BestBlockSize(), Finish(), SetRow(), FirstChunk(),
    ),
    predictions=PREDICTIONS,
    quizzes=QUIZZES,
)  # fmt: skip
