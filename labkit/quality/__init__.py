"""How good a cache is: `compare` sets its predictions beside a full one, `recall` asks for facts, both on `texts`."""

from labkit.quality.compare import (
    BLOCK,
    MakeCache,
    Model,
    Quality,
    block_error,
    check_passes,
    check_tokens,
    compare,
    passes,
    perplexity,
    plus_minus,
)
from labkit.quality.recall import Answer, Recall, recall
from labkit.quality.texts import TEXTS, Fact, load_facts, load_text

__all__ = [
    "BLOCK",
    "TEXTS",
    "Answer",
    "Fact",
    "MakeCache",
    "Model",
    "Quality",
    "Recall",
    "block_error",
    "check_passes",
    "check_tokens",
    "compare",
    "load_facts",
    "load_text",
    "passes",
    "perplexity",
    "plus_minus",
    "recall",
]
