"""Ways to keep K and V. One file per way; `base` says what they share.

`Cache.growing(num_layers)` and `Cache.preallocated(num_layers, capacity)` are the two that lab 02 builds.
"""

from labkit.cache.base import Cache, LayerCache
from labkit.cache.dense import GrowingCache, PreallocatedCache

__all__ = ["Cache", "GrowingCache", "LayerCache", "PreallocatedCache"]
