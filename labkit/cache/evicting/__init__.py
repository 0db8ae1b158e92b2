"""A cache that keeps a budget of tokens, and the policies that say which.

    cache = Cache.evicting(model.spec.num_layers, Window(sinks=4), budget=256)
    cache = Cache.evicting(model.spec.num_layers, SnapKV(), budget=0.5, during="prompt", nbits=4)

`layer` has the mechanism and says when what happens, `policy` what a policy is and how to write one.
"""

from labkit.cache.evicting.budgets import Budget, each_layer, pyramid
from labkit.cache.evicting.chance import Random
from labkit.cache.evicting.expected import ExpectedAttention
from labkit.cache.evicting.keys import KeyDiff, KeyNorm
from labkit.cache.evicting.layer import EvictingCache
from labkit.cache.evicting.merging import Merging, MergingCache
from labkit.cache.evicting.observed import H2O, TOVA, SnapKV
from labkit.cache.evicting.packed import EvictingQuantizedCache
from labkit.cache.evicting.policy import Held, Notes, Policy, Seen
from labkit.cache.evicting.window import Window

__all__ = [
    "H2O",
    "TOVA",
    "Budget",
    "EvictingCache",
    "EvictingQuantizedCache",
    "ExpectedAttention",
    "Held",
    "KeyDiff",
    "KeyNorm",
    "Merging",
    "MergingCache",
    "Notes",
    "Policy",
    "Random",
    "Seen",
    "SnapKV",
    "Window",
    "each_layer",
    "pyramid",
]
