"""Whatever an answer sets is put back: every row of the table, alone and together, and what belongs to a thread."""

from __future__ import annotations

import builtins
import contextlib
import decimal
import gc
import locale
import os
import random
import sys
import threading
import warnings
from operator import attrgetter

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from labkit.course.examine import examine
from labkit.course.settings import BACKENDS, FORBIDDEN, HOOKS, SETTINGS, restored
from labkit.ledger import Ledger
from tests.course.exercises import Double, double

ROWS = {setting.name: setting for setting in SETTINGS}
# What a run of this test cannot change: no such thing here, or out of an answer's reach.
ELSEWHERE = {"default tensor type", "quantized.engine", "opt_einsum.strategy"}


def other(value):
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if value is None:
        return True
    return {"none": "ieee", "ieee": "tf32", "tf32": "ieee"}.get(value, value)


def flip(name):
    """A change of one flag of torch.backends."""
    owner, _, flag = f"backends.{name}".rpartition(".")

    def change():
        setattr(attrgetter(owner)(torch), flag, other(getattr(attrgetter(owner)(torch), flag)))

    return change


def bind(owner, name):
    """A change of what a name stands for."""
    return lambda: setattr(owner, name, lambda *args, **kwargs: None)


def turn(owner, name):
    """A change of an attribute that is true or false."""
    return lambda: setattr(owner, name, not getattr(owner, name))


def leave_filters():
    warnings.catch_warnings().__enter__()
    warnings.simplefilter("error")


MODES = torch.utils._python_dispatch
CHANGES = {
    "torch's random states": lambda: torch.rand(1),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "torch.utils.deterministic.fill_uninitialized_memory": turn(torch.utils.deterministic, "fill_uninitialized_memory"),
    "warn always": lambda: torch.set_warn_always(True),
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "torch's print options": lambda: torch.set_printoptions(precision=9, sci_mode=True),
    "torch.__future__._overwrite_module_params_on_conversion": lambda: (
        torch.__future__.set_overwrite_module_params_on_conversion(True)
    ),
    "torch.__future__._swap_module_params_on_conversion": lambda: torch.__future__.set_swap_module_params_on_conversion(
        True
    ),
    **{
        f"torch.utils._python_dispatch.{name}": turn(MODES, name)
        for name in (
            "_is_in_torch_dispatch_mode",
            "_is_in_non_infra_torch_dispatch_mode",
            "_is_in_any_mode_without_ignore_compile_internals",
        )
    },
    **{
        f"torch.nn.modules.module._global_{kind}_hooks": lambda kind=kind: getattr(
            torch.nn.modules.module, f"register_module_{kind}_hook"
        )(lambda *args: None)
        for kind in HOOKS
    },
    "flash attention": lambda: torch.backends.cuda.enable_flash_sdp(False),
    "memory-efficient attention": lambda: torch.backends.cuda.enable_mem_efficient_sdp(False),
    "plain attention": lambda: torch.backends.cuda.enable_math_sdp(False),
    "cuDNN attention": lambda: torch.backends.cuda.enable_cudnn_sdp(False),
    "fast path of nn.MultiheadAttention": lambda: torch.backends.mha.set_fastpath_enabled(False),
    "matmul precision": lambda: torch.set_float32_matmul_precision("medium"),
    **{f"torch.backends.{name}": flip(name) for name in BACKENDS if name not in ELSEWHERE},
    "NumPy's random state": lambda: np.random.rand(),  # noqa: NPY002
    "matplotlib's settings": lambda: matplotlib.rcParams.update({"lines.linewidth": 77}),
    "Python's random state": random.random,
    "recursion limit": lambda: sys.setrecursionlimit(5_000),
    "longest int as text": lambda: sys.set_int_max_str_digits(10_000),
    "stack of a new thread": lambda: threading.stack_size(2**20),
    "garbage collection": gc.disable,
    "thresholds of garbage collection": lambda: gc.set_threshold(10_000, 50, 50),
    "debugging of garbage collection": lambda: gc.set_debug(gc.DEBUG_UNCOLLECTABLE),
    "locale": lambda: locale.setlocale(locale.LC_ALL, "C" if "UTF-8" in locale.setlocale(locale.LC_ALL) else "C.UTF-8"),
    "current directory": lambda: os.chdir("/"),
    "os.environ": lambda: (os.environ.clear(), os.environ.update(LABKIT="1")),
    "built-in names": lambda: setattr(builtins, "sum", max),
    "sys.path": lambda: sys.path.insert(0, "here"),
    "warning filters": leave_filters,
    "warnings.showwarning": bind(warnings, "showwarning"),
    **{
        f"sys.{name}": bind(sys, name)
        for name in ("stdin", "stdout", "stderr", "displayhook", "excepthook", "unraisablehook", "setrecursionlimit")
    },
    "threading.excepthook": bind(threading, "excepthook"),
    **{f"{owner.__name__}.{name}": bind(owner, name) for owner, name in FORBIDDEN if owner is not None},
}
ROWS_HERE = [name for name in ROWS if name in CHANGES]


def values() -> dict:
    """Every setting that this build has, as it stands."""
    found = {}
    for name, setting in ROWS.items():
        with contextlib.suppress(Exception):
            found[name] = setting.read()
    return found


