"""Many requests on one cache: who holds which block of memory, who runs next, and the loop."""

from labkit.engine.allocator import Allocator
from labkit.engine.blocks import BlockManager
from labkit.engine.engine import Engine
from labkit.engine.metrics import Snapshot
from labkit.engine.request import Request, Timing, Token

__all__ = ["Allocator", "BlockManager", "Engine", "Request", "Snapshot", "Timing", "Token"]
