"""The settings of a process that an answer might change: one table, and all of it put back after a check.

What belongs to one thread is not in it: PyTorch's grad and inference mode, autocast, default device, flushing of
denormals, stacks of function and dispatch modes; NumPy's error state; decimal contexts; tracing. A check runs in a
thread of its own, and they end with that thread.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import locale
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch
import torch._tensor_str
import torch.utils._python_dispatch
from torch.backends import cuda, mha


@dataclass(frozen=True)
class Setting:
    """`read()` gives a copy that == can compare, `write(value)` sets it. Both raise where there is no such thing."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], Any]
    hidden: bool = False
    """Whether another thread may have changed it for those to come, unseen by this one: then it is always written."""


def attribute(owner: Any, name: str) -> Setting:
    """What `owner.name` stands for."""
    where = getattr(owner, "__name__", type(owner).__name__)
    return Setting(f"{where}.{name}", lambda: getattr(owner, name), lambda value: setattr(owner, name, value))


def backend(name: str) -> Setting:
    """A flag of `torch.backends`, by its dotted name there."""
    owner, _, flag = name.rpartition(".")
    find = attrgetter(owner) if owner else lambda backends: backends
    return Setting(
        f"torch.backends.{name}",
        lambda: getattr(find(torch.backends), flag),
        lambda value: setattr(find(torch.backends), flag, value),
    )


def entries(name: str, find: Callable[[], Any]) -> Setting:
    """What a dictionary holds, where the dictionary itself stays."""

    def write(value: dict) -> None:
        kept = find()
        kept.clear()
        kept.update(value)

    return Setting(name, lambda: dict(find()), write)


def set_filters(value: list) -> None:
    """The warning filters, and the word that they changed."""
    warnings.filters[:] = value  # type: ignore[index]
    warnings._filters_mutated()  # type: ignore[attr-defined]


def set_path(value: list) -> None:
    """Where imports look."""
    sys.path[:] = value


def module_hooks(name: str) -> Setting:
    """Hooks that run for every `nn.Module`."""
    return entries(f"torch.nn.modules.module.{name}", lambda: getattr(torch.nn.modules.module, name))


def rc_params() -> dict:
    """matplotlib's settings. KeyError where it is not in use."""
    return sys.modules["matplotlib"].rcParams


def deterministic() -> tuple[bool, bool]:
    """Whether only deterministic algorithms may run, and whether others just warn."""
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def set_deterministic(value: tuple[bool, bool]) -> None:
    """The reverse of `deterministic`."""
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


def anomaly() -> tuple[bool, bool]:
    """Whether autograd looks for the operation that failed, and for NaN."""
    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()


def set_tensor_type(device: str) -> None:
    """The device of the default tensor type."""
    torch.set_default_tensor_type(f"torch.{'' if device == 'cpu' else f'{device}.'}FloatTensor")


def numpy_state() -> tuple:
    """NumPy's random state, its key as bytes."""
    kind, key, *rest = np.random.get_state()  # noqa: NPY002
    return kind, key.tobytes(), *rest  # type: ignore[union-attr, attr-defined]


def set_numpy_state(value: tuple) -> None:
    """The reverse of `numpy_state`."""
    kind, key, *rest = value
    np.random.set_state((kind, np.frombuffer(key, dtype=np.uint32), *rest))  # noqa: NPY002