def test_every_row_of_the_table_has_a_change() -> None:
    backends = {f"torch.backends.{name}" for name in ELSEWHERE}
    # NumPy's print options: since 2.2 they belong to a thread. ask_exit: where no notebook runs, there is none.
    assert ROWS.keys() - CHANGES.keys() <= {*ELSEWHERE, *backends, "NumPy's print options", "NoneType.ask_exit"}
    assert CHANGES.keys() <= ROWS.keys()


@pytest.mark.parametrize("name", ROWS_HERE)
def test_what_an_answer_sets_is_put_back(name) -> None:
    before, seen = values(), []

    def sets(x):
        seen.append(ROWS[name].read())
        CHANGES[name]()
        seen.append(ROWS[name].read())
        return x * 2

    with contextlib.suppress(KeyError):
        examine(Double(), sets)
    assert seen[0] != seen[1]
    assert values() == before


@settings(max_examples=30)
@given(st.lists(st.sampled_from(ROWS_HERE), unique=True), st.booleans())
def test_whatever_an_answer_sets_in_whatever_order_is_put_back(names, raises) -> None:
    before = values()
    with contextlib.suppress(ZeroDivisionError), restored():
        for name in names:
            CHANGES[name]()
        assert not raises or 1 / 0
    assert values() == before


def test_an_answer_that_is_stopped_leaves_nothing_set() -> None:
    before = values()

    def sets(x):
        for change in CHANGES.values():
            change()
        while True:
            pass

    assert examine(Double(), sets, limit=1.0).finding.diagnosis == "too-slow"
    assert values() == before


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def denormals() -> bool:
    return (torch.tensor(1e-40) * 0.5).item() != 0


KEPT: list = []


def let_go() -> None:
    """End the contexts that answers left open: PyTorch's guard of another thread's mode sets this thread's."""
    grad = torch.is_grad_enabled()
    KEPT.clear()
    torch.set_grad_enabled(grad)


def enter(context):
    KEPT.append(context)
    context.__enter__()


# What belongs to a thread: how an answer changes it, how it is read.
THREAD = {
    "grad mode": (lambda: torch.set_grad_enabled(True), torch.is_grad_enabled),
    "inference mode": (lambda: enter(torch.inference_mode()), torch.is_inference_mode_enabled),
    "autocast": (lambda: enter(torch.autocast("cpu")), lambda: torch.is_autocast_enabled("cpu")),
    "autocast's dtype": (
        lambda: torch.set_autocast_dtype("cpu", torch.float16),
        lambda: torch.get_autocast_dtype("cpu"),
    ),
    "function modes": (lambda: enter(Ledger()), torch._C._len_torch_function_stack),
    "dispatch modes": (lambda: enter(Dispatch()), torch._C._len_torch_dispatch_stack),
    "default device": (lambda: torch.set_default_device("meta"), torch.get_default_device),
    "denormals": (lambda: torch.set_flush_denormal(True), denormals),
    "NumPy's errors": (lambda: np.seterr(all="raise"), np.geterr),
    "NumPy's print options": (lambda: np.set_printoptions(precision=3), np.get_printoptions),
    "decimals": (lambda: setattr(decimal.getcontext(), "prec", 5), lambda: decimal.getcontext().prec),
    "tracing": (lambda: sys.settrace(lambda *args: None), sys.gettrace),
}


@pytest.mark.parametrize("name", THREAD)
@pytest.mark.parametrize("ends", ["returns", "raises", "hangs"])
def test_what_belongs_to_a_thread_ends_with_the_check(name, ends) -> None:
    change, read = THREAD[name]
    before, seen = read(), []

    def sets(x):
        seen.append(read())
        change()
        seen.append(read())
        assert ends != "raises"
        while ends == "hangs":
            pass
        return x

    examine(Double(), sets, limit=0.3)
    assert seen[0] != seen[1]
    assert read() == before
    assert examine(Double(), double).status == "pass"
    let_go()
    assert read() == before


def test_a_check_is_the_same_whatever_the_learner_set() -> None:
    before = torch.get_num_threads()
    try:
        for name in ("default dtype", "deterministic algorithms", "warn always"):
            CHANGES[name]()
        torch.set_default_device("meta")
        torch.set_flush_denormal(True)
        enter(torch.inference_mode())
        after = torch.get_default_dtype()
        seen = []
        answer = lambda x: seen.append((torch.ones(1) / 3, torch.rand(1), random.random(), denormals())) or x * 2  # noqa: E731
        assert examine(Double(), answer).status == "pass"
        assert torch.get_default_dtype() == after == torch.float64
        assert torch.get_default_device().type == "meta"
    finally:
        KEPT.pop().__exit__(None, None, None)
        torch.set_default_device(None)
        torch.set_flush_denormal(False)
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
        torch.set_warn_always(False)
        torch.set_num_threads(before)
    third, drawn, number, kept = seen[0]
    assert third.dtype == torch.float32
    assert third.device.type == "cpu"
    assert kept
    assert examine(Double(), answer).status == "pass"
    assert torch.equal(seen[1][1], drawn)
    assert seen[1][2] == number
