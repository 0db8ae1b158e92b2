"""What a step of attention copies of K and V, and how often it reads them.

with Making() as making:
    effort = effort_of(step)
check_copies(type(self), making, k, v, "1 new token, bfloat16", look="what is done to k and v: nothing need be")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from labkit.course.checks.effort import EMPTY, FILLED, Effort, Kernels, check_stays, effort_of
from labkit.course.checks.tensors import heads
from labkit.course.exercise import Exercise
from labkit.ledger import memory_of, tensors_in, unique_bytes

PRODUCTS = {
    "matmul",
    "bmm",
    "baddbmm",
    "einsum",
    "mul",
    "multiply",
    "tensordot",
    "inner",
    "scaled_dot_product_attention",
}
MULTIPLIES = {
    getattr(torch.ops.aten, name)
    for name in ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "_scaled_dot_product_flash_attention_for_cpu")
}
ELEMENTWISE = {"mul", "multiply", "div", "divide", "truediv", "true_divide", "add", "sub"}

JOINS = {"cat", "concat", "concatenate", "hstack"}
RESHAPE = "what is done to k and v: nothing need be. Reshape q"

GROUP = 3  # query heads of a KV head in `steps`


class Largest(Kernels):
    """Keeps the largest tensor that kernels make, and counts what they read of the `watched` ones: of their memory, and
    of what was copied from it."""

    def __init__(self, watched: list[Tensor]) -> None:
        super().__init__(Effort())
        self.tensor: Tensor | None = None
        self.watched, self.read = watched, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        before, made = self.effort.largest, self.effort.made
        calls = self.effort.calls
        memory = set(map(memory_of, self.watched))
        given = {id(x): x for x in tensors_in((args, dict(kwargs or {})))}
        theirs = [x for x in given.values() if memory_of(x) in memory]
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.effort.largest > before:
            self.tensor = max(tensors_in(result), key=lambda tensor: tensor.nbytes)
        if theirs and self.effort.calls > calls and func.overloadpacket not in FILLED:
            self.read += sum(map(unique_bytes, theirs))
            if func.overloadpacket not in MULTIPLIES:  # a cast or a copy, in whatever parts, is K or V again
                least = min(x.numel() for x in theirs)
                new = list(tensors_in(result)) if self.effort.made > made else []
                self.watched += [x for x in new if x.numel() >= least]
                self.watched += [args[0]] if func.overloadpacket is torch.ops.aten.copy_ else []
        return result


class Making(TorchFunctionMode):
    """The largest tensor that a piece of code makes, and the function that made it, as the code calls it. watched: K
    and V, of which `read` bytes were read, copies of them included."""

    def __init__(self, *watched: Tensor) -> None:
        super().__init__()
        self.watched, self.read = list(watched), 0
        self.tensor: Tensor | None = None
        self.by = ""
        self.enable_gqa = False

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        self.enable_gqa = self.enable_gqa or bool((kwargs or {}).get("enable_gqa"))
        with Largest(self.watched) as largest:
            result = func(*args, **(kwargs or {}))
        made = largest.tensor
        self.read += largest.read
        if made is not None and (self.tensor is None or made.nbytes > self.tensor.nbytes):
            self.tensor, self.by = made, name
        return result


def steps() -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Calls to measure: one new token and two, two dtypes, K and V in one piece and cut from a buffer.

    6 query heads on 2 KV heads. Heads are wide beside the tokens, so that scores are small: no right way makes a tensor
    as large as one head's K.
    """
    for dtype in (torch.float32, torch.bfloat16):
        for new in (1, 2):
            q, k, v = (x.to(dtype) for x in heads(2 * GROUP, 2, new, 97 - new, head_dim=512))
            yield f"{counted(new)}, {str(dtype).removeprefix('torch.')}", q, k, v
            k, v = (torch.cat((x, x[:, :, :8]), dim=2)[:, :, :97] for x in (k, v))
            yield f"{counted(new)}, K and V cut from a larger buffer", q, k, v


def check_step(exercise: type[Exercise], run: Callable[[], Any], k: Tensor, v: Tensor, when: str, *, once: bool,
               enable_gqa: bool, look: str = RESHAPE) -> None:  # fmt: skip
    """Fail when `run()` copies K or V, or takes numbers out of PyTorch; a cast is let pass. once: or reads them again.
    enable_gqa: whether PyTorch may do the grouping. look: where to look for a copy."""
    with Making(k, v) as making:
        effort = effort_of(lambda: exercise.run(run))
    if making.enable_gqa and not enable_gqa:
        exercise.fail(
            "enable-gqa",
            seen="scaled_dot_product_attention(..., enable_gqa=True) does the grouping. The values are right",
            cause="that is the line to use in a product. What it does is this exercise: its fused kernels read each KV "
            "head once, its fallback (SDPBackend.MATH) expands K and V",
            look="stack the queries of a group as rows; then the heads are equal and no option is needed",
        )
    check_stays(exercise, effort)
    check_copies(exercise, making, k, v, when, look=look)
    if once:
        check_reads(exercise, making, k, v, when)