def torch_states() -> list[bytes]:
    """PyTorch's random states: the CPU's, and each GPU's once CUDA is in use."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [state.numpy().tobytes() for state in (torch.get_rng_state(), *gpus)]


def set_torch_states(value: list[bytes]) -> None:
    """The reverse of `torch_states`."""
    cpu, *gpus = [torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in value]
    torch.set_rng_state(cpu)
    if gpus:
        torch.cuda.set_rng_state_all(gpus)


# Ends the process, or keeps others from stopping a check: out of an answer's reach while it is checked.
SHELL = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()  # in a notebook `exit()` asks it to
FORBIDDEN = [
    *[(os, name) for name in ("_exit", "abort")],
    *[(signal, name) for name in ("alarm", "setitimer")],
    (sys, "setswitchinterval"),
    (SHELL, "ask_exit"),
]

HOOKS = ("buffer_registration", "module_registration", "parameter_registration", "forward", "forward_pre")
BACKENDS = (
    "cuda.matmul.allow_fp16_reduced_precision_reduction",
    "cuda.matmul.allow_bf16_reduced_precision_reduction",
    "cuda.matmul.allow_fp16_accumulation",
    "cudnn.enabled",
    "cudnn.benchmark",
    "cudnn.deterministic",
    "mkldnn.enabled",
    "mkldnn.deterministic",
    "opt_einsum.enabled",
    "opt_einsum.strategy",
    "quantized.engine",
    # Last, and the widest first: what is set above, or for all, sets some of these too.
    "fp32_precision",
    "cuda.matmul.fp32_precision",
    "cudnn.conv.fp32_precision",
    "cudnn.rnn.fp32_precision",
    "mkldnn.conv.fp32_precision",
    "mkldnn.matmul.fp32_precision",
    "mkldnn.rnn.fp32_precision",
)

SETTINGS = [
    # PyTorch
    Setting("torch's random states", torch_states, set_torch_states),
    Setting("threads", torch.get_num_threads, torch.set_num_threads, hidden=True),
    Setting("default tensor type", torch._C._get_default_device, set_tensor_type),
    Setting("default dtype", torch.get_default_dtype, torch.set_default_dtype),
    Setting("deterministic algorithms", deterministic, set_deterministic),
    attribute(torch.utils.deterministic, "fill_uninitialized_memory"),
    Setting("warn always", torch.is_warn_always_enabled, torch.set_warn_always),
    Setting("anomaly mode", anomaly, lambda value: torch.set_anomaly_enabled(*value)),
    entries("torch's print options", lambda: vars(torch._tensor_str.PRINT_OPTS)),
    attribute(torch.__future__, "_overwrite_module_params_on_conversion"),
    attribute(torch.__future__, "_swap_module_params_on_conversion"),
    # what torch notes beside its stack of modes, and forgets to take back when one is left half-way
    attribute(torch.utils._python_dispatch, "_is_in_torch_dispatch_mode"),
    attribute(torch.utils._python_dispatch, "_is_in_non_infra_torch_dispatch_mode"),
    attribute(torch.utils._python_dispatch, "_is_in_any_mode_without_ignore_compile_internals"),
    *[module_hooks(f"_global_{kind}_hooks") for kind in HOOKS],
    Setting("flash attention", cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    Setting("memory-efficient attention", cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    Setting("plain attention", cuda.math_sdp_enabled, cuda.enable_math_sdp),
    Setting("cuDNN attention", cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    Setting("fast path of nn.MultiheadAttention", mha.get_fastpath_enabled, mha.set_fastpath_enabled),
    Setting("matmul precision", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    *map(backend, BACKENDS),
    # NumPy and matplotlib
    Setting("NumPy's random state", numpy_state, set_numpy_state),
    Setting("NumPy's print options", np.get_printoptions, lambda value: np.set_printoptions(**value)),
    Setting("matplotlib's settings", lambda: dict(rc_params()), lambda value: dict.update(rc_params(), value)),
    # Python
    Setting("Python's random state", random.getstate, random.setstate),
    Setting("recursion limit", sys.getrecursionlimit, sys.setrecursionlimit),
    Setting("longest int as text", sys.get_int_max_str_digits, sys.set_int_max_str_digits),
    Setting("stack of a new thread", threading.stack_size, threading.stack_size),
    Setting("garbage collection", gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
    Setting("thresholds of garbage collection", gc.get_threshold, lambda value: gc.set_threshold(*value)),
    Setting("debugging of garbage collection", gc.get_debug, gc.set_debug),
    Setting("locale", lambda: locale.setlocale(locale.LC_ALL), lambda value: locale.setlocale(locale.LC_ALL, value)),
    Setting("current directory", os.getcwd, os.chdir),
    entries("os.environ", lambda: os.environ),
    entries("built-in names", lambda: vars(builtins)),
    Setting("sys.path", lambda: list(sys.path), set_path),
    Setting("warning filters", lambda: list(warnings.filters), set_filters),
    attribute(warnings, "showwarning"),
    *[attribute(sys, name) for name in ("stdin", "stdout", "stderr", "displayhook", "excepthook", "unraisablehook")],
    attribute(threading, "excepthook"),
    *[attribute(owner, name) for owner, name in [*FORBIDDEN, (sys, "setrecursionlimit")]],
]


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Put every setting back after the block, whatever happened in it; what did not change is not touched."""
    before = []
    for setting in SETTINGS:
        with contextlib.suppress(Exception):  # not in this build of PyTorch, or not in use
            before.append((setting, setting.read()))
    try:
        yield
    finally:
        for setting, value in before:
            with contextlib.suppress(Exception):  # one that cannot be put back must not keep the others from it
                if setting.hidden or not is_still(setting, value):
                    setting.write(value)


def is_still(setting: Setting, value: Any) -> bool:
    """Whether a setting is what it was; not so when it cannot even be read."""
    try:
        return bool(setting.read() == value)
    except Exception:
        return False
