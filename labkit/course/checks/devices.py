"""Devices: whether code would run with its arguments on a GPU, found on a CPU.

    mixed = mixed_devices(answer, reference, (q, k, v), {})  # None, or what meets what

The arguments are taken to lie on another device, and so is what is computed from them. A tensor that the code makes
without saying where (`torch.arange(5)`) lies on the CPU, and so is what is computed from such tensors alone. Where the
two meet in an operation that needs one device, a GPU's run would stop. Nothing is really moved: numbers, branches and
errors are those of an ordinary call. What is not known to be one or the other (a tensor from outside the call, one made
with a `device=` taken from a tensor) is never accused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from linecache import getline
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from labkit.ledger import tensors_in

if TYPE_CHECKING:  # exercise.py stands on this file's neighbours
    from labkit.course.exercise import Exercise

AWAY, HERE = "another device", "the CPU"
MOVES = {"to", "type_as", "cpu", "cuda"}
FROM_LISTS = {"tensor", "as_tensor", "asarray"}  # whose numbers may have come from a tensor
INDEXES = {"__getitem__", "__setitem__", "index_put", "index_put_"}  # an index may lie on the CPU
FREE = {"copy_", "set_", "__set__", "expand_as", "view_as", "reshape_as", "broadcast_tensors", "result_type",
        "tensor_split"}  # fmt: skip  # devices may differ: a copy, or nothing but shapes and dtypes


class Places(TorchFunctionMode):
    """Follows tensors from function to function. met: the first place where the two devices meet, in words."""

    def __init__(self, arguments: Any) -> None:
        super().__init__()
        self.known: dict[int, tuple[Tensor, str]] = {}  # by id; the tensor is kept, so that its id stays its own
        self.met = ""
        for tensor in tensors_in(arguments):
            self.put(tensor, AWAY)

    def put(self, tensor: Tensor, place: str, *, anew: bool = False) -> None:
        """Note where a tensor lies, unless that is known. anew: it was moved, which makes no other tensor here."""
        if id(tensor) not in self.known or (anew and self.place(tensor) == HERE):
            self.known[id(tensor)] = tensor, place

    def place(self, tensor: Tensor) -> str:
        """Where a tensor lies; "" where that is not known."""
        return self.known.get(id(tensor), (tensor, ""))[1]

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        given = list(tensors_in((list(args), kwargs)))
        if not self.met:
            self.met = self.meeting(name, args, kwargs, given)
        result = func(*args, **kwargs)
        for tensor in tensors_in(result):
            self.put(tensor, self.place_of_result(name, args, kwargs, given), anew=name in MOVES)
        return result

    def meeting(self, name: str, args: tuple, kwargs: Mapping, given: list[Tensor]) -> str:
        """What stops a GPU's run at this call; "" where nothing does."""
        if name in MOVES | FROM_LISTS | FREE or (name in INDEXES and self.place(args[0]) == AWAY):
            return ""
        needed = list(tensors_in(list(args[:2]))) if name in INDEXES else given  # what is written may lie elsewhere
        here = next((tensor for tensor in needed if self.place(tensor) == HERE and tensor.dim()), None)
        if here is None or not any(self.place(tensor) == AWAY for tensor in needed):
            return ""
        line = line_outside(sys._getframe(2))
        return f"`{name.strip('_')}` meets a tensor {list(here.shape)} that was made on the CPU{line}"

    def place_of_result(self, name: str, args: tuple, kwargs: Mapping, given: list[Tensor]) -> str:
        """Where the result of a call lies."""
        places = {self.place(tensor) for tensor in given}
        said = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.device | str)] if name in MOVES else []
        if name in ("cpu", "cuda") or said or (name in FROM_LISTS and given):
            return ""
        if kwargs.get("device") is not None:
            return HERE if kwargs["device"] == "cpu" and not given else ""
        if AWAY in places:
            return AWAY
        return HERE if places <= {HERE} else ""


def line_outside(frame: Any) -> str:
    """The innermost line that is not PyTorch's, if its text is known, in words that end a sentence."""
    while frame is not None and frame.f_code.co_filename.startswith(PYTORCH):
        frame = frame.f_back
    text = getline(frame.f_code.co_filename, frame.f_lineno).strip() if frame is not None else ""
    return f", in `{text}`" if text else ""


PYTORCH = torch.__path__[0]


def mixed_devices(answer: Callable, reference: Callable, args: tuple, by_name: Mapping[str, Any]) -> str:
    """What would stop this call if its arguments were on a GPU, or come back on the CPU; "" if nothing is seen.

    A call that raises says nothing: other checks have more to say about it. Nor does one at which the reference would
    stop as well.
    """
    with suppress(Exception), Places((list(args), dict(by_name))) as right:
        wanted = reference(*args, **by_name)
        if right.met:
            return ""
        with Places((list(args), dict(by_name))) as places:
            result = answer(*args, **by_name)
        if places.met:
            return places.met
        for got, want in zip(tensors_in(result), tensors_in(wanted), strict=True):
            if places.place(got) == HERE and right.place(want) == AWAY and got.dim():
                return f"the result {list(got.shape)} was made on the CPU"
    return ""


def check_devices(exercise: type[Exercise], answer: Callable, reference: Callable, args: tuple,
                  by_name: Mapping[str, Any], told: str) -> None:  # fmt: skip
    """Fail where the call would stop on a GPU, at the end of the examination: whatever else is wrong is said first.

    told: the call in words.
    """
    from labkit.course.exercise import RESULTS

    def look() -> None:
        if seen := mixed_devices(answer, reference, args, by_name):
            exercise.fail(
                "wrong-device",
                seen=f"{told}: were these tensors on a GPU, the call would fail: {seen}",
                cause="a tensor that your code makes says nothing of its device, and lies on the CPU then: "
                "torch.arange, ones, zeros, full, tensor",
                look="every tensor that your code makes: give it device=x.device of an argument x, or make it from x "
                "(x.new_zeros, torch.ones_like)",
            )

    if (results := RESULTS.get()) is not None:
        results.last.append(look)
    else:
        look()
