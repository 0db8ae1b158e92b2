"""What a learner moves: widgets of ipywidgets alone, each an object with its parts as attributes."""

from labkit.widgets.attention import AttentionExplorer, read_sentence
from labkit.widgets.cache import CacheStepper
from labkit.widgets.parts import png
from labkit.widgets.planner import Planner
from labkit.widgets.quantizing import Quantizing

__all__ = ["AttentionExplorer", "CacheStepper", "Planner", "Quantizing", "png", "read_sentence"]
