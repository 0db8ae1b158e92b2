"""Effort: what a piece of code makes and touches, counted below the names of the functions that it calls.

    effort = effort_of(lambda: answer(q, k, v))
    effort.made, effort.largest, effort.touched, effort.left

The work ledger (`labkit/ledger.py`) counts calls by name, so that a CPU and a GPU count alike; a name that it does not
know is invisible to it. This counts what reaches PyTorch's kernels, whatever the name, and says when numbers leave
PyTorch, where nothing can be counted and a GPU cannot follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from labkit.ledger import memory_of, tensors_in, unique_bytes

if TYPE_CHECKING:  # exercise.py stands on this file
    from labkit.course.exercise import Exercise

LEAVES = {"numpy", "tolist", "__array__", "__dlpack__"}
EMPTY = {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty}  # nothing is written yet
SUBCLASS = "Creating a new Tensor subclass"  # how PyTorch's error begins
FILLED = {torch.ops.aten.new_zeros, torch.ops.aten.new_ones, torch.ops.aten.new_full, torch.ops.aten.zeros_like,
          torch.ops.aten.ones_like, torch.ops.aten.full_like}  # fmt: skip  # what they are given is not read
FILLS = FILLED | {torch.ops.aten.zeros, torch.ops.aten.ones, torch.ops.aten.full, torch.ops.aten.zero_,
                  torch.ops.aten.fill_}  # fmt: skip  # one number everywhere
FEW = 16  # numbers: a shape, a length or an index may be read out; data may not
SOME = 64  # floats: a table of constants, such as frequencies, may be read out


@dataclass
class Effort:
    """made: bytes of new memory, in all. largest: of the largest single tensor made. touched: bytes that kernels read
    and wrote; a view costs nothing, a broadcast operand counts what is in memory. filled: those of them that were
    filled with one number. calls: kernels run. left: how numbers left PyTorch (`numpy`, `tolist` and the like), more
    than a few at once; floats_left: of floats, more than a table of constants holds. result: what `run` returned.
    """

    made: int = 0
    largest: int = 0
    touched: int = 0
    calls: int = 0
    left: list[str] = field(default_factory=list)
    floats_left: list[str] = field(default_factory=list)
    filled: int = 0
    result: Any = None


class Kernels(TorchDispatchMode):
    """Counts every kernel."""

    def __init__(self, effort: Effort) -> None:
        super().__init__()
        self.effort = effort

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; True, PyTorch's default, imports the compiler at the first kernel: seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        given = list(tensors_in((args, dict(kwargs or {}))))
        before = {memory_of(tensor) for tensor in given}
        result = func(*args, **(kwargs or {}))
        back = list(tensors_in(result))
        new = [tensor for tensor in back if memory_of(tensor) not in before]
        made = [tensor.untyped_storage().nbytes() for tensor in new]
        self.effort.made += sum(made)
        self.effort.largest = max(self.effort.largest, *made, 0)
        view = bool(back) and not new and not func._schema.is_mutable
        if not view:
            self.effort.calls += 1
        if not view and func.overloadpacket not in EMPTY:
            read = [] if func.overloadpacket in FILLED else given
            moved = sum(map(unique_bytes, {id(tensor): tensor for tensor in read + new}.values()))
            self.effort.touched += moved
            self.effort.filled += moved if func.overloadpacket in FILLS else 0
        return result


class Leaving(TorchFunctionMode):
    """Notes the functions by which numbers leave PyTorch."""

    def __init__(self, effort: Effort) -> None:
        super().__init__()
        self.effort = effort

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in LEAVES and args and args[0].numel() > FEW:
            self.effort.left.append(name)
            if args[0].is_floating_point() and args[0].numel() > SOME:
                self.effort.floats_left.append(name)
        return func(*args, **(kwargs or {}))


class ByFunction(TorchFunctionMode):
    """Counts the kernels that functions run, and none outside of them."""

    def __init__(self, effort: Effort) -> None:
        super().__init__()
        self.effort = effort

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        with Kernels(self.effort):
            return func(*args, **(kwargs or {}))


def effort_of(run: Callable[[], Any]) -> Effort:
    """The effort of `run()`, which is run again where it makes a tensor of a class of its own, such as a CausalBias:
    PyTorch cannot make one while every kernel is counted."""
    effort = Effort()
    try:
        with Leaving(effort), Kernels(effort):
            effort.result = run()
    except Exception as error:
        if SUBCLASS not in str(getattr(error, "finding", error)):
            raise
        effort = Effort()
        with Leaving(effort), ByFunction(effort):
            effort.result = run()
    return effort


def check_stays(exercise: type[Exercise], effort: Effort) -> None:
    """Fail when numbers left PyTorch on the way: a GPU could not follow, and nothing could be counted."""
    if effort.left:
        exercise.fail(
            "left-pytorch",
            seen=f"the numbers left PyTorch, by {', '.join(f'{name}()' for name in dict.fromkeys(effort.left))}",
            cause="they were handed to NumPy or to Python's own numbers; on a GPU that stops, or waits for a copy of "
            "everything",
            look="torch has the same functions: stay with tensors from the arguments to the result",
        )
