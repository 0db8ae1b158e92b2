"""Ways to keep K and V. One file per way; `layer` says what they share, `cache` puts one on each layer.

`Cache.growing(num_layers)` and `Cache.preallocated(num_layers, capacity)` are the two that lab 02 builds;
`Cache.quantized(num_layers, nbits)` is the one of lab 05, `Cache.paged(num_layers, num_blocks)` the one of lab 06, and
with `nbits=4` both at once. `Cache.evicting(num_layers, policy, budget)` is the one of lab 07, with the policies of
`labkit.cache.evicting`; `Cache.selecting(num_layers, budget)` drops nothing, and reads little.
"""

from labkit.cache.cache import Cache
from labkit.cache.dense import GrowingCache, PreallocatedCache
from labkit.cache.evicting import EvictingCache, EvictingQuantizedCache
from labkit.cache.layer import LayerCache
from labkit.cache.paged import OutOfBlocks, PagedCache, Pages
from labkit.cache.paged_quantized import PagedQuantizedCache
from labkit.cache.quantized import QuantizedCache
from labkit.cache.selecting import SelectingCache
from labkit.cache.step import Step

__all__ = [
    "Cache",
    "EvictingCache",
    "EvictingQuantizedCache",
    "GrowingCache",
    "LayerCache",
    "OutOfBlocks",
    "PagedCache",
    "PagedQuantizedCache",
    "Pages",
    "PreallocatedCache",
    "QuantizedCache",
    "SelectingCache",
    "Step",
]
