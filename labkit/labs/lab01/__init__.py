"""Lab 01, attention basics: one module per exercise, with its reference and its check."""

from __future__ import annotations

from labkit.course.exercise import LabContents
from labkit.labs.lab01.heads import Merge, Split, merge_heads, split_heads
from labkit.labs.lab01.last_row import LastRow, attend_last
from labkit.labs.lab01.leak import Leak, attend, leaky_attend
from labkit.labs.lab01.mask import Mask, causal_mask
from labkit.labs.lab01.questions import PREDICTIONS, QUIZZES
from labkit.labs.lab01.rope import Rope, apply_rope
from labkit.labs.lab01.weights import Weights, attention_weights

__all__ = [
    "CONTENTS",
    "Leak",
    "apply_rope",
    "attend",
    "attend_last",
    "attention_weights",
    "causal_mask",
    "leaky_attend",
    "merge_heads",
    "split_heads",
]


CONTENTS = LabContents(
    "01",
    "Attention basics",
    exercises=(Weights(), Mask(), Split(), Merge(), Rope(), LastRow(), Leak()),
    predictions=PREDICTIONS,
    quizzes=QUIZZES,
)