def check_copies(exercise: type[Exercise], making: Making, k: Tensor, v: Tensor, when: str, *, look: str) -> None:
    """Fail when a tensor was made as large as K of one KV head of one request, or larger; a cast is let pass."""
    made = making.tensor
    if made is None or made.nbytes < k[0, 0].nbytes or cast_of(made, k):
        return
    times = made.nbytes / k.nbytes
    size = f"{times:.2g} times the bytes of K" if times != 1 else "as many bytes as K"
    seen = f"{when}: the values are right, and `{making.by}` makes a tensor of {size}"
    if making.by in ELEMENTWISE and made.numel() == k.numel():
        exercise.fail(
            "made-anew",
            seen=seen,
            cause=f"`{making.by}` went over all of K or V, which writes a new tensor as large at every step",
            look="what else can take the factor: q and the scores are small",
        )
    if making.by in PRODUCTS:
        exercise.fail(
            "broadcast-copies",
            seen=f"{seen}, though no line says copy",
            cause="k and v met q with batch dimensions of other sizes, or with fewer of them: a product repeats them "
            "until both sides have the same, and writes that out",
            look="both sides of the product: 4 dimensions each, with [batch, num_kv_heads] in front",
        )
    if holds(made, k, v, GROUP):
        exercise.fail(
            "expanded",
            seen=seen,
            cause="K or V was repeated to all query heads: by repeat_interleave, an index, stack, or an expand that a "
            "reshape then has to write out",
            look=look,
        )
    if holds(made, k, v, 1):
        exercise.fail(
            "copied-whole",
            seen=seen,
            cause="K or V was joined anew: cat writes out all that was held, behind it what is new"
            if making.by in JOINS
            else "K or V was copied as it is: by contiguous, clone, or a reshape that cannot be a view",
            look="what was read: after append it holds the new tokens too"
            if making.by in JOINS
            else "what is done to k and v: nothing need be; @ takes them as they lie",
        )
    exercise.fail(
        "makes-large",
        seen=seen,
        cause="a part of K or V was copied, or something as large was made beside them",
        look=f"the line that calls `{making.by}`: the scores of a few new tokens need far less room than their keys",
    )


def cast_of(made: Tensor, k: Tensor) -> bool:
    """Whether a tensor can be K or V, or a part of them, in another dtype: as large as one head's, no larger than K."""
    return made.dtype != k.dtype and k[0, 0].numel() <= made.numel() <= k.numel()


def holds(made: Tensor, k: Tensor, v: Tensor, times: int) -> bool:
    """Whether a tensor holds the numbers of K, or of V, so many times over, in whatever order."""
    total = made.double().abs().sum().item()
    return any(made.numel() == times * x.numel() and abs(total / times / x.double().abs().sum().item() - 1) < 1e-3
               for x in (k, v))  # fmt: skip


def check_reads(exercise: type[Exercise], making: Making, k: Tensor, v: Tensor, when: str) -> None:
    """Fail when K and V were read twice or more. What is made of scores and outputs on the way does not count."""
    made = making.tensor
    wider = made.element_size() / k.element_size() if made is not None and cast_of(made, k) else 0
    once = 1 + wider  # what a cast makes is read in turn
    times = making.read / (k.nbytes + v.nbytes)
    if times >= once + 0.9 * max(wider, 1):
        exercise.fail(
            "reads-again",
            seen=f"{when}: nothing is repeated, but the step reads {times:.1f} times the bytes of K and V; {once:.0f} "
            "would do",
            cause="several products read the same keys: one for each query head, or one for each new token",
            look="one product for each KV head, with all query heads of its group and all new tokens as rows",
        )


class Repeated(Kernels):
    """Notes whether a tensor was made that holds every number of one of these several times, `times` or more."""

    def __init__(self, originals: Sequence[Tensor], times: int) -> None:
        super().__init__(Effort())
        self.originals, self.times, self.found = [x.flatten().sort().values for x in originals], times, False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        before = self.effort.made
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for x in tensors_in(result) if self.effort.made > before and func.overloadpacket not in EMPTY else ():
            for original in self.originals:
                if x.numel() == self.times * original.numel() and x.dtype == original.dtype:
                    self.found |= torch.equal(x.flatten().sort().values, original.repeat_interleave(self.times))
        return result


def check_new_tokens(exercise: type[Exercise], run: Callable[[], Any], k: Tensor, v: Tensor, when: str) -> None:
    """Fail when `run()` repeats the new tokens' K or V for every query head, whatever becomes of that."""
    with Repeated((k, v), GROUP) as repeated:
        exercise.run(run)
    if repeated.found:
        exercise.fail(
            "repeats-new-tokens",
            seen=f"{when}: what is held and what comes out is right, and on the way the new K or V was repeated "
            f"{GROUP} times, once for each query head of a group",
            cause="the line that repeats is still there; what it makes is cut again afterwards",
            look="every line between k, v and the append: they can go in as they came",
        )


def counted(new: int) -> str:
    """So many new tokens, in words."""
    return f"{new} new token{'s' * (new != 1)}"
