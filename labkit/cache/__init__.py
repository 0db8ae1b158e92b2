"""Ways to keep K and V. One file per way; `base` says what they share.

`Cache.growing(num_layers)` and `Cache.preallocated(num_layers, capacity)` are the two that lab 02 builds;
`Cache.quantized(num_layers, nbits)` is the one of lab 05.
"""

from labkit.cache.base import Cache, LayerCache
from labkit.cache.dense import GrowingCache, PreallocatedCache
from labkit.cache.quantized import QuantizedCache

__all__ = ["Cache", "GrowingCache", "LayerCache", "PreallocatedCache", "QuantizedCache"]
