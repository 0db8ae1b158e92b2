"""Threads for short loops of Numba's: OpenMP's or TBB's, which are awake within microseconds.

`packed_attention_cpu.share_out` wakes Python's threads, which takes some thirty: right for half a millisecond's work,
and too long for a matrix product of one row, which takes fifty.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

import numba
import torch

LAYERS = ("numba.np.ufunc.omppool", "numba.np.ufunc.tbbpool")
MOST: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # as many as Numba will ever start
# For a loop over parts and nothing else: of what runs in threads Numba compiles every line for a second.
shared_out: Any = numba.njit(nogil=True, parallel=True, error_model="numpy")


@functools.cache
def available() -> bool:
    """Whether loops can be shared out here. Numba's own threads, its last resort, serve one caller at a time."""
    return sys.byteorder == "little" and any(imports(layer) for layer in LAYERS)


def imports(name: str) -> bool:
    """Whether a module can be imported: Numba brings its layers along, but what they are linked to may be missing."""
    try:
        return importlib.import_module(name) is not None
    except ImportError:
        return False


def as_torch() -> None:
    """Take as many threads for what follows as PyTorch does (`torch.set_num_threads`), if there are as many."""
    numba.set_num_threads(min(torch.get_num_threads(), MOST))
