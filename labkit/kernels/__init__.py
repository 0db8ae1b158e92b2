"""Kernels, in Triton or for a CPU in Numba, each with its plain-PyTorch twin named in its docstring.

Importing this package, or a file of it, needs no Triton; calling a kernel does.
"""

from __future__ import annotations

import importlib.util
import os

import torch


def available(device: torch.device | str = "cpu") -> bool:
    """Whether the kernels can run on tensors of `device`: on a CUDA GPU, or on a CPU with `TRITON_INTERPRET=1` set."""
    if importlib.util.find_spec("triton") is None:
        return False
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return interpreted or (torch.device(device).type == "cuda" and torch.cuda.is_available())
