"""Threads for short loops of Numba's: OpenMP's or TBB's, which are awake within microseconds; and who may use them.

`packed_attention_cpu.share_out` wakes Python's threads, which takes some thirty: right for half a millisecond's work,
and too long for a matrix product of one row, which takes fifty.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from typing import Any

import numba
import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

LAYERS = {"omp": "numba.np.ufunc.omppool", "tbb": "numba.np.ufunc.tbbpool"}
MOST: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # as many as Numba will ever start
# For a loop over parts and nothing else: of what runs in threads Numba compiles every line for a second.
shared_out: Any = numba.njit(nogil=True, parallel=True, error_model="numpy")
_forked = False


def available() -> bool:
    """Whether loops can be shared out here; not in a forked process, which Numba's OpenMP would end."""
    return not _forked and _has_threads()


@functools.cache
def _has_threads() -> bool:
    """Whether Numba takes OpenMP's threads or TBB's. Its own, the last resort, serve one caller at a time."""
    asked = numba.config.THREADING_LAYER  # type: ignore[attr-defined]
    layers = list(LAYERS) if asked in ("default", "threadsafe") else [asked]
    return sys.byteorder == "little" and any(layer in LAYERS and _imports(LAYERS[layer]) for layer in layers)


def _imports(name: str) -> bool:
    """Whether a module can be imported: Numba brings its layers along, but what they are linked to may be missing."""
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_fork)


def takes(*tensors: Tensor) -> bool:
    """Whether loops over these tensors' memory can be shared out, unseen by PyTorch, and nobody is to see them.

    They must lie on a CPU and be what they seem. No transformation, trace or mode may be at work, which the loops would
    escape. The work ledger is such a mode.
    """
    return (
        available()
        and all(type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and not x.is_neg() for x in tensors)
        and not has_torch_function(tensors)
        and not is_in_torch_dispatch_mode()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def as_torch() -> None:
    """Take as many threads for what follows as PyTorch does (`torch.set_num_threads`), if there are as many."""
    numba.set_num_threads(min(torch.get_num_threads(), MOST))
